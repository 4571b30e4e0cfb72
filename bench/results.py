"""What the subcommands share: model and prompts; results that a stopped run goes on from."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

from bench.figures import machine
from data.chat import given_turns, split_dialogues
from data.command import check_out, optional, option, pick_device
from data.corpus import documents, packed, windows
from data.rows import base_digest
from data.tokenizer import SHIPPED_BASE, AnyTokenizer, load_base
from medusa import MedusaHeads, check_compatible
from model import GPT, check_sizes, read_json, write_atomically, write_json
from sample import pack_linears
from train import HELD_OUT_ROWS


@dataclass(frozen=True)
class Bench:
    only: list[str] = option([], "sections to measure; default: all that the results lack")
    out: str = option("bench/results", "directory of the results, named after the subcommand")
    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option("data/heads", "directory of the heads and their calibration.json")


@dataclass(frozen=True)
class Decoding(Bench):
    prompts: int = option(6, "held-out prompts")
    prompt_tokens: int = option(64, "tokens of a prompt")
    new_tokens: int = option(96, "tokens decoded after each")

    def __post_init__(self):
        check_sizes(self, ["prompts", "prompt_tokens", "new_tokens"])


need = partial(optional, user="bench/bench.py", file="bench/requirements.txt")


def load(
    config: Bench, device: str = "cpu", dtype: str = "float32", endless: bool = True
) -> tuple[AnyTokenizer, GPT, MedusaHeads]:
    """endless: without an EOS token, so that all texts are equally long."""
    place = pick_device(device), getattr(torch, dtype)
    tokenizer, model = load_base(config.base, place[1], place[0])
    heads = MedusaHeads.from_pretrained(config.heads, place[1], place[0])
    check_compatible(model, heads)
    pack_linears(model)
    if endless:
        model.config = replace(model.config, eos_token_id=None)
    return tokenizer, model, heads


def held_out_prompts(tokenizer: AnyTokenizer, n: int, length: int) -> list[list[int]]:
    """Windows of text that nothing here was trained on."""
    tokens = packed(documents(True), tokenizer)
    return windows(tokens, n, length, torch.Generator().manual_seed(0)).tolist()


def held_out_turns(config, tokenizer: AnyTokenizer, model: GPT) -> list[list[int]]:
    """The last of the held-out user turns; trees were calibrated on the first ones."""
    dialogues, eos_ids = split_dialogues(config.turns)["validation"], model.config.eos_ids
    given = given_turns(dialogues, config.base, tokenizer, eos_ids, config.prompt_tokens)
    held_out, needed = [turns[0] for turns in given], HELD_OUT_ROWS + config.prompts
    if len(held_out) < needed:
        raise ValueError(f"--turns: {len(held_out)} are held out; give turns with {needed} of them")
    return held_out[-config.prompts :]


# ---- results ----

NOT_RESULT = ("only", "out")  # settings that change no result


def place(config: Bench) -> str:
    """The machine, and the accelerator if one is used."""
    device = pick_device(getattr(config, "device", "") or "cpu")
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return machine() if device.type == "cpu" else f"{accelerator}, {machine()}"


def command(name: str, config: Bench) -> str:
    """What measures the same again."""
    words, plain = ["python bench/bench.py", name], type(config)()
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in NOT_RESULT and value != getattr(plain, f.name):
            words.append("--" + f.name.replace("_", "-"))
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def started(name: str, config: Bench, again: bool) -> dict:
    """The results so far. Raises ValueError, before any work, if they were measured otherwise."""
    path = Path(config.out) / f"{name}.json"
    about = {"command": command(name, config), "machine": place(config)}
    about["weights"] = [base_digest(config.base), base_digest(config.heads)]
    content = read_json(path) if path.exists() and not again else about | {"results": {}}
    for key, value in about.items():
        if content.get(key) != value:
            was = f"{path} is of another {key}, {content.get(key)}, not {value}"
            raise ValueError(f"{was}; remove it to measure again, or give another --out")
    return content


def write(name: str, config: Bench, content: dict, table: Callable) -> None:
    """OUT/name.json and .md, each atomically."""
    folder, results = Path(config.out), content["results"]
    write_json(folder / f"{name}.json", content)
    days = ", ".join(sorted({result["date"] for result in results.values()}))
    measured = f"`{content['command']}` on {content['machine']}; {days}."
    text = f"{table(results)}\n\n{measured}\n"
    write_atomically(folder / f"{name}.md", lambda to: to.write_text(text, encoding="utf-8"))


def measure(name: str, config: Bench, sections: dict, table, again: bool = False) -> None:
    """Measure the sections that the results lack (again: all), each written at once."""
    unknown = set(config.only) - sections.keys()
    if unknown:
        raise ValueError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(sections)}")
    check_out(config.out)
    content = started(name, config, again)
    for section in config.only or sections:
        if section not in content["results"]:
            content["results"][section] = sections[section]() | {"date": date.today().isoformat()}
            write(name, config, content, table)
    print(table(content["results"]))
    print(f"\n{Path(config.out) / name}.json and .md")


def read_results(path: str, name: str) -> dict:
    """The file of another subcommand."""
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist: python bench/bench.py {name} writes it")
    content = read_json(Path(path))
    if not isinstance(content.get("results"), dict):
        raise ValueError(f"{path} holds no results of python bench/bench.py {name}")
    return content


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *(map(str, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
