"""Laws of a chat model's own text: its answers to user turns, each side's turns on that side alone, whatever the length of a prompt."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

import data.chat
import data.turns
from data.chat import turn_prompts
from data.corpus import is_validation
from data.distilled import distill, turns_of_shard
from data.shards import read_shards
from data.turns import written_turns
from strategies import contents, distilling, properties, small_tokenizer

TURNS = [f"what is {n} + {n}?" for n in range(60)] + ["why?", "one\u2028two?"]


@pytest.fixture
def turns(tmp_path, monkeypatch) -> list[str]:
    """A file of turns, for a chat model whose template adds nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        data.chat,
        "chat_prompt",
        lambda directory, tokenizer, turns: tokenizer.opening(turns[0]["content"]),
    )
    (tmp_path / "turns.jsonl").write_text(
        "".join(json.dumps(turn, ensure_ascii=False) + "\n" for turn in TURNS) + "\n",
        encoding="utf-8",
    )
    return [str(tmp_path / "turns.jsonl")]


@properties
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    rows=st.integers(1, 6),
    shards=st.integers(1, 4),
)
def test_all_shards_together_take_each_prompt_as_often_as_the_others(sizes, rows, shards):
    prompts = [[number] * size for number, size in enumerate(sizes)]
    dealt = [turns_of_shard(prompts, i, rows, shards) for i in range(shards)]
    taken = Counter(prompt[0] for shard in dealt for prompt in shard)
    assert all(len(shard) == rows for shard in dealt) and set(taken) <= set(range(len(sizes)))
    assert {taken[number] for number in range(len(sizes))} <= {
        rows * shards // len(sizes),
        -(-rows * shards // len(sizes)),
    }
    lengths = [len(prompt) for shard in dealt for prompt in shard]
    assert lengths == sorted(lengths)  # so that a shard has few different ones


def test_a_turn_is_on_one_side_and_too_long_ones_are_left_out(turns, base):
    tokenizer = small_tokenizer()
    prompts = {turn: tokenizer.opening(turn) for turn in TURNS}
    most = max(map(len, prompts.values())) - 1
    sides = turn_prompts(turns, base, tokenizer, most)
    for side in sides:
        assert sides[side] == [
            prompt
            for turn, prompt in prompts.items()
            if is_validation(turn) == (side == "validation") and len(prompt) <= most
        ]
    assert 0 < sum(map(len, sides.values())) < len(TURNS)


@pytest.mark.parametrize("content, says", [
    ('{"a": 1}\n', "must hold one JSON string a line"), ("why?\n", "cannot be read as one JSON string a line"), (b"\xff\n", "cannot be read as one JSON string"),
    ('"why?"\n', "the validation side of the turns is empty: give more turns"), (None, "cannot be read as one JSON string a line"),
])  # fmt: skip
def test_a_file_that_holds_no_turns_is_refused(turns, base, tmp_path, content, says):
    path = tmp_path / "other.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(says)):
        turn_prompts([str(path)], base, small_tokenizer(), 99)
    with pytest.raises(ValueError, match="--chat needs --text"):
        turn_prompts([], base, small_tokenizer(), 99)


def test_answers_are_distilled_behind_the_turns_of_their_side(turns, base, tmp_path):
    config = distilling(
        base,
        turns,
        out=str(tmp_path / "rows"),
        chat=True,
        shards=2,
        rows=5,
        prompt_tokens=16,
        new_tokens=6,
    )
    folder = distill(config)
    sides = turn_prompts(turns, base, small_tokenizer(), 16)
    vocabulary = small_tokenizer().vocab_size
    for side, pattern in (("train", "train-*"), ("validation", "validation-0.7*")):
        rows, loss = read_shards(folder, f"{pattern}.safetensors", vocabulary)
        assert rows.shape == (10 if side == "train" else 5, 22)
        for row, loss_mask in zip(rows.tolist(), loss.tolist()):
            assert row[: loss_mask.index(True)] in sides[side]
    before = contents(folder)
    distill(config)
    assert contents(folder) == before
    with pytest.raises(
        ValueError, match="with other settings"
    ):  # another number of shards deals the turns out otherwise
        distill(replace(config, shards=3))


def test_turns_are_written_and_only_once():
    turns = written_turns(700, seed=0)
    assert len(set(turns)) == 700 and turns == written_turns(700, seed=0) != written_turns(
        700, seed=1
    )
    assert not any(mark in turn for turn in turns for mark in "{}|") and all(
        turn[0].isupper() for turn in turns
    )


def test_turns_are_written_for_all_tasks_alike_as_long_as_their_words_last(monkeypatch):
    monkeypatch.setattr(
        data.turns, "TASKS", {"few": "few {x} {x}", "many": "many {y} | many: {x} is\n        one"}
    )
    monkeypatch.setattr(data.turns, "GRAMMAR", {"x": "a | b |\n        c", "y": "{x} and {x}"})
    turns = written_turns(18, seed=0)
    assert sorted(turns[::2]) == sorted(f"Few {x} {y}" for x in "abc" for y in "abc")
    assert set(turns[1::2]) <= {f"Many {x} and {y}" for x in "abc" for y in "abc"} | {
        f"Many: {x} is one" for x in "ABC"
    }
    with pytest.raises(ValueError, match="--written 19: the grammar has too few different turns"):
        written_turns(19, seed=0)
