"""Metadata of a run, saved in its checkpoints."""

import dataclasses
from typing import Any

from vit_jax.data import DatasetFingerprint
from vit_jax.pretrained import ModelMetadata
from vit_jax.runtime.errors import UserError
from vit_jax.types import Json


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Metadata of a run."""

    model: ModelMetadata
    config: dict[str, Any]
    dataset: DatasetFingerprint
    storage: str  # "memory" or "stream": where the images are
    num_trainable: int  # parameters
    command: str  # that started the run
    custom: tuple[str, ...] = ()  # those of "dataset", "augment" and "optimizer" that were given from Python
    metrics_checksum: str = ""  # of metrics.jsonl up to the step of the checkpoint
    stale_evaluations: int = 0  # evaluations since the best accuracy

    def is_finished(self, step: int) -> bool:
        """Returns True if the run ended at this step: the last one, or that of early stopping."""
        patience: int = self.config.get("early_stopping_patience", 0)
        num_steps: int = self.config["num_steps"]
        return step == num_steps or 0 < patience <= self.stale_evaluations

    def count_evaluation(self, accuracy: float, *, best: float | None) -> "RunInfo":
        """Returns the metadata after an evaluation, given the best accuracy before it."""
        improved = best is None or accuracy > best
        return dataclasses.replace(self, stale_evaluations=0 if improved else self.stale_evaluations + 1)

    def to_json(self) -> dict[str, Json]:
        """Returns the fields as JSON values."""
        parts = {"model": self.model.to_json(), "dataset": self.dataset.to_json(), "custom": list(self.custom)}
        return {**vars(self), **parts}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunInfo":
        """Inverts `to_json`; raises UserError for values of another version."""
        try:
            parts: dict[str, Any] = {
                "model": ModelMetadata.from_json(values["model"]),
                "dataset": DatasetFingerprint.from_json(values["dataset"]),
                "custom": tuple(values["custom"]),
            }
            return cls(**(values | parts))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint is of another version of vit_jax ({error}); train again in another --workdir"
            ) from error
