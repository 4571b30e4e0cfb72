"""Runs are killed and resumed until enough have died:  python tests/killed.py DIRECTORY WHAT KILLS SEED

Each attempt is a forked child, so that a death costs no start of an interpreter. DIRECTORY/whole is a run that nobody kills, and
DIRECTORY/run-0, run-1, ... are those that reached their end in spite of all. Prints {way to die: deaths} as JSON.
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
from strategies import distilling, training, write_base, write_text


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(way: str, n: int) -> None:
    """Arrange the death of this process at the n-th file that it writes."""
    write_bytes, rename, left = Path.write_bytes, os.replace, [n]

    def counted(*arguments):
        left[0] -= 1
        if way == "in the middle of a file" and left[0] == 0:
            path, content = arguments
            write_bytes(path, content[: len(content) // 2])
            die()
        if way == "before a rename" and left[0] == 0:
            die()
        (write_bytes if way == "in the middle of a file" else rename)(*arguments)
        if left[0] == 0:
            die()

    if way == "in the middle of a file":
        Path.write_bytes = counted
    else:
        os.replace = counted


WAYS = ("at any moment", "in the middle of a file", "before a rename", "behind a rename")


def survives(work, way: str = "", n: int = 0, seconds: float = 0.0) -> bool:
    """Does a child live to the end of work()?"""
    pid = os.fork()
    if pid == 0:
        says = sys.stderr
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            if way in WAYS[1:]:
                die_at(way, n)
            work()
        except BaseException:
            traceback.print_exc(file=says)
            os._exit(1)
        os._exit(0)
    if way == WAYS[0]:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and status:
        sys.exit("a child has failed")
    return status == 0


def config_of(what: str, directory: Path):
    base, text = (
        str(directory / "base"),
        [
            str(path)
            for path in sorted(directory.glob("*.txt"), key=lambda path: path.stat().st_size)
        ],
    )
    if what == "distill":
        return distilling(base, text, shards=5)
    more = {
        "distilled": str(directory / "shards"),
        "save_every": 1 + (what != "medusa1"),
        "lr": 0.01,
    }
    return training(base, text, "", **more, steps=6) if what == "medusa1" else training(
        base, text, "", train.Medusa2Config, **more, heads_steps=2, lora=what == "lora", accumulate=2
    )  # fmt: skip


def main(directory: str, what: str, kills: str, seed: str) -> None:
    directory, chance, deaths = Path(directory), random.Random(seed), Counter()
    torch.set_num_threads(1)

    def prepare():
        text, base = write_text(directory), write_base(directory)
        train.distill(distilling(base, text, out=str(directory / "shards"), new_tokens=10))

    def run(out: Path):
        config = replace(config_of(what, directory), out=str(out))
        if what == "distill":
            train.distill(config)
        else:
            train.train_medusa(replace(config, resume=(out / "checkpoint.safetensors").exists()))

    assert survives(prepare)
    start = time.monotonic()
    assert survives(lambda: run(directory / "whole"))
    seconds, ended = time.monotonic() - start, 0
    while deaths.total() < int(kills):
        way = WAYS[deaths.total() % len(WAYS)]
        if survives(
            lambda: run(directory / f"run-{ended}"),
            way,
            chance.randint(1, 12),
            chance.uniform(0, seconds),
        ):
            ended += 1
        else:
            deaths[way] += 1
    assert survives(lambda: run(directory / f"run-{ended}"))
    print(json.dumps(deaths))


if __name__ == "__main__":
    main(*sys.argv[1:])
