"""Methods x tasks x seeds, by train.py's own code: does growth pay, and does F know where?

    python plots/experiments/compare.py                              # all: hours of two CPU cores
    python plots/experiments/compare.py --tasks prose --seeds 1      # a part of it
    python plots/experiments/compare.py --share 0 2                  # every second row, for two
                                                                     # processes side by side

Rules: the same steps and batches for all. The learning rate of each task and row is the one of
RATES with the best validation loss on seed 0; then it runs on the other seeds. Test results are of
the last step, and of the step that was best on validation. A line of plots/results/compare.jsonl
is a finished run with its whole configuration. `python plots/figures/draw.py` makes tables and
figures of them.
"""

import argparse
import contextlib
import functools
import io
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import train
from plots import signals  # noqa: F401  (enters worth and the others in SIGNALS)
from plots.experiments import adalora, cells

TASKS = {
    "prose": [],
    "prose, 20 000 tokens": [],
    "modules": ["--task", "modules", "--context", "64", "--batch-size", "16"],
}
COMMON = ["--steps", "300", "--batch-size", "4", "--eval-interval", "60"]

# Tokens of the training text; where none are named, all of them.
TOKENS = {"prose, 20 000 tokens": 20_000}

# Learning rates to try, of adapters; full fine-tuning tries a fifth of each.
RATES = {
    "prose": [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2],
    "prose, 20 000 tokens": [1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2],
    "modules": [5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2],
}

ROWS = {
    "full fine-tuning": ["--method", "full"],
    "LoRA": ["--method", "lora"],
    "core, no growth": ["--schedule", "none"],
    "linear": ["--schedule", "linear"],
    "exponential": ["--schedule", "exponential"],
    "fixed": ["--schedule", "fixed"],
}
for signal in ("random", "uniform", "sensitivity", "worth"):
    ROWS[f"linear, {signal}"] = ["--score", signal]
for signal in ("importance", "random", "uniform", "sensitivity", "worth"):
    ROWS[f"linear, {signal}, equal numbers"] = ["--score", signal, "--budget", "numbers"]

# The core's learning rate was chosen with `worth` on validation, seeds 10 and 11, of the ratios 1,
# 0.3, 0.1, 0.03 and 0; then the initial rank, of 1, 2, 3, 4 and 6.
SLOW_CORE = ["--core-lr-ratio", "0.1"]
ROWS["core, no growth, slow core"] = ["--schedule", "none", *SLOW_CORE]
for signal in ("importance", "random", "uniform", "worth"):
    row = f"linear, {signal}, equal numbers"
    ROWS[f"{row}, slow core"] = [*ROWS[row], *SLOW_CORE]
for signal in ("random", "uniform", "worth"):
    row = f"linear, {signal}, equal numbers, slow core"
    ROWS[f"{row}, from rank 2"] = [*ROWS[row], "--init-rank", "2"]
ROWS[adalora.ROW] = ["--method", "lora"]  # and then peft's adapters come instead


class Measured(train.Run):
    """A run that also tests at every evaluation, for the step that is best on validation."""

    def note(self, kind: str, **values) -> None:
        if kind == "eval":
            values |= self.evaluate("test")
        super().note(kind, **values)

    def sizes(self) -> dict[int, int]:
        """{step: how many numbers are trained after it}, where that changes."""
        sizes = {0: self.log[0]["trainable"]}
        for entry in self.log:
            if entry["kind"] == "allocation":
                sizes[entry["step"]] = entry["trainable"]
        return sizes


class MeasuredAdaLoRA(adalora.AdaLoRA, Measured):
    """The same, of peft's AdaLoRA."""


def measure(task: str, row: str, rate: float, seed: int, options: list[str]) -> dict:
    """One silent run, as a cell."""
    folder = f"runs/compare/{task}-{row}-{rate:g}-{seed}".replace(" ", "_")
    own = ["--lr", str(rate), "--seed", str(seed), "--out", folder]
    args = train.parse_args([*COMMON, *TASKS[task], *ROWS[row], *own, *options])
    with contextlib.redirect_stdout(io.StringIO()):
        run = MeasuredAdaLoRA(args) if row == adalora.ROW else Measured(args)
        if task in TOKENS:
            windows = run.examples["train"]
            tokens = windows.tokens[: TOKENS[task]]
            run.examples["train"] = data.Windows(tokens, windows.context, windows.stride)
        before = code_loss(run)
        run.train()
        forgetting = code_loss(run) - before
    cell = {"task": task, "row": row, "rate": rate, "seed": seed}
    cell |= results(run) | {"forgetting": forgetting}
    shutil.rmtree(run.out)
    return cell


def results(run: Measured) -> dict:
    """What a finished run came to."""
    first = run.log[0]
    evals = [entry for entry in run.log if entry["kind"] == "eval"]
    last = evals[-1]
    best = min(evals, key=lambda entry: entry["val_loss"])
    metrics = [key.removeprefix("val_") for key in last if key.startswith("val_")]
    return {
        "settings": vars(run.args),
        "before": {metric: first[f"test_{metric}"] for metric in metrics},
        "val": {metric: last[f"val_{metric}"] for metric in metrics},
        "best_val": {metric: best[f"val_{metric}"] for metric in metrics},
        "test": {metric: last[f"test_{metric}"] for metric in metrics},
        "best_test": {metric: best[f"test_{metric}"] for metric in metrics},
        "best_step": best["step"],
        "ranks": run.log[-1]["ranks"],
        "trainable": trained_numbers(run),
        "seconds": run.seconds,
        "file_bytes": (run.out / "adapter.pt").stat().st_size,
        "torch": torch.__version__,
        "peak_bytes": torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None,
    }


def trained_numbers(run: Measured) -> dict[str, int]:
    """How many numbers were trained: at first, at most, on average over the steps, in the end."""
    sizes = run.sizes()
    ends = [*sizes, run.args.steps][1:]
    total = 0
    for (start, size), end in zip(sizes.items(), ends, strict=True):
        total += size * (end - start)
    return {
        "initial": sizes[0],
        "peak": max(sizes.values()),
        "mean": round(total / run.args.steps),
        "final": run.log[-1]["trainable"],
    }


@torch.no_grad()
def code_loss(run: train.Run) -> float:
    """Loss on held-out code, the text of the base's pretraining, in nats per token."""
    run.model.eval()
    context = run.model.config.context
    windows = code_windows(run.tokenizer.to_str(), context)
    head = run.model.head
    run.model.head = None  # a classifier becomes a language model for this
    total = 0.0
    for part in torch.arange(len(windows)).split(8):
        inputs, targets = data.batch(windows, part)
        total += train.predict(run.model, inputs, targets, run.device)[0].item()
    run.model.head = head
    return total / (len(windows) * context)


@functools.cache
def code_windows(tokenizer: str, context: int) -> list[data.Example]:
    """64 windows of held-out code."""
    documents = data.documents("code")
    windows = data.text_examples("code", documents, Tokenizer.from_str(tokenizer), context)["test"]
    return [windows[i] for i in range(0, len(windows), len(windows) // 64)][:64]


def rates_to_try(task: str, row: str) -> list[float]:
    if row == adalora.ROW:
        return adalora.RATES[task]
    if row == "full fine-tuning":
        return [rate / 5 for rate in RATES[task]]
    return RATES[task]


def rates_to_run(done: list[dict], rates: list[float], seed: int) -> list[float]:
    """What a task and row have yet to run with a seed: all rates on seed 0, later the best one."""
    if seed > 0:
        losses = {cell["rate"]: cell["val"]["loss"] for cell in done if cell["seed"] == 0}
        rates = [min(losses, key=losses.get)]
    ran = [cell["rate"] for cell in done if cell["seed"] == seed]
    return [rate for rate in rates if rate not in ran]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--share", type=int, nargs=2, default=(0, 1), help="i n: the rows i, i + n, i + 2n, ..."
    )
    parser.add_argument("--results", type=Path, default=cells.RESULTS / "compare.jsonl")
    args, options = parser.parse_known_args()  # options: for train.py, of every run
    if adalora.ROW in args.rows and not adalora.AVAILABLE:
        print(f"{adalora.ROW} is left out: peft is not installed", flush=True)
        args.rows.remove(adalora.ROW)
    data.module_rows = functools.cache(data.module_rows)  # parsed once for all runs

    first, step = args.share
    pairs = [(task, row) for task in args.tasks for row in args.rows][first::step]
    for seed in range(args.seeds):
        for task, row in pairs:
            done = [cell for cell in cells.read(args.results) if cell["task"] == task]
            done = [cell for cell in done if cell["row"] == row]
            for rate in rates_to_run(done, rates_to_try(task, row), seed):
                cell = measure(task, row, rate, seed, options)
                cells.append(args.results, cell)
                told = f"test {cell['test']}; {cell['seconds']:.0f} s"
                print(f"{task}; {row}; rate {rate:g}; seed {seed}; {told}", flush=True)


if __name__ == "__main__":
    main()
