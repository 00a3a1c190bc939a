"""`python -m vit_jax.predict --workdir DIR PICTURE…`: what a model says of pictures."""

import argparse
import collections
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.runtime.errors import UsageError, UserError, one_line, parse_arguments, run_command

_BATCH_SIZE = 128


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each picture; 1 where some could not be read."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.predict", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of a run; or a file with its head, or its name")
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="file, folder, pattern, or - for a list on stdin"
    )
    parser.add_argument("--top", type=int, default=5, help="how many classes to name (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a picture")
    arguments = parse_arguments(parser, argv)
    if arguments.top < 1:
        raise UsageError(f"--top is {arguments.top}; expected at least 1")
    paths = list_pictures(arguments.pictures)

    import vit_jax
    from vit_jax.classifier import require_trained_head

    classifier = vit_jax.load(arguments.workdir)
    require_trained_head(classifier, arguments.workdir)
    num_failed = 0
    for path, answer in predict_files(classifier, paths):
        if isinstance(answer, UserError):
            if len(paths) == 1:
                raise answer
            num_failed += 1
            print(f"error: {one_line(answer)}", file=sys.stderr)
            continue
        best = np.argsort(-answer, kind="stable")[: arguments.top]
        classes = [(classifier.class_names[i], float(answer[i])) for i in best]
        if arguments.json:
            print(json.dumps({"picture": path, "classes": [{"name": name, "probability": p} for name, p in classes]}))
        else:
            print(f"{path}  " + "  ".join(f"{name} {p:.1%}" for name, p in classes))
    if num_failed:
        raise UserError(f"{num_failed} of {len(paths)} pictures could not be read, see above; the others were answered")
    return 0


def list_pictures(words: Sequence[str]) -> list[str]:
    """The files that the words of a command line name.

    Args:
        words: files, folders (all pictures in and below them), patterns, "-" for a list on standard input.

    Raises:
        UserError: a folder or pattern has no picture.
    """
    from vit_jax.data import IMAGE_SUFFIXES

    paths: list[str] = []
    for word in words:
        found = [word]
        if word == "-":
            found = [line for line in sys.stdin.read().splitlines() if line]
        elif os.path.isdir(word):
            files = sorted(Path(word).rglob("*"))
            found = [str(path) for path in files if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        elif not os.path.exists(word) and glob.has_magic(word):
            found = sorted(glob.glob(word, recursive=True))
        if not found:
            raise UserError(f"{word} names no picture; expected files such as {', '.join(IMAGE_SUFFIXES)}")
        paths += found
    return paths


def predict_files(classifier: Any, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray | UserError]]:
    """What a classifier says of picture files, while the next ones are decoded.

    Args:
        classifier: of `vit_jax.load`.
        paths: of any sizes and modes; each picture is squashed to the size that the model sees.

    Yields:
        (path, float32 [classes] of probabilities), or (path, why it could not be read), in the order of `paths`.
    """
    from vit_jax.classifier import softmax
    from vit_jax.data import decode_image
    from vit_jax.runtime import resources
    from vit_jax.runtime.progress import progress_bar

    size = (classifier.image_size, classifier.image_size)
    batch_size = classifier.round_up(_BATCH_SIZE, len(paths))

    def decode(path: str) -> np.ndarray | UserError:
        try:
            return np.asarray(decode_image(Path(path), size=size))
        except UserError as error:
            return error

    def start(decoded: list[np.ndarray | UserError]) -> Any:
        images = [image for image in decoded if not isinstance(image, UserError)]
        return classifier.start(np.stack(images), batch_size) if images else np.zeros((0, 1))

    chunks = (paths[first : first + batch_size] for first in range(0, len(paths), batch_size))
    bar = progress_bar(total=len(paths), unit=" pictures")
    with ThreadPoolExecutor(resources.available_cpus()) as pool, bar:
        decoding = _behind(2, ((chunk, [pool.submit(decode, path) for path in chunk]) for chunk in chunks))
        decoded = ((chunk, [future.result() for future in futures]) for chunk, futures in decoding)
        running = _behind(1, ((chunk, images, start(images)) for chunk, images in decoded))
        for chunk, images, logits in running:
            answers = iter(softmax(np.asarray(logits)))
            for path, image in zip(chunk, images, strict=True):
                yield path, image if isinstance(image, UserError) else next(answers)
            bar.update(len(chunk))


def _behind(count: int, begun: Iterable[Any]) -> Iterator[Any]:
    """Hands on what was begun, `count` items late: their work goes on meanwhile."""
    waiting: collections.deque[Any] = collections.deque()
    for item in begun:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


if __name__ == "__main__":
    sys.exit(run_command(main))
