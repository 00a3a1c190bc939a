"""Finds pretrained checkpoints by name: Google's, downloaded to the cache, and the one in the package."""

import csv
import difflib
import importlib.resources
import re
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from vit_jax.pretrained.formats import to_original
from vit_jax.pretrained.npz import load_npz
from vit_jax.pretrained.sizes import infer_sizes
from vit_jax.runtime import download
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.runtime.files import cache_dir

_VARIANTS = {
    "imagenet21k": "B_16 B_32 L_16 L_32 H_14 R50+B_16 R50+L_32 R26+B_32",
    "imagenet21k+imagenet2012": "B_16 B_16-224 B_32 L_16 L_16-224 L_32 R50+B_16",
    "sam": "S_16 S_32 B_16 B_32 L_16 L_32",
    "gsam": "S_16 S_32 B_16 B_32",
}
RELEASED = (
    *(
        directory + "/" + re.sub(r"^(R\d+\+)?", r"\1ViT-", variant)
        for directory, variants in _VARIANTS.items()
        for variant in variants.split()
    ),
    "bit_models/BiT-M-R50x1",
    "bit_models/BiT-S-R50x1",
    *(f"big_vision/vit_s16_i1k_{epochs}ep" for epochs in (90, 150, 300)),
)
"""Names of Google's checkpoints. BiT-M was trained on ImageNet-21k; BiT-S, big_vision, sam and gsam on ImageNet-2012.
For the checkpoints of "augreg", see `resolve`."""

_URL = "https://storage.googleapis.com/"
_AUGREG = "augreg/"


def is_name(text: str) -> bool:
    """Returns True if `resolve` treats this as a name, not as a path."""
    return text == "micro" or text in RELEASED or (text.startswith(_AUGREG) and not Path(text).exists())


def needs_download(name_or_path: str) -> bool:
    """Returns True if `resolve` would download the checkpoint."""
    return is_name(name_or_path) and name_or_path != "micro" and not _cached(f"{name_or_path}.npz").exists()


def is_local(name_or_path: str) -> bool:
    """Returns True if the checkpoint exists on disk."""
    if is_name(name_or_path):
        return not needs_download(name_or_path)
    return name_or_path != "" and Path(name_or_path).expanduser().exists()


def resolve(name_or_path: str) -> Path:
    """Returns the path of a checkpoint; downloads it if necessary.

    Args:
        name_or_path: "micro", which is part of the package; a path; a name in `RELEASED`; "augreg/" and a file name
            without .npz; or "augreg/" and a variant such as "B_16", for its ImageNet-21k checkpoint with the best
            validation accuracy.
    """
    if name_or_path == "micro":
        return Path(str(importlib.resources.files("vit_jax") / "assets" / "ViT-micro_4.npz"))
    if name_or_path in RELEASED:
        return _fetch(f"{name_or_path}.npz", _check_checkpoint)
    path = Path(name_or_path).expanduser()
    if path.is_file() or path.is_dir():
        return path
    if name_or_path.startswith(_AUGREG) and path.suffix != ".npz":
        variant = name_or_path.removeprefix(_AUGREG)
        name = name_or_path if "-" in variant else _best_augreg(variant)
        return _fetch(f"{name}.npz", _check_checkpoint)
    names = ["micro", *RELEASED, f"{_AUGREG}B_16"]
    wanted = name_or_path.removesuffix(".npz")
    near = [name for name in names if name.endswith(f"/{wanted}")]
    near = near or difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:3]
    raise (UserError if path.suffix == ".npz" else UsageError)(
        f"there is no file {name_or_path}, and no pretrained checkpoint of that name; check the path, or give a name "
        f"such as {', '.join(near)}"
    )


def _fetch(file: str, check: Callable[[Path], object]) -> Path:
    bucket = "" if file.startswith(("bit_models/", "big_vision/")) else "vit_models/"
    return download.fetch(_URL + bucket + urllib.parse.quote(file), _cached(file), check=check)


def _cached(file: str) -> Path:
    return cache_dir() / file


def _best_augreg(variant: str) -> str:
    """Returns the name of a variant's ImageNet-21k checkpoint with the best final validation accuracy."""
    rows = _read_index(_fetch(f"{_AUGREG}index.csv", _read_index))
    accuracies = {file: accuracy for file, accuracy in rows.items() if file.split("-")[0] == variant}
    if not accuracies:
        variants = dict.fromkeys(file.split("-")[0] for file in rows)
        raise UsageError(f"unknown variant {_AUGREG}{variant}; expected a file name, or one of {', '.join(variants)}")
    best = max(accuracies, key=lambda file: accuracies[file])
    print(f"{_AUGREG}{variant} is {_AUGREG}{best}", file=sys.stderr)
    return f"{_AUGREG}{best}"


def _read_index(path: Path) -> dict[str, float]:
    """Reads {file: final validation accuracy} of the ImageNet-21k checkpoints from the index of augreg."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {row["filename"]: float(row["final_val"]) for row in rows if row["ds"] == "i21k"}
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path} is not an index of augreg; expected the columns filename, ds, final_val") from error


def _check_checkpoint(path: Path) -> None:
    infer_sizes(to_original(load_npz(path)))
