"""Laws of the GPT: it computes the Llama formulas from the tensors on disk, a cache changes nothing, and files come back as they were."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

import model as model_module
from model import (
    GPT,
    KVCache,
    Linear,
    ModelConfig,
    read_config,
    write_atomically,
    write_json,
    write_safetensors,
)
from strategies import properties, rng

SMALL = ModelConfig(5, 16, 12, 2, 4, 2, 16, rope_theta=700.0, tie_word_embeddings=False)
SENTENCE = torch.tensor([[1, 2, 3, 4, 0]])
TIED = pytest.mark.parametrize("tied", [False, True])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCALINGS = None, {"rope_type": "linear", "factor": 3.0}, LLAMA3


def make_gpt(config: ModelConfig, seed=0, dtype=torch.float64) -> GPT:
    """With weights so large that every formula shows; made in its dtype from the start, so that the table of angles is as exact."""
    torch.set_default_dtype(dtype)
    try:
        model = GPT(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    generator = rng(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=dtype)
        weight.copy_(
            1 + 0.2 * noise if "norm" in name else noise if "embed" in name else 0.7 * noise
        )
    return model


@st.composite
def gpts(draw):
    nkv, group, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers, theta, eps, tied = (
        draw(st.sampled_from(values))
        for values in ((1, 2, 3), (10000.0, 3.0), (1e-5, 0.1), (True, False))
    )
    width = draw(st.just(2 * half * nkv * group) | st.integers(1, 9))
    head_dim = None if width == 2 * half * nkv * group else 2 * half
    kind, scaling = draw(st.sampled_from(("llama", "qwen2"))), draw(st.sampled_from(SCALINGS))
    config = ModelConfig(
        5,
        width,
        draw(st.integers(1, 9)),
        layers,
        nkv * group,
        nkv,
        12,
        eps,
        theta,
        tied,
        head_dim=head_dim,
        rope_scaling=scaling,
        model_type=kind,
    )
    return make_gpt(config, draw(st.integers(0, 99)))


def batches(low=1, high=8):
    """Tokens (B, T), T from low to high."""
    drawn = st.tuples(st.integers(1, 3), st.integers(low, high), st.integers(0, 99))
    return drawn.map(lambda drawn: torch.randint(5, drawn[:2], generator=rng(drawn[2])))


def causal(T: int, S=0) -> torch.Tensor:
    return torch.tensor([[j <= S + i for j in range(S + T)] for i in range(T)])


def added(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def llama_shapes(c: ModelConfig) -> dict[str, tuple]:
    hs = c.head_dim or c.hidden_size // c.num_attention_heads
    D, q, kv = c.hidden_size, c.num_attention_heads * hs, c.num_key_value_heads * hs
    rows = {
        "self_attn.q_proj": (q, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, q),
    }
    rows |= {
        "mlp.gate_proj": (c.intermediate_size, D),
        "mlp.up_proj": (c.intermediate_size, D),
        "mlp.down_proj": (D, c.intermediate_size),
    }
    rows |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(c.num_hidden_layers)
        for name, shape in rows.items()
    }
    biases = {"q": q, "k": kv, "v": kv} if c.model_type == "qwen2" else {}
    shapes |= {
        f"model.layers.{i}.self_attn.{name}_proj.bias": (n,)
        for i in range(c.num_hidden_layers)
        for name, n in biases.items()
    }
    shapes |= {"model.embed_tokens.weight": (c.vocab_size, D), "model.norm.weight": (D,)}
    return shapes if c.tie_word_embeddings else shapes | {"lm_head.weight": (c.vocab_size, D)}


def speed_by_hand(c: ModelConfig, i: int, hs: int) -> float:
    """Of pair i; Llama 3's rule by wavelength, as its makers state it."""
    speed, scaling = c.rope_theta ** (-2 * i / hs), c.rope_scaling
    if scaling is None:
        return speed
    factor, wavelength = scaling["factor"], 2 * math.pi / speed
    if (
        scaling["rope_type"] == "linear"
        or wavelength > scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    ):
        return speed / factor
    if wavelength < scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]:
        return speed
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    return (1 - smooth) * speed / factor + smooth * speed


def llama_by_hand(disk, c: ModelConfig, tokens, positions, mask) -> torch.Tensor:
    """Logits (T, V) of one sequence (T,), head by head; mask (T, T) is added to the scores. A pair (i, i + hs/2) turns as one complex number."""
    hs, group = (
        c.head_dim or c.hidden_size // c.num_attention_heads,
        c.num_attention_heads // c.num_key_value_heads,
    )
    angles = torch.outer(
        positions.double(),
        torch.tensor([speed_by_hand(c, i, hs) for i in range(hs // 2)], dtype=torch.float64),
    )

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()

    def turn(x):
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    x = disk["model.embed_tokens.weight"][tokens]
    for layer in range(c.num_hidden_layers):
        w = {
            name.split(".")[-2]: weight
            for name, weight in disk.items()
            if name.startswith(f"model.layers.{layer}.") and name.endswith("weight")
        }
        b = {
            name.split(".")[-2]: bias
            for name, bias in disk.items()
            if name.startswith(f"model.layers.{layer}.") and name.endswith("bias")
        }
        y, heads = norm(x, w["input_layernorm"]), []
        for h in range(c.num_attention_heads):
            q, k, v = (
                y @ w[name][i * hs : (i + 1) * hs].T + (b[name][i * hs : (i + 1) * hs] if b else 0)
                for name, i in (("q_proj", h), ("k_proj", h // group), ("v_proj", h // group))
            )
            scores = (turn(q) @ turn(k).T / math.sqrt(hs) + mask).exp()
            heads.append(scores / scores.sum(-1, keepdim=True) @ v)
        x = x + torch.cat(heads, dim=-1) @ w["o_proj"].T
        y = norm(x, w["post_attention_layernorm"])
        gate = y @ w["gate_proj"].T
        x = x + (gate / (1 + torch.exp(-gate)) * (y @ w["up_proj"].T)) @ w["down_proj"].T
    return (
        norm(x, disk["model.norm.weight"])
        @ disk["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"].T
    )


@settings(properties, max_examples=50)
@given(gpts(), batches(high=5), st.booleans(), st.integers(0, 99))
def test_the_gpt_equals_the_llama_formulas_evaluated_from_the_file(
    tmp_path_factory, model, tokens, plain, seed
):
    """With the default positions and mask, and with any others."""
    directory, (B, T) = tmp_path_factory.mktemp("llama"), tokens.shape
    model.save_pretrained(directory)
    disk = load_file(directory / "model.safetensors")
    assert {name: tuple(weight.shape) for name, weight in disk.items()} == llama_shapes(
        model.config
    )
    if plain:
        positions, mask, hidden = (
            torch.arange(T).expand(B, T),
            added(causal(T)).expand(B, 1, T, T),
            model(tokens),
        )
    else:
        positions = torch.randint(12, (B, T), generator=rng(seed))
        mask = torch.randn(B, 1, T, T, generator=rng(seed), dtype=torch.float64)
        hidden = model(tokens, positions, mask)
    for b in range(B):
        close(
            model.lm_head(hidden)[b],
            llama_by_hand(disk, model.config, tokens[b], positions[b], mask[b, 0]),
        )


@properties
@given(gpts(), batches(high=12), st.data())
def test_cached_decoding_in_any_chunks_equals_one_forward(model, tokens, data):
    (B, T), whole = tokens.shape, model(tokens)
    cache, at_once = model.new_cache(T, B), model.new_cache(12, B)
    model(tokens, cache=at_once)
    while (S := cache.length) < T:
        size = data.draw(st.just(1) | st.integers(1, T - S))
        close(model(tokens[:, S : S + size], cache=cache), whole[:, S : S + size])
        assert cache.length == S + size
    close(cache.data, at_once.data[..., :T, :])
    assert not at_once.data[..., T:, :].any(), "only these rows are written"


@settings(properties, max_examples=60)
@given(gpts(), batches(low=2), st.booleans(), st.integers(0, 99), st.data())
def test_positions_and_masks_mean_the_same_in_every_form(model, tokens, cached, seed, data):
    """Left out, given once or for each sequence; a boolean mask, or what it adds to the scores."""
    (B, both), nh = tokens.shape, model.config.num_attention_heads
    S = data.draw(st.integers(1, both - 1)) if cached else 0
    T = both - S

    def run(positions=None, mask=None):
        cache = model.new_cache(both, B) if cached else None
        if cached:
            model(tokens[:, :S], cache=cache)
        return model(tokens[:, S:], positions, mask, cache)

    order, mask, default = torch.arange(S, both), causal(T, S), run()
    for form in (run(order), run(order.expand(B, T)), run(order, mask.expand(B, nh, T, both))):
        close(form, default)
    for form in (
        mask,
        mask.expand(B, 1, T, both),
        mask.expand(B, nh, T, both),
        added(mask),
        added(mask).expand(B, 1, T, both),
    ):
        close(run(mask=form), default)
    mask = (torch.rand(B, nh, T, both, generator=rng(seed)) > 0.5) | torch.eye(T, both).roll(
        S, 1
    ).bool()
    close(run(mask=mask), run(mask=added(mask)))


@torch.no_grad()
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("added_up", [False, True])
def test_with_a_mask_a_groups_queries_are_rows_of_one_product_on_cuda_and_the_same_comes_out(
    B, rows, added_up, monkeypatch
):
    """CUDA has a fast kernel for a mask, but not for groups beside it. Here a CPU tensor says that it is on CUDA."""
    model = GPT(ModelConfig(7, 24, 12, 2, 6, 2, 16, tie_word_embeddings=False)).double()
    cache, tokens = model.new_cache(8, B), torch.tensor([[1, 2, 3, 4], [5, 6, 1, 2]])[:B]
    mask = (torch.eye(4, 8).bool() | torch.ones(4, 8).bool().tril(2))[
        -rows:
    ]  # one row stands for all
    mask = added(mask) if added_up else mask
    model(tokens, cache=cache)

    def shapes_and_hidden() -> tuple[list, torch.Tensor]:
        cache.length, shapes, attention = 4, [], F.scaled_dot_product_attention
        with monkeypatch.context() as patch:
            patch.setattr(
                F,
                "scaled_dot_product_attention",
                lambda q, k, v, rows, **more: (
                    shapes.append((q.shape, rows.shape)) or attention(q, k, v, rows, **more)
                ),
            )
            return shapes, model(tokens, mask=mask, cache=cache)

    expected = shapes_and_hidden()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = shapes_and_hidden()
    assert (
        expected[0] == [((B, 6, 4, 4), (rows, 8))] * 2
        and found[0] == [((B, 2, 12, 4), (12, 8))] * 2
    )
    assert torch.allclose(found[1], expected[1], rtol=0, atol=1e-12)


@properties
@given(gpts(), batches(), st.data())
def test_the_future_never_influences_the_past_and_the_past_does_the_future(model, tokens, data):
    t = data.draw(st.integers(0, tokens.shape[1] - 1))
    other = tokens.clone()
    other[:, t] = (tokens[:, t] + 1) % 5
    change = (model(tokens) - model(other)).abs().amax(-1)  # (B, T)
    assert (change[:, :t] < 1e-12).all() and (change[:, t:] > 1e-9).all()


@properties
@given(st.integers(1, 3), st.integers(0, 4), st.lists(st.booleans(), max_size=6))
def test_keep_moves_the_chosen_rows_down_and_forgets_the_others(B, start, chosen):
    cache = KVCache(SMALL, B, start + len(chosen) + 1)
    cache.data.copy_(torch.randn(cache.data.shape, generator=rng(0)))
    rows = [row for row, kept in enumerate(chosen) if kept]
    expected = [
        cache.data[..., at, :].clone() for at in (*range(start), *(start + row for row in rows))
    ]
    cache.length = start + len(chosen)
    cache.keep(start, rows)
    assert cache.length == len(expected), "the length is not that of the past and the kept rows"
    layers = torch.stack([torch.stack(layer) for layer in cache.layers])
    for at, row in enumerate(expected):
        assert torch.equal(cache.data[..., at, :], row), (
            f"row {at} is not the one that was to be kept there: rows move down to be contiguous, all at once"
        )
        assert torch.equal(layers[..., at, :], row), (
            "layers no longer look at the data that was moved"
        )


@properties
@given(st.lists(st.integers(0, 2), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 99))
def test_keep_batch_keeps_these_entries_alone_and_decoding_goes_on(rows, S, seed):
    model, rows, tokens = (
        make_gpt(SMALL, seed),
        torch.tensor(rows),
        torch.randint(5, (3, S + 3), generator=rng(seed)),
    )
    cache = model.new_cache(S + 3, 3)
    model(tokens[:, :S], cache=cache)
    before = cache.data.clone()
    cache.keep_batch(rows)
    assert (
        torch.equal(cache.data, torch.stack([before[:, :, row] for row in rows], dim=2))
        and cache.length == S
    )
    for chunk in tokens[rows, S:].split((1, 2), dim=1):
        hidden = model(chunk, cache=cache)
    close(hidden, model(tokens[rows])[:, -2:])


def test_more_than_the_cache_or_the_context_holds_is_refused_and_changes_nothing():
    model, tokens = make_gpt(SMALL), torch.randint(5, (2, 17), generator=rng(0))
    whole = model(tokens[:, :16])
    close(
        model(tokens, torch.tensor([*range(16), 15]), causal(17))[:, :16], whole
    )  # a tree may be wider than the rest of the context
    for capacity, room, says in ((7, 7, "cache holds 7"), (20, 16, "context")):
        cache = model.new_cache(capacity, 2)
        model(tokens[:, : room - 1], cache=cache)
        before = cache.data.clone()
        with pytest.raises(ValueError, match=says):
            model(tokens[:, room - 1 : room + 1], cache=cache)
        assert cache.length == room - 1 and torch.equal(cache.data, before)
        close(model(tokens[:, room - 1 : room], cache=cache), whole[:, room - 1 : room])
        with pytest.raises(ValueError, match=says):
            model(tokens[:, room : room + 1], cache=cache)
    with pytest.raises(ValueError, match="context"):
        model(tokens)


@properties
@given(st.lists(st.integers(1, 5), max_size=2), st.integers(1, 5), st.integers(1, 5))
def test_a_linear_map_is_the_same_product_for_few_rows_and_many_and_lies_in_order(
    shape, n_in, n_out
):
    """A result that lies in columns would send attention to a kernel several times slower."""
    layer = Linear(n_in, n_out, bias=False).double()
    x = torch.randn(*shape, n_in, generator=rng(0), dtype=torch.float64)
    y = layer(x)
    close(y, torch.einsum("...i,oi->...o", x, layer.weight))
    assert y.is_contiguous() and 1 < model_module.FEW < 5 * 5


@properties
@given(
    st.integers(1, 20),
    st.integers(0, 99),
    st.sampled_from(("llama", "qwen2")),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
)
def test_a_packed_model_says_the_same_and_learns_as_before(T, seed, model_type, dtype):
    """Biases too; float64 has no order of oneDNN's own, and where gradients are asked for the weights themselves are used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "LARGE", 0)
        packing(T, seed, model_type, dtype)


def test_a_small_matrix_is_not_packed():
    model = make_gpt(SMALL).float().pack()
    assert all(module.packed is None for module in model.modules() if isinstance(module, Linear))


@pytest.mark.parametrize(
    "dtype, supported, packs",
    [
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float64, True, False),
        (torch.float32, False, True),
    ],
)
def test_bfloat16_is_packed_where_the_processor_computes_in_it_and_float32_anywhere(
    dtype, supported, packs, monkeypatch
):
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: supported)
    weight = torch.zeros(model_module.LARGE, 1, dtype=dtype)
    assert (
        model_module.packable(weight) == packs
        and not model_module.packable(weight[1:])
        and not model_module.packable(weight.to("meta"))
    )
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert not model_module.packable(weight)


@pytest.mark.parametrize(
    "shape, packed",
    [
        ((1, 1, 4), False),
        ((2, 4), False),
        ((1, 2, 4), False),
        ((1, 3, 4), True),
        ((3, 1, 4), True),
        ((3, 4), True),
    ],
)
def test_packed_weights_serve_more_than_two_rows(shape, packed):
    linear, x = Linear(4, 3, bias=False), torch.ones(shape)
    linear.packed = torch.ops.mkldnn._reorder_linear_weight(
        torch.zeros(3, 4), 8
    )  # zeros, to tell which weights served
    with torch.no_grad():
        assert torch.equal(linear(x), torch.zeros(*shape[:-1], 3)) == packed
    assert not torch.equal(linear(x), torch.zeros(*shape[:-1], 3))


def test_a_size_is_a_whole_number_from_1_to_2_to_the_31():
    model_module.check_sizes(SimpleNamespace(a=1, b=(1 << 31) - 1), ["a", "b"])
    for bad in (0, -1, 1 << 31, True, 2.0, "3", None):
        with pytest.raises(
            ValueError, match=f"b = {bad!r}: must be a whole number above 0, and below 2\\^31"
        ):
            model_module.check_sizes(SimpleNamespace(a=1, b=bad), ["a", "b"])


def test_the_shape_of_a_new_base_is_that_of_the_shipped_one():
    assert (
        replace(
            read_config(Path(model_module.__file__).parent / "data/base/config.json"), head_dim=None
        )
        == ModelConfig()
    )


def packing(T, seed, model_type, dtype):
    model = make_gpt(replace(SMALL, max_position_embeddings=20, model_type=model_type), seed).to(
        dtype
    )
    tokens = torch.randint(5, (2, T), generator=rng(seed))
    with torch.no_grad():
        plain = model.lm_head(model(tokens))
        assert model.pack() is model
        packed = model.lm_head(model(tokens))
        linears = [module for module in model.modules() if isinstance(module, Linear)]
        orders = {torch.float32} | (
            {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
        )
        assert len(linears) == 9 and all(
            (layer.packed is not None) == (dtype in orders) for layer in linears
        )
        assert (
            torch.equal(packed, plain)
            if dtype == torch.float64
            else (packed - plain).abs().max() < (1e-4 if dtype == torch.float32 else 0.5)
        )
    model.requires_grad_().lm_head(model(tokens)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_new_gpt_starts_small_and_the_ends_of_its_residual_branches_smaller():
    torch.manual_seed(0)
    for name, weight in GPT(ModelConfig()).named_parameters():
        std = (
            0
            if "norm" in name
            else 0.02 / math.sqrt(2 * ModelConfig().num_hidden_layers)
            if name.endswith(("o_proj.weight", "down_proj.weight"))
            else 0.02
        )
        assert weight.std().item() == pytest.approx(
            std, rel=0.05
        ) and weight.mean().item() == pytest.approx(float("norm" in name), abs=1e-3)


@pytest.mark.parametrize("values, says", [
    ({"hidden_size": 20}, "hidden_size 20"), ({"num_attention_heads": 3}, "3 heads"), ({"num_key_value_heads": 3}, "num_key_value_heads 3")
])  # fmt: skip
def test_heads_that_do_not_fit_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        replace(SMALL, **values)


@TIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_model_is_a_llama_directory_and_comes_back_bit_for_bit(tied, dtype, tmp_path):
    config, first, second = (
        replace(SMALL, tie_word_embeddings=tied, bos_token_id=None),
        tmp_path / "a" / "base",
        tmp_path / "b",
    )
    make_gpt(config, dtype=torch.float32).save_pretrained(first, dtype)
    assert json.loads((first / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": 5,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 700.0,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 2,
        "rope_scaling": None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    disk = load_file(first / "model.safetensors")
    assert {name: tuple(weight.shape) for name, weight in disk.items()} == llama_shapes(
        config
    ) and {w.dtype for w in disk.values()} == {dtype}

    model, loaded = make_gpt(config, dtype=torch.float32), GPT.from_pretrained(first)
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))
    assert (
        loaded.config == config
        and not loaded.training
        and (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    )
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and theirs[name].dtype == torch.float32
        for name in ours
    )
    assert torch.equal(loaded.lm_head(loaded(SENTENCE)), model.lm_head(model(SENTENCE)))

    GPT.from_pretrained(first, dtype).save_pretrained(second)
    assert {file.name: file.read_bytes() for file in first.iterdir()} == {
        file.name: file.read_bytes() for file in second.iterdir()
    }


@pytest.fixture
def saved(tmp_path):
    make_gpt(SMALL, dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


def change_config(directory, changes: dict) -> None:
    """A field that becomes `...` is left out."""
    file = directory / "config.json"
    file.write_text(
        json.dumps(
            {
                name: value
                for name, value in (json.loads(file.read_text()) | changes).items()
                if value is not ...
            }
        )
    )


def refuses(directory, *says) -> None:
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(directory)
    assert all(word in str(error.value) for word in says), str(error.value)


OPTIONAL = (
    "model_type", "hidden_act", "attention_bias", "mlp_bias", "head_dim", "dtype", "num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings"
)  # fmt: skip


@pytest.mark.parametrize("changes", [
    {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}, {"model_type": "gemma"}, {"head_dim": 1},
    {"rope_scaling": {"type": "dynamic"}}, {"rope_parameters": {"rope_type": "yarn"}},
    *({field: ...} for field in asdict(SMALL) if field not in OPTIONAL),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_file_and_field(saved, changes):
    change_config(saved, changes)
    refuses(saved, str(saved / "config.json"), *changes, *changes.get("rope_parameters", ()))


def test_fields_that_a_llama_may_leave_out_have_its_defaults(tmp_path):
    config = replace(SMALL, num_key_value_heads=4, rope_theta=10000.0)
    make_gpt(config).save_pretrained(tmp_path)
    change_config(tmp_path, dict.fromkeys(OPTIONAL, ...))
    assert GPT.from_pretrained(tmp_path).config == config
    change_config(
        tmp_path,
        {"head_dim": None, "rope_scaling": None, "rope_parameters": None, "pretraining_tp": 1},
    )
    assert GPT.from_pretrained(tmp_path).config == config


@pytest.mark.parametrize("more", [{}, {"rope_type": "default"}])
def test_rope_theta_may_stand_among_the_rope_parameters(saved, more):
    before = GPT.from_pretrained(saved)(SENTENCE)
    for theta in (700.0, 7.0):
        change_config(saved, {"rope_theta": ..., "rope_parameters": {"rope_theta": theta} | more})
        assert torch.allclose(GPT.from_pretrained(saved)(SENTENCE), before) == (theta == 700)


@pytest.mark.parametrize("name", [name for name in llama_shapes(SMALL) if "layers.0" not in name])
def test_a_missing_or_misshapen_tensor_is_refused_by_name(saved, name):
    """Nor may one that could be broadcast, or whose neighbour makes up for the missing rows, slip in."""
    file = saved / "model.safetensors"
    state = load_file(file)
    weight = state.pop(name)
    save_file(state, file)
    refuses(saved, str(saved), name, "missing")
    for other in (
        weight[:1],
        weight[1:],
        weight[..., :1],
        weight[None],
        weight.repeat(2, *[1] * (weight.dim() - 1)),
    ):
        save_file(state | {name: other.contiguous()}, file)
        refuses(saved, str(saved), name, str(tuple(other.shape)), str(tuple(weight.shape)))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "lm_head.bias",
        "embed_tokens.weight",
    ],
)
def test_a_surplus_tensor_is_refused_by_name(saved, name):
    file = saved / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(8)}, file)
    refuses(saved, str(saved), name)


@TIED
def test_tensors_that_say_nothing_new_are_passed_over(tied, tmp_path):
    model, file = (
        make_gpt(replace(SMALL, tie_word_embeddings=tied), dtype=torch.float32),
        tmp_path / "model.safetensors",
    )
    model.save_pretrained(tmp_path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)} | (
        {"lm_head.weight": model.embed_tokens.weight} if tied else {}
    )
    save_file(load_file(file) | more, file)
    loaded = GPT.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head(loaded(SENTENCE)), model.lm_head(model(SENTENCE)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"\x80\x04garbage \xff", b"[1, 2]", b"null", -3])
def test_a_missing_or_garbage_file_is_refused_by_name(saved, name, content):
    old = (saved / name).read_bytes()
    (saved / name).unlink()
    if content is not None:
        (saved / name).write_bytes(old[:content] if content == -3 else content)
    refuses(saved, str(saved / name))


def write_half(temporary):
    temporary.write_text("new, hal")
    raise KeyboardInterrupt


@pytest.mark.parametrize("write", [
    lambda directory: write_atomically(directory / "config.json", write_half),
    lambda directory: write_atomically(directory / "another", write_half),
    lambda directory: write_json(directory / "config.json", {"a": 1}),
    lambda directory: write_safetensors(directory / "model.safetensors", {"a": torch.ones(1)}),
    lambda directory: make_gpt(replace(SMALL, hidden_size=32)).save_pretrained(directory),
])  # fmt: skip
def test_a_write_that_ends_midway_leaves_the_old_files_and_nothing_else(saved, write, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def killed(temporary, path):
        """What stands on the disk just before the rename, which is atomic inside one directory alone."""
        assert temporary.parent == path.parent == saved and temporary.stat().st_size
        assert {
            file.name: file.read_bytes() for file in saved.iterdir() if file != temporary
        } == before
        raise KeyboardInterrupt

    monkeypatch.setattr(model_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_a_write_that_succeeds_leaves_the_new_file_alone(tmp_path):
    for content in ({"a": 1}, {"b": "\u00e9"}):
        write_json(tmp_path / "file.json", content)
        assert json.loads((tmp_path / "file.json").read_text()) == content and [
            file.name for file in tmp_path.iterdir()
        ] == ["file.json"]
