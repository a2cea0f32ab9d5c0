"""Draw a run in four panels: loss, total rank, rank of each matrix, importance.

train.py does this at its end. This draws a run again, and also one that is not finished:

python plots/run.py runs/NAME      # reads runs/NAME/log.jsonl, writes runs/NAME/run.png
"""

import io
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path
from statistics import mean

try:
    import matplotlib  # noqa: F401
except ValueError:  # MPLBACKEND is a notebook's, and not installed here. No backend is needed.
    os.environ.pop("MPLBACKEND", None)
    for module in [name for name in sys.modules if name.startswith("matplotlib")]:
        del sys.modules[module]  # half imported
from matplotlib.figure import Figure

# The palette of Okabe and Ito. Color-blind readers can tell its colors apart.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
BLUE, ORANGE, GREEN, PINK, RED, SKY = PALETTE
GRAY, LIGHT_GRAY = "#777777", "#DDDDDD"
MARKERS = "os^Dv*"
# Schedules and methods have these colors in every figure.
COLORS = {"linear": BLUE, "exponential": ORANGE, "fixed": GREEN, "lora": GRAY, "full": "black"}

# What a run without ranks or importance shows in their place: key of the log, title, unit.
OTHER_PANELS = [
    ("grad_norm", "Is the training stable?", "gradient norm (no unit)"),
    ("tokens_per_second", "How fast is the training?", "tokens per second"),
    ("lr", "How large are the steps?", "learning rate (no unit)"),
]


def draw_run(log: list[dict]) -> bytes:
    """The figure of a run as a PNG, from the entries of its log.jsonl."""
    return to_png(make_figure(log))


def make_figure(log: list[dict]) -> Figure:
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(describe(log))
    panels = list(figure.subplots(2, 2).flat)
    draw_loss(panels.pop(0), log)
    if log[0]["ranks"]:
        draw_total_rank(panels.pop(0), log)
        draw_ranks(panels.pop(0), log)
    if log[0].get("importance"):
        draw_importance(panels.pop(0), log)
    for axes, (key, title, unit) in zip(panels, OTHER_PANELS, strict=False):
        measured = [entry for entry in log if key in entry]
        values = [entry[key] for entry in measured]
        axes.plot([entry["step"] for entry in measured], values, color=BLUE, marker="o")
        label_axes(axes, log, title, unit)
        axes.set_ylim(0, 1.1 * max(values, default=1))
    return figure


def describe(log: list[dict]) -> str:
    """The title: what was trained, on which data, and the result."""
    first, last, settings = log[0], log[-1], log[0]["settings"]
    what = [settings["method"], f"data {plain(settings['data'])}", f"seed {settings['seed']}"]
    if first["ranks"]:
        grows = first["budget"] is not None
        what.insert(1, f"{settings['schedule']} schedule" if grows else "no growth")
    if last["kind"] == "end":
        result = (
            f"test loss {first['test_loss']:.3f} before training, {last['test_loss']:.3f} after"
        )
    else:
        result = f"not finished: step {last['step']} of {settings['steps']}"
    return f"{', '.join(what)}\n{result}"


# The panels.


def draw_loss(axes, log: list[dict]) -> None:
    evals = [entry for entry in log if entry["kind"] == "eval"]
    tests = [entry for entry in log if "test_loss" in entry]
    steps = [entry["step"] for entry in evals]
    axes.plot(steps, [e["train_loss"] for e in evals], color=GRAY, linestyle="--", label="train")
    axes.plot(steps, [e["val_loss"] for e in evals], color=BLUE, marker="o", label="validation")
    look = {"color": RED, "marker": "D", "markersize": 8, "linestyle": "", "clip_on": False}
    axes.plot([e["step"] for e in tests], [e["test_loss"] for e in tests], label="test", **look)
    label_axes(axes, log, "How well does the model predict?", f"loss ({loss_unit(log)})")
    axes.legend()


def loss_unit(log: list[dict]) -> str:
    return "nats per token" if "test_perplexity" in log[0] else "unit of the task"


def draw_total_rank(axes, log: list[dict]) -> None:
    budget, warmup = log[0]["budget"], log[0]["settings"]["warmup"]
    steps = [entry["step"] for entry in log]
    totals = [entry["total_rank"] for entry in log]
    axes.step(steps, totals, where="post", color=BLUE, linewidth=2, label="total rank")
    if budget is not None:
        axes.axvspan(0, warmup, color=LIGHT_GRAY, label=f"warm-up, to step {warmup}")
        axes.axhline(budget, color=GRAY, linestyle="--", label=f"budget, {budget}")
        spent = [step for step, total in zip(steps, totals, strict=True) if total >= budget]
        if spent:
            axes.plot(spent[0], budget, "o", color=BLUE, label=f"budget spent at step {spent[0]}")
    title = "Does the rank grow? No" if budget is None else "When does the rank grow?"
    label_axes(axes, log, title, "total rank of all matrices")
    axes.set_ylim(0, 1.1 * max(totals[-1], budget or 0))
    axes.legend(loc="lower right")


def draw_ranks(axes, log: list[dict]) -> None:
    first, last = log[0]["ranks"].values(), log[-1]["ranks"].values()
    draw_grid(axes, log[-1]["ranks"], min(first), max(last))
    start = f"{min(first)}" if min(first) == max(first) else f"{min(first)} to {max(first)}"
    if log[0]["budget"] is None:
        axes.set_title("Which rank does each matrix have?")
    else:
        now = f"rank at step {log[-1]['step']}, {start} at the start"
        axes.set_title(f"Which matrices grew?\n({now})")


def draw_grid(axes, ranks: dict[str, int], least: int, most: int) -> dict[str, tuple[int, int]]:
    """Draw a row for each block and a column for each kind. Returns {name: (column, row)}."""
    blocks = list(dict.fromkeys(split_name(name)[0] for name in ranks))
    kinds = list(dict.fromkeys(split_name(name)[1] for name in ranks))
    places = {}
    grid = [[float("nan")] * len(kinds) for _ in blocks]
    for name, rank in ranks.items():
        block, kind = split_name(name)
        x, y = places[name] = kinds.index(kind), blocks.index(block)
        grid[y][x] = rank
    image = axes.imshow(grid, cmap="cividis", vmin=least, vmax=most, aspect="auto")
    size = min(12, 170 / len(blocks), 400 / len(kinds))  # points
    for name, place in places.items():
        color = "white" if image.norm(ranks[name]) < 0.5 else "black"
        axes.text(*place, ranks[name], ha="center", va="center", color=color, fontsize=size)
    axes.set_xticks(range(len(kinds)), [plain(kind, 20) for kind in kinds])
    axes.set_yticks(range(len(blocks)), [plain(block, 20) for block in blocks])
    axes.tick_params("y", labelsize=min(10, size))
    if sum(map(len, kinds)) > 50:
        axes.tick_params("x", labelsize=min(10, size), rotation=45)
    return places


def draw_importance(axes, log: list[dict]) -> None:
    """A line for each kind of matrix, the mean over the blocks. Growth alone lowers F, so F is
    shown relative to that of an untrained core of the same rank, which is 1 / sqrt(r)."""
    measured = [entry for entry in log if entry["kind"] != "allocation"]  # enough points
    steps = [entry["step"] for entry in measured]
    kinds = {}
    for name in log[0]["importance"]:
        kinds.setdefault(split_name(name)[1], []).append(name)
    first = log[0]
    triadapt = all(  # and not the importance of a fork
        math.isclose(F, first["ranks"][name] ** -0.5, rel_tol=0.01)
        for name, F in first["importance"].items()
    )
    lines = {kind: [] for kind in kinds}
    for kind, names in kinds.items():
        for entry in measured:
            untrained = [entry["ranks"][name] ** -0.5 if triadapt else 1 for name in names]
            F = [entry["importance"][name] for name in names]
            lines[kind].append(mean(a / b for a, b in zip(F, untrained, strict=True)))
    changes = {kind: max(line) - min(line) for kind, line in lines.items()}
    most = sorted(changes, key=changes.get, reverse=True)[: len(PALETTE)]
    shown = [kind for kind in kinds if kind in most]
    for kind, color, marker in zip(shown, PALETTE, MARKERS, strict=False):
        axes.plot(steps, lines[kind], color=color, marker=marker, markersize=5, label=plain(kind))
    title = "How does the importance of each kind change?"
    if triadapt:
        axes.axhline(1, color=GRAY, linestyle="--", label="untrained")
        title += "\n(relative to an untrained matrix of the same rank)"
    if len(shown) < len(kinds):
        title += f"\nShown: the {len(shown)} of {len(kinds)} kinds that change most"
    unit = "mean of F / F untrained" if triadapt else "mean of the importance"
    label_axes(axes, log, title, f"{unit} (no unit)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # next to the lines


def label_axes(axes, log: list[dict], title: str, ylabel: str) -> None:
    steps = log[0]["settings"]["steps"]
    axes.set(title=title, xlabel="optimizer step", ylabel=ylabel, xlim=(0, steps))


# Names and files.


def split_name(name: str) -> tuple[str, str]:
    """(block, kind) of a matrix: ("blocks.0", "q") of blocks.0.q, ("", "head") of head."""
    found = re.fullmatch(r"(.*?\d+)\.(.+)", name)
    return found.groups() if found else ("", name)


def plain(text: str, width: int = 40) -> str:
    """Any text for a figure: at most its last `width` letters, and a $ is a letter."""
    if len(text) > width:
        text = "..." + text[-width:]
    text = text.encode(errors="replace").decode()  # the name of a file need not be valid Unicode
    return text.replace("$", r"\$")


def to_png(figure: Figure, dpi: int = 90) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # such a letter is drawn as a box
        figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def read_log(folder: Path) -> list[dict]:
    lines = Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "log.jsonl").is_file():
        sys.exit("usage: python plots/run.py runs/NAME   (a folder with a log.jsonl)")
    path = Path(sys.argv[1], "run.png")
    path.write_bytes(draw_run(read_log(path.parent)))
    print(path)
