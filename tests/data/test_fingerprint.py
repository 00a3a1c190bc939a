import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vit_jax import data
from vit_jax.data import DatasetFingerprint, fingerprint


@pytest.fixture
def image_dir(tmp_path):
    """Directory with classes cat and dog, and two training and two test images of each."""
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (6, 6)).save(tmp_path / f"pets/{name}/{i}.png")
    return tmp_path / "pets"


def digest(image_dir, **options):
    return fingerprint(data.load_dataset(f"folder:{image_dir}", image_size=4, **options)).digest


def test_fingerprint_returns_class_names_counts_and_digest(image_dir):
    actual = fingerprint(data.load_dataset(f"folder:{image_dir}", image_size=4, test_split="test[:50%]"))
    assert actual.digest.isalnum()
    assert (actual.class_names, actual.train_counts, actual.test_counts) == (("cat", "dog"), (2, 2), (1, 1))
    assert (actual.num_train, actual.num_test) == (4, 2)


def test_from_json_inverts_to_json(image_dir):
    original = fingerprint(data.load_dataset(f"folder:{image_dir}", image_size=4))
    assert DatasetFingerprint.from_json(json.loads(json.dumps(original.to_json()))) == original


def test_fingerprint_covers_validation_split(image_dir):
    before = digest(image_dir)
    shutil.copytree(image_dir / "test", image_dir / "val")
    actual = fingerprint(data.load_dataset(f"folder:{image_dir}", image_size=4))
    assert actual.validation_counts == (2, 2) and str(actual) == "4 training, 4 validation and 4 test images"
    (image_dir / "val/dog/1.png").rename(image_dir / "val/dog/2.png")
    assert digest(image_dir) != actual.digest
    shutil.rmtree(image_dir / "val")
    assert digest(image_dir) == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"class_names": ("cat", "cow")}, "other classes (new: dog; missing: cow)"),
        ({"class_names": ("dog", "cat")}, "other classes (new: none; missing: none)"),
        ({"test_counts": (1, 2)}, "1,000 training and 2 test images instead of 1,000 training and 3 test images"),
        ({"digest": "b"}, "the same number of images, but other files or labels"),
    ],
)
def test_difference_describes_changes(changes, expected):
    original = DatasetFingerprint(("cat", "dog"), (600, 400), (1, 1), "a")
    assert original.difference(dataclasses.replace(original, **changes)) == expected


@pytest.mark.parametrize("options", [{}, {"classes": ["dog", "cat"]}, {"train_split": "train[:50%]"}])
def test_fingerprint_matches_between_memory_and_stream(image_dir, options):
    assert digest(image_dir, storage="memory", **options) == digest(image_dir, storage="stream", **options)


def test_fingerprint_ignores_root_directory(image_dir, tmp_path):
    shutil.copytree(image_dir, tmp_path / "copy")
    assert digest(image_dir) == digest(tmp_path / "copy")


def test_fingerprint_changes_with_file_name(image_dir):
    before = digest(image_dir)
    (image_dir / "test/dog/1.png").rename(image_dir / "test/dog/2.png")
    assert digest(image_dir) != before


def test_fingerprint_changes_with_class_of_file(image_dir):
    (image_dir / "train/dog/1.png").rename(image_dir / "train/dog/2.png")
    before = digest(image_dir)
    (image_dir / "train/dog/2.png").rename(image_dir / "train/cat/2.png")
    assert digest(image_dir) != before


def test_fingerprint_changes_with_class_order(image_dir):
    assert digest(image_dir, classes=["dog", "cat"]) != digest(image_dir, classes=["cat", "dog"])


def test_fingerprint_ignores_unselected_classes(image_dir):
    before = digest(image_dir, classes=["cat", "dog"])
    for split in ("train", "test"):
        shutil.copytree(image_dir / split / "cat", image_dir / split / "ant")
    assert digest(image_dir, classes=["cat", "dog"]) == before


def test_fingerprint_of_arrays_covers_labels_and_shape():
    dataset = data.load_dataset("digits", image_size=8)
    labels = np.roll(dataset.train.labels, 1)
    images = dataset.train.images[:, :4]
    changed = [dataclasses.replace(dataset.train, labels=labels), dataclasses.replace(dataset.train, images=images)]
    digests = {fingerprint(dataclasses.replace(dataset, train=train)).digest for train in (dataset.train, *changed)}
    assert len(digests) == 3
