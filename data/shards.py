"""Token shards: the .bin format, the manifest of a data set, and the checks before a run trusts one.

A shard is a file of llm.c and modded-nanogpt: 256 little-endian int32 (magic 20240520, version 1, number of tokens,
then zeros), then that many little-endian uint16 token ids. A data set is a directory of shards, each `train` or `val`
by its name (`train_000000.bin`, `fineweb_val_000000.bin`), with manifest.json; data/README.md describes its fields.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.tokenizer import EOT, token_bytes
from files import fsync, write_json
from rundir import CANNOT_WRITE, INTERRUPTED, DataError

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
TOKEN = np.dtype("<u2")  # the format is little-endian on every machine
SCAN_TOKENS = 1 << 22  # tokens read at once when a whole shard is checked
SPLITS = ("train", "val")
MANIFEST_FORMAT = 1
MANIFEST_FIELDS = {"tokenizer": str | None, "vocab_size": int, "source": str | None, "licence": str | None}
VERIFIED_FIELDS = {"size": int, "mtime_ns": int, "bytes": int | None, "sha256": str, "max_token": int}
SHARD_NAME = r"(?!\.).*(train|val).*_.*\.bin"
SHARD_FIELDS = {"split": str, "file": str, "tokens": int, "bytes": int | None, "sha256": str, "max_token": int}


# ---------------------------------------------------------------------------------------------------------------------
# One shard


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write `tokens`, a vector of integer ids below 65,536, to `path` and flush them to disk."""
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 1 << 16:
        raise DataError(f"{path}: token ids from {tokens.min()} to {tokens.max()}; a shard holds ids from 0 to 65535")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(TOKEN).tobytes())
        file.flush()
        os.fsync(file.fileno())


class Shard:
    """One .bin file, open for reading. Raises DataError if its header or its size is wrong.

    path: the file;   header: its first 1,024 bytes;   n_tokens: tokens in it
    size (bytes), mtime_ns: those of the file when it was opened
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: not a regular file")
        try:
            self._file = open(path, "rb", buffering=0)
            self.header = os.pread(self._file.fileno(), HEADER_BYTES, 0)
            status = os.fstat(self._file.fileno())
        except OSError as error:
            raise DataError(f"{path}: cannot read: {error.strerror}") from None
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
        if len(self.header) < HEADER_BYTES:
            raise DataError(f"{path}: {self.size} bytes; a shard starts with a header of {HEADER_BYTES} bytes")
        magic, version, self.n_tokens = (int(field) for field in np.frombuffer(self.header, dtype="<i4")[:3])
        if magic != MAGIC:
            raise DataError(f"{path}: magic number {magic}, expected {MAGIC}: not a token shard")
        if version != VERSION:
            raise DataError(f"{path}: format version {version}, expected {VERSION}")
        if self.n_tokens < 1:
            raise DataError(f"{path}: empty: the header counts {self.n_tokens} tokens")
        expected = HEADER_BYTES + self.n_tokens * TOKEN.itemsize
        if self.size != expected:
            raise DataError(f"{path}: {self.size} bytes, but a shard of {self.n_tokens} tokens has {expected}")

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as uint16 (count,). Raises DataError if the file has changed under us."""
        assert 0 <= start <= start + count <= self.n_tokens, f"[{start}, {start + count}) of {self.n_tokens} tokens"
        n_bytes = count * TOKEN.itemsize
        try:  # pread and not mmap: a mapped file that shrinks kills the process
            data = os.pread(self._file.fileno(), n_bytes, HEADER_BYTES + start * TOKEN.itemsize)
        except OSError as error:
            raise DataError(f"{self.path}: cannot read: {error.strerror}") from None
        if len(data) != n_bytes:
            raise DataError(
                f"{self.path}: {len(data)} bytes at token {start}, expected {n_bytes}: truncated while in use"
            )
        return np.frombuffer(data, dtype=TOKEN).astype(np.uint16, copy=False)

    def scan(self, progress: Callable[[int], object] = lambda n_bytes: None) -> tuple[str, np.ndarray]:
        """Read it all: hex sha256 of the file, and how often each token id occurs, int64 (65536,)."""
        digest, counts = hashlib.sha256(self.header), np.zeros(1 << 16, dtype=np.int64)
        for start in range(0, self.n_tokens, SCAN_TOKENS):
            tokens = self.read(start, min(SCAN_TOKENS, self.n_tokens - start))
            digest.update(tokens.astype(TOKEN, copy=False))
            counts += np.bincount(tokens, minlength=1 << 16)
            progress(tokens.nbytes)
        return digest.hexdigest(), counts


# ---------------------------------------------------------------------------------------------------------------------
# A data set


@dataclass(frozen=True)
class Dataset:
    """A checked directory of shards, in the order of its manifest."""

    directory: Path
    manifest: dict
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]

    @property
    def tokenizer(self) -> str | None:
        """The string gpt2, or None where the tokenizer is not known."""
        return self.manifest["tokenizer"]

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over split, file name and sha256 of each shard, in order: equal means the same tokens."""
        lines = (f"{shard['split']} {shard['file']} {shard['sha256']}\n" for shard in self.manifest["shards"])
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def hashes(self) -> dict[str, str]:
        """Hex sha256 of each shard by file name."""
        return {shard["file"]: shard["sha256"] for shard in self.manifest["shards"]}


def open_dataset(directory: Path | str, vocab_size: int | None = None, verify: bool = False) -> Dataset:
    """Open the data set in `directory`; build its manifest if it has none.

    Header and size of every shard are checked each time; its sha256 and its largest token id when it is new or has
    changed (size or mtime_ns), or always with `verify`. Token ids must be below the tokenizer's vocabulary and below
    `vocab_size`, the model's. Raises DataError for anything missing, empty, damaged or too large.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):  # False, not an error, for a name that is too long
        raise DataError(f"{directory}: no such data directory; data/README.md lists the commands that prepare one")
    files = shard_files(directory)
    for split in SPLITS:
        if split not in dict(files):
            raise DataError(f"{directory}: no {split} shards (files named *{split}*_*.bin)")

    path = directory / "manifest.json"
    with locked(directory / ".lock"):  # one process builds the manifest and checks the shards, the others wait
        if is_new := not path.exists():
            try_write_json(path, manifest := build_manifest(directory))
        else:
            manifest = read_manifest(path)
        listed = [(entry["split"], entry["file"]) for entry in manifest["shards"]]
        for split, name in sorted(set(listed) ^ set(files)):
            where = "in the manifest but not in the directory" if (split, name) in listed else "not in the manifest"
            raise DataError(f"{directory / name}: {split} shard {where}; delete {path} to have it built again")
        shards = [Shard(directory / name) for _, name in listed]
        contents = manifest["shards"] if is_new else check_contents(directory, shards, verify, manifest["shards"])

    limits = (manifest["vocab_size"], f"tokenizer {manifest['tokenizer']}"), (vocab_size, "the model")
    for shard, entry, content in zip(shards, manifest["shards"], contents, strict=True):
        if content["sha256"] != entry["sha256"] or shard.n_tokens != entry["tokens"]:
            raise DataError(
                f"{shard.path}: {shard.n_tokens} tokens with sha256 {content['sha256']}, but {path} says "
                f"{entry['tokens']} with {entry['sha256']!r}; restore the shard, or delete the manifest to accept it"
            )
        for limit, whose in limits:
            if limit is not None and content["max_token"] >= limit:
                raise DataError(f"{shard.path}: token id {content['max_token']}, but {whose} has only {limit} tokens")

    by_split = {split: [] for split in SPLITS}
    for (split, _), shard in zip(listed, shards, strict=True):
        by_split[split].append(shard)
    return Dataset(directory, manifest, tuple(by_split["train"]), tuple(by_split["val"]))


def shard_files(directory: Path) -> list[tuple[str, str]]:
    """(split, file name) of every shard in `directory`: train before val, each sorted by name."""
    matches = (re.fullmatch(SHARD_NAME, path.name) for path in directory.iterdir())
    return sorted((match[1], match[0]) for match in matches if match)


def build_manifest(directory: Path, source: str | None = None, licence: str | None = None) -> dict:
    """What manifest.json has to say about the GPT-2 shards in `directory`, from reading them all."""
    try:
        bytes_of_token = token_bytes()
    except DataError as error:
        print(f"{directory}: bytes of text not counted: {error}", file=sys.stderr)
        bytes_of_token = None
    files = shard_files(directory)
    shards = [Shard(directory / name) for _, name in files]
    contents = check_contents(directory, shards, bytes_of_token=bytes_of_token)
    entries, totals = [], {split: {"shards": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    for (split, name), shard, content in zip(files, shards, contents, strict=True):
        entries.append({"split": split, "file": name, "tokens": shard.n_tokens} | content)
        total = totals[split]
        total["shards"] += 1
        total["tokens"] += shard.n_tokens
        total["bytes"] = None if None in (total["bytes"], content["bytes"]) else total["bytes"] + content["bytes"]
    return {
        "format": MANIFEST_FORMAT,
        "tokenizer": "gpt2",
        "vocab_size": EOT + 1,
        "source": source,
        "licence": licence,
        "totals": totals,
        "shards": entries,
    }


def read_manifest(path: Path) -> dict:
    """The manifest in `path`. Raises DataError unless it has every field, each of its type."""
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != MANIFEST_FORMAT:
            raise ValueError(f"format {manifest['format']!r}, expected {MANIFEST_FORMAT}")
        for entry, fields in [(manifest, MANIFEST_FIELDS)] + [(entry, SHARD_FIELDS) for entry in manifest["shards"]]:
            for key, kind in fields.items():
                if not isinstance(entry[key], kind):
                    raise ValueError(f"{key} is {entry[key]!r}, expected {getattr(kind, '__name__', kind)}")
        if manifest["tokenizer"] not in ("gpt2", None):
            raise ValueError(f"tokenizer is {manifest['tokenizer']!r}, expected 'gpt2' or null")
        for entry in manifest["shards"]:
            if entry["split"] not in SPLITS or not re.fullmatch(SHARD_NAME, entry["file"]):
                raise ValueError(f"{entry['split']!r} shard {entry['file']!r}: neither a split nor a file name of one")
        if len({entry["file"] for entry in manifest["shards"]}) != len(manifest["shards"]):
            raise ValueError("a shard is listed twice")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: not a valid manifest: {what}; delete it to have it built from the shards") from None
    return manifest


def check_contents(
    directory: Path, shards: list[Shard], verify: bool = False, listed: list[dict] | None = None,
    bytes_of_token: np.ndarray | None = None,
) -> list[dict]:
    """{sha256, max_token, bytes} of each shard; bytes of text is None unless it was counted with `bytes_of_token`.

    A shard is read only when verified.json does not know its size and mtime_ns, or knows another content than its
    manifest has `listed`, for one of the two may be damaged; or with `verify`.
    """
    path = directory / "verified.json"
    try:
        known = {
            name: entry
            for name, entry in json.loads(path.read_bytes()).items()
            if set(entry) == set(VERIFIED_FIELDS) and all(isinstance(entry[key], VERIFIED_FIELDS[key]) for key in entry)
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        known = {}  # only a memory: without it every shard is read once more
    stale = []
    for i, shard in enumerate(shards):
        entry = known.get(shard.path.name)
        changed = entry is None or (entry["size"], entry["mtime_ns"]) != (shard.size, shard.mtime_ns)
        other = not changed and listed and any(entry[key] != listed[i][key] for key in ("sha256", "max_token"))
        if verify or changed or other or (entry["bytes"] is None and bytes_of_token is not None):
            stale.append(shard)
    n_bytes = sum(shard.size for shard in stale)
    with tqdm(total=n_bytes, desc=f"checking {directory}", unit="B", unit_scale=True, delay=1, leave=False) as bar:
        for shard in stale:
            sha256, counts = shard.scan(progress=bar.update)
            known[shard.path.name] = {
                "size": shard.size,
                "mtime_ns": shard.mtime_ns,
                "bytes": None if bytes_of_token is None else int(counts[: len(bytes_of_token)] @ bytes_of_token),
                "sha256": sha256,
                "max_token": int(counts.nonzero()[0][-1]),
            }
    if stale:
        try_write_json(path, known)
    return [{key: known[shard.path.name][key] for key in ("bytes", "sha256", "max_token")} for shard in shards]


# ---------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all, by one process at a time


def try_write_json(path: Path, value: dict) -> None:
    """write_json where the file only saves time: a directory that cannot be written costs a line on stderr."""
    try:
        write_json(path, value)
    except OSError as error:
        print(f"{path}: cannot write ({error.strerror}): it is worked out again at the next start", file=sys.stderr)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; a second process waits. Where files cannot be made or locked, go on without."""
    try:
        lock = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def prepare(directory: Path) -> Iterator[Path | None]:
    """A temporary directory to fill, which becomes `directory` when the block ends, or None if that exists already.

    A second process waits for the first and then finds its result. Whatever stops the block, `directory` does not
    come into being half done.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.parent / f".{directory.name}.lock"):
        if directory.exists():
            yield None
            return
        temporary = directory.parent / f".{directory.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
        temporary.mkdir()
        try:
            yield temporary
            fsync(temporary)  # its files were flushed as they were written
            os.rename(temporary, directory)
            fsync(directory.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def run_command(function: Callable[[], int | None]) -> int:
    """Exit code of a preparation command: a user's mistake is one line on stderr, never a traceback."""
    try:
        return function() or 0
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # cannot write
        print(f"error: {error}", file=sys.stderr)
        return CANNOT_WRITE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
