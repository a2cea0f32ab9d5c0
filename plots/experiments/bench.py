"""What a training step costs: our adapters beside the limit, full fine-tuning and, where it is installed, peft.

    python plots/bench.py                    # every configuration, about 20 minutes on two CPU cores
    python plots/bench.py --axes task rank   # some; `--quick --results FILE`: a tiny model, in seconds

A step is forward, cross-entropy, backward and AdamW, with adapters on all six matrices of each block. `limit` is the
base alone, frozen, with the gradients that every such adapter needs flowing through its activations: no adapter costs
less. `grown` came from half its rank in up to four growths. The two `by hand` have a backward of their own, which the
core does without: one like the core's forward, one that adds the update to the weight, as large as that is. peft's AdaLoRA has its orthogonality penalty, but does not allocate. All variants take turns, a step each. A
finished configuration is a line of plots/bench.jsonl:

    ratio, quartiles     to the limit's step of the same round: median, first and third quartile
    parts                medians of forward, backward and optimiser, in median steps of the limit
    tokens_per_second    by the median step; that of `full` in the axis `task` is the speed of train.py's pretraining
    allocation           scores of all matrices and growth of all, in steps of the variant that grows
    held_bytes           parameters, gradients, optimiser state and all that autograd saves for backward
    peak_bytes           on CUDA only: the most that was allocated in a step, the model included
"""

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import save  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plots.run import planned_growth  # noqa: E402
from train import pick_device, predict  # noqa: E402
from triadapt import METHODS, RankAllocator, TriAdaptLinear, add_adapters  # noqa: E402

MATRICES = ["q", "k", "v", "o", "fc", "proj"]
CENTRE = {"layers": 6, "width": 384, "heads": 6, "context": 256, "batch": 4, "rank": 8}
AXES = {
    "width": [{"width": width, "heads": width // 64} for width in (128, 256, 768)],
    "rank": [{"rank": rank} for rank in (2, 16, 64)],
    "batch": [{"batch": batch} for batch in (1, 16)],
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
VARIANTS += ["peft LoRA", "peft AdaLoRA"] if importlib.util.find_spec("peft") else []


class Product(torch.autograd.Function):
    """y = W x + b + s up^T A x with a backward that adds both terms of dL/dx in place, where autograd makes two tensors."""

    @staticmethod
    def forward(
        context, x, weight, bias, A, up, scale
    ):  # (n, d_in), (d_out, d_in), (d_out,), (r, d_in), (r, d_out)
        h = x @ A.t()  # (n, r)
        context.save_for_backward(x, weight, A, up, h)
        context.scale = scale
        return torch.addmm(bias, x, weight.t()).addmm_(h, up, alpha=scale)

    @staticmethod
    def backward(context, grad):  # (n, d_out)
        x, weight, A, up, h = context.saved_tensors
        grad_h = context.scale * (grad @ up.t())
        return (
            (grad @ weight).addmm_(grad_h, A),
            None,
            None,
            grad_h.t() @ x,
            context.scale * (h.t() @ grad),
            None,
        )


class ByHand(TriAdaptLinear):
    """TriAdaptLinear without dropout, through Product."""

    PRODUCT = Product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.PRODUCT.apply(
            x.flatten(0, -2), self.base.weight, self.base.bias, self.lora_A, self.up(), self.scale
        )
        return y.view(*x.shape[:-1], -1)


class GPTWithLoss(GPT):
    """Called with a batch, it gives the loss in the form to which peft's AdaLoRA adds its penalty."""

    def forward(self, batch) -> argparse.Namespace:
        return argparse.Namespace(
            loss=predict(super().forward, *batch, batch[0].device)[0] / batch[1].numel()
        )


class DenseProduct(torch.autograd.Function):
    """y = (W + s up^T A) x + b. The sum is made anew in forward and backward and never kept: one large product in each."""

    @staticmethod
    def forward(context, x, weight, bias, A, up, scale):
        context.save_for_backward(x, weight, A, up)
        context.scale = scale
        return torch.addmm(bias, x, torch.addmm(weight, up.t(), A, alpha=scale).t())

    @staticmethod
    def backward(context, grad):
        x, weight, A, up = context.saved_tensors
        grad_h, h = context.scale * (grad @ up.t()), x @ A.t()
        grad_x = grad @ torch.addmm(weight, up.t(), A, alpha=context.scale)
        return grad_x, None, None, grad_h.t() @ x, context.scale * (h.t() @ grad), None


class DenseByHand(ByHand):
    PRODUCT = DenseProduct


METHODS |= {"by hand": ByHand, "dense by hand": DenseByHand}


class Variant:
    """A model to train, with its optimiser."""

    def __init__(self, name: str, gpt: GPTWithLoss, rank: int, batch):
        self.model, self.batch = gpt, batch
        if name == "limit":
            gpt.requires_grad_(False)
            for matrix in "qkv":  # the first outputs that an adapter needs the gradient of
                getattr(gpt.blocks[0], matrix).register_forward_hook(
                    lambda module, x, y: y.requires_grad_()
                )
        elif name == "LoRA":
            add_adapters(gpt, MATRICES, "lora", rank)
        elif name.startswith("TriAdaptLoRA"):
            method = name.partition(", ")[2] if "by hand" in name else "triadapt"
            adapters = add_adapters(
                gpt, MATRICES, method, rank, (rank + 1) // 2 if "grown" in name else rank
            )
        elif name.startswith("peft"):
            from peft import AdaLoraConfig, LoraConfig, get_peft_model

            config = (
                LoraConfig(r=rank, target_modules=MATRICES)
                if name == "peft LoRA"
                else AdaLoraConfig(
                    init_r=rank, target_r=rank, total_step=10**6, target_modules=MATRICES
                )
            )
            self.model = get_peft_model(
                gpt, config
            ).base_model  # the wrapper around it would skip the penalty
        trained = [p for p in self.model.parameters() if p.requires_grad] or [torch.zeros(1)]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        self.step()  # the optimiser makes its state
        if "grown" in name:
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
            steps = [
                (seconds(self.step), seconds(lambda: allocator.step(t)))
                for t, _ in planned_growth(allocator)
            ]
            self.allocation = statistics.median(growth / step for step, growth in steps)
            self.step()

    def step(self) -> list[float]:
        """A training step: the seconds of forward, backward and optimiser."""
        self.model.zero_grad()
        losses = []
        return [
            seconds(lambda: losses.append(self.model(self.batch).loss)),
            seconds(lambda: losses[0].backward()),
            seconds(self.optimizer.step),
        ]

    def held_bytes(self) -> int:
        """Memory in use between forward and backward."""
        held = [
            t
            for p in self.model.parameters()
            for t in (p, p.grad, *self.optimizer.state.get(p, {}).values())
        ]
        # The graph itself gets None to keep: an output that it kept by such a hook would hold the graph, for good.
        with torch.autograd.graph.saved_tensors_hooks(held.append, lambda _: None):
            held.append(
                self.model(self.batch).loss
            )  # all stay alive, so that no address comes twice
        storages = [t.untyped_storage() for t in held if torch.is_tensor(t)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def seconds(function) -> float:
    """How long a call takes, to the end of what it started on the device."""
    began = time.perf_counter()
    function()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def measure(settings: dict, device: torch.device) -> dict:
    """The line of one configuration."""
    torch.manual_seed(0)
    config = GPTConfig(**{name: settings[name] for name in ("layers", "width", "heads", "context")})
    base = GPTWithLoss(config).to(device)
    batch = torch.randint(
        config.vocab_size, (2, settings["batch"], config.context), device=device
    ).unbind()
    variants, parts, held, peak = {}, {}, {}, {}
    for name in settings["variants"]:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        variants[name], parts[name] = (
            Variant(name, copy.deepcopy(base), settings["rank"], batch),
            [],
        )
        held[name] = variants[name].held_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            variants[name].step()
            peak[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(settings["rounds"]):
        for name, variant in variants.items():
            parts[name].append(variant.step())
    times = {name: [sum(step) for step in steps] for name, steps in parts.items()}
    ratios = {
        name: [own / limit for own, limit in zip(times[name], times["limit"])] for name in variants
    }
    shares = {
        name: [statistics.median(part) / statistics.median(times["limit"]) for part in zip(*steps)]
        for name, steps in parts.items()
    }
    return {
        "settings": settings,
        "ratio": {name: round(statistics.median(r), 3) for name, r in ratios.items()},
        "quartiles": {
            name: [round(q, 3) for q in statistics.quantiles(r)[::2]] for name, r in ratios.items()
        },
        "parts": {name: [round(share, 3) for share in own] for name, own in shares.items()},
        "tokens_per_second": {
            name: batch[0].numel() / statistics.median(own) for name, own in times.items()
        },
        "allocation": variants["TriAdaptLoRA, grown"].allocation,
        "held_bytes": held,
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--axes", nargs="*", choices=AXES, default=[*AXES], help="what varies around the centre"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("bench.jsonl"))
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
    for change in (
        [QUICK] if args.quick else [{}] + [change for axis in args.axes for change in AXES[axis]]
    ):
        settings = CENTRE | change | common
        text = args.results.read_text() if args.results.exists() else ""
        if settings not in [json.loads(line)["settings"] for line in text.splitlines()]:
            line = measure(settings, device)
            save(args.results, [f"{text}{json.dumps(line)}\n".encode()])
            print(change or CENTRE, line["ratio"], flush=True)


if __name__ == "__main__":
    main()
