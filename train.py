"""Trains a model: `python train.py --config configs/NAME.py[:ARG] [--config.key=value …] [--workdir DIR]`."""

import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vit_jax.config import check_key
from vit_jax.runtime.errors import UsageError, one_line, run_command
from vit_jax.runtime.startup import prepare_process


def main(argv: list[str] | None = None) -> int:
    """Parses the flags and trains; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{create_flags([]).main_module_help()}")
        return 0
    values = parse_flags(argv)
    from vit_jax.runtime import distributed

    with distributed.initialize_processes(
        values.coordinator, values.num_processes, values.process_id, wait_seconds=values.wait_seconds
    ):
        from vit_jax import report, trainer
        from vit_jax.training import dry_run

        if values.dry_run:
            dry_run.dry_run(values.config)
        else:
            workdir = Path(values.workdir or default_workdir(values))
            results = trainer.train_and_evaluate(values.config, workdir)
            if results and values.report:
                report.write_report_of_finished_run(workdir)
    return 0


def create_flags(argv: list[str]) -> flags.FlagValues:
    """Defines the flags in a new `FlagValues`, so that one process can parse several command lines."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, such as configs/digits.py; python -m vit_jax.config prints every key.",
        values,
        lock_config=False,  # --config.model.NAME may set new arguments
        accept_new_attributes=True,
        sys_argv=argv,
    )
    flags.DEFINE_string("workdir", None, "Run directory; runs/NAME[-ARG] by default.", values)
    flags.DEFINE_bool("report", True, "Write report.html when the run is finished.", values)
    flags.DEFINE_bool("dry_run", False, "Print estimated FLOPs and memory of the run, and exit.", values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for several processes.", values)
    flags.DEFINE_integer("num_processes", None, "Number of processes; 1 disables detection.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", flag_values=values)
    wait = "Seconds to wait for the other processes."
    flags.DEFINE_integer("wait_seconds", 300, wait, lower_bound=1, flag_values=values)
    return values


def parse_flags(argv: list[str]) -> flags.FlagValues:
    """Parses the command line.

    Raises:
        UsageError: a flag, key or value is invalid, or the config file fails.
    """
    for word in argv:
        if override := re.match(r"--?(?:no)?config\.([^=]*)", word):
            check_key(override[1])
    try:
        values = create_flags(argv)
        rest = values([sys.argv[0], *argv])[1:]
        missing = not (values.config and values.config.to_dict())  # a missing file raises when it is first used
    except Exception as error:  # a config file is code: it can raise anything
        # ml_collections puts a traceback before the error, or the names of all keys after it.
        reason = str(error.args[0] if error.args else "").strip()
        reason = re.sub("^'(Key .*) Other fields present.*", r"\1", reason, flags=re.DOTALL)
        reason = reason.rsplit("\n", maxsplit=1)[-1].removeprefix("ValueError: ") or type(error).__name__
        raise UsageError(f"{one_line(reason)} (see python train.py --help)") from error
    if rest:
        raise UsageError(f"unexpected {' '.join(rest)}; keys are set as --config.key=value")
    if missing:
        raise UsageError("--config is missing; give a config file, such as --config configs/digits.py")
    return values


def default_workdir(values: flags.FlagValues) -> Path:
    """Returns `runs/NAME[-ARG]` for `--config …/NAME.py[:ARG]`."""
    path, _, arg = config_flags.get_config_filename(values["config"]).partition(":")
    return Path("runs") / "-".join(filter(None, (Path(path).stem, arg)))


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command(main))
