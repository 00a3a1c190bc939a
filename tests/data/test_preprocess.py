import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from sklearn.datasets import load_sample_image, load_sample_images

from vit_jax import data
from vit_jax.data import augment, crops, preprocess
from vit_jax.runtime import rng as sampling


@functools.partial(jax.jit, static_argnames=("image_size", "augment", "resize", "mean", "std"))
def prepare(keys, images, **options):
    return preprocess.prepare(keys, images, **options)


@functools.partial(jax.jit, static_argnames=("mixup_alpha", "cutmix_alpha"))
def mix(keys, images, partners, **options):
    return preprocess.mix(keys, images, partners, **options)


def test_normalize_maps_uint8_range_to_minus_one_and_one():
    pixels = jnp.array([[0, 255, 0]], jnp.uint8)
    np.testing.assert_array_equal(preprocess.normalize(pixels), [[-1.0, 1.0, -1.0]])


def test_normalize_uses_mean_and_std_of_each_channel():
    pixels = jnp.array([[51, 102, 255]], jnp.uint8)  # 0.2, 0.4, 1
    result = preprocess.normalize(pixels, mean=(0.1, 0.4, 0.5), std=(0.1, 0.5, 0.25))
    np.testing.assert_allclose(result, [[1.0, 0.0, 2.0]], atol=1e-6)


def test_prepare_keeps_pixels_at_original_size():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    result = prepare(None, images, image_size=8)
    np.testing.assert_allclose(result, (images - 127.5) / 127.5, rtol=1e-6)


def test_prepare_upsamples_with_half_pixel_centers():
    # With half-pixel centers, outputs sample inputs at -1/4, 1/4, 3/4, 5/4; the first and last are clamped to the edge.
    row = np.array([0, 200], np.uint8)
    images = np.tile(row[None, None, :, None], (1, 2, 1, 3))
    result = prepare(None, images, image_size=4)
    expected = (np.array([0, 50, 150, 200]) - 127.5) / 127.5
    np.testing.assert_allclose(result[0, :, :, 0], np.tile(expected, (4, 1)), atol=1e-6)


def test_resize_clamps_at_crop_edges():
    image = jnp.arange(36.0).reshape(6, 6, 1)
    result = preprocess._resize(image, (1, 2, 2, 2), image_size=4, xp=np)
    crop = image[1:3, 2:4, 0]  # 8 9 / 14 15
    assert float(result.min()) == pytest.approx(float(crop.min()))
    assert float(result.max()) == pytest.approx(float(crop.max()))
    np.testing.assert_array_equal(result[0, :, 0], [8, 8, 9, 9])  # 8, 8.25, 8.75, 9
    np.testing.assert_array_equal(result[:, 0, 0], [8, 10, 13, 14])  # 8, 9.5, 12.5, 14


@pytest.mark.parametrize(
    ("height", "width", "image_size"),
    [(32, 32, 224), (8, 8, 16), (60, 60, 32), (180, 180, 32), (64, 48, 32), (31, 20, 24), (10, 400, 32)],
)
def test_prepare_matches_pillow_resize(height, width, image_size):
    """Upsampling, downsampling with antialiasing, and one of them along each axis."""
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    result = prepare(None, images, image_size=image_size)
    pixels = np.round(np.asarray(result) * 127.5 + 127.5)
    for actual, image in zip(pixels, images, strict=True):
        pillow = Image.fromarray(image)
        columns_first = pillow.resize((image_size, height), Image.Resampling.BILINEAR).resize((image_size,) * 2, 2)
        np.testing.assert_array_equal(actual, columns_first)
        single_pass = np.asarray(pillow.resize((image_size,) * 2, Image.Resampling.BILINEAR), int)
        assert np.abs(actual - single_pass).max() <= 1  # some versions of Pillow resize rows first


@pytest.mark.parametrize("augment", crops.CROPS)
@pytest.mark.parametrize(("height", "width"), [(61, 45), (16, 24)])
def test_prepare_matches_pillow_crops(tmp_path, augment, height, width):
    """Crops on the device equal those of worker processes, up to ties in rounding boxes and in rounding to 8 bits."""
    images = np.random.default_rng(0).integers(0, 256, (64, height, width, 3)).astype(np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    keys = sampling.row_keys(np.arange(64))
    encoded = data.EncodedImages(lambda number: str(tmp_path / f"{number}.png"), np.arange(64), (20, 20))
    uniforms = np.asarray(preprocess.sample_uniforms(keys))
    streamed = encoded.crop(
        np.arange(64), augment=augment, uniforms=uniforms, margin_color=preprocess.margin_color((0.5, 0.4, 0.3))
    )
    options = {"image_size": 20, "mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0)}
    actual = np.asarray(prepare(keys, images, augment=augment, **options))
    expected = np.asarray(prepare(keys, streamed[:], augment="flip", **options))
    differences = np.round(np.abs(actual - expected) * 255)
    assert np.mean(differences > 0) < 0.06
    assert np.mean(differences > 1) <= 1 / 64  # the box of one image may be rounded to the next pixel


@pytest.mark.parametrize(("photo", "image_size"), [("china.jpg", 224), ("flower.jpg", 96)])
def test_prepare_matches_resize_and_center_crop(photo, image_size):
    """On the device and decoded from the file, pixels equal those of Pillow's resize and crop."""
    image = load_sample_image(photo)  # 427 × 640
    short = {224: 256, 96: 110}[image_size]
    width = short * 640 // 427
    resized = Image.fromarray(image).resize((width, 427), Image.Resampling.BILINEAR)  # columns first
    left, top = (width - image_size) // 2, (short - image_size) // 2
    crop = resized.resize((width, short), Image.Resampling.BILINEAR).crop(
        (left, top, left + image_size, top + image_size)
    )
    result = prepare(None, image[None], image_size=image_size, resize="center_crop")
    np.testing.assert_array_equal(np.round(np.asarray(result)[0] * 127.5 + 127.5), crop)
    path = str(Path(sklearn.datasets.__file__).parent / "images" / photo)
    encoded = data.EncodedImages(lambda number: path, np.arange(1), (image_size, image_size), resize="center_crop")
    np.testing.assert_array_equal(encoded[0], crop)


def test_prepare_flips_horizontally_only():
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3)).astype(np.uint8)
    keys = jax.random.split(jax.random.PRNGKey(0), 64)
    result = np.asarray(prepare(keys, images, image_size=4, augment="flip"))
    plain = np.asarray(preprocess.normalize(images))
    same = np.isclose(result, plain, atol=1e-6).all(axis=(1, 2, 3))
    mirrored = np.isclose(result, plain[:, :, ::-1], atol=1e-6).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48  # 32 expected, within four standard deviations


def test_prepare_applies_augmentations_in_order():
    images = load_sample_images().images[0][None, :24, :24].repeat(16, axis=0)
    keys, mean = jax.random.split(jax.random.PRNGKey(0), 16), (0.5, 0.4, 0.3)

    def augment_in_order(*names):
        pixels = np.asarray(prepare(keys, images, image_size=24, augment="flip", mean=mean, std=(1.0, 1.0, 1.0)))
        pixels = np.round(255 * (pixels + np.array(mean))).astype(np.int32)
        for name in names:
            op = functools.partial(augment.OPS[name], fill=jnp.array([128, 102, 76]))
            pixels = jax.jit(jax.vmap(op))(sampling.image_keys(keys, name), pixels)
        return np.asarray(preprocess.normalize(pixels, mean=mean))

    actual = prepare(keys, images, image_size=24, augment=("flip", "erase", "color_jitter"), mean=mean)
    np.testing.assert_allclose(actual, augment_in_order("erase", "color_jitter"), atol=1e-6)
    assert np.abs(actual - augment_in_order("color_jitter", "erase")).max() > 0.1
    assert np.abs(actual - augment_in_order()).max() > 0.1


@pytest.mark.parametrize(
    ("names", "in_memory", "expected"),
    [
        ("inception", True, ("inception",)),
        ("inception", False, ("flip",)),
        (["pad_crop", "trivial", "erase"], False, ("flip", "trivial", "erase")),
        (("trivial", "erase"), False, ("none", "trivial", "erase")),
        ("erase", True, ("none", "erase")),
    ],
)
def test_device_augment_leaves_out_crops_of_streamed_images(names, in_memory, expected):
    assert preprocess.device_augment(names, in_memory=in_memory) == expected


def test_prepare_pads_with_gray_at_every_shift():
    images = np.full((400, 8, 8, 3), 255, np.uint8)
    keys = jax.random.split(jax.random.PRNGKey(1), 400)
    result = np.asarray(prepare(keys, images, image_size=8, augment="pad_crop"))
    gray = np.float32(0.5 / 127.5)  # 127.5 is rounded to 128
    assert set(np.unique(result)) == {gray, 1.0}  # margin, white image
    white_rows = (result[:, :, 4, 0] == 1).sum(axis=1)
    first_row_gray = result[:, 0, 4, 0] == gray
    assert set(white_rows) == {7, 8}  # a shift by one pixel leaves a margin of one row
    assert 0 < first_row_gray.sum() < (white_rows == 7).sum()


def test_prepare_depends_only_on_key_of_each_image():
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    full = prepare(keys, images, image_size=8, augment="inception")
    half = prepare(keys[4:], images[4:], image_size=8, augment="inception")
    np.testing.assert_allclose(full[4:], half, atol=1e-6)


def test_prepare_flips_after_square_crop(monkeypatch):
    identity = crops.Augmentation(lambda *_, **options: (0.0, 0.0, 8.0, 8.0))
    monkeypatch.setitem(crops.AUGMENTATIONS, "square_crop", identity)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    result = prepare(jax.random.split(jax.random.key(0), 16), images, image_size=8, augment="square_crop")
    plain = np.asarray(preprocess.normalize(images))
    mirrored = [np.allclose(actual, image[:, ::-1], atol=1e-6) for actual, image in zip(result, plain, strict=True)]
    same = [np.allclose(actual, image, atol=1e-6) for actual, image in zip(result, plain, strict=True)]
    assert np.all(np.logical_xor(same, mirrored)) and 0 < sum(same) < 16


def mix_black_and_white(count, **alphas):
    """Mixes black images with white partners."""
    keys = jax.random.split(jax.random.PRNGKey(0), count)
    black, white = jnp.zeros((count, 8, 8, 3)), jnp.ones((count, 8, 8, 3))
    options = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0} | alphas
    return tuple(map(np.asarray, mix(keys, black, white, **options)))


def test_mix_blends_images_by_label_weight():
    mixed, weight = mix_black_and_white(500, mixup_alpha=0.5)
    np.testing.assert_allclose(mixed, np.broadcast_to((1 - weight)[:, None, None, None], mixed.shape), atol=1e-6)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)), 1/8 for a = 1/2; bound: five standard deviations
    assert weight.mean() == pytest.approx(0.5, abs=5 * (1 / 8 / 500) ** 0.5)
    assert weight.var() == pytest.approx(1 / 8, abs=0.02)


def test_mix_pastes_box_with_area_equal_to_partner_weight():
    mixed, weight = mix_black_and_white(300, cutmix_alpha=1.0)
    assert set(np.unique(mixed)) == {0.0, 1.0}
    np.testing.assert_allclose(1 - mixed[..., 0].mean(axis=(1, 2)), weight, atol=1e-6)
    for image in mixed[..., 0]:
        rows, columns = image.any(axis=1), image.any(axis=0)
        assert (image == np.outer(rows, columns)).all()  # a single rectangle
        assert np.abs(np.diff(np.r_[0, rows.astype(int), 0])).sum() in (0, 2)  # of contiguous rows
    assert len(np.unique(weight)) > 10


def test_mix_applies_either_mixup_or_cutmix_to_each_image():
    mixed, weight = mix_black_and_white(400, mixup_alpha=1.0, cutmix_alpha=1.0)
    blended = ((mixed > 0) & (mixed < 1)).any(axis=(1, 2, 3))
    assert 150 < blended.sum() < 250
    np.testing.assert_allclose(1 - mixed.mean(axis=(1, 2, 3)), weight, atol=1e-6)


def test_prepare_applies_custom_augment_before_resize():
    images = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    seen = []

    def augment(key, image):
        seen.append((key.shape, image.shape, image.dtype))
        return 255 - image[:, 1:5]

    keys = jax.random.split(jax.random.key(0), 2)
    result = prepare(keys, images, image_size=4, augment=augment)
    assert seen == [((), (4, 6, 3), np.uint8)]
    np.testing.assert_allclose(result, -preprocess.normalize(images[:, :, 1:5]), atol=1e-6)
    resized = prepare(keys, images, image_size=8, augment=augment)
    np.testing.assert_array_equal(resized, prepare(None, 255 - images[:, :, 1:5], image_size=8))
