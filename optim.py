"""The optimizer and the learning-rate schedule."""

import math

import torch

from configs.recipes import TrainConfig


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) in one fused kernel; weight decay on matrices only."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, grad_clip: float):
    """
    Clips the gradient, updates the weights and drops the gradient. Returns (loss, norm of the gradient) as one float32
    tensor on the device, and no host waits: where one of them is not finite the kernels of CUDA and CPU leave all as it
    was, in this update and in all that follow.
    """
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    report = torch.stack((loss.float(), grad_norm.float()))
    not_finite = 1 - report.isfinite().all().float()
    optimizer.found_inf = not_finite.maximum(getattr(optimizer, "found_inf", not_finite))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return report


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update that follows `step` updates: linear rise over warmup_steps, then decay to final_lr_fraction."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining)
