"""SentencePiece, lossless: decode(encode(s)) == s for every string s that UTF-8 can hold.

BPE with byte fallback, identity normalisation, no dummy prefix; newlines may stand inside pieces, digits stay single.
"""
import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from model import write_atomically

META_SPACE = "\u2581"  # SentencePiece writes a space as this character, so the character itself must go in as bytes


class Tokenizer:
    """`tokenizer.model` of a base directory. `bos` and `eos` are the ids that open and close a document."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.load_from_serialized_proto(model)  # unlike the constructor it refuses an empty model
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        self.vocab_size = self.processor.vocab_size()
        self._meta_space = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]

    @classmethod
    def load(cls, directory) -> "Tokenizer":
        path = Path(directory) / "tokenizer.model"
        try:
            return cls(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read as a SentencePiece model: {error}") from None

    def save(self, directory) -> None:
        path = Path(directory) / "tokenizer.model"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_bytes(self.model))

    def encode(self, text: str) -> list[int]:
        first, *rest = (self.processor.encode(part) for part in text.split(META_SPACE))
        return first + [id for part in rest for id in self._meta_space + part]

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(id) for id in ids if id < self.vocab_size])  # a model's vocabulary may be padded

    def piece(self, id: int) -> str:
        """The vocabulary's own name of a token, such as <0xE2> for a byte."""
        return self.processor.id_to_piece(id) if id < self.vocab_size else f"<{id}>"


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
