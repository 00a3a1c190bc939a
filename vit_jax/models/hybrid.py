"""What stands before the patches of a hybrid: the beginning of a ResNet (Dosovitskiy et al. 2021, section 3.1).

Post-activation bottlenecks with GroupNorm and weight-standardised convolutions. BiT's differ in more than the order:
there zeros are padded on both sides, and the epsilons are others.

Axes in comments: b batch, h w height and width, c channels.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from vit_jax.models.common import shard_batch
from vit_jax.models.resnet import NUM_GROUPS, Block, StdConv


def stem_reduction(units: Sequence[int] | None) -> int:
    """Pixels of the picture to one place of what the stem gives, along each axis; 1 where there is no stem."""
    return 1 if units is None else 4 * 2 ** max(0, len(units) - 1)


def apply_stem(images: jax.Array, *, units: Sequence[int], width: int, remat: str, dtype: Any) -> jax.Array:
    """The stem, called inside a module: its parameters lie at the top of that module's tree, as in the files.

    Args:
        images: [b h w 3].
        units: bottlenecks of each block; from the second block on, the first of them halves the picture. An empty
            tuple leaves the root alone.
        width: channels of the root and of the first block's middle; doubles from block to block.
        remat: "none", or a key of `REMAT_POLICIES`.
        dtype: of the computation.

    Returns:
        [b h/r w/r c], r of `stem_reduction`.
    """
    x = nn.relu(_norm(dtype, name="gn_root")(_conv(width, 7, 2, dtype, name="conv_root")(images)))
    x = shard_batch(nn.max_pool(x, (3, 3), (2, 2), padding="SAME"))
    for i, num_units in enumerate(units):
        stride, name = 1 if i == 0 else 2, f"block{i + 1}"
        x = Block(num_units, width * 2**i, stride, remat, dtype, unit=Unit, unit_name="unit{}", name=name)(x)
    return x


class Unit(nn.Module):
    """A post-activation bottleneck: 1 × 1, 3 × 3, 1 × 1 (He et al. 2016, "Deep Residual Learning").

    Attributes:
        width: channels of the middle; the output has four times as many.
        stride: of the 3 × 3.
        projects: whether the shortcut is a projection.
        dtype: of the computation.
    """

    width: int
    stride: int
    projects: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b h w c] -> [b h/stride w/stride 4·width]."""
        shortcut = x
        if self.projects:
            shortcut = _conv(4 * self.width, 1, self.stride, self.dtype, name="conv_proj")(x)
            shortcut = _norm(self.dtype, name="gn_proj")(shortcut)
        y = nn.relu(_norm(self.dtype, name="gn1")(_conv(self.width, 1, 1, self.dtype, name="conv1")(x)))
        y = nn.relu(_norm(self.dtype, name="gn2")(_conv(self.width, 3, self.stride, self.dtype, name="conv2")(y)))
        y = _conv(4 * self.width, 1, 1, self.dtype, name="conv3")(y)
        # A unit starts as its shortcut.
        y = _norm(self.dtype, name="gn3", scale_init=nn.initializers.zeros)(y)
        return shard_batch(nn.relu(shortcut + y))


_conv = functools.partial(StdConv, padding="SAME", variance_epsilon=0.0, deviation_epsilon=1e-5)


def _norm(dtype: Any, **options: Any) -> nn.GroupNorm:
    """Sums are at least float32."""
    return nn.GroupNorm(NUM_GROUPS, epsilon=1e-6, use_fast_variance=False, dtype=dtype, **options)
