"""Writes tests/peers.json: logits and text of a few tiny checkpoints, by transformers' classes.

The default tests compare with these, and so do without transformers.

pip install -r tests/requirements-peers.txt
python tests/record_peers.py
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch
import transformers
from safetensors.torch import load_file

from llamas import ROPES, VOCABULARY, fields, write_checkpoint

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


def record(kind: str, made_with: dict) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, kind, made_with)
        options = {"dtype": torch.float64, "attn_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        tokens = torch.tensor(TOKENS)
        with torch.no_grad():
            logits = model(tokens).logits
            more = {"do_sample": False, "pad_token_id": VOCABULARY - 1}
            text = model.generate(tokens[:1, :2], max_new_tokens=7, **more)[0, 2:]
        weights = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
    return {
        "config": config,
        "shapes": {name: list(weight.shape) for name, weight in weights.items()},
        "logits": [[[round(x, 7) for x in row] for row in rows] for rows in logits.tolist()],
        "text": text.tolist(),
    }


if __name__ == "__main__":
    about = f'"transformers": "{transformers.__version__}", "tokens": {json.dumps(TOKENS)}'
    cases = ",\n".join(json.dumps(record(*case)) for case in CASES)
    (HERE / "peers.json").write_text(f'{{{about}, "cases": [\n{cases}\n]}}\n')
