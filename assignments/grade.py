"""Grade submissions, in an unpacked autograder.zip:

    python grade.py SET SUBMISSION RESULTS [SUBMISSION RESULTS]...

The project's tests run in this process, against the project's own modules, in which the functions
of the set are stand-ins that ask a process of the student's (sandbox.py), which runs as another
user with limits. What passes is decided and written here: RESULTS is Gradescope's results.json,
rewritten after every test, so that a crash takes away no points.
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
from sets import BLANKED, SETS  # noqa: E402

SECONDS = 40.0  # of the student's process, for all tests of a submission together
TICK = 0.2  # seconds from one look at the clock to the next
MOST_SOURCE = 1 << 20  # bytes of a student's file
MOST_OUTPUT = 3000  # characters of a message


class OutOfTime(wire.Gone):
    pass


# ---- the student's process ----


def lay_out(folder: Path, submission: Path, files: list[str]) -> list[str]:
    """The starter's modules, and over them the student's. Returns what was wrong with those."""
    for path in (HERE / "starter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    complaints = []
    for name in files:
        try:
            (folder / name).write_bytes(read_plain(submission / name))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            complaints.append(f"{name} was not taken, the starter's is used instead: {reason}")
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
    """The process that forks one child a test, and the line to the present child.

    functions: what a child may ask for; task: its folder and set.
    """

    def __init__(self):
        self.control, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-B", HERE / "sandbox.py", str(theirs.fileno())]
        env = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "HOME": "/nonexistent"}
        env |= {"LC_ALL": "C.UTF-8"}
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env, **silent)
        theirs.close()
        self.functions, self.task, self.peer, self.pid, self.running = {}, b"", None, None, False

    def wait_until_ready(self) -> None:
        if self.control.recv(5) != b"ready":
            raise RuntimeError(
                "sandbox.py did not start: it needs Linux, with torch and safetensors installed"
            )

    def line(self) -> wire.Peer:
        """The line to the child of the running test, which starts when it is first asked."""
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
        shown = {"name": self.name, "number": number, "visibility": "visible"}
        shown |= {"score": self.points if right else 0, "max_score": self.points}
        message = (self.messages or ["was not run"])[0][:MOST_OUTPUT]
        status = "passed" if right else "failed"
        return shown | {"status": status, "output": "" if right else message}


class Clock:
    """Counts down the seconds that the student's process computes or sleeps.

    Waiting for a busy machine or for the grader costs nothing.
    """

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
        """seconds have passed since the last look.

        The student's process slept if neither side has computed, and nothing came from it.
        """
        ours, (theirs, state) = time.process_time(), self.sandbox.child()
        received = self.sandbox.peer.received if self.sandbox.peer else 0
        quiet = received == self.received and ours - self.ours < 0.001
        self.seconds -= max(theirs - self.theirs, 0.0)
        self.seconds -= seconds if state == "S" and quiet else 0.0
        self.ours, self.theirs, self.received = ours, theirs, received

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.charge(0.0)


class Referee:
    """Runs each test against a new child of the sandbox, and writes down what it was worth."""

    def __init__(self, number: int, sandbox: Sandbox, results: Path, complaints: list[str]):
        self.number, self.sandbox, self.results = number, sandbox, results
        self.complaints, self.began = complaints, time.monotonic()
        tests = SETS[number].tests.items()
        self.entries = {test: Entry(words(test), points) for test, points in tests}
        self.seconds, self.waiting = SECONDS, {entry.name for entry in self.entries.values()}
        self.write()

    def entry(self, nodeid: str) -> Entry:
        nodeid = nodeid.removeprefix("tests/")
        # The whole node, or all cases of a test.
        return self.entries.get(nodeid) or self.entries[nodeid.partition("[")[0]]

    def allowance(self, entry: Entry) -> float:
        """What a test may take: all that is left, but half an equal share for each later test."""
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
        entries = enumerate(self.entries.values(), start=1)
        tests = [entry.result(f"{self.number}.{i}") for i, entry in entries]
        seconds = round(time.monotonic() - self.began, 1)
        score = sum(test["score"] for test in tests)
        content = {"score": score, "execution_time": seconds, "tests": tests}
        if self.complaints:
            content["output"] = "\n".join(self.complaints)
        temporary = self.results.with_name(f".{self.results.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.results)


def words(test: str) -> str:
    """test_tree.py::test_a_property[case] -> a property"""
    return test.partition("::test_")[2].partition("[")[0].replace("_", " ")


def message_of(error: BaseException) -> str:
    """What went wrong: the words of the failed assertion, then the case in which it failed."""
    if isinstance(error, OutOfTime):
        return "your code was still running when the time was over: an endless loop, or too slow"
    if isinstance(error, wire.Gone):
        return "your code ended its process: it left it, crashed, or needed too much memory"
    said = isinstance(error, (AssertionError, pytest.fail.Exception))
    text = str(error) if said else f"{type(error).__name__}: {error}"
    return "\n".join([text, *getattr(error, "__notes__", ())])


def prepare(number: int, sandbox: Sandbox) -> None:
    """Load the project, and put the stand-ins in place before a test can import the functions."""
    project = HERE / "project"
    sys.path[:0] = [str(project), str(project / "tests")]
    # The last is what torch asks for in its first gradient.
    for name in ("tree", "model", "medusa", "torch.fx.experimental.symbolic_shapes"):
        importlib.import_module(name)
    given = [name for name in BLANKED if name not in SETS[number].functions]
    sandbox.functions = {name: wire.function_of(name) for name in given}
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
            complaints.append("not graded as root: the student's code could have read the tests")
        referee = Referee(number, sandbox, results, complaints)
        sandbox.task = json.dumps([folder, number]).encode()
        project = HERE / "project"
        tests = [str(project / "tests" / test) for test in SETS[number].tests]
        options = (
            "-q --no-header --tb=no --disable-warnings -p no:cacheprovider -o addopts=".split()
        )
        options += ["-c", str(project / "pyproject.toml")]
        pytest.main([*options, *tests], [referee])


def main() -> None:
    number, pairs = int(sys.argv[1]), [Path(argument).absolute() for argument in sys.argv[2:]]
    # The students' processes are another user's: they must see neither the reference nor the tests.
    HERE.chmod(0o700)
    sandbox = Sandbox()
    prepare(number, sandbox)
    sandbox.wait_until_ready()
    for submission, results in zip(pairs[::2], pairs[1::2], strict=True):
        # A process for each, so that none finds what another has left.
        pid = os.fork()
        if pid == 0:
            try:
                grade(number, submission, results, sandbox)
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
