"""
Train a GPT-2 variant.

    python train_gpt2.py --model d12_post_norm_qk_norm
    torchrun --standalone --nproc_per_node 8 train_gpt2.py --model d12 --recipe fineweb124M

Any field of TrainConfig (configs/recipes.py) and GPTConfig (model.py) is an option. An option beats the recipe, a
recipe beats the default.

Exit codes: 0 done, 1 out of memory or a bug, 2 bad option or config, data changed since the run began, or a slow path
refused (kernels/compiling.py), 3 run directory in use, 4 checkpoints present but none valid, 5 cannot write, 6 loss or
gradient not finite, 7 missing, empty or invalid data, 8 another process is gone or hangs, 75 stopped by a signal and
resumable, 130 second Ctrl-C.
"""

import math
import os
import shlex
import statistics
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import finite
import machine
import processes
import rundir
from configs.recipes import TrainConfig, recipe, result_settings, run_name
from configs.variants import VARIANTS, model_name, variant
from costs.measure import block_mask_cost
from costs.memory import largest_batch_size, memory_advice, peak_parts
from data.loader import micro_batch, open_data, to_device, train_order
from data.tokenizer import token_bytes
from eval import evaluate
from kernels.attention import KERNEL_NAMES
from kernels.compiling import SlowPath, compiles
from model import GPT, OWN_ATTENTION, GPTConfig
from optim import make_optimizers, rehearse_update, set_learning_rate, update

RANK, WORLD_SIZE = processes.rank_and_world_size()

# -----------------------------------------------------------------------------
# options


@dataclass(frozen=True)
class Options:
    """Everything on the command line."""

    train: TrainConfig
    gpt: GPTConfig
    list: tyro.conf.FlagCreatePairsOff[bool] = False
    """print the variants with their numbers of parameters, and stop"""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """print the plan of the run, and stop"""


@dataclass(frozen=True)
class Choice:
    """What sets the defaults of everything else."""

    model: str = ""
    recipe: str | None = None
    device: str = TrainConfig.device


def parse_options(arguments: list[str] | None) -> tuple[Options, torch.device]:
    """Two passes: the model and the recipe are read first and choose the defaults. ValueError for a bad value."""
    style = {"use_underscores": True, "config": (tyro.conf.OmitArgPrefixes,)}
    choice, _ = tyro.cli(Choice, args=arguments, return_unknown_args=True, add_help=False, **style)
    device = machine.select_device(choice.device)
    defaults = recipe(choice.recipe or ("default" if device.type == "cuda" else "cpu"))
    model = choice.model or defaults.model
    defaults = Options(replace(defaults, model=model, device=choice.device), variant(model))
    options = tyro.cli(Options, args=arguments, default=defaults, description=__doc__.strip(), **style)
    variant(options.train.model)  # an empty one is none
    return options, device


def plan(config: TrainConfig, gpt_config: GPTConfig, device: torch.device,
         runs_beside: int = 0) -> tuple[TrainConfig, int, int]:
    """
    (The config with the kernels chosen, on CUDA; sequences per process and micro-step; micro-steps per update).
    ValueError where they do not divide, or no kernel can serve. runs_beside: how many others share the memory.
    """
    with torch.device("meta"):
        model = GPT(gpt_config, config.window_backend, config.kernels, config.recompute_gelu)
    T, window_size = config.sequence_length, gpt_config.window_size
    if window_size is not None and window_size > T:
        raise ValueError(f"window_size={window_size} is more than sequence_length={T}")
    for name, has_use, where in (
            ("muon_learning_rate", config.optimizer == "muon", f"with --optimizer {config.optimizer}"),
            ("embedding_learning_rate", gpt_config.untie, "without --untie: the embedding is the head too")):
        value = getattr(config, name)
        if not has_use and value not in (None, getattr(recipe(config.recipe), name)):  # a recipe's own is left out
            raise ValueError(f"{name}={value} has no use {where}")
    dtype = machine.matmul_dtype(device, config.dtype)
    *_, kernels = model.choose_kernels(T, device, dtype)
    if device.type == "cuda":  # else the memory that is predicted is that of a GPU
        config = replace(config, kernels=kernels)
        hint = " (an edit of apply_rotary, rotate, mlp, softcap or cross_entropy in model.py needs --kernels plain)"
        print0(f"kernels: {kernels}" + hint * (kernels == "fused"))

    changeable = ("data", "init_weights", *result_settings(config, gpt_config))
    if unknown := set(config.allow_change) - set(changeable):
        raise ValueError(f"allow_change: {', '.join(sorted(unknown))} is none of {', '.join(changeable)}")
    processes.check_variables(RANK, WORLD_SIZE)
    sequences, rest = divmod(config.total_batch_tokens // T, WORLD_SIZE)  # of each process
    if sequences == 0:
        raise ValueError(f"total_batch_tokens={config.total_batch_tokens} is less than one sequence for each of "
                         f"{WORLD_SIZE} processes: use at least {T * WORLD_SIZE}")
    batch_size = config.batch_size
    if batch_size == "auto":
        most = sequences if device.type == "cuda" else 8
        room_mib = 0.95 * machine.total_mib(device) / (1 + runs_beside)
        if dtype == torch.float32:  # the prediction is for 16 bits
            room_mib /= 2
        batch_size = largest_batch_size(config, gpt_config, sequences, WORLD_SIZE, most, room_mib)
    if rest or sequences % batch_size:
        raise ValueError(f"total_batch_tokens={config.total_batch_tokens} does not divide by sequence_length={T} x "
                         f"batch_size={batch_size} x {WORLD_SIZE} processes")
    if config.recipe == "cpu":
        print0("recipe cpu: a few short steps, for machines without an NVIDIA GPU")
    print0(f"model {model_name(gpt_config)}: {model.num_params():,} parameters, "
           f"{model.flops_per_token(T):,} FLOPs per token")
    print0(f"update: {config.total_batch_tokens:,} tokens = {WORLD_SIZE} processes x {sequences // batch_size} "
           f"micro-steps x {batch_size} sequences x {T} tokens")
    shares = sequences // batch_size * WORLD_SIZE
    parts = peak_parts(config, gpt_config, batch_size, shares)
    print0(f"predicted peak on a GPU, compiled, in bfloat16: {sum(parts.values()):,.0f} MiB ("
           + ", ".join(f"{name} {mib:,.0f}" for name, mib in parts.items()) + ")")
    if config.batch_size == "auto" and sum(parts.values()) >= room_mib:
        print0("warning: not even one sequence at a time is predicted to fit: "
               f"{memory_advice(config, gpt_config, batch_size, shares)}")
    return config, batch_size, sequences // batch_size


def print0(*words, file=None):
    """Prints on the first process, above a progress bar if there is one."""
    if RANK == 0:
        text = " ".join(str(word) for word in words).encode(errors="backslashreplace").decode()  # paths are bytes
        try:
            tqdm.write(text, file=file)
            (file or sys.stdout).flush()
        except OSError:  # a closed pipe must not end a run, here or where tqdm flushes stdout
            sys.stdout = open(os.devnull, "w")


# -----------------------------------------------------------------------------
# set-up


def begun_with(settings: dict) -> dict:
    """The settings a run was begun with, as it kept them; an option that its version did not have is as by default."""
    return result_settings(TrainConfig(), GPTConfig()) | settings


def find_start(config: TrainConfig, settings: dict, run: rundir.RunDir) -> int:
    """
    Updates already done: of the newest valid checkpoint, 0 for a new run, max_steps for one that is finished but has
    no checkpoints. BadOption if the run was begun with other settings.
    """
    newest = checkpoint.newest_valid(run.path, print0)
    finished = rundir.read_json(run.path / "status.json").get("reason") == "finished"
    if newest is None and not finished and not rundir.has_lines(run.path / "metrics.jsonl"):
        return 0
    if config.resume == "never":
        raise rundir.BadOption(f"{run.path} has a run in it and --resume is never: choose another --run_name")
    begun = checkpoint.read_state(newest) if newest else rundir.read_json(run.path / "config.json")
    if not isinstance(begun.get("settings"), dict):
        raise rundir.BadOption(f"{run.path} does not say with which settings it was begun: choose another --run_name")
    earlier = begun_with(begun["settings"])
    for name, value in settings.items():
        before = earlier.get(name)
        if before != value and name not in config.allow_change:
            raise rundir.BadOption(f"{run.path} was begun with {name}={before!r}, now it is {value!r}: choose another "
                                   f"--run_name, the old value, or --allow_change {name}")
        if before != value:
            print0(f"changed: {name}={before!r}, from now on {value!r}")
    if newest is None and not finished:
        print0(f"{run.path} was begun before and has no checkpoint: starting again at step 0")
        return 0
    if newest is None and earlier["max_steps"] != config.max_steps:
        raise rundir.BadOption(f"{run.path} is finished and has no checkpoint to go on from: choose another --run_name")
    return begun["step"] if newest else config.max_steps


# -----------------------------------------------------------------------------
# training


def train(config: TrainConfig, gpt_config: GPTConfig, device: torch.device, batch_size: int, accumulation: int,
          run: rundir.RunDir, others: processes.Others) -> tuple[str, int]:
    """The whole run. Returns why it ended and the exit code; the reason is "" if there was nothing to do."""
    T, compiled = config.sequence_length, compiles(config.compile, device)
    stop = rundir.StopSignal(distributed=WORLD_SIZE > 1)

    # --- data, then the run directory: nothing is written before the data is known to be good ---
    rundir.check_writable(run.path)
    dataset, train_windows, val_windows = open_data(config.data, T, gpt_config.vocab_size, config.verify_data)
    dtype = machine.matmul_dtype(device, config.dtype)
    settings = result_settings(config, gpt_config) | {"data": dataset.fingerprint, "dtype": str(dtype)}
    weights_from = None
    if config.init_from is not None and not checkpoint.list_checkpoints(run.path):
        weights_from = checkpoint.find(config.init_from, config.out_dir)
        settings["init_weights"] = checkpoint.weights_sha256(weights_from)
        with torch.device("meta"):
            checkpoint.check_weights(weights_from, GPT(gpt_config))

    def evaluation_due(step: int) -> bool:
        return config.val_every > 0 and (step % config.val_every == 0 or step == config.max_steps)

    answer = torch.tensor([-1, 0])
    try:  # the first process looks where to start, and all get its answer
        if RANK == 0:
            run.open()
            start = answer[0] = find_start(config, settings, run)
            answer[1] = start > 0 and evaluation_due(start) and run.lacks_evaluation(start)
    finally:
        if WORLD_SIZE > 1:
            dist.broadcast(answer, 0, group=others.hosts)
    start, lacks_evaluation = answer.tolist()
    if start < 0:
        raise rundir.BadOption("the first process cannot start")
    last_step = min(config.max_steps, config.stop_after or config.max_steps)
    if start >= last_step and not lacks_evaluation:
        print0(f"{run.path}: {'finished' if start == config.max_steps else 'stopped'} at step {start}")
        if RANK == 0 and not run.ended_well():  # a process was killed after the last save
            checkpoint.tidy(run.path, start)
            run.open_metrics(start)
            run.begun = True
            return "finished" if start == config.max_steps else "stop_after", rundir.DONE
        return "", rundir.DONE
    described = {"settings": settings, "model_config": asdict(gpt_config), "train_config": asdict(config),
                 "batch_size": batch_size, "processes": WORLD_SIZE, "tokenizer": dataset.tokenizer,
                 "shards": dataset.hashes, "versions": machine.versions(device),
                 "environment": machine.environment(device)}
    if RANK == 0:
        run.begin(described, start)
        checkpoint.tidy(run.path, start)

    # --- model and optimizer, new or as saved ---
    model = GPT(gpt_config, config.window_backend, config.kernels, config.recompute_gelu, config.seed).to(device)
    optimizers = make_optimizers(model, config, compiled)
    if start > 0:
        saved = run.path / checkpoint.directory_name(start)
        checkpoint.load_weights(saved, model)
        if begun_with(checkpoint.read_state(saved)["settings"])["optimizer"] == config.optimizer:
            checkpoint.load_optimizers(saved, model, optimizers)  # else --allow_change: it begins anew
        print0(f"resuming from {saved}")
    elif weights_from is not None:
        checkpoint.load_weights(weights_from, model)
    if compiled:
        model.compile()
    beside = RANK == 0 and config.save_every > 0 and machine.runs_behind(device)
    run.saver = checkpoint.Saver(run, config.keep_last, model, optimizers, beside, print0)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD_SIZE > 1 else model
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def forward_backward(inputs, targets, synchronize: bool):
        """Adds this micro-step's share to the gradients; DDP averages them over the processes if `synchronize`."""
        with nullcontext() if synchronize or WORLD_SIZE == 1 else ddp.no_sync():
            with autocast:
                _, loss = ddp(inputs, targets)
            (loss / accumulation).backward()
        return loss.detach() / accumulation

    # --- batches from update `start` on ---
    def windows(step: int, rank: int, micro_step: int):
        order = train_order(len(train_windows), config.seed, step, config.total_batch_tokens // T)
        return micro_batch(order, micro_step, batch_size, rank, WORLD_SIZE)

    def read_batches(start: int):
        for step in range(start, sys.maxsize):
            for micro_step in range(accumulation):
                yield to_device(train_windows.read(windows(step, RANK, micro_step)), device)

    batches = read_batches(start)
    inputs, targets = next(batches)
    text_bytes = torch.from_numpy(token_bytes()) if dataset.tokenizer == "gpt2" else None
    n_val = min(config.val_tokens // T, len(val_windows))
    n_val_total = len(val_windows) * T
    if config.val_every:
        too_many = f" (val_tokens={config.val_tokens:,} is more than there are)" * (config.val_tokens > n_val_total)
        print0(f"validation: the first {n_val * T:,} of {n_val_total:,} targets of {dataset.directory}{too_many}")

    # --- one rehearsal, thrown away: it compiles, and shows which attention kernels really run ---
    window_backend, sdpa, kernels = model.choose_kernels(T, device, dtype)

    def rehearse():  # DDP puts its buckets in order after the first sum, and sums over more than two depend on that
        forward_backward(inputs, targets, synchronize=True)
        if unused := [name for name, weight in model.named_parameters() if weight.grad is None]:
            raise rundir.BadOption(f"no gradient reaches {', '.join(unused)}: a checkpoint could not be resumed")
        rehearse_update(optimizers)
        model.zero_grad(set_to_none=True)

    print0("compiling, up to half a minute" if compiled else "rehearsing one step")
    if device.type == "cuda":
        if window_backend == "flex":
            kept_mib, _, ms = block_mask_cost(T, gpt_config.window_size, device)
            print0(f"block mask T={T} W={gpt_config.window_size}: +{kept_mib:.2f} MiB, {ms:.0f} ms")
        rehearse()
    attention = machine.attention_kernels(rehearse, device)
    print0("attention kernels:", attention)
    expected = ", ".join(sorted({KERNEL_NAMES[kernel] for kernel in (window_backend, sdpa) if kernel in KERNEL_NAMES}))
    own = all(type(block.attn).attend in OWN_ATTENTION for block in model.transformer.h)  # others may run in any kernel
    if expected and own and attention != expected:
        raise SlowPath(f"attention ran in {attention}, not in {expected}")
    machine.reset_peak(device)
    described |= {"val_targets": n_val * T, "kernels": {"attention": attention, "window_backend": window_backend,
                  "parts": kernels, "compiled": compiled, "dtype": str(dtype).removeprefix("torch.")}}
    if RANK == 0:
        run.describe(described, start)

    # --- evaluation: every so often, or now, if a signal cut short the one of the step that was saved ---
    def interrupted() -> bool:
        return others.anywhere(stop.received is not None)

    def evaluation(step: int) -> dict:
        """As `evaluate`. Where nothing is saved the last one is not cut short, since no start could make up for it."""
        stops = interrupted if config.save_every or step < last_step else lambda: False
        found = evaluate(model, val_windows, n_val, batch_size, autocast, device, text_bytes, others, stops)
        if found:
            print0(f"step {step}: val loss {found['val_loss']:.4f}, "
                   f"bits per byte {found['bits_per_byte'] or math.nan:.4f}")
        return found

    time_s = run.open_metrics(start) if RANK == 0 else 0.0
    tokens_before = run.last_row.get("tokens", start * config.total_batch_tokens)
    if start and evaluation_due(start) and others.anywhere(RANK == 0 and "val_loss" not in run.last_row):
        found = evaluation(start)
        if not found:
            return stop.received or "SIGTERM", rundir.STOPPED
        if RANK == 0:
            run.amend(found)

    # --- the loop ---
    peak_flops = machine.peak_flops(machine.device_name(device)) if dtype == torch.bfloat16 else None
    flops_per_update = model.flops_per_token(T) * config.total_batch_tokens
    if config.wandb and RANK == 0:
        run.mirror = rundir.WandbMirror(project="gpt2-variants", name=run.path.name, dir=run.path, config=described)
    bar = tqdm(total=config.max_steps, initial=start, unit="step", disable=RANK != 0)
    clock, times, launched = time.perf_counter(), [], []  # times: s, of each step
    step, stopping, cut_short = start, False, False

    def not_finite(step: int, what: str) -> rundir.NotFinite:
        """The error, with where it begins. No update since has changed the weights, which are kept for replay.py."""
        batches, forward = islice(read_batches(step - 1), accumulation), partial(forward_backward, synchronize=False)
        where = finite.explain(model, forward, batches, partial(windows, step - 1))
        if RANK == 0:
            checkpoint.keep_for_replay(run.path, step - 1, model, optimizers, described, print0)
        others.anywhere(False)  # none ends before they are kept
        return rundir.NotFinite(f"step {step}: {what}; {where}; python replay.py --run {run.path.name}")

    def finish(step: int, lr: float, read_report) -> dict:
        """The row of a launched step, when the device is done with it; advances the clock. Raises NotFinite."""
        nonlocal clock, time_s
        (loss, grad_norm), now = read_report(), time.perf_counter()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise not_finite(step, f"loss {loss}, gradient norm {grad_norm}")
        step_s, clock = now - clock, now
        times.append(step_s)
        time_s += step_s
        tokens = tokens_before + (step - start) * config.total_batch_tokens
        return {
            "step": step, "tokens": tokens, "time_s": time_s, "loss": loss, "lr": lr,
            "grad_norm": grad_norm, "step_ms": step_s * 1000, "tokens_per_s": config.total_batch_tokens / step_s,
            "mfu": flops_per_update / step_s / (peak_flops * WORLD_SIZE) if peak_flops else None,
            "peak_mib": machine.peak_mib(device),
        }

    def saved() -> bool:
        """Whether the last save is on the disk; waits for it."""
        if RANK == 0:
            run.saver.wait()
        return not others.anywhere(run.saver.n_failed > 0)

    for step in range(start + 1, last_step + 1):
        # --- forward, backward and update, without waiting for the device ---
        loss = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            loss += forward_backward(inputs, targets, synchronize=micro_step == accumulation - 1) / WORLD_SIZE
            inputs, targets = next(batches)
        lr = set_learning_rate(optimizers, config, step - 1)
        launched.append((step, lr, machine.read_later(update(model, optimizers, loss, config.grad_clip))))
        stopping = interrupted()

        # --- log what is done: all, or on a GPU all but this step; with an evaluation if it is due ---
        ending = stopping or step == last_step
        val_due = evaluation_due(step)
        save_due = config.save_every and (step % config.save_every == 0 or ending)
        wait = val_due or save_due or ending or not machine.runs_behind(device)
        while len(launched) > (0 if wait else 1):
            row = finish(*launched.pop(0))
            if val_due and row["step"] == step:
                row |= evaluation(step)
                if "val_loss" not in row:
                    stopping = ending = cut_short = True
                    save_due = config.save_every
            if RANK == 0:
                run.log(row)
                bar.set_postfix_str(rundir.progress(row), refresh=False)
                bar.update()

        # --- save; where a signal finds a save in hand it is the last one, and the steps since then are done again ---
        if stopping and others.anywhere(run.saver.in_progress()) and saved():
            if RANK == 0:
                run.open_metrics(run.saver.step)
            cut_short = True
            break
        if save_due:
            weights, moments = checkpoint.named_tensors(model, optimizers)
            name = finite.first_not_finite(weights | moments)
            if others.anywhere(name is not None):
                raise not_finite(step + 1, f"{name or 'a weight'} is not finite after step {step}")
        if save_due and RANK == 0:
            run.saver.save(step, model, optimizers, described, last=ending)
        if save_due and not ending:
            save_failed = others.anywhere(run.saver.n_failed > 0)  # all wait here, so a signal during the save is seen
            stopping = not save_failed and interrupted() and saved()
        if stopping:
            break
        if save_due or val_due:
            clock = time.perf_counter()  # what they took is not training time
    bar.close()
    if RANK == 0:
        with rundir.writing(run.path):
            run.sync()
    if times:
        step_s = statistics.median(times)
        print0(f"median of {len(times)} steps: {1000 * step_s:.1f} ms, "
               f"{config.total_batch_tokens / step_s:,.0f} tokens/s")
    if step == config.max_steps and not cut_short:
        return "finished", rundir.DONE
    if stopping:
        return stop.received or "SIGTERM", rundir.STOPPED  # None: another process got it
    return "stop_after", rundir.DONE


def print_variants():
    width = max(map(len, VARIANTS))
    for name, gpt_config in VARIANTS.items():
        with torch.device("meta"):
            print0(f"{name:{width}} {GPT(gpt_config).num_params():>13,} parameters")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    processes.end_with_torchrun()
    try:
        options, device = parse_options(arguments)
        config, gpt_config = options.train, options.gpt
        if options.list:
            print_variants()
            return rundir.DONE
        if config.deterministic:
            machine.make_deterministic()
        run = rundir.RunDir(Path(config.out_dir) / run_name(config, model_name(gpt_config)))
        if WORLD_SIZE == 1 and not options.dry_run:  # before a model is built; several processes end in `train`
            rundir.check_writable(run.path)
        config, batch_size, accumulation = plan(config, gpt_config, device)
    except (ValueError, rundir.CannotWrite) as error:
        print0(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", rundir.BAD_OPTION)
    print0(f"run: {run.path} on {WORLD_SIZE} x {machine.device_name(device)}")
    if options.dry_run:
        return rundir.DONE

    others = processes.Others(RANK, WORLD_SIZE, device.type == "cuda", config.hang_timeout_s, run.note_end)
    try:
        reason, code = train(config, gpt_config, device, batch_size, accumulation, run, others)
    except Exception as error:
        error = others.explain(error)
        reason, code = str(error) or type(error).__name__, getattr(error, "exit_code", 1)
        if machine.is_out_of_memory(error):
            advice = memory_advice(config, gpt_config, batch_size, accumulation * WORLD_SIZE)
            reason = f"out of memory: {advice} ({reason.splitlines()[0]})"
        elif code == 1:
            traceback.print_exception(error)
    good = code in (rundir.DONE, rundir.STOPPED)
    others.end(reason, code, failed=not good)
    try:
        if reason:
            run.close(reason, code)
    except rundir.CannotWrite as error:
        if good:  # else it is said below
            print0(f"warning: status.json is missing, {error}", file=sys.stderr)
    if code == rundir.STOPPED:
        print0(f"{reason}: stopped after step {run.step}" + "; the same command continues" * (config.save_every > 0))
    elif code != rundir.DONE:
        print(f"error: {reason}" if RANK == 0 else f"process {RANK}: error: {reason}", file=sys.stderr)
    elif RANK == 0 and checkpoint.list_checkpoints(run.path):
        name = shlex.quote(run.path.name if config.out_dir == "runs" else str(run.path))
        print0(f"sample from it: python sample.py --run {name}")
    if good:
        others.meet()
    return code


if __name__ == "__main__":
    rundir.leave(main())
