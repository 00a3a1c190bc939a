"""Training and commands with a dataset, augmentation and optimizer given from Python."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import vit_jax
from configs import digits
from vit_jax import compare, report, trainer
from vit_jax.run import load_run
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.types import Dataset, ImageSource, Split

CLASSES = ("red", "green", "blue")


def create_split(num_images, *, seed):
    """Returns noise images of 8 × 8 pixels; the label is the channel that is brighter by 150."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, num_images)
    images = rng.integers(0, 60, (num_images, 8, 8, 3)).astype(np.uint8)
    images[np.arange(num_images), ..., labels] += 150
    return Split(images, labels)


DATASET = Dataset(create_split(48, seed=0), create_split(24, seed=1), CLASSES)


def flip_half(key, image):
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def create_adamw(schedule):
    mask = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=mask))


OWN = {"dataset": DATASET, "augment": flip_half, "optimizer": create_adamw}


def small_config(**changes):
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16)
    config.update(num_steps=8, warmup_steps=0, learning_rate=0.01, batch_size=16, image_size=8)
    config.update(log_every_steps=2, eval_every_steps=8, checkpoint_every_steps=4)
    config.dataset.name = ""
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Directory and results of a run with the arguments `OWN`."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, trainer.train_and_evaluate(small_config(), workdir, **OWN)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Directory of the same run, interrupted after the checkpoint of step 4."""
    workdir, save = tmp_path_factory.mktemp("interrupted") / "run", Checkpoints.save

    def save_and_stop(manager, step, *args, **kwargs):
        save(manager, step, *args, **kwargs)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Checkpoints, "save", save_and_stop)
        trainer.train_and_evaluate(small_config(), workdir, **OWN)
    return workdir


@pytest.fixture
def copy_of(tmp_path):
    """Returns a function that copies a run directory, so that a test may modify it."""
    return lambda workdir: shutil.copytree(workdir, tmp_path / "copy")


def error_of(error, workdir, **changes):
    """Returns the error message, which is one line; the run must not have saved a checkpoint."""
    with pytest.raises(error) as caught:
        trainer.train_and_evaluate(small_config(), workdir / "run", **OWN | changes)
    assert "\n" not in str(caught.value)
    assert not list(workdir.glob("run/checkpoints/*"))
    return str(caught.value)


def test_train_and_evaluate_learns_from_arrays(finished):
    assert finished[1]["test/accuracy"] > 0.8  # chance: 0.33
    assert vit_jax.load(finished[0]).class_names == CLASSES


def test_train_and_evaluate_requires_dataset_or_its_name(tmp_path):
    with pytest.raises(UsageError, match="unknown dataset ''; expected one of .*folder:DIR"):
        trainer.train_and_evaluate(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_train_and_evaluate_accepts_image_source(finished, tmp_path):
    class Inverted:
        """Computes images when they are indexed."""

        def __init__(self, images):
            self.images, self.shape = 255 - images, images.shape

        def __len__(self):
            return len(self.images)

        def __getitem__(self, rows, /):
            return 255 - self.images[rows]

        def take(self, rows, axis=0):
            return Inverted(255 - self.images.take(rows, axis))

    train, test = (Split(Inverted(split.images), split.labels) for split in (DATASET.train, DATASET.test))
    assert isinstance(train.images, ImageSource)
    results = trainer.train_and_evaluate(small_config(), tmp_path, **OWN | {"dataset": Dataset(train, test, CLASSES)})
    assert results == finished[1]
    assert load_run(tmp_path).evaluate(test) == load_run(tmp_path).evaluate(DATASET.test)


def test_evaluate_matches_logged_results(finished):
    workdir, results = finished
    assert vit_jax.load(workdir).evaluate(DATASET.test) == pytest.approx(results, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": DATASET.test.labels + 1}, "labels are int64 [24] from 1 to 3 of 24 images; expected integers"),
        ({"labels": DATASET.test.labels - 1}, "labels are int64 [24] from -1 to 1 of 24 images; expected integers"),
        (
            {"labels": DATASET.test.labels / 1},
            "labels are float64 [24] of 24 images; expected integers [n] from 0 to 2",
        ),
        ({"labels": DATASET.test.labels[:-2]}, "labels are int64 [22] from 0 to 2 of 24 images; expected integers"),
        ({"labels": np.zeros((24, 3), np.int32)}, "labels are int32 [24, 3] from 0 to 0 of 24 images; expected"),
        ({"images": DATASET.test.images[:-2]}, "labels are int64 [24] from 0 to 2 of 22 images; expected integers"),
        ({"images": DATASET.test.images[:0], "labels": []}, "labels are float64 [0] of 0 images; expected integers"),
        ({"images": DATASET.test.images / 255}, "images are float64 [24, 8, 8, 3]; expected uint8 [n h w 3]"),
        ({"images": DATASET.test.images[..., :1]}, "images are uint8 [24, 8, 8, 1]; expected uint8 [n h w 3]"),
        ({"images": DATASET.test.images[..., 0]}, "images are uint8 [24, 8, 8]; expected uint8 [n h w 3]"),
    ],
)
def test_train_and_evaluate_rejects_invalid_images_and_labels(finished, tmp_path, changes, message):
    split = dataclasses.replace(DATASET.test, **changes)
    for name in ("train", "test"):
        line = error_of(UsageError, tmp_path, dataset=dataclasses.replace(DATASET, **{name: split}))
        assert line.startswith(f"dataset.{name}: {message}")
    with pytest.raises(UserError) as caught:
        vit_jax.load(finished[0]).evaluate(split)
    assert str(caught.value).startswith(f"split: {message}")


def test_train_and_evaluate_rejects_splits_of_different_image_sizes(tmp_path):
    test = Split(np.zeros((24, 9, 10, 3), np.uint8), DATASET.test.labels)
    line = error_of(UsageError, tmp_path, dataset=dataclasses.replace(DATASET, test=test))
    assert line == "dataset: training and test images are 8 × 8 and 9 × 10 pixels; expected the same size"
    assert "dataset is a tuple; expected a vit_jax.types.Dataset" in error_of(
        UsageError, tmp_path, dataset=(DATASET.train, test)
    )


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda key, image: image / 255, "augment returns float32 [8, 8, 3]; expected a uint8 image [h w 3]"),
        (lambda key, image: image[..., 0], "augment returns uint8 [8, 8]; expected a uint8 image [h w 3]"),
        (lambda key, image: image[..., :1], "augment returns uint8 [8, 8, 1]; expected a uint8 image [h w 3]"),
        (lambda key, image: None, "augment returns NoneType; expected a uint8 image [h w 3]"),
        ("flip", "augment is 'flip'; expected a function (key, image) -> image; config.augment has names"),
    ],
)
def test_train_and_evaluate_rejects_invalid_augmentation(tmp_path, augment, message):
    assert error_of(UsageError, tmp_path, augment=augment) == message


@pytest.mark.parametrize(
    ("optimizer", "found"),
    [
        (3, "3"),
        ("adam", "'adam'"),
        (lambda schedule: None, "a function that returns None"),
        (lambda schedule: schedule(0), "a function that returns Array(0.01"),
    ],
)
def test_train_and_evaluate_rejects_invalid_optimizer(tmp_path, optimizer, found):
    line = error_of(UsageError, tmp_path, optimizer=optimizer)
    assert line.startswith(f"optimizer is {found}")
    assert line.endswith("expected an optax.GradientTransformation, or a function from a schedule to one")


def test_train_and_evaluate_accepts_optimizer_with_own_learning_rate(tmp_path):
    """Sign descent with a step of 1/64, exact in float32, changes a parameter by at most 2/64 in two steps."""
    before = trainer.train_and_evaluate(small_config(num_steps=0), tmp_path / "zero", dataset=DATASET)
    tx = optax.inject_hyperparams(optax.sign_sgd)(learning_rate=1 / 64)
    after = trainer.train_and_evaluate(small_config(num_steps=2), tmp_path / "two", dataset=DATASET, optimizer=tx)
    assert before != after
    start, end = (flatten_dict(load_run(tmp_path / name).params) for name in ("zero", "two"))
    updates = {key: np.abs(end[key] - start[key]).max() for key in start}
    assert max(updates.values()) == pytest.approx(2 / 64, abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert "train/loss" in lines[0] and "learning_rate" not in lines[0]


def test_train_and_evaluate_resumes_bit_exactly_with_same_arguments(finished, interrupted, copy_of):
    workdir = copy_of(interrupted)
    assert load_run(workdir).step == 4
    assert trainer.train_and_evaluate(small_config(), workdir, **OWN) == finished[1]
    actual, expected = (jax.tree.leaves(load_run(run).params) for run in (workdir, finished[0]))
    for actual_leaf, expected_leaf in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(actual_leaf, expected_leaf)


@pytest.mark.parametrize("missing", [("dataset",), ("augment",), ("optimizer",), tuple(OWN)])
def test_train_and_evaluate_rejects_missing_arguments_on_resume(interrupted, copy_of, missing):
    workdir, given = copy_of(interrupted), [name for name in OWN if name not in missing]
    with pytest.raises(UserError) as caught:
        trainer.train_and_evaluate(small_config(), workdir, **{name: OWN[name] for name in given})
    assert str(caught.value) == (
        "the run was started with dataset, augment, optimizer given from Python, and is resumed with "
        f"{', '.join(given) or 'nothing'}; resume it with the same arguments of train_and_evaluate"
    )
    assert load_run(workdir).step == 4


def test_train_and_evaluate_rejects_changed_labels_on_resume(interrupted, copy_of):
    other = dataclasses.replace(DATASET, train=Split(DATASET.train.images, DATASET.train.labels[::-1]))
    with pytest.raises(
        UserError, match="^the dataset has changed since the run was started: it has the same number of images"
    ):
        trainer.train_and_evaluate(small_config(), copy_of(interrupted), **OWN | {"dataset": other})


# ---- commands


@pytest.mark.parametrize("module", ["vit_jax.evaluate", "vit_jax.report"])
def test_evaluate_and_report_require_split_for_own_dataset(finished, run_cli, module):
    result = run_cli(module, ["--workdir", finished[0]])
    assert (result.code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line == (
        f"error: {finished[0]} was trained on a dataset given from Python; give its test split there: "
        "vit_jax.load(workdir).evaluate(split) or vit_jax.report.write_report(workdir, split=split)"
    )


def test_write_report_accepts_test_split(finished, copy_of):
    workdir = copy_of(finished[0])
    page = report.write_report(str(workdir), split=DATASET.test).read_text()
    counts = np.bincount(DATASET.test.labels)
    assert f"<th>test images</th><td>24; {counts.min()} to {counts.max()} per class</td>" in page
    assert "<th>dataset</th><td>given from Python</td>" in page
    assert f"{finished[1]['test/accuracy']:.2%}" in page and page.count("<img") == 8  # no errors
    with pytest.raises(UsageError, match="split has 48 images; expected the 24 of "):
        report.write_report(workdir, split=DATASET.train)


def test_visualize_omits_predictions_for_own_dataset(finished, run_cli, tmp_path):
    Image.fromarray(DATASET.test.images[0]).save(tmp_path / "image.png")
    argv = ["--workdir", finished[0], "--out", tmp_path / "out"]
    figures = {"curves", "position_similarity", "position_matrix", "patch_filters"}
    for images, more in ([], set()), (["--images", tmp_path / "image.png"], {"attention_rollout", "attention_heads"}):
        result = run_cli("vit_jax.visualize", [*argv, *images])
        assert result.code == 0
        (line,) = result.stderr.splitlines()
        assert "given from Python: no predictions are plotted; for all figures, call vit_jax.report" in line
        assert {path.stem for path in (tmp_path / "out").iterdir()} == figures | more


def test_predict_and_export_accept_run_on_own_dataset(finished, run_cli, tmp_path):
    image, row = DATASET.test.images[0], load_run(finished[0]).predict(DATASET.test.images[:1])[0]
    Image.fromarray(image).save(tmp_path / "image.png")
    result = run_cli("vit_jax.predict", ["--workdir", finished[0], tmp_path / "image.png", "--top", 1])
    assert f"{CLASSES[row.argmax()]} {row.max():.1%}" in result.stdout
    result = run_cli("vit_jax.export", ["--workdir", finished[0], "--format", "npz", "--out", tmp_path / "out.npz"])
    assert result.code == 0
    assert vit_jax.load(tmp_path / "out.npz").evaluate(DATASET.test) == pytest.approx(finished[1], rel=1e-6)


def test_compare_runs_rejects_own_and_named_dataset(finished, finished_run, copy_of):
    rows = compare.compare_runs([finished[0], copy_of(finished[0])])
    assert [row.results["test/accuracy"] for row in rows] == [finished[1]["test/accuracy"]] * 2
    with pytest.raises(UserError, match="on different images .*given from Python, 24 images, .*'red'.*: digits, test"):
        compare.compare_runs([finished[0], finished_run])
