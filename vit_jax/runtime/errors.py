"""Errors that a user can cause: one line on stderr and an exit code, never a traceback."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """Something failed while running. The message says what was got, what was expected, what to do."""

    exit_code = 1


class UsageError(UserError):
    """Something was typed wrongly: a flag, a config key, a type, a range, an unknown name."""

    exit_code = 2


def run_command(main: Callable[[], int]) -> int:
    """Calls `main` and turns what a user can cause into one line on stderr.

    Args:
        main: a command; returns its exit code.

    Returns:
        The exit code: that of `main`, 2 for a `UsageError`, 1 for another `UserError` or an
        operating-system error that reached the top (a full disk, a missing permission) and where memory ran out,
        130 for Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name may hold what cannot be printed
    # Orbax warns at length about what it does as it was told, and logs with a traceback the errors that it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        return main()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away (`… | head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"error: out of memory: {one_line(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # JAX's word for a device that is out of memory
            raise
        advice = (
            "raise --config.accumulation_steps, set --config.remat=full, share the parameters between devices with "
            "--config.mesh.fsdp, or lower eval_batch_size; --dry_run shows what is needed"
        )
        print(f"error: {one_line(str(error).splitlines()[0])} {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def one_line(error: BaseException | str) -> str:
    """The message of an error with its line breaks and runs of blanks made single blanks."""
    return " ".join(str(error).split()) or type(error).__name__


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line; what is wrong with it becomes a UsageError instead of argparse's two lines."""

    def fail(message: str) -> None:
        raise UsageError(f"{message} (see `{parser.prog} --help`)")

    parser.error = fail  # type: ignore[assignment, method-assign]
    return parser.parse_args(argv)
