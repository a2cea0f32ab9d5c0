"""Growth under Hugging Face's Trainer, with its gradient accumulation and mixed precision:

    adapters = add_adapters(model, ["q_proj", "v_proj"], rank=8, init_rank=4)
    growth = GrowthCallback(adapters, warmup=20, interval=5)
    transformers.Trainer(model, args, train_dataset=rows, callbacks=[growth]).train()

Start it with python, torchrun or accelerate launch. A checkpoint holds ranks and allocator, so
resume_from_checkpoint continues growth. load_best_model_at_end may go back to lower ranks.

In a loop of your own with torch's DistributedDataParallel (without ddp.join), call after_growth
after every growth, and after a state was loaded:

    ddp = DistributedDataParallel(model)
    share_scores(allocator)
    ...
    optimizer.step()
    if allocator.step(t):
        after_growth(ddp)

Growth replaces Parameters. The reducer of DistributedDataParallel sums only gradients of those
that it knows. So every growth is followed by a broadcast from the first process, because the new
entries are random, and by a new reducer.
"""

import gc
import io
from collections import Counter
from functools import partial

import torch
from accelerate.state import PartialState
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from extras.allocators import ALLOCATORS
from triadapt import LoRALinear, RankAllocator, check_optimizer, find_adapters


class GrowthCallback(TrainerCallback):
    """Grows the adapters after optimizer steps.

    allocator: NAME or NAME:ARGUMENT of ALLOCATORS, such as "worth:parameters". In several processes
        the scores of the first one decide, and `worth` sees only its batches.
    settings: of the allocator, such as warmup. total_steps is the Trainer's.

    Raises ValueError before training if the model, its optimizer or the way of sharing the work
    cannot grow, or if the settings are not those of the checkpoint.
    """

    def __init__(self, adapters: dict[str, LoRALinear], allocator="importance", **settings):
        name, _, argument = allocator.partition(":")
        self.settings = settings | {"argument": argument} if argument else settings
        self.make_allocator = ALLOCATORS[name]
        self.adapters = adapters
        self.key = f"growth of {min(adapters)} by {name}"  # must not be the name of a callback
        self.final_rank = None  # the total rank when the budget was spent
        self.optimizers = []  # the Trainer's, as soon as there is one
        for adapter in adapters.values():  # the hook lacks self, because models are copied
            adapter.register_load_state_dict_pre_hook(partial(take_saved_rank, self.optimizers))

    def on_init_end(self, args, state, control, optimizer, **kwargs):
        if optimizer is not None:  # it is yours
            check_optimizer(optimizer, self.adapters)
            self.optimizers[:] = [optimizer]

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        optimizer = optimizer.optimizer  # accelerate wraps all of them
        self.optimizers[:] = [optimizer]
        self.wrappers = find_wrappers(model)
        check_kind(args, self.wrappers)
        check_ties(model, self.adapters)
        check_optimizer(optimizer, self.adapters)
        for ddp in self.wrappers:
            after_growth(ddp)  # because loading a checkpoint may have made Parameters

        saved = state.stateful_callbacks.get(self.key)
        total_rank = sum(adapter.rank for adapter in self.adapters.values())
        if saved is None and state.global_step > 0:
            raise ValueError(f"the checkpoint was written without {self.key}: train anew")
        self.settings = self.settings | {"total_steps": state.max_steps}
        if saved and saved["allocator"] and saved["settings"] != self.settings:
            raise ValueError(f"resume with the settings of the checkpoint: {saved['settings']}")
        spent = saved["allocator"] is None if saved else total_rank == self.final_rank
        if spent:
            self.final_rank = total_rank
            self.allocator = None
            return
        self.final_rank = None
        self.allocator = self.make_allocator(self.adapters, optimizer, **self.settings)
        if saved:
            file = io.BytesIO(bytes.fromhex(saved["allocator"]))
            self.allocator.load_state_dict(torch.load(file, weights_only=True))
        if self.wrappers:
            share_scores(self.allocator)

    def on_optimizer_step(self, args, state, control, **kwargs):  # right after optimizer.step()
        saved = {"settings": self.settings, "allocator": None}
        if self.allocator is not None:
            if self.allocator.step(state.global_step + 1):
                for ddp in self.wrappers:
                    after_growth(ddp)
                if not self.allocator.plan():
                    self.final_rank = self.allocator.total_rank
            if self.allocator.total_rank != self.final_rank:
                file = io.BytesIO()  # because JSON cannot hold an allocator's tensors
                torch.save(self.allocator.state_dict(), file)
                saved["allocator"] = file.getvalue().hex()
        state.stateful_callbacks[self.key] = saved  # at every step, because any may be saved


def take_saved_rank(optimizers: list, adapter: LoRALinear, state: dict, prefix: str, *_) -> None:
    """A hook before load_state_dict: the adapter gets the saved rank, and an optimizer its new
    Parameters, without moments, which the optimizer's own state holds."""
    saved = state.get(f"{prefix}_extra_state")
    if saved is not None and int(saved[2]) != adapter.rank:
        for optimizer in optimizers:
            for p in adapter.parameters():
                optimizer.state.pop(p, None)
        adapter.start(int(saved[2]), *optimizers)


def after_growth(ddp: DistributedDataParallel) -> None:
    """Make the adapters those of the first process, and let ddp sum the gradients of the new
    Parameters. Call it in every process after a growth or a loaded state, before the next forward.

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
    """Each DistributedDataParallel of this model. The Trainer does not give it to callbacks."""
    gc.collect()  # else a dead one could be found in one process only
    found = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
    return [ddp for ddp in found if getattr(ddp, "module", None) is model]


def check_kind(args, wrappers: list[DistributedDataParallel]) -> None:
    """Raises ValueError unless there is one process, or whole replicas in several."""
    kind = "FSDP" if args.fsdp else PartialState().distributed_type.value
    if args.n_gpu > 1:
        kind = "DataParallel"
    if kind != "NO" and not (kind.startswith("MULTI_") and wrappers):
        remedy = "start one process or torchrun, shard nothing, and train() before evaluate()"
        raise ValueError(f"{kind} without DistributedDataParallel cannot grow: {remedy}")


def check_ties(model, adapters: dict[str, LoRALinear]) -> None:
    """Raises ValueError for an adapted lm_head that is tied, which the Trainer could not save."""
    uses = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    for name, adapter in adapters.items():
        if any(uses[p] > 1 for p in adapter.base.parameters()):
            raise ValueError(f"{name} is tied: call extras.layers.untie(model) before add_adapters")


def check_wrapper(ddp: DistributedDataParallel) -> None:
    """Raises ValueError if a new reducer would lose a setting of ddp."""
    settings = {
        "static_graph": ddp.static_graph,
        "a communication hook": ddp._get_ddp_logging_data().get("comm_hook"),
        "python_reducer": ddp._use_python_reducer,
        "delay_all_reduce_named_params": ddp._delay_all_reduce_params,
        "process_group": ddp.process_group is not dist.group.WORLD,
    }
    for name, value in settings.items():
        if value:
            raise ValueError(f"{name} of DistributedDataParallel: growth cannot keep it")
