"""`python -m vit_jax.compare DIR DIR …`: finished runs side by side, as a table that Markdown understands."""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, parse_arguments, run_command

_COLUMNS = ("run", "trains", "parameters", "test accuracy", "top 5", "pictures", "time", "pictures/s")


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.compare", description=__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="folders of finished runs on the same test pictures")
    arguments = parse_arguments(parser, argv)
    print(format_table(compare_runs(arguments.workdirs)))
    return 0


def compare_runs(workdirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What was trained, how well it did and what it took, run by run.

    Time is that of training: evaluation, checkpoints and compilation are not in it, nor are stored features.

    Raises:
        UserError: a folder holds no finished run, or the runs were not tested on the same pictures.
    """
    from vit_jax import checkpoint, settings, writer

    rows, tested = [], {}
    for workdir in map(Path, workdirs):
        config = settings.load_config(workdir)
        records = writer.read_records(workdir / "metrics.jsonl")
        done = records[-1]["step"] if records else 0
        if done != config.num_steps or "test/accuracy" not in records[-1]:
            raise UserError(f"{workdir} is at step {done} of {config.num_steps}; compare finished runs")
        keys = ("name", "test_split", "classes")
        tested[str(workdir)] = ", ".join(str(config.dataset[key]) for key in keys if config.dataset[key])
        lines = [record for record in records if "images_per_second" in record]
        speeds = sorted(line["images_per_second"] for line in lines)
        starts = [0, *(line["step"] for line in lines)]
        seconds = sum(
            (line["step"] - start) * config.batch_size / line["images_per_second"]
            for start, line in zip(starts, lines, strict=False)
        )
        rows.append(
            {
                "run": workdir.name,
                "trains": config.trainable if isinstance(config.trainable, str) else ", ".join(config.trainable),
                "parameters": checkpoint.read_about(workdir)["num_trainable"],
                "test accuracy": records[-1]["test/accuracy"],
                "top 5": records[-1]["test/accuracy_top5"],
                "pictures": config.num_steps * config.batch_size,
                "time": round(seconds),
                "pictures/s": speeds[len(speeds) // 2] if speeds else 0.0,
            }
        )
    if len(set(tested.values())) > 1:
        differences = "; ".join(f"{workdir}: {pictures}" for workdir, pictures in tested.items())
        raise UserError(f"the runs were tested on different pictures ({differences}); compare runs on the same")
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table whose columns stand below each other in plain text, too."""
    from vit_jax.writer import format_number

    shown = {
        "parameters": "{:,}".format,
        "test accuracy": "{:.2%}".format,
        "top 5": "{:.2%}".format,
        "pictures": "{:,}".format,
        "time": lambda seconds: str(datetime.timedelta(seconds=seconds)),
        "pictures/s": format_number,
    }
    cells = [[shown.get(name, str)(row[name]) for name in _COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *cells, strict=True)]
    left = ("run", "trains")

    def line(values: Sequence[str]) -> str:
        padded = [
            value.ljust(width) if name in left else value.rjust(width)
            for name, value, width in zip(_COLUMNS, values, widths, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if name in left else "-" * (width - 1) + ":" for name, width in zip(_COLUMNS, widths, strict=True)
    ]
    return "\n".join([line(_COLUMNS), line(rule), *map(line, cells)])


if __name__ == "__main__":
    sys.exit(run_command(main))
