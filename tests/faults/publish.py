"""
Every fault at length, and the table of docs/RELIABILITY.md with it.

    python -m tests.faults.publish [--scale 7] [--jobs 24]

Up to 75 minutes on 2 cores. Writes docs/reliability.json and, between two marks, docs/RELIABILITY.md. With --only, rows
that are measured anew take the place of those that are there, and the others stay; each row says by which run, that is
of which commit and on which machine, it was measured. The exit code is pytest's, or 1 where a save takes too long.
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

import pytest
import torch
import tyro

import checkpoint
import machine
from configs.recipes import TrainConfig
from files import write_all, write_json, write_text
from model import GPT, GPTConfig
from optim import make_optimizers, update
from rundir import git, read_json

MARKS = "<!-- written by tests/faults/publish.py -->\n", "<!-- until here -->\n"
COLUMNS = ("fault", "injected", "survived bitwise", "detected", "naive control", "95 % bound", "seconds", "commit")
TESTS = ("tests/faults", "tests/test_fuzz.py", "tests/test_checkpoint.py::test_resumed_run_is_the_uninterrupted_run",
         "tests/test_checkpoint.py::test_without_its_moments_it_is_not")
NO_TESTS = 5  # pytest's exit code
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
    """pytest's -k: these tests alone, without the time of a save"""
    commit: str | None = None
    """of the code; None: as git says, for which this has to be a checkout"""
    jobs: int = 1
    """processes that share the tests, each with up to three more at a time"""


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
    """One row for each fault, in the order of the tests, with what has failed: none of the ends that a Row has."""
    faults = {}
    for row in sorted(rows, key=lambda row: row.pop("test")):
        total = faults.setdefault(row["fault"], dict.fromkeys(row, 0) | {"fault": row["fault"], "measure": ""})
        for name in row.keys() - {"fault", "measure", "longest_s"}:
            total[name] += row[name]
        total["measure"] = row["measure"] or total["measure"]
        total["longest_s"] = max(total["longest_s"], row["longest_s"])
    good = "survived", "detected", "harmless"
    return [row | {"failed": row["injected"] - sum(row[name] for name in good)} for row in faults.values()]


def line(row: dict, commit: str) -> str:
    n, failed, skipped, harmless = row["injected"], row["failed"], row["skipped"], row["harmless"]
    fault = row["fault"] + f": {row['measure']}" * bool(row["measure"])
    injected = (str(n) + f", {harmless} harmless" * (harmless > 0) + f", **{failed} failed**" * (failed > 0)
                + f", {skipped} skipped" * (skipped > 0))
    naive = f"{row['naive_failed']} of {row['naive_tried']} failed" if row["naive_tried"] else "-"
    bound = f"{upper_bound(failed, n):.2%}" if n else "-"
    seconds = f"{row['seconds']:.0f}" + (f" ({row['longest_s']:.1f})" if row["longest_s"] else "")
    cells = fault, injected, str(row["survived"]), str(row["detected"]), naive, bound, seconds, commit[:7]
    return f"| {' | '.join(cells)} |\n"


def table(found: dict) -> str:
    lines = (line(row, found["runs"][row["run"]]["commit"]) for row in found["faults"])
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n" + "".join(lines)


# -----------------------------------------------------------------------------
# the tests


def pytest_collection_modifyitems(items):
    """In one of several processes, with this file as pytest's plugin: numbers the tests, and keeps each n-th."""
    for number, item in enumerate(items):
        item.user_properties.append(("number", number))
    i, n = map(int, os.environ["FAULTS_SHARE"].split("/"))
    items[:] = items[i::n]


@pytest.hookimpl(tryfirst=True)  # before its fixtures are made
def pytest_runtest_setup(item):
    """The number, which is the order of rows in the table."""
    os.environ["FAULTS_TEST"] = str(dict(item.user_properties)["number"])


def run_tests(config: Config, seed: int) -> dict:
    """pytest's exit code, how many tests there were, which failed or were skipped, and the rows that they recorded."""
    with tempfile.TemporaryDirectory() as directory:
        start, processes = time.time(), []
        for i in range(config.jobs):
            environment = os.environ | {
                "FAULTS_SCALE": str(config.scale), "FAULTS_SEED": str(seed), "FAULTS_SHARE": f"{i}/{config.jobs}",
                "FAULTS_TABLE": f"{directory}/{i}.rows", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.faults.publish", *TESTS, "-k", config.only,
                       "--junitxml", f"{directory}/{i}.xml", "--basetemp", f"{directory}/{i}"]
            processes.append(subprocess.Popen(command, env=environment))
        codes = [process.wait() for process in processes]
        minutes = (time.time() - start) / 60
        cases = [case for path in Path(directory).glob("*.xml") for case in ElementTree.parse(path).iter("testcase")]
        rows = [json.loads(row) for path in Path(directory).glob("*.rows") for row in path.read_text().splitlines()]
    codes = set(codes) - {0} - ({NO_TESTS} if cases else set())  # one may have none of the few
    ended = {kind: sorted(case.get("name") for case in cases if kind & {part.tag for part in case})
             for kind in map(frozenset, ({"failure", "error"}, {"skipped"}))}
    failed, skipped = ended.values()
    return {"exit_code": max(codes, default=0), "minutes": minutes, "tests": len(cases), "tests_failed": failed,
            "tests_skipped": skipped, "faults": add_up(rows)}


# -----------------------------------------------------------------------------
# the time of a save


def time_of_a_save() -> dict:
    """Seconds for a checkpoint of d12 with its optimizer, and for the same bytes in two files, each synced."""
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


# -----------------------------------------------------------------------------
# the page


def merge(kept: dict, run: dict, name: str) -> dict:
    """What was published before with the rows of this run in place of its own; runs that have no row left go."""
    rows = {row["fault"]: row for row in kept.get("faults", [])}
    rows |= {row["fault"]: row | {"run": name, "commit": run["commit"]} for row in run["faults"]}
    save = {**run["save"], "run": name} if run["save"] else kept.get("save")
    runs = kept.get("runs", {}) | {name: {key: value for key, value in run.items() if key not in ("faults", "save")}}
    used = {row["run"] for row in rows.values()} | {name} | ({save["run"]} if save else set())
    return {"runs": {name: runs[name] for name in runs if name in used}, "faults": list(rows.values()), "save": save}


def page(found: dict) -> str:
    """What stands between the marks."""
    text, save = "", found["save"]
    for name, run in found["runs"].items():
        n = sum(row["run"] == name for row in found["faults"])
        text += (f"`{run['command']}`, FAULTS_SEED={run['seed']}, commit {run['commit'][:7]}, {run['on']}, "
                 f"{run['cores']} cores, {run['minutes']:.0f} minutes: {n} rows.\n\n")
        if run["exit_code"]:
            failed = run["tests_failed"]
            text += (f"**pytest ended with exit code {run['exit_code']}: {len(failed)} of {run['tests']} tests failed. "
                     f"{', '.join(failed)}**\n\n")
        if skipped := run["tests_skipped"]:
            text += f"Skipped there: {', '.join(skipped)}.\n\n"
    text += table(found)
    if save:
        holds = "which holds" if save["holds"] else "**which does not hold**"
        commit = found["runs"][save["run"]]["commit"][:7]
        text += (f"\nSaving d12 with its optimizer ({save['bytes'] / 1e9:.2f} GB, sha256, fsync) takes "
                 f"{save['save']:.1f} s, {save['ratio']:.2f} times as long as the same bytes in two files, written and "
                 f"synced plainly (the best of seven each, in turn; commit {commit}); promised are {save['most']} "
                 f"times, {holds}.\n")
    return text


def main() -> int:
    config = tyro.cli(Config, description=__doc__.strip())
    seed = random.SystemRandom().randrange(10**6) if config.seed is None else config.seed
    print(f"FAULTS_SEED={seed}", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit = config.commit or git("rev-parse", "HEAD").decode().strip() or "unknown"
    run = {"command": shlex.join(["python", "-m", "tests.faults.publish", *sys.argv[1:]]), "seed": seed,
           "commit": commit, "machine": machine.versions(device),
           "on": machine.describe(device), "cores": os.cpu_count(), **run_tests(config, seed),
           "save": None if config.only else time_of_a_save()}
    kept = read_json(config.docs / "reliability.json") if config.only else {}
    found = merge(kept if "runs" in kept else {}, run, time.strftime("%Y-%m-%d %H:%M:%S"))
    write_json(config.docs / "reliability.json", found)
    file = config.docs / "RELIABILITY.md"
    before, _, rest = file.read_text().partition(MARKS[0])
    write_text(file, before + MARKS[0] + page(found) + MARKS[1] + rest.partition(MARKS[1])[2])
    return run["exit_code"] or int(bool(run["save"]) and not run["save"]["holds"])


if __name__ == "__main__":
    sys.exit(main())
