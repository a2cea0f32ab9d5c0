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
    """The growth of that size since the last allocation (or the warm-up)."""

    scores = RankAllocator.scores  # the change of what `importances` returns


class Sensitivity(RankAllocator):
    """AdaLoRA's score (Zhang et al. 2023): |w dL/dw| of each entry, smoothed over steps, times its
    smoothed uncertainty. Here it is the mean over all entries of a matrix's adapter."""

    NEW = 0.15  # the share of the current step in a smoothed value
    REMEMBERS = (*RankAllocator.REMEMBERS, "moments")

    def __post_init__(self):
        super().__post_init__()
        self.moments = {name: {} for name in self.adapters}  # name: {tensor: (mean, spread)}

    @torch.no_grad()
    def step(self, t: int) -> list[str]:
        for name, moments in self.moments.items():
            for tensor in self.adapters[name].GROWS_ALONG:
                p = getattr(self.adapters[name], tensor)
                if p.grad is not None and p.grad.isfinite().all():  # else an overflow is skipped
                    mean, spread = (pad(m, p) for m in moments.get(tensor, (p[:0], p[:0])))
                    now = (p * p.grad).abs()
                    mean = mean.lerp(now, self.NEW)
                    moments[tensor] = mean, spread.lerp((now - mean).abs(), self.NEW)
        if not any(self.moments.values()):
            raise ValueError("sensitivity needs gradients: call zero_grad after allocator.step")
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
        hooks = {name: partial(self.watch, name) for name in self.adapters}
        self.handles = [self.adapters[name].register_forward_hook(h) for name, h in hooks.items()]

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


class ParameterBudget(RankAllocator):
    """For any allocator, a budget that counts trained parameters: as many as plain LoRA has at the
    target ranks. It is never exceeded. Growth ends when the matrix with the dearest rank could not
    pay for rank_step more ranks. `budget` and `plan` are estimates in ranks."""

    def parameters_left(self) -> int:
        tensors = [p for adapter in self.adapters.values() for p in adapter.parameters()]
        return self.lora - sum(p.numel() for p in tensors if p.requires_grad)

    @property
    def lora(self) -> int:
        """The parameters of plain LoRA."""
        layers = [(adapter.target_rank, adapter.base) for adapter in self.adapters.values()]
        return sum(rank * (base.in_features + base.out_features) for rank, base in layers)

    @property
    def budget(self) -> int:
        """The ranks now, and those that the rest pays for at LoRA's mean price of a rank."""
        return self.total_rank + self.parameters_left() * super().budget // self.lora

    def count(self, t: int, Q: int) -> int:
        """k of the schedule, but never more matrices than can pay, whichever these are."""
        k = super().count(t, Q)
        if k == 0:
            return 0
        prices = []
        for adapter in self.adapters.values():
            with torch.device("meta"):  # only shapes: nothing is drawn from the global generator
                new = adapter.new_entries(self.rank_step)
            trained = [t for name, t in new.items() if getattr(adapter, name).requires_grad]
            prices.append(sum(t.numel() for t in trained))
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
