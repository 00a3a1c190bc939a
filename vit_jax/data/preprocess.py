"""Preprocessing on the device, inside the jitted step: crop, resize, flip, augment, mix, normalize.

Resized pixels equal those of `data.decode_image`, which uses Pillow; see `crops.resize_weights`.
"""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Num, Shaped, UInt8

from vit_jax.data.augment import OPS
from vit_jax.data.crops import (
    AUGMENTATIONS,
    CROPS,
    WEIGHT_BITS,
    Augmentations,
    Box,
    Number,
    center,
    resize_weights,
    resized_size,
    split_names,
)
from vit_jax.runtime import rng
from vit_jax.runtime.errors import UsageError

HALF = (0.5, 0.5, 0.5)  # mean and std that map pixels to [-1, 1], as for the pretrained models

Augment = Augmentations | Callable[[Array, Array], Array]
"""Names of augmentations, or a user's function for one image, (key, uint8 [h w 3]) -> uint8 [h' w' 3]."""


def normalize(
    images: Num[Array | np.ndarray, "*b 3"], *, mean: Sequence[float] = HALF, std: Sequence[float] = HALF
) -> Float32[Array, "*b 3"]:
    """Returns (pixel / 255 - mean) / std per channel, for pixels from 0 to 255."""
    offset, scale = (255.0 * np.asarray(channels, np.float32) for channels in (mean, std))
    return (jnp.asarray(images, jnp.float32) - offset) / scale


def prepare(
    keys: Shaped[Array, "b ..."] | None,
    images: UInt8[Array | np.ndarray, "b h w 3"],
    *,
    image_size: int,
    augment: Augment = "none",
    resize: str = "squash",
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> Float32[Array, "b {image_size} {image_size} 3"]:
    """Crops, resizes, flips, augments and normalizes images of one size, with one random key per image.

    Random numbers depend only on the image's key, not on sharding or accumulation; `keys` may be None if nothing is
    sampled. `resize`, one of `types.RESIZES`, is that of images that are not cropped, unless they have the
    `image_size`. `mean` and `std` are in [0, 1]; "pad_crop" and "erase" fill with the color of the `mean`. A user's
    function is applied before the resize, except to streamed images, which are already resized.
    """
    crop_name, names = ("none", ()) if callable(augment) else split_names(augment)
    images, augmentation = jnp.asarray(images), AUGMENTATIONS[crop_name]
    if callable(augment):
        images = jax.vmap(augment)(cast(Array, keys), images)
        if getattr(images, "dtype", None) != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            found = f"{images.dtype} {list(images.shape[1:])}" if isinstance(images, Array) else type(images).__name__
            raise UsageError(f"augment returns {found}; expected a uint8 image [h w 3]")
    height, width = images.shape[1:3]
    if augmentation.sample_box:
        y, x = (height // 8, width // 8) if augmentation.pads else (0, 0)
        margin = jnp.broadcast_to(jnp.array(margin_color(mean), images.dtype), (height + 2 * y, width + 2 * x, 3))
        sample_box = functools.partial(augmentation.sample_box, image_size=image_size, xp=jnp)

        def crop(image: Array, uniforms: Array) -> Array:
            top, left, rows, columns = sample_box(uniforms, height, width)
            padded = jax.lax.dynamic_update_slice(margin, image, (y, x, 0))
            return _resize(padded, (top + y, left + x, rows, columns), image_size=image_size, xp=jnp)

        images = jax.vmap(crop)(images, sample_uniforms(cast(Array, keys)))
    elif (height, width) != (image_size, image_size):
        images = jax.vmap(functools.partial(_resize_and_crop, resize=resize, image_size=image_size))(images)
    if augmentation.flips:
        flips = jax.vmap(lambda key: jax.random.bernoulli(jax.random.split(key)[1]))(keys)
        images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    for name in names:
        op = functools.partial(OPS[name], fill=jnp.array(margin_color(mean)))
        images = jax.vmap(op)(rng.image_keys(cast(Array, keys), name), images.astype(jnp.int32))
    return normalize(images, mean=mean, std=std)


def device_augment(names: str | Sequence[str], *, in_memory: bool) -> Augmentations:
    """Returns the augmentations to apply on the device; streamed images are already cropped when decoded."""
    crop, others = split_names(names)
    return ("flip" if crop in CROPS and not in_memory else crop, *others)


def sample_uniforms(keys: Shaped[Array, "b ..."]) -> Float32[Array, "b 4"]:
    """Samples the random numbers in [0, 1) for the boxes of `crops`."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.split(key)[0], (4,)))(keys)


def margin_color(mean: Sequence[float]) -> tuple[int, ...]:
    """Returns the padding color as 8-bit channels."""
    return tuple(round(255 * channel) for channel in mean)


def mix(
    keys: Shaped[Array, "b ..."],
    images: Float[Array, "b h w 3"],
    partners: Float[Array, "b h w 3"],
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[Float[Array, "b h w 3"], Float[Array, " b"]]:
    """Applies mixup (blends each image with its partner) or CutMix (pastes a box of the partner into the image).

    Weights are sampled from Beta(alpha, alpha). In mixup (Zhang et al. 2018), the weight is that of the image's pixels;
    in CutMix (Yun et al. 2019), the box has the area 1 - weight and is clipped at the edges. If both alphas are
    positive, each image gets one of the two with equal probability; an alpha of 0 disables it.

    Returns:
        (mixed images, weights of the images' own labels in [0, 1]).
    """
    height, width = images.shape[1:3]

    def mix_image(key: Array, image: Array, partner: Array) -> tuple[Array, Array]:
        choice_key, blend_key, area_key, center_key = jax.random.split(key, 4)
        blend, pasted = jnp.ones(()), jnp.zeros((height, width), bool)
        if mixup_alpha:
            blend = jax.random.beta(blend_key, mixup_alpha, mixup_alpha)
        if cutmix_alpha:
            size = jnp.array([height, width])
            box = jnp.round(size * jnp.sqrt(1.0 - jax.random.beta(area_key, cutmix_alpha, cutmix_alpha)))
            start = jnp.floor(jax.random.uniform(center_key, (2,)) * size) - jnp.floor(box / 2)
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

    return jax.vmap(mix_image)(keys, images, partners)


def _resize(image: Array, box: Box, *, image_size: int, xp: ModuleType) -> Array:
    """Resizes a box inside an image, integers 0 to 255 [h w c], to int32 [image_size image_size c].

    `xp` is `numpy` if the box is static, else `jax.numpy`.
    """
    top, left, height, width = box
    columns = resize_weights(left, width, input_size=image.shape[1], output_size=image_size, xp=xp)
    rows = resize_weights(top, height, input_size=image.shape[0], output_size=image_size, xp=xp)
    return _apply_both_weights(rows, columns, image)


def _resize_and_crop(image: Array, *, resize: str, image_size: int) -> Array:
    """Resizes an image [h w c] as in `crops.resized_size` and takes the center, int32 [image_size image_size c]."""
    sizes = resized_size(resize, *image.shape[:2], image_size=image_size)
    rows, columns = (
        resize_weights(0, length, input_size=length, output_size=size, xp=np)[center(size, image_size)]
        for length, size in zip(image.shape[:2], sizes, strict=True)
    )
    return _apply_both_weights(rows, columns, image)


def _apply_both_weights(rows: Number, columns: Number, image: Array) -> Array:
    image = _apply_weights("jw,hwc->hjc", columns, image)  # columns first, as in `data.decode_image`
    return _apply_weights("ih,hwc->iwc", rows, image)


def _apply_weights(subscripts: str, weights: Number, image: Array) -> Array:
    """Multiplies an image by fixed-point weights and rounds to integers.

    float32 holds 24 bits: products of 8-bit pixels and either half of a 22-bit weight are exact, and so are their sums
    unless an axis shrinks by more than a factor of 16.
    """
    half_bits = WEIGHT_BITS // 2
    pixels = image.astype(jnp.float32)
    # Without the highest precision, tensor cores would round pixels to 8 or 10 bits.
    upper, lower = (
        jnp.einsum(subscripts, jnp.asarray(half, jnp.float32), pixels, precision="highest").astype(jnp.int32)
        for half in (weights // 2**half_bits, weights % 2**half_bits)
    )
    total = (upper << half_bits) + lower
    return jnp.right_shift(total + 2 ** (WEIGHT_BITS - 1), WEIGHT_BITS)
