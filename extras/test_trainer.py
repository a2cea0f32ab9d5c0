"""Tests of extras/trainer.py: pytest extras/test_trainer.py"""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from extras.trainer import GrowthCallback
from triadapt import RankAllocator, adapter_state_dict, add_adapters

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(6, 10)
        self.v_proj = nn.Linear(10, 5)

    def forward(self, x, labels):
        logits = self.v_proj(self.q_proj(x).tanh())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def adapted():
    net = Net()
    return net, add_adapters(net, ["q_proj", "v_proj"], rank=4, init_rank=2)


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def trainer_run(tmp_path, **settings):
    """10 steps of two batches: the callback, the model, and the batches in their order."""
    net, adapters = adapted()
    settings |= {"use_cpu": True, "save_strategy": "no", "report_to": []}
    settings |= {"max_steps": 10, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    args = transformers.TrainingArguments(str(tmp_path), **settings)
    rows = [{"x": torch.randn(6), "labels": i % 5} for i in range(160)]
    batches = []
    net.register_forward_pre_hook(
        lambda module, args, batch: batches.append(batch), with_kwargs=True
    )
    growth = GrowthCallback(adapters, warmup=2, interval=1)
    transformers.Trainer(net, args, train_dataset=rows, callbacks=[growth]).train()
    return growth.allocator, net, batches


def test_trainer_computes_what_a_plain_loop_does(tmp_path, monkeypatch):
    step = RankAllocator.step

    def seeded(allocator, t):  # decides the new entries
        torch.manual_seed(t)
        return step(allocator, t)

    monkeypatch.setattr(RankAllocator, "step", seeded)
    allocator, model, batches = trainer_run(tmp_path)
    assert len(batches) == 20 and allocator.total_rank == allocator.budget == 8

    net, adapters = adapted()
    optimizer = torch.optim.AdamW(trained(net), weight_decay=0.0, fused=True)
    by_hand = RankAllocator(adapters, optimizer, total_steps=10, warmup=2, interval=1)
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


def test_mixed_precision_keeps_float32_adapters(tmp_path):
    allocator, model, _ = trainer_run(tmp_path, bf16=True)
    assert allocator.total_rank == allocator.budget
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert all(p.isfinite().all() and p.any() for p in trained(model))


def test_several_processes_are_refused():
    growth = GrowthCallback(adapted()[1], warmup=2, interval=1)
    with pytest.raises(ValueError, match="^2 processes: growth works in one process only$"):
        growth.on_train_begin(SimpleNamespace(world_size=2), None, None, optimizer=None)
