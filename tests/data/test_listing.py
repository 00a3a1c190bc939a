import numpy as np
import pytest
from image_files import load_folder, write_image

from vit_jax import data
from vit_jax.data.splits import sample_fraction, stratified_order
from vit_jax.runtime.errors import UsageError, UserError


def write_classes(root, counts):
    """Writes DIR/CLASS/IMAGE with the given numbers of images; each image has its own pixels."""
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name / f"{i}.png", color=(label, i, 0))
    return root


def counts_of(dataset):
    size = len(dataset.class_names)
    return {role: np.bincount(split.labels, minlength=size).tolist() for role, split in dataset.splits.items()}


def names_of(split, class_name):
    return {path.split("/")[-1] for path in split.paths if path.split("/")[-2] == class_name}


def test_open_listing_makes_stratified_test_and_validation_splits(tmp_path):
    dataset = load_folder(write_classes(tmp_path, {"cat": 50, "dog": 10, "fox": 7}))
    # Of 50, 10 and 7: a fifth is 10, 2 and 1 (1.4); a tenth of the others is 4, 1 (0.8) and 1 (0.6).
    assert counts_of(dataset) == {"train": [36, 7, 5], "validation": [4, 1, 1], "test": [10, 2, 1]}
    paths = np.concatenate([split.paths for split in dataset.splits.values()])
    assert len(set(paths)) == len(paths) == 67
    whole = load_folder(tmp_path, test_fraction=0.5, validation_fraction=0)
    assert counts_of(whole) == {"train": [25, 5, 4], "test": [25, 5, 3]}


def test_open_listing_makes_missing_splits_of_a_folder_with_train(tmp_path):
    write_classes(tmp_path / "train", {"cat": 20, "dog": 20})
    assert counts_of(load_folder(tmp_path)) == {"train": [14, 14], "validation": [2, 2], "test": [4, 4]}
    write_classes(tmp_path / "test", {"cat": 3, "dog": 3})
    assert counts_of(load_folder(tmp_path)) == {"train": [18, 18], "validation": [2, 2], "test": [3, 3]}
    write_classes(tmp_path / "val", {"cat": 1, "dog": 1})
    assert counts_of(load_folder(tmp_path)) == {"train": [20, 20], "validation": [1, 1], "test": [3, 3]}


def test_open_listing_made_splits_depend_on_seed_but_not_on_other_classes(tmp_path):
    write_classes(tmp_path, {"cat": 30, "dog": 30})
    before = load_folder(tmp_path)
    other = load_folder(tmp_path, split_seed=1)
    assert counts_of(other) == counts_of(before)
    assert names_of(other.test, "cat") != names_of(before.test, "cat")
    write_classes(tmp_path, {"ant": 40, "dog": 35})
    after = load_folder(tmp_path)
    for role in ("train", "validation", "test"):
        assert names_of(after.splits[role], "cat") == names_of(before.splits[role], "cat")


def test_load_split_returns_made_splits(tmp_path):
    write_classes(tmp_path, {"cat": 30, "dog": 30})
    dataset = load_folder(tmp_path)
    for role, expected in dataset.splits.items():
        split, class_names = data.load_split(f"folder:{tmp_path}", split=role, image_size=4)
        assert split.paths.tolist() == expected.paths.tolist() and class_names == ("cat", "dog")
    half, _ = data.load_split(f"folder:{tmp_path}", split="test[:50%]", image_size=4)
    assert np.bincount(half.labels).tolist() == [3, 3] and set(half.paths) < set(dataset.test.paths)


def test_open_listing_rejects_overlap_with_validation(tmp_path):
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    with pytest.raises(UsageError, match=r"train_split 'train' and validation_split 'train\[:20%\]' overlap"):
        load_folder(tmp_path, validation_split="train[:20%]")


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({"cat": 9}, {}, "has one class, cat; expected at least two"),
        ({"cat": 1, "dog": 2}, {}, "a test_fraction of 0.2 selects none of 3 images of 2 classes; add images, or"),
        (
            {"cat": 9, "dog": 9},
            {"test_fraction": 0},
            "has no split 'test'; it has train; set dataset.test_fraction",
        ),
        (
            {"cat": 9, "dog": 9},
            {"train_split": "train[:1]"},
            "has 1 training images of 2 classes; expected",
        ),
        ({"cat": 9, "dog": 9}, {"test_split": "extra"}, "has no split 'extra'; it has train; choose one of these"),
    ],
)
def test_open_listing_rejects_splits_that_cannot_be_made(tmp_path, counts, options, message):
    write_classes(tmp_path, counts)
    with pytest.raises(UserError, match=message):
        load_folder(tmp_path, **options)


def test_open_listing_ignores_differing_classes_that_are_not_chosen(tmp_path):
    write_classes(tmp_path / "train", {"cat": 2, "dog": 2, "fox": 2})
    write_classes(tmp_path / "test", {"cat": 2, "dog": 2})
    with pytest.raises(UserError, match=r"these differ: fox \(not in test\); add images, or choose classes with"):
        load_folder(tmp_path)
    assert counts_of(load_folder(tmp_path, classes=("dog", "cat")))["test"] == [2, 2]


def test_stratified_order_spreads_classes_evenly():
    labels = np.repeat([0, 1], [12, 4])
    order = stratified_order(labels, np.random.default_rng(0).integers(0, 2**63, 16).astype(np.uint64))
    assert sorted(order.tolist()) == list(range(16))
    assert [np.bincount(labels[order[i : i + 4]]).tolist() for i in range(0, 16, 4)] == [[3, 1]] * 4


def test_sample_fraction_keeps_an_image_of_each_class():
    labels, hashes = np.array([0, 1, 1, 1, 1]), np.array([7, 4, 1, 3, 2], np.uint64)
    assert sample_fraction(labels, hashes, 0.5).tolist() == [False, False, True, False, True]  # the smallest hashes
    assert sample_fraction(labels, hashes, 0.99).tolist() == [False, False, True, True, True]
    assert not sample_fraction(labels, hashes, 0.1).any()
