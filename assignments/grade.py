"""Grade submissions, in an unpacked autograder.zip:

    python grade.py SET SUBMISSION RESULTS [SUBMISSION RESULTS]...
    python grade.py SET --class SUBMISSIONS RESULTS      every directory in a directory

The project's tests run in this process, against the project's own modules, in which the functions
of the set are stand-ins that ask a process of the student's (sandbox.py), which runs as another
user with limits. What passes is decided and written here: RESULTS is Gradescope's results.json,
rewritten after every test, so that a crash takes away no points. With --class it is a directory,
which also gets setN.csv. Exit code 2, and a line that says why, if something was not graded.
"""

import csv
import importlib
import json
import os
import resource
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

BEGAN = time.monotonic()  # before what takes long to load
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import pytest  # noqa: E402
import wire  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402
from hypothesis.errors import Flaky  # noqa: E402
from sets import BLANKED, SETS  # noqa: E402

# For all tests of a submission together: computing in the student's process, and time that passes
# (the first submission's begins with this process).
COMPUTING, PASSING = 40.0, 78.0
MOST_SECONDS = 85.0  # of a grading: then its process is killed, whatever it is doing
SPARE_BYTES = 3 << 28  # of memory that a grading may take on top of what is loaded
TICK = 0.2  # seconds from one look at the clock to the next
MOST_SOURCE = 1 << 20  # bytes of a student's file
MOST_OUTPUT = 3000  # characters of a message
DRAWS = "your code draws by itself; all that is random is in its arguments"
USAGE = "usage: python grade.py SET SUBMISSION RESULTS [SUBMISSION RESULTS]..., or SET --class S R"


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
            (folder / name).write_bytes(read_plain(submission, name))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            complaints.append(f"{name} was not taken, the starter's is used instead: {reason}")
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(0o755)
    return complaints


def read_plain(submission: Path, name: str) -> bytes:
    """The content of a regular file in a directory. A link could lead to the reference."""
    if submission.is_symlink():
        raise ValueError("the submission is a link")
    flags = os.O_RDONLY | os.O_NOFOLLOW
    directory = os.open(submission, flags | os.O_DIRECTORY)
    try:
        descriptor = os.open(name, flags | os.O_NONBLOCK, dir_fd=directory)
    finally:
        os.close(directory)
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
        self.functions, self.task, self.peer, self.pid, self.running = {}, b"", None, None, False
        self.start()

    def start(self) -> None:
        self.control, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-B", HERE / "sandbox.py", str(theirs.fileno())]
        env = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "HOME": "/nonexistent"}
        env |= {"LC_ALL": "C.UTF-8"}
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env, **silent)
        theirs.close()

    def wait_until_ready(self) -> None:
        """confined: whether the student's code cannot leave its folder."""
        answer = self.control.recv(1)
        if answer == b"":
            raise ValueError(
                "sandbox.py did not start: it needs Linux, with torch and safetensors installed"
            )
        self.confined = answer == b"c"

    def restart(self) -> None:
        """After a grading that was killed, at whatever it was saying."""
        self.control.close()  # ends the process, and the child it has
        self.process.wait()
        self.start()
        self.wait_until_ready()

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

    def computed(self) -> float:
        """The child's seconds of computing."""
        with suppress(OSError):
            if self.peer is not None:
                stat_line = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
                return (int(stat_line[11]) + int(stat_line[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def end_test(self) -> None:
        """No process of the student's is left."""
        self.running = False
        if self.peer is not None:
            self.peer.sock.close()
            self.control.send(b"end")
            self.control.recv(4)
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
        message = (self.messages or ["was not run: the time was over, or the grading was ended"])[
            0
        ][:MOST_OUTPUT]
        status = "passed" if right else "failed"
        return shown | {"status": status, "output": "" if right else message}


class Clock:
    """Raises OutOfTime when the student's process has computed, or a test has lasted, too long."""

    def __init__(self, computing: float, passing: float, sandbox: Sandbox):
        self.computing, self.sandbox, self.computed = computing, sandbox, 0.0
        self.end = time.monotonic() + passing
        signal.signal(signal.SIGALRM, self.tick)
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)

    def tick(self, *_) -> None:
        self.computed = max(self.computed, self.sandbox.computed())
        if self.computed > self.computing or time.monotonic() > self.end:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise OutOfTime

    def stop(self) -> float:
        """The seconds that the student's process has computed."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        return max(self.computed, self.sandbox.computed())


class Referee:
    """Runs each test against a new child of the sandbox, and writes down what it was worth."""

    def __init__(self, number: int, sandbox: Sandbox, results: Path, began: float):
        self.number, self.sandbox, self.results = number, sandbox, results
        self.complaints, self.began, self.end = [], began, began + PASSING
        self.passing = self.end - time.monotonic()  # what is left for the tests
        tests = SETS[number].tests.items()
        self.entries = {test: Entry(words(test), points) for test, points in tests}
        self.computing, self.waiting = COMPUTING, {entry.name for entry in self.entries.values()}

    def entry(self, nodeid: str) -> Entry:
        nodeid = nodeid.removeprefix("tests/")
        # The whole node, or all cases of a test.
        return self.entries.get(nodeid) or self.entries[nodeid.partition("[")[0]]

    def clock(self, entry: Entry) -> Clock:
        """A test may take all that is left, but half an equal share for each later test."""
        self.waiting.discard(entry.name)
        kept = len(self.waiting) / len(self.entries) / 2
        passing = self.end - time.monotonic() - kept * self.passing
        return Clock(self.computing - kept * COMPUTING, passing, self.sandbox)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        clock, self.sandbox.running = self.clock(self.entry(item.nodeid)), True
        try:
            return (yield)
        finally:
            self.computing -= clock.stop()
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
        temporary = temporary_of(self.results, os.getpid())
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
    if isinstance(error, Flaky):
        first = [*getattr(error, "exceptions", ()), error][0]
        return f"the same case, tried again, gave another result: {DRAWS}\n{message_of(first)}"
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


def grade(folder: Path, submission: Path, referee: Referee) -> int:
    """Write the results; the exit code of pytest. folder: an empty one, for the student's code."""
    number, sandbox = referee.number, referee.sandbox
    referee.complaints = lay_out(folder, submission, SETS[number].files)
    if not sandbox.confined:
        says = "not graded as root: the student's code could have read the tests"
        referee.complaints.append(says)
    referee.write()
    sandbox.task = json.dumps([str(folder), number]).encode()
    project = HERE / "project"
    tests = [str(project / "tests" / test) for test in SETS[number].tests]
    options = "-q --no-header --tb=no --disable-warnings -p no:cacheprovider -o addopts=".split()
    options += ["-c", str(project / "pyproject.toml")]
    # Functions of other sets run in this process, on whatever a student asks for.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return pytest.main([*options, *tests], [referee])


def graded(submission: Path, referee: Referee) -> bool:
    """Grade in a process of its own, so that no submission finds what another has left.

    It ends by itself, or is killed; what it has written by then counts.
    """
    referee.write()
    with tempfile.TemporaryDirectory() as folder:
        pid, end, done, code = os.fork(), referee.began + MOST_SECONDS, 0, -1
        if pid == 0:
            code = 3
            try:
                code = grade(Path(folder), submission, referee)
            except Exception as error:
                print(f"grade.py: {submission}: {error}", file=sys.stderr)
            finally:
                sys.stdout.flush()
                os._exit(code)
        while done == 0 and time.monotonic() < end:
            done, code = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)
        if done == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            temporary_of(referee.results, pid).unlink(missing_ok=True)
            referee.sandbox.restart()
    # Tests that pass and tests that fail; all else is no grading.
    return code in (0, 1 << 8)


def temporary_of(results: Path, pid: int) -> Path:
    return results.with_name(f".{results.name}.{pid}")


def asked_for(words: list[str]) -> tuple[int, list[tuple[Path, Path]]]:
    """The set, submissions and results; ValueError says why there is nothing to grade."""
    of_class = words[1:2] == ["--class"]
    paths = [Path(word).absolute() for word in words[2 if of_class else 1 :]]
    if len(paths) == 0 or len(paths) % 2 == 1 or (of_class and len(paths) > 2):
        raise ValueError(USAGE)
    if not (HERE / "set").is_file():
        raise ValueError("not an unpacked autograder.zip: make one with build.py")
    ours = (HERE / "set").read_text()
    if words[0] != ours:
        raise ValueError(f"this autograder.zip is that of set {ours}, and not of {words[0]}")
    pairs = list(zip(paths[::2], paths[1::2]))
    for submission, results in pairs:
        place = results if of_class else results.parent
        if not submission.is_dir():
            raise ValueError(f"{submission}: no such directory")
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise ValueError(f"{place}: not a directory that can be written to")
        if not of_class and results.is_dir():
            raise ValueError(f"{results}: is a directory; name a file, or use --class")
    if of_class:
        submissions, place = pairs[0]
        found = sorted(path for path in submissions.iterdir() if path.is_dir())
        pairs = [(path, place / f"{path.name}.json") for path in found]
    return int(ours), pairs


def write_table(path: Path, pairs: list[tuple[Path, Path]]) -> None:
    """A line for each submission: its points, and those of each test."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for i, (submission, results) in enumerate(pairs):
            content = json.loads(results.read_text())
            if i == 0:
                names = [test["name"] for test in content["tests"]]
                writer.writerow(["submission", "score", *names, "output"])
            scores = [test["score"] for test in content["tests"]]
            about = submission.name, content["score"], *scores, content.get("output", "")
            writer.writerow(about)


def main() -> None:
    number, pairs = asked_for(sys.argv[1:])
    # The students' processes are another user's: they must see neither the reference nor the tests.
    HERE.chmod(0o700)
    sandbox = Sandbox()
    prepare(number, sandbox)
    sandbox.wait_until_ready()
    failed, began = [], BEGAN
    for submission, results in pairs:
        if not graded(submission, Referee(number, sandbox, results, began)):
            failed.append(submission)
        began = time.monotonic()
    if sys.argv[2] == "--class":
        write_table(Path(sys.argv[4]) / f"set{number}.csv", pairs)
    if failed:
        raise ValueError(f"not graded: {', '.join(map(str, failed))}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"grade.py: {error}", file=sys.stderr)
        sys.exit(2)
