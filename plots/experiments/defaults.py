"""Why train.py's defaults are what they are: a few settings side by side, with the same seeds.

    python plots/experiments/defaults.py                        # 3 seeds: 20 minutes of two cores
    python plots/experiments/defaults.py --seeds 1 --steps 20   # a quick look

The learning rate of every method is chosen here too, by the validation loss of seed 0; the rows of
GROWTH take the default's. A finished run is a line of plots/results/defaults.jsonl.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from plots import signals  # noqa: F401  (enters worth in SIGNALS)
from plots.experiments import cells

METHODS = {
    "full fine-tuning": ["--method", "full"],
    "LoRA": ["--method", "lora"],
    "triangular core, no growth": ["--schedule", "none"],
    "linear growth, interval 3": ["--interval", "3"],
}
RATES = {
    "full fine-tuning": [1e-3, 2e-3, 4e-3],
    "LoRA": [5e-3, 1e-2, 2e-2, 4e-2],
    "triangular core, no growth": [5e-3, 1e-2, 2e-2, 4e-2],
    "linear growth, interval 3": [5e-3, 1e-2, 2e-2, 4e-2],
}
GROWTH = {
    "linear growth, interval 1": ["--interval", "1"],
    "linear growth, interval 10, warm-up 30": ["--interval", "10", "--warmup", "30"],
    "linear growth, interval 3, rank step 2": ["--interval", "3", "--rank-step", "2"],
    "exponential growth, interval 3": ["--interval", "3", "--schedule", "exponential"],
    "fixed growth (top-k 4), interval 3": ["--interval", "3", "--schedule", "fixed"],
    "linear growth by worth, numbers of LoRA, slow core, from rank 2": [
        *("--score", "worth", "--budget", "numbers", "--core-lr-ratio", "0.1", "--init-rank", "2")
    ],
}


def rows_to_run(done: list[dict]) -> dict[str, list[str]]:
    """{row: options}. Once seed 0 has tried all learning rates of a method, the best one stays."""
    first = {cell["row"]: cell["val_loss"] for cell in done if cell["seed"] == 0}
    table = {}
    for method, rates in RATES.items():
        rows = {f"{method}, lr {rate:g}": [*METHODS[method], "--lr", str(rate)] for rate in rates}
        if all(row in first for row in rows):
            best = min(rows, key=first.get)
            rows = {best: rows[best]}
        table |= rows
    return table | GROWTH


def measure(row: str, seed: int, options: list[str]) -> dict:
    """One silent run, as a cell."""
    folder = f"runs/defaults/{row.replace(' ', '_')}-{seed}"
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.Run(train.parse_args([*options, "--seed", str(seed), "--out", folder]))
        run.train()
    evals = [entry for entry in run.log if entry["kind"] == "eval"]
    allocations = [entry["step"] for entry in run.log if entry["kind"] == "allocation"]
    return {
        "row": row,
        "seed": seed,
        "settings": vars(run.args),
        "base_loss": run.log[0]["test_loss"],
        "test_loss": run.log[-1]["test_loss"],
        "val_loss": evals[-1]["val_loss"],
        "trainable": run.log[-1]["trainable"],
        "spent_at": max(allocations, default=0),
        "seconds": run.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--results", type=Path, default=cells.RESULTS / "defaults.jsonl")
    args, more = parser.parse_known_args()
    for seed in range(args.seeds):
        done = cells.read(args.results)
        ran = [cell["row"] for cell in done if cell["seed"] == seed]
        for row, options in rows_to_run(done).items():
            if row not in ran:
                cell = measure(row, seed, [*options, "--steps", str(args.steps), *more])
                cells.append(args.results, cell)
                print(f"{row}, seed {seed}: test loss {cell['test_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
