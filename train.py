"""Adapt a small GPT to a text with TriAdaptLoRA, LoRA or full fine-tuning, and show how the ranks grow.

    python train.py --schedule linear                    # pretrain a base once, then adapt it: no download needed
    python train.py --method lora --rank 4 --data my.txt # plain LoRA on a text of yours
    python train.py --resume runs/triadapt-linear        # go on after Ctrl-C, to the same bits

Results go to runs/NAME: config.json, log.jsonl, adapter.pt, checkpoint.pt and run.png.
"""
import argparse
import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm

from data import CACHE, TextData, atomic, corpus, load_tokenizer, load_tokens, text_hash
from model import GPT, GPTConfig, generate
from plots.run import draw_run
from triadapt import (METHODS, SCHEDULES, InputError, RankAllocator, adapter_state_dict, add_adapters, find_adapters,
                      load_adapter_state_dict)

say = tqdm.write  # print, but above the progress bar

LEARNING_RATE = {"triadapt": 1e-2, "lora": 1e-2, "full": 1e-3}  # peak, chosen on the validation split of prose


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All settings of a run. Raises InputError for one that can't be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, default, text: str, **more):
        text = text if default is None else f"{text} [{default}]"
        parser.group.add_argument(name, default=default, help=text, **({"type": type(default)} | more))

    parser.group = parser.add_argument_group("data")
    option("--data", "prose", "corpus: prose, code, or a UTF-8 text file", type=str)
    option("--batch-size", 8, "windows of one context per step")
    parser.group = parser.add_argument_group("base model")
    option("--base", "code", "code: our small GPT, pretrained once on code; or a .pt file of base weights")
    option("--base-steps", 700, "steps of that pretraining, about 90 s on two cores")
    parser.group = parser.add_argument_group("adapter")
    option("--method", "triadapt", "how to adapt; full trains every weight", choices=[*METHODS, "full"])
    option("--rank", 8, "target rank; the budget is rank x matrices")
    option("--alpha", 16.0, "scale of the update, s = alpha / rank")
    option("--init-rank", None, "rank at the start [half the rank if it is to grow, else the rank]", type=int)
    option("--targets", ["q", "k", "v", "o", "fc", "proj"], "matrices to adapt: names, or regular expressions for names",
           type=str, nargs="+")
    option("--dropout", 0.0, "probability that an adapter's input is dropped in training")
    option("--orth", 0.0, "weight of the orthogonality penalty on A and B")
    parser.group = parser.add_argument_group("growth")
    option("--schedule", None, "how many matrices grow [linear if the method can grow, else none]", type=str,
           choices=[*SCHEDULES, "none"])
    option("--rank-step", 1, "ranks by which a matrix grows at once")
    option("--interval", None, "steps between allocations [1 %% of the steps]", type=int)
    option("--warmup", None, "steps before growth begins [2 %% of the steps]", type=int)
    option("--top-k", 4, "matrices that grow at an allocation, for --schedule fixed")
    parser.group = parser.add_argument_group("training")
    option("--steps", 300, "optimiser steps")
    option("--lr", None, f"peak learning rate {LEARNING_RATE}", type=float)
    option("--seed", 0, "seed of adapters, batches and dropout (the base has its own)")
    option("--device", None, "torch device, such as cuda:1 [the accelerator if there is one, else the CPU]", type=str)
    parser.group.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.group = parser.add_argument_group("output")
    option("--eval-interval", None, "steps between evaluations, each with a checkpoint [a tenth of the steps]", type=int)
    option("--out", None, "folder for the results [runs/METHOD-SCHEDULE]", type=str)
    option("--resume", None, "folder of an interrupted run to finish, with its own settings", type=str)
    args = parser.parse_args(argv)
    if args.resume:
        try:
            settings = json.loads((Path(args.resume) / "config.json").read_text())
        except (OSError, ValueError):
            raise InputError(f"--resume {args.resume}: no run is there, as it has no readable config.json") from None
        return argparse.Namespace(**settings | {"resume": args.resume, "out": args.resume})
    grows = hasattr(METHODS.get(args.method), "importance")
    args.schedule = args.schedule or ("linear" if grows else "none")
    if args.schedule != "none" and not grows:
        raise InputError(f"--schedule {args.schedule}: --method {args.method} can't grow; leave --schedule out")
    # Growth starts at half the rank and early: what grows late has little left of a learning rate that falls.
    defaults = {"init_rank": args.rank if args.schedule == "none" else (args.rank + 1) // 2, "lr": LEARNING_RATE[args.method],
                "interval": max(1, args.steps // 100), "warmup": args.steps // 50,
                "eval_interval": max(1, args.steps // 10), "out": f"runs/{args.method}-{args.schedule}"}
    for name, default in defaults.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    least = {"batch_size": 1, "base_steps": 1, "steps": 1, "eval_interval": 1, "seed": 0, "lr": 0, "alpha": 0, "orth": 0}
    for name, low in least.items():
        if not low <= getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a number, {low} or more")
    return args


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, else the accelerator, else the CPU. No other line chooses one."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; try cpu") from None
    return device


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 1 ... steps: up over the first 3 % of the run, then down a half cosine to a tenth of the peak."""
    rise = max(1, round(0.03 * steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))
    return peak * min(step / rise, 0.1 + 0.9 * fall)


def batch_loss(model: torch.nn.Module, batch: tuple, device: torch.device) -> torch.Tensor:
    """Mean negative log likelihood of a batch (inputs, targets), in nats per token."""
    inputs, targets = (ids.to(device) for ids in batch)  # (batch, context)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and torch.cuda.is_bf16_supported()):
        logits = model(inputs)  # (batch, context, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: TextData, split: str, device: torch.device) -> float:
    """Mean loss over a whole split, in nats per token."""
    model.eval()
    sums = [(batch_loss(model, batch, device).item() * batch[1].numel(), batch[1].numel()) for batch in data.batches(split)]
    model.train()
    return sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """One optimiser step, with the rate set on every group and the norm of the gradient clipped to 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def load(path: Path) -> dict:
    """A .pt file that save wrote: tensors and plain values only, so that nothing in it can run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise InputError(f"{path}: damaged, or not written by train.py ({type(error).__name__})") from None


def save(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        torch.save(content, temporary)


def load_weights(model: torch.nn.Module, state: dict, path: Path) -> None:
    """model.load_state_dict, with an error of one line."""
    for name, tensor in model.state_dict().items():
        found = list(state[name].shape) if name in state else "nothing"
        if found != list(tensor.shape):
            raise InputError(f"{path}: the model needs {name} of shape {list(tensor.shape)}, the file has {found}")
    model.load_state_dict(state)


def orthogonality(adapters: dict) -> torch.Tensor:
    """Mean over the adapters of ||A A^T - 1||_F^2 + ||B^T B - 1||_F^2: AdaLoRA's penalty, used by the released code."""
    grams = [gram for a in adapters.values() for gram in (a.lora_A @ a.lora_A.t(), a.lora_B.t() @ a.lora_B)]  # (r, r)
    return sum((gram - torch.eye(len(gram), device=gram.device)).square().sum() for gram in grams) / len(adapters)


def load_base(args: argparse.Namespace, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The base model and its tokenizer: from the file --base, or from the cache, or pretrained on code now."""
    path = Path(args.base)
    if args.base == "code":
        documents, config, peak = corpus("code"), GPTConfig(), 3e-3
        tokenizer = load_tokenizer(documents, config.vocab_size)
        key = text_hash([tokenizer.to_str(), *documents(), Path(sys.modules[GPT.__module__].__file__).read_text(),
                         f"{config} {args.base_steps} {peak} {device.type} {torch.__version__}"])
        path = CACHE / f"base-{key}.pt"
        if not path.exists():
            torch.manual_seed(0)
            model = GPT(config).to(device)
            data = TextData(load_tokens(documents, tokenizer), config.context, 8, 0, "code")
            optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
            for step in tqdm(range(1, args.base_steps + 1), "pretraining the base on code", disable=None):
                update(optimizer, batch_loss(model, data.batch(step), device), learning_rate(step, args.base_steps, peak))
            save(path, {"config": asdict(config), "tokenizer": tokenizer.to_str(), "model": model.state_dict()})
    base = load(path)
    try:
        tokenizer, model = Tokenizer.from_str(base["tokenizer"]), GPT(GPTConfig(**base["config"]))
    except Exception:
        raise InputError(f"--base {path}: holds no base weights (config, tokenizer, model)") from None
    load_weights(model, base["model"], path)
    return model.to(device), tokenizer


class Run:
    """One adaptation: its parts, and how far it has come. `log` holds what log.jsonl will."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.device = args, Path(args.out), pick_device(args.device)
        self.model, self.tokenizer = load_base(args, self.device)
        tokens = load_tokens(corpus(args.data), self.tokenizer)
        self.data = TextData(tokens, self.model.config.context, args.batch_size, args.seed, args.data)
        torch.manual_seed(args.seed)
        if args.method != "full":
            add_adapters(self.model, args.targets, args.method, args.rank, args.init_rank, args.alpha, args.dropout)
        self.adapters = find_adapters(self.model)
        state = load(self.out / "checkpoint.pt") if args.resume else {"step": 0, "log": [], "seconds": [0.0, 0.0], "losses": []}
        if args.resume and self.adapters:
            load_adapter_state_dict(self.model, state["trained"])
        elif args.resume:
            load_weights(self.model, state["trained"], self.out / "checkpoint.pt")
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], weight_decay=0.0,
                                           fused=True)
        self.allocator = None if args.schedule == "none" else RankAllocator(
            self.adapters, self.optimizer, schedule=args.schedule, target_rank=args.rank, total_steps=args.steps,
            warmup=args.warmup, interval=args.interval, rank_step=args.rank_step, top_k=args.top_k)
        if args.resume:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.allocator:
                self.allocator.load_state_dict(state["allocator"])
        self.step, self.log, self.seconds, self.losses = (state[name] for name in ("step", "log", "seconds", "losses"))

    def save(self) -> None:
        """checkpoint.pt, adapter.pt and log.jsonl. Generators have no state to save: see train."""
        trained = adapter_state_dict(self.model) if self.adapters else self.model.state_dict()
        save(self.out / "checkpoint.pt", {
            "step": self.step, "log": self.log, "seconds": self.seconds, "losses": self.losses, "trained": trained,
            "optimizer": self.optimizer.state_dict(), "allocator": self.allocator and self.allocator.state_dict()})
        save(self.out / "adapter.pt", trained)
        with atomic(self.out / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.log))

    def note(self, kind: str, **values) -> dict:
        """Add an entry to the log: the values, and every matrix's rank, importance and score."""
        entry = {"kind": kind, "step": self.step, **values, "ranks": {name: a.rank for name, a in self.adapters.items()},
                 "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad)}
        if self.allocator:
            entry |= {"importance": self.allocator.importances(), "score": self.allocator.scores()}
        self.log.append(entry)
        return entry

    def sample(self) -> str:
        """Sixty tokens after the first words of the test split; equal words are drawn from equal weights."""
        prompt = torch.from_numpy(self.data.tokens["test"][None, :16].astype("int64")).to(self.device)
        self.model.eval()
        text = generate(self.model, prompt, 60, generator=torch.Generator().manual_seed(0))
        self.model.train()
        return self.tokenizer.decode(text[0].tolist())

    def start(self) -> None:
        """Tell what was built and what is planned, and measure the base before the first step."""
        args, model = self.args, self.model
        with atomic(self.out / "config.json") as temporary:
            temporary.write_text(json.dumps(vars(args), indent=1))
        trainable, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or all_of) for all_of in (0, 1))
        say(f"device     {self.device}\nmodel      {total:,} parameters, {trainable:,} of them trainable")
        say(f"adapting   {len(self.adapters)} matrices ({', '.join(args.targets)}) by {args.method}, rank {args.init_rank}")
        if self.allocator:
            plan, budget = self.allocator.plan(), self.allocator.budget
            say(f"growth     total rank {self.allocator.total_rank} -> {plan[-1][1]} of a budget of {budget}, {args.schedule}, "
                f"{len(plan)} allocations from step {plan[0][0]} to step {plan[-1][0]}")
            if plan[-1][1] < budget:
                say(f"warning    the budget can't be spent: {budget - plan[-1][1]} ranks stay unused; "
                    "lower --interval or --warmup, or raise --rank-step or --top-k")
        self.note("start", test_loss=evaluate(model, self.data, "test", self.device), sample=self.sample())

    def train(self) -> None:
        """The loop. All that is random in a step depends on (seed, step) alone, so that resuming needs no random state."""
        args, stop = self.args, []
        model = torch.compile(self.model, dynamic=True) if args.compile else self.model
        before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # let the step under way end
        for step in tqdm(range(self.step + 1, args.steps + 1), initial=self.step, total=args.steps, disable=None):
            began = time.perf_counter()
            torch.manual_seed((args.seed << 32) + step)
            loss = batch_loss(model, self.data.batch(step), self.device)
            penalty = orthogonality(self.adapters) if args.orth else torch.zeros((), device=self.device)
            if not math.isfinite(loss.item() + penalty.item()):
                raise InputError(f"--lr {args.lr}: the loss is not finite at step {step}, try a lower rate; "
                                 f"{self.out}/checkpoint.pt holds the last good evaluation")
            update(self.optimizer, loss + args.orth * penalty, learning_rate(step, args.steps, args.lr))
            trained = time.perf_counter()
            grown = self.allocator.step(step) if self.allocator else []
            self.step, self.losses = step, self.losses + [loss.item()]
            self.seconds = [self.seconds[0] + trained - began, self.seconds[1] + time.perf_counter() - trained]
            if grown:
                self.note("allocation", grown=grown, threshold=self.allocator.threshold)
                say(f"step {step:5}  {', '.join(grown)} grew, threshold {self.allocator.threshold:.2e}, "
                    f"total rank {self.allocator.total_rank} of {self.allocator.budget}")
            if step % args.eval_interval == 0 or step == args.steps:
                entry = self.note("eval", train_loss=sum(self.losses) / len(self.losses), penalty=penalty.item(),
                                  val_loss=evaluate(self.model, self.data, "val", self.device),
                                  tokens_per_second=step * self.data.batch_tokens / sum(self.seconds))
                say("step {step:5}  train {train_loss:.4f}  val {val_loss:.4f} nats/token  total rank {rank}  "
                    "{trainable:,} trainable  {tokens_per_second:,.0f} tokens/s".format(**entry, rank=sum(entry["ranks"].values())))
                self.losses = []
                self.save()
            if stop:
                self.save()
                say(f"stopped after step {step}; go on with: python train.py --resume {self.out}")
                sys.exit(130)
        signal.signal(signal.SIGINT, before)

    def finish(self) -> dict:
        """Measure the adapted model, draw run.png, tell the result, and return the log's last entry."""
        first = self.log[0]
        last = self.note("end", test_loss=evaluate(self.model, self.data, "test", self.device), sample=self.sample(),
                         peak_trainable=max(entry["trainable"] for entry in self.log), seconds=self.seconds)
        self.save()
        draw_run(self.out)
        for name, entry in {"before": first, "after": last}.items():
            say(f"\n{name:6}  test loss {entry['test_loss']:.4f} nats/token, perplexity {math.exp(entry['test_loss']):.2f}, "
                f"{entry['trainable']:,} trainable parameters\n{entry['sample']}")
        say(f"\n{last['seconds'][0]:.1f} s of training, {last['seconds'][1]:.2f} s of growth, peak {last['peak_trainable']:,} "
            f"trainable parameters\nlook at {self.out}/run.png; beside it: config.json log.jsonl adapter.pt checkpoint.pt")
        return last


def main(argv: list[str] | None = None) -> dict:
    run = Run(parse_args(argv))
    if not run.step:
        run.start()
    run.train()
    return run.finish()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"train.py: {error}")
