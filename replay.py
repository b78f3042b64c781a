"""
The step of a run whose loss or gradient was not finite, again: where it begins, and what removes it.

    python replay.py --run NAME

Such a run ends with exit code 6 and keeps the weights of that step. The step is done again as it was; then in float32,
without torch.compile, and by plain kernels (model.py as it stands, attention by its definition), each of these alone
and one sequence at a time.

Exit codes: 0 done, 2 bad option, or other data than the run had, 4 damaged weights, 5 data that cannot be
prepared, 7 missing, empty or invalid data, 130 Ctrl-C.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.nn.attention import SDPBackend
from tqdm import tqdm

import checkpoint
import machine
from configs.recipes import TrainConfig, restored
from data.loader import open_data, train_order
from finite import find, first_not_finite, some
from kernels.compiling import SlowPath, compiles
from model import GPT, GPTConfig
from rundir import BAD_OPTION, DONE, INTERRUPTED, BadOption, CannotWrite, NoValidCheckpoint, directory_of


@dataclass(frozen=True)
class ReplayConfig:
    run: str
    """name of a run, or path of its directory"""
    out_dir: str = "runs"
    """where run directories are"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where it runs; auto: CUDA, MPS or CPU, whichever there is"""


class PlainGPT(GPT):
    def choose_kernels(self, T, device, dtype):
        return "blocked" if self.windowed_attentions() else None, SDPBackend.MATH, "plain"


WAYS = {  # name: (class of the model, options that differ)
    "as it was": (GPT, {}),
    "in float32": (GPT, {"dtype": "float32", "kernels": None, "recompute_gelu": False, "window_backend": None}),
    "without torch.compile": (GPT, {"compile": "off"}),
    "by plain kernels": (PlainGPT, {"kernels": "plain", "recompute_gelu": False, "window_backend": None}),
}


def build(model_class, config: TrainConfig, gpt_config: GPTConfig, weights: Path, device, part: float):
    """The model, what `find` calls, what modules gave, by name, if it is not compiled; part: of a step in a batch."""
    model, outputs = model_class(gpt_config, config.window_backend, config.kernels, config.recompute_gelu), {}
    checkpoint.load_weights(weights, model.to(device))
    if compiles(config.compile, device):
        model.compile()
    else:
        def note(module, inputs, output):
            outputs.pop(names[module], None)  # in the order of the last calls
            outputs[names[module]] = output

        names = {module: name for name, module in model.named_modules()}
        for module in names:
            module.register_forward_hook(note)
    dtype = machine.matmul_dtype(device, config.dtype)

    def forward_backward(inputs, targets):
        outputs.clear()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, loss = model.forward(inputs.to(device), targets.to(device))
        (loss * part).backward()
        return loss.detach()

    return model, forward_backward, outputs


def replay(config: ReplayConfig) -> list[str]:
    """Prints what each of the WAYS gives; the names of those in which all is finite."""
    device = machine.select_device(config.device)
    run = directory_of(config.run, config.out_dir)
    kept = run and checkpoint.newest_valid(run / checkpoint.NOT_FINITE)
    if kept is None:
        raise BadOption(f"{config.run} has no step to do again: only a run that ended with exit code 6 has one")
    state = checkpoint.read_state(kept)
    with checkpoint.of_this_version(kept):
        run_config = restored(TrainConfig, state["train_config"])
        gpt_config = restored(GPTConfig, state["model_config"])
        fingerprint, step, batch_size = state["settings"]["data"], int(state["step"]), int(state["batch_size"])
    if run_config.deterministic:
        machine.make_deterministic()
    dataset, windows, _ = open_data(run_config.data, run_config.sequence_length, gpt_config.vocab_size,
                                    run_config.verify_data)
    if dataset.fingerprint != fingerprint:
        raise BadOption(f"{dataset.directory} does not hold the data that {run} had")
    n_windows = run_config.total_batch_tokens // run_config.sequence_length
    order = train_order(len(windows), run_config.seed, step, n_windows)
    print(f"step {step + 1} of {run}, {n_windows} windows of {dataset.directory}")
    sound = []
    for name, (model_class, changes) in WAYS.items():
        n = 1 if changes else batch_size
        way = build(model_class, replace(run_config, **changes), gpt_config, kept, device, n / n_windows)
        model, forward_backward, outputs = way
        starts = tqdm(range(0, n_windows, n), name, leave=False, disable=None)
        found = find(model, forward_backward, (windows.read(order[i : i + n]) for i in starts))
        if found is None:
            sound.append(name)
            print(f"{name:22} all is finite")
        else:
            batch, suspect = found
            module = first_not_finite(outputs) if outputs else None
            suspect = f"the output of {module}" if module else suspect
            print(f"{name:22} not finite: {suspect}, windows {some(order[batch * n :][:n])}")
    return sound


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        sound = replay(tyro.cli(ReplayConfig, args=arguments, description=__doc__.strip(),
                                config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
    except (ValueError, NoValidCheckpoint, CannotWrite, SlowPath) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_OPTION)
    except KeyboardInterrupt:
        return INTERRUPTED
    if not sound:
        print("nothing removes it: the weights or the tokens themselves")
    elif len(sound) == len(WAYS):
        print("finite in every way: what the run met is in none of them; the GPU or its memory may be at fault")
    else:
        print(f"finite {' and '.join(sound)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
