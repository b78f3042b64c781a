"""machine.py and costs/memory.py: what is read off the device, and the closed form against measured peaks."""

import pytest
import torch

import machine
from configs.variants import VARIANTS
from model import GPT

CPU = torch.device("cpu")

# -----------------------------------------------------------------------------
# the device


@pytest.mark.parametrize(("name", "tflops"), [  # dense, from the vendors' data sheets
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989.4),
    ("NVIDIA H200 NVL", 835.5),
    ("NVIDIA H800 PCIe", 756),
    ("NVIDIA H20", 148),
    ("NVIDIA B200", 2250),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA A10G", 70),
    ("NVIDIA A10", 125),
    ("NVIDIA A40", 149.7),
    ("NVIDIA L4", 121),
    ("NVIDIA L40", 181),
    ("NVIDIA L40S", 362),
    ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA GeForce RTX 3090", 71),
])
def test_peak_flops(name, tflops):
    assert machine.peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", [
    "CPU", "", "Tesla T4", "NVIDIA GeForce GTX 1080 Ti", "NVIDIA GeForce RTX 4090 D", "AMD Instinct MI300X",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    "NVIDIA RTX A4000", "NVIDIA RTX A1000", "Quadro RTX 4000",  # A40, A100 and L4 are not their names
])
def test_peak_flops_of_what_is_not_in_the_table(name):
    """No figure is better than that of another card."""
    assert machine.peak_flops(name) is None


def broken(monkeypatch, error):
    """A machine with an NVIDIA device and a torch that cannot use it."""
    def init():
        raise error

    monkeypatch.setattr(machine, "nvidia_device_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("error", [
    RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update"),
    AssertionError("Torch not compiled with CUDA enabled"),
])
def test_a_device_that_torch_cannot_use_is_not_passed_over(monkeypatch, name, error):
    broken(monkeypatch, error)
    with pytest.raises(ValueError) as raised:
        machine.select_device(name)
    message = str(raised.value)
    assert str(error).splitlines()[0] in message and "--device cpu" in message and "\n" not in message
    assert machine.select_device("cpu") == CPU


def test_the_command_says_so_and_goes_on_when_told(monkeypatch, tmp_path, capsys):
    import train_gpt2

    broken(monkeypatch, RuntimeError("driver too old"))
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main(["--dry_run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "driver too old" in err and err.count("\n") == 1
    assert train_gpt2.main(["--dry_run", "--device", "cpu"]) == 0


def test_auto_without_any_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(machine, "nvidia_device_present", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machine.select_device("auto") == CPU
    with pytest.raises(ValueError, match="mps"):
        machine.select_device("mps")


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr(machine, "nvidia_device_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for local_rank in 0, 1:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert machine.select_device("auto") == torch.device("cuda", local_rank)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 2 .* sees 2"):
        machine.select_device("auto")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_hidden_gpu_is_not_there(monkeypatch, hidden):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.Path, "exists", lambda self: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.nvidia_device_present()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine.nvidia_device_present()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not machine.nvidia_device_present()


def test_matmul_dtype(monkeypatch):
    assert machine.matmul_dtype(CPU) == torch.float32
    assert machine.matmul_dtype(CPU, "bfloat16") == torch.bfloat16
    for supported, dtype in (True, torch.bfloat16), (False, torch.float32):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        assert machine.matmul_dtype(torch.device("cuda")) == dtype
        assert machine.matmul_dtype(torch.device("cuda"), "float32") == torch.float32


def test_what_a_cpu_does_not_count():
    assert machine.peak_mib(CPU) is None and machine.device_name(CPU) == "CPU"
    assert machine.total_mib(CPU) > 256
    assert machine.versions(CPU)["torch"] == torch.__version__


def test_runs_beside_are_noted_where_there_are_any(monkeypatch):
    assert "runs_beside" not in machine.environment(CPU)
    monkeypatch.setenv("SWEEP_RUNS_BESIDE", "3")
    assert machine.environment(CPU)["runs_beside"] == 3


ALLOCATION_FAILURES = [  # as torch words them
    torch.OutOfMemoryError("made up"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000 bytes."),
]


def test_out_of_memory_by_whatever_name():
    assert all(map(machine.is_out_of_memory, ALLOCATION_FAILURES))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**14)
    assert machine.is_out_of_memory(raised.value)
    others = [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory"),
              RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), RuntimeError("Could not infer memory format"),
              RuntimeError("out of resource: shared memory, Required: 294912, Hardware limit: 232448")]
    assert not any(map(machine.is_out_of_memory, others))


# -----------------------------------------------------------------------------
# attention kernels: those that really ran


@pytest.mark.parametrize("requires_grad", [True, False])
def test_attention_kernels_on_a_cpu(requires_grad):
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=requires_grad) for _ in range(3))

    def fused():
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def by_hand():
        (q @ k.transpose(2, 3)).softmax(dim=-1) @ v

    def unfused():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            fused()

    assert machine.attention_kernels(fused, CPU) == "fused SDPA for CPU"
    assert machine.attention_kernels(unfused, CPU) == "unfused SDPA"
    assert machine.attention_kernels(by_hand, CPU) == "none of the known fused kernels"
    assert machine.attention_kernels(lambda: (fused(), unfused()), CPU) == "fused SDPA for CPU, unfused SDPA"


def test_attention_kernels_of_the_window_on_a_cpu():
    gpt = GPT(VARIANTS["tiny_post_norm_qk_norm_window32"])
    idx = torch.zeros(1, 80, dtype=torch.int64)
    assert machine.attention_kernels(lambda: gpt(idx, idx)[1].backward(), CPU) == "fused SDPA for CPU"


@pytest.mark.gpu
def test_gpu_leaves_the_host_to_others():
    """With more threads, four runs on one machine took twice their time to read their batches."""
    machine.select_device("cuda")
    assert torch.get_num_threads() == 1


@pytest.mark.gpu
def test_gpu_copy_aside():
    """The copy is of what there was before it, though the GPU goes on; what waits for its end comes after it."""
    source = torch.empty(64_000_000, device="cuda")
    copy = torch.empty(source.shape, pin_memory=True)
    for i in range(1, 9):
        source.fill_(i)
        end = machine.copy_aside([(copy, source)])
        torch.cuda.current_stream().wait_event(end)
        source.fill_(-1)
        end.synchronize()
        assert copy.eq(i).all()
