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

import ast
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from tokenizers import Tokenizer
from torch import Tensor, nn

import data
from data import END_OF_TEXT, NO_TARGET, SPLITS, TASKS, Example, Task, end_token


@dataclass
class Row:
    """Texts and an answer."""

    texts: tuple[str, ...]
    answer: str  # the name of a class, a score, or a text to write
    source: object  # rows of one source stay in one split, except for a task's own test set
    place: str = ""  # file and line, for messages
    is_test: bool = False  # in the task's own test set


@dataclass
class RowTask(Task):
    """Rows of texts and an answer. Subclasses are the kinds of answers, and have `targets`."""

    texts: list[str] = field(init=False)
    rows: list[Row]

    def __post_init__(self):
        texts = [text for row in self.rows for text in (*row.texts, row.answer)]
        self.texts = list(dict.fromkeys(texts))

    def examples(self, tokenizer: Tokenizer, context: int) -> dict[str, list[Example]]:
        """{"train", "val" and "test": examples of at most `context` tokens}."""
        has_test = any(row.is_test for row in self.rows)
        splits = SPLITS[:-1] if has_test else SPLITS  # whose last one is "test"
        split_of = {}  # of each source
        examples = {split: [] for split in SPLITS}
        for row in random.Random(0).sample(self.rows, len(self.rows)):  # files are often sorted
            split = "test"
            if not row.is_test:
                split = split_of.setdefault(row.source, splits[len(split_of) % len(splits)])
            examples[split].append(self.example(row, tokenizer, context))
        if not all(examples.values()):
            raise ValueError(f"data {self.name}: give at least 10 rows with different texts")
        sizes = ", ".join(f"{split} {len(examples[split])}" for split in examples)
        full = sum(len(inputs) == context for split in examples.values() for inputs, _ in split)
        print(f"rows     {sizes}; {full} of them reach {context} tokens, where rows are cut")
        return examples

    def example(self, row: Row, tokenizer: Tokenizer, context: int) -> Example:
        """(inputs, targets) of a row. If it is too long, its longest parts lose their ends."""
        texts = [tokenizer.encode(text, add_special_tokens=False).ids for text in row.texts]
        answer = self.targets(row, tokenizer)
        parts = [*texts, answer]
        while sum(map(len, parts)) + len(texts) - 1 > context:
            max(parts, key=len).pop()
        prompt = [token for text in texts for token in (*text, end_token(tokenizer))]
        inputs = torch.tensor(prompt + answer[:-1], dtype=torch.long)
        return inputs, torch.tensor([NO_TARGET] * (len(prompt) - 1) + answer)


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
        """The texts of the first example, and what the model writes after them, a line each."""
        inputs, targets = examples[0]
        prompt = inputs[: (targets == NO_TARGET).sum() + 1].tolist()
        text = tokenizer.decode(write(prompt), skip_special_tokens=False)
        return "\n".join(text.split(END_OF_TEXT)[: len(self.rows[0].texts) + 1])


class HeadTask(RowTask):
    """Rows whose answer is predicted by a head: several `outputs` for a class, one for a score."""

    def add_head(self, model: nn.Module) -> None:
        """Put a head on the model that starts at zero, in place."""
        device = model.wte.weight.device
        model.head = nn.Linear(model.config.width, self.outputs, bias=False, device=device)
        nn.init.zeros_(model.head.weight)

    def collect(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Targets and predictions, (2, batch)."""
        predictions = logits.argmax(-1) if self.outputs > 1 else logits[..., 0]
        return torch.stack((targets, predictions))[:, targets != NO_TARGET]

    def sample(self, write, tokenizer: Tokenizer, examples: list[Example]) -> None:
        """None, because this model writes no text."""


class ClassTask(HeadTask):
    """Rows whose answer is the name of a class."""

    def __post_init__(self):
        super().__post_init__()
        counts = Counter(row.answer for row in self.rows if not row.is_test)
        self.classes = sorted(counts)
        self.outputs = len(self.classes)
        print("classes  " + ", ".join(f"{name} {counts[name]}" for name in self.classes))
        for row in self.rows:
            if counts[row.answer] < 3 or self.outputs < 2:
                found = f"{self.outputs} labels, {row.answer!r} on {counts[row.answer]} rows"
                raise ValueError(f"data {row.place}: {found}; give 2 labels with 3 rows each")

    def targets(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        return [self.classes.index(row.answer)]

    def metrics(self, loss: float, collected: list[Tensor]) -> dict[str, float]:
        """Accuracy, and Matthews' correlation."""
        labels, predictions = torch.cat(collected, dim=1).cpu().numpy()
        accuracy = accuracy_score(labels, predictions)
        return {"accuracy": accuracy, "matthews": matthews_corrcoef(labels, predictions)}


class ScoreTask(HeadTask):
    """Rows whose answer is a score, which is any number."""

    outputs = 1

    def targets(self, row: Row, tokenizer: Tokenizer) -> list[float]:
        return [float(row.answer)]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The summed squared error."""
        scores, predictions = self.collect(logits, targets)
        return (predictions - scores).square().sum()

    def metrics(self, loss: float, collected: list[Tensor]) -> dict[str, float]:
        """The correlations of scores and predictions, or 0 if one of the two is constant."""
        scores, predictions = torch.cat(collected, dim=1).cpu().double().numpy()
        if len({*scores}) == 1 or len({*predictions}) == 1:
            return {"pearson": 0.0, "spearman": 0.0}
        pearson = pearsonr(scores, predictions).statistic
        return {"pearson": pearson, "spearman": spearmanr(scores, predictions).statistic}


# Case, spaces and quotes around them do not count in the names of columns.
TEXT_COLUMNS = re.compile(
    r"(sentence|question|text)[12]?|premise|hypothesis|text_pair|prompt|context|#[12] string"
)
ANSWER_COLUMNS = ["label", "gold_label", "quality", "is_duplicate", "score", "answer"]
NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?")


def table_task(argument: str) -> RowTask:
    """The task of a table, or of a folder of GLUE. The answers decide on its kind."""
    path = Path(argument)
    columns, rows = table_rows(path / "train.tsv" if path.is_dir() else path)
    if path.is_dir():
        dev = min(path.glob("dev*.tsv"), default=path / "dev.tsv")  # test.tsv has no labels
        dev_columns, dev_rows = table_rows(dev, is_test=True)
        if dev_columns != columns:
            raise ValueError(f"data {dev}: has {dev_columns}, and train.tsv has {columns}")
        rows += dev_rows
    print(f"data     {path}: {', '.join(columns[:-1])} -> {columns[-1]}")

    numbers = [float(row.answer) for row in rows if NUMBER.fullmatch(row.answer)]
    if columns[-1] == "answer":
        kind = WriteTask
        odd = [row for row in rows if row.answer == ""]
    elif columns[-1] == "score" or any(number % 1 > 0 for number in numbers):
        kind = ScoreTask
        odd = [row for row in rows if not NUMBER.fullmatch(row.answer)]
    else:
        kind = ClassTask
        for row in rows:  # pandas writes 1.0 into a column with gaps
            row.answer = re.sub(r"^(-?\d+)\.0$", r"\1", row.answer)
        odd = [row for row in rows if row.answer.lower() in ("", "-", "-1", "nan", "na", "null")]
    for row in odd:
        raise ValueError(f"data {row.place} has {columns[-1]} {row.answer!r}: delete or rename it")
    return kind(argument, rows)


def table_rows(path: Path, is_test: bool = False) -> tuple[list[str], list[Row]]:
    """(the columns that are read, the rows). The last column is that of the answers."""
    lines = data.read_text(path).replace("\r\n", "\n").split("\n")
    columns = [cell.strip(' "').lower() for cell in lines[0].split("\t")]
    if len(columns) == 4 and columns[1] in ("0", "1") and columns[2] in ("", "*"):
        columns = ["source", "label", "mark", "sentence"]  # CoLA's files have no header
    elif len(columns) == 1 and "||" in lines[0]:
        columns = ["prompt", "answer"]  # E2E NLG has lines of meaning||text
        lines = [line.replace("||", "\t") for line in lines]
    else:
        lines[0] = ""
    reads = [i for i, column in enumerate(columns) if TEXT_COLUMNS.fullmatch(column)]
    answers = [i for i, column in enumerate(columns) if column in ANSWER_COLUMNS]
    if not reads or len(answers) != 1:
        raise ValueError(
            f"data {path}: its first line must name text columns (sentence, question, text, "
            f"premise, hypothesis, prompt, ...) and one of {', '.join(ANSWER_COLUMNS)}, with tabs "
            f"between them; it has: {', '.join(columns):.200}"
        )
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}: line {number}"
            cells = [unquote(cell) for cell in line.split("\t")]
            if len(cells) != len(columns):
                found = f"{len(cells)} cells for {len(columns)} columns"
                raise ValueError(f"data {place} has {found}; mend or delete it")
            texts = tuple(cells[i] for i in reads)
            rows.append(Row(texts, cells[answers[0]].strip(), texts, place, is_test))
    return [columns[i] for i in reads + answers], rows


def unquote(cell: str) -> str:
    """A cell without the quotes that pandas and Excel add, where they double those in the cell."""
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return quoted[1].replace('""', '"') if quoted else cell


def squad_task(file: str) -> WriteTask:
    """SQuAD 1.1 and 2.0: a passage and a question, and the first of the answers."""
    rows = []
    try:
        for article in json.loads(data.read_text(Path(file)))["data"]:
            for paragraph in article["paragraphs"]:
                passage = paragraph["context"]
                for question in paragraph["qas"]:
                    answers = [answer["text"] for answer in question["answers"]] or ["unanswerable"]
                    rows.append(Row((passage, question["question"]), answers[0], source=passage))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data {file}: not SQuAD's JSON, or cut short ({error!r})") from error
    return WriteTask(file, rows)


def module_task(argument: str) -> ClassTask:
    """The docstrings of the 8 packages in the standard library that hold the most of them."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    rows = {}  # by docstring, so that each comes once
    for path, text in data.code_files():
        if len(path.parts) > 1:  # in a package
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
                    rows[docstring] = Row((docstring,), path.parts[0], source=str(path))
    largest = dict(Counter(row.answer for row in rows.values()).most_common(8))
    return ClassTask("modules", [row for row in rows.values() if row.answer in largest])


TASKS |= {"glue": table_task, "table": table_task, "e2e": table_task}
TASKS |= {"squad": squad_task, "modules": module_task}
