"""Laws of the text: the tokenizer loses nothing, no document stands on both sides of the split, and packed tokens are the documents."""

import sys
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from data import corpus, smollm2
from data.calibration import CALIBRATION_TEMPERATURES, read_calibration
from data.corpus import (
    documents,
    is_validation,
    library_documents,
    pack,
    python_files,
    text_documents,
)
from data.tokenizer import Tokenizer, train_tokenizer
from medusa import MedusaHeads
from strategies import properties
from tree import calibrated_tree

SIZES = {"shipped": 2048, "small": 400}
TOKENIZERS = pytest.mark.parametrize("name", SIZES)
ODD = (
    "\u2581",
    "\0",
    "\t",
    "\n",
    "\r\n",
    " ",
    "\ufeff",
    "e\u0301",
    "\U0001f469\u200d\U0001f680",
    "\U0010ffff",
    "\u2028",
    "<s>",
    "<0x0A>",
    "2024",
)


@cache
def tokenizer(name: str) -> Tokenizer:
    here = Path(__file__)
    return (
        Tokenizer.load(here.parent.parent / "data" / "base")
        if name == "shipped"
        else train_tokenizer([here.read_text("utf-8")], SIZES[name])
    )


@TOKENIZERS
@settings(properties, max_examples=400)
@given(string=st.text() | st.lists(st.sampled_from(ODD) | st.text(max_size=3)).map("".join))
def test_decoding_gives_back_every_string(name, string):
    """Whatever it says, it is text: no id stands for the unknown, or for an end of a document."""
    tok = tokenizer(name)
    ids = tok.encode(string)
    assert tok.decode(ids) == tok.decode(np.array(ids, np.uint16)) == string
    assert all(0 <= id < tok.vocab_size for id in ids) and not {
        tok.bos,
        tok.eos,
        tok.processor.unk_id(),
    } & set(ids)


@TOKENIZERS
def test_pieces_hold_one_digit_at_most_and_may_hold_line_ends(name):
    tok = tokenizer(name)
    pieces = [
        tok.decode([id])
        for id in range(tok.vocab_size)
        if not (tok.processor.is_control(id) or tok.processor.is_byte(id))
    ]
    assert (
        len(tok.encode("3" * 20)) == 20
        and max(sum(c.isdigit() for c in piece) for piece in pieces) == 1
    )
    assert (
        any("\n" in piece and len(piece) > 1 for piece in pieces)
        and tok.vocab_size == SIZES[name]
        and tok.bos != tok.eos
    )


def test_a_tokenizer_learns_from_every_line():
    short = train_tokenizer(["x = y\n" * 40 + "zebra\n" * 7, "hippo\n" * 7], 285)
    assert len(short.encode("zebra")) + len(short.encode("hippo")) < 6


@TOKENIZERS
def test_a_saved_tokenizer_comes_back(name, tmp_path):
    for _ in range(2):
        tokenizer(name).save(tmp_path / "new" / "base")
        assert [file.name for file in (tmp_path / "new" / "base").iterdir()] == ["tokenizer.model"]
    loaded = Tokenizer.load(tmp_path / "new" / "base")
    assert loaded.model == tokenizer(name).model and loaded.encode("a b\u2581c\n") == tokenizer(
        name
    ).encode("a b\u2581c\n")


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\x80\x04garbage", -5, 1000])
def test_a_missing_or_broken_tokenizer_is_refused_by_name(content, tmp_path):
    file = tmp_path / "tokenizer.model"
    if content is not None:
        file.write_bytes(
            tokenizer("small").model[:content] if isinstance(content, int) else content
        )
    with pytest.raises(ValueError) as error:
        Tokenizer.load(tmp_path)
    assert str(file) in str(error.value)


def write_tree(root: Path, files: dict) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_the_split_depends_on_the_relative_path_alone_and_no_document_is_on_both_sides(
    tmp_path, monkeypatch
):
    names, sides = [f"{folder}m{i}.py" for i in range(70) for folder in ("", "json/", "a/b/")], []
    for root, more in ((tmp_path / "3.11", []), (tmp_path / "x" / "3.14", ["new.py", "zz/new.py"])):
        files = {name: f"# {name} in {root}\r\n" for name in names + more}
        write_tree(root, files)
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
        train, held_out = library_documents(False), library_documents(True)
        assert train and held_out and sorted(train + held_out) == sorted(files.values())
        assert (train, held_out) == (documents(False), documents(True, []))
        sides.append({text.split()[1] for text in held_out} & set(names))
    assert sides[0] == sides[1] == {name for name in names if is_validation(name)}


def test_the_split_of_today_is_the_split_of_tomorrow_and_holds_out_one_file_in_twenty():
    known = (
        "ast.py",
        "email/header.py",
        "functools.py",
        "json/decoder.py",
        "os.py",
        "signal.py",
        "typing.py",
    )
    assert [name for name in known if is_validation(name)] == [
        "email/header.py",
        "functools.py",
        "signal.py",
    ]
    assert 150 < sum(is_validation(f"{i}.py") for i in range(4000)) < 250


def test_tests_and_files_in_other_encodings_are_left_out(tmp_path):
    kept = {
        "a.py": "a\r\n\u2581\n",
        "json/b.py": "",
        "testing.py": "t",
        "json/test.py": "t",
        "my_tests/c.py": "c",
    }
    folders = (
        "test",
        "x/tests",
        "idlelib/idle_test",
        "site-packages/x",
        "dist-packages",
        "__pycache__",
    )
    left_out = {f"{folder}/{name}": "x" for folder in folders for name in ("d.py", "e/f.py")}
    left_out |= {
        "latin.py": "\u00e9".encode("latin-1"),
        "a.txt": "x",
        "b.pyc": "x",
        "folder.py/g": "x",
    }
    assert python_files(write_tree(tmp_path, kept | left_out)) == kept


@properties
@given(
    st.lists(
        st.lists(
            st.sampled_from((*ODD, "x" * 30, "\n", "\r")) | st.text(max_size=9), max_size=40
        ).map("".join),
        min_size=1,
        max_size=3,
    )
)
def test_the_pieces_of_a_text_in_turn_are_the_text(tmp_path_factory, texts):
    """Each is on one side, by its file's name and its number, and ends with the line in which it reaches PIECE characters."""
    paths = [tmp_path_factory.mktemp("text") / f"{i}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts):
        path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", 10)
        patch.setattr(corpus, "VALIDATION_SHARE", 2)
        sides = {
            side: text_documents([str(path) for path in paths], side) for side in (False, True)
        }
        for path, text in zip(paths, texts):
            number = 0
            while text:
                piece = sides[is_validation(f"{path.name}:{number}")].pop(0)
                lines = text.splitlines(keepends=True)
                taken = next(
                    (n for n in range(len(lines)) if len("".join(lines[:n])) >= 10), len(lines)
                )
                assert piece == "".join(lines[:taken])
                text, number = text[len(piece) :], number + 1
        assert sides == {False: [], True: []}


@pytest.mark.parametrize("content", [None, b"caf\xe9", "folder"])
def test_a_text_that_cannot_be_read_is_refused_by_name(content, tmp_path):
    if content is not None:
        write_tree(tmp_path, {"own.txt/file" if content == "folder" else "own.txt": content})
    with pytest.raises(ValueError) as error:
        documents(False, [str(tmp_path / "own.txt")])
    assert f"--text {tmp_path / 'own.txt'}" in str(error.value)


@pytest.mark.parametrize("side, says", [(False, "training"), (True, "validation")])
def test_an_empty_side_is_refused(side, says, tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text("one line\n" if side != is_validation("own.txt:0") else "")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for text in ([str(tmp_path / "own.txt")], None):
        with pytest.raises(ValueError, match=says):
            documents(side, text)


class Letters:
    """Text as its code points: a tokenizer that counts its calls and may need 32 bits."""

    def __init__(self, vocab_size=300, model=b"letters"):
        self.vocab_size, self.model, self.bos, self.eos, self.calls = (
            vocab_size,
            model,
            vocab_size - 2,
            vocab_size - 1,
            0,
        )

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return [ord(c) for c in text]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Lists what the cache directory holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return lambda: sorted((tmp_path / "xdg" / "nano-medusa").iterdir())


@pytest.mark.parametrize(
    "vocab_size, dtype",
    [(300, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32), (1 << 20, np.uint32)],
)
def test_packed_tokens_are_the_documents_between_their_ends_and_made_once(
    vocab_size, dtype, cached
):
    letters, bos, eos = Letters(vocab_size), vocab_size - 2, vocab_size - 1
    for _ in range(3):
        tokens = pack(["ab", "", "\u00e9\n"], letters)
        assert (
            tokens.tolist() == [bos, 97, 98, eos, bos, eos, bos, 233, 10, eos]
            and tokens.dtype == dtype
        )
        assert letters.calls == 3 and len(cached()) == 1 and cached()[0].suffix == ".npy"


def test_packed_tokens_are_those_of_the_tokenizer(cached):
    tok, texts = tokenizer("shipped"), ["def f():\n", "  \u2581\0", ""]
    assert pack(texts, tok).tolist() == [
        id for text in texts for id in (tok.bos, *tok.encode(text), tok.eos)
    ]


def test_other_texts_or_another_tokenizer_make_another_file(cached):
    inputs = [
        (["ab", "c"], b"1"),
        (["a", "bc"], b"1"),
        (["abc"], b"1"),
        (["c", "ab"], b"1"),
        (["ab", "c", ""], b"1"),
        (["ab", "c"], b"2"),
    ]
    for number, (texts, model) in enumerate(inputs, start=1):
        letters = Letters(model=model)
        assert pack(texts, letters).tolist() == [
            id for text in texts for id in (298, *text.encode(), 299)
        ]
        assert len(cached()) == number and letters.calls == len(texts)


@pytest.mark.parametrize("content", [0, 20, -1, b"garbage", b"\x80\x04garbage"])
def test_a_broken_cache_file_is_made_again(content, cached):
    expected = pack(["ab"], Letters()).tolist()
    old = cached()[0].read_bytes()
    cached()[0].write_bytes(old[:content] if isinstance(content, int) else content)
    assert (
        pack(["ab"], Letters()).tolist() == expected
        and len(cached()) == 1
        and cached()[0].read_bytes() == old
    )


def test_the_cache_is_below_the_home_directory_unless_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in (
        lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""),
        lambda: monkeypatch.delenv("XDG_CACHE_HOME"),
    ):
        unset()
        assert corpus.cache_directory() == tmp_path / ".cache" / "nano-medusa"


# ---- SmolLM2 ----


def test_rows_that_turn_in_pairs_come_in_halves_head_by_head():
    rows = torch.tensor(
        [[10 * head + i, 0] for head in range(2) for i in range(6)]
    )  # GGUF turns i = 0 and 1, 2 and 3, 4 and 5
    assert smollm2.interleaved_to_halves(rows, 2)[:, 0].tolist() == [
        0,
        2,
        4,
        1,
        3,
        5,
        10,
        12,
        14,
        11,
        13,
        15,
    ]


def test_the_shipped_heads_of_smollm2_are_whole_and_small():
    heads = MedusaHeads.from_pretrained(smollm2.HEADS)
    assert (heads.config.hidden_size, heads.config.vocab_size) == (576, 49152)
    assert sum(path.stat().st_size for path in smollm2.HEADS.iterdir()) <= 5_000_000
    for temperature in CALIBRATION_TEMPERATURES:
        tree = calibrated_tree(read_calibration(smollm2.HEADS, temperature)[0], 64)
        assert (
            max(tree.ranks) < heads.config.truncated_vocab_size
            and max(tree.depths) <= heads.config.num_heads
        )


def test_smollm2_comes_with_heads_and_keeps_ones_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "optional", lambda *asked: None)
    monkeypatch.setattr(smollm2, "fetch", lambda folder: None)
    monkeypatch.setattr(
        smollm2, "convert", lambda path, out, dtype: out.mkdir(parents=True, exist_ok=True)
    )
    for name, text in (("new", None), ("mine", "mine")):
        if text:
            (tmp_path / name / "heads").mkdir(parents=True)
            (tmp_path / name / "heads" / "config.json").write_text(text)
        monkeypatch.setattr(sys, "argv", ["smollm2.py", "--out", str(tmp_path / name)])
        smollm2.main()
    shipped = {path.name: path.read_bytes() for path in smollm2.HEADS.iterdir()}
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "new" / "heads").iterdir()
    } == shipped
    assert [path.read_text() for path in (tmp_path / "mine" / "heads").iterdir()] == ["mine"]
