"""
Checkpoint directories: written once, verified when read, the newest valid one wins.

step-00001000/ holds model.safetensors (each parameter once), optim.safetensors (keys `<parameter name>/<state key>`),
state.json (step, configs, versions) and, written last, manifest.json with size and sha256 of the others.
"""

import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import machine
from configs.recipes import restored
from files import fsync, sha256, write_hashed
from model import GPT, GPTConfig
from optim import STATE
from rundir import BadOption, CannotWrite, NoValidCheckpoint, RunDir, cannot_write, directory_of, writing

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
FILES = ("model.safetensors", "optim.safetensors", "state.json")
NOT_FINITE = "not-finite"  # directory within a run's, for the weights before a step that ended it
MOST_FAILED_SAVES = 3  # one after the other, then a run ends


# -----------------------------------------------------------------------------
# write


def save(run_directory: Path, step: int, weights: dict, moments: dict, state: dict, keep_last: int) -> Path:
    """
    Writes step-<step> so that it appears whole or not at all, then removes all but the newest `keep_last`.
    weights, moments: as `named_tensors` gives them; state: JSON values, what is needed beyond them. Raises OSError if
    it cannot be written; no older checkpoint is touched before the new one is complete on disk.
    """
    temporary = run_directory / f".saving-{directory_name(step)}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        contents = safetensors_parts(weights), safetensors_parts(moments), [json_bytes({"step": step, **state})]
        manifest = {name: write_hashed(temporary / name, parts) for name, parts in zip(FILES, contents, strict=True)}
        write_hashed(temporary / "manifest.json", [json_bytes(manifest)])
        fsync(temporary)
        target = temporary.rename(run_directory / directory_name(step))
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(run_directory)
    with suppress(OSError):  # what stays goes after the next save
        for old in list_checkpoints(run_directory)[keep_last:]:
            old.rename(run_directory / f".removing-{old.name}")  # no checkpoint any more, before it is half of one
        for removed in run_directory.glob(".removing-*"):
            shutil.rmtree(removed)
    return target


def named_tensors(model: torch.nn.Module, optimizers: list) -> tuple[dict, dict]:
    """
    The weights by name, each once, and the state of the optimizers as `<parameter name>/<state key>`. BadOption where
    an optimizer has more than optim.STATE says.
    """
    for optimizer in optimizers:
        kept, said = {key for state in optimizer.state.values() for key in state}, STATE[type(optimizer).__name__]
        if not kept <= {*said}:
            raise BadOption(f"{type(optimizer).__name__} keeps {', '.join(sorted(kept))}, of which optim.STATE says "
                            f"{', '.join(said) or 'nothing'}: a checkpoint would lack it")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    moments = {name: optimizer.state[weight][key] for name, key, weight, optimizer in named_moments(model, optimizers)}
    return weights, moments


class Saver:
    """
    The saves of one run, one at a time; beside: written by a thread, from a copy in the host's memory, while the
    training goes on. A save that fails is a warning; the third of a row, or the run's last, raises CannotWrite.
    """

    def __init__(self, run: RunDir, keep_last: int, model: torch.nn.Module, optimizers: list, beside: bool, say=print):
        self.run, self.keep_last, self.say, self.n_failed, self.in_hand = run, keep_last, say, 0, None
        if buffers := [name for name, _ in model.named_buffers()]:
            raise BadOption(f"a checkpoint has weights alone, not the buffers {', '.join(buffers)}")
        kept = layouts(model, optimizers)  # KeyError for an optimizer without its line in optim.STATE
        self.thread = ThreadPoolExecutor(1) if beside else None
        if self.thread:  # pinning memory takes a second, in which this process has something else to do
            self.memory = self.thread.submit(lambda: [host_memory(part) for part in kept])
            self.copied = None  # the end of a copy
            for optimizer in optimizers:  # an update changes what is copied, forward and backward do not
                optimizer.register_step_pre_hook(self.before_update)

    def save(self, step: int, model: torch.nn.Module, optimizers: list, state: dict, last: bool):
        """Of `step` updates. last: returns when it is on the disk."""
        self.wait()
        self.step, self.last, tensors = step, last, named_tensors(model, optimizers)
        self.n_bytes = sum(tensor.nbytes for part in tensors for tensor in part.values())
        try:
            self.run.sync()  # a checkpoint must not be ahead of metrics.jsonl
            if self.thread:
                copies = self.memory.result()
                self.copied = machine.copy_aside(
                    [(copy[name], part[name]) for copy, part in zip(copies, tensors, strict=True) for name in part])
                self.in_hand = self.thread.submit(self.write, step, copies, state)
            else:
                save(self.run.path, step, *tensors, state, self.keep_last)
                self.n_failed = 0
        except OSError as error:
            self.failed(error)
        if last:
            self.wait()

    def before_update(self, *_):
        """The device, not the host, waits for the copy."""
        if self.copied:
            torch.cuda.current_stream().wait_event(self.copied)

    def write(self, step: int, copies: list[dict], state: dict):
        """In the thread."""
        if self.copied:
            self.copied.synchronize()
        save(self.run.path, step, *copies, state, self.keep_last)

    def wait(self):
        """For the save in hand."""
        in_hand, self.in_hand = self.in_hand, None
        try:
            if in_hand:
                in_hand.result()
                self.n_failed = 0
        except OSError as error:
            self.failed(error)

    def failed(self, error: OSError):
        self.n_failed += 1
        if self.last or self.n_failed == MOST_FAILED_SAVES:
            raise CannotWrite(self.not_saved(error)) from error
        self.say(f"warning: {self.not_saved(error)}, trying again at the next save", file=sys.stderr)

    def not_saved(self, error: BaseException) -> str:
        return f"{cannot_write(self.run.path, error)}; step {self.step} is not saved, {self.n_bytes:,} bytes"

    def in_progress(self) -> bool:
        """Whether a save is being written, beside the training."""
        return self.in_hand is not None and not self.in_hand.done()

    def close(self):
        """Returns when the save in hand is done or has failed, which is a warning: the run has its end already."""
        if self.thread:
            self.thread.shutdown()
        if self.in_hand and (error := self.in_hand.exception()):
            self.say(f"warning: {self.not_saved(error)}", file=sys.stderr)


def keep_for_replay(run_directory: Path, step: int, model: torch.nn.Module, optimizers: list, state: dict, say=print):
    """A checkpoint for replay.py in place of an earlier one; where it cannot be written a warning must do."""
    place = run_directory / NOT_FINITE
    try:
        shutil.rmtree(place, ignore_errors=True)
        save(place, step, *named_tensors(model, optimizers), state, keep_last=1)
    except OSError as error:
        say(f"warning: {cannot_write(place, error)}: replay.py has no weights", file=sys.stderr)


def host_memory(layout: dict) -> dict:
    """A tensor for each, in memory from which and to which a GPU copies beside what else it does."""
    on_cuda = torch.cuda.is_available()
    return {name: torch.empty(shape, dtype=dtype, pin_memory=on_cuda) for name, (dtype, shape) in layout.items()}


def layouts(model: torch.nn.Module, optimizers: list) -> tuple[dict, dict]:
    """Dtype and shape of what `named_tensors` gives after an update, by name."""
    weights = {name: (weight.dtype, weight.shape) for name, weight in model.named_parameters()}
    moments = {name: (torch.float32, () if key == "step" else weight.shape)
               for name, key, weight, _ in named_moments(model, optimizers)}
    return weights, moments


def named_moments(model: torch.nn.Module, optimizers: list):
    """(Name as in `named_tensors`, key, weight, optimizer) of all that the optimizers keep after an update."""
    names = {weight: name for name, weight in model.named_parameters()}
    for optimizer in optimizers:
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            for key in STATE[type(optimizer).__name__]:
                yield f"{names[weight]}/{key}", key, weight, optimizer


def safetensors_parts(tensors: dict[str, torch.Tensor]):
    """
    The bytes of a safetensors file, a tensor at a time: safetensors' own `save_file` hashes nothing, and reading the
    file again to do so takes as long as writing it. https://github.com/huggingface/safetensors#format
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # each at a multiple of its itemsize
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def tidy(run_directory: Path, step: int):
    """
    Before a run goes on after `step` updates: renames the checkpoints after it, which were found invalid, so that they
    neither count nor stand in the way, and removes what a killed process was writing. Raises CannotWrite.
    """
    with writing(run_directory):
        for pattern in ".saving-*", ".removing-*", ".*.tmp":
            for unfinished in run_directory.glob(pattern):
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        for checkpoint in list_checkpoints(run_directory):
            if step_of(checkpoint) > step:
                invalid = run_directory / f"invalid-{checkpoint.name}"
                shutil.rmtree(invalid, ignore_errors=True)
                checkpoint.rename(invalid)


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


# -----------------------------------------------------------------------------
# read


def list_checkpoints(run_directory: Path) -> list[Path]:
    """All checkpoint directories, newest first, valid or not; copies and links under other names do not count."""
    names = (path for path in run_directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted((path for path in names if path.is_dir() and not path.is_symlink()), key=step_of, reverse=True)


def find_fault(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be trusted, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name in FILES:
            size = (checkpoint / name).stat().st_size
            if size != manifest[name]["bytes"]:
                return f"{name} has {size} bytes instead of {manifest[name]['bytes']!r}"
            if sha256(checkpoint / name) != manifest[name]["sha256"]:
                return f"{name} does not have the sha256 of the manifest"
            if name.endswith(".safetensors"):
                safe_open(checkpoint / name, framework="pt")  # a manifest may fit a file of another kind
        if directory_name(read_state(checkpoint)["step"]) != checkpoint.name:
            return "state.json is of another step"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except SafetensorError as error:
        return f"{name} is not in the format of safetensors ({error})"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"manifest.json or state.json is damaged ({type(error).__name__}: {error})"
    return None


def newest_valid(run_directory: Path, say=print) -> Path | None:
    """The newest checkpoint whose manifest verifies; None if there is none at all. Says what it skips."""
    faults = []
    for checkpoint in list_checkpoints(run_directory):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        faults.append(f"{checkpoint.name}: {fault}")
        say(f"skipping {checkpoint}: {fault}")
    for path in sorted((*run_directory.glob("step-*"), *run_directory.glob("invalid-step-*"))):
        if re.fullmatch(r"(invalid-)?step-\d{8,}", path.name) and not any(path.name in fault for fault in faults):
            faults.append(f"{path.name}: " + ("set aside before" if path.name[0] == "i" else "is no directory"))
    if faults:
        raise NoValidCheckpoint(f"no valid checkpoint in {run_directory} ({'; '.join(faults)})")
    return None


def find(run: str, out_dir: str = "runs") -> Path:
    """The newest valid checkpoint of a run, given by its name under out_dir or by the path of its directory."""
    run_directory = directory_of(run, out_dir)
    if run_directory and (newest := newest_valid(run_directory)):
        return newest
    known = sorted({path.parent.name for path in Path(out_dir).glob("*/step-*")})
    raise BadOption(f"no run {run!r} with a checkpoint. In {out_dir}: {', '.join(known) or 'none'}")


def read_state(checkpoint: Path) -> dict:
    """state.json: the step, and what `save` was given."""
    return json.loads((checkpoint / "state.json").read_text())


@contextmanager
def of_this_version(checkpoint: Path):
    """Raises NoValidCheckpoint for what is not in its state.json, or is of another type or out of range."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise NoValidCheckpoint(f"{checkpoint / 'state.json'} was written by another version ({error})") from error


def weights_sha256(checkpoint: Path) -> str:
    return json.loads((checkpoint / "manifest.json").read_text())["model.safetensors"]["sha256"]


def has_layout(path: Path, layout: dict) -> bool:
    """Whether a safetensors file has what `layouts` says, and nothing else."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    return found == {name: (DTYPES[dtype], list(shape)) for name, (dtype, shape) in layout.items()}


def check_weights(checkpoint: Path, model: torch.nn.Module):
    """Raises BadOption unless the checkpoint holds the parameters of this model."""
    if not has_layout(checkpoint / "model.safetensors", layouts(model, [])[0]):
        raise BadOption(f"{checkpoint} holds the weights of another model")


def load_weights(checkpoint: Path, model: torch.nn.Module):
    """Into the model, on whatever device it is. Raises BadOption if it is another model."""
    check_weights(checkpoint, model)
    tensors = load_file(checkpoint / "model.safetensors")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[name])


def load_optimizers(checkpoint: Path, model: torch.nn.Module, optimizers: list):
    """As saved, bit for bit, each to its weight's device. Raises BadOption if it is the state of others."""
    if not has_layout(checkpoint / "optim.safetensors", layouts(model, optimizers)[1]):
        raise BadOption(f"{checkpoint} holds the state of another optimizer")
    saved = load_file(checkpoint / "optim.safetensors")
    for name, key, weight, optimizer in named_moments(model, optimizers):
        optimizer.state[weight][key] = saved[name].to(weight.device)


def load_model(checkpoint: Path, device="cpu") -> GPT:
    """The model of a checkpoint directory, which alone is enough: state.json holds its config."""
    with of_this_version(checkpoint):
        config = restored(GPTConfig, read_state(checkpoint)["model_config"])
    model = GPT(config).to(device)
    load_weights(checkpoint, model)
    return model
