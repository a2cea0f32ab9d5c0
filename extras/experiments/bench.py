"""What a training step costs with LoRA, TriAdaptLoRA, peft's LoRA and peft's AdaLoRA.

python -m extras.experiments.bench      # needs two idle cores

All four adapt the six matrices of each block of our GPT at rank 8. They take turns in one process,
one step each on the same batch, so a slow moment of the machine hits all of them. A result is the
time of a step divided by that of LoRA's step in the same round: the median and the quartiles of all
rounds. Steps include TriAdaptLoRA's allocations, every fifth step, and AdaLoRA's, every step.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from torch import Tensor, nn

from extras.experiments.run import RESULTS, commit
from model import GPT, GPTConfig
from triadapt import RankAllocator, add_adapters

STEPS = 1000  # of the training that is timed at its beginning
TARGETS = "q|k|v|o|fc|proj"
VARIANTS = ["LoRA", "TriAdaptLoRA", "LoRA in peft", "AdaLoRA in peft"]
# The sizes of the GPT, and the batch size.
SIZES = [
    (GPTConfig(), 8),  # that of base.pt
    (GPTConfig(context=256, layers=6, heads=6, width=384), 4),
    (GPTConfig(context=256, layers=6, heads=6, width=384), 16),
    (GPTConfig(context=256, layers=6, heads=12, width=768), 4),
]


class WithLoss(nn.Module):
    """A GPT that returns its loss, because peft's AdaLoRA adds a penalty to it."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, ids: Tensor) -> SimpleNamespace:
        """ids (batch, context + 1)."""
        logits = self.gpt(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return SimpleNamespace(loss=loss)


def make_step(variant: str, config: GPTConfig) -> Callable[[Tensor, int], None]:
    """A function that does step t on a batch of ids."""
    torch.manual_seed(0)
    model = WithLoss(GPT(config))
    if variant == "LoRA":
        add_adapters(model, TARGETS, "lora", rank=8)
    elif variant == "TriAdaptLoRA":
        adapters = add_adapters(model, TARGETS, rank=8, init_rank=7)
    elif variant == "LoRA in peft":
        settings = peft.LoraConfig(target_modules=rf".*\.({TARGETS})", r=8, lora_alpha=16)
        model = peft.get_peft_model(model, settings)
    else:
        settings = peft.AdaLoraConfig(
            target_modules=rf".*\.({TARGETS})",
            init_r=12,
            target_r=8,
            total_step=STEPS,
            tinit=0,
            tfinal=STEPS // 2,
            deltaT=1,
        )
        model = peft.get_peft_model(model, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    allocator = None
    if variant == "TriAdaptLoRA":
        allocator = RankAllocator(adapters, optimizer, total_steps=STEPS, warmup=0, interval=5)

    def step(ids: Tensor, t: int) -> None:
        optimizer.zero_grad()
        model(ids).loss.backward()
        optimizer.step()
        if allocator:
            allocator.step(t)
        if variant == "AdaLoRA in peft":
            model.base_model.update_and_allocate(t)

    return step


def measure(config: GPTConfig, batch_size: int, rounds: int) -> dict:
    """A line of the results: for each variant the median and quartiles of its times over LoRA's."""
    steps = {variant: make_step(variant, config) for variant in VARIANTS}
    ratios = {variant: [] for variant in VARIANTS}
    seconds = []
    for t in range(1, rounds + 6):
        ids = torch.randint(config.vocab_size, (batch_size, config.context + 1))
        times = {}
        for variant, step in steps.items():
            began = time.perf_counter()
            step(ids, t)
            times[variant] = time.perf_counter() - began
        if t > 5:  # the first steps are slower
            seconds.append(times["LoRA"])
            for variant in VARIANTS:
                ratios[variant].append(times[variant] / times["LoRA"])
    return {
        "width": config.width,
        "layers": config.layers,
        "tokens": batch_size * config.context,
        "ratios": {variant: statistics.quantiles(own, n=4) for variant, own in ratios.items()},
        "seconds": statistics.median(seconds),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": [torch.__version__, peft.__version__],
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m extras.experiments.bench")
    parser.add_argument("--results", type=Path, default=RESULTS / "step_cost.jsonl")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many, for a test")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="peft")
    for config, batch_size in SIZES[: args.sizes]:
        result = measure(config, batch_size, args.rounds)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(f"width {config.width}, {result['tokens']} tokens: {result['ratios']}", flush=True)


if __name__ == "__main__":
    main()
