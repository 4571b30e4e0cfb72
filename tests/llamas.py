"""Tiny checkpoints of the Llama family, as transformers writes them."""

import json
from pathlib import Path

import torch
from hypothesis import strategies as st

from medusa import generate
from model import write_safetensors
from strategies import ROPES

VOCABULARY, CONTEXT = 11, 24


def fields(
    nkv=1, group=2, half=2, width=None, rope=ROPES[0], window=None, eos=None, **more
) -> dict:
    """What transformers' config classes are made with; more: layers, mlp, theta, eps, tied."""
    more = {"layers": 2, "mlp": 7, "theta": 50.0, "eps": 1e-5, "tied": False} | more
    made_with = {
        "num_key_value_heads": nkv,
        "num_attention_heads": nkv * group,
        "head_dim": 2 * half,
        "hidden_size": width or nkv * group * 2 * half,
        "num_hidden_layers": more["layers"],
        "intermediate_size": more["mlp"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": rope | {"rope_theta": more["theta"]},
        "rms_norm_eps": more["eps"],
        "tie_word_embeddings": more["tied"],
        "bos_token_id": 1,
        "eos_token_id": eos,
    }
    return made_with if window is None else made_with | {"sliding_window": window}


@st.composite
def checkpoints(draw) -> tuple[str, dict]:
    """model_type and fields."""
    kind = draw(st.sampled_from(("llama", "mistral", "qwen2", "qwen3")))
    nkv, group, token = draw(st.integers(1, 3)), draw(st.integers(1, 3)), st.integers(0, 10)
    # transformers wants a width that is a multiple of the heads.
    width = draw(st.none() | st.integers(1, 9).map(lambda size: size * nkv * group))
    made_with = fields(
        nkv=nkv,
        group=group,
        half=draw(st.integers(1, 4)),
        layers=draw(st.integers(1, 3)),
        width=width,
        mlp=draw(st.integers(1, 12)),
        rope=draw(st.sampled_from(ROPES)),
        theta=draw(st.sampled_from((3.0, 500.0, 10000.0))),
        eps=draw(st.sampled_from((1e-6, 0.1))),
        tied=draw(st.booleans()),
        eos=draw(st.none() | token | st.lists(token, min_size=1, max_size=3, unique=True)),
    )
    if kind == "mistral":
        made_with["sliding_window"] = draw(st.none() | st.integers(2, 2 * CONTEXT))
    return kind, made_with


def fill(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights from a formula, the same on every machine, and so large that every part shows."""
    filled = {}
    for number, name in enumerate(sorted(state)):
        squares = torch.arange(state[name].numel(), dtype=torch.float64).square()
        wave = torch.sin((number + 1) * 12.9898 + squares * 0.731).view(state[name].shape)
        scale = 1.2 if "embed" in name else 0.6
        filled[name] = 1 + 0.3 * wave if "norm" in name else scale * wave
    return filled


def write_checkpoint(directory: Path, kind: str, made_with: dict, dtype=torch.float64, shard="5GB"):
    """A directory written by transformers' own classes, which not everyone has."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **made_with)
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    if made_with["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    model.load_state_dict(fill(state), strict=False)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)


def plain_text(model, prompt: list[int], n: int) -> list[int]:
    return [token for step in generate(model, prompt, n) for token in step.emitted]


def write_recorded(directory: Path, case: dict) -> None:
    """The directory of a recorded case, without transformers: its config, and the same weights."""
    (directory / "config.json").write_text(json.dumps(case["config"]))
    shapes = {name: torch.empty(shape) for name, shape in case["shapes"].items()}
    write_safetensors(directory / "model.safetensors", fill(shapes))
