"""A long life: many texts decoded in one process, over and over. Does it hold its memory and its speed, and is its text still the plain one?

The tokens are decoded in tenths, and every tenth decodes the same prompts, so that their speeds compare. Texts are drawn at random and
decoded plainly beside it, off the clock.
"""

import math
import random
import time
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from bench.results import Bench, held_out_prompts, load, markdown, measure
from bench.training import peak
from data.calibration import read_calibration
from data.command import option
from medusa import Sampling, generate, medusa_generate
from model import check_sizes
from tree import calibrated_tree

TENTHS = 10


@dataclass(frozen=True)
class EnduranceConfig(Bench):
    """Sections: greedy, lossless-0.7."""

    tokens: int = option(200_000, "tokens to decode in each section")
    prompt_tokens: int = option(64, "tokens of a prompt")
    new_tokens: int = option(128, "tokens decoded behind each prompt")
    nodes: int = option(8, "nodes of the calibrated tree")
    checks: int = option(3, "texts of each tenth that are decoded plainly too")

    def __post_init__(self):
        check_sizes(self, ["tokens", "prompt_tokens", "new_tokens", "nodes", "checks"])


def endure(config: EnduranceConfig, temperature: float) -> dict:
    """For each tenth: tokens/s, the megabytes that the process has held at most so far, and how many of the checked texts are the plain ones."""
    tokenizer, model, heads = load(config)
    prompts = held_out_prompts(tokenizer, math.ceil(config.tokens / TENTHS / config.new_tokens), config.prompt_tokens)
    tree, sampling = calibrated_tree(read_calibration(config.heads, temperature)[0], config.nodes), Sampling(temperature)

    def decode(generate, *guessing, seed: int) -> list[int]:
        steps = generate(model, *guessing, prompts[seed], config.new_tokens, sampling, torch.Generator().manual_seed(seed))
        return [token for emitted in steps for token in emitted]

    decode(medusa_generate, heads, tree, seed=0)  # the first text of a process pays for what is set up once
    tenths = []
    for tenth in tqdm(range(TENTHS), desc=f"temperature {temperature}", unit="tenth"):
        start = time.perf_counter()
        texts = [decode(medusa_generate, heads, tree, seed=seed) for seed in range(len(prompts))]
        seconds = time.perf_counter() - start
        chosen = random.Random(tenth).sample(range(len(prompts)), min(config.checks, len(prompts)))
        same = sum(texts[seed] == decode(generate, seed=seed) for seed in chosen)
        tenths.append(
            {"tokens": sum(map(len, texts)), "tokens/s": sum(map(len, texts)) / seconds, "peak MB": peak(), "checked": len(chosen), "the plain text": same}
        )
    return {"tenths": tenths}


def growth(result: dict, name: str) -> float:
    """From the first tenth to the last, as a share of the first."""
    return result["tenths"][-1][name] / result["tenths"][0][name] - 1


def table(results: dict) -> str:
    parts = []
    for section, result in results.items():
        rows = [
            [i, row["tokens"], f"{row['tokens/s']:.0f}", f"{row['peak MB']:.1f}", f"{row['the plain text']} of {row['checked']}"]
            for i, row in enumerate(result["tenths"], 1)
        ]
        says = f"From the first tenth to the last: tokens/s {growth(result, 'tokens/s'):+.1%}, peak memory {growth(result, 'peak MB'):+.2%}."
        parts.append(f"**{section}**\n\n" + markdown(["tenth", "tokens", "tokens/s", "peak memory, MB", "the plain text"], rows) + f"\n\n{says}")
    return "\n\n".join(parts)


def draw(results: dict, pyplot):
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, name in zip(axes, ("tokens/s", "peak MB")):
        for section, result in results.items():
            axis.plot(range(1, TENTHS + 1), [row[name] for row in result["tenths"]], "o-", label=section)
        axis.set(xlabel="tenth", ylabel=name, ylim=(0, None))
        axis.legend()
    return figure


def main(config: EnduranceConfig) -> None:
    measure("endurance", config, {"greedy": partial(endure, config, 0.0), "lossless-0.7": partial(endure, config, 0.7)}, table, draw)
