"""loss.py: both forms against float64."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import loss
from configs.variants import variant
from model import GPT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def inputs(dtype, device="cpu", N=20, C=32, V=5000):
    """x, weight (float32, as parameters are) and targets, of which two do not count."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(N, C, generator=generator), 0.5 * torch.randn(V, C, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    targets[[3, 11]] = -1
    if dtype == torch.float32:
        x[5] *= 40  # logits of which exp is infinite
    return x.to(device, dtype).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def reference(x, weight, targets):
    """Loss and gradients of 3 times the loss, in float64, of the values that the form computes with."""
    x, weight = (value.detach().to(x.dtype).cpu().double().requires_grad_() for value in (x, weight))
    targets = targets.cpu()
    nats = -(x @ weight.T).log_softmax(1)[range(len(targets)), targets][targets >= 0].mean()
    return nats.item(), torch.autograd.grad(3 * nats, (x, weight))


def errors(form, x, weight, targets):
    """Relative, of the loss and of both gradients."""
    expected, gradients = reference(x, weight, targets)
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16)
    with autocast:
        nats = form(x, weight, targets)
    assert nats.dtype == torch.float32 and nats.shape == ()
    found = torch.autograd.grad(3 * nats, (x, weight))
    assert [value.dtype for value in found] == [x.dtype, torch.float32]
    return [abs(nats.item() / expected - 1)] + [
        ((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(found, gradients, strict=True)]


def compare(x, weight, targets):
    """Fused errs at most twice as much as plain."""
    plain, fused = (errors(form, x, weight, targets) for form in (loss.plain_cross_entropy, loss.fused_cross_entropy))
    assert max(plain) < (1e-6 if x.dtype == torch.float32 else 0.02)
    assert all(b <= 2 * a + 1e-6 for a, b in zip(plain, fused, strict=True)), (plain, fused)


def in_torch(logits, targets, losses, n_targets):
    """What the kernel does."""
    counts = targets >= 0
    log_p = logits.float().log_softmax(1)
    losses.copy_(torch.where(counts, -log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0], 0))
    one_hot = torch.nn.functional.one_hot(targets.clamp(min=0), logits.size(1))
    logits.copy_((log_p.exp() - one_hot) * counts[:, None] / n_targets)


@pytest.mark.parametrize("chunk", [7, 10, 20, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_in_chunks(monkeypatch, chunk, dtype):
    """The chunks, the products and autograd, with torch in place of the kernel."""
    monkeypatch.setattr(loss, "cross_entropy_", in_torch)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    compare(*inputs(dtype))


def test_fused_in_the_model(monkeypatch):
    """Compiled or not: same loss, same gradients as plain."""
    monkeypatch.setattr(loss, "cross_entropy_", in_torch)
    idx, targets = torch.randint(512, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    results = []
    for form in "plain", "fused":
        model = GPT(variant("tiny"))
        monkeypatch.setattr("model.choose_loss_backend", lambda *_, form=form: form)
        nats = model(idx, targets)[1]
        nats.backward()
        results.append((nats, *(weight.grad for weight in model.parameters())))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which torch for CUDA brings")
def test_kernel_in_the_interpreter():
    """In a process of its own: Triton asks for the interpreter once."""
    code = ("import torch, loss; from tests.test_loss import *; loss.CHUNK_TOKENS = 7\n"
            "for dtype in torch.float32, torch.bfloat16: compare(*inputs(dtype))")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize(("name", "device", "dtype", "triton", "expected"), [
    (None, CPU, torch.bfloat16, True, "plain"),
    (None, CUDA, torch.float32, True, "plain"),
    (None, CUDA, torch.bfloat16, False, "plain"),
    (None, CUDA, torch.bfloat16, True, "fused"),
    ("plain", CUDA, torch.bfloat16, True, "plain"),
    ("fused", CUDA, torch.bfloat16, True, "fused"),
    (None, CUDA, torch.float16, True, "plain"),
    ("fused", CUDA, torch.float16, True, "'fused' computes in bfloat16, not float16: use 'plain'"),
    ("fused", CPU, torch.bfloat16, True, "'fused' serves CUDA only, not cpu: use 'plain'"),
    ("fused", CUDA, torch.float32, True, "'fused' computes in bfloat16, not float32: use 'plain'"),
    ("fused", CUDA, torch.bfloat16, False, "'fused' needs Triton, which is not installed: use 'plain'"),
    ("fast", CPU, torch.float32, True, "'fast' must be one of plain, fused"),
])
def test_which_form(monkeypatch, name, device, dtype, triton, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: triton or None)
    if expected in loss.LOSS:
        assert loss.choose_loss_backend(name, device, dtype) == expected
        return
    with pytest.raises(ValueError) as caught:
        loss.choose_loss_backend(name, device, dtype)
    assert str(caught.value) == f"loss_backend={expected}"


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1000, 8192, 20_000])
def test_gpu_fused(N):
    """Needs a CUDA GPU: the kernel, at the size of GPT-2's vocabulary."""
    compare(*inputs(torch.bfloat16, "cuda", N, 768, 50304))


@pytest.mark.gpu
def test_gpu_fused_needs_no_whole_logits():
    """Needs a CUDA GPU: less than a third of what all logits in bfloat16 take."""
    x, weight, targets = inputs(torch.bfloat16, "cuda", 65_536, 64, 50304)
    loss.fused_cross_entropy(x, weight, targets).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.fused_cross_entropy(x, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 65_536 * 50304 * 2 / 3
