"""The command that measures on GPUs, on the CPU: its trials, and what it says of those that fail."""

import json
import sys

from tests.faults import gpu


def run(monkeypatch, out, *arguments) -> tuple[int, dict]:
    """Exit code and what is in the file."""
    command = ["gpu", "--device", "cpu", "--out", str(out), "--work", str(out.parent), "--slots", "2", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    return gpu.main(), json.loads(out.read_text())


def test_all_of_it_with_tiny_models(tmp_path, monkeypatch, capsys):
    code, found = run(monkeypatch, tmp_path / "out.json", "--only",
                      "adamw deterministic|unkilled|kill|resume (7|without)|save|two, --max-restarts 1|^two$")
    told = capsys.readouterr().out
    assert code == 0 and found["failed"] == {} and found["not_run"] == [], told
    measured = found["figures"]
    assert measured["same_seed"]["tiny adamw deterministic"]["bitwise"]
    assert measured["resume"]["resume 7"]["bitwise"]
    assert measured["resume"]["resume without its moments"]["first_step_that_differs"] in (8, 9)
    assert measured["kill"]["kills"] == measured["kill"]["survived_bitwise"] > 0
    assert measured["two"]["two, --max-restarts 1"]["bitwise"]
    assert measured["save"]["save_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def same_seed(value):
    return {"step": 1, "tensors": {"w": value}, "rows": [{"step": 1, "loss": float(value)}]}


def test_a_trial_that_fails_is_recorded_and_stops_no_other(tmp_path, monkeypatch, capsys):
    names = [f"{time_} tiny adamw deterministic" for time_ in ("first", "second")]
    def fails(lab, place, gpus):
        raise OSError(f"nothing in {place}")

    shared = {"unkilled": (fails, (), {}), **{name: (lambda *_: same_seed(1), (), {}) for name in names}}
    monkeypatch.setattr(gpu, "trials", lambda size: (shared, {}, {}))
    code, found = run(monkeypatch, tmp_path / "out.json")
    assert code == 1 and found["failed"] == {"unkilled": "OSError: nothing in unkilled"}
    assert str(tmp_path) not in json.dumps(found)
    assert found["figures"]["same_seed"]["tiny adamw deterministic"]["bitwise"]
    assert "failed or not run: unkilled" in capsys.readouterr().out


def test_trials_that_say_nothing_useful_are_written_and_fail(tmp_path, monkeypatch):
    names = [f"{time_} tiny adamw deterministic" for time_ in ("first", "second")]
    monkeypatch.setattr(gpu, "trials", lambda size: ({name: (lambda *_: {}, (), {}) for name in names}, {}, {}))
    code, found = run(monkeypatch, tmp_path / "out.json")
    assert code == 1 and found["figures"] == {} and set(found["trials"]) == set(names)


def test_what_does_not_hold_is_said(tmp_path, monkeypatch, capsys):
    names = [f"{time_} tiny adamw deterministic" for time_ in ("first", "second")]
    shared = {name: (lambda *_, i=i: same_seed(i), (), {}) for i, name in enumerate(names)}
    monkeypatch.setattr(gpu, "trials", lambda size: (shared, {}, {}))
    code, _ = run(monkeypatch, tmp_path / "out.json")
    assert code == 1
    told = capsys.readouterr().out
    assert "first differs in step 1, the loss by 1.0e+00" in told and "does not hold" in told


def test_at_the_deadline_it_ends_what_runs_and_writes_the_rest(tmp_path, monkeypatch):
    code, found = run(monkeypatch, tmp_path / "out.json", "--deadline_s", "1")
    assert code == 1 and found["not_run"]
    assert found["failed"] and all(gpu.DEADLINE in error for error in found["failed"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
