"""
How fast a training step is, where its time goes, and what its products and bytes would take alone.

    python bench.py --model d12_qk_norm --batch_size 64 --sequence_length 1024
    python bench.py --model d12_qk_norm --compare "--model d12"
    python bench.py --model d12_qk_norm --compare "--data shakespeare"
    python bench.py --model d12_qk_norm --against ../nanoGPT/model.py
    torchrun --standalone --nproc_per_node 4 -- bench.py --model d12_qk_norm
    python bench.py --verify

A step is that of train_gpt2.py with one micro-batch in each process: forward and backward, clipping, optimizer. Its
time is the median on the host's clock after a warm-up, "peak" what torch has allocated at most. All steps have the same
random tokens or, with --data, each has its own, read from the shards while the step before it runs.
The table has, for each kind of kernel (costs/kernel_kinds.py), its time in a few more steps under torch's profiler, and
its floor (costs/floor.py). --compare takes a second setting, the first one with these options changed, and runs both in
turn, A B A B; --against does so with the model of another file, torchrun with DistributedDataParallel and the same GPUs
each for itself. --verify is kernels/verify.py.

Exit codes: 0 done, 1 out of memory, a miss of --verify, or a bug (then with a traceback), 2 bad option, or torch would
have run a slow form, 5 cannot write, 7 bad data, 130 Ctrl-C.
"""

import functools
import gc
import importlib.util
import itertools
import os
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import machine
from configs.recipes import TrainConfig
from configs.variants import model_name, variant
from costs.floor import measure_floor
from costs.kernel_kinds import ALL_KINDS, OPTIMIZER, profile
from costs.measure import ratio, step_times
from costs.memory import MIB, memory_advice, training_mib
from data.loader import Windows, micro_batch, open_data, to_device, train_order
from files import write_json
from kernels.attention import forget_compiled
from kernels.compiling import SlowPath, compiles
from model import GPT, GPTConfig
from optim import make_optimizers, update
from processes import check_variables, end_with_torchrun, rank_and_world_size
from rundir import BAD_OPTION, INTERRUPTED, CannotWrite, check_writable, git, leave, writing

RANK, WORLD_SIZE = rank_and_world_size()
WARMUP_STEPS, PROFILED_STEPS = 5, 3
ROUNDS = 4  # turns of each setting, where there are two
DEFAULTS = {"cuda": {"model": "d12", "batch_size": 64, "sequence_length": 1024},
            "cpu": {"model": "tiny", "batch_size": 2, "sequence_length": 64}}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    gpt: GPTConfig
    model: str
    """variant, see train_gpt2.py --list"""
    batch_size: int
    """sequences in a step"""
    sequence_length: int
    """tokens in a sequence"""
    steps: int = 20
    """timed steps, of each turn if there are several"""
    window_backend: str | None = None
    """kernel of the sliding window; None: flex on CUDA, blocked elsewhere"""
    kernels: Literal["fused", "plain"] | None = None
    """those of kernels/fused.py, or as one reads them in model.py; None: fused on CUDA in bfloat16, else plain"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the matrix products; auto: bfloat16 on GPUs that have it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA"""
    recompute_gelu: bool = False
    """as in train_gpt2.py"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """as in train_gpt2.py"""
    data: str | None = None
    """of which each step reads a batch, as in train_gpt2.py; None: random tokens that stay on the device"""
    device: str = "auto"
    """auto, cuda or cpu"""
    out_dir: str = "runs/bench"
    """where results.json is written"""
    compare: str | None = None
    """options of a second setting, in one string; what is not in it is as in the first"""
    against: str | None = None
    """a file that stands alone, with GPT and GPTConfig as nanoGPT has them: in turn, at our size, with our AdamW"""
    way: tyro.conf.Suppress[Literal["", "against", "ddp"]] = ""
    """of a second setting: the model of `against`, or DistributedDataParallel"""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """compare output, gradients and visible keys of every attention back end with a float64 reference instead"""

    def __post_init__(self):
        for name in ("batch_size", "sequence_length", "steps"):
            if not 1 <= getattr(self, name) <= 2**24:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 1 and 2^24")

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.batch_size * self.sequence_length

    @property
    def size(self) -> dict[str, int]:
        """What another file's model shares with ours."""
        return {name: getattr(self.gpt, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}

    def check(self, device: torch.device):
        """ValueError where the window is too long or a kernel cannot serve on the device."""
        W, T = self.gpt.window_size, self.sequence_length
        if W is not None and W > T:
            raise ValueError(f"window_size={W} is more than sequence_length={T}")
        self.chosen(device)

    def chosen(self, device: torch.device):
        """The same with its kernels chosen, plain or fused, as costs/memory.py wants it."""
        with torch.device("meta"):
            model = GPT(self.gpt, self.window_backend, self.kernels, self.recompute_gelu)
        dtype = machine.matmul_dtype(device, self.dtype)
        return replace(self, kernels=model.choose_kernels(self.sequence_length, device, dtype)[-1])


@dataclass(frozen=True)
class Choice:
    """What sets the defaults of everything else."""

    model: str | None = None
    device: str = "auto"


STYLE = {"use_underscores": True, "config": (tyro.conf.OmitArgPrefixes,)}


def choose(arguments: list[str]) -> Choice:
    return tyro.cli(Choice, args=arguments, return_unknown_args=True, add_help=False, **STYLE)[0]


def parse(arguments: list[str], default: BenchConfig) -> BenchConfig:
    """An option beats the variant, a variant that is among the arguments beats the default."""
    if model := choose(arguments).model:
        default = replace(default, model=model, gpt=variant(model))
    return tyro.cli(BenchConfig, args=arguments, default=default, description=__doc__.strip(), **STYLE)


def parse_options(arguments: list[str]) -> tuple[list[BenchConfig], torch.device]:
    """One setting, or two. ValueError for a bad value."""
    if "--compare" in arguments[:-1]:  # its value begins with --, which tyro takes only after =
        i = arguments.index("--compare")
        arguments = [*arguments[:i], "=".join(arguments[i:i + 2]), *arguments[i + 2:]]
    device = machine.select_device(choose(arguments).device)
    values = DEFAULTS["cuda" if device.type == "cuda" else "cpu"]
    default = BenchConfig(variant(values["model"]), **values)
    config = parse(arguments, default)
    if config.verify:
        if WORLD_SIZE > 1:
            raise ValueError("--verify is one process: start it without torchrun")
        if config != replace(default, verify=True, device=config.device):
            raise ValueError("--verify takes no other option than --device")
        return [config], device
    if device.type not in DEFAULTS:
        raise ValueError(f"device={device.type}: torch's profiler sees no kernels there; use --device cpu")
    if (config.compare is not None) + (config.against is not None) + (WORLD_SIZE > 1) > 1:
        raise ValueError("--compare, --against and torchrun each bring a second setting: take one of them")
    if config.against is not None and not os.path.isfile(config.against):
        raise ValueError(f"--against {config.against}: no such file")
    configs = [config]
    if config.against is not None:
        configs.insert(0, replace(config, way="against", gpt=GPTConfig(**config.size), window_backend=None,
                                  kernels=None, recompute_gelu=False, optimizer="adamw"))
    if WORLD_SIZE > 1:
        check_variables(RANK, WORLD_SIZE)
        if config.optimizer == "muon":
            raise ValueError("optimizer=muon divides its work among the processes: none has a step for itself")
        configs = [config, replace(config, way="ddp")]
    if config.compare is not None:
        second = parse(shlex.split(config.compare), config)
        for name in ("steps", "device", "out_dir", "compare", "against", "verify"):
            if getattr(second, name) != getattr(config, name):
                raise ValueError(f"--compare {config.compare!r}: {name} cannot differ between two settings")
        configs.append(second)
    for config in configs:
        config.check(device)
    return configs, device


# -----------------------------------------------------------------------------
# a step


@functools.cache
def train_windows(data: str, sequence_length: int, vocab_size: int) -> Windows:
    return open_data(data, sequence_length, vocab_size)[1]


def batches(config: BenchConfig, device: torch.device):
    """Inputs and targets of one step after another, without end: pairs of int64 (batch_size, sequence_length)."""
    B, T = config.batch_size, config.sequence_length
    if config.data is None:
        return itertools.repeat(torch.randint(config.gpt.vocab_size, (2, B, T), device=device).unbind())
    windows = train_windows(config.data, T, config.gpt.vocab_size)
    orders = (train_order(len(windows), TrainConfig.seed, step, B * WORLD_SIZE) for step in itertools.count())
    return (to_device(windows.read(micro_batch(order, 0, B, RANK, WORLD_SIZE)), device) for order in orders)


def build(config: BenchConfig, device: torch.device):
    """(a step as in train_gpt2.py, warmed up; MiB that stay between steps)."""
    compiled = compiles(config.compile, device)
    if config.way == "against":
        model = other_model(config)
    else:
        model = GPT(config.gpt, config.window_backend, config.kernels, config.recompute_gelu)
    optimizers = make_optimizers(model.to(device), TrainConfig(optimizer=config.optimizer), compiled)
    if compiled:
        model.compile()
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if config.way == "ddp" else model
    dtype = machine.matmul_dtype(device, config.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    following = batches(config, device)
    inputs, targets = next(following)

    def step():
        nonlocal inputs, targets
        with autocast:
            _, loss = network(inputs, targets)
        loss.backward()
        inputs, targets = next(following)
        with torch.profiler.record_function(OPTIMIZER):
            return machine.read_later(update(model, optimizers, loss.detach(), TrainConfig.grad_clip,
                                             alone=config.way != "ddp"))

    step_times(step, WARMUP_STEPS, device)
    tensors = *checkpoint.named_tensors(model, optimizers), {"inputs": inputs, "targets": targets}
    held_mib = sum(x.nbytes for part in tensors for x in part.values()) / MIB
    return step, held_mib


def other_model(config: BenchConfig):
    """The model of the file `against` at our size, without dropout and biases. ValueError if it has none."""
    try:
        spec = importlib.util.spec_from_file_location("against", config.against)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        options = {"block_size": config.sequence_length, "dropout": 0.0, "bias": False}
        return module.GPT(module.GPTConfig(**options, **config.size))
    except (AttributeError, ImportError, SyntaxError, TypeError) as error:
        raise ValueError(f"--against {config.against} has no model like nanoGPT's: {error}") from error


def measure(configs: list[BenchConfig], device: torch.device) -> list[dict]:
    """Figures of each setting. Two take turns, and stay in memory between them or, if they do not fit, are rebuilt."""
    built, figures, fit = {}, [{"rounds_ms": []} for _ in configs], True

    def turn(i: int):
        if i not in built:
            built[i] = build(configs[i], device)
        step = built[i][0]
        machine.reset_peak(device)
        times = step_times(lambda: (bar.update(), step())[1], configs[i].steps, device)
        peak_mib = machine.peak_mib(device)
        if not figures[i]["rounds_ms"]:
            others_mib = sum(held_mib for j, (_, held_mib) in built.items() if j != i)
            figures[i] |= {"peak_mib": peak_mib and peak_mib - others_mib} | profile(step, PROFILED_STEPS, device)
        figures[i]["rounds_ms"].append(times)

    def turn_that_fits(i: int):
        """Once more without the others, if it does not fit beside them."""
        nonlocal fit
        begun = bar.n
        while True:
            bar.n = begun
            if not fit:
                release(built)
            try:
                return turn(i)
            except RuntimeError as error:
                if not machine.is_out_of_memory(error):
                    raise
                if not built.keys() - {i} or WORLD_SIZE > 1:  # nor would it without them, or not in all processes
                    if configs[i].way == "against":  # what it needs is not known
                        raise
                    config = configs[i].chosen(device)
                    raise MemoryError(memory_advice(config, config.gpt, config.batch_size, WORLD_SIZE)) from error
            fit = False

    turns = list(range(len(configs))) * (1 if len(configs) == 1 else ROUNDS)
    with tqdm(desc="measuring", total=sum(configs[i].steps for i in turns), unit="step", leave=False,
              disable=None if RANK == 0 else True) as bar:
        for i in turns:
            turn_that_fits(i)
    release(built)
    for config, figure in zip(configs, figures, strict=True):
        ms = statistics.median(ms for times in figure["rounds_ms"] for ms in times)
        figure |= {"step_ms": ms, "tokens_per_s": 1000 * config.tokens / ms}
        if config.way == "against" or RANK > 0:
            continue
        dtype, T = machine.matmul_dtype(device, config.dtype), config.sequence_length
        with torch.device("meta"):
            model = GPT(config.gpt, config.window_backend, config.kernels)
        flops_per_s = model.flops_per_token(T) * config.tokens / ms * 1000
        peak_flops = machine.peak_flops(machine.device_name(device)) if dtype == torch.bfloat16 else None
        figure |= {"mfu": flops_per_s / peak_flops if peak_flops else None,
                   "predicted_mib": predicted_mib(config, device),
                   "floor": measure_floor(model, config.batch_size, T, device, dtype, config.optimizer)}
    return figures


def predicted_mib(config: BenchConfig, device: torch.device) -> float | None:
    """None for what costs/memory.py does not know: a model that is not compiled, or in float32."""
    if machine.matmul_dtype(device, config.dtype) == torch.float32 or not compiles(config.compile, device):
        return None
    shares = WORLD_SIZE if config.way == "ddp" else 1
    return training_mib(config.chosen(device), config.gpt, config.batch_size, shares)


def release(built: dict):
    """Forgets what was built, and what was compiled for it."""
    built.clear()
    forget_compiled()
    gc.collect()
    torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# showing


def show(config: BenchConfig, figure: dict, device: torch.device):
    """Prints one setting: a summary, the table of kinds, and the kernels of no known kind by name."""
    dtype = str(machine.matmul_dtype(device, config.dtype)).removeprefix("torch.")
    times = [ms for times in figure["rounds_ms"] for ms in times]
    predicted = f" ({figure['predicted_mib']:,.0f} predicted)" if figure.get("predicted_mib") else ""
    name = config.against if config.way == "against" else model_name(config.gpt)
    print(f"\n{name}, {config.batch_size} x {config.sequence_length} tokens, {dtype}, "
          f"compile {config.compile}" + f", window by {config.window_backend}" * bool(config.window_backend)
          + f", {config.kernels} kernels" * bool(config.kernels) + ", GELU recomputed" * config.recompute_gelu
          + ", Muon" * (config.optimizer == "muon") + f", text of {config.data}" * bool(config.data)
          + f", each of {WORLD_SIZE} processes" * (WORLD_SIZE > 1) + ", summed by DDP" * (config.way == "ddp"))
    print(f"{figure['step_ms']:,.2f} ms a step ({min(times):,.2f} to {max(times):,.2f}, {len(times)} steps), "
          f"{figure['tokens_per_s']:,.0f} tokens/s, "
          + (f"{figure['mfu']:.1%} MFU" if figure.get("mfu") else "MFU unknown")
          + (f", peak {figure['peak_mib']:,.0f} MiB{predicted}" if figure["peak_mib"] else ""))
    floor, step_ms = figure.get("floor", {"kinds": {}}), sum(figure["kinds"].values())
    print(f"\n{'kind of kernel':<18}{'ms':>9}{'share':>8}{'floor ms':>10}{'ratio':>8}")
    rows = {kind: (figure["kinds"][kind], floor["kinds"].get(kind, 0.0)) for kind in ALL_KINDS}
    for name, (ms, least_ms) in (rows | {"profiled step": (step_ms, sum(floor["kinds"].values()))}).items():
        over = f"{ms / least_ms:8.2f}" if least_ms else ""
        print(f"{name:<18}{ms:>9.3f}{ms / step_ms:>8.1%}{least_ms:>10.3f}{over}")
    if "floor" in figure:
        print(f"floor: matrix products at {floor['product_flops_per_s'] / 1e12:,.3g} TFLOP/s, bytes read and written "
              f"at {floor['copy_bytes_per_s'] / 1e9:,.4g} GB/s")
    others = [kernel for kernel in figure["kernels"] if kernel["kind"] == "other"]
    for kernel in others[:10]:
        print(f"other: {kernel['ms']:8.3f} ms, {kernel['calls']:.0f} x {kernel['name'][:90]}")
    if rest_ms := [kernel["ms"] for kernel in others[10:]]:
        print(f"other: {sum(rest_ms):8.3f} ms, {len(rest_ms)} more names, see results.json")


def run(arguments: list[str]) -> int:
    """Returns the exit code. Raises ValueError, SlowPath, CannotWrite or RuntimeError."""
    configs, device = parse_options(arguments)
    if configs[0].verify:
        from kernels import verify

        return verify.run(configs[0].device)
    check_writable(out_dir := Path(configs[0].out_dir))
    for config in configs:
        if config.data is not None:
            train_windows(config.data, config.sequence_length, config.gpt.vocab_size)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK == 0:
        print(machine.describe(device), flush=True)
    figures = measure(configs, device)
    if WORLD_SIZE > 1:
        dist.barrier()
        dist.destroy_process_group()
    if RANK > 0:
        return 0
    settings = [{"config": asdict(config)} | figure for config, figure in zip(configs, figures, strict=True)]
    for config, figure in zip(configs, figures, strict=True):
        show(config, figure, device)
    torchrun = ["torchrun", "--nproc_per_node", str(WORLD_SIZE), "--"]
    result = {"machine": machine.versions(device), "commit": git("rev-parse", "HEAD").decode().strip() or None,
              "command": shlex.join([*(torchrun if WORLD_SIZE > 1 else ["python"]), "bench.py", *arguments]),
              "settings": settings}
    if len(configs) == 2:
        per_token = [[[ms / config.tokens for ms in times] for times in figure["rounds_ms"]]
                     for config, figure in zip(configs, figures, strict=True)]
        ratio_of_all, rounds = ratio(*per_token)
        result["tokens_per_s_ratio"] = {"all": ratio_of_all, "rounds": rounds}
        of = f"{WORLD_SIZE} x one process" if WORLD_SIZE > 1 else "the first"
        print(f"\ntokens/s of the second over {of}: {ratio_of_all:.3f} ({min(rounds):.3f} to {max(rounds):.3f} in "
              f"{ROUNDS} rounds)")
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "results.json", result)
    print(f"all figures: {out_dir / 'results.json'}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    end_with_torchrun()
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, SlowPath, CannotWrite) as error:
        if RANK == 0:
            print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_OPTION)
    except MemoryError as error:
        print(f"error: out of memory: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not machine.is_out_of_memory(error):
            raise
        print(f"error: out of memory, try a smaller --batch_size ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    leave(main())
