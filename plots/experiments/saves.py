"""What does a signal know of the loss that a matrix's adapter saves? Signals that look on.

    python plots/experiments/bases.py     # first: three bases
    python plots/experiments/saves.py     # 24 runs on them, about an hour of one core

All matrices grow alike, by train.py's defaults, while every signal scores them and none is
listened to. Five times on the way and at the end each adapter is switched off, alone: how much
does the validation loss rise? A signal is good if its scores, at an allocation or their mean
places over all allocations, are in the order of what the adapters save then, or in the end:
Spearman's correlation over the matrices. planted.py does the same where the truth is known. A
finished run is a line of plots/results/saves.jsonl.
"""

import argparse
import contextlib
import io
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from plots import signals
from plots.experiments import bases, cells, evidence
from triadapt import SIGNALS, LoRALinear

WATCHED = ("importance", "random", "norm", "norm-change", "sensitivity", "worth")
MOMENTS = 5  # at which the adapters are switched off during the growth


class Watched(signals.Uniform):
    """Uniform growth, while other signals look on."""

    def __init__(self, adapters: dict[str, LoRALinear], optimizer, **settings):
        super().__init__(adapters, optimizer, **settings)
        self.lookers = {}
        for name in WATCHED:
            self.lookers[name] = SIGNALS[name](adapters, optimizer, **settings)
            self.lookers[name].budget = 0  # so that it never grows
        steps = [t for t, _ in self.plan()]
        self.moments = [steps[len(steps) * (i + 1) // MOMENTS - 1] for i in range(MOMENTS)]
        self.loss = None  # a function without arguments, set from outside: the validation loss
        self.scores_seen = []  # {signal: {name: score}} of each allocation
        self.saved_seen = {}  # {number of the allocation: {name: loss saved}}
        self.saved_in_the_end = {}

    def step(self, t: int) -> list[str]:
        for looker in self.lookers.values():
            looker.step(t)
        if self.count(t, self.ranks_left()) > 0:
            self.scores_seen.append({name: s.scores() for name, s in self.lookers.items()})
        if t in self.moments:
            self.saved_seen[len(self.scores_seen) - 1] = saved(self.adapters, self.loss)
        grown = super().step(t)
        if grown:  # the next change of a signal begins here, at the new ranks
            for looker in self.lookers.values():
                looker.known_rank = looker.total_rank
                looker.baseline = looker.importances()
            self.lookers["norm-change"].before = self.lookers["norm-change"].norms()
        return grown

    def compare(self) -> dict:
        """After training: what each adapter saves, and the correlations with it."""
        self.saved_in_the_end = saved(self.adapters, self.loss)
        return {"saved": self.saved_in_the_end, "correlations": self.correlations()}

    def correlations(self) -> dict[str, dict[str, float]]:
        """{signal: how its scores at an allocation go with what is saved then, and how their mean
        places go with what is saved in the end}."""
        in_the_end = torch.tensor([*self.saved_in_the_end.values()])
        found = {}
        for name in WATCHED:
            scores = [torch.tensor([*seen[name].values()]) for seen in self.scores_seen]
            now = []
            for i, values in self.saved_seen.items():
                now.append(spearman(scores[i], torch.tensor([*values.values()])))
            places = torch.stack([train.places(values) for values in scores]).mean(0)
            found[name] = {"now": statistics.mean(now), "end": spearman(places, in_the_end)}
        return found


@torch.no_grad()
def saved(adapters: dict[str, LoRALinear], loss: Callable[[], float]) -> dict[str, float]:
    """{name: how much the loss rises when this adapter alone is switched off}."""
    whole = loss()
    found = {}
    for name, adapter in adapters.items():
        scale, adapter.scale = adapter.scale, 0.0
        found[name] = loss() - whole
        adapter.scale = scale
    return found


def spearman(one: torch.Tensor, two: torch.Tensor) -> float:
    return train.correlation(train.places(one), train.places(two))


SIGNALS["watched"] = Watched


def measure(task: str, base: int, seed: int, options: list[str]) -> dict:
    """One silent run, as a cell."""
    path, _, _ = bases.prepare(base, bases.STEPS)
    line = ["--base", str(path), "--seed", str(seed), "--score", "watched"]
    line += ["--out", f"runs/saves-{task}-{base}-{seed}"]
    options = [*evidence.GPT_COMMON, *evidence.GPT_TASKS[task], *line, *options]
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.Run(train.parse_args(options))
        run.allocator.loss = lambda: validation_loss(run)
        run.train()
        found = run.allocator.compare()
    shutil.rmtree(run.out)
    settings = vars(run.args) | {"base": path.name}  # its folder is another one elsewhere
    return {"task": task, "base": base, "seed": seed, "settings": settings} | found


@torch.no_grad()
def validation_loss(run: train.Run) -> float:
    """Of the same few examples each time: 25 of these losses are needed at a moment."""
    run.model.eval()
    examples = run.examples["val"]
    count = 256 if run.task else 32  # a class is one target, a text many
    inputs, targets = train.batch(examples, range(min(count, len(examples))))
    loss, _, _ = train.predict(run.model, inputs, targets, run.device)
    return (loss / (targets != train.NO_TARGET).sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=["prose", "modules"])
    parser.add_argument("--bases", type=int, nargs="+", default=[0, 1, 2])
    args, options = cells.parse(parser, "saves.jsonl")
    places = [place for place in evidence.REPORTED["GPT"] if place[0] in args.bases]
    wanted = [(task, base, seed) for task in args.tasks for base, seed in places]
    ran = [(cell["task"], cell["base"], cell["seed"]) for cell in cells.read(args.results)]
    cells.work_off(args, wanted, ran, lambda *run: measure(*run, options))


if __name__ == "__main__":
    main()
