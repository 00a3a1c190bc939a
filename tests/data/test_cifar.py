"""CIFAR-10 and CIFAR-100 readers, on archives of a few records."""

import gzip
import io
import tarfile

import numpy as np
import pytest
from image_files import load

from vit_jax import data
from vit_jax.runtime import download
from vit_jax.runtime.errors import UsageError, UserError

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def cifar_record(labels, red=1, green=2, blue=3):
    """Returns one record with constant channels, except that red of pixel (0, 1) is `red + 10`."""
    pixels = np.repeat(np.array([red, green, blue], np.uint8), 32 * 32)
    pixels[1] = red + 10
    return bytes(labels) + pixels.tobytes()


def cifar10_files():
    """Returns five training files of two records each, with labels 0 to 9 in order, and a test file of three."""
    files = {f"data_batch_{i + 1}.bin": cifar_record([2 * i]) + cifar_record([2 * i + 1]) for i in range(5)}
    files["test_batch.bin"] = cifar_record([7], red=50) + cifar_record([8]) + cifar_record([9])
    return files


def cifar100_files():
    """Returns files with coarse label 1 and fine labels 98 and 99."""
    return {
        "train.bin": cifar_record([1, 98]) + cifar_record([1, 99]),
        "test.bin": cifar_record([1, 99]),
    }


def write_archive(path, files, directory="cifar-10-batches-bin"):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{directory}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_files(directory, files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


@pytest.fixture
def archive(tmp_path):
    return write_archive(tmp_path / "cifar-10-binary.tar.gz", cifar10_files())


@pytest.mark.parametrize(
    ("split", "labels"),
    [
        ("train", range(10)),
        ("train[:]", range(10)),
        ("train[:3]", [0, 1, 2]),
        ("train[8:]", [8, 9]),
        ("train[2:4]", [2, 3]),
        ("train[-2:]", [8, 9]),
        ("train[:90%]", range(9)),
        ("train[90%:]", [9]),
        ("train[-20%:-10%]", [8]),
        ("train[:14%]", [0]),  # 1.4 images, rounded
        ("test[:1]", [7]),
    ],
)
def test_open_cifar_slices_like_tfds(archive, split, labels):
    test_split = "train" if split.startswith("test") else "test"
    dataset = load("cifar10", data_dir=str(archive), train_split=split, test_split=test_split)
    assert dataset.train.labels.tolist() == list(labels)
    assert len(dataset.train.images) == len(labels)


def test_open_cifar_takes_both_splits_from_train(archive):
    dataset = load("cifar10", data_dir=str(archive), train_split="train[:70%]", test_split="train[70%:]")
    assert dataset.train.labels.tolist() + dataset.test.labels.tolist() == list(range(10))


def test_open_cifar_reads_archive(archive):
    dataset = load("cifar10", data_dir=str(archive))
    assert dataset.train.images.shape == (10, 32, 32, 3)
    assert dataset.train.labels.tolist() == list(range(10))
    assert dataset.test.labels.tolist() == [7, 8, 9]
    assert dataset.class_names == tuple(CIFAR10_CLASSES)


def test_open_cifar_returns_channels_last(archive):
    image = load("cifar10", data_dir=str(archive)).test.images[0]
    assert image[0, 0].tolist() == [50, 2, 3]
    assert image[0, 1].tolist() == [60, 2, 3]  # the second pixel of the first row
    assert image[1, 0].tolist() == [50, 2, 3]


def test_open_cifar_returns_contiguous_arrays(archive):
    dataset = load("cifar10", data_dir=str(archive))
    assert dataset.train.images.flags.c_contiguous
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32


def test_open_cifar_finds_archive_in_directory(archive):
    assert len(load("cifar10", data_dir=str(archive.parent)).train) == 10


@pytest.mark.parametrize("subfolder", [".", "cifar-10-batches-bin"])
def test_open_cifar_finds_extracted_files(tmp_path, subfolder):
    write_files(tmp_path / subfolder, cifar10_files())
    assert len(load("cifar10", data_dir=str(tmp_path)).train) == 10


def test_open_cifar_downloads_official_archive_to_cache(archive, monkeypatch, tmp_path):
    requests = []
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "fetch", lambda url, path, **kwargs: requests.append((url, path, kwargs)) or archive)
    assert len(load("cifar10").train) == 10
    assert requests == [
        (
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            tmp_path / "cache" / "cifar-10-binary.tar.gz",
            {
                "sha256": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            },
        )
    ]


def test_open_cifar_reads_fine_labels(tmp_path):
    write_archive(tmp_path / "cifar-100-binary.tar.gz", cifar100_files(), directory="cifar-100-binary")
    dataset = load("cifar100", data_dir=str(tmp_path))
    assert dataset.train.labels.tolist() == [98, 99]
    assert dataset.train.images[0, 0, :2].tolist() == [[1, 2, 3], [11, 2, 3]]
    assert dataset.class_names[98:] == ("woman", "worm")
    assert len(dataset.class_names) == 100


def test_open_cifar_finds_extracted_cifar100_files(tmp_path):
    write_files(tmp_path / "cifar-100-binary", cifar100_files())
    assert load("cifar100", data_dir=str(tmp_path)).test.labels.tolist() == [99]


@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_open_cifar_rejects_truncated_archive(archive, fraction):
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz \([\d,]+ bytes\) is truncated or damaged"):
        load("cifar10", data_dir=str(archive))


def test_open_cifar_rejects_truncated_gzip_trailer(archive):
    archive.write_bytes(archive.read_bytes()[:-4])
    with pytest.raises(UserError, match="is truncated or damaged"):
        load("cifar10", data_dir=str(archive))


@pytest.mark.parametrize("content", [b"<html>error</html>", b"", gzip.compress(b"not tar" * 1000, mtime=0)])
def test_open_cifar_rejects_invalid_archive(archive, content):
    archive.write_bytes(content)
    with pytest.raises(UserError, match="cifar-10-binary.tar.gz"):
        load("cifar10", data_dir=str(archive))


def test_open_cifar_rejects_python_version(tmp_path):
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz", {"data_batch_1": b""}, directory="cifar-10-batches-py")
    with pytest.raises(UserError, match=r"has no .*data_batch_1.bin.*set data_dir to cifar-10-binary.tar.gz"):
        load("cifar10", data_dir=str(archive))


def test_open_cifar_rejects_truncated_file(tmp_path):
    files = cifar10_files()
    files["data_batch_2.bin"] = files["data_batch_2.bin"][:-1]
    write_files(tmp_path, files)
    with pytest.raises(UserError, match="data_batch_2.bin has 6,145 bytes; expected records of 3,073 bytes"):
        load("cifar10", data_dir=str(tmp_path))


def test_open_cifar_rejects_empty_file(tmp_path):
    write_files(tmp_path, cifar10_files() | {"test_batch.bin": b""})
    with pytest.raises(UserError, match="test_batch.bin has 0 bytes"):
        load("cifar10", data_dir=str(tmp_path))


def test_open_cifar_rejects_labels_out_of_range(tmp_path):
    write_files(tmp_path, cifar10_files() | {"test_batch.bin": cifar_record([9]) + cifar_record([10])})
    with pytest.raises(
        UserError, match=r"test_batch.bin has .* with labels from 0 to 9; it is damaged or of another dataset"
    ):
        load("cifar10", data_dir=str(tmp_path))


def test_open_cifar_names_missing_files(tmp_path):
    with pytest.raises(UserError, match="has no .*data_batch_1.bin.*; set data_dir to cifar-10-binary.tar.gz"):
        load("cifar10", data_dir=str(tmp_path))


def test_open_cifar_rejects_missing_data_dir(tmp_path):
    with pytest.raises(UserError, match="missing_dir is missing; set data_dir to cifar-10-binary.tar.gz"):
        load("cifar10", data_dir=str(tmp_path / "missing_dir"))


def test_open_cifar_reads_full_dataset(cifar10_archive):
    dataset = load("cifar10", data_dir=str(cifar10_archive))
    assert dataset.train.images.shape == (50_000, 32, 32, 3)
    assert dataset.test.images.shape == (10_000, 32, 32, 3)
    assert dataset.class_names == tuple(CIFAR10_CLASSES)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    # Channel means of CIFAR-10. A wrong axis order or a shifted record would change them.
    means = dataset.train.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=2e-3)


@pytest.mark.parametrize(
    ("train", "test", "shared"),
    [("train", "train[80%:]", "2 of 10"), ("train[:5]", "train[4:]", "1 of 10"), ("test", "test", "3 of 3")],
)
def test_open_cifar_rejects_overlapping_slices(archive, train, test, shared):
    with pytest.raises(UsageError, match=rf"overlap in {shared} images; choose disjoint slices"):
        load("cifar10", data_dir=str(archive), train_split=train, test_split=test)


def load_info(name, **options):
    return data.dataset_info(name, image_size=224, **options)


def test_dataset_info_reads_no_cifar_files(monkeypatch):
    monkeypatch.setattr(download, "fetch", None)
    info = load_info("cifar100", train_split="train[:90%]", data_dir="missing_dir")
    assert (info.num_train, info.num_test, info.image_shape, info.in_memory) == (45_000, 10_000, (32, 32, 3), True)
    assert info.class_names[:2] == ("apple", "aquarium_fish") and len(info.class_names) == 100


@pytest.mark.parametrize(("name", "classes"), [("cifar10", ("dog", "cat")), ("cifar100", ("worm", "apple", "sea"))])
def test_dataset_info_counts_images_of_selected_cifar_classes(name, classes):
    info, half = load_info(name, classes=classes), load_info(name, classes=classes, train_split="train[:50%]")
    per_class = 60_000 // {"cifar10": 10, "cifar100": 100}[name]
    assert (info.num_train, info.num_test) == (len(classes) * per_class * 5 // 6, len(classes) * per_class // 6)
    assert half.num_train == info.num_train // 2
    assert info.class_names == classes
