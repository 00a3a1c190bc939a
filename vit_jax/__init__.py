"""Fine-tune Google's Vision Transformers, starting from the original `.npz` checkpoints.

The public API: `load` and the `Classifier` it returns, `trainer.train_and_evaluate`, `config.get_config`,
`models.VisionTransformer`, `models.ResNet`, `pretrained.load_npz`, `pretrained.save_npz`, `pretrained.adapt_params`,
`types.Dataset` and `types.Split`. Everything else is internal and may change between versions.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vit_jax.classifier import Classifier

__version__ = "0.2.0"


def load(
    source: str | os.PathLike[str], *, step: int | Literal["best"] | None = None, use_ema: bool = True
) -> "Classifier":
    """Loads a classifier: `load("runs/digits").predict(images)`.

    Args:
        source: a run directory, an export, a pretrained checkpoint by name or path, or a directory of Hugging Face's
            `ViTForImageClassification`.
        step: training step of the run's checkpoint to load; "best": the one with the highest accuracy on validation, or
            on test if the run has no validation images; None: the latest.
        use_ema: load the EMA parameters of a run that has them.

    Returns:
        A `vit_jax.classifier.Classifier`; for a run directory, a `vit_jax.run.Run`.

    Raises:
        UserError: there is no model, or it cannot be read.
        UsageError: `step` or `use_ema` is given for a model that is not a run.

    Examples:
        >>> import vit_jax
        >>> vit_jax.load("micro")
        Classifier(VisionTransformer, 32 px, 10 classes: airplane, automobile, bird, …)
    """
    path = Path(source)
    if (path / "checkpoints").is_dir():
        from vit_jax.run import load_run

        return load_run(path, step=step, use_ema=use_ema)
    if step is not None or not use_ema:
        from vit_jax.runtime.errors import UsageError

        raise UsageError(f"{source} is not a run directory; step and EMA apply only to runs")
    from vit_jax.classifier import load_classifier

    return load_classifier(os.fspath(source))
