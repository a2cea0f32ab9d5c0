"""The tables of evidence.jsonl: rows, and the declared contrasts with Holm's correction.

python plots/figures/contrasts.py prose modules      # prints them; of MiniLM: CoLA SST-2
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from plots.experiments import cells, evidence
from plots.figures import intervals
from plots.figures.tables import table

CONTRASTS = [
    ("importance", "random"),
    ("worth", "LoRA"),
    ("norm", "LoRA"),
    ("ranks of worth", "ranks of worth, permuted"),
    ("worth", "ranks of worth"),
]


def test_losses(found: list[dict], task: str, row: str) -> dict[tuple[int, int], float]:
    """{(base, seed): test loss} of a row's reported runs."""
    losses = {}
    for cell in found:
        if (cell["task"], cell["row"]) == (task, row) and cell["test"] is not None:
            losses[cell["base"], cell["seed"]] = cell["test"]["loss"]
    return losses


def differences(found: list[dict], tasks: list[str], one: str, other: str) -> list[float]:
    """One row minus another, paired by base and seed; those of all tasks together."""
    gaps = []
    for task in tasks:
        ours = test_losses(found, task, one)
        theirs = test_losses(found, task, other)
        gaps += [ours[place] - theirs[place] for place in sorted(ours.keys() & theirs.keys())]
    return gaps


def contrast_table(found: list[dict], tasks: list[str]) -> str:
    """The declared contrasts of tasks together. Holm's p below .05 is clear of zero."""
    gaps = {pair: differences(found, tasks, *pair) for pair in CONTRASTS}
    gaps = {pair: values for pair, values in gaps.items() if len(values) >= intervals.FEWEST}
    adjusted = intervals.holm({pair: intervals.p_value(values) for pair, values in gaps.items()})
    lines = []
    for pair, values in gaps.items():
        mean = f"{statistics.mean(values):+.4f} ± {intervals.half_width(values):.4f}"
        lines.append(
            [
                " minus ".join(pair),
                str(len(values)),
                f"**{mean}**" if adjusted[pair] < 0.05 else mean,
                f"{intervals.p_value(values):.4f}",
                f"{adjusted[pair]:.4f}",
                f"{intervals.smallest_visible(values):.4f}",
            ]
        )
    return table(["contrast", "pairs", "difference, 95 %", "p", "Holm", "could have seen"], lines)


def row_table(found: list[dict], task: str) -> str:
    """Each row: its chosen setting, test loss and other scores, numbers trained at most."""
    lines = []
    for row in evidence.ROWS:
        own = [c for c in found if (c["task"], c["row"]) == (task, row) and c["test"] is not None]
        if not own:
            continue
        scores = []
        for name in own[0]["test"]:
            values = [cell["test"][name] for cell in own]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            scores.append(f"{name} {statistics.mean(values):.4f}{spread}")
        setting = f"{own[0]['rate']:g}, {own[0]['second']:g}"
        most = f"{max(cell['trainable'] for cell in own):,}"
        lines.append([row, str(len(own)), setting, ", ".join(scores), most])
    return table(
        ["row", "runs", "rate, second setting", "test, mean ± deviation", "numbers"], lines
    )


def main() -> None:
    tasks = sys.argv[1:]
    if not tasks:
        raise SystemExit("usage: python plots/figures/contrasts.py TASK ...")
    found = cells.read(cells.RESULTS / "evidence.jsonl")
    for task in tasks:
        print(f"{task}\n\n{row_table(found, task)}\n\n{contrast_table(found, [task])}\n")
    if len(tasks) > 1:
        print(f"all together\n\n{contrast_table(found, tasks)}")


if __name__ == "__main__":
    main()
