"""Tests of the tasks: from files to rows, examples and metrics."""

import json
import random
from pathlib import Path

import pytest
import torch

import data
import train
from extras.tasks import ScoreTask
from model import GPT, GPTConfig

LETTERS = data.train_tokenizer([], 300)  # a token is a byte
END = data.end_token(LETTERS)
LINE = "--base tiny --data table:t.tsv --device cpu --batch-size 16 --rank 4 --out out"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    sizes = GPTConfig(LETTERS.get_vocab_size(), context=24, layers=1, heads=2, width=16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.BASES, "tiny", lambda argument, texts: (GPT(sizes), LETTERS))
    torch.set_num_threads(1)


def write(path: str, *lines: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes("\n".join([*lines, ""]).encode())


def open_table(*lines: str) -> data.Task:
    write("t.tsv", *lines)
    return data.open_task("table:t.tsv")


def texts_of(examples: list) -> list[str]:
    """What the model reads of each example, with | for an end token."""
    texts = [LETTERS.decode(ids.tolist(), skip_special_tokens=False) for ids, _ in examples]
    return [text.replace(data.END_OF_TEXT, "|") for text in texts]


# GLUE: each header, and a row with texts {a} and {b} and label {y}.
PARSES = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
MNLI = f"index\tpromptID\tpairID\tgenre\t{PARSES}\tsentence1\tsentence2\tlabel1\tgold_label"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
GLUE = {
    "CoLA": ("", "gj04\t{y}\t*\t{a}"),
    "SST-2": ("sentence\tlabel", "{a}\t{y}"),
    "MRPC": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{y}\t7\t7\t{a}\t{b}"),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t7\t7\t{a}\t{b}\t{y}"),
    "STS-B": (STSB, "7\t\t\t\t\t\t\t{a}\t{b}\t{y}"),
    "MNLI": (MNLI, "7" + "\t" * 8 + "{a}\t{b}\t-\t{y}"),
    "QNLI": ("index\tquestion\tsentence\tlabel", "7\t{a}\t{b}\t{y}"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "7\t{a}\t{b}\t{y}"),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "7\t{a}\t{b}\t{y}"),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_is_read_as_downloaded(name):
    (header, row), expected = GLUE[name], []
    for file, count in (("train", 40), ("dev_matched" if name == "MNLI" else "dev", 6)):
        lines = [] if name == "CoLA" else [header]
        for i in range(count):
            texts = [f'"{file} {i}', f'"so" {i}"'][: 1 + ("{b}" in row)]  # GLUE's quotes are bare
            y = f"{i % 2}.25" if name == "STS-B" else f"class {i % 2}" if "7" in row else f"{i % 2}"
            lines.append(row.format(a=texts[0], b=texts[-1], y=y))
            expected.append((tuple(texts), float(y) if name == "STS-B" else y, file != "train"))
        write(f"{name}/{file}.tsv", *lines)
        header, row = header.replace("label1", "label1\tlabel2"), row.replace("-", "-\t-")
    task = data.open_task(f"glue:{name}")
    assert [(row.texts, row.answer, row.is_test) for row in task.rows] == expected
    assert [len(split) for split in task.examples(LETTERS, 64).values()] == [36, 4, 6]


PAIRS = [f"how {i}\twhy {i}\t{i % 2}" for i in range(20)]  # on lines 2 to 21
MISFITS = [
    ([*PAIRS, "what was\this\tevidence\t1"], ": line 22 has 4 cells, and the header 3"),
    ([*PAIRS, "how\twhy\t "], ": line 22 has label ''"),
    ([*PAIRS, "how\twhy\t-1"], ": line 22 has label '-1'"),
    (["how\twhy\t0.5", "how\twhy\tnan"], ": line 3 has label 'nan'"),
    ([*PAIRS, "how\twhy\t2"], ": line 22: 3 labels, '2' on 1 rows"),
    (["how\twhy\t0"] * 3 + ["how\twhy\t1"] * 3, ": give at least 3 rows with different texts"),
]


@pytest.mark.parametrize("rows, error", MISFITS)
def test_misfit_rows_are_named_by_line(rows, error):
    with pytest.raises(ValueError, match=f"^data t.tsv{error}"):
        open_table("sentence1\tsentence2\tlabel", *rows).examples(LETTERS, 16)


def test_dev_must_fit_train():
    write("CoLA/train.tsv", *[f"gj04\t{i % 2}\t\tnumber {i}" for i in range(20)])
    write("CoLA/dev.tsv", "sentence1\tsentence2\tlabel", *PAIRS)
    with pytest.raises(ValueError, match="^data CoLA/dev.tsv: has .*sentence1.*, and CoLA/train"):
        data.open_task("glue:CoLA")


TABLES = [
    ("\ufeffLabel\tSENTENCE \r", "{1}\ta{0}\r", "a{}"),
    ('"sentence"\t"label"', '"a\t""b"" {}"\t"{}"', 'a\t"b" {}'),
    ("sentence\tlabel", '"a" {}\t{}', '"a" {}'),  # no RFC 4180, so as in GLUE
    ("sentence\tlabel", "a\u2028b\x85 {}\t{}\n\n  ", "a\u2028b\x85 {}"),
    ("text\ttext_pair\tlabel", '"a {}\tb"\t{}', '"a {}|b"'),
    ("sentence\tlabel", "a {}\t{}.0", "a {}"),  # pandas, if the column has gaps
]


@pytest.mark.parametrize("header, row, text", TABLES)
def test_tables_of_pandas_excel_and_glue(header, row, text):
    task = open_table(header, *[row.format(i, i % 2) for i in range(8)])
    expected = [(tuple(text.format(i).split("|")), str(i % 2)) for i in range(8)]
    assert [(row.texts, row.answer) for row in task.rows] == expected


def test_e2e_meanings_stay_in_one_split():
    write("e2e.txt", *[f"name : {i // 3}|| text {i} || more. \r" for i in range(60)], " ")
    task = data.open_task("e2e:e2e.txt")
    splits = task.examples(LETTERS, 64).values()
    meanings = [{text.partition("|")[0] for text in texts_of(examples)} for examples in splits]
    assert sum(map(len, meanings)) == len(set.union(*meanings)) == 20
    write("e2e.txt", "a||b", "no text||")
    with pytest.raises(ValueError, match=r"^data e2e.txt: line 2 is not meaning\|\|text"):
        data.open_task("e2e:e2e.txt")


def open_squad(passage: str, *answers: tuple) -> data.Task:
    answers = [{"text": text, "answer_start": start} for text, start in answers]
    qas = [{"question": "where?", "answers": answers}]
    paragraphs = [{"context": f"{passage} {i}", "qas": qas} for i in range(20)]
    write("s.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return data.open_task("squad:s.json")


@pytest.mark.parametrize("answers", [[("the rank", 60)], [("and", 77)], []])
def test_squad_windows_hold_answers_in_training(answers):
    passage = "é😀 " * 20 + "the rank is here " + "and more " * 20
    task = open_squad(passage, *answers)
    splits = task.examples(LETTERS, 48)
    for split, examples in splits.items():
        for text in texts_of(examples):
            read, question, written = text.split("|")
            assert (question, written) == ("where?", answers[0][0] if answers else "unanswerable")
            assert read.startswith("é😀 é😀") == (split != "train" or not answers)
            assert (written in read) == (split == "train" and bool(answers))
        for inputs, targets in examples:  # each target is the next token, and the last is the end
            known = targets != data.NO_TARGET
            assert (targets[:-1] == inputs[1:])[known[:-1]].all() and targets[-1] == END
    sample = task.sample(lambda ids: [*ids, 40, END, 41], LETTERS, splits["test"])
    assert sample.endswith(f"where? -> {LETTERS.decode([40])}")


def test_unknown_files_are_refused():
    for header in ("review\tlabel", "sentence,label", "0\t1\t2\t3", "text", "sentence\tlabel"):
        with pytest.raises(ValueError, match="^data t.tsv: its first line must name text columns"):
            open_table(header, *["a\t1"] * 9 * (header != "sentence\tlabel"))
    for answer in [("them", 0), ("the", "0"), ("", 0), ("rank", 5)]:
        with pytest.raises(ValueError, match="^data s.json: not SQuAD's JSON, or cut short"):
            open_squad("the rank", answer)


def test_modules_are_eight_packages(monkeypatch):
    files = [(path, text) for path, text in data.code_files() if len(text) < 10_000]  # seconds
    monkeypatch.setattr("extras.rows.code_files", lambda: files)
    task = data.open_task("modules")
    assert len(task.classes) == 8 and len({row.texts for row in task.rows}) == len(task.rows) > 300


def test_equal_texts_stay_in_one_split():
    task = open_table("text\tlabel", *[f"<|endoftext|> {i % 19}\t{i // 30}" for i in range(57)])
    splits = task.examples(LETTERS, 24).values()
    assert [len(split) for split in splits] == [33, 12, 12]
    assert all((ids == END).sum() == 1 for split in splits for ids, _ in split)  # the last one
    texts = [{tuple(ids.tolist()) for ids, _ in split} for split in splits]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 19


def test_longest_text_is_cut_first():
    pairs = [(30, 3), (3, 30), (30, 30), (5, 9), (5, 10)]
    rows = [f"{'a' * left}\t{'b' * right}\t{i % 2}" for left, right in pairs * 4 for i in (0, 1)]
    task = open_table("premise\thypothesis\tlabel", *rows)
    texts = sum(map(texts_of, task.examples(LETTERS, 16).values()), [])
    cut = {(11, 3), (3, 11), (7, 7), (5, 9)}  # 14 letters and two end tokens
    assert {(text.count("a"), text.count("b")) for text in texts} == cut


@pytest.mark.filterwarnings("error")
def test_metrics_are_those_by_hand():
    task = open_table("sentence\tlabel", *[f"{i}\t{i % 2}" for i in range(6)])
    logits = torch.tensor([[[0.5, 1], [0.5, 1], [0.5, 0], [0.5, 0]]])
    batch = task.collect(logits, torch.tensor([[1, 0, 0, 0]]))
    metrics = {"accuracy": 0.75, "f1": (2 / 3 + 4 / 5) / 2, "matthews": 2 / 12**0.5}
    assert task.metrics(0.0, [batch]) == pytest.approx(metrics)
    task = open_table("prompt\tanswer", "a\tb", "c\td", "e\tf")
    right = task.collect(logits, torch.tensor([[data.NO_TARGET, 1, 0, 0]]))
    wrong = task.collect(logits, torch.tensor([[data.NO_TARGET, 1, 1, 0]]))
    assert task.metrics(0.0, [right, wrong]) == {"perplexity": 1.0, "exact_match": 0.5}
    task = open_table("sentence\tlabel", "a\t-100", "b\t0.5", "c\t1")
    assert type(task) is ScoreTask and [row.answer for row in task.rows] == [-100, 0.5, 1]
    logits = torch.tensor([[1.0, 2, 9], [3, 4, 9]])[..., None]
    targets = torch.tensor([[1.0, 2, data.NO_TARGET], [2, 9, data.NO_TARGET]])
    assert task.loss(logits, targets) == 0 + 0 + 1 + 25
    metrics = task.metrics(0.0, [task.collect(logits, targets)])
    assert metrics == pytest.approx({"pearson": 12 / 205**0.5, "spearman": 4.5 / 22.5**0.5})
    constant = torch.tensor([[1.0, 1, 1], [1, 2, 3]])
    assert task.metrics(0.0, [constant]) == {"pearson": 0.0, "spearman": 0.0}


def test_classes_are_learned_and_rows_kept(capsys):
    choose = random.Random(0).choices
    rows = [f"{''.join(choose('ab' if i % 2 else 'cd', k=8))}\t{i % 2}" for i in range(200)]
    write("t.tsv", "sentence\tlabel", *rows)
    run = train.main(f"{LINE} --lr 0.03 --steps 60".split())
    last = run.log[-1]
    assert run.log[0]["test_loss"] == pytest.approx(0.693147, abs=1e-5)  # the head starts at zero
    assert last["test_loss"] < 0.3 and last["test_accuracy"] > 0.9 and last["sample"] is None
    write("t.tsv", "sentence\tlabel", *sorted(rows))
    with pytest.raises(SystemExit, match="^2$"):
        train.main(["--resume", "out"])
    assert "changed" in capsys.readouterr().err
