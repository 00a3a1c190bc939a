"""What a run writes while it goes: metrics.jsonl, TensorBoard events, the progress bar."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vit_jax.progress import progress_bar


def read_records(path: Path, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a torn last line, left by a kill, is no line.

    Args:
        path: need not exist.
        last_step: records of later steps are left out.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last line break is empty or torn
    records = [json.loads(line) for line in lines]
    return [record for record in records if last_step is None or record["step"] <= last_step]


def format_number(number: float) -> str:
    """A whole number, or two digits of a small one."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def write_beside(path: Path, text: str) -> None:
    """Writes a text file so that it is whole or as before at any moment."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
            write_beside(path, "".join(json.dumps(record) + "\n" for record in kept))
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
        self.say(f"step {step}: test accuracy {results['test/accuracy']:.2%}, test loss {results['test/loss']:.4f}")

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
