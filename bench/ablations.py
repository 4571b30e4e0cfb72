"""What each choice in training buys: the same base, equal steps, three seeds. Results go to bench/ablations.json, and from there into the README.

    python bench/ablations.py                all variants that are not in bench/ablations.json yet
    python bench/ablations.py medusa1        only those whose name begins so

tokens/step is that of greedy decoding with a tree of 8 nodes, replayed over text that the base itself wrote behind held-out prompts:
the tree is calibrated on one half of the prompts and replayed on the other, both ways.
"""

import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from torch import Tensor

import data.calibration
import train
from bench.figures import machine, replace_between
from data.calibration import head_ranks
from data.command import OneLineParser
from data.corpus import documents, packed
from data.perplexity import perplexity
from data.tokenizer import Tokenizer
from medusa import MedusaHeads
from model import GPT, read_json, write_json
from train import Medusa1Config, Medusa2Config
from tree import calibrated_tree, expected_tokens, prefix_counts, replay

SEEDS, STEPS, NODES = (0, 1, 2), 400, 8


VARIANTS = {
    "medusa1, distilled text": {},
    "medusa1, corpus text": {"data": "corpus"},
    "medusa1, decay 1.0": {"decay": 1.0},
    "medusa1, head 1's loss nearly alone (decay 0.1)": {"decay": 0.1},
    "medusa1, one residual layer": {"num_hidden_layers": 1},
    "medusa1, private LM heads, one residual layer": {
        "num_hidden_layers": 1,
        "original_lm_head": False,
    },
    "medusa2, corpus text, naive: one rate, no warm-up, no first stage": {
        "heads_steps": 0,
        "lr_ratio": 1.0,
        "warmup": 1,
        "data": "corpus",
    },
    "medusa2, corpus text": {"data": "corpus"},
    "medusa2, distilled text, hard labels": {"base_loss": "ce"},
    "medusa2, distilled text, KL": {},
}
SLOW_BASE = "medusa2, distilled text, KL, heads at Medusa-1's rate, the base at a {} of it"
VARIANTS[SLOW_BASE.format("28th")] = {"lr": 7e-3, "lr_ratio": 28.0}
LONG = {name: VARIANTS[name] for name in ("medusa1, distilled text", SLOW_BASE.format("28th"))} | {
    SLOW_BASE.format("100th"): {"lr": 7e-3, "lr_ratio": 100.0}
}
VARIANTS |= {
    f"{name}, 2,400 steps": more | {"steps": 2400} for name, more in LONG.items()
}  # of one seed


def tokens_per_step(model: GPT, heads: MedusaHeads, rows: tuple[Tensor, Tensor]) -> float:
    """Greedy, replayed: the tree of each half of the rows on the other half."""
    texts = [ranks.tolist() for ranks in head_ranks(model, heads, *rows)]
    tokens, steps = 0.0, 0
    for mine, others in ((texts[::2], texts[1::2]), (texts[1::2], texts[::2])):
        tree = calibrated_tree((ranks for text in others for ranks in text), NODES)
        tree = calibrated_tree(replay(others, tree), NODES)
        counts = prefix_counts(replay(mine, tree))
        tokens, steps = tokens + expected_tokens(tree, counts) * counts[()], steps + counts[()]
    return tokens / steps


def measure(name: str, seed: int) -> dict:
    """Train, and in place of the calibration look at what the heads reached on greedy text, which Medusa-2's base has written anew."""
    found = {}

    def look(model: GPT, heads: MedusaHeads, rows_of: dict) -> dict:
        found["tokens/step"] = tokens_per_step(model, heads, rows_of["0.0"])
        found["perplexity"] = perplexity(
            model, packed(documents(True), Tokenizer.load(ROOT / "data/base"))
        )
        found["head parameters"] = sum(p.numel() for p in heads.parameters())
        return {}

    train.calibrate, data.calibration.CALIBRATION_TEMPERATURES = look, (0.0,)
    with tempfile.TemporaryDirectory() as directory:
        config = {
            "base": str(ROOT / "data/base"),
            "out": directory,
            "seed": seed,
            "device": "cpu",
            "distilled": str(ROOT / "data/distilled"),
            **VARIANTS[name],
        }
        steps = config.pop("steps", STEPS)
        if name.startswith("medusa1"):
            train.train_medusa(Medusa1Config(**config | {"steps": steps}))
        else:
            alone = config.get("heads_steps", min(steps // 2, 800))
            train.train_medusa(
                Medusa2Config(**config | {"heads_steps": alone, "steps": steps - alone})
            )
    return found


def table(results: dict) -> str:
    """Mean over the seeds, and the range of tokens/step."""
    lines = [
        "| training | tokens/step (range) | perplexity of the base | parameters of the heads |",
        "|---|---|---|---|",
    ]
    for name, runs in results.items():
        steps = [run["tokens/step"] for run in runs]
        lines.append(
            f"| {name} | {statistics.mean(steps):.2f} ({min(steps):.2f} to {max(steps):.2f}) "
            f"| {statistics.mean(run['perplexity'] for run in runs):.2f} | {runs[0]['head parameters'] / 1e6:.2f} M |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "prefix",
        nargs="?",
        default="",
        help="measure the trainings whose name begins with this, of those that are missing; default: all",
    )
    prefix = parser.parse_args().prefix
    if not any(name.startswith(prefix) for name in VARIANTS):
        parser.error(f"no training begins with {prefix!r}: there are {', '.join(VARIANTS)}")
    path = ROOT / "bench/ablations.json"
    content = read_json(path) if path.exists() else {"results": {}}
    for name in VARIANTS:
        if not name.startswith(prefix) or name in content["results"]:
            continue
        runs = [measure(name, seed) for seed in (SEEDS[:1] if "steps" in VARIANTS[name] else SEEDS)]
        content["results"][name] = runs
        content |= {
            "command": "python bench/ablations.py",
            "machine": machine(),
            "date": date.today().isoformat(),
            "steps": STEPS,
            "seeds": SEEDS,
        }
        write_json(path, content)
    about = f"{STEPS} steps each and seeds {', '.join(map(str, SEEDS))}, where no other number is named (there seed 0). "
    about += f"Measured by `bench/ablations.py` on {content['machine']}; {content['date']}."
    replace_between(
        "<!-- ablations -->",
        "<!-- end of ablations -->",
        table(content["results"]) + "\n\n" + about,
    )


if __name__ == "__main__":
    main()
