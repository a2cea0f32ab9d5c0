"""Tests of the experiments at their smallest size: pytest extras/experiments"""

import json
import statistics

import pytest
import torch
import transformers
from torch import nn

from extras.experiments import bench, blind, run, tables
from extras.experiments.minilm import Encoder
from extras.experiments.run import Experiment, Job


def result(row: str, rate: float | None, seed: int, val_loss: float = 1.0) -> dict:
    return {"row": row, "rate": rate, "seed": seed, "val_loss": val_loss}


def test_tuning_goes_on_until_the_best_rate_is_inside():
    experiment = Experiment({"LoRA": ""}, "", range(1, 3), [1.0, 2.0, 4.0], also={"LoRA": 1.0})
    losses = {0.25: 0.9, 0.5: 0.2, 1.0: 0.3, 2.0: 0.4, 4.0: 0.5}
    results, tuned = [], []
    while job := next(run.jobs(experiment, results), None):
        results.append(result(job.row, job.rate, job.seed, losses[job.rate]))
        tuned += [job.rate] if job.seed == 101 else []
    assert tuned == [1.0, 2.0, 4.0, 0.5, 0.25]
    reported = [(line["rate"], line["seed"]) for line in results if line["seed"] < 100]
    assert reported == [(0.5, 1), (1.0, 1), (0.5, 2), (1.0, 2)]


def test_rates_of_full_fine_tuning_are_lower():
    experiment = Experiment({"full": "--method full"}, "", range(1), [1e-3])
    assert [*run.jobs(experiment, [])][0] == Job("full", 1e-4, 101)


def test_runner_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    rows = {"LoRA": "--method lora", "random": "--allocator random:parameters"}
    smallest = Experiment(rows, "--data prose --eval-interval 4", range(1, 3))
    monkeypatch.setitem(run.EXPERIMENTS, "pace", smallest)
    path = tmp_path / "results.jsonl"
    arguments = ["pace", "--results", str(path), "--extra", "--steps 4 --context 16"]
    run.main(arguments)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == ["LoRA", "random", "LoRA", "random"]
    assert "random, rate None, seed 2" in capsys.readouterr().out
    path.write_text("\n".join(lines[:3]) + "\n")
    run.main(arguments)  # only the last one, and to the same bits
    again = json.loads(path.read_text().splitlines()[3])
    assert again | {"seconds": 0} == json.loads(lines[3]) | {"seconds": 0}
    assert again["trainable"] <= json.loads(lines[0])["trainable"] == 73_728
    assert again["test_loss"] < again["before"]


@pytest.mark.parametrize("line", ["pace --folder x", "MPQA", "pace --extra=--steps=4"])
def test_results_of_other_runs_stay_apart(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(line.split())
    said = capsys.readouterr().err
    assert "--folder: MPQA and SST-2 need it" in said or "--extra: give --results" in said


def test_a_diverged_run_counts_with_its_start(tmp_path):
    experiment = Experiment({"LoRA": "--method lora --lr 1e30"}, "--data prose", range(1))
    line = run.run(experiment, Job("LoRA", None, 0), "--steps 4 --context 16 --eval-interval 4")
    assert line["diverged"] and line["test_loss"] == line["before"] == line["val_loss"]


def test_encoder_keeps_texts_apart():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=200,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    encoder = Encoder(bert, context=8)
    encoder.head = nn.Linear(16, 3)
    batch = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])  # 0 is padding
    logits = encoder(batch)
    assert logits.shape == (2, 4, 3)
    for row, text in enumerate(([101, 5, 6, 7, 8], [101, 9, 10])):
        mean = bert(input_ids=torch.tensor([text])).last_hidden_state.mean(1)
        torch.testing.assert_close(logits[row], encoder.head(mean).expand(4, 3))


def test_importance_does_not_see_how_much_a_loss_counts():
    ratios = blind.score_ratios(10)
    assert ratios == pytest.approx({"importance": 1.0, "norm": 1.0, "worth": 100.0}, rel=1e-3)


def test_benchmark_times_all_variants(tmp_path):
    path = tmp_path / "cost.jsonl"
    bench.main(["--results", str(path), "--rounds", "3", "--sizes", "1"])
    ratios = json.loads(path.read_text())["ratios"]
    assert [*ratios] == bench.VARIANTS and ratios["LoRA"] == [1.0, 1.0, 1.0]
    assert all(low > 0 for low, _, _ in ratios.values())


def test_intervals_and_their_correction():
    one = tables.interval([1.0, 2.0, 3.0])
    assert str(one) == "+2.0000 ± 2.4841" and one.p == pytest.approx(0.0742, abs=1e-4)
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_pages_hold_the_numbers_of_the_results():
    for path in tables.PAGES:
        page = path.read_text(encoding="utf-8")
        assert tables.fill(page) == page, path


def test_readme_pace_is_that_of_eight_seeds():
    page = (tables.ROOT / "README.md").read_text(encoding="utf-8")
    differences = tables.pace_differences("importance")
    assert [len(values) for values in differences.values()] == [8] * 5
    one, five, twenty = (tables.interval(differences[steps]) for steps in (1, 5, 20))
    paces = differences[20], differences[1]
    last = tables.interval([slow - fast for slow, fast in zip(*paces, strict=True)])
    assert f"The last minus the first is {last} (" in page
    words = f"is {one} with an allocation at every step, {five} at every fifth, and {twenty} at"
    assert words in page


def test_sentences_of_results_have_their_numbers():
    page = (tables.ROOT / "extras/RESULTS.md").read_text(encoding="utf-8")

    def difference(task, row, other):
        return tables.interval([*tables.differences(task, row, other).values()])

    modules = difference("modules", "importance", "random")
    words = f"Random growth was ahead of the importance by {modules.mean:.4f} ± {modules.half:.4f}"
    assert words in page and f"So it did on modules ({tables.stability('modules')})" in page
    tuned = {
        task: {
            row: run.validation_losses(run.EXPERIMENTS[task], row, tables.results(task))
            for row in ("LoRA", "importance", "random", "uniform", "worth")
        }
        for task in tables.NEW_TASKS
    }
    at_4e3 = {row: losses[0.004] for row, losses in tuned["SST-2"].items()}
    assert f"(mean validation loss {at_4e3.pop('LoRA'):.4f})" in page
    assert f"({min(at_4e3.values()):.4f} to {max(at_4e3.values()):.4f})" in page
    best = {task: [min(own, key=own.get) for own in tuned[task].values()] for task in tuned}
    assert best == {
        "MPQA": [0.002, 0.001, 0.001, 0.001, 0.001],
        "SST-2": [0.002, 0.004, 0.002, 0.002, 0.002],
    }
    ends = [
        line["last_growth"]
        for task in tables.NEW_TASKS
        for row in ("importance", "random", "uniform", "worth")
        for line in tables.reported(task, row).values()
    ]
    assert f"growth ends at step {statistics.median(ends):.0f} (median)" in page
    earlier = {
        (task, row): next(iter(tables.reported(task, row).values()))["rate"]
        for task in ("CoLA", "prose")
        for row in ("LoRA", "importance")
    }
    assert [*earlier.values()] == [0.001, 0.001, 0.005, 0.01]
    words = "LoRA has chosen {}, and the importance {}.".format(*[*earlier.values()][2:])
    assert f"On CoLA both rows have chosen {earlier['CoLA', 'LoRA']}. On prose {words}" in page
    last = {}  # steps between allocations: the last step with growth
    for line in tables.results("pace"):
        last.setdefault(line["row"].rpartition(" ")[2], []).append(line["last_growth"])
    slow, fast = (statistics.mean(last[steps]) for steps in ("20", "1"))
    assert (
        f"step {slow:.0f} of 300 had a higher loss than growth that ended at step {fast:.0f}"
        in page
    )
    words = "On the mean of MPQA and SST-2, worth minus half-rate LoRA is"
    both = tables.interval(tables.means_of_both("worth", "half-rate LoRA"))
    assert f"{words} {both}." in page
    words = "On SST-2 half-rate importance minus random is"
    assert f"{words} {difference('SST-2', 'half-rate importance', 'random')}." in page
