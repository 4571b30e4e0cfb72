"""Laws of the trace: it changes nothing, its records are what was decoded, and no text can break out of its page."""

import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import sample
from data import trace as tracing
from data.trace import Trace, page, split_text
from medusa import MedusaConfig, MedusaHeads, Sampling, medusa_generate
from model import KVCache
from strategies import (
    built_trees,
    contents,
    distribution,
    markov_gpt,
    next_logits,
    properties,
    random_gpt,
    random_heads,
    rng,
    small_tokenizer,
    write_base,
)
from tree import Tree, tree_from_paths

VOCABULARY = small_tokenizer().vocab_size


@st.composite
def decodings(draw):
    """A model, heads, a tree, a prompt, a length, a sampling: guesses are right now and then, as there are few tokens."""
    vocab_size, context = draw(st.integers(2, 6)), draw(st.integers(3, 18))
    model = random_gpt(
        draw(st.integers(0, 99)),
        vocab_size,
        context,
        eos=draw(st.none() | st.integers(0, vocab_size - 1)),
    )
    heads = random_heads(model, draw(st.integers(1, 3)), draw(st.integers(0, 9)))
    tree = draw(built_trees(heads.config.num_heads, vocab_size))
    prompt = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=context - 2))
    temperature, typical = draw(st.sampled_from([(0.0, False), (0.7, False), (1.0, True)]))
    top_k = draw(st.integers(0, 3)) if temperature else 0
    return (
        model,
        heads,
        tree,
        prompt,
        draw(st.integers(1, 16)),
        Sampling(temperature, top_k, 1.0, typical),
    )


def right_guesses():
    """A base that always says the same, and new heads, which say what the base says: every guess of rank 0 is right."""
    model = markov_gpt(torch.tensor([0.0, 1, 5, 2]).expand(4, 4))
    heads = MedusaHeads(MedusaConfig(4, 4, 3)).double()
    return (
        model,
        heads,
        tree_from_paths([[1], [0], [0, 1], [0, 0], [0, 0, 0]]),
        [1, 3],
        17,
        Sampling(),
    )


def traced(model, heads, tree, prompt, n, sampling) -> tuple[Trace, list[list[int]]]:
    trace, steps = Trace(small_tokenizer(), heads, prompt, model.config.eos_ids), []
    for emitted in medusa_generate(model, heads, tree, prompt, n, sampling, rng(0), trace.accept):
        trace.step(emitted)
        steps.append(emitted)
    return trace, steps


@settings(properties, max_examples=60)
@given(decodings())
@example(right_guesses())
def test_looking_on_changes_nothing_and_the_records_are_the_text(case):
    model, heads, tree, prompt, n, sampling = case
    plain = list(medusa_generate(model, heads, tree, prompt, n, sampling, rng(0)))
    trace, steps = traced(*case)
    assert steps == plain
    content = json.loads(json.dumps(trace.content()))
    assert [record["emitted"] for record in content["steps"]] == steps
    for record in content["steps"]:
        path, tokens = record["path"], record["tokens"]
        earned = [tokens[node] for node in path[1:]] + [record["says"][path[-1]]]
        assert record["emitted"] == earned[: len(record["emitted"])]
        assert (
            len(record["emitted"]) == len(earned)
            or record["emitted"][-1] == model.config.eos_token_id
        )
        assert path == [
            node for node in range(len(tokens)) if record["verdicts"][node] == "accepted"
        ]
    text = [token for emitted in steps for token in emitted if token != model.config.eos_token_id]
    before = small_tokenizer().decode(prompt[-1:])
    assert before + "".join(
        part for record in content["steps"] for part in record["text"]
    ) == small_tokenizer().decode(prompt[-1:] + text)


@settings(properties, max_examples=40)
@given(decodings())
@example(right_guesses())
@torch.no_grad()
def test_a_record_says_what_base_and_heads_think_at_each_node(case):
    """Against whole passes over the text up to each node, without tree, mask or cache."""
    model, heads, tree, prompt, n, sampling = case
    trace, _ = traced(*case)
    text = list(prompt)
    for step, record in enumerate(trace.content()["steps"]):
        tree = trace.content()["trees"][record["tree"]]
        assert record["tokens"][0] == text[-1]
        behind, thoughts = [text], []
        for node, parent in enumerate(tree["parents"]):
            behind += [behind[parent] + [record["tokens"][node]]] if node else []
            logits = next_logits(model, behind[node])
            thoughts.append(distribution(logits, sampling.temperature or 1.0, sampling.top_k))
            if not sampling.temperature:
                assert record["says"][node] == logits.argmax()
            assert thoughts[node][record["says"][node]] > 0
        for node, parent in enumerate(tree["parents"][1:], start=1):
            hidden = model(torch.tensor([text[:-1]]))[0, -1]
            head_probs = distribution(
                heads(hidden, model.lm_head)[tree["depths"][node] - 1], sampling.temperature or 1.0
            )
            assert math.isclose(
                record["head_probs"][node], head_probs[record["tokens"][node]], abs_tol=1e-4
            )
            assert math.isclose(
                record["base_probs"][node], thoughts[parent][record["tokens"][node]], abs_tol=1e-4
            )
        check_verdicts(record, tree["parents"], thoughts, sampling)
        text += record["emitted"]


def check_verdicts(record, parents, thoughts, sampling) -> None:
    """The words against the rule of acceptance; thoughts[i]: the base distribution after node i."""
    reached = {0}
    for node, parent in enumerate(parents[1:], start=1):
        token = record["tokens"][node]
        entropy = -sum(p * math.log(p) for p in thoughts[parent] if p > 0)
        threshold = min(0.09, 0.3 * math.exp(-entropy))
        if sampling.typical:
            assert math.isclose(record["thresholds"][parent], threshold, abs_tol=1e-4)
        right = (
            thoughts[parent][token] > threshold
            if sampling.typical
            else token == record["says"][parent]
        )
        reached |= {node} if right and parent in reached else set()
        expected = (
            "accepted"
            if node in record["path"]
            else "passed"
            if node in reached
            else "rejected"
            if parent in reached
            else "unseen"
        )
        assert record["verdicts"][node] == expected
    assert sampling.typical or "passed" not in record["verdicts"]


@settings(properties, max_examples=40)
@given(decodings())
@example(right_guesses())
def test_the_cache_rows_of_a_record_are_those_that_the_cache_kept(case):
    kept, keep = [], KVCache.keep

    def spy(cache, start, rows):
        kept.append((start, rows, cache.length - start))
        keep(cache, start, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "keep", spy)
        trace, _ = traced(*case)
    prompt_step, *steps = trace.records
    assert (prompt_step["past"], prompt_step["path"]) == (len(case[3]) - 1, [0])
    assert [(record["past"], record["path"], len(record["tokens"])) for record in steps] == kept[
        : len(steps)
    ]


@settings(properties, max_examples=40)
@given(decodings())
@example(right_guesses())
def test_the_mask_of_a_record_is_its_trees(case):
    trace, _ = traced(*case)
    content = trace.content()
    for record in content["steps"]:
        drawn = content["trees"][record["tree"]]
        tree = Tree(tuple(drawn["parents"]), tuple(drawn["ranks"]))
        assert len(tree) == len(record["tokens"])
        assert [[mark == "1" for mark in row] for row in drawn["mask"]] == tree.mask.tolist()
        assert all(mark in "01" for row in drawn["mask"] for mark in row)
    if len(content["steps"]) > 1 and case[2].cut(1) != case[2]:
        assert {len(record["tokens"]) for record in content["steps"][1:]} <= {
            len(case[2].cut(depth)) for depth in range(9)
        }


# ---- tokens as text ----

ODD = [
    "</script>",
    "<!--",
    "<script>",
    "{{trace}}",
    "&lt;",
    "\u2028",
    "\u202e",
    "\x00",
    '"',
    "\\",
    "'",
    "\u05d0\u0628",
    "\U0001f469\u200d\U0001f680",
]
odd_text = st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=6).map("".join)
byte_tokens = st.lists(
    st.integers(0, VOCABULARY + 3), max_size=24
)  # most of them bytes, in no valid order; some beyond the vocabulary
any_tokens = byte_tokens | odd_text.map(lambda text: small_tokenizer().encode(text))


@settings(properties, max_examples=200)
@given(any_tokens, any_tokens)
def test_the_parts_of_a_text_join_to_the_text_and_each_whole_character_comes_with_its_last_token(
    before, tokens
):
    tokenizer = small_tokenizer()
    parts = split_text(tokenizer, before[-1:], tokens)
    assert len(parts) == len(tokens)
    start = len(tokenizer.decode(before[-1:]))
    assert "".join(parts) == tokenizer.decode(before[-1:] + tokens)[start:]
    for n in range(1, len(tokens)):
        so_far = "".join(parts[:n])
        assert so_far.rstrip("\ufffd") == tokenizer.decode(before[-1:] + tokens[:n])[start:].rstrip(
            "\ufffd"
        )


def test_a_token_without_a_text_of_its_own_is_shown_by_its_name():
    tokenizer = small_tokenizer()
    e_acute = tokenizer.encode("\u00e9")
    trace = fake([[5], [6], e_acute, [tokenizer.eos], [VOCABULARY + 2]], "e", ends=(tokenizer.eos,))
    names = trace.content()["names"]
    assert [names[token] for token in e_acute] == [["<0xC3>"], ["<0xA9>"]]
    assert names[tokenizer.eos] == ["</s>"] and names[VOCABULARY + 2] == [f"<{VOCABULARY + 2}>"]
    assert names[5] == "\x02"


def fake(steps: list[list[int]], prompt: str, ends=()) -> Trace:
    """A trace of a base that says the tokens of `steps`, and of heads that guess all but the last of each step right."""
    tokenizer = small_tokenizer()
    prompt = [tokenizer.bos, *tokenizer.encode(prompt)]
    heads = random_heads(random_gpt(0, VOCABULARY + 4), max(map(len, steps)), 0)
    trace = Trace(tokenizer, heads, prompt, ends)
    last = prompt[-1]
    for emitted in steps:
        N = len(emitted)
        tree = Tree(tuple(range(-1, N - 1)), (-1,) + (0,) * (N - 1))
        logits = torch.full((N, VOCABULARY + 4), -9.0, dtype=torch.float64)
        logits[range(N), emitted] = 9.0
        trace._listen(heads, (), logits[:-1])
        assert trace.accept(
            tree, torch.tensor([last, *emitted[:-1]]), logits, Sampling(), None
        ) == (list(range(N)), emitted)
        trace.step(emitted)
        last = emitted[-1]
    return trace


# ---- the page ----


class Outline(HTMLParser):
    """What a browser would find: the elements that were opened, and the text of the data."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=False)
        self.tags, self.attributes, self.data, self.inside = [], [], "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.inside = ("id", "trace") in attributes

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        self.data += data if self.inside else ""


EMPTY = Outline(tracing.TEMPLATE.read_text("utf-8").replace("{{trace}}", ""))


@settings(properties, max_examples=150)
@given(
    st.recursive(
        odd_text | st.integers() | st.none() | st.booleans(),
        lambda inner: st.lists(inner) | st.dictionaries(odd_text, inner),
        max_leaves=9,
    )
)
def test_any_data_stands_in_the_page_as_it_is_and_cannot_break_out_of_it(content):
    text = page({"content": content})
    outline = Outline(text)
    assert json.loads(outline.data) == {"content": content}
    assert outline.tags == EMPTY.tags and outline.attributes == EMPTY.attributes
    text.encode("ascii")


@settings(properties, max_examples=25)
@given(
    st.lists(
        st.lists(st.integers(0, VOCABULARY + 3), min_size=1, max_size=4)
        | odd_text.map(lambda text: small_tokenizer().encode(text)[:6] or [3]),
        min_size=1,
        max_size=4,
    )
)
def test_any_token_comes_through_the_page(steps):
    trace = fake(steps, "x")
    content = json.loads(Outline(page(trace.content())).data)
    tokenizer, tokens = small_tokenizer(), [token for emitted in steps for token in emitted]
    assert [record["emitted"] for record in content["steps"]] == steps
    assert "".join(
        part for record in content["steps"] for part in record["text"]
    ) == tokenizer.decode(tokens)
    for token in tokens:
        name = content["names"][str(token)]
        assert name == (
            [tokenizer.piece(token)]
            if tokenizer.decode([token]) in ("", "\ufffd")
            else tokenizer.decode([token])
        )


def test_the_page_needs_nothing_from_anywhere():
    text = tracing.TEMPLATE.read_text("utf-8")
    assert text.count("{{trace}}") == 1
    assert not re.search(
        r"//\w|@import|url\(|\bsrc=|fetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon", text
    )
    assert [
        value for name, value in EMPTY.attributes if name in ("href", "src", "action", "data")
    ] == ["data:,"]
    policy = next(
        value for name, value in EMPTY.attributes if name == "content" and "default-src" in value
    )
    assert policy.startswith("default-src 'none';")


# ---- the command ----


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_base(folder)
    random_heads(sample.GPT.from_pretrained(folder / "base"), 3, 0).save_pretrained(
        folder / "heads"
    )
    return folder


@pytest.fixture
def main(directories, monkeypatch, capsys):
    def call(page, *argv) -> str:
        fixed = [
            "--base",
            str(directories / "base"),
            "--heads",
            str(directories / "heads"),
            "--prompt",
            "def </script>",
            "--tree",
            "3x2",
            "--device",
            "cpu",
        ]
        monkeypatch.setattr(sys, "argv", ["sample.py", *fixed, "--trace", str(page), *argv])
        sample.run(sample.main)
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    "flags", [[], ["--temperature", "1"], ["--temperature", "1", "--accept", "typical"]], ids=str
)
def test_the_command_writes_the_generation_that_it_printed(main, flags, tmp_path):
    out = main(tmp_path / "page.html", "--max-new-tokens", "12", *flags)
    content = json.loads(Outline((tmp_path / "page.html").read_text("utf-8")).data)
    assert content["prompt"] == "def </script>"
    text = "".join(part for record in content["steps"] for part in record["text"])
    assert out.startswith("def </script>" + text + "\n\ntree ")
    assert sum(len(record["emitted"]) for record in content["steps"]) == 12
    assert f"({12} tokens, {len(content['steps']) - 1} steps " in out
    assert f"text         {content['difference']}\n" in out and f": {content['why']}\n" in out
    tree, plain = content["costs"]
    assert f"step cost    {tree / plain:.2f} " in out
    assert list(contents(tmp_path)) == ["page.html"]


def test_a_text_of_one_token_has_a_page(main, tmp_path):
    main(tmp_path / "page.html", "--max-new-tokens", "1")
    content = json.loads(Outline((tmp_path / "page.html").read_text("utf-8")).data)
    assert len(content["steps"]) == 1 and content["costs"] == [0, 0]


@pytest.mark.parametrize(
    "name", ["no/such/folder/page.html", ".", "file/page.html", "n" * 300 + ".html", "pipe"]
)
def test_a_page_that_cannot_be_written_is_refused_before_any_work(
    main, name, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(sample, "load_base", lambda *ignored: pytest.fail("work was done"))
    with pytest.raises(SystemExit) as stop:
        main(tmp_path / name)
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert error.startswith("sample.py: error: --trace ") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_page_is_replaced_whole_or_not_at_all(main, tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    file.write_text("the old page")
    written = Path.write_text

    def half(path, text, **more):
        written(path, text[: len(text) // 2], **more)
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(SystemExit) as stop:
        main(file, "--max-new-tokens", "3")
    assert stop.value.code == 2
    assert contents(tmp_path) == {"page.html": b"the old page"}
