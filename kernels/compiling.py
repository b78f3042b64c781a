"""torch.compile that is never silently slow."""

import functools
import re

import torch


class SlowPath(RuntimeError):
    """A fused or compiled form was asked for, and torch would have run another one."""

    exit_code = 2


def compiles(option: str, device: torch.device) -> bool:
    """on, off, or auto: on CUDA."""
    return option == "on" or (option == "auto" and device.type == "cuda")


def compile_static(function, **options):
    """
    torch.compile with static shapes into one graph. A call is compiled once for its shapes, dtypes, grad mode and
    autocast; where torch would compile it again for the same ones, or run it uncompiled, it raises SlowPath.
    Torch's cache on disk serves functions with a backward of their own too: a warm start traces once instead of twice.
    """

    name = function.__qualname__

    @functools.wraps(function)
    def traced(*arguments, **named):
        if not torch.compiler.is_compiling():
            raise SlowPath(f"{name} would run uncompiled: is torch.compile off (TORCH_COMPILE_DISABLE)?")
        return function(*arguments, **named)

    traced.__code__ = traced.__code__.replace(co_name=name)  # one of its own: torch's limit counts per code object
    compiled = torch.compile(traced, dynamic=False, fullgraph=True, **options)
    seen = set()

    def call(*arguments, **named):
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(autocast_dtype, ("cuda", "cpu"))
        key = (modes, *map(signature, arguments), *((name, signature(value)) for name, value in named.items()))
        try:
            with (torch.compiler.set_stance("fail_on_recompile") if key in seen else
                  torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True)):
                result = compiled(*arguments, **named)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise SlowPath(f"{name} has been compiled for {torch._dynamo.config.recompile_limit} shapes, torch's limit "
                           "(torch._dynamo.config.recompile_limit)") from error
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            guards = re.findall(r"- \d+/\d+: (.*?)(?:  |$)", str(error), re.MULTILINE)
            raise SlowPath(f"{name} would be compiled again for shapes that it has been compiled for: "
                           f"{'; '.join(guards) or 'its compiled form is gone'}") from error
        seen.add(key)
        return result

    return call


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """None where autocast is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def signature(argument):
    """What a compiled form of a function depends on, of one argument."""
    if isinstance(argument, list):
        return tuple(map(signature, argument))
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device, argument.requires_grad
    return argument if isinstance(argument, int | float | None) else type(argument)
