"""The config of a run: its keys, config files, flags, and the file in the run directory."""

from vit_jax.config.command_line import add_dataset_arguments, main, parse_config, parse_dataset
from vit_jax.config.keys import KEYS, MODES, check_config, get_config, resolve_steps
from vit_jax.config.saved import load_config, resume_config, save_config
from vit_jax.config.variants import STEM_UNITS, VARIANTS, model_sizes

__all__ = [
    "KEYS",
    "MODES",
    "STEM_UNITS",
    "VARIANTS",
    "add_dataset_arguments",
    "check_config",
    "get_config",
    "load_config",
    "main",
    "model_sizes",
    "parse_config",
    "parse_dataset",
    "resolve_steps",
    "resume_config",
    "save_config",
]
