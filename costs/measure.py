"""Memory and time of a function."""

import json
import statistics
import tempfile
import time
from itertools import chain, pairwise
from pathlib import Path

import torch

import machine
from costs.memory import MIB
from kernels.attention import window_block_mask


def allocations(run, device: torch.device):
    """
    (what it returns, bytes that are kept while that is, peak in bytes), both beyond what was allocated before. On CUDA
    what tensors asked for: the allocator hands out up to 1 MiB more for each, depending on what was freed before.
    """
    if device.type == "cuda":
        machine.synchronize(device)
        machine.reset_peak(device)
        before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        result = run()
        machine.synchronize(device)
        after = torch.cuda.memory_stats(device)
        return result, *(after[f"requested_bytes.all.{name}"] - before for name in ("current", "peak"))
    with machine.profiler(device, profile_memory=True) as profile:
        result = run()
    with tempfile.TemporaryDirectory() as directory:
        profile.export_chrome_trace(f"{directory}/trace.json")
        trace = json.loads(Path(directory, "trace.json").read_text())["traceEvents"]
    kept = peak = 0
    for event in sorted((event for event in trace if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        kept += event["args"]["Bytes"]  # negative where memory is given back
        peak = max(peak, kept)
    return result, kept, peak


def milliseconds(run, device: torch.device) -> float:
    """
    Median time of `run`. On CUDA as a graph, on the device's clock, so that the host's launches do not count, of at
    least 20 in 300 ms; `run` must have been called before, and must not wait for the device. On a CPU of 3.
    """
    def mark():
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    times, (n_runs, least_ms) = [], (10, 100) if device.type == "cuda" else (3, 0)
    while not times or sum(times) < least_ms:
        marks = [mark()]
        for _ in range(n_runs):
            run()
            marks.append(mark())
        machine.synchronize(device)
        times += [a.elapsed_time(b) if device.type == "cuda" else 1000 * (b - a) for a, b in pairwise(marks)]
    return statistics.median(times)


def step_times(step, steps: int, device: torch.device) -> list[float]:
    """
    Of each of so many calls, in ms on the host's clock, from the end of one to the end of the next. step returns what
    waits for its end (machine.read_later); as in training the host launches one step ahead of a GPU.
    """
    machine.synchronize(device)
    marks, launched = [time.perf_counter()], []
    for n in range(1, steps + 1):
        launched.append(step())
        while len(launched) > (1 if machine.runs_behind(device) and n < steps else 0):
            launched.pop(0)()
            marks.append(time.perf_counter())
    return [1000 * (end - start) for start, end in pairwise(marks)]


def ratio(rounds: list[list[float]], other_rounds: list[list[float]]) -> tuple[float, list[float]]:
    """Median over the other's median: of all values, and in each round."""
    def of(values, other):
        return statistics.median(values) / statistics.median(other)

    return of(list(chain(*rounds)), list(chain(*other_rounds))), [
        of(*pair) for pair in zip(rounds, other_rounds, strict=True)]


def block_mask_cost(T: int, W: int, device: torch.device) -> tuple[float, float, float]:
    """Of flex's block mask, built anew: (MiB that it keeps, MiB at most while it is built, ms)."""
    window_block_mask.cache_clear()
    machine.synchronize(device)
    clock = time.perf_counter()
    _, kept, peak = allocations(lambda: window_block_mask(T, W, device), device)
    return kept / MIB, peak / MIB, 1000 * (time.perf_counter() - clock)
