"""Who grows, other than by the paper's importance: allocators to compare with, and a budget counted in numbers.

Each is a RankAllocator with other scores(). What it has to remember is in self.state, so a checkpoint holds it.
They are the choices of train.py's --score.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from triadapt import LoRALinear, RankAllocator


class Random(RankAllocator):
    """A control: any matrix may be next."""

    def scores(self) -> dict[str, float]:
        return dict(zip(self.adapters, torch.rand(len(self.adapters)).tolist()))


class Uniform(RankAllocator):
    """A control: the matrix of lowest rank is next, round robin."""

    def scores(self) -> dict[str, float]:
        return {name: -float(adapter.rank) for name, adapter in self.adapters.items()}


class Sensitivity(RankAllocator):
    """IncreLoRA's signal (Zhang et al. 2023): |w dL/dw|, smoothed over steps, times its smoothed uncertainty."""

    LEFT_OUT = ()  # tensors that do not count

    def step(self, t: int) -> list[str]:
        moments = self.state.setdefault("moments", {name: {} for name in self.adapters})
        for name, adapter in self.adapters.items():
            for tensor, axis in adapter.GROWS_ALONG.items():
                if tensor in self.LEFT_OUT:
                    continue
                p = getattr(adapter, tensor).detach()
                mean, spread = moments[name].get(tensor, (torch.zeros_like(p), torch.zeros_like(p)))
                if mean.shape != p.shape:  # grown since: what is new starts at zero
                    new = torch.zeros_like(p).narrow(axis, 0, p.shape[axis] - mean.shape[axis])
                    mean, spread = torch.cat((mean, new), axis), torch.cat((spread, new), axis)
                now = (p * getattr(adapter, tensor).grad).abs()
                mean = 0.85 * mean + 0.15 * now
                moments[name][tensor] = (mean, 0.85 * spread + 0.15 * (now - mean).abs())
        return super().step(t)

    def scores(self) -> dict[str, float]:
        if "moments" not in self.state:  # before the first step
            return dict.fromkeys(self.adapters, 0.0)
        return {
            name: torch.cat([(mean * spread).flatten() for mean, spread in tensors.values()])
            .mean()
            .item()
            for name, tensors in self.state["moments"].items()
        }


class Worth(RankAllocator):
    """What a change is worth, per rank: the sum over tokens of (dL/dy . delta_weight x)^2, smoothed over steps.

    dL/dy . delta_weight x is, to first order, what the change does to the loss at one token. Squared before the sum, so
    that tokens which gain and tokens which lose do not cancel.
    """

    SMOOTHING = 0.97

    def __init__(
        self, adapters: dict[str, LoRALinear], optimizer: torch.optim.Optimizer, **settings
    ):
        super().__init__(adapters, optimizer, **settings)
        self.state["worth"], self.now = dict.fromkeys(adapters, 0.0), {}
        for name, adapter in adapters.items():
            self.watch(name, adapter)

    @staticmethod
    def value(products: Tensor) -> Tensor:
        """One number from the (tokens,) products dL/dy . delta_weight x of a backward pass."""
        return products.square().sum()

    def watch(self, name: str, adapter: LoRALinear) -> None:
        """Add up in self.now[name] what each backward pass tells; those between two step() belong together."""

        def forward(module: LoRALinear, inputs: tuple[Tensor], output: Tensor) -> None:
            if output.requires_grad:  # not in evaluation
                x = inputs[0].detach().flatten(0, -2)
                output.register_hook(lambda grad: backward(module, x, grad.flatten(0, -2)))

        @torch.no_grad()
        def backward(module: LoRALinear, x: Tensor, grad: Tensor) -> None:
            # s (dL/dy B (L + U)) . (A x) is the product without the (tokens, d_out) change itself.
            products = module.scale * (
                (grad.float() @ module.up().t()) * F.linear(x.float(), module.lora_A)
            ).sum(-1)
            self.now[name] = self.now.get(name, 0.0) + self.value(products)

        if hasattr(adapter, "watched"):  # by an earlier allocator: the newest one takes over
            adapter.watched.remove()
        adapter.watched = adapter.register_forward_hook(forward)

    def step(self, t: int) -> list[str]:
        worth, zero = self.state["worth"], next(iter(self.adapters.values())).lora_B.new_zeros(())
        now = torch.stack([self.now.get(name, zero) for name in worth])
        if dist.is_initialized():  # each process has seen its own tokens only
            dist.all_reduce(now)
        for name, value in zip(worth, now.tolist()):
            worth[name] = self.SMOOTHING * worth[name] + (1 - self.SMOOTHING) * value
        self.now = {}
        return super().step(t)

    def scores(self) -> dict[str, float]:
        return {
            name: worth / self.adapters[name].rank for name, worth in self.state["worth"].items()
        }


PRICES = {}  # kept, as an allocation asks for hundreds


def price(adapter: LoRALinear, ranks: int) -> int:
    """How many numbers that many ranks more would add."""
    key = type(adapter), adapter.base.weight.shape, adapter.rank, ranks
    if key not in PRICES:
        with torch.device("meta"):  # the shapes alone: nothing is computed, no random number drawn
            PRICES[key] = sum(entries.numel() for entries in adapter.new_entries(ranks).values())
    return PRICES[key]


class EqualNumbers(RankAllocator):
    """A mixin: the budget is as many trained numbers as LoRA has at the target rank, and the total rank is free.

    Growth ends when no matrix fits into what is left, not even by one rank. The schedules count in ranks, so for them
    the rest of the budget is what the rest of the numbers would buy at the mean price of a rank.
    """

    @property
    def rest(self) -> int:
        """The numbers that are left to be spent."""
        return self.numbers - sum(
            getattr(a, name).numel() for a in self.adapters.values() for name in a.GROWS_ALONG
        )

    @property
    def rank_step(self) -> int:
        """The rank step given, or less where only less fits; 0 at the end."""
        steps, rest = range(self.most, 0, -1), self.rest
        return next(
            (n for n in steps if any(price(a, n) <= rest for a in self.adapters.values())), 0
        )

    @rank_step.setter
    def rank_step(self, ranks: int) -> None:
        self.most = ranks

    @property
    def budget(self) -> int:
        """In ranks, and an estimate until the end: the total rank, and what is left at today's mean price."""
        mean = sum(price(a, 1) for a in self.adapters.values()) / len(self.adapters)
        return self.total_rank + max(int(self.rest / mean), self.rank_step)

    @budget.setter
    def budget(self, ranks: int) -> None:
        per_rank = sum(a.base.in_features + a.base.out_features for a in self.adapters.values())
        self.numbers = ranks // len(self.adapters) * per_rank

    def scores(self) -> dict[str, float]:
        """Of the matrices that fit, all together: from the best one on, each that fits into what is left by then."""
        scores, rest, ranks, fitting = super().scores(), self.rest, self.rank_step, {}
        for name in sorted(scores, key=scores.get, reverse=True) if ranks else []:
            if (cost := price(self.adapters[name], ranks)) <= rest:
                rest, fitting[name] = rest - cost, scores[name]
        return fitting


# train.py's --score. The importance is the paper's; a fork adds its own here.
SIGNALS = {
    "importance": RankAllocator,
    "random": Random,
    "uniform": Uniform,
    "sensitivity": Sensitivity,
    "worth": Worth,
}
SIGNALS |= {
    f"{name}, equal numbers": type(f"EqualNumbers{signal.__name__}", (EqualNumbers, signal), {})
    for name, signal in SIGNALS.items()
}
