import argparse
import re

import pytest

from vit_jax.runtime.arguments import add_model_arguments, create_parser, parse_arguments, parse_known_arguments
from vit_jax.runtime.errors import UsageError


@pytest.fixture
def parser():
    return create_parser("tool", "Do something.", "--workdir runs/a", "--model micro")


def test_create_parser_appends_examples_to_help(parser):
    assert parser.format_help().endswith("\n\nexamples:\n  tool --workdir runs/a\n  tool --model micro\n")


@pytest.mark.parametrize(
    ("argv", "model", "step"),
    [
        (["--workdir", "runs/a"], "runs/a", None),
        (["--model=micro"], "micro", None),
        (["--model", "a", "--step=3"], "a", 3),
    ],
)
def test_add_model_arguments_accepts_workdir_or_model(parser, argv, model, step):
    add_model_arguments(parser)
    assert vars(parse_arguments(parser, argv)) == {"model": model, "step": step}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments --workdir --model is required (see `tool --help`)"),
        (["--workdir", "a", "--model", "b"], "argument --model: not allowed with argument --workdir"),
        (["--model", "a", "--step", "last"], "argument --step: got 'last'; expected a step of the run, or best"),
        (["--model", "a", "--stp", "3"], "unrecognized arguments: --stp 3; did you mean --step?"),
        (["--model", "a", "--word_dir=3"], "unrecognized arguments: --word_dir=3; did you mean --workdir?"),
        (["--model", "a", "b"], "unrecognized arguments: b (see"),
    ],
)
def test_parse_arguments_raises_usage_error(parser, argv, message):
    add_model_arguments(parser)
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_arguments(parser, argv)


def test_parse_known_arguments_returns_unknown_words_in_order():
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int)
    arguments, rest = parse_known_arguments(parser, ["--a.b=1", "--number", "2", "--c", "d e"])
    assert (arguments.number, rest) == (2, ["--a.b=1", "--c", "d e"])
