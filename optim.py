"""
The optimizers and the learning-rate schedule.

AdamW (arXiv 1711.05101) updates everything, or with `muon` only embedding and head, and Muon the matrices of the blocks
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): their momentum, with all singular values made about 1.
"""

import math
from collections import defaultdict

import torch
import torch.distributed as dist

from configs.recipes import TrainConfig
from kernels.compiling import compile_static

# what each keeps of a weight, in float32. A new optimizer needs its line, and changes nothing where found_inf is 1
STATE = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of a x + b x^3 + c x^5, five times: Jordan's
NEWTON_SCHULZ_STEPS = 5


def make_optimizers(model: torch.nn.Module, config: TrainConfig, compiled: bool = False) -> list[torch.optim.Optimizer]:
    """Each weight is in one of them; weight decay on matrices only. compiled: torch.compile for what is not fused."""
    weights = dict(model.named_parameters())
    own_rate = config.embedding_learning_rate is not None and "lm_head.weight" in weights  # which a tied head is not
    embedding = [weights.pop("transformer.wte.weight")] if own_rate else []
    hidden = {name: weights.pop(name) for name in list(weights)
              if config.optimizer == "muon" and ".h." in name and weights[name].ndim == 2}
    optimizers = [torch.optim.AdamW(filled([
        {"params": embedding, "lr": config.embedding_learning_rate, "weight_decay": 0.0},
        {"params": [weight for weight in weights.values() if weight.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights.values() if weight.ndim < 2], "weight_decay": 0.0},
    ]), lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)]
    if hidden:
        qkv = [name for name in hidden if name.endswith("c_attn.weight")]
        if any(hidden[name].size(0) != 3 * hidden[name].size(1) for name in qkv):
            raise ValueError("muon takes c_attn for q, k and v of one size: let other parts be weights of their own")
        optimizers.append(Muon(filled([
            {"params": [hidden[name] for name in qkv], "parts": 3},
            {"params": [hidden[name] for name in hidden if name not in qkv], "parts": 1},
        ]), config.muon_learning_rate, config.weight_decay, compiled))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # the peak
    return optimizers


def filled(groups: list[dict]) -> list[dict]:
    """Those that have weights."""
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Optimizer):
    """
    What torch.optim.Muon computes by default (Nesterov momentum 0.95, five steps of Newton and Schulz, updates times
    sqrt(max(1, rows / columns))), with all matrices of one shape as one batch. A group's `parts` is the number of
    matrices in each of its weights, one below the other: q, k and v are three, whose updates are to be of one size. Of
    several processes each makes its share of the updates and gets the others'. `found_inf`, a float32 on the device,
    leaves all as it was where it is 1, as in fused AdamW.
    """

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, compiled: bool = False):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.found_inf = torch.zeros((), device=groups[0]["params"][0].device)
        self.follow, self.orthogonal, self.move = (
            compile_static(f) if compiled else f for f in (follow, orthogonal, move))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parts, same_shape = group["parts"], defaultdict(list)
            for weight in group["params"]:
                same_shape[weight.shape].append(weight)
            lr = torch.tensor(group["lr"], dtype=torch.float32)  # a number would be compiled in
            for (rows, columns), weights in same_shape.items():
                gradients = [weight.grad for weight in weights]
                for weight in weights:
                    if not self.state[weight]:
                        self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
                directions = self.follow(gradients, buffers, group["momentum"], self.found_inf)
                updates = share(self.orthogonal, directions.view(-1, rows // parts, columns))
                scale = math.sqrt(max(1, rows / parts / columns))
                self.move(weights, updates.reshape(-1, rows, columns), lr, group["weight_decay"], scale, self.found_inf)


def follow(gradients: list, buffers: list, momentum: float, found_inf):
    """Moves the running means towards the gradients. Returns Nesterov's directions, bfloat16 (n, rows, columns)."""
    for gradient, buffer in zip(gradients, buffers, strict=True):
        buffer.copy_(torch.where(found_inf > 0, buffer, buffer.lerp(gradient, 1 - momentum)))
    return torch.stack([gradient.lerp(buffer, momentum).bfloat16()
                        for gradient, buffer in zip(gradients, buffers, strict=True)])


def orthogonal(x):
    """u v^T for each matrix u s v^T of (n, rows, columns), s about 1: between 0.7 and 1.2. In the dtype of x."""
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def share(function, x):
    """function(x), where it works on each x[i] alone, the work divided among all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function(x)
    n = -(-len(x) // dist.get_world_size())
    mine = x[dist.get_rank() * n:][:n]
    result = x.new_zeros(dist.get_world_size() * n, *x.shape[1:])
    dist.all_gather_into_tensor(result, torch.cat((function(mine), x.new_zeros(n - len(mine), *x.shape[1:]))))
    return result[:len(x)]


def move(weights: list, updates, lr, weight_decay: float, scale: float, found_inf):
    """w (1 - lr weight_decay) - lr scale update, for each; lr: float32."""
    for weight, update in zip(weights, updates, strict=True):
        weight.copy_(torch.where(found_inf > 0, weight, weight * (1 - lr * weight_decay) - lr * scale * update))


def update(model: torch.nn.Module, optimizers: list, loss: torch.Tensor, grad_clip: float, alone: bool = False):
    """
    Clips the gradient, updates the weights and drops the gradient. loss: this process's share; alone: of several
    processes each for itself, which is only for measuring. Returns (loss, norm of the gradient) as one float32 tensor
    on the device, and no host waits: where one of them is not finite, in any process, the kernels of CUDA and CPU leave
    all as it was, in this update and in all that follow.
    """
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).float()
    report = torch.stack((loss.float(), grad_norm))
    if dist.is_initialized() and not alone:
        shared = torch.stack((loss.float(), 0 * grad_norm))  # NaN, where the norm is not finite
        dist.all_reduce(shared)
        report = torch.stack((shared[0], grad_norm + shared[1]))
    not_finite = 1 - report.isfinite().all().float()
    for optimizer in optimizers:
        optimizer.found_inf = not_finite.maximum(getattr(optimizer, "found_inf", not_finite))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return report


def rehearse_update(optimizers: list):
    """Compiles what an update by Muon needs, by one that leaves all as it is. The gradients must be there."""
    for muon in (optimizer for optimizer in optimizers if isinstance(optimizer, Muon)):
        muon.found_inf.fill_(1)
        muon.step()
        muon.found_inf.zero_()


def set_learning_rate(optimizers: list, config: TrainConfig, step: int) -> float:
    """Of update step + 1, in each group its peak times `schedule`. Returns the one whose peak is learning_rate."""
    part = schedule(config, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * part
    return config.learning_rate * part


def schedule(config: TrainConfig, step: int) -> float:
    """
    The learning rate as a part of its peak: linear rise over warmup_steps, then the peak, and over the last
    decay_fraction of all steps (all that are left, if it is 1) a decay to final_lr_fraction.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_start = max(config.warmup_steps, round(config.max_steps * (1 - config.decay_fraction)))
    progress = max(0.0, (step - decay_start) / max(1, config.max_steps - decay_start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining
