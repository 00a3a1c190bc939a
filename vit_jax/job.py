"""From a config to what the loop works with: data, model, optimizer, state, jitted functions."""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

import vit_jax
from vit_jax import data, optim, pretrained, sharding, steps
from vit_jax.errors import UsageError, UserError
from vit_jax.models import VisionTransformer
from vit_jax.types import Dataset, Params, Split
from vit_jax.writer import bar_interval


@dataclasses.dataclass(frozen=True)
class Job:
    """What the loop works with.

    Attributes:
        abstract_state: the state as shapes, dtypes and places, to restore a checkpoint into.
        train_arrays: all training pictures and labels, on every device.
        steps_per_epoch: whole batches in the training split.
        train_step: see `steps.make_train_step`.
        permute: state -> order of the pictures in its epoch.
        evaluate: state -> totals over the test pictures, see `metrics.means`.
        about: what the model is; saved with every checkpoint.
    """

    abstract_state: steps.TrainState
    train_arrays: tuple[jax.Array, jax.Array]
    steps_per_epoch: int
    train_step: Any
    permute: Callable
    evaluate: Callable
    about: dict[str, Any]

    def compile_train_step(self) -> Callable:
        """Compiles ahead, so that the first step's time is that of a step."""
        print("compiling the training step …", file=sys.stderr)
        permutation = jax.eval_shape(self.permute, self.abstract_state)
        return self.train_step.lower(self.abstract_state, *self.train_arrays, permutation).compile()


def create_job(config: ConfigDict) -> tuple[Job, Callable[[], steps.TrainState]]:
    """Builds data, model, optimizer and functions, all checked against each other; computes nothing yet.

    Returns:
        (job, create_state): the latter makes the state before the first update. It holds the pretrained file's
        parameters in host memory: let go of it after use.
    """
    mesh = sharding.create_mesh()
    everywhere = sharding.replicated(mesh)
    check_batch(config, num_shards=mesh.size)
    dataset = load_dataset(config)
    if config.batch_size > len(dataset.train):
        raise UsageError(f"config.batch_size {config.batch_size} is above the {len(dataset.train)} training pictures")
    source = load_source(config)
    model = create_model(config, source, num_classes=len(dataset.class_names))
    abstract_params = jax.eval_shape(init_params(model, config))
    patterns = optim.trainable_patterns(config.trainable)
    print(optim.describe_trainable(abstract_params, patterns))

    schedule = optim.make_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        num_steps=config.num_steps,
    )
    tx = optim.create_optimizer(schedule=schedule, **config.optimizer)

    def state_from(params: Params) -> steps.TrainState:
        return steps.create_train_state(params, patterns=patterns, tx=tx, seed=config.seed)

    def create_state() -> steps.TrainState:
        params = sharding.place(create_params(config, model, source), everywhere)
        return jax.jit(state_from, out_shardings=everywhere, donate_argnums=0)(params)

    evaluate = create_evaluate(config, model, dataset.test, mesh)
    job = Job(
        abstract_state=sharding.abstract(jax.eval_shape(state_from, abstract_params), everywhere),
        train_arrays=sharding.place((dataset.train.images, dataset.train.labels), everywhere),
        steps_per_epoch=len(dataset.train) // config.batch_size,
        train_step=steps.make_train_step(
            model,
            tx,
            schedule,
            mesh,
            batch_size=config.batch_size,
            accumulation_steps=config.accumulation_steps,
            image_size=config.image_size,
            augment=config.augment,
        ),
        permute=steps.make_permutation(len(dataset.train), config.batch_size, mesh),
        evaluate=lambda state: evaluate(optim.merge_params(state.trainable, state.frozen)),
        about=describe(config, model, dataset),
    )
    return job, create_state


def load_dataset(config: ConfigDict) -> Dataset:
    """Reads the dataset that the config names, and says what it found."""
    names = config.dataset
    dataset = data.load_dataset(
        names.name,
        data_dir=names.data_dir,
        train_split=names.train_split,
        test_split=names.test_split,
        image_size=config.image_size,
    )
    height, width = dataset.train.images.shape[1:3]
    print(
        f"{names.name}: {len(dataset.train):,} training and {len(dataset.test):,} test pictures of {height} × {width} "
        f"pixels, {len(dataset.class_names)} classes"
    )
    return dataset


def load_source(config: ConfigDict) -> Params | None:
    """The parameters of the pretrained file, or None where the run starts from scratch."""
    return pretrained.load_npz(pretrained.resolve(config.pretrained)) if config.pretrained else None


def create_model(config: ConfigDict, source: Params | None, *, num_classes: int) -> VisionTransformer:
    """The module. Sizes that `config.model` leaves out are read off the file; those it gives must be the file's."""
    arguments = config.model.to_dict()
    if source is not None:
        try:
            sizes = pretrained.infer_architecture(source)
        except UserError as error:
            raise UserError(f"{config.pretrained}: {error}") from error
        arguments = agree(arguments, sizes, config.pretrained)
    elif not arguments:
        raise UsageError("config.model is empty: give the model's sizes, or a pretrained file to read them off")
    return build_model(arguments, num_classes=num_classes, dtype=config.dtype, image_size=config.image_size)


def create_params(config: ConfigDict, model: VisionTransformer, source: Params | None) -> Params:
    """The parameters before the first update, adapted from the file or drawn at random; says what it did."""
    init = init_params(model, config)
    if source is None:
        print("parameters drawn at random")
        return jax.jit(init)()
    # The compiler leaves out all that this does not return, so that only the head is really drawn.
    head = jax.jit(lambda: init()["head"])()
    params, report = pretrained.adapt_params(source, {**jax.eval_shape(init), "head": head})
    print(f"{config.pretrained}\n{report}")
    return params


def init_params(model: VisionTransformer, config: ConfigDict) -> Callable[[], Params]:
    """Returns `() -> freshly drawn parameters`."""
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    return lambda: model.init(jax.random.PRNGKey(config.seed), images)["params"]


def agree(arguments: dict[str, Any], sizes: dict[str, Any], name: str) -> dict[str, Any]:
    """Fills constructor arguments up with the sizes read off a file; what both say must be equal."""
    sizes = {key: value for key, value in sizes.items() if key not in ("num_classes", "representation_size")}
    others = [
        f"{key} {arguments[key]} (file: {sizes[key]})" for key in sizes if arguments.get(key, sizes[key]) != sizes[key]
    ]
    if others:
        raise UsageError(
            f"config.model does not fit {name}, which is of another variant: {', '.join(others)}; "
            "mend one of the two, or leave config.model empty to take the file's sizes"
        )
    return sizes | arguments


def build_model(arguments: dict[str, Any], *, num_classes: int, dtype: str, image_size: int) -> VisionTransformer:
    """The module, its arguments checked."""
    fields = {field.name: field.type for field in dataclasses.fields(VisionTransformer)}
    for key, value in arguments.items():
        if key not in fields or key in ("num_classes", "dtype", "parent", "name"):
            raise UsageError(f"config.model.{key}: VisionTransformer has no such argument")
        if key.endswith("_rate"):
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise UsageError(f"config.model.{key} is {value!r}; expected a number of at least 0 and below 1")
        elif value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"config.model.{key} is {value!r}; expected a whole number of at least 1")
    model = VisionTransformer(num_classes=num_classes, dtype=jnp.dtype(dtype), **arguments)
    if model.hidden_size % model.num_heads:
        raise UsageError(f"config.model: hidden_size {model.hidden_size} does not divide into {model.num_heads} heads")
    if image_size % model.patch_size:
        raise UsageError(f"config.image_size {image_size} is not a multiple of the patch, {model.patch_size} pixels")
    return model


def check_batch(config: ConfigDict, *, num_shards: int) -> None:
    """The batch must divide evenly over devices and accumulation."""
    parts = num_shards * config.accumulation_steps
    if config.batch_size % parts:
        raise UsageError(
            f"config.batch_size {config.batch_size} does not divide by {num_shards} devices × "
            f"{config.accumulation_steps} accumulation_steps; {-(-config.batch_size // parts) * parts} does"
        )


def create_evaluate(
    config: ConfigDict, model: VisionTransformer, split: Split, mesh: Mesh
) -> Callable[[Params], dict[str, jax.Array]]:
    """Returns `params -> totals`: sums over every picture of a split, each counted exactly once."""
    batch_size = -(-min(config.eval_batch_size, len(split)) // mesh.size) * mesh.size
    eval_step = steps.make_eval_step(model, mesh, batch_size=batch_size, image_size=config.image_size)
    num_batches = math.ceil(len(split) / batch_size)
    images, labels = sharding.place((split.images, split.labels), sharding.replicated(mesh))

    def evaluate(params: Params) -> dict[str, jax.Array]:
        totals = steps.start_totals(mesh)
        bar = tqdm(range(num_batches), desc="test", unit="batch", leave=False, delay=2, mininterval=bar_interval())
        for _ in bar:
            previous, totals = totals, eval_step(params, images, labels, totals)
            jax.block_until_ready(previous)  # for the bar's sake; the device already has the next batch
        return totals

    return evaluate


def describe(config: ConfigDict, model: VisionTransformer, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says of its model, as JSON values."""
    skipped = ("parent", "name", "dtype")
    arguments = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skipped}
    return {
        "vit_jax": vit_jax.__version__,
        "architecture": config.architecture,
        "model": arguments,
        "image_size": config.image_size,
        "class_names": list(dataset.class_names),
    }
