"""`python -m vit_jax.report --workdir DIR`: writes DIR/report.html, one page with results, settings and figures."""

from vit_jax.runtime.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before JAX is imported

import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from vit_jax.compare import Row, read_row
from vit_jax.data import check_split
from vit_jax.run import Run, load_run
from vit_jax.runtime.arguments import create_parser, parse_arguments
from vit_jax.runtime.errors import UsageError, run_command
from vit_jax.runtime.files import write_atomically
from vit_jax.training.evaluation import ClassScores, Evaluation, select_classes
from vit_jax.training.writer import format_number
from vit_jax.types import Split
from vit_jax.visualization import html

_CAPTIONS = {
    "curves": "Curves. Loss and accuracy of single training batches and of all test images, and the learning rate.",
    "confusion": "Confusion matrix. Numbers of test images by true class (rows) and predicted class (columns).",
    "reliability": "Reliability. Accuracy of test images by confidence: above the diagonal the model is too cautious, "
    "below it too confident. With validation images, also after temperature scaling fitted on them.",
    "errors": "Most confident errors. Misclassified test images with the highest predicted probability.",
    "attention_rollout": "Attention rollout. Attention accumulated over all layers, beside random test images.",
    "attention_heads": "Attention heads. Attention of each head of each layer on one test image.",
    "position_similarity": "Position embeddings. Cosine similarity of each patch's position embedding to all others.",
    "position_matrix": "Position embeddings, all pairs. The same similarities as a matrix, patches row by row.",
    "patch_filters": "Patch filters. Principal components of the patch embedding and the variance they explain.",
}
"""Name of a figure -> title and caption, in the order of the page."""


def main(argv: list[str] | None = None) -> int:
    """Writes the page and prints its path."""
    parser = create_parser(
        "python -m vit_jax.report",
        "Write RUN/report.html, one page with the results, settings and figures of a finished run.",
        "--workdir runs/digits",
    )
    parser.add_argument("--workdir", metavar="RUN", required=True, help="run directory")
    parser.add_argument("--data_dir", metavar="DIR", help="directory of the dataset, if it has moved since training")
    arguments = parse_arguments(parser, argv)
    print(write_report(Path(arguments.workdir), data_dir=arguments.data_dir))
    return 0


def write_report_of_finished_run(workdir: Path) -> None:
    """Writes the report of a finished run, unless it exists; with several processes, only prints the command."""
    if jax.process_count() > 1:
        print(f"to write the report, run in one process: python -m vit_jax.report --workdir {workdir}")
        return
    if not (workdir / "report.html").exists():
        print("writing the report …", flush=True)
        write_report(workdir)
    print(f"report: {workdir / 'report.html'}")


def write_report(
    workdir: str | Path, *, data_dir: str | None = None, split: Split | None = None, validation: Split | None = None
) -> Path:
    """Writes `workdir/report.html` of a finished run: results, settings, command, figures, config.

    `data_dir` replaces the dataset directory of the config. `split` is the test split, and `validation` the validation
    split, if any, of a dataset given from Python.
    """
    from vit_jax import visualize  # matplotlib takes long to import
    from vit_jax.visualization import plotting

    workdir = Path(workdir)
    row, run = read_row(workdir), load_run(workdir)
    test = run.load_test_split(data_dir) if split is None else check_split(split, num_classes=len(run.class_names))
    if len(test) != run.info.dataset.num_test:
        raise UsageError(f"split has {len(test):,} images; expected the {run.info.dataset.num_test:,} of {workdir}")
    if split is None:
        validation = run.load_validation_split(data_dir)
    evaluation = run.measure(test, validation=validation)
    figures = {name: plotting.to_png(figure) for name, figure in visualize.draw_all(run, test, evaluation)}
    accuracy = f"{row.results['test/accuracy']:.2%}"
    texts = {
        "title": workdir.name,
        "accuracy": accuracy,
        "summary": f"Test accuracy on {len(test):,} images after {run.step:,} steps.",
        "classes": describe_selection(evaluation.class_scores),
        "command": run.info.command,
        "config": json.dumps(run.config.to_dict(), indent=2),
    }
    results = [("this run: test accuracy", accuracy), *describe_evaluation(evaluation)]
    if "test_raw/accuracy" in row.results:
        results.append(("without EMA", f"{row.results['test_raw/accuracy']:.2%}"))
    if not run.config.dataset.classes:  # reference results are for all classes
        references = [row for row in run.config.reference_results if row[0] == run.config.dataset.name]
        results += [(label, f"{value:.2%}") for _, label, value in references]
    captioned = {caption: figures[name] for name, caption in _CAPTIONS.items() if name in figures}
    page = html.format_report(
        texts,
        results=results,
        classes=[scores.cells() for scores in select_classes(evaluation.class_scores)],
        settings=describe_run(run, row),
        figures=captioned,
    )
    write_atomically(workdir / "report.html", page)
    return workdir / "report.html"


def describe_evaluation(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Returns (name, value) pairs of the results beside the accuracy."""
    summary, (low, high) = evaluation.summary(), evaluation.accuracy_interval
    names = {
        "top-5 accuracy": "test/accuracy_top5",
        "balanced accuracy": "test/balanced_accuracy",
        "expected calibration error": "test/ece",
        "the same, calibrated on validation images": "test/ece_calibrated",
    }
    if len(evaluation.class_names) <= 5:
        del names["top-5 accuracy"]
    rows = [("95% interval (Wilson)", f"{low:.2%} to {high:.2%}")]
    return rows + [(name, f"{summary[key]:.2%}") for name, key in names.items() if key in summary]


def describe_selection(scores: Sequence[ClassScores]) -> str:
    """Returns the caption of the table of classes."""
    shown = len(select_classes(scores))
    which = f"{shown} of {len(scores):,} classes, those with the lowest F1" if shown < len(scores) else "All classes"
    return f"{which}. Precision, recall and F1 on the test images, and the most frequent wrong prediction."


def describe_run(run: Run, row: Row) -> list[tuple[str, str]]:
    """Returns (name, value) pairs of the settings, duration and versions of a run."""
    config, names, counts = run.config, run.class_names, run.info.dataset
    dataset = f"{config.dataset.name}, {config.dataset.train_split} → {config.dataset.test_split}"
    model = ", ".join(f"{key} {value}" for key, value in config.model.to_dict().items())
    finished = datetime.datetime.fromtimestamp((run.workdir / "metrics.jsonl").stat().st_mtime)
    cells, epochs = row.cells(), format_number(run.step / (counts.num_train // config.batch_size))
    return [
        ("dataset", "given from Python" if run.dataset_given else dataset),
        ("training images", _format_counts(counts.train_counts)),
        *([("validation images", _format_counts(counts.validation_counts))] if counts.validation_counts else []),
        ("test images", _format_counts(counts.test_counts)),
        ("classes", f"{len(names)}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"),
        ("model", f"{config.architecture}: {model or 'sizes of the checkpoint'}"),
        ("pretrained", config.pretrained or "none"),
        ("trainable", f"{cells['trainable']}; {cells['parameters']} parameters"),
        ("training", f"{run.step:,} steps × {config.batch_size} images of {config.image_size} px = {epochs} epochs"),
        ("duration", f"{cells['time']} at {cells['images/s']} images/s, without evaluation"),
        ("finished", f"{finished:%Y-%m-%d %H:%M}"),
        ("versions", f"vit_jax {run.metadata.vit_jax}, jax {jax.__version__}, Python {platform.python_version()}"),
    ]


def _format_counts(counts: Sequence[int]) -> str:
    """Formats numbers of images of each class, such as "360; 28 to 44 per class"."""
    least, most = min(counts), max(counts)
    per_class = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"{sum(counts):,}; {per_class} per class"


if __name__ == "__main__":
    sys.exit(run_command(main))
