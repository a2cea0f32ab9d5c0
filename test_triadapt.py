"""The promises of this project, one test each: pytest -q

In order: the method, growth and the budget, misuse, saving, the model and its data, train.py,
README. Growth is tested on the smallest layers that can break it. Tests of shapes also run on the
device "meta", where a tensor that was left on the CPU raises.
"""

import copy
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import data
import train
from model import GPT, GPTConfig
from triadapt import (
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
    return RankAllocator(
        adapters, optimizer, **{"total_steps": 20, "warmup": 2, "interval": 2} | settings
    )


def step_to(allocator: RankAllocator, t: int) -> list[str]:
    """All steps before t, and then step t."""
    for earlier in range(allocator.last_step + 1, t):
        allocator.step(earlier)
    return allocator.step(t)


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
    adapters = add_adapters(net, ["first", "second"], rank=4, init_rank=2)
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
@pytest.mark.parametrize("beta2", [0.99, 0.999])
def test_new_entries_start_at_a_tenth_of_the_rate(device, beta2):
    net, adapters = adapted(device)
    optimizer = adamw(net, betas=(0.9, beta2))
    fit(net, optimizer, 400)
    mean = optimizer.state[adapters["first"].lora_B]["exp_avg_sq"].mean()
    adapters["first"].grow(1, optimizer)
    B = adapters["first"].lora_B  # (10, 3), and its last column is new
    size = (mean / (1 - beta2 ** optimizer.state[B]["step"])).sqrt().item()  # that Adam saw
    moves = []
    for _ in range(60):
        B.grad = torch.full_like(B, size)
        before = B.detach().clone()
        optimizer.step()
        moves.append((B.detach() - before)[:, 2].abs().max().item() / 1e-2)
    assert moves[:2] == pytest.approx([0.1, 0.19], rel=0.01)
    assert moves == sorted(moves) and 0.99 < moves[-1] <= 1.001


# The budget.


def test_budget_is_reached_never_exceeded_and_planned():
    rng = random.Random(0)
    reached = 0
    for _ in range(150):
        ranges = {"count": (1, 7), "rank": (1, 3), "target_rank": (4, 8), "total_steps": (49, 80)}
        ranges |= {"warmup": (0, 9), "interval": (1, 5), "rank_step": (1, 5), "top_k": (1, 9)}
        settings = {name: rng.randint(*limits) for name, limits in ranges.items()}
        allocator = many(schedule=rng.choice([*SCHEDULES]), **settings)
        names = allocator.adapters
        allocator.scores = lambda names=names: {name: rng.randint(0, 2) for name in names}
        plan = allocator.plan()
        steps = range(1, allocator.total_steps + 1)
        assert plan == [(t, allocator.total_rank) for t in steps if allocator.step(t)]
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
        assert step_to(allocator, 3) == []  # the end of the warm-up: earlier changes do not count
        assert allocator.scores() == {"0": 0.0, "1": 0.0}
        second.lora_L[0] += 1.0
    assert allocator.scores()["1"] == pytest.approx((math.hypot(2, 1) - math.hypot(1, 1)) / 2)
    assert step_to(allocator, 6) == ["1"]
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
    with pytest.raises(ValueError, match="step 21: expected 21 of 20"):
        allocator.step(21)
    with pytest.raises(ValueError, match="no importance in these adapters: use triadapt"):
        allocator_of(adapted(method="lora")[1], allocator.optimizer)


# Misuse that would give a wrong result without a word.


def test_growth_that_cannot_be_is_refused():
    for adapter, settings in [(4, {}), (2, {"warmup": 20}), (2, {"warmup": 10, "interval": 11})]:
        net, adapters = adapted(init_rank=adapter)
        with pytest.raises(ValueError, match="nothing can grow with total rank . of 8, .*: raise"):
            allocator_of(adapters, adamw(net), **settings)
    net, adapters = adapted()
    allocator = allocator_of(adapters, adamw(net))
    assert allocator.step(1) == []
    for t in (0, 1, 3):  # from 0, twice, one left out
        with pytest.raises(ValueError, match=f"step {t}: expected 2 of 20"):
            allocator.step(t)
    with pytest.raises(ValueError, match="no matrix has been trained: .*after optimizer.step"):
        step_to(allocator, 4)
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
        step_to(allocator, 4)


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
        step_to(allocator, 4)


class ScheduleFree(torch.optim.AdamW):
    """Like that of the package schedulefree, it keeps a second copy of the weights, z."""

    def step(self, closure=None):
        super().step()
        for p in self.state:
            self.state[p]["z"] = p.detach().clone()


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS, ScheduleFree])
def test_optimizers_with_other_state_are_refused(kind):
    net, adapters = adapted()
    net.emb.weight.requires_grad_(True)  # the first parameter, which has all state of LBFGS
    optimizer = kind(trained(net))
    allocator = allocator_of(adapters, optimizer)
    loss_of(net).backward()
    optimizer.step(lambda: loss_of(net))
    with pytest.raises(ValueError, match=f"optimizer {kind.__name__}: .* cannot grow, use AdamW"):
        step_to(allocator, 4)
    assert allocator.total_rank == 4
    assert optimizer.param_groups[0]["params"] == trained(net)


def test_optimizer_state_that_does_not_fit_is_refused():
    net, adapters = adapted()
    optimizer = adamw(net)
    fit(net, optimizer)
    wrapper = SimpleNamespace(any_name=optimizer, param_groups=optimizer.param_groups)
    wrapper.state = optimizer.state
    allocator_of(adapters, wrapper)  # like accelerate's
    wrapper.state = {}
    with pytest.raises(ValueError, match="wraps another one"):
        allocator_of(adapters, wrapper)
    other_net, other_adapters = adapted(init_rank=3)
    other = adamw(other_net)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="AdamW: its 'exp_avg' cannot grow"):
        allocator_of(other_adapters, other)


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


def test_loading_after_the_optimizer_is_refused():
    net, adapters = adapted()
    optimizer = adamw(net)
    fit(net, optimizer)
    with pytest.raises(ValueError, match="load the adapters before the optimizer's state"):
        load_adapter_state_dict(net, adapter_state_dict(adapted(init_rank=3)[0]), optimizer)


def spoil(layer: nn.Linear, kind: str) -> nn.Module:
    """A layer that computes its weight, or more than W x + b."""
    if kind == "computed weight":
        return parametrizations.weight_norm(layer)
    if kind == "hook":
        layer.register_forward_hook(lambda module, inputs, output: output.relu())
    if kind == "own forward":
        layer.forward = lambda x: nn.Linear.forward(layer, x).relu()
    if kind == "packed weight":
        layer.weight = type("Packed", (nn.Parameter,), {})(layer.weight.detach())
    if kind == "subclass":
        layer.__class__ = type("ReLULinear", (nn.Linear,), {"forward": lambda self, x: x})
    return layer


KINDS = ["computed weight", "hook", "own forward", "packed weight", "subclass", "adapter hook"]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_cannot_be_merged_are_named(kind):
    net = small_net()
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_adapters(net)
    net.second = spoil(net.second, kind)
    adapters = add_adapters(net, ["first", "second"])
    if kind == "adapter hook":
        spoil(adapters["second"], "hook")
    with pytest.raises(ValueError, match="second: cannot be merged"):
        merge_adapters(net)
    assert [*find_adapters(net)] == ["first", "second"]  # nothing was changed


def test_forks_with_their_own_forward_need_a_weight():
    class Doubled(LoRALinear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Doubled(nn.Linear(3, 3), 2, 2))
    with pytest.raises(ValueError, match="0: Doubled overrides forward, but not weight"):
        merge_adapters(net)


# Saving and loading.


@pytest.mark.parametrize("settings", [{"rank": 16}, {"alpha": 99}, {"init_rank": 1}])
def test_loading_restores_rank_scale_and_target(settings):
    net, adapters = adapted()
    net.add_module("norm", nn.BatchNorm1d(5))  # trained as well, and it has statistics
    optimizer = adamw(net)
    fit(net, optimizer, 5)
    adapters["first"].grow(1, optimizer)
    fit(net, optimizer, 5)
    state = adapter_state_dict(net)
    kept = copy.deepcopy(state)
    assert not any("base" in name or "emb" in name for name in state)

    fresh, adapters = adapted(**{"init_rank": 4} | settings)
    fresh.add_module("norm", nn.BatchNorm1d(5))
    optimizer = adamw(fresh)
    load_adapter_state_dict(fresh, state, optimizer)
    assert torch.equal(loss_of(fresh.eval()), loss_of(net.eval()))
    assert [(a.rank, a.target_rank, a.scale) for a in adapters.values()] == [(3, 4, 4), (2, 4, 4)]
    assert {*optimizer.param_groups[0]["params"]} == {*trained(fresh)}
    assert allocator_of(adapters, optimizer).budget == 8
    fit(net, adamw(net), 3)
    assert all(torch.equal(state[name], kept[name]) for name in kept)  # these are copies


def test_states_that_do_not_fit_are_refused():
    net, _ = adapted(alpha=99)
    same, adapters = adapted()
    same.load_state_dict(net.state_dict())
    assert adapters["first"].scale == 99 / 4
    with pytest.raises(RuntimeError, match="size mismatch for first.lora_B"):
        adapted(init_rank=3)[0].load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="first.lora_L is only in model or state: use the same"):
        load_adapter_state_dict(adapted(method="lora")[0], adapter_state_dict(net))


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
    with pytest.raises(ValueError, match="step 6: expected 1 of 20"):
        other.step(6)  # without the allocator's state
    other.load_state_dict(json.loads(json.dumps(allocator.state_dict())))
    assert other.scores() == allocator.scores()
    with pytest.raises(ValueError, match="step 5: expected 6 of 20"):
        other.step(5)


# The model, its data, and train.py.

TINY = "--base tiny.pt --device cpu --data text.txt --steps 16 --batch-size 4 --eval-interval 8"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with a text and a tiny base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    words = random.Random(0).choices(["grow", "rank", "über", "core", "norm,\n", "if"], k=3000)
    Path("text.txt").write_text(" ".join(words), encoding="utf-8")
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(300, 16, 1, 2, 16))
    base = train.base_file(gpt, data.train_tokenizer([" ".join(words)], 300))
    train.save_file(Path("tiny.pt"), base)


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
    assert start["versions"][1] == torch.__version__
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


@pytest.mark.parametrize(
    "options",
    ["--method full", "--method lora", "--schedule none"] + [f"--schedule {s}" for s in SCHEDULES],
)
def test_every_method_and_schedule_learns(home, options):
    finished = run(f"{TINY} {options}")
    assert finished.log[-1]["test_loss"] < finished.log[0]["test_loss"] - 0.03
    assert finished.log[-1]["total_rank"] == 8 * len(finished.adapters)
    assert Path(finished.args.out, "run.png").exists()


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


def run_interrupted(line: str, step: int, monkeypatch) -> None:
    """train.py with Ctrl-C within a step."""
    rate = train.learning_rate

    def interrupted(t, *settings):
        if t == step:
            raise KeyboardInterrupt
        return rate(t, *settings)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(train, "learning_rate", interrupted)
        run(line)


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
    run_interrupted(f"{TINY} {options} --out cut", step, monkeypatch)
    said = capsys.readouterr().out
    assert f"stopped after step {step - 1}, saved at step {(step - 1) // 8 * 8}\n" in said
    assert "to continue: python train.py --resume cut" in said
    assert torch.load("cut/checkpoint.pt")["step"] == (step - 1) // 8 * 8
    Path("cut").rename("moved")
    run_interrupted("--resume moved", step, monkeypatch)  # once more, before the next checkpoint
    run("--resume moved")
    assert_equal_bits("whole", "moved")
    assert not Path("cut").exists()
    before = Path("moved/log.jsonl").read_bytes()
    run("--resume moved")
    assert "moved is finished already" in capsys.readouterr().out
    assert Path("moved/log.jsonl").read_bytes() == before


def test_resume_refuses_other_settings_data_and_base(home, monkeypatch, capsys):
    run_interrupted(f"{TINY} --out out", 10, monkeypatch)
    assert "lr: the run to resume has 0.01 and keeps it" in refusal("--resume out --lr 0.5", capsys)
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


def test_no_run_is_overwritten(home, monkeypatch, capsys):
    first, second = run(f"{TINY} --steps 2"), run(f"{TINY} --steps 2 --seed 1")
    names = ["runs/triadapt-linear-1", "runs/triadapt-linear-2"]
    assert [first.args.out, second.args.out] == [str(Path(name)) for name in names]
    assert read_log(names[0])[0]["settings"]["seed"] == 0
    line = refusal(f"{TINY} --out {names[0]}", capsys)
    assert "not empty; give a new folder, or --resume" in line
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path("me").absolute()))
    run(f"{TINY} --steps 2 --out=~/x")  # no shell expands this ~
    assert Path("me/x/run.png").exists() and not Path("~").exists()


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
    with pytest.raises(SystemExit, match="^the (val )?loss is nan at step .: give a lower --lr$"):
        run(f"{TINY} --method full --lr 1e30 --eval-interval 1 --out out")
    assert torch.load("out/checkpoint.pt")["step"] >= 0
    read_log("out")
