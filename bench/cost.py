"""What a step costs: over the nodes of its tree and the context before it, split into its parts, beside the least that this machine needs.

backbone     the model over the tree, its LM head included
heads        at the one node that was accepted last, with the LM head that they share
choosing     the rest of propose and accept, and the drawing of tokens
cache moves  rows of the accepted path moved to their place
Python       what is left: the loop itself
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from unittest.mock import patch

import torch
from tqdm import tqdm

import medusa
from bench.results import Bench, held_out_prompts, load, markdown, measure
from bench.roofline import (
    Device,
    backbone_work,
    heads_work,
    matrices,
    measured_bandwidth,
    measured_flops,
)
from data.calibration import read_calibration
from data.command import option
from medusa import MedusaHeads, Sampling, generate, medusa_generate
from model import GPT, KVCache, check_sizes
from tree import calibrated_tree

SIZES = (2, 4, 8, 16, 32, 64)
CONTEXTS = (64, 128, 256, 512, 960)
PARTS = ("backbone", "heads", "choosing", "cache moves")
WIDTH = 4  # bytes of a float32


@dataclass(frozen=True)
class CostConfig(Bench):
    """Sections: roofline (of this machine), greedy, lossless-0.7 (steps over nodes and context), growth (prompts and a long text up to the context limit)."""

    rounds: int = option(5, "rounds over all sizes")
    steps: int = option(8, "steps that are timed in each")
    nodes: int = option(16, "nodes of the calibrated tree that decodes the long text")

    def __post_init__(self):
        check_sizes(self, ["rounds", "steps", "nodes"])


# ---- steps, and what they are made of ----


class Stopwatch:
    """Seconds in each part. A part inside another is taken off it; all that the heads call is theirs."""

    def __init__(self):
        self.seconds, self.inside = defaultdict(float), ""

    def wrap(self, part: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            outside, before = self.inside, sum(self.seconds.values())
            self.inside = name = "heads" if outside == "heads" else part
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                nested = sum(self.seconds.values()) - before
                self.seconds[name] += time.perf_counter() - start - nested
                self.inside = outside

        return timed


@contextmanager
def watched(model: GPT, heads: MedusaHeads):
    """All decoding in here is on this stopwatch."""
    watch = Stopwatch()
    places = [
        (model, "forward", "backbone"),
        (model.lm_head, "forward", "backbone"),
        (heads, "forward", "heads"),
        (KVCache, "keep", "cache moves"),
    ]
    places += [
        (medusa, name, "choosing") for name in ("propose", "accept", "logits_to_probs", "draw")
    ] + [(medusa.SharedGumbelNoise, "at", "choosing")]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, watch.wrap(part, getattr(owner, name))))
        yield watch


def steps_in_parts(steps: Iterator[list[int]], watch: Stopwatch, n: int) -> list[dict[str, float]]:
    """Seconds of n steps and of their parts. The prompt's own step, and the first of a tree, which lays out its plan, are left out."""
    rows = []
    next(steps), next(steps)
    for _ in range(n):
        watch.seconds.clear()
        start = time.perf_counter()
        if next(steps, None) is None:
            break
        total = time.perf_counter() - start
        parts = {part: watch.seconds[part] for part in PARTS}
        rows.append({"step": total} | parts | {"Python": total - sum(parts.values())})
    return rows


def decoding(
    model: GPT, heads: MedusaHeads, counts, size: int, prompt: list[int], n: int, sampling: Sampling
) -> Iterator[list[int]]:
    """size 1 is plain decoding."""
    arguments = (prompt, n, sampling, torch.Generator().manual_seed(0))
    return (
        generate(model, *arguments)
        if size == 1
        else medusa_generate(model, heads, calibrated_tree(counts, size), *arguments)
    )


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def measure_steps(config: CostConfig, temperature: float) -> dict:
    """{context: {N: seconds of a step and its parts, its cost, and the least of backbone and heads by the counts of `roofline`}}"""
    tokenizer, model, heads = load(config)
    counts, _ = read_calibration(config.heads, temperature)
    room = (config.steps + 2) * (heads.config.num_heads + 1) + 1  # the tree is never cut
    contexts = [
        context for context in CONTEXTS if context + room <= model.config.max_position_embeddings
    ]
    if not contexts:
        raise ValueError(
            f"--steps {config.steps}: the context of {model.config.max_position_embeddings} tokens is too short for so many"
        )
    prompt = held_out_prompts(tokenizer, 1, max(contexts))[0]
    rows = {(context, size): [] for context in contexts for size in (1, *SIZES)}
    for _ in tqdm(range(config.rounds), desc=f"steps at temperature {temperature}", unit="round"):
        for context, size in rows:
            with watched(model, heads) as watch:
                steps = decoding(
                    model, heads, counts, size, prompt[-context:], room, Sampling(temperature)
                )
                rows[context, size].append(steps_in_parts(steps, watch, config.steps))
    work = {  # bytes and operations
        (context, size): {
            "backbone": backbone_work(model.config, size, context, WIDTH),
            "heads": heads_work(heads.config, WIDTH) if size > 1 else (0, 0),
        }
        for context, size in rows
    }
    found = {}
    for context in contexts:
        sizes = {size: rows[context, size] for size in (1, *SIZES)}
        found[str(context)] = {
            str(n): medians(list(chain(*rounds)))
            | {"step cost": step_cost(rounds, sizes[1]), "work": work[context, n]}
            for n, rounds in sizes.items()
        }
    return {"steps": found}


def step_cost(tree: list[list[dict]], plain: list[list[dict]]) -> float:
    """A step over a plain one: the median over the rounds, each of which compares with the plain steps next to it. A slow minute of the machine hits both."""
    return statistics.median(
        medians(ours)["step"] / medians(theirs)["step"] for ours, theirs in zip(tree, plain)
    )


def measure_roofline(config: CostConfig) -> dict:
    """Bandwidth from memory, and at the size of the weights, which on a small model stay in the caches."""
    _, model, _ = load(config)
    size = WIDTH * matrices(model.config)
    return {
        "bandwidth": measured_bandwidth(1 << 28),
        "bandwidth over the weights": measured_bandwidth(size),
        "weights": size,
        "flops": measured_flops(),
    }


# ---- growth ----


def tenths(stamps: list[tuple[float, int]]) -> dict[str, float]:
    """Of (seconds, tokens) of each step: seconds of a step and tokens a second in the first and in the last tenth of the text."""
    total, seen = sum(tokens for _, tokens in stamps), 0
    groups = {"first": [], "last": []}
    for seconds, tokens in stamps:
        if seen < total / 10:
            groups["first"].append((seconds, tokens))
        elif seen + tokens > total * 9 / 10:
            groups["last"].append((seconds, tokens))
        seen += tokens
    found = {}
    for name, steps in groups.items():
        seconds, tokens = sum(s for s, _ in steps), sum(t for _, t in steps)
        found |= {
            f"tokens/s, {name} tenth": tokens / seconds,
            f"ms a step, {name} tenth": 1e3 * seconds / len(steps),
        }
    return found


def stamped(steps: Iterator[list[int]]) -> list[tuple[float, int]]:
    """(seconds, tokens) of each step behind the prompt's own."""
    next(steps)
    stamps, start = [], time.perf_counter()
    for emitted in steps:
        now = time.perf_counter()
        stamps.append((now - start, len(emitted)))
        start = now
    return stamps


@torch.inference_mode()
def prefill_seconds(model: GPT, prompt: list[int]) -> float:
    tokens, cache = torch.tensor([prompt]), model.new_cache(len(prompt))
    start = time.perf_counter()
    model.lm_head(model(tokens, cache=cache)[:, -1]).argmax().item()
    return time.perf_counter() - start


def measure_growth(config: CostConfig) -> dict:
    """Prompts up to the context limit in one pass; and one text from 16 tokens to the limit, plainly and with a tree."""
    tokenizer, model, heads = load(config)
    counts, _ = read_calibration(config.heads, 0.0)
    limit = model.config.max_position_embeddings
    prompt = held_out_prompts(tokenizer, 1, limit)[0]
    lengths = sorted({min(length, limit) for length in (*CONTEXTS, limit)})
    prefill, long = {length: [] for length in lengths}, {1: [], config.nodes: []}
    for _ in tqdm(range(config.rounds), desc="growth", unit="round"):
        for length in lengths:
            prefill[length].append(prefill_seconds(model, prompt[:length]))
        for size in long:
            long[size].append(
                tenths(
                    stamped(decoding(model, heads, counts, size, prompt[:16], limit, Sampling()))
                )
            )
    texts = {
        "plain" if size == 1 else f"tree of {size}": medians(rows) for size, rows in long.items()
    }
    return {
        "prefill": {str(length): statistics.median(times) for length, times in prefill.items()},
        "long text": texts,
        "tokens": limit - 16,
    }


# ---- what is shown ----


def limit_of(row: dict, roofline: dict | None) -> float | None:
    """Seconds that backbone and heads take at least, with the weights where they lie on this machine."""
    if roofline is None:
        return None
    device = Device(roofline["bandwidth over the weights"], roofline["flops"])
    return sum(device.seconds(*work) for work in row["work"].values())


def steps_table(section: str, result: dict, roofline: dict | None) -> str:
    header = [
        "context",
        "N",
        "step, ms",
        "step cost",
        *PARTS,
        "Python",
        "outside backbone and heads",
        "least, ms",
        "step / least",
    ]
    rows = []
    for context, sizes in result["steps"].items():
        for size, row in sizes.items():
            limit, outside = (
                limit_of(row, roofline),
                row["choosing"] + row["cache moves"] + row["Python"],
            )
            beside = (
                ["–", "–"]
                if limit is None
                else [f"{1e3 * limit:.3f}", f"{row['step'] / limit:.1f}"]
            )
            parts = [f"{1e3 * row[part]:.3f}" for part in (*PARTS, "Python")]
            rows.append(
                [
                    context,
                    size,
                    f"{1e3 * row['step']:.2f}",
                    f"{row['step cost']:.2f}",
                    *parts,
                    f"{outside / row['step']:.0%}",
                    *beside,
                ]
            )
    return (
        f"**{section}**: milliseconds of a step and its parts, medians; N = 1 is plain decoding\n\n"
        + markdown(header, rows)
    )


def growth_table(result: dict) -> str:
    names = [
        "tokens/s, first tenth",
        "tokens/s, last tenth",
        "ms a step, first tenth",
        "ms a step, last tenth",
    ]
    rows = [
        [way, *(f"{row[name]:.3g}" for name in names)] for way, row in result["long text"].items()
    ]
    prompts = [
        [length, f"{1e3 * seconds:.1f}", f"{int(length) / seconds:.0f}"]
        for length, seconds in result["prefill"].items()
    ]
    return (
        f"**growth**: one text of {result['tokens']} tokens, up to the context limit\n\n" + markdown(["way", *names], rows)
        + "\n\nA prompt in one pass\n\n" + markdown(["tokens", "ms", "tokens/s"], prompts)
    )  # fmt: skip


def table(results: dict) -> str:
    roofline, parts = results.get("roofline"), []
    if roofline:
        parts.append(
            f"**roofline**: {roofline['bandwidth'] / 1e9:.1f} GB/s from memory, {roofline['bandwidth over the weights'] / 1e9:.1f} GB/s over as many bytes as "
            f"the model's matrices have ({roofline['weights'] / 1e6:.1f} MB: they stay in the caches where these are larger), {roofline['flops'] / 1e9:.0f} GFLOP/s"
        )
    parts += [
        steps_table(section, results[section], roofline)
        for section in ("greedy", "lossless-0.7")
        if section in results
    ]
    return "\n\n".join(parts + ([growth_table(results["growth"])] if "growth" in results else []))


def draw(results: dict, pyplot):
    """Left: c(N) at every context, and the least; right: the parts of a step at the second context."""
    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for context, sizes in results.get("greedy", {"steps": {}})["steps"].items():
        line = curves.plot(
            [int(n) for n in sizes],
            [1e3 * row["step"] for row in sizes.values()],
            "o-",
            label=f"context {context}",
        )[0]
        if "roofline" in results:
            curves.plot(
                [int(n) for n in sizes],
                [1e3 * limit_of(row, results["roofline"]) for row in sizes.values()],
                ":",
                color=line.get_color(),
            )
    curves.set(
        xscale="log",
        yscale="log",
        xlabel="N, nodes of the tree (1: plain)",
        ylabel="ms a step (dotted: the least)",
    )
    curves.grid(alpha=0.3)
    if "greedy" in results:
        curves.legend(fontsize=8)
        context, sizes = list(results["greedy"]["steps"].items())[:2][-1]
        bottom = [0.0] * len(sizes)
        for part in (*PARTS, "Python"):
            heights = [1e3 * row[part] for row in sizes.values()]
            bars.bar(list(sizes), heights, bottom=bottom, label=part)
            bottom = [b + h for b, h in zip(bottom, heights)]
        bars.set(xlabel=f"N, at context {context}", ylabel="ms of a step")
        bars.legend()
    return figure


def main(config: CostConfig) -> None:
    sections = {"roofline": partial(measure_roofline, config)}
    sections |= {
        name: partial(measure_steps, config, t)
        for name, t in (("greedy", 0.0), ("lossless-0.7", 0.7))
    }
    measure("cost", config, sections | {"growth": partial(measure_growth, config)}, table, draw)
