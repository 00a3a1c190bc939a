"""A config with its data and its file: what the loop works with."""

import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_jax import build, data, distributed, features, optim, sharding, steps
from vit_jax.program import Program, create_program
from vit_jax.types import Dataset, Params, Split
from vit_jax.writer import bar_interval


@dataclasses.dataclass(frozen=True)
class Job:
    """What the loop works with.

    Attributes:
        config: laid out as in `configs/base.py`.
        program: the functions of the run.
        dataset: on the host.
        about: what the model is; saved with every checkpoint.
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
        place = functools.cache(lambda count: sharding.place(np.int32(count), sharding.replicated(self.program.mesh)))
        return lambda *inputs, count: compiled(*inputs, place(count))

    def store(self, state: steps.TrainState) -> tuple[tuple[jax.Array, jax.Array], Callable]:
        """Puts what training and evaluation read of the pictures on the devices: pixels, or features of them.

        Returns:
            (arrays, evaluate): stored training pictures with their labels, and `state -> totals` over the test
            pictures, see `metrics.means`.
        """
        config, program = self.config, self.program
        frozen = optim.merge_params(state.trainable, state.frozen)
        views = config.feature_views if program.cached else 1

        def stored(split: Split, *, prepare: Callable, num_views: int) -> tuple[jax.Array, jax.Array]:
            labels = np.tile(split.labels, num_views)
            images, labels = sharding.place((split.images, labels), sharding.replicated(program.mesh))
            if program.cached:
                images = features.apply_to_all(
                    features.backbone(program.model),
                    frozen,
                    images,
                    program.mesh,
                    prepare=prepare,
                    batch_size=config.eval_batch_size,
                    num_views=num_views,
                    seed=config.seed,
                )
            return images, labels

        arrays = stored(self.dataset.train, prepare=program.pictures_forward.augment, num_views=views)
        test = stored(self.dataset.test, prepare=program.pictures_forward.prepare, num_views=1)
        evaluate = create_evaluate(program.forward, test, program.mesh, batch_size=config.eval_batch_size)
        alpha = config.lora.alpha
        return arrays, lambda state: evaluate(steps.evaluated_params(state, lora_alpha=alpha))


def create_job(config: ConfigDict) -> tuple[Job, Callable[[], steps.TrainState]]:
    """Builds data, model, optimizer and functions, all checked against each other; computes nothing yet.

    Returns:
        (job, create_state): the latter makes the state before the first update. It holds the pretrained file's
        parameters in host memory: let go of it after use.
    """
    mesh = sharding.create_mesh(**config.mesh)
    with distributed.first_one_first():
        dataset = load_dataset(config)
        source = build.load_source(config)
    model = build.create_model(config, source, num_classes=len(dataset.class_names))
    program = create_program(
        config, model, mesh, num_pictures=len(dataset.train), picture_shape=dataset.train.images.shape[1:]
    )
    print(program.describe_trainable())

    def create_state() -> steps.TrainState:
        params = build.create_params(config, model, source)
        return program.init_state(sharding.place(params, sharding.by_rule(params, mesh)))

    about = build.describe(config, model, dataset.class_names)
    about["command"] = shlex.join(["python", *sys.argv])
    about["num_trainable"] = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.trainable))
    return Job(config, program, dataset, about), create_state


def load_dataset(config: ConfigDict, *, shapes_only: bool = False) -> Dataset:
    """Reads the dataset that the config names, and says what it found; see `data.load_dataset`."""
    names = config.dataset
    dataset = data.load_dataset(
        names.name,
        data_dir=names.data_dir,
        train_split=names.train_split,
        test_split=names.test_split,
        image_size=config.image_size,
        classes=names.classes,
        shapes_only=shapes_only,
    )
    height, width = dataset.train.images.shape[1:3]
    print(
        f"{names.name}: {len(dataset.train):,} training and {len(dataset.test):,} test pictures of {height} × {width} "
        f"pixels, {len(dataset.class_names)} classes"
    )
    return dataset


def create_evaluate(
    forward: steps.Forward, arrays: tuple[jax.Array, jax.Array], mesh: Mesh, *, batch_size: int
) -> Callable[[Params], dict[str, jax.Array]]:
    """Returns `params -> totals`: sums over every picture of a split, each counted exactly once.

    Args:
        forward: from stored pictures to logits.
        arrays: stored pictures [n …] and int32 labels [n], on every device.
        mesh: batches are split over its devices.
        batch_size: a wish; rounded up to the devices.
    """
    num_pictures = len(arrays[1])
    batch_size = sharding.round_up(batch_size, num_pictures, mesh)
    eval_step = steps.make_eval_step(forward, mesh, batch_size=batch_size)
    num_batches = math.ceil(num_pictures / batch_size)

    def evaluate(params: Params) -> dict[str, jax.Array]:
        totals = sharding.place(steps.start_totals(), sharding.replicated(mesh))
        bar = tqdm(range(num_batches), desc="test", unit="batch", leave=False, delay=2, mininterval=bar_interval())
        for _ in bar:
            previous, totals = totals, eval_step(params, *arrays, totals)
            jax.block_until_ready(previous)  # for the bar's sake; the device already has the next batch
        return totals

    return evaluate
