"""Rivals of the paper's importance: other scores decide which matrices grow.

    python -m extras --allocator worth
    python -m extras --allocator random:parameters     # the budget counts trained parameters

Each class is a RankAllocator with other `scores`, which can grow plain LoRA as well.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from triadapt import ALLOCATORS, LoRALinear, RankAllocator


class Random(RankAllocator):
    """A control: any matrix may be next. The generator is its own, and starts with the seed of
    torch's global one, so two runs with the same seed draw the same."""

    REMEMBERS = (*RankAllocator.REMEMBERS, "draws", "generator_state")

    def __post_init__(self):
        seeded = torch.Generator().manual_seed(torch.initial_seed())
        self.generator_state = seeded.get_state()
        super().__post_init__()

    def take_baseline(self) -> None:
        """Draw the next scores, so that `scores` itself has no side effects."""
        super().take_baseline()
        generator = torch.Generator()
        generator.set_state(self.generator_state)
        draws = torch.rand(len(self.adapters), generator=generator).tolist()
        self.draws = dict(zip(self.adapters, draws, strict=True))
        self.generator_state = generator.get_state()

    def scores(self) -> dict[str, float]:
        return self.draws


class Uniform(RankAllocator):
    """A control: the matrix of lowest rank is next, round robin."""

    def scores(self) -> dict[str, float]:
        return {name: -float(adapter.rank) for name, adapter in self.adapters.items()}


class UpdateNorm(RankAllocator):
    """The size of the update, per rank: || s B (L + U) A ||_F / r. Like the paper's importance it
    needs no gradient, but it also sees B and A."""

    @torch.no_grad()
    def importances(self) -> dict[str, float]:
        norms = {}
        for name, adapter in self.adapters.items():
            left, right = adapter.factors()  # (d_out, r), (r, d_in)
            # || left right ||^2 is the sum of the products of two Gram matrices, (r, r) each.
            square = ((left.T @ left) * (right @ right.T)).sum().clamp(min=0)
            norms[name] = adapter.scale * square.sqrt().item() / adapter.rank
        return norms

    def scores(self) -> dict[str, float]:
        return self.importances()


class UpdateNormChange(UpdateNorm):
    """The change of that size since the last allocation (or the warm-up)."""

    scores = RankAllocator.scores  # the change of what `importances` returns


class Sensitivity(RankAllocator):
    """AdaLoRA's score (Zhang et al. 2023): |w dL/dw| of each entry, smoothed over steps, times its
    smoothed uncertainty. Here it is the mean over all entries of a matrix's adapter."""

    REMEMBERS = (*RankAllocator.REMEMBERS, "moments")

    def __post_init__(self):
        super().__post_init__()
        self.moments = {}  # (name, tensor): (mean, spread)

    @torch.no_grad()
    def step(self, t: int) -> list[str]:
        for name, adapter in self.adapters.items():
            for tensor in adapter.GROWS_ALONG:
                p = getattr(adapter, tensor)
                if p.grad is not None and p.grad.isfinite().all():  # skip an overflow
                    old = self.moments.get((name, tensor), (p[:0], p[:0]))
                    self.moments[name, tensor] = smoothed(*old, p)
        if t > self.warmup and not self.moments:
            raise ValueError("sensitivity needs gradients: call zero_grad after allocator.step")
        return super().step(t)

    def scores(self) -> dict[str, float]:
        products = {name: [] for name in self.adapters}
        for (name, _), (mean, spread) in self.moments.items():
            products[name].append((mean * spread).flatten())
        means = {name: torch.cat(own).mean().item() for name, own in products.items() if own}
        return dict.fromkeys(self.adapters, 0.0) | means


def smoothed(mean: Tensor, spread: Tensor, p: Tensor, share=0.15) -> tuple[Tensor, Tensor]:
    """The mean of |w dL/dw| and its spread after one more step. Entries that p has gained since the
    last step start with 0. share: of the new step in the smoothed value."""
    ends = [(0, now - old) for now, old in zip(p.shape, mean.shape, strict=True)]
    mean, spread = (nn.functional.pad(m.to(p), sum(reversed(ends), ())) for m in (mean, spread))
    now = (p * p.grad).abs()
    mean = mean.lerp(now, share)
    return mean, spread.lerp((now - mean).abs(), share)


class Worth(RankAllocator):
    """What an update is worth, per rank: the sum over tokens of (dL/dy . delta_W x)^2, smoothed. To
    first order, dL/dy . delta_W x is its effect on the loss at one token. The square keeps gains
    and losses from canceling. A layer that is read and not called, as in MultiheadAttention, has
    the worth 0. If training ends early, remove the `handles`, because they forbid merging."""

    REMEMBERS = (*RankAllocator.REMEMBERS, "worth")

    def __post_init__(self):
        super().__post_init__()
        self.worth = dict.fromkeys(self.adapters, 0.0)  # smoothed over steps
        self.now = dict.fromkeys(self.adapters, 0.0)  # of this step, over its backward passes
        hooks = {name: partial(watch, self.now, name) for name in self.adapters}
        self.handles = [self.adapters[name].register_forward_hook(h) for name, h in hooks.items()]

    def step(self, t: int) -> list[str]:
        for name, now in self.now.items():
            if math.isfinite(now):  # a GradScaler skips steps whose gradients overflow
                self.worth[name] = 0.97 * self.worth[name] + 0.03 * float(now)
            self.now[name] = 0.0
        grown = super().step(t)
        if t == self.total_steps:
            for handle in self.handles:  # merge_adapters refuses layers with hooks
                handle.remove()
        return grown

    def scores(self) -> dict[str, float]:
        return {name: worth / self.adapters[name].rank for name, worth in self.worth.items()}


def watch(now: dict, name: str, adapter: LoRALinear, inputs: tuple[Tensor], output: Tensor) -> None:
    """A forward hook. The backward pass adds the worth of this call to now[name]."""

    def backward_hook(gradient: Tensor) -> None:  # (..., d_out)
        left, right = (factor.detach() for factor in adapter.factors())
        products = (gradient.float() @ left) * (x.float() @ right.T)  # (..., r)
        now[name] += (adapter.scale * products.sum(-1)).square().sum()

    if output.requires_grad:  # not in evaluation
        x = inputs[0].detach()
        output.register_hook(backward_hook)


class ParameterBudget(RankAllocator):
    """For any allocator, a budget in trained parameters: as many as LoRA has at the target ranks.
    Growth ends when the dearest matrix could not pay. `budget` and `plan` are estimates."""

    def parameters_left(self) -> int:
        tensors = [p for adapter in self.adapters.values() for p in adapter.parameters()]
        return self.lora_parameters - sum(p.numel() for p in tensors if p.requires_grad)

    @property
    def lora_parameters(self) -> int:
        layers = [(adapter.target_rank, adapter.base) for adapter in self.adapters.values()]
        return sum(rank * (base.in_features + base.out_features) for rank, base in layers)

    @property
    def budget(self) -> int:
        """The ranks now, and those that the rest pays for at LoRA's mean price of a rank."""
        return self.total_rank + self.parameters_left() * super().budget // self.lora_parameters

    def count(self, t: int, Q: int) -> int:
        """k of the schedule, but never more matrices than can pay, whichever these are."""
        k = super().count(t, Q)
        if k == 0:
            return 0
        prices = []
        for adapter in self.adapters.values():
            with torch.device("meta"):  # only shapes: nothing is drawn from the global generator
                new = adapter.new_entries(self.rank_step)
            prices.append(sum(entries.numel() for entries in new.values()))
        return min(k, self.parameters_left() // max(prices))


def make_allocator(kind, adapters, optimizer, argument="ranks", **settings) -> RankAllocator:
    """An allocator of this class. The argument is what the budget counts."""
    if argument not in ("ranks", "parameters"):
        raise ValueError(f"--allocator NAME:{argument}: must be ranks or parameters")
    if argument == "parameters":
        kind = type(f"{kind.__name__}InParameters", (ParameterBudget, kind), {})
    return kind(adapters, optimizer, **settings)


KINDS = {
    "importance": RankAllocator,
    "random": Random,
    "uniform": Uniform,
    "norm": UpdateNorm,
    "norm-change": UpdateNormChange,
    "sensitivity": Sensitivity,
    "worth": Worth,
}
ALLOCATORS |= {name: partial(make_allocator, kind) for name, kind in KINDS.items()}
