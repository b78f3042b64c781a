"""
Runs side by side: is one better, and is that more than noise?

    python compare.py RUNS...                        tables, in Markdown
    python compare.py RUNS... --plots DIR            and plots
    python compare.py --card RUN                     what there is to believe one run by

Runs that differ in their seed only are a group, and each group is compared with the first one: at equal tokens (the
most that all runs were evaluated at; the last evaluation at or before), at equal training time and at equal FLOPs (the
least at which a run was last evaluated; on the straight line between two evaluations). Training time has no
compilation, evaluation or saving in it; FLOPs are tokens x model.flops_per_token. A run that diverged, whose loss or
gradient was not finite, sets none of these points and has no loss, but it counts: a group with such a run is not
tested. Where a learning rate has three values or more, another table has its usable range, in which the loss is at most
0.1 above the best one, and its sensitivity, the mean over the rates less the best (arXiv 2309.14322). The tests are in
comparison/significance.py, what a loss spike is in comparison/results.py.

Exit codes: 0 done, 2 bad option, unknown run, or runs that cannot be compared, 5 cannot write, 130 Ctrl-C.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from comparison import significance
from comparison.plots import plot_all
from comparison.report import card, print_report
from comparison.results import (
    RATES,
    USABLE,
    Group,
    Run,
    by_rate,
    check_comparable,
    find_runs,
    finite_median,
    group_runs,
    read_run,
)
from files import write_text
from rundir import BAD_OPTION, DONE, INTERRUPTED, BadOption, CannotWrite, writing

AXES = ("tokens", "time_s", "flops")


@dataclass(frozen=True)
class CompareConfig:
    """What to compare."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """names of runs, paths of their directories, or folders that hold runs"""
    baseline: str | None = None
    """the group with which the others are compared: as the tables name it, or one of its runs; None: the first"""
    target_loss: float | None = None
    """also tokens and training time until the validation loss was this low"""
    plots: Path | None = None
    """write PNG plots into this folder; with --card into a folder in it that is named as the run"""
    json: Path | None = None
    """write the numbers into this file"""
    card: bool = False
    """show what is known of each run instead; with `--plots runs` its plots go into its own directory"""
    out_dir: str = "runs"
    """where run directories are"""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("no runs: name some, or the folder that holds them")
        if self.target_loss is not None and not 0 < self.target_loss < 100:
            raise ValueError(f"target_loss={self.target_loss} must lie between 0 and 100 nats")
        if self.card and (self.baseline or self.target_loss or self.json):
            raise ValueError("card shows runs one by one: baseline, target_loss and json do not go with it")


# -----------------------------------------------------------------------------
# numbers


def summary(group: Group, axis: str, x: float) -> dict:
    """The group at this point: losses of its sound runs, if all have one there, by seed, and their mean and spread."""
    there = group.sound if all(math.isfinite(run.at(axis, x)) for run in group.sound) else []
    losses = {run.seed: run.at(axis, x) for run in there}
    values = list(losses.values())
    planned = [run.settings["max_steps"] * run.settings["total_batch_tokens"] for run in there]
    return {
        "label": group.label, "seeds": len(group.runs), "diverged": group.n_diverged, "val_loss": losses,
        "mean": mean(values), "std": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        "bits_per_byte": mean([run.at(axis, x, "bits_per_byte") for run in there]),
        "schedule": mean([run.at(axis, x, "tokens") / tokens for run, tokens in zip(there, planned, strict=True)]),
        "tokens_per_s": mean([finite_median(run.log["tokens_per_s"]) for run in group.runs]),
        "peak_mib": max((mib for run in group.runs for mib in run.log["peak_mib"] if mib > 0), default=math.nan),
        "spikes": [int(run.spikes.sum()) for run in group.runs],
    }


def mean(values: list[float]) -> float:
    """Of what is finite; nan if nothing is."""
    values = [value for value in values if math.isfinite(value)]
    return math.fsum(values) / len(values) if values else math.nan


def compare_at(axis: str, groups: list[Group]) -> dict:
    """All groups at the point of this axis that all sound runs have come to, and each against the first."""
    x = min((run.evaluations(axis)[-1] for group in groups for run in group.sound), default=math.nan)
    rows = [summary(group, axis, x) for group in groups]
    noise, freedom = significance.noise_floor([list(row["val_loss"].values()) for row in rows])
    baseline, against = rows[0], []
    for row in rows[1:]:
        lost = [f"{one['diverged']} of {one['seeds']} diverged: {one['label']}" for one in (baseline, row)
                if one["diverged"]]
        found = significance.compare(baseline["val_loss"], row["val_loss"])
        if lost:
            found = significance.Comparison(why_not="; ".join(lost))
        against.append({"label": row["label"]} | asdict(found))
    for row, p in zip(against, significance.holm([row["p"] for row in against]), strict=True):
        row["p_holm"] = p
        row["verdict"] = ("-" if p is None else "not shown" if p >= significance.ALPHA else
                          "better" if row["difference"] < 0 else "worse")
    shown = {n: significance.smallest_difference(noise, n, n) for n in (3, 5, 10)}
    return {"at": x, "groups": rows, "against": against, "noise": noise, "freedom": freedom, "shown_by_seeds": shown}


def reaching(groups: list[Group], loss: float) -> list[dict]:
    """How many runs of each group had this validation loss, and after how many tokens and s."""
    rows = []
    for group in groups:
        reached = [pair for pair in (run.reaches(loss) for run in group.runs) if math.isfinite(pair[0])]
        tokens, times = zip(*reached, strict=True) if reached else ((math.nan,), (math.nan,))
        rows.append({"label": group.label, "seeds": len(group.runs), "reached": len(reached), "tokens": mean(tokens),
                     "time_s": mean(times), "time_s_from": min(times), "time_s_to": max(times)})
    return rows


def usable_rates(rates: list[float], losses: list[float]) -> tuple[float, float]:
    """
    From where to where the loss is at most USABLE above the lowest, around that one: on the straight line between two
    rates, by their logarithm; an end of the rates where it is so up to there.
    """
    x, limit = np.log(rates), min(losses) + USABLE
    ends = []
    for step in -1, 1:
        i = int(np.argmin(losses))
        while 0 <= i + step < len(x) and losses[i + step] <= limit:
            i += step
        inside = 0 <= i + step < len(x)  # then it crosses the limit before the next rate
        part = (limit - losses[i]) / (losses[i + step] - losses[i]) if inside else 0.0
        ends.append(math.exp(x[i] + part * (x[i + step] - x[i])) if inside else rates[i])
    return tuple(ends)


def over_rates(runs: list[Run], name: str, tokens: float) -> list[dict]:
    """
    How the loss after these tokens depends on this learning rate, for runs that differ in nothing else, by the seeds
    that ran at all rates, at least three. A run that diverged has the loss of a guess, ln V; none counts as higher.
    """
    rows = []
    for line, groups in by_rate(runs, name):
        rates = [group.runs[0].settings[name] for group in groups]
        guess, curves = math.log(line.runs[0].gpt_config.vocab_size), []
        for seed in sorted(set.intersection(*({run.seed for run in group.runs} for group in groups))):
            there = [next(run for run in group.runs if run.seed == seed) for group in groups]
            losses = [guess if run.diverged else min(guess, run.at("tokens", tokens)) for run in there]
            if all(map(math.isfinite, losses)):
                curves.append(losses)
        if len(rates) < 3 or not curves or np.min(curves) == guess:
            continue
        losses = np.mean(curves, axis=0)
        low, high = usable_rates(rates, losses)
        ranges = [usable_rates(rates, curve) for curve in curves]
        rows.append({
            "label": line.label, "seeds": len(curves), "rates": rates, "val_loss": list(map(float, losses)),
            "best_rate": rates[int(np.argmin(losses))], "low": low, "high": high,
            "decades": [math.log10(to / start) for start, to in ranges],
            "sensitivity": [float(np.mean(curve) - min(curve)) for curve in curves],
            "diverged": line.n_diverged, "runs": len(line.runs),
            "spikes": sum(int(run.spikes.sum()) for run in line.runs),
        })
    return rows


def notes(runs: list[Run]) -> list[str]:
    """What one has to know before one believes the tables."""
    found = [note for run in runs for note in run.notes]
    found += [f"unfinished: {run.name} ({run.end})" for run in runs if not run.finished and not run.diverged]
    found += [f"diverged: {run.name} ({run.end})" for run in runs if run.diverged]
    devices = {f"{run.config.get('processes', 1)} x {run.config['versions']['device']}" for run in runs}
    if len(devices) > 1:
        found.append(f"training times and tokens/s are of different machines: {', '.join(sorted(devices))}")
    return found


def for_json(value):
    """JSON has no nan and no infinity: null."""
    if isinstance(value, dict):
        return {str(key): for_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [for_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -----------------------------------------------------------------------------
# command


def choose_baseline(groups: list[Group], name: str | None) -> list[Group]:
    """The groups with this one first; BadOption, with their labels, if it is none of them."""
    chosen = next((group for group in groups if name is None or name == group.label
                   or name in [run.name for run in group.runs]), None)
    if chosen is None:
        raise BadOption(f"baseline={name!r} is none of {', '.join(group.label for group in groups)}")
    return [chosen] + [group for group in groups if group is not chosen]


def run(config: CompareConfig):
    """Raises BadOption or CannotWrite."""
    paths = tqdm(find_runs(config.runs, config.out_dir), "reading", delay=1, leave=False, disable=None)
    runs = [read_run(path) for path in paths]
    if config.card:
        for one in runs:
            print(card(one))
            if config.plots:
                plot_all(group_runs([one]), config.plots / one.name)
        return
    check_comparable(runs)
    groups = choose_baseline(group_runs(runs), config.baseline)
    report = {"at_equal": {axis: compare_at(axis, groups) for axis in AXES}, "notes": notes(runs),
              "runs": {group.label: [run.name for run in group.runs] for group in groups}}
    if config.target_loss is not None:
        report |= {"target_loss": config.target_loss, "reaching": reaching(groups, config.target_loss)}
    report["rates"] = {name: over_rates(runs, name, report["at_equal"]["tokens"]["at"]) for name in RATES}
    print_report(report, groups)
    if config.json:
        with writing(config.json):
            write_text(config.json, json.dumps(for_json(report), indent=1) + "\n")
    if config.plots:
        plot_all(groups, config.plots)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        run(tyro.cli(CompareConfig, args=arguments, description=__doc__.strip(), use_underscores=True))
    except (ValueError, CannotWrite) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_OPTION)
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
