"""The base's last hidden states of the rows that it wrote, kept as it wrote them: training heads on them costs the heads and the LM head alone.

Beside a shard train-00000.safetensors stands states-00000.safetensors: the states (n, D) before each row's last target, row after row,
in half precision, marked with what the shard is marked with and a digest of its tokens. Dimension key: B rows, T tokens, D model width.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.shards import digest_of, metadata_of, read_shards
from model import GPT, write_safetensors


def states_path(shard: Path) -> Path:
    return shard.with_name(shard.name.replace("train", "states"))


def lengths(loss_mask: Tensor) -> Tensor:
    """carries (R, T) bool: the tokens before the last target of each row, 0 without any: (R,)."""
    return (loss_mask * torch.arange(loss_mask.shape[1], device=loss_mask.device)).amax(1)


def write_states(shard: Path, states: Tensor, tokens: Tensor, loss_mask: Tensor, base: str) -> None:
    """states (R, T - 1, D); tokens (R, T), carries (R, T) bool and base as those of the shard."""
    kept = [row[:n] for row, n in zip(states, lengths(loss_mask).tolist())]
    write_safetensors(
        states_path(shard),
        {"states": torch.cat(kept).cpu()},
        {"rows": f"{base} {digest_of(tokens.cpu())}"},
    )


def prefixes(tokens: Tensor) -> Tensor:
    """A fingerprint, in 64 bits, of the first 1, 2, ... T tokens of each row: (B, T) -> (B, T)."""
    weights = torch.full(tokens.shape[1:], 6364136223846793005).cumprod(
        0
    )  # powers of an odd number, modulo 2^64
    return (tokens * weights).cumsum(1)


class KeptStates:
    """Stands for a frozen base: its rows' tokens (B, T), from the start, -> the hidden states that it had there (B, T, D), 0 where none are kept."""

    def __init__(self, model: GPT, directory: Path):
        """Raises ValueError, naming the file, if one is missing, broken or of another shard."""
        self.lm_head, known, self.places = model.lm_head, [], []
        for shard in sorted(directory.glob("train-*.safetensors")):
            tokens, loss_mask = read_shards(directory, shard.name, model.config.vocab_size)
            sizes, path = lengths(loss_mask), states_path(shard)
            try:
                states = safe_open(path, "pt").get_slice("states")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read: {error}; --mode distill --states writes what is missing"
                ) from None
            if states.get_shape() != [sizes.sum(), model.config.hidden_size] or not metadata_of(
                path
            ).get("rows", "").endswith(digest_of(tokens)):
                raise ValueError(
                    f"{path} does not belong to {shard}: remove it, and --mode distill --states writes it anew"
                )
            ends = sizes.cumsum(0)
            known.append(prefixes(tokens))
            self.places += [
                (states, *place) for place in zip((ends - sizes).tolist(), ends.tolist())
            ]
        self.prefixes = torch.cat(known).mT.contiguous()  # (T, R), R rows of all shards

    def __call__(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        same = (
            self.prefixes[T - 1] == prefixes(tokens.cpu())[:, -1:]
        )  # (B, R); rows that begin alike had the same states
        hidden = torch.zeros(B, T, self.lm_head.weight.shape[1], dtype=torch.float16)
        for row, found in zip(hidden, same):
            states, start, end = self.places[int(found.nonzero()[0])]
            kept = states[start : min(end, start + T)]
            row[: len(kept)] = kept
        return hidden.to(self.lm_head.weight)
