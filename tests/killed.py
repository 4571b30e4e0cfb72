"""Runs are killed and resumed until enough have died:

    python tests/killed.py DIRECTORY WHAT KILLS SEED

Each attempt is a forked child, so that a death costs no start of an interpreter. DIRECTORY/whole is
a run that nobody kills; DIRECTORY/run-0, run-1, ... are those that reached their end in spite of
all. Prints {way to die: deaths} as JSON.
"""

import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch._dynamo  # noqa: F401  an optimiser asks for it: once, not in every child

import train
from bench.child import in_a_child
from strategies import distilling, run_of, write_base, write_text

WAYS = ("at any moment", "in the middle of a file", "before a rename", "after a rename")


def die_at(way: str, n: int) -> None:
    """Arrange the death of this process at the n-th file that it writes."""
    owner, name = (Path, "write_bytes") if way == "in the middle of a file" else (os, "replace")
    original, left = getattr(owner, name), [n]

    def counted(*arguments):
        left[0] -= 1
        if left[0] == 0 and name == "write_bytes":
            path, content = arguments
            arguments = path, content[: len(content) // 2]
        if left[0] > 0 or way != "before a rename":
            original(*arguments)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, counted)


def survives(work, way: str = "", n: int = 0, seconds: float = 0.0) -> bool:
    """Does a child live to the end of work()?"""

    def child() -> int:
        if way in WAYS[1:]:
            die_at(way, n)
        work()
        return 0

    code = in_a_child(child, seconds if way == WAYS[0] else math.inf, "/dev/stderr")
    assert code in (0, -signal.SIGKILL, None), "a child has failed"
    return code == 0


def main(folder: str, what: str, kills: str, seed: str) -> None:
    directory, chance, deaths = Path(folder), random.Random(seed), Counter()
    torch.set_num_threads(1)
    train.SAVE_EVERY = 1 if what == "states" else 2

    text, rows = write_text(directory), directory / "rows"

    def prepare() -> None:
        train.distill(distilling(write_base(directory), text, out=str(rows), new_tokens=10))

    def run(name: str) -> None:
        """Start the run, or go on with it."""
        go, config = run_of(what, directory / "base", text, rows, directory / name)
        resume = {"resume": True} if (directory / name / "checkpoint.pt").exists() else {}
        go(replace(config, **resume))

    assert survives(prepare)
    start = time.monotonic()
    assert survives(lambda: run("whole"))
    seconds, ended = time.monotonic() - start, 0
    while deaths.total() < int(kills):
        way, n = WAYS[deaths.total() % len(WAYS)], chance.randint(1, 12)
        if survives(lambda: run(f"run-{ended}"), way, n, chance.uniform(0, seconds)):
            ended += 1
        else:
            deaths[way] += 1
    assert survives(lambda: run(f"run-{ended}"))
    print(json.dumps(deaths))


if __name__ == "__main__":
    main(*sys.argv[1:])
