"""What each choice in training buys: the same base, equal steps, three seeds.

    python bench/ablations.py                all variants that are not in bench/ablations.json yet
    python bench/ablations.py medusa1        only those whose name begins so

Results go to bench/ablations.json, and from there into both READMEs. tokens/step is that of greedy
decoding with a tree of 8 nodes, replayed over text that the base itself wrote after held-out
prompts: the tree is calibrated on one half of the prompts and replayed on the other, both ways.
"""

import statistics
import sys
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


import train
from bench.figures import machine, replace_between, wrapped
from bench.scoreboard import tokens_per_step
from data.command import OneLineParser
from data.corpus import documents, packed
from data.tokenizer import Tokenizer
from medusa import MedusaHeads, medusa_loss
from model import GPT, read_json, write_json

SEEDS, STEPS, NODES = (0, 1, 2), 400, 8

NAIVE = {"heads_steps": 0, "lr_ratio": 1.0, "warmup": 1}
SLOW_BASE = "medusa2, distilled text, KL, heads at Medusa-1's rate, the base at a {} of it"
SLOW = {"lr": 7e-3, "lr_ratio": 28.0}
LONG = {"steps": 2400}  # of one seed
VARIANTS = {  # settings of train.py; decay and hard_labels are not, and patched
    "medusa1, distilled text": {},
    "medusa1, corpus text": {"data": "corpus"},
    "medusa1, decay 1.0": {"decay": 1.0},
    "medusa1, head 1's loss nearly alone (decay 0.1)": {"decay": 0.1},
    "medusa1, one residual layer": {"num_hidden_layers": 1},
    "medusa1, private LM heads, one residual layer": {
        "num_hidden_layers": 1, "original_lm_head": False
    },
    "medusa2, corpus text, naive: one rate, no warm-up, no first stage": NAIVE | {"data": "corpus"},
    "medusa2, corpus text": {"data": "corpus"},
    "medusa2, distilled text, hard labels": {"hard_labels": True},
    "medusa2, distilled text, KL": {},
    SLOW_BASE.format("28th"): SLOW,
    "medusa1, distilled text, 2,400 steps": LONG,
    SLOW_BASE.format("28th") + ", 2,400 steps": LONG | SLOW,
    SLOW_BASE.format("100th") + ", 2,400 steps": LONG | SLOW | {"lr_ratio": 100.0},
}  # fmt: skip
# The rows of the README: their names there, and what each teaches.
LESSONS = {
    "medusa1, distilled text": ("medusa1, distilled text", "the default"),
    "medusa1, corpus text": ("medusa1, corpus text", "learn what the base will say"),
    "medusa2, corpus text, naive: one rate, no warm-up, no first stage": (
        "medusa2, corpus text, naive: one rate, one stage", "this ruins the base"
    ),
    SLOW_BASE.format("28th"): (
        "medusa2, KL, the base at a 28th of the rate", "the base hardly changes; no gain so soon"
    ),
}  # fmt: skip


def measure(name: str, seed: int) -> dict:
    """Train, and in place of the calibration look at what heads and base reached."""
    found = {}

    def look(model: GPT, heads: MedusaHeads, held_out: dict) -> dict:
        text = packed(documents(True), Tokenizer.load(ROOT / "data/base"))
        found["tokens/step"] = tokens_per_step(model, heads, held_out["0.0"], NODES)
        found["perplexity"] = train.perplexity(model, text)
        found["head parameters"] = sum(p.numel() for p in heads.parameters())
        return {}

    settings = {"steps": STEPS, "seed": seed, "device": "cpu"} | VARIANTS[name]
    patches = {"calibrate": look, "TEMPERATURES": (0.0,)}
    if "decay" in settings:
        patches["medusa_loss"] = partial(medusa_loss, decay=settings.pop("decay"))
    if settings.pop("hard_labels", False):
        hard, patches["base_loss"] = train.base_loss, lambda *args: hard(*args[:3])  # no teacher
    mode = name[: len("medusa1")]
    if mode == "medusa2":
        # Both stages together take as many steps as Medusa-1.
        alone = settings.setdefault("heads_steps", min(settings["steps"] // 2, 800))
        settings["steps"] -= alone
    settings |= {"base": str(ROOT / "data/base"), "distilled": str(ROOT / "data/distilled")}
    config_class, train_mode = train.MODES[mode]
    with tempfile.TemporaryDirectory() as out, patch.multiple(train, **patches):
        train_mode(config_class(**settings, out=out))
    return found


def table(results: dict) -> str:
    """Mean over the seeds, and the range of tokens/step."""
    columns = "training", "tokens/step (range)", "perplexity of the base", "parameters of the heads"
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|"]
    for name, runs in results.items():
        steps = [run["tokens/step"] for run in runs]
        shown = f"{statistics.mean(steps):.2f} ({min(steps):.2f} to {max(steps):.2f})"
        perplexity = statistics.mean(run["perplexity"] for run in runs)
        parameters = f"{runs[0]['head parameters'] / 1e6:.2f} M"
        lines.append(f"| {name} | {shown} | {perplexity:.2f} | {parameters} |")
    return "\n".join(lines)


def lessons_table(results: dict) -> str:
    lines = ["| training | tokens/step | perplexity of the base | lesson |", "|---|---|---|---|"]
    for variant, (name, lesson) in LESSONS.items():
        runs = results[variant]
        tokens = statistics.mean(run["tokens/step"] for run in runs)
        perplexity = statistics.mean(run["perplexity"] for run in runs)
        lines.append(f"| {name} | {tokens:.2f} | {perplexity:.2f} | {lesson} |")
    return "\n".join(lines)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("prefix", nargs="?", default="", help="measure the names that begin so")
    prefix = parser.parse_args().prefix
    names = [name for name in VARIANTS if name.startswith(prefix)]
    if len(names) == 0:
        parser.error(f"no training begins with {prefix!r}: there are {', '.join(VARIANTS)}")
    path = ROOT / "bench/ablations.json"
    content = read_json(path) if path.exists() else {"results": {}}
    if set(names) <= content["results"].keys():
        print(f"nothing to measure: {path} has them; delete it to measure again")
    for name in names:
        if name not in content["results"]:
            seeds = SEEDS[:1] if "steps" in VARIANTS[name] else SEEDS
            content["results"][name] = [measure(name, seed) for seed in seeds]
            content |= {"command": "python bench/ablations.py", "machine": machine()}
            content |= {"date": date.today().isoformat(), "steps": STEPS, "seeds": SEEDS}
            write_json(path, content)
    about = f"{STEPS} steps each and seeds {', '.join(map(str, SEEDS))}, where no other number is "
    about += "named (there seed 0). Measured by `bench/ablations.py` on "
    about = wrapped(f"{about}{content['machine']}; {content['date']}.")
    text = f"{table(content['results'])}\n\n{about}"
    replace_between("bench/README.md", "ablations", text)
    if LESSONS.keys() <= content["results"].keys():
        replace_between("README.md", "lessons", lessons_table(content["results"]))


if __name__ == "__main__":
    main()
