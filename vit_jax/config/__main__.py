"""Prints every config key: `python -m vit_jax.config`."""

import sys

from vit_jax.config.command_line import main
from vit_jax.runtime.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
