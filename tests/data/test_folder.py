import os

import numpy as np
import pytest
from image_files import load_folder, write_image, write_image_dir

from vit_jax.data import folder
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
    slices = {"train_split": "train[:90%]", "test_split": "train[90%:]"}
    dataset = load_folder(image_dir, **slices, validation_fraction=0)
    assert dataset.validation is None
    assert np.bincount(dataset.train.labels).tolist() == [45, 45]
    assert np.bincount(dataset.test.labels).tolist() == [5, 5]
    made = load_folder(image_dir, **slices)  # a tenth of 45 images is 4, and 41 are left
    assert [np.bincount(split.labels).tolist() for split in made.splits.values()] == [[41, 41], [4, 4], [5, 5]]


@pytest.mark.parametrize("suffix", [".PNG", ".jpg", ".JPEG", ".webp", ".bmp", ".gif", ".tif", ".TIFF"])
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
    expected = r"these differ: bird \(not in test\), dog \(not in test\), wolf \(not in train\)"
    with pytest.raises(UserError, match=expected):
        load_folder(image_dir)


def test_open_folder_rejects_empty_class(image_dir):
    (image_dir / "train" / "bird").mkdir()
    with pytest.raises(UserError, match=r"bird: no images \(.png, .jpg, .*\) in it; add images, or remove it"):
        load_folder(image_dir)


def test_open_folder_rejects_missing_directory(tmp_path):
    with pytest.raises(UserError, match=r"missing_dir: no such directory; expected DIR/\{train,validation,"):
        load_folder(tmp_path / "missing_dir")


def test_open_folder_rejects_missing_split(image_dir):
    with pytest.raises(UserError, match="no split 'val'; it has test, train; choose one of these"):
        load_folder(image_dir, test_split="val")


def test_open_folder_rejects_split_without_classes(image_dir):
    (image_dir / "val").mkdir()
    with pytest.raises(UserError, match="val has no class directories"):
        load_folder(image_dir, test_split="val")


def test_open_folder_ignores_named_pipes(image_dir):
    os.mkfifo(image_dir / "train" / "cat" / "9.png")
    assert len(load_folder(image_dir).train) == 4


def test_open_folder_rejects_overlapping_slices(image_dir):
    with pytest.raises(
        UsageError, match="train_split 'train' and test_split 'train\\[50%:\\]' overlap in 2 of 4 images"
    ):
        load_folder(image_dir, test_split="train[50%:]")


def test_open_folder_finds_classes_without_split_directories(image_dir):
    """A class may be named like a split."""
    dataset = load_folder(image_dir / "train", test_fraction=0.5, validation_fraction=0)
    assert [split.labels.tolist() for split in dataset.splits.values()] == [[0, 1], [0, 1]]
    (image_dir / "train" / "dog").rename(image_dir / "train" / "test")
    dataset = load_folder(image_dir / "train", test_fraction=0.5, validation_fraction=0)
    assert dataset.class_names == ("cat", "test")


def test_open_folder_reads_directories_below_classes(image_dir):
    write_image(image_dir / "train" / "cat" / "indoors" / "0.png", color=(5, 0, 0))
    assert load_folder(image_dir).train.images[:, 0, 0, 0].tolist() == [0, 1, 5, 10, 11]


def test_open_folder_counts_files_that_are_not_read(image_dir, monkeypatch):
    monkeypatch.setattr(folder, "IMAGE_SUFFIXES", (".png",))
    monkeypatch.setattr(folder, "MISSING_FORMATS", {".heic": "install the extra vit_jax[heif]"})
    for name in ("notes.txt", "a.heic", "b.HEIC", "README"):
        (image_dir / "train" / "cat" / name).write_text("")
    (image_dir / "train" / "dog" / "gone.png").symlink_to("nowhere.png")
    assert load_folder(image_dir).findings.notes == (
        f"{image_dir}: files that were not read: 2 .heic, 1 .txt, 1 broken links or special files, 1 without suffix; "
        "install the extra vit_jax[heif]",
    )


def test_open_folder_rejects_both_names_of_validation(image_dir):
    for name in ("val", "validation"):
        write_image(image_dir / name / "cat" / "0.png")
    with pytest.raises(UserError, match="has both validation and val; expected one of them"):
        load_folder(image_dir)


def test_open_folder_rejects_symlink_loops(image_dir):
    loop = image_dir / "train" / "cat" / "again"
    loop.symlink_to("..")
    with pytest.raises(UserError, match=r"cat/again/cat is a symbolic link to .*/cat, which contains it; remove it"):
        load_folder(image_dir)
    loop.unlink()
    loop.symlink_to("again")
    with pytest.raises(UserError, match=r"cat/again cannot be read \(Too many levels of symbolic links\)"):
        load_folder(image_dir)


def test_open_folder_rejects_unreadable_directory(image_dir, monkeypatch):
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(UserError, match=r"train/dog cannot be read \(Permission denied\); change its permissions"):
        load_folder(image_dir)
