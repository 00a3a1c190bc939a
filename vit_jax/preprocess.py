"""Pictures made ready for the model, on the device, inside the step: cropped, flipped, resized, mixed.

A crop with its resize and flip is two small matrix products, one over rows and one over columns: output row i reads
the crop at (i + 1/2) · height / image_size - 1/2, between two pixels, clamped at the crop's edge.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.crops import Box, random_box

AUGMENTATIONS = ("none", "flip", "pad_crop", "square_crop", "inception")

HALF = (0.5, 0.5, 0.5)
"""Mean and deviation that take pixels to [-1, 1], as the released models were trained."""


def normalize(images: jax.Array, *, mean: Sequence[float] = HALF, deviation: Sequence[float] = HALF) -> jax.Array:
    """uint8 [... 3] -> float32 [... 3]: (pixel / 255 - mean) / deviation, channel by channel."""
    offset, scale = (255.0 * np.asarray(channels, np.float32) for channels in (mean, deviation))
    return (images.astype(jnp.float32) - offset) / scale


def prepare(
    keys: jax.Array,
    images: jax.Array,
    *,
    image_size: int,
    augment: str = "none",
    mean: Sequence[float] = HALF,
    deviation: Sequence[float] = HALF,
) -> jax.Array:
    """Normalizes, crops, flips and resizes, each picture by a key of its own.

    A picture's draw depends on its key alone, so that devices and accumulation do not change it.

    Args:
        keys: [b] random keys; not used where nothing is drawn.
        images: uint8 [b h w 3].
        image_size: pixels, square.
        augment: "none"; "flip" (half the pictures, left to right); "pad_crop" (a margin of an eighth in the mean's
            colour, a crop of the picture's size, and flip); "square_crop" (a square of 64 to 100 % of the area, and
            flip); "inception" (5 to 100 % of the area, and flip). Boxes are those of `crops`.
        mean: of the channels, from 0 to 1.
        deviation: of the channels, on the same scale.

    Returns:
        float32 [b image_size image_size 3].
    """
    if augment == "none":
        normal = normalize(images, mean=mean, deviation=deviation)
        if images.shape[1:3] == (image_size, image_size):
            return normal
        return jax.vmap(lambda image: _resize(image, _whole(image), image_size=image_size))(normal)

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        height, width = image.shape[:2]
        draws = jax.random.uniform(crop_key, (4,))
        box = random_box(augment, draws, height=height, width=width, image_size=image_size, xp=jnp)
        image = normalize(image, mean=mean, deviation=deviation)
        return _resize(image, box, image_size=image_size, flip=jax.random.bernoulli(flip_key))

    return jax.vmap(one)(keys, images)


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


def _whole(image: jax.Array) -> Box:
    """The box (top, left, height, width) of a whole picture [h w c]."""
    return 0, 0, image.shape[0], image.shape[1]


def _resize(image: jax.Array, box: Box, *, image_size: int, flip: jax.Array | bool = False) -> jax.Array:
    """Cuts a box out of a picture [h w c], resizes it bilinearly to a square, flips it left to right on request.

    Outside of the picture all is zero, which is the mean's colour.
    """
    top, left, height, width = box
    rows = _bilinear(top, height, image.shape[0], image_size)
    columns = _bilinear(left, width, image.shape[1], image_size)
    columns = jnp.where(flip, columns[::-1], columns)
    # At the highest precision: tensor cores would otherwise round pixels to 8 or 10 bits.
    image = jnp.einsum("ih,hwc->iwc", rows, image, precision="highest")
    return jnp.einsum("jw,iwc->ijc", columns, image, precision="highest")


def _bilinear(start: jax.Array | int, length: jax.Array | int, input_size: int, output_size: int) -> jax.Array:
    """The matrix [output_size input_size] that resizes the interval of `length` pixels from `start`."""
    offset = (jnp.arange(output_size) + 0.5) * (length / output_size) - 0.5
    position = start + jnp.clip(offset, 0, length - 1)
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[:, None] - jnp.arange(input_size)[None, :]))
