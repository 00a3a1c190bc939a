"""`python -m vit_jax.evaluate --workdir DIR`: test accuracy of a run from its folder alone, or of a file."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.runtime.errors import UsageError, UserError, parse_arguments, run_command
from vit_jax.types import Split


def main(argv: list[str] | None = None) -> int:
    """Evaluates a model over every test picture and prints the results."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run; with --dataset also a file, or its name")
    parser.add_argument("--step", type=int, help="which checkpoint; the latest unless given")
    parser.add_argument("--dataset", help="another one than the run's, such as folder:DIR or tfds:NAME")
    parser.add_argument("--test_split", help="of --dataset; test unless given")
    parser.add_argument("--data_dir", help="where the dataset lies, if no longer where the config says")
    parser.add_argument("--batch_size", type=int, default=256, help="pictures at once, with --dataset (256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parse_arguments(parser, argv)
    check_flags(arguments)

    from vit_jax import trainer

    if arguments.dataset is None:
        run = trainer.load_run(arguments.workdir, step=arguments.step)
        if arguments.data_dir is not None:
            run.config.dataset.data_dir = arguments.data_dir
        test = trainer.load_test_dataset(run).test
        facts, results = {"step": run.step}, trainer.evaluate_run(run, test=test)
        if run.config.ema_decay:
            raw = trainer.load_run(arguments.workdir, step=run.step, use_ema=False)
            results |= trainer.evaluate_run(raw, test=test, prefix="test_raw")
    else:
        facts, results = evaluate_on_dataset(arguments)
    if arguments.json:
        print(json.dumps({**facts, **results}))
    else:
        print("\n".join(f"{name:<22}{value}" for name, value in facts.items()))
        print("\n".join(f"{name:<22}{value:.4f}" for name, value in results.items()))
    return 0


def is_run(workdir: str) -> bool:
    """Whether this is a run's folder, and not a file or a name."""
    return (Path(workdir) / "checkpoints").is_dir()


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuses flags that do not go together."""
    from vit_jax.pretrained import is_name

    if arguments.dataset is None and (Path(arguments.workdir).is_file() or is_name(arguments.workdir)):
        raise UsageError(f"--workdir {arguments.workdir} is no run: give the --dataset to evaluate it on")
    if arguments.dataset is None and arguments.test_split is not None:
        raise UsageError("--test_split is of --dataset: give both, or neither for the run's own")
    if arguments.step is not None and arguments.dataset is not None and not is_run(arguments.workdir):
        raise UsageError("--step is of a run; a file holds one model")
    if arguments.batch_size < 1:
        raise UsageError(f"--batch_size is {arguments.batch_size}; expected at least 1")


def evaluate_on_dataset(arguments: argparse.Namespace) -> tuple[dict[str, int], dict[str, float]]:
    """What the command prints of any model and any dataset of classes that it knows: counts, and results."""
    import jax

    import vit_jax
    from vit_jax import data, trainer
    from vit_jax.classifier import require_trained_head
    from vit_jax.runtime import sharding

    workdir = arguments.workdir
    model: Any = trainer.load_run(workdir, step=arguments.step) if is_run(workdir) else vit_jax.load(workdir)
    require_trained_head(model, workdir)
    test, class_names = data.load_split(
        arguments.dataset,
        data_dir=arguments.data_dir or "",
        split=arguments.test_split or "test",
        image_size=model.image_size,
        device_bytes=sharding.device_memory(jax.local_devices()[0])[0],
    )
    columns = match_classes(class_names, model.class_names)
    results = evaluate_split(
        model, dataclasses.replace(test, labels=columns[test.labels]), batch_size=arguments.batch_size
    )
    return {"pictures": len(test), "classes": len(class_names)}, results


def match_classes(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Where a model has a dataset's classes.

    Args:
        names: of the dataset's classes, each a name or, of ImageNet's, WordNet's number.
        known: of the model's, in either form.

    Returns:
        int32 [classes of the dataset]: column of the logits.

    Raises:
        UserError: the model does not know some of them.
    """
    from vit_jax import pretrained

    columns = {pretrained.canonical_name(name): column for column, name in enumerate(known)}
    unknown = [name for name in names if pretrained.canonical_name(name) not in columns]
    if unknown:
        few = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise UserError(
            f"the model does not know {len(unknown)} of the dataset's {len(names)} classes: {few}; "
            f"it knows {len(known)}, such as {', '.join(known[:5])}"
        )
    return np.array([columns[pretrained.canonical_name(name)] for name in names], np.int32)


def evaluate_split(classifier: Any, split: Split, *, batch_size: int) -> dict[str, float]:
    """Loss and accuracy over pictures, each counted exactly once; every class of the model may be the answer.

    Args:
        classifier: of `vit_jax.load`.
        split: its labels are columns of the logits.
        batch_size: a wish; rounded up to the devices.
    """
    from vit_jax import trainer
    from vit_jax.runtime import sharding
    from vit_jax.training import metrics, steps
    from vit_jax.training.job import create_evaluate

    mesh = sharding.create_mesh()
    params = sharding.device_put(classifier.params, sharding.replicated(mesh))
    forward = steps.image_forward(
        classifier.model,
        image_size=classifier.image_size,
        mean=classifier.image_mean,
        std=classifier.image_std,
    )
    evaluate = create_evaluate(forward, split, mesh, batch_size=batch_size)
    return metrics.means(trainer.fetch(evaluate(params)))


if __name__ == "__main__":
    sys.exit(run_command(main))
