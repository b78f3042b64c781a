"""eval.py and hellaswag.py: the scores against small loops of their own, what is kept, and how it ends."""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import nullcontext
from http.client import IncompleteRead
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
from small import ROOT, T, call, metrics

import checkpoint
import eval
import hellaswag
import train_gpt2
from configs.variants import VARIANTS
from data.shards import write_shard
from data.tokenizer import EOT, gpt2
from model import GPT

TEXTS = [
    "The ferry left at nine. Nobody on the quay had slept, and the café was still shut; gulls walked between the "
    "tables as if they had rented them. An old man sold tickets from a box that had once held oranges. ",
    "To dry herbs, tie them in small bunches and hang them upside down in a warm room. After two weeks the leaves "
    "are brittle: rub them off and keep them in a jar, away from light: they last until the next summer. ",
]
EXAMPLES = [
    ("A woman fills a kettle. She", ["puts it on the stove.", "paints the kettle with snow.", "sings twice.",
                                     "is a boat."], 0),
    ("Two boys build a raft out of barrels and rope. They tie the last knot, look at each other and push it into the "
     "water; it tips, it turns, and for a moment nobody breathes. Then", ["it floats.", "the barrels read a newspaper "
     "about the price of barrels in another country.", "knots.", "a rope is a kind of Tuesday."], 0),
    ("How to clean a brush:", ["Bake it.", "Rinse it in warm water until no paint comes out, then let it dry flat.",
                               "Sell the café, naïve!", "Rinse it in paint."], 1),
    ("The dog", ["barks.", "barks", "!", "files a tax return and then barks"], 3),
    ("A man is seen standing on a ladder. He", ["holds a lamp.", "holds a lamp and a lamp.", "ladders.",
                                                 "is the lamp."], 2),
]


def hellaswag_file(path, examples=EXAMPLES):
    """With fields that nobody reads, as in the published file."""
    path.write_text("".join(json.dumps({
        "ind": n, "activity_label": "Home", "ctx_a": context, "ctx_b": "", "ctx": context, "split": "val",
        "endings": endings, "label": label, "source_id": f"hand~{n}"}) + "\n"
        for n, (context, endings, label) in enumerate(examples)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run `run` on GPT-2 tokens, its validation text two documents of English, with checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("eval")
    small.make_data(directory / "data", tokenizer="gpt2", vocab_size=50257)
    tokens = [token for text in TEXTS for token in [EOT, *gpt2().encode_ordinary(2 * text)]]
    write_shard(directory / "data" / "val_000000.bin", np.array(tokens))
    (directory / "data" / "manifest.json").unlink()  # built again
    runs = small.Runs(directory)
    assert runs(vocab_size=50304, max_steps=4, save_every=2, val_every=4, val_tokens=3 * T, batch_size=2) == 0
    hellaswag_file(directory / "hellaswag.jsonl")
    return runs


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run, to be written to: its out_dir."""
    shutil.copytree(trained.out_dir, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def ask(copy, capsys):
    """ask(val_tokens="all") is (exit code, stdout, stderr) of eval.py on that copy."""
    def run(**options):
        options = {"run": "run", "out_dir": copy, "device": "cpu"} | options
        code = call(eval.main, [f"--{name}={value}" for name, value in options.items() if value is not None])
        return code, *capsys.readouterr()

    return run


def kept(out_dir, step=4):
    return json.loads((out_dir / "run" / "eval.json").read_text())[f"step-{step:08d}"]


def one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1


# -----------------------------------------------------------------------------
# validation loss and bits per byte


def test_training_and_eval_have_one_definition(trained, ask, copy):
    assert train_gpt2.evaluate is eval.evaluate
    code, out, _ = ask()
    assert code == 0
    (place, scores), = kept(copy).items()
    row = metrics(trained.path)[-1]
    assert place == str(trained.data) and scores["val_tokens"] == 3 * T and scores["sequence_length"] == T
    assert scores["val_loss"] == pytest.approx(row["val_loss"], rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-6)
    assert "step-00000004, float32" in out and f"96 tokens of {trained.data}" in out
    assert f"val_loss       {row['val_loss']:.4f}" in out and f"bits_per_byte  {row['bits_per_byte']:.4f}" in out


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_bits_per_byte_is_its_definition(trained, ask, copy, batch_size):
    """Summed nats / ln 2 / bytes of the text that the targets are, without the ends of documents."""
    assert ask(val_tokens="all", batch_size=batch_size)[0] == 0
    tokens = np.fromfile(trained.data / "val_000000.bin", dtype="<u2", offset=1024).astype(int)
    n_windows = (len(tokens) - 1) // T
    model, nats = checkpoint.load_model(trained.path / "step-00000004").double(), 0.0
    for start in range(0, n_windows * T, T):
        with torch.no_grad():
            logits = model(torch.tensor(tokens[start : start + T])[None])[0][0]
        for t in range(T):
            nats -= logits[t].log_softmax(dim=0)[tokens[start + 1 + t]].item()
    text = gpt2().decode(tokens[1 : n_windows * T + 1].tolist())
    assert (EOT in tokens[1 : n_windows * T + 1]) and (2 * TEXTS[0] + "<|endoftext|>" + TEXTS[1]) in text
    n_bytes = len(text.replace("<|endoftext|>", "").encode())
    scores = kept(copy)[str(trained.data)]
    assert scores["val_tokens"] == n_windows * T
    assert scores["val_loss"] == pytest.approx(nats / (n_windows * T), rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_another_sequence_length(trained, ask, copy):
    """Longer than in training: 2 windows where there were 4, with more before each token, so another loss."""
    assert ask(val_tokens=4 * T)[0] == 0
    before = kept(copy)[str(trained.data)]
    assert ask(val_tokens=4 * T, sequence_length=2 * T)[0] == 0
    scores = kept(copy)[str(trained.data)]
    assert scores["sequence_length"] == 2 * T and scores["val_tokens"] == before["val_tokens"]
    assert scores["val_loss"] != before["val_loss"]


def test_text_of_tokens_that_nobody_knows(ask, tmp_path, capsys):
    runs = small.Runs(tmp_path / "other", small.make_data(tmp_path / "ids"))
    assert runs(max_steps=2, save_every=2) == 0
    capsys.readouterr()
    code, out, _ = ask(out_dir=runs.out_dir)
    assert code == 0 and "bits_per_byte  unknown" in out
    (scores,) = kept(runs.out_dir, step=2).values()
    assert scores["bits_per_byte"] is None and scores["val_loss"] == pytest.approx(math.log(512), abs=1)
    code, out, err = ask(out_dir=runs.out_dir, hellaswag=hellaswag_file(tmp_path / "hellaswag.jsonl"))
    assert code == 2 and one_line(err) and "GPT-2" in err and out == ""


# -----------------------------------------------------------------------------
# HellaSwag


def nats_by_hand(model, examples=EXAMPLES):
    """Each ending alone, in float64, a token at a time: (n, 4)."""
    found = []
    for context, endings, _ in examples:
        for ending in endings:
            first, rest = gpt2().encode_ordinary(context), gpt2().encode_ordinary(" " + ending)
            with torch.no_grad():
                logs = model.double()(torch.tensor([first + rest]))[0][0].log_softmax(dim=1)
            found.append(-sum(logs[len(first) + i - 1, token].item() for i, token in enumerate(rest)))
    return torch.tensor(found, dtype=torch.float64).view(-1, 4)


ALONE = SimpleNamespace(rank=0, world_size=1)


@pytest.mark.parametrize("name", ["tiny", "tiny_post_norm_qk_norm_window32"])
def test_nats_are_those_of_each_ending_alone_for_every_batch_size(tmp_path, name):
    """Also of texts longer than the window, and shorter. The weights are large, so that endings differ."""
    examples, model = hellaswag.read(hellaswag_file(tmp_path / "file")), GPT(VARIANTS[name])
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 3
        lengths = [len(row) for row in examples.rows]
        assert min(lengths) < 10 and max(lengths) > 50
        batched = {n: hellaswag.ending_nats(model, examples, n, nullcontext(), torch.device("cpu"), ALONE)
                   for n in (1, 2, 3, 7, 20, 1000)}
    expected = nats_by_hand(model)
    scores = hellaswag.accuracies(expected, examples)
    assert min((expected[:, i] - expected[:, j]).abs().min() for i in range(4) for j in range(i)) > 1e-2
    for nats in batched.values():
        assert nats.dtype == torch.float64 and (nats - expected).abs().max() < 1e-4 < expected.min()
        assert hellaswag.accuracies(nats, examples) == scores


def test_a_file_is_tokens_counts_and_labels(tmp_path):
    path = hellaswag_file(tmp_path / "file")
    examples = hellaswag.read(path)
    assert [gpt2().decode(row) for row in examples.rows] == [f"{c} {e}" for c, endings, _ in EXAMPLES for e in endings]
    assert examples.labels.tolist() == [label for *_, label in EXAMPLES]
    assert examples.n_bytes.flatten().tolist() == [len(e.encode()) for _, endings, _ in EXAMPLES for e in endings]
    assert examples.n_tokens[3].tolist() == [len(gpt2().encode_ordinary(f" {e}")) for e in EXAMPLES[3][1]]
    assert examples.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_accuracies():
    """Four examples: the right one is the first by all measures, by the sum, per token, per byte."""
    counts = torch.tensor([[2, 1, 1, 1], [2, 4, 2, 2], [5, 2, 2, 2], [2, 3, 2, 2]])
    n_bytes = torch.tensor([[9, 9, 9, 9], [9, 18, 9, 9], [9, 9, 9, 9], [20, 9, 9, 9]])
    nats = torch.tensor([[2.0, 3, 4, 5], [4, 5, 6, 7], [5, 4, 6, 7], [8, 6, 9, 9]])
    examples = hellaswag.HellaSwag([], counts, n_bytes, torch.zeros(4, dtype=torch.int64), "")
    right = {"acc": [0, 1], "acc_per_token": [0, 2], "acc_per_byte": [0, 3]}
    assert hellaswag.accuracies(nats, examples) == {name: len(which) / 4 for name, which in right.items()}
    for name, which in right.items():
        for i in range(4):
            one = hellaswag.HellaSwag([], counts[i : i + 1], n_bytes[i : i + 1], torch.tensor([0]), "")
            assert hellaswag.accuracies(nats[i : i + 1], one)[name] == (i in which)


def test_the_command_prints_and_keeps_accuracies(trained, ask, copy):
    path = trained.directory / "hellaswag.jsonl"
    code, out, _ = ask(hellaswag=path, val_tokens=0)
    assert code == 0
    examples = hellaswag.read(path)
    nats = nats_by_hand(checkpoint.load_model(trained.path / "step-00000004"))
    (place, scores), = kept(copy).items()
    assert place == str(path) and scores["n_examples"] == 5 and scores["data"] == examples.sha256
    for name, value in hellaswag.accuracies(nats, examples).items():
        assert scores[name] == value
        assert f"{name:14} {value:.4f} +- {math.sqrt(value * (1 - value) / 5):.4f} " in out


def test_two_processes_give_what_one_gives(trained, ask, copy):
    options = {"run": "run", "out_dir": copy, "device": "cpu", "hellaswag": trained.directory / "hellaswag.jsonl",
               "val_tokens": 3 * T}
    assert ask(**options)[0] == 0
    alone = kept(copy)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for batch_size in 1, 8:  # 8: the second process has no validation text
        (copy / "run" / "eval.json").unlink()
        arguments = [f"--{name}={value}" for name, value in (options | {"batch_size": batch_size}).items()]
        done = subprocess.run([*torchrun, "--", ROOT / "eval.py", *arguments], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("val_loss") == done.stdout.count("acc_per_byte") == 1
        assert kept(copy).keys() == alone.keys()
        for place, scores in kept(copy).items():
            assert scores == {key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
                              for key, value in alone[place].items()}


# -----------------------------------------------------------------------------
# what is kept


def test_eval_json_keeps_what_is_there(trained, ask, copy):
    """By checkpoint and by what was read; a second score of the same two replaces the first."""
    path = copy / "run" / "eval.json"
    assert ask()[0] == 0 and ask(val_tokens=0, hellaswag=trained.directory / "hellaswag.jsonl")[0] == 0
    assert kept(copy).keys() == {str(trained.data), str(trained.directory / "hellaswag.jsonl")}
    shutil.move(copy / "run" / "step-00000004", copy / "four")
    assert ask(val_tokens=T)[0] == 0 and ask(val_tokens=2 * T)[0] == 0
    assert len(kept(copy)) == 2 and kept(copy, step=2)[str(trained.data)]["val_tokens"] == 2 * T
    for damaged in "", "[]", '{"step-00000002": [', '{"step-00000002": 7}':
        path.write_text(damaged)
        assert ask()[0] == 0 and len(kept(copy, step=2)) == 1


def test_scores_that_nobody_reads_are_kept(ask, copy, monkeypatch):
    def closed(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(eval, "print_table", closed)
    assert ask()[0] == 2 and kept(copy)


def test_a_place_that_cannot_be_written_to(ask, copy):
    (copy / "run" / "eval.json").mkdir()
    code, out, err = ask()
    assert code == 5 and one_line(err) and "eval.json" in err and "val_loss" in out


# -----------------------------------------------------------------------------
# data


def test_data_that_changed_and_other_data(trained, ask, copy, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(trained.data, other)
    write_shard(other / "val_000000.bin", np.arange(1000, 1000 + 2 * T + 1))
    (other / "manifest.json").unlink()
    code, out, _ = ask(data=other)
    assert code == 0 and kept(copy)[str(other)]["val_tokens"] == 2 * T  # fewer than the run's 3 T
    shutil.move(trained.data, tmp_path / "aside")
    shutil.copytree(other, trained.data)
    try:
        code, out, err = ask()
    finally:
        shutil.rmtree(trained.data)
        shutil.move(tmp_path / "aside", trained.data)
    assert code == 2 and one_line(err) and "--data" in err and out == ""
    ids = small.make_data(tmp_path / "ids")
    code, out, err = ask(data=ids)
    assert code == 2 and one_line(err) and "tokenizer None" in err and "gpt2" in err
    code, _, err = ask(data=tmp_path / "none")
    assert code == 7 and one_line(err) and "no such data directory" in err


@pytest.mark.parametrize("val_tokens", [1, T - 1, 10**6])
def test_too_few_or_too_many_val_tokens(ask, copy, val_tokens):
    code, out, err = ask(val_tokens=val_tokens)
    assert code == 2 and one_line(err) and "--val_tokens all" in err and out == ""
    assert not (copy / "run" / "eval.json").exists()


GOOD = json.dumps({"ctx": "A", "endings": ["b", "c", "d", "e"], "label": 0}).encode()


def test_a_file_may_end_in_empty_lines(ask, trained, tmp_path):
    path = tmp_path / "file"
    path.write_bytes((trained.directory / "hellaswag.jsonl").read_bytes() + b"\n\r\n")
    assert ask(val_tokens=0, hellaswag=path)[0] == 0


@pytest.mark.parametrize(("line", "reason"), [
    (b"", "Expecting value"), (b"text", "Expecting value"), (GOOD[:-1], "delimiter"), (b"[]", "no JSON object"),
    (b"[" * 100_000, "recursion"), (b"\xff", "utf-8"), (b"{}", "ctx is None"),
    (GOOD.replace(b'"A"', b'""'), "ctx is ''"), (GOOD.replace(b'"A"', b"7"), "ctx is 7"),
    (GOOD.replace(b', "e"', b""), "endings is"),
    (GOOD.replace(b'"e"', b"5"), "endings is"), (GOOD.replace(b'"e"', b'""'), "endings is"),
    (GOOD.replace(b'["b", "c", "d", "e"]', b'"bcde"'), "endings is 'bcde'"),
    (GOOD.replace(b": 0", b": 4"), "label is 4"),
    (GOOD.replace(b": 0", b": -1"), "label is -1"), (GOOD.replace(b": 0", b": true"), "label is True"),
    (GOOD.replace(b": 0", b': "0"'), "label is '0'"), (GOOD.replace(b'"e"', b'"\\ud800"'), "surrogates"),
])
def test_a_file_that_is_not_hellaswag(ask, tmp_path, line, reason):
    path = tmp_path / "file"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    code, out, err = ask(hellaswag=path)
    assert code == 7 and one_line(err) and f"{path}: line 2: " in err and reason in err
    assert out == ""  # and nothing was computed before


def test_an_empty_file_and_none(ask, tmp_path):
    (tmp_path / "empty").touch()
    code, _, err = ask(hellaswag=tmp_path / "empty")
    assert code == 7 and one_line(err) and "empty" in err
    for path in tmp_path / "none", tmp_path:
        code, _, err = ask(hellaswag=path)
        assert code == 7 and one_line(err) and "--hellaswag download" in err


# -----------------------------------------------------------------------------
# download


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """serve(content) is what comes from the network, an error if it is one; its git sha1 is the expected one."""
    monkeypatch.chdir(tmp_path)

    def run(content, git_sha1=None):
        def urlopen(url, timeout):
            assert url == hellaswag.URL
            if isinstance(content, Exception):
                raise content
            return io.BytesIO(content)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        if git_sha1:
            monkeypatch.setattr(hellaswag, "GIT_SHA1", git_sha1)

    return run


def test_download_once(serve, ask, copy, tmp_path, monkeypatch):
    content = hellaswag_file(tmp_path / "file").read_bytes()
    git = subprocess.run(["git", "hash-object", tmp_path / "file"], capture_output=True, text=True, check=True)
    serve(content, git.stdout.strip())
    code, out, _ = ask(hellaswag="download", val_tokens=0)
    assert code == 0 and hashlib.sha256(content).hexdigest() in out and f"{len(content):,} bytes" in out
    assert (tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl").read_bytes() == content
    serve(OSError("no network"))
    code, again, _ = ask(hellaswag="download", val_tokens=0)
    assert code == 0 and again in out  # all but the line about the download
    assert kept(copy)["data/hellaswag/hellaswag_val.jsonl"]["n_examples"] == 5


@pytest.mark.parametrize("content", [
    OSError("Name or service not known"), IncompleteRead(b"12345"), b"<html>", b"",
    urllib.error.HTTPError("", 404, "Not Found", {}, None)])
def test_a_download_that_fails_leaves_nothing(serve, ask, tmp_path, content):
    serve(content)
    code, out, err = ask(hellaswag="download")
    assert code == 7 and one_line(err) and hellaswag.URL in err and out == ""
    assert list((tmp_path / "data").glob("[!.]*")) == [] and not list((tmp_path / "data").glob(".*.tmp"))


# -----------------------------------------------------------------------------
# refused


def test_unknown_run_and_damaged_checkpoints(ask, copy):
    code, out, err = ask(run="rnu")
    assert code == 2 and one_line(err) and "'rnu'" in err and out == ""
    (copy / "run" / "step-00000004" / "state.json").write_text("{}")
    code, out, _ = ask()
    assert code == 0 and "step-00000002, float32" in out
    (copy / "run" / "step-00000002" / "model.safetensors").unlink()
    code, _, err = ask()
    assert code == 4 and one_line(err)


@pytest.mark.parametrize(("name", "value"), [
    ("val_tokens", -1), ("val_tokens", "some"), ("val_tokens", 0), ("batch_size", 0), ("sequence_length", 0),
    ("batch_size", 2**41), ("device", "tpu"), ("dtype", "int8"), ("run", None), ("no", 1)])
def test_bad_options(ask, name, value):
    code, out, err = ask(**{name: value})
    assert code == 2 and name in err and "Traceback" not in err and out == ""


def test_variables_that_are_not_torchruns(ask, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = ask()
    assert code == 2 and one_line(err) and "unset" in err


@pytest.mark.parametrize(("error", "code", "words"), [
    (KeyboardInterrupt, 130, "interrupted"), (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "--batch_size"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 1, "--batch_size")])
def test_interrupted_and_out_of_memory(ask, monkeypatch, error, code, words):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(eval, "evaluate", fail)
    found, _, err = ask()
    assert found == code and one_line(err) and words in err


def test_scores_that_are_not_finite(trained, ask, copy, monkeypatch):
    monkeypatch.setattr(eval, "evaluate", lambda *_: {"val_loss": math.nan, "bits_per_byte": math.nan})
    code, out, err = ask()
    assert code == 6 and one_line(err) and "val_loss is nan" in err and out == ""
    monkeypatch.setattr(hellaswag, "ending_nats", lambda *_: torch.full((5, 4), math.inf))
    code, out, err = ask(val_tokens=0, hellaswag=trained.directory / "hellaswag.jsonl")
    assert code == 6 and one_line(err) and "not finite" in err and not (copy / "run" / "eval.json").exists()


# -----------------------------------------------------------------------------
# on a GPU


@pytest.mark.gpu
def test_gpu_scores_are_those_of_the_cpu(trained, ask, copy, fresh_compiler):
    """Compiled and in bfloat16 there, with padded lengths."""
    options = {"val_tokens": "all", "hellaswag": trained.directory / "hellaswag.jsonl"}
    assert ask(**options)[0] == 0
    on_cpu = kept(copy)
    assert ask(**options, device="cuda")[0] == 0
    on_gpu = kept(copy)
    assert on_gpu[str(trained.data)]["val_loss"] == pytest.approx(on_cpu[str(trained.data)]["val_loss"], rel=5e-3)
    assert on_gpu[str(options["hellaswag"])]["n_examples"] == 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny", "tiny_post_norm_qk_norm_window32"])
def test_gpu_nats_are_those_of_the_cpu(tmp_path, name, fresh_compiler):
    examples, model = hellaswag.read(hellaswag_file(tmp_path / "file")), GPT(VARIANTS[name])
    expected, device = nats_by_hand(model), torch.device("cuda", 0)
    model = model.float().to(device)
    with torch.no_grad():
        exact = hellaswag.ending_nats(model, examples, 8, nullcontext(), device, ALONE)
        rounded = hellaswag.ending_nats(model, examples, 8, torch.autocast("cuda", torch.bfloat16), device, ALONE)
    assert (exact - expected).abs().max() < 1e-2 and (rounded / expected - 1).abs().max() < 1e-2
