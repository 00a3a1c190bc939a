"""`python -m vit_jax.evaluate --workdir DIR`: test accuracy of a run, from its folder alone."""

import argparse
import json
import sys

from vit_jax.errors import parse_arguments, run_command


def main(argv: list[str] | None = None) -> int:
    """Evaluates a checkpoint over every test picture and prints the results."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--step", type=int, help="which checkpoint; the latest unless given")
    parser.add_argument("--data_dir", help="where the dataset lies, if no longer where the config says")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parse_arguments(parser, argv)

    from vit_jax import trainer

    run = trainer.load_run(arguments.workdir, step=arguments.step)
    if arguments.data_dir is not None:
        run.config.dataset.data_dir = arguments.data_dir
    results = trainer.evaluate_run(run)
    if arguments.json:
        print(json.dumps({"step": run.step, **results}))
    else:
        print(f"{'step':<22}{run.step}")
        print("\n".join(f"{name:<22}{value:.4f}" for name, value in results.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
