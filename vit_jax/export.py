"""`python -m vit_jax.export --workdir DIR --format FORMAT --out PATH`: a run's model for use elsewhere."""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vit_jax.runtime.errors import UserError, one_line, parse_arguments, run_command


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

    with _new_folder(out) as folder:
        pretrained.save_folder(folder, run.params, run.metadata)


def export_safetensors(run: Any, out: Path) -> None:
    """A folder that Hugging Face's `ViTForImageClassification.from_pretrained` reads."""
    from safetensors.numpy import save

    from vit_jax.pretrained import huggingface

    if run.metadata.architecture != "vit":
        raise UserError(f"--format safetensors is for Vision Transformers; this is a {run.metadata.architecture}")
    config, preprocessor = huggingface.huggingface_config(run.metadata)
    with _new_folder(out) as folder:
        tensors = save(huggingface.to_huggingface(run.params), metadata={"format": "pt"})
        (folder / "model.safetensors").write_bytes(tensors)
        _write_json(folder / "config.json", config)
        _write_json(folder / "preprocessor_config.json", preprocessor)
        _write_json(folder / "about.json", run.metadata.to_json())


def export_stablehlo(run: Any, out: Path) -> None:
    """A program with its weights, uint8 [b h w 3] -> float32 [b classes] of logits, that needs JAX alone."""
    import jax
    import jax.numpy as jnp
    from jax import export

    size = run.image_size
    (batch,) = export.symbolic_shape("batch")
    pictures = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    params = jax.device_get(run.params)
    exported = export.export(jax.jit(lambda images: run.forward(params, images)), platforms=("cpu", "cuda", "tpu"))(
        pictures
    )
    with _new_folder(out) as folder:
        (folder / "model.stablehlo").write_bytes(exported.serialize())
        _write_json(folder / "about.json", run.metadata.to_json())


FORMATS: dict[str, Callable[[Any, Path], None]] = {
    "npz": export_npz,
    "orbax": export_orbax,
    "safetensors": export_safetensors,
    "stablehlo": export_stablehlo,
}


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is renamed when the body is done, and removed when it fails."""
    temporary = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
