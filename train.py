"""Adapt a small GPT with TriAdaptLoRA, LoRA or full fine-tuning, and see which matrices grow.

python train.py --schedule linear                       # a minute on two CPU cores
python train.py --method lora --data my.txt             # another method, a text of yours
python train.py --resume runs/triadapt-linear-1         # continues a stopped run, to the same bits
"""

# From top to bottom: settings, the training loop, the run and its parts, files, report.

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import data
from data import NO_TARGET, TASKS, Task
from model import GPT, GPTConfig, generate
from plots.run import draw_run
from triadapt import (
    ALLOCATORS,
    METHODS,
    SCHEDULES,
    adapter_state_dict,
    add_adapters,
    load_adapter_state_dict,
)


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """All settings. A default of None depends on other settings, see fill_defaults."""
    parser = argparse.ArgumentParser(
        prog=prog or f"python {shlex.quote(sys.argv[0])}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    path = os.path.expanduser  # no shell expands the ~ in --out=~/runs
    # Data and base model.
    add("--data", type=path, default="prose", help=f"{', '.join(TASKS)}, or a UTF-8 file [prose]")
    add("--context", type=int, help="tokens of an example [all that the base allows]")
    add("--base", type=path, default="base.pt", help=f"a model.pt, or {', '.join(BASES)} [base.pt]")
    # Adapters.
    add("--method", choices=[*METHODS, "full"], default="triadapt", help="full trains every weight")
    add("--rank", type=int, default=8, help="target rank of a matrix, for budget and scale [8]")
    add("--init-rank", type=int, help="rank at the start [half the rank if it is to grow]")
    add("--alpha", type=float, default=16.0, help="the scale of the update is alpha / rank [16]")
    add("--target-modules", default="q|k|v|o|fc|proj", help="regular expression [%(default)s]")
    add("--dropout", type=float, default=0.0, help="probability, for an adapter's input [0]")
    # Growth.
    add("--schedule", choices=[*SCHEDULES, "none"], help="how many matrices grow at an allocation")
    add("--allocator", default="importance", help=f"which ones grow: {', '.join(ALLOCATORS)}")
    add("--warmup", type=int, help="optimizer steps before growth [2 %% of the steps]")
    add("--interval", type=int, help="optimizer steps between allocations [steps / 60]")
    add("--rank-step", type=int, default=1, help="ranks that a matrix grows by at once [1]")
    add("--top-k", type=int, default=4, help="matrices that grow, for the fixed schedule [4]")
    # Training.
    add("--steps", type=int, default=300, help="optimizer steps [300]")
    add("--batch-size", type=int, default=8, help="examples of an optimizer step [8]")
    add("--lr", type=float, help="peak learning rate [1e-2, for full 2e-3]")
    add("--seed", type=int, default=0, help="of adapters, batches and dropout [0]")
    add("--device", help="such as cuda:1 [the accelerator if there is one, else the CPU]")
    add("--eval-interval", type=int, help="steps between evaluations [a tenth of the steps]")
    # Output.
    add("--out", type=path, help="a new folder for the results [runs/METHOD-SCHEDULE-NUMBER]")
    add("--resume", type=path, help="the folder of a stopped run, to finish it with its settings")
    return parser


def fill_defaults(args: argparse.Namespace) -> None:
    """Give the settings that depend on others their values."""
    if args.schedule is None:
        has_score = args.allocator != "importance" or hasattr(
            METHODS.get(args.method), "importance"
        )
        args.schedule = "linear" if has_score and args.method != "full" else "none"
    if args.init_rank is None:
        args.init_rank = args.rank if args.schedule == "none" else (args.rank + 1) // 2
    if args.warmup is None:
        args.warmup = args.steps // 50
    if args.interval is None:
        args.interval = max(1, args.steps // 60)
    if args.lr is None:
        args.lr = 2e-3 if args.method == "full" else 1e-2
    if args.eval_interval is None:
        args.eval_interval = max(1, args.steps // 10)


def train(run: "Run") -> None:
    """The training loop, from wherever the run is to its last step."""
    args, model, optimizer, allocator = run.args, run.model, run.optimizer, run.allocator
    losses, busy = [], 0.0  # since the last evaluation: losses of the steps, seconds
    for step in range(run.step + 1, args.steps + 1):
        began = time.perf_counter()

        # Forward and backward. Seed and step determine the batch, dropout and new ranks, so that a
        # resumed run needs no state of a random generator.
        torch.manual_seed(args.seed * 1_000_003 + step)
        inputs, targets = draw_batch(run.examples["train"], args.seed, step, args.batch_size)
        model.train()
        loss_sum, count, _ = run.forward(inputs, targets)
        loss = loss_sum / count
        if not loss.isfinite():
            sys.exit(f"the loss is {loss} at step {step}: give a lower --lr than {args.lr}")
        optimizer.zero_grad()
        loss.backward()

        # Optimizer step. The parameters are listed anew, because growth replaces them.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        lr = learning_rate(step, args.steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        optimizer.step()

        # Growth, between two optimizer steps.
        grown = allocator.step(step) if allocator else []

        # Report and save.
        run.step = step
        losses.append(loss.item())
        busy += time.perf_counter() - began
        if grown:
            scores, threshold = allocator.last_scores, allocator.threshold
            run.note("allocation", grown=grown, threshold=threshold, scores=scores)
        if step % args.eval_interval == 0 or step == args.steps:
            speed = len(losses) * inputs.numel() / busy
            train_loss = sum(losses) / len(losses)
            run.note_evaluation(train_loss, lr=lr, grad_norm=norm.item(), tokens_per_second=speed)
            run.save()
            losses, busy = [], 0.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 1 ... steps: a linear warm-up over 3 % of them, then half a cosine down to a
    tenth of the peak."""
    rise = max(1, round(0.03 * steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))
    return peak * min(step / rise, 0.1 + 0.9 * fall)


def draw_batch(examples, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: (inputs, targets), (size, time) each. (seed, step) determines it."""
    indices = np.random.default_rng((seed, step)).integers(len(examples), size=size)
    return data.batch(examples, indices)


def parameter_groups(model: nn.Module) -> list[dict]:
    """The trained parameters, a group for each ratio to the common learning rate (LR_RATIOS)."""
    groups = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                ratio = getattr(module, "LR_RATIOS", {}).get(name, 1.0)
                groups.setdefault(ratio, []).append(p)
    return [{"params": params, "lr_ratio": ratio} for ratio, params in groups.items()]


class Run:
    """A training run: what it is made of, how far it is, and its log."""

    def __init__(self, args: argparse.Namespace):
        """Read and build everything. Raises ValueError or OSError for what does not fit."""
        self.args = args
        self.device = pick_device(args.device)

        # Data and base model.
        self.task = open_task(args.data)
        torch.manual_seed(args.seed)  # for a base from scratch
        model, self.tokenizer = open_base(args.base, self.task.texts)
        self.model = model.to(self.device)
        context = args.context or model.config.context
        if context > model.config.context:
            raise ValueError(f"--context {context}: this base allows {model.config.context}")
        self.examples = self.task.examples(self.tokenizer, context)
        self.checksum = checksum(self.task, self.tokenizer, model)

        # Adapters, optimizer, allocator.
        torch.manual_seed(args.seed)
        self.adapters = {}
        if args.method != "full":
            sizes = (args.rank, args.init_rank, args.alpha, args.dropout)
            self.adapters = add_adapters(model, args.target_modules, args.method, *sizes)
        self.task.add_head(model)
        groups = parameter_groups(model)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.allocator = None
        if args.schedule != "none":
            self.allocator = make_allocator(args, self.adapters, self.optimizer)

        # Progress.
        self.step = 0
        self.log = []
        self.began = time.perf_counter()
        if args.resume:
            self.load()
        else:
            args.out = str(new_folder(args))

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int, object]:
        """(summed loss, number of targets, what the task's metrics need) of a batch."""
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        bfloat16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            logits = self.model(inputs)
        logits = logits.float()
        count = (targets != NO_TARGET).sum().item()
        return self.task.loss(logits, targets), count, self.task.collect(logits, targets)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """The mean loss and the metrics: of all test examples, and of at most 512 of "val"."""
        self.model.eval()
        examples = self.examples[split]
        size = len(examples) if split == "test" else min(len(examples), 512)
        loss, targets, collected = 0.0, 0, []
        for indices in torch.arange(size).split(4 * self.args.batch_size):
            loss_sum, count, outputs = self.forward(*data.batch(examples, indices))
            loss += loss_sum.item()
            targets += count
            collected.append(outputs)
        loss /= targets
        results = {"loss": loss} | self.task.metrics(loss, collected)
        return {f"{split}_{name}": value for name, value in results.items()}

    def test(self) -> dict:
        """Test loss and metrics, and how the model continues a text."""
        results = self.evaluate("test")
        prompt = self.task.prompt(self.examples["test"])
        if prompt is not None:
            results["sample"] = self.tokenizer.decode(generate(self.model, prompt))
        return results

    # The log.

    def note(self, kind: str, **values) -> None:
        """Append an entry to the log, and print it."""
        ranks = {name: adapter.rank for name, adapter in self.adapters.items()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        entry = {
            "kind": kind,
            "step": self.step,
            "total_rank": sum(ranks.values()),
            "trainable": sum(p.numel() for p in parameters),
            "seconds": time.perf_counter() - self.began,
            "ranks": ranks,
        }
        if kind != "allocation":
            able = {name: a for name, a in self.adapters.items() if hasattr(a, "importance")}
            entry["importance"] = {name: a.importance().item() for name, a in able.items()}
        self.log.append(entry | values)
        report(self)

    def note_start(self) -> None:
        """The first entry: the settings, what was built, and the results before training."""
        self.note(
            "start",
            command=shlex.join(sys.argv),
            python=platform.python_version(),
            torch=torch.__version__,
            device=str(self.device),
            settings=settings_of(self.args),
            parameters=sum(p.numel() for p in self.model.parameters()),
            budget=self.allocator.budget if self.allocator else None,
            plan=self.allocator.plan() if self.allocator else [],
            **self.test(),
        )

    def note_evaluation(self, train_loss: float, **values) -> None:
        if self.device.type == "cuda":
            values["peak_memory"] = torch.cuda.max_memory_allocated(self.device)  # bytes
        self.note("eval", train_loss=train_loss, **values, **self.evaluate("val"))

    # Files.

    def save(self) -> None:
        """The checkpoint, the log, and the result: adapter.pt, or model.pt for --method full."""
        trained = adapter_state_dict(self.model)
        settings = settings_of(self.args)
        checkpoint = {
            "settings": settings,
            "checksum": self.checksum,
            "trained": trained,
            "optimizer": self.optimizer.state_dict(),
            "allocator": self.allocator.state_dict() if self.allocator else {},
            "step": self.step,
            "seconds": time.perf_counter() - self.began,
            "log": self.log,
        }
        out = Path(self.args.out)
        lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in self.log]
        save_file(out / "log.jsonl", "".join(lines).encode())
        if self.adapters:
            save_file(out / "adapter.pt", {"settings": settings, "adapter": trained})
        else:
            save_model(out / "model.pt", self.model, self.tokenizer)
        save_file(out / "checkpoint.pt", checkpoint)

    def load(self) -> None:
        """Continue from the checkpoint: adapters first, then optimizer, then allocator."""
        saved = load_checkpoint(self.args.resume)
        if saved["checksum"] != self.checksum:
            raise ValueError(
                f"--resume {self.args.resume}: the data or the weights of --base changed since "
                "then; restore them, or start a new run"
            )
        load_adapter_state_dict(self.model, saved["trained"], self.optimizer)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.allocator:
            self.allocator.load_state_dict(saved["allocator"])
        self.step = saved["step"]
        self.log = saved["log"]
        self.began -= saved["seconds"]


# The parts of a run.


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or else the accelerator of this machine, or else the CPU."""
    found = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(1, device=found).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not available here; try --device cpu") from error


def open_task(spec: str) -> Task:
    """The task of --data: NAME or NAME:ARGUMENT of data.TASKS, or else a UTF-8 file."""
    name, _, argument = spec.partition(":")
    if name in TASKS:
        return TASKS[name](os.path.expanduser(argument))
    if not Path(spec).is_file():
        raise ValueError(f"--data {spec}: not a file, and not one of {', '.join(TASKS)}")
    return Task(spec, data.file_documents(spec))


def open_base(spec: str, texts: list[str] = ()) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of --base: NAME or NAME:ARGUMENT of BASES, or else a model.pt.

    texts: what a base from scratch trains its tokenizer on.
    """
    name, _, argument = spec.partition(":")
    if name in BASES:
        return BASES[name](os.path.expanduser(argument), texts)
    path = Path(spec)
    if not path.exists():
        path = Path(__file__).with_name(spec)  # base.pt is found from any folder
    if not path.is_file():
        raise ValueError(f"--base {spec}: not a file, and not one of {', '.join(BASES)}")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if "config" not in saved:
        raise ValueError(f"--base {spec}: holds no model; give a model.pt of --method full")
    gpt = GPT(GPTConfig(**saved["config"]))
    gpt.load_state_dict(saved["model"])
    return gpt, data.open_tokenizer(saved["tokenizer"])


def scratch(argument: str, texts: list[str]) -> tuple[GPT, Tokenizer]:
    """Random weights, and a tokenizer that is trained on the texts."""
    config = GPTConfig()
    return GPT(config), data.train_tokenizer(texts, config.vocab_size)


# What --base knows. A fork adds its own.
BASES = {"scratch": scratch}


def make_allocator(args: argparse.Namespace, adapters: dict, optimizer):
    """The allocator of --allocator: NAME or NAME:ARGUMENT of ALLOCATORS."""
    name, _, argument = args.allocator.partition(":")
    if name not in ALLOCATORS:
        raise ValueError(f"--allocator {name}: must be one of {', '.join(ALLOCATORS)}")
    return ALLOCATORS[name](
        adapters,
        optimizer,
        total_steps=args.steps,
        warmup=args.warmup,
        interval=args.interval,
        schedule=args.schedule,
        rank_step=args.rank_step,
        top_k=args.top_k,
        **({"argument": argument} if argument else {}),
    )


def checksum(task: Task, tokenizer: Tokenizer, model: nn.Module) -> str:
    """Changes if the data, the tokenizer or a weight of the base does."""
    sha = hashlib.sha256(repr(task).encode("utf-8", "surrogatepass"))
    sha.update(tokenizer.to_str().encode())
    for tensor in model.state_dict().values():
        sha.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def settings_of(args: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(args).items() if name != "resume"}


# Files.


def new_folder(args: argparse.Namespace) -> Path:
    """The folder of a new run. Raises ValueError if --out holds something already."""
    if args.out:
        path = Path(args.out)
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ValueError(
                f"--out {path}: is not empty; give a new folder, or --resume {path} to finish a run"
            )
        return path
    for number in itertools.count(1):
        path = Path("runs", f"{args.method}-{args.schedule}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue


def save_file(path: Path, content: dict | bytes) -> None:
    """Write a file whole: after a failure the old one is still there."""
    if isinstance(content, dict):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save_model(path: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """A model.pt, which --base reads. The head of a task is left out."""
    weights = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    content = {"config": asdict(model.config), "tokenizer": tokenizer.to_str(), "model": weights}
    save_file(path, content)


def load_checkpoint(folder: str) -> dict:
    path = Path(folder, "checkpoint.pt")
    if not path.is_file():
        raise ValueError(f"--resume {folder}: there is no checkpoint.pt in this folder")
    return torch.load(path, map_location="cpu", weights_only=True)


# Report.


def report(run: Run) -> None:
    """Print the last entry of the log, in lines of at most 80 columns."""
    args, entry, first = run.args, run.log[-1], run.log[0]
    step, rank = entry["step"], entry["total_rank"]
    if entry["kind"] == "start":
        print(f"model     {entry['parameters']:,} parameters from {args.base}, on {run.device}")
        if run.adapters:
            print(f"adapters  {args.method} in {len(run.adapters)} matrices: {args.target_modules}")
        if run.allocator:
            plan = entry["plan"]
            print(
                f"growth    {args.schedule}: total rank {rank} -> {plan[-1][1]} of {entry['budget']}"
            )
            print(f"          {len(plan)} allocations, from step {plan[0][0]} to {plan[-1][0]}")
        print_test("before", entry)
    elif entry["kind"] == "eval":
        before = [e for e in run.log[:-1] if e["kind"] != "allocation"][-1]
        left = (time.perf_counter() - run.began) / step * (args.steps - step)
        print(
            f"step {step:5}/{args.steps}  rank {rank} (+{rank - before['total_rank']})  "
            f"train {entry['train_loss']:.4f}  val {entry['val_loss']:.4f}  {left:4.0f} s left"
        )
    elif entry["kind"] == "end":
        print_test("after", entry)
        print(
            f"trained   {first['trainable']:,} parameters at first, {entry['trainable']:,} at last"
        )
        print(f"time      {entry['seconds']:.0f} s")


def print_test(when: str, entry: dict) -> None:
    """The test results, and up to four lines of the sample."""
    metrics = [f"{k[5:]} {v:.4f}" for k, v in entry.items() if k.startswith("test_")]
    print(f"{when:8}  test {', '.join(metrics)}")
    lines = [line for line in entry.get("sample", "").splitlines() if line.strip()]
    for line in lines[:4]:
        print(f"        | {line[:70]}")


def finish(run: Run) -> None:
    """Test the trained model, draw the run, and say what to look at."""
    out = Path(run.args.out)
    run.note("end", **run.test())
    save_file(out / "run.png", draw_run(run.log))
    run.save()
    print(f"look at   {out / 'run.png'}")
    print(f"compare   python plots/compare.py {out} ANOTHER_RUN ...")


# The command line.


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The settings of a new run, or those of the run to resume. They cannot change then."""
    args = parser.parse_args(argv)
    if not args.resume:
        fill_defaults(args)
        return args
    saved = load_checkpoint(args.resume)["settings"] | {"out": args.resume}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name, value in saved.items():
        if getattr(args, name) != value:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(args, name)}: the run has {value}; leave it out")
    return args


def main(argv=None, parser: argparse.ArgumentParser | None = None, prog: str | None = None) -> Run:
    """A whole run, also of a fork. A mistake in settings or files ends in one line and code 2.

    parser: from make_parser, with the settings that a fork adds to it.
    prog: how the script is called, for its messages.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has not, and shows all letters
        sys.stdout.reconfigure(errors="replace")
    parser = parser or make_parser(prog)
    try:
        run = Run(parse_args(parser, argv))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    out = shlex.quote(run.args.out)
    if run.log and run.log[-1]["kind"] == "end":
        print(f"{out} is finished: look at {Path(run.args.out, 'run.png')}")
        return run
    try:
        if not run.log:
            run.note_start()
            run.save()
        train(run)
        finish(run)
    except KeyboardInterrupt:
        print(f"stopped at step {run.step}; to continue: {parser.prog} --resume {out}")
        sys.exit(130)
    return run


if __name__ == "__main__":
    main()
