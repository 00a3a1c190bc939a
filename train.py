"""Trains a model: `python train.py --config configs/NAME.py[:ARG] [--config.key=value …] [--workdir DIR]`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_jax.config import KEYS, check_key, suggest_key, to_tuple
from vit_jax.runtime.arguments import create_parser, parse_known_arguments, suggest_flag
from vit_jax.runtime.errors import UsageError, one_line, run_command
from vit_jax.runtime.startup import prepare_process


def main(argv: list[str] | None = None) -> int:
    """Parses the flags and trains; returns the exit code."""
    arguments = parse_flags(argv)
    from vit_jax.runtime import distributed

    with distributed.initialize_processes(
        arguments.coordinator, arguments.num_processes, arguments.process_id, wait_seconds=arguments.wait_seconds
    ):
        from vit_jax import report, trainer
        from vit_jax.training import dry_run

        if arguments.dry_run:
            dry_run.dry_run(arguments.config)
        else:
            results = trainer.train_and_evaluate(arguments.config, arguments.workdir)
            if results and not arguments.no_report:
                report.write_report_of_finished_run(arguments.workdir)
    return 0


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `config` is then a ConfigDict, and `workdir` has its default.

    Raises:
        UsageError: a flag, key or value is invalid, or the config file fails.
    """
    parser = create_parser(
        "python train.py",
        "Train a model, or resume the run in --workdir. --config.KEY=VALUE sets a key of the config, such as\n"
        "--config.learning_rate=0.03; `python -m vit_jax.config` prints all keys.",
        "--config configs/digits.py",
        "--config configs/cifar100.py:lora --config.seed=1 --workdir runs/lora-1",
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", help="config file, such as configs/digits.py, and its argument")
    add("--workdir", metavar="DIR", type=Path, help="run directory (default: runs/NAME[-ARG])")
    add("--no_report", "--noreport", action="store_true", help="do not write report.html when the run is finished")
    add("--dry_run", action="store_true", help="print estimated FLOPs and memory of the run, and exit")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, for several processes")
    add("--num_processes", metavar="N", type=int, help="number of processes (default: detected); 1: no detection")
    add("--process_id", metavar="I", type=int, help="index of this process, from 0")
    add("--wait_seconds", metavar="S", type=int, default=300, help="time to wait for other processes (default: 300)")
    arguments, overrides = parse_known_arguments(parser, argv)
    if arguments.wait_seconds < 1:
        parser.error(f"--wait_seconds is {arguments.wait_seconds}; expected a positive integer")
    if not arguments.config:
        raise UsageError("--config is missing; give a config file, such as --config configs/digits.py")
    if not arguments.workdir:
        path, _, arg = arguments.config.partition(":")
        arguments.workdir = Path("runs") / "-".join(filter(None, (Path(path).stem, arg)))
    try:
        arguments.config = load_config(arguments.config, overrides)
    except flags.UnrecognizedFlagError as error:
        key = suggest_key(error.flagname)
        near = f"--config.{key}" if key else suggest_flag(parser, error.flagname)
        parser.error(f"unknown flag --{error.flagname}{f'; did you mean {near}?' if near else ''}")
    return arguments


def load_config(file: str, overrides: list[str]) -> ConfigDict:
    """Loads a config file, FILE[:ARG], and sets the keys of `overrides`, --config.KEY=VALUE.

    Raises:
        absl.flags.UnrecognizedFlagError: `overrides` has a flag other than --config.
        UsageError: a key or value is invalid, or the config file fails.
    """
    argv = [f"--config={file}", *set_tuples(overrides)]
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
    except flags.UnrecognizedFlagError:
        raise
    except Exception as error:  # a config file is code: it can raise anything
        # ml_collections puts a traceback before the error, or the names of all keys after it.
        reason = str(error.args[0] if error.args else "").strip()
        reason = re.sub("^'(Key .*) Other fields present.*", r"\1", reason, flags=re.DOTALL)
        reason = reason.rsplit("\n", maxsplit=1)[-1].removeprefix("ValueError: ") or type(error).__name__
        for key in KEYS:
            expected = rf"config.{key.name} is \1; expected {key.check.expected}"
            reason = re.sub(f"^flag --config.{key.name}=(.*?): .*", expected, reason)
        raise UsageError(f"{one_line(reason)} (see python train.py --help)") from error
    if rest:
        raise UsageError(f"unexpected {' '.join(rest)}; keys are set as --config.key=value")
    if missing:
        raise UsageError(f"{file} returns no config; expected get_config() to return a ConfigDict with keys")
    return config


def set_tuples(words: Sequence[str]) -> list[str]:
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


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command(main))
