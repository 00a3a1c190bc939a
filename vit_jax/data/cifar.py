"""CIFAR-10 and CIFAR-100, straight from their official binary archives."""

import dataclasses
import gzip
import hashlib
import logging
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.runtime import download
from vit_jax.runtime.errors import UserError
from vit_jax.types import Split


@dataclasses.dataclass(frozen=True)
class _Cifar:
    """Layout of one official binary archive.

    Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html; sizes and sums are those that TFDS checks.
    """

    archive: str
    num_bytes: int
    sha256: str
    folder: str
    files: dict[str, tuple[str, ...]]
    names_file: str
    num_classes: int
    label_bytes: int  # before the pixels; the last of them is the label to use

    @property
    def record_bytes(self) -> int:
        return self.label_bytes + 3 * 32 * 32


CIFARS = {
    "cifar10": _Cifar(
        archive="cifar-10-binary.tar.gz",
        num_bytes=170_052_171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        names_file="batches.meta.txt",
        num_classes=10,
        label_bytes=1,
    ),
    "cifar100": _Cifar(
        archive="cifar-100-binary.tar.gz",
        num_bytes=168_513_733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        names_file="fine_label_names.txt",
        num_classes=100,
        label_bytes=2,
    ),
}


def cifar_shapes(cifar: _Cifar) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Both splits as zeros that take no memory, and numbers for class names."""
    splits = {
        name: Split(images=np.broadcast_to(np.uint8(0), (number, 32, 32, 3)), labels=np.zeros(number, np.int32))
        for name, number in (("train", 50_000), ("test", 10_000))
    }
    return splits, tuple(map(str, range(cifar.num_classes)))


def load_cifar(cifar: _Cifar, data_dir: str, split_names: set[str]) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Reads the named splits, and the class names.

    Args:
        cifar: the layout, one of `CIFARS`.
        data_dir: the archive, a folder that holds it or its unpacked files; "" fetches it into the cache.
        split_names: of "train" and "test" those to read.

    Raises:
        UserError: files are missing, truncated or damaged, or not of this dataset.
    """
    wanted = [cifar.names_file, *(file for split in sorted(split_names) for file in cifar.files[split])]
    place = _find_cifar(cifar, data_dir, wanted)
    contents = _read_folder_files(place, wanted) if place.is_dir() else _read_archive_files(place, wanted)
    missing = [file for file in wanted if file not in contents]
    if missing:
        raise UserError(
            f"{place} holds no {', '.join(missing)}: it is not the binary version of CIFAR ({cifar.archive});"
            f" get https://www.cs.toronto.edu/~kriz/{cifar.archive}"
        )
    class_names = tuple(contents[cifar.names_file].decode().split())
    if len(class_names) != cifar.num_classes:
        raise UserError(f"{place}: {cifar.names_file} lists {len(class_names)} classes, expected {cifar.num_classes}")
    splits = {}
    for split in split_names:
        records = [_parse_cifar_records(cifar, contents[file], f"{place}: {file}") for file in cifar.files[split]]
        splits[split] = _split_from_records(cifar, records)
    return splits, class_names


def _find_cifar(cifar: _Cifar, data_dir: str, wanted: Sequence[str]) -> Path:
    """The archive, or the folder with the unpacked files, that `data_dir` leads to; "" fetches the archive."""
    if not data_dir:
        return download.fetch(
            f"https://www.cs.toronto.edu/~kriz/{cifar.archive}",
            download.cache_dir() / cifar.archive,
            num_bytes=cifar.num_bytes,
            sha256=cifar.sha256,
        )
    given = Path(data_dir).expanduser()
    for folder in (given / cifar.folder, given):
        if all((folder / file).is_file() for file in wanted):
            return folder
    archive = given / cifar.archive if given.is_dir() else given
    if not archive.is_file():
        found = f"no {cifar.archive}, no files of {cifar.folder}" if given.is_dir() else "no such file or folder"
        advice = f"give the path of {cifar.archive}, or a folder that holds it or its files"
        raise UserError(f"data_dir {data_dir!r}: {found}; {advice}")
    _warn_if_unofficial(cifar, archive)
    return archive


def _warn_if_unofficial(cifar: _Cifar, archive: Path) -> None:
    if archive.stat().st_size == cifar.num_bytes:
        with archive.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == cifar.sha256:
                return
    logging.getLogger(__name__).warning("%s is not the official archive (its sha256 differs); reading on", archive)


def _read_folder_files(folder: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    return {file: (folder / file).read_bytes() for file in wanted}


def _read_archive_files(archive: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    contents = {}
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    name = member.name.rpartition("/")[2]
                    file = tar.extractfile(member) if name in wanted else None
                    if file:
                        contents[name] = file.read()
            while stream.read(1 << 20):  # to the end, where gzip's checksum stands
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise UserError(
            f"{archive} ({archive.stat().st_size:,} bytes) is truncated or damaged ({error}); download it again"
        ) from error
    return contents


def _parse_cifar_records(cifar: _Cifar, content: bytes, where: str) -> np.ndarray:
    """Checks and shapes one file: uint8 [records record_bytes]."""
    if not content or len(content) % cifar.record_bytes:
        raise UserError(
            f"{where} has {len(content):,} bytes, expected a multiple of {cifar.record_bytes:,};"
            " it is cut off, or of another dataset"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, cifar.record_bytes)  # [n bytes]
    labels = records[:, cifar.label_bytes - 1]
    wrong = labels >= cifar.num_classes
    if wrong.any():
        first = int(np.argmax(wrong))
        raise UserError(f"{where}: record {first} has label {labels[first]}, expected 0..{cifar.num_classes - 1}")
    return records


def _split_from_records(cifar: _Cifar, files: Sequence[np.ndarray]) -> Split:
    num_images = sum(len(records) for records in files)
    split = Split(images=np.empty((num_images, 32, 32, 3), np.uint8), labels=np.empty(num_images, np.int32))
    start = 0
    for records in files:
        stop = start + len(records)
        split.labels[start:stop] = records[:, cifar.label_bytes - 1]
        pixels = records[:, cifar.label_bytes :].reshape(-1, 3, 32, 32)  # [n c h w]
        split.images[start:stop] = pixels.transpose(0, 2, 3, 1)  # [n h w c]
        start = stop
    return split
