"""AdaLoRA (Zhang et al. 2023) as peft has it, trained by train.py's own loop: a row of compare.py.

It goes the other way round: every matrix starts with 1.5 times the target rank, and singular values are masked to zero
until the target is left. peft and the optimiser hold the masked ranks to the end; all counts here leave them out.
"""

import types
import warnings

import torch
from torch import Tensor

import data
import train

try:
    import peft
except ImportError:
    peft = None

ROW = "AdaLoRA (peft)"
RATES = {
    "prose": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
    "prose, 20 000 tokens": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
    "modules": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
}
ORTHOGONALITY = 0.5  # peft's default weight of the penalty


def penalty_gradient(p: Tensor, other_axis: int) -> Tensor:
    """Of ||P P^T - 1||_F, not squared, with one row of P per rank: what peft adds to a loss, mean over all A and B."""
    rows = p.detach() if other_axis == 1 else p.detach().t()
    gap = rows @ rows.t() - torch.eye(len(rows), device=p.device)
    gradient = 2 * gap @ rows / gap.norm()
    return gradient if other_axis == 1 else gradient.t()


class AdaLoRA(train.Run):
    """A run of --method full whose model has got peft's adapters instead."""

    def __init__(self, args):
        super().__init__(args)
        # peft divides lora_alpha by the initial rank for good: so the scale is alpha / rank, as in all other rows.
        # Pruning begins after a tenth of the steps, as in AdaLoRA's paper on MNLI, and ends at half of them.
        init_rank, steps = args.rank * 3 // 2, args.steps
        self.config = peft.AdaLoraConfig(
            init_r=init_rank,
            target_r=args.rank,
            lora_alpha=args.alpha / args.rank * init_rank,
            total_step=steps,
            tinit=steps // 10,
            tfinal=steps - steps // 2,
            deltaT=1,
            orth_reg_weight=ORTHOGONALITY,
            target_modules=rf"(.*\.)?({args.targets})",
        )
        torch.manual_seed(args.seed)
        self.peft = peft.get_peft_model(
            self.model, self.config
        )  # in place: self.model is still the GPT
        if self.classes:
            self.model.head.requires_grad_(True)  # peft has frozen it
        matrices = {
            name: module for name, module in self.model.named_modules() if hasattr(module, "lora_E")
        }
        for module in matrices.values():
            for axis, p in ((1, module.lora_A["default"]), (0, module.lora_B["default"])):
                share = ORTHOGONALITY / (2 * len(matrices)) / args.accumulate
                p.register_hook(
                    lambda grad, p=p, axis=axis: grad + share * penalty_gradient(p, axis)
                )
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer.param_groups[0]["params"] = [*trained.values()]  # it has not stepped yet
        self.optimizer.register_step_post_hook(self.prune)
        self.head = sum(p.numel() for name, p in trained.items() if "lora_" not in name)
        self.adapters = {
            name: types.SimpleNamespace(rank=init_rank, per_rank=m.in_features + m.out_features + 1)
            for name, m in matrices.items()
        }
        self.counts = [self.count()]  # after each step
        settings = (
            "init_r",
            "target_r",
            "lora_alpha",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
        )
        args.peft = {key: getattr(self.config, key) for key in settings} | {
            "version": peft.__version__
        }
        args.method = "adalora"

    def count(self) -> int:
        """The trained numbers of unmasked ranks."""
        return self.head + sum(
            adapter.rank * adapter.per_rank for adapter in self.adapters.values()
        )

    def prune(self, *_) -> None:
        """After an optimiser step, while the gradients are still there: as peft asks for."""
        self.peft.base_model.update_and_allocate(len(self.counts))
        for name, kept in (self.config.rank_pattern or {}).items():
            self.adapters[name.removesuffix(".lora_E.default")].rank = sum(kept)
        self.counts.append(self.count())

    def sizes(self) -> dict[int, int]:
        return dict(enumerate(self.counts))

    def note(self, kind: str, **values) -> None:
        super().note(kind, trainable=self.count(), **values)

    def train(self) -> None:
        """Then write adapter.pt again as peft saves it: without the masked ranks."""
        super().train()
        head = {"head": self.model.head.detach()} if self.classes else {}
        with warnings.catch_warnings(
            action="ignore"
        ):  # peft warns of empty tensors, but rank 0 is no mistake here
            data.save(self.out / "adapter.pt", peft.get_peft_model_state_dict(self.peft) | head)
