"""AdaLoRA (Zhang et al. 2023) as peft has it, in train.py's own loop: a row of evidence.py.

It goes the other way round: every matrix starts with 1.5 times the target rank, and singular
values are masked to zero until the target is left. peft and the optimiser hold the masked ranks to
the end; all counts here leave them out.
"""

import importlib.util
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from model import GPT

AVAILABLE = importlib.util.find_spec("peft") is not None

ROW = "AdaLoRA (peft)"
ORTHOGONALITY = 0.5  # peft's default weight of the penalty


class AdaLoRA(train.Run):
    """A run of --method lora whose model gets peft's adapters instead."""

    def adapt(self, gpt: GPT) -> None:
        import peft  # slow to import

        args = self.args
        torch.manual_seed(args.seed)
        self.config = adalora_config(args)
        self.peft = peft.get_peft_model(gpt, self.config)  # in place: gpt itself gets the adapters
        gpt.classify(self.outputs)

        trained = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
        groups = [{"params": list(trained.values()), "lr_ratio": 1.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.optimizer.register_step_post_hook(self.prune)
        self.allocator = None  # peft has its own

        # What the log and the counts need to know: ranks that are not masked.
        self.layers = {n: layer for n, layer in gpt.named_modules() if hasattr(layer, "lora_E")}
        self.adapters = {}
        for name, layer in self.layers.items():
            per_rank = layer.in_features + layer.out_features + 1  # and the singular value
            self.adapters[name] = SimpleNamespace(rank=self.config.init_r, per_rank=per_rank)
        self.head = sum(p.numel() for name, p in trained.items() if "lora_" not in name)
        self.counts = [self.count()]  # of the trained numbers after each step

        # Each backward pass adds its part of the penalty's gradient.
        share = ORTHOGONALITY / (2 * len(self.layers)) / (args.accumulate * train.WORLD)
        for layer in self.layers.values():
            add_penalty(layer.lora_A["default"], share, transposed=False)
            add_penalty(layer.lora_B["default"], share, transposed=True)

        args.method = "adalora"
        args.peft = {"version": peft.__version__}
        for setting in (
            *("init_r", "target_r", "lora_alpha", "tinit", "tfinal", "deltaT"),
            *("beta1", "beta2", "orth_reg_weight"),
        ):
            args.peft[setting] = getattr(self.config, setting)

    def count(self) -> int:
        """The trained numbers of unmasked ranks."""
        return self.head + sum(a.rank * a.per_rank for a in self.adapters.values())

    def prune(self, *_) -> None:
        """After an optimiser step, while the gradients are still there: as peft asks for."""
        self.peft.base_model.update_and_allocate(len(self.counts))
        for name, kept in (self.config.rank_pattern or {}).items():
            self.adapters[name.removesuffix(".lora_E.default")].rank = sum(kept)
        self.counts.append(self.count())

    def note(self, kind: str, **values) -> None:
        super().note(kind, trainable=self.count(), **values)

    def train(self) -> None:
        """Then write adapter.pt again as peft saves it: without the masked ranks."""
        import peft

        super().train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of empty tensors, but rank 0 is no mistake
            state = peft.get_peft_model_state_dict(self.peft)
        if self.outputs:
            state["head"] = self.model.head.detach()
        train.save_file(self.out / "adapter.pt", state)


def add_penalty(p: Tensor, share: float, transposed: bool) -> None:
    """Whenever p gets a gradient, add `share` times that of the penalty to it."""

    def hook(gradient: Tensor) -> Tensor:
        rows = p.detach().T if transposed else p.detach()
        more = share * penalty_gradient(rows)
        return gradient + (more.T if transposed else more)

    p.register_hook(hook)


def penalty_gradient(rows: Tensor) -> Tensor:
    """Of ||P P^T - 1||_F, not squared, with a row of P per rank. peft adds the mean of this over
    all A and B to a loss."""
    gap = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    return 2 * gap @ rows / gap.norm()


def adalora_config(args):
    """peft divides lora_alpha by the initial rank for good, so that the scale is alpha / rank, as
    in all other rows. Pruning begins after a tenth of the steps, as in AdaLoRA's paper on MNLI,
    and ends at half of them."""
    import peft

    init_rank = args.rank * 3 // 2
    return peft.AdaLoraConfig(
        init_r=init_rank,
        target_r=args.rank,
        lora_alpha=args.alpha / args.rank * init_rank,
        total_step=args.steps,
        tinit=args.steps // 10,
        tfinal=args.steps - args.steps // 2,
        deltaT=1,
        orth_reg_weight=ORTHOGONALITY,
        target_modules=rf"(.*\.)?({args.targets})",
    )
