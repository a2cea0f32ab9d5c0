"""Texts and tasks, as token numbers in batches. It knows nothing of models.

With no download, as every Python brings them:

    code      the standard library's sources, on which the base is pretrained
    prose     the language reference behind help("assert"), to which it is adapted
    modules   docstrings to be told apart by package, a task

A UTF-8 text, or a .tsv table with the columns label and sentence, serves too. The way of a text:
documents, their tokens in three splits, windows or rows as examples, and a batch of examples.
"""

import ast
import csv
import itertools
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

END_OF_TEXT = "<|endoftext|>"
NO_TARGET = -100  # what cross_entropy leaves out

# Document i belongs to SPLITS[i % 10].
SPLITS = ("train",) * 8 + ("val", "test")
# In each class, the source with the i-th most texts belongs to TASK_SPLITS[i % 5].
TASK_SPLITS = ("train", "val", "test", "train", "train")

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
    """A file in pieces of whole lines: about 40 or more, so that each split gets some."""
    path = existing_file("data", name)
    size = min(1 << 16, path.stat().st_size // 60 + 1)
    pieces = []
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(size) + file.readline(size):
                pieces.append(piece)
    except UnicodeDecodeError as error:
        raise ValueError(f"data {name}: not UTF-8 text ({error}); convert it with iconv") from error
    if not pieces:
        raise ValueError(f"data {name}: the file is empty; give one with text")
    return pieces


def existing_file(setting: str, name: str) -> Path:
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"{setting} {name}: there is no such file; see --help for names")
    if not path.is_file():
        raise ValueError(f"{setting} {name}: is not a file; give a file")
    return path


# Tokens and windows.


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's: it has every byte, so no text is unknown to it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return Tokenizer.from_str(tokenizer.to_str())


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
    for i, text in enumerate(documents):
        encoded = tokenizer.encode(text + END_OF_TEXT).ids
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


# Tasks: rows are {text: (label, source)}; texts of one source never come into two splits.

Rows = dict[str, tuple[str, str]]


def task_rows(name: str) -> Rows:
    """The rows of `modules`, or of a table. Raises an error if the table can't be used."""
    return module_rows() if name == "modules" else table_rows(name)


def table_rows(name: str) -> Rows:
    """The rows of a .tsv file with a header as GLUE's; each is its own source."""
    path = existing_file("task", name)
    rows = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = table.fieldnames or []
            texts = sorted({"sentence", "sentence1", "text", "sentence2"} & set(header))
            if not texts or "label" not in header:
                raise ValueError(
                    f"task {name}: its first line must name the columns label and sentence "
                    f"(or text, or sentence1 and sentence2), with tabs between them"
                )
            for row in table:
                if None in row.values():
                    raise ValueError(f"task {name}: line {table.line_num} has too few columns")
                text = END_OF_TEXT.join(row[column] for column in texts)
                rows[text] = (row["label"].strip(), text)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"task {name}: not a table in UTF-8 with tabs ({error})") from error
    return rows


def module_rows() -> Rows:
    """The docstrings of the 8 packages in the standard library that hold the most of them."""
    rows = {}
    for path, text in code_files():
        if len(path.parts) == 1:
            continue  # not in a package
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring:
                    rows[docstring] = (path.parts[0], str(path))
    counts = Counter(package for package, _ in rows.values())
    largest = {package for package, _ in counts.most_common(8)}
    return {text: row for text, row in rows.items() if row[0] in largest}


def task_examples(
    name: str, rows: Rows, tokenizer: Tokenizer, context: int
) -> tuple[dict[str, list[Example]], list[str]]:
    """({split: examples}, classes).

    A text is cut to the context and closed by an end token, where the model has read all of it:
    there the target is the number of its class, elsewhere NO_TARGET. Raises ValueError for too few
    texts or classes.
    """
    classes = sorted({label for label, _ in rows.values()})
    splits = {label: itertools.cycle(TASK_SPLITS) for label in classes}
    split_of = {}
    for source, _ in Counter(rows.values()).most_common():
        split_of[source] = next(splits[source[0]])

    examples = {split: [] for split in TASK_SPLITS}
    end = tokenizer.token_to_id(END_OF_TEXT)
    for text, row in rows.items():
        ids = tokenizer.encode(text).ids[: context - 1]
        inputs = torch.tensor([*ids, end])
        targets = torch.full_like(inputs, NO_TARGET)
        targets[-1] = classes.index(row[0])
        examples[split_of[row]].append((inputs, targets))
    for split in examples.values():
        random.Random(0).shuffle(split)

    if len(classes) < 2 or not all(examples.values()):
        raise ValueError(
            f"task {name}: {len(rows)} different texts of {len(classes)} classes are too few; "
            "give 2 classes or more, of 3 texts or more"
        )
    return examples, classes


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
