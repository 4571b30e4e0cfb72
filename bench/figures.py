"""The figures that the README states: measured here, written to bench/figures.json, and from there into the README.

    python bench/figures.py                the shipped base and heads, 50 held-out prompts at three temperatures
    python bench/figures.py command tests  the README's two commands: on a clone with an empty cache, and with coverage

Every section names its command, machine and date. Rivals run in turn, prompt by prompt, the first one alternating.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from data.calibration import CALIBRATION_TEMPERATURES
from data.corpus import documents, packed, windows
from data.difference import first_difference, gap_at
from data.perplexity import bits_per_byte
from data.tokenizer import Tokenizer
from medusa import MedusaHeads, Sampling, generate, medusa_generate
from model import GPT, read_json, write_json
from sample import pick_tree, timed_run

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 50, 64, 128
FIGURES = ROOT / "bench/figures.json"


def machine() -> str:
    """The processor, as the system names it, and how much of it is used."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def held_out() -> tuple[torch.Tensor, int]:
    """The library's validation files as tokens, and their bytes."""
    texts = documents(True)
    return packed(texts, Tokenizer.load(ROOT / "data/base")), sum(
        len(text.encode()) for text in texts
    )


def megabytes(directory: Path) -> float:
    return (
        sum(path.stat().st_size for path in directory.iterdir() if path.name != "log.jsonl") / 1e6
    )


def measure_base() -> dict:
    tokens, n_bytes = held_out()
    model = GPT.from_pretrained(ROOT / "data/base")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": megabytes(ROOT / "data/base"),
        "megabytes of the heads": megabytes(ROOT / "data/heads"),
        "bits per byte": bits_per_byte(model, tokens, n_bytes),
    }


def distinct(texts: list[list[int]], n: int = 4) -> float:
    """Mean share of a text's n-grams that are not repeats: near 0 for a loop."""
    grams = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    return statistics.mean(len(set(text)) / len(text) for text in grams if text)


def measure_decoding(
    heads_directory: Path = ROOT / "data/heads", nodes: dict[str, int] | None = None
) -> dict:
    """Plain and Medusa decoding of the same prompts; a text goes on after the end of a document, so that all are equally long.

    nodes  {temperature: size of the tree}; chosen by cost unless given
    """
    tokens, _ = held_out()
    model, heads = (
        GPT.from_pretrained(ROOT / "data/base").pack(),
        MedusaHeads.from_pretrained(heads_directory),
    )
    model.config = replace(model.config, eos_token_id=None)
    prompts = windows(tokens, PROMPTS, PROMPT_TOKENS, torch.Generator().manual_seed(0)).tolist()
    results = {}
    for temperature in CALIBRATION_TEMPERATURES:
        sampling = Sampling(temperature)
        tree, _ = pick_tree(
            str(nodes[str(temperature)]) if nodes else "auto",
            model,
            heads,
            heads_directory,
            sampling,
            prompts[0],
        )
        runs, gaps = [], []
        for seed, prompt in enumerate(prompts):
            both = {}
            for way in ("plain", "medusa") if seed % 2 else ("medusa", "plain"):
                generator = torch.Generator().manual_seed(seed)
                arguments = (prompt, NEW_TOKENS, sampling, generator)
                both[way] = timed_run(
                    generate(model, *arguments)
                    if way == "plain"
                    else medusa_generate(model, heads, tree, *arguments)
                )
            ours, plain = both["medusa"], both["plain"]
            if (at := first_difference(ours.tokens, plain.tokens)) is not None:
                gaps.append(
                    {
                        "prompt": seed,
                        "token": at + 1,
                        "gap": gap_at(model, prompt, ours.tokens, plain.tokens, at, sampling, seed),
                    }
                )
            runs.append((ours, plain))
        step_costs = [ours.step_time / plain.step_time for ours, plain in runs]
        speed_ups = [ours.tokens_per_second / plain.tokens_per_second for ours, plain in runs]
        results[str(temperature)] = {
            "identical texts": PROMPTS - len(gaps),
            "differences": gaps,
            "nodes": len(tree),
            "tokens/step": sum(len(ours.tokens) - 1 for ours, _ in runs)
            / sum(len(ours.times) for ours, _ in runs),
            "step cost": statistics.median(step_costs),
            "speed-up": statistics.median(speed_ups),
            "lowest speed-up": min(speed_ups),
            "highest speed-up": max(speed_ups),
            "plain tokens/s": statistics.median(plain.tokens_per_second for _, plain in runs),
            "distinct 4-grams": distinct([plain.tokens for _, plain in runs]),
        }
    return results


def first_token(directory: Path, environment: dict) -> float:
    """Seconds from the start of sample.py to its first decoded byte."""
    prompt = "def read_lines(path):\n"
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "sample.py", "--prompt", prompt, "--device", "cpu"],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.read(len(prompt) + 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def measure_command() -> dict:
    """Train heads and sample with them, in a clone with an empty cache; then decode with those heads and trees as large as those of `decoding`."""
    with tempfile.TemporaryDirectory() as temporary:
        clone, environment = (
            Path(temporary) / "clone",
            os.environ | {"XDG_CACHE_HOME": f"{temporary}/cache"},
        )
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "train.py", "--mode", "medusa1", "--device", "cpu"],
            cwd=clone,
            env=environment,
            check=True,
        )
        trained = time.perf_counter()
        subprocess.run(
            [sys.executable, "sample.py", "--heads", "out/heads", "--device", "cpu"],
            cwd=clone,
            env=environment,
            check=True,
        )
        sampled = time.perf_counter()
        first = statistics.median(first_token(clone, environment) for _ in range(3))
        shipped = read_json(FIGURES)["decoding"]["result"]
        trained_heads = measure_decoding(
            clone / "out/heads", {temperature: run["nodes"] for temperature, run in shipped.items()}
        )
    return {
        "minutes": (sampled - start) / 60,
        "minutes of training": (trained - start) / 60,
        "seconds to the first token of sample.py": first,
        "tokens/step": {
            temperature: run["tokens/step"] for temperature, run in trained_heads.items()
        },
    }


def measure_tests() -> dict:
    """Needs bench/requirements.txt."""
    modules = ("tree", "model", "medusa", "train", "sample")
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *(f"--cov={name}" for name in modules),
        "--cov-report=term",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    coverage = dict(re.findall(r"^(\w+)\.py .*? (\d+)%", done.stdout, re.MULTILINE))
    if done.returncode or not coverage:
        raise SystemExit(
            f"the tests failed, or pytest-cov is missing (pip install -r bench/requirements.txt):\n{done.stdout[-2000:]}{done.stderr[-500:]}"
        )
    return {
        "minutes": seconds / 60,
        "result": done.stdout.strip().splitlines()[-1],
        "coverage in percent": {k: int(v) for k, v in coverage.items()},
    }


SECTIONS = {
    "base": measure_base,
    "decoding": measure_decoding,
    "command": measure_command,
    "tests": measure_tests,
}


def table(figures: dict) -> str:
    """The README's part, in Markdown."""
    lines = []
    if decoding := figures.get("decoding"):
        lines += [
            "| temperature | text identical | tree | tokens/step | step cost | speed-up, median (range) | distinct 4-grams |",
            "|---|---|---|---|---|---|---|",
        ]
        for temperature, run in decoding["result"].items():
            lines.append(
                f"| {'0 (greedy)' if temperature == '0.0' else temperature} | {run['identical texts']} of {PROMPTS} | {run['nodes']} nodes "
                f"| {run['tokens/step']:.2f} | {run['step cost']:.2f} | {run['speed-up']:.2f}x ({run['lowest speed-up']:.2f} to {run['highest speed-up']:.2f}) "
                f"| {run['distinct 4-grams']:.0%} |"
            )
        lines.append("")
    if base := figures.get("base"):
        r = base["result"]
        lines.append(
            f"- The shipped base: {r['parameters'] / 1e6:.2f} M parameters, {r['megabytes']:.1f} MB, {r['bits per byte']:.3f} bits per byte on held-out library files; "
            f"the heads: {r['megabytes of the heads']:.1f} MB."
        )
    if (command := figures.get("command")) and "decoding" in figures:
        r = command["result"]
        shipped = figures["decoding"]["result"]
        steps = ", ".join(
            f"{tokens:.2f} against {shipped[t]['tokens/step']:.2f} at temperature {t}"
            for t, tokens in r["tokens/step"].items()
        )
        lines.append(
            f"- The first command, packages installed: {r['minutes']:.1f} minutes. Tokens/step of the heads it trains, against the shipped ones with equally large trees: {steps}. "
            f"`sample.py` shows its first token after {r['seconds to the first token of sample.py']:.1f} s."
        )
    if tests := figures.get("tests"):
        r = tests["result"]
        coverage = ", ".join(
            f"{name}.py {percent} %" for name, percent in r["coverage in percent"].items()
        )
        lines.append(
            f"- The tests, with coverage: {r['minutes']:.1f} minutes. Line coverage: {coverage}."
        )
    measured = {(section["machine"], section["date"]) for section in figures.values()}
    return "\n".join(
        lines
        + [
            "",
            *(
                f"Measured by `bench/figures.py` on {machine}; {day}."
                for machine, day in sorted(measured)
            ),
        ]
    )


def replace_between(begin: str, end: str, content: str) -> None:
    """Put the content into the README, between these two lines."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise SystemExit(
            f"README.md: the lines {begin} and {end} are missing, so the figures stay where they were written"
        )
    readme.write_text(
        text[: text.index(begin)] + begin + "\n" + content + "\n" + text[text.index(end) :],
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", default=["base", "decoding"], help=f"of {', '.join(SECTIONS)}"
    )
    sections = parser.parse_args().sections
    if unknown := set(sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    figures = read_json(FIGURES) if FIGURES.exists() else {}
    for name in sections:
        result = SECTIONS[name]()
        figures[name] = {
            "command": f"python bench/figures.py {name}",
            "machine": machine(),
            "date": date.today().isoformat(),
            "result": result,
        }
        print(json.dumps({name: figures[name]}, indent=1))
        write_json(FIGURES, figures)
    replace_between("<!-- figures -->", "<!-- end of figures -->", table(figures))


if __name__ == "__main__":
    main()
