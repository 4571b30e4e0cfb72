"""Laws of the problem sets: what students get holds no answer, and the grader gives every solution what it is worth, whatever it tries.

`pytest -m course` grades all wrong and right solutions of all sets; the default run grades a few of set 1.
"""

import ast
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from solutions import RIGHT, WRONG

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "assignments"))

import build
from sets import BLANKED, SETS

EACH_SET = pytest.mark.parametrize("number", SETS)


def reference(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ---- what students get ----


def functions_of(source: str) -> dict[str, ast.FunctionDef]:
    """Every function by its qualified name."""
    found = {}
    for node in ast.parse(source).body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                found[
                    f"{node.name}.{inner.name}" if isinstance(node, ast.ClassDef) else inner.name
                ] = inner
    return found


@pytest.mark.parametrize("name", build.MODULES)
def test_blanking_leaves_signature_docstring_and_all_other_functions(name):
    before, after = functions_of(reference(name)), functions_of(build.starter(name))
    assert before.keys() == after.keys()
    for function, node in before.items():
        if f"{name.removesuffix('.py')}.{function}" not in BLANKED:
            assert ast.dump(node) == ast.dump(after[function])
            continue
        docstring, body = after[function].body
        assert ast.get_docstring(after[function]) == ast.get_docstring(node) and isinstance(
            body, ast.Raise
        )
        assert ast.dump(node.args) == ast.dump(after[function].args)
        assert list(map(ast.dump, node.decorator_list)) == list(
            map(ast.dump, after[function].decorator_list)
        )
    comments = [line for line in reference(name).splitlines() if line.startswith("#")]
    assert [line for line in build.starter(name).splitlines() if line.startswith("#")] == comments


def test_every_blanked_function_is_found_and_none_twice():
    named = [
        f"{name.removesuffix('.py')}.{function}"
        for name in build.MODULES
        for function in functions_of(reference(name))
    ]
    assert set(BLANKED) <= set(named)
    with pytest.raises(ValueError, match="no function Tree.grow"):
        build.find(ast.parse(reference("tree.py")), "Tree.grow")


COMMONPLACE = {
    "return counts",
    "return Tree(tuple(parents), tuple(ranks))",
    "for node, parent in enumerate(tree.parents[1:], start=1):",
    "if sampling.typical:",
    "if not paths:",
}  # these stand in the tests as well, and tell nothing


@EACH_SET
def test_no_line_of_an_answer_stands_in_what_a_student_gets(number):
    """But for lines that also stand in functions which are given."""
    answers, given = set(), set()
    for name in build.MODULES:
        lines = reference(name).split("\n")
        bodies = {
            i
            for blanked in BLANKED
            if blanked.startswith(name[:-2])
            for i in build.body_lines(reference(name), blanked.partition(".")[2])
        }
        for i, line in enumerate(lines):
            (answers if i in bodies else given).add(line.strip())
    files = build.student_files(number)
    assert not any(
        "__pycache__" in name or ".git" in name or name.startswith(("assignments", "bench", "out"))
        for name in files
    )
    secret = {line for line in answers - given - COMMONPLACE if len(line) > 12}
    assert len(secret) > 90
    for name, content in files.items():
        if name.endswith((".py", ".md", ".txt", ".toml")):
            assert not secret & {line.strip() for line in content.decode().splitlines()}, name


def test_a_set_is_built_whole_or_not_at_all(tmp_path, monkeypatch):
    target = build.build(1, tmp_path)
    assert {path.name for path in target.iterdir()} == {"student", "autograder.zip"} and list(
        tmp_path.iterdir()
    ) == [target]
    assert (target / "student/tests.txt").read_text().splitlines() == [
        f"tests/{test}" for test in SETS[1].tests
    ]
    assert (target / "student/data/trace.html").exists()  # sample.py --trace needs it
    assert "| together | 20 |" in (target / "student/README.md").read_text()
    with pytest.raises(ValueError, match="is there already"):
        build.build(1, tmp_path)
    monkeypatch.setattr(build, "write_archive", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build.build(2, tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_the_table_of_points_names_tests_that_exist_and_adds_up():
    for problem_set in SETS.values():
        assert sum(problem_set.tests.values()) == 20
        for test in problem_set.tests:
            file, name = test.partition("[")[0].split("::")
            assert name in functions_of((ROOT / "tests" / file).read_text(encoding="utf-8"))


# ---- grading ----


def patched(name: str, changes: dict[str, str]) -> str:
    source = reference(name)
    for old, new in changes.items():
        assert source.count(old) == 1, f"{old!r} must stand once in {name}"
        source = source.replace(old, new)
    return source


def rewritten(bodies: dict[str, str]) -> dict[str, str]:
    """The files in which these functions have another body."""
    files = {}
    for function, body in bodies.items():
        module, _, name = function.partition(".")
        source = files.get(f"{module}.py", reference(f"{module}.py"))
        lines, span = source.split("\n"), build.body_lines(source, name)
        indent = " " * build.find(ast.parse(source), name).body[0].col_offset
        lines[span.start : span.stop] = textwrap.indent(
            textwrap.dedent(body).strip("\n"), indent
        ).split("\n")
        files[f"{module}.py"] = "\n".join(lines)
    return files


def grade_all(tmp_path, number: int, submissions: dict[str, dict[str, str]]) -> dict[str, dict]:
    """{name: results.json} of submissions {name: {file: content}}; what is not submitted is the reference's."""
    build.write_archive(tmp_path / "autograder.zip", build.autograder_files(number))
    zipfile.ZipFile(tmp_path / "autograder.zip").extractall(tmp_path / "source")
    arguments = []
    for i, files in enumerate(submissions.values()):
        folder = tmp_path / f"submission{i}"
        folder.mkdir()
        for name, content in (
            {name: reference(name) for name in SETS[number].files} | files
        ).items():
            (folder / name).write_text(content, encoding="utf-8")
        arguments += [str(folder), str(tmp_path / f"results{i}.json")]
    subprocess.run(
        [sys.executable, str(tmp_path / "source/grade.py"), str(number), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {
        name: json.loads((tmp_path / f"results{i}.json").read_text())
        for i, name in enumerate(submissions)
    }


def starter_of(number: int) -> dict[str, str]:
    return {name: build.starter(name) for name in SETS[number].files}


def faults(number: int, results: dict[str, dict]) -> list[str]:
    """Which solutions did not get what they are worth, or not the words that name their mistake."""
    wrong = []
    for name, result in results.items():
        said = "\n".join(test["output"] for test in result["tests"])
        if name in WRONG[number] and (result["score"] >= 20 or WRONG[number][name][2] not in said):
            wrong.append(
                f"{name}: {result['score']} points, and it does not say {WRONG[number][name][2]!r} but:\n{said[:1500]}"
            )
        elif name == "starter" and (result["score"] > 0 or "is yours to write" not in said):
            wrong.append(f"the starter has {result['score']} points: {said[:500]}")
        elif name not in WRONG[number] and name != "starter" and result["score"] != 20:
            wrong.append(f"{name}: only {result['score']} points:\n{said[:1500]}")
    return wrong


def solutions(number: int) -> dict[str, dict[str, str]]:
    found = {"reference": {}, "starter": starter_of(number)}
    found |= {
        name: {file: patched(file, changes)} for name, (file, changes, _) in WRONG[number].items()
    }
    return found | {name: rewritten(bodies) for name, bodies in RIGHT[number].items()}


@EACH_SET
def test_every_solution_is_made_of_what_stands_once_in_the_reference(number):
    made = solutions(number)
    assert len(made) == 2 + len(WRONG[number]) + len(RIGHT[number])
    assert all(
        reference(name) != content for files in made.values() for name, content in files.items()
    )


def test_the_reference_passes_set_1_the_starter_fails_it_and_a_wrong_solution_is_told_why(tmp_path):
    chosen = "reference", "starter", "sibling visible"
    everything = solutions(1)
    results = grade_all(tmp_path, 1, {name: everything[name] for name in chosen})
    assert faults(1, results) == []


@pytest.mark.course
@EACH_SET
def test_every_solution_gets_what_it_is_worth(number, tmp_path):
    results = grade_all(tmp_path, number, solutions(number))
    caught = sum(result["score"] < 20 for name, result in results.items() if name in WRONG[number])
    seconds = [result["execution_time"] for result in results.values()]
    print(
        f"\nset {number}: {caught} of {len(WRONG[number])} wrong solutions caught, {len(RIGHT[number])} others right; grading {max(seconds)} s at most"
    )
    assert faults(number, results) == []
    assert max(seconds) < 60


HIDE = "\nimport os, sys, time, json, glob, socket\n"
CHEATS = {
    "leaves": "os._exit(0)",
    "leaves politely": "sys.exit(0)",
    "never ends": "while True: pass",
    "sleeps": "time.sleep(10**6)",
    "takes all memory": "hog = [bytearray(1 << 28) for _ in range(12)]",
    "forks": "[os.fork() for _ in range(3)]",
    "kills": "os.kill(os.getppid(), 9)",
    "prints points": "print(json.dumps({'score': 20, 'tests': [{'score': 20, 'max_score': 20}]}), flush=True)",
    "patches pytest": "import _pytest.python, torch\n_pytest.python.Function.runtest = lambda self: None\ntorch.equal = lambda *a: True\n",
    "equals everything": """
class Yes(tuple):
    dtype = torch.bool
    def __eq__(self, other): return True
    def __getattr__(self, name): return self
    def __call__(self, *a): return self
    def __getitem__(self, i): return self
for name in ("depths", "paths", "mask"):
    setattr(Tree, name, property(lambda self: Yes()))
""",
    "raises Skipped": "import _pytest.outcomes\nTree.mask = Tree.depths = Tree.paths = property(lambda self: (_ for _ in ()).throw(_pytest.outcomes.Skipped('x')))",
    "reads the reference": """
for line in glob.glob("/proc/[0-9]*/cmdline"):
    for word in open(line).read().split("\\0"):
        if word.endswith(("grade.py", "sandbox.py")):
            for path in (os.path.dirname(word) + "/project/tree.py", os.path.dirname(word) + "/../project/tree.py"):
                try:
                    exec(open(path).read(), globals())
                except OSError:
                    pass
""",
    "writes results": """
for line in glob.glob("/proc/[0-9]*/cmdline"):
    words = open(line).read().split("\\0")
    for word in words:
        if word.endswith(".json") and any(other.endswith("grade.py") for other in words):
            try:
                open(word, "w").write('{"score": 20, "tests": []}')
            except OSError:
                pass
""",
    "answers unasked": """
import struct
text = json.dumps({"kind": "return", "value": None, "state": [], "storages": []}).encode()
for descriptor in range(3, 64):
    try:
        socket.socket(fileno=os.dup(descriptor)).sendall(struct.pack("<II", len(text), 0) + text)
    except OSError:
        pass
""",
}


@pytest.mark.course
def test_no_trick_earns_a_point(tmp_path):
    submissions = {
        name: {"tree.py": build.starter("tree.py") + HIDE + trick} for name, trick in CHEATS.items()
    }
    more = {
        "conftest.py": "import pytest\n@pytest.hookimpl(wrapper=True)\ndef pytest_runtest_call(item):\n    try: yield\n    except BaseException: pass\n"
    }
    submissions["brings a conftest"] = (
        {"tree.py": build.starter("tree.py")}
        | more
        | {"torch.py": "", "pytest.ini": "[pytest]\naddopts = --co"}
    )
    submissions["honest"] = {}
    results = grade_all(tmp_path, 1, submissions)
    scores = {name: result["score"] for name, result in results.items()}
    if os.geteuid() != 0:  # then it says how far it can be trusted
        assert all("not graded as root" in result["output"] for result in results.values())
        scores.pop("reads the reference")
    assert scores == dict.fromkeys(scores, 0) | {"honest": 20}
    assert all(result["execution_time"] < 60 for result in results.values())


@pytest.mark.course
def test_a_link_to_the_reference_is_not_taken(tmp_path):
    sys.path.insert(0, str(ROOT / "assignments"))
    import grade

    (tmp_path / "tree.py").symlink_to(ROOT / "tree.py")
    with pytest.raises(OSError):
        grade.read_plain(tmp_path / "tree.py")
    os.mkfifo(tmp_path / "model.py")
    with pytest.raises(ValueError, match="no plain file"):
        grade.read_plain(tmp_path / "model.py")


@pytest.mark.course
def test_an_endless_loop_or_a_broken_module_costs_its_own_points_alone(tmp_path):
    loop = rewritten({"tree.Tree.depths": "        while True:\n            pass"})
    result = grade_all(tmp_path, 1, {"loop": loop})["loop"]
    assert result["score"] == 14 and result["execution_time"] < 60
    assert any("still running" in test["output"] for test in result["tests"])
    (tmp_path / "more").mkdir()
    broken = grade_all(tmp_path / "more", 6, {"broken": {"medusa.py": "def broken(:\n"}})["broken"]
    assert broken["score"] == 6 and any("SyntaxError" in test["output"] for test in broken["tests"])
