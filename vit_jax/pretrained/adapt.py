"""Adapts the parameters of a checkpoint to a model: new head, resampled position embeddings, a report of every key."""

import dataclasses
import math
import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from vit_jax.pretrained.sizes import POSITION_KEY, Grid, differences, find_architecture, find_grid, shapes_of
from vit_jax.runtime.errors import UserError
from vit_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Report:
    """Origin of every parameter; `str` returns a table."""

    loaded: tuple[str, ...]  # keys with the checkpoint's values
    resampled: tuple[str, ...]  # keys with values interpolated from `old_grid` to `new_grid`
    new: tuple[str, ...]  # keys with the target's values
    dropped: tuple[str, ...]  # unused keys of the checkpoint
    old_grid: Grid  # of the checkpoint's patches; zeros if it has none
    new_grid: Grid  # of the model's patches
    sizes: dict[tuple[str, str], int] = dataclasses.field(repr=False)  # (group, key) -> number of parameters

    def __str__(self) -> str:
        """Returns a line for each group of keys."""
        lines = []
        for group in ("loaded", "resampled", "new", "dropped"):
            layers: dict[str, list[int]] = {}
            for key in getattr(self, group):
                layers.setdefault(_layer(key), []).append(self.sizes[group, key])
            for layer, sizes in layers.items():
                arrays = f"{len(sizes):4} {'array' if len(sizes) == 1 else 'arrays':6}"
                lines.append(f"{group:9}  {layer:40}  {arrays} {sum(sizes):>13,}")
                group = ""
        if self.resampled:
            old, new = (f"{rows} × {columns}" for rows, columns in (self.old_grid, self.new_grid))
            lines.append(f"position embeddings: {old} → {new} patches")
        return "\n".join(lines)


def _layer(key: str) -> str:
    """Returns the table row that a key is counted in."""
    layer = re.sub(r"(block_?)\d+/.*", r"\1*/…", key)
    return re.sub(r"/(kernel|bias|scale|gamma|beta)$", "/…", layer)


def adapt_params(
    pretrained: Params,
    target: Params,
    *,
    grid: Grid | None = None,
    pretrained_grid: Grid | None = None,
    keep_head: bool = False,
) -> tuple[Params, Report]:
    """Adapts the parameters of a checkpoint to a model.

    The head keeps the target's values (see `keep_head`), `pre_logits` is dropped if the target lacks it, position
    embeddings are resampled if the grids differ, and every other key must exist with the same shape.

    Args:
        pretrained: parameters as `load_npz` returns them.
        target: newly initialized parameters of the model. Only the values of new leaves are used; the others may be
            `jax.ShapeDtypeStruct`.
        grid: rows and columns of patches of the model; None: a square.
        pretrained_grid: rows and columns of patches of the checkpoint; None: a square.
        keep_head: load the checkpoint's head.

    Returns:
        Parameters with the structure and shapes of `target`, as new float32 NumPy arrays; and a `Report` of every key.

    Raises:
        UserError: keys are missing, unexpected or of another shape; patches are not a square and no grid is given; or a
            grid does not match the number of patches.

    Source:
        Dosovitskiy et al. 2021, section 3.2: a zero head, and interpolated position embeddings.

    Examples:
        >>> import jax
        >>> import numpy as np
        >>> import vit_jax
        >>> from vit_jax import pretrained
        >>> classifier = vit_jax.load("micro")
        >>> model = classifier.model.clone(num_classes=3)
        >>> target = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"]
        >>> params, report = pretrained.adapt_params(classifier.params, target)
        >>> report.resampled, report.old_grid, report.new_grid
        (('Transformer/posembed_input/pos_embedding',), (8, 8), (4, 4))
        >>> report.new, report.dropped
        (('head/kernel', 'head/bias'), ('head/bias', 'head/kernel'))
    """
    source, wanted = flatten_dict(pretrained, sep="/"), flatten_dict(target, sep="/")
    new = tuple(key for key in wanted if key.startswith("head/") and not keep_head)
    unused = [key for key in source if key.startswith("pre_logits/") and key not in wanted]
    dropped = tuple(key for key in source if key in unused or (key.startswith("head/") and not keep_head))
    _check_shapes(
        {key: shape for key, shape in shapes_of(pretrained).items() if key not in dropped},
        {key: shape for key, shape in shapes_of(target).items() if key not in new},
    )
    old_grid = new_grid = (0, 0)
    class_token = "cls" in wanted
    if POSITION_KEY in wanted:  # a Vision Transformer
        old_grid = find_grid(source[POSITION_KEY].shape[1] - class_token, pretrained_grid, name="pretrained_grid")
        new_grid = find_grid(wanted[POSITION_KEY].shape[1] - class_token, grid)
    resampled = () if old_grid == new_grid else (POSITION_KEY,)
    loaded = tuple(key for key in wanted if key not in new + resampled)

    # Copies, so that changing the model's parameters does not change those of the checkpoint.
    flat = {key: np.array((wanted if key in new else source)[key], np.float32) for key in wanted}
    for key in resampled:
        flat[key] = resample_position_embeddings(flat[key], old_grid, new_grid, class_token=class_token)
    groups = {"loaded": loaded, "resampled": resampled, "new": new}
    sizes = {(group, key): flat[key].size for group, keys in groups.items() for key in keys}
    sizes |= {("dropped", key): math.prod(source[key].shape) for key in dropped}
    return unflatten_dict(flat, sep="/"), Report(loaded, resampled, new, dropped, old_grid, new_grid, sizes)


def resample_position_embeddings(
    pos_embedding: Float[np.ndarray, "1 n d"], grid: Grid, new_grid: Grid, *, class_token: bool = True
) -> Float[np.ndarray, "1 n2 d"]:
    """Interpolates position embeddings linearly from one grid of patches to another, with aligned corners.

    Args:
        pos_embedding: [1 1+h*w d]: the class token, then the patches row by row.
        grid: (h, w).
        new_grid: (h', w') of the result.
        class_token: False for embeddings without one, [1 h*w d].

    Returns:
        [1 1+h'*w' d]; the embedding of the class token is unchanged.

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


def _check_shapes(source: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError if keys or shapes differ, except for the number of position embeddings."""
    found, expected = find_architecture(source), find_architecture(wanted)
    if POSITION_KEY in wanted and len(source.get(POSITION_KEY, ())) == 3:
        wanted = wanted | {POSITION_KEY: (1, source[POSITION_KEY][1], wanted[POSITION_KEY][2])}
    wrong = differences(source, wanted) if found == expected else f"architecture {found} instead of {expected}"
    if wrong:
        raise UserError(f"the checkpoint does not fit the model: {wrong}")
