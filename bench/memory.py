"""Peak memory of a training step with K = 4 heads against one with K = 1: python bench/memory.py

V = 49,152 (SmolLM2's vocabulary), one row of T = 1,024 tokens, D = 576, two blocks, shared LM head. Each step runs in a process of its own,
once with the losses in chunks, as train.py has them, and once with all logits at once.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def step(K: int, chunk_logits: int) -> None:
    """One step of Medusa-2, base and heads; prints the peak of the process in megabytes."""
    import torch

    import train
    from medusa import MedusaConfig, MedusaHeads
    from model import GPT, ModelConfig

    train.CHUNK_LOGITS = chunk_logits
    model = GPT(ModelConfig(49152, 576, 1536, 2, 9, 3, 1024))
    heads = MedusaHeads(MedusaConfig(576, 49152, K, 1))
    tokens = torch.randint(49152, (1, 1024))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    train.backpropagate(model, heads, tokens, mask, mask.sum().expand(K + 1), (1.0, 0.2))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def measure_memory() -> dict:
    peaks = {}
    for name, chunk_logits in (("chunks", 1 << 24), ("all at once", 1 << 40)):
        for K in (1, 4):
            command = [sys.executable, __file__, str(K), str(chunk_logits)]
            peaks[name, K] = float(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout
            )
    return {
        name: {
            "MB, K = 1": peaks[name, 1],
            "MB, K = 4": peaks[name, 4],
            "ratio": peaks[name, 4] / peaks[name, 1],
        }
        for name in ("chunks", "all at once")
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step(int(sys.argv[1]), int(sys.argv[2]))
    else:
        print(json.dumps(measure_memory(), indent=1))
