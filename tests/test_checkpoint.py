"""Laws of stopping: a run that is killed at any moment goes on to the very end it would have had, and what it cannot go on from it names."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import train
from data.checkpoint import NOT_RESULT, prepare, resume
from data.shards import base_digest, metadata_of, read_shards
from model import read_safetensors, write_safetensors
from strategies import base_config, contents, training, write_shard
from train import BaseConfig, Medusa1Config, Medusa2Config, train_base, train_medusa

pytestmark = pytest.mark.usefixtures("own_cache")


# ---- stopped ----


def a_run(what: str, base, text, shards, out, **more):
    """The function and the config of a run of five steps."""
    if what == "base":
        return train_base, base_config(out.parent, text, out.name, steps=5, **more)
    config = {"distilled": shards, "lr": 0.01, "weight_decay": 0.1}
    if what == "medusa1":
        return train_medusa, training(
            base, text, out, **config | {"steps": 5, "data": "corpus"} | more
        )
    return train_medusa, training(
        base,
        text,
        out,
        Medusa2Config,
        **config | {"heads_steps": 2, "steps": 3, "ramp": True, "lora": what == "lora"} | more,
    )


class Stop(BaseException):
    pass


def stopped(go, config, step: int) -> None:
    """Run up to this step, and no further."""
    add_gradients, calls = train.backpropagate, []

    def some(*args, **more):
        calls.append(1)
        if len(calls) > step:
            raise Stop
        return add_gradients(*args, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train, "backpropagate", some)
        go(config)


@pytest.mark.parametrize(
    "what, steps, save_every",
    [
        ("base", [3], 1),
        ("medusa1", [2, 3], 1),
        ("medusa2", [1, 2, 3, 4], 1),
        ("medusa2", [3], 2),
        ("lora", [4], 3),
    ],
)
def test_a_run_that_is_stopped_goes_on_as_if_nothing_had_been(
    what, steps, save_every, base, text, shards, tmp_path, monkeypatch
):
    """From its last checkpoint: no step before it is taken again."""
    go, config = a_run(what, base, text, shards, tmp_path / "whole", save_every=save_every)
    go(config)
    for step in steps:
        half = replace(config, out=str(tmp_path / f"stopped at {step}"))
        stopped(go, half, step)
        calls, add_gradients = [], train.backpropagate
        with monkeypatch.context() as patch:
            patch.setattr(
                train,
                "backpropagate",
                lambda *args, **more: (calls.append(1), add_gradients(*args, **more))[1],
            )
            go(replace(half, resume=True))
        assert len(calls) == 5 - step // save_every * save_every
        assert contents(half.out) == contents(config.out)


def test_a_run_that_was_finished_but_for_its_results_needs_no_step_more(
    base, text, shards, tmp_path, monkeypatch
):
    go, config = a_run("medusa2", base, text, shards, tmp_path / "whole")
    go(config)
    half = replace(config, out=str(tmp_path / "half"))

    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train, "calibrate", stop)
        go(half)
    monkeypatch.setattr(train, "backpropagate", stop)
    go(replace(half, resume=True))
    assert contents(half.out) == contents(config.out)


@pytest.fixture
def half(base, text, shards, tmp_path):
    """Medusa-2, stopped behind its third step."""
    go, config = a_run("medusa2", base, text, shards, tmp_path / "half", save_every=1)
    stopped(go, config, 3)
    return replace(config, resume=True)


def refused(config, *says) -> None:
    """In one ValueError; no file is lost, none is touched."""
    before = contents(config.out)
    with pytest.raises(ValueError) as error:
        train_medusa(config)
    assert all(word in str(error.value) for word in says), error.value
    assert contents(config.out) == before


def broken(what: str, path: Path) -> None:
    tensors, about, whole = read_safetensors(path), metadata_of(path), path.read_bytes()
    if what in ("nothing", "garbage", "half", "all but the last byte"):
        path.write_bytes(
            {
                "nothing": b"",
                "garbage": b"\x80\x04garbage",
                "half": whole[: len(whole) // 2],
                "all but the last byte": whole[:-1],
            }[what]
        )
    elif what == "a directory":
        path.unlink()
        path.mkdir()
    elif what == "other metadata":
        write_safetensors(path, tensors)
    elif what == "another shape":
        write_safetensors(path, tensors | {"heads.weight|value": torch.zeros(2, 2)}, about)
    elif what == "another name":
        write_safetensors(
            path, {key.replace("norm", "form"): t for key, t in tensors.items()}, about
        )
    else:
        write_safetensors(
            path, {key: t for key, t in tensors.items() if not key.startswith(what)}, about
        )


@pytest.mark.parametrize("what", [
    "nothing", "garbage", "half", "all but the last byte", "a directory", "other metadata", "another shape", "another name",
    "heads.bias|value", "heads.bias|exp_avg", "heads.bias|step", "heads.bias|", "base.norm.weight|", "base.norm.weight|exp_avg_sq", "base",
])  # fmt: skip
def test_a_checkpoint_that_is_broken_is_refused_by_name(what, half):
    path = Path(half.out) / "checkpoint.safetensors"
    broken(what, path)
    refused(half, "--resume", str(path))


CHANGES = {
    "text": ["other.txt"], "seed": 7, "precision": "bfloat16", "steps": 4, "batch": 4, "accumulate": 2, "lr": 0.02, "warmup": 2, "weight_decay": 0.2,
    "clip": 0.5, "base": "another", "distilled": "others", "num_heads": 3, "num_hidden_layers": 1, "truncated_vocab_size": 20, "decay": 0.7,
    "heads_steps": 3, "lr_ratio": 2.0, "lambda_0": 0.1, "ramp": False, "base_loss": "ce", "checkpoint_activations": True,
}  # fmt: skip
FREE = {"out", "resume", "plot", "save_every", "device"}


def test_every_setting_is_known_to_change_the_result_or_not_to():
    assert {field.name for field in fields(Medusa2Config)} == CHANGES.keys() | FREE | {
        "data",
        "context",
        "heads",
        "lora",
        "original_lm_head",
    }
    assert set(NOT_RESULT) == FREE


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_with_its_own_settings_or_not_at_all(name, half):
    """`resume` itself is asked, so that nothing else can refuse first."""
    other = replace(half, **{name: CHANGES[name]})
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} "):
        resume(other, {}, torch.optim.AdamW([torch.zeros(1)]), "")


def test_what_does_not_change_the_result_may_change_on_the_way(half, base, text, shards, tmp_path):
    Path(half.out).rename(tmp_path / "moved")
    train_medusa(replace(half, out=str(tmp_path / "moved"), save_every=3))
    go, config = a_run("medusa2", base, text, shards, tmp_path / "whole")
    go(config)
    assert contents(tmp_path / "moved") == contents(config.out)


@pytest.mark.parametrize("data", ["rows", "base"])
def test_a_run_does_not_go_on_with_other_data(data, half, base, shards):
    """Of another base the rows are refused as well; here they have been distilled anew."""
    if data == "rows":
        tokens, loss = read_shards(Path(shards), "train-00000.safetensors", 290)
        write_shard(Path(shards), "train-00000.safetensors", tokens.roll(1, 0), loss)
    else:
        state = read_safetensors(base / "model.safetensors")
        write_safetensors(
            base / "model.safetensors",
            state | {"model.norm.weight": 1.01 * state["model.norm.weight"]},
        )
        refused(half, "--distilled", "was not written by the base")
        for path in Path(shards).iterdir():
            write_safetensors(path, read_safetensors(path), {"base": base_digest(base)})
    refused(half, "--resume", "another base or other text")


@pytest.mark.parametrize("mode", [BaseConfig, Medusa1Config, Medusa2Config])
def test_a_checkpoint_is_neither_overlooked_nor_invented(mode, tmp_path, monkeypatch):
    """Seen before anything is loaded, as the bases and texts here would be refused first."""
    go = train_base if mode is BaseConfig else train_medusa
    config = mode(text=["none.txt"], out=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="--resume: .*checkpoint.safetensors does not exist"):
        go(replace(config, resume=True))
    (tmp_path / "checkpoint.safetensors").write_bytes(b"precious")
    with pytest.raises(
        ValueError,
        match="checkpoint.safetensors is of a run that was stopped, or goes on at this moment: take it up with --resume, remove it",
    ):
        go(config)
    assert contents(tmp_path) == {"checkpoint.safetensors": b"precious"}


@pytest.mark.parametrize("processes", [1, 2])
def test_each_part_of_each_process_has_a_row_at_least(processes, tmp_path, monkeypatch):
    if processes == 2:
        monkeypatch.setattr("data.checkpoint.rank_and_world_size", lambda: (0, processes))
    config = Medusa1Config(
        out=str(tmp_path / "out"), batch=3 * processes, accumulate=3, device="cpu"
    )
    assert prepare(config) == (torch.device("cpu"), torch.float32)
    with pytest.raises(
        ValueError,
        match=f"--batch {3 * processes - 1} is less than {processes} processes x --accumulate 3",
    ):
        prepare(replace(config, batch=3 * processes - 1))


# ---- a full disk ----


@pytest.mark.parametrize("where", ["write", "rename"])
@pytest.mark.parametrize("file", ["log.jsonl", "checkpoint.safetensors", "model.safetensors"])
def test_a_full_disk_costs_one_line_and_no_checkpoint(
    where, file, half, base, text, shards, tmp_path, monkeypatch, capsys
):
    before, rename = contents(half.out), os.replace

    def full(path, *rest):
        if file in str(path) and where == "rename":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return rename(path, *rest)

    def cut(method):
        def write(path, content, *rest, **more):
            if file in path.name:
                method(path, content[: len(content) // 2], *rest, **more)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return method(path, content, *rest, **more)

        return write

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(os, "replace", full)
        if where == "write":
            patch.setattr(Path, "write_bytes", cut(Path.write_bytes))
            patch.setattr(Path, "write_text", cut(Path.write_text))
        patch.setattr("sys.argv", ["train.py"])
        capsys.readouterr()
        train.run(lambda: train_medusa(half))
    err = capsys.readouterr().err.splitlines()[-1]
    assert (
        stop.value.code == 2
        and err.startswith("train.py: error: ")
        and "No space left on device" in err
    )
    after = contents(half.out)
    assert not [name for name in after if Path(name).name.startswith(".")]
    assert (
        file == "model.safetensors"
        or after["checkpoint.safetensors"] == before["checkpoint.safetensors"]
    )
    train_medusa(half)
    go, config = a_run("medusa2", base, text, shards, tmp_path / "whole")
    go(config)
    assert contents(half.out) == contents(config.out)


# ---- a plot ----


def test_a_plot_without_matplotlib_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for go, mode in (
        (train_base, BaseConfig),
        (train_medusa, Medusa1Config),
        (train_medusa, Medusa2Config),
    ):
        with pytest.raises(
            ValueError,
            match="--plot needs the package matplotlib: pip install -r bench/requirements.txt",
        ):
            go(mode(text=["none.txt"], out=str(tmp_path / "out"), device="cpu", plot=True))
    assert not (tmp_path / "out").exists()


def test_a_plot_is_drawn_of_the_log_when_the_run_is_over(base, text, shards, tmp_path, monkeypatch):
    drawn, stand_in = [], ModuleType("bench.plot")
    stand_in.draw_log = lambda log: drawn.append((log, len(log.read_text().splitlines())))
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "bench.plot", stand_in)
    for plot in (True, False):
        train_medusa(training(base, text, tmp_path / f"{plot}", distilled=shards, plot=plot))
    assert drawn == [(tmp_path / "True" / "log.jsonl", 4)]


# ---- killed ----


@pytest.mark.parametrize("what, kills", [("medusa2", 20), ("lora", 8), ("distill", 20)])
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_that_is_not(
    what, kills, tmp_path
):
    """At any moment, in the middle of a file, before and behind a rename: heads, base, calibration, log, and no checkpoint is left."""
    helper = [sys.executable, Path(__file__).parent / "killed.py", tmp_path, what, kills, "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in helper], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    deaths = json.loads(done.stdout)
    assert sum(deaths.values()) == kills and min(deaths.values()) == kills // 4 and len(deaths) == 4
    whole, ends = contents(tmp_path / "whole"), list(tmp_path.glob("run-*"))
    assert whole and ends
    for end in ends:
        found = contents(end)
        assert not [name for name in found if "checkpoint" in name]
        assert {
            name: content for name, content in found.items() if not Path(name).name.startswith(".")
        } == whole
