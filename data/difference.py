"""Where two ways of decoding part, and how nearly the tokens were tied there."""

import torch

from medusa import Sampling, SharedGumbelNoise, logits_to_probs
from model import GPT


def first_difference(a: list[int], b: list[int]) -> int | None:
    """The first place at which the texts differ, None if nowhere.

    >>> first_difference([1, 2, 3], [1, 2])
    2
    """
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@torch.inference_mode()
def gap_at(
    model: GPT,
    prompt: list[int],
    ours: list[int],
    plain: list[int],
    at: int,
    sampling: Sampling,
    seed: int,
) -> float:
    """How near the two were where the texts part: the difference of the two logits, or of the logarithms of their times in the race."""
    device = model.lm_head.weight.device
    logits = model.lm_head(model(torch.tensor([prompt + plain[:at]], device=device))[0, -1])  # (V,)
    if sampling.temperature == 0:
        return abs(logits[ours[at]] - logits[plain[at]]).item()
    noise = SharedGumbelNoise(
        model.lm_head.weight, sampling, torch.Generator(device).manual_seed(seed)
    ).at((at,))[0]  # (V,)  # pyright: ignore[reportOptionalSubscript]
    scores = (logits_to_probs(logits, sampling) / noise).log()
    return abs(scores[ours[at]] - scores[plain[at]]).item()
