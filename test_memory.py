"""
What each attention costs in memory and time: predicted in closed form beside measured.

    python test_memory.py [--full]

CausalSelfAttention and SlidingWindowAttention on each back end over T and W, at the same number of tokens: attention
alone, one block compiled as in training, and at three points the whole model with its loss. It is a command, no test.

MiB that torch's tensors take (its requested_bytes, neither reserved nor rounded up) beyond what was there before:
  saved          after forward: output, logsumexp, copies; and the inputs that backward reads (q, k, v, or x)
  forward peak   the most during forward, backward peak: during backward; inputs and d_out are not counted
  workspace      the higher peak less what any attention needs: out, dq, dk, dv, logsumexp and delta
  block mask     kept, and peak and time of building it
The model's figures include its weights and gradients. Times are medians: forward, and forward with backward (both);
on CUDA those of a graph, without what the host takes to launch its kernels.

Closed form of attention alone, x the bytes of one of q, k, v, out, r = 4 B T H; costs/memory.py has every term:
                saved     backward peak
  flex          4 x + r   4 x + 2 r                out, dq, dk, dv, logsumexp, delta
  cuDNN, flash  4 x + r   4 x + 2 r + 4 B T C      and dq in float32; flash pads each sequence by 128 tokens
  blocked       10 x      14 to 16 x               keys and values twice; each step is a copy
A block saves 15 x: its output and 14 before it (memory.SAVED_VECTORS), a layer of the model these 14.

On CUDA three things are judged: flex needs no more than CausalSelfAttention's default kernel at every point (the
higher peak and the block mask, to 0.1 MiB); the predictions of these two are within 5 % at points on which no constant
was fitted; a block mask is built in 50 ms and 30 MiB. Flash and blocked are shown. Without CUDA the GPU's figures are
predictions; full attention and blocked are measured on the CPU, by torch.profiler, and judged against predictions.

Exit codes: 0 all judged points hold, 1 a judged point misses (or a bug: then with a traceback), 2 bad option,
5 cannot write, 130 Ctrl-C.
"""

import gc
import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import tyro
from torch.nn.attention import SDPBackend
from tqdm import tqdm

import machine
from configs.variants import variant
from costs.measure import allocations, block_mask_cost, milliseconds
from costs.memory import MIB, Shape, attention_need, block_mask_bytes, block_need, model_need
from files import write_json
from kernels import cublaslt, fused
from kernels.attention import (
    FLEX_HEADS,
    WINDOW_ATTENTION,
    choose_window_backend,
    forget_compiled,
    sdpa_choice,
    use_sdpa,
)
from kernels.compiling import SlowPath, compile_static
from model import GPT, Block, GPTConfig, rotary_tables
from rundir import BAD_OPTION, INTERRUPTED, CannotWrite, check_writable, git, writing

TOKENS = {"cuda": 65_536, "cpu": 4_096}
GRID = {"cuda": ((1024, 8192, 65536), (128, 1024)), "cpu": ((512, 1024, 2048), (64, 256))}  # lengths, windows
FULL_GRID = {"cuda": (tuple(2**n for n in range(10, 17)), (128, 256, 512, 1024)),
             "cpu": ((512, 1024, 2048, 4096), (64, 128, 256, 512))}
MODEL_POINTS, MODEL_TOKENS = ((1024, 128), (4096, 1024), (8192, 1024)), 8192
FITTED_T = {"attention": 8192, "block": 8192, "model": 4096}  # where costs/memory.py's constants may be fitted
TOLERANCE = 0.05  # of a prediction, relative
SAME_MIB = 0.1  # more than this, block mask included, counts as more
MASK_MIB, MASK_MS = 30, 50  # a block mask, while it is built
SLACK_MIB = 0.01  # of a prediction, absolute: allocator rounding
SDPA_NAMES = {SDPBackend.CUDNN_ATTENTION: "cuDNN", SDPBackend.FLASH_ATTENTION: "FlashAttention-2",
              SDPBackend.EFFICIENT_ATTENTION: "memory-efficient", None: "CPU"}
STYLES = {None: ("ks-", 8), "blocked": ("C2D-", 7), "flash": ("C3^-", 6), "flex": ("C0o-", 4)}  # line, marker size


@dataclass(frozen=True)
class MemoryConfig:
    """What to measure."""

    full: bool = False
    """more lengths and windows; takes several minutes"""
    model: str = "d12"
    """the variant that gives heads, head size, width and norms; its window is replaced by window_sizes"""
    n_head: int | None = None
    """instead of the variant's"""
    head_dim: int | None = None
    """instead of the variant's"""
    sequence_lengths: tuple[int, ...] = ()
    """T, instead of the default ones"""
    window_sizes: tuple[int, ...] = ()
    """W, instead of the default ones; none may be larger than a sequence length"""
    tokens: int | None = None
    """in all sequences together, instead of 65,536 on CUDA and 4,096 on a CPU; the model always has 8,192"""
    device: str = "auto"
    """auto, cuda or cpu"""
    out_dir: str = "runs/test_memory"
    """where results.json, memory_over_T.png and time_over_T.png are written"""

    def __post_init__(self):
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"device={self.device!r} must be one of auto, cuda, cpu")
        for name in ("n_head", "head_dim", "tokens", "sequence_lengths", "window_sizes"):
            value = getattr(self, name)
            for n in value if isinstance(value, tuple) else [1 if value is None else value]:
                if not 1 <= n <= 2**24:
                    raise ValueError(f"{name}={n} must lie between 1 and 2^24")

    def grid(self, device_type: str) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """(lengths, windows, tokens). ValueError if they do not fit together."""
        lengths, windows = (FULL_GRID if self.full else GRID)[device_type]
        lengths, windows = self.sequence_lengths or lengths, self.window_sizes or windows
        tokens = self.tokens or TOKENS[device_type]
        if max(windows) > min(lengths):
            raise ValueError(f"window_sizes: {max(windows)} is larger than the sequence length {min(lengths)}")
        if max(lengths) > tokens:
            raise ValueError(f"sequence_lengths: {max(lengths)} is larger than tokens={tokens}")
        return lengths, windows, tokens

    def gpt_config(self) -> GPTConfig:
        config = replace(variant(self.model), window_size=None, window_pattern="S")
        n_head, head_dim = self.n_head or config.n_head, self.head_dim or config.head_dim
        return replace(config, n_head=n_head, n_embd=n_head * head_dim)


@dataclass(frozen=True)
class Point:
    """What is measured: a part of a model, with a back end, at a shape."""

    part: str
    """attention, block or model"""
    backend: str | None
    """of the window; None is full causal attention"""
    B: int
    T: int
    W: int | None
    config: GPTConfig
    """with W in it"""


@dataclass
class Row:
    """A point and its figures, in MiB, and in ms where a name ends in _ms."""

    point: Point
    sdpa: str
    """the kernel of scaled_dot_product_attention"""
    fitted: bool = False
    """whether a constant of the prediction may be fitted here"""
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    """why it was not measured"""

    @property
    def name(self) -> str:
        return self.point.backend or f"causal, {self.sdpa}"


def all_points(config: MemoryConfig, device_type: str) -> list[Point]:
    """The longest to compile first; on a CPU attention alone."""
    gpt, (lengths, windows, tokens) = config.gpt_config(), config.grid(device_type)
    points = []
    if device_type == "cuda":
        for T, W in MODEL_POINTS:
            points += [Point("model", None, MODEL_TOKENS // T, T, None, gpt),
                       Point("model", "flex", MODEL_TOKENS // T, T, W, replace(gpt, window_size=W))]
    for part in ("block", "attention") if device_type == "cuda" else ("attention",):
        for T in lengths:
            points.append(Point(part, None, tokens // T, T, None, gpt))
            points += [Point(part, backend, tokens // T, T, W, replace(gpt, window_size=W))
                       for W in windows for backend in WINDOW_ATTENTION]
    return points


def predict(point: Point, sdpa: str, itemsize: int, threads: int = 1) -> dict[str, float]:
    """In MiB; block and model are bf16 on CUDA."""
    config = point.config
    if point.part != "attention":
        need = {"block": block_need, "model": model_need}[point.part](config, point.backend, point.B, point.T)
        return {name: n_bytes / MIB for name, n_bytes in asdict(need).items()}
    shape = Shape(point.B, point.T, config.n_head, config.head_dim, itemsize)
    figures = asdict(attention_need(point.backend, sdpa, shape, point.W, threads))
    figures["workspace"] = peak(figures) - 4 * shape.vectors() - 2 * shape.rows()
    if point.backend == "flex":
        figures["block_mask"] = block_mask_bytes(point.T, point.W)
    return {name: n_bytes / MIB for name, n_bytes in figures.items()}


def predict_gpu(point: Point) -> Row:
    """On a Hopper GPU, without one."""
    sdpa = "memory-efficient" if point.backend == "blocked" else "cuDNN"
    return Row(point, sdpa, predicted=predict(point, sdpa, itemsize=2), reason="no CUDA GPU")


def peak(figures: dict[str, float]) -> float:
    return max(figures["forward_peak"], figures["backward_peak"])


# -----------------------------------------------------------------------------
# measuring


def build(point: Point, device: torch.device, dtype: torch.dtype):
    """(forward, the inputs that gradients are taken of, d_out)."""
    config, B, T = point.config, point.B, point.T
    if point.part == "model":
        gpt = GPT(config, window_backend=point.backend).to(device)
        gpt.compile()
        idx, d_out = torch.randint(config.vocab_size, (B, T), device=device), None
        inputs, run, choice = tuple(gpt.parameters()), lambda: gpt(idx, idx)[1], None
    else:
        block, tables = Block(config, layer=0).to(device), rotary_tables(T, config.head_dim, device)
        for weight in block.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        if point.W:
            backend = choose_window_backend(point.backend, config.head_dim, device, dtype)
            block.attn.prepare(backend, B, T, device, dtype)
        choice = sdpa_choice(T, config.head_dim, device, dtype, masked=point.backend == "blocked")
        if fused.choose_kernels(None, device, dtype) == "fused":
            block.attn.parts = block.mlp.parts = fused.parts(recompute_gelu=False)
    if point.part == "block":
        x, d_out = (torch.randn(B, T, config.n_embd, device=device, dtype=dtype) for _ in range(2))
        inputs, compiled = (x.requires_grad_(), *block.parameters()), compile_static(block.forward)
        run = partial(compiled, x, *tables)
    if point.part == "attention":
        *inputs, d_out = (torch.randn(B, T, config.n_head, config.head_dim, device=device, dtype=dtype).transpose(1, 2)
                          for _ in range(4))  # (B, T, H, D) memory
        run = partial(block.attn.attend, *(x.requires_grad_() for x in inputs))

    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16), use_sdpa(choice):
            return run()

    return forward, inputs, d_out


@contextmanager
def noting(row: Row, device: torch.device):
    """Puts into the row why it cannot be measured, and gives unused memory back."""
    try:
        yield
    except (ValueError, SlowPath, torch.OutOfMemoryError) as error:
        row.reason = str(error).splitlines()[0]
    if device.type == "cuda":
        torch.cuda.empty_cache()


def prepare(point: Point, device: torch.device):
    """A function that measures the point, compiled and warmed up already, and returns its row."""
    forget_compiled()
    gc.collect()
    dtype = machine.matmul_dtype(device)
    sdpa = SDPA_NAMES[sdpa_choice(point.T, point.config.head_dim, device, dtype, masked=point.backend == "blocked")]
    row = Row(point, sdpa, fitted=device.type == "cuda" and FITTED_T[point.part] == point.T)
    tried = cublaslt.product_of.cache_info().misses
    with noting(row, device):
        forward, inputs, d_out = build(point, device, dtype)
        backward = partial(torch.autograd.grad, inputs=inputs, grad_outputs=d_out)
        backward(forward())  # compiles, and allocates what stays, such as cuBLAS's workspace

    def measure():
        if cublaslt.product_of.cache_info().misses > tried:
            cublaslt.product_of.cache_clear()  # algorithms were tried while others used the GPU: again, alone
            backward(forward())
        out, alive, forward_peak = allocations(forward, device)
        _, _, backward_peak = allocations(partial(backward, out), device)
        del out
        measured = {"forward_ms": milliseconds(forward, device),
                    "both_ms": milliseconds(lambda: backward(forward()), device)}
        if point.backend == "flex":
            cost = block_mask_cost(point.T, point.W, device)
            measured |= dict(zip(("block_mask", "block_mask_peak", "block_mask_ms"), cost, strict=True))
        weights = sum(x.nbytes for x in inputs) if point.part == "model" else 0
        reads_inputs = point.part == "attention" or not point.config.pre_norm
        read = sum(x.nbytes for x in inputs if reads_inputs and not isinstance(x, torch.nn.Parameter))
        need = {"saved": alive + read, "forward_peak": forward_peak, "backward_peak": alive + backward_peak}
        row.measured = measured | {name: (n_bytes + weights) / MIB for name, n_bytes in need.items()}
        row.predicted = predict(point, sdpa, dtype.itemsize, torch.get_num_threads())
        if point.part == "attention":
            row.measured["workspace"] = row.predicted["workspace"] + peak(row.measured) - peak(row.predicted)

    def finish() -> Row:
        with noting(row, device):
            if not row.reason:
                measure()
        return row

    return finish


def start_worker():
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # not more processes yet


in_hand = []  # of a worker: what `prepare` gave it


def prepare_in_worker(point: Point, device: torch.device):
    in_hand[:] = [prepare(point, device)]


def finish_in_worker() -> Row:
    return in_hand.pop()()


def measure_all(points: list[Point], device: torch.device) -> list[Row]:
    """On CUDA in turns: several processes compile, then one after the other measures, alone on the GPU."""
    rows, progress = [], partial(tqdm, total=len(points), desc="measuring", disable=None, leave=False)
    if device.type != "cuda":
        return [prepare(point, device)() for point in progress(points)]
    n_workers = max(1, min(12, os.cpu_count() - 1, int(machine.total_mib(device) / 5500)))  # a model needs 5 GiB
    spawn = multiprocessing.get_context("spawn")
    with progress() as bar, ExitStack() as stack:
        workers = [stack.enter_context(ProcessPoolExecutor(1, spawn, start_worker)) for _ in range(n_workers)]
        for turn in range(0, len(points), n_workers):
            pairs = list(zip(workers, points[turn : turn + n_workers], strict=False))
            for prepared in [worker.submit(prepare_in_worker, point, device) for worker, point in pairs]:
                prepared.result()
            for worker, _ in pairs:
                rows.append(worker.submit(finish_in_worker).result())
                bar.update()
        for worker in workers:  # all at once: each takes seconds to leave the GPU
            worker.shutdown(wait=False)
    return rows


# -----------------------------------------------------------------------------
# judging and showing


def judge(rows: list[Row], judged: set[str | None]) -> list[str]:
    """
    What does not hold, a line each. judged: the back ends whose predictions count and that must have been measured;
    flex, if it is one of them, must need no more than full causal attention.
    """
    misses = []
    causal = {(row.point.part, row.point.T): row for row in rows if row.point.backend is None and row.measured}
    for row in rows:
        part, T = row.point.part, row.point.T
        where = f"{part}, {row.name}, T={T}" + f" W={row.point.W}" * (row.point.W is not None)
        if row.point.backend not in judged:
            continue
        if not row.measured:
            misses.append(f"{where}: not measured: {row.reason}")
            continue
        views = row.point.backend == "blocked" and 1 in (row.point.W, row.point.config.n_head)
        for name in ("saved", "forward_peak", "backward_peak", "block_mask"):
            predicted = row.predicted.get(name)
            if row.fitted or predicted is None or views:  # some copies are views then: the closed form is no bound
                continue
            off = row.measured[name] - predicted
            if abs(off) > max(TOLERANCE * predicted, SLACK_MIB):
                misses.append(f"{where}: {name} is {row.measured[name]:,.2f} MiB, {off / predicted:+.1%} beside the "
                              f"prediction of {predicted:,.2f}")
        for name, limit in ("block_mask_peak", MASK_MIB), ("block_mask_ms", MASK_MS):
            if row.measured.get(name, 0) > limit:
                misses.append(f"{where}: {name} is {row.measured[name]:,.1f}, meant to be at most {limit}")
        if row.point.backend == "flex" and (part, T) in causal:
            need, limit = peak(row.measured) + row.measured["block_mask"], peak(causal[part, T].measured)
            if need > limit + SAME_MIB:
                misses.append(f"{where}: needs {need:,.1f} MiB, {causal[part, T].name} {limit:,.1f}")
    return misses


def number(figures: dict[str, float], name: str, width: int = 0) -> str:
    value = figures.get(name)
    return ("-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1
            else f"{value:.3f}").rjust(width)


def show(rows: list[Row], title: str):
    """A table for each part, one for the block masks, and what a window changes in the whole model."""
    columns = ("saved", "forward_peak", "backward_peak", "workspace")
    for part in ("attention", "block", "model"):
        shown = [row for row in rows if row.point.part == part and row.predicted]
        if not shown:
            continue
        print(f"\n{part}, {shown[0].point.B * shown[0].point.T:,} tokens, {title}; MiB")
        print(f"{'T':>6}{'W':>6}  {'back end':<25}" + "".join(f"{name.replace('_', ' '):>16}" for name in columns)
              + f"{'forward':>9}{'both':>8}\n" + " " * 39 + f"{'pred.':>9}{'meas.':>7}" * 4 + f"{'ms':>9}{'ms':>8}")
        for row in shown:
            print(f"{row.point.T:>6}{row.point.W or '-':>6}  {row.name:<25}"
                  + "".join(number(row.predicted, name, 9) + number(row.measured, name, 7) for name in columns)
                  + number(row.measured, "forward_ms", 9) + number(row.measured, "both_ms", 8))
    for row in rows:
        if "block_mask" in row.predicted:
            print(f"block mask, T={row.point.T} W={row.point.W}: MiB predicted {number(row.predicted, 'block_mask')}, "
                  f"measured {number(row.measured, 'block_mask')}, peak while it is built "
                  f"{number(row.measured, 'block_mask_peak')}, ms {number(row.measured, 'block_mask_ms')}")
    causal = {row.point.T: row for row in rows if row.point.part == "model" and not row.point.W and row.measured}
    for row in rows:
        if row.point.part == "model" and row.point.W and row.measured and row.point.T in causal:
            more = peak(row.measured) - peak(causal[row.point.T].measured)
            print(f"model, T={row.point.T}: window {row.point.W} less full attention: {more:+,.1f} MiB")


def plot(rows: list[Row], figure: str, title: str, path: Path):
    """A panel for each part and window, a line for each back end over T; figure: memory or time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    rows = sorted((row for row in rows if row.measured and row.point.part != "model"), key=lambda row: row.point.T)
    parts, windows = sorted({row.point.part for row in rows}), sorted({row.point.W or 0 for row in rows} - {0})
    lengths = sorted({row.point.T for row in rows})
    if not windows:
        return
    many = len(windows) > 2
    canvas = Figure((1 + 3.2 * len(windows), 1.2 + 2.7 * len(parts)), layout="constrained", dpi=64 if many else 90)
    canvas.suptitle(title)
    panels, lines = canvas.subplots(len(parts), len(windows), sharey="row", squeeze=False), {}
    for axes, (part, W) in zip(panels.flat, product(parts, windows), strict=True):
        for backend, (style, size) in STYLES.items():
            line = [row for row in rows if row.point.part == part and row.point.backend == backend
                    and row.point.W in (None, W)]
            if not line:
                continue
            x, y = [row.point.T for row in line], [row.measured["both_ms"] for row in line]
            if figure == "memory":
                y = [peak(row.measured) for row in line]
                predicted = [peak(row.predicted) for row in line]
                lines["predicted"], = axes.plot(x, predicted, "o", color="gray", markersize=11, fillstyle="none")
            lines[line[0].name], = axes.plot(x, y, style, markersize=size)
        axes.set_title({"attention": "attention alone", "block": "one block"}[part] + f", W = {W}", fontsize=10)
        axes.set_xscale("log", base=2)
        ticks = lengths[:: 1 if len(lengths) < 5 else 2]
        axes.set_xticks(ticks, [f"{T:,}" for T in ticks], fontsize=9)
        axes.set_xlabel("T, tokens in a sequence")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("highest peak, MiB" if figure == "memory" else "forward and backward, ms")
        if figure == "memory":
            axes.set_ylim(bottom=0, top=1.1 * axes.get_ylim()[1])
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.minorticks_off()
    canvas.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
    canvas.savefig(path, pil_kwargs={"optimize": True})


def write(rows: list[Row], predictions: list[Row], misses: list[str], device: torch.device, title: str, out_dir: Path):
    """results.json and the plots. Raises CannotWrite."""
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "results.json", {
            "machine": machine.versions(device), "commit": git("rev-parse", "HEAD").decode().strip() or None,
            "command": shlex.join(sys.argv), "units": "MiB, and ms where a name ends in _ms", "misses": misses,
            "measured": [asdict(row) for row in rows], "predicted_only": [asdict(row) for row in predictions]})
        plot(rows, "memory", f"Memory: {title}", out_dir / "memory_over_T.png")
        plot(rows, "time", f"Time: {title}", out_dir / "time_over_T.png")


def run(config: MemoryConfig) -> int:
    """Returns 0 if all that is judged holds, else 1. Raises ValueError or CannotWrite."""
    device, out_dir, gpt = machine.select_device(config.device), Path(config.out_dir), config.gpt_config()
    if device.type != "cuda":
        device = torch.device("cpu")
    check_writable(out_dir)
    if device.type == "cuda":
        choose_window_backend("flex", gpt.head_dim, device, torch.bfloat16)
    points = all_points(config, device.type)
    print(machine.describe(device), flush=True)
    heads, on_cuda = f"{gpt.n_head} heads of {gpt.head_dim}", device.type == "cuda"
    title = f"{heads}, {str(machine.matmul_dtype(device)).removeprefix('torch.')}, {machine.device_name(device)}"

    predictions = []
    if not on_cuda:
        if gpt.head_dim in FLEX_HEADS:  # at a GPU's default sizes: those of the options are for a CPU
            default = replace(config, sequence_lengths=(), window_sizes=(), tokens=None)
            predictions = [predict_gpu(point) for point in all_points(default, "cuda")]
            print("\nPREDICTIONS for a Hopper GPU at its default sizes: nothing in these tables is measured")
            show(predictions, f"{heads}, bfloat16")
        print(f"\nMEASURED on this CPU, torch threads: {torch.get_num_threads()}")
    clock = time.perf_counter()
    rows = measure_all(points, device)
    show(rows, title)
    print()
    for reason in dict.fromkeys(f"not measured: {row.name}: {row.reason}" for row in rows if row.reason):
        print(reason)
    if not on_cuda:
        print("not measured: anything on a GPU; blocks, the whole model and block masks")

    judged = {None, "flex"} if on_cuda else {None, "blocked"}
    misses = judge(rows, judged)
    write(rows, predictions, misses, device, title, out_dir)
    print(f"results.json, memory_over_T.png and time_over_T.png are in {out_dir}")
    counted = [row for row in rows if row.point.backend in judged and row.measured]
    n_free = sum(not row.fitted for row in counted)
    print(f"measured in {time.perf_counter() - clock:.0f} s")
    print(f"judged: {n_free} points against their predictions, to {TOLERANCE:.0%}"
          + f"; not {len(counted) - n_free}, where constants were fitted" * (n_free < len(counted))
          + "; flex against full causal attention at every point" * on_cuda)
    for miss in misses:
        print(f"MISS {miss}")
    print("some judged points miss" if misses else "all judged points hold")
    return int(bool(misses))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    config = tyro.cli(MemoryConfig, args=arguments, description=__doc__, use_underscores=True)
    try:
        return run(config)
    except (ValueError, CannotWrite) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_OPTION)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
