"""Disks that are full or small, files that cannot grow, two runs in one directory."""

import shutil
import subprocess
import time

import pytest
from safetensors import SafetensorError

import checkpoint
from tests.faults import trial
from tests.faults.table import record
from tests.faults.test_kill import Place, whole  # noqa: F401 (a fixture)


def assert_nothing_is_lost(place, code):
    """Every checkpoint that is there is whole, and the end is one of the two that are documented."""
    said = place.out.read_text()
    assert code in (0, 5) and "Traceback" not in said, said[-1000:]
    if code == 5:
        assert f"error: cannot write to {place.runs.out_dir}" in said and " bytes free)" in said, said[-1000:]
    for path in checkpoint.list_checkpoints(place.path):
        assert checkpoint.find_fault(path) is None


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a disk of its own, whose KiB can be changed."""
    path = tmp_path / "disk"
    path.mkdir()

    def resize(kib, option="remount,"):
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={kib}k", "tmpfs", path]
        return subprocess.run(command, capture_output=True).returncode

    if shutil.which("mount") is None or resize(4, option=""):
        record("a disk of 20 sizes (no right to mount here)", 0, 0, 0, 0, 0, 0)
        pytest.skip("mounting a file system needs rights that this process does not have")
    yield path, resize
    subprocess.run(["umount", path], check=True)


def test_disks_of_20_sizes(whole, small_disk):  # noqa: F811
    """From one that has no room for the first file to one that has room for all but the last."""
    disk, resize = small_disk
    place, codes, naive_failed, begun = Place(disk / "place", whole.runs.data), [], 0, time.time()
    place.out = disk.parent / "out"  # what the process says is not on that disk
    needed = sum(path.stat().st_size for path in whole.path.rglob("*") if path.is_file()) * 3 // 2 // 1024
    for i in range(20):
        for control in True, False:
            shutil.rmtree(place.runs.out_dir, ignore_errors=True)
            resize(8 + needed * i // 20)
            code = place.run(control=control)
            if not control:
                codes.append(code)
                assert_nothing_is_lost(place, code)
            resize(4 * needed)
            try:
                place.finish(whole, control=control, left=[".removing-step-00000002"])
            except (AssertionError, OSError, SafetensorError):
                assert control
                naive_failed += 1
    assert codes.count(5) > 5 and naive_failed > 5, (codes, naive_failed)
    record("a disk of 20 sizes", 20, 20, 0, naive_failed, 20, time.time() - begun)


@pytest.mark.parametrize("limit", [30_000, 40_000, 60_000, 80_000])
def test_files_that_cannot_grow(whole, tmp_path, limit):  # noqa: F811
    """By a limit of the system (ulimit -f): the weights take 46 kB, the optimizer's state 92 kB."""
    place, begun = Place(tmp_path / "place", whole.runs.data), time.time()
    code = place.run("file_size_limit", (limit,))
    assert code == 5 and "File too large" in place.out.read_text()
    assert_nothing_is_lost(place, code)
    place.finish(whole)
    record("files that cannot grow", 1, 1, 0, 0, 0, time.time() - begun)


def test_two_runs_in_one_directory(whole, tmp_path):  # noqa: F811
    """Started at once: one has it, the other ends with 3, or finds it finished. The result is that of one."""
    begun, codes = time.time(), []
    for i in range(6 * trial.SCALE):
        first, second = (Place(tmp_path / f"{i}", whole.runs.data) for _ in range(2))
        second.out = first.out.with_name("out of the second")
        processes = [first.start(), second.start()]
        for process in processes:
            process.join()
        codes.append(sorted(process.exitcode for process in processes))
        assert codes[-1] in ([0, 3], [0, 0])
        first.finish(whole)
    assert codes.count([0, 3]) > len(codes) / 2
    record("two runs in one directory", len(codes), len(codes), 0, 0, 0, time.time() - begun)
