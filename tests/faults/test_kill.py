"""Killed anywhere, a run ends as if it had not been: the same bits, each step once in its log."""

import errno
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import small
from safetensors import SafetensorError
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

    def operations(self) -> list[trial.Operation]:
        """Of the last trial."""
        return trial.operations(self.out)

    def finish(self, expected, control=False, left=(), message=""):
        """The same command again ends as the uninterrupted run, and nothing unfinished is left but `left`."""
        code = self.run(control=control)
        assert code == 0, (message, self.out.read_text()[-2000:])
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


@pytest.fixture(scope="module")
def killed(tmp_path_factory, whole):
    """A run that was killed at the end of its second save."""
    place = Place(tmp_path_factory.mktemp("killed"), whole.runs.data)
    place.finish(whole)
    in_save = next(one.n for one in place.operations() if one.name == "rename" and one.to.endswith("00000004"))
    shutil.rmtree(place.runs.out_dir)
    assert place.run("kill_at", (in_save,)) == -9 and list(place.path.glob(".saving-*"))
    return place


@pytest.fixture
def place(tmp_path, whole):
    return Place(tmp_path / "place", whole.runs.data)


def targets(operations) -> list[tuple[int, float]]:
    """Where to kill: before each operation, and within the first and the last of several writes to a file."""
    found = []
    for i, one in enumerate(operations):
        neighbours = [operations[j][1:] for j in (i - 1, i + 1) if 0 <= j < len(operations)]
        if one.name != "write":
            found.append((one.n, 0.0))
        elif neighbours.count(one[1:]) < 2:
            found += [(one.n, 0.0), (one.n, 0.5)]
    return found


def kill_everywhere(place, whole, prepare, kind):
    """`prepare` makes the state in which a run begins; the run is killed at each of its operations, and finished."""
    prepare()
    place.finish(whole)
    operations, begun = place.operations(), time.time()
    for at in targets(operations):
        prepare()
        assert place.run("kill_at", at) == -9, (at, operations[at[0] - 1])
        place.finish(whole)
    n = len(targets(operations))
    record(f"kill -9 at every file operation, {kind}", n, n, 0, 0, 0, time.time() - begun)


def test_at_every_operation(whole, place):
    kill_everywhere(place, whole, lambda: shutil.rmtree(place.runs.out_dir, ignore_errors=True), "a new run")


CALLS = ("chmod", "creat", "fallocate", "fchmod", "fchmodat", "fdatasync", "fsync", "ftruncate", "link", "linkat",
         "mkdir", "mkdirat", "open", "openat", "openat2", "pwrite64", "pwritev", "pwritev2", "rename", "renameat",
         "renameat2", "rmdir", "sendfile", "symlink", "symlinkat", "truncate", "unlink", "unlinkat", "write", "writev")
SAME = {"creat": "open", "fchmod": "chmod", "fchmodat": "chmod", "linkat": "link", "mkdirat": "mkdir", "openat": "open",
        "pwritev2": "pwritev", "remove": "unlink", "renameat": "rename", "renameat2": "rename", "replace": "rename",
        "unlinkat": "unlink"}


def strace(command: list[str], directory, log) -> list[tuple]:
    """(name, path, new path) of the calls, in order, by which a command and its children change files in there."""
    calls = ",".join(f"?{name}" for name in CALLS)
    subprocess.run(["strace", "-f", "-y", "-s", "0", "-e", f"trace={calls}", "-o", log, *command], check=True,
                   capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    seen = []
    for line in log.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call is None or (call[1] in ("open", "openat") and not re.search("O_WRONLY|O_RDWR|O_CREAT", call[2])):
            continue
        name = "rmdir" if "AT_REMOVEDIR" in line else SAME.get(call[1], call[1])
        paths = [os.path.join(*pair) for pair in re.findall(r'(?:<([^>]*)>, )?"([^"]+)"', call[2])]
        first, to = (*(paths or re.findall("<([^>]*)>", call[2])), "", "")[:2]
        if f"{first}/".startswith(f"{directory}/"):
            if name == "open" and first.endswith(".tmp"):  # tempfile's: Python's `open` gets the directory
                first = os.path.dirname(first)
            seen.append((name, first, to if name in ("rename", "link") else ""))
    return seen


def comparable(operations: list[tuple]) -> list[tuple]:
    """Without what tempfile draws; writes one after the other to a file are one."""
    operations = [(SAME.get(name, name), *(re.sub(r"(json|jsonl)\..{8}\.tmp$", r"\1.tmp", path) for path in paths))
                  for name, *paths in operations]
    return [one for i, one in enumerate(operations) if one[0] != "write" or i == 0 or one != operations[i - 1]]


@pytest.fixture
def has_strace():
    if not shutil.which("strace") or subprocess.run(["strace", "true"], capture_output=True).returncode:
        record("strace against the shim (there is no strace here, or no right to trace)", 0, 0, 0, 0, 0, 0)
        pytest.skip("there is no strace here, or no right to trace")


def test_strace_reports_each_way_to_change_a_file(tmp_path, has_strace):
    """The control of the next test: ways around the shim, in a thread and in a child, are seen."""
    log = tmp_path.with_name("log")
    code = """if True:
        import os, subprocess, sys, threading
        d = sys.argv[1] + "/d"
        os.mkdir(d)
        file = os.open(d + "/a", os.O_CREAT | os.O_RDWR)
        thread = threading.Thread(target=os.write, args=(file, b"x"))
        thread.start()
        thread.join()
        os.ftruncate(file, 0)
        os.pwritev(file, [b"x"], 1)
        os.fdatasync(file)
        os.fchmod(file, 0o600)
        os.link(d + "/a", d + "/b")
        subprocess.run(["mv", d + "/b", d + "/c"])
        os.unlink("c", dir_fd=os.open(d, os.O_RDONLY))
        os.truncate(d + "/a", 3)"""
    seen = strace([sys.executable, "-c", code, str(tmp_path)], tmp_path, log)
    assert [tuple(path.removeprefix(f"{tmp_path}/") for path in one) for one in seen] == [
        ("mkdir", "d", ""), ("open", "d/a", ""), ("write", "d/a", ""), ("ftruncate", "d/a", ""),
        ("pwritev", "d/a", ""), ("fdatasync", "d/a", ""), ("chmod", "d/a", ""), ("link", "d/a", "d/b"),
        ("rename", "d/b", "d/c"), ("unlink", "d/c", ""), ("truncate", "d/a", "")]


@pytest.mark.parametrize("kind", ["a new run", "a resumed run"])
def test_strace_sees_the_same_operations(whole, killed, place, has_strace, kind):
    """All by which the real command changes files are those that the shim counts, in their order."""
    begun, out_dir = time.time(), place.runs.out_dir

    def prepare():
        shutil.rmtree(out_dir, ignore_errors=True)
        if kind == "a resumed run":
            shutil.copytree(killed.runs.out_dir, out_dir)

    prepare()
    place.finish(whole)
    counted = [(one.name, one.path, one.to) for one in place.operations()]
    prepare()
    command = [sys.executable, str(small.ROOT / "train_gpt2.py"), *place.runs.options(**OPTIONS)]
    seen = strace(command, place.runs.directory, place.runs.directory / "strace")
    assert_same_result(place.path, whole.path)
    assert comparable(seen) == comparable(counted)
    n = len(comparable(seen))
    record(f"operations seen by strace that the shim counts, {kind}", n, n, 0, 0, 0, time.time() - begun)


def out_of_order(operations) -> list[str]:
    """
    Renames before what is renamed is on the disk, or not followed at once by fsync of the directory that has the name;
    a checkpoint ahead of metrics.jsonl. What is only set aside needs none of it.
    """
    unsynced, wrong = set(), []  # files with new bytes, directories with new names
    for one, following in zip(operations, [*operations[1:], None], strict=True):
        if one.name == "fsync":
            unsynced.discard(one.path)
        elif one.name in ("open", "write", "mkdir") and not os.path.isdir(one.path):
            unsynced |= {one.path, os.path.dirname(one.path)}
        elif one.name in ("rename", "replace") and ".removing-" not in one.to:
            late = [path for path in unsynced if f"{path}/".startswith(f"{one.path}/")]
            if ".saving-" in one.path:
                late += [path for path in unsynced if path.endswith("metrics.jsonl")]
            parent = os.path.dirname(one.to)
            if late or following is None or (following.name, following.path) != ("fsync", parent):
                wrong.append(f"{one.n} {one.path} -> {one.to} {late}")
    return wrong


def test_the_order_in_which_files_are_made_safe(whole, place):
    """fsync of the file, rename, fsync of its directory; without any one of the fsyncs it would be seen."""
    place.finish(whole)
    operations = place.operations()
    names = [os.path.basename(one.to) for one in operations if one.name in ("rename", "replace")]
    assert names == ["config.json", "config.json", "metrics.jsonl", *map(checkpoint.directory_name, (2, 4, 6)),
                     ".removing-step-00000002", "status.json"]
    assert out_of_order(operations) == []
    unseen = [one for one in operations
              if one.name == "fsync" and not out_of_order([other for other in operations if other != one])]
    directory = place.runs.directory
    assert [str(Path(path).relative_to(directory)) for _, path in comparable([one[1::2] for one in unseen])] == [
        "runs", ".",  # nothing is renamed there; test_power_loss sees them
        "runs/run/source.diff", "runs/run/.metrics.jsonl.tmp",  # which has no bytes yet
        "runs/run/metrics.jsonl"]  # after the last save


def test_at_every_operation_before_the_first_step_on_new_data(whole, place):
    """The data's hashes are checked and noted on first use."""
    def prepare():
        shutil.rmtree(place.runs.out_dir, ignore_errors=True)
        shutil.rmtree(place.runs.data, ignore_errors=True)
        small.make_data(place.runs.data)

    place.runs.data = place.runs.directory / "data"
    prepare()
    place.finish(whole)
    noted, begun = [one.n for one in place.operations() if str(place.runs.data) in one.path], time.time()
    assert noted
    for n in noted:
        prepare()
        assert place.run("kill_at", (n, 0.5)) == -9
        place.finish(whole)
    record("kill -9 at every file operation, new data", len(noted), len(noted), 0, 0, 0, time.time() - begun)


def test_at_every_operation_of_a_resumed_run(whole, killed, place):
    """Killed in a save, and again wherever the next start, its recovery and its saves change files."""
    def prepare():
        shutil.rmtree(place.path, ignore_errors=True)
        shutil.copytree(killed.path, place.path)

    kill_everywhere(place, whole, prepare, "a resumed run")


# -----------------------------------------------------------------------------
# power loss

STATES = ("missing", "empty", "zeros", "half", "full")  # of files that are not on the disk yet


def lose_contents(operations, state) -> int:
    """Puts what of the files was not yet on the disk into this state; how many files that are."""
    on_disk, n_lost = {}, 0
    for one in operations:
        if one.name in ("open", "write"):
            on_disk.setdefault(one.path, 0)
        elif one.name == "fsync":
            on_disk[one.path] = one.n_bytes
        elif one.name in ("rename", "replace"):  # the name may be on the disk before the bytes are
            on_disk = {path.replace(one.path, one.to, 1) if f"{path}/".startswith(f"{one.path}/") else path: n_bytes
                       for path, n_bytes in on_disk.items()}
    for path, kept in on_disk.items():
        n = os.path.getsize(path) if os.path.isfile(path) else 0
        if state == "full" or n <= kept:
            continue
        n_lost += 1
        if state == "missing" and not kept:
            os.unlink(path)
        elif state == "zeros":
            with open(path, "r+b") as file:
                file.seek(kept)
                file.write(bytes(n - kept))
        else:
            os.truncate(path, kept + (n - kept) // 2 * (state == "half"))
    return n_lost


def contents(directory) -> dict[str, bytes | None]:
    """Every file and, as None, every directory."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in (directory, *directory.rglob("*"))
            if path.exists()}


def lose_names(operations, before: dict[str, bytes | None]) -> int:
    """Takes back what was made, renamed and removed in a directory since its last fsync; how many names that are."""
    pending, known = [], set(before)
    for one in operations:
        if one.name == "fsync":
            pending = [(name, path, to) for name, path, to in pending if os.path.dirname(path) != one.path]
        elif one.name in ("rename", "replace", "unlink") or (one.name == "mkdir" and one.path not in known):
            pending.append((one.name, one.path, one.to))
            known.add(one.to)
        elif one.name in ("open", "write") and one.path not in known and not os.path.isdir(one.path):
            pending.append(("open", one.path, ""))
            known.add(one.path)
    n_lost = 0
    for name, path, to in reversed(pending):
        there = to or path
        n_lost += os.path.lexists(there) or (name == "unlink" and path in before)
        if name in ("rename", "replace"):
            if os.path.lexists(to):
                os.rename(to, path)
        elif name == "mkdir":
            shutil.rmtree(path, ignore_errors=True)
        elif name == "open":
            os.path.lexists(path) and os.unlink(path)
        if before.get(there) is not None and os.path.isdir(os.path.dirname(there)):
            Path(there).write_bytes(before[there])
    return n_lost


@pytest.mark.parametrize("kind", ["a new run", "a resumed run"])
def test_power_loss(whole, killed, place, kind):
    """
    At each fsync, rename and removal: bytes that are not on the disk yet are missing, zeros, half or all there, in
    files whose names are there, or with names that are not on the disk yet taken back.
    """
    out_dir, kept, n, n_names, begun = place.runs.out_dir, place.runs.directory / "kept", 0, 0, time.time()

    def prepare(source):
        shutil.rmtree(out_dir, ignore_errors=True)
        if source.exists():
            shutil.copytree(source, out_dir)

    start = killed.runs.out_dir if kind == "a resumed run" else place.runs.directory / "nothing"
    prepare(start)
    before = contents(out_dir)
    place.finish(whole)
    operations = place.operations()
    if kind == "a resumed run":  # its saves are those of a new run
        first_save = next(i for i, one in enumerate(operations) if one.name == "rename" and ".saving-" in one.path)
        operations = operations[:first_save + 2]
    for at in operations:
        if at.name not in ("fsync", "rename", "replace", "rmdir"):
            continue
        prepare(start)
        assert place.run("kill_at", (at.n,)) == -9
        done = place.operations()[:-1]
        n_saved = steps_saved(done) + (kind == "a resumed run")
        shutil.rmtree(kept, ignore_errors=True)
        out_dir.mkdir(exist_ok=True)
        shutil.copytree(out_dir, kept)
        for state, names in itertools.product(STATES, (True, False)):
            prepare(kept)
            n_lost = lose_contents(done, state)
            if not names:
                n_lost_names = lose_names(done, before)
                n_names += n_lost_names
                n_lost *= n_lost_names > 0  # else it is as with names
                n_lost += n_lost_names * (state == "full")
            if n_lost:
                faults = [checkpoint.find_fault(path) for path in checkpoint.list_checkpoints(place.path)]
                assert faults.count(None) >= min(n_saved, 2), (at, state, names, faults)
                place.finish(whole, message=(at, state, names))
                n += 1
    assert n > 40 and n_names > 20, (n, n_names)
    failed = naive_power_loss(whole, place) if kind == "a new run" else []
    record(f"power lost: bytes missing, empty, zeros, half or all there, names there or not, {kind}", n, n, 0,
           sum(failed), len(failed), time.time() - begun)


def steps_saved(operations) -> int:
    """How many saves have come to their end."""
    return sum(one.name == "rename" and ".saving-" in one.path and following.name == "fsync"
               for one, following in itertools.pairwise(operations))


def naive_fails(place, whole) -> bool:
    """Whether the run that goes on by what naive.py reads fails or ends with other bits."""
    try:
        place.finish(whole, control=True)
    except (AssertionError, OSError, SafetensorError):
        return True
    return False


def naive_power_loss(whole, place) -> list[bool]:
    """The control: after a save in place that is complete, but not on the disk."""
    shutil.rmtree(place.runs.out_dir)
    place.finish(whole, control=True)
    after = max(one.n for one in place.operations() if one.name == "write" and "step-00000004" in one.path) + 1
    failed = []
    for state in STATES:
        shutil.rmtree(place.runs.out_dir)
        assert place.run("kill_at", (after,), control=True) == -9
        lose_contents(place.operations()[:-1], state)
        failed.append(naive_fails(place, whole))
    assert failed == [state != "full" for state in STATES]
    return failed


def test_the_same_faults_end_naive_runs(whole, place):
    """The control: where a save in place is killed, the run that goes on fails or ends with other bits."""
    shutil.rmtree(place.runs.out_dir, ignore_errors=True)
    place.finish(whole, control=True)
    operations, failed, begun = place.operations(), [], time.time()
    for at in targets(operations):
        if "step-00000004" in operations[at[0] - 1].path:
            shutil.rmtree(place.runs.out_dir)
            assert place.run("kill_at", at, control=True) == -9
            failed.append(naive_fails(place, whole))
    assert sum(failed) > len(failed) / 2
    record("kill -9 at every file operation, a new run", 0, 0, 0, sum(failed), len(failed), time.time() - begun)


# -----------------------------------------------------------------------------
# a disk that is full or broken


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_error_at_every_operation(whole, place, number):
    """Goes on and ends as if nothing had been, or ends with exit code 5, one line, and every checkpoint made before."""
    shutil.rmtree(place.runs.out_dir, ignore_errors=True)
    place.finish(whole)
    operations, codes, begun = place.operations(), [], time.time()
    first_line = next(one.n for one in operations if one.name == "write" and one.path.endswith("metrics.jsonl"))
    last_save = next(one.n for one in operations if one.name == "mkdir" and one.path.endswith("00000006"))
    for at, part in targets(operations):
        if part or (number == errno.EIO and trial.SCALE == 1 and operations[at - 1].name != "fsync"):
            continue
        shutil.rmtree(place.runs.out_dir)
        codes.append(place.run("fail_at", (at, number)))
        said = place.out.read_text()
        n_saved = sum(one.name == "rename" and ".saving-" in one.path for one in operations[:at - 1])
        where = operations[at - 1], said[-1000:]
        assert codes[-1] in (0, 5) and "Traceback" not in said, where
        if codes[-1] == 5:
            assert f"error: cannot write to {place.runs.out_dir}" in said and os.strerror(number) in said, where
            assert not first_line <= at < last_save - 1, where  # but at the sync of metrics.jsonl for the last save
        if place.path.exists():
            assert len(checkpoint.list_checkpoints(place.path)) >= min(n_saved, 2), where
            assert all(checkpoint.find_fault(path) is None for path in checkpoint.list_checkpoints(place.path)), where
        place.finish(whole, left=[".removing-step-00000002"])
    assert min(codes.count(0), codes.count(5)) > 2
    record(f"{errno.errorcode[number]} at every file operation", len(codes), codes.count(0), codes.count(5), 0, 0,
           time.time() - begun)


# -----------------------------------------------------------------------------
# at random instants


def test_at_random_instants(whole, place):
    """Several times in a run, and once it is not killed; at times that are spread over what a whole run takes."""
    print(f"FAULTS_SEED={SEED}")
    place.run()
    begun = time.time()
    shutil.rmtree(place.runs.out_dir)
    place.run()
    generator, n_runs, n_killed, n_begun, seconds = random.Random(SEED), 0, 0, 0, time.time() - begun
    while n_runs < 60 * trial.SCALE or n_killed < 150 * trial.SCALE:
        assert n_runs < 200 * trial.SCALE, n_killed
        shutil.rmtree(place.runs.out_dir, ignore_errors=True)
        for _ in range(generator.randint(2, 4)):
            place.out.with_suffix(".operations").unlink(missing_ok=True)
            process = place.start()
            process.join(generator.uniform(0, seconds))
            process.kill()
            process.join()
            if process.exitcode == -9:
                n_killed += 1
                n_begun += place.out.with_suffix(".operations").exists() and len(place.operations()) > 1
        place.finish(whole, message=f"run {n_runs}")
        n_runs += 1
    assert n_begun > n_killed / 5, n_begun  # the others had changed no file yet
    record("kill -9 at random instants", n_killed, n_killed, 0, 0, 0, time.time() - begun)


def test_the_real_command_at_random_instants(whole, tmp_path):
    """`python train_gpt2.py` in a process of its own, four times in a run, each time after some steps."""
    print(f"FAULTS_SEED={SEED}")
    options = OPTIONS | {"max_steps": 400, "val_every": 3, "save_every": 5}
    generator, begun, n_killed = random.Random(SEED), time.time(), 0
    for i in range(trial.SCALE):
        place = Place(tmp_path / f"{i}", whole.runs.data)
        for _ in range(4):
            process = place.runs.start(**options)
            small.wait_for(process, "val loss")
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=generator.uniform(0, 0.3))
            process.kill()
            n_killed += process.wait() == -9
            process.stdout.close()
        n_steps = len(small.metrics(place.path)[:-1])
        assert 0 < n_steps < 400
        process = place.runs.start(**options)
        assert process.communicate()[0] and process.returncode == 0
        expected = Place(tmp_path / f"whole {i}", whole.runs.data)
        assert trial.run(expected.runs.options(**options), expected.out) == 0
        assert_same_result(place.path, expected.path)
    assert n_killed == 4 * trial.SCALE
    record("kill -9 of the real command", n_killed, n_killed, 0, 0, 0, time.time() - begun)
