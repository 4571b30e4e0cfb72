"""A command line out of a config dataclass: its fields are the flags, their defaults and help stand in one place; and what the
user can mend costs one line."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


def option(default, help: str, **more) -> Any:
    """A field of a config dataclass that becomes a flag of the command line."""
    metadata = {"help": help} | more
    return (
        field(default_factory=lambda: list(default), metadata=metadata)
        if isinstance(default, list)
        else field(default=default, metadata=metadata)
    )


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, exit code 2; flags are spelled out."""

    def __init__(self, description: str | None = None, **more):
        """description: a docstring, of which the first line is shown."""
        super().__init__(
            description=(description or "").partition("\n")[0], allow_abbrev=False, **more
        )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    for f in fields(config):
        default = getattr(config(), f.name)
        flag, more = (
            "--" + f.name.replace("_", "-"),
            {key: value for key, value in f.metadata.items() if key != "help"},
        )
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            more["nargs"] = "+"
        else:
            more["type"] = type(default)
        text = f.metadata["help"] + ("" if default in ("", []) else f" (default: {default})")
        parser.add_argument(flag, default=default, help=text.replace("%", "%%"), **more)


def run(main: Callable[[], None]) -> None:
    """Call main; what the user can mend ends in one line and exit code 2."""
    try:
        main()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:
        says = " ".join(str(error).split())
        if isinstance(error, RuntimeError):
            if "out of memory" in says or "can't allocate memory" in says:
                says = "out of memory: ask for less at once, such as a smaller --batch, --context, --rows or --tree, or a larger --accumulate"
            elif "No working C++ compiler" in says:
                says = "--compile needs a C++ compiler, such as g++: install one, or leave --compile out"
            else:
                raise
        print(f"{Path(sys.argv[0]).name}: error: {says}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@dataclass(frozen=True)
class Common:
    """Settings of every mode."""

    text: list[str] = option([], "UTF-8 files to use in place of the Python standard library")
    seed: int = option(0, "seed of all that is random")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option(
        "auto",
        "of matmuls, and of a base that does not learn: float32 or bfloat16; auto is bfloat16 on cuda",
        choices=("auto", "float32", "bfloat16"),
    )
