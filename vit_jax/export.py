"""`python -m vit_jax.export --workdir DIR --format FORMAT --out PATH`: exports a run, or converts a checkpoint."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax.export
import numpy as np

import vit_jax
from vit_jax import pretrained
from vit_jax.classifier import Classifier
from vit_jax.pretrained import huggingface
from vit_jax.runtime.arguments import add_model_arguments, create_parser, parse_arguments
from vit_jax.runtime.errors import UserError, run_command
from vit_jax.runtime.files import atomic_path


def main(argv: list[str] | None = None) -> int:
    """Saves the model and prints its path."""
    parser = create_parser(
        "python -m vit_jax.export",
        "Export the model of a run, or convert a pretrained checkpoint to another format.",
        "--workdir runs/digits --format npz --out digits.npz",
        "--model augreg/B_16 --format safetensors --out vit_b16",
    )
    add_model_arguments(parser)
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="format of the export")
    parser.add_argument("--out", required=True, metavar="PATH", help="new file (npz) or directory (other formats)")
    parser.add_argument(
        "--no_ema", action="store_true", help="export parameters without EMA (default: with EMA, if any)"
    )
    arguments = parse_arguments(parser, argv)
    out = Path(arguments.out)
    if out.exists():
        raise UserError(f"--out {out} already exists; remove it, or give another path")
    model = vit_jax.load(arguments.model, step=arguments.step, use_ema=not arguments.no_ema)
    FORMATS[arguments.format](model, out)
    print(out)
    return 0


def export_npz(model: Classifier, out: Path) -> None:
    """Saves a file in the original ViT checkpoint format, for `vit_jax.load(out)` and `config.pretrained`."""
    pretrained.save_npz(out, jax.device_get(model.params), model.metadata)


def export_orbax(model: Classifier, out: Path) -> None:
    """Saves a directory with an Orbax checkpoint: `StandardCheckpointer().restore(out / "params")`."""
    with atomic_path(out) as directory:
        directory.mkdir()
        pretrained.save_orbax(directory, model.params, model.metadata)


def export_safetensors(model: Classifier, out: Path) -> None:
    """Saves a directory for Hugging Face's `ViTForImageClassification.from_pretrained`."""
    with atomic_path(out) as directory:
        directory.mkdir()
        huggingface.save_huggingface(directory, model.params, model.metadata)


def export_stablehlo(model: Classifier, out: Path) -> None:
    """Saves a program with its weights that needs only JAX, uint8 [b h w 3] -> float32 logits [b classes]."""
    size = model.image_size
    images = jax.export.symbolic_args_specs(np.zeros((1, size, size, 3), np.uint8), "batch, ...")
    model = dataclasses.replace(model, model=model.metadata.create_model())  # without cuDNN's attention
    forward = jax.jit(functools.partial(model.forward, jax.device_get(model.params)))
    exported = jax.export.export(forward, platforms=("cpu", "cuda", "tpu"))(images)
    with atomic_path(out) as directory:
        directory.mkdir()
        (directory / "model.stablehlo").write_bytes(exported.serialize())
        pretrained.save_metadata(directory, model.metadata, model.params)


FORMATS: dict[str, Callable[[Classifier, Path], None]] = {
    "npz": export_npz,
    "orbax": export_orbax,
    "safetensors": export_safetensors,
    "stablehlo": export_stablehlo,
}


if __name__ == "__main__":
    sys.exit(run_command(main))
