import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import edit_run

import vit_jax
from configs import digits
from vit_jax import compare, report, trainer
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.types import Split
from vit_jax.visualization import plotting

plot_accuracies = plotting.plot_accuracies


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directory of two finished runs, `full` and `head`."""
    directory = tmp_path_factory.mktemp("runs")
    for name, changes in {"full": {}, "head": {"trainable": "head"}}.items():
        config = digits.get_config("scratch")
        config.model = dict(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16)
        config.update(num_steps=20, warmup_steps=5, eval_every_steps=20, checkpoint_every_steps=20, **changes)
        trainer.train_and_evaluate(config, directory / name)
    return directory


def test_compare_runs_returns_results_of_each_run(runs):
    lines = (runs / "full/metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line).get("images_per_second") for line in lines]
    full, head = compare.compare_runs([runs / "full", runs / "head"])
    # Embedding 784, cls 16, positions 17 · 16; block: two norms, four of 16 · 16 + 16, two of MLP; norm; head 170.
    assert full.num_trainable == 784 + 16 + 272 + 64 + 4 * 272 + 2 * 272 + 32 + 170
    assert head.num_trainable == 170
    last = json.loads((runs / "head/metrics.jsonl").read_text().splitlines()[-1])
    assert head.results["test/accuracy"] == last["test/accuracy"]
    assert full.cells()["images"] == "1,280"
    assert full.seconds == pytest.approx(sum(10 * 64 / speed for speed in speeds if speed))


def test_main_prints_aligned_markdown_table(run_command, runs):
    result = run_command("-m", "vit_jax.compare", runs / "full", runs / "head")
    assert result.returncode == 0, result.stderr
    header, rule, *rows = result.stdout.splitlines()
    assert [len(line) for line in (rule, *rows)] == [len(header)] * 3
    assert [cell.strip() for cell in rows[1].split("|")[1:4]] == ["head", "head", "170"]
    assert set(rule) == set("|-: ")


@pytest.mark.parametrize(("num_classes", "shown"), [(2, False), (5, False), (6, True)])
def test_format_table_shows_top5_accuracy_of_more_than_five_classes(runs, num_classes, shown):
    row = dataclasses.replace(compare.read_row(runs / "full"), num_classes=num_classes)
    assert ("top-5 accuracy" in compare.format_table([row])) == shown


@pytest.mark.parametrize(("seconds", "text"), [(0.234, "0.2 s"), (59.9, "59.9 s"), (3725.2, "1:02:05")])
def test_cells_shows_short_times_in_seconds(runs, seconds, text):
    assert dataclasses.replace(compare.read_row(runs / "full"), seconds=seconds).cells()["time"] == text


def copy_run(workdir, target, changes, **options):
    """Copies a run and changes the config of the copy."""
    shutil.copytree(workdir, target)
    edit_run(target, changes, **options)
    return target


@pytest.mark.parametrize(
    ("changes", "column", "cells"),
    [
        ({"image_size": 24}, "image size", ["16", "24"]),
        ({"image_mean": [0.485, 0.456, 0.406]}, "image mean", ["0.5, 0.5, 0.5", "0.485, 0.456, 0.406"]),
        ({"image_std": [0.25, 0.5, 0.5]}, "image std", ["0.5, 0.5, 0.5", "0.25, 0.5, 0.5"]),
        ({"ablation.test_augment": "flip"}, "test augment", ["none", "flip"]),
        ({"dataset.data_dir": "/data"}, "data directory", ["default", "/data"]),
        ({"seed": 1}, None, None),
        ({"learning_rate": 0.5}, None, None),
    ],
)
def test_format_table_shows_different_test_settings(runs, tmp_path, changes, column, cells):
    other = copy_run(runs / "full", tmp_path / "other", changes)
    for join_seeds in (False, True):
        rows = compare.compare_runs([runs / "full", other], join_seeds=join_seeds)
        header, _, *lines = (
            [cell.strip() for cell in line.split("|")] for line in compare.format_table(rows).splitlines()
        )
        assert set(header) & compare._test_settings(digits.get_config()).keys() == ({column} - {None})
        if column:
            assert [line[header.index(column)] for line in lines] == cells


@pytest.mark.slow
def test_compare_runs_accepts_run_with_zero_steps(tmp_path):
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16)
    config.update(num_steps=0, warmup_steps=0)
    results = trainer.train_and_evaluate(config, tmp_path)
    assert trainer.train_and_evaluate(config, tmp_path) == results
    for join_seeds in (False, True):
        (row,) = compare.compare_runs([tmp_path], join_seeds=join_seeds)
        assert (row.results["test/accuracy"], row.cells()["images"], row.seconds) == (results["test/accuracy"], "0", 0)
    assert report.write_report(tmp_path).exists()


def test_main_rejects_different_test_images_and_unfinished_runs(run_cli, runs, tmp_path):
    def error_of(**changes):
        other = copy_run(runs / "full", tmp_path / f"other{len(list(tmp_path.iterdir()))}", changes)
        result = run_cli("vit_jax.compare", [runs / "full", other])
        assert result.code == 1
        (line,) = result.stderr.splitlines()
        return line

    assert "were tested on different images" in error_of(**{"dataset.test_split": "test[:50%]"})
    assert "is at step 20 of 40; expected a finished run" in error_of(num_steps=40)


def test_compare_runs_rejects_other_made_test_splits(runs, tmp_path):
    folders = {f"run{seed}": {"dataset.name": "folder:DIR", "dataset.split_seed": seed} for seed in (0, 1)}
    workdirs = [copy_run(runs / "full", tmp_path / name, changes) for name, changes in folders.items()]
    assert len(compare.compare_runs([workdirs[0], workdirs[0]])) == 2
    with pytest.raises(UserError, match="run1: folder:DIR, test, .*, split_seed 1"):
        compare.compare_runs(workdirs)


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["/nowhere"], 1)])
def test_main_rejects_missing_runs_in_one_line(run_cli, argv, code):
    result = run_cli("vit_jax.compare", argv)
    assert result.code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")


def test_compare_runs_joins_seeds(runs, run_cli, tmp_path):
    """Accuracies of 0.5, 0.6 and 0.7 have a mean of 0.6 and a sample std of 0.1."""
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        *lines, last = (runs / "full/metrics.jsonl").read_text().splitlines()
        lines.append(json.dumps({**json.loads(last), "test/accuracy": accuracy}))
        copy_run(runs / "full", tmp_path / f"full-{seed}", {"seed": seed}, metrics="\n".join(lines) + "\n")
    workdirs = [tmp_path / "full-0", runs / "head", tmp_path / "full-1", tmp_path / "full-2"]
    full, head = compare.compare_runs(workdirs, join_seeds=True)
    assert (full.run, full.num_seeds, full.num_trainable) == ("full", 3, 2970)
    assert full.results["test/accuracy"] == pytest.approx(0.6) and full.accuracy_std == pytest.approx(0.1)
    assert (head.run, head.num_seeds, head.accuracy_std) == ("head", 1, 0.0)
    result = run_cli("vit_jax.compare", ["--join_seeds", *workdirs])
    assert result.code == 0, result.stderr
    row = [cell.strip() for cell in result.stdout.splitlines()[2].split("|")]
    assert row[1:7] == ["full", "full", "2,970", "3", "60.00%", "10.00%"]
    assert row[7] == "35.16% to 84.84%"  # Student's t: 4.302653 · 0.1 / √3


def test_main_plots_mean_curve_over_seeds(runs, run_cli, tmp_path, monkeypatch):
    """Means of 0.5, 0.7 and 0.1, 0.3; a step that one of the runs did not evaluate is left out."""
    for seed, accuracies in enumerate(((0.5, 0.1), (0.7, 0.3))):
        *lines, last = (runs / "full/metrics.jsonl").read_text().splitlines()
        record = json.loads(last)
        lines += [json.dumps({**record, "step": step, "test/accuracy": accuracies[0]}) for step in (10 + seed, 15)]
        lines.append(json.dumps({**record, "test/accuracy": accuracies[1]}))
        copy_run(runs / "full", tmp_path / f"full-{seed}", {"seed": seed}, metrics="\n".join(lines) + "\n")
    plotted = []
    monkeypatch.setattr(plotting, "plot_accuracies", lambda runs, name: plotted.append(runs) or plot_accuracies(runs))
    workdirs = [tmp_path / "full-0", tmp_path / "full-1", runs / "head"]
    assert compare.main(["--join_seeds", "--curves", str(tmp_path / "curves.png"), *map(str, workdirs)]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plotted[0]["full"] == [
        {"step": 15, "test/accuracy": pytest.approx(0.6)},
        {"step": 20, "test/accuracy": pytest.approx(0.2)},
    ]
    assert list(plotted[0]) == ["full", "head"]


def test_write_curves_names_runs_of_equal_name_by_path(runs, tmp_path, monkeypatch):
    copy_run(runs / "head", tmp_path / "full", {}, metrics=(runs / "head/metrics.jsonl").read_text())
    plotted = []
    monkeypatch.setattr(plotting, "plot_accuracies", lambda runs, name: plotted.append(runs) or plot_accuracies(runs))
    compare.write_curves(compare.compare_runs([runs / "full", tmp_path / "full"]), tmp_path / "curves.png")
    assert list(plotted[0]) == [str(runs / "full"), str(tmp_path / "full")]


@pytest.mark.parametrize("validated", [(True, True), (True, False)])
def test_main_shows_and_plots_validation_accuracy(runs, run_cli, tmp_path, monkeypatch, validated):
    for name, has_validation in zip(("full", "head"), validated, strict=True):
        *lines, last = (runs / name / "metrics.jsonl").read_text().splitlines()
        lines.append(json.dumps({**json.loads(last), **({"validation/accuracy": 0.75} if has_validation else {})}))
        copy_run(runs / name, tmp_path / name, {}, metrics="\n".join(lines) + "\n")
    plotted = []
    monkeypatch.setattr(plotting, "plot_accuracies", lambda runs, name: plotted.append(name) or plot_accuracies(runs))
    result = run_cli("vit_jax.compare", [tmp_path / "full", tmp_path / "head", "--curves", tmp_path / "curves.png"])
    assert result.code == 0, result.stderr
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in result.stdout.splitlines())
    column = header.index("validation accuracy")
    assert [row[column] for row in rows] == ["75.00%", "75.00%" if validated[1] else "–"]
    assert plotted == ["validation/accuracy" if all(validated) else "test/accuracy"]


def test_compare_runs_joins_seeds_of_different_machines(runs, tmp_path):
    for seed, changes in enumerate(({}, {"mesh.fsdp": 2, "eval_batch_size": 7}, {"dataset.data_dir": "other"})):
        metrics = (runs / "full/metrics.jsonl").read_text()
        copy_run(runs / "full", tmp_path / f"full-{seed}", {**changes, "seed": seed}, metrics=metrics)
    rows = compare.compare_runs([tmp_path / f"full-{seed}" for seed in range(3)], join_seeds=True)
    assert [row.num_seeds for row in rows] == [2, 1]  # another directory may have other images


def test_compare_runs_rejects_repeated_seed(runs, tmp_path):
    copy_run(runs / "full", tmp_path / "copy", {}, metrics=(runs / "full/metrics.jsonl").read_text())
    with pytest.raises(UserError, match=f"^{runs}/full, {tmp_path}/copy have the same config and seed; expected one"):
        compare.compare_runs([runs / "full", tmp_path / "copy"], join_seeds=True)


def test_cells_shows_wilson_interval_of_single_run(runs):
    row = dataclasses.replace(compare.read_row(runs / "full"), num_test=100, results={"test/accuracy": 0.9})
    assert row.interval == pytest.approx((0.825634, 0.944770), abs=1e-6)


def test_main_tests_differences_on_same_images(runs, run_cli):
    result = run_cli("vit_jax.compare", ["--paired", runs / "full", runs / "head", runs / "full"])
    assert result.code == 0, result.stderr
    *_, title, head, full, note = result.stdout.splitlines()
    assert title == "differences to full on the same 360 test images:"
    accuracies = [vit_jax.load(runs / name).evaluate()["test/accuracy"] for name in ("head", "full")]
    assert head.startswith(f"head: {100 * (accuracies[0] - accuracies[1]):+.2f} percentage points (95% interval ")
    equal = "+0.00 percentage points (95% interval +0.00 to +0.00, McNemar p = 1): within noise of the test images"
    assert full == f"full: {equal}"
    assert note.startswith("with one seed, the noise between seeds is unknown")


class FakeRun:
    """A run whose first correct predictions are known."""

    def __init__(self, num_correct, ids=(0, 1, 2, 3)):
        self.split = Split(np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 3]), np.array(ids))
        self.predictions = np.where(np.arange(4) < num_correct, self.split.labels, -1)

    def load_test_split(self, data_dir):
        return self.split

    def measure(self, split):
        return self


def test_compare_correctness_compares_means_over_seeds(runs, monkeypatch):
    row = compare.read_row(runs / "full")
    fakes = {"a": FakeRun(1), "b": FakeRun(2), "c": FakeRun(3), "d": FakeRun(4)}
    monkeypatch.setattr(compare, "load_run", fakes.__getitem__)
    rows = [dataclasses.replace(row, workdirs=workdirs) for workdirs in (("a", "b"), ("c", "d"), ("d",))]
    both, single = compare.compare_correctness(rows)
    assert (both.difference, single.difference) == (0.875 - 0.375, 1 - 0.375)
    assert not both.one_seed and single.one_seed
    assert "larger" not in compare.format_comparisons(rows[:2], [both])
    assert "--join_seeds" not in compare.format_comparisons(rows[:2], [both])


def test_compare_correctness_rejects_other_images(runs, monkeypatch):
    row = compare.read_row(runs / "full")
    fakes = {"a": FakeRun(1), "b": FakeRun(2, ids=(0, 1, 2, 9))}
    monkeypatch.setattr(compare, "load_run", fakes.__getitem__)
    with pytest.raises(UserError, match="b has other test images or labels than a, or another order; compare runs"):
        compare.compare_correctness([dataclasses.replace(row, workdirs=(name,)) for name in "ab"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--paired"], "--paired got 1 row; expected at least two to compare"),
        (["--data_dir", "d"], "requires --paired"),
    ],
)
def test_main_rejects_options_that_need_others(runs, flags, message):
    with pytest.raises(UsageError, match=message):
        compare.main([*flags, str(runs / "full")])
