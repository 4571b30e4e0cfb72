"""Properties of a chat model's prompts: a turn is on one side of the split, whatever its length."""

import json
import re

import pytest

import data.chat
import data.turns
from data.chat import turn_prompts
from data.corpus import is_validation
from data.turns import written_turns
from strategies import small_tokenizer

TURNS = [f"what is {n} + {n}?" for n in range(60)] + ["why?", "one\u2028two?"]


@pytest.fixture(autouse=True)
def bare_template(monkeypatch):
    """A chat template that adds nothing to a turn."""
    monkeypatch.setattr(data.chat, "chat_text", lambda _, turns: turns[0]["content"])
    monkeypatch.setattr(data.chat, "JsonTokenizer", type(small_tokenizer()))


def test_a_turn_is_on_one_side_and_too_long_ones_are_left_out(tmp_path):
    path, tokenizer = tmp_path / "turns.jsonl", small_tokenizer()
    lines = [json.dumps(turn, ensure_ascii=False) for turn in TURNS]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    prompts = {turn: tokenizer.encode(turn) for turn in TURNS}
    most = sorted(set(map(len, prompts.values())))[-2]
    sides = turn_prompts([str(path)], tmp_path, tokenizer, most)
    for side in ("train", "validation"):
        turns = [turn for turn in TURNS if is_validation(turn) == (side == "validation")]
        expected = [prompts[turn] for turn in turns if len(prompts[turn]) <= most]
        assert sides[side] == expected != []
    assert sum(map(len, sides.values())) < len(TURNS)


@pytest.mark.parametrize("content, says", [
    ('{"a": 1}\n', "must hold one JSON string a line"), (None, "cannot be read as one JSON string"),
    ("why?\n", "cannot be read as one JSON string"), (b"\xff\n", "cannot be read as one JSON"),
    ('"why?"\n', "the validation side of the turns is empty: give more turns"),
])  # fmt: skip
def test_a_file_that_holds_no_turns_is_refused(content, says, tmp_path):
    path = tmp_path / "other.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(says)):
        turn_prompts([str(path)], tmp_path, small_tokenizer(), 99)
    with pytest.raises(ValueError, match="--chat needs --text"):
        turn_prompts([], tmp_path, small_tokenizer(), 99)


def test_turns_are_written_and_only_once():
    turns = written_turns(700, seed=0)
    assert len(set(turns)) == 700 and turns == written_turns(700, seed=0)
    assert turns != written_turns(700, seed=1)
    assert not re.search("[{}|]", "".join(turns)) and all(turn[0].isupper() for turn in turns)


def test_turns_are_written_for_all_tasks_alike_as_long_as_their_words_last(tmp_path, monkeypatch):
    tasks = {"few": ["few {x} {n}"], "many": ["many {y}", "many: {x} is one"]}
    words = {"x": ["a", "b", "c"], "y": ["{x} and {x}"]}
    grammar = {"tasks": tasks, "words": words, "numbers": {"n": [8, 10]}}
    monkeypatch.setattr(data.turns, "GRAMMAR", tmp_path / "turns.json")
    data.turns.GRAMMAR.write_text(json.dumps(grammar))
    turns = written_turns(18, seed=0)
    assert sorted(turns[::2]) == sorted(f"Few {x} {n}" for x in "abc" for n in (8, 9, 10))
    many = {f"Many {x} and {y}" for x in "abc" for y in "abc"}
    assert set(turns[1::2]) <= many | {f"Many: {x} is one" for x in "ABC"}
    with pytest.raises(ValueError, match="--written 19: the grammar has too few different turns"):
        written_turns(19, seed=0)
