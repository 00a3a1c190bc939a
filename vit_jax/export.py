"""`python -m vit_jax.export --workdir DIR --format FORMAT --out PATH`: a run's model for use elsewhere."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_jax.runtime.errors import UserError, parse_arguments, run_command
from vit_jax.runtime.files import atomic_path


def main(argv: list[str] | None = None) -> int:
    """Writes the model and prints its place."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.export", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="of what is written")
    parser.add_argument("--out", required=True, help="a file for npz, a new folder for the others")
    parser.add_argument("--step", type=int, help="which checkpoint; the latest unless given")
    parser.add_argument("--no_ema", action="store_true", help="the parameters themselves, where averages were kept")
    arguments = parse_arguments(parser, argv)
    out = Path(arguments.out)
    if out.exists():
        raise UserError(f"--out {out} is there already; remove it, or give another")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: its folder {out.absolute().parent} does not exist; make it first")

    from vit_jax import trainer

    run = trainer.load_run(arguments.workdir, step=arguments.step, use_ema=not arguments.no_ema)
    FORMATS[arguments.format](run, out)
    print(out)
    return 0


def export_npz(run: Any, out: Path) -> None:
    """The released layout; `vit_jax.load(out)`, or `config.pretrained`, reads it."""
    import jax

    from vit_jax import pretrained

    pretrained.save_npz(out, jax.device_get(run.params), run.metadata)


def export_orbax(run: Any, out: Path) -> None:
    """The parameters as a checkpoint of their own: `StandardCheckpointer().restore(out / "params")`."""
    from vit_jax import pretrained

    with atomic_path(out) as folder:
        folder.mkdir()
        pretrained.save_orbax(folder, run.params, run.metadata)


def export_safetensors(run: Any, out: Path) -> None:
    """A folder that Hugging Face's `ViTForImageClassification.from_pretrained` reads."""
    from vit_jax.pretrained import huggingface

    with atomic_path(out) as folder:
        folder.mkdir()
        huggingface.save_huggingface(folder, run.params, run.metadata)


def export_stablehlo(run: Any, out: Path) -> None:
    """A program with its weights, uint8 [b h w 3] -> float32 [b classes] of logits, that needs JAX alone."""
    import jax
    import jax.numpy as jnp
    from jax import export

    from vit_jax import pretrained

    size = run.image_size
    (batch,) = export.symbolic_shape("batch")
    pictures = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    params = jax.device_get(run.params)
    exported = export.export(jax.jit(lambda images: run.forward(params, images)), platforms=("cpu", "cuda", "tpu"))(
        pictures
    )
    with atomic_path(out) as folder:
        folder.mkdir()
        (folder / "model.stablehlo").write_bytes(exported.serialize())
        pretrained.save_metadata(folder, run.metadata, params)


FORMATS: dict[str, Callable[[Any, Path], None]] = {
    "npz": export_npz,
    "orbax": export_orbax,
    "safetensors": export_safetensors,
    "stablehlo": export_stablehlo,
}


if __name__ == "__main__":
    sys.exit(run_command(main))
