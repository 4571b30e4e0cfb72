"""What a student gets and what Gradescope gets, made of the project's own modules and tests.

    python assignments/build.py --out out/course        all sets
    python assignments/build.py 3 --out out/course      one set

out/course/set3/student is handed out: the handout, the five modules with the functions of all sets
blanked, the tests of the set. out/course/set3/autograder.zip goes to Gradescope: the grader, the
project, and what a student starts from. Nothing here is kept twice.
"""

import ast
import os
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assignments")]

from sets import BLANKED, HIDDEN, SETS, sets_of  # noqa: E402

from data.command import OneLineParser, run  # noqa: E402

MODULES = ["tree.py", "model.py", "medusa.py", "train.py", "sample.py"]
GRADER = ["grade.py", "sandbox.py", "wire.py", "sets.py"]
SETUP = """#!/usr/bin/env bash
set -euo pipefail
apt-get update && apt-get install -y python3 python3-venv  # 3.11 or newer
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install -q -r /autograder/source/requirements.txt
"""
RUN = """#!/usr/bin/env bash
cd /autograder
exec timeout -k 5 300 venv/bin/python source/grade.py {number} submission results/results.json
"""


# ---- blanking ----


def find(module: ast.Module, name: str) -> ast.FunctionDef:
    """The function of this name, `function` or `Class.function`."""
    node = module
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == part), None)
        if node is None:
            raise ValueError(f"no function {name} to blank")
    if ast.get_docstring(node) is None:
        raise ValueError(f"{name} has no docstring: nothing would tell a student what to write")
    return node


def body_lines(source: str, name: str) -> range:
    """The lines of its body below the docstring, counted from 0."""
    node = find(ast.parse(source), name)
    return range(node.body[0].end_lineno, node.end_lineno)


def blank(source: str, module: str, functions: list[str]) -> str:
    """The source with the bodies of these functions gone: signature and docstring stay."""
    lines = source.split("\n")
    names = [name for name in functions if name.startswith(module + ".")]
    for name in sorted(names, key=lambda name: -body_lines(source, name.partition(".")[2]).start):
        body = body_lines(source, name.partition(".")[2])
        numbers = " and ".join(map(str, sets_of(name)))
        says = f"set {numbers}: {name} is yours to write" if numbers else f"no set has {name}"
        indent = " " * find(ast.parse(source), name.partition(".")[2]).body[0].col_offset
        lines[body.start : body.stop] = [f'{indent}raise NotImplementedError("{says}")']
    return "\n".join(lines)


def starter(name: str) -> str:
    source = (ROOT / name).read_text(encoding="utf-8")
    return blank(source, name.removesuffix(".py"), [*BLANKED, *HIDDEN])


# ---- assembling: {path: content} ----


def project_files(tests: list[str]) -> dict[str, bytes]:
    """What the modules and these tests need around them."""
    names = ["requirements.txt", "pyproject.toml"]
    names += [f"tests/{name}" for name in ("conftest.py", "strategies.py", *tests)]
    names += [f"data/{path.name}" for path in (ROOT / "data").iterdir() if path.is_file()]
    return {name: (ROOT / name).read_bytes() for name in names}


def points_table(number: int) -> str:
    rows = [f"| {title(test)} | {points} |" for test, points in SETS[number].tests.items()]
    head = ["## Points", "", "| what is tested | points |", "|---|---|"]
    total = f"| together | {sum(SETS[number].tests.values())} |"
    return "\n".join([*head, *rows, total, ""])


def title(test: str) -> str:
    """test_tree.py::test_a_property[case] -> a property"""
    return test.partition("::test_")[2].partition("[")[0].replace("_", " ")


def test_files(number: int) -> list[str]:
    return sorted({test.partition("::")[0] for test in SETS[number].tests})


def student_files(number: int) -> dict[str, bytes]:
    files = project_files(test_files(number))
    files |= {name: starter(name).encode() for name in MODULES}
    parts = [
        (ROOT / f"assignments/{name}.md").read_text("utf-8") for name in (f"set{number}", "every")
    ]
    files["README.md"] = "\n".join([*parts, points_table(number)]).encode()
    files["tests.txt"] = "".join(f"tests/{test}\n" for test in SETS[number].tests).encode()
    # The weights, so that sample.py runs on what a student wrote.
    for path in [*(ROOT / "data/base").iterdir(), *(ROOT / "data/heads").iterdir()]:
        files[str(path.relative_to(ROOT))] = path.read_bytes()
    return files


def autograder_files(number: int) -> dict[str, bytes]:
    project = project_files(test_files(number))
    project |= {name: (ROOT / name).read_bytes() for name in MODULES}
    files = {f"project/{name}": content for name, content in project.items()}
    files |= {f"starter/{name}": starter(name).encode() for name in MODULES[:3]}
    files |= {name: (ROOT / "assignments" / name).read_bytes() for name in GRADER}
    files["set"] = str(number).encode()
    files["requirements.txt"] = project["requirements.txt"]
    files["setup.sh"] = SETUP.encode()
    files["run_autograder"] = RUN.format(number=number).encode()
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    """The same files give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            info = zipfile.ZipInfo(name)
            mode = 0o100755 if name in ("setup.sh", "run_autograder") else 0o100644
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)


def build(number: int, out: Path) -> Path:
    """Write out/setN, whole or not at all; returns it."""
    target = out / f"set{number}"
    if target.exists():
        raise ValueError(f"{target} is there already: remove it, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as temporary:
        folder = Path(temporary) / "set"
        write_folder(folder / "student", student_files(number))
        write_archive(folder / "autograder.zip", autograder_files(number))
        os.replace(folder, target)
    return target


def main() -> None:
    parser = OneLineParser(description=__doc__)
    sets = {"nargs": "?", "type": int, "choices": sorted(SETS)}
    parser.add_argument("set", **sets, help="1 to 7; all unless given")
    parser.add_argument("--out", required=True, type=Path, help="directory for set1, set2 ...")
    arguments = parser.parse_args()
    for number in [arguments.set] if arguments.set else SETS:
        target = build(number, arguments.out)
        print(f"{target}/student and {target}/autograder.zip: {SETS[number].title}")


if __name__ == "__main__":
    run(main)
