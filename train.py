"""Adapt a small GPT, or GPT-2, with TriAdaptLoRA, LoRA or full fine-tuning, and show who grows.

python train.py --schedule linear                    # pretrains a base once, then adapts it
python train.py --base gpt2 --task glue/CoLA         # published weights, one of the paper's tasks
python train.py --resume runs/triadapt-linear        # goes on after Ctrl-C, to the same bits
torchrun --standalone --nproc_per_node=2 train.py    # processes share each batch
"""

# From top to bottom: settings, files, one training step, base model, the run, report.

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import data
import model
from data import NO_TARGET, batch
from model import GPT, GPTConfig
from plots.run import draw_run
from triadapt import (
    METHODS,
    SCHEDULES,
    SIGNALS,
    adapter_state_dict,
    add_adapters,
    load_adapter_state_dict,
    merge_adapters,
)

# --------------------------------------------------------------------------------- settings

# Name, type, default and meaning. A default of None depends on other settings: fill_defaults.
SETTINGS = {
    "data": [
        ("data", str, "prose", "text to continue: prose, code, or a UTF-8 file"),
        (
            "task",
            str,
            None,
            "a task instead: modules, a GLUE folder, a .tsv, E2E's .txt, SQuAD's .json",
        ),
        ("context", int, None, "tokens of a window, or of a text [all that the base allows]"),
        ("batch_size", int, 8, "windows or texts a step, of all processes together"),
        ("accumulate", int, 1, "pieces that a process computes its batch in, to save memory"),
    ],
    "base model": [
        ("base", str, "code", "code: ours; gpt2[-medium, -large, -xl]; a folder with it; a .pt"),
        ("base_steps", int, 1000, "steps that ours is pretrained on code: 90 s on two cores"),
    ],
    "adapter": [
        ("method", str, "triadapt", "how to adapt; full trains every weight"),
        ("rank", int, 8, "target rank; the budget is rank x matrices"),
        ("alpha", float, 16.0, "scale of the update: s = alpha / rank"),
        ("init_rank", int, None, "rank at the start [half the rank if it is to grow]"),
        ("targets", str, "q|k|v|o|fc|proj", "names of the matrices, a regular expression"),
        ("dropout", float, 0.0, "probability that an adapter's input is dropped in training"),
    ],
    "growth": [
        ("schedule", str, None, "how many matrices grow at an allocation [linear if any can]"),
        ("score", str, "importance", "what tells who grows; plots/signals.py has rivals of it"),
        ("budget", str, "ranks", "what it counts; numbers: as many as LoRA trains"),
        ("rank_step", int, 1, "ranks that a matrix grows by at once"),
        ("interval", int, None, "steps between allocations [steps / 300]"),
        ("warmup", int, None, "steps before growth [2 %% of all]"),
        ("top_k", int, 4, "matrices that grow at an allocation of the fixed schedule"),
    ],
    "training": [
        ("steps", int, 300, "optimiser steps"),
        ("lr", float, None, "peak learning rate [1e-2, full: 2e-3]"),
        ("core_lr_ratio", float, 1.0, "learning rate of the core L + U over that of A and B"),
        ("seed", int, 0, "of adapters, batches and dropout; the base has its own"),
        ("device", str, None, "such as cuda:1 [the accelerator if there is one, else the CPU]"),
        ("eval_interval", int, None, "steps between evaluations [a tenth of the steps]"),
    ],
    "output": [
        ("out", str, None, "folder of the results [runs/METHOD-SCHEDULE]"),
        ("resume", str, None, "folder of a run to finish, with its own settings"),
        ("merge", str, None, ".pt file for the model with adapters merged, for --base"),
        ("generate", str, None, "text that the trained model goes on from"),
    ],
}
DEFAULTS = {name: default for group in SETTINGS.values() for name, _, default, _ in group}
AFTER_TRAINING = ("merge", "generate")  # these can be given at --resume too


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All settings of a run. Raises ValueError for one that can't be, or would have no effect."""
    options = vars(make_parser().parse_args(argv))
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if value == []:  # what argparse makes of --name=--
            raise ValueError(f"{option(name)}: needs a value")
    settings = resumed_settings(given) if "resume" in given else DEFAULTS | given
    args = argparse.Namespace(**settings)
    fill_defaults(args)
    check_ranges(args)
    check_effects(args, given)
    return args


def make_parser() -> argparse.ArgumentParser:
    choices = {
        "method": [*METHODS, "full"],
        "schedule": [*SCHEDULES, "none"],
        "score": [*SIGNALS],
        "budget": ["ranks", "numbers"],
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = refuse_options
    for title, settings in SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, meaning in settings:
            text = meaning if default is None else f"{meaning} [{default}]"
            group.add_argument(option(name), type=kind, choices=choices.get(name), help=text)
    return parser


def refuse_options(message: str) -> None:
    """In the place of argparse's page of usage."""
    raise ValueError(f"{message}; see --help")


def option(name: str) -> str:
    """A setting as the command line calls it."""
    return "--" + name.replace("_", "-")


def fill_defaults(args: argparse.Namespace) -> None:
    if args.schedule is None:
        args.schedule = "linear" if can_grow(args.method) else "none"
    if args.init_rank is None:
        args.init_rank = args.rank if args.schedule == "none" else (args.rank + 1) // 2
    if args.interval is None:
        args.interval = max(1, args.steps // 300)
    if args.warmup is None:
        args.warmup = args.steps // 50
    if args.lr is None:
        args.lr = 2e-3 if args.method == "full" else 1e-2
    if args.eval_interval is None:
        args.eval_interval = max(1, args.steps // 10)
    if args.out is None:
        args.out = f"runs/{args.method}-{args.schedule}"


def can_grow(method: str) -> bool:
    return hasattr(METHODS.get(method), "importance")


def check_ranges(args: argparse.Namespace) -> None:
    lowest = {"seed": 0, "warmup": 0, "batch_size": args.accumulate * WORLD}
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):
            low = lowest.get(name, 1 if isinstance(value, int) else 0)
            if not low <= value < 2**31:
                raise ValueError(f"{option(name)} {value}: must be from {low} to below 2^31")
    if args.schedule != "none" and not can_grow(args.method):
        raise ValueError(f"--schedule {args.schedule}: --method {args.method} can't grow")
    if args.merge is not None and (not args.merge.endswith(".pt") or Path(args.merge).is_dir()):
        raise ValueError(f"--merge {args.merge}: must be a file that ends in .pt, as --base reads")


def check_effects(args: argparse.Namespace, given: dict) -> None:
    """Raises ValueError for an option that was given and would change nothing."""
    idle = {}  # setting: why it has no effect
    if args.method == "full":
        for name in ("rank", "alpha", "init_rank", "targets", "dropout", "core_lr_ratio"):
            idle[name] = "--method full has no adapters"
    elif "lora_L" not in METHODS[args.method].GROWS_ALONG:
        idle["core_lr_ratio"] = f"--method {args.method} has no core"
    if args.schedule == "none":
        for name in ("score", "budget", "rank_step", "interval", "warmup"):
            idle[name] = "no matrix grows"
    if args.schedule != "fixed":
        idle["top_k"] = "only --schedule fixed uses it"
    if args.task is not None:
        idle["data"] = "--task is trained on instead"
    if args.base != "code":
        idle["base_steps"] = "only --base code is pretrained here"
    for name in given:
        if name in idle:
            raise ValueError(f"{option(name)}: no effect, as {idle[name]}; leave it out")


def resumed_settings(given: dict) -> dict:
    """Those of the run to finish, with what is to be done after it."""
    folder = given["resume"]
    path = Path(folder, "checkpoint.pt")
    settings = load_file(path, "settings")["settings"]
    if not isinstance(settings, dict) or settings.keys() != DEFAULTS.keys():
        raise ValueError(f"{path}: damaged, or of other code; start anew")
    settings["out"] = folder  # it may have been moved
    for name, value in given.items():
        if name in ("resume", *AFTER_TRAINING):
            settings[name] = value
        elif value != settings[name]:
            known = f"the run has {settings[name]} and keeps it"
            raise ValueError(f"{option(name)} {value}: {known}; leave it out")
    return settings


# --------------------------------------------------------------- devices, processes and files

CACHE = Path("cache")
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets this and RANK
PROCESS = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, else this process's accelerator, else the CPU."""
    if WORLD > 1 and torch.accelerator.is_available():
        torch.accelerator.set_device_index(PROCESS % torch.accelerator.device_count())
    found = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(1, device=found).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not to be had here; try cpu") from error


def sum_processes(tensors: list[Tensor]) -> None:
    """Sum each tensor over the processes, in place, all in one flat message."""
    if WORLD > 1:
        flat = nn.utils.parameters_to_vector(tensors)
        torch.distributed.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, tensors)


def say(text: str) -> None:
    if PROCESS == 0:
        print(text, flush=True)


def save_file(path: Path, content: dict | str | bytes) -> None:
    """Write what torch.save takes, a text or bytes; the first process does, the others wait.

    The file has a temporary name until it is whole: after a failure the old one is still there.
    """
    if PROCESS == 0:
        if isinstance(content, dict):
            buffer = io.BytesIO()  # torch.save's own errors of a full disk are not OSErrors
            torch.save(content, buffer)
            content = buffer.getbuffer()
        elif isinstance(content, str):
            content = content.encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            raise OSError(f"{path}: can't be written ({error.strerror or error})") from error
        finally:
            temporary.unlink(missing_ok=True)
    if WORLD > 1:
        torch.distributed.barrier()


def load_file(path: Path, *keys: str) -> dict:
    """These keys of a .pt file: tensors and plain values only, so that nothing in it can run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {key: content[key] for key in keys}
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{path}: damaged, or not written by train.py") from error


def digest(parts: Iterable[str | Tensor]) -> str:
    """A short name of a content: equal for equal texts and tensors."""
    sha = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        else:
            part = part.encode("utf-8", "surrogatepass") + b"\0"
        sha.update(part)
    return sha.hexdigest()[:16]


def check_writable(setting: str, folder: Path) -> None:
    """Raises OSError if no file could be written to a folder, which need not exist yet."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = f"nothing can be written to {there} ({error.strerror})"
        raise OSError(f"{setting}: {reason}; give another") from error


# ---------------------------------------------------------------------------- a training step


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 1 ... steps: up over 3 %, then down a half cosine to a tenth of the peak."""
    rise = max(1, round(0.03 * steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))
    return peak * min(step / rise, 0.1 + 0.9 * fall)


def parameter_groups(net: nn.Module, core_lr_ratio: float) -> list[dict]:
    """What an optimizer trains: the cores L + U have a learning rate of their own."""
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    core = [p for name, p in trained.items() if name.endswith(("lora_L", "lora_U"))]
    others = [p for name, p in trained.items() if not name.endswith(("lora_L", "lora_U"))]
    return [{"params": others, "lr_ratio": 1.0}, {"params": core, "lr_ratio": core_lr_ratio}]


def draw_batch(examples, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, by (seed, step) alone, so that a checkpoint needs no generator."""
    numbers = np.random.default_rng((seed, step)).integers(len(examples), size=size)
    return batch(examples, numbers)


def predict(
    net: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch: the sum of its losses, which are negative log likelihoods in nats, or squared
    errors if there is one output, a score; the logits (batch x time, outputs); the targets (batch x
    time,)."""
    inputs = inputs.to(device)
    targets = targets.to(device).flatten()
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        logits = net(inputs).flatten(0, 1)
    logits = logits.float()
    if logits.shape[-1] == 1:
        known = targets != NO_TARGET
        loss = (logits[known, 0] - targets[known]).square().sum()
    else:
        loss = nn.functional.cross_entropy(logits, targets, ignore_index=NO_TARGET, reduction="sum")
    return loss, logits, targets


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    examples: tuple[Tensor, Tensor],
    device: torch.device,
    accumulate: int = 1,
) -> float:
    """One optimiser step at a learning rate, on a batch whose pieces the processes share.

    Returns the loss in nats per target.
    """
    net.train()
    optimizer.zero_grad()
    inputs, targets = examples
    count = (targets != NO_TARGET).sum().item()
    pieces = accumulate * WORLD
    loss = torch.zeros((), device=device)
    for i in range(PROCESS, pieces, WORLD):
        part = predict(net, inputs[i::pieces], targets[i::pieces], device)[0] / count
        part.backward()
        loss += part.detach()

    # The parameters as they are now: growth puts new ones in the groups.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sum_processes([*(p.grad for p in parameters), loss])
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["lr_ratio"] * rate
    optimizer.step()
    return loss.item()


# ------------------------------------------------------------------------------------- scores

# In a log, and in words.
SCORES = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "exact_match": "exact match",
}


def scores(outputs: int, said: Tensor, true: Tensor) -> dict[str, float]:
    """What a task reports, from what was said of each example and what is true: (examples,) each.

    Without outputs of a head texts are written, and `said` is 1 where all of one is right. One
    output says a score. Else `said` is a class, and F1 the mean over those that occur or are said.
    """
    if outputs == 0:
        return {"exact_match": said.mean().item()}
    if outputs == 1:
        return {
            "pearson": correlation(said, true),
            "spearman": correlation(places(said), places(true)),
        }
    f1 = []
    for c in torch.cat((said, true)).unique():
        hits = ((said == c) & (true == c)).sum()
        f1.append(2 * hits / ((said == c).sum() + (true == c).sum()))
    result = {"accuracy": (said == true).float().mean().item(), "f1": torch.stack(f1).mean().item()}
    if outputs == 2:
        result["matthews"] = correlation(said, true)
    return result


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, which of two classes 0 and 1 is Matthews'; 0 where a or b is constant."""
    a = a.double() - a.double().mean()
    b = b.double() - b.double().mean()
    norm = a.norm() * b.norm()
    return (a @ b / norm).item() if norm > 0 else 0.0


def places(values: Tensor) -> Tensor:
    """The place of each value in their order; equal ones share the mean of their places."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[which]


# --------------------------------------------------------------------------------- base model


def load_base(args: argparse.Namespace, device: torch.device) -> dict:
    """{"config": sizes, "tokenizer": json, "model": weights, or None if yet to be pretrained}."""
    if args.base != "code" and Path(args.base).suffix == ".pt":
        return load_file(Path(args.base), "config", "tokenizer", "model")
    if args.base != "code":
        return model.load_gpt2(args.base)
    path = pretrained_path(args.base_steps, device)
    if path.exists():
        return load_file(path, "config", "tokenizer", "model")
    config = GPTConfig()
    tokenizer = data.train_tokenizer(data.documents("code"), config.vocab_size)
    return {"config": asdict(config), "tokenizer": tokenizer.to_str(), "model": None}


def open_base(base: dict, name: str) -> tuple[Tokenizer, GPT]:
    """A base's tokenizer and its model; without weights, the start of its pretraining."""
    try:
        tokenizer = data.open_tokenizer(base["tokenizer"])
        config = GPTConfig(**base["config"])
    except Exception as error:  # the tokenizer's errors are of no narrower kind
        raise ValueError(f"--base {name}: its tokenizer or its sizes are damaged") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        sizes = f"{tokenizer.get_vocab_size()} tokens and its model {config.vocab_size}"
        raise ValueError(f"--base {name}: its tokenizer has {sizes}; they are not of one model")
    torch.manual_seed(0)
    gpt = GPT(config)
    if base["model"] is not None:
        try:
            gpt.load_state_dict(base["model"])
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--base {name}: weights do not fit ({reason:.300})") from error
    return tokenizer, gpt


def pretrained_path(steps: int, device: torch.device) -> Path:
    """Where our base is kept. The name changes with all that it is made from."""
    code = [model, data, pretrain, train_step, predict, learning_rate, draw_batch]
    facts = [*map(inspect.getsource, code), str(steps), device.type, torch.__version__]
    return CACHE / f"base-{digest([*data.documents('code'), *facts])}.pt"


def pretrain(gpt: GPT, tokenizer: Tokenizer, steps: int, device: torch.device) -> None:
    """Train a GPT on code, in place, and keep it in the cache."""
    say(f"no base is in {CACHE}/ yet: it is pretrained on code first, for {steps} steps")
    windows = data.text_examples("code", data.documents("code"), tokenizer, gpt.config.context)
    groups = [{"params": list(gpt.parameters()), "lr_ratio": 1.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    began = told = time.perf_counter()
    for step in range(1, steps + 1):
        examples = draw_batch(windows["train"], 0, step, size=8)
        loss = train_step(gpt, optimizer, learning_rate(step, steps, 2e-3), examples, device)
        now = time.perf_counter()
        if now - told > 10 or step == steps:
            left = (now - began) / step * (steps - step)
            say(f"pretraining step {step}/{steps}  loss {loss:.3f}  {left:.0f} s left")
            told = now
    save_model(pretrained_path(steps, device), gpt, tokenizer)


def save_model(path: Path, gpt: GPT, tokenizer: Tokenizer) -> None:
    """A file for --base."""
    sizes = asdict(gpt.config)
    content = {"config": sizes, "tokenizer": tokenizer.to_str(), "model": gpt.state_dict()}
    save_file(path, content)


# ------------------------------------------------------------------------------------ the run


class Run:
    """One training run: its parts, how far it has come, and the log of it."""

    def __init__(self, args: argparse.Namespace):
        """Read, check and build all parts. Raises ValueError or OSError for bad input."""
        self.args = args
        self.out = Path(args.out)
        self.device = pick_device(args.device)
        check_writable(f"out {args.out}", self.out)
        if args.merge is not None:
            check_writable(f"merge {args.merge}", Path(args.merge).parent)

        # A mistake is told at once: settings are tried on a model of our base's sizes, and data is
        # read, before anything that takes long.
        self.task = None
        if args.base == "code":
            self.adapt(GPT(GPTConfig()))
        if args.task is not None:
            self.task = data.load_task(args.task)
            if self.task.kind != "text" and args.generate is not None:
                raise ValueError(f"generate {args.generate}: --task {args.task} writes no text")
        texts = [] if self.task else data.documents(args.data)

        # Base model.
        base = load_base(args, self.device)
        self.tokenizer, gpt = open_base(base, args.base)
        self.model = gpt.to(self.device)
        self.encode(texts)
        if base["model"] is None:
            pretrain(gpt, self.tokenizer, args.base_steps, self.device)

        # What a resumed run must find unchanged.
        read = [repr(row) for row in self.task.rows] if self.task else texts
        self.content = {
            f"weights of {args.base}": digest(gpt.state_dict().values()),
            f"tokenizer of {args.base}": digest([self.tokenizer.to_str()]),
            f"content of {args.task or args.data}": digest(read),
        }

        # Adapters.
        self.adapt(self.model)

        # How far it has come.
        self.step = 0
        self.seconds = 0.0
        self.losses = []  # of the steps since the last evaluation
        self.log = []
        if args.resume:
            self.load()

    def encode(self, texts: list[str]) -> None:
        """Make {split: examples} of the task, or else of texts."""
        args = self.args
        context = args.context or self.model.config.context
        if context > self.model.config.context:
            longest = self.model.config.context
            raise ValueError(f"--context {context}: at most {longest} for this base")
        if self.task:
            self.examples, read = data.task_examples(self.task, self.tokenizer, context)
            say(read)
        else:
            self.examples = data.text_examples(args.data, texts, self.tokenizer, context)

    @property
    def outputs(self) -> int:
        """Of the head that a task needs: its classes, or one for a score; 0 to write text."""
        if self.task is None:
            return 0
        return {"class": len(self.task.classes), "score": 1, "text": 0}[self.task.kind]

    def adapt(self, gpt: GPT) -> None:
        """Make adapters, optimiser and allocator for a model; the seed makes what is random."""
        args = self.args
        torch.manual_seed(args.seed)
        self.adapters = {}
        if args.method != "full":
            self.adapters = add_adapters(
                gpt, args.targets, args.method, args.rank, args.init_rank, args.alpha, args.dropout
            )
        gpt.classify(self.outputs)

        groups = parameter_groups(gpt, args.core_lr_ratio)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

        self.allocator = None
        if args.schedule != "none":
            self.allocator = SIGNALS[args.score](
                self.adapters,
                self.optimizer,
                target_rank=args.rank,
                total_steps=args.steps,
                warmup=args.warmup,
                interval=args.interval,
                schedule=args.schedule,
                rank_step=args.rank_step,
                top_k=args.top_k,
                count_numbers=args.budget == "numbers",
            )

    def train(self) -> None:
        """The loop, from wherever the run is to its end."""
        args = self.args
        if not self.log:
            self.note("start", **self.description(), **self.test())

        with ctrl_c_waits() as interrupts:
            for step in range(self.step + 1, args.steps + 1):
                began = time.perf_counter()

                # One optimiser step. What is random in it, as dropout, comes from seed and step.
                torch.manual_seed(self.seed(step) * WORLD + PROCESS)
                rate = learning_rate(step, args.steps, args.lr)
                examples = draw_batch(self.examples["train"], args.seed, step, size=args.batch_size)
                loss = train_step(
                    self.model, self.optimizer, rate, examples, self.device, args.accumulate
                )
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"lr {args.lr}: the loss is {loss} at step {step}; give a lower one"
                    )

                # Growth, between two optimiser steps. New rows of A are random: the seed makes them
                # the same in every process.
                grown = []
                if self.allocator is not None:
                    torch.manual_seed(self.seed(step))
                    grown = self.allocator.step(step)

                # How far it has come.
                self.step = step
                self.seconds += time.perf_counter() - began
                self.losses.append(loss)

                # Report, and save.
                if grown:
                    self.note(
                        "allocation",
                        grown=grown,
                        threshold=self.allocator.threshold,
                        score=self.allocator.last_scores,
                    )
                if step % args.eval_interval == 0 or step == args.steps:
                    mean = sum(self.losses) / len(self.losses)
                    self.note("eval", train_loss=mean, **self.evaluate("val"))
                    self.losses = []
                    self.save()
                if any_process(interrupts, self.device):
                    self.save()
                    say(f"stopped after step {step}; to go on: python train.py --resume {self.out}")
                    sys.exit(130)

        if self.log[-1]["kind"] != "end":
            self.note("end", seconds=self.seconds, **self.test())
            save_file(self.out / "run.png", draw_run(self.log))
            self.save()
            say(f"look at {self.out / 'run.png'}; beside it: log.jsonl adapter.pt checkpoint.pt")

    def seed(self, step: int) -> int:
        """Of a step: up to a million steps, no two steps of any two runs share one."""
        return self.args.seed * 1_000_003 + step

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """{split}_loss per target, and the scores of a task: of all test examples, of 512 others
        at most."""
        self.model.eval()
        examples = self.examples[split]
        size = len(examples) if split == "test" else min(len(examples), 512)
        loss = torch.zeros((), device=self.device)
        count = torch.zeros((), device=self.device)
        said = torch.zeros(size, device=self.device)
        true = torch.zeros(size, device=self.device)
        for part in torch.arange(size).split(self.args.batch_size)[PROCESS::WORLD]:
            inputs, targets = batch(examples, part)
            part_loss, logits, targets = predict(self.model, inputs, targets, self.device)
            known = targets != NO_TARGET
            loss += part_loss
            count += known.sum()
            answers = logits[:, 0] if self.outputs == 1 else logits.argmax(-1)
            if self.outputs > 0:
                said[part] = answers[known].float()
                true[part] = targets[known].float()
            else:  # a text is right if each of its tokens is
                said[part] = ((answers == targets) | ~known).view(inputs.shape).all(1).float()
        sum_processes([loss, count, said, true])

        result = {"loss": (loss / count).item()}
        if self.task:
            result |= scores(self.outputs, said.cpu(), true.cpu())
        return {f"{split}_{name}": value for name, value in result.items()}

    def test(self) -> dict:
        """The test results; of a model that writes also how it goes on from test texts."""
        result = self.evaluate("test")
        if self.task is None:
            start = self.examples["test"][0][0][:16].tolist()
            result["sample"] = self.tokenizer.decode(model.generate(self.model, start))
        elif self.task.kind == "text":
            result["sample"] = "\n\n".join(map(self.answer, self.examples["test"][:3]))
        return result

    def answer(self, example: data.Example) -> str:
        """A prompt, its answer, and what the model writes: always the likeliest token."""
        inputs, targets = example
        known = targets != NO_TARGET
        prompt = inputs[: known.int().argmax() + 1].tolist()
        length = self.model.config.context - len(prompt)
        written = model.generate(self.model, prompt, length, top_k=1)[len(prompt) :]
        end = data.end_token(self.tokenizer)
        if end in written:
            written = written[: written.index(end)]
        texts = [self.tokenizer.decode(ids) for ids in (prompt, targets[known].tolist(), written)]
        return "prompt     {}\nanswer     {}\ngenerated  {}".format(*texts)

    # Checkpoints.

    def save(self) -> None:
        """The adapter alone, the log, and a checkpoint to resume from."""
        trained = adapter_state_dict(self.model)
        checkpoint = {
            "settings": vars(self.args),
            "content": self.content,
            "trained": trained,
            "optimizer": self.optimizer.state_dict(),
            "growth": self.allocator.state_dict() if self.allocator else {},
            "progress": {
                name: getattr(self, name) for name in ("step", "seconds", "losses", "log")
            },
        }
        save_file(self.out / "adapter.pt", trained)
        save_file(self.out / "log.jsonl", "".join(json.dumps(e) + "\n" for e in self.log))
        save_file(self.out / "checkpoint.pt", checkpoint)  # last: a run killed before it is resumed

    def load(self) -> None:
        """Go on where the run was: adapters grow to their ranks, then get weights and moments."""
        path = self.out / "checkpoint.pt"
        saved = load_file(path, "content", "trained", "optimizer", "growth", "progress")
        for what, name in self.content.items():
            if saved["content"].get(what) != name:
                raise ValueError(
                    f"--resume {self.out}: the {what} changed since then; bring the old back, or "
                    "start anew"
                )
        try:
            load_adapter_state_dict(self.model, saved["trained"], self.optimizer)
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.allocator is not None:
                self.allocator.load_state_dict(saved["growth"])
            vars(self).update(saved["progress"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--resume {self.out}: its checkpoint is damaged, or of other code ({error}); "
                "start anew"
            ) from error

    # The log.

    def note(self, kind: str, **values) -> None:
        """Log where the run is, and `values`, and say so."""
        ranks = {name: adapter.rank for name, adapter in self.adapters.items()}
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        entry = {
            "kind": kind,
            "step": self.step,
            "total_rank": sum(ranks.values()),
            "ranks": ranks,
            "trainable": sum(p.numel() for p in trained),
        }
        if self.allocator is not None:
            entry["importance"] = self.allocator.importances()
        self.log.append(entry | values)
        say(in_words(self.log))

    def description(self) -> dict:
        """What was built and is going to happen."""
        facts = {
            "device": str(self.device),
            "settings": vars(self.args),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        if self.allocator is not None:
            facts["plan"] = self.allocator.plan()
            facts["budget"] = self.allocator.budget
        return facts


@contextlib.contextmanager
def ctrl_c_waits():
    """A list that grows at Ctrl-C, so that the step under way is finished first."""
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def any_process(interrupts: list, device: torch.device) -> bool:
    """Whether Ctrl-C reached any of the processes: all stop after the same step."""
    count = torch.tensor(float(len(interrupts)), device=device)
    sum_processes([count])
    return count.item() > 0


# ------------------------------------------------------------------------------------- report


def in_words(log: list[dict]) -> str:
    """The last entry of a log, as the console tells it."""
    first, entry = log[0], log[-1]
    where = f"step {entry['step']:5}  total rank {entry['total_rank']}"
    if entry["kind"] == "start":
        return start_in_words(entry)
    if entry["kind"] == "allocation":
        grown = " ".join(entry["grown"])
        return f"{where}, threshold {entry['threshold']:+.1e}, grown: {grown}"
    if entry["kind"] == "eval":
        loss = f"train loss {entry['train_loss']:.4f}, {results_in_words(entry, 'val')}"
        return f"{where}, trainable {entry['trainable']:,}, {loss}"

    most = max(e["trainable"] for e in log)
    return "\n".join(
        [
            f"\nbefore adapting: {results_in_words(first, 'test')}",
            first.get("sample", "").strip(),
            f"\nafter adapting: {results_in_words(entry, 'test')}",
            entry.get("sample", "").strip(),
            f"\ntrainable parameters: {first['trainable']:,} at first, {most:,} at most, "
            f"{entry['trainable']:,} in the end; {entry['seconds']:.1f} s of training",
        ]
    )


def start_in_words(entry: dict) -> str:
    """What was built, before the first step."""
    settings = entry["settings"]
    lines = [
        f"device    {entry['device']}",
        f"model     {entry['parameters']:,} parameters, {entry['trainable']:,} of them trainable",
    ]
    if entry["ranks"]:
        matrices = f"{len(entry['ranks'])} matrices ({settings['targets']})"
        lines.append(f"adapted   {matrices} by {settings['method']}")
    if entry.get("plan"):
        (first, _), (last, total) = entry["plan"][0], entry["plan"][-1]
        lines.append(
            f"growth    {settings['schedule']}: total rank {entry['total_rank']} -> {total}, "
            f"budget {entry['budget']:,} {settings['budget']}, {len(entry['plan'])} allocations "
            f"from step {first} to step {last}"
        )
        if settings["budget"] == "ranks" and total < entry["budget"]:
            lines.append(
                f"warning   {entry['budget'] - total} ranks of the budget can't be spent; lower "
                "--interval or --warmup, or raise --rank-step or --top-k"
            )
    lines.append(f"base      {results_in_words(entry, 'test')}")
    return "\n".join(lines)


def results_in_words(entry: dict, split: str) -> str:
    loss = entry[f"{split}_loss"]
    found = [
        f"{words} {entry[f'{split}_{name}']:.3f}"
        for name, words in SCORES.items()
        if f"{split}_{name}" in entry
    ]
    if f"{split}_pearson" in entry:
        return ", ".join([f"{split} squared error {loss:.4f}", *found])
    if f"{split}_accuracy" in entry:
        return ", ".join([f"{split} loss {loss:.4f} nats", *found])
    perplexity = math.exp(loss) if loss < 700 else math.inf  # a diverged one is no float
    return ", ".join([f"{split} loss {loss:.4f} nats/token, perplexity {perplexity:.2f}", *found])


# --------------------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> Run:
    """A whole run, also of a fork. What is wrong with the input ends in one line and code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's console has not, and shows all letters
        sys.stdout.reconfigure(errors="replace")  # a letter that can't be shown is no error
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()
    try:
        run = Run(parse_args(argv))
        run.train()
        finish(run)
        return run
    except (ValueError, OSError, FloatingPointError) as error:
        if not is_about_input(error):
            raise
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def finish(run: Run) -> None:
    """What is asked for after training."""
    args = run.args
    if args.generate is not None:
        prompt = args.generate.encode(errors="replace").decode()  # a shell gives any bytes
        ids = run.tokenizer.encode(prompt, add_special_tokens=False).ids
        if run.task or not ids:  # an answer, and any text, begins after an end token
            ids.append(data.end_token(run.tokenizer))
        ids = model.generate(run.model.eval(), ids)
        say(run.tokenizer.decode(ids))
    if args.merge is not None:
        save_model(Path(args.merge), merge_adapters(run.model), run.tokenizer)


def is_about_input(error: Exception) -> bool:
    """Files can always fail. Else an error is about the input if the project or a fork raises it on
    purpose, in a line that begins with `raise`; what comes from a library, or from within a line,
    is a bug, and keeps its traceback."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    on_purpose = (where.line or "").startswith("raise")
    return isinstance(error, OSError) or (on_purpose and not where.filename.startswith(library))


def one_line(error: Exception) -> str:
    """Its message; a setting at its beginning is named as the command line names it."""
    message = " ".join(str(error).split())
    name, _, rest = message.partition(" ")
    return f"{option(name)} {rest}" if name in DEFAULTS else message


if __name__ == "__main__":
    main()
