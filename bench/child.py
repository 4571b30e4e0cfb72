"""Work that may fail, hang or change the process, done in a fork, which has all imports already."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress


def in_a_child(work: Callable[[], int], seconds: float, errors: str = os.devnull) -> int | None:
    """The exit code of work(), or of the exception that ended it; None if it was killed.

    It is killed after so many seconds, with all that it started. Its errors go to the file.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            for number, name in enumerate((os.devnull, os.devnull, errors)):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
            sys.stdin, sys.stdout = open(0), open(1, "w")
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
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
            if done != 0:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
    finally:  # also when this process is interrupted
        if done == 0:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return None
