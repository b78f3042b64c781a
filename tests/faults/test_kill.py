"""Killed anywhere, a run ends as if it had not been: the same bits, each step once in its log."""

import errno
import itertools
import os
import random
import re
import shutil
import signal
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
from tests.faults.table import BESIDE, row

OPTIONS = {"n_layer": 1, "n_embd": 16, "n_head": 1, "max_steps": 6, "val_every": 3, "save_every": 2}
SEED = int(os.environ.get("FAULTS_SEED", random.SystemRandom().randrange(10**6)))  # printed where a test fails


class Place:
    """Trials in a directory of their own, with common data. beside: as on a GPU, saves are written by a thread."""

    def __init__(self, directory, data, beside=False, **changes):
        directory.mkdir(exist_ok=True)
        self.runs, self.changes, self.also = small.Runs(directory, data), changes, {"beside": True} if beside else {}
        self.path, self.out = self.runs.path, directory / "out"

    def options(self) -> list[str]:
        return self.runs.options(**OPTIONS | self.changes)

    def run(self, fault="none", arguments=(), control=False, **also) -> int:
        return trial.run(self.options(), self.out, fault, arguments, control, **self.also | also)

    def start(self, control=False):
        return trial.start(self.options(), self.out, control=control, **self.also)

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
    """Where to kill: before each operation, and within each write; of several to a file the first and the last."""
    found = []
    for i, one in enumerate(operations):
        neighbours = [operations[j][1:] for j in (i - 1, i + 1) if 0 <= j < len(operations)]
        if one.name != "write":
            found.append((one.n, 0.0))
        elif trial.SCALE > 1 or neighbours.count(one[1:]) < 2:
            found += [(one.n, 0.0), (one.n, 0.5)]
    return found


def kill_everywhere(place, whole, prepare, kind, part=lambda operations: operations, **also):
    """
    `prepare` makes the state in which a run begins; the run is killed at each of its operations, or at these, and
    finished. also: what ends it by itself.
    """
    prepare()
    assert place.run(**also) == (6 if also else 0), place.out.read_text()[-2000:]
    operations = place.operations()
    place.finish(whole)
    with row(f"kill -9 at every file operation, {kind}") as counts:
        for at in targets(part(operations)):
            prepare()
            code = place.run("kill_at", at, **also)
            if code == 0 and place.also:  # where a thread saves, their number is not the same in each run
                continue
            counts.injected += 1
            assert code == -9, (at, operations[at[0] - 1])
            faults = [checkpoint.find_fault(path) for path in checkpoint.list_checkpoints(place.path)]
            assert faults.count(None) >= min(steps_saved(place.operations()[:-1]), 2), (at, faults)
            place.finish(whole, message=(at, operations[at[0] - 1]))
            counts.survived += 1
        assert counts.injected


def test_at_every_operation(whole, place):
    kill_everywhere(place, whole, lambda: shutil.rmtree(place.runs.out_dir, ignore_errors=True), "a new run")


def test_at_every_operation_with_saves_beside(whole, tmp_path):
    """As on a GPU: an operation is the thread's or the loop's, as they come."""
    place = Place(tmp_path / "place", whole.runs.data, beside=True)
    kill_everywhere(place, whole, lambda: shutil.rmtree(place.runs.out_dir, ignore_errors=True),
                    "a new run" + BESIDE)


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


STRACE = "file operations of the real command that strace sees and the shim counts"


@pytest.fixture
def has_strace():
    if not shutil.which("strace") or subprocess.run(["strace", "true"], capture_output=True).returncode:
        with row(STRACE):
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
    out_dir = place.runs.out_dir

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
    with row(f"{STRACE}, {kind}") as counts:
        counts.injected += 1
        assert comparable(seen) == comparable(counted)
        counts.measured(f"all {len(comparable(seen))}")


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
    noted = [one.n for one in place.operations() if str(place.runs.data) in one.path]
    assert noted
    with row("kill -9 at every file operation, new data") as counts:
        for n in noted:
            prepare()
            counts.injected += 1
            assert place.run("kill_at", (n, 0.5)) == -9
            place.finish(whole)
            counts.survived += 1


def test_at_every_operation_of_a_resumed_run(whole, killed, place):
    """Killed in a save, and again wherever the next start, its recovery and its saves change files."""
    def prepare():
        shutil.rmtree(place.path, ignore_errors=True)
        shutil.copytree(killed.path, place.path)

    kill_everywhere(place, whole, prepare, "a resumed run")


def before_saves(operations):
    """Of the start-up."""
    return list(itertools.takewhile(lambda one: ".saving-" not in one.path, operations))


def test_at_every_operation_of_a_start_that_tidies_up(whole, place):
    """The newest checkpoint is damaged, one was set aside before, and a save and a removal were cut off."""
    assert place.runs(**OPTIONS, stop_after=4) == 0
    kept = place.path.rename(place.runs.directory / "kept")
    (kept / "step-00000004" / "optim.safetensors").write_bytes(b"")
    for name in "invalid-step-00000004", ".removing-step-00000001", ".saving-step-00000006":
        shutil.copytree(kept / "step-00000002", kept / name)
    (kept / ".config.json.12345678.tmp").write_text("{")

    def prepare():
        shutil.rmtree(place.path, ignore_errors=True)
        shutil.copytree(kept, place.path)

    def part(operations):
        """From the first of the recovery to the first of the log."""
        paths = [one.path + one.to for one in operations]
        first = next(i for i, path in enumerate(paths) if re.search(r"/(\.removing|\.saving|invalid)-|\.tmp$", path))
        return operations[first:paths.index(f"{place.path}/metrics.jsonl")]

    kill_everywhere(place, whole, prepare, "a start that tidies up", part)
    assert (place.path / "invalid-step-00000004").is_dir()


def test_at_every_operation_of_an_evaluation_that_is_made_up_for(whole, place):
    """Stopped in the evaluation of step 3, which its line of metrics.jsonl then lacks."""
    assert place.runs(**OPTIONS, stop_after=3) == 0
    kept = place.path.rename(place.runs.directory / "kept")
    *lines, last = (kept / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines.append(re.sub(', "val_loss.*', "}", last))
    assert lines[-1] != last
    (kept / "metrics.jsonl").write_text("".join(lines))

    def prepare():
        shutil.rmtree(place.path, ignore_errors=True)
        shutil.copytree(kept, place.path)

    def part(operations):
        return [one for one in before_saves(operations) if "metrics.jsonl" in one.path + one.to]

    kill_everywhere(place, whole, prepare, "an evaluation that is made up for", part)


def test_at_every_operation_of_an_end_that_is_made_up_for(whole, place):
    """Killed after the last save, before status.json."""
    def prepare():
        shutil.rmtree(place.path, ignore_errors=True)
        shutil.copytree(whole.path, place.path)
        (place.path / "status.json").unlink()

    kill_everywhere(place, whole, prepare, "an end that is made up for")


def test_at_every_operation_of_what_is_kept_for_replay(whole, place):
    """The loss of step 5 is not finite: its weights are kept. The next start meets no such loss."""
    def part(operations):
        first = next(i for i, one in enumerate(operations) if checkpoint.NOT_FINITE in one.path)
        return operations[first:]

    kill_everywhere(place, whole, lambda: shutil.rmtree(place.runs.out_dir, ignore_errors=True),
                    "weights kept for replay.py", part, poison="loss", step=5)


# -----------------------------------------------------------------------------
# power loss

STATES = ("missing", "empty", "zeros", "half", "full")  # of files that are not on the disk yet


def lose_contents(operations, state_or_generator) -> int:
    """
    Puts what of the files was not yet on the disk into this state, or, of a random generator, each into one of its own;
    how many files that are.
    """
    fixed = state_or_generator if state_or_generator in STATES else None
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
        state = fixed or state_or_generator.choice(STATES)
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


def moved(pending: list[tuple], path: str, to: str) -> list[tuple]:
    """With the names that these have below a directory which is called otherwise from now on."""
    return [(name, to + inner.removeprefix(path) if inner.startswith(f"{path}/") else inner, new)
            for name, inner, new in pending]


def lose_names(operations, before: dict[str, bytes | None], generator=None) -> int:
    """
    Takes back what was made, renamed and removed in a directory since its last fsync, or with a random generator the
    last of it, in each directory from another instant on; how many names that are.
    """
    pending, known = [], set(before)
    for one in operations:
        if one.name == "fsync":
            pending, kept = [], pending
            for name, path, to in kept:
                if os.path.dirname(path) != one.path:
                    pending.append((name, path, to))
                elif name in ("rename", "replace"):
                    pending = moved(pending, path, to)
        elif one.name in ("rename", "replace", "unlink") or (one.name == "mkdir" and one.path not in known):
            pending.append((one.name, one.path, one.to))
            known.add(one.to)
        elif one.name in ("open", "write") and one.path not in known and not os.path.isdir(one.path):
            pending.append(("open", one.path, ""))
            known.add(one.path)
    if generator:
        by_directory = {directory: [one for one in pending if os.path.dirname(one[1]) == directory]
                        for directory in dict.fromkeys(os.path.dirname(path) for _, path, _ in pending)}
        lost = [one for ones in by_directory.values() for one in ones[generator.randint(0, len(ones)):]]
        pending, kept = [], pending
        for one in kept:
            if one in lost:
                pending.append(one)
            elif one[0] in ("rename", "replace"):
                pending = moved(pending, *one[1:])
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
    files whose names are there, or with names that are not on the disk yet taken back. Then each file in a state of its
    own and some of the names: FAULTS_SCALE draws, from 2 on at each operation.
    """
    print(f"FAULTS_SEED={SEED}")
    generator = random.Random(f"{SEED} power {kind}")
    out_dir, kept = place.runs.out_dir, place.runs.directory / "kept"

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
        operations = operations[:first_save + 6]
    n_names = 0
    with row(f"power lost: bytes missing, empty, zeros, half or all there, names there or not, {kind}") as counts:
        for at in operations:
            chosen = at.name in ("fsync", "rename", "replace", "rmdir")
            if not chosen and trial.SCALE == 1:
                continue
            prepare(start)
            assert place.run("kill_at", (at.n,)) == -9
            done = place.operations()[:-1]
            n_saved = steps_saved(done) + (kind == "a resumed run")
            shutil.rmtree(kept, ignore_errors=True)
            out_dir.mkdir(exist_ok=True)
            shutil.copytree(out_dir, kept)
            fixed = list(itertools.product(STATES, (True, False))) if chosen else []
            if trial.SCALE == 1:  # every second of them; the next save has the others
                fixed = fixed[at.n % 2::2]
            for state, names in [*fixed, *[(generator, generator)] * trial.SCALE]:
                prepare(kept)
                n_lost = lose_contents(done, state)
                if names is generator:
                    n_lost += lose_names(done, before, generator)
                elif not names:
                    n_lost_names = lose_names(done, before)
                    n_names += n_lost_names
                    n_lost *= n_lost_names > 0  # else it is as with names
                    n_lost += n_lost_names * (state == "full")
                if n_lost:
                    counts.injected += 1
                    faults = [checkpoint.find_fault(path) for path in checkpoint.list_checkpoints(place.path)]
                    assert faults.count(None) >= min(n_saved, 2), (at, state, names, faults)
                    place.finish(whole, message=(at, state, names))
                    counts.survived += 1
        assert counts.injected > 40 and n_names > 20, (counts.injected, n_names)
        naive_power_loss(whole, place, counts)


def steps_saved(operations) -> int:
    """How many saves have come to their end."""
    return sum(one.name == "rename" and "run/.saving-" in one.path and following.name == "fsync"
               for one, following in itertools.pairwise(operations))


def naive_fails(place, whole) -> bool:
    """Whether the run that goes on by what naive.py reads fails or ends with other bits."""
    try:
        place.finish(whole, control=True)
    except (AssertionError, OSError, SafetensorError):
        return True
    return False


def naive_power_loss(whole, place, counts):
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
        counts.control(failed[-1])
    assert failed == [state != "full" for state in STATES]


@pytest.mark.parametrize("kind", ["a new run", "a resumed run"])
def test_the_same_faults_end_naive_runs(whole, place, kind):
    """The control: where a save in place is killed, the run that goes on fails or ends with other bits."""
    def prepare():
        shutil.rmtree(place.runs.out_dir, ignore_errors=True)
        if kind == "a resumed run":
            assert trial.run([*place.options(), "--stop_after", "2"], place.out, control=True) == 0

    prepare()
    place.finish(whole, control=True)
    operations = place.operations()
    with row(f"kill -9 at every file operation, {kind}") as counts:
        for at in targets(operations):
            if "step-00000004" in operations[at[0] - 1].path:
                prepare()
                assert place.run("kill_at", at, control=True) == -9
                counts.control(naive_fails(place, whole))
        assert counts.naive_failed > counts.naive_tried / 2


# -----------------------------------------------------------------------------
# a disk that is full or broken


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_error_at_every_operation(whole, place, number):
    """Goes on and ends as if nothing had been, or ends with exit code 5, one line, and every checkpoint made before."""
    shutil.rmtree(place.runs.out_dir, ignore_errors=True)
    place.finish(whole)
    operations, codes = place.operations(), []
    first_line = next(one.n for one in operations if one.name == "write" and one.path.endswith("metrics.jsonl"))
    last_save = next(one.n for one in operations if one.name == "mkdir" and one.path.endswith("00000006"))
    with row(f"{errno.errorcode[number]} at every file operation") as counts:
        for at, part in targets(operations):
            if part or (number == errno.EIO and trial.SCALE == 1 and operations[at - 1].name != "fsync"):
                continue
            shutil.rmtree(place.runs.out_dir)
            counts.injected += 1
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
                assert all(checkpoint.find_fault(path) is None for path in checkpoint.list_checkpoints(place.path))
            place.finish(whole, left=[".removing-step-00000002"])
            counts.survived += codes[-1] == 0
            counts.detected += codes[-1] == 5  # and the same command, with a disk that works, ends as it should
        assert min(codes.count(0), codes.count(5)) > 2
        naive_errors(whole, place, number, counts)


def naive_errors(whole, place, number, counts):
    """The control: an error in a save in place, after which the same command goes on."""
    shutil.rmtree(place.runs.out_dir)
    place.finish(whole, control=True)
    operations = place.operations()
    for at, part in targets(operations):
        if "step-00000004" in operations[at - 1].path and not part:
            shutil.rmtree(place.runs.out_dir)
            place.run("fail_at", (at, number), control=True)
            counts.control(naive_fails(place, whole))
    assert counts.naive_failed


# -----------------------------------------------------------------------------
# at random instants


LONGER = {"max_steps": 16}


@pytest.fixture(scope="module")
def longer(tmp_path_factory, whole):
    """An uninterrupted run of more steps, and how much of its list of operations is a third of its loop."""
    expected = Place(tmp_path_factory.mktemp("longer"), whole.runs.data, **LONGER)
    assert expected.run() == 0
    log = operations_log(expected)
    return expected, (log.stat().st_size - log.read_bytes().index(LOOP)) // 3


@pytest.mark.parametrize("i", range(trial.SCALE))
def test_at_random_instants(longer, tmp_path, i):
    """60 runs and 150 kills, several in a run, most in its loop, some before; by its progress, at any speed."""
    print(f"FAULTS_SEED={SEED}")
    expected, most = longer
    place, generator = Place(tmp_path / "place", expected.runs.data, **LONGER), random.Random(f"{SEED} {i}")
    n_runs = n_in_loop = n_saved = 0
    with row("kill -9 at random instants") as counts:
        while n_runs < 60 or n_in_loop < 150:
            assert n_runs < 200, n_in_loop
            shutil.rmtree(place.runs.out_dir, ignore_errors=True)
            killed = 0
            for _ in range(generator.randint(2, 4)):
                if kill_at_random(place, generator, most):
                    killed += 1
                    done = place.operations()
                    n_in_loop += is_begun(done)
                    n_saved += any(".saving-" in one.path for one in done)
            counts.injected += killed
            place.finish(expected, message=f"run {n_runs}")
            counts.survived += killed
            n_runs += 1
        assert n_saved > n_in_loop / 3, (n_saved, n_in_loop)  # the others were in steps before the first save
        for n_tried in range(200):  # a naive save is in hand in one of five
            if n_tried >= 20 and counts.naive_failed:
                break
            shutil.rmtree(place.runs.out_dir, ignore_errors=True)
            if kill_at_random(place, generator, most, control=True):
                counts.control(naive_fails(place, expected))
        assert counts.naive_failed


@pytest.mark.parametrize("i", range(trial.SCALE))
def test_at_random_instants_with_saves_beside(longer, tmp_path, i):
    """As on a GPU: a thread writes while the steps go on, and the log is a step behind."""
    print(f"FAULTS_SEED={SEED}")
    expected, most = longer
    place, generator = Place(tmp_path / "place", expected.runs.data, beside=True, **LONGER), random.Random(SEED + i)
    n_in_hand = 0
    with row("kill -9 at random instants" + BESIDE) as counts:
        for run in range(12):
            shutil.rmtree(place.runs.out_dir, ignore_errors=True)
            killed = 0
            for _ in range(3):
                if kill_at_random(place, generator, most):
                    killed += 1
                    n_in_hand += any(place.path.glob(".saving-*"))
            counts.injected += killed
            place.finish(expected, message=f"run {run}")
            counts.survived += killed
        assert n_in_hand > counts.injected / 6, n_in_hand


LOOP = b"/metrics.jsonl\t\n"  # the log of a run is opened, in the list of its operations: its steps follow


def operations_log(place) -> Path:
    return place.out.with_suffix(".operations")


def is_begun(operations) -> bool:
    """Whether the loop has: with its first line of the log, or a save."""
    return any((one.name == "write" and one.path.endswith("/metrics.jsonl")) or ".saving-" in one.path
               for one in operations)


def kill_at_random(place, generator, most, control=False) -> bool:
    """
    Whether it was killed, not already at its end: after up to `most` bytes of its list of operations in the loop, and
    up to 20 ms more; one in ten in its set-up. control: within its operations alone, most of which are those of saves.
    """
    log = operations_log(place)
    log.unlink(missing_ok=True)
    process = place.start(control)
    if generator.random() < 0.9:
        n_bytes = generator.randrange(most)
        while process.is_alive() and len(read_if_there(log).partition(LOOP)[2]) < n_bytes:
            time.sleep(0.001)
        process.join(generator.uniform(0, 0 if control else 0.02))
    else:
        process.join(generator.uniform(0, 0.2))
    process.kill()
    process.join()
    return process.exitcode == -9


def read_if_there(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


NAIVE_COMMAND = f"""import sys
sys.path[:0] = [{str(small.ROOT)!r}]
from tests.faults import naive
naive.install()
import train_gpt2
train_gpt2.rundir.leave(train_gpt2.main(sys.argv[2:]))"""


def kill_the_command(place, generator, *launcher) -> bool:
    """Whether `python train_gpt2.py` was killed, after some steps, and not already at its end."""
    process = place.runs.start(*launcher, **OPTIONS | place.changes)
    small.wait_for(process, "val loss")
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=generator.uniform(0, 0.15))
    process.kill()
    killed = process.wait() == -9
    process.stdout.close()
    return killed


def kill_the_naive_command(place, n_bytes):
    """In a save: stopped when a checkpoint appears, and killed if it lacks some of these bytes, else let go on."""
    process, seen = place.runs.start("-c", NAIVE_COMMAND, **OPTIONS | place.changes), set()
    while process.poll() is None:
        if new := set(place.path.glob("step-*")) - seen:
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            seen |= new
            last = checkpoint.list_checkpoints(place.path)[0] / "optim.safetensors"
            process.send_signal(signal.SIGCONT if last.exists() and last.stat().st_size == n_bytes else signal.SIGKILL)
    process.stdout.close()
    return process.returncode == -9


@pytest.mark.parametrize("i", range(trial.SCALE))
def test_the_real_command_at_random_instants(whole, tmp_path, i):
    """In a process of its own, four times in a run; the control once."""
    print(f"FAULTS_SEED={SEED}")
    longer = {"max_steps": 400, "val_every": 3, "save_every": 5}
    expected, place, control = (Place(tmp_path / name, whole.runs.data, **longer)
                                for name in ("whole", "place", "control"))
    generator = random.Random(SEED + i)
    assert expected.run() == 0
    with row("kill -9 of the real command") as counts:
        killed = sum(kill_the_command(place, generator) for _ in range(4))
        counts.injected += killed
        assert killed == 4 and 0 < len(small.metrics(place.path)[:-1]) < 400
        process = place.runs.start(**OPTIONS | longer)
        assert process.communicate()[0] and process.returncode == 0
        assert_same_result(place.path, expected.path)
        counts.survived += killed
        last_file = checkpoint.list_checkpoints(expected.path)[0] / "optim.safetensors"
        assert kill_the_naive_command(control, last_file.stat().st_size)
        counts.control(naive_fails(control, expected))
        assert counts.naive_failed
