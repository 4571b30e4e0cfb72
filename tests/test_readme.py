"""What README.md, bench/README.md and tests/README.md say is looked up, run or compared with what
was measured."""

import ast
import doctest
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from bench import ablations, animation, figures, fuzz
from bench.bench import SUBCOMMANDS
from data import smollm2, turns
from data.command import OneLineParser, add_options
from sample import SampleConfig
from train import MODES
from tree import cartesian_tree

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {}
for file in ("README.md", "bench/README.md", "tests/README.md"):
    DOCUMENTS[file] = (ROOT / file).read_text(encoding="utf-8")
README, ALL = DOCUMENTS["README.md"], "\n".join(DOCUMENTS.values())
FIVE = "tree", "model", "medusa", "train", "sample"
OF_OTHERS = {
    "--nproc-per-node",
    # The official code's names, in the table that maps them to ours.
    *("medusa_choices", "medusa_buffers", "tree_indices", "retrieve_indices"),
    *("evaluate_posterior", "posterior_threshold", "posterior_alpha", "update_inference_inputs"),
}
SCRIPTS = {"sample.py": SampleConfig, "data/smollm2.py": smollm2.Config}
SCRIPTS |= {"data/turns.py": turns.Config, "bench/fuzz.py": fuzz.FuzzConfig}
SCRIPTS |= {"bench/animation.py": animation.AnimationConfig}


def sources(*folders: str) -> list[str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    return [path.read_text(encoding="utf-8") for path in paths]


def definition(file: str, name: str) -> ast.AST:
    node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def results(name: str) -> dict:
    return json.loads((ROOT / f"bench/results/{name}.json").read_text(encoding="utf-8"))["results"]


LINE_LINKS = re.findall(r"\[`([\w.]+)`\]\((?:\.\./)?([\w/]+\.py)#L(\d+)\)", ALL)


@pytest.mark.parametrize("name, file, line", LINE_LINKS)
def test_a_link_to_a_line_leads_to_the_definition(name, file, line):
    assert definition(file, name).lineno == int(line)


@pytest.mark.parametrize("file", DOCUMENTS)
def test_links_lead_to_files_and_sections(file):
    link = r"(?:\]\(|(?:src|srcset)=\")(?!https?:)([^)#\"]*)(?:#([^)]+))?"
    links = re.findall(link, DOCUMENTS[file])
    assert links or file == "tests/README.md"
    for target, anchor in links:
        path = (ROOT / file).parent / target if target else ROOT / file
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            # As GitHub makes them of the document's headings.
            names = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names}
            assert anchor in anchors, (target, anchor)


@pytest.mark.parametrize("module", ["tree", "medusa", "train"])
def test_the_examples_in_docstrings_are_so(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0 and results.failed == 0


def commands() -> list[str]:
    """Every command that runs a script of ours: in a block, a sentence or a table."""
    blocks = re.findall(r"```bash\n(.*?)```", ALL, re.DOTALL)
    prose = re.sub(r"```.*?```", "", ALL, flags=re.DOTALL)
    blocks += re.findall(r"`([^`\n]+)`", prose)
    blocks += re.findall(r"^    (python .*)$", prose, re.MULTILINE)
    text = "\n".join(blocks).replace("\\\n", " ")
    text = re.sub(r"-m data\.(\w+)", r"data/\1.py", text)
    parts = [part.strip() for part in re.split(r"&&|\n", text)]
    return sorted({part for part in parts if re.search(r"\bpython\b.* (\w+/)?\w+\.py\b", part)})


def config_of(script: str, arguments: list[str]) -> type | None:
    """What the flags of a script are made from; None for a script with a parser of its own."""
    if script == "train.py":
        mode = arguments[arguments.index("--mode") + 1] if "--mode" in arguments else "medusa1"
        return MODES[mode][0]
    if script == "bench/bench.py":
        return SUBCOMMANDS[arguments.pop(0)][1]
    return SCRIPTS.get(script)


@pytest.mark.parametrize("command", commands())
def test_a_command_has_flags_and_values_that_its_script_takes(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, arguments = words[at], words[at + 1 :]
    assert (ROOT / script).is_file()
    config = config_of(script, arguments)
    if config is not None:
        parser = OneLineParser()
        parser.add_argument("--mode")
        add_options(parser, config)
        given = vars(parser.parse_args(arguments))
        given.pop("mode")
        config(**given)


def test_every_flag_is_one_of_a_script():
    configs = [*SCRIPTS.values(), *(config for config, _ in MODES.values())]
    configs += [config for _, config in SUBCOMMANDS.values()]
    names = {name for config in configs for name in config.__dataclass_fields__}
    flags = {"--" + name.replace("_", "-") for name in names}
    flags |= {"--no-" + flag[2:] for flag in flags} | {"--mode", "--help"}
    flags |= set(re.findall(r'"(--[\w-]+)"', "".join(sources("bench", "assignments"))))
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", ALL)) - flags - OF_OTHERS


def test_every_name_in_code_type_is_one_of_the_code():
    words = set()
    for source in sources(".", "data", "bench", "tests"):
        for node in ast.walk(ast.parse(source)):
            words |= {value for value in vars(node).values() if isinstance(value, str)}
    names = set(re.findall(r"`([A-Za-z_][\w.]*)`", ALL)) - OF_OTHERS
    unknown = {name for name in names if not set(name.split(".")) <= words}
    assert len(names) > 20
    folders = [(ROOT / file).parent for file in DOCUMENTS]
    assert not {n for n in unknown - words if not any((at / n).exists() for at in folders)}


def test_the_worked_example_is_the_tree_that_is_drawn():
    tree = cartesian_tree([2, 3])
    drawing = [">>> print(cartesian_tree([2, 3]).render())", *tree.render().splitlines()]
    assert "\n".join("    " + line for line in drawing) in README
    rows = ["    text  " + " ".join(map(str, range(len(tree))))]
    for node, row in enumerate(tree.mask.tolist()):
        seen = " ".join("1" if sees else "." for sees in row)
        rows.append(f"    1..1  {seen}   {node}" + (" root" if node == 0 else ""))
    assert "\n".join(rows) in README


def test_the_step_that_is_shown_is_the_step_that_is_run():
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    nodes = ast.walk(definition("medusa.py", "medusa_generate"))
    run = [ast.unparse(node) for node in nodes if isinstance(node, ast.stmt)]
    places = [run.index(ast.unparse(statement)) for statement in ast.parse(shown).body]
    assert len(places) > 4 and places == sorted(places)


def between(mark: str, file: str = "README.md") -> str:
    text, begin, end = DOCUMENTS[file], f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    return text[text.index(begin) + len(begin) : text.index(end)].strip()


def test_the_figures_are_those_that_were_measured():
    measured = json.loads((ROOT / "bench/figures.json").read_text(encoding="utf-8"))
    assert between("figures", "bench/README.md") == figures.table(measured)
    assert between("ladder") == figures.ladder_table(measured)
    runs = measured["ladder"]["result"]
    measured = json.loads((ROOT / "bench/ablations.json").read_text(encoding="utf-8"))
    assert ablations.table(measured["results"]) in between("ablations", "bench/README.md")
    assert between("lessons") == ablations.lessons_table(measured["results"])
    # The first screen has some of them.
    ours, sequential = runs["calibrated tree"], runs["calibrated tree, sequential heads"]
    first = README[: README.index("## ")]
    for figure in (f"{ours['speed-up']:.2f} times", f"{sequential['speed-up']:.2f} times"):
        assert figure in first
    assert f"{ours['identical texts']} of {figures.PROMPTS}" in " ".join(first.split())
    n = sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in FIVE)
    assert f"about {round(n, -2):,} lines" in first


def test_the_prose_says_what_was_measured():
    ways = [results("decode")[rule]["ways"] for rule in ("greedy", "lossless-0.7")]
    plain = ways[0]["transformers"]["ratio"]
    lookup = [max(row["ratio"] for way, row in of.items() if "lookup" in way) for of in ways]
    tree = max(row["ratio"] for way, row in ways[0].items() if "calibrated" in way)
    points = results("typical")["temperature-0.7"]["points"]
    tokens, typical = points["lossless"]["tokens/step"], points["0.09"]
    said = [
        f"plain loop has {plain:.2f} times our plain speed",
        f"(copied guesses) {lookup[0]:.2f}, our tree there {tree:.2f}.",
        f"plain loop has {plain:.2f} of our plain speed, its prompt lookup {lookup[0]:.2f}:",
        f"0.7 lookup has {lookup[1]:.2f}, and",
        f"{typical['tokens/step']:.2f} tokens a step where lossless emits {tokens:.2f}, and",
        f"{typical['total variation']:.2f} (total variation) and {typical['KL']:.2f} nats",
    ]
    words = " ".join(ALL.split())
    assert [sentence for sentence in said if sentence not in words] == []


def test_it_begins_with_the_two_commands():
    assert "\n".join(README.splitlines()[:45]).count("\npython3 -m venv") == 2
