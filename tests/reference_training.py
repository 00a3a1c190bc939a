"""Five updates in float64: the reference's forward pass under autodiff, every other formula written out.

    python tests/reference_training.py IN.npz OUT.npz          needs JAX_ENABLE_X64=1, hence a process of its own

IN holds the parameters under "params/…", "images" in [-1, 1], "labels", and "trainable", the prefix of what trains.
OUT holds the parameters, and the momentum under "trace/…", after the updates.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax.traverse_util import unflatten_dict

LEARNING_RATE, WARMUP_STEPS, NUM_STEPS = 0.1, 2, 5
MOMENTUM, WEIGHT_DECAY, CLIP_NORM = 0.9, 0.01, 0.5


def main(source, target):
    assert jax.config.jax_enable_x64
    reference.np = jnp  # the same formulas, differentiable
    with np.load(source) as file:
        images, labels, prefix = jnp.asarray(file["images"], jnp.float64), file["labels"], str(file["trainable"])
        flat = {key.removeprefix("params/"): jnp.asarray(file[key], jnp.float64) for key in file if "params/" in key}
    trainable = {key: value for key, value in flat.items() if key.startswith(prefix)}
    trace = {key: jnp.zeros_like(value) for key, value in trainable.items()}

    def loss_fn(trainable):
        logits = reference.forward(unflatten_dict({**flat, **trainable}, sep="/"), images)
        log_probabilities = logits - jnp.log(jnp.exp(logits).sum(axis=1, keepdims=True))
        return -log_probabilities[jnp.arange(len(labels)), labels].mean()

    for i in range(NUM_STEPS):
        grads = jax.grad(loss_fn)(trainable)
        norm = jnp.sqrt(sum((grad**2).sum() for grad in grads.values()))
        progress = max(0.0, (i - WARMUP_STEPS) / (NUM_STEPS - WARMUP_STEPS))
        rate = LEARNING_RATE * min(1.0, i / WARMUP_STEPS) * 0.5 * (1 + np.cos(np.pi * progress))
        for key, grad in grads.items():
            grad = grad * jnp.minimum(1.0, CLIP_NORM / norm) + WEIGHT_DECAY * trainable[key]
            trace[key] = grad + MOMENTUM * trace[key]
            trainable[key] = trainable[key] - rate * trace[key]
    out = {**flat, **trainable, **{f"trace/{key}": value for key, value in trace.items()}}
    np.savez(target, **{key: np.asarray(value) for key, value in out.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
