"""
Plots of compare.py: small PNG files. A band reaches from the lowest to the highest seed. A loss above 1.25 ln V, a
quarter more than that of a model that guesses, is drawn there; a run that diverged has a cross at the top.
"""

import math
from functools import partial
from pathlib import Path
from textwrap import fill

import numpy as np
from tqdm import tqdm

from comparison.groups import RATES, Group, by_rate, meeting_point
from rundir import writing

FEW = 10  # groups that the standard colours can tell apart


def plot_all(groups: list[Group], folder: Path):
    """
    loss_over_tokens.png, loss_over_time.png, stability.png, and, where there are losses at equal tokens, one for each
    learning rate that is not constant.
    """
    todo = [partial(plot_loss, groups, "tokens", "training tokens", folder / "loss_over_tokens.png"),
            partial(plot_loss, groups, "time_s", "training time, s", folder / "loss_over_time.png"),
            partial(plot_stability, groups, folder / "stability.png")]
    tokens = meeting_point([run for group in groups for run in group.runs], "tokens")
    todo += [partial(plot_rates, groups, name, tokens, folder / f"{name}.png") for name in RATES
             if len({group.runs[0].settings[name] for group in groups}) > 1 and math.isfinite(tokens)]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for plot in tqdm(todo, "plotting", delay=1, leave=False, disable=None):
            plot()


def colour(i: int, n: int):
    from matplotlib import colormaps  # half a second, where it is used

    return f"C{i}" if n <= FEW else colormaps["viridis"](i / (n - 1))


def figure(n_labels: int, n_panels: int = 1):
    """(Figure, its panels one above the other), with room for a legend below."""
    from matplotlib.figure import Figure

    canvas = Figure((6.4, 1 + 3 * n_panels + 0.2 * min(n_labels, 2 * FEW)), layout="constrained", dpi=100)
    return canvas, canvas.subplots(n_panels, 1, sharex=True, squeeze=False)[:, 0]


def cut(losses, group: Group):
    """A run that diverges has losses of 1e20 before it ends."""
    return np.minimum(losses, 1.25 * group.runs[0].guess)


def finish(canvas, axes, path: Path):
    """Grid, a legend of what has a label, and the file."""
    from matplotlib.ticker import EngFormatter

    for panel in axes:
        panel.grid(alpha=0.3)
        if "tokens" in panel.get_xlabel():
            panel.xaxis.set_major_formatter(EngFormatter(sep=" "))
    handles, labels = axes[0].get_legend_handles_labels()
    labels = [fill(label, 90) for label in labels]
    canvas.legend(handles, labels, loc="outside lower center", ncols=1 if max(map(len, labels), default=0) > 35 else 2,
                  fontsize=8)
    canvas.savefig(path, pil_kwargs={"optimize": True})


def draw(panel, x, values: list, **look):
    """A line through the means, and a band over the ranges, of each x's values, one a seed."""
    panel.plot(x, [np.mean(some) for some in values], markersize=4, **look)
    panel.fill_between(x, [min(some) for some in values], [max(some) for some in values], color=look["color"],
                       alpha=0.2, linewidth=0)


def plot_loss(groups: list[Group], axis: str, name: str, path: Path):
    """Validation loss at each evaluation, the mean of the seeds that came to it; below, its distance from the first."""
    compared = len(groups) > 1 and bool(groups[0].sound)
    canvas, axes = figure(len(groups), n_panels=1 + compared)
    for i, group in enumerate(groups):
        curves = {}  # (x, loss) of each run, by step
        for run in group.runs:
            for step, x, loss in zip(*map(run.evaluations, ("step", axis, "val_loss")), strict=True):
                curves.setdefault(step, []).append((x, cut(loss, group)))
        points = [np.array(curves[step]) for step in sorted(curves)]
        look = {"color": colour(i, len(groups)), "marker": ".",
                "label": f"{group.label}, {len(group.runs)} seed" + "s" * (len(group.runs) > 1)}
        draw(axes[0], [point[:, 0].mean() for point in points], [point[:, 1] for point in points], **look)
        for run in group.runs:
            if run.diverged and len(run.log[axis]):
                axes[0].plot(run.log[axis][-1], 0.97, "x", color=look["color"], transform=axes[0].get_xaxis_transform())
    axes[0].set(ylabel="validation loss, nats", title="Mean and range of the seeds (x: diverged)")
    if compared:
        plot_difference(groups, axis, axes[1])
    axes[-1].set(xlabel=name)
    finish(canvas, axes, path)


def plot_difference(groups: list[Group], axis: str, panel):
    """
    Validation loss of each run that did not diverge less the mean of the first group, where a run of that was
    evaluated, to the scale of the second half: there the lines of the losses lie upon one another.
    """
    places, mean, late = groups[0].sound[0].evaluations(axis), None, []
    for i, group in enumerate(groups):
        if group.sound:
            losses = np.array([[run.at(axis, x) for run in group.sound] for x in places])  # (places, runs)
            mean = losses.mean(axis=1, keepdims=True) if i == 0 else mean
            there = np.isfinite(apart := losses - mean).all(axis=1)
            draw(panel, places[there], list(apart[there]), color=colour(i, len(groups)), marker=".")
            late.append(apart[there & (np.arange(len(places)) >= len(places) // 2)].ravel())
    low, high = np.min(late := np.concatenate(late), initial=0), np.max(late, initial=0)
    if low < high:
        panel.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    first = groups[0].label if len(groups[0].label) <= 40 else "the first of the legend"
    panel.set(ylabel=f"difference from\n{first}")


def plot_stability(groups: list[Group], path: Path):
    """Training loss with its spikes, and the gradient norm, of every run."""
    canvas, axes = figure(len(groups), n_panels=2)
    norms = [run.log["grad_norm"] for group in groups for run in group.sound]
    largest = max((norm[np.isfinite(norm)].max(initial=0) for norm in norms), default=0) or math.inf
    for i, group in enumerate(groups):
        for n, run in enumerate(group.runs):
            look = {"color": colour(i, len(groups)), "linewidth": 0.6, "alpha": 0.8}
            total = f"{group.label}, {sum(run.spikes.sum() for run in group.runs)} loss spikes"
            tokens, loss, where = run.log["tokens"], cut(run.log["loss"], group), run.spikes
            axes[0].plot(tokens, loss, **look, label=None if n else total)
            axes[0].plot(tokens[where], loss[where], "v", color=look["color"], markersize=5)
            axes[1].plot(tokens, np.minimum(run.log["grad_norm"], 3 * largest), **look)
    axes[0].set(ylabel="training loss, nats", title="Every run; triangles are loss spikes")
    axes[1].set(ylabel="gradient norm, before clipping", xlabel="training tokens", yscale="log")
    finish(canvas, axes, path)


def plot_rates(groups: list[Group], name: str, tokens: float, path: Path):
    """
    Validation loss after these tokens over the learning rate, a line for each group that differs in nothing else, and
    the loss spikes of whole runs. A rate at which runs diverged has a cross at the top with their number, and a point
    for those that did not, if any.
    """
    lines = by_rate([run for group in groups for run in group.runs], name)
    canvas, axes = figure(len(lines), n_panels=2)
    for i, (line, rates) in enumerate(lines):
        losses, spikes, look = {}, {}, {"color": colour(i, len(lines))}  # by rate
        for group in rates:
            rate = group.runs[0].settings[name]
            if rate == 0:  # has no place on a logarithmic axis
                continue
            spikes[rate] = [run.spikes.sum() for run in group.runs]
            if group.sound:
                losses[rate] = cut([run.at("tokens", tokens) for run in group.sound], group)
            if group.n_diverged:
                y, above = 0.97 - 0.05 * i, {"transform": axes[0].get_xaxis_transform()} | look  # y: of the height
                axes[0].plot(rate, y, "x", **above)
                axes[0].text(rate, y, f"  {group.n_diverged} of {len(group.runs)}", fontsize=7, va="center", **above)
        draw(axes[0], list(losses), list(losses.values()), marker="o", label=line.label, **look)
        draw(axes[1], list(spikes), list(spikes.values()), marker="o", **look)
    axes[1].set(xlabel=name.replace("_", " "), ylabel="loss spikes in a run")
    axes[1].yaxis.get_major_locator().set_params(integer=True)
    axes[1].set_ylim(-0.05 * (high := max(1.0, axes[1].get_ylim()[1])), high)
    axes[0].set(xscale="log", ylabel="validation loss, nats",
                title=f"After {tokens:,.0f} tokens: mean and range of seeds (x: diverged)")
    axes[0].margins(0.1, 0.1 + 0.03 * len(lines))
    rates = sorted({run.settings[name] for line, _ in lines for run in line.runs} - {0})
    if len(rates) <= FEW:
        axes[0].set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes[0].set_xticks([], minor=True)
    finish(canvas, axes, path)
