"""
The processes of one run, under torchrun: all end when torchrun or one of them is gone, and one that hangs is named.

torchrun by itself does neither: killed, it leaves its processes behind; and where one of them dies, the others get
SIGTERM, which asks them to stop after a step that cannot end any more, and 30 s later SIGKILL.
"""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing import _prctl_pr_set_pdeathsig as set_parent_death_signal  # does nothing but on Linux

from rundir import LOST, leave

FOREVER = timedelta(days=365)


class Lost(Exception):
    exit_code = LOST


def end_with_torchrun():
    """From now on the kernel ends this process, if torchrun started it, when torchrun is gone; it may be gone now."""
    if dist.is_torchelastic_launched():
        set_parent_death_signal(signal.SIGKILL)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # then torchrun serves this address while it lives
            try:
                socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 60).close()
            except ConnectionRefusedError:
                leave(LOST)
            except OSError:  # says nothing about torchrun
                pass


def rank_and_world_size() -> tuple[int, int]:
    """torchrun sets them in the environment; without it there is one process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_variables(rank: int, world_size: int):
    """ValueError where RANK and WORLD_SIZE come from something else than torchrun."""
    if rank >= world_size or (world_size > 1 and "MASTER_ADDR" not in os.environ):
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment are not torchrun's: unset them")


def connect(timeout: timedelta) -> dist.Store:
    """
    Where the processes find one another. torchrun keeps it over its restarts, with the addresses of processes that are
    gone, so each restart has its own names; but several machines do not count alike, and need
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1. https://github.com/pytorch/pytorch/issues/135712
    """
    store, _, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    return store


class Others:
    """
    The other processes of a run. One that ends in an error leaves its reason for all; when one is gone all others end
    within a second or two, with that reason and exit code, or with LOST if it left none.
    """

    def __init__(self, rank: int, world_size: int, cuda: bool, hang_timeout_s: float, note_end):
        """
        hang_timeout_s: a process that hangs is named within this time, of which collectives wait four fifths.
        note_end: called with reason and exit code where this process ends because of another.
        """
        self.rank, self.world_size, self.hang_timeout_s, self.note_end = rank, world_size, hang_timeout_s, note_end
        self.hosts = None
        if world_size == 1:
            return
        wait = timedelta(seconds=0.8 * hang_timeout_s)
        # in each step the hosts meet too, by gloo; NCCL's own watch aborts without a name and must come second
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=connect(wait), rank=rank,
                                world_size=world_size, timeout=2 * wait if cuda else wait)
        self.hosts, watched = dist.new_group(backend="gloo", timeout=wait), dist.new_group(backend="gloo")
        self.store = connect(wait)  # another connection, since torch's is in use where it waits
        self.ending = threading.Lock()  # whoever has it decides how this process ends
        for other in range(1, world_size) if rank == 0 else [0]:
            threading.Thread(target=self.watch, args=(other, watched), daemon=True).start()

    def watch(self, other: int, group):
        """Waits for what is never sent, until the connection breaks because that process is gone."""
        with suppress(RuntimeError):
            dist.irecv(torch.zeros(1), other, group).wait(FOREVER)
        self.ending.acquire()
        reason, code = self.agree(f"process {other} is gone", LOST)
        os.write(2, f"\n{'' if self.rank == 0 else f'process {self.rank}: '}error: {reason}\n".encode())
        with suppress(Exception):
            self.note_end(reason, code)
        leave(code)

    def agree(self, reason: str, code: int) -> tuple[str, int]:
        """Reason and exit code of the process that came first to an error, if that can be asked for."""
        with suppress(RuntimeError):
            reason, code = json.loads(self.store.compare_set("end", "", json.dumps([reason, code])))
        return reason, code

    def explain(self, error: Exception) -> Exception:
        """Lost, if the error is that others kept a collective waiting, with the processes that did; else the error."""
        if self.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return error
        try:
            self.store.set(f"waited/{self.rank}", "")
            until = time.monotonic() + 0.2 * self.hang_timeout_s  # for those that began to wait later
            while late := [i for i in range(self.world_size) if not self.store.check([f"waited/{i}"])]:
                if time.monotonic() > until:
                    return Lost(f"process {', '.join(map(str, late))} hangs: the others have waited for "
                                f"{0.8 * self.hang_timeout_s:.0f} s (--hang_timeout_s)")
                time.sleep(0.1)  # if one is gone, `watch` ends this process meanwhile
        except RuntimeError:  # process 0 has the store, or torchrun, with which this process is gone too
            return Lost("process 0 is gone")
        return error

    def anywhere(self, condition: bool) -> bool:
        """Whether it holds in any process: all ask, and get the same answer."""
        if self.world_size == 1:
            return condition
        held = torch.tensor(int(condition))
        dist.all_reduce(held, group=self.hosts)
        return held.item() > 0

    def end(self, reason: str, code: int, failed: bool):
        """Before this process ends: from now on the end of another is no reason. A failure is told to all."""
        if self.world_size > 1:
            self.ending.acquire()
            if failed:
                self.agree(reason, code)

    def meet(self):
        """After a good end: else torchrun ends the process that saves when the first of the others is gone."""
        if self.world_size > 1:
            with suppress(RuntimeError):  # it is gone
                dist.barrier(self.hosts)
