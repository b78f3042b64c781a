"""Where a NaN or an infinity begins."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist


def first_not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """Its name. Waits for the device once."""
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return None if all(finite) else list(tensors)[finite.index(False)]


def suspects(model: torch.nn.Module, loss) -> dict:
    """The weights, the loss and the gradients by name, in the order in which a step needs or makes them."""
    weights = list(model.named_parameters())
    gradients = {f"the gradient of {name}": weight.grad for name, weight in reversed(weights)}
    return {**dict(weights), "the loss": loss, **gradients}


def find(model: torch.nn.Module, forward_backward: Callable, batches: Iterable) -> tuple[int, str] | None:
    """
    The number of the batch and the name of the first suspect that is not finite. forward_backward: (inputs, targets) ->
    loss, leaves gradients.
    """
    for n, batch in enumerate(batches):
        model.zero_grad(set_to_none=True)
        if name := first_not_finite(suspects(model, forward_backward(*batch))):
            return n, name
    return None


def explain(model: torch.nn.Module, forward_backward: Callable, batches: Iterable, windows: Callable) -> str:
    """What `find` finds on each process, in the batches of a step; windows: (process, batch) -> those in it."""
    n_processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    found, names = torch.full((n_processes,), -1), list(suspects(model, None))
    if own := find(model, forward_backward, batches):
        found[rank] = own[0] * len(names) + names.index(own[1])
    if n_processes > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    for rank, number in enumerate(found.tolist()):
        if number >= 0:
            batch, name = divmod(number, len(names))
            return (f"the first that is not finite: {names[name]}" + f" on process {rank}" * (n_processes > 1)
                    + f", windows {some(windows(rank, batch))}")
    return "all is finite when it is done again"


def some(numbers: Iterable[int]) -> str:
    numbers = [str(number) for number in numbers]
    return " ".join(numbers[:8]) + f" and {len(numbers) - 8} more" * (len(numbers) > 8)
