"""CIFAR-10 saved once as JPEG, in the layouts of users: bare class directories and tables, with damage and leakage."""

import collections
import io
import tarfile

import numpy as np
import pytest
from image_files import load_folder
from PIL import Image

from vit_jax import data
from vit_jax.data.cifar import CIFARS
from vit_jax.data.findings import describe_warnings

NUM_IMAGES = 2000


@pytest.fixture(scope="module")
def records(cifar10_archive):
    """(label, JPEG file) of the first images of the archive."""
    with tarfile.open(cifar10_archive) as tar:
        member = next(name for name in tar.getnames() if name.endswith("data_batch_1.bin"))
        rows = np.frombuffer(tar.extractfile(member).read(), np.uint8).reshape(-1, 3073)[:NUM_IMAGES]
    files = []
    for row in rows:
        buffer = io.BytesIO()
        Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(buffer, "jpeg", quality=95)
        files.append((int(row[0]), buffer.getvalue()))
    return files


def write_records(root, records, *, splits=None):
    """Writes ROOT[/SPLIT]/CLASS/NUMBER.jpg; returns the paths."""
    paths = []
    for i, (label, content) in enumerate(records):
        directory = root / (splits[i] if splits else ".") / CIFARS["cifar10"].class_names[label]
        directory.mkdir(parents=True, exist_ok=True)
        paths.append(directory / f"{i:05}.jpg")
        paths[-1].write_bytes(content)
    return paths


def test_bare_classes_and_table_give_the_same_dataset(records, tmp_path):
    write_records(tmp_path / "images", records)
    table = tmp_path / "images" / "table.tsv"
    names = sorted(path.relative_to(table.parent) for path in (tmp_path / "images").glob("*/*.jpg"))
    table.write_text("\n".join(f"{name}\t{name.parent.name}" for name in reversed(names)))
    folder = load_folder(tmp_path / "images", image_size=32)
    listed = data.load_dataset(f"csv:{table}", image_size=32)
    assert data.fingerprint(folder) == data.fingerprint(listed)
    totals = np.bincount([label for label, _ in records])
    for role, fraction in (("test", 0.2), ("validation", 0.08), ("train", 0.72)):
        counts = np.bincount(folder.splits[role].labels, minlength=10)
        assert abs(counts - fraction * totals).max() <= 1, role  # stratified
        np.testing.assert_array_equal(folder.splits[role].images, listed.splits[role].images)
    assert not folder.findings.duplicates and not folder.findings.damaged


def test_damaged_and_duplicated_images_are_found(records, tmp_path):
    """1 % of the files are truncated, 0.5 % of the training images are also test images."""
    splits = ["train" if i < 1600 else "test" for i in range(NUM_IMAGES)]
    paths = write_records(tmp_path, records, splits=splits)
    for path in paths[::100]:
        path.write_bytes(path.read_bytes()[:-300])
    copied = [paths[i] for i in range(50, 1600, 200)]
    for path in copied:
        copy = tmp_path / "test" / path.parent.name / f"copy{path.name}"
        copy.write_bytes(path.read_bytes())
    for storage in ("memory", "stream"):
        dataset = load_folder(tmp_path, image_size=32, storage=storage, damaged="skip")
        assert sorted(line.split(" (")[0] for line in dataset.findings.damaged) == sorted(map(str, paths[::100]))
        assert sorted(pair[0] for pair in dataset.findings.duplicates) == sorted(map(str, copied))
        total = sum(map(len, dataset.splits.values()))
        assert total == NUM_IMAGES - len(paths[::100]) + len(copied)


def test_rare_class_is_in_every_split(records, tmp_path):
    """One class is cut to 5 %."""
    cats = [record for record in records if record[0] == 3]
    rare = [record for record in records if record[0] != 3] + cats[: len(cats) // 20]
    write_records(tmp_path, rare)
    dataset = load_folder(tmp_path, image_size=32)
    counts = {role: collections.Counter(split.labels.tolist())[3] for role, split in dataset.splits.items()}
    assert counts == {"train": 7, "validation": 1, "test": 2} and len(cats) // 20 == 10
    assert any(line.endswith("training images (1): cat (7)") for line in describe_warnings(dataset))
    assert any("7 of cat" in line for line in describe_warnings(dataset))
