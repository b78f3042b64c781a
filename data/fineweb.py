"""FineWeb-10B, already GPT-2 tokens: `python -m data.fineweb N` downloads N training shards and the validation shard.

The shards are those of modded-nanogpt, 100 million tokens (200 MB) each by its account. The client goes on by itself
after a broken connection; run again after a failure, the command keeps the shards that had arrived. A larger N adds
shards.
"""

import shutil
import sys
from pathlib import Path

import tyro

from data.shards import Shard, build_manifest, locked, run_command, shard_files
from files import write_json
from rundir import BAD_OPTION, DataError

REPOSITORY = "kjj0/fineweb10B-gpt2"  # a data set of the Hugging Face hub
N_SHARDS = 103
SOURCE = f"FineWeb 10B sample, GPT-2 tokens, data set {REPOSITORY} of the Hugging Face hub"
LICENCE = "ODC-By 1.0"


def download(name: str, directory: Path) -> Path:
    """Fetch one shard into `directory` and check it. Raises DataError for a failed or damaged download."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        url = hf_hub_url(REPOSITORY, name, repo_type="dataset")
        etag = get_hf_file_metadata(url).etag or ""
        path = Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=directory))
    except Exception as error:  # the client's errors, those of the HTTP library under it, a full disk
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: download failed: {reason}; run the same command again to go on") from None
    try:
        found, _ = Shard(path).scan()
        if len(etag) == len(found) and found != etag:  # the hub's ETag of a large file is its sha256
            raise DataError(f"{path}: sha256 {found}, expected {etag}")
    except DataError as error:
        path.unlink()
        raise DataError(f"{error}; damaged on the way and deleted, run the same command again") from None
    return path


def main(n: tyro.conf.Positional[int], out: Path = Path("data")) -> int:
    """Download FineWeb-10B as GPT-2 tokens.

    Args:
        n: Training shards to have, from 1 to 103; 100 million tokens and 200 MB each. The validation shard is as large.
        out: Directory to make the data set `fineweb10B` in.
    """
    if not 1 <= n <= N_SHARDS:
        print(f"error: n {n}: expected a number of training shards from 1 to {N_SHARDS}", file=sys.stderr)
        return BAD_OPTION
    directory = out / "fineweb10B"
    directory.mkdir(parents=True, exist_ok=True)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{index:06d}.bin" for index in range(1, n + 1))]
    arriving = directory / ".download"  # not yet part of the data set
    with locked(out / ".fineweb10B.lock"):
        have = {name for _, name in shard_files(directory)}
        paths = [download(name, arriving) for name in names if name not in have]
        for path in paths:
            path.rename(directory / path.name)
        manifest = build_manifest(directory, SOURCE, LICENCE)
        write_json(directory / "manifest.json", manifest)
        shutil.rmtree(arriving, ignore_errors=True)
    for split, total in manifest["totals"].items():
        print(f"{directory}: {split}: {total['tokens']:,} tokens in {total['shards']} shards")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main, use_underscores=True)))
