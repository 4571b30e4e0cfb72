"""What a step costs, over the nodes of its tree and the context, and the least that it can cost.

backbone     the model over the tree, its LM head included
heads        at the one node that was accepted last, with the LM head that they share
choosing     the rest of propose and accept, and the sampling of tokens
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
from bench.roofline import Device, backbone_work, heads_work, matrices
from bench.roofline import measured_bandwidth, measured_flops
from data.command import option
from medusa import MedusaHeads, Sampling, Step
from model import GPT, KVCache, check_sizes
from sample import decode, read_calibration
from tree import ROOT_ONLY, calibrated_tree

SIZES = (2, 4, 8, 16, 32, 64)
CONTEXTS = (64, 128, 256, 512, 960)
PARTS = ("backbone", "heads", "choosing", "cache moves")
ALL_PARTS = (*PARTS, "Python")
WIDTH = 4  # bytes of a float32


@dataclass(frozen=True)
class CostConfig(Bench):
    """Sections: roofline (of this machine), greedy, lossless-0.7, growth (up to the context)."""

    rounds: int = option(5, "rounds over all sizes")
    steps: int = option(8, "steps that are timed in each")
    nodes: int = option(16, "nodes of the calibrated tree that decodes the long text")

    def __post_init__(self):
        check_sizes(self, ["rounds", "steps", "nodes"])


# ---- steps, and what they are made of ----


class Stopwatch:
    """Seconds in each part. A part inside another is taken off it, but for the heads' calls."""

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
    places = [(model, "forward", "backbone"), (model.lm_head, "forward", "backbone")]
    places += [(heads, "forward", "heads"), (KVCache, "keep", "cache moves")]
    for name in ("propose", "accept", "logits_to_probs", "sample"):
        places.append((medusa, name, "choosing"))
    places.append((medusa.SharedGumbelNoise, "at", "choosing"))
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, watch.wrap(part, getattr(owner, name))))
        yield watch


def steps_in_parts(steps: Iterator[Step], watch: Stopwatch, n: int) -> list[dict[str, float]]:
    """Seconds of n steps and of their parts, after the prompt's own and a warm-up."""
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


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def step_cost(tree: list[list[dict]], plain: list[list[dict]]) -> float:
    """A step over a plain one of the same round, so that a slow minute of the machine hits both."""
    pairs = [(medians(ours)["step"], medians(theirs)["step"]) for ours, theirs in zip(tree, plain)]
    return statistics.median(ours / theirs for ours, theirs in pairs)


def trees_of(config: CostConfig, temperature: float, sizes) -> dict:  # N = 1: plain decoding
    counts, _ = read_calibration(config.heads, temperature)
    return {1: ROOT_ONLY} | {size: calibrated_tree(counts, size) for size in sizes}


def measure_steps(config: CostConfig, temperature: float) -> dict:
    """{context: {N: seconds of a step and its parts, its cost, and the work of the roofline}}"""
    tokenizer, model, heads = load(config)
    trees, limit = trees_of(config, temperature, SIZES), model.config.max_position_embeddings
    room = (config.steps + 2) * (heads.config.num_heads + 1) + 1  # the text never ends
    contexts = [context for context in CONTEXTS if context + room <= limit]
    if len(contexts) == 0:
        raise ValueError(f"--steps {config.steps}: too many for a context of {limit} tokens")
    prompt = held_out_prompts(tokenizer, 1, max(contexts))[0]

    rows = {context: defaultdict(list) for context in contexts}
    for _ in tqdm(range(config.rounds), f"steps at temperature {temperature}"):
        for context, of_sizes in rows.items():
            for size, tree in trees.items():
                with watched(model, heads) as watch:
                    asked = prompt[-context:], room, Sampling(temperature), 0
                    steps = decode(model, heads, tree, *asked)
                    of_sizes[size].append(steps_in_parts(steps, watch, config.steps))

    found = {}
    for context, of_sizes in rows.items():
        found[str(context)] = {}
        for size, rounds in of_sizes.items():
            work = {"backbone": backbone_work(model.config, size, context, WIDTH)}
            work["heads"] = heads_work(heads.config, WIDTH) if size > 1 else (0, 0)
            row = medians(list(chain.from_iterable(rounds)))
            row |= {"step cost": step_cost(rounds, of_sizes[1]), "work": work}
            found[str(context)][str(size)] = row
    return {"steps": found}


def measure_roofline(config: CostConfig) -> dict:
    """Bandwidth from memory, and over as many bytes as a small model keeps in the caches."""
    _, model, _ = load(config)
    size = WIDTH * matrices(model.config)
    found = {"bandwidth": measured_bandwidth(1 << 28), "weights": size, "flops": measured_flops()}
    return found | {"bandwidth over the weights": measured_bandwidth(size)}


# ---- growth ----


def stamped(steps: Iterator[Step]) -> list[tuple[float, int]]:
    """(seconds, tokens) of each step after the prompt's own."""
    next(steps)
    stamps, start = [], time.perf_counter()
    for step in steps:
        now = time.perf_counter()
        stamps.append((now - start, len(step.emitted)))
        start = now
    return stamps


def tenths(stamps: list[tuple[float, int]]) -> dict[str, float]:
    """Speeds in the first and in the last tenth of a text, of its (seconds, tokens) by step."""
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
        seconds, tokens = map(sum, zip(*steps))
        found[f"tokens/s, {name} tenth"] = tokens / seconds
        found[f"ms a step, {name} tenth"] = 1e3 * seconds / len(steps)
    return found


@torch.inference_mode()
def prefill_seconds(model: GPT, prompt: list[int]) -> float:
    tokens, cache = torch.tensor([prompt]), model.new_cache(len(prompt))
    start = time.perf_counter()
    model.lm_head(model(tokens, cache=cache)[:, -1]).argmax().item()
    return time.perf_counter() - start


def measure_growth(config: CostConfig) -> dict:
    """Prompts up to the context in one pass; one text from 16 tokens to the context, both ways."""
    tokenizer, model, heads = load(config)
    trees, limit = trees_of(config, 0.0, [config.nodes]), model.config.max_position_embeddings
    prompt = held_out_prompts(tokenizer, 1, limit)[0]
    lengths = sorted({min(length, limit) for length in (*CONTEXTS, limit)})
    prefill, long = {length: [] for length in lengths}, {size: [] for size in trees}
    for _ in tqdm(range(config.rounds), "growth"):
        for length in lengths:
            prefill[length].append(prefill_seconds(model, prompt[:length]))
        for size, tree in trees.items():
            steps = decode(model, heads, tree, prompt[:16], limit, Sampling(), 0)
            long[size].append(tenths(stamped(steps)))
    texts = {}
    for size, rows in long.items():
        texts["plain" if size == 1 else f"tree of {size}"] = medians(rows)
    seconds = {str(length): statistics.median(times) for length, times in prefill.items()}
    return {"prefill": seconds, "long text": texts, "tokens": limit - 16}


# ---- what is shown ----


def least(row: dict, roofline: dict) -> float:
    """Seconds that backbone and heads take at least."""
    device = Device(roofline["bandwidth over the weights"], roofline["flops"])
    return sum(device.seconds(*work) for work in row["work"].values())


def steps_table(section: str, result: dict, roofline: dict | None) -> str:
    header = ["context", "N", "step, ms", "step cost", *ALL_PARTS, "outside backbone and heads"]
    header += ["least, ms", "step / least"]
    rows = []
    for context, sizes in result["steps"].items():
        for size, row in sizes.items():
            step, bound = row["step"], ["–", "–"]
            if roofline is not None:
                limit = least(row, roofline)
                bound = [f"{1e3 * limit:.3f}", f"{step / limit:.1f}"]
            parts = [f"{1e3 * row[part]:.3f}" for part in ALL_PARTS]
            outside = sum(row[part] for part in ALL_PARTS[2:]) / step
            cells = [context, size, f"{1e3 * step:.2f}", f"{row['step cost']:.2f}", *parts]
            rows.append([*cells, f"{outside:.0%}", *bound])
    about = "milliseconds of a step and its parts, medians; N = 1 is plain decoding"
    return f"**{section}**: {about}\n\n{markdown(header, rows)}"


def growth_table(result: dict) -> str:
    long = result["long text"]
    names = list(next(iter(long.values())))
    rows = [[way, *(f"{row[name]:.3g}" for name in names)] for way, row in long.items()]
    prompts = []
    for length, seconds in result["prefill"].items():
        prompts.append([length, f"{1e3 * seconds:.1f}", f"{int(length) / seconds:.0f}"])
    about = f"**growth**: one text of {result['tokens']} tokens, up to the context"
    prefill = markdown(["tokens", "ms", "tokens/s"], prompts)
    return f"{about}\n\n{markdown(['way', *names], rows)}\n\nA prompt in one pass\n\n{prefill}"


def table(results: dict) -> str:
    roofline, parts = results.get("roofline"), []
    if roofline is not None:
        over = f"{roofline['bandwidth over the weights'] / 1e9:.1f} GB/s over as many bytes as the "
        over += f"model's matrices have ({roofline['weights'] / 1e6:.1f} MB)"
        memory, flops = roofline["bandwidth"] / 1e9, roofline["flops"] / 1e9
        parts.append(f"**roofline**: {memory:.1f} GB/s from memory, {over}, {flops:.0f} GFLOP/s")
    for section in ("greedy", "lossless-0.7"):
        if section in results:
            parts.append(steps_table(section, results[section], roofline))
    if "growth" in results:
        parts.append(growth_table(results["growth"]))
    return "\n\n".join(parts)


def main(config: CostConfig) -> None:
    sections = {"roofline": partial(measure_roofline, config)}
    for name, temperature in (("greedy", 0.0), ("lossless-0.7", 0.7)):
        sections[name] = partial(measure_steps, config, temperature)
    sections["growth"] = partial(measure_growth, config)
    measure("cost", config, sections, table)
