"""Laws of a training step, whole or in parts, and of Medusa-2: what moves, what stays, and what teaches."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.nn.utils import parametrize

import train
from data.calibration import calibrate, held_out_rows
from data.corpus import documents, packed, seeded, windows
from data.distilled import regenerate
from data.lora import add_adapters, merge_adapters, trained_base
from data.perplexity import perplexity
from data.shards import read_shards
from data.tokenizer import load_base
from medusa import (
    MedusaConfig,
    MedusaHeads,
    Sampling,
    cross_entropy_ahead,
    distillation_loss,
    generate,
    medusa_loss,
)
from model import GPT, read_safetensors
from strategies import contents, log_of, properties, random_gpt, random_heads, rate, rng, training
from train import Medusa1Config, Medusa2Config, backpropagate, train_medusa

pytestmark = pytest.mark.usefixtures("own_cache")


def masks(B: int, T: int):
    """Any, and often: nothing in a row, nothing at all."""
    return st.lists(
        st.one_of(st.lists(st.booleans(), min_size=T, max_size=T), st.just([False] * T)),
        min_size=B,
        max_size=B,
    ).map(torch.tensor)


# ---- the losses ----


@st.composite
def targets(draw):
    """logits (B, n, V) at the first n of T tokens, the mask, and how far ahead the targets stand."""
    B, T, V = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(2, 5))
    generator = rng(draw(st.integers(0, 10**6)))
    logits = torch.randn(B, draw(st.integers(1, T)), V, generator=generator, dtype=torch.float64)
    return (
        logits,
        torch.randint(V, (B, T), generator=generator),
        draw(masks(B, T)),
        draw(st.integers(1, 5)),
    )


@properties
@given(targets())
def test_cross_entropy_ahead_equals_the_mean_taken_one_target_at_a_time(case):
    logits, tokens, mask, ahead = case
    for given_mask, used in ((mask, mask), (None, torch.ones_like(mask))):
        terms = [
            -F.log_softmax(logits[b, t], -1)[tokens[b, t + ahead]]
            for b in range(len(tokens)) for t in range(logits.shape[1]) if t + ahead < tokens.shape[1] and used[b, t + ahead]
        ]  # fmt: skip
        total = sum(terms, torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(
            cross_entropy_ahead(logits, tokens, given_mask, ahead), total / max(len(terms), 1)
        )
        torch.testing.assert_close(
            cross_entropy_ahead(logits, tokens, given_mask, ahead, torch.tensor(7)), total / 7
        )


@properties
@given(targets(), st.integers(0, 99), st.booleans())
def test_a_target_without_loss_has_no_influence_whatever_stands_there(case, seed, heads):
    """Neither its token nor the logits that guess it, be they no numbers: no gradient changes by a bit."""
    logits, tokens, mask, ahead = case
    if heads:  # the K heads of a step, each with the mask of its own target
        logits = torch.stack([logits.roll(k, -1) for k in range(3)])
    other = torch.where(
        mask, tokens, torch.randint(logits.shape[-1], tokens.shape, generator=rng(seed))
    )
    n = logits.shape[-2]
    loss_mask = torch.zeros(logits.shape[:-1], dtype=torch.bool)
    for k, part in enumerate(loss_mask, start=2) if heads else [(ahead, loss_mask)]:
        part[:, : max(min(n, tokens.shape[1] - k), 0)] = mask[:, k : k + n]
    results = []
    for leaf, aims in (
        (logits, tokens),
        (torch.where(loss_mask[..., None], logits, math.nan), other),
    ):
        leaf = leaf.clone().requires_grad_()
        loss = (
            medusa_loss(leaf, aims, mask)[0]
            if heads
            else cross_entropy_ahead(leaf, aims, mask, ahead)
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1].abs().sum(-1) > 0, loss_mask), (
        "and what carries loss has an influence"
    )


@properties
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3), st.floats(0.01, 30), st.integers(0, 10**6)
)
def test_a_student_who_is_the_teacher_has_nothing_to_learn(shape, scale, seed):
    teacher = scale * torch.randn(*shape, 5, generator=rng(seed), dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, teacher)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and student.grad.abs().max() < 1e-12


@properties
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 5), st.integers(0, 10**6), st.data())
def test_distillation_loss_equals_its_definition_and_looks_only_where_the_mask_says(
    B, T, V, seed, data
):
    """sum_x p(x) log(p(x) / q(x)), p the teacher's: the direction counts."""
    student, teacher = torch.randn(2, B, T, V, generator=rng(seed), dtype=torch.float64)
    mask = data.draw(masks(B, T))
    total = {}
    for used in (mask, torch.ones_like(mask)):
        for b, t in used.nonzero().tolist():
            p, q = (
                [math.exp(x) / sum(map(math.exp, row)) for x in row]
                for row in (teacher[b, t].tolist(), student[b, t].tolist())
            )
            total[used] = total.get(used, 0) + sum(x * math.log(x / y) for x, y in zip(p, q))
        n = int(used.sum())
        given_mask = used if used is mask else None
        assert math.isclose(
            distillation_loss(student, teacher, given_mask),
            total.get(used, 0) / max(n, 1),
            rel_tol=1e-9,
            abs_tol=1e-12,
        )
        assert math.isclose(
            distillation_loss(student, teacher, given_mask, torch.tensor(7)),
            total.get(used, 0) / 7,
            rel_tol=1e-9,
            abs_tol=1e-12,
        )
    spoilt = torch.where(mask[..., None], student, math.nan).requires_grad_()
    loss = distillation_loss(spoilt, torch.where(mask[..., None], teacher, math.nan), mask)
    loss.backward()
    assert torch.equal(loss, distillation_loss(student, teacher, mask)) and torch.equal(
        spoilt.grad.abs().sum(-1) > 0, mask
    )


# ---- the step ----


@st.composite
def steps(draw):
    """A model, heads, rows, weights of both losses, and whether a teacher stands in for the text."""
    K, B, T = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 7))
    seed = draw(st.integers(0, 999))
    model = random_gpt(seed, layers=2)
    if draw(st.booleans()):
        model.lm_head.weight = model.embed_tokens.weight
    private, truncated = draw(st.sampled_from([(False, 0), (True, 0), (False, 3)]))
    heads = random_heads(model, K, seed, draw(st.integers(1, 2)), private, truncated)
    tokens = torch.randint(5, (B, T), generator=rng(seed))
    weights = draw(st.sampled_from([(0.0, 1.0), (1.0, 0.0), (1.0, 0.2), (0.5, 3.0)]))
    teacher = random_gpt(seed + 1, layers=1) if weights[0] and draw(st.booleans()) else None
    model.requires_grad_(weights[0] > 0)
    return model, heads, tokens, draw(masks(B, T)), weights, draw(st.floats(0.1, 1)), teacher


def written_out(model, heads, tokens, mask, weights, decay, teacher):
    """The loss of all rows and positions at once, target by target, and its 2K + 1 figures."""
    K = heads.config.num_heads
    hidden = model(tokens)
    guesses = heads.widened(heads(hidden, heads.shortened(model.lm_head)))
    everyone = torch.cat((model.lm_head(hidden)[None], guesses)).log_softmax(-1)  # (K + 1, B, T, V)
    goal = teacher.lm_head(teacher(tokens)).log_softmax(-1).detach() if teacher else None
    means, met = [], []
    for k, log_probs in enumerate(everyone):
        places = [
            (b, t)
            for b in range(len(tokens))
            for t in range(tokens.shape[1] - k - 1)
            if mask[b, t + k + 1]
        ]
        count = max(len(places), 1)
        if k > 0 and heads.token_map is not None:  # what is left out counts, and adds nothing
            places = [(b, t) for b, t in places if tokens[b, t + k + 1] in heads.token_map]
        terms = [-log_probs[b, t, tokens[b, t + k + 1]] for b, t in places]
        if k == 0 and teacher:
            terms = [(goal[b, t].exp() * (goal[b, t] - log_probs[b, t])).sum() for b, t in places]
        means.append(sum(terms, torch.zeros((), dtype=torch.float64)) / count)
        met.append(
            sum(log_probs[b, t].argmax().item() == tokens[b, t + k + 1].item() for b, t in places)
            / count
        )
    loss = weights[0] * means[0] + weights[1] * sum(
        decay**k * mean for k, mean in enumerate(means[1:], start=1)
    )
    figures = [means[0].item() * (weights[0] > 0)] + [
        x * (weights[1] > 0) for x in [mean.item() for mean in means[1:]] + met[1:]
    ]
    return loss, torch.tensor(figures[: 2 * K + 1])


def gradients_of(*modules) -> dict:
    """Taken away from the parameters; where there is none, it is 0."""
    found = {
        p: torch.zeros_like(p) if p.grad is None else p.grad
        for module in modules
        for p in module.parameters()
    }
    for p in found:
        p.grad = None
    return found


@settings(properties, max_examples=120)
@given(steps(), st.integers(1, 6), st.integers(1, 4))
def test_a_step_in_chunks_and_parts_has_the_gradient_of_the_whole_loss_written_out(case, chunk, m):
    """Chunks of positions, parts of rows with as many targets as there happen to be, with and without a teacher."""
    model, heads, tokens, mask, weights, decay, teacher = case
    loss, figures = written_out(*case)
    if loss.requires_grad:
        loss.backward()
    expected = gradients_of(model, heads)
    counts = torch.tensor([mask[:, ahead:].sum() for ahead in range(1, heads.config.num_heads + 2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHUNK_LOGITS", chunk * heads.config.num_heads * 5)
        rows = zip(tokens.tensor_split(m), mask.tensor_split(m))
        both = (teacher, teacher.lm_head) if teacher else None
        found = sum(
            backpropagate(model, heads, *part, counts, weights, decay, both)
            for part in rows
            if len(part[0])
        )
    torch.testing.assert_close(found, figures, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients_of(model, heads), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "first, expected",
    [(0, [12, 12, 12, 9]), (11, [12, 9])],
    ids=["all tokens carry loss", "the last five do"],
)
@pytest.mark.parametrize(
    "weight_base, truncated, logits",
    [(0.0, 5, 2 * 5), (0.0, 3, 2 * 3), (1.0, 5, 2 * 5 + 2 * 5)],
    ids=["heads alone", "truncated", "both"],
)
def test_a_chunk_is_no_larger_than_the_limit_and_holds_only_positions_with_a_target(
    monkeypatch, first, expected, weight_base, truncated, logits
):
    model = random_gpt(0)
    heads, tokens = (
        MedusaHeads(MedusaConfig(8, 5, 2, truncated_vocab_size=truncated)).double(),
        torch.zeros(3, 16, dtype=torch.long),
    )
    sizes = []
    monkeypatch.setattr(
        train,
        "medusa_loss",
        lambda logits, *rest: (sizes.append(logits.shape[1]), medusa_loss(logits, *rest))[1],
    )
    monkeypatch.setattr(train, "CHUNK_LOGITS", 12 * logits)
    mask = (torch.arange(16) >= first).expand(3, 16)
    backpropagate(model, heads, tokens, mask, torch.tensor([45, 42, 39]), (weight_base, 1.0))
    assert sizes == expected


def test_a_position_with_no_target_ahead_costs_nothing_though_its_own_token_is_one(monkeypatch):
    model = random_gpt(0)
    heads, sizes, mask = random_heads(model, 2, 0), [], torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = mask[1, 10] = True  # 2, 3 and 4 look ahead to the first, 7, 8 and 9 to the second
    monkeypatch.setattr(
        train,
        "medusa_loss",
        lambda logits, *rest: (sizes.append(logits.shape[1]), medusa_loss(logits, *rest))[1],
    )
    backpropagate(
        model,
        heads,
        torch.zeros(2, 16, dtype=torch.long),
        mask,
        torch.tensor([2, 2, 2]),
        (0.0, 1.0),
    )
    assert sizes == [6]


@pytest.mark.parametrize("last, width", [(15, 15), (11, 11), (0, 1)])
def test_behind_the_last_target_nothing_is_computed(monkeypatch, last, width):
    model = random_gpt(0)
    heads, tokens, widths = random_heads(model, 2, 0), torch.zeros(3, 16, dtype=torch.long), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens: (widths.append(tokens.shape[1]), forward(tokens))[1]
    )
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[1, last] = True
    backpropagate(model, heads, tokens, mask, torch.tensor([1, 1, 1]), (1.0, 1.0))
    assert widths == [width]


@pytest.mark.parametrize("lora", [False, True])
def test_activations_that_are_recomputed_change_no_gradient(lora):
    gradients, calls = [], []
    for again in (False, True):
        model = random_gpt(3, layers=2).requires_grad_(False)
        heads, tokens = random_heads(model, 2, 0), torch.randint(5, (3, 9), generator=rng(0))
        parameters, teacher = trained_base(
            Medusa2Config(lora=lora, checkpoint_activations=again), model
        )
        for n, p in enumerate(parameters.values()):
            p.requires_grad_().data.add_(
                0.01 * torch.randn(p.shape, generator=rng(n), dtype=p.dtype)
            )
        forward = model.layers[0].mlp.forward
        model.layers[0].mlp.forward = lambda x: (calls.append(again), forward(x))[1]
        backpropagate(
            model,
            heads,
            tokens,
            tokens >= 0,
            torch.tensor([24, 21, 18]),
            (1.0, 0.2),
            teacher=teacher,
        )
        gradients.append([p.grad for p in (*parameters.values(), *heads.parameters())])
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(*gradients, strict=True))
    assert calls.count(True) == calls.count(False) + 1, (
        "the backward pass has run the block once more"
    )


# ---- adapters ----


def hidden_of(model, seed=0):
    with torch.no_grad():
        return model(torch.randint(5, (2, 7), generator=rng(seed)))


@properties
@given(st.integers(0, 999), st.integers(1, 2))
def test_adapters_start_as_the_teacher_and_switched_off_stay_it_and_merged_they_are_the_same_model(
    seed, layers
):
    model = random_gpt(seed, layers=layers)
    before, state = hidden_of(model), {name: t.clone() for name, t in model.state_dict().items()}
    adapters = add_adapters(model, seed)
    assert len(adapters) == 4 * layers, (
        "every linear layer of a block, with q, k, v and gate, up fused"
    )
    assert torch.equal(hidden_of(model), before)
    for n, adapter in enumerate(adapters.values()):
        assert (
            adapter.down.shape[0] == adapter.up.shape[1] == 32
            and adapter.down.any()
            and not adapter.up.any()
        )
        adapter.up.data = torch.randn(adapter.up.shape, generator=rng(n), dtype=torch.float64)
    moved = hidden_of(model)
    assert not torch.allclose(moved, before)
    for on in (False, True):
        for adapter in adapters.values():
            adapter.on = on
        assert torch.equal(hidden_of(model), moved if on else before)
    merge_adapters(model)
    torch.testing.assert_close(hidden_of(model), moved, rtol=0, atol=1e-12)
    assert model.state_dict().keys() == state.keys()
    for name, t in model.state_dict().items():
        adapter = adapters.get(name.removeprefix("layers.").removesuffix(".weight"))
        torch.testing.assert_close(
            t,
            state[name] + (16 / 32 * adapter.up @ adapter.down if adapter else 0),
            rtol=0,
            atol=1e-12,
        )


def test_the_teacher_of_adapters_is_the_model_without_them():
    model = random_gpt(4).requires_grad_(False)
    before = hidden_of(model)
    parameters, (teacher, lm_head) = trained_base(Medusa2Config(lora=True), model)
    for p in parameters.values():
        p.data.add_(0.3)
    with torch.no_grad():
        assert (
            torch.equal(teacher(torch.randint(5, (2, 7), generator=rng(0))), before)
            and lm_head is model.lm_head
        )
    assert not torch.allclose(hidden_of(model), before), "and they are on again"


@pytest.mark.parametrize("lora", [False, True])
def test_a_frozen_copy_of_the_base_or_the_base_without_adapters_teaches_and_the_text_if_asked(
    lora, base, text, shards, tmp_path
):
    """The first joint step of a base that learns from itself has no loss; later ones have a little."""
    for name, how in (
        ("kl", {}),
        ("kl2", {"base_loss": "kl", "data": "corpus"}),
        ("ce", {"base_loss": "ce"}),
        ("ce2", {"data": "corpus"}),
    ):
        train_medusa(
            joint(
                base,
                text,
                tmp_path / name,
                shards,
                heads_steps=2,
                lora=lora,
                lr=0.01,
                lr_ratio=1.0,
                **how,
            )
        )
        losses = [record["base"] for record in log_of(tmp_path / name)]
        assert losses[:2] == [0, 0] and (abs(losses[2]) < 1e-6) == (name in ("kl", "kl2"))
        assert (1e-6 < losses[-1] < 1) if name in ("kl", "kl2") else losses[-1] > 1


@pytest.mark.parametrize("again", [False, True])
def test_the_weights_under_adapters_never_move_and_the_merged_base_is_a_plain_one(
    again, base, text, shards, tmp_path, monkeypatch
):
    old, merged = GPT.from_pretrained(base).state_dict(), []

    def checked(model):
        for name, t in model.state_dict().items():
            original = name.replace("parametrizations.weight.original", "weight")
            assert original not in old or torch.equal(t, old[original])
        assert sum(parametrize.is_parametrized(module) for module in model.modules()) == 4
        merged.append(
            {
                f"{name}.weight": module.weight.detach().clone()
                for name, module in model.named_modules()
                if parametrize.is_parametrized(module)
            }
        )
        merge_adapters(model)

    monkeypatch.setattr(train, "merge_adapters", checked)
    out = tmp_path / "out"
    train_medusa(joint(base, text, out, shards, lora=True, checkpoint_activations=again, lr=0.05))
    assert (
        read_safetensors(out / "base" / "model.safetensors").keys()
        == read_safetensors(base / "model.safetensors").keys()
    )
    new = load_base(out / "base")[1].state_dict()
    assert len(merged[0]) == 4 and all(
        torch.equal(new[name], merged[0].get(name, t)) for name, t in old.items()
    )
    assert all(not torch.equal(new[name], old[name]) for name in merged[0])


# ---- medusa2 ----


def joint(base, text, out, shards, **more) -> Medusa2Config:
    return training(
        base, text, out, Medusa2Config, **{"distilled": shards, "heads_steps": 0} | more
    )


@pytest.mark.parametrize("heads_steps, corpus", [(0, False), (3, False), (2, True)])
def test_medusa2_without_the_loss_of_the_heads_is_plain_fine_tuning(
    heads_steps, corpus, base, text, shards, tmp_path
):
    """Bit for bit, and the heads stay what the first stage made of them."""
    more = {"data": "corpus", "context": 9} if corpus else {}
    config = joint(
        base,
        text,
        tmp_path / "out",
        shards,
        heads_steps=heads_steps,
        lambda_0=0.0,
        base_loss="ce",
        steps=6,
        warmup=3,
        lr=0.02,
        seed=3,
        **more,
    )
    train_medusa(config)

    tokenizer, model = load_base(base)
    rows, mask = read_shards(Path(shards), "train-*.safetensors", 290)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for step in range(6):
        if corpus:
            tokens = windows(
                packed(documents(False, text), tokenizer), 3, 9, seeded(3, heads_steps + step)
            )
            loss_mask = torch.ones_like(tokens, dtype=torch.bool)
        else:
            at = [divmod(3 * (heads_steps + step) + i, len(rows)) for i in range(3)]
            chosen = torch.stack(
                [torch.randperm(len(rows), generator=seeded(3, epoch))[i] for epoch, i in at]
            )
            tokens, loss_mask = rows[chosen], mask[chosen]
        logits = model.lm_head(model(tokens[:, :-1]))
        loss = (
            F.cross_entropy(
                logits[loss_mask[:, 1:]], tokens[:, 1:][loss_mask[:, 1:]], reduction="sum"
            )
            / loss_mask[:, 1:].sum()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(step, 0.02, 3, 6) / 4
        optimizer.step()
        assert log_of(config.out)[heads_steps + step]["base"] == pytest.approx(loss.item())
    assert_same_base(GPT.from_pretrained(tmp_path / "out" / "base"), model)
    heads = MedusaHeads.from_pretrained(tmp_path / "out" / "heads")
    assert heads.weight.any() == (heads_steps > 0)
    if heads_steps:
        train_medusa(
            training(
                base,
                text,
                tmp_path / "heads",
                distilled=shards,
                steps=heads_steps,
                warmup=3,
                lr=0.02,
                seed=3,
                **more,
            )
        )
        assert (
            contents(tmp_path / "heads")["model.safetensors"]
            == contents(tmp_path / "out")["heads/model.safetensors"]
        )


def assert_same_base(one: GPT, two: GPT) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shared", [False, True])
def test_medusa2_with_a_base_that_learns_at_rate_zero_is_medusa1(
    shared, base, text, shards, tmp_path
):
    same = {
        "distilled": shards,
        "original_lm_head": shared,
        "lr": 0.02,
        "steps": 5,
        "warmup": 2,
        "num_hidden_layers": 1,
    }
    train_medusa(training(base, text, tmp_path / "one", **same))
    train_medusa(
        joint(
            base,
            text,
            tmp_path / "two",
            shards,
            **same,
            lr_ratio=math.inf,
            lambda_0=1.0,
            base_loss="ce",
        )
    )
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert (
        one["model.safetensors"] == two["heads/model.safetensors"]
        and one["config.json"] == two["heads/config.json"]
    )
    assert_same_base(GPT.from_pretrained(tmp_path / "two" / "base"), GPT.from_pretrained(base))
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert (a["heads"], a["top1"]) == (b["heads"], b["top1"]) and b["lr"] == {
            "heads": rate(a["step"], 0.02, 2, 5),
            "base": 0.0,
        }


@pytest.mark.parametrize("ramp", [False, True])
def test_the_weight_of_the_heads_is_constant_or_a_sine_and_each_stage_has_its_own_rates(
    ramp, base, text, shards, tmp_path, monkeypatch
):
    weights = []
    monkeypatch.setattr(
        train, "backpropagate", lambda *args: (weights.append(args[5]), backpropagate(*args))[1]
    )
    train_medusa(
        joint(
            base,
            text,
            tmp_path / "out",
            shards,
            heads_steps=3,
            steps=4,
            warmup=2,
            lr=0.01,
            lambda_0=0.3,
            ramp=ramp,
        )
    )
    assert weights[:3] == [(0.0, 1.0)] * 3
    assert weights[3:] == [
        (1.0, pytest.approx(0.3 * math.sin(math.pi / 2 * step / 4) if ramp else 0.3))
        for step in range(4)
    ]
    expected = [(rate(step, 0.01, 2, 3), 0.0) for step in range(3)] + [
        (rate(step, 0.01, 2, 4), rate(step, 0.01, 2, 4) / 4) for step in range(4)
    ]
    assert [record["lr"] for record in log_of(tmp_path / "out")] == [
        pytest.approx({"heads": heads, "base": base}) for heads, base in expected
    ]


def test_in_its_first_stage_the_base_stands_still(base, text, shards, tmp_path, monkeypatch):
    """As the checkpoint shows that the stage ends with."""
    monkeypatch.setattr(train, "cross_entropy_ahead", lambda *args: args[0].sum() * math.nan)
    with pytest.raises(ValueError, match="at step 3"):
        train_medusa(
            joint(
                base,
                text,
                tmp_path / "out",
                shards,
                heads_steps=3,
                save_every=1,
                weight_decay=0.1,
                base_loss="ce",
            )
        )
    tensors = read_safetensors(tmp_path / "out" / "checkpoint.safetensors")
    state = dict(GPT.from_pretrained(base).named_parameters())
    assert {key for key in tensors if key.startswith("base.")} == {
        f"base.{name}|value" for name in state
    }
    assert all(torch.equal(tensors[f"base.{name}|value"], t) for name, t in state.items())


def test_medusa2_goes_on_from_trained_heads_and_measures_them_on_text_of_the_new_base(
    base, text, shards, tmp_path, capsys
):
    train_medusa(training(base, text, tmp_path / "one", distilled=shards, num_heads=3, lr=0.02))
    capsys.readouterr()
    config = Medusa2Config(
        base=str(base), text=text, out=str(tmp_path / "two"), distilled=shards, heads=str(tmp_path / "one"), steps=2, heads_steps=0, warmup=1, lr=1e-5,
        device="cpu", seed=4,
    )  # fmt: skip
    train_medusa(config)
    start, end = (
        MedusaHeads.from_pretrained(directory)
        for directory in (tmp_path / "one", tmp_path / "two" / "heads")
    )
    assert (
        start.config == end.config
        and torch.allclose(start.weight, end.weight, atol=1e-4)
        and not torch.equal(start.weight, end.weight)
    )
    (_, old), (tokenizer, new) = load_base(base), load_base(tmp_path / "two" / "base")
    rows_of = {
        t: regenerate(new, *rows, Sampling(float(t)), 4)
        for t, rows in held_out_rows(Path(shards), 290, 3).items()
    }
    assert json.loads((tmp_path / "two" / "heads" / "calibration.json").read_text()) == calibrate(
        new, end, rows_of
    )
    held_out = packed(documents(True, text), tokenizer)
    before, after = (perplexity(model, held_out) for model in (old, new))
    out = capsys.readouterr().out
    assert (
        f"perplexity of the base on held-out text: {after:.3f}, {before:.3f} before training\n"
        in out
    )
    assert out.endswith(
        f"python sample.py --base {tmp_path}/two/base --heads {tmp_path}/two/heads\n"
    )
    assert contents(tmp_path / "two").keys() == {
        "log.jsonl", *(f"base/{name}" for name in ("config.json", "model.safetensors", "tokenizer.model")),
        *(f"heads/{name}" for name in ("config.json", "model.safetensors", "calibration.json")),
    }  # fmt: skip


def test_rows_are_continued_behind_their_prompts_by_the_model_itself():
    """Each behind its own prompt; of a row without loss the first token is the prompt."""
    model = random_gpt(5, context=16)
    tokens = torch.randint(5, (3, 9), generator=rng(1))
    loss_mask = torch.zeros(3, 9, dtype=torch.bool)
    loss_mask[0, 4:7] = loss_mask[1, 2:] = True
    rows, loss = regenerate(copy.deepcopy(model).train(), tokens, loss_mask, Sampling(), 0)
    for row, new, carried, n in zip(tokens.tolist(), rows.tolist(), loss.tolist(), (4, 2, 1)):
        assert new == row[:n] + [
            t for step in generate(model, row[:n], 9 - n) for t in step
        ] and carried == [place >= n for place in range(9)]


@pytest.mark.parametrize("more, says", [
    ({"heads": "x", "num_heads": 3}, "--num-heads"), ({"heads": "x", "original_lm_head": False}, "--original-lm-head"),
    ({"base": "a/base", "out": "a"}, "--out a"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(more, says):
    with pytest.raises(ValueError, match=says):
        Medusa2Config(**more)


def test_a_mode_is_refused_over_its_own_base_and_nowhere_else():
    with pytest.raises(ValueError, match="overwrite its own --base"):
        Medusa1Config(base="a", out="a")
    Medusa1Config(base="a/base", out="a")
    Medusa2Config(base="a", out="a")
