"""Grade one submission:  python grade.py SET SUBMISSION RESULTS   (from an unpacked autograder.zip)

The project's tests run in this process, against the project's own modules, in which the functions of the set are stand-ins that
ask a process of the student's (sandbox.py), which runs as another user with limits. What passes is decided and written here:
RESULTS is Gradescope's results.json, rewritten after every test, so that no death leaves less than what was earned.
"""
import importlib
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import Phase, settings

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import wire  # noqa: E402
from sets import BLANKED, SETS, ProblemSet  # noqa: E402

SECONDS = 45.0  # for all tests of a submission together
MOST_SOURCE = 1 << 20  # bytes of a student's file
MOST_OUTPUT = 3000  # characters of a message


class OutOfTime(wire.Gone):
    pass


# ---- the student's process ----


def lay_out(folder: Path, submission: Path, files: list[str]) -> list[str]:
    """The starter's modules, and over them the student's. Returns what is wrong with the submission, in words."""
    for path in (HERE / "starter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    complaints = []
    for name in files:
        try:
            (folder / name).write_bytes(read_plain(submission / name))
        except (OSError, ValueError) as error:
            complaints.append(f"{name} was not taken, the starter's stands in for it: {getattr(error, 'strerror', None) or error}")
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(0o755)
    return complaints


def read_plain(path: Path) -> bytes:
    """The content of a regular file. A link could lead to the reference."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no plain file")
        content = file.read(MOST_SOURCE + 1)
    if len(content) > MOST_SOURCE:
        raise ValueError(f"it has more than {MOST_SOURCE} bytes")
    return content


class Sandbox:
    """The process that forks one child a test, and the line to the present child."""

    def __init__(self, folder: Path, number: int):
        self.functions = {}  # what the student's process may ask for
        self.control, theirs = socket.socketpair()
        environment = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "HOME": str(folder), "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(HERE / "sandbox.py"), str(theirs.fileno()), str(folder), str(number)],
            pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self.peer = self.pid = None
        self.running = False

    def line(self) -> wire.Peer:
        """The line to the child of the running test, which starts when it is first asked something."""
        if not self.running:
            raise RuntimeError("a function of the set was called outside of a test")
        if self.peer is None:
            ours, theirs = socket.socketpair()
            socket.send_fds(self.control, [b"f"], [theirs.fileno()])
            theirs.close()
            self.pid = struct.unpack("<I", self.control.recv(4))[0]
            self.peer = wire.Grader(ours, self.functions)
        return self.peer

    def start(self) -> None:
        if self.process.poll() is None and self.control.recv(5) != b"ready":
            raise RuntimeError("the process for the student's code did not start")

    def end_test(self) -> None:
        self.running = False
        if self.peer is not None:
            self.peer.sock.close()
            os.killpg(self.pid, signal.SIGKILL)
            self.peer = None

    def close(self) -> None:
        self.control.close()
        self.process.wait(10)


# ---- the tests ----


@dataclass
class Entry:
    """A line of the table of points: one test with all its cases. seconds: what they may still take."""

    name: str
    points: int
    seconds: float
    passed: int = 0
    messages: list[str] = field(default_factory=list)

    def result(self, number: str) -> dict:
        right = self.passed > 0 and not self.messages
        shown = {"name": self.name, "number": number, "score": self.points if right else 0, "max_score": self.points, "visibility": "visible"}
        return shown | {"status": "passed" if right else "failed", "output": "" if right else (self.messages or ["was not run"])[0][:MOST_OUTPUT]}


class Referee:
    """Runs each test against a new child of the sandbox, and writes down what it was worth."""

    def __init__(self, problem_set: ProblemSet, number: int, sandbox: Sandbox, results: Path, complaints: list[str]):
        self.number, self.sandbox, self.results, self.complaints, self.began = number, sandbox, results, complaints, time.monotonic()
        share = SECONDS / len(problem_set.tests)
        self.entries = {test: Entry(words(test), points, share) for test, points in problem_set.tests.items()}
        self.write()

    def entry(self, nodeid: str) -> Entry:
        return next(entry for test, entry in self.entries.items() if nodeid.removeprefix("tests/") == test or nodeid.removeprefix("tests/").startswith(test + "["))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        entry, began = self.entry(item.nodeid), time.monotonic()
        self.sandbox.running = True
        signal.setitimer(signal.ITIMER_REAL, max(entry.seconds, 0.01))
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            entry.seconds -= time.monotonic() - began
            self.sandbox.end_test()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        entry = self.entry(item.nodeid)
        if report.failed:
            entry.messages.append(message_of(call.excinfo.value))
        elif report.when == "call" and report.passed:
            entry.passed += 1
        if report.when == "teardown":
            self.write()
        return report

    def write(self) -> None:
        tests = [entry.result(f"{self.number}.{i}") for i, entry in enumerate(self.entries.values(), start=1)]
        content = {"score": sum(test["score"] for test in tests), "execution_time": round(time.monotonic() - self.began, 1), "tests": tests}
        if self.complaints:
            content["output"] = "\n".join(self.complaints)
        temporary = self.results.with_name(f".{self.results.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.results)


def words(test: str) -> str:
    """test_tree.py::test_a_law[case] -> a law"""
    return test.partition("::test_")[2].partition("[")[0].replace("_", " ")


def message_of(error: BaseException) -> str:
    """What went wrong: the words of the failed assertion first, then the case in which it failed."""
    if isinstance(error, OutOfTime):
        return "your code was still running when the time for this test was over: an endless loop, or far too slow"
    if isinstance(error, wire.Gone):
        return "your code ended the process that it ran in, by leaving it, by a crash, or because it needed too much memory"
    text = str(error) if isinstance(error, (AssertionError, pytest.fail.Exception)) else f"{type(error).__name__}: {error}"
    return "\n".join([text, *getattr(error, "__notes__", ())])


def out_of_time(*_) -> None:
    raise OutOfTime


def main() -> None:
    number, submission, results = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]).absolute()
    HERE.chmod(0o700)  # the student's process runs as another user: it must see neither the reference nor the tests
    problem_set, project = SETS[number], HERE / "project"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        complaints = lay_out(folder, submission, problem_set.files)
        if os.geteuid() != 0:
            complaints.append("not graded as root: the student's code ran as the same user and could have read the tests")
        sandbox = Sandbox(folder, number)
        sys.path[:0] = [str(project), str(project / "tests")]
        for name in ("tree", "model", "medusa"):
            importlib.import_module(name)
        sandbox.functions |= {name: wire.function_of(name) for name in BLANKED if name not in problem_set.functions}
        for name in problem_set.functions:
            wire.stand_in(name, sandbox.line)
        settings.register_profile("grading", database=None, report_multiple_bugs=False, print_blob=False, phases=(Phase.explicit, Phase.generate))
        settings.load_profile("grading")
        signal.signal(signal.SIGALRM, out_of_time)
        referee = Referee(problem_set, number, sandbox, results, complaints)
        tests = [str(project / "tests" / test) for test in problem_set.tests]
        sandbox.start()
        pytest.main(["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-c", str(project / "pyproject.toml"), "-o", "addopts=", *tests], [referee])
        sandbox.close()


if __name__ == "__main__":
    main()
