"""One update and one evaluation batch: pure functions, jitted over the mesh."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax import metrics, optim, preprocess, sharding
from vit_jax.types import Params


@flax.struct.dataclass
class TrainState:
    """All that a run is, between two updates.

    Attributes:
        step: int32, finished updates.
        trainable: parameters that are differentiated.
        frozen: parameters that are not; the two together are the model's tree.
        opt_state: of `trainable` alone.
        key: uint32 [2], the run's random key; never changes, steps and epochs are folded in.
        first_nonfinite_step: int32, the first step whose loss or update was not finite; 0 while there is none.
    """

    step: jax.Array
    trainable: Params
    frozen: Params
    opt_state: Any
    key: jax.Array
    first_nonfinite_step: jax.Array


def create_train_state(
    params: Params, *, patterns: tuple[str, ...], tx: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first update, from a whole parameter tree."""
    trainable, frozen = optim.split_params(params, patterns)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        opt_state=tx.init(trainable),
        key=jax.random.PRNGKey(seed),
        first_nonfinite_step=jnp.zeros((), jnp.int32),
    )


def make_permutation(num_images: int, batch_size: int, mesh: Mesh) -> Callable[[TrainState], jax.Array]:
    """Returns jitted `state -> int32 [num_images]`: the order of pictures in the state's epoch.

    It depends on the run's key and the epoch alone, so that a resumed run replays nothing.
    """
    steps_per_epoch = num_images // batch_size

    def permutation(state: TrainState) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step // steps_per_epoch)
        return jax.random.permutation(key, num_images).astype(jnp.int32)

    return jax.jit(permutation, out_shardings=sharding.replicated(mesh))


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    batch_size: int,
    accumulation_steps: int,
    image_size: int,
    augment: str,
) -> Callable:
    """Returns jitted `(state, images, labels, permutation) -> (state, scalars)`; the old state is donated.

    The step picks its own pictures out of the whole training split (uint8 [n h w 3], int32 [n], on every device), at
    the place in the epoch's permutation that `state.step` says. Scalars: "train/loss" and "train/accuracy" of this
    batch before the update, "learning_rate" of the update.

    Args:
        model: Linen module, called as `model.apply({"params": …}, images, train=True)`.
        tx: transforms the gradients of the trainable parameters.
        schedule: the learning rate, to be reported.
        mesh: the batch is split over its `data` axis.
        batch_size: pictures per update; divides by `accumulation_steps` · devices.
        accumulation_steps: batches that the gradient is summed over, one after the other.
        image_size: pixels.
        augment: see `preprocess.for_training`.
    """
    batch_sharding = sharding.over_batch(mesh)

    def loss_fn(trainable: Params, frozen: Params, pictures: jax.Array, labels: jax.Array, key: jax.Array):
        params = optim.merge_params(trainable, frozen)
        logits = model.apply({"params": params}, pictures, train=True, rngs={"dropout": key})
        correct = jnp.argmax(logits, axis=-1) == labels
        return metrics.cross_entropy(logits, labels).sum() / batch_size, correct.sum() / batch_size

    def train_step(state: TrainState, images: jax.Array, labels: jax.Array, permutation: jax.Array):
        place = state.step % (len(permutation) // batch_size)
        rows = jax.lax.dynamic_slice_in_dim(permutation, place * batch_size, batch_size)
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step))
        keys = jax.random.split(augment_key, batch_size)

        def gradient(rows: jax.Array, keys: jax.Array, dropout_key: jax.Array):
            rows = jax.lax.with_sharding_constraint(rows, batch_sharding)
            keys = jax.lax.with_sharding_constraint(keys, batch_sharding)
            pictures = preprocess.for_training(keys, images[rows], image_size=image_size, augment=augment)
            value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
            return value_and_grad(state.trainable, state.frozen, pictures, labels[rows], dropout_key)

        if accumulation_steps == 1:
            (loss, accuracy), grads = gradient(rows, keys, dropout_key)
        else:
            parts = jax.tree.map(
                lambda leaf: leaf.reshape(accumulation_steps, -1, *leaf.shape[1:]), (rows, keys)
            )  # [a b/a …]
            parts = (*parts, jax.random.split(dropout_key, accumulation_steps))
            shapes = jax.eval_shape(gradient, *jax.tree.map(lambda leaf: leaf[0], parts))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            ((loss, accuracy), grads), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, gradient(*part)), None), zeros, parts
            )

        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        step = state.step + 1
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates))
        healthy = finite | (state.first_nonfinite_step > 0)
        new_state = TrainState(
            step=step,
            trainable=optax.apply_updates(state.trainable, updates),
            frozen=state.frozen,
            opt_state=opt_state,
            key=state.key,
            first_nonfinite_step=jnp.where(healthy, state.first_nonfinite_step, step),
        )
        scalars = {"train/loss": loss, "train/accuracy": accuracy, "learning_rate": schedule(state.step)}
        return new_state, scalars

    return jax.jit(train_step, donate_argnums=0, out_shardings=sharding.replicated(mesh))


def make_eval_step(model: Any, mesh: Mesh, *, batch_size: int, image_size: int) -> Callable:
    """Returns jitted `(params, images, labels, totals) -> totals`, one batch further through a split.

    `totals` is what `start_totals` gives, then what the call before gave; rows past the split's end are masked, so that
    every picture counts exactly once whatever the batch size.
    """

    def eval_step(params: Params, images: jax.Array, labels: jax.Array, totals: dict) -> dict:
        rows = totals["next_row"] + jnp.arange(batch_size)
        rows = jax.lax.with_sharding_constraint(rows, sharding.over_batch(mesh))
        mask = rows < len(labels)
        rows = jnp.minimum(rows, len(labels) - 1)
        logits = model.apply({"params": params}, preprocess.for_evaluation(images[rows], image_size=image_size))
        sums = metrics.masked_sums(logits, labels[rows], mask)
        return {**{k: totals[k] + sums[k] for k in sums}, "next_row": totals["next_row"] + batch_size}

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def start_totals(mesh: Mesh) -> dict[str, jax.Array]:
    """The totals before the first evaluation batch."""
    zero = jnp.zeros((), jnp.int32)
    totals = {"loss": jnp.zeros(()), "correct": zero, "correct_top5": zero, "count": zero, "next_row": zero}
    return sharding.place(totals, sharding.replicated(mesh))
