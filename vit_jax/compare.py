"""`python -m vit_jax.compare DIR DIR …`: prints a Markdown table of finished runs, paired tests and curves of them."""

from vit_jax.runtime.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before JAX is imported

import dataclasses
import datetime
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vit_jax.config import load_config
from vit_jax.config.keys import KEYS, flatten
from vit_jax.run import load_run
from vit_jax.runtime.arguments import create_parser, parse_arguments
from vit_jax.runtime.errors import UserError, run_command
from vit_jax.runtime.files import write_atomically
from vit_jax.training import significance, writer
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.run_info import RunInfo
from vit_jax.training.significance import Comparison, Interval
from vit_jax.types import Split
from vit_jax.visualization import plotting

# Keys that change the results of a run by rounding at most; another data_dir may have other images.
_IGNORED = tuple(key.name for key in KEYS if key.resumable and key.name != "dataset.data_dir")


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished run, or the mean over runs that differ only in their seed."""

    run: str  # name of its directory
    workdirs: tuple[Path, ...]
    config: ConfigDict
    test_images: tuple[str, ...]  # dataset, split and classes
    num_test: int  # images
    num_classes: int
    num_trainable: int  # parameters
    results: dict[str, float]  # of the evaluation after the last step
    seconds: float  # of training, without evaluation, checkpoints, compilation and the caching of features
    images_per_second: float  # median
    num_seeds: int = 0  # 0 if not averaged
    accuracy_std: float = 0.0  # sample std of the test accuracy over seeds; 0 for one seed
    seed_interval: Interval | None = None  # 95% interval of the mean accuracy over seeds; None for one seed

    def cells(self) -> dict[str, str]:
        """Returns {column title: text}."""
        trainable = self.config.trainable
        time = datetime.timedelta(seconds=round(self.seconds))
        return {
            "run": self.run,
            "trainable": trainable if isinstance(trainable, str) else ", ".join(trainable),
            **_test_settings(self.config),
            "parameters": f"{self.num_trainable:,}",
            **({"seeds": str(self.num_seeds)} if self.num_seeds else {}),
            "validation accuracy": f"{self.results['validation/accuracy']:.2%}" if self.has_validation else "–",
            "test accuracy": f"{self.results['test/accuracy']:.2%}",
            **({"±": f"{self.accuracy_std:.2%}"} if self.num_seeds else {}),
            "95% interval": _format_interval(self.interval),
            "top-5 accuracy": f"{self.results['test/accuracy_top5']:.2%}" if self.num_classes > 5 else "–",
            "images": f"{self.results['step'] * self.config.batch_size:,.0f}",
            "time": f"{self.seconds:.1f} s" if self.seconds < 60 else str(time),
            "images/s": f"{self.images_per_second:,.0f}",
        }

    @property
    def has_validation(self) -> bool:
        """True if the runs were evaluated on validation images, and on test images only after the last step."""
        return "validation/accuracy" in self.results

    @property
    def interval(self) -> Interval | None:
        """95% interval of the test accuracy: of the mean over seeds, or of one run over test images."""
        if self.num_seeds:
            return self.seed_interval
        return significance.wilson_interval(round(self.results["test/accuracy"] * self.num_test), self.num_test)


def _format_interval(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval[0]:.2%} to {interval[1]:.2%}"


def main(argv: list[str] | None = None) -> int:
    """Prints the table and, with `--paired`, the differences to the first row."""
    parser = create_parser(
        "python -m vit_jax.compare",
        "Print a Markdown table of finished runs, and tests of their differences.",
        "runs/cifar100-head runs/cifar100-full --paired",
        "runs/digits-seed* --join_seeds --curves curves.png",
    )
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="finished run directories with the same test split")
    parser.add_argument("--join_seeds", action="store_true", help="average runs that differ only in their seed")
    parser.add_argument(
        "--paired",
        action="store_true",
        help="classify the test images with each run, and test the differences to the first row",
    )
    parser.add_argument("--data_dir", metavar="DIR", help="with --paired: dataset, if it has moved since training")
    parser.add_argument("--curves", metavar="PNG", help="write a figure of the accuracies over the steps")
    arguments = parse_arguments(parser, argv)
    if arguments.data_dir and not arguments.paired:
        parser.error("--data_dir requires --paired; the table is read from the run directories")
    rows = compare_runs(arguments.workdirs, join_seeds=arguments.join_seeds)
    if arguments.paired and len(rows) < 2:
        parser.error(f"--paired got {len(rows)} row; expected at least two to compare: give more runs")
    print(format_table(rows))
    if arguments.curves:
        write_curves(rows, Path(arguments.curves))
    if arguments.paired:
        print(f"\n{format_comparisons(rows, compare_correctness(rows, data_dir=arguments.data_dir))}")
    return 0


def write_curves(rows: Sequence[Row], path: Path) -> None:
    """Writes a figure of the accuracy of each row over the steps: the mean over its runs.

    The accuracy is that on validation if all rows have it, as test images are then used once; otherwise on test.
    """
    name = "validation/accuracy" if all(row.has_validation for row in rows) else "test/accuracy"
    unique = len({row.run for row in rows}) == len(rows)
    records: dict[str, list[writer.Record]] = {}
    for row in rows:
        measured: dict[int, list[float]] = {}  # accuracies of all runs by step
        for workdir in row.workdirs:
            for record in writer.read_records(workdir / "metrics.jsonl"):
                if name in record:
                    measured.setdefault(int(record["step"]), []).append(record[name])
        records[row.run if unique else str(row.workdirs[0])] = [
            {"step": step, name: statistics.mean(accuracies)}
            for step, accuracies in measured.items()
            if len(accuracies) == len(row.workdirs)
        ]
    write_atomically(path, plotting.to_png(plotting.plot_accuracies(records, name=name)))


def compare_correctness(rows: Sequence[Row], *, data_dir: str | None = None) -> list[Comparison]:
    """Classifies the test images with the runs of each row, and compares all rows with the first.

    Raises:
        UserError: a dataset cannot be read, or the runs have other test images or labels.
    """
    first: Split | None = None
    correct: list[np.ndarray] = []  # [runs n] of each row
    for row in rows:
        runs = []
        for workdir in row.workdirs:
            run = load_run(workdir)
            split = run.load_test_split(data_dir)
            first = first or split
            if not _has_same_images(split, first):
                raise UserError(
                    f"{workdir} has other test images or labels than {rows[0].workdirs[0]}, or another order; "
                    "compare runs with the same test split"
                )
            runs.append(run.measure(split).predictions == split.labels)
        correct.append(np.stack(runs))
    return [significance.compare_correctness(others, correct[0]) for others in correct[1:]]


def _has_same_images(split: Split, other: Split) -> bool:
    ids = [np.array([]) if ids is None else ids for ids in (split.ids, other.ids)]
    return np.array_equal(split.labels, other.labels) and np.array_equal(ids[0], ids[1])


def format_comparisons(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """Formats the comparisons of all rows with the first, one line each."""
    lines = [f"differences to {rows[0].run} on the same {rows[0].num_test:,} test images:"]
    lines += [f"{row.run}: {comparison}" for row, comparison in zip(rows[1:], comparisons, strict=True)]
    if any(comparison.one_seed for comparison in comparisons):
        lines.append("with one seed, the noise between seeds is unknown; train several seeds and add --join_seeds")
    return "\n".join(lines)


def compare_runs(workdirs: Sequence[str | Path], *, join_seeds: bool = False) -> list[Row]:
    """Reads finished runs with the same test images; `join_seeds` averages runs that differ only in their seed."""
    rows = [read_row(Path(workdir)) for workdir in workdirs]
    if any(row.test_images != rows[0].test_images for row in rows):
        tested = "; ".join(
            f"{workdir}: {', '.join(row.test_images)}" for workdir, row in zip(workdirs, rows, strict=True)
        )
        raise UserError(f"the runs were tested on different images ({tested}); compare runs with the same test split")
    if not join_seeds:
        return rows
    groups: dict[str, list[Row]] = {}
    for row in rows:
        keys = flatten(row.config.to_dict())
        compared = {name: value for name, value in keys.items() if name not in ("seed", *_IGNORED)}
        groups.setdefault(json.dumps(compared, sort_keys=True), []).append(row)
    for group in groups.values():
        seeds = [row.config.seed for row in group]
        if len({*seeds}) < len(seeds):
            names = ", ".join(str(row.workdirs[0]) for row in group if seeds.count(row.config.seed) > 1)
            raise UserError(
                f"{names} have the same config and seed; expected one run of each seed: leave out the others"
            )
    return [_mean(group) for group in groups.values()]


def read_row(workdir: Path) -> Row:
    """Reads a finished run without its parameters; raises UserError if it is unfinished or damaged."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.require_step()
        info = RunInfo.from_json(checkpoints.read_metadata(step))
    config = load_config(workdir, saved=info.config)
    if not info.is_finished(step):
        raise UserError(f"{workdir} is at step {step} of {config.num_steps}; expected a finished run")
    records, results = writer.read_results(workdir, step, info.metrics_checksum)
    lines = [record for record in records if "images_per_second" in record]
    speeds = [line["images_per_second"] for line in lines]
    steps = np.diff([line["step"] for line in lines], prepend=0)
    test_images = tuple(str(config.dataset[key]) for key in ("name", "test_split", "classes"))
    if config.dataset.name.startswith(("folder:", "csv:")):  # their test split may be made
        test_images += tuple(f"{key} {config.dataset[key]}" for key in ("test_fraction", "split_seed"))
    if "dataset" in info.custom:
        test_images = ("given from Python", f"{info.dataset.num_test:,} images", str(info.dataset.class_names))
    return Row(
        run=workdir.name,
        workdirs=(workdir,),
        config=config,
        test_images=test_images,
        num_test=info.dataset.num_test,
        num_classes=len(info.dataset.class_names),
        num_trainable=info.num_trainable,
        results=results,
        seconds=sum(number * config.batch_size / speed for number, speed in zip(steps, speeds, strict=True)),
        images_per_second=statistics.median_high(speeds) if speeds else 0.0,
    )


def _mean(rows: Sequence[Row]) -> Row:
    """Returns the mean over seeds, named after the common prefix of the runs."""
    accuracies = [row.results["test/accuracy"] for row in rows]
    return dataclasses.replace(
        rows[0],
        run=os.path.commonprefix([row.run for row in rows]).rstrip("-_") or rows[0].run,
        workdirs=tuple(workdir for row in rows for workdir in row.workdirs),
        results={key: statistics.mean(row.results[key] for row in rows) for key in rows[0].results},
        seconds=statistics.mean(row.seconds for row in rows),
        images_per_second=statistics.mean(row.images_per_second for row in rows),
        num_seeds=len(rows),
        accuracy_std=statistics.stdev(accuracies) if len(rows) > 1 else 0.0,
        seed_interval=significance.mean_interval(accuracies),
    )


def _test_settings(config: ConfigDict) -> dict[str, str]:
    """Returns {column title: text} of the settings that affect test images."""
    data_dir = config.dataset.data_dir
    return {
        "image size": str(config.image_size),
        "image mean": ", ".join(f"{mean:g}" for mean in config.image_mean),
        "image std": ", ".join(f"{std:g}" for std in config.image_std),
        "test resize": config.dataset.test_resize,
        "test augment": config.ablation.test_augment,
        "data directory": str(Path(data_dir).resolve()) if data_dir else "default",
    }


def format_table(rows: Sequence[Row]) -> str:
    """Formats an aligned Markdown table without empty columns and without test settings that are equal in all rows."""
    settings = _test_settings(rows[0].config).keys()
    cells = [row.cells() for row in rows]
    columns = []
    for title in cells[0]:
        texts = [title, *(row[title] for row in cells)]
        width, is_text = max(map(len, texts)), title in ("run", "trainable", *settings)
        if set(texts[1:]) == {"–"} or (title in settings and len(set(texts[1:])) == 1):
            continue
        texts.insert(1, "-" * width if is_text else "-" * (width - 1) + ":")
        columns.append([text.ljust(width) if is_text else text.rjust(width) for text in texts])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


if __name__ == "__main__":
    sys.exit(run_command(main))
