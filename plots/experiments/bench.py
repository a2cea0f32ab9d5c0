"""What a training step costs: our adapters beside the limit, full fine-tuning and peft.

    python plots/experiments/bench.py                     # 20 minutes of two CPU cores
    python plots/experiments/bench.py --axes task rank    # a part of it
    python plots/experiments/bench.py --quick --results quick.jsonl     # a tiny model, in seconds

A step is forward, cross-entropy, backward and AdamW, with adapters on all six matrices of each
block. `limit` is the base alone, frozen, with the gradients that every such adapter needs flowing
through its activations: no adapter costs less. `grown` came from half its rank in up to four
growths. The two `by hand` have a backward of their own, which the core does without. peft's AdaLoRA
has its orthogonality penalty, but does not allocate. All variants take turns, a step each. A
finished configuration is a line of plots/results/bench.jsonl:

    ratio, quartiles     to the limit's step of the same round: median, first and third quartile
    parts                medians of forward, backward and optimiser, in median steps of the limit
    tokens_per_second    by the median step; that of `full` in the axis `task` is the speed of
                         train.py's pretraining
    allocation           scores and growth of all matrices, in steps of the variant that grows
    held_bytes           parameters, gradients, optimiser state and all that autograd keeps
    peak_bytes           on CUDA only: the most that was allocated in a step, the model included
"""

import argparse
import copy
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from model import GPT, GPTConfig
from plots.experiments import cells
from train import pick_device, predict
from triadapt import METHODS, LoRALinear, RankAllocator, TriAdaptLinear, add_adapters

MATRICES = ["q", "k", "v", "o", "fc", "proj"]
CENTRE = {"layers": 6, "width": 384, "heads": 6, "context": 256, "batch": 4, "rank": 8}
AXES = {
    "width": [
        {"width": 128, "heads": 2},
        {"width": 256, "heads": 4},
        {"width": 768, "heads": 12},
    ],
    "rank": [{"rank": 2}, {"rank": 16}, {"rank": 64}],
    "batch": [{"batch": 1}, {"batch": 16}],
    "task": [{"layers": 4, "width": 128, "heads": 4, "context": 128, "batch": 8}],
}
QUICK = {"layers": 1, "width": 64, "heads": 1, "context": 32, "batch": 2, "rank": 4}

VARIANTS = [
    "limit",
    "full",
    "LoRA",
    "TriAdaptLoRA",
    "TriAdaptLoRA, grown",
    "TriAdaptLoRA, by hand",
    "TriAdaptLoRA, dense by hand",
]
if importlib.util.find_spec("peft") is not None:
    VARIANTS += ["peft LoRA", "peft AdaLoRA"]


# Two backwards by hand. left (d_out, r) and right (r, d_in) are the factors of the update.


class Product(torch.autograd.Function):
    """y = W x + b + s (left) (right) x, whose backward adds both terms of dL/dx in place, where
    autograd makes two tensors."""

    @staticmethod
    def forward(context, x, weight, bias, left, right, scale):
        h = x @ right.T  # (n, r)
        context.save_for_backward(x, weight, left, right, h)
        context.scale = scale
        return torch.addmm(bias, x, weight.T).addmm_(h, left.T, alpha=scale)

    @staticmethod
    def backward(context, grad):  # (n, d_out)
        x, weight, left, right, h = context.saved_tensors
        grad_h = context.scale * (grad @ left)  # (n, r)
        grad_x = (grad @ weight).addmm_(grad_h, right)
        grad_left = context.scale * (grad.T @ h)
        return grad_x, None, None, grad_left, grad_h.T @ x, None


class DenseProduct(torch.autograd.Function):
    """y = (W + s (left) (right)) x + b. The sum is made anew in forward and backward and never
    kept: one large product in each."""

    @staticmethod
    def forward(context, x, weight, bias, left, right, scale):
        context.save_for_backward(x, weight, left, right)
        context.scale = scale
        return torch.addmm(bias, x, torch.addmm(weight, left, right, alpha=scale).T)

    @staticmethod
    def backward(context, grad):
        x, weight, left, right = context.saved_tensors
        grad_h = context.scale * (grad @ left)
        grad_x = grad @ torch.addmm(weight, left, right, alpha=context.scale)
        grad_left = context.scale * (grad.T @ (x @ right.T))
        return grad_x, None, None, grad_left, grad_h.T @ x, None


class ByHand(TriAdaptLinear):
    """TriAdaptLinear without dropout, through Product."""

    PRODUCT = Product

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        left, right = self.factors()
        y = self.PRODUCT.apply(
            tokens, self.base.weight, self.base.bias, left, right, self.scale
        )  # (n, d_out)
        return y.view(*x.shape[:-1], -1)


class DenseByHand(ByHand):
    """The same, through DenseProduct."""

    PRODUCT = DenseProduct


METHODS |= {"by hand": ByHand, "dense by hand": DenseByHand}


# Models to train.


class GPTWithLoss(GPT):
    """Called with a batch, it gives the loss in the form to which peft's AdaLoRA adds its
    penalty."""

    def forward(self, batch: tuple[Tensor, Tensor]) -> SimpleNamespace:
        inputs, targets = batch
        loss, _, _ = predict(super().forward, inputs, targets, inputs.device)
        return SimpleNamespace(loss=loss / targets.numel())


class Variant:
    """A model to train, with its optimiser."""

    def __init__(self, name: str, gpt: GPTWithLoss, rank: int, batch: tuple[Tensor, Tensor]):
        self.model = gpt
        self.batch = batch
        adapters = {}
        if name == "limit":
            freeze_all_but_the_flow(gpt)
        elif name == "LoRA":
            add_adapters(gpt, MATRICES, "lora", rank)
        elif name == "TriAdaptLoRA":
            add_adapters(gpt, MATRICES, "triadapt", rank)
        elif name == "TriAdaptLoRA, grown":
            adapters = add_adapters(gpt, MATRICES, "triadapt", rank, init_rank=(rank + 1) // 2)
        elif name.endswith("by hand"):
            add_adapters(gpt, MATRICES, name.removeprefix("TriAdaptLoRA, "), rank)
        elif name.startswith("peft"):
            self.model = with_peft(name, gpt, rank)

        trained = [p for p in self.model.parameters() if p.requires_grad] or [torch.zeros(1)]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        self.step()  # the optimiser makes its state
        if adapters:
            self.allocation = self.grow(adapters, rank)

    def step(self) -> list[float]:
        """A training step: the seconds of forward, backward and optimiser."""
        self.model.zero_grad()
        losses = []
        return [
            seconds(lambda: losses.append(self.model(self.batch).loss)),
            seconds(lambda: losses[0].backward()),
            seconds(self.optimizer.step),
        ]

    def grow(self, adapters: dict[str, LoRALinear], rank: int) -> float:
        """Up to the rank in at most four growths; what one costs, in steps before it."""
        allocator = RankAllocator(
            adapters,
            self.optimizer,
            schedule="fixed",
            top_k=len(adapters),
            target_rank=rank,
            rank_step=(rank + 7) // 8,
            total_steps=rank,
            warmup=0,
            interval=1,
        )
        costs = []
        for t, _ in allocator.plan():
            step = sum(self.step())
            began = time.perf_counter()
            allocator.step(t)
            wait_for_device()
            costs.append((time.perf_counter() - began) / step)
        self.step()  # gradients of the new size
        return statistics.median(costs)

    def held_bytes(self) -> int:
        """Memory in use between forward and backward."""
        held = []
        for p in self.model.parameters():
            held += [p, p.grad, *self.optimizer.state.get(p, {}).values()]
        # What autograd keeps is noted. It gets None in return: an output that it kept by such a
        # hook would keep the whole graph alive, for good.
        with torch.autograd.graph.saved_tensors_hooks(held.append, lambda _: None):
            held.append(self.model(self.batch).loss)
        sizes = {}  # by address, as several tensors may share one storage
        for tensor in held:
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())


def freeze_all_but_the_flow(gpt: GPTWithLoss) -> None:
    """No parameter is trained, but gradients flow to the first outputs that an adapter needs the
    gradient of."""
    gpt.requires_grad_(False)
    first = gpt.blocks[0]
    for matrix in (first.q, first.k, first.v):
        matrix.register_forward_hook(lambda module, x, y: y.requires_grad_())


def with_peft(name: str, gpt: GPTWithLoss, rank: int) -> nn.Module:
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=MATRICES)
    if name == "peft AdaLoRA":
        config = AdaLoraConfig(
            init_r=rank, target_r=rank, total_step=10**6, target_modules=MATRICES
        )
    return get_peft_model(gpt, config).base_model  # the wrapper around it would skip the penalty


def wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(function) -> float:
    """How long a call takes, to the end of what it started on the device."""
    began = time.perf_counter()
    function()
    wait_for_device()
    return time.perf_counter() - began


# Measuring.


def measure(settings: dict, device: torch.device) -> dict:
    """The cell of one configuration."""
    torch.manual_seed(0)
    config = GPTConfig(**{name: settings[name] for name in ("layers", "width", "heads", "context")})
    base = GPTWithLoss(config).to(device)
    shape = 2, settings["batch"], config.context
    batch = torch.randint(config.vocab_size, shape, device=device).unbind()

    variants = {}
    held = {}
    peak = {}
    for name in settings["variants"]:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        variants[name] = Variant(name, copy.deepcopy(base), settings["rank"], batch)
        held[name] = variants[name].held_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            variants[name].step()
            peak[name] = torch.cuda.max_memory_allocated() - before

    parts = {name: [] for name in variants}
    for _ in range(settings["rounds"]):
        for name, variant in variants.items():
            parts[name].append(variant.step())
    memory = {"held_bytes": held, "peak_bytes": peak}
    allocation = variants["TriAdaptLoRA, grown"].allocation
    return {"settings": settings, "allocation": allocation} | memory | in_steps(parts, shape)


def in_steps(parts: dict[str, list[list[float]]], shape: tuple[int, int, int]) -> dict:
    """What the seconds of all rounds say. parts: {variant: [[forward, backward, optimiser]]}."""
    times = {name: [sum(step) for step in steps] for name, steps in parts.items()}
    limit = times["limit"]
    unit = statistics.median(limit)
    found = {"ratio": {}, "quartiles": {}, "parts": {}, "tokens_per_second": {}}
    for name, own in times.items():
        ratios = [time / least for time, least in zip(own, limit, strict=True)]
        first, middle, third = statistics.quantiles(ratios)
        shares = [statistics.median(part) / unit for part in zip(*parts[name], strict=True)]
        found["ratio"][name] = round(middle, 3)
        found["quartiles"][name] = [round(first, 3), round(third, 3)]
        found["parts"][name] = [round(share, 3) for share in shares]
        found["tokens_per_second"][name] = shape[1] * shape[2] / statistics.median(own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="*", choices=AXES, default=[*AXES], help="what varies")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=cells.RESULTS / "bench.jsonl")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need 2 or more")
    device = pick_device(None)
    torch.set_num_threads(args.threads)
    common = {
        "variants": VARIANTS,
        "rounds": args.rounds,
        "threads": args.threads,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
    }
    changes = [QUICK]
    if not args.quick:
        changes = [{}] + [change for axis in args.axes for change in AXES[axis]]
    for change in changes:
        settings = CENTRE | change | common
        if settings not in [cell["settings"] for cell in cells.read(args.results)]:
            cell = measure(settings, device)
            cells.append(args.results, cell)
            print(change or CENTRE, cell["ratio"], flush=True)


if __name__ == "__main__":
    main()
