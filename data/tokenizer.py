"""Text to tokens and back: SentencePiece for the bases trained here, or any tokenizer.json.

What is trained here is lossless, decode(encode(s)) == s for every string s: BPE with byte fallback,
without normalisation. Pieces may hold line ends; digits are single.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch

from data.command import optional
from model import GPT, read_json, read_weights, write_atomically

SHIPPED_BASE = "data/base"
META_SPACE = "\u2581"  # SentencePiece's sign for a space: the character itself goes in as bytes
FILES = "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"


class Tokenizer:
    """`tokenizer.model` of a base directory. `bos` and `eos` are the ids around a document."""

    def __init__(self, model: bytes):
        self.model = model
        # Unlike the constructor, this refuses an empty model.
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.load_from_serialized_proto(model)
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        self.vocab_size = self.processor.vocab_size()
        self._meta_space = self.processor.piece_to_id(["<0xE2>", "<0x96>", "<0x81>"])

    @classmethod
    def load(cls, directory) -> "Tokenizer":
        path = Path(directory) / "tokenizer.model"
        try:
            return cls(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read as a SentencePiece model: {error}") from None

    def save(self, directory) -> None:
        path = Path(directory) / "tokenizer.model"
        write_atomically(path, lambda temporary: temporary.write_bytes(self.model))

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split(META_SPACE)
        ids = self.processor.encode(first)
        for part in rest:
            ids += self._meta_space + self.processor.encode(part)
        return ids

    def opening(self, text: str) -> list[int]:
        """Text as the beginning of a document."""
        return [self.bos, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """A model's vocabulary may be padded: ids that the tokenizer lacks are left out."""
        return self.processor.decode([int(id) for id in ids if id < self.vocab_size])

    def piece(self, id: int) -> str:
        """The vocabulary's own name of a token, such as <0xE2> for a byte."""
        return self.processor.id_to_piece(id) if id < self.vocab_size else f"<{id}>"


class JsonTokenizer:
    """`tokenizer.json` of a Hugging Face directory. The text of a special token is that token."""

    def __init__(self, directory):
        path = Path(directory) / "tokenizer.json"
        library = optional("tokenizers", path)
        self.model = path.read_bytes()
        try:
            self.tokenizer = library.Tokenizer.from_buffer(self.model)
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
        self.vocab_size = self.tokenizer.get_vocab_size()
        # Without a beginning of its own, a document opens with the end of another, as in GPT-2.
        special = special_tokens(directory)
        vocabulary = self.tokenizer.get_vocab()
        self.eos = vocabulary.get(special.get("eos_token"), -1)
        self.bos = vocabulary.get(special.get("bos_token", special.get("eos_token")), -1)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def opening(self, text: str) -> list[int]:
        """Text as the beginning of a document, with what the checkpoint puts before it."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)

    def piece(self, id: int) -> str:
        return self.tokenizer.id_to_token(id) or f"<{id}>"


AnyTokenizer = Tokenizer | JsonTokenizer


def special_tokens(directory) -> dict[str, str]:
    """{"bos_token": its text, ...}, as tokenizer_config.json says."""
    found = {}
    for name, token in read_json(Path(directory) / "tokenizer_config.json").items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def load_tokenizer(directory) -> AnyTokenizer:
    """tokenizer.json goes before tokenizer.model where both exist, as in transformers."""
    has_json = (Path(directory) / "tokenizer.json").exists()
    return JsonTokenizer(directory) if has_json else Tokenizer.load(directory)


def load_base(directory, dtype=torch.float32, device=None) -> tuple[AnyTokenizer, GPT]:
    """A base directory's tokenizer and model; ValueError if they do not belong together."""
    model, tokenizer = GPT.from_pretrained(directory, dtype, device), load_tokenizer(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has more pieces than the model has tokens")
    if min(tokenizer.bos, tokenizer.eos) < 0:
        raise ValueError(f"{directory}: the tokenizer has no piece that begins or ends a document")
    return tokenizer, model


def disk_dtype(directory) -> torch.dtype:
    """The dtype of a base's weights on disk."""
    return read_weights(Path(directory))["model.embed_tokens.weight"].dtype


def copy_tokenizer(source, target) -> None:
    """All that belongs to the tokenizer, chat template included, into a directory."""
    for name in FILES:
        path = Path(source) / name
        if path.exists():
            write_atomically(Path(target) / name, lambda to: to.write_bytes(path.read_bytes()))


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn vocab_size pieces, from blocks of 16 lines, so that pieces may hold line ends."""
    model, blocks = io.BytesIO(), []
    for text in documents:
        lines = text.splitlines(keepends=True)
        blocks += ["".join(lines[i : i + 16]) for i in range(0, len(lines), 16)]
    options = {
        "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.9999,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "add_dummy_prefix": False, "allow_whitespace_only_pieces": True, "split_digits": True,
        "max_sentence_length": 100_000, "minloglevel": 2,
    }  # fmt: skip
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(blocks), model_writer=model, vocab_size=vocab_size, **options
        )
    except RuntimeError as error:
        raise ValueError(f"--vocab-size {vocab_size} does not suit this text: {error}") from None
    return Tokenizer(model.getvalue())
