"""The Vision Transformer (Dosovitskiy et al. 2021, section 3.1).

Submodules are named as in the original ViT checkpoint format: flattened parameter paths are the checkpoint's keys.
Axes: b batch, h w height and width, c channels, n tokens, d width.
"""

import dataclasses
import functools
import re
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from vit_jax.models.attention import cudnn_attention, weigh_values
from vit_jax.models.common import NUM_GROUPS, HeadMixin, float32_or_wider, reduction, remat_module, shard_batch
from vit_jax.models.hybrid import apply_stem
from vit_jax.runtime.errors import UsageError

POOLS = ("cls", "mean", "map")  # the class token, the mean over all tokens, or attention pooling by a learned probe


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Arguments of `VisionTransformer` that its submodules share; documented there."""

    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    gelu_approximate: bool = True
    layer_norm_epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"

    def create_norm(self, name: str) -> nn.LayerNorm:
        """Creates a LayerNorm with statistics in at least float32."""
        return nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name=name)

    def create_attention(self, name: str, *, dropout_rate: float = 0.0) -> nn.MultiHeadDotProductAttention:
        """Creates attention with a softmax in at least float32."""
        return nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            dropout_rate=dropout_rate,
            broadcast_dropout=False,
            kernel_init=nn.initializers.xavier_uniform(),
            force_fp32_for_softmax=jnp.dtype(self.dtype).itemsize < 4,
            qk_attn_weights_einsum_cls=lambda: jnp.einsum,
            attn_weights_value_einsum_cls=lambda: weigh_values,
            attention_fn=cudnn_attention if self.attention == "cudnn" else nn.dot_product_attention,
            name=name,
        )


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them, each followed by dropout (Eq. 3)."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], *, deterministic: bool) -> Float[Array, "b n d"]:
        """Applies the block; dropout is off if `deterministic`."""
        dense = functools.partial(
            nn.Dense,
            dtype=self.config.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        dropout = functools.partial(nn.Dropout, self.config.dropout_rate, deterministic=deterministic)
        gelu = functools.partial(nn.gelu, approximate=self.config.gelu_approximate)
        y: Array = dense(self.config.mlp_dim, name="Dense_0")(x)
        y = dropout()(jax.checkpoint(gelu)(y))  # keeps only the input of the GELU for the backward pass
        y = dropout()(dense(x.shape[-1], name="Dense_1")(y))
        return y


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP, each with a residual connection (Eq. 2 and 3)."""

    config: BlockConfig
    stochastic_depth_rate: float = 0.0  # probability of skipping either branch for an image (Huang et al. 2016)

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], deterministic: bool) -> Float[Array, "b n d"]:
        """Applies the block; dropout is off if `deterministic`."""
        config = self.config
        skip = functools.partial(nn.Dropout, self.stochastic_depth_rate, broadcast_dims=(1, 2))
        y = config.create_norm("LayerNorm_0")(x)
        attention = config.create_attention(
            "MultiHeadDotProductAttention_1", dropout_rate=config.attention_dropout_rate
        )
        # Weights are stored only if "intermediates" is mutable.
        y = attention(y, y, deterministic=deterministic, sow_weights=True)
        y = nn.Dropout(config.dropout_rate)(y, deterministic=deterministic)
        x = shard_batch(x + skip()(y, deterministic=deterministic))
        y = config.create_norm("LayerNorm_2")(x)
        y = MlpBlock(config, name="MlpBlock_3")(y, deterministic=deterministic)
        return shard_batch(x + skip()(y, deterministic=deterministic))


class PositionEmbedding(nn.Module):
    """Adds learned position embeddings (Eq. 1)."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Adds the embeddings."""
        embedding: Array = self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        return x + embedding.astype(self.dtype)


class Encoder(nn.Module):
    """Position embeddings, blocks and a final norm (Eq. 1 to 4)."""

    config: BlockConfig
    num_layers: int
    stochastic_depth_rate: float
    remat: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], *, deterministic: bool) -> Float[Array, "b n d"]:
        """Applies the encoder; dropout is off if `deterministic`."""
        x = PositionEmbedding(self.config.dtype, name="posembed_input")(x)
        x = nn.Dropout(self.config.dropout_rate)(x, deterministic=deterministic)
        block = remat_module(EncoderBlock, self.remat, static_argnums=(2,))
        for i in range(self.num_layers):
            depth = i / (self.num_layers - 1) if self.num_layers > 1 else 1.0
            x = block(self.config, self.stochastic_depth_rate * depth, name=f"encoderblock_{i}")(x, deterministic)
        x = self.config.create_norm("encoder_norm")(x)
        return x


class MAPHead(nn.Module):
    """Pools tokens by attention with a learned probe, followed by an MLP (Zhai et al. 2022, section 3.2)."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Pools the tokens."""
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1])).astype(self.config.dtype)
        probe = jnp.tile(probe, (x.shape[0], 1, 1))  # [b 1 d]
        attention = self.config.create_attention("MultiHeadDotProductAttention_0")
        x = attention(probe, x, deterministic=True, sow_weights=True)
        y = self.config.create_norm("LayerNorm_0")(x)
        return (x + MlpBlock(self.config, name="MlpBlock_0")(y, deterministic=True))[:, 0]


class VisionTransformer(HeadMixin, nn.Module):
    """Vision Transformer: maps images to class logits.

    Attributes:
        num_classes: number of logits; None: no head, the outputs are features.
        patch_size: height and width of a patch in pixels, or in positions of the stem's output.
        hidden_size: width of the tokens.
        num_layers: number of encoder blocks.
        num_heads: number of attention heads per block; must divide `hidden_size`.
        mlp_dim: hidden width of each MLP.
        representation_size: width of the tanh layer `pre_logits` before the head; None, as in fine-tuning: no layer.
        dropout_rate: dropout rate after the position embeddings, after attention and in the MLPs.
        attention_dropout_rate: dropout rate of the attention weights.
        dtype: dtype of the computation; parameters are always float32, logits at least float32.
        stochastic_depth_rate: probability of skipping the branches of the last block; increases linearly from 0 at the
            first block. A single block is the last.
        remat: "none", or a key of `REMAT_POLICIES`: which intermediates of a block are kept for the backward pass.
        gelu_approximate: use the tanh approximation of the GELU, as in Google's checkpoints, or the exact GELU.
        head_init: a key of `HEAD_INITS`: initializer of the head's kernel; its bias is zero.
        layer_norm_epsilon: constant added to the variance in LayerNorm; 1e-6 in Google's checkpoints.
        stem_units: units of each block of a hybrid's ResNet, see `hybrid.apply_stem`; None: no ResNet.
        stem_width: channels of the root of the ResNet, a multiple of 32.
        pool: pooling of the tokens, one of `POOLS`; only "cls" has a class token.
        attention: "xla", or "cudnn" on NVIDIA GPUs, see `attention.cudnn_attention`; "auto", of configs, is "xla" here.

    Source:
        Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from vit_jax.models import VisionTransformer
        >>> model = VisionTransformer(num_classes=10, patch_size=8, hidden_size=48, num_layers=1)
        >>> images = jnp.zeros((1, 32, 32, 3))
        >>> params = model.init(jax.random.key(0), images)["params"]
        >>> params["Transformer"]["posembed_input"]["pos_embedding"].shape
        (1, 17, 48)
        >>> model.apply({"params": params}, images, train=False).shape
        (1, 10)
    """

    SIZES: ClassVar[tuple[str, ...]] = ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")
    HAS_ATTENTION: ClassVar[bool] = True

    num_classes: int | None
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    representation_size: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    stochastic_depth_rate: float = 0.0
    remat: str = "none"
    gelu_approximate: bool = True
    head_init: str = "zeros"
    layer_norm_epsilon: float = 1e-6
    stem_units: tuple[int, ...] | None = None
    stem_width: int = 64
    pool: str = "cls"
    attention: str = "xla"

    @nn.compact
    def __call__(self, images: Float[ArrayLike, "b h w 3"], *, train: bool = False) -> Float[Array, "b d"]:
        """Maps images in [-1, 1] to logits [b num_classes], or without a head to features [b d] in `dtype`.

        Logits are float32, or float64 if `dtype` is. In training, dropout needs `rngs={"dropout": key}`.

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        x = jnp.asarray(images)
        batch, height, width, _ = x.shape
        pixels = self.pixels_per_patch
        if height % pixels or width % pixels:
            raise ValueError(f"images are {height} × {width} pixels; expected multiples of the patch size, {pixels}")
        if self.stem_units is not None:
            x = apply_stem(x, units=self.stem_units, width=self.stem_width, remat=self.remat, dtype=self.dtype)
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.hidden_size, patch, patch, padding="VALID", dtype=self.dtype, name="embedding")(x)
        x = x.reshape(batch, -1, self.hidden_size)  # [b n d]
        if self.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size)).astype(self.dtype)
            x = jnp.concatenate([jnp.tile(cls, (batch, 1, 1)), x], axis=1)  # [b 1+n d]

        names = [field.name for field in dataclasses.fields(BlockConfig)]
        config = BlockConfig(**{name: getattr(self, name) for name in names})
        encoder = Encoder(config, self.num_layers, self.stochastic_depth_rate, self.remat, name="Transformer")
        x = encoder(shard_batch(x), deterministic=not train)
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "mean":
            x = jnp.mean(x, axis=1, dtype=float32_or_wider(self.dtype)).astype(self.dtype)
        else:
            x = MAPHead(config, name="MAPHead_0")(x)
        x = shard_batch(x)
        if self.representation_size is not None:
            x = jnp.tanh(nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x))
        return x if self.num_classes is None else self.create_head(self.num_classes, name="head")(x)

    @property
    def pixels_per_patch(self) -> int:
        """Height and width in pixels of the square that becomes one token."""
        return self.patch_size * reduction(self.stem_units)

    @nn.nowrap
    def layer_index(self, path: str) -> int:
        """Returns the layer of a parameter: 0 for embeddings, i + 1 for encoder block i, num_layers + 1 after them."""
        if block := re.search(r"encoderblock_(\d+)/", path):
            return int(block[1]) + 1
        is_embedding = re.search(r"(^|/)(cls|embedding|pos_embedding|conv_root|gn_root|block\d+)(/|$)", path)
        return 0 if is_embedding else self.num_layers + 1

    @nn.nowrap
    def validate(self, image_size: int | None = None) -> None:
        """Raises UsageError if the sizes are incompatible with each other or with the image size in pixels."""
        if self.hidden_size % self.num_heads:
            raise UsageError(f"model.hidden_size is {self.hidden_size}; expected a multiple of {self.num_heads} heads")
        if self.stem_units is not None and self.stem_width % NUM_GROUPS:
            raise UsageError(f"model.stem_width is {self.stem_width}; expected a multiple of {NUM_GROUPS}")
        if image_size is not None and image_size % self.pixels_per_patch:
            raise UsageError(f"image_size is {image_size}; expected a multiple of the patch, {self.pixels_per_patch}")
