"""A base model whose decoding steps go through torch.compile. Dimension key: T tokens fed now, S tokens in the cache."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, KVCache


class Compiled:
    """A GPT whose steps of so many tokens as `sizes` says go through torch.compile; others, such as a prompt's, go as they always do.

    Shapes are static, so that each size is compiled once: attention runs over the whole cache, and rows that are not written yet are
    masked. On cuda a step is one CUDA graph. All else is the model's own.
    """

    ROWS = 256  # a cache is a multiple of these long, so that texts of many lengths share a compilation

    def __init__(self, model: GPT, sizes: set[int]):
        self.model, self.sizes = model, sizes
        mode = "reduce-overhead" if model.lm_head.weight.device.type == "cuda" else None
        self.trunk = torch.compile(model.trunk, fullgraph=True, dynamic=False, mode=mode)

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        cache = self.model.new_cache(-(-capacity // self.ROWS) * self.ROWS, batch)
        for part in (part for layer in cache.layers for part in layer):
            torch._dynamo.mark_static_address(
                part, guard=False
            )  # a CUDA graph writes to it where it stands
        return cache

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """As GPT.forward, for masks (T, S+T) of floats."""
        T, start = tokens.shape[1], cache.length if cache is not None else 0
        if cache is None or T not in self.sizes or start == 0 or (mask is None and T > 1):
            return self.model(tokens, positions, mask, cache)
        rows = torch.arange(start, start + T, device=tokens.device)
        seen = self.rotary.new_zeros(T, start + T) if mask is None else mask
        mask = F.pad(seen, (0, cache.capacity - start - T), value=-math.inf)  # (T, capacity)
        hidden = self.trunk(
            tokens, self.rotary[rows if positions is None else positions], mask, cache.layers, rows
        )
        cache.length = start + T
        return hidden
