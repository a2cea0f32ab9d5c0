"""Why train.py's defaults are what they are: a few settings side by side, each with the same seeds.

    python plots/defaults.py                          # 3 seeds of each setting, about 40 minutes on one CPU core
    python plots/defaults.py --seeds 1 --steps 20     # a quick look

Each finished run is a line of plots/defaults.jsonl, so that a stopped sweep goes on where it was. `python plots/readme.py`
makes README.md's table from it. The learning rate of every method is chosen here too, on the validation split.
"""
import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402

RATES = {"full": (1e-3, 2e-3, 4e-3), "lora": (5e-3, 1e-2, 2e-2), "none": (5e-3, 1e-2, 2e-2)}
GROWTH = {  # what the row is called: the options that make it
    "linear, the default": [],
    "linear, interval 1 (spent sooner)": ["--interval", "1"],
    "linear, warm-up 30, interval 10 (spent late)": ["--warmup", "30", "--interval", "10"],
    "linear, rank step 2": ["--rank-step", "2"],
    "exponential": ["--schedule", "exponential"],
    "fixed": ["--schedule", "fixed"],
}


def cells(seeds: int) -> list[tuple[str, int, list[str]]]:
    """(row, seed, options) of every run of the sweep."""
    rows = {f"full fine-tuning, lr {lr:g}": ["--method", "full", "--lr", str(lr)] for lr in RATES["full"]}
    rows |= {f"LoRA, lr {lr:g}": ["--method", "lora", "--lr", str(lr)] for lr in RATES["lora"]}
    rows |= {f"core, no growth, lr {lr:g}": ["--schedule", "none", "--lr", str(lr)] for lr in RATES["none"]}
    rows |= GROWTH
    return [(row, seed, options) for seed in range(seeds) for row, options in rows.items()]


def measure(row: str, seed: int, options: list[str], common: list[str]) -> dict:
    """One run through train.py's own code, silently."""
    arguments = [*options, "--seed", str(seed), "--out", f"runs/defaults/{row.replace(' ', '_')}-{seed}", *common]
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.main(arguments)
    evals = [entry for entry in run.log if entry["kind"] == "eval"]
    allocations = [entry["step"] for entry in run.log if entry["kind"] == "allocation"]
    return {"row": row, "seed": seed, "settings": vars(run.args), "base_loss": run.log[0]["test_loss"],
            "test_loss": run.log[-1]["test_loss"], "val_loss": evals[-1]["val_loss"], "trainable": run.log[-1]["trainable"],
            "spent_at": max(allocations, default=0), "seconds": run.seconds, "growth_seconds": run.growth_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--results", type=Path, default=HERE / "defaults.jsonl")
    parser.add_argument("--part", default="0/1", help="K/N: run only every Nth cell, from the Kth, for N processes at once")
    args, more = parser.parse_known_args()
    part, parts = map(int, args.part.split("/"))
    # One thread a process: matrices this small gain more from two processes than from two threads.
    torch.set_num_threads(1)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {(cell["row"], cell["seed"]) for cell in done}
    for row, seed, options in cells(args.seeds)[part::parts]:
        if (row, seed) not in done:
            cell = measure(row, seed, options, ["--steps", str(args.steps), *more])
            with open(args.results, "a") as file:
                file.write(json.dumps(cell) + "\n")
            print(f"{row}, seed {seed}: test loss {cell['test_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
