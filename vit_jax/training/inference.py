"""Batched inference on all devices: logits, features and metrics of images."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax.data import preprocess
from vit_jax.data.batches import Batch, evaluation_batches
from vit_jax.data.crops import Augmentations
from vit_jax.data.preprocess import Augment
from vit_jax.runtime import rng, sharding
from vit_jax.runtime.progress import progress_bar
from vit_jax.training import metrics
from vit_jax.types import ImageModel, ImageSource, Params


@runtime_checkable
class Forward(Protocol):
    """Maps stored examples to logits: uint8 images through the whole model, or cached features through its head."""

    def preprocess(self, keys: jax.Array, examples: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the inputs [b …] of a batch, augmented in training; keys [b]."""

    def logits(self, params: Params, inputs: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Returns logits [b classes]; without keys [b], dropout is off."""


@dataclasses.dataclass(frozen=True)
class ImageForward:
    """Preprocesses uint8 images on the device and applies the full model."""

    model: ImageModel
    image_size: int
    image_mean: tuple[float, ...] = preprocess.HALF
    image_std: tuple[float, ...] = preprocess.HALF
    resize: str = "squash"  # one of `types.RESIZES`
    augment: Augment = "none"
    test_augment: Augmentations = "none"  # with the same random numbers at every evaluation
    dropout: bool = False  # enables the model's dropout in training

    def preprocess(self, keys: jax.Array, examples: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps uint8 [b h w 3] to float32 [b s s 3]."""
        return preprocess.prepare(
            keys,
            examples,
            image_size=self.image_size,
            augment=self.augment if train else self.test_augment,
            resize=self.resize,
            mean=self.image_mean,
            std=self.image_std,
        )

    def logits(self, params: Params, inputs: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Maps float32 [b s s 3] to [b classes]."""
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

    def preprocess(self, keys: jax.Array, examples: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the features."""
        return examples

    def logits(self, params: Params, inputs: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Maps [b d] to [b classes]."""
        head = self.model.create_head(self.model.num_classes or 0)
        logits: jax.Array = head.apply({"params": params["head"]}, inputs)
        return logits


class Inference:
    """Applies a model to batches of images, sharded over all devices of a mesh.

    The batch size is rounded up to a multiple of the number of devices.
    """

    def __init__(self, forward: Forward, mesh: Mesh, *, batch_size: int):
        self.forward, self.mesh, self.batch_size = forward, mesh, batch_size
        self._apply = jax.jit(self.apply, static_argnames="seed", out_shardings=sharding.replicated(mesh))
        self._eval_step = jax.jit(self.eval_step, out_shardings=sharding.replicated(mesh))
        self._sums = jax.jit(metrics.masked_sums, out_shardings=sharding.replicated(mesh))

    def apply(self, params: Params, batch: Batch, *, seed: int = 0) -> jax.Array:
        """Returns the outputs for a batch, preprocessed with the keys of `rng.row_keys` for the seed."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            inputs = self.forward.preprocess(rng.row_keys(batch.rows, seed=seed), batch.inputs)
            return self.forward.logits(params, inputs)

    def eval_step(self, params: Params, batch: Batch) -> metrics.Sums:
        """Returns the metrics of a batch as sums, without examples of label -1."""
        return metrics.masked_sums(self.apply(params, batch), batch.labels, batch.labels >= 0)

    def sum_metrics(
        self, params: Params, images: ImageSource | jax.Array, labels: np.ndarray | jax.Array
    ) -> dict[str, float]:
        """Returns the sums of `metrics.masked_sums` over all examples, each counted exactly once.

        Examples [n …] are on every device, or on the host; labels are int32 [n].
        """
        sums: list[metrics.Sums] = []
        for batch in self._batches(images, labels):
            sums.append(self._eval_step(params, batch))
            jax.block_until_ready(sums[-2:-1])  # keeps the bar accurate; the device already has the next batch
        return _total(sums)

    def logits_and_sums(
        self, params: Params, images: ImageSource | jax.Array, labels: np.ndarray | jax.Array
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Returns the logits [n classes] on the host, and the same sums as `sum_metrics`."""
        logits, sums = [], []
        for batch in self._batches(images, labels):
            outputs = self._apply(params, batch)
            sums.append(self._sums(outputs, batch.labels, batch.labels >= 0))
            logits.append(jax.device_get(outputs))  # of all images, they might not fit on the device
        return np.concatenate(logits)[: len(labels)], _total(sums)

    def _batches(self, images: ImageSource | jax.Array, labels: np.ndarray | jax.Array) -> Iterator[Batch]:
        batch_size = sharding.pad_to_devices(self.batch_size, len(labels), self.mesh)
        batches = evaluation_batches(images, labels, self.mesh, batch_size=batch_size)
        yield from progress_bar(batches, total=-(-len(labels) // batch_size), desc="evaluation", unit="batch")

    def outputs(self, params: Params, images: ImageSource, *, num_views: int = 1, seed: int = 0) -> np.ndarray:
        """Applies the model to all views of all images, uint8 [n h w 3] on the host, n > 0.

        Returns the outputs [views · n d] on the host, view after view.
        """
        num_rows, labels = num_views * len(images), np.zeros(len(images), np.int32)
        batch_size = sharding.pad_to_devices(self.batch_size, len(images), self.mesh)
        batches = evaluation_batches(images, labels, self.mesh, batch_size=batch_size, num_views=num_views)
        outputs: list[jax.Array] = []
        for batch in progress_bar(batches, total=-(-num_rows // batch_size), desc="images", unit="batch"):
            outputs.append(self._apply(params, batch, seed=seed))
            jax.block_until_ready(outputs[-2:-1])
        return np.concatenate(jax.device_get(outputs))[:num_rows]


def _total(sums: Sequence[metrics.Sums]) -> dict[str, float]:
    """Adds the sums of batches, on the host."""
    total: dict[str, float] = functools.reduce(functools.partial(jax.tree.map, np.add), jax.device_get(sums))
    return total
