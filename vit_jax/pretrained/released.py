"""Parameter files by name: Google's, fetched into the cache, and the one that comes with the package."""

import csv
import difflib
import functools
import importlib.resources
import re
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from vit_jax.pretrained.bit import infer_resnet
from vit_jax.pretrained.formats import to_original
from vit_jax.pretrained.infer import infer_architecture
from vit_jax.pretrained.npz import load_npz
from vit_jax.runtime import download
from vit_jax.runtime.errors import UsageError, UserError

_FOLDERS = {
    "imagenet21k": "B_16 B_32 L_16 L_32 H_14 R50+B_16 R50+L_32 R26+B_32",
    "imagenet21k+imagenet2012": "B_16 B_16-224 B_32 L_16 L_16-224 L_32 R50+B_16",
    "sam": "S_16 S_32 B_16 B_32 L_16 L_32",
    "gsam": "S_16 S_32 B_16 B_32",
}


def _file_name(variant: str) -> str:
    """As the folders spell it: "R50+B_16" -> "R50+ViT-B_16"."""
    stem, plus, transformer = variant.rpartition("+")
    return f"{stem}{plus}ViT-{transformer}"


RELEASED = (
    *(f"{folder}/{_file_name(variant)}" for folder, variants in _FOLDERS.items() for variant in variants.split()),
    "bit_models/BiT-M-R50x1",
    "bit_models/BiT-S-R50x1",
    *(f"big_vision/vit_s16_i1k_{epochs}ep" for epochs in (90, 150, 300)),
)
"""Names of Google's files. BiT-M saw ImageNet-21k; BiT-S, big_vision, sam and gsam ImageNet-2012. Besides there is
every file of "augreg", see `resolve`."""

_NUM_BYTES = {"imagenet21k/ViT-B_16": 412_815_506}  # the only one that was found
_URL = "https://storage.googleapis.com/{}"
_WIDTH_AND_DEPTH = {"Ti": (192, 12), "S": (384, 12), "B": (768, 12), "L": (1024, 24), "H": (1280, 32)}
_STEM_UNITS = {"R": (), "R26": (2, 2, 2, 2), "R50": (3, 4, 6, 3)}
_VARIANT = re.compile(r"(?:(R\d*)[+_](?:ViT-)?)?(?:ViT-)?(Ti|S|B|L|H)_(\d+)(?:-.*)?")
_AUGREG = "augreg/"


def is_name(text: str) -> bool:
    """Whether this is a name, and not a path, for `resolve`; of augreg's every one is."""
    return text == "micro" or text in RELEASED or (text.startswith(_AUGREG) and not Path(text).exists())


def resolve(name_or_path: str) -> Path:
    """Finds a parameter file by its path or its name, and fetches it where it has to be.

    Args:
        name_or_path: "micro", the file that comes with the package; the path of a file; or, fetched into the cache, a
            name of `RELEASED`, "augreg/" and a file's name without .npz, or "augreg/" and a variant such as "B_16",
            which means its ImageNet-21k file of the best accuracy in validation.

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
        return _fetch(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    if name_or_path.startswith(_AUGREG) and path.suffix != ".npz":
        variant = name_or_path.removeprefix(_AUGREG)
        return _fetch(name_or_path if "-" in variant else _best_augreg(variant))
    names = ["micro", *RELEASED, f"{_AUGREG}B_16"]
    wanted = name_or_path.removesuffix(".npz")
    near = [name for name in names if name.endswith(f"/{wanted}")]
    near = near or difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names
    advice = f"check the path, or give a name such as {', '.join(near)}"
    if path.suffix == ".npz":
        raise UserError(f"{path} does not exist; {advice}")
    raise UsageError(f"no pretrained file {name_or_path!r}: it is neither a file nor a known name; {advice}")


def _fetch(name: str) -> Path:
    return download.fetch(
        _address(f"{name}.npz"),
        download.cache_dir() / f"{name}.npz",
        num_bytes=_NUM_BYTES.get(name),
        check=functools.partial(_check_released, name),
    )


def _address(name: str) -> str:
    bucket = "" if name.startswith(("bit_models/", "big_vision/")) else "vit_models/"
    return _URL.format(bucket + urllib.parse.quote(name))


def _best_augreg(variant: str) -> str:
    """Name of a variant's ImageNet-21k file of the best final accuracy in validation, by the folder's index."""
    name = f"{_AUGREG}index.csv"
    index = download.fetch(_address(name), download.cache_dir() / name, check=_check_index)
    rows = [row for row in _read_index(index) if row["ds"] == "i21k"]
    of_variant = [row for row in rows if row["filename"].split("-")[0] == variant]
    if not of_variant:
        variants = dict.fromkeys(row["filename"].split("-")[0] for row in rows)
        raise UsageError(f"no variant {_AUGREG}{variant}; give a file's name, or one of {', '.join(variants)}")
    best = max(of_variant, key=lambda row: float(row["final_val"]))["filename"]
    print(f"{_AUGREG}{variant} is {_AUGREG}{best}", file=sys.stderr)
    return f"{_AUGREG}{best}"


def _check_index(path: Path) -> None:
    _read_index(path)


def _read_index(path: Path) -> list[dict[str, str]]:
    """The rows of augreg's index; a file stands in several, one for each time that it was fine-tuned."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["filename"], row["ds"], float(row["final_val"])
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path} is no index of augreg: expected the columns filename, ds, final_val") from error
    return rows


def _check_released(name: str, path: Path) -> None:
    """Reads a fetched file whole and compares its sizes with its name."""
    params = to_original(load_npz(path))
    got = infer_resnet(params) if _is_resnet(name) else infer_architecture(params)
    wrong = [f"{key} {got.get(key)} instead of {size}" for key, size in _sizes(name).items() if got.get(key) != size]
    if wrong:
        raise UserError(f"the file is not {name}: {', '.join(wrong)}")


def _sizes(name: str) -> dict[str, Any]:
    """What a released name says of the sizes; nothing where it is not one of the known form."""
    if _is_resnet(name):
        return {"units": (3, 4, 6, 3), "width": 64}
    match = _VARIANT.fullmatch(name.rpartition("/")[2])
    if not match:
        return {}
    stem, transformer, pixels = match.groups()
    width, depth = _WIDTH_AND_DEPTH[transformer]
    sizes = {"hidden_size": width, "num_layers": depth}
    if stem is None:
        return {"patch_size": int(pixels), **sizes}
    # A patch of 16 pixels is a place of the third block, which then takes the units of the fourth, too.
    units = (3, 4, 9) if (stem, pixels) == ("R50", "16") else _STEM_UNITS.get(stem)
    return {**sizes, "stem_units": units}


def _is_resnet(name: str) -> bool:
    return name.startswith("bit_models/")
