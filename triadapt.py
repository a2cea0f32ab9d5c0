"""TriAdaptLoRA: triangular adaptive low-rank adaptation (arXiv 2501.08008), on any nn.Module.

    y = W x + b + s B (L + U) A x        W (d_out, d_in) is frozen, s = alpha / target rank

From rank 3 to rank 4 all four factors grow by appending, and no trained number moves:

    B (d_out, r)   L lower (r, r)   U upper (r, r)   A (r, d_in)

     o o o +          o              o o o +         o o o o o     o  trained, stays where it is
     o o o +          o o              o o +         o o o o o     +  new: zeros in B, in L zeros
     o o o +          o o o              o +         o o o o o        and a closing 1, zeros in U,
     o o o +          + + + +              +         + + + + +        random numbers in A

    L in memory, row by row:          o | o o | o o o | + + + +
    U in memory, column by column:    o | o o | o o o | + + + +

B (L + U) A stays what it was, as the new column of B is zero and so are the new numbers of L + U
but the last. Yet B's new column gets a gradient at once, and so does U's, where B is not zero; L's
row and A's as soon as B's column has moved. A run starts in the same way: with B = 0 and L + U the
identity it computes what the base does.

In this file, in the order of the paper:

    LoRALinear        the frame: equation, start, growth of a matrix
    TriAdaptLinear    the triangular split and the importance F
    RankAllocator     scores, dynamic threshold, budget: which matrices grow, and when
    add_adapters, merge_adapters, adapter_state_dict, load_adapter_state_dict: on whole models
    export_lora       as the LoRA that other tools read
"""

import copy
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class LoRALinear(nn.Module):
    """A frozen linear layer plus s B A x: LoRA (Hu et al. 2021), the baseline of the paper.

    The adapter is kept in float32, whatever the precision of the frozen weight. A subclass names
    its tensors in GROWS_ALONG, starts them in `new_entries` and uses them in `factors`.
    """

    # What grows with the rank: each tensor, and the axis that a new rank is appended to. The first
    # one has `rank` entries along its axis, which is how a saved adapter tells its rank.
    GROWS_ALONG = {"lora_B": 1, "lora_A": 0}

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.out_features, self.in_features = linear_shape(base)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.rank = 0  # what the first ranks are appended to
        for name, entries in self.new_entries(rank).items():
            setattr(self, name, nn.Parameter(entries.to(next(base.parameters()).device)))
        self.rank = rank

    def new_entries(self, n: int) -> dict[str, Tensor]:
        """What n more ranks append to each tensor: at rank 0 the start, later the growth."""
        d_out, d_in = self.out_features, self.in_features
        return {
            "lora_B": torch.zeros(d_out, n),
            "lora_A": torch.empty(n, d_in).uniform_(-1, 1) / d_in**0.5,
        }

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (L + U), (d_out, r), and A, (r, d_in); LoRA has no core, so B alone."""
        return self.lora_B, self.lora_A

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        # y = W x + b + s B (L + U) A x. A token is a row here, so it stands left of a matrix.
        B_core, A = self.factors()
        tokens = x.reshape(-1, x.shape[-1])  # (tokens, d_in)
        Ax = self.dropout(tokens) @ A.T.to(x.dtype)  # (tokens, r)
        if is_plain(self.base):
            # In place: one more tensor of y's size would cost more than the low-rank product.
            y = self.base(tokens)  # (tokens, d_out)
            add = y.addmm_
        else:
            # Others may hold this y, and all axes of x may count.
            y = self.base(x).reshape(-1, self.out_features)
            add = y.addmm
        y = add(Ax.to(y.dtype), B_core.T.to(y.dtype), alpha=self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def grow(self, n: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Append n ranks. Each tensor becomes a new nn.Parameter that begins with the old numbers.

        An optimizer that trains this adapter must be given: it goes on with the new Parameters.
        """
        if optimizer is not None:
            check_optimizer(optimizer, {"the adapter": self})
        for name, entries in self.new_entries(n).items():
            axis = self.GROWS_ALONG[name]
            old = getattr(self, name)
            grown = torch.cat((old, entries.to(old)), dim=axis)
            new = nn.Parameter(grown, requires_grad=old.requires_grad)
            setattr(self, name, new)
            if optimizer is not None:
                carry_state(optimizer, old, new, axis)
        self.rank += n  # at the end: new_entries reads the rank before growth

    def delta_weight(self) -> Tensor:
        """What the adapter adds to W, in float32: (d_out, d_in)."""
        left, right = self.factors()
        return self.scale * left @ right

    @property
    def weight(self) -> Tensor:
        """W + delta_weight(), without dropout and of W's shape and type, for code that reads a
        layer's weight and does not call it, as torch's attention."""
        weight = self.base.weight.detach().as_subclass(AdaptedWeight)
        weight.adapter = self
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the frozen layer, for the same code."""
        return self.base.bias

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A plain layer that computes the same. W's own tensor stays: it may be shared.

        Raises ValueError if the frozen layer computes more than W x + b.
        """
        if not is_plain(self.base):
            return measured_linear(self)
        merged = copy.deepcopy(self.base)
        merged.weight.copy_(self.weight)
        return merged


class TriAdaptLinear(LoRALinear):
    """A frozen nn.Linear plus s B (L + U) A x, which trains r (d_in + d_out) + r (r + 1) numbers.

    lora_L and lora_U are flat: the r (r + 1) / 2 numbers of L row by row, of U column by column.
    So a new rank is a plain append to both, as it is to A and B.
    """

    GROWS_ALONG = {"lora_B": 1, "lora_L": 0, "lora_U": 0, "lora_A": 0}

    def new_entries(self, n: int) -> dict[str, Tensor]:
        """The start and the growth of all four: L gets ones on the diagonal, L + U an identity."""
        as_in_lora = super().new_entries(n)
        rows = []
        for length in range(self.rank + 1, self.rank + n + 1):
            row = torch.zeros(length)
            row[-1] = 1.0
            rows.append(row)
        packed_rows = torch.cat(rows)
        return {
            "lora_B": as_in_lora["lora_B"],  # (d_out, n): n columns of zeros
            "lora_L": packed_rows,  # n rows of r + 1, ..., r + n numbers: zeros and a closing 1
            "lora_U": torch.zeros_like(packed_rows),  # n columns as long as these rows: zeros
            "lora_A": as_in_lora["lora_A"],  # (n, d_in): n random rows
        }

    def core(self) -> Tensor:
        """L + U: (r, r). Both hold a diagonal, r numbers more than a full matrix; they add up."""
        L = unpack_triangle(self.lora_L, self.rank)
        U = unpack_triangle(self.lora_U, self.rank).T  # U's columns are packed as L's rows are
        return L + U

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (L + U) and A: the core meets B once in a forward pass, instead of every token."""
        return self.lora_B @ self.core(), self.lora_A

    @torch.no_grad()
    def importance(self) -> Tensor:
        """F = ||L + U||_F / r, the normalised Frobenius norm: the root mean square of the core.

        The identity has F = 1 / sqrt(r), so growth alone lowers it.
        """
        return self.core().norm() / self.rank


def unpack_triangle(packed: Tensor, r: int) -> Tensor:
    """The lower triangle (r, r) whose r (r + 1) / 2 numbers are packed row by row."""
    # tril_indices goes row by row; index_put makes a new tensor, through which gradients flow.
    row, column = torch.tril_indices(r, r, device=packed.device)
    return packed.new_zeros(r, r).index_put((row, column), packed)


def carry_state(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, axis: int
) -> None:
    """Put `new` in the place of `old` in its group, with the state of its old entries, to the bit.

    New entries get zeros, but of Adam's second moments the mean of their tensor. So one whose
    gradients are as large as its tensor's moves 0.1 of the learning rate at first, then more, and
    never more than the rate, as Adam's first beta is .9. (Zeros there would let it move up to 2.1
    times the rate with betas (.9, .99) and 6.6 with (.9, .999), as Adam takes a new entry to be as
    old as its tensor. What that costs: plots/RELEASED.md, "What each choice is worth".)
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old not in optimizer.state:  # before its first step, or frozen
        return
    state = optimizer.state.pop(old)
    for key, value in state.items():
        if torch.is_tensor(value) and value.dim() > 0:  # a moment, and not a count of steps
            state[key] = value.new_zeros(new.shape)
            if "sq" in key:  # exp_avg_sq, or square_avg
                state[key] += value.mean()
            state[key].narrow(axis, 0, old.shape[axis]).copy_(value)
    optimizer.state[new] = state


def check_optimizer(optimizer: torch.optim.Optimizer, adapters: dict[str, LoRALinear]) -> None:
    """Raises ValueError for one that lacks a tensor of an adapter, or has a state that is not one
    number per entry, or per tensor."""
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for name, adapter in adapters.items():
        tensors = [getattr(adapter, tensor) for tensor in adapter.GROWS_ALONG]
        if not all(p in trained for p in tensors if p.requires_grad):
            raise ValueError(
                f"optimizer: it lacks tensors of {name}; make it after the adapters, and pass it "
                "to load_adapter_state_dict"
            )
        for p in tensors:
            for key, value in optimizer.state.get(p, {}).items():
                if torch.is_tensor(value) and value.shape not in (p.shape, ()):
                    raise ValueError(
                        f"optimizer {type(optimizer).__name__}: its state {key} is not one number "
                        "per entry; load it after the adapters, or use AdamW, Adam or SGD"
                    )


METHODS = {"lora": LoRALinear, "triadapt": TriAdaptLinear}


# A schedule tells how many matrices may grow at an allocation, before rounding down: k. The k-th
# largest score is the threshold then. Q: ranks of the budget that are left, which shrinks as ranks
# are given out. m: progress since the warm-up, from 0 to 1. The paper calls exponential non-linear.
SCHEDULES = {
    "linear": lambda Q, m, top_k: Q * m,
    "exponential": lambda Q, m, top_k: math.exp(m * math.log(Q)),
    "fixed": lambda Q, m, top_k: top_k,
}


class RankAllocator:
    """Grows the matrices whose score is at or above a dynamic threshold, until a budget is spent.

    The total rank never passes the budget, target_rank x matrices: the last growth is cut to what
    is left. It ends there if the allocations suffice, which `plan` tells beforehand. Override
    `scores` for another signal: README, "Fork it", has the contract.

    adapters: {module name: adapter}, as add_adapters returns them; ties go to the first in order.
    optimizer: what trains them; its state must be per entry, as that of Adam and SGD is.
    schedule: how many matrices may grow at an allocation: linear, exponential or fixed.
    target_rank: mean rank in the end, in ranks a matrix; the `rank` of add_adapters.
    total_steps: length of the training, in optimiser steps.
    warmup: optimiser steps before growth; the first allocation is at step warmup + interval.
    interval: optimiser steps from one allocation to the next.
    rank_step: ranks that a matrix grows by at an allocation.
    top_k: matrices that grow at an allocation; for the fixed schedule alone.
    count_numbers: the budget counts trained numbers, as many as LoRA has at the target rank,
        instead of ranks.

    Raises ValueError for a setting out of range, or if the budget could not even be reached by
    growth of all matrices at every allocation.
    """

    def __init__(
        self,
        adapters: dict[str, LoRALinear],
        optimizer: torch.optim.Optimizer,
        *,
        target_rank: int,
        total_steps: int,
        warmup: int,
        interval: int,
        schedule: str = "linear",
        rank_step: int = 1,
        top_k: int = 1,
        count_numbers: bool = False,
    ):
        self.adapters = adapters
        self.optimizer = optimizer
        self.schedule = schedule
        self.target_rank = target_rank
        self.total_steps = total_steps
        self.warmup = warmup
        self.interval = interval
        self.rank_step = rank_step
        self.top_k = top_k
        self.count_numbers = count_numbers
        if count_numbers:
            sizes = [a.in_features + a.out_features for a in adapters.values()]
            self.budget = target_rank * sum(sizes)
        else:
            self.budget = target_rank * len(adapters)
        self.prices: dict[tuple, int] = {}  # of numbers, for `price`
        self.check_settings()

        self.known_rank = self.total_rank
        self.baseline = self.importances()
        # Of the last allocation, for the log: the scores of all that could grow, the threshold.
        self.last_scores: dict[str, float] = {}
        self.threshold = math.nan

    def check_settings(self) -> None:
        for name in ("interval", "rank_step", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be 1 or more")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule}: must be one of {', '.join(SCHEDULES)}")
        if self.budget_left < 0:
            raise ValueError(f"target_rank {self.target_rank}: the adapters have more already")
        steps = self.total_steps - self.warmup
        if not 0 <= self.warmup < self.total_steps:
            raise ValueError(f"warmup {self.warmup}: must be from 0 to below {self.total_steps}")
        if self.interval > steps:
            raise ValueError(
                f"interval {self.interval}: must be {steps} or less, the steps after the warm-up"
            )
        most = steps // self.interval * len(self.adapters) * self.rank_step
        if most < self.ranks_left():
            raise ValueError(
                f"rank_step {self.rank_step}: {steps // self.interval} allocations can't add the "
                f"{self.ranks_left()} ranks of the budget; raise it, or lower interval or warmup"
            )
        check_optimizer(self.optimizer, self.adapters)

    def step(self, t: int) -> list[str]:
        """Call after optimiser step t = 1, 2, ..., total_steps. Returns the names of who grew.

        Growth puts new Parameters in the place of old ones. Lists of parameters that were made
        before (for gradient clipping, an EMA, DistributedDataParallel) are stale after it: take
        the parameters anew, from the model or from optimizer.param_groups.
        """
        check_optimizer(self.optimizer, self.adapters)
        if self.total_rank != self.known_rank:
            raise ValueError(
                f"total rank {self.total_rank}: it was {self.known_rank} when the allocator last "
                "looked; load the allocator's state_dict after the adapters"
            )
        if t == self.warmup:
            self.baseline = self.importances()  # what moved before does not count
        k = self.count(t, self.ranks_left())
        if k == 0:  # no step for an allocation, or the budget is spent: nobody grows
            return []

        # The threshold is the k-th largest score. Who is above it grows; of those who are at it,
        # as ties are, the first in module order (sorting keeps it), until k: the budget is exact.
        scores = self.scores()
        for name, score in scores.items():
            if math.isnan(score):
                raise ValueError(f"{name}: its score is {score}, which can't be compared")
        scores = {name: scores[name] for name in scores if self.affordable(name) > 0}
        ranking = sorted(scores, key=scores.get, reverse=True)
        k = min(k, len(ranking))
        threshold = scores[ranking[k - 1]]
        above = [name for name in ranking if scores[name] > threshold]
        ties = [name for name in ranking if scores[name] == threshold]
        chosen = above + ties[: k - len(above)]

        grown = []
        for name in chosen:
            n = self.affordable(name)
            if n > 0:  # always, if the budget counts ranks
                self.adapters[name].grow(n, self.optimizer)
                grown.append(name)
        self.known_rank = self.total_rank
        self.baseline = self.importances()  # at the new ranks: growth does not score itself
        self.last_scores = scores
        self.threshold = threshold
        return grown

    def count(self, t: int, Q: int) -> int:
        """k, how many matrices may grow at step t when Q ranks of the budget are left."""
        since = t - self.warmup
        if Q == 0 or since <= 0 or since % self.interval != 0:
            return 0
        m = since / (self.total_steps - self.warmup)
        k = SCHEDULES[self.schedule](Q, m, self.top_k)
        k = math.floor(k + 1e-9)  # 28.999999999999996 means 29
        k = max(k, 1)  # one may grow also where the formula is below 1
        return min(k, len(self.adapters), math.ceil(Q / self.rank_step))

    def importances(self) -> dict[str, float]:
        """F of each matrix."""
        values = torch.stack([adapter.importance() for adapter in self.adapters.values()])
        return dict(zip(self.adapters, values.tolist(), strict=True))

    def scores(self) -> dict[str, float]:
        """How much F rose since the last allocation, or else the end of the warm-up; often < 0."""
        return {name: F - self.baseline[name] for name, F in self.importances().items()}

    @property
    def total_rank(self) -> int:
        return sum(adapter.rank for adapter in self.adapters.values())

    @property
    def budget_left(self) -> int:
        """In ranks, or in numbers."""
        if not self.count_numbers:
            return self.budget - self.total_rank
        trained = [p for a in self.adapters.values() for p in a.parameters() if p.requires_grad]
        return self.budget - sum(p.numel() for p in trained)

    def price(self, name: str, n: int) -> int:
        """What n more ranks of a matrix take from the budget, in ranks or numbers."""
        if not self.count_numbers:
            return n
        key = (name, self.adapters[name].rank, n)
        if key not in self.prices:
            with torch.device("meta"):  # shapes alone: no random number is drawn
                entries = self.adapters[name].new_entries(n)
            adapter = self.adapters[name]
            trained = [entries[t] for t in entries if getattr(adapter, t).requires_grad]
            self.prices[key] = sum(tensor.numel() for tensor in trained)
        return self.prices[key]

    def affordable(self, name: str) -> int:
        """The ranks that a matrix may grow by: rank_step, or less where the rest pays for less."""
        n = self.rank_step
        while n > 0 and self.price(name, n) > self.budget_left:
            n -= 1
        return n

    def ranks_left(self) -> int:
        """Q: the ranks that the rest of the budget pays for, at the mean price of a rank."""
        prices = [self.price(name, 1) for name in self.adapters]
        if self.budget_left < min(prices):
            return 0
        return max(1, self.budget_left * len(prices) // sum(prices))

    def plan(self) -> list[tuple[int, int]]:
        """(step, total rank after it) of each allocation: scores decide who grows, not how many.

        An estimate if numbers are counted, as then the price of a rank depends on who grows.
        """
        plan = []
        total = self.total_rank
        end = total + self.ranks_left()
        for t in range(1, self.total_steps + 1):
            k = self.count(t, end - total)
            if k > 0:
                total = min(total + k * self.rank_step, end)
                plan.append((t, total))
        return plan

    def state_dict(self) -> dict:
        """What a resumed run needs. A signal that remembers more adds it, here and below."""
        return {"baseline": self.baseline}

    def load_state_dict(self, state: dict) -> None:
        self.baseline = state["baseline"]
        self.known_rank = self.total_rank


# What tells which matrices grow. A fork enters its own.
SIGNALS = {"importance": RankAllocator}


def add_adapters(
    model: nn.Module,
    targets: str | list[str],
    method: str = "triadapt",
    rank: int = 8,
    init_rank: int | None = None,
    alpha: float = 16,
    dropout: float = 0.0,
) -> dict[str, LoRALinear]:
    """Put an adapter around each targeted linear layer, freeze all else, return {name: adapter}.

    model: changed in place.
    targets: module names by their ends ("q", "attn.q"), or regular expressions for these ("q|v").
    method: a key of METHODS, "triadapt" or "lora".
    rank: the target rank, in ranks a matrix; it fixes the scale alpha / rank for good.
    init_rank: the rank at the start, in ranks a matrix; None means `rank`, for no growth.
    alpha: numerator of the scale, no unit.
    dropout: probability that an entry of an adapter's input is dropped in training.

    Raises ValueError for a setting out of range, a target that names no linear layer, or a model
    that has adapters already.
    """
    init_rank = rank if init_rank is None else init_rank
    if rank < 1:
        raise ValueError(f"rank {rank}: must be 1 or more")
    if not 1 <= init_rank <= rank:
        raise ValueError(f"init_rank {init_rank}: must be from 1 to the rank, {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: must be from 0 to below 1")
    if method not in METHODS:
        raise ValueError(f"method {method}: must be one of {', '.join(METHODS)}")
    if find_adapters(model):
        raise ValueError("the model has adapters already; merge_adapters makes them part of it")

    # By name, also where one layer has several names.
    linears = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if linear_shape(module) is not None and name != "":
            linears[name] = module
    chosen = chosen_names([*linears], [targets] if isinstance(targets, str) else targets)
    for name in chosen:
        if name.startswith(tuple(f"{other}." for other in chosen)):
            raise ValueError(f"targets: {name} is inside another target; name one of the two")

    model.requires_grad_(False)
    adapters = {}
    for name, linear in linears.items():
        if name in chosen and linear not in adapters:
            adapters[linear] = METHODS[method](linear, init_rank, alpha / rank, dropout)
            adapters[linear].train(linear.training)
    for name in chosen:
        model.set_submodule(name, adapters[linears[name]])
    return find_adapters(model)


def chosen_names(names: list[str], targets: list[str]) -> set[str]:
    """The names that end in one of the targets."""
    chosen = set()
    for target in targets:
        try:
            pattern = re.compile(rf"(.*\.)?({target})")
        except re.error as error:
            raise ValueError(f"targets {target}: not a regular expression ({error})") from error
        matches = [name for name in names if pattern.fullmatch(name)]
        if not matches:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ValueError(
                f"targets {target}: no linear layer is called that; there are: {known}"
            )
        chosen.update(matches)
    return chosen


def find_adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """{module name: adapter} in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merge_adapters(model: nn.Module) -> nn.Module:
    """Replace each adapter by a plain layer that computes the same, and return the model.

    Raises ValueError, and changes nothing, if a layer computes more than W x + b.
    """
    merged = {adapter: adapter.merge() for adapter in find_adapters(model).values()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in merged:
            model.set_submodule(name, merged[module])
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All that is trained: the adapters, and what else is unfrozen. Its shapes tell the ranks.

    What changes in training without a gradient is there, too, as the statistics of BatchNorm.
    """
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad or "lora_" in name:
            state[name] = p.detach()
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        counts = name.endswith("num_batches_tracked")
        if name in saved and (buffer.is_floating_point() or counts):
            state[name] = buffer
    return state


def load_adapter_state_dict(
    model: nn.Module, state: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Load what adapter_state_dict gave into a model with the same adapters.

    Adapters grow to the saved ranks first. An optimizer that exists must be given, as growth
    replaces parameters. Raises ValueError if a tensor does not fit; then no
    number is copied, though adapters may have grown.
    """
    own = adapter_state_dict(model)
    odd = own.keys() ^ state.keys()
    if odd:
        name = min(odd, key=str)
        where = "model" if name in own else "file"
        raise ValueError(f"{name}: only the {where} has it; use the base and targets of that run")
    for name, p in own.items():
        if not torch.is_tensor(state[name]) or state[name].dim() != p.dim():
            raise ValueError(f"{name}: the model needs a tensor of {p.dim()} axes")

    for module, adapter in find_adapters(model).items():
        tensor, axis = next(iter(adapter.GROWS_ALONG.items()))
        missing = state[f"{module}.{tensor}"].shape[axis] - adapter.rank
        if missing > 0:
            adapter.grow(missing, optimizer)

    own = adapter_state_dict(model)
    for name, p in own.items():
        saved = state[name].to(p.device)
        if saved.shape != p.shape or (p.isfinite() & ~saved.isfinite()).any():
            raise ValueError(
                f"{name}: the model needs finite numbers of shape {list(p.shape)}, "
                f"the file has shape {list(saved.shape)}"
            )
    for name, p in own.items():
        p.copy_(state[name])  # into the model, whose memory it shares


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | Path, base: str | None = None) -> None:
    """Write the adapters as plain LoRA, L + U folded into B, in the files that peft reads.

    model: with adapters that are not merged. What else is trained is saved module by module.
    folder: for adapter_config.json and adapter_model.safetensors; older ones are replaced.
    base: name or folder of the base model, for tools that load it.

    Raises ValueError for a model without adapters, or with what peft can't hold or tell apart.
    """
    try:
        from safetensors.torch import save  # of all this project it is needed here alone
    except ImportError as error:
        raise ValueError("export_lora needs a package: pip install safetensors") from error
    adapters = find_adapters(model)
    if not adapters:
        raise ValueError("the model has no adapters to export")

    tensors = {}
    for name, adapter in adapters.items():
        if type(adapter).forward is not LoRALinear.forward:
            raise ValueError(f"{name}: {type(adapter).__name__} is more than B A x, as LoRA is")
        if "weight" not in adapter.base._parameters:
            raise ValueError(f"{name}: its weight is computed, which peft can't merge with")
        if isinstance(adapter.base, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(f"{name}: nn.MultiheadAttention never calls it, as peft needs")
        left, right = adapter.factors()  # (d_out, r), (r, d_in)
        tensors[f"base_model.model.{name}.lora_A.weight"] = right.contiguous().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = left.contiguous().cpu()

    changed = {id(adapter.base.weight) for adapter in adapters.values()}  # when peft merges
    changed |= {id(p) for p in model.parameters() if p.requires_grad}
    every = [*model.named_parameters(remove_duplicate=False)]
    uses = Counter(id(p) for _, p in every)
    for name, p in every:
        if id(p) in changed and uses[id(p)] > 1:
            raise ValueError(f"{name}: another module shares it, which peft does not know")

    # What else is trained, with the module that it is in; peft knows this by the end of its name.
    all_names = [name for name, _ in model.named_modules()]
    others = [name for name in adapter_state_dict(model) if ".lora_" not in name]
    modules = sorted({name.rpartition(".")[0] for name in others})
    for module in modules:
        alike = [name for name in all_names if name.endswith(module) and name != module]
        nested = [n for n in adapters if n.startswith(f"{module}.") or module.startswith(f"{n}.")]
        if alike or nested:
            where = module or "the model itself"
            raise ValueError(f"{where}: is trained, too, and peft can't save it by itself")
        for name, tensor in model.get_submodule(module).state_dict().items():
            tensors[f"base_model.model.{module}.{name}"] = tensor.clone().contiguous().cpu()

    # Long names first: peft takes the first one that a module's name ends in.
    names = sorted(adapters, key=len, reverse=True)
    targets = names
    if any(
        name.endswith(tuple(f".{n}" for n in names)) and name not in names for name in all_names
    ):
        targets = "|".join(re.escape(name) for name in names)  # these are whole names
    rank = max(adapter.rank for adapter in adapters.values())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": targets,
        "r": rank,
        "lora_alpha": adapters[names[0]].scale * rank,
        "rank_pattern": {name: adapters[name].rank for name in names},
        # Their scale is alpha / r of each matrix: so it stays ours.
        "alpha_pattern": {name: adapters[name].scale * adapters[name].rank for name in names},
        "fan_in_fan_out": any(is_transposed(adapter.base) for adapter in adapters.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": modules or None,
    }
    files = {
        "adapter_model.safetensors": save(tensors),
        "adapter_config.json": json.dumps(config, indent=2).encode(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in files.items():
            (folder / f".{name}").write_bytes(content)
        for name in files:
            os.replace(folder / f".{name}", folder / name)
    finally:  # a full disk leaves the older files, and nothing else
        for name in files:
            (folder / f".{name}").unlink(missing_ok=True)


# Layers, as other people make them.


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a layer that computes W x + b: nn.Linear and its subclasses, packed ones as
    bitsandbytes', and the Conv1D of transformers' GPT-2, whose W is (d_in, d_out). Else None."""
    if is_transposed(layer):
        return layer.weight.shape[1], layer.weight.shape[0]
    sizes = hasattr(layer, "in_features") and hasattr(layer, "out_features")
    return (layer.out_features, layer.in_features) if sizes and [*layer.parameters()] else None


def is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")  # without transformers


def is_plain(layer: nn.Module) -> bool:
    """Whether it computes W x + b with the W that it holds, and nobody looks on: no forward of its
    own, no hook, no W that is computed or packed."""
    known = type(layer).forward is nn.Linear.forward or is_transposed(layer)
    own = type(layer._parameters.get("weight")) is nn.Parameter and "forward" not in vars(layer)
    forward_hooks = layer._forward_hooks or layer._forward_pre_hooks
    return known and own and not (forward_hooks or layer._backward_hooks)


@torch.no_grad()
def measured_linear(adapter: LoRALinear) -> nn.Linear:
    """A plain nn.Linear that computes what an adapter does in evaluation, found from its answers.

    Raises ValueError if there is none.
    """
    training = adapter.training
    adapter.eval()
    d_in, d_out = adapter.in_features, adapter.out_features
    like = next(adapter.parameters())  # of the type of its input: float32, or what the layer has
    for p in adapter.base.parameters():
        if p.is_floating_point():
            like = p
    b = adapter(like.new_zeros(1, d_in))  # (1, d_out)
    # Large inputs, as a small W would be lost in the rounding of W + b.
    W = (adapter(1024 * torch.eye(d_in).to(like)) - b).T / 1024  # (d_out, d_in)
    linear = nn.Linear(d_in, d_out, bool(b.any()), like.device, W.dtype).requires_grad_(False)
    linear.weight.copy_(W)
    if linear.bias is not None:
        linear.bias.copy_(b[0])

    # Small inputs and large ones: relu(W x + 20) is linear near 0.
    sizes = torch.tensor([[0.1], [1.0], [10.0], [100.0]])
    x = (sizes * torch.linspace(-9, 9, 4 * d_in).sin().view(4, d_in)).to(like)
    y = adapter(x)
    errors = (linear(x) - y).norm(dim=1)
    adapter.train(training)
    precise = all(p.dtype == torch.float32 for p in adapter.base.parameters())
    tolerance = 1e-3 if precise else 0.03  # 8 bits of an input may lose as much
    if not (errors <= tolerance * y.norm(dim=1)).all():
        kind = type(adapter.base).__name__
        raise ValueError(f"{kind}: it computes more than W x + b, so it can't be merged")
    return linear.train(training)


class AdaptedWeight(Tensor):
    """W to who asks for its type or shape, and W + delta_weight() to who computes with it: T5 asks
    in each forward pass, and a dense matrix would be made for nothing."""

    ASKED = {Tensor.dtype.__get__, Tensor.shape.__get__, Tensor.device.__get__}

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in cls.ASKED:
            return super().__torch_function__(function, types, args, kwargs)
        in_place = re.fullmatch(r"[a-z]\w*_", function.__name__)
        if in_place and isinstance(next(iter(args), None), cls):
            raise RuntimeError(f"{function.__name__}: would be lost; write to base.weight instead")

        def dense(value):
            if not isinstance(value, cls):
                return value
            W = value.adapter.base.weight
            delta = value.adapter.delta_weight()  # (d_out, d_in)
            if is_transposed(value.adapter.base):
                delta = delta.T
            return (W.float() + delta).to(W.dtype)

        return function(*tree_map(dense, args), **tree_map(dense, kwargs or {}))
