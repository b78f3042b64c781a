"""
Scores of a trained run: validation loss, bits per byte of text, HellaSwag.

    python eval.py --run d12_post_norm_qk_norm
    python eval.py --run d12_post_norm_qk_norm --val_tokens all --hellaswag download
    torchrun --standalone --nproc_per_node 8 -- eval.py --run d12_post_norm_qk_norm --hellaswag hellaswag_val.jsonl

torchrun needs the -- in the last line: it would take --run for a short form of its own --run-path.
The newest valid checkpoint is scored. The scores are printed and kept in the run's directory: eval.json has them by
checkpoint and by the path of what was read, each in place of an earlier one of the same two.

Exit codes: 0 done, 1 out of memory or a bug, 2 bad option, no such run, or other data than the run had, 4 checkpoints
present but none valid, 5 cannot write, 6 a score is not finite, 7 missing, empty or invalid data, or no download,
8 another process is gone or hangs, 130 Ctrl-C.
"""

import math
import sys
import traceback
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

import checkpoint
import hellaswag
import machine
import processes
from configs.recipes import TrainConfig, restored
from data.loader import open_data, val_batches
from data.shards import locked
from data.tokenizer import gpt2, token_bytes
from files import write_json
from kernels.compiling import compiles
from rundir import BAD_OPTION, DONE, INTERRUPTED, BadOption, NotFinite, leave, read_json, writing

HANG_TIMEOUT_S = 600


@dataclass(frozen=True)
class EvalConfig:
    """What to score. ValueError for a value out of range."""

    run: str
    """name of a run under out_dir, or the path of its directory; the newest valid checkpoint is read"""
    data: str | None = None
    """data set whose validation shards are read, as for train_gpt2.py; None: the run's own"""
    val_tokens: int | Literal["all"] | None = None
    """validation targets, the first in file order; None: as many as the run's evaluations; 0: no validation loss"""
    sequence_length: int | None = None
    """tokens in a sequence of the validation text; None: the run's"""
    hellaswag: str | None = None
    """score this .jsonl file of HellaSwag too; download: the published one, into data/hellaswag"""
    batch_size: int | None = None
    """sequences in a batch of each process, for HellaSwag endings; None: the run's. Scores do not depend on it"""
    out_dir: str = "runs"
    """where the run directories are"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where it runs; auto: CUDA, MPS or CPU, whichever there is"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the matrix products; auto: bfloat16 on GPUs that have it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA"""

    def __post_init__(self):
        for name, least in {"val_tokens": 0, "sequence_length": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            if value not in (None, "all") and not least <= value <= 2**40:
                raise ValueError(f"{name}={value} must lie between {least} and 2^40")
        if self.val_tokens == 0 and self.hellaswag is None:
            raise ValueError("val_tokens=0 without hellaswag leaves nothing to score")


@dataclass(frozen=True)
class Run:
    """What a checkpoint says about its run."""

    train: TrainConfig
    batch_size: int
    """sequences of a micro-step"""
    tokenizer: str | None
    data: str
    """fingerprint of the data set"""


# -----------------------------------------------------------------------------
# validation loss


def evaluate(model, windows, n_windows, batch_size, autocast, device, text_bytes, others, interrupted) -> dict:
    """
    {"val_loss": mean nats per token over the first n_windows windows, "bits_per_byte": of their text}, or {} as soon as
    `interrupted`, asked before each batch, says so in all processes. text_bytes: bytes of text of each token id, int64
    (V,), or None if the tokenizer is not known; then bits per byte is None. train_gpt2.py calls it without
    torch.no_grad, since the graph compiled for training serves as it is; one for no_grad would be compiled for 20 s.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    batches = val_batches(windows, n_windows, batch_size, others.rank, others.world_size)
    for _ in tqdm(range(0, n_windows, batch_size * others.world_size), "validation", unit="batch", delay=1, leave=False,
                  disable=others.rank != 0):
        if interrupted():
            return {}
        for inputs, targets in islice(batches, 1):  # none, where another process has the last one
            with autocast:  # .item() at once: a loss that is kept keeps its activations
                loss = model(inputs.to(device), targets.to(device))[1].item()
            targets = targets[targets >= 0]
            n_bytes = 0 if text_bytes is None else text_bytes[targets].sum()
            sums += torch.tensor([loss * len(targets), len(targets), n_bytes])
    if others.world_size > 1:
        dist.all_reduce(sums, group=others.hosts)
    nats, tokens, n_bytes = sums.tolist()
    return {"val_loss": nats / tokens, "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None}


def validation(config: EvalConfig, run: Run, model, autocast, device, others) -> dict[str, dict]:
    """By the data set's directory, `evaluate` on it. Raises DataError, BadOption, CannotWrite or NotFinite."""
    T = config.sequence_length
    dataset, _, windows = open_data(config.data or run.train.data, T, model.config.vocab_size)
    if config.data is None and dataset.fingerprint != run.data:
        raise BadOption(f"{dataset.directory} does not hold the data that the run had: name what to score with --data")
    if dataset.tokenizer != run.tokenizer:
        raise BadOption(f"{dataset.directory} has the tokenizer {dataset.tokenizer}, the run had {run.tokenizer}")
    most = len(windows) * T
    wanted = {None: min(run.train.val_tokens, most), "all": most}.get(config.val_tokens, config.val_tokens)
    if not T <= wanted <= most:
        raise BadOption(f"val_tokens={wanted} must lie between sequence_length={T} and {most}, all that "
                        f"{dataset.directory} has (--val_tokens all)")
    n_windows = wanted // T
    batch_size = min(config.batch_size, n_windows)
    text_bytes = torch.from_numpy(token_bytes()) if dataset.tokenizer == "gpt2" else None
    found = evaluate(model, windows, n_windows, batch_size, autocast, device, text_bytes, others, lambda: False)
    if not math.isfinite(found["val_loss"]):
        raise NotFinite(f"val_loss is {found['val_loss']}")
    found |= {"val_tokens": n_windows * T, "sequence_length": T, "data": dataset.fingerprint}
    return {str(dataset.directory): found}


def open_hellaswag(config: EvalConfig, run: Run, vocab_size: int) -> tuple[str, hellaswag.HellaSwag]:
    """The file's path and what is in it. Raises DataError, BadOption or CannotWrite."""
    if run.tokenizer != "gpt2" or vocab_size < gpt2().n_vocab:
        raise BadOption(f"{config.run} was not trained on the {gpt2().n_vocab} tokens of GPT-2: HellaSwag needs them")
    path = hellaswag.download() if config.hellaswag == "download" else Path(config.hellaswag)
    return str(path), hellaswag.read(path)


# -----------------------------------------------------------------------------
# the command


def read_run(newest: Path) -> Run:
    """Raises NoValidCheckpoint where state.json was written by another version."""
    state = checkpoint.read_state(newest)
    with checkpoint.of_this_version(newest):
        return Run(restored(TrainConfig, state["train_config"]), state["batch_size"], state["tokenizer"],
                   state["settings"]["data"])


@torch.no_grad()
def score(config: EvalConfig, others: processes.Others):
    """Prints the scores and keeps them. Raises what its parts raise, NoValidCheckpoint and CannotWrite."""
    device = machine.select_device(config.device)
    newest = checkpoint.find(config.run, config.out_dir)
    step = torch.tensor(checkpoint.step_of(newest))
    if others.world_size > 1:  # the run may be saving
        dist.broadcast(step, 0, group=others.hosts)
    newest = newest.parent / checkpoint.directory_name(int(step))
    run, model = read_run(newest), checkpoint.load_model(newest, device)
    config = replace(config, batch_size=config.batch_size or run.batch_size,
                     sequence_length=config.sequence_length or run.train.sequence_length)
    if compiles(config.compile, device):
        model.compile()
    dtype = machine.matmul_dtype(device, config.dtype)
    autocast, found = torch.autocast(device.type, dtype, enabled=dtype != torch.float32), {}
    if config.hellaswag is not None:  # a mistake in the file ends it now, not after the validation text
        path, examples = open_hellaswag(config, run, model.config.vocab_size)
    if config.val_tokens != 0:
        found |= validation(config, run, model, autocast, device, others)
    if config.hellaswag is not None:
        found[path] = hellaswag.score(model, examples, config.batch_size, autocast, device, others)
    if others.rank == 0:
        made = {"dtype": str(dtype).removeprefix("torch."), "versions": machine.versions(device)}
        try:
            keep(newest, {place: scores | made for place, scores in found.items()})
        finally:  # each even if the other cannot be written
            print(f"{newest}, {made['dtype']}, {machine.describe(device)}")
            for place, scores in found.items():
                print_table(place, scores)


def print_table(place: str, scores: dict):
    """A line for each score, with the standard error of an accuracy."""
    n = scores.get("n_examples")
    over = f"{n:,} examples of {place}" if n else f"{scores['val_tokens']:,} tokens of {place}"
    for name in ("acc", "acc_per_token", "acc_per_byte") if n else ("val_loss", "bits_per_byte"):
        value = scores[name]
        figure = "unknown" if value is None else f"{value:.4f}"
        error = f" +- {math.sqrt(value * (1 - value) / n):.4f}" if n else ""
        print(f"{name:14} {figure + error:18} {over}")


def keep(newest: Path, found: dict):
    """Adds to eval.json in the run's directory. Raises CannotWrite."""
    path = newest.parent / "eval.json"
    with writing(path), locked(path.with_name(".eval.lock")):
        kept = read_json(path)
        before = kept.get(newest.name)
        write_json(path, kept | {newest.name: (before if isinstance(before, dict) else {}) | found})


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    processes.end_with_torchrun()
    config = tyro.cli(EvalConfig, args=arguments, description=__doc__.strip(), use_underscores=True)
    rank, world_size = processes.rank_and_world_size()
    try:
        processes.check_variables(rank, world_size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_OPTION
    others = processes.Others(rank, world_size, False, HANG_TIMEOUT_S, lambda reason, code: None)
    reason, code = "", DONE
    try:
        score(config, others)
    except KeyboardInterrupt:
        reason, code = "interrupted", INTERRUPTED
    except Exception as error:
        error = others.explain(error)
        reason, code = str(error) or type(error).__name__, getattr(error, "exit_code", 1)
        if machine.is_out_of_memory(error):
            reason = f"out of memory: a smaller --batch_size? ({reason.splitlines()[0]})"
        elif code == 1 and isinstance(error, ValueError | OSError):
            code = BAD_OPTION
        elif code == 1:
            traceback.print_exception(error)
    others.end(reason, code, failed=code != DONE)
    if code == DONE:
        others.meet()
    else:
        print(f"error: {reason}" if rank == 0 else f"process {rank}: error: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    leave(main())
