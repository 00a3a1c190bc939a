"""Trains as a config says: `python train.py --config configs/NAME.py[:ARG] [--config.key=value …] [--workdir DIR]`."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vit_jax.errors import UsageError, one_line, run_command

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/digits.py; keys: configs/base.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/NAME[-ARG] unless given.")
_REPORT = flags.DEFINE_bool("report", True, "Write report.html into the folder of a finished run.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what the run would cost and start nothing.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes; 1 looks for no others.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of the processes this is, counted from 0.")
_WAIT_SECONDS = flags.DEFINE_integer("wait_seconds", 300, "How long to wait for the other processes.", lower_bound=1)


def main() -> int:
    """Flags to `train_and_evaluate`."""
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}\n{flags.FLAGS.main_module_help()}")
        return 0
    parse_flags(sys.argv)
    from vit_jax import distributed

    with distributed.joined(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, wait_seconds=_WAIT_SECONDS.value
    ):
        from vit_jax import dry_run, report, trainer

        if _DRY_RUN.value:
            dry_run.dry_run(_CONFIG.value)
        else:
            workdir = Path(_WORKDIR.value or default_workdir())
            results = trainer.train_and_evaluate(_CONFIG.value, workdir)
            if results and _REPORT.value:
                report.leave_report(workdir)
    return 0


def parse_flags(argv: list[str]) -> None:
    """Reads the command line; all that can be mistyped there is a UsageError."""
    try:
        rest = flags.FLAGS(argv)[1:]
        missing = not (_CONFIG.value and _CONFIG.value.to_dict())  # a file that is not there raises when first used
    except Exception as error:  # a config file is code: it can raise anything
        # Of what ml_collections passes on of an error in a config file, the last line is the error.
        reason = one_line(str(error).strip().rsplit("\n", maxsplit=1)[-1] if "Traceback" in str(error) else error)
        raise UsageError(f"{reason} (configs/base.py has every key; see also python train.py --help)") from error
    if rest:
        raise UsageError(f"unexpected {' '.join(rest)}; keys are set as --config.key=value")
    if missing:
        raise UsageError("--config is missing: give a recipe, such as --config configs/digits.py")


def default_workdir() -> Path:
    """`runs/NAME[-ARG]` for `--config …/NAME.py[:ARG]`."""
    path, _, arg = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return Path("runs") / "-".join(filter(None, (Path(path).stem, arg)))


if __name__ == "__main__":
    sys.exit(run_command(main))
