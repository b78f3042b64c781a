"""Format, manifest and checks of token shards."""

import errno
import json
import os
import struct

import numpy as np
import pytest

from data import shards
from data.shards import DataError, Shard, locked, open_dataset, prepare, run_command, write_shard
from data.tokenizer import gpt2


def make_dataset(directory, train=((1, 2, 3),), val=((4, 5, 6),)):
    directory.mkdir(exist_ok=True)
    for split, lists in ("train", train), ("val", val):
        for index, tokens in enumerate(lists):
            write_shard(directory / f"{split}_{index:06d}.bin", np.array(tokens))
    return directory


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and error.value.exit_code == 7
    return message


# --- one shard


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "train_000000.bin")
    with pytest.raises(DataError, match="not a regular file"):
        Shard(tmp_path / "train_000000.bin")


def test_write_then_read(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1 << 16, 1000)
    write_shard(tmp_path / "train_000000.bin", tokens)
    content = (tmp_path / "train_000000.bin").read_bytes()
    assert struct.unpack("<4i", content[:16]) == (20240520, 1, 1000, 0) and len(content) == 1024 + 2000
    assert struct.unpack("<H", content[1024 + 2 * 7 :][:2]) == (tokens[7],)
    shard = Shard(tmp_path / "train_000000.bin")
    assert shard.n_tokens == 1000 and shard.read(0, 1000).dtype == np.uint16
    np.testing.assert_array_equal(shard.read(0, 1000), tokens)
    np.testing.assert_array_equal(shard.read(990, 10), tokens[990:])


def test_scan_in_pieces_is_the_sha256_of_the_file(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(shards, "SCAN_TOKENS", 64)
    tokens = np.arange(1000) % 300
    write_shard(path := tmp_path / "train_000000.bin", tokens)
    digest, counts = Shard(path).scan()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(counts, np.bincount(tokens, minlength=1 << 16))


@pytest.mark.parametrize("tokens", [[-1, 5], [5, 1 << 16]])
def test_ids_that_do_not_fit_are_not_written(tmp_path, tokens):
    with pytest.raises(DataError, match="ids from 0 to 65535"):
        write_shard(tmp_path / "train_000000.bin", np.array(tokens))


DAMAGE = {
    "empty file": (lambda data: b"", "0 bytes"),
    "half a header": (lambda data: data[:500], "500 bytes"),
    "magic": (lambda data: struct.pack("<i", 20240521) + data[4:], "20240521, expected 20240520"),
    "other bytes": (lambda data: b"\x93NUMPY\x01\x00" + data[8:], "not a token shard"),
    "version": (lambda data: data[:4] + struct.pack("<i", 2) + data[8:], "version 2, expected 1"),
    "no tokens": (lambda data: data[:8] + struct.pack("<i", 0) + data[12:1024], "empty"),
    "negative count": (lambda data: data[:8] + struct.pack("<i", -3) + data[12:], "empty"),
    "count too large": (lambda data: data[:8] + struct.pack("<i", 4) + data[12:], "1030 bytes, .* 4 tokens has 1032"),
    "cut off": (lambda data: data[:-1], "1029 bytes"),
    "one byte more": (lambda data: data + b"\0", "1031 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_on_opening(tmp_path, damage):
    path = make_dataset(tmp_path) / "train_000000.bin"
    change, message = DAMAGE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        Shard(path)
    assert one_line(error).startswith(str(path))
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


def test_file_truncated_while_in_use(tmp_path):
    shard = Shard(make_dataset(tmp_path, train=[range(1000)]) / "train_000000.bin")
    os.truncate(shard.path, 1024 + 2 * 500)
    assert shard.read(490, 10)[-1] == 499
    with pytest.raises(DataError, match="truncated while in use") as error:
        shard.read(495, 10)
    assert one_line(error).startswith(f"{shard.path}: 10 bytes at token 495, expected 20")


# --- a data set


def test_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="no such data directory") as error:
        open_dataset(tmp_path / "nothing")
    one_line(error)
    for missing, made in ("train", {"train": ()}), ("val", {"val": ()}):
        with pytest.raises(DataError, match=f"no {missing} shards") as error:
            open_dataset(make_dataset(tmp_path / missing, **made))
        one_line(error)


def test_manifest_of_shards_that_came_without(tmp_path):
    text = "Now is the winter of our discontent—"
    tokens = [50256, *gpt2().encode_ordinary(text)]
    train = [f"fineweb_train_{index:06d}.bin" for index in range(1, 9)]
    for name in [*train[5:], "fineweb_val_000000.bin", *train[:5][::-1]]:
        write_shard(tmp_path / name, np.array(tokens))
    (tmp_path / "._fineweb_train_000001.bin").write_bytes(b"not a shard")
    dataset = open_dataset(tmp_path, vocab_size=50304)
    assert [shard.path.name for shard in dataset.train] == train
    assert [shard.path.name for shard in dataset.val] == ["fineweb_val_000000.bin"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == dataset.manifest and dataset.tokenizer == "gpt2" and manifest["vocab_size"] == 50257
    assert manifest["totals"]["train"] == {"shards": 8, "tokens": 8 * len(tokens), "bytes": 8 * len(text.encode())}
    assert [list(entry) for entry in manifest["shards"]] == [
        ["split", "file", "tokens", "bytes", "sha256", "max_token"]
    ] * 9


def test_content_is_read_once_and_then_trusted_by_size_and_mtime(tmp_path, monkeypatch):
    path = make_dataset(tmp_path) / "train_000000.bin"
    first = open_dataset(tmp_path)
    scanned = []
    scan = Shard.scan
    monkeypatch.setattr(Shard, "scan", lambda shard, **kw: scanned.append(shard.path.name) or scan(shard, **kw))
    written = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert open_dataset(tmp_path).fingerprint == first.fingerprint
    assert not scanned and (tmp_path / "manifest.json").stat().st_mtime_ns == written

    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # touched, content as before
    open_dataset(tmp_path)
    assert scanned == ["train_000000.bin"]

    stat = path.stat()
    write_shard(path, np.array([1, 2, 9]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # changed behind our back: seen by verify only
    open_dataset(tmp_path)
    with pytest.raises(DataError, match="sha256"):
        open_dataset(tmp_path, verify=True)
    with pytest.raises(DataError, match="sha256"):  # and remembered from then on
        open_dataset(tmp_path)


def test_changed_content_is_an_error(tmp_path):
    path = make_dataset(tmp_path) / "val_000000.bin"
    open_dataset(tmp_path)
    stat = path.stat()
    write_shard(path, np.array([4, 5, 7]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(DataError, match="restore the shard") as error:
        open_dataset(tmp_path)
    assert one_line(error).startswith(str(path))


def test_token_ids_below_both_vocabularies(tmp_path):
    make_dataset(tmp_path, val=[[1, 50256]])
    open_dataset(tmp_path, vocab_size=50257)
    with pytest.raises(DataError, match="token id 50256, but the model has only 50256 tokens") as error:
        open_dataset(tmp_path, vocab_size=50256)
    one_line(error)
    make_dataset(tmp_path / "other", val=[[1, 50257]])
    with pytest.raises(DataError, match="token id 50257, but tokenizer gpt2 has only 50257 tokens"):
        open_dataset(tmp_path / "other", vocab_size=50304)
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": None, "vocab_size": 60000}))
    assert open_dataset(tmp_path / "other").tokenizer is None


def test_manifest_and_directory_must_list_the_same_shards(tmp_path):
    path = make_dataset(tmp_path, train=[[1, 2], [3, 4]]) / "train_000001.bin"
    open_dataset(tmp_path)
    path.rename(tmp_path / "train_000002.bin")
    with pytest.raises(DataError, match=r"train_000001.bin: .*not in the directory; delete .*manifest.json") as error:
        open_dataset(tmp_path)
    one_line(error)
    write_shard(path, np.array([3, 4]))
    with pytest.raises(DataError, match=r"train_000002.bin: train shard not in the manifest; delete"):
        open_dataset(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert len(open_dataset(tmp_path).train) == 3


@pytest.mark.parametrize(
    "change",
    [
        "",
        "{",
        "[]",
        "null",
        "\xff",
        {"format": 2},
        {"tokenizer": 3},
        {"vocab_size": "50257"},
        {"shards": {}},
        {"shards": [1]},
        {"shards": [{"split": "train"}]},
        lambda manifest: manifest["shards"][0].update(tokens="3"),
        lambda manifest: manifest["shards"][0].pop("sha256"),
        lambda manifest: manifest["shards"].append(manifest["shards"][0]),
        lambda manifest: manifest["shards"][0].update(file="../train_000000.bin"),
        lambda manifest: manifest["shards"][0].update(split="test"),
        lambda manifest: manifest["shards"][0].update(tokens=2),
        lambda manifest: manifest["shards"][0].update(sha256="0" * 64),
        lambda manifest: manifest.pop("licence"),
    ],
)
def test_bad_manifests_are_one_line(tmp_path, change):
    open_dataset(make_dataset(tmp_path))
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    if isinstance(change, str):
        path.write_bytes(change.encode("latin-1"))
    else:
        if isinstance(change, dict):
            manifest |= change
        else:
            change(manifest)
        path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json") as error:
        open_dataset(tmp_path)
    assert "delete" in one_line(error)


def test_fingerprint_is_that_of_the_tokens(tmp_path):
    a = open_dataset(make_dataset(tmp_path / "a", train=[[1, 2], [3, 4]]))
    b = open_dataset(make_dataset(tmp_path / "b", train=[[1, 2], [3, 4]]))
    c = open_dataset(make_dataset(tmp_path / "c", train=[[3, 4], [1, 2]]))
    d = open_dataset(make_dataset(tmp_path / "d", train=[[1, 2], [3, 4]], val=[[4, 5, 7]]))
    assert a.fingerprint == b.fingerprint and len({a.fingerprint, c.fingerprint, d.fingerprint}) == 3


def test_directory_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    def refuse(path, value):
        raise OSError(errno.EROFS, "Read-only file system")

    make_dataset(tmp_path)
    monkeypatch.setattr(shards, "write_json", refuse)
    assert open_dataset(tmp_path).manifest["totals"]["train"]["tokens"] == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("Read-only file system" in line for line in said)  # verified.json, manifest.json
    with locked(tmp_path / "missing" / ".lock"):
        pass


def test_unreadable_memory_only_costs_a_check(tmp_path):
    open_dataset(make_dataset(tmp_path))
    for content in "{", "[1]", '{"train_000000.bin": null}', '{"train_000000.bin": {"size": 1030}}', '{"a": 3}':
        (tmp_path / "verified.json").write_text(content)
        open_dataset(tmp_path)


# --- preparation


def test_prepare_shows_all_or_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), prepare(tmp_path / "data" / "mine") as temporary:
        make_dataset(temporary)
        assert not (tmp_path / "data" / "mine").exists()
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".mine.lock"]
    (tmp_path / "data" / ".mine.tmp").mkdir()
    (tmp_path / "data" / ".mine.tmp" / "left behind").touch()  # as by a process that was killed
    with prepare(tmp_path / "data" / "mine") as temporary:
        make_dataset(temporary)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".mine.lock", "mine"}
    assert {path.name for path in (tmp_path / "data" / "mine").iterdir()} == {"train_000000.bin", "val_000000.bin"}
    with prepare(tmp_path / "data" / "mine") as temporary:
        assert temporary is None


def test_exit_codes_of_commands(capsys):
    def fail(error):
        raise error

    assert run_command(lambda: None) == 0
    assert run_command(lambda: 2) == 2
    assert run_command(lambda: fail(DataError("broken"))) == 7
    assert run_command(lambda: fail(OSError(errno.ENOSPC, "No space left on device", "x"))) == 5
    assert run_command(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.splitlines()[0] == "error: broken"
