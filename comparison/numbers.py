"""
The numbers of compare.py, as --json has them: groups at equal tokens, time and FLOPs, each tested against another; the
way to a loss; learning rates. A line is all runs that differ in RATES and in their seed only.
"""

import math
from dataclasses import asdict

import numpy as np

from comparison import significance
from comparison.groups import RATES, Group, by_rate, meeting_point
from comparison.results import finite_median
from comparison.significance import Comparison

AXES = ("tokens", "time_s", "flops")
USABLE = 0.1  # nats above the best rate's loss


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
    """All groups at the point of this axis where they meet, and each but the first against its opponent."""
    x = meeting_point([run for group in groups for run in group.runs], axis)
    rows = [summary(group, axis, x) for group in groups]
    losses = [list(row["val_loss"].values()) for row in rows]
    (noise, freedom), unequal = significance.noise_floor(losses), significance.unequal_spread(losses)
    pairs = [(rows[i], row) for i, row in zip(opponents(groups), rows[1:], strict=True)]
    against = corrected([tested(a, b, noise if unequal is None else None) for a, b in pairs])
    by_noise = significance.holm([
        significance.p_by_noise(row["difference"], len(a["val_loss"]), len(b["val_loss"]), noise, freedom)
        if row["p"] is not None and unequal is None else None for row, (a, b) in zip(against, pairs, strict=True)])
    against = [row | {"p_by_noise_holm": p} for row, p in zip(against, by_noise, strict=True)]
    shown = {n: significance.smallest_difference(noise, n, n) for n in (3, 5, 10)}
    return {"at": x, "set_by": set_by(groups, x) if axis == "tokens" else [], "groups": rows,
            "against": against, "noise": noise, "freedom": freedom, "unequal_spread": unequal,
            "noise_interval": significance.noise_interval(noise, freedom), "shown_by_seeds": shown}


def set_by(groups: list[Group], tokens: float) -> list[str]:
    """The runs that were evaluated there last, where others came further: they set this point for all."""
    last = [(run.name, run.evaluations("tokens")[-1]) for group in groups for run in group.sound
            if len(run.evaluations("tokens"))]
    return [name for name, place in last if place == tokens < max(place for _, place in last)]


def opponents(groups: list[Group]) -> list[int]:
    """
    For each group but the first, which one it is tested against, so that two models are not called different for their
    learning rates: the one of the first group's line with the same rates, else, and within that line, the first.
    """
    parts = [[{name: value for name, value in group.runs[0].settings.items() if (name in RATES) == of_rates}
              for of_rates in (False, True)] for group in groups]
    line = parts[0][0]
    return [0 if its == line or [line, rates] not in parts else parts.index([line, rates]) for its, rates in parts[1:]]


def tested(a: dict, b: dict, noise: float | None = None) -> dict:
    """b against a, each as `summary` has it; no test where runs diverged, since the others would be a selection."""
    why_not = [f"{one['diverged']} of {one['seeds']} diverged: {one['label']}" for one in (a, b) if one["diverged"]]
    why_not = why_not or [f"no loss of {one['label']} at this point" for one in (a, b) if not one["val_loss"]]
    found = Comparison(why_not="; ".join(why_not)) if why_not else significance.compare(
        a["val_loss"], b["val_loss"], noise)
    return {"label": b["label"], "against": a["label"]} | asdict(found)


def corrected(tests: list[dict]) -> list[dict]:
    """With p by Holm for their number, and the verdict by that."""
    for row, p in zip(tests, significance.holm([row["p"] for row in tests]), strict=True):
        row["p_holm"] = p
        row["verdict"] = ("-" if p is None else "not shown" if p >= significance.ALPHA else
                          "better" if row["difference"] < 0 else "worse")
    return tests


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


def over_rates(groups: list[Group], name: str, tokens: float) -> list[dict]:
    """
    How the loss after these tokens depends on this learning rate, for runs that differ in nothing else, by the seeds
    that ran at all rates, at least three and none of them 0. A run that diverged has the loss of a guess, ln V; none
    counts as higher. The first row's best rate is what those of the others are tested against. The noise of a seed's
    own curve makes its usable range narrower and its sensitivity higher: `_by_seed` is to be seen, not to be tested.
    """
    rows, best = [], []
    for line, at_rates in by_rate([run for group in groups for run in group.runs], name):
        rates, guess, curves = [group.runs[0].settings[name] for group in at_rates], line.runs[0].guess, {}
        for seed in sorted(set.intersection(*({run.seed for run in group.runs} for group in at_rates))):
            there = [next(run for run in group.runs if run.seed == seed) for group in at_rates]
            losses = [guess if run.diverged else np.minimum(run.at("tokens", tokens), guess) for run in there]
            if all(map(math.isfinite, losses)):
                curves[seed] = losses
        if len(rates) < 3 or rates[0] == 0 or not curves or np.min(list(curves.values())) == guess:
            continue
        losses = np.mean(list(curves.values()), axis=0)
        low, high = usable_rates(rates, losses)
        ranges, i = [usable_rates(rates, curve) for curve in curves.values()], int(np.argmin(losses))
        rows.append({
            "label": line.label, "seeds": len(curves), "rates": rates, "val_loss": list(map(float, losses)),
            "best_rate": rates[i], "low": low, "high": high,
            "decades": math.log10(high / low), "decades_by_seed": [math.log10(to / start) for start, to in ranges],
            "sensitivity": float(np.mean(losses) - min(losses)),
            "sensitivity_by_seed": [float(np.mean(curve) - min(curve)) for curve in curves.values()],
            "diverged": line.n_diverged, "runs": len(line.runs),
            "spikes": sum(int(run.spikes.sum()) for run in line.runs), "best_against": None,
        })
        best.append({"label": line.label, "seeds": len(at_rates[i].runs), "diverged": at_rates[i].n_diverged,
                     "val_loss": {seed: curve[i] for seed, curve in curves.items()}})
    tests = corrected([tested(best[0], row) for row in best[1:]])
    for row, test in zip(rows[1:], tests, strict=True):
        row["best_against"] = test
    return rows
