"""Runs are killed and resumed until enough have died:

    python tests/killed.py DIRECTORY WHAT KILLS SEED

Each attempt is a forked child, so that a death costs no start of an interpreter. DIRECTORY/whole is
a run that nobody kills; DIRECTORY/run-0, run-1, ... are those that reached their end in spite of
all. Prints {way to die: deaths} as JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch._dynamo  # noqa: F401  an optimiser asks for it: once, not in every child

import train
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
    pid = os.fork()
    if pid == 0:
        errors = sys.stderr
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            if way in WAYS[1:]:
                die_at(way, n)
            work()
        except BaseException:
            traceback.print_exc(file=errors)
            os._exit(1)
        os._exit(0)
    if way == WAYS[0]:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), "a child has failed"
    return status == 0


def run(what: str, directory: Path, out: Path) -> None:
    """Start the run, or go on with it."""
    texts = sorted(directory.glob("*.txt"), key=lambda path: path.stat().st_size)
    text, rows = list(map(str, texts)), directory / "rows"
    go, config = run_of(what, directory / "base", text, rows, out)
    resume = {"resume": True} if (out / "checkpoint.pt").exists() else {}
    go(replace(config, **resume))


def main(folder: str, what: str, kills: str, seed: str) -> None:
    directory, chance, deaths = Path(folder), random.Random(seed), Counter()
    torch.set_num_threads(1)
    train.SAVE_EVERY = 1 if what == "states" else 2

    def prepare():
        text, base = write_text(directory), write_base(directory)
        train.distill(distilling(base, text, out=str(directory / "rows"), new_tokens=10))

    assert survives(prepare)
    start = time.monotonic()
    assert survives(lambda: run(what, directory, directory / "whole"))
    seconds, ended = time.monotonic() - start, 0
    while deaths.total() < int(kills):
        way, n = WAYS[deaths.total() % len(WAYS)], chance.randint(1, 12)
        out, moment = directory / f"run-{ended}", chance.uniform(0, seconds)
        if survives(lambda: run(what, directory, out), way, n, moment):
            ended += 1
        else:
            deaths[way] += 1
    assert survives(lambda: run(what, directory, directory / f"run-{ended}"))
    print(json.dumps(deaths))


if __name__ == "__main__":
    main(*sys.argv[1:])
