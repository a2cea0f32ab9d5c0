"""Adapt a small GPT to a text with TriAdaptLoRA, LoRA or full fine-tuning, and show how the ranks grow.

    python train.py --schedule linear                      # pretrains a base once, then adapts it; no download
    python train.py --method lora --rank 4 --data my.txt   # plain LoRA, on a text of yours
    python train.py --resume runs/triadapt-linear          # goes on after Ctrl-C, to the same bits

The results go to runs/NAME: config.json, log.jsonl, adapter.pt, checkpoint.pt and run.png.
"""
import argparse
import copy
import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from data import CACHE, TextData, documents, load, save, text_hash, train_tokenizer
from model import GPT, GPTConfig, generate
from plots.run import draw_run, tell
from triadapt import (METHODS, SCHEDULES, InputError, RankAllocator, adapter_state_dict, add_adapters, find_adapters,
                      load_adapter_state_dict, merge_adapters)

LEARNING_RATE = {"triadapt": 1e-2, "lora": 1e-2, "full": 2e-3}  # peaks, chosen on prose's val split: plots/defaults.py
say = tqdm.write  # print above the progress bar

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All settings of a run. Raises InputError for one that can't be."""
    def fail(message: str):
        raise InputError(message)

    def option(name: str, default, text: str, **more):
        text = text if default is None else f"{text} [{default}]"
        kind = str if default is None else type(default)
        group.add_argument(name, default=default, help=text, **({"type": kind} | more))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one line instead of the usage
    group = parser.add_argument_group("data")
    option("--data", "prose", "corpus: prose, code, or a UTF-8 text file")
    option("--batch-size", 8, "windows of one context per step")
    group = parser.add_argument_group("base model")
    option("--base", "code", "code: our small GPT, pretrained once on code; or a .pt file of base weights")
    option("--base-steps", 1000, "steps of that pretraining, about 90 s on two cores")
    group = parser.add_argument_group("adapter")
    option("--method", "triadapt", "how to adapt; full trains every weight", choices=[*METHODS, "full"])
    option("--rank", 8, "target rank; the budget is rank x matrices")
    option("--alpha", 16.0, "scale of the update, s = alpha / rank")
    option("--init-rank", None, "rank at the start [half the rank if it is to grow, else the rank]", type=int)
    option("--targets", "q k v o fc proj".split(), "matrices: names, or regular expressions", type=str, nargs="+")
    option("--dropout", 0.0, "probability that an adapter's input is dropped in training")
    option("--orth", 0.0, "weight in the loss of the orthogonality penalty on A and B")
    group = parser.add_argument_group("growth")
    schedules = [*SCHEDULES, "none"]
    option("--schedule", None, "how many matrices grow [linear if they can, else none]", choices=schedules)
    option("--rank-step", 1, "ranks that a matrix grows by at once")
    option("--interval", None, "steps between allocations [1 per 300 steps]", type=int)
    option("--warmup", None, "steps before growth begins [2 %% of the steps]", type=int)
    option("--top-k", 4, "matrices that grow at an allocation, for --schedule fixed")
    group = parser.add_argument_group("training")
    option("--steps", 300, "optimiser steps")
    option("--lr", None, f"peak learning rate {LEARNING_RATE}", type=float)
    option("--seed", 0, "seed of adapters, batches and dropout; the base has its own")
    option("--device", None, "torch device, such as cuda:1 [the accelerator if there is one, else the CPU]", type=str)
    option("--compile", False, "torch.compile the model", type=None, action=argparse.BooleanOptionalAction)
    group = parser.add_argument_group("output")
    option("--eval-interval", None, "steps between evaluations and checkpoints [a tenth of the steps]", type=int)
    option("--out", None, "folder of the results [runs/METHOD-SCHEDULE]", type=str)
    option("--resume", None, "folder of an interrupted run to finish, with its own settings", type=str)
    args = parser.parse_args(argv)
    if [] in vars(args).values():
        fail("an option is given as --name=--; give it a value")
    if args.resume:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        if len(given) > 1:
            raise InputError(f"--resume {args.resume}: the run keeps its own settings; leave out {given[0]}")
        settings = load(Path(args.resume, "checkpoint.pt"), "settings")["settings"]
        return argparse.Namespace(**settings | {"resume": args.resume, "out": args.resume})
    grows = hasattr(METHODS.get(args.method), "importance")
    args.schedule = args.schedule or ("linear" if grows else "none")
    if args.schedule != "none" and not grows:
        raise InputError(f"--schedule {args.schedule}: --method {args.method} can't grow; leave --schedule out")
    # Growth begins early, at half the rank, and is soon over: what comes late has little time (README.md's table).
    defaults = {"init_rank": args.rank if args.schedule == "none" else (args.rank + 1) // 2,
                "warmup": args.steps // 50, "interval": max(1, args.steps // 300),
                "lr": LEARNING_RATE.get(args.method, 1e-2), "eval_interval": max(1, args.steps // 10),
                "out": f"runs/{args.method}-{args.schedule}"}
    for name, default in defaults.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    for name, low in {"batch_size": 1, "base_steps": 1, "steps": 1, "eval_interval": 1, "seed": 0, "lr": 0, "alpha": 0,
                      "orth": 0}.items():
        if not low <= getattr(args, name) < 2 ** 31:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {low} to below 2^31")
    return args

def pick_device(name: str | None) -> torch.device:
    """The device called `name`, else the accelerator, else the CPU. No other line chooses one."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; try cpu") from None

def load_base(args: argparse.Namespace, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The base model and its tokenizer: new for `scratch`, pretrained once for `code`, else from a file."""
    path = Path(args.base)
    if args.base == "scratch":
        torch.manual_seed(0)
        return GPT(GPTConfig()).to(device), train_tokenizer(documents(args.data), GPTConfig().vocab_size)
    if args.base == "code":
        recipe = ["--base", "scratch", "--data", "code", "--method", "full", "--lr", "2e-3", "--device", str(device),
                  "--steps", str(args.base_steps), "--eval-interval", str(args.base_steps)]
        source = Path(sys.modules[GPT.__module__].__file__).read_text()
        path = CACHE / f"base-{text_hash([*documents('code'), source, *recipe, torch.__version__])}.pt"
        if not path.exists():
            say("no base model is cached yet: it is pretrained on code first")
            folder = str(path.with_suffix(""))
            run = main(["--resume", folder] if Path(folder, "checkpoint.pt").exists() else [*recipe, "--out", folder])
            run.export(path)
    base = load(path, "config", "tokenizer", "model")
    try:
        tokenizer, model = Tokenizer.from_str(base["tokenizer"]), GPT(GPTConfig(**base["config"]))
    except Exception as error:  # which the tokenizers package raises
        raise InputError(f"--base {path}: its tokenizer or its sizes are damaged ({error})") from None
    load_adapter_state_dict(model, base["model"])
    return model.to(device), tokenizer

def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 1 ... steps: up over the first 3 %, then down a half cosine to a tenth of the peak."""
    rise = max(1, round(0.03 * steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))
    return peak * min(step / rise, 0.1 + 0.9 * fall)

def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """Mean negative log likelihood of a batch (inputs, targets), in nats per token."""
    inputs, targets = (ids.to(device) for ids in batch)  # (batch, context)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and torch.cuda.is_bf16_supported()):
        logits = model(inputs)                           # (batch, context, vocab_size)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

def orthogonality(adapters: dict) -> Tensor:
    """Mean over the adapters of ||A A^T - 1||_F^2 + ||B^T B - 1||_F^2: AdaLoRA's penalty, used by the released code."""
    grams = [gram for a in adapters.values() for gram in (a.lora_A @ a.lora_A.t(), a.lora_B.t() @ a.lora_B)]  # (r, r)
    return sum((gram - torch.eye(len(gram), device=gram.device)).square().sum() for gram in grams) / len(adapters)

class Run:
    """One training run: its parts, how far it has come, and the log of it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.device = args, Path(args.out), pick_device(args.device)
        self.model, self.tokenizer = load_base(args, self.device)
        self.data = TextData(args.data, self.tokenizer, self.model.config.context, args.batch_size, args.seed)
        torch.manual_seed(args.seed)
        if args.method != "full":
            add_adapters(self.model, args.targets, args.method, args.rank, args.init_rank, args.alpha, args.dropout)
        self.adapters = find_adapters(self.model)
        parts = ("progress", "trained", "optimizer", "allocator")
        saved = load(self.out / "checkpoint.pt", *parts) if args.resume else None
        if saved:
            load_adapter_state_dict(self.model, saved["trained"])  # grows it, so before the optimiser
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.allocator = None if args.schedule == "none" else RankAllocator(
            self.adapters, self.optimizer, schedule=args.schedule, target_rank=args.rank, total_steps=args.steps,
            warmup=args.warmup, interval=args.interval, rank_step=args.rank_step, top_k=args.top_k)
        self.step, self.log, self.losses, self.seconds, self.growth_seconds = 0, [], [], 0.0, 0.0
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            vars(self).update(saved["progress"])
            if self.allocator:
                self.allocator.load_state_dict(saved["allocator"])

    def save(self) -> None:
        progress = {name: getattr(self, name) for name in ("step", "log", "losses", "seconds", "growth_seconds")}
        state = {"settings": vars(self.args), "progress": progress, "trained": adapter_state_dict(self.model),
                 "optimizer": self.optimizer.state_dict(), "allocator": self.allocator and self.allocator.state_dict()}
        save(self.out / "checkpoint.pt", state)
        save(self.out / "adapter.pt", state["trained"])
        save(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))

    def export(self, path: Path) -> None:
        """Write the model with its adapters merged: a file for --base."""
        model = merge_adapters(copy.deepcopy(self.model))
        save(path, {"config": asdict(model.config), "tokenizer": self.tokenizer.to_str(), "model": model.state_dict()})

    def note(self, kind: str, **values) -> None:
        """Log `values`, the size of what is trained, and each matrix's rank, importance and score; and say so."""
        ranks = {name: adapter.rank for name, adapter in self.adapters.items()}
        allocator = self.allocator
        growth = {"score": allocator.scores(), "importance": allocator.importances()} if allocator else {}
        self.log.append({"kind": kind, "step": self.step, "total_rank": sum(ranks.values()), "ranks": ranks, **growth,
                         "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad), **values})
        say(tell(self.log))

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """Mean loss over a split, in nats per token."""
        self.model.eval()
        losses, sizes = zip(*((batch_loss(self.model, batch, self.device).item(), len(batch[0]))
                              for batch in self.data.batches(split)))
        self.model.train()
        return sum(loss * size for loss, size in zip(losses, sizes)) / sum(sizes)

    def test(self) -> dict:
        """The test loss, and how the model goes on after the split's first words, with the same draws each time."""
        prompt = torch.from_numpy(self.data.tokens["test"][None, :16].astype("int64")).to(self.device)
        text = generate(self.model.eval(), prompt, 60, generator=torch.Generator().manual_seed(0))[0].tolist()
        return {"test_loss": self.evaluate("test"), "sample": self.tokenizer.decode(text)}

    def train(self) -> None:
        """The loop. All chance in a step comes from (seed, step), so that a checkpoint needs no generator's state."""
        args, interrupts, config = self.args, [], self.out / "config.json"
        if not self.log:
            settings = json.dumps(vars(args), indent=1)
            if config.exists() and config.read_text() != settings:
                raise InputError(f"--out {self.out}: holds a run with other settings; give a new folder, or delete it")
            save(config, settings)
            plan = {"plan": self.allocator.plan(), "budget": self.allocator.budget} if self.allocator else {}
            total = sum(p.numel() for p in self.model.parameters())
            self.note("start", device=str(self.device), settings=vars(args), parameters=total, **plan, **self.test())
        model = torch.compile(self.model, dynamic=True) if args.compile else self.model
        signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))  # the step under way is finished
        for step in tqdm(range(self.step + 1, args.steps + 1), initial=self.step, total=args.steps, disable=None):
            began = time.perf_counter()
            torch.manual_seed(args.seed * 1_000_003 + step)  # torch's CPU generator drops all above 32 bits
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            loss = batch_loss(model, self.data.batch(step), self.device)
            penalty = orthogonality(self.adapters) if args.orth else torch.zeros_like(loss)
            if not math.isfinite(loss.item()):
                raise InputError(f"--lr {args.lr}: the loss is not finite at step {step}, try a lower rate; "
                                 f"{self.out}/checkpoint.pt holds the last evaluation")
            self.optimizer.zero_grad()
            (loss + args.orth * penalty).backward()
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
            self.optimizer.step()
            updated = time.perf_counter()
            grown = self.allocator.step(step) if self.allocator else []
            self.step, self.seconds = step, self.seconds + updated - began
            self.growth_seconds += time.perf_counter() - updated
            self.losses.append(loss.item())
            if grown:
                scores = self.allocator.decided
                self.note("allocation", grown=grown, score=scores, threshold=min(scores[name] for name in grown))
            if step % args.eval_interval == 0 or step == args.steps:
                self.note("eval", train_loss=sum(self.losses) / len(self.losses), penalty=penalty.item(),
                          val_loss=self.evaluate("val"), tokens_per_second=step * self.data.batch_tokens / self.seconds)
                self.losses = []
            if interrupts or not self.losses:
                self.save()
            if interrupts:
                say(f"stopped after step {step}; to go on: python train.py --resume {self.out}")
                sys.exit(130)
        self.note("end", **self.test(), seconds=self.seconds, growth_seconds=self.growth_seconds,
                  peak_trainable=max(entry["trainable"] for entry in self.log))
        self.save()
        say(f"look at {draw_run(self.out)}; beside it: config.json log.jsonl adapter.pt checkpoint.pt")

def main(argv: list[str] | None = None) -> Run:
    run, handler = Run(parse_args(argv)), signal.getsignal(signal.SIGINT)
    try:
        run.train()
    finally:
        signal.signal(signal.SIGINT, handler)
    return run

if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
