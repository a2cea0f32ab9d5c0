"""Tests of extras/layers.py: pytest extras/test_layers.py"""

import copy

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

import triadapt
from extras.layers import convert_conv1d, merge_measured, restore_conv1d, untie

pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)
IDS, X = torch.arange(3, 21).view(2, 9), torch.randn(2, 5, 8)
SIZES = {"vocab_size": 60, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
T5 = {"vocab_size": 60, "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 1, "num_heads": 4}


class Logits(nn.Module):
    """A tiny model of transformers, whose output is a tensor."""

    def __init__(self, kind="GPT2LMHeadModel", sizes=SIZES):
        super().__init__()
        torch.manual_seed(0)
        model = getattr(transformers, kind)
        self.model = model(model.config_class(**sizes))

    def forward(self, ids):
        two = {"decoder_input_ids": ids} if hasattr(self.model, "encoder") else {}
        return self.model(ids, **two).logits


def hooked(layer, change=lambda y: 3 * y):
    layer.register_forward_hook(lambda module, args, output: change(output))
    return layer


def replaced(layer):
    forward = layer.forward
    drop = nn.functional.dropout
    layer.forward = lambda x: drop(forward(x), training=layer.training) - 1
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def quantized(bits):
    plain = nn.Linear(64, 64, bias=bits == 4).bfloat16()
    packed = bitsandbytes.nn.Linear4bit(64, 64)
    if bits == 8:
        packed = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    packed.load_state_dict(plain.state_dict())
    packed.bias = plain.bias
    return nn.Sequential(packed, nn.Linear(64, 64).bfloat16()).to("cpu")


MODELS = {  # a model, targets, an input, a tolerance
    "gpt2": (lambda: convert_conv1d(Logits()), "c_attn|c_proj|c_fc", IDS, 1e-5),
    "gpt2 untied": (lambda: untie(convert_conv1d(Logits())), "c_fc|lm_head", IDS, 1e-5),
    "t5": (lambda: Logits("T5ForConditionalGeneration", T5), "q|wi|wo", IDS, 1e-5),
    "4 bits": (lambda: quantized(4), "0", torch.randn(3, 64).bfloat16(), 0.02),
    "8 bits": (lambda: quantized(8), "0", torch.randn(3, 64).bfloat16(), 0.02),
}
NORMS = [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm]
for i, spoil in enumerate([*NORMS, pruned, hooked, replaced]):
    make = lambda spoil=spoil: nn.Sequential(spoil(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3))  # noqa: E731
    MODELS[f"{i} {spoil.__name__}"] = (make, "0|2", X, 1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_train_grow_load_and_merge(kind):
    make, targets, x, tolerance = MODELS[kind]
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(make().eval())
    net, fresh = nets
    base = net(x)
    triadapt.add_adapters(fresh, targets, rank=3, init_rank=2)
    adapters = triadapt.add_adapters(net, targets, rank=3, init_rank=2, dropout=0.1)
    torch.testing.assert_close(net(x), base)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    allocator = triadapt.RankAllocator(adapters, optimizer, total_steps=6, warmup=1, interval=1)
    net.train()
    for t in range(1, 7):
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()
        allocator.step(t)
    assert allocator.total_rank == allocator.budget
    output = net.eval()(x)
    triadapt.load_adapter_state_dict(fresh, triadapt.adapter_state_dict(net))
    torch.testing.assert_close(fresh(x), output)

    if tolerance > 1e-5:  # more than W x + b, or packed
        with pytest.raises(ValueError, match="^0: cannot be merged, it is not W x"):
            triadapt.merge_adapters(net)
    merge_measured(net.train()).eval()
    assert (net(x) - output).norm() < tolerance * output.norm()
    assert (base - output).norm() > 3 * tolerance * output.norm()
    assert not any(p.requires_grad for p in net.parameters())
    if tolerance > 1e-5:
        assert type(net[0]) is nn.Linear and not net[0]._forward_hooks
        assert net[0].weight.dtype == x.dtype
    if "gpt2" in kind:
        torch.testing.assert_close(restore_conv1d(net)(x), output)
        assert sum(isinstance(module, Conv1D) for module in net.modules()) == 8


def test_conversion_keeps_values_and_shared_weights():
    plain = Logits().eval()
    blocks = plain.model.transformer.h
    blocks[1].attn = blocks[0].attn
    blocks[1].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    net = convert_conv1d(copy.deepcopy(plain))
    assert not any(isinstance(module, Conv1D) or module.training for module in net.modules())
    torch.testing.assert_close(net(IDS), plain(IDS))
    old, new = dict(plain.named_parameters()), dict(restore_conv1d(net).named_parameters())
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("spoil", [pruned, parametrizations.weight_norm, hooked])
def test_conversion_refuses_computed_weights(spoil):
    net = nn.Sequential(Conv1D(4, 4), spoil(Conv1D(4, 4)))
    with pytest.raises(ValueError, match="^1: its Conv1D has hooks or computes its weight$"):
        convert_conv1d(net)
    assert isinstance(net[0], Conv1D)
    net = convert_conv1d(nn.Sequential(Conv1D(4, 4)))
    spoil(net[0])
    with pytest.raises(ValueError, match="^0: its Linear has hooks or computes its weight$"):
        restore_conv1d(net)
    triadapt.add_adapters(net, ["0"])
    with pytest.raises(ValueError, match="^the model has adapters"):
        restore_conv1d(net)


def test_an_untied_head_survives_saving(tmp_path):
    net = untie(convert_conv1d(Logits())).eval()
    adapters = triadapt.add_adapters(net, ["lm_head"], rank=4)
    nn.init.normal_(adapters["model.lm_head"].lora_B)
    output = net(IDS)
    net.model.save_pretrained(tmp_path / "adapted")  # as the Trainer does at a checkpoint
    restore_conv1d(triadapt.merge_adapters(net)).model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, output)


CHANGES = [  # a half, almost linear, linear near 0, over time, no number
    lambda y: y.relu(),
    lambda y: (0.01 * y).tanh(),
    lambda y: (y + 20).relu(),
    lambda y: y.cumsum(dim=-2),
    lambda y: y * torch.nan,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_not_linear_is_refused(change):
    torch.manual_seed(0)
    norm = parametrizations.weight_norm(nn.Linear(8, 8))
    net = nn.Sequential(nn.Linear(8, 8), norm, hooked(nn.Linear(8, 8), change))
    adapters = triadapt.add_adapters(net, ["0", "1", "2"], rank=3)
    nn.init.normal_(adapters["0"].lora_B)
    bases = [adapter.base for adapter in adapters.values()]
    with pytest.raises(ValueError, match="^2: cannot be merged, because its Linear is not linear$"):
        merge_measured(net)
    assert [*net] == [*adapters.values()] and [adapter.base for adapter in net] == bases
    assert all(base.training for base in bases)
