"""Why the paper's importance can't see what a matrix is worth: two equal matrices, two losses.

    python plots/experiments/blind.py      # two seconds; writes plots/results/blind.jsonl

Both matrices learn the same from the same start, but the loss of the second one counts 1, 10 or
100 times. At L + U = I the change of F is the trace of the core's change, over r^1.5, to first
order. And Adam divides each gradient by its own size, so that neither the core nor B and A move any
farther for a loss that counts more: the importance does not see it, and the norm of the update
neither. `worth` keeps the gradients and does.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from plots import signals
from plots.experiments import cells
from triadapt import RankAllocator, add_adapters

FACTORS = [1, 10, 100]
STEPS = 30
RATE = 1e-2
WATCHED = {"importance": RankAllocator, "norm": signals.UpdateNorm, "worth": signals.Worth}


def train_two(factor: float) -> tuple[list[dict], dict[str, float]]:
    """([per step: the change of F in the first matrix, and the trace of its core's over r^1.5],
    {signal: the second matrix's score over the first one's})."""
    torch.manual_seed(0)
    first = nn.Linear(16, 16)
    second = nn.Linear(16, 16)
    second.load_state_dict(first.state_dict())
    net = nn.ModuleDict({"first": first, "second": second})
    adapters = add_adapters(net, "first|second", rank=4)
    one, two = adapters.values()
    two.lora_A.data.copy_(one.lora_A)  # random at the start
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    settings = {"target_rank": 4, "total_steps": STEPS, "warmup": 0, "interval": STEPS}
    allocators = {name: kind(adapters, optimizer, **settings) for name, kind in WATCHED.items()}

    x = torch.randn(64, 16)
    target = x @ torch.randn(16, 16) / 2
    F = one.importance().item()
    log = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        losses = [(net[name](x) - target).square().mean() for name in ("first", "second")]
        (losses[0] + factor * losses[1]).backward()
        optimizer.step()
        allocators["worth"].step(step)  # it looks at each backward pass
        change = (one.core() - torch.eye(4)).diagonal().sum().item()
        log.append({"step": step, "change": one.importance().item() - F, "trace": change / 4**1.5})
    ratios = {}
    for name, allocator in allocators.items():
        scores = allocator.scores()
        ratios[name] = scores["second"] / scores["first"]
    return log, ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=cells.RESULTS / "blind.jsonl")
    args = parser.parse_args()
    if cells.read(args.results):
        return  # a line is never edited
    for factor in FACTORS:
        log, ratios = train_two(factor)
        cells.append(args.results, {"factor": factor, "ratios": ratios, "log": log})
        print(f"the second loss counts {factor} times: scores, second over first: {ratios}")


if __name__ == "__main__":
    main()
