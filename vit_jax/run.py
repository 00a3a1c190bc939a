"""Loads finished or interrupted runs from their directories."""

import dataclasses
from pathlib import Path
from typing import Literal

from ml_collections import ConfigDict

from vit_jax.classifier import Classifier
from vit_jax.config import load_config
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError
from vit_jax.training import device_fit, experiment, lora
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.evaluation import Evaluation
from vit_jax.training.run_info import RunInfo
from vit_jax.types import Split


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Run(Classifier):
    """A finished or interrupted run: a classifier with its config.

    Attributes:
        workdir: run directory.
        config: the config that the run was trained with.
        step: training step of the checkpoint.
        info: metadata of the checkpoint, such as the fingerprint of the dataset.
    """

    workdir: Path
    config: ConfigDict
    step: int
    info: RunInfo

    def evaluate(
        self, split: Split | None = None, *, batch_size: int | None = None, prefix: str = "test"
    ) -> dict[str, float]:
        """Evaluates as `Classifier.evaluate`, by default on the run's own test split."""
        split = self.load_test_split() if split is None else split
        return super().evaluate(split, batch_size=batch_size or self.config.eval_batch_size, prefix=prefix)

    def measure(
        self, split: Split | None = None, *, validation: Split | None = None, batch_size: int | None = None
    ) -> Evaluation:
        """Evaluates as `Classifier.measure`, by default on the run's own test split."""
        split = self.load_test_split() if split is None else split
        return super().measure(split, validation=validation, batch_size=batch_size or self.config.eval_batch_size)

    @property
    def dataset_given(self) -> bool:
        """True if the dataset was given from Python and cannot be loaded by name."""
        return "dataset" in self.info.custom

    def load_test_split(self, data_dir: str | None = None) -> Split:
        """Loads the test split of the run's config; see `load_split`."""
        return self.load_split("test", data_dir)

    def load_validation_split(self, data_dir: str | None = None) -> Split | None:
        """Loads the validation split of the run's config; returns None if it has none. See `load_split`."""
        return self.load_split("validation", data_dir) if self.info.dataset.validation_counts else None

    def load_split(self, name: str, data_dir: str | None = None) -> Split:
        """Loads a split of the run's config.

        Args:
            name: "train", "validation" or "test".
            data_dir: directory of the dataset; None uses that of the config.

        Raises:
            UserError: the dataset cannot be read, or its classes differ from the run's.
            UsageError: the run has no validation split.
        """
        if self.dataset_given:
            raise UserError(
                f"{self.workdir} was trained on a dataset given from Python; give its {name} split there: "
                "vit_jax.load(workdir).evaluate(split) or vit_jax.report.write_report(workdir, split=split)"
            )
        config = self.config.copy_and_resolve_references()
        if data_dir is not None:
            config.dataset.data_dir = data_dir
        # A run that streamed its images is also evaluated from a stream; the pixels are the same.
        storage = "stream" if self.info.storage == "stream" else config.dataset.storage
        split, class_names = experiment.load_split(config, name, storage=storage)
        if class_names != self.class_names:
            ours, theirs = (
                f"{len(names)} classes ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
                for names in (self.class_names, class_names)
            )
            raise UserError(
                f"the run has {ours}, the dataset {theirs}; give the --data_dir that the run was trained on"
            )
        return split


def load_run(workdir: str | Path, *, step: int | Literal["best"] | None = None, use_ema: bool = True) -> Run:
    """Loads a run from its directory; raises UserError if the checkpoint is missing or damaged.

    `step` defaults to the latest; for "best" see `Checkpoints.best_step`. With `use_ema`, the EMA parameters are loaded
    if the run has them.
    """
    workdir, mesh = Path(workdir), sharding.create_mesh()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.require_step(step)
        params, metadata = checkpoints.restore_params(step, sharding.replicated(mesh), use_ema=use_ema)
    info = RunInfo.from_json(metadata)
    config = load_config(workdir, saved=info.config)
    params = lora.merge_lora_weights(params, alpha=config.lora.alpha)
    info.model.validate(params)
    model = info.model.create_model()
    if config.model.get("attention") == "cudnn" and device_fit.can_use_cudnn(mesh.devices.flat[0], model.dtype):
        model = model.clone(attention="cudnn")
    return Run(
        model=model,
        params=params,
        metadata=info.model,
        mesh=mesh,
        test_augment=config.ablation.test_augment,
        workdir=workdir,
        config=config,
        step=step,
        info=info,
    )
