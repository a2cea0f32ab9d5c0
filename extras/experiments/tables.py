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
    visible: (
        float  # a difference that three such tests with Holm's correction show in 80 % of cases
    )

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


# Losses. Results of the second edition are in evidence.jsonl.

OLD_TASKS = ["CoLA", "SST-2", "prose", "modules"]
TASKS = OLD_TASKS


def results(name: str) -> list[dict]:
    """The lines of a file of results."""
    return read(RESULTS / f"{name}.jsonl")


def reported(task: str, row: str) -> dict[tuple, dict]:
    """{(base, seed): result of the reported run}, with the setting that the row has chosen."""
    if task in OLD_TASKS:
        lines = [line for line in results("evidence") if (line["task"], line["row"]) == (task, row)]
        return {(line["base"], line["seed"]): line for line in lines if line["test"]}
    lines = results(task)
    rate = chosen_rate(EXPERIMENTS[task], row, lines)
    return {
        (0, line["seed"]): line
        for line in lines
        if (line["row"], line["rate"]) == (row, rate) and line["seed"] in EXPERIMENTS[task].seeds
    }


def tests(task: str, row: str, metric: str = "loss") -> dict[tuple, float]:
    """{(base, seed): test loss, or another metric}."""
    runs = reported(task, row)
    if task in OLD_TASKS:
        return {key: line["test"][metric] for key, line in runs.items()}
    return {key: line[f"test_{metric}"] for key, line in runs.items()}


def differences(task: str, row: str, other: str, metric: str = "loss") -> dict[tuple, float]:
    """{(base, seed): test loss (or another metric) of a row minus that of the other row}."""
    ours, theirs = tests(task, row, metric), tests(task, other, metric)
    return {key: ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys())}


def minus_lora(task: str, row: str) -> list[float]:
    """The paired differences of a row's test losses from LoRA's, of all reported seeds."""
    if row == "class frequencies":
        return frequencies_minus_lora(task)
    return [*differences(task, row, "LoRA").values()]


def frequencies_minus_lora(task: str) -> list[float]:
    """The loss of a prediction from the class frequencies alone, minus LoRA's. None for prose."""
    if task in OLD_TASKS:
        known = [line for line in results("evidence") if line["task"] == task]
        losses = {line["loss_of_shares"] for line in known if "loss_of_shares" in line}
    else:
        losses = {line["frequency_loss"] for line in results(task)} - {None}
    return [loss - lora for loss in losses for lora in tests(task, "LoRA").values()]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# Blocks.


def losses_block() -> str:
    """LoRA's test loss on four tasks, and the differences of other rows from it."""
    losses = [statistics.mean(tests(task, "LoRA").values()) for task in TASKS]
    rows = [["**LoRA**", *(f"**{loss:.4f}**" for loss in losses)]]
    for row in ["importance", "random", "worth", "full fine-tuning", "class frequencies"]:
        differences_of_tasks = [minus_lora(task, row) for task in TASKS]
        cells = [str(interval(values)) if values else "" for values in differences_of_tasks]
        rows.append([f"{row} minus LoRA", *cells])
    return table(["test loss", *TASKS], rows)


def accuracy_block() -> str:
    """The same of the accuracy, for tasks with classes."""
    tasks = [task for task in TASKS if task != "prose"]
    means = [statistics.mean(tests(task, "LoRA", "accuracy").values()) for task in tasks]
    rows = [["**LoRA**", *(f"**{mean:.4f}**" for mean in means)]]
    for row in ["importance", "random", "worth", "full fine-tuning"]:
        values = [differences(task, row, "LoRA", "accuracy").values() for task in tasks]
        rows.append([f"{row} minus LoRA", *(str(interval([*own])) for own in values)])
    return table(["accuracy", *tasks], rows)


def rates_block() -> str:
    """The settings that each row has chosen."""
    rows = []
    for row in ["LoRA", "importance", "random", "worth"]:
        cells = []
        for task in TASKS:
            line = [*reported(task, row).values()][-1]
            what = "alpha" if row == "LoRA" else "core"
            cells.append(f"{line['rate']:g}, {what} {line['second']:g}")
        rows.append([row, *cells])
    return table(["learning rate", *TASKS], rows)


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
        for task in TASKS:
            gaps = differences(task, f"{row}, 4 times the rate", row)
            cells.append(str(interval([*gaps.values()])))
        rows.append([row, *cells])
    rows.append(["importance minus LoRA", *(str(stability(task)) for task in TASKS)])
    return table(["four times the learning rate", *TASKS], rows)


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
    measured = []
    for other in ("LoRA", "random"):
        values = {task: differences(task, "importance", other).values() for task in TASKS}
        texts = [f"{task} {interval([*own])}" for task, own in values.items()]
        measured.append(f"importance minus {other}: {', '.join(texts)}")
    texts = [f"{row} minus linear {choices()[f'{row} schedule'][0]}" for row in OTHER_SCHEDULES]
    measured.append(f"prose, from a weaker base, rates not tuned: {', '.join(texts)}")
    texts = [f"{task} {stability(task)}" for task in ("prose", "modules")]
    rise = "rise of the loss at four times the learning rate, importance minus LoRA"
    measured.append(f"{rise}: {', '.join(texts)}")
    texts = []
    for other in ("LoRA", "AdaLoRA in peft"):
        costs = step_costs("TriAdaptLoRA", other)
        texts.append(f"{min(costs):.2f} to {max(costs):.2f} times that of {other}")
    measured.append(f"time of a step on two CPU cores: {', '.join(texts)}")
    rows = [[*claim, text] for claim, text in zip(CLAIMS.items(), measured, strict=True)]
    return table(["claim", "here", "measured"], rows)


OTHER_SCHEDULES = ["exponential", "fixed"]
# The verdicts were written by hand when the results were known.
CLAIMS = {
    "better than other methods": "not seen",
    "the importance finds where rank is needed": "not seen",
    "linear is the best schedule": "not seen, hardly tested",
    "more stable": "perhaps, on our GPT",
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
    "losses": losses_block,
    "accuracy": accuracy_block,
    "rates": rates_block,
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
