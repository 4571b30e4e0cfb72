"""Broken input for every script, by the thousand: python bench/fuzz.py --cases 2000

Each case spoils one input of a small base, its heads, its rows or its text, or picks flags at
random, and runs a script on it in a child of its own. A script may do its work, or refuse with exit
code 2 and one line. All else is a fault: another exit code, a traceback, more than two minutes, a
file that is half written, an input that was changed, code in an input that ran, a text or a figure
out of NaN. Writes bench/results/fuzz.json; a fault is printed with its number, and `--only N` runs
that case again.
"""

import json
import math
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._dynamo  # noqa: F401  an optimiser asks for it: once, not in every child
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import sample
import train
from bench.child import in_a_child
from bench.figures import machine
from data.command import option, optional, parsed, run
from data.rows import digest_of
from data.smollm2 import CONTROL, tokenizer_json
from medusa import MedusaConfig, MedusaHeads
from model import check_sizes, write_json

SECONDS = 120  # that a case may take
FIT = "--steps 2 --batch 2 --warmup 1".split()
SMALL = "--vocab-size 300 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 1".split()
SMALL += "--num-attention-heads 2 --num-key-value-heads 1 --context 64".split() + FIT
ROWS = "--shards 1 --rows 6 --prompt-tokens 6 --new-tokens 18".split()
NUMBERS = "0 1 2 3 -1 0.5 1e-9 1e9 1e400 nan inf -inf 4x2x1 0x0 x 1x 99999x99999 1_0 ²".split()
NUMBERS += ["true", "9223372036854775807", "99999999999999999999999", "", " ", "\u0661"]
WRITABLE = ["", " ", "nowhere", "nowhere/at/all", ".", "a\nb", "\udcff", "\u202e\u0000", "-", "--"]
WRITABLE += ["'", "x" * 5000, "greedy", "typical", "lossless", "cpu", "cuda", "meta", "mps"]
WRITABLE += ["float16", "float64", "corpus", "distilled", "tree.json"]
WORDS = [*WRITABLE, "/", "/dev/null"]  # not for what is written: nothing outside of the case
JUNK = [None, True, False, 0, -1, 1, 1 << 70, 0.5, float("nan"), float("inf"), "", "x", "16", []]
JUNK += [[1], {}, {"rope_type": "linear"}, {"factor": -1}, {"type": "yarn"}]
TEMPLATES = ["", "{{", "{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ ''.__class__.__mro__ }}"]
TEMPLATES += ["{% for n in range(10 ** 9) %}{% endfor %}", "{{ 'a' * 10 ** 18 }}", "\udcff"]
TEMPLATES += ["{% include 'x' %}", "{{ raise_exception('no') }}", "{{ " + "(" * 5000]
TEMPLATES += ["{{ strftime_now(3) }}", "{{ messages | tojson }}", "{{ bos_token.x.y }}"]
PIECES = ["\n", "\r", "\t", " ", "a", "\u20ac", "\u2581", "\u202e", "\U0001f600", "\x00"]
PIECES += ["</s>", "<0x41>"]
HEADERS = {  # of a tensor in a safetensors file
    "dtype": ["F64", "F16", "I64", "BOOL", "U8", "X", 3],
    "shape": [[], [0], [1 << 40, 1 << 40], [-1], "x"],
    "data_offsets": [[0, 0], [5, 1], [0, 1 << 62], []],
}
METADATA = [{}, {"base": "x"}, {"step": "x"}, {"settings": "[" * 2000}, {"inputs": 3}, "x"]
TREE_PATHS = ([0], [1], [0, 0], [], [-1], [1 << 70], ["x"], 0, None, [0.0], [[0]], [0] * 99)


@dataclass(frozen=True)
class FuzzConfig:
    cases: int = option(2000, "cases to run")
    seed: int = option(0, "seed of all cases")
    only: int = option(-1, "run this one case, and show its messages")
    out: str = option("bench/results", "directory of fuzz.json")

    def __post_init__(self):
        check_sizes(self, ["cases"])


Case = tuple[Callable[[], None], list[str]]  # a script's main function, and its command line


def write_chat(work: Path) -> None:
    """The base with a byte-level tokenizer.json and a chat template; user turns and dialogues."""
    chat = work / "chat"
    shutil.copytree(work / "base", chat)
    (chat / "tokenizer.model").unlink()
    alphabet = optional("tokenizers", "bench/fuzz.py").pre_tokenizers.ByteLevel.alphabet()
    pieces = ["<unk>", "<s>", "</s>", *sorted(alphabet)]
    write_json(chat / "tokenizer.json", tokenizer_json(pieces, [CONTROL] * 3 + [1] * 256, []))
    turn = "{{ turn.content }}{% if turn.role == 'assistant' %}{{ eos_token }}{% endif %}"
    template = "{% for turn in messages %}{{ bos_token }}" + turn + "{% endfor %}"
    opening = "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
    write_json(chat / "tokenizer_config.json", {"chat_template": template + opening})
    write_json(chat / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    write_json(chat / "generation_config.json", {"eos_token_id": [2, 5], "temperature": 0.6})
    (work / "turns.jsonl").write_text("".join(json.dumps(f"turn {n}") + "\n" for n in range(200)))
    # The two forms of dialogues: ShareGPT's, a line each, and messages, in one list.
    said = [[f"{n}?", f"{n + 1}.", "why?", "so!"] for n in range(40)]
    sharegpt = [
        {"conversations": [{"from": f, "value": v} for f, v in zip(["human", "gpt"] * 2, texts)]}
        for texts in said
    ]
    (work / "sharegpt.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sharegpt))
    roles = ["user", "assistant"] * 2
    messages = [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, texts)]} for texts in said
    ]
    (work / "messages.json").write_text(json.dumps(messages))


def write_other_heads(work: Path) -> None:
    """The heads as vLLM takes them with fields left out, and as the paper's repository has them."""
    heads = MedusaHeads.from_pretrained(work / "heads")
    config = json.loads((work / "heads/config.json").read_text())
    bare = ("original_lm_head", "medusa_fc_bias", "num_hidden_layers", "truncated_vocab_size")
    J, V, D = config["num_hidden_layers"], config["vocab_size"], config["hidden_size"]
    private = {f"lm_heads.{k}.weight": torch.randn(V, D) for k in range(3)}
    layers = {f"blocks.{k}.layers.0.weight": torch.randn(D, D) for k in range(3)}
    MedusaHeads(MedusaConfig(D, V, 3, J, sequential=True)).save_pretrained(work / "sequential")
    (work / "vllm").mkdir()
    write_json(work / "vllm/config.json", {n: v for n, v in config.items() if n not in bare})
    save_file(private | layers, work / "vllm/model.safetensors")
    official = {name: t.clone() for name, t in heads.tensors("{k}.{j}.linear").items()}
    own = official | {f"{k}.{J}.weight": t for k, t in enumerate(private.values())}
    for name, tensors in (("shared", official), ("own", own)):
        (work / name).mkdir()
        torch.save(tensors, work / name / "medusa_lm_head.pt")
    save_file(own, work / "own.safetensors")
    write_json(work / "own/config.json", {"medusa_num_heads": 2, "medusa_num_layers": J})


def make_inputs(work: Path) -> int:
    """A small base, its rows and heads, and a run that was stopped, by the project's commands."""
    lines = [f"def f{n}(x):\n    return x + {n % 7}  # \u20ac\n\n" for n in range(4000)]
    (work / "text.txt").write_text("".join(lines), encoding="utf-8")
    common = ["--text", f"{work}/text.txt", "--device", "cpu", "--precision", "float32"]
    base = ["--base", f"{work}/base"]
    heads = [*base, "--distilled", f"{work}/rows", *FIT, "--num-heads", "3"]
    runs = {"base": ("base", SMALL), "rows": ("distill", base + ROWS), "heads": ("medusa1", heads)}
    for out, (mode, more) in (runs | {"run": runs["heads"]}).items():
        if out == "run":
            train.Run.finish = lambda self: None  # the checkpoint stays
        sys.argv = ["train.py", "--mode", mode, *common, *more, "--out", f"{work}/{out}"]
        train.main()
    write_chat(work)
    write_other_heads(work)
    return 0


# ---- what is spoilt, and who opens it ----


def sampling(work: Path, *more: str) -> Case:
    argv = ["sample.py", "--base", f"{work}/base", "--heads", f"{work}/heads", "--device", "cpu"]
    return sample.main, [*argv, "--max-new-tokens", "6", "--tree", "4", *more]


def training(work: Path, mode: str, *more: str) -> Case:
    distill = "--shards 1 --rows 2 --prompt-tokens 6 --new-tokens 8".split()
    argv = {"base": SMALL, "distill": distill, "calibrate": []}.get(mode, FIT)
    argv = ["train.py", "--mode", mode, "--text", f"{work}/text.txt", "--device", "cpu", *argv]
    if mode != "base":
        argv += ["--base", f"{work}/base"]
    if mode not in ("base", "distill"):
        argv += ["--distilled", f"{work}/rows"]
    if mode != "calibrate":
        argv += ["--out", f"{work}/out"]
    return train.main, [*argv, *more]


def whoever_opens(work: Path, chance: random.Random) -> Case:
    mode = chance.choice(("distill", "medusa1", "medusa2"))
    return chance.choice((sampling(work), training(work, mode)))


def spoil_json(path: Path, chance: random.Random) -> None:
    """Replace, drop or add a value somewhere, or break the text."""
    content = at = json.loads(path.read_text())
    while isinstance(at, dict):
        inner = [value for value in at.values() if isinstance(value, dict) and len(value) > 0]
        if len(inner) == 0 or chance.random() < 0.3:
            break
        at = chance.choice(inner)
    for _ in range(chance.choice((1, 1, 2))):
        key = chance.choice([*at, "surplus"])
        if chance.random() < 0.25:
            at.pop(key, None)
        else:
            at[key] = chance.choice([*JUNK, *at.values()])
    text = json.dumps(content)
    broken = chance.choice((text[: chance.randrange(len(text))], "[" * 100_000))
    path.write_text(text if chance.random() < 0.9 else broken)


def spoil_bytes(path: Path, chance: random.Random) -> None:
    """Cut, lengthen or flip: most often at the beginning, where the headers are."""
    content = bytearray(path.read_bytes())
    way = chance.choice(("cut", "longer", "flip", "flip", "flip", "swap"))
    if way == "cut":
        del content[chance.choice((0, 4, 8, chance.randrange(len(content)))) :]
    elif way == "longer":
        content += chance.randbytes(chance.choice((1, 8, 1000)))
    elif way == "swap":
        content = bytearray(chance.randbytes(len(content)))
    else:
        for _ in range(chance.choice((1, 1, 4))):
            end = min(len(content), chance.choice((8, 600, len(content))))
            content[chance.randrange(end)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def spoil_header(path: Path, chance: random.Random) -> None:
    """A safetensors file with other shapes, types, offsets or names than its bytes have."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = chance.choice(list(header))
    field = chance.choice((*HEADERS, "name", "metadata"))
    if field == "name":
        header[chance.choice(("x", "", name + "x", "lm_head.weight"))] = header.pop(name)
    elif field == "metadata":
        header["__metadata__"] = chance.choice(METADATA)
    else:
        header[name][field] = chance.choice(HEADERS[field])
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[end:])


def spoil_tensors(path: Path, chance: random.Random) -> None:
    chance.choice((spoil_bytes, spoil_header))(path, chance)


class Payload:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def texts(chance: random.Random) -> bytes:
    """A corpus that is none, or an unusual one."""
    unusual = [b"", b"\n", b"\xff\xfe\x00", chance.randbytes(5000), b"\x00" * 5000, b"x" * 50_000]
    unusual += ["".join(chance.choices(PIECES, k=3000)).encode(), b"a b\n" * 9000]
    unusual += ["\ufeffbom\n".encode() * 4000, b"\xed\xa0\x80" * 500]
    return b"one line " * 5_500_000 if chance.random() < 0.05 else chance.choice(unusual)


def flags_of(config: type, chance: random.Random) -> list[str]:
    """A few flags with values of any kind."""
    argv = []
    for f in chance.sample(fields(config), chance.randint(1, 3)):
        argv.append("--" + f.name.replace("_", "-"))
        values = chance.choice((NUMBERS, WORDS))
        if f.type not in (bool, "bool"):
            argv.append(chance.choice(WRITABLE if f.name in ("out", "trace") else values))
    odd = chance.choice(("--no", "-x", "extra", "--tre", "--"))
    return argv + [odd] if chance.random() < 0.1 else argv


def spoil_flags(work: Path, chance: random.Random) -> Case:
    if chance.random() < 0.5:
        return sampling(work, *flags_of(sample.SampleConfig, chance))
    mode = chance.choice(list(train.MODES))
    return training(work, mode, *flags_of(train.MODES[mode][0], chance))


def spoil_text(work: Path, chance: random.Random) -> Case:
    (work / "text.txt").write_bytes(texts(chance))
    mode = chance.choice(list(train.MODES))
    return chance.choice((training(work, mode), sampling(work, "--prompt-file", "text.txt")))


def spoil_rows(work: Path, chance: random.Random) -> Case:
    spoil_tensors(chance.choice(sorted((work / "rows").iterdir())), chance)
    return training(work, chance.choice(("medusa1", "medusa2")))


def spoil_checkpoint(work: Path, chance: random.Random) -> Case:
    spoil_bytes(work / "run" / "checkpoint.pt", chance)
    flags = ["--num-heads", "3", "--precision", "float32", "--resume", "--out", f"{work}/run"]
    return training(work, "medusa1", *flags)


def spoil_pickle(work: Path, chance: random.Random) -> Case:
    """Official heads; some run code, if they are believed."""
    path, payload, state = work / "medusa_lm_head.pt", Payload(work / "ran"), {}
    for name in ("0.linear.weight", "0.linear.bias", "1.weight"):
        for k in range(2):
            state[f"{k}.{name}"] = payload if chance.random() < 0.3 else torch.zeros(16, 16)
    torch.save(state, path)
    if chance.random() < 0.3:
        path.write_bytes(pickle.dumps(payload))
    elif chance.random() < 0.5:
        spoil_bytes(path, chance)
    return lambda: MedusaHeads.from_official(path), ["official"]


def spoil_chat(work: Path, chance: random.Random) -> Case:
    """A chat model's tokenizer, settings or template, or the turns that it is distilled on."""
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    files.append("generation_config.json")
    what = chance.choice([*files, "chat_template.jinja", "turns.jsonl"])
    if what == "chat_template.jinja":
        (work / "chat" / what).write_text(chance.choice(TEMPLATES), errors="surrogateescape")
    elif what == "turns.jsonl":
        junk = json.dumps(chance.choice(JUNK)).encode()
        (work / what).write_bytes(texts(chance) if chance.random() < 0.5 else junk)
    else:
        (spoil_bytes if chance.random() < 0.3 else spoil_json)(work / "chat" / what, chance)
    chat = ["--base", f"{work}/chat", "--chat"]
    more = ["--text", f"{work}/turns.jsonl", "--prompt-tokens", "40"]
    distill = training(work, "distill", *chat, *more)
    return chance.choice((sampling(work, *chat, "why?"), distill))


def spoil_dialogues(work: Path, chance: random.Random) -> Case:
    """Conversations, to learn from or to answer."""
    name = chance.choice(("sharegpt.jsonl", "messages.json"))
    path, way = work / name, chance.choice(("json", "json", "bytes", "text"))
    if way == "bytes":
        spoil_bytes(path, chance)
    elif way == "text":
        path.write_bytes(texts(chance))
    else:
        # A turn of a dialogue, a dialogue of the file, or the key under which its turns are.
        items = [json.loads(line) for line in path.read_text().splitlines()]
        items = items[0] if name == "messages.json" else items
        n = chance.randrange(len(items))
        turns = next(iter(items[n].values()))
        turn = chance.choice(turns)
        junk, at = chance.choice([*JUNK, "\ud83d", "</s>", "<s>" * 90]), chance.randrange(5)
        if at == 0:
            items[n] = chance.choice((junk, {"messages": junk}, {"conversations": [junk]}))
        elif at == 1:
            # Of all dialogues at random: no answers, one answer alone, long ones, other roles.
            first, last, times = chance.randrange(4), chance.randrange(5), chance.choice((1, 40))
            role, key = ("from", "value") if "from" in turns[0] else ("role", "content")
            for item in items:
                kept = next(iter(item.values()))[first : last + 1]
                for one in kept:
                    one[key] *= times
                    one[role] = chance.choice((one[role], one[role], "system"))
                item[next(iter(item))] = kept
        elif at == 2:
            chance.shuffle(turns)
        else:
            turn[chance.choice(list(turn))] = junk
        lines = "".join(json.dumps(item) + "\n" for item in items)
        path.write_text(json.dumps(items) if name == "messages.json" else lines)
    flags = ["--base", f"{work}/chat", "--text", str(path)]
    if chance.random() < 0.4:
        return training(work, "distill", "--chat", *flags, "--prompt-tokens", "40")
    mode, context = chance.choice(("medusa1", "medusa2")), chance.choice(("16", "40", "64"))
    return training(work, mode, "--data", "chat", "--context", context, "--distilled", "", *flags)


def spoil_heads(work: Path, chance: random.Random) -> Case:
    """Heads of other makes, as they are or spoilt, for whoever opens heads."""
    names = ("vllm", "shared", "own", "own.safetensors", "own/medusa_lm_head.pt", "sequential")
    name = chance.choice(names)
    path = work / name
    if chance.random() < 0.8:
        if path.is_dir():
            path = chance.choice(sorted(path.iterdir()))
        spoil = {".json": spoil_json, ".safetensors": spoil_tensors}.get(path.suffix, spoil_bytes)
        spoil(path, chance)
    heads, mode = ["--heads", f"{work}/{name}"], chance.choice(("calibrate", "medusa1", "medusa2"))
    if chance.random() < 0.4:
        return sampling(work, *heads, "--tree", chance.choice(("2x1", "mc_sim_7b_63", "auto")))
    return training(work, mode, *heads)


def spoil_values(work: Path, chance: random.Random) -> Case:
    """A weight that is not finite: in the base, or in its heads."""
    path = work / chance.choice(("base", "base", "heads")) / "model.safetensors"
    tensors = load_file(path)
    values = tensors[chance.choice(sorted(tensors))].view(-1)
    values[chance.randrange(len(values))] = chance.choice((math.nan, math.inf, -math.inf))
    save_file(tensors, path)
    heads = ["--heads", f"{work}/heads"]
    calibrating = training(work, "calibrate", *heads, "--distilled", "")
    return chance.choice((whoever_opens(work, chance), calibrating))


def spoil_tree(work: Path, chance: random.Random) -> Case:
    junk = json.dumps(chance.choices(TREE_PATHS, k=chance.randint(0, 4)))
    (work / "tree.json").write_text(junk if chance.random() < 0.8 else "[" * 100_000)
    return sampling(work, "--tree", f"{work}/tree.json")


def spoil_calibration(work: Path, chance: random.Random) -> Case:
    spoil_json(work / "heads" / "calibration.json", chance)
    return sampling(work)


def spoil_config(work: Path, chance: random.Random) -> Case:
    spoil_json(work / chance.choice(("base", "base", "heads")) / "config.json", chance)
    return whoever_opens(work, chance)


def spoil_weights(work: Path, chance: random.Random) -> Case:
    folder = work / chance.choice(("base", "base", "heads"))
    spoil_tensors(folder / "model.safetensors", chance)
    return whoever_opens(work, chance)


def spoil_tokenizer(work: Path, chance: random.Random) -> Case:
    spoil_bytes(work / "base" / "tokenizer.model", chance)
    return whoever_opens(work, chance)


KINDS = [spoil_flags, spoil_config, spoil_weights] * 2  # these have more to be spoilt
KINDS += [spoil_calibration, spoil_tokenizer, spoil_chat, spoil_text]
KINDS += [spoil_rows, spoil_checkpoint, spoil_pickle, spoil_tree]
KINDS += [spoil_dialogues, spoil_heads] * 2 + [spoil_values]


# ---- the run of a case, and what is at fault ----


def run_case(case: Case, work: Path) -> int:
    tqdm._instances.clear()  # the bar over the cases is none of this process
    os.chdir(work)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    main, sys.argv = case
    with open(work / ".printed", "w", encoding="utf-8", errors="replace") as sys.stdout:
        run(main)
    return 0


def left_over(work: Path) -> list[str]:
    """Files that are half written: under a temporary name, or of a kind that cannot be read."""
    found = [str(path) for path in work.rglob(".*.[0-9]*")]
    for path in (work / "out").rglob("*"):
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
    """Digests of what no script may change: all inputs but what calibration writes."""
    files = ("text.txt", "turns.jsonl", "sharegpt.jsonl", "messages.json", "own.safetensors")
    paths = [work / name for name in files]
    for name in ("base", "heads", "rows", "chat", "vllm", "shared", "own", "sequential"):
        paths += [path for path in (work / name).rglob("*") if path.is_file()]
    paths = [path for path in paths if path.name != "calibration.json"]
    return {str(path): digest_of(path.read_bytes()) for path in paths}


def is_broken(base: Path) -> bool:
    """Whether a NaN is in a weight that every text meets."""
    used = (t for n, t in load_file(base / "model.safetensors").items() if "embed" not in n)
    return any(t.isnan().any() for t in used)


def fault_of(code: int | None, errors: str, before: dict, work: Path) -> str:
    """What is at fault; nothing if all is well."""
    lines = [line for line in re.split(r"[\n\r]", errors) if line.strip()]
    lines = [line for line in lines if not re.search(r"\d+%\||it/s|s/it", line)]  # progress
    left = left_over(work)
    if code is None:
        return f"hangs for {SECONDS} s"
    if code not in (0, 2):
        return f"exit code {code}: {errors[-600:]}"
    if code == 2 and len(lines) != 1:
        return f"{len(lines)} lines: {errors[-600:]}"
    if (work / "ran").exists():
        return "code in an input ran"
    printed = work / ".printed"
    if code == 0 and printed.exists():
        figures = re.search(r"(?<![\w'])(nan|inf)x?(?!\w)", printed.read_text(encoding="utf-8"))
        if figures or is_broken(work / "base"):
            return f"out of NaN: {printed.read_text(encoding='utf-8')[-600:]}"
    if len(left) > 0:
        return f"half written: {left}"
    after = contents(work)
    changed = [path for path in before if after.get(path) != before[path]]
    return f"inputs were changed: {changed}" if changed else ""


def try_case(config: FuzzConfig, number: int, work: Path) -> tuple[str, str, str]:
    """The kind of the case, its result, and what is at fault."""
    chance = random.Random(f"{config.seed} {number}")
    spoil = chance.choice(KINDS)
    kind, case = spoil.__name__.removeprefix("spoil_"), spoil(work, chance)
    before = contents(work)
    code = in_a_child(partial(run_case, case, work), SECONDS, str(work / ".errors"))
    errors = (work / ".errors").read_text(encoding="utf-8", errors="replace")
    fault = fault_of(code, errors, before, work)
    if fault != "" or config.only >= 0:
        shown = f"case {number}, {kind}: {' '.join(case[1])[:600]}\n{fault or errors}\n"
        tqdm.write(shown.encode(errors="backslashreplace").decode())
    result = "fault" if fault != "" else {0: "works", 2: "refused"}[code]
    return kind, result, fault


def main() -> None:
    config = parsed(FuzzConfig, description=__doc__)
    torch.set_num_threads(1)
    counts, faults = defaultdict(Counter), []
    with tempfile.TemporaryDirectory() as folder:
        # The inputs are made in `work`: a stopped run remembers its paths.
        inputs, work = Path(folder) / "inputs", Path(folder) / "work"
        work.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        if in_a_child(partial(make_inputs, work), 10 * SECONDS, "/dev/stderr") != 0:
            raise ValueError("the inputs could not be made")
        work.rename(inputs)
        numbers = [config.only] if config.only >= 0 else range(config.cases)
        for number in tqdm(numbers, "cases"):
            shutil.copytree(inputs, work)
            kind, result, fault = try_case(config, number, work)
            counts[kind][result] += 1
            if fault != "":
                about = {"case": number, "kind": kind}
                faults.append(about | {"fault": fault.replace(folder, "")})
            shutil.rmtree(work)
    if config.only < 0:
        command = f"python bench/fuzz.py --cases {config.cases} --seed {config.seed}"
        content = {"command": command, "machine": machine(), "date": date.today().isoformat()}
        content["cases"] = {kind: dict(counts[kind]) for kind in sorted(counts)}
        path = Path(config.out) / "fuzz.json"
        write_json(path, content | {"faults": faults})
        print(f"{config.cases} cases, {len(faults)} faults: {path}")


if __name__ == "__main__":
    run(main)
