"""A loss, gradient or weight that is not finite: where it begins, and what removes it."""

import errno
import math
import shutil

import pytest
import small
import torch
import torch.nn.functional as F
from small import call, make_data, metrics, status, steps

import checkpoint
import finite
import replay
import train_gpt2
from model import GPT, GPTConfig
from rundir import CannotWrite

runs = small.runs


@pytest.fixture
def gelu(monkeypatch):
    """A GELU that is infinite in 16 bits after `from_call` calls."""
    original, calls = F.gelu, [0]

    def gelu(x, approximate):
        calls[0] += 1
        y = original(x, approximate=approximate)
        return y * math.inf if x.dtype == torch.bfloat16 and calls[0] > gelu.from_call else y

    gelu.from_call, gelu.calls = 0, calls
    monkeypatch.setattr(F, "gelu", gelu)
    return gelu


BAD = {"dtype": "bfloat16", "save_every": 1, "keep_last": 9}


def not_finite(runs, gelu, n_steps=2):
    """A run that ends in the step after n_steps. `tiny` has two layers, and the rehearsal is a step too."""
    gelu.from_call = 2 * (1 + n_steps)
    assert runs(**BAD) == 6


def test_a_run_names_where_it_begins(runs, gelu, capsys):
    not_finite(runs, gelu)
    reason = status(runs.path)["reason"]
    assert reason.startswith("step 3: loss nan, gradient norm nan; the first that is not finite: the loss, windows ")
    assert reason.endswith("; python replay.py --run run") and f"error: {reason}\n" in capsys.readouterr().err
    assert status(runs.path)["code"] == 6 and status(runs.path)["step"] == 2
    assert steps(runs.path) == [1, 2] and len(metrics(runs.path)) == 2
    order = train_gpt2.train_order(37, 0, 2, 4)
    assert f"windows {' '.join(map(str, order))};" in reason


def test_its_weights_are_kept_as_they_were(runs, gelu):
    not_finite(runs, gelu)
    kept, saved = runs.path / "not-finite" / "step-00000002", runs.path / "step-00000002"
    assert checkpoint.find_fault(kept) is None
    for name in "model.safetensors", "optim.safetensors":
        assert (kept / name).read_bytes() == (saved / name).read_bytes()


def test_behind_a_gpu_too(runs, gelu, monkeypatch):
    """The next step has been launched, with weights that must not have changed."""
    monkeypatch.setattr(train_gpt2.machine, "runs_behind", lambda device: True)
    gelu.from_call = 2 * 3
    assert runs(**BAD | {"save_every": 2}) == 6
    kept, saved = runs.path / "not-finite" / "step-00000002", runs.path / "step-00000002"
    assert (kept / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "expected"), [
    ("transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"), ("loss", "the loss"),
    ("gradient", "the gradient of transformer.h.0.attn.c_attn.weight"), (None, None)])
def test_the_first_suspect(name, expected):
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=32))

    def forward_backward(inputs, targets):
        loss = model(inputs, targets)[1]
        loss.backward()
        if name == "gradient":
            model.transformer.h[0].attn.c_attn.weight.grad[3, 2] = math.inf
        return loss.detach() * (math.nan if name == "loss" else 1)

    if name and name.startswith("transformer"):
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    idx = torch.randint(32, (2, 8))
    found = finite.find(model, forward_backward, [(idx, idx)] * 2)
    assert found == (expected and (0, expected))


def test_weights_that_are_not_finite_are_not_saved(runs, monkeypatch, capsys):
    original = train_gpt2.update

    def update(model, *arguments):
        report = original(model, *arguments)
        if update.n == 3:
            model.transformer.h[1].mlp.c_proj.weight.data[5, 5] = math.inf
        update.n += 1
        return report

    update.n = 0
    monkeypatch.setattr(train_gpt2, "update", update)
    assert runs(save_every=2, keep_last=9) == 6
    assert steps(runs.path) == [2]
    name = "transformer.h.1.mlp.c_proj.weight"
    assert status(runs.path)["reason"].startswith(
        f"step 5: {name} is not finite after step 4; the first that is not finite: {name}, windows ")
    assert (runs.path / "not-finite" / "step-00000004").is_dir()


def test_the_last_time_counts(runs, gelu):
    """What is kept is of the end that status.json tells of, also where that is an earlier step, or the same again."""
    not_finite(runs, gelu, n_steps=4)
    shutil.rmtree(runs.path / "step-00000004")
    for learning_rate in 1e-2, 2e-2:
        shutil.rmtree(runs.path / "step-00000003")
        gelu.from_call = gelu.calls[0] + 2 * (1 + 1)  # step 3 is good, step 4 is not
        assert runs(**BAD | {"learning_rate": learning_rate}, allow_change="learning_rate") == 6
        (kept,) = checkpoint.list_checkpoints(runs.path / "not-finite")
        assert kept.name == "step-00000003"
        assert checkpoint.read_state(kept)["settings"]["learning_rate"] == learning_rate


def test_weights_that_cannot_be_kept(runs, gelu, monkeypatch, capsys):
    original = checkpoint.save

    def save(run_directory, *arguments, **options):
        if run_directory.name == checkpoint.NOT_FINITE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(run_directory, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    not_finite(runs, gelu)
    assert "No space left" in capsys.readouterr().err and steps(runs.path) == [1, 2]


def test_replay_says_what_removes_it(runs, gelu, capsys):
    not_finite(runs, gelu)
    capsys.readouterr()
    gelu.from_call = 0
    assert call(replay.main, ["--run", "run", "--out_dir", str(runs.out_dir), "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"step 3 of {runs.path}, 4 windows of {runs.data}")
    assert [line.split("  ")[0] for line in out[1:5]] == list(replay.WAYS)
    assert "all is finite" in out[2] and "not finite: the output of transformer.h.0.mlp, windows" in out[1]
    assert out[5] == "finite in float32"


def replayed(runs, capsys) -> list[str]:
    """Whether each of the ways was finite, and the last line."""
    capsys.readouterr()
    assert call(replay.main, ["--run", "run", "--out_dir", str(runs.out_dir), "--device", "cpu"]) == 0
    _, *ways, last = capsys.readouterr().out.splitlines()
    return ["all is finite" in way for way in ways], last


def test_replay_without_what_compiles(runs, gelu, capsys, monkeypatch):
    """Compiled, the model gives infinity: it is made to, since compiling takes half a minute here."""
    not_finite(runs, gelu)
    gelu.from_call = math.inf

    def compile(model):
        forward = model.forward
        model.forward = lambda *inputs: (None, forward(*inputs)[1] * math.inf)

    monkeypatch.setattr(replay, "compiles", lambda option, device: option != "off")
    monkeypatch.setattr(GPT, "compile", compile)
    assert replayed(runs, capsys) == ([False, False, True, False], "finite without torch.compile")


@pytest.mark.parametrize("window_size", [None, 8])
def test_replay_by_plain_kernels(runs, gelu, capsys, monkeypatch, window_size):
    """Attention by any kernel but its definition gives infinity."""
    gelu.from_call = 2 * (1 + 2)
    assert runs(**BAD, window_size=window_size) == 6
    gelu.from_call = math.inf
    attention = F.scaled_dot_product_attention

    def broken(*arguments, **options):
        y = attention(*arguments, **options)
        return y * math.inf if torch.backends.cuda.flash_sdp_enabled() else y

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    assert replayed(runs, capsys) == ([False, False, False, True], "finite by plain kernels")


def test_replay_of_what_does_not_come_back(runs, gelu, capsys):
    not_finite(runs, gelu)
    gelu.from_call = math.inf
    assert call(replay.main, ["--run", str(runs.path), "--device", "cpu"]) == 0
    assert "finite in every way" in capsys.readouterr().out


def test_replay_of_bad_weights(runs, gelu, capsys):
    not_finite(runs, gelu)
    gelu.from_call = math.inf
    kept = runs.path / "not-finite" / "step-00000002"
    model = checkpoint.load_model(kept)
    model.transformer.h[0].attn.c_proj.weight.data[0, 0] = math.nan
    state = checkpoint.read_state(kept)
    checkpoint.save(kept.parent, state.pop("step") + 1, dict(model.named_parameters()), {}, state, 1)
    assert call(replay.main, ["--run", str(runs.path), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("transformer.h.0.attn.c_proj.weight") + out.count("the output of transformer.h.0.attn") == 4
    assert "nothing removes it" in out


@pytest.mark.parametrize("change", ["no run", "sound run", "other data", "damaged"])
def test_replay_bad_input(runs, gelu, capsys, change):
    if change == "sound run":
        assert runs(max_steps=2) == 0
    elif change != "no run":
        not_finite(runs, gelu)
    if change == "other data":
        shutil.rmtree(runs.data)
        make_data(runs.data, seed=1)
    if change == "damaged":
        (runs.path / "not-finite" / "step-00000002" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    expected = 4 if change == "damaged" else 2
    assert call(replay.main, ["--run", str(runs.path), "--device", "cpu"]) == expected
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("change", [
    lambda state: state["train_config"].update(cooldown=1), lambda state: state["model_config"].update(cooldown=1),
    lambda state: state["model_config"].update(n_head=0), lambda state: state.pop("settings"),
    lambda state: state.pop("batch_size"), lambda state: state.pop("train_config"),
    lambda state: state.update(batch_size=None), lambda state: state.update(settings=[])],
    ids=["train", "model", "a value", "no settings", "no batch_size", "no train_config", "None", "a list"])
def test_replay_of_another_version(runs, gelu, capsys, change):
    """Its manifest fits, so that it is what was written."""
    not_finite(runs, gelu)
    kept = runs.path / "not-finite" / "step-00000002"
    weights, state = checkpoint.load_model(kept).named_parameters(), checkpoint.read_state(kept)
    change(state)
    checkpoint.save(kept.parent, state.pop("step") + 1, dict(weights), {}, state, 1)
    capsys.readouterr()
    assert call(replay.main, ["--run", str(runs.path), "--device", "cpu"]) == 4
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "state.json was written by another version" in err and err.count("\n") == 1


def test_a_deterministic_run_is_replayed_as_one(runs, gelu, monkeypatch):
    calls = []
    monkeypatch.setattr(train_gpt2.machine, "make_deterministic", lambda: calls.append(1))
    gelu.from_call = 6
    assert runs(**BAD, deterministic=True) == 6 and len(calls) == 1
    assert replay.main(["--run", str(runs.path)]) == 0 and len(calls) == 2


def test_ends_that_are_no_answer(runs, gelu, monkeypatch, capsys):
    not_finite(runs, gelu)
    capsys.readouterr()
    for error, code, said in (CannotWrite("data/shakespeare cannot be written"), 5, "error: data/shakespeare cannot be"
                              " written\n"), (KeyboardInterrupt(), 130, ""):
        def open_data(*arguments, error=error):
            raise error

        monkeypatch.setattr(replay, "open_data", open_data)
        assert replay.main(["--run", str(runs.path)]) == code and capsys.readouterr().err == said
