"""What the machine offers: the device, its precision, its peak rate, and which attention kernel really ran."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch

from files import read_text

# Dense bf16 FLOP/s with float32 accumulation, from the vendors' data sheets; the longest name that fits counts.
PEAK_BF16_FLOPS = {
    "B200": 2250e12, "GH200": 989.4e12, "H200": 989.4e12, "H200 NVL": 835.5e12, "H100": 989.4e12, "H100 NVL": 835e12,
    "H100 PCIe": 756e12, "H800": 989.4e12, "H800 PCIe": 756e12, "H20": 148e12, "A100": 312e12, "A800": 312e12,
    "A40": 149.7e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364.2e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 4080": 97.5e12, "RTX 3090": 71e12,
    "RTX 3080": 59.5e12,
}


def select_device(name: str = "auto") -> torch.device:
    """
    auto is CUDA, MPS or CPU, whichever comes first. Under torchrun each process gets the GPU of its LOCAL_RANK.
    ValueError with torch's reason if a device is asked for, or an NVIDIA device is there, and torch cannot use it.
    """
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"device={name!r} must be one of auto, cpu, cuda, mps")
    if name == "auto":
        name = "cuda" if nvidia_device_present() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device=mps: torch sees no MPS device")
    if name != "cuda":
        return torch.device(name)
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = f"torch {torch.__version__} cannot use the NVIDIA device: {str(error).splitlines()[0]}"
        raise ValueError(f"{reason}. To go on without it: --device cpu") from error
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"process {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    torch.set_num_threads(1)  # the host computes little, and the threads of several processes wait for each other
    return torch.device("cuda", local_rank)


def nvidia_device_present() -> bool:
    """Whether the machine has an NVIDIA GPU that is not hidden by CUDA_VISIBLE_DEVICES."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return torch.cuda.is_available() or (Path("/proc/driver/nvidia/version").exists() and not hidden)


def matmul_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """auto is bfloat16 on GPUs that compute it, float32 elsewhere."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, name)


def make_deterministic():
    """
    From now on only kernels that add in the same order every time, chosen by rule and not by trial, or an error from
    torch: for attention, kernels/cublaslt.py and what torch.compile generates. To be called before the device is used.
    """
    import torch._inductor.config

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # https://docs.nvidia.com/cuda/cublas, reproducibility
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._inductor.config.deterministic = True


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def peak_flops(name: str) -> float | None:
    """Peak dense bf16 FLOP/s of the device with this name; None if it is not in the table, or a slice or a relative."""
    known = [key for key in PEAK_BF16_FLOPS if re.search(rf"\b{key}\b", name)]
    other = re.search(r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b", name)
    return PEAK_BF16_FLOPS[max(known, key=len)] if known and not other else None


def peak_mib(device: torch.device) -> float | None:
    """Highest memory allocated by torch since the last reset, in MiB; None where torch does not count it."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def reset_peak(device: torch.device):
    """Starts the measuring of `peak_mib` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def total_mib(device: torch.device) -> float:
    """Memory of the GPU, or of the machine where there is none, in MiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device or the host had no room; cuBLAS, cuDNN, CUDA's runtime and the CPU say so in words only."""
    words = r"(?i)out of memory|not enough memory|(can't|cannot) allocate memory|alloc(ation)?_failed"
    return isinstance(error, torch.OutOfMemoryError) or bool(
        isinstance(error, RuntimeError) and re.search(words, str(error)))


def synchronize(device: torch.device):
    """Waits until the device has done everything that was asked of it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def runs_behind(device: torch.device) -> bool:
    """Whether the training loop may be a step ahead of the device."""
    return device.type == "cuda"


def read_later(tensor: torch.Tensor) -> Callable[[], list]:
    """Its values when they are asked for: on CUDA the copy begins now, and only who asks waits, for nothing later."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    copy, done = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def read():
        done.synchronize()
        return copy.tolist()

    return read


def copy_aside(copies: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event | None:
    """
    Copies (to, from), on CUDA into pinned memory and beside what the device does next. Returns the end of it, until
    which what is copied may be read and not changed; None: it is past.
    """
    if copies[0][1].device.type != "cuda":
        for to, tensor in copies:
            to.copy_(tensor)
        return None
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for to, tensor in copies:
            to.copy_(tensor, non_blocking=True)
    return aside.record_event()


# parts of kernel names, in the order in which they are looked for
ATTENTION_KERNELS = {
    "cudnn": "cuDNN", "flex_attention": "flex_attention", "fmha_cutlass": "memory-efficient SDPA",
    "flash_attention_for_cpu": "fused SDPA for CPU", "attention_math": "unfused SDPA", "flash": "FlashAttention",
}


def profiler(device: torch.device, **options) -> torch.profiler.profile:
    """Torch's profiler of what runs on the device, without its own messages; options: of torch.profiler.profile."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch 2.13 prints two lines per profile
    on_cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    return torch.profiler.profile(activities=[activity], acc_events=True, **options)  # 2.11 warns without acc_events


def attention_kernels(step: Callable[[], object], device: torch.device) -> str:
    """Runs `step` under torch's profiler and names the attention kernels that it used."""
    with profiler(device) as profile:
        step()
        synchronize(device)
    names = [event.key for event in profile.key_averages()]
    found = [next((label for part, label in ATTENTION_KERNELS.items() if part in name), None) for name in names]
    return ", ".join(sorted(set(found) - {None})) or "none of the known fused kernels"


def versions(device: torch.device) -> dict[str, str]:
    """What a figure depends on: hardware and software, by name."""
    return {"device": device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda or "",
            "python": platform.python_version()}


RUNS_BESIDE = "SWEEP_RUNS_BESIDE"  # variable by which sweep.py tells a run how many others may share its GPU or cores
DRIVER = r"NVRM version.*?\s(\d+\.[\d.]+)"  # in /proc/driver/nvidia/version


def environment(device: torch.device) -> dict:
    """
    What a run's figures may depend on beyond `versions`; None for what the system does not say. runs_beside: of a run
    that sweep.py started beside others.
    """
    driver, processor, here = Path("/proc/driver/nvidia/version"), Path("/proc/cpuinfo"), Path(__file__).parent
    pinned = re.findall(r"^([\w.-]+)==", read_text(here / "requirements.txt"), re.MULTILINE)
    versions = {found.name.replace("-", "_"): found.version for found in importlib.metadata.distributions()}
    installed = {name: version for name, version in versions.items() if name in pinned}
    beside = os.environ.get(RUNS_BESIDE)
    return {"gpus": torch.cuda.device_count() if device.type == "cuda" else 0,
            "driver": first(DRIVER, read_text(driver)) if device.type == "cuda" else None,
            "cpu": first(r"model name\s*: (.*)", read_text(processor)) or platform.processor() or None,
            "cpu_cores": os.cpu_count(), "system": platform.system(), "architecture": platform.machine(),
            "packages": dict(sorted(installed.items()))} | ({"runs_beside": int(beside)} if beside else {})


def first(pattern: str, text: str) -> str | None:
    """What the first group of the pattern finds."""
    found = re.search(pattern, text)
    return found[1] if found else None


def describe(device: torch.device) -> str:
    """`versions` in one line."""
    return ", ".join(f"{name}: {value}" for name, value in versions(device).items() if value)
