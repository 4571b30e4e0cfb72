"""Draw the log of a training run: losses, the heads' accuracy, learning rates. Needs bench/requirements.txt."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """An exponential average, without the bias of its start."""
    mean, out = 0.0, []
    for n, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**n))
    return out


def draw_log(log: Path) -> Path:
    """log.jsonl -> log.png beside it."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [record["step"] for record in records]
    figure, (losses, accuracy, rates) = plt.subplots(3, 1, figsize=(8, 10), sharex=True)
    if any(record["base"] for record in records):
        losses.plot(
            steps, smooth([record["base"] for record in records]), label="base", color="black"
        )
    for k in range(len(records[0]["heads"])):
        losses.plot(
            steps, smooth([record["heads"][k] for record in records]), label=f"head {k + 1}"
        )
        accuracy.plot(
            steps, smooth([record["top1"][k] for record in records]), label=f"head {k + 1}"
        )
    for part in records[0]["lr"]:
        rates.plot(steps, [record["lr"][part] for record in records], label=part)
    for axes, name in (
        (losses, "loss in nats"),
        (accuracy, "first guess right, on training rows"),
        (rates, "learning rate"),
    ):
        axes.set_ylabel(name)
        axes.legend()
        axes.grid(alpha=0.3)
    rates.set_xlabel("step")
    figure.tight_layout()
    path = log.with_suffix(".png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
