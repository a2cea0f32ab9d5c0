"""Methods x tasks x seeds, through train.py's own code: does growth pay, and does the importance know where?

    python plots/compare.py                               # everything: hours on two CPU cores; goes on where it was
    python plots/compare.py --tasks prose --seeds 1       # a part of it
    python plots/compare.py --share 0 2                   # every second row, to run two processes side by side

Rules: the same steps and batches for all. The learning rate of each (task, row) is the one of RATES with the best
validation result of seed 0; then it runs on the other seeds. Test results are of the last step, and of the step that was
best on validation. A line of plots/compare.jsonl is a finished run with its whole configuration, and is never edited.
`python plots/draw.py` makes README's table and the figures of them.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402
import train  # noqa: E402
from data import batches, text_examples  # noqa: E402
from triadapt import SIGNALS, LoRALinear, RankAllocator, TriAdaptLinear  # noqa: E402


class Random(RankAllocator):
    """A control: any matrix may be next."""

    def scores(self):
        return dict(zip(self.adapters, torch.rand(len(self.adapters)).tolist()))


class Uniform(RankAllocator):
    """A control: the matrix of lowest rank is next, round robin."""

    def scores(self):
        return {name: -float(adapter.rank) for name, adapter in self.adapters.items()}


class Sensitivity(RankAllocator):
    """IncreLoRA's signal (Zhang et al. 2023): |w dL/dw|, smoothed over steps, times its smoothed uncertainty."""

    def step(self, t: int) -> list[str]:
        moments = self.state.setdefault("moments", {name: {} for name in self.adapters})
        for name, adapter in self.adapters.items():
            for tensor, axis in adapter.GROWS_ALONG.items():
                p = getattr(adapter, tensor).detach()
                mean, spread = moments[name].get(tensor, (torch.zeros_like(p), torch.zeros_like(p)))
                if mean.shape != p.shape:  # grown since: what is new starts at zero
                    new = torch.zeros_like(p).narrow(axis, 0, p.shape[axis] - mean.shape[axis])
                    mean, spread = torch.cat((mean, new), axis), torch.cat((spread, new), axis)
                now = (p * getattr(adapter, tensor).grad).abs()
                mean = 0.85 * mean + 0.15 * now
                moments[name][tensor] = (mean, 0.85 * spread + 0.15 * (now - mean).abs())
        return super().step(t)

    def scores(self):
        if "moments" not in self.state:  # before the first step
            return dict.fromkeys(self.adapters, 0.0)
        return {name: torch.cat([(mean * spread).flatten() for mean, spread in tensors.values()]).mean().item()
                for name, tensors in self.state["moments"].items()}


SIGNALS |= {"random": Random, "uniform": Uniform, "sensitivity": Sensitivity}


def size(adapter: LoRALinear, rank: int) -> int:
    """How many numbers an adapter trains at a rank."""
    core = rank * (rank + 1) if isinstance(adapter, TriAdaptLinear) else 0
    return rank * (adapter.base.in_features + adapter.base.out_features) + core


def within_parameters(allocator: type[RankAllocator]) -> type[RankAllocator]:
    """The same signal at equal parameters: only what leaves all adapters within LoRA's number of them may grow."""
    class Within(allocator):
        def scores(self):
            scores, adapters = super().scores(), self.adapters
            lora = sum(a.base.in_features + a.base.out_features for a in adapters.values()) * self.budget // len(adapters)
            used, fitting = sum(size(a, a.rank) for a in adapters.values()), {}
            for name in sorted(scores, key=scores.get, reverse=True):
                more = size(adapters[name], adapters[name].rank + 1) - size(adapters[name], adapters[name].rank)
                if used + more <= lora:
                    used, fitting[name] = used + more, scores[name]
            return fitting

    return Within


SIGNALS |= {f"{name}, equal parameters": within_parameters(allocator) for name, allocator in SIGNALS.items()}

TASKS = {"prose": [], "prose, 20 000 tokens": [], "modules": ["--task", "modules", "--context", "64", "--batch-size", "16"]}
COMMON = ["--steps", "300", "--batch-size", "4", "--eval-interval", "60"]
ROWS = {"full fine-tuning": ["--method", "full"], "LoRA": ["--method", "lora"], "core, no growth": ["--schedule", "none"],
        "linear": ["--schedule", "linear"], "exponential": ["--schedule", "exponential"], "fixed": ["--schedule", "fixed"]}
ROWS |= {f"linear, {signal}": ["--signal", signal] for signal in SIGNALS if signal != "importance"}
RATES = {"prose": (5e-3, 1e-2, 2e-2, 4e-2), "prose, 20 000 tokens": (2.5e-3, 5e-3, 1e-2, 2e-2),
         "modules": (1e-3, 2.5e-3, 5e-3, 1e-2)}  # of adapters; full fine-tuning tries a fifth of each


class Measured(train.Run):
    """A run that also tests at every evaluation, for the step that is best on validation."""

    def note(self, kind: str, **values) -> None:
        super().note(kind, **(values | self.evaluate("test") if kind == "eval" else values))


@torch.no_grad()
def code_loss(run: train.Run) -> float:
    """Loss on held-out code, the text of the base's pretraining, in nats per token: 64 windows."""
    config, run.model.config = run.model.config, dataclasses.replace(run.model.config, classes=0)
    examples = text_examples("code", run.tokenizer, config.context)[0]["test"]
    chosen = [examples[i] for i in range(0, len(examples), len(examples) // 64)][:64]
    total = sum(train.predict(run.model, *batch, run.device)[0].item() for batch in batches(chosen, 8))
    run.model.config = config
    return total / (len(chosen) * config.context)


def measure(task: str, row: str, rate: float, seed: int, options: list[str]) -> dict:
    """One silent run, as a line of results."""
    folder = f"runs/compare/{task}-{row}-{rate:g}-{seed}".replace(" ", "_")
    given = [*COMMON, *TASKS[task], *ROWS[row], "--lr", str(rate), "--seed", str(seed), "--out", folder, *options]
    with contextlib.redirect_stdout(io.StringIO()):
        run = Measured(train.parse_args(given))
        if task == "prose, 20 000 tokens":
            run.examples["train"] = run.examples["train"][:20_000 - run.model.config.context]
        before = code_loss(run)
        run.train()
    evals = [entry for entry in run.log if entry["kind"] == "eval"]
    best = min(evals, key=lambda entry: entry["val_loss"])
    metrics = [key.removeprefix("val_") for key in evals[-1] if key.startswith("val_")]
    trainable = {0: run.log[0]["trainable"]} | {e["step"]: e["trainable"] for e in run.log if e["kind"] == "allocation"}
    steps = [*trainable, run.args.steps]
    mean = sum(n * (end - start) for (start, n), end in zip(trainable.items(), steps[1:])) / run.args.steps
    line = {"task": task, "row": row, "rate": rate, "seed": seed, "settings": vars(run.args),
            "before": {key: run.log[0][f"test_{key}"] for key in metrics},
            "val": {key: evals[-1][f"val_{key}"] for key in metrics}, "best_val": {key: best[f"val_{key}"] for key in metrics},
            "test": {key: evals[-1][f"test_{key}"] for key in metrics}, "best_test": {key: best[f"test_{key}"] for key in metrics},
            "best_step": best["step"], "forgetting": code_loss(run) - before, "ranks": run.log[-1]["ranks"],
            "trainable": {"initial": trainable[0], "peak": max(trainable.values()), "mean": round(mean),
                          "final": run.log[-1]["trainable"]},
            "seconds": run.seconds, "growth_seconds": run.growth_seconds, "file_bytes": (run.out / "adapter.pt").stat().st_size,
            "peak_bytes": torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None, "torch": torch.__version__}
    shutil.rmtree(run.out)
    return line


def best_rate(cells: list[dict], rates: list[float]) -> list[float]:
    """The rate of the lowest validation loss on seed 0; all of them until all have been tried."""
    tried = {cell["rate"]: cell["val"]["loss"] for cell in cells if cell["seed"] == 0}
    return [min(tried, key=tried.get)] if len(tried) == len(rates) else rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help="i n: the rows i, i + n, i + 2n, ...")
    parser.add_argument("--results", type=Path, default=HERE / "compare.jsonl")
    args, options = parser.parse_known_args()
    args.results.touch()
    if "modules" in args.tasks:
        rows = [*data.module_rows()]
        data.module_rows = lambda: rows  # parsed once for all runs
    pairs = [(task, row) for task in args.tasks for row in args.rows][args.share[0]::args.share[1]]
    for seed in range(args.seeds):
        for task, row in pairs:
            cells = [cell for cell in map(json.loads, args.results.read_text().splitlines())
                     if (cell["task"], cell["row"]) == (task, row)]
            rates = [rate / 5 if row == "full fine-tuning" else rate for rate in RATES[task]]
            done = {(cell["rate"], cell["seed"]) for cell in cells}
            for rate in rates if seed == 0 else best_rate(cells, rates):
                if (rate, seed) not in done:
                    line = measure(task, row, rate, seed, options)
                    with open(args.results, "a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(f"{task}; {row}; rate {rate:g}; seed {seed}; test {line['test']}; {line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
