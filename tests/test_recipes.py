"""Options, recipes, the run's name, the schedule, and what is refused before anything is written."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

import pytest
import small
import torch
from small import VOCAB, T, call, tree, words

import train_gpt2
from configs.recipes import RECIPES, TrainConfig, recipe, restored, run_name
from configs.variants import VARIANTS, model_name
from model import GPTConfig

runs = small.runs
FIELDS = [pytest.param(f, id=f.name) for f in (*fields(TrainConfig), *fields(GPTConfig))]
FLOATS = [f.name for f in fields(TrainConfig) if f.type is float]


def parse(*arguments):
    """(TrainConfig, GPTConfig) on a machine without a GPU."""
    options, _ = train_gpt2.parse_options(["--device", "cpu", *arguments])
    return options.train, options.gpt


# -----------------------------------------------------------------------------
# options

OTHER = {  # a value that is not the default, where a rule below does not find one; some need a second option
    "model": "tiny", "recipe": "short700", "data": "fineweb10B", "out_dir": "elsewhere", "run_name": "mine",
    "batch_size": 1, "sequence_length": 512, "total_batch_tokens": 4096, "stop_after": 3, "init_from": "other",
    "device": "cpu", "window_backend": "blocked", "kernels": "plain", "n_head": 6, "n_embd": 384,
    "window_size": 100, "window_pattern": "SL", "logit_softcap": 30.0, "allow_change": ("seed", "data"),
    "embedding_learning_rate": 0.5, "attention_scale": 0.25,
}
NEEDS = {"pre_norm": ["--post_norm"], "window_pattern": ["--window_size", "64"]}


def other(field, default):
    if field.name in OTHER:
        return OTHER[field.name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 or 0.25
    return next(choice for choice in get_args(field.type) if choice != default)  # of a Literal, if there is another


def everything(configs):
    return {f.name: getattr(config, f.name) for config in configs for f in fields(config)}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_an_option(field):
    needs = NEEDS.get(field.name, [])
    before = everything(parse(*needs))
    value = other(field, before[field.name])
    argument = [f"--{'' if value else 'no_'}{field.name}"] if isinstance(value, bool) else [
        f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    assert field.name == "device" or before[field.name] != value
    after = everything(parse(*argument, *needs))
    assert after[field.name] == value
    if field.name not in ("model", "recipe"):  # these two choose defaults of others
        assert after == before | {field.name: value}


def test_option_beats_recipe_beats_default():
    assert parse("--recipe", "short700")[0] == replace(RECIPES["short700"], device="cpu")
    assert parse("--recipe", "short700")[0].learning_rate == 1.5e-3 != TrainConfig().learning_rate
    for arguments in (["--learning_rate", "1e-4", "--recipe", "short700"],
                      ["--recipe", "short700", "--learning_rate", "1e-4"]):
        config, _ = parse(*arguments)
        assert (config.learning_rate, config.warmup_steps, config.max_steps) == (1e-4, 70, 700)
        assert config.weight_decay == TrainConfig().weight_decay
    # an option that says the default still beats the recipe
    assert parse("--recipe", "short700", "--learning_rate", "6e-4")[0].learning_rate == 6e-4


def test_a_recipe_may_have_a_model():
    config, gpt = parse("--recipe", "fast")
    assert config.model == RECIPES["fast"].model != TrainConfig.model and gpt == VARIANTS[config.model]
    config, gpt = parse("--recipe", "fast", "--model", "d12_qk_norm", "--n_head", "6")
    assert config == replace(RECIPES["fast"], device="cpu", model="d12_qk_norm") and gpt.n_head == 6
    assert parse("--recipe", "short700")[0].model == TrainConfig.model


def test_option_beats_variant():
    _, config = parse("--window_size", "128", "--model", "d12_post_norm_qk_norm_window256_SSSL")
    assert config == replace(VARIANTS["d12_post_norm_qk_norm_window256_SSSL"], window_size=128)
    assert parse("--model", "d12_window256", "--window_size", "None")[1] == VARIANTS["d12"]
    assert parse("--model", "d12_qk_norm", "--no_qk_norm")[1] == VARIANTS["d12"]
    assert model_name(parse("--model", "tiny", "--n_layer", "3", "--post_norm")[1]) == "d3_2heads_64wide_post_norm"


def test_without_a_recipe_the_machine_chooses(runs, capsys):
    assert parse()[0] == replace(RECIPES["cpu"], device="cpu")
    assert parse("--recipe", "default")[0] == replace(RECIPES["default"], device="cpu")
    assert runs(dry_run=True) == 0
    assert "recipe cpu" in capsys.readouterr().out
    assert runs(dry_run=True, recipe="default") == 0
    assert "recipe cpu" not in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_divide(name, runs):
    """Each recipe is named by its key, and is a plan for 1 and 8 processes' worth of sequences."""
    config = recipe(name)
    assert config.recipe == name and config.total_batch_tokens % config.sequence_length == 0
    _, batch_size, accumulation = train_gpt2.plan(replace(config, device="cpu"), VARIANTS["d12"], torch.device("cpu"))
    assert batch_size * accumulation * config.sequence_length == config.total_batch_tokens


def test_the_design_of_the_cpu_recipe():
    cpu = RECIPES["cpu"]
    assert (cpu.total_batch_tokens, cpu.sequence_length, cpu.max_steps, cpu.val_tokens) == (1024, 1024, 20, 4096)


# -----------------------------------------------------------------------------
# the run's name

DO_NOT_CHANGE_THE_RESULT = {
    "model", "out_dir", "run_name", "batch_size", "stop_after", "val_every", "val_tokens", "save_every", "keep_last",
    "resume", "verify_data", "device", "compile", "window_backend", "kernels", "recompute_gelu", "wandb",
    "hang_timeout_s", "allow_change", "deterministic",
}  # the model is in the name already


@pytest.mark.parametrize("field", [pytest.param(f, id=f.name) for f in fields(TrainConfig)])
def test_run_name_has_what_changes_the_result(field):
    usual = RECIPES["default"]
    if field.name == "run_name":
        return
    value = "cuda" if field.name == "device" else other(field, getattr(usual, field.name))
    name = run_name(replace(usual, **{field.name: value}), "d12")
    if field.name in DO_NOT_CHANGE_THE_RESULT:
        assert name == "d12"
    else:
        assert f"-{field.name}={value}" in name and name.startswith("d12-")
    if field.name not in DO_NOT_CHANGE_THE_RESULT | {"recipe"}:
        assert name == f"d12-{field.name}={value}"


def test_run_names():
    def name(*arguments):
        config, gpt_config = parse(*arguments)
        return run_name(config, model_name(gpt_config))

    assert name("--recipe", "default") == "d12"
    assert name("--recipe", "short700") == "d12-recipe=short700"
    assert name("--recipe", "short700", "--max_steps", "900") == "d12-recipe=short700-max_steps=900"
    assert name("--recipe", "short700", "--learning_rate", "1.5e-3") == "d12-recipe=short700"
    both = name("--recipe", "default", "--model", "d12_qk_norm", "--learning_rate", "1e-3", "--seed", "2")
    assert both == "d12_qk_norm-learning_rate=0.001-seed=2"
    assert name("--recipe", "default", "--model", "tiny", "--vocab_size", "512") == "tiny-vocab_size=512"
    assert name("--recipe", "default", "--data", "/a/b/books", "--init_from", "/runs/old") == (
        "d12-data=books-init_from=old")
    assert name("--run_name", "mine", "--seed", "3") == "mine"


def test_the_run_is_in_the_directory_of_its_name(runs):
    changes = {"run_name": None, "recipe": "default", "seed": 5, "n_layer": 1}
    assert runs(**changes, max_steps=2) == 0
    expected = ("d1_2heads_64wide-vocab_size=512-data=data-sequence_length=32-total_batch_tokens=128"
                "-max_steps=2-learning_rate=0.01-warmup_steps=2-seed=5")
    assert [path.name for path in runs.out_dir.iterdir()] == [expected]


# -----------------------------------------------------------------------------
# refused

REFUSED = {
    "unknown option": (["--learnin_rate", "1"], ["learnin_rate"]),
    "misspelt choice": (["--schedule", "cosin"], ["schedule", "cosine", "linear"]),
    "unknown optimizer": (["--optimizer", "sgd"], ["optimizer", "adamw"]),
    "unknown dtype": (["--dtype", "float16"], ["dtype", "float32", "bfloat16"]),
    "word for an int": (["--max_steps", "many"], ["max_steps"]),
    "float for an int": (["--max_steps", "10.5"], ["max_steps"]),
    "word for a float": (["--beta1", "high"], ["beta1"]),
    "option without a value": (["--seed"], ["seed"]),
    "boolean with a value": (["--qk_norm", "maybe"], ["maybe"]),
    "no model": (["--model", ""], ["unknown model ''", *VARIANTS]),
    "a model of the name None": (["--model", "None", "--recipe", "fast"], ["unknown model 'None'"]),
    "unknown model": (["--model", "tinny"], ["'tinny'", "did you mean tiny?", *VARIANTS]),
    "unknown recipe": (["--recipe", "faster"], ["'faster'", *RECIPES]),
    "heads do not divide": (["--n_embd", "65"], ["n_embd=65", "n_head=2"]),
    "odd head": (["--n_embd", "66"], ["33", "even"]),
    "no layers": (["--n_layer", "0"], ["n_layer=0", "1"]),
    "no norm": (["--no_pre_norm"], ["pre_norm", "post_norm"]),
    "no window": (["--window_size", "0"], ["window_size=0", "1"]),
    "window too long": (["--window_size", "33"], ["window_size=33", "sequence_length=32"]),
    "pattern without window": (["--window_pattern", "SL"], ["window_pattern", "window_size"]),
    "backend without window": (["--window_backend", "blocked"], ["window_backend", "window_size"]),
    "flex on a CPU": (["--window_size", "8", "--window_backend", "flex"], ["window_backend", "flex", "cpu"]),
    "unknown backend": (["--window_size", "8", "--window_backend", "fast"], ["window_backend", "flex", "blocked"]),
    "batch does not divide": (["--batch_size", "3"], ["total_batch_tokens=128", "batch_size=3"]),
    "batch too large": (["--batch_size", "8"], ["total_batch_tokens=128", "batch_size=8"]),
    "total not a multiple": (["--total_batch_tokens", "130"], ["total_batch_tokens=130", "sequence_length=32"]),
    "total too small": (["--total_batch_tokens", "16"], ["total_batch_tokens=16", "sequence_length=32"]),
    "long warm-up": (["--warmup_steps", "7"], ["warmup_steps=7", "max_steps=6"]),
    "validation too short": (["--val_every", "1", "--val_tokens", "31"], ["val_tokens=31", "sequence_length=32"]),
    "run name with a slash": (["--run_name", "a/b"], ["run_name", "a/b"]),
    "run name ..": (["--run_name", ".."], ["run_name", ".."]),
    "empty run name": (["--run_name", ""], ["run_name"]),
    "resume": (["--resume", "always"], ["resume", "auto", "never"]),
    "a rate for Muon without it": (["--muon_learning_rate", "0.1"], ["muon_learning_rate=0.1", "--optimizer adamw"]),
    "a rate for an embedding that is the head": (["--embedding_learning_rate", "0.1"],
                                                 ["embedding_learning_rate=0.1", "--untie"]),
}
LEAST = {  # of whole numbers; the most is 2^53
    "seed": 0, "batch_size": 1, "sequence_length": 1, "total_batch_tokens": 1, "max_steps": 1, "stop_after": 1,
    "warmup_steps": 0, "val_every": 0, "val_tokens": 1, "save_every": 0, "keep_last": 2,
}
RANGES = {  # of the others
    "learning_rate": (0, 10), "final_lr_fraction": (0, 1), "beta1": (0, 0.999999), "beta2": (0, 0.999999),
    "weight_decay": (0, 10), "grad_clip": (0, 1e9), "hang_timeout_s": (1, 1e6), "muon_learning_rate": (0, 10),
    "decay_fraction": (0, 1), "embedding_learning_rate": (0, 10),
}
for option, least in LEAST.items():
    REFUSED[f"{option} below"] = ([f"--{option}={least - 1}"], [f"{option}={least - 1} ", f" {least}"])
    REFUSED[f"{option} above"] = ([f"--{option}={10**19}"], [f"{option}={10**19} "])
for option, (low, high) in RANGES.items():
    REFUSED[f"{option} below"] = ([f"--{option}={low - 0.01}"], [f"{option}={low - 0.01} ", f" {low} and {high}"])
    REFUSED[f"{option} above"] = ([f"--{option}={high * 1.01}"], [f"{option}={high * 1.01} ", f" {low} and {high}"])
for option in FLOATS:
    for text in ("nan", "inf", "-inf", "1e999"):
        REFUSED[f"{option} {text}"] = ([f"--{option}={text}"], [option, str(float(text))])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, runs, capsys):
    arguments, expected = REFUSED[name]
    before = tree(runs.directory)
    assert call(train_gpt2.main, [*runs.options(), *arguments]) == 2
    err = capsys.readouterr().err
    assert "full helptext" in words(err) or (err.startswith("error: ") and err.count("\n") == 1)  # tyro's, or one line
    assert "Traceback" not in err
    assert [word for word in expected if word not in words(err)] == []
    assert tree(runs.directory) == before


def test_an_unknown_device_is_not_said_to_be_a_broken_one(runs, capsys):
    assert runs(device="tpu") == 2
    err = capsys.readouterr().err
    assert "tpu" in err and "NVIDIA" not in err


def test_every_number_has_a_limit():
    numbers = [f.name for f in fields(TrainConfig) if {int, float} & {f.type, *get_args(f.type)}]
    assert sorted(numbers) == sorted(LEAST | RANGES)


@pytest.mark.parametrize(("name", "value"), [
    *LEAST.items(), *((name, value) for name, limits in RANGES.items() for value in limits)])
def test_the_limits_themselves_are_allowed(name, value):
    # a sequence of one token, so that no other rule is in the way
    base = TrainConfig(sequence_length=1, total_batch_tokens=1, warmup_steps=0, val_tokens=1)
    assert getattr(replace(base, **{name: value}), name) == value


def test_variables_that_are_not_torchruns_are_refused(runs, capsys, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 2)
    assert runs(dry_run=True) == 2 and "unset" in capsys.readouterr().err


def test_what_does_not_divide_over_the_processes_is_refused(runs, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for world_size, code in ((4, 0), (3, 2), (8, 2)):
        monkeypatch.setattr(train_gpt2, "WORLD_SIZE", world_size)
        assert runs(dry_run=True) == code
        out, err = capsys.readouterr()
        if code:
            assert err.startswith("error: total_batch_tokens=128 ") and f"{world_size} processes" in err
        else:
            assert "4 processes x 1 micro-steps x 1 sequences x 32 tokens" in out
    assert not runs.out_dir.exists()


def test_batch_size_auto_divides(runs, capsys):
    for sequences, batch_size in ((1, 1), (2, 2), (3, 3), (6, 6), (8, 8), (11, 1), (12, 6), (16, 8), (36, 6)):
        assert runs(dry_run=True, total_batch_tokens=sequences * T) == 0
        expected = f"1 processes x {sequences // batch_size} micro-steps x {batch_size} sequences x 32 tokens"
        assert expected in capsys.readouterr().out


# -----------------------------------------------------------------------------
# --list, --dry_run, --help


def test_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(train_gpt2.main, ["--list"]) == 0
    listed = dict(re.findall(r"^(\S+) +([\d,]+) parameters$", capsys.readouterr().out, flags=re.MULTILINE))
    assert list(listed) == list(VARIANTS)
    for name, config in VARIANTS.items():  # in a block: 3 for q, k and v, 1 for the output, 4 + 4 for the MLP
        n_params = 12 * config.n_layer * config.n_embd**2 + (1 + config.untie) * config.vocab_size * config.n_embd
        assert listed[name] == f"{n_params:,}"
    assert listed["d12"] == "123,568,128"
    assert tree(tmp_path).keys() == {str(tmp_path)}


def test_dry_run(tmp_path, monkeypatch, capsys):
    """The plan, without any data in place, and nothing is made."""
    monkeypatch.chdir(tmp_path)
    assert call(train_gpt2.main, ["--dry_run", "--recipe", "default", "--device", "cpu", "--batch_size", "16"]) == 0
    out = capsys.readouterr().out
    assert "model d12: 123,568,128 parameters" in out
    assert f"{6 * 123_568_128 + 12 * 12 * 768 * 1024:,} FLOPs per token" in out
    assert "65,536 tokens = 1 processes x 4 micro-steps x 16 sequences x 1024 tokens" in out
    mib = int(re.search(r"predicted peak .*?([\d,]+) MiB", out)[1].replace(",", ""))
    assert 5000 < mib < 15000
    assert str(Path("runs/d12")) in out
    assert tree(tmp_path).keys() == {str(tmp_path)}


def test_help_does_not_wait_for_the_compiler():
    """torch._dynamo takes a second to import, as long as the rest of torch; no plan of a run needs it."""
    code = "import sys, train_gpt2; sys.exit(train_gpt2.main(['--dry_run']) or 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=small.ROOT).returncode == 0


def test_help_of_compare_does_not_wait_for_statistics_and_plots():
    code = "import sys, compare; sys.exit(bool({'scipy', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=small.ROOT).returncode == 0


def test_help_names_every_option(capsys):
    assert call(train_gpt2.main, ["--help"]) == 0
    out = capsys.readouterr().out
    assert [f.values[0].name for f in FIELDS if f"--{f.values[0].name}" not in out] == []


def test_vocabulary_of_the_tests():
    assert VOCAB == small.OPTIONS["vocab_size"] != GPTConfig().vocab_size


def test_configs_come_back_from_json():
    for kept in (*RECIPES.values(), replace(RECIPES["default"], batch_size=4, allow_change=("seed",), stop_after=3)):
        again = restored(TrainConfig, json.loads(json.dumps(asdict(kept))))
        assert asdict(again) | {"allow_change": tuple(again.allow_change)} == asdict(kept)
    for gpt_config in train_gpt2.VARIANTS.values():
        assert restored(GPTConfig, json.loads(json.dumps(asdict(gpt_config)))) == gpt_config


@pytest.mark.parametrize(("kind", "wrong"), [
    (TrainConfig, {"data": None}), (TrainConfig, {"window_backend": []}), (TrainConfig, {"dtype": None}),
    (TrainConfig, {"batch_size": "all"}), (TrainConfig, {"batch_size": True}), (TrainConfig, {"learning_rate": "1"}),
    (TrainConfig, {"allow_change": "seed"}), (TrainConfig, {"seed": 1.0}), (TrainConfig, {"unknown": 1}),
    (TrainConfig, []), (GPTConfig, {"qk_norm": 1}), (GPTConfig, {"n_layer": None}), (GPTConfig, {"mlp_activation": {}}),
])
def test_what_is_no_config_is_refused(kind, wrong):
    with pytest.raises(TypeError):
        restored(kind, wrong)


def test_a_name_of_two_lines_makes_a_message_of_one():
    with pytest.raises(TypeError) as caught:
        restored(GPTConfig, {"n\nlayer": 1})
    assert "\n" not in str(caught.value)
