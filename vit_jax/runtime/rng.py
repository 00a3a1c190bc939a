"""Random numbers of a run: the order of images, and the keys for crops, dropout and mixing.

They depend only on the run's key and the epoch or step: a resumed run replays nothing, and worker processes sample the
same crops for streamed images as the device samples for images in memory.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Int32, PRNGKeyArray, Shaped


class Stream(enum.IntEnum):
    """Streams of random numbers; the value is folded into the run's key first."""

    ORDER = 0
    STEP = 1
    MIX = 2
    LORA = 3
    BALANCE = 4


class ImageStream(enum.IntEnum):
    """Streams of random numbers of one image; the value is folded into the image's key.

    Crops and flips have the keys of `jax.random.split`, 0 and 1.
    """

    TRIVIAL = 2
    COLOR_JITTER = 3
    ERASE = 4


def epoch_order(key: PRNGKeyArray, epoch: Int[ArrayLike, ""], num_images: int) -> Int32[Array, " n"]:
    """Returns the order of the training images in an epoch that has each of them once."""
    key = jax.random.fold_in(jax.random.fold_in(key, Stream.ORDER), epoch)
    return jax.random.permutation(key, num_images).astype(jnp.int32)


def balanced_order(key: PRNGKeyArray, epoch: Int[ArrayLike, ""], labels: Int32[ArrayLike, " n"]) -> Int32[Array, " n"]:
    """Returns the order of n training images in an epoch that has equally many of each class, to within one.

    Within a class, every image occurs equally often, to within one: images of rare classes are repeated, and of
    frequent classes a random part is used. Classes without images are ignored.
    """
    labels = jnp.asarray(labels)
    shuffled = epoch_order(key, epoch, len(labels))
    by_class = shuffled[jnp.argsort(labels[shuffled], stable=True)]  # shuffled within each class
    ranks = jnp.cumsum(jnp.diff(labels[by_class], prepend=labels[by_class[0]]) > 0)  # 0 for the first class found
    num_classes = ranks[-1] + 1
    order_key, first_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, Stream.BALANCE), epoch))
    slots = jax.random.permutation(order_key, len(labels))
    # Random classes have the images that remain, so that over many epochs all are equally frequent.
    classes = (slots + jax.random.randint(first_key, (), 0, num_classes)) % num_classes
    start, stop = (jnp.searchsorted(ranks, classes, side=side) for side in ("left", "right"))
    return by_class[start + slots // num_classes % (stop - start)]


def training_order(
    key: PRNGKeyArray, epoch: Int[ArrayLike, ""], labels: Int32[ArrayLike, " n"], *, balanced: bool
) -> Int32[Array, " n"]:
    """Returns `balanced_order`, or `epoch_order` if not `balanced`."""
    return balanced_order(key, epoch, labels) if balanced else epoch_order(key, epoch, jnp.size(labels))


def step_keys(key: PRNGKeyArray, step: Int[ArrayLike, ""], batch_size: int) -> tuple[Array, Array]:
    """Returns the keys of a step's images, for augmentation and for dropout, [b] each."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, Stream.STEP), step))
    return jax.random.split(augment_key, batch_size), jax.random.split(dropout_key, batch_size)


def image_keys(keys: Shaped[Array, "b ..."], augmentation: str) -> Shaped[Array, "b ..."]:
    """Returns the keys of an augmentation that is named by its `ImageStream` in lower case, for the images' keys."""
    return jax.vmap(lambda key: jax.random.fold_in(key, ImageStream[augmentation.upper()]))(keys)


def mix_keys(key: PRNGKeyArray, step: Int[ArrayLike, ""], batch_size: int) -> Array:
    """Returns the keys of a step's mixup and cutmix, [b]."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, Stream.MIX), step), batch_size)


def row_keys(rows: Int[ArrayLike, " b"], *, seed: int = 0) -> Array:
    """Returns keys that do not depend on the step: for cached features, or, with seed 0, for a test split."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.PRNGKey(seed), row))(rows)
