"""How well a model predicts a packed text."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa import at_least_float32
from model import GPT

PERPLEXITY_TOKENS = 1 << 15


@torch.inference_mode()
def cross_entropy(model: GPT, tokens: Tensor) -> float:
    """Sum over a packed text (tokens,), in nats. Every token but the first is scored once, with at least half a context before it."""
    device, context = model.lm_head.weight.device, model.config.max_position_embeddings
    nats, hop = 0.0, max(context // 2, 1)
    for start in range(0, len(tokens) - 1, hop):
        window = tokens[start : start + context + 1].long().to(device)
        fresh = 0 if start == 0 else context - hop  # what the window before has scored
        if len(window) - 1 <= fresh:
            break
        logits = model.lm_head(model(window[None, :-1])[0, fresh:])
        nats += F.cross_entropy(
            at_least_float32(logits), window[1 + fresh :], reduction="sum"
        ).item()
    return nats


def bits_per_byte(model: GPT, tokens: Tensor, n_bytes: int) -> float:
    """Compression of a packed text (tokens,) that has n_bytes as UTF-8."""
    return cross_entropy(model, tokens) / math.log(2) / n_bytes


def perplexity(model: GPT, tokens: Tensor) -> float:
    """On the beginning of a packed text."""
    tokens = tokens[:PERPLEXITY_TOKENS]
    nats = cross_entropy(model, tokens) / (len(tokens) - 1)
    return math.exp(nats) if nats < 700 else math.inf  # beyond, a float has no room
