"""Tasks: rows of texts and an answer, which is a class, a score or a text to write.

python -m extras --data glue:CoLA     # a folder of GLUE: trains on train.tsv, tests on dev.tsv
python -m extras --data table:FILE    # a table with tabs, whose first line names the columns
python -m extras --data e2e:FILE      # E2E NLG: lines of meaning||text
python -m extras --data squad:FILE    # the JSON of SQuAD 1.1 or 2.0
python -m extras --data modules       # docstrings of the standard library, and their packages

Each row becomes an example. An end token closes each of its texts. The targets begin at the last of
these, where the model has read all:

    a class or a score    inputs     first text <end> second text <end>
                          targets                                 class

    a text to write       inputs     prompt <end>  the     answer
                          targets           the    answer  <end>
"""

import itertools
import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tokenizers import Tokenizer
from torch import Tensor, nn

from data import NO_TARGET, TASKS, Example, Task, end_token
from extras.rows import Row, e2e_rows, module_rows, squad_rows, table_rows

# The sources of each class are dealt out in this order, or if the task has its own test set in the
# second one.
TASK_SPLITS = ("train", "val", "test", "train", "train")
VAL_SPLITS = ("train",) * 9 + ("val",)


@dataclass
class RowTask(Task):
    """Rows of texts and an answer. Subclasses for the three kinds of answers override `targets`."""

    texts: list[str] = field(init=False)
    rows: list[Row]

    def __post_init__(self):
        texts = [text for row in self.rows for text in (*row.texts, str(row.answer))]
        self.texts = list(dict.fromkeys(texts))

    def examples(self, tokenizer: Tokenizer, context: int) -> dict[str, list[Example]]:
        """{"train", "val" and "test": examples of at most `context` tokens}."""
        has_test = any(row.is_test for row in self.rows)
        deals = defaultdict(lambda: itertools.cycle(VAL_SPLITS if has_test else TASK_SPLITS))
        split_of = {}  # of each source
        examples = {split: [] for split in TASK_SPLITS}
        too_long = 0
        for row in self.rows:
            label = row.answer if isinstance(self, ClassTask) else None
            if not row.is_test and row.source not in split_of:
                split_of[row.source] = next(deals[label])
            split = "test" if row.is_test else split_of[row.source]
            example, was_cut = self.example(row, tokenizer, context, split == "train")
            examples[split].append(example)
            too_long += was_cut
        if not all(examples.values()):
            raise ValueError(f"data {self.name}: give at least 3 rows with different texts")
        for split in examples.values():
            random.Random(0).shuffle(split)
        sizes = ", ".join(f"{split} {len(rows)}" for split, rows in examples.items())
        print(f"rows     {sizes}; {too_long} cut to {context} tokens")
        return examples

    def example(self, row: Row, tokenizer, context: int, training: bool) -> tuple[Example, bool]:
        """(inputs and targets of a row, whether it was cut)."""
        encodings = [tokenizer.encode(text, add_special_tokens=False) for text in row.texts]
        parts = [encoding.ids for encoding in encodings]
        answer = self.targets(row, tokenizer)
        size = sum(len(part) + 1 for part in parts)
        was_cut = size + len(answer) - 1 > context

        # A long answer gets half of the context, or what the texts leave if that is more.
        answer = answer[: max(1, context // 2, context - size + 1)]
        room = context - len(answer) + 1 - len(parts)  # tokens of the texts
        if room < 0:
            raise ValueError(f"--context {context}: too short for {len(parts)} texts and an answer")
        if was_cut and training and row.answer_start is not None:
            # Evaluation must not know where the answer is, so it keeps a passage's beginning.
            begin = encodings[0].char_to_token(row.answer_start) or 0
            parts[0] = parts[0][max(0, begin - room // 4) :]
        while sum(map(len, parts)) > room:
            max(parts, key=len).pop()  # the longest text loses its end first
        prompt = [token for part in parts for token in (*part, end_token(tokenizer))]
        inputs = torch.tensor(prompt + answer[:-1], dtype=torch.long)
        return (inputs, torch.tensor([NO_TARGET] * (len(prompt) - 1) + answer)), was_cut

    def targets(self, row: Row, tokenizer: Tokenizer) -> list:
        """The targets from the last end token of the texts on."""
        raise NotImplementedError


class WriteTask(RowTask):
    """Rows whose answer is a text to write."""

    def targets(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        return [*tokenizer.encode(row.answer, add_special_tokens=False).ids, end_token(tokenizer)]

    def collect(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether each answer is right, (batch,): all its tokens are the most likely ones."""
        return ((logits.argmax(-1) == targets) | (targets == NO_TARGET)).all(1)

    def metrics(self, loss: float, collected: list[Tensor]) -> dict[str, float]:
        """Perplexity, and the share of the answers that are right."""
        right = torch.cat(collected).double().mean().item()
        return super().metrics(loss, collected) | {"exact_match": right}

    def sample(self, write, tokenizer: Tokenizer, examples: list[Example]) -> str:
        """The first prompt, and what the model writes after it until its end token."""
        inputs, targets = examples[0]
        prompt = inputs[: (targets != NO_TARGET).int().argmax() + 1].tolist()
        end = end_token(tokenizer)
        written = itertools.takewhile(lambda token: token != end, write(prompt)[len(prompt) :])
        return f"{tokenizer.decode(prompt)} -> {tokenizer.decode([*written])}"


class HeadTask(RowTask):
    """Rows whose answer is predicted by a head. Subclasses have `outputs` and `predict`."""

    def add_head(self, model: nn.Module) -> None:
        """Put a head on the model that starts at zero, in place."""
        device = model.wte.weight.device
        model.head = nn.Linear(model.config.width, self.outputs, bias=False, device=device)
        nn.init.zeros_(model.head.weight)

    def collect(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Predictions and targets, (2, batch)."""
        return torch.stack((self.predict(logits), targets))[:, targets != NO_TARGET]

    def sample(self, write, tokenizer: Tokenizer, examples: list[Example]) -> None:
        """None, because this model writes no text."""


class ClassTask(HeadTask):
    """Rows whose answer is the name of a class."""

    def __post_init__(self):
        super().__post_init__()
        counts = Counter(row.answer for row in self.rows if not row.is_test)
        self.classes = sorted(counts)
        self.outputs = len(self.classes)
        for row in self.rows:
            if counts[row.answer] < 3 or self.outputs < 2:
                found = f"{self.outputs} labels, {row.answer!r} on {counts[row.answer]} rows"
                raise ValueError(
                    f"data {row.place}: {found} to train on; give 2 labels with 3 each"
                )
        print("classes  " + ", ".join(f"{name} {counts[name]}" for name in self.classes))

    def targets(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        return [self.classes.index(row.answer)]

    def predict(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def metrics(self, loss: float, collected: list[Tensor]) -> dict[str, float]:
        """Accuracy, the mean F1 of the classes, and Matthews' correlation."""
        predictions, labels = torch.cat(collected, dim=1).cpu().numpy()
        return {
            "accuracy": accuracy_score(labels, predictions),
            "f1": f1_score(labels, predictions, average="macro"),
            "matthews": matthews_corrcoef(labels, predictions),
        }


class ScoreTask(HeadTask):
    """Rows whose answer is a score, which is any number."""

    outputs = 1

    def targets(self, row: Row, tokenizer: Tokenizer) -> list[float]:
        return [row.answer]

    def predict(self, logits: Tensor) -> Tensor:
        return logits[..., 0]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The summed squared error."""
        predictions, scores = self.collect(logits, targets)
        return (predictions - scores).square().sum()

    def metrics(self, loss: float, collected: list[Tensor]) -> dict[str, float]:
        """The correlations of predictions and scores, or 0 if one of the two is constant."""
        pairs = torch.cat(collected, dim=1).cpu().double().numpy()
        if np.ptp(pairs, axis=1).min() == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        measures = {"pearson": pearsonr, "spearman": spearmanr}
        return {name: float(measure(*pairs).statistic) for name, measure in measures.items()}


def glue_task(folder: Path) -> RowTask:
    """A folder as GLUE is downloaded. dev.tsv is the test set, because test.tsv has no labels."""
    dev = folder / "dev_matched.tsv"  # MNLI has two
    return table_task(folder / "train.tsv", dev if dev.exists() else folder / "dev.tsv")


def table_task(path: Path, test_path: Path | None = None) -> RowTask:
    """A table, and perhaps a second one that is the test set. The answers decide on the kind."""
    columns, rows = table_rows(path)
    if test_path:
        test_columns, test_rows = table_rows(test_path)
        if test_columns != columns:
            raise ValueError(f"data {test_path}: has {test_columns}, and {path} has {columns}")
        rows += [replace(row, is_test=True) for row in test_rows]

    numbers = [to_number(row.answer) for row in rows]
    kind = WriteTask if columns[-1] == "answer" else ClassTask
    fractions = any(math.isfinite(number) and not number.is_integer() for number in numbers)
    if columns[-1] == "score" or (kind is ClassTask and fractions):
        kind = ScoreTask
    for row, number in zip(rows, numbers, strict=True):
        no_class = kind is ClassTask and (row.answer == "-" or number == -1)
        if row.answer == "" or no_class or (kind is ScoreTask and not math.isfinite(number)):
            found = f"{columns[-1]} {row.answer!r}, which means none"
            raise ValueError(f"data {row.place} has {found}; delete the row, or rename the label")
        if kind is ScoreTask:
            row.answer = number
        elif kind is ClassTask and math.isfinite(number):
            row.answer = row.answer.removesuffix(".0")  # pandas, if the column has gaps
    name = str(path.parent if test_path else path)
    print(f"data     {name}: {', '.join(columns[:-1])} -> {columns[-1]}")
    return kind(name, rows)


def to_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


TASKS |= {
    "glue": lambda folder: glue_task(Path(folder)),
    "table": lambda file: table_task(Path(file)),
    "e2e": lambda file: WriteTask(file, e2e_rows(Path(file))),
    "squad": lambda file: WriteTask(file, squad_rows(Path(file))),
    "modules": lambda argument: ClassTask("modules", module_rows()),
}
