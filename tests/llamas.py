"""Tiny checkpoints of the Llama family, as transformers writes them. Its own classes are imported where they are used: not everyone has them."""

import json
from pathlib import Path

import torch
from hypothesis import strategies as st

from model import write_safetensors

VOCABULARY, CONTEXT = 11, 24
ROPES = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 9.0,
        "original_max_position_embeddings": 8,
    },
)


def fields(
    nkv=1,
    group=2,
    half=2,
    width=None,
    layers=2,
    mlp=7,
    rope=ROPES[0],
    theta=50.0,
    eps=1e-5,
    tied=False,
    eos=None,
    window=None,
) -> dict:
    """What transformers' config classes are made with. width: of the model; by default the heads' sizes add up to it."""
    sizes = {
        "num_key_value_heads": nkv,
        "num_attention_heads": nkv * group,
        "head_dim": 2 * half,
        "hidden_size": width or nkv * group * 2 * half,
    }
    sizes |= {
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
    }
    more = {
        "rope_parameters": rope | {"rope_theta": theta},
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": eos,
    }
    return sizes | more | ({} if window is None else {"sliding_window": window})


@st.composite
def checkpoints(draw) -> tuple[str, dict]:
    """model_type and fields."""
    kind = draw(st.sampled_from(("llama", "mistral", "qwen2")))
    sizes = {
        "nkv": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 3)),
        "half": draw(st.integers(1, 4)),
        "layers": draw(st.integers(1, 3)),
    }
    width = draw(
        st.none() | st.integers(1, 9).map(lambda size: size * sizes["nkv"] * sizes["group"])
    )  # transformers wants a multiple of the heads
    sizes |= {"width": width, "mlp": draw(st.integers(1, 12)), "rope": draw(st.sampled_from(ROPES))}
    more = {
        "theta": draw(st.sampled_from((3.0, 500.0, 10000.0))),
        "eps": draw(st.sampled_from((1e-6, 0.1))),
        "tied": draw(st.booleans()),
    }
    eos = draw(
        st.none()
        | st.integers(0, VOCABULARY - 1)
        | st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3, unique=True)
    )
    window = draw(st.none() | st.integers(2, 2 * CONTEXT)) if kind == "mistral" else None
    return kind, fields(**sizes, **more, eos=eos) | (
        {"sliding_window": window} if kind == "mistral" else {}
    )


def fill(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights from a formula, the same on every machine, and so large that every part of the model shows."""
    filled = {}
    for number, name in enumerate(sorted(state)):
        wave = torch.sin(
            (number + 1) * 12.9898
            + torch.arange(state[name].numel(), dtype=torch.float64).square() * 0.731
        ).view(state[name].shape)
        filled[name] = (
            1 + 0.3 * wave if "norm" in name else (1.2 if "embed" in name else 0.6) * wave
        )
    return filled


def write_checkpoint(
    directory: Path, kind: str, made_with: dict, dtype=torch.float64, shard_size="5GB"
) -> None:
    """A directory written by transformers' own classes."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **made_with)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(
        fill(
            {
                name: t
                for name, t in model.state_dict().items()
                if not (name == "lm_head.weight" and made_with["tie_word_embeddings"])
            }
        ),
        strict=False,
    )
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)


def write_recorded(directory: Path, case: dict) -> None:
    """The directory of a recorded case, without transformers: its config.json as it was written, and weights of the same formula."""
    (directory / "config.json").write_text(json.dumps(case["config"]))
    write_safetensors(
        directory / "model.safetensors",
        fill({name: torch.empty(shape) for name, shape in case["shapes"].items()}),
    )
