"""The table of docs/RELIABILITY.md: rows added up, the bound, what the page says of failures; the digest of results."""

import json
from types import SimpleNamespace

import pytest
import small
import torch

from tests.faults import publish
from tests.faults.table import row


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """`recorded()`: the rows so far."""
    path = tmp_path / "table"
    monkeypatch.setenv("FAULTS_TABLE", str(path))
    return lambda: [json.loads(text) for text in path.read_text().splitlines()]


def cells(one: dict) -> list[str]:
    return publish.line(one, "abcdefgh").strip("|\n ").split(" | ")


def test_what_tests_record_adds_up(recorded):
    for seconds in 0.5, 2.0, 1.0:
        with row("a") as counts:
            counts.injected += 10
            counts.survived += 7
            counts.detected += 3
            counts.took(seconds)
    with row("b") as counts:
        counts.injected += 1
        counts.detected += 1
    with row("a") as counts:
        counts.control(True)
        counts.control(False)
    a, b = publish.add_up(recorded())
    assert cells(a)[:6] == ["a", "30", "21", "9", "1 of 2 failed", "9.50%"] and cells(a)[6].endswith(" (2.0)")
    assert cells(b)[:6] == ["b", "1", "0", "1", "-", "95.00%"] and "(" not in cells(b)[6]


def test_a_trial_that_ends_a_test_has_failed(recorded):
    with pytest.raises(ZeroDivisionError), row("a") as counts:
        for i in range(1050):
            counts.injected += 1
            counts.survived += 1 / (1049 - i) > 0
    (a,) = publish.add_up(recorded())
    assert a["failed"] == 1 and cells(a)[1:4] == ["1050, **1 failed**", "1049", "0"] and cells(a)[5] == "0.45%"


def test_what_is_measured_is_no_trial(recorded):
    with row("a") as counts:
        counts.injected += 1
        counts.measured("1e-07")
        counts.control(True)
    (a,) = publish.add_up(recorded())
    assert cells(a)[:6] == ["a: 1e-07", "0", "0", "0", "1 of 1 failed", "-"]


def test_what_is_skipped_is_counted(recorded):
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception), row("a"):
            pytest.skip("no right to")
    (a,) = publish.add_up(recorded())
    assert cells(a)[1:6] == ["0, 2 skipped", "0", "0", "-", "-"]


@pytest.mark.parametrize(("n_failed", "n", "expected"), [
    (0, 100, 0.02951), (0, 1000, 0.002991), (1, 100, 0.04656), (5, 100, 0.10225), (500, 1000, 0.52651), (7, 7, 1.0)])
def test_bound(n_failed, n, expected):
    """scipy.stats.beta.ppf(0.95, n_failed + 1, n - n_failed)"""
    assert publish.upper_bound(n_failed, n) == pytest.approx(expected, rel=1e-3)


RUN = {"command": "x", "seed": 123456, "commit": "abcdefgh", "on": "a machine", "cores": 2, "minutes": 3.0,
       "exit_code": 0, "tests": 9, "tests_failed": [], "tests_skipped": [], "save": None}


def test_rows_measured_anew_take_the_place_of_the_old(recorded):
    """Each with its own commit; a run of which nothing is left is not named."""
    for fault in "ab":
        with row(fault) as counts:
            counts.injected += 1
            counts.survived += 1
    rows = publish.add_up(recorded())
    first = publish.merge({}, RUN | {"faults": rows, "save": {"ratio": 1.0}}, "first")
    second = publish.merge(first, RUN | {"commit": "12345678", "faults": rows[1:]}, "second")
    assert [(one["fault"], one["commit"], one["run"]) for one in second["faults"]] == [
        ("a", "abcdefgh", "first"), ("b", "12345678", "second")]
    assert list(second["runs"]) == ["first", "second"] and second["save"]["run"] == "first"
    assert publish.table(second).splitlines()[-1].endswith("| 1234567 |")
    third = publish.merge(second, RUN | {"faults": rows}, "third")
    assert list(third["runs"]) == ["first", "third"]  # the time of a save is of the first
    assert list(publish.merge({}, RUN | {"faults": rows}, "alone")["runs"]) == ["alone"]


def test_rows_are_in_the_order_of_the_tests(recorded, monkeypatch):
    for number in 2, 10, 1:
        monkeypatch.setenv("FAULTS_TEST", str(number))
        with row(f"of test {number}"):
            pass
    assert [one["fault"] for one in publish.add_up(recorded())] == ["of test 1", "of test 2", "of test 10"]


def test_processes_share_the_tests(monkeypatch):
    """Each test is in one of them, with the number that it has in all."""
    seen = []
    for i in range(3):
        items = [SimpleNamespace(name=name, user_properties=[]) for name in "abcdefg"]
        monkeypatch.setenv("FAULTS_SHARE", f"{i}/3")
        publish.pytest_collection_modifyitems(items)
        seen += [(dict(item.user_properties)["number"], item.name) for item in items]
    assert sorted(seen) == list(enumerate("abcdefg"))


def test_what_is_harmless_has_not_failed(recorded):
    with row("a") as counts:
        counts.injected += 3
        counts.detected += 1
        counts.harmless += 2
    (a,) = publish.add_up(recorded())
    assert a["failed"] == 0 and cells(a)[1:4] == ["3, 2 harmless", "0", "1"]


@pytest.mark.parametrize("bad", [False, True])
def test_the_page_says_what_failed(bad):
    save = {"save": 2.0, "ratio": 1.4 if bad else 1.2, "most": 1.3, "holds": not bad, "bytes": 10**9}
    run = RUN | {"faults": [], "exit_code": int(bad), "tests_failed": ["test_it"] * bad, "save": save,
                 "tests_skipped": ["test_gpu"]}
    text = publish.page(publish.merge({}, run, "today"))
    assert "FAULTS_SEED=123456" in text and "Skipped there: test_gpu." in text and "commit abcdefg," in text
    assert ("**pytest ended with exit code 1: 1 of 9 tests failed. test_it**" in text) == bad
    assert ("**which does not hold**" in text) == bad


# -----------------------------------------------------------------------------
# what "the same result" means

TENSORS = {"a": torch.tensor([[0.0, 1.0], [2.0, 3.0]]), "b": torch.zeros(3), "c": torch.zeros((), dtype=torch.int64)}
OTHERS = {  # what differs, and names of the tensors in which it does; torch.equal sees none of the first two
    "another dtype": ({"b": torch.zeros(3, dtype=torch.float64)}, ["b"]),
    "the sign of zero": ({"b": torch.tensor([0.0, -0.0, 0.0])}, ["b"]),
    "a dtype of the same bytes": ({"b": torch.zeros(3, dtype=torch.int32)}, ["b"]),
    "the last bit": ({"a": torch.nextafter(TENSORS["a"], torch.tensor([[0.0, 0.0], [0.0, 9.0]]))}, ["a"]),
    "another shape": ({"a": TENSORS["a"].reshape(4)}, ["a"]),
    "one more of no elements": ({"d": torch.zeros(0)}, ["d"]),
    "NaN": ({"b": torch.tensor([0.0, torch.nan, 0.0])}, ["b"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_digest_sees(name):
    changes, expected = OTHERS[name]
    assert small.digest(TENSORS | changes) != small.digest(TENSORS)
    assert small.different(TENSORS | changes, TENSORS) == expected


def test_the_digest_sees_names():
    renamed = {{"b": "d"}.get(name, name): tensor for name, tensor in TENSORS.items()}
    assert small.digest(renamed) != small.digest(TENSORS)
    assert small.different(renamed, TENSORS) == ["b", "d"]
    swapped = TENSORS | {"a": TENSORS["b"], "b": TENSORS["a"]}
    assert small.digest(swapped) != small.digest(TENSORS)


def test_the_digest_is_of_the_values_alone():
    """Not of their order or of how they lie in memory; a NaN is equal to itself."""
    other = {name: TENSORS[name].clone() for name in reversed(TENSORS)}
    other["a"] = TENSORS["a"].t().contiguous().t()
    assert small.digest(other) == small.digest(TENSORS) and not small.different(other, TENSORS)
    nan = {"a": torch.tensor([torch.nan])}
    assert small.digest(nan) == small.digest({"a": torch.tensor([torch.nan])})
