"""See Medusa decode: text as it comes, coloured by what the heads won, then the same prompt decoded plainly, and an honest summary.

    python sample.py
    python sample.py --prompt "class Stack:" --temperature 0.7 --tree 4x2x1

The size of the tree is chosen by measurement: what a step over N nodes costs on this device, against what N nodes would have
earned on the calibration rows ("choose_size" in tree.py).
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from data.calibration import read_calibration
from data.chat import chat_prompt
from data.command import OneLineParser, add_options, option, run
from data.compiled import Compiled
from data.difference import first_difference, gap_at
from data.machine import pick_device
from data.printer import Printer
from data.request import read_prompt, sampling_of
from data.tokenizer import SHIPPED_BASE, load_base
from data.trace import Trace, check_page
from medusa import (
    ROOT_ONLY,
    MedusaHeads,
    Sampling,
    accept,
    check_compatible,
    generate as plain_generate,
    max_length,
    medusa_generate,
)
from model import GPT, check_sizes, read_json
from tree import (
    Tree,
    calibrated_tree,
    cartesian_tree,
    choose_size,
    expected_tokens,
    tree_from_paths,
)

DEFAULT_PROMPT = 'def quote(s):\n    """Return a quoted copy of the string."""\n    if not s:\n'
MAX_LEAVES = 1024  # of a tree given by widths
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # trees whose step is timed
PATIENCE = 3.0  # seconds: where steps are slow, trees are timed once and not five times
COMPILED_SIZES = (4, 8, 16)  # with --compile, which takes some time for each


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = option(DEFAULT_PROMPT, "text to continue")
    prompt_file: str = option("", "read the prompt from this UTF-8 file")
    chat: str = option("", "in place of a prompt: a user's turn, which a chat model answers")
    max_new_tokens: int = option(128, "tokens to decode")
    temperature: float = option(Sampling.temperature, "0 is greedy")
    top_k: int = option(Sampling.top_k, "draw among the k likeliest tokens; 0: all")
    top_p: float = option(
        Sampling.top_p, "draw among the fewest tokens that hold this much probability"
    )
    accept: str = option(
        "auto",
        "rule; auto is greedy at temperature 0, else lossless",
        choices=("auto", "greedy", "lossless", "typical"),
    )
    epsilon: float = option(Sampling.epsilon, "of typical acceptance")
    tree: str = option(
        "auto",
        "auto (size chosen by cost), a number of nodes, widths such as 4x2x1, or a JSON file of rank paths",
    )
    seed: int = option(0, "seed of the draws")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option(
        "float32", "of weights and cache", choices=("float32", "float64", "bfloat16", "float16")
    )
    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option(
        "",
        "directory of the heads; default: data/heads for the shipped base, for another its own heads/, or plain decoding",
    )
    compile: bool = option(
        False,
        f"compile the steps of both ways with torch.compile; a size is then chosen among {', '.join(map(str, COMPILED_SIZES))}",
    )
    trace: str = option(
        "", "write a page that replays the generation, step by step, to this HTML file"
    )

    def __post_init__(self):
        check_sizes(self, ["max_new_tokens"])
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"--seed {self.seed}: must be a whole number from 0 to 2^63 - 1")


# ---- a decoding, timed ----


@dataclass(frozen=True)
class Run:
    """One decoding: its tokens, the first of which came with the prompt, and the seconds of each step after that."""

    tokens: list[int]
    times: list[float]

    @property
    def step_time(self) -> float:
        return sum(self.times) / max(len(self.times), 1)

    @property
    def tokens_per_step(self) -> float:
        return (len(self.tokens) - 1) / max(len(self.times), 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_time if self.times else float("nan")


def timed_run(
    steps: Iterable[list[int]], show: Callable[[list[int]], None] = lambda emitted: None
) -> Run:
    """Decode to the end. The clock stands still while `show` prints."""
    steps, tokens, times = iter(steps), [], []
    while True:
        start = time.perf_counter()
        emitted = next(steps, None)
        if emitted is None:
            return Run(tokens, times[1:])
        times.append(time.perf_counter() - start)
        tokens += emitted
        show(emitted)


# ---- the tree and its size ----


def step_costs(
    model: GPT,
    heads: MedusaHeads,
    tree_of: Callable[[int], Tree],
    prompt: list[int],
    sampling: Sampling,
    sizes: Iterable[int] = SIZES,
    rounds: int = 5,
    steps: int = 5,
) -> dict[int, float]:
    """{N: seconds of a whole step over N nodes}, N = 1 being plain decoding.

    All sizes in turn, and each compared with the plain steps of its own round: a slow minute of the machine hits both. No round
    begins once PATIENCE is spent on steps.
    """
    times = {1: []} | {len(tree_of(size)): [] for size in sizes}
    prompt = prompt[
        : max(model.config.max_position_embeddings - 8 * steps, 1)
    ]  # room for the timed steps, of several tokens each
    config, model.config = (
        model.config,
        replace(model.config, eos_token_id=None),
    )  # a text that ends at once would leave nothing to time
    try:
        for size in tqdm(
            [*times] * rounds, desc="timing trees", unit="tree", delay=1, leave=False, disable=None
        ):
            if size == 1 and sum(map(sum, chain.from_iterable(times.values()))) > PATIENCE:
                break
            arguments = (
                prompt,
                8 * steps,
                sampling,
                torch.Generator(model.lm_head.weight.device).manual_seed(0),
            )
            sequence = (
                plain_generate(model, *arguments)
                if size == 1
                else medusa_generate(model, heads, tree_of(size), *arguments)
            )
            decoded = timed_run(islice(sequence, steps + 2))
            times[size].append(decoded.times[1:])  # the first step of a tree lays out its plan
    finally:
        model.config = config
    if not all(run for runs in times.values() for run in runs):
        raise ValueError(
            f"the context of {config.max_position_embeddings} tokens is too short to time trees in: name one with --tree"
        )
    medians = {size: [statistics.median(run) for run in runs] for size, runs in times.items()}
    plain = statistics.median(medians[1])
    return {
        size: plain * statistics.median(a / b for a, b in zip(of_size, medians[1]))
        for size, of_size in medians.items()
    }


def pick_tree(
    choice: str,
    model: GPT,
    heads: MedusaHeads,
    heads_directory,
    sampling: Sampling,
    prompt: list[int],
    sizes: Iterable[int] = SIZES,
) -> tuple[Tree, str]:
    """The tree that --tree names, and why it has its size."""
    if choice.endswith(".json"):
        paths = read_json(Path(choice), list)
        if not all(
            isinstance(path, list) and all(type(rank) is int for rank in path) for path in paths
        ):
            raise ValueError("must be a JSON list of rank paths such as [[0], [1], [0, 0]]")
        return tree_from_paths(paths), f"from {choice}"
    if "x" in choice and all(width.isdecimal() for width in choice.split("x")):
        widths = [int(width) for width in choice.split("x")]
        if math.prod(widths) > MAX_LEAVES:
            raise ValueError(
                f"{math.prod(widths)} paths are more than {MAX_LEAVES}: give smaller widths"
            )
        return cartesian_tree(widths), f"Cartesian, widths {choice}"
    if choice != "auto" and not choice.isdecimal():
        raise ValueError(
            "neither auto, nor a number of nodes, nor widths such as 4x2x1, nor a .json file"
        )
    counts, nearest = read_calibration(heads_directory, sampling.temperature)
    calibrated = f"calibrated at temperature {nearest}"
    tree_of = cache(partial(calibrated_tree, counts))
    if choice != "auto":
        tree = tree_of(int(choice))
        return (
            tree,
            f"{calibrated}, {'size as asked for' if len(tree) == int(choice) else 'as large as the calibration goes'}",
        )
    costs = step_costs(model, heads, tree_of, prompt, sampling, sizes)
    gains = {
        size: expected_tokens(tree_of(size), counts) * costs[1] / cost
        for size, cost in costs.items()
        if size > 1
    }
    size = choose_size(lambda n: expected_tokens(tree_of(n), counts), costs, sizes=gains)
    shown = ", ".join(f"{n}: {gain:.2f}x" for n, gain in gains.items())
    return tree_of(
        size
    ), f"{calibrated}; {size} nodes promise the most tokens a second here, by nodes {shown}"


# ---- both ways, compared ----


def difference_of(
    model: GPT, prompt: list[int], ours: list[int], plain: list[int], sampling: Sampling, seed: int
) -> str:
    """Whether the two texts are the same, and if not, where and why they part."""
    at = first_difference(ours, plain)
    if at is None:
        return "identical, token for token"
    if sampling.typical:
        return f"differs from token {at + 1} on: typical acceptance is lossy"
    return f"differs from token {at + 1} on, where the two were {gap_at(model, prompt, ours, plain, at, sampling, seed):.1e} apart"


def compare(ours: Run, plain: Run, difference: str, tree: Tree, why: str) -> str:
    """The summary: what each of the two ways took, whether the text is the same, and last the speed-up."""
    step_cost = ours.step_time / plain.step_time if plain.times else float("nan")
    lines = {
        "tree": f"{len(tree)} nodes, {max(tree.depths)} deep: {why}",
        "tokens/step": f"{ours.tokens_per_step:.2f}   ({len(ours.tokens)} tokens, {len(ours.times)} steps after the prompt)",
        "step cost": f"{step_cost:.2f}   (a step over the tree / a plain step)",
        "tokens/s": f"{ours.tokens_per_second:.0f} with Medusa, {plain.tokens_per_second:.0f} plain",
        "text": difference,
        "speed-up": f"{ours.tokens_per_second / plain.tokens_per_second:.2f}x",
    }
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items())


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add_options(parser, SampleConfig)
    config = SampleConfig(**vars(parser.parse_args()))
    sampling, text = sampling_of(config), read_prompt(config)
    if config.trace:
        check_page(Path(config.trace))
    device, dtype = pick_device(config.device), getattr(torch, config.dtype)
    tokenizer, model = load_base(config.base, dtype, device)
    turns = [{"role": "user", "content": text}]
    prompt = chat_prompt(config.base, tokenizer, turns) if config.chat else tokenizer.opening(text)
    max_length(model, prompt, config.max_new_tokens)  # refuses now what could not be decoded
    printer = Printer(tokenizer, prompt)
    trace = None

    def decode(generate: Callable, *guessing, **more) -> Iterator[list[int]]:
        return generate(
            model,
            *guessing,
            prompt,
            config.max_new_tokens,
            sampling,
            torch.Generator(device).manual_seed(config.seed),
            **more,
        )

    def show(emitted: list[int]) -> None:
        printer.step(emitted, model.config.eos_ids)
        if trace:
            trace.step(emitted)

    def stream(steps: Iterator[list[int]]) -> Run:
        print(text, end="\n\n" if config.chat else "", flush=True)
        shown = timed_run(steps, show)
        printer.finish()
        return shown

    directory = config.heads or str(
        Path("data" if config.base == SHIPPED_BASE else config.base) / "heads"
    )
    if not config.heads and not Path(directory).exists():
        if config.trace:
            raise ValueError(
                f"--trace shows Medusa heads at work, and {directory} does not exist: name some with --heads"
            )
        plain = stream(decode(plain_generate))
        print(
            f"\n{plain.tokens_per_second:.0f} tokens/s, plain: no --heads; python train.py --mode medusa1 --base {config.base} --out {directory} trains them"
        )
        return
    heads = MedusaHeads.from_pretrained(directory, dtype, device)
    check_compatible(model, heads, ROOT_ONLY)
    sizes = {1, *COMPILED_SIZES}
    model = (
        cast(GPT, Compiled(model, sizes)) if config.compile else model.pack()
    )  # a Compiled has all that decoding asks of a GPT
    if config.compile:
        heads.compile(fullgraph=True, dynamic=False)
    try:
        tree, why = pick_tree(
            config.tree,
            model,
            heads,
            directory,
            sampling,
            prompt,
            COMPILED_SIZES if config.compile else SIZES,
        )
        check_compatible(model, heads, tree)
    except ValueError as error:
        raise ValueError(f"--tree {config.tree}: {error}") from None
    if (
        config.compile
    ):  # the steps of both ways are compiled now, and no others: Compiled looks into this set
        sizes.clear()
        sizes.update({1, len(tree)})
        for way in (decode(medusa_generate, heads, tree), decode(plain_generate)):
            timed_run(islice(way, 3))
    if config.trace:
        trace = Trace(tokenizer, heads, prompt, model.config.eos_ids)
    ours = stream(decode(medusa_generate, heads, tree, accept=trace.accept if trace else accept))
    plain = timed_run(decode(plain_generate))

    difference = difference_of(model, prompt, ours.tokens, plain.tokens, sampling, config.seed)
    print("\n" + compare(ours, plain, difference, tree, why))
    if trace:
        trace.write(
            Path(config.trace),
            prompt=text,
            why=why,
            difference=difference,
            costs=[way.step_time for way in (ours, plain)],
        )


if __name__ == "__main__":
    run(main)
