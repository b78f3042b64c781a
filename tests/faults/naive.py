"""
How checkpoints are often written and read: in place, without fsync, one at a time; and the newest is believed. And how
data is often read: mapped into memory. Without a lock.
"""

import fcntl
import shutil

import numpy as np

import checkpoint
import rundir
from checkpoint import directory_name, json_bytes, list_checkpoints, safetensors_parts
from data import shards
from data.shards import HEADER_BYTES, Shard


def save(run_directory, step, weights, moments, state, keep_last):
    """As checkpoint.save, but what is there goes before the new one is complete."""
    for old in list_checkpoints(run_directory):
        shutil.rmtree(old)
    target = run_directory / directory_name(step)
    target.mkdir()
    for name, parts in (("state.json", [json_bytes({"step": step, **state})]),
                        ("model.safetensors", safetensors_parts(weights)),
                        ("optim.safetensors", safetensors_parts(moments))):
        with open(target / name, "wb", buffering=0) as file:
            for part in parts:
                file.write(memoryview(part).cast("B"))
    return target


def read(shard, start, count):
    """As Shard.read."""
    if not hasattr(shard, "tokens"):
        shard.tokens = np.memmap(shard.path, "<u2", "r", HEADER_BYTES)
    return np.array(shard.tokens[start:start + count])


def install():
    """In a process that is thrown away."""
    checkpoint.save, checkpoint.find_fault, Shard.read = save, lambda directory: None, read
    fcntl.flock = rundir.check_writable = lambda *arguments: None


def begin_anew():
    """Where no checkpoint is good, there is none."""
    find_fault = checkpoint.find_fault
    checkpoint.newest_valid = lambda run_directory, say=print: next(
        (path for path in list_checkpoints(run_directory) if find_fault(path) is None), None)


def believe_data():
    """What the shards hold is what the manifest says."""
    shards.check_contents = lambda directory, found, verify, listed: listed
