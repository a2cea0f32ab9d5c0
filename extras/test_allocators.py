"""Tests of extras/allocators.py: pytest extras/test_allocators.py"""

import copy
import itertools
import math
import random

import pytest
import torch
from torch import nn

import triadapt
from extras.allocators import ALLOCATORS, UpdateNorm

torch.set_num_threads(1)
NAMES = ["importance", "random", "uniform", "norm", "norm-change", "sensitivity", "worth"]
GROWTH = {"total_steps": 20, "warmup": 2, "interval": 2}


def small_net(method="triadapt", seed=1):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5, bias=False))
    adapters = triadapt.add_adapters(net, ["0", "2"], method, rank=4, init_rank=2)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B)
    return net, adapters


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def train_step(net, optimizer, allocator, t) -> None:
    torch.manual_seed(t)
    optimizer.zero_grad()
    net(torch.randn(7, net[0].base.in_features)).square().sum().backward()
    optimizer.step()
    allocator.step(t)


def update(adapter) -> torch.Tensor:
    left, right = adapter.factors()
    return adapter.scale * left @ right


def make(name, argument="ranks", method="triadapt", seed=1):
    net, adapters = small_net(method, seed)
    optimizer = adam(net)
    return net, optimizer, ALLOCATORS[name](adapters, optimizer, argument=argument, **GROWTH)


@pytest.mark.parametrize("argument", ["ranks", "parameters"])
@pytest.mark.parametrize("method", ["triadapt", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact_and_scores_are_pure(name, method, argument):
    if (name, method) == ("importance", "lora"):
        with pytest.raises(ValueError, match="no importance"):
            make(name, argument, method)
        return
    net, optimizer, allocator = whole = make(name, argument, method)
    for t in range(1, 21):
        before, scores = torch.get_rng_state(), dict(allocator.scores())
        assert list(scores) == ["0", "2"] and all(map(math.isfinite, scores.values()))
        assert allocator.scores() == scores and torch.equal(torch.get_rng_state(), before)
        train_step(*whole, t)
        if t == 9:
            saved = [triadapt.adapter_state_dict(net)]
            saved += [copy.deepcopy(part.state_dict()) for part in whole[1:]]

    again = make(name, argument, method)
    triadapt.load_adapter_state_dict(again[0], saved[0], again[1])
    again[1].load_state_dict(saved[1])
    again[2].load_state_dict(saved[2])
    for t in range(10, 21):
        train_step(*again, t)
    expected = triadapt.adapter_state_dict(net)
    torch.testing.assert_close(triadapt.adapter_state_dict(again[0]), expected, rtol=0, atol=0)
    assert again[2].scores() == allocator.scores()


def test_random_differs_between_seeds_and_allocations():
    draws = []
    for seed in range(2):
        allocator = make("random", seed=seed)[2]
        for t in range(1, 5):  # an allocation at step 4
            allocator.step(t)
            draws.append(tuple(allocator.scores().values()))
    with pytest.raises(ValueError, match="NAME:numbers: must be ranks or parameters"):
        make("random", "numbers")
    assert draws[1] == draws[2] and draws[5] == draws[6] and len(set(draws)) == 6


def test_norm_change_is_its_formula():
    allocator = make("norm-change")[2]
    before = {name: update(a).norm().item() / a.rank for name, a in allocator.adapters.items()}
    assert UpdateNorm.scores(allocator) == pytest.approx(before, rel=1e-5)
    allocator.adapters["0"].lora_B.data *= 3
    assert allocator.scores() == pytest.approx({"0": 2 * before["0"], "2": 0.0}, abs=1e-4)


def test_worth_is_its_formula_over_pieces():
    net, adapters = small_net()
    x = torch.randn(11, 6)
    output = adapters["0"](x)
    (gradient,) = torch.autograd.grad(net[1:](output).square().sum(), output)
    products = (gradient * (x @ update(adapters["0"]).T)).sum(-1)  # (tokens,)
    expected = 0.03 * products.square().sum().item() / 2  # smoothed, per rank
    allocator = ALLOCATORS["worth"](adapters, adam(net), **GROWTH)
    for piece in (x[:4], x[4:]):
        net(piece).square().sum().backward()
    with torch.no_grad():
        net(x)  # an evaluation does not count
    allocator.step(1)
    assert allocator.scores()["0"] == pytest.approx(expected, rel=1e-4)
    for t in range(2, 21):
        allocator.step(t)
    triadapt.merge_adapters(net)  # refuses hooks


def test_sensitivity_is_its_formula():
    allocator = make("sensitivity", method="lora")[2]
    tensors = [allocator.adapters["0"].lora_A, allocator.adapters["0"].lora_B]
    for p in tensors:
        p.grad = torch.full_like(p, 2.0)
    allocator.step(1)  # "2" has no gradient
    now = torch.cat([2 * p.flatten().abs() for p in tensors])
    expected = (0.15 * now * 0.15 * 0.85 * now).mean().item()
    assert allocator.scores() == pytest.approx({"0": expected, "2": 0.0}, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_stay_within_those_of_lora(name):
    rng = random.Random(name)
    for schedule, rank_step in itertools.product(triadapt.SCHEDULES, (1, 3)):
        sizes = [rng.randint(4, 12) for _ in range(rng.randint(3, 6))]
        net = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))
        rank = rng.randint(4, 6)
        adapters = triadapt.add_adapters(net, r"\d", rank=rank, init_rank=1)
        settings = {"total_steps": 30, "warmup": 2, "interval": 1, "argument": "parameters"}
        settings |= {"schedule": schedule, "rank_step": rank_step, "top_k": 3}
        optimizer = adam(net)
        allocator = ALLOCATORS[name](adapters, optimizer, **settings)
        lora = rank * sum(d_in + d_out for d_in, d_out in itertools.pairwise(sizes))
        for t in range(1, 31):
            train_step(net, optimizer, allocator, t)
            left = lora - sum(p.numel() for p in net.parameters() if p.requires_grad)
            assert left >= 0
        new_r = [a.rank + rank_step for a in adapters.values()]
        layers = [sum(a.base.weight.shape) for a in adapters.values()]
        prices = [rank_step * (size + 2 * r) for size, r in zip(layers, new_r, strict=True)]
        assert left < max(prices)
