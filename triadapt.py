"""TriAdaptLoRA: triangular adaptive low-rank adaptation (arXiv 2501.08008), for any nn.Module.

    y = W x + b + s B (L + U) A x        W (d_out, d_in) is frozen, s = alpha / target rank

Growth from rank 3 to rank 4 appends to all four factors, and no trained entry moves:

    B (d_out, r)   L lower (r, r)   U upper (r, r)   A (r, d_in)

     o o o +          o              o o o +         o o o o o     o  trained, stays in place
     o o o +          o o              o o +         o o o o o     +  new: zeros in B, in L zeros
     o o o +          o o o              o +         o o o o o        and a closing 1, zeros in U,
     o o o +          + + + +              +         + + + + +        random entries in A

    L in memory, row by row:          o | o o | o o o | + + + +
    U in memory, column by column:    o | o o | o o o | + + + +

The update B (L + U) A does not change at growth, because the new columns of B and U are zero. B's
column gets a gradient at once, all other new entries one step later at the latest.

The order is the paper's: split, start, growth, importance, score, threshold, schedules.
"""

import copy
import math
import re
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn


def unpack_core(packed_L: Tensor, packed_U: Tensor, r: int) -> Tensor:
    """The triangular split L + U, (r, r). Both triangles hold a diagonal, so the sum can be any
    matrix, with two parameters for a diagonal entry.

    packed_L has the r (r + 1) / 2 entries of L row by row, packed_U those of U column by column.
    """
    row, column = torch.tril_indices(r, r, device=packed_L.device)
    L = packed_L.new_zeros(r, r).index_put((row, column), packed_L)
    U = packed_U.new_zeros(r, r).index_put((column, row), packed_U)
    return L + U


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus s B A x: LoRA (Hu et al. 2021), the baseline of the paper.

    rank: the rank at the start. target_rank: this matrix's share of the budget. It fixes the scale
    alpha / target_rank. The adapter is float32, whatever the base is. A subclass names its tensors
    in GROWS_ALONG, creates their entries in new_entries, and uses them in factors.
    """

    GROWS_ALONG = {"lora_B": 1, "lora_A": 0}  # the tensors that grow: the axis of the rank
    LR_RATIOS = {}  # learning rates relative to the common one: {"lora_B": 16.0} is LoRA+

    def __init__(self, base: nn.Linear, rank: int, target_rank: int, alpha=16.0, dropout=0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.target_rank = target_rank
        self.scale = alpha / target_rank
        self.dropout = nn.Dropout(dropout)
        self.train(base.training)
        self.start(rank)

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        B_core, A = self.factors()  # (d_out, r), (r, d_in); B_core is B (L + U), in LoRA just B
        Ax = self.dropout(x) @ A.T.to(x.dtype)  # (..., r)
        return self.base(x) + Ax @ (self.scale * B_core).T.to(x.dtype)  # W x + b + s B (L + U) A x

    def factors(self) -> tuple[Tensor, Tensor]:
        """Left (d_out, r) and right (r, d_in): the update of W is scale * left @ right."""
        return self.lora_B, self.lora_A

    def new_entries(self, n: int) -> dict[str, Tensor]:
        """What n more ranks append to each tensor, at the start (rank 0) and at growth."""
        d_out, d_in = self.base.out_features, self.base.in_features
        A = torch.empty(n, d_in).uniform_(-1, 1) / d_in**0.5
        return {"lora_B": torch.zeros(d_out, n), "lora_A": A}

    def start(self, rank: int, optimizer=None) -> None:
        """New tensors of this rank, by growth from rank 0. For __init__, and for loading."""
        self.rank = 0
        self.lengths = dict.fromkeys(self.GROWS_ALONG, 0)  # entries of each, to notice sharding
        for name, empty in self.new_entries(0).items():
            old = getattr(self, name, None)
            new = nn.Parameter(empty.to(self.base.weight.device, torch.float32))
            new.requires_grad_(old is None or old.requires_grad)
            if replace_parameter(optimizer, old, new):
                raise ValueError("load the adapters before the optimizer's state")
            setattr(self, name, new)
        self.grow(rank, optimizer)

    @torch.no_grad()
    def grow(self, n: int, optimizer=None) -> None:
        """Append n ranks. Each tensor becomes a new nn.Parameter that begins with the old entries,
        and the optimizer, which must be given if it trains them, continues with the new one."""
        for name, entries in self.new_entries(n).items():
            axis = self.GROWS_ALONG[name]
            old = getattr(self, name)
            if old.shape[axis] != self.lengths[name]:
                raise ValueError(
                    f"{name} has shape {tuple(old.shape)} instead of {self.lengths[name]} entries "
                    f"along axis {axis}: a sharded model (FSDP, tensor parallel) cannot grow"
                )
            entries = entries.to(old)
            new = nn.Parameter(torch.cat((old, entries), axis), requires_grad=old.requires_grad)
            if old.grad is not None:  # growth may come between two micro-batches
                new.grad = torch.cat((old.grad, torch.zeros_like(entries)), axis)
            carry_state(optimizer, old, new, entries, axis)
            setattr(self, name, new)
            self.lengths[name] = new.shape[axis]
        self.rank += n  # at the end, because new_entries reads the rank before growth

    @property
    def weight(self) -> Tensor:
        """W + s B (L + U) A, (d_out, d_in), for code that reads it, such as torch's attention."""
        left, right = self.factors()
        W = self.base.weight
        return (W + self.scale * left @ right).to(W.dtype)  # the sum is at least float32

    bias = property(lambda self: self.base.bias)  # for the same code

    def get_extra_state(self) -> Tensor:
        """What torch saves with the tensors. load_adapter_state_dict reads the rank."""
        return torch.tensor([self.scale, self.target_rank, self.rank], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = state[0].item()
        self.target_rank = int(state[1])


# The state of torch's optimizers that can grow. All other kinds are refused.
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg"}
MOMENTS = {"exp_avg", "momentum_buffer"} | SECOND_MOMENTS


def carry_state(optimizer, old: Tensor, new: Tensor, entries: Tensor, axis: int) -> None:
    """Let an optimizer train `new` instead of `old`, with the moments of the old entries.

    New first moments are zero, new second moments the mean of their tensor: a new entry with the
    gradients of its tensor begins with 0.1 of the learning rate. With zeros for both, it could move
    6.6 times the rate (beta2 .999).
    """
    state = replace_parameter(optimizer, old, new)
    for key in MOMENTS & state.keys():
        start = state[key].mean() if key in SECOND_MOMENTS else 0.0
        state[key] = torch.cat((state[key], torch.zeros_like(entries) + start), axis)
    if state:
        optimizer.state[new] = state


def replace_parameter(optimizer, old: Tensor, new: Tensor) -> dict:
    """Put `new` in the place of `old` in its parameter group. Returns the state of `old`."""
    if optimizer is None:
        return {}
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    return optimizer.state.pop(old, {})


def check_optimizer(optimizer, adapters: dict[str, LoRALinear]) -> None:
    """Raises ValueError if this optimizer cannot train these adapters while they grow."""
    kind = f"optimizer {type(optimizer).__name__}"
    inner = [v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer)]
    if any(one.state is not optimizer.state for one in inner):
        raise ValueError(f"{kind} wraps another one: give the allocator the inner optimizer")
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if key != "step" and (key not in MOMENTS or value.shape != p.shape):
                raise ValueError(f"{kind}: its {key!r} cannot grow, use AdamW or SGD")
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for name, adapter in adapters.items():
        for tensor in adapter.GROWS_ALONG:
            p = getattr(adapter, tensor)
            if p.dtype != torch.float32:
                raise ValueError(f"{name}.{tensor} is {p.dtype}: convert before add_adapters")
            if p.requires_grad and p not in trained:
                raise ValueError(f"{kind} lacks {name}.{tensor}: create it after the adapters")


class TriAdaptLinear(LoRALinear):
    """A frozen nn.Linear plus s B (L + U) A x: r (d_in + d_out) + r (r + 1) trained parameters.
    L and U are packed in lora_L and lora_U, so a new rank is appended to all four tensors."""

    GROWS_ALONG = {"lora_B": 1, "lora_L": 0, "lora_U": 0, "lora_A": 0}

    def core(self) -> Tensor:
        """L + U, (r, r)."""
        return unpack_core(self.lora_L, self.lora_U, self.rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (L + U), (d_out, r), and A, (r, d_in). B meets the core once, not for every token."""
        return self.lora_B @ self.core(), self.lora_A

    def new_entries(self, n: int) -> dict[str, Tensor]:
        """What n more ranks append: to B, A, and L + U, which starts as the identity."""
        sizes = range(self.rank + 1, self.rank + n + 1)  # of L's new rows, and of U's new columns
        rows = [torch.eye(size)[-1] for size in sizes]  # zeros and a closing 1
        new_L = torch.cat([torch.zeros(0), *rows])
        return super().new_entries(n) | {"lora_L": new_L, "lora_U": torch.zeros_like(new_L)}

    @torch.no_grad()
    def importance(self) -> Tensor:
        """F = ||L + U||_F / r, the normalized Frobenius norm. The identity has 1 / sqrt(r)."""
        return self.core().norm() / self.rank


@dataclass(eq=False)
class RankAllocator:
    """Grows the k matrices with the highest scores. The k-th is the paper's dynamic threshold.

    The budget is the sum of all target ranks. One matrix may exceed its share, the total cannot.
    Override `scores` for another signal. Raises ValueError if nothing can grow.
    """

    adapters: dict[str, LoRALinear]  # by module name, from add_adapters or find_adapters
    optimizer: torch.optim.Optimizer  # the one that trains them: AdamW, Adam or SGD
    _: KW_ONLY
    total_steps: int  # length of the training, in optimizer steps
    warmup: int  # optimizer steps before growth: the first allocation is at warmup + interval
    interval: int  # optimizer steps from one allocation to the next
    schedule: str = "linear"  # a key of SCHEDULES
    rank_step: int = 1  # ranks that a matrix grows by at an allocation
    top_k: int = 1  # matrices that grow at an allocation of the fixed schedule
    REMEMBERS = ("ranks", "baseline", "last_step")  # what a checkpoint keeps; a signal may add

    def __post_init__(self):
        self.last_step = 0
        self.threshold, self.last_scores = math.nan, {}  # of the last allocation
        self.take_baseline()
        if not self.plan():
            ranks = f"total rank {self.total_rank} of {self.budget}"
            when = f"warmup {self.warmup} + interval {self.interval} of {self.total_steps} steps"
            raise ValueError(f"nothing can grow with {ranks}, {when}: raise rank or total_steps")
        if not self.baseline and type(self).scores is RankAllocator.scores:
            raise ValueError("no importance in these adapters: use triadapt, or another allocator")
        check_optimizer(self.optimizer, self.adapters)

    @property
    def total_rank(self) -> int:
        return sum(adapter.rank for adapter in self.adapters.values())

    @property
    def budget(self) -> int:
        return sum(adapter.target_rank for adapter in self.adapters.values())

    def importances(self) -> dict[str, float]:
        """F of each matrix. Empty for adapters that have no importance, such as plain LoRA."""
        able = {name: a for name, a in self.adapters.items() if hasattr(a, "importance")}
        return {name: adapter.importance().item() for name, adapter in able.items()}

    def take_baseline(self) -> None:
        """Measure the importances that the next scores are changes of, and the ranks they have."""
        self.baseline = self.importances()
        self.ranks = {name: adapter.rank for name, adapter in self.adapters.items()}

    def scores(self) -> dict[str, float]:
        """The score of a matrix: the change of its F since the last allocation (or the warm-up)."""
        return {name: F - self.baseline[name] for name, F in self.importances().items()}

    def step(self, t: int) -> list[str]:
        """Call after each optimizer step, t = 1, 2, ..., total_steps. Returns the names that grew.

        Growth replaces Parameters. Their hooks are lost. Take lists of them (for clipping, an EMA)
        anew. Under DistributedDataParallel the replicas drift apart without extras/trainer.py.
        """
        if t != self.last_step + 1 or t > self.total_steps:
            raise ValueError(f"step {t}: expected {self.last_step + 1} of {self.total_steps}")
        self.last_step = t
        if t == self.warmup:
            self.take_baseline()  # changes during the warm-up do not count
        k = self.count(t, self.budget - self.total_rank)
        if k == 0:
            return []
        self.check()

        # A matrix that no gradient has reached has no update. It does not grow.
        trained = [name for name, adapter in self.adapters.items() if adapter.factors()[0].any()]
        if not trained:
            reasons = "is step called after optimizer.step, and does the loss use the adapters?"
            raise ValueError(f"no matrix has been trained: {reasons}")
        all_scores = self.scores()
        scores = {name: float(all_scores[name]) for name in trained}
        if any(math.isnan(score) for score in scores.values()):
            raise ValueError(f"a score is not a number: {scores}")

        # The matrices with the k highest scores grow, also if these are negative (F often falls).
        # Sorting is stable, so ties go to the first in module order.
        ranking = sorted(scores, key=scores.get, reverse=True)
        grown = ranking[:k]
        self.threshold = scores[grown[-1]]  # the k-th largest score
        self.last_scores = scores
        for name in grown:
            n = min(self.rank_step, self.budget - self.total_rank)
            self.adapters[name].grow(n, self.optimizer)
        self.take_baseline()  # growth itself changes F, which must not count
        return grown

    def count(self, t: int, Q: int) -> int:
        """k, the number of matrices that may grow at step t when Q ranks of the budget are left."""
        since = t - self.warmup
        if Q <= 0 or since <= 0 or since % self.interval != 0:
            return 0
        m = since / (self.total_steps - self.warmup)  # progress, from 0 to 1
        k = math.floor(SCHEDULES[self.schedule](Q, m, self.top_k) + 1e-9)  # 2.999... is 3
        return min(max(1, k), len(self.adapters), math.ceil(Q / self.rank_step))

    def plan(self) -> list[tuple[int, int]]:
        """(step, total rank after it) of each allocation, if all matrices are trained by then."""
        plan, total = [], self.total_rank
        for t in range(1, self.total_steps + 1):
            k = self.count(t, self.budget - total)
            if k > 0:
                total = min(total + k * self.rank_step, self.budget)
                plan.append((t, total))
        return plan

    def check(self) -> None:
        if {name: a.rank for name, a in self.adapters.items()} != self.ranks:
            raise ValueError("the ranks changed: load the adapters before the allocator's state")
        check_optimizer(self.optimizer, self.adapters)

    def state_dict(self) -> dict:
        return {name: copy.deepcopy(getattr(self, name)) for name in self.REMEMBERS}

    def load_state_dict(self, state: dict) -> None:
        """Load after the adapters. Raises ValueError if their ranks are not the saved ones."""
        for name in self.REMEMBERS:
            setattr(self, name, copy.deepcopy(state[name]))
        self.check()


# k before `count` rounds it down and clips it. Q: ranks of the budget that are left. m: progress
# since the warm-up, 0 to 1. "exponential" is the paper's non-linear schedule.
SCHEDULES = {
    "linear": lambda Q, m, top_k: Q * m,
    "exponential": lambda Q, m, top_k: math.exp(m * math.log(Q)),
    "fixed": lambda Q, m, top_k: top_k,
}

# What --method and --allocator of train.py know. A fork adds its own.
METHODS = {"lora": LoRALinear, "triadapt": TriAdaptLinear}
ALLOCATORS = {"importance": RankAllocator}


def add_adapters(
    model, target_modules, method="triadapt", rank=8, init_rank=None, alpha=16.0, dropout=0.0
) -> dict[str, LoRALinear]:
    """Put an adapter around each target module, in place, and freeze everything else of the model.

    target_modules: a list of module names by their ends (["q", "attn.v"]), or a regular expression
        for these ends ("q|v"). They must be nn.Linear, or a subclass of it.
    method: a key of METHODS.
    rank: the target rank of each matrix. It fixes the scale alpha / rank, and the budget.
    init_rank: the rank of each matrix at the start. None means `rank`: nothing can grow.

    Returns {module name: adapter} in module order. Raises ValueError for what does not fit.
    """
    init_rank = rank if init_rank is None else init_rank
    if not 1 <= init_rank <= rank:
        raise ValueError(f"init_rank {init_rank}: must be from 1 to the rank, {rank}")
    if find_adapters(model):
        raise ValueError("the model has adapters already: call merge_adapters first")

    modules = model.named_modules(remove_duplicate=False)  # a layer may have two names
    linears = {name: m for name, m in modules if isinstance(m, nn.Linear) and name}
    is_regex = isinstance(target_modules, str)
    patterns = [target_modules] if is_regex else map(re.escape, target_modules)
    targets = set()
    for pattern in patterns:
        matches = [name for name in linears if re.fullmatch(rf"(.*\.)?({pattern})", name)]
        if not matches:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise ValueError(f"target module {pattern}: not found; linear layers are {known}")
        targets.update(linears[name] for name in matches)

    adapter_class = METHODS[method]
    model.requires_grad_(False)
    adapters = {}
    for linear in linears.values():  # in module order, which breaks ties
        if linear in targets and linear not in adapters:
            adapters[linear] = adapter_class(linear, init_rank, rank, alpha, dropout)
    replace_modules(model, adapters)
    return find_adapters(model)


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, under each name that these have."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])


def find_adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """{module name: adapter} in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def is_plain(layer: nn.Module, kind=nn.Linear) -> bool:
    """Whether a layer has its own weight, and computes what its class does, without hooks."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    own_weight = type(layer._parameters.get("weight")) is nn.Parameter
    return own_weight and not hooks and type(layer).forward is kind.forward


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Replace each adapter by a plain copy of its layer with the weight W + s B (L + U) A. Returns
    the model. Raises ValueError, and changes nothing, if there are no adapters, or if one computes
    more than its equation, for example in a hook."""
    merged = {}
    for name, adapter in find_adapters(model).items():
        kind, base = type(adapter), adapter.base
        if adapter._forward_hooks or adapter._forward_pre_hooks or not is_plain(base):
            raise ValueError(f"{name}: cannot be merged, it is not W x + b alone: {base}")
        if kind.forward is not LoRALinear.forward and kind.weight is LoRALinear.weight:
            raise ValueError(f"{name}: {kind.__name__} overrides forward, but not weight")
        merged[adapter] = copy.deepcopy(base)
        merged[adapter].weight.copy_(adapter.weight)
    if not merged:
        raise ValueError("the model has no adapters to merge")
    replace_modules(model, merged)
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that training changes, {name: tensor}: adapters with their scales and ranks,
    other parameters that are not frozen now, and buffers, such as BatchNorm statistics."""
    state = model.state_dict()
    kept = [name for name, p in model.named_parameters() if p.requires_grad or "lora_" in name]
    kept += [name for name, _ in model.named_buffers() if name in state]
    kept += [f"{name}._extra_state" for name in find_adapters(model)]
    return {name: state[name].clone() for name in kept}


def load_adapter_state_dict(model: nn.Module, state: dict[str, Tensor], optimizer=None) -> None:
    """Load what adapter_state_dict returned into a model with the same target modules and method.

    Each adapter gets the saved rank, scale and target rank. A new rank means new Parameters: create
    the optimizer afterwards, or pass it. Load its state last. Raises ValueError if a name differs.
    """
    odd = adapter_state_dict(model).keys() ^ state.keys()
    if odd:
        raise ValueError(
            f"{min(odd)} is only in model or state: use the same base, targets, wrappers"
        )
    for name, adapter in find_adapters(model).items():
        rank = int(state[f"{name}._extra_state"][2])
        if rank != adapter.rank:
            adapter.start(rank, optimizer)
    model.load_state_dict(state, strict=False)
