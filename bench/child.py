"""Work that may fail, hang or change the process: done in a forked one, which has all that is imported here already."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress


def in_a_child(work: Callable[[], int], seconds: float, errors: str = os.devnull) -> int | None:
    """The exit code of work(), or of the exception that ended it; None if it took longer and was killed, with all that it had started.

    It reads nothing, its output goes nowhere, and what it writes as an error into the file `errors`.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            for number, name in enumerate((os.devnull, os.devnull, errors)):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
            sys.stdin, sys.stdout, sys.stderr = (
                open(0),
                open(1, "w"),
                open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1),
            )
            code = work()
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)
    with suppress(OSError):  # it may have done so itself, or be gone
        os.setpgid(pid, pid)
    until, done = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < until:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
    finally:  # also when this process is interrupted
        if not done:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return None
