"""Tests of extras/layers.py: pytest extras/test_layers.py"""

import copy

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from extras.layers import convert_conv1d, merge_measured, restore_conv1d
from triadapt import (
    RankAllocator,
    adapter_state_dict,
    add_adapters,
    load_adapter_state_dict,
    merge_adapters,
)

torch.set_num_threads(1)


def train_load_merge(make, targets, x, merge, tolerance=1e-5):
    """Trains with growth and merges. Starting, loading and merging keep the outputs."""
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(make().eval())
    net, fresh = nets
    base = net(x)
    add_adapters(fresh, targets, rank=3, init_rank=2)
    adapters = add_adapters(net, targets, rank=3, init_rank=2, dropout=0.1)
    assert torch.equal(net(x), base)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    allocator = RankAllocator(adapters, optimizer, total_steps=6, warmup=1, interval=1)
    net.train()
    for t in range(1, 7):
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()
        allocator.step(t)
    assert allocator.total_rank == allocator.budget
    output = net.eval()(x)
    load_adapter_state_dict(fresh, adapter_state_dict(net))
    assert torch.equal(fresh(x), output)
    merge(net.train()).eval()
    assert (net(x) - output).norm() < tolerance * output.norm()
    assert (base - output).norm() > 3 * tolerance * output.norm()
    assert not any(p.requires_grad for p in net.parameters())
    return net


class Logits(nn.Module):
    """A tiny GPT-2 of transformers, whose output is a tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))

    def forward(self, ids):
        return self.model(ids).logits


IDS = torch.arange(18).view(2, 9)


def test_converted_gpt2_computes_the_same():
    plain = Logits().eval()
    net = convert_conv1d(copy.deepcopy(plain))
    assert not any(isinstance(module, Conv1D) for module in net.modules())
    torch.testing.assert_close(net(IDS), plain(IDS))
    restored = restore_conv1d(net).state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(restored[name], tensor)


def test_converted_gpt2_trains_loads_and_merges():
    targets = ["c_attn", "c_proj", "c_fc"]
    net = train_load_merge(lambda: convert_conv1d(Logits()), targets, IDS, merge_adapters)
    merged = net(IDS)
    torch.testing.assert_close(restore_conv1d(net)(IDS), merged)
    assert sum(isinstance(module, Conv1D) for module in net.modules()) == 8


def test_conversion_keeps_what_is_shared():
    layer = Conv1D(4, 4)
    other = Conv1D(4, 4)
    other.weight = layer.weight
    net = convert_conv1d(nn.ModuleList([layer, other, layer]))
    assert net[0] is net[2] and net[0].weight is net[1].weight
    assert net[0].bias is layer.bias
    restore_conv1d(net)
    assert net[0] is net[2] and net[0].weight is net[1].weight


def test_conversion_refuses_computed_weights_and_adapters():
    for spoil in (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        parametrizations.weight_norm,
        lambda layer: layer.register_forward_hook(lambda module, args, output: 3 * output),
    ):
        net = nn.Sequential(Conv1D(4, 4), Conv1D(4, 4))
        spoil(net[1])
        with pytest.raises(ValueError, match="^1: its Conv1D has hooks or computes its weight$"):
            convert_conv1d(net)
        assert isinstance(net[0], Conv1D)
    net = nn.Sequential(nn.Linear(4, 4))
    add_adapters(net, ["0"])
    with pytest.raises(ValueError, match="^the model has adapters"):
        restore_conv1d(net)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * nn.functional.dropout(super().forward(x), training=self.training)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    return layer


def replaced(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) - 1  # accelerate's hooks do this
    return layer


LINEAR = {
    "plain": lambda: nn.Linear(8, 8),
    "own forward": lambda: Doubled(8, 8, bias=False),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "pruned": lambda: pruned(nn.Linear(8, 8, bias=False)),
    "hook": lambda: hooked(nn.Linear(8, 8)),
    "forward of the instance": lambda: replaced(nn.Linear(8, 8)),
}


@pytest.mark.filterwarnings("ignore")  # the old norm is deprecated
@pytest.mark.parametrize("kind", LINEAR)
def test_computed_weights_train_load_and_merge(kind):
    net = train_load_merge(
        lambda: nn.Sequential(LINEAR[kind](), nn.Tanh(), nn.Linear(8, 3)),
        ["0", "2"],
        torch.randn(2, 5, 8),
        merge_measured,
        tolerance=1e-4,
    )
    assert type(net[0]).forward is nn.Linear.forward
    assert {*net[0]._parameters} == {"weight", "bias"} and not net[0]._forward_hooks


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
def test_a_layer_that_is_not_linear_is_refused(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 8)), kind(8, 8))
    adapters = add_adapters(net, ["0", "1", "2"], rank=3)
    nn.init.normal_(adapters["0"].lora_B)
    bases = [adapter.base for adapter in adapters.values()]
    with pytest.raises(ValueError, match=f"^2: cannot be merged, because its {kind.__name__} is"):
        merge_measured(net)
    assert [*net] == [*adapters.values()]
    assert [adapter.base for adapter in net] == bases
    assert all(base.training for base in bases)


def quantized(bits):
    plain = nn.Linear(64, 64).bfloat16()
    packed = bitsandbytes.nn.Linear4bit(64, 64)
    if bits == 8:
        packed = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    packed.load_state_dict(plain.state_dict())
    packed.bias = plain.bias
    return nn.Sequential(packed.to("cpu"))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_trains_loads_and_merges(bits):
    x = torch.randn(3, 64).bfloat16()
    net = quantized(bits)
    net(x)
    assert net[0].weight.dtype in (torch.int8, torch.uint8)
    add_adapters(net, ["0"])
    with pytest.raises(ValueError, match="^0: cannot be merged"):
        merge_adapters(net)
    # 8 bits round the inputs.
    net = train_load_merge(lambda: quantized(bits), ["0"], x, merge_measured, tolerance=0.02)
    assert type(net[0]) is nn.Linear and net[0].weight.dtype == torch.bfloat16
