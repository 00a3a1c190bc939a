"""`python -m vit_jax.compare DIR DIR …`: finished runs side by side, as a table that Markdown understands."""

import argparse
import datetime
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vit_jax.runtime.errors import UserError, parse_arguments, run_command

_TEST_SETTINGS = ("image size", "image mean", "image std", "test augment", "data directory")
"""Columns that are shown where the runs differ in them: their tests were not alike."""
_TEXTS = ("run", "trains", *_TEST_SETTINGS)
_COLUMNS: dict[str, Callable[[Any], str]] = {
    "run": str,
    "trains": str,
    **dict.fromkeys(_TEST_SETTINGS, str),
    "parameters": "{:,}".format,
    "seeds": str,
    "test accuracy": "{:.2%}".format,
    "±": "{:.2%}".format,
    "top 5": "{:.2%}".format,
    "pictures": "{:,}".format,
    "time": lambda seconds: str(datetime.timedelta(seconds=round(seconds))),
    "pictures/s": "{:,.0f}".format,
}
"""Column -> its value as text."""


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.compare", description=__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="folders of finished runs on the same test pictures")
    parser.add_argument("--join_seeds", action="store_true", help="one line for runs that differ in their seed alone")
    arguments = parse_arguments(parser, argv)
    print(format_table(compare_runs(arguments.workdirs, join_seeds=arguments.join_seeds)))
    return 0


def compare_runs(workdirs: Sequence[str | Path], *, join_seeds: bool = False) -> list[dict[str, Any]]:
    """What was trained, how well it did and what it took, run by run.

    With `join_seeds`, runs whose configs differ in `seed` alone are one row: means, the number of seeds, and under "±"
    the standard deviation of the test accuracy over them (n - 1; 0 of one).

    Time is that of training: evaluation, checkpoints and compilation are not in it, nor are stored features.

    Raises:
        UserError: a folder holds no finished run, or the runs were not tested on the same pictures.
    """
    from vit_jax import config as settings
    from vit_jax.training import writer
    from vit_jax.training.checkpoint import Checkpoints

    rows, tested, recipes = [], {}, []
    for workdir in map(Path, workdirs):
        with Checkpoints(workdir, read_only=True) as checkpoints:
            step = checkpoints.require_step()
            about: dict[str, Any] = checkpoints.read_metadata(step)
        config = settings.load_config(workdir, saved=about.get("config"))
        if step != config.num_steps:
            raise UserError(f"{workdir} is at step {step} of {config.num_steps}; compare finished runs")
        records, results = writer.read_results(workdir, step)
        keys = ("name", "test_split", "classes")
        tested[str(workdir)] = ", ".join(str(config.dataset[key]) for key in keys if config.dataset[key])
        lines = [record for record in records if "images_per_second" in record]
        speeds = sorted(line["images_per_second"] for line in lines)
        starts = [0, *(line["step"] for line in lines)]
        seconds = sum(
            (line["step"] - start) * config.batch_size / line["images_per_second"]
            for start, line in zip(starts, lines, strict=False)
        )
        test_settings = _test_settings(config)
        recipes.append(json.dumps({**config.to_dict(), "seed": None}, sort_keys=True))
        rows.append(
            {
                "run": workdir.name,
                "trains": config.trainable if isinstance(config.trainable, str) else ", ".join(config.trainable),
                **test_settings,
                "parameters": about["num_trainable"],
                "test accuracy": results["test/accuracy"],
                "top 5": results["test/accuracy_top5"],
                "pictures": config.num_steps * config.batch_size,
                "time": round(seconds),
                "pictures/s": speeds[len(speeds) // 2] if speeds else 0.0,
            }
        )
    if len(set(tested.values())) > 1:
        differences = "; ".join(f"{workdir}: {pictures}" for workdir, pictures in tested.items())
        raise UserError(f"the runs were tested on different pictures ({differences}); compare runs on the same")
    return _join_seeds(rows, recipes) if join_seeds else rows


def _test_settings(config: Any) -> dict[str, str]:
    """Returns what a run reads and how it preprocesses test images: the columns `_TEST_SETTINGS`."""
    data_dir = config.dataset.data_dir
    values = (
        str(config.image_size),
        ", ".join(f"{mean:g}" for mean in config.image_mean),
        ", ".join(f"{std:g}" for std in config.image_std),
        config.ablation.test_augment,
        str(Path(data_dir).resolve()) if data_dir else "default",
    )
    return dict(zip(_TEST_SETTINGS, values, strict=True))


def _join_seeds(rows: Sequence[dict[str, Any]], recipes: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each recipe, in the order of their first runs."""
    joined = []
    for recipe in dict.fromkeys(recipes):
        runs = [row for row, other in zip(rows, recipes, strict=True) if other == recipe]
        accuracies = [run["test accuracy"] for run in runs]
        means = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key not in _TEXTS}
        name = os.path.commonprefix([run["run"] for run in runs])
        seeds = {"seeds": len(runs), "±": statistics.stdev(accuracies) if len(runs) > 1 else 0.0}
        joined.append({**runs[0], **means, **seeds, "run": name.rstrip("-_") or name})
    return joined


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table that is aligned in plain text, too; test settings only where the rows differ in them."""
    alike = {name for name in _TEST_SETTINGS if len({row[name] for row in rows}) == 1}
    names = [name for name in _COLUMNS if name in rows[0] and name not in alike]
    cells = [[_COLUMNS[name](row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        padded = [
            value.ljust(width) if name in _TEXTS else value.rjust(width)
            for name, value, width in zip(names, values, widths, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if name in _TEXTS else "-" * (width - 1) + ":" for name, width in zip(names, widths, strict=True)
    ]
    return "\n".join([line(names), line(rule), *map(line, cells)])


if __name__ == "__main__":
    sys.exit(run_command(main))
