"""Pickles that would run code, dropped wherever a command reads a file: none runs. And the source reads no pickle."""

import ast
import builtins
import hashlib
import json
import os
import pickle
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest
import small
import tiktoken
import torch

import checkpoint
import data.text
import data.tokenizer
import finite
import replay
import sample
from data.shards import DataError, run_command
from tests.faults.table import row

SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 1, "max_steps": 8, "save_every": 2}


class Call:
    """Unpickled, it is what this call returns."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def plain(protocol, function, *arguments):
    def write(path, marker):
        call = Call(function, *(argument.format(marker) for argument in arguments))
        path.write_bytes(pickle.dumps(call, protocol))
    return write


def unpickle(path):
    with open(path, "rb") as file:
        pickle.load(file)


def torch_load(path):
    with open(path, "rb") as file:
        torch.load(file, weights_only=False)


def saved(save):
    def write(path, marker):
        with open(path, "wb") as file:
            save(Call(os.system, f"touch {marker}"), file)
    return write


# (writes it into a file, runs it): plain pickles of several protocols, protocol 0 being text, and what others write
PAYLOADS = {
    "os.system": (plain(4, os.system, "touch {}"), unpickle),
    "builtins.eval": (plain(0, builtins.eval, "open('{}', 'w')"), unpickle),
    "builtins.exec": (plain(2, builtins.exec, "import os; os.mkdir('{}')"), unpickle),
    "subprocess": (plain(5, subprocess.getoutput, "touch {}"), unpickle),
    "shutil.copy": (plain(0, shutil.copy, __file__, "{}"), unpickle),
    "torch.save": (saved(torch.save), torch_load),
    "torch.save as it was": (saved(partial(torch.save, _use_new_zipfile_serialization=False)), torch_load),
    "numpy.save": (saved(lambda value, file: np.save(file, np.array([value], dtype=object))),
                   lambda path: np.load(path, allow_pickle=True)),
}


@pytest.fixture(params=PAYLOADS)
def drop(request, tmp_path):
    """`drop(path)` puts the payload there, and sees it run by its own loader: the control; `drop.ran()` is the test."""
    write, load = PAYLOADS[request.param]
    marker = tmp_path / "marker"

    def ran() -> bool:
        found = marker.exists()
        if found:
            shutil.rmtree(marker) if marker.is_dir() else marker.unlink()
        return found

    def drop(path):
        path.parent.mkdir(exist_ok=True, parents=True)
        write(path, marker)
        load(path)
        counts.control(True)
        assert ran(), "this payload does nothing"
        counts.injected += 1

    def did_not_run() -> bool:
        counts.detected = 0 if ran() else counts.injected
        return counts.detected > 0

    drop.did_not_run = did_not_run
    with row(f"pickle, in any file that is read: {request.param}") as counts:
        yield drop


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """
    A run that has two checkpoints and two steps to do, one that is finished and one for replay.py, on data that is
    called GPT-2's.
    """
    runs = small.Runs.__new__(small.Runs)
    runs.directory = tmp_path_factory.mktemp("stopped")
    runs.data, runs.out_dir = runs.directory / "data", runs.directory / "runs"
    torch.set_num_threads(1)
    small.make_data(runs.data, tokenizer="gpt2")
    assert runs(**SMALL, stop_after=6) == 0
    assert runs(**SMALL | {"save_every": 0}, run_name="finished") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finite, "first_not_finite", lambda tensors: next(iter(tensors)))
        patch.chdir(runs.directory)
        assert runs(**SMALL, run_name="not_finite", data="./data") == 6
    return runs


CHECKPOINT = "runs/run/step-00000006"
HARMLESS = [*(f"{CHECKPOINT}/{name}" for name in ("model.pt", "optim.bin", "pytorch_model.bin", "data.pkl")),
            *(f"runs/run/{name}" for name in ("status.json", "metrics.jsonl", "source.diff", ".lock")),
            "runs/finished/config.json", "data/verified.json", "data/.lock"]
PLACES = {name: [f"{CHECKPOINT}/{name}"] for name in (*checkpoint.FILES, "manifest.json")}
PLACES |= {f"{name}, with a manifest that fits": PLACES[name] for name in checkpoint.FILES}
PLACES |= {f"data/{name}": [f"data/{name}"] for name in ("manifest.json", "train_000000.bin", "val_000000.bin")}
PLACES["what is no reason to stop"] = HARMLESS


def dropped(stopped, tmp_path, drop, names, fits):
    """A copy of all with the payload in these files, and the path of the last; fits: its manifest is made to."""
    shutil.copytree(stopped.directory, tmp_path / "here")
    runs = small.Runs(tmp_path / "here")
    for name in names:
        drop(path := runs.directory / name)
    if fits:
        manifest = json.loads((path.parent / "manifest.json").read_text())
        content = path.read_bytes()
        manifest[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
    return runs, path


@pytest.mark.parametrize("place", PLACES)
def test_in_runs_and_data(stopped, tmp_path, drop, capfd, place):
    """Sampling, a new run from these weights, training that goes on, and one that is finished."""
    runs, path = dropped(stopped, tmp_path, drop, PLACES[place], fits="fits" in place)
    codes = []
    if "step-" in path.parent.name or place == "what is no reason to stop":
        codes.append(small.call(sample.main, ["--run", str(runs.path), "--prompt", "!", "--max_new_tokens", "2"]))
        codes.append(runs(**SMALL, stop_after=1, init_from=runs.path, run_name="from_it"))
    codes.append(runs(**SMALL, stop_after=7))
    if place == "what is no reason to stop":
        codes.append(runs(**SMALL | {"save_every": 0}, run_name="finished"))
    err = capfd.readouterr().err
    assert drop.did_not_run() and "Traceback" not in err, err[-2000:]
    expected = [7] if len(codes) == 1 else [0, 0, 0, 2] if len(codes) == 4 else [0, 0, 0]  # by the older checkpoint
    assert codes == expected, err[-2000:]


KEPT = "runs/not_finite/not-finite/step-00000002"
REPLAYED = {name: ([f"{KEPT}/{name}"], 4) for name in (*checkpoint.FILES, "manifest.json")}
REPLAYED |= {f"{name}, with a manifest that fits": REPLAYED[name] for name in checkpoint.FILES}
REPLAYED |= {name: (PLACES[name], 7) for name in PLACES if name.startswith("data/") and "val" not in name}
REPLAYED["what is not read"] = [f"{KEPT}/model.pt", f"{KEPT}/pytorch_model.bin", "runs/not_finite/config.json",
                                "runs/not_finite/status.json", "runs/not_finite/source.diff"], 0


@pytest.mark.parametrize("place", REPLAYED)
def test_in_what_is_replayed(stopped, tmp_path, drop, capfd, monkeypatch, place):
    names, expected = REPLAYED[place]
    runs, _ = dropped(stopped, tmp_path, drop, names, fits="fits" in place)
    monkeypatch.chdir(runs.directory)  # where its data are
    code = small.call(replay.main, ["--run", "not_finite", "--out_dir", str(runs.out_dir), "--device", "cpu"])
    err = capfd.readouterr().err
    assert drop.did_not_run() and "Traceback" not in err, err[-2000:]
    assert code == expected and (code == 0 or err.startswith("error: ")), err[-2000:]


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.jsonl.gz", "text.txt.xz", "text.jsonl.zst"])
def test_in_text(tmp_path, drop, capfd, name):
    drop(path := tmp_path / "corpus" / name)
    (tmp_path / "val.txt").write_text("To be, or not to be")
    code = run_command(lambda: data.text.main("mine", (str(path),), (str(tmp_path / "val.txt"),), out=tmp_path))
    assert drop.did_not_run() and "Traceback" not in capfd.readouterr().err
    assert code in (0, 7) and (code == 7 or name == "text.txt")  # protocol 0 is text


def test_in_the_tokenizers_cache(tmp_path, drop, monkeypatch):
    for url in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{url}"
        drop(tmp_path / "cache" / hashlib.sha1(url.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(data.tokenizer, "fetch_rank_files", dict)
    seen = []

    def no_network(url):
        seen.append(url)
        raise OSError("no network in this test")

    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    with pytest.raises(DataError, match="no network in this test"):
        data.tokenizer.gpt2.__wrapped__()
    assert len(seen) == 1 and len(list((tmp_path / "cache").iterdir())) == 1  # tiktoken found the first no good
    assert drop.did_not_run()


# -----------------------------------------------------------------------------
# the source

MODULES = {"pickle", "_pickle", "cPickle", "pickletools", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml",
           "jsonpickle", "pandas"}
LOADERS = {("np", "load"), ("numpy", "load"), *(("torch", name) for name in ("load", "jit", "hub", "package"))}
NAMES = {"eval", "exec", "__import__"}
KEYWORDS = {"allow_pickle", "weights_only"}


def unpickling(source: str) -> list[str]:
    """What in a Python source could run code out of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] * (node.module.split(".")[0] in MODULES)
            found += [alias.name for alias in node.names if (node.module, alias.name) in LOADERS]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [node.attr] * ((node.value.id, node.attr) in LOADERS)
        elif isinstance(node, ast.Name):
            found += [node.id] * (node.id in NAMES)
        elif isinstance(node, ast.keyword):
            found += [node.arg] * (node.arg in KEYWORDS)
    return found


SOURCES = [path for pattern in ("*.py", "[!t]*/*.py") for path in sorted(small.ROOT.glob(pattern))]  # all but tests/


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_source_unpickles_nothing(path):
    assert unpickling(path.read_text()) == []


@pytest.mark.parametrize("source", [
    "import pickle", "import os, pickle as p", "from pickle import load", "import torch\ntorch.load('x')",
    "from torch import load", "np.load(x)", "read(x, allow_pickle=True)", "import shelve", "import yaml",
    "import joblib", "import marshal", "def f():\n    import dill", "eval(x)", "torch.jit.load(x)",
    "read(x, weights_only=True)"])
def test_what_unpickles_is_seen(source):
    assert unpickling(source)
