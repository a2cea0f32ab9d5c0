"""What each choice is worth: the default growth with one thing changed at a time, and the released code's recipes.

    python plots/ablations.py                                    # 3 seeds of every row: half an hour of one core
    python plots/ablations.py --rows reference "rank step 4" --seeds 1

Task, steps and batches are those of compare.py's prose, and all rows share the learning rate that it chose there for
`linear`. A finished run is a line of plots/ablations.jsonl, so that a stopped sweep goes on where it was.

A recipe is what one variant of the released code starts its tensors as, its scale and its importance, in our own code;
growth, budget, optimiser and learning rates are ours. Their first block is a full matrix twice, ours two triangles.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402
from data import batch  # noqa: E402
from plots.compare import COMMON  # noqa: E402
from plots.signals import SIGNALS  # noqa: E402
from triadapt import METHODS, RankAllocator, TriAdaptLinear, pace_young  # noqa: E402

ALPHA = 16.0  # train.py's default, which an adapter does not know: it is given alpha / target rank


class CurrentScale(TriAdaptLinear):
    """Scale alpha / current rank: growth scales down what is trained."""

    def grow(self, n: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().grow(n, optimizer)
        self.scale = ALPHA / self.rank


class RandomCore(TriAdaptLinear):
    """A core of small random numbers instead of the identity; B is zero, so growth still changes no output."""

    def new_entries(self, n: int):
        entries = super().new_entries(n)
        return entries | {
            name: torch.randn_like(entries[name]) * 0.02 for name in ("lora_L", "lora_U")
        }


class Released(TriAdaptLinear):
    """What the variants of the released code share: normal A, B zero, core zero, importance per growth block."""

    blocks = 0

    def new_entries(self, n: int):
        self.blocks += 1
        return {
            name: torch.randn_like(new) * 0.02 if name == "lora_A" else torch.zeros_like(new)
            for name, new in super().new_entries(n).items()
        }

    @torch.no_grad()
    def importance(self):
        return self.core().norm() / self.blocks


class Single(Released, CurrentScale):
    """..._single: all normal, but the first B."""

    def new_entries(self, n: int):
        return {
            name: new if name == "lora_B" and self.blocks == 1 else torch.randn_like(new) * 0.02
            for name, new in super().new_entries(n).items()
        }


class CoreZero(Released):
    """triadaptlora.py as stored later, constant scale: A and B normal, the core zero."""

    def new_entries(self, n: int):
        entries = super().new_entries(n)
        return entries | {"lora_B": torch.randn_like(entries["lora_B"]) * 0.02}


class BlockC0(CoreZero, CurrentScale):
    """..._block_c0: the same, with scale alpha / current rank."""


class BlockCB0(Released, CurrentScale):
    """..._block_cb0: core and B are zero, so every gradient is."""


class BlockABC0(Released, CurrentScale):
    """..._block_abc0: so is A, after its first block."""

    def new_entries(self, n: int):
        entries = super().new_entries(n)
        return entries | (
            {"lora_A": torch.zeros_like(entries["lora_A"])} if self.blocks > 1 else {}
        )


class Eye(Released):
    """triadaptlora.py, constant scale: each new block of the core begins with ones on its own diagonal."""

    def new_entries(self, n: int):
        row, column = torch.tril_indices(self.rank + n, self.rank + n)[
            :, self.rank * (self.rank + 1) // 2 :
        ]
        ones = (row - self.rank == column).float()
        return super().new_entries(n) | {"lora_L": ones, "lora_U": ones.clone()}


class BaselineBefore(RankAllocator):
    """The importance of before an allocation is the next one's baseline: growth scores itself."""

    def step(self, t: int) -> list[str]:
        before = self.importances()
        if grown := super().step(t):
            self.state["baseline"] = before
        return grown


class Unpaced(RankAllocator):
    """New entries have zero moments and the age of their tensor: they move up to 2.1 times too fast."""

    def __init__(self, adapters, optimizer, **settings):
        super().__init__(adapters, optimizer, **settings)
        hooks = optimizer._optimizer_step_post_hooks
        for key in [key for key, hook in hooks.items() if hook is pace_young]:
            del hooks[key]


class Forgetful(RankAllocator):
    """A matrix that grows starts Adam anew, old entries included."""

    def step(self, t: int) -> list[str]:
        grown = super().step(t)
        for name in grown:
            for p in self.adapters[name].parameters():
                self.optimizer.state.pop(p, None)
        return grown


class NewRate(RankAllocator):
    """What came by growth moves FACTOR times as far in each step."""

    FACTOR = 1.0

    def __init__(self, adapters, optimizer, **settings):
        super().__init__(adapters, optimizer, **settings)
        optimizer.register_step_pre_hook(self.remember)
        optimizer.register_step_post_hook(self.rescale)

    def remember(self, optimizer, *_) -> None:
        self.before = {
            p: p.detach().clone() for p, state in optimizer.state.items() if "born" in state
        }

    @torch.no_grad()
    def rescale(self, optimizer, *_) -> None:
        for p, before in self.before.items():
            p.add_((p - before) * (optimizer.state[p]["born"] > 0) * (self.FACTOR - 1))


class HalfRate(NewRate):
    FACTOR = 0.5


class DoubleRate(NewRate):
    FACTOR = 2.0


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
    "unpaced": Unpaced,
    "forgetful": Forgetful,
    "half-rate": HalfRate,
    "double-rate": DoubleRate,
}
ROWS = {"reference": []}
ROWS |= {f"initial rank {rank}": ["--init-rank", str(rank)] for rank in (1, 2, 6)}
ROWS["initial rank 8, no growth"] = ["--schedule", "none"]
ROWS |= {f"rank step {step}": ["--rank-step", str(step)] for step in (2, 4)}
ROWS |= {f"interval {interval}": ["--interval", str(interval)] for interval in (3, 10)}
ROWS |= {f"warm-up {share} %": ["--warmup", str(3 * share)] for share in (10, 30)}  # of 300 steps
ROWS |= {
    f"core at {ratio} of the learning rate": ["--core-lr-ratio", ratio]
    for ratio in ("0.3", "0.1", "0.03", "0")
}
ROWS |= {
    f"worth, equal numbers, core at {ratio}": [
        "--score",
        "worth, equal numbers",
        "--core-lr-ratio",
        ratio,
    ]
    for ratio in ("1", "0.3", "0.1", "0.03", "0")
}
ROWS |= {
    "scale alpha / current rank": ["--method", "current-scale"],
    "random core": ["--method", "random-core"],
    "baseline before growth": ["--score", "baseline-before"],
    "new moments not paced": ["--score", "unpaced"],
    "moments of a grown matrix reset": ["--score", "forgetful"],
    "new entries at half rate": ["--score", "half-rate"],
    "new entries at double rate": ["--score", "double-rate"],
}
ROWS |= {
    f"released: {recipe}": ["--method", recipe, "--score", "baseline-before"]
    for recipe in ("single", "block-c0", "block-cb0", "block-abc0", "eye", "core-zero")
}


class Jumping(train.Run):
    """A run that measures what its first growth does to the output: ||change of the logits|| / ||logits||."""

    jump = None

    def __init__(self, args):
        super().__init__(args)
        if self.allocator:
            self.grow, self.allocator.step = self.allocator.step, self.watch

    def watch(self, t: int) -> list[str]:
        if self.jump is not None or not self.allocator.count(t, self.allocator.total_rank):
            return self.grow(t)
        inputs, _ = batch(self.examples["val"], range(4))
        with torch.no_grad(), torch.random.fork_rng():
            before = self.model.eval()(inputs.to(self.device))
        grown = self.grow(t)
        with torch.no_grad():
            self.jump = (
                (self.model(inputs.to(self.device)) - before).norm() / before.norm()
            ).item()
        return grown


def measure(row: str, seed: int, options: list[str]) -> dict:
    """One silent run, as a line of results."""
    folder = f"runs/ablations/{row}-{seed}".replace(" ", "_").replace("/", "per")
    with contextlib.redirect_stdout(io.StringIO()):
        run = Jumping(
            train.parse_args(
                [
                    *COMMON,
                    "--lr",
                    "1e-2",
                    *ROWS[row],
                    "--seed",
                    str(seed),
                    "--out",
                    folder,
                    *options,
                ]
            )
        )
        run.train()
    allocations = [entry["step"] for entry in run.log if entry["kind"] == "allocation"]
    shutil.rmtree(run.out)
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
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "ablations.jsonl")
    args, options = parser.parse_known_args()
    args.results.touch()
    for seed in range(args.seeds):
        for row in args.rows:
            done = [json.loads(line) for line in args.results.read_text().splitlines()]
            if (row, seed) not in [(cell["row"], cell["seed"]) for cell in done]:
                line = measure(row, seed, options)
                with open(args.results, "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{row}; seed {seed}; test {line['test']:.4f}; jump {line['jump']}", flush=True
                )


if __name__ == "__main__":
    main()
