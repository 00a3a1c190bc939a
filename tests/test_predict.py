import json
import subprocess

import numpy as np
import pytest
from conftest import ROOT, command_env, command_line
from PIL import Image
from sklearn.datasets import load_sample_image

import vit_jax
from vit_jax import data, predict, pretrained
from vit_jax.run import load_run


@pytest.fixture(scope="module")
def workdir(finished_run):
    return finished_run


@pytest.fixture(scope="module")
def image_files(workdir, tmp_path_factory):
    """Directory of real digits in all image formats and one text file, and the expected probabilities."""
    directory = tmp_path_factory.mktemp("images")
    images = load_run(workdir).load_test_split().images
    (directory / "more").mkdir()
    rgb = [Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR) for image in images[:6]]
    rgb[0].save(directory / "a_rgb.png")
    rgb[1].convert("L").save(directory / "b_grey.png")
    rgb[2].convert("RGBA").save(directory / "c_alpha.png")
    rgb[3].quantize(256).save(directory / "d_palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    rgb[4].rotate(90, expand=True).save(directory / "e_rotated.png", exif=exif)
    rgb[5].resize((160, 160), Image.Resampling.NEAREST).save(directory / "more" / "f_large.webp", lossless=True)
    (directory / "more" / "notes.txt").write_text("not an image")
    expected = vit_jax.load(workdir).predict(np.stack([np.asarray(image) for image in rgb]))
    return directory, expected


def predictions(result):
    """Returns path -> {class: probability} from the JSON output."""
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {line["image"]: {entry["name"]: entry["probability"] for entry in line["classes"]} for line in lines}


def test_main_classifies_directory_of_all_image_formats(workdir, image_files, run_command):
    directory, expected = image_files
    result = run_command("-m", "vit_jax.predict", "--workdir", workdir, directory, "--json", "--top", 10)
    assert result.returncode == 0, result.stderr
    predicted = predictions(result)
    assert [path.rpartition("/")[2][0] for path in predicted] == list("abcdef")
    for (path, probabilities), row in zip(predicted.items(), expected, strict=True):
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        close = 0.02 if "large" in path else 1e-5
        assert [probabilities[str(i)] for i in range(10)] == pytest.approx(list(row), abs=close), path


def test_main_prints_top_classes(workdir, image_files, run_command):
    directory, expected = image_files
    result = run_command("-m", "vit_jax.predict", "--workdir", workdir, directory / "a_rgb.png", "--top", 2)
    assert result.returncode == 0, result.stderr
    first, second = np.argsort(-expected[0])[:2]
    line = f"{directory / 'a_rgb.png'}  {first} {expected[0][first]:.1%}  {second} {expected[0][second]:.1%}"
    assert result.stdout.splitlines() == [line]


def test_main_accepts_patterns_and_paths_on_stdin(workdir, image_files):
    directory, _ = image_files
    command = command_line("-m", "vit_jax.predict", "--workdir", workdir, f"{directory}/**/*.png", "-", "--json")
    given = f"{directory / 'more/f_large.webp'}\n\n"
    result = subprocess.run(
        command, input=given, cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert [path.rpartition("/")[2][0] for path in predictions(result)] == list("abcdef")


def test_main_reports_unreadable_files_and_classifies_others(workdir, image_files, run_command, tmp_path):
    directory, _ = image_files
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes((directory / "a_rgb.png").read_bytes()[:60])
    unreadable = [directory / "more/notes.txt", truncated, tmp_path / "nowhere.jpg"]
    paths = [directory / "a_rgb.png", *unreadable, directory / "b_grey.png"]
    result = run_command("-m", "vit_jax.predict", "--workdir", workdir, *paths, "--json")
    assert result.returncode == 1
    assert [path.rpartition("/")[2][0] for path in predictions(result)] == list("ab")
    *each, last = result.stderr.splitlines()
    assert len(each) == 3 and all(line.startswith("error: image ") for line in each)
    assert last == "error: 3 of 5 images could not be read"


def test_predict_files_keeps_batch_size(image_files, monkeypatch):
    """Seven files, one of them unreadable, in batches of three: incomplete batches are padded."""
    directory, _ = image_files
    classifier, sizes = vit_jax.load("micro"), []
    paths = [*sorted(map(str, directory.glob("*.png"))), "nowhere.png", str(directory / "more/f_large.webp")]
    expected = dict(predict.predict_files(classifier, paths))
    monkeypatch.setattr(predict, "_BATCH_SIZE", 3)

    def spy(self, images, *, batch_size):
        sizes.append((len(images), batch_size))
        return call(self, images, batch_size=batch_size)

    call = type(classifier).predict
    monkeypatch.setattr(type(classifier), "predict", spy)
    batched = dict(predict.predict_files(classifier, paths))
    assert list(batched) == paths and sizes == [(3, 3)] * 3
    assert "no such file" in str(batched.pop("nowhere.png"))
    for path, probabilities in batched.items():
        np.testing.assert_allclose(probabilities, expected[path], atol=1e-5)


@pytest.mark.parametrize("exported", [True, False])
def test_main_starts_quickly_without_large_packages(workdir, image_files, run_command, exported):
    source, large = workdir, {"matplotlib", "sklearn", "tensorflow", "tensorflow_datasets", "tensorboardX"}
    if exported:  # only run directories are read with Orbax
        source, large = "micro", large | {"orbax"}
    argv = ["--workdir", str(source), str(image_files[0] / "a_rgb.png")]
    code = (
        f"import sys, time; from vit_jax import predict; predict.main({argv}); "
        "print(time.process_time(), *sys.modules, sep='\\n')"
    )
    result = run_command("-c", code)
    assert result.returncode == 0, result.stderr
    _, seconds, *modules = result.stdout.splitlines()
    assert float(seconds) < 6  # CPU time of all threads, which does not depend on other processes
    assert "jax" in modules and not large & set(modules)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["a.png", "--top", "0"], 2, "--top is 0; expected at least 1"),
        (["a.png", "--step", "7"], 1, "has no checkpoint of step 7; it has 20"),
        (["a.png", "--model", "micro", "--step", "7"], 2, "micro is not a run directory; step and EMA apply only"),
        ([], 2, "the following arguments are required: IMAGE"),
        (["benchmarks"], 1, "no images found in benchmarks"),
        (["nowhere/*.png"], 1, "no images found in nowhere/*.png"),
        (["a.png"], 1, "image a.png: no such file"),
        (["configs/base.py"], 1, "image configs/base.py cannot be decoded (not an image that Pillow can read)"),
        (["a.png", "--workdir", "configs"], 1, "configs is neither a run directory nor an orbax or safetensors export"),
        (["a.png", "--model", "micro", "--workdir", "runs/x"], 2, "not allowed with argument"),
        (["a.png", "--model", "imagenet22k"], 2, "there is no file imagenet22k"),
    ],
)
def test_main_reports_errors_in_one_line(workdir, run_cli, argv, code, message):
    source = [] if "--model" in argv else ["--workdir", workdir]
    result = run_cli("vit_jax.predict", [*source, *argv])
    assert result.code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("size", [(60, 60), (180, 180), (48, 70), (24, 24)])
def test_predict_files_matches_arrays_and_datasets(tmp_path, size):
    """Arrays, files, and datasets in memory and streamed, with images larger and smaller than 32 pixels."""
    photo = Image.fromarray(load_sample_image("china.jpg"))
    rng = np.random.default_rng(0)
    for name in vit_jax.load("micro").class_names:
        (tmp_path / "test" / name).mkdir(parents=True)
        left, top = rng.integers(0, 200, 2)
        photo.crop((left, top, left + size[0], top + size[1])).save(tmp_path / "test" / name / "0.png")
    paths = sorted(map(str, tmp_path.glob("test/*/*.png")))

    classifier = vit_jax.load("micro")
    arrays = classifier.predict(np.stack([np.asarray(Image.open(path)) for path in paths]))
    files = np.stack([probabilities for _, probabilities in predict.predict_files(classifier, paths)])
    np.testing.assert_allclose(files, arrays, atol=1e-4)
    expected = -np.log(arrays[np.arange(10), np.arange(10)]).mean()
    for device_bytes in (None, 1):  # in memory; streamed
        split, _ = data.load_split(f"folder:{tmp_path}", split="test", image_size=32, device_bytes=device_bytes)
        assert split.in_memory == (device_bytes is None)
        results = classifier.evaluate(split, batch_size=4)
        assert results["test/loss"] == pytest.approx(expected, abs=1e-4)
    exported = [np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR), int) for path in paths]
    decoded = [np.asarray(data.decode_image(path, size=(32, 32)), int) for path in paths]
    assert np.abs(np.stack(exported) - np.stack(decoded)).max() <= 1  # Hugging Face's preprocessor resizes in one call


def test_main_rejects_untrained_head(run_cli, tmp_path):
    params = pretrained.load_npz(pretrained.resolve("micro"))
    params["head"]["kernel"] *= 0
    pretrained.save_npz(tmp_path / "zero.npz", params)
    result = run_cli("vit_jax.predict", ["--model", tmp_path / "zero.npz", "a.png"])
    assert result.code == 1
    assert result.stderr.splitlines() == [
        f"error: {tmp_path / 'zero.npz'} has an untrained (all-zero) head; fine-tune it first"
    ]
