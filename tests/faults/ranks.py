"""
Runs of train_gpt2.py in several processes, with a fault in one of them at one place of one step.

Launched by torchrun (this file is the script it starts; the fault is in the variable RANKS_FAULT), or, in a tenth of
the time and with nobody who ends the others when one is gone, forked off trial.py's server.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")] if __name__ == "__main__" else []

import torch  # noqa: E402

import checkpoint  # noqa: E402
import finite  # noqa: E402
import machine  # noqa: E402
import processes  # noqa: E402
import rundir  # noqa: E402
import train_gpt2  # noqa: E402
from model import GPT  # noqa: E402

# -----------------------------------------------------------------------------
# in a process of the run


class Fault:
    """
    rank, step: where, step counted from 1. place: "set-up", "forward", "update", "evaluation", "save" (which only rank
    0 does) or, after the last, "shutdown"; None for none. signals: sent to the ranks in `to`; "hang" waits for ever.
    slow: seconds that each visit to a place takes, from `step` or `slow_from` on. without: "handler" of signals,
    "watch" for other processes, "check" for what is not finite, or "order" of the data that is the same for every
    number of processes. poison: what is not finite from `step` on, by this factor: "loss", "gradient" of one weight,
    "sum" of it over the processes, or "weight". beside: as on a GPU, saves are written by a thread and the loop is a
    step ahead of its log.
    """

    def __init__(self, note: Path, rank=0, step=1, place=None, signals=(), to=None, slow=(), without=(), poison=None,
                 factor="nan", beside=False, slow_from=None):
        self.poison, self.factor, self.rank = poison, float(factor), rank
        self.note, self.step, self.place, self.signals = note, step, place, list(signals)
        self.slow_from = step if slow_from is None else slow_from
        self.mine = place and rank == train_gpt2.RANK and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.to, self.slow, self.done, self.evaluating = to or [rank], dict(slow), None, False
        if "handler" in without:
            rundir.StopSignal.handle = lambda self, number, frame: os._exit(128 + number)
        if "watch" in without:
            processes.end_with_torchrun = lambda: None
            processes.Others.watch = lambda *_: None
        if "check" in without:
            finite.first_not_finite = lambda tensors: None
            train_gpt2.update = naive_update
            train_gpt2.math = SimpleNamespace(isfinite=lambda value: True, nan=math.nan, log=math.log)
        if "order" in without:
            order = train_gpt2.train_order
            train_gpt2.train_order = lambda n, seed, step, count: order(n, seed + train_gpt2.WORLD_SIZE, step, count)
        if beside:
            machine.runs_behind = lambda device: True
        with open(note / f"pid-{train_gpt2.RANK}", "w") as file:
            file.write(str(os.getpid()))
        self.install()

    def visit(self, place: str):
        """Here the process is at this place of step `done` + 1 (of step `done`: update and all that follow)."""
        step = (self.done or 0) + (place in ("set-up", "forward"))
        if self.mine and place == self.place and (place == "set-up" or step == self.step):
            self.mine = False
            (self.note / "injected").write_text(str(time.time()))
            for name in self.signals:
                if name == "hang":
                    time.sleep(10**6)
                for rank in self.to:
                    os.kill(int((self.note / f"pid-{rank}").read_text()), getattr(signal, name))
        time.sleep(self.slow.get(place, 0) if step >= self.slow_from else 0)

    def poisoned(self, what: str) -> bool:
        step = (self.done or 0) + (what in ("loss", "gradient"))
        return self.poison == what and self.rank == train_gpt2.RANK and self.done is not None and step >= self.step

    def install(self):
        run, evaluate, rate = GPT.run, train_gpt2.evaluate, train_gpt2.set_learning_rate
        kernels, parts, micro_batch = machine.attention_kernels, checkpoint.safetensors_parts, train_gpt2.micro_batch
        end = processes.Others.end

        def watched_kernels(rehearse, device):  # calls the model too, before the first step
            self.visit("set-up")
            found = kernels(rehearse, device)
            self.done = self.done or 0
            return found

        def watched_run(model, *inputs):
            if self.done is not None:
                self.visit("evaluation" if self.evaluating else "forward")
            if not hasattr(self, "weight"):
                self.weight = model.transformer.h[0].mlp.c_fc.weight
                self.weight.register_hook(lambda d: d * self.factor if self.poisoned("gradient") else d)
            logits, loss = run(model, *inputs)
            return logits, loss * self.factor if self.poisoned("loss") else loss

        def watched_rate(optimizers, config, step):
            self.done = step + 1
            self.visit("update")
            if self.poisoned("sum"):
                self.weight.grad[3, 5] *= self.factor
            if self.poisoned("weight"):
                self.weight.data[3, 5] = self.factor
            return rate(optimizers, config, step)

        def watched_evaluate(*arguments):
            self.evaluating = True
            try:
                return evaluate(*arguments)
            finally:
                self.evaluating = False

        def watched_parts(tensors):
            yield from parts(tensors)
            self.visit("save")

        def watched_end(*arguments, **options):
            self.visit("shutdown")
            end(*arguments, **options)

        def watched_micro_batch(*arguments):
            windows = micro_batch(*arguments)
            with open(self.note / f"windows-{train_gpt2.RANK}", "a") as file:
                file.write(json.dumps(windows.tolist()) + "\n")
            return windows

        machine.attention_kernels, checkpoint.safetensors_parts = watched_kernels, watched_parts
        GPT.run, train_gpt2.set_learning_rate, train_gpt2.evaluate = watched_run, watched_rate, watched_evaluate
        train_gpt2.micro_batch, processes.Others.end = watched_micro_batch, watched_end


def naive_update(model, optimizers, loss, grad_clip):
    """As optim.update, but whatever comes is believed."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack((loss, norm))


def main(options: list[str], note: Path, fault: dict):
    Fault(note, **fault)
    code = train_gpt2.main(options)
    rundir.leave(code)


def forked(options, note, fault, rank, world_size, port):
    """A process off trial.py's server."""
    from tests.faults import trial

    trial.save_time()
    descriptor = os.open(note / f"out-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.alarm(120)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    train_gpt2.RANK, train_gpt2.WORLD_SIZE = rank, world_size
    torch.set_num_threads(1)
    main(options, note, fault)


# -----------------------------------------------------------------------------
# in the test


class Ranks:
    """A run in several processes, started; `note` is a directory of its own, with what they leave behind."""

    def __init__(self, options: list[str], note: Path, world_size: int, launcher=(), environment=None, **fault):
        from tests.faults import trial

        note.mkdir(parents=True)
        self.note, self.launcher, self.started = note, None, time.time()
        if launcher:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                       str(world_size), *launcher, __file__, *options]
            variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RANKS_NOTE": str(note),
                         "RANKS_FAULT": json.dumps(fault)}
            with open(note / "out", "w") as out:
                self.launcher = subprocess.Popen(command, stdout=out, stderr=out, cwd=note,
                                                 env=os.environ | variables | (environment or {}))
            guard = threading.Timer(120, self.end)
            guard.daemon = True
            guard.start()
            self.processes = []
        else:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            self.processes = [trial.server.Process(target=forked, args=(options, note, fault, rank, world_size, port))
                              for rank in range(world_size)]
            for process in self.processes:
                process.start()
        self.world_size = world_size

    def said(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.note.glob("out*")))

    def wait_until(self, condition, seconds=60):
        """Polls; AssertionError with what the processes said if it does not come true in time."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.said()[-3000:]
            time.sleep(0.01)

    def pids(self) -> list[int]:
        """Of the ranks that torchrun has started and that have come to `main`."""
        return [int(text) for path in self.note.glob("pid-*") if (text := path.read_text())]

    def all_gone(self) -> bool:
        """Launcher apart: zombies, which wait for their parent, count as gone."""
        return not any(alive(pid) for pid in self.pids()) and not any(process.is_alive() for process in self.processes)

    def wait(self, seconds=60) -> list[int]:
        """Exit codes, less than 0 for the signal: of each rank, or of torchrun."""
        self.wait_until(lambda: self.all_gone() and (not self.launcher or self.launcher.poll() is not None), seconds)
        return [self.launcher.returncode] if self.launcher else [process.exitcode for process in self.processes]

    def injected(self) -> float:
        """When the fault was; waits for it."""
        path = self.note / "injected"
        self.wait_until(lambda: path.exists() and path.read_text())
        return float(path.read_text())

    def signal(self, name: str, to: list[int]):
        for rank in to:
            with suppress(ProcessLookupError):
                os.kill(int((self.note / f"pid-{rank}").read_text()), getattr(signal, name))

    def end(self):
        """Whatever is left."""
        for process in self.processes:
            process.kill()
        if self.launcher:
            self.launcher.kill()
        for pid in self.pids():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)

    def windows(self) -> list[list[list[int]]]:
        """Of each rank, the windows of each micro-step that it read, one more step than it made."""
        return [[json.loads(line) for line in (self.note / f"windows-{rank}").read_text().splitlines()]
                for rank in range(self.world_size)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


if __name__ == "__main__":
    main(sys.argv[1:], Path(os.environ["RANKS_NOTE"]), json.loads(os.environ["RANKS_FAULT"]))
