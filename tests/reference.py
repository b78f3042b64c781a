"""
The model in float64 with a dense T x T mask, slow and plain: what tests compare model.py with. Written from the
equations, not from model.py, and it shares no code with it. Gradients are autograd's, of this file's own forward.

Shapes: B batch, T tokens in a sequence, C = n_embd, H = n_head, D = C / H, V vocab_size, W window_size.
"""

import math

import torch

# The fields of GPTConfig that the equations below know; a variant that sets another one has no reference here.
KNOWN_FIELDS = {"n_layer", "n_head", "n_embd", "vocab_size",
                "pre_norm", "post_norm", "embedding_norm", "qk_norm", "attention_scale", "window_size",
                "window_pattern", "mlp_activation", "untie", "logit_softcap"}


def rms_norm(x):
    """x / sqrt(mean(x^2) + 1e-6) over the last dimension."""
    return x * (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6).rsqrt()


def gelu(x):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), arXiv 1606.08415, section 2."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotary(x):
    """(x1 + i x2) exp(i t f_j), f_j = 10000^(-2 j / D), x1 and x2 the halves of the head. x: (..., T, D)."""
    T, D = x.shape[-2:]
    angle = torch.tensor([[t * 10_000 ** (-2 * j / D) for j in range(D // 2)] for t in range(T)], dtype=torch.float64)
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def visible(T, window):
    """(T, T) bool: query t (row) sees key s (column) if s <= t and, with a window of W keys, t - s < W."""
    return torch.tensor([[s <= t and (window is None or t - s < window) for s in range(T)] for t in range(T)])


def attention(q, k, v, window, scale=None):
    """softmax(scale q k^T) v over the visible keys, in the dtype and on the device of q. (..., T, D)."""
    T, D = q.shape[-2:]
    score = q @ k.transpose(-1, -2) * (scale or D**-0.5)
    score = score.masked_fill(~visible(T, window).to(q.device), -math.inf)
    weight = (score - score.amax(-1, keepdim=True)).exp()
    return weight / weight.sum(-1, keepdim=True) @ v


def reference_logits(config, weights, idx):
    """Logits (B, T, V) of float64 weights named as in the state dict; without untie the head is the embedding."""
    C, H = config.n_embd, config.n_head
    D = C // H
    pre = rms_norm if config.pre_norm else (lambda x: x)
    post = rms_norm if config.post_norm else (lambda x: x)
    activation = {"gelu": gelu, "relu2": lambda x: (x > 0) * x * x}[config.mlp_activation]
    head_norm = rms_norm if config.qk_norm else (lambda x: x)
    x = weights["transformer.wte.weight"][idx]
    x = rms_norm(x) if config.embedding_norm else x
    for i in range(config.n_layer):
        at = f"transformer.h.{i}."
        windowed = config.window_size is not None and config.window_pattern[i % len(config.window_pattern)] == "S"
        rows = weights[at + "attn.c_attn.weight"]  # q, k, v; in each C rows, head h has D of them
        heads = []
        for h in range(H):
            q, k, v = (pre(x) @ rows[part * C + h * D : part * C + (h + 1) * D].T for part in range(3))
            q, k = rotary(head_norm(q)), rotary(head_norm(k))
            heads.append(attention(q, k, v, config.window_size if windowed else None, config.attention_scale))
        x = x + post(torch.cat(heads, dim=-1) @ weights[at + "attn.c_proj.weight"].T)
        x = x + post(activation(pre(x) @ weights[at + "mlp.c_fc.weight"].T) @ weights[at + "mlp.c_proj.weight"].T)
    logits = rms_norm(x) @ weights["lm_head.weight" if config.untie else "transformer.wte.weight"].T
    cap = config.logit_softcap
    return logits if cap is None else cap * (1 - 2 / (1 + (2 * logits / cap).exp()))


def reference_loss_and_gradients(config, state_dict, idx, targets):
    """
    (loss, {name: gradient}, logits (B, T, V)), all float64 on the CPU. idx, targets: (B, T) int64; -1 has no loss.
    The tied weight is differentiated once, under `transformer.wte.weight`.
    """
    tied = torch.equal(state_dict["lm_head.weight"], state_dict["transformer.wte.weight"])
    assert tied != config.untie
    weights = {name: weight.detach().cpu().double().requires_grad_()
               for name, weight in state_dict.items() if name != "lm_head.weight" or config.untie}
    logits = reference_logits(config, weights, idx.cpu())
    shifted = logits - logits.amax(-1, keepdim=True)
    log_probability = shifted - shifted.exp().sum(-1, keepdim=True).log()
    b, t = torch.nonzero(targets.cpu() != -1, as_tuple=True)
    loss = -log_probability[b, t, targets.cpu()[b, t]].mean()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return loss.detach(), dict(zip(weights, gradients, strict=True)), logits.detach()
