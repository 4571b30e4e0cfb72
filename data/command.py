"""What all scripts share: flags made from a config dataclass, errors in one line, the device."""

import argparse
import importlib
import os
import sys
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import torch


def option(default, help: str, **more) -> Any:
    """A field of a config dataclass that becomes a flag of the command line."""
    metadata = {"help": help} | more
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, exit code 2; flags are spelled out."""

    def __init__(self, description: str | None = None, **more):
        first_line = (description or "").partition("\n")[0]
        super().__init__(description=first_line, allow_abbrev=False, **more)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    for f in fields(config):
        default, more = getattr(config(), f.name), dict(f.metadata)
        shown = "" if default in ("", []) else f" (default: {default})"
        more["help"] = (more["help"] + shown).replace("%", "%%")
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            more["nargs"] = "+"
        else:
            more["type"] = type(default)
        parser.add_argument("--" + f.name.replace("_", "-"), default=default, **more)


def parsed(config: type, **more) -> Any:
    """The config that the command line asks for."""
    parser = OneLineParser(**more)
    add_options(parser, config)
    given = vars(parser.parse_args())
    return config(**{f.name: given[f.name] for f in fields(config)})


def run(main) -> None:
    """Call main; an error that the user can mend ends in one line and exit code 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if "out of memory" in message or "can't allocate memory" in message:
            message = "out of memory: ask for a smaller --batch, --context, --rows or --tree"
        elif isinstance(error, RuntimeError):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def optional(package: str, user, file="data/requirements.txt"):
    """The package, or a ValueError that says who needs it and what to install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{user} needs the package {package}: pip install -r {file}") from None


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or mps; of several processes, each takes a GPU of its own."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cuda" and torch.distributed.is_initialized():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:  # a generator, too: some devices hold tensors, but have no random numbers
        return torch.Generator(torch.zeros(1, device=name).device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None


def check_out(directory: str, flag="--out") -> None:
    """Raises ValueError if the directory cannot be written: before the work, not after it."""
    nearest = next(path for path in Path(directory, "_").absolute().parents if path.exists())
    if not directory or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{flag} {directory or 'is empty'}: name a directory that can be written")
