"""Properties of the problem sets: what students get holds no answer, and grades are right.

`pytest -m course` grades all solutions of all sets; the default run grades a few of set 1.
"""

import ast
import csv
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from solutions import RIGHT, WRONG
from strategies import refused

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "assignments"))

import build
import grade
import wire
from sets import BLANKED, HIDDEN, SETS, sets_of

EACH_SET = pytest.mark.parametrize("number", SETS)


def reference(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ---- what students get ----
def blanked(name: str) -> list[str]:
    """The functions of a module that students get blank."""
    every = [*BLANKED, *HIDDEN]
    return [function.partition(".")[2] for function in every if function.startswith(name[:-2])]


@pytest.mark.parametrize("name", build.MODULES)
def test_blanking_leaves_signature_docstring_and_all_other_functions(name):
    before, after = ast.parse(reference(name)), ast.parse(build.starter(name))
    for function in blanked(name):
        body = build.find(after, function).body
        assert len(body) == 2 and isinstance(body[1], ast.Raise)
        build.find(before, function).body[1:] = body[1:]
    assert ast.dump(before) == ast.dump(after)


# These are in the tests as well, and tell nothing.
COMMONPLACE = {"return Tree(tuple(parents), tuple(ranks))", "for node in range(1, len(tree)):"}


@EACH_SET
def test_no_line_of_an_answer_is_in_what_a_student_gets(number):
    """But for lines that are also in functions which are given."""
    answers, given = set(), set()
    for name in build.MODULES:
        source = reference(name)
        spans = [build.body_lines(source, function) for function in blanked(name)]
        for i, line in enumerate(source.split("\n")):
            (answers if any(i in span for span in spans) else given).add(line.strip())
    secret = {line for line in answers - given - COMMONPLACE if len(line) > 20}
    assert len(secret) > 90
    for name, content in build.student_files(number).items():
        assert not name.startswith((".git", "assignments", "bench", "out")), name
        if name.endswith((".py", ".md", ".txt", ".toml")):
            assert not secret & {line.strip() for line in content.decode().splitlines()}, name


def test_a_set_is_built_whole_or_not_at_all(tmp_path, monkeypatch):
    target = build.build(1, tmp_path)
    assert {path.name for path in target.iterdir()} == {"student", "autograder.zip"}
    tests = (target / "student/tests.txt").read_text().splitlines()
    assert tests == [f"tests/{test}" for test in SETS[1].tests]
    assert (target / "student/data/trace.html").exists()  # sample.py --trace needs it
    assert "| together | 20 |" in (target / "student/README.md").read_text()
    refused("is there already", build.build, 1, tmp_path)
    monkeypatch.setattr(build, "write_archive", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build.build(2, tmp_path)
    assert list(tmp_path.iterdir()) == [target]


@EACH_SET
def test_the_table_of_points_names_tests_that_exist_and_adds_up(number):
    assert sum(SETS[number].tests.values()) == 20
    for test in SETS[number].tests:
        file, name = test.partition("[")[0].split("::")
        assert f"def {name}(" in reference(f"tests/{file}"), test


@pytest.mark.course
@EACH_SET
def test_who_has_solved_the_sets_so_far_can_run_all_that_the_handout_names(number, tmp_path):
    """Of a function that a later set extends, only what this set asks for."""
    bodies = {name: body for right in RIGHT[number].values() for name, body in right.items()}
    files = rewritten({name: bodies[name] for name in bodies if max(sets_of(name)) > number})
    later = [function for function in BLANKED if min(sets_of(function)) > number]
    for name in build.MODULES:
        files[name] = build.blank(files.get(name, reference(name)), name[:-3], later)
    files = {name: source.encode() for name, source in files.items()}
    build.write_folder(tmp_path, build.student_files(number) | files)
    commands = set(re.findall("python ([^`\\n]+)", (tmp_path / "README.md").read_text()))
    assert "-m pytest -q @tests.txt" in commands
    for command in commands:
        subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True)


# ---- grading ----
def test_a_layer_that_crosses_is_the_very_leaf_that_gradients_are_asked_of():
    encoder = wire.Encoder(None)
    content = encoder.encode(torch.nn.Linear(2, 3, bias=False))
    storages = [[storage.nbytes(), None] for storage in encoder.storages]
    decoder = wire.Decoder(None, storages, b"".join(bytes(s.tolist()) for s in encoder.storages))
    layer = decoder.decode(content)
    assert layer.weight is decoder.tracked[0] and layer.weight.shape == (3, 2)


def patched(number: int, changes) -> dict[str, str]:
    """The files of a set, each text (its first, third, ...) replaced by the one after it."""
    files = {name: reference(name) for name in SETS[number].files}
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        counts = {name: source.count(old) for name, source in files.items()}
        assert sum(counts.values()) == 1, f"{old!r} must be there once: {counts}"
        files = {name: source.replace(old, new) for name, source in files.items()}
    return files


def without(number: int, functions) -> dict[str, str]:
    """The files of a set in which these functions are blank."""
    names = SETS[number].files
    return {name: build.blank(reference(name), name[:-3], functions) for name in names}


def rewritten(bodies: dict[str, str]) -> dict[str, str]:
    """The files in which these functions have another body."""
    files = {}
    for function, body in bodies.items():
        module, _, name = function.partition(".")
        source = files.get(f"{module}.py", reference(f"{module}.py"))
        lines, span = source.split("\n"), build.body_lines(source, name)
        lines[span.start : span.stop] = body.strip("\n").split("\n")
        files[f"{module}.py"] = "\n".join(lines)
    return files


def solutions(number: int) -> dict[str, dict[str, str]]:
    """{name: {file: content}}; what is not there is the reference's.

    This set alone: of the others nothing is written.
    """
    ours = SETS[number].functions
    found = {"this set alone": without(number, [name for name in BLANKED if name not in ours])}
    found |= {f"no {name}": without(number, [name]) for name in ours}
    found["starter"] = without(number, BLANKED)
    found |= {name: patched(number, entry[1:]) for name, entry in WRONG[number].items()}
    return found | {name: rewritten(bodies) for name, bodies in RIGHT[number].items()}


def unpack(number: int, folder: Path) -> list[str]:
    """The command that grades this set."""
    build.write_archive(folder / "autograder.zip", build.autograder_files(number))
    zipfile.ZipFile(folder / "autograder.zip").extractall(folder / "source")
    return [sys.executable, str(folder / "source/grade.py"), str(number)]


def grade_all(tmp_path, number: int, submissions, hurry: bool = False) -> dict[str, dict]:
    """{name: results.json} of submissions, {name: files}; hurry: a tenth of the time is enough."""
    command = unpack(number, tmp_path)
    if hurry:
        script = tmp_path / "source/grade.py"
        script.write_text(script.read_text().replace("PASSING = 40.0, 78.0", "PASSING = 4.0, 16.0"))
    results = {name: tmp_path / f"results{i}.json" for i, name in enumerate(submissions)}
    for name, files in submissions.items():
        files = {file: reference(file) for file in SETS[number].files} | files
        folder = results[name].with_suffix("")
        build.write_folder(folder, {file: source.encode() for file, source in files.items()})
        command += [str(folder), str(results[name])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {name: json.loads(path.read_text()) for name, path in results.items()}


def faults(number: int, results: dict[str, dict]) -> list[str]:
    """Which solutions did not get what they are worth, or not the words that name their mistake."""
    words = {name: entry[0] for name, entry in WRONG[number].items()}
    words |= {f"no {name}": f"{name} is yours to write" for name in SETS[number].functions}
    words["starter"] = "is yours to write"
    found = []
    for name, result in results.items():
        said, score = "\n".join(test["output"] for test in result["tests"]), result["score"]
        most = 0 if name == "starter" else 19
        right = (score <= most and words[name] in said) if name in words else score == 20
        if not right:
            found.append(f"{name}: {score} points, {words.get(name)!r} is not in:\n{said[:1500]}")
    return found


@EACH_SET
def test_every_solution_is_made_of_what_is_once_in_the_reference(number):
    for name, files in solutions(number).items():
        changed = [file for file, content in files.items() if content != reference(file)]
        assert changed, name


def test_the_reference_passes_set_1_the_starter_fails_it_and_a_wrong_solution_is_told_why(tmp_path):
    everything, chosen = solutions(1), ("this set alone", "starter", "sibling visible")
    assert faults(1, grade_all(tmp_path, 1, {name: everything[name] for name in chosen})) == []


@EACH_SET
def test_what_the_tests_of_a_set_import_comes_with_it(number):
    there = set(build.project_files(build.test_files(number)))
    for name in sorted(name for name in there if name.startswith("tests/")):
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
            path = f"tests/{getattr(node, 'module', '')}.py"
            assert path in there or not (ROOT / path).exists(), f"{name} imports {path}"


@pytest.mark.course
@EACH_SET
def test_every_solution_gets_what_it_is_worth(number, tmp_path):
    results = grade_all(tmp_path, number, solutions(number))
    assert "\n".join(faults(number, results)) == ""
    assert max(result["execution_time"] for result in results.values()) < 90


IMPORTS = "\nimport os, sys, time, json, glob, socket, struct\nfrom contextlib import suppress\n"
CHEATS = {
    "leaves": "os._exit(0)",
    "never ends": "while True: pass",
    "sleeps": "time.sleep(10**6)",
    "takes all memory": "hog = [bytearray(1 << 28) for _ in range(12)]",
    "forks": "[os.fork() for _ in range(3)]",
    "kills": "os.kill(-1, 9)",
    "prints points": "print(json.dumps({'score': 20, 'tests': [{'score': 20}]}), flush=True)",
    "patches pytest": "import _pytest.python\n_pytest.python.Function.runtest = lambda self: None",
    "raises Skipped": "import pytest\nTree.paths = Tree.mask = property(lambda _: pytest.skip())",
    "equals everything": """
class Yes(tuple):
    dtype, __eq__ = torch.bool, lambda *_: True
    __getattr__ = __call__ = __getitem__ = lambda self, *_: self
Tree.mask = Tree.depths = Tree.paths = property(lambda _: Yes())
""",
    "answers unasked": """
text = json.dumps({"kind": "return", "value": None, "state": [], "storages": []}).encode()
for descriptor in range(3, 64):
    with suppress(OSError):
        socket.socket(fileno=os.dup(descriptor)).sendall(struct.pack("<II", len(text), 0) + text)
""",
    "answers byte by byte": """
def drip(tree):
    for descriptor in range(3, 64):
        with suppress(OSError):
            line = socket.socket(fileno=os.dup(descriptor))
            line.send(struct.pack("<II", 1 << 20, 0))
            while True:
                line.send(b" ")
                time.sleep(0.01)
Tree.mask = Tree.depths = Tree.paths = property(drip)
""",
    "asks without end": """
def ask(tree):
    while True:
        cartesian_tree((2, 2))
Tree.mask = Tree.depths = Tree.paths = property(ask)
""",
    "asks for too much": """
def ask(tree):
    while True:
        with suppress(Exception):
            cartesian_tree((1000, 1000, 1000))
Tree.mask = Tree.depths = Tree.paths = property(ask)
""",
    "looks around": """
for name in ("/tmp", "left"):
    with suppress(OSError):
        os.mkdir(name)
with suppress(OSError):
    os.symlink("/", "link")
raise RuntimeError("there are", sorted(os.listdir("/")), os.path.exists("/proc"))
""",
}


@pytest.mark.course
def test_no_trick_scores_a_point_takes_long_or_much_or_sees_anything(tmp_path):
    starter = build.starter("tree.py")
    submissions = {name: {"tree.py": starter + IMPORTS + code} for name, code in CHEATS.items()}
    more = {"conftest.py": "def pytest_runtest_call(item): item.runtest = lambda: None\n"}
    more |= {"torch.py": "", "pytest.ini": "[pytest]\naddopts = --co"}
    submissions["brings a conftest"] = {"tree.py": starter} | more
    results = grade_all(tmp_path, 1, submissions, hurry=True)
    scores = {name: result["score"] for name, result in results.items()}
    assert scores == dict.fromkeys(scores, 0)
    if os.geteuid() == 0:
        folder = "('there are', ['medusa.py', 'model.py', 'tree.py'], False)"
        assert all(folder in test["output"] for test in results["looks around"]["tests"])
    else:  # then it says how far it can be trusted
        assert all("not graded as root" in result["output"] for result in results.values())
    assert all(result["execution_time"] < 16 + 10 for result in results.values())
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1 << 20  # KiB: half of 2 GiB


def test_a_link_to_the_reference_is_not_taken(tmp_path):
    (tmp_path / "tree.py").symlink_to(ROOT / "tree.py")
    with pytest.raises(OSError):
        grade.read_plain(tmp_path, "tree.py")
    os.mkfifo(tmp_path / "model.py")
    refused("no plain file", grade.read_plain, tmp_path, "model.py")
    (tmp_path / "link").symlink_to(ROOT)
    refused("the submission is a link", grade.read_plain, tmp_path / "link", "tree.py")


def test_a_grader_that_cannot_grade_says_why_in_a_line(tmp_path, monkeypatch):
    command, good = unpack(2, tmp_path)[:-1], str(tmp_path / "results.json")
    (tmp_path / "ada").mkdir()
    ada, none = str(tmp_path / "ada"), str(tmp_path / "none")
    refused("not an unpacked autograder.zip", grade.asked_for, ["2", ada, good])
    monkeypatch.setattr(grade, "HERE", tmp_path / "source")
    for words, says in (
        (["2", ada], "usage: "),
        (["2", "--class", ada, good, ada, good], "usage: "),
        (["3", ada, good], "this autograder.zip is that of set 2, and not of 3"),
        (["2", ada, f"{none}/ada.json"], f"{none}: not a directory that can be"),
        (["2", none, good], f"{none}: no such directory"),
        (["2", ada, ada], f"{ada}: is a directory; name a file"),
        (["2", "--class", ada, none], f"{none}: not a directory that can be"),
    ):
        refused(f"^{says}", grade.asked_for, words)
    (tmp_path / "source/project/tests/test_golden.py").unlink()
    for words, says in (([], "usage: "), (["2", ada, good], f"not graded: {ada}")):
        done = subprocess.run([*command, *words], capture_output=True, text=True)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith(f"grade.py: {says}"), done.stderr


@pytest.mark.course
def test_a_class_is_graded_into_a_table(tmp_path):
    handed_in, results = tmp_path / "handed-in", tmp_path / "results"
    results.mkdir()
    build.write_folder(handed_in / "ada", {"tree.py": reference("tree.py").encode()})
    (handed_in / "emmy").mkdir()
    (handed_in / "eve").symlink_to(ROOT)
    command = [*unpack(1, tmp_path), "--class", str(handed_in), str(results)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    head, *rows = csv.reader((results / "set1.csv").read_text().splitlines())
    assert head[:2] == ["submission", "score"] and head[-1] == "output" and len(head) == 9
    assert [row[:2] for row in rows] == [["ada", "20"], ["emmy", "0"], ["eve", "0"]]
    assert "No such file" in rows[1][-1] and "the submission is a link" in rows[2][-1]
    assert json.loads((results / "ada.json").read_text())["score"] == 20


@pytest.mark.course
def test_an_endless_loop_or_a_broken_module_costs_its_own_points_alone(tmp_path):
    loop = rewritten({"tree.Tree.depths": "        while True:\n            pass"})
    result = grade_all(tmp_path, 1, {"loop": loop})["loop"]
    assert result["score"] == 12 and result["execution_time"] < 90
    assert "still running" in str(result["tests"])
    (tmp_path / "more").mkdir()
    broken = grade_all(tmp_path / "more", 7, {"broken": {"medusa.py": "def broken(:\n"}})["broken"]
    assert broken["score"] == 5 and "SyntaxError" in str(broken["tests"])
