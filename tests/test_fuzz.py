"""Fuzz tests: 500 damaged files and invalid overrides; at most one line of error each, and no leftover files.

A case depends only on its kind and number, so that a failure can be reproduced: `make_case("npz", 17, directory)`.
"""

import contextlib
import io
import json
import os
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import reference
from conftest import TINY
from flax.traverse_util import unflatten_dict
from numpy.lib import format as npy
from PIL import Image

from vit_jax import pretrained

NUM_CASES = {"npz": 200, "image": 140, "config": 160}
SECONDS_PER_CASE = 20
CONFIG = """
from configs import digits

def get_config(arg=""):
    config = digits.get_config("scratch")
    config.model = {model}
    config.num_steps = config.warmup_steps = 0
    config.mesh.data = 1
    return config
"""


class Case(NamedTuple):
    """A command line; `output` may exist afterwards if the command succeeds."""

    name: str
    command: str
    arguments: list[str]
    output: Path | None = None


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def make_case(kind: str, number: int, directory: Path) -> Case:
    """Returns a case, after writing its files to `directory`."""
    rng = np.random.default_rng([2021, list(NUM_CASES).index(kind), number])
    makers = {"npz": npz_case, "image": image_case, "config": config_case}
    return makers[kind](rng, number, directory)


# Checkpoints


def released_arrays() -> dict[str, np.ndarray]:
    shapes = reference.released_shapes(**TINY, representation_size=None, num_classes=3, num_tokens=17)
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def good_metadata() -> dict:
    return {
        "architecture": "vit",
        "model": {**TINY, "num_classes": 3},
        "image_size": 16,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "class_names": ["cat", "dog", "fox"],
    }


def good_npz(directory: Path) -> bytes:
    path = directory / "good.npz"
    if not path.exists():
        pretrained.save_npz(
            path, unflatten_dict(released_arrays(), sep="/"), pretrained.ModelMetadata.from_json(good_metadata())
        )
    return path.read_bytes()


def zip_of(members: list[tuple[str, bytes]], *, comment: bytes = b"", compression: int = zipfile.ZIP_STORED) -> bytes:
    """Returns an archive of the given members; names may repeat and contain any characters."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.comment = comment
        for i, (_, content) in enumerate(members):
            archive.writestr(f"{i:06}", content)
    content = bytearray(buffer.getvalue())
    return rename_members(bytes(content), [name.encode("utf-8", "surrogateescape") for name, _ in members])


def rename_members(content: bytes, names: list[bytes]) -> bytes:
    """Replaces the names of an archive's members, numbers of six digits, in its headers."""
    end = content.rindex(b"PK\x05\x06")
    local, central = bytearray(), bytearray()
    offset = struct.unpack_from("<I", content, end + 16)[0]
    for name in names:
        header = content[offset : offset + 46]
        size, start = struct.unpack_from("<I", header, 20)[0], struct.unpack_from("<I", header, 42)[0]
        flags = struct.pack("<H", 0x800 if not name.isascii() else 0)
        length, at = struct.pack("<H", len(name)), struct.pack("<I", len(local))
        old = content[start : start + 30]
        local += old[:6] + flags + old[8:26] + length + old[28:] + name + content[start + 36 :][:size]
        central += header[:8] + flags + header[10:28] + length + header[30:42] + at + name
        offset += 46 + 6
    counts = struct.pack("<HHII", len(names), len(names), len(central), len(local))
    return bytes(local + central + content[end : end + 8] + counts + content[end + 20 :])


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    npy.write_array(buffer, array, allow_pickle=array.dtype.hasobject)
    return buffer.getvalue()


def with_header(header: str, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("utf-8", "surrogateescape")
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text) & (0xFFFF if version[0] == 1 else 0xFFFFFFFF))
    return b"\x93NUMPY" + version + length + text + data


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (20000000000,), }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4), }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-24,), }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -6), }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (24.0,), }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': '24', }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 24), }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 12), }\n",
    "{'descr': '<f4', 'fortran_order': 2, 'shape': (24,), }\n",
    "{'descr': '<f4', 'shape': (24,), }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (24,), 'more': 1, }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 80 + "24), }\n",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1000000000000000), }\n",
    "{'descr': '<f9', 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': '|O', 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': 'bad', 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': '', 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': None, 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': ('<f4', (1000000, 1000000)), 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': [('a', '<f2'), ('b', '<f2')], 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': '<U1', 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': '|V4', 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': '|V0', 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (24,), }\n",
    "{'descr': '>f4', 'fortran_order': False, 'shape': (24,), }\n",
    "open('executed', 'w')\n",
    "[" * 200 + "]" * 200 + "\n",
    "(" * 9000 + "\n",
    "{'descr': '<f4'" + " " * 20000 + "}\n",
    "\udcff\udcfe\n",
    "\n",
    "",
]


def wrong_header(rng: np.random.Generator, arrays: dict, directory: Path) -> bytes:
    header = HEADERS[rng.integers(len(HEADERS))]
    version = [b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"][rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])]
    data = arrays["Transformer/encoder_norm/bias"].tobytes()
    return npz_with(arrays, "Transformer/encoder_norm/bias", with_header(header, data, version))


def npz_with(arrays: dict, key: str, content: bytes) -> bytes:
    """Returns the valid checkpoint with the bytes of a single array replaced."""
    return zip_of([(f"{name}.npy", content if name == key else npy_bytes(a)) for name, a in arrays.items()])


def wrong_array(rng: np.random.Generator, arrays: dict, directory: Path) -> bytes:
    """Returns a checkpoint with an array of another dtype, shape or content."""
    key = list(arrays)[rng.integers(len(arrays))]
    shape = arrays[key].shape
    evil = np.empty(shape, object)
    evil.fill(Evil(directory / "executed"))
    others = [
        evil,
        np.array(Evil(directory / "executed"), object),
        np.full(shape, "1.0"),
        np.full(shape, b"1.0"),
        np.zeros(shape, "datetime64[s]"),
        np.zeros(shape, "timedelta64[s]"),
        np.zeros(shape, [("real", "f4"), ("object", "f4")]),
        np.ones(shape, complex),
        np.full(shape, np.nan, np.float32),
        np.full(shape, np.inf, np.float32),
        np.full(shape, 1e300),
        np.full(shape, np.nan, np.float16),
        np.zeros((*shape, 0), np.float32),
        np.zeros((0,), np.float32),
        np.float32(1),
        np.ones((*shape, 1), np.float32),
        np.ones(shape[::-1] + (2,), np.float32),
        np.ones(shape, "V2"),
        np.ones(shape, np.int64),
    ]
    array = np.asarray(others[rng.integers(len(others))])
    return npz_with(arrays, key, npy_bytes(array))


def wrong_names(rng: np.random.Generator, arrays: dict, directory: Path) -> bytes:
    """Returns a checkpoint with missing, duplicated, additional or renamed arrays."""
    members = [(f"{name}.npy", npy_bytes(array)) for name, array in arrays.items()]
    i = int(rng.integers(len(members)))
    name, content = members[i]
    names = ["../x.npy", ".npy", "", "/etc/x.npy", "cls/more.npy", "Transformer.npy", "\udcff\udcfe.npy", "a\nb.npy"]
    names += ["x" * 60000 + ".npy", "Transformer/encoderblock_99999999999/x.npy", "Transformer//x.npy", "cls", "è.npy"]
    names += ["Transformer/encoderblock_0/", "head/kernel/0/1/2.npy", "params/x.npy", "opt/target/x.npy"]
    change = rng.integers(5)
    if change == 0:
        del members[i]
    elif change == 1:
        members.append((name, content))
    elif change == 2:
        members[i] = (names[rng.integers(len(names))], content)
    elif change == 3:
        members.append((names[rng.integers(len(names))], content))
    else:
        prefix = ["params/", "opt/target/", "params/img/", "Transformer/", "/", "resnet/"][rng.integers(6)]
        members = [(prefix + name, content) for name, content in members]
    return zip_of(members)


def wrong_metadata(rng: np.random.Generator, arrays: dict, directory: Path) -> bytes:
    """Returns a checkpoint with invalid metadata."""
    metadata = good_metadata()
    texts = [b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 60000, b'{"model": ' * 5000, b'"model"', b"1e999"]
    values = [None, 7, -1, "vit", [], {}, True, 1.5, [0.5] * 2, ["a"] * 4, [None] * 3, float("nan"), 10**30, ["a"] * 3]
    if rng.random() < 0.3:
        comment = texts[rng.integers(len(texts))]
    else:
        group = metadata if rng.random() < 0.6 else metadata["model"]
        key = list(group)[rng.integers(len(group))]
        if rng.random() < 0.2:
            del group[key]
        else:
            group[key] = values[rng.integers(len(values))]
        comment = json.dumps(metadata).encode()
    return zip_of([(f"{name}.npy", npy_bytes(array)) for name, array in arrays.items()], comment=comment)


def zip_bomb(rng: np.random.Generator, arrays: dict, directory: Path) -> bytes:
    """Returns a checkpoint of 0.25 MiB that unpacks to 255 MiB, or declares that size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    mebibyte = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    count = 255 if rng.random() < 0.5 else 3
    numbers = (255 << 20) // 4
    header = with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({numbers},), }}\n", b"")
    first = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = first + mebibyte * count + packer.flush()
    content = bytearray(zip_of([("cls.npy", packed)]))
    for signature, method, size in ((b"PK\x03\x04", 8, 22), (b"PK\x01\x02", 10, 24)):
        offset = content.index(signature)
        struct.pack_into("<H", content, offset + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<I", content, offset + size, len(header) + (255 << 20))
    return bytes(content)


def compressed(rng: np.random.Generator, arrays: dict, directory: Path) -> bytes:
    """Returns a compressed checkpoint with damaged bytes or a wrong compression method."""
    compression = [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA][rng.integers(3)]
    members = [(f"{name}.npy", npy_bytes(array)) for name, array in arrays.items()]
    content = bytearray(zip_of(members, compression=compression))
    if rng.random() < 0.5:
        return damage(rng, bytes(content))
    for signature, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        offset = content.index(signature)
        struct.pack_into("<H", content, offset + method, int(rng.choice([0, 1, 8, 12, 14, 93, 99])))
        struct.pack_into("<H", content, offset + method - 2, int(rng.choice([0, 1, 0x20, 0x40, 0x800])))
    return bytes(content)


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    """Flips, deletes, inserts or repeats bytes at random positions."""
    out = bytearray(content)
    how, start = rng.integers(9), int(rng.integers(len(out)))
    length = int(rng.integers(1, 1 + len(out) // 4))
    if how == 0:
        out[start] ^= 1 << rng.integers(8)
    elif how == 1:  # in the last bytes, which contain the directory of a ZIP
        for _ in range(4):
            out[-1 - rng.integers(min(600, len(out)))] = rng.integers(256)
    elif how == 2:  # in the first bytes
        for _ in range(3):
            out[rng.integers(min(100, len(out)))] = rng.integers(256)
    elif how == 3:
        del out[start:]
    elif how == 4:
        del out[start : start + length]
    elif how == 5:
        out[start:start] = rng.bytes(length)
    elif how == 6:
        other = int(rng.integers(len(out)))
        out[start : start + length] = out[other : other + length]
    elif how == 7:
        out[:0] = rng.bytes(length)
    else:
        for _ in range(30):
            out[rng.integers(len(out))] = rng.integers(256)
    return bytes(out)


def special_file(rng: np.random.Generator, path: Path) -> None:
    """Creates a directory, FIFO, link or invalid file, or nothing."""
    how = rng.integers(9)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        path.symlink_to(path.with_name("nowhere"))
    elif how == 3:
        path.symlink_to(path)
    elif how == 4:
        path.symlink_to("/dev/null")
    elif how == 5:
        path.write_bytes(b"")
    elif how == 6:
        path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    elif how == 7:
        path.write_bytes(rng.bytes(300))


def npz_case(rng: np.random.Generator, number: int, directory: Path) -> Case:
    makers: list[Callable[..., bytes]] = [wrong_header, wrong_array, wrong_names, wrong_metadata, compressed]
    valid, arrays = good_npz(directory), released_arrays()
    path = directory / f"{number}.npz"
    which = number % 10
    if which < 5:
        path.write_bytes(makers[which](rng, arrays, directory))
    elif number % 50 == 5:
        path.write_bytes(zip_bomb(rng, arrays, directory))
    elif which == 6:
        special_file(rng, path)
    else:
        path.write_bytes(damage(rng, valid))
    write_image(directory / "good.png")
    workdir = directory / f"run{number}"
    where = number // 10 % 10
    if where in (2, 5, 8):
        config = directory / "config.py"
        config.write_text(CONFIG.format(model={}))
        arguments = ["--config", config, "--workdir", workdir, "--noreport", f"--config.pretrained={path}"]
        return create_case(f"train {path.name}", "train", arguments, workdir)
    if where == 9:
        command = ["vit_jax.export", "vit_jax.evaluate"][number % 2]
        more = ["--format", "npz", "--out", workdir] if command == "vit_jax.export" else []
        return create_case(f"{command} {path.name}", command, ["--workdir", path, *more], workdir)
    flags = ["--json"] if number % 2 else []
    return create_case(f"predict {path.name}", "vit_jax.predict", ["--workdir", path, directory / "good.png", *flags])


def create_case(name: str, command: str, arguments: list, output: Path | None = None) -> Case:
    return Case(name, command, list(map(str, arguments)), output)


# Images


def write_image(path: Path) -> None:
    if not path.exists():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)).save(path)


def image_bytes(kind: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """Returns a PNG that declares a size but contains few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(500))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def huge_image(rng: np.random.Generator) -> bytes:
    """Returns an image whose header declares more pixels than it contains."""
    how = rng.integers(6)
    if how == 0:
        return png_of(60_000, 60_000)
    if how == 1:
        return png_of(
            *[(2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (0, 0), (2**32 - 1, 5), (12_000, 12_000)][rng.integers(5)]
        )
    if how == 2:
        return png_of(40, 30, depth=int(rng.integers(1, 40)), colour=int(rng.integers(8)))
    if how == 3:
        content = bytearray(image_bytes("JPEG"))
        struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, 65_500, 65_500)
    elif how == 4:
        content = bytearray(image_bytes("GIF", "P"))
        struct.pack_into("<HH", content, 6, 65_535, 65_535)
    else:
        content = bytearray(image_bytes("BMP"))
        struct.pack_into("<ii", content, 18, int(rng.choice([10**9, -(10**9), 0])), 10**9)
    return bytes(content)


def exif_image(rng: np.random.Generator) -> bytes:
    """Returns an image with damaged EXIF data."""
    tags = Image.Exif()
    tags[0x0112] = [0, 9, 65535, 3][rng.integers(4)]
    exif = tags.tobytes()
    damaged = [rng.bytes(50), exif[:10], b"Exif\x00\x00II*\x00\xff\xff\xff\xff", damage(rng, exif)][rng.integers(4)]
    kind = ["JPEG", "PNG", "WEBP"][rng.integers(3)]
    content = image_bytes(kind, exif=damaged)
    return content[: len(content) * 2 // 3] if rng.random() < 0.5 else content


NAMES = [
    "a\nb.png",
    "\udcff.png",
    "*.png",
    "[.png",
    "é🙂.png",
    "x" * 240 + ".png",
    " .png",
    "a.png/",
    "~.png",
    "%s{0}.png",
]


def image_case(rng: np.random.Generator, number: int, directory: Path) -> Case:
    good_npz(directory)
    path = directory / f"{number}.png"
    kinds = [
        ("PNG", "RGB"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("PNG", "P"),
        ("JPEG", "CMYK"),
        ("TIFF", "L"),
    ]
    kind, mode = kinds[rng.integers(len(kinds))]
    which = number % 7
    if which == 0:
        path.write_bytes(huge_image(rng))
    elif which == 1:
        path.write_bytes(exif_image(rng))
    elif which == 2:
        special_file(rng, path)
    elif which == 3:
        content = image_bytes(kind, mode)
        path.write_bytes(content[: rng.integers(len(content))])
    elif number % 28 == 4:
        path = directory / f"{number}{NAMES[rng.integers(len(NAMES))]}"
        path.write_bytes(image_bytes(kind, mode)[: rng.integers(20, 400)])
    else:
        path.write_bytes(damage(rng, image_bytes(kind, mode)))
    if number % 5 == 1:
        root = directory / f"images{number}"
        for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
            (root / name).mkdir(parents=True)
            write_image(root / name / "good.png")
        if os.path.lexists(path):
            path.rename(root / "train" / "dog" / "other.png")
        config = directory / "sized.py"
        config.write_text(CONFIG.format(model={**TINY}))
        arguments = ["--config", config, "--dry_run", f"--config.dataset.name=folder:{root}", "--config.batch_size=2"]
        return create_case(f"train {number}", "train", arguments)
    flags = ["--json"] if number % 2 else []
    return create_case(f"predict {path.name}", "vit_jax.predict", ["--workdir", directory / "good.npz", path, *flags])


# Overrides

INTS = """
seed dataset.split_seed
image_size feature_views lora.rank batch_size eval_batch_size accumulation_steps mesh.fsdp mesh.data num_steps
mesh.cpu_devices ablation.schedule_steps ablation.schedule_every_steps warmup_steps log_every_steps eval_every_steps
checkpoint_every_steps
model.num_layers model.hidden_size model.num_heads model.mlp_dim model.patch_size
"""
FLOATS = """
dataset.test_fraction dataset.validation_fraction
lora.alpha optimizer.momentum optimizer.weight_decay optimizer.layer_decay optimizer.clip_norm learning_rate
label_smoothing mixup_alpha cutmix_alpha ema_decay model.dropout_rate
"""
CHOICES = """
architecture dtype dataset.damaged augment ablation.test_augment ablation.head_init features optimizer.name
optimizer.momentum_dtype optimizer.decayed schedule remat
"""
STRINGS = "pretrained dataset.name dataset.data_dir dataset.train_split dataset.validation_split dataset.test_split"
TUPLES = "image_mean image_std trainable lora.targets dataset.classes"
BOOLEANS = "ablation.frozen_dropout"
NINES = "9" * 30
# Values separated by whitespace, then values that contain whitespace or are computed.
VALUES = {
    INTS: "many 1.5 -1 1e3 nan inf True None [] {} '1' 4294967296 2147483648 -- 1,000 \u0663\u0663\u0663\u0663".split()
    + ["", "(1, 2)", "1 2", "\n", NINES, f"-{NINES}", "9" * 5000],
    FLOATS: "quick nan -inf inf -0.5 1e400 True (0.1,) 0,1 None 1e39 -1e-300 0x1p3 ½ -- [0.1]".split()
    + ["", "\t", "9" * 400],
    CHOICES: "None SGD ｓｇｄ 🙂 ../sgd 0 () \udcff %s".split() + ["", " sgd", "adam\n", "x" * 100_000],
    STRINGS: """
        / . ~ ~nobody/x nowhere.npz /dev/null 🙂 micro/ ../micro \udcff folder: folder:/dev/null folder:nowhere train[
        train[:x] train[5:1] train[:101%] * %s{} train[:-0] test[0:0] valid https://nowhere/x.npz imagenet21k/ViT-B_17
        """.split()
    + ["", "x" * 5000, "\n", f"train[:{NINES}]"],
    TUPLES: """
        ( () ('(',) ('[[a]',) ('a{99999999999999999999}',) None {'a':1} b'full' 7 ('*',) ('nothing/.*',) (None,1,2)
        ({},) (nan,1,2) ('a','b','c') (0.5,0.5,-0.5) ((1,2),3,4) ('head/.*',5) (1e999,1,1)
        (127.5,127.5,127.5) ('\\x00',) (b'head/.*',) 🙂 ('',)
        """.split()
    + ["", f"('{'(' * 3000}',)", f"('{'(' * 3000}{')' * 3000}',)", "(" * 150, f"({'9' * 400}, 0, 0)"],
    BOOLEANS: ["", "maybe", "2", "None", "()", "Truee", "-1"],
}
ODD_FLAGS = (
    """
--config.=1 --config..x=1 --config.optimizer=5 --config.optimizer={} --config.optimizer.name.x=1 --config.__class__=1
--config.lock=1 --config.to_dict=1 --config.items=1 --config.model= --config.x --config.batch_size
--noconfig.batch_size --config= --config=/dev/null --config=configs --config=a.py --config=README.md
--config=configs/digits.py: --config=configs/digits.py:x:y --config.model.num_classes=3 --config.model.name=x
--config.model.parent=x --config.model.dtype=x --config.dataset=folder:x --config.seed=1=2 --=1 - ---
--config.lora.targets --config.mesh={'fsdp':1} --config.\udcff=1 --undefok --flagfile=nowhere --flagfile=/
--num_processes=0 --process_id=-1 --wait_seconds=x --num_processes=2 --coordinator=nowhere --workdir --dry_run=maybe 🙂
--config.seed
""".split()
    + ["x" * 100_000, "", "\n"]
)


def config_case(rng: np.random.Generator, number: int, directory: Path) -> Case:
    which = number % 8
    groups = [INTS, FLOATS, CHOICES, STRINGS, TUPLES, TUPLES]
    if which < 6:
        keys = groups[which] if number % 40 else BOOLEANS
        key = (keys.split())[rng.integers(len(keys.split()))]
        values = VALUES[keys]
        flags = [f"--config.{key}={values[rng.integers(len(values))]}"]
    elif which == 6:
        key = " ".join(VALUES).split()[rng.integers(len(" ".join(VALUES).split()))]
        flags = [f"--config.{mistype(rng, key)}=1"]
    else:
        flags = [ODD_FLAGS[number // 8 % len(ODD_FLAGS)]]
        if number % 3 == 0:
            flags += [ODD_FLAGS[rng.integers(len(ODD_FLAGS))]]
    config = directory / "sized.py"
    config.write_text(CONFIG.format(model={**TINY, "dropout_rate": 0.0}))
    workdir = directory / f"run{number}"
    arguments = ["--config", config, "--workdir", workdir, "--noreport", *flags]
    return create_case(f"train {' '.join(flags)[:200]!a}", "train", arguments, workdir)


def mistype(rng: np.random.Generator, key: str) -> str:
    """Deletes, doubles, swaps or replaces a letter."""
    start, how = int(rng.integers(len(key) - 1)), rng.integers(4)
    letters = ["", key[start] * 2, key[start + 1] + key[start], "ö"][how]
    return key[:start] + letters + key[start + (2 if how == 2 else 1) :]


# Running a case


class TooLongError(BaseException):
    """A BaseException, so that no `except Exception` treats a timeout as an input error."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TooLongError

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def listing(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def problems_of(case: Case, code: object, stderr: str, leftovers: set[Path]) -> list[str]:
    """Returns the problems with the outcome of a case."""
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    found = []
    if code not in (0, 1, 2):
        found.append(f"exit code {code}")
    if "Traceback" in stderr:
        found.append("a traceback")
    if code and not lines:
        found.append(f"no line of error in {stderr[-300:]!r}")
    if len(lines) > 1:
        found.append(f"{len(lines)} lines of error")
    if code == 0 and lines:
        found.append("an error with exit code 0")
    if code == 0 and case.output:
        expected = {path for path in leftovers if case.output in (path, *path.parents) and path.suffix != ".part"}
        leftovers = leftovers - expected
    if leftovers:
        found.append(f"leftover files {sorted(map(str, leftovers))[:5]}")
    return [f"{case.name}: {problem}" for problem in found]


@pytest.fixture
def run_case(run_cli, directory):
    """Returns a function that runs a case in this process and returns its exit code and stderr."""

    def run(case: Case) -> tuple[object, str]:
        try:
            with time_limit(SECONDS_PER_CASE):
                code, _, stderr = run_cli(case.command, case.arguments, cwd=directory)
                return code, stderr
        except TooLongError:
            return f"none after {SECONDS_PER_CASE} s", ""
        except Exception as error:
            return f"none but {type(error).__name__}: {error}"[:500], ""

    return run


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Working directory of the commands, also for temporary files; without network access."""
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIT_JAX_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.timeout(0)  # pytest-timeout uses the same timer as `time_limit`
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", NUM_CASES)
def test_commands_reject_damaged_input_in_one_line(kind, every, directory, run_case):
    found, num_rejected = [], 0
    numbers = range(0, NUM_CASES[kind], every)
    for number in numbers:
        case = make_case(kind, number, directory)
        before = listing(directory)
        code, stderr = run_case(case)
        found += [f"{number}: {problem}" for problem in problems_of(case, code, stderr, listing(directory) - before)]
        num_rejected += code in (1, 2)
    assert not found, "\n".join(found)
    assert not (directory / "executed").exists()
    assert num_rejected >= 0.6 * len(numbers)


@pytest.mark.slow
def test_subprocesses_reject_damaged_input_in_one_line(directory, run_command):
    every = [(kind, number) for kind, count in NUM_CASES.items() for number in range(count)]
    found, num_rejected = [], 0
    for i in np.random.default_rng(7).permutation(len(every))[:20]:
        case = make_case(*every[i], directory)
        before = listing(directory)
        command = ["train.py"] if case.command == "train" else ["-m", case.command]
        result = run_command(*command, *case.arguments, timeout=60)
        found += problems_of(case, result.returncode, result.stderr, listing(directory) - before)
        num_rejected += result.returncode in (1, 2)
    assert not found, "\n".join(found)
    assert not (directory / "executed").exists()
    assert num_rejected >= 12
