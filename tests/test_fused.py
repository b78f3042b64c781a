"""kernels/fused.py: plain and fused against float64."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model
from configs.variants import variant
from costs.memory import layer_bytes
from kernels import cublaslt, fused
from kernels.kv_cache import KVCache
from model import GPT, GPTConfig, apply_rotary, norm, rotary_tables

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


CAPS = [None, 3.0]  # a softcap of the order of the logits


def inputs(dtype, device="cpu", N=20, C=32, V=5000):
    """x, weight (float32, as parameters are) and targets, of which two do not count."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(N, C, generator=generator), 0.5 * torch.randn(V, C, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    targets[[3, 11]] = -1
    if dtype == torch.float32:
        x[5] *= 40  # logits of which exp is infinite
    return x.to(device, dtype).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def reference(x, weight, targets, cap):
    """Loss and gradients of 3 times the loss, in float64, of the values that the form computes with."""
    x, weight = (value.detach().to(x.dtype).cpu().double().requires_grad_() for value in (x, weight))
    targets = targets.cpu()
    logits = x @ weight.T if cap is None else cap * torch.tanh(x @ weight.T / cap)
    nats = -logits.log_softmax(1)[range(len(targets)), targets][targets >= 0].mean()
    return nats.item(), torch.autograd.grad(3 * nats, (x, weight))


def errors(form, x, weight, targets, cap):
    """Relative, of the loss and of both gradients."""
    expected, gradients = reference(x, weight, targets, cap)
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16)
    with autocast:
        nats = form(x, weight, targets, cap)
    assert nats.dtype == torch.float32 and nats.shape == ()
    found = torch.autograd.grad(3 * nats, (x, weight))
    assert [value.dtype for value in found] == [x.dtype, torch.float32]
    return [abs(nats.item() / expected - 1)] + [
        ((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(found, gradients, strict=True)]


def compare(x, weight, targets, cap=None):
    """Fused errs at most twice as much as plain."""
    of_plain, of_fused = (errors(form.cross_entropy, x, weight, targets, cap) for form in (model.PLAIN, fused))
    assert max(of_plain) < (1e-6 if x.dtype == torch.float32 else 0.02)
    assert all(b <= 2 * a + 1e-6 for a, b in zip(of_plain, of_fused, strict=True)), (of_plain, of_fused)


def cross_entropy_in_torch(logits, targets, losses, n_targets, cap):
    """What the kernel does."""
    counts = targets >= 0
    slope = 1 if cap is None else 1 - torch.tanh(logits.float() / cap).square()
    log_p = model.softcap(logits.float(), cap).log_softmax(1)
    losses.copy_(torch.where(counts, -log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0], 0))
    one_hot = F.one_hot(targets.clamp(min=0), logits.size(1))
    logits.copy_(slope * (log_p.exp() - one_hot) * counts[:, None] / n_targets)


def matmul_in_torch(layout, left, right, out, epilogue=None, aux=None, accumulate=False):
    """What cuBLASLt does."""
    assert left.is_contiguous() and right.is_contiguous() and left.dtype == right.dtype == fused.DTYPE
    y = (left.T if layout[0] == "T" else left).float() @ (right.T if layout[1] == "T" else right).float()
    if epilogue == "gelu":
        aux.copy_(y)
        y = F.gelu(y, approximate="tanh")
    if epilogue == "gelu_backward":
        y = torch.ops.aten.gelu_backward(y, aux.float(), approximate="tanh")
    out.copy_(out + y if accumulate else y)


@pytest.fixture
def in_torch(monkeypatch):
    """kernels/fused.py with torch in place of its kernels; counts what would have been launched."""
    calls = Counter()
    for name, stand_in in {"matmul": matmul_in_torch, "cross_entropy_": cross_entropy_in_torch,
                           "launch": rotate_in_torch}.items():
        def counting(*arguments, name=name, stand_in=stand_in, **options):
            calls[name] += 1
            stand_in(*arguments, **options)

        monkeypatch.setattr(fused, name, counting)
    return calls


@pytest.mark.parametrize("chunk", [7, 10, 20, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", CAPS)
def test_fused_in_chunks(in_torch, monkeypatch, chunk, dtype, cap):
    """The chunks, the products and autograd."""
    monkeypatch.setattr(fused, "DTYPE", dtype)
    monkeypatch.setattr(fused, "CHUNK_TOKENS", chunk)
    compare(*inputs(dtype), cap)


SHAPES = [((2, 5, 3, 16), True), ((2, 5, 3, 16), False), ((1, 33, 4, 32), True), ((2, 33, 5, 36), True),
          ((3, 1, 1, 2), False)]  # of q, and whether it is normed


def compare_rotate(dtype, device, shape, qk_norm):
    """q, k, v and the gradient of qkv: fused errs at most as much as plain, or as rounding."""
    B, T, H, D = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D, generator=generator).to(device, dtype)
    gradients = torch.randn(3, B, T, H, D, generator=generator).to(device, dtype).unbind()
    cos, sin = rotary_tables(T, D, qkv.device)
    results = []
    for form, x in (model.PLAIN, qkv.double()), (model.PLAIN, qkv), (fused, qkv.clone()):
        parts = form.rotate(x.requires_grad_(), cos.to(torch.promote_types(x.dtype, torch.float32)), sin, qk_norm)
        assert all(part.dtype == x.dtype and part.shape == shape for part in parts)
        results.append((*parts, *torch.autograd.grad(parts, x, [d.to(x.dtype) for d in gradients])))
    assert torch.equal(x, qkv), "changed in place"
    rounding = torch.finfo(dtype).eps
    for exact, of_plain, of_fused in zip(*results, strict=True):
        error_of_plain, error = (((x.double() - exact).norm() / exact.norm()).item() for x in (of_plain, of_fused))
        assert error <= error_of_plain + rounding / 4, (error, error_of_plain)


def rotate_in_torch(direction, shape, *tensors, NORM):
    """What the kernels do."""
    if direction == "forward":
        qkv, cos, sin, scale = tensors
        for part in range(2):
            x = qkv[:, :, part].float()
            if NORM:
                scale[part] = (x.square().mean(-1) + 1e-6).rsqrt()
                x = x * scale[part][..., None]
            qkv[:, :, part] = apply_rotary(x, cos, sin)
        return
    *gradients, y, scale, cos, sin, d_qkv = tensors
    d_qkv[:, :, 2] = gradients[2]
    for part in range(2):
        d = gradients[part].float()
        if NORM:
            y_part = y[:, :, part].float()
            d = (d - y_part * (d * y_part).mean(-1, keepdim=True)) * scale[part][..., None]
        d_qkv[:, :, part] = apply_rotary(d, cos, -sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "qk_norm"), SHAPES)
def test_rotate(in_torch, dtype, shape, qk_norm):
    """What is kept for backward, and autograd."""
    compare_rotate(dtype, "cpu", shape, qk_norm)


def test_norm_and_its_gradient():
    for dtype, limit in (torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01):
        x = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        wide = x.detach().double().requires_grad_()
        y, expected = norm(x), F.rms_norm(wide, (24,), eps=1e-6)
        assert y.dtype == dtype
        d_y = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
        (d_x,), (d_expected,) = torch.autograd.grad(y, x, d_y), torch.autograd.grad(expected, wide, d_y.double())
        for a, b in (y, expected), (d_x, d_expected):
            assert (a.double() - b).norm() <= limit * b.norm()


@pytest.mark.parametrize("name", ["tiny", "tiny_post_norm_qk_norm_window32"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute_gelu", [False, True])
def test_fused_in_the_model(in_torch, monkeypatch, name, compiled, recompute_gelu, fresh_compiler):
    """Same loss, same gradients as plain; with each of the kernels, and no other product."""
    idx, targets = torch.randint(512, (2, 2, 40), generator=torch.Generator().manual_seed(1))
    results = []
    for form in "plain", "fused":
        gpt = GPT(variant(name), recompute_gelu=recompute_gelu and form == "fused")
        monkeypatch.setattr(fused, "DTYPE", torch.float32)
        if compiled:
            gpt.compile(backend="aot_eager")
        monkeypatch.setattr(fused, "choose_kernels", lambda *_, form=form: form)
        in_torch.clear()
        nats = gpt(idx, targets)[1]
        nats.backward()
        layer = {"matmul": 3 * 4, "launch": 2}
        expected = {"matmul": 2 * layer["matmul"] + 3, "launch": 2 * layer["launch"], "cross_entropy_": 1}
        assert in_torch == (expected if form == "fused" else {})
        results.append((nats, *(weight.grad for weight in gpt.parameters())))
    for of_plain, of_fused in zip(*results, strict=True):
        torch.testing.assert_close(of_fused, of_plain, rtol=1e-4, atol=1e-6)


def compare_models(device, recompute_gelu, compiled, **flags):
    """In bfloat16, loss and gradients of fused are as near to those in float64 as plain's, to a quarter."""
    config = GPTConfig(n_layer=3, n_head=2, n_embd=128, vocab_size=512, qk_norm=True, post_norm=True, **flags)
    idx, targets = torch.randint(512, (2, 4, 150), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "choose_kernels", lambda *_: "plain")
        exact = loss_and_gradients(GPT(config).double(), idx, targets)
    errors = {}
    for form in "plain", "fused":
        gpt = GPT(config, recompute_gelu=recompute_gelu and form == "fused").to(device)
        if compiled:
            gpt.compile()
        with pytest.MonkeyPatch.context() as patch, torch.autocast(device, torch.bfloat16):
            patch.setattr(fused, "choose_kernels", lambda *_, form=form: form)
            actual = loss_and_gradients(gpt, idx.to(device), targets.to(device))
        errors[form] = [((x.double().cpu() - y).norm() / y.norm()).item() for x, y in zip(actual, exact, strict=True)]
    assert max(errors["plain"][1:]) < 0.05 and errors["fused"][0] < 1e-3
    for of_plain, of_fused in zip(errors["plain"][1:], errors["fused"][1:], strict=True):
        assert of_fused < 1.25 * of_plain, errors


def loss_and_gradients(gpt, idx, targets):
    nats = gpt(idx, targets)[1]
    return [nats.detach(), *torch.autograd.grad(nats, list(gpt.parameters()))]


@pytest.mark.parametrize("recompute_gelu", [False, True])
def test_fused_is_as_exact_as_plain(in_torch, recompute_gelu, fresh_compiler):
    compare_models("cpu", recompute_gelu, compiled=False)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute_gelu", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_fused_is_as_exact_as_plain(recompute_gelu, compiled, fresh_compiler):
    """Needs a CUDA GPU: all kernels together."""
    compare_models("cuda", recompute_gelu, compiled)


STRONG = {"mlp_activation": "relu2", "untie": True, "logit_softcap": 3.0}


def test_fused_is_as_exact_as_plain_with_other_flags(in_torch, fresh_compiler):
    compare_models("cpu", False, compiled=False, **STRONG)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_fused_is_as_exact_as_plain_with_other_flags(compiled, fresh_compiler):
    """Needs a CUDA GPU: all kernels together."""
    compare_models("cuda", False, compiled, **STRONG)


def test_what_is_not_bfloat16_is_cast(in_torch):
    """As autocast does: an edit that makes the stream float32, weights in another order, gradients with strides."""
    generator = torch.Generator().manual_seed(0)
    x, d_y = (torch.randn(4, 6, 16, generator=generator) for _ in range(2))
    fc, proj = torch.randn(64, 16, generator=generator), torch.randn(64, 16, generator=generator).T
    for plain, form, weights in ((F.linear, fused.linear, (fc[:16],)),
                                 (model.mlp, fused.mlp, (fc, proj))):
        results = []
        for function, dtype in (plain, torch.float64), (plain, torch.bfloat16), (form, torch.float32):
            inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, *weights)]
            y = function(*inputs)
            transposed = d_y.transpose(0, 1).contiguous().transpose(0, 1).to(y.dtype)
            results.append((y, *torch.autograd.grad(y, inputs, transposed)))
        assert results[2][0].dtype == torch.bfloat16 and {g.dtype for g in results[2][1:]} == {torch.float32}
        for exact, of_plain, of_fused in zip(*results, strict=True):
            error_of_plain, error = (((z.double() - exact).norm() / exact.norm()).item() for z in (of_plain, of_fused))
            assert error <= 1.1 * error_of_plain, (error, error_of_plain)


def test_a_cache_takes_plain_parts_whatever_ran_before(in_torch, monkeypatch):
    gpt = GPT(variant("tiny"))
    monkeypatch.setattr(fused, "choose_kernels", lambda *_: "fused")
    with torch.autocast("cpu", torch.bfloat16):
        gpt(torch.zeros(1, 4, dtype=torch.int64))
    in_torch.clear()
    KVCache(gpt, 8).feed(torch.zeros(1, 4, dtype=torch.int64))
    assert in_torch == {}


@pytest.mark.parametrize("flags", [{}, {"qk_norm": True}, {"post_norm": True}, {"post_norm": True, "pre_norm": False},
                                   {"mlp_activation": "relu2"}])
@pytest.mark.parametrize(("form", "recompute"), [("plain", False), ("fused", False), ("fused", True)])
def test_what_a_layer_keeps(in_torch, monkeypatch, form, flags, recompute, fresh_compiler):
    """As costs/memory.py says; torch divides the graph as for a GPU, and runs it as it is."""
    monkeypatch.setattr(fused, "choose_kernels", lambda *_: form)
    if recompute and "mlp_activation" in flags:
        pytest.skip("only GELU can be computed again")
    config, kept = replace(GPTConfig(n_head=2, n_embd=128, vocab_size=64), **flags), []
    for n_layer in 1, 3:
        gpt, tensors = GPT(replace(config, n_layer=n_layer), recompute_gelu=recompute), {}
        gpt.compile(backend="aot_eager_decomp_partition")
        idx = torch.zeros(2, 512, dtype=torch.int64)
        with (torch.autograd.graph.saved_tensors_hooks(lambda x, seen=tensors: keep(x, seen), lambda x: x),
              torch.autocast("cpu", torch.bfloat16)):
            loss = gpt(idx, idx)[1]
        weights = {weight.untyped_storage().data_ptr() for weight in gpt.parameters()}
        kept.append(sum(n_bytes for storage, n_bytes in tensors.items() if storage not in weights))
        del loss
    assert (kept[1] - kept[0]) / 2 == pytest.approx(layer_bytes(config, None, 2, 512, form, recompute), rel=0.02)


def keep(x, seen):
    """Notes the bytes of the tensor's memory, once."""
    seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which torch for CUDA brings")
def test_kernel_in_the_interpreter():
    """In a process of its own: Triton asks for the interpreter once."""
    code = ("import torch; from kernels import fused; from tests.test_fused import *\n"
            "fused.CHUNK_TOKENS, fused.matmul = 7, matmul_in_torch\n"
            "for dtype in torch.float32, torch.bfloat16:\n"
            "    fused.DTYPE = dtype\n"
            "    for cap in CAPS: compare(*inputs(dtype), cap)\n"
            "    x, weight, targets = inputs(dtype); targets[4] = len(weight)\n"
            "    assert fused.cross_entropy(x, weight.to(dtype), targets).isnan(), 'not an id'\n"
            "    for shape in SHAPES: compare_rotate(dtype, 'cpu', *shape)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1],
                   env=os.environ | {"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize(("name", "device", "dtype", "lacks", "expected"), [
    (None, CPU, torch.bfloat16, None, "plain"),
    (None, CUDA, torch.float32, None, "plain"),
    (None, CUDA, torch.bfloat16, "triton", "plain"),
    (None, CUDA, torch.bfloat16, "cuda", "plain"),
    (None, CUDA, torch.bfloat16, None, "fused"),
    ("plain", CUDA, torch.bfloat16, None, "plain"),
    ("fused", CUDA, torch.bfloat16, None, "fused"),
    (None, CUDA, torch.float16, None, "plain"),
    ("fused", CUDA, torch.float16, None, "'fused' computes in bfloat16, not float16: use 'plain'"),
    ("fused", CPU, torch.bfloat16, None, "'fused' serves CUDA only, not cpu: use 'plain'"),
    ("fused", CUDA, torch.float32, None, "'fused' computes in bfloat16, not float32: use 'plain'"),
    ("fused", CUDA, torch.bfloat16, "triton", "'fused' needs Triton, which is not installed: use 'plain'"),
    ("fused", CUDA, torch.bfloat16, "cuda", "'fused' needs a torch for NVIDIA's cuBLASLt: use 'plain'"),
    ("fast", CPU, torch.float32, None, "'fast' must be one of plain, fused"),
])
def test_which_form(monkeypatch, name, device, dtype, lacks, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if lacks == module else True)
    monkeypatch.setattr(torch.version, "cuda", None if lacks == "cuda" else "13.0")
    if expected in ("plain", "fused"):
        assert fused.choose_kernels(name, device, dtype) == expected
        return
    with pytest.raises(ValueError) as caught:
        fused.choose_kernels(name, device, dtype)
    assert str(caught.value) == f"kernels={expected}"


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "N", "K"), [(8192, 3072, 768), (1000, 96, 36), (3, 50257, 64), (40, 768, 50304)])
@pytest.mark.parametrize(("layout", "epilogue", "dtype", "accumulate"), [
    ("NN", None, torch.bfloat16, False), ("NT", None, torch.bfloat16, False), ("TN", None, torch.float32, False),
    ("TN", None, torch.float32, True), ("NT", "gelu", torch.bfloat16, False),
    ("NN", "gelu_backward", torch.bfloat16, False),
])
def test_gpu_products(layout, epilogue, dtype, accumulate, M, N, K):
    """Needs a CUDA GPU: cuBLASLt against torch in float32, within the rounding of the result."""
    if epilogue and N % 8:
        pytest.skip("GELU's input has 4 n_embd columns")
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(n_rows, n_columns, dtype=torch.bfloat16):
        return torch.randn(n_rows, n_columns, device="cuda", generator=generator).to(dtype)

    left, right = draw(*((K, M) if layout[0] == "T" else (M, K))), draw(*((N, K) if layout[1] == "T" else (K, N)))
    right /= K**0.5
    out, aux = draw(M, N, dtype), draw(M, N) if epilogue else None
    expected, expected_aux = out.clone(), aux.clone() if epilogue else None
    matmul_in_torch(layout, left, right, expected, epilogue, expected_aux, accumulate)
    cublaslt.matmul(layout, left, right, out, epilogue, aux, accumulate)
    for x, y in ((out, expected), (aux, expected_aux))[:2 if epilogue else 1]:
        torch.testing.assert_close(x, y, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-3, atol=1e-2)
        assert (x.float() - y.float()).norm() < 2**-8 * y.float().norm()  # half a unit in the last place of bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1000, 8192, 20_000])
@pytest.mark.parametrize("cap", CAPS)
def test_gpu_fused(N, cap):
    """Needs a CUDA GPU: the kernel, at the size of GPT-2's vocabulary."""
    compare(*inputs(torch.bfloat16, "cuda", N, 768, 50304), cap)


@pytest.mark.gpu
def test_gpu_fused_needs_no_whole_logits():
    """Needs a CUDA GPU: less than a third of what all logits in bfloat16 take."""
    x, weight, targets = inputs(torch.bfloat16, "cuda", 65_536, 64, 50304)
    fused.cross_entropy(x, weight, targets).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused.cross_entropy(x, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 65_536 * 50304 * 2 / 3


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "qk_norm"), [*SHAPES, ((4, 1024, 12, 64), True), ((4, 1024, 6, 128), False)])
def test_gpu_rotate(shape, qk_norm):
    """Needs a CUDA GPU: the kernels."""
    compare_rotate(torch.bfloat16, "cuda", shape, qk_norm)
