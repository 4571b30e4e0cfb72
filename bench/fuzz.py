"""Broken input for every script, by the thousand: python bench/fuzz.py --cases 2000

Each case spoils one input of a small base, its heads, its rows or its text, or draws flags at random, and runs a script on it in a child
of its own. A script may do its work, or refuse with exit code 2 and one line that is no traceback. All else is a fault: another exit
code, a traceback, more than two minutes, a file that is left half written, an input that was changed, code in an input that ran.
Writes bench/results/fuzz.json; a fault is printed with its number, and `--only N` runs that case again. Needs data/requirements.txt.
"""

import json
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch._dynamo  # noqa: F401  an optimiser asks for it: once, not in every child
from safetensors import safe_open
from tqdm import tqdm

import sample
import train
from bench.child import in_a_child
from bench.figures import machine
from data.command import OneLineParser, add_options, option, run
from data.packages import optional
from data.shards import digest_of
from data.smollm2 import CONTROL, tokenizer_json
from medusa import MedusaHeads
from model import check_sizes, write_json

SECONDS = 120  # that a case may take
SMALL = """--vocab-size 300 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1
--context 64 --steps 2 --batch 2 --warmup 1""".split()
FIT = "--steps 2 --batch 2 --warmup 1".split()
NUMBERS = [
    *"0 1 2 3 -1 0.5 1e-9 1e9 1e400 nan inf -inf 4x2x1 0x0 x 1x 99999x99999 9223372036854775807 99999999999999999999999 1_0 ² true".split(),
    "",
    " ",
    "\u0661",
]
WORDS = ["", " ", "nowhere", "nowhere/at/all", "/", ".", "/dev/null", "a\nb", "\udcff", "\u202e\u0000", "-", "--", "'", "x" * 5000, "greedy", "typical", "lossless", "cpu", "cuda", "meta",
         "mps", "float16", "float64", "kl", "corpus", "distilled", "tree.json"]  # fmt: skip
WRITABLE = [
    word for word in WORDS if not word.startswith("/")
]  # for what is written: nothing outside of the case
JUNK = [
    None, True, False, 0, -1, 1, 1 << 70, 0.5, float("nan"), float("inf"), "", "x", "16", [], [1], {}, {"rope_type": "linear"}, {"factor": -1}, {"type": "yarn"},
]  # fmt: skip
TEMPLATES = [
    "", "{{", "{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ ''.__class__.__mro__ }}", "{% for n in range(10 ** 9) %}{% endfor %}", "{{ 'a' * 10 ** 18 }}",
    "{% include 'x' %}", "{{ raise_exception('no') }}", "{{ " + "(" * 5000, "{{ strftime_now(3) }}", "\udcff", "{{ messages | tojson }}", "{{ bos_token.x.y }}",
]  # fmt: skip


@dataclass(frozen=True)
class FuzzConfig:
    cases: int = option(2000, "cases to run")
    seed: int = option(0, "seed of all cases")
    only: int = option(-1, "run this one case, and show what it says")
    out: str = option("bench/results", "directory of fuzz.json")

    def __post_init__(self):
        check_sizes(self, ["cases"])


@dataclass(frozen=True)
class Case:
    """A script's main function, its command line, and the directory in which its inputs stand."""

    main: Callable[[], None]
    argv: list[str]


def make_inputs(work: Path) -> int:
    """A small base, its rows and heads, and a training run that was stopped, by the project's own commands."""
    text = work / "text.txt"
    text.write_text(
        "".join(f"def f{n}(x):\n    return x + {n % 7}  # \u20ac\n\n" for n in range(4000)),
        encoding="utf-8",
    )
    common = ["--text", str(text), "--device", "cpu", "--precision", "float32"]
    base, rows = ["--base", str(work / "base")], ["--distilled", str(work / "rows")]
    for mode, out, more in (
        ("base", "base", SMALL),
        (
            "distill",
            "rows",
            [*base, *"--shards 1 --rows 6 --prompt-tokens 6 --new-tokens 18".split()],
        ),
        ("medusa1", "heads", [*base, *rows, *FIT, "--num-heads", "3"]),
    ):
        sys.argv = ["train.py", "--mode", mode, *common, *more, "--out", str(work / out)]
        train.main()
    shutil.copytree(work / "base", work / "chat")
    (work / "chat" / "tokenizer.model").unlink()
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *sorted(optional("tokenizers", "bench/fuzz.py").pre_tokenizers.ByteLevel.alphabet()),
    ]
    write_json(
        work / "chat" / "tokenizer.json", tokenizer_json(pieces, [CONTROL] * 3 + [1] * 256, [])
    )
    template = "{% for turn in messages %}{{ bos_token }}{{ turn.content }}{% endfor %}"
    write_json(
        work / "chat" / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template},
    )
    (work / "turns.jsonl").write_text("".join(json.dumps(f"turn {n}") + "\n" for n in range(200)))
    train.finish = lambda config: None  # the checkpoint stays
    sys.argv = [
        "train.py",
        "--mode",
        "medusa1",
        *common,
        *base,
        *rows,
        *FIT,
        "--num-heads",
        "3",
        "--out",
        str(work / "run"),
    ]
    train.main()
    return 0


# ---- what is spoilt, and who meets it ----


def sampling(work: Path, *more: str) -> Case:
    return Case(
        sample.main,
        [
            "sample.py",
            "--base",
            f"{work}/base",
            "--heads",
            f"{work}/heads",
            "--device",
            "cpu",
            "--max-new-tokens",
            "6",
            "--tree",
            "4",
            *more,
        ],
    )


def training(work: Path, mode: str, *more: str) -> Case:
    flags = {
        "base": SMALL,
        "distill": "--shards 1 --rows 2 --prompt-tokens 6 --new-tokens 8".split(),
    }.get(mode, [*FIT, "--distilled", f"{work}/rows"])
    base = [] if mode == "base" else ["--base", f"{work}/base"]
    return Case(
        train.main,
        [
            "train.py",
            "--mode",
            mode,
            "--text",
            f"{work}/text.txt",
            "--device",
            "cpu",
            "--out",
            f"{work}/out",
            *base,
            *flags,
            *more,
        ],
    )


def spoil_json(path: Path, chance: random.Random) -> None:
    """Replace, drop or add a value somewhere, or break the text."""
    content = json.loads(path.read_text())
    at = content
    while (
        isinstance(at, dict)
        and any(isinstance(value, dict) and value for value in at.values())
        and chance.random() < 0.7
    ):
        at = chance.choice([value for value in at.values() if isinstance(value, dict) and value])
    for _ in range(chance.choice((1, 1, 2))):
        key = chance.choice([*at, "surplus"])
        if chance.random() < 0.25:
            at.pop(key, None)
        else:
            at[key] = chance.choice([*JUNK, *at.values()])
    text = json.dumps(content)
    path.write_text(
        text
        if chance.random() < 0.9
        else text[: chance.randrange(len(text))]
        if chance.random() < 0.5
        else "[" * 100_000
    )


def spoil_bytes(path: Path, chance: random.Random) -> None:
    """Cut, lengthen or flip: most often at the beginning, where the headers stand."""
    content, way = (
        bytearray(path.read_bytes()),
        chance.choice(("cut", "longer", "flip", "flip", "flip", "swap")),
    )
    if way == "cut":
        del content[chance.choice((0, 4, 8, chance.randrange(len(content)))) :]
    elif way == "longer":
        content += chance.randbytes(chance.choice((1, 8, 1000)))
    elif way == "swap":
        content = bytearray(chance.randbytes(len(content)))
    else:
        for _ in range(chance.choice((1, 1, 4))):
            content[chance.randrange(min(len(content), chance.choice((8, 600, len(content)))))] ^= (
                1 << chance.randrange(8)
            )
    path.write_bytes(content)


def spoil_header(path: Path, chance: random.Random) -> None:
    """A safetensors file whose header says other shapes, types, places or names than its bytes have."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = chance.choice(list(header))
    field = chance.choice(("dtype", "shape", "data_offsets", "name", "metadata"))
    if field == "name":
        header[chance.choice(("x", "", name + "x", "lm_head.weight"))] = header.pop(name)
    elif field == "metadata":
        header["__metadata__"] = chance.choice(
            ({}, {"base": "x"}, {"step": "x"}, {"settings": "[" * 2000}, {"inputs": 3}, "x")
        )
    elif isinstance(header[name], dict):
        values = {
            "dtype": ["F64", "F16", "I64", "BOOL", "U8", "X", 3],
            "shape": [[], [0], [1 << 40, 1 << 40], [-1], "x"],
            "data_offsets": [[0, 0], [5, 1], [0, 1 << 62], []],
        }
        header[name][field] = chance.choice(values[field])
    said = json.dumps(header).encode()
    path.write_bytes(len(said).to_bytes(8, "little") + said + content[end:])


class Payload:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def texts(chance: random.Random) -> bytes:
    """A corpus that is none, or an unusual one."""
    lines = "".join(
        chance.choice(
            (
                "\n",
                "\r",
                "\t",
                " ",
                "a",
                "\u20ac",
                "\u2581",
                "\u202e",
                "\U0001f600",
                "\x00",
                "</s>",
                "<0x41>",
            )
        )
        for _ in range(3000)
    )
    unusual = [
        b"",
        b"\n",
        b"\xff\xfe\x00",
        chance.randbytes(5000),
        b"\x00" * 5000,
        b"x" * 50_000,
        lines.encode(),
        b"a b\n" * 9000,
    ]
    unusual += ["\ufeffbom\n".encode() * 4000, b"\xed\xa0\x80" * 500]
    return b"one line " * 5_500_000 if chance.random() < 0.05 else chance.choice(unusual)


def flags_of(config: type, chance: random.Random) -> list[str]:
    """A few flags with values of any kind."""
    argv = []
    for f in chance.sample(fields(config), chance.randint(1, 3)):
        flag = "--" + f.name.replace("_", "-")
        argv += (
            [flag]
            if f.type == "bool" or f.type is bool
            else [
                flag,
                chance.choice(
                    WRITABLE if f.name in ("out", "trace") else chance.choice((NUMBERS, WORDS))
                ),
            ]
        )
    return [
        *argv,
        *([chance.choice(("--no", "-x", "extra", "--tre", "--"))] if chance.random() < 0.1 else []),
    ]


def spoil_flags(work: Path, chance: random.Random) -> Case:
    if chance.random() < 0.5:
        return sampling(work, *flags_of(sample.SampleConfig, chance))
    mode = chance.choice(list(train.MODES))
    return training(work, mode, *flags_of(train.MODES[mode], chance))


def spoil_text(work: Path, chance: random.Random) -> Case:
    (work / "text.txt").write_bytes(texts(chance))
    return chance.choice(
        (
            training(work, chance.choice(list(train.MODES))),
            sampling(work, "--prompt-file", f"{work}/text.txt"),
        )
    )


def spoil_rows(work: Path, chance: random.Random) -> Case:
    chance.choice((spoil_bytes, spoil_header))(
        chance.choice(sorted((work / "rows").iterdir())), chance
    )
    return training(work, chance.choice(("medusa1", "medusa2")))


def spoil_checkpoint(work: Path, chance: random.Random) -> Case:
    chance.choice((spoil_bytes, spoil_header))(work / "run" / "checkpoint.safetensors", chance)
    return training(
        work,
        "medusa1",
        "--num-heads",
        "3",
        "--precision",
        "float32",
        "--resume",
        "--out",
        f"{work}/run",
    )


def spoil_pickle(work: Path, chance: random.Random) -> Case:
    """Official heads; some run code, if they are believed."""
    path, payload = work / "medusa_lm_head.pt", Payload(work / "ran")
    names = [
        f"{k}.{part}" for k in range(2) for part in ("0.linear.weight", "0.linear.bias", "1.weight")
    ]
    torch.save(
        {name: payload if chance.random() < 0.3 else torch.zeros(16, 16) for name in names}, path
    )
    if chance.random() < 0.3:
        path.write_bytes(pickle.dumps(payload))
    elif chance.random() < 0.5:
        spoil_bytes(path, chance)
    return Case(lambda: MedusaHeads.from_official(path), ["official"])


def spoil_chat(work: Path, chance: random.Random) -> Case:
    """A chat model's tokenizer.json, its settings, its template, or the turns that it is distilled on."""
    what = chance.choice(
        (
            "tokenizer.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "turns.jsonl",
        )
    )
    if what == "chat_template.jinja":
        (work / "chat" / what).write_text(chance.choice(TEMPLATES), errors="surrogateescape")
    elif what == "turns.jsonl":
        (work / what).write_bytes(
            texts(chance) if chance.random() < 0.5 else json.dumps(chance.choice(JUNK)).encode()
        )
    else:
        (spoil_bytes if chance.random() < 0.3 else spoil_json)(work / "chat" / what, chance)
    flags = ["--base", f"{work}/chat", "--chat"]
    return chance.choice(
        (
            sampling(work, *flags, "why?"),
            training(
                work, "distill", *flags, "--text", f"{work}/turns.jsonl", "--prompt-tokens", "40"
            ),
        )
    )


def spoil_tree(work: Path, chance: random.Random) -> Case:
    paths = ([0], [1], [0, 0], [], [-1], [1 << 70], ["x"], 0, None, [0.0], [[0]], [0] * 99)
    junk = json.dumps(chance.choices(paths, k=chance.randint(0, 4)))
    (work / "tree.json").write_text(junk if chance.random() < 0.8 else "[" * 100_000)
    return sampling(work, "--tree", f"{work}/tree.json")


def spoil_calibration(work: Path, chance: random.Random) -> Case:
    spoil_json(work / "heads" / "calibration.json", chance)
    return sampling(work)


def spoil_config(work: Path, chance: random.Random) -> Case:
    spoil_json(work / chance.choice(("base", "base", "heads")) / "config.json", chance)
    return whoever_opens(work, chance)


def spoil_weights(work: Path, chance: random.Random) -> Case:
    chance.choice((spoil_bytes, spoil_header))(
        work / chance.choice(("base", "base", "heads")) / "model.safetensors", chance
    )
    return whoever_opens(work, chance)


def spoil_tokenizer(work: Path, chance: random.Random) -> Case:
    spoil_bytes(work / "base" / "tokenizer.model", chance)
    return whoever_opens(work, chance)


def whoever_opens(work: Path, chance: random.Random) -> Case:
    return chance.choice(
        (sampling(work), training(work, chance.choice(("distill", "medusa1", "medusa2"))))
    )


KINDS = [
    spoil_flags,
    spoil_flags,
    spoil_config,
    spoil_config,
    spoil_weights,
    spoil_weights,
    spoil_calibration,
    spoil_tokenizer,
    spoil_chat,
    spoil_text,
]
KINDS += [
    spoil_rows,
    spoil_checkpoint,
    spoil_pickle,
    spoil_tree,
]  # those that stand twice have more to be spoilt


# ---- the run of a case, and the verdict ----


def meet(case: Case, work: Path) -> int:
    tqdm._instances.clear()  # the bar over the cases is none of this process
    os.chdir(work)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    sys.argv = case.argv
    run(case.main)
    return 0


def left_over(work: Path) -> list[str]:
    """Files that are half written: under a temporary name, or of a kind that cannot be read."""
    found = [str(path) for path in work.rglob(".*.[0-9]*")]
    for path in (work / "out").rglob("*") if (work / "out").is_dir() else ():
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except Exception as error:
            found.append(f"{path}: {error}")
    return found


def contents(work: Path) -> dict[str, str]:
    return {
        str(path): digest_of(path.read_bytes())
        for name in ("base", "heads", "rows", "chat", "text.txt", "turns.jsonl")
        for path in sorted((work / name).rglob("*") if (work / name).is_dir() else [work / name])
        if path.is_file()
    }


def verdict(code: int | None, said: str, before: dict, work: Path) -> str:
    """What is at fault; nothing if all is well."""
    lines = [
        line
        for line in re.split(r"[\n\r]", said)
        if line.strip()
        and "step/s" not in line
        and "shard/s" not in line
        and "?s/" not in line
        and "s/it" not in line
    ]
    if code is None:
        return f"hangs for {SECONDS} s"
    if code not in (0, 2):
        return f"exit code {code}: {said[-600:]}"
    if code == 2 and len(lines) != 1:
        return f"{len(lines)} lines: {said[-600:]}"
    if (work / "ran").exists():
        return "code in an input ran"
    if left := left_over(work):
        return f"half written: {left}"
    return "an input was changed" if code == 2 and contents(work) != before else ""


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add_options(parser, FuzzConfig)
    config = FuzzConfig(**vars(parser.parse_args()))
    torch.set_num_threads(1)
    counts, faults = defaultdict(Counter), []
    with tempfile.TemporaryDirectory() as folder:
        inputs, work = Path(folder) / "inputs", Path(folder) / "work"
        work.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        if (
            in_a_child(partial(make_inputs, work), 10 * SECONDS, "/dev/stderr") != 0
        ):  # under the paths that a stopped run remembers
            raise ValueError("the inputs could not be made")
        work.rename(inputs)
        numbers = [config.only] if config.only >= 0 else range(config.cases)
        for number in tqdm(numbers, unit="case"):
            shutil.copytree(inputs, work)
            chance = random.Random(f"{config.seed} {number}")
            spoil = chance.choice(KINDS)
            kind, case = spoil.__name__.removeprefix("spoil_"), spoil(work, chance)
            before = contents(work)
            code = in_a_child(partial(meet, case, work), SECONDS, str(work / ".said"))
            said = (work / ".said").read_text(encoding="utf-8", errors="replace")
            fault = verdict(code, said, before, work)
            counts[kind][
                {0: "works", 2: "refused"}.get(code, "fault") if not fault else "fault"
            ] += 1
            if fault or config.only >= 0:
                tqdm.write(f"case {number}, {kind}: {' '.join(case.argv)[:600]}\n{fault or said}\n")
            if fault:
                faults.append({"case": number, "kind": kind, "fault": fault.replace(folder, "")})
            shutil.rmtree(work)
    if config.only < 0:
        command = f"python bench/fuzz.py --cases {config.cases} --seed {config.seed}"
        about = {"command": command, "machine": machine(), "date": date.today().isoformat()}
        write_json(
            Path(config.out) / "fuzz.json",
            about
            | {"cases": {kind: dict(counts[kind]) for kind in sorted(counts)}, "faults": faults},
        )
        print(f"{config.cases} cases, {len(faults)} faults: {Path(config.out) / 'fuzz.json'}")


if __name__ == "__main__":
    run(main)
