"""Analyzes attention, position embeddings, filters and errors of a model: arrays to arrays.

Axes: l layers, b images, k heads, n tokens or patches, g rows and columns of patches, p pixels, d width, c classes.
"""

import functools
import math
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vit_jax.types import Params

if TYPE_CHECKING:
    from vit_jax.models import VisionTransformer


def attention_weights(
    model: "VisionTransformer", params: Params, images: Float[np.ndarray | Array, "b h w 3"]
) -> Float[np.ndarray, "l b k n n"]:
    """Returns the attention weights of all layers and heads for preprocessed images, float32.

    Each row, the attention of one token to all tokens, sums to 1. Token 0 is the class token, if any.
    """
    blocks = _intermediates(model, params, images)["Transformer"]
    layers = [
        blocks[f"encoderblock_{i}"]["MultiHeadDotProductAttention_1"]["attention_weights"][0]
        for i in range(model.num_layers)
    ]
    return np.stack([np.asarray(layer, np.float32) for layer in layers])


def pooling_weights(
    model: "VisionTransformer", params: Params, images: Float[np.ndarray | Array, "b h w 3"]
) -> Float[np.ndarray, "b n"] | None:
    """Returns the weight of each patch in the input of the head, float32; None for a model with a class token.

    Mean pooling has equal weights; attention pooling those of the probe, averaged over heads.
    """
    if model.pool == "cls":
        return None
    if model.pool == "mean":
        num_patches = (images.shape[1] // model.pixels_per_patch) * (images.shape[2] // model.pixels_per_patch)
        return np.full((len(images), num_patches), 1 / num_patches, np.float32)
    probe = _intermediates(model, params, images)["MAPHead_0"]["MultiHeadDotProductAttention_0"]
    return np.asarray(probe["attention_weights"][0].mean(axis=1)[:, 0], np.float32)  # [b k 1 n] -> [b n]


def _intermediates(model: "VisionTransformer", params: Params, images: np.ndarray | Array) -> Params:
    """Returns the attention weights that the modules of a model sow."""
    forward = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    intermediates: Params = forward({"params": params}, images)[1]["intermediates"]
    return intermediates


def attention_maps(
    weights: Float[np.ndarray, "l b k n n"], *, class_token: bool = True
) -> Float[np.ndarray, "l b k g g"]:
    """Returns each head's attention to the patches: the class token's, or the mean over all patches without one."""
    return to_grid(weights[..., 0, 1:] if class_token else weights.mean(axis=-2))


def attention_rollout(
    weights: Float[np.ndarray, "l b k n n"], pooling: Float[np.ndarray, "b n"] | None = None
) -> Float[np.ndarray, "b g g"]:
    """Returns the attention to each patch accumulated over all layers, float32.

    Each layer contributes 0.5 · A + 0.5 · I, where A is the mean over heads and I the skip connection, with rows
    normalized to 1. The result is the class token's row of the product of these matrices, without its own weight (so it
    sums to less than 1), or the mean of all rows, weighted by `pooling`.

    Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    layers = 0.5 * weights.mean(axis=2) + 0.5 * np.eye(weights.shape[-1])  # [l b n n]
    layers = layers / layers.sum(axis=-1, keepdims=True)
    rollout = functools.reduce(lambda below, layer: layer @ below, layers)
    patches = rollout[:, 0, 1:] if pooling is None else np.einsum("bn,bnm->bm", pooling, rollout)
    return to_grid(patches).astype(np.float32)


def to_grid(patches: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch g g"]:
    """Reshapes patches of a square image, [… g·g], to [… g g]."""
    side = math.isqrt(patches.shape[-1])
    return patches.reshape(*patches.shape[:-1], side, side)


def position_similarity(
    embeddings: Float[np.ndarray, "1 n d"], *, class_token: bool = True
) -> Float[np.ndarray, "patches patches"]:
    """Returns the cosine similarity between the position embeddings of all patches, excluding a class token.

    Source: Dosovitskiy et al. 2021, figure 7 (centre).
    """
    vectors = np.array(embeddings[0, int(class_token) :], np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return (vectors @ vectors.T).astype(np.float32)


def filter_components(
    kernel: Float[np.ndarray, "p p 3 d"], *, count: int = 28
) -> tuple[Float[np.ndarray, "components p p 3"], Float[np.ndarray, " components"]]:
    """Returns the first principal components of d filters, and the fraction of the variance that each explains.

    Components have unit norm and a positive largest entry. Source: Dosovitskiy et al. 2021, figure 7 (left).
    """
    filters = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T  # [d p·p·3]
    _, scales, components = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
    explained = scales**2 / max(np.sum(scales**2), 1e-300)
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    components = (components * np.where(largest < 0, -1, 1))[:count]
    return components.reshape(-1, *kernel.shape[:3]).astype(np.float32), explained[:count].astype(np.float32)


def confusion_matrix(
    labels: Int[np.ndarray, " b"], predictions: Int[np.ndarray, " b"], *, num_classes: int
) -> Int[np.ndarray, "c c"]:
    """Returns numbers of images, int64; rows are true classes, columns predicted classes.

    Examples:
        >>> import numpy as np
        >>> from vit_jax.visualization import analysis
        >>> analysis.confusion_matrix(np.array([0, 1, 1]), np.array([0, 1, 0]), num_classes=2)
        array([[1, 0],
               [1, 1]])
    """
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_frequent_confusions(counts: Int[np.ndarray, "c c"], *, count: int = 10) -> list[tuple[int, int, int]]:
    """Returns the most frequent errors as (true class, predicted class, number of images), the most frequent first."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [(int(i), int(j), int(wrong[i, j])) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return [pair for pair in pairs if pair[2] > 0]


def most_confident_errors(
    probabilities: Float[np.ndarray, "b c"], labels: Int[np.ndarray, " b"], *, count: int = 20
) -> Int[np.ndarray, " errors"]:
    """Returns indices of misclassified images, those with the highest predicted probability first."""
    wrong = np.flatnonzero(probabilities.argmax(axis=-1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=-1), kind="stable")][:count]
