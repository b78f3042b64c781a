"""Any text as GPT-2 tokens: `python -m data.text NAME --train FILES --val FILES` prepares data/NAME.

FILES are paths or glob patterns. A .txt file is one document; a .jsonl file has one on each line, a JSON object with
the text in a field. Each may be compressed (.gz, .xz, .zst). One <|endoftext|> goes before each document.
"""

import glob
import gzip
import json
import lzma
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tyro
import zstandard
from tqdm import tqdm

from data.shards import build_manifest, prepare, run_command, write_shard
from data.tokenizer import EOT, gpt2
from files import write_json
from rundir import BAD_OPTION, DataError

SHARD_TOKENS = 100_000_000
READ_BYTES = 1 << 18  # of a compressed or plain file at a time
TASK_CHARACTERS = 1 << 20  # text that is tokenized by one thread at a time


# ---------------------------------------------------------------------------------------------------------------------
# Files to documents


def expand(patterns: Iterable[str]) -> list[Path]:
    """Paths that the patterns name, in the order given, those of a pattern sorted. DataError if one names nothing."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
        if not found:
            raise DataError(f"{pattern}: no such file")
        paths += map(Path, found)
    return paths


def read_documents(path: Path, field: str, bar: tqdm) -> Iterator[str]:
    """The documents of one file. Raises DataError with file and line for one that is not as its name says."""
    name = path.name.removesuffix(".gz").removesuffix(".xz").removesuffix(".zst")
    if not name.endswith((".txt", ".jsonl")):
        raise DataError(f"{path}: expected a name in .txt or .jsonl, with .gz, .xz or .zst after it if compressed")
    n_documents = 0
    if name.endswith(".txt"):
        content = b"".join(read_bytes(path, bar))
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}: line {line}: not UTF-8: byte 0x{content[error.start]:02x}") from None
        if text:
            n_documents = 1
            yield text
    else:
        for number, line in enumerate(split_lines(read_bytes(path, bar)), 1):
            if line.strip():
                yield parse_line(f"{path}: line {number}", line, field)
                n_documents += 1
    if not n_documents:
        raise DataError(f"{path}: empty: no document")


def parse_line(where: str, line: bytes, field: str) -> str:
    """The text in one line of a .jsonl file."""
    try:
        document = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: byte 0x{line[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise DataError(f"{where}: a JSON {type(document).__name__}, expected an object with the field {field!r}")
    if field not in document:
        fields = ", ".join(map(repr, document))
        raise DataError(f"{where}: no field {field!r}, only {fields}; name the right one with --field")
    if not isinstance(document[field], str):
        raise DataError(f"{where}: field {field!r} is not text: {document[field]!r:.40}")
    return document[field]


def read_bytes(path: Path, bar: tqdm) -> Iterator[bytes]:
    """The decompressed content of a file, piece by piece; `bar` moves by the bytes read from the disk."""
    try:
        with open(path, "rb") as raw:
            done = 0
            for piece in decompress(raw, path.suffix):
                yield piece
                bar.update(raw.tell() - done)
                done = raw.tell()
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: cannot read: {error}") from None


def decompress(raw: BinaryIO, suffix: str) -> Iterator[bytes]:
    """The content of `raw`, piece by piece."""
    if suffix == ".zst":
        yield from decompress_zst(raw)
        return
    file = {".gz": gzip.open, ".xz": lzma.open}.get(suffix, lambda file: file)(raw)
    while piece := file.read(READ_BYTES):
        yield piece


def decompress_zst(raw: BinaryIO) -> Iterator[bytes]:
    """As `decompress`. zstandard's own reader ends without an error where a file has been cut off; this one raises."""
    frame = None
    while data := raw.read(READ_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("compressed data ends in the middle")


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that comes in pieces, without their ends."""
    begun = []
    for piece in pieces:
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield b"".join([*begun, end])
            begun = []
        begun.append(rest)
    yield b"".join(begun)


# ---------------------------------------------------------------------------------------------------------------------
# Documents to shards


def encode(texts: list[str]) -> np.ndarray:
    """Tokens of some documents, <|endoftext|> before each: uint16 (n,)."""
    parts = []
    for text in texts:
        try:  # without disallowed_special, text that looks like a special token is text
            tokens = gpt2().encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold: encode_ordinary replaces it
            tokens = gpt2().encode_ordinary(text)
        parts += [[EOT], tokens]
    return np.concatenate(parts).astype(np.uint16)


def encode_all(documents: Iterable[str], workers: int) -> Iterator[np.ndarray]:
    """`encode` for a stream of documents, in order, by `workers` threads (tiktoken holds no lock while it encodes)."""
    gpt2()
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:
        for texts in batches(documents):
            pending.append(pool.submit(encode, texts))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of about TASK_CHARACTERS."""
    texts, n_characters = [], 0
    for text in documents:
        texts.append(text)
        n_characters += len(text)
        if n_characters >= TASK_CHARACTERS:
            yield texts
            texts, n_characters = [], 0
    if texts:
        yield texts


def cut(stream: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """A stream of tokens in pieces of SHARD_TOKENS; the last may be shorter."""
    parts, n_tokens = [], 0
    for part in stream:
        parts.append(part)
        n_tokens += len(part)
        while n_tokens > SHARD_TOKENS:
            tokens = np.concatenate(parts)
            yield tokens[:SHARD_TOKENS]
            parts, n_tokens = [tokens[SHARD_TOKENS:]], n_tokens - SHARD_TOKENS
    yield np.concatenate(parts)


def main(
    name: tyro.conf.Positional[str],
    train: tuple[str, ...],
    val: tuple[str, ...],
    field: str = "text",
    out: Path = Path("data"),
    source: str | None = None,
    licence: str | None = None,
    workers: int = 0,
) -> int:
    """Make a data set of GPT-2 tokens from text files.

    Args:
        name: Name of the data set: the directory made in --out.
        train: Files to train on: .txt (one document) or .jsonl (one on each line), plain or .gz, .xz, .zst; globs too.
        val: Files to validate on.
        field: Field of a .jsonl line that holds the text.
        out: Directory to make the data set in.
        source: Where the text comes from, for the manifest.
        licence: Its licence, for the manifest.
        workers: Threads that tokenize; 0 is one for each core.
    """
    directory = out / name
    if not name or Path(name).name != name or name.startswith("."):
        print(f"error: name {name!r}: expected a plain directory name", file=sys.stderr)
        return BAD_OPTION
    files = {"train": expand(train), "val": expand(val)}
    for split, paths in files.items():
        if not paths:
            raise DataError(f"--{split}: no files")
    for path in {path.resolve() for path in files["train"]} & {path.resolve() for path in files["val"]}:
        raise DataError(f"{path}: in --train and in --val")
    if workers < 0:
        print(f"error: workers {workers}: expected 0 or more", file=sys.stderr)
        return BAD_OPTION

    n_bytes = sum(path.stat().st_size for paths in files.values() for path in paths)
    with prepare(directory) as temporary:
        if temporary is None:
            print(f"error: {directory} exists already: choose another name, or remove it", file=sys.stderr)
            return BAD_OPTION
        with tqdm(total=n_bytes, desc=name, unit="B", unit_scale=True) as bar:
            for split, paths in files.items():
                documents = (text for path in paths for text in read_documents(path, field, bar))
                for index, tokens in enumerate(cut(encode_all(documents, workers or os.cpu_count()))):
                    write_shard(temporary / f"{split}_{index:06d}.bin", tokens)
        manifest = build_manifest(temporary, source, licence)
        write_json(temporary / "manifest.json", manifest)
    for split, total in manifest["totals"].items():
        print(f"{directory}: {split}: {total['tokens']:,} tokens, {total['bytes']:,} bytes, {total['shards']} shards")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main, use_underscores=True)))
