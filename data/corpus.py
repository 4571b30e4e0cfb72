"""The text for training and measuring: Python's standard library, or text files of one's own.

A file of the library goes to training or validation by a hash of its path there, so the split is
the same on every machine and in every version. Tokens are cached in $XDG_CACHE_HOME/nano-medusa, by
default ~/.cache/nano-medusa, under a name that is a hash of all that they depend on.
"""

import hashlib
import os
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from data.rows import digest_of
from data.tokenizer import AnyTokenizer
from model import check, read_safetensors, write_safetensors

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
VALIDATION_SHARE = 20  # one document in so many is held out
PIECE = 8192  # characters of a text file that make one document


def is_validation(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % VALIDATION_SHARE == 0


def library_documents() -> dict[str, str]:
    """{path, with slashes: text} of the standard library's .py files, tests left out."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if NOT_LIBRARY.isdisjoint(relative.parts):
            # A few files are in another encoding on purpose.
            with suppress(UnicodeDecodeError, OSError):
                found[relative.as_posix()] = path.read_bytes().decode("utf-8")
    return found


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, line ends as they are; a byte-order mark is none of it."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from None


def text_documents(path: str) -> dict[str, str]:
    """{name:number: text} of a file's pieces; each ends with a line, after PIECE characters."""
    pieces = [""]
    for line in read_text(path).splitlines(keepends=True):
        if len(pieces[-1]) >= PIECE:
            pieces.append("")
        pieces[-1] += line
    return {f"{Path(path).name}:{i}": piece for i, piece in enumerate(pieces) if piece}


def documents(validation: bool, text: list[str] | None = None) -> list[str]:
    """All documents of one side of the split: of the files in text, or of the library."""
    found = []
    for source in [text_documents(path) for path in text] if text else [library_documents()]:
        found += [source[name] for name in source if is_validation(name) == validation]
    side = "validation" if validation else "training"
    check(found != [], f"the {side} side of the text is empty: give more text")
    return found


def packed(texts: list[str], tokenizer: AnyTokenizer) -> Tensor:
    """All documents, each as <s> ... </s>, in one row of tokens (n,); made once, then cached."""
    digest = hashlib.sha256(tokenizer.model + f"{tokenizer.bos} {tokenizer.eos}".encode())
    for text in texts:
        digest.update(len(text).to_bytes(8, "big") + text.encode())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = caches / "nano-medusa" / f"tokens-{digest.hexdigest()[:16]}.safetensors"

    # A file that is missing or broken is made from the documents.
    with suppress(ValueError):
        return read_safetensors(path)["tokens"].int()
    dtype = torch.uint16 if tokenizer.vocab_size <= 1 << 16 else torch.int32
    rows = ([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in texts)
    tokens = torch.cat([torch.tensor(row, dtype=dtype) for row in rows])
    write_safetensors(path, {"tokens": tokens})
    return tokens.int()


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for every purpose and step."""
    return torch.Generator(device).manual_seed(int(digest_of(*numbers), 16) >> 1)


@cache
def shuffled(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=seeded(seed, epoch))


def windows(tokens: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """n windows (n, length) at random places of a packed text (tokens,)."""
    check(len(tokens) >= length, f"the text has {len(tokens)} tokens, a row {length}: give more")
    starts = torch.randint(len(tokens) - length + 1, (n, 1), generator=generator)  # (n, 1)
    return tokens[starts + torch.arange(length)].long()  # (n, length)
