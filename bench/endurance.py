"""A long life: many texts decoded in one process, over and over. Does it hold its memory and its speed, and is its text still the plain one?

The tokens are decoded in tenths, and every tenth decodes the same prompts, so that their speeds compare. A machine has slow minutes,
so some texts of each tenth are decoded in turn by a young process, started for that tenth. The speed of the one over that of the other
is measured alike in every tenth; what age costs is how it changes from the first, when both are young, to the last.
Texts are drawn at random and decoded plainly beside it, off the clock.
"""

import math
import random
import signal
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

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
    pairs: int = option(40, "texts of each tenth that a young process decodes too")

    def __post_init__(self):
        check_sizes(self, ["tokens", "prompt_tokens", "new_tokens", "nodes", "checks", "pairs"])


class Decoder:
    """The model, the heads, the tree and the prompts of a section, as one process has them."""

    def __init__(self, config: EnduranceConfig, temperature: float):
        tokenizer, self.model, self.heads = load(config)
        self.prompts = held_out_prompts(
            tokenizer, math.ceil(config.tokens / TENTHS / config.new_tokens), config.prompt_tokens
        )
        self.tree, self.sampling = (
            calibrated_tree(read_calibration(config.heads, temperature)[0], config.nodes),
            Sampling(temperature),
        )
        self.new_tokens = config.new_tokens
        self.timed(0)  # the first text of a process pays for what is set up once

    def decode(self, generate, *guessing, number: int) -> list[int]:
        steps = generate(
            self.model,
            *guessing,
            self.prompts[number],
            self.new_tokens,
            self.sampling,
            torch.Generator().manual_seed(number),
        )
        return [token for emitted in steps for token in emitted]

    def plain(self, number: int) -> list[int]:
        return self.decode(generate, number=number)

    def timed(self, number: int) -> tuple[list[int], float]:
        """Text `number` by Medusa decoding, and its seconds."""
        start = time.perf_counter()
        text = self.decode(medusa_generate, self.heads, self.tree, number=number)
        return text, time.perf_counter() - start


def be_young(*arguments) -> None:
    global young
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the old one, which ends this one
    young = Decoder(*arguments)


def young_seconds(number: int) -> float:
    return young.timed(number)[1]


def spread(n: int, total: int) -> list[int]:
    """n of the numbers below total, evenly apart."""
    return [i * total // n for i in range(n)]


def endure(config: EnduranceConfig, temperature: float) -> dict:
    """For each tenth: tokens/s, the speed as a share of a young process's, the megabytes that the process has held at most so far, and
    how many of the checked texts are the plain ones."""
    old = Decoder(config, temperature)
    every = range(len(old.prompts))
    paired = spread(min(config.pairs, len(every)), len(every))
    tenths = []
    for tenth in tqdm(range(TENTHS), desc=f"temperature {temperature}", unit="tenth"):
        texts, seconds, shares = [], [], []
        with ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=be_young, initargs=(config, temperature)
        ) as process:
            process.submit(young_seconds, 0).result()  # it is there
            for number in every:
                text, took = old.timed(number)
                texts.append(text)
                seconds.append(took)
                if number in paired:
                    shares.append(process.submit(young_seconds, number).result() / took)
        chosen = random.Random(tenth).sample(every, min(config.checks, len(every)))
        tokens = sum(map(len, texts))
        tenths.append(
            {
                "tokens": tokens, "tokens/s": tokens / sum(seconds), "share of a young process": statistics.median(shares), "peak MB": peak(),
                "checked": len(chosen), "the plain text": sum(texts[number] == old.plain(number) for number in chosen),
            }
        )  # fmt: skip
    return {"tenths": tenths}


def growth(result: dict, name: str) -> float:
    """From the first tenth to the last, as a share of the first."""
    return result["tenths"][-1][name] / result["tenths"][0][name] - 1


def table(results: dict) -> str:
    parts = []
    for section, result in results.items():
        rows = [
            [
                i,
                row["tokens"],
                f"{row['tokens/s']:.0f}",
                f"{row['share of a young process']:.3f}",
                f"{row['peak MB']:.1f}",
                f"{row['the plain text']} of {row['checked']}",
            ]
            for i, row in enumerate(result["tenths"], 1)
        ]
        header = [
            "tenth",
            "tokens",
            "tokens/s",
            "speed over a young process's",
            "peak memory, MB",
            "the plain text",
        ]
        grown = {
            name: growth(result, name)
            for name in ("tokens/s", "share of a young process", "peak MB")
        }
        says = "From the first tenth to the last: tokens/s {:+.1%}, against a young process {:+.1%}, peak memory {:+.2%}.".format(
            *grown.values()
        )
        parts.append(f"**{section}**\n\n" + markdown(header, rows) + f"\n\n{says}")
    return "\n\n".join(parts)


def draw(results: dict, pyplot):
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, name in zip(axes, ("tokens/s", "peak MB")):
        for section, result in results.items():
            axis.plot(
                range(1, TENTHS + 1), [row[name] for row in result["tenths"]], "o-", label=section
            )
        axis.set(xlabel="tenth", ylabel=name, ylim=(0, None))
        axis.legend()
    return figure


def main(config: EnduranceConfig) -> None:
    measure(
        "endurance",
        config,
        {"greedy": partial(endure, config, 0.0), "lossless-0.7": partial(endure, config, 0.7)},
        table,
        draw,
    )
