"""The plan of an experiment: shapes, shardings and the training step, without data."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vit_jax.data import DatasetInfo
from vit_jax.data.batches import Batch
from vit_jax.runtime import sharding
from vit_jax.training.inference import ImageForward
from vit_jax.training.steps import TrainState, TrainStep, run_train_steps
from vit_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment without data: model, functions and shapes."""

    config: ConfigDict
    mesh: Mesh
    dataset_info: DatasetInfo
    storage: str  # of the training examples: "memory", "stream" or "features"
    abstract_state: TrainState  # shapes, dtypes and shardings; likewise below
    abstract_batch: Batch
    train_step: TrainStep
    image_forward: ImageForward
    init_state: Callable[[Params], TrainState]  # jitted
    compiled: jax.stages.Compiled | None = None  # `train_step`, if it was compiled to choose accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in the training images."""
        steps: int = self.dataset_info.num_train // self.config.batch_size
        return steps

    @property
    def max_updates(self) -> int:
        """Maximum number of updates per batch."""
        return len(self.abstract_batch.labels) // self.train_step.batch_size

    def compile_train_step(self) -> jax.stages.Compiled:
        """Returns `train_step` compiled ahead of time; the state is donated."""
        if self.compiled:
            return self.compiled
        print("compiling the training step …", flush=True)
        return self.lower().compile()

    def lower(self) -> jax.stages.Lowered:
        """Lowers `train_step` for the devices of the mesh, which need not exist."""
        step = self.train_step if self.max_updates == 1 else functools.partial(run_train_steps, self.train_step)
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        out_shardings = (state_shardings, sharding.replicated(self.mesh))
        jitted = jax.jit(step, out_shardings=out_shardings, donate_argnums=0)
        return jitted.lower(self.abstract_state, self.abstract_batch)

    @property
    def example_bytes(self) -> int:
        """Bytes per device of all images or features, or of two streamed batches."""
        info, inputs = self.dataset_info, self.abstract_batch.inputs
        if self.storage == "stream":
            return 2 * bytes_per_device(self.abstract_batch)
        views = self.config.feature_views if self.storage == "features" else 1
        example = math.prod(inputs.shape[1:]) * inputs.dtype.itemsize
        num_evaluated = info.num_validation + info.num_test
        return (views * info.num_train + num_evaluated) * example + 4 * (info.num_train + num_evaluated)  # int32 labels


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes per device of arrays, or of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def memory_of(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Returns the bytes per device of arguments, and of temporaries and outputs that do not reuse donated arguments."""
    memory, kinds = compiled.memory_analysis(), ("argument", "temp", "output", "alias")
    arguments, temporaries, outputs, donated = (getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
    return arguments, temporaries + outputs - donated
