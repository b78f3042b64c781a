"""
kernels/attention.py: each kernel against a float64 reference, the block mask against the dense mask, and every slow
path provoked. All back ends are compared by `python bench.py --verify`: test_verify.py.
"""

import shutil

import pytest
import torch
from reference import attention
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import machine
from costs.measure import block_mask_cost
from kernels import attention as kernels
from kernels.attention import (
    blocked_window_attention,
    causal_attention,
    choose_window_backend,
    sdpa_choice,
    use_sdpa,
    window_block_mask,
)
from kernels.compiling import SlowPath, compile_static
from model import GPT, GPTConfig


def error(x, reference):
    """|x - reference| / |reference|."""
    return ((x.double() - reference).norm() / reference.norm()).item()


# -----------------------------------------------------------------------------
# the blocked form, and the block mask of flex


@pytest.mark.parametrize("T", [1, 5, 16, 17, 33])
@pytest.mark.parametrize("window", [1, 2, 3, 8, 16, 40])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_blocked_window_attention_equals_dense(T, window, scale):
    generator = torch.Generator().manual_seed(T)
    q, k, v, d_out = (torch.randn(2, 3, T, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    q, k, v = ((2 * x).requires_grad_() for x in (q, k, v))
    actual, expected = blocked_window_attention(q, k, v, window, scale), attention(q, k, v, window, scale)
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
        blocks = torch.zeros(-(-T // 128), -(-T // 128), dtype=torch.int64)
        if counts is not None:
            for row in range(len(blocks)):
                for column in indices[0, 0, row, : counts[0, 0, row]].tolist():
                    blocks[row, column] += 1
        return blocks

    partial, full = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    transposed = listed(mask.q_num_blocks, mask.q_indices).T  # what the backward pass walks through
    assert torch.equal(transposed + 2 * listed(mask.full_q_num_blocks, mask.full_q_indices).T, partial + 2 * full)

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
        for full, partial in (mask.full_kv_indices, mask.kv_indices), (mask.full_q_indices, mask.q_indices):
            assert full is None or full.stride() == partial.stride(), "torch 2.11 reads both with the strides of one"


@pytest.mark.parametrize("T", [1, 129, 150, 193, 256, 300, 500])
@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_flex_finds_every_visible_pair_in_the_lists(T, tile):
    """Its kernels read the lists in tiles, of each no more than ceil(T / tile): what T cuts short has to come last."""
    for window in (1, 2, 64, 127, 129, 130, 255, 257, 300, T):
        mask = window_block_mask(T, window, torch.device("cpu"))
        n_tiles = -(-T // tile)
        for by_query, names in (True, ("kv", "full_kv")), (False, ("q", "full_q")):
            read = torch.zeros(1024, 1024, dtype=torch.bool)
            for name in names:
                counts, indices = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
                for row in range(0 if counts is None else counts.size(-1)):
                    here = [128 * block.item() + start for block in indices[0, 0, row][: counts[0, 0, row]]
                            for start in range(0, 128, tile)]
                    for start in here[:n_tiles]:
                        read[128 * row : 128 * row + 128, start : start + tile] = True
            read = (read if by_query else read.T)[:T, :T]
            q_idx, kv_idx = torch.arange(T)[:, None], torch.arange(T)
            assert read[(q_idx >= kv_idx) & (q_idx - kv_idx < window)].all(), f"window {window}, {names}"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("T", "window"), [(1, 1), (40, 7), (129, 128), (300, 129), (300, 1000)])
def test_flex_attention_with_the_mask_equals_dense(T, window):
    """Uncompiled, on the CPU: values of the mask function. The fused kernel is tested on a GPU."""
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, 2, T, 16, generator=generator) for _ in range(3))
    with torch.no_grad():
        out = kernels.flex(q, k, v, window, 0.7, window_block_mask(T, window, torch.device("cpu")), {}).transpose(1, 2)
    assert error(out, attention(q.double(), k.double(), v.double(), window, 0.7)) < 1e-6


# -----------------------------------------------------------------------------
# no slow path in silence


def plus(x, n):
    return x + n * STATE["unguarded"]


STATE = {"unguarded": 1}


@pytest.fixture
def compiled(fresh_compiler):
    """Traced by torch.compile, but run as it is: these tests are about when, not about what."""
    return compile_static(plus, backend="eager")


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, d):
        return 2 * d


def twice(x):
    return Twice.apply(x)


def test_a_backward_of_its_own_comes_from_the_cache(tmp_path, monkeypatch, fresh_compiler):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for hits in 0, 1:
        kernels.forget_compiled()
        torch._dynamo.utils.counters.clear()
        compile_static(twice)(torch.ones(3, requires_grad=True)).sum().backward()
        assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == hits


def test_each_shape_and_grad_mode_is_compiled_once(compiled):
    torch._dynamo.utils.counters.clear()
    x = torch.ones(3, requires_grad=True)
    for _ in range(3):
        assert compiled(x, 1).tolist() == [2, 2, 2]
        assert compiled(x, 2).tolist() == [3, 3, 3]
        assert compiled(torch.ones(4), 1).tolist() == [2, 2, 2, 2]
        assert compiled(torch.ones(4, dtype=torch.float64), 1).dtype == torch.float64
        with torch.no_grad():
            assert not compiled(x, 1).requires_grad
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5


def test_arguments_by_name(compiled):
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert compiled(torch.ones(3), n=1).tolist() == compiled(n=1, x=torch.ones(3)).tolist() == [2, 2, 2]
        assert compiled(torch.ones(3), n=2).tolist() == [3, 3, 3]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_compiling_twice_for_the_same_shapes_is_refused(compiled, monkeypatch):
    compiled(torch.ones(3), 1)
    monkeypatch.setitem(STATE, "unguarded", 2)
    with pytest.raises(SlowPath, match=r"plus would be compiled again for .*STATE\['unguarded'\] == 1"):
        compiled(torch.ones(3), 1)
    assert compiled(torch.ones(4), 1).tolist() == [3, 3, 3, 3]  # a new shape may be compiled


def test_more_shapes_than_torch_compiles_are_refused(compiled):
    limit = torch._dynamo.config.recompile_limit
    other = compile_static(plus, backend="eager")
    for n in range(1, limit + 1):
        compiled(torch.ones(n), 1)
        other(torch.ones(n), 1)  # has a limit of its own
    with pytest.raises(SlowPath, match=f"plus has been compiled for {limit} shapes"):
        compiled(torch.ones(limit + 1), 1)


def test_another_number_may_be_compiled(compiled):
    """Such as another attention_scale: torch makes it part of the compiled form."""
    assert [compiled(torch.ones(1), number).item() for number in (1, 2, 0.25, 0.5, 0.25)] == [2, 3, 1.25, 1.5, 1.25]


def test_running_uncompiled_is_refused(compiled):
    with torch._dynamo.config.patch(disable=True), pytest.raises(SlowPath, match="plus would run uncompiled"):
        compiled(torch.ones(3), 1)


def test_an_error_of_the_function_is_left_alone(compiled):
    with pytest.raises(RuntimeError) as caught:
        compiled(torch.ones(3), torch.ones(4))
    assert not isinstance(caught.value, SlowPath)


def test_uncompiled_flex_is_refused(fresh_compiler):
    """flex_attention on its own compiles itself; with the compiler off it would be the T x T form."""
    q = torch.randn(1, 2, 256, 16)
    with torch._dynamo.config.patch(disable=True), pytest.raises(SlowPath, match="flex would run uncompiled"):
        kernels.flex_window_attention(q, q, q, 64, block_mask=window_block_mask(256, 64, q.device), kernel_options={})


@pytest.mark.parametrize(("name", "head_dim", "device", "dtype", "words"), [
    ("flex", 64, "cpu", torch.float32, ["'flex'", "CUDA only", "cpu", "'blocked'"]),
    ("flash", 64, "cpu", torch.bfloat16, ["'flash'", "CUDA only", "cpu", "'blocked'"]),
    ("flex", 64, "mps", torch.float32, ["'flex'", "mps"]),
    ("flex", 8, "cuda", torch.bfloat16, ["'flex'", "heads of 8", "16", "'blocked'"]),
    (None, 8, "cuda", torch.bfloat16, ["'flex'", "heads of 8", "'blocked'"]),
    ("flash", 64, "cuda", torch.float32, ["'flash'", "float32", "'flex' or 'blocked'"]),
    ("flash", 36, "cuda", torch.bfloat16, ["'flash'", "heads of 36", "multiples of 8", "'flex'"]),
    ("flash", 264, "cuda", torch.bfloat16, ["'flash'", "heads of 264", "256"]),
    ("flash", 64, "cuda", torch.bfloat16, ["'flash'", "Ampere"]),
])
def test_a_back_end_that_cannot_serve_says_so_in_one_line(name, head_dim, device, dtype, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError) as caught:
        choose_window_backend(name, head_dim, torch.device(device), dtype)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_flash_is_asked_for_the_keys_before_the_query(monkeypatch):
    """varlen_attn, also one that the user has activated in torch, counts W - 1 keys before a query's own."""
    def varlen_attn(q, k, v, starts_q, starts_k, most_q, most_k, scale, window_size):
        assert starts_q.tolist() == [0, 16, 32] and (most_q, most_k) == (16, 16)
        parts = [x.unflatten(0, (2, 16)).transpose(1, 2).double() for x in (q, k, v)]
        assert window_size[1] == 0
        return attention(*parts, window_size[0] + 1, scale).transpose(1, 2).flatten(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0)).double()
    out = kernels.flash_window_attention(q, k, v, 5, 0.7, sequence_starts=kernels.sequence_starts(2, 16, q.device))
    assert error(out, attention(q, k, v, 5, 0.7)) < 1e-12


def test_default_back_ends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_window_backend(None, 64, cuda, torch.bfloat16) == "flex"
    assert choose_window_backend(None, 64, cpu, torch.float32) == "blocked"
    assert choose_window_backend("flash", 64, cuda, torch.bfloat16) == "flash"


@pytest.mark.parametrize(("capability", "head_dim", "dtype", "T", "masked", "expected"), [
    ((9, 0), 64, torch.bfloat16, 1024, False, "CUDNN_ATTENTION"),
    ((9, 0), 64, torch.bfloat16, 1, False, "FLASH_ATTENTION"),
    ((9, 0), 192, torch.bfloat16, 1024, False, "FLASH_ATTENTION"),
    ((9, 0), 36, torch.bfloat16, 1024, False, "FLASH_ATTENTION"),
    ((9, 0), 64, torch.bfloat16, 1024, True, "EFFICIENT_ATTENTION"),
    ((9, 0), 36, torch.float32, 1024, False, "EFFICIENT_ATTENTION"),
    ((9, 0), 64, torch.float32, 1024, False, "EFFICIENT_ATTENTION"),
    ((9, 0), 64, torch.float64, 1024, False, "MATH"),
    ((8, 0), 64, torch.bfloat16, 1024, False, "FLASH_ATTENTION"),
    ((8, 0), 512, torch.bfloat16, 1024, False, "EFFICIENT_ATTENTION"),
    ((7, 5), 64, torch.float16, 1024, False, "EFFICIENT_ATTENTION"),
])
def test_kernel_of_full_attention(capability, head_dim, dtype, T, masked, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert sdpa_choice(T, head_dim, torch.device("cuda"), dtype, masked).name == expected
    assert sdpa_choice(T, head_dim, torch.device("cpu"), dtype, masked) is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    in_order = {"CUDNN_ATTENTION": "FLASH_ATTENTION", "EFFICIENT_ATTENTION": "MATH"}.get(expected, expected)
    assert sdpa_choice(T, head_dim, torch.device("cuda"), dtype, masked).name == in_order


@pytest.mark.parametrize(("head_dim", "dtype", "masked"), [
    (34, torch.float32, False), (36, torch.bfloat16, True), (260, torch.bfloat16, False)])
def test_heads_without_a_kernel_are_refused_in_one_line(head_dim, dtype, masked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=rf"^heads of {head_dim} have no such kernel[^\n]*$"):
        sdpa_choice(1024, head_dim, torch.device("cuda"), dtype, masked)
    if masked:
        with pytest.raises(ValueError, match=f"heads of {head_dim}"):
            choose_window_backend("blocked", head_dim, torch.device("cuda"), dtype)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler and there is no g++")
def test_a_cached_graph_does_not_bring_back_another_kernel(fresh_compiler, tmp_path, monkeypatch):
    """Torch keeps compiled graphs on disk, by a key that does not know which kernel was asked for."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cpu, names = torch.device("cpu"), {}
    for choice in SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION:
        torch._dynamo.reset()
        q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
        with use_sdpa(choice):
            compiled = compile_static(causal_attention)
            compiled(q, k, v).sum().backward()
            found = machine.attention_kernels(lambda q=q, k=k, v=v, f=compiled: f(q, k, v), cpu)
        assert names.setdefault(choice, found) == found
    assert names[SDPBackend.FLASH_ATTENTION] == "fused SDPA for CPU" != names[SDPBackend.MATH]


def test_a_kernel_that_cannot_serve_raises():
    """On a CPU only two kernels exist: the context leaves none, so that nothing else can be taken in silence."""
    q = torch.randn(1, 2, 16, 8)
    with use_sdpa(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="kernel"):
        causal_attention(q, q, q)


# -----------------------------------------------------------------------------
# on a GPU


@pytest.mark.gpu
def test_gpu_block_mask_is_small():
    """At T = 65,536: the metadata alone would be 4 MiB in the form with a column for each block."""
    device = torch.device("cuda", 0)
    block_mask_cost(1024, 1024, device)  # loads what building takes
    kept_mib, peak_mib, ms = block_mask_cost(65536, 1024, device)
    assert 0.05 < kept_mib < 0.2 and peak_mib < 1 and ms < 50


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "kernel"), [("flex", "flex_attention"), ("flash", "FlashAttention"),
                                                 ("blocked", "memory-efficient SDPA"), (None, "cuDNN")])
def test_gpu_the_kernel_that_was_meant_runs(backend, kernel, fresh_compiler):
    """In a compiled model, where torch chooses while it traces. None is full attention."""
    torch.cuda.get_device_capability() >= (9, 0) or pytest.skip("the default kernel is cuDNN from Hopper on")
    config = GPTConfig(n_layer=2, n_head=2, n_embd=128, vocab_size=512, window_size=backend and 130)
    gpt = GPT(config, backend).cuda()
    gpt.compile()
    idx = torch.arange(1024, device="cuda").view(2, 512) % 512

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            gpt(idx, idx)[1].backward()

    step()
    assert machine.attention_kernels(step, torch.device("cuda", 0)) == kernel


@pytest.mark.gpu
def test_gpu_an_uncompiled_model_has_a_fused_window_or_stops(fresh_compiler):
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=512, window_size=130)).cuda()
    idx = torch.arange(512, device="cuda")[None]
    assert machine.attention_kernels(lambda: gpt(idx, idx)[1].backward(), torch.device("cuda", 0)) == "flex_attention"
    kernels.compiled_flex.cache_clear()
    with torch._dynamo.config.patch(disable=True), pytest.raises(SlowPath, match="flex would run uncompiled"):
        gpt(idx, idx)
