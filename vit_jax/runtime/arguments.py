"""Command lines: parsers whose help ends with examples, the flags that select a model, and errors on one line."""

import argparse
import difflib
from collections.abc import Sequence

from vit_jax.runtime.errors import UsageError


def create_parser(prog: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """Creates a parser; each example is the rest of a command line after `prog`."""
    epilog = "\n".join(["examples:", *(f"  {prog} {example}".rstrip() for example in examples)])
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir and --model, of which one is required, as `model`, and --step; for `vit_jax.load`."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--workdir", dest="model", metavar="RUN", help="run directory")
    group.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="pretrained checkpoint by name (python -m vit_jax.pretrained --list), .npz file, or export",
    )
    parser.add_argument(
        "--step", type=_step, metavar="STEP", help="step of the run's checkpoint, or best (default: latest)"
    )


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a step of the run, or best")
    return text if text == "best" else int(text)


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line; raises UsageError where argparse would exit."""
    arguments, rest = parse_known_arguments(parser, argv)
    if rest:
        unknown = next((word for word in rest if word.startswith("-")), rest[0]).partition("=")[0]
        near = suggest_flag(parser, unknown)
        parser.error(f"unrecognized arguments: {' '.join(rest)}{f'; did you mean {near}?' if near else ''}")
    return arguments


def suggest_flag(parser: argparse.ArgumentParser, name: str) -> str:
    """Returns the flag that is most similar to `name`; "" if none is."""
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    return next(iter(difflib.get_close_matches(f"--{name.lstrip('-')}", flags, n=1)), "")


def parse_known_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line and returns unknown words; raises UsageError where argparse would exit."""

    def fail(message: str) -> None:
        raise UsageError(f"{message} (see `{parser.prog} --help`)")

    parser.error = fail  # type: ignore[assignment, method-assign]
    return parser.parse_known_args(argv)
