"""One update and one evaluation batch: pure functions, jitted over the mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax.data import preprocess
from vit_jax.runtime import rng as sampling
from vit_jax.runtime import sharding
from vit_jax.training import lora, metrics, optim
from vit_jax.types import Params


@flax.struct.dataclass
class TrainState:
    """All that a run is, between two updates.

    Attributes:
        step: int32, finished updates.
        trainable: parameters that are differentiated.
        frozen: parameters that are not; the two together are the model's tree, and low-rank factors where there are.
        opt_state: of `trainable` alone.
        ema: moving average of `trainable`; empty where none is kept.
        key: uint32 [2], the run's random key; never changes, steps and epochs are folded in.
        first_nonfinite_step: int32, the first step whose loss or update was not finite; 0 while there is none.
    """

    step: jax.Array
    trainable: Params
    frozen: Params
    opt_state: Any
    ema: Params
    key: jax.Array
    first_nonfinite_step: jax.Array


@dataclasses.dataclass(frozen=True)
class Forward:
    """How what is stored of a picture becomes logits.

    Attributes:
        augment: (keys [b], stored [b …]) -> inputs [b …] of a training batch.
        prepare: the same of an evaluation batch.
        logits: (params, inputs [b …], dropout keys [b] or None) -> [b classes].
    """

    augment: Callable[[jax.Array, jax.Array], jax.Array]
    prepare: Callable[[jax.Array, jax.Array], jax.Array]
    logits: Callable[[Params, jax.Array, jax.Array | None], jax.Array]


def image_forward(
    model: Any, *, augment: str = "none", test_augment: str = "none", dropout: bool = False, **options: Any
) -> Forward:
    """The whole way: uint8 pictures, made ready on the device, through the whole model.

    Args:
        model: Linen module, called as `model.apply({"params": …}, images, train=…)`.
        augment: of training pictures, see `preprocess.prepare`.
        test_augment: of test pictures, each drawn in the same way at every evaluation.
        dropout: whether the model's dropout is on in training.
        **options: of `preprocess.prepare`: `image_size` in pixels; `mean`, `std`.
    """

    def logits(params: Params, images: jax.Array, keys: jax.Array | None) -> jax.Array:
        if not dropout or keys is None:
            return model.apply({"params": params}, images)

        def apply(image: jax.Array, key: jax.Array) -> jax.Array:
            return model.apply({"params": params}, image[None], train=True, rngs={"dropout": key})[0]

        # One key per image, so that dropout does not depend on how the batch is split.
        axis_names = jax.sharding.get_abstract_mesh().axis_names
        return jax.vmap(apply, spmd_axis_name=axis_names or None)(images, keys)

    return Forward(
        augment=functools.partial(preprocess.prepare, augment=augment, **options),
        prepare=functools.partial(preprocess.prepare, augment=test_augment, **options),
        logits=logits,
    )


def create_train_state(
    params: Params, *, patterns: tuple[str, ...], tx: optax.GradientTransformation, seed: int, ema: bool = False
) -> TrainState:
    """The state before the first update, from a whole parameter tree."""
    trainable, frozen = optim.split_params(params, patterns)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        opt_state=tx.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if ema else {},
        key=jax.random.PRNGKey(seed),
        first_nonfinite_step=jnp.zeros((), jnp.int32),
    )


def evaluated_params(state: TrainState, *, use_ema: bool = True, lora_alpha: float = 1.0) -> Params:
    """Returns the parameters to evaluate: the EMA parameters where there are any, with LoRA weights merged."""
    ema = state.ema if use_ema else {}
    return lora.merge_lora_weights(optim.merge_params(ema or state.trainable, state.frozen), alpha=lora_alpha)


def update_ema(ema: Params, params: Params, *, decay: float, num_updates: jax.Array) -> Params:
    """Moves the EMA parameters towards the parameters, faster at first.

    The decay is min(decay, (1 + t) / (10 + t)) after t earlier updates, so that the initial parameters are forgotten
    within a short run.

    Args:
        ema: same tree as `params`.
        params: after the update.
        decay: upper bound of the decay, in [0, 1).
        num_updates: int32, updates before this one.

    Source:
        TensorFlow's `tf.train.ExponentialMovingAverage(num_updates=…)`.
    """
    warmed_up = jnp.minimum(decay, (1.0 + num_updates) / (10.0 + num_updates))
    return optax.incremental_update(params, ema, 1.0 - warmed_up)


def make_permutation(num_images: int, batch_size: int, *, num_views: int = 1) -> Callable[[TrainState], jax.Array]:
    """Returns `state -> int32 [num_images]`: the order of pictures in the state's epoch.

    It depends on the run's key and the epoch alone, so that a resumed run replays nothing.

    Args:
        num_images: of the training split.
        batch_size: pictures per update; the remainder of an epoch is left out.
        num_views: how often the split is stored, one augmented view after the other; epochs take them in turn.
    """
    steps_per_epoch = num_images // batch_size

    def permutation(state: TrainState) -> jax.Array:
        epoch = state.step // steps_per_epoch
        return sampling.epoch_order(state.key, epoch, num_images) + num_images * (epoch % num_views)

    return permutation


def make_train_step(
    forward: Forward,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    batch_size: int,
    accumulation_steps: int = 1,
    label_smoothing: float = 0.0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    ema_decay: float = 0.0,
    lora_alpha: float = 1.0,
) -> Callable:
    """Returns `(state, images, labels, permutation) -> (state, scalars)`, to be jitted.

    The step picks its own pictures out of the whole training split (stored pictures [n …], int32 [n], on every device),
    at the place in the epoch's permutation that `state.step` says; without a permutation, they are its batch already.
    Scalars: "train/loss" and "train/accuracy" of this batch before the update, "learning_rate" of the update.

    Args:
        forward: from stored pictures to logits.
        tx: transforms the gradients of the trainable parameters.
        schedule: the learning rate, to be reported.
        mesh: the batch is split over all its devices.
        batch_size: pictures per update; divides by `accumulation_steps` · devices.
        accumulation_steps: batches that the gradient is summed over, one after the other.
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016, section 7).
        mixup_alpha: see `preprocess.mix`; 0 for none.
        cutmix_alpha: see `preprocess.mix`; 0 for none.
        ema_decay: see `update_ema`; 0 keeps no EMA parameters.
        lora_alpha: scale of low-rank products.
    """
    mixes = mixup_alpha > 0 or cutmix_alpha > 0

    def loss_fn(
        trainable: Params,
        frozen: Params,
        inputs: jax.Array,
        targets: list[tuple[jax.Array, jax.Array]],
        keys: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        params = lora.merge_lora_weights(optim.merge_params(trainable, frozen), alpha=lora_alpha)
        logits = forward.logits(params, inputs, keys)
        loss = accuracy = jnp.zeros(())
        for labels, weight in targets:
            loss += jnp.sum(weight * metrics.cross_entropy(logits, labels, label_smoothing=label_smoothing))
            accuracy += jnp.sum(weight * (jnp.argmax(logits, axis=-1) == labels))
        return loss / batch_size, accuracy / batch_size

    def train_step(state: TrainState, images: jax.Array, labels: jax.Array, permutation: jax.Array | None):
        keys, dropout_keys = sampling.step_keys(state.key, state.step, batch_size)
        batch: dict[str, Any] = {"keys": keys}
        if permutation is None:
            batch |= {"images": images, "labels": labels}
        else:
            place = state.step % (len(permutation) // batch_size)
            batch["rows"] = jax.lax.dynamic_slice_in_dim(permutation, place * batch_size, batch_size)
        if mixes:  # every picture's partner is its neighbour in the whole batch, however that is split
            batch["partners"] = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), batch)
            batch["mix_keys"] = sampling.mix_keys(state.key, state.step, batch_size)
        batch["dropout_keys"] = dropout_keys

        def pick(batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
            batch_images, batch_labels = (
                (batch["images"], batch["labels"])
                if permutation is None
                else (images[batch["rows"]], labels[batch["rows"]])
            )
            return forward.augment(batch["keys"], batch_images), batch_labels

        def gradient(batch: dict[str, Any]):
            batch = jax.lax.with_sharding_constraint(batch, sharding.batch_sharding(mesh))
            inputs, batch_labels = pick(batch)
            targets = [(batch_labels, jnp.ones(()))]
            if mixes:
                partners, partner_labels = pick(batch["partners"])
                inputs, share = preprocess.mix(
                    batch["mix_keys"], inputs, partners, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha
                )
                targets = [(batch_labels, share), (partner_labels, 1.0 - share)]
            value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return value_and_grad(state.trainable, state.frozen, inputs, targets, batch["dropout_keys"])

        if accumulation_steps == 1:
            (loss, accuracy), grads = gradient(batch)
        else:
            parts = jax.tree.map(lambda leaf: leaf.reshape(accumulation_steps, -1, *leaf.shape[1:]), batch)  # [a b/a …]
            shapes = jax.eval_shape(gradient, jax.tree.map(lambda leaf: leaf[0], parts))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            ((loss, accuracy), grads), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None), zeros, parts
            )

        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        step = state.step + 1
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates))
        healthy = finite | (state.first_nonfinite_step > 0)
        new_state = TrainState(
            step=step,
            trainable=trainable,
            frozen=state.frozen,
            opt_state=opt_state,
            ema=update_ema(state.ema, trainable, decay=ema_decay, num_updates=state.step) if ema_decay else {},
            key=state.key,
            first_nonfinite_step=jnp.where(healthy, state.first_nonfinite_step, step),
        )
        scalars = {"train/loss": loss, "train/accuracy": accuracy, "learning_rate": schedule(state.step)}
        return new_state, scalars

    return train_step


def make_eval_step(forward: Forward, mesh: Mesh, *, batch_size: int, streamed: bool = False) -> Any:
    """Returns jitted `(params, images, labels, totals) -> totals`, one batch further through a split.

    `totals` is what `start_totals` gives, then what the call before gave; rows past the split's end are masked, so that
    every picture counts exactly once whatever the batch size.

    Args:
        forward: from stored pictures to logits.
        mesh: batches are split over all its devices.
        batch_size: pictures at once.
        streamed: whether images and labels are the batch itself, labels past the end being -1, and not the whole split.
    """

    def eval_step(params: Params, images: jax.Array, labels: jax.Array, totals: dict) -> dict:
        rows = totals["next_row"] + jnp.arange(batch_size)
        rows = jax.lax.with_sharding_constraint(rows, sharding.batch_sharding(mesh))
        if streamed:
            mask = labels >= 0
        else:
            mask = rows < len(labels)
            rows = jnp.minimum(rows, len(labels) - 1)
            images, labels = images[rows], labels[rows]
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            logits = forward.logits(params, forward.prepare(sampling.row_keys(rows), images), None)
        sums = metrics.masked_sums(logits, labels, mask)
        return {**{k: totals[k] + sums[k] for k in sums}, "next_row": totals["next_row"] + batch_size}

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def start_totals() -> dict[str, jax.Array]:
    """The totals before the first evaluation batch, on one device."""
    zero = jnp.zeros((), jnp.int32)
    return {"loss": jnp.zeros(()), "correct": zero, "correct_top5": zero, "count": zero, "next_row": zero}
