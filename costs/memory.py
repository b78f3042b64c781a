"""
What a training step, and each attention in it, holds in memory, in closed form.

Shapes: B batch, T tokens in a sequence, C = n_embd, H heads, D head_dim, W window_size.
"""

import math
from dataclasses import dataclass, replace

from configs.recipes import TrainConfig
from kernels.cublaslt import WORKSPACE_BYTES
from kernels.fused import chunk_tokens
from model import GPTConfig

MIB = 2**20


# -----------------------------------------------------------------------------
# a forward and a backward pass of one part of a model


@dataclass(frozen=True)
class Need:
    """
    Bytes beyond the inputs and the gradient of the output, which are there before. `saved`: what stays between forward
    and backward, the inputs that backward reads included; the peaks: the most at any time in forward and in backward.
    """

    saved: int
    forward_peak: int
    backward_peak: int


@dataclass(frozen=True)
class Shape:
    """Of q, k and v: (B, H, T, D) views of (B, T, H, D) memory, as in model.py."""

    B: int
    T: int
    H: int
    D: int
    itemsize: int
    """bytes of an element"""

    def vectors(self, T: int | None = None) -> int:
        """Bytes of T tokens of each sequence in one tensor."""
        return self.B * (self.T if T is None else T) * self.H * self.D * self.itemsize

    def rows(self, T: int | None = None) -> int:
        """Bytes of one float32 for each query and head: the logsumexp, or delta, the sum of out * d_out."""
        return 4 * self.B * (self.T if T is None else T) * self.H


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def kernel_scratch(kernel: str, B: int, Tq: int, Tk: int, H: int, D: int, threads: int = 1) -> tuple[int, int]:
    """
    Bytes that a kernel takes for itself in forward and in backward, beyond output, logsumexp and dq, dk, dv.
    kernel: flex, flash, cuDNN, FlashAttention-2, memory-efficient or CPU.
    """
    if kernel == "flex":  # the largest score of each row; delta. A kernel of its own computes dq
        return 4 * B * Tq * H, 4 * B * Tq * H
    if kernel == "CPU":  # tiles of the scores for each thread (FlashAttentionKernel.cpp); delta is never whole
        q_tile, k_tile = min(Tq, 256 if Tq >= 768 else 64 if Tq >= 192 else 32), min(Tk, 512)
        return 4 * threads * q_tile * (k_tile + D + 2), 4 * threads * q_tile * (2 * k_tile + 1)
    rows = {
        "flash": B * (Tq + 128),  # every sequence is padded by one tile (mha_varlen_bwd in flash_api.cpp)
        "FlashAttention-2": B * round_up(Tq, 128),  # mha_bwd
    }.get(kernel, B * Tq)
    accumulators = {  # float32 for each row: of dq, which several blocks of keys add to
        "cuDNN": D,
        "flash": round_up(D, 32),
        "FlashAttention-2": round_up(D, 32),
        "memory-efficient": D,
    }[kernel]
    return 0, 4 * rows * H * (1 + accumulators)  # 1: delta


def attention_need(backend: str | None, sdpa: str, shape: Shape, W: int | None, threads: int = 1) -> Need:
    """
    Attention alone, not compiled unless flex. backend: of a window, None is full causal attention; sdpa: the kernel
    of scaled_dot_product_attention, as in `kernel_scratch`. Beside q, k, v: output and logsumexp, then dq, dk, dv.
    """
    if backend == "blocked" and shape.T > W:
        return blocked_need(sdpa, shape, W, threads)
    kernel = backend if backend in ("flex", "flash") else sdpa
    forward, backward = kernel_scratch(kernel, shape.B, shape.T, shape.T, shape.H, shape.D, threads)
    x, alive = shape.vectors(), shape.vectors() + shape.rows()
    return Need(saved=3 * x + alive, forward_peak=alive + forward, backward_peak=alive + 3 * x + backward)


def blocked_need(sdpa: str, shape: Shape, W: int, threads: int = 1) -> Need:
    """attention.blocked_window_attention where T > W: the first block apart, the n others as one batch."""
    n = -(-shape.T // W) - 1
    x, first, rest, padded = (shape.vectors(tokens) for tokens in (shape.T, W, n * W, (n + 1) * W))
    several = shape.B > 1 and n > 1  # then sequences and blocks cannot become one dimension without a copy
    ragged = shape.T % W > 0
    queries = rest if several else padded  # else a view, which keeps all of what it is a part of
    pairs = 2 * rest  # blocks of keys, or of values, each behind its predecessor
    bool_mask, mask = 2 * W * W, 2 * W * W * shape.itemsize
    alive = (first + shape.rows(W)) + queries + 2 * pairs + mask + (rest + shape.rows(n * W)) + x  # x: the output

    building_mask = first + shape.rows(W) + 8 * 2 * W * W + 2 * bool_mask  # int64 distances
    padding_values = first + shape.rows(W) + bool_mask + queries + pairs + 2 * padded + pairs
    joining = alive + bool_mask + (rest if several and sdpa == "CPU" else 0)  # CUDA's output has the order of x
    d_rest = rest if several or ragged else 0  # else a view of the output's gradient
    d_rest_in_order = rest if shape.B > 1 or ragged else 0  # as the kernel reads it
    _, scratch = kernel_scratch(sdpa, shape.B * n, W, 2 * W, shape.H, shape.D, threads)
    gradients = rest + 2 * pairs
    return Need(saved=3 * x + alive, forward_peak=max(building_mask, padding_values, joining),
                backward_peak=alive + d_rest + d_rest_in_order + gradients + scratch)


def block_mask_bytes(T: int, W: int) -> int:
    """
    What flex's block mask keeps on CUDA: for each row of blocks of 128 those at the distances at which some pair is
    visible, and those at which all are, as int32 with a count; once by queries, once by keys. Both lists are as wide.
    """
    n = -(-T // 128)
    n_full = max(0, min(W // 128, n) - 1)
    n_partial = min((W + 126) // 128, n - 1) - n_full + 1
    n_lists = 4 if n_full else 2
    width = max(n_full, n_partial)
    return n_lists * (4 * n + 4 * n * width)


# In the compiled form with fused kernels, for each token and layer: vectors of n_embd in bf16 that backward reads.
SAVED_VECTORS = {
    "input of c_attn": 1,
    "q, k and v": 3,
    "input of c_proj": 1,
    "input of c_fc": 1,
    "output of c_fc": 4,
    "GELU of it": 4,
}


FIRST_GRADIENT = (2 + 4) * 4  # times C C: in backward, of the MLP's c_proj in float32, with a copy in bf16 beside


def layer_bytes(config: GPTConfig, backend: str | None, B: int, T: int, kernels="fused", recompute=False) -> int:
    """What backward reads of a compiled layer beside its weights; bf16."""
    shape = Shape(B, T, config.n_head, config.head_dim, itemsize=2)
    vectors = sum(SAVED_VECTORS.values()) + 2 * config.post_norm  # its inputs
    if kernels == "plain":
        vectors += 2  # q and k, beside the output of c_attn, of which v is a part
    total = (vectors - SAVED_VECTORS["GELU of it"] * recompute) * shape.vectors()
    total += (1 + 2 * config.qk_norm) * shape.rows()  # logsumexp, and the scale of the norms of q and k
    total += 2 * (config.pre_norm + config.post_norm) * 4 * B * T  # the scale of the others
    if kernels == "plain":
        total += 2 * 12 * config.n_embd**2  # bf16 copies of the weights
    if backend == "blocked" and config.window_size < T:
        W = config.window_size
        rest = shape.vectors((-(-T // W) - 1) * W)
        total += 5 * rest + 4 * W * W  # queries, keys and values twice; mask
        total += shape.vectors()  # the output before its parts are joined
    return total


def block_need(config: GPTConfig, backend: str | None, B: int, T: int, kernels="fused") -> Need:
    """One compiled model.Block in bf16 autocast; its weights and their gradients are float32."""
    C, x = config.n_embd, 2 * B * T * config.n_embd
    read = 0 if config.pre_norm else x  # of its input, which c_attn has as its own input then
    alive = layer_bytes(config, backend, B, T, kernels) - read + x  # x: the output
    copy = 2 * 4 * C * C if kernels == "fused" else 0  # of the last weight, in bf16
    return Need(saved=alive + read, forward_peak=alive + x + copy, backward_peak=alive + FIRST_GRADIENT * C * C)


def logits_bytes(config: GPTConfig, B: int, T: int, kernels="fused", recompute=False) -> int:
    """In bf16: of all tokens, or with fused kernels of one chunk of them."""
    return 2 * config.vocab_size * (B * T if kernels == "plain" else min(B * T, chunk_tokens(recompute)))


def model_need(config: GPTConfig, backend: str | None, B: int, T: int, kernels="fused", recompute=False) -> Need:
    """The compiled GPT with targets, in bf16 autocast, its float32 weights included."""
    C, V, x = config.n_embd, config.vocab_size, 2 * B * T * config.n_embd
    alive = 4 * num_params(config) + config.n_layer * layer_bytes(config, backend, B, T, kernels, recompute)
    alive += x  # the last norm's output
    if config.embedding_norm:  # its output, which without pre_norm c_attn has as its own input, and its scale
        alive += x * config.pre_norm + 4 * B * T
    head, logits = 2 * V * C, logits_bytes(config, B, T, kernels, recompute)  # head: a bf16 copy
    if kernels == "plain":  # backward peaks where the gradient of the logits has taken their place
        saved = alive + head + x + logits  # x: what the head is applied to
        return Need(saved=saved, forward_peak=saved, backward_peak=saved + 2 * V * C)  # bf16 gradient of the head
    gradients = x + 4 * V * C  # of x in bf16, of the head in float32
    first_layer = FIRST_GRADIENT * C * C + 4 * x * recompute - x  # GELU anew; the last norm's output has gone
    return Need(saved=alive + gradients, forward_peak=alive + head + gradients + logits,
                backward_peak=alive + gradients + max(0, first_layer))


def num_params(config: GPTConfig) -> int:
    return (1 + config.untie) * config.vocab_size * config.n_embd + 12 * config.n_embd**2 * config.n_layer


# -----------------------------------------------------------------------------
# the micro-batch of a run


def training_parts(config: GPTConfig, backend: str | None, B: int, T: int, shares: int, kernels="fused",
                   recompute=False, optimizer="adamw") -> dict[str, int]:
    """
    What the peak of an update on CUDA, compiled, in bf16, from the second one on, is of, in bytes. shares: micro-steps
    times processes; with several the gradients stay, as sums or in DDP's buckets. MLPs: what their products and the
    activation keep; attention and norms: what else the layers do. The rest are gradients on their way, copies and what
    is not of a layer.
    """
    weights, model = 4 * num_params(config), model_need(config, backend, B, T, kernels, recompute)
    layers = config.n_layer * layer_bytes(config, backend, B, T, kernels, recompute)
    vectors = SAVED_VECTORS["input of c_fc"] + SAVED_VECTORS["output of c_fc"]
    vectors += SAVED_VECTORS["GELU of it"] * (not recompute)
    mlps = config.n_layer * vectors * 2 * B * T * config.n_embd
    logits = logits_bytes(config, B, T, kernels, recompute)
    if kernels == "fused" and model.backward_peak > model.forward_peak:
        logits = 0  # they have gone by then
    moments, gradients, scratch = 2 * weights, weights if shares > 1 else 0, 0
    if optimizer == "muon":  # one moment for a matrix of a block; four times the largest batch of them, in bf16
        moments -= 4 * 12 * config.n_embd**2 * config.n_layer
        scratch = 4 * 2 * 4 * config.n_embd**2 * config.n_layer
    rest = max(model.forward_peak, model.backward_peak) - weights - layers - logits
    if layers + logits + gradients + rest < weights + scratch:  # the optimizer's step is the peak
        layers, mlps, logits, gradients, rest = 0, 0, 0, weights, scratch
    return {"weights": weights, "optimizer": moments, "gradients": gradients, "attention and norms": layers - mlps,
            "MLPs": mlps, "logits": logits, "workspace": WORKSPACE_BYTES if kernels == "fused" else 0, "the rest": rest}


def training_need(*arguments, **options) -> int:
    """The sum of `training_parts`: the peak in bytes."""
    return sum(training_parts(*arguments, **options).values())


def peak_parts(config: TrainConfig, gpt_config: GPTConfig, batch_size: int, shares: int) -> dict[str, float]:
    """`training_parts` for the options of a run, in MiB."""
    backend, kernels = config.window_backend or "flex", config.kernels or "fused"
    parts = training_parts(gpt_config, backend, batch_size, config.sequence_length, shares, kernels,
                           config.recompute_gelu, config.optimizer)
    return {name: n_bytes / MIB for name, n_bytes in parts.items()}


def training_mib(config: TrainConfig, gpt_config: GPTConfig, batch_size: int, shares: int) -> float:
    """The peak itself."""
    return sum(peak_parts(config, gpt_config, batch_size, shares).values())


def divisors(n: int) -> list[int]:
    """The largest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({n // d for d in small} | set(small), reverse=True)


def largest_batch_size(config: TrainConfig, gpt_config: GPTConfig, sequences: int, processes: int, most: int,
                       room_mib: float) -> int:
    """Of the divisors of `sequences`, those of a process, the largest up to `most` that is predicted to fit, else 1."""
    return next((n for n in divisors(sequences)
                 if n <= most and training_mib(config, gpt_config, n, sequences // n * processes) < room_mib), 1)


def memory_advice(config: TrainConfig, gpt_config: GPTConfig, batch_size: int, shares: int) -> str:
    """What to change where this does not fit, and what that is predicted to save. config: its kernels are chosen."""
    needed_mib, options = training_mib(config, gpt_config, batch_size, shares), []
    for smaller in divisors(batch_size)[1:]:
        saved_mib = needed_mib - training_mib(config, gpt_config, smaller, shares * batch_size // smaller)
        if saved_mib >= 1:  # from one share to two the gradients stay
            options.append(f"--batch_size {smaller} is predicted to save {saved_mib:,.0f} MiB")
            break
    saved_mib = needed_mib - training_mib(replace(config, recompute_gelu=True), gpt_config, batch_size, shares)
    if config.kernels == "fused" and gpt_config.mlp_activation == "gelu" and saved_mib >= 1:
        options.append(f"--recompute_gelu {'' if options else 'is predicted to save '}{saved_mib:,.0f} MiB")
    return ", ".join(options) or "no option saves anything, a smaller --model or a shorter --sequence_length does"
