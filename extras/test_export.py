"""Tests of extras/export.py: pytest extras/test_export.py"""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from extras.export import export_lora
from extras.layers import convert_conv1d
from triadapt import TriAdaptLinear, add_adapters

torch.set_num_threads(1)


def shake(adapters: dict) -> None:
    """Uneven ranks and random entries, like after a training."""
    for i, adapter in enumerate(adapters.values()):
        adapter.grow(i % 3 + 1)
        for name in adapter.GROWS_ALONG:
            nn.init.normal_(getattr(adapter, name), std=0.3)


def assert_peft_agrees(net, plain, x, folder):
    """The files of net on the base `plain` give the same outputs, also after peft's own merging."""
    export_lora(net.eval(), folder, base="there")

    def output(model):
        result = model(x)
        return result if torch.is_tensor(result) else result.logits

    expected = output(net)
    assert (output(plain.eval()) - expected).abs().max() > 0.01
    served = peft.PeftModel.from_pretrained(plain, folder).eval()
    torch.testing.assert_close(output(served), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output(served.merge_and_unload()), expected, rtol=0, atol=1e-5)


def hub_model(kind: str) -> nn.Module:
    """A tiny model of transformers."""
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


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("LlamaForCausalLM", "q_proj|v_proj|down_proj"),
        ("BertForSequenceClassification", "query|dense"),
        ("GPT2LMHeadModel", "c_attn|c_proj|c_fc|lm_head"),
    ],
)
def test_peft_computes_the_same_logits(kind, targets, tmp_path):
    plain = hub_model(kind)
    net = convert_conv1d(copy.deepcopy(plain))
    shake(add_adapters(net, targets, rank=7, init_rank=2, alpha=5))
    if kind.startswith("Bert"):
        nn.init.normal_(net.classifier.requires_grad_(True).weight)
    assert_peft_agrees(net, plain, torch.arange(18).view(2, 9), tmp_path)
    config = json.loads(Path(tmp_path, "adapter_config.json").read_text())  # for other tools
    assert config["fan_in_fan_out"] == kind.startswith("GPT2")
    assert config["modules_to_save"] == (["classifier"] if kind.startswith("Bert") else None)


@pytest.mark.parametrize("inner", [nn.Linear(8, 8), nn.Tanh()])
def test_similar_names_and_statistics_are_exported(inner, tmp_path):
    plain = nn.Sequential(nn.Linear(8, 8), nn.Sequential(inner))
    plain.add_module("norm", nn.BatchNorm1d(8))
    plain.register_buffer("mask", torch.ones(8, dtype=torch.bool))
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


class Squared(TriAdaptLinear):
    def forward(self, x):
        return super().forward(x) ** 2


def test_what_peft_cannot_hold_is_refused(tmp_path):
    attention = nn.ModuleDict({"self": nn.MultiheadAttention(8, 2)})
    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    for net, target, thaw, said in [
        (attention, "out_proj", None, "self.out_proj: nn.MultiheadAttention never calls it"),
        (Tied(), "last", None, "first.weight: another module shares it"),
        (computed, "0", None, "0: its weight is computed"),
        (Gated(), "q", "gate", "the model itself: is also trained"),
        (nn.Sequential(Gated()), "q", "0.gate", "0: is also trained"),
        (Gated(), "q", "q.base.bias", "q.base: is also trained"),
    ]:
        add_adapters(net, [target], rank=2)
        if thaw is not None:
            net.get_parameter(thaw).requires_grad_(True)
        with pytest.raises(ValueError, match=f"^{said}[^\n]*$"):
            export_lora(net, tmp_path / "new")
    with pytest.raises(ValueError, match="^the model has no adapters to export$"):
        export_lora(Gated(), tmp_path / "new")
    with pytest.raises(ValueError, match="^0: Squared is more than B A x"):
        export_lora(nn.Sequential(Squared(nn.Linear(8, 8), 2, 2)), tmp_path / "new")
    assert not Path(tmp_path, "new").exists()


def test_a_full_disk_keeps_the_older_files(tmp_path, monkeypatch):
    names = ["adapter_config.json", "adapter_model.safetensors"]
    net = nn.Sequential(nn.Linear(8, 8))
    adapters = add_adapters(net, ["0"], rank=4, init_rank=2)
    export_lora(net, tmp_path)
    first = [Path(tmp_path, name).read_bytes() for name in names]
    adapters["0"].grow(1)
    write = Path.write_bytes

    def full_disk(path, content):
        write(path, content[:9])
        if "config" in path.name:
            raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "write_bytes", full_disk)
        export_lora(net, tmp_path)
    assert [Path(tmp_path, name).read_bytes() for name in names] == first
    export_lora(net, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, old in zip(names, first, strict=True):
        assert Path(tmp_path, name).read_bytes() != old
