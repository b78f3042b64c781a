"""A long run with many saves holds no more memory and no more open files at its end than at its beginning."""

import statistics
import time

from tests.faults import trial
from tests.faults.table import record
from tests.faults.test_kill import OPTIONS, Place, whole  # noqa: F401 (a fixture)

STEPS = min(20_000, 2_000 * trial.SCALE)


def growth(directory, data, n_steps, leak=False) -> tuple[float, int]:
    """In MiB, and in open files: from the first quarter of the saves to the last."""
    place = Place(directory, data)
    options = OPTIONS | {"max_steps": n_steps, "save_every": 100, "val_every": 500}
    code = trial.run(place.runs.options(**options), place.out, "watch", (directory / "usage", leak))
    assert code == 0, place.out.read_text()[-1000:]
    rows = [line.split() for line in (directory / "usage").read_text().splitlines()]
    mib, n_files = [float(row[0]) for row in rows], [int(row[1]) for row in rows]
    quarter = len(rows) // 4
    return statistics.median(mib[-quarter:]) - statistics.median(mib[:quarter]), max(n_files[-quarter:]) - max(
        n_files[:quarter])


def test_nothing_grows(whole, tmp_path):  # noqa: F811
    begun = time.time()
    mib, n_files = growth(tmp_path / "place", whole.runs.data, STEPS)
    assert mib < 8 and n_files == 0, (mib, n_files)
    leaked_mib, leaked_files = growth(tmp_path / "control", whole.runs.data, 1_000, leak=True)
    assert leaked_mib > mib + 4 and leaked_files > 4, (leaked_mib, leaked_files)
    record(f"{STEPS:,} steps with {STEPS // 100} saves, no growth", 1, 1, 0, 1, 1, time.time() - begun)
