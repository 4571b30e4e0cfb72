"""The process that runs students' code:  python sandbox.py SOCKET

It is started once, with torch loaded and nothing of a student's, and forks a child for each test.
The child gives up its rights, takes its limits, and answers calls. The folder it works in holds the
starter's modules with the student's files laid over them, and is all that there is: it can read
neither the reference, a test, another submission nor /proc, and can leave nothing behind. What a
student's code prints goes nowhere.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Python itself is not in a child's folder: what is imported late must be loaded before.
LATER = """array bisect cmath copy datetime decimal difflib fractions heapq itertools numpy operator
    pprint queue random statistics string textwrap timeit torch typing safetensors.torch
    torch.fx.experimental.symbolic_shapes"""
for name in LATER.split():
    importlib.import_module(name)

import torch  # noqa: E402
import wire  # noqa: E402
from sets import BLANKED, SETS  # noqa: E402

SPARE_BYTES = 3 << 28  # of memory, on top of what torch takes
NAMESPACES = 0x08000000 | 0x40000000  # CLONE_NEWIPC and CLONE_NEWNET: no shared memory, no network
CPU_SECONDS = 60


def may_confine() -> bool:
    """Is this process allowed to shut its children in?"""
    with suppress(PermissionError):
        os.chroot("/")
        return True
    return False


def confine(folder: Path) -> Path:
    """No rights, no other files, no processes to start, so much memory and no more.

    Returns what the folder is called from now on.
    """
    os.setsid()
    os.chdir(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = {"AS": pages * os.sysconf("SC_PAGE_SIZE") + SPARE_BYTES, "CPU": CPU_SECONDS}
    limits |= {"FSIZE": 0, "CORE": 0, "NOFILE": 64, "NPROC": 0}
    if may_confine():
        # Takes more rights than chroot: where they are missing, the network stays.
        ctypes.CDLL(None).unshare(NAMESPACES)
        os.chroot(folder)
        folder = Path("/")
        # A user of this sandbox alone: those of another grading cannot be killed.
        user = 20_000 + os.getppid() % 40_000
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    sys.path[0] = str(folder)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    return folder


def answer_calls(sock: socket.socket, folder: Path, number: int) -> None:
    """Answer until the grader hangs up."""
    functions = SETS[number].functions
    asked = [name for name in BLANKED if name not in functions]
    in_place = set()

    def resolve(name: str):
        """The student's function of this name.

        Modules are imported when they are first needed: a broken one costs its own points alone.
        """
        if name not in functions:
            raise ValueError(f"{name} is not of this set")
        importlib.import_module(name.partition(".")[0])
        for other in asked:
            if other not in in_place and other.partition(".")[0] in sys.modules:
                in_place.add(other)
                wire.stand_in(other, lambda: peer)
        return wire.function_of(name)

    peer = wire.Student(sock, resolve, folder)
    while True:
        peer.serve(*peer.receive())


def end(child: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not lead a group yet, or be gone
        with suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> None:
    control, child = socket.socket(fileno=int(sys.argv[1])), 0
    torch.set_num_threads(1)
    gc.freeze()
    control.send(b"c" if may_confine() else b"f")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 12, 1)
        if child != 0:
            end(child)
            child = 0
        if not message:
            return
        if not descriptors:
            control.send(b"gone")
            continue
        folder, number = json.loads(message)
        child = os.fork()
        if child == 0:
            control.close()
            try:
                here = confine(Path(folder))
                answer_calls(socket.socket(fileno=descriptors[0]), here, number)
            finally:
                os._exit(0)
        os.close(descriptors[0])
        control.send(struct.pack("<I", child))


if __name__ == "__main__":
    main()
