"""Fine-tune Google's Vision Transformers from the files Google released."""

import os
from typing import Any

__version__ = "0.1.0"


def load(source: str | os.PathLike[str]) -> Any:
    """A model that is ready for use: `load("runs/digits").predict(images)`.

    Args:
        source: the folder of a run, what `export` wrote, a released file by name or path, or a folder of Hugging Face's
            `ViTForImageClassification`.

    Returns:
        A `vit_jax.classifier.Classifier`: `predict(images)`, `params`, `class_names`, `model`; of a run, a
        `vit_jax.trainer.Run`.

    Raises:
        UserError: there is no model, or it cannot be read.
    """
    from pathlib import Path

    source = os.fspath(source)
    if (Path(source) / "checkpoints").is_dir():
        from vit_jax import trainer

        return trainer.load_run(source)
    from vit_jax import classifier

    return classifier.load_exported(source)
