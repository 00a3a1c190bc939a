import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from image_files import load, load_folder, write_image, write_image_dir
from PIL import Image

from vit_jax import data
from vit_jax.data import images, preprocess
from vit_jax.runtime import resources
from vit_jax.runtime.errors import UsageError, UserError


@pytest.fixture
def image_dir(tmp_path):
    return write_image_dir(tmp_path / "pets")


def test_load_dataset_suggests_nearest_names():
    with pytest.raises(UsageError, match="unknown dataset 'cifar1000'; expected one of cifar100, cifar10, "):
        load("cifar1000")


@pytest.mark.parametrize("name", ["folder", "folder:", "tfds:", ""])
def test_load_dataset_rejects_incomplete_name(name):
    with pytest.raises(UsageError, match="folder:DIR"):
        load(name)


@pytest.mark.parametrize("name", ["digits", "folder:x"])
def test_load_dataset_rejects_unused_data_dir(name):
    with pytest.raises(UsageError, match="dataset.data_dir is 'some_dir'"):
        load(name, data_dir="some_dir")


def test_open_digits_returns_1437_train_and_360_test_images():
    dataset = load("digits")
    assert dataset.train.images.shape == (1437, 8, 8, 3)
    assert dataset.test.images.shape == (360, 8, 8, 3)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert dataset.class_names == tuple("0123456789")


def test_open_digits_scales_pixels_from_16_to_255():
    from sklearn.datasets import load_digits

    digits = load_digits()
    first = np.random.RandomState(0).permutation(1797)[0]
    image = load("digits").train.images[0]
    np.testing.assert_array_equal(image[..., 0], np.round(digits.images[first] * 255 / 16))
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    assert image.max() == 255


def test_open_digits_shuffles_and_keeps_all_images():
    dataset = load("digits")
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(dataset.test.labels).min() > 25


def test_keep_classes_keeps_given_order():
    full = data.load_dataset("digits", image_size=16)
    selected = data.load_dataset("digits", image_size=16, classes=("7", "2", "4"))
    assert selected.class_names == ("7", "2", "4")
    for split, actual in ((full.train, selected.train), (full.test, selected.test)):
        kept = np.isin(split.labels, (7, 2, 4))
        np.testing.assert_array_equal(actual.images, split.images[kept])
        np.testing.assert_array_equal(np.array([7, 2, 4])[actual.labels], split.labels[kept])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("7", "seven"), "dataset.classes: no class 'seven'; expected at least two different names"),
        (("7",), "dataset.classes: got ('7',); expected at least two different names"),
        (("7", "7"), "expected at least two different names"),
    ],
)
def test_keep_classes_rejects_invalid_names(classes, message):
    with pytest.raises(UsageError) as error:
        data.load_dataset("digits", image_size=16, classes=classes)
    assert message in str(error.value)


def test_keep_classes_rejects_split_without_selected_classes():
    labels = data.load_dataset("digits", image_size=16).train.labels[:3]
    absent_classes = sorted({str(digit) for digit in range(10)} - {str(label) for label in labels})
    with pytest.raises(UserError, match=r"no images of the classes .*; choose larger splits"):
        data.load_dataset("digits", image_size=16, classes=absent_classes, train_split="train[:3]")


def test_load_dataset_decodes_only_selected_classes(image_dir):
    for split in ("train", "test"):
        write_image(image_dir / split / "fox" / "0.png")
        (image_dir / split / "fox" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="2 images cannot be decoded: .*/train/fox/broken.png"):
        load_folder(image_dir)
    dataset = load_folder(image_dir, classes=("dog", "cat"))
    assert dataset.class_names == ("dog", "cat") and len(dataset.train) == 4


def test_choose_storage_keeps_size_of_small_images(image_dir):
    assert load_folder(image_dir, image_size=2).train.images.shape == (4, 4, 4, 3)


def test_choose_storage_keeps_size_of_small_non_square_images(tmp_path):
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        write_image(tmp_path / name / "0.png", size=(6, 5))
    assert load_folder(tmp_path).train.images.shape == (2, 5, 6, 3)


def test_choose_storage_resizes_images_above_twice_image_size(image_dir):
    assert load_folder(image_dir, image_size=1).train.images.shape == (4, 1, 1, 3)


def test_choose_storage_resizes_if_sizes_differ_between_splits(image_dir):
    write_image(image_dir / "test" / "cat" / "0.png", size=(5, 4))
    dataset = load_folder(image_dir, image_size=3)
    assert dataset.train.images.shape == (4, 3, 3, 3)
    assert dataset.test.images.shape == (2, 3, 3, 3)


def test_choose_storage_applies_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    for name in ("cat", "dog"):
        write_image(tmp_path / "train" / name / "0.jpg", size=(6, 5), exif=exif)
        write_image(tmp_path / "test" / name / "0.jpg", size=(5, 6))
    assert load_folder(tmp_path).train.images.shape == (2, 6, 5, 3)


def test_choose_storage_reports_required_and_available_memory(image_dir, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 100)
    with pytest.raises(UserError, match="need 288 bytes of memory, 100 are available"):  # 6 images, 4 x 4 x 3
        load_folder(image_dir, storage="memory")


def test_choose_storage_streams_datasets_above_half_of_memory(image_dir, monkeypatch):
    full = load_folder(image_dir)
    assert load_folder(image_dir, device_bytes=576).train.in_memory  # twice the 288 bytes
    streamed = load_folder(image_dir, device_bytes=575)
    monkeypatch.setattr(resources, "available_memory", lambda: 575)
    for dataset in (streamed, load_folder(image_dir), load_folder(image_dir, device_bytes=10**6)):
        for actual, expected in ((dataset.train, full.train), (dataset.test, full.test)):
            assert not actual.in_memory and actual.images.shape == expected.images.shape
            np.testing.assert_array_equal(actual.images[:], expected.images)
            np.testing.assert_array_equal(actual.labels, expected.labels)


def test_choose_storage_streams_cropped_images_of_different_sizes(image_dir):
    """Images in memory have one size, so that they would be resized before cropping."""
    write_image(image_dir / "train" / "cat" / "large.png", size=(40, 30))
    assert load_folder(image_dir).train.in_memory
    assert not load_folder(image_dir, crops=True).train.in_memory
    with pytest.raises(UsageError, match="images of different sizes cannot be cropped in memory; set it to 'auto'"):
        load_folder(image_dir, crops=True, storage="memory")


def test_choose_storage_keeps_resolution_of_cropped_images(tmp_path):
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        write_image(tmp_path / name / "0.png", size=(60, 50))
    assert load_folder(tmp_path).train.images.shape == (2, 4, 4, 3)
    assert not load_folder(tmp_path, crops=True).train.in_memory
    assert load_folder(tmp_path, crops=True, storage="memory").train.images.shape == (2, 50, 60, 3)
    assert load_folder(tmp_path, crops=True, image_size=30).train.images.shape == (2, 50, 60, 3)


def test_load_dataset_center_crops_unless_images_have_image_size(tmp_path):
    """In memory, decoded when indexed, and kept at full resolution for crops, to be resized on the device."""
    for name in ("china", "flower"):
        image = Image.open(Path(sklearn.datasets.__file__).parent / f"images/{name}.jpg").resize((90, 60))
        for split, each in {"train": image, "test": image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)}.items():
            (tmp_path / split / name).mkdir(parents=True)
            each.save(tmp_path / split / name / "0.png")
    load_cropped = functools.partial(load_folder, tmp_path, validation_fraction=0.0, test_resize="center_crop")
    whole = load_folder(tmp_path, image_size=60, validation_fraction=0.0).test.images
    small = load_cropped(image_size=28).test.images  # short side 32, resized to 32 × 48 pixels
    large = [Image.fromarray(image).resize((48, 60), 2).resize((48, 32), 2) for image in whole]  # columns first
    np.testing.assert_array_equal(small, [np.asarray(image.crop((10, 2, 38, 30))) for image in large])
    np.testing.assert_array_equal(load_cropped(image_size=28, storage="stream").test.images[:], small)
    kept = load_cropped(image_size=28, storage="memory", crops=True).test.images
    assert kept.shape == whole.shape == (2, 60, 90, 3)
    on_device = preprocess.prepare(None, kept, image_size=28, resize="center_crop")
    np.testing.assert_array_equal(np.round(np.asarray(on_device) * 127.5 + 127.5), small)
    write_image_dir(tmp_path / "pets")
    np.testing.assert_array_equal(
        load_folder(tmp_path / "pets", image_size=4, test_resize="center_crop").test.images,
        load_folder(tmp_path / "pets", image_size=4).test.images,
    )


def test_describe_storage_counts_bytes_of_all_splits():
    info = data.DatasetInfo(700, 100, (512, 256, 3), ("cat", "dog"), in_memory=True, num_validation=200)
    assert info.describe_storage() == "memory: 375.0 MiB, decoded once to 512 × 256 pixels"  # 1,000 × 384 KiB
    assert dataclasses.replace(info, in_memory=False).describe_storage().startswith("stream: every step decodes")


def test_default_resize_crops_folders():
    assert [data.default_resize(name) for name in ("folder:x", "cifar10", "")] == ["center_crop", "squash", "squash"]


def test_dataset_info_matches_load_dataset(image_dir, monkeypatch):
    write_image(image_dir / "train" / "cat" / "large.png", size=(40, 30))
    cases = [
        ("digits", {}),
        ("digits", {"classes": ("3", "1"), "train_split": "train[:50%]", "test_split": "train[50%:]"}),
        (f"folder:{image_dir}", {}),
        (f"folder:{image_dir}", {"crops": True}),
        (f"folder:{image_dir}", {"classes": ("dog", "cat"), "test_split": "train[:2]", "train_split": "train[2:]"}),
        (f"folder:{image_dir}", {"device_bytes": 100}),
    ]
    for name, options in cases:
        dataset = load(name, **options)
        with monkeypatch.context() as patched:
            patched.setattr(images, "decode_image", None)
            info = data.dataset_info(name, image_size=4, **options)
        assert info.class_names == dataset.class_names
        assert (info.num_train, info.num_test) == (len(dataset.train), len(dataset.test))
        assert info.image_shape == dataset.train.images.shape[1:]
        assert info.in_memory == dataset.train.in_memory


def test_load_dataset_slices_validation_split():
    dataset = load("digits", train_split="train[:90%]", validation_split="train[90%:]")
    full = load("digits")
    assert full.validation is None and list(full.splits) == ["train", "test"]
    assert list(dataset.splits) == ["train", "validation", "test"]
    np.testing.assert_array_equal(dataset.validation.images, full.train.images[1293:])
    np.testing.assert_array_equal(dataset.validation.labels, full.train.labels[1293:])
    info = data.dataset_info("digits", image_size=8, train_split="train[:90%]", validation_split="train[90%:]")
    assert info == data.DatasetInfo.from_dataset(dataset) and info.num_validation == 144
    assert str(info).startswith("1,293 training, 144 validation and 360 test images of 8 × 8 pixels")


def test_check_dataset_checks_validation_split():
    dataset = load("digits", train_split="train[:90%]", validation_split="train[90%:]")
    assert len(data.check_dataset(dataset).validation) == 144
    wrong = dataclasses.replace(dataset.validation, labels=dataset.validation.labels + 1)
    with pytest.raises(UsageError, match=r"dataset.validation: labels are int32 \[144\] from 1 to 10"):
        data.check_dataset(dataclasses.replace(dataset, validation=wrong))
    small = dataclasses.replace(dataset.validation, images=dataset.validation.images[:, :4])
    with pytest.raises(UsageError, match="training, validation and test images are 8 × 8 and 4 × 8 and 8 × 8 pixels"):
        data.check_dataset(dataclasses.replace(dataset, validation=small))


def test_load_split_names_missing_validation_split():
    with pytest.raises(UsageError, match="digits has no validation split; set dataset.validation_split"):
        data.load_split("digits", split="validation", image_size=8)
    split, _ = data.load_split("digits", split="validation", image_size=8, validation_split="train[90%:]")
    assert len(split) == 144


def test_load_split_returns_split_and_class_names(image_dir):
    split, class_names = data.load_split(f"folder:{image_dir}", split="test", image_size=4, classes=("dog", "cat"))
    assert split.labels.tolist() == [1, 0] and class_names == ("dog", "cat")
    assert split.images[:, 0, 0, 0].tolist() == [0, 10]


def test_load_dataset_rejects_streaming_of_arrays():
    with pytest.raises(UsageError, match="storage is 'stream', but only folder:DIR, csv:FILE and tfds:NAME can"):
        load("digits", storage="stream")
