"""Grade submissions:  python grade.py SET SUBMISSION RESULTS [SUBMISSION RESULTS]...   (from an unpacked autograder.zip)

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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import Phase, settings

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import wire  # noqa: E402
from sets import BLANKED, SETS, ProblemSet  # noqa: E402

SECONDS = 40.0  # of the student's process, for all tests of a submission together
TICK = 0.2  # seconds from one look at the clock to the next
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
            complaints.append(
                f"{name} was not taken, the starter's stands in for it: {getattr(error, 'strerror', None) or error}"
            )
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
    """The process that forks one child a test, and the line to the present child. functions: what a child may ask for; task: its folder and set."""

    def __init__(self):
        self.control, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(HERE / "sandbox.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self.functions, self.task, self.peer, self.pid, self.running = {}, b"", None, None, False

    def wait_until_ready(self) -> None:
        if self.control.recv(5) != b"ready":
            raise RuntimeError(
                "the process for students' code did not start: are torch and safetensors installed, and is this Linux?"
            )

    def line(self) -> wire.Peer:
        """The line to the child of the running test, which starts when it is first asked something."""
        if not self.running:
            raise RuntimeError("a function of the set was called outside of a test")
        if self.peer is None:
            ours, theirs = socket.socketpair()
            socket.send_fds(self.control, [self.task], [theirs.fileno()])
            theirs.close()
            self.pid = struct.unpack("<I", self.control.recv(4))[0]
            self.peer = wire.Grader(ours, self.functions)
        return self.peer

    def child(self) -> tuple[float, str]:
        """The child's seconds of computing, and what it does now: S is sleeping."""
        if self.peer is None:
            return 0.0, ""
        try:
            state, *numbers = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, ""
        return (int(numbers[10]) + int(numbers[11])) / os.sysconf("SC_CLK_TCK"), state

    def end_test(self) -> None:
        self.running = False
        if self.peer is not None:
            self.peer.sock.close()
            for kill in (os.killpg, os.kill):  # it may not lead a group yet, or be gone
                with suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)
            self.peer = None


# ---- the tests ----


@dataclass
class Entry:
    """A line of the table of points: one test with all its cases."""

    name: str
    points: int
    passed: int = 0
    messages: list[str] = field(default_factory=list)

    def result(self, number: str) -> dict:
        right = self.passed > 0 and not self.messages
        shown = {
            "name": self.name,
            "number": number,
            "score": self.points if right else 0,
            "max_score": self.points,
            "visibility": "visible",
        }
        return shown | {
            "status": "passed" if right else "failed",
            "output": "" if right else (self.messages or ["was not run"])[0][:MOST_OUTPUT],
        }


class Clock:
    """Counts down the seconds that the student's process computes or sleeps; waiting for a busy machine or for the grader costs nothing."""

    def __init__(self, seconds: float, sandbox: Sandbox):
        self.seconds, self.sandbox = seconds, sandbox
        self.ours, self.theirs, self.received = time.process_time(), 0.0, 0
        signal.signal(signal.SIGALRM, self.tick)
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)

    def tick(self, *_) -> None:
        self.charge(TICK)
        if self.seconds <= 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise OutOfTime

    def charge(self, seconds: float) -> None:
        """seconds have passed since the last look: asleep, if neither side has computed, and nothing was heard of the student's."""
        ours, (theirs, state) = time.process_time(), self.sandbox.child()
        received = self.sandbox.peer.received if self.sandbox.peer else 0
        asleep = (
            seconds
            if state == "S" and received == self.received and ours - self.ours < 0.001
            else 0.0
        )
        self.seconds -= max(theirs - self.theirs, 0.0) + asleep
        self.ours, self.theirs, self.received = ours, theirs, received

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.charge(0.0)


class Referee:
    """Runs each test against a new child of the sandbox, and writes down what it was worth."""

    def __init__(
        self,
        problem_set: ProblemSet,
        number: int,
        sandbox: Sandbox,
        results: Path,
        complaints: list[str],
    ):
        self.number, self.sandbox, self.results, self.complaints, self.began = (
            number,
            sandbox,
            results,
            complaints,
            time.monotonic(),
        )
        self.entries = {
            test: Entry(words(test), points) for test, points in problem_set.tests.items()
        }
        self.seconds, self.waiting = SECONDS, {entry.name for entry in self.entries.values()}
        self.write()

    def entry(self, nodeid: str) -> Entry:
        return next(
            entry
            for test, entry in self.entries.items()
            if nodeid.removeprefix("tests/") == test
            or nodeid.removeprefix("tests/").startswith(test + "[")
        )

    def allowance(self, entry: Entry) -> float:
        """What a test may take: all that is left, but for half an equal share of each test that has not begun."""
        self.waiting.discard(entry.name)
        return self.seconds - len(self.waiting) * SECONDS / len(self.entries) / 2

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        allowance = self.allowance(self.entry(item.nodeid))
        clock, self.sandbox.running = Clock(allowance, self.sandbox), True
        try:
            return (yield)
        finally:
            clock.stop()
            self.seconds -= allowance - clock.seconds
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
        tests = [
            entry.result(f"{self.number}.{i}")
            for i, entry in enumerate(self.entries.values(), start=1)
        ]
        content = {
            "score": sum(test["score"] for test in tests),
            "execution_time": round(time.monotonic() - self.began, 1),
            "tests": tests,
        }
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
    text = (
        str(error)
        if isinstance(error, (AssertionError, pytest.fail.Exception))
        else f"{type(error).__name__}: {error}"
    )
    return "\n".join([text, *getattr(error, "__notes__", ())])


def prepare(number: int, sandbox: Sandbox) -> None:
    """Load the project, and put the stand-ins in place before any test can take hold of the functions themselves."""
    project = HERE / "project"
    sys.path[:0] = [str(project), str(project / "tests")]
    for name in (
        "tree",
        "model",
        "medusa",
        "torch.fx.experimental.symbolic_shapes",
    ):  # the last is what torch asks for in its first gradient
        importlib.import_module(name)
    sandbox.functions = {
        name: wire.function_of(name) for name in BLANKED if name not in SETS[number].functions
    }
    for name in SETS[number].functions:
        wire.stand_in(name, sandbox.line)
    settings.register_profile(
        "grading",
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        print_blob=False,
        phases=(Phase.explicit, Phase.generate),
    )
    settings.load_profile("grading")
    importlib.import_module("strategies")


def grade(number: int, submission: Path, results: Path, sandbox: Sandbox) -> None:
    with tempfile.TemporaryDirectory() as folder:
        complaints = lay_out(Path(folder), submission, SETS[number].files)
        if os.geteuid() != 0:
            complaints.append(
                "not graded as root: the student's code ran as the same user and could have read the tests"
            )
        referee = Referee(SETS[number], number, sandbox, results, complaints)
        sandbox.task = json.dumps([folder, number]).encode()
        project = HERE / "project"
        tests = [str(project / "tests" / test) for test in SETS[number].tests]
        options = [
            "-q",
            "--no-header",
            "--tb=no",
            "--disable-warnings",
            "-p",
            "no:cacheprovider",
            "-c",
            str(project / "pyproject.toml"),
            "-o",
            "addopts=",
        ]
        pytest.main([*options, *tests], [referee])


def main() -> None:
    number, pairs = int(sys.argv[1]), [Path(argument).absolute() for argument in sys.argv[2:]]
    HERE.chmod(
        0o700
    )  # the students' processes run as another user: they must see neither the reference nor the tests
    sandbox = Sandbox()
    prepare(number, sandbox)
    sandbox.wait_until_ready()
    for submission, results in zip(pairs[::2], pairs[1::2], strict=True):
        if (pid := os.fork()) == 0:  # a process for each, so that none finds what another has left
            try:
                grade(number, submission, results, sandbox)
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
