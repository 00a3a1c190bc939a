"""Random numbers of a run: the order of images, and the keys for crops, dropout and mixing.

They depend only on the run's key and the epoch or step: a resumed run replays nothing, and worker processes sample the
same crops for streamed images as the device samples for images in memory.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Int32, PRNGKeyArray


class Stream(enum.IntEnum):
    """Streams of random numbers; the value is folded into the run's key first."""

    ORDER = 0
    STEP = 1
    MIX = 2
    LORA = 3


def epoch_order(key: PRNGKeyArray, epoch: Int[ArrayLike, ""], num_images: int) -> Int32[Array, " n"]:
    """Returns the order of the training images in an epoch."""
    key = jax.random.fold_in(jax.random.fold_in(key, Stream.ORDER), epoch)
    return jax.random.permutation(key, num_images).astype(jnp.int32)


def step_keys(key: PRNGKeyArray, step: Int[ArrayLike, ""], batch_size: int) -> tuple[Array, Array]:
    """Returns the keys of a step's images, for augmentation and for dropout, [b] each."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, Stream.STEP), step))
    return jax.random.split(augment_key, batch_size), jax.random.split(dropout_key, batch_size)


def mix_keys(key: PRNGKeyArray, step: Int[ArrayLike, ""], batch_size: int) -> Array:
    """Returns the keys of a step's mixup and cutmix, [b]."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, Stream.MIX), step), batch_size)


def row_keys(rows: Int[ArrayLike, " b"], *, seed: int = 0) -> Array:
    """Returns keys that do not depend on the step: for cached features, or, with seed 0, for a test split."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.PRNGKey(seed), row))(rows)
