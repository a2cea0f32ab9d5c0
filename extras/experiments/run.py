"""Runs the experiments of this edition. Each goes on where it was stopped. extras/RESULTS.md has
the results.

python -m extras.experiments.run pace
python -m extras.experiments.run MPQA --folder ~/data/MPQA      # train.tsv and dev.tsv
python -m extras.experiments.run SST-2 --folder ~/glue/SST-2

The rules were written before the first run that counts:

1. All runs are runs of train.py. They differ in the settings of their row alone, and in the seed.
   A seed fixes the start of the adapters, the batches, and what an allocator draws.
2. Equal parameters: every row that grows has `NAME:parameters` as its allocator. It starts at rank
   2 (in pace at rank 4, the default of train.py), and never has more parameters than LoRA.
3. pace: base.pt on prose. Allocations every 1, 3, 5, 10 and 20 of 300 steps, by the importance and
   at random, and LoRA. Seeds 1 to 8. All else is train.py's default, and nothing is tuned.
4. MPQA and SST-2: all-MiniLM-L6-v2 with a new head, 400 steps of 32 texts (SST-2: 16), alpha 16.
   An allocation every 15 steps ends growth at about 60 % of the steps. dev.tsv is the test split.
   Of train.tsv a ninth is the validation split, of which at most 512 rows are read.
5. Each row of MPQA and SST-2 has its own learning rate, from 5e-4, 1e-3 and 2e-3: the one with the
   lowest mean validation loss of seeds 101 and 102. If that is the lowest or highest rate tried,
   the next one (half or double) is tried as well, until it is not. Full fine-tuning starts from a
   tenth of these rates.
6. The reported seeds of MPQA and SST-2 are 1 to 12. What counts is the test loss after the last
   step. The test results of tuning are not stored.
7. A run that diverges counts with the test loss before training, because its user would go back.
   In tuning it does so, too: that loss is the same for all rows.
8. Declared contrasts of the test loss, for the mean of both tasks in each seed: importance minus
   random, importance minus LoRA, worth minus LoRA. Paired t-intervals over the 12 seeds, and Holm's
   correction over these three. All else is described, and not tested.

Written later, when four seeds of MPQA were known:

9. All rows that grow were ahead of LoRA by about the same. Two tuning seeds may have chosen a bad
   rate for LoRA. So it runs at half that rate (1e-3) with seeds 1 to 12 as well, on both tasks.
   This is described.
10. After five seeds of SST-2: the importance has chosen twice the rate of the other rows there
    (4e-3). So it runs at their rate (2e-3) as well. This is described.

A line of extras/results/NAME.jsonl is a finished run with its commit, versions and settings. Lines
are never edited.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import train
from data import NO_TARGET
from extras.experiments import minilm  # noqa: F401, it fills the registries

RESULTS = Path(__file__).parents[1] / "results"


@dataclass
class Experiment:
    """Rows, each with several seeds, and perhaps with a learning rate to tune."""

    rows: dict[str, str]  # name: settings of train.py
    common: str  # settings of all rows
    seeds: range
    rates: list[float] = field(default_factory=list)  # to choose from; none means the default
    tuning_seeds: tuple[int, ...] = (101, 102)
    also: dict[str, float] = field(default_factory=dict)  # row: another rate to report


GROWING = "--init-rank 2 --interval 15 --allocator"
TASK_ROWS = {
    "LoRA": "--method lora",
    "importance": f"{GROWING} importance:parameters",
    "random": f"{GROWING} random:parameters",
    "uniform": f"{GROWING} uniform:parameters",
    "worth": f"{GROWING} worth:parameters",
    "full fine-tuning": "--method full",
}
MINILM = "--base minilm --target-modules query|key|value|dense --steps 400 --eval-interval 400"
RATES = [5e-4, 1e-3, 2e-3]
EXPERIMENTS = {
    "pace": Experiment(
        {"LoRA": "--method lora"}
        | {
            f"{name}, every {interval}": f"--interval {interval} --allocator {name}:parameters"
            for interval in (1, 3, 5, 10, 20)
            for name in ("importance", "random")
        },
        "--data prose --eval-interval 300",
        range(1, 9),
    ),
    "MPQA": Experiment(
        TASK_ROWS, f"{MINILM} --batch-size 32", range(1, 13), RATES, also={"LoRA": 1e-3}
    ),
    "SST-2": Experiment(
        TASK_ROWS,
        f"{MINILM} --batch-size 16",
        range(1, 13),
        RATES,
        also={"LoRA": 1e-3, "importance": 2e-3},
    ),
}


@dataclass(frozen=True)
class Job:
    """A run to do. rate: the learning rate, or None for the default of train.py."""

    row: str
    rate: float | None
    seed: int


def jobs(experiment: Experiment, results: list[dict]) -> Iterator[Job]:
    """The runs of the experiment that are not done, as far as the results tell. Tuning is first,
    and then all rows run with one seed after the other."""
    done = {Job(result["row"], result["rate"], result["seed"]) for result in results}
    if experiment.rates:
        for row in experiment.rows:
            for rate in rates_to_try(experiment, row, results):
                for seed in experiment.tuning_seeds:
                    if Job(row, rate, seed) not in done:
                        yield Job(row, rate, seed)
    for seed in experiment.seeds:
        for row in experiment.rows:
            job = Job(row, chosen_rate(experiment, row, results), seed)
            if job not in done:
                yield job
        for row, rate in experiment.also.items():
            if Job(row, rate, seed) not in done:
                yield Job(row, rate, seed)


def validation_losses(experiment: Experiment, row: str, results: list[dict]) -> dict[float, float]:
    """{learning rate: mean validation loss of the tuning seeds} of the rates that are finished."""
    losses = {}
    for result in results:
        if result["row"] == row and result["seed"] in experiment.tuning_seeds:
            losses.setdefault(result["rate"], []).append(result["val_loss"])
    count = len(experiment.tuning_seeds)
    return {rate: statistics.mean(own) for rate, own in losses.items() if len(own) == count}


def rates_to_try(experiment: Experiment, row: str, results: list[dict]) -> list[float]:
    """The first rates, and then the next one beyond the lowest or highest if that is the best."""
    factor = 0.1 if "--method full" in experiment.rows[row] else 1.0
    first = [factor * rate for rate in experiment.rates]
    losses = validation_losses(experiment, row, results)
    rates = sorted({*first, *losses})
    if losses.keys() >= set(rates):  # all are finished
        best = min(losses, key=losses.get)
        if best == rates[0]:
            rates.append(best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
    return rates


def chosen_rate(experiment: Experiment, row: str, results: list[dict]) -> float | None:
    """The learning rate with the lowest mean validation loss, or None if the row has no choice."""
    losses = validation_losses(experiment, row, results)
    return min(losses, key=losses.get, default=None)


def run(experiment: Experiment, job: Job, extra: str) -> dict:
    """Run train.py once. Returns a line of the results."""
    settings = f"{experiment.common} {experiment.rows[job.row]} --seed {job.seed}"
    if job.rate is not None:
        settings += f" --lr {job.rate}"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                arguments = [*settings.split(), *extra.split(), "--out", str(out)]
                frequencies = frequency_loss(train.main(arguments))
        except SystemExit as error:
            if "loss is" not in str(error):
                raise  # a wrong setting
            frequencies = None
        log = [json.loads(line) for line in (out / "log.jsonl").open(encoding="utf-8")]
    first, last = log[0], log[-1]
    diverged = last["kind"] != "end"
    evals = [entry for entry in log if entry["kind"] == "eval"]
    final = first if diverged else last
    result = {
        "row": job.row,
        "rate": job.rate,
        "seed": job.seed,
        "val_loss": first["test_loss"] if diverged else evals[-1]["val_loss"],
        "diverged": diverged,
        "trainable": max(entry["trainable"] for entry in log),
        "ranks": last["ranks"],
        "last_growth": max((e["step"] for e in log if e["kind"] == "allocation"), default=None),
        "frequency_loss": frequencies,
        "seconds": round(time.perf_counter() - began, 1),
        "commit": commit(),
        "versions": first["versions"],
        "checksums": first["checksums"],
        "settings": settings,
    }
    if job.seed in experiment.seeds:
        tests = {name: final[name] for name in final if name.startswith("test_")}
        result |= {"before": first["test_loss"]} | tests
    return result


def frequency_loss(run: train.Run) -> float | None:
    """The test loss of a prediction from the class frequencies of the training split alone."""
    if not hasattr(run.task, "classes"):
        return None
    targets = {split: torch.cat([t for _, t in run.examples[split]]) for split in run.examples}
    targets = {split: t[t != NO_TARGET] for split, t in targets.items()}
    log_shares = (targets["train"].bincount() / len(targets["train"])).log()
    return nn.functional.nll_loss(
        log_shares[None].expand(len(targets["test"]), -1), targets["test"]
    ).item()


def commit() -> str:
    """The commit of the code, with a + if files were changed since."""
    words = ["git", "-C", str(RESULTS), "describe", "--always", "--abbrev=12", "--dirty=+"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def read(path: Path) -> list[dict]:
    """The finished runs of a file, or none if it does not exist yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m extras.experiments.run")
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--folder", help="of the task's tables, for MPQA and SST-2")
    parser.add_argument("--results", type=Path, help="a file that finished runs are added to")
    parser.add_argument("--extra", default="", help="settings of train.py for all runs, for a test")
    args = parser.parse_args(argv)
    if bool(args.folder) != bool(EXPERIMENTS[args.name].rates):
        parser.error("--folder: MPQA and SST-2 need it, and pace has none")
    if args.extra and not args.results:
        parser.error("--extra: give --results as well, because these are other runs")
    path = args.results or RESULTS / f"{args.name}.jsonl"
    extra = f"{args.extra} --data glue:{args.folder}" if args.folder else args.extra
    experiment = EXPERIMENTS[args.name]
    while job := next(jobs(experiment, read(path)), None):
        result = run(experiment, job, extra)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        left = sum(1 for _ in jobs(experiment, read(path)))
        seconds = statistics.median(line["seconds"] for line in read(path)[-20:])
        loss = f"validation {result['val_loss']:.4f}, {result['seconds']:.0f} s"
        print(f"{job.row}, rate {job.rate}, seed {job.seed}: {loss}; {left} runs or more", end=" ")
        print(f"left, about {left * seconds / 3600:.1f} h", flush=True)


if __name__ == "__main__":
    main()
