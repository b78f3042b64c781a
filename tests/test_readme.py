"""README against the repository."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout: only git knows which files belong")
def test_file_map_is_the_repository():
    listed = subprocess.run(
        ["git", "ls-files"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()
    files = {name for name in listed if (ROOT / name).exists()}
    table = README.split("## Files")[1]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(.*?)`", row)]
    assert len(named) == len(set(named))
    assert set(named) == files


def test_first_screen_has_both_commands():
    top = README.splitlines()[:12]
    assert "pip install -r requirements.txt && python train_gpt2.py --model d12_post_norm_qk_norm" in top
    assert "pip install -r requirements-dev.txt && python -m pytest" in top


def test_exit_codes_are_those_of_the_code():
    import rundir

    table = README.split("| exit code | meaning |")[1].split("\n\n")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)} - {1}  # Python's own
    assert codes == {value for name, value in vars(rundir).items() if name.isupper() and isinstance(value, int)}


def test_promises_have_the_published_figures():
    faults = json.loads((ROOT / "docs" / "reliability.json").read_text())["faults"]

    def total(column: str, kind: str = "") -> str:
        return f"{sum(fault[column] for fault in faults if re.search(kind, fault['fault'])):,}"

    promises = README.split("What a run survives")[1].split("\n\nCtrl-C")[0]
    figures = set(re.findall(r"\d[\d,]*\d", promises))
    assert figures >= {total("injected"), total("survived"), total("detected"), total("naive_failed"),
                       total("naive_tried"), total("injected", "^kill -9"), total("injected", "^power"),
                       total("injected", "^checkpoint: (?!damaged)"), total("injected", "^pickle"),
                       total("injected", "^shard(?!: truncated while)"), total("injected", "^NaN"),
                       total("injected", "ENOSPC|EIO|^a disk|files that cannot|place that"),
                       total("injected", "^SIG|hang of"), total("injected", "setting|other data")}
