"""Tests of the tasks: from files to rows, examples, metrics and a trained model."""

import json
from pathlib import Path

import pytest
import torch

import data
import train
from extras.tasks import ClassTask, ScoreTask


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A tokenizer whose tokens are bytes. The current folder is empty."""
    monkeypatch.chdir(tmp_path)
    return data.train_tokenizer([], 300)


def open_lines(name: str, *lines: str) -> data.Task:
    """The task of --data NAME:file, where the file has these lines."""
    Path("file").write_bytes("\n".join([*lines, ""]).encode())
    return data.open_task(f"{name}:file")


def split_texts(task: data.Task, tokenizer, context: int) -> list[list[str]]:
    """What the model reads in train, val and test, with | for an end token."""
    splits = []
    for examples in task.examples(tokenizer, context).values():
        texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids, _ in examples]
        splits.append([text.replace(data.END_OF_TEXT, "|") for text in texts])
    return splits


# GLUE: each header, and a row with texts {a} and {b} and label {y}.
PARSES = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
MNLI = f"index\tpromptID\tpairID\tgenre\t{PARSES}\tsentence1\tsentence2\tlabel1\tgold_label"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
GLUE_LAYOUTS = {
    "CoLA": ("", "gj04\t{y}\t*\t{a}"),
    "SST-2": ("sentence\tlabel", "{a}\t{y}"),
    "MRPC": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{y}\t7\t7\t{a}\t{b}"),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t7\t7\t{a}\t{b}\t{y}"),
    "STS-B": (STSB, "7\t\t\t\t\t\t\t{a}\t{b}\t{y}.25"),
    "MNLI": (MNLI, "7" + "\t" * 8 + "{a}\t{b}\t-\t{y}"),
    "QNLI": ("index\tquestion\tsentence\tlabel", "7\t{a}\t{b}\t{y}"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "7\t{a}\t{b}\t{y}"),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "7\t{a}\t{b}\t{y}"),
}


@pytest.mark.parametrize("name", GLUE_LAYOUTS)
def test_glue_is_read_as_downloaded(letters, name):
    header, row = GLUE_LAYOUTS[name]
    for file, size in {"train": 40, "dev_matched" if name == "MNLI" else "dev": 6}.items():
        rows = [row.format(a=f'"{file} {i}', b=f'"so" {i}"', y=i % 2) for i in range(size)]
        text = "\n".join([header, *rows]).lstrip("\n")
        Path(f"{file}.tsv").write_text(text, encoding="utf-8")
    task = data.open_task("glue:.")
    last = task.rows[-1]
    assert type(task) is (ScoreTask if name == "STS-B" else ClassTask)
    assert last.texts == (f'"{file} 5', '"so" 5"')[: 1 + ("{b}" in row)]  # GLUE's quotes are bare
    assert last.answer == ("1.25" if name == "STS-B" else "1")
    assert [len(split) for split in split_texts(task, letters, 64)] == [36, 4, 6]


def test_glue_columns_must_agree(letters):
    Path("train.tsv").write_text("sentence\tlabel\nhow\t1\n")
    Path("dev.tsv").write_text("sentence1\tsentence2\tlabel\nhow\twhy\t1\n")
    with pytest.raises(ValueError, match="^data dev.tsv: has .*, and train.tsv has "):
        data.open_task("glue:.")


PAIRS = ["sentence1\tsentence2\tlabel", *[f"how {i}\twhy {i}\t{i % 2}" for i in range(20)]]
MISFITS = [
    ("table", [*PAIRS, "what was\this\tevidence\t1"], " line 22 has 4 cells for 3 columns"),
    ("table", [*PAIRS, "how\twhy\t "], " line 22 has label ''"),
    ("table", [*PAIRS, "how\twhy\t-"], " line 22 has label '-'"),
    ("table", [*PAIRS, "how\twhy\t-1.0"], " line 22 has label '-1'"),
    ("table", [*PAIRS, "how\twhy\t2"], " line 22: 3 labels, '2' on 1 rows"),
    ("table", [*PAIRS, "how\twhy\t0.5", "how\twhy\tnone"], " line 23 has label 'none'"),
    ("table", [PAIRS[0], *PAIRS[1:3] * 9], " give at least 10 rows with different texts"),
    ("table", ["review\tlabel", "a\t1"], " its first line must name text columns"),
    ("e2e", ["a||b", "no text||"], " line 2 has answer ''"),
    ("squad", ['{"data": ['], " not SQuAD's JSON, or cut short"),
]


@pytest.mark.parametrize("name, lines, error", MISFITS)
def test_misfits_are_named_by_line(letters, name, lines, error):
    with pytest.raises(ValueError, match=f"^data file:{error}"):
        open_lines(name, *lines).examples(letters, 16)


TABLE_LAYOUTS = [
    ("\ufeffLabel\tSENTENCE \r", "{1}\ta{0}\r", "a{}"),
    ('"sentence"\t"label"', '"a ""b"" {}"\t"{}"', 'a "b" {}'),  # pandas and Excel
    ("sentence\tlabel", "a\u2028b\x85 {}\t{}.0\n\n  ", "a\u2028b\x85 {}"),  # pandas, with gaps
    ("text\ttext_pair\tlabel", '"a {}\tb"\t{}', '"a {}|b"'),
]


@pytest.mark.parametrize("header, row, text", TABLE_LAYOUTS)
def test_tables_of_pandas_excel_and_people(letters, header, row, text):
    task = open_lines("table", header, *[row.format(i, i % 2) for i in range(8)])
    expected = [(tuple(text.format(i).split("|")), str(i % 2)) for i in range(8)]
    assert [(row.texts, row.answer) for row in task.rows] == expected


QUESTIONS = [{"question": "where?", "answers": [{"text": "é"}, {"text": "no"}]}]
QUESTIONS += [{"question": "who?", "answers": []}]
PASSAGES = [{"context": f"in {i}", "qas": QUESTIONS} for i in range(19)]
SOURCES = [
    ("table", ["text\tlabel", *[f"{i % 19}\t{i // 30}" for i in range(57)]], "18|"),
    ("e2e", [f"name : {i % 19}||text {i} . \r" for i in range(57)], "name : 18|text 56 ."),
    ("squad", [json.dumps({"data": [{"paragraphs": PASSAGES}]})], "in 18|where?|é"),
    ("squad", [json.dumps({"data": [{"paragraphs": PASSAGES}]})], "in 18|who?|unanswerable"),
]


@pytest.mark.parametrize("name, lines, text", SOURCES)
def test_one_source_stays_in_one_split(letters, name, lines, text):
    splits = split_texts(open_lines(name, *lines), letters, 64)
    sources = [{text.partition("|")[0] for text in split} for split in splits]
    assert [len(split) for split in sources] == [16, 2, 1] and len(set.union(*sources)) == 19
    assert text in sum(splits, [])


def test_modules_are_eight_packages(monkeypatch):
    files = [(path, text) for path, text in data.code_files() if len(text) < 10_000]  # seconds
    monkeypatch.setattr(data, "code_files", lambda: files)
    task = data.open_task("modules")
    assert len(task.classes) == 8 and len({row.texts for row in task.rows}) == len(task.rows) > 300


def test_longest_text_is_cut_first(letters):
    lines = ["premise\thypothesis\tanswer", "aaaaaaaa\tbb\tcccc", "a\t<|endoftext|>\tcccc"]
    task = open_lines("table", *lines)
    inputs = [task.example(row, letters, 10)[0].tolist() for row in task.rows]
    texts = [letters.decode(ids, skip_special_tokens=False) for ids in inputs]
    assert [text.replace(data.END_OF_TEXT, "|") for text in texts] == ["aaa|bb|ccc", "a|<|en|ccc"]
    one, other = (repr(open_lines("table", *lines, line)) for line in lines[1:])
    assert one != other  # so --resume refuses another row


def test_scores_are_measured(letters):
    task = open_lines("table", "sentence\tlabel", "a\t-100", "b\t0.5", "c\t1")
    logits = torch.tensor([[1.0, 2, 9], [3, 4, 9]])[..., None]
    targets = torch.tensor([[1.0, 2, data.NO_TARGET], [2, 9, data.NO_TARGET]])
    assert task.loss(logits, targets) == 0 + 0 + 1 + 25
    metrics = task.metrics(0.0, [task.collect(logits, targets)])
    assert metrics == pytest.approx({"pearson": 12 / 205**0.5, "spearman": 4.5 / 22.5**0.5})
    for pairs in ([[1.0, 1], [1, 2]], [[1.0, 2], [1, 1]]):  # one of the two is constant
        assert task.metrics(0.0, [torch.tensor(pairs)]) == {"pearson": 0.0, "spearman": 0.0}


LEARNED = [("text\tlabel", "matthews", None), ("prompt\tanswer", "exact_match", "61b\nb")]


@pytest.mark.parametrize("header, metric, sample", LEARNED)
def test_rows_are_learned(letters, header, metric, sample):
    open_lines("table", header, *[f"{i}{'ab'[i % 2]}\t{'ab'[i % 2]}" for i in range(99)])
    line = "--base scratch --data table:file --context 24 --method full --steps 50 --device cpu"
    first, *_, last = train.main(line.split()).log
    assert first[f"test_{metric}"] == 0 and last[f"test_{metric}"] == 1
    assert last["sample"] == sample
