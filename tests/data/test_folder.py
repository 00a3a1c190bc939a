import os

import numpy as np
import pytest
from image_files import load_folder, write_folder, write_image

from vit_jax.runtime.errors import UsageError, UserError


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pets")


def test_open_folder_sorts_classes_and_files(folder):
    dataset = load_folder(folder)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.train.labels.dtype == np.int32
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert dataset.test.images[:, 0, 0, 0].tolist() == [0, 10]


def test_open_folder_accepts_other_split_names(folder):
    (folder / "test").rename(folder / "val")
    assert len(load_folder(folder, test_split="val").test) == 2


def test_open_folder_slices_across_all_classes(folder):
    for label, name in enumerate(["cat", "dog"]):
        for i in range(2, 50):
            write_image(folder / "train" / name / f"{i}.png", color=(10 * label, 0, 0))
    dataset = load_folder(folder, train_split="train[:90%]", test_split="train[90%:]")
    assert (len(dataset.train), len(dataset.test)) == (90, 10)
    assert set(dataset.test.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("suffix", [".PNG", ".jpg", ".JPEG", ".webp"])
def test_open_folder_reads_image_suffixes(folder, suffix):
    write_image(folder / "train" / "cat" / f"more{suffix}")
    assert len(load_folder(folder).train) == 5


def test_open_folder_ignores_hidden_and_non_image_files(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("")
    (folder / "train" / "cat" / "._0.png").write_text("")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "README").write_text("")
    assert len(load_folder(folder).train) == 4


def test_open_folder_rejects_classes_that_differ_between_splits(folder):
    write_image(folder / "train" / "bird" / "0.png")
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    expected = r"these differ: bird \(only in train\), dog \(only in train\), wolf \(only in test\)"
    with pytest.raises(UserError, match=expected):
        load_folder(folder)


def test_open_folder_rejects_empty_class(folder):
    (folder / "train" / "bird").mkdir()
    with pytest.raises(
        UserError,
        match=r"bird: no such directory, or no images \(.png, .jpg, .jpeg, .webp\) in it; expected .*train/CLASS/IMAGE",
    ):
        load_folder(folder)


def test_open_folder_rejects_missing_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere/train: no such directory"):
        load_folder(tmp_path / "nowhere")


def test_open_folder_rejects_missing_split(folder):
    with pytest.raises(UserError, match="val: no such directory"):
        load_folder(folder, test_split="val")


def test_open_folder_rejects_split_without_classes(folder):
    (folder / "val").mkdir()
    with pytest.raises(UserError, match="val: no such directory, or no images"):
        load_folder(folder, test_split="val")


def test_open_folder_ignores_named_pipes(folder):
    os.mkfifo(folder / "train" / "cat" / "9.png")
    assert len(load_folder(folder).train) == 4


def test_open_folder_rejects_overlapping_slices(folder):
    with pytest.raises(
        UsageError, match="train_split 'train' and test_split 'train\\[50%:\\]' overlap in 2 of 4 images"
    ):
        load_folder(folder, test_split="train[50%:]")
