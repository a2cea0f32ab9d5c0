"""Tasks: rows of texts and an answer, which is a class, a score or a text to write.

python -m extras --data glue:CoLA     # a folder of GLUE: trains on train.tsv, tests on dev.tsv
python -m extras --data table:FILE    # a table with tabs, whose first line names the columns
python -m extras --data e2e:FILE      # E2E NLG: lines of meaning||text
python -m extras --data squad:FILE    # the JSON of SQuAD 1.1 or 2.0
python -m extras --data modules       # docstrings of the standard library, and their packages

The way of a task: a file, its rows, the rows in three splits, an example for each row. An end token
closes each text of a row. The targets begin at the last of these, where the model has read all:

    a class or a score    inputs     first text <end> second text <end>
                          targets                                 class

    a text to write       inputs     prompt <end>  the     answer
                          targets           the    answer  <end>
"""

import ast
import csv
import io
import itertools
import json
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import Tokenizer
from torch import Tensor, nn

from data import NO_TARGET, TASKS, Example, Task, code_files, end_token, read_text

# In each class, the source with the i-th most rows belongs to TASK_SPLITS[i % 5]. If a task has its
# own test set, the other sources belong to VAL_SPLITS[i % 10].
TASK_SPLITS = ("train", "val", "test", "train", "train")
VAL_SPLITS = ("train",) * 9 + ("val",)


@dataclass
class Row:
    """Texts and an answer."""

    texts: tuple[str, ...]
    answer: str | float  # the name of a class, a score, or a text to write
    source: object  # rows of one source stay in one split, except for a task's own test set
    place: str = field(default="", repr=False)  # file and line, for messages
    is_test: bool = False  # in the task's own test set
    answer_start: int | None = None  # where the answer begins in texts[0], if it does


@dataclass
class RowTask(Task):
    """Rows of texts and an answer. The subclasses are the three kinds of answers."""

    texts: list[str] = field(init=False)
    rows: list[Row]
    reads: str  # the columns, for the report

    def __post_init__(self):
        if len(self.rows) < 3:
            raise ValueError(f"data {self.name}: {len(self.rows)} rows are too few; give 3 or more")
        texts = [text for row in self.rows for text in (*row.texts, str(row.answer))]
        self.texts = list(dict.fromkeys(texts))
        print(f"data     {self.name}: {self.reads}")

    def examples(self, tokenizer: Tokenizer, context: int) -> dict[str, list[Example]]:
        """{"train", "val" and "test": examples of at most `context` tokens}. Prints their counts.

        Raises ValueError for a split without rows.
        """
        examples = {split: [] for split in TASK_SPLITS}
        too_long = 0
        for split, row in self.split_rows():
            example, was_cut = self.example(row, tokenizer, context, split == "train")
            examples[split].append(example)
            too_long += was_cut
        if not all(examples.values()):
            sources = len({row.source for row in self.rows})
            counts = f"{len(self.rows)} rows with {sources} different texts"
            raise ValueError(f"data {self.name}: {counts} are too few; give at least 3 of each")
        for split in examples.values():
            random.Random(0).shuffle(split)
        sizes = ", ".join(f"{split} {len(rows)}" for split, rows in examples.items())
        print(f"rows     {sizes}; {too_long} cut to {context} tokens")
        return examples

    def split_rows(self) -> list[tuple[str, Row]]:
        """(split, row) of each row. The sources of each class are dealt out, the largest first."""
        sources = defaultdict(list)
        for row in self.rows:
            sources[row.is_test, row.source].append(row)
        has_test = any(row.is_test for row in self.rows)
        splits = defaultdict(lambda: itertools.cycle(VAL_SPLITS if has_test else TASK_SPLITS))
        split_of = {}
        for key, rows in sorted(sources.items(), key=lambda item: -len(item[1])):
            label = rows[0].answer if isinstance(self, ClassTask) else None
            split_of[key] = "test" if rows[0].is_test else next(splits[label])
        return [(split_of[row.is_test, row.source], row) for row in self.rows]

    def example(
        self, row: Row, tokenizer: Tokenizer, context: int, training: bool
    ) -> tuple[Example, bool]:
        """(inputs and targets of a row, whether it was cut)."""
        encodings = [tokenizer.encode(text, add_special_tokens=False) for text in row.texts]
        parts = [encoding.ids for encoding in encodings]
        answer = self.answer_targets(row, tokenizer)
        size = sum(len(part) + 1 for part in parts)
        was_cut = size + len(answer) - 1 > context

        # A long answer gets half of the context, or what the texts leave if that is more.
        answer = answer[: max(1, context // 2, context - size + 1)]
        room = context - len(answer) + 1 - len(parts)  # tokens of the texts
        if room < 0:
            raise ValueError(f"--context {context}: too short for {len(parts)} texts and an answer")
        if row.answer_start is not None and training:
            # Evaluation must not know where the answer is, so it keeps a passage's beginning.
            begin = encodings[0].char_to_token(row.answer_start) or 0
            passage_room = max(room // 2, room - len(parts[1]))
            parts[0] = from_before(parts[0], begin, len(answer), passage_room)
        prompt = [token for part in cut(parts, room) for token in (*part, end_token(tokenizer))]
        inputs = torch.tensor(prompt + answer[:-1], dtype=torch.long)
        targets = torch.tensor([NO_TARGET] * (len(prompt) - 1) + answer)
        return (inputs, targets), was_cut

    def answer_targets(self, row: Row, tokenizer: Tokenizer) -> list:
        """The targets of a row, from the last end token of its texts on."""
        raise NotImplementedError


class WriteTask(RowTask):
    """Rows whose answer is a text to write."""

    def answer_targets(self, row: Row, tokenizer: Tokenizer) -> list[int]:
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
        prompt = self.prompt(examples)
        written = write(prompt)[len(prompt) :]
        end = end_token(tokenizer)
        if end in written:
            written = written[: written.index(end)]
        return f"{tokenizer.decode(prompt)} -> {tokenizer.decode(written)}"

    def prompt(self, examples: list[Example]) -> list[int]:
        """The first prompt, with the end token that closes it."""
        inputs, targets = examples[0]
        start = (targets != NO_TARGET).int().argmax()
        return inputs[: start + 1].tolist()


class HeadTask(RowTask):
    """Rows whose answer the model gives by a head with some outputs, a class or a score."""

    outputs: int

    def add_head(self, model: nn.Module) -> None:
        """Put a head on the model that starts at zero, in place."""
        device = model.wte.weight.device
        model.head = nn.Linear(model.config.width, self.outputs, bias=False, device=device)
        nn.init.zeros_(model.head.weight)

    def sample(self, write, tokenizer: Tokenizer, examples: list[Example]) -> None:
        """None, because this model writes no text."""


@dataclass
class ClassTask(HeadTask):
    """Rows whose answer is the name of a class."""

    classes: list[str] = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        trained = {row.answer for row in self.rows if not row.is_test}
        for row in self.rows:
            if row.answer not in trained:
                raise ValueError(f"data {row.place}: label {row.answer} is not in train.tsv")
        counts = Counter(row.answer for row in self.rows)
        self.classes = sorted(counts)
        self.outputs = len(self.classes)
        rarest = min(self.rows, key=lambda row: counts[row.answer])
        if len(counts) < 2 or counts[rarest.answer] < 3:
            raise ValueError(
                f"data {self.name}: {len(counts)} classes, and only {counts[rarest.answer]} rows "
                f"of {rarest.answer!r} ({rarest.place}); give at least 2 classes of at least 3 rows"
            )
        print("classes  " + ", ".join(f"{name} {counts[name]}" for name in self.classes))

    def answer_targets(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        return [self.classes.index(row.answer)]

    def collect(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return at_targets(logits.argmax(-1), targets)

    def metrics(self, loss: float, collected: list) -> dict[str, float]:
        """Accuracy, the mean F1 of the classes, and for two classes Matthews' correlation."""
        predictions, labels = join(collected)
        results = {
            "accuracy": accuracy_score(labels, predictions),
            "f1": f1_score(labels, predictions, average="macro"),
        }
        if self.outputs == 2:  # Matthews' is Pearson's there
            results["matthews"] = correlation(pearsonr, predictions, labels)
        return results


class ScoreTask(HeadTask):
    """Rows whose answer is a score, which is any number."""

    outputs = 1

    def answer_targets(self, row: Row, tokenizer: Tokenizer) -> list[float]:
        return [row.answer]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The summed squared error."""
        predictions, scores = at_targets(logits[..., 0], targets)
        return (predictions - scores).square().sum()

    def collect(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return at_targets(logits[..., 0], targets)

    def metrics(self, loss: float, collected: list) -> dict[str, float]:
        """The correlations of predictions and scores."""
        predictions, scores = join(collected)
        return {
            "pearson": correlation(pearsonr, predictions, scores),
            "spearman": correlation(spearmanr, predictions, scores),
        }


def at_targets(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The predictions and the targets where there is a target: (batch,) each."""
    known = targets != NO_TARGET
    return predictions[known], targets[known]


def join(collected: list[tuple[Tensor, Tensor]]) -> list[np.ndarray]:
    """[predictions, targets] of all batches."""
    return [torch.cat(parts).cpu().double().numpy() for parts in zip(*collected, strict=True)]


def correlation(measure, a: np.ndarray, b: np.ndarray) -> float:
    """pearsonr or spearmanr, or 0 if one of the two is constant, where these give NaN."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(measure(a, b).statistic)


def from_before(passage: list[int], begin: int, length: int, room: int) -> list[int]:
    """The end of a passage, whose first `room` tokens have the answer in their middle.

    The answer is the `length` tokens at `begin`.
    """
    first = begin - (room - length) // 2
    first = min(first, len(passage) - room)
    return passage[max(0, first) :]


def cut(parts: list[list[int]], room: int) -> list[list[int]]:
    """The beginnings of texts, `room` tokens together. The longest text loses its end first."""
    lengths = [len(part) for part in parts]
    while sum(lengths) > room:
        lengths[lengths.index(max(lengths))] -= 1
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


# Sources of rows.


def modules_task() -> ClassTask:
    """The docstrings of the 8 packages in the standard library that hold the most of them."""
    rows = {}  # by docstring, so that each comes once
    for path, text in code_files():
        if len(path.parts) == 1:
            continue  # not in a package
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring:
                    rows[docstring] = Row((docstring,), path.parts[0], source=str(path))
    counts = Counter(row.answer for row in rows.values())
    largest = {package for package, _ in counts.most_common(8)}
    kept = [row for row in rows.values() if row.answer in largest]
    return ClassTask("modules", kept, "docstring -> package")


def squad_task(path: Path) -> WriteTask:
    """SQuAD 1.1 and 2.0: a passage and a question, and the first of the answers."""
    text = read_text(path)
    rows = []
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    rows.append(squad_row(paragraph["context"], **question))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data {path}: not SQuAD's JSON, or cut short ({error!r})") from error
    return WriteTask(str(path), rows, "context, question -> answer")


def squad_row(context: str, question: str, answers: list[dict], **_) -> Row:
    row = Row((context, question), "unanswerable", source=context)
    if answers:
        row.answer = answers[0]["text"]
        row.answer_start = answers[0]["answer_start"]
        if row.answer_start < 0 or not context.startswith(row.answer, row.answer_start):
            row.answer_start = context.find(row.answer)  # it was counted in bytes, or translated
        if row.answer == "" or row.answer_start < 0:
            raise ValueError(f"the answer {row.answer!r} is not in its passage")
    "".join((context, question, row.answer)).encode()  # fails if one of them is not a text
    return row


def e2e_task(path: Path) -> WriteTask:
    """Lines of meaning||text. A meaning has several texts, and these stay in one split."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        meaning, _, text = (part.strip() for part in line.partition("||"))
        if line.strip() == "":
            continue
        if meaning == "" or text == "":
            raise ValueError(f"data {path}: line {number} is not meaning||text; mend or delete it")
        rows.append(Row((meaning,), text, source=meaning))
    return WriteTask(str(path), rows, "meaning -> text")


# Tables. Case, and spaces around them, do not count in the names of columns.

TEXT_COLUMNS = re.compile(
    r"(sentence|question|text)[12]?|premise|hypothesis|text_pair|prompt|context|#[12] string"
)
ANSWER_COLUMNS = ["label", "gold_label", "quality", "is_duplicate", "score", "answer"]
COLA_COLUMNS = ["source", "label", "mark", "sentence"]  # CoLA's files have no header


def glue_task(folder: Path) -> RowTask:
    """A folder as GLUE is downloaded. dev.tsv is the test set, because test.tsv has no labels."""
    dev = folder / "dev.tsv"
    if (folder / "dev_matched.tsv").exists():
        dev = folder / "dev_matched.tsv"  # MNLI has two
    return table_task(folder / "train.tsv", dev)


def table_task(path: Path, test_path: Path | None = None) -> RowTask:
    """A table, and perhaps a second one that is the test set. The answers decide on the kind."""
    reads, answer, rows = table_rows(path)
    name = str(path)
    if test_path is not None:
        name = str(path.parent)
        test_reads, _, test_rows = table_rows(test_path)
        if test_reads != reads:
            raise ValueError(f"data {test_path}: has {test_reads}, and {path.name} has {reads}")
        for row in test_rows:
            row.is_test = True
        rows += test_rows

    numbers = [to_number(row.answer) for row in rows]
    all_numbers = None not in numbers
    kind = ClassTask
    if answer == "answer":
        kind = WriteTask
    elif answer == "score" or (all_numbers and not all(n.is_integer() for n in numbers)):
        kind = ScoreTask
    for row, number in zip(rows, numbers, strict=True):
        missing = row.answer == "" or (kind is ClassTask and row.answer in ("-", "-1", "-1.0"))
        if kind is ScoreTask:
            missing = number is None or not math.isfinite(number)
        if missing:
            mark = f" ({row.answer} means none)" if row.answer else ""
            raise ValueError(
                f"data {row.place} has no {answer}{mark}; delete the row, or rename the label"
            )
        if kind is ScoreTask:
            row.answer = number
        elif kind is ClassTask and all_numbers:
            row.answer = row.answer.removesuffix(".0")  # pandas, if the column has gaps
    return kind(name, rows, reads)


def to_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def table_rows(path: Path) -> tuple[str, str, list[Row]]:
    """(the columns that are read, the column of the answers, the rows)."""
    lines = table_lines(path)
    columns = [cell.strip().lower() for cell in lines[0][1]]
    if len(columns) == 4 and columns[1] in ("0", "1") and columns[2] in ("", "*"):
        columns = COLA_COLUMNS
    else:
        lines = lines[1:]
    texts = [i for i, column in enumerate(columns) if TEXT_COLUMNS.fullmatch(column)]
    answers = [i for i, column in enumerate(columns) if column in ANSWER_COLUMNS]
    if not texts or len(answers) != 1:
        raise ValueError(
            f"data {path}: its first line must name text columns (sentence, question, text, "
            f"premise, hypothesis, prompt, ...) and one of {', '.join(ANSWER_COLUMNS)}, with tabs "
            f"between them; it has: {', '.join(columns):.200}"
        )
    if not lines:
        raise ValueError(f"data {path}: has no rows under its header; give a whole file")

    rows = []
    for number, cells in lines:
        place = f"{path}: line {number}"
        if len(cells) != len(columns):
            counts = f"{len(cells)} cells, and the header {len(columns)}"
            raise ValueError(f"data {place} has {counts}; mend or delete it")
        read = tuple(cells[i] for i in texts)
        rows.append(Row(read, cells[answers[0]].strip(), source=read, place=place))
    answer = columns[answers[0]]
    return f"{', '.join(columns[i] for i in texts)} -> {answer}", answer, rows


def table_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not blank, with the header.

    In tables of pandas and Excel, a cell in quotes may hold tabs, line ends and doubled quotes. In
    GLUE's a quote is only a letter. A table is of the first kind if all of it can be read like
    that. If only the last of several quotes never closes, this is an error.
    """
    text = read_text(path)
    plain = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            plain.append((number, line.removesuffix("\r").split("\t")))
    if not plain:
        raise ValueError(f"data {path}: the file is empty; give one with a header and rows")
    quotes = re.findall(r'(?:^|\t)"', text, re.MULTILINE)
    if not quotes:
        return plain

    quoted = []
    begins = 1
    csv.field_size_limit(len(text) + 1)  # otherwise longer cells are errors
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                quoted.append((begins, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end" in str(error) and len(quotes) > 1:  # the others were closed
            raise ValueError(
                f"data {path}: line {begins} opens a quote that never closes"
            ) from error
        return plain
    # Rows of several lines are rows only if the lines alone are not.
    plain_fits = all(len(cells) == len(plain[0][1]) for _, cells in plain)
    quoted_fits = all(len(cells) == len(quoted[0][1]) for _, cells in quoted)
    return plain if plain_fits and not (quoted_fits and len(plain) == len(quoted)) else quoted


TASKS.update(
    {
        "glue": lambda folder: glue_task(Path(folder)),
        "table": lambda file: table_task(Path(file)),
        "e2e": lambda file: e2e_task(Path(file)),
        "squad": lambda file: squad_task(Path(file)),
        "modules": lambda argument: modules_task(),
    }
)
