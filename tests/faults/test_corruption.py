"""Files that change behind a run's back, checkpoints and data: it is noticed and said, and nothing wrong is used."""

import json
import os
import random
import shutil
import signal
from contextlib import suppress

import numpy as np
import pytest
import small
from safetensors.torch import load_file
from small import assert_same_result, steps

import checkpoint
import rundir
from data.shards import HEADER_BYTES, open_dataset
from tests.faults import trial
from tests.faults.table import row

OPTIONS = {"n_layer": 1, "n_embd": 16, "n_head": 1, "max_steps": 8, "val_every": 3, "save_every": 2}
NAMES = (*checkpoint.FILES, "manifest.json")
SEED = int(os.environ.get("FAULTS_SEED", random.SystemRandom().randrange(10**6)))  # printed where a test fails
SCALE = int(os.environ.get("FAULTS_SCALE", 1))  # that many times the trials


def generators(n: int, *key):
    """One for each of n trials of this name, times FAULTS_SCALE."""
    print(f"FAULTS_SEED={SEED}")
    return [random.Random(f"{SEED} {key} {i}") for i in range(n * SCALE)]


# -----------------------------------------------------------------------------
# what is done to a file: (file, the same file of another step or data set, generator)


def flip(file, other, generator):
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def zero_page(file, other, generator):
    content = bytearray(file.read_bytes())
    start = generator.randrange(0, len(content), 4096)
    content[start:start + 4096] = bytes(len(content[start:start + 4096]))
    file.write_bytes(content)


def overwrite(file, other, generator):
    content = bytearray(file.read_bytes())
    start = generator.randrange(len(content))
    n = min(len(content) - start, generator.randint(1, 512))
    content[start:start + n] = generator.randbytes(n)
    file.write_bytes(content)


def truncate(file, other, generator):
    os.truncate(file, generator.choice([0, generator.randrange(file.stat().st_size)]))


def append(file, other, generator):
    with open(file, "ab") as end:
        end.write(generator.choice([bytes, generator.randbytes])(generator.choice([1, 8, 4096])))


def swap(file, other, generator):
    shutil.copyfile(other, file)


def remove(file, other, generator):
    file.unlink()


CHANGES = {"bit flipped": flip, "page of zeros": zero_page, "bytes overwritten": overwrite, "truncated": truncate,
           "bytes appended": append, "swapped": swap, "missing": remove}
QUIET = ("bit flipped", "page of zeros", "bytes overwritten", "swapped")  # a file of the same size


def content(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def change(kind, file, other, generator):
    """Until it is one: a page may have been zeros before, and a line break less at the end of JSON means nothing."""
    before = meaning(file)
    while file.exists() and meaning(file) == before:
        CHANGES[kind](file, other, generator)


def meaning(file):
    """The JSON value of a manifest; else, and if it is none, the bytes."""
    with suppress(ValueError):
        return json.loads(file.read_bytes()) if file.name == "manifest.json" else file.read_bytes()
    return file.read_bytes()


# -----------------------------------------------------------------------------
# checkpoints


def swap_all_but_the_manifest(directory, other):
    for name in checkpoint.FILES:
        shutil.copyfile(other / name, directory / name)


def swap_directory(directory, other):
    shutil.rmtree(directory)
    shutil.copytree(other, directory)


DIRECTORIES = {"all but the manifest swapped": swap_all_but_the_manifest, "whole directory swapped": swap_directory,
               "empty directory": lambda directory, other: [path.unlink() for path in directory.iterdir()]}


def damage(kind, directory, other, generator, name=None) -> tuple[str, ...]:
    """Names of the files that were changed: the one asked for, or any."""
    if kind in DIRECTORIES:
        DIRECTORIES[kind](directory, other)
        return NAMES
    name = name or generator.choice(NAMES)
    change(kind, directory / name, other / name, generator)
    return (name,)


class Place(small.Runs):
    """Runs of the whole command in processes of their own, with common data."""

    def __init__(self, directory, data):
        directory.mkdir(exist_ok=True)
        self.directory, self.data, self.out_dir, self.out = directory, data, directory / "runs", directory / "out"

    def __call__(self, fault="none", arguments=(), control=False, **changes) -> int:
        return trial.run(self.options(**OPTIONS | changes), self.out, fault, arguments, control)

    def again(self, run):
        """Begins with this state of a run."""
        shutil.rmtree(self.out_dir, ignore_errors=True)
        shutil.copytree(run, self.path)

    def checkpoint(self, step):
        return self.path / checkpoint.directory_name(step)

    def said(self) -> str:
        return self.out.read_text()

    def operations(self) -> list[trial.Operation]:
        """Of the last trial."""
        return trial.operations(self.out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    place = Place(directory, small.make_data(directory / "data"))
    assert place() == 0
    return place


@pytest.fixture(scope="module")
def stopped(whole):
    """The directory of a run with two checkpoints and two steps to do."""
    place = Place(whole.directory / "stopped", whole.data)
    assert place(stop_after=6) == 0 and steps(place.path) == [4, 6]
    return place.path


@pytest.fixture
def place(tmp_path, whole):
    return Place(tmp_path / "place", whole.data)


def values(directory) -> tuple:
    """What one reads who believes the files: the values of every tensor, and the state."""
    tensors = load_file(directory / "model.safetensors") | load_file(directory / "optim.safetensors")
    return ({name: (str(value.dtype), value.shape, value.numpy().tobytes()) for name, value in tensors.items()},
            json.loads((directory / "state.json").read_text()))


def believed(directory, expected) -> str:
    """What becomes of that: "silent" if other values are read, "error", or "same"."""
    try:
        return "same" if values(directory) == expected else "silent"
    except Exception:
        return "error"


@pytest.mark.parametrize("kind", [*CHANGES, *DIRECTORIES])
def test_every_damage_is_found(stopped, place, kind):
    """The older checkpoint is used and the reason said; if that is damaged too, both reasons, and every file stays."""
    naive = []
    with row(f"checkpoint: {kind}") as counts:
        for i, generator in enumerate(generators(40, kind)):
            place.again(stopped)
            newest, older, said = place.checkpoint(6), place.checkpoint(4), []
            expected = values(newest)
            names = damage(kind, newest, older, generator, NAMES[i % len(NAMES)])
            counts.injected += 1
            assert checkpoint.newest_valid(place.path, said.append) == older, names
            assert len(said) == 1 and said[0].startswith(f"skipping {newest}: "), names
            counts.detected += 1
            if names != ("manifest.json",):  # which nobody reads who believes the files
                naive.append(believed(newest, expected))
                counts.control(naive[-1] != "same")

            damage(kind, older, stopped / "step-00000006", generator)
            before = content(place.path)
            counts.injected += 1
            with pytest.raises(rundir.NoValidCheckpoint, match=r"step-00000006: .+; step-00000004: .+\)$"):
                checkpoint.newest_valid(place.path, said.append)
            assert content(place.path) == before and len(said) == 3
            counts.detected += 1
        assert counts.naive_failed > len(naive) / 2
        if kind in QUIET:  # but what happens to fall into the header of a file, or into its JSON
            assert naive.count("silent") > len(naive) / 4


@pytest.mark.parametrize("kind", [*CHANGES, *DIRECTORIES])
def test_the_run_goes_on_from_the_older_checkpoint(stopped, whole, place, kind):
    with row("checkpoint damaged in any of these ways: the run goes on") as counts:
        for generator in generators(6, kind, "run"):
            place.again(stopped)
            damage(kind, place.checkpoint(6), place.checkpoint(4), generator)
            counts.injected += 1
            assert place() == 0, place.said()[-2000:]
            assert f"skipping {place.checkpoint(6)}: " in place.said()
            assert f"resuming from {place.checkpoint(4)}\n" in place.said()
            assert_same_result(place.path, whole.path)
            counts.survived += 1


@pytest.mark.parametrize("kind", [*CHANGES, *DIRECTORIES])
def test_no_valid_checkpoint_is_exit_4_and_changes_nothing(stopped, place, kind):
    with row("every checkpoint damaged: exit code 4, nothing changed") as counts:
        for generator in generators(3, kind, "none valid"):
            place.again(stopped)
            for step, other in (4, 6), (6, 4):
                damage(kind, place.checkpoint(step), stopped / checkpoint.directory_name(other), generator)
            before = content(place.path)
            counts.injected += 1
            assert place() == 4
            error = place.said().splitlines()[-1]
            assert error.startswith(f"error: no valid checkpoint in {place.path} (step-00000006: ")
            assert "; step-00000004: " in error and "Traceback" not in place.said()
            assert content(place.path) == before
            counts.detected += 1
        counts.control(place(control="begin_anew") == 0)  # and writes over what there was
        assert counts.naive_failed


def test_without_its_checkpoints_a_run_says_that_it_starts_again(stopped, whole, place):
    place.again(stopped)
    for step in 4, 6:
        shutil.rmtree(place.checkpoint(step))
    assert place() == 0
    assert f"{place.path} was begun before and has no checkpoint: starting again at step 0\n" in place.said()
    assert_same_result(place.path, whole.path)
    shutil.rmtree(place.out_dir)
    assert place() == 0 and "starting again" not in place.said()


def test_who_believes_the_files_goes_on_wrongly(stopped, whole, place):
    """The control: without the check, a run ends with an error or other bits. (An older directory is just older.)"""
    with row("checkpoint damaged in any of these ways: the run goes on") as counts:
        for kind in [*CHANGES, "all but the manifest swapped", "empty directory"]:
            for generator in generators(3, kind, "control"):
                place.again(stopped)
                if damage(kind, place.checkpoint(6), place.checkpoint(4), generator) == ("manifest.json",):
                    continue
                try:
                    assert place(control=True) == 0
                    assert_same_result(place.path, whole.path)
                except (AssertionError, OSError):
                    counts.control(True)
                else:
                    counts.control(False)
        assert counts.naive_failed > counts.naive_tried / 4  # a state of another step may do no harm


# -----------------------------------------------------------------------------
# data


SHARDS = ("train_000000.bin", "val_000000.bin")


@pytest.fixture(scope="module")
def known_data(tmp_path_factory):
    """Two data sets of pages enough, each used once: a run trusts what it has checked by size and mtime."""
    directory = tmp_path_factory.mktemp("data")
    for seed in 0, 1:
        small.make_data(directory / str(seed), n_train=12_000, n_val=6_000, seed=seed)
        open_dataset(directory / str(seed), small.VOCAB)
    return directory


def change_data(kind, data, known_data, generator, hide: bool) -> str:
    """What an error has to name: the shard that was changed, or the split that has none left. hide: its mtime stays."""
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(known_data / "0", data)
    name = generator.choice(SHARDS)
    times = (data / name).stat()
    change(kind, data / name, known_data / "1" / name, generator)
    if kind == "missing":
        return f"no {name.split('_')[0]} shards"
    os.utime(data / name, ns=(times.st_atime_ns, times.st_mtime_ns + (not hide)))
    return name


def read_believing(data) -> list[bytes]:
    return [np.memmap(data / name, "<u2", "r", HEADER_BYTES).tobytes() for name in SHARDS]


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("how", ["mtime", "verify", "first use"])
def test_every_change_of_a_shard_is_found(known_data, tmp_path, kind, how):
    """By its mtime or its size; where these are as before, with --verify_data or on first use."""
    data, naive = tmp_path / "data", []
    expected = read_believing(known_data / "0")
    with row(f"shard: {kind}, by {how}") as counts:
        for generator in generators(24, kind, how):
            name = change_data(kind, data, known_data, generator, hide=how != "mtime")
            if how == "first use":
                (data / "verified.json").unlink()
            counts.injected += 1
            with pytest.raises(rundir.DataError, match=name):
                open_dataset(data, small.VOCAB, verify=how == "verify")
            if kind not in QUIET:  # found by its size alone
                with pytest.raises(rundir.DataError, match=name):
                    open_dataset(data, small.VOCAB)
            counts.detected += 1
            try:
                naive.append("same" if read_believing(data) == expected else "silent")
            except (OSError, ValueError):
                naive.append("error")
            counts.control(naive[-1] != "same")
        assert counts.naive_failed > len(naive) / 2
        if kind in QUIET:
            assert naive.count("silent") > len(naive) / 2


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("how", ["mtime", "verify", "first use"])
def test_a_run_on_changed_data_is_exit_7_and_writes_nothing(known_data, place, kind, how):
    place.data = place.directory / "data"
    with row("shard changed in any of these ways: exit code 7, nothing written") as counts:
        for generator in generators(2, kind, how, "run"):
            name = change_data(kind, place.data, known_data, generator, hide=how != "mtime")
            if how == "first use":
                (place.data / "verified.json").unlink()
            counts.injected += 1
            assert place(verify_data=how == "verify") == 7, place.said()[-2000:]
            error = place.said().splitlines()[-1]
            assert error.startswith("error: ") and name in error and "Traceback" not in place.said()
            assert not place.out_dir.exists()
            counts.detected += 1
        if kind in QUIET:
            for generator in generators(8, kind, how, "control"):  # one may be in the header, or not be read
                change_data(kind, place.data, known_data, generator, hide=True)
                counts.control(place(control="believe_data") == 0)
                shutil.rmtree(place.out_dir, ignore_errors=True)
                if counts.naive_failed:
                    break
            assert counts.naive_failed


def test_a_shard_truncated_while_running(known_data, place):
    """Exit 7 with one line, or the same bits where what is gone is not read any more; never a signal."""
    codes, naive = [], []
    place.data = place.directory / "data"
    place.data.mkdir()

    def prepare():
        shutil.rmtree(place.out_dir, ignore_errors=True)
        shutil.copytree(known_data / "0", place.data, dirs_exist_ok=True)

    prepare()
    assert place() == 0
    expected = place.path.rename(place.directory / "expected")
    first = next(one.n for one in place.operations() if one.name == "open" and "metrics" in one.path)
    first_line = next(one.n for one in place.operations() if one.name == "write" and "metrics" in one.path)
    last = len(place.operations())
    with row("shard: truncated while running") as counts:
        for i, generator in enumerate(generators(16, "truncated while running")):
            prepare()
            shard = place.data / generator.choice(SHARDS)
            n_bytes = generator.choice([0, HEADER_BYTES, generator.randrange(shard.stat().st_size)])
            fault = "truncate_at", (generator.randint(first, last), shard, n_bytes)
            if i == 0:  # what is gone is read, whatever is drawn
                fault = "truncate_at", (first_line, place.data / SHARDS[0], 0)
            counts.injected += 1
            codes.append(place(*fault))
            assert codes[-1] in (0, 7), (fault, place.said()[-2000:])
            if codes[-1] == 7:
                error = place.said().splitlines()[-1]
                assert error.startswith("error: ") and fault[1][1].name in error and "truncated while in use" in error
                assert "Traceback" not in place.said() and small.status(place.path)["code"] == 7
                assert all(checkpoint.find_fault(path) is None for path in checkpoint.list_checkpoints(place.path))
                shutil.copytree(known_data / "0", place.data, dirs_exist_ok=True)
                assert place() == 0  # goes on
            assert_same_result(place.path, expected)
            counts.detected += codes[-1] == 7
            counts.survived += codes[-1] == 0
            prepare()
            naive.append(place(*fault, control=True))
            if naive[-1] == 0:
                try:
                    assert_same_result(place.path, expected)
                except AssertionError:
                    naive[-1] = "wrong"
            counts.control(naive[-1] != 0)
        assert codes[0] == 7 and naive[0] == -signal.SIGBUS
