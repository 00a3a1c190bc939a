"""Reads CIFAR-10 and CIFAR-100 from their official binary archives."""

import dataclasses
import gzip
import io
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_jax.data.splits import OpenedSplits, Request, slice_splits
from vit_jax.runtime import download
from vit_jax.runtime.errors import UserError
from vit_jax.runtime.files import cache_dir
from vit_jax.types import Split

_ADDRESS = "https://www.cs.toronto.edu/~kriz"


@dataclasses.dataclass(frozen=True)
class _Cifar:
    """Layout of an archive (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html); SHA-256 as in TFDS."""

    archive: str
    sha256: str
    folder: str
    files: Mapping[str, Sequence[str]]  # split name -> files
    label_bytes: int  # before the pixels of each image; the last one is used
    class_names: tuple[str, ...]


CIFARS = {
    "cifar10": _Cifar(
        archive="cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        files={"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
        label_bytes=1,
        class_names=tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    ),
    "cifar100": _Cifar(
        archive="cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        files={"train": ["train.bin"], "test": ["test.bin"]},
        label_bytes=2,
        class_names=tuple(
            """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
            butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
            crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
            keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
            mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
            porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
            snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
            tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()
        ),
    ),
}


def open_cifar(request: Request) -> OpenedSplits:
    """Reads "cifar10" or "cifar100"; downloads the archive unless `data_dir` is given."""
    cifar = CIFARS[request.name]
    slices = request.slices(known=cifar.files)
    names = sorted({split.name for split in slices.values()})
    if request.dry_run:
        whole = {split: _count_images(cifar, split) for split in names}
    else:
        whole = _read_splits(cifar, request.data_dir, names)
    return OpenedSplits(slice_splits(whole, slices), cifar.class_names)


def _count_images(cifar: _Cifar, split: str) -> Split:
    """Returns the official number of images per class, all black, without allocating them."""
    number = {"train": 50_000, "test": 10_000}[split]
    labels = np.arange(number, dtype=np.int32) % len(cifar.class_names)
    return Split(np.broadcast_to(np.uint8(0), (number, 32, 32, 3)), labels)


def _read_splits(cifar: _Cifar, data_dir: str, names: Sequence[str]) -> dict[str, Split]:
    if data_dir:
        given = Path(data_dir).expanduser()
        path = next((path for path in (given / cifar.folder, given / cifar.archive) if path.exists()), given)
    else:
        url, path = f"{_ADDRESS}/{cifar.archive}", cache_dir() / cifar.archive
        path = download.fetch(url, path, sha256=cifar.sha256)
    files = [file for split in names for file in cifar.files[split]]
    contents = _read_files(path, files)
    if missing := [file for file in files if file not in contents]:
        found = f"has no {', '.join(missing)}" if path.exists() else "is missing"
        raise UserError(
            f"{path} {found}; set data_dir to {cifar.archive} from {_ADDRESS}, or to a directory with it or its files"
        )
    return {split: _parse_files(cifar, {file: contents[file] for file in cifar.files[split]}) for split in names}


def _read_files(path: Path, files: Sequence[str]) -> dict[str, bytes]:
    """Returns the contents of the files that exist in an archive or a directory."""
    if not path.is_file():
        return {file: (path / file).read_bytes() for file in files if (path / file).is_file()}
    contents = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in files:
                    contents[name] = (archive.extractfile(member) or io.BytesIO()).read()
            while stream.read(1 << 20):  # to the end, where the checksum is
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        size = f"{path.stat().st_size:,} bytes"
        raise UserError(f"{path} ({size}) is truncated or damaged ({error}); download it again") from error
    return contents


def _parse_files(cifar: _Cifar, contents: Mapping[str, bytes]) -> Split:
    record_bytes, num_classes = cifar.label_bytes + 3 * 32 * 32, len(cifar.class_names)
    for file, content in contents.items():
        labels = content[cifar.label_bytes - 1 :: record_bytes]
        if not content or len(content) % record_bytes or max(labels) >= num_classes:
            raise UserError(
                f"{file} has {len(content):,} bytes; expected records of {record_bytes:,} bytes with labels from 0 to "
                f"{num_classes - 1}; it is damaged or of another dataset, download {cifar.archive} again"
            )
    records = np.frombuffer(b"".join(contents.values()), np.uint8).reshape(-1, record_bytes)
    images = records[:, cifar.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [n h w c]
    return Split(np.ascontiguousarray(images), records[:, cifar.label_bytes - 1].astype(np.int32))
