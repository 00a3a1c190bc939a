"""Random numbers of a run: which images a step sees, and the keys of their crops, dropout and mixing.

All are functions of the run's key and of a number of epochs or steps, so that a resumed run replays nothing, and a
worker process that decodes images for a step samples what the device samples of images in its memory.
"""

import enum

import jax
import jax.numpy as jnp


class Stream(enum.IntEnum):
    """Number that is folded into the run's key first."""

    ORDER = 0
    STEP = 1
    MIX = 2
    LORA = 3


def epoch_order(key: jax.Array, epoch: jax.Array | int, num_images: int) -> jax.Array:
    """Returns the order of the training images in an epoch, int32 [num_images]."""
    key = jax.random.fold_in(jax.random.fold_in(key, Stream.ORDER), epoch)
    return jax.random.permutation(key, num_images).astype(jnp.int32)


def step_keys(key: jax.Array, step: jax.Array | int, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of a step's images: for augmentation and for dropout, [batch_size] each."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, Stream.STEP), step))
    return jax.random.split(augment_key, batch_size), jax.random.split(dropout_key, batch_size)


def mix_keys(key: jax.Array, step: jax.Array | int, batch_size: int) -> jax.Array:
    """Returns the keys of a step's mixup and cutmix, [batch_size]."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, Stream.MIX), step), batch_size)


def row_keys(rows: jax.Array, *, seed: int = 0) -> jax.Array:
    """Returns the keys of images that are seen once per run: of a test split, or of cached features.

    Args:
        rows: int [b], the images' numbers.
        seed: 0 for test images, so that they are the same for every run.
    """
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.PRNGKey(seed), row))(rows)
