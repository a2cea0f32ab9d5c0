"""The promises of this project, one test each: pytest -q

Growth is tested on the smallest Linear that can break it, training on a GPT of a few thousand
parameters. In order: the method, the model and the data, the script, forks and README.
"""

import copy
import errno
import functools
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
import train
from model import GPT, GPTConfig
from plots.run import draw_run
from triadapt import (
    METHODS,
    SCHEDULES,
    SIGNALS,
    LoRALinear,
    RankAllocator,
    TriAdaptLinear,
    adapter_state_dict,
    add_adapters,
    export_lora,
    load_adapter_state_dict,
    merge_adapters,
)

HERE = Path(__file__).parent
DEVICES = ["cpu"]
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def small_net(device: str = "cpu") -> nn.Sequential:
    """Two Linears of different shapes, one without bias, and an embedding that stays frozen."""
    torch.manual_seed(1)
    net = nn.Sequential()
    net.add_module("emb", nn.Embedding(11, 6))
    net.add_module("first", nn.Linear(6, 10))
    net.add_module("tanh", nn.Tanh())
    net.add_module("second", nn.Linear(10, 5, bias=False))
    return net.to(device)


def adapted(device: str = "cpu", **settings):
    """(net, adapters), from rank 2 to 4 if nothing else is said."""
    net = small_net(device)
    torch.manual_seed(2)
    defaults = {"targets": ["first", "second"], "rank": 4, "init_rank": 2}
    return net, add_adapters(net, **(defaults | settings))


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
    defaults = {"target_rank": 4, "total_steps": 20, "warmup": 2, "interval": 2}
    return RankAllocator(adapters, optimizer, **(defaults | settings))


def small_allocator(count: int = 2, rank: int = 2, optimizer=None, **settings) -> RankAllocator:
    """Of so many matrices of this rank, which are to get rank 4."""
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))
    adapters = add_adapters(net, "[0-9]+", rank=64, init_rank=rank)
    return allocator_of(adapters, optimizer or adamw(net), **settings)


# -------------------------------------------------------------------------------- the adapter


def test_trained_parameters_are_the_closed_form_before_and_after_any_growth(device):
    for growths in ([1], [3], [1, 1, 1], [2, 5], [1, 4, 2]):
        adapter = TriAdaptLinear(nn.Linear(7, 9).to(device), growths[0], 1.0)
        for n in growths[1:]:
            adapter.grow(n)
        r = sum(growths)
        assert adapter.rank == r
        assert sum(p.numel() for p in trained(adapter)) == r * (7 + 9) + r * (r + 1)
        assert {p.device.type for p in adapter.parameters()} == {device}


def test_the_output_is_the_equation_with_triangles_packed_by_row_and_by_column(device):
    torch.manual_seed(0)
    adapter = TriAdaptLinear(nn.Linear(6, 5).to(device), 2, 0.7)
    adapter.grow(3)
    for p in trained(adapter):
        nn.init.normal_(p)
    L = torch.zeros(5, 5, device=device)
    U = torch.zeros(5, 5, device=device)
    numbers = zip(adapter.lora_L.tolist(), adapter.lora_U.tolist(), strict=True)
    for i in range(5):
        for j in range(i + 1):
            L[i, j], U[j, i] = next(numbers)  # L row by row, U column by column
    update = 0.7 * adapter.lora_B @ (L + U) @ adapter.lora_A
    x = torch.randn(2, 4, 6, device=device)
    expected = F.linear(x, adapter.base.weight + update, adapter.base.bias)
    torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.delta_weight(), update)
    assert adapter.importance().item() == pytest.approx((L + U).square().sum().item() ** 0.5 / 5)
    assert adapter(x[0, 0]).shape == (5,)
    assert adapter(x[:0]).shape == (0, 4, 5)


def test_at_step_0_triadapt_is_lora_is_the_base(device):
    ids = torch.arange(11, device=device)
    base = small_net(device)(ids)
    lora, lora_adapters = adapted(device, method="lora", init_rank=4)
    tri, tri_adapters = adapted(device, method="triadapt", init_rank=4)
    assert torch.equal(lora(ids), base)
    assert torch.equal(tri(ids), base)
    for name, adapter in tri_adapters.items():
        nn.init.normal_(adapter.lora_B)
        lora_adapters[name].lora_B.data.copy_(adapter.lora_B)
    loss_of(lora).backward()
    loss_of(tri).backward()
    assert torch.equal(lora(ids), tri(ids))  # with equal numbers in B still one function
    for name, p in lora.named_parameters():
        assert "lora_" not in name or torch.equal(p.grad, tri.get_parameter(name).grad)


def corner(grown: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The entries of a grown tensor that stand where those of the old one stood."""
    return grown[tuple(slice(size) for size in old.shape)]


def test_growth_keeps_the_output_and_old_numbers_moments_and_groups_in_new_parameters(device):
    net, adapters = adapted(device)
    optimizer = torch.optim.AdamW([{"params": trained(a)} for a in adapters.values()], lr=1e-2)
    ids = torch.arange(11, device=device)
    for _ in range(3):
        fit(net, optimizer, 10)
        output = net(ids)
        held = trained(net)  # a list from before growth is stale after it
        before = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in held])
        for adapter in adapters.values():
            adapter.grow(2, optimizer)
        assert (net(ids) - output).norm() <= 1e-5 * output.norm()
        for p, (numbers, state) in zip(trained(net), before, strict=True):
            assert p.numel() > numbers.numel()
            assert torch.equal(corner(p, numbers), numbers)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(corner(optimizer.state[p][key], state[key]), state[key])
        assert not {*held} & {*net.parameters()}
        for group, adapter in zip(optimizer.param_groups, adapters.values(), strict=True):
            assert group["params"] == trained(adapter)
        assert {*optimizer.state} == {*trained(net)}


def test_within_two_steps_of_growth_every_new_entry_has_a_gradient_and_no_frozen_one_ever(device):
    net, adapters = adapted(device)
    optimizer = adamw(net)
    fit(net, optimizer, 25)
    for adapter in adapters.values():
        adapter.grow(2, optimizer)
    fit(net, optimizer, 2)
    for p in trained(net):
        assert optimizer.state[p]["exp_avg"].all()  # their mean: of new entries zero at growth
    frozen = {n.replace("base.", ""): p for n, p in net.named_parameters() if "lora_" not in n}
    for name, p in small_net(device).named_parameters():
        assert torch.equal(frozen[name], p)
        assert frozen[name].grad is None and not frozen[name].requires_grad


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.999)])
def test_new_entries_get_the_mean_second_moment_and_start_at_a_tenth_of_the_rate(device, betas):
    net, adapters = adapted(device)
    optimizer = adamw(net, betas=betas)
    fit(net, optimizer, 400)
    mean = optimizer.state[adapters["first"].lora_B]["exp_avg_sq"].mean()
    adapters["first"].grow(1, optimizer)
    B = adapters["first"].lora_B  # (10, 3), of which the last column is new
    state = optimizer.state[B]
    assert not state["exp_avg"][:, 2].any()
    torch.testing.assert_close(state["exp_avg_sq"][:, 2], mean.expand(10))

    size = (mean / (1 - betas[1] ** state["step"])).sqrt().item()  # of gradients, as Adam knows it
    speeds = []
    for _ in range(60):
        for p in trained(net):
            p.grad = torch.full_like(p, size)
        before = B.detach().clone()
        optimizer.step()
        speeds.append((B.detach() - before)[:, 2].abs().max().item() / 1e-2)
    assert speeds[:2] == pytest.approx([0.1, 0.19], rel=0.01)
    assert speeds == sorted(speeds) and 0.99 < speeds[-1] <= 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growth_stays_finite_under_a_grad_scaler_that_skips_steps_and_in_bfloat16(dtype):
    net, adapters = adapted()
    net.to(dtype)
    optimizer = adamw(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    skipped = 0
    for step in range(30):
        optimizer.zero_grad()
        scaler.scale(16 * loss_of(net, step)).backward()
        skipped += not all(p.grad.isfinite().all() for p in trained(net))
        scaler.step(optimizer)
        scaler.update()
        if step in (1, 2, 20, 21):
            adapters["first"].grow(1, optimizer)
    assert 3 < skipped < 20
    numbers = [value for state in optimizer.state.values() for value in state.values()]
    assert all(value.isfinite().all() for value in [*numbers, *trained(net)])


def test_an_optimiser_whose_state_is_not_per_entry_is_named_and_nothing_grows():
    net, adapters = adapted()
    optimizer = torch.optim.Adafactor(trained(net))
    fit(net, optimizer)
    with pytest.raises(ValueError, match="^optimizer Adafactor: [^\n]*use AdamW"):
        adapters["first"].grow(1, optimizer)
    assert adapters["first"].rank == 2
    assert optimizer.param_groups[0]["params"] == trained(net)


def test_growing_costs_a_forward_nothing_and_no_update_is_ever_dense():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            calls.append((str(function), getattr(result, "shape", None)))
            return result

    fresh = TriAdaptLinear(nn.Linear(12, 17), 8, 1.0)
    grown = TriAdaptLinear(nn.Linear(12, 17), 2, 1.0)
    for n in (1, 2, 1, 2):
        grown.grow(n)
    recorded = []
    for adapter in (fresh, grown):
        calls = []
        with Record():
            adapter(torch.ones(23, 12)).sum().backward()
        recorded.append(calls)
    assert recorded[0] == recorded[1]
    assert all(getattr(grown, name).is_contiguous() for name in grown.GROWS_ALONG)
    # What is as large as W is W itself, seen from the side.
    as_large = {function for function, shape in calls if shape in ((17, 12), (12, 17))}
    assert as_large <= {"aten.t.default", "aten.detach.default"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_float32_adapters(device, dtype):
    net = small_net(device).to(dtype)
    adapters = add_adapters(net, ["first", "second"], rank=4, init_rank=2)
    optimizer = adamw(net)
    before = loss_of(net).item()
    for step in range(40):
        fit(net, optimizer)
        if step == 5:
            adapters["first"].grow(2, optimizer)
    assert loss_of(net).item() < 0.8 * before
    assert {p.dtype for p in trained(net)} == {torch.float32}
    assert merge_adapters(net).first.weight.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_dropout_acts_in_train_alone_merged_is_unmerged_and_eval_merges_nothing(device, method):
    net, _ = adapted(device, method=method, dropout=0.5)
    fit(net, adamw(net), 20)
    ids = torch.arange(11, device=device)
    assert not torch.equal(net.train()(ids), net(ids))
    weight = net.first.base.weight.clone()
    before = net.eval()(ids)
    assert torch.equal(net.first.base.weight, weight)
    merge_adapters(net)
    assert type(net.first) is nn.Linear
    assert (net(ids) - before).norm() <= 1e-5 * before.norm()


def test_a_linear_with_two_names_gets_one_adapter_and_merging_leaves_a_shared_weight_alone():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["c"] = net["a"]
    net["b"].weight = net["a"].weight
    x = torch.ones(4)
    shared = net["b"](x)
    assert [*add_adapters(net, "a|c", rank=2)] == ["a"]
    nn.init.ones_(net["a"].lora_B)
    expected = net["c"](x)
    merge_adapters(net)
    assert net["c"] is net["a"]
    torch.testing.assert_close(net["a"](x), expected)
    assert torch.equal(net["b"](x), shared)


def test_targets_are_the_ends_of_names_or_regular_expressions():
    def names(targets):
        return [*add_adapters(GPT(GPTConfig(16, 8, 2, 1, 4)), targets, rank=1)]

    assert names(["q"]) == ["blocks.0.q", "blocks.1.q"]
    assert names(["1.q", "v"]) == ["blocks.0.v", "blocks.1.q", "blocks.1.v"]
    assert names(r"blocks\.0\.(q|o)") == ["blocks.0.q", "blocks.0.o"]
    assert names("fc|proj") == ["blocks.0.fc", "blocks.0.proj", "blocks.1.fc", "blocks.1.proj"]


# ---------------------------------------------------------------------------- rank allocation


def test_the_budget_is_never_passed_and_the_plan_is_kept_for_many_random_settings():
    rng = random.Random(0)
    met = 0
    for _ in range(150):
        allocator = small_allocator(
            count=rng.randint(1, 7),
            rank=rng.randint(1, 4),
            target_rank=rng.randint(4, 8),
            total_steps=rng.randint(49, 80),  # time for 8 allocations at least
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
        budget = allocator.target_rank * len(adapters)
        assert allocator.total_rank <= budget
        met += bool(plan) and allocator.total_rank == budget
    assert met > 50  # the loop above did test something


@pytest.mark.parametrize("rank_step", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_k_follows_the_formulas(schedule, rank_step):
    settings = {"target_rank": 8, "total_steps": 310, "warmup": 10, "interval": 10, "top_k": 7}
    allocator = small_allocator(50, 4, schedule=schedule, rank_step=rank_step, **settings)
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


def test_who_is_at_or_above_the_kth_largest_score_grows_ties_go_to_the_first_nan_is_refused():
    allocator = small_allocator(5, schedule="fixed", warmup=0, interval=1, top_k=3)
    adapters = allocator.adapters
    allocator.scores = lambda: {"0": 1.0, "1": 1.0, "2": 1.0, "3": 5.0, "4": 2.0}
    assert {*allocator.step(1)} == {"0", "3", "4"}  # no tie pushes out who is above the threshold
    assert [adapter.rank for adapter in adapters.values()] == [3, 2, 2, 3, 3]
    assert allocator.threshold == 1.0
    assert allocator.last_scores == allocator.scores()
    allocator.scores = lambda: {"0": -4.0, "1": -1.0, "2": -2.0, "3": -1.0, "4": -1.0}
    assert {*allocator.step(2)} == {"1", "3", "4"}
    assert allocator.threshold == -1.0
    allocator.scores = lambda: {"0": 1.0, "1": math.nan, "2": 1.0, "3": 1.0, "4": 1.0}
    with pytest.raises(ValueError, match="^1: its score is nan"):
        allocator.step(3)
    assert [adapter.rank for adapter in adapters.values()] == [3, 3, 2, 4, 4]


def test_the_score_is_the_change_of_importance_at_constant_rank():
    allocator = small_allocator(target_rank=3, warmup=3, interval=3)
    adapters = allocator.adapters
    adapters["0"].lora_L.data[0] = 9.0
    assert allocator.scores()["0"] > 1
    assert allocator.step(3) == []  # the end of the warm-up: what moved before does not count
    assert allocator.scores() == {"0": 0.0, "1": 0.0}
    adapters["1"].lora_L.data[0] += 1.0
    assert allocator.scores()["1"] == pytest.approx((math.hypot(2, 1) - math.hypot(1, 1)) / 2)
    assert allocator.step(6) == ["1"]
    assert allocator.scores() == {"0": 0.0, "1": 0.0}  # growth moved F, and not the score


@pytest.mark.parametrize("rank_step", [1, 2, 3])
def test_a_budget_of_numbers_is_loras_and_leaves_less_than_the_cheapest_growth(rank_step):
    rng = random.Random(0)
    sizes = [*itertools.pairwise([3, 12, 7, 1, 9, 2])]  # (d_in, d_out) of each matrix
    for schedule in SCHEDULES:
        net = nn.Sequential(*(nn.Linear(*size) for size in sizes))
        adapters = add_adapters(net, "[0-9]", rank=4, init_rank=1)
        settings = {"schedule": schedule, "rank_step": rank_step, "top_k": 3}
        settings |= {"target_rank": 4, "total_steps": 20, "warmup": 0, "interval": 1}
        allocator = RankAllocator(adapters, adamw(net), count_numbers=True, **settings)
        allocator.scores = lambda: {name: rng.random() for name in "01234"}
        for t in range(1, 21):
            before = {name: adapter.rank for name, adapter in adapters.items()}
            assert all(adapters[name].rank > before[name] for name in allocator.step(t))
        rest = 4 * sum(map(sum, sizes)) - sum(p.numel() for p in trained(net))
        assert rest == allocator.budget_left >= 0
        assert rest < min(allocator.price(name, 1) for name in adapters)


class Nested(nn.Linear):
    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out)
        self.inner = nn.Linear(d_in, d_out)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: adapted(rank=0), "rank 0: must be 1"),
        (lambda: adapted(init_rank=5), "init_rank 5: must be from 1 to the rank, 4"),
        (lambda: adapted(dropout=1.0), "dropout 1.0"),
        (lambda: adapted(method="dora"), "method dora: must be one of lora, triadapt"),
        (lambda: adapted(targets=["first", "cond"]), "targets cond: .* first, second"),
        (lambda: adapted(targets="("), r"targets \(: not a regular expression"),
        (lambda: add_adapters(nn.Sequential(Nested(3, 3)), ".*"), "targets: 0.inner is inside"),
        (lambda: add_adapters(adapted()[0], "first"), "the model has adapters already"),
        (lambda: small_allocator(warmup=20), "warmup 20: must be from 0 to below 20"),
        (lambda: small_allocator(interval=0), "interval 0"),
        (lambda: small_allocator(interval=19), "interval 19: must be 18 or less"),
        (lambda: small_allocator(interval=18), "rank_step 1: 1 allocations can't add the 4 ranks"),
        (lambda: small_allocator(target_rank=1), "target_rank 1: the adapters have more"),
        (lambda: small_allocator(schedule="cosine"), "schedule cosine: .* exponential, fixed"),
        (lambda: small_allocator(optimizer=adamw(small_net())), "optimizer: it lacks tensors of 0"),
    ],
)
def test_the_library_names_a_setting_out_of_range(make, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        make()


# -------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("second.lora_U", None, "only the model has it"),
        (7, torch.ones(1), "only the file has it"),
        ("second.lora_B", torch.ones(7, 2), r".*\[5, 2\].*\[7, 2\]"),
        ("first.lora_A", torch.ones(2, 6, 1), "the model needs a tensor of 2 axes"),
        ("first.lora_L", [1.0, 1.0, 1.0], "the model needs a tensor of 1 axes"),
        ("second.lora_L", torch.tensor([1.0, math.nan, 1.0]), "the model needs finite numbers"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(name, value, said):
    net, _ = adapted()
    before = net(torch.arange(11))
    state = {name: tensor + 1 for name, tensor in adapter_state_dict(net).items()}
    state[name] = value
    if value is None:
        del state[name]
    with pytest.raises(ValueError, match=f"^{name}: {said}"):
        load_adapter_state_dict(net, state)
    assert torch.equal(net(torch.arange(11)), before)


# ------------------------------------------------------------------------- model and data

WORDS = {
    "shape": ["lower", "upper", "core"],
    "size": ["rank", "budget", "count"],
    "speed": ["fast", "slow", "step"],
}


def write_table(path: str, columns: str = "sentence\tlabel") -> None:
    """240 rows, whose label is the kind of the words in the sentence; a half are of one kind."""
    rng = random.Random(0)
    lines = [columns]
    for i in range(240):
        label = [*WORDS, "shape"][i % 4]
        sentence = " ".join([*rng.choices(WORDS[label], k=rng.randint(1, 9)), str(i)])
        row = {"label": label, "sentence2": "and more", "idx": str(i)}
        lines.append("\t".join(row.get(column, sentence) for column in columns.split("\t")))
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder with a text, a table and a tiny base model in it."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    words = [*sum(WORDS.values(), []), "the"]
    Path("text.txt").write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(300)))
    write_table("task.tsv")
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer(data.documents("text.txt"), 300)
    config = GPTConfig(tokenizer.get_vocab_size(), context=16, layers=1, heads=2, width=16)
    train.save_model(Path("base.pt"), GPT(config), tokenizer)
    monkeypatch.setattr(train, "draw_run", lambda log: b"")  # a second a run


def base_of(path: str):
    """(tokenizer, model) of a .pt file."""
    return train.open_base(torch.load(path, weights_only=True), path)


@pytest.fixture
def tokenizer(home):
    return base_of("base.pt")[0]


def test_a_text_follows_its_seed_and_may_be_longer_than_the_context(device):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(50, 16, 2, 2, 8)).to(device)
    one, again, other = (model.generate(gpt, [1, 2], length=40, seed=s) for s in (0, 0, 1))
    assert one == again != other
    assert one[:2] == [1, 2] and len(one) == 42


def test_the_embedded_corpora_are_there_and_prose_never_repeats():
    code = data.documents("code")
    assert 5e6 < sum(map(len, code)) < 2e7 and len(code) > 300
    paragraphs = "\n\n".join(data.documents("prose")).split("\n\n")
    assert len(paragraphs) == len({*paragraphs})
    assert sum(map(len, paragraphs)) > 2e5


def test_each_document_is_in_one_split_and_evaluation_reads_each_token_once(tokenizer):
    documents = data.documents("text.txt")
    assert "".join(documents) == Path("text.txt").read_text()
    assert all(text.endswith("\n") for text in documents[:-1])  # whole lines
    examples = data.text_examples("text.txt", documents, tokenizer, 16)
    x, y = data.batch(examples["train"], [0, 5, 17, 2])
    assert x.shape == (4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert len(examples["train"]) == len(examples["train"].tokens) - 16  # from any token on

    tokens = examples["val"].tokens
    read = data.batch(examples["val"], range(len(examples["val"])))[1].flatten()
    assert torch.equal(read, tokens[1 : len(read) + 1].long())
    assert len(tokens) - len(read) <= 16
    ids = torch.cat([windows.tokens for windows in examples.values()]).tolist()
    pieces = tokenizer.decode(ids, skip_special_tokens=False).split(data.END_OF_TEXT)
    assert sorted(pieces) == sorted([*documents, ""])  # each of them closed


@pytest.mark.parametrize(
    "columns", ["sentence\tlabel", "idx\ttext\tlabel", "label\tsentence1\tsentence2"]
)
def test_a_table_becomes_examples_whose_one_target_is_the_class_at_the_end(tokenizer, columns):
    write_table("task.tsv", columns)
    task = data.load_task("task.tsv")
    examples, _ = data.task_examples(task, tokenizer, 16)
    assert task.classes == [*WORDS]
    sizes = {split: len(rows) for split, rows in examples.items()}
    assert sizes == pytest.approx({"train": 144, "val": 48, "test": 48}, abs=3)
    for inputs, targets in examples["train"]:
        assert inputs.shape == targets.shape and len(inputs) <= 16
        assert inputs[-1] == tokenizer.token_to_id(data.END_OF_TEXT)
        assert (targets[:-1] == data.NO_TARGET).all()
        text = tokenizer.decode(inputs.tolist())
        assert len(inputs) == 16 or any(word in text for word in WORDS[task.classes[targets[-1]]])


def test_modules_are_eight_packages_and_no_file_is_in_two_splits(tokenizer):
    task = data.load_task("modules")
    assert len(task.classes) == 8 and len(task.rows) > 1000
    assert all(row.source.startswith(row.answer + os.sep) for row in task.rows)
    examples, _ = data.task_examples(task, tokenizer, 64)
    sources = {row.texts[0]: row.source for row in task.rows}
    files = []
    for texts in examples.values():
        assert {targets[-1].item() for _, targets in texts} == {*range(8)}
        whole = {tokenizer.decode(inputs.tolist()) for inputs, _ in texts if len(inputs) < 64}
        files.append({sources[text] for text in whole})
    assert len(set.union(*files)) == sum(map(len, files))


def test_padding_does_not_leak(tokenizer, device):
    task = data.load_task("task.tsv")
    examples = data.task_examples(task, tokenizer, 16)[0]["val"][:8]
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(300, 16, 2, 2, 16, classes=3)).to(device)
    for p in gpt.parameters():
        nn.init.normal_(p, std=0.3)
    assert len({len(inputs) for inputs, _ in examples}) > 2
    inputs, targets = data.batch(examples, range(8))
    known = targets != data.NO_TARGET
    alone = torch.cat([gpt(inputs[None].to(device))[:, -1] for inputs, _ in examples])
    together = gpt(inputs.to(device))[known.to(device)]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert targets[known].tolist() == [targets[-1].item() for _, targets in examples]


def plain_gpt2(weights: dict, ids: torch.Tensor, layers: int, heads: int) -> torch.Tensor:
    """GPT-2 written once more, from the published names and layout: logits of one text."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def conv(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][ids] + weights["wpe.weight"][: len(ids)]
    for i in range(layers):
        qkv = conv(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").view(len(ids), 3, heads, -1)
        q, k, v = qkv.permute(1, 2, 0, 3)  # each (heads, time, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + conv(mixed.transpose(0, 1).flatten(1), f"h.{i}.attn.c_proj")
        h = F.gelu(conv(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + conv(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


def publish_gpt2(folder: str, file: str = "pytorch_model.bin") -> dict:
    """Write a tiny random model as GPT-2 is published; returns its weights by their plain names."""
    shapes = {"wte.weight": (300, 12), "wpe.weight": (10, 12)}
    layers = {"ln_f": (12,)}
    for i in range(2):
        layers |= {f"h.{i}.ln_1": (12,), f"h.{i}.attn.c_attn": (12, 36)}
        layers |= {f"h.{i}.ln_2": (12,), f"h.{i}.attn.c_proj": (12, 12)}
        layers |= {f"h.{i}.mlp.c_fc": (12, 48), f"h.{i}.mlp.c_proj": (48, 12)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    torch.manual_seed(3)
    weights = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    prefix = "transformer."  # as a GPT2LMHeadModel has it
    save = torch.save
    if file == "model.safetensors":
        prefix = ""
        save = pytest.importorskip("safetensors.torch", reason="torch.load needs it").save_file
    published = {prefix + name: tensor for name, tensor in weights.items()}
    published[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 10, 10).tril()
    published[f"{prefix}h.0.attn.masked_bias"] = torch.tensor(-1e4)
    published["lm_head.weight"] = weights["wte.weight"].clone()
    Path(folder).mkdir()
    save(published, Path(folder, file))
    sizes = {"vocab_size": 300, "n_positions": 10, "n_layer": 2, "n_head": 3, "n_embd": 12}
    Path(folder, "config.json").write_text(json.dumps(sizes))
    Path(folder, "tokenizer.json").write_text(base_of("base.pt")[0].to_str())
    return weights


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_published_gpt2_gives_the_logits_of_a_plain_causal_computation(home, device, file):
    weights = publish_gpt2("tiny", file)
    _, gpt = train.open_base(model.load_gpt2("tiny"), "tiny")
    ids = torch.randint(300, (3, 10))
    expected = torch.stack([plain_gpt2(weights, row, layers=2, heads=3) for row in ids])
    logits = gpt.to(device)(ids.to(device)).cpu()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_gpt2_adapts_and_without_network_or_files_the_line_names_them(home, monkeypatch, capsys):
    publish_gpt2("tiny")
    log = run(f"{TEXT} --base tiny --context 8 --lr 0.02").log
    assert log[-1]["test_loss"] < log[0]["test_loss"]
    assert log[-1]["total_rank"] == 8 * 12

    def offline(*_, **__):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    said = refusal(f"{TEXT} --base gpt2", capsys)
    assert re.search(r"--base gpt2: .*no route.*a folder that holds .*pytorch_model\.bin", said)
    for file, said in {
        "pytorch_model.bin": "--base tiny/pytorch_model.bin: not weights that can be read",
        "config.json": "--base tiny: config.json does not give GPT-2's sizes",
    }.items():
        Path("tiny", file).write_text("{}")
        assert said in refusal(f"{TEXT} --base tiny", capsys)
    Path("tiny/tokenizer.json").unlink()
    assert "--base tiny: tokenizer.json is missing" in refusal(f"{TEXT} --base tiny", capsys)


# --------------------------------------------------------------------------------- train.py

TINY = "--base base.pt --device cpu --steps 16 --batch-size 4 --eval-interval 8 --out out"
TEXT = f"{TINY} --data text.txt"
TASK = f"{TINY} --task task.tsv"


def run(line: str) -> train.Run:
    """train.py with these options."""
    return train.main(shlex.split(line))


def refusal(line: str, capsys) -> str:
    """The one line that train.py ends with, at exit code 2."""
    with pytest.raises(SystemExit, match="^2$"):
        run(line)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("\n")
    return said


def python(*arguments) -> subprocess.CompletedProcess:
    """A process of its own, which can import this project."""
    own = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | own)


def read_log(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def test_a_run_writes_its_files_grows_to_the_budget_and_tells_so(home, capsys):
    run(f"{TEXT} --schedule linear --rank 4")
    files = {"log.jsonl", "adapter.pt", "checkpoint.pt", "run.png"}
    assert {path.name for path in Path("out").iterdir()} == files
    log = read_log("out")
    allocations = [entry for entry in log if entry["kind"] == "allocation"]
    others = [entry["kind"] for entry in log if entry["kind"] != "allocation"]
    assert others == ["start", "eval", "eval", "end"]
    for entry in allocations:
        assert len(entry["score"]) == 6
        assert all(entry["score"][name] >= entry["threshold"] for name in entry["grown"])
    assert log[-1]["total_rank"] == 4 * 6
    state = torch.load("out/adapter.pt", weights_only=True)
    assert all(".lora_" in name for name in state)
    assert {name: len(state[f"{name}.lora_A"]) for name in log[-1]["ranks"]} == log[-1]["ranks"]
    told = capsys.readouterr().out
    assert "total rank 12 -> 24, budget 24" in told
    for words in ("device", "6 matrices", "threshold", "grown: blocks.", "perplexity", "run.png"):
        assert words in told


@pytest.mark.parametrize(
    "options",
    ["--method full", "--method lora", "--schedule none"] + [f"--schedule {s}" for s in SCHEDULES],
)
def test_every_method_and_schedule_learns_and_is_drawn(home, options):
    finished = run(f"{TEXT} {options}")
    assert finished.log[-1]["test_loss"] < finished.log[0]["test_loss"] - 0.03
    assert finished.log[-1]["total_rank"] == 8 * len(finished.adapters)
    assert draw_run(finished.log).startswith(b"\x89PNG")


def test_the_rate_is_one_schedule_and_the_core_has_its_own_before_and_after_growth(home):
    slow = run(f"{TEXT} --rank 4 --core-lr-ratio 0.1")
    rates = {p: group["lr"] for group in slow.optimizer.param_groups for p in group["params"]}
    for adapter in slow.adapters.values():
        assert not torch.equal(adapter.core(), torch.eye(adapter.rank))
        for name, ratio in {"lora_B": 1, "lora_L": 0.1, "lora_U": 0.1, "lora_A": 1}.items():
            assert rates[getattr(adapter, name)] == pytest.approx(ratio * 1e-3)
    curve = [train.learning_rate(step, 100, 1.0) for step in range(1, 101)]
    assert curve[:3] == pytest.approx([1 / 3, 2 / 3, 1])  # 3 % up, then down to a tenth
    assert curve[2:] == sorted(curve[2:], reverse=True)
    assert curve[-1] == pytest.approx(0.1)


def test_a_task_is_learned_told_drawn_and_its_head_saved(home, capsys):
    finished = run(f"{TASK} --steps 60 --batch-size 16 --rank 4 --lr 0.03 --merge classifier.pt")
    first, last = finished.log[0], finished.log[-1]
    assert first["test_loss"] == pytest.approx(math.log(3), abs=1e-4)  # the head starts at zero
    assert last["test_loss"] < 0.8
    assert last["test_accuracy"] > first["test_accuracy"] + 0.15
    told = capsys.readouterr().out
    assert "classes   shape 120, size 60, speed 60" in told and "accuracy" in told
    assert draw_run(finished.log).startswith(b"\x89PNG")
    state = torch.load("out/adapter.pt", weights_only=True)
    assert {name for name in state if "lora_" not in name} == {"head"}
    again = run(f"{TEXT} --base classifier.pt --schedule none --out again")
    assert "sample" in again.log[-1] and again.model.head is None  # a language model once more


def test_accuracy_f1_and_loss_are_the_definitions_on_512_examples_at_most(home):
    finished = run(f"{TASK} --rank 2")
    pairs = []
    for inputs, targets in finished.examples["test"]:
        said = finished.model.eval()(inputs[None])[0, -1].argmax().item()
        pairs.append((targets[-1].item(), said))
    scores = []
    for c in range(3):
        hits = pairs.count((c, c))
        wrong = sum((true == c) != (said == c) for true, said in pairs)
        scores.append(2 * hits / (2 * hits + wrong))
    accuracy = sum(true == said for true, said in pairs) / len(pairs)
    assert finished.log[-1]["test_accuracy"] == pytest.approx(accuracy)
    assert finished.log[-1]["test_f1"] == pytest.approx(sum(scores) / 3)

    fresh = train.Run(train.parse_args(TEXT.split()))
    inputs, targets = data.batch(fresh.examples["train"], range(512))
    loss = F.cross_entropy(fresh.model(inputs).flatten(0, 1), targets.flatten()).item()
    assert fresh.evaluate("train") == {"train_loss": pytest.approx(loss, abs=1e-5)}
    assert len(fresh.examples["train"]) > 512


def test_a_finished_run_is_merged_and_goes_on_from_a_prompt_and_is_not_changed(home, capsys):
    unmerged = run(TEXT).model.eval()
    before = Path("out/checkpoint.pt").read_bytes()
    capsys.readouterr()
    run("--resume out --generate rank --merge merged.pt")
    assert len(capsys.readouterr().out.partition("rank")[2]) > 60
    run("--resume out --generate=")  # without a prompt it begins a text
    assert Path("out/checkpoint.pt").read_bytes() == before
    ids = torch.randint(270, (2, 16))
    merged = base_of("merged.pt")[1](ids)  # a plain GPT
    torch.testing.assert_close(merged, unmerged(ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, base_of("base.pt")[1](ids), atol=1e-3)
    assert run(f"{TEXT} --base merged.pt --out next").log


def assert_same_training(one: list[dict], other: list[dict]) -> None:
    """Equal growth, and losses that differ by rounding only."""
    for a, b in zip(one, other, strict=True):
        assert a.get("grown") == b.get("grown")
        assert a["ranks"] == b["ranks"]
        for key in ("train_loss", "val_loss", "test_loss", "test_accuracy"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), (a["step"], key)


@pytest.mark.parametrize("source", ["--data text.txt", "--task task.tsv"])
def test_pieces_of_a_batch_train_like_the_whole(home, source):
    """Also when they differ in size: of 5 examples three pieces have 2, 2 and 1."""
    line = f"{TINY} {source} --batch-size 5 --lr 0.002"
    assert_same_training(run(line).log, run(f"{line} --accumulate 3 --out pieces").log)


def test_two_processes_train_like_one_with_the_same_batch(home):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = python(*torchrun, HERE / "train.py", *TEXT.split(), "--out", "two")
    assert done.returncode == 0, done.stderr
    assert_same_training(run(TEXT).log, read_log("two"))
    assert done.stdout.count("before adapting") == 1  # one process speaks


def test_a_budget_out_of_reach_is_a_warning_before_the_first_step(home, capsys):
    run(f"{TEXT} --schedule fixed --top-k 1 --interval 2")
    told = capsys.readouterr().out
    assert "warning   16 ranks of the budget can't be spent" in told
    assert told.index("warning") < told.index("\nstep ")


def assert_same_bits(one: str, other: str) -> None:
    """All that two runs computed, everything but the times."""
    a, b = (torch.load(Path(out, "checkpoint.pt"), weights_only=True) for out in (one, other))
    for part in ("trained", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    for entry in a["progress"]["log"] + b["progress"]["log"]:
        entry.pop("settings", None)
        entry.pop("seconds", None)
    assert a["progress"]["log"] == b["progress"]["log"]
    assert a["growth"] == b["growth"]


def cut_and_resume(line: str, stop: int, monkeypatch) -> None:
    """The run of `line` to the folder moved: with Ctrl-C within a step, a move and a resume."""
    rate = train.learning_rate

    def interrupted(step, *settings):
        if step == stop:
            signal.raise_signal(signal.SIGINT)
        return rate(step, *settings)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(train, "learning_rate", interrupted)
        run(f"{line} --out cut")
    assert torch.load("cut/checkpoint.pt", weights_only=True)["progress"]["step"] == stop
    Path("cut").rename("moved")
    run("--resume moved")
    assert not Path("cut").exists()


@pytest.mark.parametrize(
    "options, stop",
    [
        ("--data text.txt --dropout 0.1", 4),  # between two evaluations
        ("--data text.txt --dropout 0.1", 16),  # within the last step
        ("--data text.txt --method full", 11),
        ("--task task.tsv --rank 4", 8),
    ],
)
def test_resume_gives_the_bits_of_an_uninterrupted_run(home, monkeypatch, capsys, options, stop):
    run(f"{TINY} {options}")
    cut_and_resume(f"{TINY} {options}", stop, monkeypatch)
    assert "to go on: python train.py --resume cut" in capsys.readouterr().out
    assert_same_bits("out", "moved")


def test_no_two_steps_and_starts_of_any_two_seeds_draw_the_same_numbers(home, monkeypatch):
    drawn = []

    def watched(net, optimizer, rate, examples, *settings):
        drawn.append((str(torch.rand(3).tolist()), str(examples[0].tolist())))
        return 0.0

    monkeypatch.setattr(train, "train_step", watched)
    starts = []
    for seed in (0, 1, 2, 2):
        finished = run(f"{TEXT} --seed {seed} --schedule none --out {seed}")
        starts.append(finished.adapters["blocks.0.q"].lora_A.tolist())
    assert len({numbers for numbers, _ in drawn[:48]}) == 48
    assert len({batch for _, batch in drawn[:48]}) == 48
    assert drawn[32:48] == drawn[48:]
    assert starts[0] != starts[1] != starts[2] == starts[3]


def test_a_file_is_whole_of_equal_bytes_and_written_by_the_first_process_alone(home, monkeypatch):
    path = Path("a/adapter.pt")
    monkeypatch.setattr(train, "PROCESS", 1)
    train.save_file(path, {"x": torch.ones(2)})
    assert not path.exists()
    monkeypatch.setattr(train, "PROCESS", 0)
    contents = []
    for process in (11, 22222):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        train.save_file(path, {"x": torch.ones(2)})
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]

    def disk_full(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="disk full"):
        train.save_file(path, {})
    assert path.read_bytes() == contents[0]
    assert [*path.parent.iterdir()] == [path]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(home, monkeypatch, capsys):
    losses = iter([5.0] * 11 + [math.nan])
    monkeypatch.setattr(train, "train_step", lambda *_: next(losses))
    said = refusal(f"{TEXT} --schedule none", capsys)
    assert "--lr 0.01: the loss is nan at step 12;" in said
    assert torch.load("out/checkpoint.pt", weights_only=True)["progress"]["step"] == 8


# --------------------------------------------------------------------- what is refused, and how


@pytest.fixture
def cold(home, monkeypatch):
    """The same with our base not yet pretrained (its code is the text, its model tiny), and with
    files that can't be used."""
    lines = Path("text.txt").read_text().splitlines(keepends=True)
    files = [(Path(f"{number}.py"), line) for number, line in enumerate(lines)]
    monkeypatch.setattr(data, "code_files", lambda: files)
    tiny = functools.partial(GPTConfig, context=16, layers=1, heads=2, width=8)
    monkeypatch.setattr(train, "GPTConfig", tiny)
    Path("empty.txt").touch()
    Path("folder.pt").mkdir()
    Path("latin.txt").write_bytes("naïve ".encode("latin-1") * 500)
    Path("short.txt").write_text("too short a text\n" * 3)
    Path("one.tsv").write_text("sentence\tlabel\nrank\tsize\n")
    Path("few.tsv").write_text("sentence\tlabel\nno label here\n")
    content = torch.load("base.pt", weights_only=True)
    content["model"]["wpe.weight"] = content["model"]["wpe.weight"][:8]
    torch.save(content, "narrow.pt")
    torch.save({"config": {}, "tokenizer": "none", "model": {}}, "words.pt")
    torch.save({"config": {}, "tokenizer": os.mkdir, "model": {}}, "code.pt")  # a pickled function


@pytest.mark.parametrize(
    "options, said",
    [
        # What can't be read.
        ("--data missing.txt", ": --data missing.txt: there is no such file"),
        ("--data .", r"--data \.: is not a file"),
        ("--data empty.txt", "--data empty.txt: the file is empty"),
        ("--data latin.txt", "--data latin.txt: not UTF-8 text"),
        ("--data short.txt", "--data short.txt: .* fewer than one context"),
        ("--task text.txt", r"--task text.txt: line 1 is not meaning\|\|text"),
        ("--task few.tsv", "--task few.tsv: line 2 has 1 cells, and the header 2"),
        ("--task latin.txt", "--task latin.txt: not UTF-8 text"),
        ("--task one.tsv", "--task one.tsv: 1 rows are too few"),
        ("--base code.pt", "code.pt: damaged, or not written by train.py"),
        ("--base words.pt", "--base words.pt: its tokenizer or its sizes are damaged"),
        ("--base narrow.pt", r"--base narrow.pt: .*wpe.weight.*\[8, 16\].*\[16, 16\]"),
        ("--resume nowhere", "nowhere/checkpoint.pt: there is no such file"),
        # What can't be written.
        ("--out text.txt/below", "--out text.txt/below: nothing can be written to .*text.txt"),
        ("--merge text.txt/x.pt", "--merge text.txt/x.pt: nothing can be written to .*text.txt"),
        ("--merge model.bin", "--merge model.bin: must be a file that ends in .pt"),
        ("--merge folder.pt", "--merge folder.pt: must be a file that ends in .pt"),
        # What can't be.
        ("--method dora", "argument --method: invalid choice: 'dora'"),
        ("--rank=--", "--rank: needs a value"),
        ("--init-rank 9", "--init-rank 9: must be from 1 to the rank, 8"),
        ("--interval 500", "--interval 500: must be 30 or less"),
        ("--lr nan", "--lr nan: must be from 0"),
        ("--steps 0", "--steps 0: must be from 1"),
        (f"--seed {2**70}", f"--seed {2**70}: must be from 0"),
        ("--method lora --schedule linear", "--schedule linear: --method lora can't grow"),
        ("--context 17", "--context 17: at most 16"),
        ("--batch-size 4 --accumulate 5", "--batch-size 4: must be from 5"),
        ("--device abacus", "--device abacus: not to be had here"),
        # What would have no effect.
        ("--method lora --core-lr-ratio 0.1", "--core-lr-ratio: no effect, as .*; leave it out"),
        ("--method full --rank 4", "--rank: no effect"),
        ("--schedule none --interval 3", "--interval: no effect"),
        ("--schedule linear --top-k 3", "--top-k: no effect"),
        ("--task task.tsv --data text.txt", "--data: no effect"),
        ("--task task.tsv --generate rank", "--generate rank: --task task.tsv writes no text"),
        ("--base base.pt --base-steps 5", "--base-steps: no effect"),
    ],
)
def test_a_mistake_ends_in_one_line_before_anything_is_pretrained_run_or_written(
    cold, monkeypatch, capsys, options, said
):
    monkeypatch.setattr(train, "pretrain", lambda *_: pytest.fail("pretraining has begun"))
    source = "" if "--task" in options else "--data text.txt"
    before = {*Path().iterdir()}
    assert re.search(said, refusal(f"--device cpu --steps 30 {source} {options}", capsys))
    assert {*Path().iterdir()} == before


def test_a_checkpoint_that_does_not_fit_and_a_changed_setting_are_refused(home, capsys):
    run(f"{TEXT} --rank 2")
    assert "--steps 99: the run has 16 and keeps it" in refusal("--resume out --steps 99", capsys)
    path = Path("out/checkpoint.pt")
    good = torch.load(path, weights_only=True)
    path.write_bytes(path.read_bytes()[:-100])
    assert "checkpoint.pt: damaged, or not written by" in refusal("--resume out", capsys)
    for key, value in {
        "settings": {},
        "optimizer": good["optimizer"] | {"param_groups": []},
        "progress": 7,
        "trained": good["trained"] | {"blocks.0.q.lora_B": torch.ones(9, 2)},
        "growth": {},
    }.items():
        torch.save(good | {key: value}, path)
        assert "damaged, or of other code" in refusal("--resume out", capsys)


def test_a_missing_file_is_told_at_once_by_the_command_itself(home):
    done = python(HERE / "train.py", "--data", "missing.txt")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train.py: --data missing.txt: there is no such file")
    assert done.stderr.count("\n") == 1


def test_pretraining_tells_how_far_it_is_and_happens_once(cold, monkeypatch, capsys):
    clock = itertools.count(0, 6)  # each look at it is 6 s later
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    line = "--data text.txt --device cpu --base-steps 5 --steps 16"
    run(line)
    told = capsys.readouterr().out
    assert "no base is in cache/ yet: it is pretrained on code first, for 5 steps" in told
    progress = re.findall(r"pretraining step (\d)/5  loss \d\.\d{3}  (\d+) s left", told)
    assert progress == [("2", "18"), ("4", "6"), ("5", "0")]
    run(f"{line} --out again")
    assert "pretrain" not in capsys.readouterr().out
    assert_same_bits("runs/triadapt-linear", "again")


def test_processes_share_one_base_and_what_it_is_made_from_names_it(cold, monkeypatch):
    paths = [train.pretrained_path(5, torch.device(d)) for d in ("cuda:0", "cuda:1", "cpu")]
    assert paths[0] == paths[1] != paths[2]
    assert train.pretrained_path(6, torch.device("cpu")) != paths[2]
    monkeypatch.setattr(train, "learning_rate", lambda *_: 1.0)
    assert train.pretrained_path(5, torch.device("cpu")) != paths[2]


@pytest.mark.parametrize("bug", [lambda *_: int("x"), lambda *_: torch.optim.SGD([])])
def test_a_bug_keeps_its_traceback_and_what_is_raised_on_purpose_is_one_line(
    home, monkeypatch, capsys, bug
):
    class Fork(RankAllocator):
        def scores(self):
            raise ValueError("lr 0.01: too high for this fork")

    monkeypatch.setitem(SIGNALS, "fork", Fork)
    assert refusal(f"{TEXT} --score fork", capsys).endswith(": --lr 0.01: too high for this fork\n")
    for place in ((Fork, "scores"), (train, "learning_rate")):
        monkeypatch.setattr(*place, bug)
        with pytest.raises(ValueError, match="invalid literal|empty"):
            run(f"{TEXT} --score fork")


def test_help_lists_groups_defaults_choices_and_fewer_than_35_options(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        run("--help")
    text = capsys.readouterr().out
    for group in ("data", "base model", "adapter", "growth", "training", "output"):
        assert f"\n{group}:\n" in text
    for words in ("[300]", "[2 % of all", "{lora,triadapt,", "{linear,exponential,fixed,none}"):
        assert words in text
    assert text.count("\n  --") < 35
    assert text.count("python train.py") >= 2  # examples


# ---------------------------------------------------------------------------------- tasks


def write_lines(path: str, header: str | None, rows: list[str]) -> None:
    """A file of a header, if there is one, and rows; its folder too."""
    Path(path).parent.mkdir(exist_ok=True)
    lines = rows if header is None else [header, *rows]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def examples_of(name: str, tokenizer, context: int = 16):
    """(task, its examples, what the console says of them)."""
    task = data.load_task(name)
    return task, *data.task_examples(task, tokenizer, context)


PARSES = "\t".join(f"sentence{i}_{kind}" for kind in ("binary_parse", "parse") for i in (1, 2))
MNLI = f"index\tpromptID\tpairID\tgenre\t{PARSES}\tsentence1\tsentence2\tlabel1\tgold_label"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
NLI = ["entailment", "not_entailment"]


@pytest.mark.parametrize(
    "name, header, texts, answer, answers",
    [
        ("CoLA", None, [3], 1, ["0", "1"]),
        ("SST-2", "sentence\tlabel", [0], 1, ["0", "1"]),
        ("MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", [3, 4], 0, ["0", "1"]),
        ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", [3, 4], 5, ["0", "1"]),
        ("QNLI", "index\tquestion\tsentence\tlabel", [1, 2], 3, NLI),
        ("MNLI", MNLI, [8, 9], -1, ["contradiction", "entailment", "neutral"]),
        ("RTE", "index\tsentence1\tsentence2\tlabel", [1, 2], 3, NLI),
        ("WNLI", "index\tsentence1\tsentence2\tlabel", [1, 2], 3, ["0", "1"]),
        ("STS-B", STSB, [7, 8], 9, ["0.000", "3.25", "5.000"]),
    ],
)
def test_each_folder_of_glue_is_read_as_it_is_downloaded(
    tokenizer, name, header, texts, answer, answers
):
    matched = "_matched" if name == "MNLI" else ""
    expected = []
    for file, count in (("train", 40), (f"dev{matched}", 6), ("test", 0), ("dev_mismatched", 0)):
        if file == "dev_matched":
            header = header.replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")
        rows = []
        for i in range(count):
            cells = [""] * (4 if header is None else header.count("\t") + 1)
            for column in texts:
                cells[column] = f'"{file} {i}, column {column}'  # GLUE's quotes are bare
            cells[answer] = answers[i % len(answers)]
            rows.append("\t".join(cells))
            score = float(cells[answer]) if name == "STS-B" else cells[answer]
            expected.append((tuple(cells[column] for column in texts), score, file != "train"))
        write_lines(f"{name}/{file}.tsv", header, rows)

    task, examples, told = examples_of(name, tokenizer)
    assert [(row.texts, row.answer, row.is_test) for row in task.rows] == expected
    val = 3 if name == "MNLI" else 4  # a tenth of each class
    assert [len(examples[split]) for split in ("train", "val", "test")] == [40 - val, val, 6]
    if name == "STS-B":
        assert task.kind == "score" and {t[-1].item() for _, t in examples["test"]} == {0, 3.25, 5}
    else:
        assert task.kind == "class" and task.classes == answers
        assert f"classes   {answers[0]} {sum(row[1] == answers[0] for row in expected)}, " in told
    assert f"rows      train {40 - val}, val {val}, test 6; " in told


PAIRS = "".join(f"how {i}\twhy {i}\t{i % 2}\n" for i in range(20))  # on lines 2 to 21
SCORES = "".join(f"how {i}\twhy {i}\t{i / 4}\n" for i in range(20))


@pytest.mark.parametrize(
    "rows, said",
    [
        (PAIRS + "what was\this\tevidence\t1\n", "line 22 has 4 cells, and the header 3"),
        (PAIRS + "what was his evidence\t1\n", "line 22 has 2 cells, and the header 3"),
        (PAIRS + "how\twhy\t \n", "line 22 has no label"),
        (PAIRS + "how\twhy\t-1\n", "line 22 has no label"),
        (PAIRS + "how\twhy\t-\n", "line 22 has no label"),
        (SCORES + "how\twhy\tnan\n", "line 22 has no label"),
        (PAIRS + '"how"\twhy\t0\n"how\twhy\t0\n', "line 23 opens a quote that never closes"),
        (PAIRS + "how\twhy\t2\n", r"3 classes, and only 1 rows of '2' \(t.tsv: line 22\)"),
        (PAIRS.replace("\t1\n", "\t0\n"), "1 classes, and only 20 rows of '0'"),
        ("", "has no rows under its header"),
        ("how\twhy\t0\n" * 3 + "how\twhy\t1\n" * 3, "6 rows with 1 different texts are too few"),
    ],
)
def test_a_row_that_does_not_fit_the_header_is_named_by_its_line(tokenizer, rows, said):
    write_lines("t.tsv", "sentence1\tsentence2\tlabel", [rows])
    with pytest.raises(ValueError, match=f"^task t.tsv: {said}"):
        examples_of("t.tsv", tokenizer)


def test_a_header_without_a_known_column_and_two_files_that_differ_are_refused(home):
    for header in ("review\tlabel", "sentence,label", "sentence\tlabel\tscore", "0\t1\t2\t3"):
        write_lines("t.tsv", header, ["a\t1\t\tb"] * 9)
        with pytest.raises(ValueError, match="^task t.tsv: its first line must name text columns"):
            data.load_task("t.tsv")
    write_lines("CoLA/train.tsv", None, [f"gj04\t{i % 2}\t\tsaid {i}" for i in range(20)])
    for header, rows, said in (
        ("sentence1\tsentence2\tlabel", [PAIRS], "has sentence1, sentence2 -> label, and train"),
        (None, ["gj04\t1\t\tb", "gj04\t2\t\tb"], r"line 2: label 2 is not in train\.tsv"),
        ("sentence\tlabel", [], "has no rows under its header"),
    ):
        write_lines("CoLA/dev.tsv", header, rows)
        with pytest.raises(ValueError, match=f"^task CoLA/dev.tsv: {said}"):
            data.load_task("CoLA")
    Path("CoLA/dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="^task CoLA/dev.tsv: there is no such file"):
        data.load_task("CoLA")


@pytest.mark.parametrize(
    "header, row, texts",
    [
        ("\ufeffsentence\tlabel", "a{}\t{}", "a{}"),
        ("sentence\tlabel\r", "a{}\t{}\r", "a{}"),
        ("label\tsentence\r", "{1}\ta{0}\r", "a{}"),
        (" Sentence \tLABEL", "a{}\t{}", "a{}"),
        ('"sentence"\t"label"', '"a{}"\t"{}"', "a{}"),
        ("sentence\tlabel", '"a\t{}"\t{}', "a\t{}"),
        ("sentence\tlabel", '"a\n\nb {}"\t{}', "a\n\nb {}"),
        ("sentence\tlabel\r", '"a\r\nb {}"\t{}\r', "a\r\nb {}"),
        ("sentence\tlabel", '"a ""b"" {}"\t{}', 'a "b" {}'),
        ("sentence\tlabel", '"' + "long " * 30_000 + '""{}"\t{}', "long " * 30_000 + '"{}'),
        ("sentence\tlabel", '"a" {}\t{}', '"a" {}'),  # no RFC 4180: as in GLUE
        ("sentence\tlabel", 'a "b" {}"\t{}', 'a "b" {}"'),
        # Opens in one row, closes in the next.
        ("sentence\tlabel", '"a {}\t{}\nb {}"\t{}', ['"a {}', 'b {}"']),
        ("sentence\tlabel", "a\u2028b\x85 {}\t{}\n\n  ", "a\u2028b\x85 {}"),
        ("text\ttext_pair\tlabel", '"a {}\tb"\t{}', '"a {}|b"'),  # in one cell, in the next
        ("sentence\tlabel", "a {}\t{}.0", "a {}"),  # pandas, in a column with gaps
    ],
)
def test_a_table_is_read_as_pandas_excel_or_glue_wrote_it(home, header, row, texts):
    rows = [row.format(i, i % 2, i, i % 2) for i in range(8)]
    Path("t.tsv").write_bytes("\n".join([header, *rows, ""]).encode())
    expected = []
    for i in range(8):
        for text in texts if isinstance(texts, list) else [texts]:
            expected.append((tuple(text.format(i).split("|")), str(i % 2)))
    assert [(row.texts, row.answer) for row in data.load_task("t.tsv").rows] == expected


def test_equal_texts_with_other_labels_stay_in_one_split_and_are_counted(tokenizer):
    write_lines("t.tsv", "text\tlabel", [f"said {i % 19}\t{i // 30}" for i in range(57)])
    _, examples, told = examples_of("t.tsv", tokenizer)
    texts = [{tuple(inputs.tolist()) for inputs, _ in rows} for rows in examples.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 19
    assert "19 texts stand there more than once, with different answers" in told


def test_a_pair_loses_the_end_of_its_longer_half_and_nothing_is_lost_if_it_fits(tokenizer):
    pairs = [(30, 3), (3, 30), (30, 30), (5, 9), (5, 10)]
    rows = [f"{'a' * left}\t{'b' * right}\t{i % 2}" for left, right in pairs * 4 for i in (0, 1)]
    write_lines("t.tsv", "premise\thypothesis\tlabel", rows)
    letters = data.train_tokenizer([], 300)  # a token is a byte
    _, examples, told = examples_of("t.tsv", letters, 16)
    texts = [letters.decode(i.tolist()) for rows in examples.values() for i, _ in rows]
    cut = {(11, 3), (3, 11), (7, 7), (5, 9)}  # 14 letters and two end tokens
    assert {(text.count("a"), text.count("b")) for text in texts} == cut
    assert "32 cut to 16 tokens" in told
    with pytest.raises(ValueError, match="^context 1: too short for 2 texts and an answer"):
        examples_of("t.tsv", letters, 1)


# --------------------------------------------------------------------------------- scores


def test_scores_are_what_one_computes_by_hand():
    said, true = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    two = {"accuracy": 0.75, "f1": (2 / 3 + 4 / 5) / 2, "matthews": 2 / 12**0.5}
    assert train.scores(2, said, true) == pytest.approx(two)
    two.pop("matthews")
    assert train.scores(5, said, true) == pytest.approx(two)  # classes that are absent don't count
    said, true = torch.tensor([[1.0, 2, 3, 4], [1, 2, 2, 9]])
    expected = {"pearson": 12 / 205**0.5, "spearman": 4.5 / 22.5**0.5}
    assert train.scores(1, said, true) == pytest.approx(expected)
    assert train.scores(1, said, torch.ones(4)) == {"pearson": 0.0, "spearman": 0.0}


def test_scores_are_those_of_scikit_learn_and_scipy():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 4):
        said, true = torch.randint(classes, (2, 50), generator=generator)
        said[said == 3] = 0  # a class that is never said
        found = train.scores(classes, said.float(), true.float())
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))
        assert found["f1"] == pytest.approx(metrics.f1_score(true, said, average="macro"))
        if classes == 2:
            assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(true, said))
    said = torch.randn(50, generator=generator).round(decimals=1)  # with ties
    true = said + torch.randn(50, generator=generator).round()
    found = train.scores(1, said, true)
    assert found["pearson"] == pytest.approx(stats.pearsonr(said, true).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(said, true).statistic)


@pytest.mark.parametrize("column", ["score", "label"])
def test_scores_are_learned_by_squared_error_with_one_output(home, capsys, column):
    rng = random.Random(0)
    rows = []
    for i in range(200):
        count = rng.randint(0, 8)
        words = " ".join(["rank"] * count + ["time"] * (8 - count))
        rows.append(f"{words} {i % 7}\t{count / 2 - 100}")  # -100 is a score as any other
    write_lines("t.tsv", f"sentence\t{column}", rows)
    line = f"{TINY} --task t.tsv --method full --steps 150 --batch-size 16 --lr 0.05"
    finished = run(line)
    first, last = finished.log[0], finished.log[-1]
    true = torch.tensor([targets[-1] for _, targets in finished.examples["test"]])
    assert first["test_loss"] == pytest.approx(true.square().mean().item(), rel=1e-5)
    assert last["test_loss"] < 2 and last["test_pearson"] > 0.5 and last["test_spearman"] > 0.5
    assert finished.model.head.shape == (1, 16)
    assert "squared error" in capsys.readouterr().out


# ------------------------------------------------------------------- prompts and answers


def test_a_prompt_and_its_answer_train_on_the_answer_and_are_scored_as_greedy_writing(home, capsys):
    kinds = [(word, kind) for kind, words in WORDS.items() for word in words]
    rows = [f"{word} {i}\t{kind} {i % 2}" for i in range(20) for word, kind in kinds]
    write_lines("t.tsv", "prompt\tanswer", rows)
    finished = run(f"{TINY} --task t.tsv --method full --steps 60 --batch-size 16 --lr 0.01")
    tokenizer, gpt, end = finished.tokenizer, finished.model.eval(), 0
    answers = {row.texts[0]: row.answer for row in finished.task.rows}
    loss = count = right = 0
    for inputs, targets in finished.examples["test"]:
        known = targets != data.NO_TARGET
        prompt = inputs[: known.int().argmax() + 1].tolist()
        answer = targets[known].tolist()
        assert prompt[-1] == answer[-1] == end
        assert answers[tokenizer.decode(prompt)] == tokenizer.decode(answer)
        logits = gpt(inputs[None])[0, len(prompt) - 1 :]  # all that predict the answer
        loss += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
        right += model.generate(gpt, prompt, len(answer), top_k=1)[len(prompt) :] == answer
    last = finished.log[-1]
    assert last["test_loss"] == pytest.approx(loss / count, rel=1e-4)
    assert last["test_exact_match"] == pytest.approx(right / len(finished.examples["test"]))
    assert 0.1 < last["test_exact_match"] < 0.9
    told = capsys.readouterr().out.partition("after adapting")[2]
    assert f"perplexity {math.exp(last['test_loss']):.2f}, exact match" in told
    assert told.count("\nprompt  ") == told.count("\nanswer  ") == told.count("\ngenerated  ") == 3


def test_an_answer_longer_than_the_context_leaves_half_of_it_to_the_prompt(tokenizer):
    write_lines("t.tsv", "prompt\tanswer", [f"{'rank ' * 30}{i}\t{'time ' * 30}" for i in range(9)])
    _, examples, told = examples_of("t.tsv", tokenizer)
    for inputs, targets in examples["train"]:
        assert len(inputs) == 16 and (targets != data.NO_TARGET).sum() == 8
    assert "9 cut to 16 tokens" in told


def test_the_texts_of_a_meaning_of_e2e_stay_in_one_split(tokenizer):
    rows = [f"name : {i // 3}|| text {i} || more. \r" for i in range(60)] + ["", " "]
    write_lines("e2e.txt", None, rows)
    task, examples, _ = examples_of("e2e.txt", tokenizer, 64)
    row = task.rows[4]
    assert (task.kind, row.texts, row.answer) == ("text", ("name : 1",), "text 4 || more.")
    meanings = []
    for rows in examples.values():
        prompts = [i[: (t >= 0).int().argmax()] for i, t in rows]
        meanings.append({tokenizer.decode(prompt.tolist()) for prompt in prompts})
    assert sum(map(len, meanings)) == len(set.union(*meanings)) == 20
    write_lines("e2e.txt", None, ["a||b", "no text||"])
    with pytest.raises(ValueError, match=r"^task e2e.txt: line 2 is not meaning\|\|text"):
        data.load_task("e2e.txt")


def write_squad(passage: str, answers: list, question: str = "where?") -> None:
    articles = []
    for i in range(20):
        qas = [{"id": str(i), "question": question, "answers": answers}]
        articles.append({"paragraphs": [{"context": f"{passage} {i}", "qas": qas}]})
    Path("squad.json").write_text(json.dumps({"data": articles}), encoding="utf-8")


def test_a_passage_of_squad_is_cut_to_the_answer_in_training_and_to_its_start_in_evaluation(
    tokenizer,
):
    passage = "é😀 " * 20 + "the rank is here " + "and more " * 20
    for start, answers in ((60, "the rank"), (77, "and"), (None, "unanswerable")):
        found = [] if start is None else [{"text": answers, "answer_start": start}]
        write_squad(passage, found)
        task, examples, told = examples_of("squad.json", tokenizer, 48)
        assert "20 cut to 48 tokens" in told
        assert {row.answer for row in task.rows} == {answers}
        for split, rows in examples.items():
            for inputs, targets in rows:
                known = targets != data.NO_TARGET
                read = tokenizer.decode(inputs[: known.int().argmax()].tolist())
                assert read.endswith("where?")
                assert read.startswith("é😀 é😀") == (split != "train" or start is None)
                assert (answers in read) == (split == "train" and start is not None)
                assert tokenizer.decode(targets[known].tolist()) == answers
    _, examples, told = examples_of("squad.json", tokenizer, 512)
    assert "0 cut to 512 tokens" in told
    write_squad("é the rank", [{"text": "rank", "answer_start": 7}])  # counted in bytes
    assert {row.answer_start for row in data.load_task("squad.json").rows} == {6}


@pytest.mark.parametrize(
    "passage, answers, question",
    [
        ("the rank", [{"text": "them", "answer_start": 0}], "where?"),
        ("the rank", [{"text": "the", "answer_start": "0"}], "where?"),
        ("the rank", [{"text": "", "answer_start": 0}], "where?"),
        ("the rank", {"text": ["the"], "answer_start": [0]}, "where?"),  # datasets' own layout
        ("the rank", [], None),
    ],
)
def test_what_is_not_squad_is_one_line(home, passage, answers, question):
    write_squad(passage, answers, question)
    with pytest.raises(ValueError, match="^task squad.json: not SQuAD's JSON, or cut short"):
        data.load_task("squad.json")
    whole = Path("squad.json").read_text()
    Path("squad.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="^task squad.json: not SQuAD's JSON, or cut short"):
        data.load_task("squad.json")


# --------------------------------------------------------------------- folders of GPT-2


def change_json(path: str, **changes) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def test_a_tokenizer_forgets_truncation_and_padding_and_an_end_tokens_letters_are_letters(home):
    publish_gpt2("tiny")
    text = "the rank of the core grows <|endoftext|> and more"
    plain = train.open_base(model.load_gpt2("tiny"), "tiny")[0].encode(text).ids
    again = data.Tokenizer.from_file("tiny/tokenizer.json")
    again.enable_truncation(4)
    again.enable_padding(length=64)
    again.save("tiny/tokenizer.json")
    assert train.open_base(model.load_gpt2("tiny"), "tiny")[0].encode(text).ids == plain
    assert len(plain) > 20 and data.end_token(again) not in plain


def test_another_end_token_ends_texts_and_none_is_refused(home, capsys):
    publish_gpt2("tiny")
    words = Path("tiny/tokenizer.json").read_text()
    line = f"{TEXT} --base tiny --context 8"
    for name in ("</s>", "<over>"):
        Path("tiny/tokenizer.json").write_text(words.replace("<|endoftext|>", name))
        finished = run(line)
        assert 0 in finished.examples["train"].tokens and data.end_token(finished.tokenizer) == 0
    none = words.replace("<|endoftext|>", "<over>").replace('"special": true', '"special": false')
    none = none.replace('"special":true', '"special":false')
    Path("tiny/tokenizer.json").write_text(none)
    assert "its tokenizer has no token that ends a text" in refusal(line, capsys)


@pytest.mark.parametrize(
    "key, value",
    [
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-12),
        ("n_inner", 40),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("model_type", "gpt_neo"),
    ],
)
def test_a_key_that_would_change_the_function_is_refused_by_name_and_value(home, key, value):
    publish_gpt2("tiny")
    same = {"n_inner": 48, "reorder_and_upcast_attn": True, "layer_norm_epsilon": 1e-5}
    change_json("tiny/config.json", **same)
    model.load_gpt2("tiny")
    change_json("tiny/config.json", **{key: value})
    with pytest.raises(ValueError, match=f"^base tiny: config.json has {key} {value}, and only"):
        model.load_gpt2("tiny")


@pytest.mark.parametrize(
    "weights, said",
    [
        ({"score.weight": torch.ones(2, 12)}, "score.weight is of another kind of model"),
        ({"lm_head.weight": torch.ones(300, 12)}, "its lm_head is not the token embedding"),
        ({"h.0.mlp.c_fc.weight": torch.ones(12, 47)}, "weights do not fit"),
        ({"model": {}}, "holds something else than tensors"),
        ([], "holds something else than tensors"),
        ({}, "its weights have no wte.weight"),
        (b"version https://git-lfs.github.com/spec/v1\noid 1", "only points to it; run git lfs"),
        (b"PK", "not weights that can be read"),
        ("shards", "its weights are in several shards"),
        ("tokenizer", "its tokenizer has 320 tokens and its model 300"),
        ("letter", "tokenizer.json is not UTF-8 text"),
        ("heads", "config.json has sizes that no GPT-2 has: .*heads=5, width=12"),
    ],
)
def test_a_folder_that_is_no_plain_gpt2_is_one_line_that_says_what_it_is(
    home, capsys, weights, said
):
    path = Path("tiny/pytorch_model.bin")
    named = publish_gpt2("tiny")
    if isinstance(weights, bytes):
        path.write_bytes(weights)
    elif weights == "shards":
        path.rename("tiny/pytorch_model-00001-of-00002.bin")
        Path("tiny/pytorch_model.bin.index.json").touch()
    elif weights == "tokenizer":
        larger = data.train_tokenizer(["more and more words of all kinds"] * 9, 320)
        larger.add_tokens([f"word {i}" for i in range(320 - larger.get_vocab_size())])
        larger.save("tiny/tokenizer.json")
    elif weights == "letter":
        words = Path("tiny/tokenizer.json").read_bytes()
        Path("tiny/tokenizer.json").write_bytes(words[: words.index("Ġ".encode()) + 1])
    elif weights == "heads":
        change_json("tiny/config.json", n_head=5)
    else:
        torch.save(named | weights if weights else weights, path)
    assert re.search(f"--base tiny.*{said}", refusal(f"{TEXT} --base tiny --context 8", capsys))


# --------------------------------------------------------------------- trust, and no loss


def test_resume_refuses_other_rows_text_weights_or_tokenizer_under_the_old_name(home, capsys):
    run(f"{TEXT} --rank 2 --out text")
    run(f"{TASK} --rank 2 --out task")
    base = torch.load("base.pt", weights_only=True)
    table = Path("task.tsv").read_text().splitlines()
    words = json.loads(base["tokenizer"])
    words["model"]["merges"] = words["model"]["merges"][:-1]
    weights = base["model"] | {"wpe.weight": base["model"]["wpe.weight"] + 1e-6}
    changes = [
        ("task", "content of task.tsv", "task.tsv", [table[0], "a new one\tsize", *table[1:]]),
        ("task", "content of task.tsv", "task.tsv", [table[0], *sorted(table[1:])]),
        ("text", "content of text.txt", "text.txt", ["x" + Path("text.txt").read_text()[1:]]),
        ("text", "weights of base.pt", "base.pt", base | {"model": weights}),
        ("task", "tokenizer of base.pt", "base.pt", base | {"tokenizer": json.dumps(words)}),
    ]
    for folder, what, file, content in changes:
        before = Path(file).read_bytes()
        if isinstance(content, dict):
            torch.save(content, file)
        else:
            write_lines(file, None, content)
        said = refusal(f"--resume {folder}", capsys)
        assert f"--resume {folder}: the {what} changed since then" in said
        Path(file).write_bytes(before)
        run(f"--resume {folder}")


def test_a_full_disk_is_one_line_and_leaves_old_files_whole_and_nothing_else(home, capsys):
    resource = pytest.importorskip("resource")
    run(TEXT)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file can get longer than the old adapter
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[Path("out/adapter.pt")]), limits[1]))
        assert "out/checkpoint.pt: can't be written (File too large)" in refusal(TEXT, capsys)
        assert "merged.pt: can't be" in refusal("--resume out --merge merged.pt", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {*Path("out").iterdir()} == {*before} and not [*Path().glob("*merged*")]
    assert Path("out/checkpoint.pt").read_bytes() == before[Path("out/checkpoint.pt")]
    torch.load("out/adapter.pt", weights_only=True)


def test_a_second_run_into_a_folder_needs_no_rename_that_replaces(home, monkeypatch):
    def windows(source, target, **_):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists")

    monkeypatch.setattr(os, "rename", windows)
    run(f"{TEXT} --out a")
    run(f"{TEXT} --out b --seed 1")
    run(f"{TEXT} --out a --seed 1")
    assert_same_bits("a", "b")


@pytest.mark.parametrize("name", ["a$b_{$ 100%.txt", "天 bytes\udcff.txt"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_name_of_any_letters_survives_console_files_and_figure(home, capsys, name):
    Path("text.txt").rename(name)
    finished = run(f"{TINY} --data '{name}' --out 'out of {name}'")
    assert draw_run(finished.log).startswith(b"\x89PNG")
    run(f"--resume 'out of {name}'")


def python_code(code: str, **environment) -> subprocess.CompletedProcess:
    """This code with the project importable, as a process of its own."""
    environment = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | environment
    fast = "train.draw_run = lambda log: b''"
    command = [sys.executable, "-c", f"import os, signal, train\n{fast}\n{code}"]
    return subprocess.run(command, capture_output=True, env=os.environ | environment)


def test_files_are_utf8_and_the_console_lives_whatever_the_locale_says(home):
    publish_gpt2("tiny")
    text = "Строка: съешь ещё этих мягких булок, да выпей чаю.\n" * 100
    Path("text.txt").write_text(text, encoding="utf-8")
    line = f"{TEXT} --base tiny --context 8".split()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python_code(f"train.main({line})", **ascii_only, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    log = Path("out/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[-1])["sample"].isprintable() is False and b"?" in done.stdout


def test_a_rank_without_a_world_size_is_one_process():
    assert python_code("print(train.PROCESS, train.WORLD)", RANK="3").stdout.split() == [b"0", b"1"]


KILLED = """
def write_bytes(path, content, write=train.Path.write_bytes, calls=[]):
    calls.append(path)
    if len(calls) == LAST:
        write(path, bytes(content)[:99])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

train.Path.write_bytes = write_bytes
"""


@pytest.mark.parametrize("write", [5, 6, 10])
def test_a_run_killed_while_it_writes_a_file_resumes_to_the_same_bits(home, write):
    """After 8 steps it writes three files, after 16 three, then the picture and three."""
    run(f"{TEXT} --out whole")
    assert (
        python_code(f"LAST = {write}{KILLED}train.main({TEXT.split()})").returncode
        == -signal.SIGKILL
    )
    run("--resume out")
    assert_same_bits("whole", "out")
    assert Path("out/adapter.pt").read_bytes() == Path("whole/adapter.pt").read_bytes()
    assert Path("out/run.png").exists() and '"end"' in Path("out/log.jsonl").read_text()


# ------------------------------------------------------------------------- forks and README


class GradientNorm(RankAllocator):
    """A fork's signal: the norm of B's gradient."""

    def scores(self):
        return {name: a.lora_B.grad.norm().item() for name, a in self.adapters.items()}


class DoRALinear(TriAdaptLinear):
    """A fork: DoRA (Liu et al. 2024) trains the length of each row of W apart from the rest."""

    def __init__(self, base, rank, scale, dropout=0.0):
        super().__init__(base, rank, scale, dropout)
        self.lora_magnitude = nn.Parameter(base.weight.detach().norm(dim=1))  # (d_out,)

    @property
    def weight(self):
        return self.lora_magnitude[:, None] * F.normalize(super().weight, dim=1)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def test_a_forks_tensor_that_does_not_grow_and_its_signal_from_gradients_train_resume_and_merge(
    home, monkeypatch
):
    monkeypatch.setitem(METHODS, "dora", DoRALinear)
    monkeypatch.setitem(SIGNALS, "gradient", GradientNorm)
    line = f"{TEXT} --method dora --score gradient --rank 4"
    finished = run(line)
    cut_and_resume(line, 11, monkeypatch)
    assert_same_bits("out", "moved")
    assert finished.log[-1]["total_rank"] == 4 * 6
    first = next(entry for entry in finished.log if entry["kind"] == "allocation")
    assert min(first["score"].values()) > 0
    adapter = finished.adapters["blocks.0.q"]
    adapter.grow(1, finished.optimizer)
    assert adapter.lora_B.grad is None  # until the next backward pass
    assert not torch.allclose(adapter.lora_magnitude, adapter.base.weight.norm(dim=1), rtol=1e-3)
    ids = torch.randint(270, (2, 16))
    unmerged = finished.model.eval()(ids)
    torch.testing.assert_close(merge_adapters(finished.model)(ids), unmerged, rtol=1e-5, atol=1e-5)


def readme_code(marker: str) -> str:
    """The Python block that follows <!-- marker --> in README.md."""
    pattern = rf"<!-- {marker} -->\n```python\n(.*?)```"
    return re.search(pattern, (HERE / "README.md").read_text(), re.DOTALL).group(1)


def test_readme_own_model_grows_to_the_budget_loads_and_its_attention_reads_adapted_weights(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    setup, optimizer, loop = readme_code("own model").partition("optimizer =")
    exec(setup, names)
    fresh = copy.deepcopy(names["model"]).eval()
    exec(optimizer + loop, names)
    load_adapter_state_dict(fresh, torch.load("adapter.pt", weights_only=True))
    adapters, allocator = names["adapters"], names["allocator"]
    assert len(adapters) == 6
    assert allocator.total_rank == allocator.budget == 24
    assert {adapter.rank for adapter in adapters.values()} != {4}
    net, x = names["model"].eval(), names["x"]
    output = net(x)
    assert F.mse_loss(output, names["y"]) < 1.5
    assert torch.equal(fresh(x), output)
    # torch's attention, and without gradients its whole encoder, never call their Linears.
    assert all(p.grad.any() for p in trained(net))
    with torch.no_grad():
        torch.testing.assert_close(net(x), output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merge_adapters(net)(x), output, rtol=1e-4, atol=1e-5)


def test_readme_shows_lines_of_the_method_as_they_are():
    def code_of(text):  # without comments
        return {line.partition("  #")[0].strip() for line in text.splitlines()}

    real = code_of((HERE / "triadapt.py").read_text())
    for line in code_of(readme_code("method")):
        name = re.match(r"(def|class) \w+", line)  # shown without annotations
        assert line in real or (name and any(known.startswith(name[0]) for known in real)), line


def test_readme_fork_trains_grows_saves_and_draws(home):
    Path("diagonal.py").write_text(readme_code("fork"))
    done = python("diagonal.py", *TEXT.split(), "--method", "diagonal", "--rank", "4")
    assert done.returncode == 0, done.stderr
    log = read_log("out")
    assert log[-1]["total_rank"] == 4 * 6 > log[0]["total_rank"]
    assert Path("out/run.png").stat().st_size > 10_000
    saved = torch.load("out/adapter.pt", weights_only=True)
    assert len(saved["blocks.0.q.lora_E"]) == log[-1]["ranks"]["blocks.0.q"]


# ----------------------------------------------------------------------- other people's models


class Conv1D(nn.Module):
    """As in transformers' GPT-2: x W + b, with W (d_in, d_out)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.ones(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def shake(adapters: dict) -> None:
    """Uneven ranks and random numbers, as after a training."""
    for i, adapter in enumerate(adapters.values()):
        adapter.grow(i % 3 + 1)
        for name in adapter.GROWS_ALONG:
            nn.init.normal_(getattr(adapter, name), std=0.3)


def train_load_merge(net, targets, x, tolerance=1e-5):
    """Trains with growth and merges; loading what was saved, and merging, keep the outputs."""
    base = net.eval()(x)
    adapters = add_adapters(net, targets, rank=3, init_rank=2)
    fresh = copy.deepcopy(net)
    optimizer = adamw(net.train())
    settings = {"target_rank": 3, "total_steps": 6, "warmup": 1, "interval": 1}
    allocator = allocator_of(adapters, optimizer, **settings)
    for t in range(1, 7):
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()
        allocator.step(t)
    assert allocator.total_rank == allocator.budget
    output = net.eval()(x)
    load_adapter_state_dict(fresh, adapter_state_dict(net))
    assert torch.equal(fresh(x), output)
    for name, buffer in net.named_buffers():
        assert torch.equal(fresh.get_buffer(name), buffer)
    merge_adapters(net)
    assert (net(x) - output).norm() < tolerance * output.norm()
    assert (base - output).norm() > 3 * tolerance * output.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_a_conv1d_trains_grows_loads_and_merges_into_a_conv1d(device, dtype, tolerance):
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(10, 6), nn.Tanh(), Conv1D(5, 10)).to(device, dtype)
    train_load_merge(net, ["0", "2"], torch.randn(2, 7, 6).to(device, dtype), tolerance)
    assert type(net[0]) is type(net[2]) is Conv1D


def test_statistics_that_change_without_a_gradient_are_saved_and_loaded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    net.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))  # is allowed to be infinite
    train_load_merge(net, ["0", "3"], 3 * torch.randn(64, 8) + 2)


def hub_model(kind: str) -> nn.Module:
    """A tiny one of transformers, which need not be installed."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "GPT2LMHeadModel": {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        "LlamaForCausalLM": {"num_attention_heads": 4, "num_key_value_heads": 2},
        "BertForSequenceClassification": {"num_attention_heads": 4, "num_labels": 3},
    }[kind]
    if kind != "GPT2LMHeadModel":
        settings |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = getattr(transformers, kind)
    torch.manual_seed(0)
    return model(model.config_class(vocab_size=60, tie_word_embeddings=False, **settings))


class Logits(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.model = hub_model(kind)

    def forward(self, ids):
        return self.model(ids).logits


def test_gpt2_of_transformers_trains_grows_loads_and_merges_into_conv1d():
    net = Logits("GPT2LMHeadModel")
    train_load_merge(net, "c_attn|c_proj|c_fc", torch.arange(18).view(2, 9))
    layer = net.model.transformer.h[1].mlp.c_fc
    assert type(layer).__module__ == "transformers.pytorch_utils"


class Own(nn.Linear):
    pass


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class GivesInputBack(nn.Linear):
    def forward(self, x):
        return x


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    return layer


def replaced(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) - 1  # as accelerate's hooks do
    return layer


LINEAR_AFTER_ALL = {
    "subclass": lambda: Own(8, 8),
    "own forward": lambda: Doubled(8, 8, bias=False),
    "gives its input back": lambda: GivesInputBack(8, 8),
    "weight_norm of old": lambda: nn.utils.weight_norm(nn.Linear(8, 8)),
    "spectral_norm of old": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "pruned": lambda: pruned(nn.Linear(8, 8, bias=False)),
    "pruned Conv1D": lambda: pruned(Conv1D(8, 8)),
    "hook": lambda: hooked(nn.Linear(8, 8)),
    "hook on Conv1D": lambda: hooked(Conv1D(8, 8)),
    "forward of the instance": lambda: replaced(nn.Linear(8, 8)),
}


@pytest.mark.filterwarnings("ignore")  # the old norms are deprecated
@pytest.mark.parametrize("kind", LINEAR_AFTER_ALL)
def test_a_layer_that_computes_its_weight_starts_as_it_was_trains_and_merges_into_a_linear(kind):
    torch.manual_seed(0)
    net = nn.Sequential(LINEAR_AFTER_ALL[kind](), nn.Tanh(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 5, 8)
    given = x.clone()
    base = net(x).detach()
    adapters = add_adapters(net, ["0"], rank=3, init_rank=2, dropout=0.5)
    net.eval()
    assert torch.equal(net(x), base)
    shake(adapters)
    output = net(x)
    output.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(net))
    assert torch.equal(x, given)
    net.train()
    merge_adapters(net).eval()
    assert isinstance(net[0], nn.Linear) and {*net[0]._parameters} == {"weight", "bias"}
    assert not trained(net)
    torch.testing.assert_close(net(x), output, rtol=1e-4, atol=1e-5)


class Relu(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class AlmostLinear(nn.Linear):
    def forward(self, x):
        return (0.01 * super().forward(x)).tanh()


class SeldomRelu(nn.Linear):
    def forward(self, x):
        return (super().forward(x) + 20).relu()


class OverTime(nn.Linear):
    def forward(self, x):
        return super().forward(x).cumsum(dim=-2)


@pytest.mark.parametrize("kind", [Relu, AlmostLinear, SeldomRelu, OverTime])
def test_a_layer_that_is_not_linear_is_adapted_and_merging_refuses_and_changes_nothing(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), kind(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 3, 8)
    base = net(x)
    adapters = add_adapters(net, "[0-2]", rank=3, init_rank=2)
    assert torch.equal(net(x), base)
    nn.init.normal_(adapters["0"].lora_B)
    output = net(x)
    with pytest.raises(ValueError, match=f"^{kind.__name__}: [^\n]*can't be merged$"):
        merge_adapters(net)
    assert [*net] == [*adapters.values()]
    assert net.training and torch.equal(net(x), output)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_of_bitsandbytes_starts_as_it_was_trains_and_merges_into_a_linear(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 64).bfloat16()
    packed = bnb.nn.Linear4bit(64, 64)
    if bits == 8:
        packed = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    packed.load_state_dict(plain.state_dict())
    packed.bias = plain.bias
    net = nn.Sequential(packed.to("cpu"))
    x = torch.randn(3, 64).bfloat16()
    base = net(x)
    adapters = add_adapters(net, ["0"], rank=6, init_rank=2)
    assert torch.equal(net(x), base)
    shake(adapters)
    output = net(x)
    output.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(net))
    assert type(merge_adapters(net)[0]) is nn.Linear
    assert (net(x) - output).norm() < 0.02 * output.norm()  # 8 bits of an input


def test_an_output_that_others_hold_is_not_added_to():
    held = []

    def keep(module, args, output):
        held.append(output)

    def ask_for_gradient(module, args, output):
        output.requires_grad_()  # a leaf, if nothing before it is trained
        held.append(output)

    layer = nn.Linear(8, 8)
    linears = [copy.deepcopy(layer) for _ in range(4)]
    linears[0].register_forward_hook(keep)
    linears[1].register_forward_hook(ask_for_gradient)
    forward = linears[2].forward
    linears[2].forward = lambda x: held.append(forward(x)) or held[-1]
    linears[3].register_full_backward_hook(lambda module, before, after: held.append(layer(x)))
    x = torch.randn(2, 3, 8)
    for linear in linears:
        net = nn.Sequential(linear)
        adapters = add_adapters(net, ["0"], rank=2)
        nn.init.ones_(adapters["0"].lora_B)
        net(x.clone().requires_grad_(linear is linears[3])).sum().backward()
        assert adapters["0"].lora_A.grad.abs().sum() > 0
        torch.testing.assert_close(held.pop(), layer(x))


def count_dense(monkeypatch) -> list:
    made = []
    delta_weight = LoRALinear.delta_weight
    monkeypatch.setattr(LoRALinear, "delta_weight", lambda a: made.append(a) or delta_weight(a))
    return made


def test_a_weights_type_shape_and_device_make_no_dense_matrix(monkeypatch):
    made = count_dense(monkeypatch)
    for layer in (nn.Linear(6, 5), Conv1D(5, 6)):
        layer.bfloat16()
        net = nn.Sequential(layer)
        adapter = add_adapters(net, ["0"], rank=2)["0"]
        nn.init.ones_(adapter.lora_B)
        weight = net[0].weight
        assert weight.dtype == torch.bfloat16
        assert weight.shape == layer.weight.shape and weight.device.type == "cpu"
        assert made == []
        delta = adapter.delta_weight().T if type(layer) is Conv1D else adapter.delta_weight()
        assert torch.equal(weight + 0, (layer.weight + delta).bfloat16())
        made.clear()


def test_writing_to_the_weight_of_an_adapter_is_refused_not_lost():
    net, _ = adapted()
    with pytest.raises(RuntimeError, match="^zero_: would be lost; write to base.weight"):
        nn.init.zeros_(net.first.weight)


def test_a_frozen_tensor_grows_without_the_optimizer_and_costs_no_numbers():
    net, adapters = adapted()
    for adapter in adapters.values():
        adapter.lora_A.requires_grad_(False)  # LoRA-FA
    optimizer = adamw(net)
    allocator = allocator_of(adapters, optimizer, target_rank=3, count_numbers=True, interval=1)
    for t in range(1, 21):
        fit(net, optimizer)
        allocator.step(t)
    assert 0 <= allocator.budget_left < min(allocator.price(name, 1) for name in adapters)
    assert not any(adapter.lora_A.requires_grad for adapter in adapters.values())
    assert len(optimizer.state_dict()["state"]) == len(trained(net)) == 6


def test_t5_which_asks_for_a_type_in_each_forward_makes_no_dense_matrix(monkeypatch):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)
    net = transformers.T5ForConditionalGeneration(config)
    add_adapters(net, ["wi", "wo", "q"], rank=2)
    made = count_dense(monkeypatch)
    ids = torch.arange(9)[None]
    net(input_ids=ids, labels=ids).loss.backward()
    assert made == []


def test_an_optimiser_that_lost_an_adapter_is_told_at_the_next_step_also_where_none_grows():
    for t in (1, 4):  # 1 is in the warm-up
        net, adapters = adapted()
        optimizer = adamw(net)
        allocator = allocator_of(adapters, optimizer)
        adapters["second"].grow(1)  # without the optimizer
        with pytest.raises(ValueError, match="^optimizer: it lacks tensors of second"):
            allocator.step(t)


def test_adapters_that_were_loaded_without_the_allocators_state_are_told():
    net, adapters = adapted()
    optimizer = adamw(net)
    allocator = allocator_of(adapters, optimizer)
    for t in range(1, 9):
        fit(net, optimizer)
        allocator.step(t)
    for forgotten in (True, False):
        other, other_adapters = adapted()
        optimizer = adamw(other)
        resumed = allocator_of(other_adapters, optimizer)
        load_adapter_state_dict(other, adapter_state_dict(net), optimizer)
        if not forgotten:
            resumed.load_state_dict(allocator.state_dict())
        with pytest.raises(ValueError, match="state_dict after") if forgotten else nullcontext():
            resumed.step(9)


# --------------------------------------------------------------------------------- export_lora


def assert_peft_agrees(net, plain, x, folder):
    """The files of net on the base `plain`: the same outputs, also after peft's own merging."""
    peft = pytest.importorskip("peft")
    export_lora(net.eval(), folder, base="there")

    def output(model):
        result = model(x)
        return result if torch.is_tensor(result) else result.logits

    expected = output(net)
    assert (output(plain.eval()) - expected).abs().max() > 0.01
    served = peft.PeftModel.from_pretrained(plain, folder).eval()
    torch.testing.assert_close(output(served), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output(served.merge_and_unload()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("LlamaForCausalLM", "q_proj|v_proj|down_proj"),
        ("BertForSequenceClassification", "query|dense"),
        ("GPT2LMHeadModel", "c_attn|c_proj|c_fc|lm_head"),
    ],
)
def test_peft_reads_the_files_and_computes_the_same_logits(kind, targets, tmp_path):
    plain = hub_model(kind)
    net = copy.deepcopy(plain)
    shake(add_adapters(net, targets, rank=7, init_rank=2, alpha=5))
    if kind.startswith("Bert"):
        nn.init.normal_(net.classifier.requires_grad_(True).weight)
    assert_peft_agrees(net, plain, torch.arange(18).view(2, 9), tmp_path)
    config = json.loads(Path(tmp_path, "adapter_config.json").read_text())  # for other tools
    assert config["fan_in_fan_out"] == kind.startswith("GPT2")
    assert config["modules_to_save"] == (["classifier"] if kind.startswith("Bert") else None)


def names_that_end_alike(inner: nn.Module) -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(inner))
    net.add_module("norm", nn.BatchNorm1d(8))
    return net


@pytest.mark.parametrize("inner", [nn.Linear(8, 8), nn.Tanh()])
def test_names_that_end_alike_are_told_apart_and_statistics_are_exported(inner, tmp_path):
    plain = names_that_end_alike(inner)
    net = copy.deepcopy(plain)
    shake(add_adapters(net, "0", rank=6, init_rank=2))
    x = torch.randn(5, 8)
    net(x)  # moves the statistics
    assert_peft_agrees(net, plain, x, tmp_path)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.ones(8))


def test_what_lora_files_cannot_hold_is_refused_in_one_line(tmp_path):
    pytest.importorskip("safetensors")
    attention = nn.ModuleDict({"self": nn.MultiheadAttention(8, 2)})
    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    for net, targets, thaw, said in [
        (attention, "out_proj", None, "self.out_proj: nn.MultiheadAttention never calls it"),
        (Tied(), "last", None, "first.weight: another module shares it"),
        (computed, ["0"], None, "0: its weight is computed"),
        (Gated(), "q", "gate", "the model itself: is trained, too"),
        (nn.Sequential(Gated()), "q", "0.gate", "0: is trained, too"),
        (Gated(), "q", "q.base.bias", "q.base: is trained, too"),
    ]:
        add_adapters(net, targets, rank=2)
        if thaw is not None:
            net.get_parameter(thaw).requires_grad_(True)
        with pytest.raises(ValueError, match=f"^{said}[^\n]*$"):
            export_lora(net, tmp_path / "new")
    with pytest.raises(ValueError, match="^the model has no adapters to export$"):
        export_lora(Gated(), tmp_path / "new")
    fork = nn.Sequential(DoRALinear(nn.Linear(8, 8), 2, 1.0))
    with pytest.raises(ValueError, match="^0: DoRALinear is more than B A x"):
        export_lora(fork, tmp_path / "new")
    assert not Path(tmp_path, "new").exists()


def test_older_files_are_replaced_and_all_stay_whole_if_one_cannot_be_written(
    tmp_path, monkeypatch
):
    pytest.importorskip("safetensors")
    net, adapters = adapted()

    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    export_lora(net, tmp_path)
    first = files()
    adapters["first"].grow(1)
    write = Path.write_bytes

    def full_disk(path, content):
        write(path, content[:9])
        if "config" in path.name:
            raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "write_bytes", full_disk)
        export_lora(net, tmp_path)
    assert files() == first
    export_lora(net, tmp_path)
    assert files().keys() == first.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(content != first[name] for name, content in files().items())


# ----------------------------------------------------------------------------------- Trainer


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(6, 10)
        self.v_proj = nn.Linear(10, 5)

    def forward(self, x, labels):
        logits = self.v_proj(self.q_proj(x).tanh())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer_run(tmp_path, **settings):
    """README's block, 10 steps of two batches: its allocator, model, and batches as they came."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = Head()
    adapters = add_adapters(model, ["q_proj", "v_proj"], rank=4, init_rank=2)
    settings |= {"use_cpu": True, "save_strategy": "no", "report_to": []}
    settings |= {"max_steps": 10, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    args = transformers.TrainingArguments(str(tmp_path), **settings)
    rows = [{"x": torch.randn(6), "labels": i % 5} for i in range(160)]
    growth = {"target_rank": 4, "warmup": 2, "interval": 1}
    names = {"model": model, "adapters": adapters, "settings": growth, "args": args, "rows": rows}
    batches = []
    model.register_forward_pre_hook(
        lambda module, args, batch: batches.append(batch), with_kwargs=True
    )
    made = []

    def allocator(*parts, **own):
        made.append(RankAllocator(*parts, **own))
        return made[-1]

    names |= {"transformers": transformers, "RankAllocator": allocator}
    exec(readme_code("trainer"), names)
    return made[0], model, batches


def test_under_the_trainer_ranks_and_numbers_are_those_of_a_loop_by_hand(tmp_path, monkeypatch):
    step = RankAllocator.step

    def seeded(allocator, t):  # what a new rank starts as
        torch.manual_seed(t)
        return step(allocator, t)

    monkeypatch.setattr(RankAllocator, "step", seeded)
    allocator, model, batches = trainer_run(tmp_path)
    assert len(batches) == 20 and allocator.total_rank == allocator.budget

    net = Head()
    adapters = add_adapters(net, ["q_proj", "v_proj"], rank=4, init_rank=2)
    optimizer = torch.optim.AdamW(trained(net), weight_decay=0.0, fused=True)
    by_hand = allocator_of(adapters, optimizer, total_steps=10, warmup=2, interval=1)
    for t in range(1, 11):
        optimizer.zero_grad()
        for batch in batches[2 * t - 2 : 2 * t]:
            (net(**batch)["loss"] / 2).backward()
        nn.utils.clip_grad_norm_(trained(net), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * ((11 - t) / 10)
        optimizer.step()
        by_hand.step(t)
    expected = adapter_state_dict(net)
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, expected[name]), name


def test_under_the_trainers_mixed_precision_the_budget_is_reached_and_all_is_finite(tmp_path):
    allocator, model, _ = trainer_run(tmp_path, bf16=True)
    assert allocator.total_rank == allocator.budget
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert all(p.isfinite().all() and p.any() for p in trained(model))
