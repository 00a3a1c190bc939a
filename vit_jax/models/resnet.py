"""ResNet (BiT): pre-activation bottlenecks, GroupNorm, weight-standardized convolutions (Kolesnikov et al. 2020).

Submodules are named as in the pretrained checkpoints, except the head, which is a dense layer `head` instead of a
1 × 1 convolution. Axes: b batch, h w height and width, c channels, d features.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vit_jax.models import common
from vit_jax.models.common import NUM_GROUPS, HeadMixin, float32_or_wider, shard_batch
from vit_jax.runtime.errors import UsageError


class StdConv(nn.Module):
    """A convolution without bias; the kernel is standardized per output channel, in the kernel's dtype."""

    features: int
    kernel_size: int
    stride: int
    dtype: DTypeLike
    padding: str = "CENTERED"  # symmetric zeros; XLA's "SAME" puts an odd one at the end
    variance_epsilon: float = 1e-10
    std_epsilon: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Applies the convolution."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel: Array = self.param("kernel", nn.initializers.he_normal(), shape)
        mean = jnp.mean(kernel, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(kernel - mean), axis=(0, 1, 2))
        kernel = (kernel - mean) / (jnp.sqrt(variance + self.variance_epsilon) + self.std_epsilon)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        padding = [((self.kernel_size - 1) // 2,) * 2] * 2 if self.padding == "CENTERED" else self.padding
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (self.stride,) * 2, padding, dimension_numbers=numbers)


class GroupNorm(nn.Module):
    """GroupNorm with the parameter names of BiT's checkpoints, computed in at least float32."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the norm."""
        normalize = functools.partial(nn.GroupNorm, use_bias=False, use_scale=False, use_fast_variance=False)
        gamma: Array = self.param("gamma", nn.initializers.ones, x.shape[-1:])
        beta: Array = self.param("beta", nn.initializers.zeros, x.shape[-1:])
        x = normalize(NUM_GROUPS, epsilon=1e-5, dtype=float32_or_wider(self.dtype))(x)
        return (x * gamma + beta).astype(self.dtype)


class _Projection(nn.Module):
    """Projection shortcut of a unit whose output shape differs from its input shape."""

    features: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        return StdConv(self.features, 1, self.stride, self.dtype, name="standardized_conv2d")(x)


class _Branch(nn.Module):
    """GroupNorm, ReLU, convolution; with a projection also a shortcut from the activated input."""

    features: int
    kernel_size: int
    stride: int
    projection: tuple[int, int] | None  # features, stride
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 c2"], Float[Array, "..."] | None]:
        x = nn.relu(GroupNorm(self.dtype, name="group_norm")(x))
        shortcut = _Projection(*self.projection, self.dtype, name="proj")(x) if self.projection else None
        conv = StdConv(self.features, self.kernel_size, self.stride, self.dtype, name="standardized_conv2d")
        return conv(x), shortcut


class Unit(nn.Module):
    """A pre-activation bottleneck: 1 × 1, 3 × 3, 1 × 1."""

    width: int  # output channels of the 3 × 3 convolution; the unit has four times as many
    stride: int  # of the 3 × 3 convolution
    projects: bool  # the shortcut is a projection
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Applies the unit."""
        projection = (4 * self.width, self.stride) if self.projects else None
        y, shortcut = _Branch(self.width, 1, 1, projection, self.dtype, name="a")(x)
        y, _ = _Branch(self.width, 3, self.stride, None, self.dtype, name="b")(y)
        y, _ = _Branch(4 * self.width, 1, 1, None, self.dtype, name="c")(y)
        return shard_batch(y + (x if shortcut is None else shortcut))


class Block(nn.Module):
    """Units of one width; the first projects its shortcut, and may halve height and width."""

    num_units: int
    width: int
    stride: int
    remat: str
    dtype: DTypeLike
    unit: type[Any] = Unit
    unit_name: str = "unit{:02}"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        unit: Callable[..., nn.Module] = common.remat_module(self.unit, self.remat)
        for i in range(self.num_units):
            name, stride = self.unit_name.format(i + 1), self.stride if i == 0 else 1
            x = unit(self.width, stride, i == 0, self.dtype, name=name)(x)
        return x


class _Root(nn.Module):
    """The first convolution and its max-pool."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        x = StdConv(self.width, 7, 2, self.dtype, name="standardized_conv2d")(images)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros, unlike the -inf that max-pool would pad with
        return shard_batch(nn.max_pool(x, (3, 3), (2, 2)))


class _Backbone(nn.Module):
    """The layers before the head."""

    units: tuple[int, ...]
    width: int
    remat: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        x = _Root(self.width, self.dtype, name="root_block")(images)
        for i, num_units in enumerate(self.units):
            x = Block(num_units, self.width * 2**i, 1 if i == 0 else 2, self.remat, self.dtype, name=f"block{i + 1}")(x)
        x = nn.relu(GroupNorm(self.dtype, name="group_norm")(x))
        return shard_batch(jnp.mean(x, axis=(1, 2), dtype=float32_or_wider(self.dtype)).astype(self.dtype))


class ResNet(HeadMixin, nn.Module):
    """ResNet: maps images to class logits; ResNet-50 (BiT) by default.

    Attributes:
        num_classes: number of logits; None: no head, the outputs are features.
        units: number of units of each block; from the second block on, the first unit halves height and width.
        width: channels of the root and of the 3 × 3 convolutions of the first block, a multiple of 32; doubled from
            block to block.
        dtype: dtype of the computation; parameters are always float32, logits at least float32.
        remat: "none", or a key of `REMAT_POLICIES`: which intermediates of a unit are kept for the backward pass.
        head_init: a key of `HEAD_INITS`: initializer of the head's kernel; its bias is zero.

    Source:
        Kolesnikov et al. 2020, "Big Transfer (BiT): General Visual Representation Learning"; He et al. 2016, "Identity
        Mappings in Deep Residual Networks"; Qiao et al. 2019, "Weight Standardization".
    """

    SIZES: ClassVar[tuple[str, ...]] = ("units", "width")
    HAS_ATTENTION: ClassVar[bool] = False

    num_classes: int | None
    units: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    head_init: str = "zeros"

    @nn.compact
    def __call__(self, images: Float[jax.typing.ArrayLike, "b h w 3"], *, train: bool = False) -> Float[Array, "b d"]:
        """Maps images in [-1, 1] to logits [b num_classes], or without a head to features [b d] in `dtype`.

        Logits are float32, or float64 if `dtype` is. `train` has no effect, as there is no dropout.
        """
        x = _Backbone(self.units, self.width, self.remat, self.dtype, name="resnet")(jnp.asarray(images))
        return x if self.num_classes is None else self.create_head(self.num_classes, name="head")(x)

    @property
    def pixels_per_patch(self) -> int:
        """Height and width in pixels of one output position of the last block."""
        return common.reduction(self.units)

    @nn.nowrap
    def layer_index(self, path: str) -> int:
        """Raises UsageError: layer-wise learning rate decay is only defined for Vision Transformers."""
        raise UsageError("layer_decay is only defined for a VisionTransformer; set it to 1 for a ResNet")

    @nn.nowrap
    def validate(self, image_size: int | None = None) -> None:
        """Raises UsageError unless the width is a multiple of the number of groups; any image size is valid."""
        if self.width % NUM_GROUPS:
            raise UsageError(f"model.width is {self.width}; expected a multiple of {NUM_GROUPS}")
