"""Every way to decode, on the same weights and prompts, in turn, in one process.

A way is a function (prompt, seed) -> Timing. Way by way, prompt by prompt, round by round; the order moves on with every prompt, so
that a drift of the machine hits all alike. The clock starts behind the first step, which reads the prompt.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import zip_longest

import torch
from tqdm import tqdm

from bench.dynamic import dynamic_generate
from bench.figures import distinct
from bench.results import Decoding, held_out_prompts, held_out_turns, load, markdown, measure, need
from data.calibration import (
    CALIBRATION_NODES,
    head_ranks,
    held_out_rows,
    paths_of,
    read_calibration,
)
from data.command import option
from data.compiled import Compiled
from data.difference import first_difference, gap_at
from data.distilled import distilled_rows
from medusa import MedusaHeads, Sampling, generate, medusa_generate
from model import GPT, check_sizes
from sample import COMPILED_SIZES, SIZES as TIMED_SIZES, pick_tree, timed_run
from train import Medusa1Config
from tree import Tree, best_first_tree, calibrated_tree, cartesian_tree, replay, tree_from_paths

RULES = {
    "greedy": Sampling(),
    "lossless-0.7": Sampling(0.7),
    "lossless-1.0": Sampling(1.0),
    "typical": Sampling(0.7, typical=True),
}
SIZES = (4, 8, 16, 32, 64)  # of calibrated trees
PRODUCTS = (16, 32)  # of trees from products of marginals
LOOKUPS = (3, 10)  # tokens that prompt lookup copies: a short and a long setting of the peer
WAYS = (
    "plain", "chain", "cartesian", *(f"product-{n}" for n in PRODUCTS), *(f"calibrated-{n}" for n in SIZES), "cost-chosen", "dynamic-16",
    "dynamic-cost-chosen", "transformers", *(f"transformers-lookup-{n}" for n in LOOKUPS),
)  # fmt: skip


@dataclass(frozen=True)
class DecodeConfig(Decoding):
    """Sections: greedy, lossless-0.7, lossless-1.0, typical. Each compares all ways."""

    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option(
        "float32", "of weights and cache", choices=("float32", "float64", "bfloat16", "float16")
    )
    compile: bool = option(False, "compile the steps of all our ways with torch.compile")
    rounds: int = option(
        5, "times that every way decodes every prompt; speeds are medians over the rounds"
    )
    ways: list[str] = option([], f"some of {' '.join(WAYS)}; plain is always there; default: all")
    turns: list[str] = option(
        [],
        "files of user turns: a chat model answers the last of the held-out ones, to the end of each answer",
    )
    distilled: str = option(
        "",
        "rows that the base wrote, for the product of marginals; default: as for train.py --mode medusa1",
    )

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, ["rounds"])
        if unknown := set(self.ways) - set(WAYS):
            raise ValueError(f"--ways {' '.join(sorted(unknown))}: there are {', '.join(WAYS)}")

    @property
    def chosen(self) -> list[str]:
        return [way for way in WAYS if way == "plain" or not self.ways or way in self.ways]


@dataclass(frozen=True)
class Timing:
    """One text. What was earned, in how many steps and seconds, is counted behind the first step."""

    text: list[int]
    earned: int
    steps: int
    seconds: float


Way = Callable[[list[int], int], Timing]


def ours(steps: Iterator[list[int]]) -> Timing:
    run = timed_run(steps)
    return Timing(run.tokens, len(run.tokens) - 1, len(run.times), sum(run.times))


# ---- trees ----


def product_tree(rank_paths: Sequence[Sequence[int]], n_nodes: int) -> Tree:
    """The rival of `calibrated_tree`, from the same data: the chance of a path is the product of the chances of its ranks, head by head.

    As in the search of the paper's own repository: it takes the heads to be right independently of each other.
    """
    ranks = torch.tensor(
        list(zip_longest(*rank_paths, fillvalue=-1))
    )  # (K, positions); -1 behind the end of a path
    counts = torch.stack(
        [head[head >= 0].bincount(minlength=int(ranks.max()) + 1) for head in ranks]
    )  # (K, R)
    order = counts.sort(
        descending=True, stable=True
    ).indices.tolist()  # on little data a lower rank may come more seldom
    tree = best_first_tree((counts.double() / ranks.shape[1]).log(), n_nodes)
    return tree_from_paths(
        [[order[head][place] for head, place in enumerate(path)] for path in tree.paths[1:]]
    )


def step_starts(config: DecodeConfig, temperature: float) -> list[tuple[int, ...]]:
    """The rank paths behind calibration.json: of the base's own text, where steps start."""
    _, model, heads = load(
        replace(config, dtype="float32")
    )  # of half precision the ranks would be ties
    shards = distilled_rows(Medusa1Config(base=config.base, distilled=config.distilled))
    rows = [
        part.to(heads.weight.device)
        for part in held_out_rows(shards, model.config.vocab_size, heads.config.num_heads)[
            str(temperature)
        ]
    ]
    texts = [
        paths_of(ranks, heads.config.truncated_vocab_size)
        for ranks in head_ranks(model, heads, *rows, Sampling(temperature))
    ]
    return replay(
        texts, calibrated_tree((ranks for text in texts for ranks in text), CALIBRATION_NODES)
    )


def trees_of(
    config: DecodeConfig, model: GPT, heads: MedusaHeads, sampling: Sampling, prompt: list[int]
) -> dict[str, Tree]:
    """The fixed tree of each way that has one."""
    K = heads.config.num_heads
    counts, _ = read_calibration(config.heads, sampling.temperature)
    starts = cache(partial(step_starts, config, sampling.temperature))
    makers = {
        "chain": lambda: cartesian_tree([1] * K),
        "cartesian": lambda: cartesian_tree(([2, 2] + [1] * K)[:K]),
    }
    makers |= {f"product-{n}": lambda n=n: product_tree(starts(), n) for n in PRODUCTS}
    makers |= {f"calibrated-{n}": partial(calibrated_tree, counts, n) for n in SIZES}
    makers["cost-chosen"] = lambda: pick_tree(
        "auto",
        model,
        heads,
        config.heads,
        sampling,
        prompt,
        COMPILED_SIZES if config.compile else TIMED_SIZES,
    )[0]
    wanted = {"cost-chosen" if way == "dynamic-cost-chosen" else way for way in config.chosen}
    return {name: make() for name, make in makers.items() if name in wanted}


# ---- the peer ----


class Clock:
    """A streamer of transformers: notes when tokens come, and how many at once. The prompt comes first."""

    def __init__(self):
        self.stamps, self.counts = [], []

    def put(self, tokens: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())
        self.counts.append(tokens.numel())

    def end(self) -> None:
        pass


def open_peer(base: str, model: GPT):
    """The same weights in transformers, in the dtype and on the device of our model; what ends a text here ends it there too."""
    weight = model.lm_head.weight
    peer = (
        need("transformers")
        .AutoModelForCausalLM.from_pretrained(base, dtype=weight.dtype, local_files_only=True)
        .to(weight.device)
        .eval()
    )
    peer.generation_config.eos_token_id = list(model.config.eos_ids) or None
    peer.generation_config.pad_token_id = 0
    return peer


def peer_way(
    peer, new_tokens: int, sampling: Sampling, lookup: int | None, prompt: list[int], seed: int
) -> Timing:
    torch.manual_seed(seed)
    clock, tokens = Clock(), torch.tensor([prompt], device=peer.device)
    drawing = (
        {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        if sampling.temperature
        else {"do_sample": False}
    )
    more = {"prompt_lookup_num_tokens": lookup} if lookup else {}
    text = peer.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        streamer=clock,
        **drawing,
        **more,
    )
    return Timing(
        text[0, len(prompt) :].tolist(),
        sum(clock.counts[2:]),
        len(clock.counts) - 2,
        clock.stamps[-1] - clock.stamps[1],
    )


# ---- all ways ----


def ways_of(
    config: DecodeConfig, model: GPT, heads: MedusaHeads, sampling: Sampling, trees: dict[str, Tree]
) -> dict[str, Way]:
    """Of the ways that are asked for, those that this rule has: transformers knows no typical acceptance."""
    n = config.new_tokens
    nodes = {"dynamic-16": 16} | (
        {"dynamic-cost-chosen": len(trees["cost-chosen"])} if "cost-chosen" in trees else {}
    )

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator(model.lm_head.weight.device).manual_seed(seed)

    ways = {"plain": lambda prompt, seed: ours(generate(model, prompt, n, sampling, seeded(seed)))}
    ways |= {
        name: lambda prompt, seed, tree=tree: ours(
            medusa_generate(model, heads, tree, prompt, n, sampling, seeded(seed))
        )
        for name, tree in trees.items()
    }
    ways |= {
        name: lambda prompt, seed, size=size: ours(
            dynamic_generate(model, heads, size, prompt, n, sampling, seeded(seed))
        )
        for name, size in nodes.items()
    }
    if not sampling.typical and any(way.startswith("transformers") for way in config.chosen):
        peer = open_peer(config.base, model)
        ways["transformers"] = partial(peer_way, peer, n, sampling, None)
        ways |= {
            f"transformers-lookup-{count}": partial(peer_way, peer, n, sampling, count)
            for count in LOOKUPS
        }
    return {name: ways[name] for name in config.chosen if name in ways}


def in_turn(
    ways: dict[str, Way], prompts: list[list[int]], rounds: int, about: str
) -> dict[str, list[list[Timing]]]:
    """{way: for each round the timing of each prompt}; the number of a prompt is its seed."""
    for way in (
        ways.values()
    ):  # what is laid out at first use is laid out now, for short texts and for long ones
        for prompt in (min(prompts, key=len), max(prompts, key=len)):
            way(prompt, 0)
    names, timings = list(ways), {name: [[] for _ in range(rounds)] for name in ways}
    for turn in tqdm(range(rounds * len(prompts)), desc=about, unit="prompt"):
        round_, seed = divmod(turn, len(prompts))
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            timings[name][round_].append(ways[name](prompts[seed], seed))
    return timings


def totals(timings: list[Timing]) -> tuple[int, int, float]:
    return (
        sum(t.earned for t in timings),
        sum(t.steps for t in timings),
        sum(t.seconds for t in timings),
    )


def summary(mine: list[list[Timing]], plain: list[list[Timing]]) -> dict:
    """Speeds are medians over the rounds, and ratios are taken within a round."""
    speeds, ratios, costs, steps_ms = [], [], [], []
    for my_round, plain_round in zip(mine, plain):
        (earned, steps, seconds), (plain_earned, plain_steps, plain_seconds) = (
            totals(my_round),
            totals(plain_round),
        )
        speeds.append(earned / seconds)
        steps_ms.append(1e3 * seconds / steps)
        costs.append(seconds / steps * plain_steps / plain_seconds)
        ratios.append(earned / seconds * plain_seconds / plain_earned)
    earned, steps, _ = totals([timing for round_ in mine for timing in round_])
    return {
        "tokens/step": earned / steps,
        "step cost": statistics.median(costs),
        "milliseconds of a step": statistics.median(steps_ms),
        "tokens/s": statistics.median(speeds),
        "ratio": statistics.median(ratios),
        "lowest ratio": min(ratios),
        "highest ratio": max(ratios),
        "distinct 4-grams": distinct([timing.text for timing in mine[0]]),
    }


def sameness(
    model: GPT,
    mine: list[list[Timing]],
    plain: list[list[Timing]],
    prompts: list[list[int]],
    sampling: Sampling,
) -> dict:
    """On how many prompts was the text plain decoding's, in every round; where not, the largest gap between the two tokens where they parted."""
    same, gaps = 0, []
    for seed, prompt in enumerate(prompts):
        judge = plain[0][seed].text
        differing = [round_[seed].text for round_ in mine if round_[seed].text != judge]
        same += not differing
        gaps += [
            gap_at(model, prompt, text, judge, first_difference(text, judge), sampling, seed)
            for text in differing
        ]
    return {
        "identical texts": same,
        "of": len(prompts),
        "largest gap where texts part": max(gaps, default=0.0),
    }


def measure_rule(config: DecodeConfig, name: str) -> dict:
    sampling = RULES[name]
    tokenizer, model, heads = load(config, ends=bool(config.turns))
    if config.compile:
        torch._dynamo.config.recompile_limit = len(WAYS)  # of tree sizes
        model = Compiled(model, {1, *COMPILED_SIZES})
        heads.compile(fullgraph=True, dynamic=False)
    prompts = (
        held_out_turns(config, tokenizer)
        if config.turns
        else held_out_prompts(tokenizer, config.prompts, config.prompt_tokens)
    )
    trees = trees_of(config, model, heads, sampling, prompts[0])
    if config.compile:  # the steps of the ways, and no others: a cut tree is not worth a compilation, nor may one be timed
        model.sizes.clear()
        model.sizes.update(
            (1, *map(len, trees.values()), *([16] if "dynamic-16" in config.chosen else []))
        )
    timings = in_turn(ways_of(config, model, heads, sampling, trees), prompts, config.rounds, name)
    rows = {}
    for way, mine in timings.items():
        rows[way] = summary(mine, timings["plain"])
        if not sampling.typical and (
            sampling.temperature == 0 or not way.startswith("transformers")
        ):  # the peer draws with numbers of its own
            rows[way] |= sameness(model, mine, timings["plain"], prompts, sampling)
        if way in trees or way.startswith("dynamic"):
            rows[way]["nodes"] = (
                len(trees[way])
                if way in trees
                else len(trees["cost-chosen"])
                if way == "dynamic-cost-chosen"
                else 16
            )
    context = (
        sum(map(len, prompts)) // len(prompts) + config.new_tokens // 2
    )  # where steps stand on average
    return {"ways": rows, "rounds": config.rounds, "prompts": config.prompts, "context": context}


HEADER = [
    "way",
    "nodes",
    "tokens/step",
    "step cost",
    "ms a step",
    "tokens/s",
    "ratio to our plain (range)",
    "identical text",
    "distinct-4",
]


def table(results: dict) -> str:
    parts = []
    for rule, result in results.items():
        rows = []
        for way, row in result["ways"].items():
            same = f"{row['identical texts']} of {row['of']}" if "of" in row else "–"
            same += (
                f", gap {row['largest gap where texts part']:.0e}"
                if row.get("largest gap where texts part")
                else ""
            )
            ratio = f"{row['ratio']:.2f}x ({row['lowest ratio']:.2f} to {row['highest ratio']:.2f})"
            figures = [
                f"{row['tokens/step']:.2f}",
                f"{row['step cost']:.2f}",
                f"{row['milliseconds of a step']:.2f}",
                f"{row['tokens/s']:.0f}",
                ratio,
            ]
            rows.append(
                [way, row.get("nodes", "–"), *figures, same, f"{row['distinct 4-grams']:.0%}"]
            )
        parts.append(
            f"**{rule}**, medians of {result['rounds']} rounds over {result['prompts']} prompts\n\n"
            + markdown(HEADER, rows)
        )
    return "\n\n".join(parts)


def draw(results: dict, pyplot):
    figure, axes = pyplot.subplots(
        len(results), 1, figsize=(9, 1 + 3.6 * len(results)), squeeze=False
    )
    for axis, (rule, result) in zip(axes[:, 0], results.items()):
        ways = result["ways"]
        ratios = [row["ratio"] for row in ways.values()]
        ranges = [
            [row["ratio"] - row["lowest ratio"] for row in ways.values()],
            [row["highest ratio"] - row["ratio"] for row in ways.values()],
        ]
        axis.barh(
            list(ways),
            ratios,
            xerr=ranges,
            color=[
                "grey" if name.startswith(("plain", "transformers")) else "tab:blue"
                for name in ways
            ],
        )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set(title=rule, xlabel="tokens/s over our plain decoding")
    return figure


def main(config: DecodeConfig) -> None:
    if any(way.startswith("transformers") for way in config.chosen):
        need("transformers")
    measure(
        "decode", config, {name: partial(measure_rule, config, name) for name in RULES}, table, draw
    )
