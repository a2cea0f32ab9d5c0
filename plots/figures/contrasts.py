"""What evidence.jsonl says: rows, paired differences, and the declared contrasts with Holm's p."""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
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
    mean: float
    half: float  # half the width of its 95 % interval
    p: float  # of a paired t test
    holm: float  # p, adjusted for the number of declared contrasts
    visible: float  # the mean that would have been seen in four of five such samples


def reported(found: list[dict], task: str, row: str) -> dict[tuple[int, int], dict]:
    """{(base, seed): cell} of a row's reported runs."""
    own = [c for c in found if (c["task"], c["row"]) == (task, row) and c["test"] is not None]
    return {(cell["base"], cell["seed"]): cell for cell in own}


def differences(found: list[dict], tasks: list[str], one: str, other: str) -> list[float]:
    """Test loss of one row minus another's, paired by base and seed; of all tasks together."""
    gaps = []
    for task in tasks:
        ours = reported(found, task, one)
        theirs = reported(found, task, other)
        for place in sorted(ours.keys() & theirs.keys()):
            gaps.append(ours[place]["test"]["loss"] - theirs[place]["test"]["loss"])
    return gaps


def declared(found: list[dict], tasks: list[str]) -> dict[tuple[str, str], Contrast]:
    """The declared contrasts that have run, of tasks together."""
    gaps = {pair: differences(found, tasks, *pair) for pair in DECLARED}
    gaps = {pair: values for pair, values in gaps.items() if len(values) >= intervals.FEWEST}
    p = {pair: intervals.p_value(values) for pair, values in gaps.items()}
    holm = intervals.holm(p)
    contrasts = {}
    for pair, values in gaps.items():
        contrasts[pair] = Contrast(
            gaps=values,
            mean=statistics.mean(values),
            half=intervals.half_width(values),
            p=p[pair],
            holm=holm[pair],
            visible=intervals.smallest_visible(values),
        )
    return contrasts
