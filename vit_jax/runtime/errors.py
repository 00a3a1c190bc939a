"""User errors: one line on stderr and an exit code instead of a traceback."""

import io
import logging
import os
import sys
from collections.abc import Callable

import absl.logging


class UserError(ValueError):
    """A runtime failure, such as a damaged file. The message tells what was found, what was expected, what to do."""

    exit_code = 1


class UsageError(UserError):
    """An invalid flag, config key, type, range or name."""

    exit_code = 2


def run_command(main: Callable[[], int]) -> int:
    """Runs a command and returns its exit code; reports user errors as one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for unprintable file names, as on stderr
    absl.logging.get_absl_logger().addFilter(_is_not_noise)
    try:
        return main()
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error)
        if code is None:
            raise
        return code


def report_error(error: BaseException) -> int | None:
    """Prints a user error as one line and returns its exit code; returns None for other errors, which are bugs."""
    match error:
        case KeyboardInterrupt():
            line, code = str(error) or "interrupted", 130
        case UserError():
            line, code = f"error: {one_line(error)}", error.exit_code
        case BrokenPipeError():  # the reader of stdout is gone, as in `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case OSError() | MemoryError():
            line, code = f"error: {one_line(error)}", 1
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):  # device memory
            advice = (
                "to train, set more --config.accumulation_steps or --config.remat=full, shard the parameters with "
                "--config.mesh.fsdp, or lower eval_batch_size (--dry_run shows what is needed); for other commands, "
                "set JAX_PLATFORMS=cpu"
            )
            line, code = f"error: {one_line(str(error).splitlines()[0]).rstrip('.')}; {advice}", 1
        case _:
            return None
    print(line, file=sys.stderr)
    return code


def one_line(error: BaseException | str) -> str:
    """Returns the message of an error on one line, or its class if it is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_not_noise(record: logging.LogRecord) -> bool:
    """Filters warnings of Orbax, and its tracebacks of errors that it also raises."""
    return "orbax" not in record.pathname or (record.levelno >= logging.ERROR and not record.exc_info)
