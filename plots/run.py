"""Draw a run: loss, total rank, who got the rank, and the importance. train.py does it at its end.

python plots/run.py runs/NAME      # draws runs/NAME/log.jsonl again, as runs/NAME/run.png
"""

import io
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Told apart by the colour-blind.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"
KIND_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]


def split_name(name: str) -> tuple[str, str]:
    """("blocks.0", "q") of blocks.0.q; ("layer.0", "output.dense") of layer.0.output.dense; ("",
    "head") of what is in no block."""
    found = re.fullmatch(r"(.*?\d+)\.(.+)", name)
    if found is None:
        return "", name
    return found.group(1), found.group(2)


@matplotlib.rc_context({"text.parse_math": False})  # a $ in the name of a file is a letter
def draw_run(log: list[dict]) -> bytes:
    """The four panels as a PNG, from the entries of log.jsonl."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    settings = log[0]["settings"]
    before = log[0]["test_loss"]
    after = log[-1].get("test_loss")
    result = f"test {loss_of(log)} {before:.3f}"
    if after:
        result += f" to {after:.3f}"
    what = f"{settings['method']}, {settings['schedule']} schedule"
    source = settings["task"] or settings["data"]
    source = source.encode(errors="replace").decode()  # a name need not be UTF-8
    figure.suptitle(f"{what}, {source}: {result}")

    draw_loss(panels[0, 0], log)
    if log[0]["ranks"]:
        draw_total_rank(panels[0, 1], log)
        draw_ranks(panels[1, 0], log[-1]["ranks"])
        panels[1, 0].set_title("Which matrices got the rank?")
        draw_importance(panels[1, 1], log)
    else:
        for axes in panels.flat[1:]:
            axes.text(0.5, 0.5, "no adapters", ha="center", transform=axes.transAxes)
            axes.set_axis_off()

    file = io.BytesIO()
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return file.getvalue()


def loss_of(log: list[dict]) -> str:
    """What the loss of a run is: a task of scores has another one."""
    return "squared error" if "test_pearson" in log[0] else "loss (nats)"


def draw_loss(axes, log: list[dict]) -> None:
    evals = [entry for entry in log if entry["kind"] == "eval"]
    steps = [entry["step"] for entry in evals]
    train = [entry["train_loss"] for entry in evals]
    val = [entry["val_loss"] for entry in evals]
    axes.plot(steps, train, color=GREY, linestyle="--", label="train")
    axes.plot(steps, val, color=BLUE, marker="o", label="validation")
    axes.set(title="How well does it predict?", xlabel="step", ylabel=loss_of(log))
    axes.legend()


def draw_total_rank(axes, log: list[dict]) -> None:
    steps = [entry["step"] for entry in log]
    totals = [entry["total_rank"] for entry in log]
    axes.step(steps, totals, where="post", color=BLUE)
    if log[0]["settings"]["budget"] == "ranks":
        budget = log[0]["settings"]["rank"] * len(log[0]["ranks"])
        axes.axhline(budget, color=ORANGE, linestyle="--", label="budget")
        axes.legend(loc="lower right")
    axes.set(
        title="When is the rank budget spent?", xlabel="step", ylabel="total rank", ylim=(0, None)
    )


def draw_ranks(
    axes, ranks: dict[str, float], least: float | None = None, most: float | None = None
) -> dict[str, tuple[int, int]]:
    """A row for each block, a column for each kind of matrix, colours from least to most rank.
    Returns where each matrix is, {name: (x, y)}."""
    blocks = list(dict.fromkeys(split_name(name)[0] for name in ranks))
    kinds = list(dict.fromkeys(split_name(name)[1] for name in ranks))
    places = {}
    grid = [[float("nan")] * len(kinds) for _ in blocks]
    for name, rank in ranks.items():
        block, kind = split_name(name)
        x, y = kinds.index(kind), blocks.index(block)
        places[name] = (x, y)
        grid[y][x] = rank
    image = axes.imshow(grid, cmap="cividis", vmin=least, vmax=most, aspect="auto")
    for name, rank in ranks.items():
        colour = "white" if image.norm(rank) < 0.5 else "black"
        axes.text(*places[name], f"{rank:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(blocks)), [re.sub(r"^.*\.", "block ", block) for block in blocks])
    return places


def draw_importance(axes, log: list[dict]) -> None:
    """F of each matrix over the run, a colour for each kind."""
    axes.set_title("Importance: normalised Frobenius norm of the cores")
    axes.set(xlabel="step", ylabel="F = ‖L + U‖_F / r (no unit)")
    if "importance" not in log[0]:
        axes.text(0.5, 0.5, "not measured: no growth", ha="center", transform=axes.transAxes)
        return
    steps = [entry["step"] for entry in log]
    kinds = list(dict.fromkeys(split_name(name)[1] for name in log[0]["ranks"]))
    labelled = set()
    for name in log[0]["ranks"]:
        kind = split_name(name)[1]
        colour = KIND_COLOURS[kinds.index(kind) % len(KIND_COLOURS)]
        label = None if kind in labelled else kind
        labelled.add(kind)
        values = [entry["importance"][name] for entry in log]
        axes.plot(steps, values, color=colour, alpha=0.8, linewidth=1, label=label)
    axes.legend(ncols=2)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "log.jsonl").exists():
        sys.exit("usage: python plots/run.py runs/NAME   (a folder with a log.jsonl)")
    folder = Path(sys.argv[1])
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "run.png").write_bytes(draw_run([json.loads(line) for line in lines]))
    print(folder / "run.png")
