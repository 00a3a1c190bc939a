"""Augmentations of resized images, beside Pillow on scikit-learn's photographs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from vit_jax.data import augment

SIZE = 80
FILL = jnp.array([10, 20, 30])


@pytest.fixture(scope="module")
def photographs():
    """The pagoda and the dahlia, uint8 [2 80 80 3]: even and odd crops, resized."""
    china, flower = load_sample_images().images
    crops = Image.fromarray(china[:426, 40:466]), Image.fromarray(flower[100:333, 200:433])
    return np.stack([np.asarray(crop.resize((SIZE, SIZE))) for crop in crops])


def pillow_op(image, name, level, negative):
    """Returns an operation of TrivialAugment of an image, uint8 [s s 3]."""
    photo, magnitude = Image.fromarray(image), (-1 if negative else 1) * level / 30
    pixels = int(32 * magnitude)

    def transform(*matrix):
        return photo.transform(photo.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    def enhance(kind):
        return kind(photo).enhance(1 + 0.99 * magnitude)

    ops = {
        "identity": lambda: photo,
        "shear_x": lambda: transform(1, 0.99 * magnitude, 0, 0, 1, 0),
        "shear_y": lambda: transform(1, 0, 0, 0.99 * magnitude, 1, 0),
        "translate_x": lambda: transform(1, 0, -pixels, 0, 1, 0),
        "translate_y": lambda: transform(1, 0, 0, 0, 1, -pixels),
        "rotate": lambda: photo.rotate(135 * magnitude),
        "posterize": lambda: ImageOps.posterize(photo, 8 - round(level / 5)),
        "solarize": lambda: ImageOps.solarize(photo, 255 - 8.5 * level),
        "autocontrast": lambda: ImageOps.autocontrast(photo),
        "equalize": lambda: ImageOps.equalize(photo),
        "brightness": lambda: enhance(ImageEnhance.Brightness),
        "contrast": lambda: enhance(ImageEnhance.Contrast),
        "color": lambda: enhance(ImageEnhance.Color),
        "sharpness": lambda: enhance(ImageEnhance.Sharpness),
    }
    return np.asarray(ops[name](), np.int32)


apply_ops = jax.jit(jax.vmap(augment.apply_op))
ALL_MAGNITUDES = [np.tile(np.arange(31), 2), np.repeat([0, 1], 31)]  # levels and signs


@pytest.mark.parametrize("name", augment.TRIVIAL_OPS)
def test_apply_op_matches_pillow(photographs, name):
    """At every magnitude; where the exact value is an integer, Pillow's or XLA's rounding may be one below it."""
    for image in photographs:
        images = np.tile(image.astype(np.int32), (62, 1, 1, 1))
        actual = apply_ops(images, np.full(62, augment.TRIVIAL_OPS.index(name)), *ALL_MAGNITUDES)
        expected = np.stack([pillow_op(image, name, *each) for each in zip(*ALL_MAGNITUDES, strict=True)])
        differences = np.abs(actual - expected)
        is_rounded = name in ("autocontrast", "contrast", "color", "sharpness")
        assert differences.max() <= is_rounded and np.mean(differences > 0) < 1e-3
        assert name == "identity" or np.any(expected != image)


@pytest.mark.parametrize("name", ["autocontrast", "equalize", "contrast"])
def test_apply_op_keeps_uniform_image(name):
    image = np.full((1, SIZE, SIZE, 3), 77, np.int32)
    op = np.array([augment.TRIVIAL_OPS.index(name)])
    np.testing.assert_array_equal(apply_ops(image, op, np.array([20]), np.array([0])), image)


def test_trivial_samples_operations_and_magnitudes_uniformly(monkeypatch):
    monkeypatch.setattr(augment, "apply_op", lambda image, *sampled: jnp.stack(sampled)[None, None])
    keys, image = jax.random.split(jax.random.PRNGKey(0), 6000), jnp.zeros((1, 1, 3), jnp.int32)
    sampled = np.asarray(jax.vmap(lambda key: augment.trivial(key, image, fill=FILL))(keys))
    for column, number in zip(sampled[:, 0, 0].T, (14, 31, 2), strict=True):
        counts = np.bincount(column, minlength=number)
        assert len(counts) == number and np.abs(counts - 6000 / number).max() < 5 * (6000 / number) ** 0.5


def test_color_jitter_matches_pillow(photographs):
    keys = jax.random.split(jax.random.PRNGKey(0), 40)
    jitter = jax.jit(jax.vmap(functools.partial(augment.color_jitter, fill=FILL), (0, None)))
    actual, factors = np.asarray(jitter(keys, photographs[0].astype(np.int32))), []
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for key, image in zip(keys, actual, strict=True):
        order_key, factor_key = jax.random.split(key)
        order, each = jax.random.permutation(order_key, 3), jax.random.uniform(factor_key, (3,), minval=0.6, maxval=1.4)
        photo = Image.fromarray(photographs[0])
        for kind, factor in zip(order, each, strict=True):
            photo = enhancers[kind](photo).enhance(float(factor))
        differences = np.abs(image - np.asarray(photo, np.int32))
        assert differences.max() <= 2 and np.mean(differences > 0) < 0.02  # two more roundings follow the first
        factors += each.tolist()
    assert min(factors) < 0.65 and max(factors) > 1.35


def test_erase_fills_boxes_of_documented_sizes():
    keys = jax.random.split(jax.random.PRNGKey(0), 1000)
    image = jnp.full((SIZE, SIZE, 3), 200)
    erased = np.asarray(jax.jit(jax.vmap(lambda key: augment.erase(key, image, fill=FILL)))(keys))
    boxes = (erased == np.asarray(FILL)).all(axis=-1)
    assert set(np.unique(erased)) == {10, 20, 30, 200}
    assert 420 < boxes.any(axis=(1, 2)).sum() < 580  # 500 expected, within five standard deviations
    sizes = []
    for box in boxes[boxes.any(axis=(1, 2))]:
        rows, columns = (np.flatnonzero(box.any(axis=axis)) for axis in (1, 0))
        assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        sizes.append((len(rows), len(columns)))
    rows, columns = np.array(sizes).T
    area, aspect, clipped = rows * columns / SIZE**2, rows / columns, np.maximum(rows, columns) == SIZE
    assert 0.017 < area.min() < 0.03 and 0.3 < area.max() < 0.335
    assert abs(np.median(area[~clipped]) - 0.175) < 0.03 and clipped.mean() < 0.05
    assert abs(np.median(np.log(aspect))) < 0.2 and 0.27 < aspect.min() < 0.36 and 2.8 < aspect.max() < 3.7
    covered = boxes.any(axis=0)
    assert covered[0].any() and covered[-1].any() and covered[:, 0].any() and covered[:, -1].any()
