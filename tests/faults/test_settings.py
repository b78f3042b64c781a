"""A run that goes on with another setting, or other data, is refused by name, unless --allow_change names it."""

import shutil
from dataclasses import asdict

import pytest
import small
from small import call, metrics, steps

import train_gpt2
from configs.recipes import TrainConfig, result_settings
from data.shards import write_shard
from model import GPTConfig
from tests.faults.table import row

OLD = {"n_layer": 2, "n_embd": 32, "n_head": 2, "window_size": 8, "post_norm": True, "optimizer": "muon", "untie": True,
       "save_every": 2, "batch_size": 1, "dtype": "float32"}  # so that every setting below can change alone
CHANGES = {  # setting: (value of the run, value of the next start)
    "sequence_length": (32, 16), "total_batch_tokens": (128, 256), "max_steps": (6, 7), "optimizer": ("muon", "adamw"),
    "learning_rate": (0.01, 0.02), "muon_learning_rate": (0.02, 0.01), "final_lr_fraction": (0.0, 0.1),
    "embedding_learning_rate": (None, 0.1),
    "schedule": ("cosine", "linear"), "decay_fraction": (1.0, 0.5), "warmup_steps": (2, 3), "beta1": (0.9, 0.8),
    "beta2": (0.95, 0.99), "weight_decay": (0.1, 0.2), "grad_clip": (1.0, 0.0), "init_from": (None, "other"),
    "dtype": ("torch.float32", "torch.bfloat16"), "seed": (0, 1),
    "n_layer": (2, 3), "n_head": (2, 4), "n_embd": (32, 64), "vocab_size": (512, 768), "pre_norm": (True, False),
    "post_norm": (True, False), "qk_norm": (False, True), "attention_scale": (None, 0.5), "window_size": (8, 16),
    "window_pattern": ("S", "SL"), "mlp_activation": ("gelu", "relu2"), "untie": (True, False),
    "logit_softcap": (None, 30.0),
}
for name, value in result_settings(TrainConfig(), GPTConfig()).items():  # a field of a new variant
    if value is None or isinstance(value, int | float):
        CHANGES.setdefault(name, (value, not value if isinstance(value, bool) else 2 * (value or 0.5)))
OTHER_WEIGHTS = ("n_layer", "n_embd", "vocab_size", "untie")  # those of the run do not fit
FAULT = "a setting is another when a run goes on, each in turn"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of six steps, stopped after the second."""
    runs = small.Runs(tmp_path_factory.mktemp("stopped"))
    assert runs(**OLD, stop_after=2) == 0
    return runs


@pytest.fixture
def runs(stopped, tmp_path):
    """Goes on with a copy of it."""
    runs = small.Runs(tmp_path, stopped.data)
    shutil.copytree(stopped.out_dir, runs.out_dir)
    return runs


def test_no_setting_is_missing():
    assert CHANGES.keys() == result_settings(TrainConfig(), GPTConfig()).keys() >= asdict(GPTConfig()).keys()


@pytest.mark.parametrize("new", [False, True])
def test_a_run_of_an_older_version_goes_on_as_by_default(runs, capsys, monkeypatch, new):
    """An option that came later: what is usual is what the run was begun with."""
    monkeypatch.setattr(train_gpt2, "result_settings", lambda config, gpt: result_settings(config, gpt) | {
        "later": new and config != TrainConfig()})
    assert runs(**OLD, stop_after=3) == (2 if new else 0)
    assert not new or "was begun with later=False, now it is True" in capsys.readouterr().err


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting(runs, capsys, monkeypatch, name):
    old, new = CHANGES[name]
    options = OLD | {name: new.removeprefix("torch.") if isinstance(new, str) else new, "stop_after": 3}
    before = small.tree(runs.path)
    with row(FAULT) as counts:
        counts.injected += 1
        assert runs(**options) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"error: {runs.path} was begun with {name}={old!r}, now it is {new!r}: "), errors
        assert f"--allow_change {name}\n" in errors and errors.count("\n") == 1 and small.tree(runs.path) == before
        counts.detected += 1

        other = next(key for key in CHANGES if key != name)
        assert runs(**options, allow_change=other) == 2 and f"{name}={old!r}" in capsys.readouterr().err
        code, said = runs(**options, allow_change=name), capsys.readouterr()
        assert f"changed: {name}={old!r}, from now on {new!r}\n" in said.out
        if name in OTHER_WEIGHTS:
            assert code == 2 and "holds the weights of another model" in said.err
        else:
            assert code == 0 and len(metrics(runs.path)) == steps(runs.path)[-1] == 3

        shutil.rmtree(runs.path)
        shutil.copytree(runs.data.parent / "runs", runs.out_dir, dirs_exist_ok=True)
        monkeypatch.setattr(train_gpt2, "find_start", lambda *_: 2)
        counts.control(runs(**options) == 0)  # goes on with whatever it is given


def test_tokens_are_those_that_were_read(runs):
    """128 in each of the two steps before, 256 in each of those after."""
    assert runs(**OLD, stop_after=4, total_batch_tokens=256, allow_change="total_batch_tokens") == 0
    assert [row["tokens"] for row in metrics(runs.path)] == [128, 256, 512, 768]


def test_a_finished_run_without_checkpoints_cannot_become_longer(runs, capsys):
    options = {"run_name": "short", "save_every": 0}
    assert runs(**options, max_steps=2) == 0
    before = small.tree(runs.out_dir / "short")
    assert runs(**options, max_steps=4, allow_change="max_steps") == 2
    assert "is finished and has no checkpoint to go on from: choose another --run_name\n" in capsys.readouterr().err
    assert small.tree(runs.out_dir / "short") == before


# -----------------------------------------------------------------------------
# data


@pytest.fixture
def shards(tmp_path):
    """shards("place", 0, 1): a data set with these shards in this order."""
    def make(name, *seeds):
        small.make_data(tmp_path / name)
        (tmp_path / name / "manifest.json").unlink()
        for i, seed in enumerate(seeds):
            tokens = small.np.random.default_rng(seed).integers(small.VOCAB, size=1200)
            write_shard(tmp_path / name / f"train_{i:06d}.bin", tokens)
        return tmp_path / name

    return make


@pytest.mark.parametrize("seeds", [(0, 2), (1, 0), (0,), (0, 1, 2)],
                         ids=["another shard", "another order", "a shard less", "a shard more"])
def test_other_data(tmp_path, shards, capsys, monkeypatch, seeds):
    runs = small.Runs(tmp_path, shards("data", 0, 1))
    with row("other data, or another order of shards, when a run goes on") as counts:
        assert runs(save_every=2, stop_after=2) == 0
        shutil.copytree(runs.out_dir, tmp_path / "kept")
        changed = {"save_every": 2, "data": shards("other", *seeds)}
        before = small.tree(runs.path)
        capsys.readouterr()
        counts.injected += 1
        assert runs(**changed) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"error: {runs.path} was begun with data=") and "--allow_change data\n" in errors
        assert errors.count("\n") == 1 and small.tree(runs.path) == before
        counts.detected += 1

        same = shards("same", 0, 1)  # under another path
        assert call(train_gpt2.main, runs.options(save_every=2, data=same, stop_after=3)) == 0
        assert runs(**changed, allow_change="data") == 0 and steps(runs.path)[-1] == 6
        shutil.rmtree(runs.out_dir)
        shutil.copytree(tmp_path / "kept", runs.out_dir)
        monkeypatch.setattr(train_gpt2, "find_start", lambda *_: 2)
        counts.control(runs(**changed) == 0)
