"""Disks that are full, small or read-only, files that cannot grow, two runs in one directory."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import connection

import pytest
import small

import checkpoint
from tests.faults import trial
from tests.faults.table import BESIDE, row
from tests.faults.test_kill import OPTIONS, Place, naive_fails, steps_saved, whole  # noqa: F401 (a fixture)

BESIDE_OR_NOT = pytest.mark.parametrize("beside", [False, True], ids=["", "saves beside"])


def n_bytes(run) -> str:
    """What a checkpoint needs, as it is in messages."""
    newest = checkpoint.list_checkpoints(run)[0]
    return f"{sum(tensor.nbytes for tensor in small.tensors(newest).values()):,} bytes"


def assert_nothing_is_lost(place, whole, code):  # noqa: F811
    """Every checkpoint that was made is there and whole, and the end is one of the two that are documented."""
    said = place.out.read_text()
    assert code in (0, 5) and "Traceback" not in said, said[-1000:]
    if code == 5:
        assert f"error: cannot write to {place.runs.out_dir}" in said and " bytes free)" in said, said[-1000:]
    for line in said.splitlines():
        assert "is not saved" not in line or f"is not saved, {n_bytes(whole.path)}" in line
    found = checkpoint.list_checkpoints(place.path)
    assert len(found) >= min(steps_saved(place.operations()), 2)
    assert all(checkpoint.find_fault(path) is None for path in found)


ON_SMALL_DISKS = {"test_disks_of_20_sizes": "a disk of 20 sizes",
                  "test_a_read_only_disk": "a place that cannot be written to",
                  "test_a_disk_that_has_room_again": "a disk that is full at one save"}


@pytest.fixture
def small_disk(request, tmp_path):
    """A directory on a disk of its own, whose KiB can be changed."""
    path = tmp_path / "disk"
    path.mkdir()

    def resize(kib, option="remount,"):
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={kib}k", "tmpfs", path]
        return subprocess.run(command, capture_output=True).returncode

    if shutil.which("mount") is None or resize(4, option=""):
        with row(ON_SMALL_DISKS[request.node.name]):
            pytest.skip("mounting a file system needs rights that this process does not have")
    yield path, resize
    subprocess.run(["umount", "-l", path], check=True)


@BESIDE_OR_NOT
def test_disks_of_20_sizes(whole, small_disk, beside):  # noqa: F811
    """From one that has no room for the first file to one that has room for all, with one save in hand."""
    disk, resize = small_disk
    place, codes, n_saved = Place(disk / "place", whole.runs.data, beside), [], []
    place.out = disk.parent / "out"  # what the process says is not on that disk
    needed = sum(path.stat().st_size for path in whole.path.rglob("*") if path.is_file()) * 3 // 2 // 1024
    with row("a disk of 20 sizes" + BESIDE * beside) as counts:
        for i in range(20):
            for control in True, False:
                shutil.rmtree(place.runs.out_dir, ignore_errors=True)
                resize(8 + needed * i // 17)
                counts.injected += not control
                code = place.run(control=control)
                if control:
                    resize(4 * needed)
                    counts.control(naive_fails(place, whole))
                else:
                    codes.append(code)
                    assert_nothing_is_lost(place, whole, code)
                    n_saved.append(len(checkpoint.list_checkpoints(place.path)))
                    resize(4 * needed)
                    place.finish(whole, left=[".removing-step-00000002"])
                    counts.survived += code == 0
                    counts.detected += code == 5
        assert codes.count(5) > 5 and 0 in codes and set(n_saved) == {0, 1, 2}, (codes, n_saved)
        assert counts.naive_failed > 3


def test_a_disk_that_has_room_again(whole, small_disk, monkeypatch, capsys):  # noqa: F811
    """Training goes on after a save for which there was no room, and the next one is made."""
    disk, resize = small_disk
    resize(600)
    runs = small.Runs(disk, whole.runs.data)
    (disk / "other").write_bytes(bytes(500 * 1024))
    original = checkpoint.Saver.failed

    def failed(self, error):
        original(self, error)
        (disk / "other").unlink()

    monkeypatch.setattr(checkpoint.Saver, "failed", failed)
    with row("a disk that is full at one save") as counts:
        counts.injected += 1
        assert runs(**OPTIONS) == 0
        err = capsys.readouterr().err
        assert f"step 2 is not saved, {n_bytes(whole.path)}, trying again" in err and err.count("is not saved") == 1
        assert small.steps(runs.path) == [4, 6]
        small.assert_same_result(runs.path, whole.path)
        counts.survived += 1


@BESIDE_OR_NOT
@pytest.mark.parametrize("limit", [30_000, 40_000, 60_000, 80_000])
def test_files_that_cannot_grow(whole, tmp_path, limit, beside):  # noqa: F811
    """By a limit of the system (ulimit -f): the weights take 46 kB, the optimizer's state 92 kB."""
    place = Place(tmp_path / "place", whole.runs.data, beside)
    with row("files that cannot grow" + BESIDE * beside) as counts:
        counts.injected += 1
        code = place.run("file_size_limit", (limit,))
        assert code == 5 and "File too large" in place.out.read_text()
        assert_nothing_is_lost(place, whole, code)
        place.finish(whole)
        counts.detected += 1
        shutil.rmtree(place.path)
        if not beside:  # a thread cannot ask for it
            assert place.run("file_size_limit", (limit, True)) == -signal.SIGXFSZ  # so the signal is really sent
            place.finish(whole)
            shutil.rmtree(place.path)
        place.run("file_size_limit", (limit,), control=True)
        counts.control(naive_fails(place, whole))


def test_the_real_command_where_files_cannot_grow(whole, tmp_path):  # noqa: F811
    """The signal that the system sends with it, SIGXFSZ, does not kill it: three saves fail, then it ends."""
    place = Place(tmp_path / "place", whole.runs.data)
    with row("files that cannot grow") as counts:
        counts.injected += 1
        process = place.runs.start(**OPTIONS | {"max_steps": 100, "val_every": 0})
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
        assert process.communicate()[0] and process.returncode == 5
        said = (place.runs.directory / "stderr").read_text()
        assert "Traceback" not in said
        assert said.count("File too large") == said.count(f"saved, {n_bytes(whole.path)}") == 3
        assert len(small.metrics(place.path)) == 6 and small.steps(place.path) == []
        counts.detected += 1


# -----------------------------------------------------------------------------
# read-only


def assert_refused(place, where, unprivileged=False):
    """
    With exit code 5 and one line, before a model is described, let alone built, or data, which are missing, read; at
    length in the time that is promised, once in three times, since a machine has more to do.
    """
    options, times = place.runs.options(out_dir=where, data=place.runs.directory / "missing"), []
    with row("a place that cannot be written to") as counts:
        for _ in range(1 if trial.SCALE == 1 else 3):
            counts.injected += 1
            begun = time.time()
            process = subprocess.Popen([sys.executable, str(small.ROOT / "train_gpt2.py"), *options], text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       preexec_fn=give_up_rights if unprivileged else None,
                                       env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
            said, errors = process.communicate()
            times.append(time.time() - begun)
            assert process.returncode == 5 and errors.startswith("error: ") and errors.count("\n") == 1, errors
            assert str(where) in errors and "parameters" not in said
            counts.detected += 1
        counts.took(min(times))
        assert trial.SCALE == 1 or min(times) < 3.0
        if not unprivileged:  # which a trial is not
            code = trial.run(options, place.out, control=True)
            counts.control(code != 5 or "parameters" in place.out.read_text())
            assert counts.naive_failed


def give_up_rights():
    """Root may write where a mode forbids it: without CAP_DAC_OVERRIDE (1) it may not, nor may its children."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, <linux/prctl.h>


def test_a_read_only_disk(whole, small_disk, tmp_path):  # noqa: F811
    disk, resize = small_disk
    resize(4, option="remount,ro,")
    assert_refused(Place(tmp_path / "place", whole.runs.data), disk)


def test_a_directory_without_the_right_to_write(whole, tmp_path):  # noqa: F811
    (tmp_path / "mine").mkdir(mode=0o555)
    assert_refused(Place(tmp_path / "place", whole.runs.data), tmp_path / "mine", unprivileged=True)


def test_below_a_file(whole, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("mine")
    assert_refused(Place(tmp_path / "place", whole.runs.data), tmp_path / "file")


# -----------------------------------------------------------------------------
# one run in a directory


def race(place, options, control=False) -> tuple[list, list]:
    """Four runs started at once: those that train, and the exit codes of the others, when all have come so far."""
    outs = [place.out.with_name(f"out {i}") for i in range(4)]
    processes = [trial.start(place.runs.options(**options), out, control=control) for out in outs]

    def trains(out):
        return out.exists() and "attention kernels" in out.read_text()

    while not all(trains(out) or not process.is_alive() for process, out in zip(processes, outs, strict=True)):
        connection.wait([process.sentinel for process in processes if process.is_alive()], timeout=0.05)
    training = [process for process, out in zip(processes, outs, strict=True) if trains(out)]
    return training, [process.exitcode for process in processes if process not in training]


def test_one_run_in_a_directory(whole, tmp_path):  # noqa: F811
    """Of those started at once one trains and the others end with 3; the lock is free as soon as it is killed."""
    options = OPTIONS | {"max_steps": 100_000}
    with row("four runs at once in one directory, the winner killed") as counts:
        for i in range(4 * trial.SCALE):
            place = Place(tmp_path / f"{i}", whole.runs.data)
            counts.injected += 1
            (winner,), others = race(place, options)
            assert others == [3, 3, 3] and winner.is_alive()
            winner.kill()
            winner.join()
            assert winner.exitcode == -9
            log = place.path / "metrics.jsonl"  # which there may not be yet
            options |= {"stop_after": (log.read_text().count("\n") if log.exists() else 0) // 2 * 2 + 4}
            for run_name in "run", "whole":
                arguments = place.runs.options(**options, run_name=run_name)
                assert trial.run(arguments, place.out) == 0, place.out.read_text()
            small.assert_same_result(place.path, place.runs.out_dir / "whole")
            counts.survived += 1
            del options["stop_after"]
        control, codes = race(Place(tmp_path / "control", whole.runs.data), options, control=True)
        for process in control:
            process.kill()
            process.join()
        counts.control(codes != [3, 3, 3])  # more of them train, or they meet what another one writes
        assert counts.naive_failed
