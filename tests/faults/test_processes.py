"""
Several processes: a signal stops all after the same step, none outlives another or torchrun, one that hangs is named,
and their number may change within a run. Most trials are forked processes (ranks.py); torchrun where it has a part.
FAULTS_SCALE times as many random instants, and from 2 on what takes long; FAULTS_TABLE names a file for a table's rows.
"""

import itertools
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import small
import torch
from small import T, assert_same_result, metrics, status, steps

import checkpoint
from data.loader import train_order
from processes import Others
from tests.faults.ranks import Ranks, alive
from tests.faults.table import BESIDE, row

OPTIONS = {"n_layer": 1, "n_embd": 16, "n_head": 1, "max_steps": 8, "val_every": 3, "save_every": 2, "batch_size": 1,
           "val_tokens": 12 * T}
SCALE = int(os.environ.get("FAULTS_SCALE", 1))
SEED = int(os.environ.get("FAULTS_SEED", random.SystemRandom().randrange(10**6)))  # printed where a test fails
GONE_S = 5.0  # all processes, when one of them or torchrun is killed
MARGIN_S = 2.0  # after a signal, beyond a step and a save
STOPPED, LOST = 75, 8
LONG = [pytest.mark.skipif(SCALE == 1, reason="FAULTS_SCALE is 1")]


class Place:
    """Runs one after the other in one run directory."""

    def __init__(self, directory: Path, data: Path):
        directory.mkdir(exist_ok=True)
        self.runs = small.Runs.__new__(small.Runs)
        self.runs.directory, self.runs.data, self.runs.out_dir = directory, data, directory / "runs"
        self.path, self.count, self.started = self.runs.path, itertools.count(), []

    def start(self, world_size: int, launcher=(), environment=None, changes=None, **fault) -> Ranks:
        """2 sequences for each process and step, or as `changes` say."""
        options = OPTIONS | {"total_batch_tokens": 2 * T * world_size} | (changes or {})
        note = self.runs.directory / f"note-{next(self.count)}"
        self.started.append(Ranks(self.runs.options(**options), note, world_size, launcher, environment, **fault))
        return self.started[-1]

    def finish(self, world_size: int, expected: Path, **changes):
        """The same command again ends as the uninterrupted run."""
        ranks = self.start(world_size, changes=changes)
        assert ranks.wait() == [0] * world_size, ranks.said()[-3000:]
        assert status(self.path)["reason"] == "finished"
        assert_same_result(self.path, expected)

    def new(self):
        shutil.rmtree(self.runs.out_dir, ignore_errors=True)

    def check_stopped(self, ranks: Ranks, world_size: int, step: int):
        """All after the same step, which is `step` or the next, with a good checkpoint, exit code and log."""
        assert ranks.wait() == [STOPPED] * world_size, ranks.said()[-3000:]
        stopped = status(self.path)["step"]
        assert stopped in (step, step + 1), ranks.said()[-3000:]
        assert status(self.path) == {"reason": "SIGTERM", "step": stopped, "code": STOPPED}
        assert steps(self.path)[-1] == len(metrics(self.path)) == stopped
        assert checkpoint.find_fault(checkpoint.list_checkpoints(self.path)[0]) is None
        assert len({len(windows) for windows in ranks.windows()}) == 1

    def check_gone(self, ranks: Ranks, since: float, seconds=GONE_S) -> float:
        ranks.wait_until(ranks.all_gone, since + seconds - time.time())
        return time.time() - since


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Uninterrupted runs by number of processes."""
    directory = tmp_path_factory.mktemp("wholes")
    data, found = small.make_data(directory / "data", n_val=2000), {}
    for world_size in 2, 3:
        found[world_size] = Place(directory / str(world_size), data)
        assert found[world_size].start(world_size).wait() == [0] * world_size
    return found


@pytest.fixture
def place(tmp_path, wholes):
    place = Place(tmp_path / "place", wholes[2].runs.data)
    yield place
    for ranks in place.started:
        ranks.end()


# -----------------------------------------------------------------------------
# SIGTERM

PLACES = [("set-up", 1), ("forward", 1), ("forward", 3), ("update", 3), ("evaluation", 3), ("save", 4)]
TO = {"rank 0": [0], "rank 1": [1], "all": [0, 1]}


@pytest.mark.parametrize(("where", "step", "to"), [
    *((*place, to) for place in PLACES for to in ("rank 1", "all")), ("forward", 3, "rank 0"), ("save", 4, "rank 0")])
def test_sigterm(place, wholes, where, step, to):
    to = TO[to]
    with row(f"SIGTERM to one or all of 2 processes in {where}") as counts:
        counts.injected += 1
        ranks = place.start(2, rank=0 if where == "save" else to[0], place=where, step=step, signals=["SIGTERM"], to=to)
        counts.took(place.check_gone(ranks, ranks.injected(), MARGIN_S + 1.0))  # step and save take 0.1 s
        place.check_stopped(ranks, 2, step)
        place.finish(2, wholes[2].path)
        counts.survived += 1


@pytest.mark.parametrize("where", ["forward", "evaluation", "save"])
def test_sigterm_where_everything_is_slow(place, wholes, where):
    """A step takes 1 s, a save 2 s; an evaluation of 6 s is cut short, and made up for when the run goes on."""
    slow = {"forward": 0.5, "save": 1.0} | ({"evaluation": 1.0} if where == "evaluation" else {})
    changes, step = {"save_every": 4}, {"forward": 2, "evaluation": 3, "save": 4}[where]
    with row("SIGTERM where steps take 1 s, saves 2 s, evaluations 6 s") as counts:
        counts.injected += 1
        ranks = place.start(2, place=where, step=step, rank=0, to=[1], signals=["SIGTERM"], slow=slow, changes=changes)
        counts.took(place.check_gone(ranks, ranks.injected(), 1.0 + 2 * 1.0 + MARGIN_S))
        place.check_stopped(ranks, 2, step)
        if where == "evaluation":
            assert status(place.path)["step"] == 3 and "val_loss" not in metrics(place.path)[2]
        place.finish(2, wholes[2].path, **changes)
        counts.survived += 1


@pytest.mark.parametrize("to", ["rank 0", pytest.param("rank 1", marks=LONG)])
def test_sigterm_where_a_save_is_in_hand(place, wholes, to):
    """Step 4 is being written, which takes 1 s, when the signal comes in step 5; it ends with one of them."""
    changes = {"save_every": 4}
    with row(f"SIGTERM to one of 2 processes with a save in hand{BESIDE}") as counts:
        counts.injected += 1
        ranks = place.start(2, place="forward", step=5, rank=TO[to][0], signals=["SIGTERM"], slow={"save": 0.5},
                            slow_from=1, beside=True, changes=changes)
        since = ranks.injected()
        assert steps(place.path) == []
        counts.took(place.check_gone(ranks, since, 2 * 2 * 0.5 + MARGIN_S + 1.0))  # the save in hand, and one more
        place.check_stopped(ranks, 2, 4)
        place.finish(2, wholes[2].path, **changes)
        counts.survived += 1


@pytest.mark.parametrize("i", range(8 * SCALE))
def test_sigterm_at_random_instants(place, wholes, i):
    generator, beside = random.Random(f"{SEED} {i}"), i % 4 == 3
    print(f"FAULTS_SEED={SEED}")
    ranks = place.start(2, slow={"forward": 0.01, "save": 0.02, "evaluation": 0.02}, beside=beside)
    ranks.wait_until(lambda: len(list(ranks.note.glob("windows-*"))) == 2)
    time.sleep(generator.uniform(0, 1))
    with row("SIGTERM to one or all of 2 processes at a random instant" + BESIDE * beside) as counts:
        counts.injected += 1
        since, to = time.time(), generator.choice([[0], [1], [0, 1]])
        ranks.signal("SIGTERM", to)
        counts.took(place.check_gone(ranks, since, MARGIN_S + 1.0))
        codes = ranks.wait()
        assert codes in ([STOPPED] * 2, [0, 0]), ranks.said()[-3000:]
        if codes[0] == STOPPED:
            place.check_stopped(ranks, 2, status(place.path)["step"])
        place.finish(2, wholes[2].path)
        counts.survived += 1


@pytest.mark.parametrize(("where", "step", "fault"), [
    ("set-up", 1, "SIGTERM to one or all of 2 processes in set-up"),
    ("forward", 2, "SIGTERM to one or all of 2 processes in forward"),
    ("update", 3, "SIGTERM to one or all of 2 processes in update"),
    ("evaluation", 3, "SIGTERM to one or all of 2 processes in evaluation"),
    ("save", 4, "SIGTERM to one or all of 2 processes in save"),
    pytest.param("forward", 3, "SIGTERM where steps take 1 s, saves 2 s, evaluations 6 s", marks=LONG),
    pytest.param("forward", 5, f"SIGTERM to one of 2 processes with a save in hand{BESIDE}", marks=LONG),
    pytest.param("update", 4, "SIGTERM to one or all of 2 processes at a random instant", marks=LONG),
    pytest.param("update", 5, f"SIGTERM to one or all of 2 processes at a random instant{BESIDE}", marks=LONG)])
def test_sigterm_without_the_handler_saves_nothing(place, where, step, fault):
    """The control: neither the step in hand nor why it ended."""
    with row(fault) as counts:
        ranks = place.start(2, place=where, step=step, rank=0, to=[0, 1], signals=["SIGTERM"], without=["handler"],
                            beside=BESIDE in fault)
        counts.control(STOPPED not in ranks.wait() and not (place.path / "status.json").exists())
        assert counts.naive_failed and (steps(place.path) or [0])[-1] < step


# -----------------------------------------------------------------------------
# SIGKILL of a process

SLOW = {"evaluation", "save", "shutdown"}  # take 8 s: longer than the others may live
KILLS = [("set-up", 1, 1, [1]), ("forward", 1, 0, [0]), ("forward", 3, 2, [2]), ("update", 3, 0, [0]),
         ("update", 5, 1, [1]), ("evaluation", 3, 1, [1]), ("save", 4, 0, [0]), ("save", 4, 0, [2]),
         ("shutdown", 8, 0, [2])]


def check_lost(ranks, killed, named=True):
    """The survivors' exit codes, and that they name one that is gone."""
    codes = ranks.wait()
    assert [code for rank, code in enumerate(codes) if rank not in killed] == [LOST] * (len(codes) - len(killed))
    assert f"error: process {killed[0]} is gone" in ranks.said(), ranks.said()[-3000:]


@pytest.mark.parametrize("at", KILLS, ids=str)
def test_sigkill_of_a_process(place, wholes, at):
    """Nobody but the processes themselves ends the others, whatever they are in."""
    where, step, rank, killed = at
    with row(f"SIGKILL of one of 3 processes in {where}") as counts:
        counts.injected += 1
        ranks = place.start(3, place=where, step=step, rank=rank, to=killed, signals=["SIGKILL"],
                            slow={where: 8.0} if where in SLOW and rank not in killed else {})
        counts.took(place.check_gone(ranks, ranks.injected()))
        check_lost(ranks, killed)
        if 0 not in killed:
            reason = {"reason": f"process {killed[0]} is gone", "code": LOST}
            assert status(place.path) == reason | {"step": status(place.path)["step"]}
        place.finish(3, wholes[3].path)
        counts.survived += 1


@pytest.mark.parametrize("i", range(6 * SCALE))
def test_sigkill_at_random_instants(place, wholes, i):
    generator = random.Random(f"{SEED} kill {i}")
    print(f"FAULTS_SEED={SEED}")
    ranks = place.start(3, slow={"forward": 0.01, "save": 0.02, "evaluation": 0.02})
    ranks.wait_until(lambda: len(list(ranks.note.glob("windows-*"))) == 3)
    time.sleep(generator.uniform(0, 1))
    with row("SIGKILL of one of 3 processes at a random instant") as counts:
        counts.injected += 1
        since, killed = time.time(), generator.randrange(3)
        ranks.signal("SIGKILL", [killed])
        counts.took(place.check_gone(ranks, since))
        place.finish(3, wholes[3].path)
        counts.survived += 1


@pytest.mark.parametrize("where", ["save", pytest.param("evaluation", marks=LONG)])
def test_without_the_watch_processes_outlive_one_that_is_gone(place, where):
    """The control: what is not in a collective does not notice."""
    with row(f"SIGKILL of one of 3 processes in {where}") as counts:
        ranks = place.start(2, place=where, step={"evaluation": 3, "save": 4}[where], rank=0, to=[1],
                            signals=["SIGKILL"], slow={where: 8.0}, without=["watch"])
        with pytest.raises(AssertionError):
            place.check_gone(ranks, ranks.injected())
        counts.control(True)


@pytest.mark.parametrize(("signal", "rank", "where", "step"), [
    ("SIGKILL", 0, "save", 4), pytest.param("SIGKILL", 1, "forward", 5, marks=LONG),
    pytest.param("SIGTERM", 1, "forward", 3, marks=LONG)])  # all save and end with 75, a failure to torchrun
def test_max_restarts(place, wholes, signal, rank, where, step):
    with row(f"{signal} to one of 2 processes under torchrun --max-restarts 1: all start again") as counts:
        counts.injected += 1
        ranks = place.start(2, ["--max-restarts", "1"], rank=rank, place=where, step=step, signals=[signal])
        since = ranks.injected()
        first = ranks.pids()
        ranks.wait_until(lambda: not any(alive(pid) for pid in first), since + GONE_S - time.time())
        counts.took(time.time() - since)
        assert ranks.wait(90) == [0], ranks.said()[-3000:]
        resumed = re.findall(r"resuming from .*step-(\d+)", ranks.said())
        newest = {"save": [step - 2], "forward": [step - 1] if signal == "SIGKILL" else [step, step + 1]}[where]
        assert len(resumed) == 1 and int(resumed[0]) in newest, ranks.said()[-3000:]
        assert_same_result(place.path, wholes[2].path)
        counts.survived += 1


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
@pytest.mark.skipif(SCALE == 1, reason="FAULTS_SCALE is 1")
def test_without_restarts_it_is_not_finished(place, signal):
    """The control."""
    with row(f"{signal} to one of 2 processes under torchrun --max-restarts 1: all start again") as counts:
        ranks = place.start(2, ["--max-restarts", "0"], rank=1, place="forward", step=5, signals=[signal])
        counts.control(ranks.wait(90) != [0] and status(place.path)["reason"] != "finished")
        assert counts.naive_failed


# -----------------------------------------------------------------------------
# a process that hangs

HANG_S = 6.0
HANGS = {"set-up": (1, 1, "hang"), "forward": (1, 3, "hang"), "update": (2, 3, "hang"),
         "evaluation": (2, 3, "SIGSTOP"), "save": (0, 4, "hang")}


def test_hang(tmp_path, wholes):
    """
    Named by the others, and all ended within the time that is stated; a process that is stopped cannot end. The
    control, with torch's usual time for it, goes on hanging.
    """
    places = {where: Place(tmp_path / where, wholes[3].runs.data) for where in HANGS}
    trials = {where: places[where].start(3, place=where, rank=rank, step=step, signals=[fault],
                                         changes={"hang_timeout_s": HANG_S})
              for where, (rank, step, fault) in HANGS.items()}
    controls = {where: Place(tmp_path / f"control {where}", wholes[3].runs.data).start(
                    3, place=where, rank=rank, step=step, signals=[fault], changes={"hang_timeout_s": 600.0})
                for where, (rank, step, fault) in HANGS.items() if SCALE > 1 or where == "forward"}
    try:
        for where, (hung, _, fault) in HANGS.items():
            ranks = trials[where]
            with row(f"{fault} of one of 3 processes in {where}, {HANG_S:.0f} s allowed") as counts:
                counts.injected += 1
                since, others = ranks.injected(), [i for i in range(3) if i != hung or fault == "hang"]
                processes = [ranks.processes[i] for i in others]
                ranks.wait_until(lambda processes=processes: not any(one.is_alive() for one in processes),
                                 since + HANG_S + 2.0 - time.time())
                assert f"error: process {hung} hangs" in ranks.said(), ranks.said()[-3000:]
                assert all(one.exitcode == LOST for one in processes)
                counts.detected += 1
                if where in controls:
                    end = controls[where].injected() + HANG_S + 2.0
                    for process in controls[where].processes:
                        process.join(max(0.0, end - time.time()))
                    counts.control(all(process.is_alive() for process in controls[where].processes))
                    assert counts.naive_failed
            ranks.end()
        for place in places.values():  # now, so that nothing waits for it
            place.finish(3, wholes[3].path)
    finally:
        for ranks in *trials.values(), *controls.values():
            ranks.end()


class GoneStore:
    def set(self, key, value):
        raise torch.distributed.DistNetworkError("Broken pipe")


def test_the_store_goes_while_a_process_asks_who_hangs():
    """Process 0 came first to an error, named the one that hangs, and is gone: that is no error of this process."""
    others = Others.__new__(Others)
    others.world_size, others.rank, others.store = 3, 1, GoneStore()
    error = others.explain(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert (str(error), error.exit_code) == ("process 0 is gone", LOST)


def test_slow_is_not_hanging(place):
    """A run that takes longer than the time for a hang, with a save of half that time, is let alone."""
    changes = {"hang_timeout_s": HANG_S, "save_every": 4}
    ranks = place.start(2, slow={"save": HANG_S / 4, "forward": 0.2}, changes=changes)
    assert ranks.wait() == [0, 0] and time.time() - ranks.started > HANG_S


@pytest.mark.parametrize("fault", ["hang", pytest.param("SIGSTOP", marks=LONG)])
def test_hang_under_torchrun(place, fault):
    """Nothing runs in a process that is stopped: torchrun kills it 30 s later."""
    with row(f"{fault} of one of 2 processes under torchrun") as counts:
        counts.injected += 1
        ranks = place.start(2, ["--max-restarts", "0"], changes={"hang_timeout_s": HANG_S}, rank=1, place="forward",
                            step=3, signals=[fault])
        counts.took(place.check_gone(ranks, ranks.injected(), HANG_S + 2.0 + 30.0 * (fault == "SIGSTOP")))
        assert ranks.wait() == [1]
        assert "error: process 1 hangs" in ranks.said()
        assert status(place.path)["code"] == LOST and "process 1 hangs" in status(place.path)["reason"]
        counts.detected += 1


# -----------------------------------------------------------------------------
# SIGKILL of torchrun


def test_sigkill_of_torchrun(place, wholes):
    """One process runs, one is stopped."""
    with row("SIGKILL of torchrun, one process of 2 stopped") as counts:
        counts.injected += 1
        ranks = place.start(2, ["--max-restarts", "0"], place="forward", step=3, rank=1, signals=["SIGSTOP"],
                            slow={"forward": 0.5})
        ranks.injected()
        ranks.launcher.kill()
        counts.took(place.check_gone(ranks, time.time()))
        place.finish(2, wholes[2].path)
        counts.survived += 1


@pytest.mark.parametrize("n_processes", [2, pytest.param(1, marks=LONG)])
def test_sigkill_of_torchrun_before_its_processes_have_begun(place, n_processes):
    """They import torch then, for seconds, and look for torchrun after that; the limit is for both."""
    with row("SIGKILL of torchrun while its processes import torch, 20 s allowed") as counts:
        counts.injected += 1
        ranks = place.start(n_processes, ["--max-restarts", "0"], slow={"forward": 2.0})
        children = Path(f"/proc/{ranks.launcher.pid}/task/{ranks.launcher.pid}/children")
        ranks.wait_until(lambda: len(children.read_text().split()) == n_processes)
        pids = [int(pid) for pid in children.read_text().split()]
        ranks.launcher.kill()
        since = time.time()
        ranks.wait_until(lambda: not any(map(alive, pids)), 20)
        counts.took(time.time() - since)
        assert not place.path.exists()
        counts.detected += 1


@pytest.mark.skipif(SCALE == 1, reason="FAULTS_SCALE is 1")
def test_without_the_watch_torchrun_leaves_orphans(place):
    """The control."""
    with row("SIGKILL of torchrun, one process of 2 stopped") as counts:
        ranks = place.start(2, ["--max-restarts", "0"], place="forward", step=3, rank=1, slow={"forward": 5.0},
                            without=["watch"])
        ranks.injected()
        ranks.launcher.kill()
        with pytest.raises(AssertionError):
            place.check_gone(ranks, time.time())
        counts.control(True)


# -----------------------------------------------------------------------------
# the number of processes changes


def difference(actual: Path, expected: Path) -> float:
    """Largest of the newest weights' distances, each relative to the norm of the weight."""
    x, y = (small.tensors(run / f"step-{steps(run)[-1]:08d}") for run in (actual, expected))
    return max(((x[name] - y[name]).norm() / y[name].norm()).item() for name in x if "/" not in name)


def in_turn(sizes, batch_size) -> str:
    return f"{', '.join(map(str, sizes))} processes in turn, sums of {4 // batch_size} terms"


def windows_in_turn(place, sizes, changes, **fault) -> list[list[int]]:
    """Of each of 8 steps, in the order of the sequences: the run goes on with these numbers of processes in turn."""
    found, ends = [], [2, 5, 8] if len(sizes) == 3 else [3, 8]
    for world_size, start, end in zip(sizes, [0, *ends], ends, strict=False):
        ranks = place.start(world_size, changes=changes | {"stop_after": end}, **fault)
        assert ranks.wait() == [0] * world_size, ranks.said()[-3000:]
        accumulation, read = 4 // (world_size * changes["batch_size"]), ranks.windows()
        found += [[window for micro_step in range(accumulation) for rank in range(world_size)
                   for window in read[rank][(step - start) * accumulation + micro_step]] for step in range(start, end)]
    return found


@pytest.mark.parametrize(("sizes", "batch_size"), [
    ((1, 2, 1), 2), ((2, 1), 2), ((1, 2, 1), 1), ((2, 1), 1), ((1, 4, 2), 1)])
def test_number_of_processes_changes(place, wholes, sizes, batch_size):
    """
    The same windows in each step. A sum of two gradients has one order, in one process or two: the same bits. A sum of
    four is (a + b) + (c + d) or ((a + b) + c) + d: what that changes is measured.
    """
    changes = {"batch_size": batch_size, "total_batch_tokens": 4 * T, "val_tokens": 2 * batch_size * T}
    expected = [train_order((1200 - 1) // T, 0, step, 4).tolist() for step in range(8)]
    with row(in_turn(sizes, batch_size)) as counts:
        counts.injected += 1
        assert windows_in_turn(place, sizes, changes) == expected
        whole = Place(place.runs.directory / "whole", place.runs.data)
        assert whole.start(1, changes=changes).wait() == [0]
        relative = difference(place.path, whole.path)
        assert relative < 1e-3
        if batch_size == 2:
            assert_same_result(place.path, whole.path)
            counts.survived += 1
        else:
            counts.measured(f"the same batches, weights that differ by {relative:.0e} of their norm")
        naive = Place(place.runs.directory / "naive", place.runs.data)
        counts.control(windows_in_turn(naive, sizes, changes, without=["order"]) != expected)
        assert counts.naive_failed
