"""The Vision Transformer (Dosovitskiy et al. 2021, section 3.1).

Axes in comments: b batch, h w height and width, c channels, n tokens, d width. The submodules carry the names of the
released files, so that the flattened parameter tree is a file's key list.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.common import REMAT_POLICIES, create_head, shard_batch
from vit_jax.models.hybrid import apply_stem, stem_reduction
from vit_jax.models.resnet import NUM_GROUPS
from vit_jax.runtime.errors import UsageError

POOLS = ("cls", "mean", "map")
"""How tokens become features: the class token's alone, the mean over all, or what a learned probe attends to."""


def _weigh(subscripts: str, weights: jax.Array, value: jax.Array) -> jax.Array:
    """The attention's second product, in the dtype of the values: float32 weights would double its time and memory."""
    return jnp.einsum(subscripts, weights.astype(value.dtype), value)


def create_attention(num_heads: int, dtype: Any, **options: Any) -> nn.MultiHeadDotProductAttention:
    """Attention whose softmax is at least float32."""
    return nn.MultiHeadDotProductAttention(
        num_heads=num_heads,
        dtype=dtype,
        broadcast_dropout=False,
        kernel_init=nn.initializers.xavier_uniform(),
        force_fp32_for_softmax=jnp.finfo(dtype).bits < 32,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: _weigh,
        **options,
    )


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them (Eq. 3).

    Attributes:
        mlp_dim: width of the hidden layer.
        dropout_rate: after each of the two layers.
        gelu_approximate: whether the GELU is its tanh form.
        dtype: of the computation.
    """

    mlp_dim: int
    dropout_rate: float
    gelu_approximate: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """[b n d] -> [b n d]."""
        hidden_size = x.shape[-1]
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        x = dense(self.mlp_dim, name="Dense_0")(x)
        gelu = functools.partial(nn.gelu, approximate=self.gelu_approximate)
        x = jax.checkpoint(gelu)(x)  # keeps its input, not its formula's terms
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = dense(hidden_size, name="Dense_1")(x)
        return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP, each with a residual connection (Eq. 2 and 3).

    Attributes:
        num_heads: of the attention; divides the width.
        mlp_dim: width of the MLP's hidden layer.
        dropout_rate: after the attention's output and in the MLP.
        attention_dropout_rate: on the attention weights.
        stochastic_depth_rate: how often either branch is left out, picture by picture (Huang et al. 2016).
        gelu_approximate: whether the GELU is its tanh form.
        layer_norm_epsilon: below the root of the norms.
        dtype: of the computation; the softmax and the norms' sums are at least float32.
    """

    num_heads: int
    mlp_dim: int
    dropout_rate: float
    attention_dropout_rate: float
    stochastic_depth_rate: float
    gelu_approximate: bool
    layer_norm_epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """[b n d] -> [b n d]."""
        skip = functools.partial(nn.Dropout, self.stochastic_depth_rate, broadcast_dims=(1, 2))
        y = nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="LayerNorm_0")(x)
        attention = create_attention(
            self.num_heads,
            self.dtype,
            dropout_rate=self.attention_dropout_rate,
            name="MultiHeadDotProductAttention_1",
        )
        # Nothing is sown unless "intermediates" is mutable.
        y = attention(y, y, deterministic=deterministic, sow_weights=True)
        y = nn.Dropout(self.dropout_rate)(y, deterministic=deterministic)
        x = shard_batch(x + skip()(y, deterministic=deterministic))

        y = nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="LayerNorm_2")(x)
        mlp = MlpBlock(self.mlp_dim, self.dropout_rate, self.gelu_approximate, self.dtype, name="MlpBlock_3")
        y = mlp(y, deterministic=deterministic)
        return shard_batch(x + skip()(y, deterministic=deterministic))


class PositionEmbedding(nn.Module):
    """Adds one learned vector to every token (Eq. 1)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b n d] -> [b n d]."""
        embedding = self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        return x + embedding.astype(self.dtype)


class Encoder(nn.Module):
    """Position embeddings, the blocks, and a last norm (Eq. 1 to 4)."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float
    attention_dropout_rate: float
    stochastic_depth_rate: float
    gelu_approximate: bool
    layer_norm_epsilon: float
    remat: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """[b n d] -> [b n d]."""
        x = PositionEmbedding(self.dtype, name="posembed_input")(x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        block = EncoderBlock
        if self.remat != "none":
            block = nn.remat(EncoderBlock, policy=REMAT_POLICIES[self.remat], static_argnums=(2,))
        for i in range(self.num_layers):
            x = block(
                self.num_heads,
                self.mlp_dim,
                self.dropout_rate,
                self.attention_dropout_rate,
                self.stochastic_depth_rate * (i / (self.num_layers - 1) if self.num_layers > 1 else 1.0),
                self.gelu_approximate,
                self.layer_norm_epsilon,
                self.dtype,
                name=f"encoderblock_{i}",
            )(x, deterministic)
        return nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="encoder_norm")(x)


class MAPHead(nn.Module):
    """Pools tokens by the attention of a learned probe, and an MLP (Zhai et al. 2022, section 3.2)."""

    num_heads: int
    mlp_dim: int
    gelu_approximate: bool
    layer_norm_epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b n d] -> [b d]."""
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1])).astype(self.dtype)
        probe = jnp.tile(probe, (x.shape[0], 1, 1))  # [b 1 d]
        attention = create_attention(self.num_heads, self.dtype, name="MultiHeadDotProductAttention_0")
        x = attention(probe, x, deterministic=True, sow_weights=True)
        y = nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="LayerNorm_0")(x)
        y = MlpBlock(self.mlp_dim, 0.0, self.gelu_approximate, self.dtype, name="MlpBlock_0")(y, deterministic=True)
        return (x + y)[:, 0]


class VisionTransformer(nn.Module):
    """Pictures to class logits.

    Attributes:
        num_classes: width of the head; None has no head and gives the features before it.
        patch_size: pixels, or places of what the stem gives; times its reduction, it divides the pictures' height and
            width.
        hidden_size: width of the tokens.
        num_layers: encoder blocks.
        num_heads: of each attention; divides `hidden_size`.
        mlp_dim: hidden width of each MLP.
        representation_size: width of the tanh layer `pre_logits` before the head; None, as in fine-tuning, has none.
        dropout_rate: after the position embeddings, the attention output and in the MLP.
        attention_dropout_rate: on the attention weights.
        dtype: of the computation; parameters are float32 always, logits at least float32.
        stochastic_depth_rate: of the last block; it grows linearly from 0 at the first. A single block is the last one.
        remat: "none", or a key of `REMAT_POLICIES`: what a block does not keep for its backward pass is computed again.
        gelu_approximate: whether the GELU is its tanh form, as in the released files, or the exact one.
        head_init: a key of `HEAD_INITS`: how the head's kernel starts; its bias is zero.
        layer_norm_epsilon: below the root of the norms; 1e-6 in the released files.
        stem_units: of a hybrid's ResNet, see `hybrid.apply_stem`; None has none, patches are of pixels.
        stem_width: channels of that ResNet's root, a multiple of 32.
        pool: one of `POOLS`; only with "cls" is there a class token.

    Source:
        Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1.
    """

    SIZES: ClassVar[tuple[str, ...]] = ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")

    num_classes: int | None
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    representation_size: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    stochastic_depth_rate: float = 0.0
    remat: str = "none"
    gelu_approximate: bool = True
    head_init: str = "zeros"
    layer_norm_epsilon: float = 1e-6
    stem_units: tuple[int, ...] | None = None
    stem_width: int = 64
    pool: str = "cls"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes logits.

        Args:
            images: [b h w 3], in [-1, 1].
            train: whether dropout is on; it then needs `rngs={"dropout": key}`.

        Returns:
            [b num_classes], float32 (float64 where `dtype` is); features [b d] in `dtype` where there is no head.

        Raises:
            ValueError: height or width is not a multiple of a patch's side.
        """
        batch, height, width, _ = images.shape
        pixels = self.pixels_per_patch
        if height % pixels or width % pixels:
            raise ValueError(f"pictures of {height} × {width} pixels do not divide into patches of {pixels} × {pixels}")

        x = images
        if self.stem_units is not None:
            x = apply_stem(x, units=self.stem_units, width=self.stem_width, remat=self.remat, dtype=self.dtype)
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.hidden_size, patch, patch, padding="VALID", dtype=self.dtype, name="embedding")(x)
        x = x.reshape(batch, -1, self.hidden_size)  # [b n d]
        if self.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size)).astype(self.dtype)
            x = jnp.concatenate([jnp.tile(cls, (batch, 1, 1)), x], axis=1)  # [b 1+n d]
        x = shard_batch(x)

        x = Encoder(
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.dropout_rate,
            self.attention_dropout_rate,
            self.stochastic_depth_rate,
            self.gelu_approximate,
            self.layer_norm_epsilon,
            self.remat,
            self.dtype,
            name="Transformer",
        )(x, deterministic=not train)
        x = shard_batch(self._pool(x))

        if self.representation_size is not None:
            x = jnp.tanh(nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x))
        return x if self.num_classes is None else self.create_head(self.num_classes, name="head")(x)

    def _pool(self, x: jax.Array) -> jax.Array:
        """[b n d] -> [b d]."""
        if self.pool == "cls":
            return x[:, 0]
        if self.pool == "mean":
            return jnp.mean(x, axis=1, dtype=jnp.promote_types(self.dtype, jnp.float32)).astype(self.dtype)
        head = MAPHead(
            self.num_heads,
            self.mlp_dim,
            self.gelu_approximate,
            self.layer_norm_epsilon,
            self.dtype,
            name="MAPHead_0",
        )
        return head(x)

    @property
    def pixels_per_patch(self) -> int:
        """Side of the square of pixels that becomes one token."""
        return self.patch_size * stem_reduction(self.stem_units)

    @nn.nowrap
    def create_head(self, num_classes: int, name: str | None = None) -> nn.Dense:
        """The layer [b d] -> [b num_classes], to be used apart from the model where its features are at hand."""
        return create_head(num_classes, dtype=self.dtype, head_init=self.head_init, name=name)

    @nn.nowrap
    def validate(self, image_size: int | None = None) -> None:
        """Checks that the sizes fit each other and, if given, the image size in pixels.

        Raises:
            UsageError: they do not.
        """
        if self.hidden_size % self.num_heads:
            raise UsageError(f"model.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.stem_units is not None and self.stem_width % NUM_GROUPS:
            raise UsageError(f"model.stem_width {self.stem_width} is not a multiple of {NUM_GROUPS}")
        if image_size is not None and image_size % self.pixels_per_patch:
            raise UsageError(f"image_size {image_size} is not a multiple of the patch, {self.pixels_per_patch} pixels")
