import numpy as np
import pytest

from vit_jax import models
from vit_jax.data import EncodedImages
from vit_jax.types import ImageModel, ImageSource, Split


@pytest.mark.parametrize("images", [np.zeros((2, 4, 4, 3), np.uint8), EncodedImages(lambda number: "", np.arange(2))])
def test_image_source_accepts_arrays_and_encoded_images(images):
    assert isinstance(images, ImageSource)
    assert not isinstance([images], ImageSource)


@pytest.mark.parametrize("model", [models.VisionTransformer(3), models.ResNet(3)])
def test_image_model_accepts_every_architecture(model):
    assert isinstance(model, ImageModel)


def test_split_in_memory_is_true_for_arrays():
    labels = np.array([0, 1, 1], np.int32)
    assert len(Split(np.zeros((3, 4, 4, 3), np.uint8), labels)) == 3
    assert Split(np.zeros((3, 4, 4, 3), np.uint8), labels).in_memory
    assert not Split(EncodedImages(lambda number: "", np.arange(3)), labels).in_memory


def test_split_take_selects_every_array():
    images = np.arange(3 * 12, dtype=np.uint8).reshape(3, 2, 2, 3)
    paths = np.array(["a", "b", "c"], object)
    split = Split(images, np.array([5, 6, 7], np.int32), ids=np.array([1, 2, 3], np.uint64), paths=paths)
    taken = split.take(np.array([2, 0]))
    np.testing.assert_array_equal(taken.images, images[[2, 0]])
    assert (taken.labels.tolist(), taken.ids.tolist(), taken.paths.tolist()) == ([7, 5], [3, 1], ["c", "a"])
