"""How fast each mode trains, and in how much memory: each in a process of its own, which does what train.py does and stops behind a few steps."""

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

from bench.results import Bench, markdown, measure
from data.command import option
from model import check_sizes

ROOT = Path(__file__).resolve().parent.parent
MODES = {
    "base": {},
    "distill": {},
    "medusa1": {},
    "medusa2": {"heads_steps": 0},
    "medusa2-lora": {"heads_steps": 0, "lora": True},
}  # settings beside train.py's own; of medusa2 the second stage is timed, the first is medusa1


@dataclass(frozen=True)
class TrainingConfig(Bench):
    """Sections: base, distill, medusa1, medusa2, medusa2-lora, with train.py's own settings."""

    steps: int = option(8, "steps to time, behind two that are not")
    rows: int = option(256, "rows that distill samples together")

    def __post_init__(self):
        check_sizes(self, ["steps", "rows"])


# ---- in the process of its own ----


class Enough(Exception):
    """The steps are timed; what would come behind them is not wanted."""


def peak() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 1e3
    )


def time_fit(mode: str, base: str, steps: int) -> dict:
    """Seconds between the rows of one step and those of the next, in train.py's own loop."""
    import train
    from data.tokenizer import Tokenizer

    found, stamps, train_loop = {}, [], train.train_loop

    def fit_briefly(config, n, rows_of_step, *more):
        found["MB before the first step"] = peak()

        def stamped(step: int):
            stamps.append(time.perf_counter())
            if len(stamps) == steps + 3:
                raise Enough
            rows = rows_of_step(step)
            found["tokens in a step"] = rows[0].numel()
            return rows

        train_loop(config, n, stamped, *more)

    train.train_loop, train.train_tokenizer = (
        fit_briefly,
        lambda *_: Tokenizer.load(base),
    )  # learning the pieces anew is no step
    name = mode.partition("-")[0]
    more = (
        MODES[mode]
        | {"device": "cpu", "steps": steps + 3}
        | ({"base": base} if name != "base" else {})
    )
    try:
        with tempfile.TemporaryDirectory() as out:
            {"base": train.train_base}.get(name, train.train_medusa)(
                train.MODES[name](**more, out=f"{out}/{mode}")
            )
    except Enough:
        seconds = statistics.median(after - before for before, after in zip(stamps[2:], stamps[3:]))
    return found | {"seconds of a step": seconds, "tokens/s": found["tokens in a step"] / seconds}


def time_distill(base: str, rows: int) -> dict:
    """Rows are sampled together; a row that has ended counts no more."""
    import torch

    from data.corpus import documents, packed, seeded, windows
    from data.distilled import DistillConfig, sample_rows
    from data.tokenizer import load_base
    from medusa import Sampling

    tokenizer, model = load_base(base)
    settings = DistillConfig()
    prompts = windows(
        packed(documents(False), tokenizer), rows, settings.prompt_tokens, seeded(0)
    ).tolist()
    before, start = peak(), time.perf_counter()
    _, loss_mask = sample_rows(
        model,
        prompts,
        settings.prompt_tokens + settings.new_tokens,
        Sampling(settings.temperature),
        torch.Generator().manual_seed(0),
    )
    seconds, sampled = time.perf_counter() - start, loss_mask.sum().item()
    return {
        "MB before the first step": before,
        "tokens in a step": sampled / settings.new_tokens,
        "seconds of a step": seconds / settings.new_tokens,
        "tokens/s": sampled / seconds,
    }


# ---- and around it ----


def measure_mode(config: TrainingConfig, mode: str) -> dict:
    command = [
        sys.executable,
        "-m",
        "bench.training",
        mode,
        str(Path(config.base).resolve()),
        str(config.rows if mode == "distill" else config.steps),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{mode} failed: {' '.join(done.stderr.split())[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict) -> str:
    header = [
        "mode",
        "tokens in a step",
        "ms a step",
        "tokens/s",
        "peak memory, MB",
        "of it before the first step",
    ]
    rows = [
        [
            mode,
            f"{row['tokens in a step']:.0f}",
            f"{1e3 * row['seconds of a step']:.0f}",
            f"{row['tokens/s']:.0f}",
            f"{row['peak MB']:.0f}",
            f"{row['MB before the first step']:.0f}",
        ]
        for mode, row in results.items()
    ]
    return markdown(header, rows)


def draw(results: dict, pyplot):
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, name in ((speed, "tokens/s"), (memory, "peak MB")):
        axis.bar(list(results), [row[name] for row in results.values()])
        axis.set_ylabel(name)
        axis.tick_params(axis="x", rotation=20)
    return figure


def main(config: TrainingConfig) -> None:
    measure(
        "train", config, {mode: partial(measure_mode, config, mode) for mode in MODES}, table, draw
    )


if __name__ == "__main__":
    mode, base, n = sys.argv[1:]
    result = time_distill(base, int(n)) if mode == "distill" else time_fit(mode, base, int(n))
    print(json.dumps(result | {"peak MB": peak()}))
