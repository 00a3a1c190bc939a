import pytest

from vit_jax.data.splits import Request, nearest_first, parse_split, select_rows
from vit_jax.runtime.errors import UsageError


def rows(*splits, num_images=1437):
    request = Request(name="digits", splits=dict(zip(("train", "test", "validation"), splits, strict=False)))
    return list(select_rows(request.slices(), {"train": num_images, "test": 3}).values())


@pytest.mark.parametrize("text", ["", "train[", "train[3]", "train[:1.5]", "train[a:b]", "train[:90%", "train+test"])
def test_parse_split_rejects_invalid_syntax(text):
    with pytest.raises(UsageError, match=r"unknown split .*; expected a name, or a slice such as 'train\[:90%\]'"):
        parse_split(text)


def test_parse_split_suggests_nearest_names():
    with pytest.raises(UsageError, match="unknown split 'tset'; expected test, train, or a slice"):
        parse_split("tset", known=("train", "test"))


@pytest.mark.parametrize("split", ["train[:2000]", "train[-1438:]", "train[:101%]"])
def test_select_rows_rejects_slice_past_end(split):
    with pytest.raises(UsageError, match=r"selects images -?\d+ to \d+ of 1,437 in 'train'"):
        rows(split)


@pytest.mark.parametrize("split", ["train[5:5]", "train[10:5]", "train[1437:]", "train[:0%]"])
def test_select_rows_rejects_empty_slice(split):
    with pytest.raises(UsageError, match="of 1,437 in 'train'; select at least one image"):
        rows(split)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:]", range(10)),
        ("train[:3]", range(3)),
        ("train[8:]", range(8, 10)),
        ("train[2:4]", range(2, 4)),
        ("train[-2:]", range(8, 10)),
        ("train[:90%]", range(9)),
        ("train[90%:]", range(9, 10)),
        ("train[-20%:-10%]", range(8, 9)),
        ("train[:14%]", range(1)),  # 1.4 images, rounded
        ("test[:1]", range(1)),
    ],
)
def test_select_rows_slices_like_tfds(split, expected):
    assert rows(split, num_images=10) == [expected]


def test_select_rows_rejects_validation_slice_that_overlaps():
    with pytest.raises(UsageError, match=r"train_split 'train\[:90%\]' and validation_split 'train\[85%:\]'"):
        rows("train[:90%]", "test", "train[85%:]")


@pytest.mark.parametrize(
    ("train", "test", "shared"),
    [("train", "train[80%:]", "2 of 10"), ("train[:5]", "train[4:]", "1 of 10"), ("test", "test", "3 of 3")],
)
def test_select_rows_rejects_overlapping_slices(train, test, shared):
    with pytest.raises(UsageError, match=rf"overlap in {shared} images; choose disjoint slices"):
        rows(train, test, num_images=10)


def test_nearest_first_sorts_by_similarity():
    assert nearest_first("tset", ["train", "test"]) == ["test", "train"]
