"""Draw README's figures from the committed results. No number in them is typed: what a title says is computed, too.

    python plots/draw.py                       # every figure, and the tables; one whose results are missing is skipped
    python plots/draw.py compare ranks         # some

A figure is a function from the lines of its results file to a matplotlib figure, and an entry in FIGURES.
"""

import itertools
import json
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

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from model import GPT, GPTConfig  # noqa: E402
from plots.bench import CENTRE  # noqa: E402
from plots.readme import SUMMARY, bootstrap, chosen_cells, write_pages  # noqa: E402
from plots.run import planned_growth, split_name  # noqa: E402
from train import parse_args  # noqa: E402
from triadapt import SCHEDULES, RankAllocator, TriAdaptLinear, add_adapters  # noqa: E402

MOST_BYTES = 150_000
COLOURS = {  # part of a row's name: colour and marker; the last part that fits counts. For the colour-blind too
    "LoRA": ("#777777", "s"),
    "full": ("#000000", "*"),
    "core": ("#5D3A9B", "D"),
    "TriAdaptLoRA": ("#5D3A9B", "D"),
    "linear": ("#0072B2", "o"),
    "paper": ("#0072B2", "o"),
    "grown": ("#0072B2", "o"),
    "exponential": ("#56B4E9", "^"),
    "fixed": ("#009E73", "v"),
    "random": ("#E69F00", "<"),
    "uniform": ("#D55E00", ">"),
    "sensitivity": ("#CC79A7", "p"),
    "increlora": ("#CC79A7", "p"),
    "worth": ("#8C510A", "P"),
    "AdaLoRA": ("#A39100", "X"),
    "by hand": ("#009E73", "v"),
    "dense": ("#E69F00", "<"),
}
GROWTHS = ("linear", "exponential", "fixed")


class Missing(Exception):
    """The results hold nothing that this figure could show."""


def style(row: str) -> dict:
    """Colour and marker of a row. Hollow: at equal numbers instead of equal rank; peft's instead of ours; per rank.
    Filled on the left: the same with a slow core; below: and from rank 2."""
    colour, marker = [("#444444", "d"), *(look for name, look in COLOURS.items() if name in row)][
        -1
    ]
    hollow = any(word in row for word in ("equal", "peft", "per rank")) and "slow" not in row
    filled = "bottom" if "from rank 2" in row else "left" if "slow" in row else "full"
    return {
        "color": colour,
        "marker": marker,
        "markerfacecolor": "white" if hollow else colour,
        "fillstyle": filled,
        "markerfacecoloralt": "white",
    }


def per_task(cells: list[dict], key: str = "task") -> dict[str, dict[str, dict[int, dict]]]:
    """{task: {row: {seed: cell}}} at chosen rates. A row without seed 0 has none yet; a task needs LoRA."""
    begun = {(cell[key], cell["row"]) for cell in cells if cell["seed"] == 0}
    tasks = {
        task: chosen_cells(
            [cell for cell in cells if cell[key] == task and (task, cell["row"]) in begun]
        )
        for task in dict.fromkeys(cell[key] for cell in cells)
    }
    if not (tasks := {task: rows for task, rows in tasks.items() if "LoRA" in rows}):
        raise Missing
    return tasks


def metric_of(rows: dict) -> tuple[str, int, str]:
    """A task's metric, the sign of what is better, and an axis label."""
    if "accuracy" in next(iter(rows["LoRA"].values()))["test"]:
        return "accuracy", 1, "test accuracy"
    return "loss", -1, "test loss, nats per token"


def paired(rows: dict, row: str, other: str = "LoRA") -> list[float]:
    """Test results of one row minus another's, of the seeds that both have."""
    metric, one, two = metric_of(rows)[0], rows.get(row, {}), rows.get(other, {})
    return [one[seed]["test"][metric] - two[seed]["test"][metric] for seed in one if seed in two]


def sure_sign(gaps: list[float]) -> int:
    """1 or -1 if the whole interval is on that side of zero; else, or of under three seeds, 0."""
    low, high = bootstrap(gaps) if len(gaps) >= 3 else (0, 0)
    return (low > 0) - (high < 0)


def seeds_and_mean(axes, y: float, values: list[float], row: str) -> None:
    """A line of a panel: a bar per seed, and the mean."""
    axes.plot(values, [y] * len(values), "|", color=style(row)["color"], markersize=9)
    axes.plot(statistics.mean(values), y, **style(row), markersize=7)


def name_ticks(axes, ticks, label: str) -> None:
    """A logarithmic axis whose ticks are the values that were measured."""
    axes.set(xscale="log", xlabel=label, xticks=ticks, xticklabels=[f"{x:,}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def draw_method(_) -> plt.Figure:
    """A real adapter before and after grow(): a cell counts as old only if its number is where it was."""
    torch.manual_seed(0)
    adapter = TriAdaptLinear(torch.nn.Linear(5, 6), 3, 1.0).requires_grad_(False)
    for name in adapter.GROWS_ALONG:
        getattr(adapter, name).normal_(0, 0.7)  # as if trained

    def tensors() -> dict[str, torch.Tensor]:
        return {name: getattr(adapter, name).data for name in adapter.GROWS_ALONG} | {
            "core": adapter.core()
        }

    def dense(name: str, numbers: torch.Tensor) -> torch.Tensor:
        """Where core() puts the numbers of one triangle, when the other is zero."""
        for other in ("lora_L", "lora_U"):
            getattr(adapter, other).data = numbers if other == name else torch.zeros_like(numbers)
        return adapter.core()

    old, x = tensors(), torch.randn(100, 5)
    y = adapter(x)
    adapter.grow(1)
    change, new, kinds = ((adapter(x) - y).abs().max() / y.abs().max()).item(), tensors(), {}
    for name, numbers in new.items():
        kinds[name] = (
            torch.full_like(numbers, 2).masked_fill(numbers == 1, 3).masked_fill(numbers == 0, 4)
        )
        corner = tuple(slice(n) for n in old[name].shape)
        kinds[name][corner][numbers[corner] == old[name]] = 1
    panels = {
        "B": ("lora_B", "$B$: a column of zeros"),
        "L": ("lora_L", "$L$: a row that ends in 1"),
        "U": ("lora_U", "$U$: a column of zeros"),
        "A": ("lora_A", "$A$: a random row"),
        "c": ("core", "core $L+U$"),
        "m": ("lora_L", "$L$ in memory, row by row"),
        "n": ("lora_U", "$U$ in memory, column by column"),
    }
    places = ["BBBBLLLLUUUUAAAAA"] * 6 + ["mmmmmmmmmmm.ccccc"] * 2 + ["nnnnnnnnnnn.ccccc"] * 2
    figure, axes = plt.subplot_mosaic("\n".join(places), figsize=(10, 6), layout="constrained")
    colours = {
        "trained, stays where it is": "#DDDDDD",
        "new, random": "#E69F00",
        "new, one": "#009E73",
        "new, zero": "#B5DDF5",
    }
    shades = ListedColormap(["white", *colours.values()])
    for key, (name, title) in panels.items():
        kind, numbers = (
            (dense(name, t) if key in "LU" else torch.atleast_2d(t))
            for t in (kinds[name], new[name])
        )
        axes[key].pcolormesh(kind, cmap=shades, vmin=0, vmax=4, edgecolors="white", linewidth=2)
        for i, j in kind.nonzero().tolist():  # zero is outside the triangle
            text = f"{numbers[i, j]:.{0 if kind[i, j] > 2 else 1}f}"
            weight = "normal" if kind[i, j] == 1 else "bold"
            axes[key].text(j + 0.5, i + 0.5, text, ha="center", va="center", weight=weight)
        axes[key].set(aspect="equal", anchor="N", ylim=(6 if key in "BLUA" else len(kind), 0))
        axes[key].set_title(title, fontsize=11)
        axes[key].set_axis_off()
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(patches, colours, ncols=4, loc="outside lower center")
    figure.suptitle(
        "From rank 3 to rank 4 all four tensors grow by appending: no trained number moves,\n"
        f"and the output stays (relative change {change:.0e})"
    )
    return figure


def draw_growth(_) -> plt.Figure:
    """The default plan of every schedule: how many matrices grow, and when, does not depend on the training."""
    figure, (total, count) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    formulas, spent = (
        {"linear": r"\lfloor Q\,m\rfloor", "exponential": r"\lfloor e^{\,m\,\ln Q}\rfloor"},
        {},
    )
    for schedule, dashes in zip(SCHEDULES, ("-", "--", ":")):
        args = parse_args(["--schedule", schedule])
        adapters = add_adapters(
            GPT(GPTConfig()), args.targets, rank=args.rank, init_rank=args.init_rank
        )
        optimizer = torch.optim.AdamW(
            [p for a in adapters.values() for p in a.parameters() if p.requires_grad]
        )
        allocator = RankAllocator(
            adapters,
            optimizer,
            schedule=schedule,
            target_rank=args.rank,
            total_steps=args.steps,
            warmup=args.warmup,
            interval=args.interval,
            rank_step=args.rank_step,
            top_k=args.top_k,
        )
        steps, totals = zip((0, allocator.total_rank), *planned_growth(allocator))
        look = style(schedule) | {"linestyle": dashes, "markevery": 4, "markersize": 5}
        total.plot(
            [*steps, args.steps],
            [*totals, totals[-1]],
            drawstyle="steps-post",
            label=schedule,
            **look,
        )
        count.plot(
            steps[1:],
            np.diff(totals),
            drawstyle="steps-mid",
            label=f"{schedule}: $k={formulas.get(schedule, args.top_k)}$",
            **look,
        )
        spent[schedule] = steps[-1]
    for axes in (total, count):
        axes.axvspan(0, args.warmup, color="#DDDDDD", label="warm-up")
        axes.set(xlabel=f"optimiser step (of {args.steps})", xlim=(0, 1.3 * max(spent.values())))
    total.axhline(allocator.budget, color="black", linewidth=1, label=f"budget, {allocator.budget}")
    total.set(ylabel="total rank of all matrices", ylim=(0, 1.1 * allocator.budget))
    count.set(ylabel="ranks added at an allocation", ylim=(0, None))
    count.yaxis.get_major_locator().set_params(integer=True)
    total.legend(loc="lower right"), count.legend()
    said = [
        f"{step} ({schedule})" for schedule, step in sorted(spent.items(), key=lambda item: item[1])
    ]
    figure.suptitle(f"By default the budget is spent at step {', '.join(said)}")
    return figure


def draw_ranks(cells: list[dict]) -> plt.Figure:
    """Mean final ranks, a panel per row and task; how alike they are from seed to seed, and how unequal."""
    tasks, shares = per_task(cells), {}
    wanted = [*GROWTHS, "linear, sensitivity", "linear, worth", "linear, random"]
    if not (wanted := [row for row in wanted if any(row in rows for rows in tasks.values())]):
        raise Missing
    size = 3.3 * len(tasks) + 0.8, 1.6 * len(wanted) + 1.2
    figure, panels = plt.subplots(
        len(wanted), len(tasks), figsize=size, layout="constrained", squeeze=False
    )
    for (i, row), (j, (task, rows)) in itertools.product(
        enumerate(wanted), enumerate(tasks.items())
    ):
        axes, found = panels[i, j], [*rows.get(row, {}).values()]
        axes.set(
            xticks=[],
            yticks=[],
            title=task if i == 0 else "",
            ylabel=row.replace(", ", ",\n") if j == 0 else "",
        )
        if not found:
            continue
        blocks, kinds = (
            [*dict.fromkeys(split_name(name)[part] for name in found[0]["ranks"])]
            for part in (0, 1)
        )
        grid = np.array(
            [
                [[cell["ranks"][f"{block}.{kind}"] for kind in kinds] for block in blocks]
                for cell in found
            ]
        )
        mean, start = grid.mean(0), found[0]["settings"]["init_rank"]
        image = axes.imshow(
            mean, cmap="cividis", vmin=start, vmax=2 * mean.mean(), aspect="auto"
        )  # above: yellow too
        for y, x in np.ndindex(mean.shape):
            dark = image.norm(mean[y, x]) < 0.5
            axes.text(
                x,
                y,
                f"{mean[y, x]:.0f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
            )
        shares.setdefault(row, []).append(
            np.sort((mean - start).ravel())[-2:].sum() / (mean - start).sum()
        )
        pairs = itertools.combinations(grid.reshape(len(grid), -1), 2)
        alike = [np.corrcoef(one, two)[0, 1] for one, two in pairs if one.std() * two.std()]
        axes.set_xlabel(f"seeds correlate {np.mean(alike):.2f}" if alike else "", fontsize=9)
        if i == 0:
            axes.xaxis.set_ticks(range(len(kinds)), kinds)
            axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
        if j == 0:
            axes.yaxis.set_ticks(
                range(len(blocks)), [f"block {block.rpartition('.')[2]}" for block in blocks]
            )
    words = {
        "linear": "by the paper's importance",
        "linear, sensitivity": "by sensitivity",
        "linear, random": "at random",
    }
    said = [
        f"{statistics.mean(shares[row]):.0%} {word}" for row, word in words.items() if row in shares
    ]
    figure.suptitle(
        "Final ranks, mean over seeds. The two richest matrices get this share of the growth:\n"
        + ", ".join(said)
    )
    return figure


def draw_importance(log: list[dict]) -> plt.Figure:
    """F of every matrix over the steps of a run, and the scores that made it grow."""
    log = [entry for entry in log if "importance" in entry]
    if not (grown := [entry for entry in log if entry["kind"] == "allocation"]):
        raise Missing
    first, last = log[0], log[-1]
    kinds = [*dict.fromkeys(split_name(name)[1] for name in first["ranks"])]
    places = [(kinds[i : i + 3] + [None] * 3)[:3] for i in range(0, len(kinds), 3)]
    figure, axes = plt.subplot_mosaic(
        [*places, ["scores"] * 3],
        figsize=(10, 2.2 * len(places) + 3.2),
        layout="constrained",
        empty_sentinel=None,
    )
    for kind in kinds:
        names = [name for name in first["ranks"] if split_name(name)[1] == kind]
        shades = plt.cm.cividis(np.linspace(0, 0.8, len(names)))
        for name, shade, dashes in zip(names, shades, itertools.cycle(("-", "--", "-.", ":"))):
            axes[kind].plot(
                [e["step"] for e in log],
                [e["importance"][name] for e in log],
                color=shade,
                linestyle=dashes,
                label=split_name(name)[0].replace("blocks.", "block "),
            )
            here = [
                (entry["step"], entry["importance"][name])
                for entry in grown
                if name in entry["grown"]
            ]
            axes[kind].plot(*np.reshape(here, (-1, 2)).T, ".", color=shade, markersize=5)
        axes[kind].set(
            title=kind,
            xlabel="step",
            ylabel="$F$ (no unit)",
            ylim=(0, 1.15 * max(max(e["importance"].values()) for e in log)),
        )
    axes[kinds[-1]].legend(
        fontsize=8, ncols=2, loc="upper right", title="dot: a rank is added", title_fontsize=8
    )
    steps, scores = [e["step"] for e in grown], [[*e["score"].values()] for e in grown]
    panel, blue = axes["scores"], COLOURS["linear"][0]
    panel.fill_between(
        steps, *zip(*((min(s), max(s)) for s in scores)), color="#DDDDDD", label="all matrices"
    )
    panel.plot(
        steps, [statistics.median(s) for s in scores], "--", color="#777777", label="median matrix"
    )
    panel.plot(
        steps,
        [e["threshold"] for e in grown],
        color=blue,
        marker=".",
        label="threshold: this or more grows",
    )
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(title="Scores at the allocations", xlabel="step", ylabel="change of $F$ (no unit)")
    panel.legend(ncols=3, fontsize=9)
    fell = [
        name for name, before in first["importance"].items() if last["importance"][name] < before
    ]
    kept = sum(first["ranks"][name] == last["ranks"][name] for name in fell)
    below = sum(entry["threshold"] < 0 for entry in grown)
    figure.suptitle(
        f"$F$ falls in {len(fell)} of {len(first['ranks'])} matrices, {kept} of which got no rank;\n"
        f"the threshold is below zero at {below} of {len(grown)} allocations"
    )
    return figure


def draw_parameters(cells: list[dict]) -> plt.Figure:
    """What a row reaches against how many numbers it trains in the end: all rows, and the adapters alone."""
    tasks, handles, best, ratio = per_task(cells), {}, 0, 0
    figure, panels = plt.subplots(
        2, len(tasks), figsize=(3.6 * len(tasks), 7.4), layout="constrained", squeeze=False
    )
    for (everything, adapters), (task, rows) in zip(panels.T, tasks.items()):
        (metric, sign, label), points = metric_of(rows), {}
        for row, runs in rows.items():
            numbers, values = np.array(
                [(cell["trainable"]["final"], cell["test"][metric]) for cell in runs.values()]
            ).T
            points[row] = numbers.mean(), values.mean()
            look = style(row) | {"linestyle": "", "elinewidth": 0.8, "markersize": 7}
            if len(values) > 1:
                look |= {"xerr": numbers.std(ddof=1), "yerr": values.std(ddof=1)}
            for axes in (everything, adapters)[: 1 if row.startswith("full") else 2]:
                handles[row] = axes.errorbar(*points[row], **look)
        if full := points.pop("full fine-tuning", None):
            ratio = full[0] / points["LoRA"][0]
            best += all(sign * full[1] > sign * value for _, value in points.values())
        order = np.argsort(np.argsort([*points.values()], axis=0), axis=0)
        rho = np.corrcoef(order.T)[0, 1] if len(order) > 2 else float("nan")
        everything.set(xscale="log", title=task, xlabel="numbers trained in the end", ylabel=label)
        adapters.set_title(
            f"adapters alone: rank correlation\nof numbers and {metric} {rho:+.2f}", fontsize=10
        )
        adapters.set(xlabel="numbers trained in the end", ylabel=label)
        adapters.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    figure.legend(handles.values(), handles, ncols=3, loc="outside lower center", fontsize=9)
    said = f"Full fine-tuning, with {ratio:.0f} times LoRA's numbers, is best on {best} of {len(tasks)} tasks"
    figure.suptitle(f"{said if ratio else 'Result and trained numbers'} (mean and s.d. over seeds)")
    return figure


def draw_low_data(cells: list[dict]) -> plt.Figure:
    """Test loss, and the paired difference to LoRA, against the size of the training text."""
    sizes = dict(sorted(per_task(cells, "tokens").items()))
    figure, (loss, gap) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    names, signs = [*dict.fromkeys(row for rows in sizes.values() for row in rows)], []
    for i, row in enumerate(names):
        results = {
            n: [cell["test"]["loss"] for cell in rows[row].values()]
            for n, rows in sizes.items()
            if row in rows
        }
        loss.plot(
            [*results],
            [statistics.mean(values) for values in results.values()],
            **style(row),
            label=row,
        )
        gaps = {n: found for n in results if (found := paired(sizes[n], row))}
        if (
            row in ("LoRA", "full fine-tuning") or not gaps
        ):  # full fine-tuning is far off this scale
            continue
        signs += [sure_sign(found) for found in gaps.values()] if row.startswith(GROWTHS) else []
        beside = [
            n * 1.03 ** (i - len(names) / 2) for n in gaps
        ]  # so that intervals stand side by side
        gap.vlines(
            beside, *zip(*map(bootstrap, gaps.values())), color=style(row)["color"], linewidth=1.2
        )
        gap.plot(
            beside, [statistics.mean(found) for found in gaps.values()], **style(row), linewidth=0.8
        )
    gap.axhline(0, color=COLOURS["LoRA"][0], linestyle="--")
    loss.set(title="Mean over seeds", ylabel="test loss, nats per token")
    gap.set(
        title="Paired, with 95 % interval: below 0 is better",
        ylabel="test loss minus LoRA's, nats per token",
    )
    for axes in (loss, gap):
        name_ticks(axes, [*sizes], "training tokens")
    figure.legend(
        *loss.get_legend_handles_labels(), ncols=4, loc="outside lower center", fontsize=9
    )
    figure.suptitle(
        f"Of {len(signs)} pairs of growth and text size, {signs.count(-1)} are better than LoRA "
        f"and {signs.count(1)} worse, by 95 % intervals"
    )
    return figure


def draw_planted(cells: list[dict]) -> plt.Figure:
    """Did the rank go where it was needed, and was it worth it?"""

    def twin(cell: dict) -> str:
        return json.dumps([cell["seed"], cell.get("config")])

    if not (uniform := {twin(cell): cell["kl"] for cell in cells if cell["signal"] == "uniform"}):
        raise Missing
    figure, (share, rest) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    signals, said = [*dict.fromkeys(cell["signal"] for cell in cells)][::-1], {}
    chance = statistics.mean(rank > 0 for cell in cells for rank in cell["planted"].values())
    for y, signal in enumerate(signals):
        runs = [cell for cell in cells if cell["signal"] == signal and twin(cell) in uniform]
        shares = [cell["share"] for cell in runs]
        kls = [100 * (cell["kl"] / uniform[twin(cell)] - 1) for cell in runs]
        if runs:
            seeds_and_mean(share, y, shares, signal)
            seeds_and_mean(rest, y, kls, signal)
            said[signal] = (
                f"{statistics.mean(shares):.0%} of the added rank where it is needed, divergence "
                f"{statistics.mean(kls):+.0f} % against uniform growth"
            )
    share.axvline(chance, color="black", linestyle="--", linewidth=1)
    share.text(chance + 0.01, len(signals) - 0.5, "chance", va="center")
    rest.axvline(0, color=COLOURS["uniform"][0], linestyle="--", linewidth=1)
    share.set(
        xlabel="share of the added rank in planted matrices\n(right is better)",
        yticks=range(len(signals)),
        yticklabels=signals,
        ylim=(-0.5, len(signals) - 0.2),
        xlim=(0, 1.03),
    )
    rest.set(xlabel="final KL divergence against uniform growth's, %\n(left is better)")
    told = [f"{name}: {said[name]}" for name in ("paper", "oracle") if name in said]
    figure.suptitle("\n".join(told) or "Planted ranks")
    return figure


def draw_bench(cells: list[dict]) -> plt.Figure:
    """Step time of each variant against the limit, along three axes through the centre; a row per device."""
    free = {
        "width": ("width", "heads"),
        "rank": ("rank",),
        "tokens per batch": ("batch", "context"),
    }
    devices, handles, said = {}, {}, []
    for cell in cells:
        devices.setdefault("{device}, {threads} threads".format_map(cell["settings"]), []).append(
            cell
        )
    figure, panels = plt.subplots(
        max(1, len(devices)),
        3,
        figsize=(10, 3.4 * len(devices) + 1.4),
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for (row, (device, here)), (j, label) in itertools.product(
        zip(panels, devices.items()), enumerate(free)
    ):
        axes, found = row[j], {}  # {variant: {x: (ratio, quartiles)}}
        for cell in here:
            off = {name for name, value in CENTRE.items() if cell["settings"][name] != value}
            x = cell["settings"].get(label, cell["settings"]["batch"] * cell["settings"]["context"])
            for variant, ratio in cell["ratio"].items() if off <= {*free[label]} else []:
                found.setdefault(variant, {})[x] = ratio, *cell["quartiles"][variant]
            if not off and j == 0:
                said.append(
                    f"{device}: a step takes {cell['ratio']['TriAdaptLoRA']:.2f} times the limit with "
                    f"TriAdaptLoRA, {cell['ratio']['LoRA']:.2f} with LoRA, {cell['ratio']['full']:.2f} in full"
                )
        found.pop("limit", None)  # it is 1
        for k, (variant, points) in enumerate(found.items()):
            middle, low, high = np.array([points[x] for x in sorted(points)]).T
            beside = [
                x * 1.03 ** (k - len(found) / 2) for x in sorted(points)
            ]  # so that the bars stand side by side
            axes.vlines(beside, low, high, color=style(variant)["color"], linewidth=0.6)
            (handles[variant],) = axes.plot(beside, middle, **style(variant), linewidth=1.2)
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        name_ticks(axes, sorted({x for points in found.values() for x in points}), label)
        axes.set(ylabel=f"step time, limit = 1\n({device})" if j == 0 else "")
    if not handles:
        raise Missing
    figure.legend(handles.values(), handles, ncols=4, loc="outside lower center")
    figure.suptitle("\n".join(said) or "Step time against the limit", fontsize=11)
    return figure


def draw_compare(cells: list[dict]) -> plt.Figure:
    """A panel per task: differences to LoRA, each seed, mean, 95 % interval. Full fine-tuning is far off the scale."""
    tasks = per_task(cells)
    there = {
        row: None
        for row in [*itertools.chain(*SUMMARY.values()), *(c["row"] for c in cells)]
        if any(row in r for r in tasks.values())
    }
    names = [row for row in there if row not in ("full fine-tuning", "LoRA")][::-1]
    size = 3 * len(tasks) + 2, 0.28 * len(names) + 2.2
    figure, panels = plt.subplots(
        1, len(tasks), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    for axes, (task, rows) in zip(panels[0], tasks.items()):
        (_, sign, label), signs = metric_of(rows), []
        for y, row in enumerate(names):
            if gaps := paired(rows, row):
                axes.plot(bootstrap(gaps), [y, y], color=style(row)["color"], linewidth=3)
                seeds_and_mean(axes, y, gaps, row)
                signs += [sign * sure_sign(gaps)] if row.startswith(GROWTHS) else []
        axes.axvline(0, color=COLOURS["LoRA"][0], linestyle="--")
        side = "right" if sign > 0 else "left"
        axes.set(xlabel=f"{label}\nminus LoRA's ({side} is better)", yticks=range(len(names)))
        axes.set_yticklabels(names, fontsize=8)
        axes.set_title(
            f"{task}\nof {len(signs)} growths {signs.count(1)} better, {signs.count(-1)} worse",
            fontsize=11,
        )
    random, uniform = (
        sum(
            metric_of(rows)[1] * sure_sign(paired(rows, "linear", f"linear, {control}")) > 0
            for rows in tasks.values()
        )
        for control in ("random", "uniform")
    )
    best, control = (
        f"linear, {signal}, equal numbers, slow core, from rank 2" for signal in ("worth", "random")
    )
    ahead = [
        sum(
            metric_of(rows)[1] * sure_sign(paired(rows, best, other)) > 0 for rows in tasks.values()
        )
        for other in ("LoRA", control)
    ]
    figure.suptitle(
        f"By 95 % intervals the paper's importance (linear) is better than random choice on {random} "
        f"and than uniform choice on {uniform} of {len(tasks)} tasks;\nworth, with a slow core, from rank 2 "
        f"(last row), than LoRA on {ahead[0]} and than random choice on {ahead[1]}",
        fontsize=12,
    )
    return figure


FIGURES = {
    "method": (draw_method, None),
    "growth": (draw_growth, None),
    "ranks": (draw_ranks, "compare.jsonl"),
    "importance": (draw_importance, "first_run/log.jsonl"),
    "parameters": (draw_parameters, "compare.jsonl"),
    "low_data": (draw_low_data, "low_data.jsonl"),
    "planted": (draw_planted, "planted.jsonl"),
    "bench": (draw_bench, "bench.jsonl"),
    "compare": (draw_compare, "compare.jsonl"),
}


def draw(name: str, folder: Path = HERE) -> None:
    """Write FOLDER/NAME.png from the results in it, in 256 colours: enough, and a third of the bytes."""
    function, file = FIGURES[name]
    path, temporary = folder / f"{name}.png", folder / f".{name}.tmp.png"
    try:
        figure = function(
            [json.loads(line) for line in (folder / file).read_text().splitlines()] if file else []
        )
    except (FileNotFoundError, Missing):
        return print(f"{path}: skipped, no results for it in {folder / file}")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    with Image.open(temporary) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(temporary, optimize=True)
    if temporary.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{temporary} has {temporary.stat().st_size} bytes, more than {MOST_BYTES}"
        )
    temporary.rename(path)
    print(path)


if __name__ == "__main__":
    if unknown := {*sys.argv[1:]} - {*FIGURES}:
        sys.exit(
            f"no figure is called {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}"
        )
    for figure_name in sys.argv[1:] or FIGURES:
        draw(figure_name)
    if not sys.argv[1:]:
        write_pages()
