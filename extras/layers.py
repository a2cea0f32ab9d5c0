"""Other people's layers: transformers' Conv1D, and layers that compute or pack their weight.

    convert_conv1d(model)            # before add_adapters, for transformers' GPT-2
    adapters = add_adapters(model, ["c_attn", "c_fc"])
    ...
    restore_conv1d(merge_adapters(model))

Quantized layers (bitsandbytes) and parametrized layers (weight_norm, spectral_norm, prune) are
subclasses of nn.Linear, so add_adapters takes them as they are. merge_adapters refuses them, and
merge_measured(model) merges them if they are linear.
"""

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
    transposed = {}  # a weight that two layers share stays shared
    linears = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Conv1D):
            if not is_plain(layer, Conv1D.forward):
                raise ValueError(f"{name}: its Conv1D has hooks or computes its weight")
            W = layer.weight
            if W not in transposed:
                transposed[W] = nn.Parameter(W.detach().T.contiguous(), W.requires_grad)
            linears[layer] = linear_of(transposed[W], layer.bias, layer.training)
            linears[layer].was_conv1d = True  # a merged layer keeps it
    replace_modules(model, linears)
    return model


def restore_conv1d(model: nn.Module) -> nn.Module:
    """Make each nn.Linear that was a Conv1D one again. Returns the model.

    Raises ValueError if the model has adapters.
    """
    if find_adapters(model):
        raise ValueError("the model has adapters: call merge_adapters first")
    transposed = {}
    layers = {}
    for linear in model.modules():
        if hasattr(linear, "was_conv1d"):
            W = linear.weight  # (d_out, d_in)
            if W not in transposed:
                transposed[W] = nn.Parameter(W.detach().T.contiguous(), W.requires_grad)
            with torch.device("meta"):  # costs nothing, and draws nothing
                layer = Conv1D(*W.shape)
            layer.weight, layer.bias = transposed[W], linear.bias
            layers[linear] = layer.train(linear.training)
    replace_modules(model, layers)
    return model


def merge_measured(model: nn.Module) -> nn.Module:
    """merge_adapters, also for layers that compute or pack their weight. Returns the model.

    What a layer computes in evaluation is measured, and an nn.Linear with this W and b takes its
    place. Plain layers are merged as always.
    Raises ValueError, and changes nothing, if a layer is not linear.
    """
    bases = {}
    for name, adapter in find_adapters(model).items():
        if not is_plain(adapter.base, nn.Linear.forward):
            bases[adapter] = measured_linear(name, adapter.base)
    for adapter, base in bases.items():
        adapter.base = base
    return merge_adapters(model)


def is_plain(layer: nn.Module, forward) -> bool:
    """Whether this forward, the layer's own weight and its bias are all that there is."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    own = type(layer._parameters.get("weight")) is nn.Parameter and "forward" not in vars(layer)
    return type(layer).forward is forward and own and not hooks


def linear_of(W: nn.Parameter, b: nn.Parameter | None, training: bool) -> nn.Linear:
    """The nn.Linear with these parameters."""
    d_out, d_in = W.shape
    linear = nn.Linear(d_in, d_out, device="meta")  # costs nothing, and draws nothing
    linear.weight, linear.bias = W, b
    return linear.train(training)


@torch.no_grad()
def measured_linear(name: str, layer: nn.Linear) -> nn.Linear:
    """A plain nn.Linear that computes what the layer does in evaluation, found from its answers.

    Raises ValueError if there is none.
    """
    training = layer.training
    layer.eval()
    d_in = layer.in_features
    floats = [p for p in layer.parameters() if p.is_floating_point()]
    like = floats[0] if floats else torch.empty(0, device=layer.weight.device)  # of its inputs
    b = layer(like.new_zeros(1, d_in))  # (1, d_out)
    # Large inputs, because a small W would be lost in the rounding of W + b.
    W = (layer(1024 * torch.eye(d_in).to(like)) - b).T / 1024  # (d_out, d_in)
    bias = nn.Parameter(b[0], False) if b.any() else None
    linear = linear_of(nn.Parameter(W.contiguous(), False), bias, training)
    if hasattr(layer, "was_conv1d"):
        linear.was_conv1d = True

    # Small inputs and large ones, because relu(W x + 20) is linear near 0.
    sizes = torch.tensor([[0.1], [1.0], [10.0], [100.0]])
    x = (sizes * torch.linspace(-9, 9, 4 * d_in).sin().view(4, d_in)).to(like)
    y = layer(x)
    errors = (linear(x) - y).norm(dim=1)
    layer.train(training)
    precise = all(p.dtype == torch.float32 for p in layer.parameters())
    tolerance = 1e-3 if precise else 0.03  # a layer of 8 bits also rounds its inputs
    if not (errors <= tolerance * y.norm(dim=1)).all():
        raise ValueError(
            f"{name}: cannot be merged, because its {type(layer).__name__} is not linear"
        )
    return linear
