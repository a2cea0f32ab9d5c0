# ruff: noqa: F403, F405
import errno

from test_triadapt import *

# ---------------------------------------------------------------------------------- tasks


def write_lines(path: str, header: str | None, rows: list[str]) -> None:
    """A file of a header, if there is one, and rows; its folder too."""
    Path(path).parent.mkdir(exist_ok=True)
    lines = rows if header is None else [header, *rows]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def examples_of(name: str, tokenizer, context: int = 16):
    """(task, its examples, what the console says of them)."""
    task = data.load_task(name)
    return task, *data.task_examples(task, tokenizer, context)


PARSES = "\t".join(f"sentence{i}_{kind}" for kind in ("binary_parse", "parse") for i in (1, 2))
MNLI = f"index\tpromptID\tpairID\tgenre\t{PARSES}\tsentence1\tsentence2\tlabel1\tgold_label"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
NLI = ["entailment", "not_entailment"]


@pytest.mark.parametrize(
    "name, header, texts, answer, answers",
    [
        ("CoLA", None, [3], 1, ["0", "1"]),
        ("SST-2", "sentence\tlabel", [0], 1, ["0", "1"]),
        ("MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", [3, 4], 0, ["0", "1"]),
        ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", [3, 4], 5, ["0", "1"]),
        ("QNLI", "index\tquestion\tsentence\tlabel", [1, 2], 3, NLI),
        ("MNLI", MNLI, [8, 9], -1, ["contradiction", "entailment", "neutral"]),
        ("RTE", "index\tsentence1\tsentence2\tlabel", [1, 2], 3, NLI),
        ("WNLI", "index\tsentence1\tsentence2\tlabel", [1, 2], 3, ["0", "1"]),
        ("STS-B", STSB, [7, 8], 9, ["0.000", "3.25", "5.000"]),
    ],
)
def test_each_folder_of_glue_is_read_as_it_is_downloaded(
    tokenizer, name, header, texts, answer, answers
):
    matched = "_matched" if name == "MNLI" else ""
    expected = []
    for file, count in (("train", 40), (f"dev{matched}", 6), ("test", 0), ("dev_mismatched", 0)):
        if file == "dev_matched":
            header = header.replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")
        rows = []
        for i in range(count):
            cells = [""] * (4 if header is None else header.count("\t") + 1)
            for column in texts:
                cells[column] = f'"{file} {i}, column {column}'  # GLUE's quotes are bare
            cells[answer] = answers[i % len(answers)]
            rows.append("\t".join(cells))
            score = float(cells[answer]) if name == "STS-B" else cells[answer]
            expected.append((tuple(cells[column] for column in texts), score, file != "train"))
        write_lines(f"{name}/{file}.tsv", header, rows)

    task, examples, told = examples_of(name, tokenizer)
    assert [(row.texts, row.answer, row.is_test) for row in task.rows] == expected
    val = 6 if name == "MNLI" else 4  # a tenth of each class, rounded up
    assert [len(examples[split]) for split in ("train", "val", "test")] == [40 - val, val, 6]
    if name == "STS-B":
        assert task.kind == "score" and {t[-1].item() for _, t in examples["test"]} == {0, 3.25, 5}
    else:
        assert task.kind == "class" and task.classes == answers
        assert f"classes   {answers[0]} {sum(row[1] == answers[0] for row in expected)}, " in told
    assert f"rows      train {40 - val}, val {val}, test 6; " in told


PAIRS = "".join(f"how {i}\twhy {i}\t{i % 2}\n" for i in range(20))  # on lines 2 to 21
SCORES = "".join(f"how {i}\twhy {i}\t{i / 4}\n" for i in range(20))


@pytest.mark.parametrize(
    "rows, said",
    [
        (PAIRS + "what was\this\tevidence\t1\n", "line 22 has 4 cells, and the header 3"),
        (PAIRS + "what was his evidence\t1\n", "line 22 has 2 cells, and the header 3"),
        (PAIRS + "how\twhy\t \n", "line 22 has no label"),
        (PAIRS + "how\twhy\t-1\n", "line 22 has no label"),
        (PAIRS + "how\twhy\t-\n", "line 22 has no label"),
        (SCORES + "how\twhy\tnan\n", "line 22 has no label"),
        (PAIRS + '"how"\twhy\t0\n"how\twhy\t0\n', "line 23 opens a quote that never closes"),
        (PAIRS + "how\twhy\t2\n", r"3 classes, and only 1 rows of '2' \(t.tsv: line 22\)"),
        (PAIRS.replace("\t1\n", "\t0\n"), "1 classes, and only 20 rows of '0'"),
        ("", "has no rows under its header"),
        ("how\twhy\t0\n" * 3 + "how\twhy\t1\n" * 3, "6 rows with 1 different texts are too few"),
    ],
)
def test_a_row_that_does_not_fit_the_header_is_named_by_its_line(tokenizer, rows, said):
    write_lines("t.tsv", "sentence1\tsentence2\tlabel", [rows])
    with pytest.raises(ValueError, match=f"^task t.tsv: {said}"):
        examples_of("t.tsv", tokenizer)


def test_a_header_without_a_known_column_and_two_files_that_differ_are_refused(home):
    for header in ("review\tlabel", "sentence,label", "sentence\tlabel\tscore", "0\t1\t2\t3"):
        write_lines("t.tsv", header, ["a\t1\t\tb"] * 9)
        with pytest.raises(ValueError, match="^task t.tsv: its first line must name text columns"):
            data.load_task("t.tsv")
    write_lines("CoLA/train.tsv", None, [f"gj04\t{i % 2}\t\tsaid {i}" for i in range(20)])
    for header, rows, said in (
        ("sentence1\tsentence2\tlabel", [PAIRS], "has sentence1, sentence2 -> label, and train"),
        (None, ["gj04\t1\t\tb", "gj04\t2\t\tb"], r"line 2: label 2 is not in train\.tsv"),
        ("sentence\tlabel", [], "has no rows under its header"),
    ):
        write_lines("CoLA/dev.tsv", header, rows)
        with pytest.raises(ValueError, match=f"^task CoLA/dev.tsv: {said}"):
            data.load_task("CoLA")
    Path("CoLA/dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="^task CoLA/dev.tsv: there is no such file"):
        data.load_task("CoLA")


@pytest.mark.parametrize(
    "header, row, texts",
    [
        ("\ufeffsentence\tlabel", "a{}\t{}", "a{}"),
        ("sentence\tlabel\r", "a{}\t{}\r", "a{}"),
        (" Sentence \tLABEL", "a{}\t{}", "a{}"),
        ('"sentence"\t"label"', '"a{}"\t"{}"', "a{}"),
        ("sentence\tlabel", '"a\t{}"\t{}', "a\t{}"),
        ("sentence\tlabel", '"a\n\nb {}"\t{}', "a\n\nb {}"),
        ("sentence\tlabel\r", '"a\r\nb {}"\t{}\r', "a\r\nb {}"),
        ("sentence\tlabel", '"a ""b"" {}"\t{}', 'a "b" {}'),
        ("sentence\tlabel", '"' + "long " * 30_000 + '""{}"\t{}', "long " * 30_000 + '"{}'),
        ("sentence\tlabel", '"a" {}\t{}', '"a" {}'),  # no RFC 4180: as in GLUE
        ("sentence\tlabel", 'a "b" {}"\t{}', 'a "b" {}"'),
        # Opens in one row, closes in the next.
        ("sentence\tlabel", '"a {}\t{}\nb {}"\t{}', ['"a {}', 'b {}"']),
        ("sentence\tlabel", "a\u2028b\x85 {}\t{}\n\n  ", "a\u2028b\x85 {}"),
        ("text\ttext_pair\tlabel", '"a {}\tb"\t{}', '"a {}|b"'),  # in one cell, in the next
        ("sentence\tlabel", "a {}\t{}.0", "a {}"),  # pandas, in a column with gaps
    ],
)
def test_a_table_is_read_as_pandas_excel_or_glue_wrote_it(home, header, row, texts):
    rows = [row.format(i, i % 2, i, i % 2) for i in range(8)]
    Path("t.tsv").write_bytes("\n".join([header, *rows, ""]).encode())
    expected = []
    for i in range(8):
        for text in texts if isinstance(texts, list) else [texts]:
            expected.append((tuple(text.format(i).split("|")), str(i % 2)))
    assert [(row.texts, row.answer) for row in data.load_task("t.tsv").rows] == expected


def test_equal_texts_with_other_labels_stay_in_one_split_and_are_counted(tokenizer):
    write_lines("t.tsv", "text\tlabel", [f"said {i % 20}\t{i // 30}" for i in range(60)])
    _, examples, told = examples_of("t.tsv", tokenizer)
    texts = [{tuple(inputs.tolist()) for inputs, _ in rows} for rows in examples.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 20
    assert "20 texts stand there more than once, with different answers" in told


def test_a_pair_loses_the_end_of_its_longer_half_and_nothing_is_lost_if_it_fits(tokenizer):
    pairs = [(30, 3), (3, 30), (30, 30), (5, 9), (5, 10)]
    rows = [f"{'a' * left}\t{'b' * right}\t{i % 2}" for left, right in pairs * 4 for i in (0, 1)]
    write_lines("t.tsv", "premise\thypothesis\tlabel", rows)
    letters = data.train_tokenizer([], 300)  # a token is a byte
    _, examples, told = examples_of("t.tsv", letters, 16)
    texts = [letters.decode(i.tolist()) for rows in examples.values() for i, _ in rows]
    cut = {(11, 3), (3, 11), (7, 7), (5, 9)}  # 14 letters and two end tokens
    assert {(text.count("a"), text.count("b")) for text in texts} == cut
    assert "32 cut to 16 tokens" in told
    with pytest.raises(ValueError, match="^context 1: too short for 2 texts and an answer"):
        examples_of("t.tsv", letters, 1)


# --------------------------------------------------------------------------------- scores


def test_scores_are_what_one_computes_by_hand():
    said, true = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    two = {"accuracy": 0.75, "f1": (2 / 3 + 4 / 5) / 2, "matthews": 2 / 12**0.5}
    assert train.scores(2, said, true) == pytest.approx(two)
    two.pop("matthews")
    assert train.scores(5, said, true) == pytest.approx(two)  # classes that are absent don't count
    said, true = torch.tensor([[1.0, 2, 3, 4], [1, 2, 2, 9]])
    expected = {"pearson": 12 / 205**0.5, "spearman": 4.5 / 22.5**0.5}
    assert train.scores(1, said, true) == pytest.approx(expected)
    assert train.scores(1, said, torch.ones(4)) == {"pearson": 0.0, "spearman": 0.0}


def test_scores_are_those_of_scikit_learn_and_scipy():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 4):
        said, true = torch.randint(classes, (2, 50), generator=generator)
        said[said == 3] = 0  # a class that is never said
        found = train.scores(classes, said.float(), true.float())
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))
        assert found["f1"] == pytest.approx(metrics.f1_score(true, said, average="macro"))
        if classes == 2:
            assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(true, said))
    said = torch.randn(50, generator=generator).round(decimals=1)  # with ties
    true = said + torch.randn(50, generator=generator).round()
    found = train.scores(1, said, true)
    assert found["pearson"] == pytest.approx(stats.pearsonr(said, true).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(said, true).statistic)


@pytest.mark.parametrize("column", ["score", "label"])
def test_scores_are_learned_by_squared_error_with_one_output(home, capsys, column):
    rng = random.Random(0)
    rows = []
    for i in range(200):
        count = rng.randint(0, 8)
        words = " ".join(["rank"] * count + ["time"] * (8 - count))
        rows.append(f"{words} {i % 7}\t{count / 2 - 100}")  # -100 is a score as any other
    write_lines("t.tsv", f"sentence\t{column}", rows)
    line = f"{TINY} --task t.tsv --method full --steps 150 --batch-size 16 --lr 0.05"
    finished = run(line)
    first, last = finished.log[0], finished.log[-1]
    true = torch.tensor([targets[-1] for _, targets in finished.examples["test"]])
    assert first["test_loss"] == pytest.approx(true.square().mean().item(), rel=1e-5)
    assert last["test_loss"] < 2 and last["test_pearson"] > 0.5 and last["test_spearman"] > 0.5
    assert finished.model.head.shape == (1, 16)
    assert "squared error" in capsys.readouterr().out


# ------------------------------------------------------------------- prompts and answers


def test_a_prompt_and_its_answer_train_on_the_answer_and_are_scored_as_greedy_writing(home, capsys):
    kinds = [(word, kind) for kind, words in WORDS.items() for word in words]
    rows = [f"{word} {i}\t{kind} {i % 2}" for i in range(20) for word, kind in kinds]
    write_lines("t.tsv", "prompt\tanswer", rows)
    finished = run(f"{TINY} --task t.tsv --method full --steps 60 --batch-size 16 --lr 0.01")
    tokenizer, gpt, end = finished.tokenizer, finished.model.eval(), 0
    answers = {row.texts[0]: row.answer for row in finished.task.rows}
    loss = count = right = 0
    for inputs, targets in finished.examples["test"]:
        known = targets != data.NO_TARGET
        prompt = inputs[: known.int().argmax() + 1].tolist()
        answer = targets[known].tolist()
        assert prompt[-1] == answer[-1] == end
        assert answers[tokenizer.decode(prompt)] == tokenizer.decode(answer)
        logits = gpt(inputs[None])[0, len(prompt) - 1 :]  # all that predict the answer
        loss += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
        right += model.generate(gpt, prompt, len(answer), top_k=1)[len(prompt) :] == answer
    last = finished.log[-1]
    assert last["test_loss"] == pytest.approx(loss / count, rel=1e-4)
    assert last["test_exact_match"] == pytest.approx(right / len(finished.examples["test"]))
    assert 0.1 < last["test_exact_match"] < 0.9
    told = capsys.readouterr().out.partition("after adapting")[2]
    assert f"perplexity {math.exp(last['test_loss']):.2f}, exact match" in told
    assert told.count("\nprompt  ") == told.count("\nanswer  ") == told.count("\ngenerated  ") == 3


def test_an_answer_longer_than_the_context_leaves_half_of_it_to_the_prompt(tokenizer):
    write_lines("t.tsv", "prompt\tanswer", [f"{'rank ' * 30}{i}\t{'time ' * 30}" for i in range(9)])
    _, examples, told = examples_of("t.tsv", tokenizer)
    for inputs, targets in examples["train"]:
        assert len(inputs) == 16 and (targets != data.NO_TARGET).sum() == 8
    assert "9 cut to 16 tokens" in told


def test_the_texts_of_a_meaning_of_e2e_stay_in_one_split(tokenizer):
    rows = [f"name : {i // 3}|| text {i} || more. \r" for i in range(60)] + ["", " "]
    write_lines("e2e.txt", None, rows)
    task, examples, _ = examples_of("e2e.txt", tokenizer, 64)
    row = task.rows[4]
    assert (task.kind, row.texts, row.answer) == ("text", ("name : 1",), "text 4 || more.")
    meanings = []
    for rows in examples.values():
        prompts = [i[: (t >= 0).int().argmax()] for i, t in rows]
        meanings.append({tokenizer.decode(prompt.tolist()) for prompt in prompts})
    assert sum(map(len, meanings)) == len(set.union(*meanings)) == 20
    write_lines("e2e.txt", None, ["a||b", "no text||"])
    with pytest.raises(ValueError, match=r"^task e2e.txt: line 2 is not meaning\|\|text"):
        data.load_task("e2e.txt")


def write_squad(passage: str, answers: list, question: str = "where?") -> None:
    articles = []
    for i in range(20):
        qas = [{"id": str(i), "question": question, "answers": answers}]
        articles.append({"paragraphs": [{"context": f"{passage} {i}", "qas": qas}]})
    Path("squad.json").write_text(json.dumps({"data": articles}), encoding="utf-8")


def test_a_passage_of_squad_is_cut_to_the_answer_in_training_and_to_its_start_in_evaluation(
    tokenizer,
):
    passage = "é😀 " * 20 + "the rank is here " + "and more " * 20
    for start, answers in ((60, "the rank"), (77, "and"), (None, "unanswerable")):
        found = [] if start is None else [{"text": answers, "answer_start": start}]
        write_squad(passage, found)
        task, examples, told = examples_of("squad.json", tokenizer, 48)
        assert "20 cut to 48 tokens" in told
        assert {row.answer for row in task.rows} == {answers}
        for split, rows in examples.items():
            for inputs, targets in rows:
                known = targets != data.NO_TARGET
                read = tokenizer.decode(inputs[: known.int().argmax()].tolist())
                assert read.endswith("where?")
                assert read.startswith("é😀 é😀") == (split != "train" or start is None)
                assert (answers in read) == (split == "train" and start is not None)
                assert tokenizer.decode(targets[known].tolist()) == answers
    _, examples, told = examples_of("squad.json", tokenizer, 512)
    assert "0 cut to 512 tokens" in told


@pytest.mark.parametrize(
    "passage, answers, question",
    [
        ("é the rank", [{"text": "the", "answer_start": 3}], "where?"),  # counted in bytes
        ("the rank", [{"text": "the", "answer_start": -1}], "where?"),
        ("the rank", [{"text": "the", "answer_start": "0"}], "where?"),
        ("the rank", [{"text": "", "answer_start": 0}], "where?"),
        ("the rank", {"text": ["the"], "answer_start": [0]}, "where?"),  # datasets' own layout
        ("the rank", [], None),
    ],
)
def test_what_is_not_squad_is_one_line(home, passage, answers, question):
    write_squad(passage, answers, question)
    with pytest.raises(ValueError, match="^task squad.json: not SQuAD's JSON, or cut short"):
        data.load_task("squad.json")
    whole = Path("squad.json").read_text()
    Path("squad.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="^task squad.json: not SQuAD's JSON, or cut short"):
        data.load_task("squad.json")


# --------------------------------------------------------------------- folders of GPT-2


def change_json(path: str, **changes) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def test_a_tokenizer_forgets_truncation_and_padding_and_an_end_tokens_letters_are_letters(home):
    publish_gpt2("tiny")
    text = "the rank of the core grows <|endoftext|> and more"
    plain = train.open_base(model.load_gpt2("tiny"), "tiny")[0].encode(text).ids
    again = data.Tokenizer.from_file("tiny/tokenizer.json")
    again.enable_truncation(4)
    again.enable_padding(length=64)
    again.save("tiny/tokenizer.json")
    assert train.open_base(model.load_gpt2("tiny"), "tiny")[0].encode(text).ids == plain
    assert len(plain) > 20 and data.end_token(again) not in plain


def test_another_end_token_ends_texts_and_none_is_refused(home, capsys):
    publish_gpt2("tiny")
    words = Path("tiny/tokenizer.json").read_text()
    line = f"{TEXT} --base tiny --context 8"
    Path("tiny/tokenizer.json").write_text(words.replace("<|endoftext|>", "</s>"))
    finished = run(line)
    assert 0 in finished.examples["train"].tokens and data.end_token(finished.tokenizer) == 0
    Path("tiny/tokenizer.json").write_text(words.replace("<|endoftext|>", "<nothing>"))
    assert "its tokenizer has no token that ends a text" in refusal(line, capsys)


@pytest.mark.parametrize(
    "key, value",
    [
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-12),
        ("n_inner", 40),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("model_type", "gpt_neo"),
    ],
)
def test_a_key_that_would_change_the_function_is_refused_by_name_and_value(home, key, value):
    publish_gpt2("tiny")
    same = {"n_inner": 48, "reorder_and_upcast_attn": True, "layer_norm_epsilon": 1e-5}
    change_json("tiny/config.json", **same)
    model.load_gpt2("tiny")
    change_json("tiny/config.json", **{key: value})
    with pytest.raises(ValueError, match=f"^base tiny: config.json has {key} {value}, and only"):
        model.load_gpt2("tiny")


@pytest.mark.parametrize(
    "weights, said",
    [
        ({"score.weight": torch.ones(2, 12)}, "score.weight is of another kind of model"),
        ({"lm_head.weight": torch.ones(300, 12)}, "its lm_head is not the token embedding"),
        ({"h.0.mlp.c_fc.weight": torch.ones(12, 47)}, "weights do not fit"),
        ({"model": {}}, "holds something else than tensors"),
        ([], "holds something else than tensors"),
        ({}, "its weights have no wte.weight"),
        (b"version https://git-lfs.github.com/spec/v1\noid 1", "only points to it; run git lfs"),
        (b"PK", "not weights that can be read"),
        ("shards", "its weights are in several shards"),
        ("tokenizer", "its tokenizer has 320 tokens and its model 300"),
        ("letter", "tokenizer.json is not UTF-8 text"),
        ("heads", "config.json has sizes that no GPT-2 has: .*heads=5, width=12"),
    ],
)
def test_a_folder_that_is_no_plain_gpt2_is_one_line_that_says_what_it_is(
    home, capsys, weights, said
):
    path = Path("tiny/pytorch_model.bin")
    named = publish_gpt2("tiny")
    if isinstance(weights, bytes):
        path.write_bytes(weights)
    elif weights == "shards":
        path.rename("tiny/pytorch_model-00001-of-00002.bin")
        Path("tiny/pytorch_model.bin.index.json").touch()
    elif weights == "tokenizer":
        larger = data.train_tokenizer(["more and more words of all kinds"] * 9, 320)
        larger.add_tokens([f"word {i}" for i in range(320 - larger.get_vocab_size())])
        larger.save("tiny/tokenizer.json")
    elif weights == "letter":
        words = Path("tiny/tokenizer.json").read_bytes()
        Path("tiny/tokenizer.json").write_bytes(words[: words.index("Ġ".encode()) + 1])
    elif weights == "heads":
        change_json("tiny/config.json", n_head=5)
    else:
        torch.save(named | weights if weights else weights, path)
    assert re.search(f"--base tiny.*{said}", refusal(f"{TEXT} --base tiny --context 8", capsys))


# --------------------------------------------------------------------- trust, and no loss


def test_resume_refuses_other_rows_text_weights_or_tokenizer_under_the_old_name(home, capsys):
    run(f"{TEXT} --rank 2 --out text")
    run(f"{TASK} --rank 2 --out task")
    base = torch.load("base.pt", weights_only=True)
    table = Path("task.tsv").read_text().splitlines()
    words = json.loads(base["tokenizer"])
    words["model"]["merges"] = words["model"]["merges"][:-1]
    weights = base["model"] | {"wpe.weight": base["model"]["wpe.weight"] + 1e-6}
    changes = [
        ("task", "content of task.tsv", "task.tsv", [table[0], "a new one\tsize", *table[1:]]),
        ("task", "content of task.tsv", "task.tsv", [table[0], *sorted(table[1:])]),
        ("text", "content of text.txt", "text.txt", ["x" + Path("text.txt").read_text()[1:]]),
        ("text", "weights of base.pt", "base.pt", base | {"model": weights}),
        ("task", "tokenizer of base.pt", "base.pt", base | {"tokenizer": json.dumps(words)}),
    ]
    for folder, what, file, content in changes:
        before = Path(file).read_bytes()
        if isinstance(content, dict):
            torch.save(content, file)
        else:
            write_lines(file, None, content)
        said = refusal(f"--resume {folder}", capsys)
        assert f"--resume {folder}: the {what} changed since then" in said
        Path(file).write_bytes(before)
        run(f"--resume {folder}")


def test_a_full_disk_is_one_line_and_leaves_old_files_whole_and_nothing_else(home, capsys):
    resource = pytest.importorskip("resource")
    run(TEXT)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file can get longer than the old adapter
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[Path("out/adapter.pt")]), limits[1]))
        assert "out/checkpoint.pt: can't be written (File too large)" in refusal(TEXT, capsys)
        assert "merged.pt: can't be" in refusal("--resume out --merge merged.pt", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {*Path("out").iterdir()} == {*before} and not [*Path().glob("*merged*")]
    assert Path("out/checkpoint.pt").read_bytes() == before[Path("out/checkpoint.pt")]
    torch.load("out/adapter.pt", weights_only=True)


def test_a_second_run_into_a_folder_needs_no_rename_that_replaces(home, monkeypatch):
    def windows(source, target, **_):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists")

    monkeypatch.setattr(os, "rename", windows)
    run(f"{TEXT} --out a")
    run(f"{TEXT} --out b --seed 1")
    run(f"{TEXT} --out a --seed 1")
    assert_same_bits("a", "b")


@pytest.mark.parametrize("name", ["a$b_{$ 100%.txt", "天 bytes\udcff.txt"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_name_of_any_letters_survives_console_files_and_figure(home, capsys, name):
    Path("text.txt").rename(name)
    finished = run(f"{TINY} --data '{name}' --out 'out of {name}'")
    assert draw_run(finished.log).startswith(b"\x89PNG")
    run(f"--resume 'out of {name}'")


def python(code: str, **environment) -> subprocess.CompletedProcess:
    """This code with the project importable, as a process of its own."""
    environment = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | environment
    fast = "train.draw_run = lambda log: b''"
    command = [sys.executable, "-c", f"import os, signal, train\n{fast}\n{code}"]
    return subprocess.run(command, capture_output=True, env=os.environ | environment)


def test_files_are_utf8_and_the_console_lives_whatever_the_locale_says(home):
    publish_gpt2("tiny")
    text = "Строка: съешь ещё этих мягких булок, да выпей чаю.\n" * 100
    Path("text.txt").write_text(text, encoding="utf-8")
    line = f"{TEXT} --base tiny --context 8".split()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python(f"train.main({line})", **ascii_only, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    log = Path("out/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[-1])["sample"].isprintable() is False and b"?" in done.stdout


def test_a_rank_without_a_world_size_is_one_process():
    assert python("print(train.PROCESS, train.WORLD)", RANK="3").stdout.split() == [b"0", b"1"]


KILLED = """
def write_bytes(path, content, write=train.Path.write_bytes, calls=[]):
    calls.append(path)
    if len(calls) == LAST:
        write(path, bytes(content)[:99])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

train.Path.write_bytes = write_bytes
"""


@pytest.mark.parametrize("write", [5, 6, 10])
def test_a_run_killed_while_it_writes_a_file_resumes_to_the_same_bits(home, write):
    """After 8 steps it writes three files, after 16 three, then the picture and three."""
    run(f"{TEXT} --out whole")
    assert python(f"LAST = {write}{KILLED}train.main({TEXT.split()})").returncode == -signal.SIGKILL
    run("--resume out")
    assert_same_bits("whole", "out")
    assert Path("out/adapter.pt").read_bytes() == Path("whole/adapter.pt").read_bytes()
    assert Path("out/run.png").exists() and '"end"' in Path("out/log.jsonl").read_text()
