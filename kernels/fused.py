"""
Parts of model.py in fewer passes over memory, for CUDA: the same functions, their gradients written by hand.

The matrix products are cublaslt.py's. `mlp` computes GELU inside the product before it, and its gradient inside that of
backward. The logits of 65,536 tokens and 50,304 ids take 6.1 GiB in bfloat16, and the plain loss reads and writes them
several times: `cross_entropy` goes in chunks of 8,192 tokens or half, of which only one has its logits in memory, a
Triton kernel puts the logits' gradient in their place, and two products give the gradients of x and of the weight at
once (the idea of Liger, arXiv 2410.10989). `rotate` turns and norms q and k where they lie, in one kernel, and one more
gives the gradient of q, k and v: backward reads what attention keeps as well, and with qk_norm the lengths of q and k.

Shapes: B batch, T tokens in a sequence, N of all sequences, C = n_embd, H heads, D head_dim, V = vocab_size.
"""

import functools
import importlib.util
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from kernels.cublaslt import matmul

IGNORED = -1  # target without loss
CHUNK_TOKENS = 8192  # 0.8 GiB of logits; with fewer tokens than this, plain needs less memory
DTYPE = torch.bfloat16  # of the products
ROWS = 32  # of rotate's kernels, in a program: a row is one head of one token


def choose_kernels(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """plain or fused by name, or fused where it can serve. ValueError, in one line, where it cannot."""
    cannot = None
    if device.type != "cuda":
        cannot = f"serves CUDA only, not {device.type}"
    elif dtype != torch.bfloat16:  # in float16 the gradient of a mean over many tokens is rounded to 0
        cannot = f"computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    elif torch.version.cuda is None:
        cannot = "needs a torch for NVIDIA's cuBLASLt"
    elif importlib.util.find_spec("triton") is None:
        cannot = "needs Triton, which is not installed"
    if name not in (None, "plain", "fused"):
        raise ValueError(f"kernels={name!r} must be one of plain, fused")
    if name == "fused" and cannot:
        raise ValueError(f"kernels='fused' {cannot}: use 'plain'")
    return name or ("plain" if cannot else "fused")


@functools.cache  # the same ones each time, which is how torch.compile knows them again
def parts(recompute_gelu: bool):
    """
    What model.PLAIN has. recompute_gelu: GELU's output, 4 C for each token and layer, is not kept for backward, and
    the loss has half as many logits at a time.
    """
    return SimpleNamespace(linear=linear, mlp=functools.partial(mlp, recompute_gelu=recompute_gelu), rotate=rotate,
                           cross_entropy=functools.partial(cross_entropy, recompute_gelu=recompute_gelu))


OPERATORS = torch.library.Library("gpt2_variants", "FRAGMENT")


def operator(fake, mutates_args=()):
    """
    Decorator: an operator that torch.compile does not look into; fake: its result's shapes and dtypes. As
    torch.library.custom_op, but without its checks, which in each call take the host longer than the launch.
    """
    def define(function):
        name = f"gpt2_variants::{function.__name__}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=mutates_args), lib=OPERATORS)
        torch.library.impl(name, "default", function, lib=OPERATORS)
        torch.library.register_fake(name, fake, lib=OPERATORS)
        return getattr(torch.ops.gpt2_variants, function.__name__).default

    return define


# -----------------------------------------------------------------------------
# matrix products


def linear(x, weight):
    """F.linear, in bfloat16. weight is cast whenever it is needed, its gradient never."""
    return Linear.apply(x.to(DTYPE), weight)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product("NT", x.flatten(0, -2), weight, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        d_x, d_weight = linear_backward(d_y.flatten(0, -2), x.flatten(0, -2), weight)
        return d_x.view_as(x), d_weight


def linear_backward(d_y, x, weight):
    return product("NN", d_y, weight, x.dtype), product("TN", d_y, x, weight.dtype)


def mlp(x, fc, proj, recompute_gelu=False):
    """model.mlp, in bfloat16, with weights as in `linear`."""
    return MLP.apply(x.to(DTYPE), fc, proj, recompute_gelu)


class MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc, proj, recompute_gelu):
        activation, before = product_gelu(x.flatten(0, -2), fc)
        ctx.save_for_backward(x, fc, proj, before, None if recompute_gelu else activation)
        return product("NT", activation, proj, x.dtype).view_as(x)

    @staticmethod
    def backward(ctx, d_y):
        x, fc, proj, before, activation = ctx.saved_tensors
        if activation is None:
            activation = F.gelu(before, approximate="tanh")
        d_y = d_y.flatten(0, -2)
        d_proj = product("TN", d_y, activation, proj.dtype)
        d_before = product_gelu_backward(d_y, proj, before)
        d_x, d_fc = linear_backward(d_before, x.flatten(0, -2), fc)
        return d_x.view_as(x), d_fc, d_proj, None


@operator(lambda layout, left, right, dtype: left.new_empty(product_shape(layout, left, right), dtype=dtype))
def product(layout: str, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """cublaslt.matmul, the result in `dtype`."""
    out = left.new_empty(product_shape(layout, left, right), dtype=dtype)
    matmul(layout, operand(left), operand(right), out)
    return out


def operand(x):
    """As cublaslt.matmul wants it."""
    x = x.to(DTYPE).contiguous()
    return x if x.data_ptr() % 256 == 0 else x.clone()


def product_shape(layout, left, right):
    return left.size(1 if layout[0] == "T" else 0), right.size(0 if layout[1] == "T" else 1)


@operator(lambda x, weight: tuple(x.new_empty(len(x), len(weight)) for _ in range(2)))
def product_gelu(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(GELU of x weight^T, x weight^T); x: (N, C)."""
    out, before = (x.new_empty(len(x), len(weight)) for _ in range(2))
    matmul("NT", operand(x), operand(weight), out, "gelu", before)
    return out, before


@operator(lambda d_y, weight, before: torch.empty_like(before))
def product_gelu_backward(d_y: torch.Tensor, weight: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """d_y weight times the derivative of GELU at `before`; d_y: (N, C)."""
    out = torch.empty_like(before)
    matmul("NN", operand(d_y), operand(weight), out, "gelu_backward", before)
    return out


# -----------------------------------------------------------------------------
# the loss


def cross_entropy(x, weight, targets, cap=None, recompute_gelu=False):
    """
    model.cross_entropy. The logits and their gradient are bfloat16; sums and d_weight are float32.
    recompute_gelu: with half as many logits at a time, for 0.3 ms more in a step of 65,536 tokens.
    """
    return linear_cross_entropy(x.to(DTYPE), weight, targets, cap, chunk_tokens(recompute_gelu))[0]


def chunk_tokens(recompute_gelu: bool) -> int:
    """Tokens of which the loss has the logits in memory at a time."""
    return CHUNK_TOKENS // 2 if recompute_gelu else CHUNK_TOKENS


@operator(lambda x, weight, *_: (x.new_empty((), dtype=torch.float32), torch.empty_like(x),
                                 torch.empty_like(weight, dtype=torch.float32)))
def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float | None, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, its gradient by x, its gradient by weight), in chunks of tokens. An operator of its own, not compiled."""
    x, weight = operand(x), operand(weight)
    n_targets = (targets != IGNORED).sum()
    losses = torch.empty_like(targets, dtype=torch.float32)
    d_x, d_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
    memory = x.new_empty(min(len(x), chunk), len(weight))
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        logits = memory[: len(x[rows])]
        matmul("NT", x[rows], weight, logits)
        cross_entropy_(logits, targets[rows], losses[rows], n_targets, cap)
        matmul("NN", logits, weight, d_x[rows])
        matmul("TN", logits, x[rows], d_weight, accumulate=True)
    return losses.sum() / n_targets, d_x, d_weight


def keep_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def scale_gradients(ctx, d_loss, *_):
    d_x, d_weight = ctx.saved_tensors
    return d_x * d_loss, d_weight * d_loss, None, None, None


torch.library.register_autograd(linear_cross_entropy, scale_gradients, setup_context=keep_gradients, lib=OPERATORS)


def cross_entropy_(logits, targets, losses, n_targets, cap=None):
    """Writes each row's loss, and in place of the logits (n, V) the gradient of the mean over n_targets targets."""
    cross_entropy_kernel()[(len(logits),)](logits, targets, losses, n_targets, logits.size(1), IGNORED, CAP=cap or 0.0,
                                           BLOCK=8192, num_warps=16)


@functools.cache
def cross_entropy_kernel():
    """One program per row: the logsumexp in one pass over the logits, their gradient in a second."""
    import triton
    import triton.language as tl

    @triton.jit
    def cross_entropy(logits, targets, losses, n_targets, V: tl.constexpr, IGNORED: tl.constexpr, CAP: tl.constexpr,
                      BLOCK: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        logits += row * V
        target = tl.load(targets + row)
        largest, total = float("-inf"), 0.0
        for start in range(0, V, BLOCK):
            z = tl.load(logits + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
            if CAP > 0:  # tanh(a) = 2 sigmoid(2 a) - 1
                z = tl.where(start + column < V, CAP * (2 * tl.sigmoid(2 * z / CAP) - 1), float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(z))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest))
        logsumexp = largest + tl.log(total)
        counts = target != IGNORED
        z_target = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        if CAP > 0:
            z_target = CAP * (2 * tl.sigmoid(2 * z_target / CAP) - 1)
        tl.store(losses + row, tl.where(counts, logsumexp - z_target, 0.0))
        scale = tl.where(counts, 1 / tl.load(n_targets).to(tl.float32), 0.0)
        for start in range(0, V, BLOCK):
            inside = start + column < V
            z, slope = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32), scale
            if CAP > 0:
                tanh = 2 * tl.sigmoid(2 * z / CAP) - 1
                z, slope = CAP * tanh, scale * (1 - tanh * tanh)
            gradient = slope * (tl.exp(z - logsumexp) - tl.where(start + column == target, 1.0, 0.0))
            tl.store(logits + start + column, gradient.to(logits.dtype.element_ty), mask=inside)

    return cross_entropy


# -----------------------------------------------------------------------------
# rotary embedding and qk_norm


def rotate(qkv, cos, sin, qk_norm):
    """model.rotate; computes in float32. q, k and v are parts of one tensor."""
    return Rotate.apply(qkv, cos, sin, qk_norm)


class Rotate(torch.autograd.Function):
    """Norm and rotation commute: y = rotate(x) / |x| gives both gradients without x, from y and the lengths."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, qk_norm):
        y = qkv.clone(memory_format=torch.contiguous_format)  # compiled: the memory of qkv, which nothing else reads
        scale = rotate_(y, cos, sin, qk_norm)
        ctx.save_for_backward(y if qk_norm else None, scale, cos, sin)
        return y.unbind(2)

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):
        return rotate_backward(d_q, d_k, d_v, *ctx.saved_tensors), None, None, None


@operator(lambda qkv, cos, sin, qk_norm: cos.new_empty(lengths_shape(qkv, qk_norm)), mutates_args=("qkv",))
def rotate_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, qk_norm: bool) -> torch.Tensor:
    """In place, qkv: (B, T, 3, H, D). Returns what the norm multiplied q and k by, float32 (2, B, T, H), or nothing."""
    scale = cos.new_empty(lengths_shape(qkv, qk_norm))
    launch("forward", qkv.shape, qkv, cos, sin, scale, NORM=qk_norm)
    return scale


def lengths_shape(qkv, qk_norm):
    B, T, _, H, _ = qkv.shape
    return (2, B, T, H) if qk_norm else 0


@operator(lambda d_q, *_: d_q.new_empty(*d_q.shape[:2], 3, *d_q.shape[2:]))
def rotate_backward(
    d_q: torch.Tensor, d_k: torch.Tensor, d_v: torch.Tensor, y: torch.Tensor | None, scale: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Gradient of qkv (B, T, 3, H, D) from those of q, k and v (B, T, H, D); y: q, k, v, or None without qk_norm."""
    d_q, d_k, d_v = d_q.contiguous(), d_k.contiguous(), d_v.contiguous()
    B, T, H, D = d_q.shape
    d_qkv = d_q.new_empty(B, T, 3, H, D)
    launch("backward", d_qkv.shape, d_q, d_k, d_v, y, scale, cos, sin, d_qkv, NORM=y is not None)
    return d_qkv


def launch(direction, shape, *tensors, NORM):
    """A program for each ROWS rows of q, of k, and in backward of v; shape: of qkv."""
    B, T, _, H, D = shape
    n_rows, half = B * T * H, 1 << (D // 2 - 1).bit_length()
    programs = -(-n_rows // ROWS), 3 if direction == "backward" else 2
    rotate_kernels()[direction][programs](*tensors, n_rows, T, H=H, D=D, HALF=half, ROWS=ROWS, NORM=NORM)


@functools.cache
def rotate_kernels():
    """A row is one head of one token, of the part of qkv that the second index of a program is."""
    import triton
    import triton.language as tl

    @triton.jit
    def rotate_forward(qkv, cos, sin, scale, n_rows, T, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                       ROWS: tl.constexpr, NORM: tl.constexpr):
        part, row, column = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
        inside = (row < n_rows)[:, None] & (column < D // 2)[None, :]
        token = (row // H).to(tl.int64)
        x = qkv + ((token * 3 + part) * H + row % H)[:, None] * D + column[None, :]
        angle = (token % T)[:, None] * (D // 2) + column[None, :]
        c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
        x1 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + D // 2, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            r = 1 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + 1e-6)
            tl.store(scale + part.to(tl.int64) * n_rows + row, r, mask=row < n_rows)
            x1, x2 = x1 * r[:, None], x2 * r[:, None]
        tl.store(x, (x1 * c - x2 * s).to(qkv.dtype.element_ty), mask=inside)
        tl.store(x + D // 2, (x2 * c + x1 * s).to(qkv.dtype.element_ty), mask=inside)

    @triton.jit
    def rotate_backward(d_q, d_k, d_v, y, scale, cos, sin, d_qkv, n_rows, T, H: tl.constexpr, D: tl.constexpr,
                        HALF: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr):
        part, row, column = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
        inside = (row < n_rows)[:, None] & (column < D // 2)[None, :]
        token = (row // H).to(tl.int64)
        at = ((token * 3 + part) * H + row % H)[:, None] * D + column[None, :]
        d = d_v
        if part == 0:
            d = d_q
        elif part == 1:
            d = d_k
        d += row.to(tl.int64)[:, None] * D + column[None, :]
        d1 = tl.load(d, mask=inside, other=0.0).to(tl.float32)
        d2 = tl.load(d + D // 2, mask=inside, other=0.0).to(tl.float32)
        if part < 2:
            if NORM:
                y1 = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
                y2 = tl.load(y + at + D // 2, mask=inside, other=0.0).to(tl.float32)
                r = tl.load(scale + part.to(tl.int64) * n_rows + row, mask=row < n_rows, other=0.0)[:, None]
                along = tl.sum(d1 * y1 + d2 * y2, axis=1)[:, None] / D
                d1, d2 = (d1 - y1 * along) * r, (d2 - y2 * along) * r
            angle = (token % T)[:, None] * (D // 2) + column[None, :]
            c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
            d1, d2 = d1 * c + d2 * s, d2 * c - d1 * s
        tl.store(d_qkv + at, d1.to(d_qkv.dtype.element_ty), mask=inside)
        tl.store(d_qkv + at + D // 2, d2.to(d_qkv.dtype.element_ty), mask=inside)

    return {"forward": rotate_forward, "backward": rotate_backward}
