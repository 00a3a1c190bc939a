"""Reference for training in float64: gradients of the reference model, with an explicit optimizer and schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax.traverse_util import unflatten_dict

LEARNING_RATE, WARMUP_STEPS, NUM_STEPS = 0.1, 2, 5
MOMENTUM, WEIGHT_DECAY, CLIP_NORM = 0.9, 0.01, 0.5


def train(params, images, labels, *, trainable=""):
    """Returns the parameters, and the momentum under "trace/…", after `NUM_STEPS` updates on one batch.

    Args:
        params: key -> array.
        images: in [-1, 1].
        labels: integers.
        trainable: key prefix of the trainable parameters.
    """
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "np", jnp)  # the same formulas, differentiable
        images = jnp.asarray(images, jnp.float64)
        flat = {key: jnp.asarray(value, jnp.float64) for key, value in params.items()}
        updated = {key: value for key, value in flat.items() if key.startswith(trainable)}
        trace = {key: jnp.zeros_like(value) for key, value in updated.items()}

        @jax.jit
        @jax.grad
        def gradient(updated):
            logits = reference.forward(unflatten_dict({**flat, **updated}, sep="/"), images)
            log_probabilities = logits - jnp.log(jnp.exp(logits).sum(axis=1, keepdims=True))
            return -log_probabilities[jnp.arange(len(labels)), labels].mean()

        for i in range(NUM_STEPS):
            grads = gradient(updated)
            norm = np.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
            progress = max(0.0, (i - WARMUP_STEPS) / (NUM_STEPS - WARMUP_STEPS))
            rate = LEARNING_RATE * min(1.0, i / WARMUP_STEPS) * 0.5 * (1 + np.cos(np.pi * progress))
            for key, grad in grads.items():
                grad = grad * min(1.0, CLIP_NORM / norm) + WEIGHT_DECAY * updated[key]
                trace[key] = grad + MOMENTUM * trace[key]
                updated[key] = updated[key] - rate * trace[key]
        out = {**flat, **updated, **{f"trace/{key}": value for key, value in trace.items()}}
        assert {value.dtype for value in out.values()} == {np.dtype("float64")}
        return {key: np.asarray(value) for key, value in out.items()}
