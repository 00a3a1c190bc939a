"""Stand-in for the module of the same name that replaces `trainer.load_run`; take the other one when merging."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vit_jax import trainer
from vit_jax.training import steps
from vit_jax.training.program import test_options
from vit_jax.types import Json, Split


class Metadata(dict[str, Any]):
    """Metadata of the model, without the run's: read by key, as today, and by attribute."""

    def __getattr__(self, name: str) -> Any:
        """Returns the value of a key."""
        return self[name]

    def to_json(self) -> dict[str, Json]:
        """Returns JSON values."""
        return dict(self)


@dataclasses.dataclass(frozen=True)
class Run(trainer.Run):
    """A finished or interrupted run."""

    workdir: Path

    @property
    def info(self) -> Any:
        """Returns metadata of the run."""
        values = {**self.about, "dataset": types.SimpleNamespace(**self.about["dataset"])}
        return types.SimpleNamespace(**values)

    @property
    def metadata(self) -> Any:
        """Returns metadata of the model."""
        skipped = ("storage", "dataset", "command", "num_trainable", "config")
        return Metadata({key: value for key, value in self.about.items() if key not in skipped})

    def predict(self, images: Any, *, batch_size: int = 256) -> np.ndarray:
        """Returns float32 [n classes]: probabilities."""
        return trainer.predict(self, images)

    def preprocess(self, images: np.ndarray) -> np.ndarray:
        """Returns float32 [n s s 3]: model inputs."""
        forward = steps.image_forward(self.model, **{**test_options(self.config), "test_augment": "none"})
        keys = jnp.zeros((len(images), 2), jnp.uint32)
        return np.asarray(forward.prepare(keys, jnp.asarray(images)))

    def load_test_split(self, data_dir: str | None = None) -> Split:
        """Returns the test split."""
        if data_dir is not None:
            self.config.dataset.data_dir = data_dir
        return trainer.load_test_dataset(self).test

    def evaluate(self, split: Split | None = None) -> dict[str, float]:
        """Returns the results."""
        return trainer.evaluate_run(self, test=split)


def load_run(workdir: str | Path, *, step: int | None = None, use_ema: bool = True) -> Run:
    """Loads a run from its directory."""
    run = trainer.load_run(workdir, step=step, use_ema=use_ema)
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return Run(**fields, workdir=Path(workdir))
