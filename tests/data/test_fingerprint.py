import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vit_jax import data
from vit_jax.data import DatasetFingerprint, fingerprint


@pytest.fixture
def folder(tmp_path):
    """Two classes, cat and dog, with two images each to train on and to test on."""
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (6, 6)).save(tmp_path / f"pets/{name}/{i}.png")
    return tmp_path / "pets"


def digest(folder, **options):
    return fingerprint(data.load_dataset(f"folder:{folder}", image_size=4, **options)).digest


def test_fingerprint_has_names_counts_and_digest(folder):
    found = fingerprint(data.load_dataset(f"folder:{folder}", image_size=4, test_split="test[:50%]"))
    assert found.digest.isalnum()
    assert (found.class_names, found.num_train, found.num_test) == (("cat", "dog"), 4, 2)


def test_from_json_returns_what_was_saved(folder):
    found = fingerprint(data.load_dataset(f"folder:{folder}", image_size=4))
    assert DatasetFingerprint.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"class_names": ("cat", "cow")}, "other classes (new: dog; missing: cow)"),
        ({"class_names": ("dog", "cat")}, "other classes (new: none; missing: none)"),
        ({"num_test": 3}, "1,000 training and 2 test images instead of 1,000 training and 3 test images"),
        ({"digest": "b"}, "the same number of images, but other files or labels"),
    ],
)
def test_difference_says_what_has_changed(changes, expected):
    ours = DatasetFingerprint(("cat", "dog"), 1000, 2, "a")
    assert ours.difference(dataclasses.replace(ours, **changes)) == expected


@pytest.mark.parametrize("options", [{}, {"classes": ["dog", "cat"]}, {"train_split": "train[:50%]"}])
def test_fingerprint_is_the_same_in_memory_and_streamed(folder, options):
    assert digest(folder, storage="memory", **options) == digest(folder, storage="stream", **options)


def test_fingerprint_is_the_same_in_another_directory(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert digest(folder) == digest(tmp_path / "copy")


def test_fingerprint_changes_with_a_file_name(folder):
    before = digest(folder)
    (folder / "test/dog/1.png").rename(folder / "test/dog/2.png")
    assert digest(folder) != before


def test_fingerprint_changes_when_a_file_moves_to_another_class(folder):
    (folder / "train/dog/1.png").rename(folder / "train/dog/2.png")
    before = digest(folder)
    (folder / "train/dog/2.png").rename(folder / "train/cat/2.png")
    assert digest(folder) != before


def test_fingerprint_changes_with_the_order_of_classes(folder):
    assert digest(folder, classes=["dog", "cat"]) != digest(folder, classes=["cat", "dog"])


def test_fingerprint_ignores_classes_that_are_not_kept(folder):
    before = digest(folder, classes=["cat", "dog"])
    for split in ("train", "test"):
        shutil.copytree(folder / split / "cat", folder / split / "ant")
    assert digest(folder, classes=["cat", "dog"]) == before


def test_fingerprint_of_arrays_covers_labels_and_shape():
    dataset = data.load_dataset("digits", image_size=8)
    labels = np.roll(dataset.train.labels, 1)
    images = dataset.train.images[:, :4]
    others = [dataclasses.replace(dataset.train, labels=labels), dataclasses.replace(dataset.train, images=images)]
    digests = {fingerprint(dataclasses.replace(dataset, train=train)).digest for train in (dataset.train, *others)}
    assert len(digests) == 3
