"""
The loss: mean cross-entropy of the head's logits over the targets that are not -1, in two forms that give the same.

plain: the logits as one product, then F.cross_entropy in float32. With 65,536 tokens and 50,304 ids the logits take
6.1 GiB in bfloat16, and are read and written several times.
fused: in chunks of 8,192 tokens, of which only one has its logits in memory. A Triton kernel puts the logits' gradient
in their place, and two products give the gradients of x and of the weight at once: backward only scales them (the idea
of Liger, arXiv 2410.10989).

Shapes: N tokens of all sequences, C = n_embd, V = vocab_size.
"""

import functools
import importlib.util

import torch
import torch.nn.functional as F

IGNORED = -1  # target without loss
CHUNK_TOKENS = 8192  # 0.8 GiB of logits; with fewer tokens than this, plain needs less memory


def choose_loss_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The form by name, or fused where it can serve. ValueError, in one line, where it cannot."""
    cannot = None
    if device.type != "cuda":
        cannot = f"serves CUDA only, not {device.type}"
    elif dtype != torch.bfloat16:  # in float16 the gradient of a mean over many tokens is rounded to 0
        cannot = f"computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    elif importlib.util.find_spec("triton") is None:
        cannot = "needs Triton, which is not installed"
    if name == "fused" and cannot:
        raise ValueError(f"loss_backend='fused' {cannot}: use 'plain'")
    if name is not None and name not in LOSS:
        raise ValueError(f"loss_backend={name!r} must be one of {', '.join(LOSS)}")
    return name or ("plain" if cannot else "fused")


def plain_cross_entropy(x, weight, targets):
    """x: (N, C), weight: (V, C), targets: (N,) int64; returns a float32 scalar."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=IGNORED)


def fused_cross_entropy(x, weight, targets):
    """The same. Logits and their gradient have the dtype of x; sums and the gradient of the weight are float32."""
    return linear_cross_entropy(x, weight, targets)[0]


LOSS = {"plain": plain_cross_entropy, "fused": fused_cross_entropy}


@torch.library.custom_op("gpt2_variants::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, its gradient by x, its gradient by weight). An operator of its own: torch.compile takes it as it is."""
    weight = weight.to(x.dtype)
    n_targets = (targets != IGNORED).sum()
    losses = torch.empty_like(targets, dtype=torch.float32)
    d_x, d_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
    memory = x.new_empty(min(len(x), CHUNK_TOKENS), len(weight))
    for start in range(0, len(x), CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        logits = torch.mm(x[rows], weight.T, out=memory[: len(x[rows])])
        cross_entropy_(logits, targets[rows], losses[rows], n_targets)
        torch.mm(logits, weight, out=d_x[rows])
        if x.is_cuda:
            torch.addmm(d_weight, logits.T, x[rows], out_dtype=torch.float32, out=d_weight)
        else:
            d_weight += logits.T.float() @ x[rows].float()
    return losses.sum() / n_targets, d_x, d_weight


@linear_cross_entropy.register_fake
def _(x, weight, targets):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)


def keep_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def scale_gradients(ctx, d_loss, *_):
    d_x, d_weight = ctx.saved_tensors
    return d_x * d_loss, d_weight * d_loss, None


linear_cross_entropy.register_autograd(scale_gradients, setup_context=keep_gradients)


def cross_entropy_(logits, targets, losses, n_targets):
    """Writes each row's loss, and in place of the logits (n, V) the gradient of the mean over n_targets targets."""
    cross_entropy_kernel()[(len(logits),)](logits, targets, losses, n_targets, logits.size(1), IGNORED, BLOCK=8192,
                                           num_warps=16)


@functools.cache
def cross_entropy_kernel():
    """One program per row: the logsumexp in one pass over the logits, their gradient in a second."""
    import triton
    import triton.language as tl

    @triton.jit
    def cross_entropy(logits, targets, losses, n_targets, V: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        logits += row * V
        target = tl.load(targets + row)
        largest, total = float("-inf"), 0.0
        for start in range(0, V, BLOCK):
            z = tl.load(logits + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
            before, largest = largest, tl.maximum(largest, tl.max(z))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest))
        logsumexp = largest + tl.log(total)
        counts = target != IGNORED
        z_target = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
        tl.store(losses + row, tl.where(counts, logsumexp - z_target, 0.0))
        scale = tl.where(counts, 1 / tl.load(n_targets).to(tl.float32), 0.0)
        for start in range(0, V, BLOCK):
            inside = start + column < V
            z = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = scale * (tl.exp(z - logsumexp) - tl.where(start + column == target, 1.0, 0.0))
            tl.store(logits + start + column, gradient.to(logits.dtype.element_ty), mask=inside)

    return cross_entropy
