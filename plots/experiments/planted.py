"""A ground truth for rank allocation: does the rank go where it is needed? A teacher knows.

    python plots/experiments/planted.py                    # an hour of one core
    python plots/experiments/planted.py --seeds 1 --steps 20 --signals importance worth \
        --results quick.jsonl

The teacher is the base with low-rank changes planted in a random third of its matrices. The student
is the base with an adapter of rank 1 on every matrix; it learns the teacher's distribution, and its
budget is just what the changes need. A signal is good if the added rank lands in planted matrices
(`share`: by chance 1/3, at best 1) in the right amounts (`correlation`: Spearman's, of final and
planted ranks). Growth is `gentle`, four matrices at each of 12 allocations from 30 % of the steps
on, or by train.py's `default`. In the runs of `uniform` all other signals look on, and are compared
with what each adapter saves, as in saves.py; and to see where the rest of the divergence is, its
students are given the teacher's own matrices, first q and k, then all others. A finished run is a
line of plots/results/planted.jsonl.

Each change alone moves the output by the same KL divergence; a few in q and k fall short, as none
gets more than 20 times its matrix's norm. Scaled to one fraction of their norms
instead, they would differ by four orders of magnitude, and those in q and k of the later blocks
could not be seen at all.
"""

import argparse
import copy
import itertools
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import train
from model import GPT
from plots import signals
from plots.experiments import cells, saves
from triadapt import RankAllocator, add_adapters, merge_adapters

# 8 of 24 matrices, for an exact fit of the budget: 24 x 2 ranks more than the student begins with.
RANKS = [2, 4, 5, 6, 8, 9, 10, 12]
TARGET_RANK = 3
CONTEXT = 64
KINDS = (["q", "k"], ["v", "o", "fc", "proj"])  # of matrices: what sets the attention, all else
EFFECT = 0.03  # of a planted change: KL divergence of its output, nats per token


class Oracle(RankAllocator):
    """Knows the planted ranks, which Student tells it."""

    planted = {}

    def scores(self) -> dict[str, float]:
        missing = {}
        for name, adapter in self.adapters.items():
            missing[name] = float(self.planted.get(name, 0) - adapter.rank)
        return missing


RIVALS = {
    "random": signals.Random,
    "uniform": saves.Watched,
    "importance": RankAllocator,
    "norm": signals.UpdateNorm,
    "sensitivity": signals.Sensitivity,
    "worth": signals.Worth,
    "oracle": Oracle,
}


def growth(name: str, steps: int) -> dict:
    """Settings of a RankAllocator."""
    if name == "gentle":
        own = {"schedule": "fixed", "top_k": 4, "warmup": steps * 3 // 10}
        own["interval"] = max(1, steps // 25)
    else:
        own = {"schedule": "linear", "warmup": steps // 50, "interval": max(1, steps // 300)}
    return own | {"target_rank": TARGET_RANK, "total_steps": steps}


# The teacher.


def divergence(model: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    """Mean KL divergence of the model's distribution from the teacher's, in nats per token."""
    own = model(ids).log_softmax(-1).flatten(0, 1)
    wanted = teacher(ids).log_softmax(-1).flatten(0, 1)
    return nn.functional.kl_div(own, wanted, log_target=True, reduction="batchmean")


@torch.no_grad()
def plant(
    base: GPT, targets: list[str], ids: Tensor, seed: int, effect: float
) -> tuple[GPT, dict[str, int]]:
    """(teacher, {matrix: planted rank, 0 for none})."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in targets]
    order = torch.randperm(len(names), generator=generator).tolist()
    inputs = inputs_of(base, names, ids)
    teacher = copy.deepcopy(base)
    alone = copy.deepcopy(base)  # with one change at a time
    planted = dict.fromkeys(names, 0)
    for i, rank in zip(order[: len(names) // 3], RANKS, strict=False):
        name = names[i]
        change = low_rank(base.get_submodule(name).weight, inputs[name], rank, generator)
        change = scaled_to(effect, change, alone.get_submodule(name).weight, alone, base, ids)
        teacher.get_submodule(name).weight.add_(change)
        planted[name] = rank
    return teacher.requires_grad_(False), planted


def inputs_of(base: GPT, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What each matrix is multiplied by: {name: (tokens, d_in)}."""
    inputs = {}
    hooks = []
    for name in names:

        def note(module, x, name=name) -> None:
            inputs[name] = x[0].flatten(0, -2)

        hooks.append(base.get_submodule(name).register_forward_pre_hook(note))
    base(ids)
    for hook in hooks:
        hook.remove()
    return inputs


def low_rank(weight: Tensor, x: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """A change as large as the weight, from random mixtures of its inputs to random outputs."""
    rows = torch.randn(rank, len(x), generator=generator) @ (x - x.mean(0))  # (rank, d_in)
    change = torch.randn(len(weight), rank, generator=generator) @ rows  # (d_out, d_in)
    return change * weight.norm() / change.norm()


def scaled_to(
    effect: float, change: Tensor, weight: Tensor, alone: GPT, base: GPT, ids: Tensor
) -> Tensor:
    """The change, scaled to move the output of `alone` by this divergence from the base's."""
    original = weight.clone()
    low = 0.01
    high = 20.0
    for _ in range(8):  # bisection in the logarithm
        scale = (low * high) ** 0.5
        weight.copy_(original + scale * change)
        if divergence(alone, base, ids) < effect:
            low = scale
        else:
            high = scale
    weight.copy_(original)
    return scale * change


# The student.


def draw(examples: dict, seed: int, step: int, size: int) -> Tensor:
    """Training inputs of a step: (size, context)."""
    return train.draw_batch(examples["train"], seed, step, size)[0]


class Student:
    """The base with adapters, which learns the teacher's distribution."""

    def __init__(self, signal: str, base: GPT, teacher: GPT, planted: dict, config: dict):
        self.teacher = teacher
        self.config = config
        self.model = copy.deepcopy(base)
        self.adapters = add_adapters(
            self.model, config["targets"], rank=TARGET_RANK, init_rank=1, alpha=2 * TARGET_RANK
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        settings = growth(config["growth"], config["steps"])
        self.allocator = RIVALS[signal](self.adapters, self.optimizer, **settings)
        self.allocator.planted = planted  # for the oracle alone

    def step(self, t: int, ids: Tensor) -> None:
        group = self.optimizer.param_groups[0]
        group["lr"] = train.learning_rate(t, self.config["steps"], self.config["lr"])
        loss = divergence(self.model, self.teacher, ids)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        self.allocator.step(t)

    def with_teachers(self, kinds: list[str]) -> GPT:
        """The student, merged, with the teacher's own matrices of these kinds."""
        model = merge_adapters(copy.deepcopy(self.model))
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in kinds:
                module.load_state_dict(self.teacher.get_submodule(name).state_dict())
        return model

    @torch.no_grad()
    def validate(self, model: GPT, windows, batches: int) -> float:
        """Mean divergence of a model, this student or a changed one, over so many batches."""
        values = []
        for part in torch.arange(len(windows)).split(self.config["batch_size"])[:batches]:
            inputs, _ = data.batch(windows, part)
            values.append(divergence(model, self.teacher, inputs).item())
        return statistics.mean(values)


def measure(signal: str, seed: int, base: GPT, examples: dict, config: dict) -> dict:
    """One student, from its teacher to its measures."""
    size = config["batch_size"]
    sample = torch.cat([draw(examples, 1_000_000 + seed, step, size) for step in range(4)])
    teacher, planted = plant(base, config["targets"], sample, seed, config["effect"])
    torch.manual_seed(seed)
    student = Student(signal, base, teacher, planted, config)
    student.allocator.loss = lambda: student.validate(student.model, examples["val"], batches=4)
    before = student.validate(student.model, examples["val"], batches=32)
    for step in range(1, config["steps"] + 1):
        student.step(step, draw(examples, seed, step, size))

    ranks = {name: adapter.rank for name, adapter in student.adapters.items()}
    right = sum(rank - 1 for name, rank in ranks.items() if planted[name] > 0)
    both = torch.tensor([*ranks.values()]), torch.tensor([*planted.values()])
    cell = {
        "signal": signal,
        "growth": config["growth"],
        "seed": seed,
        "share": right / (sum(ranks.values()) - len(ranks)),
        "correlation": saves.spearman(*both),
        "kl_before": before,
        "kl": student.validate(student.model, examples["val"], batches=32),
        "ranks": ranks,
        "planted": planted,
        "config": config,
    }
    if signal == "uniform":
        cell |= student.allocator.compare()
        cell["kl_with_teachers"] = {}
        for kinds in KINDS:
            helped = student.with_teachers(kinds)
            left = student.validate(helped, examples["val"], batches=32)
            cell["kl_with_teachers"][" ".join(kinds)] = left
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--signals", nargs="+", default=[*RIVALS], choices=[*RIVALS])
    args, more = cells.parse(parser, "planted.jsonl")  # more: such as --base and --data
    settings = train.parse_args(["--data", "code", "--batch-size", "4", "--device", "cpu", *more])
    torch.set_num_threads(1)
    tokenizer, base = load_base(settings)
    context = min(CONTEXT, base.config.context)
    texts = data.documents(settings.data)
    examples = data.text_examples(settings.data, texts, tokenizer, context)
    config = {
        "steps": args.steps,
        "effect": EFFECT,
        "lr": settings.lr,
        "context": context,
        "batch_size": settings.batch_size,
        "targets": settings.targets.split("|"),
        "data": settings.data,
        "base": settings.base,
    }
    wanted = list(itertools.product(("gentle", "default"), range(args.seeds), args.signals))
    ran = [(c["growth"], c["seed"], c["signal"]) for c in cells.read(args.results)]

    def run(growth: str, seed: int, signal: str) -> dict:
        return measure(signal, seed, base, examples, config | {"growth": growth})

    cells.work_off(args, wanted, ran, run)


def load_base(settings: argparse.Namespace) -> tuple:
    """(tokenizer, model) of train.py's base, pretrained if it is not yet."""
    device = torch.device("cpu")
    parts = train.load_base(settings, device)
    tokenizer, base = train.open_base(parts, settings.base)
    if parts["model"] is None:
        train.pretrain(base, tokenizer, settings.base_steps, device)
    return tokenizer, base


if __name__ == "__main__":
    main()
