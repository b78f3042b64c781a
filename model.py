"""
GPT-2 with rotary embedding, RMSNorm and tied head, and the variants that this project compares.

Shapes: B batch, T tokens in a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size, W = window_size.

To try a new attention: add a field to GPTConfig, a subclass of CausalSelfAttention with its own `attend`,
a line in `attention_class`, and a line in configs/variants.py. README, "How to edit", says what the tests make of it.
The kernels that compute attention are in kernels/attention.py. On CUDA in bfloat16 kernels/fused.py computes the parts
that are named so below: a change to one of those functions needs `--kernels plain`.

GPT-2: Radford et al. 2019. Rotary embedding: arXiv 2104.09864. RMSNorm: arXiv 1910.07467.
"""

import functools
import math
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import fused
from kernels.attention import (
    WINDOW_ATTENTION,
    causal_attention,
    choose_window_backend,
    sdpa_choice,
    use_sdpa,
    window_tables,
)
from kernels.compiling import compile_static

# -----------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class GPTConfig:
    """What a model computes. Two equal configs with equal weights give equal outputs."""

    n_layer: int = 12
    """number of blocks"""
    n_head: int = 12
    """attention heads in a block; must divide n_embd into heads of even size"""
    n_embd: int = 768
    """width C of the residual stream"""
    vocab_size: int = 50304
    """rows of the embedding; GPT-2 has 50257 tokens, the rest is padding that makes the matrix product faster"""
    pre_norm: bool = True
    """x + f(norm(x)), as in GPT-2; off together with post_norm is OLMo 2's order, x + norm(f(x)) (arXiv 2501.00656)"""
    post_norm: bool = False
    """x + norm(f(norm(x))), norm on both sides of attention and MLP (Peri-LN, arXiv 2502.02732)"""
    embedding_norm: bool = False
    """RMSNorm on the embedding, before the first block; with untie the embedding then begins with deviation 1"""
    qk_norm: bool = False
    """RMSNorm on each head's q and k (arXiv 2302.05442); before or after the rotary embedding is the same"""
    attention_scale: float | None = None
    """s: attention is softmax(s q k^T) v; None is 1 / sqrt(D), with which qk_norm leaves no score above sqrt(D)"""
    window_size: int | None = None
    """W: a query sees W keys, its own included (q_idx - kv_idx < W); None is full causal attention"""
    window_pattern: str = "S"
    """layers in turn, S with window and L with full attention, repeated over the depth; needs window_size"""
    mlp_activation: Literal["gelu", "relu2"] = "gelu"
    """GELU in its tanh form (arXiv 1606.08415), or max(x, 0)^2 (arXiv 2109.08668)"""
    untie: bool = False
    """a head of its own instead of the embedding's weight"""
    logit_softcap: float | None = None
    """cap: logits become cap tanh(logits / cap) (arXiv 2408.00118); None leaves them"""

    def __post_init__(self):
        for name, exponent in {"n_layer": 10, "n_head": 24, "n_embd": 24, "vocab_size": 24}.items():  # a layer costs ms
            if not 1 <= getattr(self, name) <= 2**exponent:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 1 and 2^{exponent}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.head_dim % 2:
            raise ValueError(f"n_embd / n_head = {self.head_dim} must be even: the rotary embedding turns pairs")
        if not (self.pre_norm or self.post_norm):
            raise ValueError("pre_norm and post_norm are both off: a block needs at least one of them")
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"window_size={self.window_size} must be at least 1: a query sees its own key")
        if self.window_pattern != "S":
            if self.window_size is None:
                raise ValueError(f"window_pattern={self.window_pattern!r} needs window_size")
            if set(self.window_pattern) - {"S", "L"} or "S" not in self.window_pattern:
                raise ValueError(f"window_pattern={self.window_pattern!r} must consist of S and L, with at least one S")
            if len(self.window_pattern) > self.n_layer:
                raise ValueError(f"window_pattern={self.window_pattern!r} is longer than n_layer={self.n_layer}")
        for name in "attention_scale", "logit_softcap":
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1e4:
                raise ValueError(f"{name}={value} must lie above 0, up to 10000")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.n_embd // self.n_head

    def layer_window(self, layer: int) -> int | None:
        """Window size of this layer, None for full attention."""
        return self.window_size if self.window_pattern[layer % len(self.window_pattern)] == "S" else None


# -----------------------------------------------------------------------------
# parts


class RMSNorm(torch.autograd.Function):
    """
    x / sqrt(mean(x^2)). Backward reads the result, which the product or attention behind it keeps as well, so that x
    need not be kept. In 16 bits only the gradient's part along the result is less exact, by the result's rounding.
    """

    @staticmethod
    def forward(ctx, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        y = (wide * scale).to(x.dtype, copy=True)  # compiled by torch 2.11, a cast to the same dtype has no gradient
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, d_y):
        y, scale = ctx.saved_tensors
        y, d_wide = y.type_as(scale), d_y.type_as(scale)
        return (scale * (d_wide - y * (d_wide * y).mean(-1, keepdim=True))).type_as(d_y)


def norm(x):
    """RMSNorm without weight over the last dimension; same shape and dtype."""
    if torch.is_grad_enabled():
        return RMSNorm.apply(x)
    return F.rms_norm(x, (x.size(-1),), eps=1e-6).type_as(x)  # one kernel where nothing is compiled, as in sampling


def rotary_angles(position, head_dim: int):
    """cos and sin of position * frequency, float32, each (T, D / 2); base 10,000. position: (T,)."""
    frequency = 10_000 ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    angle = torch.outer(position.float(), frequency)
    return angle.cos(), angle.sin()


@functools.lru_cache(maxsize=32)
def rotary_tables(T: int, head_dim: int, device: torch.device):
    """The angles of positions 0 to T - 1, made once for each length."""
    return rotary_angles(torch.arange(T, device=device), head_dim)


# -----------------------------------------------------------------------------
# parts that kernels/fused.py computes too: on CUDA in bfloat16 an edit here needs --kernels plain


def apply_rotary(x, cos, sin):
    """Turns the pairs (x1[i], x2[i]), the two halves of each head, by their position's angle. x: (B, T, H, D)."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D / 2), over all heads
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


def rotate(qkv, cos, sin, qk_norm):
    """
    q, k and v of qkv (B, T, 3, H, D), each (B, T, H, D): q and k turned, and with qk_norm normed. The rotation keeps
    lengths, so that the norm before and after it is the same.
    """
    q, k, v = qkv.unbind(2)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    if qk_norm:  # after the rotation: then what attention keeps is what the norm's backward reads
        q, k = norm(q), norm(k)
    return q, k, v


def mlp(x, fc, proj):
    """C to 4 C, GELU in its tanh form (arXiv 1606.08415), and back. x: (B, T, C), fc: (4 C, C), proj: (C, 4 C)."""
    return F.linear(F.gelu(F.linear(x, fc), approximate="tanh"), proj)


def softcap(logits, cap: float | None):
    return logits if cap is None else cap * torch.tanh(logits / cap)


def cross_entropy(x, weight, targets, cap: float | None = None):
    """Mean over the targets that are not -1, float32. x: (N, C), weight: (V, C), targets: (N,) int64."""
    return F.cross_entropy(softcap(F.linear(x, weight).float(), cap), targets, ignore_index=fused.IGNORED)


PLAIN = SimpleNamespace(linear=F.linear, mlp=mlp, rotate=rotate, cross_entropy=cross_entropy)


# -----------------------------------------------------------------------------
# layers


class Linear(nn.Linear):
    """Without bias. Its weight comes from GPT.init_weights: torch's own would be drawn for nothing."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):
        pass


class CausalSelfAttention(nn.Module):
    """Projection, rotary embedding, norm, attention, output. A variant has an `attend` of its own."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.parts = PLAIN  # execution only, see GPT.forward
        self.n_head, self.head_dim, self.qk_norm = config.n_head, config.head_dim, config.qk_norm
        self.attention_scale = config.attention_scale
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # rows: q, k, v
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def attend(self, q, k, v):
        """softmax(s q k^T) v over the keys that each query sees; q, k, v and the result are (B, H, T, D)."""
        return causal_attention(q, k, v, self.attention_scale)

    def forward(self, x, cos, sin, cache=None):
        """x and the result: (B, T, C); cos, sin: (T, D / 2); cache: takes the place of `attend` when sampling."""
        B, T, C = x.shape
        qkv = self.parts.linear(x, self.c_attn.weight).view(B, T, 3, self.n_head, self.head_dim)
        q, k, v = self.parts.rotate(qkv, cos, sin, self.qk_norm)
        attend = self.attend if cache is None else cache.attend
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, T, H, D) -> (B, H, T, D)
        return self.parts.linear(y.transpose(1, 2).reshape(B, T, C), self.c_proj.weight)  # (B, H, T, D) -> (B, T, C)


class SlidingWindowAttention(CausalSelfAttention):
    """Each query sees the last W keys, its own included. Three kernels compute it; GPT's `window_backend` chooses."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.window_size = config.window_size
        self.backend, self.tables = None, {}  # execution only, see `prepare`

    def prepare(self, backend: str, B: int, T: int, device: torch.device, dtype: torch.dtype):
        """From now on this kernel, one that `choose_window_backend` gave, computes the window; makes its tables."""
        self.backend = backend
        self.tables = window_tables(backend, B, T, self.window_size, self.head_dim, device, dtype)

    def attend(self, q, k, v):
        return WINDOW_ATTENTION[self.backend](q, k, v, self.window_size, self.attention_scale, **self.tables)


OWN_ATTENTION = CausalSelfAttention.attend, SlidingWindowAttention.attend  # whose kernels, and whose cache, are known


class MLP(nn.Module):
    """C to 4 C, activation, and back; x and the result: (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.parts = PLAIN  # execution only, see GPT.forward
        self.activation = config.mlp_activation
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        if self.activation == "gelu":
            return self.parts.mlp(x, self.c_fc.weight, self.c_proj.weight)
        return self.parts.linear(F.relu(self.parts.linear(x, self.c_fc.weight)).square(), self.c_proj.weight)


def attention_class(config: GPTConfig, layer: int):
    """The one place where flags choose an attention."""
    return CausalSelfAttention if config.layer_window(layer) is None else SlidingWindowAttention


class Block(nn.Module):
    """x + post(attn(pre(x))), then the same with the MLP; pre and post are RMSNorm or identity."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = attention_class(config, layer)(config)
        self.mlp = MLP(config)
        self.pre = norm if config.pre_norm else nn.Identity()
        self.post = norm if config.post_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None):
        x = x + self.post(self.attn(self.pre(x), cos, sin, cache))
        return x + self.post(self.mlp(self.pre(x)))

    def kind(self):
        """Equal for blocks that one compiled form serves: their parts have the same classes and constants."""
        constants = int | float | str | tuple | FunctionType | None  # what torch.compile makes part of a graph
        return tuple((type(module), *((name, value) for name, value in vars(module).items()
                                      if isinstance(value, constants))) for module in self.modules())


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """
    config: what it computes. window_backend: what computes a window (kernels/attention.py), kernels: plain, or fused
    for the parts in kernels/fused.py; None is the fastest, all give the same function. recompute_gelu: of the fused
    kernels those that need less memory. seed: of the initial weights, drawn from a generator of their own.
    """

    def __init__(self, config: GPTConfig, window_backend: str | None = None, kernels: str | None = None,
                 recompute_gelu: bool = False, seed: int = 0):
        super().__init__()
        if window_backend is not None:
            if window_backend not in WINDOW_ATTENTION:
                raise ValueError(f"window_backend={window_backend!r} must be one of {', '.join(WINDOW_ATTENTION)}")
            if config.window_size is None:
                raise ValueError(f"window_backend={window_backend!r} has no use: window_size is None")
        self.config, self.window_backend, self.kernels, self.recompute_gelu = (
            config, window_backend, kernels, recompute_gelu)
        self.parts, self.norm = PLAIN, norm  # execution only, see `forward` and `compile`
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding.from_pretrained(  # nn.Embedding would draw weights, as nn.Linear
                torch.empty(config.vocab_size, config.n_embd), freeze=False),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        if not config.untie:
            self.lm_head.weight = self.transformer.wte.weight
        windows = [layer for layer in range(config.n_layer) if config.layer_window(layer)]
        if len(self.windowed_attentions()) != len(windows):
            raise ValueError("attention_class gives a windowed layer another attention, or another layer a window")
        self.init_weights(seed)

    def init_weights(self, seed: int):
        """
        All with two or more dimensions: normal with deviation 0.02, divided by sqrt(2 n_layer) for what adds to the
        residual stream (GPT-2, 2.3), and 1 for a normed embedding that is not the head too. Vectors and numbers keep
        what their modules gave them.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, weight in self.named_parameters():
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
            if name == "transformer.wte.weight" and self.config.embedding_norm and self.config.untie:
                std = 1.0
            if weight.ndim >= 2 and not weight.is_meta:  # for which torch would import its compiler
                nn.init.normal_(weight, std=std, generator=generator)

    def windowed_attentions(self) -> list[SlidingWindowAttention]:
        return [block.attn for block in self.transformer.h if isinstance(block.attn, SlidingWindowAttention)]

    def num_params(self) -> int:
        """Parameters, embedding and head counted once where they are tied."""
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """
        Floating-point operations of forward and backward per token at sequence length T: 6 N for the products with
        N weights (all, but for an embedding that is not the head too) plus, per layer, 12 H D min(W, T) for attention.
        Full attention counts the whole square, as nanoGPT does (PaLM, arXiv 2204.02311, appendix B).
        """
        n_weights = self.num_params() - self.config.untie * self.transformer.wte.weight.numel()
        windows = [self.config.layer_window(layer) or T for layer in range(self.config.n_layer)]
        return 6 * n_weights + sum(12 * self.config.n_embd * min(window, T) for window in windows)

    def compile(self, **options):
        """
        torch.compile of the embedding, of a block (once for all that are alike) and of what follows them: sooner done
        than one graph for all. Tables and block masks are made once, outside the graphs.
        """
        self.embed, self.norm, self.output = (
            compile_static(part, **options) for part in (self.embed, self.norm, self.output))
        compiled = functools.cache(lambda kind, forward: compile_static(forward, **options))
        for block in self.transformer.h:
            block.forward = functools.partial(compiled(block.kind(), type(block).forward), block)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Of the residual stream and the products; autocast alone would keep the stream in float32."""
        on = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if on else self.lm_head.weight.dtype

    def choose_kernels(self, T: int, device: torch.device, dtype: torch.dtype):
        """
        (Back end of the windows, kernel of scaled_dot_product_attention, plain or fused) at sequence length T, None for
        one that has no use or is torch's choice. ValueError, in one line, where none serves.
        """
        kernels = fused.choose_kernels(self.kernels, device, dtype)
        if self.recompute_gelu and (kernels != "fused" or self.config.mlp_activation != "gelu"):
            raise ValueError("recompute_gelu needs mlp_activation=gelu and kernels=fused (CUDA, bfloat16)")
        n_windowed, head_dim = len(self.windowed_attentions()), self.config.head_dim
        backend = choose_window_backend(self.window_backend, head_dim, device, dtype) if n_windowed else None
        if backend != "blocked" and n_windowed == self.config.n_layer:
            return backend, None, kernels
        return backend, sdpa_choice(T, head_dim, device, dtype, masked=backend == "blocked"), kernels

    def use(self, parts):
        """All blocks compute with these, PLAIN or fused.parts(...), from now on."""
        self.parts = parts
        for block in self.transformer.h:
            block.attn.parts = block.mlp.parts = parts

    def forward(self, idx, targets=None):
        """
        idx, targets: (B, T) int64. Without targets returns (logits (B, T, V), None); with targets (None, loss), the
        mean cross-entropy in nats over the targets that are not -1.
        """
        (B, T), device, dtype = idx.shape, idx.device, self.compute_dtype(idx.device)
        backend, sdpa, kernels = self.choose_kernels(T, device, dtype)
        for attention in self.windowed_attentions():
            attention.prepare(backend, B, T, device, dtype)
        self.use(fused.parts(self.recompute_gelu) if kernels == "fused" else PLAIN)
        with use_sdpa(sdpa):
            return self.run(idx, targets, *rotary_tables(T, self.config.head_dim, device))

    def run(self, idx, targets, cos, sin, caches=None):
        """`forward` with its tables, (T, D / 2) each; caches: a LayerCache (kernels/kv_cache.py) a layer, or None."""
        x = self.embed(idx)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cos, sin, caches and caches[layer])
        x = self.norm(x)  # apart from `output`, so that the loss needs no room for the last block's result
        return self.output(x, targets)

    def embed(self, idx):
        x = self.transformer.wte(idx).to(self.compute_dtype(idx.device))  # (B, T, C)
        return norm(x) if self.config.embedding_norm else x

    def output(self, x, targets):
        cap = self.config.logit_softcap
        if targets is None:
            return softcap(self.lm_head(x), cap), None  # (B, T, V)
        return None, self.parts.cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), cap)
