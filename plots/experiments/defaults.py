"""Why train.py's defaults are what they are: a few settings side by side, each with the same seeds.

    python plots/defaults.py                          # 3 seeds of each setting, about 20 minutes on two CPU cores
    python plots/defaults.py --seeds 1 --steps 20     # a quick look

Each finished run is a line of plots/defaults.jsonl, so that a stopped sweep goes on where it was. `python plots/readme.py`
makes the table in plots/RESULTS.md from it. The learning rate of every method is chosen here too, on the validation split; the rows of
GROWTH take the default's.
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402

METHOD = {
    "full fine-tuning": ["--method", "full"],
    "LoRA": ["--method", "lora"],
    "triangular core, no growth": ["--schedule", "none"],
    "linear growth, interval 3": ["--interval", "3"],
}
RATES = {
    "full fine-tuning": (1e-3, 2e-3, 4e-3),
    "LoRA": (5e-3, 1e-2, 2e-2, 4e-2),
    "triangular core, no growth": (5e-3, 1e-2, 2e-2, 4e-2),
    "linear growth, interval 3": (5e-3, 1e-2, 2e-2, 4e-2),
}
GROWTH = {  # what the row is called: the options that make it
    "linear growth, interval 1": ["--interval", "1"],
    "linear growth, interval 10, warm-up 30": ["--interval", "10", "--warmup", "30"],
    "linear growth, interval 3, rank step 2": ["--interval", "3", "--rank-step", "2"],
    "exponential growth, interval 3": ["--interval", "3", "--schedule", "exponential"],
    "fixed growth (top-k 4), interval 3": ["--interval", "3", "--schedule", "fixed"],
    "linear growth by worth, numbers of LoRA, slow core, from rank 2": [
        "--score",
        "worth, equal numbers",
        "--core-lr-ratio",
        "0.1",
        "--init-rank",
        "2",
    ],
}


def rows(done: list[dict]) -> dict[str, list[str]]:
    """{row: options}. Once seed 0 has tried every learning rate of a method, the one best on validation stays."""
    table = {}
    for name, rates in RATES.items():
        options = {f"{name}, lr {rate:g}": [*METHOD[name], "--lr", str(rate)] for rate in rates}
        losses = {
            cell["row"]: cell["val_loss"]
            for cell in done
            if cell["row"] in options and cell["seed"] == 0
        }
        if len(losses) == len(options):
            options = {row: options[row] for row in [min(losses, key=losses.get)]}
        table |= options
    return table | GROWTH


def measure(row: str, seed: int, options: list[str], common: list[str]) -> dict:
    """One run through train.py's own code, silently."""
    arguments = [
        *options,
        "--seed",
        str(seed),
        "--out",
        f"runs/defaults/{row.replace(' ', '_')}-{seed}",
        *common,
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.main(arguments)
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
        "growth_seconds": run.growth_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--results", type=Path, default=HERE / "defaults.jsonl")
    args, more = parser.parse_known_args()
    args.results.touch()
    for seed in range(args.seeds):
        done = [json.loads(line) for line in args.results.read_text().splitlines()]
        for row, options in rows(done).items():
            if (row, seed) not in {(cell["row"], cell["seed"]) for cell in done}:
                cell = measure(row, seed, options, ["--steps", str(args.steps), *more])
                with open(args.results, "a") as file:
                    file.write(json.dumps(cell) + "\n")
                print(f"{row}, seed {seed}: test loss {cell['test_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
