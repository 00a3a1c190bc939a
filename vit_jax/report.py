"""`python -m vit_jax.report --workdir DIR`: a finished run as one page, DIR/report.html, that needs nothing else."""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path
from typing import Any

from vit_jax.runtime.errors import UserError, parse_arguments, run_command
from vit_jax.runtime.files import write_atomically

# (dataset, architecture, mode) -> what others reached. The study is the one that this project carries on; its settings
# are configs/cifar100_seed.py's.
_KNOWN = {
    ("cifar100", "vit", "head"): [("the study, 50 epochs × 256, 224 px", 0.7726)],
    ("cifar100", "vit", "mlp"): [("the study, 20 epochs × 64, 224 px", 0.9248)],
    ("cifar100", "vit", "lora"): [("published, 5,000 steps × 128, 224 px", 0.9240)],
    ("cifar100", "vit", "full"): [
        ("the study, 20 epochs × 64, 224 px", 0.6691),
        ("published, 5,000 steps × 128, 224 px", 0.9289),
        ("published, 10,000 steps × 512, 384 px", 0.9206),
    ],
    ("cifar10", "vit", "full"): [("published, 10,000 steps × 512, 384 px", 0.9902)],
    ("cifar10", "vit", "scratch"): [("the study, 50 epochs, SGD", 0.6327)],
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 70rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin-top: 2.5rem }
img { display: block; max-width: max(100%, 40rem); height: auto; margin: 1rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse }
td, th { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
tr + tr { border-top: 1px solid #ddd }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
.big { font-size: 2.2rem; font-weight: 600; margin: .5rem 0 }
"""


def main(argv: list[str] | None = None) -> int:
    """Writes the page and prints its place."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.report", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of a finished run")
    parser.add_argument("--data_dir", help="where the dataset lies, if no longer where the config says")
    arguments = parse_arguments(parser, argv)
    print(write_report(Path(arguments.workdir), data_dir=arguments.data_dir))
    return 0


def write_report_of_finished_run(workdir: Path) -> None:
    """Writes the page of a run that has just finished, unless it is there, and prints its place.

    Several processes are told the command instead: it needs one alone.
    """
    import jax

    page = workdir / "report.html"
    if jax.process_count() > 1:
        print(f"its pictures on one page, from one process: python -m vit_jax.report --workdir {workdir}")
        return
    if not page.exists():
        print("drawing the report …", flush=True)
        write_report(workdir)
    print(f"report: {page}")


def write_report(workdir: Path, *, data_dir: str | None = None) -> Path:
    """Writes `workdir/report.html`: recipe, results beside known figures, curves, confusion, attention, mistakes.

    Args:
        workdir: of a finished run.
        data_dir: see the command.

    Raises:
        UserError: the run is not finished, its metrics are missing or damaged, or its data cannot be read.
    """
    from vit_jax import trainer, visualize
    from vit_jax.training import writer

    run = trainer.load_run(workdir)
    if data_dir is not None:
        run.config.dataset.data_dir = data_dir
    if run.step != run.config.num_steps:
        raise UserError(f"{workdir} is at step {run.step} of {run.config.num_steps}; a report is of a finished run")
    _, results = writer.read_results(workdir, run.step)
    figures = visualize.draw_all(run, workdir, pictures=[], num_images=8, layer=None, head=None)
    pictures = [(name, _png(figure)) for name, figure in figures]
    write_atomically(workdir / "report.html", format_page(workdir.name, run, results, pictures))
    return workdir / "report.html"


def format_page(name: str, run: Any, results: dict[str, float], pictures: list[tuple[str, bytes]]) -> str:
    """The page as one text.

    Args:
        name: of the run.
        run: of `trainer.load_run`.
        results: the last evaluation's record.
        pictures: (name, PNG) in the order of the page.
    """
    config = run.config
    mode = config.trainable if isinstance(config.trainable, str) else ""
    mode = mode if config.pretrained else "scratch"
    ours = [("this run, test accuracy", results["test/accuracy"]), ("top 5", results["test/accuracy_top5"])]
    if "test_raw/accuracy" in results:
        ours.append(("without EMA", results["test_raw/accuracy"]))
    task = (config.dataset.name, config.architecture, mode)
    known = [] if config.dataset.classes else _KNOWN.get(task, [])  # others' figures are of all classes
    model = ", ".join(f"{key} {value}" for key, value in config.model.to_dict().items())
    facts = [
        ("data", f"{config.dataset.name}, {config.dataset.train_split} → {config.dataset.test_split}"),
        (
            "classes",
            f"{len(run.class_names)}: {', '.join(run.class_names[:10])}{' …' if len(run.class_names) > 10 else ''}",
        ),
        ("model", f"{config.architecture}; {model}"),
        ("started from", config.pretrained or "random parameters"),
        ("trains", config.trainable if isinstance(config.trainable, str) else ", ".join(config.trainable)),
        ("budget", f"{config.num_steps:,} steps × {config.batch_size} pictures of {config.image_size} px"),
    ]
    order = ["curves", "confusion", "mistakes", "attention_rollout", "attention_heads"]
    ranked = sorted(pictures, key=lambda picture: order.index(picture[0]) if picture[0] in order else len(order))
    images = "".join(_picture(title.replace("_", " "), png) for title, png in ranked)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{html.escape(name)}</h1><p class="big">{results["test/accuracy"]:.2%}</p>'
        f"<p>of the test pictures are right after the last step, {run.step:,}.</p>"
        f"<h2>Results</h2>{_table([(what, f'{value:.2%}') for what, value in [*ours, *known]], numbers=True)}"
        f"<h2>Recipe</h2>{_table(facts)}"
        f"<h2>Command</h2><pre>{html.escape(run.about['command'])}</pre>"
        f"{images}"
        f"<h2>Every setting</h2><pre>{html.escape(json.dumps(config.to_dict(), indent=2))}</pre></body></html>\n"
    )


def _table(rows: list[tuple[str, str]], *, numbers: bool = False) -> str:
    cell = '<td class="number">' if numbers else "<td>"
    body = "".join(f"<tr><th>{html.escape(what)}</th>{cell}{html.escape(value)}</td></tr>" for what, value in rows)
    return f'<div class="wide"><table>{body}</table></div>'


def _picture(title: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f"<h2>{html.escape(title.capitalize())}</h2>"
        f'<div class="wide"><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></div>'
    )


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(main))
