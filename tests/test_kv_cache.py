"""Sampling with a cache against recomputing everything."""

from dataclasses import replace

import pytest
import torch

from configs.recipes import RECIPES
from configs.variants import VARIANTS
from kernels.kv_cache import KVCache, Recompute
from model import GPT, OWN_ATTENTION, CausalSelfAttention, attention_class

BODY = {"n_layer": 4, "n_head": 2, "n_embd": 64, "vocab_size": 512}
SMALL = {}  # each distinct set of flags once, windows of 256 tokens and more as 7, on a small body
for name, config in VARIANTS.items():
    small = replace(config, **BODY, window_size=config.window_size and max(5, min(7, config.window_size // 36)))
    if all(attention_class(small, layer).attend in OWN_ATTENTION for layer in range(small.n_layer)):
        SMALL.setdefault(small, name)

GRAPHS = ("d12_olmo2_norm_qk_norm", "d12_window256", "d12_post_norm_qk_norm_window256_SSSL",
          "d12_qk_norm_scale0.25", RECIPES["fast"].model, "tiny_post_norm_qk_norm_window32")


def test_variants_of_the_graphs():
    assert set(GRAPHS) <= set(SMALL.values())


def model_of(config):
    """Weights large enough for attention to be far from uniform."""
    model = GPT(config, seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6)
    return model


@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("n_prompt", [1, 4, 7, 8, 30])
@pytest.mark.parametrize("config", SMALL, ids=SMALL.values())
def test_greedy_is_equal_to_recomputing(config, n_prompt, chunk, monkeypatch):
    monkeypatch.setattr("kernels.kv_cache.CHUNK_TOKENS", chunk)
    model = model_of(config)
    tokens = torch.randint(512, (2, n_prompt), generator=torch.Generator().manual_seed(n_prompt))
    cache = KVCache(model, n_prompt + 20, batch_size=2)
    logits = cache.feed(tokens)
    for _ in range(20):
        with torch.no_grad():
            expected = model(tokens)[0][:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        token = expected.argmax(dim=1, keepdim=True)
        assert torch.equal(token, logits.argmax(dim=1, keepdim=True))
        tokens = torch.cat((tokens, token), dim=1)
        logits = cache.feed(token)


def test_an_attention_of_another_kind_is_refused():
    class Sharp(CausalSelfAttention):
        def attend(self, q, k, v):
            return super().attend(2 * q, k, v)

    model = model_of(next(iter(SMALL)))
    model.transformer.h[2].attn.__class__ = Sharp
    with pytest.raises(ValueError, match=r"Sharp has an attend of its own.*--recompute"):
        KVCache(model, 8)
    assert Recompute(model).feed(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 512)


def test_a_long_prompt_goes_in_chunks(monkeypatch):
    seen, run = [], KVCache.run
    monkeypatch.setattr(KVCache, "run", lambda self, idx, at: seen.append(idx.size(1)) or run(self, idx, at))
    KVCache(model_of(next(iter(SMALL))), 1000).feed(torch.zeros(1, 600, dtype=torch.int64))
    assert seen == [256, 256, 88]


def n_elements(cache):
    return [layer.keys.numel() + layer.values.numel() for layer in cache.layers]


def test_a_windowed_layer_keeps_W_entries_a_full_one_all():
    config = GPT(replace(VARIANTS["d12_post_norm_qk_norm_window256_SSSL"], **BODY, window_size=7)).config
    assert n_elements(KVCache(GPT(config), 100_000)) == [2 * 7 * 64] * 3 + [2 * 100_096 * 64]  # a multiple of 128


def test_memory_is_flat_however_many_tokens_are_fed():
    model = GPT(replace(VARIANTS["tiny_post_norm_qk_norm_window32"], vocab_size=512))
    cache = KVCache(model, 100_000)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    for _ in range(100):
        cache.feed(torch.zeros(1, 40, dtype=torch.int64))
    assert n_elements(cache) == [2 * 32 * 64] * 2 and addresses == [layer.keys.data_ptr() for layer in cache.layers]


def test_a_cleared_cache_knows_nothing_of_the_text_before():
    model = model_of(next(iter(SMALL)))
    cache, used = KVCache(model, 40), KVCache(model, 40)
    used.feed(torch.full((1, 40), 7))
    used.clear()
    for n in (5, 1, 1, 12):
        tokens = torch.arange(n)[None]
        torch.testing.assert_close(used.feed(tokens), cache.feed(tokens), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("config", [pytest.param(config, id=name) for config, name in SMALL.items() if name in GRAPHS])
def test_gpu_graph_is_equal_to_recomputing(config, compiled, fresh_compiler):
    """Greedy, in float32, and again after the text before."""
    model = model_of(config).cuda()
    cache = KVCache(model, 60, compiled=compiled)
    for seed, n_prompt in (1, 1), (2, 9), (3, 30):
        tokens = torch.randint(512, (1, n_prompt), generator=torch.Generator().manual_seed(seed)).cuda()
        cache.clear()
        logits = cache.feed(tokens)
        for _ in range(25):
            expected = Recompute(model).feed(tokens)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
            token = expected.argmax(dim=1, keepdim=True)
            assert torch.equal(token, logits.argmax(dim=1, keepdim=True))
            tokens = torch.cat((tokens, token), dim=1)
            logits = cache.feed(token)
    assert cache.graph is not None


@pytest.mark.gpu
def test_gpu_memory_is_flat_over_100_000_tokens():
    model = GPT(replace(VARIANTS["tiny_post_norm_qk_norm_window32"], vocab_size=512)).cuda()
    cache = KVCache(model, 100_000)
    token = cache.feed(torch.zeros(1, 1, dtype=torch.int64, device="cuda")).argmax(1, keepdim=True)
    token = cache.feed(token).argmax(1, keepdim=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(99_998):
        token = cache.feed(token).argmax(1, keepdim=True)
    assert cache.n_tokens == 100_000 and n_elements(cache) == [2 * 32 * 64] * 2
    assert torch.cuda.max_memory_allocated() - before < 2**20 and torch.cuda.memory_allocated() - before < 2**14


def test_more_than_max_tokens_is_refused():
    cache = KVCache(GPT(replace(VARIANTS["tiny"], vocab_size=512)), 10)
    cache.feed(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"11 tokens .* max_tokens=10"):
        cache.feed(torch.zeros(1, 3, dtype=torch.int64))
    cache.feed(torch.zeros(1, 2, dtype=torch.int64))
