"""Adapt a small GPT, or GPT-2, with TriAdaptLoRA, LoRA or full fine-tuning, and show how the ranks grow.

    python train.py --schedule linear                      # pretrains a base once, then adapts it; no download
    python train.py --base gpt2 --task reviews.tsv         # published weights, texts to classify
    python train.py --resume runs/triadapt-linear          # goes on after Ctrl-C, to the same bits; also to --generate
    torchrun --standalone --nproc_per_node=2 train.py      # several processes share each batch

The results go to runs/NAME: config.json, log.jsonl, adapter.pt, checkpoint.pt and run.png.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data import (CACHE, END_OF_TEXT, NO_TARGET, batches, documents, load, save, task_examples, text_examples, text_hash,
                  train_tokenizer, training_batch)
from model import GPT, GPTConfig, generate, load_gpt2
from plots.run import draw_run, planned_growth, tell
from triadapt import (METHODS, SCHEDULES, SIGNALS, InputError, adapter_state_dict, add_adapters, find_adapters,
                      load_adapter_state_dict, merge_adapters, need, needing)

LEARNING_RATE = {"triadapt": 1e-2, "lora": 1e-2, "full": 2e-3}  # peaks, chosen on prose's val split: plots/defaults.py
PROCESS, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
say = str if PROCESS else tqdm.write  # prints above the progress bar

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
    option("--data", "prose", "text to continue: prose, code, or a UTF-8 file")
    option("--task", None, "texts to classify instead: modules, or a .tsv file with columns sentence and label")
    option("--context", None, "tokens of a window, or of a text at most [all that the base allows]", type=int)
    option("--batch-size", 8, "windows or texts per step, all processes together")
    option("--accumulate", 1, "pieces that a process computes its part of the batch in, to save memory")
    group = parser.add_argument_group("base model")
    option("--base", "code", "code: our small GPT, pretrained once on code; gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a "
           "folder with their files; or a .pt file of base weights")
    option("--base-steps", 1000, "steps of that pretraining on code, about 90 s on two cores")
    group = parser.add_argument_group("adapter")
    option("--method", "triadapt", "how to adapt; full trains every weight", choices=[*METHODS, "full"])
    option("--rank", 8, "target rank; the budget is rank x matrices")
    option("--alpha", 16.0, "scale of the update, s = alpha / rank")
    option("--init-rank", None, "rank at the start [half the rank if it is to grow, else the rank]", type=int)
    option("--targets", "q|k|v|o|fc|proj", "names of the matrices, a regular expression")
    option("--dropout", 0.0, "probability that an adapter's input is dropped in training")
    option("--orth", 0.0, "weight in the loss of the orthogonality penalty on A and B")
    group = parser.add_argument_group("growth")
    option("--schedule", None, "how many matrices grow [linear if they can, else none]", choices=[*SCHEDULES, "none"])
    option("--signal", "importance", "what tells which matrices grow", choices=SIGNALS)
    option("--rank-step", 1, "ranks that a matrix grows by at once")
    option("--interval", None, "steps between allocations [1 per 300 steps]", type=int)
    option("--warmup", None, "steps before growth begins [2 %% of the steps]", type=int)
    option("--top-k", 4, "matrices that grow at an allocation, for --schedule fixed")
    group = parser.add_argument_group("training")
    option("--steps", 300, "optimiser steps")
    option("--lr", None, f"peak learning rate {LEARNING_RATE}", type=float)
    option("--seed", 0, "seed of adapters, batches, dropout and samples; the base has its own")
    option("--device", None, "torch device, such as cuda:1 [the accelerator if there is one, else the CPU]")
    option("--compile", False, "torch.compile the model; not with growth", type=None, action=argparse.BooleanOptionalAction)
    option("--eval-interval", None, "steps between evaluations and checkpoints [a tenth of the steps]", type=int)
    group = parser.add_argument_group("output")
    option("--out", None, "folder of the results [runs/METHOD-SCHEDULE]")
    option("--resume", None, "folder of a run to finish, with its own settings")
    option("--merge", None, "file to write the trained model to, adapters merged into its weights: a file for --base")
    option("--generate", None, "text that the trained model goes on from, here and at --resume")
    option("--temperature", 0.8, "of these draws: below 1 keeps to what is likely")
    option("--sample-top-k", 50, "likeliest tokens to draw from")
    option("--sample-seed", 0, "seed of the draws")
    args = parser.parse_args(argv)
    need([] not in vars(args).values(), "an option is given as --name=--; give it a value")
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.resume:
        fixed = given.keys() - {"resume", "merge", "generate", "temperature", "sample_top_k", "sample_seed"}
        need(not fixed, f"--resume {args.resume}: the run keeps its own settings; leave out {', '.join(sorted(fixed))}")
        settings = load(Path(args.resume, "checkpoint.pt"), "settings")["settings"]
        return argparse.Namespace(**settings | given | {"out": args.resume})
    grows = hasattr(METHODS.get(args.method), "importance")
    args.schedule = args.schedule or ("linear" if grows else "none")
    need(grows or args.schedule == "none",
         f"--schedule {args.schedule}: --method {args.method} can't grow; leave --schedule out")
    need(not args.compile or args.schedule == "none", "--compile: every growth would compile the model again, which takes "
         "longer than it saves; leave it out, or give --schedule none")
    # Growth begins early, at half the rank, and is soon over: what comes late has little time (README.md's table).
    defaults = {"init_rank": args.rank if args.schedule == "none" else (args.rank + 1) // 2,
                "warmup": args.steps // 50, "interval": max(1, args.steps // 300),
                "lr": LEARNING_RATE.get(args.method, 1e-2), "eval_interval": max(1, args.steps // 10),
                "out": f"runs/{args.method}-{args.schedule}"}
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    lowest = {"accumulate": 1, "batch_size": args.accumulate * WORLD, "base_steps": 1, "steps": 1, "eval_interval": 1,
              "seed": 0, "lr": 0, "alpha": 0, "orth": 0, "temperature": 0.01, "sample_top_k": 1, "sample_seed": 0}
    for name, low in lowest.items():
        need(low <= getattr(args, name) < 2 ** 31,
             f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {low} to below 2^31")
    return args

def pick_device(name: str | None) -> torch.device:
    """The device called `name`, else this process's accelerator, else the CPU. No other line chooses one."""
    with needing(f"--device {name}: not to be had here; try cpu"):
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
        return torch.empty(1, device=device).device

def load_base(args: argparse.Namespace, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The base model and its tokenizer: new for `scratch`, pretrained once for `code`, else from files."""
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
            main([*recipe, "--out", str(path.with_suffix("")), "--merge", str(path)])
    published = path.is_dir() or args.base in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    base = load_gpt2(args.base) if published else load(path, "config", "tokenizer", "model")
    with needing(f"--base {path}: its tokenizer or its sizes are damaged"):
        tokenizer, model = Tokenizer.from_str(base["tokenizer"]), GPT(GPTConfig(**base["config"]))
    load_adapter_state_dict(model, base["model"])
    return model.to(device), tokenizer

def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 1 ... steps: up over the first 3 %, then down a half cosine to a tenth of the peak."""
    rise = max(1, round(0.03 * steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))
    return peak * min(step / rise, 0.1 + 0.9 * fall)

def predict(model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """From a batch, each (batch, time): the negative log likelihood, summed over all targets, in nats; the logits
    (batch x time, vocab_size or classes) and the targets (batch x time,)."""
    inputs, targets = inputs.to(device), targets.to(device).flatten()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and torch.cuda.is_bf16_supported()):
        logits = model(inputs).flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), targets, ignore_index=NO_TARGET, reduction="sum"), logits, targets

def orthogonality(adapters: dict) -> Tensor:
    """Mean over the adapters of ||A A^T - 1||_F^2 + ||B^T B - 1||_F^2: AdaLoRA's penalty, used by the released code."""
    grams = [gram for a in adapters.values() for gram in (a.lora_A @ a.lora_A.t(), a.lora_B.t() @ a.lora_B)]  # (r, r)
    return sum((gram - torch.eye(len(gram), device=gram.device)).square().sum() for gram in grams) / len(adapters)

def sum_processes(tensors: list[Tensor]) -> None:
    """Sum each tensor over the processes, in place, all in one flat message."""
    if WORLD > 1:
        flat = parameters_to_vector(tensors)
        dist.all_reduce(flat)
        vector_to_parameters(flat, tensors)

class Run:
    """One training run: its parts, how far it has come, and the log of it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.device = args, Path(args.out), pick_device(args.device)
        self.model, self.tokenizer = load_base(args, self.device)
        config = self.model.config
        context = config.context if args.context is None else args.context
        need(1 <= context <= config.context and not config.classes, f"--context {context}, --base {args.base}: must be "
             f"from 1 to {config.context} tokens, and a language model")
        read = task_examples if args.task else text_examples
        self.examples, self.classes = read(args.task or args.data, self.tokenizer, context)
        torch.manual_seed(args.seed)
        if args.method != "full":
            add_adapters(self.model, args.targets, args.method, args.rank, args.init_rank, args.alpha, args.dropout)
        if self.classes:
            self.model.classify(len(self.classes))
        self.adapters = find_adapters(self.model)
        saved = load(self.out / "checkpoint.pt", "progress", "trained", "optimizer", "growth") if args.resume else None
        if saved:
            load_adapter_state_dict(self.model, saved["trained"])  # grows it, so before the optimiser
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.allocator = None if args.schedule == "none" else SIGNALS[args.signal](
            self.adapters, self.optimizer, schedule=args.schedule, target_rank=args.rank, total_steps=args.steps,
            warmup=args.warmup, interval=args.interval, rank_step=args.rank_step, top_k=args.top_k)
        self.step, self.log, self.losses, self.seconds, self.growth_seconds = 0, [], [], 0.0, 0.0
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            vars(self).update(saved["progress"])
            if self.allocator:
                self.allocator.state = saved["growth"]

    def save(self) -> None:
        progress = {name: getattr(self, name) for name in ("step", "log", "losses", "seconds", "growth_seconds")}
        state = {"settings": vars(self.args), "progress": progress, "trained": adapter_state_dict(self.model),
                 "optimizer": self.optimizer.state_dict(), "growth": self.allocator and self.allocator.state}
        if PROCESS == 0:
            save(self.out / "checkpoint.pt", state)
            save(self.out / "adapter.pt", state["trained"])
            save(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))

    def merge(self, path: Path) -> None:
        """Merge the adapters into the model's weights, and write them: a file for --base."""
        model = merge_adapters(self.model)
        if PROCESS == 0:
            save(path, {"config": asdict(model.config), "tokenizer": self.tokenizer.to_str(), "model": model.state_dict()})
        if WORLD > 1:
            dist.barrier()

    def note(self, kind: str, **values) -> None:
        """Log `values`, the size of what is trained, and each matrix's rank, importance and score; and say so."""
        ranks = {name: adapter.rank for name, adapter in self.adapters.items()}
        allocator = self.allocator
        growth = {"score": allocator.scores(), "importance": allocator.importances()} if allocator else {}
        self.log.append({"kind": kind, "step": self.step, "total_rank": sum(ranks.values()), "ranks": ranks, **growth,
                         "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad), **values})
        say(tell(self.log))

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """{split}_loss in nats per target; for a task also {split}_accuracy and {split}_f1, the mean over the classes."""
        self.model.eval()
        loss, count, n = torch.zeros((), device=self.device), torch.zeros((), device=self.device), len(self.classes)
        confusion = torch.zeros(n, n, device=self.device)  # (true, predicted)
        for batch in [*batches(self.examples[split], self.args.batch_size)][PROCESS::WORLD]:
            total, logits, targets = predict(self.model, *batch, self.device)
            known = targets != NO_TARGET
            loss, count = loss + total, count + known.sum()
            if self.classes:
                confusion += (targets[known] * n + logits[known].argmax(-1)).bincount(minlength=n * n).view(n, n)
        self.model.train()
        sum_processes([loss, count, confusion])
        result = {f"{split}_loss": loss / count}
        if self.classes:
            f1 = 2 * confusion.diag() / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
            result |= {f"{split}_accuracy": confusion.trace() / count, f"{split}_f1": f1.mean()}
        return {name: value.item() for name, value in result.items()}

    def sample(self, prompt: str, temperature: float, top_k: int, seed: int) -> str:
        """How the model goes on from a text, in 60 tokens."""
        need(not self.classes, "--generate: the run's model tells classes apart, it writes no text; leave --generate out")
        ids = self.tokenizer.encode(prompt or END_OF_TEXT).ids
        ids = generate(self.model.eval(), torch.tensor([ids], device=self.device), 60, temperature, top_k, seed)
        self.model.train()
        return self.tokenizer.decode(ids[0].tolist())

    def test(self) -> dict:
        """The results on the test split, and how the model goes on from its first words, with the same draws each time."""
        prompt = self.tokenizer.decode(self.examples["test"][0][0][:16].tolist())
        return self.evaluate("test") | ({} if self.classes else {"sample": self.sample(prompt, 0.8, 50, 0)})

    def train(self) -> None:
        """The loop. All chance in a step comes from (seed, step), so that a checkpoint needs no generator's state."""
        args, interrupts = self.args, []
        if not self.log:
            save(self.out / "config.json", json.dumps(vars(args), indent=1))
            plan = {"plan": planned_growth(self.allocator), "budget": self.allocator.budget} if self.allocator else {}
            total = sum(p.numel() for p in self.model.parameters())
            self.note("start", device=str(self.device), settings=vars(args), parameters=total, classes=self.classes, **plan,
                      **self.test())
        model = torch.compile(self.model) if args.compile else self.model
        signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))  # the step under way is finished
        for step in tqdm(range(self.step + 1, args.steps + 1), initial=self.step, total=args.steps,
                         disable=True if PROCESS else None):
            began = time.perf_counter()
            seed = args.seed * 1_000_003 + step  # torch's CPU generator drops all above 32 bits
            torch.manual_seed(seed * WORLD + PROCESS)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            inputs, targets = training_batch(self.examples["train"], args.batch_size, args.seed, step)
            count, pieces = (targets != NO_TARGET).sum().item(), args.accumulate * WORLD
            loss, penalty = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
            self.optimizer.zero_grad()
            for i in range(PROCESS, pieces, WORLD):
                part = predict(model, inputs[i::pieces], targets[i::pieces], self.device)[0] / count
                part.backward()
                loss += part.detach()
            if args.orth:
                penalty = orthogonality(self.adapters)
                (args.orth / WORLD * penalty).backward()
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            stop = torch.tensor(float(len(interrupts)), device=self.device)
            sum_processes([p.grad for p in trained] + [loss, stop])
            need(math.isfinite(loss.item()), f"--lr {args.lr}: the loss is not finite at step {step}, try a lower rate; "
                 f"{self.out}/checkpoint.pt holds the last evaluation")
            clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            updated = time.perf_counter()
            torch.manual_seed(seed)  # the same new rows in every process
            grown = self.allocator.step(step) if self.allocator else []
            self.step, self.seconds = step, self.seconds + updated - began
            self.growth_seconds += time.perf_counter() - updated
            self.losses.append(loss.item())
            if grown:
                scores = self.allocator.decided
                self.note("allocation", grown=grown, score=scores, threshold=min(scores[name] for name in grown))
            if step % args.eval_interval == 0 or step == args.steps:
                self.note("eval", train_loss=sum(self.losses) / len(self.losses), penalty=penalty.item(),
                          **self.evaluate("val"), tokens_per_second=inputs.numel() * step / self.seconds)
                self.losses = []
            if stop or not self.losses:
                self.save()
            if stop:
                say(f"stopped after step {step}; to go on: python train.py --resume {self.out}")
                sys.exit(130)
        if self.log[-1]["kind"] != "end":
            self.note("end", **self.test(), seconds=self.seconds, growth_seconds=self.growth_seconds,
                      peak_trainable=max(entry["trainable"] for entry in self.log))
            self.save()
            if PROCESS == 0:
                say(f"look at {draw_run(self.out)}; beside it: config.json log.jsonl adapter.pt checkpoint.pt")

def main(argv: list[str] | None = None) -> Run:
    run, handler = Run(parse_args(argv)), signal.getsignal(signal.SIGINT)
    try:
        run.train()
    finally:
        signal.signal(signal.SIGINT, handler)
    if run.args.merge:
        run.merge(Path(run.args.merge))
    if run.args.generate is not None:
        say(run.sample(run.args.generate, run.args.temperature, run.args.sample_top_k, run.args.sample_seed))
    return run

if __name__ == "__main__":
    if WORLD > 1:
        dist.init_process_group()
    try:
        main()
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
