"""A file's parameters fitted to a model: new head, resampled position embeddings, a report of every key."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.pretrained.infer import BLOCK, POSITION_KEY, block_numbers, differences, foreign_layout
from vit_jax.pretrained.npz import decode_bfloat16
from vit_jax.runtime.errors import UserError
from vit_jax.types import Params

Grid = tuple[int, int]
"""Rows and columns of patches."""

_RESNET_BLOCK = re.compile(r"(resnet/)?block\d+/")
_LEAVES = ("/kernel", "/bias", "/scale", "/gamma", "/beta")


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every key; `str` gives a few lines to print.

    Attributes:
        loaded: taken from the file as they are.
        resampled: taken from the file, interpolated from `old_grid` to `new_grid`.
        new: not taken from the file; they keep the target's values.
        dropped: in the file, not used.
        old_grid: rows and columns of patches in the file; zeros where the model has none.
        new_grid: rows and columns of patches in the model; zeros where it has none.
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
        if match := _RESNET_BLOCK.match(key):
            return f"{match[0]}…"
        if BLOCK.match(key):
            blocks = block_numbers(self.loaded)
            return f"Transformer/encoderblock_{{{blocks[0]}..{blocks[-1]}}}/…"
        return f"{key.rpartition('/')[0]}/…" if key.endswith(_LEAVES) else key


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
    old_grid = new_grid = (0, 0)
    class_token = "cls" in wanted
    if POSITION_KEY in wanted:
        old_grid = _check_grid(pretrained_grid, source[POSITION_KEY].shape[1] - class_token, "pretrained_grid")
        new_grid = _check_grid(grid, wanted[POSITION_KEY].shape[1] - class_token, "grid")
    resampled = () if old_grid == new_grid else (POSITION_KEY,)
    loaded = tuple(key for key in wanted if key not in new and key not in resampled)

    flat = {key: _own_float32((wanted if key in new else source)[key]) for key in wanted}
    for key in resampled:
        flat[key] = resample_position_embeddings(flat[key], old_grid, new_grid, class_token=class_token)
    sizes = {("dropped", key): math.prod(source[key].shape) for key in dropped}
    for what, keys in (("loaded", loaded), ("resampled", resampled), ("new", new)):
        sizes |= {(what, key): flat[key].size for key in keys}
    return unflatten_dict(flat, sep="/"), Report(loaded, resampled, new, dropped, old_grid, new_grid, sizes)


def resample_position_embeddings(
    pos_embedding: np.ndarray, grid: Grid, new_grid: Grid, *, class_token: bool = True
) -> np.ndarray:
    """Interpolates position embeddings linearly from one grid of patches to another, corners on corners.

    Args:
        pos_embedding: [1 1+h*w d], float32: the class token's row, then the grid's rows one after another.
        grid: its h and w.
        new_grid: the wanted h' and w'.
        class_token: whether there is one; without it the shapes are [1 h*w d] and [1 h'*w' d].

    Returns:
        [1 1+h'*w' d], float32; the class token's row is unchanged.

    Raises:
        UserError: `grid` does not match the shape.

    Source:
        Dosovitskiy et al. 2021, section 3.2; as `scipy.ndimage.zoom(order=1)` does it.
    """
    import scipy.ndimage  # takes long to import, and most files fit as they are

    class_row, patches = np.split(pos_embedding, [int(class_token)], axis=1)
    grid = _check_grid(grid, patches.shape[1], "grid")
    width = pos_embedding.shape[2]
    old = patches.reshape(*grid, width)  # [h w d]
    zoom = [after / before for before, after in zip(grid, new_grid, strict=True)]
    # "nearest": where rounding puts the last sample just outside the grid, the default takes zero.
    new = scipy.ndimage.zoom(old, (*zoom, 1), order=1, mode="nearest")  # [h' w' d]
    if new.shape != (*new_grid, width):
        raise AssertionError(f"zoomed {grid} to {new.shape[:2]} instead of {new_grid}")
    return np.concatenate([class_row, new.reshape(1, -1, width)], axis=1)  # [1 1+h'*w' d]


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
    return np.array(decode_bfloat16(np.asarray(leaf)), dtype=np.float32)


def _check_fit(source: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Compares keys and shapes; the number of position embeddings may differ."""
    layout = "ResNet (BiT)" if any(key.startswith("resnet/") for key in wanted) else "ViT"
    cause = foreign_layout(source, wanted=layout) or _other_sizes(source, wanted)
    if POSITION_KEY in source and POSITION_KEY in wanted:
        old, new = source[POSITION_KEY], wanted[POSITION_KEY]
        if len(old) == len(new) == 3:
            source = source | {POSITION_KEY: (old[0], new[1], old[2])}
    if source != wanted:
        raise UserError(
            f"the file's parameters do not fit the model: {cause + '; ' if cause else ''}{differences(source, wanted)}"
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
    sizes = [("num_layers", len(block_numbers(source)), len(block_numbers(wanted)))]
    for name, key, axis in places:
        if len(source.get(key, ())) > 1 and len(wanted.get(key, ())) > 1:
            sizes.append((name, source[key][axis], wanted[key][axis]))
    different = [f"{name} is {got} in the file, {model} in the model" for name, got, model in sizes if got != model]
    return f"{', '.join(different)}: another variant" if different else ""
