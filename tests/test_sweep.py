"""
sweep.py: which runs, what is refused, the queue, and starting again. The queue's own tests have a short program in
place of train_gpt2.py; the others run the real one on `tiny`.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import small
import torch
from small import ROOT, assert_same_result, call, metrics, status, steps, tree

import checkpoint
import machine
import sweep
import train_gpt2
from configs.recipes import TrainConfig, result_settings
from costs.memory import training_mib
from model import GPTConfig

STUB = """
import json, os, sys
from pathlib import Path
run = Path(os.readlink("/proc/self/fd/1").removesuffix(".log"))
calls = run.parent.parent / "calls"
n = calls.read_text().count(f'"{run.name}"') if calls.exists() else 0  # of this run before
call = {"name": run.name, "arguments": sys.argv[1:], "environment": dict(os.environ)}
with open(calls, "a") as file:
    file.write(json.dumps(call) + chr(10))

def finish(val_loss=3.5):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": val_loss}) + chr(10))
    (run / "status.json").write_text(json.dumps({"reason": "finished", "step": 1, "code": 0}))
    sys.exit()

def fail(code, reason):
    print("step 1: 50%", end="", file=sys.stderr)
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(code)
"""


class Sweeps:
    """`sweeps("--seeds", "2")` runs sweep.py in this process, with the tiny options, and returns its exit code."""

    def __init__(self, directory: Path):
        self.runs = small.Runs(directory)
        self.directory, self.folder = directory, directory / "folder"

    def arguments(self, *arguments, **changes) -> list[str]:
        options = {"model": None, "run_name": None, "learning_rate": None, "out_dir": self.folder, "recipe": "default"}
        return [*arguments, *self.runs.options(**options | changes)]

    def __call__(self, *arguments, **changes) -> int:
        return call(sweep.main, self.arguments(*arguments, **changes))

    def start(self, *arguments, guard_s=120, **changes) -> subprocess.Popen:
        """In a process and a session of its own, killed after guard_s."""
        process = subprocess.Popen([sys.executable, ROOT / "sweep.py", *self.arguments(*arguments, **changes)],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.directory,
                                   start_new_session=True)
        guard = threading.Timer(guard_s, process.kill)
        guard.daemon = True
        guard.start()
        return process

    def stub(self, monkeypatch, behaviour: str):
        """From now on this program is what runs, not train_gpt2.py."""
        program = self.directory / "stub.py"
        program.write_text(STUB + behaviour)
        monkeypatch.setattr(sweep, "PROGRAM", program)
        monkeypatch.setattr(sweep, "POLL_S", 0.01)

    def calls(self) -> list[dict]:
        path = self.directory / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def index(self) -> dict:
        return json.loads((self.folder / "index.json").read_text())["runs"]

    def by_seed(self, key: str) -> list:
        """Of the index, where only seeds are swept."""
        return [entry[key] for _, entry in sorted(self.index().items())]


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Sweeps(tmp_path)


# -----------------------------------------------------------------------------
# which runs


def planned(capfd) -> list[list[str]]:
    """What --dry_run printed: of each run the part of the name that the tiny options are not."""
    lines = capfd.readouterr().out.splitlines()
    return [line.split(": ")[0] for line in lines[:-1]]


def test_a_run_that_an_older_version_finished_is_not_repeated(tmp_path):
    """What it did not have is as by default."""
    settings = result_settings(TrainConfig(), GPTConfig())
    older = {name: value for name, value in settings.items() if name not in ("attention_scale", "beta1")}
    (tmp_path / "status.json").write_text(json.dumps({"reason": "finished", "step": 300, "code": 0}))
    (tmp_path / "config.json").write_text(json.dumps({"settings": older}))
    assert sweep.settled(tmp_path, settings)["state"] == "finished"
    for other in {"attention_scale": 0.5}, {"beta1": 0.8}, {"seed": 1}:
        assert not sweep.settled(tmp_path, settings | other)


def test_the_product_and_its_names(sweeps, capfd):
    before = tree(sweeps.directory)
    arguments = ["--models", "tiny,tiny_post_norm_qk_norm_window32", "--learning_rates", "3e-4,1e-3", "--seeds", "2"]
    assert sweeps(*arguments, "--dry_run") == 0
    found = planned(capfd)
    assert len(found) == len(set(found)) == 8
    data = "-data=data-sequence_length=32-total_batch_tokens=128-max_steps=6"
    expected = [f"{model}-vocab_size=512{data}-learning_rate={rate}-warmup_steps=2{seed}"
                for seed in ("", "-seed=1") for rate in ("0.0003", "0.001")
                for model in ("tiny", "tiny_post_norm_qk_norm_window32")]  # models fastest, seeds slowest
    assert found == expected
    assert tree(sweeps.directory) == before


def test_any_field_can_be_swept(sweeps, capfd):
    assert sweeps("--models", "tiny", "--sweep", "window_size=None,8", "--sweep", "qk_norm=True,False",
                  "--sweep", "seed=4,7", "--sweep", "schedule=linear", "--dry_run") == 0
    found = planned(capfd)
    assert len(found) == 8 and all("schedule=linear" in run for run in found)
    assert [run.split("-")[0] for run in found] == ["tiny_qk_norm", "tiny", "tiny_qk_norm_window8", "tiny_window8"] * 2
    assert [run.endswith("seed=4") for run in found] == [True] * 4 + [False] * 4
    assert sweeps("--seeds", "2", "--dry_run", model="tiny", learning_rate=1e-3) == 0  # one value for all
    assert all("learning_rate=0.001" in run for run in planned(capfd))


def test_the_folder(sweeps, capfd):
    """One line has one folder, another product or recipe another one."""
    def folder(*arguments, **changes):
        assert sweeps("--models", "tiny", *arguments, "--dry_run", out_dir=None, **changes) == 0
        return capfd.readouterr().out.split(" in ")[-1].strip()

    first = folder("--seeds", "2")
    assert first.startswith("runs/sweep-seed=0,1-model=tiny-")
    assert folder("--seeds", "2", batch_size=1) == first  # not a part of the result
    others = [folder("--seeds", "3"), folder("--seeds", "2", max_steps=7), folder("--sweep", f"seed={'0' * 300}")]
    assert len({first, *others}) == 4 and max(map(len, others)) < 255
    assert folder("--name", "mine") == "runs/mine"
    assert folder("--sweep", "data=/a/b,/a/c", data=None).count("/") == 1


REFUSED = {
    "unknown model": (["--models", "tiny,d13"], "unknown model 'd13', did you mean"),
    "unknown recipe": (["--sweep", "recipe=none"], "unknown recipe 'none'"),
    "rate out of range": (["--learning_rates", "1e-3,-1"], "learning_rate=-1.0 must lie between"),
    "not a number": (["--learning_rates", "1e-3,x"], "learning_rate"),
    "does not divide": (["--sweep", "batch_size=2,3"], "does not divide"),
    "window": (["--sweep", "window_size=8,64"], "window_size=64 is more than sequence_length=32"),
    "option": (["--nonsense", "1"], "nonsense"),
    "stray word": (["--sweep", "seed=1", "seed=2"], "seed=2"),
    "field": (["--sweep", "nonsense=1,2"], "--sweep nonsense=1,2: use FIELD=VALUE,VALUE"),
    "out_dir swept": (["--sweep", "out_dir=a,b"], "--sweep out_dir=a,b: use"),
    "no values": (["--sweep", "seed"], "seed has an empty value"),
    "empty value": (["--models", "tiny,"], "model=tiny, has an empty value"),
    "no seeds": (["--seeds", "0"], "seeds=0 must lie between 1 and 1000"),
    "seeds as a list": (["--seeds", "4,7"], "4,7"),
    "no slots": (["--slots", "0"], "slots=0 must lie between 1 and 1000"),
    "twice": (["--seeds", "2", "--seed", "3"], "seed is given twice"),
    "twice as =": (["--learning_rates", "1e-3", "--learning-rate=1e-4"], "learning_rate is given twice"),
    "a flag twice": (["--sweep", "qk_norm=True,False", "--no_qk_norm"], "qk_norm is given twice"),
    "swept twice": (["--seeds", "2", "--sweep", "seed=4,7"], "seed is given twice"),
    "the same rate": (["--learning_rates", "1e-3,0.001"], "two runs are tiny"),
    "not in the name": (["--sweep", "batch_size=1,2"], "two runs are tiny"),
    "a name for all": (["--seeds", "2", "--run_name", "mine"], "two runs are mine"),
    "list": (["--list"], "--list is an option of train_gpt2.py"),
    "name and folder": (["--name", "x"], "give one of them"),
    "device": (["--sweep", "device=tpu"], "tpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, sweeps, capfd, monkeypatch):
    arguments, expected = REFUSED[case]
    sweeps.stub(monkeypatch, "finish()")
    models = [] if "--models" in arguments else ["--models", "tiny"]
    before = tree(sweeps.directory)
    changes = {"unknown recipe": {"recipe": None}, "device": {"device": None}}.get(case, {})
    assert sweeps(*models, *arguments, **changes) == 2
    err = capfd.readouterr().err
    assert expected in small.words(err) and "Traceback" not in err
    assert "full helptext" in small.words(err) or (err.startswith("error: ") and err.count("\n") == 1)
    assert tree(sweeps.directory) == before


def test_bad_data_is_found_before_the_first_run(sweeps, capfd, monkeypatch):
    sweeps.stub(monkeypatch, "finish()")
    before = tree(sweeps.directory)
    assert sweeps("--models", "tiny", "--seeds", "2", data=sweeps.directory / "nothing") == 7
    assert "no such data directory" in capfd.readouterr().err
    (sweeps.directory / "file").write_text("")
    before = tree(sweeps.directory)
    assert sweeps("--models", "tiny", out_dir=sweeps.directory / "file" / "folder") == 5
    assert "is not a directory" in capfd.readouterr().err
    assert tree(sweeps.directory) == before and sweeps.calls() == []


def test_a_name_that_its_log_makes_too_long(sweeps, capfd, monkeypatch):
    sweeps.stub(monkeypatch, "finish()")
    before = tree(sweeps.directory)
    assert sweeps("--models", "tiny", run_name="x" * 252) == 5
    assert "a name of 256 bytes, 255 are possible" in capfd.readouterr().err
    assert tree(sweeps.directory) == before
    assert sweeps("--models", "tiny", run_name="x" * 251) == 0
    assert sweeps("--models", "tiny", run_name="x" * 251) == 0  # with its log there


def test_weights_to_start_from_are_checked_before_the_first_run(sweeps, capfd, monkeypatch):
    monkeypatch.chdir(sweeps.directory)
    for base, options in ("base", {}), ("other", {"n_layer": 1}), ("damaged", {}):
        assert sweeps.runs(run_name=base, save_every=6, **options) == 0
    (sweeps.runs.out_dir / "damaged" / "step-00000006" / "model.safetensors").write_bytes(b"")
    sweeps.stub(monkeypatch, "finish()")
    before = tree(sweeps.directory)
    for base, code, expected in (("bsae", 2, "no run 'bsae' with a checkpoint. In runs: base, damaged, other"),
                                 ("other", 2, "step-00000006 holds the weights of another model"),
                                 ("runs/other", 2, "holds the weights of another model"),
                                 ("damaged", 4, "no valid checkpoint in runs/damaged")):
        capfd.readouterr()
        assert sweeps("--models", "tiny", "--seeds", "2", init_from=base) == code
        err = capfd.readouterr().err
        assert err.startswith("error: ") and expected in err and err.count("\n") == 1
    assert tree(sweeps.directory) == before and sweeps.calls() == []


@pytest.mark.parametrize("given", ["base", "runs/base", "the path", "in the folder"])
def test_runs_that_start_from_another(given, sweeps, capfd, monkeypatch, one_thread):
    """With the result of one started so; a name is one under runs, or in the folder, where they find it themselves."""
    monkeypatch.chdir(sweeps.directory)
    assert sweeps.runs(run_name="base", save_every=6) == 0
    options = {"save_every": 6, "learning_rate": 1e-3}
    assert sweeps.runs(run_name="expected", init_from="base", **options) == 0
    init_from = {"the path": sweeps.runs.out_dir / "base", "in the folder": "base"}.get(given, given)
    if given == "in the folder":
        sweeps.folder.mkdir()
        (sweeps.runs.out_dir / "base").rename(sweeps.folder / "base")
    for _ in range(2):
        assert sweeps("--models", "tiny", init_from=init_from, **options) == 0
    assert "1 runs, 1 done before" in capfd.readouterr().out
    [(run, entry)] = sweeps.index().items()
    assert run.endswith("-init_from=base") and entry["attempts"] == 1
    assert_same_result(sweeps.folder / run, sweeps.runs.out_dir / "expected")
    settings = json.loads((sweeps.folder / run / "config.json").read_text())["settings"]
    assert settings["init_from"] == ("runs/base" if given == "base" else str(init_from))
    assert settings["init_weights"] == checkpoint.weights_sha256(
        checkpoint.find("base", str(sweeps.folder if given == "in the folder" else sweeps.runs.out_dir)))


def test_torchrun_is_refused(sweeps, capfd, monkeypatch):
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 2)
    assert sweeps("--models", "tiny") == 2
    assert "without torchrun" in capfd.readouterr().err


def test_gpus(sweeps, monkeypatch):
    """One run on each, of those that the user's own setting leaves; found without a GPU by means of stand-ins."""
    parse = train_gpt2.parse_options
    monkeypatch.setattr(train_gpt2, "parse_options", lambda words: (parse(words)[0], torch.device("cuda", 0)))
    monkeypatch.setattr(train_gpt2, "plan", lambda config, gpt_config, device, runs_beside: (config, 4, 1))
    for setting, n_gpus, expected in (None, 3, "012"), ("5,4,6", 3, "546"), ("4,9,5", 1, "4"):  # there is no 9
        monkeypatch.setattr(torch.cuda, "device_count", lambda n_gpus=n_gpus: n_gpus)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if setting:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        _, places = sweep.plan_runs({"seed": ["0", "1"]}, ["--device", "cpu"], 1)
        assert places == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in expected]
    _, places = sweep.plan_runs({}, ["--device", "cpu"], 2)
    assert places == [{"CUDA_VISIBLE_DEVICES": "4", "SWEEP_RUNS_BESIDE": "1"}] * 2


def test_runs_at_a_time_share_the_memory(sweeps, monkeypatch):
    """Each has a micro-batch of which two fit, where one alone has a larger one; a size that is given stays."""
    options = sweeps.arguments(model="tiny", out_dir=None, kernels="plain", sequence_length=2048,
                               total_batch_tokens=8 * 2048)
    [alone], _ = sweep.plan_runs({}, options, 1)
    mib = 2.2 * training_mib(alone.config, alone.gpt_config, 8, 1)  # in float32 twice the prediction
    monkeypatch.setattr(machine, "total_mib", lambda device: mib)
    for slots, batch_size, added in (1, 8, []), (2, 4, ["--batch_size", "4"]), (4, 1, ["--batch_size", "1"]):
        [run], _ = sweep.plan_runs({}, options, slots)
        assert (run.name, run.batch_size, run.arguments) == (alone.name, batch_size, options + added)
    [run], _ = sweep.plan_runs({}, [*options, "--batch_size", "8"], 2)
    assert run.batch_size == 8 and run.arguments == [*options, "--batch_size", "8"]


# -----------------------------------------------------------------------------
# the queue


def test_a_failing_run_does_not_stop_the_others(sweeps, capfd, monkeypatch):
    sweeps.stub(monkeypatch, """
seed = int(sys.argv[sys.argv.index("--seed") + 1])
if seed == 1: fail(7, "shard: CUDA error: damaged")
if seed == 2: fail(6, "step 4: loss nan")
if seed == 3: os.kill(os.getpid(), 9)
if seed == 4: sys.exit(1)
finish(seed + 0.25)
""")
    assert sweeps("--models", "tiny", "--seeds", "6") == 1
    assert sweeps.by_seed("state") == ["finished", "failed", "diverged", "failed", "failed", "finished"]
    assert sweeps.by_seed("code") == [0, 7, 6, -9, 1, 0]
    assert sweeps.by_seed("val_loss") == [0.25, None, None, None, None, 5.25]
    assert sweeps.by_seed("attempts") == [1] * 6 and min(sweeps.by_seed("seconds")) > 0
    out, err = capfd.readouterr()
    for line in ("seed=5: finished, val loss 5.2500, 0.0 min", "seed=1: failed (shard: CUDA error: damaged), 0.0 min",
                 "seed=2: diverged (step 4: loss nan), 0.0 min", "seed=3: failed (killed by SIGKILL)",
                 "seed=4: failed (exit code 1, see ", "2 finished\n1 diverged: tiny",
                 f"python compare.py {sweeps.folder}"):
        assert line in out
    [failed] = re.findall("^3 failed: (.*)$", out, re.MULTILINE)  # of which there is no metrics.jsonl
    assert failed.split(", ") == [run for run, entry in sweeps.index().items() if entry["state"] == "failed"]
    assert "6.0/6 runs" in err and "left" in err
    log = next(sweeps.folder.glob("*-seed=1.log")).read_text()
    assert log.startswith("$ ") and "--seed 1" in log and "damaged" in log

    # again: what failed is tried again, what diverged without a directory of its own too
    sweeps.stub(monkeypatch, "finish()")
    assert sweeps("--models", "tiny", "--seeds", "6") == 0
    assert set(sweeps.by_seed("state")) == {"finished"}


def test_diverged_runs_are_results(sweeps, capfd, monkeypatch):
    """A real one is kept, named, no failure, and not tried again, unless the line says something else."""
    options = {"learning_rate": 10, "weight_decay": 10, "max_steps": 30, "run_name": None, "recipe": "default"}
    assert sweeps.runs(**options, out_dir=sweeps.folder) == 6
    sweeps.stub(monkeypatch, "finish()")
    assert sweeps("--models", "tiny", **options) == 0
    assert sweeps.calls() == []
    [(run, entry)] = sweeps.index().items()
    assert (entry["state"], entry["code"], entry["attempts"]) == ("diverged", 6, 0) and entry["reason"][:5] == "step "
    out = capfd.readouterr().out
    assert "1 runs, 1 done before" in out and f"1 diverged: {run}" in out and "python compare.py" in out
    small.make_data(sweeps.directory / "other" / "data", seed=1)  # the same name, but not the same run
    assert sweeps("--models", "tiny", **options, data=sweeps.directory / "other" / "data") == 0
    assert len(sweeps.calls()) == 1


def test_out_of_memory_halves_the_micro_batch(sweeps, capfd, monkeypatch):
    sweeps.stub(monkeypatch, """
words = sys.argv[1:]
size = int(words[len(words) - words[::-1].index("--batch_size")]) if "--batch_size" in words else 4
if size > 1: fail(1, "out of memory: --batch_size is predicted to save (CUDA out of memory. Tried)")
finish()
""")
    assert sweeps("--models", "tiny", "--seeds", "1") == 0
    given = [call["arguments"][-2:] for call in sweeps.calls()]
    assert given == [["--out_dir", str(sweeps.folder)], ["--batch_size", "2"], ["--batch_size", "1"]]
    assert sweeps.by_seed("halved_to") == [1] and sweeps.by_seed("attempts") == [3]
    out = capfd.readouterr().out
    assert "out of memory with --batch_size 4, again with 2, at the same 128 tokens a step" in out
    assert "out of memory with --batch_size 2, again with 1" in out and "finished, val loss" in out


def test_out_of_memory_with_one_sequence_is_a_failure_and_the_size_is_kept(sweeps, capfd, monkeypatch):
    sweeps.stub(monkeypatch, 'fail(1, "out of memory: no option saves anything")')
    assert sweeps("--models", "tiny", batch_size=4) == 1
    assert len(sweeps.calls()) == 3 and sweeps.by_seed("state") == ["failed"]
    assert sweeps("--models", "tiny", batch_size=4) == 1  # the same line: no larger one is tried again
    assert len(sweeps.calls()) == 4 and sweeps.by_seed("attempts") == [4]
    assert sweeps("--models", "tiny", batch_size=2) == 1  # another line begins with what it says
    assert len(sweeps.calls()) == 6


@pytest.mark.parametrize("cache", [None, "/somewhere"])
def test_what_runs_have_in_common(cache, sweeps, monkeypatch):
    """Their threads, and torch's cache of what is compiled: its own place for it, or the user's."""
    sweeps.stub(monkeypatch, "finish()")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if cache:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert sweeps("--models", "tiny", "--seeds", "3", "--slots", "3") == 0
    finally:
        torch.set_num_threads(torch_threads)
    environments = [call["environment"] for call in sweeps.calls()]
    added = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2", "TQDM_MININTERVAL": "10",
             "SWEEP_RUNS_BESIDE": "2"}
    assert environments == [os.environ | added] * 3  # so that no run has a cache of its own
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "4")
    assert sweeps("--models", "tiny", "--sweep", "seed=3") == 0
    assert sweeps.calls()[-1]["environment"] == os.environ | {"TQDM_MININTERVAL": "10"}
    assert len(sweeps.index()) == 4  # a second line in the same folder adds to the index


def test_the_bar_says_how_long_it_takes_yet(sweeps, capfd, monkeypatch):
    sweeps.stub(monkeypatch, """
import time
run.mkdir()
(run / "metrics.jsonl").write_text(3 * chr(10))
time.sleep(1.5)
finish()
""")
    assert sweeps("--models", "tiny", max_steps=6) == 0
    found = re.findall(r" 0\.5/1 runs, \d\d:(\d\d), \d\d:(\d\d) left", capfd.readouterr().err)
    assert ("01", "01") in found  # half of it has taken as long


def test_one_run_on_each_gpu(sweeps, monkeypatch):
    sweeps.stub(monkeypatch, """
import time
own = run.with_name(f"on {os.environ['CUDA_VISIBLE_DEVICES']} {run.name}")
own.touch()
while len(found := list(run.parent.glob("on *"))) < 2 and calls.read_text().count(chr(10)) < 8:  # waits for another run
    time.sleep(0.001)
own.unlink()
if len({path.name.split()[1] for path in found}) < len(found): fail(1, f"together: {found}")
finish()
""")
    runs, _ = sweep.plan_runs({"seed": list("01234567")}, sweeps.arguments(model="tiny", out_dir=None), 1)
    stop = type("Stop", (), {"received": None})
    sweeps.folder.mkdir()
    entries = sweep.sweep(runs, {run.name: {} for run in runs},
                          [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("3", "5")], sweeps.folder, stop)
    assert [entry["state"] for entry in entries.values()] == ["finished"] * 8
    used = [call["environment"]["CUDA_VISIBLE_DEVICES"] for call in sweeps.calls()]
    assert sorted(used[:2]) == ["3", "5"] and len(used) == 8


@pytest.mark.gpu
def test_gpu_sweep(sweeps):
    """Real runs, more than there are GPUs: each is compiled, and sees one GPU."""
    n = torch.cuda.device_count() + 1
    process = sweeps.start("--models", "tiny", "--seeds", str(n), device="cuda", guard_s=600)  # CUDA is in use in this
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert sweeps.by_seed("state") == ["finished"] * n, sweeps.by_seed("reason")
    for run in sweeps.index():
        config = json.loads((sweeps.folder / run / "config.json").read_text())
        assert config["environment"]["gpus"] == 1 and config["environment"]["driver"]


def test_a_signal_before_a_run_listens(sweeps, capfd, monkeypatch):
    sweeps.stub(monkeypatch, "import signal; os.kill(os.getppid(), signal.SIGTERM); signal.pause()")
    assert sweeps("--models", "tiny", "--seeds", "3") == 75
    assert sweeps.by_seed("state") == ["stopped", "waiting", "waiting"] and len(sweeps.calls()) == 1
    out = capfd.readouterr().out
    assert "stopped (killed by SIGTERM)" in out and "2 waiting: tiny" in out and "the same command continues" in out


def test_a_folder_in_use_is_refused(sweeps, capfd, monkeypatch):
    sweeps.stub(monkeypatch, "finish()")
    sweeps.folder.mkdir()
    with open(sweeps.folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = tree(sweeps.folder)
        assert sweeps("--models", "tiny") == 3
        assert "is in use by another process" in capfd.readouterr().err and tree(sweeps.folder) == before
    assert sweeps("--models", "tiny") == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"runs": 3}', '{"runs": {"RUN": 3}}', "[" * 100_000,
                                     '{"runs": {"RUN": {"command": "COMMAND", "attempts": "x", "seconds": null}}}'])
def test_a_damaged_index_is_made_anew(content, sweeps, monkeypatch):
    sweeps.stub(monkeypatch, "finish()")
    assert sweeps("--models", "tiny") == 0
    [(run, entry)] = sweeps.index().items()
    content = content.replace("RUN", run).replace("COMMAND", entry["command"])
    (sweeps.folder / "index.json").write_text(content)
    assert sweeps("--models", "tiny") == 0
    assert sweeps.index() == {run: entry | {"seconds": sweeps.by_seed("seconds")[0]}}


def test_an_index_that_cannot_be_written_ends_the_sweep(sweeps, capfd, monkeypatch):
    """With the runs under way stopped first."""
    sweeps.stub(monkeypatch, "import signal, time; signal.sigwait([signal.SIGTERM])")
    written = []

    def full(path, value):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep, "write_json", full)
    assert sweeps("--models", "tiny", "--seeds", "3", "--slots", "2") == 5
    assert "No space left" in capfd.readouterr().err


# -----------------------------------------------------------------------------
# real runs


def test_end_to_end(sweeps, capfd, one_thread):
    arguments = ["--models", "tiny,tiny_post_norm_qk_norm_window32", "--seeds", "2", "--slots", "2"]
    options = {"learning_rate": 1e-3, "val_every": 3, "save_every": 6}
    assert sweeps(*arguments, **options) == 0
    index = sweeps.index()
    assert len(index) == 4 and {entry["state"] for entry in index.values()} == {"finished"}
    out = capfd.readouterr().out
    for run, entry in index.items():
        assert json.loads((sweeps.folder / run / "config.json").read_text())["environment"]["runs_beside"] == 1
        assert entry["val_loss"] == metrics(sweeps.folder / run)[-1]["val_loss"]
        assert f"{run}: finished, val loss {entry['val_loss']:.4f}, 0." in out
    assert sweeps.runs(**options, seed=1) == 0
    assert_same_result(sweeps.folder / list(index)[2], sweeps.runs.path)

    # the same line again runs nothing
    before = tree(sweeps.folder)
    assert sweeps(*arguments, **options) == 0
    assert "4 runs, 4 done before" in capfd.readouterr().out
    assert {path for path, found in tree(sweeps.folder).items() if before.get(path) != found} <= {
        str(sweeps.folder), str(sweeps.folder / "index.json")}
    assert sweeps.index() == index


NO_ROOM = """
import torch, rundir, train_gpt2
forward = train_gpt2.GPT.forward

def no_room(self, idx, targets=None):
    if len(idx) > 2:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    return forward(self, idx, targets)

train_gpt2.GPT.forward = no_room
rundir.leave(train_gpt2.main())
"""


def test_out_of_memory(sweeps, capfd, monkeypatch, one_thread):
    """A run that has no room for more than two sequences goes on with two, with the result of one told so."""
    program = sweeps.directory / "no_room.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})" + NO_ROOM)
    monkeypatch.setattr(sweep, "PROGRAM", program)
    options = {"learning_rate": 1e-3, "save_every": 6}
    assert sweeps("--models", "tiny", **options) == 0
    assert "out of memory with --batch_size 4, again with 2, at the same 128 tokens a step" in capfd.readouterr().out
    [(run, entry)] = sweeps.index().items()
    assert (entry["state"], entry["attempts"], entry["halved_to"]) == ("finished", 2, 2)
    assert sweeps.runs(**options, batch_size=2) == 0
    assert_same_result(sweeps.folder / run, sweeps.runs.path)


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


LONG = {"max_steps": 400, "save_every": 20, "val_every": 100, "learning_rate": 1e-3}


@pytest.mark.parametrize(("how", "slots"), [("kill -9", 1), ("kill -9", 2), ("Ctrl-C", 1)])
def test_starting_again(how, slots, sweeps, capfd, one_thread):
    """A finished run is not repeated, those under way go on, to the result of ones that were not stopped."""
    for seed in range(1 + slots):
        assert sweeps.runs(**LONG, seed=seed, run_name=None, recipe="default") == 0
    expected = sorted(path for path in sweeps.runs.out_dir.iterdir())
    first, *others = (sweeps.folder / path.name for path in expected)
    sweeps.folder.mkdir()
    expected[0].rename(first)
    before = tree(first)

    line = ["--models", "tiny", "--seeds", str(1 + slots), "--slots", str(slots)]
    process = sweeps.start(*line, **LONG)
    until(lambda: all(map(steps, others)))
    if how == "kill -9":
        process.kill()
        process.wait()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait() == 75, process.stdout.read()
        assert "the same command continues" in process.stdout.read()
        assert sweeps.by_seed("state") == ["finished", "stopped"]
    for run in others:
        with open(run / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the run's process
        assert 0 < steps(run)[-1] < LONG["max_steps"]
        if how == "kill -9":
            assert not (run / "status.json").exists()  # it was killed as well
        else:
            assert status(run)["reason"] == "SIGTERM"  # of the sweep, and not of the terminal

    assert sweeps(*line, **LONG) == 0
    assert f"{1 + slots} runs, 1 done before" in capfd.readouterr().out
    assert tree(first) == before
    assert set(sweeps.by_seed("state")) == {"finished"} and sweeps.by_seed("attempts") == [0] + slots * [2]
    for run, path in zip(others, expected[1:], strict=True):
        assert_same_result(run, path)
        assert "resuming from" in (sweeps.folder / f"{run.name}.log").read_text()
