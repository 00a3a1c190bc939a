"""Cached features: a frozen backbone is applied once, and the head is trained on its outputs."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.data import EncodedImages, preprocess
from vit_jax.data.batches import Batch, crop_when_decoded
from vit_jax.training.inference import ImageForward, Inference
from vit_jax.types import ImageSource, Params

_BATCH_SIZE = 128
"""Images per batch. Not a config key, as the last bits of the features depend on it."""

_MAX_EXAMPLES = 2**15
"""Maximum number of examples per dispatch."""


def abstract_batch(forward: ImageForward, params: Params, images: jax.ShapeDtypeStruct, *, max_updates: int) -> Batch:
    """Returns the shapes of a batch of cached features for several updates, each with the batch size of `images`."""
    size = images.shape[0]
    backbone = _backbone(forward)
    inputs = jax.eval_shape(backbone.preprocess, jax.ShapeDtypeStruct((size, 2), jnp.uint32), images)
    features = jax.eval_shape(backbone.logits, params, inputs)
    num_examples = size * max(1, min(max_updates, _MAX_EXAMPLES // size))
    return Batch.abstract(jax.ShapeDtypeStruct((num_examples, *features.shape[1:]), features.dtype))


def compute_features(
    forward: ImageForward,
    params: Params,
    images: ImageSource,
    mesh: Mesh,
    *,
    augment: str | Sequence[str],
    num_views: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """Returns the backbone's features [views · n d] of all images, view after view, on the host."""
    cropped = crop_when_decoded(images, augment=augment, image_mean=forward.image_mean, num_views=num_views, seed=seed)
    on_device = preprocess.device_augment(augment, in_memory=not isinstance(images, EncodedImages))
    backbone = dataclasses.replace(_backbone(forward), test_augment=on_device)
    inference = Inference(backbone, mesh, batch_size=_BATCH_SIZE)
    return inference.outputs(params, cropped, num_views=num_views * len(images) // len(cropped), seed=seed)


def _backbone(forward: ImageForward) -> ImageForward:
    return dataclasses.replace(forward, model=forward.model.clone(num_classes=None))
