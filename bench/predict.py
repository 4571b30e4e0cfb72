"""The speed-up that a tree of N nodes promises, without decoding anything:

    speed-up(N) = expected tokens per step of the best tree of N nodes  x  time of a plain step / c(N)

The tokens come from the acceptance table (calibration.json); c(N) was measured ("here"), or follows from bandwidth and FLOP rate
("device"; see roofline.py). "here" is held against the speed-ups that `decode` measured; with --device, "device" against steps of a
model of that shape with random weights, whose cost is that of trained ones.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.decode import RULES, SIZES
from bench.results import Bench, markdown, measure, read_results
from bench.roofline import Device, plain_seconds, tree_seconds
from data.calibration import CALIBRATION_TEMPERATURES, read_calibration
from data.command import option
from data.compiled import Compiled
from data.machine import pick_device
from medusa import MedusaConfig, MedusaHeads, Sampling
from model import GPT, ModelConfig, check_sizes, read_config, read_json, rotary_table
from sample import step_costs
from tree import calibrated_tree, choose_size, expected_tokens

SEVEN_B = ModelConfig(
    32000, 4096, 11008, 32, 32, 32, 4096, tie_word_embeddings=False
)  # Llama 2's shape
SHOWN = (2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS = {
    2: torch.bfloat16,
    4: torch.float32,
    8: torch.float64,
}  # bytes of a weight that can be timed
TIMED_TOKENS = 40  # of step_costs, five steps
TIMED_COMPILED = (16, 64)  # each is compiled for itself


@dataclass(frozen=True)
class PredictConfig(Bench):
    """Sections: here (this machine, from what cost and decode measured), device (any other, by its bandwidth and FLOP rate)."""

    cost: str = option("bench/results/cost.json", "what bench.py cost measured here")
    decode: str = option("bench/results/decode.json", "what bench.py decode measured here")
    bandwidth: float = option(
        3.35, "of the device's memory, in TB/s; the default is an H100's data sheet"
    )
    flops: float = option(
        990.0, "TFLOP/s of its dense matmuls; the default is an H100's in bfloat16"
    )
    width: int = option(2, "bytes of a weight")
    context: int = option(512, "tokens in the cache")
    model: str = option(
        "", "directory of a config.json of the Llama family; default: a 7B model of Llama 2's shape"
    )
    device: str = option(
        "", "cpu, cuda or mps: time the steps of such a model there too, with random weights"
    )
    compile: bool = option(False, "with --device: time steps compiled with torch.compile as well")

    def __post_init__(self):
        check_sizes(self, ["width", "context"])
        if not self.bandwidth > 0 or not self.flops > 0:
            raise ValueError("--bandwidth and --flops must be above 0")
        if self.device and self.width not in WIDTHS:
            raise ValueError(
                f"--width {self.width}: with --device it must be one of {', '.join(map(str, WIDTHS))}"
            )


def predictions(
    counts: Counter, plain: float, cost: dict[int, float]
) -> dict[int, dict[str, float]]:
    """For each N whose cost is known: tokens/step, step cost, and their quotient, the speed-up."""
    found = {}
    for size, seconds in cost.items():
        tokens = expected_tokens(calibrated_tree(counts, size), counts)
        found[size] = {
            "tokens/step": tokens,
            "step cost": seconds / plain,
            "speed-up": tokens * plain / seconds,
        }
    return found


def best_size(predicted: dict[int, dict[str, float]]) -> int:
    """Of equals the smallest."""
    return choose_size(
        lambda n: predicted[n]["tokens/step"],
        {n: row["step cost"] for n, row in predicted.items()},
        predicted,
    )


# ---- this machine ----


def hold_against(predicted: dict[int, dict[str, float]], ways: dict[str, dict]) -> dict[str, dict]:
    """Prediction and measurement of each calibrated tree, and by how much they are apart, as a share of the measurement."""
    rows = {}
    for size, row in predicted.items():
        way = ways[f"calibrated-{size}"]
        measured = {
            "tokens/step": way["tokens/step"],
            "step cost": way["step cost"],
            "speed-up": way["ratio"],
        }
        rows[str(size)] = {
            "predicted": row,
            "measured": measured,
            "error": {name: row[name] / measured[name] - 1 for name in row},
        }
    return rows


def compare_rule(config: PredictConfig, rule: str, steps: dict, decoded: dict) -> dict:
    """steps: {context: {N: a step}} of cost.json; decoded: this rule's section of decode.json. c(N) is taken at the nearest context."""
    context = min(steps, key=lambda measured: abs(int(measured) - decoded["context"]))
    costs = {int(n): row["step cost"] for n, row in steps[context].items()}
    counts, _ = read_calibration(config.heads, RULES[rule].temperature)
    predicted = predictions(
        counts, costs[1], {n: costs[n] for n in SIZES if f"calibrated-{n}" in decoded["ways"]}
    )
    rows = hold_against(predicted, decoded["ways"])
    chosen, best = (
        str(best_size(predicted)),
        max(rows, key=lambda n: rows[n]["measured"]["speed-up"]),
    )
    lost = 1 - rows[chosen]["measured"]["speed-up"] / rows[best]["measured"]["speed-up"]
    return {
        "sizes": rows,
        "context": context,
        "best predicted": chosen,
        "best measured": best,
        "lost by the choice": lost,
    }


def predict_here(config: PredictConfig) -> dict:
    of_cost, of_decode = (read_results(getattr(config, name), name) for name in ("cost", "decode"))
    here, there = (content.get("machine") for content in (of_cost, of_decode))
    if here != there:
        raise ValueError(
            f"{config.cost} is of {here}, {config.decode} of {there}: measure both on one machine and device"
        )
    costs, decoded = of_cost["results"], of_decode["results"]
    try:
        both = [
            name
            for name in RULES
            if name in costs
            and any(way.startswith("calibrated") for way in decoded.get(name, {"ways": ()})["ways"])
        ]
        rules = {
            rule: compare_rule(config, rule, costs[rule]["steps"], decoded[rule]) for rule in both
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config.cost} or {config.decode} is not as bench.py writes it: {error!r}; measure it anew"
        ) from None
    if not rules:
        raise ValueError(
            f"{config.cost} and {config.decode} have no rule in common, with calibrated trees: measure greedy with both"
        )
    return {"rules": rules}


# ---- any other ----


@torch.inference_mode()
def measured_seconds(
    config: PredictConfig, shape: ModelConfig, heads_shape: MedusaConfig
) -> dict[str, dict[int, float]]:
    """{way: {N: seconds of a step}}, N = 1 being plain decoding; eager, and compiled if asked for. Weights are random: what a step costs depends on the shapes alone."""
    counts, _ = read_calibration(config.heads, 0.0)
    device, dtype = pick_device(config.device), WIDTHS[config.width]
    with torch.device("meta"):  # a large model has no room to stand in float32 first
        parts = GPT(shape), MedusaHeads(heads_shape)
    model, heads = (part.to(dtype).to_empty(device=device).eval() for part in parts)
    for weights in (*model.parameters(), *heads.parameters()):
        weights.normal_(std=0.02)
    if shape.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    if heads.token_map is not None:
        torch.arange(len(heads.token_map), out=heads.token_map)
    model.rotary = rotary_table(shape).to(device, dtype)
    prompt = torch.randint(
        shape.vocab_size, (config.context,), generator=torch.Generator().manual_seed(0)
    ).tolist()

    def timed(model, sizes: tuple[int, ...]) -> dict[int, float]:
        return step_costs(
            model,
            heads,
            lambda n: calibrated_tree(counts, n),
            prompt,
            Sampling(),
            [n for n in sizes if n <= len(counts)],
        )

    found = {"eager": timed(model, SHOWN)}
    if not config.compile:
        return found
    heads.compile(fullgraph=True, dynamic=False)
    return found | {"compiled": timed(Compiled(model, {1, *TIMED_COMPILED}), TIMED_COMPILED)}


def predict_device(config: PredictConfig) -> dict:
    """The heads have the shape of --heads, at the width of the model; they are taken to be right as often as those."""
    model = read_config(Path(config.model) / "config.json") if config.model else SEVEN_B
    if config.device and config.context > (room := model.max_position_embeddings - TIMED_TOKENS):
        raise ValueError(
            f"--context {config.context}: with --device at most {room}, so that {TIMED_TOKENS} tokens can be decoded behind it"
        )
    shape = read_json(Path(config.heads) / "config.json")
    guessed = shape.get("truncated_vocab_size", 0) % shape["vocab_size"]  # 0: all
    sizes = (
        shape["num_heads"],
        shape["num_hidden_layers"],
        shape["original_lm_head"],
        min(guessed, model.vocab_size),
    )
    heads = MedusaConfig(model.hidden_size, model.vocab_size, *sizes)
    device = Device(config.bandwidth * 1e12, config.flops * 1e12)
    plain = plain_seconds(device, model, config.context, config.width)
    temperatures, measured = {}, {}
    if config.device:
        measured = {
            way: {str(n): s for n, s in of_way.items()}
            for way, of_way in measured_seconds(config, model, heads).items()
        }
    for temperature in CALIBRATION_TEMPERATURES:
        counts, _ = read_calibration(config.heads, temperature)
        cost = {
            n: tree_seconds(device, model, heads, n, config.context, config.width)
            for n in range(2, len(counts) + 1)
        }
        predicted = predictions(counts, plain, cost)
        best = best_size(predicted)
        shown = {str(n): predicted[n] for n in sorted({*SHOWN, best} & predicted.keys())}
        temperatures[str(temperature)] = {
            "sizes": shown,
            "best": best,
            "as far as the table goes": best == max(predicted),
        }
    about = f"{config.model or 'a 7B model'}, {config.width} bytes a weight, context {config.context}, {config.bandwidth} TB/s, {config.flops:g} TFLOP/s"
    return {
        "about": about,
        "plain tokens/s": 1 / plain,
        "temperatures": temperatures,
        "measured": measured,
    }


# ---- what is shown ----


def here_table(result: dict) -> str:
    parts = []
    for rule, found in result["rules"].items():
        rows = []
        for size, row in found["sizes"].items():
            three = [
                f"{row['predicted'][name]:.2f} / {row['measured'][name]:.2f} ({row['error'][name]:+.0%})"
                for name in ("tokens/step", "step cost", "speed-up")
            ]
            rows.append([size, *three])
        says = f"Best size by prediction {found['best predicted']}, by measurement {found['best measured']}: the choice loses {found['lost by the choice']:.1%}."
        header = ["N", "tokens/step", "step cost", "speed-up"]
        parts.append(
            f"**here, {rule}**: predicted / measured (error), c(N) at context {found['context']}\n\n"
            + markdown(header, rows)
            + f"\n\n{says}"
        )
    return "\n\n".join(parts)


def measured_table(measured: dict, plain: float) -> str:
    """Beside the prediction, `plain` seconds a step."""
    rows = [
        [
            way,
            n,
            f"{1e3 * s:.2f}",
            "" if n == "1" else f"{s / of_way['1']:.3f}",
            f"{s / plain:.2f}" if n == "1" else "",
        ]
        for way, of_way in measured.items()
        for n, s in of_way.items()
    ]
    return "Measured there, random weights; N = 1 is plain decoding\n\n" + markdown(
        ["way", "N", "ms a step", "step cost", "over the least"], rows
    )


def device_table(result: dict) -> str:
    rows = [
        [
            t,
            size,
            f"{row['tokens/step']:.2f}",
            f"{row['step cost']:.3f}",
            f"{row['speed-up']:.2f}x",
            "best" if int(size) == found["best"] else "",
        ]
        for t, found in result["temperatures"].items()
        for size, row in found["sizes"].items()
    ]
    header = ["temperature", "N", "tokens/step", "step cost", "speed-up", ""]
    return (
        f"**device, a prediction and not a measurement**: {result['about']}\n\n" + markdown(header, rows)
        + f"\n\nPlain decoding: at most {result['plain tokens/s']:.0f} tokens/s. Both sides are taken to run at the device's limit; launches of kernels and the "
        "host are left out. Acceptance is that of the heads measured here: heads of a large model will differ. A best N at the end of the table means that more nodes would cost nothing yet."
        + (f"\n\n{measured_table(result['measured'], 1 / result['plain tokens/s'])}" if result["measured"] else "")
    )  # fmt: skip


def table(results: dict) -> str:
    shown = {"here": here_table, "device": device_table}
    return "\n\n".join(shown[section](result) for section, result in results.items())


def draw(results: dict, pyplot):
    figure, (here, device) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for rule, found in results.get("here", {"rules": {}})["rules"].items():
        sizes = [int(n) for n in found["sizes"]]
        line = here.plot(
            sizes,
            [row["predicted"]["speed-up"] for row in found["sizes"].values()],
            "--",
            label=f"{rule}, predicted",
        )[0]
        here.plot(
            sizes,
            [row["measured"]["speed-up"] for row in found["sizes"].values()],
            "o-",
            color=line.get_color(),
            label=f"{rule}, measured",
        )
    for temperature, found in results.get("device", {"temperatures": {}})["temperatures"].items():
        points = found["sizes"].items()
        device.plot(
            [int(n) for n, _ in points],
            [row["speed-up"] for _, row in points],
            "--",
            label=f"temperature {temperature}, predicted",
        )
    for axis, name in (
        (here, "this machine"),
        (device, results.get("device", {}).get("about", "another device")),
    ):
        axis.set_title(name, fontsize=8)
        axis.set(xscale="log", xlabel="N", ylabel="speed-up")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def main(config: PredictConfig) -> None:
    sections = {"here": partial(predict_here, config), "device": partial(predict_device, config)}
    measure("predict", config, sections, table, draw, again=True)
