"""Tests of extras/trainer.py: pytest extras/test_trainer.py

torchrun runs this file once in two processes. They are judged by what they write, because torch
with gloo sometimes aborts at exit after all work is done.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.state import PartialState
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate as batch

from extras.allocators import Sensitivity, Worth
from extras.trainer import KEY, GrowthCallback, after_growth, share_scores
from triadapt import RankAllocator, adapter_state_dict, add_adapters

torch.set_num_threads(1)
PROCESS = int(os.environ.get("RANK", 0))
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
ROWS = [{"x": x, "labels": int(x.argmax()) % 5} for x in X]


class Net(nn.Module):
    def __init__(self, dropout=0.0, checkpointing=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(map(nn.Linear, [6, 10, 10, 10], [10, 10, 10, 5]))
        self.dropout = nn.Dropout(dropout)
        self.checkpointing = checkpointing

    def forward(self, x, labels):
        for layer in self.layers:
            x = self.dropout(x.tanh())
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return {"loss": nn.functional.cross_entropy(x, labels), "logits": x}


class Seeded(RankAllocator):
    """New entries that depend on step and process, and scores that depend on the process."""

    def step(self, t):
        torch.manual_seed(t + 1000 * PROCESS)
        return super().step(t)

    def scores(self):
        return {name: score * (-1) ** PROCESS for name, score in super().scores().items()}


class Watch(transformers.TrainerCallback):  # keeps the adapters after each step
    def on_train_begin(self, args, state, control, **kwargs):
        self.states = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.states.append(adapter_state_dict(model))


def adapted(*settings):
    net = Net(*settings)
    return net, add_adapters(net, ["0", "1", "2", "3"], rank=4, init_rank=2)


def make(folder, allocator=Seeded, interval=2, frozen="", optimizer=None, net=(0.0, False), **args):
    """A Trainer of 12 steps, in which the total rank grows from 8 to 16."""
    net, adapters = adapted(*net)
    optimizers = (optimizer and optimizer(net.parameters()), None)
    for adapter in adapters.values() if frozen else ():
        getattr(adapter, frozen).requires_grad_(False)
    args = {"max_steps": 12, "learning_rate": 1e-2, "save_strategy": "no"} | args
    args |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 100}
    args = transformers.TrainingArguments(str(folder), **args)
    growth = GrowthCallback(adapters, allocator=allocator, warmup=2, interval=interval)
    data = {"train_dataset": ROWS, "eval_dataset": ROWS[:15]}
    trainer = transformers.Trainer(net, args, optimizers=optimizers, callbacks=[growth], **data)
    trainer.growth, trainer.watch = growth, Watch()
    trainer.add_callback(trainer.watch)
    return trainer


def train(folder, resume=None, **settings):
    trainer = make(folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.watch.states


def loop(steps, wrap=lambda net: net):
    """The same by hand, with a list of batches for each step."""
    net, adapters = adapted()
    ddp = wrap(net)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0, fused=True)
    allocator = Seeded(adapters, optimizer, total_steps=12, warmup=2, interval=2)
    if ddp is not net:
        share_scores(allocator)
    states = []
    for t, batches in enumerate(steps, 1):
        optimizer.zero_grad()
        for inputs in batches:
            (ddp(**inputs)["loss"] / len(batches)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = 1e-2 * ((13 - t) / 12)
        optimizer.step()
        if allocator.step(t) and ddp is not net:
            after_growth(ddp)
        states.append(adapter_state_dict(net))
    return states


# In two processes, and in one process with the same global batches.
SAME = {
    "clipped": {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3},
    "accumulated": {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2},
    "checkpointing": {"net": (0.0, True), "ddp_find_unused_parameters": False},
    "frozen": {"frozen": "lora_A", "interval": 1},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 5},
    "bf16": {"bf16": True, "max_grad_norm": 0.1, "lr_scheduler_type": "cosine"},
}
SAVING = {"save_strategy": "steps", "net": (0.2, False), "allocator": RankAllocator}
RESUMED = {  # a checkpoint in the middle of an interval, and one after the end of growth
    "middle": SAVING | {"interval": 3, "save_steps": 7},
    "ended": SAVING | {"interval": 1, "save_steps": 11, "optimizer": torch.optim.AdamW},
}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
BEST |= {"save_strategy": "steps", "greater_is_better": True}  # the highest loss is at step 4


def run_two_processes(folder):
    """What torchrun runs, in both processes."""

    def keep(name, result):
        torch.save(result, f"{folder}/{name}-{PROCESS}.pt")

    for name, settings in SAME.items():
        keep(name, train(folder, **settings | {"per_device_train_batch_size": 4}))
    for name, settings in RESUMED.items():
        whole = train(f"{folder}/{name}", **settings)
        saved = f"{folder}/{name}/checkpoint-{settings['save_steps']}"
        keep(name, (whole, train(folder, saved, **settings)))
    trainer = make(f"{folder}/best", **BEST)
    trainer.train()
    trainer.train()
    keep("again", trainer.watch.states)
    keep("loop", loop([[batch(ROWS[4 * PROCESS :][:4])]] * 12, DistributedDataParallel))
    hooked = DistributedDataParallel(adapted()[0])
    hooked.register_comm_hook(None, allreduce_hook)
    with pytest.raises(ValueError, match="^a communication hook of Dist"):
        after_growth(hooked)
    with pytest.raises(ValueError, match="^static_graph of Distr"):
        train(folder, ddp_static_graph=True)
    keep("refused", ["hook", "static_graph"])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A function that returns what both processes kept under a name."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "extras.test_trainer", folder]
    where = {"cwd": Path(__file__).parents[1], "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, **where)

    def kept(name):
        assert (folder / f"{name}-1.pt").exists(), done.stderr[-3000:]
        return [torch.load(folder / f"{name}-{process}.pt") for process in (0, 1)]

    return kept


def assert_equal(states, expected, tolerance=0.0):
    torch.testing.assert_close(states, expected, rtol=0, atol=tolerance)


def total_rank(state):
    return sum(int(value[2]) for name, value in state.items() if name.endswith("_extra_state"))


@pytest.mark.parametrize("name", SAME)
def test_two_processes_equal_one(two, tmp_path, name):
    first, second = two(name)
    assert_equal(first, second)
    micro = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one = train(tmp_path, **SAME[name] | (micro if name == "bf16" else {}))
    assert total_rank(one[0]) == 8 and total_rank(one[-1]) == 16
    assert_equal(first, one, 0.0 if name == "bf16" else 1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_resume_exactly(two, name):
    (whole, resumed), second = two(name)
    assert_equal(whole + resumed, second[0] + second[1])
    assert_equal(resumed, whole[RESUMED[name]["save_steps"] :])


def test_second_training_keeps_replicas_equal(two):
    first, second = two("again")
    assert_equal(first, second)
    assert total_rank(first[0]) < total_rank(first[-1]) == 16


def test_own_loop_equals_one_process(two):
    first, second = two("loop")
    assert_equal(first, second)
    assert_equal(first, loop([[batch(ROWS[:8])]] * 12), 1e-5)


def test_one_process_equals_a_loop(tmp_path):
    trainer = make(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1)
    seen = []
    trainer.model.register_forward_pre_hook(lambda *args: seen.append(args[2]), with_kwargs=True)
    trainer.train()
    assert len(seen) == 24 and trainer.growth.ended
    assert_equal(trainer.watch.states, loop(list(zip(seen[::2], seen[1::2], strict=True))))


@pytest.mark.parametrize("allocator", [RankAllocator, Worth, Sensitivity])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(tmp_path, name, allocator):
    settings = RESUMED[name] | {"allocator": allocator}
    step = settings["save_steps"]
    whole = train(tmp_path, **settings)
    assert (total_rank(whole[step - 1]) == 16) == (name == "ended")
    resumed = train(tmp_path / "resumed", tmp_path / f"checkpoint-{step}", **settings)
    assert_equal(resumed, whole[step:])


def test_resume_needs_the_allocators_state(tmp_path):
    class Forgetful(RankAllocator):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.take_baseline()

    settings = RESUMED["middle"] | {"allocator": Forgetful}
    whole = train(tmp_path, **settings)
    checkpoint = tmp_path / "checkpoint-7"
    with pytest.raises(AssertionError):
        assert_equal(train(tmp_path / "resumed", checkpoint, **settings), whole[7:])
    with pytest.raises(ValueError, match="^resume with the settings of the checkpoint: {'alloc"):
        train(tmp_path, checkpoint, **settings | {"interval": 2})
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"][KEY]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="^the checkpoint was written without GrowthCallback"):
        train(tmp_path, checkpoint, **settings)


def test_a_trainer_can_train_again(tmp_path):
    trainer = make(tmp_path, **RESUMED["middle"])
    trainer.train()
    whole = trainer.watch.states
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-7")  # of lower ranks
    assert_equal(trainer.watch.states, whole[7:])
    trainer.train()  # growth goes on
    trainer.train()  # no growth
    whole = trainer.watch.states
    assert {total_rank(state) for state in whole} == {16}
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-7")
    assert_equal(trainer.watch.states, whole[7:])


def test_best_checkpoint_may_have_lower_ranks(tmp_path):
    trainer = make(tmp_path, **BEST)
    trainer.train()
    best = adapter_state_dict(trainer.model)
    assert_equal([best], [trainer.watch.states[trainer.state.best_global_step - 1]])
    assert total_rank(best) < total_rank(trainer.watch.states[-1]) == 16


def test_other_ways_are_refused(monkeypatch):
    net, adapters = adapted()
    hidden = SimpleNamespace(optim=torch.optim.AdamW(net.parameters()))
    for kind, n_gpu, processes, event, message in (
        ("FSDP", 0, 2, "on_init_end", "FSDP: growth needs whole tensors"),
        ("DEEPSPEED", 0, 1, "on_train_begin", "DEEPSPEED: growth needs whole tensors"),
        ("NO", 2, 1, "on_init_end", "DataParallel on 2 GPUs"),
        ("MULTI_GPU", 0, 2, "on_train_begin", "2 processes without DistributedDataParallel"),
        ("NO", 0, 1, "on_train_begin", "optimizer SimpleNamespace hides AdamW"),
    ):
        kind = SimpleNamespace(value=kind)
        monkeypatch.setitem(PartialState()._shared_state, "distributed_type", kind)
        args = SimpleNamespace(n_gpu=n_gpu, world_size=processes, fsdp=[])
        with pytest.raises(ValueError, match=f"^{message}"):
            getattr(GrowthCallback(adapters), event)(args, None, None, model=net, optimizer=hidden)


def test_settings_of_the_reducer_are_refused(two):
    assert two("refused")[0] == two("refused")[1] == ["hook", "static_graph"]


if __name__ == "__main__":
    run_two_processes(sys.argv[1])
