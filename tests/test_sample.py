"""Properties of sample.py: its stream of text, its choice of a tree, its summary, its refusals."""

import io
import itertools
import json
import math
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn

import sample
from data.tokenizer import Tokenizer, train_tokenizer
from data.trace import TextStream
from medusa import Sampling
from model import GPT, ModelConfig
from sample import Run, SampleConfig, difference, gap_at, pick_tree, timed_run
from strategies import distribution, markov_gpt, next_logits, properties
from strategies import random_gpt, random_heads, rank_data, rng  # isort: skip
from tree import cartesian_tree, prefix_counts, tree_from_paths


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([Path(__file__).read_text("utf-8")], 400)


# ---- text on the terminal ----


def streamed(steps, eos_ids=(), terminal=False) -> list[str]:
    """What is on the screen after each of these steps, and in the end."""
    out, seen, stream = io.StringIO(), [], TextStream(tokenizer(), tokenizer().encode("x"))
    out.isatty = lambda: terminal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        for emitted in steps:
            sample.print_step(emitted, eos_ids, stream)
            seen.append(out.getvalue())
    return [*seen, out.getvalue() + stream.rest()]


@st.composite
def cut(draw, tokens):
    tokens = draw(tokens)
    places = sorted(draw(st.sets(st.integers(1, len(tokens) - 1)))) if len(tokens) > 1 else []
    return [tokens[a:b] for a, b in zip([0, *places], [*places, len(tokens)])]


def joined(steps) -> str:
    return tokenizer().decode(itertools.chain.from_iterable(steps))


ODD = "\u00e9", "\u20ac", "\U0001f469\u200d\U0001f680", "\ufffd", "\u2581", "\0", "self.", " ", "\n"
strings = st.lists(st.sampled_from(ODD) | st.text(max_size=2), max_size=9).map("".join)
whole = strings.filter(lambda text: not {"\ufffd", "\x1b", "("} & set(text))
# Most of them bytes, in no valid order.
any_tokens = st.lists(st.integers(0, 399) | st.integers(3, 258), max_size=20)


@settings(properties, max_examples=400)
@given(cut(strings.map(lambda text: tokenizer().encode(text)) | any_tokens))
def test_the_streamed_text_is_the_text_of_all_tokens(steps):
    assert streamed(steps)[-1] == joined(steps)


def test_a_space_at_the_start_of_a_token_is_kept():
    """Though the tokenizer drops it at the start of a text."""
    stream = TextStream(SimpleNamespace(decode=lambda ids: " ".join(map(str, ids))), [7])
    assert [stream.push(8), stream.push(9)] == [" 8", " 9"]


@properties
@given(cut(whole.map(lambda text: tokenizer().encode(text + "("))))
def test_whole_characters_are_on_the_screen_after_their_step_and_eos_never_is(steps):
    [eos] = tokenizer().encode("(")
    for n, printed in enumerate(streamed(steps)[:-1], start=1):
        assert printed == joined(steps[:n]).rstrip("\ufffd")
    assume(eos == steps[-1][-1])
    assert streamed(steps, (eos,))[-1] + "(" == joined(steps)


@properties
@given(cut(st.text("abcdefgh:=+", max_size=30).map(list)))
def test_on_a_terminal_an_accepted_guess_has_the_colour_of_its_depth(steps):
    expected = ""
    for letters in steps:
        for letter, colour in zip(letters[:-1], itertools.cycle((32, 36, 34, 35, 33, 31))):
            expected += f"\033[{colour}m{letter}\033[0m"
        expected += "".join(letters[-1:])  # the next root has no colour
    tokens = [[tokenizer().encode(letter)[0] for letter in letters] for letters in steps]
    with pytest.MonkeyPatch.context() as patch:
        for no_color, shown in ("", expected), ("1", joined(tokens)):
            patch.setenv("NO_COLOR", no_color)
            assert streamed(tokens, terminal=True)[-1] == shown


# ---- the tree ----


def calibration(rows) -> dict:
    """One temperature's entry of calibration.json, as train.py writes it."""
    prefixes = {" ".join(map(str, path)): n for path, n in prefix_counts(rows).items() if path}
    return {"top1": [], "top5": [], "steps": len(rows), "prefixes": prefixes}


def write(directory: Path, entries: dict) -> Path:
    (directory / "calibration.json").write_text(json.dumps(entries), "utf-8")
    return directory


ROWS = [(0, 0, 0)] * 5 + [(0, 1, 0)] * 3 + [(1, 0, 0)] * 2 + [(2, 2, 2)]
GOOD = calibration(ROWS)


@cache
def small():
    model = random_gpt(3, vocab_size=6, context=128)
    return model, random_heads(model, 3, 1)


def pick(choice, directory=None):
    return pick_tree(str(choice), *small(), directory, Sampling(), [1, 2])


@properties
@given(st.lists(st.integers(1, 4), min_size=2, max_size=3))
def test_widths_name_the_cartesian_tree_and_a_json_file_its_rank_paths(tmp_path_factory, widths):
    file, name = tmp_path_factory.getbasetemp() / "tree.json", "x".join(map(str, widths))
    levels = [itertools.product(*map(range, widths[:depth])) for depth in range(len(widths) + 1)]
    paths = list(itertools.chain(*levels))
    file.write_text(json.dumps(paths[:0:-1]))
    assert pick(name) == (tree_from_paths(paths[1:]), f"Cartesian, widths {name}")
    assert pick(file) == (tree_from_paths(paths[1:]), f"from {file}")


@pytest.mark.parametrize("n", [*range(2, 8), 99])
def test_a_number_names_the_most_frequent_prefixes(n, tmp_path):
    tree, why = pick(n, write(tmp_path, {"0.0": GOOD}))
    counts = prefix_counts(ROWS)
    most = sorted(counts.values(), reverse=True)[:n]
    assert sorted((counts[path] for path in tree.paths), reverse=True) == most
    assert why.startswith("calibrated at temperature 0.0") and ("no more" in why) == (n == 99)


@properties
@given(rank_data(3, 4), st.data())
def test_auto_takes_the_tree_of_most_expected_tokens_per_second(tmp_path_factory, rows, data):
    counts = sorted((n for path, n in prefix_counts(rows).items() if path), reverse=True)
    sizes = {1} | {min(size, len(counts) + 1) for size in sample.SIZES}
    costs = {size: data.draw(st.integers(1, 40)) / 8 for size in sorted(sizes)}
    expected = {n: 1 + sum(counts[: n - 1]) / len(rows) for n in costs}
    speed_ups = {n: expected[n] * costs[1] / costs[n] for n in costs}
    directory = write(tmp_path_factory.getbasetemp(), {"0.0": calibration(rows)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "step_costs", lambda *_: costs)
        tree, why = pick("auto", directory)
    best = max(speed_ups[n] for n in sizes if n > 1)
    assert speed_ups[len(tree)] > 0.969 * best
    assert sum(prefix_counts(rows)[path] for path in tree.paths[1:]) == sum(counts[: len(tree) - 1])
    found = re.search(r"0.0; best of (\d+) sizes, expected speed-up (.*)x", why).groups()
    assert int(found[0]) == len(sizes) - 1 and abs(float(found[1]) - speed_ups[len(tree)]) < 0.0051


def costs_by(seconds_of, patience=math.inf):
    """step_costs, and the sizes in turn, if the n-th decoding, over this tree, takes so long."""
    sizes = []

    def decode(_, heads, tree, *more, **seed):
        sizes.append(len(tree))
        return seconds_of(len(sizes) - 1, len(tree))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "PATIENCE", patience)
        patch.setattr(sample, "decode", decode)
        patch.setattr(sample, "timed_run", lambda seconds: Run([], list(seconds)[1:]))
        trees = [cartesian_tree([n - 1]) for n in sample.SIZES]
        return sample.step_costs(*small(), trees, [1], Sampling()), sizes


def test_a_step_cost_is_the_minimum_of_the_steps_after_the_warm_up_also_if_the_machine_is_slow():
    """It becomes slow within the third of five rounds, after the plain steps of that round."""
    plain, tree, turns = [50, 90, 2, 9, 4, 3], [70, 80, 1, 5, 6, 800], 1 + len(sample.SIZES)

    def seconds_of(turn, n):
        slow = 4 if turn > 2.5 * turns else 1
        return [slow * seconds for seconds in (plain if n == 1 else tree)]

    costs, _ = costs_by(seconds_of)
    assert costs == pytest.approx({1: 2} | {n: 1 for n in sample.SIZES})


@pytest.mark.parametrize("seconds, rounds", [(1.0, 1), (0.1, 2), (0.01, 5)])
def test_trees_are_timed_in_whole_rounds_until_patience_is_spent(seconds, rounds):
    """Three steps are timed of each of eleven sizes: a round takes 33 times as long as a step."""
    _, sizes = costs_by(lambda turn, n: [9, 9] + [seconds] * 3, patience=5.0)
    assert sizes == [1, *sample.SIZES] * rounds


@pytest.mark.parametrize("context, eos", [(64, 1), (64, 3), (12, None), (40, None)])
def test_a_text_that_ends_at_once_and_a_small_context_still_get_a_tree(context, eos, tmp_path):
    """The text is 1 2 3 4 5 0 1 ..., up to EOS; the model itself keeps its EOS."""
    model = markov_gpt(9.0 * torch.eye(6).roll(1, 1), context=context, eos=eos)
    directory, heads = write(tmp_path, {"0.0": GOOD}), random_heads(model, 3, 1)
    tree, why = pick_tree("auto", model, heads, directory, Sampling(), [0])
    assert 2 <= len(tree) <= len(prefix_counts(ROWS)) and "best of " in why
    assert model.config.eos_token_id == eos


@properties
@given(st.floats(0, 3), st.sets(st.sampled_from(["0.0", "0.3", "0.7", "1.0", "2"]), min_size=1))
def test_the_calibration_is_that_of_the_nearest_temperature(tmp_path_factory, wanted, measured):
    entries = {key: calibration([(0,)] * (2 + i)) for i, key in enumerate(sorted(measured))}
    directory = write(tmp_path_factory.getbasetemp(), entries)
    counts, nearest = sample.read_calibration(directory, wanted)
    assert counts[()] == counts[(0,)] == entries[nearest]["steps"]
    assert abs(float(nearest) - wanted) == min(abs(float(key) - wanted) for key in measured)


PREFIXES = {}, [[0, 3]], {"a": 3}, {"0.5": 3}, {"-1": 3}, {"0 0": 3}
BROKEN = [{"0.0": GOOD | {"prefixes": prefixes}} for prefixes in PREFIXES]
BROKEN += [{}, {"0.0": []}, {"0.0": {}}, {"warm": GOOD}, {"0.0": GOOD | {"steps": 0}}]


@pytest.mark.parametrize("entries", BROKEN)
@pytest.mark.parametrize("choice", ["auto", "2"])
def test_a_broken_calibration_is_refused(choice, entries, tmp_path):
    with pytest.raises(ValueError):
        pick(choice, write(tmp_path, entries))


@pytest.mark.parametrize("choice", "|x|4x|x4|4x-1|-3|4.5|many|auto2|0x2|2x0|99x99|0|1".split("|"))
def test_a_choice_of_tree_that_means_nothing_is_refused(choice, tmp_path):
    with pytest.raises(ValueError, match="tree|widths|nodes|leaves"):
        pick(choice, write(tmp_path, {"0.0": GOOD}))


# ---- the clock, the comparison, packed matrices ----

timings = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 50))
samplings = st.sampled_from([Sampling(), Sampling(0.3, 0, 0.9), Sampling(1.0, 3, 0.9)])


@properties
@given(st.lists(timings, min_size=1, max_size=8), st.integers(0, 99))
def test_the_time_of_a_run_is_that_of_the_steps_after_the_prompts_without_printing(taken, printing):
    clock, shown = SimpleNamespace(now=1000), []
    clock.perf_counter = lambda: clock.now

    def steps():
        for tokens, seconds in taken:
            clock.now += seconds
            yield SimpleNamespace(emitted=tokens)

    def show(step):
        shown.append(step.emitted)
        clock.now += printing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "time", clock)
        found = timed_run(steps(), show)
    emitted, durations = zip(*taken)
    assert found == Run(list(itertools.chain(*emitted)), list(durations[1:]))
    assert shown == list(emitted)


@properties
@given(st.integers(0, 99), st.integers(0, 3), samplings)
def test_a_difference_is_reported_with_its_place_and_gap(seed, at, sampling):
    """The gap of the logits, or of the log scores with the shared noise."""
    model, plain, generator = random_gpt(seed), [3, 0, 4, 1], rng(seed)
    noise = [torch.empty(5).double().exponential_(generator=generator) for _ in range(4)][at]
    scores = next_logits(model, [1, 2, *plain[:at]]).tolist()
    if sampling.temperature:
        probs = distribution(scores, sampling.temperature, sampling.top_k, sampling.top_p)
        pairs = zip(probs, noise.tolist())
        scores = [math.log(prob / wait) if prob > 0 else -math.inf for prob, wait in pairs]
    assume(scores[plain[at]] > -math.inf)
    for token in set(range(5)) - {plain[at]}:
        ours = [*plain[:at], token, *plain[at + 1 :]]
        gap = gap_at(model, [1, 2], ours, plain, sampling, seed)
        assert math.isclose(gap, abs(scores[token] - scores[plain[at]]), abs_tol=1e-9)
        said = f"differs from token {at + 1} on"
        reported = difference(model, [1, 2], ours, plain, sampling, seed)
        assert reported == f"{said}, where the two were {gap:.1e} apart"
        reported = difference(model, [1, 2], ours, plain, Sampling(1.0, typical=True), seed)
        assert reported == f"{said}: typical acceptance is lossy"


@properties
@given(st.integers(2, 400), st.integers(1, 99), st.floats(0.01, 9), st.floats(0.01, 9))
def test_the_summary_adds_up_and_ends_with_the_speed_up(tokens, steps, seconds, plain_seconds):
    ours = Run([0] * tokens, [seconds / steps] * steps)
    plain = Run([0] * tokens, [plain_seconds / (tokens - 1)] * (tokens - 1))
    lines = sample.summary(ours, plain, "identical", cartesian_tree([2, 3]), "why").splitlines()
    found = dict(re.split(" {2,}", line, maxsplit=1) for line in lines)
    assert list(found) == ["tree", "tokens/step", "step cost", "tokens/s", "text", "speed-up"]
    assert found["tree"] == "9 nodes, 2 deep: why" and found["text"] == "identical"
    new = tokens - 1  # after the prompt's own step, which is not timed
    expected = {"tokens/step": [new / steps, tokens, steps], "speed-up": [plain_seconds / seconds]}
    expected |= {"tokens/s": [new / seconds, new / plain_seconds]}
    expected |= {"step cost": [seconds / steps / (plain_seconds / new)]}
    for name, values in expected.items():
        numbers = [float(number) for number in re.findall(r"[\d.]+", found[name])]
        assert numbers == pytest.approx(values, abs=0.51 if name == "tokens/s" else 0.00501)


EXACT = [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)]


@pytest.mark.parametrize("dtype, tolerance", EXACT, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.inference_mode()
def test_packed_matrices_give_the_same_logits_for_any_number_of_rows(dtype, tolerance, kind):
    """Tied embeddings, biases (qwen2), matrices above and below the size that is packed."""
    model = GPT(ModelConfig(512, 512, 64, 1, 2, 1, 64, model_type=kind)).to(dtype).eval()
    for weight in model.parameters():
        weight.copy_(0.05 * torch.randn(weight.shape, generator=rng(0)))
    inputs = [torch.randint(512, (1, n), generator=rng(n)) for n in (1, 2, 3, 8, 16, 17, 40)]
    expected = [model.lm_head(model(tokens)) for tokens in inputs]
    sample.pack_linears(model)
    for tokens, logits in zip(inputs, expected):
        torch.testing.assert_close(model.lm_head(model(tokens)), logits, rtol=0, atol=tolerance)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert model.lm_head.weight is model.embed_tokens.weight


# ---- the command ----


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """sample.py with a tiny base that has learnt nothing, and with heads for it."""
    torch.manual_seed(0)
    model, base = GPT(ModelConfig(400, 16, 24, 1, 2, 1, 96, eos_token_id=None)), tmp_path / "base"
    model.save_pretrained(base)
    tokenizer().save(base)
    random_heads(model, 3, 0).save_pretrained(base / "heads")
    write(base / "heads", {"0.0": GOOD})

    def call(*flags) -> str:
        fixed = f"sample.py --base {base} --tree 6 --device cpu --dtype float64".split()
        monkeypatch.setattr(sys, "argv", [*fixed, *flags])
        sample.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("flags", ["", "--temperature 0.8 --top-k 9 --top-p 0.9 --seed 3"])
def test_the_prompt_comes_first_and_the_text_is_that_of_plain_decoding(main, flags, tmp_path):
    prompt = "\ufeffx =\r\n\t'\u20ac'\r"
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    flags = [*flags.split(), "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens"]
    out = main(*flags, "16")
    assert out.startswith(prompt) and "\ntext         identical, token for token\n" in out
    assert " 16 tokens, " in out and " 1 tokens, 0 steps " in main(*flags, "1")
    room = 96 - len(tokenizer().opening(prompt))
    assert f" {room} tokens, " in main(*flags, "500")
    # Without heads, the same text.
    (tmp_path / "base" / "heads").rename(tmp_path / "elsewhere")
    assert main(*flags, "16").partition("tokens/s, plain")[0][:-9] in out


def test_the_flags_reach_the_sampling():
    flags = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "accept": "typical", "epsilon": 0.2}
    assert SampleConfig(**flags).sampling() == Sampling(0.7, 5, 0.9, True, 0.2)


REFUSED = [({"top_k": 3}, "--top-k"), ({"top_p": 0.9}, "--top-p"), ({"epsilon": 0.2}, "--epsilon")]
REFUSED += [({"accept": "typical"}, "--temperature"), ({"prompt": "x", "chat": "y"}, "--chat")]
REFUSED += [({"seed": 1 << 63}, "--seed"), ({"temperature": 1.0, "epsilon": 0.2}, "--epsilon")]


@pytest.mark.parametrize("flags, message", REFUSED, ids=str)
def test_contradictory_or_meaningless_flags_are_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        config = SampleConfig(**flags)
        config.sampling(), config.text()
