"""The promises of this project, one test each: pytest -q

Growth is tested on the smallest Linear that can break it, training on a GPT of a few thousand parameters.
"""

import copy
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from model import GPT, GPTConfig, generate, load_gpt2
from plots.run import draw_run, planned_growth
from triadapt import (
    METHODS,
    SCHEDULES,
    InputError,
    LoRALinear,
    RankAllocator,
    TriAdaptLinear,
    adapter_state_dict,
    add_adapters,
    find_adapters,
    load_adapter_state_dict,
    merge_adapters,
)

HERE = Path(__file__).parent
DEVICES = ["cpu"] + (
    [torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []
)
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
every_device = pytest.mark.parametrize("device", DEVICES)


class Net(nn.Module):
    """Two Linears of different shapes, one without bias, and an embedding that no adapter touches."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        torch.manual_seed(1)
        self.emb = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 5, bias=False)
        self.to(device)

    def forward(self, ids):  # (batch,) -> (batch, 5)
        return self.second(torch.tanh(self.first(self.emb(ids))))


def adapted(device: str = "cpu", method: str = "triadapt", **settings):
    net = Net(device)
    torch.manual_seed(2)
    adapters = add_adapters(
        net, ["first", "second"], method, **({"rank": 4, "init_rank": 2} | settings)
    )
    return net, adapters


def optimizer_of(net: nn.Module, lr: float = 1e-2, **settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, **settings
    )


def loss_of(net: nn.Module, step: int = 0) -> torch.Tensor:
    device = next(net.parameters()).device
    ids = torch.arange(11, device=device)
    return F.cross_entropy(net(ids).float(), (ids * 3 + step) % 5)


def fit(net, optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def allocator_of(adapters, optimizer, **settings) -> RankAllocator:
    return RankAllocator(
        adapters,
        optimizer,
        **({"target_rank": 4, "total_steps": 20, "warmup": 2, "interval": 2} | settings),
    )


# ---------------------------------------------------------------- the adapter


@every_device
def test_trainable_parameters_are_the_closed_form_before_and_after_any_growth(device):
    for sizes in ([1], [3], [1, 1, 1], [2, 5], [1, 4, 2]):
        adapter = TriAdaptLinear(nn.Linear(7, 9).to(device), sizes[0], 1.0)
        for n in sizes[1:]:
            adapter.grow(n)
        r = sum(sizes)
        assert adapter.rank == r
        assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == r * (
            7 + 9
        ) + r * (r + 1)
        assert {p.device.type for p in adapter.parameters()} == {device}


def test_packed_triangles_are_the_dense_triangles():
    adapter = TriAdaptLinear(nn.Linear(3, 3), 2, 1.0)
    adapter.grow(3)
    r = adapter.rank
    nn.init.normal_(adapter.lora_L), nn.init.normal_(adapter.lora_U)
    lower, upper = torch.zeros(r, r), torch.zeros(r, r)
    numbers = iter(adapter.lora_L.tolist())
    for i in range(r):
        for j in range(i + 1):
            lower[i, j] = next(numbers)  # row by row
    numbers = iter(adapter.lora_U.tolist())
    for j in range(r):
        for i in range(j + 1):
            upper[i, j] = next(numbers)  # column by column
    assert torch.equal(adapter.core(), lower + upper)
    assert math.isclose(
        adapter.importance().item(), (lower + upper).norm().item() / r, rel_tol=1e-6
    )
    expected = 1.0 * adapter.lora_B @ (lower + upper) @ adapter.lora_A
    assert torch.allclose(adapter.delta_weight(), expected, atol=1e-6)


@every_device
def test_the_output_is_the_equation(device):
    torch.manual_seed(0)
    adapter = TriAdaptLinear(nn.Linear(6, 5).to(device), 3, 0.7)
    for name in adapter.GROWS_ALONG:
        nn.init.normal_(getattr(adapter, name))
    x = torch.randn(2, 4, 6, device=device)
    dense = adapter.base.weight + 0.7 * adapter.lora_B @ adapter.core() @ adapter.lora_A
    assert torch.allclose(adapter(x), F.linear(x, dense, adapter.base.bias), atol=1e-5)
    assert adapter(x[0, 0]).shape == (5,) and adapter(x[:0]).shape == (0, 4, 5)


@every_device
def test_at_step_0_triadapt_is_lora_is_the_base(device):
    ids = torch.arange(11, device=device)
    base = Net(device)(ids)
    nets = {
        method: adapted(device, method, rank=3, init_rank=3)[0] for method in ("lora", "triadapt")
    }
    assert all(torch.equal(net(ids), base) for net in nets.values())
    for (
        net
    ) in nets.values():  # the same numbers in B: still the same function and the same gradients
        for i, adapter in enumerate(find_adapters(net).values()):
            torch.manual_seed(i)
            adapter.lora_B.data = torch.randn(adapter.lora_B.shape).to(device)
        loss_of(net).backward()
    lora, tri = nets["lora"], nets["triadapt"]
    assert torch.equal(lora(ids), tri(ids)) and not torch.equal(lora(ids), base)
    for name in ("first.lora_A", "first.lora_B", "second.lora_A", "second.lora_B"):
        assert torch.equal(lora.get_parameter(name).grad, tri.get_parameter(name).grad), name


@every_device
def test_growth_keeps_the_output_and_every_old_number(device):
    net, adapters = adapted(device)
    optimizer = optimizer_of(net)
    fit(net, optimizer, 30)
    ids = torch.arange(11, device=device)
    for _ in range(3):
        before = net(ids).detach()
        old = {
            (name, tensor): getattr(a, tensor).detach().clone()
            for name, a in adapters.items()
            for tensor in a.GROWS_ALONG
        }
        moments = {
            key: {
                k: v.clone()
                for k, v in optimizer.state[getattr(adapters[key[0]], key[1])].items()
                if torch.is_tensor(v)
            }
            for key in old
        }
        for adapter in adapters.values():
            adapter.grow(2, optimizer)
        assert (net(ids) - before).norm() <= 1e-5 * before.norm()
        for (name, tensor), value in old.items():
            p, axis = getattr(adapters[name], tensor), adapters[name].GROWS_ALONG[tensor]
            assert p.shape != value.shape and torch.equal(
                p.narrow(axis, 0, value.shape[axis]), value
            )
            for key, moment in moments[name, tensor].items():
                now = optimizer.state[p][key]
                assert torch.equal(
                    now if key == "step" else now.narrow(axis, 0, value.shape[axis]), moment
                )
        fit(net, optimizer, 5)


def test_growth_keeps_every_parameter_in_its_group():
    net, adapters = adapted()
    groups = [
        {"params": list(a.parameters()), "lr": lr} for a, lr in zip(adapters.values(), (1e-3, 1e-2))
    ]
    groups = [
        {"params": [p for p in g["params"] if p.requires_grad], "lr": g["lr"]} for g in groups
    ]
    optimizer = torch.optim.AdamW(groups)
    fit(net, optimizer, 2)
    adapters["first"].grow(1, optimizer)
    for group, adapter in zip(optimizer.param_groups, adapters.values()):
        assert {id(p) for p in group["params"]} == {
            id(p) for p in adapter.parameters() if p.requires_grad
        }
    assert all(
        p in optimizer.state for a in adapters.values() for p in a.parameters() if p.requires_grad
    )
    assert len(optimizer.state) == 8


@every_device
def test_every_new_entry_gets_a_gradient_within_two_steps_and_starts_slowly(device):
    net, adapters = adapted(device)
    lr = 1e-2
    optimizer = optimizer_of(net, lr)
    fit(net, optimizer, 25)
    sizes = {
        (name, tensor): getattr(a, tensor).shape[axis]
        for name, a in adapters.items()
        for tensor, axis in a.GROWS_ALONG.items()
    }
    allocator_of(adapters, optimizer, total_steps=40)  # paces the new entries
    for adapter in adapters.values():
        adapter.grow(2, optimizer)
    seen = {}
    for step in range(2):
        before = {key: getattr(adapters[key[0]], key[1]).detach().clone() for key in sizes}
        fit(net, optimizer, 1, first=step)
        for (name, tensor), size in sizes.items():
            p, axis = getattr(adapters[name], tensor), adapters[name].GROWS_ALONG[tensor]
            length = p.shape[axis] - size
            moved = (p.detach() - before[name, tensor]).narrow(axis, size, length)
            assert moved.abs().max() <= lr * 1.0001, (name, tensor)
            touched = p.grad.narrow(axis, size, length) != 0
            seen[name, tensor] = seen.get((name, tensor), False) | touched
    assert all(touched.all() for touched in seen.values())


@every_device
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99), (0.9, 0.9), (0.95, 0.99)])
@pytest.mark.parametrize("old_steps", [1, 12, 400])
def test_new_entries_never_outrun_a_fresh_adam(device, betas, old_steps):
    """Nor the old ones, whatever the gradients: here they jump by factors of a thousand."""
    linear = nn.Sequential(nn.Linear(5, 4)).to(device)
    adapter = add_adapters(linear, "0", rank=3, init_rank=2)["0"]
    optimizer = torch.optim.AdamW(
        [p for p in linear.parameters() if p.requires_grad],
        lr=0.3,
        betas=betas,
        weight_decay=0.0,
        fused=True,
    )
    RankAllocator({"0": adapter}, optimizer, target_rank=3, total_steps=9, warmup=0, interval=1)
    generator = torch.Generator().manual_seed(0)

    def random_gradient(p):
        scale = 10 ** (3 * torch.rand(p.shape, generator=generator) - 2)
        return (torch.randn(p.shape, generator=generator) * scale).to(device)

    def step():
        for p in optimizer.param_groups[0]["params"]:
            p.grad = random_gradient(p)
        optimizer.step()

    for _ in range(old_steps):
        step()
    adapter.grow(1, optimizer)
    fresh = {
        tensor: nn.Parameter(getattr(adapter, tensor).detach().narrow(axis, size, length).clone())
        for tensor, axis, size, length in (
            ("lora_A", 0, 2, 1),
            ("lora_B", 1, 2, 1),
            ("lora_L", 0, 3, 3),
        )
    }
    reference = torch.optim.AdamW(fresh.values(), lr=0.3, betas=betas, weight_decay=0.0)
    slowest = 1.0
    for k in range(60):
        before = {
            name: (getattr(adapter, name).detach().clone(), p.detach().clone())
            for name, p in fresh.items()
        }
        step()
        for name, p in fresh.items():
            axis = adapter.GROWS_ALONG[name]
            p.grad = (
                getattr(adapter, name)
                .grad.narrow(axis, 2 if name != "lora_L" else 3, p.shape[axis])
                .clone()
            )
        reference.step()
        for name, p in fresh.items():
            axis = adapter.GROWS_ALONG[name]
            size = before[name][0].shape[axis] - p.shape[axis]
            ours = (
                (getattr(adapter, name).detach() - before[name][0])
                .narrow(axis, size, p.shape[axis])
                .abs()
            )
            limit = (p.detach() - before[name][1]).abs()
            state = optimizer.state[
                getattr(adapter, name)
            ]  # what torch makes of it, whose step count is the old ones'
            corrected = [
                state[key].narrow(axis, size, p.shape[axis]) / (1 - beta ** state["step"])
                for key, beta in zip(("exp_avg", "exp_avg_sq"), betas)
            ]
            limit = torch.minimum(limit, 0.3 * corrected[0].abs() / corrected[1].sqrt())
            assert (ours <= limit * 1.001 + 1e-5).all(), (k, name)
            slowest = min(slowest, (ours.sum() / limit.sum()).item())
    if old_steps == 400 and betas[0] == 0.9 and betas[1] >= 0.99:
        assert slowest > 0.9  # with the usual betas not merely below it, but as fast


def test_growing_costs_a_forward_nothing():
    """A rank of 8 reached in four growths runs the operations of a fresh rank of 8, on equal tensors."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            self.calls.append(
                (str(function), tuple(result.shape) if torch.is_tensor(result) else None)
            )
            return result

    def calls(adapter):
        with Count() as count:
            count.calls = []
            adapter(torch.ones(23, 12)).sum().backward()
        return count.calls

    fresh, grown = (
        TriAdaptLinear(nn.Linear(12, 17), 8, 1.0),
        TriAdaptLinear(nn.Linear(12, 17), 2, 1.0),
    )
    for n in (1, 2, 1, 2):
        grown.grow(n)
    assert calls(fresh) == calls(grown)
    assert all(getattr(grown, name).is_contiguous() for name in grown.GROWS_ALONG)
    # Never a dense update: what is as large as W is W itself, seen from the side.
    dense = [name for name, shape in calls(grown) if shape in ((17, 12), (12, 17))]
    assert set(dense) <= {"aten.t.default", "aten.detach.default"}, dense


def test_dropout_acts_in_train_and_not_in_eval():
    net, _ = adapted(dropout=0.5)
    fit(net, optimizer_of(net), 5)
    ids = torch.arange(11)
    assert not torch.equal(net.train()(ids), net(ids))
    assert torch.equal(net.eval()(ids), net(ids))
    kept = merge_adapters(net)(ids)
    torch.testing.assert_close(kept, net(ids))


@every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_float32_adapters(device, dtype):
    net = Net(device).to(dtype)
    adapters = add_adapters(net, ["first", "second"], rank=4, init_rank=2)
    optimizer = optimizer_of(net)
    first = loss_of(net).item()
    for step in range(40):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        if step == 5:
            adapters["first"].grow(2, optimizer)
    assert loss_of(net).item() < 0.8 * first
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    merged = merge_adapters(net)
    assert merged.first.weight.dtype == dtype


def test_frozen_weights_never_change_and_hold_no_gradient():
    net, adapters = adapted()
    frozen = {name: p.detach().clone() for name, p in net.named_parameters() if "lora_" not in name}
    optimizer = optimizer_of(net)
    allocator = allocator_of(adapters, optimizer)
    for t in range(1, 21):
        fit(net, optimizer, 1, first=t)
        allocator.step(t)
    for name, p in net.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if name in frozen:
            assert torch.equal(p, frozen[name]) and p.grad is None


@every_device
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_unmerged(device, method):
    net, _ = adapted(device, method)
    fit(net, optimizer_of(net), 20)
    ids = torch.arange(11, device=device)
    before, weight = net(ids).detach(), net.first.base.weight.clone()
    net.eval()(ids)
    assert torch.equal(net.first.base.weight, weight)  # only merge_adapters merges
    merge_adapters(net)
    assert type(net.first) is nn.Linear and not find_adapters(net)
    assert (net(ids) - before).norm() <= 1e-5 * before.norm()
    assert "first.weight" in net.state_dict()


def test_a_linear_with_two_names_gets_one_adapter():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["c"] = net["a"]
    adapters = add_adapters(net, "a|b|c", rank=2)
    assert list(adapters) == ["a", "b"] and net["c"] is net["a"]
    nn.init.ones_(net["a"].lora_B)
    state, x = adapter_state_dict(net), torch.ones(4)
    expected = net["c"](x)
    assert not any(name.startswith("c.") for name in state)
    merge_adapters(net)
    assert net["c"] is net["a"] and torch.allclose(net["a"](x), expected, atol=1e-6)


def test_merging_leaves_a_weight_that_another_module_shares_alone():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["b"].weight = net["a"].weight
    nn.init.ones_(add_adapters(net, "a", rank=2)["a"].lora_B)
    before = net["b"].weight.clone()
    merge_adapters(net)
    assert torch.equal(net["b"].weight, before) and not torch.equal(net["a"].weight, before)


def test_targets_are_suffixes_or_regular_expressions():
    names = lambda targets: list(add_adapters(GPT(GPTConfig(16, 8, 2, 1, 4)), targets, rank=1))
    assert names(["q"]) == ["blocks.0.q", "blocks.1.q"]
    assert names(["1.q", "v"]) == ["blocks.0.v", "blocks.1.q", "blocks.1.v"]
    assert names(r"blocks\.0\.(q|o)") == ["blocks.0.q", "blocks.0.o"]
    assert names("fc|proj") == ["blocks.0.fc", "blocks.0.proj", "blocks.1.fc", "blocks.1.proj"]
    with pytest.raises(InputError, match="targets c_attn: .* q, k, v, o, fc, proj"):
        names(["q", "c_attn"])


def test_orthogonality_is_the_formula_and_reaches_a_and_b():
    net, adapters = adapted()
    fit(net, optimizer_of(net), 5)
    expected = (
        sum(
            ((m @ m.T if m is a.lora_A else m.T @ m) - torch.eye(a.rank)).pow(2).sum()
            for a in adapters.values()
            for m in (a.lora_A, a.lora_B)
        )
        / 2
    )
    penalty = train.orthogonality(adapters)
    assert torch.allclose(penalty, expected)
    net.zero_grad()
    penalty.backward()
    assert all(
        a.lora_A.grad.abs().sum() > 0 and a.lora_B.grad.abs().sum() > 0 for a in adapters.values()
    )


def test_code_that_reads_the_weight_gets_the_adapted_one():
    """torch's attention and the fast path of its encoder never call their Linears."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2
    )
    adapters = add_adapters(model, ["linear1", "out_proj"], rank=2)
    x = torch.randn(3, 5, 8)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B)
    trained = model.train()(x)
    trained.sum().backward()
    assert all(
        a.lora_B.grad.abs().sum() > 0 and a.lora_L.grad.abs().sum() > 0 for a in adapters.values()
    )
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), trained, atol=1e-5)
        assert torch.allclose(merge_adapters(model)(x), trained, atol=1e-5)


# ---------------------------------------------------------------- rank allocation


def small_matrices(count: int, rank: int):
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))
    adapters = add_adapters(net, [str(i) for i in range(count)], rank=64, init_rank=rank)
    return adapters, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)


def test_the_budget_is_never_passed_and_met_when_planned_for_many_random_settings():
    rng = random.Random(0)
    met = 0
    for _ in range(150):
        count, init = rng.randint(1, 7), rng.randint(1, 4)
        settings = {
            "target_rank": init + rng.randint(0, 4),
            "total_steps": rng.randint(3, 60),
            "rank_step": rng.randint(1, 5),
            "top_k": rng.randint(1, 9),
            "schedule": rng.choice([*SCHEDULES]),
        }
        settings |= {
            "warmup": rng.randrange(settings["total_steps"]),
            "interval": rng.randint(1, 5),
        }
        adapters, optimizer = small_matrices(count, init)
        try:
            allocator = RankAllocator(adapters, optimizer, **settings)
        except InputError as error:
            assert "rank-step" in str(error)
            continue
        plan, seen = planned_growth(allocator), []
        for t in range(1, settings["total_steps"] + 1):
            for adapter in adapters.values():
                nn.init.normal_(
                    adapter.lora_L, generator=torch.Generator().manual_seed(rng.randrange(1 << 30))
                )
            grown = allocator.step(t)
            assert allocator.total_rank <= allocator.budget == settings["target_rank"] * count
            if grown:
                seen.append((t, allocator.total_rank))
                assert (
                    t > settings["warmup"] and (t - settings["warmup"]) % settings["interval"] == 0
                )
        assert seen == plan
        met += bool(plan) and plan[-1][1] == allocator.budget
    assert met > 50  # the loop above did test something


def test_k_follows_the_formulas():
    adapters, optimizer = small_matrices(50, 4)
    for schedule in SCHEDULES:
        allocator = RankAllocator(
            adapters,
            optimizer,
            schedule=schedule,
            target_rank=8,
            total_steps=310,
            warmup=10,
            interval=10,
            top_k=7,
        )
        for t in range(0, 311):
            for total in (200, 263, 399, 400):
                m, rest = Fraction(t - 10, 300), 400 - total
                if t <= 10 or t % 10 or rest == 0:
                    assert allocator.count(t, total) == 0
                    continue
                exact = {
                    "linear": m * rest,
                    "exponential": Fraction(rest ** float(m)).limit_denominator(10**9),
                    "fixed": 7,
                }
                k = min(max(math.floor(exact[schedule]), 1), 50, rest)
                assert allocator.count(t, total) == k, (schedule, t, total)


def test_the_highest_scores_grow_and_ties_go_to_the_first():
    adapters, optimizer = small_matrices(5, 2)
    settings = {
        "schedule": "fixed",
        "target_rank": 4,
        "total_steps": 100,
        "warmup": 0,
        "interval": 1,
        "rank_step": 1,
    }
    allocator = RankAllocator(adapters, optimizer, top_k=2, **settings)
    adapters["3"].lora_U.data[0] = 5.0
    adapters["1"].lora_L.data[0] = 3.0
    adapters["4"].lora_L.data[0] = 2.0
    assert allocator.step(1) == ["3", "1"]
    assert [a.rank for a in adapters.values()] == [2, 3, 2, 3, 2]
    first = adapters["1"].importance() - 0  # growth has moved it ...
    assert first != allocator.state["baseline"]["4"] and all(
        score == 0 for score in allocator.scores().values()
    )  # ... not the score
    assert allocator.step(2) == ["0", "1"]  # five ties at 0: module order, and no more than k
    assert allocator.decided == dict.fromkeys("01234", 0.0)


def test_the_score_is_the_change_of_importance_at_constant_rank():
    adapters, optimizer = small_matrices(2, 2)
    allocator = RankAllocator(
        adapters, optimizer, target_rank=3, total_steps=10, warmup=3, interval=3
    )
    adapters["0"].lora_L.data[0] = 9.0
    assert allocator.scores()["0"] > 1
    allocator.step(3)  # the end of warm-up: what moved before does not count
    assert allocator.scores() == {"0": 0.0, "1": 0.0}
    adapters["1"].lora_L.data[0] += 1.0
    assert math.isclose(
        allocator.scores()["1"], (math.hypot(2, 1) - math.hypot(1, 1)) / 2, rel_tol=1e-6
    )
    assert allocator.step(6) == ["1"]


@every_device
def test_worth_is_its_formula_adds_up_over_pieces_and_is_watched_once(device):
    from plots.planted import Gate
    from plots.signals import Worth

    net, adapters = adapted(device)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B)
    settings = {"target_rank": 4, "total_steps": 20, "warmup": 2, "interval": 2}
    optimizer, outputs, ids = optimizer_of(net), {}, torch.arange(11, device=device)
    for name, adapter in adapters.items():
        adapter.register_forward_hook(
            lambda module, x, y, name=name: outputs.update({name: (x[0].detach(), y)})
        )
    loss = (net(ids) ** 2).sum()
    products = {
        name: (grad * (outputs[name][0] @ a.delta_weight().t())).sum(-1).detach()
        for (name, a), grad in zip(
            adapters.items(),
            torch.autograd.grad(loss, [outputs[name][1] for name in adapters], retain_graph=True),
        )
    }
    optimizer.zero_grad()
    loss.backward()
    strength = {
        name: (adapter.lora_B * adapter.lora_B.grad).sum().item()
        for name, adapter in adapters.items()
    }
    for kind, expected in (
        (Worth, {name: p.square().sum().item() / 2 for name, p in products.items()}),  # 2: the rank
        (Gate, {name: value**2 for name, value in strength.items()}),
    ):
        old, new = (kind(adapters, optimizer, **settings) for _ in range(2))
        for part in (ids,) if kind is Gate else (ids[:4], ids[4:]):
            (net(part) ** 2).sum().backward()
        with torch.no_grad():
            net(ids)
        new.step(1)
        assert new.scores() == pytest.approx(
            {name: 0.03 * value for name, value in expected.items()}, rel=1e-4
        )
        new.step(2)  # nothing new was seen
        assert new.scores() == pytest.approx(
            {name: 0.97 * 0.03 * value for name, value in expected.items()}, rel=1e-4
        )
        assert not old.now and all(
            len(a._forward_hooks) == 2 for a in adapters.values()
        )  # one of them is this test's


def test_equal_numbers_never_pass_loras_and_leave_less_than_the_cheapest_growth():
    from plots.signals import SIGNALS, price

    rng = random.Random(0)
    torch.manual_seed(0)
    for signal in [name for name in SIGNALS if "equal numbers" in name] * 3:
        sizes, init = [rng.randint(1, 12) for _ in range(rng.randint(2, 5))], rng.randint(1, 2)
        target = init + rng.randint(1, 3)
        net = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))
        adapters = add_adapters(net, [str(i) for i in range(len(net))], rank=target, init_rank=init)
        optimizer = optimizer_of(net)
        allocator = SIGNALS[signal](
            adapters,
            optimizer,
            target_rank=target,
            total_steps=40,
            warmup=2,
            interval=1,
            top_k=3,
            rank_step=rng.randint(1, 3),
            schedule=rng.choice([*SCHEDULES]),
        )
        limit = target * sum(a + b for a, b in zip(sizes, sizes[1:]))
        for t in range(1, 41):
            optimizer.zero_grad()
            net(torch.randn(3, sizes[0])).square().sum().backward()
            optimizer.step()
            before = {name: adapter.rank for name, adapter in adapters.items()}
            assert all(adapters[name].rank > before[name] for name in allocator.step(t))
            used = sum(p.numel() for p in net.parameters() if p.requires_grad)
            assert used <= limit
        assert (
            limit - used == allocator.rest < min(price(adapter, 1) for adapter in adapters.values())
        ), signal
        assert allocator.count(40, allocator.total_rank) == 0 and allocator.scores() == {}


def test_an_optimiser_without_the_adapters_is_refused():
    net, adapters = adapted()
    optimizer = torch.optim.AdamW([adapters["first"].lora_A])
    with pytest.raises(InputError, match="optimizer: it lacks"):
        allocator_of(adapters, optimizer)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"warmup": 20}, "warmup 20"),
        ({"warmup": -1}, "warmup -1"),
        ({"interval": 0}, "interval 0"),
        ({"rank_step": 0}, "rank-step 0"),
        ({"top_k": 0}, "top-k 0"),
        ({"interval": 18, "rank_step": 1}, "rank-step 1"),
    ],
)
def test_growth_settings_out_of_range_are_named(settings, said):
    net, adapters = adapted()
    with pytest.raises(InputError, match=said):
        allocator_of(adapters, optimizer_of(net), **settings)


# ---------------------------------------------------------------- saving and loading


def test_saved_adapters_load_into_a_fresh_base_by_their_shapes():
    net, adapters = adapted()
    optimizer = optimizer_of(net)
    adapters["first"].grow(3, optimizer)
    fit(net, optimizer, 10)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(net).items()}
    assert all("lora_" in name for name in state)
    other, _ = adapted()
    load_adapter_state_dict(other, state)
    assert other.first.rank == 5 and other.second.rank == 2
    assert torch.equal(other(torch.arange(11)), net(torch.arange(11)))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda s: s.pop("second.lora_U"), "second.lora_U"),
        (lambda s: s.update({"third.lora_A": torch.ones(1)}), "third.lora_A"),
        (
            lambda s: s.update({"second.lora_B": torch.ones(7, 2)}),
            r"second.lora_B: .*\[5, 2\].*\[7, 2\]",
        ),
        (
            lambda s: s.update({"first.lora_A": torch.ones(1, 6)}),
            r"first.lora_A: .*\[2, 6\].*\[1, 6\]",
        ),
        (lambda s: s["second.lora_L"].fill_(math.nan), "second.lora_L"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(spoil, said):
    state = {name: tensor + 1 for name, tensor in adapter_state_dict(adapted()[0]).items()}
    spoil(state)
    net, _ = adapted()
    before = net(torch.arange(11)).detach()
    with pytest.raises(InputError, match=said):
        load_adapter_state_dict(net, state)
    assert torch.equal(net(torch.arange(11)), before)


# ---------------------------------------------------------------- the model and the data


@every_device
def test_gpt_is_causal_and_generates_from_a_seed(device):
    torch.manual_seed(0)
    words = data.train_tokenizer(["the rank of a matrix grows"], 270)
    model = GPT(GPTConfig(words.get_vocab_size(), 16, 2, 2, 8)).to(device)
    ids = torch.randint(50, (3, 16), device=device)
    changed = ids.clone()
    changed[:, 9] += 1
    same = (model(ids) - model(changed)).abs().amax((0, 2)) < 1e-6
    assert same[:9].all() and not same[9:].any()
    texts = [generate(model, words, "the rank", seed=s, length=40) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and all(
        text.startswith("the rank") and len(text) > 40 for text in texts
    )
    assert generate(model, words, "")  # without a prompt it begins a text


def test_the_embedded_corpora_are_there_and_prose_never_repeats():
    code = list(data.documents("code"))
    assert 5e6 < sum(map(len, code)) < 2e7 and len(code) > 300
    paragraphs = "".join(data.documents("prose")).split("\n\n")
    paragraphs = [p for p in paragraphs if p]
    assert len(paragraphs) == len(set(paragraphs)) and sum(map(len, paragraphs)) > 2e5


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder with a text and a tiny base model in it."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    words = ["tri", "angle", "rank", "grows", "the", "a", "lower", "upper", "core", "of"]
    Path("text.txt").write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(300)))
    tokenizer = data.train_tokenizer(data.documents("text.txt"), 300)
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.get_vocab_size(), 16, 2, 2, 16)
    data.save(
        Path("base.pt"),
        {
            "config": asdict(config),
            "tokenizer": tokenizer.to_str(),
            "model": GPT(config).state_dict(),
        },
    )
    monkeypatch.setattr(
        train, "draw_run", lambda folder: folder / "run.png"
    )  # a second a run, so only where it is looked at
    return tmp_path


@pytest.fixture
def drawing(home, monkeypatch):
    """Runs draw their figure."""
    monkeypatch.setattr(train, "draw_run", draw_run)


TINY = [
    "--base",
    "base.pt",
    "--data",
    "text.txt",
    "--device",
    "cpu",
    "--steps",
    "30",
    "--batch-size",
    "4",
    "--out",
    "out",
]


def test_windows_share_the_files_memory_and_evaluation_reads_each_token_once(home):
    tokenizer = data.train_tokenizer(data.documents("text.txt"), 300)
    examples, _ = data.text_examples("text.txt", tokenizer, 16)
    x, y = data.batch(examples["train"], [0, 5, 17, 2])
    assert x.shape == y.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1])
    tokens = {
        split: np.fromfile(next(Path("cache").glob(f"*-{split}.bin")), np.uint16)
        for split in examples
    }
    seen = data.batch(examples["val"], range(len(examples["val"])))[1].flatten()
    assert torch.equal(seen, torch.from_numpy(tokens["val"][1 : len(seen) + 1].astype(np.int64)))
    assert (
        len(tokens["val"]) - len(seen) <= 16 and len(examples["train"]) == len(tokens["train"]) - 16
    )
    assert examples["train"].untyped_storage().nbytes() == 2 * len(
        tokens["train"]
    )  # the windows share the file's memory
    text = "".join(data.documents("text.txt"))
    assert text == Path("text.txt").read_text()
    ids = np.concatenate([tokens[split] for split in ("train", "val", "test")])
    assert len(tokenizer.decode(ids.tolist())) == len(
        text
    )  # every document is in exactly one split
    assert (ids == tokenizer.token_to_id(data.END_OF_TEXT)).sum() == len(
        [*data.documents("text.txt")]
    )  # and closed


WORDS = {
    "shape": ["lower", "upper", "core"],
    "size": ["rank", "budget", "count"],
    "speed": ["fast", "slow", "step"],
}


def write_table(path: str, columns: str = "sentence\tlabel", rows: int = 240) -> None:
    """A .tsv file whose label is the kind of the words in the sentence, the first kind twice as often."""
    rng, lines = random.Random(0), [columns]
    for i in range(rows):
        label = [*WORDS, "shape"][i % 4]
        sentence = " ".join(rng.choices(WORDS[label], k=rng.randint(1, 9)) + [str(i)])
        lines.append(
            "\t".join(
                {"label": label, "sentence2": "and more", "idx": str(i)}.get(name, sentence)
                for name in columns.split("\t")
            )
        )
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "columns", ["sentence\tlabel", "idx\ttext\tlabel", "label\tsentence1\tsentence2"]
)
def test_a_table_becomes_examples_whose_one_target_is_the_class_at_the_end(home, columns):
    write_table("task.tsv", columns)
    tokenizer = data.train_tokenizer(data.documents("text.txt"), 300)
    examples, classes = data.task_examples("task.tsv", tokenizer, 16)
    assert classes == [*WORDS] and {*examples} == {"train", "val", "test"}
    assert sum(map(len, examples.values())) == 240 and all(
        len(texts) > 40 for texts in examples.values()
    )
    for inputs, targets in examples["train"]:
        assert (
            inputs.shape == targets.shape
            and len(inputs) <= 16
            and inputs[-1] == tokenizer.token_to_id(data.END_OF_TEXT)
        )
        assert (targets[:-1] == data.NO_TARGET).all()
        text = tokenizer.decode(inputs.tolist())
        assert len(inputs) == 16 or any(word in text for word in WORDS[classes[targets[-1]]])


def test_modules_are_eight_packages_and_no_file_is_in_two_splits(home, monkeypatch):
    rows = data.module_rows()
    assert len({label for label, _ in rows.values()}) == 8 and len(rows) > 1000
    file_of = {text: source for text, (_, source) in rows.items()}
    assert all(source.startswith(label + os.sep) for label, source in rows.values())
    tokenizer = data.train_tokenizer(data.documents("text.txt"), 300)
    tokens = {tuple(tokenizer.encode(text).ids[:63]): source for text, source in file_of.items()}
    monkeypatch.setattr(data, "module_rows", lambda: rows)
    examples, _ = data.task_examples("modules", tokenizer, 64)
    files = {
        split: {tokens[tuple(inputs[:-1].tolist())] for inputs, _ in texts if len(inputs) < 64}
        for split, texts in examples.items()
    }
    assert not files["train"] & (files["val"] | files["test"]) and not files["val"] & files["test"]
    for split, texts in examples.items():  # every class is in every split
        assert {targets[-1].item() for _, targets in texts} == set(range(8)), split


@every_device
def test_padding_does_not_leak(home, device):
    write_table("task.tsv")
    tokenizer = data.train_tokenizer(data.documents("text.txt"), 300)
    examples, _ = data.task_examples("task.tsv", tokenizer, 16)
    torch.manual_seed(0)
    model = GPT(GPTConfig(300, 16, 2, 2, 16)).to(device)
    model.classify(3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    numbers = range(8)
    inputs, targets = data.batch(examples["val"], numbers)
    assert len({len(examples["val"][i][0]) for i in numbers}) > 2
    known = targets != data.NO_TARGET
    together = model(inputs.to(device))[known.to(device)]
    alone = torch.cat([model(examples["val"][i][0][None].to(device))[:, -1] for i in numbers])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert targets[known].tolist() == [examples["val"][i][1][-1].item() for i in numbers]


def plain_gpt2(weights: dict, ids: torch.Tensor, layers: int, heads: int) -> torch.Tensor:
    """GPT-2 written once more, from the published names and Conv1D layout: logits (time, vocab_size) of one text."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred
            / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    def conv(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    time = len(ids)
    x = weights["wte.weight"][ids] + weights["wpe.weight"][:time]
    for i in range(layers):
        q, k, v = conv(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(x.shape[1], dim=1)
        outputs = []
        for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1)):
            scores = a @ b.T / a.shape[1] ** 0.5
            scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -math.inf)
            outputs.append(scores.softmax(-1) @ c)
        x = x + conv(torch.cat(outputs, 1), f"h.{i}.attn.c_proj")
        h = conv(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + conv(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


def published_gpt2(folder: str, prefix: str = "") -> dict:
    """Write a tiny random checkpoint in the published layout; returns its weights by their plain names."""
    torch.manual_seed(3)
    width, layers, vocab_size = 12, 2, 300
    shapes = {
        "wte.weight": (vocab_size, width),
        "wpe.weight": (10, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for i in range(layers):
        for name, shape in {
            "ln_1": (width,),
            "ln_2": (width,),
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    weights = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    more = {f"h.{i}.attn.bias": torch.ones(1, 1, 10, 10).tril() for i in range(layers)} | {
        "h.0.attn.masked_bias": torch.tensor(-1e4)
    }
    more["lm_head.weight"] = weights["wte.weight"]
    Path(folder).mkdir()
    torch.save(
        {
            (prefix if name != "lm_head.weight" else "") + name: p
            for name, p in (weights | more).items()
        },
        Path(folder, "pytorch_model.bin"),
    )
    sizes = {
        "vocab_size": vocab_size,
        "n_positions": 10,
        "n_layer": layers,
        "n_head": 3,
        "n_embd": width,
    }
    Path(folder, "config.json").write_text(json.dumps(sizes))
    tokenizer = data.train_tokenizer(data.documents("text.txt"), vocab_size)
    Path(folder, "tokenizer.json").write_text(tokenizer.to_str())
    return weights


@every_device
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_published_gpt2_weights_give_the_logits_of_a_plain_computation(home, device, prefix):
    weights = published_gpt2("tiny", prefix)
    model, _ = train.load_base(train.parse_args([*TINY, "--base", "tiny"]), torch.device(device))
    ids = torch.randint(300, (3, 10), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([plain_gpt2(weights, row, 2, 3) for row in ids])
    torch.testing.assert_close(model(ids.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_published_gpt2_weights_give_the_logits_of_transformers(home):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: nothing to compare with"
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 10, "n_layer": 2, "n_head": 3, "n_embd": 12}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    published_gpt2("tiny")
    Path("tiny/pytorch_model.bin").unlink()
    theirs.save_pretrained("tiny")  # model.safetensors, as of today
    base = load_gpt2("tiny")
    ours = GPT(GPTConfig(**base["config"]))
    load_adapter_state_dict(ours, base["model"])
    ids = torch.randint(300, (3, 10))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_gpt2_adapts_and_without_a_network_the_error_names_the_folder(home, monkeypatch):
    published_gpt2("tiny")
    log = train.main(
        [*TINY, "--base", "tiny", "--context", "8", "--steps", "10", "--lr", "0.02"]
    ).log
    assert log[-1]["test_loss"] < log[0]["test_loss"] and log[-1]["total_rank"] == 8 * 12

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("model.snapshot_download", offline)
    with pytest.raises(
        InputError, match="--base gpt2: .*give a folder that holds .*pytorch_model.bin.*no route"
    ):
        load_gpt2("gpt2")
    Path("tiny/tokenizer.json").unlink()
    with pytest.raises(InputError, match="--base tiny: .*tokenizer.json"):
        load_gpt2("tiny")


# ---------------------------------------------------------------- train.py


def test_a_run_writes_its_files_and_grows_to_the_budget(home, drawing, capsys):
    train.main([*TINY, "--schedule", "linear", "--rank", "4", "--orth", "0.001"])
    assert {p.name for p in Path("out").iterdir()} == {
        "config.json",
        "log.jsonl",
        "adapter.pt",
        "checkpoint.pt",
        "run.png",
    }
    log = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in log if entry["kind"] != "allocation"] == ["start"] + [
        "eval"
    ] * 10 + ["end"]
    assert log[-1]["test_loss"] < log[0]["test_loss"] - 0.03
    assert log[-1]["total_rank"] == 4 * 12 and all(
        len(e["score"]) == len(e["ranks"]) == 12 for e in log
    )
    assert log[0]["trainable"] < log[-1]["trainable"] == log[-1]["peak_trainable"]
    assert json.loads(Path("out/config.json").read_text())["init_rank"] == 2
    assert torch.load("out/checkpoint.pt", weights_only=True)["progress"]["tokens"] == 30 * 4 * 16
    state = torch.load("out/adapter.pt", weights_only=True)
    assert all(".lora_" in name for name in state)
    assert {name: len(state[f"{name}.lora_A"]) for name in log[-1]["ranks"]} == log[-1]["ranks"]
    told = capsys.readouterr().out
    for piece in (
        "device",
        "12 matrices",
        "of a budget of 48",
        "allocations from step 1 to step",
        "grown:",
        "tokens/s",
        "perplexity",
        "s of growth",
        "run.png",
    ):
        assert piece in told, piece


@pytest.mark.parametrize(
    "method, schedule",
    [
        ("full", "none"),
        ("lora", "none"),
        ("triadapt", "none"),
        ("triadapt", "fixed"),
        ("triadapt", "exponential"),
    ],
)
def test_every_method_and_schedule_learns(home, method, schedule):
    log = train.main(
        [*TINY, "--method", method, "--schedule", schedule, "--dropout", "0.1", "--orth", "0.0001"]
    ).log
    assert log[-1]["test_loss"] < log[0]["test_loss"] - 0.03
    if method != "full":
        assert log[-1]["total_rank"] == 8 * 12


def test_the_orthogonality_penalty_is_part_of_the_loss_and_logged_beside_it(home):
    arguments = [*TINY, "--schedule", "none", "--rank", "4", "--eval-interval", "1"]
    free, held = (
        train.main([*arguments, "--orth", weight, "--out", f"orth{weight}"])
        for weight in ("0", "9")
    )
    evals = [entry for entry in held.log if entry["kind"] == "eval"]
    assert evals[-1]["penalty"] < 0.8 * evals[0]["penalty"]
    assert train.orthogonality(held.adapters) < 0.8 * train.orthogonality(free.adapters)
    assert all(
        entry["train_loss"] < 6 < 9 * entry["penalty"] for entry in evals
    )  # the task's loss, without the penalty


def test_the_core_learns_at_its_own_rate_before_and_after_growth(home):
    still, slow = (
        train.main([*TINY, "--rank", "4", "--core-lr-ratio", ratio, "--out", ratio])
        for ratio in ("0", "0.1")
    )
    for adapter in still.adapters.values():
        assert (
            torch.equal(adapter.core(), torch.eye(adapter.rank)) and adapter.lora_B.abs().sum() > 0
        )
    rate_of = {p: group["lr"] for group in slow.optimizer.param_groups for p in group["params"]}
    peak = train.learning_rate(30, 30, 1e-2)
    for adapter in slow.adapters.values():
        assert not torch.equal(adapter.core(), torch.eye(adapter.rank))
        rates = [
            rate_of[getattr(adapter, name)] for name in ("lora_A", "lora_B", "lora_L", "lora_U")
        ]
        assert rates == pytest.approx([peak, peak, peak / 10, peak / 10])


def test_a_task_is_learned_told_drawn_resumed_and_not_asked_for_text(
    home, drawing, monkeypatch, capsys
):
    write_table("task.tsv")
    arguments = [
        *TINY,
        "--task",
        "task.tsv",
        "--steps",
        "60",
        "--batch-size",
        "16",
        "--rank",
        "4",
        "--lr",
        "0.03",
    ]
    run = train.main(arguments)
    first, last = run.log[0], run.log[-1]
    assert first["test_loss"] == pytest.approx(math.log(3), abs=1e-4)  # the head starts at zero
    assert (
        last["test_loss"] < 0.6
        and last["test_accuracy"] > first["test_accuracy"] + 0.15
        and last["test_f1"] > 0.5
    )
    told = capsys.readouterr().out
    assert (
        "classes   shape size speed" in told and "accuracy" in told and Path("out/run.png").exists()
    )
    state = torch.load("out/adapter.pt", weights_only=True)
    assert {name for name in state if "lora_" not in name} == {
        "head"
    }  # the head is trained and saved too
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(20, patch)
        train.main([*arguments, "--out", "cut"])
    train.main(["--resume", "cut"])
    assert_same_bits(outcome("out"), outcome("cut"))
    train.main(["--resume", "out", "--merge", "classifier.pt"])
    with pytest.raises(InputError, match="--generate: .* classes"):
        train.main(["--resume", "out", "--generate", "rank"])
    again = train.main(
        [*TINY, "--base", "classifier.pt", "--steps", "2", "--schedule", "none", "--out", "next"]
    )
    assert (
        "sample" in again.log[-1] and again.model.head is None
    )  # its weights serve as a language model again


def test_an_evaluation_reads_512_examples_at_most_each_once(home, monkeypatch):
    run, read, batch = train.Run(train.parse_args(TINY)), [], train.batch
    monkeypatch.setattr(
        train,
        "batch",
        lambda examples, numbers: (read.extend(numbers.tolist()), batch(examples, numbers))[1],
    )
    run.evaluate("train")
    assert read == [*range(512)] and len(run.examples["train"]) > 512


def test_accuracy_and_f1_are_the_definitions(home):
    write_table("task.tsv")
    run = train.main([*TINY, "--task", "task.tsv", "--steps", "8", "--rank", "2"])
    pairs = []
    for inputs, targets in run.examples["test"]:
        pairs.append((targets[-1].item(), run.model.eval()(inputs[None])[0, -1].argmax().item()))
    result = run.evaluate("test")
    assert result["test_accuracy"] == pytest.approx(
        sum(true == said for true, said in pairs) / len(pairs)
    )
    scores = []
    for c in range(3):
        hits = sum(true == said == c for true, said in pairs)
        found, real = sum(said == c for _, said in pairs), sum(true == c for true, _ in pairs)
        precision, recall = hits / found if found else 0, hits / real
        scores.append(2 * precision * recall / (precision + recall) if hits else 0)
    assert result["test_f1"] == pytest.approx(sum(scores) / 3)


def test_merged_weights_in_a_plain_gpt_compute_and_write_what_base_and_adapter_do(home, capsys):
    train.main(TINY)
    capsys.readouterr()
    draws = [
        "--generate",
        "the rank",
        "--temperature",
        "0.9",
        "--sample-top-k",
        "20",
        "--sample-seed",
    ]
    before = Path("out/checkpoint.pt").read_bytes()
    texts = []
    for seed in "112":
        run = train.main(["--resume", "out", "--merge", "merged.pt", *draws, seed])
        texts.append(capsys.readouterr().out.partition("the rank")[2])
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) > 60
    assert Path("out/checkpoint.pt").read_bytes() == before  # a finished run is used, not changed
    merged = data.load(Path("merged.pt"), "config", "model")
    run = train.Run(train.parse_args(["--resume", "out"]))
    plain = GPT(GPTConfig(**merged["config"]))
    plain.load_state_dict(merged["model"])
    ids = torch.randint(290, (2, 16))
    torch.testing.assert_close(plain(ids), run.model.eval()(ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        plain(ids), train.load_base(run.args, torch.device("cpu"))[0](ids), atol=1e-3
    )
    assert train.main(
        [*TINY, "--base", "merged.pt", "--schedule", "none", "--steps", "2", "--out", "next"]
    ).log[0]["test_loss"] == pytest.approx(run.log[-1]["test_loss"], abs=1e-4)


def assert_same_training(one: list[dict], other: list[dict]) -> None:
    """Equal growth, and losses that differ by rounding only."""
    assert [entry.get("grown") for entry in one] == [entry.get("grown") for entry in other]
    for a, b in zip(one, other, strict=True):
        assert a["ranks"] == b["ranks"]
        for key in ("train_loss", "val_loss", "test_loss", "test_accuracy"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), (a["step"], key)


@pytest.mark.parametrize("task", [False, True])
def test_pieces_of_a_batch_train_like_the_whole(home, task):
    """Also when the pieces differ in size."""
    write_table("task.tsv")
    arguments = [
        *TINY,
        "--batch-size",
        "5",
        "--orth",
        "0.001",
        "--lr",
        "0.002",
        *(["--task", "task.tsv"] if task else []),
    ]
    whole, pieces = (train.main([*arguments, "--accumulate", n, "--out", n]).log for n in "13")
    assert_same_training(whole, pieces)


def test_two_processes_train_like_one_with_the_same_batch(home):
    arguments = [*TINY, "--orth", "0.001", "--rank", "4"]
    one = train.main([*arguments, "--out", "one"]).log
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(HERE / "train.py"),
    ]
    done = subprocess.run(
        [*command, *arguments, "--out", "two"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    two = [json.loads(line) for line in Path("two/log.jsonl").read_text().splitlines()]
    assert_same_training(one, two)
    assert done.stdout.count("before adapting") == 1  # one process speaks


def test_a_budget_out_of_reach_is_a_warning_before_the_first_step(home, capsys):
    train.main([*TINY, "--schedule", "fixed", "--top-k", "1", "--interval", "2"])
    told = capsys.readouterr().out
    assert "warning" in told and told.index("warning") < told.index("\nstep ")


def outcome(folder: str) -> tuple:
    """All that a run computed: everything but the times."""
    checkpoint = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
    log = [
        {
            k: v
            for k, v in e.items()
            if "seconds" not in k and "per_second" not in k and k != "settings"
        }
        for e in checkpoint["progress"]["log"]
    ]
    optimizer = checkpoint["optimizer"]["state"]
    return checkpoint["trained"], optimizer, log


def assert_same_bits(a, b) -> None:
    assert type(a) is type(b)
    if torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(sorted(a.items()), sorted(b.items())) if isinstance(a, dict) else zip(a, b):
            assert_same_bits(x, y)
    else:
        assert a == b or a != a and b != b


def interrupt_at(step: int, monkeypatch) -> None:
    """Ctrl-C while `step` is under way."""
    rate = train.learning_rate

    def interrupted(t, *more):
        if t == step:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(t, *more)

    monkeypatch.setattr(train, "learning_rate", interrupted)


def test_the_signals_of_the_comparison_resume_to_the_same_bits(home, monkeypatch):
    from plots import signals

    for signal in ("sensitivity", "worth, equal numbers"):
        arguments = [
            *TINY,
            "--steps",
            "12",
            "--eval-interval",
            "12",
            "--rank",
            "4",
            "--score",
            signal,
            "--dropout",
            "0.1",
        ]
        assert type(train.main(arguments).allocator) is signals.SIGNALS[signal]
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            interrupt_at(5, patch)
            train.main([*arguments, "--out", "cut"])
        train.main(["--resume", "cut"])
        assert_same_bits(outcome("out"), outcome("cut"))


@pytest.mark.parametrize(
    "method, stop", [("triadapt", 4), ("triadapt", 6), ("triadapt", 29), ("full", 11)]
)
def test_resume_ends_with_the_bits_of_an_uninterrupted_run(home, monkeypatch, capsys, method, stop):
    arguments = [*TINY, "--method", method, "--dropout", "0.1"]
    train.main(arguments)
    with monkeypatch.context() as patch:
        interrupt_at(stop, patch)
        with pytest.raises(SystemExit) as stopped:
            train.main([*arguments, "--out", "cut"])
    assert stopped.value.code == 130 and "train.py --resume cut" in capsys.readouterr().out
    assert torch.load("cut/checkpoint.pt", weights_only=True)["progress"]["step"] == stop
    train.main(["--resume", "cut"])
    assert_same_bits(outcome("out"), outcome("cut"))


def test_an_interrupt_within_the_last_step_stops_after_it(home, monkeypatch):
    train.main(TINY)
    calls, predict = [], train.predict

    def interrupted(model, *more):
        calls.append(model.training)
        if sum(calls) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return predict(model, *more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(train, "predict", interrupted)
        train.main([*TINY, "--out", "cut"])
    Path("cut").rename("moved")
    train.main(["--resume", "moved"])
    assert_same_bits(outcome("out"), outcome("moved"))
    assert not Path("cut").exists()


def test_processes_on_different_accelerators_share_one_base(home, monkeypatch):
    def pretrain(argv):
        raise StopIteration(argv[argv.index("--merge") + 1], argv[argv.index("--device") + 1])

    monkeypatch.setattr(train, "main", pretrain)
    paths = {}
    for device in ("cuda:0", "cuda:1", "cpu"):
        with pytest.raises(StopIteration) as stopped:
            train.load_base(train.parse_args([]), torch.device(device))
        paths[device], own = stopped.value.args
        assert own == device
    assert paths["cuda:0"] == paths["cuda:1"] != paths["cpu"]


def test_equal_runs_have_equal_bits_and_another_seed_has_others(home):
    for folder, seed in {"out": "0", "again": "0", "other": "1"}.items():
        train.main([*TINY, "--seed", seed, "--out", folder])
    assert_same_bits(outcome("out"), outcome("again"))
    with pytest.raises(AssertionError):
        assert_same_bits(outcome("out"), outcome("other"))


def test_files_of_equal_content_have_equal_bytes_whichever_process_wrote_them(home, monkeypatch):
    for process in (11, 22222):
        monkeypatch.setattr(os, "getpid", lambda: process)
        data.save(Path(f"{process}/adapter.pt"), {"first.lora_A": torch.ones(2)})
    assert Path("11/adapter.pt").read_bytes() == Path("22222/adapter.pt").read_bytes()


def test_the_first_process_alone_writes_and_a_cache_is_written_once(home, monkeypatch):
    path = Path("a/b.bin")
    monkeypatch.setattr(data, "PROCESS", 1)
    data.save(path, [b"second process"])
    assert not path.exists()
    monkeypatch.setattr(data, "PROCESS", 0)
    for pieces in ([b"fir", b"st"], [b"second"]):
        data.save(path, pieces, anew=False)
    assert path.read_bytes() == b"first" and [*path.parent.iterdir()] == [path]
    data.save(path, [b"third"])
    assert path.read_bytes() == b"third"


def test_no_two_steps_of_any_two_seeds_draw_the_same_numbers(home, monkeypatch):
    drawn, batches, zero_grad, batch = [], [], torch.optim.AdamW.zero_grad, train.batch
    monkeypatch.setattr(
        torch.optim.AdamW,
        "zero_grad",
        lambda self: (drawn.append(tuple(torch.rand(3).tolist())), zero_grad(self)),
    )
    monkeypatch.setattr(
        train,
        "batch",
        lambda examples, numbers: (batches.append(tuple(numbers)), batch(examples, numbers))[1],
    )
    for seed in ("0", "1", "2", "2"):
        train.main([*TINY, "--seed", seed, "--out", seed, "--steps", "10", "--eval-interval", "10"])
    assert len({*drawn[:30]}) == 30 and drawn[20:30] == drawn[30:]
    trained = [numbers for numbers in batches if type(numbers[0]) is np.int64]
    assert len({*trained[:30]}) == 30 and trained[20:30] == trained[30:]


def spoil(path: str, content: bytes) -> str:
    Path(path).write_bytes(content)
    return path


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--targets", "c_attn"], "targets c_attn: .* q, k, v, o, fc, proj"),
        (["--targets", "("], r"targets \(: not a regular expression"),
        (["--rank", "0"], "rank 0"),
        (["--rank", "four"], "--rank.*four"),
        (["--rank", "4", "--init-rank", "5"], "rank 4, init-rank 5"),
        (
            ["--rank", "12", "--init-rank", "1", "--interval", "15"],
            "rank-step 1: .* raise rank-step",
        ),
        (["--warmup", "30"], "warmup 30"),
        (["--dropout", "1"], "dropout 1"),
        (["--lr", "nan"], "--lr nan"),
        (["--steps", "0"], "--steps 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(2**70)], "--seed 1180591620717411303424: must be from 0"),
        (["--method", "lora", "--schedule", "linear"], "--schedule linear: --method lora"),
        (["--method", "dora"], "--method.*dora"),
        (["--device", "abacus"], "--device abacus"),
        (["--nonsense"], "--nonsense"),
        (["--compile"], "--compile: every growth would compile"),
        (["--context", "17"], "--context 17"),
        (["--context", "0"], "--context 0"),
        (["--accumulate", "5"], "--batch-size 4: must be from 5"),
        (["--temperature", "0"], "--temperature 0"),
        (["--task", "missing.tsv"], "--task missing.tsv: not a UTF-8 table"),
        (["--task", "text.txt"], "--task text.txt: not a UTF-8 table"),
        (["--task", "one.tsv"], "--task one.tsv: .* of 1 classes are too few"),
        (["--task", "short.tsv"], "--task short.tsv: not a UTF-8 table"),
        (["--base", "."], r"--base \.: not to be had; give a folder"),
        (["--base", "gpt3"], "--base gpt3: not to be had; give a folder"),
        (["--data", "missing.txt"], "--data missing.txt: not a UTF-8 file; .*No such file"),
        (["--data", "."], "--data .: not a UTF-8 file; .*Is a directory"),
        (["--data", "empty.txt"], "--data empty.txt: .* 0 tokens, fewer than one context"),
        (["--data", "latin.txt"], "--data latin.txt: not a UTF-8 file"),
        (["--data", "short.txt"], "--data short.txt: .* fewer than one context"),
        (["--resume", "nowhere", "--temperature", "0"], "nowhere/checkpoint.pt: missing"),
        (["--base", "missing.pt"], "missing.pt: missing, damaged"),
        (["--base", "cut.pt"], "cut.pt: missing, damaged"),
        (["--base", "text.txt"], "--base text.txt: not to be had; give a folder"),
        (["--base", "other.pt"], "other.pt: missing, damaged, or not written by train.py"),
        (["--base", "words.pt"], "words.pt: its tokenizer or its sizes are damaged"),
        (["--base", "narrow.pt"], r"wpe.weight: .*\[16, 16\].*\[8, 16\]"),
        (["--resume", "nowhere"], "nowhere/checkpoint.pt: missing, damaged"),
    ],
)
def test_bad_input_gets_one_clear_line(home, arguments, said):
    (
        spoil("empty.txt", b""),
        spoil("latin.txt", "naïve ".encode("latin-1") * 500),
        spoil("short.txt", b"too short a text\n" * 3),
    )
    write_table("one.tsv", rows=1), spoil("short.tsv", b"sentence\tlabel\nno label here\n")
    base = Path("base.pt").read_bytes()
    spoil("cut.pt", base[: len(base) // 2])
    data.save(Path("other.pt"), {"step": 1})
    data.save(Path("words.pt"), {"config": {}, "tokenizer": "none", "model": {}})
    content = torch.load("base.pt", weights_only=True)
    content["model"]["wpe.weight"] = content["model"]["wpe.weight"][:8]
    data.save(Path("narrow.pt"), content)
    with pytest.raises(InputError, match=said) as error:
        train.main(arguments if "--resume" in arguments else [*TINY, *arguments])
    assert "\n" not in str(error.value) and not Path("out").exists()


def test_a_checkpoint_that_does_not_fit_or_is_cut_short_is_refused(home):
    train.main([*TINY, "--rank", "2", "--steps", "4"])
    whole = Path("out/checkpoint.pt").read_bytes()
    spoil("out/checkpoint.pt", whole[:-100])
    with pytest.raises(InputError, match="checkpoint.pt: missing, damaged"):
        train.main(["--resume", "out"])
    content = torch.load(spoil("out/checkpoint.pt", whole), weights_only=True)
    for key, value in {
        "optimizer": content["optimizer"] | {"param_groups": []},
        "progress": 7,
        "trained": 7,
    }.items():
        data.save(Path("out/checkpoint.pt"), content | {key: value})
        with pytest.raises(
            InputError, match="--resume out: its checkpoint is of other code, or damaged"
        ):
            train.main(["--resume", "out"])
    content["trained"]["blocks.0.q.lora_B"] = torch.ones(9, 2)
    data.save(Path("out/checkpoint.pt"), content)
    with pytest.raises(InputError, match=r"blocks.0.q.lora_B: .*\[16, \d\].*\[9, 2\]"):
        train.main(["--resume", "out"])
    with pytest.raises(
        InputError,
        match="--resume out: .* leave out steps, lr|--resume out: .* leave out lr, steps",
    ):
        train.main(["--resume", "out", "--steps", "99", "--lr", "0.1", "--rank", "2"])


def test_a_write_that_fails_leaves_the_old_file(home, monkeypatch):
    before = Path("base.pt").read_bytes()

    def disk_full(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError):
        data.save(Path("base.pt"), {})
    assert Path("base.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(home, monkeypatch):
    original = train.predict
    calls = []

    def broken(model, *batch):
        calls.append(model.training)
        loss, *rest = original(model, *batch)
        return loss * (math.nan if sum(calls) > 7 else 1.0), *rest

    monkeypatch.setattr(train, "predict", broken)
    with pytest.raises(InputError, match="--lr .*: the loss is not finite at step 8"):
        train.main([*TINY, "--eval-interval", "5"])
    assert torch.load("out/checkpoint.pt", weights_only=True)["progress"]["step"] == 5


class Code:
    """A pickle that runs code when it is loaded without care."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_hostile_files_and_options_end_in_one_clear_error_and_run_nothing(home):
    rng, tokenizer = random.Random(0), data.train_tokenizer(["some text"], 270)
    whole, net = Path("base.pt").read_bytes(), adapted()[0]
    before = net(torch.arange(11)).detach()
    good = {name: tensor.clone() for name, tensor in adapter_state_dict(net).items()}
    torch.save({"config": Code(), "tokenizer": "", "model": {}}, "code.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Code(), 2))
    for path in ("code.pt", "pickle.pt"):
        with pytest.raises(InputError, match="damaged"):
            data.load(Path(path), "config", "tokenizer", "model")
    for case in range(100):
        content = (
            whole[: rng.randrange(len(whole))] if case % 2 else rng.randbytes(rng.randrange(3000))
        )
        with pytest.raises(InputError, match="^hostile.pt: missing, damaged"):
            data.load(Path(spoil("hostile.pt", content)), "config", "tokenizer", "model")
    for _ in range(100):
        state, name = dict(good), rng.choice([*good])
        shape = [*good[name].shape]
        state[name] = rng.choice(
            [
                torch.full(shape, math.nan),
                torch.full(shape, -math.inf),
                torch.zeros([*shape, 1]),
                torch.zeros(shape[:-1] + [shape[-1] + 7]),
                torch.tensor(1.0),
                "text",
                None,
                [1.0],
                3,
            ]
        )
        if rng.random() < 0.2:
            state[rng.choice([7, "x", "first.lora_Z"])] = state.pop(name)
        with pytest.raises(InputError):
            load_adapter_state_dict(net, state)
    assert torch.equal(net(torch.arange(11)), before)
    table = [*'\t\t\n\0"ab,'] + ["sentence", "label", "text\tlabel\n", "ü", "\r\n", "x" * 200_000]
    for _ in range(60):
        Path("task.tsv").write_bytes(
            "".join(rng.choices(table, k=rng.randrange(12))).encode(rng.choice(["utf-8", "utf-16"]))
        )
        with pytest.raises(InputError, match="^--task task.tsv: ") as error:
            data.task_examples("task.tsv", tokenizer, 16)
        assert "\n" not in str(error.value)
        Path("bad.txt").write_bytes(
            b"fine\n" * rng.randrange(9000) + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"])
        )
        with pytest.raises(InputError, match="^--data bad.txt: not a UTF-8 file"):
            data.text_examples("bad.txt", tokenizer, 16)
    assert not list(Path().glob("**/.*")), "no half-written file is left behind"
    options = [
        "rank",
        "alpha",
        "init-rank",
        "targets",
        "dropout",
        "orth",
        "schedule",
        "interval",
        "steps",
        "lr",
        "seed",
        "method",
        "eval-interval",
        "batch-size",
        "resume",
        "top-k",
    ]
    junk = [
        "",
        "-1",
        "nan",
        "1e999",
        "0x10",
        "ü",
        "--",
        "'; rm",
        "[",
        "1.5",
        "none",
        "\0",
        "9" * 400,
    ]
    refused = 0
    for _ in range(200):
        try:
            train.parse_args([f"--{rng.choice(options)}={rng.choice(junk)}"])
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100 and not Path("executed").exists() and Path("base.pt").read_bytes() == whole


def test_the_command_line_ends_with_code_2_and_one_line(home):
    result = subprocess.run(
        [sys.executable, str(HERE / "train.py"), "--data", "missing.txt", "--base", "base.pt"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(
        "train.py: --data missing.txt"
    )


def test_help_shows_groups_defaults_and_fewer_than_35_options():
    text = subprocess.run(
        [sys.executable, str(HERE / "train.py"), "--help"], capture_output=True, text=True
    ).stdout
    for group in ("data:", "base model:", "adapter:", "growth:", "training:", "output:"):
        assert f"\n{group}\n" in text
    assert "[300]" in text and text.count("\n  --") < 35


def readme_code(marker: str) -> str:
    """The Python block that follows <!-- marker --> in README.md."""
    return re.search(
        rf"<!-- {marker} -->\n```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL
    ).group(1)


def test_readme_own_model_runs():
    torch.manual_seed(0)
    names = {}
    exec(readme_code("own model"), names)
    assert (
        len(names["adapters"]) == 5
        and names["allocator"].total_rank == names["allocator"].budget == 20
    )
    model, fresh, x = names["model"].eval(), names["fresh"].eval(), names["x"]
    assert (
        [a.rank for a in find_adapters(fresh).values()]
        == [a.rank for a in names["adapters"].values()]
        != [2] * 5
    )
    before = merge_adapters(copy.deepcopy(names["fresh"]))(x)
    assert torch.equal(fresh(x), model(x)) and F.mse_loss(model(x), names["y"]) < 1.5
    torch.testing.assert_close(before, fresh(x))


def test_readme_fork_trains_grows_saves_and_draws(home):
    Path("diagonal.py").write_text(readme_code("fork"))
    arguments = [sys.executable, "diagonal.py", *TINY, "--method", "diagonal", "--rank", "4"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE)}
    )
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert (
        log[-1]["total_rank"] == 4 * 12 > log[0]["total_rank"]
        and Path("out/run.png").stat().st_size > 10_000
    )
    assert torch.load("out/adapter.pt", weights_only=True)["blocks.0.q.lora_E"].shape == (
        log[-1]["ranks"]["blocks.0.q"],
    )


def test_readme_tables_are_what_the_results_give():
    from plots.readme import PAGES, render

    for page in PAGES:
        text = page.read_text()
        assert render(text) == text and "written by plots/readme.py" in text, page


def test_the_sweep_of_the_defaults_picks_rates_and_goes_on_where_it_was(home, monkeypatch, capsys):
    from plots import defaults

    monkeypatch.setattr(defaults, "RATES", {"LoRA": (1e-4, 1e-2)})
    monkeypatch.setattr(defaults, "GROWTH", {"growth": ["--interval", "1"]})
    arguments = [
        "",
        "--seeds",
        "2",
        "--steps",
        "20",
        "--results",
        "cells.jsonl",
        "--base",
        "base.pt",
        "--data",
        "text.txt",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    defaults.main()
    cells = [
        (cell["row"], cell["seed"])
        for cell in map(json.loads, Path("cells.jsonl").read_text().splitlines())
    ]
    assert cells == [
        ("LoRA, lr 0.0001", 0),
        ("LoRA, lr 0.01", 0),
        ("growth", 0),
        ("LoRA, lr 0.01", 1),
        ("growth", 1),
    ]
    capsys.readouterr()
    defaults.main()
    assert capsys.readouterr().out == "" and len(Path("cells.jsonl").read_text().splitlines()) == 5


def test_the_benchmark_measures_every_variant_and_goes_on_where_it_was(home, monkeypatch, capsys):
    from plots import bench

    monkeypatch.setattr(
        sys, "argv", ["", "--quick", "--rounds", "2", "--threads", "1", "--results", "bench.jsonl"]
    )
    bench.main()
    line = json.loads(Path("bench.jsonl").read_text())
    assert {"limit", "full", "LoRA", "TriAdaptLoRA", "TriAdaptLoRA, grown"} <= {
        *line["ratio"]
    } and line["ratio"]["limit"] == 1
    assert sum(line["parts"]["limit"]) == pytest.approx(1, abs=0.01)
    assert (
        line["allocation"] > 0
        and line["held_bytes"]["limit"] < line["held_bytes"]["LoRA"] < line["held_bytes"]["full"]
    )
    capsys.readouterr()
    bench.main()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", ["", "--rounds", "1"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "--rounds 1" in capsys.readouterr().err


def test_the_backwards_by_hand_of_the_benchmark_are_autograds():
    from plots.bench import ByHand, DenseByHand

    results, base, x = [], nn.Linear(6, 9), torch.randn(3, 4, 6)
    for adapter in (TriAdaptLinear(base, 4, 2.0), ByHand(base, 4, 2.0), DenseByHand(base, 4, 2.0)):
        generator, inputs = torch.Generator().manual_seed(0), x.clone().requires_grad_()
        own = [p for p in adapter.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in own:
                p.copy_(torch.randn(p.shape, generator=generator))
        y = adapter(inputs)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [inputs, *own])])
    assert len(results[0]) == 6
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-3)


def test_the_comparison_runs_every_row_at_its_best_rate_and_counts_what_it_trains(
    home, monkeypatch, capsys
):
    from plots import compare

    monkeypatch.setattr(
        compare,
        "COMMON",
        TINY[2:4] + ["--steps", "20", "--batch-size", "4", "--eval-interval", "10", "--rank", "2"],
    )
    monkeypatch.setattr(compare, "TASKS", {"prose": []})
    monkeypatch.setattr(compare, "RATES", {"prose": (1e-4, 1e-2)})
    monkeypatch.setattr(compare, "code_loss", lambda run: run.evaluate("val")["val_loss"])
    rows = ["LoRA", "linear", "linear, random", "linear, uniform", "linear, worth, equal numbers"]
    arguments = [
        "",
        "--tasks",
        "prose",
        "--rows",
        *rows,
        "--seeds",
        "2",
        "--results",
        "cells.jsonl",
        "--base",
        "base.pt",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    compare.main()
    cells = [json.loads(line) for line in Path("cells.jsonl").read_text().splitlines()]
    assert [cell["row"] for cell in cells] == [row for row in rows for _ in range(2)] + rows
    assert all(cell["rate"] == 0.01 for cell in cells if cell["seed"] == 1)
    final = {
        cell["row"]: (sum(cell["ranks"].values()), cell["trainable"]["final"]) for cell in cells
    }
    assert (
        final["linear"][0] == final["linear, random"][0] == 24 and final["linear, uniform"][0] == 24
    )
    assert {*cells[-2]["ranks"].values()} == {2}  # uniform
    limit = final["LoRA"][1]
    assert (
        limit - 16 * 5 - 8 < final["linear, worth, equal numbers"][1] <= limit < final["linear"][1]
    )
    capsys.readouterr()
    compare.main()
    assert capsys.readouterr().out == ""


def test_adalora_is_pefts_and_counts_no_masked_rank(home, monkeypatch):
    pytest.importorskip(
        "peft", reason="peft is not installed: its row of the comparison is left out"
    )
    from plots import adalora, compare

    monkeypatch.setattr(
        compare, "COMMON", TINY[2:4] + ["--steps", "20", "--eval-interval", "10", "--rank", "4"]
    )
    monkeypatch.setattr(compare, "code_loss", lambda run: run.evaluate("val")["val_loss"])
    write_table("task.tsv")
    monkeypatch.setattr(compare, "TASKS", {"prose": [], "words": ["--task", "task.tsv"]})
    runs = []
    monkeypatch.setattr(
        adalora.AdaLoRA, "sizes", lambda run: runs.append(run) or dict(enumerate(run.counts))
    )
    for task, head in (("prose", 0), ("words", 3 * 16)):
        line = compare.measure(task, adalora.ROW, 2e-2, 0, ["--base", "base.pt"])
        run, per_rank = runs[-1], {"fc": 81, "proj": 81}  # d_in + d_out + 1, for the singular value
        numbers = head + sum(
            rank * per_rank.get(name.rpartition(".")[2], 33) for name, rank in line["ranks"].items()
        )
        assert (
            sum(line["ranks"].values()) == 4 * 12
            and line["trainable"]["final"] == numbers == run.counts[-1]
        )
        assert (
            line["trainable"]["initial"]
            == line["trainable"]["peak"]
            == 6 * (8 * 33 + 4 * 81) + head
            == run.counts[2]
        )
        assert len(run.counts) == 21 and run.counts[5] > run.counts[10] == run.counts[-1]
        assert (
            line["test"]["loss"] < line["before"]["loss"]
            and line["settings"]["peft"]["lora_alpha"] / 6 == 16 / 4
        )
        kept = {
            name: int((module.lora_E["default"] != 0).sum())
            for name, module in run.model.named_modules()
            if hasattr(module, "lora_E")
        }
        assert kept == line["ranks"]
    assert run.model.head.abs().sum() > 0
    # The gradient that the hooks add is that of the term which peft's forward adds to a loss.
    zero = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(
        type(run.model), "forward", lambda self, *_: type("Output", (), {"loss": zero + 0})()
    )
    run.model.zero_grad()
    run.peft.base_model.forward().loss.backward()
    layer = run.model.blocks[0].fc
    for p, axis in ((layer.lora_A["default"], 1), (layer.lora_B["default"], 0)):
        theirs, p.grad = p.grad / (1 + 1), None  # the hook has added the same once more
        assert (
            torch.allclose(0.5 / 24 * adalora.penalty_gradient(p, axis), theirs, atol=1e-7)
            and theirs.abs().sum() > 0
        )


def test_the_planted_ranks_are_found_by_who_knows_them(home, monkeypatch, capsys):
    from plots import planted

    arguments = [
        "--seeds",
        "1",
        "--steps",
        "20",
        "--signals",
        "oracle",
        "uniform",
        "--results",
        "cells.jsonl",
    ]
    monkeypatch.setattr(sys, "argv", ["", *arguments, "--base", "base.pt", "--data", "text.txt"])
    planted.main()
    oracle, uniform = map(json.loads, Path("cells.jsonl").read_text().splitlines())
    assert oracle["share"] > 0.7 and uniform["share"] < 0.5 and oracle["kl"] < oracle["kl_before"]
    capsys.readouterr()
    planted.main()
    assert capsys.readouterr().out == ""


def drawable_results(folder: Path) -> None:
    """The smallest results that every figure can be drawn from: growth is better than LoRA on one task, worse on the other."""
    from plots.bench import CENTRE

    names = ["blocks.0.q", "blocks.0.k"]
    gains = {
        "LoRA": 0,
        "full fine-tuning": 0.5,
        "linear": 0.1,
        "linear, random": 0,
        "brand new, equal numbers": 0.2,
    }

    def cells(key: str, task, sign: int, **more) -> list[dict]:
        return [
            {
                key: task,
                "row": row,
                "rate": rate,
                "seed": seed,
                "ranks": {names[0]: 2 + seed, names[1]: 6 - seed},
                "val": {"loss": rate},
                "settings": {"init_rank": 1},
                "trainable": {"final": 100 + seed},
                "test": {"loss": 4 + seed - sign * (gain + seed / 100)}
                | {k: v + sign * gain for k, v in more.items()},
            }
            for row, gain in gains.items()
            for seed in range(3)
            for rate in (1, 2)[: 2 - bool(seed)]
        ]

    compare = cells("task", "text", 1) + cells("task", "words", -1, accuracy=0.5)
    compare += [
        compare[-1] | {"row": "without seed 0"},
        compare[0] | {"task": "without LoRA", "row": "linear"},
    ]
    shares = [
        {
            "signal": signal,
            "seed": seed,
            "config": {},
            "share": 0.5,
            "kl": 0.1,
            "planted": dict(zip(names, (0, 3))),
        }
        for signal in ("paper", "uniform", "brand new")
        for seed in (0, 1)
    ]
    log = [
        {
            "kind": kind,
            "step": step,
            "ranks": dict.fromkeys(names, 1),
            "importance": dict.fromkeys(names, 1 / (1 + step)),
            "score": dict.fromkeys(names, -0.1),
            "grown": names[:1],
            "threshold": -0.1,
        }
        for step, kind in enumerate(("start", "allocation", "allocation", "end"))
    ]
    bench = [
        {
            "settings": CENTRE | change | {"device": "abacus", "threads": 1},
            "ratio": dict.fromkeys(ratios, 1.5),
            "quartiles": dict.fromkeys(ratios, (1.4, 1.6)),
        }
        for change in ({}, {"rank": 2})
        for ratios in [("limit", "LoRA", "TriAdaptLoRA", "full")]
    ]
    contents = {
        "compare": compare,
        "planted": shares,
        "first_run/log": log,
        "bench": bench,
        "low_data": cells("tokens", 9, 1) + cells("tokens", 99, -1),
    }
    for name, lines in contents.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_figure_is_drawn_small_and_says_what_its_results_say(tmp_path, monkeypatch, capsys):
    from plots import draw

    monkeypatch.setattr(
        draw, "bootstrap", lambda gaps: (min(gaps), max(gaps))
    )  # 10 000 resamples take a while
    titles = {}
    savefig = draw.plt.Figure.savefig

    def note(figure, path, dpi):
        titles[path.name.split(".")[1]] = " | ".join(
            [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
        )
        savefig(figure, path, dpi=30)

    monkeypatch.setattr(draw.plt.Figure, "savefig", note)
    drawable_results(tmp_path)
    for name in draw.FIGURES:
        draw.draw(name, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {*draw.FIGURES} == {*titles} and not [
        *tmp_path.glob(".*")
    ]
    assert (
        "importance (linear) is better than random choice on 1 and than uniform choice on 0 of 2"
        in titles["compare"]
    )
    assert (
        "text\nof 2 growths 1 better, 0 worse | words\nof 2 growths 0 better, 1 worse"
        in titles["compare"]
    )
    assert (
        "is best on 1 of 2 tasks" in titles["parameters"]
        and "1 are better than LoRA and 1 worse" in titles["low_data"]
    )
    assert (
        "falls in 2 of 2 matrices, 2 of which got no rank" in titles["importance"]
        and "2 of 2 alloc" in titles["importance"]
    )
    assert "50% of the added rank where it is needed, divergence +0 %" in titles["planted"]
    assert "abacus, 1 threads: a step takes 1.50 times the limit" in titles["bench"]
    plan = {name: planned_end(name) for name in SCHEDULES}
    assert all(f"{step} ({name})" in titles["growth"] for name, step in plan.items())
    assert float(re.search(r"relative change (\S+)\)", titles["method"]).group(1)) < 1e-6


def planned_end(schedule: str) -> int:
    """The step at which train.py's defaults have spent the budget, counted with 24 matrices, without an allocator."""
    args, total = train.parse_args(["--schedule", schedule]), 0
    rest = (args.rank - args.init_rank) * 24
    for t in range(args.warmup + 1, args.steps + 1):
        m, Q = Fraction(t - args.warmup, args.steps - args.warmup), rest - total
        k = {"linear": int(Q * m), "exponential": int(Q ** float(m)), "fixed": args.top_k}[schedule]
        total = min(rest, total + max(1, min(k, 24)))
        if total == rest:
            return t


def test_a_figure_without_results_is_skipped_with_one_line(tmp_path, capsys):
    from plots import draw

    (tmp_path / "first_run").mkdir()
    files = {name: tmp_path / file for name, (_, file) in draw.FIGURES.items() if file}
    for begun in (False, True):  # no file yet; a file without a finished run
        for name, file in files.items():
            if begun:
                file.touch()
            draw.draw(name, tmp_path)
            assert (
                capsys.readouterr().out
                == f"{tmp_path / name}.png: skipped, no results for it in {file}\n"
            )
    assert not [*tmp_path.glob("*.png")]


def test_the_pages_show_every_figure_and_link_to_nothing_that_is_not_there():
    from plots.draw import MOST_BYTES
    from plots.readme import PAGES

    shown, there = set(), {*HERE.glob("plots/**/*.png")}
    for page in PAGES:
        for image, link in re.findall(r"(!?)\[[^]]*\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)
            shown |= {(page.parent / link).resolve()} if image else set()
    assert shown == there and len(there) > 5
    assert max(path.stat().st_size for path in there) <= MOST_BYTES


def test_the_low_data_runs_use_so_many_tokens_and_take_what_the_comparison_knows(
    home, monkeypatch, capsys
):
    from plots import compare, low_data

    monkeypatch.setattr(compare, "code_loss", lambda run: 0.0)
    monkeypatch.setattr(low_data, "RATES", (1e-2,))
    monkeypatch.setattr(low_data, "ROWS", ("LoRA",))
    known = {
        "task": "prose",
        "row": "LoRA",
        "rate": 5e-3,
        "seed": 0,
        "val": {"loss": 3.0},
        "test": {"loss": 3.5},
    }
    known = [known | {"rate": rate} for rate in compare.RATES["prose"]]
    Path("known.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in known))
    Path("text.txt").write_text(Path("text.txt").read_text() * 3)  # longer than 5000 tokens
    sizes, run = [], train.Run.train
    monkeypatch.setattr(
        train.Run, "train", lambda self: (sizes.append(len(self.examples["train"])), run(self))[1]
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "",
            "--sizes",
            "5000",
            "99062",
            "--seeds",
            "1",
            "--known",
            "known.jsonl",
            "--results",
            "cells.jsonl",
            *TINY[:-4],
            "--steps",
            "6",
            "--rank",
            "1",
            "--eval-interval",
            "6",
        ],
    )
    low_data.main()
    cells = [json.loads(line) for line in Path("cells.jsonl").read_text().splitlines()]
    assert [cell["tokens"] for cell in cells] == [5000] + [99062] * len(known) and cells[1][
        "test"
    ] == {"loss": 3.5}
    assert sizes == [5000 - 16]


def test_the_ablations_change_one_thing_and_two_released_recipes_never_train(
    home, monkeypatch, capsys
):
    from plots import ablations

    rows = [
        "reference",
        "released: block-cb0",
        "released: block-abc0",
        "released: single",
        "moments of a grown matrix reset",
        "new entries at half rate",
        "new moments not paced",
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "",
            "--rows",
            *rows,
            "--seeds",
            "1",
            "--results",
            "cells.jsonl",
            *TINY[:-2],
            "--steps",
            "30",
            "--rank",
            "2",
            "--eval-interval",
            "30",
        ],
    )
    ablations.main()
    cells = {
        cell["row"]: cell for cell in map(json.loads, Path("cells.jsonl").read_text().splitlines())
    }
    assert (
        [*cells] == rows
        and cells["reference"]["jump"] < 1e-6
        and cells["reference"]["test"] < cells["reference"]["base"] - 0.03
    )
    for row in ("released: block-cb0", "released: block-abc0"):
        assert cells[row]["test"] == cells[row]["base"] and cells[row]["jump"] == 0
    assert cells["released: single"]["jump"] > 1e-6
    assert len({cell["test"] for cell in cells.values()}) == 6, "each change changes the result"
    capsys.readouterr()
    ablations.main()
    assert capsys.readouterr().out == ""


def test_the_core_stays_small():
    lines = {
        name: len((HERE / name).read_text().splitlines())
        for name in ("triadapt.py", "model.py", "data.py", "train.py")
    }
    assert max(lines.values()) < 300 and sum(lines.values()) < 800, lines
