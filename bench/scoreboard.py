"""Set 8, the open one: how many tokens does a step emit with these heads, on the shipped base?

    python bench/scoreboard.py out/heads

On rows that the base wrote and no training has seen. The calibrated tree of 16 nodes is chosen on
every second row, and steps are replayed on the others, and the other way round: nothing is timed,
and no machine is better than another. The rules, and who has what: bench/scoreboard.md.
"""

import sys
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from data.command import OneLineParser, run
from data.tokenizer import load_base
from medusa import GREEDY, MedusaHeads, Sampling, check_compatible
from model import GPT, check
from train import CALIBRATION_NODES, head_ranks, held_out_rows, rank_paths
from tree import calibrated_tree, expected_tokens, prefix_counts, replay

MOST_BYTES = 1_000_000  # of all files of the heads together
TEMPERATURES = 0.0, 0.7  # the first alone makes the points
# Measured: untrained heads have 1.50, data/heads 2.78, data/sequential-heads 3.56.
POINTS = {1.6: 2, 1.9: 4, 2.2: 6, 2.5: 8, 2.75: 10, 2.95: 12, 3.15: 14, 3.35: 16, 3.5: 18, 3.65: 20}


def tokens_per_step(model: GPT, heads: MedusaHeads, rows, nodes: int, sampling=GREEDY) -> float:
    """Replayed: the tree that is best for each half of the rows, on the other half."""
    ranks = head_ranks(model, heads, *rows, sampling)
    texts = [rank_paths(text, heads) for text in ranks]
    tokens, steps = 0.0, 0
    for mine, others in ((texts[::2], texts[1::2]), (texts[1::2], texts[::2])):
        # Twice: the steps of the first tree start elsewhere than everywhere, and ask for another.
        tree = calibrated_tree(chain.from_iterable(others), nodes)
        tree = calibrated_tree(replay(others, tree), nodes)
        counts = prefix_counts(replay(mine, tree))
        tokens += expected_tokens(tree, counts) * counts[()]
        steps += counts[()]
    return tokens / steps


def points(score: float) -> int:
    return max((worth for least, worth in POINTS.items() if score >= least), default=0)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("heads", type=Path, help="directory, as train.py and vLLM write it")
    rows_help = "directory of held-out rows, as train.py --mode distill writes it"
    parser.add_argument("--rows", type=Path, default=ROOT / "data/distilled", help=rows_help)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in the same order everywhere
    files = (path for path in arguments.heads.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    check(size <= MOST_BYTES, f"{arguments.heads}: {size:,} bytes, more than {MOST_BYTES:,}")
    _, model = load_base(ROOT / "data/base", torch.float32)
    heads = MedusaHeads.from_pretrained(arguments.heads)
    check_compatible(model, heads)
    held_out = held_out_rows(arguments.rows, model.config.vocab_size, heads.config.num_heads)
    scores = []
    for t in TEMPERATURES:
        rows, sampling = held_out[str(t)], Sampling(t)
        scores.append(tokens_per_step(model, heads, rows, CALIBRATION_NODES, sampling))
    shown = ", ".join(f"{score:.2f} at {t}" for score, t in zip(scores, TEMPERATURES))
    print(f"{arguments.heads}: {points(scores[0])} points; tokens/step {shown}; {size:,} bytes")


if __name__ == "__main__":
    run(main)
