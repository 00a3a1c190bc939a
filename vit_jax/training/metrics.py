"""Loss and accuracy as sums over pictures, so that batches of any size add up exactly."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy, nats: [b classes], int [b] -> [b]; smoothing spreads a share of the target evenly."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        spread = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * spread
    return loss


def masked_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the pictures that count.

    Args:
        logits: [b classes].
        labels: int [b].
        mask: bool [b]; False for padding.

    Returns:
        float32 "loss" (nats) and int32 "correct", "correct_top5" (the best five, or all where there are fewer),
        "count". Equal logits rank by class index, as argmax does.
    """
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]  # [b 5]
    hits = (best == labels[:, None]) & mask[:, None]
    return {
        "loss": jnp.sum(jnp.where(mask, cross_entropy(logits, labels), 0.0)),
        "correct": jnp.sum(hits[:, 0], dtype=jnp.int32),
        "correct_top5": jnp.sum(hits, dtype=jnp.int32),
        "count": jnp.sum(mask, dtype=jnp.int32),
    }


def means(sums: dict, *, prefix: str = "test") -> dict[str, float]:
    """Host sums of `masked_sums` -> "test/loss", "test/accuracy", "test/accuracy_top5", or with another prefix."""
    count = int(sums["count"])
    return {
        f"{prefix}/loss": float(sums["loss"]) / count,
        f"{prefix}/accuracy": int(sums["correct"]) / count,
        f"{prefix}/accuracy_top5": int(sums["correct_top5"]) / count,
    }
