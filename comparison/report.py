"""What compare.py prints, in Markdown: the tables of a comparison, and a run's card."""

import math
import re
from collections.abc import Iterable

import numpy as np

from comparison.groups import Group, as_dict, setting_words
from comparison.numbers import USABLE
from comparison.results import CHANGING, Run, finite_median, model_size
from comparison.significance import ALPHA, MOST_SEEDS
from configs.variants import model_name
from files import read_text

SAME_PART = 0.02  # of a schedule, which matters less than other things
AXES = {"tokens": ("tokens", "{:,.0f}"), "time_s": ("training time", "{:,.1f} s"), "flops": ("FLOPs", "{:.4g}")}


def show(value: float | None, form: str = "{:.4f}") -> str:
    """A dash for what is not known."""
    return "-" if value is None or math.isnan(value) else form.format(value)


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    rows = [list(header), *rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


# -----------------------------------------------------------------------------
# a comparison


def loss_words(row: dict) -> str:
    words = [show(row["mean"]) + (f" ± {row['std']:.4f}" if math.isfinite(row["std"]) else "")]
    if row["diverged"]:
        words.append(f"diverged {row['diverged']} of {row['seeds']}")
    return ", ".join(words)


def results_table(found: dict) -> str:
    header = ["", "seeds", "validation loss", "bits per byte", "of its steps", "tokens/s", "peak MiB", "loss spikes"]
    return table(header, [
        [f"`{row['label']}`", row["seeds"], loss_words(row), show(row["bits_per_byte"]),
         show(row["schedule"], "{:.0%}"), show(row["tokens_per_s"], "{:,.0f}"), show(row["peak_mib"], "{:,.0f}"),
         sum(row["spikes"])] for row in found["groups"]])


def against_table(found: dict) -> str:
    """With a column that names what each row is tested against, unless that is the same for all."""
    others = list(dict.fromkeys(row["against"] for row in found["against"]))
    first = [f"against `{others[0]}`"] if len(others) == 1 else ["", "against"]
    header = [*first, "difference, 95 % interval", "p (Welch)", "p (Holm)", "verdict", "paired difference",
              "p (paired seeds)", "smallest to show", "seeds for this difference"]
    rows = []
    for row in found["against"]:
        names = [f"`{row[name]}`" for name in ("label", "against")]
        paired = "" if row["paired_p"] is None else f" ({row['n_pairs']})"
        seeds = f"over {MOST_SEEDS:,}" if row["seeds_needed"] == math.inf else show(row["seeds_needed"], "{:,.0f}")
        rows.append([*names[:len(first)], difference(row), show(row["p"], "{:.2g}"), show(row["p_holm"], "{:.2g}"),
                     row["verdict"], show(row["paired_difference"], "{:+.4f}"),
                     show(row["paired_p"], "{:.2g}") + paired, show(row["smallest"]), seeds])
    return table(header, rows)


def difference(row: dict) -> str:
    """With its 95 % interval, if there is one."""
    interval = "" if row["low"] is None else f" ({row['low']:+.4f} to {row['high']:+.4f})"
    return show(row["difference"], "{:+.4f}") + interval


def rates_table(name: str, rows: list[dict]) -> str:
    header = [name.replace("_", " "), "seeds", "rates", "best", "loss there", "usable", "decades", "sensitivity",
              "diverged", "loss spikes"]
    header += [f"at its best against `{rows[0]['label']}` at its best", "p (Welch, Holm)"] * (len(rows) > 1)
    cells = []
    for row in rows:
        test = row["best_against"]
        cells.append([
            f"`{row['label']}`", row["seeds"], f"{len(row['rates'])}, {row['rates'][0]:g} to {row['rates'][-1]:g}",
            f"{row['best_rate']:g}", show(min(row["val_loss"])), ends(row), with_range(row, "decades", "{:.2f}"),
            with_range(row, "sensitivity", "{:.3f}"), f"{row['diverged']} of {row['runs']}", row["spikes"],
            *([difference(test), show(test["p_holm"], "{:.2g}")] if test else ["-", "-"] * (len(rows) > 1))])
    return table(header, cells)


def ends(row: dict) -> str:
    """The usable range; in words where it may be wider than the rates."""
    low, high = row["low"], row["high"]
    return (f"{low:.2g}" + " or less" * (low == row["rates"][0]) + f" to {high:.2g}"
            + " or more" * (high == row["rates"][-1]))


def with_range(row: dict, name: str, form: str) -> str:
    """Of the mean curve, and from least to most of the seeds' own curves."""
    seeds = row[f"{name}_by_seed"]
    words = form.format(row[name])
    return words + (f" ({form.format(min(seeds))} to {form.format(max(seeds))})" if len(seeds) > 1 else "")


def below(found: dict) -> Iterable[str]:
    """What the tables do not say."""
    if found["set_by"]:
        yield f"No further than here came {', '.join(f'`{name}`' for name in found['set_by'])}."
    parts = [row["schedule"] for row in found["groups"] if math.isfinite(row["schedule"])]
    if parts and max(parts) - min(parts) > SAME_PART:
        yield (f"Here the groups have done {min(parts):.0%} to {max(parts):.0%} of their steps. In mid-schedule the "
               "learning rate, and with it the loss, is higher than at the end: part of a difference may be that.")
    if found["unequal_spread"] is not None:
        spreads = [row["std"] for row in found["groups"] if math.isfinite(row["std"])]
        yield (f"No noise floor: the spread over seeds differs between the groups, {min(spreads):.4f} to "
               f"{max(spreads):.4f} (Bartlett's test, p = {found['unequal_spread']:.2g}).")
    elif found["freedom"]:
        low, high = found["noise_interval"]
        yield (f"Noise floor: {found['noise']:.4f} (95 % interval {low:.4f} to {high:.4f}), the standard deviation "
               f"over seeds pooled over the groups ({found['freedom']} degrees of freedom). With it, a true difference "
               "is shown by "
               + ", ".join(f"{n} seeds of each if it is {difference:.4f}"
                           for n, difference in found["shown_by_seeds"].items()) + ".")
    for row in found["against"]:
        if row["why_not"]:
            yield f"No p-value for `{row['label']}`: {row['why_not']}."
    for row in found["against"]:
        if row["verdict"] in ("better", "worse") and (row["p_by_noise_holm"] or 0) >= ALPHA:
            yield (f"`{row['label']}`: {row['verdict']} by Welch's test, but not shown by the noise floor "
                   f"(p = {row['p_by_noise_holm']:.2g}, Holm): seeds agree better in these two groups than in others.")
    if n_tests := sum(row["p"] is not None for row in found["against"]):
        yield (f"Comparisons: {n_tests}; the verdict goes by Holm's correction of Welch's test for that number. To "
               "show is to find it at p < 0.05 in 80 of 100 cases; smallest to show and seeds for this difference go "
               "by " + ("the noise floor" if found["unequal_spread"] is None else "the spread of the two groups")
               + ("." if n_tests == 1 else ", for one comparison: to show it among several takes more."))


def print_report(report: dict, groups: list[Group]):
    first, runs = groups[0].runs[0], [run for group in groups for run in group.runs]
    T = first.config["settings"]["sequence_length"]
    print(f"Runs: {len(runs)}, groups: {len(groups)}, trained on {first.data} "
          f"({first.config['settings']['data'][:12]}), T = {T:,}, validated on {first.val_targets:,} targets. "
          "Loss in nats, mean ± standard deviation over seeds.")
    for also in dict.fromkeys(group.also for group in groups if group.also):
        print(f"- `{also}`: " + ", ".join(f"`{group.label}`" for group in groups if group.also == also))
    for axis, (words, form) in AXES.items():
        found = report["at_equal"][axis]
        sizes = {model_size(run.gpt_config, T)[1] for run in runs}
        if axis == "flops" and all(size * report["at_equal"]["tokens"]["at"] == found["at"] for size in sizes):
            print("\nAt equal FLOPs: as at equal tokens, since all spend the same on each.")
            continue
        if axis != "tokens" and not any(row["val_loss"] or row["diverged"] for row in found["groups"]):
            print(f"\nAt equal {words}: by {show(found['at'], form)} no group had been evaluated in all its runs.")
            continue
        print(f"\n### At equal {words}: {show(found['at'], form)}\n\n{results_table(found)}")
        if found["against"]:
            print(against_table(found))
        print("\n".join(below(found)))
    for name, rows in report["rates"].items():
        if rows:
            print(f"\n### Over the {name.replace('_', ' ')}, at equal tokens\n\n{rates_table(name, rows)}")
            print(f"Usable: the loss is at most {USABLE:g} above the best. Sensitivity: its mean over the rates less "
                  "the best. Both of the mean over seeds, in brackets of the seeds' own curves, whose noise makes "
                  "a range narrower on average; a run that diverged counts as a guess, ln V."
                  + " The best rate was chosen by the same runs that are compared at it, which favours a line with "
                    "more rates or more noise." * (len(rows) > 1))
    if "target_loss" in report:
        print(f"\n### Until validation loss {report['target_loss']:g}\n")
        print(table(["", "seeds", "reached by", "tokens", "training time, s"], [
            [f"`{row['label']}`", row["seeds"], row["reached"] or "not reached", show(row["tokens"], "{:,.0f}"),
             show(row["time_s"], "{:,.1f}") + (f" ({row['time_s_from']:,.1f} to {row['time_s_to']:,.1f})"
                                               if row["reached"] > 1 else "")] for row in report["reaching"]]), end="")
    if report["notes"]:
        print("\n" + "\n".join(f"- {note}" for note in report["notes"]))


# -----------------------------------------------------------------------------
# a card


def card(run: Run) -> str:
    """Whatever the run's directory says about it, but for places on the machine."""
    config, settings = run.config, run.config["settings"]
    n_params, flops_per_token = model_size(run.gpt_config, settings["sequence_length"])
    code, shards = run.status.get("code"), as_dict(config.get("shards"))
    rows = {
        "end": run.end + ("" if code is None else f", exit code {code}"),
        "model": f"{model_name(run.gpt_config)}: {n_params:,} parameters, {flops_per_token:,} FLOPs per token",
        "data": f"{run.data}, fingerprint {settings['data']}, tokenizer {config.get('tokenizer') or 'not known'}",
        "update": f"{settings['total_batch_tokens']:,} tokens: {config.get('processes')} processes, micro-steps of "
                  f"{config.get('batch_size')} sequences of {settings['sequence_length']:,} tokens",
        "seed": run.seed,
        "code": "; ".join(source(path) for path in sorted(run.path.glob("source*.diff"))),
        "versions": listed(config["versions"]),
        "environment": listed(as_dict(config.get("environment"))),
        "kernels": listed(as_dict(config.get("kernels"))),
        **{f"went on, {name}": changes(config, then) for name, then in run.later.items()},
        **outcome(run),
        "notes": "; ".join(run.notes),
    }
    trained_with = [(name, setting_words(name, value)) for name, value in run.settings.items()]
    parts = [f"# {run.name}\n", table(["", ""], [(name, words) for name, words in rows.items() if words != ""]),
             "## Settings\n", table(["setting", "value"], trained_with)]
    if shards:
        parts += ["## Shards\n", table(["file", "sha256"], shards.items())]
    return "\n".join(parts)


def outcome(run: Run) -> dict[str, str]:
    """Loss, time, speed and memory, from metrics.jsonl."""
    log, losses, steps = run.log, run.evaluations("val_loss"), run.evaluations("step")
    if not len(log["step"]):
        return {"updates": "none"}
    found = {"training": f"{log['tokens'][-1]:,.0f} tokens in {log['time_s'][-1]:,.1f} s, the last loss "
                         f"{log['loss'][-1]:.4f}, {run.spikes.sum()} loss spikes",
             "gradient norm": f"median {finite_median(log['grad_norm']):.3g}, last {log['grad_norm'][-1]:.3g}"}
    if len(losses):
        bits = run.evaluations("bits_per_byte")[-1]
        found["validation loss"] = (
            f"{losses[-1]:.4f} at step {steps[-1]:,.0f}" + f", {bits:.4f} bits per byte" * math.isfinite(bits)
            + f", lowest {losses.min():.4f} at step {steps[losses.argmin()]:,.0f}, on {run.val_targets:,} targets")
    found["speed"] = ", ".join(
        form.format(finite_median(log[name])) for name, form in
        {"tokens_per_s": "{:,.0f} tokens/s", "step_ms": "{:,.1f} ms a step", "mfu": "{:.1%} MFU"}.items()
        if np.isfinite(log[name]).any()) + " in the median"
    if np.isfinite(log["peak_mib"]).any():
        found["peak memory"] = f"{np.nanmax(log['peak_mib']):,.0f} MiB"
    return found


def changes(config: dict, later: dict) -> str:
    """What a config-<step>.json has otherwise than config.json, of what is compared (CHANGING)."""
    words = []
    for part in CHANGING:
        old, new = (one.get(part) if isinstance(one.get(part), dict) else {part: one.get(part)}
                    for one in (config, later))
        words += [f"{name} {setting_words(name, old.get(name))} -> {setting_words(name, new.get(name))}"
                  for name in old | new if old.get(name) != new.get(name)]
    return ", ".join(words)


def source(path) -> str:
    """The commit, and how much differs from it."""
    commit, _, diff = read_text(path).partition("\n")
    n_lines = len(re.findall(r"^(?:\+(?!\+\+ )|-(?!-- ))", diff, re.MULTILINE))
    return f"{commit[:40] or 'no git checkout'}" + (f" and {n_lines} changed lines" if diff else "") + f" ({path.name})"


def listed(values: dict) -> str:
    return ", ".join(f"{name} {listed(value) if isinstance(value, dict) else value}"
                     for name, value in values.items() if value not in (None, ""))
