"""The machine that a run meets: devices and dtypes, one process or several, directories that can be written."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model import read_json


def pick_device(name: str) -> torch.device:
    if name in ("auto", "cuda") and torch.cuda.is_available() and dist.is_initialized():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        return torch.Generator(
            torch.zeros(1, device=name).device
        ).device  # some devices hold tensors but draw nothing
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"--device {name} cannot be used here: {str(error).partition(chr(10))[0]}"
        ) from None


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matmuls in training."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main_process() -> bool:
    """Of several processes, the one that writes and speaks."""
    return rank_and_world_size()[0] == 0


def print0(line: str) -> None:
    if is_main_process():
        print(line)


def sum_over_processes(tensors: list[Tensor]) -> None:
    """In place, and in one message."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, summed in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(summed.view_as(t))


def check_out(directory: str) -> None:
    """Raises ValueError if the directory cannot be written: before the work, not after it."""
    nearest = next(
        path
        for path in (Path(directory).absolute(), *Path(directory).absolute().parents)
        if path.exists()
    )
    if not directory or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {directory or 'is empty'}: name a directory that can be written")


def check_kind(directory: str, heads: bool) -> None:
    """Raises ValueError if heads would overwrite a base, or a base heads."""
    path = Path(directory) / "config.json"
    if path.exists() and (read_json(path).get("model_type") == "medusa") != heads:
        raise ValueError(
            f"--out {directory} holds {'a base' if heads else 'heads'}: name another directory"
        )
