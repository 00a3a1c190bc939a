"""A config with its data and its file: what the loop works with."""

import contextlib
import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.data import preprocess
from vit_jax.data.crops import CROPS
from vit_jax.data.streaming import BatchReader, training_batches
from vit_jax.runtime import distributed, sharding
from vit_jax.runtime import rng as sampling
from vit_jax.runtime.errors import UserError
from vit_jax.runtime.progress import progress_bar
from vit_jax.training import build, features, optim, steps
from vit_jax.training.program import Program, create_program
from vit_jax.types import Dataset, Params, Split

_FEATURE_BATCH_SIZE = 128
"""Images per batch of cached features. Not a config key that a resumed run may change: the last bits depend on it."""

Arrays = tuple[jax.Array, jax.Array]
"""Pictures, or features of them, and their labels."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What the loop works with.

    Attributes:
        config: laid out as in `configs/base.py`.
        program: the functions of the run.
        dataset: on the host.
        about: metadata of the model and the config; saved with every checkpoint.
    """

    config: ConfigDict
    program: Program
    dataset: Dataset
    about: dict[str, Any]

    def compile_train_steps(self) -> Callable:
        """Compiles ahead, so that the first step's time is that of a step.

        Returns:
            (state, *arrays, permutation, count=…) -> (state, scalars); the count is 1 unless features are stored.
        """
        print("compiling the training step …", flush=True)
        compiled = self.program.lower().compile()
        place = functools.cache(
            lambda count: sharding.device_put(np.int32(count), sharding.replicated(self.program.mesh))
        )
        return lambda *inputs, count: compiled(*inputs, place(count))

    def open_arrays(self, state: steps.TrainState, *, step: int) -> tuple[Generator[Arrays, None, None], Callable]:
        """Makes ready what training and evaluation read of the pictures: all of them, their features, or batches.

        Args:
            state: whose frozen backbone makes the features.
            step: that training goes on from.

        Returns:
            (arrays, evaluate): what each call of the training steps reads, always the same arrays if they are on the
            devices; and `state -> {"test": totals}` over the test images, see
            `metrics.means`. Where EMA parameters are kept, "test" is theirs and "test_raw" is without them.
        """
        config, program, dataset = self.config, self.program, self.dataset
        params = optim.merge_params(state.trainable, state.frozen)
        batch_size, alpha = config.eval_batch_size, config.lora.alpha
        if program.cached:
            compute = functools.partial(
                features.apply_to_all,
                features.backbone(program.model),
                params,
                mesh=program.mesh,
                batch_size=_FEATURE_BATCH_SIZE,
            )
            whole, views = program.pictures_forward, config.feature_views
            images = crop_on_host(config, dataset.train.images, config.augment, num_views=views, seed=config.seed)
            views_left = views * len(dataset.train) // len(images)
            train_images = compute(images, prepare=whole.augment, num_views=views_left, seed=config.seed)
            test_images = compute(crop_on_host(config, dataset.test.images, config.test_augment), prepare=whole.prepare)
            arrays = repeat(train_images, np.tile(dataset.train.labels, views), program.mesh)
            test = Split(images=test_images, labels=dataset.test.labels)
        else:
            arrays = (
                stream(config, dataset.train, program.mesh, step=step)
                if program.streamed
                else repeat(dataset.train.images, dataset.train.labels, program.mesh)
            )
            test_images = crop_on_host(config, dataset.test.images, config.test_augment)
            test = Split(images=test_images, labels=dataset.test.labels)
        evaluate_params = create_evaluate(program.forward, test, program.mesh, batch_size=batch_size)

        def evaluate(state: steps.TrainState) -> dict[str, dict[str, jax.Array]]:
            totals = {"test": evaluate_params(steps.evaluated_params(state, lora_alpha=alpha))}
            if state.ema:
                raw = steps.evaluated_params(state, use_ema=False, lora_alpha=alpha)
                totals["test_raw"] = evaluate_params(raw)
            return totals

        return arrays, evaluate


def create_job(
    config: ConfigDict, *, saved: dict[str, Any] | None = None
) -> tuple[Job, Callable[[], steps.TrainState]]:
    """Builds data, model, optimizer and functions, all checked against each other; computes nothing yet.

    Args:
        config: laid out as in `configs/base.py`.
        saved: metadata in the checkpoint of a run that is resumed: images are stored as they were, and the dataset must
            be the same; None for a new run.

    Returns:
        (job, create_state): the latter makes the state before the first update. It holds the pretrained file's
        parameters in host memory: let go of it after use.
    """
    saved = saved or {}
    mesh = sharding.create_mesh(**config.mesh)
    with distributed.main_process_first():
        dataset = load_dataset(config, storage=saved.get("storage", ""))
        source = build.load_source(config)
    if distributed.process_max(not dataset.train.in_memory) and dataset.train.in_memory:
        dataset = load_dataset(config, storage="stream")  # another process has less memory
    fingerprint = data.fingerprint(dataset)
    check_same_dataset(fingerprint)
    if "dataset" in saved:  # not in checkpoints of older versions
        was = data.DatasetFingerprint.from_json({"class_names": saved["class_names"], **saved["dataset"]})
        check_unchanged_dataset(config.dataset.name, fingerprint, was)
    model = build.create_model(config, source, num_classes=len(dataset.class_names))
    program = create_program(
        config,
        model,
        mesh,
        num_images=len(dataset.train),
        image_shape=dataset.train.images.shape[1:],
        in_memory=dataset.train.in_memory,
    )
    print(program.describe_trainable())

    def create_state() -> steps.TrainState:
        params = build.create_params(config, model, source)
        return program.init_state(sharding.device_put(params, sharding.param_shardings(params, mesh)))

    about = build.describe(config, model, dataset.class_names)
    about["storage"] = "memory" if dataset.train.in_memory else "stream"
    about["dataset"] = {key: fingerprint.to_json()[key] for key in ("num_train", "num_test", "digest")}
    about["command"] = shlex.join(["python", *sys.argv])
    about["config"] = config.to_dict()
    about["num_trainable"] = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.trainable))
    return Job(config, program, dataset, about), create_state


def check_same_dataset(found: data.DatasetFingerprint) -> None:
    """Raises the same UserError in every process unless their fingerprints agree; a collective call."""
    summaries = distributed.gather_strings(
        f"{found.num_train:,} training and {found.num_test:,} test images of {len(found.class_names)} classes "
        f"(digest {found.digest[:16]})"
    )
    for number, summary in enumerate(summaries):
        if summary != summaries[0]:
            raise UserError(
                f"process {number} read {summary}, the first process read {summaries[0]}; all processes must read the "
                "same classes and files, so give them the same copy of the dataset"
            )


def check_unchanged_dataset(name: str, found: data.DatasetFingerprint, saved: data.DatasetFingerprint) -> None:
    """Raises UserError unless the dataset is the one that a run was started with."""
    if difference := found.difference(saved):
        raise UserError(
            f"{name} has changed since the run was started: it has {difference}; put it back as it was, or give "
            "another --workdir to start a new run"
        )


def dataset_options(config: ConfigDict, *, storage: str = "") -> dict[str, Any]:
    """Returns the arguments of `data.load_dataset` and `data.dataset_info`."""
    names = config.dataset
    return {
        "name": names.name,
        "data_dir": names.data_dir,
        "train_split": names.train_split,
        "test_split": names.test_split,
        "image_size": config.image_size,
        "classes": names.classes,
        "crops": not {config.augment, config.test_augment}.isdisjoint(CROPS),
        "storage": storage or names.storage,
        "device_bytes": sharding.device_memory(jax.local_devices()[0])[0],
    }


def load_dataset(config: ConfigDict, *, storage: str = "") -> Dataset:
    """Reads the dataset that the config names, and prints its size."""
    dataset = data.load_dataset(**dataset_options(config, storage=storage))
    height, width = dataset.train.images.shape[1:3]
    print(
        f"{config.dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images of {height} × "
        f"{width} pixels, {len(dataset.class_names)} classes"
        f"{'' if dataset.train.in_memory else ', decoded as they are needed'}"
    )
    return dataset


def crop_on_host(config: ConfigDict, images: Any, augment: str, *, num_views: int = 1, seed: int = 0) -> Any:
    """Returns images of which those that are decoded when they are read are also cropped then, at full resolution.

    Args:
        config: laid out as in `configs/base.py`.
        images: uint8 [n h w 3], or `data.EncodedImages`.
        augment: see `preprocess.prepare`.
        num_views: number of crops of each image: a crop of every image, then another of every image.
        seed: of the crops; see `sampling.row_keys`.
    """
    if not isinstance(images, data.EncodedImages) or augment not in CROPS:
        return images
    rows = np.arange(num_views * len(images))
    uniforms = jax.jit(lambda rows: preprocess.sample_uniforms(sampling.row_keys(rows, seed=seed)))(rows)
    color = preprocess.margin_color(config.image_mean)
    return images.crop(rows % len(images), augment=augment, uniforms=np.asarray(uniforms), margin_color=color)


def repeat(images: Any, labels: np.ndarray, mesh: Mesh) -> Generator[Arrays, None, None]:
    """All pictures or features, and their labels, on every device; the same again and again."""
    if not isinstance(images, jax.Array):
        images = sharding.device_put(images, sharding.replicated(mesh))
    arrays = images, sharding.device_put(labels, sharding.replicated(mesh))
    while True:
        yield arrays


def stream(config: ConfigDict, split: Split, mesh: Mesh, *, step: int) -> Generator[Arrays, None, None]:
    """Batches that worker processes make ready, the first one for the update after `step`."""
    read = BatchReader(
        split,
        augment=config.augment,
        margin_color=preprocess.margin_color(config.image_mean),
        batch_size=config.batch_size,
        seed=config.seed,
        part=jax.process_index(),
        num_parts=jax.process_count(),
    )
    batches = training_batches(
        read, first_step=step, num_steps=config.num_steps, num_workers=config.dataset.num_workers
    )
    with contextlib.closing(batches):
        for images, labels in batches:
            yield sharding.shard_local_batch(images, mesh), sharding.shard_local_batch(labels, mesh)


def create_evaluate(
    forward: steps.Forward, split: Split, mesh: Mesh, *, batch_size: int
) -> Callable[[Params], dict[str, jax.Array]]:
    """Returns `params -> totals`: sums over every picture of a split, each counted exactly once.

    Args:
        forward: from pictures, or features of them, to logits.
        split: these and their labels; kept on every device, or decoded batch by batch where they are not in memory.
        mesh: batches are split over its devices.
        batch_size: a wish; rounded up to the devices.
    """
    num_images = len(split)
    batch_size = sharding.pad_to_devices(batch_size, num_images, mesh)
    streamed = isinstance(split.images, data.EncodedImages)
    eval_step = steps.make_eval_step(forward, mesh, batch_size=batch_size, streamed=streamed)
    num_batches = math.ceil(num_images / batch_size)
    whole = None if streamed else next(repeat(split.images, split.labels, mesh))

    def batch(number: int) -> Arrays:
        rows = np.arange(number * batch_size, (number + 1) * batch_size)
        labels = np.where(rows < num_images, split.labels[rows % num_images], -1)
        images = sharding.shard_rows(split.images, rows % num_images, mesh)
        return images, sharding.device_put(labels, sharding.batch_sharding(mesh))

    def evaluate(params: Params) -> dict[str, jax.Array]:
        totals = sharding.device_put(steps.start_totals(), sharding.replicated(mesh))
        for number in progress_bar(range(num_batches), desc="test", unit="batch"):
            previous, totals = totals, eval_step(params, *(whole or batch(number)), totals)
            jax.block_until_ready(previous)  # for the bar's sake; the device already has the next batch
        return totals

    return evaluate
