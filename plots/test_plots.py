"""Tests of plots/: pytest plots"""

import json
import os
import statistics
import subprocess
import sys
import warnings
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from PIL import Image

import train
from plots import compare, pictures, run

KINDS = ("q", "k", "fc")


def make_log(method="triadapt", schedule="linear", kinds=KINDS, loss=3.0, seed=0, **settings):
    """A log as train.py writes it: two blocks, six steps, an evaluation every two."""
    defaults = {"data": "prose", "base": "base.pt", "context": None, "steps": 6, "warmup": 1}
    settings = defaults | {"method": method, "schedule": schedule, "seed": seed} | settings
    ranks = {} if method == "full" else {f"blocks.{i}.{kind}": 2 for i in (0, 1) for kind in kinds}
    budget = None if schedule == "none" else 2 * len(ranks) + 2
    log = []

    def note(kind, step, **values):
        importance = {name: 0.1 * i + 0.01 * step * i for i, name in enumerate(ranks)}
        state = {"ranks": dict(ranks), "total_rank": sum(ranks.values()), "trainable": 100 + seed}
        state |= {"importance": importance if method == "triadapt" else {}, "seconds": 1.0 + step}
        log.append({"kind": kind, "step": step} | state | values)

    note("start", 0, settings=settings, budget=budget, test_loss=4.0, test_perplexity=54.6)
    for step in (2, 4, 6):
        if budget and sum(ranks.values()) < budget:
            grown = f"blocks.{step // 4}.{kinds[0]}"
            ranks[grown] += 1
            note("allocation", step, grown=[grown], threshold=0.1, scores={grown: 0.1})
        measured = {"lr": 0.01, "grad_norm": 0.5, "tokens_per_second": 1000.0}
        note("eval", step, train_loss=loss, val_loss=loss + 0.1 / step, **measured)
    note("end", 6, test_loss=loss, test_perplexity=20.1)
    return log


def write_log(folder: Path, log: list[dict]) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(entry) + "\n" for entry in log]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


# The figure of a run.


@pytest.mark.parametrize(
    "log, last_panel",
    [
        (make_log(), "How does the importance of each kind change?"),
        (make_log(schedule="none"), "How does the importance of each kind change?"),
        (make_log("lora", "none"), "Is the training stable?"),
        (make_log("full", "none"), "How large are the steps?"),
        (make_log()[:3], "How does the importance of each kind change?"),
        (make_log("lora", "none")[:1], "Is the training stable?"),
    ],
    ids=["triadapt", "no growth", "lora", "full", "stopped", "only started"],
)
def test_every_kind_of_run_is_drawn(log, last_panel):
    figure = run.make_figure(log)
    assert figure.axes[3].get_title() == last_panel
    assert ("not finished" in figure.get_suptitle()) == (log[-1]["kind"] != "end")
    assert run.to_png(figure, dpi=20).startswith(b"\x89PNG")


def test_full_run_shows_the_gradient_norm():
    axes = run.make_figure(make_log("full", "none")).axes[1]
    assert axes.get_ylabel() == "gradient norm (no unit)"
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.5, 0.5]


def test_importance_has_a_line_per_kind():
    log = make_log()
    axes = run.Figure().subplots()
    run.draw_importance(axes, log)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert list(lines) == list(KINDS)
    final = log[-1]["importance"]
    mean = (final["blocks.0.k"] + final["blocks.1.k"]) / 2
    assert lines["k"][-1] == pytest.approx([6, mean])


def test_importance_is_relative_to_an_untrained_core():
    log = make_log()
    for entry in log:
        entry["importance"] = dict.fromkeys(log[0]["importance"], 4**-0.5)
        entry["ranks"] = dict.fromkeys(log[0]["ranks"], 4)
    log[-1]["ranks"] = dict.fromkeys(log[0]["ranks"], 16)
    axes = run.Figure().subplots()
    run.draw_importance(axes, log)
    assert axes.lines[-1].get_label() == "untrained"
    values = list(axes.lines[0].get_ydata())
    assert values[0] == 1 and values[-1] == 2  # an untrained core of rank 16 has F = 1 / 4


def test_of_many_kinds_six_are_shown():
    axes = run.Figure().subplots()
    run.draw_importance(axes, make_log(kinds="abcdefgh"))  # later ones change more
    assert [line.get_label() for line in axes.lines] == list("cdefgh")
    assert "6 of 8" in axes.get_title()


def test_total_rank_shows_budget_and_warmup():
    axes = run.Figure().subplots()
    run.draw_total_rank(axes, make_log())
    labels = axes.get_legend_handles_labels()[1]
    assert {"budget, 14", "warm-up, to step 1", "budget spent at step 4"} <= set(labels)
    assert axes.patches[0].get_width() == 1  # the warm-up


def test_any_letters_in_names_are_drawn():
    log = make_log(data="$\\no_math$ \udcff 文.txt", kinds=("$\\q$", "文"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.draw_run(log)


def test_backend_that_is_not_installed(tmp_path):
    folder = write_log(tmp_path / "run", make_log())
    environment = os.environ | {"MPLBACKEND": "not_installed"}
    command = [sys.executable, run.__file__, str(folder)]
    subprocess.run(command, env=environment, check=True)
    assert (folder / "run.png").exists()


# The comparison.


def test_groups_are_the_settings_that_differ():
    logs = [make_log(rank=rank, seed=seed, loss=1 / rank) for rank in (4, 8) for seed in (0, 1)]
    groups = compare.group_runs(logs)
    assert list(groups) == ["rank 8", "rank 4"]  # the lowest loss first
    assert groups["rank 4"] == logs[:2]


def test_table_has_mean_and_deviation():
    losses = [3.1, 3.2, 3.6]
    logs = [make_log(loss=loss, seed=seed) for seed, loss in enumerate(losses)]
    logs.append(make_log(loss=9.0, seed=3)[:-1])  # not finished
    row = compare.make_table(compare.group_runs(logs)).splitlines()[-1].split()
    deviation = statistics.stdev(losses)
    assert row == ["all", "runs", "3", "3.3000", f"{deviation:.4f}", "101", "7"]


def test_repeats_and_unfinished_runs_are_named():
    logs = {"a": make_log(), "b": make_log(), "c": make_log()[:3], "d": make_log(data="code")}
    selected, notes = compare.select(logs)
    assert selected == [logs["a"], logs["c"], logs["d"]]
    for start in ("b is left out", "c is not finished (step 2 of 6)", "these runs differ in data"):
        assert any(note.startswith(start) for note in notes)
    other = make_log()
    other[-1]["test_loss"] += 0.1  # another version of a fork, for example
    selected, notes = compare.select({"a": logs["a"], "other": other})
    assert len(selected) == 2
    assert notes == ["other has the settings and seed of a, but another loss"]
    other[0]["lr_ratios"] = [16.0, 1.0]
    assert len(compare.group_runs([logs["a"], other])) == 2


def test_table_fits_its_width():
    many = {f"setting_{i}": "x" * i for i in range(20)}
    logs = [make_log(), make_log("lora", "none", data="/long" * 30, **many)]
    lines = compare.make_table(compare.group_runs(logs)).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].endswith("seconds")


def test_each_group_has_its_color():
    logs = [make_log(rank=rank) for rank in (2, 4, 8)] + [make_log("lora", "none")]
    groups = compare.group_runs(logs)
    colors = compare.colors_of(groups)
    assert len(set(colors)) == 4
    assert (colors[0], colors[3]) == (run.COLORS["linear"], run.COLORS["lora"])
    loss, rank, result = compare.make_figure(groups).axes
    for axes in (loss, rank):
        assert [line.get_color() for line in axes.lines] == colors
    assert len(result.lines) == len(groups)  # no mean of one seed
    logs.append(make_log("lora", "none", seed=1))
    (*_, result) = compare.make_figure(compare.group_runs(logs)).axes
    assert len(result.lines) == len(groups) + 1


def test_comparison_replaces_no_file(tmp_path, capsys):
    folders = [
        str(write_log(tmp_path / "a", make_log(data="文.txt"))),
        str(write_log(tmp_path / "b", make_log("full", "none", data="\udcff"))),
    ]
    compare.main(folders)
    compare.main([*folders, str(tmp_path / "compare.png")])  # as the shell expands runs/*
    out = capsys.readouterr().out
    assert "one seed of each cannot tell them apart" in out
    for name in ("compare.png", "compare-2.png"):
        assert f"look at {tmp_path / name}" in out
        assert (tmp_path / name).exists()
    with pytest.raises(SystemExit):
        compare.main([*folders, "--out", str(tmp_path / "compare.png")])


# The pictures of README.


def test_method_picture_shows_what_is_new():
    figure = pictures.draw_method()
    colors = Counter(to_hex(bar.get_facecolor()).upper() for bar in figure.axes[0].patches)
    expected = {"trained": 18 + 6 + 6 + 15, "new, 0": 6 + 3 + 4, "new, 1": 1, "new, random": 5}
    assert colors == {pictures.ENTRIES[kind]: count for kind, count in expected.items()}
    assert figure.get_suptitle().endswith("changes by 0")


def test_growth_picture_spends_the_budget():
    (axes,) = pictures.draw_growth().axes
    for line in axes.lines[:3]:
        assert (line.get_ydata()[0], line.get_ydata()[-1]) == (96, 192)
    labels = [line.get_label() for line in axes.lines[:3]]
    assert [label.rpartition(" ")[2] for label in labels] == ["121", "191", "126"]


def test_moving_picture_frames_follow_the_log():
    log = make_log()
    gif = Image.open(BytesIO(pictures.animate(log)))
    assert gif.n_frames == len(log) - 1
    first = pictures.draw_frame(log, 0)  # before the first evaluation
    run.to_png(first)  # computes the layout
    assert first.axes[0].get_position().width > 0.4
    ranks, total, loss = pictures.draw_frame(log, 3).axes  # the second allocation
    boxes = [box for box in ranks.patches if to_hex(box.get_edgecolor()).upper() == run.RED]
    assert [round(box.get_x() + box.get_width() / 2) for box in boxes] == [0]
    assert [round(box.get_y() + box.get_height() / 2) for box in boxes] == [1]
    assert total.lines[0].get_ydata()[-1] == 14
    assert len(loss.lines[0].get_xdata()) == 1


def test_log_of_train_is_understood(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} comes before {i + 1}." for i in range(200)))
    out = tmp_path / "run"
    sizes = "--context 8 --batch-size 2 --steps 2 --warmup 0 --init-rank 7"
    train.main([*sizes.split(), "--data", str(text), "--out", str(out)])
    log = run.read_log(out)
    kinds = [entry["kind"] for entry in log]
    assert kinds == ["start", "allocation", "eval", "allocation", "eval", "end"]
    assert pictures.draw_frame(log, 3)
    assert compare.make_table(compare.group_runs([log])).split()[-7:-4] == ["all", "runs", "1"]
    assert (out / "run.png").read_bytes().startswith(b"\x89PNG")
