"""Properties of --trace: its records are what was decoded, no text can break out of its page."""

import json
import math
import os
import re
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings, strategies as st

import sample
from data import trace as tracing
from data.trace import text_content, write_page
from medusa import Sampling, Step, medusa_generate
from strategies import REAL, SEQUENTIAL, contents, decodings, distribution, next_logits
from strategies import properties, random_gpt, random_heads, rng, small_tokenizer, unit
from tree import Tree

TOKENIZER, VOCABULARY = small_tokenizer(), small_tokenizer().vocab_size
SAMPLINGS = Sampling(), Sampling(0.7, 2), Sampling(0.7, 4), Sampling(1.0, typical=True)


@settings(properties, max_examples=60)
@given(decodings((*REAL, *SEQUENTIAL), room=17), st.sampled_from(SAMPLINGS))
@torch.no_grad()
def test_a_record_says_what_base_and_heads_say_at_each_node(case, sampling):
    """Against whole passes over the text up to each node, without tree, mask or cache."""
    model, heads, tree, prompt, _ = case
    steps = list(medusa_generate(model, heads, tree, prompt, 14, sampling, rng(0)))
    records = [sample.trace_record(step, model, heads, sampling) for step in steps]
    content = text_content(records, TOKENIZER, prompt, model.config.eos_ids)
    text, temperature = list(prompt), sampling.temperature or 1.0
    shown = TOKENIZER.decode(prompt[-1:])
    for record in json.loads(json.dumps(content))["steps"]:
        tokens, targets, path = record["tokens"], record["targets"], record["path"]
        hidden = model(torch.tensor([text[:-1] or text]))[0, -1]
        lm_head, K = heads.truncated(model.lm_head), heads.config.num_heads
        texts, base = [text], []
        for node, parent in enumerate(record["tree"]["parents"]):
            # What the base says after the node, and the probabilities of the node's token.
            if node > 0:
                texts.append([*texts[parent], tokens[node]])
                depth = len(texts[node]) - len(text)
                seen = (texts[parent][-depth:] + [0] * K)[:K]
                logits = heads(hidden, lm_head, unit(model, torch.tensor(seen)))[depth - 1]
                index = heads.index_of(torch.tensor(tokens[node]))
                expected = base[parent][tokens[node]], distribution(logits, temperature)[index]
                found = record["base_probs"][node], record["head_probs"][node]
                assert found == pytest.approx(expected, abs=1e-6)
            logits = next_logits(model, texts[node])
            base.append(distribution(logits, temperature, sampling.top_k))
            greedy = distribution(logits, 0)[targets[node]] == 1
            assert greedy if sampling.temperature == 0 else base[node][targets[node]] > 0
            entropy = -sum(p * math.log(p) for p in base[node] if p > 0)
            threshold = min(0.09, 0.3 * math.exp(-entropy))
            assert record["thresholds"][node] == pytest.approx(threshold, abs=1e-6)
        # The path is the text.
        everything = [tokens[node] for node in path[1:]] + [targets[path[-1]]]
        assert tokens[0] == text[-1] and record["emitted"] == everything[: len(record["emitted"])]
        text += record["emitted"]
        shown += "".join(record["text"])
    said = [token for token in text[len(prompt) :] if token not in model.config.eos_ids]
    assert shown == TOKENIZER.decode([*prompt[-1:], *said])


# ---- the page ----
ODD = ["</script ", "<!--", "<script>", "{{trace}}", "&lt;", "\u2028", "\u202e", "\x00", '"', "\\"]
ODD += ["'", "\u05d0\u0628", "\U0001f469\u200d\U0001f680"]
odd_text = st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=6).map("".join)


def fake(steps: list[list[int]], prompt: str) -> dict:
    """The page of a base that says the tokens of `steps`; all guesses of its heads are right."""
    prompt_tokens, V, records = TOKENIZER.opening(prompt), VOCABULARY + 4, []
    model = random_gpt(0, V, eos=TOKENIZER.eos)
    heads, root = random_heads(model, max(map(len, steps)), 0), prompt_tokens[-1]
    for emitted in steps:
        nodes = list(range(len(emitted)))
        tree = Tree(tuple(node - 1 for node in nodes), (-1,) + (0,) * (len(nodes) - 1))
        tokens, logits = torch.tensor([root, *emitted[:-1]]), 9 * torch.eye(V).double()[emitted]
        step = Step(emitted, tree, tokens, nodes, torch.zeros(8).double(), logits, None)
        records.append(sample.trace_record(step, model, heads, Sampling()))
        root = emitted[-1]
    about = {"prompt": prompt, "why": "<b>why</b>", "difference": "</script><b>", "typical": False}
    content = text_content(records, TOKENIZER, prompt_tokens, (TOKENIZER.eos,))
    return about | {"temperature": 0.0, "times": [[0.002], [0.001]]} | content


class Outline(HTMLParser):
    """What a browser would find: the elements that are opened, and the text of the data."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=False)
        self.tags, self.attributes, self.data, self.inside = [], [], "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = ("id", "trace") in attrs

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        self.data += data if self.inside else ""


def data_of(file: Path) -> dict:
    return json.loads(Outline(file.read_text("utf-8")).data)


EMPTY = Outline(tracing.TEMPLATE.read_text("utf-8").replace("{{trace}}", ""))
any_step = st.lists(st.integers(0, VOCABULARY + 3), min_size=1, max_size=4)
any_step |= odd_text.filter(bool).map(TOKENIZER.encode)


@settings(properties, max_examples=60)
@given(steps=st.lists(any_step, min_size=1, max_size=4), prompt=odd_text)
def test_any_token_and_any_text_come_through_and_break_no_page(tmp_path_factory, steps, prompt):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, fake(steps, prompt))
    text = path.read_text("utf-8")
    outline = Outline(text)
    content = json.loads(outline.data)
    assert not set("<>&") & set(outline.data)
    assert outline.tags == EMPTY.tags and outline.attributes == EMPTY.attributes and text.isascii()
    assert [record["emitted"] for record in content["steps"]] == steps
    assert content["prompt"] == prompt
    for token in chain.from_iterable(steps):
        alone = TOKENIZER.decode([token])
        name = [TOKENIZER.piece(token)] if alone in ("", "\ufffd") else alone
        assert content["names"][str(token)] == name


def test_the_page_needs_nothing_from_anywhere():
    text = tracing.TEMPLATE.read_text("utf-8")
    loads = r"//\w|@import|url\(|\bsrc=|fetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon"
    assert text.count("{{trace}}") == 1 and not re.search(loads, text)
    links = [value for name, value in EMPTY.attributes if name in ("href", "src", "action", "data")]
    assert links == ["data:,"]
    assert any(str(value).startswith("default-src 'none';") for _, value in EMPTY.attributes)


# ---- the command ----
@pytest.mark.parametrize("flags", ["", "--temperature 1", "--temperature 1 --accept typical"])
def test_the_command_writes_the_generation_that_it_printed(run_sample, flags, tmp_path):
    file = tmp_path / "pages" / "a.html"
    flags = ["--tree", "3x2", "--trace", file, "--prompt", "def </script>", *flags.split()]
    out, content = run_sample(*flags), data_of(file)
    text = "".join(part for record in content["steps"] for part in record["text"])
    assert out.startswith(content["prompt"] + text + "\n\n")
    tokens = sum(len(record["emitted"]) for record in content["steps"])
    assert f" {tokens - 1} tokens in {len(content['steps']) - 1} steps" in out
    assert f"text         {content['difference']}\n" in out and f": {content['why']}\n" in out
    ours, plain = map(fmean, content["times"])
    assert f"step cost    {ours / plain:.2f} " in out
    assert out.endswith(f"\ntrace        {file}\n")
    run_sample(*flags, "--max-new-tokens", 1)
    assert data_of(file)["times"] == [[], []]
    assert list(contents(file.parent)) == ["a.html"]


@pytest.mark.parametrize("name", [".", "file/a.html", "n" * 300, "pipe"])
def test_a_page_that_cannot_be_written_is_refused_before_any_work(run_sample, name, tmp_path):
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with patch.object(sample, "load_base", side_effect=AssertionError("work was done")):
        with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
            run_sample("--trace", tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
