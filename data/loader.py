"""Which tokens a step reads: a pure function of (shards, seed, step), equal for every number of processes.

T is the sequence length. A window is T + 1 consecutive tokens of one shard: T inputs, and as targets the same shifted
by one. Windows start every T tokens, so neighbours share one token; a shard of n tokens has (n - 1) // T of them.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import data.shakespeare
from data.shards import Dataset, Shard, open_dataset
from kernels.fused import IGNORED
from rundir import DataError, writing


class Windows:
    """All windows of some shards, numbered in file order. Raises DataError if there is none."""

    def __init__(self, shards: Sequence[Shard], sequence_length: int):
        self.shards, self.sequence_length = shards, sequence_length
        counts = [(shard.n_tokens - 1) // sequence_length for shard in shards]
        self.first = np.cumsum([0, *counts])  # (number of shards + 1,): first window of each shard, then their total
        if not len(self):
            longest = max(shards, key=lambda shard: shard.n_tokens)
            raise DataError(
                f"{longest.path}: {longest.n_tokens} tokens, the most in one shard; sequence_length {sequence_length} "
                f"needs {sequence_length + 1}: use --sequence_length {longest.n_tokens - 1} or less"
            )

    def __len__(self) -> int:
        return int(self.first[-1])

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of these windows, each int64 (len(indices), T) and contiguous."""
        T = self.sequence_length
        tokens = np.empty((len(indices), T + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            shard = int(np.searchsorted(self.first, index, side="right")) - 1
            tokens[row] = self.shards[shard].read(int(index - self.first[shard]) * T, T + 1)
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def open_data(
    name: str, sequence_length: int, vocab_size: int, verify: bool = False
) -> tuple[Dataset, Windows, Windows]:
    """The data set `name`, a folder under data/ or a path, and its windows for training and for validation.

    shakespeare is prepared on first use. Raises DataError, or CannotWrite where that cannot be.
    """
    name = name.rstrip("/")
    directory = Path(name) if "/" in name else Path("data") / name
    if name == "shakespeare":
        with writing(directory):
            data.shakespeare.prepare(directory)
    dataset = open_dataset(directory, vocab_size, verify)
    return dataset, Windows(dataset.train, sequence_length), Windows(dataset.val, sequence_length)


@functools.lru_cache(maxsize=2)  # a step reads from one epoch, or from two where it crosses into the next
def permutation(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: each window once, int64 (n_windows,)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_windows)


def train_order(n_windows: int, seed: int, step: int, batch: int) -> np.ndarray:
    """Windows of the update after `step` updates, over all processes: int64 (batch,).

    Sample g = step * batch + i is window permutation_e[g mod n_windows] of epoch e = g // n_windows.
    """
    epochs, places = np.divmod(step * batch + np.arange(batch), n_windows)
    order = np.empty(batch, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        order[epochs == epoch] = permutation(n_windows, seed, epoch)[places[epochs == epoch]]
    return order


def micro_batch(order: np.ndarray, micro_step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The part of `order` that process `rank` reads in one micro-step: int64 (batch_size,)."""
    return order[(micro_step * world_size + rank) * batch_size :][:batch_size]


def to_device(batch: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """On CUDA by copies that the host does not wait for."""
    if device.type == "cuda":
        return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)
    return tuple(tensor.to(device) for tensor in batch)


def val_batches(
    windows: Windows, n_windows: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The first `n_windows` windows in file order, dealt out over the processes a batch at a time.

    Yields inputs and targets, int64 (batch_size, T). Rows past the end have inputs 0 and targets -1; a batch of such
    rows only is not yielded, so processes may get one batch more or less.
    """
    assert n_windows <= len(windows), f"{n_windows} of {len(windows)} windows"
    for start in range(rank * batch_size, n_windows, world_size * batch_size):
        rows = min(batch_size, n_windows - start)
        inputs = torch.zeros(batch_size, windows.sequence_length, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        inputs[:rows], targets[:rows] = windows.read(range(start, start + rows))
        yield inputs, targets
