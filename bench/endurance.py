"""Many texts decoded in one process, over and over: does it hold its memory, speed and text?

The tokens are decoded in tenths, and every tenth decodes the same prompts. A machine has slow
minutes, so some texts of each tenth are decoded in turn by a young process, started for that tenth:
what age costs is how the speed of the one over the other changes from the first tenth, when both
are young, to the last. Texts chosen at random are decoded plainly too, off the clock.
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

from tqdm import tqdm

from bench.results import Bench, held_out_prompts, load, markdown, measure
from bench.training import peak
from data.command import option
from medusa import Sampling
from model import check_sizes
from sample import decode, read_calibration
from tree import ROOT_ONLY, Tree, calibrated_tree

TENTHS = 10


@dataclass(frozen=True)
class EnduranceConfig(Bench):
    """Sections: greedy, lossless-0.7."""

    tokens: int = option(200_000, "tokens to decode in each section")
    prompt_tokens: int = option(64, "tokens of a prompt")
    new_tokens: int = option(128, "tokens decoded after each prompt")
    nodes: int = option(8, "nodes of the calibrated tree")
    checks: int = option(3, "texts of each tenth that are decoded plainly too")
    pairs: int = option(40, "texts of each tenth that a young process decodes too")

    def __post_init__(self):
        check_sizes(self, ["tokens", "prompt_tokens", "new_tokens", "nodes", "checks", "pairs"])


class Decoder:
    """The model, the heads, the tree and the prompts of a section, as one process has them."""

    def __init__(self, config: EnduranceConfig, temperature: float):
        tokenizer, self.model, self.heads = load(config)
        n = math.ceil(config.tokens / TENTHS / config.new_tokens)
        self.prompts = held_out_prompts(tokenizer, n, config.prompt_tokens)
        self.tree = calibrated_tree(read_calibration(config.heads, temperature)[0], config.nodes)
        self.sampling, self.new_tokens = Sampling(temperature), config.new_tokens
        self.timed(0)  # the first text of a process pays for what is set up once

    def text(self, number: int, tree: Tree) -> list[int]:
        asked = self.prompts[number], self.new_tokens, self.sampling, number
        text = []
        for step in decode(self.model, self.heads, tree, *asked):
            text += step.emitted
        return text

    def timed(self, number: int) -> tuple[list[int], float]:
        """Text `number` by Medusa decoding, and its seconds."""
        start = time.perf_counter()
        text = self.text(number, self.tree)
        return text, time.perf_counter() - start


def be_young(*arguments) -> None:
    global young
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the old one ends this one
    young = Decoder(*arguments)


def young_seconds(number: int) -> float:
    return young.timed(number)[1]


def endure(config: EnduranceConfig, temperature: float) -> dict:
    old = Decoder(config, temperature)
    every, tenths = range(len(old.prompts)), []
    paired = every[:: math.ceil(len(every) / config.pairs)]
    context, start = get_context("spawn"), (config, temperature)
    for tenth in tqdm(range(TENTHS), f"temperature {temperature}"):
        texts, seconds, shares = [], [], []
        with ProcessPoolExecutor(1, context, be_young, start) as process:
            process.submit(young_seconds, 0).result()  # until it is there
            for number in every:
                text, took = old.timed(number)
                texts.append(text)
                seconds.append(took)
                if number in paired:
                    shares.append(process.submit(young_seconds, number).result() / took)
        chosen = random.Random(tenth).sample(every, min(config.checks, len(every)))
        same = [texts[number] == old.text(number, ROOT_ONLY) for number in chosen]
        tokens = sum(map(len, texts))
        row = {"tokens": tokens, "tokens/s": tokens / sum(seconds)}
        row |= {"share of a young process": statistics.median(shares), "peak MB": peak()}
        tenths.append(row | {"checked": len(chosen), "the plain text": same.count(True)})
    return {"tenths": tenths}


def table(results: dict) -> str:
    header = ["tenth", "tokens", "tokens/s", "speed over a young process's", "peak memory, MB"]
    header.append("the plain text")
    parts = []
    for section, result in results.items():
        rows = []
        for i, row in enumerate(result["tenths"], start=1):
            share, same = f"{row['share of a young process']:.3f}", row["the plain text"]
            cells = [i, row["tokens"], f"{row['tokens/s']:.0f}", share, f"{row['peak MB']:.1f}"]
            rows.append([*cells, f"{same} of {row['checked']}"])
        first, last = result["tenths"][0], result["tenths"][-1]
        names = "tokens/s", "share of a young process", "peak MB"
        speed, share, memory = (last[name] / first[name] - 1 for name in names)
        grown = f"tokens/s {speed:+.1%}, against a young process {share:+.1%}, "
        grown += f"peak memory {memory:+.2%}"
        shown = f"**{section}**\n\n{markdown(header, rows)}"
        parts.append(f"{shown}\n\nFrom the first tenth to the last: {grown}.")
    return "\n\n".join(parts)


def main(config: EnduranceConfig) -> None:
    sections = {
        "greedy": partial(endure, config, 0.0),
        "lossless-0.7": partial(endure, config, 0.7),
    }
    measure("endurance", config, sections, table)
