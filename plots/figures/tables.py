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
from plots.experiments import ablations, adalora, cells, evidence, planted, saves
from plots.figures import contrasts, intervals
from triadapt import SIGNALS

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


def mean_and_interval(values: list[float]) -> str:
    return difference(values, digits=2).removeprefix("+")


def difference(gaps: list[float], digits: int = 4) -> str:
    """Mean and half width of the 95 % interval by Student's t, if there are values enough."""
    if not gaps:
        return "–"
    text = f"{statistics.mean(gaps):+.{digits}f}"
    if len(gaps) >= intervals.FEWEST:
        text += f" ± {intervals.half_width(gaps):.{digits}f}"
    return text


def p_in_words(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "below 0.001"


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
    "the start, and growth: a column of B, a row of L, a column of U, a row of A; Adam's state": [
        "triadapt.py TriAdaptLinear.new_entries",
        "triadapt.py LoRALinear.grow",
        "triadapt.py carry_state",
    ],
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
    "importance",
    "random",
    "worth",
    "ranks of worth",
    "ranks of worth, permuted",
]
SHARES = "class shares alone"
SCORES = {"CoLA": "matthews", "SST-2": "accuracy", "modules": "accuracy"}  # beside the loss


def what_was_found() -> str:
    """README's rows on each task, and what was declared to be tested."""
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    tasks = contrasts.reported_tasks(runs)
    if not tasks:
        return NONE_YET
    lines = []
    for row in [*FOUND, SHARES]:
        shown = [minus_lora(runs, task, row) for task in tasks]
        if set(shown) != {"–"}:
            lines.append([row, *shown])
    declared = contrasts.declared(runs)
    said = [
        f"{contrasts_in_words(declared, runs)} {half_in_words(runs)}".strip(),
        places_in_words(declared),
        sides_in_words(runs, tasks),
        rates_in_words(runs, tasks),
    ]
    points = "\n".join(f"- {point}" for point in said if point)
    return f"{table(['', *tasks], lines)}\n\n{points}"


Declared = dict[tuple[str, str], contrasts.Contrast]


def contrasts_in_words(declared: Declared, runs: list[dict]) -> str:
    """Who beats LoRA: the goal."""
    against = [pair for pair in declared if pair[1] == "LoRA"]
    said = [contrast_in_short(declared, pair) for pair in against]
    importance = contrasts.differences(runs, contrasts.REAL_TASKS, "importance", "LoRA")
    if importance:
        said.append(
            f"the importance, not tested against LoRA, is at {difference(importance)} from it"
        )
    winners = [one for one, other in against if side_of(declared[one, other]) == BETTER]
    if not said:
        return ""
    who = f"growth by {' or '.join(winners)}" if winners else "neither signal that was tested"
    return (
        f"At the settings chosen {who} beats LoRA at equal numbers: on CoLA and SST-2 together, "
        f"with Holm's correction over the five declared contrasts, {', '.join(said)}."
    )


def half_in_words(runs: list[dict]) -> str:
    """Whether growth by worth beats LoRA at half its rate, which was asked later."""
    later = contrasts.declared(runs, contrasts.LATER)
    if len(later) < len(contrasts.LATER):
        return ""
    said = []
    for (_, other), contrast in later.items():
        gaps = difference(contrast.gaps)
        said.append(f"{side_of(contrast)} {other.removesuffix(' again')} ({gaps})")
    worth, lora = contrasts.LATER[0]

    validation = contrasts.differences(runs, contrasts.REAL_TASKS, worth, lora, ("val", "loss"))
    beside = [f"its validation loss is at {difference(validation)}"]
    for task in contrasts.REAL_TASKS:
        score = SCORES[task]
        gaps = contrasts.differences(runs, [task], worth, lora, ("test", score))
        beside.append(f"its {score} on {task} at {difference(gaps, digits=3)}")
    for task in evidence.GPT_TASKS:
        gaps = contrasts.differences(runs, [task], "worth, half the rate", "LoRA")
        if gaps:
            beside.append(f"its loss on {task}, of {len(gaps)} seeds, at {difference(gaps)}")
    return (
        "Growth by worth at half its rate, which is LoRA's, had been ahead in these runs, so that "
        f"was asked again of {len(evidence.NEW_SEEDS)} new seeds on the same texts: with a "
        f"correction over {len(later)} contrasts it is {', '.join(said)}; beside LoRA, not "
        f"tested, {', '.join(beside)}."
    )


def places_in_words(declared: Declared) -> str:
    """Whether it matters where the rank goes: the other declared contrasts."""
    contrast = declared.get(contrasts.PLACES)
    if contrast is None:
        return ""
    rest = [pair for pair in declared if pair[1] != "LoRA" and pair != contrasts.PLACES]
    said = [contrast_in_short(declared, pair) for pair in rest]
    mattered = "mattered here"
    if contrast.holm >= 0.05:
        mattered = "was not seen to matter here"
    said.append(
        f"which matrix of a size got the rank {mattered}: LoRA with the final ranks of growth by "
        f"worth is {side_of(contrast)} LoRA with the same ranks permuted among matrices of equal "
        f"size ({difference(contrast.gaps)}; {contrast.visible:.4f} would have been clear with a "
        "chance of 80 %)"
    )
    return f"Of the other declared contrasts: {'; '.join(said)}."


BETTER = "clearly better than"


def side_of(contrast: contrasts.Contrast) -> str:
    if contrast.holm >= 0.05:
        return "not clear of"
    return BETTER if statistics.mean(contrast.gaps) < 0 else "clearly worse than"


def contrast_in_short(declared: Declared, pair: tuple[str, str]) -> str:
    one, other = pair
    return f"{one} is {side_of(declared[pair])} {other} ({difference(declared[pair].gaps)})"


def sides_in_words(runs: list[dict], tasks: list[str]) -> str:
    """Which rows are ahead of LoRA and which behind, on which tasks: not tested."""
    full = "full fine-tuning"
    rows = [full, *(row for row in evidence.ROWS if row in SIGNALS), *contrasts.PLACES]
    compared = 0
    found = {-1: [], 0: [], 1: []}
    for task in tasks:
        sides = {-1: [], 0: [], 1: []}
        for row in rows:
            gaps = contrasts.differences(runs, [task], row, "LoRA")
            if gaps:
                sides[intervals.clear_side(gaps)].append(row)
                compared += 1
        for side, there in sides.items():
            text = f"on {task} {', '.join(there)}"
            if side == -1 and full in there and evidence.model_of(task) == "GPT":
                text += (
                    " (so there our GPT is not the picture of real use, where LoRA comes close, "
                    "although its bases are pretrained 30 times as long as the main job's)"
                )
            if there:
                found[side].append(text)
    said = []
    if found[-1]:
        said.append(f"ahead of LoRA are {'; '.join(found[-1])}")
    if found[1]:
        said.append(f"behind it {'; '.join(found[1])}")
    return f"By uncorrected intervals ({compared} comparisons) {'; '.join(said)}." if said else ""


def rates_in_words(runs: list[dict], tasks: list[str]) -> str:
    """Whether growth bears a higher rate than LoRA does: not tested."""
    words = {-1: "less", 1: "more", 0: "not clearly more or less"}
    found = {side: [] for side in words}
    for task in tasks:
        gaps = lost_minus_lora(runs, task, 4)
        if not gaps:
            continue
        text = f"on {task} ({difference(gaps)}"
        twice = lost(runs, task, "importance", 2).values()
        if twice and statistics.mean(twice) < 0:
            text += "; its rate was perhaps too low: at twice that its mean loss is lower"
        found[intervals.clear_side(gaps)].append(f"{text})")
    said = [f"{words[side]} {', '.join(there)}" for side, there in found.items() if there]
    if not said:
        return ""
    return (
        "At four times its chosen learning rate, with four seeds and by uncorrected intervals, "
        "growth by the importance loses, compared with what LoRA loses at four times its own, "
        f"{'; '.join(said)}."
    )


def minus_lora(
    runs: list[dict], task: str, row: str, what: contrasts.What = contrasts.LOSS, digits: int = 4
) -> str:
    """A row's test loss, or what else is asked for, minus LoRA's, paired; LoRA's own."""
    if row == SHARES:
        return difference(shares_minus_lora(runs, task))
    lora = "LoRA again" if row in evidence.AGAIN else "LoRA"  # of the same seeds
    if row == lora:
        split, score = what
        own = contrasts.reported(runs, task, row).values()
        return mean_and_deviation([cell[split][score] for cell in own], digits)
    return difference(contrasts.differences(runs, [task], row, lora, what), digits)


def shares_minus_lora(runs: list[dict], task: str) -> list[float]:
    """The same of who knows nothing but the shares of the classes; none if there are no classes."""
    known = [c["loss_of_shares"] for c in runs if c["task"] == task and "loss_of_shares" in c]
    if not known:
        return []
    lora = contrasts.reported(runs, task, "LoRA").values()
    return [known[0] - cell["test"]["loss"] for cell in lora]


# plots/RESULTS.md.


def rows_table() -> str:
    """Each row of evidence.jsonl, in a table for each model."""
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    tasks = contrasts.reported_tasks(runs)
    if not tasks:
        return NONE_YET
    models = dict.fromkeys(evidence.model_of(task) for task in tasks)
    own = [[task for task in tasks if evidence.model_of(task) == model] for model in models]
    return "\n\n".join(rows_of(runs, tasks) for tasks in own)


def rows_of(runs: list[dict], tasks: list[str]) -> str:
    """Each row's loss minus LoRA's, other scores, numbers and settings."""
    head = [""]
    shares = [SHARES]
    for task in tasks:
        head.append(f"{task}, loss (on validation)")
        shares.append(minus_lora(runs, task, SHARES))
        if task in SCORES:
            head.append(SCORES[task])
            shares.append("")
    head += ["learning rate, and alpha or the core's part of the rate", "numbers, at most"]
    lines = []
    for row in evidence.ROWS:
        own = {task: [*contrasts.reported(runs, task, row).values()] for task in tasks}
        if row in evidence.HIGHER or not any(own.values()):
            continue
        line = [row]
        for task in tasks:
            validation = minus_lora(runs, task, row, ("val", "loss"))
            line.append(f"{minus_lora(runs, task, row)} ({validation})")
            if task in SCORES:
                line.append(minus_lora(runs, task, row, ("test", SCORES[task]), 3))
        chosen = [f"{task} {setting(finished[0])}" for task, finished in own.items() if finished]
        most = [
            f"{task} {max(cell['trainable'] for cell in finished):,}"
            for task, finished in own.items()
            if finished
        ]
        lines.append([*line, "; ".join(chosen), "; ".join(most)])
    if any(shares_minus_lora(runs, task) for task in tasks):
        lines.append([*shares, "", ""])
    return table(head, lines)


def setting(cell: dict) -> str:
    """What a row chose."""
    settings = cell["settings"]
    text = f"{settings['lr']:g}"
    if "core_lr_ratio" in settings:
        return f"{text}, core {settings['core_lr_ratio']:g}"
    if settings["method"] == "lora":
        return f"{text}, alpha {settings['alpha']:g}"
    return text


def contrasts_table() -> str:
    """The declared contrasts: tested of the real model's tasks together, and described singly."""
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    tasks = contrasts.reported_tasks(runs)
    if not tasks:
        return NONE_YET
    tested = contrasts.declared(runs) | contrasts.declared(runs, contrasts.LATER)
    lines = []
    for pair in [*contrasts.DECLARED, *contrasts.LATER, *contrasts.DESCRIBED]:
        line = [" minus ".join(pair), contrast_in_words(tested.get(pair))]
        together = contrasts.differences(runs, contrasts.REAL_TASKS, *pair)
        if pair in contrasts.DESCRIBED and together:
            line[1] = f"{difference(together)} (not tested)"
        for task in tasks:
            gaps = contrasts.paired(runs, [task], *pair)
            line.append(difference([*gaps.values()]) + by_base(gaps))
        lines.append(line)
    head = ["", " and ".join(contrasts.REAL_TASKS), *tasks]
    return "\n\n".join(filter(None, [table(head, lines), moved_in_words(runs, tasks)]))


def moved_in_words(runs: list[dict], tasks: list[str]) -> str:
    """How many matrices had another rank after the permutation."""
    said = []
    for task in tasks:
        grown, permuted = (contrasts.reported(runs, task, row) for row in contrasts.PLACES)
        moved = []
        for place in sorted(grown.keys() & permuted.keys()):
            ranks, others = grown[place]["ranks"], permuted[place]["ranks"]
            moved.append(sum(ranks[name] != others[name] for name in ranks))
        if moved:
            said.append(f"{statistics.mean(moved):.1f} of {len(ranks)} matrices on {task}")
    if not said:
        return ""
    return f"Permuting gave another rank to {', '.join(said)}, in the mean."


def contrast_in_words(contrast: contrasts.Contrast | None) -> str:
    """Bold if it is clear."""
    if contrast is None:
        return "–"
    gap = difference(contrast.gaps)
    if contrast.holm < 0.05:
        gap = f"**{gap}**"
    holm = p_in_words(contrast.holm)
    return f"{gap} (Holm {holm}; could have seen {contrast.visible:.4f})"


def by_base(gaps: dict[tuple[str, int, int], float]) -> str:
    """The mean on each base, if there are several."""
    bases = {}
    for (_, base, _), gap in gaps.items():
        bases.setdefault(base, []).append(gap)
    if len(bases) < 2:
        return ""
    means = [f"{statistics.mean(own):+.4f}" for own in bases.values()]
    return f" (by base {', '.join(means)})"


def rates_table() -> str:
    """What LoRA and growth lose at higher rates than theirs, and how their seeds spread."""
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    lines = []
    for task in contrasts.reported_tasks(runs):
        for row in ("LoRA", "importance"):
            own = contrasts.reported(runs, task, row)
            if not own:
                continue
            line = [task, row, f"{next(iter(own.values()))['settings']['lr']:g}"]
            for n in (2, 4):
                text = difference([*lost(runs, task, row, n).values()])
                higher = contrasts.reported(runs, task, evidence.at_higher_rate(row, n)).values()
                diverged = sum(cell["diverged"] for cell in higher)
                if diverged:
                    text += f" ({diverged} of {len(higher)} diverged)"
                line.append(text)
            lines.append([*line, spread(own)])
        gaps = [difference(lost_minus_lora(runs, task, n)) for n in (2, 4)]
        lines.append([task, "importance minus LoRA", "", *gaps, ""])
    if not lines:
        return NONE_YET
    head = ["", "", "learning rate", "lost at twice the rate", "at four times"]
    return table([*head, "standard deviation over seeds (95 % interval)"], lines)


def lost(runs: list[dict], task: str, row: str, n: int) -> dict[tuple[str, int, int], float]:
    """{place: test loss at n times a row's rate, minus that at its rate}."""
    return contrasts.paired(runs, [task], evidence.at_higher_rate(row, n), row)


def lost_minus_lora(runs: list[dict], task: str, n: int) -> list[float]:
    """What growth by the importance loses at n times its rate, minus what LoRA does."""
    ours = lost(runs, task, "importance", n)
    theirs = lost(runs, task, "LoRA", n)
    return [ours[place] - theirs[place] for place in sorted(ours.keys() & theirs.keys())]


def spread(own: dict[tuple[int, int], dict]) -> str:
    """The standard deviation over seeds on the same base, with its interval."""
    bases = {}
    for (base, _), cell in own.items():
        bases.setdefault(base, []).append(cell["test"]["loss"])
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in bases.values())
    freedom = len(own) - len(bases)
    deviation = (squares / freedom) ** 0.5
    low, high = intervals.deviation_interval(deviation, freedom)
    return f"{deviation:.4f} ({low:.4f} to {high:.4f})"


def saves_table() -> str:
    """How the scores of each signal go with what the adapters save."""
    runs = cells.read(cells.RESULTS / "saves.jsonl")
    sets = {}
    for cell in runs:
        sets.setdefault(cell["task"], []).append(cell)
    for cell in cells.read(cells.RESULTS / "planted.jsonl"):
        if "correlations" in cell:
            sets.setdefault(f"planted, {cell['growth']}", []).append(cell)
    lines = []
    for name in saves.WATCHED:
        line = [name]
        for own in sets.values():
            for when in ("now", "end"):
                line.append(difference([c["correlations"][name][when] for c in own], digits=2))
        lines.append(line)
    head = [""]
    useless = ["adapters without which the loss is no higher"]
    for task, own in sets.items():
        bases = len({cell.get("base", 0) for cell in own})
        head += [f"{task} ({len(own)} runs, {bases} base{'s' * (bases > 1)}): then", "in the end"]
        counts = [sum(loss <= 0 for loss in cell["saved"].values()) for cell in own]
        useless += ["", f"{statistics.mean(counts):.1f} of {len(own[0]['saved'])}"]
    return table(head, [*lines, useless])


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
        reference = rows.get(ablations.reference_of(row), {})
        if row != "reference":
            seeds = sorted(own.keys() & reference.keys())
            gaps[row] = [own[seed]["test"] - reference[seed]["test"] for seed in seeds]
    return gaps


def ablation_holm(gaps: dict[str, list[float]]) -> dict[str, float]:
    """{row: p, corrected for the whole table} of the rows that have seeds enough."""
    enough = {row: own for row, own in gaps.items() if len(own) >= intervals.FEWEST}
    p_values = {row: intervals.p_value(own) for row, own in enough.items()}
    return intervals.holm(p_values, tests=len(ablations.ROWS) - 1)


def ablations_table() -> str:
    """ablations.jsonl: each choice of ours against another."""
    return ablations_of([row for row in ablations.ROWS if not row.startswith("released")])


def recipes_table() -> str:
    """ablations.jsonl: the released code's recipes in our code; Holm's p is over all rows."""
    return ablations_of([row for row in ablations.ROWS if row.startswith("released")])


def ablations_of(chosen: list[str]) -> str:
    """The test loss of rows, and their paired differences to their references."""
    rows = ablated_rows()
    gaps = ablation_gaps()
    holm = ablation_holm(gaps)
    lines = []
    for row in chosen:
        runs = rows.get(row, {}).values()
        if not runs:
            continue
        gap = difference(gaps[row]) if row in gaps else ""
        lines.append(
            [
                row,
                str(len(runs)),
                mean_and_deviation([cell["test"] for cell in runs]),
                f"**{gap}**" if holm.get(row, 1) < 0.05 else gap,
                p_in_words(holm[row]) if row in holm else "",
                str(max(cell["spent_at"] for cell in runs) or "–"),
                final_ranks(runs),
                f"{statistics.mean(cell['trainable'] for cell in runs):,.0f}",
            ]
        )
    head = ["", "seeds", "test loss", "minus its reference, 95 %", "Holm", "budget spent at step"]
    return table([*head, "least and largest final rank", "numbers in the end"], lines)


def final_ranks(runs: list[dict]) -> str:
    """Least and largest, mean over seeds."""
    ends = [(min(cell["ranks"].values()), max(cell["ranks"].values())) for cell in runs]
    return " to ".join(f"{statistics.mean(end):.0f}" for end in zip(*ends, strict=True))


def planted_table() -> str:
    """planted.jsonl: where the rank went, and the divergence that was left, for each growth."""
    growths = planted_growths()
    head = ["signal"]
    for name, own in growths.items():
        seeds = len({cell["seed"] for cell in own})
        head.append(f"{name} growth ({seeds} seeds): share in planted matrices")
        head += ["rank correlation", "met in q and k", "KL left"]
    lines = []
    for signal in planted.RIVALS:
        line = [signal]
        for own in growths.values():
            line += planted_columns(own, signal)
        lines.append(line)

    attention, rest = map(" ".join, planted.KINDS)
    left, to_gain, in_attention, elsewhere = [], [], [], []
    for name, own in growths.items():
        uniform = [cell["kl"] for cell in own if cell["signal"] == "uniform"]
        before = [cell["kl_before"] for cell in own if cell["signal"] == "uniform"]
        left.append(f"{statistics.mean(uniform):.4f} with {name} growth")
        to_gain.append(gap_in_words(planted_gaps(own, "oracle"), name))
        in_attention.append(gap_in_words(taken_gaps(own, attention), name))
        elsewhere.append(gap_in_words(taken_gaps(own, rest), name))
    said = (
        f"Uniform growth leaves {', '.join(left)}, of {statistics.mean(before):.4f} nats. Beside "
        f"that the oracle, which knows the planted ranks, leaves {', '.join(to_gain)}; a uniformly "
        f"grown student with its teacher's own q and k {', '.join(in_attention)}; with all other "
        f"matrices of its teacher {', '.join(elsewhere)}."
    )
    return f"{table(head, lines)}\n\n{said}"


def planted_growths() -> dict[str, list[dict]]:
    """The runs of each growth."""
    growths = {}
    for cell in cells.read(cells.RESULTS / "planted.jsonl"):
        growths.setdefault(cell["growth"], []).append(cell)
    return growths


def gap_in_words(gaps: list[float], growth: str) -> str:
    return f"{difference(gaps, digits=1)} %{side_word(gaps)} with {growth} growth"


def planted_columns(runs: list[dict], signal: str) -> list[str]:
    """Share, correlation (equal ranks have none), what is met, and KL, of one growth."""
    own = [cell for cell in runs if cell["signal"] == signal]
    share = mean_and_interval([cell["share"] for cell in own])
    met = mean_and_interval([met_in_attention(cell) for cell in own])
    if signal == "uniform":
        return [share, "–", met, "–"]
    correlation = mean_and_interval([cell["correlation"] for cell in own])
    return [share, correlation, met, f"{difference(planted_gaps(runs, signal), digits=1)} %"]


def met_in_attention(cell: dict) -> float:
    """Of the ranks planted in a matrix, the part that it got: mean over planted q and k."""
    met = []
    for name, wanted in cell["planted"].items():
        if wanted > 0 and name.rpartition(".")[2] in planted.KINDS[0]:
            met.append(min(1, cell["ranks"][name] / wanted))
    return statistics.mean(met)


def planted_gaps(runs: list[dict], signal: str) -> list[float]:
    """How much more divergence is left than after uniform growth of the same seed, in %."""
    uniform = {cell["seed"]: cell["kl"] for cell in runs if cell["signal"] == "uniform"}
    own = [cell for cell in runs if cell["signal"] == signal and cell["seed"] in uniform]
    return [100 * (cell["kl"] / uniform[cell["seed"]] - 1) for cell in own]


def taken_gaps(runs: list[dict], kinds: str) -> list[float]:
    """The same of the uniformly grown student with its teacher's matrices of these kinds."""
    uniform = [cell for cell in runs if cell["signal"] == "uniform"]
    return [100 * (cell["kl_with_teachers"][kinds] / cell["kl"] - 1) for cell in uniform]


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


def times(runs: list[dict], one: str, other: str) -> list[float]:
    """How many times as long a step of one takes as a step of another, in each configuration."""
    return [cell["ratio"][one] / cell["ratio"][other] for cell in runs]


def times_in_words(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f} times ({statistics.median(ratios):.2f})"


def bench_in_words() -> str:
    """Where the time goes at the centre, and how far the variants are apart on all axes."""
    runs = cells.read(cells.RESULTS / "bench.jsonl")
    ours, limit = (runs[0]["parts"][name] for name in ("TriAdaptLoRA", "limit"))
    added = [one - other for one, other in zip(ours, limit, strict=True)]
    forward, backward, optimiser = (part / sum(added) for part in added)

    def compared(one: str, other: str) -> str:
        return times_in_words(times(runs, one, other))

    lines = [
        f"- Where the time goes: TriAdaptLoRA adds {sum(added):.3f} steps of the limit, of which "
        f"{forward:.0%} in the forward, {backward:.0%} in the backward and {optimiser:.0%} in the "
        "optimiser.",
        f"- Over {len(runs)} configurations (median in brackets) a step of TriAdaptLoRA takes "
        f"{compared('TriAdaptLoRA', 'LoRA')} as long as one of LoRA, a grown one "
        f"{compared('TriAdaptLoRA, grown', 'LoRA')}.",
    ]
    if "peft LoRA" in runs[0]["ratio"]:
        lines.append(
            f"- A step of peft's LoRA takes {compared('peft LoRA', 'LoRA')} as long as one of LoRA "
            f"here, of peft's AdaLoRA {compared('peft AdaLoRA', 'TriAdaptLoRA')} as long as one of "
            "TriAdaptLoRA."
        )
    by_hand = compared("TriAdaptLoRA, by hand", "TriAdaptLoRA")
    dense = compared("TriAdaptLoRA, dense by hand", "TriAdaptLoRA")
    lines.append(
        f"- With its backward by hand it takes {by_hand} as long as without, with the dense sum "
        f"{dense}."
    )
    return "\n".join(lines)


def time_table() -> str:
    """time_to_loss.jsonl: seconds and steps of each row until the given loss."""
    runs = cells.read(cells.RESULTS / "time_to_loss.jsonl")
    lora = {c["seed"]: c["seconds"] for c in runs if c["row"] == "LoRA" and c["reached"]}
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
    head = ["", "runs that got there", "steps", "seconds (least to most)", "in LoRA's of the seed"]
    said = (
        f"Until a validation loss of {runs[0]['given']} nats per token on the main job, "
        f"{runs[0]['device']} with {runs[0]['threads']} threads; medians."
    )
    return f"{said}\n\n{table(head, lines)}"


# plots/RELEASED.md.


def claims_table() -> str:
    """The paper's claims, each with what was measured of it."""
    claims = [claim_better(), claim_finds(), claim_linear(), claim_stable(), claim_cheaper()]
    lines = []
    for claim, what, said, verdict in claims:
        lines.append([claim, what, "; ".join(said) or "not run yet", verdict])
    return table(["claim", "what was measured", "here", "so the claim"], lines)


Claim = tuple[str, str, list[str], str]  # what it is, what was measured, numbers, verdict


def claim_better() -> Claim:
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    gaps = {}
    for other in ("LoRA", adalora.ROW):
        for task in contrasts.reported_tasks(runs):
            own = contrasts.differences(runs, [task], "importance", other)
            if own:
                gaps[f"{task}, {other}"] = own
    said = [f"{name} {difference(own)}" for name, own in gaps.items()]
    return "better than other PEFT methods", "loss minus another's", said, verdict_of(gaps)


def claim_finds() -> Claim:
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    said = []
    verdict = "–"
    pooled = contrasts.declared(runs).get(("importance", "random"))
    if pooled is not None:
        said.append(f"CoLA and SST-2 {contrast_in_words(pooled)}")
        verdict = verdict_from([statistics.mean(pooled.gaps)], [pooled.holm])
    for task in evidence.GPT_TASKS:
        gaps = contrasts.differences(runs, [task], "importance", "random")
        if gaps:
            said.append(f"{task} {difference(gaps)}, not tested")
    for name, own in planted_growths().items():
        share = mean_and_interval([c["share"] for c in own if c["signal"] == "importance"])
        gaps = planted_gaps(own, "importance")
        said.append(
            f"with {name} growth {share} of the added rank in planted matrices, by chance .33, and "
            f"{difference(gaps, digits=1)} % KL left against uniform growth's, not tested"
        )
    what = "loss minus that of growth at random; where the rank goes if the need is planted"
    return "the importance finds where rank is needed", what, said, verdict


def claim_linear() -> Claim:
    gaps = ablation_gaps()
    others = [row for row in ("exponential schedule", "fixed schedule") if gaps.get(row)]
    said = [f"{row} {difference(gaps[row])}, {len(gaps[row])} seeds" for row in others]
    holm = ablation_holm(gaps)
    tested = [row for row in others if row in holm]
    linear_minus_other = [-statistics.mean(gaps[row]) for row in tested]
    verdict = verdict_from(linear_minus_other, [holm[row] for row in tested])
    return "linear is the best schedule", "loss minus linear growth's, on prose", said, verdict


def claim_stable() -> Claim:
    runs = cells.read(cells.RESULTS / "evidence.jsonl")
    gaps = {}
    for task in contrasts.reported_tasks(runs):
        for n in (2, 4):
            own = lost_minus_lora(runs, task, n)
            if own:
                gaps[f"{task}, {n} times"] = own
    said = [f"{name} {difference(own)}" for name, own in gaps.items()]
    what = "what a multiple of the chosen learning rate costs, minus what it costs LoRA"
    return "more stable", what, said, verdict_of(gaps)


def claim_cheaper() -> Claim:
    runs = cells.read(cells.RESULTS / "bench.jsonl")
    said, verdicts = [], []
    for other in ("LoRA", "peft AdaLoRA"):
        if other in runs[0]["ratio"]:
            ratios = times(runs, "TriAdaptLoRA, grown", other)
            said.append(f"{times_in_words(ratios)} as long as {other}'s")
            cheaper = sum(ratio < 1 for ratio in ratios)
            verdict = {len(ratios): "held", 0: "did not hold"}.get(cheaper, "could not be seen")
            verdicts.append(f"{verdict} against {other}")
    what = f"a step of TriAdaptLoRA, grown, in {len(runs)} configurations (median)"
    return "cheaper", what, said, ", ".join(verdicts)


def verdict_of(gaps: dict[str, list[float]]) -> str:
    """Of the claim that all these differences are below zero, with Holm's correction over them."""
    holm = intervals.holm({name: intervals.p_value(own) for name, own in gaps.items()}, len(gaps))
    return verdict_from([statistics.mean(own) for own in gaps.values()], [holm[n] for n in gaps])


def verdict_from(means: list[float], corrected: list[float]) -> str:
    """The same, of means and corrected p."""
    clear = [mean for mean, p in zip(means, corrected, strict=True) if p < 0.05]
    if not means:
        return "–"
    if not clear:
        return "could not be seen"
    if max(clear) < 0 and len(clear) == len(means):
        return "held"
    if min(clear) < 0:
        return "held in part"
    return "did not hold"


def side_word(gaps: list[float]) -> str:
    if len(gaps) < intervals.FEWEST:
        return ""
    return {0: " (may be 0)", 1: " (above 0)", -1: " (below 0)"}[intervals.clear_side(gaps)]


PARTS = {
    "paper": paper_table,
    "first run": first_run,
    "found": what_was_found,
    "rows": rows_table,
    "contrasts": contrasts_table,
    "rates": rates_table,
    "saves": saves_table,
    "planted": planted_table,
    "ablations": ablations_table,
    "recipes": recipes_table,
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
