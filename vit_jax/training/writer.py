"""Writes metrics during training: metrics.jsonl, TensorBoard events, a progress bar."""

import json
import math
import os
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from vit_jax.runtime.errors import UserError
from vit_jax.runtime.files import write_atomically
from vit_jax.runtime.progress import progress_bar

Record = dict[str, float]
"""A line of metrics.jsonl: "step", an integer, and metrics."""


def read_records(path: Path, *, last_step: int | None = None) -> list[Record]:
    """Reads the lines of a metrics.jsonl up to a step; returns none if there is no file.

    A truncated last line, as after SIGKILL, is ignored; any other damaged line raises UserError.
    """
    records: list[Record] = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record: Record = json.loads(line)
            if record["step"] <= (math.inf if last_step is None else last_step):
                records.append(record)
        except (ValueError, TypeError, KeyError) as error:
            found = line[:60].decode(errors="replace")
            raise UserError(
                f'line {number} of {path} is {found!r}; expected a JSON object with "step"; delete that line'
            ) from error
    return records


def checksum_of(records: Iterable[Record]) -> str:
    """Returns the checksum of records as lines of metrics.jsonl, as saved in every checkpoint."""
    return f"{zlib.crc32(_lines(records)):08x}"


def _lines(records: Iterable[Record]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read_results(workdir: Path, step: int, checksum: str) -> tuple[list[Record], Record]:
    """Reads the metrics of a finished run; returns all records, and the record of the last evaluation.

    Raises UserError if the records do not have the `checksum` of the last checkpoint.
    """
    path = workdir / "metrics.jsonl"
    records = read_records(path, last_step=step)
    if checksum_of(records) != checksum:
        reason = "was changed" if path.exists() else "is missing"
        raise UserError(
            f"{workdir} is finished at step {step}, but {path.name} {reason}; "
            f"python -m vit_jax.evaluate --workdir {workdir} measures it again"
        )
    return records, records[-1]


def format_number(number: float) -> str:
    """Formats numbers of at least 10 as integers, smaller ones with two significant digits."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def format_steps(num_steps: int, steps_per_epoch: int) -> str:
    """Formats a duration in both units, such as "220 steps = 10 epochs"."""
    epochs = format_number(num_steps / steps_per_epoch)
    return f"{num_steps:,} step{'s' * (num_steps != 1)} = {epochs} epoch{'s' * (epochs != '1')}"


class Writer:
    """Writes the metrics of one run; a context manager.

    Records after the step that the run resumes from are removed from metrics.jsonl. TensorBoard events are written
    again, into one new file, so that a resumed run is one curve.

    Args:
        workdir: run directory; exists.
        step: finished updates; 0 starts a run.
        num_steps: number of steps of the whole run, for the progress bar.
        steps_per_epoch: steps of an epoch.
        silent: write nothing, as another process does.
    """

    def __init__(self, workdir: Path, *, step: int, num_steps: int, steps_per_epoch: int, silent: bool = False):
        from tensorboardX import SummaryWriter  # takes long to import

        path = Path(os.devnull) if silent else workdir / "metrics.jsonl"
        kept = [] if silent else read_records(path, last_step=step)
        if not silent:
            write_atomically(path, _lines(kept))
            for events in workdir.glob("events.out.tfevents.*"):
                events.unlink()
        self._crc32 = zlib.crc32(_lines(kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir), flush_secs=10, write_to_disk=not silent)
        self._add_events(kept)
        self._bar = progress_bar(
            total=num_steps,
            initial=step,
            unit="step",
            desc="train",
            delay=0,
            leave=True,
            dynamic_ncols=True,
            disable=silent,
        )
        self._silent, self._steps_per_epoch = silent, steps_per_epoch
        self.start_clock(step)

    def __enter__(self) -> "Writer":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files and the progress bar."""
        self._bar.close()
        self._file.close()
        self._events.close()

    @property
    def checksum(self) -> str:
        """Checksum of all records; see `checksum_of`."""
        return f"{self._crc32:08x}"

    def start_clock(self, step: int) -> None:
        """Restarts the clock for images per second; called after work that is not training."""
        self._clock, self._clock_step = time.perf_counter(), step

    def log_training(self, step: int, scalars: dict[str, float], *, batch_size: int) -> None:
        """Writes a training line, with images per second since the last one or `start_clock`; updates the bar."""
        speed = (step - self._clock_step) * batch_size / (time.perf_counter() - self._clock)
        self._write({"step": step, **scalars, "images_per_second": speed})
        loss, accuracy = scalars["train/loss"], scalars["train/accuracy"]
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {accuracy:.1%}, {format_number(speed)} images/s", refresh=False
        )
        self._bar.update(step - self._bar.n)
        self.start_clock(step)

    def log_evaluation(self, step: int, results: dict[str, float]) -> None:
        """Writes an evaluation line, and prints it above the progress bar."""
        self._write({"step": step, **results})
        line = f"step {step}, epoch {format_number(step / self._steps_per_epoch)}:"
        for split in ("validation", "test"):
            if f"{split}/accuracy" in results:
                raw = f"{split}_raw/accuracy"
                without = f" (without EMA {results[raw]:.2%})" if raw in results else ""
                line += f" {split} accuracy {results[f'{split}/accuracy']:.2%}{without},"
                line += f" {split} loss {results[f'{split}/loss']:.4f};"
        if not self._silent:
            tqdm.write(line[:-1], file=sys.stderr)

    def flush(self) -> None:
        """Syncs metrics.jsonl to disk; called before each checkpoint, so that no checkpoint lacks its metrics."""
        if not self._silent:
            os.fsync(self._file.fileno())

    def _write(self, record: Record) -> None:
        line = _lines([record])
        self._crc32 = zlib.crc32(line, self._crc32)
        self._file.write(line.decode())
        self._file.flush()
        self._add_events([record])

    def _add_events(self, records: Iterable[Record]) -> None:
        for record in records:
            for name, value in record.items():
                if name != "step":
                    self._events.add_scalar(name, value, record["step"])
