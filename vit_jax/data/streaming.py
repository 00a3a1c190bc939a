"""Training images that do not fit into memory: worker processes decode and crop them while the device computes.

Step k sees the images, crops and order of a run that holds all images in memory, whatever the number of workers, of
processes, of restarts: each batch is a function of its number (Grain's MapDataset).
"""

import dataclasses
import functools
import gc
import itertools
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

HostBatch = tuple[UInt8[np.ndarray, "b h w 3"], Int32[np.ndarray, " b"]]  # images and labels


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Maps the number of a step, from 0, to its images, cropped but not flipped, and labels."""

    split: Split  # of `EncodedImages`
    augment: str
    margin_color: Color
    batch_size: int  # of all parts together; the remainder of an epoch is dropped
    seed: int
    part: int = 0  # the one of every batch that is read: the process's number
    num_parts: int = 1

    def __call__(self, step: int) -> HostBatch:
        """Decodes `batch_size` / `num_parts` images."""
        num_images, size = len(self.split), self.batch_size // self.num_parts
        epoch, position = divmod(int(step), num_images // self.batch_size)
        part = slice(self.part * size, (self.part + 1) * size)
        rows = _epoch_order(self.seed, epoch, num_images)[position * self.batch_size :][part]
        images: EncodedImages = self.split.images.take(rows)
        if self.augment in CROPS:
            uniforms = np.asarray(_step_uniforms(self.seed, int(step), self.batch_size))[part]
            images = images.crop(
                np.arange(size), augment=self.augment, uniforms=uniforms, margin_color=self.margin_color
            )
        return np.stack([images[i] for i in range(size)]), self.split.labels[rows]


def training_batches(
    read: BatchReader, *, first_step: int, num_steps: int, num_workers: int = 0
) -> Generator[HostBatch, None, None]:
    """Yields the batches of the steps from `first_step` up to `num_steps`, read by worker processes.

    `num_workers` 0 takes one per available processor; closing the generator ends them.

    Raises:
        UserError: an image cannot be decoded, or a process was killed.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, in notebooks and tests, too
    workers = grain.MultiprocessingOptions(num_workers or resources.available_cpus(), per_worker_buffer_size=2)
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    batches = grain.MapDataset.range(first_step, num_steps).map(read).to_iter_dataset(reading)
    stream = iter(batches.mp_prefetch(workers, worker_init_fn=_start_worker))
    # Copied: Grain's arrays are memory that is shared with a process, and lost if they are kept too long.
    copies = ((np.array(images), np.array(labels)) for images, labels in stream)
    try:
        # The processes inherit this: a signal that stops the run must not end them before it has saved.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            first = list(itertools.islice(copies, 1))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield from itertools.chain(first, copies)
    except RuntimeError as error:
        raise UserError(f"a process that decodes images was ended ({error}); was there enough memory?") from error
    finally:
        copies.close()
        stream.close()
        del stream, copies
        gc.collect()  # Grain keeps its last batch in a cycle; Python would complain of that memory at its end


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
