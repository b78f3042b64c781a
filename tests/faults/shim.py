"""
The operations by which a process changes files, numbered, and a fault at one of them.

What is counted: opening to write, writing, fsync, rename, mkdir, removing, chmod, truncating. All of this project's go
through Python's `open` and `os`, as test_kill.py checks with strace.
"""

import builtins
import io
import os
import resource
import signal
from pathlib import Path

truncate = os.truncate  # the system's own, not counted
FUNCTIONS = ("chmod", "fsync", "ftruncate", "mkdir", "remove", "rename", "replace", "rmdir", "truncate", "unlink")


class Shim:
    """
    Put into a process that is thrown away. `fault` is called before each operation with its number, its name and, for a
    write, a function that writes a part of it. What happens in `temporary` is not counted: no run depends on it.
    """

    def __init__(self, log: Path, fault, temporary: Path):
        self.temporary = f"{temporary}/"
        self.log, self.fault, self.n = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), fault, 0
        self.write, self.open = os.write, io.open
        for name in FUNCTIONS:
            setattr(os, name, self.numbered(name, getattr(os, name)))
        builtins.open = io.open = self.open_watched

    def before(self, name: str, path, put=None, to=""):
        """
        Counts one operation, notes it in the log, at fsync with the bytes of the file and at rename with the new name,
        and lets the fault happen.
        """
        if str(path).startswith(self.temporary):
            return
        self.n += 1
        n_bytes = os.path.getsize(path) if name == "fsync" else 0
        self.write(self.log, f"{self.n} {name} {n_bytes} {path}\t{to}\n".encode())
        self.fault(self.n, name, put)

    def numbered(self, name, function):
        def call(target, *arguments, **options):
            path = file_name(target) if isinstance(target, int) else target
            if options.get("dir_fd") is not None:
                path = os.path.join(file_name(options["dir_fd"]), path)
            self.before(name, path, to=arguments[0] if name in ("rename", "replace") else "")
            return function(target, *arguments, **options)

        return call

    def open_watched(self, file, mode="r", *arguments, **options):
        if not set(mode) & set("wax+") or (isinstance(file, int) and file_name(file).startswith("pipe:")):
            return self.open(file, mode, *arguments, **options)
        self.before("open", file)
        return Watched(self, self.open(file, mode, *arguments, **options))


def file_name(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


class Watched:
    """A file whose writes are counted; text is flushed with every write, so that the order is that of the program."""

    def __init__(self, shim, file):
        self.shim, self.file = shim, file

    def write(self, data):
        if not len(data):  # no call of the system
            return 0
        self.shim.before("write", self.file.name, lambda part: self.put(data[:int(part * len(data))]))
        return self.put(data)

    def put(self, data):
        n = self.file.write(data)
        self.file.flush()
        return n

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __iter__(self):
        return iter(self.file)


# -----------------------------------------------------------------------------
# faults


def none(n, name, put):
    """Nothing happens: the operations are counted."""


def kill_at(at: int, part: float = 0.0):
    """SIGKILL before operation `at`; if that is a write, when this part of it is done."""
    def fault(n, name, put):
        if n == at:
            if name == "write" and part:
                put(part)
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def fail_at(at: int, number: int, times: int = 1):
    """OSError with this errno at operation `at` and those after it, `times` in all."""
    def fault(n, name, put):
        if at <= n < at + times:
            raise OSError(number, os.strerror(number))

    return fault


def file_size_limit(n_bytes: int, deadly: bool = False):
    """No file can grow beyond this. deadly: as in a program that does not ignore SIGXFSZ, which Python does."""
    def fault(n, name, put):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
        if deadly:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    return fault


def watch(path: Path, leak: bool = False):
    """Notes at each rename, in this file, the MiB that the process has in memory and the files that it has open."""
    leaked = []

    def fault(n, name, put):
        if name == "rename":
            if leak:
                leaked.append((bytes(2**18) * 2, os.dup(2)))
            mib = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            line = f"{mib} {len(os.listdir('/proc/self/fd'))}\n"
            with io.FileIO(path, "a") as file:
                file.write(line.encode())

    return fault


def truncate_at(at: int, path: Path, n_bytes: int):
    """Another process cuts this file off before operation `at`."""
    def fault(n, name, put):
        if n == at:
            truncate(path, n_bytes)

    return fault
