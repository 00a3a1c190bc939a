"""Batches on the devices: one type, whether the images are in memory, streamed, or cached as features."""

import contextlib
import functools
from collections.abc import Generator, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vit_jax.data import preprocess
from vit_jax.data.crops import CROPS
from vit_jax.data.images import EncodedImages
from vit_jax.data.streaming import BatchReader, training_batches
from vit_jax.runtime import rng, sharding
from vit_jax.types import ImageSource


@flax.struct.dataclass
class Batch:
    """Examples on the devices.

    A batch of cached features holds the examples of several updates, one after the other: a step of the head alone
    takes less time than its dispatch. Padding has the label -1.

    Attributes:
        inputs: uint8 images [b h w 3], or cached features [b d].
        labels: int32 [b].
        rows: int32 [b], numbers of the examples in their split.
    """

    inputs: jax.Array
    labels: jax.Array
    rows: jax.Array

    @classmethod
    def abstract(cls, inputs: jax.ShapeDtypeStruct) -> "Batch":
        """Returns the shapes of a batch, from that of its inputs."""
        labels = jax.ShapeDtypeStruct(inputs.shape[:1], jnp.int32)
        create: Any = cls  # shapes in place of arrays
        batch: Batch = create(inputs, labels, labels)
        return batch


def resident_batches(
    inputs: jax.Array,
    labels: jax.Array,
    mesh: Mesh,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    num_steps: int,
    num_views: int = 1,
    max_updates: int = 1,
    stops: tuple[int, ...] = (),
) -> Generator[tuple[int, Batch], None, None]:
    """Yields the training batches of a run whose examples are in device memory; nothing is transferred to sample them.

    The order of an epoch is a function of the seed and the epoch; the remainder of an epoch is dropped.

    Args:
        inputs: [views · n …], on every device.
        labels: int32 [n].
        mesh: batches of one update are split over its devices; every device has those of several.
        batch_size: examples per update.
        seed: of the run.
        first_step: finished updates.
        num_steps: updates of the whole run.
        num_views: number of times that the split is in `inputs`, one augmented view after the other; epochs take them
            in turn.
        max_updates: per batch.
        stops: a batch ends at multiples of these numbers of steps, and with its epoch.

    Yields:
        (finished updates after this batch, batch).
    """
    num_examples = len(labels)
    steps_per_epoch = num_examples // batch_size
    key = sharding.device_put(jax.random.PRNGKey(seed), sharding.replicated(mesh))
    sizes = {"num_examples": num_examples, "num_views": num_views, "steps_per_epoch": steps_per_epoch}
    make_order = functools.partial(_epoch_order, key, mesh=mesh, **sizes)
    take = functools.partial(
        _take, mesh=mesh, batch_size=batch_size, max_updates=max_updates, steps_per_epoch=steps_per_epoch
    )
    to_device = functools.cache(lambda count: sharding.device_put(np.int32(count), sharding.replicated(mesh)))
    step, position = first_step, sharding.device_put(np.int32(first_step), sharding.replicated(mesh))
    order = None
    while step < num_steps:
        if order is None or step % steps_per_epoch == 0:
            order = make_order(position)
        count = min(max_updates, *(every - step % every for every in (*stops, steps_per_epoch, num_steps)))
        step += count
        batch, position = take(inputs, labels, order, position, to_device(count))
        yield step, batch


@functools.partial(jax.jit, static_argnames=("mesh", "num_examples", "num_views", "steps_per_epoch"))
def _epoch_order(
    key: jax.Array, step: jax.Array, *, mesh: Mesh, num_examples: int, num_views: int, steps_per_epoch: int
) -> jax.Array:
    epoch = step // steps_per_epoch
    order = rng.epoch_order(key, epoch, num_examples) + num_examples * (epoch % num_views)
    replicated: jax.Array = jax.lax.with_sharding_constraint(order, sharding.replicated(mesh))
    return replicated


@functools.partial(jax.jit, static_argnames=("mesh", "batch_size", "max_updates", "steps_per_epoch"))
def _take(
    inputs: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    step: jax.Array,
    count: jax.Array,
    *,
    mesh: Mesh,
    batch_size: int,
    max_updates: int,
    steps_per_epoch: int,
) -> tuple[Batch, jax.Array]:
    """Gathers the examples of `count` updates after `step`; returns the step after them as well."""
    num_rows = max_updates * batch_size
    padded = jnp.pad(order, (0, num_rows))  # the last batch of an epoch reaches past its end
    rows = jax.lax.dynamic_slice_in_dim(padded, step % steps_per_epoch * batch_size, num_rows)
    rows = jax.lax.with_sharding_constraint(rows, train_batch_sharding(mesh, max_updates=max_updates))
    batch_labels = jnp.where(jnp.arange(num_rows) < count * batch_size, labels[rows % len(labels)], -1)
    return Batch(inputs[rows], batch_labels, rows), step + count


def train_batch_sharding(mesh: Mesh, *, max_updates: int) -> NamedSharding:
    """Returns the sharding of a training batch: split over all devices, or replicated if it is of several updates."""
    return sharding.batch_sharding(mesh) if max_updates == 1 else sharding.replicated(mesh)


def streamed_batches(
    read: BatchReader, mesh: Mesh, *, first_step: int, num_steps: int, num_workers: int = 0
) -> Generator[tuple[int, Batch], None, None]:
    """Yields the training batches of a run whose images are decoded and cropped by worker processes.

    Order and crops are those of `resident_batches`. Closing the generator ends the processes.

    Args:
        read: reads this process's part of a batch.
        mesh: batches are split over its devices.
        first_step: finished updates.
        num_steps: updates of the whole run.
        num_workers: worker processes; 0: one per available processor.

    Yields:
        (finished updates after this batch, batch).
    """
    batches = training_batches(read, first_step=first_step, num_steps=num_steps, num_workers=num_workers)
    with contextlib.closing(batches):
        for step, (images, labels) in enumerate(batches, start=first_step + 1):
            local_labels = sharding.shard_local_batch(labels, mesh)
            yield step, Batch(sharding.shard_local_batch(images, mesh), local_labels, local_labels)


def evaluation_batches(
    images: ImageSource | jax.Array, labels: np.ndarray | jax.Array, mesh: Mesh, *, batch_size: int, num_views: int = 1
) -> Iterator[Batch]:
    """Yields every example once, in order; the last batch is padded with the label -1.

    Args:
        images: [n …]: on every device, or read batch by batch from host memory or files.
        labels: int32 [n], where `images` are.
        mesh: batches are split over its devices.
        batch_size: a multiple of the number of devices.
        num_views: number of times that all examples are read; rows count on from one view to the next.
    """
    num_rows = num_views * len(labels)
    if isinstance(images, jax.Array):
        position = sharding.device_put(np.int32(0), sharding.replicated(mesh))
        for _ in range(0, num_rows, batch_size):
            batch, position = _take_in_order(images, labels, position, mesh=mesh, batch_size=batch_size)
            yield batch
        return
    for start in range(0, num_rows, batch_size):
        rows = np.arange(start, start + batch_size, dtype=np.int32)
        padded_labels = np.where(rows < num_rows, np.asarray(labels)[rows % len(labels)], -1).astype(np.int32)
        yield Batch(
            inputs=sharding.shard_rows(images, rows % len(labels), mesh),
            labels=sharding.device_put(padded_labels, sharding.batch_sharding(mesh)),
            rows=sharding.device_put(rows, sharding.batch_sharding(mesh)),
        )


@functools.partial(jax.jit, static_argnames=("mesh", "batch_size"))
def _take_in_order(
    inputs: jax.Array, labels: jax.Array, start: jax.Array, *, mesh: Mesh, batch_size: int
) -> tuple[Batch, jax.Array]:
    rows = start + jnp.arange(batch_size, dtype=jnp.int32)
    rows = jax.lax.with_sharding_constraint(rows, sharding.batch_sharding(mesh))
    inside = jnp.minimum(rows, len(labels) - 1)
    return Batch(inputs[inside], jnp.where(rows < len(labels), labels[inside], -1), rows), start + batch_size


def crop_when_decoded(
    images: ImageSource, *, augment: str, image_mean: tuple[float, ...], num_views: int = 1, seed: int = 0
) -> ImageSource:
    """Returns images of which those that are decoded when they are read are also cropped then, at full resolution.

    What is left to the device then is `preprocess.device_augment`.

    Args:
        images: [n h w 3]; returned as they are unless they are `EncodedImages`.
        augment: see `preprocess.prepare`.
        image_mean: color of what a crop covers outside of an image, from 0 to 1.
        num_views: number of crops of each image: a crop of every image, then another of every image.
        seed: of the crops; see `rng.row_keys`.
    """
    if not isinstance(images, EncodedImages) or augment not in CROPS:
        return images
    rows = np.arange(num_views * len(images))
    uniforms = jax.jit(lambda rows: preprocess.sample_uniforms(rng.row_keys(rows, seed=seed)))(rows)
    color = preprocess.margin_color(image_mean)
    return images.crop(rows % len(images), augment=augment, uniforms=np.asarray(uniforms), margin_color=color)
