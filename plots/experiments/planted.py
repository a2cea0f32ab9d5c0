"""A ground truth for rank allocation: does the rank go where it is needed? A teacher knows the answer.

    python plots/planted.py                              # 9 signals, 5 seeds: 10 minutes of one core
    python plots/planted.py --seeds 1 --steps 20 --signals paper worth --results quick.jsonl

The teacher is the base with low-rank changes planted in a random third of its matrices. The student is the base with
an adapter of rank 1 on every matrix; it learns the teacher's distribution, and its budget is just what the changes
need. A signal is good if the added rank lands in planted matrices (`share`: by chance 1/3, at best 1) in the right
amounts (`correlation`: Spearman's, of final and planted ranks). Each cell is a line of plots/planted.jsonl; done cells
are skipped.

Each change alone moves the output by the same KL divergence. Scaled to one fraction of their matrices' norms instead,
they would differ by four orders of magnitude, and those in q and k of the later blocks could not be seen at all.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402
from data import batch, text_examples  # noqa: E402
from plots.signals import Random, Sensitivity, Uniform, Worth  # noqa: E402
from triadapt import RankAllocator, add_adapters  # noqa: E402

RANKS, TARGET_RANK, CONTEXT = (2, 4, 5, 6, 8, 9, 10, 12), 3, 64  # 8 of 24 matrices need 24 x 2 more


class Total(Worth):
    """The worth of the whole change, not per rank."""

    def scores(self) -> dict[str, float]:
        return self.state["worth"]


class Gate(Total):
    """The derivative of the loss along the strength of the whole change, squared: here tokens may cancel."""

    @staticmethod
    def value(products: torch.Tensor) -> torch.Tensor:
        return products.sum().square()


class SensitivityOfAB(Sensitivity):
    """IncreLoRA has no core, so here it does not count."""

    LEFT_OUT = ("lora_L", "lora_U")


class Gradient(RankAllocator):
    """The norm of B's gradient: where the next step would change most."""

    def scores(self) -> dict[str, float]:
        return {name: adapter.lora_B.grad.norm().item() for name, adapter in self.adapters.items()}


class Oracle(RankAllocator):
    """Knows the planted ranks, which measure() tells it."""

    planted = {}

    def scores(self) -> dict[str, float]:
        return {name: self.planted[name] - adapter.rank for name, adapter in self.adapters.items()}


SIGNALS = {
    "random": Random,
    "uniform": Uniform,
    "paper": RankAllocator,
    "gradient": Gradient,
    "increlora": SensitivityOfAB,
    "gate": Gate,
    "worth": Total,
    "worth per rank": Worth,
    "oracle": Oracle,
}


def divergence(model, teacher, ids) -> torch.Tensor:
    """Mean KL divergence of the model's distribution from the teacher's, in nats per token."""
    logs = [net(ids).log_softmax(-1).flatten(0, 1) for net in (model, teacher)]
    return F.kl_div(*logs, log_target=True, reduction="batchmean")


@torch.no_grad()
def plant(base, targets: list[str], ids, seed: int, effect: float) -> tuple:
    """(teacher, {matrix: planted rank, 0 for none}). A change maps random mixtures of the inputs to random outputs."""
    generator, inputs = torch.Generator().manual_seed(seed), {}
    teacher, alone = copy.deepcopy(base), copy.deepcopy(base)
    names = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in targets]
    hooks = [
        base.get_submodule(name).register_forward_pre_hook(
            lambda module, x, name=name: inputs.update({name: x[0].flatten(0, -2)})
        )
        for name in names
    ]
    base(ids)
    for hook in hooks:
        hook.remove()
    planted = dict.fromkeys(names, 0)
    for i, rank in zip(
        torch.randperm(len(names), generator=generator)[: len(names) // 3].tolist(), RANKS
    ):
        name, weight, x = names[i], alone.get_submodule(names[i]).weight, inputs[names[i]]
        rows = torch.randn(rank, len(x), generator=generator) @ (x - x.mean(0))
        change = torch.randn(len(weight), rank, generator=generator) @ rows
        change, original, low, high = (
            change * weight.norm() / change.norm(),
            weight.clone(),
            0.01,
            20.0,
        )
        for _ in range(8):  # bisection in the logarithm
            scale = (low * high) ** 0.5
            weight.copy_(original + scale * change)
            low, high = (scale, high) if divergence(alone, base, ids) < effect else (low, scale)
        weight.copy_(original)
        teacher.get_submodule(name).weight.add_(scale * change)
        planted[name] = rank
    return teacher.requires_grad_(False), planted


def ordinal(values) -> np.ndarray:
    """Ranks of values, ties at their middle."""
    values = np.array([*values])
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2


def measure(signal: str, seed: int, base, examples: dict, config: dict) -> dict:
    """One student, from its teacher to its measures."""
    began, steps, student = time.process_time(), config["steps"], copy.deepcopy(base)
    size = config["batch_size"]

    def draw(seed: int, step: int) -> torch.Tensor:
        numbers = np.random.default_rng((seed, step)).integers(len(examples["train"]), size=size)
        return batch(examples["train"], numbers)[0]

    sample = torch.cat([draw(1_000_000 + seed, step) for step in range(4)])
    teacher, planted = plant(base, config["targets"], sample, seed, config["effect"])
    torch.manual_seed(seed)
    adapters = add_adapters(
        student, config["targets"], rank=TARGET_RANK, init_rank=1, alpha=2 * TARGET_RANK
    )
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    allocator = SIGNALS[signal](
        adapters,
        optimizer,
        schedule="fixed",
        top_k=config["top_k"],
        target_rank=TARGET_RANK,
        total_steps=steps,
        warmup=config["warmup"],
        interval=config["interval"],
    )
    allocator.planted = planted  # for the oracle alone

    @torch.no_grad()
    def validate() -> float:
        chosen = (
            batch(examples["val"], part)[0]
            for part in torch.arange(len(examples["val"])).split(size)[:32]
        )
        return float(np.mean([divergence(student, teacher, ids).item() for ids in chosen]))

    before = validate()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, steps, config["lr"])
        loss = divergence(student, teacher, draw(seed, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        allocator.step(step)
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    both = ordinal(ranks.values()), ordinal(planted.values())
    share = sum(ranks[name] - 1 for name in ranks if planted[name]) / (
        allocator.total_rank - len(ranks)
    )
    correlation = float(np.corrcoef(*both)[0, 1]) if min(x.std() for x in both) else 0.0
    return {
        "signal": signal,
        "seed": seed,
        "share": share,
        "correlation": correlation,
        "kl_before": before,
        "kl": validate(),
        "ranks": ranks,
        "planted": planted,
        "seconds": time.process_time() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--signals", nargs="+", default=[*SIGNALS], choices=[*SIGNALS])
    parser.add_argument("--top-k", type=int, default=4, help="matrices that grow at an allocation")
    parser.add_argument(
        "--effect", type=float, default=0.03, help="KL divergence that each change alone makes"
    )
    parser.add_argument("--results", type=Path, default=HERE / "planted.jsonl")
    args, more = parser.parse_known_args()  # more: train.py's, such as --base and --data
    settings = train.parse_args(["--data", "code", "--batch-size", "4", "--device", "cpu", *more])
    torch.set_num_threads(1)
    base, tokenizer = train.load_base(settings, torch.device("cpu"))
    context = min(CONTEXT, base.config.context)
    examples, _ = text_examples(settings.data, tokenizer, context)
    config = {
        "steps": args.steps,
        "top_k": args.top_k,
        "effect": args.effect,
        "lr": settings.lr,
        "context": context,
        "batch_size": settings.batch_size,
        "warmup": args.steps * 3 // 10,
        "interval": max(1, args.steps // 25),
        "target_rank": TARGET_RANK,
        "smoothing": Worth.SMOOTHING,
        "targets": settings.targets.split("|"),
        "data": settings.data,
        "base": settings.base,
        "base_steps": settings.base_steps,
    }
    args.results.touch()
    done = [json.loads(line) for line in args.results.read_text().splitlines()]
    for seed in range(args.seeds):
        for signal in args.signals:
            if not any(
                cell["signal"] == signal and cell["seed"] == seed and cell["config"] == config
                for cell in done
            ):
                cell = measure(signal, seed, base, examples, config) | {"config": config}
                with open(args.results, "a") as file:
                    file.write(json.dumps(cell) + "\n")
                print(
                    f"{signal}, seed {seed}: share {cell['share']:.2f}, correlation {cell['correlation']:.2f}, "
                    f"KL {cell['kl_before']:.3f} -> {cell['kl']:.4f}, {cell['seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
