"""Properties of stopping: a run that is killed at any moment ends as it would have, and a
checkpoint that it cannot go on from is refused in one line."""

import errno
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import train
from data.rows import base_digest, read_shards, write_shard
from model import read_safetensors, write_safetensors
from strategies import Code, contents, refused, run_of
from train import train_medusa2


@pytest.fixture
def run(base, text, shards, tmp_path):
    return lambda what, name="whole": run_of(what, base, text, shards, tmp_path / name)


class Stop(BaseException):
    pass


def stopped(go, config, steps: int) -> int:
    """Take so many steps, and no further; without results if that is all. Returns their number."""
    make_batch, taken = train.make_batch, []

    def counted(*arguments):
        if len(taken) == steps:
            raise Stop
        taken.append(arguments[-1])
        return make_batch(*arguments)

    last = patch.object(train, "write_heads", side_effect=Stop) if steps == 5 else suppress()
    with patch.object(train, "make_batch", counted), last, suppress(Stop):
        go(config)
    return len(taken)


STOPS = [("base", 3, 1), ("medusa1", 2, 1), ("states", 3, 2), ("lora", 4, 3)]
STOPS += [("medusa2", steps, 1) for steps in (1, 2, 3, 5)]


@pytest.mark.parametrize("what, steps, every", STOPS)
def test_a_stopped_run_goes_on_from_its_checkpoint(what, steps, every, run, tmp_path, monkeypatch):
    """Bit for bit, and no step before the checkpoint is taken again; --out may have moved."""
    monkeypatch.setattr(train, "SAVE_EVERY", every)
    (go, whole), (_, half) = run(what), run(what, "half")
    go(whole)
    stopped(go, half, steps)
    (tmp_path / "half").rename(tmp_path / "moved")
    moved = replace(half, out=str(tmp_path / "moved"), resume=True)
    assert stopped(go, moved, 99) == 5 - steps // every * every
    assert contents(moved.out) == contents(whole.out)


# ---- what is refused ----
@pytest.fixture
def half(run, monkeypatch):
    """Medusa-2, stopped after its third step."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    go, config = run("medusa2", "half")
    stopped(go, config, 3)
    return replace(config, resume=True)


def not_resumed(config, says) -> None:
    """Refused in one line; no file is lost, none is touched."""
    before = contents(config.out)
    assert "\n" not in refused(f"--resume.*{re.escape(says)}", train_medusa2, config)
    assert contents(config.out) == before


BROKEN = ["nothing", "garbage", "cut", "a directory", "a list", "no settings", "no log", "shape"]
BROKEN += ["name", "no base", "no optimizer", "fewer groups", "code"]


@pytest.mark.parametrize("what", BROKEN)
def test_a_checkpoint_that_is_broken_is_refused_by_name(what, half):
    path = Path(half.out) / "checkpoint.pt"
    state, whole = torch.load(path, weights_only=True), path.read_bytes()
    heads, written = state["parts"]["heads"], {"nothing": b"", "garbage": b"\x80garbage"}
    written["cut"] = whole[:-1]
    if what == "a directory":
        path.unlink()
        path.mkdir()
    elif what in written:
        path.write_bytes(written[what])
    else:
        if what == "shape":
            heads["weight"] = torch.zeros(2, 2)
        if what == "name":
            heads["form"] = heads.pop("weight")
        if what == "fewer groups":
            state["optimizer"]["param_groups"].pop()
        for part in (state, state["parts"]):
            part.pop(what.removeprefix("no "), None)
        torch.save({"a list": [state], "code": {"settings": Code()}}.get(what, state), path)
    not_resumed(half, str(path))
    assert not Path("code-has-run").exists()


CHANGES = [("seed", 7), ("precision", "bfloat16"), ("steps", 4), ("batch", 4), ("lr", 0.02)]
CHANGES += [("warmup", 2), ("weight_decay", 0.2), ("heads_steps", 3), ("lr_ratio", 2.0)]
CHANGES += [("lambda_0", 0.1), ("data", "corpus")]


@pytest.mark.parametrize("name, value", CHANGES)
def test_a_run_goes_on_with_its_own_settings_or_not_at_all(name, value, half):
    not_resumed(replace(half, **{name: value}), f"{name} {getattr(half, name)}")


@pytest.mark.parametrize("data", ["rows", "base"])
def test_a_run_does_not_go_on_with_other_data(data, half, base, shards):
    if data == "rows":
        path = Path(shards, "train-00000.safetensors")
        tokens, loss = read_shards(path.parent, path.name, 290)
        write_shard(path, tokens.roll(1, 0), loss, 290, base_digest(base))
    else:
        state = read_safetensors(base / "model.safetensors")
        state["model.norm.weight"] *= 1.01
        write_safetensors(base / "model.safetensors", state)
        for path in Path(shards).iterdir():  # without a mark, rows may be of any base
            write_safetensors(path, read_safetensors(path))
    not_resumed(half, "base and text")


@pytest.mark.parametrize("mode", ["base", "medusa1", "medusa2"])
def test_a_checkpoint_is_neither_overlooked_nor_invented(mode, tmp_path):
    """Seen before anything is loaded: the text here would be refused first."""
    (config_class, go), path = train.MODES[mode], tmp_path / "checkpoint.pt"
    config = config_class(text=["none.txt"], out=str(tmp_path))
    refused(f"--resume: {path} does not exist", go, replace(config, resume=True))
    path.write_bytes(b"precious")
    refused(f"{path} is of a run that was stopped: use --resume", go, config)
    assert contents(tmp_path) == {path.name: b"precious"}


@pytest.mark.parametrize("file", ["log.jsonl", "checkpoint.pt", "model.safetensors"])
def test_a_full_disk_costs_no_checkpoint(file, half, run):
    before, rename = contents(half.out), os.replace

    def full(path, to):
        if file in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(path, to)

    with patch.object(os, "replace", full), pytest.raises(OSError, match="No space"):
        train_medusa2(half)
    after, name = contents(half.out), "checkpoint.pt"
    assert not [path for path in after if Path(path).name.startswith(".")]
    assert file == "model.safetensors" or after[name] == before[name]
    train_medusa2(half)
    train_medusa2(run("medusa2")[1])
    assert contents(half.out) == contents(half.out.replace("half", "whole"))


@pytest.mark.parametrize("what, kills", [("medusa2", 20), ("states", 8), ("distill", 12)])
def test_a_run_killed_again_and_again_ends_bit_for_bit_as_one_that_is_not(what, kills, tmp_path):
    """Heads, base, calibration and log; no checkpoint is left."""
    helper = [sys.executable, Path(__file__).parent / "killed.py", tmp_path, what, kills, "0"]
    command, environment = [str(part) for part in helper], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    deaths, whole = json.loads(done.stdout), contents(tmp_path / "whole")
    assert len(deaths) == 4 and set(deaths.values()) == {kills // 4}
    for end in map(contents, tmp_path.glob("run-*")):
        kept = {name: end[name] for name in end if not Path(name).name.startswith(".")}
        assert kept == whole and not [name for name in end if "checkpoint" in name]
