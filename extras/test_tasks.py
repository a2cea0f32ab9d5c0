"""Tests of the tasks: from files to rows, examples and metrics."""

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import train
from extras.tasks import ClassTask, Row, ScoreTask, WriteTask, e2e_task, squad_task
from model import GPT, GPTConfig, generate

LETTERS = data.train_tokenizer([], 300)  # a token is a byte
END = data.end_token(LETTERS)
LINE = "--base tiny --device cpu --steps 60 --batch-size 16 --rank 4 --out out"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty working folder, and a tiny base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_run", lambda log: b"")  # a second for each run
    monkeypatch.setitem(train.BASES, "tiny", tiny)


def tiny(argument: str, texts: list[str]):
    torch.manual_seed(0)
    config = GPTConfig(LETTERS.get_vocab_size(), context=24, layers=1, heads=2, width=16)
    return GPT(config), LETTERS


def write(path: str, header: str | None, rows: list[str]) -> None:
    """A file of a header, if there is one, and rows. Its folder is made."""
    Path(path).parent.mkdir(exist_ok=True)
    lines = rows if header is None else [header, *rows]
    Path(path).write_bytes("\n".join([*lines, ""]).encode())


def open_task(spec: str) -> data.Task:
    name, _, argument = spec.partition(":")
    return data.TASKS[name](argument)


def open_table(header: str, rows: list[str]) -> data.Task:
    write("t.tsv", header, rows)
    return open_task("table:t.tsv")


def texts_of(examples: list) -> list[str]:
    """What the model reads of each example, with | for an end token."""
    texts = [LETTERS.decode(ids.tolist(), skip_special_tokens=False) for ids, _ in examples]
    return [text.replace(data.END_OF_TEXT, "|") for text in texts]


# Files.

PARSES = "\t".join(f"sentence{i}_{kind}" for kind in ("binary_parse", "parse") for i in (1, 2))
MNLI = f"index\tpromptID\tpairID\tgenre\t{PARSES}\tsentence1\tsentence2\tlabel1\tgold_label"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
NLI = ["entailment", "not_entailment"]


@pytest.mark.parametrize(
    "name, header, columns, answer, answers",
    [
        ("CoLA", None, [3], 1, ["0", "1"]),
        ("SST-2", "sentence\tlabel", [0], 1, ["0", "1"]),
        ("MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", [3, 4], 0, ["0", "1"]),
        ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", [3, 4], 5, ["0", "1"]),
        ("QNLI", "index\tquestion\tsentence\tlabel", [1, 2], 3, NLI),
        ("MNLI", MNLI, [8, 9], -1, ["contradiction", "entailment", "neutral"]),
        ("RTE", "index\tsentence1\tsentence2\tlabel", [1, 2], 3, NLI),
        ("STS-B", STSB, [7, 8], 9, ["0.000", "3.25", "5.000"]),
    ],
)
def test_glue_is_read_as_downloaded(name, header, columns, answer, answers):
    dev = "dev_matched" if name == "MNLI" else "dev"
    expected = []
    for file, count in (("train", 40), (dev, 6), ("test", 0), ("dev_mismatched", 0)):
        if file == "dev_matched":
            header = header.replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")
        rows = []
        for i in range(count):
            cells = [""] * (4 if header is None else header.count("\t") + 1)
            for column in columns:
                cells[column] = f'"{file} {i}, column {column}'  # GLUE's quotes are bare
            cells[answer] = answers[i % len(answers)]
            rows.append("\t".join(cells))
            value = float(cells[answer]) if name == "STS-B" else cells[answer]
            expected.append((tuple(cells[column] for column in columns), value, file != "train"))
        write(f"{name}/{file}.tsv", header, rows)

    task = open_task(f"glue:{name}")
    assert [(row.texts, row.answer, row.is_test) for row in task.rows] == expected
    assert type(task) is (ScoreTask if name == "STS-B" else ClassTask)
    examples = task.examples(LETTERS, 64)
    val = 3 if name == "MNLI" else 4  # a tenth of each class
    assert [len(examples[split]) for split in ("train", "val", "test")] == [40 - val, val, 6]
    assert {text.replace("|", "")[:4] for text in texts_of(examples["test"])} == {'"dev'}


PAIRS = [f"how {i}\twhy {i}\t{i % 2}" for i in range(20)]  # on lines 2 to 21
SCORES = [f"how {i}\twhy {i}\t{i / 4}" for i in range(20)]


@pytest.mark.parametrize(
    "rows, error",
    [
        ([*PAIRS, "what was\this\tevidence\t1"], "line 22 has 4 cells, and the header 3"),
        ([*PAIRS, "what was his evidence\t1"], "line 22 has 2 cells, and the header 3"),
        ([*PAIRS, "how\twhy\t "], "line 22 has no label"),
        ([*PAIRS, "how\twhy\t-1"], "line 22 has no label"),
        ([*PAIRS, "how\twhy\t-"], "line 22 has no label"),
        ([*SCORES, "how\twhy\tnan"], "line 22 has no label"),
        ([*PAIRS, '"how"\twhy\t0\n"how\twhy\t0'], "line 23 opens a quote that never closes"),
        ([*PAIRS, "how\twhy\t2"], r"3 classes, and only 1 rows of '2' \(t.tsv: line 22\)"),
        ([PAIRS[i] for i in range(0, 20, 2)], "1 classes, and only 10 rows of '0'"),
        (PAIRS[:2], "2 rows are too few"),
        ([], "has no rows under its header"),
        (["how\twhy\t0"] * 3 + ["how\twhy\t1"] * 3, "6 rows with 1 different texts are too few"),
    ],
)
def test_misfit_rows_are_named_by_line(rows, error):
    with pytest.raises(ValueError, match=f"^data t.tsv: {error}"):
        open_table("sentence1\tsentence2\tlabel", rows).examples(LETTERS, 16)


@pytest.mark.parametrize("header", ["review\tlabel", "sentence,label", "0\t1\t2\t3", "text"])
def test_unknown_headers_are_refused(header):
    with pytest.raises(ValueError, match="^data t.tsv: its first line must name text columns"):
        open_table(header, ["a\t1\t\tb"] * 9)


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="^data t.tsv: the file is empty"):
        open_table("", [])


@pytest.mark.parametrize(
    "header, rows, error",
    [
        ("sentence1\tsentence2\tlabel", PAIRS, "has sentence1, sentence2 -> label, and train"),
        (None, ["gj04\t1\t\tb", "gj04\t2\t\tb"], r"line 2: label 2 is not in train\.tsv"),
        ("sentence\tlabel", [], "has no rows under its header"),
    ],
)
def test_dev_must_fit_train(header, rows, error):
    write("CoLA/train.tsv", None, [f"gj04\t{i % 2}\t\tnumber {i}" for i in range(20)])
    write("CoLA/dev.tsv", header, rows)
    with pytest.raises(ValueError, match=f"^data CoLA/dev.tsv: {error}"):
        open_task("glue:CoLA")


@pytest.mark.parametrize(
    "header, row, texts",
    [
        ("\ufeffsentence\tlabel", "a{}\t{}", "a{}"),
        ("sentence\tlabel\r", "a{}\t{}\r", "a{}"),
        ("label\tsentence\r", "{1}\ta{0}\r", "a{}"),
        (" Sentence \tLABEL", "a{}\t{}", "a{}"),
        ('"sentence"\t"label"', '"a{}"\t"{}"', "a{}"),
        ("sentence\tlabel", '"a\t{}"\t{}', "a\t{}"),
        ("sentence\tlabel", '"a\n\nb {}"\t{}', "a\n\nb {}"),
        ("sentence\tlabel\r", '"a\r\nb {}"\t{}\r', "a\r\nb {}"),
        ("sentence\tlabel", '"a ""b"" {}"\t{}', 'a "b" {}'),
        ("sentence\tlabel", '"' + "long " * 30_000 + '""{}"\t{}', "long " * 30_000 + '"{}'),
        ("sentence\tlabel", '"a" {}\t{}', '"a" {}'),  # no RFC 4180, so as in GLUE
        ("sentence\tlabel", 'a "b" {}"\t{}', 'a "b" {}"'),
        ("sentence\tlabel", '"a {}\t{}\nb {}"\t{}', ['"a {}', 'b {}"']),  # opens here, closes there
        ("sentence\tlabel", "a\u2028b\x85 {}\t{}\n\n  ", "a\u2028b\x85 {}"),
        ("text\ttext_pair\tlabel", '"a {}\tb"\t{}', '"a {}|b"'),
        ("sentence\tlabel", "a {}\t{}.0", "a {}"),  # pandas, if the column has gaps
    ],
)
def test_tables_of_pandas_excel_and_glue(header, row, texts):
    task = open_table(header, [row.format(i, i % 2, i, i % 2) for i in range(8)])
    expected = []
    for i in range(8):
        for text in texts if isinstance(texts, list) else [texts]:
            expected.append((tuple(text.format(i).split("|")), str(i % 2)))
    assert [(row.texts, row.answer) for row in task.rows] == expected


def test_e2e_meanings_stay_in_one_split():
    rows = [f"name : {i // 3}|| text {i} || more. \r" for i in range(60)] + ["", " "]
    write("e2e.txt", None, rows)
    task = open_task("e2e:e2e.txt")
    assert type(task) is WriteTask
    assert task.rows[4] == Row(("name : 1",), "text 4 || more.", source="name : 1")
    meanings = []
    for examples in task.examples(LETTERS, 64).values():
        meanings.append({text.partition("|")[0] for text in texts_of(examples)})
    assert sum(map(len, meanings)) == len(set.union(*meanings)) == 20
    write("e2e.txt", None, ["a||b", "no text||"])
    with pytest.raises(ValueError, match=r"^data e2e.txt: line 2 is not meaning\|\|text"):
        e2e_task(Path("e2e.txt"))


def write_squad(passage: str, answers: list, question: str = "where?") -> None:
    articles = []
    for i in range(20):
        qas = [{"id": str(i), "question": question, "answers": answers}]
        articles.append({"paragraphs": [{"context": f"{passage} {i}", "qas": qas}]})
    Path("s.json").write_text(json.dumps({"data": articles}))


@pytest.mark.parametrize("start, answer", [(60, "the rank"), (77, "and"), (None, "unanswerable")])
def test_squad_windows_hold_answers_in_training(start, answer):
    passage = "é😀 " * 20 + "the rank is here " + "and more " * 20
    write_squad(passage, [] if start is None else [{"text": answer, "answer_start": start}])
    for split, examples in open_task("squad:s.json").examples(LETTERS, 48).items():
        for text in texts_of(examples):
            read, question, written = text.split("|")
            assert question == "where?" and written == answer
            assert read.startswith("é😀 é😀") == (split != "train" or start is None)
            assert (answer in read) == (split == "train" and start is not None)


def test_squad_answers_are_found_in_the_passage():
    write_squad("é the rank", [{"text": "rank", "answer_start": 7}])  # counted in bytes
    assert {row.answer_start for row in squad_task(Path("s.json")).rows} == {6}


@pytest.mark.parametrize(
    "answers, question",
    [
        ([{"text": "them", "answer_start": 0}], "where?"),
        ([{"text": "the", "answer_start": "0"}], "where?"),
        ([{"text": "", "answer_start": 0}], "where?"),
        ({"text": ["the"], "answer_start": [0]}, "where?"),  # the layout of the package datasets
        ([], None),
    ],
)
def test_other_json_is_not_squad(answers, question):
    write_squad("the rank", answers, question)
    with pytest.raises(ValueError, match="^data s.json: not SQuAD's JSON, or cut short"):
        squad_task(Path("s.json"))
    write_squad("the rank", [])
    Path("s.json").write_text(Path("s.json").read_text()[:99])
    with pytest.raises(ValueError, match="^data s.json: not SQuAD's JSON, or cut short"):
        squad_task(Path("s.json"))


def test_modules_are_eight_packages(monkeypatch):
    files = [(path, text) for path, text in data.code_files() if len(text) < 10_000]  # seconds
    monkeypatch.setattr("extras.tasks.code_files", lambda: files)
    task = open_task("modules")
    assert len(task.classes) == 8 and len(task.rows) > 300
    assert all(row.source.startswith(row.answer + os.sep) for row in task.rows)
    assert len({row.texts for row in task.rows}) == len(task.rows)
    splits = {}  # of each file
    for split, row in task.split_rows():
        splits.setdefault(row.source, set()).add(split)
    assert all(len(of_file) == 1 for of_file in splits.values())


# Examples.


def test_the_target_is_the_class_at_the_end():
    rows = [f"text {i} of {'abc'[i % 3]}\t{'xyz'[i % 3]}" for i in range(60)]
    task = open_table("sentence\tlabel", rows)
    assert task.classes == ["x", "y", "z"] and task.texts[0] == "text 0 of a"
    examples = task.examples(LETTERS, 24)
    assert {split: len(rows) for split, rows in examples.items()} == {
        "train": 36,
        "val": 12,
        "test": 12,
    }
    for inputs, targets in examples["train"]:
        assert inputs[-1] == END and (targets[:-1] == data.NO_TARGET).all()
        assert LETTERS.decode(inputs.tolist()).endswith("abc"[targets[-1]])


def test_an_end_token_in_a_text_is_letters():
    task = open_table("text\tlabel", [f"{i}<|endoftext|>\t{i % 2}" for i in range(20)])
    assert all((ids == END).sum() == 1 for ids, _ in task.examples(LETTERS, 24)["train"])


def test_equal_texts_stay_in_one_split():
    task = open_table("text\tlabel", [f"text {i % 19}\t{i // 30}" for i in range(57)])
    texts = [set(texts_of(examples)) for examples in task.examples(LETTERS, 16).values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 19


def test_longest_text_is_cut_first(capsys):
    pairs = [(30, 3), (3, 30), (30, 30), (5, 9), (5, 10)]
    rows = [f"{'a' * left}\t{'b' * right}\t{i % 2}" for left, right in pairs * 4 for i in (0, 1)]
    task = open_table("premise\thypothesis\tlabel", rows)
    texts = sum(map(texts_of, task.examples(LETTERS, 16).values()), [])
    cut = {(11, 3), (3, 11), (7, 7), (5, 9)}  # 14 letters and two end tokens
    assert {(text.count("a"), text.count("b")) for text in texts} == cut
    assert "32 cut to 16 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^--context 1: too short for 2 texts and an answer"):
        task.examples(LETTERS, 1)


def test_long_answers_leave_half_to_prompts():
    rows = [f"{'rank ' * 30}{i}\t{'time ' * 30}" for i in range(9)]
    for inputs, targets in open_table("prompt\tanswer", rows).examples(LETTERS, 16)["train"]:
        assert len(inputs) == 16 and (targets != data.NO_TARGET).sum() == 8
    rows = [f"{i}\t{'time ' * 30}" for i in range(9)]  # or more, if the prompt leaves more
    inputs, targets = open_table("prompt\tanswer", rows).examples(LETTERS, 16)["train"][0]
    assert len(inputs) == 16 and (targets != data.NO_TARGET).sum() == 15


# Metrics. The expected values are computed by hand.


def test_metrics_of_classes():
    rows = [Row((str(i),), "ab"[i % 2], source=i) for i in range(6)]
    task = ClassTask("two", rows, "text -> label")
    wanted = torch.tensor([[1.0, 0, 0, 0]])
    logits = torch.stack((torch.full((1, 4), 0.5), torch.tensor([[1.0, 1, 0, 0]])), dim=-1)
    batch = task.collect(logits, wanted.long())
    metrics = {"accuracy": 0.75, "f1": (2 / 3 + 4 / 5) / 2, "matthews": 2 / 12**0.5}
    assert task.metrics(0.0, [batch]) == pytest.approx(metrics)
    constant = (torch.zeros(4), torch.tensor([0, 1, 0, 1]))
    assert task.metrics(0.0, [constant])["matthews"] == 0.0
    task = ClassTask("three", [Row((str(i),), "abc"[i % 3], source=i) for i in range(9)], "")
    metrics.pop("matthews")  # and the class without predictions and labels does not count
    assert task.metrics(0.0, [batch]) == pytest.approx(metrics)


@pytest.mark.filterwarnings("error")
def test_metrics_of_scores():
    rows = [Row((str(i),), i / 2, source=i) for i in range(6)]
    task = ScoreTask("scores", rows, "text -> score")
    logits = torch.tensor([[1.0, 2, 9], [3, 4, 9]])[..., None]
    targets = torch.tensor([[1.0, 2, data.NO_TARGET], [2, 9, data.NO_TARGET]])
    assert task.loss(logits, targets) == 0 + 0 + 1 + 25
    metrics = task.metrics(0.0, [task.collect(logits, targets)])
    assert metrics == pytest.approx({"pearson": 12 / 205**0.5, "spearman": 4.5 / 22.5**0.5})
    constant = [(torch.ones(4), torch.arange(4.0))]
    assert task.metrics(0.0, constant) == {"pearson": 0.0, "spearman": 0.0}


# Runs.


def run(line: str) -> train.Run:
    return train.main(line.split())


def test_classes_are_learned_and_the_head_saved():
    rng = random.Random(0)
    rows = [f"{''.join(rng.choices('ab' if i % 2 else 'cd', k=8))}\t{i % 2}" for i in range(200)]
    write("t.tsv", "sentence\tlabel", rows)
    finished = run(f"{LINE} --data table:t.tsv --lr 0.03")
    first, last = finished.log[0], finished.log[-1]
    assert first["test_loss"] == pytest.approx(math.log(2), abs=1e-6)  # the head starts at zero
    assert last["test_loss"] < 0.3 and last["test_accuracy"] > 0.9 and last["sample"] is None
    saved = torch.load("out/adapter.pt")["adapter"]
    assert torch.equal(saved["head.weight"], finished.model.head.weight)
    assert saved["head.weight"].shape == (2, 16)


def test_resume_refuses_changed_rows(capsys):
    rows = [f"text {i}\t{i % 2}" for i in range(40)]
    write("t.tsv", "sentence\tlabel", rows)
    run(f"{LINE} --data table:t.tsv")
    run("--resume out")
    for changed in (["new\t0", *rows], sorted(rows)):
        write("t.tsv", "sentence\tlabel", changed)
        with pytest.raises(SystemExit, match="^2$"):
            run("--resume out")
        assert "changed" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["score", "label"])
def test_scores_are_learned_by_squared_error(column):
    rng = random.Random(0)
    rows = []
    for i in range(200):
        count = rng.randint(0, 8)
        rows.append(f"{'a' * count}{'b' * (8 - count)} {i}\t{count / 2 - 100}")  # -100 is a score
    write("t.tsv", f"sentence\t{column}", rows)
    finished = run(f"{LINE} --data table:t.tsv --method full --lr 0.05 --steps 120")
    first, last = finished.log[0], finished.log[-1]
    true = np.array([targets[-1].item() for _, targets in finished.examples["test"]])
    assert first["test_loss"] == pytest.approx(np.square(true).mean(), rel=1e-5)
    assert last["test_loss"] < 2 and last["test_pearson"] > 0.5 and last["test_spearman"] > 0.5
    assert finished.model.head.weight.shape == (1, 16)


def test_written_answers_are_scored_like_greedy_writing():
    rows = [f"{i} {letter}\t{letter}{i % 2}" for i in range(20) for letter in "abc"]
    write("t.tsv", "prompt\tanswer", rows)
    finished = run(f"{LINE} --data table:t.tsv --method full --lr 0.03 --steps 100")
    gpt = finished.model.eval()
    answers = {row.texts[0]: row.answer for row in finished.task.rows}
    loss = count = right = 0
    for inputs, targets in finished.examples["test"]:
        prompt = finished.task.prompt([(inputs, targets)])
        answer = targets[targets != data.NO_TARGET].tolist()
        assert prompt[-1] == answer[-1] == END
        assert answers[LETTERS.decode(prompt)] == LETTERS.decode(answer)
        logits = gpt(inputs[None])[0, len(prompt) - 1 :]  # all that predict the answer
        loss += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
        right += generate(gpt, prompt, len(answer), top_k=1)[len(prompt) :] == answer
    last = finished.log[-1]
    assert last["test_loss"] == pytest.approx(loss / count, rel=1e-4)
    assert last["test_exact_match"] == pytest.approx(right / len(finished.examples["test"]))
    assert 0 < last["test_exact_match"] < 1
    assert last["sample"].startswith(
        LETTERS.decode(finished.task.prompt(finished.examples["test"]))
    )


def test_a_scratch_base_reads_the_rows():
    write("t.tsv", "prompt\tanswer", [f"number {i}\tanswer {i}" for i in range(9)])
    finished = run("--base scratch --data table:t.tsv --steps 2 --context 16 --rank 2 --out out")
    assert {"number", "Ġ8", "answer"} <= {*finished.tokenizer.get_vocab()}
