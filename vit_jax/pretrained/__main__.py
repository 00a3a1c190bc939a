"""Lists pretrained checkpoints: `python -m vit_jax.pretrained --list`."""

import sys

from vit_jax.pretrained.catalog import main
from vit_jax.runtime.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
