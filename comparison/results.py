"""What the directory of a run says about it."""

import functools
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from configs.recipes import RESULT_FIELDS, TrainConfig, restored
from files import read_text
from model import GPT, GPTConfig
from rundir import DONE, NOT_FINITE, BadOption, directory_of, is_row, parse_object, read_json

DIVERGED = 0.5  # nats above a guess; new weights lie 0.02 to 0.2 above it
SPIKE_WINDOW, SPIKE_START, SPIKE_DEVIATIONS = 50, 20, 7  # steps, steps, standard deviations
MAD_TO_STD = 1.4826  # of a normal distribution: standard deviation / median absolute deviation
NEEDED = {  # of config.json
    "settings": {"data": str, "seed": int, "sequence_length": int, "max_steps": int, "total_batch_tokens": int,
                 "init_from": str | None},
    "train_config": {"data": str, "val_tokens": int}, "versions": {"device": str}, "model_config": {},
}
CHANGING = ("settings", "versions", "processes", "kernels", "val_targets")  # of config.json, in a run that goes on
COLUMNS = ("step", "tokens", "time_s", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "mfu", "peak_mib",
           "val_loss", "bits_per_byte")


@dataclass
class Run:
    """A run, finished or not."""

    path: Path
    config: dict
    """config.json"""
    status: dict
    """status.json; {} while the run goes on, or after a kill"""
    gpt_config: GPTConfig
    log: dict[str, np.ndarray]
    """metrics.jsonl by column, float64 (updates,), nan where there is no value; and flops, spent since the start"""
    not_finite: bool
    """whether a loss or gradient norm in metrics.jsonl is null"""
    later: dict[str, dict]
    """config-<step>.json, by file name, of a run that went on after that step"""
    notes: list[str]
    """what one has to know before one believes it"""
    folder: str | None = None
    """where it lies, if that is to set it apart from runs of other folders"""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def settings(self) -> dict:
        """
        What the result depends on, apart from seed and data, and `changed`, what a run that went on changed of it; what
        an older version did not have is as by default.
        """
        begun = self.config["settings"]
        names = [name for name in RESULT_FIELDS if name not in ("recipe", "data", "seed")]
        found = {name: begun.get(name, getattr(TrainConfig, name)) for name in names} | asdict(self.gpt_config)
        if "init_weights" in begun:  # other weights may have come to lie under the same name
            found["init_from"] = f"{found['init_from']} {str(begun['init_weights'])[:8]}"
        changed = {name: value for later in self.later.values() if isinstance(later.get("settings"), dict)
                   for name, value in later["settings"].items() if value != begun.get(name, found.get(name, value))}
        if changed:
            found["changed"] = ", ".join(f"{name}={value}" for name, value in changed.items())
        return found | ({"folder": self.folder} if self.folder else {})

    @property
    def seed(self) -> int:
        return self.config["settings"]["seed"]

    @property
    def data(self) -> str:
        """Name of the data set."""
        return Path(self.config["train_config"]["data"]).name

    @property
    def val_targets(self) -> int:
        return self.config.get("val_targets", self.config["train_config"]["val_tokens"])

    @property
    def guess(self) -> float:
        """Loss in nats of a model that guesses: ln V."""
        return math.log(self.gpt_config.vocab_size)

    @functools.cached_property
    def worse_than_guess(self) -> bool:
        """By its last validation loss, and by more than weights that have learnt nothing."""
        return bool((self.evaluations("val_loss")[-1:] > self.guess + DIVERGED).any())

    @property
    def diverged(self) -> bool:
        """A loss, a gradient or the weights were not finite, or the last validation loss lies far above a guess."""
        return self.not_finite or self.status.get("code") == NOT_FINITE or self.worse_than_guess

    @property
    def comparable(self) -> bool:
        """It has a validation loss, or diverged before there was one."""
        return self.diverged or len(self.evaluations("step")) > 0

    @property
    def last_step(self) -> int:
        """In metrics.jsonl; 0 before the first update."""
        return int(self.log["step"][-1]) if len(self.log["step"]) else 0

    @property
    def end(self) -> str:
        """How and where it ended, in words."""
        reason = str(self.status.get("reason") or "no status.json: it goes on, or was killed").split(";")[0]
        words = f"step {self.last_step} of {self.settings['max_steps']}, {reason}"
        if self.worse_than_guess:
            words += f", validation loss {self.evaluations('val_loss')[-1]:.4f}, that of a guess is {self.guess:.4f}"
        return words

    @property
    def finished(self) -> bool:
        return self.status.get("reason") == "finished" and self.status.get("code") == DONE

    @functools.cached_property
    def spikes(self) -> np.ndarray:
        return spikes(self.log["loss"])

    def evaluations(self, column: str) -> np.ndarray:
        """The column where the validation loss was measured."""
        return self.log[column][np.isfinite(self.log["val_loss"])]

    def at(self, axis: str, x: float, column: str = "val_loss") -> float:
        """
        The column when tokens, time_s or flops were x: that of an evaluation there. Between two it is nan by tokens,
        and by time_s and flops on the monotone curve through all (PCHIP), since a straight line, which is all that two
        give, lies above a loss that falls ever more slowly. nan before the first and after the last.
        """
        known = np.isfinite([self.log[name] for name in ("val_loss", axis, column)]).all(axis=0)
        places, first = np.unique(self.log[axis][known], return_index=True)
        values = self.log[column][known][first]
        if x in places:
            return float(values[places == x][0])
        if axis == "tokens" or len(places) < 2:
            return math.nan
        from scipy.interpolate import PchipInterpolator  # half a second, where it is used

        return float(PchipInterpolator(places, values, extrapolate=False)(x))

    def reaches(self, loss: float) -> tuple[float, float]:
        """
        (Tokens, time_s) when the validation loss first was that low, on the straight line between the evaluations
        before and after, so a little late for one that falls ever more slowly; (nan, nan) if it never was. A run that
        is below at its first evaluation counts from there.
        """
        losses = self.evaluations("val_loss")
        if not (losses <= loss).any():
            return math.nan, math.nan
        i = int(np.argmax(losses <= loss))
        part = (losses[i - 1] - loss) / (losses[i - 1] - losses[i]) if i else 1.0
        return tuple(float(x[max(i - 1, 0)] + part * (x[i] - x[max(i - 1, 0)]))
                     for x in (self.evaluations("tokens"), self.evaluations("time_s")))


def spikes(loss: np.ndarray) -> np.ndarray:
    """
    Where a loss spike begins, bool (updates,): steps in a row whose training loss is more than 7 standard deviations
    above the median of the up to 50 steps before. The standard deviation is that of the noise from step to step, 1.4826
    times the median of its absolute differences over sqrt(2), which neither a falling loss nor earlier spikes move.
    None begins in the first 20 steps. After the spike score of OLMo 2 (arXiv 2501.00656), which takes mean and standard
    deviation of 1,000 steps: more than many runs here have.
    """
    finite = np.concatenate([np.full(SPIKE_WINDOW, math.nan), np.where(np.isfinite(loss), loss, math.nan)])
    before = sliding_window_view(finite, SPIKE_WINDOW)[:-1]  # (updates, SPIKE_WINDOW), nan where there is none
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of rows that are nan throughout
        noise = MAD_TO_STD * np.nanmedian(abs(np.diff(before)), axis=1) / math.sqrt(2)
        above = loss > np.nanmedian(before, axis=1) + SPIKE_DEVIATIONS * noise
    begins = above & ~np.roll(above, 1)
    begins[:SPIKE_START] = False
    return begins


# -----------------------------------------------------------------------------
# reading


def find_runs(names: Iterable[str], out_dir: str) -> dict[Path, Path | None]:
    """
    Directories of runs: named under out_dir, or by path, or all that a folder holds; of each that folder, None for one
    that was named itself. BadOption, with the known ones, for a name that is none of these.
    """
    found = {}
    for name in names:
        place = directory_of(name, out_dir)
        named = place is not None and is_run(place)
        inside = [] if place is None else [place] if named else runs_in(place)
        if not inside:
            known = ", ".join(path.name for path in runs_in(Path(out_dir))) or "none"
            raise BadOption(f"no run {name!r}, and no folder with runs in it. In {out_dir}: {known}")
        for path in inside:
            if named or path.resolve() not in found:
                found[path.resolve()] = path, None if named else place
    return dict(found.values())


def is_run(path: Path) -> bool:
    return (path / "config.json").exists() or (path / "metrics.jsonl").exists()


def runs_in(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*") if is_run(path)), key=by_numbers)


def by_numbers(path: Path) -> tuple[list, str]:
    """The name's numbers count as such, in a sort: 1e-06 before 0.001, window256 before window1024."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", path.name)  # words and numbers in turn
    return [float(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def read_run(path: Path) -> Run:
    """BadOption if config.json is missing, damaged, or of another version."""
    config = read_json(path / "config.json")
    try:
        for part, names in NEEDED.items():
            for name, kind in names.items():
                if not isinstance(config[part][name], kind):
                    raise TypeError(f"{name}={config[part][name]!r}")
        settings = {name: value for name, value in config["settings"].items() if name in RESULT_FIELDS}
        restored(TrainConfig, settings | {"dtype": "auto"})  # refuses what is out of range or of another type
        if not isinstance(config.get("val_targets", 0), int):
            raise TypeError(f"val_targets={config['val_targets']!r}")
        gpt_config = restored(GPTConfig, config["model_config"])
        flops_per_token = model_size(gpt_config, config["settings"]["sequence_length"])[1]
    except (KeyError, TypeError, ValueError) as error:
        raise BadOption(f"{path / 'config.json'} is missing, damaged or of another version: {error}") from error
    lines = read_text(path / "metrics.jsonl").splitlines()
    rows = [row for n, row in enumerate(map(parse_object, lines), 1) if is_row(row, n)]
    log = {name: np.array([number(row.get(name)) for row in rows]) for name in COLUMNS}
    log["flops"] = log["tokens"] * flops_per_token
    not_finite = any(name in row and math.isnan(number(row[name])) for row in rows
                     for name in ("loss", "grad_norm", "val_loss"))
    notes = []
    if n_left_out := len(lines) - len(rows):
        notes.append(f"{path.name}: {n_left_out} of {len(lines)} lines of metrics.jsonl left out: cut off or damaged")
    run = Run(path, config, read_json(path / "status.json"), gpt_config, log, not_finite,
              {file.name: read_json(file) for file in sorted(path.glob("config-*.json"))}, notes)
    ended_at = run.status.get("step")
    if isinstance(ended_at, int) and ended_at > run.last_step:
        notes.append(f"{path.name}: metrics.jsonl ends at step {run.last_step}, the run at {ended_at}")
    for name, then in run.later.items():
        changed = [part for part in CHANGING if then.get(part) != config.get(part, then.get(part))]
        if changed:
            notes.append(f"{path.name}: went on with other {' and '.join(changed)}, see {name}")
    return run


def number(value) -> float:
    """nan for what is none; infinity counts as none."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan


def finite_median(values: np.ndarray) -> float:
    """Of what is finite; nan if nothing is."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


@functools.cache
def model_size(config: GPTConfig, T: int) -> tuple[int, int]:
    """(Parameters, FLOPs per token at sequence length T)."""
    with torch.device("meta"):
        model = GPT(config)
    return model.num_params(), model.flops_per_token(T)
