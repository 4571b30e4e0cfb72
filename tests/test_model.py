"""Properties of the GPT: the Llama formulas, a cache that changes nothing, files on disk."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

import model as model_module
from model import GPT, KVCache, ModelConfig, read_config, write_atomically, write_json
from strategies import ROPES, close, contents, default_dtype, properties, refused, rng
from strategies import with_random_weights

SMALL = ModelConfig(5, 16, 12, 2, 4, 2, 16, rope_theta=700.0, tie_word_embeddings=False)
SENTENCE = torch.tensor([[1, 2, 3, 4, 0]])
TIED = pytest.mark.parametrize("tied", [False, True])


def make_gpt(config: ModelConfig, seed=0, dtype=torch.float64) -> GPT:
    """Its table of angles is as exact as its dtype."""
    with default_dtype(dtype):
        return with_random_weights(GPT(config).eval().requires_grad_(False), seed)


@st.composite
def gpts(draw):
    nkv, group, half = (draw(st.integers(1, 3)) for _ in range(3))
    drawn = {
        "hidden_size": st.just(2 * half * nkv * group) | st.integers(1, 9),
        "intermediate_size": st.integers(1, 9), "num_hidden_layers": st.integers(1, 3),
        "rms_norm_eps": st.sampled_from((1e-5, 0.1)), "rope_theta": st.sampled_from((10000.0, 3.0)),
        "tie_word_embeddings": st.booleans(), "rope_scaling": st.sampled_from((None, *ROPES[1:])),
        "model_type": st.sampled_from(("llama", "qwen2", "qwen3")),
    }  # fmt: skip
    sizes = {"num_attention_heads": nkv * group, "num_key_value_heads": nkv, "head_dim": 2 * half}
    more = draw(st.fixed_dictionaries(drawn)) | sizes
    config = ModelConfig(vocab_size=5, max_position_embeddings=12, **more)
    return make_gpt(config, draw(st.integers(0, 99)))


def batches(high):
    """Tokens (B, T), T up to high."""
    drawn = st.tuples(st.integers(1, 3), st.integers(1, high), st.integers(0, 99))
    return drawn.map(lambda drawn: torch.randint(5, drawn[:2], generator=rng(drawn[2])))


def llama_shapes(c: ModelConfig) -> dict[str, tuple]:
    """The tensors of a Llama file, by name."""
    D, inner, hs = c.hidden_size, c.intermediate_size, c.head_dim
    q, kv = c.num_attention_heads * hs, c.num_key_value_heads * hs
    block = {f"self_attn.{name}_proj.weight": (n, D) for name, n in zip("qkv", (q, kv, kv))}
    if c.model_type == "qwen2":
        block |= {f"self_attn.{name}_proj.bias": (n,) for name, n in zip("qkv", (q, kv, kv))}
    if c.model_type == "qwen3":
        block |= {f"self_attn.{name}_norm.weight": (hs,) for name in "qk"}
    block |= {"self_attn.o_proj.weight": (D, q), "mlp.down_proj.weight": (D, inner)}
    block |= {f"mlp.{name}_proj.weight": (inner, D) for name in ("gate", "up")}
    block |= {f"{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    shapes = {"model.embed_tokens.weight": (c.vocab_size, D), "model.norm.weight": (D,)}
    for i in range(c.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return shapes if c.tie_word_embeddings else shapes | {"lm_head.weight": (c.vocab_size, D)}


def inv_freq_by_hand(c: ModelConfig, i: int) -> float:
    """Of pair i; Llama 3's rule by wavelength, as its makers state it."""
    freq, scaling = c.rope_theta ** (-2 * i / c.head_dim), c.rope_scaling
    if scaling is None:
        return freq
    factor, wavelength = scaling["factor"], 2 * math.pi / freq
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    context = scaling.get("original_max_position_embeddings")
    if scaling["rope_type"] == "linear" or wavelength > context / low:
        return freq / factor
    if wavelength < context / high:
        return freq
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * freq / factor + smooth * freq


def llama_by_hand(disk, c: ModelConfig, tokens, positions, mask) -> torch.Tensor:
    """Logits (T, V) of one sequence (T,), head by head; mask (T, T) is added to the scores."""
    hs, group = c.head_dim, c.num_attention_heads // c.num_key_value_heads
    freqs = torch.tensor([inv_freq_by_hand(c, i) for i in range(hs // 2)], dtype=torch.float64)
    angles = torch.outer(positions.double(), freqs)

    def norm(x, name):
        size = (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()
        return disk[name] * x / size if name in disk or "_norm" not in name else x

    def rotated(x):
        # A pair (i, i + hs/2) turns as one complex number.
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def project(x, name, head):
        rows = slice(head * hs, (head + 1) * hs)
        bias = disk.get(f"{name}.bias")
        return x @ disk[f"{name}.weight"][rows].T + (0 if bias is None else bias[rows])

    x = disk["model.embed_tokens.weight"][tokens]
    for layer in range(c.num_hidden_layers):
        block, heads = f"model.layers.{layer}.", []
        y = norm(x, block + "input_layernorm.weight")
        for head in range(c.num_attention_heads):
            q, k = (block + f"self_attn.{name}_" for name in "qk")
            q = rotated(norm(project(y, q + "proj", head), q + "norm.weight"))
            k = rotated(norm(project(y, k + "proj", head // group), k + "norm.weight"))
            scores = (q @ k.T / math.sqrt(hs) + mask).exp()
            v = project(y, block + "self_attn.v_proj", head // group)
            heads.append(scores / scores.sum(-1, keepdim=True) @ v)
        x = x + torch.cat(heads, dim=-1) @ disk[block + "self_attn.o_proj.weight"].T
        y = norm(x, block + "post_attention_layernorm.weight")
        gate, up = (y @ disk[f"{block}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ disk[block + "mlp.down_proj.weight"].T
    head = disk.get("lm_head.weight", disk["model.embed_tokens.weight"])
    return norm(x, "model.norm.weight") @ head.T


@settings(properties, max_examples=50)
@given(gpts(), batches(high=5), st.booleans(), st.integers(0, 99))
def test_the_gpt_equals_the_formulas_of_its_file(tmp_path_factory, model, tokens, plain, seed):
    """With the default positions and mask, and with any others."""
    (B, T), directory = tokens.shape, tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    disk = load_file(directory / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in disk.items()} == llama_shapes(model.config)
    positions, mask = torch.arange(T).expand(B, T), torch.full((T, T), -math.inf).triu(1)
    if not plain:
        positions = torch.randint(12, (B, T), generator=rng(seed))
        mask = torch.randn(T, T, generator=rng(seed), dtype=torch.float64)
    logits = model.lm_head(model(tokens) if plain else model(tokens, positions, mask))
    for b in range(B):
        close(logits[b], llama_by_hand(disk, model.config, tokens[b], positions[b], mask))


@properties
@given(gpts(), batches(high=12), st.data())
def test_cached_decoding_in_any_chunks_equals_one_forward(model, tokens, data):
    """keep_batch keeps the sequences that it is told to, in their order."""
    (B, T), whole = tokens.shape, model(tokens)
    cache, at_once = model.new_cache(T, B), model.new_cache(12, B)
    model(tokens, cache=at_once)
    while (S := cache.length) < T:
        size = data.draw(st.just(1) | st.integers(1, T - S))
        close(model(tokens[:, S : S + size], cache=cache), whole[:, S : S + size])
        assert cache.length == S + size
    close(cache.data, at_once.data[..., :T, :])
    rows = torch.tensor(data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=B)))
    cache.keep_batch(rows)
    close(cache.data, at_once.data[:, :, rows, :, :T])
    assert not at_once.data[..., T:, :].any(), "only these slots are written"


@properties
@given(st.integers(1, 3), st.integers(0, 4), st.lists(st.booleans(), max_size=6))
def test_keep_moves_the_chosen_rows_down_and_forgets_the_others(B, start, chosen):
    cache = KVCache(SMALL, B, start + len(chosen) + 1)
    cache.data.copy_(torch.randn(cache.data.shape, generator=rng(0)))
    rows = [row for row, kept in enumerate(chosen) if kept]
    expected = cache.data[..., [*range(start), *(start + row for row in rows)], :]
    cache.length = start + len(chosen)
    cache.keep(start, rows)
    assert cache.length == start + len(rows)
    assert torch.equal(cache.data[..., : cache.length, :], expected), "moved down, all at once"


def test_more_than_the_cache_or_the_context_holds_is_refused_and_changes_nothing():
    model, tokens = make_gpt(SMALL), torch.randint(5, (2, 17), generator=rng(0))
    whole = model(tokens[:, :16])
    # A tree may be wider than the rest of the context: its positions are given.
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    close(model(tokens, torch.tensor([*range(16), 15]), seen)[:, :16], whole)
    for capacity, room, says in ((7, 7, "cache of 7"), (20, 16, "context of 16")):
        cache = model.new_cache(capacity, 2)
        model(tokens[:, : room - 1], cache=cache)
        before = cache.data.clone()
        refused(says, model, tokens[:, room - 1 : room + 1], cache=cache)
        assert cache.length == room - 1 and torch.equal(cache.data, before)
        close(model(tokens[:, room - 1 : room], cache=cache), whole[:, room - 1 : room])
    refused("context of 16", model, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rotary_table_of_a_long_context_grows_to_the_values_of_a_whole_one(dtype):
    config = replace(SMALL, max_position_embeddings=1_000_000)
    model, whole = GPT(config).to(dtype), model_module.rotary_table(config, 1_000_000).to(dtype)
    assert len(model.rotary) < 10_000, "not built before it is needed"
    for tokens, capacity in ((SENTENCE.tile(1, 820), 4100), (SENTENCE, 5000)):
        with torch.inference_mode():
            model(tokens, cache=model.new_cache(capacity))
        assert torch.equal(model.rotary, whole[:capacity])
    # Training goes on with what decoding has made; positions that are given may be any.
    model(SENTENCE).sum().backward()
    model(SENTENCE, torch.tensor([7, 70_000, 3, 999_999, 5]))
    assert torch.equal(model.rotary, whole)


def test_a_new_gpt_starts_small_and_the_ends_of_its_residual_branches_smaller():
    torch.manual_seed(0)
    for name, weight in GPT(ModelConfig()).named_parameters():
        mean, std = (1, 0) if "norm" in name else (0, 0.02)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * ModelConfig().num_hidden_layers)
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
        assert weight.mean().item() == pytest.approx(mean, abs=2e-3), name


def test_a_new_base_has_the_shape_of_the_shipped_one():
    shipped = Path(model_module.__file__).parent / "data/base/config.json"
    assert read_config(shipped) == ModelConfig()


# ---- files ----
@TIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_model_is_a_llama_directory_and_comes_back_bit_for_bit(tied, dtype, tmp_path):
    config = replace(SMALL, tie_word_embeddings=tied, bos_token_id=None)
    first, second = tmp_path / "a" / "base", tmp_path / "b"
    model = make_gpt(config, dtype=torch.float32)
    model.save_pretrained(first, dtype)
    written = json.loads((first / "config.json").read_text())
    extra = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    extra |= {"attention_bias": False, "mlp_bias": False, "head_dim": 4}
    assert written == asdict(config) | extra | {"dtype": str(dtype).removeprefix("torch.")}
    disk = load_file(first / "model.safetensors")
    assert disk.keys() == llama_shapes(config).keys()
    assert all(tensor.dtype == dtype for tensor in disk.values())

    loaded = GPT.from_pretrained(first)
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))
    assert loaded.config == config and not loaded.training
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded.lm_head(loaded(SENTENCE)), model.lm_head(model(SENTENCE)))
    GPT.from_pretrained(first, dtype).save_pretrained(second)
    assert contents(first).keys() == {"config.json", "model.safetensors"}
    assert contents(first) == contents(second)


@pytest.fixture
def saved(tmp_path):
    make_gpt(SMALL, dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in llama_shapes(SMALL) if "layers.0" not in name])
def test_a_missing_or_misshapen_tensor_is_refused_by_name(saved, name):
    """Also one that could be broadcast, or whose neighbour makes up for the missing rows."""
    file = saved / "model.safetensors"
    state = load_file(file)
    weight = state.pop(name)
    save_file(state, file)
    refused(f"{saved}: {name} is missing in the file", GPT.from_pretrained, saved)
    for other in (weight[:1], weight[1:], weight[..., :1], weight[None], weight.tile(2)):
        save_file(state | {name: other.contiguous()}, file)
        sizes = f"{tuple(other.shape)} in the file, {tuple(weight.shape)} in the model"
        refused(re.escape(f"{saved}: {name} is {sizes}"), GPT.from_pretrained, saved)
    for quantized in (torch.float8_e4m3fn, torch.int32, torch.bool):
        save_file(state | {name: weight.to(quantized)}, file)
        refused(f"{saved}: {name} is {quantized}", GPT.from_pretrained, saved)


@pytest.mark.parametrize("name", ["layers.2.x", "layers.0.self_attn.q_proj.bias", "lm_head.weight"])
def test_an_unexpected_tensor_is_refused_by_name(saved, name):
    file = saved / "model.safetensors"
    save_file(load_file(file) | {f"model.{name}": torch.ones(8)}, file)
    refused(f"{saved}: .*{name}", GPT.from_pretrained, saved)


@TIED
def test_tensors_that_say_nothing_new_are_passed_over_and_another_tied_head_is_not(tied, tmp_path):
    model = make_gpt(replace(SMALL, tie_word_embeddings=tied), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    file, head = tmp_path / "model.safetensors", model.lm_head.weight
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    more |= load_file(file) | {"lm_head.weight": head}
    save_file(more, file)
    loaded = GPT.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head(loaded(SENTENCE)), model.lm_head(model(SENTENCE)))
    for other in (head * 1.001, head * 0, torch.ones(3)) if tied else ():
        save_file(more | {"lm_head.weight": other}, file)
        says = f"{tmp_path}: lm_head.weight differs: tie_word_embeddings"
        refused(says, GPT.from_pretrained, tmp_path)


def write_half(temporary):
    temporary.write_text("new, hal")
    raise KeyboardInterrupt


@pytest.mark.parametrize("write", [
    lambda directory: write_atomically(directory / "config.json", write_half),
    lambda directory: write_atomically(directory / "another", write_half),
    lambda directory: write_json(directory / "config.json", {"a": 1}),
    lambda directory: make_gpt(replace(SMALL, hidden_size=32)).save_pretrained(directory),
])  # fmt: skip
def test_a_write_that_ends_midway_leaves_the_old_files_and_nothing_else(saved, write, monkeypatch):
    def killed(temporary, path):
        # The rename is atomic only inside one directory.
        assert temporary.parent == path.parent == saved and temporary.stat().st_size
        assert contents(saved) == before | {temporary.name: temporary.read_bytes()}
        raise KeyboardInterrupt

    before = contents(saved)
    monkeypatch.setattr(model_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(saved)
    assert contents(saved) == before
