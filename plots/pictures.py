"""Make the pictures of README in plots/: method.png, growth.png and run.gif.

python plots/pictures.py             # run.gif shows the run in plots/first_run
python plots/pictures.py runs/NAME   # run.gif shows another run
"""

import io
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from model import GPT, GPTConfig
from plots import run
from plots.run import BLUE, COLORS, GRAY, GREEN, LIGHT_GRAY, ORANGE, RED, Figure
from train import fill_defaults, make_parser
from triadapt import RankAllocator, TriAdaptLinear, add_adapters

GIF_BYTES = 1_000_000  # at most


# method.png

ENTRIES = {"trained": LIGHT_GRAY, "new, 0": "#B5DDF5", "new, 1": GREEN, "new, random": ORANGE}


def draw_method() -> Figure:
    """The factors of a real adapter after growth. An entry is "trained" only if it did not move."""
    torch.manual_seed(139)  # of entries that are not shown as 0.0
    adapter = TriAdaptLinear(nn.Linear(5, 6), rank=3, target_rank=4).requires_grad_(False)
    for name in adapter.GROWS_ALONG:
        getattr(adapter, name).normal_(0, 0.7)  # as if trained
    old, old_update = factors_of(adapter), torch.mm(*adapter.factors())
    adapter.grow(1)
    new, new_update = factors_of(adapter), torch.mm(*adapter.factors())
    change = ((new_update - old_update).norm() / old_update.norm()).item()

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(aspect="equal", xlim=(-0.8, 22.8), ylim=(6.2, -0.9))
    axes.set_axis_off()
    left = 0
    names = ["B (d_out, r)", "L, lower triangle", "U, upper triangle", "A (r, d_in)"]
    added = ["a column of zeros", "a row that ends in 1", "a column of zeros", "a random row"]
    signs = ["(", "+", ")", ""]
    for factor, name, what, sign in zip(new, names, added, signs, strict=True):
        values = new[factor]
        rows, columns = values.shape
        top = (6 - rows) / 2  # centered, because B has six rows
        draw_entries(axes, left, top, old[factor], values)
        middle = left + columns / 2
        axes.text(middle, top - 0.3, f"{name}\n+ {what}", ha="center", fontsize=12)
        axes.text(left + columns + 0.9, 3, sign, ha="center", va="center", fontsize=30)
        left += columns + 1.8
    for label, color in ENTRIES.items():
        axes.plot([], [], "s", color=color, markersize=14, label=label)
    figure.legend(ncols=4, loc="outside lower center", fontsize=12, frameon=False)
    figure.suptitle(
        "What is added when a matrix grows from rank 3 to rank 4?\n"
        f"No trained entry moves, and the product B (L + U) A changes by {change:.1g}"
    )
    return figure


def factors_of(adapter: TriAdaptLinear) -> dict[str, Tensor]:
    """B, L, U and A. Outside of a triangle there is nan."""
    row, column = torch.tril_indices(adapter.rank, adapter.rank)
    L, U = torch.full((2, adapter.rank, adapter.rank), torch.nan)
    L[row, column] = adapter.lora_L
    U[column, row] = adapter.lora_U
    return {"B": adapter.lora_B.clone(), "L": L, "U": U, "A": adapter.lora_A.clone()}


def draw_entries(axes, left: float, top: float, old: Tensor, new: Tensor) -> None:
    for i, j in (~new.isnan()).nonzero().tolist():
        value = new[i, j].item()
        kind, text = "new, random", f"{value:.1f}"
        if i < old.shape[0] and j < old.shape[1] and value == old[i, j]:
            kind = "trained"
        elif value in (0, 1):
            kind, text = f"new, {value:.0f}", f"{value:.0f}"
        axes.bar(left + j + 0.5, 0.94, 0.94, bottom=top + i + 0.03, color=ENTRIES[kind])
        weight = "normal" if kind == "trained" else "bold"
        axes.text(left + j + 0.5, top + i + 0.5, text, ha="center", va="center", weight=weight)


# growth.png


def draw_growth() -> Figure:
    """The total rank during a default run of each schedule."""
    formulas = {
        "linear": "k = ⌊Q m⌋",
        "exponential": "k = ⌊exp(m ln Q)⌋",
        "fixed": f"k = {make_parser().get_default('top_k')}",
    }
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for schedule, marker in zip(formulas, run.MARKERS, strict=False):
        args = make_parser().parse_args(["--schedule", schedule])
        fill_defaults(args)
        allocator = make_allocator(args)
        plan = [(0, allocator.total_rank), *allocator.plan()]
        steps, totals = zip(*plan, strict=True)
        x, y = [*steps, args.steps], [*totals, totals[-1]]
        label = f"{schedule}, {formulas[schedule]}: spent at step {steps[-1]}"
        look = {"color": COLORS[schedule], "marker": marker, "markersize": 5}
        axes.step(x, y, where="post", label=label, markevery=range(1, len(steps), 4), **look)
    axes.axhline(allocator.budget, color=GRAY, linestyle="--", label=f"budget, {allocator.budget}")
    axes.axvspan(0, args.warmup, color=LIGHT_GRAY, label=f"warm-up, to step {args.warmup}")
    axes.set(
        title="When does the rank grow? A schedule says how many matrices grow at once (k)",
        xlabel=f"optimizer step (every {args.interval} steps, k matrices grow by one rank)",
        ylabel="total rank of all matrices",
        xlim=(0, args.steps),
        ylim=(0.4 * allocator.budget, 1.05 * allocator.budget),
    )
    legend = f"Q: ranks left at this step, m: step / {args.steps} (without the warm-up)"
    axes.legend(loc="lower right", title=legend)
    return figure


def make_allocator(args) -> RankAllocator:
    """The allocator of a run with these settings, on a model that is never trained."""
    gpt = GPT(GPTConfig())
    sizes = (args.method, args.rank, args.init_rank)
    return RankAllocator(
        add_adapters(gpt, args.target_modules, *sizes),
        torch.optim.SGD([p for p in gpt.parameters() if p.requires_grad]),
        total_steps=args.steps,
        warmup=args.warmup,
        interval=args.interval,
        schedule=args.schedule,
        rank_step=args.rank_step,
        top_k=args.top_k,
    )


# run.gif


def draw_frame(log: list[dict], i: int) -> Figure:
    """The run at entry i of its log: ranks, total rank and validation loss."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplot_mosaic("RRRTT\nRRRLL")
    now, past = log[i], log[: i + 1]

    axes = panels["R"]
    least, most = min(log[0]["ranks"].values()), max(log[-1]["ranks"].values())
    places = run.draw_grid(axes, now["ranks"], least, most)
    axes.autoscale(False)
    for name in now.get("grown", []):
        x, y = places[name]
        axes.bar(x, 0.92, 0.92, bottom=y - 0.46, fill=False, edgecolor=RED, linewidth=4)
    axes.set_title(f"Rank of each matrix at step {now['step']} (framed: has just grown)")

    axes = panels["T"]
    run.label_axes(axes, log, "When does the rank grow?", "total rank")
    totals = [entry["total_rank"] for entry in past]
    axes.step([entry["step"] for entry in past], totals, where="post", color=BLUE, linewidth=2)
    axes.plot(now["step"], totals[-1], "o", color=BLUE, clip_on=False)
    budget = log[0]["budget"]
    axes.axhline(budget, color=GRAY, linestyle="--", label=f"budget, {budget}")
    axes.set(ylim=(0, 1.2 * budget), xlabel="")
    axes.legend(loc="lower right")

    axes = panels["L"]
    run.label_axes(axes, log, "Does the loss fall?", f"validation loss\n({run.loss_unit(log)})")
    evals = [entry for entry in past if entry["kind"] == "eval"]
    losses = [entry["val_loss"] for entry in evals]
    axes.plot([entry["step"] for entry in evals], losses, color=BLUE, marker="o")
    losses = [entry["val_loss"] for entry in log if entry["kind"] == "eval"]
    axes.set_ylim(min(losses) - 0.05, max(losses) + 0.05)
    return figure


def animate(log: list[dict]) -> bytes:
    """A GIF with a frame for each entry of the log but the last, which repeats the one before."""
    frames = []
    for i in range(len(log) - 1):
        frame = Image.open(io.BytesIO(run.to_png(draw_frame(log, i), dpi=104)))
        frames.append(frame.convert("RGB").quantize(128))
    times = [250] * (len(frames) - 1) + [4000]  # milliseconds
    file = io.BytesIO()
    first, *rest = frames
    first.save(file, "GIF", save_all=True, append_images=rest, duration=times, loop=0)
    return file.getvalue()


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "first_run"
    if not Path(folder, "log.jsonl").is_file():
        sys.exit(f"{folder}: not the folder of a run, because it has no log.jsonl")
    log = run.read_log(folder)
    if log[-1]["kind"] != "end" or log[0]["budget"] is None:
        sys.exit(f"{folder}: give a finished run whose rank grows")
    pictures = {
        "method.png": run.to_png(draw_method(), dpi=130),
        "growth.png": run.to_png(draw_growth(), dpi=130),
        "run.gif": animate(log),
    }
    if len(pictures["run.gif"]) > GIF_BYTES:
        sys.exit(f"run.gif has {len(pictures['run.gif'])} bytes, more than {GIF_BYTES}")
    for name, content in pictures.items():
        (HERE / name).write_bytes(content)
        print(HERE / name)


if __name__ == "__main__":
    main()
