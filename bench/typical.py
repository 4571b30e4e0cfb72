"""What typical acceptance costs in truth: tokens/step against the distance from the base distribution, over epsilon.

Given the text so far, a step of typical acceptance leaves nothing to chance but its last token: whether a guess passes is decided by
the base's probabilities. So where a guess was accepted, the emitted token's distribution is a point mass on it, and where the step
ends it is the base distribution itself. Both distances follow exactly at every position that decoding visits:

    point mass on x:  KL(emitted || base) = -ln base_probs(x),  total variation = 1 - base_probs(x);  a draw: 0 and 0
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from bench.results import Decoding, held_out_prompts, load, markdown, measure
from data.calibration import read_calibration
from data.command import option
from medusa import MedusaHeads, Sampling, logits_to_probs, medusa_generate
from model import GPT
from tree import Tree, calibrated_tree

EPSILONS = (0.01, 0.03, 0.09, 0.2, 0.4, 1.0)
TEMPERATURES = (0.7, 1.0)


@dataclass(frozen=True)
class TypicalConfig(Decoding):
    """Sections: temperature-0.7, temperature-1.0. All points of a section have one tree."""

    prompts: int = option(20, "held-out prompts")
    new_tokens: int = option(128, "tokens decoded behind each")
    nodes: int = option(16, "nodes of the calibrated tree")


@torch.inference_mode()
def distances(
    model: GPT, prompt: list[int], steps: list[list[int]], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """KL(emitted || base) in nats and total variation at every emitted token: (n,) each, of the steps of a text that no EOS ended."""
    text = [token for emitted in steps for token in emitted]
    guessed = torch.tensor(
        [place < len(emitted) - 1 for emitted in steps for place in range(len(emitted))]
    )  # (n,)
    hidden = model(torch.tensor([prompt + text[:-1]]))[0, len(prompt) - 1 :]  # (n, D)
    base_probs = logits_to_probs(model.lm_head(hidden), sampling)  # (n, V)
    of_token = base_probs.gather(1, torch.tensor(text)[:, None])[:, 0]  # (n,)
    if (
        not sampling.typical
    ):  # lossless: each token is drawn from the base distribution, whether it was guessed or not
        return torch.zeros_like(of_token), torch.zeros_like(of_token)
    return torch.where(guessed, -of_token.log(), 0.0), torch.where(guessed, 1 - of_token, 0.0)


def point(
    model: GPT,
    heads: MedusaHeads,
    tree: Tree,
    prompts: list[list[int]],
    new_tokens: int,
    sampling: Sampling,
) -> dict:
    """Decode all prompts; a step's first list is the prompt's own and counts as no step."""
    kls, variations, earned, steps = [], [], 0, 0
    for seed, prompt in enumerate(prompts):
        emitted = list(
            medusa_generate(
                model,
                heads,
                tree,
                prompt,
                new_tokens,
                sampling,
                torch.Generator().manual_seed(seed),
            )
        )
        kl, variation = distances(model, prompt, emitted, sampling)
        kls, variations = [*kls, *kl.tolist()], [*variations, *variation.tolist()]
        earned, steps = earned + sum(map(len, emitted[1:])), steps + len(emitted) - 1
    return {
        "tokens/step": earned / max(steps, 1),
        "KL": statistics.mean(kls),
        "total variation": statistics.mean(variations),
        "positions": len(kls),
    }


def measure_temperature(config: TypicalConfig, temperature: float) -> dict:
    tokenizer, model, heads = load(config)
    prompts = held_out_prompts(tokenizer, config.prompts, config.prompt_tokens)
    tree = calibrated_tree(read_calibration(config.heads, temperature)[0], config.nodes)
    samplings = {"lossless": Sampling(temperature)} | {
        str(e): Sampling(temperature, typical=True, epsilon=e) for e in EPSILONS
    }
    bar = tqdm(samplings.items(), desc=f"temperature {temperature}", unit="point")
    return {
        "points": {
            name: point(model, heads, tree, prompts, config.new_tokens, sampling)
            for name, sampling in bar
        },
        "nodes": len(tree),
    }


def table(results: dict) -> str:
    parts = []
    for section, result in results.items():
        rows = [
            [
                name,
                f"{row['tokens/step']:.2f}",
                f"{row['KL']:.3f}",
                f"{row['total variation']:.3f}",
                row["positions"],
            ]
            for name, row in result["points"].items()
        ]
        header = [
            "epsilon (delta = sqrt epsilon)",
            "tokens/step",
            "KL to the base, nats a token",
            "total variation, mean",
            "positions",
        ]
        parts.append(
            f"**{section}**, a calibrated tree of {result['nodes']} nodes\n\n"
            + markdown(header, rows)
        )
    return "\n\n".join(parts)


def draw(results: dict, pyplot):
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, distance in zip(axes, ("KL", "total variation")):
        for section, result in results.items():
            points = result["points"]
            axis.plot(
                [row[distance] for row in points.values()],
                [row["tokens/step"] for row in points.values()],
                "o",
                label=section,
            )
            for name, row in points.items():
                axis.annotate(
                    name,
                    (row[distance], row["tokens/step"]),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=8,
                )
        axis.set_xlabel(f"{distance} of the emitted token to the base distribution")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens/step")
    axes[0].legend(loc="lower right")
    return figure


def main(config: TypicalConfig) -> None:
    measure(
        "typical",
        config,
        {f"temperature-{t}": partial(measure_temperature, config, t) for t in TEMPERATURES},
        table,
        draw,
    )
