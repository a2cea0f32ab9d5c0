"""Methods x tasks x seeds, through train.py's own code: does growth pay, and does the importance know where?

    python plots/compare.py                               # everything: hours on two CPU cores; goes on where it was
    python plots/compare.py --tasks prose --seeds 1       # a part of it
    python plots/compare.py --share 0 2                   # every second row, to run two processes side by side

Rules: the same steps and batches for all. The learning rate of each (task, row) is the one of RATES with the best
validation result of seed 0; then it runs on the other seeds. Test results are of the last step, and of the step that
was best on validation. A line of plots/compare.jsonl is a finished run with its whole configuration, never edited.
`python plots/draw.py` makes the tables and figures of them.
"""

import argparse
import contextlib
import functools
import io
import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402
import train  # noqa: E402
from data import batch, text_examples  # noqa: E402
from plots import adalora, signals  # noqa: E402

TASKS = {
    "prose": [],
    "prose, 20 000 tokens": [],
    "modules": ["--task", "modules", "--context", "64", "--batch-size", "16"],
}
TOKENS = {"prose, 20 000 tokens": 20_000}  # of the training text; of the others all
COMMON = ["--steps", "300", "--batch-size", "4", "--eval-interval", "60"]
ROWS = {
    "full fine-tuning": ["--method", "full"],
    "LoRA": ["--method", "lora"],
    "core, no growth": ["--schedule", "none"],
    "linear": ["--schedule", "linear"],
    "exponential": ["--schedule", "exponential"],
    "fixed": ["--schedule", "fixed"],
}
ROWS |= {
    f"linear, {signal}": ["--score", signal] for signal in signals.SIGNALS if signal != "importance"
}
# Chosen with `worth` on validation, seeds 10 and 11: the ratio of 1, 0.3, 0.1, 0.03 and 0, then the rank of 1, 2, 3, 4 and 6.
SLOW, SMALL = ["--core-lr-ratio", "0.1"], ["--init-rank", "2"]
ROWS["core, no growth, slow core"] = ["--schedule", "none", *SLOW]
ROWS |= {
    f"linear, {signal}, equal numbers, slow core": ["--score", f"{signal}, equal numbers", *SLOW]
    for signal in ("importance", "random", "uniform", "worth")
}
ROWS |= {
    f"linear, {signal}, equal numbers, slow core, from rank 2": [
        "--score",
        f"{signal}, equal numbers",
        *SLOW,
        *SMALL,
    ]
    for signal in ("random", "uniform", "worth")
}
ROWS |= {adalora.ROW: ["--method", "full"]}  # peft puts its own adapters into a model that has none
RATES = {
    "prose": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    "prose, 20 000 tokens": (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
    "modules": (5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2),
}  # of adapters; full fine-tuning tries a fifth of each


class Measured(train.Run):
    """A run that also tests at every evaluation, for the step that is best on validation."""

    def note(self, kind: str, **values) -> None:
        super().note(kind, **(values | self.evaluate("test") if kind == "eval" else values))

    def sizes(self) -> dict[int, int]:
        """{step: how many numbers are trained after it}, where that changes."""
        grown = {
            entry["step"]: entry["trainable"] for entry in self.log if entry["kind"] == "allocation"
        }
        return {0: self.log[0]["trainable"]} | grown


class MeasuredAdaLoRA(adalora.AdaLoRA, Measured):
    """The same, of peft's AdaLoRA."""


@functools.cache
def code_windows(tokenizer: str, context: int) -> list[torch.Tensor]:
    """64 windows of held-out code, the text of the base's pretraining."""
    examples = text_examples("code", Tokenizer.from_str(tokenizer), context)[0]["test"]
    return [examples[i] for i in range(0, len(examples), len(examples) // 64)][:64]


@torch.no_grad()
def code_loss(run: train.Run) -> float:
    """Loss on code_windows, in nats per token."""
    head, run.model.head = run.model.head, None  # of a classifier
    context = run.model.config.context
    chosen = code_windows(run.tokenizer.to_str(), context)
    total = sum(
        train.predict(run.model, *batch(chosen, part), run.device)[0].item()
        for part in torch.arange(len(chosen)).split(8)
    )
    run.model.head = head
    return total / (len(chosen) * context)


def measure(task: str, row: str, rate: float, seed: int, options: list[str]) -> dict:
    """One silent run, as a line of results."""
    folder = f"runs/compare/{task}-{row}-{rate:g}-{seed}".replace(" ", "_")
    given = [
        *COMMON,
        *TASKS[task],
        *ROWS[row],
        "--lr",
        str(rate),
        "--seed",
        str(seed),
        "--out",
        folder,
        *options,
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        run = (MeasuredAdaLoRA if row == adalora.ROW else Measured)(train.parse_args(given))
        if task in TOKENS:
            run.examples["train"] = run.examples["train"][: TOKENS[task] - run.model.config.context]
        before = code_loss(run)
        run.train()
    evals = [entry for entry in run.log if entry["kind"] == "eval"]
    best = min(evals, key=lambda entry: entry["val_loss"])
    metrics = [key.removeprefix("val_") for key in evals[-1] if key.startswith("val_")]
    trainable = run.sizes()
    steps = [*trainable, run.args.steps]
    mean = (
        sum(n * (end - start) for (start, n), end in zip(trainable.items(), steps[1:]))
        / run.args.steps
    )
    line = {
        "task": task,
        "row": row,
        "rate": rate,
        "seed": seed,
        "settings": vars(run.args),
        "before": {key: run.log[0][f"test_{key}"] for key in metrics},
        "val": {key: evals[-1][f"val_{key}"] for key in metrics},
        "best_val": {key: best[f"val_{key}"] for key in metrics},
        "test": {key: evals[-1][f"test_{key}"] for key in metrics},
        "best_test": {key: best[f"test_{key}"] for key in metrics},
        "best_step": best["step"],
        "forgetting": code_loss(run) - before,
        "ranks": run.log[-1]["ranks"],
        "trainable": {
            "initial": trainable[0],
            "peak": max(trainable.values()),
            "mean": round(mean),
            "final": run.log[-1]["trainable"],
        },
        "seconds": run.seconds,
        "growth_seconds": run.growth_seconds,
        "file_bytes": (run.out / "adapter.pt").stat().st_size,
        "torch": torch.__version__,
        "peak_bytes": torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None,
    }
    shutil.rmtree(run.out)
    return line


def best_rate(cells: list[dict], rates: list[float]) -> list[float]:
    """The rate of the lowest validation loss on seed 0; all of them until all have been tried."""
    tried = {cell["rate"]: cell["val"]["loss"] for cell in cells if cell["seed"] == 0}
    return [min(tried, key=tried.get)] if len(tried) == len(rates) else rates


def rates_of(task: str, row: str) -> list[float]:
    """The learning rates to try."""
    rates = (adalora.RATES if row == adalora.ROW else RATES)[task]
    return [rate / 5 if row == "full fine-tuning" else rate for rate in rates]


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
    parser.add_argument("--results", type=Path, default=HERE / "compare.jsonl")
    args, options = parser.parse_known_args()
    args.results.touch()
    if adalora.peft is None and adalora.ROW in args.rows:
        print(f"{adalora.ROW} is left out: peft is not installed", flush=True)
        args.rows.remove(adalora.ROW)
    if "modules" in args.tasks:
        rows = data.module_rows()
        data.module_rows = lambda: rows  # parsed once for all runs
    pairs = [(task, row) for task in args.tasks for row in args.rows][
        args.share[0] :: args.share[1]
    ]
    for seed in range(args.seeds):
        for task, row in pairs:
            cells = [
                cell
                for cell in map(json.loads, args.results.read_text().splitlines())
                if (cell["task"], cell["row"]) == (task, row)
            ]
            rates = rates_of(task, row)
            done = {(cell["rate"], cell["seed"]) for cell in cells}
            for rate in rates if seed == 0 else best_rate(cells, rates):
                if (rate, seed) not in done:
                    line = measure(task, row, rate, seed, options)
                    with open(args.results, "a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(
                        f"{task}; {row}; rate {rate:g}; seed {seed}; test {line['test']}; {line['seconds']:.0f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
