"""See Medusa decode: the text as it comes, the same prompt decoded plainly, and a comparison.

    python sample.py --prompt "class Stack:" --temperature 0.7 --tree 4x2x1

speed-up = tokens/step / step cost (in the paper's words: acceleration rate / overhead). The size of
the tree is chosen by both: the calibration of the heads tells the first, a clock the second.

Dimension key: N tree nodes; K heads; V vocabulary (v of it, if the heads' own is truncated).
"""

import copy
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import medusa
from data.chat import chat_prompt
from data.command import OneLineParser, add_options, option, pick_device, run
from data.tokenizer import SHIPPED_BASE, load_base
from data.trace import TextStream, check_page, text_content, write_page
from medusa import MedusaHeads, Sampling, Step, logits_to_probs
from model import GPT, check_sizes, read_json
from tree import ROOT_ONLY, Tree, calibrated_tree, cartesian_tree, choose_size
from tree import expected_tokens, read_counts, tree_from_paths

# ---- settings ----
PROMPT = 'def quote(s):\n    """Return a quoted copy of the string."""\n    if not s:\n'


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
    tree: str = option("auto", "auto, number of nodes, widths as 4x2x1, or JSON file of rank paths")
    seed: int = option(0, "of sampling")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("float32", "weights", choices=("float32", "float64", "bfloat16", "float16"))
    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option("", "directory of the heads; default: data/heads, or heads/ in --base")
    trace: str = option("", "write a page that replays the decoding, step by step, to this file")

    def __post_init__(self):
        check_sizes(self, ["max_new_tokens"])
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"--seed {self.seed}: must be a whole number from 0 to 2^63 - 1")

    def sampling(self) -> Sampling:
        # A flag that would have no effect is a mistake.
        greedy, typical = self.temperature == 0, self.accept == "typical"
        if greedy and (typical or (self.top_k, self.top_p) != (Sampling.top_k, Sampling.top_p)):
            raise ValueError("--accept typical, --top-k, --top-p: need --temperature above 0")
        if self.epsilon != Sampling.epsilon and not typical:
            raise ValueError("--epsilon: belongs to --accept typical")
        return Sampling(self.temperature, self.top_k, self.top_p, typical, self.epsilon)

    def text(self) -> str:
        """The text of --prompt, --chat or --prompt-file."""
        given = [self.prompt != PROMPT, self.chat != "", self.prompt_file != ""]
        if given.count(True) > 1:
            raise ValueError("--prompt, --chat, --prompt-file: give only one of them")
        source = self.prompt_file or "on the command line"
        try:
            typed = (self.chat or self.prompt).encode()
            return (Path(self.prompt_file).read_bytes() if self.prompt_file else typed).decode()
        except (OSError, UnicodeError) as error:
            raise ValueError(f"the prompt, {source}: {error}") from None


# ---- faster products on a CPU: layouts in memory, no idea of Medusa ----
class PackedLinear(nn.Module):
    """nn.Linear for the few rows of a decoding step; for inference only."""

    def __init__(self, linear: nn.Linear, dtypes: list[torch.dtype]):
        super().__init__()
        self.weight, self.bias, self.packed = linear.weight, linear.bias, None
        self.transposes = torch.backends.cpu.get_cpu_capability() == "AVX2"
        # A second copy of a large matrix in oneDNN's layout: best for 8 rows, right for any number.
        if self.weight.numel() >= 1 << 18 and self.weight.dtype in dtypes:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if self.packed is not None and rows > 2:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if rows > 16 or not self.transposes:
            return F.linear(x, self.weight, self.bias)
        # On AVX2, (W x^T)^T is faster: it reads W in memory order. Two columns beat a single one.
        columns = x.reshape(rows, -1) if rows > 1 else torch.cat((x, x)).view(2, -1)
        y = (self.weight @ columns.mT).mT[:rows].contiguous().view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def pack_linears(model: GPT) -> None:
    """On a CPU with oneDNN, swap every nn.Linear for a PackedLinear of the same weights."""
    if model.lm_head.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtypes = [torch.float32, torch.bfloat16] if bfloat16 else [torch.float32]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child, dtypes))


# ---- one decoding, timed and streamed ----
@dataclass(frozen=True)
class Run:
    """One decoding: its tokens, and the seconds of each step after the prompt's own."""

    tokens: list[int]
    times: list[float]

    @property
    def step_time(self) -> float:
        return sum(self.times) / max(len(self.times), 1)

    @property
    def tokens_per_step(self) -> float:
        # The prompt's own step, which is not in times, emitted the first token.
        return (len(self.tokens) - 1) / max(len(self.times), 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_time if self.times else math.nan


def timed_run(steps: Iterable[Step], show: Callable[[Step], None] | None = None) -> Run:
    """Decode to the end. The clock is stopped while `show` prints."""
    # The first step read the prompt: its time is left out in the end.
    tokens, times, start = [], [], time.perf_counter()
    for step in steps:
        times.append(time.perf_counter() - start)
        tokens += step.emitted
        if show is not None:
            show(step)
        start = time.perf_counter()
    return Run(tokens, times[1:])


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
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for depth, token in enumerate(emitted, start=1):
        text = "" if token in eos_ids else stream.push(token)
        if coloured and text != "" and depth < len(emitted):
            colour = (32, 36, 34, 35, 33, 31)[(depth - 1) % 6]
            text = f"\033[{colour}m{text}\033[0m"
        print(text, end="", flush=True)


# ---- the choice of the tree ----
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of nodes that are timed
ROUNDS, STEPS = 5, 5  # of timing, and timed steps of each size in each round
PATIENCE = 3.0  # seconds of timed steps; no round begins after them


def read_calibration(heads_directory, temperature: float) -> tuple[Counter, str]:
    """The prefix counts measured at the nearest temperature, and that temperature."""
    path = Path(heads_directory) / "calibration.json"
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
    # steps, of several tokens each, and let a copy of the model have no EOS token.
    n = 8 * STEPS
    prompt = prompt[: max(model.config.max_position_embeddings - n, 1)]
    endless = copy.copy(model)
    endless.config = replace(model.config, eos_token_id=None)

    # In each round all sizes in turn, so that a slow moment of the machine hits more than one. The
    # minimum of a size's steps counts, since noise only adds.
    times = {tree: [] for tree in (ROOT_ONLY, *trees)}
    for _ in tqdm(range(ROUNDS), "timing trees", delay=1, leave=False, disable=None):
        if sum(map(sum, times.values())) > PATIENCE:
            break
        for tree, seconds in times.items():
            steps = decode(endless, heads, tree, prompt, n, sampling, seed=0)
            # Not timed: the prompt's step (`timed_run` drops it), and a warm-up.
            seconds += timed_run(islice(steps, STEPS + 2)).times[1:]
    return {len(tree): min(seconds) for tree, seconds in times.items()}


def pick_tree(
    choice: str, model: GPT, heads: MedusaHeads, directory, sampling: Sampling, prompt: list[int]
) -> tuple[Tree, str]:
    """The tree that --tree asks for, and where it comes from. directory: that of the heads."""
    # 1. A tree that is written down.
    if choice.endswith(".json"):
        paths = read_json(Path(choice), list)
        if any(type(path) is not list or set(map(type, path)) - {int} for path in paths):
            raise ValueError("must be a JSON list of rank paths such as [[0], [1], [0, 0]]")
        return tree_from_paths(paths), f"from {choice}"
    if re.fullmatch(r"[0-9]+(x[0-9]+)+", choice):
        widths = [int(width) for width in choice.split("x")]
        if math.prod(widths) > 1024:
            raise ValueError(f"{math.prod(widths)} leaves; must be at most 1024")
        return cartesian_tree(widths), f"Cartesian, widths {choice}"
    if not re.fullmatch("auto|[0-9]+", choice):
        raise ValueError("must be auto, a number of nodes, widths such as 4x2x1, or a .json file")

    # 2. The nodes that were right most often in calibration: as many as asked for.
    counts, nearest = read_calibration(directory, sampling.temperature)
    why = f"calibrated at temperature {nearest}"
    if choice != "auto":
        tree = calibrated_tree(counts, int(choice))
        return tree, why if len(tree) == int(choice) else f"{why}, which has no more nodes"

    # 3. auto: as many nodes as make decoding fastest.
    trees = {len(tree): tree for tree in (calibrated_tree(counts, size) for size in SIZES)}
    expected = {size: expected_tokens(tree, counts) for size, tree in trees.items()}
    costs = step_costs(model, heads, trees.values(), prompt, sampling)
    best = choose_size(expected, costs)
    speed_up = f"expected speed-up {expected[best] * costs[1] / costs[best]:.2f}x"
    return trees[best], f"{why}; best of {len(trees)} sizes, {speed_up}"


# ---- comparison with plain decoding ----
def first_difference(a: list[int], b: list[int]) -> int | None:
    """The first position at which the texts differ.

    >>> first_difference([1, 2, 3], [1, 2])
    2
    """
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)


@torch.inference_mode()
def gap_at(
    model: GPT, prompt: list[int], ours: list[int], plain: list[int], sampling: Sampling, seed: int
) -> float:
    """Where the texts part: the difference of the two tokens' logits, or of their log scores."""
    at, device = first_difference(ours, plain) or 0, model.lm_head.weight.device
    scores = model.lm_head(model(torch.tensor([prompt + plain[:at]], device=device))[0, -1])  # (V,)
    generator = torch.Generator(device).manual_seed(seed)
    # The noise that both texts were sampled with at this position.
    noise = medusa.SharedGumbelNoise(model, sampling, generator).at([at])
    if noise is not None:
        scores = (logits_to_probs(scores, sampling) / noise[0]).log()
    return abs(scores[ours[at]] - scores[plain[at]]).item()


def difference(
    model: GPT, prompt: list[int], ours: list[int], plain: list[int], sampling: Sampling, seed: int
) -> str:
    # Plain decoding is the reference.
    at = first_difference(ours, plain)
    if at is None:
        return "identical, token for token"
    if sampling.typical:
        return f"differs from token {at + 1} on: typical acceptance is lossy"
    gap = gap_at(model, prompt, ours, plain, sampling, seed)
    return f"differs from token {at + 1} on, where the two were {gap:.1e} apart"


def summary(ours: Run, plain: Run, text: str, tree: Tree, why: str) -> str:
    """What each of the two ways took. text: whether they decoded the same."""
    # speed-up = acceleration rate / overhead.
    step_cost = ours.step_time / plain.step_time if plain.times else math.nan
    counted = f"{len(ours.tokens)} tokens, {len(ours.times)} steps after the prompt"
    rates = ours.tokens_per_second, plain.tokens_per_second
    lines = {
        "tree": f"{len(tree)} nodes, {max(tree.depths)} deep: {why}",
        "tokens/step": f"{ours.tokens_per_step:.2f}   (acceleration rate: {counted})",
        "step cost": f"{step_cost:.2f}   (overhead: a step over the tree / a plain step)",
        "tokens/s": f"{rates[0]:.0f} with Medusa, {rates[1]:.0f} plain",
        "text": text,
        "speed-up": f"{rates[0] / rates[1]:.2f}x",
    }
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items())


# ---- --trace ----
@torch.inference_mode()
def trace_record(step: Step, model: GPT, heads, sampling: Sampling) -> dict:
    """A step in numbers: what heads and base say at each node, and what became of the node."""
    # Greedy decoding takes the most likely token of the distribution at temperature 1.
    temperature = 1.0 if sampling.temperature == 0 else sampling.temperature
    base_probs = logits_to_probs(step.logits, replace(sampling, temperature=temperature))  # (N, V)
    head_logits = heads(step.hidden, heads.truncated(model.lm_head))  # (K, v)
    head_probs = logits_to_probs(head_logits, Sampling(temperature))  # (K, v)

    # The probability of each guess: by its own head (head k is row k - 1), and after its parent.
    parents, rows = list(step.tree.parents[1:]), [depth - 1 for depth in step.tree.depths[1:]]
    by_head = head_probs[rows, heads.index_of(step.tokens[1:])].tolist()  # (N-1,)
    by_base = base_probs[parents, step.tokens[1:]].tolist()  # (N-1,)
    thresholds = medusa.typical_threshold(base_probs, sampling.epsilon).tolist()  # (N,)

    # "passed": by the rule, but on a path that lost; only typical acceptance knows that.
    results = ["accepted"]
    for node, parent in enumerate(parents, start=1):
        passes = sampling.typical and by_base[node - 1] > thresholds[parent]
        if results[parent] in ("rejected", "not reached"):
            results.append("not reached")
        elif node in step.path:
            results.append("accepted")
        else:
            results.append("passed" if passes else "rejected")
    return {
        "tree": {"parents": step.tree.parents, "ranks": step.tree.ranks},
        "tokens": step.tokens.tolist(),
        "head_probs": [None, *by_head],
        "base_probs": [None, *by_base],
        "thresholds": thresholds,
        "targets": medusa.sample(step.logits, sampling, step.noise).tolist(),
        "results": results,
        "path": step.path,
        "emitted": step.emitted,
    }


# ---- the command ----
def open_heads(config: SampleConfig, model: GPT, prompt: list[int]):
    """(heads, tree, where the tree comes from); (None, ROOT_ONLY, what to do) without heads."""
    # Heads are in data/heads for the shipped base, and in the directory of any other.
    directory = Path("data" if config.base == SHIPPED_BASE else config.base, "heads")
    # --trace is of Medusa decoding: without heads it fails below.
    if config.heads == "" and config.trace == "" and not directory.exists():
        flags = f"--mode medusa1 --base {config.base} --out {directory}"
        return None, ROOT_ONLY, f"no heads; python train.py {flags} trains some"
    directory, weight = Path(config.heads or directory), model.lm_head.weight
    heads = MedusaHeads.from_pretrained(directory, weight.dtype, weight.device)
    medusa.check_compatible(model, heads)
    try:
        tree, why = pick_tree(config.tree, model, heads, directory, config.sampling(), prompt)
        medusa.check_compatible(model, heads, tree)
    except ValueError as error:
        raise ValueError(f"--tree {config.tree}: {error}") from None
    return heads, tree, why


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add_options(parser, SampleConfig)
    config = SampleConfig(**vars(parser.parse_args()))
    sampling, text = config.sampling(), config.text()
    if config.trace:
        check_page(Path(config.trace))

    # 1. The base model, the prompt as its tokens, the heads and their tree.
    device, dtype = pick_device(config.device), getattr(torch, config.dtype)
    tokenizer, model = load_base(config.base, dtype, device)
    pack_linears(model)
    turn = [{"role": "user", "content": text}]
    prompt = chat_prompt(config.base, tokenizer, turn) if config.chat else tokenizer.opening(text)
    # Refuses a prompt that leaves no room in the context, before anything is printed.
    medusa.max_length(model, prompt, config.max_new_tokens)
    heads, tree, why = open_heads(config, model, prompt)

    # 2. Decode, showing the text as it comes.
    stream, records = TextStream(tokenizer, prompt), []

    def show(step: Step) -> None:
        print_step(step.emitted, model.config.eos_ids, stream)
        if config.trace:
            records.append(trace_record(step, model, heads, sampling))

    print(text, end="\n\n" if config.chat else "", flush=True)
    asked = prompt, config.max_new_tokens, sampling, config.seed
    ours = timed_run(decode(model, heads, tree, *asked), show)
    print(stream.rest() + "\n")  # an incomplete character, if any
    if heads is None:
        print(f"{ours.tokens_per_second:.0f} tokens/s, plain: {why}")
        return

    # 3. Decode plainly, and compare.
    plain = timed_run(decode(model, heads, ROOT_ONLY, *asked))
    same = difference(model, prompt, ours.tokens, plain.tokens, sampling, config.seed)
    print(summary(ours, plain, same, tree, why))
    if config.trace:
        about = {"prompt": text, "why": why, "difference": same, "typical": sampling.typical}
        about |= {"temperature": sampling.temperature, "costs": [ours.step_time, plain.step_time]}
        content = about | text_content(records, tokenizer, prompt, model.config.eos_ids)
        write_page(Path(config.trace), content)


if __name__ == "__main__":
    run(main)
