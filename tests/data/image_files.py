"""Helpers that write small image files and load `folder:` datasets."""

from pathlib import Path

from PIL import Image

from vit_jax import data
from vit_jax.types import Dataset


def write_image(path: Path, *, size=(4, 4), color=(255, 0, 0), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def write_image_dir(root: Path) -> Path:
    """Writes two classes, cat and dog, with two training images and one test image each; red is 10 * label + index."""
    for split, num_images in {"train": 2, "test": 1}.items():
        for label, name in enumerate(["cat", "dog"]):
            for i in range(num_images):
                write_image(root / split / name / f"{i}.png", color=(10 * label + i, 0, 0))
    return root


def load(name: str, *, image_size: int = 4, **options) -> Dataset:
    return data.load_dataset(name, image_size=image_size, **options)


def load_folder(path: Path, **options) -> Dataset:
    return load(f"folder:{path}", **options)
