import io
import struct
import zlib

import numpy as np
import pytest
from image_files import load_folder, write_image, write_image_dir
from PIL import Image

from vit_jax.data import images
from vit_jax.runtime import progress
from vit_jax.runtime.errors import UserError


@pytest.fixture
def image_dir(tmp_path):
    return write_image_dir(tmp_path / "pets")


def test_encoded_images_support_array_indexing(image_dir):
    decoded, encoded = load_folder(image_dir).train.images, load_folder(image_dir, storage="stream").train.images
    for rows in (1, -1, slice(1, 3), np.array([2, 0, 2]), np.array([True, False, True, False])):
        np.testing.assert_array_equal(encoded[rows], decoded[rows])
    np.testing.assert_array_equal(encoded.take(np.array([3, 1]))[np.array([1])], decoded[[1]])


def test_decode_image_crops_and_resizes(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cropped = images.decode_image(tmp_path / "a.png", size=(2, 2), sample_box=lambda height, width: (1, 2, 2, 2))
    np.testing.assert_array_equal(cropped, pixels[1:3, 2:4])
    shifted = images.decode_image(
        tmp_path / "a.png", size=(4, 4), sample_box=lambda height, width: (-1, 2, 4, 4), margin_color=(9, 8, 7)
    )
    np.testing.assert_array_equal(np.asarray(shifted)[1:, :2], pixels[:3, 2:])
    assert np.unique(np.asarray(shifted)[:1].reshape(-1, 3), axis=0).tolist() == [[9, 8, 7]]
    assert np.unique(np.asarray(shifted)[:, 2:].reshape(-1, 3), axis=0).tolist() == [[9, 8, 7]]


def test_decode_image_crops_after_exif_orientation(tmp_path):
    left_half = np.zeros((400, 800, 3), np.uint8)
    left_half[:, :400] = 200
    Image.fromarray(left_half).save(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: the left half becomes the top
    Image.fromarray(left_half).save(tmp_path / "rotated.jpg", exif=exif)
    sizes = []

    def right_half(height, width):
        sizes.append((height, width))
        return 0, width / 2, height, width / 2

    assert np.asarray(images.decode_image(tmp_path / "a.jpg", size=(8, 8), sample_box=right_half)).max() < 10
    rotated = np.asarray(images.decode_image(tmp_path / "rotated.jpg", size=(8, 8), sample_box=right_half))
    assert rotated[:3].min() > 190 and rotated[5:].max() < 10
    assert sizes == [(400, 800), (800, 400)]


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("L", 7, [7, 7, 7]),
        ("1", 1, [255, 255, 255]),
        ("I;16", 0x1234, [0x12, 0x12, 0x12]),
        ("LA", (9, 255), [9, 9, 9]),
        ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 0), [255, 255, 255]),  # transparent pixels become white
    ],
)
def test_decode_image_converts_any_mode_to_rgb(tmp_path, mode, color, rgb):
    image = images.decode_image(write_image(tmp_path / "0.png", mode=mode, color=color))
    assert image.mode == "RGB"
    assert np.asarray(image)[0, 0].tolist() == rgb


def test_decode_image_reads_transparent_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "0.png", transparency=bytes([255, 0]))
    assert np.asarray(images.decode_image(tmp_path / "0.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_decode_image_reads_cmyk(tmp_path):
    path = write_image(tmp_path / "0.jpg", mode="CMYK", color=(0, 0, 0, 0))
    assert np.asarray(images.decode_image(path))[0, 0].tolist() == [255, 255, 255]


def test_decode_image_applies_exif_orientation(tmp_path):
    image = Image.new("RGB", (2, 1), (0, 0, 0))
    image.putpixel((1, 0), (255, 255, 255))  # black, white
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: black above white
    image.save(tmp_path / "0.png", exif=exif)
    assert np.asarray(images.decode_image(tmp_path / "0.png"))[..., 0].tolist() == [[0], [255]]


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".tif", ".webp", ".avif"])
def test_decode_image_reads_format(tmp_path, suffix):
    if suffix not in images.IMAGE_SUFFIXES:
        pytest.skip(f"this Pillow does not read {suffix}")
    path = write_image(tmp_path / f"0{suffix}", size=(8, 6), color=(250, 0, 0))
    pixels = np.asarray(images.decode_image(path)).astype(int)
    assert pixels.shape == (6, 8, 3) and abs(pixels - (250, 0, 0)).max() <= 8
    assert images.read_size(path) == (8, 6)


def test_decode_image_reads_heic(tmp_path):
    pytest.importorskip("pillow_heif", reason="needs the extra heif").register_heif_opener()
    path = write_image(tmp_path / "0.heic", size=(64, 32), color=(250, 0, 0))
    assert images.decode_image(path).size == images.read_size(path) == (64, 32)


def test_decode_image_reads_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(images.decode_image(tmp_path / "0.gif"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("pixels", "expected"), [([0.0, 0.5, 1.0, -1.0], [0, 127, 255, 0]), ([0, 128, 300, 2], None)])
def test_decode_image_reads_floating_point_grey(tmp_path, pixels, expected):
    """From 0 to 1, or from 0 to 255."""
    Image.fromarray(np.array([pixels], np.float32)).save(tmp_path / "0.tif")
    decoded = np.asarray(images.decode_image(tmp_path / "0.tif"))
    assert decoded[0, :, 0].tolist() == (expected or [0, 128, 255, 2])


def test_decode_image_reads_lab(tmp_path):
    write_image(tmp_path / "0.tif", mode="LAB", color=(255, 128, 128))
    assert np.asarray(images.decode_image(tmp_path / "0.tif"))[0, 0].min() >= 250  # white


def test_decode_image_applies_orientation_of_tif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "0.tif", size=(6, 4), exif=exif)
    assert images.decode_image(tmp_path / "0.tif").size == images.read_size(tmp_path / "0.tif") == (4, 6)


def test_check_image_finds_truncated_pixels(tmp_path):
    path = write_image(tmp_path / "0.jpg", size=(64, 64))
    images.check_image(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(images.ImageError, match="cannot be decoded"):
        images.check_image(path)


def test_damaged_images_error_lists_the_first_20():
    errors = [images.ImageError(f"{i}.png", "truncated") for i in range(23)]
    message = str(images.DamagedImagesError(errors))
    assert message.startswith("23 images cannot be decoded: 0.png (truncated), 1.png (truncated), ")
    assert "19.png (truncated) and 3 more; replace or remove them" in message and "20.png" not in message


def test_decode_image_reads_file_object():
    file = io.BytesIO()
    Image.new("RGB", (2, 3)).save(file, "png")
    file.seek(0)
    assert images.decode_image(file).size == (2, 3)


def test_decode_image_antialiases_when_downsampling(tmp_path):
    checkered = np.indices((64, 64)).sum(axis=0) % 2 * 255
    Image.fromarray(checkered.astype(np.uint8)).save(tmp_path / "0.png")
    pixels = np.asarray(images.decode_image(tmp_path / "0.png", size=(4, 4)))
    np.testing.assert_allclose(pixels[1:3, 1:3], 127.5, atol=2)


def test_decode_image_matches_full_decode_when_downsampling_jpeg(tmp_path):
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    Image.fromarray(np.tile(ramp, (1024, 1))).save(tmp_path / "0.jpg", quality=95)
    direct = images.decode_image(tmp_path / "0.jpg").resize((16, 16), Image.Resampling.BILINEAR)
    pixels = np.asarray(images.decode_image(tmp_path / "0.jpg", size=(16, 16)))
    np.testing.assert_allclose(pixels.astype(int), np.asarray(direct), atol=2)


def test_decode_image_rejects_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"0.png: no such file"):
        images.decode_image(tmp_path / "0.png")


def test_decode_image_rejects_truncated_file(tmp_path):
    path = write_image(tmp_path / "0.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"0.jpg cannot be decoded \(.*[Tt]runcated.*\); replace or remove it"):
        images.decode_image(path)


def test_decode_image_applies_orientation_from_xmp_and_trailing_exif(tmp_path):
    """With the orientation applied, the image is 8 pixels high and 4 wide, and its upper half is white."""
    stored = np.zeros((4, 8, 3), np.uint8)
    stored[:, :4] = 255  # orientation 6 rotates by 90 degrees clockwise: the left half becomes the top
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(stored).save(tmp_path / "xmp.webp", lossless=True, xmp=xmp)
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "png")
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png = buffer.getvalue()
    (tmp_path / "late.png").write_bytes(png[:-12] + chunk + png[-12:])  # before the last chunk, IEND
    for name in ("xmp.webp", "late.png"):
        assert images.read_size(tmp_path / name) == (4, 8), name
        decoded = np.asarray(images.decode_image(tmp_path / name, size=(4, 8)))
        assert decoded[:4].min() == 255 and decoded[4:].max() == 0, name


def test_decode_all_rejects_non_image_file(image_dir):
    (image_dir / "train" / "cat" / "0.png").write_text("hello")
    with pytest.raises(UserError, match=r"cat/0.png cannot be decoded \(not an image .*\); replace or remove"):
        load_folder(image_dir)


def test_decode_all_names_all_truncated_images(image_dir):
    for name in ("cat", "dog"):
        path = write_image(image_dir / "train" / name / "1.png", size=(4, 4))
        path.write_bytes(path.read_bytes()[:50])  # the header is complete, the pixel data is truncated
    with pytest.raises(UserError, match=r"2 images cannot be decoded: .*cat/1.png \(.*\), .*dog/1.png \(.*\); replace"):
        load_folder(image_dir)


def test_decode_all_shows_progress_only_after_delay(image_dir, monkeypatch, capfd):
    load_folder(image_dir)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0)
    load_folder(image_dir)
    out, err = capfd.readouterr()
    assert "decoding" in err and "0/4" in err
    assert out == ""
