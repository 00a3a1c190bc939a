"""ResNet (BiT): pre-activation bottlenecks, GroupNorm, weight-standardised convolutions (Kolesnikov et al. 2020).

Axes in comments: b batch, h w height and width, c channels, d features. The submodules carry the names of the released
files; the head alone, a 1 × 1 convolution there, is a matrix called `head`, as in every model here.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.common import REMAT_POLICIES, create_head, shard_batch
from vit_jax.runtime.errors import UsageError

NUM_GROUPS = 32


class StdConv(nn.Module):
    """A convolution without bias whose kernel is standardised for each output channel.

    Attributes:
        features: output channels.
        kernel_size: of both sides.
        stride: of both axes.
        dtype: of the convolution; the kernel's mean and variance are in the kernel's.
        padding: "CENTRED", as many zeros on both sides, or "SAME", where the odd one stands behind.
        variance_epsilon: added to the kernel's variance.
        deviation_epsilon: added to the root of that.
    """

    features: int
    kernel_size: int
    stride: int
    dtype: Any
    padding: str = "CENTRED"
    variance_epsilon: float = 1e-10
    deviation_epsilon: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b h w c] -> [b h/stride w/stride features]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        mean = jnp.mean(kernel, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(kernel - mean), axis=(0, 1, 2))
        kernel = (kernel - mean) / (jnp.sqrt(variance + self.variance_epsilon) + self.deviation_epsilon)
        centred = [((self.kernel_size - 1) // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride,) * 2,
            centred if self.padding == "CENTRED" else self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class GroupNorm(nn.Module):
    """GroupNorm of 32 groups, with the released files' names of its parameters; sums are at least float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b h w c] -> [b h w c]."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        normalize = nn.GroupNorm(
            NUM_GROUPS, epsilon=1e-5, use_bias=False, use_scale=False, use_fast_variance=False, dtype=wide
        )
        gamma = self.param("gamma", nn.initializers.ones, x.shape[-1:])
        beta = self.param("beta", nn.initializers.zeros, x.shape[-1:])
        return (normalize(x) * gamma + beta).astype(self.dtype)


class Projection(nn.Module):
    """The shortcut of a unit that changes its input's shape."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b h w c] -> [b h/stride w/stride features]."""
        return StdConv(self.features, 1, self.stride, self.dtype, name="standardized_conv2d")(x)


class Branch(nn.Module):
    """GroupNorm, ReLU, convolution; and the projection of what the convolution reads, on request.

    Attributes:
        features: output channels of the convolution.
        kernel_size: of the convolution.
        stride: of the convolution.
        projection: (features, stride) of the shortcut, or None.
        dtype: of the computation.
    """

    features: int
    kernel_size: int
    stride: int
    projection: tuple[int, int] | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """[b h w c] -> (what the convolution gives, the shortcut or None)."""
        x = nn.relu(GroupNorm(self.dtype, name="group_norm")(x))
        shortcut = Projection(*self.projection, self.dtype, name="proj")(x) if self.projection else None
        conv = StdConv(self.features, self.kernel_size, self.stride, self.dtype, name="standardized_conv2d")
        return conv(x), shortcut


class Unit(nn.Module):
    """A pre-activation bottleneck: 1 × 1, 3 × 3, 1 × 1.

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
        projection = (4 * self.width, self.stride) if self.projects else None
        y, shortcut = Branch(self.width, 1, 1, projection, self.dtype, name="a")(x)
        y, _ = Branch(self.width, 3, self.stride, None, self.dtype, name="b")(y)
        y, _ = Branch(4 * self.width, 1, 1, None, self.dtype, name="c")(y)
        return shard_batch(y + (x if shortcut is None else shortcut))


class Block(nn.Module):
    """Units of one width, the first of which may halve the picture.

    Attributes:
        num_units: how many.
        width: of each, see the unit.
        stride: of the first.
        remat: "none", or a key of `REMAT_POLICIES`.
        dtype: of the computation.
        unit: their module.
        unit_name: of a unit, in which its number is put.
    """

    num_units: int
    width: int
    stride: int
    remat: str
    dtype: Any
    unit: type[nn.Module] = Unit
    unit_name: str = "unit{:02}"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b h w c] -> [b h/stride w/stride 4·width]."""
        unit: Any = self.unit if self.remat == "none" else nn.remat(self.unit, policy=REMAT_POLICIES[self.remat])
        for i in range(self.num_units):
            first = i == 0
            x = unit(self.width, self.stride if first else 1, first, self.dtype, name=self.unit_name.format(i + 1))(x)
        return x


class Root(nn.Module):
    """The first convolution and its max-pool, zeros around both: "subtly not the same" as a pool with padding."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[b h w 3] -> [b h/4 w/4 width]."""
        x = StdConv(self.width, 7, 2, self.dtype, name="standardized_conv2d")(images)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return shard_batch(nn.max_pool(x, (3, 3), (2, 2)))


class Backbone(nn.Module):
    """Everything before the head."""

    units: tuple[int, ...]
    width: int
    remat: str
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[b h w 3] -> [b d]."""
        x = Root(self.width, self.dtype, name="root_block")(images)
        for i, num_units in enumerate(self.units):
            x = Block(num_units, self.width * 2**i, 1 if i == 0 else 2, self.remat, self.dtype, name=f"block{i + 1}")(x)
        x = nn.relu(GroupNorm(self.dtype, name="group_norm")(x))
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return shard_batch(jnp.mean(x, axis=(1, 2), dtype=wide).astype(self.dtype))


class ResNet(nn.Module):
    """Pictures to class logits; ResNet-50 (BiT) unless told otherwise.

    Attributes:
        num_classes: width of the head; None has no head and gives the features before it.
        units: bottlenecks of each block; from the second block on, the first of them halves the picture.
        width: channels of the root and of the first block's middle, a multiple of 32; doubles from block to block.
        dtype: of the computation; parameters are float32 always, logits at least float32.
        remat: "none", or a key of `REMAT_POLICIES`: what a unit does not keep for its backward pass is computed again.
        head_init: a key of `HEAD_INITS`: how the head's kernel starts; its bias is zero.

    Source:
        Kolesnikov et al. 2020, "Big Transfer (BiT): General Visual Representation Learning"; He et al. 2016, "Identity
        Mappings in Deep Residual Networks"; Qiao et al. 2019, "Weight Standardization".
    """

    SIZES: ClassVar[tuple[str, ...]] = ("units", "width")

    num_classes: int | None
    units: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    dtype: Any = jnp.float32
    remat: str = "none"
    head_init: str = "zeros"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes logits.

        Args:
            images: [b h w 3], in [-1, 1].
            train: changes nothing; there is no dropout.

        Returns:
            [b num_classes], float32 (float64 where `dtype` is); features [b d] in `dtype` where there is no head.
        """
        x = Backbone(self.units, self.width, self.remat, self.dtype, name="resnet")(images)
        return x if self.num_classes is None else self.create_head(self.num_classes, name="head")(x)

    @nn.nowrap
    def create_head(self, num_classes: int, name: str | None = None) -> nn.Dense:
        """The layer [b d] -> [b num_classes], to be used apart from the model where its features are at hand."""
        return create_head(num_classes, dtype=self.dtype, head_init=self.head_init, name=name)

    @nn.nowrap
    def validate(self, image_size: int | None = None) -> None:
        """Checks the width; any image size is accepted.

        Raises:
            UsageError: the width is not a multiple of the number of groups.
        """
        if self.width % NUM_GROUPS:
            raise UsageError(f"model.width {self.width} is not a multiple of {NUM_GROUPS}")
