"""kernels/verify.py: its checks of the back ends of this machine, and that no wrong kernel passes them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import attention as reference_attention
from small import call

import bench
from kernels import verify
from kernels.attention import WINDOW_ATTENTION, blocked_window_attention, window_tables
from kernels.verify import NAMES, Case, all_cases, check, check_group

CPU = torch.device("cpu")
FLOAT32 = Case("blocked", torch.float32, D=64, T=300, W=128)
BFLOAT16 = replace(FLOAT32, dtype=torch.bfloat16)


@pytest.mark.parametrize("case", [c for c in all_cases(CPU) if c.backend in ("SDPA", "blocked")],
                         ids=lambda c: f"{c.backend}-{c.dtype}-{c.D}-{c.T}-{c.W}")
def test_every_back_end_of_the_cpu_passes(case):
    for result in check_group([case], CPU):
        assert (result.miss, result.cannot, result.keys_agree) == ("", "", True)
        assert set(result.ratios) == set(NAMES) and max(result.ratios.values()) <= 2
        assert result.last_query_sees == min(case.T, case.W or case.T)


@pytest.mark.parametrize("W", [1, 2, 128, 300])
def test_the_reference_of_the_tests_passes(W, monkeypatch):
    """It shares no code with kernels/verify.py: what both call right is the same function."""
    rms_of_q = []

    def attend(q, k, v, W):
        rms_of_q.append(q.detach().pow(2).mean().sqrt().item())
        return reference_attention(q, k, v, W)

    monkeypatch.setitem(WINDOW_ATTENTION, "blocked", attend)
    for result in check_group([replace(FLOAT32, W=W)], CPU):
        assert result.ratios and not result.miss
    # without and with qk_norm, each for the gradients and for the visible keys
    assert rms_of_q == pytest.approx([2, 0, 1, 0], rel=0.02)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_covered(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cases = all_cases(torch.device(device))
    full = {"SDPA"} if device == "cpu" else {"CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"}
    for T in (256, 300):
        for W in (1, 2, 127, 128, 129, T, None):
            for dtype, D in (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64):
                backends = {c.backend for c in cases if (c.dtype, c.D, c.T, c.W) == (dtype, D, T, W)}
                assert backends == (full if W is None else {"flex", "flash", "blocked"})


# -----------------------------------------------------------------------------
# wrong kernels


right = blocked_window_attention
T = FLOAT32.T
ROW, BLOCK = torch.zeros(2, 3, T, 1, dtype=torch.bool), (torch.arange(T) // 128 == 1)[:, None]
ROW[1, 2, 200] = True


def not_causal(q, k, v, W):
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=distance.abs() < W)


def constant(part, x):
    """x, but no gradient for this part of it."""
    return torch.where(part, x.detach(), x)


WRONG = {  # name: (kernel, what must miss)
    "a key too many": (lambda q, k, v, W: right(q, k, v, W + 1), {*NAMES, "keys"}),
    "a key too few": (lambda q, k, v, W: right(q, k, v, W - 1), {*NAMES, "keys"}),
    "not causal": (not_causal, {*NAMES, "keys"}),
    "scale": (lambda q, k, v, W: right(1.02 * q, k, v, W), {*NAMES}),
    "a block without dv": (lambda q, k, v, W: right(q, k, constant(BLOCK, v), W), {"dv"}),
    "a row without dq": (lambda q, k, v, W: right(constant(ROW, q), k, v, W), {"dq"}),
    "a row without dk": (lambda q, k, v, W: right(q, constant(ROW, k), v, W), {"dk"}),
    "a row of zeros": (lambda q, k, v, W: torch.where(ROW, 0, right(q, k, v, W)), {*NAMES}),
    "a row of NaN": (lambda q, k, v, W: right(q, k, v, W).masked_fill(ROW, torch.nan), {*NAMES}),
    "dq of NaN": (lambda q, k, v, W: right(q, k, v, W) + 0 * (q - q.detach()).sqrt(), {"dq"}),
}


def what_misses(result):
    return {name for name in NAMES if result.ratios[name] > 2} | (set() if result.keys_agree else {"keys"})


@pytest.mark.parametrize("case", [FLOAT32, BFLOAT16], ids=lambda c: str(c.dtype))
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_misses(wrong, case, monkeypatch):
    kernel, expected = WRONG[wrong]
    monkeypatch.setitem(WINDOW_ATTENTION, "blocked", kernel)
    result = check(case, CPU)
    assert what_misses(result) == expected
    assert all(f"error of {name}" in result.miss for name in expected - {"keys"})


@pytest.mark.parametrize("case", [FLOAT32, BFLOAT16], ids=lambda c: str(c.dtype))
def test_where_plain_attention_is_exact_the_bound_is_tight(case, monkeypatch):
    """One visible key: out = v, dq = dk = 0. What is added has no value, and a gradient of d_out / 10,000."""
    monkeypatch.setitem(WINDOW_ATTENTION, "blocked", lambda q, k, v, W: right(q, k, v, W) + 1e-4 * (q - q.detach()))
    assert what_misses(check(replace(case, W=1), CPU)) == {"dq"}
    monkeypatch.setitem(WINDOW_ATTENTION, "blocked", lambda q, k, v, W: right(q, k, v, 2))
    assert what_misses(check(replace(case, W=1), CPU)) == {*NAMES, "keys"}


def test_full_attention_without_the_causal_mask_misses(monkeypatch):
    monkeypatch.setattr(verify, "causal_attention", F.scaled_dot_product_attention)
    assert what_misses(check(replace(BFLOAT16, backend="SDPA", W=None), CPU)) == {*NAMES, "keys"}


def test_a_low_precision_in_between_misses(monkeypatch):
    """float32 in and out, computed in bfloat16."""
    monkeypatch.setitem(WINDOW_ATTENTION, "blocked",
                        lambda q, k, v, W: right(q.bfloat16(), k.bfloat16(), v.bfloat16(), W).float())
    assert what_misses(check(FLOAT32, CPU)) == {*NAMES}


# -----------------------------------------------------------------------------
# back ends that do not serve


def test_only_the_default_has_to_serve(monkeypatch):
    def no_kernel(q, k, v):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(verify, "causal_attention", no_kernel)
    flex, full = replace(FLOAT32, backend="flex"), replace(FLOAT32, backend="EFFICIENT_ATTENTION", W=None)
    for case, reason in (flex, "serves CUDA only"), (full, "No available kernel"):
        monkeypatch.setattr(verify, "default_backend", lambda case, device: "another")
        result = check(case, CPU)
        assert reason in result.cannot and not result.miss
        monkeypatch.setattr(verify, "default_backend", lambda case, device: case.backend)
        result = check(case, CPU)
        assert reason in result.miss and not result.cannot


def test_a_kernel_that_fails_misses(monkeypatch):
    def kernel(q, k, v, W):
        raise RuntimeError("misaligned address\nand more")

    monkeypatch.setattr(verify, "default_backend", lambda case, device: "another")
    monkeypatch.setitem(WINDOW_ATTENTION, "blocked", kernel)
    assert check(FLOAT32, CPU).miss == "misaligned address"


# -----------------------------------------------------------------------------
# the command


def test_command(monkeypatch, capsys):
    monkeypatch.setattr(verify, "SHAPES", [(256, 128), (256, None)])
    assert call(bench.main, ["--verify", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("pass") == 16 and "MISS" not in out and max(map(len, out.splitlines())) <= 120
    assert "256/128   128" in out and "cannot serve: flex, torch.bfloat16: window_backend='flex' serves CUDA" in out

    monkeypatch.setitem(WINDOW_ATTENTION, "blocked", lambda q, k, v, W: right(q, k, v, W + 1))
    assert call(bench.main, ["--verify", "--device=cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("pass") == 8 and "256/128   129" in out
    misses = [line for line in out.splitlines() if line.startswith("MISS")]
    assert len(misses) == len(set(misses)) == 8
    assert all("backend='blocked'" in line and "128 pairs of query and key" in line for line in misses)


def test_bad_options(capsys):
    assert call(bench.main, ["--verify", "--device=tpu"]) == 2
    error = capsys.readouterr().err
    assert "device='tpu'" in error and error.count("\n") == 1


@pytest.mark.gpu
def test_gpu_every_back_end_passes(capfd):
    """As a command: its processes compile the many shapes of flex at the same time."""
    code = call(bench.main, ["--verify", "--device=cuda"])
    out = capfd.readouterr().out
    assert code == 0, out
    assert all(name in out for name in ("flex *", "flash", "blocked", "EFFICIENT_ATTENTION"))


@pytest.mark.gpu
def test_gpu_a_key_too_many_misses(monkeypatch, fresh_compiler):
    monkeypatch.setattr(verify, "window_tables", lambda name, B, T, W, *rest: window_tables(name, B, T, W + 1, *rest))
    for result in check_group([replace(BFLOAT16, backend="flex")], torch.device("cuda", 0)):
        assert what_misses(result) == {*NAMES, "keys"}
