"""Draw plots/compare.png from plots/compare.jsonl: how far each way to adapt is from LoRA, seed by seed.

    python plots/draw.py
"""
import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from plots.readme import bootstrap, chosen_cells  # noqa: E402

COLOURS = {"LoRA": "#777777", "core": "#000000", "linear": "#0072B2", "exponential": "#56B4E9", "fixed": "#009E73",
           "random": "#E69F00", "uniform": "#D55E00", "sensitivity": "#CC79A7"}  # told apart by the colour-blind


def colour(row: str) -> str:
    return [shade for name, shade in COLOURS.items() if name in row][-1]  # the most special name


def draw_comparison(results: Path, path: Path) -> None:
    """A panel per task: paired differences to LoRA, mean, 95 % interval and each seed. Full fine-tuning is far off the scale."""
    cells = [json.loads(line) for line in results.read_text().splitlines()]
    tasks = [*dict.fromkeys(cell["task"] for cell in cells)]
    rows = [row for row in dict.fromkeys(cell["row"] for cell in cells) if row not in ("full fine-tuning", "LoRA")][::-1]
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 4.8), sharey=True, layout="constrained", squeeze=False)
    for axes, task in zip(panels[0], tasks):
        chosen = chosen_cells([cell for cell in cells if cell["task"] == task])
        metric = "accuracy" if "accuracy" in chosen["LoRA"][0]["test"] else "loss"
        for y, row in enumerate(rows):
            seeds = [seed for seed in chosen[row] if seed in chosen["LoRA"]]
            gaps = [chosen[row][seed]["test"][metric] - chosen["LoRA"][seed]["test"][metric] for seed in seeds]
            axes.plot(bootstrap(gaps), [y, y], color=colour(row), linewidth=3)
            axes.plot(gaps, [y] * len(gaps), "|", color=colour(row), markersize=8)
            axes.plot(statistics.mean(gaps), y, "o", color=colour(row))
        axes.axvline(0, color=COLOURS["LoRA"], linestyle="--")
        unit = "accuracy minus LoRA's\nright is better" if metric == "accuracy" else "loss minus LoRA's, nats per token\nleft is better"
        axes.set(title=task, xlabel=f"test {unit}", yticks=range(len(rows)), yticklabels=rows)
    figure.suptitle("On text no growth beats LoRA (dashed), on modules it is mixed; the paper's importance is no better "
                    "than random or uniform choice")
    figure.savefig(path.with_suffix(".tmp.png"), dpi=110)
    path.with_suffix(".tmp.png").rename(path)
    plt.close(figure)


if __name__ == "__main__":
    draw_comparison(HERE / "compare.jsonl", HERE / "compare.png")
