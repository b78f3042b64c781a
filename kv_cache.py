"""
What a model remembers while it writes: keys and values of the tokens so far, a ring of W entries in a windowed layer.

Memory is 2 x B x C x (W or max_tokens) elements per layer, however many tokens are written.
"""

import torch
import torch.nn.functional as F

from model import GPT, rotary_angles


class LayerCache:
    """Keys and values of one layer: the token at position p is in entry p % S, and S is W in a windowed layer."""

    def __init__(self, n_entries: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype):
        B, H, D = shape
        self.keys = torch.zeros(B, H, n_entries, D, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.full((n_entries,), -1, device=device)  # of the token in each entry; -1: none yet
        self.next = torch.zeros(1, dtype=torch.int64, device=device)  # position of the next token

    def attend(self, q, k, v):
        """Attention of the next n tokens to the cached ones and themselves; q, k, v and the result are (B, H, n, D)."""
        n, n_entries = q.size(2), len(self.positions)
        position = self.next + torch.arange(n, device=q.device)
        if n == 1:  # its entry is that of the token that has just left the window: nothing has to be copied
            self.store(k, v, position)
            keys, values, positions = self.keys, self.values, self.positions
        else:
            keys, values = torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)
            positions = torch.cat((self.positions, position))
            self.store(k, v, position)
        distance = position[:, None] - positions  # (n, entries)
        mask = (distance >= 0) & (distance < n_entries) & (positions >= 0)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    def store(self, k, v, position):
        n_entries = len(self.positions)
        self.next += len(position)
        position = position[-n_entries:]  # of more tokens than entries, the last ones stay
        entry = position % n_entries
        self.keys.index_copy_(2, entry, k[:, :, -n_entries:])
        self.values.index_copy_(2, entry, v[:, :, -n_entries:])
        self.positions.index_copy_(0, entry, position)


CHUNK_TOKENS = 256  # of a prompt at a time: what bounds the memory of the scores


class KVCache:
    """The caches of all layers for sequences of up to max_tokens, which are fed to the model in order."""

    def __init__(self, model: GPT, max_tokens: int, batch_size: int = 1):
        config, weight = model.config, model.lm_head.weight
        shape = (batch_size, config.n_head, config.head_dim)
        sizes = [min(config.layer_window(layer) or max_tokens, max_tokens) for layer in range(config.n_layer)]
        self.layers = [LayerCache(size, shape, weight.device, weight.dtype) for size in sizes]
        self.model, self.max_tokens, self.n_tokens = model, max_tokens, 0

    @torch.no_grad()
    def feed(self, idx):
        """idx: (B, n) int64, the next tokens. Returns the logits (B, V) that follow the last of them."""
        if self.n_tokens + idx.size(1) > self.max_tokens:
            raise ValueError(f"{self.n_tokens + idx.size(1)} tokens are more than max_tokens={self.max_tokens}")
        for part in idx.split(CHUNK_TOKENS, dim=1):
            position = torch.arange(self.n_tokens, self.n_tokens + part.size(1), device=idx.device)
            logits, _ = self.model.run(part, None, *rotary_angles(position, self.model.config.head_dim), self.layers)
            self.n_tokens += part.size(1)
        return logits[:, -1]
