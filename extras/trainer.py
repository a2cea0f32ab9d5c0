"""Growth under Hugging Face's Trainer, with its gradient accumulation and mixed precision:

    adapters = add_adapters(model, ["q_proj", "v_proj"], rank=8, init_rank=4)
    growth = GrowthCallback(adapters, warmup=20, interval=5)
    transformers.Trainer(model, args, train_dataset=rows, callbacks=[growth]).train()

Start it with python, or with torchrun or accelerate launch for several processes. A checkpoint
holds the ranks and the allocator's state: resume_from_checkpoint continues growth, and
load_best_model_at_end may go back to lower ranks.

In a loop of your own with torch's DistributedDataParallel, call after_growth:

    ddp = DistributedDataParallel(model)
    share_scores(allocator)
    ...
    optimizer.step()
    if allocator.step(t):
        after_growth(ddp)

Growth replaces Parameters. DistributedDataParallel has a reducer, which sums the gradients of the
Parameters that it knows. So every growth is followed by a broadcast from the first process, which
makes the random new entries equal, and by a new reducer.
"""

import base64
import gc
import io

import torch
from accelerate.state import PartialState
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from triadapt import (
    LoRALinear,
    RankAllocator,
    check_optimizer,
    find_adapters,
    replace_parameter,
)

KEY = "growth"  # in trainer_state.json; a key that is no callback's class name is left alone


class GrowthCallback(TrainerCallback):
    """Grows the adapters after optimizer steps.

    allocator: RankAllocator, or another class, such as Worth of extras/allocators.py. In several
        processes, the scores of the first one decide. Worth and Sensitivity see only its batches.
    settings: of the allocator. total_steps is the Trainer's. The allocator is made when training
        begins, because the optimizer is.

    Raises ValueError before training if it is neither one process nor DistributedDataParallel.
    """

    def __init__(self, adapters: dict[str, LoRALinear], allocator=RankAllocator, **settings):
        self.adapters = adapters
        self.allocator_class = allocator
        self.settings = settings
        self.named_settings = settings | {"allocator": allocator.__name__}
        self.ended = False  # the budget is spent, so no allocator is needed
        self.remember_trained()
        for adapter in adapters.values():
            adapter.register_load_state_dict_pre_hook(take_saved_rank)

    def on_init_end(self, args, state, control, **kwargs):
        check_kind(args)  # before a model is sharded; a callback that is added later misses it

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        check_kind(args)
        self.wrappers = find_wrappers(model)
        if args.world_size > 1 and not self.wrappers:
            raise ValueError(
                f"{args.world_size} processes without DistributedDataParallel: the Trainer leaves "
                "it out for a model that is sharded while it loads, which cannot grow, and after "
                "evaluate() before train(): use the argument eval_on_start instead"
            )
        check_sharding(optimizer)
        self.follow_loaded(optimizer)
        check_optimizer(optimizer, self.adapters)
        for ddp in self.wrappers:
            after_growth(ddp)

        saved = state.stateful_callbacks.get(KEY)
        if state.global_step > 0:
            if saved is None:
                raise ValueError("the checkpoint was written without GrowthCallback: train anew")
            self.ended = saved["ended"]
        if self.ended:
            return
        self.allocator = self.allocator_class(
            self.adapters, optimizer, total_steps=state.max_steps, **self.settings
        )
        if saved:
            if saved["settings"] != self.named_settings:
                raise ValueError(f"resume with the settings of the checkpoint: {saved['settings']}")
            self.allocator.load_state_dict(decode(saved["allocator"]))
        if self.wrappers:
            share_scores(self.allocator)

    def on_optimizer_step(self, args, state, control, **kwargs):  # right after optimizer.step()
        if not self.ended:
            if self.allocator.step(state.global_step + 1):
                for ddp in self.wrappers:
                    after_growth(ddp)
                self.remember_trained()
            self.ended = self.allocator.total_rank >= self.allocator.budget
        state.stateful_callbacks[KEY] = {  # for every step, because any may be saved
            "ended": self.ended,
            "settings": self.named_settings,
            "allocator": None if self.ended else encode(self.allocator.state_dict()),
        }

    def remember_trained(self) -> None:
        self.trained = {  # {(name, tensor): Parameter} of the optimizer
            (name, tensor): getattr(adapter, tensor)
            for name, adapter in self.adapters.items()
            for tensor in adapter.GROWS_ALONG
        }

    def follow_loaded(self, optimizer) -> None:
        """Let the optimizer train the Parameters that were made since the last step.

        Loading a checkpoint of other ranks makes them. An optimizer that was made before (by you,
        or by an earlier train()) has the old ones.
        """
        for (name, tensor), old in self.trained.items():
            new = getattr(self.adapters[name], tensor)
            if new is not old:
                self.ended = False
                state = replace_parameter(optimizer, old, new)
                shapes = {value.shape for key, value in state.items() if key != "step"}
                if shapes == {new.shape}:  # else it belongs to the old ranks
                    optimizer.state[new] = state
        self.remember_trained()


def take_saved_rank(adapter: LoRALinear, state: dict, prefix: str, *_) -> None:
    """A hook before load_state_dict: the adapter gets the saved rank."""
    saved = state.get(f"{prefix}_extra_state")
    if saved is not None and int(saved[2]) != adapter.rank:
        adapter.start(int(saved[2]))


def encode(state: dict) -> str:
    """For JSON. An allocator's state may hold tensors."""
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(file.getvalue()).decode()


def decode(text: str) -> dict:
    """The state that was encoded."""
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)


def after_growth(ddp: DistributedDataParallel) -> None:
    """Make the adapters those of the first process, and let ddp sum the gradients of the new
    Parameters. Call it in every process after a growth, before the next forward pass.

    Raises ValueError in every process if they grew different matrices.
    """
    check_wrapper(ddp)
    adapters = find_adapters(ddp.module)
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, ranks)
    if any(others != ranks for others in of_all):
        raise ValueError("the processes grew different matrices: call share_scores(allocator)")
    for adapter in adapters.values():
        for tensor in adapter.GROWS_ALONG:  # also frozen ones, because A grows at random
            dist.broadcast(getattr(adapter, tensor).detach(), src=0)
    ddp.__setstate__(ddp.__getstate__())  # makes a new reducer, like unpickling


def share_scores(allocator: RankAllocator) -> None:
    """Let the scores of the first process decide in all processes. Otherwise different roundings
    on two kinds of GPU could grow different matrices."""
    own = allocator.scores

    def scores() -> dict[str, float]:
        shared = [own()]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    allocator.scores = scores


def find_wrappers(model) -> list[DistributedDataParallel]:
    """The DistributedDataParallel of this model, which the Trainer does not give to callbacks.
    There are more if earlier Trainers of the same model still have theirs."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
    return [ddp for ddp in found if getattr(ddp, "module", None) is model]


def check_kind(args) -> None:
    """Raises ValueError if accelerate shares the work in another way than whole replicas."""
    kind = "FSDP" if args.fsdp else PartialState().distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"{kind}: growth needs whole tensors in each process, use one process or torchrun "
            "with DistributedDataParallel"
        )
    if args.n_gpu > 1:
        raise ValueError(f"DataParallel on {args.n_gpu} GPUs: start the script with torchrun")


def check_sharding(optimizer) -> None:
    """Raises ValueError for torch's ZeroRedundancyOptimizer and others that hide an optimizer."""
    outer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps all of them
    if isinstance(getattr(outer, "optim", None), torch.optim.Optimizer):
        hidden, kind = type(outer.optim).__name__, type(outer).__name__
        raise ValueError(f"optimizer {kind} hides {hidden}, which would keep the old tensors")


def check_wrapper(ddp: DistributedDataParallel) -> None:
    """Raises ValueError if a new reducer would lose a setting of ddp."""
    if ddp.static_graph:
        raise ValueError("static_graph of DistributedDataParallel: growth changes the graph")
    if ddp._get_ddp_logging_data().get("comm_hook"):
        raise ValueError("a communication hook of DistributedDataParallel: growth would drop it")
    if ddp.process_group is not dist.group.WORLD:
        raise ValueError("DistributedDataParallel with its own process_group: use the default one")
