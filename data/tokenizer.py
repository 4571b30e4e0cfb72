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
from model import GPT, check, read_json, read_weights, write_atomically

SHIPPED_BASE = "data/base"
META_SPACE = "\u2581"  # SentencePiece's sign for a space: the character itself goes in as bytes
# What belongs to a tokenizer: the last one may name more tokens that end a text.
FILES = "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"
FILES += "special_tokens_map.json", "generation_config.json"


class Tokenizer:
    """`tokenizer.model` of a base directory. `bos` and `eos` are the ids around a document."""

    def __init__(self, model: bytes):
        self.model = model
        # Unlike the constructor, this refuses an empty model.
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.load_from_serialized_proto(model)
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        self.vocab_size = self.own_size = self.processor.vocab_size()
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
        library, special = optional("tokenizers", path), special_tokens(directory)
        self.model = path.read_bytes()
        try:
            self.tokenizer = library.Tokenizer.from_buffer(self.model)
            # The lengths of the batches of its training are none of ours.
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            self.own_size = max(self.tokenizer.get_vocab(False).values(), default=-1) + 1
            # A special token may be named in another file alone.
            self.tokenizer.add_special_tokens([*special.values()])
            probe = self.tokenizer.encode("a")
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1

        # Without a beginning of its own, a document opens with the end of another, as in GPT-2.
        config = read_if_there(directory, "generation_config.json")
        config |= read_if_there(directory, "config.json")
        self.eos = self._id_of("eos", special, config)
        self.bos = self._id_of("bos", special, config)
        self.bos = self.eos if self.bos < 0 else self.bos
        self.model_size = config.get("vocab_size", self.vocab_size)

        # What the checkpoint puts before a text: ids that come from no sequence. What it puts
        # after one is for training.
        n = next((i for i, sequence in enumerate(probe.sequence_ids) if sequence is not None), 0)
        self.before = probe.ids[:n]

    def _id_of(self, name: str, special: dict[str, str], config: dict) -> int:
        """The id of bos or eos: of its text, or else the model's (of several the first); or -1."""
        ids = config.get(f"{name}_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        first = first if isinstance(first, int) and 0 <= first < self.vocab_size else -1
        id = self.tokenizer.token_to_id(special.get(f"{name}_token", ""))
        return first if id is None else id

    def encode(self, text: str) -> list[int]:
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # a word that it does not know, and no token for such words
            raise ValueError(f"tokenizer.json cannot encode the text: {error}") from None
        # What was added to the tokenizer alone, often <pad>, cannot be fed.
        largest = max(ids, default=0)
        lacks = f"the text holds {self.piece(largest)}, a token that the model lacks: leave it out"
        check(largest < self.model_size, lacks)
        return ids

    def opening(self, text: str) -> list[int]:
        """Text as the beginning of a document: after what the checkpoint puts there, once."""
        ids, n = self.encode(text), len(self.before)
        return ids if ids[:n] == self.before else self.before + ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)

    def piece(self, id: int) -> str:
        name = self.tokenizer.id_to_token(id) if 0 <= id < self.vocab_size else None
        return name or f"<{id}>"


AnyTokenizer = Tokenizer | JsonTokenizer


def read_if_there(directory, name: str) -> dict:
    """The content of a JSON file that a checkpoint may have."""
    path = Path(directory) / name
    return read_json(path) if path.exists() else {}


def special_tokens(directory) -> dict[str, str]:
    """{"bos_token": its text, ...}, and "2": the text of an added token, as transformers has them.

    special_tokens_map.json goes before a tokenizer_config.json without added_tokens_decoder.
    """
    config, found = read_if_there(directory, "tokenizer_config.json"), {}
    added = config.get("added_tokens_decoder")
    said = added if isinstance(added, dict) else read_if_there(directory, "special_tokens_map.json")
    for name, token in (config | said).items():
        text = token.get("content") if isinstance(token, dict) else token
        if (name.endswith("_token") or name.isdecimal()) and isinstance(text, str) and text:
            found[name] = text
    return found


def load_tokenizer(directory) -> AnyTokenizer:
    """tokenizer.json goes before tokenizer.model where both exist, as in transformers."""
    has_json = (Path(directory) / "tokenizer.json").exists()
    return JsonTokenizer(directory) if has_json else Tokenizer.load(directory)


def load_base(directory, dtype=torch.float32, device=None) -> tuple[AnyTokenizer, GPT]:
    """A base directory's tokenizer and model; ValueError if they do not belong together."""
    model, tokenizer = GPT.from_pretrained(directory, dtype, device), load_tokenizer(directory)
    size, ends = model.config.vocab_size, (tokenizer.bos, tokenizer.eos)
    # Tokens that were added to the tokenizer alone are no harm: they are not fed.
    check(tokenizer.own_size <= size, f"{directory}: the tokenizer has more tokens than the model")
    lacks = "the tokenizer has no piece, known to the model, that begins or ends a document"
    check(0 <= min(ends) and max(ends) < size, f"{directory}: {lacks}")
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
        says = str(error).rpartition("] ")[2]  # after its place in the library's source
        raise ValueError(f"--vocab-size {vocab_size} does not suit this text: {says}") from None
    return Tokenizer(model.getvalue())
