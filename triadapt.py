"""TriAdaptLoRA: triangular adaptive low-rank adaptation (arXiv 2501.08008), on any nn.Module that holds nn.Linear.

    y = W x + b + s B (L + U) A x       W (d_out, d_in) frozen   A (r, d_in)   B (d_out, r)   s = alpha / target rank

The core L + U is kept as two triangles, L packed row by row and U packed column by column, so that a rank more is a
plain append to four tensors and no trained number moves. From rank 3 to rank 4:

       A         L lower      U upper         B
    o o o o      o            o o o +      o o o +      o  trained, stays where it is
    o o o o      o o            o o +      o o o +      +  new: a random row of A, in L zeros and a closing 1,
    o o o o      o o o            o +      o o o +         zeros in U, a zero column of B
    + + + +      + + + +            +      o o o +
    L in memory: o | o o | o o o | + + + +       U in memory: o | o o | o o o | + + + +

Of each new path through B (L + U) A exactly one factor is zero, B's column: growth leaves the output as it was, yet the
gradient is not zero. A run starts the same way, from rank 0: B = 0 and L + U = 1, which is LoRA to the last bit.
"""

import contextlib
import copy
import math
import re
import torch
from torch import Tensor, nn


class InputError(ValueError):
    """What the user gave can't be used: one line that names it and the remedy."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def needing(message: str):
    """What fails inside, in whatever way, is the input's fault."""
    try:
        yield
    except Exception as error:
        raise (
            error if isinstance(error, InputError) else InputError(f"{message} ({error!r:.200})")
        ) from None


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus s B A x: LoRA (Hu et al. 2021), in float32 whatever the precision of the weight.
    A subclass lists its own tensors in GROWS_ALONG, makes their numbers in new_entries, and uses them in up."""

    GROWS_ALONG = {"lora_A": 0, "lora_B": 1}  # tensor: the axis that a new rank is appended to

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.scale, self.dropout, self.rank = (
            base.requires_grad_(False),
            scale,
            nn.Dropout(dropout),
            0,
        )
        self.bias = base.bias  # as `weight`, for code that reads it
        self.grow(rank)  # the first ranks come as all later ones do

    def new_entries(self, n: int) -> dict[str, Tensor]:
        """What n more ranks append to each tensor. As LoRA starts: A uniform within 1 / sqrt(d_in), B zero."""
        d_out, d_in = self.base.weight.shape
        return {
            "lora_A": torch.empty(n, d_in).uniform_(-1, 1) / d_in**0.5,
            "lora_B": torch.zeros(d_out, n),
        }

    @torch.no_grad()
    def grow(self, n: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Append n ranks. Every tensor becomes a new nn.Parameter that begins with the old one's numbers."""
        for name, entries in self.new_entries(n).items():
            axis, entries = self.GROWS_ALONG[name], entries.to(self.base.weight.device)
            old = getattr(
                self, name, nn.Parameter(entries.narrow(axis, 0, 0))
            )  # at first there is none: rank 0
            new = nn.Parameter(
                torch.cat((old, entries.to(old)), dim=axis), requires_grad=old.requires_grad
            )
            setattr(self, name, new)
            if optimizer is not None:
                carry_state(optimizer, old, new, axis)
        self.rank += n

    def up(self) -> Tensor:
        """B^T, the map from the rank to the output: (r, d_out), laid out row by row, as products with it are faster so."""
        return self.lora_B.t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        x, shape = x.reshape(-1, x.shape[-1]), x.shape[:-1]  # (n, d_in)
        y = self.base(x)  # (n, d_out)
        h = self.dropout(x) @ self.lora_A.t().to(x.dtype)  # (n, r)
        # In place, as y is ours alone: one more (n, d_out) tensor would cost more than the low-rank product.
        y.addmm_(h.to(y.dtype), self.up().to(y.dtype), alpha=self.scale)
        return y.view(*shape, y.shape[-1])

    def delta_weight(self) -> Tensor:
        """What the adapter adds to W, in float32: (d_out, d_in)."""
        return self.scale * self.up().t() @ self.lora_A

    @property
    def weight(self) -> Tensor:
        """W + delta_weight(), for code that reads the weight of a Linear and never calls it, as torch's attention."""
        return (self.base.weight.float() + self.delta_weight()).to(self.base.weight.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with W + delta_weight(), added in float32 and kept in the precision of W."""
        merged = copy.deepcopy(self.base)  # not the weight itself, which may be shared
        merged.weight.copy_(self.weight)
        return merged


class TriAdaptLinear(LoRALinear):
    """A frozen nn.Linear plus s B (L + U) A x. It trains r (d_in + d_out) + r (r + 1) numbers."""

    GROWS_ALONG = LoRALinear.GROWS_ALONG | {
        "lora_L": 0,
        "lora_U": 0,
    }  # packed, r (r + 1) / 2 numbers each

    def new_entries(self, n: int) -> dict[str, Tensor]:
        """As LoRA's, plus rows of L that end in a 1 and zero columns of U: the identity goes on."""
        row, column = torch.tril_indices(self.rank + n, self.rank + n)[
            :, self.rank * (self.rank + 1) // 2 :
        ]
        rows = (row == column).float()
        return super().new_entries(n) | {"lora_L": rows, "lora_U": torch.zeros_like(rows)}

    def core(self) -> Tensor:
        """L + U: (r, r). U column by column is packed as a transposed L; on the diagonal both count."""
        row, column = torch.tril_indices(self.rank, self.rank, device=self.lora_L.device)
        zero = self.lora_L.new_zeros(self.rank, self.rank)
        return zero.index_put((row, column), self.lora_L) + zero.index_put(
            (column, row), self.lora_U
        )

    def up(self) -> Tensor:
        """(B (L + U))^T: (r, d_out). The core meets B once a step, not every token: r r d_out products, not n r r."""
        return self.core().t() @ self.lora_B.t()

    @torch.no_grad()
    def importance(self) -> Tensor:
        """F = ||L + U||_F / r, the paper's metric: a number, no unit."""
        return self.core().norm() / self.rank


METHODS = {"lora": LoRALinear, "triadapt": TriAdaptLinear}


def add_adapters(
    model: nn.Module,
    targets: str | list[str],
    method: str = "triadapt",
    rank: int = 8,
    init_rank: int | None = None,
    alpha: float = 16,
    dropout: float = 0.0,
) -> dict[str, LoRALinear]:
    """Put an adapter around each targeted nn.Linear, freeze all else, and return {module name: adapter}.
    targets: suffixes of module names ("q", "attn.q"), or regular expressions for one ("q|v", r"blocks\\.[01]\\.fc").
    rank: the target rank, which fixes the scale alpha / rank. init_rank: where growth starts; None means `rank`.
    Raises InputError for a target that names no Linear, a number out of range, a model that has adapters."""
    init_rank = rank if init_rank is None else init_rank
    need(
        1 <= init_rank <= rank,
        f"rank {rank}, init-rank {init_rank}: must be 1 <= init-rank <= rank",
    )
    need(0 <= dropout < 1, f"dropout {dropout}: must be from 0 to below 1")
    need(
        not find_adapters(model),
        "the model has adapters already; merge_adapters makes them part of it",
    )
    linears = {
        name: m
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Linear) and name
    }
    known, chosen = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears)), set()
    for target in [targets] if isinstance(targets, str) else targets:
        with needing(f"targets {target}: not a regular expression"):
            matches = {name for name in linears if re.fullmatch(rf"(.*\.)?({target})", name)}
        need(
            matches, f"targets {target}: no nn.Linear is called that; there are: {known or 'none'}"
        )
        chosen |= matches
    model.requires_grad_(False)
    wrapped = {
        linear: METHODS[method](linear, init_rank, alpha / rank, dropout).train(linear.training)
        for name, linear in linears.items()
        if name in chosen
    }  # by Linear, as one may have several names
    for name in chosen:
        model.set_submodule(name, wrapped[linears[name]])
    return find_adapters(model)


def find_adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """{module name: adapter} in module order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def merge_adapters(model: nn.Module) -> nn.Module:
    """Replace each adapter by a plain nn.Linear that computes the same, and return the model."""
    merged = {adapter: adapter.merge() for adapter in find_adapters(model).values()}
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if module in merged:
            model.set_submodule(name, merged[module])
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All that is trained: adapters, and what else is unfrozen. In the model's memory; shapes are the rank pattern."""
    return {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad or "lora_" in name
    }


def load_adapter_state_dict(
    model: nn.Module, state: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None
):
    """Load what adapter_state_dict gave into a model with the same adapters, growing them to the saved ranks. An optimizer
    that exists must be given, as growth replaces parameters. Raises InputError, no number copied, if a tensor misfits."""
    odd = sorted(
        adapter_state_dict(model).keys() ^ {n for n, t in state.items() if torch.is_tensor(t)},
        key=str,
    )
    need(
        not odd,
        f"{odd[:1]}: not a tensor of both file and model; use the saved run's base, method and targets",
    )
    for name, adapter in find_adapters(model).items():
        adapter.grow(max(0, state[f"{name}.lora_A"].shape[:1].numel() - adapter.rank), optimizer)
    for name, p in adapter_state_dict(model).items():
        need(
            state[name].shape == p.shape and state[name].isfinite().all(),
            f"{name}: the model needs finite numbers "
            f"of shape {list(p.shape)}, the file has shape {list(state[name].shape)}",
        )
    for name, p in adapter_state_dict(model).items():
        p.copy_(state[name])


# How many matrices may grow, before rounding down. m: progress from 0 to 1; Q: the rest of the budget, in ranks.
SCHEDULES = {
    "linear": lambda m, Q, top_k: Q * m,
    "exponential": lambda m, Q, top_k: math.exp(m * math.log(Q)),  # the paper calls it non-linear
    "fixed": lambda m, Q, top_k: top_k,
}


class RankAllocator:
    """Every `interval` steps after `warmup`, grows the k matrices of highest score by rank_step, up to the budget.
    The total rank ends at exactly the budget, target_rank x matrices: the last growth is cut to what is left, ties go to
    the first in module order. Raises InputError for numbers that are out of range, or can't reach the budget."""

    def __init__(
        self,
        adapters: dict[str, LoRALinear],
        optimizer: torch.optim.Optimizer,
        *,
        schedule: str = "linear",
        target_rank: int,
        total_steps: int,
        warmup: int,
        interval: int,
        rank_step: int = 1,
        top_k: int = 1,
    ):
        self.adapters, self.optimizer, self.schedule, self.top_k = (
            adapters,
            optimizer,
            schedule,
            top_k,
        )
        self.total_steps, self.warmup, self.interval, self.rank_step = (
            total_steps,
            warmup,
            interval,
            rank_step,
        )
        self.budget = target_rank * len(adapters)
        need(
            min(interval, rank_step, top_k) >= 1 and 0 <= warmup < total_steps,
            f"interval {interval}, rank-step "
            f"{rank_step}, top-k {top_k}: must be 1 or more; warmup {warmup}: 0 to below the {total_steps} steps",
        )
        gap, times = self.budget - self.total_rank, (total_steps - warmup) // interval
        need(
            times * len(adapters) * rank_step >= gap,
            f"rank-step {rank_step}: {times} allocations can't add the "
            f"{gap} ranks of the budget; raise rank-step, or lower interval or warmup",
        )
        held = {p for group in optimizer.param_groups for p in group["params"]}
        need(
            all(p in held for a in adapters.values() for p in a.parameters() if p.requires_grad),
            "optimizer: it lacks parameters of the adapters; make it after add_adapters",
        )
        self.state, self.decided = (
            {"baseline": self.importances()},
            {},
        )  # what resuming needs; the last scores
        if (
            isinstance(optimizer, torch.optim.Adam)
            and pace_young not in optimizer._optimizer_step_post_hooks.values()
        ):
            optimizer.register_step_post_hook(pace_young)  # once, whatever the number of allocators

    @property
    def total_rank(self) -> int:
        return sum(adapter.rank for adapter in self.adapters.values())

    def importances(self) -> dict[str, float]:
        return dict(
            zip(
                self.adapters,
                torch.stack([a.importance() for a in self.adapters.values()]).tolist(),
            )
        )

    def scores(self) -> dict[str, float]:
        """Of each matrix that may grow: the change of F since the last allocation or warm-up. Override it for another."""
        return {
            name: now - self.state["baseline"][name] for name, now in self.importances().items()
        }

    def count(self, t: int, total: int) -> int:
        """k, how many matrices grow at step t when the total rank is `total`; 0 at steps without allocation."""
        rest = self.budget - total
        if rest == 0 or t <= self.warmup or (t - self.warmup) % self.interval:
            return 0
        progress = (t - self.warmup) / (self.total_steps - self.warmup)
        k = math.floor(
            SCHEDULES[self.schedule](progress, rest, self.top_k) + 1e-9
        )  # 28.999999999999996 means 29
        return min(max(k, 1), len(self.adapters), math.ceil(rest / self.rank_step))

    def step(self, t: int) -> list[str]:
        """Call after optimiser step t = 1, 2, ..., total_steps. Returns the names of the matrices that grew."""
        grown = []
        if k := self.count(t, self.total_rank):
            self.decided = self.scores()
            grown = sorted(self.decided, key=self.decided.get, reverse=True)[
                :k
            ]  # stable: ties stay in module order
        for name in grown:
            self.adapters[name].grow(
                min(self.rank_step, self.budget - self.total_rank), self.optimizer
            )
        if grown or t == self.warmup:
            self.state["baseline"] = self.importances()
        return grown


def carry_state(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, axis: int
) -> None:
    """Put `new` in the place of `old` in its group, with its moments; those of new entries are zero."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if state := optimizer.state.pop(old, None):
        length = new.shape[axis] - old.shape[axis]
        born = state.pop(
            "born", old.new_zeros(old.shape[axis])
        ).flatten()  # after which step an entry came
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == old.shape:
                state[key] = torch.cat(
                    (value, torch.zeros_like(new.data).narrow(axis, 0, length)), dim=axis
                )
        if isinstance(optimizer, torch.optim.Adam):
            born = torch.cat((born, state["step"].to(born).expand(length)))
            state["born"] = born.view([-1 if d == axis else 1 for d in range(new.dim())])
        optimizer.state[new] = state


@torch.no_grad()
def pace_young(optimizer: torch.optim.Adam, *_) -> None:
    """After a step of Adam or AdamW, take back what new entries moved too far.
    Adam corrects for its zero start by f(t), t the tensor's step count, but the moments of an entry of age k have seen
    k gradients only: f(t) moves it up to 6.6 times too fast with Adam's betas, 2.1 with train.py's; f(k) would not."""
    for group in optimizer.param_groups:
        b1, b2 = group["betas"]
        states = {
            p: state
            for p in group["params"]
            if p.grad is not None and "born" in (state := optimizer.state[p])
        }
        if states:  # all in one vector: a hundred short ones would cost more than the adapters do
            born = [state["born"].flatten() for state in states.values()]
            t = torch.cat(
                [state["step"].to(b).expand_as(b) for state, b in zip(states.values(), born)]
            )
            f, fresh = ((1 - b2**n).sqrt() / (1 - b1**n) for n in (t, t - torch.cat(born)))
            too_far = (group["lr"] * (f - fresh).clamp(min=0)).split([len(b) for b in born])
            for (p, state), rate in zip(states.items(), too_far):
                p.addcdiv_(
                    state["exp_avg"] * rate.view_as(state["born"]),
                    state["exp_avg_sq"].sqrt().add_(group["eps"]),
                )
