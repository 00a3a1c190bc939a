"""Evaluate a fine-tuned run, or any classifier on any dataset."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

import jax
import numpy as np

import vit_jax
from vit_jax import data, pretrained
from vit_jax.run import load_run
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError, parse_arguments, run_command


def main(argv: list[str] | None = None) -> int:
    """Evaluates a model on every test image and prints the results."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="run directory; with --dataset also a checkpoint or its name")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    parser.add_argument("--dataset", help="another dataset than the run's, such as folder:DIR or tfds:NAME")
    parser.add_argument("--test_split", help="split of --dataset (default: test)")
    parser.add_argument("--data_dir", help="where the dataset is, if no longer where the config says")
    parser.add_argument("--batch_size", type=int, default=256, help="images at once, with --dataset (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parse_arguments(parser, argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size is {arguments.batch_size}; expected a positive integer")
    if arguments.test_split and not arguments.dataset:
        parser.error("--test_split requires --dataset; give both, or neither for the run's own")
    facts, results = evaluate_on_dataset(arguments) if arguments.dataset else evaluate_run(arguments)
    if arguments.json:
        print(json.dumps({**facts, **results}))
    else:
        print("\n".join(f"{name:<22}{value}" for name, value in facts.items()))
        print("\n".join(f"{name:<22}{value:.4f}" for name, value in results.items()))
    return 0


def evaluate_run(arguments: argparse.Namespace) -> tuple[dict[str, int], dict[str, float]]:
    """Returns the step of a run and the results on its test split, without EMA as well where EMA is kept."""
    run = load_run(arguments.workdir, step=arguments.step)
    split = run.load_test_split(arguments.data_dir)
    results = run.evaluate(split)
    if run.config.ema_decay:
        results |= load_run(arguments.workdir, step=run.step, use_ema=False).evaluate(split, prefix="test_raw")
    return {"step": run.step}, results


def evaluate_on_dataset(arguments: argparse.Namespace) -> tuple[dict[str, int], dict[str, float]]:
    """Returns counts and results of any model on any dataset whose classes it has."""
    workdir = arguments.workdir
    model = load_run(workdir, step=arguments.step) if arguments.step is not None else vit_jax.load(workdir)
    model.require_trained_head(workdir)
    split, class_names = data.load_split(
        arguments.dataset,
        data_dir=arguments.data_dir or "",
        split=arguments.test_split or "test",
        image_size=model.image_size,
        device_bytes=sharding.device_memory(jax.local_devices()[0])[0],
    )
    columns = match_classes(class_names, model.class_names)
    split = dataclasses.replace(split, labels=columns[split.labels])
    results = model.evaluate(split, batch_size=arguments.batch_size)
    return {"images": len(split), "classes": len(class_names)}, results


def match_classes(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Returns the columns of a model's logits that belong to a dataset's classes, int32 [classes of the dataset].

    Classes of ImageNet are found by name or by WordNet ID on either side.
    """
    columns = {pretrained.canonical_name(name): column for column, name in enumerate(known)}
    unknown = [name for name in names if pretrained.canonical_name(name) not in columns]
    if unknown:
        few = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise UserError(
            f"the model lacks {len(unknown)} of the dataset's {len(names)} classes: {few}; "
            f"it has {len(known)}, such as {', '.join(known[:5])}; evaluate it on a dataset of these"
        )
    return np.array([columns[pretrained.canonical_name(name)] for name in names], np.int32)


if __name__ == "__main__":
    sys.exit(run_command(main))
