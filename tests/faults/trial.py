"""
Runs of train_gpt2.py in processes of their own that may be killed, each in a tenth of a second: they are forked off a
server that has imported torch (multiprocessing's forkserver).
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import pytest  # noqa: F401 (a child imports what its parent was started with)
import torch
import torch._dynamo  # a second, which each trial would take at the first step of its optimizer
import tqdm

torch.set_num_threads(1)  # before the server forks: a pool of threads does not survive it
tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind

import machine  # noqa: E402
import rundir  # noqa: E402
import train_gpt2  # noqa: E402
from tests.faults import naive, ranks, shim  # noqa: E402

train_gpt2.parse_options(["--device", "cpu"])  # fills tyro's caches, a third of a trial
ENVIRONMENT, SOURCE = machine.environment(torch.device("cpu")), rundir.source_diff(Path("runs"))

SCALE = int(os.environ.get("FAULTS_SCALE", 1))  # how many times as many random faults
SECONDS = 60 if SCALE == 1 else 600  # a trial that hangs is a failed one

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload([__name__])


def save_time():
    """In a child: what is half of a trial and changes no file of the run: packages' versions, git, torch's profiler."""
    machine.environment = lambda device: ENVIRONMENT
    machine.attention_kernels = lambda rehearse, device: rehearse() or "not looked at"
    rundir.source_diff = lambda out_dir: SOURCE


def main(options: list[str], out: Path, fault: str, arguments: tuple, control: str | bool, also: dict):
    """
    In the child: train_gpt2.py with these options, stdout and stderr into `out`, under one of shim's faults. control:
    with this function of naive.py, True for `install`, to see that the fault is one. also: a fault of ranks.py.
    """
    out.with_suffix(".operations").unlink(missing_ok=True)
    descriptor = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.alarm(SECONDS)
    save_time()
    if control:
        getattr(naive, "install" if control is True else control)()
    chosen = getattr(shim, fault)
    temporary = out.with_suffix(".temporary")
    temporary.mkdir(exist_ok=True)
    if also:
        ranks.Fault(temporary, **also)
    tempfile.tempdir = str(temporary)
    shim.Shim(out.with_suffix(".operations"), chosen(*arguments) if arguments else chosen, temporary)
    try:
        code = train_gpt2.main(options)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(options: list[str], out: Path, fault="none", arguments=(), control=False, **also):
    """The process, started."""
    process = server.Process(target=main, args=(options, out, fault, arguments, control, also))
    process.start()
    return process


def run(options: list[str], out: Path, fault="none", arguments=(), control=False, **also) -> int:
    """Its exit code, or less than 0 for the signal that ended it."""
    process = start(options, out, fault, arguments, control, **also)
    process.join()
    return process.exitcode


class Operation(NamedTuple):
    """One by which a process changed files; n_bytes: of the file at fsync, else 0; to: the new name at rename."""

    n: int
    name: str
    n_bytes: int
    path: str
    to: str


def operations(out: Path) -> list[Operation]:
    """What the last trial with this `out` did to files."""
    found, log = [], out.with_suffix(".operations")
    for line in log.read_text().split("\n")[:-1] if log.exists() else []:  # else killed before it could, or in a line
        n, name, n_bytes, paths = line.split(" ", 3)
        found.append(Operation(int(n), name, int(n_bytes), *paths.split("\t")))
    return found
