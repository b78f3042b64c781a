"""
The kernels behind model.py's attention: one definition for full causal attention, three for a causal window.

Every function here gives softmax(scale q k^T) v over the keys that each query sees, for q, k, v and a result of
(B, H, T, D); scale: None is 1 / sqrt(D). Which kernel computes it is never left to chance: one that cannot serve raises
ValueError, one that would run in a slow form raises SlowPath.

Shapes: B batch, T tokens in a sequence, H heads, D head_dim, W window_size.
"""

import functools
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels.compiling import compile_static

# what torch's profiler shows of each, as machine.attention_kernels names it
KERNEL_NAMES = {
    "flex": "flex_attention", "flash": "FlashAttention", SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "FlashAttention", SDPBackend.EFFICIENT_ATTENTION: "memory-efficient SDPA",
}


# -----------------------------------------------------------------------------
# full causal attention


def sdpa_choice(T: int, head_dim: int, device: torch.device, dtype: torch.dtype, masked=False) -> SDPBackend | None:
    """
    The kernel of scaled_dot_product_attention on CUDA: in 16 bits cuDNN from Hopper on (on an H100 it takes 2/3 of
    FlashAttention-2's time) and FlashAttention-2 before, in float32 or with a mask the memory-efficient one (cuDNN's
    backward with a mask gave NaN, pytorch#196678). Under torch.use_deterministic_algorithms FlashAttention-2, or the
    definition: only these add in the same order every time. None on other devices, which have one.
    """
    if device.type != "cuda" or torch.version.cuda is None:  # on AMD torch has its own
        return None
    (major, _), in_16_bits = torch.cuda.get_device_capability(device), dtype in (torch.bfloat16, torch.float16)
    in_order, fused = torch.are_deterministic_algorithms_enabled(), in_16_bits and not masked
    if dtype == torch.float64:
        return SDPBackend.MATH
    if fused and not in_order and major >= 9 and head_dim <= 128 and head_dim % 8 == 0 and T > 1:
        return SDPBackend.CUDNN_ATTENTION
    if fused and major >= 8 and head_dim <= 256:  # torch pads other heads to a multiple of 8
        return SDPBackend.FLASH_ATTENTION
    if head_dim % (8 if in_16_bits else 4):
        raise ValueError(f"heads of {head_dim} have no such kernel in {str(dtype).removeprefix('torch.')} on CUDA: "
                         "n_embd / n_head must be a multiple of 8, in float32 of 4")
    return SDPBackend.MATH if in_order else SDPBackend.EFFICIENT_ATTENTION


@contextmanager
def use_sdpa(choice: SDPBackend | None):
    """Context in which scaled_dot_product_attention takes this kernel or raises; None leaves the choice to torch."""
    if choice is None:
        yield
        return
    # torch's cache of compiled graphs does not look at the choice: with the tag each has its own
    with sdpa_kernel(choice), torch.compiler.config.patch(cache_key_tag=choice.name):
        yield


def causal_attention(q, k, v, scale=None):
    """Full causal attention by the kernel of the context `use_sdpa`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


# -----------------------------------------------------------------------------
# causal window


FLEX_HEADS = range(16, 257)


def choose_window_backend(name: str | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """The back end by name, or flex on CUDA and blocked elsewhere. ValueError, in one line, where it cannot serve."""
    backend = name or ("flex" if device.type == "cuda" else "blocked")
    cannot = None
    if backend != "blocked" and device.type != "cuda":
        cannot = f"serves CUDA only, not {device.type}: use 'blocked'"
    elif backend == "flex" and head_dim not in FLEX_HEADS:
        cannot = f"has no kernel for heads of {head_dim}, only from 16 to 256: use 'blocked'"
    elif backend == "flash" and dtype not in (torch.bfloat16, torch.float16):
        cannot = f"computes in 16 bits, not {str(dtype).removeprefix('torch.')}: use 'flex' or 'blocked'"
    elif backend == "flash" and (head_dim % 8 or head_dim > 256):
        cannot = (f"has no kernel for heads of {head_dim}, only for multiples of 8 up to 256: "
                  + ("use 'flex'" if head_dim in FLEX_HEADS else "use 'blocked'"))
    elif backend == "flash" and torch.cuda.get_device_capability(device) < (8, 0):
        cannot = "needs an Ampere GPU or newer: use 'blocked'"
    if backend == "blocked" or (cannot and "'blocked'" in cannot):
        sdpa_choice(2, head_dim, device, dtype, masked=True)  # raises for heads that blocked cannot serve
    if cannot:
        raise ValueError(f"window_backend={backend!r} {cannot}")
    return backend


def window_tables(backend: str, B: int, T: int, W: int, head_dim: int, device: torch.device, dtype: torch.dtype):
    """What the back end's function takes beside q, k, v, W and scale: made once per shape, outside graphs."""
    if backend == "flex":
        return {"block_mask": window_block_mask(T, W, device), "kernel_options": flex_options(head_dim, device, dtype)}
    return {"sequence_starts": sequence_starts(B, T, device)} if backend == "flash" else {}


# --- flex: torch's flex_attention, a kernel generated for the block mask ---


def flex_window_attention(q, k, v, W, scale=None, *, block_mask, kernel_options):
    """flex_attention, fused: compiled with what surrounds it, or on its own where that is not compiled."""
    attend = flex if torch.compiler.is_compiling() else compiled_flex()
    return attend(q, k, v, W, scale, block_mask, kernel_options).transpose(1, 2)


def flex(q, k, v, W, scale, block_mask, kernel_options):
    """(B, T, H, D), as it lies in memory: autograd copies the gradient of what is not contiguous into such a form."""
    y = flex_attention(q, k, v, block_mask=block_mask, scale=scale, kernel_options=kernel_options)
    return y.transpose(1, 2)


@functools.cache
def compiled_flex():
    """Uncompiled, flex_attention would keep T x T scores in memory."""
    return compile_static(flex)


def forget_compiled():
    """As in a new process: what is compiled counts towards torch's limit, and towards what compiling.py allows."""
    torch._dynamo.reset()
    compiled_flex.cache_clear()


@functools.cache
def flex_options(head_dim: int, device: torch.device, dtype: torch.dtype) -> dict:
    """
    On Hopper with heads up to 64 in 16 bits: tiles that measured best on an H100 with heads of 64 and windows of 128 to
    1,024. Elsewhere torch's own. Always the kernel for training: the one for decoding, which torch takes below 128
    tokens, would write out of bounds with these tiles. BLOCKS_ARE_CONTIGUOUS would be wrong for windows.
    """
    options = {"BACKEND": "TRITON"}
    if torch.cuda.get_device_capability(device) == (9, 0) and head_dim <= 64 and dtype != torch.float32:
        options |= {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 2,
                    "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32,
                    "bwd_num_warps": 4, "bwd_num_stages": 3}
    return options


@functools.lru_cache(maxsize=32)
def window_block_mask(T: int, W: int, device: torch.device) -> BlockMask:
    """
    Which blocks of 128 queries and 128 keys flex_attention computes, in closed form: by the distance in blocks, so that
    neither time nor memory is quadratic in T, unlike `create_block_mask`. One mask per shape serves all layers.
    """
    size = 128
    n = -(-T // size)
    index = torch.arange(n)  # on the host: on a GPU the kernels that would be loaded for this take longer than it does
    # between the blocks i of queries and j of keys, i - j = distance: some pair is visible if distance * size -
    # (size - 1) < W, and every pair if distance > 0 and distance * size + (size - 1) < W
    full = list(range(1, min(W // size, n)))
    partial = [0, *range(max(1, W // size), min((W + size - 2) // size, n - 1) + 1)]
    width = max(len(full), len(partial))  # torch 2.11 reads both lists with the strides of one

    def blocks(distances, direction):
        """How many blocks there are at these distances (1, 1, n), and which (1, 1, n, width), in order of position."""
        other = index[:, None] + direction * torch.tensor(distances + [n] * (width - len(distances)))  # (n, width)
        inside = (other >= 0) & (other < n)
        in_order = torch.where(inside, other, n).sort(dim=1).values  # for the kernels the last is what T cuts short
        counts, indices = inside.sum(dim=1).int(), in_order.clamp(max=n - 1).int()
        return counts[None, None].to(device), indices[None, None].to(device)

    def visible(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < W)

    keys_of_queries, queries_of_keys = (
        (*blocks(partial, direction), *(blocks(full, direction) if full else (None, None))) for direction in (-1, 1)
    )
    return BlockMask((T, T), *keys_of_queries, *queries_of_keys, BLOCK_SIZE=(size, size), mask_mod=visible)


# --- flash: FlashAttention as built into torch, or as activated there by the user ---


def flash_window_attention(q, k, v, W, scale=None, *, sequence_starts):
    """varlen_attn over the B sequences as one; its window counts the keys before the query's own."""
    from torch.nn.attention.varlen import varlen_attn  # a second of imports, most of them torch.compile's

    B, _, T, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B, H, T, D) -> (B T, H, D)
    y = varlen_attn(q, k, v, sequence_starts, sequence_starts, T, T, scale=scale, window_size=(W - 1, 0))
    return y.unflatten(0, (B, T)).transpose(1, 2)  # (B T, H, D) -> (B, H, T, D)


@functools.lru_cache(maxsize=32)
def sequence_starts(B: int, T: int, device: torch.device):
    """Where each sequence begins among B T tokens, and the end: int32 (B + 1,)."""
    return torch.arange(0, B * T + 1, T, device=device, dtype=torch.int32)


# --- blocked: scaled_dot_product_attention on blocks, for every device and dtype ---


def blocked_window_attention(q, k, v, W, scale=None):
    """
    Exact causal window out of scaled_dot_product_attention, linear in T, with gradients on every device.
    Queries go in blocks of W; each block sees its own and the previous block of keys.
    """
    B, H, T, D = q.shape
    first = causal_attention(q[:, :, :W], k[:, :, :W], v[:, :, :W], scale)
    if T <= W:
        return first
    n_block = -(-T // W) - 1  # blocks after the first

    def blocks(x):  # (B, H, T, D) -> (B, H, n_block + 1, W, D); what pads the last one no query before it can see
        return F.pad(x, (0, 0, 0, (n_block + 1) * W - T)).view(B, H, n_block + 1, W, D)

    def pairs(x):  # (B, H, T, D) -> (B, H, n_block, 2 W, D): each block of keys behind its predecessor
        return torch.cat((blocks(x)[:, :, :-1], blocks(x)[:, :, 1:]), dim=3)

    def to_batch(x):  # (B, H, n_block, n, D) -> (B n_block, H, n, D): the fused kernels take 4 dimensions
        return x.transpose(1, 2).reshape(B * n_block, H, -1, D)

    q_idx, kv_idx = torch.arange(W, 2 * W, device=q.device)[:, None], torch.arange(2 * W, device=q.device)
    mask = (q_idx >= kv_idx) & (q_idx - kv_idx < W)  # (W, 2 W)
    rest = F.scaled_dot_product_attention(
        to_batch(blocks(q)[:, :, 1:]), to_batch(pairs(k)), to_batch(pairs(v)), attn_mask=mask, scale=scale
    )  # (B n_block, H, W, D)
    rest = rest.view(B, n_block, H, W, D).transpose(1, 2).reshape(B, H, n_block * W, D)
    return torch.cat((first, rest[:, :, : T - W]), dim=2)


WINDOW_ATTENTION = {"flex": flex_window_attention, "flash": flash_window_attention, "blocked": blocked_window_attention}
