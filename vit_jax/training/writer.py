"""Outputs of a run while it trains: metrics.jsonl, TensorBoard events, a progress bar."""

import json
import os
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from vit_jax.runtime.errors import UserError
from vit_jax.runtime.files import write_atomically
from vit_jax.runtime.progress import progress_bar

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

Record = dict[str, float]
"""A line of metrics.jsonl: "step", an integer, and metrics."""


def read_records(path: Path, *, last_step: int | None = None) -> list[Record]:
    """Reads the lines of a metrics.jsonl; a truncated last line, left by a kill, is ignored.

    Args:
        path: need not exist.
        last_step: records of later steps are left out.

    Raises:
        UserError: another line is damaged.
    """
    if not path.exists():
        return []
    records: list[Record] = []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break is empty or truncated
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None or (records and record["step"] < records[-1]["step"]):
            found = line[:60].decode(errors="replace")
            raise UserError(
                f"line {number} of {path} is {found!r}; expected a JSON object of numbers, "
                '"step" not below that of the line before; delete that line'
            )
        records.append(record)
    return [record for record in records if last_step is None or record["step"] <= last_step]


def checksum_of(records: Iterable[Record]) -> str:
    """Returns the checksum of records as lines of metrics.jsonl, which every checkpoint holds."""
    return f"{zlib.crc32(_lines(records)):08x}"


def _lines(records: Iterable[Record]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read_results(workdir: Path, step: int, checksum: str) -> tuple[list[Record], Record]:
    """Reads the metrics of a finished run.

    Args:
        workdir: run directory.
        step: last one of the run.
        checksum: of the records, in the last checkpoint.

    Returns:
        (records, results): all lines, and that of the evaluation after the last step.

    Raises:
        UserError: metrics.jsonl is missing, was changed, or lacks that evaluation.
    """
    path = workdir / "metrics.jsonl"
    records = read_records(path, last_step=step)
    changed = checksum_of(records) != checksum
    for record in () if changed else reversed(records):
        if record["step"] == step and record.keys() >= {"test/loss", "test/accuracy", "test/accuracy_top5"}:
            return records, record
    reason = "is missing" if not path.exists() else "was changed" if changed else "has no evaluation of that step"
    raise UserError(
        f"{workdir} is finished at step {step}, but {path.name} {reason}; "
        f"python -m vit_jax.evaluate --workdir {workdir} measures it again"
    )


def _parse(line: bytes) -> Record | None:
    """Returns the record in a line; None if it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    numbers = isinstance(record, dict) and all(type(value) in (int, float) for value in record.values())
    return record if numbers and type(record.get("step")) is int else None


def format_number(number: float) -> str:
    """Formats a number of at least 10 as an integer, a smaller one with two digits."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _sync(file: TextIO) -> None:
    """Returns when what was written to a file is on disk."""
    file.flush()
    os.fsync(file.fileno())


class Writer:
    """Writes the metrics of one run; a context manager.

    Records of later steps than the one that the run resumes from are removed from metrics.jsonl. TensorBoard's events
    are written again from what is kept, into one new file, so that a run that was resumed often is one curve.

    Args:
        workdir: run directory; exists.
        step: finished updates; 0 starts a run.
        num_steps: of the whole run, for the progress bar.
        silent: whether nothing is written, because another process does.
    """

    def __init__(self, workdir: Path, *, step: int, num_steps: int, silent: bool = False):
        path = workdir / "metrics.jsonl"
        kept = [] if silent else read_records(path, last_step=step)
        if not silent:
            write_atomically(path, _lines(kept))
        self._crc32 = zlib.crc32(_lines(kept))
        self._file = open(os.devnull if silent else path, "a")  # noqa: SIM115
        self._events = None if silent else _create_events(workdir, kept)
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
        self._silent = silent
        self._clock, self._clock_step = time.perf_counter(), step

    def __enter__(self) -> "Writer":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files and the progress bar."""
        self._bar.close()
        self._file.close()
        if self._events is not None:
            self._events.close()

    @property
    def checksum(self) -> str:
        """Checksum of all records, see `checksum_of`."""
        return f"{self._crc32:08x}"

    def start_clock(self, step: int) -> None:
        """Starts the time of the next images per second; called after work that is not training."""
        self._clock, self._clock_step = time.perf_counter(), step

    def log_training(self, step: int, scalars: dict[str, float], *, batch_size: int) -> None:
        """Writes a training line and moves the progress bar.

        Images per second are counted since the last training line or `start_clock`.
        """
        speed = (step - self._clock_step) * batch_size / (time.perf_counter() - self._clock)
        self._write(step, {**scalars, "images_per_second": speed})
        loss, accuracy = scalars["train/loss"], scalars["train/accuracy"]
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {accuracy:.1%}, {format_number(speed)} images/s", refresh=False
        )
        self._bar.update(step - self._bar.n)
        self.start_clock(step)

    def log_evaluation(self, step: int, results: dict[str, float]) -> None:
        """Writes an evaluation line, and prints it above the progress bar."""
        self._write(step, results)
        raw = f" (without EMA {results['test_raw/accuracy']:.2%})" if "test_raw/accuracy" in results else ""
        accuracy, loss = results["test/accuracy"], results["test/loss"]
        self.say(f"step {step}: test accuracy {accuracy:.2%}{raw}, test loss {loss:.4f}")

    def flush(self) -> None:
        """Returns when metrics.jsonl is on disk: called before each checkpoint, which must not outlive its metrics."""
        if not self._silent:
            _sync(self._file)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not self._silent:
            tqdm.write(text, file=sys.stderr)

    def _write(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step, **values}
        self._crc32 = zlib.crc32(_lines([record]), self._crc32)
        self._file.write(_lines([record]).decode())
        self._file.flush()
        if self._events is not None:
            _add_events(self._events, [record])


def _create_events(workdir: Path, records: Iterable[Record]) -> "SummaryWriter | None":
    """Replaces all event files by one of these records; None if tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("tensorboardX is not installed: no TensorBoard events are written", file=sys.stderr)
        return None
    for path in workdir.glob("events.out.tfevents.*"):
        path.unlink()
    events = SummaryWriter(str(workdir), flush_secs=10)
    _add_events(events, records)
    return events


def _add_events(events: "SummaryWriter", records: Iterable[Record]) -> None:
    for record in records:
        for name, value in record.items():
            if name != "step":
                events.add_scalar(name, value, record["step"])
