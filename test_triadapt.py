"""The promises of this project, one test each: pytest -q

Growth is tested on the smallest Linear that can break it, training on a GPT of a few thousand
parameters. In order: the method, the model and the data, the script, forks and README.
"""

import copy
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
from pathlib import Path

import pytest
import torch
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
    RankAllocator,
    TriAdaptLinear,
    adapter_state_dict,
    add_adapters,
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
    with pytest.raises(ValueError, match="score nan of 1"):
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


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: adapted(rank=0), "rank 0: must be 1"),
        (lambda: adapted(init_rank=5), "init_rank 5: must be from 1 to the rank, 4"),
        (lambda: adapted(dropout=1.0), "dropout 1.0"),
        (lambda: adapted(method="dora"), "method dora: must be one of lora, triadapt"),
        (lambda: adapted(targets=["first", "cond"]), "targets cond: .* first, second"),
        (lambda: adapted(targets="("), r"targets \(: not a regular expression"),
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


def test_readme_own_model_grows_to_the_budget_loads_and_its_attention_reads_adapted_weights():
    torch.manual_seed(0)
    names = {}
    exec(readme_code("own model"), names)
    adapters, allocator = names["adapters"], names["allocator"]
    assert len(adapters) == 6
    assert allocator.total_rank == allocator.budget == 24
    assert {adapter.rank for adapter in adapters.values()} != {4}
    net, fresh, x = names["model"].eval(), names["fresh"].eval(), names["x"]
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
