"""What a run writes while it goes: metrics.jsonl, TensorBoard events, the progress bar."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from vit_jax.runtime.errors import UserError
from vit_jax.runtime.files import write_atomically
from vit_jax.runtime.progress import progress_bar


def read_records(path: Path, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """Reads the lines of a metrics.jsonl; a truncated last line, left by a kill, is ignored.

    Args:
        path: need not exist.
        last_step: records of later steps are left out.

    Raises:
        UserError: another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break is empty or truncated
    records = [_parse(line, path, number) for number, line in enumerate(lines, start=1)]
    return [record for record in records if last_step is None or record["step"] <= last_step]


def read_results(workdir: Path, step: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reads the metrics of a finished run.

    Args:
        workdir: of the run.
        step: its last.

    Returns:
        (records, results): all lines, and the evaluation after the last step.

    Raises:
        UserError: metrics.jsonl is missing, is damaged, or lacks that evaluation.
    """
    path = workdir / "metrics.jsonl"
    records = read_records(path, last_step=step)
    for record in reversed(records):
        if record["step"] == step and record.keys() >= {"test/loss", "test/accuracy", "test/accuracy_top5"}:
            return records, record
    reason = "has no evaluation of that step" if path.exists() else "is missing"
    raise UserError(
        f"{workdir} is finished at step {step}, but {path.name} {reason}; "
        f"python -m vit_jax.evaluate --workdir {workdir} measures it again"
    )


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        found = line[:60].decode(errors="replace")
        raise UserError(f'line {number} of {path} is {found!r}; expected a JSON object with "step"; delete that line')
    return record


def format_number(number: float) -> str:
    """A whole number, or two digits of a small one."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _sync(file: TextIO) -> None:
    """Returns when what was written to a file is on disk."""
    file.flush()
    os.fsync(file.fileno())


class Writer:
    """Writes the records of one run; a context manager.

    Args:
        workdir: exists.
        step: the run starts or goes on from here; records of later steps are cut off.
        num_steps: of the whole run, for the bar.
        silent: whether nothing is written at all: another process does it.
    """

    def __init__(self, workdir: Path, *, step: int, num_steps: int, silent: bool = False):
        path = workdir / "metrics.jsonl"
        if not silent:
            kept = read_records(path, last_step=step)
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(os.devnull if silent else path, "a")  # noqa: SIM115
        self._events = None if silent else _create_events(workdir, step)
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
        """Closes files and bar."""
        self._bar.close()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def start_clock(self, step: int) -> None:
        """Pictures per second count from here: called after what is not training."""
        self._clock, self._clock_step = time.perf_counter(), step

    def log_training(self, step: int, scalars: dict[str, float], *, batch_size: int) -> None:
        """Writes a training line and moves the bar; the speed is that since the last line or `start_clock`."""
        speed = (step - self._clock_step) * batch_size / (time.perf_counter() - self._clock)
        self._write(step, {**scalars, "images_per_second": speed})
        loss, accuracy = scalars["train/loss"], scalars["train/accuracy"]
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {accuracy:.1%}, {format_number(speed)} pictures/s", refresh=False
        )
        self._bar.update(step - self._bar.n)
        self.start_clock(step)

    def log_evaluation(self, step: int, results: dict[str, float]) -> None:
        """Writes an evaluation line, and says it above the bar."""
        self._write(step, results)
        raw = f" (without EMA {results['test_raw/accuracy']:.2%})" if "test_raw/accuracy" in results else ""
        accuracy, loss = results["test/accuracy"], results["test/loss"]
        self.say(f"step {step}: test accuracy {accuracy:.2%}{raw}, test loss {loss:.4f}")

    def flush(self) -> None:
        """Returns when metrics.jsonl is on disk: called before each checkpoint, which must not outlive its metrics."""
        if not self._silent:
            _sync(self._file)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._silent:
            tqdm.write(text, file=sys.stderr)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)


def _create_events(workdir: Path, step: int) -> Any:
    """A TensorBoard writer, or None where tensorboardX is not installed; later steps of a killed run are purged."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("tensorboardX is not installed: no TensorBoard events are written", file=sys.stderr)
        return None
    return SummaryWriter(str(workdir), purge_step=step + 1, flush_secs=10)
