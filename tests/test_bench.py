"""Properties of the measurements: arithmetic by hand and brute force; results on disk."""

import importlib
import itertools
import json
import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings, strategies as st

import medusa
import train
from bench import animation, bench, cost, decode, drawing, endurance, results
from bench import roofline, scoreboard, training, typical
from bench.dynamic import best_first_tree, dynamic_generate
from medusa import MedusaConfig, MedusaHeads, Sampling, generate, medusa_generate
from model import GPT, ModelConfig, read_json, write_json
from strategies import CheatingHeads, call, close, contents, distribution, follow, markov_gpt
from strategies import next_logits, properties, random_gpt, random_heads, rank_data, refused, rng
from strategies import text_distribution, text_of, write_base
from tree import calibrated_tree, cartesian_tree


# ---- trees from probabilities ----
def every_path(K: int, V: int) -> list[tuple[int, ...]]:
    return [path for depth in range(1, K + 1) for path in itertools.product(range(V), repeat=depth)]


def worth(paths, probs) -> Fraction:
    """The sum of the paths' probabilities."""
    return sum(math.prod(probs[k][rank] for k, rank in enumerate(path)) for path in paths)


# Many are equal, and some 0; their logarithms in base 2 add up without rounding.
powers = st.sampled_from([Fraction(0), *(Fraction(1, 2**n) for n in range(4))])
sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))  # K and V
head_probabilities = sizes.flatmap(lambda KV: st.tuples(*[st.tuples(*[powers] * KV[1])] * KV[0]))


@properties
@given(head_probabilities, st.integers(2, 12))
def test_a_best_first_tree_has_the_most_likely_paths_ties_to_shorter_then_lower(probs, n_nodes):
    paths, ranked = every_path(len(probs), len(probs[0])), [sorted(row)[::-1] for row in probs]
    order = sorted(paths, key=lambda path: (-worth([path], ranked), len(path), path))
    logs = torch.tensor([list(map(float, row)) for row in probs], dtype=torch.float64).log2()
    assert set(best_first_tree(logs, n_nodes).paths[1:]) == set(order[: n_nodes - 1])


@properties
@given(rank_data(max_depth=3, n_ranks=3), st.integers(2, 12))
def test_a_product_tree_is_the_best_if_heads_were_right_independently(rows, n_nodes):
    """No other paths, prefixes of each other or not, have more probability together."""
    counts = [Counter(row[k] for row in rows) for k in range(len(rows[0]))]
    share = [[Fraction(head[rank], len(rows)) for rank in range(3)] for head in counts]
    tree = decode.product_tree(rows, n_nodes)
    best = sorted(worth([path], share) for path in every_path(len(share), 3))[1 - len(tree) :]
    assert float(worth(tree.paths[1:], share)) == pytest.approx(float(sum(best)), rel=1e-12)


@settings(properties, max_examples=25)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 9), st.integers(0, 16), st.data())
def test_decoding_with_a_new_tree_every_step_is_plain_decoding(seed, K, n_nodes, n, data):
    pairs = (0.0, 0.8), (None, 2), (0, 3)
    temperature, eos, truncated = (data.draw(st.sampled_from(pair)) for pair in pairs)
    model = random_gpt(seed, eos=eos)
    heads = random_heads(model, K, seed, truncated=truncated)
    asked = ([seed % 5, 1], n, Sampling(temperature))
    steps = list(dynamic_generate(model, heads, n_nodes, *asked, rng(seed)))
    known = set(range(5) if heads.token_map is None else heads.token_map.tolist())
    assert all(set(step.tokens[1:].tolist()) <= known for step in steps), "a guess of the heads"
    assert text_of(steps) == text_of(generate(model, *asked, rng(seed)))


def test_a_new_tree_follows_heads_that_know_the_text():
    model = random_gpt(0)
    heads = CheatingHeads(model, 2, [0, *text_of(generate(model, [0], 12))], length=1)
    taken = follow(dynamic_generate(model, heads, 3, [0], 12), heads)
    assert [len(emitted) for emitted in taken] == [1, 3, 3, 3, 2]
    model, heads = markov_gpt([[40, 0, 0, 0]] * 4), MedusaHeads(MedusaConfig(4, 4, 3)).double()
    steps = dynamic_generate(model, heads, 4, [1], 13, Sampling(1.0), rng(0))
    assert [len(step.emitted) for step in steps] == [1, 4, 4, 4], "sampled, heads like the base"


# ---- typical acceptance: its distance, by enumeration of all outcomes of its samples ----
@pytest.mark.parametrize("seed", range(2))
def test_the_distances_of_typical_acceptance_are_those_of_its_texts(seed, monkeypatch):
    """By the chain rule the KL divergence of whole texts is the mean, over texts, of the sum of
    that at their positions."""
    model, n, prompt, found = random_gpt(seed, vocab_size=4), 3, [1], {}
    sampling = Sampling(0.9, typical=True, epsilon=0.2)
    asked = random_heads(model, 2, seed), cartesian_tree([2, 2]), prompt, n, sampling, rng(0)
    for script in itertools.product(range(4), repeat=n):
        left = iter(script)
        monkeypatch.setattr(medusa, "sample", lambda x, *_: torch.full((len(x),), next(left)))
        steps = list(medusa_generate(model, *asked))
        kl, variation = typical.distances(model, prompt, steps, sampling)
        close(variation, 1 - torch.exp(-kl))
        text, prob, length = text_of(steps), 1.0, 0
        for step in steps:  # the last token of a path was sampled, the others were not
            length += len(step.emitted)
            if len(step.emitted) == len(step.path):
                logits = next_logits(model, [*prompt, *text[: length - 1]])
                prob *= distribution(logits, sampling.temperature)[text[length - 1]]
        found[tuple(text)] = prob, kl.sum().item(), len(steps)
    base, probs = text_distribution(model, prompt, n, sampling), {t: found[t][0] for t in found}
    whole = sum(prob * math.log(prob / base[text]) for text, prob in probs.items())
    assert whole == pytest.approx(sum(prob * kl for prob, kl, _ in found.values()), rel=1e-9)
    assert sum(probs.values()) == pytest.approx(1) and whole > 0.01
    assert any(steps < n for _, _, steps in found.values()), "no guess is ever accepted"


# ---- what is predicted ----
def test_a_step_is_bound_by_what_it_reads_until_it_is_bound_by_what_it_computes():
    model = ModelConfig(10, 4, 6, 2, 2, 1, 16, tie_word_embeddings=False, head_dim=6)
    named = GPT(model).named_parameters()
    matrices = sum(p.numel() for name, p in named if p.dim() == 2 and "embed" not in name)
    assert roofline.matrices(model) == matrices
    device = roofline.Device(bandwidth=100.0, flops=1000.0)
    assert device.seconds(200, 1000) == 2 and device.seconds(200, 4000) == 4


# ---- what is timed ----
def timing(text, steps, seconds) -> decode.Timing:
    return decode.Timing(text, len(text) - 1, steps, seconds)


def test_worked_example_of_a_comparison():
    """Ratios are taken within a round, over its prompts; then the median over the rounds."""
    text, loop = [1, 2, 3, 4, 5], [1, 1, 1, 1, 1]
    plain = [[timing([1] * 9, 8, seconds)] * 2 for seconds in (8.0, 16.0)]
    mine = [[timing(text, 2, 3.0), timing(loop, 2, 1.0)], [timing(text, 2, 2.0)] * 2]
    found = decode.summary(mine, plain)
    expected = {"tokens/step": 2.0, "step cost": (1.0 + 0.5) / 2, "tokens/s": 2.0, "ratio": 3.0}
    expected |= {"milliseconds of a step": 1000.0, "lowest ratio": 2.0, "highest ratio": 4.0}
    assert found == expected | {"distinct 4-grams": 0.75}
    # In the second round the machine was four times as slow.
    steps, plain = ([[{"step": seconds * slow}] * 2 for slow in (1, 4)] for seconds in (3.0, 2.0))
    assert cost.step_cost(steps, plain) == 1.5


def test_every_way_comes_as_often_and_none_always_first():
    taken, ways = [], {}
    for name in "abc":
        ways[name] = lambda prompt, seed, name=name: taken.append(name) or timing([seed], 1, 1.0)
    for rounds in decode.in_turn(ways, [[0, 1], [0], [0, 1, 2]], 2, "").values():
        assert [[t.text[0] for t in round_] for round_ in rounds] == [[0, 1, 2]] * 2
    assert "".join(taken[6::3]) == "abcabc", "after a warm-up of six"


def test_a_stopwatch_takes_off_what_is_inside(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0, 20.0, 21.0, 24.0, 30.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(now))
    watch = cost.Stopwatch()
    lm_head = watch.wrap("backbone", lambda: None)
    watch.wrap("choosing", lm_head)()  # 0 .. 10, of which 1 .. 3 are the LM head's
    assert dict(watch.seconds) == {"choosing": 8.0, "backbone": 2.0}
    watch.wrap("heads", lm_head)()  # 20 .. 30, all of it the heads'
    assert watch.seconds["heads"] == 10.0 and watch.seconds["backbone"] == 2.0


@pytest.mark.parametrize("mode", ["medusa1", "medusa2-lora"])
def test_a_training_run_is_timed_and_leaves_nothing(mode, base, text, shards, tmp_path):
    more = {"text": text, "distilled": shards, "batch": 3}
    before, loop = contents(tmp_path), train.train_loop
    with patch.dict(training.MODES, {mode: training.MODES[mode] | more}):
        found = training.time_loop(mode, str(base), 4)
    assert 3 <= found["tokens in a step"] <= 3 * 13
    assert contents(tmp_path) == before and train.train_loop is loop


# ---- results on disk ----
STORED = Path(results.__file__).with_name("results")
SHOWN = {"decode": decode, "typical": typical, "train": training, "endurance": endurance}
SHOWN |= {f"{folder}/decode": decode for folder in ("smollm2", "twenty")}


@pytest.mark.parametrize("name", [*SHOWN, "decoding"])
def test_what_is_shipped_is_drawn_of_its_results(name):
    path = STORED / f"{name}.json"
    content = json.loads(path.read_text())
    if name == "decoding":
        assert path.with_suffix(".svg").read_text() == drawing.picture(content)
    else:
        shown = SHOWN[name].table(content["results"]) + "\n\n"
        assert path.with_suffix(".md").read_text().startswith(shown)


@pytest.mark.parametrize("says, argv", [
    ("--only nothing: there are roofline, greedy", ["cost", "--only", "nothing"]),
    ("cost.json does not exist: python bench/bench.py cost", ["predict", "--cost", "no/cost.json"]),
])  # fmt: skip
def test_a_mistake_costs_one_line_and_nothing_else(says, argv, tmp_path, capsys):
    assert "\n" not in refused(says, call, bench.main, *argv, "--out", tmp_path / "out")
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_run_that_was_stopped_measures_what_is_missing(tmp_path):
    config, taken = decode.DecodeConfig(out=str(tmp_path)), []

    def section(name):
        taken.append(name)
        if taken == ["a", "b"]:
            raise KeyboardInterrupt
        return {"of": name}

    def measure(config):
        sections = {name: partial(section, name) for name in "abc"}
        results.measure("decode", config, sections, " ".join)

    with pytest.raises(KeyboardInterrupt):
        measure(config)
    assert json.loads((tmp_path / "decode.json").read_text())["results"].keys() == {"a"}
    assert (tmp_path / "decode.md").read_text().startswith("a\n")
    measure(replace(config, only=["c"]))
    measure(config)
    refused("is of another command.*--rounds 9", measure, replace(config, rounds=9))
    assert taken == ["a", "b", "c", "b"]


@pytest.fixture
def small(tmp_path, monkeypatch) -> list:
    """Flags for a base of a few hundred weights, and what takes long replaced."""
    base, heads = write_base(tmp_path), tmp_path / "heads"
    random_heads(GPT.from_pretrained(base), 2, 0).save_pretrained(heads)
    counts = {"steps": 9, "prefixes": {"0": 5, "1": 2, "0 0": 3, "0 1": 1, "2": 1}}
    write_json(heads / "calibration.json", dict.fromkeys(("0.0", "0.7", "1.0"), counts))
    tree = calibrated_tree([(0, 0), (1, 0)], 3)
    rows = torch.randint(9, (6, 20), generator=rng(0)), torch.ones(6, 20, dtype=torch.bool)
    for module, name, value in [
        (results, "documents", lambda validation: ["def f(x):\n    return x\n" * 30]),
        (results, "packed", lambda texts, tokens: torch.tensor(tokens.encode(texts[0]))),
        (decode, "distilled_rows", lambda config, out, shards: shards),
        (decode, "held_out_rows", lambda *_: dict.fromkeys(("0.0", "0.7", "1.0"), rows)),
        (decode, "pick_tree", lambda *_: (tree, "so")),
        (cost, "CONTEXTS", (4, 8)),
        (cost, "measured_bandwidth", lambda n_bytes: 1e9),
        (cost, "measured_flops", lambda: 1e9),
        (endurance, "ProcessPoolExecutor", lambda n, _, *more: ThreadPoolExecutor(n, "", *more)),
        (endurance.signal, "signal", lambda *_: None),  # a thread may not
    ]:
        monkeypatch.setattr(module, name, value)
    return ["--base", base, "--heads", heads, "--out", tmp_path / "out"]


def test_every_subcommand_measures_and_predict_reads_what_they_wrote(small, capsys):
    ways = [way for way in decode.WAYS if not way.startswith("transformers")]
    short, out = "--prompt-tokens 6 --new-tokens 8", small[-1]
    runs = {
        "typical": f"--prompts 2 {short}",
        "cost": "--rounds 2 --steps 2 --nodes 3",
        "decode": f"--prompts 2 {short} --rounds 2 --device cpu --dtype float64 --ways "
        + " ".join(ways),
        "predict": f"--context 64 --cost {out}/cost.json --decode {out}/decode.json",
        "endurance": f"{short} --tokens 160 --nodes 3 --checks 2 --pairs 1",
    }
    found = {}
    for name, flags in runs.items():
        call(bench.main, name, *small, *flags.split())
        found[name] = json.loads((out / f"{name}.json").read_text())["results"]
        shown = capsys.readouterr().out.partition(f"\n\n{out}")[0]
        assert (out / f"{name}.md").read_text().startswith(shown)

    for rule, result in found["decode"].items():
        rows = result["ways"]
        assert list(rows) == ways
        assert rule == "typical" or {row["identical texts"] for row in rows.values()} == {2}
        assert rows["plain"]["tokens/step"] == 1 and rows["plain"]["ratio"] == pytest.approx(1)
        assert rows["chain"]["nodes"] == 3 == rows["dynamic-cost-chosen"]["nodes"]
    for section in found["typical"].values():
        assert section["points"]["lossless"]["KL"] == 0 < section["points"]["0.01"]["KL"]
    here = found["predict"]["here"]["rules"]["greedy"]["sizes"]["4"]
    row = found["cost"]["greedy"]["steps"]["8"]["4"]
    assert min(row[part] for part in cost.ALL_PARTS) > 0
    speed_up = (9 + 5 + 3 + 2) / 9 / row["step cost"]
    assert here["predicted"]["speed-up"] == pytest.approx(speed_up)
    measured = found["decode"]["greedy"]["ways"]["calibrated-4"]["ratio"]
    assert here["error"]["speed-up"] == pytest.approx(speed_up / measured - 1)
    for section in found["endurance"].values():
        rows = [(r["tokens"], r["checked"], r["the plain text"]) for r in section["tenths"]]
        assert rows == [(16, 2, 2)] * 10


# ---- figures ----
def labels_of(path: Path) -> set[str]:
    """An SVG has text as outlines, each after a comment that says it."""
    return set(re.findall(r"<!-- (.+) -->", path.read_text(encoding="utf-8")))


def test_figures_are_those_that_are_shipped_show_all_points_and_cover_no_label(tmp_path):
    """Results, and the log of a training run in which the last two heads come close."""
    pytest.importorskip("matplotlib")
    plot, log, records = importlib.import_module("bench.plot"), tmp_path / "log.jsonl", []
    for step in range(250):
        losses = [2 + head + 100 / (step + 10) for head in (0, 1, 1.9, 2)]
        top1 = [1 / loss for loss in losses]
        records.append({"step": step, "base": 3.0, "heads": losses, "top1": top1})
    log.write_text("\n".join(map(json.dumps, records)))
    plot.draw_results(tmp_path)
    plot.draw_log(log)
    for scheme in ("light", "dark"):
        for name in ("speed", "typical"):
            file = f"{name}-{scheme}.svg"
            assert labels_of(tmp_path / file) == labels_of(STORED / file), "python bench/plot.py"
            assert (STORED / file).stat().st_size < 100_000
        drawn = tmp_path / f"training-{scheme}.svg"
        assert {"head 1", "head 4", "base", "top-1 accuracy"} <= labels_of(drawn)
        assert plot.style(scheme == "dark")["figure.facecolor"] in drawn.read_text()
    asked = [(draw, read_json(STORED / name)["results"]) for _, name, draw in plot.SOURCES]
    for draw, data in [*asked, (plot.draw_training, records)]:
        with plot.pyplot.rc_context(plot.style(dark=False)):
            figure = draw(data)
        boxes = [axes.title.get_window_extent() for axes in figure.axes]
        for axes in figure.axes:
            boxes += [text.get_window_extent() for text in axes.texts if text.get_text() != ""]
            for line in axes.lines:
                if line.get_marker() == "o":
                    points = axes.transData.transform(line.get_xydata())
                    assert all(axes.bbox.contains(x, y) for x, y in points)
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        plot.pyplot.close(figure)


# ---- the README's picture ----
def test_the_picture_shows_one_text_twice_and_needs_nothing_from_anywhere(small):
    base, out = small[1], small[-1]
    flags = [*small, "--prompt-tokens", 6, "--new-tokens", 30]
    call(animation.main, *flags)
    svg = (out / "decoding.svg").read_text()
    with patch.object(animation, "measure", side_effect=AssertionError("measured twice")):
        call(animation.main, *flags)
    assert (out / "decoding.svg").read_text() == svg and len(svg.encode()) < 300_000

    # One file, that every reader of XML understands, in light and dark and without motion.
    root = ElementTree.fromstring(svg)
    tags = {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in root.iter()}
    assert tags == set("svg title desc style g rect text tspan path circle".split())
    assert not re.search(r"url\(|@import|@font-face|href|\bsrc|\bon\w+=", svg)
    assert svg.count("prefers-color-scheme: dark") == svg.count("prefers-reduced-motion") == 1

    # Both ways show plain decoding's text, after the last line of the prompt.
    content = json.loads((out / "decoding.json").read_text())
    tokenizer, model, _ = results.load(results.Bench(base=str(base), heads=str(small[3])))
    prompts = results.held_out_prompts(tokenizer, animation.PROMPTS, 6)
    prompt = next(p for p in prompts if tokenizer.decode(p) == content["prompt"])
    text = tokenizer.decode([*prompt, *text_of(generate(model, prompt, 30))])
    text = text[content["prompt"].rstrip("\n").rfind("\n") + 1 :].replace("\n", "")
    for way in ("plain", "medusa"):
        drawn = root.find(f".//*[@id='{way}']").iterfind(".//{*}text")
        shown = "".join(element.text for element in drawn)
        assert shown == "".join(c if c.isprintable() else "\ufffd" for c in text)
    assert {group.get("class") for group in root.iterfind(".//{*}g")} >= {"on", "now", "now last"}


# ---- the scoreboard ----
def test_a_score_is_of_rows_that_did_not_choose_the_tree(monkeypatch, tmp_path):
    """Both heads right in every row: 3 tokens a step. Rows 1 and 3 of another rank: 1."""
    first, other = torch.zeros(6, 2).long(), torch.ones(6, 2).long()
    for ranks, score in (([first] * 4, 3), ([first, other] * 2, 1)):
        monkeypatch.setattr(scoreboard, "head_ranks", lambda *_: ranks)
        heads = random_heads(random_gpt(0), 2, 0)
        assert scoreboard.tokens_per_step(None, heads, (), 16) == score
    assert [scoreboard.points(score) for score in (1.59, 1.6, 2.85, 4)] == [0, 2, 10, 20]
    (tmp_path / "model.safetensors").write_bytes(bytes(1_000_001))
    refused("1,000,001 bytes, more than 1,000,000", call, scoreboard.main, tmp_path)


@pytest.mark.course
@pytest.mark.parametrize("heads", ["data/heads", "data/sequential-heads"])
def test_the_scoreboard_says_what_its_command_prints(heads, capsys):
    call(scoreboard.main, heads)
    lines = (scoreboard.ROOT / "bench/scoreboard.md").read_text().splitlines()
    line = next(line for line in lines if f"`{heads}`" in line)
    greedy, sampled, size, points = (part.strip() for part in line.split("|")[2:6])
    says = f"{points} points; tokens/step {greedy} at 0.0, {sampled} at 0.7; {size} bytes"
    assert says in capsys.readouterr().out
