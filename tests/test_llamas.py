"""Properties of checkpoints that others made: configs, shards, end tokens, heads for vLLM."""

import json
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from bench import serve_vllm
from bench.serve_vllm import write_served
from data.rows import base_digest
from data.tokenizer import copy_tokenizer, disk_dtype, load_tokenizer
from llamas import ROPES, fill
from medusa import generate
from model import GPT, ModelConfig, read_config, read_json, write_json, write_safetensors
from strategies import Code, call, contents, properties, random_heads, refused, small_tokenizer
from strategies import text_of

PEERS = json.loads((Path(__file__).parent / "peers.json").read_text())


# ---- the family ----
@pytest.mark.parametrize("case", PEERS["cases"], ids=lambda case: case["config"]["model_type"])
def test_recorded_checkpoints_give_the_logits_and_text_of_transformers(case, tmp_path):
    """tests/llamas.py wrote the records; `pytest -m peers` compares many more."""
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    shapes = {name: torch.empty(shape) for name, shape in case["shapes"].items()}
    write_safetensors(tmp_path / "model.safetensors", fill(shapes))
    model = GPT.from_pretrained(tmp_path, torch.float64).requires_grad_(False)
    tokens = torch.tensor(PEERS["tokens"])
    hidden = model(tokens)
    expected = torch.tensor(case["logits"], dtype=torch.float64)
    torch.testing.assert_close(model.lm_head(hidden), expected, rtol=0, atol=1e-5)
    assert text_of(generate(model, PEERS["tokens"][0][:2], 7)) == case["text"]
    model.save_pretrained(tmp_path)
    theirs = case["config"]["architectures"][0].replace("Mistral", "Llama")
    assert read_json(tmp_path / "config.json")["architectures"] == [theirs]
    assert torch.equal(GPT.from_pretrained(tmp_path, torch.float64)(tokens), hidden)


CONFIG = {"model_type": "llama", "vocab_size": 5, "hidden_size": 16, "intermediate_size": 12}
CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500.0}
CONFIG |= {"bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = ROPES[2]


def write_config(directory: Path, **changes) -> Path:
    """A config.json as the hub has them; a field that becomes `...` is left out."""
    config = {name: value for name, value in (CONFIG | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    return directory / "config.json"


@pytest.mark.parametrize("named", ROPES)
def test_every_spelling_of_rope_scaling_is_the_same_config(named, tmp_path):
    kind, both = named["rope_type"], {"rope_theta": 500.0} | named
    numbers = {name: value for name, value in named.items() if name != "rope_type"}
    spellings = [
        {"rope_scaling": named},
        {"rope_scaling": {"type": kind} | named, "rope_parameters": None},
        {"rope_theta": ..., "rope_parameters": both},
        {"rope_theta": 500, "rope_parameters": both | {"partial_rotary_factor": 1.0}},
        {"rope_scaling": {"type": kind} | numbers, "rope_parameters": both},
        {"rope_theta": ..., "rope_scaling": named, "rope_parameters": {"rope_theta": 500}},
    ]
    configs = [read_config(write_config(tmp_path, **changes)) for changes in spellings]
    assert configs == [configs[0]] * len(spellings)
    expected = 500, None if kind == "default" else named
    assert (configs[0].rope_theta, configs[0].rope_scaling) == expected


OPTIONAL = {"model_type": "llama", "num_key_value_heads": 4, "rope_theta": 10000.0}
OPTIONAL |= {"head_dim": None, "tie_word_embeddings": False, "rope_scaling": None}
OPTIONAL |= {"rope_parameters": None, "hidden_act": "silu", "mlp_bias": False}


@pytest.mark.parametrize("field", CONFIG)
def test_a_field_that_is_missing_is_refused_by_name_or_has_a_default(field, tmp_path):
    if field not in OPTIONAL:
        path = write_config(tmp_path, **{field: ...})
        refused(f"^{path}: {field} is missing", read_config, path)
    left_out = read_config(write_config(tmp_path, **dict.fromkeys(OPTIONAL, ...)))
    assert left_out == read_config(write_config(tmp_path, **OPTIONAL))


# As transformers reads them: left out, a window is 4,096; Llama has none, Qwen only on demand.
WINDOWS = [("mistral", 32, ..., 32), ("mistral", 9000, ..., 8192), ("mistral", None, ..., 8192)]
WINDOWS += [("mistral", ..., ..., 4096), ("mistral", 32, False, 32), ("llama", 32, True, 8192)]
WINDOWS += [("qwen2", 32, ..., 8192), ("qwen2", 32, False, 8192), ("qwen3", 32, True, 32)]
WINDOWS += [("qwen2", ..., True, 4096), ("qwen3", ..., ..., 8192)]


@pytest.mark.parametrize("kind, window, use, context", WINDOWS)
def test_the_context_ends_where_a_sliding_window_would_hide(kind, window, use, context, tmp_path):
    more = {"model_type": kind, "max_position_embeddings": 8192}
    path = write_config(tmp_path, sliding_window=window, use_sliding_window=use, **more)
    assert read_config(path).max_position_embeddings == context


@pytest.mark.parametrize("kind, left_out", [("qwen2", 4), ("qwen3", 128)])
def test_qwen_may_leave_its_ends_out_and_has_a_head_size_of_its_own(kind, left_out, tmp_path):
    changes = {"model_type": kind, "bos_token_id": ..., "eos_token_id": ...}
    for head_dim, size in ((6, 6), (..., left_out)):
        config = read_config(write_config(tmp_path, **changes, head_dim=head_dim))
        assert (config.bos_token_id, config.eos_ids) == (None, ())
        assert (config.head_dim, config.model_type) == (size, kind)


IDS = st.lists(st.integers(0, 3), max_size=3)


@properties
@given(IDS, IDS, st.booleans())
def test_a_text_ends_where_config_or_generation_config_says(tmp_path_factory, ours, more, plain):
    directory, both = tmp_path_factory.mktemp("base"), list(dict.fromkeys(ours + more))
    files = [(ids or [None])[0] if plain and len(ids) < 2 else ids for ids in (ours, more)]
    write_json(directory / "generation_config.json", {"eos_token_id": files[1]})
    config = read_config(write_config(directory, eos_token_id=files[0]))
    assert config.eos_token_id == (both if len(both) > 1 else (both or [None])[0])
    GPT(config).save_pretrained(directory / "saved")
    assert read_config(directory / "saved" / "config.json") == config


def scaled(kind, **changes) -> dict:
    return {"rope_scaling": (LLAMA3 if kind == "llama3" else {}) | {"rope_type": kind} | changes}


HALF = {"partial_rotary_factor": 0.5}
# For each field, values that are refused.
VALUES = {"model_type": ["bloom", None, ["llama"]], "quantization_config": [{"bits": 4}]}
VALUES |= {"layer_types": [["sliding_attention"], 3, "x"], "eos_token_id": ["x", [2, "x"]]}
VALUES |= {"attention_bias": [True], "mlp_bias": [True], "hidden_act": ["gelu"]}
VALUES |= {"rope_scaling": [["default"]], "rope_parameters": ["default"]}
VALUES |= {"rope_theta": [0, "1", None]}
VALUES |= {"hidden_size": [0, 18, "16"], "head_dim": [7, 0, 4.0]}
VALUES |= {"intermediate_size": [1 << 31, True], "bos_token_id": [[1]], "rms_norm_eps": [1 << 63]}
# The field that is refused by its name and value, and the change that it takes.
REFUSED = [(field, {field: value}) for field in VALUES for value in VALUES[field]]
REFUSED += [("num_attention_heads", {"num_key_value_heads": 3})]
REFUSED += [("partial_rotary_factor", change) for change in (HALF, {"rope_parameters": HALF})]
REFUSED += [("rope_scaling.rope_type", scaled(kind)) for kind in ("yarn", ["linear"])]
REFUSED += [("rope_parameters.rope_type", {"rope_parameters": {"rope_type": "dynamic"}})]
REFUSED += [("factor", scaled("linear", factor=factor)) for factor in (None, 0, "2")]
REFUSED += [(name, scaled("llama3", **{name: None})) for name in LLAMA3 if name != "rope_type"]
REFUSED += [("high_freq_factor", scaled("llama3", high_freq_factor=1.0))]
for name in ("factor", "mrope_section", "full_attention"):
    REFUSED.append((f"rope_scaling.{name}", scaled("default", **{name: 2})))
for window in ("wide", 0):
    REFUSED.append(("sliding_window", {"model_type": "mistral", "sliding_window": window}))
# What is said twice, and not the same.
REFUSED.append(("rope_scaling.rope_type = 'x': but rope_scaling.type", scaled("x", type="y")))
for name in ("rope_theta", "partial_rotary_factor"):
    both = {name: 1, "rope_parameters": {name: 2}}
    REFUSED.append((f"{name} = 1: but rope_parameters.{name}", both))
for name in ("rope_type", "factor"):
    both = {"rope_scaling": {name: "yarn"}, "rope_parameters": {name: "default"}}
    REFUSED.append((f"rope_scaling.{name} = 'yarn': but rope_parameters.{name}", both))


@pytest.mark.parametrize("field, changes", REFUSED, ids=str)
def test_an_unsupported_config_is_refused_by_file_field_and_value(field, changes, tmp_path):
    path = write_config(tmp_path, **changes)
    error = refused(f"^{re.escape(f'{path}: {field} = ')}", read_config, path)
    assert field != "model_type" or error.endswith("llama, mistral, qwen2, qwen3")
    assert "\n" not in error and len(error) <= len(f"{path}: ") + 120


# ---- files and tokenizers ----
SAVED = {"model.safetensors": save_file, "pytorch_model.bin": torch.save}
NO_TABLES = [[1], {"a": 1}, {3: torch.ones(2)}, {"a": torch.ones(2).to_sparse()}, {"a": Code()}]
NO_TABLES += [{"a": [1]}]


@pytest.fixture(params=SAVED)
def sharded(base, request):
    """A base in one file, and the same in three shards: the directories, the names."""
    state, folder = load_file(base / "model.safetensors"), base / "sharded"
    write_json(folder / "config.json", read_json(base / "config.json"))
    name = Path(request.param)
    shards = [f"{name.stem}-0000{i}-of-00003{name.suffix}" for i in (1, 2, 3)]
    weight_map = {name: shards[i % 3] for i, name in enumerate(state)}
    for shard in shards:
        part = {name: nn.Parameter(state[name]) for name in state if weight_map[name] == shard}
        SAVED[request.param](part, folder / shard)
    write_json(folder / f"{name}.index.json", {"metadata": {}, "weight_map": weight_map})
    return base, folder, [*shards, f"{name}.index.json", request.param]


def test_shards_and_files_of_torch_are_the_model_in_one_file(sharded):
    whole, folder, names = sharded
    state = load_file(whole / "model.safetensors")
    for _ in range(2):
        ours, theirs = (GPT.from_pretrained(path).state_dict() for path in (folder, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert disk_dtype(folder) == state["model.norm.weight"].dtype
        # Then it is in one file, and shards are passed over.
        SAVED[names[-1]](state, folder / names[-1])
    before = base_digest(folder)
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-1] + b"\1")
    assert base_digest(folder) != before


@pytest.mark.parametrize("content", NO_TABLES)
def test_a_file_of_torch_with_anything_but_tensors_by_name_is_refused(content, base):
    (base / "model.safetensors").unlink()
    refused("model.safetensors does not exist", GPT.from_pretrained, base)
    torch.save(content, base / "pytorch_model.bin")
    refused(r"pytorch_model.bin .*tensors", GPT.from_pretrained, base)
    assert not Path("code-has-run").exists()


# The file, or the number of its name; its content, CUT being half of it.
BROKEN = [(1, None), (1, ""), (1, "garbage"), (1, "CUT"), (3, "[]"), ("config.json", None)]
WEIGHT_MAPS = None, ["a"], {"a": 3}, {"a": "../model.safetensors"}, {"a": "NAME"}
BROKEN += [(3, json.dumps({"weight_map": weight_map})) for weight_map in WEIGHT_MAPS]
BROKEN += [("generation_config.json", ends) for ends in ("{", "[2]", '{"eos_token_id": [1.5]}')]


@pytest.mark.parametrize("name, content", BROKEN)
def test_a_missing_or_malformed_file_is_refused_by_name(sharded, name, content):
    _, folder, names = sharded
    file = folder / (name if isinstance(name, str) else names[name])
    if content == "CUT":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif content is None:
        file.unlink()
    else:
        file.write_text(content.replace("NAME", names[0]))
    refused(f"^{file}", GPT.from_pretrained, folder)


def test_a_model_opens_in_the_dtype_asked_for_and_shares_nothing_with_its_file(base):
    before = contents(base)
    for dtype in (torch.bfloat16, torch.float32):
        model = GPT.from_pretrained(base, dtype)
        tensors = [*model.parameters(), *model.buffers()]
        assert all(tensor.dtype == dtype and not tensor.is_meta for tensor in tensors)
        for weight in model.parameters():
            assert weight.requires_grad
            weight.data.zero_()
    assert contents(base) == before


def test_a_tokenizer_json_without_the_package_names_the_file_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(r"tokenizers.*pip install -r data/requirements\.txt", load_tokenizer, tmp_path)


def test_all_that_belongs_to_a_tokenizer_is_copied(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b" / "c"
    small_tokenizer().save(source)
    others = "tokenizer_config", "special_tokens_map", "generation_config"
    for name in ("tokenizer.json", "chat_template.jinja", *(f"{other}.json" for other in others)):
        (source / name).write_text(name)
    expected = contents(source)
    (source / "other.json").write_text("of the model")
    copy_tokenizer(source, target)
    assert contents(target) == expected


# ---- heads as vLLM expects them ----
def test_heads_of_another_model_are_not_served_nor_overwritten(base, tmp_path):
    heads, served = str(tmp_path / "heads"), tmp_path / "served"
    random_heads(GPT.from_pretrained(base), 2, 0, sequential=True).save_pretrained(heads)
    refused("sequential heads, which vLLM does not know", write_served, base, heads, served)
    random_heads(GPT(ModelConfig(290, 8, 4, 1, 2, 1, 16)), 2, 0).save_pretrained(heads)
    refused("hidden_size", write_served, base, heads, served)
    assert not served.exists()
    files = ["--heads", heads, "--out", heads]
    refused(f"--out {heads} would overwrite", call, serve_vllm.main, *files)


@pytest.mark.parametrize("private, truncated", [(False, 0), (False, 40), (True, 0)])
def test_vllm_gets_whole_heads_and_its_texts_are_compared(private, truncated, base, capsys):
    """In its place our own plain decoding, up to the tokens that it is told end a text."""
    heads, served, model = base / "heads", base / "served", GPT.from_pretrained(base)
    model.save_pretrained(base, torch.float16)
    random_heads(model, 3, 0, 2, private, truncated).save_pretrained(heads)

    def of_vllm(vllm, config, prompts, K, eos_ids):
        model = GPT.from_pretrained(base)
        assert (K, eos_ids) == (3, model.config.eos_ids)
        texts = [text_of(generate(model, prompt, config.new_tokens)) for prompt in prompts]
        return [*texts[:3], [*texts[3][:4], 0]], {"vllm:spec_decode_num_drafts": 5}

    replaced = {"held_out_prompts": lambda *_: [[n] * 6 for n in range(4)], "run_vllm": of_vllm}
    with patch.multiple(serve_vllm, import_vllm=lambda: None, **replaced):
        files = ["--base", base, "--heads", heads, "--out", served]
        call(serve_vllm.main, *files, "--new-tokens", 12)
    # The file holds the LM head that the heads share, and they guess among all tokens.
    config = read_json(heads / "config.json") | {"truncated_vocab_size": 290}
    assert read_json(served / "config.json") == config
    expected = load_file(heads / "model.safetensors")
    expected.pop("token_map", None)
    if not private:
        expected["lm_heads.0.weight"] = model.lm_head.weight.detach().half()
    torch.testing.assert_close(load_file(served / "model.safetensors"), expected, rtol=0, atol=0)
    out = capsys.readouterr().out
    assert "equals ours on 3 of 4 prompts" in out and "prompt 3: differs from token 5 on" in out
    assert re.search(r"spec_decode_num_drafts +5\n.*accepted +\d+, \[\d+, \d+, \d+\]", out)
