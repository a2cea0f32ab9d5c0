"""Write the tables of README.md, plots/RESULTS.md and plots/BENCH.md from plots/results/.

    python plots/figures/tables.py            # so does draw.py, after all figures

A table stands between two marker lines of its page; all else on the page is written by hand.
"""

import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import train
from plots.experiments import cells
from plots.figures.intervals import (
    Rows,
    better_sign,
    clear_side,
    half_width,
    metric_of,
    paired,
    per_task,
    results_of,
    shared_seeds,
)

PAGES = [ROOT / "README.md", ROOT / "plots" / "RESULTS.md", ROOT / "plots" / "BENCH.md"]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_deviation(values: list[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def difference(gaps: list[float]) -> str:
    """Mean and half width of the 95 % interval, bold if the interval is clear of zero."""
    if not gaps:
        return "–"
    text = f"{statistics.mean(gaps):+.4f}"
    if half_width(gaps) == half_width(gaps):  # not nan
        text += f" ± {half_width(gaps):.4f}"
    return f"**{text}**" if clear_side(gaps) else text


# README.md.

# What the paper says, and where it is: file, and function, class, method or table. A test is given
# by the beginning of its name.
PAPER = {
    "y = W x + b + s B (L + U) A x": [
        "triadapt.py LoRALinear.forward",
        "triadapt.py TriAdaptLinear.factors",
    ],
    "the triangular split L + U, and how it is packed": [
        "triadapt.py TriAdaptLinear.core",
        "triadapt.py unpack_triangle",
    ],
    "the start, and growth: a column of B, a row of L, a column of U, a row of A": [
        "triadapt.py TriAdaptLinear.new_entries",
        "triadapt.py LoRALinear.grow",
    ],
    "Adam's state at growth": ["triadapt.py carry_state"],
    "r (d_in + d_out) + r (r + 1) trained numbers": ["test_triadapt.py test_trained_parameters"],
    "importance F = ‖L + U‖_F / r, the normalised Frobenius norm; score, the change of F": [
        "triadapt.py TriAdaptLinear.importance",
        "triadapt.py RankAllocator.scores",
    ],
    "dynamic threshold: k = ⌊Q m⌋, ⌊exp(m ln Q)⌋ or a constant; the k-th largest score": [
        "triadapt.py SCHEDULES",
        "triadapt.py RankAllocator.count",
        "triadapt.py RankAllocator.step",
    ],
    "growth in the training loop: between two optimiser steps": ["train.py Run.train"],
}


def paper_table() -> str:
    """The paper's equations in reading order, with links to the lines that compute them."""
    rows = []
    for what, places in PAPER.items():
        links = [link_to(*place.split()) for place in places]
        rows.append([what, ", ".join(links)])
    return table(["paper", "code"], rows)


def link_to(file: str, name: str) -> str:
    """A link to the line where a name is defined; of Class.method, below the class."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    number = 0
    for part in name.split("."):
        more = r"\w*" if part.startswith("test_") else ""
        pattern = re.compile(rf" *((def|class) ({part}{more})\b)|{part} = ")
        while number < len(lines) and not pattern.match(lines[number]):
            number += 1
        if number == len(lines):
            raise LookupError(f"{file} has no {name}: change PAPER in plots/figures/tables.py")
    shown = name
    if name.startswith("test_"):
        shown = pattern.match(lines[number]).group(3)
    return f"[`{shown}`]({file}#L{number + 1})"


def first_run() -> str:
    """What the main command says, in a few lines of the committed run's log."""
    log = cells.read(cells.RESULTS / "first_run" / "log.jsonl")
    first, last = log[0], log[-1]
    grown = [i for i, entry in enumerate(log) if entry["kind"] == "allocation"]
    evals = [i for i, entry in enumerate(log) if entry["kind"] == "eval"]
    start = train.in_words(log[:1]).splitlines()
    lines = [line for line in start if line.startswith(("adapted", "growth", "base"))]
    for i in (grown[0], grown[-1], evals[-1]):
        lines.append(train.in_words(log[: i + 1]))
    shown = "\n".join(f"    {line}" for line in lines)
    return (
        f"{shown}\nExpect a test loss of {first['test_loss']:.2f} nats per token before adapting "
        f"and {last['test_loss']:.2f} after, with a total rank that grows from "
        f"{first['total_rank']} to {last['total_rank']}."
    )


BEST = "linear, worth, equal numbers, slow core, from rank 2"
FOUND = {  # how README calls a row: its name in compare.jsonl
    "full fine-tuning": "full fine-tuning",
    "LoRA": "LoRA",
    "TriAdaptLoRA's core at its full rank, no growth": "core, no growth",
    "growth by the paper's importance": "linear",
    "growth at random": "linear, random",
    "growth by `worth`, LoRA's numbers, slow core, from rank 2": BEST,
}


def found_table() -> str:
    """The rows of README's section on what was found."""
    tasks = per_task(cells.read(cells.RESULTS / "compare.jsonl"))
    head = [f"{task}, {metric_of(rows)}" for task, rows in tasks.items()]
    lines = []
    for label, row in FOUND.items():
        seeds = {len(shared_seeds(rows, row)) for rows in tasks.values()}
        shown = [difference(paired(rows, row)) for rows in tasks.values()]
        if row == "LoRA":
            seeds = seed_counts(tasks, FOUND.values())
            shown = [levels_of_lora(rows, FOUND.values()) for rows in tasks.values()]
        lines.append([label, ", ".join(map(str, sorted(seeds))), *shown])
    return table(["", "seeds", *head], lines)


# What is said of LoRA itself: its mean over just those seeds that other rows are paired with.


def seed_counts(tasks: dict[str, Rows], names) -> set[int]:
    counts = {len(shared_seeds(rows, row)) for rows in tasks.values() for row in names}
    return counts - {0}


def levels_of_lora(rows: Rows, names) -> str:
    """LoRA's mean over the seeds of each other row, one for each number of seeds."""
    levels = {}
    for row in names:
        seeds = shared_seeds(rows, row)
        if row != "LoRA" and seeds:
            levels[len(seeds)] = statistics.mean(results_of(rows, "LoRA", seeds))
    return ", ".join(f"{levels[n]:.4f}" for n in sorted(levels))


# plots/RESULTS.md.

SUMMARY = {  # what comparable rows share: their names in compare.jsonl
    "references": ["LoRA", "full fine-tuning", "AdaLoRA (peft)"],
    "at equal total rank": [
        "core, no growth",
        "linear",
        "exponential",
        "fixed",
        "linear, random",
        "linear, uniform",
        "linear, sensitivity",
        "linear, worth",
    ],
    "with no more numbers than LoRA": [
        "linear, importance, equal numbers",
        "linear, random, equal numbers",
        "linear, uniform, equal numbers",
        "linear, sensitivity, equal numbers",
        "linear, worth, equal numbers",
    ],
    "the same, the core at a tenth of the learning rate": [
        "core, no growth, slow core",
        "linear, importance, equal numbers, slow core",
        "linear, random, equal numbers, slow core",
        "linear, uniform, equal numbers, slow core",
        "linear, worth, equal numbers, slow core",
    ],
    "and from rank 2": [
        "linear, random, equal numbers, slow core, from rank 2",
        "linear, uniform, equal numbers, slow core, from rank 2",
        "linear, worth, equal numbers, slow core, from rank 2",
    ],
}


def summary_table() -> str:
    """compare.jsonl in one table: each row's paired difference to LoRA on each task."""
    tasks = per_task(cells.read(cells.RESULTS / "compare.jsonl"))
    names = [row for group in SUMMARY.values() for row in group]
    lines = []
    for group, members in SUMMARY.items():
        lines.append([f"*{group}*"] + [""] * (len(tasks) + 1))
        for row in members:
            # The group says what the end of the name says.
            name = re.sub("(, (equal numbers|slow core|from rank 2))+$", "", row)
            seeds = {len(shared_seeds(rows, row)) for rows in tasks.values()}
            shown = [summary_entry(rows, row) for rows in tasks.values()]
            if row == "LoRA":
                seeds = seed_counts(tasks, names)
                shown = [f"({levels_of_lora(rows, names)})" for rows in tasks.values()]
            lines.append([name, ", ".join(map(str, sorted(seeds))), *shown])
    head = [f"{task}, {metric_of(rows)}" for task, rows in tasks.items()]
    return (
        "Test loss in nats per token, test accuracy on `modules`: minus LoRA's, paired by seed, "
        "mean ± 95 % interval by Student's t, and in brackets the row's own mean over these seeds. "
        "**Bold**: the interval is clear of zero. LoRA's row has its means over as many seeds. "
        "Each row's learning rate was chosen on validation, on seed 0.\n\n"
        + table(["", "seeds", *head], lines)
    )


def summary_entry(rows: Rows, row: str) -> str:
    seeds = shared_seeds(rows, row)
    if not seeds:
        return "–"
    mean = statistics.mean(results_of(rows, row, seeds))
    return f"{difference(paired(rows, row))} ({mean:.4f})"


def compare_tables(file: str) -> str:
    """A table per task: result, paired difference to LoRA over the same seeds, and the costs."""
    parts = []
    for task, rows in per_task(cells.read(cells.RESULTS / file)).items():
        metric = metric_of(rows)
        sign = better_sign(rows)
        direction = "higher is better" if sign > 0 else "lower is better"
        before = next(iter(rows["LoRA"].values()))["before"][metric]
        order = sorted(rows, key=lambda row: -sign * mean_result(rows, row))
        head = [
            "",
            "seeds",
            f"test {metric}",
            "LoRA, the same seeds",
            "minus LoRA, paired, 95 %",
            "at the step best on validation",
            "learning rate",
            "trainable: first, peak, mean, last",
            "forgetting",
            "seconds",
            "file, kB",
        ]
        parts.append(
            f"**{task}**: test {metric} ({direction}; {before:.3f} before adapting)\n\n"
            + table(head, [compare_line(rows, row) for row in order])
            + "\n"
        )
    return "\n".join(parts)


def mean_result(rows: Rows, row: str) -> float:
    return statistics.mean(results_of(rows, row, shared_seeds(rows, row)))


def compare_line(rows: Rows, row: str) -> list[str]:
    metric = metric_of(rows)
    seeds = shared_seeds(rows, row)
    runs = [rows[row][seed] for seed in seeds]
    lora = f"{statistics.mean(results_of(rows, 'LoRA', seeds)):.4f}"
    gap = difference(paired(rows, row))
    if row == "LoRA":
        lora = gap = ""
    numbers = []
    for when in ("initial", "peak", "mean", "final"):
        numbers.append(f"{statistics.mean(run['trainable'][when] for run in runs):,.0f}")
    return [
        row,
        str(len(seeds)),
        mean_and_deviation(results_of(rows, row, seeds), 4),
        lora,
        gap,
        f"{statistics.mean(run['best_test'][metric] for run in runs):.4f}",
        f"{runs[0]['rate']:g}",
        ", ".join(numbers),
        f"{statistics.mean(run['forgetting'] for run in runs):.2f}",
        f"{statistics.median(run['seconds'] for run in runs):.0f}",
        f"{statistics.median(run['file_bytes'] for run in runs) / 1000:.0f}",
    ]


def rates_table(file: str) -> str:
    """The test loss of seed 0 at each learning rate: rows may differ by their rates alone."""
    first = [cell for cell in cells.read(cells.RESULTS / file) if cell["seed"] == 0]
    rates = sorted({cell["rate"] for cell in first})
    lines = []
    for row in dict.fromkeys(cell["row"] for cell in first):
        losses = {cell["rate"]: cell["test"]["loss"] for cell in first if cell["row"] == row}
        lines.append([row] + [f"{losses[rate]:.4f}" if rate in losses else "–" for rate in rates])
    head = ["", *(f"{rate:g}" for rate in rates)]
    return f"Seed 0, test loss at each learning rate:\n\n{table(head, lines)}"


def long_runs() -> str:
    return f"{compare_tables('low_data_600.jsonl')}\n{rates_table('low_data_600.jsonl')}"


def defaults_table() -> str:
    """defaults.jsonl: each method at its best learning rate, and each way to grow."""
    runs = cells.read(cells.RESULTS / "defaults.jsonl")
    first = {cell["row"]: cell["val_loss"] for cell in runs if cell["seed"] == 0}
    best = {}  # method: its row with the best learning rate, by the validation loss of seed 0
    for row in first:
        method = row.partition(", lr ")[0]
        if method not in best or first[row] < first[best[method]]:
            best[method] = row
    chosen = {}  # method: {seed: cell}
    for method, row in best.items():
        chosen[method] = {cell["seed"]: cell for cell in runs if cell["row"] == row}

    lines = []
    for method, own in chosen.items():
        lora = chosen.get("LoRA", {})
        losses = [cell["test_loss"] for cell in own.values()]
        gaps = [own[s]["test_loss"] - lora[s]["test_loss"] for s in sorted(own.keys() & lora)]
        trained = statistics.mean(cell["trainable"] for cell in own.values())
        lines.append(
            [
                method,
                mean_and_deviation(losses, 3),
                "" if method == "LoRA" else difference(gaps),
                f"{own[0]['settings']['lr']:g}",
                f"{round(trained):,}",
                str(max(cell["spent_at"] for cell in own.values()) or "–"),
            ]
        )
    head = [
        *("", "test loss", "minus LoRA, paired, 95 %", "learning rate"),
        *("trainable at the end", "budget spent at step"),
    ]
    return (
        "Test loss on prose in nats per token, mean ± standard deviation of "
        f"{min(len(own) for own in chosen.values())} seeds; the base has "
        f"{runs[0]['base_loss']:.3f}. The learning rate of each method is the one of lowest "
        "validation loss on seed 0, from the grid in plots/experiments/defaults.py; rows that "
        f"differ in growth alone share one rate.\n\n{table(head, lines)}"
    )


def ablations_table() -> str:
    """ablations.jsonl: the test loss of each row, and its paired difference to the reference."""
    rows = {}
    for cell in cells.read(cells.RESULTS / "ablations.jsonl"):
        rows.setdefault(cell["row"], {})[cell["seed"]] = cell
    reference = rows["reference"]
    lines = []
    for row in sorted(rows, key=lambda row: "worth" in row):  # those last
        runs = rows[row]
        seeds = sorted(runs.keys() & reference.keys())
        gaps = [runs[seed]["test"] - reference[seed]["test"] for seed in seeds]
        jump = statistics.mean(cell["jump"] or 0 for cell in runs.values())
        lines.append(
            [
                row,
                str(len(seeds)),
                mean_and_deviation([runs[seed]["test"] for seed in seeds], 4),
                "" if row == "reference" else difference(gaps),
                str(max(cell["spent_at"] for cell in runs.values()) or "–"),
                f"{jump:.1%}",
            ]
        )
    head = [
        *("", "seeds", "test loss", "minus reference, paired, 95 %", "budget spent at step"),
        "change of the logits at the first growth",
    ]
    base = next(iter(reference.values()))["base"]
    said = f"Test loss on prose in nats per token; the base has {base:.3f}."
    return f"{said}\n\n{table(head, lines)}"


def moments_table() -> str:
    """moments.jsonl: rules for the second moments of new entries, against the paced ones."""
    losses = {}  # setting: {rule: {seed: test loss}}
    for cell in cells.read(cells.RESULTS / "moments.jsonl"):
        start, _, setting = cell["row"].partition(", ")
        rules = losses.setdefault(setting, {})
        rules.setdefault(start.removeprefix("moments "), {})[cell["seed"]] = cell["test"]
    lines = []
    for setting, rules in losses.items():
        line = [
            setting,
            str(len(rules["paced"])),
            mean_and_deviation([*rules["paced"].values()], 4),
        ]
        for one, other in (("zero", "paced"), ("mean", "paced"), ("zero", "mean")):
            seeds = sorted(rules[one].keys() & rules[other].keys())
            line.append(difference([rules[one][seed] - rules[other][seed] for seed in seeds]))
        lines.append(line)
    head = ["", "seeds", "paced: test loss", "zero minus paced", "mean minus paced"]
    return table([*head, "zero minus mean"], lines)


def planted_table() -> str:
    """planted.jsonl: where the rank went, and the divergence that was left."""
    runs = cells.read(cells.RESULTS / "planted.jsonl")
    lines = []
    for signal in dict.fromkeys(cell["signal"] for cell in runs):
        own = [cell for cell in runs if cell["signal"] == signal]
        line = [signal, str(len(own))]
        for key, digits in (("share", 2), ("correlation", 2), ("kl", 4)):
            line.append(mean_and_deviation([cell[key] for cell in own], digits))
        lines.append(line)
    head = [
        *("signal", "seeds", "share of the added rank in planted matrices", "rank correlation"),
        "final KL, nats per token",
    ]
    return table(head, lines)


# plots/BENCH.md.


def bench_table() -> str:
    """bench.jsonl: the centre of its axes, the first line."""
    cell = cells.read(cells.RESULTS / "bench.jsonl")[0]
    settings = cell["settings"]
    lines = []
    for name, ratio in cell["ratio"].items():
        low, high = cell["quartiles"][name]
        lines.append(
            [
                name,
                f"{ratio:.3f} ({low:.2f} to {high:.2f})",
                *(f"{part:.3f}" for part in cell["parts"][name]),
                f"{cell['tokens_per_second'][name]:,.0f}",
                f"{cell['held_bytes'][name] / 1e6:.0f}",
            ]
        )
    head = [
        *("", "step, in steps of the limit (quartiles)", "forward", "backward", "optimiser"),
        *("tokens per second", "memory, MB"),
    ]
    return (
        f"Width {settings['width']}, rank {settings['rank']}, "
        f"{settings['batch'] * settings['context']} tokens a batch, {settings['device']} with "
        f"{settings['threads']} threads: median of {settings['rounds']} rounds. Scores and growth "
        f"of all matrices at once take {cell['allocation']:.2f} of a step.\n\n{table(head, lines)}"
    )


PARTS = {
    "paper": paper_table,
    "first run": first_run,
    "found": found_table,
    "summary": summary_table,
    "comparison": lambda: compare_tables("compare.jsonl"),
    "long runs": long_runs,
    "defaults": defaults_table,
    "ablations": ablations_table,
    "moments": moments_table,
    "planted": planted_table,
    "bench": bench_table,
}


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by plots/figures/tables.py -->", f"<!-- end of {name} -->"


def render(page: str) -> str:
    """A page's text with every generated part that it has made anew."""
    for name, make in PARTS.items():
        begin, end = markers(name)
        if begin in page:
            head, _, rest = page.partition(begin)
            _, found, tail = rest.partition(end)
            if not found:
                raise ValueError(f"{begin} is not closed by {end}")
            page = f"{head}{begin}\n{make()}\n{end}{tail}"
    return page


def write_pages() -> None:
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_pages()
