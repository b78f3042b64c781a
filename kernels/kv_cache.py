"""
What a model remembers while it writes: keys and values of the tokens so far, a ring of W entries in a windowed layer.

Memory is 2 x B x C x (W or max_tokens) elements per layer, however many tokens are written.
"""

import math

import torch
import torch.nn.functional as F

from kernels.compiling import compile_static
from model import GPT, OWN_ATTENTION, PLAIN, rotary_angles

CHUNK_TOKENS = 256  # of a prompt at a time: what bounds the memory of the scores


class LayerCache:
    """Keys and values of one layer: the token at position p is in entry p % S, and S is W in a windowed layer."""

    def __init__(self, n_entries: int, shape: tuple[int, int, int], scale: float | None, device: torch.device,
                 dtype: torch.dtype):
        B, H, D = shape
        self.n_entries, self.scale = n_entries, scale or 1 / math.sqrt(D)
        self.keys = torch.zeros(B, H, n_entries, D, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.entry = self.visible = None  # of the tokens that come, see `places`

    def attend(self, q, k, v):
        """Attention of the next n tokens to the cached ones and themselves; q, k, v and the result are (B, H, n, D)."""
        n, n_stored = q.size(2), len(self.entry)
        keys, values = self.keys, self.values
        if n > 1:  # a token that they push out of the ring may still be seen by the first of them
            keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        self.keys.index_copy_(2, self.entry, k[:, :, -n_stored:])
        self.values.index_copy_(2, self.entry, v[:, :, -n_stored:])
        score = (q @ keys.transpose(2, 3)).float() * self.scale
        weight = score.masked_fill(~self.visible, -math.inf).softmax(dim=3)
        return weight.to(values.dtype) @ values


def places(position, n_entries: int):
    """
    Where tokens at position, (n,) int64 and consecutive, go in a ring of S entries, and what they see: entries (at most
    S, the last ones), and visible (n, S + n), the ring before them and then themselves; one token sees (1, S), with it.
    """
    S, n = n_entries, len(position)
    last = position[-1] if n == 1 else position[0] - 1  # the newest token in the ring when `attend` looks
    age = (last - torch.arange(S, device=position.device)) % S  # of each entry: 0 is the newest
    filled = age <= last
    if n == 1:
        return position % S, filled[None]
    distance = position[:, None] - torch.cat((last - age, position))
    filled = torch.cat((filled, torch.ones_like(position, dtype=torch.bool)))
    return (position % S)[-S:], (distance >= 0) & (distance < S) & filled


class KVCache:
    """
    The caches of all layers for B sequences of up to max_tokens, which are fed to the model in order. On CUDA the step
    of a single token is captured as a graph; compiled=True fuses its kernels too, which takes some 20 s once.
    ValueError for a variant whose `attend` is another function: `LayerCache.attend` takes its place.
    """

    def __init__(self, model: GPT, max_tokens: int, batch_size: int = 1, compiled: bool = False):
        for block in model.transformer.h:
            if type(block.attn).attend not in OWN_ATTENTION:
                raise ValueError(f"{type(block.attn).__name__} has an attend of its own, unknown to the cache: "
                                 "sample with --recompute")
        config, weight = model.config, model.lm_head.weight
        shape = (batch_size, config.n_head, config.head_dim)
        whole = math.ceil(max_tokens / 128) * 128  # matrix products over an odd number of entries are slow
        sizes = [min(config.layer_window(layer) or whole, whole) for layer in range(config.n_layer)]
        self.layers = [LayerCache(size, shape, config.attention_scale, weight.device, weight.dtype) for size in sizes]
        self.model, self.device, self.max_tokens, self.n_tokens = model, weight.device, max_tokens, 0
        self.step = compile_static(self.run) if compiled else self.run
        self.graph = None
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=weight.device)  # what the graph reads
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)

    def clear(self):
        """Begins a new text."""
        self.n_tokens = 0

    def run(self, idx, position):
        """idx: (B, n), the tokens at position (n,). Returns the logits (B, V) that follow the last of them."""
        by_size = {size: places(position, size) for size in {layer.n_entries for layer in self.layers}}
        for layer in self.layers:
            layer.entry, layer.visible = by_size[layer.n_entries]
        logits, _ = self.model.run(idx, None, *rotary_angles(position, self.model.config.head_dim), self.layers)
        return logits[:, -1]

    @torch.no_grad()
    def feed(self, idx):
        """
        idx: (B, n) int64, the next tokens. Returns the logits (B, V) that follow the last of them, in memory that the
        next call may use again. ValueError if they are more than max_tokens with those before.
        """
        if self.n_tokens + idx.size(1) > self.max_tokens:
            raise ValueError(f"{self.n_tokens + idx.size(1)} tokens are more than max_tokens={self.max_tokens}")
        self.model.use(PLAIN)
        for part in idx.split(CHUNK_TOKENS, dim=1):
            position = torch.arange(self.n_tokens, self.n_tokens + part.size(1), device=idx.device)
            logits = self.run(part, position) if part.size(1) > 1 else self.feed_one(part, position)
            self.n_tokens += part.size(1)
        return logits

    def feed_one(self, idx, position):
        """The same for a single token, on CUDA by one graph instead of hundreds of kernels."""
        self.token.copy_(idx)
        self.position.copy_(position)
        if not idx.is_cuda:
            return self.step(self.token, self.position)
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles, and warms up: to store a token again changes nothing
                self.step(self.token, self.position)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.step(self.token, self.position)
        self.graph.replay()
        return self.logits


class Recompute:
    """The same without a cache, every token from all tokens before it: what the cache is compared with."""

    def __init__(self, model: GPT):
        self.model, self.device = model, model.lm_head.weight.device
        if model.windowed_attentions():
            model.window_backend = "blocked"  # flex would be compiled for every length
        self.idx = None

    def clear(self):
        self.idx = None

    @torch.no_grad()
    def feed(self, idx):
        self.idx = idx if self.idx is None else torch.cat((self.idx, idx), dim=1)
        n = self.idx.size(1)
        padded = F.pad(self.idx, (0, -n % 128))  # later tokens change nothing; cuDNN prepares a kernel for each length
        return self.model(padded)[0][:, n - 1]
