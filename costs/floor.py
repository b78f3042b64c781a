"""
What a step is measured against on this machine: its matrix products and its attention alone, and for the rest the
least bytes at the measured rate of a large copy. Everything between two matrix products is then one kernel, and
nothing of it is done inside them, but GELU by the fused kernels, where it adds nothing. No bound: kernels that mostly
read can be faster than a copy, as norm and rotary are.

Shapes: N tokens of all sequences in a step, C = n_embd, V = vocab_size.
"""

import functools
from collections import Counter
from dataclasses import replace

import torch

import test_memory
from costs.measure import milliseconds
from kernels.attention import choose_window_backend
from kernels.fused import product
from model import GPT, GPTConfig

MOST_TOKENS = 65_536  # in a product that is measured; the head's logits of more might not fit


def weight_shapes(config: GPTConfig) -> dict[tuple[int, int], int]:
    """(inputs, outputs) of the weights of the matrix products, and how many there are of each."""
    C, L = config.n_embd, config.n_layer
    return {(C, 3 * C): L, (C, C): L, (C, 4 * C): L, (4 * C, C): L, (C, config.vocab_size): 1}


def least_bytes(config: GPTConfig, tokens: int, num_params: int, itemsize: int, kernels: str,
                optimizer: str = "adamw") -> dict[str, int]:
    """
    Bytes that a step must read and write for each kind of kernel but products and attention. itemsize: of an element
    of the activations; parameters, gradients and moments are float32.

    loss             logits read, their gradient written
    activation       forward reads and writes 4 C per token and layer, backward reads its input and the gradient too;
                     GELU with fused kernels none
    norm and rotary  for attention and MLP of each layer, x + f(x): x and f(x) read, the sum written; in backward two
                     gradients of x read, their sum written. With pre_norm also the norm written, and in backward its
                     output read; with post_norm f(x) read again in backward, and its gradient written. Rotary: q and k
                     read and written, forward and backward; with qk_norm read again in backward. The last norm; with
                     embedding_norm its output read in backward
    embedding        a row read and x written; in backward the gradient of x added to a row
    optimizer        AdamW reads the weight, its gradient and two moments and writes all but the gradient, which the
                     norm for clipping has read before; Muon has one moment, and its products are left out
    other            in 16 bits: each weight of a product is cast, and with plain kernels its gradient back
    """
    x, L = tokens * config.n_embd * itemsize, config.n_layer
    of_muon = 12 * config.n_embd**2 * L if optimizer == "muon" else 0
    in_products = num_params - config.untie * config.vocab_size * config.n_embd
    branch = 6 + 2 * config.pre_norm + 2 * config.post_norm  # times x
    return {
        "loss": 2 * tokens * config.vocab_size * itemsize,
        "activation": 0 if kernels == "fused" and config.mlp_activation == "gelu" else 5 * 4 * x * L,
        "norm and rotary": (2 * branch + 8 + 2 * config.qk_norm) * x * L + (4 + config.embedding_norm) * x,
        "embedding": 2 * x + 3 * 4 * tokens * config.n_embd,
        "optimizer": 4 * ((7 + 1) * num_params - 2 * of_muon),
        "other": (1 + (kernels == "plain")) * (4 + itemsize) * in_products if itemsize < 4 else 0,
    }


@functools.cache
def products_ms(tokens: int, n_in: int, n_out: int, device: torch.device, dtype: torch.dtype, kernels: str) -> float:
    """(N, n_in) times a weight, and in backward its gradient times the weight and times the input; each alone."""
    n = min(tokens, MOST_TOKENS)
    x, d_y, weight = (torch.randn(shape, device=device, dtype=dtype)
                      for shape in ((n, n_in), (n, n_out), (n_out, n_in)))
    runs = lambda: x @ weight.T, lambda: d_y @ weight, lambda: d_y.T @ x
    if kernels == "fused":
        runs = (lambda: product("NT", x, weight, dtype), lambda: product("NN", d_y, weight, dtype),
                lambda: product("TN", d_y, x, torch.float32))
    total = 0.0
    for run in runs:
        run()  # `milliseconds` wants it
        total += milliseconds(run, device)
    return total * tokens / n


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second while a large tensor is copied on the device."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device) * 1000


def attention_ms(config: GPTConfig, window_backend: str | None, B: int, T: int, device: torch.device,
                 dtype: torch.dtype) -> float:
    """The attention kernels of all layers, forward and backward."""
    total = 0.0
    for W, n in Counter(config.layer_window(layer) for layer in range(config.n_layer)).items():
        backend = W and choose_window_backend(window_backend, config.head_dim, device, dtype)
        layer = replace(config, window_size=W, window_pattern="S")
        forward, inputs, d_out = test_memory.build(test_memory.Point("attention", backend, B, T, W, layer), device,
                                                   dtype)

        def run(forward=forward, inputs=inputs, d_out=d_out):
            torch.autograd.grad(forward(), inputs, d_out)

        run()
        total += n * milliseconds(run, device)
    return total


def measure_floor(model: GPT, B: int, T: int, device: torch.device, dtype: torch.dtype, optimizer: str) -> dict:
    """"kinds": least ms of each kind in a step of B sequences of T tokens; and the two rates."""
    config, rate, shapes = model.config, copy_rate(device), weight_shapes(model.config)
    *_, kernels = model.choose_kernels(T, device, dtype)
    n_bytes = least_bytes(config, B * T, model.num_params(), dtype.itemsize, kernels, optimizer)
    kinds = {"matrix product": sum(n * products_ms(B * T, *shape, device, dtype, kernels)
                                   for shape, n in shapes.items()),
             "attention": attention_ms(config, model.window_backend, B, T, device, dtype)}
    flops = sum(6 * B * T * n_in * n_out * n for (n_in, n_out), n in shapes.items())
    return {"kinds": kinds | {kind: 1000 * n / rate for kind, n in n_bytes.items()}, "least_bytes": n_bytes,
            "product_flops_per_s": 1000 * flops / kinds["matrix product"], "copy_bytes_per_s": rate}
