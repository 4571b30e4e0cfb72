"""The beginning of a training run, and what one that was stopped needs to go on, in one file, written atomically. `config` is the run's, a Fit of train.py."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from data.machine import check_out, pick_device, pick_precision, rank_and_world_size
from data.packages import optional
from data.shards import metadata_of
from model import read_safetensors, write_safetensors

NOT_RESULT = (
    "out",
    "resume",
    "plot",
    "save_every",
    "device",
)  # settings that a run may change on its way


def checkpoint_path(config) -> Path:
    return Path(config.out) / "checkpoint.safetensors"


def prepare(config) -> tuple[torch.device, torch.dtype]:
    """What can go wrong is looked at before the work: the device of the run, and the dtype of its matmuls."""
    check_out(config.out)
    processes = rank_and_world_size()[1]
    if config.batch < processes * config.accumulate:
        raise ValueError(
            f"--batch {config.batch} is less than {processes} processes x --accumulate {config.accumulate}"
        )
    path = checkpoint_path(config)
    if config.resume and not path.exists():
        raise ValueError(f"--resume: {path} does not exist; leave --resume out to start a run")
    if path.exists() and not config.resume:
        raise ValueError(
            f"{path} is of a run that was stopped, or goes on at this moment: take it up with --resume, remove it, or name another --out"
        )
    if config.plot:
        optional("matplotlib", "--plot", "bench/requirements.txt")
    device = pick_device(config.device)
    return device, pick_precision(config.precision, device)


def save_checkpoint(
    config, step: int, parts: dict, optimizer: torch.optim.Optimizer, inputs: str
) -> None:
    """All parameters and the optimiser's state, the number of finished steps, and the settings."""
    tensors = {}
    for part, parameters in parts.items():
        for name, p in parameters.items():
            tensors |= {
                f"{part}.{name}|{key}": t.detach().cpu().contiguous()
                for key, t in {"value": p, **optimizer.state[p]}.items()
            }
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_RESULT}
    about = {
        "step": str(step),
        "settings": json.dumps(settings),
        "inputs": inputs,
        "tensors": str(len(tensors)),
    }
    write_safetensors(checkpoint_path(config), tensors, about)


def resume(config, parts: dict, optimizer: torch.optim.Optimizer, inputs: str) -> int:
    """Take up the checkpoint, if --resume says so; returns the number of finished steps."""
    path = checkpoint_path(config)
    if not config.resume:
        return 0
    try:
        tensors, about = read_safetensors(path), metadata_of(path)
        settings, finished = json.loads(about["settings"]), int(about["step"])
        for name, value in settings.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"the run was started with --{name.replace('_', '-')} {value}, not {getattr(config, name)}"
                )
        if about["inputs"] != inputs:
            raise ValueError("the run was started with another base or other text")
        if len(tensors) != int(about["tensors"]):
            raise ValueError(f"{len(tensors)} tensors are there, of {about['tensors']}")
        for part, parameters in parts.items():
            for name, p in parameters.items():
                state = {
                    key.rpartition("|")[2]: t.to(p.device)
                    for key, t in tensors.items()
                    if key.startswith(f"{part}.{name}|")
                }
                p.data.copy_(state.pop("value"))
                optimizer.state[p] = state
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"--resume: cannot go on from {path}: {error}; to start anew, remove it and leave --resume out"
        ) from None
    return finished


def finish(config) -> None:
    """The run is over, its results are written: the checkpoint goes, and what a kill left half written."""
    path = checkpoint_path(config)
    for path in [path, *path.parent.glob(f".{path.name}.*")]:
        path.unlink()
    if config.plot:
        from bench.plot import draw_log

        draw_log(Path(config.out) / "log.jsonl")
