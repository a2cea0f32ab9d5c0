# ruff: noqa: F403, F405
from contextlib import nullcontext

import torch.nn.utils.prune as prune

from test_triadapt import *
from triadapt import LoRALinear, export_lora

# ----------------------------------------------------------------------- other people's models


class Conv1D(nn.Module):
    """As in transformers' GPT-2: x W + b, with W (d_in, d_out)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.ones(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def shake(adapters: dict) -> None:
    """Uneven ranks and random numbers, as after a training."""
    for i, adapter in enumerate(adapters.values()):
        adapter.grow(i % 3 + 1)
        for name in adapter.GROWS_ALONG:
            nn.init.normal_(getattr(adapter, name), std=0.3)


def train_load_merge(net, targets, x, tolerance=1e-5):
    """Trains with growth and merges; loading what was saved, and merging, keep the outputs."""
    base = net.eval()(x)
    adapters = add_adapters(net, targets, rank=3, init_rank=2)
    fresh = copy.deepcopy(net)
    optimizer = adamw(net.train())
    settings = {"target_rank": 3, "total_steps": 6, "warmup": 1, "interval": 1}
    allocator = allocator_of(adapters, optimizer, **settings)
    for t in range(1, 7):
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()
        allocator.step(t)
    assert allocator.total_rank == allocator.budget
    output = net.eval()(x)
    load_adapter_state_dict(fresh, adapter_state_dict(net))
    assert torch.equal(fresh(x), output)
    for name, buffer in net.named_buffers():
        assert torch.equal(fresh.get_buffer(name), buffer)
    merge_adapters(net)
    assert (net(x) - output).norm() < tolerance * output.norm()
    assert (base - output).norm() > 3 * tolerance * output.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_a_conv1d_trains_grows_loads_and_merges_into_a_conv1d(device, dtype, tolerance):
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(10, 6), nn.Tanh(), Conv1D(5, 10)).to(device, dtype)
    train_load_merge(net, ["0", "2"], torch.randn(2, 7, 6).to(device, dtype), tolerance)
    assert type(net[0]) is type(net[2]) is Conv1D


def test_statistics_that_change_without_a_gradient_are_saved_and_loaded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    net.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))  # is allowed to be infinite
    train_load_merge(net, ["0", "3"], 3 * torch.randn(64, 8) + 2)


def hub_model(kind: str) -> nn.Module:
    """A tiny one of transformers, which need not be installed."""
    transformers = pytest.importorskip("transformers")
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


class Logits(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.model = hub_model(kind)

    def forward(self, ids):
        return self.model(ids).logits


def test_gpt2_of_transformers_trains_grows_loads_and_merges_into_conv1d():
    net = Logits("GPT2LMHeadModel")
    train_load_merge(net, "c_attn|c_proj|c_fc", torch.arange(18).view(2, 9))
    layer = net.model.transformer.h[1].mlp.c_fc
    assert type(layer).__module__ == "transformers.pytorch_utils"


class Own(nn.Linear):
    pass


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class GivesInputBack(nn.Linear):
    def forward(self, x):
        return x


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    return layer


def replaced(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) - 1  # as accelerate's hooks do
    return layer


LINEAR_AFTER_ALL = {
    "subclass": lambda: Own(8, 8),
    "own forward": lambda: Doubled(8, 8, bias=False),
    "gives its input back": lambda: GivesInputBack(8, 8),
    "weight_norm of old": lambda: nn.utils.weight_norm(nn.Linear(8, 8)),
    "spectral_norm of old": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "pruned": lambda: pruned(nn.Linear(8, 8, bias=False)),
    "pruned Conv1D": lambda: pruned(Conv1D(8, 8)),
    "hook": lambda: hooked(nn.Linear(8, 8)),
    "hook on Conv1D": lambda: hooked(Conv1D(8, 8)),
    "forward of the instance": lambda: replaced(nn.Linear(8, 8)),
}


@pytest.mark.filterwarnings("ignore")  # the old norms are deprecated
@pytest.mark.parametrize("kind", LINEAR_AFTER_ALL)
def test_a_layer_that_computes_its_weight_starts_as_it_was_trains_and_merges_into_a_linear(kind):
    torch.manual_seed(0)
    net = nn.Sequential(LINEAR_AFTER_ALL[kind](), nn.Tanh(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 5, 8)
    given = x.clone()
    base = net(x).detach()
    adapters = add_adapters(net, ["0"], rank=3, init_rank=2, dropout=0.5)
    net.eval()
    assert torch.equal(net(x), base)
    shake(adapters)
    output = net(x)
    output.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(net))
    assert torch.equal(x, given)
    net.train()
    merge_adapters(net).eval()
    assert isinstance(net[0], nn.Linear) and {*net[0]._parameters} == {"weight", "bias"}
    assert not trained(net)
    torch.testing.assert_close(net(x), output, rtol=1e-4, atol=1e-5)


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
def test_a_layer_that_is_not_linear_is_adapted_and_merging_refuses_and_changes_nothing(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), kind(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 3, 8)
    base = net(x)
    adapters = add_adapters(net, "[0-2]", rank=3, init_rank=2)
    assert torch.equal(net(x), base)
    nn.init.normal_(adapters["0"].lora_B)
    output = net(x)
    with pytest.raises(ValueError, match=f"^{kind.__name__}: [^\n]*can't be merged$"):
        merge_adapters(net)
    assert [*net] == [*adapters.values()]
    assert net.training and torch.equal(net(x), output)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_of_bitsandbytes_starts_as_it_was_trains_and_merges_into_a_linear(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 64).bfloat16()
    packed = bnb.nn.Linear4bit(64, 64)
    if bits == 8:
        packed = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    packed.load_state_dict(plain.state_dict())
    packed.bias = plain.bias
    net = nn.Sequential(packed.to("cpu"))
    x = torch.randn(3, 64).bfloat16()
    base = net(x)
    adapters = add_adapters(net, ["0"], rank=6, init_rank=2)
    assert torch.equal(net(x), base)
    shake(adapters)
    output = net(x)
    output.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(net))
    assert type(merge_adapters(net)[0]) is nn.Linear
    assert (net(x) - output).norm() < 0.02 * output.norm()  # 8 bits of an input


def test_an_output_that_others_hold_is_not_added_to():
    held = []

    def keep(module, args, output):
        held.append(output)

    def ask_for_gradient(module, args, output):
        output.requires_grad_()  # a leaf, if nothing before it is trained
        held.append(output)

    layer = nn.Linear(8, 8)
    linears = [copy.deepcopy(layer) for _ in range(4)]
    linears[0].register_forward_hook(keep)
    linears[1].register_forward_hook(ask_for_gradient)
    forward = linears[2].forward
    linears[2].forward = lambda x: held.append(forward(x)) or held[-1]
    linears[3].register_full_backward_hook(lambda module, before, after: held.append(layer(x)))
    x = torch.randn(2, 3, 8)
    for linear in linears:
        net = nn.Sequential(linear)
        adapters = add_adapters(net, ["0"], rank=2)
        nn.init.ones_(adapters["0"].lora_B)
        net(x.clone().requires_grad_(linear is linears[3])).sum().backward()
        assert adapters["0"].lora_A.grad.abs().sum() > 0
        torch.testing.assert_close(held.pop(), layer(x))


def count_dense(monkeypatch) -> list:
    made = []
    delta_weight = LoRALinear.delta_weight
    monkeypatch.setattr(LoRALinear, "delta_weight", lambda a: made.append(a) or delta_weight(a))
    return made


def test_a_weights_type_shape_and_device_make_no_dense_matrix(monkeypatch):
    made = count_dense(monkeypatch)
    for layer in (nn.Linear(6, 5), Conv1D(5, 6)):
        layer.bfloat16()
        net = nn.Sequential(layer)
        adapter = add_adapters(net, ["0"], rank=2)["0"]
        nn.init.ones_(adapter.lora_B)
        weight = net[0].weight
        assert weight.dtype == torch.bfloat16
        assert weight.shape == layer.weight.shape and weight.device.type == "cpu"
        assert made == []
        delta = adapter.delta_weight().T if type(layer) is Conv1D else adapter.delta_weight()
        assert torch.equal(weight + 0, (layer.weight + delta).bfloat16())
        made.clear()


def test_t5_which_asks_for_a_type_in_each_forward_makes_no_dense_matrix(monkeypatch):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)
    net = transformers.T5ForConditionalGeneration(config)
    add_adapters(net, ["wi", "wo", "q"], rank=2)
    made = count_dense(monkeypatch)
    ids = torch.arange(9)[None]
    net(input_ids=ids, labels=ids).loss.backward()
    assert made == []


def test_an_optimiser_that_lost_an_adapter_is_told_at_the_next_step_also_where_none_grows():
    for t in (1, 4):  # 1 is in the warm-up
        net, adapters = adapted()
        optimizer = adamw(net)
        allocator = allocator_of(adapters, optimizer)
        adapters["second"].grow(1)  # without the optimizer
        with pytest.raises(ValueError, match="^optimizer: it lacks tensors of second"):
            allocator.step(t)


def test_adapters_that_were_loaded_without_the_allocators_state_are_told():
    net, adapters = adapted()
    optimizer = adamw(net)
    allocator = allocator_of(adapters, optimizer)
    for t in range(1, 9):
        fit(net, optimizer)
        allocator.step(t)
    for forgotten in (True, False):
        other, other_adapters = adapted()
        optimizer = adamw(other)
        resumed = allocator_of(other_adapters, optimizer)
        load_adapter_state_dict(other, adapter_state_dict(net), optimizer)
        if not forgotten:
            resumed.load_state_dict(allocator.state_dict())
        with pytest.raises(ValueError, match="state_dict after") if forgotten else nullcontext():
            resumed.step(9)


# --------------------------------------------------------------------------------- export_lora


def assert_peft_agrees(net, plain, x, folder):
    """The files of net on the base `plain`: the same outputs, also after peft's own merging."""
    peft = pytest.importorskip("peft")
    export_lora(net.eval(), folder, base="there")

    def output(model):
        result = model(x)
        return result if torch.is_tensor(result) else result.logits

    expected = output(net)
    assert (output(plain.eval()) - expected).abs().max() > 0.01
    served = peft.PeftModel.from_pretrained(plain, folder).eval()
    torch.testing.assert_close(output(served), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output(served.merge_and_unload()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("LlamaForCausalLM", "q_proj|v_proj|down_proj"),
        ("BertForSequenceClassification", "query|dense"),
        ("GPT2LMHeadModel", "c_attn|c_proj|c_fc|lm_head"),
    ],
)
def test_peft_reads_the_files_and_computes_the_same_logits(kind, targets, tmp_path):
    plain = hub_model(kind)
    net = copy.deepcopy(plain)
    shake(add_adapters(net, targets, rank=7, init_rank=2, alpha=5))
    if kind.startswith("Bert"):
        nn.init.normal_(net.classifier.requires_grad_(True).weight)
    assert_peft_agrees(net, plain, torch.arange(18).view(2, 9), tmp_path)
    config = json.loads(Path(tmp_path, "adapter_config.json").read_text())  # for other tools
    assert config["fan_in_fan_out"] == kind.startswith("GPT2")
    assert config["modules_to_save"] == (["classifier"] if kind.startswith("Bert") else None)


def names_that_end_alike(inner: nn.Module) -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(inner))
    net.add_module("norm", nn.BatchNorm1d(8))
    return net


@pytest.mark.parametrize("inner", [nn.Linear(8, 8), nn.Tanh()])
def test_names_that_end_alike_are_told_apart_and_statistics_are_exported(inner, tmp_path):
    plain = names_that_end_alike(inner)
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


def test_what_lora_files_cannot_hold_is_refused_in_one_line(tmp_path):
    pytest.importorskip("safetensors")
    attention = nn.ModuleDict({"self": nn.MultiheadAttention(8, 2)})
    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    for net, targets, thaw, said in [
        (attention, "out_proj", None, "self.out_proj: nn.MultiheadAttention never calls it"),
        (Tied(), "last", None, "first.weight: another module shares it"),
        (computed, ["0"], None, "0: its weight is computed"),
        (Gated(), "q", "gate", "the model itself: is trained, too"),
        (nn.Sequential(Gated()), "q", "0.gate", "0: is trained, too"),
        (Gated(), "q", "q.base.bias", "q.base: is trained, too"),
    ]:
        add_adapters(net, targets, rank=2)
        if thaw is not None:
            net.get_parameter(thaw).requires_grad_(True)
        with pytest.raises(ValueError, match=f"^{said}[^\n]*$"):
            export_lora(net, tmp_path / "new")
    with pytest.raises(ValueError, match="^the model has no adapters to export$"):
        export_lora(Gated(), tmp_path / "new")
    fork = nn.Sequential(DoRALinear(nn.Linear(8, 8), 2, 1.0))
    with pytest.raises(ValueError, match="^0: DoRALinear is more than B A x"):
        export_lora(fork, tmp_path / "new")
    assert not Path(tmp_path, "new").exists()


def test_older_files_are_replaced_and_all_stay_whole_if_one_cannot_be_written(
    tmp_path, monkeypatch
):
    pytest.importorskip("safetensors")
    net, adapters = adapted()

    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    export_lora(net, tmp_path)
    first = files()
    adapters["first"].grow(1)
    write = Path.write_bytes

    def full_disk(path, content):
        write(path, content[:9])
        if "config" in path.name:
            raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "write_bytes", full_disk)
        export_lora(net, tmp_path)
    assert files() == first
    export_lora(net, tmp_path)
    assert files().keys() == first.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(content != first[name] for name, content in files().items())


# ----------------------------------------------------------------------------------- Trainer


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(6, 10)
        self.v_proj = nn.Linear(10, 5)

    def forward(self, x, labels):
        logits = self.v_proj(self.q_proj(x).tanh())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer_run(tmp_path, **settings):
    """README's block, 10 steps of two batches: its allocator, model, and batches as they came."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    settings |= {"use_cpu": True, "save_strategy": "no", "report_to": []}
    settings |= {"max_steps": 10, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    args = transformers.TrainingArguments(str(tmp_path), **settings)
    rows = [{"x": torch.randn(6), "labels": i % 5} for i in range(160)]
    names = {"model": Head(), "args": args, "rows": rows}
    batches = []
    names["model"].register_forward_pre_hook(
        lambda module, args, batch: batches.append(batch), with_kwargs=True
    )
    exec(readme_code("trainer"), names)
    return names["growth"].allocator, names["model"], batches


def test_under_the_trainer_ranks_and_numbers_are_those_of_a_loop_by_hand(tmp_path, monkeypatch):
    step = RankAllocator.step

    def seeded(allocator, t):  # what a new rank starts as
        torch.manual_seed(t)
        return step(allocator, t)

    monkeypatch.setattr(RankAllocator, "step", seeded)
    allocator, model, batches = trainer_run(tmp_path)
    assert len(batches) == 20 and allocator.total_rank == allocator.budget

    net = Head()
    adapters = add_adapters(net, ["q_proj", "v_proj"], rank=4, init_rank=2)
    optimizer = torch.optim.AdamW(trained(net), weight_decay=0.0, fused=True)
    by_hand = allocator_of(adapters, optimizer, total_steps=10, warmup=2, interval=1)
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


def test_under_the_trainers_mixed_precision_the_budget_is_reached_and_all_is_finite(tmp_path):
    allocator, model, _ = trainer_run(tmp_path, bf16=True)
    assert allocator.total_rank == allocator.budget
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert all(p.isfinite().all() and p.any() for p in trained(model))
