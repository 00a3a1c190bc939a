import os
import shutil

import numpy as np
import pytest
from image_files import load_folder, write_image, write_image_dir

from vit_jax.data.findings import describe_classes, describe_warnings, find_duplicates, save_findings
from vit_jax.data.images import DamagedImagesError
from vit_jax.runtime.errors import UserError
from vit_jax.types import Dataset, Findings, Split


@pytest.fixture
def image_dir(tmp_path):
    return write_image_dir(tmp_path / "pets")


def create_dataset(train, test, findings=None):
    """Returns a dataset with the given numbers of black images per class."""
    splits = []
    for counts in (train, test):
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        splits.append(Split(np.zeros((len(labels), 2, 2, 3), np.uint8), labels))
    return Dataset(*splits, class_names=tuple(f"class{i}" for i in range(len(train))), findings=findings or Findings())


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_find_duplicates_names_equal_images_of_different_splits(image_dir, storage):
    write_image(image_dir / "train/dog/0.png", color=(77, 0, 0))  # twice in the training split: not in another one
    shutil.copy(image_dir / "train/dog/0.png", image_dir / "train/dog/more.png")
    shutil.copy(image_dir / "train/cat/0.png", image_dir / "test/cat/other.png")
    write_image(image_dir / "test/cat/0.png", color=(99, 0, 0))
    write_image(image_dir / "test/dog/0.png", color=(98, 0, 0))
    dataset = load_folder(image_dir, storage=storage)
    pair = (str(image_dir / "train/cat/0.png"), str(image_dir / "test/cat/other.png"))
    assert dataset.findings.duplicates == (pair,)
    (warning,) = [line for line in describe_warnings(dataset) if "more than one split" in line]
    assert warning == f"equal images in more than one split (1): {pair[0]} = {pair[1]}; remove them from all but one"


def test_find_duplicates_compares_decoded_pixels(image_dir):
    """The second file has the same pixels in another format."""
    write_image(image_dir / "test/dog/0.bmp", color=(0, 0, 0))
    os.remove(image_dir / "test/cat/0.png")
    write_image(image_dir / "test/cat/1.png", color=(50, 0, 0))
    pairs = load_folder(image_dir).findings.duplicates
    assert (str(image_dir / "train/cat/0.png"), str(image_dir / "test/dog/0.bmp")) in pairs


def test_find_duplicates_ignores_splits_without_paths():
    dataset = create_dataset([5, 5], [5, 5])
    assert find_duplicates([dataset.train, dataset.test]) == ()


@pytest.mark.parametrize("storage", ["auto", "memory", "stream"])
def test_load_dataset_lists_all_damaged_images(image_dir, storage):
    """Of one file the header is damaged, of the other the pixels."""
    (image_dir / "train/cat/0.png").write_bytes(b"not an image")
    write_image(image_dir / "test/dog/0.png", size=(64, 64), color=(1, 2, 3))
    (image_dir / "test/dog/0.png").write_bytes((image_dir / "test/dog/0.png").read_bytes()[:60])
    with pytest.raises(DamagedImagesError, match="2 images cannot be decoded") as error:
        load_folder(image_dir, storage=storage)
    assert sorted(each.path for each in error.value.errors) == [
        str(image_dir / "test/dog/0.png"),
        str(image_dir / "train/cat/0.png"),
    ]


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_load_dataset_skips_damaged_images(image_dir, storage):
    write_image(image_dir / "train/cat/2.png", size=(64, 64))
    path = image_dir / "train/cat/2.png"
    path.write_bytes(path.read_bytes()[:60])
    (image_dir / "train/dog/3.png").write_bytes(b"")
    dataset = load_folder(image_dir, storage=storage, damaged="skip")
    assert [path.split("/", -1)[-2:] for path in dataset.train.paths] == [
        ["cat", "0.png"], ["cat", "1.png"], ["dog", "0.png"], ["dog", "1.png"],
    ]  # fmt: skip
    assert dataset.train.images[:][:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert dataset.train.labels.tolist() == [0, 0, 1, 1] and len(dataset.train.ids) == 4
    first = next(describe_warnings(dataset))
    assert first.startswith("skipped images that cannot be decoded (2): ") and str(path) in first


def test_load_dataset_rejects_classes_of_which_all_images_are_damaged(image_dir):
    for name in ("0.png", "1.png"):
        (image_dir / "train/cat" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no image of the class 'cat' can be decoded; first of 2: image .*cat/0.png"):
        load_folder(image_dir, damaged="skip")


def test_describe_classes_counts_images_per_class_and_split():
    assert describe_classes(create_dataset([1200, 7], [30, 2])).splitlines() == [
        "images per class  train  test",
        "class0            1,200    30",
        "class1                7     2",
    ]


def test_describe_classes_shows_the_smallest_and_largest_of_many():
    lines = describe_classes(create_dataset([10 + i for i in range(50)], [1] * 50)).splitlines()
    assert len(lines) == 22 and lines[11].strip() == "… 30 more"
    assert [line.split()[0] for line in lines[1:4]] == ["class49", "class48", "class47"]
    assert [line.split()[0] for line in lines[12:14]] == ["class0", "class1"]


def test_describe_warnings_names_small_classes_and_imbalance():
    assert [*describe_warnings(create_dataset([10, 100], [1, 1]))] == []
    assert [*describe_warnings(create_dataset([9, 100], [1, 1]))] == [
        "classes with fewer than 10 training images (1): class0 (9)",
        "classes are imbalanced: 100 training images of class1, 9 of class0; consider dataset.sampling=balanced",
    ]


def test_save_findings_writes_long_lists(tmp_path):
    few, many = tuple(map(str, range(20))), tuple(map(str, range(21)))
    save_findings(Findings(damaged=few, duplicates=()), tmp_path)
    assert not list(tmp_path.iterdir())
    save_findings(Findings(damaged=many, duplicates=tuple((name, name) for name in many)), tmp_path)
    assert (tmp_path / "damaged.txt").read_text() == "".join(f"{i}\n" for i in range(21))
    assert (tmp_path / "duplicates.txt").read_text().startswith("0\t0\n1\t1\n")
    dataset = create_dataset([10, 10], [1, 1], Findings(damaged=many))
    assert next(describe_warnings(dataset)).endswith("18, 19 and 1 more")
