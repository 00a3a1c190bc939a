"""The training state and one update: pure functions of arrays, jitted over the mesh by the experiment."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax.data import preprocess
from vit_jax.data.batches import Batch
from vit_jax.runtime import rng, sharding
from vit_jax.training import lora, metrics, optim
from vit_jax.training.inference import Forward
from vit_jax.types import Params

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Training state."""

    step: jax.Array  # int32, finished updates
    trainable: Params  # including LoRA weights
    frozen: Params
    opt_state: optax.OptState  # of `trainable` only
    ema: Params  # EMA of `trainable`, or empty
    key: jax.Array  # uint32 [2], constant; steps and epochs are folded in
    first_nonfinite_step: jax.Array  # int32, first step whose loss or update was not finite; 0 if none


class KeyedBatch(NamedTuple):
    """A batch or microbatch with the random keys of its examples; every leaf is [b …]."""

    inputs: jax.Array
    labels: jax.Array
    augment_keys: jax.Array
    dropout_keys: jax.Array | None = None
    mix_keys: jax.Array | None = None
    partners: "KeyedBatch | None" = None


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One update, `(state, batch) -> (state, metrics)`.

    Metrics are "train/loss" and "train/accuracy" of the batch before the update, and "learning_rate" of the update.
    """

    forward: Forward
    tx: optax.GradientTransformation
    schedule: optax.Schedule | None  # for logging the learning rate
    mesh: Mesh
    batch_size: int  # examples per update; divisible by accumulation_steps · devices
    accumulation_steps: int = 1
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    ema_decay: float = 0.0
    lora_alpha: float = 1.0

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Computes the gradients and applies one update."""
        examples = self.with_keys(batch, state)
        if self.accumulation_steps == 1:
            (loss, accuracy), grads = self.gradients(state, examples)
        else:
            parts = jax.tree.map(lambda x: x.reshape(self.accumulation_steps, -1, *x.shape[1:]), examples)  # [a b/a …]
            zeros = _zeros_like(self.gradients, state, jax.tree.map(lambda x: x[0], parts))
            ((loss, accuracy), grads), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, self.gradients(state, part)), None), zeros, parts
            )
        updates, opt_state = self.tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        step = state.step + 1
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates))
        healthy = finite | (state.first_nonfinite_step > 0)
        decay = self.ema_decay
        new_state = dataclasses.replace(
            state,
            step=step,
            trainable=trainable,
            opt_state=opt_state,
            ema=update_ema(state.ema, trainable, decay=decay, num_updates=state.step) if decay else {},
            first_nonfinite_step=jnp.where(healthy, state.first_nonfinite_step, step),
        )
        learning_rate = {"learning_rate": self.schedule(state.step)} if self.schedule else {}
        return new_state, {"train/loss": loss, "train/accuracy": accuracy, **learning_rate}

    def with_keys(self, batch: Batch, state: TrainState) -> KeyedBatch:
        """Adds the random keys of this step, and the partners for mixup and CutMix."""
        augment_keys, dropout_keys = rng.step_keys(state.key, state.step, self.batch_size)
        examples = KeyedBatch(batch.inputs, batch.labels, augment_keys)
        if self.mixup_alpha > 0 or self.cutmix_alpha > 0:
            # The partner of an image is its neighbor in the full batch, independent of accumulation.
            examples = examples._replace(
                partners=jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), examples),
                mix_keys=rng.mix_keys(state.key, state.step, self.batch_size),
            )
        return examples._replace(dropout_keys=dropout_keys)

    def gradients(self, state: TrainState, examples: KeyedBatch) -> tuple[tuple[jax.Array, jax.Array], Params]:
        """Returns ((loss, accuracy), gradients of the trainable parameters)."""
        examples = jax.lax.with_sharding_constraint(examples, sharding.batch_sharding(self.mesh))
        inputs, targets = self.prepare(examples)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.value_and_grad(self.loss, has_aux=True)(
                state.trainable, state.frozen, inputs, targets, examples.dropout_keys
            )

    def prepare(self, examples: KeyedBatch) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """Augments, normalizes and mixes examples; returns the model's inputs, and targets as in `loss`."""
        inputs = self.forward.preprocess(examples.augment_keys, examples.inputs, train=True)
        targets = [(examples.labels, jnp.ones(()))]
        if examples.partners is not None and examples.mix_keys is not None:
            partners = self.forward.preprocess(examples.partners.augment_keys, examples.partners.inputs, train=True)
            inputs, weight = preprocess.mix(
                examples.mix_keys, inputs, partners, mixup_alpha=self.mixup_alpha, cutmix_alpha=self.cutmix_alpha
            )
            targets = [(examples.labels, weight), (examples.partners.labels, 1.0 - weight)]
        return inputs, targets

    def loss(
        self,
        trainable: Params,
        frozen: Params,
        inputs: jax.Array,
        targets: list[tuple[jax.Array, jax.Array]],
        dropout_keys: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (loss, accuracy): means over the batch, or the contribution of a microbatch to them.

        Targets are pairs (labels [b], weights [b] or scalar): one pair, or two for mixed images, with weights of sum 1.
        """
        params = lora.merge_lora_weights(optim.merge_params(trainable, frozen), alpha=self.lora_alpha)
        logits = self.forward.logits(params, inputs, dropout_keys)
        loss = accuracy = jnp.zeros(())
        for labels, weight in targets:
            loss += jnp.sum(weight * metrics.cross_entropy(logits, labels, label_smoothing=self.label_smoothing))
            accuracy += jnp.sum(weight * (jnp.argmax(logits, axis=-1) == labels))
        return loss / self.batch_size, accuracy / self.batch_size


def run_train_steps(train_step: TrainStep, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Runs all updates that a batch has examples for in a loop on the device; returns the metrics of the last one."""
    size = train_step.batch_size

    def select(update: jax.Array | int) -> Batch:
        rows = update * size + jnp.arange(size)
        selected: Batch = jax.tree.map(lambda leaf: leaf[rows], batch)
        return selected

    def body(update: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        return train_step(carry[0], select(update))

    zeros = _zeros_like(train_step, state, select(0))[1]
    num_updates = jnp.sum(batch.labels >= 0) // size
    result: tuple[TrainState, Metrics] = jax.lax.fori_loop(0, num_updates, body, (state, zeros))
    return result


def _zeros_like(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns zeros with the shapes and dtypes of a function's outputs."""
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def create_train_state(
    params: Params, *, patterns: tuple[str, ...], tx: optax.GradientTransformation, seed: int, use_ema: bool = False
) -> TrainState:
    """Returns the initial state for a full parameter tree."""
    trainable, frozen = optim.split_params(params, patterns)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        opt_state=tx.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if use_ema else {},
        key=jax.random.PRNGKey(seed),
        first_nonfinite_step=jnp.zeros((), jnp.int32),
    )


def evaluated_params(state: TrainState, *, use_ema: bool = True, lora_alpha: float = 1.0) -> Params:
    """Returns the parameters to evaluate: the EMA parameters, if any, with LoRA weights merged."""
    ema = state.ema if use_ema else {}
    return lora.merge_lora_weights(optim.merge_params(ema or state.trainable, state.frozen), alpha=lora_alpha)


def update_ema(ema: Params, params: Params, *, decay: float, num_updates: jax.Array) -> Params:
    """Updates the EMA parameters; the decay is smaller at first, so that the initial parameters are soon forgotten.

    After t earlier updates the decay is min(decay, (1 + t) / (10 + t)), as in TensorFlow's
    `tf.train.ExponentialMovingAverage(num_updates=…)`.
    """
    warmed_up = jnp.minimum(decay, (1.0 + num_updates) / (10.0 + num_updates))
    new_ema: Params = optax.incremental_update(params, ema, 1.0 - warmed_up)
    return new_ema
