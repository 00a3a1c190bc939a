"""What a run computes, made from shapes alone: nothing is read, placed or computed yet."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.data.crops import CROPS
from vit_jax.runtime import rng as sampling
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UsageError
from vit_jax.training import features, lora, optim, steps
from vit_jax.training.build import init_params
from vit_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run and the shapes and places of what they work on.

    Attributes:
        mesh: of devices.
        model: Linen module.
        cached: whether the head trains on stored features, the backbone being a fixed function of a picture.
        in_memory: whether the pictures fit into memory.
        patterns: what trains, as regular expressions.
        steps_per_epoch: whole batches in the training split.
        abstract_state: of the run.
        abstract_images: the training pictures and their labels; those of one batch unless they are `in_memory`.
        abstract_arrays: what a step reads of them: features if `cached`, otherwise the same.
        init_state: jitted params -> state before the first update.
        train_steps: jitted (state, *arrays, permutation, count) -> (state, scalars); `count` is 1 unless `cached`.
        permute: jitted state -> order of the pictures in its epoch; None if `streamed`.
        pictures_forward: from a picture to logits.
        forward: from what is stored of a picture to logits; the same unless `cached`.
    """

    mesh: Mesh
    model: Any
    cached: bool
    in_memory: bool
    patterns: tuple[str, ...]
    steps_per_epoch: int
    abstract_state: steps.TrainState
    abstract_images: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    abstract_arrays: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    init_state: Callable[[Params], steps.TrainState]
    train_steps: Any
    permute: Callable[[steps.TrainState], jax.Array]
    pictures_forward: steps.Forward
    forward: steps.Forward

    @property
    def streamed(self) -> bool:
        """Whether every step gets a batch of its own from the host."""
        return not (self.in_memory or self.cached)

    def describe_trainable(self) -> str:
        """A table of what trains."""
        params = optim.merge_params(self.abstract_state.trainable, self.abstract_state.frozen)
        return optim.describe_trainable(params, self.patterns)

    def lower(self) -> Any:
        """Traces the training step for the devices of the mesh, which need not be there."""
        permutation = jax.eval_shape(self.permute, self.abstract_state)
        permutation, count = sharding.with_sharding(
            (permutation, jax.ShapeDtypeStruct((), jnp.int32)), sharding.replicated(self.mesh)
        )
        return self.train_steps.lower(self.abstract_state, *self.abstract_arrays, permutation, count)


def create_program(
    config: ConfigDict,
    model: Any,
    mesh: Mesh,
    *,
    num_images: int,
    image_shape: tuple[int, ...],
    in_memory: bool = True,
) -> Program:
    """Makes the functions of a run.

    Args:
        config: laid out as in `configs/base.py`.
        model: Linen module.
        mesh: of devices, real ones or those of a topology.
        num_images: of the training split.
        image_shape: height, width and channels as they are stored.
        in_memory: whether they fit into memory; others come batch by batch, cropped already.

    Raises:
        UsageError: the batch does not divide or is larger than the data, nothing trains, or features cannot be stored.
    """
    check_batch(config, num_shards=mesh.size, num_images=num_images)
    patterns = optim.trainable_patterns(config.trainable)
    schedule = optim.make_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        num_steps=config.schedule_steps or config.num_steps,
        hold_steps=config.schedule_every_steps,
    )
    num_layers = getattr(model, "num_layers", 0)
    if config.optimizer.layer_decay != 1 and not num_layers:
        raise UsageError(
            f"config.optimizer.layer_decay is for the layers of a ViT; set it to 1 for {type(model).__name__}"
        )
    tx = optim.create_optimizer(schedule=schedule, num_layers=num_layers, **config.optimizer)

    def init_state(params: Params) -> steps.TrainState:
        params = add_lora_weights(params, patterns, config)
        return steps.create_train_state(params, patterns=patterns, tx=tx, seed=config.seed, ema=config.ema_decay > 0)

    abstract_state = jax.eval_shape(init_state, jax.eval_shape(init_params(model, config)))
    check_gradients(abstract_state.trainable, abstract_state.frozen, model)
    shardings, everywhere = sharding.param_shardings(abstract_state, mesh), sharding.replicated(mesh)

    head_only = set(abstract_state.trainable) == {"head"}
    dropout = has_dropout(model) and (config.frozen_dropout or not head_only)
    cached = stores_features(config, head_only=head_only, dropout=dropout)
    streamed = not (in_memory or cached)
    augment = device_augment(config.augment, in_memory=in_memory)
    whole = steps.image_forward(model, augment=augment, dropout=dropout, **test_options(config, in_memory=in_memory))
    forward = features.feature_forward(model) if cached else whole
    train_step = steps.make_train_step(
        forward,
        tx,
        schedule,
        mesh,
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        label_smoothing=config.label_smoothing,
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        ema_decay=config.ema_decay,
        lora_alpha=config.lora.alpha,
    )
    train_steps = features.make_train_steps(train_step) if cached else lambda *args: train_step(*args[:-1])
    num_views = config.feature_views if cached else 1

    def stored(num_rows: int, shape: tuple[int, ...], dtype: Any, place: Any = everywhere) -> tuple[Any, Any]:
        arrays = jax.ShapeDtypeStruct((num_rows, *shape), dtype), jax.ShapeDtypeStruct((num_rows,), jnp.int32)
        return sharding.with_sharding(arrays, place)

    if in_memory:
        pictures = arrays = stored(num_images, image_shape, jnp.uint8)
    else:
        pictures = arrays = stored(config.batch_size, image_shape, jnp.uint8, sharding.batch_sharding(mesh))
    if cached:
        keys = jax.ShapeDtypeStruct((len(pictures[1]), 2), jnp.uint32)
        inputs = jax.eval_shape(whole.prepare, keys, pictures[0])
        outputs = jax.eval_shape(features.backbone(model).apply, {"params": abstract_state.frozen}, inputs)
        arrays = stored(num_views * num_images, outputs.shape[1:], outputs.dtype)
    permutation = steps.make_permutation(num_images, config.batch_size, num_views=num_views)
    return Program(
        mesh=mesh,
        model=model,
        cached=cached,
        in_memory=in_memory,
        patterns=patterns,
        steps_per_epoch=num_images // config.batch_size,
        abstract_state=sharding.with_sharding(abstract_state, shardings),
        abstract_images=pictures,
        abstract_arrays=arrays,
        init_state=jax.jit(init_state, out_shardings=shardings, donate_argnums=0),
        train_steps=jax.jit(train_steps, out_shardings=(shardings, everywhere), donate_argnums=0),
        permute=jax.jit((lambda state: None) if streamed else permutation, out_shardings=everywhere),
        pictures_forward=whole,
        forward=forward,
    )


def device_augment(augment: str, *, in_memory: bool) -> str:
    """Returns what is left to do on the device: images that are not in memory are cropped where they are decoded."""
    return "flip" if augment in CROPS and not in_memory else augment


def test_options(config: ConfigDict, *, in_memory: bool = True) -> dict[str, Any]:
    """Returns the test-time preprocessing, as options of `steps.image_forward`."""
    return {
        "test_augment": device_augment(config.test_augment, in_memory=in_memory),
        "image_size": config.image_size,
        "mean": config.image_mean,
        "std": config.image_std,
    }


def add_lora_weights(params: Params, patterns: tuple[str, ...], config: ConfigDict) -> Params:
    """Adds LoRA weights if one of the patterns asks for them, see `lora.is_requested`."""
    if not lora.is_requested(params, patterns):
        return params
    key = jax.random.fold_in(jax.random.PRNGKey(config.seed), sampling.Stream.LORA)
    return lora.add_lora_weights(key, params, rank=config.lora.rank, targets=config.lora.targets)


def check_gradients(trainable: Params, frozen: Params, model: Any) -> None:
    """Refuses a choice of trainable parameters that a zero above them keeps without gradients.

    A run's head is new. Where its kernel starts at zero and stays frozen, the logits never depend on the features.
    A LoRA product whose `b` stays frozen at zero never changes either.

    Raises:
        UsageError: names what to add.
    """
    paths = flatten_dict(trainable, sep="/").keys()
    if model.head_init == "zeros" and not paths & {"head/kernel", "lora/head/kernel/b"}:
        raise UsageError(
            "config.trainable does not match head/kernel, which starts at zero, so that no parameter below the head "
            "would get a gradient; add 'head/.*', or set config.model.head_init to 'xavier'"
        )
    has_lora = "lora" in trainable or "lora" in frozen
    if has_lora and not any(path.startswith("lora/") and path.endswith("/b") for path in paths):
        raise UsageError(
            "config.trainable matches no LoRA weight 'lora/…/b', which all start at zero; "
            "add 'lora/.*', or name the same kernels in config.lora.targets"
        )


def has_dropout(model: Any) -> bool:
    """Whether any of the model's rates is above zero."""
    rates = (getattr(model, field.name) for field in dataclasses.fields(model) if field.name.endswith("_rate"))
    return any(rate > 0 for rate in rates)


def stores_features(config: ConfigDict, *, head_only: bool, dropout: bool) -> bool:
    """Whether the backbone's features are computed once instead of at every step.

    Raises:
        UsageError: the config asks for it, and they would not be the same at every step.
    """
    mixes = config.mixup_alpha > 0 or config.cutmix_alpha > 0
    obstacles = {
        f"trainable {config.trainable!r} trains more than the head": not head_only,
        "frozen_dropout draws them anew": dropout,
        "mixup and cutmix need the pictures": mixes,
    }
    obstacle = next((reason for reason, holds in obstacles.items() if holds), None)
    if config.features == "cached" and obstacle:
        raise UsageError(f"config.features is 'cached', but {obstacle}; set it to 'auto'")
    if config.feature_views > 1 and (config.features != "cached" or config.augment == "none"):
        raise UsageError(
            f"config.feature_views is {config.feature_views}, which needs features 'cached' and an augment; "
            f"they are {config.features!r} and {config.augment!r}"
        )
    return config.features == "cached" or (config.features == "auto" and not obstacle and config.augment == "none")


def check_batch(config: ConfigDict, *, num_shards: int, num_images: int) -> None:
    """The batch must divide evenly over devices and accumulation, and not be larger than the data."""
    parts = num_shards * config.accumulation_steps
    if config.batch_size % parts:
        raise UsageError(
            f"config.batch_size {config.batch_size} does not divide by {num_shards} devices × "
            f"{config.accumulation_steps} accumulation_steps; {-(-config.batch_size // parts) * parts} does"
        )
    if config.batch_size > num_images:
        raise UsageError(f"config.batch_size {config.batch_size} is above the {num_images} training pictures")
