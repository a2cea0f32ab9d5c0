"""Rivals of the paper's importance: other scores decide which matrices grow.

    python -m extras --allocator worth
    python -m extras --allocator random:parameters     # the budget counts trained parameters

Each class is a RankAllocator with other `scores`, entered in ALLOCATORS. What it remembers goes
into its state_dict, so that a checkpoint holds it.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from triadapt import ALLOCATORS, LoRALinear, RankAllocator


@dataclass(eq=False, kw_only=True)
class Allocator(RankAllocator):
    """The paper's importance, with a budget in ranks or in trained parameters.

    A budget in parameters is what plain LoRA trains at the target ranks. It is never exceeded, and
    in the end less is left than the cheapest rank costs. Then `budget` and `plan` estimate ranks,
    because the price of a rank depends on the matrix that grows.
    """

    argument: str = "ranks"  # or "parameters"

    def __post_init__(self):
        if self.argument not in ("ranks", "parameters"):
            raise ValueError(f"allocator argument {self.argument}: must be ranks or parameters")
        self.prices = {}  # {(name, rank, ranks more): parameters}
        super().__post_init__()

    @property
    def budget(self) -> int:
        if self.argument == "ranks":
            return super().budget
        return self.total_rank + self.ranks_left()

    def parameters_left(self) -> int:
        """The parameters that plain LoRA would train at the target ranks, minus those trained."""
        left = 0
        for adapter in self.adapters.values():
            left += adapter.target_rank * (adapter.base.in_features + adapter.base.out_features)
            left -= sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        return left

    def ranks_left(self) -> int:
        """Q: the ranks that the rest of the budget pays for, at the mean price of a rank."""
        prices = [self.price(name, 1) for name in self.adapters]
        left = self.parameters_left()
        if left < min(prices):
            return 0
        return max(1, left * len(prices) // sum(prices))

    def price(self, name: str, n: int) -> int:
        """The trained parameters that n more ranks of a matrix add. A frozen tensor is free."""
        adapter = self.adapters[name]
        key = (name, adapter.rank, n)
        if key not in self.prices:
            with torch.device("meta"):  # only shapes: nothing is drawn from the global generator
                entries = adapter.new_entries(n)
            trained = [t for t in entries if getattr(adapter, t).requires_grad]
            self.prices[key] = sum(entries[t].numel() for t in trained)
        return self.prices[key]

    def affordable(self, name: str) -> int:
        """The ranks that a matrix may grow by: rank_step, or less at the end of the budget."""
        left = self.parameters_left()
        return next((n for n in range(self.rank_step, 0, -1) if self.price(name, n) <= left), 0)

    def step(self, t: int) -> list[str]:
        """RankAllocator.step. With a budget in parameters, a matrix grows only if it can pay."""
        if self.argument == "ranks":
            return super().step(t)
        if t != self.last_step + 1 or t > self.total_steps:
            raise ValueError(f"step {t}: expected {self.last_step + 1} of {self.total_steps}")
        self.last_step = t
        if t == self.warmup:
            self.take_baseline()
        k = self.count(t, self.ranks_left())
        if k == 0:
            return []
        self.check()

        trained = [name for name, adapter in self.adapters.items() if adapter.factors()[0].any()]
        if not trained:
            raise ValueError("no update yet: call step after optimizer.step")
        scores = self.scores()
        scores = {name: scores[name] for name in trained if self.affordable(name) > 0}
        if any(map(math.isnan, scores.values())):
            raise ValueError(f"a score is not a number: {scores}")
        grown = []
        for name in sorted(scores, key=scores.get, reverse=True)[:k]:
            self.threshold = scores[name]  # in the end the k-th largest score
            n = self.affordable(name)
            if n > 0:  # a matrix before it may have spent the rest
                self.adapters[name].grow(n, self.optimizer)
                grown.append(name)
        self.last_scores = scores
        self.take_baseline()
        return grown


class Random(Allocator):
    """A control: any matrix may be next."""

    def scores(self) -> dict[str, float]:
        # The seed is the state of the training, so that runs and allocations differ and a resumed
        # run draws the same. The generator is a new one, because scores must not move the global
        # one. Python hashes a float in the same way in every process.
        tensors = [getattr(a, t) for a in self.adapters.values() for t in a.GROWS_ALONG]
        state = tuple(tensor.double().sum().item() for tensor in tensors)
        generator = torch.Generator().manual_seed(hash(state) % 2**63)
        draws = torch.rand(len(self.adapters), generator=generator).tolist()
        return dict(zip(self.adapters, draws, strict=True))


class Uniform(Allocator):
    """A control: the matrix of lowest rank is next, round robin."""

    def scores(self) -> dict[str, float]:
        return {name: -float(adapter.rank) for name, adapter in self.adapters.items()}


class UpdateNorm(Allocator):
    """The size of the update, per rank: || s B (L + U) A ||_F / r. Like the paper's importance it
    needs no gradient, but it also sees B and A."""

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        norms = {}
        for name, adapter in self.adapters.items():
            left, right = adapter.factors()  # (d_out, r), (r, d_in)
            # || left right ||^2 is the sum of the products of two Gram matrices, (r, r) each.
            square = ((left.T @ left) * (right @ right.T)).sum().clamp(min=0)
            norms[name] = adapter.scale * square.sqrt().item() / adapter.rank
        return norms

    def scores(self) -> dict[str, float]:
        return self.norms()


class UpdateNormChange(UpdateNorm):
    """The growth of that size since the last allocation (or the warm-up)."""

    def take_baseline(self) -> None:
        super().take_baseline()
        self.before = self.norms()

    def scores(self) -> dict[str, float]:
        return {name: norm - self.before[name] for name, norm in self.norms().items()}

    def state_dict(self) -> dict:
        return super().state_dict() | {"before": self.before}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.before = state["before"]


class Sensitivity(Allocator):
    """AdaLoRA's score (Zhang et al. 2023): |w dL/dw| of each entry, smoothed over steps, times its
    smoothed uncertainty. Here it is the mean over all entries of a matrix's adapter. IncreLoRA
    takes that of the entries of the whole update."""

    SMOOTHING = 0.85

    def __post_init__(self):
        super().__post_init__()
        self.moments = {name: {} for name in self.adapters}  # name: {tensor: (mean, spread)}

    def step(self, t: int) -> list[str]:
        for name, adapter in self.adapters.items():
            for tensor, axis in adapter.GROWS_ALONG.items():
                if getattr(adapter, tensor).grad is not None:
                    self.smooth(name, tensor, axis)
        return super().step(t)

    @torch.no_grad()
    def smooth(self, name: str, tensor: str, axis: int) -> None:
        p = getattr(self.adapters[name], tensor)
        old = self.moments[name].get(tensor, (torch.zeros_like(p), torch.zeros_like(p)))
        mean, spread = (pad_with_zeros(moment, p, axis) for moment in old)
        now = (p * p.grad).abs()
        mean = self.SMOOTHING * mean + (1 - self.SMOOTHING) * now
        spread = self.SMOOTHING * spread + (1 - self.SMOOTHING) * (now - mean).abs()
        self.moments[name][tensor] = (mean, spread)

    def scores(self) -> dict[str, float]:
        scores = dict.fromkeys(self.adapters, 0.0)
        for name, tensors in self.moments.items():
            if tensors:  # after the first gradient
                products = [(mean * spread).flatten() for mean, spread in tensors.values()]
                scores[name] = torch.cat(products).mean().item()
        return scores

    def state_dict(self) -> dict:
        return super().state_dict() | {"moments": copy.deepcopy(self.moments)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.moments = state["moments"]


def pad_with_zeros(moment: Tensor, p: Tensor, axis: int) -> Tensor:
    """A moment in the shape that p has grown to."""
    padded = torch.zeros_like(p)
    padded.narrow(axis, 0, moment.shape[axis]).copy_(moment)
    return padded


class Worth(Allocator):
    """What a change is worth, per rank: the sum over tokens of (dL/dy . delta_W x)^2.

    L is the loss of the batch, y the output at one token, and delta_W the update. To first order,
    dL/dy . delta_W x is what the update does to the loss at that token alone. It is squared before
    the sum, so that tokens which gain and tokens which lose do not cancel, and smoothed over
    steps. A forward hook watches each adapter.
    """

    SMOOTHING = 0.97

    def __post_init__(self):
        super().__post_init__()
        self.worth = dict.fromkeys(self.adapters, 0.0)  # smoothed
        self.now = {}  # of the current step: {name: sum over its backward passes}
        for name, adapter in self.adapters.items():
            if hasattr(adapter, "watched"):  # by an earlier allocator: the newest takes over
                adapter.watched.remove()
            adapter.watched = adapter.register_forward_hook(self.watcher(name))

    def watcher(self, name: str):
        """A forward hook that adds to self.now[name] when the gradient of the output comes."""

        def forward_hook(adapter: LoRALinear, inputs: tuple[Tensor], output: Tensor) -> None:
            @torch.no_grad()
            def backward_hook(gradient: Tensor) -> None:
                # s (dL/dy B (L + U)) . (A x): no (tokens, d_out) update is made.
                left, right = adapter.factors()
                Ax = x.float() @ right.T  # (tokens, r)
                gradient = gradient.flatten(0, -2).float() @ left  # (tokens, r)
                products = adapter.scale * (gradient * Ax).sum(-1)  # (tokens,)
                self.now[name] = self.now.get(name, 0.0) + products.square().sum()

            if output.requires_grad:  # not in evaluation
                x = inputs[0].detach().flatten(0, -2)
                output.register_hook(backward_hook)

        return forward_hook

    def step(self, t: int) -> list[str]:
        now = {name: float(self.now.get(name, 0.0)) for name in self.worth}
        self.now = {}
        self.worth = {
            name: self.SMOOTHING * worth + (1 - self.SMOOTHING) * now[name]
            for name, worth in self.worth.items()
        }
        return super().step(t)

    def scores(self) -> dict[str, float]:
        return {name: worth / self.adapters[name].rank for name, worth in self.worth.items()}

    def state_dict(self) -> dict:
        return super().state_dict() | {"worth": self.worth}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.worth = state["worth"]


ALLOCATORS |= {
    "importance": Allocator,
    "random": Random,
    "uniform": Uniform,
    "norm": UpdateNorm,
    "norm-change": UpdateNormChange,
    "sensitivity": Sensitivity,
    "worth": Worth,
}
