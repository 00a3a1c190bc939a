"""Config files and --config.KEY=VALUE on the command line; `python -m vit_jax.config` prints the keys."""

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_jax.config import keys
from vit_jax.config.keys import KEYS, check_config, check_key, suggest_key, to_tuple
from vit_jax.runtime.arguments import create_parser, parse_arguments, suggest_flag
from vit_jax.runtime.errors import UsageError, one_line


def parse_config(parser: argparse.ArgumentParser, file: str, overrides: list[str]) -> ConfigDict:
    """Loads a config file, FILE[:ARG], and sets the keys of `overrides`, --config.KEY=VALUE.

    Raises:
        UsageError: `overrides` has another flag, a key or value is invalid, or the config file fails; `parser` is that
            of the other flags, from which the nearest name is suggested.
    """
    argv = [f"--config={file}", *_set_tuples(overrides)]
    values = flags.FlagValues()  # a new one, so that one process can parse several command lines
    try:
        config_flags.DEFINE_config_file(
            "config",
            flag_values=values,
            lock_config=False,  # --config.model.NAME may set new arguments
            accept_new_attributes=True,
            sys_argv=argv,
        )
        rest = values([sys.argv[0], *argv])[1:]
        config: ConfigDict = values.config
        missing = not (config and config.to_dict())  # a missing file raises when it is first used
    except flags.UnrecognizedFlagError as error:
        nearest = suggest_key(error.flagname)
        near = f"--config.{nearest}" if nearest else suggest_flag(parser, error.flagname)
        parser.error(f"unknown flag --{error.flagname}{f'; did you mean {near}?' if near else ''}")
    except Exception as error:  # a config file is code: it can raise anything
        # ml_collections puts a traceback before the error, or the names of all keys after it.
        reason = str(error.args[0] if error.args else "").strip()
        reason = re.sub("^'(Key .*) Other fields present.*", r"\1", reason, flags=re.DOTALL)
        reason = reason.rsplit("\n", maxsplit=1)[-1].removeprefix("ValueError: ") or type(error).__name__
        for key in KEYS:
            expected = rf"config.{key.name} is \1; expected {key.check.expected}"
            reason = re.sub(f"^flag --config.{key.name}=(.*?): .*", expected, reason)
        parser.error(one_line(reason))
    if rest:
        raise UsageError(f"unexpected {' '.join(rest)}; keys are set as --config.key=value")
    if missing:
        raise UsageError(f"{file} returns no config; expected get_config() to return a ConfigDict with keys")
    _override_duration(config, argv)
    return config


def _override_duration(config: ConfigDict, argv: Sequence[str]) -> None:
    """Makes the unit of --config.num_epochs=… or --config.num_steps=… count, whichever the config file sets."""
    given = {name: config[name] for name in ("num_epochs", "num_steps") if any(f".{name}=" in word for word in argv)}
    if len(given) == 2 and all(given.values()):
        raise UsageError("--config.num_epochs and --config.num_steps are both set; give one of them")
    if given.get("num_epochs") and "num_steps" in config:
        config.num_steps = 0
    elif given.get("num_steps") and "num_epochs" in config:
        config.num_epochs = 0


def _set_tuples(words: Sequence[str]) -> list[str]:
    """Checks the keys of --config.KEY=VALUE or --config.KEY VALUE, and converts comma-separated lists to tuples."""
    joined: list[str] = []
    for word in words:
        if joined and re.fullmatch(r"--?config\.[^=]*", joined[-1]) and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    for i, word in enumerate(joined):
        if override := re.fullmatch(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", word, flags=re.DOTALL):
            name, text = override.groups()
            check_key(name)
            joined[i] = word if text is None else f"--config.{name}={to_tuple(name, text)}"
    return joined


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config, --dataset and --data_dir, for `parse_dataset`."""
    parser.add_argument("--config", metavar="FILE[:ARG]", help="config file that names the dataset and its splits")
    parser.add_argument(
        "--dataset", metavar="NAME", help="dataset, such as cifar10 or folder:DIR; replaces that of the config"
    )
    parser.add_argument("--data_dir", metavar="DIR", help="archive or directory of the dataset")


def parse_dataset(parser: argparse.ArgumentParser, arguments: argparse.Namespace, overrides: list[str]) -> ConfigDict:
    """Returns the config that the flags of `add_dataset_arguments` and --config.KEY=VALUE describe.

    Raises:
        UsageError: a flag, key or value is invalid, or no dataset is given.
    """
    config = parse_config(parser, arguments.config or keys.__file__, overrides)
    if arguments.dataset:
        config.dataset.name = arguments.dataset
    if arguments.data_dir is not None:
        config.dataset.data_dir = arguments.data_dir
    if not config.dataset.name:
        parser.error("no dataset; give --dataset, such as folder:DIR, or a --config that sets dataset.name")
    check_config(config)
    return config


def main(argv: list[str] | None = None) -> int:
    """Prints every key with its default, meaning, unit, type and range."""
    parse_arguments(create_parser("python -m vit_jax.config", "Print every config key.", ""), argv)
    for key in KEYS:
        text = f"{key.doc} ({key.check.expected}{'; may change on resume' if key.resumable else ''})"
        print(f"{key.name} = {key.default!r}\n{textwrap.indent(textwrap.fill(text, 96), '    ')}")
    return 0
