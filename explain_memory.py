"""
Where a sliding window can seem to need more memory than full attention: each explanation on its own, measured.

    python explain_memory.py

A report said that windows on flex_attention used 350 MB more than plain causal attention. The first four rows are its
explanations, the others are mistakes that have this effect. Every figure is in MiB what torch's tensors ask for (not
what it reserves), at the shape in its row; needs a CUDA GPU, takes 90 s. Exit codes: 0 done, 2 no CUDA GPU.
"""

import gc
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import machine
from configs.variants import variant
from costs.measure import allocations, block_mask_cost
from costs.memory import MIB
from kernels.attention import (
    compiled_flex,
    flex_window_attention,
    forget_compiled,
    sdpa_choice,
    use_sdpa,
    window_block_mask,
    window_tables,
)
from model import GPT, rotary_tables
from rundir import BAD_OPTION

B, T, W, H, D = 16, 1024, 256, 12, 64  # one micro-batch of d12


@dataclass(frozen=True)
class Row:
    """One explanation: what it is said to be, what was measured, in MiB, and at which shape."""

    explanation: str
    claimed: str
    measured_mib: float
    at: str


def extra_mib(run: Callable[[], object]) -> tuple[float, float]:
    """(peak during run, kept while its result is), both beyond what was allocated before."""
    def settled():
        result = run()
        gc.collect()  # what only waits to be freed, by autograd's thread too, is not kept
        return result

    gc.collect()
    _, kept, peak = allocations(settled, torch.device("cuda", 0))
    return peak / MIB, kept / MIB


def inputs(batch=B, length=T):
    """q, k, v and a gradient of the output, (B, H, T, D) in the model's layout, bfloat16."""
    q, k, v, d_out = (torch.randn(batch, length, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                      for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out


def forward_backward(attend, q, k, v, d_out):
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)


def visible(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < W)


# -----------------------------------------------------------------------------
# the four explanations


def block_mask_metadata() -> list[Row]:
    rows = []
    for length in (1024, 16384, 65536):
        kept, peak, _ = block_mask_cost(length, W, torch.device("cuda"))
        rows.append(Row("block mask, kept", "50 to 200", kept, f"T={length} W={W}"))
        rows.append(Row("block mask, while it is built", "", peak, f"T={length} W={W}"))
    return rows


def flex_intermediates() -> list[Row]:
    q, k, v, d_out = inputs()
    tables = window_tables("flex", B, T, W, D, q.device, q.dtype)

    def windowed(q, k, v):
        return flex_window_attention(q, k, v, W, **tables)

    def full(q, k, v):
        with use_sdpa(sdpa_choice(T, D, q.device, q.dtype)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    rows = []
    tensors_mib = (4 * q.nbytes + 2 * 4 * B * H * T) / MIB  # out, dq, dk, dv; logsumexp and delta, float32
    for name, attend in ("flex", windowed), ("full causal", full):
        forward_backward(attend, q, k, v, d_out)
        peak, _ = extra_mib(lambda attend=attend: forward_backward(attend, q, k, v, d_out))
        rows.append(Row(f"{name}: beyond out, dq, dk, dv and two numbers a row", "50 to 100" * (name == "flex"),
                        peak - tensors_mib, f"B={B} T={T} W={W}"))
    return rows


def compiled_kernels() -> list[Row]:
    """What loaded kernels take on the device is not torch's: the change of free memory, less what torch reserved."""
    q, k, v, d_out = inputs()
    compiled_flex.cache_clear()
    tables = window_tables("flex", B, T, W, D, q.device, q.dtype)
    torch.cuda.synchronize()
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    _, kept = extra_mib(lambda: forward_backward(lambda q, k, v: flex_window_attention(q, k, v, W, **tables), q, k, v,
                                                 d_out)[:0])
    outside = (free - torch.cuda.mem_get_info()[0]) - (torch.cuda.memory_reserved() - reserved)
    return [Row("compiled kernels, in torch's memory", "100 to 200", kept, f"B={B} T={T} W={W}"),
            Row("compiled kernels, on the device", "", outside / MIB, f"B={B} T={T} W={W}")]


def rotary_caches() -> list[Row]:
    rotary_tables.cache_clear()
    _, tables = extra_mib(lambda: rotary_tables(T, D, torch.device("cuda")))
    _, broadcast = extra_mib(lambda: [x[:, None].expand(B, T, H, D // 2) for x in
                                      rotary_tables(T, D, torch.device("cuda"))])
    return [Row("cos and sin of all positions, one for all layers", "10 to 50", tables, f"T={T}"),
            Row("the same, broadcast to all heads and sequences", "", broadcast, f"B={B} T={T}")]


# -----------------------------------------------------------------------------
# what can have happened


def uncompiled_block_mask() -> list[Row]:
    rows = []
    for length in (1024, 4096, 8192):
        peak, _ = extra_mib(lambda length=length: create_block_mask(visible, None, None, length, length, "cuda"))
        rows.append(Row("create_block_mask, not compiled", "", peak, f"T={length} W={W}"))
    return rows


def uncompiled_flex() -> list[Row]:
    q, k, v, d_out = inputs(1)
    mask = window_block_mask(T, W, q.device)
    peak, _ = extra_mib(lambda: forward_backward(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), q, k, v,
                                                 d_out))
    return [Row("flex_attention, not compiled, one sequence", "", peak, f"B=1 T={T} W={W}")]


def recompile_limit() -> list[Row]:
    """Without fullgraph the ninth shape runs uncompiled; one warning tells of it."""
    forget_compiled()
    compiled, rows = torch.compile(flex_attention, dynamic=False), []
    for count in range(1, torch._dynamo.config.recompile_limit + 2):
        q, k, v, _ = inputs(1, 128 * count)
        mask = window_block_mask(128 * count, W, q.device)
        with torch.no_grad():
            compiled(q, k, v, block_mask=mask)
            peak, _ = extra_mib(lambda q=q, k=k, v=v, mask=mask: compiled(q, k, v, block_mask=mask))
        if count >= torch._dynamo.config.recompile_limit:
            rows.append(Row(f"compiled flex_attention, shape number {count}, forward only", "", peak,
                            f"B=1 T={128 * count} W={W}"))
    forget_compiled()
    return rows


def checkpointing_on_one_side() -> list[Row]:
    """Forward and backward of all blocks, not compiled, with and without recomputing each."""
    model = GPT(variant("d12")).cuda()
    idx = torch.randint(50257, (B, T), device="cuda")
    tables = rotary_tables(T, D, idx.device)

    def step(recompute: bool):
        dtype = torch.bfloat16
        with torch.autocast("cuda", dtype), use_sdpa(sdpa_choice(T, D, idx.device, dtype)):
            x = model.transformer.wte(idx).to(dtype)
            for block in model.transformer.h:
                x = checkpoint(block, x, *tables, use_reentrant=False) if recompute else block(x, *tables)
        x.float().mean().backward()

    peaks = []
    for recompute in (False, True):
        step(recompute)  # makes the gradients
        peaks.append(extra_mib(lambda recompute=recompute: step(recompute))[0])
    return [Row("gradient checkpointing of the blocks on one side only", "", peaks[0] - peaks[1], f"d12 B={B} T={T}")]


def first_step_counted() -> list[Row]:
    """The peak of the first step, in which everything is compiled, against that of a later one."""
    model = GPT(variant("d12_window256")).cuda()
    model.compile()
    idx = torch.randint(50257, (4, T), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            model(idx, idx)[1].backward()
        model.zero_grad(set_to_none=True)

    first, later = extra_mib(step)[0], extra_mib(step)[0]
    return [Row("peak of the first step, which compiles, less that of the second", "", first - later,
                f"d12_window256 B=4 T={T}")]


PARTS = (block_mask_metadata, compiled_kernels, flex_intermediates, rotary_caches, uncompiled_block_mask,
         uncompiled_flex, recompile_limit, checkpointing_on_one_side, first_step_counted)


def main() -> int:
    """Returns the exit code."""
    if sys.argv[1:]:
        print(__doc__.strip())
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else BAD_OPTION
    try:
        machine.select_device("cuda")
    except ValueError as error:
        reason = str(error).split(". To go on without it")[0]
        print(f"error: explain_memory.py measures a CUDA GPU: {reason}", file=sys.stderr)
        return BAD_OPTION
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    versions = machine.versions(torch.device("cuda", 0))
    print(f"{versions['device']}, torch {versions['torch']}; MiB that tensors ask for")
    print(f"{'explanation':67} {'claimed':>10} {'measured':>10}  at")
    for part in PARTS:
        for row in part():
            print(f"{row.explanation:67} {row.claimed:>10} {row.measured_mib:10.2f}  {row.at}", flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
