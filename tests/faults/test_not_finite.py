"""
A loss, a gradient or a weight that is not finite, in one process or in one of two: no update is made of it, nothing of
it is saved, all end with exit code 6 and the place where it begins, and the run goes on as if it had not been.
"""

import re

import pytest
from small import metrics, status, steps, tensors

import checkpoint
from tests.faults.table import row
from tests.faults.test_processes import LONG, place, wholes  # noqa: F401 (fixtures)

FAULT = "NaN or infinity in loss, gradient or weight, in one process or in one of two"
WEIGHT = "transformer.h.0.mlp.c_fc.weight"
POISONS = {  # what is named first
    "loss": "the loss", "gradient": f"the gradient of {WEIGHT}", "weight": WEIGHT,
    "sum": None,  # is finite when the step is done again
}


@pytest.mark.parametrize(("step", "factor"), [  # a step with a save after it, and one without
    (4, "nan"), (5, "inf"), pytest.param(4, "inf", marks=LONG), pytest.param(5, "nan", marks=LONG)])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(("n", "rank", "optimizer"), [
    (2, 1, "adamw"), (2, 0, "adamw"), (1, 0, "adamw"), (1, 0, "muon")],
    ids=["rank 1 of 2", "rank 0 of 2", "alone", "alone, Muon"])
def test_not_finite(place, wholes, n, rank, optimizer, poison, factor, step):  # noqa: F811
    changes = {"batch_size": 2 // n, "total_batch_tokens": 2 * 2 * 32, "optimizer": optimizer}
    with row(FAULT) as counts:
        counts.injected += 1
        run = place.start(n, rank=rank, step=step, poison=poison, factor=factor, changes=changes)
        assert run.wait() == [6] * n, run.said()[-3000:]
        said, ended = status(place.path), step if poison != "weight" else step + 1
        assert said["code"] == 6 and said["step"] == ended - 1 and len(metrics(place.path)) == ended - 1
        assert re.match(rf"step {ended}: (loss|a weight|{WEIGHT})", said["reason"]), said
        named = POISONS[poison]
        if named:
            assert f"the first that is not finite: {named}" + f" on process {rank}" * (n > 1) in said["reason"]
            assert re.search(r", windows \d+", said["reason"])
        else:
            assert "all is finite when it is done again" in said["reason"]
        assert steps(place.path)[-1] == (4 if ended == 6 or (step == 5 and poison != "weight") else 2)
        found = checkpoint.list_checkpoints(place.path) + checkpoint.list_checkpoints(place.path / "not-finite")
        assert all(checkpoint.find_fault(path) is None for path in found)
        assert found[-1].name == checkpoint.directory_name(ended - 1)
        assert all(x.isfinite().all() for path in found[:-1] for x in tensors(path).values())
        place.finish(n, wholes[2].path, **changes) if n == 2 else finish_alone(place, changes)
        counts.detected += 1


def finish_alone(place, changes):  # noqa: F811
    assert place.start(1, changes=changes).wait() == [0]
    assert status(place.path)["reason"] == "finished"
    assert all(x.isfinite().all() for x in tensors(checkpoint.list_checkpoints(place.path)[0]).values())


@pytest.mark.parametrize("poison", POISONS)
def test_without_the_check_it_is_saved(place, poison):  # noqa: F811
    """The control."""
    with row(FAULT) as counts:
        run = place.start(2, rank=1, step=4, poison=poison, without=["check"])
        assert run.wait() == [0, 0], run.said()[-3000:]
        saved = tensors(checkpoint.list_checkpoints(place.path)[0]).values()
        counts.control(not all(x.isfinite().all() for x in saved))
