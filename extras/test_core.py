"""More promises of the core: targets, the model and its data, the command line, forks."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import data
import test_triadapt
import train
from extras.experiments.bases import long_base
from model import GPT, GPTConfig, generate
from test_triadapt import (
    TINY,
    adapted,
    allocator_of,
    each_device,
    fit,
    read_log,
    refusal,
    run,
    run_interrupted,
    trained,
)
from triadapt import (
    ALLOCATORS,
    METHODS,
    LoRALinear,
    RankAllocator,
    adapter_state_dict,
    add_adapters,
    find_adapters,
    merge_adapters,
)

ROOT = Path(__file__).parents[1]
home = test_triadapt.home  # a fixture


def test_targets_are_names_or_a_pattern():
    def names(targets):
        return [*add_adapters(GPT(GPTConfig(16, 8, 2, 1, 4)), targets, rank=1)]

    assert names(["q"]) == ["blocks.0.q", "blocks.1.q"]
    assert names(["v", "1.q"]) == ["blocks.0.v", "blocks.1.q", "blocks.1.v"]  # module order
    assert names("fc|proj") == ["blocks.0.fc", "blocks.0.proj", "blocks.1.fc", "blocks.1.proj"]
    assert names(r"blocks\.0\.(q|o)") == ["blocks.0.q", "blocks.0.o"]


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


def test_ctrl_c_names_the_saved_step(home, monkeypatch, capsys):
    run_interrupted(f"{TINY} --out out", 11, monkeypatch)
    assert "stopped after step 10, saved at step 8\n" in capsys.readouterr().out
    run_interrupted("--resume out", 12, monkeypatch)  # before it saved anything itself
    assert "stopped after step 11, saved at step 8\n" in capsys.readouterr().out


def test_seed_and_step_determine_the_batch():
    examples = [(torch.tensor([i]), torch.tensor([i])) for i in range(1000)]
    draws = [train.draw_batch(examples, *key, 8)[0] for key in [(0, 1), (0, 1), (0, 2), (1, 1)]]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])


def test_the_learning_rate_rises_and_falls():
    curve = [train.learning_rate(step, 100, 1.0) for step in range(1, 101)]
    assert curve[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert curve[2:] == sorted(curve[2:], reverse=True)
    assert curve[-1] == pytest.approx(0.1)


def test_the_console_is_short(home, capsys):
    run("--base tiny.pt --data text.txt --steps 20 --out out")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if re.match(r"step .* rank .* s left$", line)]) == 10
    assert lines[-1] == f"look at  {Path('out/run.png')}"


def test_scratch_and_full_training_make_a_base(home):
    run(f"{TINY} --base scratch --context 16 --method full --out base")
    assert "adapter.pt" not in os.listdir("base")
    finished = run(f"{TINY} --base base/model.pt --context 16 --out out")
    assert finished.log[0]["test_loss"] == pytest.approx(read_log("base")[-1]["test_loss"])


@pytest.mark.parametrize(
    "options, words",
    [
        ("--data nothing.txt", "--data nothing.txt: not a file, and not one of prose, code"),
        ("--data tiny.pt", "data tiny.pt: not UTF-8 text"),
        ("--data short.txt", "split: give more text"),
        ("--base train.py", "--base train.py: not a model.pt, and not one of scratch"),
        ("--base nothing.pt", "--base nothing.pt: not a model.pt, and not one of scratch"),
        ("--base runs/adapter.pt", "holds no model; give the model.pt of --method full"),
        ("--context 17", "--context 17: this base allows 16"),
        ("--target-modules qq", "target module qq: not found; linear layers are q, k, v"),
        ("--init-rank 9", "init_rank 9: must be from 1 to the rank, 8"),
        ("--rank 1", "nothing can grow with total rank 6 of 6"),
        (
            "--method lora --schedule linear",
            "no importance in these adapters: use triadapt, or another allocator",
        ),
        ("--interval 0", "interval 0: must be 1 or more"),
        ("--seed -1", "seed -1: must be 0 or more"),
        ("--allocator best", "--allocator best: must be importance"),
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
    assert "note: the run to resume has hello and keeps it" in capsys.readouterr().err


def test_a_run_works_in_a_thread(home):
    thread = threading.Thread(target=run, args=[f"{TINY} --steps 2 --out out"])
    thread.start()
    thread.join()
    assert Path("out/run.png").exists()


def test_the_command_runs_from_any_folder(home):
    # base.pt lies next to train.py. The notebook's backend is not installed, and the locale is C.
    odd = {"MPLBACKEND": "module://not_installed", "LC_ALL": "C", "PYTHONUTF8": "0"}
    options = {"--data": "text.txt", "--context": "16", "--steps": "2", "--out": "out"}
    command = [sys.executable, ROOT / "train.py", *sum(options.items(), ())]
    done = subprocess.run(command, env=os.environ | odd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("out/run.png").exists()
    assert "from base.pt" in done.stdout


def test_the_core_imports_what_the_card_allows():
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "tokenizers"}
    own = {"train.py": {"data", "model", "triadapt", "plots.run"}}
    for name in ("triadapt.py", "model.py", "data.py", "train.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                assert module.partition(".")[0] in allowed or module in own.get(name, ()), name


# README.

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_shows_the_lines_of_the_method():
    source = (ROOT / "triadapt.py").read_text(encoding="utf-8").splitlines()
    shown = [line for line in BLOCKS[0].splitlines() if line.strip() != "..."]
    missing = [line for line in shown if line not in source]
    assert not missing and len(shown) > 20


def test_readme_links_to_the_lines():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 10
    for name, file, line in links:
        code = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        name = name.rpartition(".")[2]
        assert re.match(rf"\s*(def )?{name}\b", code), f"{name} is not in line {line} of {file}"


def test_readme_shows_the_committed_run():
    lines = (ROOT / "plots/first_run/log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    sizes = [(128, 128)] * 16 + [(128, 512)] * 8  # of the 24 matrices
    lora = sum(8 * (d_out + d_in) for d_out, d_in in sizes)
    assert f"{log[-1]['trainable']:,} and {lora:,} trained parameters" in README
    steps = [entry["step"] for entry in log if entry["kind"] == "allocation"]
    ranks = f"from {log[0]['total_rank']} to its budget, {log[-1]['total_rank']}"
    assert f"{ranks}, from step {steps[0]} to {steps[-1]}" in README
    losses = f"{log[0]['test_loss']:.4f} to {log[-1]['test_loss']:.4f}"
    assert f"test loss falls from {losses} nats per token" in README


def test_readme_uses_a_result(home, capsys):
    finished = run(f"{TINY} --out runs/triadapt-linear-1")
    capsys.readouterr()
    names = {}
    exec(BLOCKS[1], names)
    ids = torch.randint(300, (1, 9))
    torch.testing.assert_close(names["gpt"](ids), finished.model.eval()(ids))
    assert capsys.readouterr().out.startswith("The with statement")


def test_readme_adapts_a_model():
    names = {}
    exec(BLOCKS[2], names)
    assert names["allocator"].total_rank == names["allocator"].budget == 24


def test_readme_fork_runs(home, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fork.py", *f"{TINY} --method diagonal --out out".split()])
    exec(BLOCKS[3], {"__name__": "__main__"})
    del METHODS["diagonal"]
    assert read_log("out")[-1]["total_rank"] == 48


def test_base_is_that_of_the_evidence():
    gpt, tokenizer = train.open_base("base.pt")
    original, its_tokenizer = long_base("0", [])
    assert tokenizer.to_str() == its_tokenizer.to_str()
    for name, weight in original.state_dict().items():
        assert torch.equal(gpt.get_parameter(name), weight.half().float())


def test_saving_needs_the_names_of_the_state_dict():
    """torch's checkpoint_wrapper hides its prefix in state_dict, and would lose the adapters."""
    net = nn.Sequential(checkpoint_wrapper(nn.Linear(3, 3)))
    add_adapters(net, ".*", rank=2)
    with pytest.raises(KeyError, match="0._checkpoint_wrapped_module.lora_B"):
        adapter_state_dict(net)


def test_numbers_of_numpy_can_be_resumed(home, monkeypatch):
    monkeypatch.setattr(data.Task, "metrics", lambda task, loss, collected: {"np": np.float64(1)})
    old = RankAllocator.scores

    def scores(self):
        return {name: np.float64(score) for name, score in old(self).items()}

    monkeypatch.setattr(RankAllocator, "scores", scores)
    log = run(TINY).log
    assert {type(entry["test_np"]) for entry in (log[0], log[-1])} == {float}
    grown = [entry["scores"] for entry in log if entry["kind"] == "allocation"]
    assert {type(score) for scores in grown for score in scores.values()} == {float}


def test_the_importance_takes_no_argument(home, monkeypatch, capsys):
    monkeypatch.setitem(ALLOCATORS, "importance", RankAllocator)  # extras/ has one with arguments
    said = refusal(f"{TINY} --allocator importance:x", capsys)
    assert "--allocator importance:x: must be importance" in said
