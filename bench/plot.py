"""Draw the log of a training run: python bench/plot.py out/heads/log.jsonl

Losses, the heads' accuracy and learning rates, as a .png next to it. Needs matplotlib.
"""

import json
import sys
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def smooth(values: list[float], n: int = 20) -> list[float]:
    """The mean of each value and those before it, n in all."""
    return [mean(values[max(i - n, 0) : i]) for i in range(1, len(values) + 1)]


def draw_log(log: Path) -> Path:
    """log.jsonl -> log.png"""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [record["step"] for record in records]
    figure, (losses, accuracy, rates) = plt.subplots(3, 1, figsize=(8, 10), sharex=True)
    base = [record["base"] for record in records]
    if any(base):
        losses.plot(steps, smooth(base), label="base", color="black")
    for k in range(len(records[0]["heads"])):
        for axes, name in ((losses, "heads"), (accuracy, "top1")):
            axes.plot(steps, smooth([r[name][k] for r in records]), label=f"head {k + 1}")
    for part in records[0]["lr"]:
        rates.plot(steps, [record["lr"][part] for record in records], label=part)
    names = "loss in nats", "first guess right, on training rows", "learning rate"
    for axes, name in zip((losses, accuracy, rates), names):
        axes.set_ylabel(name)
        axes.legend()
        axes.grid(alpha=0.3)
    rates.set_xlabel("step")
    figure.tight_layout()
    path = log.with_suffix(".png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python bench/plot.py LOG, the log.jsonl of a training run")
    print(draw_log(Path(sys.argv[1])))
