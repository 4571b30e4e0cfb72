"""Peak memory of a training step with K = 4 heads against one with K = 1: python bench/memory.py

V = 49,152 (SmolLM2's vocabulary), one row of T = 1,024 tokens, D = 576, two blocks, shared LM head.
Each step runs in a process of its own: that of Medusa-2, base and heads, with the losses in chunks,
as train.py has them, and with all logits at once; and that of Medusa-1, on a frozen base.
"""

import resource
import subprocess
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.figures import machine
from model import write_json

RESULTS = Path(__file__).with_suffix(".json")


def step(mode: str, K: int, chunk_logits: int) -> None:
    """One step; prints the peak of the process in megabytes."""
    import torch

    import train
    from medusa import MedusaConfig, MedusaHeads
    from model import GPT, ModelConfig

    train.CHUNK_LOGITS = chunk_logits or train.CHUNK_LOGITS
    model = GPT(ModelConfig(49152, 576, 1536, 2, 9, 3, 1024))
    heads = MedusaHeads(MedusaConfig(576, 49152, K, 1))
    data = torch.randint(49152, (1, 1025)), torch.ones(1, 1025, dtype=torch.bool)
    batch = train.make_batch(train.TrainConfig(batch=1), data, heads, "cpu", 0)
    if mode == "medusa1":
        model.requires_grad_(False)
        loss, _ = train.medusa1_loss(heads, model, model(batch.tokens), batch)
    else:
        loss, _ = train.medusa2_loss(model, heads, batch, lambda_0=0.2)
    loss.backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def compare(mode: str, chunk_logits: int) -> dict:
    peaks = {}
    for K in (1, 4):
        command = [sys.executable, __file__, mode, str(K), str(chunk_logits)]
        peaks[f"MB, K = {K}"] = float(subprocess.check_output(command))
    return peaks | {"ratio": peaks["MB, K = 4"] / peaks["MB, K = 1"]}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        content: dict = {"machine": machine(), "date": date.today().isoformat()}
        content |= {"chunks": compare("medusa2", 0), "all at once": compare("medusa2", 1 << 40)}
        write_json(RESULTS, content | {"medusa1, chunks": compare("medusa1", 0)})
        print(RESULTS.read_text())
