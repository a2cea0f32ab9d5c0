"""Tests of extras/trainer.py: pytest extras/test_trainer.py"""

import copy
import gc
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import DistributedType, PartialState
from schedulefree import AdamWScheduleFree
from torch import distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from extras.allocators import Sensitivity, Worth
from extras.trainer import KEY, GrowthCallback, after_growth, check_kind, share_scores
from triadapt import RankAllocator, adapter_state_dict, add_adapters

gc.freeze()  # what was imported, which makes each search for a DistributedDataParallel fast
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
PROCESS = int(os.environ.get("RANK", 0))
POINTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
POINT_ROWS = [{"x": x, "labels": int(x.argmax()) % 5} for x in POINTS]


class PointNet(nn.Sequential):
    def forward(self, x, labels):
        for layer in self:
            x = layer(x.tanh())
        return {"loss": nn.functional.cross_entropy(x, labels), "logits": x}


class SeededAllocator(RankAllocator):
    """New entries that depend on step and process, and scores that depend on the process."""

    def step(self, t):
        torch.manual_seed(t + 1000 * PROCESS)
        return super().step(t)

    def scores(self):
        return {name: score * (-1) ** PROCESS for name, score in super().scores().items()}


def adapted_net():
    """A net and its adapters, with a total rank of 8 that can grow to 16."""
    torch.manual_seed(0)
    net = PointNet(*map(nn.Linear, [6, 10, 10, 10], [10, 10, 10, 5]))
    net.states = []  # of the adapters, after each step
    adapters = add_adapters(net, ["0", "1", "2", "3"], rank=4, init_rank=2)
    adapters["2"].lora_A.requires_grad_(False)  # it also grows at random
    return net, adapters


class KeepStates(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        model.states.append(adapter_state_dict(model))


def make_trainer(folder, allocator=SeededAllocator, interval=2, optimizer=None, **changes):
    """A Trainer of 12 steps, with active clipping."""
    net, adapters = adapted_net()
    settings = {"max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    settings |= {"max_grad_norm": 0.1, "save_strategy": "no", "use_cpu": True} | changes
    arguments = transformers.TrainingArguments(str(folder), **settings)
    callbacks = [GrowthCallback(adapters, allocator, warmup=2, interval=interval), KeepStates()]
    optimizers = (optimizer and optimizer(net.parameters()), None)
    data = {"train_dataset": POINT_ROWS, "eval_dataset": POINT_ROWS}
    return transformers.Trainer(net, arguments, callbacks=callbacks, optimizers=optimizers, **data)


def run_trainer(folder, resume=None, **settings):
    """The adapters after each step."""
    trainer = make_trainer(folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.states


def run_loop(steps):
    """The same by hand, with a list of batches for each step."""
    net, adapters = adapted_net()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0, fused=True)
    allocator = SeededAllocator(adapters, optimizer, total_steps=12, warmup=2, interval=2)
    ddp = net
    if dist.is_initialized():
        ddp = DistributedDataParallel(net)
        share_scores(allocator)
    for t, batches in enumerate(steps, 1):
        optimizer.zero_grad()
        for batch in batches:
            (ddp(**batch)["loss"] / len(batches)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = 1e-2 * ((13 - t) / 12)
        optimizer.step()
        if allocator.step(t) and ddp is not net:
            after_growth(ddp)
        net.states.append(adapter_state_dict(net))
    return net.states


def sum_ranks(state):
    return sum(int(value[2]) for name, value in state.items() if name.endswith("_extra_state"))


def assert_refused(message, function, *args, **settings):
    with pytest.raises(ValueError, match=f"^{message}"):
        function(*args, **settings)


SHARED_WORK = {  # by two processes, and by one with the same global batches
    "cosine": {"lr_scheduler_type": "cosine", "interval": 1},
    "accumulated": {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
}
SAVING = {"save_strategy": "steps", "allocator": RankAllocator, "gradient_accumulation_steps": 2}
RESUMED = {  # from a checkpoint in the middle of an interval, or after the end of growth
    7: SAVING | {"interval": 3, "save_steps": 7, "learning_rate": 5e-2},
    11: SAVING | {"interval": 1, "save_steps": 11, "optimizer": torch.optim.AdamW},
}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
BEST |= {"save_strategy": "steps", "greater_is_better": True}  # the highest loss is at step 4


def check_resume(folder, step, **changes):
    """Compare resumed runs with the uninterrupted one, whose states are returned."""
    settings = RESUMED[step] | changes
    trainer = make_trainer(folder, **settings)
    trainer.train()
    whole = trainer.model.states.copy()
    checkpoint = folder / f"checkpoint-{step}"
    assert_equal(run_trainer(folder / "resumed", checkpoint, **settings), whole[step:])
    trainer.train(resume_from_checkpoint=checkpoint)  # to lower ranks
    assert_equal(trainer.model.states[12:], whole[step:])
    return whole


def run_two_processes(folder):
    """What torchrun runs, in both processes."""
    results = {}
    for name, settings in SHARED_WORK.items():
        results[name] = run_trainer(folder, **settings)
    for step in RESUMED:
        results[step] = check_resume(folder / str(step), step)
    for optimizer in (None, torch.optim.AdamW):
        trainer = make_trainer(folder / "best", optimizer=optimizer, **BEST)
        trainer.train()
        best = adapter_state_dict(trainer.model)
        assert_equal([best], trainer.model.states[3:4])
        assert sum_ranks(best) < sum_ranks(trainer.model.states[-1]) == 16
        trainer.train()  # from the best checkpoint, under the same DistributedDataParallel
        results[str(optimizer)] = trainer.model.states
    copy.deepcopy(trainer.model)  # must not copy its DistributedDataParallel
    results["loop"] = run_loop([[default_collate(POINT_ROWS[4 * PROCESS :][:4])]] * 12)

    assert_refused("static_graph of Distrib", run_trainer, folder, ddp_static_graph=True)
    assert_refused("FSDP without Distrib", run_trainer, folder, fsdp=True)
    zero = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
    assert_refused("optimizer ZeroRedundancyOpt.* hides", run_trainer, folder, optimizer=zero)
    assert_refused("MULTI_CPU without Distrib", check_kind, trainer.args, [])
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    ddp._delay_all_reduce_params = [ddp.module.weight]
    assert_refused("delay_all_reduce_named_params of Distrib", after_growth, ddp)
    ddp.register_comm_hook(None, lambda state, bucket: None)
    assert_refused("a communication hook of Distrib", after_growth, ddp)
    torch.save(results, folder / f"{PROCESS}.pt")


def test_two_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", f"extras.{Path(__file__).stem}", tmp_path]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
    # Not judged by its exit, because torch with gloo sometimes aborts after all work is done.
    assert (tmp_path / "1.pt").exists(), done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{process}.pt") for process in (0, 1))
    assert_equal(first, second)
    one = {"loop": run_loop([[default_collate(POINT_ROWS[:8])]] * 12)}
    for name, settings in SHARED_WORK.items():
        steps = 2 * settings.get("gradient_accumulation_steps", 1)
        one[name] = run_trainer(tmp_path, **settings | {"gradient_accumulation_steps": steps})
    for name, states in one.items():
        assert sum_ranks(states[0]) == 8 and sum_ranks(states[-1]) == 16
        assert_equal({name: first[name]}, {name: states}, atol=0 if name == "bf16" else 1e-5)


def test_one_process_equals_a_loop(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2)
    seen = []
    trainer.model.register_forward_pre_hook(lambda *args: seen.append(args[2]), with_kwargs=True)
    trainer.train()
    assert_equal(trainer.model.states, run_loop(zip(seen[::2], seen[1::2], strict=True)))


@pytest.mark.parametrize("step, allocator", [(7, Worth), (7, Sensitivity), (11, RankAllocator)])
def test_resume_is_exact(tmp_path, step, allocator):
    whole = check_resume(tmp_path, step, allocator=allocator)
    assert (sum_ranks(whole[step - 1]) == 16) == (step == 11)


def test_resume_needs_the_allocators_state(tmp_path):
    class Forgetful(RankAllocator):
        REMEMBERS = ("ranks", "last_step")  # not the baseline

    with pytest.raises(AssertionError):
        check_resume(tmp_path, 7, allocator=Forgetful)
    saved = tmp_path / "checkpoint-7"
    resume = partial(run_trainer, tmp_path, saved, **RESUMED[7])
    assert_refused("resume with the settings of the checkpoint: Forgetful {'int", resume)
    state = saved / "trainer_state.json"
    state.write_text(state.read_text().replace(f'"{KEY}"', '"other"'))
    assert_refused("the checkpoint was written without GrowthCallback", resume)


def test_what_cannot_grow_is_refused(tmp_path, monkeypatch):
    assert_refused("optimizer AdamWSch.* 'z'", run_trainer, tmp_path, optimizer=AdamWScheduleFree)
    trainer = make_trainer(tmp_path)
    net = trainer.model
    net[0].tied = net[1].tied = nn.Parameter(torch.zeros(2))
    trainer.train()  # what is tied has no adapter
    trainer.train()  # and nothing can grow any more
    net[1].base.weight = net[2].base.weight
    assert_refused("1 is tied: call extras.layers.untie", trainer.train)
    monkeypatch.setitem(PartialState()._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    assert_refused("DEEPSPEED without", check_kind, trainer.args, [])
    trainer.args._n_gpu = 2
    assert_refused("DataParallel without", check_kind, trainer.args, [])


if __name__ == "__main__":
    run_two_processes(Path(sys.argv[1]))
