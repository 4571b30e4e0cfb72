"""Rows that a base model wrote, on disk: shards of tokens and of which tokens carry loss, each marked with the base and the settings that wrote it."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import read_safetensors, write_safetensors


def base_digest(directory) -> str:
    """Names a base by its configuration and weights."""
    digest = hashlib.sha256()
    for path in (
        Path(directory) / "config.json",
        *sorted(Path(directory).glob("model*.safetensors")),
    ):
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def digest_of(*parts) -> str:
    """Names a combination of tensors and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return digest.hexdigest()[:16]


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} for a file that has none, or is none."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def write_shard(path: Path, tokens: Tensor, loss_mask: Tensor, vocab_size: int, base: str) -> None:
    """tokens (R, T) and carries (R, T) bool; base: the digest of the base that wrote them, and of its settings."""
    narrow = torch.int16 if vocab_size <= 1 << 15 else torch.int32
    write_safetensors(
        path, {"tokens": tokens.to(narrow).cpu(), "loss": loss_mask.cpu()}, {"base": base}
    )


def read_shards(directory: Path, pattern: str, vocab_size: int) -> tuple[Tensor, Tensor]:
    """tokens (R, T) long and loss (R, T) bool of all shards whose name matches."""
    shards = [read_safetensors(path) for path in sorted(directory.glob(pattern))]
    if not shards:
        raise ValueError(
            f"{directory}: no {pattern} there; make it with python train.py --mode distill --out {directory}"
        )
    for shard in shards:
        tokens, loss = shard.get("tokens", torch.empty(0)), shard.get("loss", torch.empty(0))
        fits = (
            len(shard) == 2
            and tokens.dim() == 2
            and tokens.numel()
            and not tokens.is_floating_point()
            and 0 <= tokens.min()
            and tokens.max() < vocab_size
        )
        if (
            not fits
            or loss.dtype != torch.bool
            or loss.shape != tokens.shape
            or tokens.shape[1] != shards[0]["tokens"].shape[1]
        ):
            raise ValueError(
                f"{directory}: {pattern} holds no rows of this base; make them with python train.py --mode distill"
            )
    return torch.cat([shard["tokens"] for shard in shards]).long(), torch.cat(
        [shard["loss"] for shard in shards]
    )
