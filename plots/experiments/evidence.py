"""Does growth pay, and does it matter where the rank goes? With declared rules and contrasts.

    python plots/experiments/bases.py                              # first: three bases, for GPT
    python plots/experiments/evidence.py prose modules             # our GPT on them
    python plots/experiments/evidence.py ~/glue/CoLA ~/glue/SST-2  # a real model: see minilm.py
    python plots/experiments/evidence.py prose --share 0 2         # half of it, for two processes

The rules, written before the first run and not changed after it, but for what stands below them
(selection runs of earlier drafts were thrown away, when review found faults; no test result of them
was kept or looked at; but an earlier edition had test results of such rows on prose and modules,
with another base):

1. Splits. A row's setting is chosen by its mean validation loss over two selection seeds, 100 and
   101 (of GPT on bases 0 and 1), which are not reported. The test loss of the last step counts, of
   reported runs alone; it is not kept of others. CoLA and SST-2: dev is the test split, a tenth of
   train the validation, of which the first 1000 rows are read. (SST-2's train split has phrases of
   its own sentences, so its validation is easier than its dev; for all rows alike.)
2. Effort. Each row chooses among three learning rates x two values of a second setting: the core's
   rate over that of A and B (1, 0.1) where a core is trained, alpha (16, 32) where none is, and
   rates in between for full fine-tuning. If the best rate is the lowest or highest that was tried,
   the next one beyond is tried, too, until it is not.
3. Size. No row trains more numbers than LoRA of rank 8 at any step, but the references: full
   fine-tuning and peft's AdaLoRA.
4. Growth: linear, by numbers, from rank 2, on train.py's defaults else, for every signal alike.
5. Reported are 12 runs a row: of GPT four seeds on each of three bases, no seed twice; of MiniLM 12
   seeds. Rows are paired by base and seed, which fix the batches.
6. Two controls tell where from when: LoRA that has from its first step on the final ranks of the
   same seed's growth by worth, and LoRA with these ranks permuted among matrices of equal size.
   Both take LoRA's setting, so that the two differ in nothing but the places. (As LoRA they have no
   core, which growth by worth has, and so 2 to 9 % fewer numbers.)
7. Declared contrasts, of the test loss, t intervals of paired differences with Holm's correction
   over the five: importance - random (primary), worth - LoRA, norm - LoRA, ranks of worth - the
   same permuted, worth - ranks of worth. For MiniLM the pooled differences of both tasks are the
   primary result. Everything else is described, not tested. The twelve pairs of GPT count as
   independent, though four share a base.
8. A run that diverges counts with the losses of the model as it was before training: a user who
   throws it away is left with that model.

Stability is described, not tested: LoRA and growth by the importance also run at two and four
times the rate that was chosen for them, with every third of the reported seeds.

Written later, when the declared results of MiniLM were known:

- Growth by worth also runs at half the rate that was chosen for it, with all reported seeds, and is
  described, not tested. On both tasks of MiniLM that is LoRA's rate: is it the rate that loses?
  There it was ahead of LoRA, so LoRA runs at half its rate, too: does a lower rate gain as much?
- Of rule 1: on SST-2 the rows that chose twice LoRA's rate are ahead of it on validation, in the
  mean, and behind it on dev. But over the reported seeds validation does not prefer worth's rate to
  half of it: two seeds are few to choose by.
- Of rule 2: on modules the rates were .005, .01, .02 at first. LoRA, the core and importance went
  down from there to a quarter of the lowest and less, while random, best at .02 by chance, did not
  look down: its mean validation loss was 1.09, where theirs were .90 to .93. So the first rates
  are now those that the others chose and a neighbour. Random had 12 reported runs at .02 by then,
  of test loss 1.20. They stay in the file and count no more: a row's runs are those at the setting
  of its last one.
- At half its rate growth by worth was ahead of LoRA, too. As that was seen in the reported runs, it
  is asked again of 16 new seeds, of both tasks of MiniLM together: worth at half its rate minus
  LoRA, minus LoRA at half its rate, and minus uniform growth, with Holm's correction over these
  three. If the first two are clear, growth by worth beats LoRA at either rate; if only the first
  is, it may be the rate; if the third is not, it may be growth and not who grows. The settings are
  those chosen before, and the texts the old ones, so that the answer is of them alone. (First
  planned with 24 seeds and two of the three, and changed before any of these ran.)
- Asked again, it was ahead of all three. But on SST-2 uniform growth has another core's rate than
  worth. So growth at random and by the importance run in worth's place, with its setting and seeds:
  described, not tested. If worth is not ahead of random there, it may be growth and not who grows.
- Of rule 6: MiniLM's LoRA with the ranks of worth has 1 to 2 % fewer numbers.

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
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from plots import signals  # noqa: F401  (enters worth and the others in SIGNALS)
from plots.experiments import adalora, bases, cells, minilm
from triadapt import LoRALinear

RANK = minilm.RANK  # and train.py's default
START_RANK = 2  # of what grows

# How a row adapts: the method, the signal that it grows by, and its rank at the start, or what says
# the ranks.
ROWS = {
    "LoRA": ("lora", None, RANK),
    "core, no growth": ("triadapt", None, "LoRA's numbers"),
    "importance": ("triadapt", "importance", START_RANK),
    "random": ("triadapt", "random", START_RANK),
    "uniform": ("triadapt", "uniform", START_RANK),
    "norm": ("triadapt", "norm", START_RANK),
    "norm-change": ("triadapt", "norm-change", START_RANK),
    "worth": ("triadapt", "worth", START_RANK),
    "ranks of worth": ("lora", None, "of worth"),
    "ranks of worth, permuted": ("lora", None, "of worth, permuted"),
    "full fine-tuning": ("full", None, None),
    adalora.ROW: ("lora", None, RANK),
}
GPT_TASKS = {"prose": [], "modules": ["--task", "modules", "--context", "64", "--batch-size", "16"]}
GPT_COMMON = ["--steps", "300", "--batch-size", "4", "--eval-interval", "300"]
RATES = {
    "prose": [5e-3, 1e-2, 2e-2],
    "modules": [6.25e-4, 1.25e-3, 2.5e-3],
    "MiniLM": [5e-4, 1e-3, 2e-3],
}
FULL = {"GPT": 1 / 5, "MiniLM": 1 / 10}  # full fine-tuning's rates, in those of adapters
# Rows that take another row's setting, at a multiple of its rate: {row: (other row, multiple)}.
TAKEN = {"ranks of worth": ("LoRA", 1), "ranks of worth, permuted": ("LoRA", 1)}


def at_higher_rate(row: str, multiple: int) -> str:
    return f"{row}, {multiple} times the rate"


HIGHER = {at_higher_rate(row, n): (row, n) for row in ("LoRA", "importance") for n in (2, 4)}
HALF = {f"{row}, half the rate": (row, 1 / 2) for row in ("LoRA", "worth")}
AGAIN = {
    "LoRA again": ("LoRA", 1),
    "LoRA at half the rate again": ("LoRA", 1 / 2),
    "uniform again": ("uniform", 1),
    "worth at half the rate again": ("worth", 1 / 2),
}
TAKEN |= HIGHER | HALF | AGAIN
ROWS |= {name: ROWS[row] for name, (row, _) in (HIGHER | HALF | AGAIN).items()}
# The last of them with another signal.
IN_PLACE = {f"{signal} in worth's place again": signal for signal in ("random", "importance")}
AGAIN |= dict.fromkeys(IN_PLACE, AGAIN["worth at half the rate again"])
TAKEN |= AGAIN
ROWS |= {name: ROWS[signal] for name, signal in IN_PLACE.items()}

# (base, seed) of a run.
SELECTION = {"GPT": [(0, 100), (1, 101)], "MiniLM": [(0, 100), (0, 101)]}
REPORTED = {
    "GPT": [(seed // 4, seed) for seed in range(12)],
    "MiniLM": [(0, seed) for seed in range(12)],
}
NEW_SEEDS = [(0, seed) for seed in range(12, 28)]  # of the rows "again"


def model_of(task: str) -> str:
    return "GPT" if task in GPT_TASKS else "MiniLM"


def first_rates(task: str) -> list[float]:
    """Those that every row tries; MiniLM's are the same for all folders."""
    return RATES.get(task, RATES["MiniLM"])


def second_settings(row: str) -> list[float]:
    """The values of a row's second setting."""
    method = ROWS[row][0]
    return {"lora": [16, 32], "triadapt": [1, 0.1], "full": [1, 0.7]}[method]


# What is to be run.


def selection(found: list[dict], task: str, row: str) -> dict[tuple[float, float], float]:
    """{setting: mean validation loss} of those that ran with all selection seeds."""
    places = SELECTION[model_of(task)]
    losses = {}  # {setting: {(base, seed): loss}}
    for cell in found:
        place = (cell["base"], cell["seed"])
        if (cell["task"], cell["row"]) == (task, row) and place in places:
            losses.setdefault((cell["rate"], cell["second"]), {})[place] = cell["val"]["loss"]
    return {s: statistics.mean(x.values()) for s, x in losses.items() if len(x) == len(places)}


def settings_to_try(found: list[dict], task: str, row: str) -> list[tuple[float, float]]:
    """(rate, second setting) that selection has yet to run; none once the best one is known."""
    known = selection(found, task, row)
    rates = sorted({*first_rates(task), *(rate for rate, _ in known)})
    grid = [(rate, second) for rate in rates for second in second_settings(row)]
    if set(grid) <= set(known):
        best, _ = best_setting(found, task, row)
        beyond = {rates[0]: best / 2, rates[-1]: best * 2}.get(best)
        grid = [] if beyond is None else [(beyond, second) for second in second_settings(row)]
    return [setting for setting in grid if setting not in known]


def best_setting(found: list[dict], task: str, row: str) -> tuple[float, float]:
    """The one of lowest loss; of equal ones that with the lower rate."""
    known = selection(found, task, row)
    return min(known, key=lambda setting: (known[setting], setting))


def places_of(task: str, row: str) -> list[tuple[int, int]]:
    """(base, seed) of a row's reported runs."""
    if row in AGAIN:
        return NEW_SEEDS
    places = REPORTED[model_of(task)]
    return places[::3] if row in HIGHER else places


def runs_left(found: list[dict], task: str, row: str) -> list[dict]:
    """The runs of a row that are next: its selection, and then those to report."""
    chooses, multiple = TAKEN.get(row, (row, 1))
    settings = settings_to_try(found, task, chooses)
    places = SELECTION[model_of(task)]
    if settings:
        row = chooses
    else:
        rate, second = best_setting(found, task, chooses)
        settings = [(multiple * rate, second)]
        places = places_of(task, row)
    keys = ("task", "row", "rate", "second", "base", "seed")
    ran = {tuple(cell[key] for key in keys) for cell in found}
    left = []
    for rate, second in settings:
        for base, seed in places:
            values = (task, row, rate, second, base, seed)
            if values not in ran:
                left.append(dict(zip(keys, values, strict=True)))
    return left


def ranks_of_worth(found: list[dict], run: dict) -> dict[str, int] | None:
    """The final ranks of growth by worth at its chosen setting, of a run's base and seed."""
    if settings_to_try(found, run["task"], "worth"):
        return None
    rate, second = best_setting(found, run["task"], "worth")
    wanted = run | {"row": "worth", "rate": rate, "second": second}
    for cell in found:
        if all(cell[key] == value for key, value in wanted.items()):
            return cell["ranks"]
    return None


# A run.


def start_ranks(run: dict, found: list[dict], adapters: dict[str, LoRALinear]) -> dict[str, int]:
    """{name: rank} before the first step."""
    if not adapters:
        return {}
    start = ROWS[run["row"]][2]
    sizes = {name: a.in_features + a.out_features for name, a in adapters.items()}
    if isinstance(start, int):
        return dict.fromkeys(sizes, start)
    if start == "LoRA's numbers":  # a core costs r (r + 1) more, so the last matrices get one less
        ranks = dict.fromkeys(sizes, 1)
        for name in itertools.cycle(sizes):
            grown = ranks | {name: ranks[name] + 1}
            if sum(r * (sizes[n] + r + 1) for n, r in grown.items()) > RANK * sum(sizes.values()):
                return ranks
            ranks = grown

    ranks = ranks_of_worth(found, run)
    if start == "of worth, permuted":
        rng = random.Random(f"{run['task']} {run['base']} {run['seed']}")
        for size in sorted(set(sizes.values())):
            names = [name for name in ranks if sizes[name] == size]
            permuted = rng.sample([ranks[name] for name in names], len(names))
            ranks = ranks | dict(zip(names, permuted, strict=True))
    return ranks


def measure(run: dict, found: list[dict], folder: str) -> dict:
    """One silent run, as a cell; a task of MiniLM is in a folder."""
    method, score, _ = ROWS[run["row"]]
    ratio = 1.0  # of the rate to the row's; MiniLM's new head always learns at the row's
    if method == "full":
        ratio = FULL[model_of(run["task"])] * run["second"]

    def give_ranks(adapters: dict[str, LoRALinear], optimizer: torch.optim.Optimizer) -> None:
        for name, rank in start_ranks(run, found, adapters).items():
            if rank > adapters[name].rank:
                adapters[name].grow(rank - adapters[name].rank, optimizer)

    settings = {"lr": run["rate"] * ratio, "method": method, "score": score}
    if method != "full":
        settings |= {"init_rank": 1, "alpha": 16}  # give_ranks does the rest
    if score:
        settings["init_rank"] = START_RANK
    if method == "lora":
        settings["alpha"] = run["second"]
    if method == "triadapt":
        settings["core_lr_ratio"] = run["second"]
    reported = (run["base"], run["seed"]) not in SELECTION[model_of(run["task"])]
    with contextlib.redirect_stdout(io.StringIO()):
        if model_of(run["task"]) == "GPT":
            result = measure_gpt(run, settings, give_ranks)
        else:
            result = minilm.measure(
                folder,
                run["seed"],
                settings,
                give_ranks,
                head_lr_ratio=1 / ratio,
                read_test=reported,
            )
    if not reported:
        result["test"] = None
    facts = {"settings": settings, "device": train.pick_device(None).type}
    return run | result | facts | {"torch": torch.__version__}


def measure_gpt(run: dict, settings: dict, give_ranks: Callable) -> dict:
    """A run of train.py on a base of bases.py."""
    path, _, _ = bases.prepare(run["base"], bases.STEPS)
    line = ["--base", str(path), "--seed", str(run["seed"])]
    line += ["--out", f"runs/evidence-{zlib.crc32(repr(run).encode()):08x}"]
    for name, value in settings.items():
        if value is not None:
            line += [train.option(name), str(value)]
    if settings["score"]:
        line += ["--budget", "numbers"]
    elif settings["method"] == "triadapt":
        line += ["--schedule", "none"]
    options = [*GPT_COMMON, *GPT_TASKS[run["task"]], *line]

    class Given(train.Run):
        def adapt(self, gpt: train.GPT) -> None:
            super().adapt(gpt)
            give_ranks(self.adapters, self.optimizer)

    kind = adalora.AdaLoRA if run["row"] == adalora.ROW else Given
    finished = kind(train.parse_args(options))
    try:
        finished.train()
    except (FloatingPointError, RuntimeError, ValueError) as error:
        if not isinstance(error, FloatingPointError) and "nan" not in str(error):
            raise
    shutil.rmtree(finished.out, ignore_errors=True)  # a run that diverged may have written nothing
    log = finished.log
    diverged = log[-1]["kind"] != "end" or not math.isfinite(log[-2]["val_loss"])
    if diverged:
        untrained = kind(train.parse_args(options))  # AdaLoRA changes its own
        losses = untrained.evaluate("val") | untrained.evaluate("test")
    else:
        losses = log[-2] | log[-1]
    return {
        "val": {k.removeprefix("val_"): v for k, v in losses.items() if k.startswith("val_")},
        "test": {k.removeprefix("test_"): v for k, v in losses.items() if k.startswith("test_")},
        "ranks": {name: adapter.rank for name, adapter in finished.adapters.items()},
        "trainable": max(entry["trainable"] for entry in log),
        "seconds": finished.seconds,
        "diverged": diverged,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", help="prose, modules, or folders of GLUE")
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help="i n: about 1 run in n")
    parser.add_argument("--results", type=Path, default=cells.RESULTS / "evidence.jsonl")
    args = parser.parse_args()
    folders = {Path(task).name: task for task in args.tasks}
    if len(folders) < len(args.tasks):
        parser.error("two tasks of one name")
    if any(row.startswith("ranks of") for row in args.rows) and "worth" not in args.rows:
        parser.error("--rows: the ranks of worth need worth, too")
    if adalora.ROW in args.rows and not adalora.AVAILABLE:
        print(f"{adalora.ROW}: left out, as peft is not installed")
    wanted = [(task, row) for task in folders for row in args.rows if has_row(task, row)]
    took = []
    while True:
        found = cells.read(args.results)
        left = []
        for task, row in wanted:
            left += [run for run in runs_left(found, task, row) if run not in left]
        if not left:
            return
        run = next_run(left, found, args.share)
        if run is None:
            time.sleep(5)  # another process is at the run that is waited for
            continue
        began = time.perf_counter()
        cell = measure(run, found, folders[run["task"]])
        cells.append(args.results, cell)
        took.append(time.perf_counter() - began)
        told = " ".join(str(value) for value in run.values())
        hours = statistics.mean(took) * len(left) / args.share[1] / 3600
        print(
            f"{told}: val {cell['val']['loss']:.4f}; {hours:.1f} h for what can start now",
            flush=True,
        )


def has_row(task: str, row: str) -> bool:
    """Whether it is run: AdaLoRA, which is peft's, on GPT alone, and the rows "again" on MiniLM."""
    if row == adalora.ROW:
        return adalora.AVAILABLE and model_of(task) == "GPT"
    return row not in AGAIN or model_of(task) == "MiniLM"


def next_run(left: list[dict], found: list[dict], share: tuple[int, int]) -> dict | None:
    """The first of its share that has all it needs; where there is none, the last of another's."""
    ready = [r for r in left if not r["row"].startswith("ranks of") or ranks_of_worth(found, r)]
    own = [r for r in ready if zlib.crc32(repr(r).encode()) % share[1] == share[0]]
    if own:
        return own[0]
    return ready[-1] if ready else None


if __name__ == "__main__":
    main()
