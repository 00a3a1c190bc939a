import os

import numpy as np
import pytest
from image_files import load_folder, write_image, write_image_dir

from vit_jax.runtime.errors import UsageError, UserError


@pytest.fixture
def image_dir(tmp_path):
    return write_image_dir(tmp_path / "pets")


def test_open_folder_sorts_classes_and_files(image_dir):
    dataset = load_folder(image_dir)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.train.labels.dtype == np.int32
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert dataset.test.images[:, 0, 0, 0].tolist() == [0, 10]


def test_open_folder_accepts_other_split_names(image_dir):
    (image_dir / "test").rename(image_dir / "val")
    assert len(load_folder(image_dir, test_split="val").test) == 2


@pytest.mark.parametrize("name", ["validation", "val"])
def test_open_folder_finds_validation_directory(image_dir, name):
    write_image(image_dir / name / "cat" / "5.png", color=(5, 0, 0))
    write_image(image_dir / name / "dog" / "5.png", color=(15, 0, 0))
    dataset = load_folder(image_dir)
    assert dataset.validation.images[:, 0, 0, 0].tolist() == [5, 15]
    assert (len(dataset.train), len(dataset.test)) == (4, 2)


def test_open_folder_slices_across_all_classes(image_dir):
    for label, name in enumerate(["cat", "dog"]):
        for i in range(2, 50):
            write_image(image_dir / "train" / name / f"{i}.png", color=(10 * label, 0, 0))
    dataset = load_folder(image_dir, train_split="train[:90%]", test_split="train[90%:]")
    assert (len(dataset.train), len(dataset.test)) == (90, 10)
    assert set(dataset.test.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("suffix", [".PNG", ".jpg", ".JPEG", ".webp"])
def test_open_folder_reads_image_suffixes(image_dir, suffix):
    write_image(image_dir / "train" / "cat" / f"more{suffix}")
    assert len(load_folder(image_dir).train) == 5


def test_open_folder_ignores_hidden_and_non_image_files(image_dir):
    (image_dir / "train" / "cat" / "notes.txt").write_text("")
    (image_dir / "train" / "cat" / "._0.png").write_text("")
    (image_dir / "train" / ".cache").mkdir()
    (image_dir / "train" / "README").write_text("")
    assert len(load_folder(image_dir).train) == 4


def test_open_folder_rejects_classes_that_differ_between_splits(image_dir):
    write_image(image_dir / "train" / "bird" / "0.png")
    (image_dir / "test" / "dog").rename(image_dir / "test" / "wolf")
    expected = r"these differ: bird \(only in train\), dog \(only in train\), wolf \(only in test\)"
    with pytest.raises(UserError, match=expected):
        load_folder(image_dir)


def test_open_folder_rejects_empty_class(image_dir):
    (image_dir / "train" / "bird").mkdir()
    with pytest.raises(
        UserError,
        match=r"bird: no such directory, or no images \(.png, .jpg, .jpeg, .webp\) in it; .*/\{train,test\}/CLASS",
    ):
        load_folder(image_dir)


def test_open_folder_rejects_missing_directory(tmp_path):
    with pytest.raises(UserError, match="missing_dir/train: no such directory"):
        load_folder(tmp_path / "missing_dir")


def test_open_folder_rejects_missing_split(image_dir):
    with pytest.raises(UserError, match="val: no such directory"):
        load_folder(image_dir, test_split="val")


def test_open_folder_rejects_split_without_classes(image_dir):
    (image_dir / "val").mkdir()
    with pytest.raises(UserError, match="val: no such directory, or no images"):
        load_folder(image_dir, test_split="val")


def test_open_folder_ignores_named_pipes(image_dir):
    os.mkfifo(image_dir / "train" / "cat" / "9.png")
    assert len(load_folder(image_dir).train) == 4


def test_open_folder_rejects_overlapping_slices(image_dir):
    with pytest.raises(
        UsageError, match="train_split 'train' and test_split 'train\\[50%:\\]' overlap in 2 of 4 images"
    ):
        load_folder(image_dir, test_split="train[50%:]")
