"""Batched inference on all devices: the one way from images to logits, features and metrics."""

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.data import preprocess
from vit_jax.data.batches import Batch, evaluation_batches
from vit_jax.data.preprocess import Augment
from vit_jax.runtime import rng, sharding
from vit_jax.runtime.progress import progress_bar
from vit_jax.training import metrics
from vit_jax.types import ImageModel, ImageSource, Params


@runtime_checkable
class Forward(Protocol):
    """Maps stored examples to logits: uint8 images through the whole model, or cached features through its head."""

    def augment_and_preprocess(self, keys: jax.Array, examples: jax.Array) -> jax.Array:
        """Returns the inputs [b …] of a training batch; keys [b]."""

    def preprocess(self, keys: jax.Array, examples: jax.Array) -> jax.Array:
        """Returns the inputs [b …] of an evaluation batch; keys [b]."""

    def logits(self, params: Params, inputs: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Returns logits [b classes]; without keys [b], dropout is off."""


@dataclasses.dataclass(frozen=True)
class ImageForward:
    """Preprocesses uint8 images on the device and applies the full model.

    Attributes:
        model: Linen module.
        image_size: pixels, square.
        image_mean: of the channels, from 0 to 1.
        image_std: of the channels, on the same scale.
        augment: of training images, see `preprocess.prepare`.
        test_augment: of test images, sampled in the same way at every evaluation.
        dropout: whether the model's dropout is on in training.
    """

    model: ImageModel
    image_size: int
    image_mean: tuple[float, ...] = preprocess.HALF
    image_std: tuple[float, ...] = preprocess.HALF
    augment: Augment = "none"
    test_augment: str = "none"
    dropout: bool = False

    def _prepare(self, keys: jax.Array, images: jax.Array, augment: Augment) -> jax.Array:
        return preprocess.prepare(
            keys, images, image_size=self.image_size, augment=augment, mean=self.image_mean, std=self.image_std
        )

    def augment_and_preprocess(self, keys: jax.Array, examples: jax.Array) -> jax.Array:
        """uint8 [b h w 3] -> float32 [b s s 3]."""
        return self._prepare(keys, examples, self.augment)

    def preprocess(self, keys: jax.Array, examples: jax.Array) -> jax.Array:
        """uint8 [b h w 3] -> float32 [b s s 3]."""
        return self._prepare(keys, examples, self.test_augment)

    def logits(self, params: Params, inputs: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """float32 [b s s 3] -> [b classes]."""
        if not self.dropout or dropout_keys is None:
            logits: jax.Array = self.model.apply({"params": params}, inputs)
            return logits

        def apply(image: jax.Array, key: jax.Array) -> jax.Array:
            logits: jax.Array = self.model.apply({"params": params}, image[None], train=True, rngs={"dropout": key})
            return logits[0]

        # One key per image, so that dropout does not depend on how the batch is split.
        axis_names = jax.sharding.get_abstract_mesh().axis_names
        return jax.vmap(apply, spmd_axis_name=axis_names or None)(inputs, dropout_keys)


@dataclasses.dataclass(frozen=True)
class FeatureForward:
    """Applies the head to cached features."""

    model: ImageModel

    def augment_and_preprocess(self, keys: jax.Array, examples: jax.Array) -> jax.Array:
        """Returns the features."""
        return examples

    preprocess = augment_and_preprocess

    def logits(self, params: Params, inputs: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """[b d] -> [b classes]."""
        head = self.model.create_head(self.model.num_classes or 0)
        logits: jax.Array = head.apply({"params": params["head"]}, inputs)
        return logits


class Inference:
    """Applies a model to images in batches, on all devices of a mesh.

    Args:
        forward: from examples to logits.
        mesh: batches are split over its devices.
        batch_size: upper bound, rounded up to a multiple of the number of devices.
    """

    def __init__(self, forward: Forward, mesh: Mesh, *, batch_size: int):
        self.forward, self.mesh, self.batch_size = forward, mesh, batch_size
        self._replicated = sharding.replicated(mesh)
        self._eval_step = jax.jit(self.eval_step, out_shardings=self._replicated)
        self._append = jax.jit(self._append_outputs, static_argnums=4, donate_argnums=0, out_shardings=self._replicated)

    def sum_metrics(
        self, params: Params, images: ImageSource | jax.Array, labels: np.ndarray | jax.Array
    ) -> metrics.Sums:
        """Returns loss and accuracy as sums over all examples, each counted exactly once; see `metrics.means`.

        Args:
            params: of the model, on the mesh.
            images: examples [n …], on every device or on the host.
            labels: int32 [n].
        """
        batch_size = sharding.pad_to_devices(self.batch_size, len(labels), self.mesh)
        batches = evaluation_batches(images, labels, self.mesh, batch_size=batch_size)
        sums: metrics.Sums = sharding.device_put(metrics.zero_sums(), self._replicated)
        for batch in progress_bar(batches, total=-(-len(labels) // batch_size), desc="test", unit="batch"):
            previous, sums = sums, self._eval_step(params, batch, sums)
            jax.block_until_ready(previous)  # keeps the bar accurate; the device already has the next batch
        return sums

    def eval_step(self, params: Params, batch: Batch, sums: metrics.Sums) -> metrics.Sums:
        """Adds the metrics of a batch to sums; examples with the label -1 do not count."""
        batch_sums = metrics.masked_sums(self._outputs(params, batch), batch.labels, batch.labels >= 0)
        return {name: sums[name] + value for name, value in batch_sums.items()}

    def outputs(self, params: Params, images: ImageSource, *, num_views: int = 1, seed: int = 0) -> jax.Array:
        """Applies the model to every image.

        Args:
            params: of the model, on the mesh.
            images: uint8 [n h w 3], on the host; at least one.
            num_views: number of times that every image is preprocessed, each time with another key.
            seed: of the keys, see `rng.row_keys`.

        Returns:
            [views · n d], on every device: all images once, then all of them again.
        """
        batch_size = sharding.pad_to_devices(self.batch_size, len(images), self.mesh)
        num_batches = -(-num_views * len(images) // batch_size)
        labels = np.zeros(len(images), np.int32)
        batches = evaluation_batches(images, labels, self.mesh, batch_size=batch_size, num_views=num_views)
        buffer: jax.Array | None = None
        position = sharding.device_put(np.int32(0), self._replicated)
        for batch in progress_bar(batches, total=num_batches, desc="images", unit="batch"):
            if buffer is None:
                shape = jax.eval_shape(functools.partial(self._outputs, seed=seed), params, batch)
                zeros = functools.partial(jnp.zeros, (num_batches * batch_size, *shape.shape[1:]), shape.dtype)
                buffer = jax.jit(zeros, out_shardings=self._replicated)()
            previous, (buffer, position) = position, self._append(buffer, position, params, batch, seed)
            jax.block_until_ready(previous)
        assert buffer is not None, "no images"
        return buffer[: num_views * len(images)]

    def _append_outputs(
        self, buffer: jax.Array, position: jax.Array, params: Params, batch: Batch, seed: int
    ) -> tuple[jax.Array, jax.Array]:
        outputs = self._outputs(params, batch, seed=seed)
        buffer = jax.lax.dynamic_update_slice_in_dim(buffer, outputs, position, axis=0)
        return buffer, position + len(outputs)

    def _outputs(self, params: Params, batch: Batch, *, seed: int = 0) -> jax.Array:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self.forward.logits(
                params, self.forward.preprocess(rng.row_keys(batch.rows, seed=seed), batch.inputs)
            )
