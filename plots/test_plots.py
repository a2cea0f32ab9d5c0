"""The promises of plots/: signals, experiments, figures, tables and pages. pytest -q

Experiments run in a temporary folder, on a base of a few thousand parameters.
"""

import copy
import io
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data
import train
from model import GPT, GPTConfig
from plots import signals
from plots.experiments import (
    ablations,
    adalora,
    bases,
    bench,
    blind,
    cells,
    evidence,
    minilm,
    planted,
    saves,
    time_to_loss,
)
from plots.figures import animate, contrasts, draw, intervals, tables
from plots.run import draw_ranks
from triadapt import SCHEDULES, SIGNALS, RankAllocator, TriAdaptLinear, add_adapters

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

TINY = ["--base", "base.pt", "--data", "text.txt", "--device", "cpu"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder with a text and a tiny base model in it.

    Runs draw no figure and write no sample, which would take most of their time.
    """
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    words = ["tri", "angle", "rank", "grows", "the", "a", "lower", "upper", "core", "of"]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(120)]
    Path("text.txt").write_text("\n".join(lines))
    tokenizer = data.train_tokenizer(data.documents("text.txt"), 300)
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.get_vocab_size(), context=16, layers=2, heads=2, width=16)
    base = {"config": asdict(config), "tokenizer": tokenizer.to_str()}
    torch.save(base | {"model": GPT(config).state_dict()}, "base.pt")
    monkeypatch.setattr(train, "draw_run", lambda log: b"")
    monkeypatch.setattr(train.model, "generate", lambda gpt, ids: ids)
    return tmp_path


@pytest.fixture
def sweep(home, monkeypatch, capsys):
    """A function that runs an experiment's main into cells.jsonl, checks that a second call has
    nothing left to do, and returns the cells."""

    def run(experiment, *arguments: str) -> list[dict]:
        options = [*arguments, "--results", "cells.jsonl"]
        monkeypatch.setattr(sys, "argv", ["experiment", *map(str, options)])
        experiment.main()
        found = cells.read(Path("cells.jsonl"))
        capsys.readouterr()
        experiment.main()
        assert capsys.readouterr().out == ""
        assert len(cells.read(Path("cells.jsonl"))) == len(found)
        return found

    return run


def small_net() -> tuple[nn.Module, dict]:
    """Two Linears of different shapes, with adapters that are trained already."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5, bias=False))
    adapters = add_adapters(net, ["0", "2"], rank=4, init_rank=2)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B)
    return net, adapters


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


ALLOCATION = {"target_rank": 4, "total_steps": 20, "warmup": 2, "interval": 2}
NAMES = ["importance", "random", "uniform", "norm", "norm-change", "sensitivity", "worth"]
ALL_SIGNALS = {name: SIGNALS[name] for name in NAMES}
ALL_SIGNALS["oracle"] = planted.Oracle


# ---------------------------------------------------------------------------------- signals


def test_the_signals_are_choices_of_train_once_they_are_imported():
    assert train.parse_args(["--score", "worth"]).score == "worth"


@pytest.mark.parametrize("name", ALL_SIGNALS)
def test_scores_can_be_asked_for_at_any_time_and_change_nothing(name):
    net, adapters = small_net()
    optimizer = adam(net)
    allocator = ALL_SIGNALS[name](adapters, optimizer, **ALLOCATION)
    for t in range(1, 5):
        before = torch.get_rng_state()
        scores = allocator.scores()  # at first, before any gradient exists
        assert list(scores) == list(adapters)
        assert all(math.isfinite(score) for score in scores.values())
        assert allocator.scores() == scores
        assert torch.equal(torch.get_rng_state(), before)
        optimizer.zero_grad()
        net(torch.randn(7, 6)).square().sum().backward()
        optimizer.step()
        allocator.step(t)


def test_random_growth_differs_between_seeds_and_allocations():
    chosen = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8)))
        adapters = add_adapters(net, [r"\d"], rank=4, init_rank=2)
        for adapter in adapters.values():
            nn.init.normal_(adapter.lora_L)  # as if trained
        allocator = signals.Random(adapters, adam(net), **ALLOCATION)
        first = list(allocator.scores().values())
        adapters["0"].grow(1)
        chosen += [first, list(allocator.scores().values())]
    for one, two in itertools.combinations(chosen, 2):
        assert one != two


def test_the_norm_of_an_update_is_its_formula_and_its_change_begins_anew_after_growth():
    net, adapters = small_net()
    optimizer = adam(net)
    allocator = signals.UpdateNormChange(adapters, optimizer, **ALLOCATION)
    before = {name: a.delta_weight().norm().item() / a.rank for name, a in adapters.items()}
    assert allocator.norms() == pytest.approx(before, rel=1e-5)
    adapters["0"].lora_B.data *= 3
    assert allocator.scores() == pytest.approx({"0": 2 * before["0"], "2": 0.0}, abs=1e-6)
    assert allocator.step(4) == ["0"]
    assert allocator.scores() == {"0": 0.0, "2": 0.0}


def test_worth_is_its_formula_adds_up_over_pieces_and_is_watched_once():
    net, adapters = small_net()
    x = torch.randn(11, 6)
    seen = {}  # name: (input, output)
    for name, adapter in adapters.items():

        def note(module, inputs, output, name=name) -> None:
            seen[name] = inputs[0].detach(), output

        adapter.register_forward_hook(note)
    loss = net(x).square().sum()
    outputs = [output for _, output in seen.values()]
    gradients = torch.autograd.grad(loss, outputs)
    expected = {}
    for (name, adapter), gradient in zip(adapters.items(), gradients, strict=True):
        change = seen[name][0] @ adapter.delta_weight().T  # (tokens, d_out)
        products = (gradient * change).sum(-1).detach()  # (tokens,)
        expected[name] = products.square().sum().item() / 2  # per rank

    optimizer = adam(net)
    old = signals.Worth(adapters, optimizer, **ALLOCATION)
    new = signals.Worth(adapters, optimizer, **ALLOCATION)
    for piece in (x[:4], x[4:]):
        net(piece).square().sum().backward()
    with torch.no_grad():
        net(x)  # an evaluation does not count
    new.step(1)
    assert new.scores() == pytest.approx({n: 0.03 * v for n, v in expected.items()}, rel=1e-4)
    assert old.now == {}
    for adapter in adapters.values():
        assert len(adapter._forward_hooks) == 2  # one of them is this test's


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_in_numbers_is_never_passed_and_spent_but_for_less_than_a_growth(name):
    rng = random.Random(name)
    for _ in range(2):
        sizes = [rng.randint(1, 12) for _ in range(rng.randint(2, 5))]
        net = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
        init_rank = rng.randint(1, 2)
        target = init_rank + rng.randint(1, 3)
        adapters = add_adapters(net, [r"\d"], rank=target, init_rank=init_rank)
        optimizer = adam(net)
        allocator = SIGNALS[name](
            adapters,
            optimizer,
            target_rank=target,
            total_steps=20,
            warmup=2,
            interval=1,
            top_k=3,
            rank_step=rng.randint(1, 3),
            schedule=rng.choice(list(SCHEDULES)),
            count_numbers=True,
        )
        lora = target * sum(a + b for a, b in itertools.pairwise(sizes))
        for t in range(1, 21):
            optimizer.zero_grad()
            net(torch.randn(3, sizes[0])).square().sum().backward()
            optimizer.step()
            before = {name: adapter.rank for name, adapter in adapters.items()}
            for grown in allocator.step(t):
                assert adapters[grown].rank > before[grown]
            used = sum(p.numel() for p in net.parameters() if p.requires_grad)
            assert used <= lora
        cheapest = min(2 * (a.rank + 1) + sum(a.base.weight.shape) for a in adapters.values())
        assert lora - used < cheapest
        assert allocator.budget_left == lora - used


@pytest.mark.parametrize("score", ["norm-change", "sensitivity", "worth"])
def test_a_resumed_signal_ends_with_the_same_bits(home, monkeypatch, score):
    options = [*TINY, "--steps", "10", "--eval-interval", "10", "--batch-size", "4"]
    options += ["--rank", "4", "--score", score, "--dropout", "0.1"]
    run = train.Run(train.parse_args([*options, "--out", "whole"]))
    run.train()
    assert type(run.allocator) is SIGNALS[score]

    rate = train.learning_rate

    def ctrl_c_at_5(step, *more):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(step, *more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "learning_rate", ctrl_c_at_5)
        train.Run(train.parse_args([*options, "--out", "cut"])).train()
    assert torch.load("cut/checkpoint.pt")["progress"]["step"] == 5
    train.Run(train.parse_args(["--resume", "cut"])).train()

    one = torch.load("whole/checkpoint.pt")
    two = torch.load("cut/checkpoint.pt")
    for part in ("trained", "growth", "optimizer"):
        assert_same_bits(one[part], two[part])


def assert_same_bits(one, two) -> None:
    if torch.is_tensor(one):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same_bits(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for x, y in zip(one, two, strict=True):
            assert_same_bits(x, y)
    else:
        assert one == two


# ------------------------------------------------------------------------------ experiments


def test_adalora_is_pefts_and_counts_no_masked_rank(home):
    peft = pytest.importorskip("peft", reason="peft is not installed: its row is left out")
    Path("task.tsv").write_text(
        "label\tsentence\n" + "".join(f"{i % 3}\t{'abc'[i % 3]} rank {i}\n" for i in range(60))
    )
    options = [*TINY[:2], "--task", "task.tsv", "--device", "cpu", "--method", "lora"]
    options += ["--lr", "2e-2", "--rank", "4", "--steps", "20", "--batch-size", "4"]
    run = adalora.AdaLoRA(train.parse_args(options))
    run.train()
    end = run.log[-1]
    head = 3 * 16  # the classifier's
    per_rank = {"fc": 81, "proj": 81}  # d_in + d_out + 1, for the singular value; of others 33
    numbers = head
    for name, rank in end["ranks"].items():
        numbers += rank * per_rank.get(name.rpartition(".")[2], 33)
    assert sum(end["ranks"].values()) == 4 * 12
    assert end["trainable"] == numbers == run.counts[-1]
    assert max(run.counts) == run.counts[2] == run.counts[0] == run.log[0]["trainable"]
    assert run.counts[2] == 6 * (8 * 33 + 4 * 81) + head
    assert len(run.counts) == 21 and run.counts[5] > run.counts[10] == run.counts[-1]
    assert run.args.peft["lora_alpha"] / 6 == 16 / 4
    kept = {n: int((layer.lora_E["default"] != 0).sum()) for n, layer in run.layers.items()}
    assert kept == end["ranks"]
    assert run.model.head.abs().sum() > 0
    assert run.args.peft["version"] == peft.__version__

    # The gradient that the hooks add is that of the term which peft's forward adds to a loss.
    zero = torch.zeros((), requires_grad=True)

    class Output:
        loss = zero + 0

    run.model.forward = lambda *_: Output()
    run.model.zero_grad()
    run.peft.base_model.forward().loss.backward()
    A = run.model.blocks[0].fc.lora_A["default"]
    B = run.model.blocks[0].fc.lora_B["default"]
    for p, ours in ((A, adalora.penalty_gradient(A)), (B, adalora.penalty_gradient(B.T).T)):
        theirs = p.grad / 2  # the hook has added the same once more
        assert torch.allclose(0.5 / 24 * ours, theirs, atol=1e-7) and theirs.abs().sum() > 0


def test_a_long_pretraining_goes_on_where_it_was_and_is_made_once(home, monkeypatch):
    monkeypatch.setattr(data, "documents", lambda name: Path("text.txt").read_text().split("\n"))
    monkeypatch.setattr(bases, "GPTConfig", lambda: GPTConfig(300, 16, 1, 2, 16))
    monkeypatch.setattr(bases, "SAVE_EVERY", 0)
    monkeypatch.setattr(cells, "RESULTS", Path("results"))
    whole = bases.pretrain(0, 6)
    expected = torch.load(whole)["model"]
    changed = whole.stat().st_mtime_ns
    assert bases.pretrain(0, 6) == whole and whole.stat().st_mtime_ns == changed
    assert bases.pretrain(1, 6) != whole
    whole.unlink()

    rate = train.learning_rate

    def stop_at_4(step, *more):
        if step == 4:
            raise KeyboardInterrupt
        return rate(step, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learning_rate", stop_at_4)
        bases.pretrain(0, 6)
    assert torch.load(whole.with_suffix(".part"))["step"] == 3
    assert_same_bits(torch.load(bases.pretrain(0, 6))["model"], expected)
    assert not whole.with_suffix(".part").exists()


def test_a_setting_is_chosen_by_two_seeds_and_a_grid_whose_end_is_best_goes_on():
    found = []
    for run in evidence.runs_left([], "CoLA", "LoRA"):
        assert len(evidence.runs_left(found, "CoLA", "LoRA")) == 12 - len(found)
        loss = 1 / run["rate"] + run["second"] + run["seed"]
        found.append(run | {"val": {"loss": loss}})
    beyond = evidence.runs_left(found, "CoLA", "LoRA")
    assert {(run["rate"], run["second"]) for run in beyond} == {(4e-3, 16), (4e-3, 32)}
    found += [run | {"val": {"loss": math.inf}} for run in beyond]
    left = evidence.runs_left(found, "CoLA", "LoRA")
    assert {(run["rate"], run["second"]) for run in left} == {(2e-3, 16)}
    assert [run["seed"] for run in left] == [*range(12)]
    reported = left[0] | {"rate": 1e-3, "val": {"loss": 0.0}}  # chooses nothing
    assert evidence.runs_left([*found, reported], "CoLA", "LoRA") == left
    assert evidence.runs_left([*found, found[0]], "CoLA", "LoRA") == left  # a line came twice

    # Rows that take LoRA's setting wait for its selection.
    first = evidence.runs_left([], "CoLA", "ranks of worth")
    assert {run["row"] for run in first} == {"LoRA"}
    for row in ("ranks of worth", "ranks of worth, permuted"):
        assert evidence.runs_left(found, "CoLA", row) == [run | {"row": row} for run in left]
    twice = evidence.runs_left(found, "CoLA", "LoRA, 2 times the rate")
    assert [(run["rate"], run["seed"]) for run in twice] == [(4e-3, s) for s in range(0, 12, 3)]
    core = {16: 1, 32: 0.1}  # worth's second settings for LoRA's
    worth = [run | {"row": "worth", "second": core[run["second"]]} for run in found]
    half = evidence.runs_left(worth, "CoLA", "worth, half the rate")
    assert [(run["rate"], run["seed"]) for run in half] == [(1e-3, s) for s in range(12)]
    again = evidence.runs_left(worth, "CoLA", "worth at half the rate again")
    assert [(run["rate"], run["seed"]) for run in again] == [(1e-3, s) for s in range(12, 28)]
    assert not evidence.has_row("prose", "LoRA again")
    for row, other in evidence.IN_PLACE.items():
        assert evidence.runs_left(worth, "CoLA", row) == [run | {"row": row} for run in again]
        assert evidence.ROWS[row] == evidence.ROWS[other]


def test_processes_share_runs_and_take_over_what_another_leaves():
    left = evidence.runs_left([], "CoLA", "LoRA")
    control = {**left[0], "row": "ranks of worth", "seed": 3}
    own = [evidence.next_run(left, [], (i, 2)) for i in range(2)]
    assert own[0] != own[1] and all(run in left for run in own)
    others = [run for run in left if evidence.next_run([run], [], (0, 2)) is run]
    assert others == left  # each one alone is taken by either
    assert evidence.next_run([control], [], (0, 2)) is None  # its ranks are not known yet


@pytest.fixture
def small_evidence(home, monkeypatch):
    monkeypatch.setattr(evidence, "GPT_TASKS", {"prose": ["--data", "text.txt"]})
    common = ["--steps", "10", "--batch-size", "4", "--eval-interval", "10", "--device", "cpu"]
    monkeypatch.setattr(evidence, "GPT_COMMON", common)
    monkeypatch.setattr(evidence, "first_rates", lambda task: [1e-5, 1e-2, 3.0])
    monkeypatch.setattr(evidence, "second_settings", lambda row: [1.0])
    monkeypatch.setattr(evidence, "SELECTION", {"GPT": [(0, 100)], "MiniLM": [(0, 100)]})
    monkeypatch.setattr(evidence, "REPORTED", {"GPT": [(0, 1)], "MiniLM": [(0, 1)]})
    monkeypatch.setattr(bases, "prepare", lambda *_: (Path("base.pt"), None, None))


CONTROLS = ["LoRA", "core, no growth", "worth", "ranks of worth", "ranks of worth, permuted"]


def assert_controls_are_what_they_say(cells: list[dict]) -> None:
    last = {cell["row"]: cell for cell in cells if cell["test"]}
    assert last.keys() >= set(CONTROLS)
    most = {row: last[row]["trainable"] for row in CONTROLS}
    assert max(most.values()) == most["LoRA"], most
    ranks = {row: cell["ranks"] for row, cell in last.items()}
    assert len(set(ranks["core, no growth"].values())) <= 2
    assert most["core, no growth"] > 0.9 * most["LoRA"]
    assert ranks["ranks of worth"] == ranks["worth"] != ranks["ranks of worth, permuted"]
    assert sorted(ranks["worth"].values()) == sorted(ranks["ranks of worth, permuted"].values())


def test_the_evidence_of_gpt_runs_each_row_once_and_its_controls_are_what_they_say(
    sweep, small_evidence
):
    found = sweep(evidence, "prose", "--rows", *CONTROLS, "norm", "full fine-tuning")
    assert_controls_are_what_they_say(found)
    last = {cell["row"]: cell["ranks"] for cell in found}
    for kinds in (("q", "k", "v", "o"), ("fc", "proj")):  # of equal size
        own = [r for name, r in last["worth"].items() if name.endswith(kinds)]
        permuted = [last["ranks of worth, permuted"][n] for n in last["worth"] if n.endswith(kinds)]
        assert sorted(own) == sorted(permuted)
    assert sum(cell["test"] is not None for cell in found) == 7
    assert all((cell["test"] is None) == (cell["seed"] == 100) for cell in found)


def test_the_evidence_of_a_real_model_is_made_in_the_same_way(sweep, small_evidence, monkeypatch):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=300, intermediate_size=32, **sizes)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained("bert")
    data.train_tokenizer(data.documents("text.txt"), 300).save("bert/tokenizer.json")
    Path("CoLA").mkdir()
    for name in ("train", "dev"):
        lines = [f"gj\t{i % 2}\t\tthe {'rank' if i % 2 else 'core'} {i}\n" for i in range(40)]
        Path(f"CoLA/{name}.tsv").write_text("".join(lines))
    monkeypatch.setattr(minilm, "model_folder", lambda: Path("bert").absolute())
    monkeypatch.setattr(minilm, "STEPS", 10)
    found = sweep(evidence, "CoLA", "--rows", *CONTROLS)
    assert_controls_are_what_they_say(found)
    assert {"loss", "accuracy", "f1", "matthews"} == found[-1]["test"].keys()
    assert found[-1]["loss_of_shares"] == pytest.approx(math.log(2), abs=0.01)
    assert not any(cell["diverged"] for cell in found if cell["test"])

    run = {"task": "CoLA", "row": "LoRA", "rate": 1e9, "second": 1, "base": 0, "seed": 1}
    cell = evidence.measure(run, [], "CoLA")
    assert cell["diverged"]
    for split in ("val", "test"):
        assert cell[split]["loss"] == pytest.approx(math.log(2))  # of two classes


def test_class_shares_alone_cost_the_cross_entropy_of_train_and_test_shares():
    text = torch.tensor([1])
    splits = {"train": [0, 0, 0, 1], "test": [0, 1]}
    examples = {split: [(text, label) for label in labels] for split, labels in splits.items()}
    expected = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert minilm.loss_of_shares(examples) == pytest.approx(expected)


@pytest.mark.parametrize("row", ["LoRA", "worth", adalora.ROW])
def test_a_run_that_diverges_counts_as_if_it_had_not_been_trained(home, small_evidence, row):
    if row == adalora.ROW:
        pytest.importorskip("peft", reason="peft is not installed: its row is left out")
    run = {"task": "prose", "row": row, "rate": 1e9, "second": 1, "base": 0, "seed": 1}
    cell = evidence.measure(run, [], "")
    gpt = train.Run(train.parse_args([*TINY, "--batch-size", "4", "--out", "untrained"]))
    for split in ("val", "test"):
        expected = gpt.evaluate(split)[f"{split}_loss"]
        assert cell[split]["loss"] == pytest.approx(expected, abs=1e-5)
    assert cell["diverged"]


def test_under_adam_importance_is_a_trace_and_sees_no_size_of_a_loss_which_worth_does(sweep):
    found = sweep(blind)
    for cell in found:
        early = cell["log"][:5]
        for entry in early:
            assert entry["change"] == pytest.approx(entry["trace"], rel=0.03, abs=1e-6)
        assert cell["log"][-1]["change"] > 0.05
        assert cell["ratios"]["importance"] == pytest.approx(1, abs=1e-4)
        assert cell["ratios"]["norm"] == pytest.approx(1, abs=1e-4)
        assert cell["ratios"]["worth"] == pytest.approx(cell["factor"] ** 2, rel=1e-3)
    assert [cell["factor"] for cell in found] == [1, 10, 100]


def test_an_ablation_changes_one_thing_and_two_released_recipes_never_train(sweep, monkeypatch):
    rows = ["reference", "random core", "released: block-cb0", "released: block-abc0"]
    rows += ["released: single", "beta2 .999, new moments zero"]
    common = ["--steps", "12", "--batch-size", "4", "--eval-interval", "12", "--rank", "4"]
    monkeypatch.setattr(ablations, "COMMON", common)
    found = {}
    for cell in sweep(ablations, *TINY, "--seeds", 1, "--rows", *rows):
        found[cell["row"]] = cell
    assert {*found} == {*rows}
    for row in ("released: block-cb0", "released: block-abc0"):
        assert found[row]["test"] == found[row]["base"]
    assert len({cell["test"] for cell in found.values()}) == len(rows) - 1


def grown_with(kind) -> tuple:
    """(how far B moves in the tenth step after growth, its second moments at growth), where every
    gradient is the same."""
    net, adapters = small_net()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    settings = ALLOCATION | {"schedule": "fixed", "interval": 18, "total_steps": 50}
    allocator = kind(adapters, optimizer, **settings)
    for t in range(1, 31):  # it grows at step 20
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 0.5)
        before = adapters["0"].lora_B.detach().clone()
        optimizer.step()
        if allocator.step(t):
            B = adapters["0"].lora_B
            moments = optimizer.state[B]["exp_avg_sq"].clone()
    moved = (adapters["0"].lora_B.detach() - before).abs()
    return moved, moments


def test_the_rules_for_new_moments_are_zero_their_mean_and_what_a_fresh_adam_does():
    zero_moved, zero = grown_with(ablations.ZeroMoments)
    _, mean = grown_with(RankAllocator)
    paced_moved, paced = grown_with(ablations.PacedMoments)
    assert zero[:, 2].eq(0).all() and paced[:, 2].eq(0).all()
    assert torch.allclose(mean[:, 2], mean[:, :2].mean())
    assert torch.equal(mean[:, :2], zero[:, :2])
    # Adam takes the new entry to be as old as its tensor, and moves it farther than the rate.
    assert zero_moved[:, 2].min() > 1.1e-2
    assert paced_moved[:, 2].numpy() == pytest.approx(1e-2, rel=1e-3)
    assert torch.allclose(paced_moved[:, :2], zero_moved[:, :2])  # old entries are left alone


def test_the_baseline_before_growth_lets_growth_score_itself():
    for kind, own in ((RankAllocator, True), (ablations.BaselineBefore, False)):
        net, adapters = small_net()
        allocator = kind(adapters, adam(net), **(ALLOCATION | {"schedule": "fixed"}))
        before = allocator.importances()
        allocator.scores = lambda: {"0": 1.0, "2": 0.0}
        assert allocator.step(4) == ["0"]
        assert (allocator.baseline == allocator.importances()) == own
        assert (allocator.baseline == before) == (not own)


def test_adapters_of_the_ablations_differ_in_what_their_names_say():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    base = nn.Linear(6, 10)
    plain = TriAdaptLinear(base, 2, 4.0)
    current = ablations.CurrentScale(base, 2, 4.0)
    current.grow(2)
    assert plain.scale == 4.0 and current.scale == ablations.ALPHA / 4
    assert ablations.CurrentScale(base, 2, 4.0).scale == ablations.ALPHA / 2
    core = ablations.RandomCore(base, 2, 4.0)
    assert (core.core() - torch.eye(2)).abs().max() > 0.5
    nn.init.normal_(core.lora_B)  # as if trained
    y = core(x)
    core.grow(2)
    assert torch.allclose(core(x), y, atol=1e-6)
    single = ablations.Single(base, 3, 4.0)
    assert single.lora_B[:, 0].eq(0).all() and single.lora_B[:, 1:].ne(0).all()


def test_the_planted_ranks_are_found_by_who_knows_them(sweep):
    options = [*TINY[:4], "--seeds", 1, "--steps", 20, "--signals", "oracle", "uniform"]
    found = sweep(planted, *options)
    for oracle, uniform in (found[:2], found[2:]):
        assert oracle["growth"] == uniform["growth"]
        assert oracle["share"] > 0.7 and uniform["share"] < 0.5
        assert oracle["kl"] < oracle["kl_before"]
        assert uniform["correlations"].keys() == set(saves.WATCHED)
        assert len(uniform["kl_with_teachers"]) == len(planted.KINDS)


def test_a_student_with_all_of_its_teachers_matrices_is_the_teacher():
    base = GPT(GPTConfig(vocab_size=64, context=16, layers=1, heads=2, width=16))
    teacher = copy.deepcopy(base)
    for name, module in teacher.named_modules():
        if name.rpartition(".")[2] in ("q", "fc"):
            nn.init.normal_(module.weight)
    config = {"targets": ["q", "fc"], "growth": "default", "steps": 20}
    student = planted.Student("uniform", base, teacher, {}, config)
    ids = torch.arange(16)[None]
    left = planted.divergence(student.model, teacher, ids).item()
    half = planted.divergence(student.with_teachers(["q"]), teacher, ids).item()
    whole = planted.divergence(student.with_teachers(["q", "fc"]), teacher, ids).item()
    assert left > half > 1e-4 and whole < 1e-6


def test_signals_look_on_without_a_trace_and_are_compared_with_what_adapters_save(
    home, sweep, monkeypatch
):
    monkeypatch.setattr(evidence, "GPT_TASKS", {"prose": ["--data", "text.txt"]})
    common = ["--steps", "40", "--batch-size", "4", "--eval-interval", "40", "--device", "cpu"]
    monkeypatch.setattr(evidence, "GPT_COMMON", common)
    monkeypatch.setattr(evidence, "REPORTED", {"GPT": [(0, 1)]})
    monkeypatch.setattr(bases, "prepare", lambda *_: (Path("base.pt"), None, None))
    (cell,) = sweep(saves, "prose")
    for both in cell["correlations"].values():
        assert -1 <= both["now"] <= 1 and -1 <= both["end"] <= 1

    runs = {}
    for score in ("uniform", "watched"):
        line = [*common, *TINY, "--score", score, "--lr", "3e-2"]
        runs[score] = train.Run(train.parse_args(line))
        if score == "watched":
            runs[score].allocator.loss = lambda: saves.validation_loss(runs["watched"])
        runs[score].train()
    one, two = runs["uniform"], runs["watched"]
    assert_same_bits(train.adapter_state_dict(one.model), train.adapter_state_dict(two.model))

    watched = two.allocator
    assert len(watched.saved_seen) == saves.MOMENTS
    grown = [entry for entry in two.log if entry["kind"] == "allocation"]
    assert len(watched.scores_seen) == len(grown)
    # What one adapter saves is the loss of the model in which it is no adapter.
    found = saves.saved(two.adapters, watched.loss)
    whole = watched.loss()
    two.model.blocks[1].fc = two.model.blocks[1].fc.base
    assert found["blocks.1.fc"] == pytest.approx(watched.loss() - whole, abs=1e-6)


@pytest.mark.parametrize("name", saves.WATCHED)
def test_a_signal_that_looks_on_scores_as_it_does_in_a_run_of_its_own(home, monkeypatch, name):
    seen = []  # the signal's scores at each allocation of its own run

    class GrowsUniformly(SIGNALS[name]):
        def scores(self) -> dict[str, float]:
            seen.append(super().scores())
            return {name: -float(adapter.rank) for name, adapter in self.adapters.items()}

    monkeypatch.setitem(SIGNALS, "forced", GrowsUniformly)
    common = [*TINY, "--steps", "20", "--batch-size", "4", "--warmup", "2", "--interval", "2"]
    train.Run(train.parse_args([*common, "--score", "forced"])).train()
    run = train.Run(train.parse_args([*common, "--score", "watched"]))
    run.allocator.loss = lambda: 0.0
    run.train()
    assert len(seen) > 3
    assert [scores[name] for scores in run.allocator.scores_seen] == seen


def test_scores_are_compared_with_what_is_saved_then_and_in_the_end():
    net, adapters = small_net()
    optimizer = adam(net)
    adapters |= {"more": adapters["0"], "most": adapters["2"]}
    watched = saves.Watched(adapters, optimizer, **ALLOCATION)
    rising = dict(zip(adapters, (1.0, 2.0, 3.0, 4.0), strict=True))
    falling = {name: -value for name, value in rising.items()}
    for scores in (falling, rising, rising):
        watched.scores_seen.append(dict.fromkeys(saves.WATCHED, scores))
    watched.saved_seen = {0: rising, 1: rising, 2: rising}
    watched.saved_in_the_end = falling
    for both in watched.correlations().values():
        assert both == {"now": pytest.approx((-1 + 1 + 1) / 3), "end": pytest.approx(-1)}


def test_the_benchmark_measures_every_variant(sweep, monkeypatch, capsys):
    ours = [name for name in bench.VARIANTS if "peft" not in name]
    monkeypatch.setattr(bench, "VARIANTS", ours)  # peft takes seconds to import
    (cell,) = sweep(bench, "--quick", "--rounds", 2, "--threads", 1)
    assert list(cell["ratio"]) == ours and cell["ratio"]["limit"] == 1
    assert sum(cell["parts"]["limit"]) == pytest.approx(1, abs=0.01)
    assert cell["allocation"] > 0
    held = cell["held_bytes"]
    assert held["limit"] < held["LoRA"] < held["full"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "--rounds 1" in capsys.readouterr().err


def test_the_time_to_a_loss_ends_at_the_first_validation_below_it(sweep, monkeypatch):
    monkeypatch.setattr(time_to_loss, "ROWS", {"LoRA": ["--method", "lora"], "growth": []})

    def evaluate(run, split: str) -> dict:
        slope = 0.05 if run.args.method == "lora" else 0.01
        return {f"{split}_loss": 6.0 - slope * run.step}

    monkeypatch.setattr(train.Run, "evaluate", evaluate)
    options = [*TINY, "--steps", "60", "--batch-size", "4", "--seeds", 1]
    lora, growth = sweep(time_to_loss, *options)
    assert (lora["reached"], lora["steps"]) == (True, 30)  # 4.5 is below 4.6, and step 20 is not
    assert (growth["reached"], growth["steps"]) == (False, 60)
    assert growth["seconds"] > 0


@pytest.mark.parametrize("method", [bench.ByHand, bench.DenseByHand])
def test_the_backwards_by_hand_of_the_benchmark_are_autograds(method):
    base = nn.Linear(6, 9)
    x = torch.randn(3, 4, 6)
    results = []
    for adapter in (TriAdaptLinear(base, 4, 2.0), method(base, 4, 2.0)):
        generator = torch.Generator().manual_seed(0)
        own = [p for p in adapter.parameters() if p.requires_grad]
        for p in own:
            p.data = torch.randn(p.shape, generator=generator)
        inputs = x.clone().requires_grad_()
        y = adapter(inputs)
        gradients = torch.autograd.grad(y.square().sum(), [inputs, *own])
        results.append([y.detach(), *gradients])
    assert len(results[0]) == 6
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-3)


# -------------------------------------------------------------------------------- intervals


def test_quantiles_and_p_values_are_those_of_students_t_in_a_printed_table():
    for level, freedom, t in [(0.95, 1, 12.7062), (0.95, 11, 2.2010), (0.99, 4, 4.6041)]:
        assert intervals.t_quantile(level, freedom) == pytest.approx(t, abs=1e-4)
        assert intervals.p_of_t(-t, freedom) == pytest.approx(1 - level, abs=1e-5)
    # A mean of 2 with an error of 1 / sqrt(3): t is 2 sqrt(3), and p of it, with 2 degrees, .0742.
    assert intervals.p_value([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)


def test_holm_multiplies_the_smallest_p_by_all_the_next_by_one_less_and_never_falls():
    adjusted = intervals.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9}, tests=4)
    assert adjusted == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})
    # Of five declared tests one has yet to run.
    assert intervals.holm({"a": 0.01, "b": 0.02}, tests=5) == pytest.approx({"a": 0.05, "b": 0.08})


SETTING = {"rate": 1e-3, "second": 16}


def test_reported_runs_are_those_at_the_setting_that_was_chosen_last():
    found = []
    for rate in (0.02, 1e-3):
        for base, seed in evidence.REPORTED["GPT"]:
            cell = {"task": "modules", "row": "random", "base": base, "seed": seed, **SETTING}
            found.append(cell | {"rate": rate, "test": {"loss": rate}})
    cells = contrasts.reported(found, "modules", "random")
    assert {cell["rate"] for cell in cells.values()} == {1e-3} and len(cells) == 12
    assert contrasts.reported(found[:-1], "modules", "random") == {}  # one is missing


def test_the_declared_contrasts_are_paired_pooled_and_corrected_by_holm(monkeypatch):
    found = []
    for task, base in (("CoLA", 0.5), ("SST-2", 0.3)):
        for seed in range(12):
            level = base + seed / 100  # of a seed, which pairing takes away
            losses = {"LoRA": 0.0, "worth": -0.02 - seed % 2 / 1000, "importance": seed % 3 / 100}
            losses |= {"random": 0.01, "norm": 0.001 * (seed % 4 - 1.5)}
            for row, loss in losses.items():
                cell = {"task": task, "row": row, "base": 0, "seed": seed, **SETTING}
                cell |= {"trainable": 7, "test": {"loss": level + loss}, "loss_of_shares": 0.6}
                cell |= {"val": {"loss": level - loss - 0.1}}
                cell["settings"] = {"lr": 1e-3, "method": "lora", "alpha": 16}
                if task == "CoLA":
                    cell["test"]["matthews"] = 0.375 if row == "worth" else 0.25
                else:
                    cell["test"]["accuracy"] = 0.75
                found.append(cell)
            found.append(cell | {"row": "LoRA", "seed": 100, "test": None})
    assert len(contrasts.differences(found, ["CoLA"], "worth", "LoRA")) == 12
    said = contrasts.declared(found)
    pairs = {("importance", "random"), ("worth", "LoRA"), ("norm", "LoRA")}
    assert said.keys() == pairs
    clear = tables.contrast_in_words(said["worth", "LoRA"])
    assert clear.startswith("**-0.0205 ± 0.0002** (Holm below 0.001; could have seen 0.000")
    assert len(said["worth", "LoRA"].gaps) == 24
    for pair in pairs - {("worth", "LoRA")}:
        assert said[pair].holm > 0.05
        assert "**" not in tables.contrast_in_words(said[pair])
    assert contrasts.declared(found[:-2]).keys() < pairs  # a run is missing
    assert contrasts.reported_tasks(found) == ["CoLA", "SST-2"]
    alone = [cell for cell in found if cell["task"] == "CoLA" or cell["row"] == "LoRA"]
    assert contrasts.reported_tasks(alone) == ["CoLA"]  # LoRA alone leaves nothing to compare

    monkeypatch.setattr(cells, "read", lambda path: found)
    rows = tables.rows_table()
    lora = "0.5550 ± 0.0361 (0.4550 ± 0.0361) | 0.250 ± 0.000 | 0.3550 ± 0.0361 (0.2550 ± 0.0361)"
    assert f"| LoRA | {lora} | 0.750 ± 0.000 |" in rows
    assert "| worth | -0.0205 ± 0.0003 (+0.0205 ± 0.0003) | +0.125 ± 0.000 |" in rows
    assert "CoLA 0.001, alpha 16; SST-2 0.001, alpha 16 | CoLA 7; SST-2 7 |" in rows
    assert "| class shares alone | +0.0450 ± 0.0229 |  | +0.2450 ± 0.0229 |" in rows
    lines = tables.contrasts_table().splitlines()
    assert lines[0] == "|  | CoLA and SST-2 | CoLA | SST-2 |"
    assert lines[3].startswith(f"| worth minus LoRA | {clear} | -0.0205 ± 0.0003 | -0.0205")


def test_the_smallest_visible_mean_is_seen_in_four_of_five_samples():
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for _ in range(500):
        noise = torch.randn(12, generator=generator).double()
        visible = intervals.smallest_visible((noise / noise.std()).tolist(), tests=1)
        seen += intervals.clear_side((noise + visible).tolist()) == 1
    assert seen / 500 == pytest.approx(0.8, abs=0.06)


def test_what_is_visible_to_holm_is_the_p_of_its_first_test_and_four_in_five():
    values = [0.1, 0.2, 0.3, 0.4]
    error = statistics.stdev(values) / 2
    t = intervals.smallest_visible(values, tests=5) / error - intervals.t_quantile(0.6, 3)
    assert intervals.p_of_t(t, 3) == pytest.approx(0.05 / 5, rel=1e-3)


def test_the_interval_of_a_deviation_is_chi_squares_in_a_printed_table():
    for freedom, low, high in ((9, 19.023, 2.700), (11, 21.920, 3.816)):
        expected = ((freedom / low) ** 0.5, (freedom / high) ** 0.5)
        assert intervals.deviation_interval(1.0, freedom) == pytest.approx(expected, rel=1e-2)


def test_an_interval_is_the_mean_plus_and_minus_t_s_over_root_n():
    assert intervals.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert intervals.clear_side([1.0, 1.1, 1.2]) == 1
    assert intervals.clear_side([-1.0, -1.1, -1.2]) == -1
    assert intervals.clear_side([-1.0, 1.1, 1.2]) == 0
    assert intervals.clear_side([1.0, 1.1]) == 0  # too few for an interval
    assert math.isnan(intervals.half_width([1.0, 1.1]))


# ---------------------------------------------------------------------- figures and tables


def evidence_cells(task: str, sign: int, **more) -> list[dict]:
    """All runs of some rows, of which worth beats LoRA if sign is 1."""
    gains = {"LoRA": 0, "worth": 0.2, "importance": 0.1, "random": 0.1, "norm": 0}
    gains |= {"full fine-tuning": 0.5, "LoRA, 2 times the rate": -0.3}
    found = []
    model = evidence.model_of(task)
    for row, gain in gains.items():
        for base, seed in [*evidence.places_of(task, row), *evidence.SELECTION[model]]:
            loss = 4 + seed / 1e3 - sign * gain + (seed % 3 - 1) / 1e3 * len(row)
            cell = {"task": task, "row": row, "base": base, "seed": seed, "second": 1}
            cell["rate"] = evidence.first_rates(task)[1]
            cell |= {"val": {"loss": loss}, "test": {"loss": loss, "f1": 0.0} | more}
            cell |= {"ranks": ranks_of(model), "trainable": 9}
            if seed >= 100:
                cell["test"] = None
            found.append(cell)
    return found


def ranks_of(model: str) -> dict[str, int]:
    """As of a block, with names as they are."""
    names = [f"blocks.0.{kind}" for kind in ("q", "k", "v", "o", "fc", "proj")]
    if model == "MiniLM":
        kinds = ["attention.self.query", "attention.self.key", "attention.self.value"]
        kinds += ["attention.output.dense", "intermediate.dense", "output.dense"]
        names = [f"encoder.layer.10.{kind}" for kind in kinds]
    return {name: rank for rank, name in enumerate(names, 2)}


@pytest.fixture
def drawable(tmp_path) -> Path:
    """A folder with the smallest results that every figure can be drawn from."""
    names = ["blocks.0.q", "blocks.0.k"]
    evidence = evidence_cells("CoLA", 1, matthews=0.5) + evidence_cells("prose", -1)
    evidence += evidence_cells("SST-2", 1, accuracy=0.5)
    log = []
    for step, kind in enumerate(("start", "allocation", "allocation", "end")):
        entry = {"kind": kind, "step": step, "ranks": dict.fromkeys(names, 1)}
        entry["importance"] = dict.fromkeys(names, 1 / (1 + step))
        if kind == "allocation":
            score = dict.fromkeys(names, -0.1)
            entry |= {"score": score, "grown": names[:1], "threshold": -0.1}
        log.append(entry)
    costs = []
    for change in ({}, {"rank": 2}):
        variants = ["limit", "LoRA", "TriAdaptLoRA", "full"]
        cell = {"settings": bench.CENTRE | change | {"device": "abacus", "threads": 1}}
        cell["ratio"] = dict.fromkeys(variants, 1.5)
        cell["quartiles"] = dict.fromkeys(variants, (1.4, 1.6))
        costs.append(cell)

    (tmp_path / "first_run").mkdir()
    contents = {"evidence": evidence, "bench": costs}
    log_of_blind = [{"step": step, "change": 0.1 * step, "trace": 0.1 * step} for step in (1, 2)]
    ratios = {"importance": 1.0, "norm": 1.0, "worth": 49.0}
    contents["blind"] = [{"factor": 7, "ratios": ratios, "log": log_of_blind}]
    for name, lines in (contents | {"first_run/log": log}).items():
        for line in lines:
            cells.append(tmp_path / f"{name}.jsonl", line)
    return tmp_path


def test_every_figure_is_drawn_and_says_what_its_results_say(drawable, monkeypatch):
    titles = {}

    def note(figure, path, dpi) -> None:
        """Like savefig, but small and fast."""
        said = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
        titles[path.name.split(".")[1]] = " | ".join(said)
        figure.set_layout_engine("none")
        figure.set_dpi(20)
        figure.canvas.draw()
        Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).save(path)

    monkeypatch.setattr(draw.plt.Figure, "savefig", note)
    rates = {task: rates[1:2] for task, rates in evidence.RATES.items()}  # those of drawable
    monkeypatch.setattr(evidence, "RATES", rates)
    for name in draw.FIGURES:
        draw.draw(name, drawable, drawable)
    assert {path.stem for path in drawable.glob("*.png")} == set(draw.FIGURES) == set(titles)
    assert not [*drawable.glob(".*")]

    assert "1 of 3 are clearly better, 0 clearly worse" in titles["compare"]
    assert titles["compare"].endswith("| CoLA and SST-2 | CoLA | SST-2 | prose |  | ")
    assert "CoLA: LoRA 0.000, importance 0.000" in titles["rates"]
    assert "importance 1.00, norm 1.00, worth 1.00, random 1.00" in titles["ranks"]
    assert "falls in 2 of 2 matrices, 2 of which got no rank" in titles["importance"]
    assert "below zero at 2 of 2 allocations" in titles["importance"]
    assert "abacus, 1 threads: a step takes 1.500 times the limit" in titles["bench"]
    assert "counts 7 times multiplies the importance by 1.00" in titles["blind"]
    assert "worth by 49" in titles["blind"]
    for schedule in SCHEDULES:
        assert f"{planned_end(schedule)} ({schedule})" in titles["growth"]
    change = re.search(r"relative change (\S+)\)", titles["method"])
    assert float(change.group(1)) < 1e-6


@pytest.mark.parametrize("model", ["GPT", "MiniLM"])
def test_a_grid_of_ranks_shows_each_matrix_in_its_own_place(model):
    ranks = ranks_of(model)
    figure, axes = draw.plt.subplots()
    places = draw_ranks(axes, ranks)
    assert list(places.values()) == [(x, 0) for x in range(6)]
    assert [text.get_text() for text in axes.texts] == ["2", "3", "4", "5", "6", "7"]
    assert len({label.get_text() for label in axes.get_xticklabels()}) == 6
    assert axes.get_yticklabels()[0].get_text() == f"block {10 if model == 'MiniLM' else 0}"
    assert list(draw_ranks(axes, {"head": 3})) == ["head"]  # of a fork's model
    draw.plt.close(figure)


def planned_end(schedule: str) -> int:
    """The step at which train.py's defaults have spent the budget, counted with 24 matrices,
    without an allocator."""
    args = train.parse_args(["--schedule", schedule])
    rest = (args.rank - args.init_rank) * 24
    t = args.warmup
    while rest > 0:
        t += 1
        done, steps = t - args.warmup, args.steps - args.warmup
        k = {
            "linear": rest * done // steps,
            "exponential": math.floor(rest ** (done / steps) + 1e-9),
            "fixed": args.top_k,
        }[schedule]
        rest -= min(rest, max(1, min(k, 24)))
    return t


def test_the_figure_of_the_method_tells_old_numbers_from_new_ones():
    old = torch.tensor([[0.5, 0.0]])
    new = torch.tensor([[0.5, 0.1, 1.0], [0.0, 0.7, float("nan")]])
    kinds = draw.kinds_of(old, new).tolist()
    assert kinds == [[draw.OLD, draw.RANDOM, draw.ONE], [draw.ZERO, draw.RANDOM, draw.OUTSIDE]]


def test_the_moving_picture_has_a_frame_for_each_entry_and_stays_small():
    log = cells.read(animate.LOG)
    short = [log[0], log[3], log[-2], log[-1]]
    assert Image.open(io.BytesIO(animate.animate(short))).n_frames == 3
    with Image.open(animate.GIF) as committed:
        assert committed.n_frames == len(log) - 1
    assert animate.GIF.stat().st_size <= animate.MOST_BYTES


def test_a_figure_without_results_is_skipped_with_one_line(tmp_path, capsys):
    (tmp_path / "first_run").mkdir()
    for begun in (False, True):  # no file yet; a file without a finished run
        for name, (_, file) in draw.FIGURES.items():
            if file is not None:
                if begun:
                    (tmp_path / file).touch()
                draw.draw(name, tmp_path, tmp_path)
                said = f"{tmp_path / name}.png: skipped, no results for it in {tmp_path / file}\n"
                assert capsys.readouterr().out == said
    assert not [*tmp_path.glob("*.png")]


def test_a_difference_stands_with_its_interval():
    assert tables.difference([0.1, 0.2, 0.3]) == "+0.2000 ± 0.2484"
    assert tables.difference([0.1, 0.1]) == "+0.1000"  # of two seeds there is no interval
    assert tables.difference([]) == "–"


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (
            0,
            "was not seen to matter here: LoRA with the final ranks of growth by worth is not "
            "clear of",
        ),
        (0.2, "mattered here: LoRA with the final ranks of growth by worth is clearly better than"),
        (-0.2, "mattered here: LoRA with the final ranks of growth by worth is clearly worse than"),
    ],
)
def test_readmes_sentences_say_what_the_runs_say(monkeypatch, gain, verdict):
    found = []
    gains = {"LoRA": 0, "worth": 2 * gain, "ranks of worth": gain, "ranks of worth, permuted": 0}
    gains |= {"full fine-tuning": 0.5, "importance": 0, "LoRA again": 0}
    gains |= {"worth at half the rate again": 0.1, "LoRA at half the rate again": 0.2}
    gains |= {"uniform again": 0.1, "random in worth's place again": 0}
    gains |= {"worth, half the rate": -0.3}
    gains |= {"LoRA, 4 times the rate": -0.3, "importance, 4 times the rate": -0.5}
    gains |= {"importance, 2 times the rate": 0.1}
    for task, sign in (("CoLA", 1), ("SST-2", -1), ("prose", 1), ("modules", -1)):
        for row, better in gains.items():
            for base, seed in evidence.places_of(task, row):
                loss = 4 - better + (seed % 3 - 1) / 1e3 * len(row)
                if row in ("full fine-tuning", "importance, 2 times the rate"):
                    loss = 4 - sign * better
                cell = {"task": task, "row": row, "base": base, "seed": seed, **SETTING}
                cell["ranks"] = {}
                scores = {"loss": loss, "matthews": better, "accuracy": better / 2}
                losses = {"val": {"loss": loss - better}, "test": scores}
                found.append(cell | losses | {"loss_of_shares": 5})
    monkeypatch.setattr(cells, "read", lambda path: found)
    table, said = tables.what_was_found().split("\n\n")
    assert verdict in said
    assert f"equal size ({-gain:+.4f} ± 0.0035; 0.00" in said
    who = "growth by worth" if gain > 0 else "neither signal that was tested"
    clear = {0: "not clear of", 0.2: "clearly better than", -0.2: "clearly worse than"}[gain]
    assert f"At the settings chosen {who} beats LoRA at equal numbers: on CoLA and SST-2" in said
    assert f"contrasts, worth is {clear} LoRA ({-2 * gain:+.4f}" in said
    assert f"worth is {clear} ranks of worth (" in said
    assert "16 new seeds on the same texts: with a correction over 3 contrasts it is" in said
    assert "it is clearly better than LoRA (-0.1011" in said
    assert ", clearly worse than LoRA at half the rate (+0.0999" in said
    assert ", not clear of uniform (" in said
    assert "its validation loss is at -0.2011 ±" in said
    assert "matthews on CoLA at +0.100 ± 0.000, its accuracy on SST-2 at +0.050 ± 0.000," in said
    assert "its loss on prose, of 12 seeds, at +0.3000 ±" in said
    together = "random in worth's place again | -0.0999 ± 0.0003 (not tested) | -0.0999 ± 0.0005 |"
    assert together in tables.contrasts_table()
    again = tables.minus_lora(found, "CoLA", "worth at half the rate again")
    assert again.startswith("-0.1011")  # against the LoRA of the same seeds
    assert "the importance, not tested against LoRA, is at +0.0000 ±" in said
    with_worth = {0: "", 0.2: ", worth, ranks of worth", -0.2: ""}[gain]
    there = "(so there our GPT is not the picture of real use"
    assert (
        f"intervals (20 comparisons) ahead of LoRA are on CoLA full fine-tuning{with_worth}; on"
        in said
    )
    assert f"on prose full fine-tuning{with_worth} {there}" in said and said.count(there) == 1
    with_worth = {0: "", 0.2: "", -0.2: ", worth, ranks of worth"}[gain]
    assert f"on SST-2 full fine-tuning{with_worth}" in said.partition("behind it")[2]
    low = "; its rate was perhaps too low: at twice that its mean loss is lower)"
    assert f"its own, more on CoLA (+0.2000 ± 0.0000{low}, on SST-2 (+0.2000 ± 0.0000), " in said
    assert "| class shares alone | +1.0000 ± 0.0022 | +1.0000 ± 0.0022 |" in table
    assert len(re.findall(r"\.(?=\s|$)", said)) == 5
    assert len(table.splitlines()) == 2 + 7


def test_what_higher_rates_lose_is_paired_and_seeds_spread_within_their_base(monkeypatch):
    found = []
    for base, seed in evidence.REPORTED["GPT"]:
        level = 4 + base + (-1) ** seed / 100
        cell = {"task": "prose", "row": "LoRA", "base": base, "seed": seed, **SETTING}
        cell["settings"] = {"lr": 0.01}
        found.append(cell | {"test": {"loss": level}})
        if seed % 3 == 0:
            higher = {"row": "LoRA, 2 times the rate", "test": {"loss": level + 0.5 + seed / 1e3}}
            found.append(cell | higher | {"diverged": seed == 9})
    for cell in found[:]:
        row = cell["row"].replace("LoRA", "importance")
        loss = cell["test"]["loss"] + 0.1 * row.endswith("rate")
        found.append(cell | {"row": row, "test": {"loss": loss}})
    monkeypatch.setattr(cells, "read", lambda path: found)
    line, _, both = tables.rates_table().splitlines()[2:]
    deviation = (12 * 0.01**2 / 9) ** 0.5  # 12 seeds, each 0.01 from the mean of its base
    low, high = intervals.deviation_interval(deviation, 9)
    spread = f"{deviation:.4f} ({low:.4f} to {high:.4f})"
    lost = "+0.5045 ± 0.0062 (1 of 4 diverged)"
    assert line == f"| prose | LoRA | 0.01 | {lost} | – | {spread} |"
    assert both == "| prose | importance minus LoRA |  | +0.1000 ± 0.0000 | – |  |"


def test_an_ablation_is_compared_with_its_own_reference(monkeypatch):
    found = []
    for row, loss in (("reference", 1.0), ("random core", 1.5), ("beta2 .999", 2.0)):
        for seed in range(3):
            found.append({"row": row, "seed": seed, "test": loss + seed / 10})
    found += [cell | {"row": "beta2 .999, new moments zero", "test": 4.0} for cell in found[-2:]]
    monkeypatch.setattr(cells, "read", lambda path: found)
    gaps = tables.ablation_gaps()
    assert gaps["random core"] == pytest.approx([0.5, 0.5, 0.5])
    assert gaps["beta2 .999"] == pytest.approx([1.0, 1.0, 1.0])
    assert gaps["beta2 .999, new moments zero"] == pytest.approx([1.9, 1.8])
    assert ablations.reference_of("uniform growth, core not trained") == "uniform growth"


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ({}, "–"),
        ({"a": 0, "b": 0}, "could not be seen"),
        ({"a": 1, "b": 1}, "held"),
        ({"a": 1, "b": 0}, "held in part"),
        ({"a": 1, "b": -1}, "held in part"),
        ({"a": 0, "b": -1}, "did not hold"),
    ],
)
def test_a_claim_holds_as_far_as_its_corrected_intervals_say(gains, verdict):
    gaps = {name: [0.1 - gain, -gain, -0.1 - gain] for name, gain in gains.items()}
    assert tables.verdict_of(gaps) == verdict


def test_a_claim_of_two_differences_needs_half_the_p_of_one():
    gaps = [2, 3, 3.8]  # p is .03
    assert tables.verdict_of({"a": gaps}) == "did not hold"
    assert tables.verdict_of({"a": gaps, "b": [-1, 0, 1]}) == "could not be seen"


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [((0.9, 0.8), "held"), ((1.1, 1.0), "did not hold"), ((0.9, 1.1), "could not be seen")],
)
def test_a_cost_is_lower_if_it_is_in_every_configuration(monkeypatch, steps, verdict):
    costs = [{"ratio": {"TriAdaptLoRA, grown": 2 * step, "LoRA": 2.0}} for step in steps]
    monkeypatch.setattr(cells, "read", lambda path: costs)
    *_, said, found = tables.claim_cheaper()
    words = f"{min(steps):.2f} to {max(steps):.2f} times ({sum(steps) / 2:.2f}) as long as LoRA's"
    assert (said, found) == ([words], f"{verdict} against LoRA")


def test_matrices_that_a_permutation_moved_are_counted(monkeypatch):
    found = []
    for seed in range(12):
        cell = {"task": "CoLA", "base": 0, "seed": seed, "test": {"loss": 1.0}, **SETTING}
        found.append(cell | {"row": "ranks of worth", "ranks": {"a": 1, "b": 2, "c": 3}})
        permuted = {"a": 2, "b": 1, "c": 3} if seed < 6 else {"a": 1, "b": 2, "c": 3}
        found.append(cell | {"row": "ranks of worth, permuted", "ranks": permuted})
    said = "Permuting gave another rank to 1.0 of 3 matrices on CoLA, in the mean."
    assert tables.moved_in_words(found, ["CoLA", "SST-2"]) == said
    assert tables.moved_in_words(found[1:], ["CoLA"]) == ""


def test_the_best_schedule_is_one_that_all_others_are_clearly_above(monkeypatch):
    found = []
    for row, loss in (("reference", 1), ("exponential schedule", 2), ("fixed schedule", 3)):
        for seed in range(8):
            found.append({"row": row, "seed": seed, "test": loss + seed**2 / 1e4 * loss})
    monkeypatch.setattr(cells, "read", lambda path: found)
    *_, said, verdict = tables.claim_linear()
    assert said[0].startswith("exponential schedule +1.00")
    assert verdict == "held"
    found[:] = [cell | {"test": -cell["test"]} for cell in found]
    assert tables.claim_linear()[-1] == "did not hold"


def test_a_link_of_the_paper_table_is_to_the_definition():
    lines = (ROOT / "triadapt.py").read_text().splitlines()
    number = int(tables.link_to("triadapt.py", "TriAdaptLinear.new_entries").split("#L")[1][:-1])
    assert "def new_entries" in lines[number - 1]
    classes = [line for line in lines[:number] if line.startswith("class ")]
    assert classes[-1].startswith("class TriAdaptLinear")
    with pytest.raises(LookupError, match=r"triadapt.py has no LoRALinear.fly"):
        tables.link_to("triadapt.py", "LoRALinear.fly")


# ------------------------------------------------------------------------------------ pages

PARTS_OF = {
    "README.md": ["paper", "first run", "found"],
    "RESULTS.md": ["rows", "contrasts", "rates", "saves", "planted"],
    "BENCH.md": ["bench", "time to loss"],
    "RELEASED.md": ["ablations", "recipes", "claims"],
}


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_what_the_results_give(page):
    text = page.read_text()
    parts = re.findall(r"<!-- (.*): written by plots/figures/tables.py -->", text)
    assert sorted(parts) == sorted(PARTS_OF[page.name])
    assert tables.render(text) == text


def test_what_was_found_has_eight_rows_and_five_sentences_at_most():
    begin, end = tables.markers("found")
    found = tables.PAGES[0].read_text().partition(begin)[2].partition(end)[0]
    table, said = found.strip().split("\n\n")
    assert len(table.splitlines()) <= 2 + 8
    assert len(re.findall(r"\.(?= |$)", said)) <= 5


ALL_PAGES = [ROOT / "README.md", *sorted((ROOT / "plots").glob("*.md"))]


def links_of(page: Path) -> list[Path]:
    """The files that a page links to or shows."""
    links = re.findall(r"\[[^]]*\]\(([^)#:]+)[^):]*\)", page.read_text())
    return [(page.parent / link).resolve() for link in links]


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_a_page_links_only_to_what_is_there(page):
    for link in links_of(page):
        assert link.exists(), link


def test_every_figure_is_on_a_page_and_small():
    linked = {link for page in ALL_PAGES for link in links_of(page)}
    figures = set((ROOT / "plots").rglob("*.png"))
    assert figures - linked == set()
    assert max(path.stat().st_size for path in figures) <= draw.MOST_BYTES


def test_a_part_that_is_not_closed_is_not_overwritten():
    begin, end = tables.markers("first run")
    assert tables.render(f"a\n{begin}\nold\n{end}\nz").endswith(f"{end}\nz")
    with pytest.raises(ValueError, match="is not closed"):
        tables.render(f"a\n{begin}\nold")


def test_cells_are_read_as_they_were_appended(tmp_path):
    path = tmp_path / "cells.jsonl"
    assert cells.read(path) == []
    for row in ("a", "b"):
        cells.append(path, {"row": row})
    assert cells.read(path) == [{"row": "a"}, {"row": "b"}]
    assert json.loads(path.read_text().splitlines()[1]) == {"row": "b"}
