"""What each choice is worth: the default growth with one thing changed, and the released recipes.

    python plots/experiments/ablations.py               # 8 seeds of each row: two hours, one core
    python plots/experiments/ablations.py --share 0 2   # half of it, for two processes
    python plots/experiments/ablations.py --rows released --seeds 2

All rows are the main job with half its batch, on its base and at its learning rate: a row that
needs another rate looks worse than it is. --rows takes beginnings of row names. A finished run is
a line of plots/results/ablations.jsonl, so that a stopped sweep goes on where it was.

"New moments" are Adam's second moments of new entries: zero, or paced, which takes back after each
step what an entry moved faster than in a freshly started Adam; triadapt.py gives them the mean of
what their tensor has. They are compared for two beta2, as it tells how long moments last. A core
that is not trained has no importance, so its row grows uniformly and is compared with such a row.

A recipe is what one variant of the released code starts its tensors as, its scale and its
importance, in our own code; growth, budget, optimiser and learning rates are ours. The first block
of the block variants is a full matrix twice, ours two triangles.
"""

import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import train
from plots import signals  # noqa: F401  (enters uniform in SIGNALS)
from plots.experiments import cells
from triadapt import METHODS, SIGNALS, RankAllocator, TriAdaptLinear

ALPHA = 16.0  # train.py's default, which an adapter does not know: it is given alpha / target rank


# Adapters that differ in one thing.


class CurrentScale(TriAdaptLinear):
    """Scale alpha / current rank: growth scales down what is trained."""

    def __init__(self, base: nn.Module, rank: int, *settings):
        super().__init__(base, rank, *settings)
        self.scale = ALPHA / rank

    def grow(self, n: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().grow(n, optimizer)
        self.scale = ALPHA / self.rank


class RandomCore(TriAdaptLinear):
    """The core starts as small random numbers, not as the identity; growth is as ever, so that it
    changes no output."""

    def new_entries(self, n: int) -> dict[str, Tensor]:
        entries = super().new_entries(n)
        if self.rank == 0:
            for name in ("lora_L", "lora_U"):
                entries[name] = torch.randn_like(entries[name]) * 0.02
        return entries


class Released(TriAdaptLinear):
    """What the block variants share: normal A, B zero, core zero, importance per block."""

    blocks = 1

    def grow(self, n: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().grow(n, optimizer)
        self.blocks += 1

    def new_entries(self, n: int) -> dict[str, Tensor]:
        entries = {name: torch.zeros_like(new) for name, new in super().new_entries(n).items()}
        entries["lora_A"] = torch.randn_like(entries["lora_A"]) * 0.02
        return entries

    @torch.no_grad()
    def importance(self) -> Tensor:
        return self.core().norm() / self.blocks


class Single(CurrentScale):
    """..._single: all normal, but the first column of B; importance as in the paper."""

    def new_entries(self, n: int) -> dict[str, Tensor]:
        entries = super().new_entries(n)
        for name, new in entries.items():
            entries[name] = torch.randn_like(new) * 0.02
        if self.rank == 0:
            entries["lora_B"][:, 0] = 0
        return entries


class CoreZero(Released):
    """triadaptlora.py as stored later, constant scale: A and B normal, the core zero."""

    def new_entries(self, n: int) -> dict[str, Tensor]:
        entries = super().new_entries(n)
        entries["lora_B"] = torch.randn_like(entries["lora_B"]) * 0.02
        return entries


class BlockC0(CoreZero, CurrentScale):
    """..._block_c0: the same, with scale alpha / current rank."""


class BlockCB0(Released, CurrentScale):
    """..._block_cb0: core and B are zero, so every gradient is."""


class BlockABC0(Released, CurrentScale):
    """..._block_abc0: the same, and A's new blocks are zero, too."""

    def new_entries(self, n: int) -> dict[str, Tensor]:
        entries = super().new_entries(n)
        if self.rank > 0:
            entries["lora_A"] = torch.zeros_like(entries["lora_A"])
        return entries


class Eye(Released):
    """triadaptlora.py, constant scale: ones on the diagonal of each new block of the core, which
    is not the diagonal of the core."""

    def new_entries(self, n: int) -> dict[str, Tensor]:
        entries = super().new_entries(n)
        row, column = torch.tril_indices(self.rank + n, self.rank + n)
        ones = (row - self.rank == column).float()[-len(entries["lora_L"]) :]
        entries["lora_L"] = ones
        entries["lora_U"] = ones.clone()
        return entries


# Allocators that differ in one thing.


class BaselineBefore(RankAllocator):
    """The importance of before an allocation is the next one's baseline: growth scores itself."""

    def step(self, t: int) -> list[str]:
        before = self.importances()
        grown = super().step(t)
        if grown:
            self.baseline = before
        return grown


class ZeroMoments(RankAllocator):
    """The second moments of new entries start at zero, not at the mean of their tensor's."""

    def step(self, t: int) -> list[str]:
        before = {key: p.shape[axis] for key, p, axis in self.tensors()}
        grown = super().step(t)
        for key, p, axis in self.tensors():
            new = p.shape[axis] - before[key]
            if new > 0:
                moments = self.optimizer.state[p]["exp_avg_sq"]
                moments.narrow(axis, before[key], new).zero_()
        return grown

    def tensors(self):
        """((matrix, tensor), parameter, axis of growth) of all that grows."""
        for name, adapter in self.adapters.items():
            for tensor, axis in adapter.GROWS_ALONG.items():
                yield (name, tensor), getattr(adapter, tensor), axis


class PacedMoments(ZeroMoments):
    """Zero moments, and after each step what a new entry moved too far is taken back.

    Adam corrects for its zero start by f(t), t the tensor's step count. The moments of an entry of
    age k have seen k gradients only, so f(k) would be right for it.
    """

    def __init__(self, adapters, optimizer, **settings):
        super().__init__(adapters, optimizer, **settings)
        self.born = {key: torch.zeros(p.shape[axis]) for key, p, axis in self.tensors()}
        optimizer.register_step_post_hook(self.take_back)

    def step(self, t: int) -> list[str]:
        grown = super().step(t)
        for key, p, axis in self.tensors():
            new = p.shape[axis] - len(self.born[key])
            if new > 0:
                ages = torch.full((new,), float(t))
                self.born[key] = torch.cat((self.born[key], ages))
        return grown

    @torch.no_grad()
    def take_back(self, optimizer, *_) -> None:
        for group in optimizer.param_groups:
            beta1, beta2 = group["betas"]
            members = set(group["params"])
            for key, p, axis in self.tensors():
                if p not in members:
                    continue
                state = optimizer.state[p]
                age = state["step"] - self.born[key]
                now = (1 - beta2 ** state["step"]).sqrt() / (1 - beta1 ** state["step"])
                right = (1 - beta2**age).sqrt() / (1 - beta1**age)
                rate = group["lr"] * (now - right).clamp(min=0)
                shape = [-1 if d == axis else 1 for d in range(p.dim())]
                direction = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                p.add_(direction * rate.to(p.device).view(shape))


METHODS |= {
    "current-scale": CurrentScale,
    "random-core": RandomCore,
    "single": Single,
    "block-c0": BlockC0,
    "block-cb0": BlockCB0,
    "block-abc0": BlockABC0,
    "eye": Eye,
    "core-zero": CoreZero,
}
SIGNALS |= {
    "baseline-before": BaselineBefore,
    "zero-moments": ZeroMoments,
    "paced-moments": PacedMoments,
}
COMMON = ["--batch-size", "4", "--eval-interval", "300"]
BETA2 = 0.999  # of the rows that name it; else train.py's .99

# {row: options of train.py}.
ROWS = {
    "reference": [],
    "learning rate 0.005": ["--lr", "5e-3"],
    "learning rate 0.02": ["--lr", "2e-2"],
    "initial rank 2": ["--init-rank", "2"],
    "initial rank 6": ["--init-rank", "6"],
    "initial rank 8, no growth": ["--schedule", "none"],
    "exponential schedule": ["--schedule", "exponential"],
    "fixed schedule": ["--schedule", "fixed"],
    "interval 10": ["--interval", "10"],
    "warm-up 30 %": ["--warmup", "90"],
    "scale alpha / current rank": ["--method", "current-scale"],
    "core at 0.1 of the learning rate": ["--core-lr-ratio", "0.1"],
    "uniform growth": ["--score", "uniform"],
    "uniform growth, core not trained": ["--score", "uniform", "--core-lr-ratio", "0"],
    "random core": ["--method", "random-core"],
    "baseline before growth": ["--score", "baseline-before"],
    "new moments zero": ["--score", "zero-moments"],
    "new moments paced": ["--score", "paced-moments"],
    "beta2 .999": [],
    "beta2 .999, new moments zero": ["--score", "zero-moments"],
    "beta2 .999, new moments paced": ["--score", "paced-moments"],
}
REFERENCES = ("uniform growth", "beta2 .999")  # of the rows whose names go on from theirs
for recipe in ("single", "block-c0", "block-cb0", "block-abc0", "eye", "core-zero"):
    ROWS[f"released: {recipe}"] = ["--method", recipe, "--score", "baseline-before"]


def reference_of(row: str) -> str:
    """The row that one is compared with."""
    start = row.partition(",")[0]
    return start if start in REFERENCES and start != row else "reference"


def measure(row: str, seed: int, options: list[str]) -> dict:
    """One silent run, as a line of results."""
    folder = f"runs/ablations/{row}-{seed}".replace(" ", "_").replace("/", "per")
    common = [*COMMON, "--seed", str(seed), "--out", folder]
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.Run(train.parse_args([*common, *ROWS[row], *options]))
        if row.startswith("beta2"):
            for group in run.optimizer.param_groups:
                group["betas"] = (0.9, BETA2)
        run.train()
    shutil.rmtree(run.out)
    allocations = [entry["step"] for entry in run.log if entry["kind"] == "allocation"]
    return {
        "row": row,
        "seed": seed,
        "settings": vars(run.args),
        "base": run.log[0]["test_loss"],
        "test": run.log[-1]["test_loss"],
        "ranks": run.log[-1]["ranks"],
        "trainable": run.log[-1]["trainable"],
        "spent_at": max(allocations, default=0),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[""], help="beginnings of row names")
    parser.add_argument("--seeds", type=int, default=8)
    args, options = cells.parse(parser, "ablations.jsonl")
    rows = [row for row in ROWS if row.startswith(tuple(args.rows))]
    wanted = [(row, seed) for seed in range(args.seeds) for row in rows]
    ran = [(cell["row"], cell["seed"]) for cell in cells.read(args.results)]
    cells.work_off(args, wanted, ran, lambda row, seed: measure(row, seed, options))


if __name__ == "__main__":
    main()
