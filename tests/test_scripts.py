"""Laws of the scripts as a user meets them: each mode hands over to the next, --help tells all, a mistake costs one line and nothing on disk."""

import json
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
from data.corpus import is_validation
from data.tokenizer import Tokenizer
from medusa import MedusaConfig, MedusaHeads
from model import GPT, write_safetensors
from strategies import log_of

ROOT = Path(__file__).parent.parent
FAST = ["--device", "cpu", "--precision", "float32"]
SHAPE = [
    "--vocab-size",
    "300",
    "--hidden-size",
    "16",
    "--intermediate-size",
    "24",
    "--num-hidden-layers",
    "1",
    "--num-attention-heads",
    "2",
    "--num-key-value-heads",
    "1",
]
ROWS = ["--shards", "1", "--rows", "6", "--prompt-tokens", "6", "--new-tokens", "18"]
FIT = ["--steps", "4", "--batch", "2", "--warmup", "1"]


def named(sides: list[bool], stem: str) -> str:
    """A file name under which the pieces of a text fall on these sides of the split, True for validation."""
    names = (f"{stem}{n}.txt" for n in range(100_000))
    return next(
        name for name in names if [is_validation(f"{name}:{i}") for i in range(len(sides))] == sides
    )


def script(work: Path, *argv) -> subprocess.CompletedProcess:
    """A script run by a shell's user at the root of the repository."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(work / "cache"),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def succeeds(work: Path, *argv) -> str:
    run = script(work, *argv)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr and "Warning" not in run.stderr
    return run.stdout


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """What the modes make of a text of three pieces, one held out, and what they say: {mode: stdout}."""
    work = tmp_path_factory.mktemp("work")
    text = work / named([False, False, True], "text")
    text.write_text(
        "".join(f"def f{n}(x):\n    return x + {n % 7}  # \u20ac\n\n" for n in range(540)), "utf-8"
    )
    base, distilled, heads = work / "base", work / "distilled", work / "heads"
    common = ["--text", text, "--seed", "5", *FAST]
    said = {
        "base": succeeds(
            work,
            "train.py",
            "--mode",
            "base",
            *common,
            *SHAPE,
            *FIT,
            "--context",
            "256",
            "--out",
            base,
        ),
        "distill": succeeds(
            work,
            "train.py",
            "--mode",
            "distill",
            *common,
            *ROWS,
            "--base",
            base,
            "--out",
            distilled,
        ),
    }
    medusa1 = [
        "--mode",
        "medusa1",
        *common,
        *FIT,
        "--num-heads",
        "3",
        "--base",
        base,
        "--distilled",
        distilled,
        "--out",
        heads,
    ]
    said["medusa1"] = succeeds(work, "train.py", *medusa1)
    return work, said


# ---- what works ----


def test_mode_base_writes_a_base_and_says_how_good_and_how_large_it_is(made):
    work, said = made
    assert {file.name for file in (work / "base").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "log.jsonl",
    }
    size = sum(
        file.stat().st_size for file in (work / "base").iterdir() if file.name != "log.jsonl"
    )
    model = GPT.from_pretrained(work / "base")
    bits, said_size = re.search(
        rf"^{work}/base: (\d+\.\d{{3}}) bits per byte on held-out text, in ([\d,]+) bytes$",
        said["base"],
        re.M,
    ).groups()
    assert 0.5 < float(bits) < 8 and int(said_size.replace(",", "")) == size
    assert f"{sum(weight.numel() for weight in model.parameters()):,} parameters" in said["base"]
    assert (
        said["base"].splitlines()[-1] == f"next: python train.py --mode medusa1 --base {work}/base"
    )


def test_mode_distill_writes_its_shards_and_names_the_next_command(made):
    work, said = made
    assert {file.name for file in (work / "distilled").iterdir()} == {
        "train-00000.safetensors",
        "validation-0.0.safetensors",
        "validation-0.7.safetensors",
        "validation-1.0.safetensors",
    }
    assert (
        said["distill"]
        == f"next: python train.py --mode medusa1 --base {work}/base --distilled {work}/distilled --out {work}/base/heads\n"
    )


def test_mode_medusa1_writes_heads_and_says_what_each_head_reached(made):
    work, said = made
    assert {file.name for file in (work / "heads").iterdir()} == {
        "config.json",
        "model.safetensors",
        "calibration.json",
        "log.jsonl",
    }
    entries = json.loads((work / "heads" / "calibration.json").read_text())
    lines = said["medusa1"].splitlines()
    for temperature in ("0.0", "0.7", "1.0"):
        line = next(line for line in lines if line.startswith(f"temperature {temperature}, "))
        found = re.findall(r"head (\d): (\d+\.\d)% / (\d+\.\d)%", line)
        assert [k for k, _, _ in found] == ["1", "2", "3"]
        for (_, top1, top5), one, five in zip(
            found, entries[temperature]["top1"], entries[temperature]["top5"], strict=True
        ):
            assert (
                abs(float(top1) - 100 * one) < 0.06
                and abs(float(top5) - 100 * five) < 0.06
                and one <= five
            )
    assert lines[-1] == f"next: python sample.py --base {work}/base --heads {work}/heads"


def medusa2(work: Path, out: Path, *more) -> list:
    """A few steps of both stages, of what the modes have made."""
    trained = [
        "--text",
        next(work.glob("text*.txt")),
        "--base",
        work / "base",
        "--distilled",
        work / "distilled",
        "--out",
        out,
    ]
    return [
        "train.py",
        "--mode",
        "medusa2",
        *trained,
        *FAST,
        *FIT,
        "--heads-steps",
        "3",
        "--num-heads",
        "3",
        *more,
    ]


@pytest.mark.parametrize(
    "more", [[], ["--lora", "--checkpoint-activations", "--accumulate", "2", "--ramp"]], ids=str
)
def test_mode_medusa2_writes_a_base_and_its_heads_and_they_decode(made, call, tmp_path, more):
    work, _ = made
    said = succeeds(work, *medusa2(work, tmp_path / "out", *more))
    files = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    both = {
        "base": ("config.json", "model.safetensors", "tokenizer.model"),
        "heads": ("config.json", "model.safetensors", "calibration.json"),
    }
    assert files == {"log.jsonl"} | {
        f"{directory}/{name}" for directory, names in both.items() for name in names
    }
    assert [record["step"] for record in log_of(tmp_path / "out")] == list(range(7))
    assert re.search(
        r"^perplexity of the base on held-out text: \d+\.\d{3}, \d+\.\d{3} before training$",
        said,
        re.M,
    )
    assert (
        said.splitlines()[-1]
        == f"next: python sample.py --base {tmp_path}/out/base --heads {tmp_path}/out/heads"
    )
    flags = [
        "--base",
        tmp_path / "out" / "base",
        "--heads",
        tmp_path / "out" / "heads",
        "--max-new-tokens",
        "24",
        "--dtype",
        "float64",
        "--tree",
        "4",
    ]
    code, out, err = call("sample.py", *flags)
    assert (code, err) == (0, "") and summary(out)["text"] == "identical, token for token"


def test_two_processes_train_what_one_trains(made, call, tmp_path):
    """Started by torchrun; three rows do not split evenly. The first process alone speaks and writes."""
    work, _ = made
    code, said, _ = call(*medusa2(work, tmp_path / "one", "--batch", "3"))
    run = script(
        work,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *medusa2(work, tmp_path / "two", "--batch", "3"),
    )
    assert (code, run.returncode) == (0, 0), run.stderr
    assert len(run.stdout.splitlines()) == len(said.splitlines())
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("base", "heads", "top1", "lr", "norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (one["step"], name)
    one, two = (MedusaHeads.from_pretrained(tmp_path / name / "heads") for name in ("one", "two"))
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-4)
    assert one.weight.abs().max() > 1e-3


def test_a_plot_without_matplotlib_costs_one_line_and_nothing_else(
    refused, made, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("--plot needs the package matplotlib", *medusa2(made[0], tmp_path / "out", "--plot"))


def summary(out: str) -> dict[str, str]:
    """The summary's lines by name; they are the last six, and the speed-up is the last of all."""
    lines = dict(
        re.fullmatch(r"(\S+(?: \S+)?) {2,}(.*)", line).groups() for line in out.splitlines()[-6:]
    )
    assert list(lines) == ["tree", "tokens/step", "step cost", "tokens/s", "text", "speed-up"]
    assert re.fullmatch(r"\d+\.\d\dx", lines["speed-up"])
    return lines


def test_sampling_with_what_was_trained_shows_the_text_and_an_honest_summary(made):
    work, _ = made
    flags = ["--prompt", "def \u20ac(", "--max-new-tokens", "30", "--dtype", "float64"]
    out = succeeds(work, "sample.py", "--base", work / "base", "--heads", work / "heads", *flags)
    assert out.startswith("def \u20ac(") and "\033" not in out
    lines = summary(out)
    why = r"calibrated at temperature 0.0; \1 nodes promise the most tokens a second here, by nodes (.*)"
    nodes, depth, shown = re.fullmatch(rf"(\d+) nodes, ([123]) deep: {why}", lines["tree"]).groups()
    assert int(nodes) > int(depth) and f"{nodes}: " in shown
    per_step, tokens, steps = re.fullmatch(
        r"(\S+) +\((\d+) tokens, (\d+) steps after the prompt\)", lines["tokens/step"]
    ).groups()
    assert int(tokens) <= 30 and float(per_step) == round((int(tokens) - 1) / int(steps), 2)
    cost = float(
        re.fullmatch(r"(\S+) +\(a step over the tree / a plain step\)", lines["step cost"])[1]
    )
    ours, plain = map(
        int, re.fullmatch(r"(\d+) with Medusa, (\d+) plain", lines["tokens/s"]).groups()
    )
    assert lines["text"] == "identical, token for token"
    speed_up = float(lines["speed-up"].removesuffix("x"))
    assert abs(speed_up - ours / plain) < 0.02 * max(speed_up, 1) and abs(
        speed_up - float(per_step) / cost
    ) < 0.02 * max(speed_up, 1)


@pytest.mark.parametrize("tree", ["auto", "4", "3x2x1", "2", "tree.json"])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--temperature", "0.9", "--top-p", "0.9", "--seed", "4"],
        ["--temperature", "1", "--accept", "typical"],
    ],
    ids=str,
)
def test_every_tree_and_rule_runs_to_its_summary(call, made, tree, flags, tmp_path):
    work, _ = made
    (tmp_path / "tree.json").write_text("[[1], [0], [1, 2]]")
    tree = str(tmp_path / tree) if tree.endswith("json") else tree
    flags = [
        "--base",
        work / "base",
        "--heads",
        work / "heads",
        "--max-new-tokens",
        "24",
        "--dtype",
        "float64",
        "--tree",
        tree,
        *flags,
    ]
    code, out, err = call("sample.py", *flags)
    assert (code, err) == (0, "")
    lines = summary(out)
    assert lines["text"] == "identical, token for token" or "typical" in flags
    assert lines["tree"].startswith(
        {"4": "4 nodes, ", "2": "2 nodes, 1", "3x2x1": "16 nodes, 3"}.get(tree, "")
    )
    assert not tree.endswith("json") or lines["tree"] == f"4 nodes, 2 deep: from {tree}"


@pytest.mark.parametrize("tree", ["auto", "3x2x1"])
def test_compiled_steps_sample_the_same_text(call, made, tree, compilations):
    work, _ = made
    flags = [
        "--base",
        work / "base",
        "--heads",
        work / "heads",
        "--max-new-tokens",
        "24",
        "--dtype",
        "float64",
        "--tree",
        tree,
    ]
    (code, out, err), (_, eager, _) = (
        call("sample.py", *flags, "--compile"),
        call("sample.py", *flags),
    )
    assert (code, err) == (0, "")
    assert (
        summary(out)["text"] == "identical, token for token"
        and out.partition("\ntree ")[0] == eager.partition("\ntree ")[0]
    )
    assert compilations.frame_count >= 3  # plain, at least one tree, the heads


def test_a_fresh_clone_samples_with_what_is_shipped(tmp_path):
    out = succeeds(tmp_path, "sample.py", "--max-new-tokens", "24")
    assert out.startswith("def quote(s):\n")
    assert "24 tokens" in summary(out)["tokens/step"]


# ---- --help ----


COMMANDS = [(config, ["train.py", "--mode", mode]) for mode, config in train.MODES.items()] + [
    (sample.SampleConfig, ["sample.py"])
]


@pytest.mark.parametrize("config, argv", COMMANDS)
def test_help_lists_every_field_with_its_default(call, config, argv):
    code, out, err = call(*argv, "--help")
    assert (code, err) == (0, "")
    entries = {
        re.match(r"--[\w-]+", entry)[0]: " ".join(entry.split())
        for entry in re.split(r"\n  (?:-h, )?(?=--)", out)[1:]
    }
    expected = (
        {"--" + f.name.replace("_", "-") for f in fields(config)}
        | {"--help"}
        | ({"--mode"} if "--mode" in argv else set())
    )
    assert entries.keys() == expected
    for f in fields(config):
        default = f.default if f.default is not MISSING else f.default_factory()
        entry = entries["--" + f.name.replace("_", "-")]
        assert f.metadata["help"] in entry
        assert entry.count("(default: ") == (default not in ("", []))
        assert default in ("", []) or entry.endswith(" ".join(f"(default: {default})".split()))


# ---- what is refused ----


@pytest.fixture
def call(monkeypatch, capsys, made):
    """Run a script in this process, as __main__; returns its exit code and what it wrote."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(made[0] / "cache"))
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


def listing(*directories: Path) -> dict[Path, tuple]:
    """All that stands in these directories, and when it was written."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for directory in directories
        for path in directory.rglob("*")
    }


def one_line(name: str, says: str, code: int, out: str, err: str) -> None:
    assert code == 2
    assert re.fullmatch(rf"{name}: error: [^\n]+\n", err), err
    assert says in err, err
    assert out == ""


@pytest.fixture
def refused(call, tmp_path, made):
    """The law of a mistake: exit code 2, one line on stderr that names it, an empty stdout, and no file written or touched, the cache aside."""

    def check(says, name, *argv):
        places = tmp_path, *(made[0] / made_by for made_by in ("base", "distilled", "heads"))
        before = listing(*places)
        one_line(name, says, *call(name, *argv))
        assert listing(*places) == before

    return check


@pytest.fixture
def copy(made, tmp_path):
    """Copies of the trained base and heads, to be broken, and the flags that name them."""
    for name in ("base", "heads", "distilled"):
        shutil.copytree(made[0] / name, tmp_path / name)
    return tmp_path, [
        "--base",
        str(tmp_path / "base"),
        "--heads",
        str(tmp_path / "heads"),
        "--device",
        "cpu",
    ]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--base", "none/base"], "none/base"),
        (["--heads", "none/heads"], "none/heads"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "x = 1\n" * 400], "shorten the prompt"),
        (["--prompt", "\udcff"], "prompt"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt"),
        (["--prompt-file", "data"], "--prompt-file data"),
        (["--prompt", "x", "--prompt-file", "README.md"], "contradict"),
        (["--tree", "1x1x1x1"], "4 deep, but there are 3 heads"),
        (["--tree", "400x1"], "guess 399"),
        (["--tree", "0x2"], "widths [0, 2]"),
        (["--tree", "2x"], "--tree 2x"),
        (["--tree", "1"], "n_nodes = 1"),
        (["--tree", "none.json"], "none.json does not exist"),
        (["--tree", "oak"], "--tree oak"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "inf"], "temperature inf"),
        (["--temperature", "hot"], "hot"),
        (["--temperature", "1", "--top-p", "0"], "top_p 0.0"),
        (["--temperature", "1", "--top-p", "nan"], "top_p nan"),
        (["--temperature", "1", "--top-k", "-1"], "top_k -1"),
        (["--temperature", "1", "--accept", "greedy"], "contradicts"),
        (["--top-k", "4"], "--temperature above 0"),
        (["--top-p", "0.5"], "--temperature above 0"),
        (["--epsilon", "0.2"], "--accept typical"),
        (["--accept", "typical", "--temperature", "1", "--epsilon", "0"], "epsilon 0.0"),
        (["--accept", "loosely"], "loosely"),
        (["--max-new-tokens", "0"], "max_new_tokens = 0"),
        (["--max-new-tokens", "many"], "many"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--dtype", "int8"], "int8"),
        (["--seed", "9" * 30], "--seed 999"),
        (["--colour"], "--colour"),
        (["stray"], "stray"),
    ],
    ids=str,
)
def test_sample_refuses_bad_flags(refused, made, flags, says):
    shared = ["--base", made[0] / "base", "--heads", made[0] / "heads"]
    refused(says, "sample.py", *shared, "--device", "cpu", "--tree", "4", *flags)


@pytest.mark.parametrize(
    "content, says",
    [
        ("[[0, 1]]", "prefix [0] is missing"),
        ("[[0], [1], [0]]", "path [0] stands twice"),
        ("[[0], [-1]]", "path [-1]"),
        ("[[0], []]", "path []"),
        ("[]", "no paths"),
        ('{"0": 1}', "no JSON list"),
        ("[0, 1]", "rank paths"),
        ("[[0.0]]", "rank paths"),
        ("[[true]]", "rank paths"),
        ('[[0], "ab"]', "rank paths"),
        ("[[300]]", "guess 300"),
        ("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]", "4 deep"),
        ("[[0]", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        (b"\xff[[0]]", "cannot be read as JSON"),
        (None, "cannot be read as JSON"),
    ],
    ids=str,
)
def test_sample_refuses_a_malformed_tree_file(refused, copy, content, says):
    directory, flags = copy
    file = directory / "tree.json"
    file.mkdir() if content is None else file.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    refused(says, "sample.py", *flags, "--tree", file)


@pytest.mark.parametrize(
    "content, says", [(b"", "is empty"), (b"\xff\xfe", "UTF-8"), (None, "irectory")], ids=str
)
def test_sample_refuses_a_prompt_file_without_text(refused, copy, content, says):
    directory, flags = copy
    file = directory / "prompt.txt"
    file.mkdir() if content is None else file.write_bytes(content)
    refused(says, "sample.py", *flags, "--tree", "4", "--prompt-file", file)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "size, says",
    [({"hidden_size": 24}, "hidden_size 24"), ({"vocab_size": 330}, "vocab_size 330")],
    ids=str,
)
def test_sample_refuses_heads_of_another_model(refused, copy, size, says, shared):
    directory, flags = copy
    config = MedusaConfig(
        **({"hidden_size": 16, "vocab_size": 300, "num_heads": 3} | size), original_lm_head=shared
    )
    MedusaHeads(config).save_pretrained(directory / "heads")
    refused(says, "sample.py", *flags)


def test_sample_refuses_a_tokenizer_of_another_model(refused, copy):
    directory, flags = copy
    Tokenizer.load(ROOT / "data" / "base").save(directory / "base")
    refused("2048 pieces", "sample.py", *flags)


GARBAGE = {
    "nothing": b"",
    "garbage": b"\x80\x04garbage \xff",
    "half": b'{"model_type": ',
    "list": b"[1, 2]",
    "empty object": b"{}",
}
FILES = ["base/config.json", "base/model.safetensors", "base/tokenizer.model"]
FILES += ["heads/config.json", "heads/model.safetensors", "heads/calibration.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["missing", "directory", *GARBAGE])
def test_sample_refuses_a_broken_file_by_name(refused, copy, name, content):
    directory, flags = copy
    (directory / name).unlink()
    if content == "directory":
        (directory / name).mkdir()
    elif content != "missing":
        (directory / name).write_bytes(GARBAGE[content])
    refused(str(directory / name), "sample.py", *flags)


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("base/config.json", "hidden_size", "16"), ("base/config.json", "hidden_size", 20), ("base/config.json", "rms_norm_eps", "small"),
        ("base/config.json", "rope_theta", "large"), ("base/config.json", "rope_theta", None), ("base/config.json", "rope_parameters", "none"),
        ("base/config.json", "num_attention_heads", 0), ("base/config.json", "max_position_embeddings", None),
        ("base/config.json", "model_type", "gpt2"),
        ("base/config.json", "eos_token_id", [2, "x"]), ("base/config.json", "vocab_size", 299),
        ("heads/config.json", "num_heads", "3"), ("heads/config.json", "num_heads", 4), ("heads/config.json", "num_hidden_layers", 0),
        ("heads/config.json", "original_lm_head", False),
    ],
    ids=str,
)  # fmt: skip
def test_sample_refuses_a_field_of_config_that_it_cannot_honour(refused, copy, name, field, value):
    directory, flags = copy
    file = directory / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    refused(str(directory / name.split("/")[0]), "sample.py", *flags)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--mode", "medusa3"], "medusa3"),
        (["--mode"], "--mode"),
        (["--mode", "base", "--num-heads", "3"], "--num-heads"),
        (["--mode", "distill", "--steps", "3"], "--steps"),
        (["--fast"], "--fast"),
        (["--mode", "base", "--steps", "0"], "steps = 0"),
        (["--steps", "0"], "steps = 0"),
        (["--mode", "base", "--steps", "few"], "few"),
        (["--mode", "base", "--batch", "-2"], "batch = -2"),
        (["--mode", "base", "--context", "0"], "context = 0"),
        (["--mode", "base", "--lr", "0"], "--lr"),
        (["--mode", "base", "--lr", "nan"], "--lr"),
        (["--mode", "base", "--clip", "-1"], "--clip"),
        (["--mode", "base", "--precision", "int8"], "int8"),
        (["--mode", "base", "--vocab-size", "10"], "ocabulary size"),
        (["--mode", "base", "--vocab-size", "0"], "vocab_size"),
        (["--mode", "base", "--vocab-size", "30000"], "ocabulary size"),
        (["--mode", "base", *SHAPE, "--num-attention-heads", "3"], "3 heads of even size"),
        (["--mode", "base", *SHAPE, "--mtp-weight", "-1"], "--mtp-weight"),
        (["--mode", "base", "--base", "data/base"], "--base"),
        (["--mode", "medusa1", "--context", "100"], "--context belongs to --data corpus"),
        (["--mode", "medusa2", "--context", "100"], "--context belongs to --data corpus"),
        (["--mode", "medusa2", "--accumulate", "3"], "--accumulate 3"),
        (["--mode", "medusa2", "--heads", "none/heads"], "none/heads"),
        (["--mode", "medusa2", "--lambda-0", "-1"], "--lambda-0"),
        (["--mode", "medusa2", "--base-loss", "mse"], "mse"),
        *[
            (["--mode", mode, "--resume"], "checkpoint.safetensors does not exist")
            for mode in ("base", "medusa1", "medusa2")
        ],
        (["--mode", "distill", "--shards", "-1"], "--shards -1"),
        (["--mode", "distill", "--rows", "0"], "rows = 0"),
        (
            ["--mode", "distill", "--prompt-tokens", "200", "--new-tokens", "200"],
            "--prompt-tokens 200 + --new-tokens 200",
        ),
        (["--mode", "distill", "--temperature", "nan"], "temperature nan"),
        (["--mode", "distill", "--top-p", "0"], "top_p 0.0"),
        (["--mode", "distill", "--base", "none/base"], "none/base"),
        (["--mode", "medusa1", "--base", "none/base"], "none/base"),
        (["--mode", "medusa1", "--distilled", "none/rows"], "none/rows"),
        (["--mode", "medusa1", "--num-heads", "0"], "num_heads = 0"),
        (["--mode", "medusa1", "--data", "dreams"], "dreams"),
        *[(["--mode", mode, "--device", "nonsense"], "--device nonsense") for mode in train.MODES],
    ],
    ids=str,
)
def test_train_refuses_bad_flags(refused, made, tmp_path, argv, says):
    work, _ = made
    mode = argv[1] if argv[0] == "--mode" and argv[1:] and argv[1] in train.MODES else "medusa1"
    text = next(work.glob("text*.txt"))
    trained = ["--base", work / "base"]
    rows = [*trained, "--distilled", work / "distilled"]
    shared = {"base": [], "distill": [*trained, *ROWS], "medusa1": rows, "medusa2": rows}[mode]
    refused(
        says,
        "train.py",
        "--text",
        text,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        *shared,
        *argv,
    )


@pytest.mark.parametrize("mode", train.MODES)
@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", "cannot be read"),
        ("directory", "cannot be read"),
        ("latin", "UTF-8"),
        ("empty", "empty"),
        ("tiny", "side of the text is empty"),
    ],
)
def test_train_refuses_a_text_that_it_cannot_use(refused, made, mode, kind, says, tmp_path):
    file = tmp_path / "mine.txt"
    if kind == "directory":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes({"latin": b"caf\xe9\n", "empty": b"", "tiny": b"x = 1\n"}[kind])
    base = [] if mode == "base" else ["--base", made[0] / "base"]
    refused(
        says, "train.py", "--mode", mode, "--text", file, "--out", tmp_path / "out", *FAST, *base
    )


@pytest.mark.parametrize("mode", train.MODES)
def test_train_refuses_a_text_shorter_than_a_row_in_one_line_and_leaves_no_output(
    call, made, tmp_path, mode
):
    """That the text was counted first may be seen, in the cache and on stdout."""
    work, _ = made
    file = tmp_path / named([False, True], "short")
    file.write_text("x = 1\n" * 1366 + "y\n")
    corpus = [
        "--base",
        work / "base",
        "--data",
        "corpus",
        "--distilled",
        work / "distilled",
        *FIT,
        "--context",
        "20000",
    ]
    base = [*SHAPE, "--vocab-size", "265", *FIT, "--context", "20000"]
    flags = {
        "base": base,
        "distill": ["--base", work / "base"],
        "medusa1": corpus,
        "medusa2": corpus,
    }[mode]
    before = listing(tmp_path)
    code, _, err = call(
        "train.py", "--mode", mode, "--text", file, "--out", tmp_path / "out", *FAST, *flags
    )
    assert code == 2
    assert re.fullmatch(
        r"train.py: error: the text has \d+ tokens, fewer than a row of \d+: [^\n]+",
        err.splitlines()[-1],
    ), err
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["train-00000", "validation-0.0", "validation-1.0"])
@pytest.mark.parametrize("content", ["missing", "garbage", "other tensors", "larger vocabulary"])
def test_medusa1_refuses_broken_rows_by_directory(refused, copy, name, content):
    directory, _ = copy
    file = directory / "distilled" / f"{name}.safetensors"
    file.unlink()
    if content == "garbage":
        file.write_bytes(b"\x80\x04garbage \xff")
    elif content != "missing":
        tokens = torch.full((2, 24), 300 if content == "larger vocabulary" else 7)
        write_safetensors(
            file,
            {"tokens": tokens, "loss": tokens > 0}
            if content == "larger vocabulary"
            else {"tokens": tokens},
        )
    flags = [
        "--base",
        directory / "base",
        "--distilled",
        directory / "distilled",
        "--out",
        directory / "out",
        *FAST,
        *FIT,
    ]
    refused(str(directory / "distilled"), "train.py", "--mode", "medusa1", *flags)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["sample.py", "--base", "none/base"], "none/base"),
        (
            ["train.py", "--mode", "base", "--text", "none.txt", "--device", "cpu"],
            "--text none.txt",
        ),
    ],
    ids=str,
)
def test_a_mistake_in_a_process_of_its_own_costs_one_line(argv, says, tmp_path):
    run = script(tmp_path, *argv)
    one_line(argv[0], says, run.returncode, run.stdout, run.stderr)
    assert listing(tmp_path) == {}
