"""
attention.py: each kernel against a float64 reference, the block mask against the dense mask, and every slow path
provoked. What all back ends compute is checked by `python bench.py --verify`, whose checks run here too.
"""

import pytest
import torch
from reference import attention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attention import blocked_window_attention, window_block_mask


def error(x, reference):
    """|x - reference| / |reference|."""
    return ((x.double() - reference).norm() / reference.norm()).item()


# -----------------------------------------------------------------------------
# the blocked form, and the block mask of flex


@pytest.mark.parametrize("T", [1, 5, 16, 17, 33])
@pytest.mark.parametrize("window", [1, 2, 3, 8, 16, 40])
def test_blocked_window_attention_equals_dense(T, window):
    generator = torch.Generator().manual_seed(T)
    q, k, v, d_out = (torch.randn(2, 3, T, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    q, k, v = ((2 * x).requires_grad_() for x in (q, k, v))
    actual, expected = blocked_window_attention(q, k, v, window), attention(q, k, v, window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for x, y in zip(torch.autograd.grad(actual, (q, k, v), d_out),
                    torch.autograd.grad(expected, (q, k, v), d_out), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_blocked_window_attention_is_linear_in_the_sequence():
    """No tensor of forward or backward, saved or not, grows like T x T."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    def largest_and_saved(T):
        q, k, v = (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
        with Largest() as largest, hooks:
            blocked_window_attention(q, k, v, 8).sum().backward()
        return largest.elements, sum(x.numel() for x in saved)

    (largest, saved), (largest_4x, saved_4x) = largest_and_saved(256), largest_and_saved(1024)
    assert largest > 256 and saved > 256
    assert largest_4x < 4.5 * largest and saved_4x < 4.5 * saved


def materialise(mask, T):
    """(T, T) pairs that flex attention computes with this BlockMask, and (rows, columns) how often it lists a block."""
    def listed(counts, indices):
        blocks = torch.zeros(indices.shape[2:], dtype=torch.int64)
        for row in range(blocks.size(0)):
            for column in indices[0, 0, row, : counts[0, 0, row]].tolist():
                blocks[row, column] += 1
        return blocks

    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None:
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    transposed = listed(mask.q_num_blocks, mask.q_indices).T  # what the backward pass walks through
    if mask.full_q_num_blocks is not None:
        transposed = transposed + 2 * listed(mask.full_q_num_blocks, mask.full_q_indices).T
    assert torch.equal(transposed, partial + 2 * full)

    def pairs(blocks):
        return blocks.bool().repeat_interleave(128, 0).repeat_interleave(128, 1)[:T, :T]

    index = torch.arange(T)
    allowed = mask.mask_mod(None, None, index[:, None], index[None, :])
    return pairs(partial) & allowed | pairs(full), partial + full


@pytest.mark.parametrize("T", [1, 127, 128, 129, 300, 1024, 1500])
def test_window_block_mask_equals_dense_mask(T):
    q_idx, kv_idx = torch.arange(T)[:, None], torch.arange(T)
    for window in (1, 2, 127, 128, 129, 255, 256, 257, 1000, T, T + 200):
        dense = (kv_idx <= q_idx) & (kv_idx > q_idx - window)
        mask = window_block_mask(T, window, torch.device("cpu"))
        pairs, blocks = materialise(mask, T)
        assert torch.equal(pairs, dense), f"window {window}"
        library = create_block_mask(lambda b, h, q, k, W=window: (q >= k) & (q - k < W), None, None, T, T, device="cpu")
        library_pairs, library_blocks = materialise(library, T)
        assert torch.equal(pairs, library_pairs), f"window {window}"
        assert torch.equal(blocks, library_blocks), f"window {window}: a block too many, or one in both lists"
        assert mask.seq_lengths == (T, T)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("T", "window"), [(1, 1), (40, 7), (129, 128), (300, 129), (300, 1000)])
def test_flex_attention_with_the_mask_equals_dense(T, window):
    """Uncompiled, on the CPU: values of the mask function. The fused kernel is tested on a GPU."""
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, 2, T, 16, generator=generator) for _ in range(3))
    with torch.no_grad():
        out = flex_attention(q, k, v, block_mask=window_block_mask(T, window, torch.device("cpu")))
    assert error(out, attention(q.double(), k.double(), v.double(), window)) < 1e-6


