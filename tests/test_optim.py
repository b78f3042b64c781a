"""optim.py: Muon against torch's own, one weight one optimizer, several processes, and the schedule by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from small import digest

import checkpoint
from configs.recipes import TrainConfig
from configs.variants import variant
from model import GPT
from optim import Muon, make_optimizers, orthogonal, rehearse_update, schedule, set_learning_rate, share, update
from rundir import leave

SHAPES = [(8, 8), (8, 32), (32, 8), (8, 8), (24, 8), (32, 8)]  # two of some, in no order


def weights_and_gradients(n_steps, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    make = lambda: [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]  # noqa: E731
    return make(), [make() for _ in range(n_steps)]


def train(optimizer, weights, gradients):
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()


def assert_equal_to_torch(device, compiled):
    """
    After several steps, torch's having the matrices of SHAPES with three parts as three. bfloat16 has 8 bits, and an
    update is about as long as the learning rate.
    """
    start, gradients = weights_and_gradients(4, device)
    ours = [weight.clone().requires_grad_() for weight in start]
    theirs = [weight.clone().requires_grad_() for weight in split(start)]
    groups = [{"params": [weight for weight in ours if is_three(weight) == three], "parts": 3 if three else 1}
              for three in (True, False)]
    muon = Muon(groups, lr=0.1, weight_decay=0.2, compiled=compiled)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2)
    train(muon, ours, gradients)
    train(reference, theirs, [split(step) for step in gradients])
    momenta = split([muon.state[weight]["momentum_buffer"] for weight in ours])
    for weight, momentum, expected, before in zip(split(ours), momenta, theirs, split(start), strict=True):
        assert not torch.allclose(expected, before, atol=0.05)
        torch.testing.assert_close(weight, expected, rtol=0, atol=0.1 * 4 * 2**-6)
        torch.testing.assert_close(momentum, reference.state[expected]["momentum_buffer"])


def is_three(weight) -> bool:
    return len(weight) == 24


def split(tensors):
    return [part for tensor in tensors for part in (tensor.chunk(3) if is_three(tensor) else [tensor])]


@pytest.mark.parametrize("compiled", [False, True])
def test_muon_is_that_of_torch(compiled, fresh_compiler):
    assert_equal_to_torch("cpu", compiled)


@pytest.mark.gpu
def test_gpu_muon_is_that_of_torch(fresh_compiler):
    assert_equal_to_torch("cuda", compiled=True)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 16, 64), (2, 64, 16)])
def test_orthogonal(shape):
    """The singular vectors stay, the values become about 1: the five steps leave them between 0.7 and 1.2."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    x = u @ torch.diag_embed(s.clamp(min=0.1 * s.max())) @ vt
    result = orthogonal(x)
    assert result.shape == x.shape and result.dtype == x.dtype
    values = u.mT @ result @ vt.mT
    assert ((values.diagonal(dim1=1, dim2=2) > 0.65) & (values.diagonal(dim1=1, dim2=2) < 1.25)).all()
    assert (values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_weight_has_one_optimizer(name, untie):
    """Muon has the matrices of the blocks, q, k and v apart; each group follows the schedule from its own peak."""
    model = GPT(replace(variant("tiny"), untie=untie))
    config = TrainConfig(optimizer=name, learning_rate=0.5, muon_learning_rate=0.25, warmup_steps=4)
    optimizers = make_optimizers(model, config)
    of = {weight: type(one) for one in optimizers for group in one.param_groups for weight in group["params"]}
    n = sum(len(group["params"]) for one in optimizers for group in one.param_groups)
    assert n == len(of) and of.keys() == set(model.parameters())
    for parameter, weight in model.named_parameters():
        assert of[weight] == (Muon if name == "muon" and ".h." in parameter else torch.optim.AdamW)
    parts = {weight: group.get("parts") for one in optimizers[1:] for group in one.param_groups
             for weight in group["params"]}
    assert all(parts[weight] == (3 if "c_attn" in parameter else 1) for parameter, weight in model.named_parameters()
               if weight in parts)
    assert set_learning_rate(optimizers, config, 1) == 0.25
    peaks = {torch.optim.AdamW: 0.5, Muon: 0.25}
    assert all(group["lr"] == peaks[type(one)] / 2 for one in optimizers for group in one.param_groups)


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_embedding_with_a_rate_of_its_own(name, untie):
    """All others keep theirs, and their weight decay; an embedding that is the head too has none."""
    model = GPT(replace(variant("tiny"), untie=untie))
    config = TrainConfig(optimizer=name, learning_rate=0.5, embedding_learning_rate=0.125, warmup_steps=4)
    usual = make_optimizers(model, replace(config, embedding_learning_rate=None))
    own = make_optimizers(model, config)
    set_learning_rate(usual, config, 1), set_learning_rate(own, config, 1)
    expected, found = ({weight: (type(one), group["lr"], group["weight_decay"]) for one in optimizers
                        for group in one.param_groups for weight in group["params"]} for optimizers in (usual, own))
    assert found == expected | ({model.transformer.wte.weight: (torch.optim.AdamW, 0.0625, 0.0)} if untie else {})


def test_muon_divides_three_of_one_size_only():
    gpt = GPT(variant("tiny"))
    gpt.transformer.h[1].attn.c_attn.weight = torch.nn.Parameter(torch.zeros(128, 64))
    with pytest.raises(ValueError, match="q, k and v of one size"):
        make_optimizers(gpt, TrainConfig(optimizer="muon"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_rehearsed_update_leaves_all_as_it_is(optimizer):
    """Before the first update and between two: weights and state go on as without it, to the last bit."""
    def run(rehearsals):
        torch.manual_seed(0)
        gpt = GPT(variant("tiny"))
        optimizers = make_optimizers(gpt, TrainConfig(optimizer=optimizer, learning_rate=0.01))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for weight in gpt.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator)
            if step in rehearsals:
                rehearse_update(optimizers)
            update(gpt, optimizers, torch.tensor(1.0), 1.0)
        return checkpoint.named_tensors(gpt, optimizers)

    assert all(digest(x) == digest(y) for x, y in zip(run(()), run((0, 2)), strict=True))


def test_decay_is_for_matrices():
    layer = torch.nn.Linear(3, 2)
    groups = make_optimizers(layer, TrainConfig(weight_decay=0.3))[0].param_groups
    assert {tuple(weight.shape): group["weight_decay"] for group in groups for weight in group["params"]} == {
        (2, 3): 0.3, (2,): 0.0}


def shared(rank, directory, n_processes, compiled):
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=n_processes)
    x = torch.load(f"{directory}/x.pt")
    result = share(orthogonal, x), share(orthogonal, x[:1]), after_two_steps(compiled)
    torch.save(result, f"{directory}/{rank}.pt")
    dist.destroy_process_group()
    leave(0)  # after gloo, Python's own end is an abort in one of ten processes


def after_two_steps(compiled) -> list:
    start, gradients = weights_and_gradients(2)
    weights = [weight.requires_grad_() for weight in start]
    train(Muon([{"params": weights, "parts": 1}], lr=0.1, weight_decay=0.2, compiled=compiled), weights, gradients)
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("compiled", [False, True])
def test_processes_share_the_work(tmp_path, one_thread, compiled):
    """The same bits in each: four matrices among three processes, of which one has none, a single one, and Muon's."""
    x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.save(x, tmp_path / "x.pt")
    torch.multiprocessing.spawn(shared, (str(tmp_path), 3, compiled), nprocs=3)
    alone = after_two_steps(compiled)
    for rank in range(3):
        four, one, weights = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(four, orthogonal(x)) and torch.equal(one, orthogonal(x[:1]))
        assert all(torch.equal(*pair) for pair in zip(weights, alone, strict=True))


# -----------------------------------------------------------------------------
# the schedule, by hand

SCHEDULE = TrainConfig(warmup_steps=4, max_steps=12)
HALF_OF_COS = {0: 1.0, 2: 0.5 + math.sqrt(0.125), 4: 0.5, 7: 0.0380602337}  # (1 + cos(pi n / 8)) / 2


@pytest.mark.parametrize(("form", "final", "step", "expected"), [
    ("cosine", 0.0, 0, 1 / 4),
    ("cosine", 0.0, 2, 3 / 4),
    ("cosine", 0.0, 3, 1.0),  # the last of the warm-up
    ("cosine", 0.0, 4, HALF_OF_COS[0]),
    ("cosine", 0.0, 6, HALF_OF_COS[2]),
    ("cosine", 0.0, 8, HALF_OF_COS[4]),
    ("cosine", 0.0, 11, HALF_OF_COS[7]),
    ("cosine", 0.1, 0, 1 / 4),
    ("cosine", 0.1, 8, 0.55),
    ("cosine", 0.1, 11, (0.1 + 0.9 * HALF_OF_COS[7])),
    ("cosine", 0.1, 12, 0.1),  # where the schedule ends: after the last step
    ("linear", 0.0, 3, 1.0),
    ("linear", 0.0, 4, 1.0),
    ("linear", 0.0, 6, 6 / 8),
    ("linear", 0.0, 11, 1 / 8),
    ("linear", 0.5, 8, 0.75),
    ("linear", 0.5, 11, (0.5 + 0.5 / 8)),
    ("linear", 1.0, 11, 1.0),
])
def test_schedule(form, final, step, expected):
    config = replace(SCHEDULE, schedule=form, final_lr_fraction=final)
    assert schedule(config, step) == pytest.approx(expected, rel=1e-8)


def test_schedule_without_warmup_and_with_nothing_else():
    assert schedule(replace(SCHEDULE, warmup_steps=0), 0) == 1.0
    assert schedule(replace(SCHEDULE, warmup_steps=0), 6) == pytest.approx(0.5)
    only_warmup = [schedule(replace(SCHEDULE, warmup_steps=12), step) for step in range(12)]
    assert only_warmup == pytest.approx([(step + 1) / 12 for step in range(12)])


@pytest.mark.parametrize(("fraction", "step", "expected"), [
    (0.5, 0, 1 / 4), (0.5, 4, 1.0), (0.5, 6, 1.0), (0.5, 7, 5 / 6), (0.5, 11, 1 / 6), (0.5, 12, 0.0),
    (0.9, 4, 1.0), (0.9, 5, 7 / 8),  # begins with the end of the warm-up
    (0.0, 11, 1.0), (0.01, 11, 1.0),  # less than one step
])
def test_warm_up_stable_decay(fraction, step, expected):
    assert schedule(replace(SCHEDULE, schedule="linear", decay_fraction=fraction), step) == pytest.approx(expected)


def test_warm_up_stable_cosine():
    config = replace(SCHEDULE, schedule="cosine", decay_fraction=0.5)
    assert [schedule(config, step) for step in (5, 6, 9, 12)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gpu_no_host_waits_for_an_update(optimizer, fresh_compiler):
    """Neither of one process nor of several, where torch would say so; else the GPU has nothing to do meanwhile."""
    model = GPT(replace(variant("tiny"), vocab_size=512)).cuda()
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer), compiled=True)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for alone, mode in (True, "default"), (False, "default"), (True, "error"), (False, "error"):
            _, loss = model(*torch.randint(512, (2, 2, 16), device="cuda"))
            loss.backward()
            torch.cuda.set_sync_debug_mode(mode)
            update(model, optimizers, loss.detach(), 1.0, alone)
            torch.cuda.set_sync_debug_mode("default")
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.cuda.set_sync_debug_mode("error")
            torch.tensor([1.0], device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
