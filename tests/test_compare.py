"""compare.py on hand-made runs with known answers, and on real small ones."""

import json
import math
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from small import VOCAB, Runs, call, make_data, metrics, words
from small import runs as runs  # a fixture

import compare
import machine
import train_gpt2
from comparison.groups import group_runs
from comparison.numbers import opponents, over_rates, usable_rates
from comparison.results import find_runs, finite_median, read_run, spikes
from comparison.significance import smallest_difference
from configs.recipes import RESULT_FIELDS, TrainConfig
from configs.variants import model_name
from model import GPT, GPTConfig

BATCH = 1000  # tokens of an update
WIDE = {"n_layer": 1, "n_head": 2, "n_embd": 96, "vocab_size": VOCAB}
SMALL = WIDE | {"n_embd": 64}


def write_run(path, val_losses, seed=0, step_s=1.0, val_every=10, losses=None, model=SMALL, status="finished", code=0,
              data="a" * 64, tokenizer="gpt2", sequence_length=40, val_tokens=64, device="CPU", **settings):
    """A run with these validation losses, None for not finite, every `val_every` updates of `step_s` seconds."""
    path.mkdir(parents=True)
    n = len(val_losses) * val_every
    usual = {name: getattr(TrainConfig, name) for name in RESULT_FIELDS if name not in ("recipe", "data")}
    settings = usual | {"seed": seed, "max_steps": n, "total_batch_tokens": BATCH, "data": data,
                        "sequence_length": sequence_length, "warmup_steps": 1} | settings
    config = {"settings": settings | model, "model_config": model, "tokenizer": tokenizer, "processes": 1,
              "train_config": {"data": "/somewhere/texts", "val_tokens": val_tokens}, "versions": {"device": device}}
    rows = []
    for step in range(1, n + 1):
        row = {"step": step, "tokens": step * BATCH, "time_s": step * step_s, "loss": 5.0, "lr": 1e-3,
               "grad_norm": 1 + step / 100,
               "step_ms": 1000 * step_s, "tokens_per_s": BATCH / step_s, "mfu": None, "peak_mib": None}
        if losses is not None:
            row["loss"] = losses[step - 1]
        if step % val_every == 0:
            loss = val_losses[step // val_every - 1]
            row |= {"val_loss": loss, "bits_per_byte": loss and loss / 4}
        rows.append(json.dumps(row) + "\n")
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text("".join(rows))
    if status:
        (path / "status.json").write_text(json.dumps({"reason": status, "step": n, "code": code}))
    return path


def run_compare(capsys, *arguments) -> SimpleNamespace:
    code = call(compare.main, [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return SimpleNamespace(code=code, out=out, err=err)


def numbers(capsys, folder, *arguments) -> dict:
    """What --json has of all runs in the folder."""
    found = run_compare(capsys, folder, "--json", folder / "numbers.json", *arguments)
    assert found.code == 0, found.err
    return json.loads((folder / "numbers.json").read_text())


def refused(capsys, *arguments) -> str:
    found = run_compare(capsys, *arguments)
    assert found.code == 2 and found.out == "" and found.err.count("\n") == 1 and found.err.startswith("error: ")
    return found.err


@pytest.fixture
def folder(tmp_path):
    """Two groups of three seeds: wide is lower by 0.1 at each evaluation, and takes twice the time for a step."""
    for seed, offset in enumerate((0.0, 0.01, 0.03)):
        write_run(tmp_path / f"small{seed}", [5 + offset, 4 + offset], seed)
        write_run(tmp_path / f"wide{seed}", [4.9 + 1.1 * offset, 3.9 + 1.1 * offset], seed, step_s=2.0, model=WIDE)
    return tmp_path


# -----------------------------------------------------------------------------
# points of comparison


def test_equal_tokens_time_and_flops(capsys, folder):
    """
    By hand: wide is at 10,000 tokens after 20 s, where small ends with 4.0; small's end in FLOPs lies between wide's
    evaluations, at the part of its way that the FLOPs per token say.
    """
    found = numbers(capsys, folder)["at_equal"]
    small, wide = (GPT(GPTConfig(**model)).flops_per_token(40) for model in (SMALL, WIDE))
    assert found["tokens"]["at"] == 20_000 and found["time_s"]["at"] == 20 and found["flops"]["at"] == 20_000 * small
    by_axis = {axis: [row["val_loss"]["0"] for row in found[axis]["groups"]] for axis in found}
    assert by_axis["tokens"] == [4.0, 3.9] and by_axis["time_s"] == [4.0, 4.9]
    assert small < wide < 2 * small and by_axis["flops"][0] == 4.0
    assert by_axis["flops"][1] == pytest.approx(4.9 - 1.0 * (20_000 * small - 10_000 * wide) / (10_000 * wide))
    row = found["time_s"]["groups"][1]
    assert row["schedule"] == pytest.approx(0.5) and row["tokens_per_s"] == 500 and row["seeds"] == 3
    assert row["bits_per_byte"] == pytest.approx(row["mean"] / 4)


def test_equal_tokens_are_those_of_an_evaluation_of_every_run(tmp_path, capsys):
    """a is evaluated after 10, 20, 30, b after 20, 40: 20 is the last that both have. Time is interpolated, to 30 s."""
    for seed in range(2):
        write_run(tmp_path / f"a{seed}", [5.0, 4.0, 3.0], seed, val_every=10)
        write_run(tmp_path / f"b{seed}", [6.0, 5.0], seed, val_every=20, learning_rate=1.0)
    found = numbers(capsys, tmp_path)["at_equal"]
    assert found["tokens"]["at"] == 20_000 and found["time_s"]["at"] == 30
    assert [row["mean"] for row in found["tokens"]["groups"]] == [4.0, 6.0]
    assert [row["mean"] for row in found["time_s"]["groups"]] == [3.0, 5.5]  # of two evaluations, the straight line
    assert "as at equal tokens" not in run_compare(capsys, tmp_path).out  # of FLOPs there is more


def test_no_evaluation_in_common_is_no_loss_and_said(tmp_path, capsys):
    write_run(tmp_path / "a", [5.0, 4.0, 3.0], val_every=10)
    write_run(tmp_path / "b", [6.0, 5.0], val_every=13, learning_rate=1.0)
    found = run_compare(capsys, tmp_path, "--plots", tmp_path / "plots")
    assert found.code == 0 and "### At equal tokens: -" in found.out and "nan" not in found.out
    assert "- no losses at equal tokens: all were evaluated at other ones; train them with one --val_every" in found.out
    assert not (tmp_path / "plots" / "learning_rate.png").exists()
    assert [row["mean"] for row in numbers(capsys, tmp_path)["at_equal"]["tokens"]["groups"]] == [None, None]


def test_between_evaluations_the_curve_is_less_biased_than_a_straight_line(tmp_path):
    """On 3 + 4 / sqrt(s), evaluated after 10, 20, ... 70 s; a straight line lies above it everywhere."""
    at, between = np.arange(10, 71, 10), np.arange(12, 70, 0.5)
    run = read_run(write_run(tmp_path / "run", list(3 + 4 / np.sqrt(at))))
    exact = 3 + 4 / np.sqrt(between)
    bias = np.mean([run.at("time_s", x) for x in between] - exact)
    assert abs(bias) < 0.35 * np.mean(np.interp(between, at, run.evaluations("val_loss")) - exact)
    assert [run.at("time_s", x) for x in at] == run.evaluations("val_loss").tolist()
    assert all(math.isnan(run.at(axis, x)) for axis, x in [("time_s", 9.9), ("time_s", 70.1), ("tokens", 15_000)])


def test_before_the_first_evaluation_there_is_no_loss(tmp_path, capsys):
    write_run(tmp_path / "fast", [5.0, 4.0], step_s=0.1)
    write_run(tmp_path / "slow", [5.0, 4.0], step_s=1.0, learning_rate=1.0)
    write_run(tmp_path / "slow, but for one seed", [5.0, 4.0], step_s=0.15, seed=1, learning_rate=1.0)
    found = run_compare(capsys, tmp_path)
    assert "No p-value for `learning_rate=1.0`: no loss of learning_rate=1.0 at this point." in found.out
    assert "nan" not in found.out
    found = numbers(capsys, tmp_path)["at_equal"]["time_s"]
    assert [row["mean"] for row in found["groups"]] == [4.0, None]


def test_seeds_that_agree_by_chance_are_named(tmp_path, capsys):
    """Welch's test of two seeds each sees two groups that agree within 0.008, where others spread over 0.08."""
    means = {0.001: 4.0, 0.002: 3.93, 0.003: 4.02, 0.004: 3.3}
    for rate, half in zip(means, (0.004, 0.003, 0.04, 0.01), strict=True):
        for seed, loss in enumerate((means[rate] - half, means[rate] + half)):
            write_run(tmp_path / f"{rate} {seed}", [5.0, loss], seed=seed, learning_rate=rate)
    rows = {row["label"]: row for row in numbers(capsys, tmp_path)["at_equal"]["tokens"]["against"]}
    assert [rows[f"learning_rate={rate}"]["verdict"] for rate in (0.002, 0.003, 0.004)] == [
        "better", "not shown", "better"]
    found = run_compare(capsys, tmp_path).out.split("### At equal training")[0]
    assert "`learning_rate=0.002`: better by Welch's test, but not shown by the noise floor (p = 0.1" in found
    assert found.count("by Welch's test, but") == 1


def test_a_point_before_all_evaluations_is_one_line(tmp_path, capsys):
    """Of runs on a shared GPU, each evaluated at its end alone, the fastest ends before any other has a loss."""
    for seed, step_s in enumerate([0.1, 0.2]):
        for rate in 0.5, 1.0:
            write_run(tmp_path / f"{rate} {seed}", [5.0 + rate], step_s=step_s * rate, seed=seed, learning_rate=rate)
    found = run_compare(capsys, tmp_path).out
    assert "At equal training time: by 0.5 s no group had been evaluated in all its runs." in found
    assert "### At equal tokens" in found and "at this point" not in found


def test_the_table_says_what_scipy_says(capsys, folder):
    from scipy import stats

    found = numbers(capsys, folder)["at_equal"]["tokens"]
    small, wide = [4.0, 4.01, 4.03], [3.9, 3.911, 3.933]
    assert [row["mean"] for row in found["groups"]] == [pytest.approx(np.mean(x)) for x in (small, wide)]
    assert [row["std"] for row in found["groups"]] == [pytest.approx(np.std(x, ddof=1)) for x in (small, wide)]
    row = found["against"][0]
    assert row["p"] == row["p_holm"] == pytest.approx(stats.ttest_ind(wide, small, equal_var=False).pvalue)
    assert row["paired_p"] == pytest.approx(stats.ttest_rel(wide, small).pvalue) and row["verdict"] == "better"
    out = run_compare(capsys, folder).out
    assert "4.0133 ± 0.0153" in out and "| 3 | " in out and f"{row['p']:.2g}" in out
    assert f"({row['low']:+.4f} to {row['high']:+.4f})" in out
    assert f"| better | -0.0987 | {row['paired_p']:.2g} (3) |" in out and "| against `d1_2heads_64wide-" in out


@pytest.mark.parametrize("name", ["d1_2heads_96wide-vocab_size=512", "wide2"])
def test_baseline(capsys, folder, name):
    row = numbers(capsys, folder, "--baseline", name)["at_equal"]["tokens"]["against"][0]
    assert row["verdict"] == "worse" and row["difference"] > 0


def test_power_goes_by_the_noise_of_all_groups(capsys, folder):
    """A third group is less sure; by hand: variances 1, 1.21 and 9 times that of 0, 0.01, 0.03."""
    for seed, offset in enumerate((0.0, 0.03, 0.09)):
        write_run(folder / f"other{seed}", [5.0, 4.2 + offset], seed, learning_rate=1.0)
    found = numbers(capsys, folder)["at_equal"]["tokens"]
    noise = np.std([0, 0.01, 0.03], ddof=1) * math.sqrt((1 + 1.21 + 9) / 3)
    assert found["noise"] == pytest.approx(noise) and found["freedom"] == 6
    assert [row["smallest"] for row in found["against"]] == [pytest.approx(smallest_difference(noise, 3, 3))] * 2
    low, high = noise * math.sqrt(6 / 14.449), noise * math.sqrt(6 / 1.237)  # chi-squared's table
    assert found["noise_interval"] == pytest.approx([low, high], rel=1e-3)
    assert "Noise floor: 0.0295 (95 % interval 0.0190 to 0.0650)" in run_compare(capsys, folder).out


def test_a_group_that_is_unsure_is_no_noise_of_the_others(capsys, folder):
    """With 100 times the spread: the tests of the others go by their own, as without it."""
    from scipy import stats

    alone = numbers(capsys, folder)["at_equal"]["tokens"]["against"][0]
    for seed, offset in enumerate((0.0, 1.0, 3.0)):
        write_run(folder / f"unsure{seed}", [5.0, 3.0 + offset], seed, learning_rate=1.0)
    found = numbers(capsys, folder)["at_equal"]["tokens"]
    losses = [list(row["val_loss"].values()) for row in found["groups"]]
    assert found["unequal_spread"] == pytest.approx(stats.bartlett(*losses).pvalue) and found["unequal_spread"] < 0.01
    row = next(row for row in found["against"] if "96wide" in row["label"])
    assert row["smallest"] == pytest.approx(alone["smallest"]) and row["seeds_needed"] == alone["seeds_needed"] == 3
    out = run_compare(capsys, folder).out
    assert "No noise floor: the spread over seeds differs between the groups, 0.0153 to 1.5275 (Bartlett's" in out
    assert "go by the spread of the two groups, for one comparison" in out and "Noise floor:" not in out


def test_what_sets_the_point_is_said(capsys, folder):
    """One run was killed after its first evaluation, another had a longer schedule."""
    assert "No further" not in run_compare(capsys, folder).out
    write_run(folder / "late", [5.0], seed=7, max_steps=20, status=None)
    out = run_compare(capsys, folder).out
    assert "### At equal tokens: 10,000" in out and out.count("No further than here came `late`.") == 1
    assert "Here the groups have done" not in out
    write_run(folder / "long", [5.0, 4.0], max_steps=40, learning_rate=1.0)
    assert "Here the groups have done 25% to 50% of their steps." in run_compare(capsys, folder).out


def test_an_edit_of_the_code_is_compared_by_folder(capsys, tmp_path):
    for i, name in enumerate(("before", "after")):
        for seed in range(3):
            write_run(tmp_path / name / f"run{seed}", [5.0, 4.0 - i / 10 + seed / 100], seed)
    both = tmp_path / "before", tmp_path / "after"
    error = refused(capsys, *both)
    assert "same settings and seed" in error and "--by_folder" in error
    found = run_compare(capsys, *both, "--by_folder")
    assert found.code == 0 and "| `folder=after` | -0.1000" in found.out and "| against `folder=before` |" in found.out
    found = run_compare(capsys, *both, "--by_folder", "--baseline", tmp_path / "after" / "run1")
    assert found.code == 0 and "| against `folder=after` |" in found.out


def test_a_reader_that_has_seen_enough(folder):
    """`compare.py ... | head -1`: no traceback, and what was to be written is there."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, compare.__file__, str(folder), "--json", str(folder / "numbers.json")]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "") and (folder / "numbers.json").exists()


def test_a_path_is_a_baseline(capsys, folder):
    assert "against `d1_2heads_96wide" in run_compare(capsys, folder, "--baseline", folder / "wide1").out


def test_weights_that_differ_under_one_name_are_no_seeds(capsys, tmp_path):
    for seed, weights in enumerate(("a" * 64, "a" * 64, "b" * 64)):
        write_run(tmp_path / str(seed), [5.0, 4.0], seed, init_from="base", init_weights=weights)
    assert list(numbers(capsys, tmp_path)["runs"]) == ["init_from=base aaaaaaaa", "init_from=base bbbbbbbb"]


def test_unknown_baseline(capsys, folder):
    error = refused(capsys, folder, "--baseline", "nope")
    assert "nope" in error and "d1_2heads_96wide" in error


def test_target_loss(capsys, folder):
    """small goes from 5.0 to 4.0 between 10 and 20 s; wide, by then at 4.9 and 3.9, in twice that time."""
    found = numbers(capsys, folder, "--target_loss", 4.5)
    assert [row["reached"] for row in found["reaching"]] == [3, 3]
    small = [15 + 10 * offset for offset in (0, 0.01, 0.03)]
    assert found["reaching"][0]["time_s"] == pytest.approx(np.mean(small))
    assert found["reaching"][0]["tokens"] == pytest.approx(1000 * np.mean(small))
    assert found["reaching"][1]["time_s_from"] == pytest.approx(28)
    reached = numbers(capsys, folder, "--target_loss", 4.02)["reaching"]
    assert [row["reached"] for row in reached] == [2, 3]
    assert run_compare(capsys, folder, "--target_loss", 3.95).out.count("not reached") == 1
    first = numbers(capsys, folder, "--target_loss", 6)["reaching"][0]
    assert first["tokens"] == 10_000 and first["time_s"] == 10  # where it was first looked


# -----------------------------------------------------------------------------
# groups


def test_groups_and_labels(tmp_path):
    for seed in (0, 1):
        for rate in (1e-3, 3e-3):
            for post_norm in (False, True):
                write_run(tmp_path / f"{seed}{rate}{post_norm}", [4.0], seed, learning_rate=rate,
                          model=SMALL | {"post_norm": post_norm})
    runs = [read_run(path) for path in find_runs([str(tmp_path)], "runs")]
    names = [model_name(GPTConfig(**SMALL, post_norm=post_norm)) for post_norm in (False, True)]
    labels = {group.label: [run.seed for run in group.runs] for group in group_runs(runs)}
    assert labels == {f"{name}-learning_rate={rate}": [0, 1] for name in names for rate in (1e-3, 3e-3)}
    one_model = [run for run in runs if not run.gpt_config.post_norm]
    assert [group.label for group in group_runs(one_model)] == ["learning_rate=0.001", "learning_rate=0.003"]
    assert [group.label for group in group_runs(one_model[:1])] == [names[0]]
    by_rate = group_runs(runs, ignore=("seed", "learning_rate"))
    assert [group.label for group in by_rate] == names


def test_a_label_has_no_more_than_sets_it_apart(tmp_path, capsys):
    """What goes with the rest is said once, above the tables."""
    for seed in 0, 1:
        for name, rate, clip in ("adamw", 1e-3, 1.0), ("adamw", 3e-3, 1.0), ("muon", 3e-3, 0.0):
            write_run(tmp_path / f"{name}{rate}{seed}", [4.0 + 0.1 * seed], seed, optimizer=name, learning_rate=rate,
                      grad_clip=clip)
    groups = group_runs([read_run(path) for path in find_runs([str(tmp_path)], "runs")])
    labels = [f"optimizer=adamw-learning_rate={rate}" for rate in (1e-3, 3e-3)] + ["optimizer=muon-learning_rate=0.003"]
    assert [(group.label, group.also) for group in groups] == list(
        zip(labels, ["grad_clip=1.0", "grad_clip=1.0", "grad_clip=0.0"], strict=True))
    assert compare.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"\n- `grad_clip=1.0`: `{labels[0]}`, `{labels[1]}`\n- `grad_clip=0.0`: `{labels[2]}`\n" in out
    two = group_runs(groups[0].runs + groups[2].runs)
    assert [group.label for group in two] == ["optimizer=adamw", "optimizer=muon"]


def write_sweep(folder, groups):
    """Runs `<place of the group>-<seed>` of groups (model, learning rate, losses by seed)."""
    for i, (model, rate, losses) in enumerate(groups):
        for seed, loss in enumerate(losses):
            write_run(folder / f"{i}-{seed}", [6.0, loss], seed, model=model, learning_rate=rate)


def test_a_group_is_tested_against_the_baselines_line_at_its_own_rate(capsys, tmp_path):
    """wide is better than small at no rate, and would be at 1e-3 against small at 1e-4; 1e-2 has no small."""
    seeds = np.array([0.0, 0.01, 0.03])
    write_sweep(tmp_path, [(SMALL, 1e-4, 4 + seeds), (SMALL, 1e-3, 3.5 + seeds), (WIDE, 1e-4, 4.1 + seeds),
                           (WIDE, 1e-3, 3.5 + 2 * seeds), (WIDE, 1e-2, 4.6 + seeds)])
    small, wide = (model_name(GPTConfig(**model)) for model in (SMALL, WIDE))
    low, middle, high = (f"-learning_rate={rate}" for rate in (1e-4, 1e-3, 1e-2))
    against = numbers(capsys, tmp_path)["at_equal"]["tokens"]["against"]
    assert [(row["label"], row["against"], row["verdict"]) for row in against] == [
        (small + middle, small + low, "better"), (wide + low, small + low, "worse"),
        (wide + middle, small + middle, "not shown"), (wide + high, small + low, "worse")]
    out = run_compare(capsys, tmp_path).out
    assert "|  | against | difference, 95 % interval |" in out
    assert f"| `{wide}{middle}` | `{small}{middle}` | +0.0133 (" in out
    groups = group_runs([read_run(path) for path in find_runs([str(tmp_path)], "runs")])
    assert opponents(groups) == [0, 0, 1, 0]
    assert opponents([groups[3], groups[4], groups[1], groups[0], groups[2]]) == [0, 0, 4, 0]  # wide is the baseline


def test_an_older_run_has_the_defaults_of_what_it_does_not_say(tmp_path):
    new, old = write_run(tmp_path / "new", [4.0]), write_run(tmp_path / "old", [4.0], seed=1)
    config = json.loads((old / "config.json").read_text())
    del config["settings"]["schedule"], config["settings"]["vocab_size"]
    (old / "config.json").write_text(json.dumps(config))
    assert len(group_runs([read_run(new), read_run(old)])) == 1


def test_names_paths_and_folders(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    expected = [folder / name for name in ("small0", "small1", "small2", "wide0", "wide1", "wide2")]
    assert [path.resolve() for path in find_runs([folder.name], "runs")] == expected
    assert find_runs(["small1", str(folder / "small1"), str(folder / "wide0")], str(folder)) == {
        folder / "small1": None, folder / "wide0": None}
    assert find_runs([str(folder), str(folder / "wide0")], "runs") == {
        path: None if path.name == "wide0" else folder for path in expected}
    assert find_runs([str(folder / "wide0"), str(folder)], "runs")[folder / "wide0"] is None
    (folder / "no run").mkdir()
    assert len(find_runs([str(folder)], "runs")) == 6


def test_runs_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    names = ["d12", "d12-learning_rate=1e-06", "d12-learning_rate=0.0003", "d12-learning_rate=0.001",
             "d12_qk_norm", "d12_window128", "d12_window0128", "d12_window1024", "d24"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    names[5:7] = sorted(names[5:7])  # of the same number
    assert [path.name for path in find_runs([str(tmp_path)], "runs")] == names


# -----------------------------------------------------------------------------
# what is refused, and what is said


def test_unknown_run(capsys, folder):
    error = refused(capsys, "small9", "--out_dir", folder)
    assert "small9" in error and "small0, small1, small2, wide0" in error
    (folder / "empty").mkdir()
    refused(capsys, folder / "empty")


@pytest.mark.parametrize(("change", "reason"), [
    ({"data": "b" * 64}, "different data (aaaaaaaaaaaaaaaa and bbbbbbbbbbbbbbbb)"),
    ({"tokenizer": None}, "different tokenizers (gpt2 and None)"),
    ({"sequence_length": 50}, "different sequence lengths (40 and 50)"),
    ({"val_tokens": 128}, "different numbers of targets (64 and 128)")])
def test_losses_that_cannot_be_compared(capsys, tmp_path, change, reason):
    write_run(tmp_path / "one", [4.0])
    write_run(tmp_path / "two", [4.0], seed=1, **change)
    error = refused(capsys, tmp_path)
    assert reason in error and "one" in error and "two" in error


def test_runs_without_a_loss_are_left_out_of_a_folder_and_refused_by_name(capsys, tmp_path):
    write_run(tmp_path / "half" / "good", [4.0])
    for name, status in {"before": None, "empty": "out of memory", "early": None}.items():
        write_run(tmp_path / "half" / name, [4.0], seed=1, status=status, code=1)
    before, empty, early = (tmp_path / "half" / name / "metrics.jsonl" for name in ("before", "empty", "early"))
    before.unlink()
    empty.write_text("")
    early.write_text("".join(early.read_text().splitlines(keepends=True)[:5]))
    found = run_compare(capsys, tmp_path / "half")
    assert found.code == 0 and "Runs: 1, groups: 1" in found.out and found.out.count("- left out: ") == 3
    for name, reason in {"before": "it has just begun, or was killed", "empty": "out of memory"}.items():
        assert f"- left out: {name}: no validation loss yet ({reason})\n" in found.out
    assert "empty/metrics.jsonl has no update in it (out of memory)" in refused(capsys, empty.parent)
    assert "early has no validation loss (it has just begun, or was killed): " in refused(capsys, early.parent)
    assert "before/metrics.jsonl has no update" in refused(capsys, tmp_path / "half", before.parent)
    assert "before/metrics.jsonl has no update" in refused(capsys, tmp_path / "half" / "good", before.parent)
    write_run(tmp_path / "new" / "run", [4.0], seed=2, status=None)
    (tmp_path / "new" / "run" / "metrics.jsonl").unlink()
    assert "run/metrics.jsonl has no update" in refused(capsys, tmp_path / "new")
    assert "run/metrics.jsonl has no update" in refused(capsys, tmp_path / "new", tmp_path / "half")


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[]", b'{"settings": []}', b'{"settings": {"data": 1, "seed": 0}}', b"\xff", b"null", b"[" * 5000])
def test_damaged_config(capsys, tmp_path, damage):
    write_run(tmp_path / "good", [4.0])
    write_run(tmp_path / "bad", [4.0], seed=1)
    (tmp_path / "bad" / "config.json").write_bytes(damage)
    assert "bad/config.json is missing, damaged or of another version" in refused(capsys, tmp_path)


@pytest.mark.parametrize("change", [
    {"learning_rate": "x"}, {"learning_rate": []}, {"learning_rate": None}, {"init_from": 5}, {"total_batch_tokens": 0},
    {"max_steps": True}, {"n_layer": {}}, {"schedule": 5}, {"dtype": None}, {"seed": -1}])
def test_settings_of_any_content(capsys, tmp_path, change):
    path = write_run(tmp_path / "run", [4.0], **change)
    for options in [], ["--card"]:
        found = run_compare(capsys, path, *options, "--plots", tmp_path / "plots")
        assert found.code in (0, 2) and (found.code == 0 or found.err.count("\n") == 1)


@pytest.mark.parametrize("part", ["settings", "model_config", "train_config", "versions"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, {"n_layer": "x", "data": 5}, {"unknown": 1}])
def test_config_of_another_version(capsys, tmp_path, part, value):
    path = write_run(tmp_path / "run", [4.0]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    found = run_compare(capsys, path.parent)
    assert (found.code, found.out) == (2, "") or (part, value) == ("model_config", {})  # the default model


def test_the_same_run_twice_is_not_two_seeds(capsys, tmp_path):
    write_run(tmp_path / "one", [4.0])
    write_run(tmp_path / "again", [4.0])
    assert "same settings and seed" in refused(capsys, tmp_path)


@pytest.mark.parametrize("options", [["--target_loss", "nan"], ["--target_loss", "-1"], ["--card", "--baseline", "x"]])
def test_bad_options(capsys, folder, options):
    found = run_compare(capsys, folder, *options)
    assert found.code == 2 and words(found.err)


def test_a_cut_last_line_is_left_out_and_said(capsys, folder):
    path = folder / "wide1" / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    found = run_compare(capsys, folder)
    assert found.code == 0 and "- wide1: 1 of 20 lines of metrics.jsonl left out: cut off or damaged" in found.out
    assert "### At equal tokens: 10,000" in found.out  # the last evaluation is gone


@pytest.mark.parametrize("line", ["{}", "[1]", '{"step": 3, "time_s": "x"}', '{"step": 3, "time_s": 3.0, "loss": "x"}',
                                  '{"step": 3, "time_s": 3.0, "val_loss": [1], "loss": {}}', "\x00", '{"step": 3}'])
def test_a_damaged_line_does_not_stop_a_comparison(capsys, folder, line):
    path = folder / "wide1" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    assert run_compare(capsys, folder, "--plots", folder / "plots").code == 0


def test_unfinished_runs_and_other_machines_are_named(capsys, tmp_path):
    write_run(tmp_path / "done", [5.0, 4.0])
    write_run(tmp_path / "stopped", [5.0], seed=1, status="SIGTERM", code=75, max_steps=20)
    write_run(tmp_path / "killed", [5.0], seed=2, status=None, max_steps=20, device="NVIDIA H100")
    out = run_compare(capsys, tmp_path).out
    assert "- unfinished: stopped (step 10 of 20, SIGTERM)" in out
    assert "- unfinished: killed (step 10 of 20, no status.json" in out
    assert "### At equal tokens: 10,000" in out and "different machines: 1 x CPU, 1 x NVIDIA H100" in out


def test_a_run_that_went_on_with_other_settings_is_named(capsys, folder):
    config = json.loads((folder / "small0" / "config.json").read_text())
    later = folder / "small0" / "config-00000010.json"
    later.write_text(json.dumps(config))
    assert "went on" not in run_compare(capsys, folder).out
    config["settings"]["learning_rate"] = 1.0
    later.write_text(json.dumps(config))
    assert "- small0: went on with other settings, see config-00000010.json" in run_compare(capsys, folder).out
    rewrite(folder / "small0", kernels={"parts": "fused", "dtype": "bfloat16"})
    rewrite(later, kernels={"parts": "plain", "dtype": "bfloat16"}, processes=2)
    expected = "- small0: went on with other settings and processes and kernels, see config-00000010.json"
    assert expected in run_compare(capsys, folder).out
    assert ("| went on, config-00000010.json | learning_rate 0.0006 -> 1.0, processes 1 -> 2, parts fused -> plain |"
            in run_compare(capsys, "--card", folder / "small0").out)
    rewrite(later, kernels={"parts": "fused", "dtype": "bfloat16"}, processes=1, val_targets=32)  # --val_tokens
    rewrite(folder / "small0", val_targets=64)
    assert "went on with other settings and val_targets, see" in run_compare(capsys, folder).out
    assert "1.0, val_targets 64 -> 32 |" in run_compare(capsys, "--card", folder / "small0").out
    for damaged in ({"settings": {"init_from": 5}, "kernels": [1], "versions": None}, {"settings": "x"}):
        later.write_text(json.dumps(damaged))
        assert "| went on, config-00000010.json | " in run_compare(capsys, "--card", folder / "small0").out


def test_a_run_that_changed_a_setting_is_no_seed_of_the_old_one(capsys, folder):
    def labels():
        return {row["label"]: row["seeds"] for row in numbers(capsys, folder)["at_equal"]["tokens"]["groups"]}

    before = labels()
    later = json.loads((folder / "small2" / "config.json").read_text())
    later["settings"]["learning_rate"] = 0.003
    (folder / "small2" / "config-00000010.json").write_text(json.dumps(later))
    small, wide = before
    assert labels() == {
        f"{small}-changed=None": 2, f"{small}-changed=learning_rate=0.003": 1, f"{wide}-changed=None": 3}
    later["settings"]["learning_rate"] = 0.0006
    (folder / "small2" / "config-00000010.json").write_text(json.dumps(later))
    assert labels() == before


def test_a_log_that_ends_before_the_run_is_named(capsys, folder):
    path = folder / "wide1" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    assert "- wide1: metrics.jsonl ends at step 10, the run at 20" in run_compare(capsys, folder).out
    assert numbers(capsys, folder)["notes"] == ["wide1: metrics.jsonl ends at step 10, the run at 20"]


def rewrite(path, **changes):
    """config.json of the run, or another file like it, with these values."""
    path = path / "config.json" if path.is_dir() else path
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_else_differs_between_runs_is_named_once_for_each_kind(capsys, folder):
    for path in folder.iterdir():
        kernels = {"attention": "cuDNN", "parts": "fused", "dtype": "bfloat16"}
        rewrite(path, versions={"device": "CPU", "torch": "2.13.0"}, kernels=kernels, environment={"runs_beside": 0},
                batch_size=64)
        (path / "source.diff").write_text("a" * 40 + "\n")
    assert numbers(capsys, folder)["notes"] == []
    rewrite(folder / "wide2", batch_size=32)
    known = {"data": "/somewhere/texts", "val_tokens": 64}
    rewrite(folder / "small0", train_config=known | {"recompute_gelu": True})
    for i in range(2):
        rewrite(folder / f"wide{i}", versions={"device": "CPU", "torch": "2.11.0"},
                kernels=kernels | {"parts": "plain"}, environment={"runs_beside": i + 1})
    (folder / "wide0" / "source.diff").write_text("b" * 40 + "\n")
    (folder / "wide1" / "source.diff").write_text("a" * 40 + "\n+one\n")
    (folder / "wide2" / "source.diff").write_text("a" * 40 + "\n+two\n")
    *found, code = numbers(capsys, folder)["notes"]
    assert found == [
        "training times and tokens/s of 2 of 6 runs were taken with up to 2 other runs on the same device",
        "different torch: 2.13.0 (4 of 6 runs); 2.11.0 (2 of 6 runs)",
        "different execution: parts fused, batch_size 64, recompute_gelu True (1 of 6 runs); "
        "parts fused, batch_size 64, recompute_gelu not known (2 of 6 runs); "
        "parts plain, batch_size 64, recompute_gelu not known (2 of 6 runs); "
        "parts fused, batch_size 32, recompute_gelu not known (1 of 6 runs)"]
    assert code.startswith(f"different code: {'a' * 10} (3 of 6 runs); {'b' * 10} (1 of 6 runs); ")
    assert code.count(f"{'a' * 10} with changes ") == 2


def test_a_single_seed_has_no_p_value(capsys, tmp_path):
    write_run(tmp_path / "a", [4.0])
    write_run(tmp_path / "b", [3.9], learning_rate=1.0)
    found = run_compare(capsys, tmp_path)
    assert "No p-value for `learning_rate=1.0`: a single seed." in found.out
    assert "Noise floor" not in found.out and "nan" not in found.out
    row = numbers(capsys, tmp_path)["at_equal"]["tokens"]["against"][0]
    assert row["difference"] == pytest.approx(-0.1) and row["p"] is row["paired_p"] is row["seeds_needed"] is None


def test_one_group_alone(capsys, tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"{seed}", [4.0 + seed], seed)
    out = run_compare(capsys, tmp_path).out
    assert "5.0000 ± 1.0000" in out and "against" not in out


@pytest.mark.parametrize("how", ["null in the log", "exit code 6", "exit code 6 at the first step"])
def test_diverged_runs_count(capsys, folder, how):
    """They do not set the point at which all are compared, have no loss, and make the group one without a test."""
    path = folder / "wide1"
    lines = (path / "metrics.jsonl").read_text().splitlines()[:10]
    if how == "null in the log":
        lines.append(json.dumps({"step": 11, "tokens": 11 * BATCH, "time_s": 22.0, "loss": None, "grad_norm": 1.0}))
        (path / "status.json").unlink()
    else:
        reason = "step 11: loss nan, gradient norm nan; the first that is not finite: somewhere; python replay.py"
        (path / "status.json").write_text(json.dumps({"reason": reason, "step": 10, "code": 6}))
    if "first" in how:
        lines = []
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    found = run_compare(capsys, folder, "--plots", folder / "plots")
    assert found.code == 0 and found.err == ""
    assert "3.9165 ± 0.0233, diverged 1 of 3" in found.out and "### At equal tokens: 20,000" in found.out
    assert "- diverged: wide1" in found.out and "replay" not in found.out
    assert "No p-value for `d1_2heads_96wide-vocab_size=512`: 1 of 3 diverged: d1_2heads_96wide" in found.out
    assert "| 3 | 3.9165" in found.out
    row = numbers(capsys, folder)["at_equal"]["tokens"]["against"][0]
    assert row["p"] is None and row["verdict"] == "-"


def test_worse_than_a_guess_has_diverged(capsys, folder):
    """By half a nat, ln V is 6.238; once above it and then below is sound."""
    write_run(folder / "small3", [6.0, 6.8], seed=3)
    write_run(folder / "small4", [6.8, 4.0], seed=4)
    found = run_compare(capsys, folder)
    assert ("- diverged: small3 (step 20 of 20, finished, validation loss 6.8000, that of a guess is 6.2383)"
            in found.out)
    assert "diverged 1 of 5" in found.out and "small4" not in found.out
    assert numbers(capsys, folder)["at_equal"]["tokens"]["groups"][0]["mean"] == pytest.approx(4.01)


def test_what_has_learnt_nothing_has_not_diverged(capsys, tmp_path):
    """New weights lie a little above ln V."""
    write_run(tmp_path / "still", [6.40, 6.39], learning_rate=1e-9)
    write_run(tmp_path / "learns", [5.0, 4.0])
    out = run_compare(capsys, tmp_path).out
    assert "6.3900" in out and "diverged" not in out


def test_all_diverged(capsys, tmp_path):
    for seed in range(2):
        write_run(tmp_path / str(seed), [4.0, None], seed, status="step 20: loss nan", code=6)
    found = run_compare(capsys, tmp_path, "--plots", tmp_path / "plots")
    assert found.code == 0 and "-, diverged 2 of 2" in found.out and "nan" not in found.out.split("- diverged")[0]


# -----------------------------------------------------------------------------
# over the learning rate


def test_usable_rates_by_hand():
    """The limit is 3.1: on the left half way between two rates, by their logarithm, on the right at a third."""
    assert usable_rates([1e-4, 1e-3, 1e-2], [3.2, 3.0, 3.3]) == pytest.approx((10**-3.5, 10 ** (-3 + 1 / 3)))
    assert usable_rates([1e-4, 1e-3, 1e-2], [3.05, 3.0, 3.1]) == (1e-4, 1e-2)  # all, so perhaps more
    assert usable_rates([1e-4, 1e-3, 1e-2, 1e-1], [3.0, 4.0, 3.0, 4.0])[1] < 1e-3  # around the first best alone


def test_sensitivity_to_the_learning_rate(capsys, tmp_path):
    """small: 3.2, 3.0, 3.3 with one seed, and 0.1 more with another; wide: the largest rate diverges."""
    for i, (rate, loss) in enumerate({1e-4: 3.2, 1e-3: 3.0, 1e-2: 3.3}.items()):
        for seed in range(2):
            write_run(tmp_path / f"s{i}{seed}", [9, loss + 0.1 * seed], seed, learning_rate=rate)
        write_run(tmp_path / f"w{i}", [9, None if i == 2 else loss], model=WIDE, learning_rate=rate,
                  code=6 if i == 2 else 0)
    write_run(tmp_path / "w3", [9, 2], seed=1, model=WIDE, learning_rate=1e-3)  # a seed that has not run at all rates
    found = numbers(capsys, tmp_path)["rates"]
    small, wide = found["learning_rate"]
    assert found["muon_learning_rate"] == [] and small["label"].startswith("d1_2heads_64wide") and small["seeds"] == 2
    assert small["val_loss"] == pytest.approx([3.25, 3.05, 3.35]) and small["best_rate"] == 1e-3
    assert small["decades"] == pytest.approx(0.5 + 1 / 3) and small["sensitivity"] == pytest.approx(0.5 / 3)
    assert small["decades_by_seed"] == pytest.approx([0.5 + 1 / 3] * 2)
    assert small["sensitivity_by_seed"] == pytest.approx([0.5 / 3] * 2)
    guess = math.log(VOCAB)
    assert wide["seeds"] == 1 and wide["diverged"] == 1 and wide["runs"] == 4
    assert wide["decades"] == pytest.approx(0.5 + 0.1 / (guess - 3))
    assert wide["sensitivity"] == pytest.approx((3.2 + 3.0 + guess) / 3 - 3)
    out = run_compare(capsys, tmp_path).out
    assert "### Over the learning rate, at equal tokens" in out and "nan" not in out
    assert "| 2 | 3, 0.0001 to 0.01 | 0.001 | 3.0500 | 0.00032 to 0.0022 | 0.83 (0.83 to 0.83) | 0.167" in out


def test_the_usable_range_is_that_of_the_mean_curve(capsys, tmp_path):
    """Of two seeds whose noise has opposite signs and cancels in the mean, with which each alone has another range."""
    write_sweep(tmp_path, [(SMALL, rate, [loss + noise, loss - noise]) for rate, loss, noise in
                           [(1e-4, 3.2, 0.05), (1e-3, 3.0, -0.05), (1e-2, 3.2, 0.05)]])
    row, = numbers(capsys, tmp_path)["rates"]["learning_rate"]
    assert row["decades"] == pytest.approx(1.0) and row["sensitivity"] == pytest.approx(0.4 / 3)
    assert row["decades_by_seed"] == pytest.approx([2 * 0.1 / 0.3, 2.0])
    assert "| 1.00 (0.67 to 2.00) | 0.133 (0.067 to 0.200) |" in run_compare(capsys, tmp_path).out


def test_lines_at_their_best_rates(capsys, tmp_path):
    """wide is best at 1e-3, small at 1e-2; by scipy on the losses there. A third line diverges at its best rate."""
    from scipy import stats

    seeds, rates = np.array([0.0, 0.01, 0.03]), (1e-4, 1e-3, 1e-2)
    lines = [(SMALL, [4, 3.5, 3.4]), (WIDE, [4.1, 3.3, 3.6]), (SMALL | {"n_head": 4}, [5, 4, 5])]
    write_sweep(tmp_path, [(model, rate, loss + (1 + i) * seeds) for i, (model, losses) in enumerate(lines)
                           for rate, loss in zip(rates, losses, strict=True)])
    rows = numbers(capsys, tmp_path)["rates"]["learning_rate"]
    assert rows[0]["best_against"] is None and [row["best_rate"] for row in rows] == [1e-2, 1e-3, 1e-3]
    tests = [row["best_against"] for row in rows[1:]]
    expected = [stats.ttest_ind(b, 3.4 + seeds, equal_var=False) for b in (3.3 + 2 * seeds, 4 + 3 * seeds)]
    for test, by_scipy in zip(tests, expected, strict=True):
        assert test["against"] == rows[0]["label"] and test["p"] == pytest.approx(by_scipy.pvalue)
        assert [test["low"], test["high"]] == pytest.approx(list(by_scipy.confidence_interval(0.95)))
    assert tests[0]["difference"] == pytest.approx(-0.1 + np.mean(seeds))
    assert tests[1]["p_holm"] == pytest.approx(2 * tests[1]["p"]) and tests[0]["p_holm"] == tests[0]["p"]
    out = run_compare(capsys, tmp_path).out
    cell = f"{tests[0]['difference']:+.4f} ({tests[0]['low']:+.4f} to {tests[0]['high']:+.4f})"
    assert f"| {cell} | {tests[0]['p_holm']:.2g} |" in out and "best rate was chosen by the same runs" in out
    assert f"at its best against `{rows[0]['label']}` at its best" in out
    (tmp_path / "7-2" / "status.json").write_text(json.dumps({"reason": "step 20: loss nan", "step": 20, "code": 6}))
    assert numbers(capsys, tmp_path)["rates"]["learning_rate"][2]["best_against"]["p"] is None


def test_a_single_seed_at_the_best_rates_has_dashes(capsys, tmp_path):
    write_sweep(tmp_path, [(model, rate, [4 - rate]) for model in (SMALL, WIDE) for rate in (1e-4, 1e-3, 1e-2)])
    assert "| 0 | +0.0000 | - |\n" in run_compare(capsys, tmp_path).out


def test_a_run_without_a_loss_at_the_point_is_no_guess(tmp_path):
    write_sweep(tmp_path, [(SMALL, rate, [4.0, 4.1]) for rate in (1e-4, 1e-3, 1e-2)])
    groups = group_runs([read_run(path) for path in find_runs([str(tmp_path)], "runs")])
    assert over_rates(groups, "learning_rate", 20_000)[0]["seeds"] == 2
    log = groups[1].runs[0].log
    log["val_loss"][-1] = math.nan  # seed 0 was not evaluated there at one of the rates
    assert over_rates(groups, "learning_rate", 20_000)[0]["val_loss"] == [4.1, 4.1, 4.1]


def test_a_rate_of_0_has_no_range(capsys, tmp_path):
    write_sweep(tmp_path, [(SMALL, rate, [4.0, 4.1]) for rate in (0.0, 1e-3, 1e-2)])
    found = run_compare(capsys, tmp_path, "--plots", tmp_path / "plots")
    assert found.code == 0 and found.err == "" and "Over the learning rate" not in found.out


def test_two_rates_or_none_that_learns_have_no_range(capsys, folder):
    write_run(folder / "other", [9.0, 4.0], learning_rate=1.0)
    for i in range(3):
        write_run(folder / f"diverged{i}", [9.0, None], learning_rate=0.1**i, warmup_steps=2, code=6)
    assert numbers(capsys, folder)["rates"]["learning_rate"] == []
    assert "Over the learning rate" not in run_compare(capsys, folder).out


# -----------------------------------------------------------------------------
# spikes, plots, cards


def test_spikes():
    rng = np.random.default_rng(0)
    loss = 3 + 8 * np.exp(-np.arange(2000) / 200) + rng.normal(0, 0.03, 2000)  # falls as a training loss does
    assert spikes(loss).sum() == 0
    loss[[5, 300, 301, 1500]] += 0.5
    loss[700] -= 0.5
    assert np.flatnonzero(spikes(loss)).tolist() == [300, 1500]  # not among the first 20, and not downwards
    loss[900:902] = math.nan
    assert np.flatnonzero(spikes(loss)).tolist() == [300, 1500]
    assert spikes(np.full(100, math.nan)).sum() == spikes(np.array([])).sum() == 0
    loss[17:24] += 0.5
    assert np.flatnonzero(spikes(loss)).tolist() == [300, 1500]  # it began among the first 20


@pytest.mark.parametrize("n", [0, 1, 20, 21, 49, 51, 52, 400])
def test_spikes_are_those_of_a_loop_over_the_steps(n):
    def one_by_one(loss):
        above = np.zeros(len(loss), dtype=bool)
        for i in range(1, len(loss)):
            before = loss[max(0, i - 50) : i]
            with np.errstate(invalid="ignore"):  # of two infinities
                noise = 1.4826 * finite_median(abs(np.diff(before))) / math.sqrt(2)
            above[i] = loss[i] > finite_median(before) + 7 * noise
        return np.array([i >= 20 and above[i] and not above[i - 1] for i in range(len(loss))], dtype=bool)

    rng = np.random.default_rng(n)
    for part_nan in (0.0, 0.1, 0.9):
        for _ in range(5):
            loss = rng.standard_t(1.5, n)  # many far outside
            loss[rng.random(n) < part_nan] = math.nan
            assert spikes(loss).tolist() == one_by_one(loss).tolist()
            loss[rng.random(n) < part_nan] = math.inf
            assert spikes(loss).tolist() == one_by_one(loss).tolist()


def test_spikes_are_counted(capsys, tmp_path):
    losses = [5 + 0.01 * (i % 5) for i in range(60)]
    losses[40] = 6.0
    write_run(tmp_path / "run", [4.0], val_every=60, losses=losses)
    assert numbers(capsys, tmp_path)["at_equal"]["tokens"]["groups"][0]["spikes"] == [1]
    assert "1 loss spikes" in run_compare(capsys, "--card", tmp_path / "run").out


def png_size(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_plots(capsys, folder):
    for rate in (1e-2, 1e-1):
        for seed in range(2):
            bad = seed and rate == 1e-1
            write_run(folder / f"{rate}-{seed}", [5.0, None if bad else 4.5], seed, learning_rate=rate,
                      status="step 20" if bad else "finished", code=6 if bad else 0)
    assert run_compare(capsys, folder, "--plots", folder / "plots").code == 0
    names = {path.name for path in (folder / "plots").iterdir()}
    assert names == {"loss_over_tokens.png", "loss_over_time.png", "stability.png", "learning_rate.png"}
    for name in names:
        width, height = png_size(folder / "plots" / name)
        assert 500 < width < 1000 and 300 < height < 1200 and (folder / "plots" / name).stat().st_size < 150_000


@pytest.fixture
def figures(monkeypatch):
    """{file name: figure} of the plots that are drawn; none is written."""
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.update({path.name: figure}))
    return drawn


def band_of(panel, i: int) -> dict[float, tuple[float, float]]:
    """{x: (lowest, highest)} of the i-th band, which must be visible and have the colour of its line."""
    band = panel.collections[i]
    assert band.get_alpha() == 0.2 and tuple(band.get_facecolor()[0]) == to_rgba(f"C{i}", 0.2)
    x, y = band.get_paths()[0].vertices.T
    return {at: (y[x == at].min(), y[x == at].max()) for at in sorted(set(x))}


def data_of(line) -> dict[float, float]:
    return dict(zip(*map(np.ndarray.tolist, map(np.asarray, line.get_data())), strict=True))


def test_what_the_losses_plots_show(capsys, folder, figures):
    """
    Mean and range of the three seeds, and below of their distance from the mean of small; wide takes 2 s a step. A run
    that diverges has a cross where it ends.
    """
    write_run(folder / "wide3", [4.9, None], seed=3, step_s=2.0, model=WIDE, code=6)
    assert run_compare(capsys, folder, "--plots", folder / "plots").code == 0
    for name, step, wide_step in (("loss_over_tokens.png", 1000, 1000), ("loss_over_time.png", 1.0, 2.0)):
        panel, below = figures[name].axes
        small, wide, cross = panel.lines
        assert data_of(small) == pytest.approx({10 * step: 5 + 0.04 / 3, 20 * step: 4 + 0.04 / 3})
        assert data_of(wide) == pytest.approx({10 * wide_step: 4.9 + 0.044 / 4, 20 * wide_step: 3.9 + 0.044 / 3})
        assert (small.get_color(), wide.get_color(), cross.get_color()) == ("C0", "C1", "C1")
        assert band_of(panel, 0) == {10 * step: pytest.approx((5, 5.03)), 20 * step: pytest.approx((4, 4.03))}
        assert band_of(panel, 1) == {10 * wide_step: pytest.approx((4.9, 4.933)),
                                     20 * wide_step: pytest.approx((3.9, 3.933))}
        assert list(data_of(cross)) == [20 * wide_step] and cross.get_marker() == "x"
        m = 0.04 / 3
        bands = [{x * step: pytest.approx((-m, 0.03 - m)) for x in (10, 20)},
                 {x * step: pytest.approx((-0.1 - m, -0.067 - m)) for x in (10, 20)} if step == wide_step else
                 {20.0: pytest.approx((0.9 - m, 0.933 - m))}]  # after 20 s wide is where small was after 10
        assert [band_of(below, i) for i in range(2)] == bands
        small, wide = below.lines
        assert data_of(small) == pytest.approx(dict.fromkeys(bands[0], 0.0), abs=1e-9)
        assert data_of(wide) == pytest.approx(dict.fromkeys(bands[1], (-0.1 if step == wide_step else 0.9) + 0.1 * m))
        assert "difference from\nd1_2heads_64wide" in below.get_ylabel() and below.get_xlabel().startswith("training t")


def test_the_scale_of_differences_is_that_of_the_second_half(capsys, tmp_path, figures):
    write_run(tmp_path / "a", [9.0, 8.0, 5.0, 4.0])
    write_run(tmp_path / "b", [7.0, 7.9, 5.1, 4.2], learning_rate=1.0)
    assert run_compare(capsys, tmp_path, "--plots", tmp_path / "plots").code == 0
    assert figures["loss_over_tokens.png"].axes[1].get_ylim() == pytest.approx((-0.02, 0.22))


def test_no_difference_is_drawn_from_a_group_that_diverged(capsys, tmp_path, figures):
    write_run(tmp_path / "a", [5.0, None], code=6)
    write_run(tmp_path / "b", [5.0, 4.0], learning_rate=1.0)
    write_run(tmp_path / "c", [5.0, None], code=6, learning_rate=2.0)
    assert run_compare(capsys, tmp_path, "--plots", tmp_path / "plots").code == 0
    assert len(figures["loss_over_tokens.png"].axes) == 1
    assert run_compare(capsys, tmp_path, "--plots", tmp_path / "plots", "--baseline", "b").code == 0
    assert [line.get_color() for line in figures["loss_over_tokens.png"].axes[1].lines] == ["C0"]


def test_what_the_stability_plot_shows(capsys, tmp_path, figures):
    """Loss above with a triangle at its spike, cut off at 1.25 ln V; the gradient norm, and not the loss, below."""
    losses = [5 + 0.01 * (i % 5) for i in range(60)]
    losses[40] = 20.0
    write_run(tmp_path / "run", [4.0], val_every=60, losses=losses)
    assert run_compare(capsys, tmp_path / "run", "--plots", tmp_path / "plots").code == 0
    above, below = figures["stability.png"].axes
    tokens, (loss, spike), [norm] = [1000 * n for n in range(1, 61)], above.lines, below.lines
    highest = 1.25 * math.log(VOCAB)
    assert data_of(loss) == pytest.approx(dict(zip(tokens, np.minimum(losses, highest), strict=True)))
    assert data_of(spike) == {41_000: pytest.approx(highest)} and spike.get_marker() == "v"
    assert data_of(norm) == pytest.approx({x: 1 + x / 100_000 for x in tokens}) and "gradient" in below.get_ylabel()


def test_what_the_learning_rate_plot_shows(capsys, tmp_path, figures):
    """
    At the last tokens at which all were evaluated, 20,000; of three rates one diverges, and 0 has no place. Below, one
    loss spike in one of two runs.
    """
    spike = [5 + 0.01 * (i % 5) + 4 * (i == 25) for i in range(30)]
    for name, losses, rate, others in [
            ("a0", [5.0, 4.0, 3.0], 1e-4, {}), ("a1", [5.0, 4.2, 3.0], 1e-4, {"seed": 1}),
            ("b0", [3.5], 1e-3, {"val_every": 20}), ("c0", [5.0, 4.5, 3.0], 1e-2, {"losses": spike}),
            ("c1", [5.0, None], 1e-2, {"seed": 1, "code": 6}), ("zero", [6.0, 6.1, 6.2], 0.0, {})]:
        write_run(tmp_path / name, losses, learning_rate=rate, max_steps=30, **others)
    assert run_compare(capsys, tmp_path, "--plots", tmp_path / "plots").code == 0
    panel, below = figures["learning_rate.png"].axes
    cross, means = panel.lines
    assert data_of(means) == pytest.approx({1e-4: 4.1, 1e-3: 3.5, 1e-2: 4.5}) and "20,000 tokens" in panel.get_title()
    assert band_of(panel, 0) == {1e-4: pytest.approx((4.0, 4.2)), 1e-3: (3.5, 3.5), 1e-2: (4.5, 4.5)}
    assert list(data_of(cross)) == [1e-2] and [text.get_text() for text in panel.texts] == ["  1 of 2"]
    [spikes] = below.lines
    assert data_of(spikes) == {1e-4: 0, 1e-3: 0, 1e-2: 0.5} and band_of(below, 0)[1e-2] == (0, 1)


def test_what_cannot_be_written(capsys, folder):
    (folder / "file").touch()
    for option in ("--plots", "--json"):
        found = run_compare(capsys, folder, option, folder / "file" / "there")
        assert found.code == 5 and "error: cannot write to" in found.err


def test_card_of_a_real_run(runs, capsys, monkeypatch):
    """All that a run records, through the real command; no path, and a second machine is named."""
    assert runs(val_every=3, save_every=3, stop_after=3) == 0
    monkeypatch.setattr(machine, "versions", lambda device: {"device": "another", "torch": "9"})
    assert runs(val_every=3, save_every=3) == 0
    capsys.readouterr()
    found = run_compare(capsys, "--card", runs.path)
    assert found.code == 0 and found.err == ""
    names = {"loss_over_tokens.png", "loss_over_time.png", "stability.png"}
    assert {path.name for path in runs.path.glob("*.png")} == names
    assert run_compare(capsys, "--card", runs.path, "--plots", runs.directory / "plots").code == 0
    assert {path.name for path in (runs.directory / "plots" / "run").iterdir()} == names
    shards = json.loads((runs.data / "manifest.json").read_text())["shards"]
    expected = ["step 6 of 6, finished, exit code 0", "| learning_rate | 0.01 |", "768 tokens", "tyro 1",
                "attention fused SDPA for CPU", "dtype float32", "compiled False", "(source-00000003.diff)",
                "cpu_cores", "went on with other versions", "| went on, config-00000003.json | device ",
                f"-> another, torch {train_gpt2.torch.__version__} -> 9",
                *(f"{one['file']} | {one['sha256']}" for one in shards)]
    assert [words for words in expected if words not in found.out] == []
    assert f"{metrics(runs.path)[-1]['val_loss']:.4f} at step 6" in found.out
    assert str(runs.directory) not in found.out and "nan" not in found.out


def test_what_a_run_records(runs):
    assert runs() == 0
    config = json.loads((runs.path / "config.json").read_text())
    assert config["kernels"] == {"attention": "fused SDPA for CPU", "window_backend": None, "parts": "plain",
                                 "compiled": False, "dtype": "float32"}
    assert config["val_targets"] == 64
    manifest = json.loads((runs.data / "manifest.json").read_text())
    assert config["shards"] == {one["file"]: one["sha256"] for one in manifest["shards"]}
    environment = config["environment"]
    assert environment["packages"]["torch"] == metadata.version("torch") and environment["cpu_cores"] >= 1
    pinned = {line.split("==")[0] for line in (machine.Path(machine.__file__).parent / "requirements.txt").open()}
    assert set(environment["packages"]) == pinned and environment["gpus"] == 0 and environment["driver"] is None


def test_driver_version():
    for text in ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Mon Feb 12 2024\nGCC version: 12.3.0",
                 "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.161.08  Release Build  (dvs)\n"):
        assert machine.first(machine.DRIVER, text) == "535.161.08"


def test_plots_of_runs_without_any_update(capsys, tmp_path):
    for seed in range(2):
        path = write_run(tmp_path / str(seed), [4.0], seed, status="step 1: loss nan", code=6)
        (path / "metrics.jsonl").write_text("")
    found = run_compare(capsys, tmp_path, "--plots", tmp_path / "plots")
    assert found.code == 0 and found.err == "" and len(list((tmp_path / "plots").iterdir())) == 3


@pytest.mark.filterwarnings("error")
def test_plots_of_a_log_without_gradient_norms(capsys, tmp_path):
    path = write_run(tmp_path / "run", [4.0])
    rows = [json.dumps({key: value for key, value in row.items() if key != "grad_norm"}) for row in metrics(path)]
    (path / "metrics.jsonl").write_text("\n".join(rows))
    assert run_compare(capsys, "--card", path).err == "" and len(list(path.glob("*.png"))) == 3


def test_card_of_a_run_that_failed_at_once(capsys, tmp_path):
    path = write_run(tmp_path / "run", [4.0], status="out of memory: use less", code=1)
    (path / "metrics.jsonl").unlink()
    (path / "source.diff").write_text("a" * 40 + "\ndiff --git a/x b/x\n--- a/x\n+++ b/x\n+one\n-two\n three\n")
    found = run_compare(capsys, "--card", path)
    assert found.code == 0 and "step 0 of 10, out of memory: use less, exit code 1" in found.out
    assert f"{'a' * 40} and 2 changed lines (source.diff)" in found.out and "| updates | none |" in found.out
    assert "/somewhere" not in found.out and found.err == "no plots: run has no updates\n"
    assert run_compare(capsys, "--card", path, "--plots", tmp_path / "plots").err == found.err


def test_card_of_a_run_whose_directory_cannot_be_written_to(capsys, tmp_path):
    path = write_run(tmp_path / "run", [4.0])
    (path / "stability.png").mkdir()
    found = run_compare(capsys, "--card", path)
    assert found.code == 0 and "# run" in found.out
    assert found.err.startswith("no plots: cannot write to ") and found.err.count("\n") == 1
    (tmp_path / "plots").touch()
    assert run_compare(capsys, "--card", path, "--plots", tmp_path / "plots").code == 5


def test_real_runs(tmp_path, capsys):
    """Two settings with two seeds each, trained and compared by the real commands."""
    make_data(tmp_path / "data", tokenizer="gpt2")
    runs = Runs(tmp_path)
    for rate in (1e-4, 3e-2):
        for seed in (0, 1):
            assert runs(run_name=f"{rate}-{seed}", learning_rate=rate, seed=seed, val_every=3) == 0
    capsys.readouterr()
    found = numbers(capsys, runs.out_dir)
    assert list(found["runs"]) == ["learning_rate=0.0001", "learning_rate=0.03"] and found["notes"] == []
    for axis in ("tokens", "flops"):
        last = metrics(runs.out_dir / "0.03-1")[-1]
        assert found["at_equal"][axis]["groups"][1]["val_loss"]["1"] == pytest.approx(last["val_loss"])
    assert found["at_equal"]["tokens"]["groups"][0]["bits_per_byte"] is not None
    assert "At equal FLOPs: as at equal tokens" in run_compare(capsys, runs.out_dir).out


