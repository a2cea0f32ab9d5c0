"""The promises of this project, one test each: pytest -q

In order: the method, growth and the budget, misuse, saving, the model and its data, train.py,
README. Growth is tested on the smallest layers that can break it. Tests of shapes also run on the
device "meta", where a tensor that was left on the CPU raises.
"""

import ast
import copy
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import data
import train
from model import GPT, GPTConfig, generate
from triadapt import (
    ALLOCATORS,
    METHODS,
    SCHEDULES,
    LoRALinear,
    RankAllocator,
    TriAdaptLinear,
    adapter_state_dict,
    add_adapters,
    find_adapters,
    load_adapter_state_dict,
    merge_adapters,
    unpack_core,
)

HERE = Path(__file__).parent
DEVICES = ["cpu"]
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)
torch.set_num_threads(1)  # the models are tiny, so more threads only wait for each other

each_device = pytest.mark.parametrize("device", DEVICES)
each_device_and_meta = pytest.mark.parametrize("device", [*DEVICES, "meta"])


def small_net(device: str = "cpu") -> nn.Sequential:
    """Two nn.Linear of different shapes, one without bias, and an embedding that stays frozen."""
    torch.manual_seed(1)
    net = nn.Sequential()
    net.add_module("emb", nn.Embedding(11, 6))
    net.add_module("first", nn.Linear(6, 10))
    net.add_module("tanh", nn.Tanh())
    net.add_module("second", nn.Linear(10, 5, bias=False))
    return net.to(device)


def adapted(device: str = "cpu", **settings):
    """(net, adapters) that start with rank 2 of 4, if the settings do not say otherwise."""
    net = small_net(device)
    torch.manual_seed(2)
    return net, add_adapters(net, ["first", "second"], **{"rank": 4, "init_rank": 2} | settings)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def adamw(net: nn.Module, **settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained(net), lr=1e-2, weight_decay=0.0, **settings)


def loss_of(net: nn.Module, step: int = 0) -> torch.Tensor:
    ids = torch.arange(11, device=net.emb.weight.device)
    return F.cross_entropy(net(ids).float(), (ids * 3 + step) % 5)


def fit(net: nn.Module, optimizer, steps: int = 1) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def allocator_of(adapters: dict, optimizer, **settings) -> RankAllocator:
    defaults = {"total_steps": 20, "warmup": 2, "interval": 2}
    return RankAllocator(adapters, optimizer, **defaults | settings)


def many(count: int, rank: int = 2, target_rank: int = 4, **settings) -> RankAllocator:
    """An allocator of so many 3 x 3 matrices, all with a nonzero update."""
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))
    adapters = add_adapters(net, "[0-9]+", rank=target_rank, init_rank=rank)
    for adapter in adapters.values():
        nn.init.ones_(adapter.lora_B)
    return allocator_of(adapters, adamw(net), **settings)


# The method.


@each_device_and_meta
def test_parameter_count_is_the_closed_form(device):
    for growths in ([1], [3], [1, 1, 1], [2, 5], [1, 4, 2]):
        adapter = TriAdaptLinear(nn.Linear(7, 9).to(device), growths[0], 8)
        for n in growths[1:]:
            adapter.grow(n)
        r = sum(growths)
        assert adapter.rank == r
        assert sum(p.numel() for p in trained(adapter)) == r * (7 + 9) + r * (r + 1)
        assert {p.device.type for p in adapter.parameters()} == {device}
        assert adapter(torch.ones(2, 3, 7, device=device)).shape == (2, 3, 9)


@each_device
def test_output_is_the_equation(device):
    torch.manual_seed(0)
    adapter = TriAdaptLinear(nn.Linear(6, 5).to(device), 2, target_rank=8, alpha=5.6)
    adapter.grow(3)
    for p in trained(adapter):
        nn.init.normal_(p)
    L = torch.zeros(5, 5, device=device)
    U = torch.zeros(5, 5, device=device)
    entries = zip(adapter.lora_L.tolist(), adapter.lora_U.tolist(), strict=True)
    for i in range(5):
        for j in range(i + 1):
            L[i, j], U[j, i] = next(entries)  # L row by row, U column by column
    assert torch.equal(unpack_core(adapter.lora_L, adapter.lora_U, 5), L + U)
    W = adapter.base.weight + 0.7 * adapter.lora_B @ (L + U) @ adapter.lora_A
    x = torch.randn(2, 4, 6, device=device)
    torch.testing.assert_close(adapter(x), F.linear(x, W, adapter.base.bias), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.weight, W)
    assert adapter.importance().item() == pytest.approx((L + U).square().sum().item() ** 0.5 / 5)
    assert adapter(x[0, 0]).shape == (5,)
    assert adapter(x[:0]).shape == (0, 4, 5)


@each_device
def test_start_is_lora_is_the_base(device):
    ids = torch.arange(11, device=device)
    base = small_net(device)(ids)
    lora, lora_adapters = adapted(device, method="lora", init_rank=4)
    tri, tri_adapters = adapted(device, method="triadapt", init_rank=4)
    assert torch.equal(lora(ids), base)
    assert torch.equal(tri(ids), base)
    for name, adapter in tri_adapters.items():
        nn.init.normal_(adapter.lora_B)
        with torch.no_grad():
            lora_adapters[name].lora_B.copy_(adapter.lora_B)
    loss_of(lora).backward()
    loss_of(tri).backward()
    assert torch.equal(lora(ids), tri(ids))  # with equal B they are still one function
    for name, p in lora.named_parameters():
        assert "lora_" not in name or torch.equal(p.grad, tri.get_parameter(name).grad)


@each_device
@pytest.mark.parametrize("method", METHODS)
def test_dropout_in_training_only_and_merging(device, method):
    net, _ = adapted(device, method=method, dropout=0.5)
    fit(net, adamw(net), 20)
    ids = torch.arange(11, device=device)
    assert not torch.equal(net.train()(ids), net(ids))
    before = net.eval()(ids)
    assert torch.equal(net(ids), before)
    merge_adapters(net)
    assert type(net.first) is nn.Linear
    assert (net(ids) - before).norm() <= 1e-5 * before.norm()
    add_adapters(net, ["first"], dropout=0.5)  # on a model in eval(), whose adapters are as well
    assert torch.equal(net(ids), net(ids)) and not net.first.training


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_keeps_float32_adapters(device, dtype):
    net = small_net(device).to(dtype)
    torch.set_default_dtype(dtype)
    try:
        adapters = add_adapters(net, ["first", "second"], rank=4, init_rank=2)
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer = adamw(net)
    before = loss_of(net).item()
    for step in range(40):
        fit(net, optimizer)
        if step == 5:
            adapters["first"].grow(2, optimizer)
    assert loss_of(net).item() < 0.8 * before
    assert {p.dtype for p in trained(net)} == {torch.float32}
    assert merge_adapters(net).first.weight.dtype == dtype


def test_shared_layers_and_weights():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["c"] = net["a"]  # one layer, two names
    net["b"].weight = net["a"].weight
    x = torch.ones(4)
    shared = net["b"](x)
    assert [*add_adapters(net, ["a"], rank=2)] == ["a"]
    assert net["c"] is net["a"]
    nn.init.ones_(net["a"].lora_B)
    expected = net["c"](x)
    merge_adapters(net)
    assert net["c"] is net["a"]
    torch.testing.assert_close(net["a"](x), expected)
    assert torch.equal(net["b"](x), shared)  # merging left the shared weight as it was


def test_targets_are_names_or_a_pattern():
    def names(targets):
        return [*add_adapters(GPT(GPTConfig(16, 8, 2, 1, 4)), targets, rank=1)]

    assert names(["q"]) == ["blocks.0.q", "blocks.1.q"]
    assert names(["v", "1.q"]) == ["blocks.0.v", "blocks.1.q", "blocks.1.v"]  # module order
    assert names("fc|proj") == ["blocks.0.fc", "blocks.0.proj", "blocks.1.fc", "blocks.1.proj"]
    assert names(r"blocks\.0\.(q|o)") == ["blocks.0.q", "blocks.0.o"]


def test_attention_reads_the_adapted_weight():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    add_adapters(layer, ["out_proj", "linear1"], rank=2)
    x = torch.randn(1, 3, 8)
    before = layer(x)
    for adapter in find_adapters(layer).values():
        nn.init.normal_(adapter.lora_B)
    changed = layer(x)
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(layer.eval()(x), changed)  # also on torch's path for evaluation
    torch.testing.assert_close(merge_adapters(layer)(x), changed)


# Growth.


def corner(grown: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The entries of a grown tensor in the places of the old ones."""
    return grown[tuple(slice(size) for size in old.shape)]


@each_device
def test_growth_keeps_output_entries_and_moments(device):
    net, adapters = adapted(device)
    optimizer = torch.optim.AdamW([{"params": trained(a)} for a in adapters.values()], lr=1e-2)
    ids = torch.arange(11, device=device)
    for _ in range(3):
        fit(net, optimizer, 10)
        output = net(ids)
        held = trained(net)
        before = copy.deepcopy([(p.detach(), optimizer.state[p], p.grad) for p in held])
        for adapter in adapters.values():
            adapter.grow(2, optimizer)
        assert (net(ids) - output).norm() <= 1e-5 * output.norm()
        for p, (entries, state, grad) in zip(trained(net), before, strict=True):
            assert p.numel() > entries.numel()
            assert torch.equal(corner(p, entries), entries)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(corner(optimizer.state[p][key], state[key]), state[key])
            assert torch.equal(corner(p.grad, grad), grad)  # between two micro-batches
            assert p.grad.count_nonzero() == grad.count_nonzero()
        for group, adapter in zip(optimizer.param_groups, adapters.values(), strict=True):
            assert group["params"] == trained(adapter)
        assert {*optimizer.state} == {*trained(net)}


@each_device
def test_new_entries_learn_within_two_steps(device):
    net, adapters = adapted(device)
    optimizer = adamw(net)
    fit(net, optimizer, 25)
    for adapter in adapters.values():
        adapter.grow(2, optimizer)
    fit(net, optimizer, 2)
    for p in trained(net):
        assert optimizer.state[p]["exp_avg"].all()
    frozen = {n.replace("base.", ""): p for n, p in net.named_parameters() if "lora_" not in n}
    for name, p in small_net(device).named_parameters():
        assert torch.equal(frozen[name], p)
        assert frozen[name].grad is None and not frozen[name].requires_grad


@each_device
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.999)])
def test_new_entries_start_at_a_tenth_of_the_rate(device, betas):
    net, adapters = adapted(device)
    optimizer = adamw(net, betas=betas)
    fit(net, optimizer, 400)
    mean = optimizer.state[adapters["first"].lora_B]["exp_avg_sq"].mean()
    adapters["first"].grow(1, optimizer)
    B = adapters["first"].lora_B  # (10, 3), and its last column is new
    state = optimizer.state[B]
    assert not state["exp_avg"][:, 2].any()
    torch.testing.assert_close(state["exp_avg_sq"][:, 2], mean.expand(10))

    size = (mean / (1 - betas[1] ** state["step"])).sqrt().item()  # of the gradients that Adam saw
    speeds = []
    for _ in range(60):
        for p in trained(net):
            p.grad = torch.full_like(p, size)
        before = B.detach().clone()
        optimizer.step()
        speeds.append((B.detach() - before)[:, 2].abs().max().item() / 1e-2)
    assert speeds[:2] == pytest.approx([0.1, 0.19], rel=0.01)
    assert speeds == sorted(speeds) and 0.99 < speeds[-1] <= 1.001


def test_other_optimizers_grow():
    for make in (
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.RMSprop(params),
        lambda params: torch.optim.Adam(params, amsgrad=True),
    ):
        net, adapters = adapted()
        allocator = allocator_of(adapters, make(trained(net)))
        for t in range(1, 21):
            fit(net, allocator.optimizer)
            allocator.step(t)
        assert allocator.total_rank == allocator.budget == 8
        assert all(p.isfinite().all() for p in trained(net))


# The budget.


def test_budget_is_reached_never_exceeded_and_planned():
    rng = random.Random(0)
    reached = 0
    for _ in range(150):
        allocator = many(
            count=rng.randint(1, 7),
            rank=rng.randint(1, 3),
            target_rank=rng.randint(4, 8),
            total_steps=rng.randint(49, 80),
            warmup=rng.randint(0, 9),
            interval=rng.randint(1, 5),
            schedule=rng.choice([*SCHEDULES]),
            rank_step=rng.randint(1, 5),
            top_k=rng.randint(1, 9),
        )
        adapters = allocator.adapters
        allocator.scores = lambda names=adapters: {name: rng.randint(0, 2) for name in names}
        plan = allocator.plan()
        seen = []
        for t in range(1, allocator.total_steps + 1):
            if allocator.step(t):
                seen.append((t, allocator.total_rank))
        assert seen == plan
        assert allocator.total_rank <= allocator.budget
        reached += allocator.total_rank == allocator.budget
    assert reached > 100


@pytest.mark.parametrize("rank_step", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_k_follows_the_formulas(schedule, rank_step):
    settings = {"total_steps": 310, "warmup": 10, "interval": 10, "top_k": 7}
    allocator = many(50, 4, 8, schedule=schedule, rank_step=rank_step, **settings)
    for t in range(311):
        for Q in (200, 137, 50, 2, 1, 0):
            k = 0
            if t > 10 and t % 10 == 0 and Q > 0:
                formula = {
                    "linear": Q * (t - 10) // 300,
                    "exponential": math.floor(round(Q ** ((t - 10) / 300), 9)),
                    "fixed": 7,
                }
                k = min(max(formula[schedule], 1), 50, math.ceil(Q / rank_step))
            assert allocator.count(t, Q) == k, (t, Q)


def test_the_k_highest_scores_grow_ties_in_order():
    allocator = many(5, schedule="fixed", warmup=0, interval=1, top_k=3)
    adapters = allocator.adapters.values()
    allocator.scores = lambda: {"0": 1.0, "1": 1.0, "2": 1.0, "3": 5.0, "4": 2.0}
    assert allocator.step(1) == ["3", "4", "0"]
    assert [adapter.rank for adapter in adapters] == [3, 2, 2, 3, 3]
    assert allocator.threshold == 1.0
    assert allocator.last_scores == allocator.scores()
    allocator.scores = lambda: {"0": -4.0, "1": -1.0, "2": -2.0, "3": -1.0, "4": -1.0}
    assert allocator.step(2) == ["1", "3", "4"]
    assert allocator.threshold == -1.0
    allocator.scores = lambda: {"0": 1.0, "1": math.nan, "2": 1.0, "3": 1.0, "4": 1.0}
    with pytest.raises(ValueError, match="score is not a number: .*'1': nan"):
        allocator.step(3)
    assert [adapter.rank for adapter in adapters] == [3, 3, 2, 4, 4]


def test_the_score_is_the_change_of_importance():
    allocator = many(2, target_rank=3, warmup=3, interval=3)
    first, second = allocator.adapters.values()
    with torch.no_grad():
        first.lora_L[0] = 9.0
        assert allocator.scores()["0"] > 1
        assert allocator.step(3) == []  # the end of the warm-up: earlier changes do not count
        assert allocator.scores() == {"0": 0.0, "1": 0.0}
        second.lora_L[0] += 1.0
    assert allocator.scores()["1"] == pytest.approx((math.hypot(2, 1) - math.hypot(1, 1)) / 2)
    assert allocator.step(6) == ["1"]
    assert allocator.scores() == {"0": 0.0, "1": 0.0}  # growth moved F, but not the score


# (step, the matrices that grow, highest score first) of 5 matrices, from the second edition of this
# code, commit 74e25e1.
SECOND_EDITION = {
    "linear": "12 1, 18 04, 24 31, 30 02, 36 3, 42 4, 48 4",
    "exponential": "12 1, 18 0, 24 31, 30 02, 36 32, 42 4, 48 4",
    "fixed": "12 10, 18 41, 24 31, 30 32, 36 23",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decisions_are_those_of_the_second_edition(schedule):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)))
    x, y = torch.randn(2, 32, 8)
    adapters = add_adapters(net, ["0"], rank=4, init_rank=2)
    settings = {"total_steps": 60, "warmup": 6, "interval": 6, "top_k": 2}
    allocator = allocator_of(adapters, adamw(net), schedule=schedule, **settings)
    decisions = []
    for t in range(1, 61):
        allocator.optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        allocator.optimizer.step()
        torch.manual_seed(t)
        grown = allocator.step(t)
        if grown:
            decisions.append(f"{t} {''.join(name[0] for name in grown)}")
    assert ", ".join(decisions) == SECOND_EDITION[schedule]


def test_untrained_matrices_never_grow():
    net = small_net()
    net.tanh.unused = nn.Linear(3, 3)  # nothing calls it
    adapters = add_adapters(net, ["first", "unused", "second"], rank=4, init_rank=2)
    allocator = allocator_of(adapters, torch.optim.AdamW(trained(net), weight_decay=0.1))
    allocator.scores = lambda: {"first": -1.0, "second": -2.0, "tanh.unused": 0.0}
    for t in range(1, 21):
        fit(net, allocator.optimizer)
        allocator.step(t)
    assert adapters["tanh.unused"].rank == 2
    assert allocator.total_rank == allocator.budget == 12


def test_plain_lora_grows_without_importance():
    class InTurn(RankAllocator):
        def scores(self):
            return {name: -adapter.rank for name, adapter in self.adapters.items()}

    net, adapters = adapted(method="lora")
    allocator = InTurn(adapters, adamw(net), total_steps=20, warmup=0, interval=1)
    assert allocator.importances() == {}
    for t in range(1, 21):
        fit(net, allocator.optimizer)
        allocator.step(t)
    assert [adapter.rank for adapter in adapters.values()] == [4, 4]
    net, adapters = adapted(method="lora")
    with pytest.raises(ValueError, match="no importance"):
        allocator_of(adapters, adamw(net))


# Misuse that would give a wrong result without a word.


def test_settings_under_which_nothing_grows_are_refused():
    net, adapters = adapted(init_rank=4)
    with pytest.raises(ValueError, match="nothing can grow: total rank 8 of 8"):
        allocator_of(adapters, adamw(net))
    for settings in ({"warmup": 20}, {"warmup": 10, "interval": 11}):
        net, adapters = adapted()
        with pytest.raises(ValueError, match="nothing can grow"):
            allocator_of(adapters, adamw(net), **settings)


def test_steps_are_counted_from_one():
    net, adapters = adapted()
    allocator = allocator_of(adapters, adamw(net))
    for t in (0, 21):
        with pytest.raises(ValueError, match=f"step {t}: must be from 1 to total_steps, 20"):
            allocator.step(t)


def test_growth_before_any_training_is_refused():
    net, adapters = adapted()
    allocator = allocator_of(adapters, adamw(net))
    with pytest.raises(ValueError, match="no matrix has been trained: .*after optimizer.step"):
        allocator.step(4)
    assert allocator.total_rank == 4


def test_adapters_that_are_not_float32_are_refused():
    net, adapters = adapted()
    net.bfloat16()
    with pytest.raises(ValueError, match="first.lora_B is torch.bfloat16: .*before add_adapters"):
        allocator_of(adapters, adamw(net))
    net, adapters = adapted()
    allocator = allocator_of(adapters, adamw(net))
    net.half()
    with pytest.raises(ValueError, match="torch.float16"):
        allocator.step(4)


def test_an_optimizer_that_lacks_adapters_is_refused():
    net = small_net()
    net.requires_grad_(True)
    optimizer = adamw(net)
    adapters = add_adapters(net, ["first", "second"], rank=4, init_rank=2)
    with pytest.raises(ValueError, match="AdamW lacks first.lora_B: create it after the adapters"):
        allocator_of(adapters, optimizer)
    for p in adapters["second"].parameters():
        p.requires_grad_(False)  # frozen ones need no optimizer
    allocator = allocator_of(adapters, torch.optim.AdamW(trained(adapters["first"])))
    adapters["first"].start(2)
    with pytest.raises(ValueError, match="lacks first.lora_B"):
        allocator.step(4)


class ScheduleFree(torch.optim.AdamW):
    """Like that of the package schedulefree, it keeps a second copy of the weights, z."""

    def step(self, closure=None):
        super().step()
        for p in self.state:
            self.state[p]["z"] = p.detach().clone()


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS, ScheduleFree])
def test_optimizers_with_other_state_are_refused(kind):
    net, adapters = adapted()
    optimizer = kind(trained(net))
    allocator = allocator_of(adapters, optimizer)
    loss_of(net).backward()
    optimizer.step(lambda: loss_of(net))
    with pytest.raises(ValueError, match=f"optimizer {kind.__name__}: .* cannot grow, use AdamW"):
        allocator.step(4)
    assert allocator.total_rank == 4
    assert optimizer.param_groups[0]["params"] == trained(net)


def test_state_of_another_shape_is_refused():
    net, adapters = adapted()
    optimizer = adamw(net)
    fit(net, optimizer)
    other_net, other_adapters = adapted(init_rank=3)
    other = adamw(other_net)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="AdamW: 'exp_avg' of first.lora_B cannot grow"):
        allocator_of(other_adapters, other)


def test_wrappers_of_optimizers():
    class Wrapper:
        def __init__(self, optimizer, state):
            self.optimizer, self.state = optimizer, state
            self.param_groups = optimizer.param_groups

    net, adapters = adapted()
    optimizer = adamw(net)
    allocator_of(adapters, Wrapper(optimizer, optimizer.state))  # like accelerate's
    with pytest.raises(ValueError, match="Wrapper wraps another one"):
        allocator_of(adapters, Wrapper(optimizer, {}))


def test_a_sharded_tensor_cannot_grow():
    net, adapters = adapted()
    adapters["first"].lora_L = nn.Parameter(adapters["first"].lora_L.detach()[:2])
    with pytest.raises(ValueError, match=r"lora_L has shape \(2,\) instead of 3 .*sharded"):
        adapters["first"].grow(1)


def test_mistakes_in_add_adapters_are_named():
    net = small_net()
    for settings, words in [
        (("third",), "target module third: not found; linear layers are first, second"),
        ((["first", "irst"],), "target module irst: not found"),
        (("first", "lora", 4, 5), "init_rank 5: must be from 1 to the rank, 4"),
        (("first", "lora", 4, 0), "init_rank 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            add_adapters(net, *settings)
        assert not find_adapters(net) and net.first.weight.requires_grad
    add_adapters(net, "first")
    with pytest.raises(ValueError, match="has adapters already: call merge_adapters first"):
        add_adapters(net, "second")


class Clipped(nn.Linear):
    """A layer that computes more than W x + b."""

    def forward(self, x):
        return super().forward(x).relu()


def computed(layer: nn.Linear, kind: str) -> nn.Module:
    """A layer that computes its weight, or more than W x + b."""
    if kind == "weight_norm":
        return parametrizations.weight_norm(layer)
    if kind == "hook":
        layer.register_forward_hook(lambda module, inputs, output: output.relu())
    elif kind == "packed":
        layer.weight = type("Packed", (nn.Parameter,), {})(layer.weight.detach())
    elif kind == "forward":
        layer.forward = lambda x: x
    else:
        return Clipped(layer.in_features, layer.out_features)
    return layer


@pytest.mark.parametrize("kind", ["weight_norm", "hook", "packed", "forward", "subclass"])
def test_layers_that_cannot_be_merged_are_named(kind):
    net = small_net()
    net.second = computed(net.second, kind)
    add_adapters(net, ["first", "second"])
    with pytest.raises(ValueError, match="second: cannot be merged"):
        merge_adapters(net)
    assert [*find_adapters(net)] == ["first", "second"]  # nothing was changed
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_adapters(small_net())


# Saving and loading.


@pytest.mark.parametrize("settings", [{"rank": 16}, {"alpha": 99}, {"init_rank": 1}])
def test_loading_restores_rank_scale_and_target(settings):
    net, adapters = adapted()
    optimizer = adamw(net)
    fit(net, optimizer, 5)
    adapters["first"].grow(1, optimizer)
    fit(net, optimizer, 5)
    state = adapter_state_dict(net)
    kept = {name: tensor.clone() for name, tensor in state.items()}

    fresh, adapters = adapted(**{"init_rank": 4} | settings)
    optimizer = adamw(fresh)
    load_adapter_state_dict(fresh, state, optimizer)
    assert torch.equal(loss_of(fresh), loss_of(net))
    assert [(a.rank, a.target_rank, a.scale) for a in adapters.values()] == [(3, 4, 4), (2, 4, 4)]
    assert sorted(map(id, optimizer.param_groups[0]["params"])) == sorted(map(id, trained(fresh)))
    assert allocator_of(adapters, optimizer).budget == 8
    fit(fresh, optimizer, 3)
    assert all(torch.equal(state[name], kept[name]) for name in kept)  # these are copies


def test_plain_load_state_dict_reports_other_ranks():
    net, _ = adapted(alpha=99)
    same, adapters = adapted()
    same.load_state_dict(net.state_dict())
    assert adapters["first"].scale == 99 / 4
    with pytest.raises(RuntimeError, match="size mismatch for first.lora_B"):
        adapted(init_rank=3)[0].load_state_dict(net.state_dict())


def test_loading_into_another_model_is_refused():
    state = adapter_state_dict(adapted()[0])
    with pytest.raises(ValueError, match="first.lora_L is only in model or state"):
        load_adapter_state_dict(adapted(method="lora")[0], state)
    with pytest.raises(ValueError, match="use the same base and targets"):
        load_adapter_state_dict(small_net(), state)


def test_statistics_and_other_trained_parameters_are_saved():
    def make():
        net, _ = adapted()
        net.add_module("norm", nn.BatchNorm1d(5))
        return net

    net = make()
    fit(net, adamw(net), 5)
    fresh = make()
    load_adapter_state_dict(fresh, adapter_state_dict(net))
    assert torch.equal(fresh.norm.running_mean, net.norm.running_mean)
    assert torch.equal(fresh.norm.weight, net.norm.weight)
    assert not any("base.weight" in name for name in adapter_state_dict(net))


def test_an_allocator_knows_the_ranks_of_its_state():
    net, adapters = adapted()
    allocator = allocator_of(adapters, adamw(net))
    for t in range(1, 6):
        fit(net, allocator.optimizer)
        allocator.step(t)
    fresh, adapters = adapted()
    other = allocator_of(adapters, adamw(fresh))
    with pytest.raises(ValueError, match="load the adapters before the allocator's state"):
        other.load_state_dict(allocator.state_dict())
    fresh, adapters = adapted()
    other = allocator_of(adapters, adamw(fresh))
    load_adapter_state_dict(fresh, adapter_state_dict(net), other.optimizer)
    with pytest.raises(ValueError, match="the ranks changed"):
        other.step(6)  # without the allocator's state
    other.load_state_dict(json.loads(json.dumps(allocator.state_dict())))
    assert other.scores() == allocator.scores()


# The model and its data.


@each_device
def test_gpt_is_causal_and_follows_its_seed(device):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(50, 16, 2, 2, 8)).to(device)
    ids = torch.randint(50, (3, 16), device=device)
    changed = ids.clone()
    changed[:, 9:] = 0
    torch.testing.assert_close(gpt(ids)[:, :9], gpt(changed)[:, :9])
    assert not torch.allclose(gpt(ids)[:, 9:], gpt(changed)[:, 9:])
    one, again, other = (generate(gpt, [1, 2], length=40, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    assert one[:2] == [1, 2] and len(one) == 42  # longer than the context


def test_gpt_computes_shapes_on_meta():
    gpt = GPT(GPTConfig(50, 16, 2, 2, 8)).to("meta")
    add_adapters(gpt, "q|k|v|o|fc|proj", rank=4, init_rank=2)
    for adapter in find_adapters(gpt).values():
        adapter.grow(1)
    assert gpt(torch.zeros(3, 7, dtype=torch.long, device="meta")).shape == (3, 7, 50)


def test_the_corpora_are_there():
    code = data.open_task("code").texts
    assert 5e6 < sum(map(len, code)) < 2e7 and len(code) > 300
    paragraphs = "\n\n".join(data.open_task("prose").texts).split("\n\n")
    assert len(paragraphs) == len({*paragraphs})  # a repeated one could leak into the test split
    assert sum(map(len, paragraphs)) > 2e5


def test_documents_stay_in_one_split(home):
    task = data.open_task("text.txt")
    assert "".join(task.texts) == Path("text.txt").read_text(encoding="utf-8")
    tokenizer = train.open_base("tiny.pt")[1]
    examples = task.examples(tokenizer, 16)
    x, y = data.batch(examples["train"], [0, 5, 17, 2])
    assert x.shape == (4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert len(examples["train"]) == len(examples["train"].tokens) - 16  # from any token on

    tokens = examples["val"].tokens
    read = data.batch(examples["val"], range(len(examples["val"])))[1].flatten()
    assert torch.equal(read, tokens[1 : len(read) + 1].long())  # each token once
    assert len(tokens) - len(read) <= 16
    ids = torch.cat([windows.tokens for windows in examples.values()]).tolist()
    pieces = tokenizer.decode(ids, skip_special_tokens=False).split(data.END_OF_TEXT)
    assert sorted(pieces) == sorted([*task.texts, ""])  # each of them is closed


def test_padding_does_not_leak():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(50, 16, 2, 2, 16))
    examples = [(torch.arange(n), torch.full((n,), data.NO_TARGET)) for n in (3, 9, 5)]
    for inputs, targets in examples:
        targets[-1] = inputs[-1] + 1
    inputs, targets = data.batch(examples, range(3))
    assert inputs.shape == targets.shape == (3, 9)
    together = data.Task("", []).loss(gpt(inputs), targets)
    alone = [F.cross_entropy(gpt(x[None])[0, -1:], y[-1:]) for x, y in examples]
    torch.testing.assert_close(together, sum(alone))


# train.py.

TINY = "--base tiny.pt --device cpu --data text.txt --steps 16 --batch-size 4 --eval-interval 8"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a text and a tiny base."""
    folder = tmp_path_factory.mktemp("home")
    words = random.Random(0).choices(["grow", "rank", "über", "core", "norm,\n", "if"], k=3000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([" ".join(words)], 300)
    gpt = GPT(GPTConfig(300, 16, 1, 2, 16))
    train.save_file(folder / "tiny.pt", train.base_file(gpt, tokenizer))
    return folder


@pytest.fixture
def home(folder, tmp_path, monkeypatch):
    """An empty working folder with copies of these files."""
    for name in ("text.txt", "tiny.pt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tmp_path


def run(line: str) -> train.Run:
    """train.py with these options."""
    return train.main(line.split())


def refusal(line: str, capsys) -> str:
    """The line that train.py ends with, at exit code 2, below its usage."""
    with pytest.raises(SystemExit, match="^2$"):
        run(line)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("usage: python train.py")
    return lines[1]


def read_log(folder: str) -> list[dict]:
    lines = Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]  # no NaN


def test_a_run_writes_log_adapter_and_figure(home):
    finished = run(f"{TINY} --rank 4 --out out")
    files = {"log.jsonl", "adapter.pt", "checkpoint.pt", "run.png"}
    assert {path.name for path in Path("out").iterdir()} == files
    assert Path("out/run.png").read_bytes().startswith(b"\x89PNG")
    log = read_log("out")
    assert [e["kind"] for e in log if e["kind"] != "allocation"] == ["start", "eval", "eval", "end"]
    start, end = log[0], log[-1]
    assert start["settings"] == finished.log[0]["settings"]
    assert start["settings"]["target_modules"] == "q|k|v|o|fc|proj"
    assert start["settings"]["interval"] == 1 and start["settings"]["init_rank"] == 2
    assert start["versions"]["torch"] == torch.__version__
    assert start["command"] == "train.py" and start["device"] == "cpu"
    assert start["trainable"] == 2 * (4 * (16 + 16) + 2 * (16 + 64)) + 6 * 2 * 3
    assert start["total_rank"] == 12 and end["total_rank"] == start["budget"] == 24
    assert end["test_loss"] < start["test_loss"] - 0.03
    for entry in log:
        if entry["kind"] == "eval":
            for name in ("lr", "grad_norm", "train_loss", "val_loss", "trainable", "seconds"):
                assert entry[name] > 0
            assert entry["tokens_per_second"] > 0
            assert len(entry["ranks"]) == len(entry["importance"]) == 6
        elif entry["kind"] == "allocation":
            assert len(entry["scores"]) == 6
            assert all(entry["scores"][name] >= entry["threshold"] for name in entry["grown"])
    saved = torch.load("out/adapter.pt")
    assert saved["settings"]["rank"] == 4
    shapes = {name: len(saved["adapter"][f"{name}.lora_A"]) for name in end["ranks"]}
    assert shapes == end["ranks"]


def test_the_console_is_short(home, capsys):
    run("--base tiny.pt --data text.txt --steps 20 --out out")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if re.match(r"step .* rank .* s left$", line)]) == 10
    assert lines[-1] == f"look at  {Path('out/run.png')}"


@pytest.mark.parametrize(
    "options",
    ["--method full", "--method lora", "--schedule none"] + [f"--schedule {s}" for s in SCHEDULES],
)
def test_every_method_and_schedule_learns(home, options):
    finished = run(f"{TINY} {options}")
    assert finished.log[-1]["test_loss"] < finished.log[0]["test_loss"] - 0.03
    assert finished.log[-1]["total_rank"] == 8 * len(finished.adapters)
    assert Path(finished.args.out, "run.png").exists()


def test_two_equal_runs_give_equal_bits(home):
    run(f"{TINY} --out a")
    run(f"{TINY} --out b")
    assert_equal_bits("a", "b")


def assert_equal_bits(one: str, other: str) -> None:
    """All that two runs computed is equal, apart from times and folders."""
    a, b = (torch.load(Path(out, "checkpoint.pt")) for out in (one, other))
    for entry in a["log"] + b["log"]:
        for name in ("settings", "seconds", "tokens_per_second"):
            entry.pop(name, None)
    for part in ("trained", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert a["log"] == b["log"]
    assert a["allocator"] == b["allocator"]


def interrupt(monkeypatch, step: int) -> None:
    """Ctrl-C within a step."""
    rate = train.learning_rate

    def interrupted(t, *settings):
        if t == step:
            raise KeyboardInterrupt
        return rate(t, *settings)

    monkeypatch.setattr(train, "learning_rate", interrupted)


@pytest.mark.parametrize(
    "options, step",
    [
        ("--dropout 0.1", 12),
        ("--rank-step 2 --schedule fixed --interval 3", 1),
        ("--method full", 11),
        ("--method lora", 16),
        ("--base scratch --seed 3", 9),
    ],
)
def test_resume_is_bit_exact(home, monkeypatch, capsys, options, step):
    run(f"{TINY} {options} --out whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        interrupt(patch, step)
        run(f"{TINY} {options} --out cut")
    assert "to continue: python train.py --resume cut" in capsys.readouterr().out
    assert torch.load("cut/checkpoint.pt")["step"] == (step - 1) // 8 * 8
    Path("cut").rename("moved")
    run("--resume moved")
    assert_equal_bits("whole", "moved")
    assert not Path("cut").exists()
    before = Path("moved/log.jsonl").read_bytes()
    run("--resume moved")
    assert "moved is finished already" in capsys.readouterr().out
    assert Path("moved/log.jsonl").read_bytes() == before


def test_resume_refuses_other_settings_data_and_base(home, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        interrupt(patch, 10)
        run(f"{TINY} --out out")
    assert "lr 0.5: the run to resume has 0.01" in refusal("--resume out --lr 0.5", capsys)
    assert "No such file" in refusal("--resume nowhere", capsys)
    for name in ("text.txt", "tiny.pt"):
        content = Path(name).read_bytes()
        if name == "text.txt":
            Path(name).write_bytes(content.replace(b"rank", b"rink", 1))
        else:
            base = torch.load(name)
            base["model"]["wte.weight"][3, 3] += 1e-3
            torch.save(base, name)
        assert "the data or the base changed since then" in refusal("--resume out", capsys)
        Path(name).write_bytes(content)
    run("--resume out --lr 0.01")
    assert read_log("out")[-1]["kind"] == "end"


def test_no_run_is_overwritten(home, capsys):
    first, second = run(f"{TINY} --steps 2"), run(f"{TINY} --steps 2 --seed 1")
    names = ["runs/triadapt-linear-1", "runs/triadapt-linear-2"]
    assert [first.args.out, second.args.out] == [str(Path(name)) for name in names]
    assert read_log(names[0])[0]["settings"]["seed"] == 0
    line = refusal(f"{TINY} --out {names[0]}", capsys)
    assert "not empty; give a new folder, or --resume" in line


def test_files_are_replaced_whole(home, monkeypatch):
    train.save_file(Path("a.pt"), {"x": torch.ones(2)})
    before = Path("a.pt").read_bytes()

    def disk_full(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="disk full"):
        train.save_file(Path("a.pt"), {})
    assert Path("a.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(home):
    with pytest.raises(SystemExit, match="^the loss is nan after step .: give a lower --lr$"):
        run(f"{TINY} --method full --lr 1e30 --eval-interval 1 --out out")
    assert torch.load("out/checkpoint.pt")["step"] >= 0
    read_log("out")


@pytest.mark.parametrize(
    "options, words",
    [
        ("--data nothing.txt", "--data nothing.txt: not a file, and not one of prose, code"),
        ("--data tiny.pt", "data tiny.pt: not UTF-8 text"),
        ("--data short.txt", "more text, or a --context below"),
        ("--base nothing.pt", "--base nothing.pt: not a file, and not one of scratch"),
        ("--base runs/adapter.pt", "holds no model; give the model.pt of --method full"),
        ("--context 17", "--context 17: this base allows 16"),
        ("--target-modules qq", "target module qq: not found; linear layers are q, k, v"),
        ("--init-rank 9", "init_rank 9: must be from 1 to the rank, 8"),
        ("--rank 1", "nothing can grow: total rank 6 of 6"),
        ("--method lora --schedule linear", "no importance: use the method triadapt"),
        ("--allocator best", "--allocator best: must be one of importance"),
        ("--method full --schedule linear", "nothing can grow"),
        ("--schedule quadratic", "invalid choice: 'quadratic'"),
    ],
)
def test_a_mistake_ends_in_one_line(home, capsys, options, words):
    Path("short.txt").write_text("short", encoding="utf-8")
    Path("runs").mkdir()
    train.save_file(Path("runs/adapter.pt"), {})
    assert words in refusal(f"{TINY} --out out {options}", capsys)
    assert not Path("out").exists()


def test_a_fork_adds_settings_allocators_and_bases(home, monkeypatch, capsys):
    class Chosen(RankAllocator):
        argument: str = ""

        def __init__(self, adapters, optimizer, argument, **settings):
            super().__init__(adapters, optimizer, **settings)
            self.argument = argument

        def scores(self):
            return {name: float(name.endswith(self.argument)) for name in self.adapters}

    class LoRAPlus(LoRALinear):
        LR_RATIOS = {"lora_B": 16.0}

    monkeypatch.setitem(ALLOCATORS, "chosen", Chosen)
    monkeypatch.setitem(METHODS, "lora+", LoRAPlus)
    parser = train.make_parser("python fork.py")
    parser.add_argument("--note", default="none")
    options = f"{TINY} --method lora+ --allocator chosen:proj --top-k 1 --note hello --out out"
    run_of_fork = train.main(options.split(), parser=parser)
    ranks = run_of_fork.log[-1]["ranks"]
    assert max(ranks, key=ranks.get) == "blocks.0.proj"
    assert run_of_fork.log[0]["settings"]["note"] == "hello"
    rates = {p: g["lr"] for g in run_of_fork.optimizer.param_groups for p in g["params"]}
    for adapter in run_of_fork.adapters.values():  # before and after growth
        assert rates[adapter.lora_B] == pytest.approx(16 * rates[adapter.lora_A])
    with pytest.raises(SystemExit):
        train.main(["--resume", "out", "--note", "bye"], parser=parser)
    assert "note bye: the run to resume has hello" in capsys.readouterr().err


def test_scratch_and_full_training_make_a_base(home):
    run(f"{TINY} --base scratch --context 16 --method full --out base")
    assert "adapter.pt" not in os.listdir("base")
    finished = run(f"{TINY} --base base/model.pt --context 16 --out out")
    assert finished.log[0]["test_loss"] == pytest.approx(read_log("base")[-1]["test_loss"])


def test_the_learning_rate_rises_and_falls():
    curve = [train.learning_rate(step, 100, 1.0) for step in range(1, 101)]
    assert curve[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert curve[2:] == sorted(curve[2:], reverse=True)
    assert curve[-1] == pytest.approx(0.1)


def test_a_tilde_is_the_home_folder(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home / "me"))
    monkeypatch.setenv("USERPROFILE", str(home / "me"))
    Path("me").mkdir()
    Path("text.txt").rename("me/text.txt")
    run(f"{TINY} --steps 2 --data ~/text.txt --out=~/runs/x")
    assert Path("me/runs/x/run.png").exists() and not Path("~").exists()


def test_a_run_works_in_a_thread(home):
    thread = threading.Thread(target=run, args=[f"{TINY} --steps 2 --out out"])
    thread.start()
    thread.join()
    assert Path("out/run.png").exists()


def test_the_command_runs_from_any_folder(home):
    # base.pt lies next to train.py. The notebook's backend is not installed, and the locale is C.
    odd = {"MPLBACKEND": "module://not_installed", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, HERE / "train.py", *"--data text.txt --steps 2 --out out".split()]
    command += ["--context", "16"]
    done = subprocess.run(command, env=os.environ | odd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("out/run.png").exists()
    assert "from base.pt" in done.stdout


def test_the_core_imports_what_the_card_allows():
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "tokenizers"}
    own = {"train.py": {"data", "model", "triadapt", "plots.run"}}
    for name in ("triadapt.py", "model.py", "data.py", "train.py"):
        for node in ast.walk(ast.parse((HERE / name).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                assert module.partition(".")[0] in allowed or module in own.get(name, ()), name
