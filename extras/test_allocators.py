"""Tests of extras/allocators.py: pytest extras/test_allocators.py"""

import copy
import itertools
import math
import random

import pytest
import torch
from torch import nn

import train
from extras import allocators
from triadapt import (
    ALLOCATORS,
    SCHEDULES,
    adapter_state_dict,
    add_adapters,
    load_adapter_state_dict,
)

torch.set_num_threads(1)
NAMES = ["importance", "random", "uniform", "norm", "norm-change", "sensitivity", "worth"]
GROWTH = {"total_steps": 20, "warmup": 2, "interval": 2}


def small_net(method="triadapt", seed=1):
    """Two Linears of different shapes, with adapters that are trained already."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5, bias=False))
    adapters = add_adapters(net, ["0", "2"], method, rank=4, init_rank=2)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B)
    return net, adapters


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def train_step(net, optimizer, allocator, t) -> list[str]:
    torch.manual_seed(t)
    optimizer.zero_grad()
    net(torch.randn(7, net[0].base.in_features)).square().sum().backward()
    optimizer.step()
    return allocator.step(t)


def update(adapter) -> torch.Tensor:
    left, right = adapter.factors()
    return adapter.scale * left @ right


def test_train_runs_with_a_budget_in_parameters(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of {i * i} lines" for i in range(400)))
    options = f"--base scratch --data {text} --context 16 --steps 8 --batch-size 2 --warmup 1"
    options += f" --target-modules q|fc --rank 4 --allocator worth:parameters --out {tmp_path}/out"
    allocator = train.main(options.split()).allocator
    assert type(allocator) is allocators.Worth
    adapters = allocator.adapters.values()
    trained = sum(p.numel() for a in adapters for p in a.parameters() if p.requires_grad)
    lora = 4 * 4 * (128 + 128 + 128 + 512)
    assert 0 <= lora - trained < 2 * 128 + 2 * 9 and allocator.total_rank > 2 * len(adapters)
    with pytest.raises(SystemExit):
        train.main([*options.split()[:-1], f"{tmp_path}/new", "--allocator", "worth:numbers"])
    assert "argument numbers: must be ranks or parameters" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["triadapt", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_and_change_nothing(name, method):
    net, adapters = small_net(method)
    optimizer = adam(net)
    if (name, method) == ("importance", "lora"):
        with pytest.raises(ValueError, match="no importance"):
            ALLOCATORS[name](adapters, optimizer, **GROWTH)
        return
    allocator = ALLOCATORS[name](adapters, optimizer, **GROWTH)
    for t in range(1, 21):
        before = torch.get_rng_state()
        scores = allocator.scores()  # at first, before any gradient exists
        assert list(scores) == list(adapters)
        assert all(math.isfinite(score) for score in scores.values())
        assert allocator.scores() == scores
        assert torch.equal(torch.get_rng_state(), before)
        train_step(net, optimizer, allocator, t)
    assert allocator.total_rank == 8


def test_random_differs_between_seeds_and_allocations():
    draws = []
    for seed in range(2):
        net, adapters = small_net("lora", seed)
        allocator = allocators.Random(adapters, adam(net), **GROWTH)
        draws.append(allocator.scores())
        adapters["0"].grow(1)
        draws.append(allocator.scores())
    for one, two in itertools.combinations(draws, 2):
        assert one != two


def test_random_draws_the_same_in_every_process():
    net, adapters = small_net()
    for adapter in adapters.values():
        for name in adapter.GROWS_ALONG:
            nn.init.ones_(getattr(adapter, name))
    draws = allocators.Random(adapters, adam(net), **GROWTH).scores()
    assert draws == pytest.approx({"0": 0.9736726880, "2": 0.7379330397}, abs=1e-6)


def test_norm_change_is_its_formula_and_restarts():
    net, adapters = small_net()
    allocator = allocators.UpdateNormChange(adapters, adam(net), **GROWTH)
    before = {name: update(a).norm().item() / a.rank for name, a in adapters.items()}
    assert allocator.norms() == pytest.approx(before, rel=1e-5)
    assert [allocator.step(t) for t in (1, 2, 3)] == [[], [], []]
    adapters["0"].lora_B.data *= 3
    assert allocator.scores() == pytest.approx({"0": 2 * before["0"], "2": 0.0}, abs=1e-4)
    assert allocator.step(4) == ["0"]
    assert allocator.scores() == {"0": 0.0, "2": 0.0}


def test_worth_is_its_formula_over_pieces():
    net, adapters = small_net()
    x = torch.randn(11, 6)
    seen = {}  # name: (input, output)
    for name, adapter in adapters.items():

        def note(module, inputs, output, name=name) -> None:
            seen[name] = inputs[0].detach(), output

        adapter.register_forward_hook(note)
    loss = net(x).square().sum()
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    expected = {}
    for (name, adapter), gradient in zip(adapters.items(), gradients, strict=True):
        products = (gradient * (seen[name][0] @ update(adapter).T)).sum(-1)  # (tokens,)
        expected[name] = 0.03 * products.square().sum().item() / 2  # smoothed, per rank

    old = allocators.Worth(adapters, adam(net), **GROWTH)
    new = allocators.Worth(adapters, adam(net), **GROWTH)
    for piece in (x[:4], x[4:]):
        net(piece).square().sum().backward()
    with torch.no_grad():
        net(x)  # an evaluation does not count
    new.step(1)
    assert new.scores() == pytest.approx(expected, rel=1e-4)
    assert old.now == {}  # the newest allocator watches alone


def test_sensitivity_is_its_formula():
    net, adapters = small_net("lora")
    allocator = allocators.Sensitivity(adapters, adam(net), **GROWTH)
    for p in adapters["0"].parameters():
        p.grad = torch.full_like(p, 2.0)
    allocator.step(1)  # "2" has no gradient
    now = torch.cat([2 * adapters["0"].lora_A.flatten(), 2 * adapters["0"].lora_B.flatten()]).abs()
    expected = (0.15 * now * 0.15 * 0.85 * now).mean().item()
    assert allocator.scores() == pytest.approx({"0": expected, "2": 0.0}, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_stay_within_those_of_lora(name):
    rng = random.Random(name)
    for schedule in SCHEDULES:
        sizes = [rng.randint(1, 12) for _ in range(rng.randint(3, 6))]
        net = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))
        init_rank = rng.randint(1, 2)
        rank = init_rank + rng.randint(1, 3)
        adapters = add_adapters(net, r"\d", rank=rank, init_rank=init_rank)
        settings = {"total_steps": 20, "warmup": 2, "interval": 1, "top_k": 3}
        settings |= {"schedule": schedule, "rank_step": rng.randint(1, 3)}
        optimizer = adam(net)
        allocator = ALLOCATORS[name](adapters, optimizer, argument="parameters", **settings)
        lora = rank * sum(d_in + d_out for d_in, d_out in itertools.pairwise(sizes))
        for t in range(1, 21):
            before = {name: adapter.rank for name, adapter in adapters.items()}
            for grown in train_step(net, optimizer, allocator, t):
                assert adapters[grown].rank > before[grown]
            left = lora - sum(p.numel() for p in net.parameters() if p.requires_grad)
            assert left >= 0
        # Less is left than the cheapest rank costs.
        assert left < min(2 * (a.rank + 1) + sum(a.base.weight.shape) for a in adapters.values())


def test_a_frozen_tensor_costs_no_parameters():
    net, adapters = small_net()
    for adapter in adapters.values():
        adapter.lora_A.requires_grad_(False)  # LoRA-FA
    allocator = allocators.Allocator(adapters, adam(net), argument="parameters", **GROWTH)
    before = allocator.parameters_left()
    assert before == 4 * (16 + 15) - sum(p.numel() for p in net.parameters() if p.requires_grad)
    price = allocator.price("2", 1)
    adapters["2"].grow(1)
    assert before - allocator.parameters_left() == price == 5 + 2 * 3  # of B, L and U


@pytest.mark.parametrize("argument", ["ranks", "parameters"])
def test_scores_restart_after_the_warmup(argument):
    net, adapters = small_net()
    optimizer = adam(net)
    allocator = allocators.Allocator(adapters, optimizer, argument=argument, **GROWTH)
    train_step(net, optimizer, allocator, 1)
    assert all(allocator.scores().values())
    train_step(net, optimizer, allocator, 2)
    assert not any(allocator.scores().values())
    with pytest.raises(ValueError, match="^step 21: "):
        allocator.step(21)


@pytest.mark.parametrize("argument", ["ranks", "parameters"])
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_exact(name, argument):
    def start():
        net, adapters = small_net()
        optimizer = adam(net)
        return net, optimizer, ALLOCATORS[name](adapters, optimizer, argument=argument, **GROWTH)

    whole = start()
    for t in range(1, 20):
        train_step(*whole, t)
        if t == 9:
            saved = [adapter_state_dict(whole[0])]
            saved += [copy.deepcopy(part.state_dict()) for part in whole[1:]]
    net, optimizer, allocator = resumed = start()
    load_adapter_state_dict(net, saved[0], optimizer)
    optimizer.load_state_dict(saved[1])
    allocator.load_state_dict(saved[2])
    for t in range(10, 20):
        train_step(*resumed, t)
    expected = adapter_state_dict(whole[0])
    for key, tensor in adapter_state_dict(net).items():
        assert torch.equal(tensor, expected[key]), key
    assert allocator.scores() == whole[2].scores()
