"""Adapt a small GPT, or GPT-2, with TriAdaptLoRA, LoRA or full fine-tuning, and show how the ranks grow.

python train.py --schedule linear                      # pretrains a base once, then adapts it; no download
python train.py --base gpt2 --task reviews.tsv         # published weights, texts to classify
python train.py --resume runs/triadapt-linear          # goes on after Ctrl-C, to the same bits; also to --generate
torchrun --standalone --nproc_per_node=2 train.py      # several processes share each batch
"""

import argparse
import json
import math
import signal
import sys
import time
from pathlib import Path
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from data import (
    CACHE,
    NO_TARGET,
    PROCESS,
    WORLD,
    batch,
    documents,
    load,
    save,
    task_examples,
    text_examples,
    text_hash,
    train_tokenizer,
)
from model import GPT, GPTConfig, generate, load_gpt2
from plots.run import draw_run, log_entry, tell
from plots.signals import SIGNALS
from triadapt import (
    METHODS,
    SCHEDULES,
    InputError,
    adapter_state_dict,
    add_adapters,
    find_adapters,
    load_adapter_state_dict,
    merge_adapters,
    need,
    needing,
)

say = str if PROCESS else tqdm.write  # prints above the progress bar


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All settings of a run. Raises InputError for one that can't be."""

    def option(
        name: str, default, text: str, **more
    ):  # a function gives the default from the other settings
        shown, kind = (
            ("", str) if default is None or callable(default) else (f" [{default}]", type(default))
        )
        group.add_argument(name, default=default, help=text + shown, **{"type": kind} | more)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: need(False, message)  # one line instead of the usage
    group = parser.add_argument_group("data")
    option("--data", "prose", "text to continue: prose, code, or a UTF-8 file")
    option(
        "--task",
        None,
        "texts to classify instead: modules, or a .tsv file with columns sentence and label",
    )
    option(
        "--context",
        None,
        "tokens of a window, or of a text at most [all that the base allows]",
        type=int,
    )
    option("--batch-size", 8, "windows or texts per step, all processes together")
    option(
        "--accumulate", 1, "pieces that a process computes its part of the batch in, to save memory"
    )
    group = parser.add_argument_group("base model")
    option(
        "--base",
        "code",
        "code: ours, pretrained on code; gpt2[-medium, -large, -xl]; a folder with these; a .pt file",
    )
    option("--base-steps", 1000, "steps of that pretraining on code, about 90 s on two cores")
    group = parser.add_argument_group("adapter")
    option(
        "--method", "triadapt", "how to adapt; full trains every weight", choices=[*METHODS, "full"]
    )
    option("--rank", 8, "target rank; the budget is rank x matrices")
    option("--alpha", 16.0, "scale of the update, s = alpha / rank")
    option(
        "--init-rank",
        lambda args: args.rank if args.schedule == "none" else (args.rank + 1) // 2,
        "rank at the start [half the rank if it is to grow, else the rank]",
        type=int,
    )
    option("--targets", "q|k|v|o|fc|proj", "names of the matrices, a regular expression")
    option("--dropout", 0.0, "probability that an adapter's input is dropped in training")
    option("--orth", 0.0, "weight in the loss of the orthogonality penalty on A and B")
    group = parser.add_argument_group(
        "growth", "early, from half the rank, and soon over: what comes late has little time"
    )
    option(
        "--schedule",
        None,
        "how many matrices grow [linear if they can, else none]",
        choices=[*SCHEDULES, "none"],
    )
    option(
        "--score",
        "importance",
        "what tells which matrices grow: the paper's importance, or a rival",
        choices=SIGNALS,
    )
    option("--rank-step", 1, "ranks that a matrix grows by at once")
    option(
        "--interval",
        lambda args: max(1, args.steps // 300),
        "steps between allocations [1 per 300 steps]",
        type=int,
    )
    option(
        "--warmup",
        lambda args: args.steps // 50,
        "steps before growth begins [2 %% of the steps]",
        type=int,
    )
    option("--top-k", 4, "matrices that grow at an allocation, for --schedule fixed")
    group = parser.add_argument_group("training")
    option("--steps", 300, "optimiser steps")
    option(
        "--lr",
        lambda args: 2e-3 if args.method == "full" else 1e-2,
        "peak learning rate [1e-2, full: 2e-3]",
        type=float,
    )
    option("--core-lr-ratio", 1.0, "learning rate of the core L + U over that of A and B")
    option("--seed", 0, "seed of adapters, batches and dropout; the base has its own")
    option(
        "--device",
        None,
        "torch device, such as cuda:1 [the accelerator if there is one, else the CPU]",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the model; not with growth"
    )
    option(
        "--eval-interval",
        lambda args: max(1, args.steps // 10),
        "steps between evaluations [a tenth]",
        type=int,
    )
    group = parser.add_argument_group("output")
    option(
        "--out",
        lambda args: f"runs/{args.method}-{args.schedule}",
        "folder of the results [runs/METHOD-SCHEDULE]",
    )
    option("--resume", None, "folder of a run to finish, with its own settings")
    option(
        "--merge",
        None,
        "file to write the trained model to, adapters merged into its weights: a file for --base",
    )
    option("--generate", None, "text that the trained model goes on from, here and at --resume")
    option("--temperature", 0.8, "of samples: below 1 keeps to what is likely")
    option("--sample-top-k", 50, "likeliest tokens that samples are drawn from")
    option("--sample-seed", 0, "seed of samples")
    args = parser.parse_args(argv)
    need([] not in vars(args).values(), "an option is given as --name=--; give it a value")
    if args.resume:
        settings = load(Path(args.resume, "checkpoint.pt"), "settings")["settings"] | {
            "out": args.resume
        }
        args = parser.parse_args(argv, argparse.Namespace(**settings))
        fixed = {name for name in settings if vars(args)[name] != settings[name]} - {
            "resume",
            "merge",
            "generate",
            "temperature",
            "sample_top_k",
            "sample_seed",
        }
        need(
            not fixed,
            f"--resume {args.resume}: the run keeps its own settings; leave out {', '.join(sorted(fixed))}",
        )
    need(
        not args.task or args.generate is None,
        "--generate: a model that tells classes apart writes no text; leave it out",
    )
    grows = hasattr(METHODS.get(args.method), "importance")
    args.schedule = args.schedule or ("linear" if grows else "none")
    need(
        grows or args.schedule == "none",
        f"--schedule {args.schedule}: --method {args.method} can't grow; leave it out",
    )
    need(
        not args.compile or args.schedule == "none",
        "--compile: every growth would compile again; give --schedule none",
    )
    lowest = {
        "batch_size": args.accumulate * WORLD,
        "temperature": 0.01,
        "seed": 0,
        "sample_seed": 0,
        "warmup": 0,
    }
    for name, value in vars(args).items():
        value = vars(args)[name] = value(args) if callable(value) else value
        low, flag = lowest.get(name, 0 if type(value) is float else 1), name.replace("_", "-")
        need(
            type(value) not in (int, float) or low <= value < 2**31,
            f"--{flag} {value}: must be from {low} to below 2^31",
        )
    return args


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, else this process's accelerator, else the CPU. No other line chooses one."""
    with needing(f"--device {name}: not to be had here; try cpu"):
        if WORLD > 1 and torch.accelerator.is_available():
            torch.accelerator.set_device_index(PROCESS % torch.accelerator.device_count())
        return torch.empty(
            1, device=name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        ).device


def load_base(args: argparse.Namespace, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The base model and its tokenizer: new for `scratch`, pretrained once for `code`, else from files."""
    path = Path(args.base)
    if args.base == "scratch":
        torch.manual_seed(0)
        return GPT(GPTConfig()).to(device), train_tokenizer(
            documents(args.data), GPTConfig().vocab_size
        )
    if args.base == "code":
        recipe = f"--base scratch --data code --method full --lr 2e-3 --eval-interval 9999 --steps {args.base_steps}"
        source = Path(sys.modules[GPT.__module__].__file__).read_text()
        path = (
            CACHE
            / f"base-{text_hash([*documents('code'), source, recipe, device.type, torch.__version__])}.pt"
        )
        if not path.exists():
            say("no base model is cached yet: it is pretrained on code first")
            main(
                [
                    *recipe.split(),
                    "--device",
                    str(device),
                    "--out",
                    str(path.with_suffix("")),
                    "--merge",
                    str(path),
                ]
            )
    base = (
        load(path, "config", "tokenizer", "model") if path.suffix == ".pt" else load_gpt2(args.base)
    )
    with needing(f"--base {path}: its tokenizer or its sizes are damaged"):
        tokenizer, model = Tokenizer.from_str(base["tokenizer"]), GPT(GPTConfig(**base["config"]))
    load_adapter_state_dict(model, base["model"])
    return model.to(device), tokenizer


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 1 ... steps: up over the first 3 %, then down a half cosine to a tenth of the peak."""
    rise = max(1, round(0.03 * steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))
    return peak * min(step / rise, 0.1 + 0.9 * fall)


def predict(
    model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch: its negative log likelihood in nats, summed; logits (batch x time, outputs); targets (batch x time,)."""
    inputs, targets = inputs.to(device), targets.to(device).flatten()
    with torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=device.type == "cuda" and torch.cuda.is_bf16_supported(),
    ):
        logits = model(inputs).flatten(0, 1)
    return (
        nn.functional.cross_entropy(
            logits.float(), targets, ignore_index=NO_TARGET, reduction="sum"
        ),
        logits,
        targets,
    )


def orthogonality(adapters: dict) -> Tensor:
    """Mean over the adapters of ||A A^T - 1||_F^2 + ||B^T B - 1||_F^2: AdaLoRA's penalty, used by the released code."""
    grams = [
        gram
        for a in adapters.values()
        for gram in (a.lora_A @ a.lora_A.t(), a.lora_B.t() @ a.lora_B)
    ]  # (r, r)
    return sum(
        (gram - torch.eye(len(gram), device=gram.device)).square().sum() for gram in grams
    ) / len(adapters)


def sum_processes(tensors: list[Tensor]) -> None:
    """Sum each tensor over the processes, in place, all in one flat message."""
    if WORLD > 1:
        flat = nn.utils.parameters_to_vector(tensors)
        torch.distributed.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, tensors)


class Run:
    """One training run: its parts, how far it has come, and the log of it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.device = args, Path(args.out), pick_device(args.device)
        self.model, self.tokenizer = load_base(args, self.device)
        context = args.context or self.model.config.context
        need(
            context <= self.model.config.context,
            f"--context {context}: at most {self.model.config.context} for this base",
        )
        read = task_examples if args.task else text_examples
        self.examples, self.classes = read(args.task or args.data, self.tokenizer, context)
        torch.manual_seed(args.seed)
        self.adapters = (
            {}
            if args.method == "full"
            else add_adapters(
                self.model,
                args.targets,
                args.method,
                args.rank,
                args.init_rank,
                args.alpha,
                args.dropout,
            )
        )
        self.model.classify(len(self.classes))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        core = {
            p for name, p in self.model.named_parameters() if name.endswith(("lora_L", "lora_U"))
        }
        groups = [
            {"params": [p for p in trained if p not in core], "lr_ratio": 1.0},
            {"params": [p for p in trained if p in core], "lr_ratio": args.core_lr_ratio},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.allocator = (
            None
            if args.schedule == "none"
            else SIGNALS[args.score](
                self.adapters,
                self.optimizer,
                schedule=args.schedule,
                target_rank=args.rank,
                total_steps=args.steps,
                warmup=args.warmup,
                interval=args.interval,
                rank_step=args.rank_step,
                top_k=args.top_k,
            )
        )
        self.step, self.tokens, self.log, self.losses, self.seconds, self.growth_seconds = (
            0,
            0,
            [],
            [],
            0.0,
            0.0,
        )
        if args.resume:
            saved = load(self.out / "checkpoint.pt", "progress", "trained", "optimizer", "growth")
            with needing(
                f"--resume {args.resume}: its checkpoint is of other code, or damaged; start anew"
            ):
                load_adapter_state_dict(self.model, saved["trained"], self.optimizer)
                self.optimizer.load_state_dict(saved["optimizer"])
                vars(self).update(saved["progress"])
                if self.allocator:
                    self.allocator.state = saved["growth"]

    def save(self) -> None:
        state = {
            "settings": vars(self.args),
            "trained": adapter_state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
            "growth": self.allocator and self.allocator.state,
            "progress": {
                k: vars(self)[k]
                for k in ("step", "tokens", "log", "losses", "seconds", "growth_seconds")
            },
        }
        save(self.out / "checkpoint.pt", state)
        save(self.out / "adapter.pt", state["trained"])
        save(self.out / "log.jsonl", ((json.dumps(entry) + "\n").encode() for entry in self.log))

    def note(self, kind: str, **values) -> None:
        """Log where the run is, and `values`, and say so."""
        self.log.append(log_entry(self, kind, **values))
        say(tell(self.log))

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Of 512 examples at most: {split}_loss, nats per target; for a task also {split}_accuracy and macro {split}_f1."""
        self.model.eval()
        n = len(self.classes)
        sums = torch.zeros(
            2 + n * n, device=self.device
        )  # of the loss, of the targets, and of each (true, predicted)
        for numbers in torch.arange(len(self.examples[split]))[:512].split(self.args.batch_size)[
            PROCESS::WORLD
        ]:
            loss, logits, targets = predict(
                self.model, *batch(self.examples[split], numbers), self.device
            )
            known = targets != NO_TARGET
            pairs = (
                (targets[known] * n + logits[known].argmax(-1)).bincount(minlength=n * n)
                if n
                else sums[2:]
            )
            sums += torch.cat((torch.stack((loss, known.sum())), pairs))
        sum_processes([sums])
        loss, count, confusion = sums[0], sums[1], sums[2:].view(n, n)
        f1 = 2 * confusion.diag() / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
        accuracy = (
            {f"{split}_accuracy": confusion.trace() / count, f"{split}_f1": f1.mean()} if n else {}
        )
        return {
            name: value.item()
            for name, value in ({f"{split}_loss": loss / count} | accuracy).items()
        }

    def test(self) -> dict:
        """The results on the test split, and how the model goes on from its first words, with the same draws each time."""
        prompt = self.tokenizer.decode(self.examples["test"][0][0][:16].tolist())
        return self.evaluate("test") | (
            {} if self.classes else {"sample": generate(self.model, self.tokenizer, prompt)}
        )

    def train(self) -> None:
        """The loop. All chance in a step comes from (seed, step), so that a checkpoint needs no generator's state."""
        args, interrupts = self.args, []
        if not self.log:
            save(self.out / "config.json", [json.dumps(vars(args), indent=1).encode()])
            self.note("start", **self.test())
        model = torch.compile(self.model) if args.compile else self.model
        handler = signal.signal(
            signal.SIGINT, lambda *_: interrupts.append(True)
        )  # the step under way is finished
        for step in tqdm(range(self.step + 1, args.steps + 1), disable=PROCESS > 0 or None):
            began, seed = (
                time.perf_counter(),
                args.seed * 1_000_003 + step,
            )  # not shifted: it drops bits above 32
            torch.manual_seed(seed * WORLD + PROCESS)
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr_ratio"] * learning_rate(step, args.steps, args.lr)
            self.model.train()
            self.optimizer.zero_grad()
            numbers = np.random.default_rng((args.seed, step)).integers(
                len(self.examples["train"]), size=args.batch_size
            )
            inputs, targets = batch(self.examples["train"], numbers)
            count, pieces = (targets != NO_TARGET).sum().item(), args.accumulate * WORLD
            loss, penalty = torch.zeros(2, device=self.device).unbind()
            for i in range(PROCESS, pieces, WORLD):
                part = predict(model, inputs[i::pieces], targets[i::pieces], self.device)[0] / count
                penalty = orthogonality(self.adapters) if args.orth and self.adapters else penalty
                (part + args.orth / pieces * penalty).backward()
                loss += part.detach()
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            stop = torch.tensor(float(len(interrupts)), device=self.device)
            sum_processes([*(p.grad for p in trained), loss, stop])
            need(
                loss.isfinite(),
                f"--lr {args.lr}: the loss is not finite at step {step}; start anew with a lower rate",
            )
            nn.utils.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            updated = time.perf_counter()
            torch.manual_seed(seed)  # the same new rows in every process
            grown = self.allocator.step(step) if self.allocator else []
            self.growth_seconds += time.perf_counter() - updated
            self.step, self.tokens, self.seconds = (
                step,
                self.tokens + inputs.numel(),
                self.seconds + updated - began,
            )
            self.losses.append(loss.item())
            if grown:
                self.note("allocation", grown=grown)
            if step % args.eval_interval == 0 or step == args.steps:
                self.note(
                    "eval",
                    train_loss=sum(self.losses) / len(self.losses),
                    penalty=penalty.item(),
                    **self.evaluate("val"),
                    tokens_per_second=self.tokens / self.seconds,
                )
                self.losses = []
            if stop or not self.losses:
                self.save()
            if stop:
                say(f"stopped after step {step}; to go on: python train.py --resume {self.out}")
                sys.exit(130)
        self.model.eval()
        signal.signal(signal.SIGINT, handler)
        if self.log[-1]["kind"] != "end":
            self.note("end", **self.test())
            self.save()
            if PROCESS == 0:
                say(
                    f"look at {draw_run(self.out)}; beside it: config.json log.jsonl adapter.pt checkpoint.pt"
                )


def main(argv: list[str] | None = None) -> Run:
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()
    args = parse_args(argv)
    run = Run(args)
    run.train()
    if args.generate is not None:
        say(
            generate(
                run.model,
                run.tokenizer,
                args.generate,
                args.temperature,
                args.sample_top_k,
                args.sample_seed,
            )
        )
    if args.merge:
        model = merge_adapters(run.model)
        save(
            Path(args.merge),
            dict(
                config=vars(model.config),
                tokenizer=run.tokenizer.to_str(),
                model=model.state_dict(),
            ),
        )
    return run


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
