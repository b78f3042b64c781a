"""README against the repository."""

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
