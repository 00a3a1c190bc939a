"""Released parameter files: found by name, read, checked, fitted to a model, and written again. Host NumPy only."""

import contextlib
import dataclasses
import difflib
import functools
import importlib.resources
import math
import os
import re
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import download
from vit_jax.errors import UsageError, UserError, one_line
from vit_jax.types import FlatParams, Params

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
}
"""Names of Google's files, with their bytes where these are known."""

POSITION_KEY = "Transformer/posembed_input/pos_embedding"

_URL = "https://storage.googleapis.com/vit_models/{}.npz"
_WIDTH_AND_DEPTH = {"B": (768, 12), "L": (1024, 24), "H": (1280, 32)}
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/")

Grid = tuple[int, int]
"""Rows and columns of patches."""


# ---- reading and writing


def load_npz(path: str | os.PathLike) -> Params:
    """Reads a parameter file; every member's CRC is checked, nothing is ever unpickled.

    Args:
        path: a file as `numpy.savez` writes it.

    Returns:
        Nested dictionary of arrays whose joined keys are the file's keys. Shapes and dtypes are the file's, save that
        bfloat16, which the format keeps as two raw bytes, becomes float32 of the same values.

    Raises:
        UserError: it is missing, unreadable, empty, not an .npz, truncated or damaged, holds Python objects, or one of
            its keys is the beginning of another.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            _check_start(path, file.read(256))
            with zipfile.ZipFile(file) as archive:
                flat = {info.filename.removesuffix(".npy"): _read(path, archive, info) for info in archive.infolist()}
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; check the path, or give a released name such as imagenet21k/ViT-B_16"
        ) from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give the path of the .npz file itself") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}; check it and its disk") from error
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is truncated: the directory that ends an .npz file is not in its {path.stat().st_size:,} bytes; "
            "download or copy it again"
        ) from error
    if not flat:
        raise UserError(f"{path} holds no arrays; expected the parameters of a model")
    return _nest(path, flat)


def _check_start(path: Path, start: bytes) -> None:
    """Tells what is no ZIP archive from one that is merely cut off."""
    if not start:
        raise UserError(f"{path} is empty; download or copy it again")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError(f"{path} is not an .npz file but an HTML page, a server's answer perhaps; download it again")
    if not start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise UserError(f"{path} is not an .npz file; expected a ZIP archive of arrays, as numpy.savez writes it")


def _read(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Reads one member."""
    if not info.filename.endswith(".npy"):
        raise UserError(f"{path} is not an .npz file: its member {info.filename} is not an array; give another file")
    try:
        with archive.open(info) as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            # The CRC is compared where the member ends; a damaged header may make the array end before.
            if member.read():
                raise zipfile.BadZipFile("bytes after the array")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise UserError(
                f"{path}: {info.filename} holds Python objects, and nothing is unpickled here; save plain numbers"
            ) from error
        raise UserError(
            f"{path} is damaged at {info.filename}: {one_line(error)}; download or copy it again"
        ) from error
    return _decode_bfloat16(array)


def _decode_bfloat16(array: np.ndarray) -> np.ndarray:
    """Two raw bytes are the upper half of a float32."""
    if array.dtype != np.dtype("V2"):
        return array
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _nest(path: Path, flat: FlatParams) -> Params:
    for key in flat:
        names = key.split("/")
        for depth in range(1, len(names)):
            if (shorter := "/".join(names[:depth])) in flat:
                raise UserError(f"{path} holds both {shorter} and {key}, but an array has no parts; rename one of them")
    return unflatten_dict(flat, sep="/")


def save_npz(path: str | os.PathLike, params: Params) -> None:
    """Writes parameters as `numpy.savez` does: stored, not compressed; equal parameters give equal bytes.

    The file is written beside and then renamed, so that what stands at `path` is always whole.

    Args:
        path: where it shall stand; its folder exists.
        params: nested dictionary of arrays, NumPy's or JAX's; their joined keys become the file's keys.

    Raises:
        UserError: the file cannot be written. What stood at `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for key, leaf in flatten_dict(params, sep="/").items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(leaf), allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---- the sizes of a model


def infer_architecture(params: Params) -> dict[str, Any]:
    """Reads a Vision Transformer's sizes off the shapes of its parameters.

    Args:
        params: nested dictionary of arrays, or of anything with a shape.

    Returns:
        Arguments of `VisionTransformer`: patch_size, hidden_size, num_layers, num_heads, mlp_dim, representation_size
        (None without `pre_logits`) and num_classes.

    Raises:
        UserError: this is not a whole Vision Transformer of the original layout; names keys and the likely cause.
    """
    shapes = _shapes(params)
    cause = _foreign_layout(shapes)
    if cause:
        raise UserError(f"these are not the parameters of a ViT in the original layout: {cause}")

    def size(key: str, *, axis: int, num_axes: int) -> int:
        if len(shapes.get(key, ())) != num_axes:
            got = f"is of shape {shapes[key]}" if key in shapes else "is missing"
            raise UserError(f"this is not a whole ViT: {key} {got}; expected an array of {num_axes} axes")
        return shapes[key][axis]

    block = "Transformer/encoderblock_0"
    has_pre_logits = any(key.startswith("pre_logits/") for key in shapes)
    architecture: dict[str, Any] = {
        "patch_size": size("embedding/kernel", axis=0, num_axes=4),
        "hidden_size": size("embedding/kernel", axis=3, num_axes=4),
        "num_layers": len(_blocks(shapes)),
        "num_heads": size(f"{block}/MultiHeadDotProductAttention_1/query/kernel", axis=1, num_axes=3),
        "mlp_dim": size(f"{block}/MlpBlock_3/Dense_0/kernel", axis=1, num_axes=2),
        "representation_size": size("pre_logits/kernel", axis=1, num_axes=2) if has_pre_logits else None,
        "num_classes": size("head/kernel", axis=1, num_axes=2),
    }
    expected = _expected_shapes(**architecture, num_tokens=size(POSITION_KEY, axis=1, num_axes=3))
    if shapes != expected:
        raise UserError(f"this is not a whole ViT: {_differences(shapes, expected)}")
    return architecture


def _expected_shapes(
    *,
    patch_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    mlp_dim: int,
    representation_size: int | None,
    num_classes: int,
    num_tokens: int,
) -> dict[str, tuple[int, ...]]:
    """Every key of a released file, with its shape."""

    def dense(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {f"{name}/kernel": inputs + outputs, f"{name}/bias": outputs}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}/scale": width, f"{name}/bias": width}

    width, heads = (hidden_size,), (num_heads, hidden_size // num_heads if num_heads else 0)
    shapes: dict[str, tuple[int, ...]] = {"cls": (1, 1, hidden_size), POSITION_KEY: (1, num_tokens, hidden_size)}
    shapes |= dense("embedding", (patch_size, patch_size, 3), width)
    for i in range(num_layers):
        block = f"Transformer/encoderblock_{i}"
        shapes |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_2")
        for name in ("query", "key", "value"):
            shapes |= dense(f"{block}/MultiHeadDotProductAttention_1/{name}", width, heads)
        shapes |= dense(f"{block}/MultiHeadDotProductAttention_1/out", heads, width)
        shapes |= dense(f"{block}/MlpBlock_3/Dense_0", width, (mlp_dim,))
        shapes |= dense(f"{block}/MlpBlock_3/Dense_1", (mlp_dim,), width)
    shapes |= norm("Transformer/encoder_norm")
    if representation_size is not None:
        shapes |= dense("pre_logits", width, (representation_size,))
    return shapes | dense("head", (representation_size or hidden_size,), (num_classes,))


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {key: tuple(leaf.shape) for key, leaf in flatten_dict(params, sep="/").items()}


def _blocks(keys: Iterable[str]) -> list[int]:
    """The numbers of the encoder blocks, in order."""
    return sorted({int(match[1]) for key in keys if (match := _BLOCK.match(key))})


def _foreign_layout(keys: Iterable[str]) -> str:
    """Says which other known file this is; empty for the original layout."""
    keys = list(keys)

    def some_start_with(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if some_start_with("opt/", "optimizer/"):
        return "it carries an optimizer's state (opt/…, parameters under opt/target/); give the parameters alone"
    if some_start_with("params/", "pos_embedding", "Transformer/encoderblock/"):
        return "it looks like a big_vision file (params/…), whose names differ; give a file of the original release"
    if some_start_with("conv_root/", "gn_root/"):
        return "it looks like a hybrid of ResNet and ViT (conv_root/…), such as R50+ViT-B_16; give a plain ViT"
    if some_start_with("resnet/"):
        return "it looks like a ResNet (BiT) file (resnet/…); give a ViT"
    if not _blocks(keys):
        return f"it is not a ViT file, for it holds {_few(sorted(keys)) or 'nothing'}; give a ViT"
    return ""


# ---- fitting a file to a model


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every key; `str` gives a few lines to print.

    Attributes:
        loaded: taken from the file as they are.
        resampled: taken from the file, interpolated from `old_grid` to `new_grid`.
        new: not taken from the file; they keep the target's values.
        dropped: in the file, not used.
        old_grid: rows and columns of patches in the file.
        new_grid: rows and columns of patches in the model.
        sizes: (group, key) -> count of numbers; of a dropped key in the file, otherwise in the model.
    """

    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    old_grid: Grid
    new_grid: Grid
    sizes: Mapping[tuple[str, str], int] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        """A line for each group of keys."""
        rows = []
        for what in ("loaded", "resampled", "new", "dropped"):
            groups: dict[str, list[int]] = {}
            for key in getattr(self, what):
                groups.setdefault(self._group(key), []).append(self.sizes[what, key])
            for i, (group, sizes) in enumerate(groups.items()):
                arrays = f"{len(sizes):4} {'array' if len(sizes) == 1 else 'arrays'}"
                rows.append((what if i == 0 else "", group, arrays, sum(sizes)))
        width = max((len(group) for _, group, _, _ in rows), default=0)
        lines = [f"{what:9}  {group:{width}}  {arrays:11} {numbers:>13,}" for what, group, arrays, numbers in rows]
        if self.resampled:
            old, new = (f"{rows} × {columns}" for rows, columns in (self.old_grid, self.new_grid))
            lines.append(f"position embeddings: {old} → {new} patches")
        return "\n".join(lines)

    def _group(self, key: str) -> str:
        if _BLOCK.match(key):
            blocks = _blocks(self.loaded)
            return f"Transformer/encoderblock_{{{blocks[0]}..{blocks[-1]}}}/…"
        return f"{key.rpartition('/')[0]}/…" if key.endswith(("/kernel", "/bias", "/scale")) else key


def adapt_params(
    pretrained: Params,
    target: Params,
    *,
    grid: Grid | None = None,
    pretrained_grid: Grid | None = None,
    keep_head: bool = False,
) -> tuple[Params, Report]:
    """Fits the parameters of a file to a model.

    The head is the target's (see `keep_head`), a `pre_logits` that the target lacks is dropped, position embeddings are
    resampled where the grids differ, and every other key must be there with the same shape.

    Args:
        pretrained: parameters as `load_npz` returns them.
        target: parameters of the model, freshly initialised. Only of new leaves are the values read; the others may
            be anything with a shape, such as `jax.ShapeDtypeStruct`.
        grid: rows and columns of patches in the model; None: a square.
        pretrained_grid: rows and columns of patches in the file; None: a square.
        keep_head: take the head from the file, too; it must then fit.

    Returns:
        Parameters with the structure and shapes of `target`, as float32 NumPy arrays of their own; and a `Report` of
        every key.

    Raises:
        UserError: a key is missing, unexpected or of another shape (names keys and the likely cause); or patches are
            not a square and no grid is given; or a grid does not match the number of patches.

    Source:
        Dosovitskiy et al. 2021, section 3.2: a zero head, and interpolated position embeddings.
    """
    source, wanted = flatten_dict(pretrained, sep="/"), flatten_dict(target, sep="/")
    new = tuple(key for key in wanted if key.startswith("head/") and not keep_head)
    dropped = tuple(
        key
        for key in source
        if (key.startswith("head/") and not keep_head) or (key.startswith("pre_logits/") and key not in wanted)
    )
    _check_fit(
        {key: tuple(leaf.shape) for key, leaf in source.items() if key not in dropped},
        {key: tuple(leaf.shape) for key, leaf in wanted.items() if key not in new},
    )
    old_grid = _check_grid(pretrained_grid, source[POSITION_KEY].shape[1] - 1, "pretrained_grid")
    new_grid = _check_grid(grid, wanted[POSITION_KEY].shape[1] - 1, "grid")
    resampled = () if old_grid == new_grid else (POSITION_KEY,)
    loaded = tuple(key for key in wanted if key not in new and key not in resampled)

    flat = {key: _own_float32((wanted if key in new else source)[key]) for key in wanted}
    for key in resampled:
        flat[key] = resample_position_embeddings(flat[key], old_grid, new_grid)
    sizes = {("dropped", key): math.prod(source[key].shape) for key in dropped}
    for what, keys in (("loaded", loaded), ("resampled", resampled), ("new", new)):
        sizes |= {(what, key): flat[key].size for key in keys}
    return unflatten_dict(flat, sep="/"), Report(loaded, resampled, new, dropped, old_grid, new_grid, sizes)


def resample_position_embeddings(pos_embedding: np.ndarray, grid: Grid, new_grid: Grid) -> np.ndarray:
    """Interpolates position embeddings linearly from one grid of patches to another, corners on corners.

    Args:
        pos_embedding: [1 1+h*w d], float32: the class token's row, then the grid's rows one after another.
        grid: its h and w.
        new_grid: the wanted h' and w'.

    Returns:
        [1 1+h'*w' d], float32; the class token's row is unchanged.

    Raises:
        UserError: `grid` does not match the shape.

    Source:
        Dosovitskiy et al. 2021, section 3.2; as `scipy.ndimage.zoom(order=1)` does it.
    """
    grid = _check_grid(grid, pos_embedding.shape[1] - 1, "grid")
    width = pos_embedding.shape[2]
    old = pos_embedding[0, 1:].reshape(*grid, width)  # [h w d]
    zoom = [after / before for before, after in zip(grid, new_grid, strict=True)]
    # "nearest": where rounding puts the last sample just outside the grid, the default takes zero.
    new = scipy.ndimage.zoom(old, (*zoom, 1), order=1, mode="nearest")  # [h' w' d]
    if new.shape != (*new_grid, width):
        raise AssertionError(f"zoomed {grid} to {new.shape[:2]} instead of {new_grid}")
    return np.concatenate([pos_embedding[:, :1], new.reshape(1, -1, width)], axis=1)  # [1 1+h'*w' d]


def _check_grid(grid: Grid | None, num_patches: int, name: str) -> Grid:
    if grid is None:
        side = math.isqrt(max(num_patches, 0))
        if side * side != num_patches or not side:
            raise UserError(
                f"the position embeddings are of {num_patches} patches, which is not a square; "
                f"give {name}=(rows, columns)"
            )
        return side, side
    rows, columns = grid
    if rows * columns != num_patches or rows < 1:
        raise UserError(
            f"{name} is {rows} × {columns}, but the position embeddings are of {num_patches} patches; "
            "expected rows × columns to be equal to it"
        )
    return rows, columns


def _own_float32(leaf: Any) -> np.ndarray:
    """A copy, so that nobody changes the file's arrays through the model's."""
    return np.array(_decode_bfloat16(np.asarray(leaf)), dtype=np.float32)


def _check_fit(source: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Compares keys and shapes; the number of position embeddings may differ."""
    cause = _foreign_layout(source) or _other_sizes(source, wanted)
    if POSITION_KEY in source and POSITION_KEY in wanted:
        old, new = source[POSITION_KEY], wanted[POSITION_KEY]
        if len(old) == len(new) == 3:
            source = source | {POSITION_KEY: (old[0], new[1], old[2])}
    if source != wanted:
        raise UserError(
            f"the file's parameters do not fit the model: {cause + '; ' if cause else ''}{_differences(source, wanted)}"
        )


def _other_sizes(source: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str:
    """Names the sizes in which two variants differ; empty if there is none."""
    block = "Transformer/encoderblock_0"
    places = [
        ("patch", "embedding/kernel", 0),
        ("hidden_size", "embedding/kernel", -1),
        ("num_heads", f"{block}/MultiHeadDotProductAttention_1/query/kernel", 1),
        ("mlp_dim", f"{block}/MlpBlock_3/Dense_0/kernel", -1),
        ("num_classes", "head/kernel", -1),
    ]
    sizes = [("num_layers", len(_blocks(source)), len(_blocks(wanted)))]
    for name, key, axis in places:
        if len(source.get(key, ())) > 1 and len(wanted.get(key, ())) > 1:
            sizes.append((name, source[key][axis], wanted[key][axis]))
    different = [f"{name} is {got} in the file, {model} in the model" for name, got, model in sizes if got != model]
    return f"{', '.join(different)}: another variant" if different else ""


def _differences(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    """Lists what is missing, unexpected, or of another shape."""
    other = [
        f"{key} {shapes[key]} instead of {expected[key]}"
        for key in expected
        if key in shapes and shapes[key] != expected[key]
    ]
    lists = {
        "missing": [key for key in expected if key not in shapes],
        "unexpected": [key for key in shapes if key not in expected],
        "of another shape": other,
    }
    return "; ".join(f"{what}: {_few(items)}" for what, items in lists.items() if items)


def _few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


# ---- finding


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
        return download.fetch(
            _URL.format(urllib.parse.quote(name_or_path)),
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
    got = infer_architecture(load_npz(path))
    variant, patch_size = name.rpartition("ViT-")[2].split("_")
    width, depth = _WIDTH_AND_DEPTH[variant]
    expected = {"patch_size": int(patch_size), "hidden_size": width, "num_layers": depth}
    wrong = [f"{key} {got[key]} instead of {size}" for key, size in expected.items() if got[key] != size]
    if wrong:
        raise UserError(f"the file is not {name}: {', '.join(wrong)}")
