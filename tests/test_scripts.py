"""Properties of the scripts as a user meets them: each mode hands over to the next, --help tells
all, and a mistake costs one line and nothing on disk."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch

import sample
import train
from data.command import pick_device
from data.tokenizer import Tokenizer
from medusa import MedusaHeads
from model import read_json
from strategies import contents, log_of, named
from train import pick_precision

ROOT = Path(__file__).parent.parent
FAST = "--device cpu --precision float32".split()
SHAPE = """--vocab-size 300 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 1
           --num-attention-heads 2 --num-key-value-heads 1""".split()
ROWS = "--shards 1 --rows 6 --prompt-tokens 6 --new-tokens 18".split()
STEPS = "--steps 4 --batch 2 --warmup 1".split()


def script(*argv, encoding="utf-8") -> subprocess.CompletedProcess:
    """A script, run by a shell's user at the root of the repository."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, argv)]
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, encoding=encoding, timeout=300, **how)


def succeeds(*argv, encoding="utf-8") -> str:
    run = script(*argv, encoding=encoding)
    assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr
    return run.stdout


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """What the modes make of a text of three pieces, one held out, and what they print."""
    work = tmp_path_factory.mktemp("work")
    text, base = work / named([False, False, True], "text"), ["--base", work / "base"]
    pieces = [f"def f{n}(x):\n    return x + {n % 7}  # \u20ac\n\n" for n in range(540)]
    text.write_text("".join(pieces), "utf-8")
    common, rows = ["--text", text, "--seed", "5", *FAST], ["--distilled", work / "rows"]
    flags = {
        "base": [*SHAPE, *STEPS, "--context", "256"],
        "distill": [*ROWS, *base],
        "medusa1": [*STEPS, *base, *rows, "--num-heads", "3"],
        "medusa2": [*STEPS, *base, *rows, "--heads-steps", "3", "--lora", "--sequential"],
    }
    said = {}
    for mode, out in zip(flags, ("base", "rows", "heads", "medusa2")):
        argv = ["--mode", mode, *common, *flags[mode], "--out", work / out]
        said[mode] = succeeds("train.py", *argv)
    return work, said


# ---- what works ----
def test_each_mode_writes_its_files_reports_what_is_in_them_and_names_the_next_command(made):
    work, said = made
    found = {name: set(contents(work / name)) for name in ("base", "rows", "heads", "medusa2")}
    weights = {"config.json", "model.safetensors"}
    base, heads = weights | {"tokenizer.model"}, weights | {"calibration.json"}
    assert found["base"] == base | {"log.jsonl"} and found["heads"] == heads | {"log.jsonl"}
    held_out = {f"validation-{t}.safetensors" for t in (0.0, 0.7, 1.0)}
    assert found["rows"] == held_out | {"train-00000.safetensors"}
    both = {f"base/{name}" for name in base} | {f"heads/{name}" for name in heads}
    assert found["medusa2"] == both | {"log.jsonl"}
    assert [record["step"] for record in log_of(work / "medusa2")] == list(range(7))
    of_base, train_heads = f"--base {work}/base", "next: python train.py --mode medusa1"
    both = f"--base {work}/medusa2/base --heads {work}/medusa2/heads"
    assert {mode: re.search("^next: .*$", out, re.M)[0] for mode, out in said.items()} == {
        "base": f"{train_heads} {of_base}",
        "distill": f"{train_heads} {of_base} --distilled {work}/rows",
        "medusa1": f"next: python sample.py {of_base} --heads {work}/heads",
        "medusa2": f"next: python sample.py {both}",
    }
    text = r"^perplexity( of the base)? on held-out text: \d+\.\d{3}"
    rest = {"base": "", "medusa1": ", frozen", "medusa2": r", \S+ before training"}
    assert all(re.search(f"{text}{rest[mode]}$", said[mode], re.M) for mode in rest)
    for temperature, entry in read_json(work / "heads" / "calibration.json").items():
        line = re.search(rf"^temperature {temperature}, .*$", said["medusa1"], re.M)[0]
        pairs = enumerate(zip(entry["top1"], entry["top5"], strict=True), start=1)
        shares = [f"head {k}: {one:.1%} / {five:.1%}" for k, (one, five) in pairs]
        assert line.endswith("   " + "   ".join(shares)) and len(shares) == 3


def summary(out: str) -> dict[str, str]:
    """The summary's lines by name: the last six."""
    lines = [re.fullmatch(r"(\S+(?: \S+)?) {2,}(.*)", line) for line in out.splitlines()[-6:]]
    found = dict(line.groups() for line in lines)
    assert list(found) == ["tree", "tokens/step", "step cost", "tokens/s", "text", "speed-up"]
    return found


RULES = ["", "--temperature 0.9 --top-p 0.9 --seed 4", "--temperature 1 --accept typical"]


@pytest.mark.parametrize("where", [".", "medusa2"])
@pytest.mark.parametrize("tree", ["auto", "4", "3x2x1"])
@pytest.mark.parametrize("flags", RULES)
def test_what_was_trained_samples_the_text_of_plain_decoding(call, made, where, tree, flags):
    work, more = made[0] / where, ["--prompt", "def \u20ac(", "--max-new-tokens", "30"]
    more += ["--base", work / "base", "--heads", work / "heads", "--dtype", "float64"]
    code, out, err = call("sample.py", *more, "--tree", tree, *flags.split())
    assert (code, err) == (0, "") and out.startswith("def \u20ac(") and "\033" not in out
    assert "typical" in flags or summary(out)["text"] == "identical, token for token"


def test_a_fresh_clone_samples_with_what_is_shipped():
    out = succeeds("sample.py", "--max-new-tokens", "24")
    out, last = out.strip().rsplit("\n", 1)
    assert out.startswith("def quote(s):\n") and "23 tokens" in summary(out)["tokens/step"]
    (heads,) = re.fullmatch(r"see also     (--heads \S+): more tokens/step", last).groups()
    more = succeeds("sample.py", *heads.split(), "--max-new-tokens", "24")
    assert summary(more)["text"] == "identical, token for token"


SHOWN = [("ascii", "\\u20ac \\xe9"), ("latin-1", "\\u20ac \xe9"), ("cp1252", "\u20ac \xe9")]


@pytest.mark.parametrize("encoding, shown", SHOWN)
def test_a_terminal_that_is_not_utf_8_gets_the_text_with_escapes(made, encoding, shown):
    flags = ["--base", made[0] / "base", "--heads", made[0] / "heads", "--tree", "2x1"]
    out = succeeds("sample.py", *flags, "--prompt", "\u20ac \xe9", encoding=encoding)
    assert out.startswith(shown) and "127 tokens" in summary(out)["tokens/step"]


@pytest.mark.parametrize("mode", ["medusa1", "medusa2"])
def test_two_processes_train_what_one_trains(made, call, tmp_path, mode):
    """Started by torchrun; three rows do not split evenly. The first process alone prints."""
    work, torchrun = made[0], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    heads = {"medusa1": ["--keep-states"], "medusa2": ["--heads-steps", "3"]}[mode]
    argv = ["train.py", "--mode", mode, "--base", work / "base", "--distilled", work / "rows"]
    argv += ["--text", next(work.glob("text*.txt")), *FAST, *STEPS, "--batch", "3", *heads, "--out"]
    code, said, _ = call(*argv, tmp_path / "one")
    run = script(*torchrun, *argv, tmp_path / "two")
    assert (code, run.returncode) == (0, 0), run.stderr
    assert len(run.stdout.splitlines()) == len(said.splitlines())
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("base", "heads", "top1", "lr", "norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (one["step"], name)
    outs = [tmp_path / name / ("heads" if mode == "medusa2" else "") for name in ("one", "two")]
    one, two = (MedusaHeads.from_pretrained(out).weight for out in outs)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    assert one.abs().max() > 1e-3


# ---- the command line ----
@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script in this process, as __main__; returns its exit code and what it wrote."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "1000")

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


COMMANDS = [(config, ["train.py", "--mode", mode]) for mode, (config, _) in train.MODES.items()]


@pytest.mark.parametrize("config, argv", [*COMMANDS, (sample.SampleConfig, ["sample.py"])])
def test_help_lists_every_field_with_its_meaning_and_default(call, config, argv):
    code, out, err = call(*argv, "--help")
    assert (code, err) == (0, "")
    entries = re.split(r"\n  (?:-h, )?(?=--)", out)[1:]
    words = {re.match(r"--[\w-]+", entry)[0]: " ".join(entry.split()) for entry in entries}
    flags = {"--" + f.name.replace("_", "-"): f for f in fields(config)}
    assert words.keys() == {"--help", *(["--mode"] if "--mode" in argv else []), *flags}
    for flag, f in flags.items():
        default = "" if f.default in (MISSING, "") else f" (default: {f.default})"
        assert words[flag].endswith(" ".join(f"{f.metadata['help']}{default}".split()))


ENDS = [(ValueError("bad\nvalue  here"), 2, "a.py: error: bad value here\n")]
ENDS += [(OSError("bad value"), 2, "a.py: error: bad value\n")]
ENDS += [(torch.OutOfMemoryError("CUDA out of\nmemory"), 2, "a.py: error: out of memory: ")]
ENDS += [(KeyboardInterrupt(), 130, "")]


@pytest.mark.parametrize("error, code, says", ENDS)
def test_what_users_can_mend_is_one_line_our_faults_show(error, code, says, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["some/a.py"])

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        train.run(main)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (code, "") and err.startswith(says)
    assert err.count("\n") == (code == 2)
    for error in (RuntimeError("ours"), TypeError("ours"), AssertionError("ours")):
        with pytest.raises(type(error), match="ours"):
            train.run(main)


@pytest.mark.parametrize("name", ["nonsense", "cpu0", "", "fpga", "meta", "cuda"])
def test_a_device_that_cannot_be_used_is_refused_by_name(name, monkeypatch):
    """Of several processes each has a GPU of its own; there is none here."""
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "93")
    with pytest.raises(ValueError, match=f"--device {name.replace('cuda', 'cuda:93')} [^\n]*$"):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")
    half = [pick_precision(*pair) for pair in (("auto", torch.device("cuda")), ("bfloat16", None))]
    assert half == [torch.bfloat16] * 2
    assert pick_precision("auto", torch.device("cpu")) == torch.float32


# ---- what is refused ----
@pytest.fixture
def copy(made, tmp_path):
    """Copies of what was trained, to be broken, and the flags that name base and heads."""
    for name in ("base", "heads", "rows"):
        shutil.copytree(made[0] / name, tmp_path / name)
    return tmp_path, ["--base", tmp_path / "base", "--heads", tmp_path / "heads", "--device", "cpu"]


@pytest.fixture
def refused(call, tmp_path):
    """Exit code 2, one line that names the mistake, and no file written or touched."""

    def files() -> dict:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def check(says, name, *argv):
        before, (code, out, err) = files(), call(name, *argv)
        assert (code, out) == (2, "") and says in err, err
        assert re.fullmatch(rf"{name}: error: [^\n]+\n", err), err
        assert files() == before

    return check


SAMPLE = [("--base none/base", "none/base"), ("--heads none/heads", "none/heads")]
SAMPLE += [("--prompt-file none.txt", "none.txt"), ("--tree none.json", "none.json")]
SAMPLE += [("--tree 1x1x1x1", "4 deep, but there are 3 heads"), ("--tree 400x1", "guess 399")]
SAMPLE += [("--tree oak", "--tree oak: must be"), ("--top-k 4", "--temperature above 0")]
SAMPLE += [("--accept loosely", "loosely"), ("--max-new-tokens 0", "max_new_tokens")]
SAMPLE += [("--device fpga", "--device fpga"), ("--dtype int8", "int8"), ("stray", "stray")]
SAMPLE += [("--prompt " + 2000 * "x", "prompt"), ("--seed -1", "--seed -1"), ("--blue", "--blue")]
SAMPLE += [("--top-p 0.9", "--top-p"), ("--accept typical", "--temp"), ("--epsilon 0.2", "--eps")]
SAMPLE += [("--temperature 1 --epsilon 0.2", "--epsilon"), ("--prompt x --chat y", "--chat")]


@pytest.mark.parametrize("flags, says", SAMPLE, ids=str)
def test_sample_refuses_bad_flags(refused, made, flags, says):
    shared = ["--base", made[0] / "base", "--heads", made[0] / "heads", "--device", "cpu"]
    refused(says, "sample.py", *shared, "--tree", "4", *flags.split())


FILES = ["base/config.json", "base/model.safetensors", "base/tokenizer.model"]
FILES += ["heads/config.json", "heads/model.safetensors", "heads/calibration.json"]
FILES += [f"rows/{name}.safetensors" for name in ("train-00000", "validation-0.0")]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, "directory", b"", b"\x80\x04garbage \xff", b"[1]"])
def test_a_broken_file_is_refused_by_name(refused, copy, made, name, content):
    """Of rows, by their directory."""
    path, argv = copy[0] / name, ["sample.py", *copy[1]]
    if path.parent.name == "rows":
        argv = ["train.py", *train_flags(made[0], "medusa1"), "--out", copy[0] / "out"]
        argv += ["--distilled", path.parent]
    path.unlink()
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    refused(str(path.parent if "rows" in name else path), *argv)


def test_sample_refuses_a_tokenizer_of_another_model(refused, copy):
    Tokenizer.load(ROOT / "data" / "base").save(copy[0] / "base")
    refused("more tokens than the", "sample.py", *copy[1])


TRAIN = [("--mode medusa3", "medusa3"), ("--mode", "--mode"), ("--fast", "--fast")]
TRAIN += [("stray", "stray"), ("--steps few", "few"), ("--steps 0", "steps"), ("--text", "--text")]
TRAIN += [("--lr nan", "--lr"), ("--precision int8", "int8"), ("--data dreams", "dreams")]
TRAIN += [("--context 100", "--context"), ("--lora", "--lora"), ("--num-heads 0", "--num-heads")]
TRAIN += [("--truncated-vocab-size 301", "truncated_vocab_size"), ("--out {base}", "overwrite")]
TRAIN += [("--base none/base", "none/base"), ("--distilled none/rows", "none/rows")]
TRAIN += [("--warmup 9 --steps 8", "--warmup 9"), ("--mode medusa2 --heads-steps 99", "--warmup")]
TRAIN += [("--heads {heads} --num-hidden-layers 3", "num_hidden_layers"), ("--heads none", "none")]
TRAIN += [("--mode base --num-heads 3", "--num-heads"), ("--mode base --context 1", "--context 1")]
TRAIN += [("--mode base --vocab-size 10", "ocabulary size"), ("--mode base --out {heads}", "--out")]
TRAIN += [("--mode base --num-attention-heads 3", "heads")]
TRAIN += [("--mode medusa2 --out {heads}", "--out"), ("--mode medusa2 --lr-ratio 0", "ratio")]
TRAIN += [("--mode medusa2 --lambda-0 -1", "--lambda-0")]
TRAIN += [("--mode distill --shards -1", "--shards -1"), ("--mode distill --rows 0", "rows")]
TRAIN += [("--mode distill --prompt-tokens 250", "--prompt-tokens"), ("--device fpga", "fpga")]
TRAIN += [("--mode distill --top-p 0", "--top-p"), ("--data chat", "line 1")]


def train_flags(work: Path, mode: str) -> list:
    flags = {"base": SHAPE, "distill": ["--base", work / "base", *ROWS]}
    of_heads = ["--base", work / "base", "--distilled", work / "rows"]
    return ["--text", next(work.glob("text*.txt")), "--device", "cpu", *flags.get(mode, of_heads)]


@pytest.mark.parametrize("flags, says", TRAIN, ids=str)
def test_train_refuses_bad_flags_before_anything_is_written(refused, made, tmp_path, flags, says):
    work, mode = made[0], re.search("(?<=--mode )[a-z]+[12]?", flags + " --mode medusa1")[0]
    flags = flags.format(base=work / "base", heads=work / "heads").split()
    refused(says, "train.py", "--out", tmp_path / "out", *train_flags(work, mode), *flags)


TEXTS = {"cannot be read": None, "UTF-8": b"caf\xe9\n", "empty": b""}
TEXTS |= {"side of the text is empty": b"x = 1\n", "tokens, a row": b"x = 1\n" * 1366 + b"y\n"}


@pytest.mark.parametrize("mode", ["base", "distill", "medusa1", "medusa2"])
@pytest.mark.parametrize("says", TEXTS)
def test_train_refuses_a_text_that_it_cannot_use(call, made, mode, says, tmp_path):
    path = tmp_path / named([False, True], "mine")
    if TEXTS[says] is not None:
        path.write_bytes(TEXTS[says])
    more = ["--text", path, *FAST, "--out", tmp_path / "out"]
    more += ["--prompt-tokens", "200"] if mode == "distill" else ["--context", "20000", *STEPS]
    more += ["--vocab-size", "264"] if mode == "base" else []
    more += ["--data", "corpus"] if mode.startswith("medusa") else []
    code, _, err = call("train.py", "--mode", mode, *train_flags(made[0], mode), *more)
    assert code == 2 and "train.py: error: " in err.splitlines()[-1] and says in err
    assert set(tmp_path.iterdir()) <= {path}
