"""Inspection of datasets: the images on the page are those that training and evaluation use."""

import functools
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import set_keys
from PIL import Image
from sklearn.datasets import load_sample_image

from configs import digits
from vit_jax import inspect
from vit_jax.data import preprocess
from vit_jax.runtime import rng
from vit_jax.training.experiment import load_dataset


def create_inputs(**changes):
    """Returns the experiment on digits of the config with these changes, and its initial state."""
    config = set_keys(digits.get_config(), changes)
    return inspect.create_input_experiment(config, load_dataset(config))


def test_training_inputs_are_augmented_images_of_first_step():
    experiment, state = create_inputs(augment="square_crop", image_size=12, seed=3)
    rows, inputs, captions = inspect.training_inputs(experiment, state)
    key = jax.random.PRNGKey(3)
    assert np.array_equal(rows, rng.epoch_order(key, 0, 1437)[:24]) and captions == ["input"] * 24
    keys, images = rng.step_keys(key, 0, 64)[0][:24], experiment.dataset.train.images[rows]
    expected = jax.jit(functools.partial(preprocess.prepare, image_size=12, augment="square_crop"))(keys, images)
    np.testing.assert_array_equal(inputs, np.round(127.5 * (np.asarray(expected) + 1)))


def test_training_inputs_are_mixed_as_captions_say():
    experiment, state = create_inputs(augment="none", image_size=8, mixup_alpha=1.0, **{"dataset.sampling": "balanced"})
    rows, inputs, captions = inspect.training_inputs(experiment, state)
    dataset = experiment.dataset
    for i in range(1, 24):  # the partner of an image is the one before it
        own, other = (dataset.train.images[row].astype(float) for row in (rows[i], rows[i - 1]))
        weight = int(re.match(r"(\d+)% \d\n\d+% \d$", captions[i])[1]) / 100
        np.testing.assert_allclose(inputs[i], weight * own + (1 - weight) * other, atol=2)
        assert captions[i][-1] == dataset.class_names[dataset.train.labels[rows[i - 1]]]


def test_evaluation_inputs_are_resized_test_images():
    experiment, _ = create_inputs(augment="flip", image_size=12)
    inputs = inspect.evaluation_inputs(experiment, np.array([5, 2]))
    image = Image.fromarray(experiment.dataset.test.images[2])
    resized = image.resize((12, 8), Image.Resampling.BILINEAR).resize((12, 12), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(inputs[1], np.asarray(resized))


def test_sample_rows_pads_rare_classes():
    rows = inspect.sample_rows(np.array([0] * 20 + [2] * 3), seed=0)
    assert rows.shape == (2, 8) and len(set(rows[0])) == 8 and max(rows[0]) < 20
    assert sorted(rows[1]) == [-1] * 5 + [20, 21, 22]


def test_sample_rows_takes_most_and_least_frequent_of_many_classes():
    labels = np.repeat(np.arange(30), np.arange(1, 31))
    rows = inspect.sample_rows(labels, seed=0)
    assert labels[rows[:, 0]].tolist() == [*range(10), *range(20, 30)]


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory):
    """Parts of two photographs, 60 × 40 pixels, as test and training images; a damaged file, and one in both splits."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("china", "flower"):
        photograph = load_sample_image(f"{name}.jpg")
        for split, count in (("train", 6), ("test", 2)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                top, left = random.integers(0, 300, 2)
                part = Image.fromarray(photograph[top : top + 40, left : left + 60])
                part.save(root / split / name / f"{split}{i}.png")
    (root / "train/flower/damaged.png").write_bytes((root / "train/flower/train0.png").read_bytes()[:500])
    shutil.copyfile(root / "train/china/train1.png", root / "test/china/copy.png")
    return root


def test_read_sizes_reads_width_and_height_of_files(image_dir):
    changes = {"dataset.name": f"folder:{image_dir}", "dataset.validation_fraction": 0.0, "dataset.damaged": "skip"}
    dataset = load_dataset(set_keys(digits.get_config(), changes))
    assert inspect.read_sizes(dataset.train).tolist() == [[60, 40]] * 12
    assert inspect.load_thumbnail(dataset.test, 1).shape == (40, 60, 3)


@pytest.mark.slow
def test_training_inputs_of_streamed_images_equal_those_in_memory(image_dir):
    changes = {"dataset.name": f"folder:{image_dir}", "dataset.damaged": "skip", "augment": "inception"}
    (rows, inputs, _), (others, streamed, _) = (
        inspect.training_inputs(*create_inputs(**changes, **{"image_size": 32, "dataset.storage": storage}))
        for storage in ("memory", "stream")
    )
    assert np.array_equal(rows, others)
    np.testing.assert_allclose(inputs, streamed, atol=1)  # the box of a crop is rounded on the device and in float64


def test_main_writes_page_with_figures_and_problems(image_dir, run_cli, tmp_path):
    argv = ["--dataset", f"folder:{image_dir}", "--config.image_size=16", "--out", tmp_path / "out"]
    result = run_cli("vit_jax.inspect", argv)
    assert result.code == 0, result.stderr
    paths = [tmp_path / "out" / f"{name}.png" for name in ("counts", "samples", "training", "evaluation")]
    assert result.stdout.splitlines()[-5:] == [*map(str, paths), str(tmp_path / "out/inspect.html")]
    page = (tmp_path / "out/inspect.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script", page)
    damaged, copy = image_dir / "train/flower/damaged.png", image_dir / "test/china/copy.png"
    assert f"<pre>{damaged} (" in page and f"<pre>{image_dir / 'train/china/train1.png'} = {copy}</pre>" in page
    assert "image_size: 16" in page


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--dataset", "digits"],
            "the following arguments are required: --out (see `python -m vit_jax.inspect --help`)",
        ),
        (["--out", "x"], "no dataset; give --dataset, such as folder:DIR, or a --config that sets dataset.name"),
        (["--out", "x", "--config", "configs/nothing.py"], "No such file or directory: 'configs/nothing.py'"),
    ],
)
def test_main_rejects_flags(run_cli, argv, message):
    result = run_cli("vit_jax.inspect", argv)
    assert result.code == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr
