"""Training pictures that do not fit into memory: decoded and cropped by worker processes while the device computes.

Step k sees the same pictures, cropped in the same way, whatever the number of workers, of processes, of restarts: each
batch is found by its number alone (Grain's MapDataset).
"""

import dataclasses
import gc
import os
import signal
import threading
import time
from collections.abc import Generator, Sequence

import numpy as np

from vit_jax.crops import random_box
from vit_jax.data.pictures import Encoded, decode_picture
from vit_jax.errors import UserError
from vit_jax.types import Split


def training_batches(
    split: Split,
    *,
    augment: str,
    outside: Sequence[int],
    batch_size: int,
    seed: int,
    first_step: int,
    num_steps: int,
    part: int = 0,
    num_parts: int = 1,
    num_workers: int = 0,
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """One batch after the other: pictures in an order that is drawn anew for every epoch, each cropped anew.

    Args:
        split: of encoded pictures.
        augment: how they are cropped, see `crops.random_box`; not flipped.
        outside: colour of what a crop covers outside of a picture.
        batch_size: of all parts together; what remains of an epoch is left out.
        seed: of order and crops.
        first_step: the first batch's number, counted from 0.
        num_steps: the number after the last batch's.
        part: which of the equal parts of every batch, as this process needs it.
        num_parts: that a batch has.
        num_workers: processes that decode; 0 takes as many as there are cores.

    Yields:
        (uint8 [batch_size/num_parts h w 3], int32 [batch_size/num_parts]). Closing the generator ends the processes.

    Raises:
        UserError: a picture cannot be decoded, or a process was ended from outside.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, in notebooks and tests, too
    num_pictures = len(split) // batch_size * batch_size
    decode = _Decode(split.images, split.labels, augment, tuple(outside))
    pictures = grain.MapDataset.source(range(len(split))).seed(seed).shuffle().random_map(decode)[:num_pictures]
    batches = pictures.batch(batch_size // num_parts)[part::num_parts].repeat()[first_step:num_steps]
    options = grain.MultiprocessingOptions(num_workers or os.cpu_count() or 1, per_worker_buffer_size=2)
    stream = iter(
        batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(
            options, worker_init_fn=_end_with_the_run
        )
    )
    copies = map(_copy, stream)
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
        raise UserError(f"a process that decodes pictures was ended ({error}); was there enough memory?") from error
    finally:
        stream.close()
        del stream, copies
        gc.collect()  # Grain keeps its last batch in a cycle; Python would complain of that memory at its end


def _copy(batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of their own: Grain's are memory that is shared with a process, and lost if they are kept too long."""
    images, labels = batch
    return np.array(images), np.array(labels)


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Number of a picture -> the part of it that a step sees, and its label."""

    images: Encoded
    labels: np.ndarray
    augment: str
    outside: tuple[int, ...]

    def __call__(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.int32]:
        size = self.images.size
        draws = rng.uniform(size=4)

        def draw_box(height: int, width: int):
            return random_box(self.augment, draws, height=height, width=width, image_size=size[0], xp=np)

        source = self.images.open_picture(self.images.numbers[number])
        picture = decode_picture(source, size=size, draw_box=draw_box, outside=self.outside)
        return np.asarray(picture), self.labels[number]


def _end_with_the_run(worker: int, num_workers: int) -> None:
    """Ends a worker process soon after the run that started it, however that ended."""
    run = os.getppid()

    def watch() -> None:
        while os.getppid() == run:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
