"""Laws of checkpoints that others made: the family's spellings mean what they mean there, shards add up, chat turns are the template's."""

import copy
import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

from bench import serve_vllm
from bench.serve_vllm import write_served
from data import tokenizer as tokenizer_module
from data.chat import chat_prompt, chat_text
from data.distilled import sample_rows
from data.shards import base_digest
from data.tokenizer import copy_tokenizer, load_base, load_tokenizer
from llamas import write_recorded
from medusa import MedusaHeads, Sampling, generate, medusa_generate
from model import GPT, ModelConfig, read_config
from strategies import (
    CheatingHeads,
    greedy_text,
    properties,
    random_gpt,
    random_heads,
    rng,
    small_tokenizer,
    write_base,
)
from tree import cartesian_tree

PEERS = json.loads((Path(__file__).parent / "peers.json").read_text())
CASES = pytest.mark.parametrize(
    "case", PEERS["cases"], ids=lambda case: case["config"]["model_type"]
)


# ---- the family ----


@CASES
def test_recorded_checkpoints_say_what_transformers_said_of_them(case, tmp_path):
    """tests/record_peers.py wrote what is compared with; `pytest -m peers` asks transformers itself, of many more."""
    write_recorded(tmp_path, case)
    model = GPT.from_pretrained(tmp_path, torch.float64).requires_grad_(False)
    tokens = torch.tensor(PEERS["tokens"])
    torch.testing.assert_close(
        model.lm_head(model(tokens)),
        torch.tensor(case["logits"], dtype=torch.float64),
        rtol=0,
        atol=1e-5,
    )
    assert [token for step in generate(model, PEERS["tokens"][0][:2], 7) for token in step] == case[
        "text"
    ]


def write_config(directory: Path, **changes) -> Path:
    """A config.json as the hub has them; a field that becomes `...` is left out."""
    config = {
        "model_type": "llama", "vocab_size": 5, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "bos_token_id": 1, "eos_token_id": 2,
    } | changes  # fmt: skip
    (directory / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not ...})
    )
    return directory / "config.json"


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "kind, numbers", [("linear", {"factor": 2.5}), ("llama3", LLAMA3), ("default", {})]
)
def test_every_spelling_of_rope_scaling_is_the_same_config(kind, numbers, tmp_path):
    spellings = [
        {"rope_scaling": {"rope_type": kind} | numbers},
        {"rope_scaling": {"type": kind} | numbers, "rope_parameters": None},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 500.0, "rope_type": kind} | numbers},
        {
            "rope_theta": 7.0,
            "rope_parameters": {
                "rope_theta": 500.0,
                "rope_type": kind,
                "partial_rotary_factor": 1.0,
            }
            | numbers,
        },
    ]
    configs = [read_config(write_config(tmp_path, **changes)) for changes in spellings]
    assert (
        configs == [configs[0]] * 4
        and configs[0].rope_theta == 500
        and (configs[0].rope_scaling is None) == (kind == "default")
    )


@pytest.mark.parametrize("changes, context", [
    ({"model_type": "mistral", "sliding_window": 32}, 32), ({"model_type": "mistral", "sliding_window": 100}, 64),
    ({"model_type": "mistral", "sliding_window": None}, 64), ({"model_type": "mistral"}, 64),
    ({"model_type": "qwen2", "sliding_window": 32}, 64), ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, 64),
    ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True}, 32),
])  # fmt: skip
def test_the_context_ends_where_a_sliding_window_would_begin_to_hide(changes, context, tmp_path):
    assert read_config(write_config(tmp_path, **changes)).max_position_embeddings == context


def test_qwen2_may_leave_its_ends_out_and_has_a_head_size_of_its_own(tmp_path):
    config = read_config(
        write_config(tmp_path, model_type="qwen2", bos_token_id=..., eos_token_id=..., head_dim=6)
    )
    assert (config.bos_token_id, config.eos_ids, config.head_size, config.model_type) == (
        None,
        (),
        6,
        "qwen2",
    )


def scaled(kind: str, **changes) -> dict:
    return {"rope_scaling": {"rope_type": kind} | (LLAMA3 if kind == "llama3" else {}) | changes}


@pytest.mark.parametrize("changes, says", [
    ({"model_type": "gemma"}, "model_type"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), (scaled("yarn", factor=2.0), "rope_scaling.rope_type"), (scaled(["linear"]), "rope_scaling.rope_type"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type"), ({"rope_scaling": [1]}, "rope_scaling"), ({"rope_parameters": "default"}, "rope_parameters"),
    (scaled("linear"), "factor"), (scaled("linear", factor=0), "factor"), (scaled("linear", factor="2"), "factor"),
    *((scaled("llama3", **{name: None}), name) for name in LLAMA3), (scaled("llama3", high_freq_factor=1.0), "high_freq_factor"),
    ({"head_dim": 7}, "head_dim"), ({"head_dim": 0}, "head_dim"), ({"head_dim": 4.0}, "head_dim"),
    ({"eos_token_id": [2, "x"]}, "eos_token_id"), ({"eos_token_id": "x"}, "eos_token_id"), ({"bos_token_id": [1]}, "bos_token_id"),
    ({"model_type": "mistral", "sliding_window": "wide"}, "sliding_window"), ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
], ids=str)  # fmt: skip
def test_a_config_that_cannot_be_honoured_is_refused_by_field(changes, says, tmp_path):
    path = write_config(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert str(path) in str(error.value) and says in str(error.value)


# ---- texts with several ends ----


@properties
@given(
    st.integers(0, 99),
    st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True),
    st.booleans(),
)
def test_a_text_ends_at_the_first_of_several_end_tokens(seed, ends, right):
    """In plain decoding, in the middle of an accepted path, and in sampled rows."""
    model = random_gpt(seed, context=16)
    text = greedy_text(model, [1, 2], 12)
    expected = text[: next((n for n, token in enumerate(text, start=1) if token in ends), None)]
    model.config = replace(model.config, eos_token_id=ends)
    heads = CheatingHeads(model, 3, [1, 2, *text], 3) if right else random_heads(model, 3, seed)
    assert [token for step in generate(model, [1, 2], 12) for token in step] == expected
    steps = []
    for emitted in medusa_generate(model, heads, cartesian_tree([2, 1, 1]), [1, 2], 12):
        steps += emitted
        heads.length = getattr(heads, "length", 0) + len(emitted)
    assert steps == expected
    rows, loss_mask = sample_rows(model, [[1, 2]], 14, Sampling(), rng(0))
    assert rows[0, 2:][loss_mask[0, 2:]].tolist() == expected


# ---- shards ----


@pytest.fixture
def sharded(tmp_path):
    """A base in three shards, and the same in one file."""
    whole = write_base(tmp_path)
    state, folder = load_file(whole / "model.safetensors"), tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: names[i % 3] for i, name in enumerate(state)}
    for shard in names:
        save_file(
            {name: state[name] for name in state if weight_map[name] == shard}, folder / shard
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return whole, folder, names


def test_shards_are_the_model_in_one_file(sharded):
    whole, folder, names = sharded
    ours, theirs = GPT.from_pretrained(folder).state_dict(), GPT.from_pretrained(whole).state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
    before = base_digest(folder)
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-1] + b"\1")
    assert base_digest(folder) != before


@pytest.mark.parametrize("content", [None, b"", b"garbage", -3])
def test_a_missing_or_truncated_shard_is_refused_by_name(sharded, content):
    _, folder, names = sharded
    old = (folder / names[1]).read_bytes()
    (folder / names[1]).unlink()
    if content is not None:
        (folder / names[1]).write_bytes(old[:content] if isinstance(content, int) else content)
    with pytest.raises(ValueError, match=names[1]):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../base/model.safetensors"}}',
    ],
)
def test_an_index_that_is_none_is_refused_by_name(sharded, content):
    _, folder, _ = sharded
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        GPT.from_pretrained(folder)


def test_a_model_opens_in_the_dtype_asked_for_and_shares_nothing_with_its_file(tmp_path):
    base = write_base(tmp_path)
    before = (base / "model.safetensors").read_bytes()
    model = GPT.from_pretrained(base, torch.bfloat16)
    assert {t.dtype for t in [*model.parameters(), *model.buffers()]} == {
        torch.bfloat16
    } and not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for p in GPT.from_pretrained(base).parameters():
            p.zero_()
    assert (base / "model.safetensors").read_bytes() == before


# ---- tokenizers and chat ----


def test_a_tokenizer_json_without_the_package_names_the_file_to_install(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(
        ValueError,
        match=r"tokenizer\.json needs the package tokenizers: pip install -r data/requirements\.txt",
    ):
        load_tokenizer(tmp_path)


def test_special_tokens_may_be_texts_or_objects(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": {"content": "</s>"},
                "pad_token": None,
                "add_bos_token": True,
            }
        )
    )
    assert tokenizer_module.special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_token_is_named_as_in_the_vocabulary_or_by_its_number():
    tokenizer = object.__new__(tokenizer_module.JsonTokenizer)
    tokenizer.tokenizer = SimpleNamespace(id_to_token={3: "<|end|>"}.get)
    assert (tokenizer.piece(3), tokenizer.piece(9)) == ("<|end|>", "<9>")


def test_all_that_belongs_to_a_tokenizer_is_copied(tmp_path):
    small_tokenizer().save(tmp_path / "a")
    for name in ("chat_template.jinja", "tokenizer_config.json", "other.json"):
        (tmp_path / "a" / name).write_text(f'"{name}"')
    copy_tokenizer(tmp_path / "a", tmp_path / "b" / "c")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "b" / "c").iterdir()}
    assert copied == {
        path.name: path.read_bytes()
        for path in (tmp_path / "a").iterdir()
        if path.name != "other.json"
    }


def chat_directory(tmp_path, template, where="tokenizer_config.json") -> Path:
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(template)
    else:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


TURNS = [
    {"role": "user", "content": "2 < 3?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why"},
]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'user' %}
<u>{{ message['content'] }}{{ eos_token }}
    {% else %}
<a>{{ message.content | upper }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<a>{% endif %}"""


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_turns_are_written_as_the_template_says_block_lines_leaving_no_trace(where, tmp_path):
    directory = chat_directory(tmp_path, TEMPLATE, where)
    assert chat_text(directory, TURNS) == "<s><u>2 < 3?</s>\n<a>YES\n<u>why</s>\n<a>"


def test_of_several_templates_the_default_is_taken_and_a_file_goes_before_them(tmp_path):
    directory = chat_directory(
        tmp_path,
        [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}],
    )
    assert chat_text(directory, TURNS) == "plain"
    (directory / "chat_template.jinja").write_text("file")
    assert chat_text(directory, TURNS) == "file"


@pytest.mark.parametrize("template, says", [
    (None, "no chat template"), ([], "no chat template"), ([{"name": "other", "template": "x"}], "no chat template"), ({"a": 1}, "no chat template"),
    ("{% for %}", "fails"), ("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{{ messages[0].content + 1 }}", "fails"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"), ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ cycler.__init__.__globals__.os.system('touch owned') }}", "fails"), ("{{ range(999999999) | list }}", "fails"), ("{{ nothing.at.all }}", "fails"),
    ("{{ 1 // 0 }}", "ZeroDivisionError"), ("{{ 'a' * 10 ** 18 }}", "MemoryError"),
], ids=str)  # fmt: skip
def test_a_missing_broken_or_hostile_template_is_one_line_and_runs_nothing(
    template, says, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        chat_text(chat_directory(tmp_path, template), TURNS)
    assert str(tmp_path) in str(error.value) and not (tmp_path / "owned").exists()


def test_a_directory_without_template_or_with_a_sentencepiece_model_alone_cannot_chat(tmp_path):
    base = write_base(tmp_path)
    tokenizer, _ = load_base(base)
    with pytest.raises(ValueError, match="no chat template"):
        chat_prompt(base, tokenizer, TURNS)
    chat_directory(base, TEMPLATE)
    with pytest.raises(ValueError, match="tokenizer.json"):
        chat_prompt(base, tokenizer, TURNS)


# ---- heads as vLLM expects them ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("private, truncated", [(False, 0), (True, 0), (False, 4)])
def test_served_heads_hold_the_lm_head_that_they_share_and_guess_among_all_tokens(
    tied, private, truncated, tmp_path
):
    model = GPT(replace(ModelConfig(7, 8, 4, 1, 2, 1, 16), tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "base", torch.float16)
    heads = random_heads(model, 3, 0, 2, private, truncated)
    heads.save_pretrained(tmp_path / "heads")
    write_served(tmp_path / "base", tmp_path / "heads", tmp_path / "served")
    ours, served = (
        load_file(tmp_path / name / "model.safetensors") for name in ("heads", "served")
    )
    settings = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert json.loads((tmp_path / "served" / "config.json").read_text()) == settings | {
        "truncated_vocab_size": 7
    }
    ours.pop("token_map", None)
    added = {} if private else {"lm_heads.0.weight": model.lm_head.weight.half()}
    assert served.keys() == (ours | added).keys() and all(
        torch.equal(t, served[name]) for name, t in (ours | added).items()
    )
    whole = MedusaHeads.from_pretrained(tmp_path / "served")
    assert whole.config == replace(heads.config, truncated_vocab_size=7) and torch.equal(
        whole.weight, heads.weight
    )


def test_heads_of_another_model_are_not_served(tmp_path):
    for name, size in (("base", 8), ("other", 16)):
        GPT(ModelConfig(7, size, 4, 1, 2, 1, 16)).save_pretrained(tmp_path / name)
    random_heads(GPT.from_pretrained(tmp_path / "other"), 2, 0).save_pretrained(tmp_path / "heads")
    with pytest.raises(ValueError, match="another model"):
        write_served(tmp_path / "base", tmp_path / "heads", tmp_path / "served")
    assert not (tmp_path / "served").exists()


class Engine:
    """In place of vLLM's: greedy decoding of the directory that it is given, up to the tokens that end a text."""

    def __init__(self, base, speculative_config, **more):
        self.model, self.heads = (
            GPT.from_pretrained(base),
            MedusaHeads.from_pretrained(speculative_config["model"]),
        )
        assert (
            speculative_config["num_speculative_tokens"] == self.heads.config.num_heads
            and more["dtype"] == "float32"
        )

    def generate(self, prompts, asked):
        model = copy.deepcopy(self.model)
        model.config = replace(model.config, eos_token_id=asked.stop_token_ids)
        texts = [
            [
                token
                for step in generate(model, prompt["prompt_token_ids"], asked.max_tokens)
                for token in step
            ]
            for prompt in prompts
        ]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=text)]) for text in texts]

    def get_metrics(self):
        return [
            SimpleNamespace(name="vllm:spec_decode_num_drafts", value=5),
            SimpleNamespace(name="other", value=6),
        ]


def test_vllm_is_asked_for_the_texts_that_we_decode_and_its_counters_stand_beside_ours(
    tmp_path, monkeypatch, capsys
):
    base = write_base(tmp_path)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(settings | {"eos_token_id": list(range(0, 290, 3))})
    )  # texts end soon
    random_heads(GPT.from_pretrained(base), 3, 0, truncated=40).save_pretrained(tmp_path / "heads")
    vllm = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace)
    monkeypatch.setattr(serve_vllm, "import_vllm", lambda: vllm)
    monkeypatch.setattr(
        serve_vllm,
        "held_out_prompts",
        lambda tokenizer, n, length: [[seed] * length for seed in range(n)],
    )
    flags = [
        "--base",
        base,
        "--heads",
        tmp_path / "heads",
        "--out",
        tmp_path / "served",
        "--prompts",
        "4",
        "--prompt-tokens",
        "6",
        "--new-tokens",
        "12",
    ]
    monkeypatch.setattr(sys, "argv", ["serve_vllm.py", *map(str, flags)])
    serve_vllm.main()
    said = capsys.readouterr().out
    assert (
        "equals ours on 4 of 4 prompts" in said
        and re.search(r"spec_decode_num_drafts +5\n", said)
        and "other" not in said
    )
    steps, accepted = re.search(
        r"ours, the same chain: steps, accepted +(\d+), (\[.*\])", said
    ).groups()
    assert 0 < int(steps) < 4 * 11 and len(json.loads(accepted)) == 3


@pytest.mark.parametrize("taken", ["base", "heads"])
def test_what_is_to_be_served_is_not_overwritten(taken, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "serve_vllm.py",
            "--base",
            str(tmp_path / "base"),
            "--heads",
            str(tmp_path / "heads"),
            "--out",
            str(tmp_path / taken),
        ],
    )
    with pytest.raises(ValueError, match=f"--out {tmp_path / taken} would overwrite"):
        serve_vllm.main()
