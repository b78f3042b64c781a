"""cublaslt.py without a GPU: a stand-in for the library computes what its descriptions ask for, column by column."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import machine
from kernels import cublaslt
from kernels.cublaslt import matmul

DTYPES = {0: torch.float32, 14: torch.bfloat16}  # cudaDataType_t


class Library:
    """Objects are dictionaries or tuples under a number, as handles are. `ms`: how long each proposal takes."""

    def __init__(self, ms=(3.0, 1.0, 2.0), statuses=None):
        self.objects, self.ms, self.statuses, self.used, self.refuses = [None], ms, statuses or [0] * len(ms), [], False

    def new(self, reference, value):
        reference._obj.value = len(self.objects)
        self.objects.append(value)

    def matrix(self, pointer, layout) -> torch.Tensor:
        dtype, n_rows, n_columns, stride = self.objects[layout.value]
        assert stride == n_rows, "contiguous columns"
        memory = (ctypes.c_uint8 * (n_rows * n_columns * DTYPES[dtype].itemsize)).from_address(pointer)
        return torch.frombuffer(memory, dtype=DTYPES[dtype]).view(n_columns, n_rows).T

    def call(self, function, *arguments):
        if function == "MatrixLayoutCreate":
            self.new(arguments[0], (arguments[1], *(x.value for x in arguments[2:])))
        elif function.endswith("Create"):
            self.new(arguments[0], {})
        elif function == "MatmulDescSetAttribute":
            assert arguments[3].value == ctypes.sizeof(arguments[2]._obj)
            self.objects[arguments[0].value][arguments[1]] = arguments[2]._obj.value
        elif function == "MatmulAlgoGetHeuristic":
            if self.refuses:
                raise RuntimeError("cuBLASLt's MatmulAlgoGetHeuristic failed with status 15")
            arguments[-1]._obj.value = len(self.ms)
            for i, status in enumerate(self.statuses):
                arguments[-2][i].algorithm[0], arguments[-2][i].status = i, status
        elif function == "Matmul":
            self.multiply(*arguments)

    def multiply(self, handle, description, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, proposal,
                 workspace, n_bytes, stream):
        asked, out = self.objects[description.value], self.matrix(d.value, d_layout)
        a, b = self.matrix(a.value, a_layout).float(), self.matrix(b.value, b_layout).float()
        y = (a.T if asked[3] else a) @ (b.T if asked[4] else b) + beta._obj.value * out.float()
        if 7 in asked:  # epilogue, auxiliary pointer, its stride
            aux = self.matrix(asked[11], d_layout)
            assert asked[12] == len(out)
            if asked[7] == 32 + 128:
                aux.copy_(y)
                y = F.gelu(y, approximate="tanh")
            else:
                assert asked[7] == 64 + 128
                y = torch.ops.aten.gelu_backward(y, aux.float(), approximate="tanh")
        out.copy_(y)
        self.used.append(proposal._obj.algorithm[0])


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(cublaslt, "call", lambda *arguments: library.call(*arguments))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    class Event:
        """Its time is when the proposals that ran up to it have ended."""

        def __init__(self, enable_timing):
            pass

        def record(self):
            self.ms = sum(library.ms[i] for i in library.used)

        def elapsed_time(self, end):
            return end.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for cache in cublaslt.product_of, cublaslt.handle, cublaslt.workspace:
        cache.cache_clear()
    yield library
    for cache in cublaslt.product_of, cublaslt.handle, cublaslt.workspace:
        cache.cache_clear()


def aligned(x, dtype=torch.bfloat16):
    """The same, at an address that 256 divides, as on a GPU."""
    memory = torch.zeros(x.numel() * dtype.itemsize + 256, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 256:][:x.numel() * dtype.itemsize]
    return memory.view(dtype).view(x.shape).copy_(x)


def operands(layout, M=5, N=16, K=7):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    return (aligned(left.T if layout[0] == "T" else left), aligned(right.T if layout[1] == "T" else right),
            left.bfloat16().float() @ right.bfloat16().float())


@pytest.mark.parametrize("layout", ["NN", "NT", "TN"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products(library, layout, dtype):
    left, right, expected = operands(layout)
    out = aligned(torch.zeros(5, 16), dtype)
    matmul(layout, left, right, out)
    torch.testing.assert_close(out, expected.to(dtype))


def test_sums(library):
    """The trial leaves the sum alone."""
    left, right, expected = operands("TN")
    out = aligned(torch.ones(5, 16), torch.float32)
    for n in 1, 2:
        matmul("TN", left, right, out, accumulate=True)
        torch.testing.assert_close(out, 1 + n * expected)


def test_gelu(library):
    left, right, expected = operands("NT")
    out, aux = aligned(torch.zeros(5, 16)), aligned(torch.zeros(5, 16))
    matmul("NT", left, right, out, "gelu", aux)
    torch.testing.assert_close(aux, expected.bfloat16())
    torch.testing.assert_close(out, F.gelu(expected, approximate="tanh").bfloat16())
    other = aligned(torch.randn(5, 16))  # another address than before
    matmul("NT", left, right, out, "gelu_backward", other)
    expected = torch.ops.aten.gelu_backward(expected, other.float(), approximate="tanh")
    torch.testing.assert_close(out, expected.bfloat16())


def test_the_fastest_is_found_once(library):
    left, right, _ = operands("NN")
    out = aligned(torch.zeros(5, 16))
    matmul("NN", left, right, out)
    assert {*library.used} == {0, 1, 2} and library.used[-1] == 1
    n = len(library.used)
    matmul("NN", left, right, out)
    assert library.used[n:] == [1]
    library.used.clear()
    matmul("NN", left[:3], right, out[:3])  # another shape
    assert {*library.used} == {0, 1, 2}


def test_no_trial_where_two_runs_must_not_differ(library, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    left, right, _ = operands("NN")
    matmul("NN", left, right, aligned(torch.zeros(5, 16)))
    assert library.used == [0]


def test_what_cublaslt_withdraws_is_not_tried(library):
    library.statuses = [0, 15, 0]
    left, right, _ = operands("NN")
    matmul("NN", left, right, aligned(torch.zeros(5, 16)))
    assert {*library.used} == {0, 2} and library.used[-1] == 2


@pytest.mark.parametrize("how", ["refuses", "proposes nothing", "withdraws all"])
def test_no_algorithm(library, how):
    library.refuses = how == "refuses"
    if how == "proposes nothing":
        library.ms = library.statuses = []
    if how == "withdraws all":
        library.statuses = [15, 15, 15]
    left, right, _ = operands("NN")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="NN product of 5 x 7 x 16 with no epilogue: use --kernels plain"):
            matmul("NN", left, right, aligned(torch.zeros(5, 16)))


@pytest.mark.parametrize("change", [
    lambda x: x.float(), lambda x: x.T, lambda x: x[:, :-1], lambda x: aligned(torch.zeros(6, 7))[1:]],
    ids=["float32", "transposed", "a part of each row", "not aligned"])
def test_other_tensors_are_refused(library, change):
    left, right, _ = operands("NN")
    with pytest.raises(ValueError, match="contiguous bfloat16"):
        matmul("NN", change(left), right, aligned(torch.zeros(5, 16)))
    with pytest.raises(ValueError, match=r"NT product of \(5, 7\) and \(7, 16\)"):
        matmul("NT", left, right, aligned(torch.zeros(5, 16)))
    assert library.used == []


@pytest.mark.parametrize(("status", "full"), [(3, True), (15, False)])
def test_without_memory_it_is_said(monkeypatch, status, full):
    monkeypatch.setattr(cublaslt, "library", lambda: SimpleNamespace(cublasLtCreate=lambda handle: status))
    with pytest.raises(RuntimeError, match=f"Create failed with status {status}") as raised:
        cublaslt.call("Create", None)
    assert machine.is_out_of_memory(raised.value) == full
