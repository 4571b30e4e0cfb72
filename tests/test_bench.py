"""Laws of the measurements: their arithmetic against hand and brute force, and the command line as a user meets it."""

import itertools
import json
import math
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings, strategies as st

import medusa
import train
from bench import bench, cost, decode, endurance, predict, results, roofline, training, typical
from bench.child import in_a_child
from bench.dynamic import dynamic_generate
from data.compiled import Compiled
from medusa import MedusaConfig, Sampling, generate, medusa_generate
from model import GPT, ModelConfig, read_json, write_json
from strategies import (
    contents,
    distribution,
    next_logits,
    properties,
    random_gpt,
    random_heads,
    rank_data,
    rng,
    text_distribution,
    write_base,
)
from tree import calibrated_tree, expected_tokens, prefix_counts

# ---- a tree from probabilities ----


def every_path(K: int, V: int) -> list[tuple[int, ...]]:
    return [path for depth in range(1, K + 1) for path in itertools.product(range(V), repeat=depth)]


@cache
def every_tree(K: int, V: int, n_nodes: int) -> list[tuple]:
    """All sets of n_nodes - 1 paths that are closed under prefixes."""
    sets = itertools.combinations(every_path(K, V), n_nodes - 1)
    return [paths for paths in sets if all(len(path) == 1 or path[:-1] in paths for path in paths)]


@settings(properties, max_examples=30)
@given(rank_data(max_depth=3, n_ranks=3), st.integers(2, 5))
def test_a_product_tree_is_the_best_if_heads_were_right_independently(rows, n_nodes):
    K, n = len(rows[0]), len(rows)
    share = [
        [
            Fraction(sum(row[k] == rank for row in rows), n)
            for rank in range(1 + max(map(max, rows)))
        ]
        for k in range(K)
    ]
    tree = decode.product_tree(rows, n_nodes)
    best = max(
        sum(math.prod(share[k][rank] for k, rank in enumerate(path)) for path in paths)
        for paths in every_tree(K, len(share[0]), len(tree))
    )
    assert float(
        sum(math.prod(share[k][rank] for k, rank in enumerate(path)) for path in tree.paths[1:])
    ) == pytest.approx(float(best), rel=1e-12)


def test_a_product_tree_cannot_see_what_a_calibrated_tree_sees():
    rows = [(0, 1)] * 2 + [(0, 2)] * 2 + [(0, 3)] * 2 + [(1, 1)] * 4
    assert decode.product_tree(rows, 4).paths == ((), (0,), (1,), (0, 1))
    assert calibrated_tree(rows, 4).paths == ((), (0,), (1,), (1, 1))


@settings(properties, max_examples=25)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 9), st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 16), st.sampled_from([0.0, 0.8]),
       st.sampled_from([None, 2]))  # fmt: skip
def test_decoding_with_a_new_tree_every_step_is_plain_decoding(
    seed, K, n_nodes, prompt, n, temperature, eos
):
    model = random_gpt(seed, eos=eos)
    arguments = (prompt, n, Sampling(temperature))
    steps = list(
        dynamic_generate(model, random_heads(model, K, seed), n_nodes, *arguments, rng(seed))
    )
    assert [token for emitted in steps for token in emitted] == [
        token for emitted in generate(model, *arguments, rng(seed)) for token in emitted
    ]


def test_a_new_tree_follows_the_heads():
    """Private heads that are sure of token 3, then of token 1, against a base that says just that: both are accepted, whatever the tree's size."""
    model = random_gpt(0)
    plain = [token for emitted in generate(model, [0], 12) for token in emitted]
    heads = random_heads(model, 2, 0)
    sure = iter(range(1, 99))

    def forward(hidden, lm_head):
        at, logits = next(sure), torch.zeros(2, 5, dtype=hidden.dtype)
        for k in range(2):
            logits[k, plain[min(3 * (at - 1) + 1 + k, 11)]] = 50
        return logits

    heads.forward = forward
    assert [len(emitted) for emitted in dynamic_generate(model, heads, 3, [0], 12)] == [
        1,
        3,
        3,
        3,
        2,
    ]


# ---- typical acceptance: its distance, by enumeration of all outcomes ----


def all_texts(
    model: GPT, heads, tree, prompt, n: int, sampling: Sampling, monkeypatch
) -> dict[tuple, tuple[float, list]]:
    """{text: its probability and steps} of typical decoding: every outcome of every draw is gone through, by a script of draws."""
    found, played = {}, set()
    for script in itertools.product(range(model.config.vocab_size), repeat=n):
        if any(
            script[:count] in played for count in range(n)
        ):  # decoding with this beginning asked for no more draws
            continue
        draws = []

        def scripted(probs, noise, script=script, draws=draws):
            draws.append(script[len(draws)])
            return torch.full((len(probs),), draws[-1])

        monkeypatch.setattr(medusa, "draw", scripted)
        steps = list(medusa_generate(model, heads, tree, prompt, n, sampling, rng(0)))
        played.add(tuple(draws))
        text, prob, length = [token for emitted in steps for token in emitted], 1.0, 0
        for emitted in steps:  # the last token of a step was drawn, the others were not
            length += len(emitted)
            prob *= distribution(
                next_logits(model, [*prompt, *text[: length - 1]]), sampling.temperature
            )[text[length - 1]]
        found[tuple(text)] = (prob, steps)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("seed", range(2))
def test_the_distance_of_typical_acceptance_is_that_of_its_texts(seed, monkeypatch):
    """By the chain rule the KL divergence of whole texts is the mean, over texts, of the sum of that at their positions."""
    model, n, prompt = random_gpt(seed, vocab_size=4), 3, [1]
    heads, sampling = random_heads(model, 2, seed), Sampling(0.9, typical=True, epsilon=0.2)
    texts = all_texts(model, heads, decode.cartesian_tree((2, 2)), prompt, n, sampling, monkeypatch)
    base = text_distribution(model, prompt, n, sampling)
    assert sum(prob for prob, _ in texts.values()) == pytest.approx(1)
    whole = sum(prob * math.log(prob / base[text]) for text, (prob, _) in texts.items())
    positions = sum(
        prob * typical.distances(model, prompt, steps, sampling)[0].sum().item()
        for prob, steps in texts.values()
    )
    assert (
        any(len(emitted) > 1 for _, steps in texts.values() for emitted in steps) and whole > 0.01
    )
    assert positions == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_the_total_variation_at_a_position_is_that_of_the_token_that_comes_there(seed, monkeypatch):
    model, n, prompt = random_gpt(seed, vocab_size=4), 3, [1]
    heads, sampling = random_heads(model, 2, seed), Sampling(0.9, typical=True, epsilon=0.2)
    texts = all_texts(model, heads, decode.cartesian_tree((2, 2)), prompt, n, sampling, monkeypatch)
    for text, (_, steps) in texts.items():
        _, variation = typical.distances(model, prompt, steps, sampling)
        for place in range(n):
            past = text[:place]
            mass = sum(prob for other, (prob, _) in texts.items() if other[:place] == past)
            comes = [
                sum(
                    prob
                    for other, (prob, _) in texts.items()
                    if other[: place + 1] == (*past, token)
                )
                / mass
                for token in range(4)
            ]
            base = distribution(next_logits(model, [*prompt, *past]), sampling.temperature)
            assert variation[place].item() == pytest.approx(
                sum(abs(a - b) for a, b in zip(comes, base)) / 2, abs=1e-9
            )


def test_lossless_acceptance_is_at_distance_0_and_counts_what_it_earns():
    model = random_gpt(0)
    found = typical.point(
        model,
        random_heads(model, 2, 0),
        decode.cartesian_tree((2, 1)),
        [[1], [2, 3]],
        8,
        Sampling(0.9),
    )
    assert (found["KL"], found["total variation"], found["positions"]) == (0, 0, 16)
    assert 1 <= found["tokens/step"] <= 3


# ---- what is predicted ----


def test_worked_example_of_a_prediction():
    counts = Counter({(): 10, (0,): 6, (0, 0): 3, (1,): 2})
    predicted = predict.predictions(counts, plain=2.0, cost={2: 2.0, 3: 3.0, 4: 10.0})
    assert predicted == {
        2: {"tokens/step": 1.6, "step cost": 1.0, "speed-up": 1.6},
        3: {"tokens/step": 1.9, "step cost": 1.5, "speed-up": pytest.approx(1.9 / 1.5)},
        4: {"tokens/step": 2.1, "step cost": 5.0, "speed-up": pytest.approx(0.42)},
    }
    assert predict.best_size(predicted) == 2
    rows = predict.hold_against(
        {2: predicted[2]}, {"calibrated-2": {"tokens/step": 2.0, "step cost": 1.25, "ratio": 1.28}}
    )
    assert rows["2"]["error"] == {
        "tokens/step": pytest.approx(-0.2),
        "step cost": pytest.approx(-0.2),
        "speed-up": pytest.approx(0.25),
    }


@properties
@given(
    rank_data(max_depth=3, n_ranks=3),
    st.floats(0.1, 10),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
)
def test_the_best_size_has_the_largest_predicted_speed_up(rows, plain, times):
    counts = prefix_counts(rows)
    cost_of = {n: seconds for n, seconds in enumerate(times, start=2) if n <= len(counts)}
    predicted = predict.predictions(counts, plain, cost_of)
    best = predict.best_size(predicted)
    assert predicted[best]["speed-up"] == pytest.approx(
        max(row["speed-up"] for row in predicted.values())
    )
    assert all(
        row["tokens/step"] == expected_tokens(calibrated_tree(counts, n), counts)
        for n, row in predicted.items()
    )


def test_a_step_is_bound_by_what_it_reads_until_it_is_bound_by_what_it_computes():
    model = ModelConfig(10, 4, 6, 2, 2, 1, 16, tie_word_embeddings=False)
    for shape in (model, wide := replace(model, head_dim=6)):
        assert roofline.matrices(shape) == sum(
            p.numel()
            for name, p in GPT(shape).named_parameters()
            if p.dim() == 2 and "embed" not in name
        )
    assert (
        roofline.backbone_work(wide, 3, 5, 2)[1]
        == 2 * 3 * roofline.matrices(wide) + 4 * 3 * 8 * (2 * 6) * 2
    ), "heads of a width of their own"
    matrices = 2 * (4 * 8 + 4 * 4 + 3 * 4 * 6) + 10 * 4
    assert roofline.backbone_work(model, 3, 5, 2) == (
        2 * (matrices + 2 * 2 * 2 * 8),
        2 * 3 * matrices + 4 * 3 * 8 * 4 * 2,
    )
    assert roofline.heads_work(MedusaConfig(4, 10, 3, 2), 2) == (
        2 * (6 * 16 + 40),
        2 * (6 * 16 + 3 * 40),
    )
    assert roofline.heads_work(MedusaConfig(4, 10, 3, 2, original_lm_head=False), 2)[0] == 2 * (
        6 * 16 + 120
    )
    device = roofline.Device(bandwidth=100.0, flops=1000.0)
    assert device.seconds(200, 1000) == 2 and device.seconds(200, 4000) == 4
    plain, heads = roofline.plain_seconds(device, model, 5, 2), MedusaConfig(4, 10, 3, 2)
    assert plain == 2 * (matrices + 2 * 2 * 2 * 6) / 100
    assert roofline.tree_seconds(device, model, heads, 3, 5, 2) == device.seconds(
        2 * 136, 2 * 216
    ) + device.seconds(*roofline.backbone_work(model, 3, 5, 2))


def test_what_is_measured_is_the_work_over_its_fastest_time(monkeypatch):
    done = []
    monkeypatch.setattr(roofline, "fastest", lambda work: done.append(work()) or 0.5)
    assert roofline.measured_flops(8) == 2 * 8**3 / 0.5
    assert roofline.measured_bandwidth(4096) == 2 * 4096 / 0.5, "a copy reads and writes"
    product, total, copied = done
    assert (
        product.shape == (8, 8)
        and (product == 8).all()
        and total == 1024
        and copied.numel() == 1024
        and (copied == 1).all()
    )


def test_a_step_cost_compares_with_the_plain_steps_of_its_own_round():
    """One round in three met a machine four times as slow."""
    plain, tree = ([[{"step": seconds * slow}] * 2 for slow in (1, 4, 1)] for seconds in (2.0, 3.0))
    assert cost.step_cost(tree, plain) == 1.5
    assert cost.step_cost(tree[1:], plain[:2]) == pytest.approx((3 * 4 / 2 + 3 / 8) / 2)


@pytest.mark.parametrize(
    "work, code, says",
    [
        ("return 3", 3, ""),
        ("sys.exit(2)", 2, ""),
        ("raise ValueError('mine')", 1, "ValueError: mine"),
        ("time.sleep(60)", None, ""),
    ],
)
def test_a_child_says_how_it_ended_and_is_killed_in_time(work, code, says, tmp_path):
    """And what it prints stays with it."""
    scope = {"sys": sys, "time": cost.time}
    exec(f"def work():\n    print('noise')\n    {work}", scope)
    assert in_a_child(scope["work"], 0.5 if code is None else 30, str(tmp_path / "errors")) == code
    said = (tmp_path / "errors").read_text()
    assert says in said if says else said == ""


# ---- what is timed ----


def timing(text, steps, seconds) -> decode.Timing:
    return decode.Timing(text, len(text) - 1, steps, seconds)


def test_worked_example_of_a_comparison():
    """Two rounds over two prompts: ratios are taken within a round, and the median over the rounds."""
    plain = [
        [timing([1, 2, 3, 4, 5], 4, 4.0), timing([1, 2, 3, 4, 5], 4, 4.0)],
        [timing([1, 2, 3, 4, 5], 4, 8.0), timing([1, 2, 3, 4, 5], 4, 8.0)],
    ]
    mine = [
        [timing([1, 2, 3, 4, 5], 2, 3.0), timing([1, 1, 1, 1, 1], 2, 1.0)],
        [timing([1, 2, 3, 4, 5], 2, 2.0), timing([1, 1, 1, 1, 1], 2, 2.0)],
    ]
    found = decode.summary(mine, plain)
    assert found == {
        "tokens/step": 2.0, "step cost": (1.0 + 0.5) / 2, "milliseconds of a step": 1000.0, "tokens/s": 2.0, "ratio": 3.0,
        "lowest ratio": 2.0, "highest ratio": 4.0, "distinct 4-grams": 0.75,
    }  # fmt: skip


def test_sameness_counts_prompts_and_measures_the_gap():
    model = random_gpt(0)
    prompt = [1, 2]
    text = [token for emitted in generate(model, prompt, 6) for token in emitted]
    logits = next_logits(model, prompt + text[:3])
    other = text[:3] + [(text[3] + 1) % 5] + text[4:]
    plain = [[timing(text, 5, 1.0)] * 2] * 2
    mine = [[timing(text, 5, 1.0)] * 2, [timing(text, 5, 1.0), timing(other, 5, 1.0)]]
    found = decode.sameness(model, mine, plain, [prompt, prompt], Sampling())
    assert found == {
        "identical texts": 1,
        "of": 2,
        "largest gap where texts part": pytest.approx((logits.max() - logits[other[3]]).item()),
    }


def test_every_way_comes_as_often_and_none_always_first():
    taken = []
    ways = {
        name: lambda prompt, seed, name=name: (
            taken.append((name, len(prompt))) or timing([seed], 1, 1.0)
        )
        for name in "abc"
    }
    timings = decode.in_turn(ways, [[0, 1], [0], [0, 1, 2]], 2, "")
    assert {
        name: [[t.text[0] for t in round_] for round_ in rounds] for name, rounds in timings.items()
    } == dict.fromkeys("abc", [[0, 1, 2]] * 2)
    assert taken[:6] == [(name, length) for name in "abc" for length in (1, 3)], (
        "before any is timed, a short and a long text"
    )
    assert [name for name, *_ in taken[6::3]] == list("abcabc")


def test_the_peers_clock_counts_behind_its_first_step():
    class Peer:
        device = "cpu"

        def generate(
            self,
            tokens,
            attention_mask,
            max_new_tokens,
            streamer,
            do_sample,
            prompt_lookup_num_tokens,
        ):
            assert (max_new_tokens, do_sample, prompt_lookup_num_tokens) == (6, False, 3)
            for part in (tokens, torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8, 9, 10])):
                streamer.put(part)
            streamer.end()
            return torch.cat((tokens, torch.arange(5, 11)[None]), dim=1)

    found = decode.peer_way(Peer(), 6, Sampling(), 3, [1, 2], 0)
    assert (found.text, found.earned, found.steps) == (
        [5, 6, 7, 8, 9, 10],
        4,
        2,
    ) and found.seconds > 0


def test_a_stopwatch_takes_off_what_is_inside(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0, 20.0, 21.0, 24.0, 30.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(now))
    watch = cost.Stopwatch()
    lm_head = watch.wrap("backbone", lambda: None)
    watch.wrap("choosing", lm_head)()  # 0 .. 10, of which 1 .. 3 are the LM head's
    assert dict(watch.seconds) == {"choosing": 8.0, "backbone": 2.0}
    watch.wrap("heads", lm_head)()  # 20 .. 30, all of it the heads'
    assert watch.seconds["heads"] == 10.0 and watch.seconds["backbone"] == 2.0


def test_parts_of_a_step_add_up_and_nothing_stays_watched():
    model = random_gpt(0, context=64)
    heads, counts = random_heads(model, 2, 0), prefix_counts([(0, 0), (1, 0), (2, 2)])
    before = GPT.forward, medusa.propose, medusa.accept, cost.KVCache.keep
    for size, sampling in ((1, Sampling()), (4, Sampling()), (4, Sampling(0.9))):
        with cost.watched(model, heads) as watch:
            rows = cost.steps_in_parts(
                cost.decoding(model, heads, counts, size, [1, 2], 30, sampling), watch, 5
            )
        assert len(rows) == 5
        for row in rows:
            assert row["step"] == pytest.approx(sum(row[part] for part in (*cost.PARTS, "Python")))
            assert (
                row["backbone"] > 0
                and row["Python"] > 0
                and (row["heads"] > 0) == (row["choosing"] > 0) == (size > 1)
            )
    assert (
        "forward" not in vars(model)
        and "forward" not in vars(heads)
        and "forward" not in vars(model.lm_head)
    )
    assert before == (GPT.forward, medusa.propose, medusa.accept, cost.KVCache.keep)


def test_tenths_are_of_the_text_and_not_of_the_steps():
    stamps = (
        [(1.0, 1)] * 10 + [(2.0, 2)] * 40 + [(4.0, 5)] * 2
    )  # 100 tokens: the first 10 steps, and the last 2
    assert cost.tenths(stamps) == {
        "tokens/s, first tenth": 1.0, "ms a step, first tenth": 1000.0, "tokens/s, last tenth": 10 / 8, "ms a step, last tenth": 4000.0,
    }  # fmt: skip


def test_a_training_run_is_timed_step_by_step_and_leaves_nothing(
    base, text, shards, tmp_path, monkeypatch
):
    settings = {"text": text, "distilled": shards, "num_heads": 2, "batch": 3, "warmup": 1}
    monkeypatch.setattr(
        training,
        "MODES",
        {"medusa1": settings, "medusa2-lora": settings | {"heads_steps": 0, "lora": True}},
    )
    before = contents(tmp_path)
    for mode in training.MODES:
        with monkeypatch.context() as patched:
            patched.setattr(
                train, "train_loop", train.train_loop
            )  # put back behind the run, which has a process of its own otherwise
            patched.setattr(train, "train_tokenizer", train.train_tokenizer)
            found = training.time_fit(mode, str(base), 4)
        assert (
            found["tokens in a step"] == 3 * 14
            and 0 < found["MB before the first step"] <= training.peak()
        )
        assert found["tokens/s"] == pytest.approx(42 / found["seconds of a step"])
    assert contents(tmp_path) == before


def test_every_mode_is_one_of_train_py():
    assert {mode.partition("-")[0] for mode in training.MODES} == train.MODES.keys()


# ---- the command line ----


@pytest.fixture
def call(monkeypatch, capsys):
    """Run bench.py with these arguments; returns its exit code and what it wrote."""
    monkeypatch.setenv("COLUMNS", "1000")

    def call_(*argv):
        monkeypatch.setattr(sys, "argv", ["bench/bench.py", *map(str, argv)])
        code = 0
        try:
            train.run(bench.main)
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call_


@pytest.fixture
def refused(call, tmp_path):
    """The law of a mistake: exit code 2, one line that names it, nothing written."""

    def check(says, *argv):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        code, out, err = call(*argv)
        assert (
            (code, out) == (2, "") and re.fullmatch(r"[^\n]*error: [^\n]+\n", err) and says in err
        ), err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    return check


@pytest.mark.parametrize("name", bench.SUBCOMMANDS)
def test_help_lists_every_field_with_its_default(call, name):
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    entries = {
        re.match(r"--[\w-]+", entry)[0]: " ".join(entry.split())
        for entry in re.split(r"\n  (?:-h, )?(?=--)", out)[1:]
    }
    config = bench.SUBCOMMANDS[name][1]
    assert entries.keys() == {"--" + f.name.replace("_", "-") for f in fields(config)} | {"--help"}
    for f in fields(config):
        default = f.default if f.default is not MISSING else f.default_factory()
        entry = entries["--" + f.name.replace("_", "-")]
        assert f.metadata["help"] in entry and (
            default in ("", []) or entry.endswith(f"(default: {default})")
        )


def test_help_names_every_subcommand(call):
    code, out, _ = call("--help")
    assert code == 0 and all(
        name in out for name in ("decode", "typical", "cost", "train", "predict", "endurance")
    )


@pytest.mark.parametrize("name", bench.SUBCOMMANDS)
def test_without_matplotlib_nothing_is_measured(refused, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    more = ["--ways", "chain"] if name == "decode" else []
    refused(
        "the package matplotlib: pip install -r bench/requirements.txt",
        name,
        "--out",
        tmp_path / "out",
        *more,
    )


def test_without_transformers_its_ways_are_refused_before_the_work(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(
        "the package transformers: pip install -r bench/requirements.txt",
        "decode",
        "--out",
        tmp_path / "out",
    )


class Figure:
    """In place of a plot: tests do without matplotlib."""

    def use(self, backend): ...
    def tight_layout(self): ...
    def close(self, figure): ...
    def savefig(self, path, **more):
        path.write_bytes(b"drawn")


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(results, "need", lambda package: Figure())
    for module in (cost, decode, endurance, predict, typical):
        monkeypatch.setattr(module, "draw", lambda results, pyplot: Figure())


@pytest.mark.parametrize(
    "says, argv",
    [
        (
            "--only nothing: there are roofline, greedy, lossless-0.7, growth",
            ["cost", "--only", "nothing"],
        ),
        ("--ways slow: there are plain, chain", ["decode", "--ways", "slow"]),
        ("rounds = 0", ["decode", "--rounds", "0"]),
        ("prompts = 0", ["typical", "--prompts", "0"]),
        ("--bandwidth and --flops must be above 0", ["predict", "--bandwidth", "0"]),
        (
            "--width 1: with --device it must be one of 2, 4, 8",
            ["predict", "--device", "cpu", "--width", "1"],
        ),
        (
            "--device nothing cannot be used here",
            ["decode", "--ways", "plain", "--device", "nothing"],
        ),
        (
            "cost.json does not exist: python bench/bench.py cost writes it",
            ["predict", "--cost", "nowhere/cost.json"],
        ),
        ("invalid choice: 'guess'", ["guess"]),
        ("nowhere", ["typical", "--base", "nowhere"]),
    ],
)
def test_a_mistake_costs_one_line_and_nothing_else(refused, undrawn, says, argv, tmp_path):
    refused(says, *argv, *(["--out", tmp_path / "out"] if argv != ["guess"] else []))


def test_results_that_are_none_are_refused_by_name(refused, undrawn, tmp_path):
    for name in ("cost", "decode"):
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"results": {"greedy": {"ways": {"calibrated-4": {}}}}})
        )
    flags = [
        "predict",
        "--out",
        tmp_path / "out",
        "--cost",
        tmp_path / "cost.json",
        "--decode",
        tmp_path / "decode.json",
    ]
    refused("decode.json is not as bench.py writes it", *flags)
    (tmp_path / "cost.json").write_text('{"results": []}')
    refused("cost.json holds no results of python bench/bench.py cost", *flags)


def test_a_run_that_was_stopped_measures_what_is_missing(undrawn, tmp_path, capsys):
    config, taken = decode.DecodeConfig(out=str(tmp_path / "out")), []

    def section(name, stops=False):
        def measured():
            taken.append(name)
            if stops:
                raise KeyboardInterrupt
            return {"of": name}

        return measured

    def table(results):
        return " ".join(results)

    def draw(results, pyplot):
        return Figure()

    with pytest.raises(KeyboardInterrupt):
        results.measure(
            "decode", config, {"a": section("a"), "b": section("b", stops=True)}, table, draw
        )
    content = json.loads((tmp_path / "out/decode.json").read_text())
    assert (
        content["results"].keys() == {"a"} and content["command"] == "python bench/bench.py decode"
    )
    assert (tmp_path / "out/decode.md").read_text().startswith("a\n") and (
        tmp_path / "out/decode.png"
    ).read_bytes() == b"drawn"
    sections = {name: section(name) for name in "abc"}
    results.measure("decode", replace(config, only=["c"]), sections, table, draw)
    results.measure("decode", config, sections, table, draw)
    assert taken == ["a", "b", "c", "b"]
    with pytest.raises(ValueError, match="is of another command.*--rounds 9"):
        results.measure("decode", replace(config, rounds=9), sections, table, draw)
    assert taken == ["a", "b", "c", "b"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "decode.json",
        "decode.md",
        "decode.png",
    }


# ---- all of it, on a base of a few hundred weights ----


@pytest.fixture
def small(tmp_path, monkeypatch, undrawn):
    """Flags that name a small base, heads, their calibration, rows, and a place for results."""
    base = write_base(tmp_path)
    model = GPT.from_pretrained(base)
    random_heads(model, 2, 0).save_pretrained(tmp_path / "heads")
    counts = {"steps": 9, "prefixes": {"0": 5, "1": 2, "0 0": 3, "0 1": 1, "2": 1}}
    (tmp_path / "heads/calibration.json").write_text(
        json.dumps({str(t): counts for t in (0.0, 0.7, 1.0)})
    )
    monkeypatch.setattr(results, "documents", lambda validation: ["def f(x):\n    return x\n" * 30])
    monkeypatch.setattr(
        results, "packed", lambda texts, tokenizer: torch.tensor(tokenizer.encode(texts[0]))
    )
    monkeypatch.setattr(decode, "step_starts", lambda *_: [(0, 0), (0, 1), (1, 0), (2, 2)] * 3)
    monkeypatch.setattr(cost, "CONTEXTS", (4, 8))
    monkeypatch.setattr(cost, "measured_bandwidth", lambda n_bytes: 1e9)
    monkeypatch.setattr(cost, "measured_flops", lambda: 1e9)
    return ["--base", base, "--heads", tmp_path / "heads", "--out", tmp_path / "out"]


DECODING = ["--prompts", "2", "--prompt-tokens", "6", "--new-tokens", "8"]
OURS = [way for way in decode.WAYS if not way.startswith("transformers")]


def test_every_subcommand_measures_and_predict_reads_what_they_wrote(
    small, call, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        decode, "pick_tree", lambda *_: (calibrated_tree([(0, 0), (1, 0)], 3), "said so")
    )
    monkeypatch.setattr(
        endurance,
        "ProcessPoolExecutor",
        lambda n, mp_context, **more: ThreadPoolExecutor(n, **more),
    )  # twenty processes take long
    monkeypatch.setattr(endurance.signal, "signal", lambda *_: None)  # a thread may not
    runs = {
        "decode": [
            *DECODING,
            "--rounds",
            "2",
            "--device",
            "cpu",
            "--dtype",
            "float64",
            "--ways",
            *OURS,
        ],
        "typical": DECODING,
        "cost": ["--rounds", "2", "--steps", "2", "--nodes", "3"],
        "predict": [
            "--context",
            "64",
            "--cost",
            tmp_path / "out/cost.json",
            "--decode",
            tmp_path / "out/decode.json",
        ],
        "endurance": [
            "--tokens",
            "160",
            "--prompt-tokens",
            "6",
            "--new-tokens",
            "8",
            "--nodes",
            "3",
            "--checks",
            "2",
            "--pairs",
            "1",
        ],
    }
    found = {}
    for name, more in runs.items():
        code, out, err = call(name, *small, *more)
        assert code == 0, err
        found[name] = json.loads((tmp_path / f"out/{name}.json").read_text())["results"]
        assert (
            (tmp_path / f"out/{name}.md")
            .read_text()
            .startswith(out.partition("\n\n" + str(tmp_path))[0])
        )
    for rule, result in found["decode"].items():
        assert list(result["ways"]) == OURS
        assert rule == "typical" or all(
            row["identical texts"] == 2 for row in result["ways"].values()
        )
        assert result["ways"]["plain"]["tokens/step"] == 1 and result["ways"]["plain"][
            "ratio"
        ] == pytest.approx(1)
        assert (
            result["ways"]["chain"]["nodes"] == 3
            and result["ways"]["calibrated-4"]["nodes"] == 4
            and result["ways"]["dynamic-cost-chosen"]["nodes"] == 3
        )
    for section in found["typical"].values():
        assert section["points"]["lossless"]["KL"] == 0 < section["points"]["0.01"]["KL"]
    for rule in ("greedy", "lossless-0.7"):
        for size, row in found["cost"][rule]["steps"]["8"].items():
            assert row["step"] > row["backbone"] > 0 and (row["heads"] > 0) == (size != "1")
    assert found["cost"]["growth"]["tokens"] == 24 and found["cost"]["growth"][
        "prefill"
    ].keys() == {"4", "8", "40"}
    here = found["predict"]["here"]["rules"]["greedy"]
    costs = {
        n: row["step cost"] for n, row in found["cost"]["greedy"]["steps"][here["context"]].items()
    }
    assert here["context"] == "8" and here["sizes"]["4"]["predicted"]["speed-up"] == pytest.approx(
        (9 + 5 + 3 + 2) / 9 / costs["4"]
    )
    assert (
        here["sizes"]["4"]["measured"]["speed-up"]
        == found["decode"]["greedy"]["ways"]["calibrated-4"]["ratio"]
    )
    device = found["predict"]["device"]["temperatures"]["0.0"]
    assert (
        device["best"] == 6
        and device["as far as the table goes"]
        and 1 < device["sizes"]["6"]["step cost"] < 1.1
    )
    for section in found["endurance"].values():
        assert len(section["tenths"]) == 10
        assert all(
            (row["tokens"], row["checked"], row["the plain text"]) == (16, 2, 2)
            and row["tokens/s"] > 0
            for row in section["tenths"]
        )
        assert all(0 < row["share of a young process"] < 100 for row in section["tenths"])


def test_steps_of_a_model_with_random_weights_stand_beside_the_prediction(
    small, call, refused, tmp_path, monkeypatch
):
    timed = []

    def step_costs(model, heads, tree_of, prompt, sampling, sizes):
        timed.append((type(model), model.lm_head.weight.dtype, heads.weight.dtype, len(prompt)))
        assert heads.weight.std() > 0 and model(torch.tensor([prompt])).isfinite().all()
        assert (
            heads.token_map.tolist() == list(range(9))
            and model.lm_head.weight is model.embed_tokens.weight
        )
        return {1: 2.0} | {len(tree_of(n)): 2.0 + n for n in sizes}

    monkeypatch.setattr(predict, "step_costs", step_costs)
    monkeypatch.setattr(predict, "TIMED_COMPILED", (6, 64))
    monkeypatch.setattr(predict, "TIMED_TOKENS", 20)
    write_json(
        tmp_path / "heads/config.json",
        read_json(tmp_path / "heads/config.json") | {"truncated_vocab_size": 9},
    )
    flags = ["--only", "device", "--device", "cpu", "--width", "8", "--model", small[1]]
    refused(
        "--context 21: with --device at most 20, so that 20 tokens",
        "predict",
        *small,
        *flags,
        "--context",
        "21",
    )
    assert call("predict", *small, *flags, "--context", "7", "--out", tmp_path / "eager")[0] == 0
    assert timed.pop()[0] is GPT and not timed, "compiled steps are timed if they are asked for"
    code, out, err = call("predict", *small, *flags, "--context", "7", "--compile")
    assert code == 0, err
    assert timed == [
        (GPT, torch.float64, torch.float64, 7),
        (Compiled, torch.float64, torch.float64, 7),
    ]
    device = json.loads((tmp_path / "out/predict.json").read_text())["results"]["device"]
    assert device["measured"] == {
        "eager": {"1": 2.0, "2": 4.0, "4": 6.0},
        "compiled": {"1": 2.0, "6": 8.0},
    }, "the table holds no tree of more"
    assert (
        "| compiled | 6 | 8000.00 | 4.000 |  |" in out
        and f"| eager | 1 | 2000.00 |  | {2 * device['plain tokens/s']:.2f} |" in out
    )


def test_steps_on_one_machine_are_not_held_against_speeds_on_another(small, refused, tmp_path):
    for name, machine in (("cost", "one"), ("decode", "another")):
        write_json(
            tmp_path / f"{name}.json", {"machine": machine, "results": {"greedy": {"ways": {}}}}
        )
    files = ["--cost", tmp_path / "cost.json", "--decode", tmp_path / "decode.json"]
    refused(
        f"{tmp_path / 'cost.json'} is of one, {tmp_path / 'decode.json'} of another: measure both on one machine",
        "predict",
        *small,
        *files,
    )


def test_what_is_compiled_are_the_steps_of_the_ways_alone(small, call, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda work, **_: work)
    monkeypatch.setattr(
        decode, "Compiled", lambda model, sizes: made.append(Compiled(model, {*sizes})) or made[-1]
    )
    flags = ["--only", "greedy", "--device", "cpu", "--rounds", "1", "--compile", "--ways"]
    for ways, sizes in ((["calibrated-4"], {1, 4}), (["chain", "dynamic-16"], {1, 3, 16})):
        code, _, err = call(
            "decode", *small, *DECODING, *flags, *ways, "--out", small[-1].with_name(ways[0])
        )
        assert code == 0, err
        assert made[-1].sizes == sizes


def test_what_age_costs_is_measured_against_a_process_of_each_tenth(monkeypatch, tmp_path):
    started, taken = [], []

    class Decoder:
        """The first one, which is old, takes 2 seconds a text, and the n-th young one n."""

        def __init__(self, config, temperature):
            self.prompts, self.seconds = [[0]] * 6, len(started) or 2
            started.append(self)

        def timed(self, number):
            taken.append((started.index(self), number))
            return [number] * 8, self.seconds

        def plain(self, number):
            return [number if number else 1] * 8

    monkeypatch.setattr(endurance, "Decoder", Decoder)
    monkeypatch.setattr(
        endurance,
        "ProcessPoolExecutor",
        lambda n, mp_context, **more: ThreadPoolExecutor(n, **more),
    )
    monkeypatch.setattr(endurance.signal, "signal", lambda *_: None)  # a thread may not
    found = endurance.endure(endurance.EnduranceConfig(checks=6, pairs=3), 0.0)["tenths"]
    assert len(started) == 11 and [row["share of a young process"] for row in found] == [
        n / 2 for n in range(1, 11)
    ]
    assert all(
        (row["tokens"], row["tokens/s"], row["checked"], row["the plain text"]) == (48, 4.0, 6, 5)
        for row in found
    )
    assert taken[:10] == [
        (1, 0),
        (0, 0),
        (1, 0),
        (0, 1),
        (0, 2),
        (1, 2),
        (0, 3),
        (0, 4),
        (1, 4),
        (0, 5),
    ]
    assert endurance.growth({"tenths": found}, "share of a young process") == 9


def test_held_out_turns_are_the_last_ones_and_must_be_enough(monkeypatch):
    asked = []
    monkeypatch.setattr(results, "HELD_OUT_ROWS", 1)
    monkeypatch.setattr(
        results,
        "turn_prompts",
        lambda *args: asked.append(args) or {"validation": [[1], [2], [3], [4]], "train": [[5]]},
    )
    assert results.held_out_turns(
        decode.DecodeConfig(base="b", turns=["t"], prompts=3, prompt_tokens=9), None
    ) == [[2], [3], [4]]
    with pytest.raises(ValueError, match="4 turns are held out, 1 to calibrate on and --prompts 4"):
        results.held_out_turns(
            decode.DecodeConfig(base="b", turns=["t"], prompts=4, prompt_tokens=9), None
        )
    assert asked == [(["t"], "b", None, 9)] * 2
