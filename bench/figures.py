"""Numbers of README.md and bench/README.md: measured here, and written into these.

    python bench/figures.py                the shipped base and heads, 50 held-out prompts
    python bench/figures.py ladder         chain, Cartesian, calibrated tree, sequential heads
    python bench/figures.py half           how often a tree's text parts in half precision
    python bench/figures.py command tests  the README's two commands: on a clone with an empty
                                           cache, and with coverage

bench/figures.json keeps them, with command, machine and date. Rivals run in turn, prompt by prompt.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import sample
import train
from data.command import OneLineParser
from data.corpus import documents, packed, windows
from data.tokenizer import Tokenizer
from medusa import MedusaHeads, Sampling
from model import GPT, read_json, write_json
from tree import ROOT_ONLY

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 50, 64, 128
FIGURES = ROOT / "bench/figures.json"


def machine() -> str:
    """The processor, as the system names it, and how much of it is used."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    name, threads = names[0] if names else platform.processor(), torch.get_num_threads()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, threads: {threads}, {versions}"


def held_out() -> tuple[torch.Tensor, int]:
    """The library's validation files as tokens, and their bytes."""
    texts = documents(True)
    n_bytes = sum(len(text.encode()) for text in texts)
    return packed(texts, Tokenizer.load(ROOT / "data/base")), n_bytes


def megabytes(directory: Path) -> float:
    files = [path for path in directory.iterdir() if path.name != "log.jsonl"]
    return sum(path.stat().st_size for path in files) / 1e6


def bits_per_byte(model: GPT, tokens: torch.Tensor, n_bytes: int) -> float:
    """Compression of a text (n,) that has n_bytes as UTF-8."""
    with patch.object(train, "PERPLEXITY_TOKENS", len(tokens)):
        bits_per_token = math.log2(train.perplexity(model, tokens))
    return bits_per_token * (len(tokens) - 1) / n_bytes


def measure_base() -> dict:
    model = GPT.from_pretrained(ROOT / "data/base")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": megabytes(ROOT / "data/base"),
        "megabytes of the heads": megabytes(ROOT / "data/heads"),
        "bits per byte": bits_per_byte(model, *held_out()),
    }


def distinct(texts: list[list[int]], n: int = 4) -> float:
    """Mean share of a text's n-grams that are not repeats: near 0 for a loop."""
    shares = []
    for text in texts:
        grams = list(zip(*(text[i:] for i in range(n))))
        shares += [len(set(grams)) / len(grams)] if len(grams) > 0 else []
    return statistics.mean(shares)


def compare(model: GPT, heads: MedusaHeads, tree, prompts: list, sampling: Sampling) -> dict:
    """Both ways over all prompts, in turn, the first one alternating."""
    rows, gaps, plain_texts = [], [], []
    for seed, prompt in enumerate(prompts):
        both = {}
        for way in (ROOT_ONLY, tree) if seed % 2 == 1 else (tree, ROOT_ONLY):
            steps = sample.decode(model, heads, way, prompt, NEW_TOKENS, sampling, seed)
            both[way] = sample.timed_run(steps)
        (text, times), (plain_text, plain_times) = both[tree], both[ROOT_ONLY]
        parted = sample.first_difference(model, prompt, text, plain_text, sampling, seed)
        if parted is not None:
            gaps.append({"prompt": seed, "token": parted[0] + 1, "gap": parted[1]})
        tokens, cost = len(text) - 1, statistics.mean(times) / statistics.mean(plain_times)
        rate = 1 / statistics.mean(plain_times)
        rows.append((tokens, len(times), cost, tokens / len(times) / cost, rate))
        plain_texts.append(plain_text)
    tokens, steps, costs, speed_ups, plain_rates = zip(*rows)
    return {
        "identical texts": len(prompts) - len(gaps),
        "differences": gaps,
        "nodes": len(tree),
        "tokens/step": sum(tokens) / sum(steps),
        "step cost": statistics.median(costs),
        "speed-up": statistics.median(speed_ups),
        "lowest speed-up": min(speed_ups),
        "highest speed-up": max(speed_ups),
        "plain tokens/s": statistics.median(plain_rates),
        "distinct 4-grams": distinct(plain_texts),
    }


def base_and_prompts(dtype: torch.dtype) -> tuple[GPT, list[list[int]]]:
    """The shipped base without an EOS token, so that texts are equally long; held-out prompts."""
    model, (tokens, _) = GPT.from_pretrained(ROOT / "data/base", dtype), held_out()
    sample.pack_linears(model)
    sample.pick_threads(model)
    model.config = replace(model.config, eos_token_id=None)
    generator = torch.Generator().manual_seed(0)
    return model, windows(tokens, PROMPTS, PROMPT_TOKENS, generator).tolist()


def measure_decoding(
    directory: Path = ROOT / "data/heads", nodes: dict | None = None, dtype=torch.float32
) -> dict:
    """Plain and Medusa decoding of the same prompts, without an EOS token: equally long texts.

    nodes: {temperature: size of the tree}; unless given, all of training's, chosen by cost.
    """
    model, prompts = base_and_prompts(dtype)
    heads, results = MedusaHeads.from_pretrained(directory, dtype), {}
    for temperature in nodes or map(str, train.TEMPERATURES):
        sampling = Sampling(float(temperature))
        choice = "auto" if nodes is None else str(nodes[temperature])
        tree, _ = sample.pick_tree(choice, model, heads, directory, sampling, prompts[0])
        results[temperature] = compare(model, heads, tree, prompts, sampling)
    return results


def measure_half() -> dict:
    """Texts that part from plain decoding in half precision, and how near the two tokens were."""
    results = {}
    for dtype in (torch.bfloat16, torch.float16):
        runs = measure_decoding(nodes={"0.0": 8, "0.7": 8}, dtype=dtype)
        for temperature, run in runs.items():
            gaps = [difference["gap"] for difference in run["differences"]]
            about = {"texts that part": len(gaps), "largest gap": max(gaps, default=0.0)}
            results[f"{str(dtype).removeprefix('torch.')} {temperature}"] = about
    return results


# Each rung of the ladder: the heads, and the tree.
LADDER = {
    "chain": ("data/heads", "1x1x1x1"),
    "Cartesian tree": ("data/heads", "2x1x1x1"),
    "calibrated tree": ("data/heads", "9"),
    "calibrated tree, sequential heads": ("data/sequential-heads", "9"),
}


def measure_ladder() -> dict:
    """Greedy decoding, each rung against plain decoding in turn."""
    model, prompts = base_and_prompts(torch.float32)
    results, greedy = {}, Sampling(0)
    for name, (directory, choice) in LADDER.items():
        heads = MedusaHeads.from_pretrained(ROOT / directory)
        tree, _ = sample.pick_tree(choice, model, heads, ROOT / directory, greedy, prompts[0])
        results[name] = compare(model, heads, tree, prompts, greedy)
    return results


def first_token(directory: Path, environment: dict) -> float:
    """Seconds from the start of sample.py to its first decoded byte."""
    prompt, start = "def read_lines(path):\n", time.perf_counter()
    command = [sys.executable, "sample.py", "--prompt", prompt, "--device", "cpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=directory, env=environment, stdout=pipe) as process:
        process.stdout.read(len(prompt) + 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def measure_command() -> dict:
    """Train heads and sample with them, in a clone with an empty cache; then decode with those
    heads and trees as large as those of `decoding`."""
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "clone"
        environment = os.environ | {"XDG_CACHE_HOME": f"{temporary}/cache"}
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        stamps = [time.perf_counter()]
        for line in ("train.py --mode medusa1", "sample.py --heads out/heads"):
            command = [sys.executable, *line.split(), "--device", "cpu"]
            subprocess.run(command, cwd=clone, env=environment, check=True)
            stamps.append(time.perf_counter())
        first = statistics.median(first_token(clone, environment) for _ in range(3))
        shipped = read_json(FIGURES)["decoding"]["result"]
        nodes = {temperature: run["nodes"] for temperature, run in shipped.items()}
        trained = measure_decoding(clone / "out/heads", nodes)
    return {
        "minutes": (stamps[2] - stamps[0]) / 60,
        "minutes of training": (stamps[1] - stamps[0]) / 60,
        "seconds to the first token of sample.py": first,
        "tokens/step": {temperature: run["tokens/step"] for temperature, run in trained.items()},
        "shipped": {temperature: run["tokens/step"] for temperature, run in shipped.items()},
    }


def measure_tests() -> dict:
    """Needs bench/requirements.txt."""
    start, command = time.perf_counter(), [sys.executable, "-m", "pytest", "-q"]
    command += [f"--cov={name}" for name in ("tree", "model", "medusa", "train", "sample")]
    command.append("--cov-report=term")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    minutes = (time.perf_counter() - start) / 60
    coverage = dict(re.findall(r"^(\w+)\.py .*? (\d+)%", done.stdout, re.MULTILINE))
    if done.returncode != 0 or len(coverage) == 0:
        why = "the tests failed, or pytest-cov is missing (pip install -r bench/requirements.txt)"
        raise SystemExit(f"{why}:\n{done.stdout[-2000:]}{done.stderr[-500:]}")
    percent = {name: int(value) for name, value in coverage.items()}
    last = done.stdout.strip().splitlines()[-1]
    return {"minutes": minutes, "result": last, "coverage in percent": percent}


SECTIONS = {"base": measure_base, "decoding": measure_decoding, "half": measure_half}
SECTIONS["ladder"] = measure_ladder
SECTIONS |= {"command": measure_command, "tests": measure_tests}


# ---- in Markdown ----

HEADER = "| temperature | text identical | tree | tokens/step | step cost "
HEADER += "| speed-up, median (range) | distinct 4-grams |"


def decoding_row(temperature: str, run: dict) -> str:
    name = "0 (greedy)" if temperature == "0.0" else temperature
    row = f"| {name} | {run['identical texts']} of {PROMPTS} | {run['nodes']} nodes "
    row += f"| {run['tokens/step']:.2f} | {run['step cost']:.2f} | {run['speed-up']:.2f}x "
    row += f"({run['lowest speed-up']:.2f} to {run['highest speed-up']:.2f}) "
    return row + f"| {run['distinct 4-grams']:.0%} |"


def base_line(r: dict) -> str:
    size = f"{r['parameters'] / 1e6:.2f} M parameters, {r['megabytes']:.1f} MB"
    bits = f"{r['bits per byte']:.3f} bits per byte on held-out library files"
    heads = f"the heads: {r['megabytes of the heads']:.1f} MB"
    return f"- The shipped base: {size}, {bits}; {heads}."


def half_line(r: dict) -> str:
    parts = []
    for run, about in r.items():
        dtype, temperature = run.split()
        gap = f"{about['largest gap']:.1g} apart at most"
        parts.append(f"{dtype} at {temperature}: {about['texts that part']}, {gap}")
    line = "- In half precision a tree rounds differently from a plain step: near-ties may flip."
    return f"{line} Texts of {PROMPTS} that diverge, 8 nodes: {'; '.join(parts)}."


def command_line(r: dict) -> str:
    pairs = []
    for t, tokens in r["tokens/step"].items():
        pairs.append(f"{tokens:.2f} against {r['shipped'][t]:.2f} at temperature {t}")
    line = f"- The first command, packages installed: {r['minutes']:.1f} minutes. Tokens/step of "
    line += "the heads it trains, against the shipped ones with equally large trees: "
    first = f"{r['seconds to the first token of sample.py']:.1f} s"
    return f"{line}{', '.join(pairs)}. `sample.py` shows its first token after {first}."


def tests_line(r: dict) -> str:
    coverage = [f"{name}.py {percent} %" for name, percent in r["coverage in percent"].items()]
    minutes = f"{r['minutes']:.1f} minutes"
    return f"- The tests, with coverage: {minutes}. Line coverage: {', '.join(coverage)}."


def ladder_table(figures: dict) -> str:
    lines = [
        "| greedy decoding | nodes | tokens/step | step cost | speed-up, median |",
        "|" + "---|" * 5,
    ]
    for name, run in figures["ladder"]["result"].items():
        row = f"| {name} | {run['nodes']} | {run['tokens/step']:.2f} | {run['step cost']:.2f} "
        lines.append(f"{row}| {run['speed-up']:.2f}x |")
    about = f"{PROMPTS} held-out prompts, texts identical. `python bench/figures.py ladder`"
    machine, day = figures["ladder"]["machine"], figures["ladder"]["date"]
    return "\n".join([*lines, "", about, f"on {machine}; {day}."])


def wrapped(text: str) -> str:
    """A paragraph, or an item of a list, at 100 columns."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_on_hyphens=False)


SHOWN = "base", "decoding", "half", "command", "tests"


def table(figures: dict) -> str:
    """figures: the sections, all of them."""
    base, decoding, half, command, tests = (figures[name]["result"] for name in SHOWN)
    rows = [decoding_row(t, run) for t, run in decoding.items()]
    lines = [HEADER, "|---|---|---|---|---|---|---|", *rows, ""]
    notes = [base_line(base), half_line(half), command_line(command), tests_line(tests)]
    measured = {(figures[name]["machine"], figures[name]["date"]) for name in SHOWN}
    about = [f"Measured by `bench/figures.py` on {name}; {day}." for name, day in sorted(measured)]
    return "\n".join([*lines, *map(wrapped, notes), "", wrapped(" ".join(about))])


def replace_between(file: str, mark: str, content: str) -> None:
    """Put the content into a document, between its lines <!-- mark --> and <!-- end of mark -->."""
    begin, end, path = f"<!-- {mark} -->", f"<!-- end of {mark} -->", ROOT / file
    text = path.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise SystemExit(f"{file}: the lines {begin} and {end} are missing; put them back")
    before, after = text[: text.index(begin)], text[text.index(end) :]
    path.write_text(f"{before}{begin}\n{content}\n{after}", encoding="utf-8")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    every = ", ".join(SECTIONS)
    parser.add_argument("sections", nargs="*", default=["base", "decoding"], help=f"of {every}")
    sections = parser.parse_args().sections
    unknown = set(sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"no section {', '.join(unknown)}: there are {every}")
    figures = read_json(FIGURES) if FIGURES.exists() else {}
    for name in sections:
        result = SECTIONS[name]()  # it also chooses the number of threads
        about = {"command": f"python bench/figures.py {name}", "machine": machine()}
        figures[name] = about | {"date": date.today().isoformat(), "result": result}
        print(json.dumps({name: figures[name]}, indent=1))
        write_json(FIGURES, figures)
    replace_between("bench/README.md", "figures", table(figures))
    replace_between("README.md", "ladder", ladder_table(figures))


if __name__ == "__main__":
    main()
