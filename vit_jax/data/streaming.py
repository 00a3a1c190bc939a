"""Training images that do not fit into memory: worker processes decode and crop them while the device computes.

Step k sees the images, crops and order of a run that holds all images in memory, whatever the number of workers, of
processes, of restarts: each batch is a function of its number (Grain's MapDataset).
"""

import dataclasses
import functools
import gc
import os
import signal
import threading
import time
from collections.abc import Generator

import jax
import numpy as np
from jaxtyping import Int32, UInt8

from vit_jax.data import preprocess
from vit_jax.data.crops import CROPS
from vit_jax.data.images import Color, EncodedImages
from vit_jax.runtime import resources, rng
from vit_jax.runtime.errors import UserError
from vit_jax.types import Split

Batch = tuple[UInt8[np.ndarray, "b h w 3"], Int32[np.ndarray, " b"]]
"""Images and labels."""


def training_batches(
    split: Split,
    *,
    augment: str,
    margin_color: Color,
    batch_size: int,
    seed: int,
    first_step: int,
    num_steps: int,
    part: int = 0,
    num_parts: int = 1,
    num_workers: int = 0,
) -> Generator[Batch, None, None]:
    """Yields the batches of a run, in an order that changes with the epoch, cropped but not flipped.

    Args:
        split: of encoded images.
        augment: how they are cropped, see `crops`.
        margin_color: of the pixels of a crop outside of an image.
        batch_size: of all parts together; the remainder of an epoch is dropped.
        seed: of the run.
        first_step: the first batch's number, counted from 0.
        num_steps: the number after the last batch's.
        part: number of the equal part of every batch that this process needs.
        num_parts: that a batch has.
        num_workers: processes that decode; 0 takes one per available processor.

    Yields:
        `batch_size` / `num_parts` images and labels. Closing the generator ends the processes.

    Raises:
        UserError: an image cannot be decoded, or a process was killed.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, in notebooks and tests, too
    read = BatchReader(split.images, split.labels, augment, margin_color, batch_size, seed, part, num_parts)
    batches = grain.MapDataset.range(first_step, num_steps).map(read)
    options = grain.MultiprocessingOptions(num_workers or resources.available_cpus(), per_worker_buffer_size=2)
    stream = iter(
        batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(
            options, worker_init_fn=_start_worker
        )
    )
    # Copied: Grain's arrays are memory that is shared with a process, and lost if they are kept too long.
    copies = ((np.array(images), np.array(labels)) for images, labels in stream)
    try:
        # The processes inherit this: a signal that stops the run must not end them before it has saved.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            first = next(copies, None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if first is not None:
            yield first
        yield from copies
    except RuntimeError as error:
        raise UserError(f"a process that decodes images was ended ({error}); was there enough memory?") from error
    finally:
        stream.close()
        del stream, copies
        gc.collect()  # Grain keeps its last batch in a cycle; Python would complain of that memory at its end


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Maps the number of a step to its images and labels."""

    images: EncodedImages
    labels: Int32[np.ndarray, " n"]
    augment: str
    margin_color: Color
    batch_size: int
    seed: int
    part: int = 0
    num_parts: int = 1

    def __call__(self, step: int) -> Batch:
        """Returns this process's part of the batch of a step."""
        epoch, place = divmod(int(step), len(self.labels) // self.batch_size)
        size = self.batch_size // self.num_parts
        part = slice(self.part * size, (self.part + 1) * size)
        rows = _epoch_order(self.seed, epoch, len(self.labels))[place * self.batch_size :][part]
        images = self.images.take(rows)
        if self.augment in CROPS:
            uniforms = np.asarray(_step_uniforms(self.seed, int(step), self.batch_size))[part]
            images = self.images.crop(rows, augment=self.augment, uniforms=uniforms, margin_color=self.margin_color)
        return np.stack([images[i] for i in range(size)]), self.labels[rows]


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_images: int) -> Int32[np.ndarray, " n"]:
    return np.asarray(rng.epoch_order(jax.random.PRNGKey(seed), epoch, num_images))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _step_uniforms(seed: int, step: jax.Array | int, batch_size: int) -> jax.Array:
    return preprocess.sample_uniforms(rng.step_keys(jax.random.PRNGKey(seed), step, batch_size)[0])


def _start_worker(worker: int, num_workers: int) -> None:
    """Keeps a worker process off the accelerator, and ends it soon after its run, however that ended."""
    jax.config.update("jax_platforms", "cpu")
    run = os.getppid()

    def watch() -> None:
        while os.getppid() == run:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
