"""Properties of sample.py: its stream of text, its choice of a tree, its summary, its refusals."""

import io
import itertools
import json
import math
import os
import re
import sys
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn

import sample
from data.rows import read_shards
from data.tokenizer import Tokenizer, train_tokenizer
from data.trace import TextStream
from medusa import MedusaHeads, Sampling
from model import GPT, ModelConfig, write_safetensors
from sample import SampleConfig, first_difference, pick_tree, timed_run
from strategies import markov_gpt, next_logits, properties
from strategies import random_gpt, random_heads, rank_data, refused, rng, small_tokenizer
from train import sample_rows
from tree import cartesian_tree, prefix_counts, tree_from_paths


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([Path(__file__).read_text("utf-8")], 400)


# ---- text on the terminal ----
def streamed(steps, eos_ids=(), terminal=False) -> list[str]:
    """What is on the screen after each of these steps, and in the end."""
    out, seen, stream = io.StringIO(), [], TextStream(tokenizer(), tokenizer().encode("x"))
    out.isatty = lambda: terminal
    with patch.object(sys, "stdout", out):
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
    for no_color, shown in ("", expected), ("1", joined(tokens)):
        with patch.dict(os.environ, NO_COLOR=no_color):
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
    with patch.object(sample, "step_costs", lambda *_: costs):
        tree, why = pick("auto", directory)
    best, found = max(speed_ups[n] for n in sizes if n > 1), speed_ups[len(tree)]
    assert 0.97 * best <= found <= best
    assert sum(prefix_counts(rows)[path] for path in tree.paths[1:]) == sum(counts[: len(tree) - 1])
    said = re.search(r"0.0; best of (\d+) sizes, expected speed-up (.*)x", why).groups()
    assert int(said[0]) == len(sizes) - 1 and abs(float(said[1]) - found) < 0.0051


@properties
@given(st.randoms(use_true_random=False), st.sampled_from((0, 20_000, 80_000, math.inf)))
def test_step_costs_are_a_line_through_the_medians_that_never_falls(chance, patience):
    """With noise of any kind, of all sizes in turn: of two rounds, or until patience is spent."""
    times, starts, clock = {n: [] for n in (1, *sample.SIZES)}, [], SimpleNamespace(now=0)
    clock.perf_counter = lambda: clock.now

    def decode(_, heads, tree, *more, **seed):
        starts.append((len(tree), clock.now))
        seconds = [chance.randint(1, 999) for _ in range(9)]
        times[len(tree)] += seconds[1 : 1 + sample.STEPS]
        for each in seconds:
            clock.now += each
            yield SimpleNamespace(emitted=[0])

    with patch.multiple(sample, PATIENCE=patience, decode=decode, time=clock):
        trees = [cartesian_tree([n - 1]) for n in sample.SIZES]
        costs = sample.step_costs(*small(), trees, [1], Sampling())
    medians = np.array([median(seconds) for seconds in times.values()])
    slope, at_0 = np.polyfit(sample.SIZES, medians[1:], 1)
    line = at_0 + slope * np.array(sample.SIZES) if slope > 0 else [medians[1:].mean()] * 10
    expected = [medians[0], *np.maximum(line, medians[0])]
    assert list(costs) == [1, *sample.SIZES]
    np.testing.assert_allclose(list(costs.values()), expected, rtol=1e-9)
    rounds, begun = len(starts) // len(times), [now for _, now in starts[:: len(times)]]
    assert [n for n, _ in starts] == [*times] * rounds and rounds >= 2
    assert all(now <= patience for now in begun[2:])
    assert rounds == sample.ROUNDS or clock.now > patience


@pytest.mark.parametrize("cost_of_two, picked", [(0.07, 2), (0.09, 1), (0.11, 1), (0.3, 1)])
def test_threads_that_are_not_clearly_faster_are_not_used(cost_of_two, picked, monkeypatch, capsys):
    now, threads = SimpleNamespace(seconds=0.0, threads=2), []

    def forward(tokens):
        threads.append(now.threads)
        cost = {1: 0.1, 2: cost_of_two}[now.threads]
        now.seconds += 0.01 if len(threads) == 1 else cost  # one lucky pass does not count

    model = small()[0]
    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(torch, "get_num_threads", lambda: now.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(now, "threads", n))
    sample.pick_threads(model)
    assert now.threads == picked and threads == [2, 1] * (len(threads) // 2) and now.seconds > 1
    assert ("one thread" in capsys.readouterr().err) == (picked == 1)


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
    refused("calibration.json|path|nodes", pick, choice, write(tmp_path, entries))


@pytest.mark.parametrize("choice", "|x|4x|x4|4x-1|-3|4.5|many|auto2|0x2|2x0|99x99|0|1".split("|"))
def test_a_choice_of_tree_that_means_nothing_is_refused(choice, tmp_path):
    refused("tree|widths|nodes|leaves", pick, choice, write(tmp_path, {"0.0": GOOD}))


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

    with patch.object(sample, "time", clock):
        found = timed_run(steps(), show)
    emitted, durations = zip(*taken)
    assert found == (list(itertools.chain(*emitted)), list(durations[1:]))
    assert shown == list(emitted)


@properties
@given(st.integers(0, 99), st.integers(0, 3), samplings)
def test_a_difference_is_reported_with_its_place_and_gap(seed, at, sampling):
    """The gap of the logits, or of the log scores with the shared noise."""
    model, plain, generator = random_gpt(seed), [3, 0, 4, 1], rng(seed)
    noise = [torch.empty(5).double().exponential_(generator=generator) for _ in range(4)][at]
    scores = next_logits(model, [1, 2, *plain[:at]]).tolist()
    if sampling.temperature:
        pairs = zip(scores, noise.tolist())
        scores = [score / sampling.temperature - math.log(wait) for score, wait in pairs]
    for token in set(range(5)) - {plain[at]}:
        ours = [*plain[:at], token, *plain[at + 1 :]]
        found = first_difference(model, [1, 2], ours, plain, sampling, seed)
        assert found == (at, pytest.approx(abs(scores[token] - scores[plain[at]]), abs=1e-9))
    assert first_difference(model, [1, 2], plain, plain, sampling, seed) is None


def test_worked_example_of_a_summary():
    """Two tokens a step, in steps that take 3/2 of a plain one, after a first token untimed."""
    ours, plain, tree = ([0] * 9, [0.2, 0.4] * 2), ([0] * 9, [0.1, 0.3] * 4), cartesian_tree([2, 3])
    lines = sample.summary(ours, plain, None, False, tree, "why")
    assert {name: re.sub(r" {3}\(.*", "", line) for name, line in lines.items()} == {
        "tree": "9 nodes, 2 deep: why", "tokens/step": "2.00", "step cost": "1.50",
        "tokens/s": "7 with Medusa, 5 plain", "text": "identical, token for token",
        "speed-up": "1.33x",
    }  # fmt: skip
    assert "8 tokens in 4 steps" in lines["tokens/step"]
    said = [sample.summary(ours, plain, (4, 2e-7), lossy, tree, "")["text"] for lossy in (0, 1)]
    assert said[0] == "differs from token 5 on: there the two were 2.0e-07 apart"
    assert said[1] == "differs from token 5 on: typical acceptance is lossy"


EXACT = [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)]


@pytest.mark.parametrize("dtype, tolerance", EXACT, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.inference_mode()
def test_packed_matrices_give_the_same_logits(dtype, tolerance, kind):
    """Tied embeddings, biases (qwen2), matrices above and below the size that is packed."""
    model = GPT(ModelConfig(512, 512, 64, 1, 2, 1, 64, model_type=kind)).to(dtype).eval()
    for weight in model.parameters():
        weight.copy_(0.05 * torch.randn(weight.shape, generator=rng(0)))
    inputs = [torch.randint(512, (1, n), generator=rng(n)) for n in (1, 2, 3, 8, 16, 17, 40)]
    expected = [model.lm_head(model(tokens)) for tokens in inputs]
    sample.pack_linears(model)
    for tokens, logits in zip(inputs, expected):
        torch.testing.assert_close(model.lm_head(model(tokens)), logits, rtol=0, atol=tolerance)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = [linear for linear in linears if isinstance(linear.forward, partial)]
    large = [linear for linear in linears if linear.weight.numel() >= 1 << 18]
    # bfloat16 needs hardware for it.
    assert packed == {torch.float32: large, torch.float64: []}.get(dtype, packed)
    assert 0 < len(large) < len(linears)
    assert model.lm_head.weight is model.embed_tokens.weight


# ---- the command ----
@pytest.mark.parametrize("flags", ["", "--temperature 0.8 --top-k 9 --top-p 0.9 --seed 3"])
def test_the_prompt_comes_first_and_the_text_is_that_of_plain_decoding(run_sample, flags, tmp_path):
    """A byte-order mark is no text at the beginning of a file, and a character elsewhere."""
    prompt = "x =\ufeff\r\n\t'\u20ac'\r"
    (tmp_path / "prompt.txt").write_bytes(("\ufeff" + prompt).encode())
    flags = ["--tree", "3x2", "--dtype", "float64", *flags.split(), "--prompt-file"]
    flags += [tmp_path / "prompt.txt", "--max-new-tokens"]
    out = run_sample(*flags, 16)
    assert out.startswith(prompt) and "\ntext         identical, token for token\n" in out
    assert " 15 tokens in " in out and "context" not in out
    room = 40 - len(small_tokenizer().opening(prompt))
    full = run_sample(*flags, 500)
    assert f" {room - 1} tokens in " in full and "\nstopped: the context is full\n" in full
    assert "nothing to compare" in run_sample(*flags, 1)
    # Without heads, the same text; a tree needs heads.
    (tmp_path / "base" / "heads").rename(tmp_path / "elsewhere")
    assert run_sample(*flags, 16, "--tree", "auto").partition("tokens/s, plain")[0][:-9] in out
    assert "\nplain: no heads; " in run_sample(*flags, 1, "--tree", "auto")
    refused("heads/config.json", run_sample, *flags, 16, "--tree", "4")


def test_official_heads_open_by_file_and_the_official_tree_by_name(run_sample, tmp_path):
    """These share the base's LM head. The error names the command that calibrates them."""
    tensors = MedusaHeads.from_pretrained(tmp_path / "base/heads").tensors("{k}.{j}.linear")
    path = tmp_path / "medusa_lm_head.safetensors"
    write_safetensors(path, tensors)
    flags = ["--heads", path, "--dtype", "float64", "--prompt", "def", "--max-new-tokens", 9]
    for tree, says in ("mc_sim_7b_63", "64 nodes, 4 deep: from mc"), ("2x2", "Cartesian"):
        out = run_sample(*flags, "--tree", tree)
        assert says in out and "identical" in out
    for tree in ("auto", "4"):
        command = rf"train.py --mode calibrate --base \S+base --heads {path} writes it; --tree"
        refused(command, run_sample, *flags, "--tree", tree)
    write(tmp_path, {"0.0": GOOD})
    assert "calibrated" in run_sample(*flags, "--tree", 4)


def test_in_bfloat16_few_texts_part_and_at_near_ties_alone():
    """50 held-out prompts, 32 tokens each. Here plain decoding has all prompts in one batch."""
    data = Path(sample.__file__).parent / "data"
    model = GPT.from_pretrained(data / "base", torch.bfloat16)
    heads = MedusaHeads.from_pretrained(data / "heads", torch.bfloat16)
    tree, _ = pick_tree("8", model, heads, data / "heads", Sampling(), [1])
    rows, _ = read_shards(data / "distilled", "validation-0.0.safetensors", 2048)
    prompts, gaps = rows[:50, :32].tolist(), []
    for prompt, text, new in zip(prompts, *sample_rows(model, prompts, 64, Sampling(), rng(0))):
        ours, _ = timed_run(sample.decode(model, heads, tree, prompt, 32, Sampling(), 0))
        parted = first_difference(model, prompt, ours, text[new].tolist(), Sampling(), 0)
        gaps += [] if parted is None else parted[1:]
    # The likeliest token's logit is 8 to 16, where bfloat16's spacing is 1/16: no gap was larger,
    # of 50 texts of 128 tokens. Two rounded logits, and two spacings, are the bound.
    assert len(gaps) <= 10 and max(gaps, default=0) <= 2 / 16


def test_the_flags_reach_the_sampling():
    flags = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "accept": "typical", "epsilon": 0.2}
    assert SampleConfig(**flags).sampling() == Sampling(0.7, 5, 0.9, True, 0.2)
