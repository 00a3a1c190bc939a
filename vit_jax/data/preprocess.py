"""Preprocessing on the device, inside the jitted step: crop, resize, flip, mix, normalize.

A resize gives the very pixels that `data.decode_image` gets from Pillow: see `crops.resize_weights`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.crops import CROPS, WEIGHT_BITS, Box, random_box, resize_weights

AUGMENTATIONS = ("none", "flip", *CROPS)

HALF = (0.5, 0.5, 0.5)
"""Mean and std that take pixels to [-1, 1], as the released models were trained."""


def normalize(images: jax.Array, *, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> jax.Array:
    """Integers 0 to 255 [... 3] -> float32 [... 3]: (pixel / 255 - mean) / std, channel by channel."""
    offset, scale = (255.0 * np.asarray(channels, np.float32) for channels in (mean, std))
    return (images.astype(jnp.float32) - offset) / scale


def prepare(
    keys: jax.Array,
    images: jax.Array,
    *,
    image_size: int,
    augment: str = "none",
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> jax.Array:
    """Crops, resizes, flips and normalizes, each image by a key of its own.

    What is sampled for an image depends on its key alone, so that devices and accumulation do not change it.

    Args:
        keys: [b] random keys; not used where nothing is sampled.
        images: uint8 [b h w 3].
        image_size: pixels, square.
        augment: "none"; "flip" (half the images, left to right); "pad_crop" (padded by an eighth of each side in the
            mean's color, cropped to the image's size, flip); "square_crop" (a square of 64 to 100 % of the area,
            flip); "inception" (5 to 100 % of the area, flip). Boxes are those of `crops`.
        mean: of the channels, from 0 to 1.
        std: of the channels, on the same scale.

    Returns:
        float32 [b image_size image_size 3].
    """
    height, width = images.shape[1:3]
    if augment in CROPS:
        margins = (height // 8, width // 8) if augment == "pad_crop" else (0, 0)

        def crop(image: jax.Array, uniforms: jax.Array) -> jax.Array:
            top, left, *size = random_box(augment, uniforms, height=height, width=width, image_size=image_size, xp=jnp)
            image = _pad(image, margins, margin_color(mean))
            return _resize(image, (top + margins[0], left + margins[1], *size), image_size=image_size, xp=jnp)

        images = jax.vmap(crop)(images, sample_uniforms(keys))
    elif (height, width) != (image_size, image_size):
        resize = functools.partial(_resize, box=(0, 0, height, width), image_size=image_size, xp=np)
        images = jax.vmap(resize)(images)
    if augment != "none":
        flips = jax.vmap(lambda key: jax.random.bernoulli(jax.random.split(key)[1]))(keys)
        images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    return normalize(images, mean=mean, std=std)


def device_augment(augment: str, *, in_memory: bool) -> str:
    """Returns what is left to do on the device: images that are not in memory are cropped where they are decoded."""
    return "flip" if augment in CROPS and not in_memory else augment


def sample_uniforms(keys: jax.Array) -> jax.Array:
    """Returns what `crops.random_box` needs: [b] random keys -> float32 [b 4] in [0, 1)."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.split(key)[0], (4,)))(keys)


def margin_color(mean: Sequence[float]) -> tuple[int, ...]:
    """Returns the color of a padded image's margin, as 8-bit channels."""
    return tuple(round(255 * channel) for channel in mean)


def mix(
    keys: jax.Array, images: jax.Array, partners: jax.Array, *, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Blends every picture with its partner, or pastes a box of the partner into it.

    A picture's share is drawn from Beta(alpha, alpha), for each picture anew. Where both alphas are positive, each
    picture is mixed in one of the two ways, with equal chance.

    Args:
        keys: [b] random keys, a picture's own.
        images: float [b h w 3].
        partners: float [b h w 3].
        mixup_alpha: of blending (Zhang et al. 2018); 0 for none.
        cutmix_alpha: of pasting a box of the area 1 - share, cut off at the edges (Yun et al. 2019); 0 for none.

    Returns:
        (mixed [b h w 3], share [b]): the part of the picture itself, from 0 to 1, which its label keeps.
    """
    height, width = images.shape[1:3]

    def one(key: jax.Array, image: jax.Array, partner: jax.Array) -> tuple[jax.Array, jax.Array]:
        choice_key, blend_key, area_key, centre_key = jax.random.split(key, 4)
        blend = jnp.ones(())
        pasted = jnp.zeros((height, width), bool)
        if mixup_alpha:
            blend = jax.random.beta(blend_key, mixup_alpha, mixup_alpha)
        if cutmix_alpha:
            size = jnp.array([height, width])
            box = jnp.round(size * jnp.sqrt(1.0 - jax.random.beta(area_key, cutmix_alpha, cutmix_alpha)))
            start = jnp.floor(jax.random.uniform(centre_key, (2,)) * size) - jnp.floor(box / 2)
            rows, columns = (
                (jnp.arange(length) >= first) & (jnp.arange(length) < first + extent)
                for length, first, extent in zip((height, width), start, box, strict=True)
            )
            pasted = rows[:, None] & columns[None, :]
        if mixup_alpha and cutmix_alpha:
            blends = jax.random.bernoulli(choice_key)
            blend, pasted = jnp.where(blends, blend, 1.0), pasted & ~blends
        mixed = jnp.where(pasted[..., None], partner, blend * image + (1.0 - blend) * partner)
        return mixed, blend * (1.0 - jnp.mean(pasted))

    return jax.vmap(one)(keys, images, partners)


def _pad(image: jax.Array, margins: tuple[int, int], color: Sequence[int]) -> jax.Array:
    """Pads an image [h w c] by margins of rows and of columns, in pixels."""
    if not any(margins):
        return image
    rows, columns = margins
    padded = [
        jnp.pad(image[..., channel], ((rows, rows), (columns, columns)), constant_values=value)
        for channel, value in enumerate(color)
    ]
    return jnp.stack(padded, axis=-1)


def _resize(image: jax.Array, box: Box, *, image_size: int, xp: Any) -> jax.Array:
    """Resizes a box of an image, integers 0 to 255 [h w c], to a square int32 [image_size image_size c].

    Args:
        image: the box is inside of it.
        box: top, left, height, width in pixels.
        image_size: pixels, square.
        xp: `numpy` where the box is known when the step is traced, else `jax.numpy`.
    """
    top, left, height, width = box
    columns = resize_weights(left, width, input_size=image.shape[1], output_size=image_size, xp=xp)
    rows = resize_weights(top, height, input_size=image.shape[0], output_size=image_size, xp=xp)
    image = _apply_weights("jw,hwc->hjc", columns, image)  # columns first, as `data.decode_image`
    return _apply_weights("ih,hwc->iwc", rows, image)


def _apply_weights(subscripts: str, weights: jax.Array, image: jax.Array) -> jax.Array:
    """Multiplies an image by fixed-point weights and rounds to integers.

    float32 holds 24 bits: products of 8-bit pixels with either half of a 22-bit weight fit in, and so do their sums
    unless an axis shrinks more than 16 times.
    """
    half_bits = WEIGHT_BITS // 2
    pixels = image.astype(jnp.float32)

    def products(half: jax.Array) -> jax.Array:
        # At the highest precision: tensor cores would otherwise round pixels to 8 or 10 bits.
        half = jnp.asarray(half, jnp.float32)
        return jnp.einsum(subscripts, half, pixels, precision="highest").astype(jnp.int32)

    total = (products(weights // 2**half_bits) << half_bits) + products(weights % 2**half_bits)
    return (total + 2 ** (WEIGHT_BITS - 1)) >> WEIGHT_BITS
