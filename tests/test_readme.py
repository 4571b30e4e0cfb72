"""The README says what is so: its names, lines, commands, drawings and figures are looked up, run or measured."""

import ast
import doctest
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from bench import ablations, figures
from bench.bench import SUBCOMMANDS
from data.command import OneLineParser, add_options
from data.turns import Config as TurnsConfig
from medusa import medusa_generate
from sample import SampleConfig
from train import MODES
from tree import cartesian_tree

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()


def definition(file: str, name: str) -> ast.AST:
    node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


@pytest.mark.parametrize(
    "name, file, line", re.findall(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)", README)
)
def test_a_link_to_a_line_leads_to_the_definition(name, file, line):
    assert definition(file, name).lineno == int(line)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README))))
def test_a_link_to_a_file_leads_to_one(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize(
    "file, laws", re.findall(r"^- `(tests/test_\w+\.py)`: (.*)\.$", README, re.M)
)
def test_the_laws_are_tests_of_these_names_in_this_order(file, properties):
    names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.M)
    places = [names.index("test_" + law.replace(" ", "_")) for law in properties.split("; ")]
    assert places == sorted(places)


@pytest.mark.parametrize("module", ["tree", "medusa", "train", "data.difference"])
def test_the_examples_in_docstrings_are_so(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0 and results.failed == 0


def commands() -> list[str]:
    """Every command of the README, whole or in a sentence; `...` stands for what a reader adds."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    inline = re.findall(
        r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    ) + re.findall(r"^    (python .*)$", README, re.MULTILINE)
    parts = [
        part
        for text in ["\n".join(blocks), *inline]
        for line in text.splitlines()
        for part in line.split("#")[0].split("&&")
    ]
    return sorted(
        {part.strip() for part in parts if re.search(r"\bpython\b.* (\w+/)?\w+\.py\b", part)}
    )


@pytest.mark.parametrize("command", commands())
def test_a_command_has_flags_and_values_that_its_script_takes(command):
    words = shlex.split(command.partition(" > ")[0])
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, arguments = words[at], [word for word in words[at + 1 :] if word != "..."]
    assert (ROOT / script).is_file()
    parser = OneLineParser()
    if script == "train.py":
        if "MODE" in arguments:  # a placeholder
            return
        parser.add_argument("--mode", default="medusa1")
        mode = arguments[arguments.index("--mode") + 1] if "--mode" in arguments else "medusa1"
        config = MODES[mode]
    elif script == "bench/bench.py":
        config = SUBCOMMANDS[arguments.pop(0)][1]
    elif script == "sample.py":
        config = SampleConfig
    else:
        return
    add_options(parser, config)
    given = vars(parser.parse_args(arguments))
    given.pop("mode", None)
    config(**given)


def test_every_flag_is_one_of_a_script():
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in (".", "data", "bench", "assignments")
        for path in (ROOT / folder).glob("*.py")
    )
    flags = {
        "--" + name.replace("_", "-")
        for config in (
            SampleConfig,
            TurnsConfig,
            *MODES.values(),
            *(c for _, c in SUBCOMMANDS.values()),
        )
        for name in config.__dataclass_fields__
    }
    flags |= (
        {"--mode", "--help"}
        | {"--no-" + flag[2:] for flag in flags}
        | set(re.findall(r'"(--[\w-]+)"', sources))
    )
    of_others = {"--nproc-per-node"}
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - flags - of_others
    assert not unknown


def test_every_name_in_code_type_is_one_of_the_code():
    words = set()
    for path in (
        path for folder in (".", "data", "bench", "tests") for path in (ROOT / folder).glob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words |= {value for value in vars(node).values() if isinstance(value, str)}
    names = re.findall(r"`([A-Za-z_][\w.]*)`", README)
    assert len(names) > 20
    unknown = [
        name
        for name in names
        if not (ROOT / name).exists() and name not in words and not set(name.split(".")) <= words
    ]
    assert not unknown


def test_the_worked_example_is_the_tree_that_is_drawn():
    tree = cartesian_tree([2, 3])
    assert sum(depth == 2 for depth in tree.depths) == 6
    assert (
        "\n".join(
            "    " + line
            for line in [">>> print(cartesian_tree([2, 3]).render())", *tree.render().splitlines()]
        )
        in README
    )
    rows = ["    text  " + " ".join(map(str, range(len(tree))))]
    for node, row in enumerate(tree.mask.tolist()):
        rows.append(
            "    1..1  "
            + " ".join("1" if seen else "." for seen in row)
            + f"   {node}"
            + (" root" if node == 0 else "")
        )
    assert "\n".join(rows) in README


def test_the_step_that_is_shown_is_the_step_that_is_run():
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].splitlines()
    loop = definition("medusa.py", medusa_generate.__name__)
    run = {
        ast.unparse(statement) for statement in ast.walk(loop) if isinstance(statement, ast.stmt)
    }
    assert len(shown) == 5
    assert all(ast.unparse(ast.parse(line)) in run for line in shown)


def between(begin: str, end: str) -> str:
    return README[README.index(begin) + len(begin) : README.index(end)]


def test_the_figures_are_those_that_were_measured():
    assert between("<!-- figures -->", "<!-- end of figures -->").strip() == figures.table(
        json.loads((ROOT / "bench/figures.json").read_text())
    )
    assert ablations.table(
        json.loads((ROOT / "bench/ablations.json").read_text())["results"]
    ) in between("<!-- ablations -->", "<!-- end of ablations -->")
    memory = json.loads((ROOT / "bench/memory.json").read_text())
    assert (
        f"{memory['chunks']['ratio']:.2f} times the memory" in README
        and f"without chunks at {memory['all at once']['ratio']:.2f} times" in README
    )


def test_it_is_short_and_begins_with_the_two_commands():
    assert len(LINES) <= 400
    assert sum(line.startswith("python3 -m venv") for line in LINES[:45]) == 2
