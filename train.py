"""Trains as a config says: `python train.py --config configs/NAME.py[:ARG] [--config.key=value …] [--workdir DIR]`."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vit_jax.runtime.errors import UsageError, one_line, run_command


def main(argv: list[str] | None = None) -> int:
    """Flags to `train_and_evaluate`."""
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
    """What may stand on the command line; each call makes its own, so that one process can read several lines."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Recipe, such as configs/digits.py; keys: configs/base.py.", values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/NAME[-ARG] unless given.", values)
    flags.DEFINE_bool("report", True, "Write report.html into the folder of a finished run.", values)
    flags.DEFINE_bool("dry_run", False, "Print what the run would cost and start nothing.", values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes.", values)
    flags.DEFINE_integer("num_processes", None, "How many processes; 1 looks for no others.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of the processes this is, counted from 0.", flag_values=values)
    wait = "How long to wait for the other processes."
    flags.DEFINE_integer("wait_seconds", 300, wait, lower_bound=1, flag_values=values)
    return values


def parse_flags(argv: list[str]) -> flags.FlagValues:
    """Reads the command line; all that can be mistyped there is a UsageError."""
    try:
        values = create_flags(argv)
        rest = values([sys.argv[0], *argv])[1:]
        missing = not (values.config and values.config.to_dict())  # a file that is not there raises when first used
    except Exception as error:  # a config file is code: it can raise anything
        # Of what ml_collections passes on of an error in a config file, the last line is the error.
        reason = one_line(str(error).strip().rsplit("\n", maxsplit=1)[-1] if "Traceback" in str(error) else error)
        raise UsageError(f"{reason} (configs/base.py has every key; see also python train.py --help)") from error
    if rest:
        raise UsageError(f"unexpected {' '.join(rest)}; keys are set as --config.key=value")
    if missing:
        raise UsageError("--config is missing: give a recipe, such as --config configs/digits.py")
    return values


def default_workdir(values: flags.FlagValues) -> Path:
    """`runs/NAME[-ARG]` for `--config …/NAME.py[:ARG]`."""
    path, _, arg = config_flags.get_config_filename(values["config"]).partition(":")
    return Path("runs") / "-".join(filter(None, (Path(path).stem, arg)))


if __name__ == "__main__":
    sys.exit(run_command(main))
