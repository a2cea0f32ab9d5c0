"""Growth under Hugging Face's Trainer, with its gradient accumulation and mixed precision:

    adapters = add_adapters(model, ["q_proj", "v_proj"], rank=8, init_rank=4)
    growth = GrowthCallback(adapters, warmup=20, interval=5)
    transformers.Trainer(model, args, train_dataset=rows, callbacks=[growth]).train()

One process only, because growth replaces Parameters and DistributedDataParallel keeps the old ones.
"""

from transformers import TrainerCallback

from triadapt import RankAllocator


class GrowthCallback(TrainerCallback):
    """Grows the adapters after optimizer steps.

    settings: of RankAllocator. total_steps is the Trainer's. The allocator is made when training
    begins, because the optimizer is.
    """

    def __init__(self, adapters: dict, **settings):
        self.adapters = adapters
        self.settings = settings

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        if args.world_size > 1:
            raise ValueError(f"{args.world_size} processes: growth works in one process only")
        self.allocator = RankAllocator(
            self.adapters, optimizer, total_steps=state.max_steps, **self.settings
        )

    def on_optimizer_step(self, args, state, control, **kwargs):  # right after optimizer.step()
        self.allocator.step(state.global_step + 1)
