"""How long until a given validation loss? The main job by LoRA, by growth and in full.

    python plots/experiments/time_to_loss.py     # a quarter of an hour of an idle machine

The rows take turns, a run each, with the same seeds and batches. Only training counts, growth
included: no evaluation, no loading. Validation is every tenth step, and a run ends when it is at
the loss or has done all its steps. A finished run is a line of plots/results/time_to_loss.jsonl.
"""

import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from plots import signals  # noqa: F401  (enters worth in SIGNALS)
from plots.experiments import cells

GIVEN = 4.6  # nats per token; the base has 5.1, LoRA ends near 4.5
ROWS = {
    "LoRA": ["--method", "lora"],
    "core, no growth": ["--schedule", "none"],
    "growth by importance": [],
    "growth by worth": ["--score", "worth", "--budget", "numbers", "--core-lr-ratio", "0.1"],
    "full fine-tuning": ["--method", "full"],
}


class There(Exception):
    """The given loss is reached."""


class Timed(train.Run):
    """A run that ends at the given validation loss."""

    def note(self, kind: str, **values) -> None:
        super().note(kind, **values)
        if values.get("val_loss", GIVEN) < GIVEN:
            raise There


def measure(row: str, seed: int, options: list[str]) -> dict:
    """One silent run, as a cell."""
    common = ["--eval-interval", "10", "--seed", str(seed), "--out", "runs/time_to_loss"]
    reached = False
    with contextlib.redirect_stdout(io.StringIO()):
        run = Timed(train.parse_args([*common, *ROWS[row], *options]))
        try:
            run.train()
        except There:
            reached = True
    shutil.rmtree(run.out, ignore_errors=True)  # there is none yet if the loss came soon
    return {
        "row": row,
        "seed": seed,
        "given": GIVEN,
        "reached": reached,
        "seconds": run.seconds,
        "steps": run.step,
        "threads": torch.get_num_threads(),
        "device": run.device.type,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    args, options = cells.parse(parser, "time_to_loss.jsonl")
    ran = [(cell["row"], cell["seed"]) for cell in cells.read(args.results)]
    wanted = [(row, seed) for seed in range(args.seeds) for row in ROWS]
    cells.work_off(args, wanted, ran, lambda *run: measure(*run, options))


if __name__ == "__main__":
    main()
