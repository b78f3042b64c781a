"""A long run with many saves holds no more memory and no more open files at its end than at its beginning."""

import statistics

from tests.faults import trial
from tests.faults.table import row
from tests.faults.test_kill import OPTIONS, Place, whole  # noqa: F401 (a fixture)

STEPS = 2_000 if trial.SCALE == 1 else 20_000


def growth(directory, data, n_steps, leak=False) -> tuple[float, int]:
    """In MiB, and in open files: from the second quarter of a run, after its first validation, to the last."""
    place = Place(directory, data)
    options = OPTIONS | {"max_steps": n_steps, "save_every": 100, "val_every": 500}
    code = trial.run(place.runs.options(**options), place.out, "watch", (directory / "usage", leak))
    assert code == 0, place.out.read_text()[-1000:]
    rows = [line.split() for line in (directory / "usage").read_text().splitlines()]
    assert len(rows) > 2 * n_steps // 100 - 3  # of each save a rename, and of what is removed
    quarter = len(rows) // 4
    early, late = rows[quarter:2 * quarter], rows[-quarter:]
    mib, n_files = ([statistics.median(float(row[i]) for row in part) for part in (early, late)] for i in (0, 1))
    return mib[1] - mib[0], n_files[1] - n_files[0]


def test_nothing_grows(whole, tmp_path):  # noqa: F811
    most = 1 + 1e-4 * STEPS  # MiB: the loop keeps each step's time for their median
    with row(f"{STEPS:,} steps with {STEPS // 100} saves: growth of memory and open files") as counts:
        counts.injected += 1
        mib, n_files = growth(tmp_path / "place", whole.runs.data, STEPS)
        assert mib < most and n_files == 0, (mib, n_files)
        counts.measured(f"{mib:.2f} MiB, {n_files:.0f} files")
        leaked_mib, leaked_files = growth(tmp_path / "control", whole.runs.data, 1_000, leak=True)
        counts.control(leaked_mib > most and leaked_files > 0)
        assert counts.naive_failed, (leaked_mib, leaked_files)
