"""Draw the figures of README and of the pages in plots/ from plots/results/.

    python plots/figures/draw.py                   # every figure, and the tables
    python plots/figures/draw.py compare ranks     # some of them

No number in them is typed: what a title says is computed, too. A figure is a function from the
lines of its results file to a matplotlib figure, and an entry in FIGURES; one whose results are
missing is skipped.
"""

import itertools
import math
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.ticker import NullLocator
from PIL import Image
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from model import GPT, GPTConfig
from plots.experiments import cells, evidence
from plots.experiments.bench import CENTRE
from plots.figures import contrasts, tables
from plots.figures.intervals import interval
from plots.run import draw_ranks, split_name
from train import parse_args
from triadapt import SCHEDULES, RankAllocator, TriAdaptLinear, add_adapters, unpack_triangle

MOST_BYTES = 150_000  # of a figure
LEAST_WIDTH = 9  # inches, for titles

# Part of a row's name: colour and marker; the last part that fits counts. For the colour-blind too.
LOOKS = {
    "LoRA": ("#777777", "s"),
    "full": ("#000000", "*"),
    "core": ("#5D3A9B", "D"),
    "TriAdaptLoRA": ("#5D3A9B", "D"),
    "importance": ("#0072B2", "o"),
    "linear": ("#0072B2", "o"),
    "grown": ("#0072B2", "o"),
    "exponential": ("#56B4E9", "^"),
    "fixed": ("#009E73", "v"),
    "random": ("#E69F00", "<"),
    "uniform": ("#D55E00", ">"),
    "norm": ("#009E73", "v"),
    "worth": ("#8C510A", "P"),
    "AdaLoRA": ("#A39100", "X"),
    "by hand": ("#009E73", "v"),
    "dense": ("#E69F00", "<"),
}
GREY = LOOKS["LoRA"][0]


class Missing(Exception):
    """The results hold nothing that this figure could show."""


def style(row: str) -> dict:
    """Colour and marker of a row; hollow are peft's."""
    colour, marker = "#444444", "d"
    for part, look in LOOKS.items():
        if part in row:
            colour, marker = look
    inside = "white" if "peft" in row else colour
    return {"color": colour, "marker": marker, "markerfacecolor": inside}


def tasks_of(runs: list[dict]) -> list[str]:
    tasks = contrasts.reported_tasks(runs)
    if not tasks:
        raise Missing
    return tasks


def name_ticks(axes, ticks: list[float], label: str) -> None:
    """A logarithmic axis whose ticks are the values that were measured."""
    axes.set(xscale="log", xlabel=label, xticks=ticks, xticklabels=[f"{x:,g}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def side_by_side(x: list[float], i: int, count: int) -> list[float]:
    """Places on a logarithmic axis for the i-th of `count` series, so that they don't overlap."""
    return [value * 1.03 ** (i - count / 2) for value in x]


# ------------------------------------------------------------------------------ the method


def draw_method(_) -> plt.Figure:
    """A real adapter before and after grow(): a number counts as old only if it is where it was."""
    torch.manual_seed(0)
    adapter = TriAdaptLinear(torch.nn.Linear(5, 6), 3, 1.0).requires_grad_(False)
    for name in adapter.GROWS_ALONG:
        getattr(adapter, name).normal_(0, 0.7)  # as if trained
    x = torch.randn(100, 5)
    old = tensors_of(adapter)
    y = adapter(x)
    adapter.grow(1)
    new = tensors_of(adapter)
    change = ((adapter(x) - y).abs().max() / y.abs().max()).item()

    panels = {
        "B": ("lora_B", "$B$: a column of zeros"),
        "L": ("L", "$L$: a row that ends in 1"),
        "U": ("U", "$U$: a column of zeros"),
        "A": ("lora_A", "$A$: a random row"),
        "m": ("lora_L", "$L$ in memory, row by row"),
        "n": ("lora_U", "$U$ in memory, column by column"),
        "c": ("core", "core $L+U$"),
    }
    places = ["BBBBLLLLUUUUAAAAA"] * 6 + ["mmmmmmmmmmm.ccccc"] * 2 + ["nnnnnnnnnnn.ccccc"] * 2
    figure, axes = plt.subplot_mosaic("\n".join(places), figsize=(10, 6), layout="constrained")
    for key, (name, title) in panels.items():
        numbers = torch.atleast_2d(new[name])
        draw_numbers(axes[key], numbers, kinds_of(torch.atleast_2d(old[name]), numbers))
        height = 6 if key in "BLUA" else len(numbers)
        axes[key].set(aspect="equal", anchor="N", ylim=(height, 0))
        axes[key].set_title(title, fontsize=11)
        axes[key].set_axis_off()
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KINDS.values()]
    figure.legend(patches, KINDS, ncols=4, loc="outside lower center")
    figure.suptitle(
        "From rank 3 to rank 4 all four tensors grow by appending: no trained number moves,\n"
        f"and the output stays (relative change {change:.0e})"
    )
    return figure


KINDS = {
    "trained, stays where it is": "#DDDDDD",
    "new, random": "#E69F00",
    "new, one": "#009E73",
    "new, zero": "#B5DDF5",
}
OUTSIDE, OLD, RANDOM, ONE, ZERO = range(5)  # of a triangle; then in the order of KINDS


def tensors_of(adapter: TriAdaptLinear) -> dict[str, Tensor]:
    """What is drawn; nan is outside of a triangle."""
    inside = torch.ones(adapter.rank, adapter.rank).tril() == 1
    L = unpack_triangle(adapter.lora_L, adapter.rank).masked_fill(~inside, float("nan"))
    U = unpack_triangle(adapter.lora_U, adapter.rank).masked_fill(~inside, float("nan")).T
    stored = {name: getattr(adapter, name) for name in adapter.GROWS_ALONG}
    return stored | {"L": L, "U": U, "core": adapter.core()}


def kinds_of(old: Tensor, new: Tensor) -> Tensor:
    """What each number of `new` is."""
    kinds = torch.full_like(new, RANDOM)
    kinds[new == 1] = ONE
    kinds[new == 0] = ZERO
    corner = kinds[: old.shape[0], : old.shape[1]]
    corner[new[: old.shape[0], : old.shape[1]] == old] = OLD
    kinds[new.isnan()] = OUTSIDE
    return kinds


def draw_numbers(axes, numbers: Tensor, kinds: Tensor) -> None:
    shades = ListedColormap(["white", *KINDS.values()])
    axes.pcolormesh(kinds, cmap=shades, vmin=0, vmax=4, edgecolors="white", linewidth=2)
    for i, j in (kinds != OUTSIDE).nonzero().tolist():
        digits = 0 if kinds[i, j] in (ONE, ZERO) else 1
        weight = "normal" if kinds[i, j] == OLD else "bold"
        text = f"{numbers[i, j]:.{digits}f}"
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", weight=weight)


def draw_growth(_) -> plt.Figure:
    """The default plan of each schedule: how many grow, and when, is known before the training."""
    formulas = {
        "linear": r"\lfloor Q\,m\rfloor",
        "exponential": r"\lfloor e^{\,m\,\ln Q}\rfloor",
    }
    figure, (total, count) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    spent = {}
    for schedule, dashes in zip(SCHEDULES, ("-", "--", ":"), strict=True):
        args = parse_args(["--schedule", schedule])
        allocator = default_allocator(args)
        plan = [(0, allocator.total_rank), *allocator.plan()]
        steps = [t for t, _ in plan]
        totals = [ranks for _, ranks in plan]
        look = style(schedule) | {"linestyle": dashes, "markevery": 4, "markersize": 5}
        x = [*steps, args.steps]
        total.plot(x, [*totals, totals[-1]], drawstyle="steps-post", label=schedule, **look)
        label = f"{schedule}: $k={formulas.get(schedule, args.top_k)}$"
        count.plot(steps[1:], np.diff(totals), drawstyle="steps-mid", label=label, **look)
        spent[schedule] = steps[-1]

    for axes in (total, count):
        axes.axvspan(0, args.warmup, color="#DDDDDD", label="warm-up")
        axes.set(xlabel=f"optimiser step (of {args.steps})", xlim=(0, 1.3 * max(spent.values())))
    total.axhline(allocator.budget, color="black", linewidth=1, label=f"budget, {allocator.budget}")
    total.set(ylabel="total rank of all matrices", ylim=(0, 1.1 * allocator.budget))
    count.set(ylabel="ranks added at an allocation", ylim=(0, None))
    count.yaxis.get_major_locator().set_params(integer=True)
    total.legend(loc="lower right")
    count.legend()
    said = [f"{spent[schedule]} ({schedule})" for schedule in sorted(spent, key=spent.get)]
    figure.suptitle(f"By default the budget is spent at step {', '.join(said)}")
    return figure


def default_allocator(args) -> RankAllocator:
    """The allocator of a run with these settings, on a model that is never trained."""
    gpt = GPT(GPTConfig())
    adapters = add_adapters(gpt, args.targets, rank=args.rank, init_rank=args.init_rank)
    optimizer = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad])
    return RankAllocator(
        adapters,
        optimizer,
        schedule=args.schedule,
        target_rank=args.rank,
        total_steps=args.steps,
        warmup=args.warmup,
        interval=args.interval,
        rank_step=args.rank_step,
        top_k=args.top_k,
    )


# ------------------------------------------------------------------------ ranks, importance


RANKED = ("importance", "norm", "worth", "random")  # rows whose ranks are shown


def draw_final_ranks(runs: list[dict]) -> plt.Figure:
    """Mean final ranks, a panel for each row and task; how alike they are from seed to seed."""
    tasks = tasks_of(runs)
    rows = [r for r in RANKED if any(contrasts.reported(runs, task, r) for task in tasks)]
    if not rows:
        raise Missing
    size = max(LEAST_WIDTH, 3.6 * len(tasks) + 0.8), 1.8 * len(rows) + 1.2
    figure, panels = plt.subplots(
        len(rows), len(tasks), figsize=size, layout="constrained", squeeze=False
    )
    alike = {row: [] for row in rows}  # correlation of the ranks from seed to seed, of each task
    for i, row in enumerate(rows):
        for j, task in enumerate(tasks):
            axes = panels[i, j]
            axes.set(xticks=[], yticks=[])
            if i == 0:
                axes.set_title(task)
            if j == 0:
                axes.set_ylabel(row)
            own = [cell["ranks"] for cell in contrasts.reported(runs, task, row).values()]
            if own:
                alike[row].append(draw_mean_ranks(axes, own, top=i == 0))

    said = [f"{row} {statistics.mean(found):.2f}" for row, found in alike.items() if found]
    figure.suptitle(
        "Final ranks, mean over seeds. The ranks of two seeds correlate, in the mean:\n"
        + ", ".join(said),
        fontsize=11,
    )
    return figure


def draw_mean_ranks(axes, found: list[dict[str, int]], top: bool) -> float:
    """The mean over seeds. Returns how the ranks of two seeds correlate."""
    mean = {name: statistics.mean(ranks[name] for ranks in found) for name in found[0]}
    # Twice the mean rank, and all above it, is yellow.
    draw_ranks(axes, mean, evidence.START_RANK, 2 * statistics.mean(mean.values()))
    axes.tick_params(labelsize=8, bottom=False)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    short = [re.sub(r"attention\.self\.|\.dense", "", label) for label in labels]
    short = [label.replace("attention", "attn") for label in short]
    axes.set_xticklabels(short if top else [], rotation=20)
    axes.tick_params(labeltop=top, labelbottom=False)
    pairs = itertools.combinations([[*ranks.values()] for ranks in found], 2)
    alike = np.mean([np.corrcoef(one, two)[0, 1] for one, two in pairs])
    axes.set_xlabel(f"seeds correlate {alike:.2f}", fontsize=9)
    return alike


def draw_blind(runs: list[dict]) -> plt.Figure:
    """What the change of F is, and what each signal sees of a loss that counts more."""
    if not runs:
        raise Missing
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    log = runs[0]["log"]
    steps = [entry["step"] for entry in log]
    change = [entry["change"] for entry in log]
    left.plot(steps, change, color=LOOKS["importance"][0], label="change of $F$")
    trace = [entry["trace"] for entry in log]
    left.plot(steps, trace, color="#E69F00", linestyle="--", label=r"$tr(\Delta C)\,/\,r^{1.5}$")
    left.set(title="The change of $F$ is a trace", xlabel="step", ylabel="no unit")
    left.legend()

    factors = [cell["factor"] for cell in runs]
    for name in runs[0]["ratios"]:
        ratios = [cell["ratios"][name] for cell in runs]
        right.plot(factors, ratios, **style(name), label=name)
    right.set(xscale="log", yscale="log", xlabel="how often the second matrix's loss counts")
    right.set(title="What a signal sees", ylabel="its score over the first's")
    right.legend()
    most = runs[-1]
    figure.suptitle(
        f"A loss that counts {most['factor']} times multiplies the importance by "
        f"{most['ratios']['importance']:.2f}, the update's norm by {most['ratios']['norm']:.2f}, "
        f"worth by {most['ratios']['worth']:,.0f}"
    )
    return figure


def draw_importance(log: list[dict]) -> plt.Figure:
    """F of every matrix over the steps of a run, and the scores that made it grow."""
    log = [entry for entry in log if "importance" in entry]
    grown = [entry for entry in log if entry["kind"] == "allocation"]
    if not grown:
        raise Missing
    first, last = log[0], log[-1]
    kinds = list(dict.fromkeys(split_name(name)[1] for name in first["ranks"]))
    places = []  # three kinds a line, and the scores below
    for i in range(0, len(kinds), 3):
        places.append((kinds[i : i + 3] + [None] * 3)[:3])
    size = 10, 2.2 * len(places) + 3.2
    figure, axes = plt.subplot_mosaic(
        [*places, ["scores"] * 3], figsize=size, layout="constrained", empty_sentinel=None
    )
    top = 1.15 * max(max(entry["importance"].values()) for entry in log)
    for kind in kinds:
        draw_importance_of(axes[kind], kind, log, grown)
        axes[kind].set(title=kind, xlabel="step", ylabel="$F$ (no unit)", ylim=(0, top))
    title = "dot: a rank is added"
    axes[kinds[-1]].legend(fontsize=8, ncols=2, loc="upper right", title=title, title_fontsize=8)
    draw_scores(axes["scores"], grown)

    fell = [n for n, before in first["importance"].items() if last["importance"][n] < before]
    kept = sum(first["ranks"][name] == last["ranks"][name] for name in fell)
    below = sum(entry["threshold"] < 0 for entry in grown)
    figure.suptitle(
        f"The normalised Frobenius norm $F$ falls in {len(fell)} of {len(first['ranks'])} "
        f"matrices, {kept} of which got no rank;\n"
        f"the threshold is below zero at {below} of {len(grown)} allocations"
    )
    return figure


def draw_importance_of(axes, kind: str, log: list[dict], grown: list[dict]) -> None:
    """A line for each block's matrix of one kind."""
    names = [name for name in log[0]["ranks"] if split_name(name)[1] == kind]
    shades = plt.cm.cividis(np.linspace(0, 0.8, len(names)))
    steps = [entry["step"] for entry in log]
    for i, name in enumerate(names):
        label = split_name(name)[0].replace("blocks.", "block ")
        look = {"color": shades[i], "linestyle": ("-", "--", "-.", ":")[i % 4], "label": label}
        axes.plot(steps, [entry["importance"][name] for entry in log], **look)
        here = [entry for entry in grown if name in entry["grown"]]
        dots = [entry["importance"][name] for entry in here]
        axes.plot([entry["step"] for entry in here], dots, ".", color=shades[i], markersize=5)


def draw_scores(axes, grown: list[dict]) -> None:
    steps = [entry["step"] for entry in grown]
    scores = [list(entry["score"].values()) for entry in grown]
    thresholds = [entry["threshold"] for entry in grown]
    low = [min(s) for s in scores]
    high = [max(s) for s in scores]
    middle = [statistics.median(s) for s in scores]
    blue = LOOKS["linear"][0]
    axes.fill_between(steps, low, high, color="#DDDDDD", label="all matrices")
    axes.plot(steps, middle, "--", color=GREY, label="median matrix")
    axes.plot(steps, thresholds, color=blue, marker=".", label="threshold: this or more grows")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="Scores at the allocations", xlabel="step", ylabel="change of $F$ (no unit)")
    axes.legend(ncols=3, fontsize=9)


# --------------------------------------------------------------------------- the comparison


TESTED = [*contrasts.DECLARED, *contrasts.LATER]
DESCRIBED = [*contrasts.IN_PLACE, contrasts.GROWTH_ALONE, ("importance", "LoRA")]


def draw_compare(runs: list[dict]) -> plt.Figure:
    """The tested contrasts, of the real model's tasks together; and each task with other rows."""
    tasks = tasks_of(runs)
    tested = contrasts.declared(runs) | contrasts.declared(runs, contrasts.LATER)
    panels = [[task] for task in tasks]
    if tested:
        panels.insert(0, contrasts.REAL_TASKS)
    pairs = [*TESTED, *DESCRIBED]
    pairs = [p for p in pairs if any(contrasts.differences(runs, [t], *p) for t in tasks)][::-1]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = max(LEAST_WIDTH, 3.4 * columns + 2.4), (0.32 * len(pairs) + 1.1) * lines + 0.6
    figure, grid = plt.subplots(
        lines, columns, figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    for axes, together in itertools.zip_longest(grid.flat, panels):
        if together is None:
            axes.set_axis_off()
            continue
        for y, (one, other) in enumerate(pairs):
            gaps = contrasts.differences(runs, together, one, other)
            if gaps:
                colour = style(one)["color"]
                axes.plot(gaps, [y] * len(gaps), "|", color=colour, markersize=9)
                axes.plot(interval(gaps), [y, y], color=colour, linewidth=3)
                axes.plot(statistics.mean(gaps), y, **style(one), markersize=9)
        described = sum(pair in DESCRIBED for pair in pairs)
        axes.set_ylim(-0.5, len(pairs) - 0.5)
        axes.axvline(0, color=GREY, linestyle="--")
        axes.axhline(described - 0.5, color="black", linewidth=0.8)
        axes.set(xlabel="test loss, nats (left is better)")
        axes.set_title(" and ".join(together), fontsize=11)
        axes.set_yticks(range(len(pairs)), [" − ".join(pair) for pair in pairs], fontsize=9)
    title = "Paired differences with their 95 % intervals, uncorrected"
    if tested:
        clear = [statistics.mean(c.gaps) for c in tested.values() if c.holm < 0.05]
        better = sum(mean < 0 for mean in clear)
        title += (
            ". Tested are, in the first panel, those above the line\n(those 'again' later, of new "
            f"seeds): after Holm's correction over each kind {better} of {len(tested)} are clearly "
            f"better, {len(clear) - better} clearly worse"
        )
    figure.suptitle(title, fontsize=11)
    return figure


def draw_rates(runs: list[dict]) -> plt.Figure:
    """The validation loss of the selection runs at each learning rate."""
    tasks = tasks_of(runs)
    size = max(LEAST_WIDTH, 3.4 * len(tasks) + 1), 4
    figure, panels = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    handles = {}
    for axes, task in zip(panels[0], tasks, strict=True):
        tried = set()
        for row in ("LoRA", "core, no growth", "importance", "random", "worth"):
            losses = loss_at_rates(runs, task, row)
            if losses:
                tried |= losses.keys()
                look = style(row) | {"linewidth": 1.2}
                (handles[row],) = axes.plot(losses.keys(), losses.values(), **look)
        name_ticks(axes, sorted(tried), "learning rate")
        axes.tick_params(axis="x", rotation=45)
        rises = [rise_in_words(runs, task, row) for row in ("LoRA", "importance")]
        axes.set_title(f"{task}: {', '.join(filter(None, rises))}", fontsize=10)
    panels[0, 0].set_ylabel("validation loss, nats")
    figure.legend(handles.values(), handles, ncols=len(handles), loc="outside lower center")
    figure.suptitle(
        "Mean of two selection seeds. In a title: how far the losses at the three rates that "
        "every row has tried are above the lowest, in the mean",
        fontsize=11,
    )
    return figure


def loss_at_rates(runs: list[dict], task: str, row: str) -> dict[float, float]:
    """{rate: mean loss of the selection seeds, at the better second setting}."""
    best = {}
    for (rate, _), loss in sorted(evidence.selection(runs, task, row).items()):
        best[rate] = min(loss, best.get(rate, math.inf))
    return best


def rise_in_words(runs: list[dict], task: str, row: str) -> str:
    """How far the rates of the first grid are above the best one, once all have run."""
    losses = loss_at_rates(runs, task, row)
    grid = evidence.first_rates(task)
    if not losses.keys() >= set(grid):
        return ""
    rise = statistics.mean(losses[rate] for rate in grid) - min(losses.values())
    return f"{row} {rise:.3f}"


# ------------------------------------------------------------------------------------ costs


BENCH_AXES = {  # label of an axis: the settings that vary along it
    "width": ["width", "heads"],
    "rank": ["rank"],
    "tokens per batch": ["batch", "context"],
}


def draw_bench(runs: list[dict]) -> plt.Figure:
    """Step time of each variant against the limit, along three axes through the centre."""
    devices = {}
    for cell in runs:
        device = "{device}, {threads} threads".format_map(cell["settings"])
        devices.setdefault(device, []).append(cell)
    if not devices:
        raise Missing
    size = 10, 3.4 * len(devices) + 1.4
    figure, panels = plt.subplots(
        len(devices), 3, figsize=size, sharey="row", layout="constrained", squeeze=False
    )
    handles = {}
    said = []
    for line, (device, here) in zip(panels, devices.items(), strict=True):
        for axes, label in zip(line, BENCH_AXES, strict=True):
            handles |= draw_costs(axes, label, here)
        line[0].set_ylabel(f"step time, limit = 1\n({device})")
        for cell in here:
            if not off_centre(cell):
                said.append(
                    "{}: a step takes {TriAdaptLoRA:.3f} times the limit with TriAdaptLoRA, "
                    "{LoRA:.3f} with LoRA, {full:.3f} in full".format(device, **cell["ratio"])
                )
    figure.legend(handles.values(), handles, ncols=4, loc="outside lower center")
    figure.suptitle("\n".join(said) or "Step time against the limit", fontsize=11)
    return figure


def off_centre(cell: dict) -> set[str]:
    """The settings in which a configuration differs from the centre of all axes."""
    return {name for name, value in CENTRE.items() if cell["settings"][name] != value}


def draw_costs(axes, label: str, here: list[dict]) -> dict:
    """The configurations along one axis. Returns {variant: its handle}."""
    points = {}  # {variant: {x: (median, first quartile, third quartile)}}
    for cell in here:
        settings = cell["settings"]
        if off_centre(cell) <= set(BENCH_AXES[label]):
            x = settings.get(label, settings["batch"] * settings["context"])
            for variant, ratio in cell["ratio"].items():
                points.setdefault(variant, {})[x] = ratio, *cell["quartiles"][variant]
    points.pop("limit", None)  # it is 1
    handles = {}
    for i, (variant, found) in enumerate(points.items()):
        measured = sorted(found)
        x = side_by_side(measured, i, len(points))
        middle, low, high = np.array([found[n] for n in measured]).T
        axes.vlines(x, low, high, color=style(variant)["color"], linewidth=0.6)
        (handles[variant],) = axes.plot(x, middle, **style(variant), linewidth=1.2)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    name_ticks(axes, sorted({x for found in points.values() for x in found}), label)
    return handles


# ---------------------------------------------------------------------------------- files

FIGURES = {
    "method": (draw_method, None),
    "growth": (draw_growth, None),
    "ranks": (draw_final_ranks, "evidence.jsonl"),
    "importance": (draw_importance, "first_run/log.jsonl"),
    "blind": (draw_blind, "blind.jsonl"),
    "rates": (draw_rates, "evidence.jsonl"),
    "bench": (draw_bench, "bench.jsonl"),
    "compare": (draw_compare, "evidence.jsonl"),
}


def draw(name: str, results: Path = cells.RESULTS, folder: Path = HERE) -> None:
    """Write FOLDER/NAME.png."""
    function, file = FIGURES[name]
    path = folder / f"{name}.png"
    try:
        figure = function(cells.read(results / file) if file else [])
    except Missing:
        print(f"{path}: skipped, no results for it in {results / file}")
        return
    temporary = folder / f".{name}.tmp.png"
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    with Image.open(temporary) as image:  # 256 colours: enough, and a third of the bytes
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(temporary, optimize=True)
    size = temporary.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{temporary} has {size} bytes, more than {MOST_BYTES}")
    temporary.replace(path)
    print(path)


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(FIGURES)
    if unknown:
        known = ", ".join(FIGURES)
        sys.exit(f"no figure is called {', '.join(sorted(unknown))}; there are {known}")
    for figure_name in sys.argv[1:] or FIGURES:
        draw(figure_name)
    if not sys.argv[1:]:
        tables.write_pages()
