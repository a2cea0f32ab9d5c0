"""Write the tables of README.md and plots/RESULTS.md, between their marker lines, from the files in plots/.

python plots/readme.py            # rewrites the tables; so does plots/draw.py, after all figures
"""

import json
import random
import re
import statistics
from pathlib import Path

HERE = Path(__file__).parent
PAGES = HERE.parent / "README.md", HERE / "RESULTS.md"


def defaults_table(lines: list[str]) -> str:
    """The rows of plots/defaults.jsonl: mean and standard deviation over seeds, best learning rate by validation loss."""
    cells = [json.loads(line) for line in lines]
    rows = {}
    for cell in cells:
        rows.setdefault(cell["row"], []).append(cell)
    best = {}  # of the rows that differ in the learning rate only
    for row, runs in rows.items():
        name = row.partition(", lr ")[0]
        loss = statistics.mean(run["val_loss"] for run in runs)
        if name not in best or loss < best[name][0]:
            best[name] = (loss, runs)
    seeds = {len(runs) for _, runs in best.values()}
    base = cells[0]["base_loss"]
    text = [
        f"Test loss on prose in nats per token, mean ± standard deviation of {min(seeds)} seeds; the base has "
        f"{base:.3f}. The learning rate of each method was chosen on the validation split, with seed 0, from the "
        "grid in plots/defaults.py; rows that differ in growth only share one rate.",
        "",
        "| | test loss | learning rate | trainable at the end | budget spent at step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (_, runs) in best.items():
        losses = [run["test_loss"] for run in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        spent = max(run["spent_at"] for run in runs) or "–"
        text.append(
            f"| {name} | {statistics.mean(losses):.3f} ± {spread:.3f} | {runs[0]['settings']['lr']:g} | "
            f"{round(statistics.mean(run['trainable'] for run in runs)):,} | {spent} |"
        )
    return "\n".join(text)


def bootstrap(differences: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, from 10 000 resamples with a fixed seed."""
    rng = random.Random(0)
    means = sorted(
        statistics.fmean(rng.choices(differences, k=len(differences))) for _ in range(10_000)
    )
    return means[250], means[9750]


def chosen_cells(cells: list[dict]) -> dict[str, dict[int, dict]]:
    """{row: {seed: cell}} of one task, at each row's learning rate of lowest validation loss on seed 0."""
    rows = {}
    for row in dict.fromkeys(cell["row"] for cell in cells):
        tried = {
            cell["rate"]: cell["val"]["loss"]
            for cell in cells
            if cell["row"] == row and cell["seed"] == 0
        }
        rate = min(tried, key=tried.get)
        rows[row] = {
            cell["seed"]: cell for cell in cells if cell["row"] == row and cell["rate"] == rate
        }
    return rows


def compare_table(lines: list[str]) -> str:
    """plots/compare.jsonl, a table per task: mean and deviation, paired difference to LoRA, and what it costs."""
    cells, text = [json.loads(line) for line in lines], []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        rows = chosen_cells([cell for cell in cells if cell["task"] == task])
        metric, better = ("accuracy", "higher") if task == "modules" else ("loss", "lower")
        before = cells[[cell["task"] for cell in cells].index(task)]["before"][metric]
        text += [
            f"**{task}**: test {metric} ({better} is better; {before:.3f} before adapting)",
            "",
            f"| | seeds | test {metric} | minus LoRA, paired, 95 % | at the step best on validation | learning rate | "
            "trainable: first, peak, mean, last | forgetting | seconds, of growth | file, kB |",
            "| --- " * 10 + "|",
        ]
        order = sorted(
            rows, key=lambda row: statistics.mean(c["test"][metric] for c in rows[row].values())
        )
        for row in order if better == "lower" else order[::-1]:
            runs = rows[row]
            values = [cell["test"][metric] for cell in runs.values()]
            paired = [
                runs[seed]["test"][metric] - rows["LoRA"][seed]["test"][metric]
                for seed in runs
                if seed in rows["LoRA"]
            ]
            low, high = bootstrap(paired)
            gap = (
                ""
                if row == "LoRA"
                else f"{statistics.mean(paired):+.4f} ({low:+.4f} to {high:+.4f})"
            )
            median = {
                key: statistics.median(cell[key] for cell in runs.values())
                for key in ("seconds", "growth_seconds", "file_bytes")
            }
            trainable = (
                statistics.mean(cell["trainable"][key] for cell in runs.values())
                for key in ("initial", "peak", "mean", "final")
            )
            text.append(
                f"| {row} | {len(runs)} | {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} | {gap} | "
                f"{statistics.mean(cell['best_test'][metric] for cell in runs.values()):.4f} | "
                f"{next(iter(runs.values()))['rate']:g} | {', '.join(f'{n:,.0f}' for n in trainable)} | "
                f"{statistics.mean(cell['forgetting'] for cell in runs.values()):.2f} | "
                f"{median['seconds']:.0f}, {median['growth_seconds']:.1f} | {median['file_bytes'] / 1000:.0f} |"
            )
        text.append("")
    return "\n".join(text)


SUMMARY = {  # what comparable rows share, and their names in plots/compare.jsonl
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
        f"linear, {signal}, equal numbers"
        for signal in ("importance", "random", "uniform", "sensitivity", "worth")
    ],
    "the same, the core at a tenth of the learning rate": ["core, no growth, slow core"]
    + [
        f"linear, {signal}, equal numbers, slow core"
        for signal in ("importance", "random", "uniform", "worth")
    ],
    "and from rank 2": [
        f"linear, {signal}, equal numbers, slow core, from rank 2"
        for signal in ("random", "uniform", "worth")
    ],
}


def summary_table(lines: list[str]) -> str:
    """plots/compare.jsonl in one table: each row's paired difference to LoRA, and its mean and deviation, per task."""
    cells = [json.loads(line) for line in lines]
    tasks = {
        task: chosen_cells([cell for cell in cells if cell["task"] == task])
        for task in dict.fromkeys(c["task"] for c in cells)
    }
    metric = {task: "accuracy" if task == "modules" else "loss" for task in tasks}
    seeds = sorted({len(runs) for rows in tasks.values() for runs in rows.values()})
    text = [
        f"Test loss in nats per token, test accuracy on `modules`: minus LoRA's, paired by seed, and mean ± standard deviation; "
        f"{' or '.join(map(str, seeds))} seeds. **Bold**: the 95 % interval of the difference is clear of zero. Each row's "
        "learning rate was chosen on validation.",
        "",
        f"| | {' | '.join(f'{task}, {metric[task]}' for task in tasks)} |",
        "| --- " * (len(tasks) + 1) + "|",
    ]
    for group, names in SUMMARY.items():
        text.append(f"| *{group}* |{' |' * len(tasks)}")
        for row in names:
            values = []
            for task, rows in tasks.items():
                if len(rows.get(row, {})) < 2:
                    values.append("–")
                    continue
                own = {seed: cell["test"][metric[task]] for seed, cell in rows[row].items()}
                gaps = [
                    value - rows["LoRA"][seed]["test"][metric[task]]
                    for seed, value in own.items()
                    if seed in rows["LoRA"]
                ]
                low, high = bootstrap(gaps)
                gap = f"{statistics.mean(gaps):+.3f}"
                gap = "" if row == "LoRA" else f"**{gap}** " if low > 0 or high < 0 else f"{gap} "
                values.append(
                    f"{gap}({statistics.mean(own.values()):.3f} ± {statistics.stdev(own.values()):.3f})"
                )
            name = re.sub(
                "(, (equal numbers|slow core|from rank 2))+$", "", row
            )  # the group says it
            text.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(text)


def rates_table(lines: list[str]) -> str:
    """The test loss of seed 0 at each learning rate: a difference between rows may be one of rates."""
    cells = [cell for cell in map(json.loads, lines) if cell["seed"] == 0]
    rates = sorted({cell["rate"] for cell in cells})
    text = [
        "Seed 0, test loss at each learning rate:",
        "",
        f"| | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "| --- " * (len(rates) + 1) + "|",
    ]
    for row in dict.fromkeys(cell["row"] for cell in cells):
        losses = {cell["rate"]: cell["test"]["loss"] for cell in cells if cell["row"] == row}
        text.append(f"| {row} | {' | '.join(f'{losses[rate]:.4f}' for rate in rates)} |")
    return "\n".join(text)


def planted_table(lines: list[str]) -> str:
    """plots/planted.jsonl: where the rank went, and the divergence that was left."""
    cells = [json.loads(line) for line in lines]
    text = [
        "| signal | seeds | share of the added rank in planted matrices | rank correlation | final KL, nats per token |",
        "| --- | --- | --- | --- | --- |",
    ]
    for signal in dict.fromkeys(cell["signal"] for cell in cells):
        runs = [cell for cell in cells if cell["signal"] == signal]
        columns = [[cell[key] for cell in runs] for key in ("share", "correlation", "kl")]
        values = [
            f"{statistics.mean(c):.{n}f} ± {statistics.stdev(c):.{n}f}"
            for c, n in zip(columns, (2, 2, 4))
        ]
        text.append(f"| {signal} | {len(runs)} | {' | '.join(values)} |")
    return "\n".join(text)


def ablations_table(lines: list[str]) -> str:
    """plots/ablations.jsonl: the test loss of each row, and its paired difference to the reference."""
    rows, cells = {}, [json.loads(line) for line in lines]
    for cell in cells:
        rows.setdefault(cell["row"], {})[cell["seed"]] = cell
    text = [
        f"Test loss on prose in nats per token; the base has {cells[0]['base']:.3f}.",
        "",
        "| | seeds | test loss | minus reference, paired, 95 % | budget spent at step | change of the logits at the first growth |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, runs in sorted(rows.items(), key=lambda item: "worth" in item[0]):  # those last
        losses = [cell["test"] for cell in runs.values()]
        gaps = [
            runs[seed]["test"] - rows["reference"][seed]["test"]
            for seed in runs
            if seed in rows["reference"]
        ]
        low, high = bootstrap(gaps)
        gap = (
            ""
            if row == "reference"
            else f"{statistics.mean(gaps):+.4f} ({low:+.4f} to {high:+.4f})"
        )
        jump = statistics.mean(cell["jump"] or 0 for cell in runs.values())
        spent = max(cell["spent_at"] for cell in runs.values()) or "–"
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        text.append(
            f"| {row} | {len(runs)} | {statistics.mean(losses):.4f} ± {spread:.4f} | {gap} | {spent} | {jump:.1%} |"
        )
    return "\n".join(text)


def bench_table(lines: list[str]) -> str:
    """plots/bench.jsonl: the centre of its axes, the first line."""
    line = json.loads(lines[0])
    settings = line["settings"]
    text = [
        f"Width {settings['width']}, rank {settings['rank']}, {settings['batch'] * settings['context']} tokens a batch, "
        f"{settings['device']} with {settings['threads']} threads: median of {settings['rounds']} rounds. Scores and growth "
        f"of all matrices at once take {line['allocation']:.2f} of a step.",
        "",
        "| | step, in steps of the limit (quartiles) | forward | backward | optimiser | tokens per second | memory, MB |",
        "| --- " * 7 + "|",
    ]
    for name, ratio in line["ratio"].items():
        low, high = line["quartiles"][name]
        parts = " | ".join(f"{part:.3f}" for part in line["parts"][name])
        text.append(
            f"| {name} | {ratio:.3f} ({low:.2f} to {high:.2f}) | {parts} | {line['tokens_per_second'][name]:,.0f} | "
            f"{line['held_bytes'][name] / 1e6:.0f} |"
        )
    return "\n".join(text)


PAPER = {  # what the paper says: where it is, as file and class, method, function or table
    "y = W x + b + s B (L + U) A x": [
        "triadapt.py LoRALinear.forward",
        "triadapt.py TriAdaptLinear.up",
    ],
    "L + U, the triangular split": ["triadapt.py TriAdaptLinear.core"],
    "growth: a row of L, a column of U, a row of A, a column of B": [
        "triadapt.py TriAdaptLinear.new_entries",
        "triadapt.py LoRALinear.grow",
    ],
    "initialisation": [
        "triadapt.py LoRALinear.new_entries",
        "triadapt.py TriAdaptLinear.new_entries",
    ],
    "r (d_in + d_out) + r (r + 1) trained numbers": [
        "test_triadapt.py test_trainable_parameters_are_the_closed_form_before_and_after_any_growth"
    ],
    "importance F = ‖L + U‖_F / r": ["triadapt.py TriAdaptLinear.importance"],
    "score: the change of F": ["triadapt.py RankAllocator.scores"],
    "k = ⌊Q m⌋, ⌊exp(m ln Q)⌋ or a constant": [
        "triadapt.py SCHEDULES",
        "triadapt.py RankAllocator.count",
    ],
    "threshold: the k-th largest score; who is at or above it grows": [
        "triadapt.py RankAllocator.step"
    ],
    "orthogonality of A and B (released code)": ["train.py orthogonality"],
}


def paper_table() -> str:
    """The paper's equations, each with links to the lines that compute it."""
    text = ["| paper | code |", "| --- | --- |"]
    for what, places in PAPER.items():
        links = []
        for file, name in map(str.split, places):
            lines, number = (HERE.parent / file).read_text().splitlines(), 0
            for part in name.split("."):  # a method stands below its class
                number = next(
                    i
                    for i in range(number, len(lines))
                    if re.match(rf" *((def|class) {part}\b|{part} =)", lines[i])
                )
            links.append(f"[`{name}`]({file}#L{number + 1})")
        text.append(f"| {what} | {', '.join(links)} |")
    return "\n".join(text)


def first_run(lines: list[str]) -> str:
    """What to expect of the main command, from the log of the committed run."""
    log = [json.loads(line) for line in lines]
    first, last = log[0], log[-1]
    return (
        f"Expect a test loss of {first['test_loss']:.2f} nats per token before adapting and {last['test_loss']:.2f} "
        f"after, with a total rank that grows from {first['total_rank']} to {last['total_rank']}."
    )


def render(page: str) -> str:
    """A page's text with every generated part that it has made anew."""

    def lines(name: str) -> list[str]:
        return (HERE / f"{name}.jsonl").read_text().splitlines()

    parts = {
        "paper": paper_table,
        "first run": lambda: first_run(lines("first_run/log")),
        "summary": lambda: summary_table(lines("compare")),
        "comparison": lambda: compare_table(lines("compare")),
        "long runs": lambda: (
            f"{compare_table(lines('low_data_600'))}\n{rates_table(lines('low_data_600'))}"
        ),
        "defaults": lambda: defaults_table(lines("defaults")),
        "ablations": lambda: ablations_table(lines("ablations")),
        "planted": lambda: planted_table(lines("planted")),
        "bench": lambda: bench_table(lines("bench")),
    }
    for name, make in parts.items():
        begin, end = f"<!-- {name}: written by plots/readme.py -->", f"<!-- end of {name} -->"
        if begin in page:
            head, _, rest = page.partition(begin)
            page = f"{head}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return page


def write_pages() -> None:
    for path in PAGES:
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    write_pages()
