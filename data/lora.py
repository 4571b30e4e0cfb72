"""Adapters of low rank beside the linear layers of a base, merged into them in the end  ("LoRA", Hu et al., 2021)."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from data.corpus import seeded
from model import GPT, Linear


class Adapter(nn.Module):
    """W + alpha / r * up down, of rank r; up starts at zero, so that nothing changes at first."""

    RANK, ALPHA = 32, 16

    def __init__(self, weight: Tensor, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(self.RANK, columns, generator=generator) / columns**0.5
        self.down, self.up = nn.Parameter(down.to(weight)), nn.Parameter(weight.new_zeros(rows, self.RANK))
        self.on = True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.ALPHA / self.RANK * (self.up @ self.down) if self.on else weight


def add_adapters(model: GPT, seed: int) -> dict[str, Adapter]:
    """On all linear layers of the blocks, whose own weights stay frozen."""
    adapters, generator = {}, seeded(seed)
    for name, module in list(model.layers.named_modules()):
        if isinstance(module, Linear):
            adapters[name] = Adapter(module.weight, generator)
            parametrize.register_parametrization(module, "weight", adapters[name])
    return adapters


def without_adapters(model: GPT, adapters: dict[str, Adapter], tokens: Tensor) -> Tensor:
    """The hidden states of the base as it was."""
    for adapter in adapters.values():
        adapter.on = False
    try:
        return model(tokens)
    finally:
        for adapter in adapters.values():
            adapter.on = True


def merge_adapters(model: GPT) -> None:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
