"""Streams training images that do not fit into memory: worker processes decode and crop them.

Each batch is a function of its step (Grain's MapDataset), so that images, crops and order equal those of a run with
all images in memory, for any number of workers, processes and restarts.
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


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as arrays have no hash
class BatchReader:
    """Reads the images, cropped but not flipped, and labels of a step, counted from 0."""

    split: Split  # of `EncodedImages`
    augment: str  # key of `crops.AUGMENTATIONS`; only its crop is applied
    margin_color: Color
    batch_size: int  # over all parts; the last partial batch of an epoch is dropped
    seed: int
    balanced: bool = False  # see `rng.balanced_order`
    part: int = 0  # index of the part to read: the process index
    num_parts: int = 1

    def __call__(self, step: int) -> HostBatch:
        """Decodes `batch_size` / `num_parts` images."""
        size = self.batch_size // self.num_parts
        epoch, position = divmod(int(step), len(self.split) // self.batch_size)
        part = slice(self.part * size, (self.part + 1) * size)
        rows = _training_order(self, epoch)[position * self.batch_size :][part]
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

    `num_workers` 0 starts one per available CPU; closing the generator stops them.

    Raises:
        UserError: an image cannot be decoded, or a worker was killed.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, also in notebooks and tests
    workers = grain.MultiprocessingOptions(num_workers or resources.available_cpus(), per_worker_buffer_size=2)
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    batches = grain.MapDataset.range(first_step, num_steps).map(read).to_iter_dataset(reading)
    stream = iter(batches.mp_prefetch(workers, worker_init_fn=_start_worker))
    # Copies, as Grain's arrays are shared memory, which is lost if they are kept too long.
    copies = ((np.array(images), np.array(labels)) for images, labels in stream)
    try:
        # Workers inherit this mask: a signal that stops the run must not end them before it has saved.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            first = list(itertools.islice(copies, 1))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield from itertools.chain(first, copies)
    except RuntimeError as error:
        raise UserError(f"a worker process was killed ({error}); free memory or lower dataset.num_workers") from error
    finally:
        copies.close()
        stream.close()
        del stream, copies
        gc.collect()  # Grain's last batch is in a reference cycle; Python would warn about its memory at exit


@functools.lru_cache(maxsize=2)
def _training_order(read: BatchReader, epoch: int) -> Int32[np.ndarray, " n"]:
    key = jax.random.PRNGKey(read.seed)
    return np.asarray(rng.training_order(key, epoch, read.split.labels, balanced=read.balanced))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _step_uniforms(seed: int, step: jax.Array | int, batch_size: int) -> jax.Array:
    return preprocess.sample_uniforms(rng.step_keys(jax.random.PRNGKey(seed), step, batch_size)[0])


def _start_worker(worker: int, num_workers: int) -> None:
    """Keeps a worker process off the accelerator, and ends it when the parent process is gone."""
    jax.config.update("jax_platforms", "cpu")
    run = os.getppid()

    def watch() -> None:
        while os.getppid() == run:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
