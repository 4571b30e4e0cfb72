"""Properties of the losses, and of Medusa-2: what learns, what stays, and what teaches."""

import copy
import json
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import train
from data.corpus import documents, packed, shuffled
from data.tokenizer import load_base
from medusa import MedusaConfig, MedusaHeads, Sampling, generate
from model import GPT
from strategies import KINDS, base_config, contents, log_of, properties, random_gpt, random_heads
from strategies import rate, rng, text_of, training, unit
from train import Adapter, Medusa2Config, TrainConfig, add_adapters
from train import calibrate, held_out_rows, make_batch, medusa1_loss, medusa2_loss
from train import merge_adapters, perplexity, regenerate, train_base, train_medusa1, train_medusa2


# ---- the losses ----
def written_out(model, heads, rows, teacher):
    """The means of base and heads, target by target, and the shares that heads get right."""
    tokens, mask = rows
    T, hidden = tokens.shape[1], model(tokens)
    known = list(range(5)) if heads.token_map is None else heads.token_map.tolist()
    K = heads.config.num_heads
    seen = F.pad(tokens, (0, K)).unfold(1, K, 1)[:, 1:]  # (B, T, K): tokens t+1 to t+K
    lm_head, between = heads.truncated(model.lm_head), unit(model, seen)
    logits = [model.lm_head(hidden), *heads(hidden, lm_head, between)]
    goal = teacher and teacher.lm_head(teacher(tokens)).log_softmax(-1).detach()
    means, right = [], []
    for k, log_probs in enumerate(part.log_softmax(-1) for part in logits):
        index = {token: i for i, token in enumerate(known if k else range(5))}
        places = [(b, t) for b in range(len(tokens)) for t in range(T - k - 1)]
        places = [(b, t, tokens[b, t + k + 1].item()) for b, t in places if mask[b, t + k + 1]]
        places = [(b, t, index[target]) for b, t, target in places if target in index]
        terms = [-log_probs[b, t, i] for b, t, i in places]
        if k == 0 and teacher:
            kl = (goal.exp() * (goal - log_probs)).sum(-1)
            terms = [kl[b, t] for b, t, _ in places]
        count = max(len(places), 1)
        means.append(sum(terms, 0 * hidden.sum()) / count)
        right.append(sum(log_probs[b, t].argmax().item() == i for b, t, i in places) / count)
    return means, right[1:]


@st.composite
def steps(draw):
    """A model, heads of any kind, rows with any mask, a teacher or none; batch of all rows."""
    K, B, T = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 7))
    seed, model = draw(st.integers(0, 999)), random_gpt(draw(st.integers(0, 999)), layers=2)
    if draw(st.booleans()):
        model.lm_head.weight = model.embed_tokens.weight
    J, kind = draw(st.integers(1, 2)), draw(st.sampled_from(KINDS))
    heads = random_heads(model, K, seed, J, *kind)
    row = st.one_of(st.lists(st.booleans(), min_size=T, max_size=T), st.just([False] * T))
    mask = torch.tensor(draw(st.lists(row, min_size=B, max_size=B)))
    rows = torch.randint(5, (B, T), generator=rng(seed)), mask
    return model, heads, rows, draw(st.sampled_from([None, random_gpt(seed + 1)]))


def gradients_of(loss, *modules) -> tuple[torch.Tensor, ...]:
    parameters = [p for module in modules for p in module.parameters()]
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def batches(rows, heads, processes: int) -> list[train.Batch]:
    found = []
    for rank in range(processes):
        with patch.object(train, "rank_and_world_size", lambda: (rank, processes)):
            config = TrainConfig(batch=len(rows[0]))
            found.append(make_batch(config, rows, heads, torch.device("cpu"), 0))
    return [batch for batch in found if len(batch.rows)]


@settings(properties, max_examples=150)
@given(steps(), st.sampled_from([None, 0.0, 0.2, 3.0]), st.integers(1, 60), st.integers(1, 3))
def test_the_losses_in_chunks_and_parts_equal_the_formulas(case, lambda_0, chunk, processes):
    """Losses, metrics and gradients, summed over processes; lambda_0 None: Medusa-1."""
    model, heads, rows, teacher = case
    means, right = written_out(model, heads, rows, teacher)
    loss = sum(0.8**k * mean for k, mean in enumerate(means[1:], start=1))
    expected = [0.0, *(mean.item() for mean in means[1:]), *right]
    if lambda_0 is not None:
        loss = means[0] + lambda_0 * loss
        expected = [means[0].item()] + [value * (lambda_0 > 0) for value in expected[1:]]
    found, total = 0.0, 0.0
    with patch.object(train, "CHUNK_LOGITS", chunk):
        for batch in batches(rows, heads, processes):
            if lambda_0 is None:
                part, metrics = medusa1_loss(heads, model, model(batch.tokens), batch)
            else:
                part, metrics = medusa2_loss(model, heads, batch, lambda_0, teacher)
            found, total = found + metrics, total + part
        gradients = gradients_of(total, model, heads)
    torch.testing.assert_close(found, torch.tensor(expected).to(found), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, loss, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(gradients, gradients_of(loss, model, heads)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("teacher", [None, random_gpt(1)])
@pytest.mark.parametrize("truncated", [0, 3])
def test_no_more_logits_than_a_chunk_are_there_at_once(teacher, truncated, monkeypatch):
    """And only where a target is."""
    model, found = random_gpt(0), defaultdict(list)
    heads = random_heads(model, 2, 0, truncated=truncated)
    for name in ("medusa_loss", "cross_entropy", "distillation_loss"):

        def counted(logits, *args, name=name, loss=getattr(train, name), **more):
            found[name].append((logits.numel(), logits.shape[-2]))
            return loss(logits, *args, **more)

        monkeypatch.setattr(train, name, counted)
    monkeypatch.setattr(train, "CHUNK_LOGITS", 70)
    mask = torch.arange(16).expand(3, 16) >= torch.tensor([0, 11, 16])[:, None]
    token = 0 if heads.token_map is None else heads.token_map[0].item()
    medusa2_loss(model, heads, *batches((torch.full((3, 16), token), mask), heads, 1), 1.0, teacher)
    of_base, most = ("distillation_loss", 35) if teacher else ("cross_entropy", 70)
    for name, most in ((of_base, most), ("medusa_loss", 70)):
        assert 24 < max(numel for numel, _ in found[name]) <= most
        assert sum(n for _, n in found[name]) == 20


def test_the_base_learns_with_heads_whose_weight_rises_along_a_sine(text, tmp_path, monkeypatch):
    weights, loss = [], train.medusa2_loss
    monkeypatch.setattr(train, "medusa2_loss", lambda *a: weights.append(a[3]) or loss(*a))
    train_base(base_config(tmp_path, text, mtp_weight=2.0, steps=3))
    assert weights == pytest.approx([0.0, 1.0, 3**0.5])


# ---- adapters ----
def hidden_of(model, adapters=True):
    with patch.object(Adapter, "on", adapters):
        return model(torch.randint(5, (2, 7), generator=rng(0))).detach()


@properties
@given(st.integers(0, 999), st.integers(1, 2))
def test_adapters_start_as_the_base_are_it_when_off_and_merge_to_a_plain_model(seed, layers):
    model = random_gpt(seed, layers=layers)
    before, state = hidden_of(model), {name: t.clone() for name, t in model.state_dict().items()}
    learning = add_adapters(model, seed)
    names = {name.rpartition(".")[0] for name in learning}
    assert len(names) == len(learning) / 2 and torch.equal(hidden_of(model), before)
    assert len(names) == sum(isinstance(m, torch.nn.Linear) for m in model.layers.modules())
    for n, name in enumerate(names):
        down, up = learning[f"{name}.down"], learning[f"{name}.up"]
        assert down.shape[0] == up.shape[1] == 32 and not up.any()
        up.data = torch.randn(up.shape, generator=rng(n), dtype=torch.float64)
    moved = hidden_of(model)
    assert not torch.allclose(moved, before) and torch.equal(hidden_of(model, False), before)
    merge_adapters(model)
    torch.testing.assert_close(hidden_of(model), moved, rtol=0, atol=1e-12)
    assert model.state_dict().keys() == state.keys()
    for name, t in model.state_dict().items():
        at = name.removeprefix("layers.").removesuffix(".weight")
        change = 16 / 32 * learning[f"{at}.up"] @ learning[f"{at}.down"] if at in names else 0
        torch.testing.assert_close(t, state[name] + change, rtol=0, atol=1e-12)


# ---- medusa2 ----
@pytest.fixture
def joint(base, text, shards):
    """The config of a run of a few steps."""
    fixed = {"distilled": shards, "heads_steps": 0, "lr": 0.01}
    return lambda out, **more: training(base, text, out, Medusa2Config, **fixed | more)


def state_of(directory) -> dict[str, torch.Tensor]:
    return GPT.from_pretrained(directory).state_dict()


@pytest.mark.parametrize("lora", [False, True])
def test_the_teacher_is_the_base_as_it_was_and_the_corpus_needs_none(lora, joint, tmp_path):
    """The first joint step of a base that learns from itself has no loss; later ones a little."""
    for data in ("distilled", "corpus"):
        config = joint(tmp_path / data, heads_steps=2, lora=lora, lr_ratio=1.0, data=data)
        train_medusa2(config)
        losses = [record["base"] for record in log_of(config.out)]
        assert losses[:2] == [0, 0] and (abs(losses[2]) < 1e-6) == (data == "distilled")
        assert 1e-6 < losses[-1] < 1 if data == "distilled" else losses[-1] > 1


def test_weights_under_adapters_stay_until_they_are_merged(base, joint, tmp_path, monkeypatch):
    """And the merged base opens as a plain one."""
    old, checked = state_of(base), []

    def check(model):
        for name, t in model.state_dict().items():
            name = name.replace("parametrizations.weight.original", "weight")
            checked.append(name not in old or torch.equal(t, old[name]))
        merge_adapters(model)

    monkeypatch.setattr(train, "merge_adapters", check)
    train_medusa2(joint(tmp_path / "out", lora=True, lr=0.05))
    new = state_of(tmp_path / "out" / "base")
    moved = [name for name, t in old.items() if not torch.equal(new[name], t)]
    assert all(checked) and len(moved) == 7 and all("_proj" in name for name in moved)


def test_without_the_loss_of_the_heads_it_is_plain_fine_tuning(base, text, joint, tmp_path):
    """Bit for bit, and the heads stay what stage 1 made of them, as Medusa-1 would have."""
    same = {"data": "corpus", "context": 9, "warmup": 3, "lr": 0.02, "seed": 3}
    config = joint(tmp_path / "two", heads_steps=4, lambda_0=0.0, steps=6, **same)
    train_medusa2(config)
    tokenizer, model = load_base(base)
    corpus = packed(documents(False, text), tokenizer).long()
    rows = corpus[: len(corpus) // 9 * 9].view(-1, 9)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    for step in range(6):
        tokens = rows[shuffled(len(rows), 3, 0)[12 + 3 * step :][:3]]
        logits, targets = model.lm_head(model(tokens[:, :-1])), tokens[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 24
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(step, 0.02, 3, 6) / 4
        optimizer.step()
    found, rates = state_of(tmp_path / "two" / "base"), log_of(config.out)[-1]["lr"]
    assert all(torch.equal(t, found[name]) for name, t in model.state_dict().items())
    assert rates["heads"] == 4 * rates["base"] == pytest.approx(rate(5, 0.02, 3, 6))
    more = {"distilled": config.distilled, "steps": 4, "num_heads": 4}
    train_medusa1(training(base, text, tmp_path / "one", **more, **same))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one["model.safetensors"] == two["heads/model.safetensors"]


def test_trained_heads_learn_on_and_are_measured_again(base, text, shards, joint, tmp_path, capsys):
    train_medusa1(training(base, text, tmp_path / "one", distilled=shards, num_heads=3, lr=0.02))
    train_medusa2(joint(tmp_path / "two", heads=str(tmp_path / "one"), lr=1e-5, seed=4))
    start, end = (MedusaHeads.from_pretrained(tmp_path / name) for name in ("one", "two/heads"))
    assert start.config == end.config == MedusaConfig(16, 290, 3)
    assert 0 < (start.weight - end.weight).abs().max() < 1e-4
    (_, old), (tokenizer, new) = load_base(base), load_base(tmp_path / "two" / "base")
    rows = held_out_rows(Path(shards), 290, 3).items()
    rows_of = {t: regenerate(new, *pair, Sampling(float(t)), 4) for t, pair in rows}
    found = json.loads((tmp_path / "two" / "heads" / "calibration.json").read_text())
    assert found == calibrate(new, end, rows_of)
    held_out = packed(documents(True, text), tokenizer)
    before, after = (perplexity(model, held_out) for model in (old, new))
    line = f"perplexity of the base on held-out text: {after:.3f}, {before:.3f} before training\n"
    assert line in capsys.readouterr().out


def test_rows_are_continued_after_their_prompts_by_the_model_itself():
    """Each after its own prompt; of a row without loss the first token is the prompt."""
    model, tokens = random_gpt(5, context=16), torch.randint(5, (3, 9), generator=rng(1))
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 4:7] = mask[1, 2:] = True
    rows, loss = regenerate(copy.deepcopy(model).train(), tokens, mask, Sampling(), 0)
    for row, new, used, n in zip(tokens.tolist(), rows.tolist(), loss.tolist(), (4, 2, 1)):
        assert new == row[:n] + text_of(generate(model, row[:n], 9 - n))
        assert used == [place >= n for place in range(9)]
