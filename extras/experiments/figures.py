"""Draws the figures of extras/RESULTS.md in extras/figures, from the files in results/.

python -m extras.experiments.figures
"""

from extras.experiments.tables import ROOT, TASKS, interval, minus_lora, pace_differences
from plots.run import BLUE, GRAY, GREEN, Figure, to_png

ROWS = ["importance", "random", "uniform", "worth", "half-rate importance", "half-rate LoRA"]


def draw_losses() -> Figure:
    """For each task the mean difference of the test loss from LoRA's, and its interval."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, task in zip(panels, TASKS, strict=True):
        for y, row in enumerate(reversed(ROWS)):
            values = minus_lora(task, row)
            if values:  # the row was run on this task
                one = interval(values)
                color = GRAY if row == "half-rate LoRA" else BLUE
                axes.errorbar(one.mean, y, xerr=one.half, fmt="o", color=color, capsize=4)
        axes.axvline(0, color=GRAY, linestyle="--")
        title = "CoLA (hardly learned)" if task == "CoLA" else task
        axes.set(title=title, yticks=range(len(ROWS)), yticklabels=reversed(ROWS))
        axes.set_ylim(-0.6, len(ROWS) - 0.4)
        edge = 1.1 * max(abs(limit) for limit in axes.get_xlim())
        axes.set_xlim(-edge, edge)
        axes.locator_params(axis="x", nbins=4)
    figure.suptitle("Is growth better than LoRA? (left of the line: lower test loss than LoRA)")
    figure.supxlabel(
        "test loss minus LoRA's, in nats, with 95 % intervals over 12 seeds (the scales differ)",
        fontsize=10,
    )
    return figure


def draw_pace() -> Figure:
    """The mean difference of the test loss from LoRA's for each interval, and its interval."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, color, marker, shift in (
        ("importance", BLUE, "o", 0.98),
        ("random", GREEN, "s", 1.02),
    ):
        points = [(steps * shift, interval(own)) for steps, own in pace_differences(name).items()]
        x = [steps for steps, _ in points]
        y = [one.mean for _, one in points]
        look = {"color": color, "marker": marker, "capsize": 4}
        axes.errorbar(x, y, yerr=[one.half for _, one in points], label=name, **look)
    axes.axhline(0, color=GRAY, linestyle="--", label="LoRA")
    ticks = [*pace_differences("random")]
    axes.set(
        title="What does slow growth cost? (prose, 8 seeds)",
        xlabel="steps from one growth to the next (log scale)",
        ylabel="test loss minus LoRA's, in nats per token\n(above the line: worse than LoRA)",
        xscale="log",
    )
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    title = "what decides which matrices grow (95 % intervals of paired differences)"
    figure.legend(loc="outside lower center", ncols=3, title=title)
    return figure


FIGURES = {"losses.png": draw_losses, "pace.png": draw_pace}


def main() -> None:
    for name, draw in FIGURES.items():
        path = ROOT / "extras" / "figures" / name
        path.write_bytes(to_png(draw(), dpi=130))
        print(path)


if __name__ == "__main__":
    main()
