"""The frozen backbone's features: computed once, kept on the device, or handed out as arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.data import preprocess
from vit_jax.runtime import rng as sampling
from vit_jax.runtime import sharding
from vit_jax.runtime.progress import progress_bar
from vit_jax.training.steps import Forward, TrainState
from vit_jax.types import Params


def extract_features(
    model: Any, params: Params, images: np.ndarray, *, image_size: int, batch_size: int = 256, **options: Any
) -> np.ndarray:
    """What the head sees of pictures: input for a logistic regression, a nearest neighbour, a plot.

    Args:
        model: such as `VisionTransformer`; its head is not used.
        params: of the model, as `adapt_params` or `load_run` gives them.
        images: uint8 [n h w 3].
        image_size: pixels, square; pictures are resized.
        batch_size: pictures at once, rounded up to the devices.
        **options: of `preprocess.prepare`: `mean`, `std`.

    Returns:
        float32 [n d].
    """
    mesh = sharding.create_mesh()
    placed = sharding.device_put(params, sharding.replicated(mesh))
    prepare = functools.partial(preprocess.prepare, image_size=image_size, **options)
    features = apply_to_all(backbone(model), placed, images, mesh, prepare=prepare, batch_size=batch_size)
    return np.asarray(features, np.float32)


def backbone(model: Any) -> Any:
    """The model without its head: it gives features [b d] in its dtype."""
    return model.clone(num_classes=None)


def apply_to_all(
    model: Any,
    params: Params,
    images: Any,
    mesh: Mesh,
    *,
    prepare: Callable[[jax.Array, jax.Array], jax.Array],
    batch_size: int,
    num_views: int = 1,
    seed: int = 0,
) -> jax.Array:
    """Runs every picture through a model, with a bar where it takes long.

    Args:
        model: such as `backbone` of one.
        params: of the model, on the mesh.
        images: uint8 [n h w 3] on the host, or what reads like it.
        mesh: batches are split over its devices.
        prepare: (keys [b], pictures [b h w 3]) -> inputs of the model.
        batch_size: pictures at once, rounded up to the devices.
        num_views: how often every picture is taken, each time with another key.
        seed: of the keys.

    Returns:
        [num_views · n d], on every device: all pictures once, then all of them again.
    """
    batch_size = sharding.pad_to_devices(batch_size, len(images), mesh)
    num_rows = num_views * len(images)
    num_batches = -(-num_rows // batch_size)
    everywhere = sharding.replicated(mesh)

    def outputs_of(start: jax.Array, params: Params, batch: jax.Array) -> jax.Array:
        rows = jax.lax.with_sharding_constraint(start + jnp.arange(batch_size), sharding.batch_sharding(mesh))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return model.apply({"params": params}, prepare(sampling.row_keys(rows, seed=seed), batch))

    def fill(buffer: jax.Array, start: jax.Array, *inputs: Any) -> tuple[jax.Array, jax.Array]:
        buffer = jax.lax.dynamic_update_slice_in_dim(buffer, outputs_of(start, *inputs), start, axis=0)
        return buffer, start + batch_size

    start = sharding.device_put(np.int32(0), everywhere)
    batch = jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), jnp.uint8)
    outputs = jax.eval_shape(outputs_of, start, params, batch)
    make_buffer = lambda: jnp.zeros((num_batches * batch_size, *outputs.shape[1:]), outputs.dtype)  # noqa: E731
    buffer = jax.jit(make_buffer, out_shardings=everywhere)()
    fill = jax.jit(fill, donate_argnums=0, out_shardings=everywhere)
    for i in progress_bar(range(num_batches), desc="pictures", unit="batch"):
        rows = np.arange(i * batch_size, (i + 1) * batch_size) % len(images)
        previous, (buffer, start) = start, fill(buffer, start, params, sharding.shard_rows(images, rows, mesh))
        jax.block_until_ready(previous)  # for the bar's sake; the device already has the next batch
    return buffer[:num_rows]


def feature_forward(model: Any) -> Forward:
    """Stored features through the head alone."""
    head = model.create_head(model.num_classes)
    return Forward(
        augment=lambda keys, stored: stored,
        prepare=lambda keys, stored: stored,
        logits=lambda params, stored, key: head.apply({"params": params["head"]}, stored),
    )


def make_train_steps(train_step: Callable) -> Callable:
    """Returns `(state, images, labels, permutation, count) -> (state, scalars)`: so many steps without the host.

    A step of the head alone takes less time than it takes to start it.

    Args:
        train_step: see `steps.make_train_step`; the count may differ from call to call and stays within the epoch.
    """

    def train_steps(state: TrainState, images: jax.Array, labels: jax.Array, permutation: jax.Array, count: jax.Array):
        def body(_: jax.Array, carry: tuple[TrainState, dict]) -> tuple[TrainState, dict]:
            return train_step(carry[0], images, labels, permutation)

        _, shapes = jax.eval_shape(train_step, state, images, labels, permutation)
        scalars = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, scalars))

    return train_steps
