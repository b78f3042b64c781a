"""Which runs can be compared, what one has to know before one believes it, and which differ in their seed only."""

import functools
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from comparison.results import Run
from configs.recipes import RESULT_FIELDS
from configs.variants import model_name
from files import read_text
from rundir import BadOption

RATES = ("learning_rate", "embedding_learning_rate", "muon_learning_rate")  # a line of groups differs in one of them
SPEED = ("deterministic", "recompute_gelu")  # options that change the time of a step, not the result


def leave_out(runs: list[Run], folders: dict[Path, Path | None]) -> tuple[list[Run], list[str]]:
    """
    (The runs without those that a folder held and that have nothing to compare yet; a note for each of these). folders:
    as `find_runs` has them. Runs that were named, and those of a folder in which none would be left, stay.
    """
    some = {folders[run.path] for run in runs if run.comparable} - {None}
    stays = [run.comparable or folders[run.path] not in some for run in runs]
    return list(compress(runs, stays)), [f"left out: {run.name}: no validation loss yet ({why_none(run)})"
                                         for run, stay in zip(runs, stays, strict=True) if not stay]


def why_none(run: Run) -> str:
    return str(run.status.get("reason") or "it has just begun, or was killed")


def check_comparable(runs: list[Run]):
    """BadOption, with the reason, unless the validation losses of these runs measure the same."""
    seen = {}
    for run in runs:
        if not run.comparable and not run.last_step:
            raise BadOption(f"{run.path / 'metrics.jsonl'} has no update in it ({why_none(run)})")
        if not run.comparable:
            raise BadOption(f"{run.path} has no validation loss ({why_none(run)}): "
                            "a run is evaluated every --val_every steps")
        twin = seen.setdefault((json.dumps(run.settings, sort_keys=True), run.seed), run)
        if twin is not run:
            raise BadOption(f"{twin.path} and {run.path} have the same settings and seed: name one of them, for a "
                            "repetition is not another seed, or lay runs of edited code into another folder "
                            "(--out_dir) and compare --by_folder")
    same = {"were trained on different data": lambda run: run.config["settings"]["data"],
            "have different tokenizers": lambda run: run.config.get("tokenizer"),
            "have different sequence lengths": lambda run: run.config["settings"]["sequence_length"],
            "were validated on different numbers of targets": lambda run: run.val_targets}
    for what, value in same.items():
        other = next((run for run in runs if value(run) != value(runs[0])), None)
        if other:
            raise BadOption(f"{runs[0].path} and {other.path} {what} ({value(runs[0])!s:.16} and "
                            f"{value(other)!s:.16}): their validation losses cannot be compared")


def notes(runs: list[Run]) -> list[str]:
    """What one has to know before one believes a comparison of these runs."""
    found = [note for run in runs for note in run.notes]
    found += [f"unfinished: {run.name} ({run.end})" for run in runs if not run.finished and not run.diverged]
    found += [f"diverged: {run.name} ({run.end})" for run in runs if run.diverged]
    if math.isnan(meeting_point(runs, "tokens")) and not all(run.diverged for run in runs):
        found.append("no losses at equal tokens: all were evaluated at other ones; train them with one --val_every")
    devices = {f"{run.config.get('processes', 1)} x {run.config['versions']['device']}" for run in runs}
    if len(devices) > 1:
        found.append(f"training times and tokens/s are of different machines: {', '.join(sorted(devices))}")
    beside = [as_dict(run.config.get("environment")).get("runs_beside") for run in runs]
    if shared := [n for n in beside if isinstance(n, int) and n > 0]:
        found.append(f"training times and tokens/s of {len(shared)} of {len(runs)} runs were taken with up to "
                     f"{max(shared)} other runs on the same device")
    found += differing("torch", [run.config["versions"].get("torch", "not known") for run in runs])
    execution = [as_dict(run.config.get("kernels")) | {"batch_size": run.config.get("batch_size")}
                 | {name: run.config["train_config"].get(name, "not known") for name in SPEED} for run in runs]
    parts = [part for part in dict.fromkeys(part for one in execution for part in one)
             if len({str(one.get(part)) for one in execution}) > 1]
    found += differing("execution", [", ".join(f"{part} {one.get(part, 'not known')}" for part in parts)
                                     for one in execution])
    return found + differing("code", [commit(run) for run in runs])


def differing(what: str, values: list) -> list[str]:
    """A note that names the values and how many runs have each, if they are not the same."""
    counts = Counter(map(str, values))
    return [f"different {what}: " + "; ".join(f"{value} ({n} of {len(values)} runs)" for value, n in counts.items())
            ] if len(counts) > 1 else []


def commit(run: Run) -> str:
    """The git commit, and a hash of what differed from it when the run began."""
    name, _, changes = read_text(run.path / "source.diff").partition("\n")
    digest = hashlib.sha256(changes.encode()).hexdigest()
    return (name[:10] or "not known") + f" with changes {digest[:8]}" * bool(changes)


def as_dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def meeting_point(runs: list[Run], axis: str) -> float:
    """
    Where these runs are compared, those that diverged apart: by tokens the largest number at which every one was
    evaluated; by time_s or flops the least at which one was evaluated last. nan if there is none.
    """
    places = [run.evaluations(axis) for run in runs if not run.diverged]
    if axis == "tokens" and places:
        places = [functools.reduce(np.intersect1d, places)]
    return float(min((place[-1] for place in places if len(place)), default=math.nan))


@dataclass
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    """what sets it apart from the other groups"""
    runs: list[Run]
    also: str = ""
    """in what else it differs from some of them"""

    @property
    def sound(self) -> list[Run]:
        return [run for run in self.runs if not run.diverged]

    @property
    def n_diverged(self) -> int:
        return len(self.runs) - len(self.sound)


def setting_words(name: str, value) -> str:
    """Of a directory only its name."""
    return Path(str(value)).name if name in ("init_from", "folder") and value else str(value)


def group_runs(runs: list[Run], ignore: tuple[str, ...] = ("seed",)) -> list[Group]:
    """In the order of their first runs. ignore: settings in which the runs of a group may differ."""
    members = {}
    for run in runs:
        key = {name: value for name, value in run.settings.items() if name not in ignore}
        members.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    firsts = [group[0] for group in members.values()]
    differing = [name for name in (*RESULT_FIELDS, "changed", "folder") if name not in ignore
                 and any(run.settings.get(name) != firsts[0].settings.get(name) for run in firsts)]
    models = {model_name(run.gpt_config) for run in firsts}

    def words(run: Run, names: list[str]) -> list[str]:
        return [f"{name}={setting_words(name, run.settings.get(name))}" for name in names]

    def label(run: Run, names: list[str]) -> str:
        return "-".join([model_name(run.gpt_config)] * (len(models) > 1 or not names) + words(run, names))

    told, n_labels = differing, len({label(run, differing) for run in firsts})
    for name in differing[::-1]:  # which the others may tell as well
        rest = [one for one in told if one != name]
        if len({label(run, rest) for run in firsts}) == n_labels:
            told = rest
    left = [name for name in differing if name not in told]
    return [Group(label(group[0], told), group, "-".join(words(group[0], left))) for group in members.values()]


def by_rate(runs: list[Run], name: str) -> list[tuple[Group, list[Group]]]:
    """(All runs that differ in this learning rate and in their seed only, the same by rate from the lowest)."""
    runs = [run for run in runs if run.settings[name] is not None]
    return [] if not runs else [(line, sorted(group_runs(line.runs), key=lambda group: group.runs[0].settings[name]))
            for line in group_runs(runs, ignore=("seed", name))]
