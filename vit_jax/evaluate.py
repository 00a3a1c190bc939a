"""Evaluate a fine-tuned run, or any classifier on any dataset."""

from vit_jax.runtime.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before JAX is imported

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import vit_jax
from vit_jax import data, pretrained
from vit_jax.run import load_run
from vit_jax.runtime import sharding
from vit_jax.runtime.arguments import add_model_arguments, create_parser, parse_arguments
from vit_jax.runtime.errors import UserError, run_command
from vit_jax.runtime.files import atomic_path
from vit_jax.training.evaluation import ClassScores, Evaluation, select_classes
from vit_jax.types import Split


def main(argv: list[str] | None = None) -> int:
    """Evaluates a model on every test image and prints the results."""
    parser = create_parser(
        "python -m vit_jax.evaluate",
        "Evaluate a run on its test split, or a run or pretrained checkpoint on any dataset that has its classes.",
        "--workdir runs/digits",
        "--workdir runs/digits --json --csv predictions.csv",
        "--model imagenet21k+imagenet2012/ViT-B_16 --dataset folder:DIR --test_split test",
    )
    add_model_arguments(parser)
    parser.add_argument("--dataset", help="such as folder:DIR or tfds:NAME (default: the run's)")
    parser.add_argument("--test_split", help="split of --dataset (default: test)")
    parser.add_argument("--data_dir", metavar="DIR", help="directory of the dataset, if it has moved since training")
    parser.add_argument("--batch_size", type=int, default=256, help="images per batch, with --dataset (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--csv", metavar="FILE", help="write the true class and the probabilities of each image")
    arguments = parse_arguments(parser, argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size is {arguments.batch_size}; expected a positive integer")
    if arguments.test_split and not arguments.dataset:
        parser.error("--test_split requires --dataset; give both, or neither for the run's own")
    if not arguments.dataset and (pretrained.is_name(arguments.model) or Path(arguments.model).is_file()):
        parser.error(f"{arguments.model} is a checkpoint, not a run; give --dataset as well")
    if arguments.csv and not Path(arguments.csv).absolute().parent.is_dir():
        parser.error(f"--csv: {Path(arguments.csv).parent} is not a directory; create it, or give another path")
    facts, split, evaluation, raw = evaluate_on_dataset(arguments) if arguments.dataset else evaluate_run(arguments)
    if arguments.csv:
        write_predictions(Path(arguments.csv), split, evaluation)
    results = {**evaluation.summary(), **raw}
    if arguments.json:
        classes = [dataclasses.asdict(scores) for scores in evaluation.class_scores]
        print(json.dumps({**facts, **results, "per_class": classes}, ensure_ascii=False))
    else:
        print("\n".join(f"{name:<26}{value}" for name, value in facts.items()))
        print("\n".join(f"{name:<26}{_format_result(value)}" for name, value in results.items()))
        print(f"\n{format_classes(evaluation.class_scores)}")
    return 0


def _format_result(value: float | Sequence[float]) -> str:
    return f"{value:.4f}" if isinstance(value, float) else " to ".join(f"{end:.4f}" for end in value)


def _shorten(text: str, width: int = 40) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def format_classes(scores: Sequence[ClassScores]) -> str:
    """Formats an aligned table of the classes that `select_classes` selects."""
    shown = select_classes(scores)
    rows = [row.cells() for row in shown]
    columns = []
    for title in rows[0] if rows else ():
        texts = [title, *(_shorten(row[title]) for row in rows)]
        width, is_text = max(map(len, texts)), title in ("class", "most frequent error")
        columns.append([text.ljust(width) if is_text else text.rjust(width) for text in texts])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    if len(shown) < len(scores):
        lines.append(f"({len(shown)} of {len(scores):,} classes, those with the lowest F1; --json prints all)")
    return "\n".join(lines)


Measured = tuple[dict[str, int], Split, Evaluation, dict[str, float]]
"""Step or numbers of images and classes; test split; its evaluation; results without EMA, if any."""


def evaluate_run(arguments: argparse.Namespace) -> Measured:
    """Evaluates a run on its test split, also without EMA if it has EMA parameters; calibrates on validation images."""
    run = load_run(arguments.model, step=arguments.step)
    split = run.load_test_split(arguments.data_dir)
    validation = run.load_validation_split(arguments.data_dir)
    evaluation = run.measure(split, validation=validation)
    raw = {}
    if run.config.ema_decay:
        raw = load_run(arguments.model, step=run.step, use_ema=False).evaluate(split, prefix="test_raw")
    facts = {"step": run.step, "images": len(split), "classes": len(run.class_names)}
    return facts | ({} if validation is None else {"validation_images": len(validation)}), split, evaluation, raw


def evaluate_on_dataset(arguments: argparse.Namespace) -> Measured:
    """Evaluates a model on a dataset whose classes are a subset of the model's."""
    model = vit_jax.load(arguments.model, step=arguments.step)
    model.require_trained_head(arguments.model)
    split, class_names = data.load_split(
        arguments.dataset,
        data_dir=arguments.data_dir or "",
        split=arguments.test_split or "test",
        image_size=model.image_size,
        test_resize=model.metadata.test_resize,
        device_bytes=sharding.device_memory(jax.local_devices()[0])[0],
    )
    columns = match_classes(class_names, model.class_names)
    split = dataclasses.replace(split, labels=columns[split.labels])
    evaluation = model.measure(split, batch_size=arguments.batch_size)
    evaluation = dataclasses.replace(evaluation, classes=tuple(columns.tolist()))
    return {"images": len(split), "classes": len(class_names)}, split, evaluation, {}


def write_predictions(path: Path, split: Split, evaluation: Evaluation) -> None:
    """Writes a CSV file with one line per image: path or row number, true class, predicted class, probabilities."""
    names = evaluation.class_names
    images = range(len(split)) if split.paths is None else split.paths
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "true", "predicted", *(f"p({name})" for name in names)])
        rows = zip(images, evaluation.labels, evaluation.predictions, evaluation.probabilities, strict=True)
        for image, label, prediction, probabilities in rows:
            writer.writerow([image, names[label], names[prediction], *(f"{value:.9g}" for value in probabilities)])


def match_classes(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Returns the logit index of each of the dataset's classes, int32 [classes of the dataset].

    ImageNet classes match by name or by WordNet ID.
    """
    columns = {pretrained.canonical_name(name): column for column, name in enumerate(known)}
    unknown = [name for name in names if pretrained.canonical_name(name) not in columns]
    if unknown:
        few = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise UserError(
            f"the model lacks {len(unknown)} of the dataset's {len(names)} classes: {few}; "
            f"it has {len(known)}, such as {', '.join(known[:5])}; use a dataset with only these classes"
        )
    return np.array([columns[pretrained.canonical_name(name)] for name in names], np.int32)


if __name__ == "__main__":
    sys.exit(run_command(main))
