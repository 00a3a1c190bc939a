"""Parameter files by name: Google's, fetched into the cache, and the one that comes with the package."""

import difflib
import functools
import importlib.resources
import urllib.parse
from pathlib import Path
from typing import Any

from vit_jax import download
from vit_jax.errors import UsageError, UserError
from vit_jax.pretrained.architecture import infer_architecture
from vit_jax.pretrained.bit import infer_resnet, squeeze_head
from vit_jax.pretrained.npz import load_npz

RELEASED = {
    "imagenet21k/ViT-B_16": 412_815_506,
    "imagenet21k/ViT-B_32": None,
    "imagenet21k/ViT-L_16": None,
    "imagenet21k/ViT-L_32": None,
    "imagenet21k/ViT-H_14": None,
    "imagenet21k+imagenet2012/ViT-B_16": None,
    "imagenet21k+imagenet2012/ViT-B_32": None,
    "imagenet21k+imagenet2012/ViT-L_16": None,
    "imagenet21k+imagenet2012/ViT-L_32": None,
    "bit_models/BiT-M-R50x1": None,
    "bit_models/BiT-S-R50x1": None,
}
"""Names of Google's files, with their bytes where these are known. BiT-M saw ImageNet-21k, BiT-S ImageNet-2012."""

_URL = "https://storage.googleapis.com/{}.npz"
_WIDTH_AND_DEPTH = {"B": (768, 12), "L": (1024, 24), "H": (1280, 32)}


def resolve(name_or_path: str) -> Path:
    """Finds a parameter file by its path or its name, and fetches it where it has to be.

    Args:
        name_or_path: "micro", the file that comes with the package; a key of `RELEASED`, fetched into the cache; or the
            path of a file.

    Raises:
        UsageError: there is no such name.
        UserError: there is no such .npz file, or a released file cannot be had.
    """
    if name_or_path == "micro":
        path = Path(str(importlib.resources.files("vit_jax") / "assets" / "ViT-micro_4.npz"))
        if not path.is_file():
            raise UserError(f"{path}, which comes with the package, is missing; install vit_jax again")
        return path
    if name_or_path in RELEASED:
        bucket = "" if _is_resnet(name_or_path) else "vit_models/"
        return download.fetch(
            _URL.format(bucket + urllib.parse.quote(name_or_path)),
            download.cache_dir() / f"{name_or_path}.npz",
            num_bytes=RELEASED[name_or_path],
            check=functools.partial(_check_released, name_or_path),
        )
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    names = ["micro", *RELEASED]
    near = difflib.get_close_matches(name_or_path.removesuffix(".npz"), names, n=3, cutoff=0.4) or names
    advice = f"check the path, or give a name such as {', '.join(near)}"
    if path.suffix == ".npz":
        raise UserError(f"{path} does not exist; {advice}")
    raise UsageError(f"no pretrained file {name_or_path!r}: it is neither a file nor a known name; {advice}")


def _check_released(name: str, path: Path) -> None:
    """Reads a fetched file whole and compares its sizes with its name."""
    params, expected = load_npz(path), _sizes(name)
    got = infer_resnet(squeeze_head(params)) if _is_resnet(name) else infer_architecture(params)
    wrong = [f"{key} {got[key]} instead of {size}" for key, size in expected.items() if got[key] != size]
    if wrong:
        raise UserError(f"the file is not {name}: {', '.join(wrong)}")


def _sizes(name: str) -> dict[str, Any]:
    """What a released name says of the sizes."""
    if _is_resnet(name):
        return {"units": (3, 4, 6, 3), "width": 64}
    variant, patch_size = name.rpartition("ViT-")[2].split("_")
    width, depth = _WIDTH_AND_DEPTH[variant]
    return {"patch_size": int(patch_size), "hidden_size": width, "num_layers": depth}


def _is_resnet(name: str) -> bool:
    return name.startswith("bit_models/")
