"""Trained adapters as plain LoRA, for peft and other tools that read its files.

export_lora(model, "folder", base="openai-community/gpt2", inputs=batch)
peft.PeftModel.from_pretrained(base_model, "folder")
"""

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from extras.layers import WasConv1D, is_quantized, restore_conv1d
from triadapt import LoRALinear, adapter_state_dict, find_adapters, is_plain, replace_modules


@torch.no_grad()
def export_lora(model, folder, base=None, inputs=None, task_type=None) -> None:
    """Write adapter_config.json and adapter_model.safetensors: LoRA of one common rank.

    L + U and the scale are folded into B, smaller ranks are padded with zeros, and lora_alpha is
    the rank. So a tool that scales by lora_alpha / r applies exactly the trained update. Modules
    with other trained tensors, or with statistics such as BatchNorm's, are saved whole.

    model: with adapters that are not merged. Two copies of it are made.
    folder: older files are replaced after all checks.
    base: name or folder of the base model, for tools that load it.
    inputs: a batch for the model: keyword arguments, a tuple, or one tensor. peft's outputs with
        the files are compared, also after peft's merging. What these inputs do not reach is not
        checked. Without inputs no output is compared, and a warning says so: where the model reads
        a weight and does not call its layer, peft uses the bare weight.
    task_type: of peft, such as "CAUSAL_LM". None lets AutoPeftModel take the class of the model.

    Raises ValueError, and writes nothing, if peft would not compute what the model computes.
    """
    net = unwrapped_copy(model).eval()
    adapters = find_adapters(net)
    if not adapters:
        raise ValueError("the model has no adapters to export")
    if inputs is None:
        warnings.warn("export_lora compared no outputs with peft's: give it inputs", stacklevel=2)
    refuse_known(net, inputs)
    modules = trained_modules(net, task_type)
    plain = copy.deepcopy(net)  # the base, as other tools get it
    replace_modules(plain, {adapter: adapter.base for adapter in find_adapters(plain).values()})
    restore_conv1d(plain)
    ends = tuple(modules)  # peft takes all modules whose names end like this
    modules = [name for name, _ in plain.named_modules() if name.endswith(ends)]
    inner = {n for n in modules if any(n.startswith(f"{outer}.") for outer in modules)}
    modules = [name for name in modules if name not in inner]  # because it saves them whole

    r = max(adapter.rank for adapter in adapters.values())
    kind = type(plain)
    config = peft.LoraConfig(
        task_type=task_type,
        base_model_name_or_path=base and str(base),
        inference_mode=True,
        target_modules=[*adapters],
        r=r,
        lora_alpha=r,
        fan_in_fan_out=any(isinstance(a.base, WasConv1D) for a in adapters.values()),
        modules_to_save=modules or None,
        auto_mapping={"base_model_class": kind.__name__, "parent_library": kind.__module__},
    )
    tensors = {}
    for name, adapter in adapters.items():
        left, right = adapter.factors()  # (d_out, rank), (rank, d_in): also peft's for Conv1D
        more = r - adapter.rank
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(right, (0, 0, 0, more))
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(adapter.scale * left, (0, more))
    for module in modules:
        for name, tensor in plain.get_submodule(module).state_dict().items():
            tensors[f"{module}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
            tensor.zero_()  # peft must take it from the files
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # All is written next to the folder first, because a full disk must leave the older files.
    with torch.random.fork_rng(), tempfile.TemporaryDirectory(dir=folder.parent) as trial:
        config.save_pretrained(trial)
        save_file(tensors, Path(trial, "adapter_model.safetensors"))
        try:
            served = peft.PeftModel.from_pretrained(plain, trial)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"peft cannot load it: {error}") from error
        theirs = peft.get_peft_model_state_dict(served, save_embedding_layers=False)
        if odd := theirs.keys() ^ tensors.keys():
            raise ValueError(f"{min(odd)}: peft takes more or fewer modules, by their names' ends")
        if inputs is not None:
            check_outputs(net, served.base_model, inputs)
        folder.mkdir(exist_ok=True)
        for file in Path(trial).iterdir():
            file.replace(folder / file.name)


def unwrapped_copy(model: nn.Module) -> nn.Module:
    """A copy without the wrappers of torch.compile and DataParallel, which change names."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    memo = {}  # of tensors that modules remember, because copy refuses those with a gradient
    for module in model.modules():
        memo |= {id(t): t.detach().clone() for t in vars(module).values() if isinstance(t, Tensor)}
    net = copy.deepcopy(model, memo)
    for name, module in reversed([*net.named_modules(remove_duplicate=False)]):
        if "_orig_mod" in module._modules and name:
            net.set_submodule(name, module._orig_mod)
    return getattr(net, "_orig_mod", net)


def refuse_known(net: nn.Module, inputs) -> None:
    """Raises ValueError for shared tensors that training or peft's merging changes. Without inputs
    also for adapters about which only a comparison of outputs can tell."""
    uses = Counter(p for _, p in net.named_parameters(remove_duplicate=False))
    changed = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for name, adapter in find_adapters(net).items():
        parent = net.get_submodule(name.rpartition(".")[0])
        is_read = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        has_hooks = adapter._forward_hooks or adapter._forward_pre_hooks
        is_lora = type(adapter).forward is LoRALinear.forward and not has_hooks
        known = is_lora and not is_read and (is_plain(adapter.base) or is_quantized(adapter.base))
        if inputs is None and not known:
            raise ValueError(f"{name}: is more than a plain layer, give inputs to compare outputs")
        changed[name] = adapter.base.weight
        uses[adapter.base.weight] += hasattr(adapter.base, "was_tied")  # it still is in other tools
    for name, p in changed.items():
        if uses[p] > 1:
            raise ValueError(f"{name}: another module shares it, which peft does not know")


def trained_modules(net: nn.Module, task_type) -> list[str]:
    """The modules with other trained tensors or statistics, which peft has to save whole."""
    modules = set()
    inside = {m for adapter in find_adapters(net).values() for m in adapter.base.modules()}
    for name, tensor in adapter_state_dict(net).items():
        where, _, last = name.rpartition(".")
        module = net.get_submodule(where)
        constant = isinstance(module, PreTrainedModel) and last in module._buffers  # as in BART
        if isinstance(module, LoRALinear) or constant or not tensor.is_floating_point():
            continue
        if not where or module in inside:
            raise ValueError(f"{name}: is trained, and peft cannot save {where or 'it'} by itself")
        head = where.split(".")[0]  # peft's task types save a classifier whole
        modules.add(head if task_type and head in ("classifier", "score") else where)
    return sorted(modules)


def check_outputs(net: nn.Module, served: peft.LoraModel, inputs) -> None:
    """Raises ValueError, with the names of the layers, if peft computes something else. All is
    computed in float32, because half precision hides differences. Changes both models."""
    for tensor in (*net.parameters(), *net.buffers(), *served.parameters(), *served.buffers()):
        if type(tensor) in (nn.Parameter, Tensor):  # 4-bit weights have a type of their own
            tensor.data = as_float32(tensor)
    adapters = find_adapters(net)
    quantized = any(map(is_quantized, net.modules()))
    tolerance = 0.02 if quantized else 1e-4  # 16 layers in float32 round by 3e-6
    scales = {name: adapter.scale for name, adapter in adapters.items()}
    strengths = {}  # all updates get a usual size, because a missed one could be small
    for name, adapter in adapters.items():
        left, right = adapter.factors()
        size = (adapter.scale * left @ right).norm() / len(left) ** 0.5  # of a usual weight: 1
        strengths[name] = 1 / size.clamp(min=1e-9).item()

    def differs(names) -> bool:
        """Whether the outputs differ if only these matrices have an update."""
        for name, adapter in adapters.items():
            strength = strengths[name] if name in names else 0.0
            adapter.scale = scales[name] * strength
            served.model.get_submodule(name).scaling["default"] = strength
        want = outputs(net, inputs)
        results = [outputs(served.model, inputs)]
        if not quantized:  # merging rounds a quantized weight, and peft warns of it
            served.merge_adapter()
            results.append(outputs(served.model, inputs))
            served.unmerge_adapter()
        pairs = [pair for result in results for pair in zip(result, want, strict=True)]
        return not all((y - w).norm() <= tolerance * w.norm() for y, w in pairs)

    if differs(adapters):
        matrices = [] if differs([]) else [name for name in adapters if differs([name])]
        wrong = ", ".join(matrices) or "other modules"
        raise ValueError(f"{wrong}: peft computes something else, as if a weight is read elsewhere")


def as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def outputs(net: nn.Module, inputs) -> list[Tensor]:
    """The tensors of floats that the model returns. Values above 1e30 are masks, and become 0."""
    torch.manual_seed(0)  # some models draw masks in evaluation
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    inputs = tree_map_only(Tensor, as_float32, inputs)
    if isinstance(inputs, dict):
        result = net(**inputs)
    else:
        result = net(*inputs) if isinstance(inputs, tuple) else net(inputs)
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
    floats = [t.masked_fill(t.abs() > 1e30, 0) for t in tensors if t.is_floating_point()]
    if not floats:
        raise ValueError(f"inputs: the model returns a {type(result).__name__} without tensors")
    return floats
