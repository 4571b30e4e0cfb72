"""What of a base learns in Medusa-2: its weights, or adapters of low rank beside them, merged into them in the end  ("LoRA", Hu et al., 2021)."""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from data.corpus import seeded
from model import GPT, Linear


class Adapter(nn.Module):
    """W + alpha / r * up down, of rank r; up starts at zero, so that nothing changes at first."""

    RANK, ALPHA = 32, 16

    def __init__(self, weight: Tensor, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(self.RANK, columns, generator=generator) / columns**0.5
        self.down, self.up = (
            nn.Parameter(down.to(weight)),
            nn.Parameter(weight.new_zeros(rows, self.RANK)),
        )
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


def trained_base(config, model: GPT) -> tuple[dict[str, nn.Parameter], tuple | None]:
    """The base's parameters that learn, and the teacher, unless labels are hard: the base as it is now, as a function to hidden states and its LM head."""
    soft = config.base_loss == "kl" or config.base_loss == "auto" and config.data == "distilled"
    frozen = copy.deepcopy(model) if soft and not config.lora else None
    if config.checkpoint_activations:
        for block in model.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if not config.lora:
        return dict(model.named_parameters()), frozen and (frozen, frozen.lm_head)
    adapters = add_adapters(model, config.seed)
    learning = {
        f"{name}.{part}": p
        for name, adapter in adapters.items()
        for part, p in adapter.named_parameters()
    }
    return learning, (partial(without_adapters, model, adapters), model.lm_head) if soft else None
