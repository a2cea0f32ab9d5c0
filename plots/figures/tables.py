"""Write the tables of README.md and of the pages in plots/ from plots/results/.

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
from plots.experiments import ablations, cells, evidence, saves
from plots.figures import contrasts, intervals

PAGES = [ROOT / "README.md"]
PAGES += [ROOT / "plots" / name for name in ("RESULTS.md", "BENCH.md", "RELEASED.md")]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_deviation(values: list[float], digits: int = 4) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def difference(gaps: list[float], digits: int = 4) -> str:
    """Mean and half width of the 95 % interval by Student's t, if there are values enough."""
    if not gaps:
        return "–"
    text = f"{statistics.mean(gaps):+.{digits}f}"
    if len(gaps) >= intervals.FEWEST:
        text += f" ± {intervals.half_width(gaps):.{digits}f}"
    return text


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


NONE_YET = "The runs are under way; none is reported yet."
FOUND = [
    "full fine-tuning",
    "LoRA",
    "core, no growth",
    "importance",
    "random",
    "worth",
    "ranks of worth",
    "ranks of worth, permuted",
]
GROUPS = {"a real model": ["CoLA", "SST-2"], "our GPT": ["prose", "modules"]}
ALL_TASKS = [task for tasks in GROUPS.values() for task in tasks]
SCORES = {"CoLA": "matthews", "SST-2": "accuracy", "modules": "accuracy"}  # beside the loss


def found() -> str:
    """README's rows on each task, and what was declared to be tested."""
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    tasks = has_run(runs, ALL_TASKS)
    if not tasks:
        return NONE_YET
    lines = []
    for row in FOUND:
        shown = [minus_lora(runs, task, row) for task in tasks]
        if set(shown) != {"–"}:
            lines.append([row, *shown])
    parts = [table(["", *tasks], lines)]
    for name, group in GROUPS.items():
        ran = has_run(runs, group)
        if ran:
            parts.append(declared_in_words(contrasts.declared(runs, ran), name, ran))
    return "\n\n".join(parts)


def declared_in_words(found: dict, name: str, tasks: list[str]) -> str:
    said = []
    for (one, other), contrast in found.items():
        verdict = "clear" if contrast.holm < 0.05 else "not clear"
        said.append(f"{one} minus {other} {difference(contrast.gaps)} ({verdict})")
    return f"Declared contrasts of {name}, {' and '.join(tasks)} together: {'; '.join(said)}."


def has_run(runs: list[dict], tasks: list[str]) -> list[str]:
    """The tasks of which LoRA has reported runs."""
    return [task for task in tasks if contrasts.reported(runs, task, "LoRA")]


def minus_lora(runs: list[dict], task: str, row: str) -> str:
    """A row's test loss minus LoRA's, paired; LoRA's own."""
    if row == "LoRA":
        own = contrasts.reported(runs, task, row).values()
        return mean_and_deviation([cell["test"]["loss"] for cell in own])
    return difference(contrasts.differences(runs, [task], row, "LoRA"))


# plots/RESULTS.md.


def rows_table() -> str:
    """Each row of evidence.jsonl: its loss minus LoRA's, other scores, numbers and settings."""
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    tasks = has_run(runs, ALL_TASKS)
    if not tasks:
        return NONE_YET
    lines = []
    for row in evidence.ROWS:
        own = {task: [*contrasts.reported(runs, task, row).values()] for task in tasks}
        if row in evidence.HIGHER or not any(own.values()):
            continue
        line = [row]
        for task in tasks:
            line.append(minus_lora(runs, task, row))
            score = SCORES.get(task)
            if score:
                line.append(mean_and_deviation([c["test"][score] for c in own[task]], 3))
        shown = [cells_of[0] for cells_of in own.values() if cells_of]
        line.append("; ".join(f"{cell['rate']:g}, {cell['second']:g}" for cell in shown))
        line.append(numbers_of(own))
        lines.append(line)
    head = [""]
    for task in tasks:
        head += [f"{task}, loss"] + [SCORES[task]] * (task in SCORES)
    return table([*head, "rate, second setting", "numbers, at most"], lines)


def numbers_of(own: dict[str, list[dict]]) -> str:
    """The most numbers that a row trains, of each model."""
    most = {}
    for task, runs in own.items():
        for cell in runs:
            model = evidence.model_of(task)
            most[model] = max(cell["trainable"], most.get(model, 0))
    return ", ".join(f"{number:,}" for number in most.values())


def contrasts_table() -> str:
    """The declared contrasts, of the tasks of each model together and singly."""
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    columns = {}
    for group in GROUPS.values():
        tasks = has_run(runs, group)
        sets = [[task] for task in tasks]
        for together in [tasks, *sets] if len(tasks) > 1 else sets:
            columns[" and ".join(together)] = contrasts.declared(runs, together)
    if not columns:
        return NONE_YET
    lines = []
    for pair in contrasts.DECLARED:
        shown = [contrast_in_words(found.get(pair)) for found in columns.values()]
        lines.append([" minus ".join(pair), *shown])
    return table(["", *columns], lines)


def contrast_in_words(contrast: contrasts.Contrast | None) -> str:
    if contrast is None:
        return "–"
    gap = difference(contrast.gaps)
    gap = f"**{gap}**" if contrast.holm < 0.05 else gap
    return f"{gap} (Holm {contrast.holm:.3f}; could have seen {contrast.visible:.4f})"


def rates_table() -> str:
    """What LoRA and growth lose at higher rates than theirs, and how their seeds spread."""
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    lines = []
    for task in has_run(runs, ALL_TASKS):
        for row in ("LoRA", "importance"):
            own = contrasts.reported(runs, task, row)
            if not own:
                continue
            lost = []
            for multiple in (2, 4):
                higher = f"{row}, {multiple} times the rate"
                lost.append(difference(contrasts.differences(runs, [task], higher, row)))
            losses = [cell["test"]["loss"] for cell in own.values()]
            rate = next(iter(own.values()))["rate"]
            lines.append([task, row, f"{rate:g}", *lost, spread(losses)])
    if not lines:
        return NONE_YET
    head = ["", "", "rate", "lost at twice the rate", "at four times", "distance from the median"]
    return table(head, lines)


def spread(losses: list[float]) -> str:
    """The mean distance of a seed from the median, with its 95 % interval."""
    middle = statistics.median(losses)
    return difference([abs(loss - middle) for loss in losses]).removeprefix("+")


def saves_table() -> str:
    """How the scores of each signal go with what the adapters save."""
    runs = cells.read(cells.RESULTS / "saves.jsonl")
    sets = {}
    for cell in runs:
        sets.setdefault(cell["task"], []).append(cell["correlations"])
    for cell in cells.read(cells.RESULTS / "planted.jsonl"):
        if "correlations" in cell:
            sets.setdefault(f"planted, {cell['growth']}", []).append(cell["correlations"])
    lines = []
    for name in saves.WATCHED:
        line = [name]
        for found in sets.values():
            for when in ("now", "end"):
                line.append(difference([each[name][when] for each in found], digits=2))
        lines.append(line)
    head = [""]
    for task, found in sets.items():
        head += [f"{task} ({len(found)} runs), then", "in the end"]
    return table(head, lines)


def ablated_rows() -> dict[str, dict[int, dict]]:
    """{row: {seed: cell}} of ablations.jsonl, in the order of the experiment."""
    rows = {row: {} for row in ablations.ROWS}
    for cell in cells.read(cells.RESULTS / "ablations.jsonl"):
        rows[cell["row"]][cell["seed"]] = cell
    return {row: own for row, own in rows.items() if own}


def ablation_gaps() -> dict[str, list[float]]:
    """Test loss of each row minus that of its reference, paired by seed."""
    rows = ablated_rows()
    gaps = {}
    for row, own in rows.items():
        reference = rows["beta2 .999" if row.startswith("beta2 .999,") else "reference"]
        if row != "reference":
            seeds = sorted(own.keys() & reference.keys())
            gaps[row] = [own[seed]["test"] - reference[seed]["test"] for seed in seeds]
    return gaps


def ablations_table() -> str:
    """ablations.jsonl: the test loss of each row, and its paired difference to the reference."""
    rows = ablated_rows()
    gaps = ablation_gaps()
    enough = {row: own for row, own in gaps.items() if len(own) >= intervals.FEWEST}
    holm = intervals.holm({row: intervals.p_value(own) for row, own in enough.items()})
    lines = []
    for row, cells_of in rows.items():
        runs = cells_of.values()
        gap = difference(gaps[row]) if row in gaps else ""
        lines.append(
            [
                row,
                str(len(runs)),
                mean_and_deviation([cell["test"] for cell in runs]),
                f"**{gap}**" if holm.get(row, 1) < 0.05 else gap,
                f"{holm[row]:.4f}" if row in holm else "",
                str(max(cell["spent_at"] for cell in runs) or "–"),
            ]
        )
    head = ["", "seeds", "test loss", "minus reference, 95 %", "Holm", "budget spent at step"]
    base = next(iter(rows["reference"].values()))["base"]
    said = f"Test loss on prose in nats per token; the base has {base:.3f}."
    return f"{said}\n\n{table(head, lines)}"


def planted_table() -> str:
    """planted.jsonl: where the rank went, and the divergence that was left."""
    runs = cells.read(cells.RESULTS / "planted.jsonl")
    lines = []
    for signal in dict.fromkeys(cell["signal"] for cell in runs):
        line = [signal]
        for growth in ("gentle", "default"):
            own = [c for c in runs if (c["signal"], c["growth"]) == (signal, growth)]
            for key, digits in (("share", 2), ("correlation", 2), ("kl", 4)):
                line.append(mean_and_deviation([cell[key] for cell in own], digits))
        lines.append(line)
    head = ["share in planted matrices", "rank correlation", "final KL, nats per token"]
    return table(
        ["signal", *(f"gentle: {h}" for h in head), *(f"default: {h}" for h in head)], lines
    )


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
        f"\n\n{bench_in_words()}"
    )


def bench_in_words() -> str:
    """Where the time goes at the centre, and how far the variants are apart on all axes."""
    runs = cells.read(cells.RESULTS / "bench.jsonl")
    ours, limit = (runs[0]["parts"][name] for name in ("TriAdaptLoRA", "limit"))
    added = [one - other for one, other in zip(ours, limit, strict=True)]
    forward, backward, optimiser = (part / sum(added) for part in added)

    def times(one: str, other: str) -> str:
        ratios = [cell["ratio"][one] / cell["ratio"][other] for cell in runs]
        return f"{min(ratios):.2f} to {max(ratios):.2f} times ({statistics.median(ratios):.2f})"

    lines = [
        f"- Where the time goes: TriAdaptLoRA adds {sum(added):.3f} steps of the limit, of which "
        f"{forward:.0%} in the forward and {backward:.0%} in the backward, in thin products that "
        f"read and write all activations, and {optimiser:.0%} in the optimiser.",
        f"- Over {len(runs)} configurations (median in brackets) a step of TriAdaptLoRA takes "
        f"{times('TriAdaptLoRA', 'LoRA')} as long as one of LoRA, a grown one "
        f"{times('TriAdaptLoRA, grown', 'LoRA')}.",
    ]
    if "peft LoRA" in runs[0]["ratio"]:
        lines.append(
            f"- A step of peft's LoRA takes {times('peft LoRA', 'LoRA')} as long as one of LoRA "
            f"here, of peft's AdaLoRA {times('peft AdaLoRA', 'TriAdaptLoRA')} as long as one of "
            "TriAdaptLoRA."
        )
    lines.append(
        f"- With its backward by hand it takes {times('TriAdaptLoRA, by hand', 'TriAdaptLoRA')} as "
        f"long as without, with the dense sum {times('TriAdaptLoRA, dense by hand', 'TriAdaptLoRA')}."
    )
    return "\n".join(lines)


def time_table() -> str:
    """time_to_loss.jsonl: seconds and steps of each row until the given loss."""
    runs = cells.read(cells.RESULTS / "time_to_loss.jsonl")
    lora = {cell["seed"]: cell["seconds"] for cell in runs if cell["row"] == "LoRA"}
    lines = []
    for row in dict.fromkeys(cell["row"] for cell in runs):
        own = [cell for cell in runs if cell["row"] == row]
        there = [cell for cell in own if cell["reached"]]
        line = [row, f"{len(there)} of {len(own)}"]
        if there:
            seconds = [cell["seconds"] for cell in there]
            ratios = [
                cell["seconds"] / lora[cell["seed"]] for cell in there if cell["seed"] in lora
            ]
            line.append(f"{statistics.median(cell['steps'] for cell in there):g}")
            line.append(
                f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            )
            line.append(f"{statistics.median(ratios):.2f}")
        lines.append(line + ["–"] * (5 - len(line)))
    head = ["", "runs that got there", "steps", "seconds (all runs)", "LoRA's seconds, same seed"]
    said = (
        f"Until a validation loss of {runs[0]['given']} nats per token on the main job, "
        f"{runs[0]['device']} with {runs[0]['threads']} threads; medians."
    )
    return f"{said}\n\n{table(head, lines)}"


# plots/RELEASED.md.


def claims_table() -> str:
    """The paper's claims, each with what was measured of it."""
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    ablated = ablation_gaps()
    planted = cells.read(cells.RESULTS / "planted.jsonl")
    tasks = has_run(runs, ALL_TASKS)
    lines = []

    said = []
    for task in tasks:
        gaps = contrasts.differences(runs, [task], "importance", "LoRA")
        said.append(f"{task} {difference(gaps)}{clear_word(gaps)}")
    lines.append(["better than other PEFT methods", "loss minus LoRA's", said])

    said = []
    for group in GROUPS.values():
        ran = has_run(runs, group)
        found = contrasts.declared(runs, ran).get(("importance", "random"))
        if found is not None:
            said.append(f"{' and '.join(ran)} {contrast_in_words(found)}")
    shares = [c["share"] for c in planted if (c["signal"], c["growth"]) == ("importance", "default")]
    if shares:
        said.append(f"share of the rank in planted matrices {mean_and_deviation(shares, 2)}")
    what = "loss minus that of growth at random; a third of the planted rank is chance"
    lines.append(["the importance finds where rank is needed", what, said])

    said = []
    for row in ("exponential schedule", "fixed schedule"):
        said.append(f"{row} {difference(ablated.get(row, []))}{clear_word(ablated.get(row, []))}")
    lines.append(["linear is the best schedule", "loss minus linear growth's, on prose", said])

    said = []
    for task in tasks:
        for row in ("LoRA", "importance"):
            gaps = contrasts.differences(runs, [task], f"{row}, 2 times the rate", row)
            if gaps:
                said.append(f"{task}, {row} {difference(gaps)}")
    lines.append(["more stable", "lost at twice the chosen learning rate", said])

    ratio = cells.read(cells.RESULTS / "bench.jsonl")[0]["ratio"]
    names = ("TriAdaptLoRA, grown", "LoRA", "peft AdaLoRA")
    said = [f"{name} {ratio[name]:.2f}" for name in names if name in ratio]
    lines.append(["cheaper", "a step, in steps of the frozen base", said])

    shown = [[claim, what, "; ".join(said) or "not run yet"] for claim, what, said in lines]
    return table(["claim", "what was measured", "here"], shown)


def clear_word(gaps: list[float]) -> str:
    if len(gaps) < intervals.FEWEST:
        return ""
    return {0: " (not clear)", 1: " (behind)", -1: " (ahead)"}[intervals.clear_side(gaps)]


PARTS = {
    "paper": paper_table,
    "first run": first_run,
    "found": found,
    "rows": rows_table,
    "contrasts": contrasts_table,
    "rates": rates_table,
    "saves": saves_table,
    "planted": planted_table,
    "ablations": ablations_table,
    "bench": bench_table,
    "time to loss": time_table,
    "claims": claims_table,
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
