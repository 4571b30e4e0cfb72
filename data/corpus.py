"""The text that everything here trains and is measured on: the standard library of the running Python, or files of one's own.

A file goes to training or validation by a hash of its path inside the library, so the split is the same on every machine and
in every version. Token arrays are cached in the user's cache directory, under a name that is a hash of all that went in.
"""

import hashlib
import os
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.shards import digest_of
from data.tokenizer import AnyTokenizer
from model import write_atomically

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
VALIDATION_SHARE = 20  # one file in so many is held out
PIECE = 8192  # characters of a text of one's own that go to one side of the split together


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/nano-medusa, by default ~/.cache/nano-medusa."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nano-medusa"


def is_validation(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % VALIDATION_SHARE == 0


def python_files(root: Path) -> dict[str, str]:
    """{path relative to root, with slashes: text} of all .py files below root that are UTF-8, tests left out."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if NOT_LIBRARY.isdisjoint(relative.parts):
            try:
                files[relative.as_posix()] = path.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a few library files are in another encoding on purpose
    return files


def library_documents(validation: bool) -> list[str]:
    """The standard library's files of one side of the split."""
    files = python_files(Path(sysconfig.get_paths()["stdlib"]))
    return [text for name, text in files.items() if is_validation(name) == validation]


def text_documents(paths: list[str], validation: bool) -> list[str]:
    """One's own files, cut at line ends into pieces of about PIECE characters, split by a hash of name and number."""
    documents = []
    for path in paths:
        try:
            lines = Path(path).read_bytes().decode("utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text {path}: cannot be read as UTF-8 text: {error}") from None
        pieces, size = [[]], 0
        for line in lines:
            if size >= PIECE:
                pieces, size = pieces + [[]], 0
            pieces[-1].append(line)
            size += len(line)
        name = Path(path).name
        documents += [
            "".join(piece)
            for i, piece in enumerate(pieces)
            if piece and is_validation(f"{name}:{i}") == validation
        ]
    return documents


def documents(validation: bool, text: list[str] | None = None) -> list[str]:
    found = text_documents(text, validation) if text else library_documents(validation)
    if not found:
        raise ValueError(
            f"the {'validation' if validation else 'training'} side of the text is empty: give more text"
        )
    return found


def pack(documents: list[str], tokenizer: AnyTokenizer) -> np.ndarray:
    """All documents, each as <s> ... </s>, in one token array (tokens,) of uint16 or uint32; made once, then cached."""
    digest = hashlib.sha256(tokenizer.model)
    for text in documents:
        digest.update(len(text).to_bytes(8, "big") + text.encode())
    path = cache_directory() / f"tokens-{digest.hexdigest()[:16]}.npy"
    with suppress(
        OSError, EOFError, ValueError
    ):  # not there, or broken: made (again) from the documents
        return np.load(path, mmap_mode="r", allow_pickle=False)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    tokens = np.concatenate(
        [
            np.array([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos], dtype)
            for text in documents
        ]
    )

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, tokens)

    write_atomically(path, write)
    return tokens


def packed(texts: list[str], tokenizer: AnyTokenizer) -> Tensor:
    return torch.from_numpy(pack(texts, tokenizer).astype("int32"))


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for every purpose and step."""
    return torch.Generator(device).manual_seed(int(digest_of(*numbers), 16) >> 1)


@cache
def shuffled(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=seeded(seed, epoch))


def windows(tokens: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """n windows (n, length) at random places of a packed text (tokens,)."""
    if len(tokens) < length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than a row of {length}: give more text or a smaller --context"
        )
    starts = torch.randint(len(tokens) - length + 1, (n, 1), generator=generator)  # (n, 1)
    return tokens[starts + torch.arange(length)].long()  # (n, length)
