"""What a run's log holds, and what it says to people: a line for the console per entry, and the four panels of run.png.

python plots/run.py runs/NAME      # tells and draws runs/NAME/log.jsonl again
"""

import json
import math
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#777777",
)  # told apart by the colour-blind
KINDS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]


def planned_growth(allocator) -> list[tuple[int, int]]:
    """(step, total rank after it) of all allocations to come: scores decide who grows, never how many."""
    total, plan = allocator.total_rank, []
    for t in range(1, allocator.total_steps + 1):
        if k := allocator.count(t, total):
            total = min(total + k * allocator.rank_step, allocator.budget)
            plan.append((t, total))
    return plan


def log_entry(run, kind: str, **values) -> dict:
    """A line of log.jsonl: how far a train.Run is, each matrix's rank, importance and score, what kind tells, and values."""
    args, allocator = run.args, run.allocator
    ranks = {name: adapter.rank for name, adapter in run.adapters.items()}
    entry = {
        "kind": kind,
        "step": run.step,
        "total_rank": sum(ranks.values()),
        "ranks": ranks,
        "trainable": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
    }
    if allocator:
        entry |= {"score": allocator.scores(), "importance": allocator.importances()}
    if kind == "start":
        entry |= {
            "device": str(run.device),
            "settings": vars(args),
            "classes": run.classes,
            "parameters": sum(p.numel() for p in run.model.parameters()),
        }
        entry |= (
            {"plan": planned_growth(allocator), "budget": allocator.budget} if allocator else {}
        )
    if kind == "allocation":
        entry |= {
            "score": allocator.decided,
            "threshold": min(allocator.decided[name] for name in values["grown"]),
        }
    if kind == "end":
        entry |= {
            "seconds": run.seconds,
            "growth_seconds": run.growth_seconds,
            "peak_trainable": max(entry["trainable"] for entry in run.log),
        }
    return entry | values


def results(entry: dict, split: str) -> str:
    """A split's results in words."""
    text = f"{split} loss {entry[f'{split}_loss']:.4f} nats"
    if f"{split}_accuracy" in entry:
        return (
            text
            + f", accuracy {entry[f'{split}_accuracy']:.1%}, macro F1 {entry[f'{split}_f1']:.3f}"
        )
    return text + f"/token, perplexity {math.exp(entry[f'{split}_loss']):.2f}"


def tell(log: list[dict]) -> str:
    """The last entry of a log in words; the one text that the console shows of it."""
    entry = log[-1]
    if entry["kind"] == "start":
        settings, plan = entry["settings"], entry.get("plan")
        text = (
            f"device    {entry['device']}\n"
            f"model     {entry['parameters']:,} parameters, {entry['trainable']:,} of them trainable\n"
        )
        if entry["ranks"]:
            text += f"adapted   {len(entry['ranks'])} matrices ({settings['targets']}) by {settings['method']}\n"
        if plan:
            text += (
                f"growth    {settings['schedule']}: total rank {entry['total_rank']} -> {plan[-1][1]} of a budget of "
                f"{entry['budget']}, {len(plan)} allocations from step {plan[0][0]} to step {plan[-1][0]}\n"
            )
            if plan[-1][1] < entry["budget"]:
                text += (
                    f"warning   {entry['budget'] - plan[-1][1]} ranks of the budget can't be spent; lower --interval or "
                    "--warmup, or raise --rank-step or --top-k\n"
                )
        if entry["classes"]:
            text += f"classes   {' '.join(entry['classes'])}\n"
        return text + f"base      {results(entry, 'test')}"
    if entry["kind"] == "allocation":
        return (
            f"step {entry['step']:5}  total rank {entry['total_rank']}/{log[0]['budget']}, threshold "
            f"{entry['threshold']:+.1e}, grown: {' '.join(entry['grown'])}"
        )
    if entry["kind"] == "eval":
        return (
            f"step {entry['step']:5}  train loss {entry['train_loss']:.4f}  {results(entry, 'val')}  "
            f"total rank {entry['total_rank']}  trainable {entry['trainable']:,}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s"
        )
    text = ""
    for word, end in {"before": log[0], "after": entry}.items():
        text += f"\n{word} adapting: {results(end, 'test')}\n{end.get('sample', '').strip()}\n"
    return text + (
        f"\ntrainable parameters: {log[0]['trainable']:,} at first, {entry['peak_trainable']:,} at most, "
        f"{entry['trainable']:,} in the end\n"
        f"{entry['seconds']:.1f} s of training, {entry['growth_seconds']:.2f} s of growth"
    )


def split_name(name: str) -> tuple[str, str]:
    """("blocks.0", "q") of blocks.0.q."""
    return tuple(name.rpartition(".")[::2])


def draw_run(folder: Path) -> Path:
    """Write run.png beside log.jsonl, in four panels, and return its path."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    evals = [entry for entry in log if entry["kind"] == "eval"]
    ranks = log[-1]["ranks"]
    figure, ((loss, total), (final, importance)) = plt.subplots(
        2, 2, figsize=(11, 7.5), layout="constrained"
    )
    before, after = log[0]["test_loss"], log[-1].get("test_loss")
    title = f"{config['method']}, {config['schedule']} schedule, {config['task'] or config['data']}: test loss {before:.3f}"
    figure.suptitle(title + (f" to {after:.3f} nats" if after else " before adapting"))

    steps = [entry["step"] for entry in evals]
    loss.plot(
        steps, [entry["train_loss"] for entry in evals], color=GREY, linestyle="--", label="train"
    )
    loss.plot(
        steps, [entry["val_loss"] for entry in evals], color=BLUE, marker="o", label="validation"
    )
    loss.set(title="How well does it predict?", xlabel="step", ylabel="loss (nats)")
    loss.legend()

    if not ranks:
        for axes in (total, final, importance):
            axes.text(0.5, 0.5, "no adapters", ha="center", transform=axes.transAxes)
            axes.set_axis_off()
    else:
        draw_ranks(total, final, importance, log, config, ranks)
    path = folder / "run.png"
    figure.savefig(folder / ".run.tmp.png", dpi=90)
    (folder / ".run.tmp.png").rename(path)
    plt.close(figure)
    return path


def draw_ranks(
    total, final, importance, log: list[dict], config: dict, ranks: dict[str, int]
) -> None:
    """Fill the three panels that need adapters."""
    total.step(
        [entry["step"] for entry in log],
        [sum(entry["ranks"].values()) for entry in log],
        where="post",
        color=BLUE,
    )
    total.axhline(config["rank"] * len(ranks), color=ORANGE, linestyle="--", label="budget")
    total.set(
        title="When is the rank budget spent?", xlabel="step", ylabel="total rank", ylim=(0, None)
    )
    total.legend(loc="lower right")

    blocks, kinds = ([*dict.fromkeys(split_name(name)[i] for name in ranks)] for i in (0, 1))
    grid = [
        [ranks.get(f"{block}.{kind}".lstrip("."), float("nan")) for kind in kinds]
        for block in blocks
    ]
    image = final.imshow(grid, cmap="cividis", aspect="auto")
    for i, row in enumerate(grid):
        for j, rank in enumerate(row):
            if rank == rank:
                dark = image.norm(rank) < 0.5
                final.text(
                    j, i, int(rank), ha="center", va="center", color="white" if dark else "black"
                )
    final.set(
        title="Which matrices got the rank?",
        xticks=range(len(kinds)),
        xticklabels=kinds,
        yticks=range(len(blocks)),
        yticklabels=[re.sub(r"^.*\.(?=\d+$)", "block ", block) for block in blocks],
    )

    measured = [entry for entry in log if "importance" in entry]
    for kind, colour in zip(kinds, KINDS * len(kinds)):
        names = [name for name in ranks if split_name(name)[1] == kind]
        for name in names:
            importance.plot(
                [entry["step"] for entry in measured],
                [entry["importance"][name] for entry in measured],
                color=colour,
                alpha=0.8,
                linewidth=1,
                label=kind if name == names[0] else None,
            )
    importance.set(
        title=r"Importance $F=\|L+U\|_F/r$: it falls where rank is added",
        xlabel="step",
        ylabel="F (no unit)",
    )
    if measured:
        importance.legend(ncols=2)
    else:
        importance.text(
            0.5, 0.5, "not measured: no growth", ha="center", transform=importance.transAxes
        )


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "log.jsonl").exists():
        sys.exit("usage: python plots/run.py runs/NAME   (a folder with a log.jsonl)")
    lines = [json.loads(line) for line in Path(sys.argv[1], "log.jsonl").read_text().splitlines()]
    for length in range(1, len(lines) + 1):
        print(tell(lines[:length]))
    print(draw_run(Path(sys.argv[1])))
