"""Tiny checkpoints of the Llama family, as transformers writes them.

The default tests do without transformers: they compare with tests/peers.json, the logits and text
of a few of these by transformers' classes. It is written by

    pip install -r tests/requirements-peers.txt
    python tests/llamas.py
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from strategies import ROPES

VOCABULARY, CONTEXT = 11, 24


def fields(
    nkv=1, group=2, half=2, width=None, rope=ROPES[0], window=None, eos=None, **more
) -> dict:
    """What transformers' config classes are made with; more: layers, mlp, theta, eps, tied."""
    more = {"layers": 2, "mlp": 7, "theta": 50.0, "eps": 1e-5, "tied": False} | more
    made_with = {
        "num_key_value_heads": nkv, "num_attention_heads": nkv * group, "head_dim": 2 * half,
        "hidden_size": width or nkv * group * 2 * half, "num_hidden_layers": more["layers"],
        "intermediate_size": more["mlp"], "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT, "rope_parameters": rope | {"rope_theta": more["theta"]},
        "rms_norm_eps": more["eps"], "tie_word_embeddings": more["tied"],
        "bos_token_id": 1, "eos_token_id": eos,
    }  # fmt: skip
    return made_with if window is None else made_with | {"sliding_window": window}


@st.composite
def checkpoints(draw) -> tuple[str, dict]:
    """model_type and fields."""
    kind = draw(st.sampled_from(("llama", "mistral", "qwen2", "qwen3")))
    nkv, group, token = draw(st.integers(1, 3)), draw(st.integers(1, 3)), st.integers(0, 10)
    eos = st.none() | token | st.lists(token, min_size=1, max_size=3, unique=True)
    drawn = {
        "half": st.integers(1, 4), "layers": st.integers(1, 3), "mlp": st.integers(1, 12),
        # transformers wants a width that is a multiple of the heads.
        "width": st.none() | st.integers(1, 9).map(lambda size: size * nkv * group),
        "rope": st.sampled_from(ROPES), "theta": st.sampled_from((3.0, 500.0, 10000.0)),
        "eps": st.sampled_from((1e-6, 0.1)), "tied": st.booleans(), "eos": eos,
    }  # fmt: skip
    made_with = fields(nkv=nkv, group=group, **draw(st.fixed_dictionaries(drawn)))
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


# ---- the record ----
CASES = [
    ("llama", fields(tied=True, eos=2)),
    ("llama", fields(nkv=2, width=12, rope=ROPES[2], eos=[0, 3])),
    ("llama", fields(rope=ROPES[1], half=3)),
    ("mistral", fields(group=3, width=9, window=9)),
    ("qwen2", fields(nkv=2, group=1, tied=True, rope=ROPES[3])),
    ("qwen2", fields(half=4, eps=0.1, eos=5)),
    ("qwen3", fields(nkv=2, width=12, tied=True, eos=[9, 4])),
    ("qwen3", fields(half=3, eps=0.1, rope=ROPES[1])),
]
TOKENS = [[1, 7, 3, 3, 10, 0, 4], [9, 2, 6, 8, 5, 1, 1]]


def opened(directory, dtype):
    """The directory as transformers opens it."""
    import transformers

    options = {"dtype": dtype, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    return model.eval().requires_grad_(False)


def their_text(model, prompt: list[int], n: int) -> list[int]:
    tokens = torch.tensor([prompt])
    # Without a mask, a prompt that holds the padding's id is taken for padding.
    more = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "pad_token_id": 0}
    return model.generate(tokens, max_new_tokens=n, **more)[0, len(prompt) :].tolist()


def record(kind: str, made_with: dict) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, kind, made_with)
        model = opened(folder, torch.float64)
        logits, text = model(torch.tensor(TOKENS)).logits, their_text(model, TOKENS[0][:2], 7)
        weights = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
    rounded = [[[round(x, 7) for x in row] for row in rows] for rows in logits.tolist()]
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    return {"config": config, "shapes": shapes, "logits": rounded, "text": text}


if __name__ == "__main__":
    import transformers

    about = f'"transformers": "{transformers.__version__}", "tokens": {json.dumps(TOKENS)}'
    cases = ",\n".join(json.dumps(record(*case)) for case in CASES)
    (HERE / "peers.json").write_text(f'{{{about}, "cases": [\n{cases}\n]}}\n')
