"""Trained adapters as plain LoRA, for peft and other tools that read its files.

export_lora(model, "folder", base="openai-community/gpt2")
peft.PeftModel.from_pretrained(base_model, "folder")
"""

import json
import os
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from triadapt import LoRALinear, adapter_state_dict, find_adapters


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | Path, base: str | None = None) -> None:
    """Write the adapters as plain LoRA, with L + U folded into B.

    model: with adapters that are not merged. Other trained tensors are saved module by module.
    folder: for adapter_config.json and adapter_model.safetensors. Older ones are replaced.
    base: name or folder of the base model, for tools that load it.

    Raises ValueError for a model without adapters, or with tensors that peft cannot hold or tell
    apart by name.
    """
    adapters = find_adapters(model)
    if not adapters:
        raise ValueError("the model has no adapters to export")
    for name, adapter in adapters.items():
        if type(adapter).forward is not LoRALinear.forward:
            raise ValueError(f"{name}: {type(adapter).__name__} is more than B A x, which LoRA is")
        if "weight" not in adapter.base._parameters:
            raise ValueError(f"{name}: its weight is computed, and peft cannot merge with it")
        if isinstance(adapter.base, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(f"{name}: nn.MultiheadAttention never calls it, and peft needs that")
    refuse_shared(model, adapters)
    modules = trained_modules(model, adapters)

    tensors = {}
    for name, adapter in adapters.items():
        left, right = adapter.factors()  # (d_out, r), (r, d_in): peft's shapes, for Conv1D as well
        tensors[f"{name}.lora_A.weight"] = right
        tensors[f"{name}.lora_B.weight"] = left
    for module in modules:
        for name, tensor in model.get_submodule(module).state_dict().items():
            tensors[f"{module}.{name}"] = tensor.clone()
    tensors = {f"base_model.model.{name}": t.contiguous().cpu() for name, t in tensors.items()}

    # Long names first, because peft takes the first one that a module's name ends in.
    names = sorted(adapters, key=len, reverse=True)
    rank = max(adapter.rank for adapter in adapters.values())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": peft_targets(model, names),
        "r": rank,
        "lora_alpha": adapters[names[0]].scale * rank,
        "rank_pattern": {name: adapters[name].rank for name in names},
        # peft's scale is alpha / r of each matrix, so with these it is ours.
        "alpha_pattern": {name: adapters[name].scale * adapters[name].rank for name in names},
        # The model that peft loads has transformers' Conv1D where layers.py made an nn.Linear.
        "fan_in_fan_out": any(hasattr(a.base, "was_conv1d") for a in adapters.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": modules or None,
    }
    write_files(
        Path(folder),
        {
            "adapter_model.safetensors": save(tensors),
            "adapter_config.json": json.dumps(config, indent=2).encode(),
        },
    )


def refuse_shared(model: nn.Module, adapters: dict[str, LoRALinear]) -> None:
    """Raises ValueError if a tensor that training or peft's merging changes has two names."""
    changed = {adapter.base.weight for adapter in adapters.values()}
    changed |= {p for p in model.parameters() if p.requires_grad}
    named = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(p for _, p in named)
    for name, p in named:
        if p in changed and uses[p] > 1:
            raise ValueError(f"{name}: another module shares it, which peft does not know")


def trained_modules(model: nn.Module, adapters: dict[str, LoRALinear]) -> list[str]:
    """The modules with other trained tensors and statistics. peft knows them by their ends.

    Raises ValueError if peft cannot save one of them by itself.
    """
    modules = set()
    for name, tensor in adapter_state_dict(model).items():
        adapted = any(name.startswith(f"{n}.lora_") for n in adapters)
        mask = not tensor.is_floating_point() and not name.endswith("num_batches_tracked")
        if not (adapted or mask or name.endswith("_extra_state")):
            modules.add(name.rpartition(".")[0])
    for module in modules:
        alike = [n for n, _ in model.named_modules() if n.endswith(module) and n != module]
        nested = [n for n in adapters if n.startswith(f"{module}.") or module.startswith(f"{n}.")]
        if alike or nested:
            where = module or "the model itself"
            raise ValueError(f"{where}: is also trained, and peft cannot save it by itself")
    return sorted(modules)


def peft_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """The adapted modules for peft, which takes a list as ends of names. If another module has
    such an end, they are a regular expression of whole names."""
    ends = tuple(f".{name}" for name in names)
    if any(name.endswith(ends) and name not in names for name, _ in model.named_modules()):
        return "|".join(re.escape(name) for name in names)
    return names


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files under temporary names first, so that a full disk leaves the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.part").write_bytes(content)
    for name in files:
        os.replace(folder / f"{name}.part", folder / name)
