"""Properties of the text: the tokenizer loses nothing, no document is on both sides of the split,
packed tokens are the documents, and windows and shards are pieces of what went in."""

import sysconfig
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from data import corpus, smollm2
from data.corpus import documents, is_validation, packed, seeded, text_documents, windows
from data.rows import metadata_of, read_shards, write_shard
from data.tokenizer import SHIPPED_BASE, Tokenizer, train_tokenizer
from medusa import MedusaHeads
from model import read_json, read_safetensors, write_safetensors
from strategies import call, contents, properties, refused
from tree import calibrated_tree, read_counts

HERE = Path(__file__)
SIZES = {"shipped": 2048, "small": 400}
TOKENIZERS = pytest.mark.parametrize("name", SIZES)
ODD = ("\u2581", "\0", "\t", "\n", "\r\n", " ", "\ufeff", "e\u0301", "\U0001f469\u200d\U0001f680")
ODD += ("\U0010ffff", "\u2028", "<s>", "<0x0A>", "2024")
YES = torch.tensor([[True, True]])
LINES = st.sampled_from((*ODD, "x" * 30, "\n", "\r")) | st.text(max_size=9)


@cache
def tokenizer(name: str) -> Tokenizer:
    if name == "shipped":
        return Tokenizer.load(HERE.parents[1] / SHIPPED_BASE)
    return train_tokenizer([HERE.read_text("utf-8"), "2024\n" * 99], SIZES[name])


@TOKENIZERS
@settings(properties, max_examples=400)
@given(string=st.text() | st.lists(st.sampled_from(ODD) | st.text(max_size=3)).map("".join))
def test_decoding_gives_back_every_string(name, string):
    tok = tokenizer(name)
    ids = tok.encode(string)
    assert tok.decode(ids) == tok.decode(np.array(ids, np.uint16)) == string
    assert {tok.bos, tok.eos, tok.processor.unk_id()}.isdisjoint(ids)
    assert all(0 <= id < tok.vocab_size for id in ids)


@TOKENIZERS
def test_pieces_hold_one_digit_at_most_and_may_hold_line_ends(name):
    tok = tokenizer(name)
    assert tok.vocab_size == SIZES[name] and len(tok.encode("3" * 20)) == 20
    special = [id for id in range(tok.vocab_size) if tok.piece(id).startswith("<")]
    pieces = [tok.decode([id]) for id in range(tok.vocab_size) if id not in special]
    assert max(sum(c.isdigit() for c in piece) for piece in pieces) == 1
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)
    # It learns from every line.
    short = train_tokenizer(["x = y\n" * 40 + "zebra\n" * 7, "hippo\n" * 7], 285)
    assert len(short.encode("zebra")) + len(short.encode("hippo")) < 6


def write_library(root: Path, files: dict, monkeypatch) -> None:
    """Files {path: content} that pass for the standard library."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})


def test_the_split_depends_on_the_relative_path_alone(tmp_path, monkeypatch):
    names = [f"{folder}m{i}.py" for i in range(70) for folder in ("", "json/", "a/b/")]
    for root, more in ((tmp_path / "3.11", []), (tmp_path / "x/3.14", ["new.py", "zz/new.py"])):
        files = {name: f"# {name} in {root}\r\n" for name in names + more}
        write_library(root, files, monkeypatch)
        train, held_out = documents(False), documents(True)
        assert train and sorted(train + held_out) == sorted(files.values())
        found = {text.split()[1] for text in held_out} & set(names)
        assert found == {name for name in names if is_validation(name)} != set()
    known = ("ast.py", "email/header.py", "functools.py", "json/decoder.py", "os.py", "signal.py")
    held_out = ["email/header.py", "functools.py", "signal.py"]
    assert [name for name in known if is_validation(name)] == held_out
    assert 150 < sum(is_validation(f"{i}.py") for i in range(4000)) < 250


def test_tests_and_files_in_other_encodings_are_left_out(tmp_path, monkeypatch):
    kept = {"a.py": "a\r\n\u2581\n", "json/b.py": "", "testing.py": "t", "my_tests/c.py": "c"}
    tests = ("test", "x/tests", "idlelib/idle_test", "site-packages/x", "__pycache__")
    others = {f"{folder}/{name}": "x" for folder in tests for name in ("d.py", "e/f.py")}
    others |= {"latin.py": "\u00e9".encode("latin-1"), "a.txt": "x", "folder.py/g": "x"}
    write_library(tmp_path, kept | others, monkeypatch)
    assert corpus.library_documents() == kept


@properties
@given(text=st.lists(LINES, min_size=1, max_size=40).map("".join))
def test_the_pieces_of_a_text_in_turn_are_the_text(tmp_path_factory, text):
    """Each ends with the line in which it reaches PIECE characters, and is on one side."""
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_bytes(text.encode())
    text = text.removeprefix("\ufeff")  # a byte-order mark is no text
    with patch.object(corpus, "PIECE", 10):
        pieces = text_documents(str(path))
        held_out = [pieces[name] for name in pieces if is_validation(name)]
        assert not held_out or documents(True, [str(path)]) == held_out
    assert list(pieces) == [f"own.txt:{i}" for i in range(len(pieces))]
    assert "".join(pieces.values()) == text
    for number, piece in enumerate(pieces.values(), start=1):
        assert len("".join(piece.splitlines(keepends=True)[:-1])) < 10
        assert len(piece) >= 10 or number == len(pieces)


class Letters:
    def __init__(self, vocab_size=300, model=b"letters"):
        self.vocab_size, self.model, self.calls = vocab_size, model, 0
        self.bos, self.eos = vocab_size - 2, vocab_size - 1

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return [ord(c) for c in text]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Lists what the cache directory holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return lambda: sorted((tmp_path / "xdg" / "nano-medusa").iterdir())


SMALLEST = [(300, torch.uint16), (1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)]


@pytest.mark.parametrize("vocab_size, kind", SMALLEST)
def test_packed_tokens_are_the_documents_between_their_ends_and_made_once(vocab_size, kind, cached):
    """Of each list of texts and each tokenizer."""
    letters, bos, eos = Letters(vocab_size), vocab_size - 2, vocab_size - 1
    for _ in range(3):
        tokens = packed(["ab", "", "\u00e9\n"], letters)
        assert tokens.tolist() == [bos, 97, 98, eos, bos, eos, bos, 233, 10, eos]
        del tokens  # it may be a view of the file
        assert letters.calls == 3 and read_safetensors(*cached())["tokens"].dtype == kind
    # A broken file is made again.
    old = cached()[0].read_bytes()
    for content in (b"", old[:20], old[:-1], b"garbage", b"\x80\x04garbage"):
        cached()[0].write_bytes(content)
        assert packed(["ab", "", "\u00e9\n"], letters)[-3:].tolist() == [233, 10, eos]
        assert [path.read_bytes() for path in cached()] == [old]
    others = ["ab", "\u00e9", ""], ["a", "b", "\u00e9"], ["ab\u00e9"], ["ab", "", "\u00e9", ""]
    for texts, model in [*((texts, b"letters") for texts in others), (others[0], b"more")]:
        tokens = packed(list(texts), Letters(vocab_size, model))
        assert tokens.tolist() == [id for text in texts for id in (bos, *map(ord, text), eos)]
    # The same tokenizer.json may begin and end documents otherwise.
    for letters.bos, letters.eos in ((1, eos), (1, 2)):
        assert packed(["ab"], letters).tolist() == [letters.bos, 97, 98, letters.eos]
    assert len(cached()) == 8


@properties
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_windows_are_pieces_of_the_text_from_everywhere_in_it(size, length, seed):
    text = torch.arange(100, 100 + size, dtype=torch.int32)
    refused(f"{size} tokens, a row", windows, text, 1, size + 1, seeded(seed))
    length = min(size, length)
    found = windows(text, 300, length, seeded(seed))
    assert found.dtype == torch.int64 and found.shape == (300, length)
    assert torch.equal(found, found[:, :1] + torch.arange(length))
    assert set(found[:, 0].tolist()) == set(range(100, 101 + size - length))


@pytest.mark.parametrize("vocab_size", [1 << 15, (1 << 15) + 1])
def test_shards_come_back_in_the_order_of_their_names(vocab_size, tmp_path):
    tokens = torch.arange(vocab_size - 24, vocab_size).view(6, 4)
    for name, part in (("b", tokens[4:]), ("a", tokens[:4])):
        write_shard(tmp_path / f"{name}.safetensors", part, part % 3 > 0, vocab_size, "base")
    found, loss_mask = read_shards(tmp_path, "*.safetensors", vocab_size)
    assert torch.equal(found, tokens) and torch.equal(loss_mask, tokens % 3 > 0)
    assert metadata_of(tmp_path / "a.safetensors") == {"base": "base"}


@pytest.mark.parametrize("tokens, loss", [
    (torch.tensor([[0, 9]]), YES), (torch.tensor([[0, -1]]), YES), (torch.rand(1, 2), YES),
    (torch.tensor([[0, 8]]), YES[0]), (torch.tensor([[0, 8]]), YES.float()),
    (torch.tensor([[0, 8, 1]]), torch.ones(1, 3).bool()), (YES[:0].long(), YES[:0]),
])  # fmt: skip
def test_shards_that_do_not_fit_the_base_are_refused(tokens, loss, tmp_path):
    refused("has no train-", read_shards, tmp_path, "train-*", 9)
    write_shard(tmp_path / "train-0.safetensors", torch.tensor([[0, 8]]), YES, 9, "base")
    write_safetensors(tmp_path / "train-1.safetensors", {"tokens": tokens, "loss": loss})
    refused("holds no rows of this base", read_shards, tmp_path, "train-*", 9)


def test_rows_that_turn_in_pairs_come_in_halves_head_by_head():
    # GGUF rotates i = 0 and 1, 2 and 3, 4 and 5 of each head.
    rows = torch.tensor([[10 * head + i, 0] for head in range(2) for i in range(6)])
    halves = [0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15]
    assert smollm2.interleaved_to_halves(rows, 2)[:, 0].tolist() == halves


def test_smollm2_comes_with_heads_whole_and_small_and_keeps_ones_that_exist(tmp_path, monkeypatch):
    for name in ("optional", "fetch", "convert"):
        monkeypatch.setattr(smollm2, name, lambda *_: [None])
    call(smollm2.main, "--out", tmp_path)
    assert contents(tmp_path / "heads") == contents(smollm2.HEADS)
    (tmp_path / "heads" / "calibration.json").write_text("mine")
    call(smollm2.main, "--out", tmp_path)
    assert (tmp_path / "heads" / "calibration.json").read_text() == "mine"
    config = MedusaHeads.from_pretrained(tmp_path / "heads").config
    assert sum(map(len, contents(smollm2.HEADS).values())) <= 5_000_000
    for result in read_json(smollm2.HEADS / "calibration.json").values():
        tree = calibrated_tree(read_counts(result), 64)
        assert max(tree.ranks) < config.truncated_vocab_size
        assert max(tree.depths) <= config.num_heads
