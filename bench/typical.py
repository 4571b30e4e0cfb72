"""What typical acceptance costs: tokens/step against the distance from the base distribution.

Given the text so far, a step of typical acceptance samples its last token alone: whether a guess
passes is decided by the base's probabilities. So where a guess was accepted, the distribution of
the emitted token is a point mass, and where the step ends it is the base distribution. Both
distances follow exactly at every position:

    a point mass on x:  KL(emitted || base) = -ln base_probs(x), total variation = 1 - base_probs(x)
    a sample:           0 and 0
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from bench.results import Decoding, held_out_prompts, load, markdown, measure
from data.command import option
from medusa import MedusaHeads, Sampling, Step, logits_to_probs
from model import GPT
from sample import decode, read_calibration
from tree import Tree, calibrated_tree

EPSILONS = (0.01, 0.03, 0.09, 0.2, 0.4, 1.0)
TEMPERATURES = (0.7, 1.0)


@dataclass(frozen=True)
class TypicalConfig(Decoding):
    """Sections: temperature-0.7, temperature-1.0. All points of a section have one tree."""

    prompts: int = option(20, "held-out prompts")
    new_tokens: int = option(128, "tokens decoded after each")
    nodes: int = option(16, "nodes of the calibrated tree")


@torch.inference_mode()
def distances(
    model: GPT, prompt: list[int], steps: list[Step], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """KL(emitted || base) in nats and total variation at every token of a text, (n,) each."""
    text, guessed = [], []
    for step in steps:
        text += step.emitted
        # Of a step that reaches the end of the text, the last tokens of its path are cut off.
        guessed += ([True] * (len(step.path) - 1) + [False])[: len(step.emitted)]
    hidden = model(torch.tensor([prompt + text[:-1]]))[0, len(prompt) - 1 :]  # (n, D)
    base_probs = logits_to_probs(model.lm_head(hidden), sampling)  # (n, V)
    of_token = base_probs.gather(1, torch.tensor(text)[:, None])[:, 0]  # (n,)
    # Lossless: each token is a sample of the base distribution, whether it was guessed or not.
    point_mass = torch.tensor(guessed) & torch.tensor(sampling.typical)
    return torch.where(point_mass, -of_token.log(), 0.0), torch.where(point_mass, 1 - of_token, 0.0)


def point(
    model: GPT, heads: MedusaHeads, tree: Tree, prompts, new_tokens: int, sampling: Sampling
) -> dict:
    """Decode all prompts; a text's first step is the prompt's own and counts as no step."""
    kls, variations, tokens, steps = [], [], 0, 0
    for seed, prompt in enumerate(prompts):
        text = list(decode(model, heads, tree, prompt, new_tokens, sampling, seed))
        kl, variation = distances(model, prompt, text, sampling)
        kls += kl.tolist()
        variations += variation.tolist()
        tokens += sum(len(step.emitted) for step in text[1:])
        steps += len(text) - 1
    found = {"tokens/step": tokens / max(steps, 1), "KL": statistics.mean(kls)}
    return found | {"total variation": statistics.mean(variations), "positions": len(kls)}


def measure_temperature(config: TypicalConfig, temperature: float) -> dict:
    tokenizer, model, heads = load(config)
    prompts = held_out_prompts(tokenizer, config.prompts, config.prompt_tokens)
    tree = calibrated_tree(read_calibration(config.heads, temperature)[0], config.nodes)
    samplings = {"lossless": Sampling(temperature)}
    for epsilon in EPSILONS:
        samplings[str(epsilon)] = Sampling(temperature, typical=True, epsilon=epsilon)
    points = {}
    for name, sampling in tqdm(samplings.items(), f"temperature {temperature}"):
        points[name] = point(model, heads, tree, prompts, config.new_tokens, sampling)
    return {"points": points, "nodes": len(tree)}


def table(results: dict) -> str:
    header = ["epsilon (delta = sqrt epsilon)", "tokens/step", "KL to the base, nats a token"]
    header += ["total variation, mean", "positions"]
    parts = []
    for section, result in results.items():
        rows = []
        for name, row in result["points"].items():
            numbers = [f"{row['KL']:.3f}", f"{row['total variation']:.3f}", row["positions"]]
            rows.append([name, f"{row['tokens/step']:.2f}", *numbers])
        about = f"**{section}**, a calibrated tree of {result['nodes']} nodes"
        parts.append(f"{about}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def main(config: TypicalConfig) -> None:
    sections = {f"temperature-{t}": partial(measure_temperature, config, t) for t in TEMPERATURES}
    measure("typical", config, sections, table)
