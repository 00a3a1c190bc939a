"""Facts of a run that its checkpoints hold, besides its arrays."""

import dataclasses
from typing import Any

from vit_jax.data import DatasetFingerprint
from vit_jax.pretrained import ModelMetadata
from vit_jax.runtime.errors import UserError
from vit_jax.types import Json


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Facts of a run.

    Attributes:
        model: metadata of the model.
        config: as JSON values.
        dataset: fingerprint of the dataset.
        storage: "memory" or "stream": where the images are.
        num_trainable: number of trainable parameters.
        command: that started the run.
        custom: which of "dataset", "augment" and "optimizer" were given from Python and are not in the config.
        metrics_checksum: of metrics.jsonl up to the step of the checkpoint.
    """

    model: ModelMetadata
    config: dict[str, Any]
    dataset: DatasetFingerprint
    storage: str
    num_trainable: int
    command: str
    custom: tuple[str, ...] = ()
    metrics_checksum: str = ""

    def to_json(self) -> dict[str, Json]:
        """Returns JSON values, for `from_json`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"model": self.model.to_json(), "dataset": self.dataset.to_json(), "custom": list(self.custom)}
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunInfo":
        """Returns what `to_json` gave.

        Raises:
            UserError: it was written by another version, or is damaged.
        """
        try:
            parts: dict[str, Any] = {
                "model": ModelMetadata.from_json(values["model"]),
                "dataset": DatasetFingerprint.from_json(values["dataset"]),
                "custom": tuple(values["custom"]),
            }
            return cls(**{**values, **parts})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint is of another version of vit_jax (no {error}); train again in another --workdir"
            ) from error
