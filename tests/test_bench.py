"""bench.py, kernel_kinds.py and floor.py of costs/: on made-up names, events and times, and as a command on `tiny`."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small import ROOT, call, make_data, words

import bench
from configs.variants import VARIANTS, variant
from costs import floor, measure
from costs.floor import least_bytes, weight_shapes
from costs.kernel_kinds import ALL_KINDS, breakdown, exclusive, kind_of, profile
from costs.memory import training_need
from data.loader import open_data, train_order
from model import GPT

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SMALL = ["--device=cpu", "--vocab_size=512", "--sequence_length=32", "--steps=2"]


# -----------------------------------------------------------------------------
# kinds of kernels


@pytest.mark.parametrize(("kind", "names"), {
    "communication": ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
    "attention": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16>",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, cutlass::bfloat16_t>>",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64, 128, 128, 8>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "triton_tem_fused_flex_attention_12", "triton_tem_fused_flex_attention_backward_cat_mul_3",
        "triton_per_fused_flex_attention_backward_mul_sum_2",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "loss": [
        "triton_red_fused__log_softmax__to_copy_nll_loss_forward_7", "triton_red_fused_logsumexp_3",
        "triton_red_fused__log_softmax__log_softmax_backward_data__to_copy_mul_nll_loss_backward_11",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForwardGmem<4, float, float, float>",
        "aten::_log_softmax", "aten::nll_loss_forward", "cross_entropy_kernel",
    ],
    "matrix product": [
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256_32x3_nt_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "triton_tem_fused_mm_4",
        "aten::mm", "aten::addmm", "aten::bmm",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor<float, NormType(2)>>",
        "void at::native::lpnorm_cleanup<float, (at::native::NormType)2, float, float>",
        "aten::_fused_adamw_", "aten::_foreach_norm", "aten::linalg_vector_norm",
    ],
    "activation": ["triton_poi_fused_gelu_5", "triton_poi_fused_gelu_backward_9", "triton_poi_fused_mul_pow_tanh_2",
                   "aten::gelu_backward", "triton_poi_fused_pow_relu_0", "aten::relu", "aten::threshold_backward",
                   "triton_poi_fused_mul_pow_relu_threshold_backward_1"],
    "embedding": ["triton_poi_fused_embedding_dense_backward_3", "triton_red_fused__to_copy_embedding_rms_norm_0",
                  "aten::index_select"],
    "norm and rotary": ["triton_red_fused__fused_rms_norm_add_3", "triton_poi_fused__to_copy_cat_mul_sub_4",
                        "rotate_forward", "rotate_backward", "triton_per_fused_add_view_12",
                        "triton_poi_fused_add_1", "aten::rsqrt", "aten::mul"],
    "other": ["triton_poi_fused__to_copy_4", "Memcpy DtoD (Device -> Device)", "Memset (Device)", "aten::fill_",
              "a_kernel_of_tomorrow", "triton_poi_fused_address_1"],
}.items())
def test_kind_of(kind, names):
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


def test_a_moment_counts_once():
    assert exclusive([]) == {}
    assert exclusive([("a", 0, 10), ("b", 20, 25), ("a", 30, 31)]) == {"a": 11, "b": 5}
    assert exclusive([("outer", 0, 10), ("inner", 2, 5), ("innermost", 3, 4)]) == {
        "outer": 7, "inner": 2, "innermost": 1}
    assert exclusive([("outer", 0, 10), ("inner", 0, 4)]) == {"outer": 6, "inner": 4}
    assert exclusive([("first", 0, 10), ("second", 8, 14)]) == {"first": 8, "second": 6}


@pytest.mark.parametrize("events", [
    [("ncclDevKernel", 0, 10), ("gemm", 4, 6)], [("gemm", 4, 6), ("ncclDevKernel", 0, 10)],
])
def test_communication_counts_where_nothing_else_runs(events):
    assert exclusive(events) == {"ncclDevKernel": 8, "gemm": 2}
    assert exclusive([("gemm", 0, 5), ("ncclDevKernel", 3, 7)]) == {"gemm": 5, "ncclDevKernel": 2}


def test_kinds_and_idle_add_up_to_the_step():
    """Two steps of 10 ms in microseconds: gaps, an overlap, an unknown name."""
    events = [("nvjet_a", 0, 4000), ("triton_poi_fused_gelu_1", 5000, 6000), ("unheard_of", 5500, 6500),
              ("nvjet_a", 10_000, 12_000), ("nvjet_b", 12_000, 16_000), ("Memset (Device)", 19_000, 19_100)]
    result = breakdown(events, wall_ms=20, steps=2)
    kinds = result["kinds"]
    assert kinds == pytest.approx(dict.fromkeys(ALL_KINDS, 0) | {
        "matrix product": 5, "activation": 0.25, "other": 0.55, "idle": 4.2})
    assert sum(kinds.values()) == pytest.approx(10)
    assert [(kernel["name"], kernel["kind"], kernel["calls"]) for kernel in result["kernels"]] == [
        ("nvjet_a", "matrix product", 1), ("nvjet_b", "matrix product", 0.5), ("unheard_of", "other", 0.5),
        ("triton_poi_fused_gelu_1", "activation", 0.5), ("Memset (Device)", "other", 0.5)]
    assert sum(kernel["ms"] for kernel in result["kernels"]) == pytest.approx(10 - kinds["idle"])


def test_profile_counts_the_steps_it_is_asked_for():
    calls = []

    def step():
        calls.append(torch.ones(64, 64) @ torch.ones(64, 64))

    result = profile(step, 5, CPU)
    assert len(calls) == 6  # one more, in which the profiler starts
    assert [kernel["calls"] for kernel in result["kernels"] if kernel["name"] == "aten::mm"] == [1]
    assert min(result["kinds"].values()) >= 0 and result["kinds"]["matrix product"] > 0


# -----------------------------------------------------------------------------
# the floor


@pytest.mark.parametrize("name", VARIANTS)
def test_the_products_are_all_weights(name):
    with torch.device("meta"):
        n = GPT(variant(name)).flops_per_token(0) // 6  # all, but for an embedding that is not the head too
    assert sum(n_in * n_out * count for (n_in, n_out), count in weight_shapes(variant(name)).items()) == n


def test_least_bytes():
    """tiny: C = 64, 2 layers, 50,304 ids; 10 tokens in bfloat16, so that one x has 1,280 bytes."""
    plain, x = variant("tiny"), 1280
    n_bytes = least_bytes(plain, 10, 1000, 2, "plain")
    assert n_bytes == {"loss": 2 * 10 * 50_304 * 2, "activation": 2 * (8 + 12) * x,
                       "norm and rotary": 2 * (4 + 4 + 4 + 4 + 8) * x + 4 * x, "embedding": 10 * 64 * (2 * 2 + 3 * 4),
                       "optimizer": 32_000, "other": 12_000}
    assert least_bytes(plain, 10, 1000, 2, "fused") == n_bytes | {"activation": 0, "other": 6_000}
    assert least_bytes(replace(plain, mlp_activation="relu2"), 10, 1000, 2, "fused") == n_bytes | {"other": 6_000}
    assert least_bytes(plain, 10, 1000, 4, "plain")["other"] == 0
    of_muon = least_bytes(plain, 10, 10**6, 2, "plain", "muon")["optimizer"]
    assert of_muon == 32 * 10**6 - 8 * (4 + 4 + 4) * 64**2 * 2  # a moment of these is neither read nor written
    assert least_bytes(plain, 10, 1000, 4, "plain")["loss"] == 2 * n_bytes["loss"]

    def more(**flags):
        name = "norm and rotary"
        return least_bytes(replace(plain, **flags), 10, 1000, 2, "plain")[name] - n_bytes[name]

    untied = least_bytes(replace(plain, untie=True), 10, 10**7, 2, "fused")["other"]
    assert untied == 6 * (10**7 - 50_304 * 64)  # an embedding that no product reads is not cast
    assert more(qk_norm=True) == 2 * 2 * x
    assert more(embedding_norm=True) == x
    assert more(post_norm=True) == 2 * 4 * x
    assert more(post_norm=True, pre_norm=False) == 0


def test_floor_of_made_up_rates(monkeypatch):
    """Each product takes 1 ms, each attention 10."""
    gpt = replace(variant("tiny"), n_layer=3, window_size=4, window_pattern="SSL")
    measured = []

    def milliseconds(run, device):
        shape = getattr(run(), "shape", None)
        measured.append(shape)
        return 1.0 if shape else 10.0

    monkeypatch.setattr(floor, "milliseconds", milliseconds)
    monkeypatch.setattr(floor, "copy_rate", lambda device: 2e9)
    floor.products_ms.cache_clear()
    with torch.device("meta"):
        model = GPT(replace(gpt, vocab_size=512))
    result = floor.measure_floor(model, 2, 32, CPU, torch.float32, "adamw")
    floor.products_ms.cache_clear()
    assert result["kinds"]["matrix product"] == 3 * (4 * 3 + 1)  # three for each weight: four in a layer, and the head
    assert measured[:3] == [(64, 192), (64, 64), (192, 64)]
    assert len(measured) == 15 + 2 and result["kinds"]["attention"] == 3 * 10  # two kinds of layer
    assert result["kinds"]["loss"] == pytest.approx(1000 * 2 * 64 * 512 * 4 / 2e9)
    assert result["product_flops_per_s"] == pytest.approx(6 * 64 * model.num_params() / 39e-3)


def test_the_floor_of_fused_kernels_is_that_of_their_products(monkeypatch):
    asked = []
    monkeypatch.setattr(floor, "product", lambda layout, left, right, dtype: asked.append(
        (layout, *left.shape, *right.shape, dtype)))
    monkeypatch.setattr(floor, "milliseconds", lambda run, device: 1.0)
    assert floor.products_ms(4, 8, 16, CPU, torch.bfloat16, "fused") == 3
    assert asked == [("NT", 4, 8, 16, 8, torch.bfloat16), ("NN", 4, 16, 16, 8, torch.bfloat16),
                     ("TN", 4, 16, 4, 8, torch.float32)]
    floor.products_ms.cache_clear()


def test_many_tokens_are_measured_as_a_multiple(monkeypatch):
    monkeypatch.setattr(floor, "MOST_TOKENS", 16)
    monkeypatch.setattr(floor, "milliseconds", lambda run, device: 1.0 * (max(run().shape) <= 16))
    assert floor.products_ms(40, 8, 8, CPU, torch.float32, "plain") == 3 * 40 / 16


# -----------------------------------------------------------------------------
# times


def test_ratio():
    assert measure.ratio([[4, 4, 9], [6, 6, 6]], [[2, 2, 2], [4, 4, 1]]) == (6 / 2, [2, 1.5])


@pytest.mark.parametrize(("behind", "order"), [(False, [1, -1, 2, -2, 3, -3]), (True, [1, 2, -1, 3, -2, -3])])
def test_step_times(monkeypatch, behind, order):
    """On a GPU the second step is launched before the first is waited for."""
    monkeypatch.setattr(measure.machine, "runs_behind", lambda device: behind)
    clock, calls = iter([0, 1, 3, 6]), []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))

    def step():
        n = sum(call > 0 for call in calls) + 1
        calls.append(n)
        return lambda: calls.append(-n)

    assert measure.step_times(step, 3, CPU) == [1000, 2000, 3000]
    assert calls == order


# -----------------------------------------------------------------------------
# the command


def results(out_dir):
    return json.loads((out_dir / "results.json").read_text())


def test_command(tmp_path, capsys):
    assert call(bench.main, [*SMALL, "--model=tiny", "--qk_norm", f"--out_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "tiny_qk_norm-vocab_size=512, 2 x 32 tokens, float32" in out and max(map(len, out.splitlines())) <= 120
    (setting,) = results(tmp_path)["settings"]
    assert setting["config"]["gpt"]["qk_norm"] and setting["peak_mib"] is setting["mfu"] is None
    assert setting["predicted_mib"] is None and "predicted" not in out  # neither compiled nor in 16 bits
    (times,) = setting["rounds_ms"]
    assert len(times) == 2 and setting["tokens_per_s"] == pytest.approx(64_000 * 2 / sum(times))
    assert list(setting["kinds"]) == list(ALL_KINDS) and setting["kinds"].keys() - {"idle"} >= set(
        setting["floor"]["kinds"])
    for kind in ("attention", "loss", "matrix product", "optimizer", "activation", "embedding", "norm and rotary"):
        assert setting["kinds"][kind] > 0 and setting["floor"]["kinds"][kind] > 0 and kind in out
    calls = {kernel["name"]: kernel["calls"] for kernel in setting["kernels"]}
    assert calls["aten::mm"] == 3 * (4 * 2 + 1)
    assert calls["optimizer: aten::_fused_adamw_"] == calls["optimizer: aten::_foreach_norm"] == 1
    assert "--qk_norm" in results(tmp_path)["command"] and results(tmp_path)["machine"]["torch"] == torch.__version__


def record_builds(monkeypatch):
    build, order = bench.build, []

    def recorded(config, device):
        step, held_mib = build(config, device)
        order.append(f"build {config.batch_size}")
        return lambda: (order.append(config.batch_size), step())[1], held_mib

    monkeypatch.setattr(bench, "build", recorded)
    monkeypatch.setattr(bench, "profile", lambda step, steps, device: {"kinds": dict.fromkeys(ALL_KINDS, 1.0),
                                                                       "kernels": []})
    return order


def test_compare_runs_in_turn(tmp_path, monkeypatch, capsys):
    order = record_builds(monkeypatch)
    options = [*SMALL, "--qk_norm", f"--out_dir={tmp_path}", "--compare", "--batch_size 3 --n_layer 1"]
    assert call(bench.main, options) == 0
    assert order == ["build 2", 2, 2, "build 3", 3, 3, *[2, 2, 3, 3] * 3]
    result = results(tmp_path)
    a, b = result["settings"]
    assert a["config"]["gpt"] == b["config"]["gpt"] | {"n_layer": 2} and b["config"]["gpt"]["qk_norm"]
    assert result["tokens_per_s_ratio"]["all"] == pytest.approx(b["tokens_per_s"] / a["tokens_per_s"])
    assert len(result["tokens_per_s_ratio"]["rounds"]) == 4
    assert "tokens/s of the second over the first" in capsys.readouterr().out


def test_progress_within_a_turn(tmp_path, monkeypatch):
    order = record_builds(monkeypatch)

    class Bar:
        n = 0

        def __init__(self, total, **_):
            order.append(f"bar of {total}")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            order.append("bar")

        def update(self):
            order.append("bar")

    monkeypatch.setattr(bench, "tqdm", Bar)
    assert call(bench.main, [*SMALL, f"--out_dir={tmp_path}"]) == 0
    assert order == ["bar of 2", "build 2", "bar", 2, "bar", 2, "bar"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_settings_that_do_not_fit_together_are_built_again(error, tmp_path, monkeypatch):
    order, release, there, misses = record_builds(monkeypatch), bench.release, set(), []
    build = bench.build

    def one_at_a_time(config, device):
        if there:
            misses.append(config)
            raise error("CUDA error: out of memory")
        there.add(config.batch_size)
        return build(config, device)

    monkeypatch.setattr(bench, "build", one_at_a_time)
    monkeypatch.setattr(bench, "release", lambda built: (there.clear(), release(built)))
    assert call(bench.main, [*SMALL, f"--out_dir={tmp_path}", "--compare=--batch_size 3"]) == 0
    assert order == ["build 2", 2, 2, "build 3", 3, 3] * 4 and len(misses) == 1
    assert [len(times) for setting in results(tmp_path)["settings"] for times in setting["rounds_ms"]] == [2] * 8


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_out_of_memory(error, tmp_path, monkeypatch, capsys):
    def build(config, device):
        raise error("CUDA error: out of memory\nand more")

    monkeypatch.setattr(bench, "build", build)
    assert call(bench.main, [*SMALL, "--batch_size=64", "--sequence_length=1024", f"--out_dir={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "--batch_size 32 is predicted to save" in said and said.count("\n") == 1
    (tmp_path / "model.py").write_text(OTHER)
    assert call(bench.main, [*SMALL, f"--out_dir={tmp_path}", f"--against={tmp_path / 'model.py'}"]) == 1
    assert "out of memory, try a smaller --batch_size (CUDA" in capsys.readouterr().err


def test_another_error_of_torch_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "build", lambda config, device: torch.ones(2) @ torch.ones(3))
    for more in [], ["--compare=--batch_size 3"]:
        with pytest.raises(RuntimeError, match="size"):
            call(bench.main, [*SMALL, f"--out_dir={tmp_path}", *more])


def test_how_a_step_is_computed_reaches_the_model_and_the_floor(tmp_path, monkeypatch):
    """Both settings of --compare; on the CPU nothing but plain serves, so that what was asked for is looked at."""
    built, floors, init = [], [], GPT.__init__

    def watched(self, config, *options, **more):
        init(self, config, None, "plain", **more)
        built.append(options)
        self.asked = options

    monkeypatch.setattr(GPT, "__init__", watched)
    monkeypatch.setattr(bench, "measure_floor", lambda model, *shape: floors.append(model.asked) or {
        "kinds": {}, "product_flops_per_s": 1.0, "copy_bytes_per_s": 1.0})
    options = [*SMALL, "--window_size=8", "--window_backend=blocked", "--kernels=fused", "--recompute_gelu",
               "--compare=--kernels plain --no_recompute_gelu", f"--out_dir={tmp_path}"]
    assert call(bench.main, options) == 0
    assert {("blocked", "fused", True), ("blocked", "plain", False)} <= set(built)
    assert floors == [("blocked", "fused"), ("blocked", "plain")]


def test_batches_of_the_data(tmp_path, monkeypatch):
    """Each step reads the next windows of the order of train_gpt2.py, this process its share; without data all one."""
    (config,), _ = bench.parse_options([*SMALL, f"--data={make_data(tmp_path / 'data')}"])
    monkeypatch.setattr(bench, "RANK", 1)
    monkeypatch.setattr(bench, "WORLD_SIZE", 2)
    _, windows, _ = open_data(config.data, 32, 512)
    for step, (inputs, targets) in zip(range(12), bench.batches(config, CPU), strict=False):  # a second epoch too
        expected = windows.read(train_order(37, 0, step, 4)[2:])
        assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
    fixed = bench.batches(replace(config, data=None), CPU)
    assert next(fixed) is next(fixed)


def test_steps_on_data_in_turn_with_one_batch(tmp_path, monkeypatch, capsys):
    order, seen, forward = record_builds(monkeypatch), [], GPT.forward

    def watched(self, inputs, targets):
        seen.append((len(inputs), inputs.sum().item() + targets.sum().item()))
        return forward(self, inputs, targets)

    monkeypatch.setattr(GPT, "forward", watched)
    data = make_data(tmp_path / "data")
    assert call(bench.main, [*SMALL, f"--out_dir={tmp_path / 'out'}", f"--compare=--batch_size 3 --data {data}"]) == 0
    assert order == ["build 2", 2, 2, "build 3", 3, 3, *[2, 2, 3, 3] * 3]
    assert f"text of {data}" in capsys.readouterr().out
    steps = bench.WARMUP_STEPS + 2 * bench.ROUNDS
    fixed, read = ([total for size, total in seen if size == wanted] for wanted in (2, 3))
    assert len(fixed) == len(read) == steps and len(set(fixed)) == 1 and len(set(read)) > steps // 2


def test_bad_data(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for options in ["--data=nope"], [f"--compare=--data {tmp_path / 'empty'}"]:
        assert call(bench.main, [*SMALL, f"--out_dir={tmp_path / 'out'}", *options]) == 7
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "code"), [("--out_dir=file", 5), ("--compare=--window_size 9999", 2)])
def test_no_data_is_prepared_for_a_command_that_is_refused(option, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert call(bench.main, [*SMALL, "--data=shakespeare", option]) == code
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


OTHER = """
import torch.nn as nn
from dataclasses import dataclass

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.wte = config, nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_against_the_model_of_another_file(tmp_path, monkeypatch, capsys):
    """Theirs first, in turn, at our size; without a floor, which is of our parts."""
    order, made, make = record_builds(monkeypatch), [], bench.other_model
    monkeypatch.setattr(bench, "other_model", lambda config: (made.append(make(config)), made[-1])[1])
    (tmp_path / "model.py").write_text(OTHER)
    options = [*SMALL, "--n_embd=32", f"--out_dir={tmp_path}", f"--against={tmp_path / 'model.py'}"]
    assert call(bench.main, options) == 0
    assert order == ["build 2", 2, 2, "build 2", *[2, 2] * 7]
    (model,), (theirs, ours) = made, results(tmp_path)["settings"]
    assert vars(model.config) == {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 512, "block_size": 32,
                                  "dropout": 0.0, "bias": False}
    assert theirs["config"]["way"] == "against" and "floor" not in theirs and "floor" in ours
    assert results(tmp_path)["tokens_per_s_ratio"]["all"] == pytest.approx(
        ours["tokens_per_s"] / theirs["tokens_per_s"])
    assert f"{tmp_path / 'model.py'}, 2 x 32 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["GPT = 1", "from nowhere import GPT", "def GPTConfig(): pass", "(", None])
def test_against_what_is_no_such_model(text, tmp_path, capsys):
    """None: of a name by which Python knows no module."""
    path = tmp_path / ("model.py" if text else "model.txt")
    path.write_text(text or OTHER)
    assert call(bench.main, [*SMALL, f"--out_dir={tmp_path / 'out'}", f"--against={path}"]) == 2
    error = capsys.readouterr().err
    assert "has no model like nanoGPT's" in error and error.count("\n") == 1


def test_predicted_memory(monkeypatch):
    """Of the kernels that are chosen; with DDP the gradients stay, in buckets."""
    tiny = replace(variant("tiny"), vocab_size=512)
    (config,), _ = bench.parse_options([*SMALL, "--model=tiny", "--compile=on", "--dtype=bfloat16"])
    monkeypatch.setattr(bench, "WORLD_SIZE", 2)
    for way, shares in ("", 1), ("ddp", 2):
        predicted = bench.predicted_mib(replace(config, way=way), CPU) * 2**20
        assert predicted == training_need(tiny, None, 2, 32, shares, "plain")
    for option in {"compile": "off"}, {"dtype": "float32"}:
        assert bench.predicted_mib(replace(config, **option), CPU) is None


def test_two_processes(tmp_path):
    """Each for itself in turn with DistributedDataParallel, printed and written once."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, "bench.py", *SMALL, f"--out_dir={tmp_path}"], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("each of 2 processes") == 2 and done.stdout.count("summed by DDP") == 1
    alone, ddp = results(tmp_path)["settings"]
    assert (alone["config"]["way"], ddp["config"]["way"]) == ("", "ddp")
    assert "tokens/s of the second over 2 x one process" in done.stdout
    assert results(tmp_path)["command"].startswith("torchrun --nproc_per_node 2 -- bench.py --device=cpu")
    for option, words_of_it in {"--optimizer=muon": "divides its work", "--compare=--qk_norm": "each bring a second",
                                "--verify": "is one process"}.items():
        done = subprocess.run([sys.executable, "bench.py", "--device=cpu", option], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"})
        assert done.returncode == 2 and words_of_it in done.stderr


def test_verify(monkeypatch):
    from kernels import verify

    monkeypatch.setattr(verify, "run", lambda device: {"cpu": 1}[device])
    assert call(bench.main, ["--verify", "--device=cpu"]) == 1


@pytest.mark.parametrize(("options", "expected"), [
    (["--model=d13"], "unknown model 'd13', did you mean"),
    (["--device=tpu"], "device='tpu'"),
    (["--device=cpu", "--steps=0"], "steps=0 must lie"),
    (["--device=cpu", "--batch_size=-1"], "batch_size=-1 must lie"),
    (["--device=cpu", "--n_head=3"], "n_embd=64 is not divisible by n_head=3"),
    (["--device=cpu", "--window_size=65"], "window_size=65 is more than sequence_length=64"),
    (["--device=cpu", "--window_size=8", "--window_backend=flex"], "'flex' serves CUDA only"),
    (["--device=cpu", "--window_backend=blocked"], "has no use"),
    (["--device=cpu", "--kernels=fused"], "'fused' serves CUDA only"),
    (["--device=cpu", "--recompute_gelu"], "recompute_gelu needs mlp_activation=gelu and kernels=fused"),
    (["--device=cpu", "--compare", "--window_size 65"], "window_size=65 is more than"),
    (["--device=cpu", "--compare", "--steps 3"], "steps cannot differ"),
    (["--device=cpu", "--compare", "--compare=--qk_norm"], "compare cannot differ"),
    (["--device=cpu", "--compare", "--model 'd12"], "No closing quotation"),
    (["--device=cpu", "--compare", "--against no.py"], "against cannot differ"),
    (["--device=cpu", "--against=no.py"], "--against no.py: no such file"),
    (["--device=cpu", "--against=no.py", "--compare=--qk_norm"], "each bring a second setting"),
    (["--device=cpu", "--verify", "--steps=3"], "--verify takes no other option"),
])
def test_bad_options(options, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(bench.main, options) == 2
    error = capsys.readouterr().err
    assert expected in words(error) and (error.count("\n") == 1 or "Value error" in error)  # tyro's own is a frame
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_written_is_known_before(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert call(bench.main, [*SMALL, f"--out_dir={tmp_path / 'file'}"]) == 5
    assert "is not a directory" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("options", [["--model=d12_qk_norm"], ["--model=d12_window256"]])
def test_gpu_command(options, tmp_path, capsys, fresh_compiler):
    """Compiled: the kinds that a model must have are found by name, and kernels without one are few."""
    assert call(bench.main, ["--device=cuda", "--batch_size=16", f"--out_dir={tmp_path}", *options]) == 0
    (setting,) = results(tmp_path)["settings"]
    kinds = setting["kinds"]
    for kind in ("attention", "loss", "matrix product", "optimizer", "embedding", "norm and rotary"):
        assert kinds[kind] > 0, kind
    assert not kinds["activation"]  # it is inside the products
    assert kinds["other"] < 0.1 * kinds["matrix product"]
    assert setting["peak_mib"] == pytest.approx(setting["predicted_mib"], rel=0.05) and setting["peak_mib"] > 1000
    calls = [kernel["calls"] for kernel in setting["kernels"] if kernel["kind"] == "loss"]
    assert calls == [2]  # of these steps alone, which take two chunks


@pytest.mark.gpu
def test_gpu_compare_of_a_setting_with_itself(tmp_path, fresh_compiler):
    assert call(bench.main, ["--device=cuda", "--batch_size=8", f"--out_dir={tmp_path}", "--compare=--n_layer 12"]) == 0
    a, b = (setting["peak_mib"] for setting in results(tmp_path)["settings"])
    assert a == pytest.approx(b, rel=0.03)
