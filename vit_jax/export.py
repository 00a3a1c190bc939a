"""`python -m vit_jax.export --workdir DIR --format FORMAT --out PATH`: exports the model of a run."""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax.export
import numpy as np

from vit_jax import pretrained
from vit_jax.pretrained import huggingface
from vit_jax.run import Run, load_run
from vit_jax.runtime.errors import UserError, parse_arguments, run_command
from vit_jax.runtime.files import atomic_path


def main(argv: list[str] | None = None) -> int:
    """Saves the model and prints its path."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.export", description=__doc__)
    parser.add_argument("--workdir", required=True, help="run directory")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="format of the export")
    parser.add_argument("--out", required=True, help="a new file (npz) or a new directory (other formats)")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: latest)")
    parser.add_argument("--no_ema", action="store_true", help="export the parameters without EMA")
    arguments = parse_arguments(parser, argv)
    out = Path(arguments.out)
    if out.exists():
        raise UserError(f"--out {out} already exists; remove it, or give another path")
    FORMATS[arguments.format](load_run(arguments.workdir, step=arguments.step, use_ema=not arguments.no_ema), out)
    print(out)
    return 0


def export_npz(run: Run, out: Path) -> None:
    """Saves a file in the original ViT checkpoint format, for `vit_jax.load(out)` and `config.pretrained`."""
    pretrained.save_npz(out, jax.device_get(run.params), run.metadata)


def export_orbax(run: Run, out: Path) -> None:
    """Saves a directory with an Orbax checkpoint: `StandardCheckpointer().restore(out / "params")`."""
    with atomic_path(out) as directory:
        directory.mkdir()
        pretrained.save_orbax(directory, run.params, run.metadata)


def export_safetensors(run: Run, out: Path) -> None:
    """Saves a directory for Hugging Face's `ViTForImageClassification.from_pretrained`."""
    with atomic_path(out) as directory:
        directory.mkdir()
        huggingface.save_huggingface(directory, run.params, run.metadata)


def export_stablehlo(run: Run, out: Path) -> None:
    """Saves a program with its weights that needs only JAX, uint8 [b h w 3] -> float32 logits [b classes]."""
    images = jax.export.symbolic_args_specs(np.zeros((1, run.image_size, run.image_size, 3), np.uint8), "batch, ...")
    forward = jax.jit(functools.partial(run.forward, jax.device_get(run.params)))
    exported = jax.export.export(forward, platforms=("cpu", "cuda", "tpu"))(images)
    with atomic_path(out) as directory:
        directory.mkdir()
        (directory / "model.stablehlo").write_bytes(exported.serialize())
        pretrained.save_metadata(directory, run.metadata, run.params)


FORMATS: dict[str, Callable[[Run, Path], None]] = {
    "npz": export_npz,
    "orbax": export_orbax,
    "safetensors": export_safetensors,
    "stablehlo": export_stablehlo,
}


if __name__ == "__main__":
    sys.exit(run_command(main))
