"""Evaluate a fine-tuned run, or any classifier on any dataset."""

from vit_jax.runtime.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before JAX is imported

import argparse
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


def main(argv: list[str] | None = None) -> int:
    """Evaluates a model on every test image and prints the results."""
    parser = create_parser(
        "python -m vit_jax.evaluate",
        "Evaluate a run on its test split, or a run or pretrained checkpoint on any dataset that has its classes.",
        "--workdir runs/digits",
        "--model imagenet21k+imagenet2012/ViT-B_16 --dataset folder:DIR --test_split test",
    )
    add_model_arguments(parser)
    parser.add_argument("--dataset", help="such as folder:DIR or tfds:NAME (default: the run's)")
    parser.add_argument("--test_split", help="split of --dataset (default: test)")
    parser.add_argument("--data_dir", metavar="DIR", help="directory of the dataset, if it has moved since training")
    parser.add_argument("--batch_size", type=int, default=256, help="images per batch, with --dataset (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parse_arguments(parser, argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size is {arguments.batch_size}; expected a positive integer")
    if arguments.test_split and not arguments.dataset:
        parser.error("--test_split requires --dataset; give both, or neither for the run's own")
    if not arguments.dataset and (pretrained.is_name(arguments.model) or Path(arguments.model).is_file()):
        parser.error(f"{arguments.model} is a checkpoint, not a run; give --dataset as well")
    facts, results = evaluate_on_dataset(arguments) if arguments.dataset else evaluate_run(arguments)
    if arguments.json:
        print(json.dumps({**facts, **results}))
    else:
        print("\n".join(f"{name:<22}{value}" for name, value in facts.items()))
        print("\n".join(f"{name:<22}{value:.4f}" for name, value in results.items()))
    return 0


def evaluate_run(arguments: argparse.Namespace) -> tuple[dict[str, int], dict[str, float]]:
    """Evaluates a run on its test split, also without EMA if it has EMA parameters; returns step and results."""
    run = load_run(arguments.model, step=arguments.step)
    split = run.load_test_split(arguments.data_dir)
    results = run.evaluate(split)
    if run.config.ema_decay:
        results |= load_run(arguments.model, step=run.step, use_ema=False).evaluate(split, prefix="test_raw")
    return {"step": run.step}, results


def evaluate_on_dataset(arguments: argparse.Namespace) -> tuple[dict[str, int], dict[str, float]]:
    """Evaluates a model on a dataset whose classes are a subset of the model's; returns counts and results."""
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
    results = model.evaluate(split, batch_size=arguments.batch_size)
    return {"images": len(split), "classes": len(class_names)}, results


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
