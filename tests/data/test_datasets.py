"""Every dataset layout, with files small enough to count by hand."""

import gzip
import io
import logging
import os
import struct
import subprocess
import sys
import tarfile
import textwrap
import zlib

import numpy as np
import pytest
from PIL import Image

from vit_jax import data
from vit_jax.data import images as pictures
from vit_jax.runtime import download, progress, resources
from vit_jax.runtime.errors import UsageError, UserError

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


# Files


def cifar_record(labels, red=1, green=2, blue=3):
    """One record whose pixels are constant, but for the second of the first row, which is red + 10."""
    pixels = np.repeat(np.array([red, green, blue], np.uint8), 32 * 32)
    pixels[1] = red + 10
    return bytes(labels) + pixels.tobytes()


def cifar10_files():
    """Two records in each training file, labels 0..9 in turn, and three to test on."""
    files = {f"data_batch_{i + 1}.bin": cifar_record([2 * i]) + cifar_record([2 * i + 1]) for i in range(5)}
    files["test_batch.bin"] = cifar_record([7], red=50) + cifar_record([8]) + cifar_record([9])
    files["batches.meta.txt"] = "\n".join([*CIFAR10_CLASSES, "", ""]).encode()
    return files


def cifar100_files():
    """Coarse labels are 1, fine ones 98 and 99."""
    return {
        "train.bin": cifar_record([1, 98]) + cifar_record([1, 99]),
        "test.bin": cifar_record([1, 99]),
        "fine_label_names.txt": "\n".join(f"fine{i}" for i in range(100)).encode(),
        "coarse_label_names.txt": "\n".join(f"coarse{i}" for i in range(20)).encode(),
    }


def write_archive(path, files, folder="cifar-10-batches-bin"):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_picture(path, *, size=(4, 4), color=(255, 0, 0), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


@pytest.fixture
def archive(tmp_path):
    return write_archive(tmp_path / "cifar-10-binary.tar.gz", cifar10_files())


@pytest.fixture
def folder(tmp_path):
    """Two classes, cat and dog: two pictures each to train on, one each to test on; red is 10 * class + number."""
    for split, num_images in {"train": 2, "test": 1}.items():
        for label, name in enumerate(["cat", "dog"]):
            for i in range(num_images):
                write_picture(tmp_path / "pets" / split / name / f"{i}.png", color=(10 * label + i, 0, 0))
    return tmp_path / "pets"


def load(name, *, image_size=4, **kwargs):
    return data.load_dataset(str(name), image_size=image_size, **kwargs)


def load_folder(path, **kwargs):
    return load(f"folder:{path}", **kwargs)


# Names and splits


def test_load_dataset_lists_the_known_names_nearest_first():
    with pytest.raises(UsageError, match="unknown dataset 'cifar1000'; known are cifar100, cifar10, "):
        load("cifar1000")


@pytest.mark.parametrize("name", ["folder", "folder:", "tfds:", ""])
def test_load_dataset_refuses_an_incomplete_name(name):
    with pytest.raises(UsageError, match="folder:DIR"):
        load(name)


@pytest.mark.parametrize("name", ["digits", "folder:x"])
def test_load_dataset_refuses_a_data_dir_that_nobody_reads(name):
    with pytest.raises(UsageError, match="does not read data_dir, got 'here'"):
        load(name, data_dir="here")


def test_load_dataset_lists_the_known_splits():
    with pytest.raises(UsageError, match="unknown split 'tset'; known are test, train"):
        load("digits", test_split="tset")


@pytest.mark.parametrize("split", ["", "train[", "train[3]", "train[:1.5]", "train[a:b]", "train[:90%", "train+test"])
def test_load_dataset_refuses_a_split_that_cannot_be_read(split):
    with pytest.raises(UsageError, match="cannot read split"):
        load("digits", train_split=split)


def test_load_dataset_refuses_percentages_above_100():
    with pytest.raises(UsageError, match="percentages lie between"):
        load("digits", train_split="train[:101%]")


def test_load_dataset_refuses_a_slice_past_the_end():
    with pytest.raises(UsageError, match=r"'train\[:2000\]' reaches past the 1437 pictures"):
        load("digits", train_split="train[:2000]")


@pytest.mark.parametrize("split", ["train[5:5]", "train[10:5]", "train[1437:]", "train[:0%]"])
def test_load_dataset_refuses_an_empty_slice(split):
    with pytest.raises(UserError, match="is empty: 1437 pictures in 'train'"):
        load("digits", train_split=split)


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
        ("train[:14%]", [0]),  # 1.4 pictures: the closest
        ("test[:1]", [7]),
    ],
)
def test_load_dataset_slices_as_tfds_does(archive, split, labels):
    test_split = "train" if split.startswith("test") else "test"
    dataset = load("cifar10", data_dir=str(archive), train_split=split, test_split=test_split)
    assert dataset.train.labels.tolist() == list(labels)
    assert len(dataset.train.images) == len(labels)


def test_load_dataset_cuts_both_splits_from_one(archive):
    dataset = load("cifar10", data_dir=str(archive), train_split="train[:70%]", test_split="train[70%:]")
    assert dataset.train.labels.tolist() + dataset.test.labels.tolist() == list(range(10))


# Digits


def test_digits_has_1437_and_360_pictures():
    dataset = load("digits")
    assert dataset.train.images.shape == (1437, 8, 8, 3)
    assert dataset.test.images.shape == (360, 8, 8, 3)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert dataset.class_names == tuple("0123456789")


def test_digits_scales_16_to_255():
    from sklearn.datasets import load_digits

    digits = load_digits()
    first = np.random.RandomState(0).permutation(1797)[0]
    image = load("digits").train.images[0]
    np.testing.assert_array_equal(image[..., 0], np.round(digits.images[first] * 255 / 16))
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    assert image.max() == 255


def test_digits_are_mixed_and_all_there():
    dataset = load("digits")
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(dataset.test.labels).min() > 25


# CIFAR


def test_cifar10_reads_the_archive(archive):
    dataset = load("cifar10", data_dir=str(archive))
    assert dataset.train.images.shape == (10, 32, 32, 3)
    assert dataset.train.labels.tolist() == list(range(10))
    assert dataset.test.labels.tolist() == [7, 8, 9]
    assert dataset.class_names == tuple(CIFAR10_CLASSES)


def test_cifar10_puts_channels_last(archive):
    image = load("cifar10", data_dir=str(archive)).test.images[0]
    assert image[0, 0].tolist() == [50, 2, 3]
    assert image[0, 1].tolist() == [60, 2, 3]  # the second pixel of the first row
    assert image[1, 0].tolist() == [50, 2, 3]


def test_cifar10_gives_contiguous_arrays(archive):
    dataset = load("cifar10", data_dir=str(archive))
    assert dataset.train.images.flags.c_contiguous
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32


def test_cifar10_finds_the_archive_in_a_folder(archive):
    assert len(load("cifar10", data_dir=str(archive.parent)).train) == 10


@pytest.mark.parametrize("subfolder", [".", "cifar-10-batches-bin"])
def test_cifar10_finds_unpacked_files(tmp_path, subfolder):
    write_files(tmp_path / subfolder, cifar10_files())
    assert len(load("cifar10", data_dir=str(tmp_path)).train) == 10


def test_cifar10_fetches_the_official_archive_into_the_cache(archive, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "fetch", lambda url, path, **kwargs: asked.append((url, path, kwargs)) or archive)
    assert len(load("cifar10").train) == 10
    assert asked == [
        (
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            tmp_path / "cache" / "cifar-10-binary.tar.gz",
            {
                "num_bytes": 170_052_171,
                "sha256": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            },
        )
    ]


def test_cifar10_warns_once_of_an_unofficial_archive(archive, caplog):
    with caplog.at_level(logging.WARNING):
        load("cifar10", data_dir=str(archive))
    assert [record.getMessage() for record in caplog.records] == [
        f"{archive} is not the official archive (its sha256 differs); reading on"
    ]


def test_cifar100_uses_the_fine_labels(tmp_path):
    write_archive(tmp_path / "cifar-100-binary.tar.gz", cifar100_files(), folder="cifar-100-binary")
    dataset = load("cifar100", data_dir=str(tmp_path))
    assert dataset.train.labels.tolist() == [98, 99]
    assert dataset.train.images[0, 0, :2].tolist() == [[1, 2, 3], [11, 2, 3]]
    assert dataset.class_names[:2] == ("fine0", "fine1")
    assert len(dataset.class_names) == 100


def test_cifar100_finds_unpacked_files(tmp_path):
    write_files(tmp_path / "cifar-100-binary", cifar100_files())
    assert load("cifar100", data_dir=str(tmp_path)).test.labels.tolist() == [99]


@pytest.mark.parametrize("kept_share", [0.5, 0.99])
def test_cifar10_refuses_a_truncated_archive(archive, kept_share):
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * kept_share)])
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz \([\d,]+ bytes\) is truncated or damaged"):
        load("cifar10", data_dir=str(archive))


def test_cifar10_refuses_an_archive_without_its_checksum(archive):
    archive.write_bytes(archive.read_bytes()[:-4])
    with pytest.raises(UserError, match="is truncated or damaged"):
        load("cifar10", data_dir=str(archive))


@pytest.mark.parametrize("content", [b"<html>sorry</html>", b"", gzip.compress(b"no tar" * 1000, mtime=0)])
def test_cifar10_refuses_what_is_no_archive(archive, content):
    archive.write_bytes(content)
    with pytest.raises(UserError, match="cifar-10-binary.tar.gz"):
        load("cifar10", data_dir=str(archive))


def test_cifar10_refuses_the_python_version(tmp_path):
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz", {"data_batch_1": b""}, folder="cifar-10-batches-py")
    with pytest.raises(UserError, match=r"data_batch_1.bin.*not the binary version.*cifar-10-binary.tar.gz"):
        load("cifar10", data_dir=str(archive))


def test_cifar10_refuses_a_file_that_is_cut_off(tmp_path):
    files = cifar10_files()
    files["data_batch_2.bin"] = files["data_batch_2.bin"][:-1]
    write_files(tmp_path, files)
    with pytest.raises(UserError, match="data_batch_2.bin has 6,145 bytes, expected a multiple of 3,073"):
        load("cifar10", data_dir=str(tmp_path))


def test_cifar10_refuses_an_empty_file(tmp_path):
    write_files(tmp_path, cifar10_files() | {"test_batch.bin": b""})
    with pytest.raises(UserError, match="test_batch.bin has 0 bytes"):
        load("cifar10", data_dir=str(tmp_path))


def test_cifar10_refuses_labels_out_of_range(tmp_path):
    write_files(tmp_path, cifar10_files() | {"test_batch.bin": cifar_record([9]) + cifar_record([10])})
    with pytest.raises(UserError, match="test_batch.bin: record 1 has label 10, expected 0..9"):
        load("cifar10", data_dir=str(tmp_path))


def test_cifar10_refuses_a_wrong_number_of_classes(tmp_path):
    write_files(tmp_path, cifar10_files() | {"batches.meta.txt": b"cat\ndog\n"})
    with pytest.raises(UserError, match="batches.meta.txt lists 2 classes, expected 10"):
        load("cifar10", data_dir=str(tmp_path))


def test_cifar10_says_what_a_data_dir_lacks(tmp_path):
    with pytest.raises(UserError, match=r"no cifar-10-binary.tar.gz, no files of cifar-10-batches-bin; give the path"):
        load("cifar10", data_dir=str(tmp_path))


def test_cifar10_says_that_a_data_dir_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such file or folder; give the path of cifar-10-binary.tar.gz"):
        load("cifar10", data_dir=str(tmp_path / "nowhere"))


def test_cifar10_reads_the_real_pictures(cifar10_archive):
    dataset = load("cifar10", data_dir=str(cifar10_archive))
    assert dataset.train.images.shape == (50_000, 32, 32, 3)
    assert dataset.test.images.shape == (10_000, 32, 32, 3)
    assert dataset.class_names == tuple(CIFAR10_CLASSES)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    # Krizhevsky's means, 0.4914, 0.4822, 0.4465: wrong axes or a shifted record would move them.
    means = dataset.train.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=2e-3)


# Folders


def test_folder_sorts_classes_and_files(folder):
    dataset = load_folder(folder)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.train.labels.dtype == np.int32
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert dataset.test.images[:, 0, 0, 0].tolist() == [0, 10]


def test_folder_takes_other_split_names(folder):
    (folder / "test").rename(folder / "val")
    assert len(load_folder(folder, test_split="val").test) == 2


def test_folder_cuts_a_slice_from_all_classes(folder):
    for label, name in enumerate(["cat", "dog"]):
        for i in range(2, 50):
            write_picture(folder / "train" / name / f"{i}.png", color=(10 * label, 0, 0))
    dataset = load_folder(folder, train_split="train[:90%]", test_split="train[90%:]")
    assert (len(dataset.train), len(dataset.test)) == (90, 10)
    assert set(dataset.test.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("suffix", [".PNG", ".jpg", ".JPEG", ".webp"])
def test_folder_reads_the_suffix(folder, suffix):
    write_picture(folder / "train" / "cat" / f"more{suffix}")
    assert len(load_folder(folder).train) == 5


def test_folder_passes_over_other_and_hidden_files(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("")
    (folder / "train" / "cat" / "._0.png").write_text("")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "README").write_text("")
    assert len(load_folder(folder).train) == 4


def test_folder_keeps_one_small_size(folder):
    assert load_folder(folder, image_size=2).train.images.shape == (4, 4, 4, 3)


def test_folder_keeps_one_small_size_that_is_not_square(tmp_path):
    for split in ("train", "test"):
        write_picture(tmp_path / split / "cat" / "0.png", size=(6, 5))
    assert load_folder(tmp_path).train.images.shape == (1, 5, 6, 3)


def test_folder_resizes_pictures_above_twice_the_size(folder):
    assert load_folder(folder, image_size=1).train.images.shape == (4, 1, 1, 3)


def test_folder_resizes_where_sizes_differ_between_splits(folder):
    write_picture(folder / "test" / "cat" / "0.png", size=(5, 4))
    dataset = load_folder(folder, image_size=3)
    assert dataset.train.images.shape == (4, 3, 3, 3)
    assert dataset.test.images.shape == (2, 3, 3, 3)


def test_folder_counts_turned_pictures_as_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    write_picture(tmp_path / "train" / "cat" / "0.jpg", size=(6, 5), exif=exif)
    write_picture(tmp_path / "test" / "cat" / "0.jpg", size=(5, 6))
    assert load_folder(tmp_path).train.images.shape == (1, 6, 5, 3)


def test_folder_names_differing_classes(folder):
    write_picture(folder / "train" / "bird" / "0.png")
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    expected = r"these differ: bird \(only in train\), dog \(only in train\), wolf \(only in test\)"
    with pytest.raises(UserError, match=expected):
        load_folder(folder)


def test_folder_names_an_empty_class(folder):
    (folder / "train" / "bird").mkdir()
    with pytest.raises(UserError, match=r"bird has no pictures \(.png, .jpg, .jpeg, .webp\)$"):
        load_folder(folder)


def test_folder_says_that_a_class_has_only_other_files(folder):
    write_picture(folder / "train" / "bird" / "0.bmp")
    with pytest.raises(UserError, match=r"bird has no pictures \(.png, .*\); its 1 other files are not read"):
        load_folder(folder)


def test_folder_names_a_missing_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        load_folder(tmp_path / "nowhere")


def test_folder_names_a_missing_split(folder):
    with pytest.raises(UserError, match="val: no such directory"):
        load_folder(folder, test_split="val")


def test_folder_refuses_a_split_without_classes(folder):
    (folder / "val").mkdir()
    with pytest.raises(UserError, match="val has no class folders"):
        load_folder(folder, test_split="val")


def test_folder_names_a_picture_that_is_none(folder):
    (folder / "train" / "cat" / "0.png").write_text("hello")
    with pytest.raises(UserError, match=r"cat/0.png cannot be decoded \(not a picture\); replace or remove it$"):
        load_folder(folder)


def test_folder_does_not_wait_for_a_pipe(folder):
    os.mkfifo(folder / "train" / "cat" / "9.png")
    with pytest.raises(UserError, match=r"cat/9.png cannot be decoded \(no regular file\)"):
        load_folder(folder)


def test_folder_names_a_truncated_picture_and_counts_the_others(folder):
    for name in ("cat", "dog"):
        path = write_picture(folder / "train" / name / "1.png", size=(4, 4))
        path.write_bytes(path.read_bytes()[:50])  # the header is whole, the pixels are not
    with pytest.raises(UserError, match=r"cat/1.png cannot be decoded \(.*; 1 more pictures fail$"):
        load_folder(folder)


def test_folder_says_how_much_memory_is_missing(folder, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 100)
    with pytest.raises(UserError, match="need 288 bytes of memory, 100 are available"):  # 6 pictures, 4 x 4 x 3
        load_folder(folder, storage="memory")


def test_folder_is_decoded_later_where_it_would_fill_half_the_memory(folder, monkeypatch):
    whole = load_folder(folder)
    assert load_folder(folder, device_bytes=576).train.in_memory  # twice the 288 bytes
    later = load_folder(folder, device_bytes=575)
    monkeypatch.setattr(resources, "available_memory", lambda: 575)
    for dataset in (later, load_folder(folder), load_folder(folder, device_bytes=10**6)):
        for ours, theirs in ((dataset.train, whole.train), (dataset.test, whole.test)):
            assert not ours.in_memory and ours.images.shape == theirs.images.shape
            np.testing.assert_array_equal(ours.images[:], theirs.images)
            np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_pictures_that_are_decoded_later_read_like_an_array(folder):
    whole, later = load_folder(folder).train.images, load_folder(folder, storage="stream").train.images
    for rows in (1, -1, slice(1, 3), np.array([2, 0, 2]), np.array([True, False, True, False])):
        np.testing.assert_array_equal(later[rows], whole[rows])
    np.testing.assert_array_equal(later.take([3, 1])[np.array([1])], whole[[1]])


def test_a_box_of_a_picture_is_cut_out_and_resized(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cut = pictures.decode_image(tmp_path / "a.png", size=(2, 2), sample_box=lambda height, width: (1, 2, 2, 2))
    np.testing.assert_array_equal(cut, pixels[1:3, 2:4])
    shifted = pictures.decode_image(
        tmp_path / "a.png", size=(4, 4), sample_box=lambda height, width: (-1, 2, 4, 4), margin_color=(9, 8, 7)
    )
    np.testing.assert_array_equal(np.asarray(shifted)[1:, :2], pixels[:3, 2:])
    assert np.unique(np.asarray(shifted)[:1].reshape(-1, 3), axis=0).tolist() == [[9, 8, 7]]
    assert np.unique(np.asarray(shifted)[:, 2:].reshape(-1, 3), axis=0).tolist() == [[9, 8, 7]]


def test_a_box_of_a_large_jpeg_or_a_turned_one_is_cut_where_it_lies(tmp_path):
    left_half = np.zeros((400, 800, 3), np.uint8)
    left_half[:, :400] = 200
    Image.fromarray(left_half).save(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees: what is left comes to the top
    Image.fromarray(left_half).save(tmp_path / "turned.jpg", exif=exif)
    sizes = []

    def right_half(height, width):
        sizes.append((height, width))
        return 0, width / 2, height, width / 2

    assert np.asarray(pictures.decode_image(tmp_path / "a.jpg", size=(8, 8), sample_box=right_half)).max() < 10
    turned = np.asarray(pictures.decode_image(tmp_path / "turned.jpg", size=(8, 8), sample_box=right_half))
    assert turned[:3].min() > 190 and turned[5:].max() < 10
    assert sizes == [(400, 800), (800, 400)]


def test_folder_shows_progress_where_it_takes_long_only(folder, monkeypatch, capfd):
    load_folder(folder)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0)
    load_folder(folder)
    out, err = capfd.readouterr()
    assert "decoding" in err and "0/4" in err
    assert out == ""


# Single pictures


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("L", 7, [7, 7, 7]),
        ("1", 1, [255, 255, 255]),
        ("I;16", 0x1234, [0x12, 0x12, 0x12]),
        ("LA", (9, 255), [9, 9, 9]),
        ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 0), [255, 255, 255]),  # transparent: white
    ],
)
def test_decode_picture_turns_any_mode_into_rgb(tmp_path, mode, color, rgb):
    picture = data.decode_image(write_picture(tmp_path / "0.png", mode=mode, color=color))
    assert picture.mode == "RGB"
    assert np.asarray(picture)[0, 0].tolist() == rgb


def test_decode_picture_reads_a_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "0.png", transparency=bytes([255, 0]))
    assert np.asarray(data.decode_image(tmp_path / "0.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_decode_picture_reads_cmyk(tmp_path):
    path = write_picture(tmp_path / "0.jpg", mode="CMYK", color=(0, 0, 0, 0))
    assert np.asarray(data.decode_image(path))[0, 0].tolist() == [255, 255, 255]


def test_decode_picture_turns_it_upright(tmp_path):
    image = Image.new("RGB", (2, 1), (0, 0, 0))
    image.putpixel((1, 0), (255, 255, 255))  # black, white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: black above white
    image.save(tmp_path / "0.png", exif=exif)
    assert np.asarray(data.decode_image(tmp_path / "0.png"))[..., 0].tolist() == [[0], [255]]


def test_decode_picture_reads_an_open_file():
    file = io.BytesIO()
    Image.new("RGB", (2, 3)).save(file, "png")
    file.seek(0)
    assert data.decode_image(file).size == (2, 3)


def test_decode_picture_averages_when_it_shrinks(tmp_path):
    checkered = np.indices((64, 64)).sum(axis=0) % 2 * 255
    Image.fromarray(checkered.astype(np.uint8)).save(tmp_path / "0.png")
    pixels = np.asarray(data.decode_image(tmp_path / "0.png", size=(4, 4)))
    np.testing.assert_allclose(pixels[1:3, 1:3], 127.5, atol=2)


def test_decode_picture_shrinks_a_big_jpeg_as_without_shortcut(tmp_path):
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    Image.fromarray(np.tile(ramp, (1024, 1))).save(tmp_path / "0.jpg", quality=95)
    direct = data.decode_image(tmp_path / "0.jpg").resize((16, 16), Image.Resampling.BILINEAR)
    pixels = np.asarray(data.decode_image(tmp_path / "0.jpg", size=(16, 16)))
    np.testing.assert_allclose(pixels.astype(int), np.asarray(direct), atol=2)


def test_decode_picture_names_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"0.png: no such file"):
        data.decode_image(tmp_path / "0.png")


def test_decode_picture_names_a_truncated_file(tmp_path):
    path = write_picture(tmp_path / "0.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"0.jpg cannot be decoded \(.*[Tt]runcated.*\); replace or remove it"):
        data.decode_image(path)


# TFDS


def run_python(code, *arguments):
    """TFDS registers builders and logs for a whole process: each of these tests gets its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONWARNINGS")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


PREPARE = """
    import io
    import sys

    import numpy as np
    import tensorflow_datasets as tfds
    from PIL import Image

    label = tfds.features.ClassLabel(names=["cat", "dog"]) if "labels" in sys.argv else tfds.features.Scalar(np.int64)
    image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    features = tfds.features.FeaturesDict({"image": image, "label": label})

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

        def _generate_examples(self, num_images):
            for i in range(num_images):
                file = io.BytesIO()
                Image.new("RGB", (6 + ("wide" in sys.argv) * i, 5), (10 * i, 0, 0)).save(file, "png")
                file.seek(0)
                yield i, {"image": file, "label": i % 2}

    Pets(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""

STREAM = """
    import sys

    from vit_jax.data import load_dataset
    from vit_jax.data.streaming import training_batches

    if __name__ == "__main__":
        train = load_dataset(sys.argv[1], data_dir=sys.argv[2], image_size=4, storage="stream").train
        options = {"augment": "none", "margin_color": (0, 0, 0), "batch_size": 2, "seed": 0, "num_workers": 1}
        batches = training_batches(train, first_step=0, num_steps=2, **options)
        pairs = [(int(image[0, 0, 0]) // 10, int(label)) for batch in batches for image, label in zip(*batch)]
        print(sorted(pairs))
"""

SHOW = """
    import sys

    from vit_jax.data import load_dataset
    from vit_jax.runtime.errors import UserError

    name, data_dir, train_split = sys.argv[1:]
    try:
        dataset = load_dataset(name, data_dir=data_dir, train_split=train_split, image_size=4)
        print(dataset.class_names)
        print(dataset.train.images.shape, dataset.test.images.shape)
        print(sorted(zip((dataset.train.images[:, 0, 0, 0] // 10).tolist(), dataset.train.labels.tolist())))
        print("tensorflow" in sys.modules)
    except UserError as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    run_python(PREPARE, path, "labels")
    return path


def test_tfds_reads_array_records_without_tensorflow(tfds_dir):
    class_names, shapes, pairs, has_tensorflow = run_python(SHOW, "tfds:pets", tfds_dir, "train")[-4:]
    assert class_names == "('cat', 'dog')"
    assert shapes == "(4, 5, 6, 3) (2, 5, 6, 3)"
    assert pairs == "[(0, 0), (1, 1), (2, 0), (3, 1)]"
    assert has_tensorflow == "False"


def test_tfds_streams_what_does_not_fit(tfds_dir, tmp_path):
    """The source of records comes into the worker processes."""
    (tmp_path / "main.py").write_text(textwrap.dedent(STREAM))
    code = f"import runpy; runpy.run_path({str(tmp_path / 'main.py')!r}, run_name='__main__')"
    (pairs,) = run_python(code, "tfds:pets", tfds_dir)[-1:]
    assert pairs == "[(0, 0), (1, 1), (2, 0), (3, 1)]"


def test_tfds_slices(tfds_dir):
    assert run_python(SHOW, "tfds:pets", tfds_dir, "train[:75%]")[-3] == "(3, 5, 6, 3) (2, 5, 6, 3)"


def test_tfds_resizes_where_sizes_differ(tmp_path):
    run_python(PREPARE, tmp_path, "labels", "wide")
    assert run_python(SHOW, "tfds:pets", tmp_path, "train")[-3] == "(4, 4, 4, 3) (2, 4, 4, 3)"


def test_tfds_wants_class_names(tmp_path):
    run_python(PREPARE, tmp_path)
    message = run_python(SHOW, "tfds:pets", tmp_path, "train")[-1]
    assert "tfds:pets has the features image, label; expected" in message
    assert "a `label` with class names" in message


def test_tfds_lists_the_known_splits(tfds_dir):
    message = run_python(SHOW, "tfds:pets", tfds_dir, "trian")[-1]
    assert message == "UsageError unknown split 'trian' of tfds:pets; known are train, test"


def test_tfds_gives_the_command_that_prepares(tmp_path):
    message = run_python(SHOW, "tfds:mnist", tmp_path, "train")[-1]
    assert message.startswith(f"UserError tfds:mnist is not prepared in {tmp_path}/mnist/")
    assert message.endswith(
        "prepare it: pip install 'vit_jax[tfds]' && python -c 'import tensorflow_datasets as tfds;"
        f' tfds.builder("mnist", data_dir="{tmp_path}", file_format="array_record").download_and_prepare()\''
    )


def test_tfds_names_the_nearest_dataset(tmp_path):
    message = run_python(SHOW, "tfds:mnits", tmp_path, "train")[-1]
    assert message.startswith(f"UsageError TFDS knows no 'mnits', nor does {tmp_path} hold it; nearest are mnist")


def test_tfds_refuses_another_file_format(tfds_dir, tmp_path):
    info = (tfds_dir / "pets" / "1.0.0" / "dataset_info.json").read_text()
    write_files(
        tmp_path / "pets" / "1.0.0",
        {
            "dataset_info.json": info.replace("array_record", "tfrecord").encode(),
            "features.json": (tfds_dir / "pets" / "1.0.0" / "features.json").read_bytes(),
        },
    )
    message = run_python(SHOW, "tfds:pets", tmp_path, "train")[-1]
    assert message.startswith("UserError tfds:pets cannot be read as array_record (")
    assert "prepare it: pip install" in message


def test_load_dataset_imports_tfds_for_tfds_only():
    code = """
        import sys
        from vit_jax.data import load_dataset
        load_dataset("digits", image_size=8)
        print("tensorflow_datasets" in sys.modules)
    """
    assert run_python(code) == ["False"]


# ---- some classes


def test_classes_are_kept_in_the_order_given():
    whole = data.load_dataset("digits", image_size=16)
    some = data.load_dataset("digits", image_size=16, classes=("7", "2", "4"))
    assert some.class_names == ("7", "2", "4")
    for split, ours in ((whole.train, some.train), (whole.test, some.test)):
        kept = np.isin(split.labels, (7, 2, 4))
        np.testing.assert_array_equal(ours.images, split.images[kept])
        np.testing.assert_array_equal(np.array([7, 2, 4])[ours.labels], split.labels[kept])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("7", "seven"), "config.dataset.classes: no class 'seven'; there are "),
        (("7",), "config.dataset.classes is ('7',); expected at least two different names"),
        (("7", "7"), "expected at least two different names"),
    ],
)
def test_classes_that_cannot_be_are_refused(classes, message):
    with pytest.raises(UsageError) as error:
        data.load_dataset("digits", image_size=16, classes=classes)
    assert message in str(error.value)


def test_splits_without_the_classes_are_refused():
    labels = data.load_dataset("digits", image_size=16).train.labels[:3]
    absent = sorted({str(digit) for digit in range(10)} - {str(label) for label in labels})
    with pytest.raises(UserError, match=r"no images of the classes .*; give larger splits"):
        data.load_dataset("digits", image_size=16, classes=absent, train_split="train[:3]")


def test_decode_picture_applies_an_orientation_of_xmp_or_late_exif(tmp_path):
    """The image is 8 pixels high and 4 wide once it is turned; its upper half is white."""
    stored = np.zeros((4, 8, 3), np.uint8)
    stored[:, :4] = 255  # orientation 6: turned by 90 degrees clockwise, what is left comes to the top
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(stored).save(tmp_path / "xmp.webp", lossless=True, xmp=xmp)
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "png")
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png = buffer.getvalue()
    (tmp_path / "late.png").write_bytes(png[:-12] + chunk + png[-12:])  # before the last chunk, IEND
    for name in ("xmp.webp", "late.png"):
        with Image.open(tmp_path / name) as image:
            assert pictures.upright_size(image) == (4, 8), name
        decoded = np.asarray(pictures.decode_image(tmp_path / name, size=(4, 8)))
        assert decoded[:4].min() == 255 and decoded[4:].max() == 0, name


@pytest.mark.parametrize(
    ("train", "test", "shared"),
    [("train", "train[80%:]", "2 of 10"), ("train[:5]", "train[4:]", "1 of 10"), ("test", "test", "3 of 3")],
)
def test_load_dataset_rejects_overlapping_slices(archive, train, test, shared):
    with pytest.raises(UsageError, match=rf"overlap in {shared} images; choose disjoint slices"):
        load("cifar10", data_dir=str(archive), train_split=train, test_split=test)


def test_load_dataset_rejects_overlapping_slices_of_a_folder(folder):
    with pytest.raises(
        UsageError, match="train_split 'train' and test_split 'train\\[50%:\\]' overlap in 2 of 4 images"
    ):
        load_folder(folder, test_split="train[50%:]")


def test_load_dataset_does_not_decode_images_of_other_classes(folder):
    for split in ("train", "test"):
        write_picture(folder / split / "fox" / "0.png")
        (folder / split / "fox" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="broken.png cannot be decoded"):
        load_folder(folder)
    dataset = load_folder(folder, classes=("dog", "cat"))
    assert dataset.class_names == ("dog", "cat") and len(dataset.train) == 4


def test_load_dataset_streams_images_of_different_sizes_that_are_cropped(folder):
    """In memory they would have to be resized before they are cropped."""
    write_picture(folder / "train" / "cat" / "large.png", size=(40, 30))
    assert load_folder(folder).train.in_memory
    assert not load_folder(folder, crops=True).train.in_memory
    with pytest.raises(UsageError, match="images of different sizes cannot be cropped in memory; set config.dataset"):
        load_folder(folder, crops=True, storage="memory")


def test_load_dataset_keeps_the_resolution_of_images_that_are_cropped(tmp_path):
    for split in ("train", "test"):
        write_picture(tmp_path / split / "cat" / "0.png", size=(60, 50))
    assert load_folder(tmp_path).train.images.shape == (1, 4, 4, 3)
    assert not load_folder(tmp_path, crops=True).train.in_memory
    assert load_folder(tmp_path, crops=True, storage="memory").train.images.shape == (1, 50, 60, 3)
    assert load_folder(tmp_path, crops=True, image_size=30).train.images.shape == (1, 50, 60, 3)
