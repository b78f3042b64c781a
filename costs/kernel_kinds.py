"""
Where a step's time goes: kernels by kind.

The kinds' times and idle add up to the steps that torch's profiler saw. Inductor's fused kernels have all their
operators in their names and count for the first kind of which there is one. "other" is casts, copies and unknown names.
On a CPU the kernels are torch's operators, what is compiled there counts as other, and Python's own time as idle.
"""

import heapq
import re
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch

import machine

# A name belongs to the first kind whose pattern is found in it, in upper or lower case. The order matters: attention's
# kernels can have "cutlass" in their names, and those of norms the operators of what they are fused with.
OPTIMIZER = "optimizer"  # around the update in a step: what runs in it, but for communication, is of this kind
KINDS = {
    "communication": r"nccl",
    "optimizer": rf"^{OPTIMIZER}: |multi_tensor_apply|adam|foreach|lpnorm|vector_norm|norm(one|two)ops",
    "attention": r"flash|flex_attention|fmha|cudnn|attention",
    "loss": r"log_softmax|nll_loss|logsumexp|cross_entropy|softmax_?(forward|backward|warp)",
    "matrix product": r"nvjet|gemm|gemv|cutlass|splitk|cublas|triton_tem_|triton_mm|aten::(add|b|badd)?mm$|mkl",
    "activation": r"gelu|tanh|relu|threshold",
    "embedding": r"embedding|index_select",
    "norm and rotary": r"rms_?norm|rsqrt|rotate|triton_.*_(add|cat|mean|mul|neg|pow|sub)(_|$)|"
                       r"aten::(add|cat|mean|mul|neg|pow|sub)$",
}
ALL_KINDS = (*KINDS, "other", "idle")


def kind_of(name: str) -> str:
    """The kind of the kernel or operator with this name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def exclusive(events: list[tuple[str, float, float]]) -> dict[str, float]:
    """
    Time of each name, from (name, start, end). A moment counts once: for the event that began last among those that
    run, the inner one where they are nested; for communication only where nothing else runs.
    """
    waiting, times, running = sorted(events, key=lambda event: -event[1]), Counter(), []
    for left, right in pairwise(sorted({moment for _, *ends in events for moment in ends})):
        while waiting and waiting[-1][1] == left:
            name, start, end = waiting.pop()
            heapq.heappush(running, (kind_of(name) == "communication", -start, end, name))
        while running and running[0][2] <= left:
            heapq.heappop(running)
        if running:
            times[running[0][3]] += right - left
    return dict(times)


def breakdown(events: list[tuple[str, float, float]], wall_ms: float, steps: int) -> dict:
    """
    Of `steps` steps that took wall_ms; events: (name, start, end) in microseconds. Times are in ms per step: "kinds",
    which add up to a step, idle (what no event covers) included; "kernels", the longest first.
    """
    calls = Counter(name for name, _, _ in events)
    kernels = [{"name": name, "kind": kind_of(name), "ms": us / 1000 / steps, "calls": calls[name] / steps}
               for name, us in exclusive(events).items()]
    kinds = dict.fromkeys(ALL_KINDS, 0.0)
    for kernel in kernels:
        kinds[kernel["kind"]] += kernel["ms"]
    kinds["idle"] = wall_ms / steps - sum(kinds.values())
    return {"kinds": kinds, "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"])}


def profile(step: Callable[[], object], steps: int, device: torch.device) -> dict:
    """`breakdown` of so many calls of `step`, after one more, which has the start of the profiler in it."""
    activity = "CUDA" if device.type == "cuda" else "CPU"
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with machine.profiler(device, schedule=schedule) as profiler:
        step()
        machine.synchronize(device)
        profiler.step()
        clock = time.perf_counter()
        for _ in range(steps):
            step()
        machine.synchronize(device)
        wall_ms = 1000 * (time.perf_counter() - clock)
    events = [event for event in profiler.events() if event.device_type.name == activity]
    updates = [event.time_range for event in events if event.is_user_annotation and event.name == OPTIMIZER]
    timed = [(event.name, event.time_range.start, event.time_range.end) for event in events
             if not event.is_user_annotation]
    return breakdown([(within(updates, start) + name, start, end) for name, start, end in timed], wall_ms, steps)


def within(updates: list, start: float) -> str:
    """What the name of a kernel that starts then begins with; updates: when they ran."""
    return f"{OPTIMIZER}: " * any(update.start <= start < update.end for update in updates)
