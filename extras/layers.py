"""Other people's layers: transformers' Conv1D, and layers that compute, pack or share their weight.

    convert_conv1d(model)            # before add_adapters, for transformers' GPT-2
    adapters = add_adapters(model, ["c_attn", "c_fc"])
    ...
    restore_conv1d(merge_adapters(model))

Quantized layers (bitsandbytes) and parametrized layers (weight_norm, spectral_norm, prune) are
subclasses of nn.Linear, so add_adapters takes them. merge_adapters refuses them, and
merge_measured(model) merges them if they are linear. untie(model) is for an adapted lm_head.
"""

from collections import Counter

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from triadapt import find_adapters, merge_adapters, replace_modules


def convert_conv1d(model: nn.Module) -> nn.Module:
    """Put an equal nn.Linear in the place of each Conv1D of transformers. Returns the model.

    A Conv1D computes x W + b, so the new weights are transposed copies. Biases are shared. Call it
    before the optimizer is made, and restore_conv1d before the model is saved for transformers.
    Raises ValueError, and changes nothing, if a Conv1D has hooks or computes its weight.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Conv1D)}
    for linear in transpose(model, layers, Conv1D, nn.Linear):
        linear.was_conv1d = True  # a merged layer keeps it
    return model


def restore_conv1d(model: nn.Module) -> nn.Module:
    """Make each nn.Linear that was a Conv1D one again. Returns the model. Raises ValueError, and
    changes nothing, if the model has adapters, or such a layer has hooks."""
    if find_adapters(model):
        raise ValueError("the model has adapters: call merge_adapters first")
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "was_conv1d")}
    transpose(model, layers, nn.Linear, Conv1D)
    return model


def transpose(model: nn.Module, layers: dict[str, nn.Module], old: type, new: type) -> list:
    """Replace layers of the old type by equal ones of the new type, which are returned."""
    copies = {}  # a weight that two layers share stays shared
    replaced = {}
    for name, layer in layers.items():
        if not is_plain(layer, old.forward):
            raise ValueError(f"{name}: its {old.__name__} has hooks or computes its weight")
        W = layer.weight
        if W not in copies:
            copies[W] = nn.Parameter(W.detach().T.contiguous(), W.requires_grad)
        with torch.device("meta"):  # costs nothing, and draws nothing
            replaced[layer] = new(*W.shape).train(layer.training)
        replaced[layer].weight, replaced[layer].bias = copies[W], layer.bias
    replace_modules(model, replaced)
    return [*replaced.values()]


def untie(model: nn.Module) -> nn.Module:
    """Give each nn.Linear that shares its weight, such as a tied lm_head, its own copy. Returns
    the model. Call it before add_adapters. Then an adapted lm_head can be saved and merged."""
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    for layer in model.modules():
        W = layer._parameters.get("weight")
        if isinstance(layer, nn.Linear) and uses[W] > 1:
            layer.weight = nn.Parameter(W.detach().clone(), W.requires_grad)
            layer.was_tied = True  # for export_lora, because the base of other tools is still tied
    return model


def merge_measured(model: nn.Module) -> nn.Module:
    """merge_adapters, also for layers that compute or pack their weight. Returns the model.

    What such a layer computes in evaluation is measured, and an nn.Linear with this W and b takes
    its place. Raises ValueError, and changes nothing, if a layer is not linear.
    """
    named = model.named_parameters()
    dtypes = [p.dtype for name, p in named if p.is_floating_point() and "lora_" not in name]
    bases = {}
    for name, adapter in find_adapters(model).items():
        if not is_plain(adapter.base, nn.Linear.forward):
            bases[adapter] = measured_linear(name, adapter.base, *dtypes[:1])
    for adapter, base in bases.items():
        adapter.base = base
    return merge_adapters(model)


def is_plain(layer: nn.Module, forward) -> bool:
    """Whether this forward, the layer's own weight and its bias are all that there is."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    own = type(layer._parameters.get("weight")) is nn.Parameter and "forward" not in vars(layer)
    return type(layer).forward is forward and own and not hooks


def is_quantized(layer: nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes, with 4 or 8 bits."""
    return type(layer).__module__.startswith("bitsandbytes.")


@torch.no_grad()
def measured_linear(name: str, layer: nn.Linear, dtype=torch.float32) -> nn.Linear:
    """A plain nn.Linear that computes what the layer does in evaluation, found from its answers.
    Raises ValueError if there is none. (Unpacking 4-bit weights fails after a forward on a CPU.)"""
    training = layer.training
    layer.eval()
    d_in = layer.in_features
    floats = [p for p in layer.parameters() if p.is_floating_point()]
    packed = torch.empty(0, device=layer.weight.device, dtype=dtype)  # the model's dtype
    like = floats[0] if floats else packed  # the inputs of the layer are like this
    b = layer(like.new_zeros(1, d_in))  # (1, d_out)
    # Large inputs, because a small W would be lost in the rounding of W + b.
    W = (layer(1024 * torch.eye(d_in).to(like)) - b).T / 1024  # (d_out, d_in)
    linear = nn.Linear(*W.T.shape, device="meta").train(training)
    linear.weight = nn.Parameter(W.contiguous(), False)
    linear.bias = nn.Parameter(b[0], False) if b.any() else None
    if hasattr(layer, "was_conv1d"):
        linear.was_conv1d = True

    # Small inputs and large ones, because relu(W x + 20) is linear near 0.
    sizes = torch.tensor([[0.1], [1.0], [10.0], [100.0]])
    x = (sizes * torch.linspace(-9, 9, 4 * d_in).sin().view(4, d_in)).to(like)
    y = layer(x)
    errors = (linear(x) - y).norm(dim=1)
    layer.train(training)
    precise = all(p.dtype in (torch.float32, torch.float64) for p in layer.parameters())
    tolerance = 1e-3 if precise else 0.03  # a layer of 8 bits also rounds its inputs
    if not (errors <= tolerance * y.norm(dim=1)).all():
        kind = type(layer).__name__
        raise ValueError(f"{name}: cannot be merged, because its {kind} is not linear")
    return linear
