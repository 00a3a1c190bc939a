"""Random crop boxes in NumPy and in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.data import crops


def original_crop(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Samples a crop by rejection, as TensorFlow's `sample_distorted_bounding_box` does."""
    while True:
        aspect = rng.uniform(0.75, 1.33)
        smallest, largest = 0.05 * height * width, 1.0 * height * width
        rows, most = round((smallest / aspect) ** 0.5), round((largest / aspect) ** 0.5)
        if round(most * aspect) > width:
            most = int((width + 0.5 - 1e-7) / aspect)
        most = min(most, height)
        rows = min(rows, most)
        rows += rng.integers(0, most - rows + 1)
        columns = round(rows * aspect)
        if rows * columns < smallest:
            rows += 1
            columns = round(rows * aspect)
        if rows * columns > largest:
            rows -= 1
            columns = round(rows * aspect)
        if not (smallest <= rows * columns <= largest and 0 < rows <= height and 0 < columns <= width):
            continue
        top = rng.integers(0, height - rows) if rows < height else 0
        left = rng.integers(0, width - columns) if columns < width else 0
        return top, left, rows, columns


def sample_boxes(augment, xp, count, **sizes):
    """Returns boxes [count 4], sampled one by one with NumPy or vectorized with JAX."""
    sample_box = crops.AUGMENTATIONS[augment].sample_box
    uniforms = np.random.default_rng(1).uniform(size=(count, 4)).astype(np.float32)
    if xp is np:
        return np.array([sample_box(row, **sizes, xp=np) for row in uniforms])
    return np.stack(jax.jit(jax.vmap(lambda row: sample_box(row, **sizes, xp=jnp)))(uniforms), axis=1)


def test_padded_box_extends_at_most_one_eighth_beyond_image():
    boxes = sample_boxes("pad_crop", np, 2000, height=32, width=40, image_size=16)
    for column, margin in ((0, 4), (1, 5)):
        values, counts = np.unique(boxes[:, column], return_counts=True)
        assert values.tolist() == list(range(-margin, margin + 1))
        expected = 2000 / len(values)
        assert counts.min() > expected - 5 * expected**0.5  # uniform, within five standard deviations
    assert np.unique(boxes[:, 2:], axis=0).tolist() == [[32, 40]]


@pytest.mark.parametrize("augment", ["pad_crop", "square_crop", "inception"])
def test_sample_box_matches_between_numpy_and_jax(augment):
    sizes = {"height": 300, "width": 401, "image_size": 224}
    actual, expected = sample_boxes(augment, np, 500, **sizes), sample_boxes(augment, jnp, 500, **sizes)
    # Float32 rounding may shift a few boxes by one pixel.
    assert np.mean(np.abs(actual - expected).max(axis=1) > 1e-3) < 0.02


def test_resized_size_keeps_aspect_ratio_for_center_crop():
    """224 / 0.875 is 256, and 640 · 256 / 480 is 341.3."""
    assert crops.resized_size("center_crop", 480, 640, image_size=224) == (256, 341)
    assert crops.resized_size("center_crop", 640, 480, image_size=224) == (341, 256)
    assert crops.resized_size("squash", 480, 640, image_size=224) == (224, 224)
    assert crops.center(341, 224) == slice(58, 282)


def test_square_box_covers_whole_pixels_of_resized_image():
    top, left, rows, columns = sample_boxes("square_crop", np, 4000, height=32, width=16, image_size=224).T
    side = rows * 224 / 32
    np.testing.assert_allclose(side, np.round(side), atol=1e-4)
    np.testing.assert_allclose(columns, rows / 2, rtol=1e-6)
    area = (side / 224) ** 2
    assert area.min() > 0.635 and area.max() <= 1
    assert np.abs(np.quantile(area, [0.25, 0.5, 0.75]) - [0.73, 0.82, 0.91]).max() < 0.02
    assert top.min() == left.min() == 0
    assert (top + rows).max() == pytest.approx(32) and (left + columns).max() == pytest.approx(16)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48)])
def test_inception_box_matches_reference_distribution(height, width):
    count = 20_000
    actual = sample_boxes("inception", jnp, count, height=height, width=width, image_size=32).astype(int)
    rng = np.random.default_rng(0)
    expected = np.array([original_crop(rng, height, width) for _ in range(count)])
    assert (actual[:, 0] + actual[:, 2] <= height).all() and (actual[:, 1] + actual[:, 3] <= width).all()
    for column, size in enumerate((height, width, height, width)):
        histograms = [np.bincount(boxes[:, column], minlength=size + 1) / count for boxes in (actual, expected)]
        # Two-sample Kolmogorov-Smirnov test; the critical value for p = 0.001 is 1.95 * sqrt(2 / count) = 0.0195.
        assert np.abs(np.cumsum(histograms[0] - histograms[1])).max() < 1.95 * (2 / count) ** 0.5
