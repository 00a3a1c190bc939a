"""Batches on the devices, of one type for images in memory, streamed images and cached features."""

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vit_jax.data import preprocess
from vit_jax.data.crops import CROPS, split_names
from vit_jax.data.images import EncodedImages
from vit_jax.data.streaming import BatchReader, training_batches
from vit_jax.runtime import rng, sharding
from vit_jax.types import ImageSource


@flax.struct.dataclass
class Batch:
    """Examples on the devices; a batch of cached features holds the examples of several consecutive updates."""

    inputs: jax.Array  # uint8 images [b h w 3], or cached features [b d]
    labels: jax.Array  # int32 [b]; -1 is padding
    rows: jax.Array  # int32 [b], indices into the split

    @classmethod
    def abstract(cls, inputs: jax.ShapeDtypeStruct) -> "Batch":
        """Returns the shapes of a batch with these inputs."""
        labels = jax.ShapeDtypeStruct(inputs.shape[:1], jnp.int32)
        batch: Batch = jax.eval_shape(cls, inputs, labels, labels)
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
    balanced: bool = False,
    num_views: int = 1,
    max_updates: int = 1,
    stops: tuple[int, ...] = (),
) -> Generator[tuple[int, Batch], None, None]:
    """Yields (finished updates, training batch), gathered on the devices from examples that every device holds.

    The order of an epoch depends only on the seed, the epoch and, if `balanced`, the labels; see `rng.balanced_order`.
    The last partial batch is dropped. `inputs` [views · n …] are `num_views` augmented views of the split,
    concatenated; epochs cycle through them. A batch holds up to `max_updates` updates and ends at the end of an epoch
    and at multiples of `stops`.
    """
    sampler = _Sampler(mesh, seed, len(labels), balanced, num_views, batch_size, max_updates)
    to_device = functools.cache(lambda count: sharding.device_put(np.int32(count), sharding.replicated(mesh)))
    step, position, order = first_step, to_device(first_step), None
    while step < num_steps:
        if order is None or step % sampler.steps_per_epoch == 0:
            order = sampler.epoch_order(labels, position)
        count = min(max_updates, *(every - step % every for every in (*stops, sampler.steps_per_epoch, num_steps)))
        step += count
        batch, position = sampler.take(inputs, labels, order, position, to_device(count))
        yield step, batch


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """Samples training batches on the device."""

    mesh: Mesh
    seed: int
    num_examples: int
    balanced: bool
    num_views: int
    batch_size: int
    max_updates: int

    @property
    def steps_per_epoch(self) -> int:
        return self.num_examples // self.batch_size

    @functools.partial(jax.jit, static_argnums=0)
    def epoch_order(self, labels: jax.Array, step: jax.Array) -> jax.Array:
        epoch = step // self.steps_per_epoch
        order = rng.training_order(jax.random.PRNGKey(self.seed), epoch, labels, balanced=self.balanced)
        order += self.num_examples * (epoch % self.num_views)
        replicated: jax.Array = jax.lax.with_sharding_constraint(order, sharding.replicated(self.mesh))
        return replicated

    @functools.partial(jax.jit, static_argnums=0)
    def take(
        self, inputs: jax.Array, labels: jax.Array, order: jax.Array, step: jax.Array, count: jax.Array
    ) -> tuple[Batch, jax.Array]:
        """Gathers the examples of `count` updates after `step`; also returns the next step."""
        num_rows = self.max_updates * self.batch_size
        padded = jnp.pad(order, (0, num_rows))  # the last slice of an epoch exceeds it
        rows = jax.lax.dynamic_slice_in_dim(padded, step % self.steps_per_epoch * self.batch_size, num_rows)
        rows = jax.lax.with_sharding_constraint(rows, train_batch_sharding(self.mesh, max_updates=self.max_updates))
        batch_labels = jnp.where(jnp.arange(num_rows) < count * self.batch_size, labels[rows % len(labels)], -1)
        return Batch(inputs[rows], batch_labels, rows), step + count


def train_batch_sharding(mesh: Mesh, *, max_updates: int) -> NamedSharding:
    """Returns the sharding of a training batch: over all devices, or replicated if it holds several updates."""
    return sharding.batch_sharding(mesh) if max_updates == 1 else sharding.replicated(mesh)


def streamed_batches(
    read: BatchReader, mesh: Mesh, *, first_step: int, num_steps: int, num_workers: int = 0
) -> Generator[tuple[int, Batch], None, None]:
    """Yields the batches of `resident_batches`, decoded and cropped by worker processes.

    `read` reads this process's part of a batch; see `training_batches`.
    """
    batches = training_batches(read, first_step=first_step, num_steps=num_steps, num_workers=num_workers)
    with contextlib.closing(batches):
        for step, (images, labels) in enumerate(batches, start=first_step + 1):
            local_labels = sharding.shard_local_batch(labels, mesh)
            yield step, Batch(sharding.shard_local_batch(images, mesh), local_labels, local_labels)


def evaluation_batches(
    images: ImageSource | jax.Array, labels: np.ndarray | jax.Array, mesh: Mesh, *, batch_size: int, num_views: int = 1
) -> Iterator[Batch]:
    """Yields all examples in order, `num_views` times; the last batch is padded with the label -1.

    `images` [n …] are on every device, or are read batch by batch on the host. `rows` of the v-th view start at v · n.
    `batch_size` is a multiple of the number of devices.
    """
    labels, num_rows = np.asarray(labels), num_views * len(labels)
    for start in range(0, num_rows, batch_size):
        rows = np.arange(start, start + batch_size, dtype=np.int32)
        examples = rows % len(labels)
        batch_labels = np.where(rows < num_rows, labels[examples], -1).astype(np.int32)
        on_devices = functools.partial(sharding.device_put, shardings=sharding.batch_sharding(mesh))
        if isinstance(images, jax.Array):
            inputs = _gather(images, on_devices(examples))
        else:
            inputs = sharding.shard_rows(images, examples, mesh)
        yield Batch(inputs, on_devices(batch_labels), on_devices(rows))


@jax.jit
def _gather(images: jax.Array, rows: jax.Array) -> jax.Array:
    return images[rows]


def crop_when_decoded(
    images: ImageSource,
    *,
    augment: str | Sequence[str],
    image_mean: tuple[float, ...],
    num_views: int = 1,
    seed: int = 0,
) -> ImageSource:
    """Returns encoded images that are randomly cropped at full resolution when decoded; other images are unchanged.

    Contains each image `num_views` times, view after view. The rest of the augmentation is applied on the device, see
    `preprocess.device_augment`.
    """
    crop, _ = split_names(augment)
    if not isinstance(images, EncodedImages) or crop not in CROPS:
        return images
    rows = np.arange(num_views * len(images))
    uniforms = jax.jit(lambda rows: preprocess.sample_uniforms(rng.row_keys(rows, seed=seed)))(rows)
    color = preprocess.margin_color(image_mean)
    return images.crop(rows % len(images), augment=crop, uniforms=np.asarray(uniforms), margin_color=color)
