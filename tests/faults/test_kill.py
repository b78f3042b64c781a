"""Killed anywhere, a run ends as if it had not been: the same bits, each step once in its log."""

import errno
import os
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
import small
from small import assert_same_result, steps

import checkpoint
from tests.faults import trial
from tests.faults.table import record

OPTIONS = {"n_layer": 1, "n_embd": 16, "n_head": 1, "max_steps": 6, "val_every": 3, "save_every": 2}
SEED = int(os.environ.get("FAULTS_SEED", random.SystemRandom().randrange(10**6)))  # printed where a test fails


class Place:
    """Trials in a directory of their own, with common data."""

    def __init__(self, directory, data):
        directory.mkdir(exist_ok=True)
        self.runs = small.Runs(directory, data)
        self.path, self.out = self.runs.path, directory / "out"

    def run(self, fault="none", arguments=(), control=False) -> int:
        return trial.run(self.runs.options(**OPTIONS), self.out, fault, arguments, control)

    def start(self):
        return trial.start(self.runs.options(**OPTIONS), self.out)

    def operations(self) -> list[list[str]]:
        """(number, name, size at fsync, path) of the last trial."""
        return [line.split(" ", 3) for line in trial.operations(self.out)]

    def finish(self, expected, control=False, left=()):
        """The same command again ends as the uninterrupted run, and nothing unfinished is left but `left`."""
        code = self.run(control=control)
        assert code == 0, self.out.read_text()[-2000:]
        assert_same_result(self.path, expected.path)
        if control:
            return
        files, expected_files = ({path.name for path in place.path.iterdir() if path.is_file()}
                                 for place in (self, expected))
        assert files >= expected_files
        assert {path.name for path in self.path.glob(".*")} <= {".lock", *left}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    place = Place(directory, small.make_data(directory / "data"))
    assert place.run() == 0
    assert steps(place.path) == [4, 6]
    return place


@pytest.fixture
def place(tmp_path, whole):
    return Place(tmp_path / "place", whole.runs.data)


def targets(operations) -> list[tuple[int, float]]:
    """Where to kill: before each operation, and within the first and the last of several writes to a file."""
    found = []
    for i, (n, *operation) in enumerate(operations):
        neighbours = [operations[j][1:] for j in (i - 1, i + 1) if 0 <= j < len(operations)]
        if operation[0] != "write":
            found.append((int(n), 0.0))
        elif neighbours.count(operation) < 2:
            found += [(int(n), 0.0), (int(n), 0.5)]
    return found


def kill_everywhere(place, whole, prepare):
    """`prepare` makes the state in which a run begins; the run is killed at each of its operations, and finished."""
    prepare()
    place.finish(whole)
    operations, begun = place.operations(), time.time()
    for at in targets(operations):
        prepare()
        assert place.run("kill_at", at) == -9, (at, operations[at[0] - 1])
        place.finish(whole)
    n = len(targets(operations))
    record("kill -9 at every file operation", n, n, 0, 0, 0, time.time() - begun)


def test_at_every_operation(whole, place):
    kill_everywhere(place, whole, lambda: shutil.rmtree(place.runs.out_dir, ignore_errors=True))


def short(operation: str, path: str) -> tuple[str, str]:
    """Without where the run is, and what tempfile draws."""
    name = {"replace": "rename", "unlinkat": "unlink", "remove": "unlink", "openat": "open"}.get(operation, operation)
    return name, re.sub(r"(json|jsonl)\..{8}\.tmp$", r"\1.tmp", os.path.basename(path))


def without_repeats(operations: list) -> list:
    return [one for i, one in enumerate(operations) if i == 0 or one != operations[i - 1]]


def test_strace_sees_the_same_operations(whole, place):
    """All by which the real command changes files in its directory are those that the shim counts, in their order."""
    if not shutil.which("strace"):
        record("strace against the shim (no strace here)", 0, 0, 0, 0, 0, 0)
        pytest.skip("there is no strace")
    place.finish(whole)
    counted = [short(name, path) for _, name, _, path in place.operations() if f"{place.path}/" in path]
    shutil.rmtree(place.runs.out_dir)
    calls = "openat,write,pwrite64,fsync,fdatasync,rename,renameat2,unlink,unlinkat,rmdir,mkdir,ftruncate,truncate"
    log = place.runs.directory / "strace"
    command = [sys.executable, str(small.ROOT / "train_gpt2.py"), *place.runs.options(**OPTIONS)]
    subprocess.run(["strace", "-f", "-y", "-s", "0", "-e", f"trace={calls}", "-o", log, *command], check=True,
                   capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    seen = []
    for line in log.read_text().splitlines():
        call = re.match(r'\d+ +(\w+)\((?:\d+<([^>]*)>|AT_FDCWD<[^>]*>)?(?:, )?(?:"([^"]*)")?(.*)', line)
        if call is None or (call[1] == "openat" and not re.search("O_WRONLY|O_RDWR", call[4])):
            continue
        path = os.path.join(call[2] or "", call[3] or "").rstrip("/")
        if f"{place.path}/" in path:
            seen.append(short("rmdir" if "AT_REMOVEDIR" in line else call[1], path))
    opened_by_tempfile = {("open", name) for _, name in seen if name.endswith(".tmp")}
    seen = without_repeats([one for one in seen if one not in opened_by_tempfile])
    other = ("write", ".metrics.jsonl.tmp")  # of nothing, which is no call
    counted = without_repeats([one for one in counted if one[0] != "chmod" and one != other])
    assert seen == counted
    record("strace against the shim: operations", len(seen), len(seen), 0, 0, 0, 0)


def test_the_order_in_which_a_save_is_made_safe(whole, place):
    """Each file and then its directory are synced before the rename, what holds the directory after it."""
    place.finish(whole)
    operations = [(name, path.removeprefix(str(place.path)).strip("/")) for _, name, _, path in place.operations()]
    for step in 2, 4, 6:
        saving = f".saving-step-{step:08d}"
        renamed = operations.index(("rename", saving))
        synced = [path for name, path in operations[:renamed] if name == "fsync"]
        for file in *checkpoint.FILES, "manifest.json":
            assert f"{saving}/{file}" in synced
            last_write = max(i for i, one in enumerate(operations) if one == ("write", f"{saving}/{file}"))
            assert operations.index(("fsync", f"{saving}/{file}")) > last_write
        assert synced[-1] == saving and operations[renamed + 1] == ("fsync", "")


def test_at_every_operation_before_the_first_step_on_new_data(whole, place):
    """The data's hashes are checked and noted on first use."""
    def prepare():
        shutil.rmtree(place.runs.out_dir, ignore_errors=True)
        shutil.rmtree(place.runs.data, ignore_errors=True)
        small.make_data(place.runs.data)

    place.runs.data = place.runs.directory / "data"
    prepare()
    place.finish(whole)
    noted = [int(n) for n, *_, path in place.operations() if str(place.runs.data) in path]
    assert noted
    for n in noted:
        prepare()
        assert place.run("kill_at", (n, 0.5)) == -9
        place.finish(whole)


def test_at_every_operation_of_a_resumed_run(whole, place, tmp_path):
    """Killed in a save, and again wherever the next start, its recovery and its saves change files."""
    killed = Place(tmp_path / "killed", whole.runs.data)
    killed.finish(whole)
    in_save = next(int(n) for n, name, _, path in killed.operations() if name == "rename" and path.endswith("00000004"))
    shutil.rmtree(killed.runs.out_dir)
    assert killed.run("kill_at", (in_save,)) == -9 and list(killed.path.glob(".saving-*"))

    def prepare():
        shutil.rmtree(place.path, ignore_errors=True)
        shutil.copytree(killed.path, place.path)

    kill_everywhere(place, whole, prepare)


STATES = ("missing", "empty", "zeros", "half", "full")


def lose_power(operations, state) -> int:
    """What of the files was not yet on the disk is put into this state; how many files that are."""
    on_disk, n_lost = {}, 0
    for _, name, n_bytes, path in operations:
        if name in ("open", "write"):
            on_disk.setdefault(path, 0)
        elif name == "fsync":
            on_disk[path] = int(n_bytes)
    for path, kept in on_disk.items():
        n = os.path.getsize(path) if os.path.isfile(path) else 0
        if n <= kept and not (n == 0 and os.path.isfile(path)):
            continue
        n_lost += 1
        if state == "full":
            continue
        if state == "missing" and not kept:
            os.unlink(path)
        elif state == "zeros":
            with open(path, "r+b") as file:
                file.seek(kept)
                file.write(bytes(n - kept))
        else:
            os.truncate(path, kept + (n - kept) // 2 * (state == "half"))
    return n_lost


@pytest.mark.parametrize("state", STATES)
def test_power_loss(whole, place, state):
    """At each fsync, rename and removal: files that are not on the disk yet are lost, empty, zeros or half."""
    def prepare():
        shutil.rmtree(place.runs.out_dir, ignore_errors=True)

    prepare()
    place.finish(whole)
    operations, n_cuts, n_lost, begun = place.operations(), 0, 0, time.time()
    for n, name, *_ in operations:
        if name in ("fsync", "rename", "replace", "rmdir"):
            prepare()
            assert place.run("kill_at", (int(n),)) == -9
            n_cuts, n_lost = n_cuts + 1, n_lost + lose_power(place.operations()[:-1], state)
            place.finish(whole)
    assert n_lost > 20
    record(f"loss of power, files not yet synced: {state}", n_cuts, n_cuts, 0, 0, 0, time.time() - begun)


def test_the_same_faults_end_naive_runs(whole, place):
    """The control: where a save in place is killed, the run that goes on fails or ends with other bits."""
    shutil.rmtree(place.runs.out_dir, ignore_errors=True)
    place.finish(whole, control=True)
    operations, failed, tried = place.operations(), 0, 0
    for at in targets(operations):
        if "step-00000004" in operations[at[0] - 1][3]:
            shutil.rmtree(place.runs.out_dir)
            assert place.run("kill_at", at, control=True) == -9
            tried += 1
            try:
                place.finish(whole, control=True)
            except (AssertionError, OSError):
                failed += 1
    print(f"naive: {failed} of {tried} fail")
    assert failed > tried / 2
    record("kill -9 at every file operation", 0, 0, 0, failed, tried, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_error_at_every_operation(whole, place, number):
    """Goes on and ends as if nothing had been, or ends with exit code 5, one line, and every checkpoint made before."""
    shutil.rmtree(place.runs.out_dir, ignore_errors=True)
    place.finish(whole)
    operations, codes, begun = place.operations(), [], time.time()
    for at, part in targets(operations):
        if part:
            continue
        shutil.rmtree(place.runs.out_dir)
        codes.append(place.run("fail_at", (at, number)))
        said = place.out.read_text()
        n_saved = sum(name == "rename" and ".saving-" in path for _, name, _, path in operations[:at - 1])
        where = operations[at - 1], said[-1000:]
        assert codes[-1] in (0, 5) and "Traceback" not in said, where
        if codes[-1] == 5:
            assert f"error: cannot write to {place.runs.out_dir}" in said and os.strerror(number) in said, where
        if place.path.exists():
            assert len(checkpoint.list_checkpoints(place.path)) >= min(n_saved, 2), where
            assert all(checkpoint.find_fault(path) is None for path in checkpoint.list_checkpoints(place.path)), where
        place.finish(whole, left=[".removing-step-00000002"])
    assert codes.count(0) > codes.count(5) > 5
    n = len(codes)
    record(f"{errno.errorcode[number]} at every file operation", n, n, 0, 0, 0, time.time() - begun)


def test_at_random_instants(whole, tmp_path):
    """Several times in a run, until it is not killed."""
    print(f"FAULTS_SEED={SEED}")
    generator, n_runs, n_killed, begun = random.Random(SEED), 0, 0, time.time()
    while n_runs < 60 * trial.SCALE or n_killed < 150 * trial.SCALE:
        n_runs += 1
        place = Place(tmp_path / f"{n_runs}", whole.runs.data)
        for _ in range(generator.randint(2, 5)):
            process = place.start()
            process.join(generator.uniform(0, 0.3))
            process.kill()
            process.join()
            n_killed += process.exitcode == -9
        place.finish(whole)
        shutil.rmtree(place.runs.directory)
    record("kill -9 at random instants", n_killed, n_killed, 0, 0, 0, time.time() - begun)


def test_the_real_command_at_random_instants(whole, place):
    """`python train_gpt2.py` in a process of its own, from its first operation on."""
    print(f"FAULTS_SEED={SEED}")
    generator, begun = random.Random(SEED), time.time()
    for _ in range(3 * trial.SCALE):
        process, n_lines = place.runs.start(**OPTIONS), generator.randint(1, 8)
        for _ in range(n_lines):  # what it prints is its clock: start-up takes seconds, the steps take less
            process.stdout.readline()
        while process.poll() is None and not place.path.exists():
            process.stdout.readline()
        process.kill()
        process.wait()
        if place.path.exists() and (place.path / "status.json").exists():
            shutil.rmtree(place.path)
    place.finish(whole)
    record("kill -9 of the real command", 3 * trial.SCALE, 3 * trial.SCALE, 0, 0, 0, time.time() - begun)
