"""What a model has learned and where it errs: arrays to arrays.

Axes in comments: l layers, b pictures, k heads, n tokens, g rows and columns of patches, c channels or classes.
"""

import math
from typing import Any

import jax
import numpy as np

from vit_jax.types import Params


def attention_weights(model: Any, params: Params, images: jax.Array) -> np.ndarray:
    """The weights that every head of every layer gives to every token.

    Args:
        model: `VisionTransformer`.
        params: of the model.
        images: [b h w 3], made ready as for the model.

    Returns:
        float32 [l b k n n]; each row, one token's weights on all, sums to 1. Token 0 is the class token, if any.
    """

    def weights(params: Params, images: jax.Array) -> list[jax.Array]:
        _, state = model.apply({"params": params}, images, mutable=["intermediates"])
        blocks = state["intermediates"]["Transformer"]
        names = [f"encoderblock_{i}" for i in range(model.num_layers)]
        return [blocks[name]["MultiHeadDotProductAttention_1"]["attention_weights"][0] for name in names]

    return np.stack([np.asarray(layer, np.float32) for layer in jax.jit(weights)(params, images)])


def pooling_weights(model: Any, params: Params, images: jax.Array) -> np.ndarray | None:
    """The share of each patch in what a model without a class token hands to its head; arguments as above.

    Returns:
        float32 [b n]: the mean's, or the mean over heads of what the learned probe attends to. None with a class token.
    """
    if model.pool == "cls":
        return None
    if model.pool == "mean":
        num_patches = (images.shape[1] // model.pixels_per_patch) * (images.shape[2] // model.pixels_per_patch)
        return np.full((len(images), num_patches), 1 / num_patches, np.float32)

    def weights(params: Params, images: jax.Array) -> jax.Array:
        _, state = model.apply({"params": params}, images, mutable=["intermediates"])
        head = state["intermediates"]["MAPHead_0"]["MultiHeadDotProductAttention_0"]
        return head["attention_weights"][0].mean(axis=1)[:, 0]  # [b k 1 n] -> [b n]

    return np.asarray(jax.jit(weights)(params, images), np.float32)


def attention_maps(weights: np.ndarray, *, class_token: bool = True) -> np.ndarray:
    """Each head's attention as a map of patches: the class token's, or the mean over all patches where there is none.

    Args:
        weights: [l b k n n], of `attention_weights`.
        class_token: whether token 0 is one.

    Returns:
        float32 [l b k g g].

    Raises:
        ValueError: the patches are no square.
    """
    return to_grid(weights[..., 0, 1:] if class_token else weights.mean(axis=-2))


def attention_rollout(weights: np.ndarray, pooling: np.ndarray | None = None) -> np.ndarray:
    """How much of each patch reaches the class token through all layers, or the head where there is no such token.

    A layer passes on half of what a token is and half of what it attends to: 0.5 · A + 0.5 · I, with A the mean over
    heads, rows made to sum to 1; the product of the layers' matrices has the class token's row.

    Args:
        weights: [l b k n n], of `attention_weights`.
        pooling: [b n], of `pooling_weights`; None takes token 0 as the class token.

    Returns:
        float32 [b g g]; what is missing to a sum of 1 is the class token's own share.

    Raises:
        ValueError: the patches are no square.

    Source:
        Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    layers = 0.5 * weights.mean(axis=2) + 0.5 * np.eye(weights.shape[-1])  # [l b n n]
    layers = layers / layers.sum(axis=-1, keepdims=True)
    rollout = layers[0]
    for layer in layers[1:]:
        rollout = layer @ rollout
    reaching = rollout[:, 0, 1:] if pooling is None else np.einsum("bn,bnm->bm", pooling, rollout)
    return to_grid(reaching).astype(np.float32)


def to_grid(patches: np.ndarray) -> np.ndarray:
    """[… g·g] -> [… g g]; raises ValueError where the patches are no square."""
    side = math.isqrt(patches.shape[-1])
    if side * side != patches.shape[-1]:
        raise ValueError(f"{patches.shape[-1]} patches are no square grid")
    return patches.reshape(*patches.shape[:-1], side, side)


def position_similarity(embeddings: np.ndarray, *, class_token: bool = True) -> np.ndarray:
    """Cosine similarity of the position embeddings of all patches.

    Args:
        embeddings: [1 1+n d], the class token's first; [1 n d] where there is none.
        class_token: whether there is one.

    Returns:
        float32 [n n], from -1 to 1.

    Source:
        Dosovitskiy et al. 2021, figure 7 (centre).
    """
    vectors = np.array(embeddings[0, int(class_token) :], np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return (vectors @ vectors.T).astype(np.float32)


def filter_components(kernel: np.ndarray, *, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the filters that look at the pixels: the patch embedding's, or a hybrid's root's.

    Args:
        kernel: [p p 3 d], the d filters.
        count: of components; fewer where the filters have fewer dimensions.

    Returns:
        (components [count p p 3] of length 1, the largest entry positive; share of the variance [count], falling).

    Source:
        Dosovitskiy et al. 2021, figure 7 (left).
    """
    filters = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T  # [d p·p·3]
    _, scales, components = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
    shares = scales**2 / max(np.sum(scales**2), 1e-300)
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    components = (components * np.where(largest < 0, -1, 1))[:count]
    return components.reshape(-1, *kernel.shape[:3]).astype(np.float32), shares[:count].astype(np.float32)


def confusion(labels: np.ndarray, predictions: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Counts of pictures: int64 [c c], row: what it is, column: what the model says."""
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_confused(counts: np.ndarray, *, count: int = 10) -> list[tuple[int, int, int]]:
    """The commonest mistakes, the most frequent first: (class, what the model says, number of pictures)."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [(int(i), int(j), int(wrong[i, j])) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return [pair for pair in pairs if pair[2] > 0]


def most_confident_errors(probabilities: np.ndarray, labels: np.ndarray, *, count: int = 20) -> np.ndarray:
    """Indices of the wrong pictures that the model was surest of, the surest first: int64 [at most count]."""
    wrong = np.flatnonzero(probabilities.argmax(axis=-1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=-1), kind="stable")][:count]
