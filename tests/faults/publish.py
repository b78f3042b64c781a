"""
Every fault at length, and the table of docs/RELIABILITY.md with it.

    python -m tests.faults.publish [--scale 7]

Up to 75 minutes on 2 cores. Writes docs/reliability.json and, between two marks, docs/RELIABILITY.md. The exit code is
pytest's, or 1 where a save takes too long.
"""

import json
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

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
TESTS = ("tests/faults", "tests/test_checkpoint.py::test_resumed_run_is_the_uninterrupted_run",
         "tests/test_checkpoint.py::test_without_its_moments_it_is_not")
MOST_TIMES_A_COPY = 1.3  # that a save may take


@dataclass
class Config:
    scale: int = 7
    """how many times as many random faults as in the tests"""
    seed: int | None = None
    """of the random faults; None: drawn"""
    docs: Path = Path("docs")
    """where the table goes"""
    only: str = ""
    """pytest's -k"""


def upper_bound(n_failed: int, n: int) -> float:
    """Of the rate of failures, with 95 % confidence (Clopper and Pearson 1934): where so few have a chance of 5 %."""
    if n_failed == n:
        return 1.0

    def chance(rate):
        return sum(math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(rate)
                            + (n - k) * math.log1p(-rate)) for k in range(n_failed + 1))

    low, high = n_failed / n, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        low, high = (rate, high) if chance(rate) > 0.05 else (low, rate)
    return high


def add_up(rows: list[dict]) -> list[dict]:
    """One row for each fault, in the order of their first rows, with what has failed: neither survived nor detected."""
    faults = {}
    for row in rows:
        total = faults.setdefault(row["fault"], dict.fromkeys(row, 0) | {"fault": row["fault"]})
        for name in row.keys() - {"fault", "longest_s"}:
            total[name] += row[name]
        total["longest_s"] = max(total["longest_s"], row["longest_s"])
    return [row | {"failed": row["injected"] - row["survived"] - row["detected"]} for row in faults.values()]


def line(row: dict) -> str:
    n, failed, skipped = row["injected"], row["failed"], row["skipped"]
    injected = str(n) + f", **{failed} failed**" * (failed > 0) + f", {skipped} skipped" * (skipped > 0)
    naive = f"{row['naive_failed']} of {row['naive_tried']} failed" if row["naive_tried"] else "-"
    bound = f"{upper_bound(failed, n):.2%}" if n else "-"
    seconds = f"{row['seconds']:.0f}" + (f" ({row['longest_s']:.1f})" if row["longest_s"] else "")
    cells = row["fault"], injected, str(row["survived"]), str(row["detected"]), naive, bound, seconds
    return f"| {' | '.join(cells)} |\n"


def table(rows: list[dict]) -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n" + "".join(map(line, rows))


def run_tests(config: Config, seed: int) -> dict:
    """pytest's exit code, how many tests there were, which of them failed, and the rows that they recorded."""
    with tempfile.NamedTemporaryFile("r") as rows, tempfile.NamedTemporaryFile("r") as report:
        environment = os.environ | {"FAULTS_SCALE": str(config.scale), "FAULTS_TABLE": rows.name,
                                    "FAULTS_SEED": str(seed)}
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, "-k", config.only, "--junitxml", report.name]
        start = time.time()
        code = subprocess.run(command, env=environment).returncode
        minutes = (time.time() - start) / 60
        text = report.read()
        cases = list(ElementTree.fromstring(text).iter("testcase")) if text else []
        failed = [case.get("name") for case in cases if {"failure", "error"} & {part.tag for part in case}]
        return {"exit_code": code, "minutes": minutes, "tests": len(cases), "tests_failed": failed,
                "faults": add_up([json.loads(row) for row in rows])}


def time_of_a_save() -> dict:
    """Seconds for a checkpoint of d12 with its optimizer, and for the same bytes written plainly and synced."""
    model = GPT(GPTConfig())
    optimizers = make_optimizers(model, TrainConfig())
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1e-3)
    update(model, optimizers, torch.ones(()), 1.0)
    weights, moments = checkpoint.named_tensors(model, optimizers)
    files = [[tensor.reshape(-1).view(torch.uint8).numpy() for tensor in part.values()] for part in (weights, moments)]
    directory, times = Path(tempfile.mkdtemp(dir=".")), {"save": [], "copy": []}

    def copy():
        for name, parts in zip(checkpoint.FILES, files, strict=False):
            with open(directory / name, "wb", buffering=0) as file:
                for part in parts:
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
    ratio = times["save"] / times["copy"]
    n_bytes = sum(len(part) for parts in files for part in parts)
    return times | {"bytes": n_bytes, "ratio": ratio, "most": MOST_TIMES_A_COPY, "holds": ratio <= MOST_TIMES_A_COPY}


def page(found: dict) -> str:
    """What stands between the marks."""
    save = found["save"]
    text = (f"`{found['command']}`, FAULTS_SEED={found['seed']}, commit {found['commit'][:7]}, {found['on']}, "
            f"{found['cores']} cores, {found['minutes']:.0f} minutes.\n\n")
    if found["exit_code"]:
        failed = found["tests_failed"]
        text += (f"**pytest ended with exit code {found['exit_code']}: {len(failed)} of {found['tests']} tests failed. "
                 f"{', '.join(failed)}**\n\n")
    holds = "which holds" if save["holds"] else "**which does not hold**"
    return text + (f"{table(found['faults'])}\n"
                   f"Saving d12 with its optimizer ({save['bytes'] / 1e9:.2f} GB, sha256, fsync) takes "
                   f"{save['save']:.1f} s, {save['ratio']:.2f} times as long as the same bytes written and synced "
                   f"plainly (the best of seven each, in turn); promised are {save['most']} times, {holds}.\n")


def main() -> int:
    config = tyro.cli(Config, description=__doc__.strip())
    seed = random.SystemRandom().randrange(10**6) if config.seed is None else config.seed
    print(f"FAULTS_SEED={seed}", flush=True)
    found = {"command": shlex.join(["python", "-m", "tests.faults.publish", *sys.argv[1:]]), "seed": seed,
             "commit": git("rev-parse", "HEAD").decode().strip(), "machine": machine.versions(torch.device("cpu")),
             "on": machine.describe(torch.device("cpu")), "cores": os.cpu_count(), **run_tests(config, seed),
             "save": time_of_a_save()}
    write_json(config.docs / "reliability.json", found)
    file = config.docs / "RELIABILITY.md"
    before, _, rest = file.read_text().partition(MARKS[0])
    write_text(file, before + MARKS[0] + page(found) + MARKS[1] + rest.partition(MARKS[1])[2])
    return found["exit_code"] or int(not found["save"]["holds"])


if __name__ == "__main__":
    sys.exit(main())
