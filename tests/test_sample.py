"""Laws of sampling's own part: the streamed text is the text, the tree is the one that pays, the summary is honest, contradictions are refused."""

import io
import itertools
import json
import math
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import sample
from data.calibration import read_calibration
from data.difference import first_difference, gap_at
from data.printer import Printer
from data.request import sampling_of
from data.tokenizer import Tokenizer, train_tokenizer
from medusa import Sampling
from model import GPT, ModelConfig
from sample import Run, SampleConfig, compare, pick_tree, timed_run
from strategies import (
    distribution,
    markov_gpt,
    next_logits,
    properties,
    random_gpt,
    random_heads,
    rank_data,
    rng,
)
from tree import Tree, cartesian_tree, prefix_counts, tree_from_paths

COLOURS = ("32", "36", "34", "35", "33", "31")


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([Path(__file__).read_text("utf-8")], 400)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def streamed(steps, ends=(), out=None, each=lambda printed: None) -> str:
    """What a Printer writes for these steps."""
    out = io.StringIO() if out is None else out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        printer = Printer(tokenizer(), tokenizer().encode("x"))
        for step in steps:
            printer.step(step, ends)
            each(out.getvalue())
        printer.finish()
    return out.getvalue()


@st.composite
def cut(draw, tokens):
    """Tokens, cut into steps of one token and more."""
    tokens = draw(tokens)
    places = sorted(draw(st.sets(st.integers(1, len(tokens) - 1)))) if len(tokens) > 1 else []
    return [tokens[a:b] for a, b in zip([0, *places], [*places, len(tokens)])]


ODD = "\u00e9", "\u20ac", "\U0001f469\u200d\U0001f680", "\ufffd", "\u2581", "\0", "self.", " ", "\n"
strings = st.lists(st.sampled_from(ODD) | st.text(max_size=2), max_size=9).map("".join)
encoded = strings.map(lambda string: tokenizer().encode(string))
any_tokens = st.lists(
    st.integers(0, 399) | st.sampled_from(range(3, 259)), max_size=20
)  # most of them bytes, in no valid order


# ---- text on the terminal ----


@settings(properties, max_examples=400)
@given(cut(encoded | any_tokens))
def test_the_streamed_text_is_the_text_of_all_tokens(steps):
    """Also where a character's bytes come in several steps, and where the bytes are no character at all."""
    tokens = [token for step in steps for token in step]
    assert streamed(steps) == tokenizer().decode(tokens) + "\n"


@properties
@given(
    cut(
        strings.filter(lambda string: "\ufffd" not in string).map(
            lambda string: tokenizer().encode(string)
        )
    )
)
def test_after_each_step_all_whole_characters_are_on_the_screen(steps):
    seen = []
    streamed(steps, each=seen.append)
    for n, printed in enumerate(seen, start=1):
        assert printed == tokenizer().decode(
            [token for step in steps[:n] for token in step]
        ).rstrip("\ufffd")


@properties
@given(strings.filter(lambda string: "\ufffd" not in string), st.integers(0, 3))
def test_eos_is_not_printed_whatever_its_piece(string, depth):
    eos = tokenizer().encode("(")[0]
    tokens = tokenizer().encode(string.replace("(", ""))
    assume(eos not in tokens)
    at = max(len(tokens) - depth, 0)
    assert (
        streamed([tokens[:at], [*tokens[at:], eos]], ends=(eos,))
        == tokenizer().decode(tokens) + "\n"
    )
    assert streamed([tokens[:at], [*tokens[at:], eos]]) == tokenizer().decode([*tokens, eos]) + "\n"


ascii_steps = cut(
    st.lists(
        st.sampled_from("abcdefgh():=+").map(lambda char: tokenizer().encode(char)[0]), max_size=30
    )
)


@properties
@given(ascii_steps)
def test_on_a_terminal_an_accepted_guess_has_the_colour_of_its_depth_and_the_root_none(steps):
    expected = ""
    for step in steps:
        for depth, token in enumerate(step, start=1):
            text = tokenizer().decode([token])
            expected += (
                text if depth == len(step) else f"\033[{COLOURS[(depth - 1) % 6]}m{text}\033[0m"
            )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NO_COLOR", raising=False)
        assert streamed(steps, out=Terminal()) == expected + "\n"
        patch.setenv("NO_COLOR", "1")
        assert "\033" not in streamed(steps, out=Terminal())
        patch.delenv("NO_COLOR")
        assert "\033" not in streamed(steps, out=io.StringIO())


@properties
@given(
    cut(
        strings.filter(lambda string: not {"\x1b", "\ufffd"} & set(string)).map(
            lambda string: tokenizer().encode(string)
        )
    )
)
def test_without_its_colours_the_text_is_the_plain_text(steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NO_COLOR", raising=False)
        coloured = streamed(steps, out=Terminal())
    assert re.sub(r"\033\[\d+m", "", coloured) == streamed(steps)


# ---- the tree ----


def calibration(rows) -> dict:
    """One temperature's entry of calibration.json, as train.py writes it."""
    counts = prefix_counts(rows)
    return {
        "top1": [],
        "top5": [],
        "steps": len(rows),
        "prefixes": {" ".join(map(str, path)): n for path, n in counts.items() if path},
    }


def write(directory: Path, entries: dict) -> Path:
    (directory / "calibration.json").write_text(json.dumps(entries), "utf-8")
    return directory


ROWS = [(0, 0, 0)] * 5 + [(0, 1, 0)] * 3 + [(1, 0, 0)] * 2 + [(2, 2, 2)]


@cache
def small():
    model = random_gpt(3, vocab_size=6, context=128)
    return model, random_heads(model, 3, 1)


def pick(choice, directory=None, sampling=Sampling(), prompt=(1, 2)):
    return pick_tree(str(choice), *small(), directory, sampling, list(prompt))


@properties
@given(st.lists(st.integers(1, 4), min_size=2, max_size=3))
def test_widths_name_the_cartesian_tree(widths):
    text = "x".join(map(str, widths))
    tree, why = pick(text)
    assert set(tree.paths) == {
        path for d in range(len(widths) + 1) for path in itertools.product(*map(range, widths[:d]))
    }
    assert why == f"Cartesian, widths {text}"


def test_a_json_file_names_its_rank_paths(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text("[[0, 1], [0], [2]]")
    tree, why = pick(file)
    assert tree == tree_from_paths([[0], [2], [0, 1]])
    assert why == f"from {file}"


@pytest.mark.parametrize("n", range(2, 8))
def test_a_number_names_the_most_frequent_prefixes(n, tmp_path):
    tree, why = pick(n, write(tmp_path, {"0.0": calibration(ROWS)}))
    counts = prefix_counts(ROWS)
    assert len(tree) == n
    assert (
        sorted((counts[path] for path in tree.paths), reverse=True)
        == sorted(counts.values(), reverse=True)[:n]
    )
    assert why == "calibrated at temperature 0.0, size as asked for"


def test_a_number_beyond_the_calibration_does_not_claim_the_size_asked_for(tmp_path):
    tree, why = pick(99, write(tmp_path, {"0.0": calibration(ROWS)}))
    assert len(tree) == len(prefix_counts(ROWS))
    assert "size as asked for" not in why


@settings(properties, max_examples=200)
@given(rank_data(3, 4), st.data())
def test_auto_takes_the_tree_that_promises_the_most_tokens_a_second(tmp_path_factory, rows, data):
    counts = sorted((n for path, n in prefix_counts(rows).items() if path), reverse=True)
    largest = data.draw(st.integers(2, len(counts) + 1))
    measured = {1, largest} | data.draw(st.sets(st.integers(2, largest)))
    costs = {n: data.draw(st.integers(1, 40)) / 8 for n in sorted(measured)}

    def gain(n: int) -> float:
        return (1 + sum(counts[: n - 1]) / len(rows)) * costs[1] / costs[n]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "step_costs", lambda *ignored: costs)
        tree, why = pick("auto", write(tmp_path_factory.getbasetemp(), {"0.0": calibration(rows)}))
    assert math.isclose(gain(len(tree)), max(gain(n) for n in costs if n > 1))
    assert sum(prefix_counts(rows)[path] for path in tree.paths[1:]) == sum(counts[: len(tree) - 1])
    assert why.startswith(
        f"calibrated at temperature 0.0; {len(tree)} nodes promise the most tokens a second here, by nodes "
    )
    shown = dict(part.split(": ") for part in why.rsplit(" by nodes ")[1].split(", "))
    assert shown.keys() == set(map(str, costs)) - {"1"}
    assert all(
        abs(float(promise.removesuffix("x")) - gain(int(n))) < 0.0051
        for n, promise in shown.items()
    )


def test_step_costs_are_measured_for_plain_decoding_and_for_every_size_that_the_calibration_holds(
    tmp_path,
):
    built = {n: pick(n, write(tmp_path, {"0.0": calibration(ROWS)}))[0] for n in sample.SIZES}
    costs = sample.step_costs(*small(), built.__getitem__, [1, 2], Sampling(0.7), rounds=1)
    assert costs.keys() == {1} | {len(tree) for tree in built.values()}
    assert min(costs.values()) > 0


def test_a_step_cost_is_the_median_of_steps_behind_the_first(monkeypatch):
    """The prompt's own pass and the step that lays out the plan are not in it; the draws of its sampling are."""
    clock, samplings = Clock(), set()

    def steps(seconds, sampling):
        samplings.add(sampling)
        return clock.steps([[0]] * 6, seconds)

    monkeypatch.setattr(sample, "time", clock)
    monkeypatch.setattr(
        sample,
        "plain_generate",
        lambda model, prompt, n, sampling, _: steps([50, 90, 2, 9, 4, 3], sampling),
    )
    monkeypatch.setattr(
        sample,
        "medusa_generate",
        lambda model, heads, tree, prompt, n, sampling, _: steps(
            [70, 80, 1, 5, 6, 8 * len(tree)], sampling
        ),
    )
    costs = sample.step_costs(
        *small(), lambda n: cartesian_tree([n - 1]), [1], Sampling(0.7, 5), steps=5
    )
    assert samplings == {Sampling(0.7, 5)}
    assert costs == pytest.approx({1: 3.5} | {n: 5.5 for n in sample.SIZES})


def test_a_slow_minute_of_the_machine_changes_no_step_cost(monkeypatch):
    """It begins in the middle of the second of three rounds, so that the larger sizes meet it twice and plain decoding once."""
    clock, turn = Clock(), iter(range(3 * (1 + len(sample.SIZES))))

    def steps(seconds):
        slow = 4 if next(turn) > 1.5 * (1 + len(sample.SIZES)) else 1
        return clock.steps([[0]] * 4, [slow * seconds] * 4)

    monkeypatch.setattr(sample, "PATIENCE", math.inf)
    monkeypatch.setattr(sample, "time", clock)
    monkeypatch.setattr(sample, "plain_generate", lambda *_: steps(2.0))
    monkeypatch.setattr(sample, "medusa_generate", lambda *_: steps(3.0))
    costs = sample.step_costs(
        *small(), lambda n: cartesian_tree([n - 1]), [1], Sampling(), rounds=3
    )
    assert costs == pytest.approx({1: 2.0} | {n: 3.0 for n in sample.SIZES})


@pytest.mark.parametrize("seconds, rounds", [(1.0, 1), (0.1, 2), (0.01, 5)])
def test_trees_are_timed_in_whole_rounds_until_patience_is_spent(seconds, rounds, monkeypatch):
    """Three steps are timed of each of eleven sizes: a round takes 33 times as long as a step."""
    clock, decoded = Clock(), []
    monkeypatch.setattr(sample, "PATIENCE", 5.0)
    monkeypatch.setattr(sample, "time", clock)
    monkeypatch.setattr(
        sample,
        "plain_generate",
        lambda *_: decoded.append(1) or clock.steps([[0]] * 5, [9, 9] + [seconds] * 3),
    )
    monkeypatch.setattr(
        sample,
        "medusa_generate",
        lambda model, heads, tree, *_: (
            decoded.append(len(tree)) or clock.steps([[0]] * 5, [9, 9] + [seconds] * 3)
        ),
    )
    sample.step_costs(*small(), lambda n: cartesian_tree([n - 1]), [1], Sampling(), steps=3)
    assert decoded == [1, *sample.SIZES] * rounds


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_prompt_whose_text_ends_at_once_still_gets_a_tree(tokens, tmp_path):
    """Greedy text 1 2 .. EOS: there are fewer steps to time than one would like."""
    model = markov_gpt(9.0 * torch.eye(6).roll(1, 1), context=64, eos=tokens)
    tree, why = pick_tree(
        "auto",
        model,
        random_heads(model, 3, 1),
        write(tmp_path, {"0.0": calibration(ROWS)}),
        Sampling(),
        [0],
    )
    assert 2 <= len(tree) <= len(prefix_counts(ROWS))
    assert why


@pytest.mark.parametrize("context", [12, 40])
def test_a_small_context_still_gets_a_tree(context, tmp_path):
    model = random_gpt(3, vocab_size=6, context=context)
    tree, why = pick_tree(
        "auto",
        model,
        random_heads(model, 3, 1),
        write(tmp_path, {"0.0": calibration(ROWS)}),
        Sampling(),
        [1, 2],
    )
    assert 2 <= len(tree) <= len(prefix_counts(ROWS))
    assert why


@properties
@given(
    st.floats(0, 3),
    st.lists(st.sampled_from(["0.0", "0.3", "0.7", "1.0", "2"]), min_size=1, unique=True),
)
def test_the_calibration_is_that_of_the_nearest_temperature(
    tmp_path_factory, temperature, measured
):
    entries = {key: calibration([(0,)] * (2 + at)) for at, key in enumerate(measured)}
    counts, nearest = read_calibration(write(tmp_path_factory.getbasetemp(), entries), temperature)
    assert counts[()] == counts[(0,)] and counts.keys() == {(), (0,)}
    chosen = measured[counts[()] - 2]
    assert nearest == chosen
    assert abs(float(chosen) - temperature) == min(
        abs(float(key) - temperature) for key in measured
    )


GOOD = calibration(ROWS)
NO_CALIBRATION = [
    {}, {"0.0": []}, {"0.0": {}}, {"0.0": None}, {"warm": GOOD}, {"0.0": GOOD | {"steps": 0}}, {"0.0": GOOD | {"steps": "many"}},
    {"0.0": GOOD | {"steps": -3}}, {"0.0": GOOD | {"prefixes": {}}}, {"0.0": GOOD | {"prefixes": [[0, 3]]}},
    {"0.0": GOOD | {"prefixes": {"a": 3}}}, {"0.0": GOOD | {"prefixes": {"0.5": 3}}}, {"0.0": GOOD | {"prefixes": {"0": "3"}}},
    {"0.0": GOOD | {"prefixes": {"-1": 3}}}, {"0.0": GOOD | {"prefixes": {"0 0": 3}}}, {"0.0": GOOD | {"prefixes": {"0": [3]}}},
]  # fmt: skip


@pytest.mark.parametrize(
    "entries",
    NO_CALIBRATION,
    ids=lambda entries: str(entries).replace(str(GOOD["prefixes"]), "good")[:80],
)
def test_a_broken_calibration_is_refused(entries, tmp_path):
    write(tmp_path, entries)
    for choice in ("auto", "2"):
        with pytest.raises(ValueError):
            pick(choice, tmp_path)


@pytest.mark.parametrize(
    "choice", ["", "x", "4x", "x4", "4x-1", "-3", "4.5", "many", "auto2", "0x2", "2x0", "0", "1"]
)
def test_a_choice_of_tree_that_means_nothing_is_refused(choice, tmp_path):
    with pytest.raises(ValueError, match="tree|widths"):
        pick(choice, write(tmp_path, {"0.0": calibration(ROWS)}))


# ---- the clock and the summary ----


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 1000

    def perf_counter(self):
        return self.now

    def steps(self, emitted, durations):
        for tokens, duration in zip(emitted, durations):
            self.now += duration
            yield tokens


texts = st.lists(st.integers(0, 2), max_size=6)
timings = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 50)),
    min_size=1,
    max_size=8,
)


@properties
@given(timings, st.integers(0, 99))
def test_the_time_of_a_run_is_that_of_the_steps_behind_the_prompt_without_the_printing(
    timings, printing
):
    clock, shown = Clock(), []
    emitted, durations = zip(*timings)

    def show(tokens):
        shown.append(tokens)
        clock.now += printing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "time", clock)
        run = timed_run(clock.steps(emitted, durations), show)
    assert run == Run([token for tokens in emitted for token in tokens], list(durations[1:]))
    assert shown == list(emitted)


def test_a_run_counts_the_tokens_behind_the_prompts_own():
    run = Run(list(range(13)), [0.5, 1.0, 0.25, 0.25])
    assert (run.tokens_per_step, run.tokens_per_second) == (3.0, 6.0)
    assert Run([7], []).tokens_per_step == 0


@settings(properties, max_examples=300)
@given(texts, texts, st.booleans())
def test_first_difference_is_the_length_of_the_common_start(a, b, prefix):
    b = a + b if prefix else b
    common = max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])
    assert first_difference(a, b) == first_difference(b, a) == (None if a == b else common)


@properties
@given(
    st.integers(0, 99),
    st.lists(st.integers(0, 4), min_size=4, max_size=4),
    st.integers(0, 3),
    st.integers(0, 4),
)
def test_the_gap_of_greedy_texts_is_the_difference_of_their_logits(seed, plain, at, other):
    model = random_gpt(seed)
    ours = plain[:at] + [other] + plain[at + 1 :]
    logits = next_logits(model, [1, 2, *plain[:at]])
    gap = gap_at(model, [1, 2], ours, plain, at, Sampling(), 0)
    assert math.isclose(gap, abs(logits[other] - logits[plain[at]]).item(), abs_tol=1e-9)


@properties
@given(
    st.integers(0, 99),
    st.integers(0, 3),
    st.floats(0.3, 2),
    st.integers(0, 3),
    st.sampled_from([0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_the_gap_of_sampled_texts_is_that_of_their_times_in_the_race(
    seed, at, temperature, top_k, top_p, draws
):
    model, plain = random_gpt(seed), [3, 0, 4, 1]
    generator = rng(draws)
    times = [
        torch.empty(5, dtype=torch.float64).exponential_(generator=generator) for _ in range(at + 1)
    ][at].tolist()
    probs = distribution(next_logits(model, [1, 2, *plain[:at]]), temperature, top_k, top_p)
    assume(probs[plain[at]] > 0)
    for token, prob in enumerate(probs):
        gap = gap_at(
            model, [1, 2], [token] * 4, plain, at, Sampling(temperature, top_k, top_p), draws
        )
        expected = (
            abs(math.log(times[token] / prob) - math.log(times[plain[at]] / probs[plain[at]]))
            if prob > 0
            else math.inf
        )
        assert math.isclose(gap, expected, abs_tol=1e-9)


@properties
@given(st.integers(2, 400), st.integers(1, 99), st.floats(0.01, 9), st.floats(0.01, 9))
def test_the_summary_adds_up_and_ends_with_the_speed_up(tokens, steps, seconds, plain_seconds):
    ours, plain = (
        Run([0] * tokens, [seconds / steps] * steps),
        Run([0] * tokens, [plain_seconds / (tokens - 1)] * (tokens - 1)),
    )
    tree = cartesian_tree([2, 3])
    lines = compare(ours, plain, "identical, token for token", tree, "from t.json").splitlines()
    names, values = zip(
        *(re.fullmatch(r"(\S+(?: \S+)?) {2,}(.*)", line).groups() for line in lines)
    )
    assert names == ("tree", "tokens/step", "step cost", "tokens/s", "text", "speed-up")
    assert values[0] == "9 nodes, 2 deep: from t.json"
    assert (
        values[1].startswith(f"{(tokens - 1) / steps:.2f} ")
        and f"({tokens} tokens, {steps} steps " in values[1]
    )
    assert values[2].startswith(f"{seconds / steps * (tokens - 1) / plain_seconds:.2f} ")
    assert (
        values[3]
        == f"{(tokens - 1) / seconds:.0f} with Medusa, {(tokens - 1) / plain_seconds:.0f} plain"
    )
    assert values[4] == "identical, token for token"
    assert values[5] == f"{plain_seconds / seconds:.2f}x"


def test_a_text_of_one_token_has_a_summary_without_figures():
    one = Run([5], [])
    assert (
        compare(one, one, "identical, token for token", Tree((-1, 0), (-1, 0)), "why").splitlines()[
            -1
        ]
        == "speed-up     nanx"
    )


# ---- main, from the prompt to the summary ----


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A tiny base that has learnt nothing, and heads with a calibration."""
    base, heads = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    model = GPT(ModelConfig(400, 16, 24, 1, 2, 1, 96, eos_token_id=None))
    model.save_pretrained(base)
    tokenizer().save(base)
    random_heads(model, 3, 0).save_pretrained(heads)
    write(heads, {"0.0": calibration(ROWS)})
    return base, heads


@pytest.fixture
def main(directories, monkeypatch, capsys):
    base, heads = directories

    def call(*argv) -> str:
        directories = ["--base", str(base), "--heads", str(heads)]
        fixed = ["--prompt", "def f(", "--tree", "6", "--device", "cpu", "--dtype", "float64"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *directories, *fixed, *argv])
        sample.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--temperature", "1"],
        ["--temperature", "0.8", "--top-k", "9", "--top-p", "0.9", "--seed", "3"],
    ],
    ids=str,
)
def test_the_prompt_stands_first_and_the_text_is_plain_decodings_text(main, flags, monkeypatch):
    kept = []
    monkeypatch.setattr(
        sample, "timed_run", lambda *args: kept.append(timed_run(*args)) or kept[-1]
    )
    out = main("--max-new-tokens", "16", *flags)
    ours, plain = kept
    assert ours.tokens == plain.tokens and len(plain.tokens) == 16
    assert out.startswith("def f(" + tokenizer().decode(ours.tokens) + "\n\ntree ")
    assert "\ntext         identical, token for token\n" in out


def test_all_is_compiled_before_the_text_begins(main, compilations, monkeypatch):
    """The time that a compilation takes is no step's. A cache of few rows is of another size behind a short text than behind a long one."""
    monkeypatch.setattr(sample.Compiled, "ROWS", 16)
    before, show = [], sample.Printer.step
    monkeypatch.setattr(
        sample.Printer, "step", lambda *args: before.append(compilations.frame_count) or show(*args)
    )
    out = main("--compile", "--max-new-tokens", "20")
    assert "identical" in out and before[0] == compilations.frame_count > 0


def tampered(monkeypatch, at: int) -> None:
    """Plain decoding says something else at its token `at`, counted from 0."""
    plain_generate = sample.plain_generate

    def other(model, *args):
        for n, (token,) in enumerate(plain_generate(model, *args)):
            yield [(token + 1) % model.config.vocab_size if n == at else token]

    monkeypatch.setattr(sample, "plain_generate", other)


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("flags", [[], ["--temperature", "1"]], ids=str)
def test_a_difference_is_reported_with_its_place_and_gap(main, at, flags, monkeypatch):
    tampered(monkeypatch, at)
    out = main("--max-new-tokens", "8", *flags)
    assert re.search(
        rf"\ntext         differs from token {at + 1} on, where the two were \d\.\de[+-]\d\d apart\n",
        out,
    )


def test_a_difference_under_typical_acceptance_is_called_lossy(main, monkeypatch):
    tampered(monkeypatch, 0)
    out = main("--max-new-tokens", "8", "--temperature", "1", "--accept", "typical")
    assert "\ntext         differs from token 1 on: typical acceptance is lossy\n" in out


def test_one_token_and_a_full_context_end_as_they_should(main):
    assert "(1 tokens, 0 steps after the prompt)" in main("--max-new-tokens", "1")
    room = 96 - 1 - len(tokenizer().encode("def f("))
    assert f"({room} tokens, " in main("--max-new-tokens", "500")


def test_a_prompt_file_is_read_as_it_stands(main, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffx =\r\n\t'\u20ac'\r".encode())
    assert main(
        "--prompt", sample.DEFAULT_PROMPT, "--prompt-file", str(file), "--max-new-tokens", "2"
    ).startswith("\ufeffx =\r\n\t'\u20ac'\r")


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:99", "meta", "hpu"])
def test_a_device_that_cannot_be_used_is_refused_by_name(main, device):
    with pytest.raises(ValueError, match=f"--device {device}"):
        main("--device", device)


# ---- what the flags ask for ----


def test_the_flags_reach_the_sampling():
    assert sampling_of(SampleConfig()) == Sampling()
    assert (
        sampling_of(SampleConfig(accept="greedy"))
        == sampling_of(SampleConfig(accept="lossless"))
        == Sampling()
    )
    flags = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    assert (
        sampling_of(SampleConfig(**flags))
        == sampling_of(SampleConfig(**flags, accept="lossless"))
        == Sampling(0.7, 5, 0.9)
    )
    assert sampling_of(SampleConfig(**flags, accept="typical", epsilon=0.2)) == Sampling(
        0.7, 5, 0.9, True, 0.2
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"accept": "greedy", "temperature": 0.5}, "--accept greedy"),
        ({"top_k": 3}, "--top-k"),
        ({"top_p": 0.9}, "--top-p"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_k": 3, "accept": "typical"}, "--top-k"),
        ({"epsilon": 0.2}, "--epsilon"),
        ({"epsilon": 0.2, "accept": "lossless", "temperature": 1.0}, "--epsilon"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
        ({"temperature": 1.0, "top_p": math.nan}, "top_p"),
        ({"accept": "typical"}, "--accept typical needs --temperature"),
        ({"accept": "typical", "temperature": 1.0, "epsilon": 0.0}, "epsilon"),
        ({"accept": "typical", "temperature": 1.0, "epsilon": math.nan}, "epsilon"),
    ],
    ids=str,
)
def test_contradictory_or_meaningless_sampling_is_refused_by_name(flags, says):
    with pytest.raises(ValueError, match=says):
        sampling_of(SampleConfig(**flags))


@pytest.mark.parametrize("n", [0, -4])
def test_there_must_be_something_to_decode(n):
    with pytest.raises(ValueError, match="max_new_tokens"):
        SampleConfig(max_new_tokens=n)
