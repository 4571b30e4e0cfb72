"""Properties of training: flags, batches, the loop, self-distillation, calibration, Medusa-1."""

import copy
import json
import math
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import chain, product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn

import train
from data.command import OneLineParser, add_options
from data.corpus import documents, packed
from data.rows import read_shards, write_shard
from data.tokenizer import load_base
from medusa import MedusaConfig, MedusaHeads, Sampling, generate
from model import GPT, read_json, read_safetensors, write_json, write_safetensors
from strategies import CPU, KINDS, base_config, chi_square, contents, distilling, log_of
from strategies import properties, random_gpt, random_heads, rate, refused, rng
from strategies import text_distribution, text_of, training, unit
from train import MODES, TEMPERATURES, CalibrateConfig, DistillConfig, Medusa1Config, Run
from train import TrainConfig, answer_turns, calibrate, calibrate_heads, distill, distilled_rows
from train import head_ranks, make_batch, noise_given_tokens, perplexity, sample_rows, text_rows
from train import train_base, train_loop, train_medusa1, training_data
from tree import calibrated_tree, read_counts, replay


# ---- the command line ----
def parse(config: type, arguments: list[str]):
    parser = OneLineParser(prog="train.py")
    add_options(parser, config)
    return config(**vars(parser.parse_args(arguments)))


# A value that is not the default, of the same type.
OTHER = {bool: lambda x: not x, int: lambda x: x + 3, float: lambda x: x / 2}
OTHER |= {str: lambda x: x + "3", list: lambda _: ["a", "b c"]}


@pytest.mark.parametrize("mode", MODES)
def test_every_field_is_a_flag_at_most_21_a_mode_and_sets_that_field_alone(mode):
    config, _ = MODES[mode]
    assert parse(config, []) == config() and len(fields(config)) <= 21
    for field in fields(config):
        default = getattr(config(), field.name)
        choices = [x for x in field.metadata.get("choices", ()) if x != default]
        value = choices[0] if choices else OTHER[type(default)](default)
        flag, more = "--" + field.name.replace("_", "-"), {}
        arguments = [flag, *value] if isinstance(value, list) else [flag, str(value)]
        if isinstance(value, bool):
            arguments = [flag if value else flag.replace("--", "--no-", 1)]
        if field.name == "context" and mode.startswith("medusa"):
            arguments, more = [*arguments, "--data", "corpus"], {"data": "corpus"}
        chosen = parse(config, arguments)
        assert chosen == replace(config(), **{field.name: value}, **more)
        assert type(getattr(chosen, field.name)) is type(value)


# ---- the loop ----
@dataclass(frozen=True)
class LoopConfig(TrainConfig):
    weight_decay: float = 0.5


def a_run(out, parts: dict[str, nn.Module], **more) -> Run:
    named = {part: dict(module.named_parameters()) for part, module in parts.items()}
    config = LoopConfig(**CPU, out=str(out), **{"warmup": 1} | more)
    return Run(config, torch.device("cpu"), named, "")


def train_on(run: Run, gradients: list[dict], lr_factors: dict, metrics, first=0) -> None:
    """The loop on losses of these gradients, one {(part, name): gradient} a step."""

    def loss_of(step):
        pairs = [(run.parts[part][name], g) for (part, name), g in gradients[step - first].items()]
        return torch.stack([(p * g).sum() for p, g in pairs]).sum(), torch.tensor(metrics[step])

    steps = range(first, first + len(gradients))
    train_loop(run, steps, lambda step: step, loss_of, lr_factors)


def adamw(parts: dict[str, nn.Module], gradients: list[dict], rates: list[dict], clip, decay):
    """Each part by itself; gains and biases do not decay. Returns the norms of the gradients."""
    norms = []
    for part, module in parts.items():
        flat = [p for name, p in module.named_parameters() if name.endswith(("m.weight", "bias"))]
        steep = [p for p in module.parameters() if all(p is not other for other in flat)]
        groups = [{"params": flat, "weight_decay": 0.0}, {"params": steep, "weight_decay": decay}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
        for gradient, rate_of in zip(gradients, rates):
            for name, p in module.named_parameters():
                p.grad = gradient[part, name].clone()
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), clip).item())
            for group in optimizer.param_groups:
                group["lr"] = rate_of[part]
            optimizer.step()
    return norms


@settings(properties, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 2), st.booleans(), st.integers(0, 999), st.data())
def test_the_loop_is_adamw_clipped_part_by_part(tmp_path_factory, K, J, shared, seed, data):
    """Warm-up and cosine from the first step of a stage; weight decay of matrices alone."""
    first, steps, warmup = (data.draw(st.integers(*span)) for span in ((0, 3), (1, 9), (1, 9)))
    clip, decay = data.draw(st.floats(0.01, 20)), data.draw(st.floats(0, 0.5))
    heads = MedusaHeads(MedusaConfig(3, 4, K, J, shared)).double()
    parts, weights, gradients = {"heads": heads, "base": random_gpt(seed)}, {}, []
    for part, module in parts.items():
        for name, p in module.named_parameters():
            p.data = torch.randn(p.shape, generator=rng(seed), dtype=torch.float64)
            weights[part, name] = p
    for size in data.draw(st.lists(st.integers(-2, 2), min_size=steps, max_size=steps)):
        gradients.append({at: 10.0**size * torch.randn_like(p) for at, p in weights.items()})
    copies, metrics = copy.deepcopy(parts), [[n, 2.0, 3.0, 0.25, 0.5] for n in range(first + steps)]
    more = {"warmup": warmup, "lr": 0.05, "weight_decay": decay}
    run = a_run(tmp_path_factory.mktemp("run"), parts, **more)
    with patch.object(train, "MAX_NORM", clip):
        train_on(run, gradients, {"heads": 1.0, "base": 0.25}, metrics, first)
    plain = [rate(step, 0.05, warmup, steps) for step in range(steps)]
    rates = [{"heads": value, "base": value / 4} for value in plain]
    norms = adamw(copies, gradients, rates, clip, decay)
    for part, module in copies.items():
        for name, p in module.named_parameters():
            torch.testing.assert_close(weights[part, name], p, rtol=1e-5, atol=1e-6)
    for n, record in enumerate(log_of(run.config.out)):
        assert record.pop("lr") == pytest.approx(rates[n])
        found = record.pop("norm")
        assert [found["heads"], found["base"]] == pytest.approx(norms[n::steps])
        both = {"heads": [2.0, 3.0], "top1": [0.25, 0.5]}
        assert record == {"step": first + n, "base": first + n} | both


@pytest.mark.parametrize("where", [0, 1, "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_before_it_moves_a_weight(where, value, tmp_path, monkeypatch):
    """The loss of base or heads, or a gradient; the checkpoint is that of the step before."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    module, metrics = nn.Linear(2, 2), [[1.0, 2.0, 0.5] for _ in range(3)]
    gradients = [{("it", "weight"): torch.ones(2, 2)} for _ in range(3)]
    if where == "gradient":
        gradients[2]["it", "weight"] *= value
    else:
        metrics[2][where] = value
    says, run = "^step 2: loss or gradient is not finite; [^\n]*$", a_run(tmp_path, {"it": module})
    refused(says, train_on, run, gradients, {"it": 1.0}, metrics)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["it"]["weight"]
    assert torch.equal(saved, module.weight) and len(log_of(tmp_path)) == 2


# ---- batches ----
@properties
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 9))
def test_every_row_comes_once_in_random_order_before_any_comes_again(R, size, seed):
    """And a batch depends on its step alone."""
    heads = random_heads(random_gpt(0), 1, 0)
    data = torch.zeros(R, 3, dtype=torch.long), torch.ones(R, 3, dtype=torch.bool)
    steps = range(math.ceil(8 * R / size))
    config = TrainConfig(batch=size, seed=seed)
    batches = [make_batch(config, data, heads, torch.device("cpu"), step) for step in steps[::-1]]
    order = [row for batch in batches[::-1] for row in batch.rows.tolist()]
    epochs = [tuple(order[at : at + R]) for at in range(0, 8 * R, R)]
    assert all(sorted(epoch) == list(range(R)) for epoch in epochs)
    assert R < 3 or len(set(epochs)) > 1


@settings(properties, max_examples=60)
@given(st.integers(1, 9), st.integers(2, 30), st.booleans(), st.integers(0, 999))
def test_perplexity_scores_every_token_after_half_a_context(context, length, chunked, seed):
    """Token t sees the text from the earliest multiple of half a context that reaches it."""
    model, total = random_gpt(seed, context=context), 0.0
    tokens = torch.randint(5, (length,), generator=rng(seed), dtype=torch.int32)
    for t in range(1, length):
        hops = range(0, t, max(context // 2, 1))
        start = next(start for start in hops if t - start <= context)
        hidden = model(tokens[None, start:t].long()).detach()
        total -= model.lm_head(hidden)[0, -1].log_softmax(-1)[tokens[t]].item()
    chunk = 10 if chunked else 1 << 20
    with patch.multiple(train, CHUNK_LOGITS=chunk, PERPLEXITY_TOKENS=length):
        found = perplexity(model, torch.cat((tokens, tokens)))  # the second half is beyond it
    assert math.isclose(found, math.exp(total / (length - 1)), rel_tol=1e-9)


def test_a_new_base_repeats_with_its_seed_and_sees_training_text_alone(tmp_path, text, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "text_rows", lambda t, *more: seen.append(t) or text_rows(t, *more))
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        train_base(base_config(tmp_path, text, name, seed=seed))
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and one["model.safetensors"] != three["model.safetensors"]
    corpus = packed(documents(False, text), load_base(tmp_path / "one")[0])
    assert len(seen) == 3 and all(torch.equal(tokens, corpus) for tokens in seen)


# ---- text that the base writes itself ----
@st.composite
def dialogues_of_a_base(draw):
    """Turns of 1 to 6 tokens, EOS among them, most often one a dialogue; the length of the rows."""
    V, seed = draw(st.integers(2, 5)), draw(st.integers(0, 999))
    ends = draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=2))
    model = random_gpt(seed, V, 16, eos=ends)
    turn = st.lists(st.integers(0, V - 1), min_size=1, max_size=6)
    turns = st.lists(turn, min_size=1, max_size=draw(st.sampled_from((1, 4))))
    dialogues = draw(st.lists(turns, min_size=1, max_size=6))
    return model, dialogues, max(len(turns[0]) for turns in dialogues) + draw(st.integers(1, 10))


@settings(properties, max_examples=150)
@given(dialogues_of_a_base())
def test_greedy_rows_are_what_plain_decoding_answers_turn_by_turn_whatever_the_other_rows(case):
    """A turn is given where the answer before has ended, and there is room. Loss: answers alone."""
    model, dialogues, length = case
    tokens, mask = answer_turns(model, dialogues, length, Sampling(), rng(0))
    assert tokens.shape == mask.shape == (len(dialogues), length) and mask.dtype == torch.bool
    for turns, row, loss in zip(dialogues, tokens.tolist(), mask.tolist()):
        text, sampled = [], []
        for turn in turns:
            ended = text == [] or text[-1] in model.config.eos_ids
            if not ended or len(text + turn) >= length:
                break
            answer = text_of(generate(model, text + turn, length - len(text + turn)))
            text, sampled = text + turn + answer, sampled + [0] * len(turn) + [1] * len(answer)
        assert row[: len(text)] == text and loss == sampled + [0] * (length - len(text))


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.5, top_p=0.9)])
def test_sampled_rows_follow_the_base_distribution_each_on_its_own(sampling):
    model, n, first = random_gpt(11, vocab_size=6, eos=3), 3000, []
    prompts = [[1, 2], [4, 0]]
    tokens, mask = sample_rows(model, prompts * n, 5, sampling, rng(0))
    for i, prompt in enumerate(prompts):
        counts = Counter(tuple(row[loss].tolist()) for row, loss in zip(tokens[i::2], mask[i::2]))
        expected = text_distribution(model, prompt, 3, sampling)
        assert len({len(new) for new in expected}) > 1 and chi_square(counts, expected, n) > 0.01
        first.append(tokens[i::2, 2].tolist())
    counts = [Counter(tokens) for tokens in first]
    independent = {(a, b): counts[0][a] * counts[1][b] / n**2 for a, b in product(*counts)}
    assert chi_square(Counter(zip(*first)), independent, n) > 0.01


def rows_of(directory) -> dict[str, dict]:
    return {path.name: read_safetensors(path) for path in Path(directory).iterdir()}


def test_rows_are_windows_of_their_side_and_what_the_base_writes_after_them(base, text, tmp_path):
    more = {"new_tokens": 36, "out": str(tmp_path / "rows")}  # to the end of the context
    rows = rows_of(distill(distilling(base, text, seed=2, **more)))
    tokenizer, model = load_base(base)
    held_out = {f"validation-{t}.safetensors" for t in TEMPERATURES}
    assert rows.keys() == held_out | {f"train-{i:05d}.safetensors" for i in range(3)}
    for name, shard in rows.items():
        assert shard["tokens"].shape == shard["loss"].shape == (5, 40)
        assert not shard["loss"][:, :4].any() and shard["loss"][:, 4].all()
        side = packed(documents(name in held_out, text), tokenizer).unfold(0, 4, 1).tolist()
        prompts, greedy = shard["tokens"][:, :4].tolist(), rows["validation-0.0.safetensors"]
        assert all(prompt in side for prompt in prompts)
        same = prompts == greedy["tokens"][:, :4].tolist()
        assert name not in held_out or same, "one set of prompts at all temperatures"
    for row, loss in zip(greedy["tokens"], greedy["loss"]):
        assert row[loss].tolist() == text_of(generate(model, row[:4].tolist(), 36))


def test_temperature_and_top_p_shape_training_rows_and_no_file_repeats(base, text, tmp_path):
    """Greedy rows, and those sampled from one token, are equal."""
    made = []
    for seed, temperature, top_p in ((0, 0.0, 1.0), (0, 1.0, 1e-9), (0, 1.0, 1.0), (1, 1.0, 1.0)):
        more = {"out": str(tmp_path / f"{len(made)}"), "temperature": temperature, "top_p": top_p}
        rows = rows_of(distill(distilling(base, text, seed=seed, **more)))
        made.append({name: shard["tokens"].tolist() for name, shard in rows.items()})
    greedy, narrow, wide, other = made
    for name in greedy:
        assert greedy[name] == narrow[name]
        assert (greedy[name] == wide[name]) == name.startswith("validation")
    files = [*wide.values(), *other.values()]
    assert len({str(rows) for rows in files}) == 12
    assert len({str([row[:4] for row in rows]) for rows in files}) == 8, "held-out ones share them"


@pytest.mark.parametrize("processes, lost", [(1, {0}), (1, {1, 2, 5}), (2, range(6)), (6, {0, 4})])
def test_lost_files_are_made_again(processes, lost, base, text, tmp_path, monkeypatch):
    """By all processes, each its share; the others are kept."""
    config, waited = distilling(base, text, out=str(tmp_path / "rows")), []
    whole = contents(distill(config))
    for i in lost:
        (tmp_path / "rows" / sorted(whole)[i]).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    monkeypatch.setattr(train.dist, "barrier", lambda: waited.append(len(contents(config.out))))
    for rank in range(processes):
        monkeypatch.setattr(train, "rank_and_world_size", lambda: (rank, processes))
        distill(config)
    assert contents(config.out) == whole and len(waited) == (processes if processes > 1 else 0)
    assert processes != 2 or waited == [3, 6], "each makes its share"
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())


@pytest.mark.parametrize("change", ["base", "garbage", "settings", "text"])
def test_rows_of_another_base_text_or_settings_are_refused(change, base, text, tmp_path):
    config, first = distilling(base, text, out=str(tmp_path / "rows")), Path(text[0])
    distill(config)
    if change == "base":
        write_json(base / "config.json", read_json(base / "config.json") | {"rope_theta": 77.0})
    elif change == "garbage":
        (tmp_path / "rows" / "train-00000.safetensors").write_bytes(b"garbage")
    elif change == "text":
        first.write_text(2 * first.read_text("utf-8"), "utf-8")
    config, before = replace(config, seed=int(change == "settings")), contents(config.out)
    refused(r"safetensors.* of another base, text or settings: ", distill, config)
    assert contents(tmp_path / "rows") == before


def test_chat_rows_answer_every_turn_equally_often(base, text, tmp_path, monkeypatch):
    turns = {"train": [[[n] * n] for n in (3, 1, 4, 2)], "validation": [[[9] * 4], [[8, 8]]]}
    sides = {side: dict(enumerate(given)) for side, given in turns.items()}
    monkeypatch.setattr(train, "split_dialogues", lambda _: sides)
    monkeypatch.setattr(train, "given_turns", lambda dialogues, *_: list(dialogues.values()))
    monkeypatch.setattr(train, "read_template", lambda _: "")
    monkeypatch.setattr(train, "HELD_OUT_ROWS", 3)
    more = {"chat": True, "rows": 4, "shards": 2, "out": str(tmp_path / "rows")}
    found = {"train-00000": [3, 1, 4, 2], "train-00001": [3, 1, 4, 2]}
    found |= {f"validation-{t}": [4, 2, 4] if t > 0 else [4, 2] for t in TEMPERATURES}
    for name, shard in rows_of(distill(distilling(base, text, **more))).items():
        lengths = shard["loss"].int().argmax(1).tolist()
        prompts = [row[:length] for row, length in zip(shard["tokens"].tolist(), lengths)]
        assert lengths == found.pop(name.removesuffix(".safetensors"))
        assert all([prompt] in turns[name.partition("-")[0]] for prompt in prompts)
    assert not found


@pytest.mark.parametrize("empty", [(), ("train",), ("validation",)])
def test_dialogues_train_up_to_their_last_answer_on_both_sides(empty, base, tmp_path, monkeypatch):
    def rows(side, *_):
        mask = torch.tensor([[False, True, False, False], [False, True, False, True]])
        n = 0 if side in empty else 2
        return torch.tensor([[5, 6, 0, 0], [7, 8, 9, 1]])[:n], mask[:n], 0

    monkeypatch.setattr(train, "dialogue_rows", rows)
    for name in ("distilled_rows", "held_out_rows"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr(train, "split_dialogues", lambda _: {s: s for s in ("train", "validation")})
    config = Medusa1Config(base=str(base), out=str(tmp_path / "out"), data="chat", context=4)
    given = config, *load_base(base), 2
    if empty:
        refused("no dialogue has an answer that ends in --context 4", training_data, *given)
    else:
        (tokens, _), _, text = training_data(*given)
        assert len(tokens) == 2 and text.tolist() == [5, 6, 7, 8, 9, 1]


def test_rows_are_of_the_base_and_named_shipped_or_made(base, text, shards, tmp_path, monkeypatch):
    config, made = training(base, text, tmp_path / "heads", distilled=shards), []

    def rows_for(config, shards=12):
        return distilled_rows(config, f"{config.out}/rows", shards)

    assert rows_for(config) == Path(shards)
    monkeypatch.setattr(train, "distill", lambda config: made.append(config) or Path("made"))
    shipped = Medusa1Config(out=str(tmp_path / "out"), seed=5, **CPU)
    assert rows_for(shipped) == Path("data/distilled") and not made
    for other in ({"text": text}, {"base": str(base)}):
        assert rows_for(replace(shipped, **other)) == Path("made")
        assert made.pop() == DistillConfig(out=f"{tmp_path}/out/rows", seed=5, **CPU, **other)
    chat = {"distilled": "", "data": "chat", "context": 9, "text": text}
    rows_for(replace(config, **chat), shards=0)
    sizes = {"shards": 0, "chat": True, "prompt_tokens": 4, "new_tokens": 5, "text": text}
    out = f"{tmp_path}/heads/rows"
    assert made.pop() == DistillConfig(base=str(base), out=out, **sizes, **CPU)
    write_json(base / "config.json", read_json(base / "config.json") | {"rope_theta": 77.0})
    refused("--distilled: .* written by ", rows_for, config)
    for path in Path(shards).iterdir():
        write_safetensors(path, read_safetensors(path))
    assert rows_for(config) == Path(shards), "rows without a mark may be of any base"


# ---- ranks and calibration ----
def ranks_by_hand(model, heads, rows, temperature=0.0, noise=None) -> list[list[list[int]]]:
    """One position at a time; noise (R, T, V): [:, t] is what token t+1 was sampled with."""
    K, V, found = heads.config.num_heads, model.config.vocab_size, []
    known = list(range(V)) if heads.token_map is None else heads.token_map.tolist()
    for b, (row, loss) in enumerate(zip(*rows)):
        seen = nn.functional.pad(row[None], (0, K)).unfold(1, K, 1)[:, 1:]  # (1, T, K), t+1 to t+K
        hidden, lm_head = model(row[None]), heads.truncated(model.lm_head)
        logits = heads(hidden, lm_head, unit(model, seen))[:, 0].detach()  # (K, T, v)
        found.append([])
        for t in range(len(row) - K - 1):
            if not loss[t + 1 : t + K + 2].all():
                continue
            ranks = []
            for k in range(1, K + 1):
                scores = dict(zip(known, logits[k - 1, t].tolist()))
                if temperature > 0:
                    waits = noise[b, t + k].log().tolist()
                    scores = {i: x / temperature - waits[i] for i, x in scores.items()}
                score = scores.get(row[t + k + 1].item())
                ranks.append(V if score is None else sum(x > score for x in scores.values()))
            found[-1].append(ranks)
    return found


@st.composite
def measured_rows(draw):
    K, B, seed = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 999))
    T, model = draw(st.integers(K + 2, 9)), random_gpt(seed)
    tokens = torch.randint(5, (B, T), generator=rng(seed))
    mostly = st.sampled_from((True, True, True, False))
    mask = torch.tensor(draw(st.lists(mostly, min_size=B * T, max_size=B * T))).view(B, T)
    heads = random_heads(model, K, seed, 1, *draw(st.sampled_from(KINDS)))
    return model, heads, (tokens, mask)


@settings(properties, max_examples=120)
@given(measured_rows(), st.sampled_from((0.0, 0.7)), st.sampled_from((1, 1 << 20)))
def test_head_ranks_equal_those_found_one_position_at_a_time(case, temperature, chunk):
    """Greedy, or with the noise that each token was sampled with; all rows at once, or one."""
    model, heads, rows = case
    tokens, calls = rows[0], []
    noise = torch.empty(*tokens.shape, 5, dtype=torch.float64).exponential_(generator=rng(1))

    def given_noise(probs, came, generator):
        now = slice(len(calls) * len(probs), (len(calls) + 1) * len(probs))
        calls.append(now)
        expected = (model.lm_head(model(tokens[now])) / temperature).softmax(-1)
        torch.testing.assert_close(probs, expected)
        assert torch.equal(came[:, :-1], tokens[now, 1:])
        return noise[now]

    with patch.multiple(train, noise_given_tokens=given_noise, CHUNK_LOGITS=chunk):
        found = head_ranks(model, heads, *rows, Sampling(temperature))
    assert [row.tolist() for row in found] == ranks_by_hand(*case, temperature, noise)


def test_the_noise_of_tokens_that_were_sampled_is_exponential_and_independent():
    probs = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).expand(40_000, 3)
    tokens = probs.multinomial(1, generator=rng(0))[:, 0]
    noise = noise_given_tokens(probs, tokens, rng(1))
    assert torch.equal((probs / noise).argmax(-1), tokens)
    cells = (1 - (-noise).exp()).mul(3).long()  # (n, 3): in thirds of equal probability
    counts = Counter(map(tuple, cells.tolist()))
    assert chi_square(counts, {cell: 1 / 27 for cell in product(range(3), repeat=3)}, 40_000) > 0.01


@settings(properties, max_examples=40)
@given(measured_rows(), st.integers(1, 9), st.integers(2, 9))
def test_a_calibration_counts_every_prefix_where_a_step_starts(case, limit, reference):
    """Up to the first token that a truncated vocabulary leaves out, whose rank is 5."""
    model, heads, (tokens, mask) = case
    mask[0] = True
    texts = ranks_by_hand(model, heads, (tokens, mask))
    cut = [[p[: [*p, 5].index(5)] for p in text] for text in texts]
    ranks, cut_ranks = [*chain(*texts)], [*chain(*cut)]
    assume(any(cut_ranks))
    with patch.multiple(train, CALIBRATION_PREFIXES=limit, CALIBRATION_NODES=reference):
        result = calibrate(model, heads, {"0.0": (tokens, mask)})["0.0"]
    starts = replay(cut, calibrated_tree(cut_ranks, reference))
    counts = Counter(tuple(p[:depth]) for p in starts for depth in range(1, len(p) + 1))
    common = sorted(counts, key=lambda path: (-counts[path], len(path), path))[:limit]
    assert [*result["prefixes"]] == [" ".join(map(str, path)) for path in common]
    assert read_counts(result) == {path: counts[path] for path in common} | {(): len(starts)}
    for name, n in (("top1", 1), ("top5", 5)):
        shares = [sum(p[k] < n for p in ranks) / len(ranks) for k in range(len(ranks[0]))]
        assert result[name] == pytest.approx(shares, abs=1e-4)


# ---- Medusa-1 ----
OPTIONS = [{}, {"precision": "bfloat16", "original_lm_head": False, "sequential": True}]
OPTIONS += [{"data": "corpus"}, {"truncated_vocab_size": 20}]


@pytest.mark.parametrize("more", OPTIONS, ids=str)
def test_heads_repeat_with_their_seed_on_a_base_that_stays(more, base, text, shards, tmp_path):
    before, used = contents(base), []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        config = training(base, text, tmp_path / name, seed=seed, distilled=shards, **more)
        with patch.object(train, "load_base", lambda *a: used.append(load_base(*a)) or used[-1]):
            train_medusa1(config)
    model = GPT.from_pretrained(base, getattr(torch, config.precision))
    for _, trained in used:
        torch.testing.assert_close(trained.state_dict(), model.state_dict(), rtol=0, atol=0)
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert contents(base) == before and one == two
    assert one["model.safetensors"] != three["model.safetensors"]

    # They have the shape that was asked for, and are calibrated as they are on disk.
    heads, size = MedusaHeads.from_pretrained(tmp_path / "one"), config.truncated_vocab_size
    shape = config.original_lm_head, size, config.sequential
    assert heads.config == MedusaConfig(16, 290, 2, 2, *shape)
    assert all(weight.abs().max() > 0 for weight in heads.parameters())
    held_out = train.held_out_rows(Path(shards), 290, 2)
    assert json.loads(one["calibration.json"]) == calibrate(model, heads, held_out)
    if size:
        tokens, mask = read_shards(Path(shards), "train-*.safetensors", 290)
        counts, taken = Counter(tokens[mask].tolist()), heads.token_map.tolist()
        others = [counts[token] for token in range(290) if token not in taken]
        assert min(counts[token] for token in taken) >= max(others), "the most frequent targets"


def test_heads_go_on_from_heads_and_are_calibrated_where_they_are(base, text, shards, tmp_path):
    """At a rate of nearly 0 they stay, sequential or not; the mode alone measures the same."""
    train_medusa1(training(base, text, tmp_path / "one", distilled=shards, lr=0.02))
    one, more = contents(tmp_path / "one"), {"num_heads": 4, "heads": str(tmp_path / "one")}
    train_medusa1(training(base, text, tmp_path / "two", distilled=shards, lr=1e-30, **more))
    two = contents(tmp_path / "two")
    assert {**one, "log.jsonl": b""} == {**two, "log.jsonl": b""}
    more["sequential"] = True
    train_medusa1(training(base, text, tmp_path / "three", distilled=shards, lr=1e-30, **more))
    assert MedusaHeads.from_pretrained(tmp_path / "three").config.sequential
    assert contents(tmp_path / "three")["calibration.json"] == one["calibration.json"]
    (tmp_path / "one" / "calibration.json").unlink()
    refused("--heads: name the heads", calibrate_heads, CalibrateConfig())
    options = {"base": str(base), "heads": str(tmp_path / "one"), "distilled": shards} | CPU
    calibrate_heads(CalibrateConfig(**options))
    assert contents(tmp_path / "one") == one


@pytest.mark.parametrize("batch", [1, 3])
def test_kept_states_give_the_same_heads(batch, base, text, shards, tmp_path, monkeypatch):
    """And no step runs the base."""
    order, found, loss, forward = [], [], train.medusa1_loss, GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args: order.append("b") or forward(*args))
    monkeypatch.setattr(train, "medusa1_loss", lambda *args: order.append("s") or loss(*args))
    for keep, steps in ((True, "ssss"), (False, "bsbsbsbs")):
        more = {"keep_states": keep, "batch": batch, "lr": 0.01, "distilled": shards}
        more["sequential"] = batch > 1
        train_medusa1(training(base, text, tmp_path / str(keep), **more))
        found.append(MedusaHeads.from_pretrained(tmp_path / str(keep)).weight)
        assert steps in "".join(order)
        order.clear()
    assert contents(tmp_path / "True").keys() == contents(tmp_path / "False").keys()
    assert found[0].abs().max() > 0.01
    # Where a gradient is nearly 0, the rounding of states decides AdamW's first steps.
    assert (found[0] - found[1]).abs().mean() < 2e-4


def test_rows_in_which_nothing_can_be_measured_are_refused(tmp_path):
    """After a position, the root and four heads need five tokens in a row that have loss."""
    for length, gap, good in ((5, 5, False), (6, 1, False), (6, 0, True)):
        loss = (torch.arange(length) != gap).repeat(3, 1)
        for t in TEMPERATURES:
            write_shard(tmp_path / f"validation-{t}.safetensors", loss.int(), loss, 290, "")
        if good:
            assert train.held_out_rows(tmp_path, 290, 4).keys() == {"0.0", "0.7", "1.0"}
        else:
            refused("short for 4 heads", train.held_out_rows, tmp_path, 290, 4)
