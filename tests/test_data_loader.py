"""Order and batches: a pure function of shards, seed and step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.loader import Windows, micro_batch, train_order, val_batches
from data.shards import DataError, Shard, write_shard


@pytest.fixture
def make_shards(tmp_path):
    def make(*lengths):
        """Shards whose tokens count on: the first token of a shard is the number of tokens before it."""
        starts = np.cumsum([0, *lengths])
        for index, length in enumerate(lengths):
            write_shard(tmp_path / f"train_{index:06d}.bin", starts[index] + np.arange(length))
        return [Shard(tmp_path / f"train_{index:06d}.bin") for index in range(len(lengths))]

    return make


# --- windows


def test_windows_never_cross_a_shard(make_shards):
    windows = Windows(make_shards(10, 4, 5, 9), 4)  # (10-1)//4, (4-1)//4, (5-1)//4, (9-1)//4
    assert len(windows) == 2 + 0 + 1 + 2
    inputs, targets = windows.read(range(5))
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()
    assert inputs[:, 0].tolist() == [0, 4, 14, 19, 23]
    torch.testing.assert_close(inputs, inputs[:, :1] + torch.arange(4))
    torch.testing.assert_close(targets, inputs + 1)
    torch.testing.assert_close(windows.read(np.array([3, 1]))[0], inputs[[3, 1]])


def test_every_target_of_a_shard_is_read_once(make_shards):
    windows = Windows(make_shards(1 + 7 * 3 + 2), 7)  # 2 tokens too few for a fourth window
    assert windows.read(range(len(windows)))[1].flatten().tolist() == list(range(1, 1 + 7 * 3))


def test_no_window(make_shards):
    with pytest.raises(DataError, match=r"train_000001.bin: 8 tokens.* use --sequence_length 7 or less") as error:
        Windows(make_shards(5, 8), 8)
    assert "\n" not in str(error.value)
    assert len(Windows(make_shards(5, 8), 7)) == 1


# --- order


def formula(n_windows, seed, g):
    epoch, place = divmod(g, n_windows)
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_windows)[place]


sizes = st.integers(1, 40)


@given(n_windows=sizes, batch=sizes, step=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_order_is_the_documented_formula(n_windows, batch, step, seed):
    order = train_order(n_windows, seed, step, batch)
    assert order.dtype == np.int64
    assert order.tolist() == [formula(n_windows, seed, step * batch + i) for i in range(batch)]


@given(n_windows=sizes, batch=sizes, seed=st.integers(0, 2**32))
def test_each_window_exactly_once_in_an_epoch(n_windows, batch, seed):
    n_steps = -(-3 * n_windows // batch)
    stream = np.concatenate([train_order(n_windows, seed, step, batch) for step in range(n_steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * n_windows :][:n_windows]) == list(range(n_windows))


def test_order_is_fixed_and_depends_on_seed_and_epoch():
    assert train_order(6, 0, 0, 6).tolist() == [0, 5, 1, 2, 4, 3]
    assert train_order(6, 0, 1, 6).tolist() == [2, 0, 4, 1, 5, 3]
    orders = {tuple(train_order(100, seed, step, 100)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


@given(batch_size=st.integers(1, 4), micro_steps=st.sampled_from([4, 8, 12]), step=st.integers(0, 9))
def test_the_same_windows_for_every_number_of_processes(batch_size, micro_steps, step):
    order = train_order(17, 1, step, micro_steps * batch_size)
    for world_size in 1, 2, 4:
        parts = [
            micro_batch(order, micro_step, batch_size, rank, world_size)
            for micro_step in range(micro_steps // world_size)
            for rank in range(world_size)
        ]
        assert {len(part) for part in parts} == {batch_size}
        np.testing.assert_array_equal(np.concatenate(parts), order)


# --- validation


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n_windows", [1, 4, 5, 11, 12])
def test_validation_reads_each_target_once_in_file_order(make_shards, n_windows, world_size):
    windows = Windows(make_shards(21, 30), 4)  # 5 + 7 windows
    batches = [list(val_batches(windows, n_windows, 3, rank, world_size)) for rank in range(world_size)]
    in_order = [batch for turn in range(len(batches[0])) for rank in batches for batch in rank[turn : turn + 1]]
    for inputs, targets in in_order:
        assert inputs.shape == targets.shape == (3, 4)
        assert inputs.dtype == targets.dtype == torch.int64
        padding = (targets == -1).all(dim=1)
        assert not padding.all() and torch.equal(padding.unsqueeze(1), (targets == -1).any(dim=1, keepdim=True))
        assert (inputs[padding] == 0).all()
    targets = torch.cat([targets.flatten() for _, targets in in_order])
    torch.testing.assert_close(targets[targets != -1], windows.read(range(n_windows))[1].flatten())
    assert len(in_order) == -(-n_windows // 3)
