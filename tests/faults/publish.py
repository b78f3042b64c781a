"""
Every fault at length, and the table of docs/RELIABILITY.md with it.

    python -m tests.faults.publish [--scale 7]

Up to 75 minutes on 2 cores. Writes docs/reliability.json and, between two marks, docs/RELIABILITY.md. The exit code is
pytest's.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import checkpoint
import machine
from configs.recipes import TrainConfig
from files import write_all, write_json, write_text
from model import GPT, GPTConfig
from optim import make_optimizers, update
from rundir import git

MARKS = "<!-- written by tests/faults/publish.py -->\n", "<!-- until here -->\n"
COLUMNS = ("fault", "injected", "survived bitwise", "detected", "naive control", "95 % bound", "seconds")


@dataclass
class Config:
    scale: int = 7
    """how many times as many random faults as in the tests"""
    docs: Path = Path("docs")
    """where the table goes"""
    only: str = ""
    """pytest's -k"""


def upper_bound(n_failed: int, n: int) -> float:
    """Of the rate of failures, with 95 % confidence (Clopper and Pearson 1934): where so few have a chance of 5 %."""
    low, high = n_failed / n, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        chance = sum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n_failed + 1))
        low, high = (rate, high) if chance > 0.05 else (low, rate)
    return high


def add_up(rows: list[dict]) -> list[dict]:
    """One row for each fault, in the order of their first rows."""
    faults = {}
    for row in rows:
        total = faults.setdefault(row["fault"], dict.fromkeys(row, 0) | {"fault": row["fault"]})
        for name in row.keys() - {"fault"}:
            total[name] += row[name]
    return list(faults.values())


def line(row: dict) -> str:
    """survived and detected are both good ends: what is neither is a failure."""
    n, failed = row["injected"], row["injected"] - row["survived"] - row["detected"]
    naive = f"{row['naive_failed']} of {row['naive_tried']} lost" if row["naive_tried"] else "-"
    bound = f"{upper_bound(failed, n):.2%}" if n else "-"
    cells = (row["fault"], n or "skipped", row["survived"], row["detected"], naive, bound, f"{row['seconds']:.0f}")
    return "| " + " | ".join(map(str, cells)) + " |\n"


def table(rows: list[dict]) -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n" + "".join(map(line, rows))


def time_of_a_save() -> dict:
    """Seconds for a checkpoint of d12 with its optimizer, and for the same bytes written plainly and synced."""
    model = GPT(GPTConfig())
    optimizers = make_optimizers(model, TrainConfig())
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1e-3)
    update(model, optimizers, torch.ones(()), 1.0)
    weights, moments = checkpoint.named_tensors(model, optimizers)
    data = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (*weights.values(), *moments.values())]
    directory, times = Path(tempfile.mkdtemp(dir=".")), {"save": [], "copy": []}

    def copy():
        with open(directory / "copy", "wb", buffering=0) as file:
            for part in data:
                write_all(file, part)
            os.fsync(file.fileno())

    try:
        for _ in range(7):
            for name, write in ("copy", copy), ("save", lambda: checkpoint.save(directory, 1, weights, moments, {}, 2)):
                start = time.perf_counter()
                write()
                times[name].append(time.perf_counter() - start)
                shutil.rmtree(directory)
                directory.mkdir()
    finally:
        shutil.rmtree(directory)
    times = {name: min(seconds) for name, seconds in times.items()}  # what else the machine does only adds
    return times | {"bytes": sum(map(len, data)), "ratio": times["save"] / times["copy"]}


def main() -> int:
    config = tyro.cli(Config, description=__doc__.strip())
    with tempfile.NamedTemporaryFile("r") as file:
        environment = os.environ | {"FAULTS_SCALE": str(config.scale), "FAULTS_TABLE": file.name}
        command = [sys.executable, "-m", "pytest", "-q", "tests/faults", "-k", config.only]
        start = time.time()
        code = subprocess.run(command, env=environment).returncode
        rows = add_up([json.loads(text) for text in file])
    about = {"command": shlex.join(["python", "-m", "tests.faults.publish", *sys.argv[1:]]),
             "commit": git("rev-parse", "HEAD").decode().strip(), "machine": machine.versions(torch.device("cpu")),
             "cores": os.cpu_count(), "minutes": (time.time() - start) / 60, "exit_code": code}
    save = time_of_a_save()
    write_json(config.docs / "reliability.json", about | {"save": save, "faults": rows})
    page = config.docs / "RELIABILITY.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    said = (f"`{about['command']}`, commit {about['commit'][:7]}, {machine.describe(torch.device('cpu'))}, "
            f"{about['cores']} cores, {about['minutes']:.0f} minutes.\n\n{table(rows)}\n"
            f"Saving d12 with its optimizer ({save['bytes'] / 1e9:.2f} GB, sha256, fsync) takes {save['save']:.1f} s, "
            f"{save['ratio']:.2f} times as long as the same bytes written and synced plainly.\n")
    write_text(page, before + MARKS[0] + said + MARKS[1] + rest.partition(MARKS[1])[2])
    return code


if __name__ == "__main__":
    sys.exit(main())
