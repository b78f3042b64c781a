"""sample.py: how a token is chosen, what is printed, and how it ends."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import small
import torch
from small import call

import checkpoint
import sample
from configs.variants import VARIANTS
from data.tokenizer import EOT, gpt2
from kernels.kv_cache import KVCache
from model import GPT
from sample import SampleConfig, choose, generate

N_VOCAB = 50257


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run `run` on GPT-2 tokens with checkpoints of the steps 2 and 4."""
    directory = tmp_path_factory.mktemp("sample")
    small.make_data(directory / "data", tokenizer="gpt2", vocab_size=N_VOCAB)
    runs = small.Runs(directory)
    assert runs(vocab_size=50304, max_steps=4, save_every=2) == 0
    return runs


@pytest.fixture
def ask(trained, capsys):
    """ask(n_samples=2) is (exit code, stdout, stderr) of sample.py on that run."""
    def run(**options):
        options = {"run": "run", "out_dir": trained.out_dir, "device": "cpu", "max_new_tokens": 8} | options
        arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        code = call(sample.main, arguments)
        return code, *capsys.readouterr()

    return run


def texts(out):
    """Each sample without its heading."""
    return [part.split("\n", 1)[1] for part in out.split("--- ")[1:]]


@pytest.fixture
def model(trained):
    return checkpoint.load_model(trained.path / "step-00000004")


def greedy_by_hand(model, tokens, n):
    with torch.no_grad():
        for _ in range(n):
            logits = model(torch.tensor([tokens]))[0][0, -1, :N_VOCAB]
            tokens = [*tokens, max(range(N_VOCAB), key=logits.tolist().__getitem__)]
    return tokens[-n:]


# -----------------------------------------------------------------------------
# choose

LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()  # probabilities 0.1, 0.5, 0.15, 0.25


def frequencies(n=4000, logits=LOGITS, temperature=1.0, top_k=0, top_p=1.0):
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(n, generator=generator).tolist()
    chosen = [int(choose(logits[None], temperature, top_k, top_p, u)) for u in random]
    return [chosen.count(token) / n for token in range(len(logits))]


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [0.1, 0.5, 0.15, 0.25]),
    ({"temperature": 0.5}, [0.01, 0.25, 0.0225, 0.0625]),  # squares
    ({"temperature": 2.0}, [math.sqrt(p) for p in (0.1, 0.5, 0.15, 0.25)]),
    ({"temperature": 0.0}, [0, 1, 0, 0]),
    ({"top_k": 1}, [0, 1, 0, 0]),
    ({"top_k": 2}, [0, 0.5, 0, 0.25]),
    ({"top_k": 3}, [0, 0.5, 0.15, 0.25]),
    ({"top_k": 4}, [0.1, 0.5, 0.15, 0.25]),
    ({"top_k": 100}, [0.1, 0.5, 0.15, 0.25]),
    ({"top_p": 0.3}, [0, 1, 0, 0]),  # the fewest that reach p
    ({"top_p": 0.6}, [0, 0.5, 0, 0.25]),
    ({"top_p": 0.8}, [0, 0.5, 0.15, 0.25]),
    ({"top_p": 0.95}, [0.1, 0.5, 0.15, 0.25]),
    ({"top_p": 1e-9}, [0, 1, 0, 0]),
    ({"top_p": 1e-300}, [0, 1, 0, 0]),
    ({"top_k": 2, "top_p": 0.95}, [0, 0.5, 0, 0.25]),
    ({"top_k": 3, "top_p": 0.6}, [0, 0.5, 0, 0.25]),
    ({"top_p": 0.7, "temperature": 0.5}, [0, 1, 0, 0]),  # after the temperature 0.25 / 0.345 is 0.72
])
def test_choose(options, expected):
    total = sum(expected)
    for actual, value in zip(frequencies(**options), expected, strict=True):
        if value == 0:
            assert actual == 0
        else:
            assert actual == pytest.approx(value / total, abs=0.03)  # four deviations of 4,000 draws


def test_choose_with_extreme_logits():
    assert frequencies(20, torch.tensor([-1e30, 1e30, 0.0])) == [0, 1, 0]
    assert frequencies(20, LOGITS, temperature=1e-6) == [0, 1, 0, 0]
    assert frequencies(20, torch.tensor([-math.inf, 0.0, -math.inf])) == [0, 1, 0]


# -----------------------------------------------------------------------------
# generate


def test_greedy_is_argmax(model):
    expected = greedy_by_hand(model, [EOT, 40, 50], 8)
    for options in {"temperature": 0.0}, {"temperature": 0.8, "top_k": 1}, {"temperature": 0.8, "top_p": 1e-6}:
        config = SampleConfig("run", max_new_tokens=8, **options)
        for seed in 0, 1:
            assert list(generate(KVCache(model, 11), [EOT, 40, 50], N_VOCAB, config, seed)) == expected


def test_padding_of_the_vocabulary_is_never_sampled(model):
    """One of two opposite rows is the most likely token at every place; both are padding."""
    with torch.no_grad():
        row = torch.randn(64, generator=torch.Generator().manual_seed(0))
        model.transformer.wte.weight[50257], model.transformer.wte.weight[50303] = 100 * row, -100 * row
    logits = model(torch.tensor([[EOT, 40]]))[0][0, -1]
    assert logits.argmax() in (50257, 50303) and logits.softmax(dim=0).max() > 0.99
    for temperature in 0.0, 1.0:
        config = SampleConfig("run", max_new_tokens=20, temperature=temperature)
        tokens = list(generate(KVCache(model, 22), [EOT, 40], N_VOCAB, config, 0))
        assert tokens and max(tokens) < N_VOCAB


def script(monkeypatch, tokens, prompt_tokens):
    """A model that says exactly these tokens after a prompt of so many tokens."""
    def feed(self, idx):
        self.n_tokens += idx.size(1)
        logits = torch.zeros(1, 50304)
        logits[0, [*tokens, EOT][self.n_tokens - prompt_tokens]] = 1e4  # one more is asked for before the end is seen
        return logits

    monkeypatch.setattr(KVCache, "feed", feed)


def test_it_ends_before_the_end_of_the_document(model, monkeypatch):
    script(monkeypatch, [10, 11, 12, EOT, 13, 14], prompt_tokens=1)
    for temperature in 0.0, 0.8:
        config = SampleConfig("run", max_new_tokens=6, temperature=temperature)
        assert list(generate(KVCache(model, 7), [EOT], N_VOCAB, config, 0)) == [10, 11, 12]
    config = SampleConfig("run", max_new_tokens=2)
    assert list(generate(KVCache(model, 7), [EOT], N_VOCAB, config, 0)) == [10, 11]


# -----------------------------------------------------------------------------
# the command


def test_same_seed_same_text(ask):
    code, first, err = ask(seed=3, n_samples=2)
    assert code == 0 and "Traceback" not in err
    assert ask(seed=3, n_samples=2)[1] == first
    one, two = texts(first)
    assert one != two
    assert texts(ask(seed=4)[1])[0] != one


def test_a_sample_does_not_depend_on_their_number(ask):
    three = texts(ask(n_samples=3)[1])
    assert texts(ask(n_samples=1)[1]) == three[:1] and texts(ask(n_samples=2)[1]) == three[:2]


def test_greedy_text(ask, model):
    tokens = gpt2().encode_ordinary("To be")
    code, out, _ = ask(prompt="To be", temperature=0, max_new_tokens=5)
    expected = gpt2().decode(greedy_by_hand(model, tokens, 5))  # and no <|endoftext|> before a prompt
    assert code == 0 and texts(out) == [f"To be{expected}\n"]
    assert "run/step-00000004" in out.splitlines()[0]  # which checkpoint it was


def test_recomputing_gives_the_same_text_and_both_say_how_fast(ask):
    options = {"prompt": "To be", "temperature": 0, "max_new_tokens": 20}
    code, out, err = ask(**options)
    slow_code, slow_out, slow_err = ask(**options, recompute=True)
    assert code == slow_code == 0 and out == slow_out
    assert all(re.fullmatch(r"20 tokens, [\d,]+ tokens/s\n", text) for text in (err, slow_err))


def test_a_slow_path_and_a_cache_that_does_not_fit_are_one_line(ask):
    with torch._dynamo.config.patch(disable=True):
        code, _, err = ask(compile="on")
    assert code == 2 and "would run uncompiled" in err and "Traceback" not in err
    code, _, err = ask(max_new_tokens=10**12)
    assert code == 1 and "out of memory" in err and err.count("\n") == 1
    code, _, err = ask(recompute=True, compile="on")
    assert code == 2 and "recompute" in err


def test_characters_of_several_tokens_are_printed_whole(ask, monkeypatch):
    text = "naïve 漢字!"
    tokens = gpt2().encode_ordinary(text)
    pieces = [gpt2().decode_single_token_bytes(token) for token in tokens]
    assert pieces == [b"na", b"\xc3\xafve", b" \xe6", b"\xbc", b"\xa2", b"\xe5\xad", b"\x97", b"!"]
    script(monkeypatch, [*tokens, EOT], prompt_tokens=1)
    assert texts(ask(max_new_tokens=100)[1]) == [text + "\n"]
    script(monkeypatch, [*tokens[:6], EOT], prompt_tokens=1)  # cut within the last
    assert texts(ask(max_new_tokens=100)[1]) == ["naïve 漢\N{REPLACEMENT CHARACTER}\n"]


def test_end_of_document_in_the_prompt_is_plain_text(ask):
    assert texts(ask(prompt="<|endoftext|>", max_new_tokens=1)[1])[0].startswith("<|endoftext|>")


def test_a_path_is_as_good_as_a_name(ask, trained, tmp_path):
    by_name = texts(ask()[1])
    assert texts(ask(run=trained.path, out_dir=tmp_path)[1]) == by_name
    shutil.copytree(trained.path, tmp_path / "copy")
    assert texts(ask(run=tmp_path / "copy", out_dir=tmp_path / "none")[1]) == by_name


# -----------------------------------------------------------------------------
# refused


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run, to be damaged: its out_dir."""
    shutil.copytree(trained.out_dir, tmp_path / "runs")
    return tmp_path / "runs"


def test_unknown_run(ask, copy):
    (copy / "empty").mkdir()
    shutil.copytree(copy / "run", copy / "another")
    code, out, err = ask(run="rnu", out_dir=copy)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert "'rnu'" in err and "another, run" in err and "empty" not in err
    code, _, err = ask(run="empty", out_dir=copy)
    assert code == 2 and "another, run" in err


def test_a_damaged_checkpoint_is_skipped(ask, copy):
    newest, older = (copy / "run" / f"step-{step:08d}" for step in (4, 2))
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[5000] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    code, out, _ = ask(out_dir=copy, temperature=0)
    assert code == 0 and f"skipping {newest}: model.safetensors" in out and f"--- {older}" in out
    expected = gpt2().decode(greedy_by_hand(checkpoint.load_model(older), [EOT], 8))
    assert texts(out) == [expected + "\n"]
    (older / "manifest.json").unlink()
    code, out, err = ask(out_dir=copy)
    assert code == 4 and "step-00000002" in err and "step-00000004" in err and "Traceback" not in err


def test_unknown_tokenizer(ask, tmp_path, capsys):
    runs = small.Runs(tmp_path)
    assert runs(max_steps=2, save_every=2) == 0
    capsys.readouterr()
    code, _, err = ask(out_dir=runs.out_dir)
    assert code == 2 and err.count("\n") == 1 and "GPT-2" in err


def test_checkpoint_of_another_version(ask, copy):
    """Its manifest is right, but its model has a field that this code does not know."""
    for place in (copy / "run").glob("step-*"):
        state = json.loads((place / "state.json").read_text())
        state["model_config"]["n_registers"] = 4
        (place / "state.json").write_text(json.dumps(state))
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["state.json"] = {"bytes": (place / "state.json").stat().st_size,
                                  "sha256": checkpoint.sha256(place / "state.json")}
        (place / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = ask(out_dir=copy)
    assert code == 4 and "n_registers" in err and err.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), [
    ("n_samples", 0), ("max_new_tokens", 0), ("top_k", -1), ("seed", -1), ("temperature", -0.1), ("temperature", "nan"),
    ("temperature", "inf"), ("top_p", 0), ("top_p", 1.1), ("top_p", "nan"), ("top_p", -1), ("n_samples", "many"),
    ("tempreature", 1)])
def test_bad_options(ask, name, value):
    code, out, err = ask(**{name: value})
    assert code == 2 and name in err and "Traceback" not in err and out == ""


def test_without_a_run(capsys):
    assert call(sample.main, []) == 2
    assert "--run" in capsys.readouterr().err


def test_ctrl_c(ask, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupt)
    code, _, err = ask()
    assert code == 130 and "Traceback" not in err


def test_window_larger_than_the_text(trained, ask):
    """A model with a window of 32 says more than 32 tokens, and less."""
    assert trained(run_name="window", model="tiny_post_norm_qk_norm_window32", vocab_size=50304, max_steps=2,
                   save_every=2) == 0
    code, out, _ = ask(run="window", temperature=0, max_new_tokens=40)
    by_hand = greedy_by_hand(checkpoint.load_model(trained.out_dir / "window" / "step-00000002"), [EOT], 40)
    assert code == 0 and texts(out) == [gpt2().decode(by_hand) + "\n"]


@pytest.mark.gpu
def test_gpu_windowed_model_writes_what_the_cpu_writes():
    """More tokens than torch.compile would recompile for."""
    model = GPT(replace(VARIANTS["tiny_post_norm_qk_norm_window32"], window_size=5), seed=3)
    config = SampleConfig("run", max_new_tokens=40, temperature=0.0)
    on_cpu = list(generate(KVCache(model, 42), [40, 41], N_VOCAB, config, 0))
    assert on_cpu == list(generate(KVCache(model.cuda(), 42), [40, 41], N_VOCAB, config, 0))
