"""The speed-up of a tree of N nodes, without decoding anything:

    speed-up(N) = expected tokens/step of the best tree of N nodes  x  time of a plain step / c(N)

The tokens come from calibration.json; c(N) was measured ("here"), or follows from bandwidth and
FLOP rate ("device"; see roofline.py). "here" is compared with what `decode` measured; with
--device, "device" with steps of a model of that shape with random weights.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.decode import RULES, SIZES
from bench.results import Bench, markdown, measure, read_results
from bench.roofline import Device, plain_seconds, tree_seconds
from data.command import option, pick_device
from medusa import MedusaConfig, MedusaHeads, Sampling
from model import GPT, ModelConfig, check_sizes, read_config, read_json, rotary_table
from sample import read_calibration, step_costs
from train import TEMPERATURES
from tree import calibrated_tree, choose_size, expected_tokens

# Llama 2's shape.
SEVEN_B = ModelConfig(32000, 4096, 11008, 32, 32, 32, 4096, tie_word_embeddings=False)
SHOWN = (2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}  # by bytes
TIMED_TOKENS = 40  # that step_costs decodes at most
NAMES = ("tokens/step", "step cost", "speed-up")


@dataclass(frozen=True)
class PredictConfig(Bench):
    """Sections: here (from what cost and decode measured), device (any other)."""

    cost: str = option("bench/results/cost.json", "what bench.py cost measured here")
    decode: str = option("bench/results/decode.json", "what bench.py decode measured here")
    bandwidth: float = option(3.35, "TB/s of the device's memory; the default is an H100's")
    flops: float = option(990.0, "TFLOP/s of its matmuls; the default is an H100's in bfloat16")
    width: int = option(2, "bytes of a weight")
    context: int = option(512, "tokens in the cache")
    model: str = option("", "directory of a Llama config.json; default: the shape of Llama 2 7B")
    device: str = option("", "cpu, cuda or mps: time such a model there, with random weights")

    def __post_init__(self):
        check_sizes(self, ["width", "context"])
        if not (self.bandwidth > 0 and self.flops > 0):
            raise ValueError("--bandwidth and --flops must be above 0")
        if self.device != "" and self.width not in WIDTHS:
            widths = ", ".join(map(str, WIDTHS))
            raise ValueError(f"--width {self.width}: with --device it must be one of {widths}")


def predictions(counts: Counter, plain: float, cost: dict[int, float]) -> dict[int, dict]:
    """For each N whose cost is known: tokens/step, step cost, and their quotient, the speed-up."""
    found = {}
    for size, seconds in cost.items():
        tokens, step_cost = expected_tokens(calibrated_tree(counts, size), counts), seconds / plain
        found[size] = dict(zip(NAMES, (tokens, step_cost, tokens / step_cost)))
    return found


def best_size(predicted: dict[int, dict[str, float]]) -> int:
    costs = {n: row["step cost"] for n, row in predicted.items()}
    return choose_size(lambda n: predicted[n]["tokens/step"], costs)


# ---- this machine ----


def compare(predicted: dict[int, dict], ways: dict[str, dict]) -> dict[str, dict]:
    """Prediction and measurement of each calibrated tree, and the error as a share of that."""
    rows = {}
    for size, row in predicted.items():
        way = ways[f"calibrated-{size}"]
        measured = dict(zip(NAMES, (way["tokens/step"], way["step cost"], way["ratio"])))
        error = {name: row[name] / measured[name] - 1 for name in NAMES}
        rows[str(size)] = {"predicted": row, "measured": measured, "error": error}
    return rows


def compare_rule(config: PredictConfig, rule: str, steps: dict, decoded: dict) -> dict:
    """steps: {context: {N: a step}} of cost.json, of which the nearest context counts; decoded:
    this rule's section of decode.json."""
    context = min(steps, key=lambda measured: abs(int(measured) - decoded["context"]))
    costs = {int(n): row["step cost"] for n, row in steps[context].items()}
    counts, _ = read_calibration(config.heads, RULES[rule].temperature)
    sizes = [n for n in SIZES if f"calibrated-{n}" in decoded["ways"]]
    predicted = predictions(counts, costs[1], {n: costs[n] for n in sizes})
    rows = compare(predicted, decoded["ways"])
    speed_ups = {n: row["measured"]["speed-up"] for n, row in rows.items()}
    chosen, best = str(best_size(predicted)), max(rows, key=speed_ups.__getitem__)
    found = {"sizes": rows, "context": context, "best predicted": chosen, "best measured": best}
    return found | {"lost by the choice": 1 - speed_ups[chosen] / speed_ups[best]}


def predict_here(config: PredictConfig) -> dict:
    of_cost, of_decode = (read_results(getattr(config, name), name) for name in ("cost", "decode"))
    here, there = (content.get("machine") for content in (of_cost, of_decode))
    files, rules = f"{config.cost} and {config.decode}", {}
    if here != there:
        raise ValueError(f"{files} are of {here}, and of {there}: measure both on one machine")
    costs, decoded = of_cost["results"], of_decode["results"]
    try:
        for rule in RULES:
            ways = decoded.get(rule, {"ways": ()})["ways"]
            calibrated = any(way.startswith("calibrated") for way in ways)
            if rule in costs and calibrated:
                rules[rule] = compare_rule(config, rule, costs[rule]["steps"], decoded[rule])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{files} are not as bench.py writes them: {error!r}") from None
    if len(rules) == 0:
        raise ValueError(f"{files} have no rule in common: measure greedy, with calibrated trees")
    return {"rules": rules}


# ---- any other ----


@torch.inference_mode()
def measured_seconds(
    config: PredictConfig, shape: ModelConfig, heads_shape: MedusaConfig
) -> dict[str, float]:
    """{N: seconds of a step}, N = 1 being plain decoding; what it costs depends on shapes alone."""
    counts, _ = read_calibration(config.heads, 0.0)
    device, dtype = pick_device(config.device), WIDTHS[config.width]
    with torch.device("meta"):  # there may be no memory for a large model in float32
        parts = GPT(shape), MedusaHeads(heads_shape)
    model, heads = (part.to(dtype).to_empty(device=device).eval() for part in parts)
    for weights in (*model.parameters(), *heads.parameters()):
        weights.normal_(std=0.02)
    if shape.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    if heads.token_map is not None:
        torch.arange(len(heads.token_map), out=heads.token_map)
    model.rotary = rotary_table(shape).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(shape.vocab_size, (config.context,), generator=generator).tolist()
    trees = [calibrated_tree(counts, n) for n in SHOWN if n <= len(counts)]
    costs = step_costs(model, heads, trees, prompt, Sampling())
    return {str(n): seconds for n, seconds in costs.items()}


def predict_device(config: PredictConfig) -> dict:
    """The heads have the shape of --heads, at the model's width, and are as often right."""
    model = read_config(Path(config.model) / "config.json") if config.model else SEVEN_B
    room = model.max_position_embeddings - TIMED_TOKENS
    if config.device != "" and config.context > room:
        raise ValueError(f"--context {config.context}: with --device at most {room} for this model")
    raw = read_json(Path(config.heads) / "config.json")
    truncated = raw.get("truncated_vocab_size", 0) % raw["vocab_size"]  # 0: all
    sizes = raw["num_heads"], raw["num_hidden_layers"], raw["original_lm_head"]
    guessed = min(truncated, model.vocab_size)
    heads = MedusaConfig(model.hidden_size, model.vocab_size, *sizes, guessed)

    device = Device(config.bandwidth * 1e12, config.flops * 1e12)
    at = config.context, config.width
    plain, temperatures = plain_seconds(device, model, *at), {}
    for temperature in TEMPERATURES:
        counts, _ = read_calibration(config.heads, temperature)
        cost = {n: tree_seconds(device, model, heads, n, *at) for n in range(2, len(counts) + 1)}
        predicted = predictions(counts, plain, cost)
        best = best_size(predicted)
        shown = {str(n): predicted[n] for n in sorted({*SHOWN, best} & predicted.keys())}
        found = {"sizes": shown, "best": best, "as far as the table goes": best == max(predicted)}
        temperatures[str(temperature)] = found
    about = f"{config.model or 'a 7B model'}, {config.width} bytes a weight, "
    about += f"context {config.context}, {config.bandwidth} TB/s, {config.flops:g} TFLOP/s"
    measured = {} if config.device == "" else measured_seconds(config, model, heads)
    result = {"about": about, "plain tokens/s": 1 / plain, "temperatures": temperatures}
    return result | {"measured": measured}


# ---- what is shown ----


def here_table(result: dict) -> str:
    parts = []
    for rule, found in result["rules"].items():
        rows = []
        for size, row in found["sizes"].items():
            cells = []
            for name in NAMES:
                predicted, measured = row["predicted"][name], row["measured"][name]
                cells.append(f"{predicted:.2f} / {measured:.2f} ({row['error'][name]:+.0%})")
            rows.append([size, *cells])
        best = f"Best size by prediction {found['best predicted']}, by measurement "
        best += f"{found['best measured']}: the choice loses {found['lost by the choice']:.1%}."
        title = f"predicted / measured (error), c(N) at context {found['context']}"
        parts.append(f"**here, {rule}**: {title}\n\n{markdown(['N', *NAMES], rows)}\n\n{best}")
    return "\n\n".join(parts)


def measured_table(measured: dict[str, float], plain: float) -> str:
    """plain: seconds of a plain step by prediction."""
    rows = []
    for n, seconds in measured.items():
        cost = "" if n == "1" else f"{seconds / measured['1']:.3f}"
        rows.append([n, f"{1e3 * seconds:.2f}", cost, f"{seconds / plain:.2f}" if n == "1" else ""])
    header = ["N", "ms a step", "step cost", "over the least"]
    return f"Measured, random weights; N = 1 is plain decoding\n\n{markdown(header, rows)}"


def device_table(result: dict) -> str:
    rows = []
    for t, found in result["temperatures"].items():
        for size, row in found["sizes"].items():
            best = "best" if int(size) == found["best"] else ""
            cost, speed_up = f"{row['step cost']:.3f}", f"{row['speed-up']:.2f}x"
            rows.append([t, size, f"{row['tokens/step']:.2f}", cost, speed_up, best])
    title = f"**device, a prediction and not a measurement**: {result['about']}"
    about = f"Plain decoding: at most {result['plain tokens/s']:.0f} tokens/s. Launches of kernels "
    about += "and the host are left out. Acceptance is that of the heads measured here. A best N "
    about += "at the end of the table means that more nodes would cost nothing yet."
    parts = [title, markdown(["temperature", "N", *NAMES, ""], rows), about]
    if len(result["measured"]) > 0:
        parts.append(measured_table(result["measured"], 1 / result["plain tokens/s"]))
    return "\n\n".join(parts)


def table(results: dict) -> str:
    shown = {"here": here_table, "device": device_table}
    return "\n\n".join(shown[section](result) for section, result in results.items())


def main(config: PredictConfig) -> None:
    sections = {"here": partial(predict_here, config), "device": partial(predict_device, config)}
    measure("predict", config, sections, table, again=True)
