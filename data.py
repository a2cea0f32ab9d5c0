"""Texts and tasks, as token numbers in batches. It knows nothing of models.

With no download, as every Python brings them:

    code      the standard library's sources, on which the base is pretrained
    prose     the language reference behind help("assert"), to which it is adapted
    modules   docstrings to be told apart by package, a task

A UTF-8 text serves too, and as a task a table, a folder of GLUE, E2E's lines or SQuAD's JSON. The
way of a text: documents, their tokens in three splits, windows as examples, a batch. The way of a
task: rows of texts and an answer, the rows in three splits, one example each, a batch.
"""

import ast
import csv
import io
import itertools
import json
import math
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

END_OF_TEXT = "<|endoftext|>"
NO_TARGET = -(2**24)  # no token, no class, and a score that nobody gives; float32 holds it

# Document i belongs to SPLITS[i % 10].
SPLITS = ("train",) * 8 + ("val", "test")
# In each class, the source with the i-th most rows belongs to TASK_SPLITS[i % 5]; where a task has
# a test set of its own, to VAL_SPLITS[i % 10].
TASK_SPLITS = ("train", "val", "test", "train", "train")
VAL_SPLITS = ("train",) * 9 + ("val",)

# Folders and files that no person wrote to be read: tests, generated tables, installed packages.
NOT_CODE = re.compile(
    r"tests?|idle_test|(site|dist)-packages|encodings|pydoc_data|_sysconfigdata.*|config-.*"
)

Example = tuple[Tensor, Tensor]  # inputs (time,) and targets (time,)


# Documents.


def code_files() -> Iterator[tuple[Path, str]]:
    """(path, text) of every source file of the standard library, in sorted order: about 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        path = path.relative_to(root)
        if not any(NOT_CODE.fullmatch(part.removesuffix(".py")) for part in path.parts):
            yield path, (root / path).read_text(encoding="utf-8", errors="replace")


def documents(name: str) -> list[str]:
    """The documents of `code`, of `prose`, or of a UTF-8 file.

    Raises FileNotFoundError or ValueError for a file that is missing, empty or not UTF-8.
    """
    if name == "code":
        return [text for _, text in code_files()]
    if name == "prose":
        return prose_documents()
    return file_documents(name)


def prose_documents(size: int = 20) -> list[str]:
    """The language reference, `size` paragraphs a document.

    Each paragraph once, as a repeated one could leak from the training text into the test split.
    """
    paragraphs = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            paragraphs[paragraph.strip("\n")] = None
    paragraphs = list(paragraphs)
    return ["\n\n".join(paragraphs[i : i + size]) for i in range(0, len(paragraphs), size)]


def file_documents(name: str) -> list[str]:
    """A file in 30 pieces or more, so that each split gets some; lines stay whole if short."""
    text = read_text("data", Path(name))
    size = min(1 << 16, len(text) // 60 + 1)
    pieces = []
    start = 0
    while start < len(text):
        end_of_line = text.find("\n", start + size, start + 2 * size)
        end = start + 2 * size if end_of_line < 0 else end_of_line + 1
        pieces.append(text[start:end])
        start = end
    return pieces


def read_text(setting: str, path: Path) -> str:
    """A UTF-8 file, with or without a byte-order mark. The errors name the setting that asks."""
    if not path.exists():
        raise FileNotFoundError(f"{setting} {path}: there is no such file; see --help for names")
    if not path.is_file():
        raise ValueError(f"{setting} {path}: is not a file; give a file")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as it is: a cell's line ends are its own
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting} {path}: not UTF-8 text ({error}); convert it") from error
    if not text.strip():
        raise ValueError(f"{setting} {path}: the file is empty; give one with text")
    return text


# Tokens and windows.


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's: it has every byte, so no text is unknown to it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return open_tokenizer(tokenizer.to_str())


def open_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from its JSON, without what this may remember of a call: truncation, padding."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # an end token's letters in a text are only letters
    return tokenizer


def end_token(tokenizer: Tokenizer) -> int:
    """The number of the token that ends a text: of a usual name, or else the only special one.

    Raises ValueError if there is none.
    """
    for name in (END_OF_TEXT, "</s>", "<eos>"):
        if tokenizer.token_to_id(name) is not None:
            return tokenizer.token_to_id(name)
    added = tokenizer.get_added_tokens_decoder()
    special = [number for number, token in added.items() if token.special]
    if len(special) != 1:
        raise ValueError(
            f"base: its tokenizer has no token that ends a text, as {END_OF_TEXT} does"
        )
    return special[0]


class Windows(Sequence):
    """The windows of `context` tokens in a text, each with the tokens one place on as its targets.

    They begin at every `stride`-th token.
    """

    def __init__(self, tokens: Tensor, context: int, stride: int):
        self.tokens = tokens  # (size,) int32
        self.context = context
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.context - 1) // self.stride + 1

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = i * self.stride
        inputs = self.tokens[start : start + self.context]
        targets = self.tokens[start + 1 : start + self.context + 1]
        return inputs.long(), targets.long()


def text_examples(
    name: str, documents: list[str], tokenizer: Tokenizer, context: int
) -> dict[str, Windows]:
    """{split: windows}. In training they begin at any token, in evaluation they don't overlap.

    Raises ValueError if a split is not longer than a context.
    """
    ids = {split: [] for split in SPLITS}
    end = end_token(tokenizer)
    for i, text in enumerate(documents):
        encoded = [*tokenizer.encode(text, add_special_tokens=False).ids, end]
        ids[SPLITS[i % len(SPLITS)]].append(torch.tensor(encoded, dtype=torch.int32))

    examples = {}
    for split, parts in ids.items():
        tokens = torch.cat(parts) if parts else torch.zeros(0)
        if len(tokens) <= context:
            raise ValueError(
                f"data {name}: its {split} split has {len(tokens)} tokens, fewer than one context "
                f"of {context} + 1; give more text or a shorter context"
            )
        stride = 1 if split == "train" else context
        examples[split] = Windows(tokens, context, stride)
    return examples


# Tasks: rows of texts and an answer.


@dataclass
class Row:
    texts: tuple[str, ...]
    answer: str | float  # the name of a class, a score, or a text to be written
    source: object  # rows of one source never come into two splits, but a test set of its own
    place: str = field(default="", repr=False)  # file and line, for messages
    is_test: bool = False  # in a task's own test set
    answer_start: int | None = None  # the letter of texts[0] where the answer begins, if it does


@dataclass
class Task:
    name: str
    kind: str  # of the answers: "class", "score" or "text"
    reads: str  # which columns, in words
    rows: list[Row]
    classes: list[str] = field(default_factory=list)


def load_task(name: str) -> Task:
    """`modules`, a GLUE folder, SQuAD's .json, E2E's .txt, or else a table with tabs.

    Raises OSError or ValueError, with the line where it can, for what can't be used.
    """
    path = Path(name)
    if name == "modules":
        task = Task(name, "class", "docstring -> package", module_rows())
    elif path.is_dir():
        task = glue_task(path)
    elif path.suffix == ".json":
        task = Task(name, "text", "context, question -> answer", squad_rows(path))
    elif path.suffix == ".txt":
        task = Task(name, "text", "meaning -> text", e2e_rows(path))
    else:
        task = table_task(path)

    if len(task.rows) < 3:
        raise ValueError(f"task {name}: {len(task.rows)} rows are too few; give 3 or more")
    if task.kind == "class":
        counts = Counter(row.answer for row in task.rows)
        task.classes = sorted(counts)
        rarest = min(task.rows, key=lambda row: counts[row.answer])
        if len(counts) < 2 or counts[rarest.answer] < 3:
            raise ValueError(
                f"task {name}: {len(counts)} classes, and only {counts[rarest.answer]} rows of "
                f"{rarest.answer!r} ({rarest.place}); give 2 classes or more, of 3 rows or more"
            )
    return task


def module_rows() -> list[Row]:
    """The docstrings of the 8 packages in the standard library that hold the most of them."""
    rows = {}  # by docstring: each once
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
    return [row for row in rows.values() if row.answer in largest]


def squad_rows(path: Path) -> list[Row]:
    """SQuAD 1.1 and 2.0: passage and question, and the first of the answers."""
    text = read_text("task", path)
    rows = []
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    rows.append(squad_row(paragraph["context"], **question))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"task {path}: not SQuAD's JSON, or cut short ({error!r})") from error
    return rows


def squad_row(context: str, question: str, answers: list[dict], **_) -> Row:
    row = Row((context, question), "unanswerable", source=context)
    if answers:
        row.answer = answers[0]["text"]
        row.answer_start = answers[0]["answer_start"]
        if row.answer_start < 0 or not context.startswith(row.answer, row.answer_start):
            row.answer_start = context.find(row.answer)  # counted in bytes, or translated
        if row.answer == "" or row.answer_start < 0:
            raise ValueError(f"the answer {row.answer!r} is not in its passage")
    "".join((context, question, row.answer)).encode()  # fails for what is no text
    return row


def e2e_rows(path: Path) -> list[Row]:
    """Lines meaning||text. A meaning has several texts."""
    rows = []
    for number, line in enumerate(read_text("task", path).split("\n"), start=1):
        meaning, _, text = (part.strip() for part in line.partition("||"))
        if line.strip() == "":
            continue
        if meaning == "" or text == "":
            raise ValueError(f"task {path}: line {number} is not meaning||text; mend or delete it")
        rows.append(Row((meaning,), text, source=meaning))
    return rows


# Tables. Case, and spaces around them, do not count in the names of columns.
TEXT_COLUMNS = re.compile(
    r"(sentence|question|text)[12]?|premise|hypothesis|text_pair|prompt|context|#[12] string"
)
ANSWER_COLUMNS = ["label", "gold_label", "quality", "is_duplicate", "score", "answer"]
COLA_COLUMNS = ["source", "label", "mark", "sentence"]  # its files have no header


def glue_task(folder: Path) -> Task:
    """A folder as GLUE is downloaded. dev.tsv is the test set, as test.tsv has no labels."""
    dev = folder / "dev.tsv"
    if (folder / "dev_matched.tsv").exists():
        dev = folder / "dev_matched.tsv"  # MNLI has two
    task = table_task(folder / "train.tsv", dev)
    trained_on = {row.answer for row in task.rows if not row.is_test}
    for row in task.rows:
        if task.kind == "class" and row.answer not in trained_on:
            raise ValueError(f"task {row.place}: label {row.answer} is not in train.tsv")
    return task


def table_task(path: Path, test_path: Path | None = None) -> Task:
    """A table, and perhaps a second one that is the test set."""
    reads, answer, rows = table_rows(path)
    name = str(path)
    if test_path is not None:
        name = str(path.parent)
        test_reads, _, test_rows = table_rows(test_path)
        if test_reads.partition(" (")[0] != reads.partition(" (")[0]:
            raise ValueError(f"task {test_path}: has {test_reads}, and {path.name} has {reads}")
        for row in test_rows:
            row.is_test = True
        rows += test_rows

    # What the answers are: texts, scores or classes. In a column with gaps pandas writes 1.0 for 1.
    numbers = [to_number(row.answer) for row in rows]
    all_numbers = None not in numbers
    task = Task(name, "class", reads, rows)
    if answer == "answer":
        task.kind = "text"
    elif answer == "score" or (all_numbers and not all(n.is_integer() for n in numbers)):
        task.kind = "score"
    for row, number in zip(rows, numbers, strict=True):
        missing = row.answer == "" or (task.kind == "class" and row.answer in ("-", "-1", "-1.0"))
        if task.kind == "score":
            missing = number is None or not math.isfinite(number)
        if missing:
            mark = f" ({row.answer} means none)" if row.answer else ""
            raise ValueError(
                f"task {row.place} has no {answer}{mark}; delete the row, or rename it"
            )
        if task.kind == "score":
            row.answer = number
        elif task.kind == "class" and all_numbers:
            row.answer = row.answer.removesuffix(".0")
    return task


def to_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def table_rows(path: Path) -> tuple[str, str, list[Row]]:
    """(which columns are read, in words; the name of the answers' column; the rows)."""
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
            f"task {path}: its first line must name text columns (sentence, question, text, "
            f"premise, hypothesis, prompt, ...) and one of {', '.join(ANSWER_COLUMNS)}, with tabs "
            f"between; it has: {', '.join(columns):.200}"
        )

    rows = []
    for number, cells in lines:
        place = f"{path}: line {number}"
        if len(cells) != len(columns):
            counts = f"{len(cells)} cells, and the header {len(columns)}"
            raise ValueError(f"task {place} has {counts}; mend or delete it")
        read = tuple(cells[i] for i in texts)
        rows.append(Row(read, cells[answers[0]].strip(), source=read, place=place))

    if not rows:
        raise ValueError(f"task {path}: has no rows under its header; give a whole file")
    answer = columns[answers[0]]
    left_out = [column for i, column in enumerate(columns) if i not in texts + answers]
    reads = f"{', '.join(columns[i] for i in texts)} -> {answer}"
    return reads + (f" (left out: {', '.join(left_out)})" if left_out else ""), answer, rows


def table_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not blank, the header included.

    As pandas and Excel write tables, a cell in quotes may hold tabs, line ends and doubled quotes;
    in GLUE's a quote is a letter. A table is of the first kind if all of it can be read so. It is
    an error if only the last of several quotes never closes.
    """
    text = read_text("task", path)
    plain = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            plain.append((number, line.removesuffix("\r").split("\t")))
    quotes = re.findall(r'(?:^|\t)"', text, re.MULTILINE)
    if not quotes:
        return plain

    quoted = []
    begins = 1
    csv.field_size_limit(len(text) + 1)  # else longer cells are errors
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                quoted.append((begins, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end" in str(error) and len(quotes) > 1:  # the others were closed
            raise ValueError(
                f"task {path}: line {begins} opens a quote that never closes"
            ) from error
        return plain
    # Rows of several lines are rows only if the lines alone are none.
    plain_fits = all(len(cells) == len(plain[0][1]) for _, cells in plain)
    quoted_fits = all(len(cells) == len(quoted[0][1]) for _, cells in quoted)
    return plain if plain_fits and not (quoted_fits and len(plain) == len(quoted)) else quoted


# Tasks as examples.


def task_examples(
    task: Task, tokenizer: Tokenizer, context: int
) -> tuple[dict[str, list[Example]], str]:
    """({split: examples}, what was read, in words).

    The texts of a row stand one after the other, an end token after each. At the last of these the
    model has read all of them: there the target is the number of the class, or the score, or the
    answer begins, whose own targets go on to its end token. Elsewhere the target is NO_TARGET.
    Raises ValueError for too few rows.
    """
    end = end_token(tokenizer)
    examples = {split: [] for split in TASK_SPLITS}
    too_long = 0
    for split, row in split_rows(task):
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in row.texts]
        parts = [encoding.ids for encoding in encoded]
        if task.kind == "class":
            answer = [task.classes.index(row.answer)]
        elif task.kind == "score":
            answer = [row.answer]
        else:
            answer = [*tokenizer.encode(row.answer, add_special_tokens=False).ids, end]

        # A long answer gets half of the context, or more where the texts leave more.
        size = sum(len(part) + 1 for part in parts)
        too_long += size + len(answer) - 1 > context
        answer = answer[: max(1, context // 2, context - size + 1)]
        room = context - len(answer) + 1 - len(parts)
        if room < 0:
            raise ValueError(f"context {context}: too short for {len(parts)} texts and an answer")
        if row.answer_start is not None and split == "train":
            # In evaluation nobody knows where the answer is, so there a passage keeps its start.
            begin = encoded[0].char_to_token(row.answer_start) or 0
            passage_room = max(room // 2, room - len(parts[1]))
            parts[0] = from_before(parts[0], begin, len(answer), passage_room)
        prompt = [number for part in cut(parts, room) for number in (*part, end)]

        inputs = torch.tensor(prompt + answer[:-1], dtype=torch.long)
        targets = torch.tensor([NO_TARGET] * (len(prompt) - 1) + answer)
        examples[split].append((inputs, targets))
    for split in examples.values():
        random.Random(0).shuffle(split)
    if not all(examples.values()):
        sources = len({row.source for row in task.rows})
        counts = f"{len(task.rows)} rows with {sources} different texts"
        raise ValueError(f"task {task.name}: {counts} are too few; give 3 or more of each")
    return examples, in_words(task, examples, too_long, context)


def split_rows(task: Task) -> list[tuple[str, Row]]:
    """(split, row) of each row: the sources of each class are dealt out, the large ones first."""
    sources = defaultdict(list)
    for row in task.rows:
        sources[row.is_test, row.source].append(row)
    has_test = any(row.is_test for row in task.rows)
    splits = defaultdict(lambda: itertools.cycle(VAL_SPLITS if has_test else TASK_SPLITS))
    split_of = {}
    for key, rows in sorted(sources.items(), key=lambda item: -len(item[1])):
        kind = rows[0].answer if task.kind == "class" else None
        split_of[key] = "test" if rows[0].is_test else next(splits[kind])
    return [(split_of[row.is_test, row.source], row) for row in task.rows]


def from_before(passage: list[int], begin: int, length: int, room: int) -> list[int]:
    """A passage from where `room` tokens hold the answer, which is at `begin`, in their middle."""
    first = begin - (room - length) // 2
    first = min(first, len(passage) - room)
    return passage[max(0, first) :]


def cut(parts: list[list[int]], room: int) -> list[list[int]]:
    """The beginnings of texts, `room` tokens together: the longest loses its end first."""
    lengths = [len(part) for part in parts]
    while sum(lengths) > room:
        lengths[lengths.index(max(lengths))] -= 1
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def in_words(task: Task, examples: dict, too_long: int, context: int) -> str:
    """What was read, for the console."""
    answers = defaultdict(set)
    for row in task.rows:
        answers[row.texts].add(row.answer)
    at_odds = sum(len(found) > 1 for found in answers.values())
    lines = [f"task      {task.name}: {task.reads}"]
    if task.kind == "class":
        counts = Counter(row.answer for row in task.rows)
        lines.append("classes   " + ", ".join(f"{name} {counts[name]}" for name in task.classes))
    sizes = ", ".join(f"{split} {len(rows)}" for split, rows in examples.items())
    lines.append(f"rows      {sizes}; {too_long} cut to {context} tokens")
    if at_odds and task.kind != "text":
        lines.append(
            f"          {at_odds} texts stand there more than once, with different answers"
        )
    return "\n".join(lines)


def batch(examples: Sequence[Example], numbers: Iterable[int]) -> Example:
    """(inputs, targets) of the examples with these numbers: (batch, longest time), on the CPU.

    What fills the shorter ones stands behind them, where causal attention never looks, and has
    NO_TARGET.
    """
    chosen = [examples[i] for i in numbers]
    inputs = pad_sequence([inputs for inputs, _ in chosen], batch_first=True)
    targets = pad_sequence(
        [targets for _, targets in chosen], batch_first=True, padding_value=NO_TARGET
    )
    return inputs, targets
