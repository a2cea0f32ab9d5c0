"""Other people's layers: transformers' Conv1D, and layers that compute, pack or share their weight.

    convert_conv1d(model)                  # before add_adapters, for transformers' GPT-2
    restore_conv1d(merge_adapters(model))  # before the model is saved

Quantized layers (bitsandbytes) and parametrized layers (weight_norm, spectral_norm, prune) are
subclasses of nn.Linear, so add_adapters takes them. merge_adapters refuses them, and
merge_measured(model) merges them if they are linear. untie(model) is for an adapted lm_head.

Two things go wrong without a word. A model that changes `layer.weight` in place, such as RWKV,
changes a copy. And a layer that accelerate has offloaded has no weights to adapt.
"""

from collections import Counter

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from triadapt import find_adapters, is_plain, merge_adapters, replace_modules


class WasConv1D(nn.Linear):
    """An nn.Linear in the place of a Conv1D. A merged layer keeps this class."""


def convert_conv1d(model: nn.Module) -> nn.Module:
    """Put an equal nn.Linear in the place of each Conv1D of transformers. Returns the model.

    A Conv1D computes x W + b, so the new weights are transposed copies. Biases are shared. Call it
    before the optimizer is made, and restore_conv1d before the model is saved for transformers.
    Raises ValueError, and changes nothing, if a Conv1D has hooks or computes its weight.
    """
    return transpose(model, Conv1D, WasConv1D)


def restore_conv1d(model: nn.Module) -> nn.Module:
    """Make each nn.Linear that was a Conv1D one again, after merging. Returns the model. Raises
    ValueError, and changes nothing, if it has adapters, or if such a layer is not plain."""
    if find_adapters(model):
        raise ValueError("the model has adapters: call merge_adapters or merge_measured first")
    return transpose(model, WasConv1D, Conv1D)


def transpose(model: nn.Module, old: type, new: type) -> nn.Module:
    """Replace layers of the old type by equal ones of the new type. Returns the model."""
    weights = {}  # a weight that two layers share stays shared
    replaced = {}
    for name, layer in model.named_modules():
        if isinstance(layer, old):
            if not is_plain(layer, old):
                raise ValueError(f"{name}: its {old.__name__} has hooks or computes its weight")
            W = layer.weight
            transposed = nn.Parameter(W.detach().T.contiguous(), W.requires_grad)
            with torch.device("meta"):  # costs nothing, and draws nothing
                replaced[layer] = new(*W.shape).train(layer.training)
            replaced[layer].weight = weights.setdefault(W, transposed)
            replaced[layer].bias = layer.bias
    replace_modules(model, replaced)
    return model


def untie(model: nn.Module) -> nn.Module:
    """Give each plain nn.Linear that shares weight or bias, such as a tied lm_head, its own copies.
    Returns the model. Call it before add_adapters. Then an adapted lm_head can be saved and merged.
    """
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    for layer in model.modules():
        if is_plain(layer):
            for name, p in [*layer.named_parameters()]:
                if uses[p] > 1:
                    setattr(layer, name, nn.Parameter(p.detach().clone(), p.requires_grad))
                    layer.was_tied = True  # for export_lora, because it still is in other tools
    if hasattr(model, "config"):
        model.config.tie_word_embeddings = False  # else transformers would tie it again
    return model


@torch.no_grad()
def merge_measured(model: nn.Module) -> nn.Module:
    """merge_adapters, also for layers that compute or pack their weight. Returns the model, in
    evaluation mode. What such a layer computes in this mode is measured, and an nn.Linear with
    this W and b takes its place. Raises ValueError, and replaces nothing, if it is not linear."""
    model.eval()
    measured = {}
    for name, adapter in find_adapters(model).items():
        layer = adapter.base
        if is_plain(layer):
            continue
        frozen = [p for p in (*layer.parameters(), *model.parameters()) if not p.requires_grad]
        like = next(p for p in frozen if p.is_floating_point())  # the inputs are like this
        b = layer(torch.zeros(1, layer.in_features).to(like))[0]
        # Large inputs, because a small W would be lost in the rounding of W + b.
        W = (layer(1024 * torch.eye(layer.in_features).to(like)) - b).T / 1024
        kind = WasConv1D if isinstance(layer, WasConv1D) else nn.Linear
        linear = kind(*W.T.shape, device="meta")
        linear.weight = nn.Parameter(W.contiguous(), requires_grad=False)
        linear.bias = nn.Parameter(b, False) if layer.bias is not None or b.any() else None

        # Small inputs and large ones, because relu(W x + 20) is linear near 0.
        sizes = torch.tensor([[0.1], [1.0], [10.0], [100.0]])
        x = (sizes * torch.randn(4, layer.in_features)).to(like)
        errors = (linear(x) - layer(x)).norm(dim=1)
        rounds = is_quantized(layer) or like.dtype.itemsize < 4  # 8 bits also round the inputs
        if not (errors <= (0.03 if rounds else 1e-3) * layer(x).norm(dim=1)).all():
            raise ValueError(f"{name}: not merged, its {type(layer).__name__} is not linear")
        measured[adapter] = linear
    for adapter, linear in measured.items():
        adapter.base = linear
    return merge_adapters(model)


def is_quantized(layer: nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes, with 4 or 8 bits."""
    return type(layer).__module__.startswith("bitsandbytes.")
