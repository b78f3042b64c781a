"""
train_gpt2.py end to end on the model `tiny`: what it computes, what it writes, how it ends.
Most runs are in this process (tests/small.py); signals and torchrun get processes of their own.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from small import BATCH_TOKENS, VOCAB, T, assert_same_result, losses, make_data, metrics, status, steps, tree, wait_for

import checkpoint
import machine
import rundir
import train_gpt2
from configs.recipes import TrainConfig
from costs.memory import MIB, memory_advice, training_need
from data import loader
from data.shards import write_shard
from data.tokenizer import gpt2
from kernels.compiling import compiles
from model import GPT, CausalSelfAttention, GPTConfig, Linear, SlidingWindowAttention
from optim import make_optimizers, update

runs = small.runs
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=VOCAB)


def read_tokens(path):
    """Tokens of a shard, by the format alone."""
    return np.frombuffer(path.read_bytes()[1024:], dtype="<u2").astype(np.int64)


def window(tokens, index):
    """Inputs and targets (T,) of one window."""
    piece = torch.from_numpy(tokens[index * T : index * T + T + 1])
    return piece[:-1], piece[1:]


def batch(tokens, indices):
    inputs, targets = zip(*(window(tokens, int(index)) for index in indices), strict=True)
    return torch.stack(inputs), torch.stack(targets)


def close_to(actual, expected):
    """Losses, gradient norms and evaluations, one line for each step."""
    rows, expected_rows = metrics(actual), metrics(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for key, tolerance in {"loss": 1e-6, "val_loss": 1e-6, "grad_norm": 1e-4, "lr": 0, "tokens": 0}.items():
        values = [row[key] for row in rows if key in row]
        assert values == pytest.approx([row[key] for row in expected_rows if key in row], rel=tolerance), key


def assert_close(checkpoint, expected):
    """Weights and optimizer state; Adam turns rounding into more than rounding where a gradient is almost 0."""
    expected = small.tensors(expected)
    for name, value in small.tensors(checkpoint).items():
        assert (value - expected[name]).norm() <= 1e-3 * expected[name].norm(), name


# -----------------------------------------------------------------------------
# what a step computes


def test_same_seed_same_losses_and_another_seed_others(runs):
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        torch.manual_seed(len(name))  # what happened before must not matter
        assert runs(run_name=name, seed=seed, save_every=100) == 0
        torch.rand(7)
    a, b, c = (runs.out_dir / name for name in "abc")
    assert_same_result(a, b)
    assert not set(losses(a)) & set(losses(c))
    for run in a, b, c:
        assert losses(run)[0] == pytest.approx(math.log(VOCAB), abs=0.15)
        assert losses(run)[-1] < losses(run)[0] - 0.1


def test_the_seed_sets_the_order_of_the_data_too(runs, monkeypatch):
    """With the same initial weights, another seed still gives another first loss."""
    original = GPT.init_weights
    monkeypatch.setattr(GPT, "init_weights", lambda self, seed: original(self, 0))
    for seed in 0, 1:
        assert runs(run_name=f"seed{seed}", seed=seed, max_steps=2) == 0
    assert losses(runs.out_dir / "seed0")[0] != losses(runs.out_dir / "seed1")[0]


def test_accumulation_changes_rounding_only(runs):
    for batch_size in 1, 2, 4:
        assert runs(run_name=f"b{batch_size}", batch_size=batch_size, learning_rate=1e-3, save_every=100,
                    val_every=3) == 0
    whole = runs.out_dir / "b4"
    for batch_size in 1, 2:
        run = runs.out_dir / f"b{batch_size}"
        close_to(run, whole)
        assert_close(run / "step-00000006", whole / "step-00000006")


@pytest.mark.parametrize(("batch_size", "grad_clip", "schedule"), [(4, 0.5, "cosine"), (1, 0.0, "linear")])
def test_three_updates_by_hand(runs, batch_size, grad_clip, schedule):
    """AdamW, clipping, schedule and data order in plain code."""
    options = {"batch_size": batch_size, "grad_clip": grad_clip, "schedule": schedule, "seed": 3, "beta1": 0.8,
               "beta2": 0.9, "weight_decay": 0.3, "final_lr_fraction": 0.25, "max_steps": 5, "warmup_steps": 1}
    assert runs(**options, stop_after=3, save_every=100) == 0

    tokens = read_tokens(runs.data / "train_000000.bin")
    n_windows = (len(tokens) - 1) // T
    order = np.random.Generator(np.random.Philox(key=[3, 0])).permutation(n_windows)
    remaining = {"cosine": [1, 1, (1 + math.cos(math.pi / 4)) / 2], "linear": [1, 1, 3 / 4]}[schedule]
    gpt = GPT(TINY, seed=3)
    weights = dict(gpt.named_parameters())
    m, v = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    for step in range(3):
        gpt.zero_grad()
        loss = gpt(*batch(tokens, order[4 * step : 4 * step + 4]))[1]
        loss.backward()
        norm = math.sqrt(sum(weight.grad.double().pow(2).sum().item() for weight in weights.values()))
        scale = min(1, grad_clip / norm) if grad_clip else 1
        lr = 1e-2 * (0.25 + 0.75 * remaining[step])
        row = metrics(runs.path)[step]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
        assert not grad_clip or scale < 1, "the test wants clipping at work"
        with torch.no_grad():
            for name, weight in weights.items():
                grad = weight.grad * scale
                m[name] = 0.8 * m[name] + 0.2 * grad
                v[name] = 0.9 * v[name] + 0.1 * grad**2
                weight *= 1 - lr * 0.3
                weight -= lr * (m[name] / (1 - 0.8 ** (step + 1))) / (
                    (v[name] / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
    saved = small.tensors(runs.path / "step-00000003")
    for name, weight in weights.items():
        assert (saved[name] - weight).norm() < 1e-5 * weight.norm(), name
        assert (saved[f"{name}/exp_avg"] - m[name]).norm() < 1e-4 * m[name].norm(), name


def test_bfloat16_rounds_the_products_only(runs):
    for dtype in "float32", "bfloat16":
        assert runs(run_name=dtype, dtype=dtype, max_steps=3, save_every=3) == 0
    exact, rounded = (runs.out_dir / name for name in ("float32", "bfloat16"))
    assert losses(exact) != losses(rounded)
    assert losses(rounded) == pytest.approx(losses(exact), rel=1e-2)
    assert {weight.dtype for weight in small.tensors(rounded / "step-00000003").values()} == {torch.float32}


# -----------------------------------------------------------------------------
# what it writes

KEYS = ["step", "tokens", "time_s", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "mfu", "peak_mib"]


def test_metrics(runs):
    assert runs(max_steps=7, val_every=3) == 0
    rows = metrics(runs.path)
    assert len(rows) == 7
    time_s = 0.0
    for n, row in enumerate(rows, 1):
        assert list(row) == ([*KEYS, "val_loss", "bits_per_byte"] if n in (3, 6, 7) else KEYS)
        assert (row["step"], row["tokens"]) == (n, n * BATCH_TOKENS)
        time_s += row["step_ms"] / 1000
        assert row["time_s"] == pytest.approx(time_s)
        assert row["tokens_per_s"] == pytest.approx(BATCH_TOKENS / row["step_ms"] * 1000)
        assert row["mfu"] is None and row["peak_mib"] is None  # a CPU
        assert row.get("bits_per_byte") is None  # the tokenizer is not known
    assert [row["lr"] for row in rows[:2]] == [1e-2 / 2, 1e-2]


@pytest.mark.parametrize(("val_every", "expected"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (50, [6])])
def test_val_every(runs, val_every, expected):
    assert runs(val_every=val_every) == 0
    assert [row["step"] for row in metrics(runs.path) if "val_loss" in row] == expected


def test_evaluating_changes_nothing_else(runs):
    for val_every in 0, 2:
        assert runs(run_name=f"val{val_every}", val_every=val_every, save_every=6) == 0
    assert losses(runs.out_dir / "val0") == losses(runs.out_dir / "val2")


def test_config_and_source(runs):
    assert runs(save_every=6) == 0
    config = json.loads((runs.path / "config.json").read_text())
    assert config["model_config"]["n_layer"] == 2 and config["model_config"]["vocab_size"] == VOCAB
    assert config["train_config"]["learning_rate"] == 1e-2 and config["train_config"]["data"] == str(runs.data)
    assert config["versions"]["torch"] == torch.__version__ and config["versions"]["device"] == "CPU"
    assert config["tokenizer"] is None
    state = json.loads((runs.path / "step-00000006" / "state.json").read_text())
    assert state == {"step": 6, **config}
    assert status(runs.path) == {"reason": "finished", "step": 6, "code": 0}
    assert {path.name for path in runs.path.iterdir()} == {
        ".lock", "config.json", "source.diff", "metrics.jsonl", "status.json", "step-00000006"}


@pytest.mark.parametrize("change", [b"after\n", b"caf\xe9\n"], ids=["ASCII", "Latin-1"])
def test_source_diff_is_the_commit_and_what_changed(tmp_path, monkeypatch, change):
    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path / "code", check=True, capture_output=True,
                              text=True).stdout

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "model.py").write_text("before\n")
    git("init", "-q")
    git("add", "model.py")
    git("commit", "-qm", "one")
    (tmp_path / "code" / "model.py").write_bytes(change)
    monkeypatch.setattr(rundir, "__file__", str(tmp_path / "code" / "rundir.py"))
    run = rundir.RunDir(tmp_path / "run")
    run.open()
    run.begin({}, 0)
    source = (tmp_path / "run" / "source.diff").read_bytes()
    assert source.startswith(git("rev-parse", "HEAD").encode())
    assert b"-before\n" in source and b"\n+" + change[:3] in source


@pytest.mark.parametrize("inside", [".", "inner"])
def test_source_diff_restores_the_code(inside, tmp_path, monkeypatch):
    """git apply on a clean checkout of the commit gives the same files, tracked or not, whatever the user has set."""
    repository, clean = tmp_path / "repository", tmp_path / "clean"
    code = repository / inside
    code.mkdir(parents=True)

    def git(*arguments, cwd=repository):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        return subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True).stdout

    def files(directory: Path) -> dict:
        paths = [path for path in directory.rglob("*") if ".git" not in path.relative_to(directory).parts]
        return {str(path.relative_to(directory)): os.readlink(path) if path.is_symlink() else
                (path.read_bytes(), path.stat().st_mode & 0o111) for path in paths if not path.is_dir()}

    (repository / "top.py").write_text("before\n")
    for name, content in {"model.py": b"before\n", "gone.py": b"x\n", "table.npy": bytes(range(256))}.items():
        (code / name).write_bytes(content)
    (code / ".gitignore").write_text("ignored\n")
    os.utime(code / "table.npy", (1e9, 1e9))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    git("clone", "-q", str(repository), str(clean))

    (code / "staged.py").write_text("staged\n")
    git("add", str(code / "staged.py"))
    for setting in "diff.noprefix=true", "diff.external=false", "color.ui=always", "core.trustctime=false":
        git("config", *setting.split("="))
    (repository / "top.py").write_text("after\n")
    (code / "model.py").write_text("import my_attention\n")
    (code / "table.npy").write_bytes(bytes(range(255, -1, -1)))
    for path in code / "table.npy", repository / ".git" / "index":  # of the same size, changed as git looked at it
        os.utime(path, (1e9, 1e9))
    (code / "gone.py").unlink()
    (code / "deep" / "er").mkdir(parents=True)
    for name in "my_attention.py", "deep/er/x.py", "caf\xe9", "two\nlines", "*", ":(top)x", "my file", b"\xe9":
        Path(os.fsdecode(os.fsencode(code) + b"/" + os.fsencode(name))).write_bytes(os.fsencode(name))
    (code / "empty.py").touch()
    (code / "run.sh").touch(0o755)
    (code / "weights.npy").write_bytes(os.urandom(10_000))
    (code / "link").symlink_to("model.py")
    expected, index = files(repository), (repository / ".git" / "index").read_bytes()
    for name, n_bytes in ("ignored", 10), ("large.bin", 2**20 + 1), ("source-00000002.diff", 10):
        (code / name).write_bytes(os.urandom(n_bytes))
    git("init", "-q", "nested", cwd=code)
    (code / "experiments" / "run").mkdir(parents=True)
    (code / "experiments" / "run" / "config.json").write_text("{}")  # of an earlier run, which is no code

    monkeypatch.setattr(rundir, "__file__", str(code / "rundir.py"))
    source = rundir.source_diff(code / "experiments")
    assert source.startswith(git("rev-parse", "HEAD") + b"# 2 untracked, not below: ['large.bin', 'nested/']\n")
    assert (repository / ".git" / "index").read_bytes() == index
    assert {path.name for path in tmp_path.iterdir()} == {"repository", "clean"}
    (tmp_path / "source.diff").write_bytes(source)
    git("apply", str(tmp_path / "source.diff"), cwd=clean)
    assert files(clean) == expected
    for out_dir in (code, code / "deep", tmp_path, tmp_path / "elsewhere"):
        assert (b"b/" + os.fsencode(code.relative_to(repository) / "model.py") in rundir.source_diff(out_dir))
        assert (b"deep/er/x.py" in rundir.source_diff(out_dir)) == (out_dir != code / "deep")


def test_log_writes_json_whatever_the_numbers_are(tmp_path):
    run = rundir.RunDir(tmp_path / "run")
    run.open()
    assert run.open_metrics(0) == 0.0
    run.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "mfu": None, "tokens": 7})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "step": 1, "loss": None, "grad_norm": None, "lr": None, "mfu": None, "tokens": 7}


# -----------------------------------------------------------------------------
# evaluation


@pytest.fixture(scope="module")
def gpt2_runs(tmp_path_factory):
    """A data set of GPT-2 tokens: 5 validation windows and 11 tokens more; <|endoftext|> is among the targets."""
    directory = tmp_path_factory.mktemp("gpt2")
    small.make_data(directory / "data", n_train=40 * T, n_val=5 * T + 12, tokenizer="gpt2", vocab_size=50257)
    path = directory / "data" / "val_000000.bin"
    tokens = read_tokens(path)
    tokens[[0, 40, 41, 100]] = 50256
    write_shard(path, tokens)
    (directory / "data" / "manifest.json").unlink()  # built again
    return small.Runs(directory)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize(("val_tokens", "n_windows"), [(3 * T, 3), (3 * T + 31, 3), (10**9, 5)])
def test_evaluation_by_hand(gpt2_runs, capsys, batch_size, val_tokens, n_windows):
    """val_loss is the mean over the first windows, however they are batched; bits per byte counts bytes of text."""
    name = f"{batch_size}-{val_tokens}"
    assert gpt2_runs(run_name=name, batch_size=batch_size, val_tokens=val_tokens, vocab_size=50304, max_steps=2,
                     val_every=5, save_every=5) == 0
    run = gpt2_runs.out_dir / name
    out = capsys.readouterr().out
    assert f"first {n_windows * T:,} of " in out and ("more than there are" in out) == (val_tokens > n_windows * T + T)
    tokens = read_tokens(gpt2_runs.data / "val_000000.bin")
    inputs, targets = batch(tokens, range(n_windows))
    with torch.no_grad():
        logits = checkpoint.load_model(run / "step-00000002")(inputs)[0]
    nats = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="none")
    n_bytes = sum(len(gpt2().decode_single_token_bytes(t)) for t in targets.flatten().tolist() if t != 50256)
    assert (targets == 50256).sum() == 2 + (n_windows > 3)
    row = metrics(run)[-1]
    assert row["val_loss"] == pytest.approx(nats.mean().item(), rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(nats.sum().item() / math.log(2) / n_bytes, rel=1e-6)


def test_evaluation_keeps_one_batch_of_activations(runs, monkeypatch):
    """A loss that is alive holds all that its backward needs: on a GPU two of them were twice the peak of a step."""
    losses, run = [], GPT.run

    def watched(model, *inputs):
        assert all(loss() is None for loss in losses)
        _, loss = run(model, *inputs)
        losses.append(weakref.ref(loss))
        return _, loss

    monkeypatch.setattr(GPT, "run", watched)
    assert runs(max_steps=2, val_every=1, val_tokens=8 * T, batch_size=2) == 0
    assert len(losses) == 1 + 2 * (2 + 4)  # rehearsal; micro-steps and evaluation of each step


# -----------------------------------------------------------------------------
# bad data, and places that cannot be written: known before a model is built


@pytest.fixture
def no_model(monkeypatch):
    """Building a model with real weights is a failure; on `meta`, for the plan, it is not."""
    original = GPT.init_weights

    def init_weights(self, seed):
        assert self.lm_head.weight.is_meta, "a model was built"
        return original(self, seed)

    monkeypatch.setattr(GPT, "init_weights", init_weights)


def patch_bytes(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


BAD_DATA = {
    "missing": (lambda d: d.rename(d.with_name("moved")), {}, ["no such data directory"]),
    "empty": (lambda d: [path.unlink() for path in d.iterdir()], {}, ["no train shards"]),
    "only a manifest": (lambda d: [path.unlink() for path in d.glob("*.bin")], {}, ["no train shards"]),
    "no validation shards": (lambda d: (d / "val_000000.bin").unlink(), {}, ["no val shards"]),
    "wrong magic": (lambda d: patch_bytes(d / "val_000000.bin", 0, b"\1"), {}, ["val_000000.bin", "magic", "20240520"]),
    "cut off": (lambda d: os.truncate(d / "train_000000.bin", 2000), {}, ["train_000000.bin", "2000 bytes", "1200"]),
    "not the tokens of the manifest": (
        lambda d: patch_bytes(d / "train_000000.bin", 1024, b"\7\0"), {}, ["train_000000.bin", "sha256"]),
    "broken manifest": (lambda d: (d / "manifest.json").write_text("{"), {}, ["manifest.json"]),
    "ids too large for the model": (lambda d: None, {"vocab_size": 400}, ["token id", "model", "400"]),
    "no validation window": (lambda d: None, {"sequence_length": 512, "total_batch_tokens": 512, "val_tokens": 512},
                             ["val_000000.bin", "300 tokens", "--sequence_length 299"]),
    "no training window": (lambda d: None, {"sequence_length": 1200, "total_batch_tokens": 1200, "val_tokens": 1200},
                           ["train_000000.bin", "1200 tokens", "--sequence_length 1199"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(runs, capsys, no_model, name):
    damage, changes, expected = BAD_DATA[name]
    damage(runs.data)
    assert runs(**changes) == 7
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [word for word in expected if word not in err] == []
    assert not runs.out_dir.exists()


def test_data_that_is_cut_off_during_the_run_ends_it_in_good_order(runs, capsys, monkeypatch):
    original = rundir.RunDir.log

    def log(self, row):
        original(self, row)
        if row["step"] == 3:
            os.truncate(runs.data / "train_000000.bin", 1024)

    monkeypatch.setattr(rundir.RunDir, "log", log)
    assert runs(max_steps=12, save_every=2) == 7
    assert "train_000000.bin" in capsys.readouterr().err and status(runs.path)["code"] == 7
    assert checkpoint.find_fault(checkpoint.list_checkpoints(runs.path)[0]) is None


def test_verify_data_finds_what_size_and_time_do_not_show(runs):
    assert runs(run_name="before") == 0
    path = runs.data / "train_000000.bin"
    times = path.stat()
    patch_bytes(path, 1024, bytes([read_tokens(path)[0] % 256 ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert runs(run_name="trusting") == 0
    assert runs(run_name="verifying", verify_data=True) == 7


def test_a_file_in_the_way(runs, capsys, no_model):
    for out_dir in (runs.directory / "file", runs.directory / "file" / "below"):
        (runs.directory / "file").write_text("mine")
        assert runs(out_dir=out_dir) == 5
        assert str(runs.directory / "file") in capsys.readouterr().err
    runs.out_dir.mkdir()
    runs.path.write_text("mine")  # in place of the run directory
    assert runs() == 5
    assert runs.path.read_text() == (runs.directory / "file").read_text() == "mine"


def test_no_permission(runs, capsys, no_model, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode, **options: mode != os.W_OK)
    assert runs() == 5
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(runs.directory) in err
    assert not runs.out_dir.exists()


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read only", "nothing allowed"])
def test_no_permission_for_a_user_without_rights(runs, capsys, no_model, mode):
    """Really: as root the test takes the identity of `nobody` for as long as main runs."""
    place = Path(tempfile.mkdtemp())  # pytest's own directories are closed to nobody
    place.chmod(mode)
    is_root = os.getuid() == 0
    try:
        if is_root:
            os.setresuid(65534, 65534, 0)
        code = runs(out_dir=place / "runs")
    finally:
        if is_root:
            os.setresuid(0, 0, 0)
        place.chmod(0o700)
        place.rmdir()  # empty
    err = capsys.readouterr().err
    assert code == 5 and "Traceback" not in err and str(place) in err


def test_a_read_only_file_system(runs, no_model):
    place = runs.directory / "mounted"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(place)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        assert runs(out_dir=place / "runs") == 5
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_metrics_that_cannot_be_written_end_the_run(runs, capsys, monkeypatch):
    class Full:
        def seek(self, place):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = rundir.RunDir.open_metrics

    def open_metrics(self, step):
        time_s = original(self, step)
        self.metrics = Full()
        return time_s

    monkeypatch.setattr(rundir.RunDir, "open_metrics", open_metrics)
    assert runs() == 5
    err = capsys.readouterr().err
    assert f"cannot write to {runs.path}: No space left on device" in err and "Traceback" not in err


def test_run_directory_in_use(runs, capsys, no_model):
    runs.path.mkdir(parents=True)
    with open(runs.path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = tree(runs.path)
        assert runs() == 3
        err = capsys.readouterr().err
        assert str(runs.path) in err and err.startswith("error: ") and err.count("\n") == 1
        assert tree(runs.path) == before


def test_the_lock_is_free_after_a_run_and_held_during_it(runs, monkeypatch):
    seen = []
    original = rundir.RunDir.log

    def log(self, row):
        original(self, row)
        if row["step"] == 2:
            seen.append(runs())

    monkeypatch.setattr(rundir.RunDir, "log", log)
    assert runs() == 0 and seen == [3]
    with open(runs.path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -----------------------------------------------------------------------------
# signals


def signal_at(monkeypatch, step, *numbers):
    """Sends the signals to this process when this step has been logged."""
    original = rundir.RunDir.log

    def log(self, row):
        original(self, row)
        if row["step"] == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(rundir.RunDir, "log", log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("save_every", [100, 2])
def test_a_signal_stops_after_a_step_and_the_same_line_continues(runs, capsys, number, save_every):
    options = {"max_steps": 9, "save_every": save_every, "val_every": 4}
    assert runs(run_name="whole", **options) == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        signal_at(monkeypatch, 2, number)
        assert runs(**options) == 75
    name, step = signal.Signals(number).name, 2 if save_every == 2 else 3  # 2 is about to be saved anyway
    assert status(runs.path) == {"reason": name, "step": step, "code": 75}
    assert steps(runs.path)[-1] == len(metrics(runs.path)) == step
    assert checkpoint.find_fault(checkpoint.list_checkpoints(runs.path)[0]) is None
    assert f"{name}: stopped after step {step}; the same command continues" in capsys.readouterr().out
    assert runs(**options) == 0
    assert status(runs.path) == {"reason": "finished", "step": 9, "code": 0}
    assert_same_result(runs.path, runs.out_dir / "whole")


def test_without_checkpoints_a_stopped_run_does_not_say_that_it_continues(runs, capsys, monkeypatch):
    signal_at(monkeypatch, 2, signal.SIGTERM)
    assert runs(max_steps=9, save_every=0) == 75
    assert steps(runs.path) == []
    assert "continues" not in capsys.readouterr().out


def test_a_signal_in_the_last_step_finds_the_run_finished(runs, monkeypatch):
    signal_at(monkeypatch, 6, signal.SIGTERM)
    assert runs(save_every=4) == 0
    assert status(runs.path)["reason"] == "finished" and steps(runs.path) == [4, 6]


def test_a_second_ctrl_c_ends_at_once(runs, monkeypatch):
    class Exit(BaseException):
        pass

    def leave(code):
        raise Exit(code)

    monkeypatch.setattr(os, "_exit", leave)
    for first in signal.SIGINT, signal.SIGTERM:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, 2, first, signal.SIGINT)
            with pytest.raises(Exit, match="130"):
                runs(run_name=first.name)
    signal_at(monkeypatch, 2, signal.SIGTERM, signal.SIGTERM)  # which stays patient
    assert runs() == 75


def test_a_signal_before_the_first_step_waits_for_it(runs, monkeypatch):
    open_dataset = loader.open_dataset

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return open_dataset(*arguments, **options)

    monkeypatch.setattr(loader, "open_dataset", interrupted)
    assert runs(save_every=6) == 75
    assert steps(runs.path) == [1] and status(runs.path)["code"] == 75


def test_mfu_is_the_stated_formula(runs, monkeypatch):
    """(6 N + 12 C T per layer) x tokens/s / peak, for the dense bf16 peak of the device."""
    monkeypatch.setattr(train_gpt2.machine, "peak_flops", lambda name: 1e12)
    assert runs(dtype="bfloat16", max_steps=2) == 0
    n_params = 2 * 12 * 64 * 64 + VOCAB * 64
    for row in metrics(runs.path):
        assert row["mfu"] == pytest.approx((6 * n_params + 2 * 12 * 64 * T) * row["tokens_per_s"] / 1e12)
        assert row["tokens_per_s"] == pytest.approx(128 / row["step_ms"] * 1000)


@pytest.mark.parametrize("gib, batch_size", [(6, 8), (8, 16), (12, 32), (16, 32), (24, 64), (80, 64)])
def test_the_micro_batch_of_default_follows_the_memory_of_the_gpu(monkeypatch, gib, batch_size):
    monkeypatch.setattr(train_gpt2.machine, "total_mib", lambda device: gib * 1024)
    monkeypatch.setattr(GPT, "choose_kernels", lambda *arguments: (None, None, "fused"))  # the real one asks the GPU
    config = replace(train_gpt2.recipe("default"), dtype="bfloat16")
    *plan, = train_gpt2.plan(config, train_gpt2.variant("d12"), torch.device("cuda"))
    assert plan == [replace(config, kernels="fused"), batch_size, 64 // batch_size]


@pytest.mark.parametrize("gib, warned", [(24, True), (80, False)])
def test_a_model_that_cannot_fit_is_said(gib, warned, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt2.machine, "total_mib", lambda device: gib * 1024)
    monkeypatch.setattr(GPT, "choose_kernels", lambda *arguments: (None, None, "fused"))  # the real one asks the GPU
    config = replace(train_gpt2.recipe("default"), dtype="bfloat16")
    batch_size = train_gpt2.plan(config, train_gpt2.variant("d48"), torch.device("cuda"))[1]
    warning = "warning: not even one sequence at a time is predicted to fit: --recompute_gelu is predicted to save"
    assert (warning in capsys.readouterr().out) == warned == (batch_size == 1)


def test_the_micro_batch_follows_the_kernels(monkeypatch):
    """In float32 the loss is the plain one: whole logits, and half the room."""
    monkeypatch.setattr(train_gpt2.machine, "total_mib", lambda device: 40 * 1024)
    monkeypatch.setattr("model.sdpa_choice", lambda *arguments, **options: None)
    config = replace(train_gpt2.recipe("default"), dtype="float32")
    planned, batch_size, _ = train_gpt2.plan(config, train_gpt2.variant("d12"), torch.device("cuda"))
    assert (planned.kernels, batch_size) == ("plain", 32)


def test_memory_advice():
    config, d12 = replace(train_gpt2.recipe("default"), kernels="fused"), train_gpt2.variant("d12")
    assert memory_advice(config, d12, 64, 1) == (
        "--batch_size 32 is predicted to save 7,710 MiB, --recompute_gelu 5,001 MiB")
    assert memory_advice(config, d12, 1, 64) == "--recompute_gelu is predicted to save 72 MiB"
    for other in (replace(config, recompute_gelu=True), replace(config, kernels="plain"),
                  replace(config, kernels=None)):  # no GPU
        assert "--recompute" not in memory_advice(other, d12, 64, 1)


def test_how_a_run_is_computed_reaches_the_model(runs, monkeypatch):
    asked, init = [], GPT.__init__

    def watched(self, config, window_backend=None, kernels=None, recompute_gelu=False, seed=0):
        init(self, config, window_backend, kernels, seed=seed)
        asked.append((window_backend, kernels, recompute_gelu, seed))

    monkeypatch.setattr(GPT, "__init__", watched)
    assert runs(recompute_gelu=True, kernels="plain", window_size=8, window_backend="blocked", seed=3, max_steps=1,
                warmup_steps=0) == 0
    assert asked == [("blocked", "plain", True, 0), ("blocked", "plain", True, 3)]  # for the plan, and the model


def test_recompute_gelu_without_fused_kernels(runs, capsys):
    assert runs(recompute_gelu=True) == 2
    assert capsys.readouterr().err == (
        "error: recompute_gelu needs mlp_activation=gelu and kernels=fused (CUDA, bfloat16)\n")


def test_auto_compiles_on_cuda():
    assert compiles("auto", torch.device("cuda")) and not compiles("auto", torch.device("cpu"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, torch.AcceleratorError])
def test_out_of_memory_is_one_line(error, runs, monkeypatch, capsys):
    def fail(*arguments):
        raise error("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(GPT, "run", fail)
    assert runs(batch_size=4, total_batch_tokens=8 * T, vocab_size=50304) == 1
    err = capsys.readouterr().err
    assert re.search(r"^error: out of memory: --batch_size 2 is predicted to save \d+ MiB \(CUDA out of memory\.\)$",
                     err, re.MULTILINE) and "Traceback" not in err
    for name, options in ("one", {"batch_size": 1}), ("gradients", {"batch_size": 4}):  # which two micro-steps keep
        assert runs(run_name=name, **options) == 1
        assert "no option saves anything, a smaller --model" in capsys.readouterr().err


def test_no_place_for_shakespeare(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs.directory)
    (runs.directory / "data").rename(runs.directory / "elsewhere")
    (runs.directory / "data").write_text("in the way")
    assert runs(data="shakespeare", vocab_size=50304) == 5
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_does_not_end_a_run(runs):
    process = runs.start(val_every=1, save_every=6)
    process.stdout.close()
    assert process.wait() == 0
    assert status(runs.path)["reason"] == "finished" and steps(runs.path) == [6]


@pytest.mark.parametrize("nohup", [False, True])
def test_a_lost_terminal_stops_like_sigterm(runs, monkeypatch, nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    signal_at(monkeypatch, 3, signal.SIGHUP)
    code = runs(save_every=6)
    signal.signal(signal.SIGHUP, before)
    if nohup:
        assert code == 0 and steps(runs.path) == [6]
        return
    assert code == 75
    assert status(runs.path)["reason"] == "SIGHUP" and steps(runs.path) == [4]


LONG = {"max_steps": 100_000, "val_every": 10, "save_every": 7}


def continues_like_the_whole(runs, step):
    """Goes on from `step` in this process, and compares with a run that was never interrupted."""
    assert runs(**LONG, stop_after=step + 3) == 0
    assert runs(**LONG, stop_after=step + 3, run_name="whole") == 0
    assert_same_result(runs.path, runs.out_dir / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_to_a_process(runs, number):
    process = runs.start(**LONG)
    wait_for(process, "step 20: val loss")
    process.send_signal(number)
    assert process.wait() == 75
    step = status(runs.path)["step"]
    assert status(runs.path) == {"reason": number.name, "step": step, "code": 75} and step >= 20
    assert steps(runs.path)[-1] == len(metrics(runs.path)) == step
    continues_like_the_whole(runs, step)


def test_killed_process(runs):
    """SIGKILL at any moment: the lock is free, and the same line goes on as if nothing had happened."""
    process = runs.start(**LONG)
    wait_for(process, "step 20: val loss")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    continues_like_the_whole(runs, len(metrics(runs.path)))


def test_two_ctrl_c_to_a_process(runs):
    process = runs.start(total_batch_tokens=T * 2**15, batch_size=1, max_steps=2)  # a step of minutes
    wait_for(process, "attention kernels")
    process.send_signal(signal.SIGINT)
    with open(runs.directory / "stderr") as stderr:
        while "SIGINT: stopping after the step in hand" not in stderr.read():
            assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130


def test_exit_codes_of_the_process(runs):
    (runs.data / "val_000000.bin").unlink()
    process = runs.start()
    assert process.wait() == 7
    assert (runs.directory / "stderr").read_text().startswith("error: ")


# -----------------------------------------------------------------------------
# not finite


def run_with_loss(monkeypatch, change, from_call):
    """GPT.run whose loss goes through `change` from this call on; the first call is the rehearsal."""
    original, calls = GPT.run, [0]

    def run(self, *arguments):
        calls[0] += 1
        logits, loss = original(self, *arguments)
        return logits, change(loss) if calls[0] >= from_call else loss

    monkeypatch.setattr(GPT, "run", run)


def infinite_gradient(loss):
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss * 1


@pytest.mark.parametrize("change", [lambda loss: loss * math.nan, lambda loss: loss + math.inf, infinite_gradient],
                         ids=["nan", "inf", "gradient"])
@pytest.mark.parametrize("grad_clip", [1.0, 0.0])
def test_not_finite(runs, capsys, change, grad_clip):
    options = {"save_every": 1, "keep_last": 9, "grad_clip": grad_clip}
    assert runs(run_name="whole", **options) == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_with_loss(monkeypatch, change, from_call=1 + 3)
        assert runs(**options) == 6
    assert steps(runs.path) == [1, 2] and len(metrics(runs.path)) == 2
    reason = status(runs.path).pop("reason")
    assert status(runs.path) == {"reason": reason, "step": 2, "code": 6} and reason.startswith("step 3: loss ")
    err = capsys.readouterr().err
    assert f"error: {reason}\n" in err and "Traceback" not in err
    assert runs(**options) == 0  # what was saved before is sound
    assert_same_result(runs.path, runs.out_dir / "whole")


@pytest.mark.parametrize("optimizer", small.OPTIMIZERS)
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_not_finite_leaves_everything_as_it_was(factor, optimizer):
    """And so do the updates that follow before a host sees it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    model = torch.nn.ModuleDict({"transformer": torch.nn.ModuleDict({"h": torch.nn.ModuleList([layer])})})
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))

    def step(factor):
        loss = layer(torch.ones(3)).square().sum() * factor
        loss.backward()
        return update(model, optimizers, loss.detach(), 1.0).tolist()

    def everything():
        return [x.clone() for part in checkpoint.named_tensors(model, optimizers) for x in part.values()]

    assert all(math.isfinite(value) for value in step(1.0))
    before = everything()
    for later in factor, 1.0:
        assert all(math.isfinite(value) for value in step(later)) == (later == 1.0)
        assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
        assert all(weight.grad is None for weight in layer.parameters())


@pytest.mark.parametrize("options", [{"save_every": 99}, {"save_every": 2, "val_every": 3},
                                     {"save_every": 99, "stop_after": 4}])
def test_one_step_behind_is_the_same_run(runs, monkeypatch, options):
    """As on a GPU: a step is logged when the next one has been launched, or when something is due."""
    assert runs(run_name="at once", max_steps=8, **options) == 0
    monkeypatch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)
    assert runs(run_name="behind", max_steps=8, **options) == 0
    assert_same_result(runs.out_dir / "behind", runs.out_dir / "at once")


def test_not_finite_one_step_behind(runs, monkeypatch, capsys):
    """The next step has been launched; nothing of it is logged or saved."""
    monkeypatch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)
    run_with_loss(monkeypatch, lambda loss: loss * math.nan, from_call=1 + 3)
    assert runs(save_every=2, val_every=0, max_steps=9) == 6
    assert steps(runs.path) == [2] and len(metrics(runs.path)) == 2
    assert status(runs.path)["reason"].startswith("step 3: loss nan")


# -----------------------------------------------------------------------------
# Weights & Biases, which must never matter


class FakeRun:
    def __init__(self):
        self.rows, self.finished = [], False

    def log(self, row, step):
        assert row["step"] == step
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module `wandb` that can be made to fail: its run, and the options that init got."""
    module = types.ModuleType("wandb")
    module.run, module.options = FakeRun(), {}

    def init(**options):
        module.options |= options
        return module.run

    module.init, module.login = init, lambda **options: False
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_wandb_mirrors_every_row(runs, wandb):
    assert runs(wandb=True, val_every=2) == 0
    assert wandb.run.rows == metrics(runs.path) and wandb.run.finished
    assert wandb.options["name"] == "run" and wandb.options["config"]["settings"]["learning_rate"] == 1e-2


@pytest.mark.parametrize(("key", "variable", "mode"), [
    (False, None, "offline"), (True, None, "online"), (True, "offline", "offline"), (False, "disabled", "disabled")])
def test_wandb_mode(runs, wandb, monkeypatch, key, variable, mode):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setattr(wandb, "login", lambda **options: key)
    assert runs(wandb=True, max_steps=2) == 0
    assert wandb.options["mode"] == mode


def test_wandb_is_not_asked_unless_wanted(runs, monkeypatch):
    monkeypatch.setattr(rundir, "WandbMirror", None)
    assert runs() == 0


def fail(*arguments, **options):
    raise RuntimeError("no route to host")


@pytest.mark.parametrize("broken", ["missing", "login", "init", "log", "finish"])
def test_wandb_that_fails(runs, wandb, monkeypatch, capsys, broken):
    assert runs(run_name="without", save_every=6) == 0
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setattr(wandb if broken in ("login", "init") else wandb.run, broken, fail)
    assert runs(wandb=True, save_every=6) == 0
    assert_same_result(runs.path, runs.out_dir / "without")
    err = capsys.readouterr().err
    assert err.count("wandb: ") == 1 and "Traceback" not in err
    assert broken == "missing" or "no route to host" in err


@pytest.mark.parametrize("stuck", ["login", "init", "log", "finish"])
def test_wandb_that_never_answers(runs, wandb, monkeypatch, capsys, stuck):
    assert runs(run_name="without", save_every=6) == 0
    never = threading.Event()
    monkeypatch.setattr(wandb if stuck in ("login", "init") else wandb.run, stuck, lambda *a, **options: never.wait())
    join, asked = threading.Thread.join, []

    def join_at_once(self, timeout=None):
        if not self.daemon:  # not wandb's
            return join(self, timeout)
        asked.append(timeout)
        join(self, timeout=0.01)

    monkeypatch.setattr(threading.Thread, "join", join_at_once)
    try:
        assert runs(wandb=True, save_every=6) == 0
        assert 10 in asked and None not in asked
    finally:
        never.set()
    assert_same_result(runs.path, runs.out_dir / "without")
    assert "wandb: not finished" in capsys.readouterr().err


def test_wandb_that_is_slow_cannot_fill_the_memory(wandb, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(wandb, "login", lambda **options: never.wait())
    mirror = rundir.WandbMirror(name="run")
    for step in range(10_100):
        mirror.log({"step": step})
    assert mirror.rows.qsize() == 10_000
    never.set()


# -----------------------------------------------------------------------------
# several processes: torchrun and gloo on the CPU


def torchrun(runs, n_processes, **changes):
    return runs.start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes), **changes)


def test_one_two_and_four_processes_are_one_run(runs):
    """2 processes to step 2, 4 to step 4, 1 to the end, each from the checkpoint of the others."""
    options = {"batch_size": 1, "learning_rate": 1e-3, "val_every": 1, "save_every": 100,
               "val_tokens": 3 * T}  # 3 windows: one process has none to evaluate, or one less
    assert runs(run_name="whole", **options) == 0
    for n_processes, stop_after in (2, 2), (4, 4):
        process = torchrun(runs, n_processes, **options, stop_after=stop_after)
        out = process.stdout.read()
        assert process.wait() == 0, (runs.directory / "stderr").read_text()
        assert f"{n_processes} processes x {4 // n_processes} micro-steps x 1 sequences" in out
        assert out.count("attention kernels") == 1 and out.count("val loss") == 2  # one process speaks
        assert steps(runs.path)[-1] == len(metrics(runs.path)) == stop_after
        assert status(runs.path) == {"reason": "stop_after", "step": stop_after, "code": 0}
    assert runs(**options) == 0
    close_to(runs.path, runs.out_dir / "whole")
    assert_close(runs.path / "step-00000006", runs.out_dir / "whole" / "step-00000006")


def worker(launcher, rank):
    """Process id of this rank among the children of torchrun."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    variable = f"RANK={rank}".encode()
    return next(int(pid) for pid in children if variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


@pytest.mark.parametrize("receiver", ["torchrun", "one worker"])
def test_signal_to_torchrun(runs, receiver):
    """All processes stop after the same step, even if the signal reaches only the one that does not save."""
    process = torchrun(runs, 2, **LONG)
    wait_for(process, "step 20: val loss")
    os.kill(process.pid if receiver == "torchrun" else worker(process, 1), signal.SIGTERM)
    assert process.wait() != 0
    step = status(runs.path)["step"]
    assert status(runs.path) == {"reason": "SIGTERM", "step": step, "code": 75}
    assert steps(runs.path)[-1] == len(metrics(runs.path)) == step
    assert checkpoint.find_fault(checkpoint.list_checkpoints(runs.path)[0]) is None
    assert runs(**LONG, stop_after=step + 2) == 0
    assert len(metrics(runs.path)) == step + 2


# -----------------------------------------------------------------------------
# slow paths


def test_a_compiler_that_is_switched_off_stops_the_run(runs, capfd):
    with torch._dynamo.config.patch(disable=True):
        assert runs(compile="on") == 2
    error = capfd.readouterr().err
    assert "error: GPT.embed would run uncompiled" in error and "TORCH_COMPILE_DISABLE" in error
    assert "Traceback" not in error
    assert status(runs.path)["code"] == 2


def test_another_attention_kernel_than_the_one_meant_stops_a_run_on_a_gpu(runs, capfd, monkeypatch):
    """Made up on the CPU: what the profiler saw is not what kernels/attention.py chose."""
    monkeypatch.setattr(train_gpt2, "KERNEL_NAMES", {"blocked": "flex_attention"})
    assert runs(model="tiny_post_norm_qk_norm_window32") == 2
    assert "error: attention ran in fused SDPA for CPU, not in flex_attention" in capfd.readouterr().err


class Meaned(SlidingWindowAttention):
    def attend(self, q, k, v):
        return v.cumsum(2) / torch.arange(1, v.size(2) + 1)[:, None]


def test_an_attention_of_ones_own_may_run_in_any_kernel(runs, monkeypatch):
    monkeypatch.setattr(train_gpt2, "KERNEL_NAMES", {"blocked": "flex_attention"})
    monkeypatch.setattr("model.attention_class", lambda config, layer: Meaned)
    assert runs(model="tiny_post_norm_qk_norm_window32", max_steps=2) == 0


# -----------------------------------------------------------------------------
# edits of the model and the optimizer


class WithMore(GPT):
    """An edit that has a matrix and does not use it."""

    def __init__(self, config, *arguments):
        super().__init__(config, *arguments)
        self.forgotten = Linear(4, 4)


def test_a_weight_that_no_gradient_reaches_is_named(runs, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt2, "GPT", WithMore)
    assert runs(max_steps=2) == 2
    assert "error: no gradient reaches forgotten.weight: " in capsys.readouterr().err


def test_a_buffer_is_named(runs, monkeypatch, capsys):
    init_weights = GPT.init_weights
    monkeypatch.setattr(GPT, "init_weights", lambda gpt, seed: (
        init_weights(gpt, seed), gpt.register_buffer("mean", torch.zeros(3))))
    assert runs(max_steps=2) == 2
    assert "error: a checkpoint has weights alone, not the buffers mean" in capsys.readouterr().err


def test_a_window_that_attention_class_overlooks_is_refused(runs, monkeypatch, capsys):
    monkeypatch.setattr("model.attention_class", lambda config, layer: CausalSelfAttention)
    assert runs(model="tiny_post_norm_qk_norm_window32") == 2
    assert "error: attention_class gives a windowed layer another attention" in capsys.readouterr().err


def test_state_that_the_optimizer_module_does_not_name_is_not_left_out(runs, monkeypatch, capsys):
    monkeypatch.setitem(checkpoint.STATE, "AdamW", ("step", "exp_avg"))
    assert runs(max_steps=2, save_every=2) == 2
    assert "AdamW keeps exp_avg, exp_avg_sq, step, of which optim.STATE says step, exp_avg" in capsys.readouterr().err


def test_an_optimizer_that_nothing_is_known_of_ends_before_the_first_step(runs, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt2, "make_optimizers", lambda model, *_: [torch.optim.NAdam(model.parameters())])
    assert runs(max_steps=2) == 1
    assert "KeyError: 'NAdam'" in capsys.readouterr().err and not (runs.path / "metrics.jsonl").exists()


# -----------------------------------------------------------------------------
# on a GPU

ON_GPU = {"device": "cuda", "sequence_length": 256, "total_batch_tokens": 2048, "max_steps": 12, "val_tokens": 256,
          "val_every": 5, "save_every": 100}


def kernels(out):
    return re.search(r"^attention kernels: (.*)$", out, flags=re.MULTILINE)[1]


@pytest.mark.gpu
def test_gpu_run_and_resume(runs, capsys, fresh_compiler):
    """Compiled, in bfloat16."""
    assert runs(run_name="whole", **ON_GPU) == 0
    assert "none" not in kernels(capsys.readouterr().out)
    rows = metrics(runs.out_dir / "whole")
    assert all(row["peak_mib"] > 1 for row in rows) and all(0 < row["mfu"] < 1 for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(VOCAB), abs=0.15) and rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert runs(**ON_GPU, stop_after=6) == 0
    assert runs(**ON_GPU) == 0
    resumed, whole = losses(runs.path), losses(runs.out_dir / "whole")
    assert resumed[:8] == pytest.approx(whole[:8], rel=1e-3)
    assert resumed == pytest.approx(whole, rel=1e-2)  # sums in any order, as on a GPU, drift apart


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", small.OPTIMIZERS)
def test_gpu_not_finite(runs, optimizer, monkeypatch, fresh_compiler):
    """Kept from the weights on the device, said when the host gets to know, one step later; nothing of it is saved."""
    calls, update = [], train_gpt2.update

    def poisoned(model, *more):
        calls.append(model)
        if len(calls) == 5:
            model.transformer.h[0].mlp.c_fc.weight.grad[0, 0] = math.nan
        return update(model, *more)

    options = ON_GPU | {"optimizer": optimizer, "save_every": 2}
    monkeypatch.setattr(train_gpt2, "update", poisoned)
    assert runs(**options) == 6
    said = status(runs.path)
    assert said["code"] == 6 and said["step"] == len(metrics(runs.path)) == 4 and said["reason"].startswith("step 5: ")
    assert steps(runs.path) == [2, 4]
    monkeypatch.undo()
    assert runs(**options) == 0
    assert len(metrics(runs.path)) == ON_GPU["max_steps"]
    assert all(math.isfinite(loss) for loss in losses(runs.path))
    assert all(x.isfinite().all() for x in small.tensors(runs.path / "step-00000012").values())


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["d12_qk_norm", "d12_post_norm_qk_norm_window256"])
def test_gpu_deterministic(runs, model, tmp_path, monkeypatch):
    """The same bits twice and after a resume, each run in a process of its own that compiles anew."""
    shutil.rmtree(runs.data)
    make_data(runs.data, n_train=99_000, n_val=9_000)
    options = ON_GPU | {"model": model, "n_layer": 2, "sequence_length": 512, "total_batch_tokens": 8192,
                        "deterministic": True, "val_tokens": 1024, "save_every": 4}

    def run(name, **more):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"cache {name} {len(more)}"))
        process = runs.start(run_name=name, **options, **more)
        assert process.wait() == 0, (runs.directory / "stderr").read_text()[-2000:]
        return runs.out_dir / name

    first, second = run("first"), run("second")
    assert_same_result(second, first)
    run("resumed", stop_after=4)
    assert_same_result(run("resumed"), first)


@pytest.mark.gpu
def test_gpu_is_close_to_cpu(runs, fresh_compiler):
    exact = {"dtype": "float32", "max_steps": 4}
    assert runs(run_name="gpu", **ON_GPU | exact) == 0
    assert runs(run_name="cpu", **ON_GPU | exact | {"device": "cpu", "recipe": "default"}) == 0
    assert losses(runs.out_dir / "gpu") == pytest.approx(losses(runs.out_dir / "cpu"), rel=1e-3)


@pytest.mark.gpu
def test_gpu_window_runs_in_the_fused_kernel(runs, capsys, fresh_compiler):
    assert runs(**ON_GPU | {"model": "tiny_post_norm_qk_norm_window32"}) == 0
    out = capsys.readouterr().out
    assert kernels(out) == "flex_attention"
    assert re.search(r"^block mask T=256 W=32: \+\d+\.\d\d MiB, \d+ ms$", out, flags=re.MULTILINE)
    assert losses(runs.path)[-1] < losses(runs.path)[0] - 0.1


@pytest.mark.gpu
def test_gpu_memory_is_as_predicted(runs, fresh_compiler):
    model, tokens, others_mib = "d12_post_norm_qk_norm", 8 * 1024, torch.cuda.memory_allocated() / MIB
    small.make_data(runs.directory / "long", n_train=10 * tokens + 1, n_val=2000)
    assert runs(data=runs.directory / "long", device="cuda", model=model, vocab_size=50304, sequence_length=1024,
                total_batch_tokens=tokens, batch_size=8, max_steps=3, learning_rate=1e-4, val_tokens=1024) == 0
    with torch.device("meta"):
        predicted_mib = training_need(train_gpt2.VARIANTS[model], None, 8, 1024, 1) / MIB
    assert metrics(runs.path)[-1]["peak_mib"] - others_mib == pytest.approx(predicted_mib, rel=0.05)


# -----------------------------------------------------------------------------
# signals in the last evaluation, and while a save is in hand

EVALUATED = {"max_steps": 6, "val_every": 3, "save_every": 4, "val_tokens": 8 * T, "batch_size": 2}


def interrupt_evaluation(monkeypatch, number):
    """SIGTERM when the evaluation of this number begins, counted from 1."""
    original, calls = train_gpt2.evaluate, []

    def evaluate(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    return calls


@pytest.mark.parametrize("stop_after", [None, 3])
@pytest.mark.parametrize("end", ["as it was", "again", "killed"])
def test_the_last_evaluation_is_cut_short_and_made_up_for(runs, monkeypatch, stop_after, end):
    options = EVALUATED | {"stop_after": stop_after}
    last_step = stop_after or 6
    assert runs(run_name="whole", **options) == 0
    with monkeypatch.context() as patch:
        interrupt_evaluation(patch, last_step // 3)
        assert runs(**options) == 75
    assert status(runs.path) == {"reason": "SIGTERM", "step": last_step, "code": 75}
    assert steps(runs.path)[-1] == last_step and "val_loss" not in metrics(runs.path)[-1]
    if end == "again":
        with monkeypatch.context() as patch:
            interrupt_evaluation(patch, 1)
            assert runs(**options) == 75 and "val_loss" not in metrics(runs.path)[-1]
    if end == "killed":  # after the save
        (runs.path / "status.json").unlink()
    with monkeypatch.context() as patch:
        evaluations = interrupt_evaluation(patch, None)
        assert runs(**options) == 0 and len(evaluations) == 1
    assert status(runs.path) == {"reason": "stop_after" if stop_after else "finished", "step": last_step, "code": 0}
    assert_same_result(runs.path, runs.out_dir / "whole")
    before = tree(runs.path)
    assert runs(**options) == 0 and tree(runs.path) == before


def test_a_finished_run_is_not_evaluated_again(runs):
    """Whatever its log has lost since."""
    assert runs(**EVALUATED) == 0
    (runs.path / "metrics.jsonl").unlink()
    before = tree(runs.path)
    assert runs(**EVALUATED) == 0 and tree(runs.path) == before


@pytest.fixture
def saves(monkeypatch):
    """Beside the training, as on a GPU, each held up until the loop waits for it: the steps that were saved."""
    monkeypatch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)
    save, wait, waited, saved = checkpoint.save, checkpoint.Saver.wait, threading.Event(), []

    def held_up(run_directory, step, *arguments):
        assert waited.wait(timeout=60)
        waited.clear()
        saved.append(step)
        return save(run_directory, step, *arguments)

    def watched_wait(saver):
        if saver.in_hand:
            waited.set()
        wait(saver)

    monkeypatch.setattr(checkpoint, "save", held_up)
    monkeypatch.setattr(checkpoint.Saver, "wait", watched_wait)
    return saved


def signal_before_update(monkeypatch, step):
    """SIGTERM in the update of this step. Returns the steps that are made."""
    original, made = train_gpt2.set_learning_rate, []

    def set_learning_rate(optimizers, config, done):
        made.append(done + 1)
        if done + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(optimizers, config, done)

    monkeypatch.setattr(train_gpt2, "set_learning_rate", set_learning_rate)
    return made


@pytest.mark.parametrize("in_step", [None, 4, 6], ids=["as it begins", "a step later", "in the last step"])
def test_a_signal_during_a_save_in_hand_costs_no_other_save(runs, saves, monkeypatch, capsys, in_step):
    first = 2 if in_step is None else 3
    options = {"max_steps": 6, "save_every": first, "val_every": 2}
    with monkeypatch.context() as patch:
        made = signal_before_update(patch, in_step)
        if in_step is None:
            copy = machine.copy_aside
            patch.setattr(machine, "copy_aside", lambda pairs: (os.kill(os.getpid(), signal.SIGTERM), copy(pairs))[1])
        assert runs(**options) == 75
    assert saves == steps(runs.path) == [first] and made == list(range(1, (in_step or first) + 1))
    assert status(runs.path) == {"reason": "SIGTERM", "step": first, "code": 75}
    assert len(metrics(runs.path)) == first and f"stopped after step {first}; the same" in capsys.readouterr().out
    assert runs(**options) == 0 and status(runs.path)["reason"] == "finished"
    assert runs(**options, run_name="whole") == 0
    assert_same_result(runs.path, runs.out_dir / "whole")


def test_a_signal_during_a_save_that_fails_saves_once_more(runs, saves, monkeypatch, capsys):
    save, n_calls = checkpoint.save, []

    def fail_first(*arguments):
        n_calls.append(1)
        if len(n_calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", fail_first)
    signal_before_update(monkeypatch, 3)
    assert runs(save_every=2) == 75
    assert steps(runs.path) == [3] == [status(runs.path)["step"]] and len(metrics(runs.path)) == 3
    assert "No space left" in capsys.readouterr().err


def test_a_save_that_is_done_is_not_one_in_hand(runs, monkeypatch):
    """Steps since a save that ended long ago are kept by another."""
    monkeypatch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)
    original, savers = checkpoint.Saver.save, []

    def save(saver, *arguments, **options):
        original(saver, *arguments, **options)
        savers.append(saver)

    monkeypatch.setattr(checkpoint.Saver, "save", save)
    rate = train_gpt2.set_learning_rate

    def set_learning_rate(optimizers, config, done):
        if done + 1 == 3:
            savers[0].in_hand.result()
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(optimizers, config, done)

    monkeypatch.setattr(train_gpt2, "set_learning_rate", set_learning_rate)
    assert runs(save_every=2, max_steps=9) == 75
    assert steps(runs.path)[-1] == len(metrics(runs.path)) == status(runs.path)["step"] == 3
