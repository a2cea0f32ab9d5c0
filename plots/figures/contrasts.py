"""What evidence.jsonl says: rows, paired differences, and the declared contrasts with Holm's p."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from plots.experiments import evidence
from plots.figures import intervals

PLACES = ("ranks of worth", "ranks of worth, permuted")  # does it matter where the rank goes?
DECLARED = [
    ("importance", "random"),
    ("worth", "LoRA"),
    ("norm", "LoRA"),
    PLACES,
    ("worth", "ranks of worth"),
]
# Declared later, of new seeds: a family of its own.
LATER = [
    ("worth at half the rate again", "LoRA again"),
    ("worth at half the rate again", "LoRA at half the rate again"),
    ("worth at half the rate again", "uniform again"),
]
# Described, not tested: is it worth's doing, and does growth itself pay?
IN_PLACE = [("worth at half the rate again", row) for row in evidence.IN_PLACE]
GROWTH_ALONE = ("uniform", "core, no growth")
GROWTH_AT_HALF = ("worth, half the rate", "ranks of worth")
DESCRIBED = [*IN_PLACE, GROWTH_ALONE, GROWTH_AT_HALF]

REAL_TASKS = ["CoLA", "SST-2"]  # together they are the primary result
TASKS = [*REAL_TASKS, *evidence.GPT_TASKS]

What = tuple[str, str]  # split and score
LOSS = ("test", "loss")


@dataclass
class Contrast:
    """A declared contrast: paired differences of the test loss, in nats, and what they say."""

    gaps: list[float]
    holm: float  # p of a paired t test, adjusted for the number of contrasts declared with it
    visible: float  # the mean that would have been clear, so adjusted, in four of five such samples


def reported(found: list[dict], task: str, row: str) -> dict[tuple[int, int], dict]:
    """{(base, seed): cell} of a row's reported runs, once all of them have run. Those with another
    setting than the last one are of an earlier selection."""
    own = [c for c in found if (c["task"], c["row"]) == (task, row) and c["test"] is not None]
    cells = {}
    for cell in own:
        if all(cell[key] == own[-1][key] for key in ("rate", "second")):
            cells[cell["base"], cell["seed"]] = cell
    return cells if cells.keys() == set(evidence.places_of(task, row)) else {}


def reported_tasks(found: list[dict]) -> list[str]:
    """The tasks of which LoRA and another row have reported runs."""
    others = [row for row in evidence.ROWS if row != "LoRA"]
    return [t for t in TASKS if any(differences(found, [t], row, "LoRA") for row in others)]


def paired(
    found: list[dict], tasks: list[str], one: str, other: str, what: What = LOSS
) -> dict[tuple[str, int, int], float]:
    """{(task, base, seed): a row's test loss, or what else, minus another's}; empty until all have
    run."""
    split, score = what
    gaps = {}
    for task in tasks:
        ours = reported(found, task, one)
        theirs = reported(found, task, other)
        if not ours or not theirs:
            return {}
        for base, seed in sorted(ours.keys() & theirs.keys()):
            place = (base, seed)
            gaps[task, base, seed] = ours[place][split][score] - theirs[place][split][score]
    return gaps


def differences(
    found: list[dict], tasks: list[str], one: str, other: str, what: What = LOSS
) -> list[float]:
    """The same without places."""
    return list(paired(found, tasks, one, other, what).values())


def declared(
    found: list[dict], family: list[tuple[str, str]] = DECLARED
) -> dict[tuple[str, str], Contrast]:
    """The contrasts declared together that have run, of the real model's tasks together."""
    gaps = {pair: differences(found, REAL_TASKS, *pair) for pair in family}
    gaps = {pair: values for pair, values in gaps.items() if values}
    tests = len(family)
    holm = intervals.holm({p: intervals.p_value(values) for p, values in gaps.items()}, tests)
    contrasts = {}
    for pair, values in gaps.items():
        visible = intervals.smallest_visible(values, tests)
        contrasts[pair] = Contrast(values, holm[pair], visible)
    return contrasts
