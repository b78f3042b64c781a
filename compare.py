"""
Runs side by side: is one better, and is that more than noise?

    python compare.py RUNS...                        tables, in Markdown
    python compare.py RUNS... --plots DIR            and plots
    python compare.py --card RUN                     what there is to believe one run by, and its plots

Runs that differ in their seed only are a group; with --by_folder they also lie in one folder, such as one for each
version of an edited model.py.

Groups are compared at equal tokens (the most at which every run was evaluated), at equal training time and at equal
FLOPs (the least at which a run was last evaluated; on a smooth curve between two evaluations). Training time has no
compilation, evaluation or saving in it; FLOPs are tokens x model.flops_per_token.

Each is compared with the first group; or, if it has another model or other settings, with the group of the first one's
settings and its own learning rates, if there is one. Where a learning rate has three values or more, another table has
its usable range, in which the loss is at most 0.1 above the best one, its sensitivity, the mean over the rates less the
best (arXiv 2309.14322), and the best rates against each other.

A run that diverged, whose loss or gradient was not finite or whose last validation loss is half a nat above ln V, that
of a guess, sets none of these points and has no loss, but it counts: a group with such a run is not tested. Runs of a
folder that have no validation loss yet are left out, and named. The tests are in comparison/significance.py, what a
loss spike is in comparison/results.py.

Exit codes: 0 done, 2 bad option, unknown run, or runs that cannot be compared, 5 cannot write, 130 Ctrl-C.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from comparison.groups import RATES, Group, check_comparable, group_runs, leave_out, notes
from comparison.numbers import AXES, compare_at, over_rates, reaching
from comparison.plots import plot_all
from comparison.report import card, print_report
from comparison.results import Run, find_runs, read_run
from files import for_json, write_json
from rundir import BAD_OPTION, DONE, INTERRUPTED, BadOption, CannotWrite, leave, writing


@dataclass(frozen=True)
class CompareConfig:
    """What to compare."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """names of runs, paths of their directories, or folders that hold runs"""
    by_folder: bool = False
    """runs of different folders are different groups, as before and after an edit of the code"""
    baseline: str | None = None
    """the group that comes first: as the tables name it, or one of its runs; None: that of the first run"""
    target_loss: float | None = None
    """also tokens and training time until the validation loss was this low"""
    plots: Path | None = None
    """write PNG plots into this folder; with --card into a folder in it that is named as the run"""
    json: Path | None = None
    """write the numbers into this file"""
    card: bool = False
    """show what is known of each run instead; its plots go into its own directory, if not into that of --plots"""
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
# command


def choose_baseline(groups: list[Group], name: str | None) -> list[Group]:
    """The groups with this one first; BadOption, with their labels, if it is none of them."""
    chosen = next((group for group in groups if name is None or name == group.label
                   or name in [run.name for run in group.runs]
                   or Path(name).resolve() in [run.path.resolve() for run in group.runs]), None)
    if chosen is None:
        raise BadOption(f"baseline={name!r} is none of {', '.join(group.label for group in groups)}")
    return [chosen] + [group for group in groups if group is not chosen]


def show_card(run: Run, plots: Path | None):
    """A run's card, and its plots into a folder of `plots`, or into its own directory, if that can be written to."""
    print(card(run))
    try:
        if not run.last_step:
            print(f"no plots: {run.name} has no updates", file=sys.stderr)
        else:
            plot_all(group_runs([run]), plots / run.name if plots else run.path)
    except CannotWrite as error:
        if plots:
            raise
        print(f"no plots: {error}", file=sys.stderr)


def run(config: CompareConfig):
    """Raises BadOption or CannotWrite."""
    found = find_runs(config.runs, config.out_dir)
    runs = [read_run(path) for path in tqdm(found, "reading", delay=1, leave=False, disable=None)]
    if config.card:
        for one in runs:
            show_card(one, config.plots)
        return
    for one in runs:
        one.folder = str(one.path.parent) if config.by_folder else None
    runs, left_out = leave_out(runs, found)
    check_comparable(runs)
    groups = choose_baseline(group_runs(runs), config.baseline)
    report = {"at_equal": {axis: compare_at(axis, groups) for axis in AXES}, "notes": left_out + notes(runs),
              "runs": {group.label: [run.name for run in group.runs] for group in groups}}
    if config.target_loss is not None:
        report |= {"target_loss": config.target_loss, "reaching": reaching(groups, config.target_loss)}
    report["rates"] = {name: over_rates(groups, name, report["at_equal"]["tokens"]["at"]) for name in RATES}
    if config.json:
        with writing(config.json):
            write_json(config.json, for_json(report))
    if config.plots:
        plot_all(groups, config.plots)
    print_report(report, groups)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        run(tyro.cli(CompareConfig, args=arguments, description=__doc__.strip(), use_underscores=True))
    except (ValueError, CannotWrite) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_OPTION)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head`
        pass
    return DONE


if __name__ == "__main__":
    leave(main())
