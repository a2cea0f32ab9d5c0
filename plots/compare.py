"""Compare runs: a table of their results, and a figure of their losses and ranks.

python plots/compare.py runs/*                            # all runs
python plots/compare.py runs/A runs/B --out figure.png    # some of them

Runs that differ only in their seeds form a group, and each group has a row in the table. It shows
the settings in which the groups differ and the number of seeds. Then come means over the seeds:
final test loss (with the sample standard deviation), trained parameters at the end, and seconds.
The group with the lowest loss comes first.

Without --out the figure is compare.png next to the folder of the first run. If that exists, it is
compare-2.png, and so on: no file is replaced.
"""

import argparse
import itertools
import math
import sys
import textwrap
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))
from plots import run

WIDTH = 100  # columns of the table
IGNORED = ("seed", "out", "resume", "eval_interval")  # settings that make no other group
GROWTH = ("init_rank", "allocator", "warmup", "interval", "rank_step", "top_k")  # if ranks grow
NOTED = ("data", "base", "context", "steps")  # runs that differ in these are hard to compare
COLUMNS = ["seeds", "test loss", "deviation", "parameters", "seconds"]

Log = list[dict]


def select(logs: dict[str, Log]) -> tuple[list[Log], list[str]]:
    """The logs to compare, and notes on what a reader of the table should know."""
    selected, notes, seen = [], [], {}
    for folder, log in logs.items():
        settings = log[0]["settings"]
        key = str((settings["seed"], settings_of(log)))
        loss = log[-1].get("test_loss")
        if not is_finished(log):
            step = f"step {log[-1]['step']} of {settings['steps']}"
            notes.append(f"{folder} is not finished ({step}): only the figure has it")
        elif key not in seen:
            seen[key] = folder, loss
        elif math.isclose(loss, seen[key][1], rel_tol=1e-3):
            notes.append(f"{folder} is left out: it repeats {seen[key][0]} with the same seed")
            continue
        else:
            notes.append(f"{folder} has the settings and seed of {seen[key][0]}, but another loss")
        selected.append(log)
    facts = {name: [log[0]["settings"][name] for log in selected] for name in NOTED}
    facts["versions of Python or torch"] = [log[0].get("versions") for log in selected]
    facts["device"] = [log[0].get("device") for log in selected]
    facts["content of the data"] = [log[0].get("checksums", {}).get("data") for log in selected]
    for name, values in facts.items():
        if len(set(map(str, values))) > 1:
            notes.append(f"these runs differ in {name}: that alone may change the loss")
    return selected, notes


def settings_of(log: Log) -> dict:
    """The settings that had an effect, without seed and folder."""
    settings = log[0]["settings"]
    idle = IGNORED if log[0]["budget"] else (*IGNORED, *GROWTH)
    ratios = {"lr_ratios": log[0].get("lr_ratios")}  # of a fork such as LoRA+
    return {name: value for name, value in (settings | ratios).items() if name not in idle}


def is_finished(log: Log) -> bool:
    return log[-1]["kind"] == "end"


def group_runs(logs: list[Log]) -> dict[str, list[Log]]:
    """The logs by the settings that differ, such as "rank 8". The lowest mean loss comes first."""
    settings = [settings_of(log) for log in logs]
    names = dict.fromkeys(itertools.chain(*settings))  # a fork's runs may have more settings
    values = {n: {str(s.get(n)) for s in settings if n in s or n not in GROWTH} for n in names}
    names = [name for name in names if len(values[name]) > 1]
    groups = {}
    for log, known in zip(logs, settings, strict=True):
        label = ", ".join(f"{name} {known[name]}" for name in names if name in known)
        groups.setdefault(label or "all runs", []).append(log)
    return dict(sorted(groups.items(), key=lambda item: mean(losses_of(item[1]) or [math.inf])))


def losses_of(group: list[Log]) -> list[float]:
    """The final test losses of the finished runs."""
    return [log[-1]["test_loss"] for log in group if is_finished(log)]


def make_table(groups: dict[str, list[Log]]) -> str:
    """Aligned lines of at most WIDTH columns."""
    width = min(49, max(map(len, groups)))  # of the settings
    lines = [format_row("settings", COLUMNS, width)]
    for label, group in groups.items():
        ends = [log[-1] for log in group if is_finished(log)]
        losses = losses_of(group)
        cells = [str(len(ends)), "-", "-", "-", "-"]
        if ends:
            cells[1] = f"{mean(losses):.4f}"
            cells[3] = f"{mean(end['trainable'] for end in ends):,.0f}"
            cells[4] = f"{mean(end['seconds'] for end in ends):.0f}"
        if len(ends) > 1:
            cells[2] = f"{stdev(losses):.4f}"
        first, *rest = textwrap.wrap(label, width)
        lines += [format_row(first, cells, width), *rest]
    return "\n".join(lines)


def format_row(label: str, cells: list[str], width: int) -> str:
    return "{:{}}  {:>5}  {:>9}  {:>9}  {:>11}  {:>7}".format(label, width, *cells)


def make_figure(groups: dict[str, list[Log]]) -> run.Figure:
    """Losses and total rank of all runs, with a color and a marker for each group. A group of
    several seeds has a dash at its mean test loss."""
    labels = [textwrap.fill(run.plain(label, 400), 120) for label in groups]
    height = 4.5 + 0.25 * sum(label.count("\n") + 1 for label in labels)
    figure = run.Figure(figsize=(12, height), layout="constrained")
    loss, rank, result = figure.subplots(1, 3, width_ratios=[4, 4, 3])
    handles = []
    looks = zip(colors_of(groups), itertools.cycle(run.MARKERS), strict=False)
    for row, (group, (color, marker)) in enumerate(zip(groups.values(), looks, strict=False)):
        look = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2}
        for log in group:
            evals = [entry for entry in log if entry["kind"] == "eval"]
            ranked = [entry for entry in log if entry["ranks"]]
            lines = loss.plot([e["step"] for e in evals], [e["val_loss"] for e in evals], **look)
            totals = [entry["total_rank"] for entry in ranked]
            rank.step([e["step"] for e in ranked], totals, where="post", **look, markevery=0.1)
        handles += lines
        losses = losses_of(group)
        result.plot([row] * len(losses), losses, **look | {"linestyle": "", "markersize": 6})
        if len(losses) > 1:
            result.plot(row, mean(losses), "_", color=color, markersize=24, markeredgewidth=2)

    longest = max(itertools.chain(*groups.values()), key=lambda log: log[0]["settings"]["steps"])
    unit = run.loss_unit(longest)
    run.label_axes(loss, longest, "How fast does the loss fall?", f"validation loss ({unit})")
    run.label_axes(rank, longest, "When does the rank grow?", "total rank of all matrices")
    rank.set_ylim(0, None)
    counts = [len(losses_of(group)) for group in groups.values()]
    several = max(counts) > 1
    result.set(
        title="Which test loss is the lowest?" + ("" if several else "\n(one seed cannot tell)"),
        xlabel="number of seeds" + (" (dash: their mean)" if several else ""),
        ylabel=f"final test loss ({unit})",
        xlim=(-0.5, len(groups) - 0.5),
    )
    result.set_xticks(range(len(counts)), labels=counts)
    figure.legend(handles, labels, loc="outside lower center")
    return figure


def colors_of(groups: dict[str, list[Log]]) -> list[str]:
    """A color for each group: that of its schedule or method, if no group before has it."""
    palette = [*run.PALETTE[::-1], run.GRAY, "black"]
    colors = []
    for group in groups.values():
        settings = group[0][0]["settings"]
        wish = run.COLORS.get(settings["schedule"], run.COLORS.get(settings["method"]))
        free = [color for color in palette if color not in colors] or palette
        colors.append(wish if wish in free else free[0])
    return colors


def new_file(folder: Path) -> Path:
    """compare.png, or the first of compare-2.png, compare-3.png ... that does not exist."""
    paths = (folder / f"compare-{number}.png" for number in itertools.count(2))
    paths = itertools.chain([folder / "compare.png"], paths)
    return next(path for path in paths if not path.exists())


def main(argv: list[str] | None = None) -> None:
    sys.stdout.reconfigure(errors="replace")  # a console may not have every letter of a name
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, help="a new .png file")
    args = parser.parse_args(argv)
    folders = [folder for folder in args.runs if not folder.endswith(".png")]  # runs/* has figures
    for folder in folders:
        if not Path(folder, "log.jsonl").is_file():
            parser.error(f"{folder}: not the folder of a run, because it has no log.jsonl")
    if not folders:
        parser.error("give the folders of runs, such as runs/*")
    if args.out and (args.out.exists() or args.out.suffix != ".png"):
        parser.error(f"--out {args.out}: must be a new file that ends in .png")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")

    logs = {folder: run.read_log(folder) for folder in folders}
    logs, notes = select({folder: log for folder, log in logs.items() if log})  # it has begun
    groups = group_runs(logs)
    print(make_table(groups))
    if max(map(len, groups.values())) == 1:
        notes.append("one seed of each cannot tell them apart: run more with --seed")
    for note in notes:
        print(f"note: {note}")
    path = args.out or new_file(Path(folders[0]).absolute().parent)
    path.write_bytes(run.to_png(make_figure(groups)))
    print(f"look at {path}")


if __name__ == "__main__":
    main()
