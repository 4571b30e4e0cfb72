"""What the subcommands share: the model and the prompts that they measure, and results that a stopped run goes on from."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

from bench.figures import machine
from data.chat import turn_prompts
from data.command import option
from data.corpus import documents, packed, windows
from data.distilled import HELD_OUT_ROWS
from data.machine import check_out, pick_device
from data.packages import optional
from data.shards import base_digest
from data.tokenizer import SHIPPED_BASE, AnyTokenizer, load_base
from medusa import ROOT_ONLY, MedusaHeads, check_compatible
from model import GPT, check_sizes, read_json, write_atomically, write_json


@dataclass(frozen=True)
class Bench:
    """Settings of every subcommand."""

    only: list[str] = option(
        [], "sections to measure, by name; default: all that are not in the results yet"
    )
    out: str = option(
        "bench/results",
        "directory of the results: a JSON file, a Markdown table and a plot, each named after the subcommand",
    )
    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option("data/heads", "directory of the heads and their calibration.json")


@dataclass(frozen=True)
class Decoding(Bench):
    """Settings of subcommands that decode."""

    prompts: int = option(6, "held-out prompts")
    prompt_tokens: int = option(64, "tokens of a prompt")
    new_tokens: int = option(96, "tokens decoded behind each")

    def __post_init__(self):
        check_sizes(self, ["prompts", "prompt_tokens", "new_tokens"])


need = partial(optional, user="bench/bench.py", requirements="bench/requirements.txt")


def load(config: Bench, ends: bool = False) -> tuple[AnyTokenizer, GPT, MedusaHeads]:
    """Unless it is asked to, the model never ends a text, so that all texts are equally long."""
    device, dtype = (
        pick_device(getattr(config, "device", "cpu")),
        getattr(torch, getattr(config, "dtype", "float32")),
    )
    tokenizer, model = load_base(config.base, dtype, device)
    heads = MedusaHeads.from_pretrained(config.heads, dtype, device)
    check_compatible(model, heads, ROOT_ONLY)
    if not getattr(config, "compile", False):
        model.pack()
    if not ends:
        model.config = replace(model.config, eos_token_id=None)
    return tokenizer, model, heads


def held_out_prompts(tokenizer: AnyTokenizer, n: int, length: int) -> list[list[int]]:
    """Windows of text that nothing here was trained on."""
    return windows(
        packed(documents(True), tokenizer), n, length, torch.Generator().manual_seed(0)
    ).tolist()


def held_out_turns(config, tokenizer: AnyTokenizer) -> list[list[int]]:
    """The last config.prompts of the user turns that nothing here was trained on; trees were calibrated on the first ones."""
    held_out = turn_prompts(config.turns, config.base, tokenizer, config.prompt_tokens)[
        "validation"
    ]
    if len(held_out) < HELD_OUT_ROWS + config.prompts:
        raise ValueError(
            f"--turns: {len(held_out)} turns are held out, {HELD_OUT_ROWS} to calibrate on and --prompts {config.prompts} are needed"
        )
    return held_out[-config.prompts :]


# ---- results ----

NOT_RESULT = ("only", "out")  # settings that decide what is measured when, and where it is written


def place(config: Bench) -> str:
    """The machine, and the accelerator if one is used."""
    device = pick_device(getattr(config, "device", "") or "cpu")
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return machine() if device.type == "cpu" else f"{accelerator}, {machine()}"


def command(name: str, config: Bench) -> str:
    """What measures the same again."""
    plain = type(config)()
    flags = [
        (f.name, getattr(config, f.name))
        for f in fields(config)
        if f.name not in NOT_RESULT and getattr(config, f.name) != getattr(plain, f.name)
    ]
    words = [
        "--"
        + " ".join(
            [
                flag.replace("_", "-"),
                *map(str, value if isinstance(value, list) else [] if value is True else [value]),
            ]
        )
        for flag, value in flags
    ]
    return " ".join(["python bench/bench.py", name, *words])


def started(name: str, config: Bench, again: bool) -> dict:
    """The results so far; raises ValueError, before any work, if they were measured otherwise."""
    path = Path(config.out) / f"{name}.json"
    about = {
        "command": command(name, config),
        "machine": place(config),
        "weights": [base_digest(config.base), base_digest(config.heads)],
    }
    content = read_json(path) if path.exists() and not again else about | {"results": {}}
    for key, value in about.items():
        if content.get(key) != value:
            raise ValueError(
                f"{path} is of another {key}, {content.get(key)} and not {value}: remove it to measure anew, or give another --out"
            )
    return content


def write(
    name: str, config: Bench, content: dict, table: Callable[[dict], str], draw: Callable
) -> None:
    """OUT/name.json, .md and .png, each atomically."""
    folder = Path(config.out)
    write_json(folder / f"{name}.json", content)
    measured = f"`{content['command']}` on {content['machine']}; {', '.join(sorted({result['date'] for result in content['results'].values()}))}."
    text = table(content["results"]) + f"\n\n{measured}\n"
    write_atomically(
        folder / f"{name}.md", lambda temporary: temporary.write_text(text, encoding="utf-8")
    )
    pyplot = need("matplotlib.pyplot")
    figure = draw(content["results"], pyplot)
    figure.tight_layout()
    write_atomically(
        folder / f"{name}.png", lambda temporary: figure.savefig(temporary, dpi=110, format="png")
    )
    pyplot.close(figure)


def measure(
    name: str,
    config: Bench,
    sections: dict[str, Callable[[], dict]],
    table: Callable[[dict], str],
    draw: Callable,
    again: bool = False,
) -> None:
    """The sections that the results lack, or all of them again; what is measured is written at once."""
    if unknown := set(config.only) - sections.keys():
        raise ValueError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(sections)}")
    check_out(config.out)
    need("matplotlib").use("Agg")
    content = started(name, config, again)
    for section in config.only or sections:
        if section not in content["results"]:
            content["results"][section] = sections[section]() | {"date": date.today().isoformat()}
            write(name, config, content, table, draw)
    print(table(content["results"]))
    print(f"\n{Path(config.out) / name}.json, .md and .png")


def read_results(path: str, name: str) -> dict:
    """The file of another subcommand."""
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist: python bench/bench.py {name} writes it")
    content = read_json(Path(path))
    if not isinstance(content.get("results"), dict):
        raise ValueError(f"{path} holds no results of python bench/bench.py {name}")
    return content


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
