"""
What a run survives on GPUs, measured on those at hand: the real command with CUDA, bfloat16 and torch.compile.

    python -m tests.faults.gpu [--out docs/reliability_gpu.json] [--only "kill|two"]

The same seed twice, with and without --deterministic; resumed after three steps; kill -9 at random instants; what
--deterministic costs, and what a save costs the steps that follow; and, with two GPUs, kill -9 of one of two processes.
About 6 minutes on four H100, several trials on each GPU at a time but for those that measure time. The file is written
after each trial, and a trial that fails stops no other. `--device cpu` goes through all of it with tiny models.
Exit code 1: something failed, is missing, or does not hold.
"""

import hashlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal

import numpy as np
import torch
import tyro

import checkpoint
import machine
from data.loader import open_data
from data.shards import write_shard
from files import for_json, write_json
from rundir import LOST, git, read_json
from tests.faults.publish import upper_bound
from tests.small import digest, metrics, tensors, untimed

ROOT = Path(__file__).parent.parent.parent
DETERMINISTIC = {"deterministic": True}
MOST_OF_A_SAVE = 0.05  # of its time, that the steps beside it may lose
DEADLINE = "ended by the deadline"


@dataclass
class Config:
    out: Path = Path("docs/reliability_gpu.json")
    """where the figures go"""
    only: str = ""
    """regular expression: of the trials those in whose name it is found"""
    deadline_s: float = 500
    """after this time what runs is ended, and what is not measured stays so"""
    slots: int = 4
    """trials at a time on one GPU, but for those that measure time"""
    seed: int | None = None
    """of the random instants; None: drawn"""
    work: Path | None = None
    """where runs and torch's caches go, some 60 GB; None: a temporary directory"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: tiny models and few trials, to see that all of it works"""


@dataclass(frozen=True)
class Size:
    """What differs between GPUs and a CPU."""

    models: tuple[str, ...]
    optimizers: tuple[str, ...]  # of the first model, beyond adamw
    options: dict
    vocab_size: int
    n_tokens: int  # of the training data
    small: dict  # options of the runs that are killed
    resume_at: tuple[int, ...]
    kill_runs: int
    kills: int  # of each of them
    controls: int
    startup_s: float  # some are killed before this time
    pause_s: float  # others up to this time after a random step
    cost_rounds: int
    save_every: int
    n_saves: int
    start_timeout_s: float


SIZES = {
    "cuda": Size(
        models=("d12_qk_norm", "d12_post_norm_qk_norm_window256"), optimizers=("muon",), vocab_size=50257,
        options={"device": "cuda", "recipe": "default", "batch_size": 32, "max_steps": 60, "warmup_steps": 5,
                 "val_every": 20, "save_every": 60},
        n_tokens=10_000_000, small={"n_layer": 2, "max_steps": 40, "save_every": 4}, resume_at=(7, 20, 33), kill_runs=8,
        kills=4, controls=6, startup_s=12, pause_s=0.7, cost_rounds=2, save_every=60, n_saves=5, start_timeout_s=240),
    "cpu": Size(
        models=("tiny",), optimizers=("muon",), vocab_size=512,
        options={"device": "cpu", "recipe": "default", "batch_size": 2, "max_steps": 60, "warmup_steps": 5,
                 "val_every": 20, "save_every": 60, "vocab_size": 512, "sequence_length": 32,
                 "total_batch_tokens": 128, "val_tokens": 64},
        n_tokens=20_000, small={"n_layer": 1, "max_steps": 40, "save_every": 4}, resume_at=(7,), kill_runs=1, kills=2,
        controls=1, startup_s=3, pause_s=0.02, cost_rounds=1, save_every=20, n_saves=2, start_timeout_s=60),
}

# train_gpt2.py with something in it changed; its options follow
CHANGED = f"""import json, sys, time
sys.path[:0] = [{str(ROOT)!r}]
import checkpoint, rundir, train_gpt2
{{change}}
rundir.leave(train_gpt2.main(sys.argv[1:]))"""
NAIVE = CHANGED.format(change="from tests.faults import naive\nnaive.install()")
FORGETFUL = CHANGED.format(change="checkpoint.load_optimizers = lambda *_: None")
CLOCKED = CHANGED.format(change="""
clock, log, save, to_save = {"lines": [], "saves": []}, rundir.RunDir.log, checkpoint.save, checkpoint.Saver.save
begun = {}
def timed_log(run, row):
    log(run, row)
    clock["lines"].append([row["step"], time.perf_counter()])
def timed_to_save(saver, step, *arguments, **options):
    begun[step] = time.perf_counter()
    to_save(saver, step, *arguments, **options)
def timed_save(run, step, *arguments):
    save(run, step, *arguments)
    clock["saves"].append([begun[step], time.perf_counter()])
rundir.RunDir.log, checkpoint.save, checkpoint.Saver.save = timed_log, timed_save, timed_to_save
code = train_gpt2.main(sys.argv[1:])
print("clock:", json.dumps(clock), flush=True)
rundir.leave(code)""")

# -----------------------------------------------------------------------------
# runs


class Lab:
    """Where the trials run: its directory, the GPUs, and the deadline, after which `expired` holds and all are gone."""

    def __init__(self, config: Config, seed: int, work: Path):
        self.config, self.seed, self.size, self.work = config, seed, SIZES[config.device], work
        self.running, self.expired, self.lock = set(), False, threading.Lock()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        n_gpus = torch.cuda.device_count() if config.device == "cuda" else 0
        self.gpus = visible.split(",")[:n_gpus] if visible else [str(i) for i in range(n_gpus)]
        self.lanes = self.gpus or [""]  # on a CPU one, without a GPU
        self.n_processes = os.cpu_count() // (config.slots * len(self.lanes)) or 1  # that compile for one run

    def make_data(self):
        directory, generator = self.work / "data", np.random.default_rng(0)
        directory.mkdir()
        for split, n_tokens in ("train", self.size.n_tokens), ("val", self.size.n_tokens // 10):
            tokens = (self.size.vocab_size * generator.random(n_tokens) ** 3).astype(np.int64)
            write_shard(directory / f"{split}_000000.bin", tokens)
        open_data(str(directory), 32, self.size.vocab_size)  # writes its manifest

    def start(self, run: Path, gpus: str, cache: str, launcher=(str(ROOT / "train_gpt2.py"),), **options):
        """The command, started, in a process group of its own; what it prints is in `<run>.log`."""
        if self.expired:
            raise TimeoutError("the deadline is over")
        place = {"data": self.work / "data", "out_dir": run.parent, "run_name": run.name}
        arguments = [text for name, value in (place | self.size.options | options).items()
                     for text in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
        caches = self.work / "caches" / re.sub(r"\W+", "_", cache)
        run.parent.mkdir(parents=True, exist_ok=True)
        variables = {"CUDA_VISIBLE_DEVICES": gpus, "TORCHINDUCTOR_CACHE_DIR": str(caches),
                     "TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_COMPILE_THREADS": str(self.n_processes),
                     "OMP_NUM_THREADS": str(min(self.n_processes, 4))}
        with open(run.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen([sys.executable, *launcher, *arguments], stdout=log, stderr=log, cwd=ROOT,
                                       env=os.environ | variables, start_new_session=True)
        with self.lock:
            self.running.add(process)
        if self.expired:
            kill_group(process)
        return process

    def wait(self, process, run: Path, timeout_s: float | None = None) -> int:
        """Its exit code; RuntimeError with the end of what it printed if it takes too long."""
        try:
            return process.wait(timeout_s or self.size.start_timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"still there after {error.timeout} s: {tail(run)}") from error
        finally:
            self.ended(process)

    def ended(self, process):
        kill_group(process)
        process.wait()
        with self.lock:
            self.running.discard(process)

    def run(self, run: Path, gpus: str, cache: str, code=0, **options):
        """The command to its end. RuntimeError unless it has this exit code."""
        found = self.wait(self.start(run, gpus, cache, **options), run)
        if found != code:
            raise RuntimeError(f"exit code {found}: {tail(run)}")

    def expire(self):
        self.expired = True
        with self.lock:
            for process in self.running:
                kill_group(process)


def kill_group(process):
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def tail(run: Path) -> str:
    return run.with_suffix(".log").read_text(errors="replace")[-1500:]


def outcome(run: Path) -> dict:
    """What two runs are compared by: a digest of each tensor of the last checkpoint, and the log without times."""
    newest = checkpoint.list_checkpoints(run)[0]
    digests = {name: digest({name: tensor}) for name, tensor in tensors(newest).items()}
    return {"step": checkpoint.step_of(newest), "tensors": digests, "rows": untimed(run)}


def compared(actual: dict | None, expected: dict | None) -> dict | None:
    """Whether two outcomes are the same to the last bit, the first step that differs, by how much, and the most."""
    if not actual or not expected or "error" in actual or "error" in expected:
        return None
    both = list(zip(actual["rows"], expected["rows"], strict=False))
    first = next((x["step"] for x, y in both if x != y), None)
    apart = [abs((x["loss"] or 0) - (y["loss"] or 0)) for x, y in both]  # null if not finite
    same = actual["tensors"] == expected["tensors"] and actual["rows"] == expected["rows"]
    return {"bitwise": same, "steps": len(both), "first_step_that_differs": first,
            "loss_differs_there_by": apart[first - 1] if first else 0.0,
            "loss_differs_at_most_by": max(apart, default=0.0),
            "tensors_that_differ": sum(actual["tensors"].get(name) != value
                                       for name, value in expected["tensors"].items())}


# -----------------------------------------------------------------------------
# trials: each gets the lab, a directory of its own and its GPUs, and returns what it found


def same_seed(lab: Lab, place: Path, gpus: str, cache: str, **options) -> dict:
    lab.run(place / "run", gpus, cache, **options)
    return outcome(place / "run")


def resume(lab: Lab, place: Path, gpus: str, at: int, change="", **options) -> dict:
    """Stopped after a step, and then on. change: another program for what comes then."""
    options |= {"model": lab.size.models[0]}
    cache = f"first {lab.size.models[0]} adamw {'deterministic' if 'deterministic' in options else 'plain'}"
    lab.run(place / "run", gpus, cache, stop_after=at, **options)
    launcher = {"launcher": ("-c", change)} if change else {}
    lab.run(place / "run", gpus, cache, **launcher, **options)
    return outcome(place / "run")


def kill_options(lab: Lab) -> dict:
    return {"model": lab.size.models[0], **lab.size.small, **DETERMINISTIC}


def unkilled(lab: Lab, place: Path, gpus: str) -> dict:
    return same_seed(lab, place, gpus, "kill", **kill_options(lab))


def kill(lab: Lab, place: Path, gpus: str, number: int, n_kills: int, change="") -> dict:
    """kill -9 at random instants, one in five before the loop, and then to the end."""
    generator, run, found = random.Random(f"{lab.seed} {number} {change}"), place / "run", []
    launcher = {"launcher": ("-c", change)} if change else {}
    for _ in range(n_kills):
        begun = place / "run.log"
        seen = begun.stat().st_size if begun.exists() else 0
        process = lab.start(run, gpus, "kill", **launcher, **kill_options(lab))
        if not change and generator.random() < 0.2:
            with suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0, lab.size.startup_s))
        else:
            until = time.monotonic() + lab.size.start_timeout_s
            while process.poll() is None and b"attention kernels" not in begun.read_bytes()[seen:]:
                if time.monotonic() > until:
                    lab.ended(process)
                    raise RuntimeError(f"no step after {lab.size.start_timeout_s} s: {tail(run)}")
                time.sleep(0.01)
            target = max(map(checkpoint.step_of, checkpoint.list_checkpoints(run)), default=0) + generator.randint(1, 9)
            while process.poll() is None and len(rows_text(run)) < target and time.monotonic() < until:
                time.sleep(0.002)
            with suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0, lab.size.pause_s))
        process.kill()
        code = process.wait()
        lab.ended(process)
        if lab.expired:
            raise TimeoutError("the deadline is over")
        if code not in (-9, 0):
            raise RuntimeError(f"exit code {code}: {tail(run)}")
        if code == -9:
            found.append({"in_loop": b"attention kernels" in begun.read_bytes()[seen:], "lines": len(rows_text(run)),
                          "save_in_hand": bool(list(run.glob(".saving-*"))) if not change else None})
    if change:  # the control may fail in any way
        code = lab.wait(lab.start(run, gpus, "kill", **launcher, **kill_options(lab)), run)
        try:
            return {"kills": found, "code": code} | (outcome(run) if code == 0 else {"tensors": {}, "rows": []})
        except Exception as error:
            return {"kills": found, "code": code, "unreadable": repr(error), "tensors": {}, "rows": []}
    lab.run(run, gpus, "kill", **kill_options(lab))
    left = sorted(path.name for path in run.glob(".saving-*"))
    return {"kills": found, "left": left, **outcome(run)}


def rows_text(run: Path) -> list[bytes]:
    with suppress(OSError):
        return (run / "metrics.jsonl").read_bytes().splitlines()
    return []


def cost(lab: Lab, place: Path, gpus: str, model: str) -> dict:
    """ms a step, the median from step 11 on, without and with --deterministic in turns."""
    found, n = {"plain": [], "deterministic": []}, 0
    for turn in range(lab.size.cost_rounds):
        ways = [("plain", {}), ("deterministic", DETERMINISTIC)]
        for name, options in ways if turn % 2 == 0 else ways[::-1]:
            n += 1
            lab.run(place / f"run{n}", gpus, f"first {model} adamw {name}", model=model, **options,
                    val_every=0, save_every=0)
            found[name].append(statistics.median(row["step_ms"] for row in metrics(place / f"run{n}")[10:]))
    return {"ms": found}


def save_cost(lab: Lab, place: Path, gpus: str) -> dict:
    """
    Wall clock between log lines, in one run with saves and one without. A save: from the copy of the weights to their
    checkpoint; what it costs: from the line before it to the second one after its end, less as many steps as the mean
    away from saves. The first one, in fresh memory, apart; the last one, which the run waits for, left out.
    """
    model, every, n_saves = lab.size.models[0], lab.size.save_every, lab.size.n_saves
    options = {"model": model, "max_steps": every * (n_saves + 1), "val_every": 0, "launcher": ("-c", CLOCKED)}
    clocks = {}
    for name, save_every in ("with", every), ("without", 0):
        lab.run(place / name, gpus, f"first {model} adamw plain", save_every=save_every, **options)
        text = (place / f"{name}.log").read_text(errors="replace")
        clocks[name] = json.loads(re.findall(r"^clock: (.*)$", text, re.MULTILINE)[-1])
        shutil.rmtree(place / name)
    lines, saves = clocks["with"]["lines"], clocks["with"]["saves"]
    gaps = [(a, b) for a, b in itertools.pairwise(lines) if a[0] > 10 and a[0] % every > 2]
    quiet = statistics.fmean(b[1] - a[1] for a, b in gaps
                             if not any(begin < b[1] and a[1] < end for begin, end in saves))
    found = []
    for begin, end in saves[:-1]:
        first = max(i for i, (_, at) in enumerate(lines) if at <= begin)
        last = min((i for i, (_, at) in enumerate(lines) if at >= end), default=len(lines) - 1)
        last = min(last + 2, len(lines) - 1)
        extra = lines[last][1] - lines[first][1] - (lines[last][0] - lines[first][0]) * quiet
        found.append({"save_s": end - begin, "steps_beside": last - first, "costs_s": extra})
    whole = {name: clock["lines"][n_saves * every - 1 + every // 2][1] - clock["lines"][every // 2][1]
             for name, clock in clocks.items()}  # from before the first save to after the last that counts
    return {"quiet_step_s": quiet, "saves": found, "wall_s": whole}


TWO = {"n_layer": 2, "save_every": 10, "max_steps": 40, **DETERMINISTIC}  # beside others, which need the memory


def torchrun(*options: str) -> dict:
    """What starts two processes."""
    return {"launcher": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options,
                         str(ROOT / "train_gpt2.py"))}


def two_whole(lab: Lab, place: Path, gpus: str) -> dict:
    lab.run(place / "run", gpus, "two", model=lab.size.models[0], **torchrun(), **TWO)
    return outcome(place / "run")


def two_killed(lab: Lab, place: Path, gpus: str, restarts: int) -> dict:
    """kill -9 of one process after 12 steps: seconds until all that were there are gone; then on, if it ended."""
    run, options = place / "run", {"model": lab.size.models[0], **TWO}
    process = lab.start(run, gpus, "two", **torchrun("--max-restarts", str(restarts)), **options)
    until = time.monotonic() + lab.size.start_timeout_s
    while process.poll() is None and len(rows_text(run)) < 12 and time.monotonic() < until:
        time.sleep(0.01)
    if process.poll() is not None or time.monotonic() > until:
        lab.ended(process)
        raise RuntimeError(f"no 12 steps: {tail(run)}")
    pids, killed_at = workers(process), time.monotonic()
    os.kill(pids[1], signal.SIGKILL)  # not the one that writes status.json
    while any(map(alive, pids.values())) and time.monotonic() < killed_at + 60:
        time.sleep(0.01)
    found = {"seconds": time.monotonic() - killed_at, "lines": len(rows_text(run)),
             "torchrun": lab.wait(process, run)}
    found["status"] = read_json(run / "status.json")
    if restarts == 0:
        lab.run(run, gpus, "two", **torchrun(), **options)
    return found | outcome(run)


def workers(launcher) -> dict[int, int]:
    """Process ids of torchrun's processes, by rank."""
    found = {}
    for pid in map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(text[5:]): pid for text in variables if text.startswith(b"RANK=")}
    return found


def alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


Trials = dict[str, tuple[Callable, tuple, dict]]  # by name: function, arguments and options


def settings(size: Size) -> list[tuple[str, str]]:
    """Models and optimizers of which the same seed is run twice."""
    return [(model, "adamw") for model in size.models] + [(size.models[0], name) for name in size.optimizers]


def trials(size: Size) -> tuple[Trials, Trials, Trials]:
    """Those that may share a GPU, those that measure time, and those on two GPUs; by their importance."""
    shared = {"unkilled": (unkilled, (), {})}
    for model, optimizer in settings(size):
        for way, options in ("deterministic", DETERMINISTIC), ("plain", {}):
            for time_ in "first", "second":  # each compiles anew
                name = f"{time_} {model} {optimizer} {way}"
                shared[name] = same_seed, (name,), {"model": model, "optimizer": optimizer, **options}
    shared |= {f"kill {i}": (kill, (i, size.kills), {}) for i in range(size.kill_runs)}
    shared |= {f"resume {at}": (resume, (at,), DETERMINISTIC) for at in size.resume_at}
    at = size.resume_at[len(size.resume_at) // 2]
    shared["resume without its moments"] = resume, (at, FORGETFUL), DETERMINISTIC
    shared["resume plain"] = resume, (at,), {}
    shared |= {f"naive kill {i}": (kill, (i, 1, NAIVE), {}) for i in range(size.controls)}
    timed = {f"cost {model}": (cost, (model,), {}) for model in size.models}
    timed["save"] = save_cost, (), {}
    two = {"two": (two_whole, (), {}), "two, --max-restarts 1": (two_killed, (1,), {}),
           "two, --max-restarts 0": (two_killed, (0,), {})}
    return shared, timed, two


# -----------------------------------------------------------------------------
# figures


def figures(size: Size, results: dict) -> dict:
    """From what the trials found; None where something is missing."""
    get = results.get
    found = {"same_seed": {}, "resume": {}}
    for model, optimizer in settings(size):
        for way in "deterministic", "plain":
            found["same_seed"][f"{model} {optimizer} {way}"] = compared(
                *(get(f"{time_} {model} {optimizer} {way}") for time_ in ("second", "first")))
    whole = {way: get(f"first {size.models[0]} adamw {way}") for way in ("deterministic", "plain")}
    for name in [name for name in results if name.startswith("resume")]:
        found["resume"][name] = compared(get(name), whole["plain" if "plain" in name else "deterministic"])

    def killed(prefix: str) -> list[tuple[dict, dict]]:
        pairs = [(one, compared(one, get("unkilled"))) for name, one in results.items() if name.startswith(prefix)]
        return [(one, same) for one, same in pairs if same]

    ours, kills = killed("kill"), [one for trial, _ in killed("kill") for one in trial["kills"]]
    naive = killed_naive(results, get("unkilled"))
    n_lost = sum(len(one["kills"]) for one, same in ours if not same["bitwise"] or one["left"])
    found["kill"] = {"runs": len(ours), "kills": len(kills), "in_loop": sum(one["in_loop"] for one in kills),
                     "with_a_save_in_hand": sum(one["save_in_hand"] for one in kills),
                     "survived_bitwise": len(kills) - n_lost,
                     "bound": upper_bound(n_lost, len(kills)) if kills else None,
                     "failed": sum(name.startswith("kill") and "error" in one and DEADLINE not in one["error"]
                                   for name, one in results.items()),
                     "naive_tried": len(naive), "naive_failed": naive.count(False)}
    found["cost"] = {}
    for name in [f"cost {model}" for model in size.models]:
        if get(name) and "ms" in get(name):
            ms = {way: statistics.median(times) for way, times in get(name)["ms"].items()}
            found["cost"][name.removeprefix("cost ")] = ms | {
                "all": get(name)["ms"], "slower_by": ms["deterministic"] / ms["plain"] - 1}
    if get("save") and "saves" in get("save"):
        saves = get("save")["saves"]
        later = saves[1:] or saves
        wall = get("save")["wall_s"]
        found["save"] = {
            "beside": size is SIZES["cuda"], "save_s": statistics.median(one["save_s"] for one in later),
            "costs_s": statistics.median(one["costs_s"] for one in later),
            "share": statistics.median(one["costs_s"] / one["save_s"] for one in later), "first": saves[0],
            "all": saves, "wall_s": wall, "wall_share": (wall["with"] - wall["without"])
            / sum(one["save_s"] for one in saves), "quiet_step_ms": 1000 * get("save")["quiet_step_s"]}
    found["two"] = {}
    for name in "two, --max-restarts 1", "two, --max-restarts 0":
        if same := compared(get(name), get("two")):
            found["two"][name] = {"bitwise": same["bitwise"]} | {
                key: get(name)[key] for key in ("seconds", "lines", "torchrun", "status")}
    return found


def killed_naive(results: dict, whole: dict | None) -> list[bool]:
    """Of each run of the control that was killed, whether it ended as the one that was not."""
    if not whole or "error" in whole:
        return []
    found = [one for name, one in results.items() if name.startswith("naive kill") and one.get("kills")]
    return [one["tensors"] == whole["tensors"] and one["rows"] == whole["rows"] for one in found]


def lines(found: dict) -> list[tuple[str, str, bool | None]]:
    """What, its figure, and whether it is as promised; None where nothing is promised, or nothing was measured."""
    def said(same):
        if same is None:
            return "not measured"
        if same["bitwise"]:
            return f"the same bits in {same['steps']} steps"
        return (f"first differs in step {same['first_step_that_differs']}, the loss by "
                f"{same['loss_differs_there_by']:.1e} there and at most by {same['loss_differs_at_most_by']:.1e}; "
                f"{same['tensors_that_differ']} tensors at the end")

    told = [(f"same seed twice, {name}", said(same), same and same["bitwise"] if "deterministic" in name else None)
            for name, same in found["same_seed"].items()]
    for name, same in found["resume"].items():
        expected = "without" not in name  # that is the control
        told.append((name, said(same), None if "plain" in name or not same else same["bitwise"] == expected))
    one = found["kill"]
    told.append(("kill -9 at random instants", f"{one['survived_bitwise']} of {one['kills']} survived bitwise in "
                 f"{one['runs']} runs, {one['in_loop']} in the loop, {one['with_a_save_in_hand']} with a save in hand; "
                 f"{one['failed']} runs failed otherwise; naive control: {one['naive_failed']} of "
                 f"{one['naive_tried']} failed",
                 one["survived_bitwise"] == one["kills"] and not one["failed"] if one["kills"] else None))
    told += [(f"--deterministic, {name}", f"{one['deterministic']:.1f} ms a step instead of {one['plain']:.1f}, "
              f"{one['slower_by']:+.1%}", None) for name, one in found["cost"].items()]
    if one := found.get("save"):
        told.append(("a save of the first model", f"{one['save_s']:.2f} s, costs the steps beside it "
                     f"{one['costs_s']:.3f} s, {one['share']:.1%}; the first {one['first']['costs_s']:.3f} s; whole "
                     f"runs with and without: {one['wall_share']:.1%}",
                     one["share"] < MOST_OF_A_SAVE if one["beside"] else None))
    for name, one in found["two"].items():
        ended = one["torchrun"] == 0 if name.endswith("1") else one["status"].get("code") == LOST
        good = one["bitwise"] and one["seconds"] < 5 and ended
        told.append((f"kill -9 of one of {name}", f"all gone after {one['seconds']:.1f} s, torchrun's "
                     f"exit code {one['torchrun']}, status.json {one['status']}; "
                     + ("the same bits" if one["bitwise"] else "other bits"), good))
    return told


# -----------------------------------------------------------------------------
# all of it


def short(result: dict) -> dict:
    """For the file: losses instead of rows, one digest instead of one for each tensor."""
    kept = {key: value for key, value in result.items() if key not in ("rows", "tensors")}
    if result.get("tensors"):
        kept["digest"] = hashlib.sha256(json.dumps(sorted(result["tensors"].items())).encode()).hexdigest()
        kept["losses"] = [row.get("loss") for row in result["rows"]]
    return kept


def main() -> int:
    config = tyro.cli(Config, description=__doc__.strip())
    seed = random.SystemRandom().randrange(10**6) if config.seed is None else config.seed
    print(f"--seed {seed}", flush=True)
    if config.device == "cuda" and torch.cuda.device_count() == 0:
        print("error: torch sees no CUDA GPU; --device cpu goes through it with tiny models", file=sys.stderr)
        return 2
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.work:
        config.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=config.work)).resolve()
    lab, results, begun, lock = Lab(config, seed, work), {}, time.time(), threading.Lock()
    device = torch.device(config.device)
    only = ["--only", config.only] if config.only else []
    about = {"command": shlex.join(["python", "-m", "tests.faults.gpu", "--seed", str(seed), *only]),
             "commit": git("rev-parse", "HEAD").decode().strip(), "on": machine.describe(device),
             "gpus": len(lab.gpus), "cores": os.cpu_count(), "size": vars(lab.size)}

    def measured() -> dict:
        try:
            return figures(lab.size, results)
        except Exception:  # what the trials found must be written all the same
            traceback.print_exc()
            return {}

    def write():
        failed = {name: one["error"] for name, one in results.items() if "error" in one}
        write_json(config.out, for_json(about | {
            "minutes": (time.time() - begun) / 60, "failed": failed, "not_run": [*set(wanted) - set(results)],
            "figures": measured(),
            "trials": {name: short(one) for name, one in results.items()}}))

    def carry_out(name: str, gpus: str):
        function, arguments, options = wanted[name]
        place, start = work / re.sub(r"\W+", "_", name), time.time()
        try:
            found = function(lab, place, gpus, *arguments, **options)
        except BaseException as error:
            traceback.print_exc()
            words = f"{type(error).__name__}: {error}".replace(f"{work}/", "").replace(f"{ROOT}/", "")
            found = {"error": words[-3000:]}
        if lab.expired and "error" in found:
            found["error"] = f"{DEADLINE} ({found['error'][:200]})"
        with lock:
            results[name] = found | {"took_s": time.time() - start}
            print(f"{time.time() - begun:4.0f} s: {name} {'FAILED' if 'error' in found else 'done'} in "
                  f"{time.time() - start:.0f} s", flush=True)
            write()
        shutil.rmtree(place, ignore_errors=True)

    def work_off(queue: SimpleQueue, gpus: str):
        with suppress(Empty):
            while not lab.expired:
                carry_out(queue.get_nowait(), gpus)

    def serve(gpu: str, of_two: list[Future]):
        """One GPU: several trials at a time, and, when these and `of_two` are over, those that measure time, alone."""
        with ThreadPoolExecutor(config.slots) as slots:
            for _ in range(config.slots):
                slots.submit(work_off, queues[0], gpu)
        wait(of_two)
        work_off(queues[1], gpu)

    groups = [{name: trial for name, trial in group.items() if re.search(config.only, name)}
              for group in trials(lab.size)]
    if len(lab.gpus) < 2 and lab.gpus:
        print("one GPU: no trial with two", flush=True)
        groups[2] = {}
    wanted, queues = groups[0] | groups[1] | groups[2], [SimpleQueue(), SimpleQueue()]
    for group, queue in zip(groups, queues, strict=False):
        for name in group:
            queue.put(name)
    alarm = threading.Timer(config.deadline_s, lab.expire)
    alarm.daemon = True
    alarm.start()
    try:
        lab.make_data()
        with ThreadPoolExecutor(len(lab.lanes) + 3) as pool:
            of_two = [pool.submit(carry_out, name, ",".join(lab.gpus[:2])) for name in groups[2]]
            list(pool.map(lambda lane: serve(lane, of_two), lab.lanes))
    finally:
        alarm.cancel()
        lab.expire()
        write()
        shutil.rmtree(work, ignore_errors=True)
    told = lines(found) if (found := measured()) else []
    print(f"\n{about['on']}, {len(lab.gpus)} GPUs, {(time.time() - begun) / 60:.1f} minutes\n")
    print("| what | measured |\n|---|---|")
    for what, figure, promised in told:
        print(f"| {what} | {figure}{' **(does not hold)**' * (promised is False)} |")
    failed = [name for name in wanted if name not in results or "error" in results[name]]
    if failed:
        print(f"\nfailed or not run: {', '.join(failed)}")
    return int(bool(failed) or not told or any(promised is False for *_, promised in told))


if __name__ == "__main__":
    sys.exit(main())
