"""Adapt a small GPT with TriAdaptLoRA, LoRA or full fine-tuning, and see which matrices grow.

python train.py --schedule linear                 # a minute on two CPU cores
python train.py --method lora --data my.txt       # another method, a text of yours
python train.py --resume runs/triadapt-linear-1   # continues a stopped run, to the same bits
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import data
import triadapt
from data import NO_TARGET, TASKS
from model import GPT, GPTConfig, generate
from plots.run import draw_run
from triadapt import ALLOCATORS, METHODS, SCHEDULES


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """All settings. A default of None depends on other settings: see fill_defaults."""
    prog = prog or f"python {shlex.quote(sys.argv[0])}"
    parser = argparse.ArgumentParser(prog, f"{prog} [--help] [--SETTING VALUE] ...", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    path = os.path.expanduser  # no shell expands the ~ of --out=~/runs
    # Data and base model.
    add("--data", type=path, default="prose", help=f"{', '.join(TASKS)}, or a UTF-8 file [prose]")
    add("--context", type=int, help="tokens of an example [all that the base allows]")
    add("--base", type=path, default="base.pt", help=f"a model.pt, or {', '.join(BASES)} [base.pt]")
    # Adapters.
    add("--method", choices=[*METHODS, "full"], default="triadapt", help="full trains all weights")
    add("--rank", type=int, default=8, help="target rank of a matrix: scale, mean in the end [8]")
    add("--init-rank", type=int, help="rank at the start [half the rank if it is to grow]")
    add("--alpha", type=float, default=16.0, help="the scale of the update is alpha / rank [16]")
    add("--target-modules", default="q|k|v|o|fc|proj", help="regular expression [%(default)s]")
    add("--dropout", type=float, default=0.0, help="probability for an adapter's input [0]")
    # Growth.
    add("--schedule", choices=[*SCHEDULES, "none"], help="how many matrices grow at once [linear]")
    add("--allocator", default="importance", help=f"which matrices grow: {', '.join(ALLOCATORS)}")
    add("--warmup", type=int, help="optimizer steps before growth [2 %% of the steps]")
    add("--interval", type=int, help="optimizer steps between allocations [steps / 60]")
    add("--rank-step", type=int, default=1, help="ranks that a matrix grows by at once [1]")
    add("--top-k", type=int, default=4, help="matrices that grow, for --schedule fixed [4]")
    # Training and results.
    add("--steps", type=int, default=300, help="optimizer steps [300]")
    add("--batch-size", type=int, default=8, help="examples of an optimizer step [8]")
    add("--lr", type=float, help="peak learning rate [1e-2, for --method full 2e-3]")
    add("--seed", type=int, default=0, help="of adapters, batches and dropout [0]")
    add("--device", help="such as cuda:1 [the accelerator if there is one, else the CPU]")
    add("--eval-interval", type=int, help="steps between evaluations [a tenth of the steps]")
    add("--out", type=path, help="a new folder for the results [runs/METHOD-SCHEDULE-NUMBER]")
    add("--resume", type=path, help="the folder of a stopped run, to finish it")
    return parser


def fill_defaults(args: argparse.Namespace) -> None:
    """Give the settings that depend on others their values."""
    if args.schedule is None:
        method = METHODS.get(args.method)
        grows = hasattr(method, "importance") or args.allocator.partition(":")[0] != "importance"
        args.schedule = "linear" if grows and args.method != "full" else "none"
    defaults = {
        "init_rank": args.rank if args.schedule == "none" else (args.rank + 1) // 2,
        "warmup": max(1, args.steps // 50),
        "interval": max(1, args.steps // 60),
        "lr": 2e-3 if args.method == "full" else 1e-2,
        "eval_interval": max(1, args.steps // 10),
    }
    vars(args).update({name: v for name, v in defaults.items() if getattr(args, name) is None})
    for name, value in vars(args).items():
        least = 0 if name in ("seed", "warmup") else 1
        if isinstance(value, int) and value < least:
            raise ValueError(f"{name} {value}: must be {least} or more")


def train(run: "Run") -> None:
    """The training loop, from wherever the run is to its last step."""
    args, model, optimizer, allocator = run.args, run.model, run.optimizer, run.allocator
    losses, tokens, seconds = [], 0, 0.0  # since the last evaluation
    for step in range(run.step + 1, args.steps + 1):
        began = time.perf_counter()

        # Forward and backward. Seed and step determine batch, dropout and new ranks, so a resumed
        # run needs no state of a random generator. Seeds lie a million steps apart.
        torch.manual_seed(args.seed * 1_000_003 + step)
        inputs, targets = draw_batch(run.examples["train"], args.seed, step, args.batch_size)
        inputs, targets = inputs.to(run.device), targets.to(run.device)  # (batch, time)
        model.train()
        loss = run.task.loss(run.logits(inputs), targets) / (targets != NO_TARGET).sum()
        if not loss.isfinite():
            sys.exit(f"the loss is {loss} at step {step}: give a lower --lr")
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
        tokens += inputs.numel()
        seconds += time.perf_counter() - began
        if grown:
            scores, threshold = allocator.last_scores, allocator.threshold
            run.note("allocation", grown=grown, threshold=threshold, scores=scores)
        if step % args.eval_interval == 0 or step == args.steps:
            mean, speed = sum(losses) / len(losses), tokens / seconds
            run.report(train_loss=mean, lr=lr, grad_norm=norm.item(), tokens_per_second=speed)
            run.save()
            losses, tokens, seconds = [], 0, 0.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 1 ... steps: up over 3 % of them, then a half cosine down to a tenth."""
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
    """A training run: its parts, how far it is, and its log."""

    def __init__(self, args: argparse.Namespace, checkpoint: dict | None = None):
        """Read and build everything. Raises ValueError or OSError for what does not fit."""
        self.args = args
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self.device = torch.device(args.device or accelerator or "cpu")

        # Data and base model.
        self.task = data.open_task(args.data)
        torch.manual_seed(args.seed)  # for a base from scratch
        model, self.tokenizer = open_base(args.base, self.task.texts)
        self.model = model.to(self.device)
        context = args.context or model.config.context
        if context > model.config.context:
            raise ValueError(f"--context {context}: this base allows {model.config.context}")
        self.examples = self.task.examples(self.tokenizer, context)
        base = checksum(self.tokenizer.to_str(), model.state_dict().values())
        self.checksums = {"data": checksum(repr(self.task)), "base": base}

        # Adapters, optimizer, allocator.
        torch.manual_seed(args.seed)
        self.adapters = {}
        if args.method != "full":
            sizes = (args.rank, args.init_rank, args.alpha, args.dropout)
            self.adapters = triadapt.add_adapters(model, args.target_modules, args.method, *sizes)
        self.task.add_head(model)
        groups = parameter_groups(model)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.allocator = self.make_allocator() if args.schedule != "none" else None

        # Progress. A resumed run continues with adapters first, then optimizer, then allocator.
        self.step = self.saved = 0
        self.log = []
        self.began = time.perf_counter()
        if checkpoint:
            if checkpoint["checksums"] != self.checksums:
                raise ValueError("--resume: the data or the base changed since then; restore them")
            triadapt.load_adapter_state_dict(model, checkpoint["trained"], self.optimizer)
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if self.allocator:
                self.allocator.load_state_dict(checkpoint["allocator"])
            self.step = self.saved = checkpoint["step"]
            self.log = checkpoint["log"]
            self.began -= checkpoint["seconds"]
            print(f"resumed  at step {self.step} of {args.steps}")

    def make_allocator(self):
        """The allocator of --allocator: NAME or NAME:ARGUMENT of ALLOCATORS."""
        args = self.args
        name, _, argument = args.allocator.partition(":")
        if name not in ALLOCATORS or (argument and ALLOCATORS[name] is triadapt.RankAllocator):
            raise ValueError(f"--allocator {args.allocator}: must be {' or '.join(ALLOCATORS)}")
        keys = ("warmup", "interval", "schedule", "rank_step", "top_k")
        settings = {key: getattr(args, key) for key in keys}
        if argument:
            settings["argument"] = argument
        return ALLOCATORS[name](self.adapters, self.optimizer, total_steps=args.steps, **settings)

    def logits(self, inputs: Tensor) -> Tensor:
        """(batch, time) -> (batch, time, outputs), in float32."""
        bfloat16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            return self.model(inputs).float()

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Mean loss and metrics: of all "test" examples, or of at most 512 of "val"."""
        self.model.eval()
        examples = self.examples[split]
        size = len(examples) if split == "test" else min(len(examples), 512)
        loss_sum, count, collected = 0.0, 0, []
        for indices in torch.arange(size).split(4 * self.args.batch_size):
            inputs, targets = (t.to(self.device) for t in data.batch(examples, indices))
            logits = self.logits(inputs)
            loss_sum += self.task.loss(logits, targets).item()
            count += (targets != NO_TARGET).sum().item()
            collected.append(self.task.collect(logits, targets))
        loss = loss_sum / count
        if not math.isfinite(loss):
            sys.exit(f"the {split} loss is {loss} at step {self.step}: give a lower --lr")
        metrics = {"loss": loss} | self.task.metrics(loss, collected)
        return {f"{split}_{name}": float(value) for name, value in metrics.items()}

    def test(self, when: str) -> dict:
        """Print and return test loss and metrics, and how the model continues a text."""
        results = self.evaluate("test")
        words = [f"{name} {value:.4f}".replace("_", " ") for name, value in results.items()]
        print(f"{when:8} {', '.join(words)}")
        examples = self.examples["test"]
        sample = self.task.sample(lambda ids: generate(self.model, ids), self.tokenizer, examples)
        results["sample"] = sample
        if sample is not None:
            lines = [line for line in sample.splitlines() if line.strip()]
            print(*(f"  sample | {line[:68]}" for line in lines[:4]), sep="\n")
        return results

    def note(self, kind: str, **values) -> dict:
        """Append an entry to the log, and return it."""
        ranks = {name: adapter.rank for name, adapter in self.adapters.items()}
        able = {name: a for name, a in self.adapters.items() if hasattr(a, "importance")}
        entry = {
            "kind": kind,
            "step": self.step,
            "seconds": time.perf_counter() - self.began,
            "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "total_rank": sum(ranks.values()),
            "ranks": ranks,
            "importance": {name: a.importance().item() for name, a in able.items()},
        }
        self.log.append(entry | values)
        return self.log[-1]

    def start(self) -> None:
        """Print and log what was built, and the results before the first step."""
        args, allocator = self.args, self.allocator
        parameters = sum(p.numel() for p in self.model.parameters())
        plan = allocator.plan() if allocator else []
        print(f"model    {parameters:,} parameters from {args.base}, on {self.device}")
        if self.adapters:
            print(f"adapters {args.method} on {len(self.adapters)} matrices: {args.target_modules}")
        if plan:
            (first, _), (last, end) = plan[0], plan[-1]
            ranks = f"total rank {allocator.total_rank} -> {end} of {allocator.budget}"
            print(f"growth   {args.schedule}: {ranks}, from step {first} to {last}")
        self.save()  # a run that is stopped now can be resumed
        self.note(
            "start",
            command=shlex.join(sys.argv),
            versions=[sys.version.split()[0], str(torch.__version__)],  # Python's and torch's
            device=str(self.device),
            settings=vars(args),
            checksums=self.checksums,
            lr_ratios=[group["lr_ratio"] for group in self.optimizer.param_groups],
            parameters=parameters,
            budget=allocator.budget if allocator else None,
            **self.test("before"),
        )
        self.save()

    def report(self, train_loss: float, **values) -> None:
        """Evaluate, log and print how far the run is."""
        if self.device.type == "cuda":
            values["peak_memory"] = torch.cuda.max_memory_allocated(self.device)  # bytes
        earlier = [entry for entry in self.log if entry["kind"] != "allocation"][-1]["total_rank"]
        entry = self.note("eval", train_loss=train_loss, **values, **self.evaluate("val"))
        step, steps, rank = self.step, self.args.steps, entry["total_rank"]
        left = entry["seconds"] / step * (steps - step)
        print(f"step {step:5}/{steps}  rank {rank} (+{rank - earlier})  ", end="")
        print(f"train {train_loss:.4f}  val {entry['val_loss']:.4f}  {left:4.0f} s left")

    def finish(self) -> None:
        """Test the trained model, draw the run, and say what to look at."""
        self.note("end", **self.test("after"))
        self.save()
        figure = Path(self.args.out, "run.png")
        save_file(figure, draw_run(self.log))
        first, last = self.log[0]["trainable"], self.log[-1]["trainable"]
        print(f"trained  {first:,} parameters at first, {last:,} at the end")
        print(f"look at  {figure}")

    def save(self) -> None:
        """Write log.jsonl, adapter.pt (or model.pt for --method full), and the checkpoint."""
        out = Path(self.args.out)
        settings, trained = vars(self.args), triadapt.adapter_state_dict(self.model)
        lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in self.log]
        save_file(out / "log.jsonl", "".join(lines).encode())
        if self.adapters:
            save_file(out / "adapter.pt", {"settings": settings, "adapter": trained})
        else:
            save_file(out / "model.pt", base_file(self.model, self.tokenizer))
        checkpoint = {
            "settings": settings,
            "checksums": self.checksums,
            "step": self.step,
            "seconds": time.perf_counter() - self.began,
            "log": self.log,
            "trained": trained,
            "optimizer": self.optimizer.state_dict(),
            "allocator": self.allocator.state_dict() if self.allocator else {},
        }
        save_file(out / "checkpoint.pt", checkpoint)
        self.saved = self.step


def save_file(path: Path, content: dict | bytes) -> None:
    """Write a file whole: after a failure the old one is still there."""
    temporary = path.with_name(f"{path.name}.part")
    if isinstance(content, dict):
        torch.save(content, temporary)
    else:
        temporary.write_bytes(content)
    os.replace(temporary, path)


def base_file(model: GPT, tokenizer: Tokenizer) -> dict:
    """What --base reads: sizes, tokenizer and weights, without the head of a task."""
    weights = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    return {"config": asdict(model.config), "tokenizer": tokenizer.to_str(), "model": weights}


def open_base(spec: str, texts: list[str] = ()) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of --base: NAME or NAME:ARGUMENT of BASES, or else a model.pt."""
    name, _, argument = spec.partition(":")
    if name in BASES:
        return BASES[name](os.path.expanduser(argument), texts)
    path = Path(spec)
    if not path.exists():
        path = Path(__file__).parent / spec  # base.pt is found from any folder
    if not zipfile.is_zipfile(path):  # as torch.save writes it
        raise ValueError(f"--base {spec}: not a model.pt, and not one of {', '.join(BASES)}")
    saved = torch.load(path, map_location="cpu")
    if "config" not in saved:
        raise ValueError(f"--base {spec}: holds no model; give the model.pt of --method full")
    gpt = GPT(GPTConfig(**saved["config"]))
    gpt.load_state_dict(saved["model"])
    return gpt, data.open_tokenizer(saved["tokenizer"])


# What --base knows: functions of the argument after the colon, and of the texts of --data.
BASES = {"scratch": lambda argument, texts: (GPT(GPTConfig()), data.train_tokenizer(texts))}


def checksum(content: str, tensors=()) -> str:
    """A short text that changes if the content does."""
    sha = hashlib.sha256(content.encode("utf-8", "surrogatepass"))
    for tensor in tensors:
        sha.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def new_folder(args: argparse.Namespace) -> str:
    """Make the folder of a new run. Raises ValueError if --out holds something already."""
    number = 1
    while not args.out and Path(f"runs/{args.method}-{args.schedule}-{number}").exists():
        number += 1
    folder = Path(args.out or f"runs/{args.method}-{args.schedule}-{number}")
    folder.mkdir(parents=True, exist_ok=bool(args.out))
    if any(folder.iterdir()):
        raise ValueError(f"--out {folder}: not empty; give a new folder, or --resume {folder}")
    return str(folder)


def parse_args(parser: argparse.ArgumentParser, argv) -> tuple[argparse.Namespace, dict | None]:
    """The settings, and the checkpoint if a run is resumed. Its settings cannot change."""
    args = parser.parse_args(argv)
    if not args.resume:
        fill_defaults(args)
        return args, None
    checkpoint = torch.load(Path(args.resume, "checkpoint.pt"), map_location="cpu")
    settings = checkpoint["settings"] | {"out": args.resume, "resume": args.resume}
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    for name, value in settings.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name}: the run to resume has {value} and keeps it; leave it out")
    return args, checkpoint


def main(argv=None, parser: argparse.ArgumentParser | None = None, prog: str | None = None) -> Run:
    """A whole run, also of a fork: `parser` has its settings, `prog` is how it is called. A mistake
    in settings or files ends in one line and code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, which can show all letters
        sys.stdout.reconfigure(errors="replace")
    parser = parser or make_parser(prog)
    try:
        args, checkpoint = parse_args(parser, argv)
        run = Run(args, checkpoint)
        if not checkpoint:
            args.out = new_folder(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    out = shlex.quote(args.out)
    if run.log and run.log[-1]["kind"] == "end":
        print(f"{out} is finished already; to draw it again: python plots/run.py {out}")
        return run
    try:
        if not run.log:
            run.start()
        train(run)
        run.finish()
    except KeyboardInterrupt:
        print(f"\nstopped after step {run.step}, saved at step {run.saved}")
        print(f"to continue: {parser.prog} --resume {out}")
        sys.exit(130)
    return run


if __name__ == "__main__":
    main()
