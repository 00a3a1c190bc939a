"""Loss and accuracy as sums over images, so that batches of any size add up exactly."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

Sums = dict[str, jax.Array]  # "loss", "correct", "correct_top5", "count"


def cross_entropy(
    logits: Float[Array, "b classes"], labels: Int[Array, " b"], *, label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Returns the softmax cross-entropy in nats; for label smoothing see Szegedy et al. 2016, section 7."""
    loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        spread = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * spread
    return loss


def masked_sums(logits: Float[Array, "b classes"], labels: Int[Array, " b"], mask: Bool[Array, " b"]) -> Sums:
    """Returns sums over the images where the mask is True; padding is False.

    They are float32 "loss" (nats) and int32 "correct", "correct_top5" (of all classes if there are fewer), "count".
    Equal logits are ordered by class index, as by argmax.
    """
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]  # [b 5]
    hits = (best == labels[:, None]) & mask[:, None]
    return {
        "loss": jnp.sum(jnp.where(mask, cross_entropy(logits, labels), 0.0)),
        "correct": jnp.sum(hits[:, 0], dtype=jnp.int32),
        "correct_top5": jnp.sum(hits, dtype=jnp.int32),
        "count": jnp.sum(mask, dtype=jnp.int32),
    }


def means(sums: Mapping[str, float], *, prefix: str = "test") -> dict[str, float]:
    """Returns "test/loss", "test/accuracy" and "test/accuracy_top5" from sums on the host; `prefix` replaces "test"."""
    count = int(sums["count"])
    return {
        f"{prefix}/loss": float(sums["loss"]) / count,
        f"{prefix}/accuracy": int(sums["correct"]) / count,
        f"{prefix}/accuracy_top5": int(sums["correct_top5"]) / count,
    }
