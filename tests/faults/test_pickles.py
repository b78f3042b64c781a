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
from types import SimpleNamespace

import numpy as np
import pytest
import small
import tiktoken
import torch

import checkpoint
import compare
import data.text
import data.tokenizer
import eval
import finite
import hellaswag
import replay
import sample
import sweep
from data.shards import DataError, run_command
from tests.faults.table import row

SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 1, "max_steps": 8, "save_every": 2, "val_every": 6}


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

    def did_not_run(refused=True) -> bool:
        """refused: else nothing reads these files, or they are no reason to stop."""
        found = 0 if ran() else counts.injected
        counts.detected, counts.harmless = (found, 0) if refused else (0, found)
        return found > 0

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
IGNORED = [*(f"{CHECKPOINT}/{name}" for name in ("model.pt", "optim.bin", "pytorch_model.bin", "data.pkl")),
           *(f"runs/run/{name}" for name in ("status.json", "metrics.jsonl", "source.diff", ".lock")),
           "runs/finished/config.json", "data/verified.json", "data/.lock"]
PLACES = {name: [f"{CHECKPOINT}/{name}"] for name in (*checkpoint.FILES, "manifest.json")}
PLACES |= {f"{name}, with a manifest that fits": PLACES[name] for name in checkpoint.FILES}
PLACES |= {f"data/{name}": [f"data/{name}"] for name in ("manifest.json", "train_000000.bin", "val_000000.bin")}
HARMLESS = "what is no reason to stop"
PLACES[HARMLESS] = IGNORED


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
    if "step-" in path.parent.name or place == HARMLESS:
        codes.append(small.call(sample.main, ["--run", str(runs.path), "--device", "cpu", "--prompt", "!",
                                               "--max_new_tokens", "2"]))
        codes.append(runs(**SMALL, stop_after=1, init_from=runs.path, run_name="from_it"))
    codes.append(runs(**SMALL, stop_after=7))
    if place == HARMLESS:
        codes.append(runs(**SMALL | {"save_every": 0}, run_name="finished"))
    err = capfd.readouterr().err
    assert drop.did_not_run(refused=place != HARMLESS) and "Traceback" not in err, err[-2000:]
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
    assert drop.did_not_run(refused=expected > 0) and "Traceback" not in err, err[-2000:]
    assert code == expected and (code == 0 or err.startswith("error: ")), err[-2000:]


NO_SIGNAL = SimpleNamespace(received=None)
ELSEWHERE = {  # (files, what reads them, exit code)
    "eval.json": (["eval.json"], lambda run: small.call(eval.main, ["--run", str(run), "--device", "cpu"]), 0),
    "hellaswag": (["examples"], lambda run: run_command(lambda: hellaswag.read(run / "examples")), 7),
    "a run to compare": (["config.json"], lambda run: small.call(compare.main, [str(run)]), 2),
    "a run to compare, other files": (["config-00000006.json", "status.json", "source.diff"],
                                      lambda run: small.call(compare.main, [str(run)]), 0),
    "index.json": (["index.json"], lambda run: run_command(lambda: sweep.sweep([], {}, [{}], run, NO_SIGNAL) and 0), 0),
}


@pytest.mark.parametrize("place", ELSEWHERE)
def test_in_what_other_commands_read(stopped, tmp_path, drop, capfd, place):
    names, read, expected = ELSEWHERE[place]
    runs, _ = dropped(stopped, tmp_path, drop, [f"runs/run/{name}" for name in names], fits=False)
    code = read(runs.path)
    err = capfd.readouterr().err
    assert drop.did_not_run(refused=expected > 0) and "Traceback" not in err, err[-2000:]
    assert code == expected, err[-2000:]


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.jsonl.gz", "text.txt.xz", "text.jsonl.zst"])
def test_in_text(tmp_path, drop, capfd, name):
    drop(path := tmp_path / "corpus" / name)
    (tmp_path / "val.txt").write_text("To be, or not to be")
    code = run_command(lambda: data.text.main("mine", (str(path),), (str(tmp_path / "val.txt"),), out=tmp_path))
    assert drop.did_not_run(refused=code > 0) and "Traceback" not in capfd.readouterr().err
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
LOADERS = {"numpy.load", "torch.load", "torch.serialization", "torch.jit", "torch.hub", "torch.package"}
OBJECTS = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
           "recv_object_list"}  # what torch.distributed pickles between processes
NAMES = {"eval", "exec", "__import__"}
KEYWORDS = {"allow_pickle", "weights_only"}


def dotted(node, modules: dict[str, str]) -> str:
    """`a.b.c` of nested attributes, with the module's own name for `a`; "" if it begins with something else."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, modules)
        return inner and f"{inner}.{node.attr}"
    return modules.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def unpickling(source: str) -> list[str]:
    """What in a Python source could run code out of a file, or out of another process."""
    tree, used, found, modules = list(ast.walk(ast.parse(source))), [], [], {"np": "numpy", "dist": "torch.distributed"}
    for node in tree:
        if isinstance(node, ast.Import):
            used += [alias.name for alias in node.names]
            modules |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            used += [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in tree:
        if isinstance(node, ast.Attribute):
            used.append(dotted(node, modules))
        elif isinstance(node, ast.Name):
            found += [node.id] * (node.id in NAMES)
        elif isinstance(node, ast.keyword):
            found += [node.arg] * (node.arg in KEYWORDS)
        elif isinstance(node, ast.Constant):  # of importlib.import_module
            found += [node.value] * (isinstance(node.value, str) and node.value in MODULES)
    for name in used:
        parts = name.split(".")
        if parts[0] in MODULES or ".".join(parts[:2]) in LOADERS or parts[-1] in OBJECTS:
            found.append(name)
    return found


SOURCES = [path for pattern in ("*.py", "[!t]*/*.py") for path in sorted(small.ROOT.glob(pattern))]  # all but tests/


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_source_unpickles_nothing(path):
    assert unpickling(path.read_text()) == []


@pytest.mark.parametrize("source", [
    "import pickle", "import os, pickle as p", "from pickle import load", "import torch\ntorch.load('x')",
    "from torch import load", "np.load(x)", "read(x, allow_pickle=True)", "import shelve", "import yaml",
    "import joblib", "import marshal", "def f():\n    import dill", "eval(x)", "torch.jit.load(x)",
    "read(x, weights_only=True)", "import torch\ntorch.serialization.load(x)", "import torch as t\nt.load(x)",
    "from torch.serialization import load", "from torch import serialization as s\ns.load(x)",
    "import torch.distributed as dist\ndist.all_gather_object(x, y)", "dist.broadcast_object_list(x)",
    "import importlib\nimportlib.import_module('pickle')", "import numpy as n\nn.load(x)"])
def test_what_unpickles_is_seen(source):
    assert unpickling(source)


def test_what_unpickles_nothing_is_not():
    assert not unpickling("import torch, json\njson.load(x)\nload_file(x)\ntorch.loads\nx.load()\ny = 'a pickle'")
