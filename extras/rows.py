"""Rows of texts and an answer, from files: what extras/tasks.py makes tasks of.

Rows that do not fit raise a ValueError with their file and line.
"""

import ast
import csv
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data import code_files, read_text


@dataclass
class Row:
    """Texts and an answer."""

    texts: tuple[str, ...]
    answer: str | float  # the name of a class, a score, or a text to write
    source: object  # rows of one source stay in one split, except for a task's own test set
    place: str = field(default="", repr=False)  # file and line, for messages
    is_test: bool = False  # in the task's own test set
    answer_start: int | None = None  # where the answer begins in texts[0], if it does


def module_rows() -> list[Row]:
    """The docstrings of the 8 packages in the standard library that hold the most of them."""
    rows = {}  # by docstring, so that each comes once
    for path, text in code_files():
        if len(path.parts) > 1:  # in a package
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    docstring = ast.get_docstring(node)
                    rows[docstring] = Row((docstring,), path.parts[0], source=str(path))
    rows.pop(None, None)  # no docstring
    largest = dict(Counter(row.answer for row in rows.values()).most_common(8))
    return [row for row in rows.values() if row.answer in largest]


def squad_rows(path: Path) -> list[Row]:
    """SQuAD 1.1 and 2.0: a passage and a question, and the first of the answers."""
    rows = []
    try:
        for article in json.loads(read_text(path))["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    passage = paragraph["context"]
                    row = Row((passage, question["question"]), "unanswerable", source=passage)
                    for answer in question["answers"][:1]:
                        row.answer, row.answer_start = answer["text"], answer["answer_start"]
                        if not row.answer or not passage.startswith(row.answer, row.answer_start):
                            raise ValueError(f"{answer} is not in its passage")
                    rows.append(row)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data {path}: not SQuAD's JSON, or cut short ({error!r})") from error
    return rows


def e2e_rows(path: Path) -> list[Row]:
    """Lines of meaning||text. A meaning has several texts, and these stay in one split."""
    rows = []
    for place, line in numbered_lines(path):
        meaning, _, text = (part.strip() for part in line.partition("||"))
        if meaning == "" or text == "":
            raise ValueError(f"data {place} is not meaning||text; mend or delete it")
        rows.append(Row((meaning,), text, source=meaning))
    return rows


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """(file and line number, line) of each line that is not blank."""
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(f"{path}: line {n}", line.removesuffix("\r")) for n, line in lines if line.strip()]


# Tables. Case, spaces and quotes around them do not count in the names of columns.
TEXT_COLUMNS = re.compile(
    r"(sentence|question|text)[12]?|premise|hypothesis|text_pair|prompt|context|#[12] string"
)
ANSWER_COLUMNS = ["label", "gold_label", "quality", "is_duplicate", "score", "answer"]


def table_rows(path: Path) -> tuple[list[str], list[Row]]:
    """(the columns that are read, the rows). The last column is that of the answers."""
    lines = numbered_lines(path)
    columns = [cell.strip(' "').lower() for cell in lines[0][1].split("\t")] if lines else []
    if len(columns) == 4 and columns[1] in ("0", "1") and columns[2] in ("", "*"):
        columns = ["source", "label", "mark", "sentence"]  # CoLA's files have no header
    else:
        lines = lines[1:]
    reads = [i for i, column in enumerate(columns) if TEXT_COLUMNS.fullmatch(column)]
    answers = [i for i, column in enumerate(columns) if column in ANSWER_COLUMNS]
    if not reads or len(answers) != 1 or not lines:
        raise ValueError(
            f"data {path}: its first line must name text columns (sentence, question, text, "
            f"premise, hypothesis, prompt, ...) and one of {', '.join(ANSWER_COLUMNS)}, with tabs "
            f"between them and rows below; it has: {', '.join(columns):.200}"
        )
    rows = []
    for place, line in lines:
        cells = split_cells(line, len(columns))
        if len(cells) != len(columns):
            counts = f"{len(cells)} cells, and the header {len(columns)}"
            raise ValueError(f"data {place} has {counts}; mend or delete it")
        texts = tuple(cells[i] for i in reads)
        rows.append(Row(texts, cells[answers[0]].strip(), source=texts, place=place))
    return [columns[i] for i in reads + answers], rows


def split_cells(line: str, count: int) -> list[str]:
    """The cells of a line. Pandas and Excel write quotes around cells that hold tabs or quotes. If
    reading these does not give `count` cells, a quote is only a letter, like in GLUE."""
    try:
        cells = next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        cells = []
    return cells if len(cells) == count else line.split("\t")
