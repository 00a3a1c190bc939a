"""Adapts the parameters of a checkpoint to a model: new head, resampled position embeddings, a report of every key."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from vit_jax.pretrained.infer import POSITION_KEY, Grid, differences, find_architecture, find_grid, shapes_of
from vit_jax.pretrained.npz import decode_bfloat16
from vit_jax.runtime.errors import UserError
from vit_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Report:
    """Origin of every parameter; `str` is a table.

    Attributes:
        loaded: keys whose values are those of the checkpoint.
        resampled: keys whose values are interpolated from `old_grid` to `new_grid`.
        new: keys whose values are those of the target.
        dropped: keys of the checkpoint that are not used.
        old_grid: rows and columns of patches of the checkpoint; zeros if it has none.
        new_grid: rows and columns of patches of the model; zeros if it has none.
        sizes: (group, key) -> number of parameters.
    """

    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    old_grid: Grid
    new_grid: Grid
    sizes: dict[tuple[str, str], int] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        """Returns a line for each group of keys."""
        rows = []
        for status in ("loaded", "resampled", "new", "dropped"):
            layers: dict[str, list[int]] = {}
            for key in getattr(self, status):
                layers.setdefault(_layer(key, self.loaded), []).append(self.sizes[status, key])
            statuses = [status, *[""] * len(layers)]
            rows += [(status, name, sizes) for status, (name, sizes) in zip(statuses, layers.items(), strict=False)]
        width = max((len(name) for _, name, _ in rows), default=0)
        lines = [
            f"{status:9}  {name:{width}}  {len(sizes):4} {'array' if len(sizes) == 1 else 'arrays':6} {sum(sizes):>13,}"
            for status, name, sizes in rows
        ]
        if self.resampled:
            old, new = (f"{rows} × {columns}" for rows, columns in (self.old_grid, self.new_grid))
            lines.append(f"position embeddings: {old} → {new} patches")
        return "\n".join(lines)


def _layer(key: str, loaded: Iterable[str]) -> str:
    """Returns the name of the layers that a key is counted with."""
    if block := re.match(r"(resnet/)?block\d+/", key):
        return f"{block[0]}…"
    pattern = r"Transformer/encoderblock_(\d+)/"
    if re.match(pattern, key):
        numbers = [int(match[1]) for match in (re.match(pattern, other) for other in loaded) if match]
        return f"Transformer/encoderblock_{{{min(numbers)}..{max(numbers)}}}/…"
    layer, _, leaf = key.rpartition("/")
    return f"{layer}/…" if leaf in ("kernel", "bias", "scale", "gamma", "beta") else key


def adapt_params(
    pretrained: Params,
    target: Params,
    *,
    grid: Grid | None = None,
    pretrained_grid: Grid | None = None,
    keep_head: bool = False,
) -> tuple[Params, Report]:
    """Adapts the parameters of a checkpoint to a model.

    The head is the target's (see `keep_head`), a `pre_logits` that the target lacks is dropped, position embeddings are
    resampled if the grids differ, and every other key must exist with the same shape.

    Args:
        pretrained: parameters as `load_npz` returns them.
        target: newly initialized parameters of the model. Only of new leaves are the values read; the others may be
            anything with a shape, such as `jax.ShapeDtypeStruct`.
        grid: rows and columns of patches of the model; None: a square.
        pretrained_grid: rows and columns of patches of the checkpoint; None: a square.
        keep_head: load the head of the checkpoint, too; it must then fit.

    Returns:
        Parameters with the structure and shapes of `target`, as new float32 NumPy arrays; and a `Report` of every key.

    Raises:
        UserError: keys are missing, unexpected or of another shape; patches are not a square and no grid is given; or a
            grid does not match the number of patches.

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
    _check_shapes(
        {key: shape for key, shape in shapes_of(pretrained).items() if key not in dropped},
        {key: shape for key, shape in shapes_of(target).items() if key not in new},
    )
    old_grid = new_grid = (0, 0)
    class_token = "cls" in wanted
    if POSITION_KEY in wanted:
        old_grid = find_grid(source[POSITION_KEY].shape[1] - class_token, pretrained_grid, name="pretrained_grid")
        new_grid = find_grid(wanted[POSITION_KEY].shape[1] - class_token, grid)
    resampled = () if old_grid == new_grid else (POSITION_KEY,)
    loaded = tuple(key for key in wanted if key not in new + resampled)

    # Copies, so that changing the model's parameters does not change those of the checkpoint.
    flat = {key: _copy_float32((wanted if key in new else source)[key]) for key in wanted}
    for key in resampled:
        flat[key] = resample_position_embeddings(flat[key], old_grid, new_grid, class_token=class_token)
    sizes = {("dropped", key): int(np.prod(source[key].shape)) for key in dropped}
    for status, keys in (("loaded", loaded), ("resampled", resampled), ("new", new)):
        sizes |= {(status, key): flat[key].size for key in keys}
    return unflatten_dict(flat, sep="/"), Report(loaded, resampled, new, dropped, old_grid, new_grid, sizes)


def resample_position_embeddings(
    pos_embedding: Float[np.ndarray, "1 n d"], grid: Grid, new_grid: Grid, *, class_token: bool = True
) -> Float[np.ndarray, "1 n2 d"]:
    """Interpolates position embeddings linearly from one grid of patches to another, with aligned corners.

    Args:
        pos_embedding: [1 1+h*w d]: the class token, then the patches row by row.
        grid: its h and w.
        new_grid: h' and w' of the result.
        class_token: False for embeddings without one, [1 h*w d] and [1 h'*w' d].

    Returns:
        [1 1+h'*w' d]; the embedding of the class token is unchanged.

    Raises:
        UserError: `grid` does not match the shape.

    Source:
        Dosovitskiy et al. 2021, section 3.2; equal to `scipy.ndimage.zoom(order=1)`.
    """
    import scipy.ndimage  # takes long to import, and most checkpoints need no resampling

    class_row, patches = np.split(pos_embedding, [int(class_token)], axis=1)
    rows, columns = find_grid(patches.shape[1], grid)
    old = patches.reshape(rows, columns, -1)  # [h w d]
    zoom = (new_grid[0] / rows, new_grid[1] / columns, 1)
    # "nearest": the default fills in zeros if rounding moves the last sample just outside the grid.
    new = scipy.ndimage.zoom(old, zoom, order=1, mode="nearest")  # [h' w' d]
    return np.concatenate([class_row, new.reshape(1, new_grid[0] * new_grid[1], -1)], axis=1)  # [1 1+h'*w' d]


def _copy_float32(leaf: Any) -> np.ndarray:
    return np.array(decode_bfloat16(np.asarray(leaf)), dtype=np.float32)


def _check_shapes(source: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError if keys or shapes differ, except for the number of position embeddings."""
    found, expected = find_architecture(source), find_architecture(wanted)
    if POSITION_KEY in wanted and len(source.get(POSITION_KEY, ())) == 3:
        wanted = wanted | {POSITION_KEY: (1, source[POSITION_KEY][1], wanted[POSITION_KEY][2])}
    wrong = differences(source, wanted) if found == expected else f"architecture {found} instead of {expected}"
    if wrong:
        raise UserError(f"the checkpoint does not fit the model: {wrong}")
