"""
model.py and configs/variants.py against a float64 reference (tests/reference.py) and against figures computed by hand.
Most tests run once per distinct set of flags in VARIANTS: a new variant is tested without a change in this file.
"""

import math
import shutil
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from reference import KNOWN_FIELDS, reference_loss_and_gradients

import model as model_file
from configs.variants import VARIANTS, model_name, variant
from model import GPT, GPTConfig, attention_class, rotary_tables

# -----------------------------------------------------------------------------
# the flag sets of VARIANTS, on a small body

WINDOWS = sorted({c.window_size for c in VARIANTS.values() if c.window_size is not None})
WINDOW_STEP = 5  # the smallest window becomes 5, the next 10, ...: distinct stays distinct
DEEPEST = max(4, *(len(c.window_pattern) for c in VARIANTS.values()))  # every pattern is seen to its end


def sequence_length(step=WINDOW_STEP):
    """Longer than two of the widest windows, and a multiple of none of them."""
    return 2 * step * len(WINDOWS) + 7


def small(config, step=WINDOW_STEP):
    """The same flags with 64 x 2 heads and windows that are shorter than sequence_length(step)."""
    window = None if config.window_size is None else step * (WINDOWS.index(config.window_size) + 1)
    return replace(config, n_layer=DEEPEST, n_head=2, n_embd=64, vocab_size=512, window_size=window)


FLAGS = {}  # small config: name of the first variant with these flags
for variant_name, variant_config in VARIANTS.items():
    FLAGS.setdefault(small(variant_config), variant_name)
every_flag_set = pytest.mark.parametrize("config", [pytest.param(c, id=name) for c, name in FLAGS.items()])
WINDOW_SL = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=512, post_norm=True, qk_norm=True,
                      window_size=WINDOW_STEP, window_pattern="SL")


def tokens(B, T, vocab_size=512):
    """(idx, targets), each (B, T), from a formula; one target in eight is -1."""
    i = torch.arange(B * (T + 1)).view(B, T + 1)
    data = (i * i * 31 + i * 17 + i // 5) % vocab_size
    targets = data[:, 1:].clone()
    targets[:, 3::8] = -1
    return data[:, :-1].contiguous(), targets


def make(config, scale=1, dtype=torch.float32, **options):
    """A model whose weights are those of the seed times scale: at 8 attention is far from uniform."""
    gpt = GPT(config, **options)
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.mul_(scale)
    return gpt.to(dtype)


def loss_and_gradients(gpt, idx, targets):
    gpt.zero_grad()
    loss = gpt(idx, targets)[1]
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in gpt.named_parameters()}


def error(x, reference):
    """|x - reference| / |reference|."""
    reference = reference.detach().double().cpu()
    return ((x.detach().double().cpu() - reference).norm() / reference.norm()).item()


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert all(e < tolerance for e in errors.values()), {n: e for n, e in errors.items() if not e < tolerance}


def needs_reference(config):
    unknown = [f.name for f in fields(config)
               if f.name not in KNOWN_FIELDS and getattr(config, f.name) != f.default]
    if unknown:
        pytest.skip(f"tests/reference.py has no equation for {', '.join(unknown)}")


def assert_one_line_error(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    assert all(word in message for word in words), message


def test_flag_sets_keep_what_distinguishes_variants():
    def flags(config):
        return tuple(v for k, v in asdict(config).items() if k not in ("n_layer", "n_head", "n_embd", "vocab_size"))

    assert len(FLAGS) == len({flags(c) for c in VARIANTS.values()}) > 5
    assert all(c.window_size is None or c.window_size < sequence_length() for c in FLAGS)


# -----------------------------------------------------------------------------
# the whole model against the reference


@every_flag_set
@pytest.mark.parametrize("scale", [1, 8])
def test_float64_equals_reference(config, scale, monkeypatch):
    """The model's own tables and loss are float32 at best, so both are replaced: what is left agrees to 1e-10."""
    needs_reference(config)

    def float64_tables(T, head_dim, device):
        angle = torch.outer(torch.arange(T).double(), 10_000 ** (-torch.arange(0, head_dim, 2).double() / head_dim))
        return angle.cos(), angle.sin()

    monkeypatch.setattr(model_file, "rotary_tables", float64_tables)
    idx, targets = tokens(2, sequence_length())
    gpt = make(config, scale, torch.float64)
    loss, gradients, logits = reference_loss_and_gradients(config, gpt.state_dict(), idx, targets)
    actual = gpt(idx)[0]
    assert error(actual, logits) < 1e-10
    F.cross_entropy(actual.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
    assert_close({name: weight.grad for name, weight in gpt.named_parameters()}, gradients, 1e-10)
    assert gpt(idx, targets)[1].item() == pytest.approx(loss.item(), rel=1e-6)


@every_flag_set
@pytest.mark.parametrize("scale", [1, 8])
def test_float32_equals_reference(config, scale):
    needs_reference(config)
    idx, targets = tokens(2, sequence_length())
    gpt = make(config, scale)
    expected_loss, expected, logits = reference_loss_and_gradients(config, gpt.state_dict(), idx, targets)
    loss, gradients = loss_and_gradients(gpt, idx, targets)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    assert_close(gradients, expected, 1e-5)
    assert error(gpt(idx)[0], logits) < 5e-6


def test_rotary_tables_are_float32_exact_up_to_the_angle():
    cos, sin = rotary_tables(1024, 64, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (1024, 32)
    for t, j in [(0, 0), (1, 0), (1, 31), (1023, 0), (1023, 7), (500, 31)]:
        angle = t * 10_000 ** (-2 * j / 64)
        assert cos[t, j].item() == pytest.approx(math.cos(angle), abs=1e-4)
        assert sin[t, j].item() == pytest.approx(math.sin(angle), abs=1e-4)


@every_flag_set
def test_a_token_changes_no_logits_before_it(config):
    T = sequence_length()
    gpt = make(config, scale=8, dtype=torch.float64)
    idx, _ = tokens(1, T)
    changed = idx.repeat(T, 1)
    changed.fill_diagonal_(0)  # row t has another token t
    changed[idx[0] == 0, idx[0] == 0] = 1
    with torch.no_grad():
        difference = (gpt(changed)[0] - gpt(idx)[0]).abs().amax(-1)  # (t, position)
    assert difference.tril(-1).max() < 1e-10, "the future leaks into the past"
    assert difference.diagonal().min() > 1e-3


def test_no_two_flag_sets_have_the_same_loss():
    idx, targets = tokens(2, sequence_length())
    weights = make(next(config for config in FLAGS if config.untie), scale=8).state_dict()  # a tied head is loaded last
    losses = {}
    for config, name in FLAGS.items():
        gpt = GPT(config)
        gpt.load_state_dict(weights)
        with torch.no_grad():
            losses[name] = gpt(idx, targets)[1].item()
    ordered = sorted(losses.values())
    assert min(b - a for a, b in pairwise(ordered)) > 1e-5, losses


# -----------------------------------------------------------------------------
# defaults, initial weights, forward


def test_flags_set_to_their_defaults_change_no_bit():
    """With a new flag, the line below still has to give the model that it gave before: see the golden losses."""
    body = {"n_layer": 4, "n_head": 2, "n_embd": 64, "vocab_size": 512}
    explicit = GPTConfig(**body, pre_norm=True, post_norm=False, qk_norm=False, window_size=None, window_pattern="S")
    idx, targets = tokens(2, 37)
    torch.manual_seed(1)
    one = GPT(GPTConfig(**body))
    torch.manual_seed(2)
    other = GPT(explicit)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    loss_one, gradients_one = loss_and_gradients(one, idx, targets)
    loss_other, gradients_other = loss_and_gradients(other, idx, targets)
    assert torch.equal(loss_one, loss_other)
    assert all(torch.equal(gradients_one[name], gradients_other[name]) for name in gradients_one)


def test_defaults_are_d12():
    assert asdict(GPTConfig())["n_layer"] == 12
    assert GPTConfig() == VARIANTS["d12"] == GPTConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=50304)


@pytest.mark.parametrize(("name", "golden"), [("tiny", 6.4276635), ("tiny_post_norm_qk_norm_window32", 6.3637741)])
def test_golden_loss(name, golden):
    """Stored once from the float64 reference; a change of init, data flow or default moves it."""
    gpt = make(replace(VARIANTS[name], vocab_size=512), scale=4)
    assert gpt(*tokens(2, 80))[1].item() == pytest.approx(golden, rel=1e-6)


def test_init_does_not_depend_on_the_global_generator():
    config = next(iter(FLAGS))
    torch.manual_seed(0)
    one = GPT(config).state_dict()
    torch.manual_seed(1)
    torch.rand(1000)
    other, reseeded = GPT(config, seed=0).state_dict(), GPT(config, seed=1).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(torch.equal(one[name], reseeded[name]) for name in one)


def test_vectors_begin_as_their_module_gives_them():
    gpt = GPT(next(iter(FLAGS)))
    gpt.gain, gpt.more = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 3))
    gpt.init_weights(0)
    assert gpt.gain.tolist() == [1, 1, 1] and 0 < gpt.more.abs().max() < 0.1


@pytest.mark.parametrize("embedding_norm", [False, True])
@pytest.mark.parametrize("untie", [False, True])
def test_init_standard_deviations(embedding_norm, untie):
    config = GPTConfig(n_layer=8, n_head=2, n_embd=128, vocab_size=512, embedding_norm=embedding_norm, untie=untie)
    for name, weight in GPT(config).named_parameters():
        expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        if name == "transformer.wte.weight" and embedding_norm and untie:
            expected = 1
        assert weight.std().item() == pytest.approx(expected, rel=0.03), name  # 6 sigma for 128 x 128 samples
        assert abs(weight.mean().item()) < 6 * expected / math.sqrt(weight.numel()), name


@every_flag_set
def test_state_dict_names_and_tied_weight(config):
    gpt = GPT(config)
    layers = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    expected = ["transformer.wte.weight", "lm_head.weight"]
    expected += [f"transformer.h.{i}.{layer}" for i in range(config.n_layer) for layer in layers]
    assert sorted(gpt.state_dict()) == sorted(expected)
    assert (gpt.lm_head.weight is gpt.transformer.wte.weight) != config.untie
    assert gpt.transformer.h[0].attn.c_attn.weight.shape == (3 * 64, 64)


@every_flag_set
def test_meta_device(config):
    with torch.device("meta"):
        gpt = GPT(config)
    assert all(weight.is_meta for weight in gpt.state_dict().values())
    on_cpu = GPT(config)
    assert gpt.num_params() == on_cpu.num_params() and gpt.flops_per_token(37) == on_cpu.flops_per_token(37)
    assert {n: w.shape for n, w in gpt.state_dict().items()} == {n: w.shape for n, w in on_cpu.state_dict().items()}


def test_forward_gives_logits_or_loss_and_ignores_targets_of_minus_one():
    idx, targets = tokens(2, 11)
    gpt = make(next(iter(FLAGS)), scale=8)
    logits, no_loss = gpt(idx)
    no_logits, loss = gpt(idx, targets)
    assert no_loss is None and no_logits is None
    assert logits.shape == (2, 11, 512) and loss.shape == () and loss.dtype == torch.float32
    nats = -logits.double().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    assert loss.item() == pytest.approx(nats[targets != -1].mean().item(), rel=1e-6)
    assert loss.item() != pytest.approx(nats.mean().item(), rel=1e-3)


@every_flag_set
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_autocast(config, device, fresh_compiler):
    idx, targets = (x.to(device) for x in tokens(2, sequence_length()))
    gpt = make(config, scale=4).to(device)
    seen = []
    for block in gpt.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.no_grad():
        expected = gpt(idx, targets)[1].item()
        seen.clear()
        with torch.autocast(device, dtype=torch.bfloat16):
            logits, loss = gpt(idx)[0], gpt(idx, targets)[1]
    assert loss.item() == pytest.approx(expected, rel=2**-10) and loss.item() != expected
    assert loss.dtype == torch.float32 and logits.dtype == torch.bfloat16
    assert seen == [(torch.bfloat16, torch.bfloat16)] * (2 * config.n_layer), "the residual stream left bfloat16"


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler and there is no g++")
def test_compile_equals_eager():
    idx, targets = tokens(2, 23)
    gpt = make(WINDOW_SL, scale=4)
    loss, gradients = loss_and_gradients(gpt, idx, targets)
    torch._dynamo.utils.counters.clear()
    gpt.compile()
    compiled_loss, compiled_gradients = loss_and_gradients(gpt, idx, targets)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5, "embedding, a block of each kind, norm, output"
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_close(compiled_gradients, gradients, 1e-5)


def test_a_block_of_another_class_is_compiled_as_it_is(monkeypatch):
    class Parallel(model_file.Block):
        def forward(self, x, *rotary):
            return super().forward(x, *rotary) + self.mlp(x)

    idx, targets = tokens(2, 23)
    gpt = make(replace(variant("tiny"), vocab_size=512), scale=4)
    gpt.transformer.h[1].__class__ = Parallel
    loss = gpt(idx, targets)[1]
    gpt.compile(backend="eager")
    assert gpt(idx, targets)[1].item() == pytest.approx(loss.item(), rel=1e-6)


def test_blocks_that_differ_are_compiled_apart(monkeypatch, fresh_compiler):
    """An edit may give each layer a number of its own; two of the three here are alike."""
    class Scaled(model_file.CausalSelfAttention):
        def __init__(self, config, factor):
            super().__init__(config)
            self.factor = factor

        def attend(self, q, k, v):
            return self.factor * super().attend(q, k, v)

    choose = lambda config, layer: partial(Scaled, factor=1 + (layer + 1) // 2)  # noqa: E731
    monkeypatch.setattr(model_file, "attention_class", choose)
    idx, targets = tokens(2, 23)
    gpt = make(replace(variant("tiny"), n_layer=3, vocab_size=512), scale=4)
    loss, gradients = loss_and_gradients(gpt, idx, targets)
    torch._dynamo.utils.counters.clear()
    gpt.compile(backend="aot_eager")
    compiled_loss, compiled_gradients = loss_and_gradients(gpt, idx, targets)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5, "embedding, two blocks, norm, output"
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_close(compiled_gradients, gradients, 1e-5)


# -----------------------------------------------------------------------------
# size and FLOPs, by hand


@pytest.mark.parametrize(("name", "parameters"), [
    ("d12", 123_568_128),  # 12 layers x 12 x  768^2 + 50304 x  768
    ("d24", 353_501_184),  # 24 layers x 12 x 1024^2 + 50304 x 1024
    ("d36", 772_177_920),  # 36 layers x 12 x 1280^2 + 50304 x 1280
    ("d48", 1_555_046_400),  # 48 layers x 12 x 1600^2 + 50304 x 1600
])
def test_parameter_counts(name, parameters):
    for config in VARIANTS.values():
        if (config.n_layer, config.n_embd) == (VARIANTS[name].n_layer, VARIANTS[name].n_embd):
            with torch.device("meta"):
                head = config.untie * config.vocab_size * config.n_embd
                assert GPT(config).num_params() == parameters + head
                assert GPT(config).flops_per_token(8) == GPT(VARIANTS[name]).flops_per_token(8)  # 8 <= window


@pytest.mark.parametrize(("name", "T", "attention_flops"), [
    ("d12", 1024, 12 * 12 * 768 * 1024),
    ("d12", 1, 12 * 12 * 768),
    ("d12_window256", 1024, 12 * 12 * 768 * 256),
    ("d12_window256", 256, 12 * 12 * 768 * 256),
    ("d12_window256", 100, 12 * 12 * 768 * 100),
    ("d12_post_norm_qk_norm_window1024", 512, 12 * 12 * 768 * 512),
    ("d12_post_norm_qk_norm_window1024", 4096, 12 * 12 * 768 * 1024),
    ("d12_post_norm_qk_norm_window256_SSSL", 1024, 12 * 768 * (9 * 256 + 3 * 1024)),
    ("d48", 1024, 48 * 12 * 1600 * 1024),
])
def test_flops_per_token(name, T, attention_flops):
    parameters = {"d12": 123_568_128, "d48": 1_555_046_400}[name.split("_")[0]]
    with torch.device("meta"):
        assert GPT(VARIANTS[name]).flops_per_token(T) == 6 * parameters + attention_flops


# -----------------------------------------------------------------------------
# windows


@pytest.mark.parametrize("window", [1, 2, 7, 22, 23, 28, None])
def test_a_query_sees_exactly_its_window(window, T=23):
    """Row t of dv / d out[t] is the weight that query t gives each key: zero unless visible, never zero if visible."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=64, window_size=window)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, T, 32, generator=generator, requires_grad=True) for _ in range(3))
    layer = attention_class(config, 0)(config)
    if window is not None:
        layer.prepare("blocked", 2, T, q.device, q.dtype)
    out = layer.attend(q, k, v)
    for t in range(T):
        dk, dv = torch.autograd.grad(out[:, :, t].sum(), (k, v), retain_graph=True)
        first = 0 if window is None else max(0, t + 1 - window)
        keys = [s for s in range(T) if dv[:, :, s].abs().min() > 0]
        assert keys == list(range(first, t + 1)), f"query {t}"
        assert not dv[:, :, :first].any() and not dv[:, :, t + 1 :].any()
        assert not dk[:, :, :first].any() and not dk[:, :, t + 1 :].any()


def test_a_window_of_the_whole_sequence_is_full_attention(T=21):
    idx, targets = tokens(2, T)
    full = replace(WINDOW_SL, window_size=None, window_pattern="S")
    expected_loss, expected = loss_and_gradients(make(full, scale=8), idx, targets)
    for window in (T, T + 1, 10 * T):
        loss, gradients = loss_and_gradients(make(replace(WINDOW_SL, window_size=window), scale=8), idx, targets)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        assert_close(gradients, expected, 1e-5)
    narrower, _ = loss_and_gradients(make(replace(WINDOW_SL, window_size=T - 1), scale=8), idx, targets)
    assert narrower.item() != pytest.approx(expected_loss.item(), rel=1e-6)


def test_window_backend():
    idx, targets = tokens(2, 23)
    assert_one_line_error(lambda: GPT(WINDOW_SL, window_backend="dense"), "'dense'", "flex, flash, blocked")
    assert_one_line_error(lambda: GPT(WINDOW_SL, window_backend="flex")(idx), "window_backend='flex'", "blocked")
    by_name = loss_and_gradients(make(WINDOW_SL, window_backend="blocked"), idx, targets)
    by_default = loss_and_gradients(make(WINDOW_SL), idx, targets)
    assert torch.equal(by_name[0], by_default[0])
    assert all(torch.equal(by_name[1][name], by_default[1][name]) for name in by_default[1])


# -----------------------------------------------------------------------------
# config and names


@pytest.mark.parametrize(("overrides", "words"), [
    ({"n_layer": 0}, ["n_layer=0"]),
    ({"n_head": 0}, ["n_head=0"]),
    ({"n_head": -12}, ["n_head=-12"]),
    ({"n_embd": 0}, ["n_embd=0"]),
    ({"vocab_size": -1}, ["vocab_size=-1"]),
    ({"n_embd": 100}, ["n_embd=100", "n_head=12"]),
    ({"n_embd": 36}, ["n_embd", "n_head", "3", "even"]),
    ({"pre_norm": False}, ["pre_norm", "post_norm", "off"]),
    ({"attention_scale": 0.0}, ["attention_scale=0.0", "above 0"]),
    ({"logit_softcap": math.nan}, ["logit_softcap=nan", "above 0"]),
    ({"window_size": 0}, ["window_size=0"]),
    ({"window_size": -256}, ["window_size=-256"]),
    ({"window_pattern": "SL"}, ["window_pattern='SL'", "window_size"]),
    ({"window_pattern": "SS"}, ["window_pattern='SS'", "window_size"]),
    ({"window_pattern": ""}, ["window_pattern=''"]),
    ({"window_pattern": "", "window_size": 8}, ["window_pattern=''"]),
    ({"window_pattern": "L", "window_size": 8}, ["window_pattern='L'", "S"]),
    ({"window_pattern": "SsL", "window_size": 8}, ["window_pattern='SsL'"]),
    ({"window_pattern": "SX", "window_size": 8}, ["window_pattern='SX'"]),
    ({"window_pattern": "SSSL", "window_size": 8, "n_layer": 3}, ["window_pattern='SSSL'", "n_layer=3"]),
])
def test_refused_configs(overrides, words):
    assert_one_line_error(lambda: GPTConfig(**overrides), *words)


def test_pattern_repeats_over_the_layers():
    config = GPTConfig(n_layer=6, window_size=8, window_pattern="SSSL")
    assert [config.layer_window(layer) for layer in range(6)] == [8, 8, 8, None, 8, 8]
    assert [GPTConfig(n_layer=2, window_size=8).layer_window(layer) for layer in range(2)] == [8, 8]
    assert [GPTConfig(n_layer=2).layer_window(layer) for layer in range(2)] == [None, None]


def test_variant_names():
    assert set(VARIANTS) >= {
        "d12", "d12_post_norm", "d12_qk_norm", "d12_post_norm_qk_norm",
        "d24", "d24_post_norm", "d24_qk_norm", "d24_post_norm_qk_norm",
        "d36", "d36_post_norm", "d36_qk_norm", "d36_post_norm_qk_norm",
        "d48", "d48_post_norm", "d48_qk_norm", "d48_post_norm_qk_norm",
        "d12_olmo2_norm_qk_norm",
        "d12_window256", "d12_post_norm_qk_norm_window256", "d12_post_norm_qk_norm_window1024",
        "d12_post_norm_qk_norm_window256_SSSL",
        "d12_embedding_norm", "d12_qk_norm_scale0.25", "d12_relu2", "d12_untied", "d12_softcap15",
        "d12_qk_norm_relu2_untied_softcap15", "tiny", "tiny_post_norm_qk_norm_window32",
    }
    assert len(set(VARIANTS.values())) == len(VARIANTS)
    for name, config in VARIANTS.items():
        assert model_name(config) == name and variant(name) == config


def test_variant_configs():
    assert VARIANTS["d48_post_norm"] == GPTConfig(n_layer=48, n_head=25, n_embd=1600, post_norm=True)
    assert VARIANTS["d36_qk_norm"] == GPTConfig(n_layer=36, n_head=20, n_embd=1280, qk_norm=True)
    assert VARIANTS["d24"] == GPTConfig(n_layer=24, n_head=16, n_embd=1024)
    assert VARIANTS["d12_olmo2_norm_qk_norm"] == GPTConfig(pre_norm=False, post_norm=True, qk_norm=True)
    hybrid = GPTConfig(post_norm=True, qk_norm=True)
    assert VARIANTS["d12_post_norm_qk_norm_window1024"] == replace(hybrid, window_size=1024)
    assert VARIANTS["d12_post_norm_qk_norm_window256_SSSL"] == replace(hybrid, window_size=256, window_pattern="SSSL")
    assert VARIANTS["d12_qk_norm_scale0.25"] == GPTConfig(qk_norm=True, attention_scale=0.25)
    strong = GPTConfig(qk_norm=True, mlp_activation="relu2", untie=True, logit_softcap=15.0)
    assert VARIANTS["d12_qk_norm_relu2_untied_softcap15"] == strong
    tiny = GPTConfig(n_layer=2, n_head=2, n_embd=64)
    assert VARIANTS["tiny"] == tiny
    assert VARIANTS["tiny_post_norm_qk_norm_window32"] == replace(tiny, post_norm=True, qk_norm=True, window_size=32)


@pytest.mark.parametrize(("name", "nearest"), [
    ("d12_postnorm", "d12_post_norm"),
    ("d12_window25", "d12_window256"),
    ("D12", "d12"),
    ("d12 ", "d12"),
    ("tin", "tiny"),
    ("d12_qk_norm_post_norm", None),  # the flags in another order are not a name
    ("gpt2", None),
    ("", None),
])
def test_lookup_is_exact(name, nearest):
    near = f"did you mean {nearest}?" if nearest else "did you mean "
    assert_one_line_error(lambda: variant(name), repr(name), near, ", ".join(VARIANTS))


def test_names_of_overridden_configs_are_distinct():
    overrides = [{}, {"n_layer": 6}, {"n_layer": 24}, {"n_head": 1}, {"n_embd": 3200}, {"vocab_size": 512},
                 {"vocab_size": 51200}, {"post_norm": True}, {"pre_norm": False, "post_norm": True}, {"qk_norm": True},
                 {"window_size": 25}, {"window_size": 2}, {"window_size": None, "window_pattern": "S"},
                 {"window_size": 32, "window_pattern": "SL"}, {"window_size": 32, "window_pattern": "LS"}]
    configs = {c for base in VARIANTS.values() for o in overrides if (c := _replaced(base, o)) is not None}
    names = [model_name(config) for config in configs]
    assert len(set(names)) == len(configs) > 200
    assert names == [model_name(GPTConfig(**asdict(config))) for config in configs]
    assert model_name(GPTConfig(vocab_size=512)) == "d12-vocab_size=512"
    letters = set("abcdefghijklmnopqrstuvwxyzSL0123456789_-=.")
    assert all(set(name) <= letters for name in names), "unfit for a directory"


def _replaced(base, overrides):
    """None where this pair of flags is refused (a pattern longer than the model)."""
    try:
        return replace(base, **overrides)
    except ValueError:
        return None


# -----------------------------------------------------------------------------
# on a GPU: the fused kernel, and torch.compile of the whole model


GPU_STEP = 130  # windows of more than one block of 128 keys: some blocks are full, some partial, some skipped


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLAGS.values())
def test_gpu_compiled_model_equals_cpu(name, fresh_compiler):
    config = small(VARIANTS[name], GPU_STEP)
    idx, targets = tokens(2, sequence_length(GPU_STEP))
    expected_loss, expected = loss_and_gradients(make(config, scale=4), idx, targets)
    gpt = make(config, scale=4).cuda()
    gpt.compile()
    loss, gradients = loss_and_gradients(gpt, idx.cuda(), targets.cuda())
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert_close(gradients, expected, 1e-3)


@pytest.mark.gpu
def test_gpu_flex_equals_blocked(fresh_compiler):
    config = small(replace(VARIANTS["d12"], window_size=WINDOWS[-1], attention_scale=0.25), GPU_STEP)
    idx, targets = (x.cuda() for x in tokens(2, sequence_length(GPU_STEP)))
    flex, blocked = (make(config, scale=4, window_backend=b).cuda() for b in ("flex", "blocked"))
    loss, gradients = loss_and_gradients(flex, idx, targets)
    expected_loss, expected = loss_and_gradients(blocked, idx, targets)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert_close(gradients, expected, 1e-3)
    assert len({id(a.tables["block_mask"]) for a in flex.windowed_attentions()}) == 1
    assert all(a.backend == "blocked" for a in blocked.windowed_attentions())


@pytest.mark.gpu
def test_gpu_compiled_model_trains_and_evaluates_at_two_lengths(fresh_compiler):
    config = replace(WINDOW_SL, window_size=130)
    cpu, gpt = make(config, scale=4), make(config, scale=4).cuda()
    gpt.compile()
    for T in (300, 200, 300):
        idx, targets = tokens(2, T)
        expected_loss, expected = loss_and_gradients(cpu, idx, targets)
        loss, gradients = loss_and_gradients(gpt, idx.cuda(), targets.cuda())
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert_close(gradients, expected, 1e-3)
        with torch.no_grad():
            assert gpt(idx.cuda(), targets.cuda())[1].item() == pytest.approx(expected_loss.item(), rel=1e-5)
            assert error(gpt(idx.cuda())[0], cpu(idx)[0]) < 1e-4
