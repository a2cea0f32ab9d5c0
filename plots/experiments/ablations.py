"""What each choice is worth: the default growth with one thing changed, and the released recipes.

    python plots/experiments/ablations.py                      # every row: hours of one core
    python plots/experiments/ablations.py --seeds 8 --results plots/results/moments.jsonl \\
        --rows "moments zero" "moments mean" "moments paced"

--rows takes beginnings of row names; --share 0 2 does every second run, for two processes. Task,
steps and batches are those of compare.py's prose, and all rows share the learning rate that it
chose there for `linear`. A finished run is a line of the results, so that a stopped sweep goes on
where it was.

The second command compares rules for Adam's second moments of new entries: zero, the mean of what
the tensor has (what triadapt.py does), and the pacing of the first edition, which took back after
each step what an entry moved faster than in a freshly started Adam. (Its stored lines are of a
time when triadapt.py had the rule `zero`: their setting `score` names the rules that way round.)

A recipe is what one variant of the released code starts its tensors as, its scale and its
importance, in our own code; growth, budget, optimiser and learning rates are ours. Their first
block is a full matrix twice, ours two triangles.
"""

import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import train
from data import batch
from plots.experiments import cells
from plots.experiments.compare import COMMON
from plots.signals import SIGNALS, Worth
from triadapt import METHODS, RankAllocator, TriAdaptLinear

ALPHA = 16.0  # train.py's default, which an adapter does not know: it is given alpha / target rank


# Adapters that differ in one thing.


class CurrentScale(TriAdaptLinear):
    """Scale alpha / current rank: growth scales down what is trained."""

    def grow(self, n: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().grow(n, optimizer)
        self.scale = ALPHA / self.rank


class RandomCore(TriAdaptLinear):
    """A core of small random numbers, not the identity. B is zero: growth changes no output."""

    def new_entries(self, n: int) -> dict[str, Tensor]:
        entries = super().new_entries(n)
        for name in ("lora_L", "lora_U"):
            entries[name] = torch.randn_like(entries[name]) * 0.02
        return entries


class Released(TriAdaptLinear):
    """What the released variants share: normal A, B zero, core zero, importance per block."""

    blocks = 0

    def new_entries(self, n: int) -> dict[str, Tensor]:
        self.blocks += 1
        entries = {name: torch.zeros_like(new) for name, new in super().new_entries(n).items()}
        entries["lora_A"] = torch.randn_like(entries["lora_A"]) * 0.02
        return entries

    @torch.no_grad()
    def importance(self) -> Tensor:
        return self.core().norm() / self.blocks


class Single(Released, CurrentScale):
    """..._single: all normal, but the first B."""

    def new_entries(self, n: int) -> dict[str, Tensor]:
        entries = super().new_entries(n)
        for name, new in entries.items():
            if name != "lora_B" or self.blocks > 1:
                entries[name] = torch.randn_like(new) * 0.02
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
        if self.blocks > 1:
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


class Forgetful(RankAllocator):
    """A matrix that grows starts Adam anew, old entries included."""

    def step(self, t: int) -> list[str]:
        grown = super().step(t)
        for name in grown:
            for p in self.adapters[name].parameters():
                self.optimizer.state.pop(p, None)
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
    "forgetful": Forgetful,
    "zero-moments": ZeroMoments,
    "paced-moments": PacedMoments,
    "zero-worth": type("ZeroWorth", (ZeroMoments, Worth), {}),
    "paced-worth": type("PacedWorth", (PacedMoments, Worth), {}),
}


def make_rows() -> dict[str, list[str]]:
    """{row: options of train.py}."""
    rows = {"reference": []}
    for rank in (1, 2, 6):
        rows[f"initial rank {rank}"] = ["--init-rank", str(rank)]
    rows["initial rank 8, no growth"] = ["--schedule", "none"]
    for step in (2, 4):
        rows[f"rank step {step}"] = ["--rank-step", str(step)]
    for interval in (3, 10):
        rows[f"interval {interval}"] = ["--interval", str(interval)]
    for share in (10, 30):
        rows[f"warm-up {share} %"] = ["--warmup", str(3 * share)]  # of 300 steps
    for ratio in ("0.3", "0.1", "0.03", "0"):
        rows[f"core at {ratio} of the learning rate"] = ["--core-lr-ratio", ratio]
    worth = ["--score", "worth", "--budget", "numbers"]
    for ratio in ("1", "0.3", "0.1", "0.03", "0"):
        rows[f"worth, equal numbers, core at {ratio}"] = [*worth, "--core-lr-ratio", ratio]
    rows["scale alpha / current rank"] = ["--method", "current-scale"]
    rows["random core"] = ["--method", "random-core"]
    rows["baseline before growth"] = ["--score", "baseline-before"]
    rows["moments of a grown matrix reset"] = ["--score", "forgetful"]
    for recipe in ("single", "block-c0", "block-cb0", "block-abc0", "eye", "core-zero"):
        rows[f"released: {recipe}"] = ["--method", recipe, "--score", "baseline-before"]
    return rows


def make_moments_rows() -> dict[str, list[str]]:
    """The rules for new second moments, with the paper's importance and the default recipe, and
    with worth at equal numbers and a slow core."""
    signals = {
        "importance": {"zero": "zero-moments", "mean": "importance", "paced": "paced-moments"},
        "worth": {"zero": "zero-worth", "mean": "worth", "paced": "paced-worth"},
    }
    more = {"importance": [], "worth": ["--budget", "numbers", "--core-lr-ratio", "0.1"]}
    rows = {}
    for name, rules in signals.items():
        for beta2 in BETA2:
            for rank in (2, 4):
                for rule, score in rules.items():
                    row = f"moments {rule}, {name}, betas .9 {beta2}, from rank {rank}"
                    rows[row] = ["--score", score, "--init-rank", str(rank), *more[name]]
    return rows


BETA2 = {".99": 0.99, ".999": 0.999}
MOMENTS = make_moments_rows()
ROWS = make_rows() | MOMENTS


class Measured(train.Run):
    """A run that measures what its first growth does: ||change of the logits|| / ||logits||."""

    jump = None

    def adapt(self, gpt) -> None:
        super().adapt(gpt)
        if self.allocator is not None:
            self.grow = self.allocator.step
            self.allocator.step = self.watched_step

    def watched_step(self, t: int) -> list[str]:
        k = self.allocator.count(t, self.allocator.ranks_left())
        if self.jump is not None or k == 0:
            return self.grow(t)
        before = self.logits()
        grown = self.grow(t)
        self.jump = ((self.logits() - before).norm() / before.norm()).item()
        return grown

    @torch.no_grad()
    def logits(self) -> Tensor:
        inputs, _ = batch(self.examples["val"], range(4))
        return self.model.eval()(inputs.to(self.device))


def measure(row: str, seed: int, options: list[str]) -> dict:
    """One silent run, as a line of results."""
    folder = f"runs/ablations/{row}-{seed}".replace(" ", "_").replace("/", "per")
    common = [*COMMON, "--lr", "1e-2", "--seed", str(seed), "--out", folder]
    with contextlib.redirect_stdout(io.StringIO()):
        run = Measured(train.parse_args([*common, *ROWS[row], *options]))
        for beta2 in BETA2:
            if f"betas .9 {beta2}," in row:
                for group in run.optimizer.param_groups:
                    group["betas"] = (0.9, BETA2[beta2])
        run.train()
    shutil.rmtree(run.out)
    allocations = [entry["step"] for entry in run.log if entry["kind"] == "allocation"]
    return {
        "row": row,
        "seed": seed,
        "settings": vars(run.args),
        "base": run.log[0]["test_loss"],
        "test": run.log[-1]["test_loss"],
        "val": run.log[-2]["val_loss"],
        "ranks": run.log[-1]["ranks"],
        "trainable": run.log[-1]["trainable"],
        "spent_at": max(allocations, default=0),
        "jump": run.jump,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[""], help="beginnings of row names")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help="i n: i, i + n, ...")
    parser.add_argument("--results", type=Path, default=cells.RESULTS / "ablations.jsonl")
    args, options = parser.parse_known_args()
    rows = [row for row in ROWS if row.startswith(tuple(args.rows))]
    wanted = [(seed, row) for seed in range(args.seeds) for row in rows]
    for seed, row in wanted[args.share[0] :: args.share[1]]:
        done = {(cell["row"], cell["seed"]) for cell in cells.read(args.results)}
        if (row, seed) not in done:
            line = measure(row, seed, options)
            cells.append(args.results, line)
            print(f"{row}; seed {seed}; test {line['test']:.4f}; jump {line['jump']}", flush=True)


if __name__ == "__main__":
    main()
