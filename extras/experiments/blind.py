"""Shows that the paper's importance does not see how much a loss counts.

python -m extras.experiments.blind

Two equal matrices learn the same task from the same start, but the second one's loss counts 1, 10
or 100 times. Adam divides each gradient by its own size, so both matrices move equally far, and the
importance gives both the same score. The norm of the update does not see it either. `worth` keeps
the gradients, and sees it.
"""

import torch
from torch import nn

from extras.allocators import KINDS
from triadapt import add_adapters

STEPS = 30


def score_ratios(factor: float) -> dict[str, float]:
    """{allocator: the second matrix's score divided by the first one's}."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 16)})
    net["second"].load_state_dict(net["first"].state_dict())
    adapters = add_adapters(net, ["first", "second"], rank=8, init_rank=4)
    adapters["second"].load_state_dict(adapters["first"].state_dict())  # A is random
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    settings = {"total_steps": STEPS + 1, "warmup": 0, "interval": STEPS + 1}  # no growth so far
    names = ("importance", "norm", "worth")
    allocators = {name: KINDS[name](adapters, optimizer, **settings) for name in names}

    x = torch.randn(64, 16)
    target = x @ torch.randn(16, 16) / 2
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        first, second = ((net[name](x) - target).square().mean() for name in adapters)
        (first + factor * second).backward()
        optimizer.step()
        for allocator in allocators.values():
            allocator.step(step)
    scores = {name: allocator.scores() for name, allocator in allocators.items()}
    return {name: own["second"] / own["first"] for name, own in scores.items()}


if __name__ == "__main__":
    for factor in (1, 10, 100):
        ratios = score_ratios(factor)
        print(f"the second loss counts {factor} times, its score is higher by: {ratios}")
