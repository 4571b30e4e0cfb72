"""User turns for the self-distillation of a chat model, of a package and of a grammar.

    python -m data.turns --out out/turns.jsonl
    python train.py --mode distill --chat --text out/turns.jsonl --base out/smollm2 --out out/rows

A file of turns has one JSON string a line. turns.json is the grammar: sentences of eleven tasks.
"""

import json
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data.command import check_out, option, optional, parsed, run
from data.smollm2 import fetch
from model import write_atomically

PACKAGE = "chatterbot-corpus==1.3.3"
GRAMMAR = Path(__file__).with_name("turns.json")


@dataclass(frozen=True)
class Config:
    out: str = option("out/turns.jsonl", "file to write")
    written: int = option(3000, "turns written by the grammar")
    seed: int = option(0, "seed of the grammar and of the order")


def written_turns(n: int, seed: int) -> list[str]:
    """n different turns, of all tasks equally many; ValueError if a task has not so many."""
    grammar = json.loads(GRAMMAR.read_text(encoding="utf-8"))
    tasks, words = list(grammar["tasks"].values()), grammar["words"]
    for name, (low, high) in grammar["numbers"].items():
        words[name] = [str(number) for number in range(low, high + 1)]
    chance, turns = random.Random(seed), {}

    def expanded(text: str) -> str:
        """Each {name} replaced by one of its alternatives, expanded in turn."""
        return re.sub(r"\{(\w+)\}", lambda found: expanded(chance.choice(words[found[1]])), text)

    for _ in range(20 * n + 1):
        if len(turns) == n:
            return list(turns)
        text = expanded(chance.choice(tasks[len(turns) % len(tasks)]))
        # Sentences begin with a capital.
        turns[re.sub(r"(^|[.?:]\s+|[\"\n])[a-z]", lambda found: found[0].upper(), text)] = None
    raise ValueError(f"--written {n}: the grammar has too few different turns")


def corpus_turns() -> list[str]:
    """The first turn of each English conversation of chatterbot-corpus."""
    yaml, turns = optional("yaml", PACKAGE), []
    with tempfile.TemporaryDirectory() as folder:
        for path in fetch(PACKAGE, "*/english/*.yml", folder):
            conversations = yaml.safe_load(path.read_bytes())["conversations"]
            turns += [str(conversation[0]).strip() for conversation in conversations]
    return [turn for turn in turns if turn]


def main() -> None:
    config = parsed(Config, prog="data.turns", description=__doc__)
    check_out(str(Path(config.out).parent))
    turns = list(dict.fromkeys(corpus_turns() + written_turns(config.written, config.seed)))
    random.Random(config.seed).shuffle(turns)
    text = "".join(json.dumps(turn) + "\n" for turn in turns)
    write_atomically(Path(config.out), lambda to: to.write_text(text, encoding="utf-8"))
    print(f"{config.out}: {len(turns)} turns")


if __name__ == "__main__":
    run(main)
