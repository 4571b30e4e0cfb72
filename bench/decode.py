"""Every way to decode, on the same weights and prompts, in turn, in one process.

A way is a function (prompt, seed) -> Timing. The order of the ways moves on with every prompt, so
that a drift of the machine hits all alike. The prompt's own step is not timed.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, zip_longest

import torch
from tqdm import tqdm

import sample
from bench.dynamic import best_first_tree, dynamic_generate
from bench.figures import distinct
from bench.results import Decoding, held_out_prompts, held_out_turns, load, markdown, measure, need
from data.command import option, pick_device
from medusa import MedusaHeads, Sampling
from model import GPT, check_sizes
from sample import first_difference, pick_tree, read_calibration, timed_run
from train import CALIBRATION_NODES, SHIPPED_ROWS, Medusa1Config
from train import distilled_rows, head_ranks, held_out_rows, rank_paths
from tree import ROOT_ONLY, Tree, calibrated_tree, cartesian_tree, replay, tree_from_paths

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
    "plain", "chain", "cartesian", *(f"product-{n}" for n in PRODUCTS),
    *(f"calibrated-{n}" for n in SIZES), "cost-chosen", "dynamic-16", "dynamic-cost-chosen",
    "transformers", *(f"transformers-lookup-{n}" for n in LOOKUPS),
)  # fmt: skip


@dataclass(frozen=True)
class DecodeConfig(Decoding):
    """Sections: greedy, lossless-0.7, lossless-1.0, typical. Each compares all ways."""

    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("float32", "weights", choices=("float32", "float64", "bfloat16", "float16"))
    rounds: int = option(5, "times that every way decodes every prompt")
    ways: list[str] = option([], f"some of {' '.join(WAYS)}; plain is always there; default: all")
    turns: list[str] = option([], "files of user turns, to answer in place of prompts")
    distilled: str = option(SHIPPED_ROWS, "rows that the base wrote, for the product trees")

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, ["rounds"])
        unknown = set(self.ways) - set(WAYS)
        if unknown:
            raise ValueError(f"--ways {' '.join(sorted(unknown))}: there are {', '.join(WAYS)}")

    @property
    def chosen(self) -> list[str]:
        return [way for way in WAYS if way in ("plain", *(self.ways or WAYS))]

    @property
    def with_peer(self) -> bool:
        return any(way.startswith("transformers") for way in self.chosen)


@dataclass(frozen=True)
class Timing:
    """One text; and the tokens, steps and seconds after its first step."""

    text: list[int]
    tokens: int
    steps: int
    seconds: float


def ours(steps) -> Timing:
    text, times = timed_run(steps)
    return Timing(text, len(text) - 1, len(times), sum(times))


# ---- trees ----


def product_tree(paths: Sequence[Sequence[int]], n_nodes: int) -> Tree:
    """The rival of `calibrated_tree`, from the same rank paths: the probability of a path is the
    product of its ranks', head by head, as in the search of the paper's own repository."""
    # (K, positions); -1 after the end of a path
    ranks = torch.tensor(list(zip_longest(*paths, fillvalue=-1)))
    counts = [head[head >= 0].bincount(minlength=int(ranks.max()) + 1) for head in ranks]
    counts = torch.stack(counts)  # (K, R)
    order = counts.sort(descending=True, stable=True).indices.tolist()  # (K, R)
    tree = best_first_tree((counts.double() / ranks.shape[1]).log(), n_nodes)
    found = []
    for path in tree.paths[1:]:
        found.append([order[k][i] for k, i in enumerate(path)])
    return tree_from_paths(found)


def step_starts(config: DecodeConfig, temperature: float) -> list[tuple[int, ...]]:
    """The rank paths that calibration.json counts: of the base's own text, where steps start."""
    # In float32: in half precision many ranks would be equal.
    device = pick_device(config.device)
    model = GPT.from_pretrained(config.base, device=device)
    heads = MedusaHeads.from_pretrained(config.heads, device=device)
    asked = Medusa1Config(base=config.base, distilled=config.distilled)
    shards = distilled_rows(asked, asked.out, 0)
    held_out = held_out_rows(shards, model.config.vocab_size, heads.config.num_heads)
    rows = [part.to(device) for part in held_out[str(temperature)]]
    ranks = head_ranks(model, heads, *rows, Sampling(temperature))
    texts = [rank_paths(text, heads) for text in ranks]
    return replay(texts, calibrated_tree(chain.from_iterable(texts), CALIBRATION_NODES))


def trees_of(
    config: DecodeConfig, model: GPT, heads: MedusaHeads, sampling: Sampling, prompt: list[int]
) -> dict[str, Tree]:
    """The fixed tree of each way that has one."""
    K = heads.config.num_heads
    counts, _ = read_calibration(config.heads, sampling.temperature)
    starts = cache(partial(step_starts, config, sampling.temperature))
    makers: dict[str, Callable] = {"plain": lambda: ROOT_ONLY}
    makers["chain"] = lambda: cartesian_tree([1] * K)
    makers["cartesian"] = lambda: cartesian_tree(([2, 2] + [1] * K)[:K])
    for n in PRODUCTS:
        makers[f"product-{n}"] = lambda n=n: product_tree(starts(), n)
    for n in SIZES:
        makers[f"calibrated-{n}"] = partial(calibrated_tree, counts, n)
    about = model, heads, config.heads, sampling, prompt
    makers["cost-chosen"] = lambda: pick_tree("auto", *about)[0]
    asked = {way.removeprefix("dynamic-") for way in config.chosen}
    return {name: make() for name, make in makers.items() if name in asked}


# ---- the peer ----


class Clock:
    """A streamer of transformers: when tokens come, and how many. The prompt comes first."""

    def __init__(self):
        self.stamps, self.counts = [], []

    def put(self, tokens: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())
        self.counts.append(tokens.numel())

    def end(self) -> None:
        pass


def open_peer(base: str, model: GPT):
    """The same weights in transformers, of the same dtype, device and EOS tokens."""
    weight, kind = model.lm_head.weight, need("transformers").AutoModelForCausalLM
    peer = kind.from_pretrained(base, dtype=weight.dtype, local_files_only=True)
    peer = peer.to(weight.device).eval()
    peer.generation_config.eos_token_id = list(model.config.eos_ids) or None
    peer.generation_config.pad_token_id = 0
    return peer


def peer_way(peer, new_tokens: int, sampling: Sampling, lookup: int, prompt, seed) -> Timing:
    torch.manual_seed(seed)
    clock, tokens = Clock(), torch.tensor([prompt], device=peer.device)
    flags = {"max_new_tokens": new_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        flags |= {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    if lookup > 0:
        flags["prompt_lookup_num_tokens"] = lookup
    mask = torch.ones_like(tokens)
    text = peer.generate(tokens, attention_mask=mask, streamer=clock, **flags)
    text, seconds = text[0, len(prompt) :].tolist(), clock.stamps[-1] - clock.stamps[1]
    return Timing(text, sum(clock.counts[2:]), len(clock.counts) - 2, seconds)


# ---- all ways ----


def dynamic_sizes(config: DecodeConfig, trees: dict[str, Tree]) -> dict[str, int]:
    sizes = {"dynamic-16": 16, "dynamic-cost-chosen": len(trees.get("cost-chosen", ROOT_ONLY))}
    return {name: size for name, size in sizes.items() if name in config.chosen}


def ways_of(
    config: DecodeConfig, model: GPT, heads: MedusaHeads, sampling: Sampling, trees: dict[str, Tree]
) -> dict[str, Callable]:
    """Those that are asked for and that this rule has: transformers has no typical acceptance."""
    seeded = torch.Generator(model.lm_head.weight.device).manual_seed
    n, ways = config.new_tokens, {}
    for name, tree in trees.items():
        ways[name] = lambda prompt, seed, tree=tree: ours(
            sample.decode(model, heads, tree, prompt, n, sampling, seed)
        )
    for name, size in dynamic_sizes(config, trees).items():
        ways[name] = lambda prompt, seed, size=size: ours(
            dynamic_generate(model, heads, size, prompt, n, sampling, seeded(seed))
        )
    if config.with_peer and not sampling.typical:
        peer = open_peer(config.base, model)
        ways["transformers"] = partial(peer_way, peer, n, sampling, 0)
        for lookup in LOOKUPS:
            way = partial(peer_way, peer, n, sampling, lookup)
            ways[f"transformers-lookup-{lookup}"] = way
    return {name: ways[name] for name in config.chosen if name in ways}


def in_turn(ways: dict[str, Callable], prompts: list, rounds: int, about: str) -> dict[str, list]:
    """{way: for each round the timing of each prompt}; the number of a prompt is its seed."""
    # What is set up at first use is set up now, for short prompts and for long ones.
    for way in ways.values():
        for prompt in (min(prompts, key=len), max(prompts, key=len)):
            way(prompt, 0)
    names, timings = list(ways), {name: [] for name in ways}
    for turn in tqdm(range(rounds * len(prompts)), about):
        seed, first = turn % len(prompts), turn % len(names)
        for name in names[first:] + names[:first]:
            timings[name] += [[]] if seed == 0 else []  # a round begins
            timings[name][-1].append(ways[name](prompts[seed], seed))
    return timings


def totals(timings: list[Timing]) -> tuple[int, int, float]:
    tokens, steps, seconds = zip(*((t.tokens, t.steps, t.seconds) for t in timings))
    return sum(tokens), sum(steps), sum(seconds)


def summary(mine: list[list[Timing]], plain: list[list[Timing]]) -> dict:
    """Speeds are medians over the rounds, and ratios are taken within a round."""
    speeds, ratios, costs, step_times = [], [], [], []
    for my_round, plain_round in zip(mine, plain):
        tokens, steps, seconds = totals(my_round)
        plain_tokens, plain_steps, plain_seconds = totals(plain_round)
        speeds.append(tokens / seconds)
        step_times.append(1e3 * seconds / steps)
        costs.append(seconds / steps * plain_steps / plain_seconds)
        ratios.append(tokens / seconds * plain_seconds / plain_tokens)
    tokens, steps, _ = totals(list(chain.from_iterable(mine)))
    return {
        "tokens/step": tokens / steps,
        "step cost": statistics.median(costs),
        "milliseconds of a step": statistics.median(step_times),
        "tokens/s": statistics.median(speeds),
        "ratio": statistics.median(ratios),
        "lowest ratio": min(ratios),
        "highest ratio": max(ratios),
        "distinct 4-grams": distinct([timing.text for timing in mine[0]]),
    }


def sameness(model: GPT, mine: list, plain: list, prompts: list, sampling: Sampling) -> dict:
    """On how many prompts all rounds gave plain decoding's text; else, the gap of two tokens."""
    same, gaps = 0, [0.0]
    for seed, prompt in enumerate(prompts):
        expected = plain[0][seed].text
        asked = expected, sampling, seed
        parted = [first_difference(model, prompt, round_[seed].text, *asked) for round_ in mine]
        same += 1 if parted == [None] * len(mine) else 0
        gaps += [found[1] for found in parted if found is not None]
    counted = {"identical texts": same, "of": len(prompts)}
    return counted | {"largest gap where texts part": max(gaps)}


def measure_rule(config: DecodeConfig, name: str) -> dict:
    sampling, chat = RULES[name], len(config.turns) > 0
    tokenizer, model, heads = load(config, config.device, config.dtype, endless=not chat)
    if chat:
        prompts = held_out_turns(config, tokenizer, model)
    else:
        prompts = held_out_prompts(tokenizer, config.prompts, config.prompt_tokens)
    trees = trees_of(config, model, heads, sampling, prompts[0])
    ways = ways_of(config, model, heads, sampling, trees)
    timings = in_turn(ways, prompts, config.rounds, name)

    sizes = {way: len(tree) for way, tree in trees.items()} | dynamic_sizes(config, trees)
    rows = {}
    for way, mine in timings.items():
        rows[way] = summary(mine, timings["plain"])
        # The peer samples with noise of its own.
        peer_samples = way.startswith("transformers") and sampling.temperature > 0
        if not (sampling.typical or peer_samples):
            rows[way] |= sameness(model, mine, timings["plain"], prompts, sampling)
        if sizes.get(way, 1) > 1:
            rows[way]["nodes"] = sizes[way]
    # Where steps are on average.
    context = sum(map(len, prompts)) // len(prompts) + config.new_tokens // 2
    return {"ways": rows, "rounds": config.rounds, "prompts": config.prompts, "context": context}


# ---- what is shown ----

HEADER = ["way", "nodes", "tokens/step", "step cost", "ms a step", "tokens/s"]
HEADER += ["ratio to our plain (range)", "identical text", "distinct-4"]


def cells(way: str, row: dict) -> list[str]:
    same, gap = "–", row.get("largest gap where texts part", 0)
    if "of" in row:
        same = f"{row['identical texts']} of {row['of']}" + (f", gap {gap:.0e}" if gap > 0 else "")
    numbers = [f"{row['tokens/step']:.2f}", f"{row['step cost']:.2f}"]
    numbers += [f"{row['milliseconds of a step']:.2f}", f"{row['tokens/s']:.0f}"]
    ratio = f"{row['ratio']:.2f}x ({row['lowest ratio']:.2f} to {row['highest ratio']:.2f})"
    return [way, row.get("nodes", "–"), *numbers, ratio, same, f"{row['distinct 4-grams']:.0%}"]


def table(results: dict) -> str:
    parts = []
    for rule, result in results.items():
        over = f"medians of {result['rounds']} rounds over {result['prompts']} prompts"
        rows = [cells(way, row) for way, row in result["ways"].items()]
        parts.append(f"**{rule}**, {over}\n\n{markdown(HEADER, rows)}")
    return "\n\n".join(parts)


def main(config: DecodeConfig) -> None:
    if config.with_peer:
        need("transformers")
    sections = {name: partial(measure_rule, config, name) for name in RULES}
    measure("decode", config, sections, table)
