"""Trains a model: `python train.py --config configs/NAME.py[:ARG] [--config.key=value …] [--workdir DIR]`."""

import argparse
import sys
from pathlib import Path

from vit_jax.config import check_config, parse_config
from vit_jax.runtime.arguments import create_parser, parse_known_arguments
from vit_jax.runtime.errors import UsageError, run_command
from vit_jax.runtime.resources import is_cluster_job, split_cpu
from vit_jax.runtime.startup import prepare_process


def main(argv: list[str] | None = None) -> int:
    """Parses the flags and trains; returns the exit code."""
    arguments = parse_flags(argv)
    config = arguments.config
    has_flags = arguments.coordinator is not None or arguments.num_processes is not None
    if arguments.num_processes == 1 or not (has_flags or is_cluster_job()):  # several processes split the batch
        split_cpu(config.mesh.cpu_devices, batch_size=config.batch_size // (config.accumulation_steps or 1))
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
    arguments.config = parse_config(parser, arguments.config, overrides)
    check_config(arguments.config)
    return arguments


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command(main))
