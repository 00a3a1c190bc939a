"""Builds everything that training needs from a config, and unpacks its keys for the modules that compute."""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import data, models
from vit_jax.config import resolve_steps
from vit_jax.data import DatasetFingerprint, DatasetInfo, batches, findings, preprocess
from vit_jax.data.batches import Batch
from vit_jax.data.crops import CROPS, split_names
from vit_jax.data.datasets import DatasetOptions
from vit_jax.data.preprocess import Augment
from vit_jax.data.streaming import BatchReader
from vit_jax.pretrained import ModelMetadata
from vit_jax.runtime import distributed, rng, sharding
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training import device_fit, initialize, lora, metrics, optim, steps
from vit_jax.training.features import abstract_batch, compute_features
from vit_jax.training.inference import FeatureForward, ImageForward, Inference
from vit_jax.training.initialize import Pretrained
from vit_jax.training.plan import Plan
from vit_jax.training.run_info import RunInfo
from vit_jax.training.steps import TrainState, TrainStep
from vit_jax.training.writer import format_steps
from vit_jax.types import Dataset, ImageModel, ImageSource, Params, Split

Optimizer: TypeAlias = optax.GradientTransformation | Callable[[optax.Schedule], optax.GradientTransformation]
"""An optax transformation, or a function from the config's learning-rate schedule to one."""

_STEP_OPTIONS = ("batch_size", "accumulation_steps", "label_smoothing", "mixup_alpha", "cutmix_alpha", "ema_decay")
"""Keys of the config that are attributes of `TrainStep`."""


class Examples(NamedTuple):
    """The examples of each split [n …] and their int32 labels [n]: on every device, or on the host if streamed."""

    inputs: dict[str, jax.Array | ImageSource]
    labels: dict[str, jax.Array | np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Plan):
    """Everything that training needs."""

    dataset: Dataset
    info: RunInfo

    @functools.cached_property
    def inference(self) -> Inference:
        """Inference on the stored examples: images, or cached features."""
        return Inference(self.train_step.forward, self.mesh, batch_size=self.config.eval_batch_size)

    def load_examples(self, state: TrainState) -> Examples:
        """Puts images on the devices unless they are streamed, or caches the features of the frozen backbone."""
        config, images = self.config, {name: split.images for name, split in self.dataset.splits.items()}
        augment, test_augment = config.augment, config.ablation.test_augment
        inputs = {"train": images.pop("train")}
        if self.storage == "features":
            params = optim.merge_params(state.trainable, state.frozen)
            compute = functools.partial(compute_features, self.image_forward, params, mesh=self.mesh)
            views = {"num_views": config.feature_views, "seed": config.seed}
            inputs["train"] = compute(inputs["train"], augment=augment, **views)
            inputs |= {name: compute(split, augment=test_augment) for name, split in images.items()}
        else:
            crop = functools.partial(batches.crop_when_decoded, augment=test_augment, image_mean=config.image_mean)
            inputs |= {name: crop(split) for name, split in images.items()}
        examples = Examples(inputs, {name: split.labels for name, split in self.dataset.splits.items()})
        if self.storage == "stream":
            return examples
        on_device: Examples = sharding.device_put(examples, sharding.replicated(self.mesh))
        return on_device

    def train_batches(self, examples: Examples, first_step: int) -> Generator[tuple[int, Batch], None, None]:
        """Yields (finished updates after the batch, batch), starting after `first_step`."""
        config, inputs, labels = self.config, examples.inputs["train"], examples.labels["train"]
        if isinstance(inputs, jax.Array) and isinstance(labels, jax.Array):
            return batches.resident_batches(
                inputs,
                labels,
                self.mesh,
                batch_size=config.batch_size,
                seed=config.seed,
                balanced=config.dataset.sampling == "balanced",
                first_step=first_step,
                num_steps=config.num_steps,
                num_views=config.feature_views,
                max_updates=self.max_updates,
                stops=(config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps),
            )
        read = BatchReader(
            self.dataset.train,
            augment="none" if "augment" in self.info.custom else split_names(config.augment)[0],
            margin_color=preprocess.margin_color(config.image_mean),
            batch_size=config.batch_size,
            seed=config.seed,
            balanced=config.dataset.sampling == "balanced",
            part=jax.process_index(),
            num_parts=jax.process_count(),
        )
        num_workers = config.dataset.num_workers
        return batches.streamed_batches(
            read, self.mesh, first_step=first_step, num_steps=config.num_steps, num_workers=num_workers
        )

    @property
    def selection_split(self) -> str:
        """The split that is evaluated during training, for the best checkpoint and early stopping."""
        return "test" if self.dataset.validation is None else "validation"

    def evaluate(self, state: TrainState, examples: Examples, split: str) -> dict[str, float]:
        """Evaluates a state on every example of a split, "validation" or "test".

        With EMA, "test/…" are the results of the EMA parameters, and "test_raw/…" those without EMA.
        """
        results: dict[str, float] = {}
        for prefix, use_ema in ((split, True), (f"{split}_raw", False)):
            if use_ema or state.ema:
                params = steps.evaluated_params(state, use_ema=use_ema, lora_alpha=self.config.lora.alpha)
                sums = self.inference.sum_metrics(params, examples.inputs[split], examples.labels[split])
                results |= metrics.means(sums, prefix=prefix)
        return results


def create_experiment(
    config: ConfigDict,
    *,
    dataset: Dataset | None = None,
    augment: Augment | None = None,
    optimizer: Optimizer | None = None,
    saved: RunInfo | None = None,
) -> tuple[Experiment, TrainState]:
    """Loads data and pretrained parameters; returns the experiment and its initial state.

    The user's own dataset, augmentation of training images and optimizer replace those of the config. To resume a run
    from its `saved` metadata, the dataset must be the same and keeps its storage, no pretrained parameters are loaded,
    and the state is abstract: shapes, dtypes and shardings.
    """
    given = {"dataset": dataset, "augment": augment, "optimizer": optimizer}
    custom = tuple(name for name, value in given.items() if value is not None)
    if saved and saved.custom != custom:
        raise UserError(
            f"the run was started with {', '.join(saved.custom) or 'nothing'} given from Python, and is resumed with "
            f"{', '.join(custom) or 'nothing'}; resume it with the same arguments of train_and_evaluate"
        )
    if augment is not None and not callable(augment):
        raise UsageError(f"augment is {augment!r}; expected a function (key, image) -> image; config.augment has names")
    mesh = sharding.create_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    config = resolve_config(config, mesh)
    with distributed.main_process_first():
        storage = saved.storage if saved else config.dataset.storage
        if dataset is None:
            dataset = load_dataset(config, storage=storage, verified=saved is not None)
        else:
            dataset = data.check_dataset(dataset)
        source = initialize.load_pretrained(config.pretrained) if saved is None else None
    if distributed.process_max(not dataset.train.in_memory) and dataset.train.in_memory:
        dataset = load_dataset(config, storage="stream", verified=saved is not None)  # another process has less memory
    fingerprint = data.fingerprint(dataset)
    check_same_dataset(fingerprint)
    if saved and (difference := fingerprint.difference(saved.dataset)):
        name = "the dataset" if "dataset" in custom else config.dataset.name
        raise UserError(
            f"{name} has changed since the run was started: it has {difference}; restore it, "
            "or give another --workdir to start a new run"
        )
    model = create_model(config, source, num_classes=len(dataset.class_names), saved=saved)
    plan = plan_experiment(config, model, mesh, DatasetInfo.from_dataset(dataset), augment=augment, optimizer=optimizer)
    info = RunInfo(
        model=ModelMetadata.from_model(
            model,
            class_names=dataset.class_names,
            image_size=config.image_size,
            image_mean=config.image_mean,
            image_std=config.image_std,
            test_resize=config.dataset.test_resize,
        ),
        config=plan.config.to_dict(),
        dataset=fingerprint,
        storage="memory" if dataset.train.in_memory else "stream",
        num_trainable=sum(leaf.size for leaf in jax.tree.leaves(plan.abstract_state.trainable)),
        command=shlex.join(["python", *sys.argv]),
        custom=custom,
        stale_evaluations=saved.stale_evaluations if saved else 0,
    )
    experiment = Experiment(**vars(plan), dataset=dataset, info=info)
    if saved:
        return experiment, plan.abstract_state
    params = initialize.create_params(model, source, image_size=config.image_size, seed=config.seed)
    return experiment, plan.init_state(sharding.device_put(params, sharding.param_shardings(params, mesh)))


def plan_experiment(
    config: ConfigDict,
    model: ImageModel,
    mesh: Mesh,
    info: DatasetInfo,
    *,
    augment: Augment | None = None,
    optimizer: Optimizer | None = None,
) -> Plan:
    """Builds an experiment from shapes: nothing is loaded, and the devices of the mesh need not exist.

    Resolves num_epochs, and what depends on the devices, see `device_fit`: attention "auto" by a trial, and
    accumulation_steps 0 by compilations.
    """
    check_batch(config, num_shards=mesh.size, num_images=info.num_train)
    config, model = fit_attention(config, model, mesh)
    steps_per_epoch = info.num_train // config.batch_size
    config = resolve_steps(config, steps_per_epoch=steps_per_epoch)
    print(f"training: {format_steps(config.num_steps, steps_per_epoch)} of {steps_per_epoch:,} steps")
    patterns = optim.trainable_patterns(config.trainable)
    tx, schedule = create_optimizer(config, model, optimizer)

    def init_state(params: Params) -> TrainState:
        if any("lora" in pattern for pattern in patterns):
            key = jax.random.fold_in(jax.random.PRNGKey(config.seed), rng.Stream.LORA)
            params = lora.add_lora_weights(key, params, rank=config.lora.rank, targets=config.lora.targets)
        return steps.create_train_state(
            params, patterns=patterns, tx=tx, seed=config.seed, use_ema=config.ema_decay > 0
        )

    init_params = functools.partial(initialize.init_params, model, image_size=config.image_size, seed=config.seed)
    state = jax.eval_shape(init_state, jax.eval_shape(init_params))
    initialize.check_head(state.trainable, model)
    state_shardings = sharding.param_shardings(state, mesh)
    params = optim.merge_params(state.trainable, state.frozen)
    print(optim.describe_trainable(params, patterns))

    head_only = set(state.trainable) == {"head"}
    forward = ImageForward(
        model,
        image_size=config.image_size,
        image_mean=tuple(config.image_mean),
        image_std=tuple(config.image_std),
        resize=config.dataset.test_resize,
        augment=augment or preprocess.device_augment(config.augment, in_memory=info.in_memory),
        test_augment=preprocess.device_augment(config.ablation.test_augment, in_memory=info.in_memory),
        dropout=initialize.has_dropout(model) and (config.ablation.frozen_dropout or not head_only),
    )
    storage = "memory" if info.in_memory else "stream"
    images = jax.ShapeDtypeStruct((config.batch_size, *info.image_shape), jnp.uint8)
    batch = Batch.abstract(images)
    if caches_features(config, head_only=head_only, dropout=forward.dropout, own_augment=augment is not None):
        storage, max_updates = "features", min(config.log_every_steps, max(1, config.num_steps))
        batch = abstract_batch(forward, params, images, max_updates=max_updates)
    batch_sharding = batches.train_batch_sharding(mesh, max_updates=len(batch.labels) // config.batch_size)
    plan = Plan(
        config=config,
        mesh=mesh,
        dataset_info=info,
        storage=storage,
        abstract_state=sharding.with_sharding(state, state_shardings),
        abstract_batch=sharding.with_sharding(batch, batch_sharding),
        train_step=TrainStep(
            forward=FeatureForward(model) if storage == "features" else forward,
            tx=tx,
            schedule=schedule,
            mesh=mesh,
            lora_alpha=config.lora.alpha,
            **{name: config[name] for name in _STEP_OPTIONS},
        ),
        image_forward=forward,
        init_state=jax.jit(init_state, out_shardings=state_shardings, donate_argnums=0),
    )
    return plan if config.accumulation_steps else device_fit.fit_accumulation(plan)


def resolve_config(config: ConfigDict, mesh: Mesh) -> ConfigDict:
    """Returns a copy of the config without dtype "auto", which is printed, and dataset.test_resize "auto"."""
    config = config.copy_and_resolve_references()
    crops = config.ablation.test_augment in CROPS
    if config.dataset.test_resize == "auto":
        config.dataset.test_resize = "squash" if crops else data.default_resize(config.dataset.name)
    if config.dataset.test_resize == "center_crop" and crops:
        raise UsageError(
            f"config.ablation.test_augment is {config.ablation.test_augment!r}, which crops test images itself; set "
            "dataset.test_resize to 'squash'"
        )
    if config.dtype == "auto":
        config.dtype = device_fit.auto_dtype(mesh.devices.flat[0])
        print(f"dtype: {config.dtype}, for {mesh.devices.flat[0].device_kind}")
    return config


def fit_attention(config: ConfigDict, model: ImageModel, mesh: Mesh) -> tuple[ConfigDict, ImageModel]:
    """Replaces model.attention "auto", the default, by the choice for the devices, in copies of config and model."""
    if not isinstance(model, models.VisionTransformer):
        return config, model
    config, device = config.copy_and_resolve_references(), mesh.devices.flat[0]
    requested = config.model.get("attention", "auto")
    batch_size = config.batch_size // (mesh.size * (config.accumulation_steps or 1))
    choice = device_fit.find_attention(requested, model, device, image_size=config.image_size, batch_size=batch_size)
    if requested == "auto" and ("attention" in config.model or device_fit.can_use_cudnn(device, model.dtype)):
        config.model.unlock().attention = choice
    return config, model.clone(attention=choice)


def create_optimizer(
    config: ConfigDict, model: ImageModel, optimizer: Optimizer | None
) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """Returns the optimizer and the learning rate to log, which is None for a user's transformation."""
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer, None
    schedule = optim.make_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        num_steps=config.ablation.schedule_steps or config.num_steps,
        hold_steps=config.ablation.schedule_every_steps,
    )
    if optimizer is not None:
        tx: object = optimizer(schedule) if callable(optimizer) else optimizer
        if not isinstance(tx, optax.GradientTransformation):
            found = f"a function that returns {tx!r}" if callable(optimizer) else repr(optimizer)
            raise UsageError(
                f"optimizer is {found}; expected an optax.GradientTransformation, or a function from a schedule to one"
            )
        return tx, schedule
    return optim.create_optimizer(schedule=schedule, model=model, **config.optimizer), schedule


def dataset_options(config: ConfigDict, *, storage: str = "") -> DatasetOptions:
    """Returns the options of `data.load_dataset` and related functions."""
    return {
        "train_split": config.dataset.train_split,
        "validation_split": config.dataset.validation_split,
        "test_split": config.dataset.test_split,
        "test_fraction": config.dataset.test_fraction,
        "validation_fraction": config.dataset.validation_fraction,
        "split_seed": config.dataset.split_seed,
        "damaged": config.dataset.damaged,
        "data_dir": config.dataset.data_dir,
        "image_size": config.image_size,
        "classes": config.dataset.classes,
        "test_resize": config.dataset.test_resize,
        "crops": not {split_names(config.augment)[0], config.ablation.test_augment}.isdisjoint(CROPS),
        "storage": storage or config.dataset.storage,
        "device_bytes": sharding.device_memory(jax.local_devices()[0])[0],
    }


def load_dataset(config: ConfigDict, *, storage: str = "", verified: bool = False) -> Dataset:
    """Loads the config's dataset; prints its sizes, images per class and, on stderr, warnings.

    `verified`: streamed images are known to be intact.
    """
    options: DatasetOptions = {**dataset_options(config, storage=storage), "verified": verified}
    dataset = data.load_dataset(config.dataset.name, **options)
    print("\n".join([*dataset.findings.notes, f"{config.dataset.name}: {DatasetInfo.from_dataset(dataset)}"]))
    if dataset.train.paths is not None:
        print(DatasetInfo.from_dataset(dataset).describe_storage())
        print(findings.describe_classes(dataset))
        for line in findings.describe_warnings(dataset):
            print(f"warning: {line}", file=sys.stderr)
    return dataset


def describe_dataset(config: ConfigDict) -> DatasetInfo:
    """Returns and prints the sizes of the config's dataset; downloads and decodes nothing."""
    info = data.dataset_info(config.dataset.name, **dataset_options(config))
    print(f"{config.dataset.name}: {info}")
    return info


def load_split(config: ConfigDict, split: str = "test", *, storage: str = "") -> tuple[Split, tuple[str, ...]]:
    """Loads the config's "train", "validation" or "test" split and the class names; see `data.load_split`."""
    return data.load_split(config.dataset.name, split=split, **dataset_options(config, storage=storage))


def check_same_dataset(found: DatasetFingerprint) -> None:
    """Raises the same UserError in every process unless all have loaded the same dataset; a collective call."""
    summaries = distributed.gather_strings(f"{found} of {len(found.class_names)} classes (digest {found.digest[:16]})")
    for number, summary in enumerate(summaries):
        if summary != summaries[0]:
            raise UserError(
                f"process {number} read {summary}, the first process read {summaries[0]}; all processes must read the "
                "same classes and files, so give them the same copy of the dataset"
            )


def create_model(
    config: ConfigDict, source: Pretrained | None, *, num_classes: int, saved: RunInfo | None = None
) -> ImageModel:
    """Creates the model; a resumed run uses the saved arguments and needs no pretrained checkpoint."""
    if saved:
        architecture, arguments = saved.model.architecture, dict(saved.model.model)
        num_classes = arguments.pop("num_classes")
    else:
        architecture = config.architecture
        arguments = initialize.model_arguments(config.model.to_dict(), architecture, source)
        arguments["head_init"] = config.ablation.head_init
    model = models.create_model(
        architecture, arguments, num_classes=num_classes, dtype=config.dtype, remat=config.remat
    )
    model.validate(config.image_size)
    return model


def check_batch(config: ConfigDict, *, num_shards: int, num_images: int) -> None:
    """Raises UsageError if the batch size is not divisible by devices × accumulation steps, or above `num_images`."""
    parts = num_shards * (config.accumulation_steps or 1)
    if config.batch_size % parts:
        raise UsageError(
            f"config.batch_size is {config.batch_size}, which is not divisible by {num_shards} devices × "
            f"{parts // num_shards} accumulation steps; use {-(-config.batch_size // parts) * parts}"
        )
    if config.batch_size > num_images:
        raise UsageError(f"config.batch_size is {config.batch_size}; expected at most {num_images} (training images)")


def caches_features(config: ConfigDict, *, head_only: bool, dropout: bool, own_augment: bool) -> bool:
    """Returns True if features are cached; raises UsageError if they are required, but change with every step."""
    obstacles = {
        f"trainable {config.trainable!r} trains more than the head": not head_only,
        "frozen_dropout changes them at every step": dropout,
        "mixup and cutmix need the images": config.mixup_alpha > 0 or config.cutmix_alpha > 0,
        "an augmentation of your own needs the images": own_augment,
    }
    obstacle = next((reason for reason, holds in obstacles.items() if holds), None)
    cached, augmented = config.features == "cached", config.augment != "none"
    if cached and obstacle:
        raise UsageError(f"config.features is 'cached', but {obstacle}; set it to 'auto'")
    if config.feature_views > 1 and not (cached and augmented):
        raise UsageError(
            f"config.feature_views is {config.feature_views}, which needs features='cached' and an augment; "
            f"got features={config.features!r}, augment={config.augment!r}"
        )
    return cached or (config.features == "auto" and not obstacle and not augmented)
