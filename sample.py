"""See Medusa decode: the text as it comes, the same prompt decoded plainly, and a comparison.

    python sample.py --prompt "class Stack:" --temperature 0.7 --tree 4x2x1

speed-up = tokens/step / step cost (in the paper's words: acceleration rate / overhead). The size of
the tree is chosen by both: the calibration of the heads tells the first, a clock the second.

Dimension key: N tree nodes; K heads; V vocabulary (v of it, if the heads' own is truncated).
"""

import copy
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, linear_regression, median

import torch
from torch import Tensor, nn
from tqdm import tqdm

import medusa
from data.chat import chat_prompt
from data.command import option, parsed, pick_device, run
from data.corpus import read_text
from data.tokenizer import SHIPPED_BASE, load_base
from data.trace import TextStream, check_page, text_content, write_page
from medusa import MedusaHeads, Sampling, Step, calibration_path, logits_to_probs
from model import GPT, check, check_sizes, naming_errors, read_json
from tree import ROOT_ONLY, Tree, calibrated_tree, cartesian_tree, choose_size
from tree import expected_tokens, read_counts, tree_from_paths

# ---- settings ----
PROMPT = 'def quote(s):\n    """Return a quoted copy of the string."""\n    if not s:\n'
SEQUENTIAL = "data/sequential-heads"  # shipped as well


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = option(PROMPT, "text to continue")
    prompt_file: str = option("", "read the prompt from this UTF-8 file")
    chat: str = option("", "in place of a prompt: a user's turn, for a chat model to answer")
    max_new_tokens: int = option(128, "tokens to decode")
    temperature: float = option(Sampling.temperature, "0 is greedy")
    top_k: int = option(Sampling.top_k, "sample among the k most likely tokens; 0: all")
    top_p: float = option(Sampling.top_p, "sample among the fewest tokens of this probability")
    accept: str = option("lossless", "acceptance rule", choices=("lossless", "typical"))
    epsilon: float = option(Sampling.epsilon, "of typical acceptance")
    tree: str = option("auto", "auto, nodes, widths 4x2x1, mc_sim_7b_63, or JSON file of paths")
    seed: int = option(0, "of sampling")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("float32", "weights", choices=("float32", "float64", "bfloat16", "float16"))
    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option("", "directory or file; default: data/heads, or heads/ in --base")
    trace: str = option("", "write a page that replays the decoding, step by step, to this file")

    def __post_init__(self):
        check_sizes(self, ["max_new_tokens"])
        check(0 <= self.seed < 1 << 63, f"--seed {self.seed}: must be 0 to 2^63 - 1")

    def sampling(self) -> Sampling:
        # A flag that would have no effect is a mistake.
        greedy, typical = self.temperature == 0, self.accept == "typical"
        if greedy and (typical or (self.top_k, self.top_p) != (Sampling.top_k, Sampling.top_p)):
            raise ValueError("--accept typical, --top-k, --top-p: need --temperature above 0")
        check(typical or self.epsilon == Sampling.epsilon, "--epsilon: belongs to --accept typical")
        return Sampling(self.temperature, self.top_k, self.top_p, typical, self.epsilon)

    def text(self) -> str:
        """The text of --prompt, --chat or --prompt-file."""
        given = [self.prompt != PROMPT, self.chat != "", self.prompt_file != ""]
        check(given.count(True) < 2, "--prompt, --chat, --prompt-file: give only one of them")
        if self.prompt_file != "":
            return read_text(self.prompt_file)
        # Bytes of the command line that are not UTF-8 are refused.
        with naming_errors("the prompt", " is not UTF-8"):
            return (self.chat or self.prompt).encode().decode()


# ---- faster products on a CPU: layouts in memory, no idea of Medusa ----
def pack_linears(model: GPT) -> None:
    """On a CPU with oneDNN, give every large nn.Linear a faster forward; for inference only."""
    if model.lm_head.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtypes = [torch.float32, torch.bfloat16] if bfloat16 else [torch.float32]

    def product(weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")

    for linear in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        weight = linear.weight.detach()
        # A second copy in oneDNN's layout: best for 8 rows, right for any number.
        if weight.numel() >= 1 << 18 and weight.dtype in dtypes:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
            linear.forward = partial(product, packed, linear.bias)


@torch.inference_mode()
def pick_threads(model: GPT) -> None:
    """On a busy CPU threads wait for each other: take one, unless several are clearly faster."""
    several, context = torch.get_num_threads(), model.config.max_position_embeddings
    if model.lm_head.weight.device.type != "cpu" or several == 1:
        return
    tokens, times = torch.zeros(1, min(context, 16), dtype=torch.long), {several: [], 1: []}
    begin = time.perf_counter()
    while len(times[1]) < 15 and time.perf_counter() - begin < 2:
        for threads, seconds in times.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            model(tokens)
            seconds.append(time.perf_counter() - start)
    is_faster = median(times[several]) < 0.8 * median(times[1])
    torch.set_num_threads(several if is_faster else 1)
    if not is_faster:
        print(f"decoding with one thread: {several} are not clearly faster", file=sys.stderr)


# ---- one decoding, timed and streamed ----
Timed = tuple[list[int], list[float]]  # tokens, and seconds of each step after the prompt's own


def timed_run(steps: Iterable[Step], show: Callable[[Step], None] = lambda _: None) -> Timed:
    """Decode to the end. The clock is stopped while `show` prints."""
    tokens, times, start = [], [], time.perf_counter()
    for step in steps:
        times.append(time.perf_counter() - start)
        tokens += step.emitted
        show(step)
        start = time.perf_counter()
    return tokens, times[1:]  # the first step read the prompt


def decode(
    model: GPT, heads, tree: Tree, prompt: list[int], n: int, sampling: Sampling, seed: int
) -> Iterator[Step]:
    """Up to n tokens with Medusa heads; by plain decoding if the tree is the root alone."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    if len(tree) == 1:
        return medusa.generate(model, prompt, n, sampling, generator)
    return medusa.medusa_generate(model, heads, tree, prompt, n, sampling, generator)


def print_step(emitted: list[int], eos_ids: tuple[int, ...], stream: TextStream) -> None:
    """Print the text of a step: on a terminal, accepted guesses in the colour of their depth."""
    colours = 32, 36, 34, 35, 33, 31
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for depth, token in enumerate(emitted, start=1):
        text = "" if token in eos_ids else stream.push(token)
        if coloured and text != "" and depth < len(emitted):
            text = f"\033[{colours[(depth - 1) % 6]}m{text}\033[0m"
        print(text, end="", flush=True)


# ---- the choice of the tree ----
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of nodes that are timed
ROUNDS, STEPS = 6, 5  # of timing, and timed steps of each size in each round
PATIENCE = 10.0  # seconds after which no round begins; but there are two rounds at least
# The 63 paths of the paper's repository, medusa/model/medusa_choices.py: for Vicuna 7B.
OFFICIAL_TREE = Path(__file__).parent / "data/mc_sim_7b_63.json"


def read_calibration(heads_path, temperature: float) -> tuple[Counter, str]:
    """The prefix counts measured at the nearest temperature, and that temperature."""
    path = calibration_path(heads_path)
    content = read_json(path)
    try:
        nearest = min(content, key=lambda measured: abs(float(measured) - temperature))
        return read_counts(content[nearest]), nearest
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no calibration ({error!r}); train the heads again") from None


def step_costs(
    model: GPT, heads: MedusaHeads, trees: Iterable[Tree], prompt: list[int], sampling: Sampling
) -> dict[int, float]:
    """{N: seconds of a step over N nodes}, N = 1 being plain decoding."""
    # A text that ended at once would leave nothing to time: leave room in the context for the
    # steps, of at most K + 1 tokens each, and let a copy of the model have no EOS token.
    n = (STEPS + 2) * (heads.config.num_heads + 1)
    prompt = prompt[: max(model.config.max_position_embeddings - n, 1)]
    endless = copy.copy(model)
    endless.config = replace(model.config, eos_token_id=None)

    # In each round all sizes in turn, so that a slow moment of the machine hits more than one.
    times, start = {tree: [] for tree in (ROOT_ONLY, *trees)}, time.perf_counter()
    for turn in tqdm(range(ROUNDS), "timing trees", delay=1, leave=False, disable=None):
        if turn >= 2 and time.perf_counter() - start > PATIENCE:
            break
        for tree, seconds in times.items():
            steps = decode(endless, heads, tree, prompt, n, sampling, seed=0)
            seconds.extend(timed_run(islice(steps, 1 + STEPS))[1])  # without the prompt's
    # Every node costs about the same: a line through the medians. On a busy machine the median of
    # one size is far off, but hardly the line.
    plain, *of_trees = [median(seconds) for seconds in times.values()]
    _, *sizes = [len(tree) for tree in times]
    slope = max(linear_regression(sizes, of_trees).slope, 0.0) if len(sizes) > 1 else 0.0
    middle, mean_size = fmean(of_trees), fmean(sizes)
    return {1: plain} | {N: max(middle + slope * (N - mean_size), plain) for N in sizes}


def pick_tree(
    choice: str, model: GPT, heads: MedusaHeads, heads_path, sampling: Sampling, prompt: list[int]
) -> tuple[Tree, str]:
    """The tree that --tree asks for, and where it comes from."""
    # 1. A tree that is written down.
    if choice.endswith(".json") or choice == OFFICIAL_TREE.stem:
        paths = read_json(OFFICIAL_TREE if choice == OFFICIAL_TREE.stem else Path(choice), list)
        are_paths = all(type(path) is list and set(map(type, path)) <= {int} for path in paths)
        check(are_paths, "must be a JSON list of rank paths such as [[0], [1], [0, 0]]")
        return tree_from_paths(paths), f"from {choice}"
    try:
        numbers = [] if choice == "auto" else [int(number) for number in choice.split("x")]
    except ValueError:
        known = "auto, a number of nodes, widths such as 4x2x1, mc_sim_7b_63, or a .json file"
        raise ValueError(f"must be {known}") from None
    if len(numbers) > 1:
        check(math.prod(numbers) <= 1024, f"{math.prod(numbers)} leaves; must be at most 1024")
        return cartesian_tree(numbers), f"Cartesian, widths {choice}"

    # 2. The nodes that were right most often in calibration: as many as asked for.
    counts, nearest = read_calibration(heads_path, sampling.temperature)
    why = f"calibrated at temperature {nearest}"
    if len(numbers) == 1:
        tree = calibrated_tree(counts, numbers[0])
        return tree, why if len(tree) == numbers[0] else f"{why}, which has no more nodes"

    # 3. auto: as many nodes as make decoding fastest.
    trees = {len(tree): tree for tree in map(partial(calibrated_tree, counts), SIZES)}
    expected = {size: expected_tokens(tree, counts) for size, tree in trees.items()}
    costs = step_costs(model, heads, trees.values(), prompt, sampling)
    best = choose_size(expected.__getitem__, {size: costs[size] for size in trees})
    speed_up = f"expected speed-up {expected[best] * costs[1] / costs[best]:.2f}x"
    return trees[best], f"{why}; best of {len(trees)} sizes, {speed_up}"


# ---- comparison with plain decoding ----
@torch.inference_mode()
def first_difference(
    model: GPT, prompt: list[int], ours: list[int], plain: list[int], sampling: Sampling, seed: int
) -> tuple[int, float] | None:
    """Where the texts part, and how far apart the two tokens' logits, or log scores, are there."""
    if ours == plain:
        return None
    at = [a == b for a, b in zip(ours, plain)].index(False)
    tokens = torch.tensor([prompt + plain[:at]], device=model.lm_head.weight.device)  # (1, T)
    # With the noise that both texts were sampled with at this position.
    generator = torch.Generator(tokens.device).manual_seed(seed)
    noise = medusa.SharedGumbelNoise(model, sampling, generator).at([at])
    scores = medusa.gumbel_scores(model.lm_head(model(tokens)[:, -1]), sampling, noise)[0]  # (V,)
    return at, abs(scores[ours[at]] - scores[plain[at]]).item()


def summary(
    ours: Timed, plain: Timed, parted: tuple[int, float] | None, typical: bool, tree: Tree, why: str
) -> dict[str, str]:
    """What each of the two ways took. parted: the `first_difference` of their texts."""
    tokens, times = ours
    if len(times) == 0:
        return {"text": "ends with the prompt's own step: there is nothing to compare"}
    text = "identical, token for token"
    if parted is not None:
        at, gap = parted
        reason = "typical acceptance is lossy" if typical else f"there the two were {gap:.1e} apart"
        text = f"differs from token {at + 1} on: {reason}"
    # The prompt's own step, which is not in times, emitted the first token.
    tokens_per_step = (len(tokens) - 1) / len(times)
    step_time, plain_time = fmean(times), fmean(plain[1])
    step_cost = step_time / plain_time
    counted = f"{len(tokens) - 1} tokens in {len(times)} steps, after the prompt's own"
    return {
        "tree": f"{len(tree)} nodes, {max(tree.depths)} deep: {why}",
        "tokens/step": f"{tokens_per_step:.2f}   (acceleration rate: {counted})",
        "step cost": f"{step_cost:.2f}   (overhead: a step over the tree / a plain step)",
        "tokens/s": f"{tokens_per_step / step_time:.0f} with Medusa, {1 / plain_time:.0f} plain",
        "text": text,
        "speed-up": f"{tokens_per_step / step_cost:.2f}x",
    }


# ---- --trace ----
@torch.inference_mode()
def trace_record(step: Step, model: GPT, heads, sampling: Sampling) -> dict:
    """A step in numbers: what heads and base say at each node."""
    # Greedy decoding takes the most likely token of the distribution at temperature 1.
    shown = Sampling(1.0) if sampling.temperature == 0 else sampling
    base_probs = logits_to_probs(step.logits, shown)  # (N, V)
    # What the heads say after each node. Sequential heads see the tokens from the root to it, here
    # padded to K with the root's.
    tree, K = step.tree, heads.config.num_heads
    paths = [(seen.nonzero()[:, 0].tolist() + [0] * K)[:K] for seen in tree.mask]
    between = heads.embed(model.embed_tokens, step.tokens[torch.tensor(paths)])  # (N, K * D)
    hidden = step.hidden.expand(len(tree), -1)  # (N, D)
    head_logits = heads(hidden, heads.truncated(model.lm_head), between)  # (K, N, v)
    head_probs = logits_to_probs(head_logits, Sampling(shown.temperature))
    # The probability of each guess after its parent, by its head and by the base. After a parent
    # at depth d, head d + 1 guesses: row d of head_probs. The root is no guess.
    parents, guesses = list(tree.parents[1:]), step.tokens[1:]
    depths = [tree.depths[parent] for parent in parents]
    by_head = head_probs[depths, parents, heads.index_of(guesses)]  # (N-1,)
    by_base = base_probs[parents, guesses]  # (N-1,)
    return {
        "tree": {"parents": tree.parents, "ranks": tree.ranks},
        "tokens": step.tokens.tolist(),
        "head_probs": [None, *by_head.tolist()],
        "base_probs": [None, *by_base.tolist()],
        "thresholds": medusa.typical_threshold(base_probs, sampling.epsilon).tolist(),  # (N,)
        "targets": medusa.sample(step.logits, sampling, step.noise).tolist(),
        "path": step.path,
        "emitted": step.emitted,
    }


# ---- the command ----
def heads_and_tree(config: SampleConfig, model: GPT, prompt: list[int]):
    """(heads, tree, where the tree comes from); (None, ROOT_ONLY, what to do) without heads."""
    # Heads are in data/heads for the shipped base, and in the directory of any other.
    directory = Path("data" if config.base == SHIPPED_BASE else config.base, "heads")
    # Decode plainly without them, unless a flag asks for Medusa decoding: then it fails below.
    is_asked = config.heads != "" or config.tree != "auto" or config.trace != ""
    if not is_asked and not directory.exists():
        flags = f"--mode medusa1 --base {config.base} --out {directory}"
        return None, ROOT_ONLY, f"no heads; python train.py {flags} trains some"
    path, weight = Path(config.heads or directory), model.lm_head.weight
    heads = MedusaHeads.from_pretrained(path, weight.dtype, weight.device, model.config.vocab_size)
    medusa.check_compatible(model, heads)
    calibration = calibration_path(path)
    if not calibration.exists() and (config.tree == "auto" or config.tree.isdecimal()):
        flags = f"--mode calibrate --base {config.base} --heads {path}"
        does = "writes it; --tree with widths, or a file, does without"
        raise ValueError(f"{calibration} does not exist: python train.py {flags} {does}")
    try:
        tree, why = pick_tree(config.tree, model, heads, path, config.sampling(), prompt)
        medusa.check_compatible(model, heads, tree)
    except ValueError as error:
        raise ValueError(f"--tree {config.tree}: {error}") from None
    return heads, tree, why


def main() -> None:
    config = parsed(SampleConfig, description=__doc__)
    sampling, text = config.sampling(), config.text()
    if config.trace:
        check_page(Path(config.trace))
    # What a terminal that is not UTF-8 cannot show is escaped.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore

    # 1. The base model, the prompt as its tokens, the heads and their tree.
    device, dtype = pick_device(config.device), getattr(torch, config.dtype)
    tokenizer, model = load_base(config.base, dtype, device)
    pack_linears(model)
    pick_threads(model)
    turn = [{"role": "user", "content": text}]
    prompt = chat_prompt(config.base, tokenizer, turn) if config.chat else tokenizer.opening(text)
    # Refuses a prompt that leaves no room in the context, before anything is printed.
    room = medusa.max_length(model, prompt, config.max_new_tokens) - len(prompt)
    heads, tree, why = heads_and_tree(config, model, prompt)

    # 2. Decode, showing the text as it comes.
    stream, records = TextStream(tokenizer, prompt), []

    def show(step: Step) -> None:
        print_step(step.emitted, model.config.eos_ids, stream)
        if config.trace:
            records.append(trace_record(step, model, heads, sampling))

    print(text, end="\n\n" if config.chat else "", flush=True)
    asked = prompt, config.max_new_tokens, sampling, config.seed
    tokens, times = ours = timed_run(decode(model, heads, tree, *asked), show)
    print(stream.rest() + "\n")  # an incomplete character, if any
    if len(tokens) == room < config.max_new_tokens:
        print("stopped: the context is full")
    if heads is None:
        rate = f"{1 / fmean(times):.0f} tokens/s, " if times else ""
        print(f"{rate}plain: {why}")
        return

    # 3. Decode plainly, and compare.
    plain = timed_run(decode(model, heads, ROOT_ONLY, *asked))
    parted = first_difference(model, prompt, tokens, plain[0], sampling, config.seed)
    lines = summary(ours, plain, parted, sampling.typical, tree, why)
    if config.trace:
        content = {"prompt": text, "why": why, "difference": lines["text"]} | asdict(sampling)
        content |= text_content(records, tokenizer, prompt, model.config.eos_ids)
        write_page(Path(config.trace), content | {"times": [times, plain[1]]})
        lines["trace"] = config.trace
    if config.heads == "" and config.base == SHIPPED_BASE and Path(SEQUENTIAL).exists():
        lines["see also"] = f"--heads {SEQUENTIAL}: more tokens/step"
    print("\n".join(f"{name:<12} {value}" for name, value in lines.items()))


if __name__ == "__main__":
    run(main)
