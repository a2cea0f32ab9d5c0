"""Rivals of the paper's importance: other scores decide which matrices grow.

    python -m extras --allocator worth
    python -m extras --allocator random:parameters     # the budget counts trained parameters

Each class is a RankAllocator with other `scores`, which can grow plain LoRA as well. At the end of
this file they enter ALLOCATORS.
"""

import copy
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from triadapt import ALLOCATORS, LoRALinear, RankAllocator


class Signal(RankAllocator):
    """A RankAllocator whose checkpoint holds the attributes named in REMEMBERS."""

    REMEMBERS = ()

    def state_dict(self) -> dict:
        remembered = {name: copy.deepcopy(getattr(self, name)) for name in self.REMEMBERS}
        return super().state_dict() | remembered

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for name in self.REMEMBERS:
            setattr(self, name, copy.deepcopy(state[name]))


class Random(Signal):
    """A control: any matrix may be next. The generator is its own, and starts with the seed of
    torch's global one, so two runs with the same seed draw the same."""

    REMEMBERS = ("draws", "generator_state")

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
    """The growth of that size since the last allocation (or the warm-up)."""

    scores = RankAllocator.scores  # the change of what `importances` returns


class Sensitivity(Signal):
    """AdaLoRA's score (Zhang et al. 2023): |w dL/dw| of each entry, smoothed over steps, times its
    smoothed uncertainty. Here it is the mean over all entries of a matrix's adapter."""

    NEW = 0.15  # the share of the current step in a smoothed value
    REMEMBERS = ("moments",)

    def __post_init__(self):
        super().__post_init__()
        self.moments = {name: {} for name in self.adapters}  # name: {tensor: (mean, spread)}

    @torch.no_grad()
    def step(self, t: int) -> list[str]:
        for name, moments in self.moments.items():
            for tensor in self.adapters[name].GROWS_ALONG:
                p = getattr(self.adapters[name], tensor)
                if p.grad is not None:
                    mean, spread = (pad(m, p) for m in moments.get(tensor, (p[:0], p[:0])))
                    now = (p * p.grad).abs()
                    mean = mean.lerp(now, self.NEW)
                    moments[tensor] = mean, spread.lerp((now - mean).abs(), self.NEW)
        return super().step(t)

    def scores(self) -> dict[str, float]:
        scores = dict.fromkeys(self.adapters, 0.0)
        for name, moments in self.moments.items():
            if moments:  # after the first gradient
                products = [(mean * spread).flatten() for mean, spread in moments.values()]
                scores[name] = torch.cat(products).mean().item()
        return scores


def pad(moment: Tensor, p: Tensor) -> Tensor:
    """A moment in the shape that p has grown to, with zeros for the new entries."""
    ends = [(0, new - old) for new, old in zip(p.shape, moment.shape, strict=True)]
    return nn.functional.pad(moment.to(p), sum(reversed(ends), ()))


class Worth(Signal):
    """What a change is worth, per rank: the sum over tokens of (dL/dy . delta_W x)^2, smoothed.
    To first order, dL/dy . delta_W x is what the update of W does to the loss at one token. It is
    squared, so that tokens which gain and tokens which lose do not cancel."""

    REMEMBERS = ("worth",)

    def __post_init__(self):
        super().__post_init__()
        self.worth = dict.fromkeys(self.adapters, 0.0)  # smoothed over steps
        self.now = dict.fromkeys(self.adapters, 0.0)  # of this step, over its backward passes
        for name, adapter in self.adapters.items():
            adapter.register_forward_hook(partial(self.watch, name))

    def watch(self, name: str, adapter: LoRALinear, inputs: tuple[Tensor], output: Tensor) -> None:
        def backward_hook(gradient: Tensor) -> None:  # (..., d_out)
            left, right = (factor.detach() for factor in adapter.factors())
            products = (gradient.float() @ left) * (x.float() @ right.T)  # (..., r)
            self.now[name] += (adapter.scale * products.sum(-1)).square().sum()

        if output.requires_grad:  # not in evaluation
            x = inputs[0].detach()
            output.register_hook(backward_hook)

    def step(self, t: int) -> list[str]:
        for name, now in self.now.items():
            self.worth[name] = 0.97 * self.worth[name] + 0.03 * float(now)
            self.now[name] = 0.0
        return super().step(t)

    def scores(self) -> dict[str, float]:
        return {name: worth / self.adapters[name].rank for name, worth in self.worth.items()}


class ParameterBudget(RankAllocator):
    """For any allocator, a budget that counts trained parameters: as many as plain LoRA has at the
    target ranks. It is never exceeded. Growth ends when less is left than the cheapest rank costs.
    `budget` and `plan` are estimates in ranks, because matrices have different prices."""

    def __post_init__(self):
        layers = [(adapter.target_rank, adapter.base) for adapter in self.adapters.values()]
        self.lora = sum(rank * (base.in_features + base.out_features) for rank, base in layers)
        super().__post_init__()
        if not self.scores():
            raise ValueError("no importance in these adapters: use triadapt, or another allocator")

    def parameters_left(self) -> int:
        tensors = [p for adapter in self.adapters.values() for p in adapter.parameters()]
        return self.lora - sum(p.numel() for p in tensors if p.requires_grad)

    @property
    def budget(self) -> int:
        """The ranks now, and those that the rest pays for at LoRA's mean price of a rank."""
        return self.total_rank + max(1, self.parameters_left() * super().budget // self.lora)

    def prices(self) -> dict[str, int]:
        """The trained parameters of rank_step more ranks, for each matrix that can pay for them. An
        untrained matrix cannot grow, so it is left out, unless all of them are untrained."""
        left, prices = self.parameters_left(), {}
        trained = {name: a for name, a in self.adapters.items() if a.factors()[0].any()}
        for name, adapter in (trained or self.adapters).items():
            with torch.device("meta"):  # only shapes: nothing is drawn from the global generator
                new = adapter.new_entries(self.rank_step)
            price = sum(t.numel() for key, t in new.items() if getattr(adapter, key).requires_grad)
            if price <= left:
                prices[name] = price
        return prices

    def count(self, t: int, Q: int) -> int:
        """k of the schedule, but not more matrices than can pay if the dearest ones grow."""
        k = super().count(t, Q)
        if k == 0:
            return 0
        while self.rank_step > 1 and not self.prices():
            self.rank_step -= 1  # at the end of the budget
        totals = accumulate(sorted(self.prices().values(), reverse=True))
        return min(k, sum(total <= self.parameters_left() for total in totals))

    def scores(self) -> dict[str, float]:
        """Those of the other class. Matrices that cannot pay come last."""
        scores, prices = super().scores(), self.prices()
        last = min(scores.values(), default=0.0) - 1.0
        return {name: score if name in prices else last for name, score in scores.items()}


def make_allocator(kind, adapters, optimizer, argument="ranks", **settings) -> RankAllocator:
    """An allocator of this class. The argument is what the budget counts."""
    if argument not in ("ranks", "parameters"):
        raise ValueError(f"--allocator NAME:{argument}: must be ranks or parameters")
    if argument == "parameters":
        kind = type(f"{kind.__name__}InParameters", (ParameterBudget, kind), {})
    return kind(adapters, optimizer, **settings)


ALLOCATORS |= {
    "importance": partial(make_allocator, RankAllocator),
    "random": partial(make_allocator, Random),
    "uniform": partial(make_allocator, Uniform),
    "norm": partial(make_allocator, UpdateNorm),
    "norm-change": partial(make_allocator, UpdateNormChange),
    "sensitivity": partial(make_allocator, Sensitivity),
    "worth": partial(make_allocator, Worth),
}
