"""What evidence.jsonl says: rows, paired differences, and the declared contrasts with Holm's p."""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from plots.experiments import evidence
from plots.figures import intervals

DECLARED = [
    ("importance", "random"),
    ("worth", "LoRA"),
    ("norm", "LoRA"),
    ("ranks of worth", "ranks of worth, permuted"),
    ("worth", "ranks of worth"),
]


@dataclass
class Contrast:
    """Paired differences of the test loss, in nats, and what they say of their mean."""

    gaps: list[float]
    holm: float  # p of a paired t test, adjusted for the number of declared contrasts
    visible: float  # the mean that would have been seen in four of five such samples
    per_base: list[float]  # the mean on each base


def reported(found: list[dict], task: str, row: str) -> dict[tuple[int, int], dict]:
    """{(base, seed): cell} of a row's reported runs, once all of them have run."""
    own = [c for c in found if (c["task"], c["row"]) == (task, row) and c["test"] is not None]
    cells = {(cell["base"], cell["seed"]): cell for cell in own}
    return cells if cells.keys() == set(evidence.places_of(task, row)) else {}


def differences(found: list[dict], tasks: list[str], one: str, other: str) -> list[float]:
    """Test loss of one row minus another's, paired by base and seed; of all tasks together. None
    until all of them have run."""
    gaps = []
    for task in tasks:
        ours = reported(found, task, one)
        theirs = reported(found, task, other)
        if not ours or not theirs:
            return []
        for place in sorted(ours.keys() & theirs.keys()):
            gaps.append(ours[place]["test"]["loss"] - theirs[place]["test"]["loss"])
    return gaps


def declared(found: list[dict], tasks: list[str]) -> dict[tuple[str, str], Contrast]:
    """The declared contrasts that have run, of tasks together."""
    gaps = {pair: differences(found, tasks, *pair) for pair in DECLARED}
    gaps = {pair: values for pair, values in gaps.items() if values}
    p_values = {pair: intervals.p_value(values) for pair, values in gaps.items()}
    holm = intervals.holm(p_values, tests=len(DECLARED))
    contrasts = {}
    for pair, values in gaps.items():
        bases = {}
        places = [p for task in tasks for p in sorted(evidence.places_of(task, pair[0]))]
        for (base, _), gap in zip(places, values, strict=True):
            bases.setdefault(base, []).append(gap)
        contrasts[pair] = Contrast(
            gaps=values,
            holm=holm[pair],
            visible=intervals.smallest_visible(values),
            per_base=[statistics.mean(own) for own in bases.values()],
        )
    return contrasts
