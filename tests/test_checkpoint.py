"""Checkpoints: what is in one, what happens to a damaged one, and that a run that goes on is the run itself."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import threading
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small import T, assert_same_result, call, losses, make_data, metrics, status, steps, tensors, tree

import checkpoint
import rundir
import train_gpt2
from configs.recipes import TrainConfig
from files import sha256
from model import GPT, GPTConfig
from optim import schedule
from tests.faults import publish
from tests.faults.table import row

runs = small.runs
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=small.VOCAB)
STOPPED = "stopped after each step, accumulation 1 and 2, float32 and bfloat16, each optimizer"
TWELVE = {"max_steps": 12, "val_every": 5, "save_every": 5}  # neither divides 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of 12 steps without a break: whole(batch_size=2) is its directory. Made once."""
    uninterrupted = small.Runs(tmp_path_factory.mktemp("whole"))

    def run(**options):
        path = uninterrupted.out_dir / "-".join(["whole", *map(str, options.values())])
        if not path.exists():
            assert uninterrupted(**TWELVE, **options, run_name=path.name) == 0
        return path

    return run


# -----------------------------------------------------------------------------
# going on


@pytest.mark.parametrize("optimizer", small.OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [4, 2], ids=["accumulation 1", "accumulation 2"])
@pytest.mark.parametrize("k", range(1, 12))
def test_resumed_run_is_the_uninterrupted_run(runs, whole, k, batch_size, dtype, optimizer, capsys):
    """To the last bit, from every step."""
    chosen = {"batch_size": batch_size, "dtype": dtype, "optimizer": optimizer}
    options = TWELVE | chosen
    with row(STOPPED) as counts:
        counts.injected += 1
        assert runs(**options, stop_after=k) == 0
        assert steps(runs.path)[-1] == len(metrics(runs.path)) == k
        assert status(runs.path) == {"reason": "stop_after", "step": k, "code": 0}
        time_s = metrics(runs.path)[-1]["time_s"]
        capsys.readouterr()
        assert runs(**options) == 0
        assert f"resuming from {runs.path / f'step-{k:08d}'}\n" in capsys.readouterr().out
        assert_same_result(runs.path, whole(**chosen))
        assert [one["step"] for one in metrics(runs.path) if "val_loss" in one] == [5, 10, 12]
        assert metrics(runs.path)[k]["time_s"] > time_s  # training time goes on, too
        counts.survived += 1


LIKE_FAST = {"optimizer": "muon", "untie": True, "embedding_norm": True, "mlp_activation": "relu2", "beta2": 0.99,
             "logit_softcap": 15.0, "embedding_learning_rate": 0.3, "schedule": "linear", "decay_fraction": 0.5}


@pytest.mark.parametrize("k", range(1, 12))
def test_resumed_run_with_all_of_recipe_fast(runs, whole, k):
    with row(STOPPED) as counts:
        counts.injected += 1
        assert runs(**TWELVE, **LIKE_FAST, stop_after=k) == 0 and runs(**TWELVE, **LIKE_FAST) == 0
        assert_same_result(runs.path, whole(**LIKE_FAST))
        counts.survived += 1


@pytest.mark.parametrize("optimizer", small.OPTIMIZERS)
@pytest.mark.parametrize("k", range(1, 12, 3))
def test_without_its_moments_it_is_not(runs, whole, k, optimizer, monkeypatch):
    """The control: a run that goes on with its weights and its step alone."""
    monkeypatch.setattr(checkpoint, "load_optimizers", lambda *_: None)
    with row(STOPPED) as counts:
        assert runs(**TWELVE, optimizer=optimizer, stop_after=k) == 0
        assert runs(**TWELVE, optimizer=optimizer) == 0
        with pytest.raises(AssertionError):
            assert_same_result(runs.path, whole(batch_size=4, dtype="float32", optimizer=optimizer))
        counts.control(True)


def test_many_stops(runs, whole):
    """Each with the checkpoint, and the accumulation, of another."""
    for k, batch_size in (1, 4), (2, 4), (5, 4), (6, 4), (7, 4), (10, 4), (11, 4), (12, 4):
        assert runs(**TWELVE, batch_size=batch_size, stop_after=k) == 0
    assert_same_result(runs.path, whole())


@pytest.mark.parametrize("torn", ["", '{"step": 13, "lo'], ids=["whole lines", "half a line"])
def test_lines_after_the_checkpoint_are_cut(runs, whole, torn):
    """As after a crash between two checkpoints: the metrics are ahead."""
    assert runs(**TWELVE) == 0
    shutil.rmtree(runs.path / "step-00000012")
    (runs.path / "status.json").unlink()
    with open(runs.path / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert steps(runs.path)[-1] == 10 and len((runs.path / "metrics.jsonl").read_text().splitlines()) >= 12
    assert runs(**TWELVE) == 0
    assert_same_result(runs.path, whole())


def test_a_crash_before_the_first_checkpoint_starts_anew(runs, whole, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *arguments: os.kill(os.getpid(), 0) or 1 / 0)
        assert runs(**TWELVE) == 1
    assert steps(runs.path) == [] and len(metrics(runs.path)) == 5
    assert runs(**TWELVE) == 0
    assert_same_result(runs.path, whole())


def test_other_settings_before_the_first_checkpoint_are_refused(runs, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *arguments: 1 / 0)
        assert runs(**TWELVE) == 1
    before = tree(runs.path)
    capsys.readouterr()
    assert runs(**TWELVE, beta2=0.9) == 2
    assert "beta2=0.95, now it is 0.9" in capsys.readouterr().err
    assert runs(**TWELVE, resume="never") == 2
    assert "--resume is never" in capsys.readouterr().err
    assert tree(runs.path) == before
    assert runs(**TWELVE, beta2=0.9, allow_change="beta2") == 0
    assert json.loads((runs.path / "config.json").read_text())["settings"]["beta2"] == 0.9


def test_the_log_ends_with_the_run_whose_end_is_noted(runs, monkeypatch):
    """Killed at step 3, after its checkpoint of step 2, and by then --stop_after 2 is all that is wanted."""
    assert runs(save_every=2, stop_after=4) == 0
    shutil.rmtree(runs.path / "step-00000004")
    (runs.path / "status.json").unlink()
    assert runs(save_every=2, stop_after=2) == 0
    assert status(runs.path) == {"reason": "stop_after", "step": 2, "code": 0} and len(metrics(runs.path)) == 2


def test_a_bug_without_words_has_a_name(runs, monkeypatch):
    def update(*_):
        raise AssertionError

    monkeypatch.setattr(train_gpt2, "update", update)
    assert runs() == 1 and status(runs.path)["reason"] == "AssertionError"


def test_a_disk_without_locks(runs, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(rundir.fcntl, "flock", flock)
    assert runs() == 5
    assert "No locks available" in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize("damage", [lambda line: line.replace(b'"loss"', b'"l\xefss"'),
                                    lambda line: line.replace(b": ", b":")],
                         ids=["a bit of a key", "written by another program"])
def test_a_last_line_of_another_length_is_amended(runs, monkeypatch, damage):
    """Where an evaluation is made up for."""
    options = {"save_every": 2, "val_every": 2}
    assert runs(**options, stop_after=2) == 0
    path = runs.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    row = {key: value for key, value in json.loads(lines[1]).items() if key not in ("val_loss", "bits_per_byte")}
    path.write_bytes(lines[0] + damage(json.dumps(row).encode() + b"\n"))
    assert runs(**options) == 0
    assert [row["step"] for row in metrics(runs.path)] == [1, 2, 3, 4, 5, 6] and "val_loss" in metrics(runs.path)[1]


def test_stop_after_that_has_been_reached_does_nothing(runs, capsys):
    assert runs(**TWELVE, stop_after=7) == 0
    before = tree(runs.directory)
    for k in 7, 3:
        assert runs(**TWELVE, stop_after=k) == 0
        assert "stopped at step 7" in capsys.readouterr().out
    assert tree(runs.directory) == before


def test_how_a_run_is_executed_may_change(runs, whole):
    """Micro-steps, evaluations, checkpoints: the other options of a run that goes on may be new."""
    assert runs(**TWELVE, stop_after=4) == 0
    changes = {"batch_size": 1, "val_every": 3, "save_every": 2, "keep_last": 5, "val_tokens": 3 * T}
    assert runs(**TWELVE | changes) == 0
    assert losses(runs.path) == pytest.approx(losses(whole()), rel=1e-6)
    assert steps(runs.path) == [4, 6, 8, 10, 12]


# -----------------------------------------------------------------------------
# a finished run, and another run under its name


@pytest.mark.parametrize("save_every", [5, 0])
def test_a_finished_run_is_left_alone(runs, capsys, save_every, monkeypatch):
    options = TWELVE | {"save_every": save_every}
    assert runs(**options) == 0
    capsys.readouterr()
    before = tree(runs.directory)
    monkeypatch.setattr(GPT, "compile", None)
    assert runs(**options) == 0
    out = capsys.readouterr().out
    assert "finished at step 12" in out and (f"python sample.py --run {runs.path}" in out) == (save_every > 0)
    assert tree(runs.directory) == before


OTHER_RUN = {
    "learning_rate": ({"learning_rate": 0.02}, ["learning_rate=0.01", "0.02"]),
    "model": ({"qk_norm": True}, ["qk_norm=False", "True"]),
    "depth": ({"n_layer": 3}, ["n_layer=2", "3"]),
    "window": ({"window_size": 8}, ["window_size=None", "8"]),
    "seed": ({"seed": 1}, ["seed=0", "1"]),
    "schedule": ({"max_steps": 13}, ["max_steps=12", "13"]),
    "resume never": ({"resume": "never"}, ["--resume", "--run_name"]),
    "data": ({"data": "other"}, ["data="]),
}


STATES = pytest.mark.parametrize(("save_every", "stop_after"), [(5, None), (5, 7), (0, None)],
                                 ids=["finished", "stopped", "finished without checkpoints"])


@pytest.mark.parametrize("name", OTHER_RUN)
@STATES
def test_another_run_under_the_same_name_is_refused(runs, capsys, name, save_every, stop_after):
    """Exit 2 with the field, its old and its new value."""
    options = TWELVE | {"save_every": save_every}
    assert runs(**options, stop_after=stop_after) == 0
    changes, expected = OTHER_RUN[name]
    if name == "data":
        changes = {"data": small.make_data(runs.directory / "other", seed=1)}
    capsys.readouterr()
    assert runs(**options | changes) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(runs.path) in err
    assert [word for word in expected if word not in err] == []


@pytest.mark.parametrize("changes", [{"learning_rate": 0.5}, {"resume": "never"}], ids=["changed", "never"])
@STATES
def test_a_refused_run_leaves_the_other_as_it_is(runs, changes, save_every, stop_after):
    options = TWELVE | {"save_every": save_every}
    assert runs(**options, stop_after=stop_after) == 0
    before = tree(runs.path)
    assert runs(**options | changes) == 2
    assert tree(runs.path) == before


def test_a_refused_run_does_not_cost_the_finished_one(runs):
    """Without checkpoints only status.json knows that the run is finished."""
    assert runs(save_every=0) == 0
    before = (runs.path / "metrics.jsonl").read_bytes()
    assert runs(save_every=0, learning_rate=0.5) == 2
    assert runs(save_every=0) == 0
    assert (runs.path / "metrics.jsonl").read_bytes() == before


def test_status_of_a_run_that_cannot_go_on(runs, monkeypatch):
    """It has made the steps that it goes on from."""
    assert runs(save_every=2, stop_after=2) == 0

    def full(run, step):
        raise rundir.CannotWrite("no space")

    monkeypatch.setattr(rundir.RunDir, "open_metrics", full)
    assert runs(save_every=2) == 5
    assert status(runs.path) == {"reason": "no space", "step": 2, "code": 5}


def test_a_status_that_cannot_be_written_is_said(runs, monkeypatch, capsys):
    write = rundir.write_json

    def full(path, content):
        if path.name == "status.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(rundir, "write_json", full)
    assert runs() == 0
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("warning: ") and "status.json" in line and "No space" in line


def test_changed_data_under_the_same_path_is_noticed(runs, capsys):
    assert runs(**TWELVE, stop_after=7) == 0
    shutil.rmtree(runs.data)
    small.make_data(runs.data, seed=1)
    assert runs(**TWELVE) == 2
    assert "data=" in capsys.readouterr().err


def test_resume_never_in_a_new_directory_is_fine(runs, whole):
    assert runs(**TWELVE, resume="never") == 0
    assert_same_result(runs.path, whole())


# -----------------------------------------------------------------------------
# --init_from


def test_init_from_starts_with_the_weights_of_the_other_run(runs):
    assert runs(run_name="first", save_every=6) == 0
    by_name = {"init_from": "first", "seed": 7, "learning_rate": 0.0, "max_steps": 2, "save_every": 2}
    assert runs(run_name="second", **by_name) == 0
    first, second = (tensors(run / f"step-{n:08d}") for run, n in
                     ((runs.out_dir / "first", 6), (runs.out_dir / "second", 2)))
    names = dict(GPT(TINY).named_parameters())
    assert [name for name in names if not torch.equal(first[name], second[name])] == []  # the learning rate is 0
    assert len(metrics(runs.out_dir / "second")) == 2  # with a schedule and steps of its own
    # the first loss of each seed is that of the loaded model on the first batch of that seed
    assert runs(run_name="scratch", **by_name | {"init_from": None}) == 0
    assert losses(runs.out_dir / "second")[0] < losses(runs.out_dir / "scratch")[0] - 0.1
    assert runs(run_name="by_path", **by_name | {"init_from": runs.out_dir / "first"}) == 0
    assert losses(runs.out_dir / "by_path") == losses(runs.out_dir / "second")


def test_init_from_is_read_once(runs):
    """A run that goes on needs its own checkpoint only."""
    assert runs(run_name="first", save_every=6) == 0
    options = TWELVE | {"init_from": "first"}
    assert runs(**options, run_name="whole") == 0
    assert runs(**options, stop_after=5) == 0
    shutil.rmtree(runs.out_dir / "first")
    assert runs(**options) == 0
    assert_same_result(runs.path, runs.out_dir / "whole")


def test_init_from_the_same_weights_again(runs, monkeypatch, capsys):
    """Killed before its first checkpoint, a run begins again with the weights that it began with, or not at all."""
    assert runs(run_name="first", save_every=3, stop_after=3) == 0
    options = TWELVE | {"init_from": "first"}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", lambda *_, **__: 1 / 0)
        assert runs(**options) == 1
    before = metrics(runs.path)[0]["loss"]
    assert runs(run_name="first", save_every=3) == 0
    assert runs(**options) == 2
    assert "init_weights" in capsys.readouterr().err and metrics(runs.path)[0]["loss"] == before
    shutil.rmtree(runs.out_dir / "first" / "step-00000006")
    assert runs(**options) == 0
    assert metrics(runs.path)[0]["loss"] == before


def test_init_from_what_does_not_fit(runs, capsys):
    assert runs(run_name="first", save_every=6) == 0
    assert runs(init_from="frist") == 2
    assert "'frist'" in (err := capsys.readouterr().err) and "first" in err.replace("frist", "")
    assert not runs.path.exists()
    assert runs(init_from="first", n_layer=3, run_name="other") == 2 and not (runs.out_dir / "other").exists()
    assert runs(init_from="first", n_layer=3) == 2
    assert "another model" in (err := capsys.readouterr().err) and "Traceback" not in err
    assert runs(init_from="first", n_layer=3, run_name="deeper") == 2  # and again: nothing is half begun
    shutil.copy(runs.data / "train_000000.bin", runs.out_dir / "first" / "step-00000006" / "model.safetensors")
    assert runs(init_from="first", run_name="damaged") == 4


# -----------------------------------------------------------------------------
# what is in a checkpoint


def test_layout(runs):
    assert runs(**TWELVE) == 0
    assert steps(runs.path) == [10, 12]
    place = runs.path / "step-00000010"
    files = ["manifest.json", "model.safetensors", "optim.safetensors", "state.json"]
    assert sorted(path.name for path in place.iterdir()) == files
    names = [f"transformer.h.{i}.{part}.weight" for i in range(2)
             for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    names.append("transformer.wte.weight")  # and no lm_head.weight: it is the same
    assert sorted(load_file(place / "model.safetensors")) == sorted(names)
    keys = [f"{name}/{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")]
    assert sorted(load_file(place / "optim.safetensors")) == sorted(keys)
    state = json.loads((place / "state.json").read_text())
    assert state["step"] == 10 and state["model_config"]["n_embd"] == 64 and state["train_config"]["max_steps"] == 12
    assert set(state) == {"step", "settings", "model_config", "train_config", "batch_size", "processes", "tokenizer",
                          "shards", "versions", "environment", "val_targets", "kernels"}
    manifest = json.loads((place / "manifest.json").read_text())
    assert sorted(manifest) == files[1:]
    for name, entry in manifest.items():
        content = (place / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_no_pickle(runs):
    """torch.save writes a zip file, plain pickle a byte 0x80: neither is anywhere in a run."""
    assert runs(**TWELVE) == 0
    for path in runs.path.rglob("*"):
        if path.is_file():
            assert path.suffix in (".safetensors", ".json", ".jsonl", ".diff") or path.name == ".lock"
            assert path.read_bytes()[:1] not in (b"P", b"\x80"), path


def test_a_copied_directory_is_enough(runs, tmp_path):
    assert runs(**TWELVE) == 0
    shutil.copytree(runs.path / "step-00000012", tmp_path / "elsewhere")
    shutil.rmtree(runs.out_dir)
    model = checkpoint.load_model(tmp_path / "elsewhere")
    assert model.config == TINY and model.lm_head.weight is model.transformer.wte.weight
    saved = load_file(tmp_path / "elsewhere" / "model.safetensors")
    assert all(torch.equal(weight, saved[name]) for name, weight in model.named_parameters())
    assert not torch.equal(saved["transformer.wte.weight"], GPT(TINY).transformer.wte.weight)


@pytest.mark.parametrize(("save_every", "keep_last", "expected"), [
    (0, 2, []), (1, 2, [11, 12]), (1, 3, [10, 11, 12]), (5, 2, [10, 12]), (5, 9, [5, 10, 12]), (6, 2, [6, 12]),
    (100, 2, [12])])
def test_which_checkpoints_stay(runs, save_every, keep_last, expected):
    assert runs(**TWELVE | {"save_every": save_every, "keep_last": keep_last}) == 0
    assert steps(runs.path) == expected


def test_order_of_writing(runs, monkeypatch):
    """Each file and the directory are on disk before the rename; the rename before an older checkpoint goes."""
    events = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def record_fsync(descriptor):
        fsync(descriptor)
        events.append(("fsync", os.fstat(descriptor).st_ino))

    def record_rename(self, target):
        if Path(target).name.startswith(".removing"):
            return rename(self, target)
        inode = {path.name: path.stat().st_ino for path in (self, *self.iterdir())}
        times = {path.name: path.stat().st_mtime_ns for path in self.iterdir()}
        assert times["manifest.json"] == max(times.values())
        events.append(("rename", Path(target).name, inode))
        return rename(self, target)

    def record_rmtree(path, *arguments, **options):
        if Path(path).exists() and "step" in Path(path).name:  # not the copy of git's index
            events.append(("remove", Path(path).name))
        return rmtree(path, *arguments, **options)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(shutil, "rmtree", record_rmtree)
    assert runs(**TWELVE) == 0
    monkeypatch.undo()
    renames = [index for index, event in enumerate(events) if event[0] == "rename"]
    assert [events[index][1] for index in renames] == ["step-00000005", "step-00000010", "step-00000012"]
    for index in renames:
        inodes = events[index][2]
        assert len(inodes) == 5
        synced = {event[1] for event in events[:index] if event[0] == "fsync"}
        assert [name for name, inode in inodes.items() if inode not in synced] == []
        assert events[index + 1] == ("fsync", runs.path.stat().st_ino)
    assert [event for event in events if event[0] == "remove"] == [("remove", ".removing-step-00000005")]
    assert events.index(("remove", ".removing-step-00000005")) > renames[2] + 1


# -----------------------------------------------------------------------------
# a disk that is full


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def file_size_limit(path, parts):
    """A real error of the system, without a full disk: no file may grow beyond 10 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        return write_hashed(path, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


write_hashed = checkpoint.write_hashed


@pytest.fixture(params=[False, True], ids=["", "beside"])
def beside(request, monkeypatch):
    """Saves in the loop as on a CPU, or beside the training as on a GPU."""
    if request.param:
        monkeypatch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)


@pytest.mark.parametrize(("function", "failure", "message"), [
    ("write_hashed", full, "No space left on device"), ("write_hashed", file_size_limit, "File too large"),
    ("fsync", full, "No space left on device")], ids=["write", "file size limit", "fsync"])
@pytest.mark.parametrize("failing, ends", [([5], 0), ([10], 0), ([5, 10], 0), ([12], 5), ([5, 10, 12], 5)])
def test_disk_full_at_a_checkpoint(runs, whole, capsys, function, failure, message, failing, ends, beside):
    """Training goes on and the next save is another try; a run whose last save fails ends, with those before."""
    original, saved = checkpoint.save, []

    def save(run_directory, step, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            if step in failing:
                patch.setattr(checkpoint, function, failure)
            saved.append(step)
            return original(run_directory, step, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        assert runs(**TWELVE) == ends
    err = capsys.readouterr().err
    for step in failing:
        kind, rest = ("error", "") if ends and step == 12 else ("warning", ", trying again at the next save")
        assert re.search(rf"{kind}: cannot write to {re.escape(str(runs.path))}: {message} \([\d,]+ bytes free\); "
                         rf"step {step} is not saved, [\d,]+ bytes{rest}\n", err), err
    assert "Traceback" not in err
    good = [step for step in (5, 10, 12) if step not in failing][-2:]
    assert saved == [5, 10, 12] and steps(runs.path) == good
    assert status(runs.path)["code"] == ends
    assert all(checkpoint.find_fault(path) is None for path in checkpoint.list_checkpoints(runs.path))
    assert {path.name for path in runs.path.iterdir()} == {
        ".lock", "config.json", "source.diff", "metrics.jsonl", "status.json",
        *(checkpoint.directory_name(step) for step in good)}
    assert len(metrics(runs.path)) == 12
    assert runs(**TWELVE) == 0  # with space again
    assert_same_result(runs.path, whole())


def test_three_failed_saves_in_a_row_end_a_run(runs, whole, capsys, beside):
    options = TWELVE | {"save_every": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_hashed", full)
        assert runs(**options) == 5
    assert capsys.readouterr().err.count("is not saved") == 3
    assert len(metrics(runs.path)) in (6, 8) and steps(runs.path) == []  # seen at the next save if beside
    assert runs(**options) == 0
    assert_same_result(runs.path, whole())


def test_a_run_goes_on_beside_a_save(runs, whole, monkeypatch):
    """A copy is saved: two steps are made while a save is held up, and the save before is done when the next begins."""
    monkeypatch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)
    original_save, original_update, two_later, order = checkpoint.save, train_gpt2.update, threading.Event(), []

    def save(run_directory, step, *arguments):
        order.append(f"begin {step}")
        assert two_later.wait(timeout=60)
        original_save(run_directory, step, *arguments)
        order.append(f"end {step}")

    def update(*arguments):
        order.append("update")
        if order[-3:] == ["begin 5", "update", "update"]:
            two_later.set()
        return original_update(*arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(train_gpt2, "update", update)
    assert runs(**TWELVE) == 0
    assert order[5:8] == ["begin 5", "update", "update"]
    assert [word for word in order if word != "update"] == [f"{x} {n}" for n in (5, 10, 12) for x in ("begin", "end")]
    assert steps(runs.path) == [10, 12]
    assert_same_result(runs.path, whole())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_waits_for_the_copy_that_is_saved(runs, whole, optimizer):
    """A copy that ends late, as on a GPU: where the next update lets the device wait for it, or after that update."""
    pending, waits, original_update = [], [], train_gpt2.update

    class Event:
        def __init__(self, copies):
            self.copies, self.asked, self.done = copies, threading.Event(), threading.Event()

        def end(self):
            assert len(pending) == 3 or self.asked.wait(timeout=60), "nobody waits for the copy before it is saved"
            for to, tensor in self.copies:
                to.copy_(tensor)
            self.copies = []
            self.done.set()

        def synchronize(self):
            self.asked.set()
            assert self.done.wait(timeout=60)

    class Stream:
        def wait_event(self, event):
            waits.append(len(event.copies))
            event.end()

    def copy_aside(copies):
        pending.append(Event(copies))
        if len(pending) == 3:  # that of the last step
            pending[-1].end()
        return pending[-1]

    def update(*arguments):
        report = original_update(*arguments)
        for event in pending:
            event.end()
        return report

    def synchronize(device):
        assert not any(event.copies for event in pending), "the host waits for the copy"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)
        patch.setattr(checkpoint.machine, "copy_aside", copy_aside)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(checkpoint.machine, "synchronize", synchronize)
        patch.setattr(train_gpt2, "update", update)
        assert runs(**TWELVE, optimizer=optimizer) == 0
    assert len(pending) == 3 and sum(n > 0 for n in waits) == 2
    shutil.rmtree(runs.path / "step-00000012")
    assert runs(**TWELVE, optimizer=optimizer) == 0  # from what was saved after ten steps
    assert_same_result(runs.path, whole(optimizer=optimizer))


def test_a_save_beside_ends_before_the_run(runs, monkeypatch):
    """Also where the run ends by an error."""
    monkeypatch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)
    original_save, original_update, failed = checkpoint.save, train_gpt2.update, threading.Event()

    def save(run_directory, step, *arguments):
        assert failed.wait(timeout=60)
        return original_save(run_directory, step, *arguments)

    def update(model, optimizers, loss, grad_clip):
        report = original_update(model, optimizers, loss, grad_clip)
        update.n += 1
        if update.n == 4:
            failed.set()
            raise RuntimeError("a bug")
        return report

    update.n = 0
    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(train_gpt2, "update", update)
    assert runs(max_steps=9, save_every=3) == 1
    assert status(runs.path)["reason"] == "a bug" and steps(runs.path) == [3]
    assert checkpoint.find_fault(runs.path / "step-00000003") is None


def test_lines_of_the_log_wait_for_space(runs, whole, monkeypatch):
    """Also where a part of a line was written."""
    write_all, n_calls = rundir.write_all, []

    def sometimes_full(file, data):
        n_calls.append(len(data))
        if len(n_calls) in (2, 3, 4, 7):
            write_all(file, data[:len(n_calls)])
            full()
        write_all(file, data)

    monkeypatch.setattr(rundir, "write_all", sometimes_full)
    assert runs(**TWELVE) == 0
    assert n_calls[4] > 3 * n_calls[0] / 2
    assert_same_result(runs.path, whole())


def test_what_a_killed_process_left_half_written_is_cleared(runs, whole):
    (runs.path / ".saving-step-00000005").mkdir(parents=True)
    (runs.path / ".saving-step-00000005" / "model.safetensors").write_text("half")
    assert runs(**TWELVE) == 0
    assert_same_result(runs.path, whole())
    assert not list(runs.path.glob(".saving*"))


# -----------------------------------------------------------------------------
# damage


def flip(name, place):
    def damage(checkpoint_, other):
        content = bytearray((checkpoint_ / name).read_bytes())
        content[int(place * len(content))] ^= 1
        (checkpoint_ / name).write_bytes(content)
    return damage


def swap_all(checkpoint_, other):
    shutil.rmtree(checkpoint_)
    shutil.copytree(other, checkpoint_)


DAMAGE = {
    "a bit of the weights": (flip("model.safetensors", 0.7), "model.safetensors"),
    "a bit of the header": (flip("model.safetensors", 0), "model.safetensors"),
    "a bit of the moments": (flip("optim.safetensors", 0.5), "optim.safetensors"),
    "a bit of the state": (flip("state.json", 0.5), "state.json"),
    "a bit of the manifest": (flip("manifest.json", 0.6), ""),
    "cut off": (lambda c, o: os.truncate(c / "optim.safetensors", 1000), "optim.safetensors has 1000 bytes"),
    "empty": (lambda c, o: os.truncate(c / "model.safetensors", 0), "model.safetensors has 0 bytes"),
    "no manifest": (lambda c, o: (c / "manifest.json").unlink(), "manifest.json"),
    "no weights": (lambda c, o: (c / "model.safetensors").unlink(), "model.safetensors"),
    "empty manifest": (lambda c, o: (c / "manifest.json").write_text(""), "manifest.json"),
    "another manifest": (lambda c, o: (c / "manifest.json").write_text("[]"), "manifest.json"),
    "manifest of bytes": (lambda c, o: (c / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json"),
    "weights of another step": (
        lambda c, o: shutil.copy(o / "model.safetensors", c / "model.safetensors"), "model.safetensors"),
    "all of another step": (swap_all, "another step"),
    "nothing left": (lambda c, o: [path.unlink() for path in c.iterdir()], "manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_skipped(runs, whole, capsys, name):
    """With a line that says why; the next older one leads to the same result."""
    assert runs(**TWELVE, stop_after=10) == 0
    damage, expected = DAMAGE[name]
    damage(runs.path / "step-00000010", runs.path / "step-00000005")
    capsys.readouterr()
    assert runs(**TWELVE) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("skipping "))
    assert "step-00000010" in line and expected in line
    assert f"resuming from {runs.path / 'step-00000005'}\n" in out
    assert_same_result(runs.path, whole())
    assert [checkpoint.find_fault(path) for path in checkpoint.list_checkpoints(runs.path)] == [None, None]


def test_no_valid_checkpoint(runs, capsys):
    assert runs(**TWELVE, stop_after=10) == 0
    for path in checkpoint.list_checkpoints(runs.path):
        DAMAGE["a bit of the weights"][0](path, None)
    capsys.readouterr()
    before = tree(runs.path)
    assert runs(**TWELVE) == 4
    out, err = capsys.readouterr()
    assert out.count("skipping ") == 2 and "step-00000005" in err and "step-00000010" in err
    assert err.startswith("error: ") and err.count("\n") == 1
    after = tree(runs.path)
    assert [path for path in before if path not in after] == []  # nothing is deleted
    assert {path: value for path, value in after.items() if "step-" in path or "metrics" in path} == {
        path: value for path, value in before.items() if "step-" in path or "metrics" in path}


@pytest.mark.parametrize("become", ["a link", "a file", "set aside"])
def test_what_is_no_checkpoint_any_more_is_no_reason_to_begin_anew(runs, capsys, become):
    assert runs(**TWELVE, stop_after=10) == 0
    for path in checkpoint.list_checkpoints(runs.path):
        path.rename(aside := runs.path / (f"{'invalid' if become == 'set aside' else 'moved'}-{path.name}"))
        if become == "a link":
            path.symlink_to(aside)
        if become == "a file":
            path.write_text("")
    before = tree(runs.path)
    capsys.readouterr()
    assert runs(**TWELVE) == 4
    err = capsys.readouterr().err
    assert "step-00000005" in err and "step-00000010" in err and err.count("\n") == 1
    assert tree(runs.path).items() >= {path: value for path, value in before.items() if "step-" in path}.items()


def damage_moments(path, tensors):
    """A file of the optimizer's state, and a manifest that fits it."""
    save_file(tensors, path / "optim.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["optim.safetensors"] = {"bytes": (path / "optim.safetensors").stat().st_size,
                                     "sha256": sha256(path / "optim.safetensors")}
    (path / "manifest.json").write_text(json.dumps(manifest))


MOMENT = "transformer.h.0.attn.c_attn.weight/exp_avg"


@pytest.mark.parametrize("change", [
    lambda tensors: {}, lambda tensors: tensors | {MOMENT: tensors[MOMENT].double()},
    lambda tensors: tensors | {MOMENT: torch.zeros(1)}, lambda tensors: tensors | {"no_name": torch.zeros(1)},
    lambda tensors: {name: tensor for name, tensor in tensors.items() if name != MOMENT},
], ids=["empty", "another dtype", "another shape", "another name", "one missing"])
def test_the_state_of_another_optimizer_is_refused(runs, capsys, change):
    assert runs(**TWELVE, stop_after=5) == 0
    path = runs.path / "step-00000005"
    damage_moments(path, change(load_file(path / "optim.safetensors")))
    capsys.readouterr()
    assert runs(**TWELVE) == 2
    err = capsys.readouterr().err
    assert "another optimizer" in err and err.count("\n") == 1 and "Traceback" not in err


def test_damaged_checkpoints_do_not_push_out_valid_ones(runs, whole):
    """keep_last counts what can be read: two newer damaged ones must not cost the only one that is left."""
    assert runs(**TWELVE | {"save_every": 4, "keep_last": 3}, stop_after=11) == 0
    assert steps(runs.path) == [4, 8, 11]
    for step in 8, 11:
        DAMAGE["no manifest"][0](runs.path / f"step-{step:08d}", None)
    assert runs(**TWELVE | {"save_every": 6}, stop_after=7) == 0
    valid = [path.name for path in checkpoint.list_checkpoints(runs.path) if checkpoint.find_fault(path) is None]
    assert valid[0] == "step-00000007" and len(valid) == 2
    assert runs(**TWELVE) == 0
    assert_same_result(runs.path, whole())


def test_what_a_killed_process_was_writing_is_removed(runs):
    assert runs(save_every=2, stop_after=2) == 0
    (runs.path / ".saving-step-00000003").mkdir()
    (runs.path / ".saving-step-00000004").write_text("")
    (runs.path / ".config.json.1.tmp").mkdir()
    assert runs(save_every=2) == 0
    assert not list(runs.path.glob(".saving-*")) and not list(runs.path.glob(".*.tmp"))


def test_the_code_that_began_a_run_stays_on_record(runs):
    assert runs(save_every=2, stop_after=2) == 0
    before = tree(runs.path)
    assert runs(save_every=2, batch_size=2) == 0
    after = tree(runs.path)
    same = [path for path in before if path.split("/")[-1] in ("config.json", "source.diff")]
    assert len(same) == 2 and all(before[path] == after[path] for path in same)
    assert (runs.path / "source-00000002.diff").exists()


@pytest.mark.parametrize("damage", ["missing", "half a line", "another step", "not text"])
def test_a_damaged_log_keeps_its_place(runs, whole, capsys, damage):
    """Line n stays the n-th update: what is lost is an empty line, said aloud, and the run ends as it would have."""
    assert runs(**TWELVE | {"save_every": 6}, stop_after=6) == 0
    path = runs.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + {"half a line": lines[4][:20], "another step": lines[5],
                                            "not text": b"\xff\x00\n" + lines[5], "missing": b""}[damage])
    assert runs(**TWELVE | {"save_every": 6}) == 0
    assert "steps 5 to 6 are missing or damaged" in capsys.readouterr().err
    rows = metrics(runs.path)
    assert [row["step"] for row in rows] == list(range(1, 13)) and rows[4] == {"step": 5} and rows[5] == {"step": 6}
    assert rows[6]["time_s"] > rows[3]["time_s"]


def test_no_status_of_an_earlier_end_while_a_run_goes_on(runs, monkeypatch):
    assert runs(save_every=2, stop_after=2) == 0
    seen, log = [], train_gpt2.rundir.RunDir.log
    monkeypatch.setattr(train_gpt2.rundir.RunDir, "log",
                        lambda run, row: (seen.append((run.path / "status.json").exists()), log(run, row)))
    assert runs(save_every=2) == 0
    assert seen == [False] * 4 and (runs.path / "status.json").exists()


def test_copies_and_links_of_the_user_stay(runs):
    assert runs(save_every=2, stop_after=4) == 0
    shutil.copytree(runs.path / "step-00000002", runs.path / "step-00000002.bak")
    (runs.path / "step-00000002-best").symlink_to("step-00000002.bak")
    assert runs(save_every=1) == 0
    assert steps(runs.path) == [5, 6]
    assert (runs.path / "step-00000002.bak").is_dir() and (runs.path / "step-00000002-best").is_symlink()


def test_a_step_of_nine_digits_is_newer(tmp_path):
    for step in 99_999_999, 100_000_000:
        (tmp_path / checkpoint.directory_name(step)).mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [100_000_000, 99_999_999]


def test_find(runs, monkeypatch):
    assert runs(run_name="b", save_every=6) == 0
    assert runs(run_name="a", save_every=6) == 0
    newest = runs.out_dir / "a" / "step-00000006"
    assert checkpoint.find("a", runs.out_dir) == checkpoint.find(str(runs.out_dir / "a"), "runs") == newest
    with pytest.raises(rundir.BadOption, match=r"no run 'c' .*: a, b$"):
        checkpoint.find("c", runs.out_dir)
    with pytest.raises(rundir.BadOption, match=r"none$"):
        checkpoint.find("c", runs.directory / "nowhere")


def test_weights_of_another_model_are_refused(runs):
    assert runs(save_every=6) == 0
    wider = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, vocab_size=small.VOCAB))
    before = wider.transformer.wte.weight.clone()
    with pytest.raises(rundir.BadOption, match="another model"):
        checkpoint.load_weights(runs.path / "step-00000006", wider)
    assert torch.equal(wider.transformer.wte.weight, before)


def test_allow_change(runs, capsys):
    """The changed setting holds from there on; what is not named is still refused."""
    assert runs(save_every=2, stop_after=2) == 0
    changes = {"save_every": 2, "learning_rate": 5e-3, "weight_decay": 0.2}
    assert runs(**changes) == 2
    assert "learning_rate=0.01, now it is 0.005" in (err := capsys.readouterr().err)
    assert "--allow_change learning_rate" in err
    assert runs(**changes, allow_change="learning_rate") == 2
    assert "weight_decay" in capsys.readouterr().err
    assert call(train_gpt2.main, [*runs.options(**changes), "--allow_change", "learning_rate", "weight_decay"]) == 0
    assert "changed: learning_rate=0.01, from now on 0.005" in capsys.readouterr().out
    assert metrics(runs.path)[2]["lr"] == pytest.approx(5e-3 * schedule(TrainConfig(
        warmup_steps=2, max_steps=6), 2))
    assert checkpoint.read_state(runs.path / "step-00000006")["settings"]["learning_rate"] == 5e-3
    assert runs(**changes) == 0  # finished, and begun so by now


@pytest.mark.parametrize("before", small.OPTIMIZERS)
@pytest.mark.parametrize("after", small.OPTIMIZERS)
def test_allow_change_of_the_optimizer(runs, before, after):
    """Its state begins anew: nothing of the other one's is left."""
    assert runs(save_every=2, stop_after=2, optimizer=before) == 0
    assert runs(save_every=2, optimizer=after, allow_change="optimizer") == 0
    assert runs(save_every=2, optimizer=after, run_name="all") == 0
    keys = [load_file(run / "step-00000006" / "optim.safetensors").keys() for run in (runs.path, runs.out_dir / "all")]
    assert keys[0] == keys[1]


def test_allow_change_of_the_data(runs, capsys):
    assert runs(save_every=2, stop_after=2) == 0
    shutil.rmtree(runs.data)
    make_data(runs.data, seed=1)
    assert runs(save_every=2) == 2
    assert "--allow_change data" in capsys.readouterr().err
    assert runs(save_every=2, allow_change="data") == 0
    assert steps(runs.path)[-1] == 6


def test_allow_change_of_the_model_is_no_use(runs, capsys):
    assert runs(save_every=2, stop_after=2) == 0
    assert runs(save_every=2, n_layer=3, allow_change="n_layer") == 2
    assert "holds the weights of another model" in capsys.readouterr().err


def test_allow_change_of_what_there_is_not(runs, capsys):
    assert runs(allow_change="learningrate") == 2
    assert "allow_change: learningrate is none of data, " in capsys.readouterr().err and not runs.out_dir.exists()


def test_lines_that_a_failed_sync_may_have_lost_are_written_again(tmp_path, monkeypatch):
    """A kernel says once that it could not write, forgets what it had, and a later fsync succeeds."""
    run = rundir.RunDir(tmp_path / "run")
    run.open()
    run.open_metrics(0)
    run.log({"step": 1})
    run.sync()
    path, (descriptor, fsync) = run.path / "metrics.jsonl", (run.metrics.fileno(), os.fsync)
    n_bytes = path.stat().st_size

    def lose(number):
        if number != descriptor:
            return fsync(number)
        os.pwrite(number, bytes(path.stat().st_size - n_bytes), n_bytes)
        raise OSError(errno.EIO, "Input/output error")

    for step in 2, 3:
        run.log({"step": step})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lose)
        with pytest.raises(OSError):
            run.sync()
    run.log({"step": 4})
    run.sync()
    assert [row["step"] for row in metrics(run.path)] == [1, 2, 3, 4]


def test_lines_are_not_kept_for_ever(tmp_path):
    """Where nothing is saved, nothing else waits for them to be on the disk."""
    run = rundir.RunDir(tmp_path / "run")
    run.open()
    run.open_metrics(0)
    for step in range(1, 1001):
        run.log({"step": step, "loss": "x" * 3000})
        assert len(run.unsynced) < 2**20 + 4000
    run.sync()
    assert [row["step"] for row in metrics(run.path)] == list(range(1, 1001))


def test_a_save_beside_that_fails_is_said_where_the_run_ends_by_another_error(runs, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)
    failed = threading.Event()

    def save(*arguments):
        assert failed.wait(timeout=60)
        full()

    def update(model, optimizers, loss, grad_clip):
        update.n += 1
        if update.n == 4:
            failed.set()
            raise RuntimeError("a bug")
        return original_update(model, optimizers, loss, grad_clip)

    update.n, original_update = 0, train_gpt2.update
    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(train_gpt2, "update", update)
    assert runs(max_steps=9, save_every=3) == 1
    assert status(runs.path)["reason"] == "a bug" and steps(runs.path) == []
    err = capsys.readouterr().err
    assert re.search(rf"^warning: cannot write to {re.escape(str(runs.path))}: No space left on device .*; "
                     r"step 3 is not saved, [\d,]+ bytes$", err, re.MULTILINE)


def test_the_copy_that_a_save_is_compared_with_is_synced_file_by_file(tmp_path, monkeypatch):
    """As a save has two large files, so has it."""
    synced, fsync = [], os.fsync
    small_config = GPTConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=64)
    monkeypatch.setattr(publish, "GPTConfig", lambda: small_config)
    monkeypatch.chdir(tmp_path)

    def note(descriptor):
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    n_bytes = publish.time_of_a_save()["bytes"]
    first_save = next(i for i, (path, _) in enumerate(synced) if ".saving-" in str(path))
    assert len(synced[:first_save]) == 2 and sum(size for _, size in synced[:first_save]) == n_bytes
    assert len({path for path, _ in synced[:first_save]}) == 2
