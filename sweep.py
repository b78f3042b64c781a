"""
Many runs of train_gpt2.py: one at a time on each GPU, or as many as --slots says.

    python sweep.py --models d12,d12_post_norm --learning_rates 3e-4,1e-3 --seeds 3 --recipe short700
    python sweep.py --models d12 --sweep window_size=128,256 --sweep seed=4,7

All combinations are run; any other option of train_gpt2.py goes to every run. The same line continues: finished and
diverged runs are kept, killed ones go on from their checkpoints, failed ones are tried again. The folder holds the
runs' directories, <run>.log with what each printed, and index.json.

Exit codes: 0 all are done (diverged ones are results, and named), 1 some failed, 2 bad option, 3 folder in use, 4 no
valid checkpoint to start from, 5 cannot write, 7 missing, empty or invalid data, 75 stopped by a signal, resumable,
130 second Ctrl-C.
"""

import hashlib
import io
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import checkpoint
import machine
import rundir
import train_gpt2
from configs.recipes import TrainConfig, result_settings, run_name
from configs.variants import model_name
from costs.memory import divisors
from data.loader import open_data
from files import write_json
from model import GPT, GPTConfig
from processes import set_parent_death_signal
from rundir import BadOption
from train_gpt2 import print0

PROGRAM = Path(__file__).with_name("train_gpt2.py")
POLL_S = 0.5  # between looks at what runs


@dataclass(frozen=True)
class SweepConfig:
    models: str | None = None
    """variants, with commas between"""
    learning_rates: str | None = None
    """with commas between"""
    seeds: int | None = None
    """how many: 3 is the seeds 0, 1 and 2 (others: --sweep seed=4,7)"""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=VALUE,VALUE,... of any option of train_gpt2.py, True and False for a flag"""
    name: str | None = None
    """of the folder under runs; None: from what is swept"""
    out_dir: str | None = None
    """the folder, where it is not to be under runs"""
    slots: int = 1
    """runs at a time on each GPU, or without a GPU in all, which share its memory. Step times mean little with more"""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """print the runs, and stop"""


@dataclass(frozen=True)
class Run:
    name: str
    arguments: list[str]
    """of train_gpt2.py, but for --out_dir"""
    config: TrainConfig
    gpt_config: GPTConfig
    batch_size: int
    """sequences in a micro-step, as train_gpt2.py chooses them"""


# -----------------------------------------------------------------------------
# which runs


def swept_fields(options: SweepConfig, others: list[str]) -> dict[str, list[str]]:
    """
    {field: its values}. Seeds vary slowest, so that half a sweep can be compared; models fastest, so that GPUs begin
    with different ones, and those that follow find them compiled. others: options that go to every run.
    """
    for name, value in ("seeds", options.seeds), ("slots", options.slots):
        if value is not None and not 1 <= value <= 1000:
            raise BadOption(f"{name}={value} must lie between 1 and 1000")
    seeds = options.seeds and ",".join(map(str, range(options.seeds)))
    named = {"seed": seeds, "learning_rate": options.learning_rates, "model": options.models}
    texts = [f"{field}={values}" for field, values in named.items() if values is not None]
    known = {field.name for field in (*fields(TrainConfig), *fields(GPTConfig))} - {"out_dir"}
    given = {word[2:].split("=")[0].replace("-", "_").removeprefix("no_") for word in others if word.startswith("--")}
    found = {}
    for text in (*texts, *options.sweep):
        field, _, values = text.partition("=")
        if field not in known:
            raise BadOption(f"--sweep {text}: use FIELD=VALUE,VALUE with an option of python train_gpt2.py --help")
        if field in found or field in given:
            raise BadOption(f"{field} is given twice")
        found[field] = values.split(",")
        if "" in found[field]:
            raise BadOption(f"{text} has an empty value")
    return {field: found[field] for field in sorted(found, key=lambda field: (field == "model") - (field == "seed"))}


def option(field: str, value: str) -> list[str]:
    return [f"--{'no_' * (value == 'False')}{field}"] if value in ("True", "False") else [f"--{field}", value]


def plan_runs(swept: dict[str, list[str]], others: list[str], slots: int) -> tuple[list[Run], list[dict]]:
    """
    The runs, and for each of those that can run at a time what its environment says about its place. ValueError, or
    tyro's SystemExit, if train_gpt2.py would refuse one of them.
    """
    runs = {}
    for values in tqdm(list(product(*swept.values())), "checking the options", leave=False, disable=None):
        arguments = [*others, *(word for pair in zip(swept, values, strict=True) for word in option(*pair))]
        options, device = train_gpt2.parse_options(arguments)
        if options.list:
            raise BadOption("--list is an option of train_gpt2.py alone")
        config = options.train
        with redirect_stdout(io.StringIO()):
            _, batch_size, _ = train_gpt2.plan(config, options.gpt, device, runs_beside=slots - 1)
        if slots > 1 and config.batch_size == "auto":  # the run itself would count on all of the memory
            arguments += ["--batch_size", str(batch_size)]
        if config.init_from and os.path.isdir(named := f"{config.out_dir}/{config.init_from}"):
            arguments += ["--init_from", named]  # the runs have another out_dir, where they would not find the name
            config = replace(config, init_from=named)
        name = run_name(config, model_name(options.gpt))
        if name in runs:
            raise BadOption(f"two runs are {name}: {shlex.join(runs[name].arguments)} and {shlex.join(arguments)}")
        runs[name] = Run(name, arguments, config, options.gpt, batch_size)
    place = {machine.RUNS_BESIDE: str(slots - 1)} if slots > 1 else {}
    if device.type != "cuda":
        return list(runs.values()), [place] * slots
    n_gpus = torch.cuda.device_count()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n_gpus)))).split(",")[:n_gpus]
    return list(runs.values()), [place | {"CUDA_VISIBLE_DEVICES": gpu} for _ in range(slots) for gpu in gpus]


def sweep_name(swept: dict[str, list[str]], runs: list[Run]) -> str:
    """What is swept, as far as there is room, and a digest of the runs' names."""
    text = "-".join(f"{field}={','.join(values)}" for field, values in swept.items()).replace("/", "_")
    return f"sweep-{text[:100]}-{hashlib.sha256(' '.join(run.name for run in runs).encode()).hexdigest()[:8]}"


# -----------------------------------------------------------------------------
# one run


def start(command: list[str], log: Path, environment: dict) -> tuple[subprocess.Popen, int]:
    """
    (The process, in a session of its own, where a terminal's Ctrl-C is not heard; the offset of its part of the log).
    The kernel ends it when this process is gone.
    """
    parent = os.getpid()

    def end_with_parent():
        set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:  # it is gone already
            os._exit(rundir.LOST)

    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode(errors="surrogateescape"))
        file.flush()
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
                                start_new_session=True, preexec_fn=end_with_parent), file.tell()


def settled(path: Path, settings: dict) -> dict:
    """What the index says of a run with these settings that finished or diverged in this directory before, else {}."""
    status = rundir.read_json(path / "status.json")
    done = status.get("reason") == "finished" or status.get("code") == rundir.NOT_FINITE
    begun = rundir.read_json(path / "config.json").get("settings")
    begun = train_gpt2.begun_with(begun) if isinstance(begun, dict) else {}
    same = all(begun.get(name) == settings[name] for name in settings if name != "dtype")
    return outcome(path, status.get("code"), status.get("reason")) if done and same else {}


def outcome(path: Path, code: int, reason: str) -> dict:
    """What the index says of a run that has ended. stopped with code 0: by --stop_after."""
    states = {rundir.DONE: "stopped", rundir.STOPPED: "stopped", rundir.NOT_FINITE: "diverged"}
    state, val_loss = states.get(code, "failed"), None
    if code == rundir.DONE and reason == "finished":
        state = reason
        with suppress(OSError, IndexError):
            last = (path / "metrics.jsonl").read_text(errors="replace").splitlines()[-1]
            val_loss = rundir.parse_object(last).get("val_loss")
    return {"state": state, "code": code, "reason": reason, "val_loss": val_loss}


def why(path: Path, log: Path, offset: int, code: int) -> str:
    """Why the run's process ended, which wrote the log from there on."""
    if code in (rundir.DONE, rundir.STOPPED):
        return rundir.read_json(path / "status.json").get("reason", "")
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    found = re.findall(r"error: (.*)", log.read_bytes()[offset:].decode(errors="replace"))
    return found[-1] if found else f"exit code {code}, see {log}"


def progress(path: Path, max_steps: int) -> float:
    """The part of a run's steps that is done."""
    with suppress(OSError):
        return min(1.0, (path / "metrics.jsonl").read_bytes().count(b"\n") / max_steps)
    return 0.0


# -----------------------------------------------------------------------------
# all runs


def sweep(runs: list[Run], settings: dict, places: list[dict], folder: Path, stop: rundir.StopSignal) -> dict:
    """
    The queue; returns what index.json says of these runs. settings: what the result of each depends on, by name;
    places: as of `plan_runs`. Raises OSError, once the runs under way have ended.
    """
    # --- the index: what earlier starts left, and what is done ---
    index = rundir.read_json(folder / "index.json").get("runs")
    index = index if isinstance(index, dict) else {}
    for run in runs:
        command = shlex.join(["python", PROGRAM.name, *run.arguments, "--out_dir", str(folder)])
        entry = {"command": command, "state": "waiting", "code": None, "reason": "", "val_loss": None,
                 "attempts": 0, "seconds": 0.0, "halved_to": None}  # --batch_size, after out of memory
        earlier = index.get(run.name)
        if isinstance(earlier, dict) and earlier.get("command") == command:
            kept = {"attempts": int, "seconds": float, "halved_to": int}
            entry |= {key: earlier[key] for key, kind in kept.items() if type(earlier.get(key)) is kind}
        index[run.name] = entry | settled(folder / run.name, settings[run.name])
    waiting = [run for run in runs if index[run.name]["state"] == "waiting"]
    print0(f"{folder}: {len(runs)} runs, {len(runs) - len(waiting)} done before, {len(places)} at a time")

    # --- what all have in common, unless the user's environment says something else ---
    threads = str(max(1, torch.get_num_threads() // len(places)))
    environment = {
        "OMP_NUM_THREADS": threads,
        "TORCHINDUCTOR_COMPILE_THREADS": threads,
        "TQDM_MININTERVAL": "10",  # s; the bars are in the logs
    } | os.environ

    # --- the loop ---
    running, free = {}, list(places)
    parts = {run.name: progress(folder / run.name, run.config.max_steps) if run in waiting else 1.0 for run in runs}
    tqdm.monitor_interval = 0  # no thread beside, since processes are forked off
    bar = tqdm(total=len(runs), initial=sum(parts.values()),
               bar_format="{percentage:3.0f}%|{bar}| {n:.1f}/{total} runs, {elapsed}, {remaining} left")
    try:
        while running or (waiting and not stop.received):
            while free and waiting and not stop.received:
                run, place = waiting.pop(0), free.pop(0)
                entry = index[run.name]
                entry |= {"state": "running", "attempts": entry["attempts"] + 1}
                write_json(folder / "index.json", {"runs": index})
                command = [sys.executable, str(PROGRAM), *run.arguments, "--out_dir", str(folder)]
                command += ["--batch_size", str(entry["halved_to"])] if entry["halved_to"] else []
                process, offset = start(command, folder / f"{run.name}.log", environment | place)
                running[process] = run, place, offset, time.monotonic()
            time.sleep(POLL_S)
            if stop.received:
                for process in running:
                    process.terminate()

            for process in [process for process in running if process.poll() is not None]:
                run, place, offset, begun = running.pop(process)
                free.append(place)
                entry, code = index[run.name], process.returncode
                reason = why(folder / run.name, folder / f"{run.name}.log", offset, code)
                if stop.received and code == -signal.SIGTERM:  # it came before the run listened
                    code = rundir.STOPPED
                entry |= outcome(folder / run.name, code, reason)
                entry["seconds"] += time.monotonic() - begun
                batch_size = entry["halved_to"] or run.batch_size
                if code == 1 and reason.startswith("out of memory") and batch_size > 1:
                    entry |= {"state": "waiting", "halved_to": divisors(batch_size)[1]}
                    waiting.insert(0, run)
                    print0(f"{run.name}: out of memory with --batch_size {batch_size}, again with "
                           f"{entry['halved_to']}, at the same {run.config.total_batch_tokens:,} tokens a step")
                else:
                    parts[run.name] = 1.0
                    print0(f"{run.name}: {describe(entry)}, {entry['seconds'] / 60:.1f} min")
                write_json(folder / "index.json", {"runs": index})
            parts |= {run.name: progress(folder / run.name, run.config.max_steps) for run, *_ in running.values()}
            bar.n = sum(parts.values())
            bar.refresh()
    finally:
        for process in running:  # after an error
            process.terminate()
        for process in running:
            process.wait()
        bar.close()
    write_json(folder / "index.json", {"runs": index})
    return {run.name: index[run.name] for run in runs}


def describe(entry: dict) -> str:
    """How a run ended."""
    if entry["state"] != "finished":
        return f"{entry['state']} ({entry['reason']})"
    return "finished" if entry["val_loss"] is None else f"finished, val loss {entry['val_loss']:.4f}"


def report(entries: dict, folder: Path) -> int:
    """Prints what became of all runs; returns the exit code."""
    for state in "finished", "diverged", "failed", "stopped", "waiting":
        if names := [name for name, entry in entries.items() if entry["state"] == state]:
            print0(f"{len(names)} {state}" + f": {', '.join(names)}" * (state != "finished"))
    states = {entry["state"] for entry in entries.values()}
    if states & {"finished", "diverged"}:
        print0(f"python compare.py {shlex.quote(str(folder))}")
    if "waiting" in states or rundir.STOPPED in [entry["code"] for entry in entries.values()]:
        print0("stopped; the same command continues")
        return rundir.STOPPED
    return int("failed" in states)


def run_all(runs: list[Run], places: list[dict], folder: Path, stop: rundir.StopSignal) -> int:
    """Checks what the runs need, holds the folder, and returns the exit code."""
    settings, find = {}, cache(checkpoint.find)  # nothing is made before data and weights are known to be good
    for run in runs:
        path, base = folder / run.name, run.config.init_from
        rundir.check_writable(path / f"{run.name}.log")  # which lies in the folder, but no name is longer
        dataset, *_ = open_data(run.config.data, run.config.sequence_length, run.gpt_config.vocab_size)
        settings[run.name] = result_settings(run.config, run.gpt_config) | {"data": dataset.fingerprint}
        if base is not None and not checkpoint.list_checkpoints(path):
            newest = find(base, str(folder) if os.path.isdir(folder / base) else run.config.out_dir)
            with torch.device("meta"):
                checkpoint.check_weights(newest, GPT(run.gpt_config))
    held = rundir.RunDir(folder)
    held.open()
    try:
        with rundir.writing(folder):
            return report(sweep(runs, settings, places, folder, stop), folder)
    finally:
        held.lock.close()


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    options, others = tyro.cli(SweepConfig, args=arguments, description=__doc__.strip(), return_unknown_args=True,
                               config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
    stop = rundir.StopSignal(distributed=False)
    try:
        if train_gpt2.WORLD_SIZE > 1:
            raise BadOption("each run of a sweep is one process: start it without torchrun")
        if options.name and options.out_dir:
            raise BadOption("--name is the folder's under runs, --out_dir a folder elsewhere: give one of them")
        swept = swept_fields(options, others)
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as beside:  # this process stays off the GPUs
            runs, places = beside.submit(plan_runs, swept, others, options.slots).result()
        folder = Path(options.out_dir or Path("runs") / (options.name or sweep_name(swept, runs)))
        if options.dry_run:
            for run in runs:
                print0(f"{run.name}: {shlex.join(run.arguments)}")
            print0(f"{len(runs)} runs, {len(places)} at a time, in {folder}")
            return rundir.DONE
        return run_all(runs, places, folder, stop)
    except (ValueError, rundir.CannotWrite, rundir.RunDirInUse, rundir.NoValidCheckpoint) as error:
        print0(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", rundir.BAD_OPTION)


if __name__ == "__main__":
    sys.exit(main())
