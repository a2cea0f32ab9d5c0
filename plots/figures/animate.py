"""The moving picture at the top of README.md: ranks grow in the grid of matrices.

    python plots/figures/animate.py      # writes run.gif from plots/results/first_run/log.jsonl

A frame for each entry of that run's log but the last: the rank of every matrix, the total rank,
and the validation loss, as far as the run has come.
"""

import io
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from plots.run import BLUE, ORANGE, draw_ranks

GROWS = "#D55E00"  # the frame of who grows

LOG = ROOT / "plots/results/first_run/log.jsonl"
GIF = ROOT / "plots/figures/run.gif"
FRAME_MS, LAST_FRAME_MS = 140, 3000
MOST_BYTES = 600_000


def draw_frame(log: list[dict], i: int) -> plt.Figure:
    """The run at log[i]."""
    figure, panels = plt.subplot_mosaic("RRRTT\nRRRLL", figsize=(8, 3.6), layout="constrained")
    draw_who_grows(panels["R"], log, i)
    draw_total(panels["T"], log, i)
    draw_loss(panels["L"], log, i)
    return figure


def draw_who_grows(axes, log: list[dict], i: int) -> None:
    """The ranks, with a frame around those that have just grown."""
    least = min(log[0]["ranks"].values())
    most = max(log[-1]["ranks"].values())
    places = draw_ranks(axes, log[i]["ranks"], least, most)
    for text in axes.texts:
        text.set_fontsize(13)
    for name in log[i].get("grown", []):
        x, y = places[name]
        axes.add_patch(plt.Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, ec=GROWS, lw=3))
    axes.set_title(f"rank of each matrix at step {log[i]['step']}")


def draw_total(axes, log: list[dict], i: int) -> None:
    steps = [entry["step"] for entry in log[: i + 1]]
    totals = [entry["total_rank"] for entry in log[: i + 1]]
    axes.step(steps, totals, where="post", color=BLUE)
    axes.axhline(log[0]["budget"], color=ORANGE, linestyle="--", linewidth=1)
    axes.set(xlim=(0, log[-1]["step"]), ylim=(0, 1.1 * log[0]["budget"]))
    axes.set_title("total rank, and its budget", fontsize=10)


def draw_loss(axes, log: list[dict], i: int) -> None:
    evals = [entry for entry in log if entry["kind"] == "eval"]
    losses = [entry["val_loss"] for entry in evals]
    past = [entry for entry in evals if entry["step"] <= log[i]["step"]]
    axes.plot([e["step"] for e in past], [e["val_loss"] for e in past], color=BLUE, marker=".")
    axes.set(xlim=(0, log[-1]["step"]), ylim=(min(losses) - 0.05, max(losses) + 0.05))
    axes.set_xlabel("optimiser step")
    axes.set_title("validation loss (nats per token)", fontsize=10)


def animate(log: list[dict]) -> bytes:
    """All frames as a GIF, in one palette."""
    frames = []
    for i in range(len(log) - 1):  # the last entry, the end, looks as the one before
        figure = draw_frame(log, i)
        file = io.BytesIO()
        figure.savefig(file, dpi=80)
        plt.close(figure)
        frames.append(Image.open(file).convert("RGB"))
    palette = frames[-1].quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    file = io.BytesIO()
    frames[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        optimize=True,
    )
    return file.getvalue()


def main() -> None:
    log = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    content = animate(log)
    if len(content) > MOST_BYTES:
        sys.exit(f"{GIF}: {len(content)} bytes, more than {MOST_BYTES}")
    GIF.write_bytes(content)
    print(GIF)


if __name__ == "__main__":
    main()
