"""Runs of train_gpt2.py that take a tenth of a second: 512 token ids, the model `tiny`, 128 tokens a step."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_gpt2
from configs.recipes import TrainConfig
from data.shards import Shard, write_shard

ROOT = Path(__file__).parent.parent
VOCAB, T, BATCH_TOKENS = 512, 32, 128  # 4 sequences a step
OPTIMIZERS = get_args(get_type_hints(TrainConfig)["optimizer"])
OPTIONS = {
    "model": "tiny", "vocab_size": VOCAB, "sequence_length": T, "total_batch_tokens": BATCH_TOKENS, "max_steps": 6,
    "warmup_steps": 2, "learning_rate": 1e-2, "val_every": 0, "val_tokens": 2 * T, "save_every": 0, "device": "cpu",
    "run_name": "run",
}


def make_data(directory, n_train=1200, n_val=300, seed=0, tokenizer=None, vocab_size=VOCAB):
    """A data set with skewed random ids. 1,200 tokens are 37 windows: 12 steps of 4 go into a second epoch."""
    directory.mkdir(parents=True)
    generator, shards = np.random.default_rng(seed), []
    for split, n_tokens in ("train", n_train), ("val", n_val):
        path = directory / f"{split}_000000.bin"
        write_shard(path, (vocab_size * generator.random(n_tokens) ** 3).astype(np.int64))
        sha256, counts = Shard(path).scan()
        shards.append({"split": split, "file": path.name, "tokens": n_tokens, "bytes": None, "sha256": sha256,
                       "max_token": int(counts.nonzero()[0][-1])})
    manifest = {"format": 1, "tokenizer": tokenizer, "vocab_size": vocab_size, "source": None, "licence": None}
    (directory / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}))
    return directory


class Runs:
    """`runs(seed=1)` runs train_gpt2.py in this process and returns its exit code; `runs.path` is the run's place."""

    def __init__(self, directory: Path, data: Path | None = None):
        torch.set_num_threads(1)
        self.directory, self.data, self.out_dir = directory, data or directory / "data", directory / "runs"
        if not self.data.exists():
            make_data(self.data)

    @property
    def path(self) -> Path:
        return self.out_dir / OPTIONS["run_name"]

    def options(self, **changes) -> list[str]:
        """Arguments; the value None leaves an option out, True and False are --option and --no_option."""
        arguments = []
        for name, value in ({"data": self.data, "out_dir": self.out_dir} | OPTIONS | changes).items():
            if isinstance(value, bool):
                arguments.append(f"--{name}" if value else f"--no_{name}")
            elif value is not None:
                arguments += [f"--{name}", str(value)]
        return arguments

    def __call__(self, **changes) -> int:
        return call(train_gpt2.main, self.options(**changes))

    def start(self, *launcher: str, **changes) -> subprocess.Popen:
        """The same in a process of its own, stdout as a pipe, stderr in the file `stderr`."""
        command = [sys.executable, *launcher, str(ROOT / "train_gpt2.py"), *self.options(**changes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if changes.get("device") != "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with open(self.directory / "stderr", "w") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment,
                                       cwd=self.directory)
        guard = threading.Timer(120, process.kill)  # a process that hangs is a failed test, not a stuck one
        guard.daemon = True
        guard.start()
        return process


def call(main, arguments: list[str]) -> int:
    """Exit code of a command's main, which may end by tyro's own SystemExit; its signal handlers are taken away."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def wait_for(process: subprocess.Popen, words: str) -> str:
    """Reads the process's stdout up to a line with these words, and returns it."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the process ended with {process.wait()} before it printed {words!r}")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def steps(run: Path) -> list[int]:
    """Of the checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*") if path.name[5:].isdigit())


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optim.safetensors")


def tree(directory: Path) -> dict[str, tuple]:
    """Every file and directory with size and time of the last change."""
    paths = [directory, *directory.rglob("*")] if directory.exists() else []
    return {str(path): (path.stat().st_size * path.is_file(), path.stat().st_mtime_ns) for path in paths}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes; torch.equal takes no notice of dtypes and of the sign of zero."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{json.dumps(name)} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def untimed(run: Path) -> list[dict]:
    """The rows of metrics.jsonl without what may differ between runs that are the same."""
    timed = {"time_s", "step_ms", "tokens_per_s", "mfu", "peak_mib"}
    return [{key: value for key, value in row.items() if key not in timed} for row in metrics(run)]


def assert_same_result(actual: Path, expected: Path):
    """
    To the last bit: the newest weights and optimizer state, and all that metrics.jsonl has apart from times and what is
    of the process: a run that went on may have needed more memory at its beginning.
    """
    assert steps(actual)[-1] == steps(expected)[-1]
    x, y = (tensors(run / f"step-{steps(run)[-1]:08d}") for run in (actual, expected))
    assert digest(x) == digest(y), different(x, y)
    rows, expected_rows = (list(map(json.dumps, untimed(run))) for run in (actual, expected))
    assert rows == expected_rows
    assert [row["step"] for row in metrics(actual)] == list(range(1, len(rows) + 1))


def different(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that one of them lacks, or that differ."""
    return [name for name in sorted({*x, *y})
            if name not in x or name not in y or digest({"": x[name]}) != digest({"": y[name]})]


def words(text: str) -> str:
    """Without the frame and the line breaks of tyro's messages."""
    return " ".join(text.translate({ord(line): " " for line in "╭╮╰╯│─+|"}).split())
