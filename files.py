"""Files that are written whole or not at all."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

MOST_AT_ONCE = 2**30  # bytes in a write; Linux takes 2^31 - 4096


def for_json(value):
    """The same with null for what JSON has no word for, nan and infinity, inside of objects and lists too."""
    if isinstance(value, dict):
        return {str(key): for_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [for_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: dict) -> None:
    """`write_text` of a JSON object."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """
    Replaces the file in one step: a reader sees the old one or the new one, on return the new one even if the power
    goes. Raises OSError.
    """
    names = {"prefix": f".{path.name}.", "suffix": ".tmp"}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, **names) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    fsync(path.parent)


def read_text(path: Path) -> str:
    """The file's text, with marks for what is not UTF-8; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def write_hashed(path: Path, parts: Iterable) -> dict:
    """
    A new file of these bytes, or what has them, that is on the disk on return; {"bytes", "sha256"} of what was to be
    written, hashed by a thread beside: either takes a second for some GB. Raises OSError.
    """
    digest, n_bytes = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        for part in parts:
            data = memoryview(part).cast("B")
            hashed = beside.submit(digest.update, data)
            write_all(file, data)
            n_bytes += len(data)
        os.fsync(file.fileno())
        hashed.result()
    return {"bytes": n_bytes, "sha256": digest.hexdigest()}


def write_all(file, data) -> None:
    """Into a file without a buffer, which may take a part at a time. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[file.write(left[:MOST_AT_ONCE]):]


def fsync(path: Path) -> None:
    """Waits until the file, or the names in the directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex sha256 of a file, with a bar where that takes longer than a second. Raises OSError."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with (open(path, "rb", buffering=0) as file,
          tqdm(total=size, desc=f"checking {path}", unit="B", unit_scale=True, delay=1, leave=False) as bar):
        while part := file.read(2**24):
            digest.update(part)
            bar.update(len(part))
    return digest.hexdigest()
