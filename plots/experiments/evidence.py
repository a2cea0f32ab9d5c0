"""Does growth pay, and does it matter where the rank goes? With declared rules and contrasts.

    python plots/experiments/bases.py                              # first: three bases, for GPT
    python plots/experiments/evidence.py prose modules             # our GPT on them
    python plots/experiments/evidence.py ~/glue/CoLA ~/glue/SST-2  # a real model: see minilm.py
    python plots/experiments/evidence.py prose --share 0 2         # half of it, for two processes

The rules, written before the first run and not changed after it:

1. Splits. A row's setting is chosen by its mean validation loss over two selection seeds, 100 and
   101 (of GPT on bases 0 and 1), which are not reported. Only reported runs read the test split,
   once, after training. CoLA and SST-2: dev is the test split, a tenth of train the validation.
   A run that diverges has an infinite loss.
2. Effort. Each row chooses among four learning rates x two values of a second setting: the core's
   rate over that of A and B (1, 0.1) where a core is trained, alpha (16, 32) where none is, and
   rates in between for full fine-tuning. If the best rate is the lowest or highest that was tried,
   the next one beyond is tried, too, until it is not.
3. Size. No row trains more numbers than LoRA of rank 8 at any step, but the references: full
   fine-tuning and peft's AdaLoRA.
4. Growth: linear, by numbers, from rank 2, on train.py's defaults else, for every signal alike.
5. Reported are 12 runs a row: of GPT four seeds on each of three bases, of MiniLM 12 seeds. Rows
   are paired by base and seed, which fix the batches.
6. Two controls tell where from when: LoRA that has from its first step on the final ranks of the
   same seed's growth by worth, and LoRA with these ranks permuted among matrices of equal size.
7. Declared contrasts, of the test loss, t intervals of paired differences with Holm's correction
   over the five: importance - random (primary), worth - LoRA, norm - LoRA, ranks of worth - the
   same permuted, worth - ranks of worth. For MiniLM the pooled differences of both tasks are the
   primary result. Everything else is described, not tested.

A line of plots/results/evidence.jsonl is a finished run with its settings, and is never edited.
"""

import argparse
import contextlib
import io
import itertools
import math
import random
import shutil
import statistics
import sys
import time
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from plots import signals  # noqa: F401  (enters worth and the others in SIGNALS)
from plots.experiments import adalora, bases, cells, minilm
from triadapt import LoRALinear

# How a row adapts: the method, the signal that it grows by, the ranks that it starts with.
ROWS = {
    "LoRA": ("lora", None, None),
    "core, no growth": ("triadapt", None, "as many as LoRA's numbers allow"),
    "importance": ("triadapt", "importance", None),
    "random": ("triadapt", "random", None),
    "uniform": ("triadapt", "uniform", None),
    "norm": ("triadapt", "norm", None),
    "norm-change": ("triadapt", "norm-change", None),
    "worth": ("triadapt", "worth", None),
    "ranks of worth": ("lora", None, "of worth"),
    "ranks of worth, permuted": ("lora", None, "of worth, permuted"),
    "full fine-tuning": ("full", None, None),
    adalora.ROW: ("lora", None, None),
}
GPT_TASKS = {"prose": [], "modules": ["--task", "modules", "--context", "64", "--batch-size", "16"]}
GPT_COMMON = ["--steps", "300", "--batch-size", "4", "--eval-interval", "300"]
RATES = {"GPT": [2.5e-3, 5e-3, 1e-2, 2e-2], "MiniLM": [5e-4, 1e-3, 2e-3, 4e-3]}
FULL = {"GPT": 1 / 5, "MiniLM": 1 / 10}  # full fine-tuning's rates, in those of adapters
RANK = 8

# (base, seed) of a run.
SELECTION = {"GPT": [(0, 100), (1, 101)], "MiniLM": [(0, 100), (0, 101)]}
REPORTED = {
    "GPT": [(base, seed) for base in range(3) for seed in range(4)],
    "MiniLM": [(0, seed) for seed in range(12)],
}


def model_of(task: str) -> str:
    return "GPT" if task in GPT_TASKS else "MiniLM"


def second_settings(row: str) -> list[float]:
    """The values of a row's second setting."""
    method = ROWS[row][0]
    return {"lora": [16, 32], "triadapt": [1, 0.1], "full": [1, 0.7]}[method]


# What is to be run.


def choose(found: list[dict], task: str, row: str) -> tuple[list[tuple[float, float]], bool]:
    """(settings of which selection runs are missing, False), or ([the chosen one], True)."""
    model = model_of(task)
    losses = {}
    for cell in found:
        of_row = (cell["task"], cell["row"]) == (task, row)
        if of_row and (cell["base"], cell["seed"]) in SELECTION[model]:
            losses.setdefault((cell["rate"], cell["second"]), []).append(cell["val"]["loss"])
    known = {s: statistics.mean(x) for s, x in losses.items() if len(x) == len(SELECTION[model])}
    rates = sorted({*RATES[model], *(rate for rate, _ in losses)})
    if all((rate, second) in known for rate in rates for second in second_settings(row)):
        best = min(known, key=known.get)
        if best[0] == rates[0]:
            rates = [best[0] / 2]
        elif best[0] == rates[-1]:
            rates = [best[0] * 2]
        else:
            return [best], True
    wanted = [(rate, second) for rate in rates for second in second_settings(row)]
    return [setting for setting in wanted if setting not in known], False


def runs_left(found: list[dict], task: str, row: str) -> list[dict]:
    """The runs of a row that are next: its selection, and then those to report."""
    settings, done = choose(found, task, row)
    places = REPORTED if done else SELECTION
    ran = {
        tuple(cell[key] for key in ("task", "row", "rate", "second", "base", "seed"))
        for cell in found
    }
    left = []
    for rate, second in settings:
        for base, seed in places[model_of(task)]:
            if (task, row, rate, second, base, seed) not in ran:
                run = {"task": task, "row": row, "rate": rate, "second": second}
                left.append(run | {"base": base, "seed": seed})
    return left


def ranks_of_worth(found: list[dict], run: dict) -> dict[str, int] | None:
    """The final ranks of growth by worth at its chosen setting, of a run's base and seed."""
    chosen, done = choose(found, run["task"], "worth")
    for cell in found:
        same = all(cell[key] == run[key] for key in ("task", "base", "seed"))
        if done and same and (cell["row"], cell["rate"], cell["second"]) == ("worth", *chosen[0]):
            return cell["ranks"]
    return None


# A run.


def start_ranks(run: dict, found: list[dict], adapters: dict[str, LoRALinear]) -> dict[str, int]:
    """{name: rank} of the rows that begin with ranks of their own."""
    sizes = {name: a.in_features + a.out_features for name, a in adapters.items()}
    if ROWS[run["row"]][0] == "triadapt":
        # A core costs r (r + 1) numbers more: the first matrices get one rank more than the last.
        ranks = dict.fromkeys(sizes, 1)
        for name in itertools.cycle(sizes):
            grown = ranks | {name: ranks[name] + 1}
            if sum(r * (sizes[n] + r + 1) for n, r in grown.items()) > RANK * sum(sizes.values()):
                return ranks
            ranks = grown

    ranks = ranks_of_worth(found, run)
    if run["row"].endswith("permuted"):
        rng = random.Random(f"{run['task']} {run['base']} {run['seed']}")
        for size in sorted(set(sizes.values())):
            names = [name for name in ranks if sizes[name] == size]
            permuted = rng.sample([ranks[name] for name in names], len(names))
            ranks = ranks | dict(zip(names, permuted, strict=True))
    return ranks


def measure(run: dict, found: list[dict], folder: str, options: list[str]) -> dict:
    """One silent run, as a cell; a task of MiniLM is in a folder."""
    method, score, start = ROWS[run["row"]]
    rate = run["rate"]
    if method == "full":
        rate *= FULL[model_of(run["task"])] * run["second"]

    def give_ranks(adapters: dict[str, LoRALinear], optimizer: torch.optim.Optimizer) -> None:
        for name, rank in start_ranks(run, found, adapters).items():
            if rank > adapters[name].rank:
                adapters[name].grow(rank - adapters[name].rank, optimizer)

    init_rank = RANK if score is None and start is None else 2 if score else 1
    settings = {"method": method, "score": score, "init_rank": init_rank}
    settings["alpha"] = run["second"] if method == "lora" else 16
    settings["core_lr_ratio"] = run["second"] if method == "triadapt" else 1.0
    give = give_ranks if start else None
    reported = (run["base"], run["seed"]) in REPORTED[model_of(run["task"])]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if model_of(run["task"]) == "GPT":
                result = measure_gpt(run, rate, settings, give, options)
            else:
                more = {"give_ranks": give, "read_test": reported}
                result = minilm.measure(folder, run["seed"], rate, **settings, **more)
    except (FloatingPointError, ValueError) as error:
        if " nan" not in str(error):  # of the loss, or of a score
            raise
        result = {"val": {"loss": math.inf}, "test": {"loss": math.inf}, "ranks": {}}
    if not math.isfinite(result["val"]["loss"]):
        result["val"]["loss"] = math.inf
    if not reported:
        result["test"] = None
    return run | result | {"settings": settings, "torch": torch.__version__}


def measure_gpt(run: dict, rate: float, settings: dict, give, options: list[str]) -> dict:
    """A run of train.py on a base of bases.py."""
    path, _, _ = bases.prepare(run["base"], bases.STEPS)
    line = ["--base", str(path), "--lr", str(rate), "--seed", str(run["seed"])]
    line += ["--method", settings["method"]]
    line += ["--out", f"runs/evidence-{zlib.crc32(repr(run).encode()):08x}"]
    if settings["method"] != "full":
        line += ["--alpha", str(settings["alpha"]), "--init-rank", str(settings["init_rank"])]
    if settings["method"] == "triadapt":
        line += ["--core-lr-ratio", str(settings["core_lr_ratio"])]
        growth = ["--score", settings["score"], "--budget", "numbers"]
        line += growth if settings["score"] else ["--schedule", "none"]
    args = train.parse_args([*GPT_COMMON, *GPT_TASKS[run["task"]], *line, *options])

    class Given(adalora.AdaLoRA if run["row"] == adalora.ROW else train.Run):
        def adapt(self, gpt: train.GPT) -> None:
            super().adapt(gpt)
            if give is not None:
                give(self.adapters, self.optimizer)

    finished = Given(args)
    finished.train()
    log = finished.log
    shutil.rmtree(finished.out)
    return {
        "val": {k.removeprefix("val_"): v for k, v in log[-2].items() if k.startswith("val_")},
        "test": {k.removeprefix("test_"): v for k, v in log[-1].items() if k.startswith("test_")},
        "ranks": log[-1]["ranks"],
        "trainable": max(entry["trainable"] for entry in log),
        "seconds": finished.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", help="prose, modules, or folders of GLUE")
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help="i n: about 1 run in n")
    parser.add_argument("--results", type=Path, default=cells.RESULTS / "evidence.jsonl")
    args, options = parser.parse_known_args()  # options: for train.py, of GPT's runs
    folders = {Path(task).name: task for task in args.tasks}
    wanted = [(task, row) for task in folders for row in args.rows]
    wanted = [(t, r) for t, r in wanted if r != adalora.ROW or can_run_adalora(t)]
    took = []
    while True:
        found = cells.read(args.results)
        left = [run for task, row in wanted for run in runs_left(found, task, row)]
        if not left:
            return
        own = [r for r in left if zlib.crc32(repr(r).encode()) % args.share[1] == args.share[0]]
        ready = [r for r in own if not r["row"].startswith("ranks of") or ranks_of_worth(found, r)]
        if not ready:
            if args.share[1] == 1:
                raise SystemExit("evidence.py: the ranks of worth need the row worth first")
            time.sleep(5)  # another process has the run that is waited for
            continue
        began = time.perf_counter()
        cell = measure(ready[0], found, folders[ready[0]["task"]], options)
        cells.append(args.results, cell)
        took.append(time.perf_counter() - began)
        told = " ".join(str(value) for value in ready[0].values())
        hours = statistics.mean(took) * len(own) / 3600
        print(f"{told}: val {cell['val']['loss']:.4f}; about {hours:.1f} h left", flush=True)


def can_run_adalora(task: str) -> bool:
    return adalora.AVAILABLE and model_of(task) == "GPT"


if __name__ == "__main__":
    main()
