"""`python -m vit_jax.predict --workdir DIR IMAGE…`: classifies images with a run or a pretrained checkpoint."""

from vit_jax.runtime.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before JAX is imported

import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import vit_jax
from vit_jax.classifier import Classifier
from vit_jax.data import IMAGE_SUFFIXES
from vit_jax.runtime import resources
from vit_jax.runtime.arguments import add_model_arguments, create_parser, parse_arguments
from vit_jax.runtime.errors import UserError, one_line, run_command
from vit_jax.runtime.progress import progress_bar

_BATCH_SIZE = 128


def main(argv: list[str] | None = None) -> int:
    """Prints one line per image; returns 1 if any image cannot be read."""
    parser = create_parser(
        "python -m vit_jax.predict",
        "Classify image files with a run or a pretrained checkpoint.",
        "--workdir runs/digits IMAGE.png DIR '*.jpg'",
        "--model imagenet21k+imagenet2012/ViT-B_16 --top 3 --json IMAGE.jpg",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="file, directory, glob pattern, or - to read paths from stdin"
    )
    parser.add_argument("--top", type=int, default=5, help="number of classes to print (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")
    arguments = parse_arguments(parser, argv)
    if arguments.top < 1:
        parser.error(f"--top is {arguments.top}; expected at least 1")
    paths = list_images(arguments.images)
    classifier = vit_jax.load(arguments.model, step=arguments.step)
    classifier.require_trained_head(arguments.model)
    num_failed = 0
    for path, prediction in predict_files(classifier, paths):
        if isinstance(prediction, UserError):
            num_failed += 1
            print(f"error: {one_line(prediction)}", file=sys.stderr)
            continue
        best = np.argsort(-prediction, kind="stable")[: arguments.top]
        classes = [(classifier.class_names[i], float(prediction[i])) for i in best]
        if arguments.json:
            values = {"image": path, "classes": [{"name": name, "probability": p} for name, p in classes]}
            print(json.dumps(values, ensure_ascii=False))
        else:
            print(f"{path}  " + "  ".join(f"{name} {p:.1%}" for name, p in classes))
    if num_failed and len(paths) > 1:
        print(f"error: {num_failed} of {len(paths)} images could not be read", file=sys.stderr)
    return int(num_failed > 0)


def list_images(words: Sequence[str]) -> list[str]:
    """Lists image files; words are files, directories (searched recursively), glob patterns, or - for stdin."""
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
            raise UserError(f"no images found in {word}; expected files such as {', '.join(IMAGE_SUFFIXES)}")
        paths += found
    return paths


def predict_files(classifier: Classifier, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray | UserError]]:
    """Classifies image files of any size; decodes the next batch while the current one is on the device.

    Yields, in order, (path, float32 probabilities [classes]), or (path, error) if a file cannot be read.
    """
    batch_size, size = min(_BATCH_SIZE, len(paths)), classifier.image_size
    blank = np.zeros((size, size, 3), np.uint8)
    chunks = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]

    def decode(path: str) -> np.ndarray | UserError:
        try:
            return classifier.decode(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor(resources.available_cpus()) as pool, progress_bar(total=len(paths), unit=" images") as bar:
        following = pool.map(decode, chunks[0])
        for chunk, next_chunk in zip(chunks, [*chunks[1:], ()], strict=True):
            decoded, following = list(following), pool.map(decode, next_chunk)
            images = [blank if isinstance(image, UserError) else image for image in decoded]
            images += [blank] * (batch_size - len(images))  # a smaller last batch would be recompiled
            probabilities = classifier.predict(np.stack(images), batch_size=batch_size)
            for path, image, row in zip(chunk, decoded, probabilities, strict=False):
                yield path, image if isinstance(image, UserError) else row
            bar.update(len(chunk))


if __name__ == "__main__":
    sys.exit(run_command(main))
