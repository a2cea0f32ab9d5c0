"""Writes the tables and numbers of README.md and extras/RESULTS.md from the files in results/.

python -m extras.experiments.tables      # a test checks that nothing changes

A block of a page lies between <!-- NAME --> and <!-- end -->. BLOCKS has a function for each.
"""

import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from extras.experiments.run import EXPERIMENTS, RESULTS, chosen_rate, read

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "extras").glob("*.md"))]


@dataclass
class Interval:
    """The mean of paired differences, and its t-interval."""

    mean: float
    half: float  # half the width of the 95 % interval
    p: float  # of the two-sided t-test
    visible: float  # what three such tests with Holm's correction would show in 80 % of cases

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def interval(values: list[float]) -> Interval:
    """The t-interval of independent values."""
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n)
    student = stats.t(n - 1)
    mean = statistics.mean(values)
    p = 2 * student.sf(abs(mean) / error)
    visible = (student.isf(0.05 / 3 / 2) + student.isf(0.2)) * error
    return Interval(mean, student.isf(0.025) * error, p, visible)


def holm(ps: list[float]) -> list[float]:
    """The p-values after Holm's correction, in the given order."""
    corrected = [0.0] * len(ps)
    largest = 0.0
    for position, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, ps[index] * (len(ps) - position)))
        corrected[index] = largest
    return corrected


# Losses. Those of the second edition (CoLA, prose, modules) are in evidence.jsonl.

NEW_TASKS = ["MPQA", "SST-2"]
TASKS = [*NEW_TASKS, "CoLA", "prose"]


def results(name: str) -> list[dict]:
    """The lines of a file of results."""
    return read(RESULTS / f"{name}.jsonl")


def earlier(task: str) -> list[dict]:
    """The runs of the second edition on a task."""
    return [line for line in results("evidence") if line["task"] == task]


def reported(task: str, row: str) -> dict[tuple, dict]:
    """{(base, seed): result of the reported run}, with the setting that the row has chosen, or half
    its learning rate if the row is called "half-rate LoRA", for example."""
    half = row.startswith("half-rate ")
    row = row.removeprefix("half-rate ")
    if task not in NEW_TASKS:
        row = "AdaLoRA (peft)" if row == "AdaLoRA in peft" else row
        row += ", half the rate" if half else ""
        lines = [line for line in earlier(task) if line["row"] == row]
        return {(line["base"], line["seed"]): line for line in lines if line["test"]}
    lines = results(task)
    rate = chosen_rate(EXPERIMENTS[task], row, lines)
    if half:
        rate /= 2
    return {
        (0, line["seed"]): line
        for line in lines
        if (line["row"], line["rate"]) == (row, rate) and line["seed"] in EXPERIMENTS[task].seeds
    }


def tests(task: str, row: str, metric: str = "loss") -> dict[tuple, float]:
    """{(base, seed): test loss, or another metric}."""
    runs = reported(task, row)
    if task not in NEW_TASKS:
        return {key: line["test"][metric] for key, line in runs.items()}
    return {key: line[f"test_{metric}"] for key, line in runs.items()}


def differences(task: str, row: str, other: str, metric: str = "loss") -> dict[tuple, float]:
    """{(base, seed): test loss (or another metric) of a row minus that of the other row}."""
    ours, theirs = tests(task, row, metric), tests(task, other, metric)
    return {key: ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys())}


def minus_lora(task: str, row: str) -> list[float]:
    """The paired differences of a row's test losses from LoRA's, of all reported seeds. Empty if
    the row was not run on the task."""
    if row != "class frequencies":
        return [*differences(task, row, "LoRA").values()]
    if task not in NEW_TASKS:
        losses = {line["loss_of_shares"] for line in earlier(task) if "loss_of_shares" in line}
    else:
        losses = {line["frequency_loss"] for line in results(task)} - {None}
    return [loss - lora for loss in losses for lora in tests(task, "LoRA").values()]


def means_of_both(row: str, other: str) -> list[float]:
    """For each seed, the mean difference on MPQA and SST-2."""
    first, second = (differences(task, row, other) for task in NEW_TASKS)
    return [(first[key] + second[key]) / 2 for key in first]


DECLARED = [("importance", "random"), ("importance", "LoRA"), ("worth", "LoRA")]


def declared() -> dict[tuple[str, str], tuple[Interval, float]]:
    """{(row, other row): (difference, p after Holm's correction)} of the declared contrasts."""
    intervals = [interval(means_of_both(*pair)) for pair in DECLARED]
    corrected = holm([one.p for one in intervals])
    return dict(zip(DECLARED, zip(intervals, corrected, strict=True), strict=True))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# Blocks.


def differences_table(rows: list[str], tasks: list[str], metric: str) -> str:
    """LoRA's test loss (or another metric) on each task, and the differences of rows from it."""
    means = [statistics.mean(tests(task, "LoRA", metric).values()) for task in tasks]
    lines = [["**LoRA**", *(f"**{mean:.4f}**" for mean in means)]]
    for row in rows:
        own = [
            minus_lora(task, row)
            if metric == "loss"
            else [*differences(task, row, "LoRA", metric).values()]
            for task in tasks
        ]
        lines.append([f"{row} minus LoRA", *(str(interval(one)) if one else "" for one in own)])
    better = "lower" if metric == "loss" else "higher"
    return table([f"test {metric}, {better} is better", *tasks], lines)


ROWS = ["importance", "random", "worth", "full fine-tuning", "class frequencies"]


def losses_block() -> str:
    """The losses that README shows, with a caveat in the header."""
    block = differences_table(ROWS, TASKS, "loss")
    return block.replace("| CoLA |", "| CoLA (hardly learned) |", 1)


def all_losses_block() -> str:
    """The losses of all rows."""
    others = ["half-rate LoRA", "half-rate importance", "AdaLoRA in peft"]
    rows = ["importance", "random", "uniform", "worth", *others, *ROWS[3:]]
    return differences_table(rows, TASKS, "loss")


def accuracy_block() -> str:
    """The accuracies of the new tasks."""
    rows = ["importance", "random", "uniform", *ROWS[2:4]]
    return differences_table(rows, NEW_TASKS, "accuracy")


def declared_block() -> str:
    """The three declared contrasts, and what they are on each task."""
    rows = []
    for (row, other), (both, p) in declared().items():
        each = [str(interval([*differences(task, row, other).values()])) for task in NEW_TASKS]
        rows.append([f"{row} minus {other}", str(both), f"{p:.3f}", f"{both.visible:.4f}", *each])
    return table(["contrast", "mean of both", "p", "visible", *NEW_TASKS], rows)


def stability(task: str) -> Interval:
    """What four times the learning rate costs growth by the importance, minus LoRA's cost."""
    costs = {}
    for row in ("importance", "LoRA"):
        higher, chosen = tests(task, f"{row}, 4 times the rate"), tests(task, row)
        costs[row] = {key: higher[key] - chosen[key] for key in higher}
    return interval([costs["importance"][key] - costs["LoRA"][key] for key in costs["LoRA"]])


def stability_block() -> str:
    """What four times the learning rate costs."""
    rows = []
    for row in ("LoRA", "importance"):
        cells = []
        for task in TASKS[2:]:
            gaps = differences(task, f"{row}, 4 times the rate", row)
            cells.append(str(interval([*gaps.values()])))
        rows.append([row, *cells])
    rows.append(["importance minus LoRA", *(str(stability(task)) for task in TASKS[2:])])
    return table(["four times the learning rate", *TASKS[2:]], rows)


def step_costs(variant: str, other: str) -> list[float]:
    """For each size of the model, the median step time of a variant divided by another's."""
    ratios = [line["ratios"] for line in results("step_cost")]
    return [own[variant][1] / own[other][1] for own in ratios]


def cost_block() -> str:
    """What a step costs, in units of LoRA's step."""
    rows = []
    for line in results("step_cost"):
        cells = [f"{line['width']}, {line['layers']} layers", f"{line['tokens']:,}"]
        for variant, (low, median, high) in line["ratios"].items():
            cells.append("1" if variant == "LoRA" else f"{median:.2f} ({low:.2f} to {high:.2f})")
        rows.append([*cells, f"{line['seconds']:.2f}"])
    header = ["width", "tokens", *line["ratios"], "seconds of LoRA's step"]
    return table(header, rows)


def claims_block() -> str:
    """The paper's five claims, the verdict, and what was measured."""
    both = {}
    for (row, other), (one, p) in declared().items():
        both[row, other] = f"MPQA and SST-2 {one} (p = {p:.3f})"
    texts = [
        f"{task} {interval([*differences(task, 'importance', 'random').values()])}"
        for task in TASKS[2:]
    ]
    measured = [
        f"importance minus LoRA: {both['importance', 'LoRA']}",
        f"importance minus random: {both['importance', 'random']}, {', '.join(texts)}",
    ]
    texts = [f"{row} minus linear {choices()[f'{row} schedule'][0]}" for row in OTHER_SCHEDULES]
    measured.append(f"prose, rates not tuned: {', '.join(texts)}")
    rise = "rise of the loss at four times the learning rate, importance minus LoRA"
    measured.append(f"{rise}: CoLA {stability('CoLA')}, prose {stability('prose')}")
    texts = []
    for other in ("LoRA", "AdaLoRA in peft"):
        costs = step_costs("TriAdaptLoRA", other)
        texts.append(f"{min(costs):.2f} to {max(costs):.2f} times {other}")
    measured.append(f"time of a step on CPU: {', '.join(texts)}")
    rows = [[*claim, text] for claim, text in zip(CLAIMS.items(), measured, strict=True)]
    return table(["claim", "here", "measured"], rows)


def findings_block() -> str:
    """README's two tables."""
    return f"{claims_block()}\n\n{losses_block()}"


OTHER_SCHEDULES = ["exponential", "fixed"]
# The verdicts were written by hand when the results were known.
CLAIMS = {
    "better than other methods": "not seen",
    "the importance finds where rank is needed": "not seen",
    "linear is the best schedule": "not seen, hardly tested",
    "more stable": "perhaps, on prose",
    "cheaper": "than AdaLoRA, not than LoRA",
}


def pace_differences(allocator: str) -> dict[int, list[float]]:
    """{steps between allocations: paired differences of the test loss from LoRA's}."""
    losses = {}
    for line in results("pace"):
        losses.setdefault(line["row"], {})[line["seed"]] = line["test_loss"]
    return {
        int(row.rpartition(" ")[2]): [own[seed] - losses["LoRA"][seed] for seed in sorted(own)]
        for row, own in losses.items()
        if row.startswith(f"{allocator}, every ")
    }


def pace_block() -> str:
    """What the pace of growth costs."""
    rows = []
    for steps in pace_differences("random"):
        ends = [
            line["last_growth"] for line in results("pace") if line["row"].endswith(f" {steps}")
        ]
        cells = [str(interval(pace_differences(name)[steps])) for name in ("importance", "random")]
        rows.append([str(steps), f"{statistics.mean(ends):.0f}", *cells])
    last = ["20 minus 1", ""]
    for name in ("importance", "random"):
        paces = pace_differences(name)
        values = [slow - fast for slow, fast in zip(paces[20], paces[1], strict=True)]
        last.append(str(interval(values)))
    header = ["steps between allocations", "end of growth, mean step", "importance", "random"]
    return table(header, [*rows, last])


# Rows of ablations.jsonl that RELEASED.md shows, under plainer names.
CHOICES = {
    "no growth": "initial rank 8, no growth",
    "exponential schedule": "exponential schedule",
    "fixed schedule": "fixed schedule",
    "longer growth": "interval 10",
    "alpha / r": "scale alpha / current rank",
    "random core": "random core",
    "old baseline": "baseline before growth",
    "zero new moments": "new moments zero",
    "recipe of _single": "released: single",
    "recipe of _block_c0": "released: block-c0",
    "recipe of _block_cb0": "released: block-cb0",
    "recipe of _block_abc0": "released: block-abc0",
    "recipe of triadaptlora.py": "released: eye",
}


def choices() -> dict[str, tuple[Interval, float]]:
    """{row of ablations.jsonl: (its difference from its reference, p after Holm's correction)}."""
    losses = {}
    for line in results("ablations"):
        losses.setdefault(line["row"], {})[line["seed"]] = line["test"]
    intervals = {}
    for row in losses.keys() - {"reference"}:
        reference = row.rpartition(", ")[0]  # "beta2 .999, new moments zero" changes one thing more
        reference = reference if reference in losses else "reference"
        seeds = losses[row].keys() & losses[reference].keys()
        values = [losses[row][seed] - losses[reference][seed] for seed in sorted(seeds)]
        intervals[row] = interval(values)
    corrected = holm([one.p for one in intervals.values()])
    return dict(zip(intervals, zip(intervals.values(), corrected, strict=True), strict=True))


def choices_block() -> str:
    """What each choice is worth."""
    lines = [line for line in results("ablations") if line["row"] == "reference"]
    base, test = (statistics.mean(line[key] for line in lines) for key in ("base", "test"))
    known = choices()
    rows = []
    for name, row in CHOICES.items():
        one, p = known[row]
        rows.append([name, f"**{one}**" if p < 0.05 else str(one)])
    reference = (
        f"The reference went from {base:.2f} to {test:.4f} nats per token, on {len(lines)} seeds. "
        f"**Bold** means p < .05 after Holm's correction over all {len(known)} changes tried."
    )
    return f"{reference}\n\n{table(['change', 'test loss minus that of the reference'], rows)}"


BLOCKS = {
    "claims": claims_block,
    "choices": choices_block,
    "cost": cost_block,
    "all losses": all_losses_block,
    "declared": declared_block,
    "findings": findings_block,
    "accuracy": accuracy_block,
    "stability": stability_block,
    "pace": pace_block,
}


def fill(page: str) -> str:
    """The page with its blocks written anew."""
    for name, write in BLOCKS.items():
        pattern = rf"<!-- {name} -->.*?<!-- end -->"
        if re.search(pattern, page, re.DOTALL):
            block = f"<!-- {name} -->\n{write()}\n<!-- end -->"
            page = re.sub(pattern, lambda match, block=block: block, page, flags=re.DOTALL)
    return page


def main() -> None:
    for path in PAGES:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
