"""Trained adapters as plain LoRA, for peft and other tools that read its files.

export_lora(model, "folder", base="openai-community/gpt2", inputs=batch)
peft.PeftModel.from_pretrained(base_model, "folder")
"""

import copy
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from extras.layers import is_plain, is_quantized, restore_conv1d
from triadapt import LoRALinear, adapter_state_dict, find_adapters, replace_modules


@torch.no_grad()
def export_lora(model, folder, base=None, inputs=None, task_type=None) -> None:
    """Write adapter_config.json and adapter_model.safetensors: the adapters as LoRA of one rank.

    L + U and the scale are folded into B, smaller ranks are padded with zeros, and lora_alpha is
    the rank. So a tool that scales by lora_alpha / r applies exactly the trained update. Modules
    with other trained tensors, or with statistics such as BatchNorm's, are saved whole.

    model: with adapters that are not merged.
    folder: older files are replaced after all checks.
    base: name or folder of the base model, for tools that load it.
    inputs: a batch for the model: a dict of keyword arguments, a tuple, or a tensor. peft opens the
        files on a copy of the base, and the outputs are compared, also after peft's merging. What
        these inputs do not reach is not checked. Without inputs no output is compared: if the
        model reads a layer's weight and does not call the layer, peft uses the bare weight there.
    task_type: of peft, such as "CAUSAL_LM". None lets AutoPeftModel take the class of the model.

    Raises ValueError, and writes nothing, if peft would not compute what the model computes.
    """
    task_type = task_type and peft.TaskType(task_type).value
    net = copy_with(lambda tensor: tensor, model).eval()  # peft changes its modules
    adapters = find_adapters(net)
    if not adapters:
        raise ValueError("the model has no adapters to export")
    for name, adapter in adapters.items():
        kind, layer = type(adapter), adapter.base
        if kind.forward is not LoRALinear.forward:
            raise ValueError(f"{name}: {kind.__name__} is more than B A x, which LoRA is")
        parent = net.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"{name}: {type(parent).__name__} reads it, and peft needs a call")
        known = is_plain(layer, nn.Linear.forward) or is_quantized(layer)
        if inputs is None and (not known or adapter._forward_hooks or adapter._forward_pre_hooks):
            kind = type(layer).__name__
            raise ValueError(f"{name}: is a {kind} or has hooks, give inputs to compare outputs")
    refuse_shared(net, adapters)
    modules = trained_modules(net)

    r = max(adapter.rank for adapter in adapters.values())
    tensors = {}
    for name, adapter in adapters.items():
        left, right = adapter.factors()  # (d_out, rank), (rank, d_in): also peft's for Conv1D
        more = r - adapter.rank
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(right, (0, 0, 0, more))
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(adapter.scale * left, (0, more))
    net = without_adapters(net)
    for module in modules:
        for name, tensor in net.get_submodule(module).state_dict().items():
            tensors[f"{module}.{name}"] = tensor.clone()
    tensors = {f"base_model.model.{name}": t.contiguous().cpu() for name, t in tensors.items()}

    ends = tuple(f".{name}" for name in adapters)  # peft takes names by their ends
    also = [name for name, _ in net.named_modules() if name.endswith(ends) and name not in adapters]
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base and str(base),
        "inference_mode": True,
        "target_modules": "|".join(map(re.escape, adapters)) if also else [*adapters],
        "r": r,
        "lora_alpha": r,
        # The model that peft loads has transformers' Conv1D where layers.py made an nn.Linear.
        "fan_in_fan_out": any(hasattr(a.base, "was_conv1d") for a in adapters.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": modules or None,
    }
    if task_type is None and type(net).__module__.startswith("transformers."):
        auto = {"base_model_class": type(net).__name__, "parent_library": type(net).__module__}
        config["auto_mapping"] = auto
    files = {
        "adapter_model.safetensors": save(tensors),
        "adapter_config.json": json.dumps(config, indent=2).encode(),
    }
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as trial:
        check_names(net, config, tensors)
        if inputs is not None:
            write_files(Path(trial), files)
            check_outputs(model, trial, modules, inputs)
    write_files(Path(folder), files)


def copy_with(convert, model: nn.Module) -> nn.Module:
    """A copy of the model with convert(tensor) as its tensors, and without the wrappers of
    torch.compile and DataParallel. Tensors of other kinds, such as 4-bit weights, are copied."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    memo = {}
    for m in model.modules():
        for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values()):
            if type(t) is nn.Parameter:
                memo[id(t)] = nn.Parameter(convert(t.detach()), t.requires_grad)
            elif type(t) is Tensor:
                memo[id(t)] = convert(t.detach())
    net = copy.deepcopy(model, memo)
    for name, module in reversed([*net.named_modules(remove_duplicate=False)]):
        if "_orig_mod" in module._modules and name:
            net.set_submodule(name, module._orig_mod)
    return getattr(net, "_orig_mod", net)


def refuse_shared(model: nn.Module, adapters: dict[str, LoRALinear]) -> None:
    """Raises ValueError if a tensor that training or peft's merging changes has two names."""
    changed = {adapter.base.weight for adapter in adapters.values()}
    changed |= {p for p in model.parameters() if p.requires_grad}
    named = [*model.named_parameters(remove_duplicate=False)]
    memory = {p: type(p) is nn.Parameter and p.data_ptr() or id(p) for _, p in named}
    uses = Counter(memory[p] for _, p in named)
    for name, p in named:
        was_tied = hasattr(model.get_submodule(name.rpartition(".")[0]), "was_tied")
        if p in changed and (uses[memory[p]] > 1 or was_tied):
            raise ValueError(f"{name}: another module shares it, which peft does not know")


def trained_modules(model: nn.Module) -> list[str]:
    """The modules with other trained tensors or statistics, which peft has to save whole."""
    modules = set()
    inside = tuple(f"{name}." for name in find_adapters(model))
    for name, tensor in adapter_state_dict(model).items():
        where, _, last = name.rpartition(".")
        module = model.get_submodule(where)
        constant = isinstance(module, PreTrainedModel) and last in module._buffers  # as in BART
        mask = not tensor.is_floating_point() and last != "num_batches_tracked"
        adapted = name.startswith(inside) and last.startswith("lora_")
        if adapted or constant or mask or last == "_extra_state":
            continue
        while parent := where.rpartition(".")[0]:  # peft saves a head whole
            module = model.get_submodule(parent)
            whole = all(p.requires_grad for p in module.parameters())
            if not whole or isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                break
            where = parent
        if not where or f"{where}.".startswith(inside):
            raise ValueError(f"{name}: is trained, and peft cannot save {where or 'it'} by itself")
        modules.add(where)
    return sorted(modules)


def without_adapters(net: nn.Module) -> nn.Module:
    """The base as peft gets it. Changes net."""
    replace_modules(net, {adapter: adapter.base for adapter in find_adapters(net).values()})
    return restore_conv1d(net)


def check_names(net: nn.Module, config: dict, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError if peft makes other tensors than these of the config. Changes net."""
    config = copy.deepcopy(config) | {"base_model_name_or_path": None}  # peft changes it
    try:
        served = peft.get_peft_model(net, peft.LoraConfig(**config))
        theirs = peft.get_peft_model_state_dict(served, save_embedding_layers=False)
        odd = theirs.keys() ^ tensors.keys()
        if not odd:
            peft.set_peft_model_state_dict(served, tensors)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"peft cannot load it: {error}") from error
    if odd:
        names = ", ".join(name.removeprefix("base_model.model.") for name in sorted(odd)[:4])
        raise ValueError(f"{names}: peft takes more or fewer modules, by the ends of their names")


def check_outputs(model: nn.Module, folder: str, modules: list[str], inputs) -> None:
    """Raises ValueError, with the names of the layers, if peft computes something else with these
    files. All is computed in float32, because half precision hides differences."""
    ours = copy_with(as_float32, model).eval()
    base = without_adapters(copy_with(as_float32, model)).eval()
    bare = outputs(base, inputs)
    for module in modules:
        for tensor in base.get_submodule(module).state_dict().values():
            tensor.fill_(0.5)  # what was trained must come from the files
    served = peft.PeftModel.from_pretrained(base, folder).eval()
    adapters = find_adapters(ours)
    scales = {name: adapter.scale for name, adapter in adapters.items()}
    exact = not any(is_quantized(module) for module in ours.modules())

    def differs(names) -> bool:
        """Whether the outputs differ if only these matrices have an update."""
        for name, adapter in adapters.items():
            adapter.scale = scales[name] if name in names else 0.0
            served.base_model.model.get_submodule(name).scaling["default"] = float(name in names)
        want = outputs(ours, inputs)
        result = outputs(served.base_model.model, inputs)
        if not exact:  # peft's merging rounds a quantized weight, and warns of it
            return far(result, want, bare, share=0.1, rounding=0.02)
        served.merge_adapter()
        merged = outputs(served.base_model.model, inputs)
        served.unmerge_adapter()
        return far(result, want, bare) or far(merged, want, bare)

    if differs(adapters):
        matrices = [] if differs([]) else [name for name in adapters if differs([name])]
        wrong = ", ".join(matrices) or "other modules"
        raise ValueError(f"{wrong}: peft computes something else, as if a weight is read elsewhere")


def as_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


def outputs(net: nn.Module, inputs) -> list[Tensor]:
    """The tensors of floats that the model returns for this batch."""
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    inputs = tree_map_only(Tensor, as_float32, inputs)
    torch.manual_seed(0)  # some models draw masks in evaluation
    if isinstance(inputs, dict):
        result = net(**inputs)
    else:
        result = net(*inputs) if isinstance(inputs, tuple) else net(inputs)
    floats = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
    if not any(t.numel() for t in floats):
        raise ValueError(f"inputs: the model returns a {type(result).__name__} without tensors")
    return floats


def far(result: list, want: list, bare: list, share=1e-3, rounding=1e-5) -> bool:
    """Whether a result is not what is wanted: by a share of the update, which moves the outputs
    from bare to want, and by rounding."""
    for y, w, b in zip(result, want, bare, strict=True):
        size, moved = (torch.where(t.abs() < 1e30, t.abs(), 0) for t in (w, w - b))  # not masks
        if w.numel():
            error = rounding * size.mean() + share * moved.max()
            if not torch.allclose(y, w, rtol=rounding, atol=error.item()):
                return True
    return False


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files under temporary names first, so that a full disk leaves the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.part").write_bytes(content)
    for name in files:
        os.replace(folder / f"{name}.part", folder / name)
