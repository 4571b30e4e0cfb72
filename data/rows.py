"""Rows of text that a base model wrote, as the heads are trained on, in shards on disk.

A shard is one safetensors file of equally long rows: their tokens, and which of the tokens carry
loss (a prompt and padding do not). Its metadata names the base and the settings that wrote it.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import check, read_safetensors, write_safetensors


def digest_of(*parts) -> str:
    """Names a combination of tensors and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return digest.hexdigest()[:16]


def base_digest(directory) -> str:
    """Names a base by its configuration and weights."""
    digest, folder = hashlib.sha256(), Path(directory)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for path in (folder / "config.json", *folder.glob("generation_config.json"), *weights):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} if it has none, or is none."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def write_shard(path: Path, tokens: Tensor, loss_mask: Tensor, vocab_size: int, base: str) -> None:
    """tokens (R, T), loss_mask (R, T) bool; base: digest of the base and of its settings."""
    tokens = tokens.to(torch.int16 if vocab_size <= 1 << 15 else torch.int32).cpu()
    write_safetensors(path, {"tokens": tokens, "loss": loss_mask.cpu()}, {"base": base})


def read_shards(directory: Path, pattern: str, vocab_size: int) -> tuple[Tensor, Tensor]:
    """tokens (R, T) long and loss_mask (R, T) bool of all shards whose name matches."""
    shards = [read_safetensors(path) for path in sorted(directory.glob(pattern))]
    advice = "make it with train.py --mode distill"
    check(shards != [], f"{directory} has no {pattern}: {advice}")
    for shard in shards:
        # Rows of another base have other tokens; all rows are equally long.
        tokens, loss_mask = shard.get("tokens", torch.empty(0)), shard.get("loss", torch.empty(0))
        fits = tokens.dim() == 2 and tokens.numel() > 0 and not tokens.is_floating_point()
        fits = fits and 0 <= tokens.min().item() and tokens.max().item() < vocab_size
        fits = fits and tokens.shape[1] == shards[0]["tokens"].shape[1]
        fits = fits and loss_mask.dtype == torch.bool and loss_mask.shape == tokens.shape
        check(fits, f"{directory}: {pattern} holds no rows of this base; {advice}")
    tokens = torch.cat([shard["tokens"] for shard in shards]).long()
    return tokens, torch.cat([shard["loss"] for shard in shards])
