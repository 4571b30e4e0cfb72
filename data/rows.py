"""The rows of each step of training: a function of the step alone, so that a run can go on where it was stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.corpus import documents, packed, seeded, shuffled, windows
from data.shards import read_shards
from data.states import KeptStates, lengths
from data.tokenizer import AnyTokenizer
from model import GPT


def rows_to_train(
    config, shards: Path, tokenizer: AnyTokenizer, model: GPT
) -> tuple[Callable[[int], tuple[Tensor, Tensor]], Tensor, Any]:
    """A function from the step alone to tokens (B, T) and mask (B, T); all tokens that carry loss (n,); and what tells a frozen base's hidden states.

    That is the base itself, or its states as they are kept beside the shards.
    """
    if config.data == "corpus":
        corpus = packed(documents(False, config.text), tokenizer)

        def windows_of_step(step: int) -> tuple[Tensor, Tensor]:
            tokens = windows(corpus, config.batch, config.context, seeded(config.seed, step))
            return tokens, torch.ones_like(tokens, dtype=torch.bool)

        return windows_of_step, corpus, model
    rows, loss_mask = read_shards(shards, "train-*.safetensors", model.config.vocab_size)
    ends = lengths(loss_mask)

    def rows_of_step(step: int) -> tuple[Tensor, Tensor]:
        places = range(step * config.batch, (step + 1) * config.batch)
        chosen = torch.stack(
            [
                shuffled(len(rows), config.seed, place // len(rows))[place % len(rows)]
                for place in places
            ]
        )
        chosen = chosen[
            ends[chosen].argsort(stable=True)
        ]  # by length: of a part of the batch as little as possible is padding
        return rows[chosen], loss_mask[chosen]

    return (
        rows_of_step,
        rows[loss_mask],
        KeptStates(model, shards) if any(shards.glob("states-*.safetensors")) else model,
    )
