"""Tests of extras/export.py: pytest extras/test_export.py"""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from extras.export import export_lora, outputs
from extras.layers import convert_conv1d, untie
from extras.test_layers import SIZES as GPT2
from extras.test_layers import T5, hooked, quantized
from triadapt import TriAdaptLinear, add_adapters

pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)
NAMES = ["adapter_config.json", "adapter_model.safetensors"]
SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
BART = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
VIT = SIZES | {"image_size": 16, "patch_size": 8}
SPEECH = SIZES | {"conv_dim": [16], "conv_kernel": [8], "conv_stride": [4]}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
IDS = {"input_ids": torch.arange(3, 21).view(2, 9)}
SOUND = {"input_values": torch.randn(2, 400)}
X = torch.randn(5, 8)


def hub_model(kind: str, sizes: dict) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    return model(model.config_class(**sizes)).eval()


def adapt(net: nn.Module, targets, thaw=None) -> nn.Module:
    """net with adapters of uneven ranks and random entries, like after a training."""
    adapters = add_adapters(net, targets, rank=7, init_rank=2, alpha=5)
    for i, adapter in enumerate(adapters.values()):
        adapter.grow(i % 3 + 1)
        for name in adapter.GROWS_ALONG:
            nn.init.normal_(getattr(adapter, name), std=0.3)
    for name, p in net.named_parameters():
        if thaw and name.startswith(thaw):
            nn.init.normal_(p.requires_grad_(True), std=0.3)
    return net.eval()


@torch.no_grad()
def assert_same(net: nn.Module, other: nn.Module, inputs) -> None:
    other = other.base_model.model if isinstance(other, peft.PeftModel) else other
    for ours, theirs in zip(outputs(net, inputs), outputs(other.eval(), inputs), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind, sizes, targets",
    [
        ("LlamaForCausalLM", SIZES, "q_proj|v_proj|down_proj"),
        ("BertForSequenceClassification", SIZES, "query|dense"),
        ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}, "c_attn|c_fc|lm_head"),
    ],
)
def test_every_tool_computes_the_same(kind, sizes, targets, tmp_path):
    plain = hub_model(kind, sizes)
    plain.save_pretrained(tmp_path / "base")
    net = adapt(
        convert_conv1d(copy.deepcopy(plain)), targets, ("classifier", "transformer.h.0.attn.c_proj")
    )
    export_lora(net, tmp_path, base=tmp_path / "base", inputs=IDS)
    with pytest.raises(AssertionError):
        assert_same(net, plain, IDS)
    loaded = copy.deepcopy(plain)
    loaded.load_adapter(tmp_path)
    assert_same(net, loaded, IDS)
    assert_same(net, peft.AutoPeftModel.from_pretrained(tmp_path), IDS)
    if not kind.startswith("Bert"):
        assert_same(net, peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path), IDS)
    served = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert_same(net, served, IDS)
    assert_same(net, served.merge_and_unload(), IDS)

    config, tensors = json.loads((tmp_path / NAMES[0]).read_text()), load_file(tmp_path / NAMES[1])
    assert config["fan_in_fan_out"] == kind.startswith("GPT2")  # peft finds it, other tools may not
    for name in config["target_modules"]:
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        adapter = net.get_submodule(name)
        update = adapter.scale * torch.matmul(*adapter.factors())
        for r in (config["r"], B.shape[1]):  # vLLM and peft, llama.cpp
            torch.testing.assert_close(config["lora_alpha"] / r * B @ A, update)


@pytest.mark.parametrize(
    "kind, sizes, targets, inputs",
    [
        (
            "T5ForConditionalGeneration",
            T5,
            "q|wi|wo",
            IDS | {"decoder_input_ids": torch.ones(2, 4).long()},
        ),
        ("BartForConditionalGeneration", BART, "q_proj|fc1", IDS),  # has a constant buffer
        ("MambaForCausalLM", SIZES, "in_proj|x_proj", IDS),
        ("MixtralForCausalLM", SIZES, "q_proj|v_proj", IDS),
        ("FalconForCausalLM", SIZES, "query_key_value", IDS),  # has a linear layer of its own
        ("ViTMAEModel", VIT, "q_proj|fc1", {"pixel_values": torch.randn(2, 3, 16, 16)}),
        ("HubertModel", SPEECH, "q_proj|out_proj", SOUND),
    ],
)
def test_architectures_agree_with_peft(kind, sizes, targets, inputs, tmp_path):
    plain = hub_model(kind, sizes)
    net = adapt(copy.deepcopy(plain), targets)
    export_lora(net, tmp_path, inputs=inputs)
    served = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert_same(net, served, inputs)
    assert not served.peft_config["default"].modules_to_save


class Two(nn.Module):
    """Two layers, other modules, and what a forward function makes of them."""

    def __init__(self, compute=lambda net, x: net.q(net.k(x)), **modules):
        super().__init__()
        self.compute, self.q, self.k = compute, nn.Linear(8, 8), nn.Linear(8, 8)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.compute(self, x)


PLAIN = [
    (nn.Sequential(nn.Linear(8, 8), Two(), nn.Sequential(nn.Tanh())), "0", None),
    (nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))), "0", None),
    (nn.Sequential(Two(), nn.BatchNorm1d(8)), "q", None),
    (nn.Sequential(hooked(nn.Linear(8, 8)), Two()), "q", None),
    (Two(lambda net, x: net.head(net.q(x)), head=nn.Linear(8, 8)), "q", "head"),
    (Two(lambda net, x: net.q(x).masked_fill(torch.eye(8)[:5] == 1, -torch.inf)), "q", None),
]


@pytest.mark.parametrize("plain, targets, thaw", PLAIN)
@pytest.mark.parametrize("wrap", [None, "compile", "inner", "parallel"])
def test_export_keeps_model_and_real_names(plain, targets, thaw, wrap, tmp_path):
    net = adapt(copy.deepcopy(plain), targets, thaw)
    net.train()(X)  # moves statistics
    if wrap == "inner":
        for name, child in [*net.named_children()]:
            setattr(net, name, torch.compile(child, backend="eager"))
    wrapped = torch.compile(net, backend="eager") if wrap == "compile" else net
    wrapped = nn.DataParallel(wrapped) if wrap in ("compile", "parallel") else wrapped
    wrapped = torch.compile(wrapped, backend="eager") if wrap == "parallel" else wrapped
    before = copy.deepcopy([*net.state_dict().values()])
    flags, state = [p.requires_grad for p in net.parameters()], torch.get_rng_state()
    export_lora(wrapped, tmp_path, inputs=X)
    assert torch.equal(state, torch.get_rng_state()) and net.training
    assert flags == [p.requires_grad for p in net.parameters()]
    assert all(map(torch.equal, before, net.state_dict().values()))
    assert_same(net.eval(), peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path), X)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_packed_and_half_precision_agree_with_peft(bits, tmp_path):
    plain = quantized(bits) if bits < 16 else nn.Sequential(nn.Linear(64, 64)).bfloat16()
    net, x = adapt(copy.deepcopy(plain), "0"), torch.randn(5, 64).bfloat16()
    export_lora(net, tmp_path, inputs=x)
    served = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(served(x), net(x), rtol=0.03, atol=0.03)


class Squared(TriAdaptLinear):
    def forward(self, x):
        return super().forward(x) ** 2


TIED, SAME, POINTER = Two(), Two(), Two(gate=nn.Parameter(torch.ones(8)))
TIED.q.weight, SAME.q, POINTER.q.weight.data = TIED.k.weight, SAME.k, POINTER.k.weight.data
HEADS = {"head": nn.Linear(8, 8), "aux": nn.ModuleDict({"head": nn.Linear(8, 8)})}
NEST = nn.Linear(8, 8)
NEST.norm = nn.BatchNorm1d(8)
ALIAS = Two(lambda net, x: net.calls[0](net.q(x)), head=nn.Linear(8, 8))
ALIAS.calls = [ALIAS.head]
TIED_GPT2 = convert_conv1d(hub_model("GPT2LMHeadModel", GPT2))
UNTIED_GPT2 = untie(copy.deepcopy(TIED_GPT2))
ROBERTA = hub_model("RobertaForSequenceClassification", SIZES)
SHARES = "another module shares it"
REFUSED = [  # a model, targets, a trained parameter, inputs, and the beginning of the message
    (nn.ModuleDict({"self": nn.MultiheadAttention(8, 2)}), "out_proj", None, None, "self.out_p"),
    (nn.ModuleList([nn.TransformerEncoderLayer(8, 2)]), "linear1", None, None, "0.linear1: T"),
    (TIED, "q", None, None, f"q.base.weight: {SHARES}"),
    (SAME, "q", None, None, f"q.*: {SHARES}"),
    (POINTER, "q", None, None, f"q.base.weight: {SHARES}"),
    (copy.deepcopy(TIED_GPT2), "lm_head", None, None, f"transformer.wte.weight: {SHARES}"),
    (TIED_GPT2, "c_attn", "transformer.wte", None, f"transformer.wte.weight: {SHARES}"),
    (UNTIED_GPT2, "lm_head", None, None, f"lm_head.base.weight: {SHARES}"),
    (Two(gate=nn.ParameterList([X[0]])), "q", "gate", None, "peft cannot load it: .*ParameterList"),
    (Two(gate=nn.Parameter(X[0])), "q", "gate", None, "gate: is trained, and peft cannot save it"),
    (Two(), "q", "q.base.bias", None, "q.base.bias: is trained"),
    (Two(gate=NEST), "q", "gate.weight", None, "peft cannot load it"),
    (Two(**HEADS), "q", "head", None, "aux.head.bias, aux.head.weight: peft takes more"),
    (copy.deepcopy(ROBERTA), "query|classifier.dense", None, None, "classifier"),
    (Two(q=parametrizations.weight_norm(nn.Linear(8, 8))), "q", None, None, "q: is a Param"),
    (Two(k=parametrizations.weight_norm(nn.Linear(8, 8))), "q|k", None, X, "k: "),
    (Two(q=parametrizations.spectral_norm(nn.Linear(8, 8))), "q|k", None, X, "q.base"),
    (Two(q=hooked(nn.Linear(8, 8))), "q", None, None, "q: is a Linear or has hooks"),
    (Two(q=hooked(nn.Linear(8, 8))), "q|k", None, X, "q: "),
    (Two(lambda net, x: F.linear(net.k(x), net.q.weight)), "q|k", None, X, "q: "),  # is read
    (Two(lambda net, x: net.q(net.k(x)) + x @ net.k.weight), "q|k", None, X, "k: "),  # is also read
    (Two(lambda net, x: net.q(net.k(x)) * torch.nan), "q|k", None, X, "other modules: "),
    (Two(lambda net, x: net.q(net.k(x)).argmax(1)), "q|k", None, X, "inputs: "),
    (ALIAS, "q", "head", X, "other modules: "),
    (hub_model("WavLMModel", SPEECH), "k_proj", None, SOUND, "encoder.layers.0.attention.k_proj"),
]


@pytest.mark.parametrize("net, targets, thaw, inputs, said", REFUSED)
def test_what_peft_would_miss_is_refused(net, targets, thaw, inputs, said, tmp_path):
    net = adapt(net, targets, thaw).train()
    before = copy.deepcopy([*net.buffers()])
    with pytest.raises(ValueError, match=f"^{said}[^\n]*$"):
        export_lora(net, tmp_path / "new", None, inputs, "SEQ_CLS" if "class" in said else None)
    assert not Path(tmp_path, "new").exists()
    assert all(map(torch.equal, before, net.buffers()))


def test_other_adapters_and_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^the model has no adapters to export$"):
        export_lora(Two(), tmp_path)
    with pytest.raises(ValueError, match="^0: Squared is more than B A x"):
        export_lora(nn.Sequential(Squared(nn.Linear(8, 8), 2, 2)), tmp_path)
    with pytest.raises(ValueError, match="valid TaskType"):
        export_lora(adapt(Two(), "q"), tmp_path, task_type="CAUSAL")


def test_trained_heads_open_with_their_task(tmp_path):
    net = adapt(copy.deepcopy(ROBERTA), "query", thaw="classifier")
    export_lora(net, tmp_path, inputs=IDS, task_type="SEQ_CLS")
    served = peft.PeftModel.from_pretrained(copy.deepcopy(ROBERTA), tmp_path)
    assert isinstance(served, peft.PeftModelForSequenceClassification)
    assert_same(net, served, IDS)


def test_failed_exports_keep_the_older_files(tmp_path, monkeypatch):
    net = adapt(Two(lambda net, x: net.q(x)), "q")
    export_lora(net, tmp_path)
    first = [Path(tmp_path, name).read_bytes() for name in NAMES]
    net.q.grow(1)
    write = Path.write_bytes

    def full_disk(path, content):
        write(path, content[:9])
        if "config" in path.name:
            raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "write_bytes", full_disk)
        export_lora(net, tmp_path)
    net.compute = lambda net, x: F.linear(x, net.q.weight)
    with pytest.raises(ValueError, match="^q: peft computes something else"):
        export_lora(net, tmp_path, inputs=X)
    assert [Path(tmp_path, name).read_bytes() for name in NAMES] == first
    export_lora(net, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    assert [Path(tmp_path, name).read_bytes() for name in NAMES] != first
