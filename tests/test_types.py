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
