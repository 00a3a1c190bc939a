"""ResNet stem of a hybrid Vision Transformer (Dosovitskiy et al. 2021, section 3.1).

Post-activation bottlenecks with GroupNorm and weight-standardized convolutions. BiT (`models.resnet`) is
pre-activation, with symmetric padding and other epsilons. Axes: b batch, h w height and width, c channels.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vit_jax.models.common import NUM_GROUPS, shard_batch
from vit_jax.models.resnet import Block, StdConv


def apply_stem(
    images: Float[Array, "b h w 3"], *, units: Sequence[int], width: int, remat: str, dtype: DTypeLike
) -> Float[Array, "b h2 w2 c"]:
    """Applies the stem in the scope of the calling module, where the checkpoints have its parameters.

    `units` and `width` are as in `resnet.ResNet`; without units, only the root is applied.
    """
    x = nn.relu(create_norm("gn_root", dtype)(create_conv(width, 7, 2, dtype, name="conv_root")(images)))
    x = shard_batch(nn.max_pool(x, (3, 3), (2, 2), padding="SAME"))
    for i, num_units in enumerate(units):
        stride, name = 1 if i == 0 else 2, f"block{i + 1}"
        x = Block(num_units, width * 2**i, stride, remat, dtype, unit=Unit, unit_name="unit{}", name=name)(x)
    return x


class Unit(nn.Module):
    """A post-activation bottleneck: 1 × 1, 3 × 3, 1 × 1 (He et al. 2016); fields as in `resnet.Unit`."""

    width: int
    stride: int
    projects: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Applies the unit."""
        shortcut = x
        if self.projects:
            shortcut = create_conv(4 * self.width, 1, self.stride, self.dtype, name="conv_proj")(x)
            shortcut = create_norm("gn_proj", self.dtype)(shortcut)
        y = nn.relu(create_norm("gn1", self.dtype)(create_conv(self.width, 1, 1, self.dtype, name="conv1")(x)))
        y = create_conv(self.width, 3, self.stride, self.dtype, name="conv2")(y)
        y = nn.relu(create_norm("gn2", self.dtype)(y))
        y = create_conv(4 * self.width, 1, 1, self.dtype, name="conv3")(y)
        y = create_norm("gn3", self.dtype, nn.initializers.zeros)(y)  # initially, a unit is its shortcut
        return shard_batch(nn.relu(shortcut + y))


create_conv = functools.partial(StdConv, padding="SAME", variance_epsilon=0.0, std_epsilon=1e-5)


def create_norm(name: str, dtype: DTypeLike, scale_init: Callable[..., Array] = nn.initializers.ones) -> nn.GroupNorm:
    """Creates a GroupNorm whose sums are at least float32."""
    return nn.GroupNorm(
        NUM_GROUPS, epsilon=1e-6, use_fast_variance=False, dtype=dtype, scale_init=scale_init, name=name
    )
