"""Text to tokens and back: SentencePiece, as the bases here are trained with, or the tokenizer.json of another checkpoint.

The tokenizer trained here is lossless: decode(encode(s)) == s for every string s that UTF-8 can hold. BPE with byte fallback,
identity normalisation, no dummy prefix; newlines may stand inside pieces, digits stay single.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from safetensors import safe_open

from data.packages import optional
from model import GPT, read_json, write_atomically

SHIPPED_BASE = "data/base"

META_SPACE = "\u2581"  # SentencePiece writes a space as this character, so the character itself must go in as bytes


class Tokenizer:
    """`tokenizer.model` of a base directory. `bos` and `eos` are the ids that open and close a document."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.load_from_serialized_proto(
            model
        )  # unlike the constructor it refuses an empty model
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        self.vocab_size = self.processor.vocab_size()
        self._meta_space = [
            self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()
        ]

    @classmethod
    def load(cls, directory) -> "Tokenizer":
        path = Path(directory) / "tokenizer.model"
        try:
            return cls(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read as a SentencePiece model: {error}") from None

    def save(self, directory) -> None:
        write_atomically(
            Path(directory) / "tokenizer.model", lambda temporary: temporary.write_bytes(self.model)
        )

    def encode(self, text: str) -> list[int]:
        first, *rest = (self.processor.encode(part) for part in text.split(META_SPACE))
        return first + [id for part in rest for id in self._meta_space + part]

    def opening(self, text: str) -> list[int]:
        """Text as the beginning of a document."""
        return [self.bos, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode(
            [int(id) for id in ids if id < self.vocab_size]
        )  # a model's vocabulary may be padded

    def piece(self, id: int) -> str:
        """The vocabulary's own name of a token, such as <0xE2> for a byte."""
        return self.processor.id_to_piece(id) if id < self.vocab_size else f"<{id}>"


class JsonTokenizer:
    """`tokenizer.json` of a Hugging Face directory. A special token that stands in a text is that token, as its chat templates need."""

    def __init__(self, directory: Path):
        path = directory / "tokenizer.json"
        library = optional("tokenizers", path)
        self.model = path.read_bytes()
        try:
            self.tokenizer = library.Tokenizer.from_buffer(self.model)
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
        self.vocab_size = self.tokenizer.get_vocab_size()
        special = special_tokens(directory)
        self.eos = self._id(special.get("eos_token"))
        self.bos = self._id(
            special.get("bos_token", special.get("eos_token"))
        )  # without one of its own, a document opens as GPT-2's do

    def _id(self, token: str | None) -> int:
        id = None if token is None else self.tokenizer.token_to_id(token)
        return -1 if id is None else id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def opening(self, text: str) -> list[int]:
        """Text as the beginning of a document, with what the checkpoint puts before it."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)

    def piece(self, id: int) -> str:
        return self.tokenizer.id_to_token(id) or f"<{id}>"


def special_tokens(directory) -> dict[str, str]:
    """{"bos_token": its text, ...}, as tokenizer_config.json says."""
    tokens = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in read_json(Path(directory) / "tokenizer_config.json").items()
    }
    return {
        name: token
        for name, token in tokens.items()
        if name.endswith("_token") and isinstance(token, str)
    }


AnyTokenizer = Tokenizer | JsonTokenizer
FILES = "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"


def load_tokenizer(directory) -> AnyTokenizer:
    """tokenizer.json goes before tokenizer.model where both are there, as in transformers."""
    return (
        JsonTokenizer(Path(directory))
        if (Path(directory) / FILES[0]).exists()
        else Tokenizer.load(directory)
    )


def load_base(
    directory, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[AnyTokenizer, GPT]:
    """A base directory's tokenizer and model; raises ValueError if they do not belong together."""
    model, tokenizer = GPT.from_pretrained(directory, dtype, device), load_tokenizer(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} pieces, the model {model.config.vocab_size}: not of one base"
        )
    if min(tokenizer.bos, tokenizer.eos) < 0:
        raise ValueError(f"{directory}: the tokenizer has no piece that begins or ends a document")
    return tokenizer, model


def disk_dtype(directory) -> torch.dtype:
    """Of the weights as they are stored."""
    with safe_open(min(Path(directory).glob("model*.safetensors")), "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def copy_tokenizer(source, target) -> None:
    """All that belongs to the tokenizer, chat template included, into a directory that may not be there yet."""
    for path in (Path(source) / name for name in FILES):
        if path.exists():
            write_atomically(
                Path(target) / path.name, lambda temporary: temporary.write_bytes(path.read_bytes())
            )


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn vocab_size pieces. The documents go in as blocks of 16 lines, so that pieces with newlines can be learnt."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=("".join(block) for text in documents for block in _blocks(text.splitlines(keepends=True), 16)),
            model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True, character_coverage=0.9999,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, split_digits=True, max_sentence_length=100_000, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"--vocab-size {vocab_size} does not suit this text: {error}") from None
    return Tokenizer(model.getvalue())


def _blocks(items: list, size: int):
    return (items[i : i + size] for i in range(0, len(items), size))
