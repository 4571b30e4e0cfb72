"""How fast each mode trains, and in how much memory: train.py's own loop, stopped after some steps.

Each mode runs in a process of its own, which tells its peak of memory.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

import train
from bench.results import Bench, markdown, measure
from data.command import option
from data.corpus import documents, packed, seeded, windows
from data.tokenizer import Tokenizer, load_base
from medusa import Sampling
from model import check_sizes

ROOT = Path(__file__).resolve().parent.parent
# Settings besides train.py's own. Of medusa2 stage 2 is timed; stage 1 is medusa1.
MODES = {"base": {}, "distill": {}, "medusa1": {}, "medusa2": {"heads_steps": 0}}
MODES["medusa2-lora"] = {"heads_steps": 0, "lora": True}


@dataclass(frozen=True)
class TrainingConfig(Bench):
    """Sections: base, distill, medusa1, medusa2, medusa2-lora, with train.py's own settings."""

    steps: int = option(8, "steps to time, after two that are not")
    rows: int = option(256, "rows that distill samples together")

    def __post_init__(self):
        check_sizes(self, ["steps", "rows"])


# ---- in the process of its own ----


class Enough(Exception):
    """The steps are timed."""


def peak() -> float:
    """Megabytes that this process has held at most."""
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def time_loop(mode: str, base: str, steps: int) -> dict:
    """Seconds between the batch of one step and that of the next."""
    found, stamps, train_loop = {}, [], train.train_loop
    config_class, train_mode = train.MODES[mode.partition("-")[0]]
    more = {"device": "cpu", "steps": steps + 3, "warmup": 1} | MODES[mode]
    if mode != "base":
        more["base"] = base

    def briefly(run, stage, batch_of, loss_of, lr_factors):
        found["MB before the first step"] = peak()

        def stamped(step: int):
            stamps.append(time.perf_counter())
            if len(stamps) == steps + 3:
                raise Enough
            batch = batch_of(step)
            found["tokens in a step"] = batch.tokens.numel()
            return batch

        train_loop(run, stage, stamped, loss_of, lr_factors)

    # To train a tokenizer is no step.
    ready = patch.object(train, "train_tokenizer", lambda *_: Tokenizer.load(base))
    brief = patch.object(train, "train_loop", briefly)
    try:
        with tempfile.TemporaryDirectory() as out, ready, brief:
            train_mode(config_class(**more, out=f"{out}/{mode}"))
    except Enough:
        seconds = statistics.median(b - a for a, b in zip(stamps[2:], stamps[3:]))
    return found | {"seconds of a step": seconds, "tokens/s": found["tokens in a step"] / seconds}


def time_distill(base: str, rows: int) -> dict:
    """Rows are sampled together; a row that has ended counts no more."""
    (tokenizer, model), settings = load_base(base), train.DistillConfig()
    text = packed(documents(False), tokenizer)
    prompts = windows(text, rows, settings.prompt_tokens, seeded(0)).tolist()
    length, sampling = settings.prompt_tokens + settings.new_tokens, Sampling(settings.temperature)
    generator = torch.Generator().manual_seed(0)
    before, start = peak(), time.perf_counter()
    _, loss_mask = train.sample_rows(model, prompts, length, sampling, generator)
    seconds, sampled = time.perf_counter() - start, loss_mask.sum().item()
    found = {"MB before the first step": before, "tokens/s": sampled / seconds}
    found["tokens in a step"] = sampled / settings.new_tokens
    return found | {"seconds of a step": seconds / settings.new_tokens}


# ---- and around it ----


def measure_mode(config: TrainingConfig, mode: str) -> dict:
    n = config.rows if mode == "distill" else config.steps
    base = str(Path(config.base).resolve())
    command = [sys.executable, "-m", "bench.training", mode, base, str(n)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{mode} failed: {' '.join(done.stderr.split())[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict) -> str:
    header = ["mode", "tokens in a step", "ms a step", "tokens/s", "peak memory, MB"]
    header.append("of it before the first step")
    rows = []
    for mode, row in results.items():
        numbers = [row["tokens in a step"], 1e3 * row["seconds of a step"], row["tokens/s"]]
        numbers += [row["peak MB"], row["MB before the first step"]]
        rows.append([mode, *(f"{number:.0f}" for number in numbers)])
    return markdown(header, rows)


def main(config: TrainingConfig) -> None:
    sections = {mode: partial(measure_mode, config, mode) for mode in MODES}
    measure("train", config, sections, table)


if __name__ == "__main__":
    mode, base, n = sys.argv[1:]
    result = time_distill(base, int(n)) if mode == "distill" else time_loop(mode, base, int(n))
    print(json.dumps(result | {"peak MB": peak()}))
