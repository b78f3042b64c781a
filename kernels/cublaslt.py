"""
Matrix products by NVIDIA's cuBLASLt, for what torch.mm leaves undone: of the algorithms that cuBLASLt proposes the
fastest is found by trial, and GELU or its gradient is computed before the result is written ("epilogue").

cuBLAS takes the first proposal, the best by a model of its own. On an H100 the products of a d12 step take 12 % longer
with those than with the best ones (docs/experiments.md); which they are depends on the shapes and on the GPU. So a
product tries all of them, on its own operands, when its shapes first come: some 0.1 s. Two runs may choose differently,
unless torch.use_deterministic_algorithms is on: then it is the first proposal.

The numbers are those of cublasLt.h, of CUDA 12 and 13. cuBLASLt counts in columns, and a matrix in rows is its
transposed one in columns: what it is asked for is out^T = right^T left^T.
"""

import ctypes
import functools
import statistics
from ctypes import byref, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 14}
COMPUTE_FLOAT32 = 68
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, AUX, AUX_ROW, MOST_WORKSPACE = 3, 4, 7, 11, 12, 1
EPILOGUES = {"gelu": 32 + 128, "gelu_backward": 64 + 128}  # 128: with a matrix beside, GELU's input
ALLOC_FAILED = 3  # of cublasStatus_t
WORKSPACE_BYTES = 32 * 2**20  # what cuBLAS recommends for Hopper
TRIALS, CALLS = 5, 3  # an algorithm's time is the median of the trials, each of so many calls


class Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t; `algorithm` begins it."""

    _fields_ = [("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("status", c_int32), ("waves", c_float),
                ("reserved", c_int32 * 4)]


def matmul(layout, left, right, out, epilogue=None, aux=None, accumulate=False):
    """
    out = left right, or out += left right, as (M, K) times (K, N), on the current device and one stream; all contiguous
    from an address that 256 divides, as torch allocates, in bfloat16, out also in float32. layout: NN; NT where right
    is given as (N, K); TN where left is given as (K, M). epilogue: gelu puts left right into aux and GELU (tanh) of it
    into out, gelu_backward multiplies it by the derivative of GELU at aux; aux is as out. ValueError for other
    tensors, RuntimeError where cuBLASLt has no algorithm.
    """
    for x in (left, right, out, *(() if aux is None else (aux,))):
        if not (x.is_contiguous() and x.data_ptr() % 256 == 0 and (x.dtype == torch.bfloat16 or x is out)):
            raise ValueError(f"cuBLASLt is given {x.dtype}, strides {x.stride()}, not aligned and contiguous bfloat16")
    (M, N), K = out.shape, left.size(0 if layout[0] == "T" else 1)
    if tuple(left.shape) != ((K, M) if layout[0] == "T" else (M, K)) or (
            tuple(right.shape) != ((N, K) if layout[1] == "T" else (K, N))):
        raise ValueError(f"{layout} product of {tuple(left.shape)} and {tuple(right.shape)} is not {tuple(out.shape)}")
    product_of(layout, M, N, K, out.dtype, epilogue, accumulate, out.device)(left, right, out, aux)


@functools.cache
def product_of(*arguments):
    return Product(*arguments)


class Product:
    """A product of these shapes, on one device."""

    def __init__(self, layout, M, N, K, out_dtype, epilogue, accumulate, device):
        self.name = f"{layout} product of {M} x {K} x {N} with {epilogue or 'no'} epilogue"
        self.handle, self.workspace, self.fastest = handle(device), workspace(device), None
        self.one, self.beta = c_float(1), c_float(accumulate)
        self.description = c_void_p()
        call("MatmulDescCreate", byref(self.description), COMPUTE_FLOAT32, TYPES[torch.float32])
        self.set(TRANSPOSE_A, c_int32(layout[1] == "T"))
        self.set(TRANSPOSE_B, c_int32(layout[0] == "T"))
        if epilogue is not None:
            self.set(EPILOGUE, c_int32(EPILOGUES[epilogue]))
            self.set(AUX, c_void_p(2**20))  # any address; its alignment counts when algorithms are proposed
            self.set(AUX_ROW, c_int64(N))
        self.right = matrix(*((N, K) if layout[1] == "T" else (K, N)), torch.bfloat16)
        self.left = matrix(*((K, M) if layout[0] == "T" else (M, K)), torch.bfloat16)
        self.out = matrix(M, N, out_dtype)
        self.proposals = self.propose()

    def set(self, attribute, value):
        call("MatmulDescSetAttribute", self.description, attribute, byref(value), c_size_t(ctypes.sizeof(value)))

    def propose(self) -> list[Proposal]:
        preference, found, n = c_void_p(), (Proposal * 32)(), c_int32()
        call("MatmulPreferenceCreate", byref(preference))
        call("MatmulPreferenceSetAttribute", preference, MOST_WORKSPACE, byref(c_size_t(WORKSPACE_BYTES)), c_size_t(8))
        try:
            call("MatmulAlgoGetHeuristic", self.handle, self.description, self.right, self.left, self.out, self.out,
                 preference, len(found), found, byref(n))
            proposals = [proposal for proposal in found[:n.value] if proposal.status == 0]
            if not proposals:
                raise RuntimeError("cuBLASLt proposes no algorithm")
        except RuntimeError as error:
            raise RuntimeError(f"{error}, for a {self.name}: use --kernels plain") from error
        finally:
            call("MatmulPreferenceDestroy", preference)
        return proposals

    def __call__(self, left, right, out, aux):
        if aux is not None:
            self.set(AUX, c_void_p(aux.data_ptr()))
        if self.fastest is None and torch.are_deterministic_algorithms_enabled():
            self.fastest = self.proposals[0]
        if self.fastest is None:
            self.fastest = self.find_fastest(left, right, torch.zeros_like(out) if self.beta else out)
        self.run(self.fastest, left, right, out)

    def run(self, proposal, left, right, out):
        call("Matmul", self.handle, self.description, byref(self.one), address(right), self.right, address(left),
             self.left, byref(self.beta), address(out), self.out, address(out), self.out, byref(proposal),
             address(self.workspace), c_size_t(WORKSPACE_BYTES),
             c_void_p(torch.cuda.current_stream(out.device).cuda_stream))

    def find_fastest(self, left, right, out) -> Proposal:
        """In turns, so that the GPU is as warm for each."""
        def trial(proposal):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                self.run(proposal, left, right, out)
            end.record()
            return start, end

        turns = [[trial(proposal) for proposal in self.proposals] for _ in range(TRIALS)]
        torch.cuda.synchronize(out.device)
        ms = [statistics.median(start.elapsed_time(end) for start, end in trials)
              for trials in zip(*turns, strict=True)]
        return self.proposals[ms.index(min(ms))]


def address(tensor):
    return c_void_p(tensor.data_ptr())


def matrix(n_rows, n_columns, dtype):
    """The description of a contiguous matrix."""
    layout = c_void_p()
    call("MatrixLayoutCreate", byref(layout), TYPES[dtype], c_uint64(n_columns), c_uint64(n_rows), c_int64(n_columns))
    return layout


@functools.cache
def workspace(device: torch.device):
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@functools.cache
def handle(device: torch.device):
    """Of the current device, which `device` is."""
    handle = c_void_p()
    call("Create", byref(handle))
    return handle


@functools.cache
def library():
    """Torch for CUDA has loaded it."""
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def call(function, *arguments):
    status = getattr(library(), f"cublasLt{function}")(*arguments)
    if status:
        why = ", out of memory" if status == ALLOC_FAILED else ""
        raise RuntimeError(f"cuBLASLt's {function} failed with status {status}{why}")
