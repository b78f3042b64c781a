"""
Whether every attention back end on this machine computes what model.py means by attention.

    python bench.py --verify

Output and gradients of each back end are compared with a dense float64 reference, and so are those of plain attention:
dense, each step in the back end's own dtype. A back end passes if its error is at most twice that of plain attention,
for out, dq, dk and dv, and if its queries see exactly the keys that they should: with q = k = 0 and parts of the
identity as v, its output is the T x T matrix of weights.

The error is the Frobenius norm of the difference, over T and D, of the worst head: the ratio of two kernels' errors
then hardly depends on the inputs (that of their largest elements ranges from 0.2 to 3), and yet one wrong row is a
miss. Plain attention can be exact by luck: with one visible key dq = dk = 0. So its error counts as at least 2 eps of
float32, in which every back end adds up, times the root mean square of the terms that cancel; see `rounding`. In
bfloat16 that matters with one visible key only, in float32 it is up to 11 times plain attention's error: fused kernels
compute the weights anew in the backward pass, and torch's own for CPUs errs 2.2 times as much as plain attention.
"""

import math
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from tqdm import tqdm

import machine
from kernels.attention import (
    WINDOW_ATTENTION,
    causal_attention,
    choose_window_backend,
    forget_compiled,
    sdpa_choice,
    use_sdpa,
    window_tables,
)
from model import norm

B, H = 2, 3
SHAPES = [(T, W) for T in (256, 300) for W in (1, 2, 127, 128, 129, T, None)]  # (T, W)
SHAPES += [(640, 300), (32, 8), (100, 40)]  # several whole blocks of flex; fewer tokens than a block
SHAPES += [(150, 2), (300, 130)]  # the last query's partial blocks are all there are, the last of them cut short
FEW_SHAPES = [(256, 128), (256, None), (300, 130)]
NAMES = ("out", "dq", "dk", "dv")
LIMIT = 2  # error over that of plain attention


@dataclass(frozen=True)
class Case:
    """What a back end is asked to compute."""

    backend: str
    """a name of attention.WINDOW_ATTENTION; for full attention one of SDPBackend, or SDPA where torch has but one"""
    dtype: torch.dtype
    D: int
    """head_dim"""
    T: int
    """tokens in a sequence"""
    W: int | None
    """window size; None is full causal attention"""
    qk_norm: bool = False
    """RMSNorm of q and k before attention, as in model.py; gradients are taken through it"""


@dataclass(frozen=True)
class Result:
    """How it did. `miss` and `cannot` are words: what is wrong; why a back end that need not does not serve here."""

    case: Case
    ratios: dict[str, float] = field(default_factory=dict)  # of out, dq, dk, dv: error over that of plain attention
    last_query_sees: int = 0  # keys
    keys_agree: bool = False  # for every query
    miss: str = ""
    cannot: str = ""


# -----------------------------------------------------------------------------
# one check


def draw(case: Case, device: torch.device):
    """q, k, v, d_out (B, T, H, D), v strided as a part of qkv. q has deviation 2: attention is far from uniform."""
    generator = torch.Generator().manual_seed(case.T)
    qkv, d_out = (torch.randn(B, case.T, n * H, case.D, generator=generator).to(device, case.dtype) for n in (3, 1))
    q, k, v = qkv.split(H, dim=2)
    return 2 * q, k.contiguous(), v, d_out


def plain_attention(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v over the visible keys, (T, T) bool, each step in the dtype of q; (B, H, T, D)."""
    score = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
    return score.masked_fill(~visible.to(q.device), -math.inf).softmax(dim=-1) @ v


def default_backend(case: Case, device: torch.device) -> str:
    """The one that model.py takes where none is asked for."""
    if case.W is not None:
        return choose_window_backend(None, case.D, device, case.dtype)
    choice = sdpa_choice(case.T, case.D, device, case.dtype)
    return "SDPA" if choice is None else choice.name


def kernel(case: Case, device: torch.device):
    """attend(q, k, v) of the back end, set up as in GPT.forward. ValueError where it cannot serve."""
    choice, tables = SDPBackend.__members__.get(case.backend), {}
    if case.W is not None:
        choose_window_backend(case.backend, case.D, device, case.dtype)
        choice = sdpa_choice(case.T, case.D, device, case.dtype, masked=case.backend == "blocked")
        tables = window_tables(case.backend, B, case.T, case.W, case.D, device, case.dtype)

    def attend(q, k, v):
        with use_sdpa(choice):
            if case.W is None:
                return causal_attention(q, k, v)
            return WINDOW_ATTENTION[case.backend](q, k, v, case.W, **tables)

    return attend


def differentiate(attend, q, k, v, d_out, qk_norm: bool):
    """out, dq, dk, dv (B, T, H, D), with `attend` called as in model.py; d_out is the gradient of out."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    heads = (x.transpose(1, 2) for x in ((norm(q), norm(k), v) if qk_norm else (q, k, v)))  # (B, H, T, D)
    out = attend(*heads).transpose(1, 2)  # (B, H, T, D) -> (B, T, H, D)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)


def visibility(attend, q, k, v, d_out):
    """(T, T) bool: which keys have a weight. Each head of each sequence gets D columns of the identity as v."""
    (T, D), weights = (q.size(1), q.size(3)), []
    for columns in F.pad(torch.eye(T), (0, -T % (B * H * D))).split(B * H * D, dim=1):
        v.copy_(columns.view(T, B, H, D).transpose(0, 1))
        # with gradients, so that what was compiled for `differentiate` serves
        heads = (x.detach().requires_grad_().transpose(1, 2) for x in (0 * q, 0 * k, v))
        weights.append(attend(*heads).permute(2, 0, 1, 3).reshape(T, B * H * D).cpu())  # (B, H, T, D) -> (T, B H D)
    return torch.cat(weights, dim=1)[:, :T] != 0


def size(x):
    """Largest Frobenius norm of a head, over T and D; NaN if there is one. x: (B, T, H, D)."""
    return x.norm(dim=(1, 3)).max()


def rounding(q, k, v, d_out):
    """
    2 eps(float32) times what cancels in out, dq, dk and dv. A weight is exp(score - logsumexp), its gradient d_out v^T
    less its mean; for random rows rms(score) = rms(q) rms(k) and rms(d_out v^T) / sqrt(D) = rms(d_out) rms(v).
    """
    rms_q, rms_k, rms_v, rms_d_out = (x.pow(2).mean().sqrt() for x in (q, k, v, d_out))
    score, d_weight = rms_q * rms_k, rms_d_out * rms_v
    terms = score * size(v), d_weight * size(k), d_weight * size(q), score * size(d_out)
    return [2 * torch.finfo(torch.float32).eps * term for term in terms]


def check(case: Case, device: torch.device) -> Result:
    """Compares one back end with the reference, which is computed on the CPU."""
    index = torch.arange(case.T)
    distance = index[:, None] - index  # q_idx - kv_idx
    visible = (distance >= 0) & (distance < (case.W or case.T))
    try:
        inputs, attend = draw(case, device), kernel(case, device)
        actual, seen = differentiate(attend, *inputs, case.qk_norm), visibility(attend, *draw(case, device))
    except (ValueError, RuntimeError) as error:
        unable = isinstance(error, ValueError) or "No available kernel" in str(error)
        outcome = "cannot" if unable and case.backend != default_backend(case, device) else "miss"
        return Result(case, **{outcome: str(error).splitlines()[0]})
    dense, doubles = partial(plain_attention, visible=visible), [x.cpu().double() for x in inputs]
    plain, exact = differentiate(dense, *inputs, case.qk_norm), differentiate(dense, *doubles, case.qk_norm)
    ratios, wrong = {}, []
    for name, x, y, z, least in zip(NAMES, actual, plain, exact, rounding(*doubles), strict=True):
        error, error_of_plain = (size(e.cpu().double() - z) for e in (x, y))
        ratios[name] = (error / error_of_plain.clamp(min=least)).nan_to_num(nan=math.inf).item()
        if ratios[name] > LIMIT:
            wrong.append(f"error of {name} {error:.2g}, of plain attention {error_of_plain:.2g} (of {size(z):.2g})")
    if not torch.equal(seen, visible):
        wrong.append(f"{(seen != visible).sum()} pairs of query and key wrongly visible or hidden")
    return Result(case, ratios, int(seen[-1].sum()), torch.equal(seen, visible), "; ".join(wrong))


# -----------------------------------------------------------------------------
# all of them


def all_cases(device: torch.device) -> list[Case]:
    """Without qk_norm, which `check_group` adds; on CUDA few of float32 and D=128, to compile flex less often."""
    cases = []
    for dtype, D, (T, W) in product((torch.bfloat16, torch.float32), (64, 128), SHAPES):
        if device.type == "cuda" and (dtype, D) == (torch.float32, 128) and (T, W) not in FEW_SHAPES:
            continue
        several = sdpa_choice(T, D, device, dtype) is not None
        full = ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"] if several else ["SDPA"]
        cases += [Case(backend, dtype, D, T, W) for backend in (full if W is None else WINDOW_ATTENTION)]
    return cases


def check_group(cases: list[Case], device: torch.device) -> list[Result]:
    """Each case without and with qk_norm, which is no part of what is compiled."""
    results = []
    for case in cases:
        forget_compiled()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA's, why it does not take a kernel
            results += [check(replace(case, qk_norm=qk_norm), device) for qk_norm in (False, True)]
    return results


def start_worker():
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1


def verify(device: torch.device) -> list[Result]:
    """
    Every case. On CUDA each back end, dtype, D and T has a process of its own: nearly all of the time is compilation,
    and a kernel that writes where it must not spoils its process.
    """
    groups = {}
    for case in all_cases(device):
        groups.setdefault((case.backend, case.dtype, case.D, case.T), []).append(case)
    run, bar = partial(check_group, device=device), partial(tqdm, total=len(groups), desc="checking", disable=None)
    if device.type != "cuda":
        return [result for group in bar(groups.values()) for result in run(group)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=start_worker, max_tasks_per_child=1) as pool:
        return [result for results in bar(pool.map(run, groups.values())) for result in results]


def report(results: list[Result], device: torch.device):
    """Prints the worst ratios, the visible keys, what cannot serve, and each miss in full."""
    groups, sees = {}, {}
    for result in results:
        case = result.case
        if result.ratios:
            name = case.backend + " *" * (case.backend == default_backend(case, device))
            groups.setdefault((name, str(case.dtype), case.D, case.qk_norm), []).append(result)
            sees.setdefault(case.backend, {}).setdefault((case.T, case.W), set()).add(result.last_query_sees)
    print("\nWorst error over that of plain attention, and its T/W; keys: cases where they agree; *: default")
    print(f"{'back end':<22}{'dtype':<15}{'D':>3} {'qk_norm':<8}{''.join(f'{name:<14}' for name in NAMES)}keys")
    for (name, dtype, D, qk_norm), group in sorted(groups.items()):
        line = f"{name:<22}{dtype:<15}{D:>3} {'yes' if qk_norm else 'no':<8}"
        for x in NAMES:
            worst = max(group, key=lambda result: result.ratios[x])
            line += f"{worst.ratios[x]:<4.2g} {worst.case.T}/{worst.case.W or 'full'}".ljust(14)
        keys = f"{sum(result.keys_agree for result in group)}/{len(group)}"
        print(line + f"{keys:<6}{'MISS' if any(result.miss for result in group) else 'pass'}")
    print("\nKeys that the last query sees\n" + f"{'T/W':<10}{'  '.join(sees)}")
    for T, W in SHAPES:
        counts = {name: ",".join(map(str, seen.get((T, W), ""))) for name, seen in sees.items()}
        print(f"{T}/{W or 'full':<6}" + "  ".join(f"{count:<{len(name)}}" for name, count in counts.items()))
    for line in dict.fromkeys(f"{r.case.backend}, {r.case.dtype}: {r.cannot}" for r in results if r.cannot):
        print(f"cannot serve: {line}")
    for result in results:
        if result.miss:
            print(f"MISS {result.case}: {result.miss}")


def run(device_name: str) -> int:
    """Checks, prints, and returns 0 if all pass, else 1. ValueError for a device that cannot be used."""
    device = machine.select_device(device_name)
    print(machine.describe(device), flush=True)
    results = verify(device)
    report(results, device)
    return int(any(result.miss for result in results))
