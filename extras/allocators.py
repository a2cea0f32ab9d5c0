"""Rivals of the paper's importance: other signals that tell which matrices grow.

    python plots/signals.py --score worth                      # train.py with these signals
    python plots/signals.py --score random --budget numbers

Each is a RankAllocator with other `scores`, entered in SIGNALS, as a fork's idea would be. What
one has to remember goes into its state_dict, so that a checkpoint holds it.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from triadapt import SIGNALS, LoRALinear, RankAllocator


class Random(RankAllocator):
    """A control: any matrix may be next."""

    def scores(self) -> dict[str, float]:
        # A generator of its own: asking for the scores must not move the draws of the run. Its
        # seed is what was trained so far, so that tasks, seeds and allocations differ.
        seed = hash(tuple(self.importances().values()))
        generator = torch.Generator().manual_seed(seed % 2**63)
        draws = torch.rand(len(self.adapters), generator=generator).tolist()
        return dict(zip(self.adapters, draws, strict=True))


class Uniform(RankAllocator):
    """A control: the matrix of lowest rank is next, round robin."""

    def scores(self) -> dict[str, float]:
        return {name: -float(adapter.rank) for name, adapter in self.adapters.items()}


class UpdateNorm(RankAllocator):
    """The size of the update, per rank: || s B (L + U) A ||_F / r. Like the paper's importance it
    needs no gradient, but it sees B and A, too."""

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
    """How much that has grown since the last allocation, or else the end of the warm-up."""

    def __init__(self, adapters: dict[str, LoRALinear], optimizer, **settings):
        super().__init__(adapters, optimizer, **settings)
        self.before = self.norms()

    def step(self, t: int) -> list[str]:
        grown = super().step(t)
        if grown or t == self.warmup:
            self.before = self.norms()
        return grown

    def scores(self) -> dict[str, float]:
        return {name: norm - self.before[name] for name, norm in self.norms().items()}

    def state_dict(self) -> dict:
        return super().state_dict() | {"before": self.before}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.before = state["before"]


class Sensitivity(RankAllocator):
    """AdaLoRA's signal (Zhang et al. 2023): |w dL/dw| of each entry, smoothed over steps, times its
    smoothed uncertainty; here the mean over all entries of a matrix's adapter. IncreLoRA takes
    that of the entries of the whole update."""

    SMOOTHING = 0.85

    def __init__(self, adapters: dict[str, LoRALinear], optimizer, **settings):
        super().__init__(adapters, optimizer, **settings)
        self.moments = {name: {} for name in adapters}  # name: {tensor: (mean, spread)}

    def step(self, t: int) -> list[str]:
        for name, adapter in self.adapters.items():
            for tensor, axis in adapter.GROWS_ALONG.items():
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
            if tensors:  # after the first step
                products = [(mean * spread).flatten() for mean, spread in tensors.values()]
                scores[name] = torch.cat(products).mean().item()
        return scores

    def state_dict(self) -> dict:
        return super().state_dict() | {"moments": self.moments}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.moments = state["moments"]


def pad_with_zeros(moment: Tensor, p: Tensor, axis: int) -> Tensor:
    """A moment in the shape that p has grown to."""
    padded = torch.zeros_like(p)
    padded.narrow(axis, 0, moment.shape[axis]).copy_(moment)
    return padded


class Worth(RankAllocator):
    """What a change is worth, per rank: the sum over tokens of (dL/dy . delta_weight x)^2.

    L is the loss of the batch and y the output at one token, so dL/dy . delta_weight x is, to first
    order, what the change does to the loss when it is made at that token alone. It is squared
    before the sum, so that tokens which gain and tokens which lose do not cancel, and smoothed over
    steps. Each adapter is watched by a forward hook.
    """

    SMOOTHING = 0.97

    def __init__(self, adapters: dict[str, LoRALinear], optimizer, **settings):
        super().__init__(adapters, optimizer, **settings)
        self.worth = dict.fromkeys(adapters, 0.0)  # smoothed
        self.now = {}  # of the step under way: {name: sum over its backward passes}
        for name, adapter in adapters.items():
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
        zero = torch.zeros((), device=next(iter(self.adapters.values())).base.weight.device)
        now = torch.stack([self.now.get(name, zero) for name in self.worth])
        train.sum_processes([now])  # each process has seen its own tokens only
        for name, value in zip(self.worth, now.tolist(), strict=True):
            self.worth[name] = self.SMOOTHING * self.worth[name] + (1 - self.SMOOTHING) * value
        self.now = {}
        return super().step(t)

    def scores(self) -> dict[str, float]:
        return {name: worth / self.adapters[name].rank for name, worth in self.worth.items()}

    def state_dict(self) -> dict:
        return super().state_dict() | {"worth": self.worth}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.worth = state["worth"]


SIGNALS |= {
    "random": Random,
    "uniform": Uniform,
    "norm": UpdateNorm,
    "norm-change": UpdateNormChange,
    "sensitivity": Sensitivity,
    "worth": Worth,
}

if __name__ == "__main__":
    train.main()
