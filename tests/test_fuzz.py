"""Options and files of any content: taken, or refused with one line and a documented exit code; never a traceback."""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import small
import tyro
from hypothesis import strategies as st

import bench
import checkpoint
import compare
import data.text
import eval
import finite
import hellaswag
import replay
import rundir
import sample
import sweep
import test_memory
import train_gpt2
from configs.recipes import TrainConfig
from data.shards import open_dataset, run_command
from model import GPTConfig
from tests.faults.table import row

SEED, SCALE = os.environ.get("FAULTS_SEED"), int(os.environ.get("FAULTS_SCALE", 1))
SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 1, "max_steps": 8, "save_every": 2, "val_tokens": 32, "val_every": 4}


def fuzz(n: int, **strategies):
    """With n examples times FAULTS_SCALE: always the same ones, or others with FAULTS_SEED."""
    def decorate(test):
        settings = hypothesis.settings(max_examples=n * SCALE, deadline=None, derandomize=SEED is None, database=None,
                                       suppress_health_check=list(hypothesis.HealthCheck))
        test = settings(hypothesis.given(**strategies)(test))
        return test if SEED is None else hypothesis.seed(int(SEED))(test)
    return decorate


@pytest.fixture
def counts(request):
    """The row of a test for a table: what is changed at random, and what becomes of it."""
    with row(f"fuzzed: {request.node.name.removeprefix('test_').replace('_', ' ')}") as counts:
        yield counts
        assert counts.naive_failed or not counts.naive_tried


class Accepted(BaseException):
    """What the options ask for would begin now."""


def accepted(*arguments, **options):
    raise Accepted


def call(main, arguments: list[str]) -> tuple[int | str, str]:
    """(exit code or "accepted", stderr), on a terminal that takes UTF-8 and nothing else."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = small.call(main, arguments)
        except Accepted:
            code = "accepted"
    err.seek(0)
    return code, err.read()


def messages(err: str) -> list[str]:
    """tyro's frame counts as one; progress bars do not."""
    err = re.sub(r"╭─.*?╰─[^\n]*", "frame", err, flags=re.DOTALL)
    bars = r"step/s|\?step|s/step|/1 runs, |B/s[],]"
    return [line for line in re.split(r"[\r\n]", err) if line.strip() and not re.search(bars, line)]


def check(code, err, codes, counts=None):
    """counts: of a row, where this is one trial; what is taken is as good as before."""
    if counts:
        counts.injected += 1
    assert "Traceback" not in err and code in codes, (code, err[-3000:])
    assert len(messages(err)) <= 1, err
    if code not in (0, "accepted"):
        assert re.fullmatch(r"error: .+|frame", messages(err)[0]), err
    if counts:
        counts.detected += code not in (0, "accepted")
        counts.harmless += code in (0, "accepted")


# -----------------------------------------------------------------------------
# options

WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=20)
BYTES = st.binary(min_size=1, max_size=8).filter(lambda name: min(name) >= 32)  # names of files are bytes
NUMBERS = st.sampled_from([
    "0", "1", "-1", "2", "3", "7", "64", "1e3", "0.5", "1.5", "nan", "inf", "-inf", "1e999", "1_0", "0x10", "\u0663",
    "16777216", "16777217", "1099511627776", "1099511627777", str(2**63), str(10**30), "1" + "0" * 5000, "-0", "+1"])
ODD = st.sampled_from([
    "", " ", "-", "--", "---", "=", "None", "True", "none", "auto", "on", "cuda", "cpu", "mps", "[/red]", "[bold", "{}",
    "%s", "a" * 300, "/", "a/b", ".", "..", "~", "$HOME", "*", "--help", "-h", "\\"])
VALUES = st.one_of(NUMBERS, ODD, WORDS, BYTES.map(os.fsdecode))
NAMES = {
    "train": [*train_gpt2.TrainConfig.__dataclass_fields__, *GPTConfig.__dataclass_fields__, "dry_run",
              "no_dry_run", "no_pre_norm", "no_wandb", "list"],
    "sample": list(sample.SampleConfig.__dataclass_fields__),
    "eval": list(eval.EvalConfig.__dataclass_fields__),
    "bench": [*bench.BenchConfig.__dataclass_fields__, *GPTConfig.__dataclass_fields__],
    "memory": list(test_memory.MemoryConfig.__dataclass_fields__),
    "compare": list(compare.CompareConfig.__dataclass_fields__),
    "replay": list(replay.ReplayConfig.__dataclass_fields__),
    "sweep": [*(name for name in sweep.SweepConfig.__dataclass_fields__ if name not in ("seeds", "slots")),
              *train_gpt2.TrainConfig.__dataclass_fields__],
    "text": ["name", "train", "val", "field", "out", "source", "licence", "workers"],
}
VALID = {
    "train": ["--model", "tiny", "--device", "cpu", "--max_steps", "8", "--sequence_length", "32", "--window_size", "8",
              "--total_batch_tokens", "128", "--learning_rate", "0.01", "--warmup_steps", "2", "--val_tokens", "64"],
    "sample": ["--run", "run", "--device", "cpu", "--prompt", "!", "--n_samples", "2", "--temperature", "0.5",
               "--top_p", "0.9", "--max_new_tokens", "3"],
    "eval": ["--run", "run", "--device", "cpu", "--val_tokens", "64", "--batch_size", "2", "--hellaswag", "file"],
    "bench": ["--model", "tiny", "--device", "cpu", "--batch_size", "2", "--compare", "--model=tiny --n_head 4",
              "--steps", "2", "--dtype", "float32"],
    "memory": ["--model", "tiny", "--device", "cpu", "--sequence_lengths", "64", "128", "--window_sizes", "8", "16",
               "--tokens", "128", "--head_dim", "16"],
    "compare": ["runs/finished", "runs/other", "--baseline", "finished", "--target_loss", "5.5"],
    "replay": ["--run", "not_finite", "--out_dir", "runs", "--device", "cpu"],
    "sweep": ["--models", "tiny", "--learning_rates", "1e-3,1e-2", "--sweep", "seed=4,7", "--device", "cpu",
              "--sequence_length", "32", "--total_batch_tokens", "128", "--name", "windows"],
    "text": ["new", "--train", "texts/text.jsonl", "--val", "texts/val.jsonl", "--field", "text", "--workers", "1"],
}


def text_main(arguments):
    return run_command(lambda: tyro.cli(data.text.main, args=arguments, use_underscores=True))


MAINS = {"train": train_gpt2.main, "sample": sample.main, "eval": eval.main, "bench": bench.main,
         "memory": test_memory.main, "compare": compare.main, "replay": replay.main, "sweep": sweep.main,
         "text": text_main}


@st.composite
def command_lines(draw):
    """A command, and a valid line of it after some changes."""
    command = draw(st.sampled_from(list(MAINS)))
    line = list(VALID[command])
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(line)))
        option = draw(st.sampled_from(NAMES[command]).map(lambda name: f"--{name}"))
        kind = draw(st.integers(0, 6))
        if kind <= 2:
            line += [option, draw(VALUES)]
        elif kind == 3:
            line[i:i + 1] = [draw(VALUES)]
        elif kind == 4:
            line[i:i + 1] = []
        elif kind == 5:
            line.insert(i, draw(st.one_of(VALUES, st.just(option))))
        else:
            line[i:] = [f"{option}={draw(VALUES)}", *line[i:]]
    return command, line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """
    In the working directory a text, and runs: one with two checkpoints and two steps to do, two that are finished and
    have none, one for replay.py, and a sweep.
    """
    runs = small.Runs.__new__(small.Runs)
    runs.directory = tmp_path_factory.mktemp("fuzz")
    runs.data, runs.out_dir = runs.directory / "data" / "mine", runs.directory / "runs"
    small.make_data(runs.data, tokenizer="gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs.directory)
        patch.setattr(rundir, "git", lambda *arguments, **options: b"")
        assert runs(**SMALL, run_name="uninterrupted") == 0
        assert runs(**SMALL, stop_after=6) == 0
        assert runs(**SMALL | {"save_every": 0}, run_name="finished") == 0
        assert runs(**SMALL | {"save_every": 0}, run_name="other", seed=1) == 0
        with pytest.MonkeyPatch.context() as one:
            one.setattr(finite, "first_not_finite", lambda tensors: next(iter(tensors)))
            assert runs(**SMALL, run_name="not_finite", data="data/mine") == 6
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert small.call(sweep.main, [*sweep_options(runs), "--dry_run"]) == 0
        shutil.copytree(runs.out_dir / "finished", runs.directory / "swept" / out.getvalue().split(": ")[0])
        (runs.directory / "texts").mkdir()
        for name in "text.jsonl", "val.jsonl":
            (runs.directory / "texts" / name).write_text(json.dumps({"text": f"To be {name}"}))
        shutil.copytree(runs.directory, runs.directory.with_name("as_it_was"))
        yield runs


def reset(place):
    for path in place.directory.iterdir():
        shutil.rmtree(path)
    shutil.copytree(place.directory.with_name("as_it_was"), place.directory, dirs_exist_ok=True)


class Here:
    """In place of a process beside."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        return SimpleNamespace(result=lambda: function(*arguments))


@pytest.fixture
def nothing_begins(monkeypatch):
    for module, name in ((train_gpt2, "train"), (bench, "measure"), (bench, "build"), (test_memory, "measure_all"),
                         (checkpoint, "load_model")):
        monkeypatch.setattr(module, name, accepted)
    for module, name in ((compare, "compare_at"), (compare, "show_card"), (replay, "build"), (sweep, "run_all"),
                         (data.text, "prepare")):
        monkeypatch.setattr(module, name, accepted)
    monkeypatch.setattr("kernels.verify.run", accepted)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Here)


def test_valid_command_lines(place, nothing_begins):
    for command, line in *VALID.items(), ("bench", [*VALID["bench"], "--out_dir", "."]):
        assert call(MAINS[command], line) == ("accepted", ""), command


@fuzz(500, command_line=command_lines())
def test_options(place, nothing_begins, counts, command_line):
    """The control: a parser that knows the options and their types, but no limits, takes what has to be refused."""
    command, line = command_line
    before = small.tree(place.directory)
    code, err = call(MAINS[command], line)
    check(code, err, CODES.get(command, ("accepted", 0, 2, 5)), counts)
    assert small.tree(place.directory) == before
    if command == "train" and code == 2:
        counts.control(taken_by_type(line))


CODES = {"sample": ("accepted", 0, 2, 4), "eval": ("accepted", 0, 2, 4), "replay": ("accepted", 0, 2, 4, 7),
         "text": ("accepted", 0, 2, 7)}


def taken_by_type(line: list[str]) -> bool:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for field in *fields(train_gpt2.TrainConfig), *fields(GPTConfig):
        kind = type(field.default) if type(field.default) in (int, float) else str
        parser.add_argument(f"--{field.name}", type=kind)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        parser.parse_args(line)
        return True
    return False


def test_the_control_takes_too_much():
    assert taken_by_type(["--learning_rate", "nan", "--n_layer", "-1"])
    assert not taken_by_type(["--learning_rate", "x"]) and not taken_by_type(["--learning_rat", "1"])


COMMANDS = ["train_gpt2.py", "sample.py", "eval.py", "bench.py", "test_memory.py", "compare.py", "replay.py",
            "sweep.py", "explain_memory.py", "-m data.text", "-m data.fineweb", "-m data.shakespeare"]


@pytest.mark.skipif(SCALE == 1, reason="FAULTS_SCALE is 1")
@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_soon(command):
    """In 2.5 s, once in three times, since a machine has more to do; where torch alone takes half of that, in twice."""
    times, environment = {}, os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with row("--help of a command, 2.5 s or twice the import of torch allowed") as counts:
        counts.injected += 1
        for _ in range(3):
            for arguments in ("-c", "import torch"), (*command.split(), "--help"):
                start = time.time()
                subprocess.run([sys.executable, *arguments], cwd=small.ROOT, env=environment, check=True,
                               capture_output=True)
                times.setdefault(arguments, []).append(time.time() - start)
        torch_s, help_s = map(min, times.values())
        counts.took(help_s)
        assert help_s < max(2.5, 2 * torch_s)
        counts.harmless += 1


PATHS = st.one_of(WORDS, ODD, BYTES.map(os.fsdecode)).filter(lambda path: ".." not in path)


@hypothesis.example(option="out_dir", path="\udc80", inside=True)
@fuzz(80, option=st.sampled_from(["data", "out_dir", "run_name", "init_from"]), path=PATHS, inside=st.booleans())
def test_paths(place, monkeypatch, counts, option, path, inside):
    """As far as the run's directory; a refused one leaves nothing behind."""
    monkeypatch.setattr(rundir.RunDir, "begin", accepted)
    if option == "out_dir" or inside:
        path = f"{place.directory}/{path}"
    before = set(place.directory.rglob("*"))
    code, err = call(train_gpt2.main, place.options(**SMALL | {option: path, "stop_after": 6, "seed": 1}))
    check(code, err, ("accepted", 0, 2, 5, 7), counts)
    if code != "accepted":
        assert set(place.directory.rglob("*")) == before
    else:
        reset(place)


# -----------------------------------------------------------------------------
# files

SCALARS = st.one_of(
    st.none(), st.booleans(), st.text(),
    st.sampled_from([-1, 0, 1, 3, 10**30, 10**4000, 0.5, -1e308, math.nan, math.inf]),
    st.sampled_from(["", "a\nb", "\ud800", "\x1b[2J", "\0", "gpt3", "a" * 64, "..", "finished"]))
ANY = st.recursive(SCALARS, lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(), value, max_size=3))
RAW = [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"\0" * 100, b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000,
       b'"\\ud800"', b"\xef\xbb\xbf{}", b"NaN", b"\x80\x04."]


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def changed(draw, valid):
    """A JSON value after one to three changes."""
    root = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(list(places(root))[1:]))
        parent, kind = root, draw(st.integers(0, 3))
        for step in path:
            parent = parent[step]
        if kind <= 1 or not path:
            parent[key] = draw(ANY)
        elif kind == 2:
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.text())] = parent.pop(key)
        else:
            parent.append(parent[key])
    return root[0]


def contents(draw, valid: bytes) -> bytes:
    """What may be found in a file that had this JSON value."""
    kind = draw(st.integers(0, 5))
    if kind <= 2:
        return json.dumps(draw(changed(json.loads(valid)))).encode()
    if kind == 3:
        return draw(st.one_of(st.sampled_from(RAW), st.binary(max_size=200)))
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(valid))] * 2)))
    return valid[:start] + draw(st.sampled_from([b"", b"\0", b"}", b",", b'"', b"\xff", b"1", b"\n"])) + valid[end:]


def one_line(text: str):
    """And a terminal takes it."""
    assert len(text.splitlines()) == 1, text
    text.encode()


def entries(directory) -> dict:
    """What the manifest of a checkpoint has to say."""
    contents = {name: (directory / name).read_bytes() for name in checkpoint.FILES}
    return {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()}


def pristine(place, path: Path) -> bytes:
    return (place.directory.with_name("as_it_was") / path.relative_to(place.directory)).read_bytes()


@fuzz(200, drawn=st.data())
def test_hellaswag(tmp_path_factory, counts, drawn):
    """Examples of it, or one line that says which line is none."""
    path = tmp_path_factory.getbasetemp() / "hellaswag.jsonl"
    path.write_bytes(contents(drawn.draw, b'{"ctx": "A", "endings": ["b", "c", "d", "e"], "label": 0}'))
    counts.injected += 1  # not before, since hypothesis may end a trial while it draws
    try:
        examples = hellaswag.read(path)
        assert len(examples.rows) == 4 * len(examples.labels) > 0 and examples.n_bytes.min() > 0
        counts.harmless += 1
    except rundir.DataError as error:
        one_line(str(error))
        counts.detected += 1


@fuzz(60, drawn=st.data())
def test_text(place, counts, drawn):
    """A data set, or one line that says which line is none, and nothing is left."""
    path = place.directory / "texts" / "text.jsonl"
    path.write_bytes(contents(drawn.draw, b'{"text": "To be"}'))
    code, err = call(text_main, [word.replace("new", "made") for word in VALID["text"]])
    check(code, err, (0, 7), counts)
    assert (place.data.parent / "made").exists() == (code == 0)
    reset(place)


NAIVE = {  # (a file, what one does with it who believes it)
    "manifest.json": lambda value: [value[name]["bytes"] + len(value[name]["sha256"]) for name in checkpoint.FILES],
    "state.json": lambda value: (value["step"] + 1, GPTConfig(**value["model_config"]), value["batch_size"] + 1,
                                 TrainConfig(**value["train_config"]), value["settings"]["data"].upper()),
    "status.json": lambda value: (value["step"] + 1, value["reason"].upper()),
    "metrics.jsonl": lambda value: value["time_s"] + value["step"],
    "data": lambda value: [(shard["file"].upper(), shard["tokens"] + 1) for shard in value["shards"]],
}


NAIVE_ROWS = {"manifest.json": "manifest of a checkpoint", "state.json": "state of a checkpoint",
              "status.json": "config and status", "metrics.jsonl": "metrics", "data": "manifest of data"}


@pytest.mark.parametrize("name", NAIVE)
def test_who_believes_these_files_fails(place, name):
    """The control."""
    folder = {"manifest.json": place.path / "step-00000006", "state.json": place.path / "step-00000006"}
    path = place.data / "manifest.json" if name == "data" else folder.get(name, place.path) / name
    valid = path.read_bytes().splitlines()[0] if name == "metrics.jsonl" else path.read_bytes()
    NAIVE[name](json.loads(valid))
    failed = []

    @fuzz(300, drawn=st.data())
    def read(drawn):
        try:
            NAIVE[name](json.loads(contents(drawn.draw, valid)))
            failed.append(False)
        except Exception:
            failed.append(True)

    read()
    with row(f"fuzzed: {NAIVE_ROWS[name]}") as counts:
        for one in failed:
            counts.control(one)
        assert counts.naive_failed > counts.naive_tried / 2


@fuzz(300, drawn=st.data())
def test_manifest_of_a_checkpoint(place, counts, drawn):
    """Taken only where it says of each file what is true."""
    path, said = place.path / "step-00000006" / "manifest.json", []
    path.write_bytes(contents(drawn.draw, pristine(place, path)))
    counts.injected += 1
    found = checkpoint.newest_valid(place.path, said.append)
    if found == path.parent:
        manifest = json.loads(path.read_text())
        assert {name: manifest[name] for name in checkpoint.FILES} | entries(found) == manifest and not said
    else:
        assert found.name == "step-00000004" and len(said) == 1
        one_line(said[0])
    counts.harmless += found == path.parent
    counts.detected += found != path.parent
    path.write_bytes(pristine(place, path))


@fuzz(40, drawn=st.data())
def test_state_of_a_checkpoint(place, counts, drawn):
    """With a manifest that fits, as if another version had written it."""
    path = place.path / "step-00000006" / "state.json"
    path.write_bytes(contents(drawn.draw, pristine(place, path)))
    (path.parent / "manifest.json").write_text(json.dumps(entries(path.parent)))
    options = ["--run", "run", "--device", "cpu", "--prompt", "!", "--max_new_tokens", "1"]
    check(*call(sample.main, options), (0, 2, 4))
    check(*call(eval.main, ["--run", "run", "--device", "cpu"]), (0, 2, 4, 7))
    check(*call(train_gpt2.main, place.options(**SMALL)), (0, 2), counts)
    reset(place)


@fuzz(40, drawn=st.data(), which=st.sampled_from(["config.json", "status.json", "both"]))
def test_config_and_status(place, counts, drawn, which):
    """Of a run without checkpoints: finished, refused, or made again as it was; never with other settings."""
    path = place.out_dir / "finished"
    before = small.losses(path)
    for name in ["config.json", "status.json"] if which == "both" else [which]:
        (path / name).write_bytes(contents(drawn.draw, pristine(place, path / name)))
    options = SMALL | {"save_every": 0, "run_name": "finished"}
    check(*call(train_gpt2.main, place.options(**options)), (0, 2), counts)
    assert small.losses(path) == before
    check(*call(train_gpt2.main, place.options(**options | {"learning_rate": 0.5, "stop_after": 1})), (0, 2))
    reset(place)


@fuzz(40, drawn=st.data())
def test_metrics(place, counts, drawn):
    """Line n stays the n-th update, and the run ends with the same bits."""
    path = place.path / "metrics.jsonl"
    lines = pristine(place, path).splitlines(keepends=True)
    i = drawn.draw(st.integers(0, len(lines) - 1))
    lines[i] = contents(drawn.draw, lines[i]) + drawn.draw(st.sampled_from([b"", b"\n"]))
    path.write_bytes(b"".join(lines))
    counts.injected += 1
    check(*call(train_gpt2.main, place.options(**SMALL)), (0,))
    expected = place.out_dir / "uninterrupted"
    assert [row["step"] for row in small.metrics(place.path)] == list(range(1, 9))
    assert [row["loss"] for row in small.metrics(place.path)[6:]] == small.losses(expected)[6:]
    assert all(row["time_s"] > 0 for row in small.metrics(place.path)[6:])
    counts.survived += 1
    reset(place)


@fuzz(40, drawn=st.data(), name=st.sampled_from(["config.json", "status.json", "metrics.jsonl"]))
def test_runs_to_compare(place, counts, drawn, name):
    """What is of no use in them is left out and said, or the run is refused."""
    path = place.out_dir / "finished" / name
    lines = pristine(place, path).splitlines(keepends=True) if name == "metrics.jsonl" else [pristine(place, path)]
    i = drawn.draw(st.integers(0, len(lines) - 1))
    lines[i] = contents(drawn.draw, lines[i])
    path.write_bytes(b"".join(lines))
    check(*call(compare.main, ["finished", "other"]), (0, 2), counts)
    if SCALE > 1:  # it plots
        check(*call(compare.main, ["finished", "--card"]), (0, 2))
    reset(place)


@fuzz(40, drawn=st.data())
def test_index_of_a_sweep(place, counts, drawn):
    """What it says is kept where it is of use; the run that is finished is not made again."""
    folder = place.directory / "swept"
    (name,) = (path.name for path in folder.iterdir() if path.is_dir())
    valid = {"runs": {name: {"command": "", "state": "waiting", "attempts": 1, "seconds": 1.0, "halved_to": None}}}
    (folder / "index.json").write_bytes(contents(drawn.draw, json.dumps(valid).encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "ProcessPoolExecutor", Here)
        check(*call(sweep.main, sweep_options(place)), (0,), counts)
    assert json.loads((folder / "index.json").read_text())["runs"][name]["state"] == "finished"
    reset(place)


def sweep_options(place) -> list[str]:
    changes = {"model": None, "run_name": None, "save_every": 0, "out_dir": "swept"}
    return ["--models", "tiny", *place.options(**SMALL | changes)]


@fuzz(40, drawn=st.data())
def test_state_of_what_is_replayed(place, counts, drawn):
    """With a manifest that fits, as if another version had written it."""
    path = place.out_dir / "not_finite" / "not-finite" / "step-00000002" / "state.json"
    path.write_bytes(contents(drawn.draw, pristine(place, path)))
    (path.parent / "manifest.json").write_text(json.dumps(entries(path.parent)))
    check(*call(replay.main, ["--run", "not_finite", "--device", "cpu"]), (0, 2, 4, 7), counts)
    reset(place)


@fuzz(300, drawn=st.data())
def test_manifest_of_data(place, counts, drawn):
    """Taken only with the same shards."""
    path, before = place.data / "manifest.json", open_dataset(place.data).fingerprint
    path.write_bytes(contents(drawn.draw, pristine(place, path)))
    counts.injected += 1
    try:
        dataset = open_dataset(place.data)
        assert dataset.fingerprint == before and dataset.tokenizer in ("gpt2", None)
        counts.harmless += 1
    except rundir.DataError as error:
        one_line(str(error))
        counts.detected += 1
    finally:
        path.write_bytes(pristine(place, path))


@fuzz(200, drawn=st.data())
def test_memory_of_verified_shards(place, counts, drawn):
    """Never a reason to refuse shards that are as they were."""
    path = place.data / "verified.json"
    path.write_bytes(contents(drawn.draw, pristine(place, path)))
    counts.injected += 1
    open_dataset(place.data, small.VOCAB)
    counts.harmless += 1


CHECKPOINT, DATA = "runs/run/step-00000006/", "data/mine/"


@pytest.mark.parametrize(("name", "keys", "value", "command", "expected"), [
    (CHECKPOINT + "manifest.json", [], b"[" * 100_000, "train", 0),
    (CHECKPOINT + "manifest.json", ["state.json", "bytes"], "\ud800\nTraceback", "train", 0),
    (CHECKPOINT + "state.json", ["settings"], [], "train", 2),
    (CHECKPOINT + "state.json", ["settings", "schedule"], "a\nb", "train", 2),
    (CHECKPOINT + "state.json", ["settings", "optimizer"], ..., "train", 0),
    (CHECKPOINT + "state.json", ["tokenizer"], ..., "sample", 2),
    (CHECKPOINT + "state.json", ["model_config"], ..., "sample", 4),
    (CHECKPOINT + "state.json", ["model_config", "n_layer"], -1, "sample", 4),
    ("runs/finished/config.json", ["settings"], [], "finished", 2),
    ("runs/finished/status.json", [], b"[" * 100_000, "finished", 0),
    *(("runs/run/metrics.jsonl", ["time_s"], value, "train", 0) for value in (None, "1", [], math.nan, 1e999, 10**400)),
    (DATA + "verified.json", [], b"[" * 100_000, "train", 0),
    (DATA + "verified.json", ["train_000000.bin", "sha256"], "0" * 64, "train", 0),
    (DATA + "verified.json", ["train_000000.bin", "max_token"], 10**6, "train", 0),
    (DATA + "verified.json", ["train_000000.bin", "max_token"], "1", "train", 0),
    (DATA + "manifest.json", ["shards", 0, "file"], "train_a\nb.bin", "train", 7),
    (DATA + "manifest.json", ["shards", 0, "split"], "a\nb", "train", 7),
    (DATA + "manifest.json", ["shards", 0, "sha256"], "a\nb", "train", 7),
    (DATA + "manifest.json", ["tokenizer"], "gpt3", "train", 7),
])
def test_found_by_fuzzing(place, name, keys, value, command, expected):
    path = place.directory / name
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        first, *others = path.read_text().splitlines() if "jsonl" in name else [path.read_text()]
        inner = content = json.loads(first)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        if value is ...:
            del inner[keys[-1]]
        path.write_text("\n".join([json.dumps(content), *others]) + "\n")
    if "state.json" in name:
        (path.parent / "manifest.json").write_text(json.dumps(entries(path.parent)))
    options = SMALL | ({"save_every": 0, "run_name": "finished"} if command == "finished" else {})
    if command == "sample":
        check(*call(sample.main, ["--run", "run", "--device", "cpu", "--prompt", "!", "--max_new_tokens", "1"]),
              (expected,))
    else:
        check(*call(train_gpt2.main, place.options(**options)), (expected,))
    reset(place)


def test_a_reason_is_one_line_whatever_the_manifest_says(place):
    path, said = place.path / "step-00000006" / "manifest.json", []
    manifest = entries(path.parent)
    manifest["state.json"]["bytes"] = "a\nb\ud800"
    path.write_text(json.dumps(manifest))
    assert checkpoint.newest_valid(place.path, said.append).name == "step-00000004"
    one_line(said[0])
    reset(place)


def test_a_damaged_memory_does_not_reach_a_new_manifest(place):
    path = place.data / "verified.json"
    known = json.loads(path.read_text())
    known["train_000000.bin"]["bytes"] = "7"
    path.write_text(json.dumps(known))
    (place.data / "manifest.json").unlink()
    assert open_dataset(place.data).manifest["totals"]["train"]["bytes"] > 1200
    reset(place)


@pytest.mark.parametrize("changes", [{"run_name": "a" * 256}, {"out_dir": "new/" + "a" * 256}, {"out_dir": "é" * 128}])
def test_a_name_that_is_too_long_leaves_nothing_behind(place, changes):
    """Nor the directories above it."""
    before = small.tree(place.directory)
    code, err = call(train_gpt2.main, place.options(**SMALL | {"out_dir": "new"} | changes))
    assert code == 5 and re.search("256 bytes|File name too long", err) and len(messages(err)) == 1
    assert small.tree(place.directory) == before


def test_as_many_layers_as_take_a_second(place):
    for n_layer in 1025, 2**24:
        code, err = call(train_gpt2.main, place.options(n_layer=n_layer, dry_run=True))
        assert code == 2 and f"n_layer={n_layer} must lie between 1 and 2^10" in small.words(err)
