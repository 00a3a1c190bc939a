import random

import numpy as np
import pytest
from image_files import load, write_image

from vit_jax import data
from vit_jax.runtime.errors import UserError


@pytest.fixture
def table(tmp_path):
    """Returns a function that writes a table of ten images of cats and ten of dogs."""
    lines = [(f"images/{name}{i}.png", name) for name in ("cat", "dog") for i in range(10)]
    for label, (path, _) in enumerate(lines):
        write_image(tmp_path / path, color=(label, 0, 0))

    def write(*, header="path,label", suffix="", delimiter=",", shuffle=False, file="images.csv"):
        rows = [f"{path},{label}{suffix}" for path, label in lines]
        if shuffle:
            random.Random(0).shuffle(rows)
        text = "\n".join([header, *rows] if header else rows) + "\n"
        (tmp_path / file).write_text(text.replace(",", delimiter))
        return f"csv:{tmp_path / file}"

    return write


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("header", ["", "path,label", "Image,Class"])
def test_open_csv_detects_delimiter_and_header(table, delimiter, header):
    dataset = load(table(header=header, delimiter=delimiter))
    assert dataset.class_names == ("cat", "dog")
    assert [np.bincount(split.labels).tolist() for split in dataset.splits.values()] == [[7, 7], [1, 1], [2, 2]]
    whole = np.concatenate([split.images[:, 0, 0, 0] for split in dataset.splits.values()])
    assert sorted(whole.tolist()) == list(range(20))


def test_open_csv_is_independent_of_line_order(table):
    first, second = load(table()), load(table(shuffle=True, file="shuffled.csv"))
    assert data.fingerprint(first) == data.fingerprint(second)
    np.testing.assert_array_equal(first.train.images, second.train.images)


def test_open_csv_reads_split_column_and_names_ignored_columns(tmp_path):
    splits = ["train", "val", "test"]
    lines = [f"{i}.png,{'ab'[i % 2]},{splits[i // 4]},{i}" for i in range(12)]
    for i in range(12):
        write_image(tmp_path / f"{i}.png", color=(i, 0, 0))
    (tmp_path / "images.csv").write_text("\ufefffile,label,Subset,width\n" + "\n".join(lines))
    dataset = load(f"csv:{tmp_path / 'images.csv'}")
    assert {role: sorted(split.images[:, 0, 0, 0].tolist()) for role, split in dataset.splits.items()} == {
        "train": [0, 1, 2, 3],
        "validation": [4, 5, 6, 7],
        "test": [8, 9, 10, 11],
    }
    assert dataset.findings.notes == (f"{tmp_path}/images.csv: ignored columns: width",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no table; expected lines of path,label"),
        ("just words\n", "has no table; expected lines of path,label"),
        ("path,label\n", "has a header, but no images"),
        ("path,width\na.png,3\n", "has the columns path, width; expected path and label, also named label, class"),
        ("path,label\na.png,cat\nb.png\n", "line 3: 1 columns; expected 2, as in the first line"),
        ("path,label\na.png,\n", "line 2: the label is empty; fill it in"),
        ("path,label,split\na.png,cat,\n", "line 2: the split is empty; fill it in"),
        ("path,label\na.png,cat\na.png,dog\n", "lists a.png in lines 2 and 3; remove one of them"),
        ("path,label\nb.png,cat\nc.png,dog\n", "2 of 2 images do not exist: b.png, c.png; paths are relative to"),
        (
            "path,label,split\na.png,cat,train\nd.png,dog,test\n",
            "differ: cat .not in test., dog .not in train.;",
        ),
        ("path,label\na.png,a\nd.png,d\n", "a test_fraction of 0.2 selects none of 2 images of 2 classes"),
    ],
)
def test_open_csv_rejects_invalid_tables(tmp_path, text, message):
    for name in ("a.png", "d.png"):
        write_image(tmp_path / name)
    (tmp_path / "images.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load(f"csv:{tmp_path / 'images.csv'}")


def test_open_csv_rejects_files_that_are_not_text(tmp_path):
    write_image(tmp_path / "images.csv.png").rename(tmp_path / "images.csv")
    with pytest.raises(UserError, match=r"images.csv cannot be read \(.*\); expected a table in UTF-8"):
        load(f"csv:{tmp_path / 'images.csv'}")
    with pytest.raises(UserError, match=r"no.csv cannot be read \(No such file or directory\)"):
        load(f"csv:{tmp_path / 'no.csv'}")
