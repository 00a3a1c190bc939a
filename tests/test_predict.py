"""`predict` on pictures of all kinds, in real processes."""

import json
import subprocess

import numpy as np
import pytest
from conftest import ROOT, command_env, command_line
from PIL import Image
from sklearn.datasets import load_sample_image

import vit_jax
from configs import digits
from vit_jax import data, evaluate, predict, pretrained, trainer
from vit_jax.run import load_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = digits.get_config()
    config.update(num_steps=20, warmup_steps=5, eval_every_steps=20, checkpoint_every_steps=20)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    trainer.train_and_evaluate(config, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(workdir, tmp_path_factory):
    """Real digits as files of every kind; one is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    images = load_run(workdir).load_test_split().images
    (folder / "more").mkdir()
    rgb = [Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR) for image in images[:6]]
    rgb[0].save(folder / "a_rgb.png")
    rgb[1].convert("L").save(folder / "b_grey.png")
    rgb[2].convert("RGBA").save(folder / "c_alpha.png")
    rgb[3].quantize(256).save(folder / "d_palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    rgb[4].rotate(90, expand=True).save(folder / "e_turned.png", exif=exif)
    rgb[5].resize((160, 160), Image.Resampling.NEAREST).save(folder / "more" / "f_large.webp", lossless=True)
    (folder / "more" / "notes.txt").write_text("no picture")
    wanted = vit_jax.load(workdir).predict(np.stack([np.asarray(image) for image in rgb]))
    return folder, wanted


def answers(result):
    """path -> {class: probability} of the JSON lines."""
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {line["picture"]: {entry["name"]: entry["probability"] for entry in line["classes"]} for line in lines}


def test_a_folder_of_pictures_of_every_kind(workdir, pictures, run_command):
    folder, wanted = pictures
    result = run_command("-m", "vit_jax.predict", "--workdir", workdir, folder, "--json", "--top", 10)
    assert result.returncode == 0, result.stderr
    found = answers(result)
    assert [path.rpartition("/")[2][0] for path in found] == list("abcdef")
    for (path, probabilities), row in zip(found.items(), wanted, strict=True):
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        close = 0.02 if "large" in path else 1e-5
        assert [probabilities[str(i)] for i in range(10)] == pytest.approx(list(row), abs=close), path


def test_the_best_classes_in_words(workdir, pictures, run_command):
    folder, wanted = pictures
    result = run_command("-m", "vit_jax.predict", "--workdir", workdir, folder / "a_rgb.png", "--top", 2)
    assert result.returncode == 0, result.stderr
    first, second = np.argsort(-wanted[0])[:2]
    said = f"{folder / 'a_rgb.png'}  {first} {wanted[0][first]:.1%}  {second} {wanted[0][second]:.1%}"
    assert result.stdout.splitlines() == [said]


def test_patterns_and_a_list_on_stdin(workdir, pictures):
    folder, _ = pictures
    command = command_line("-m", "vit_jax.predict", "--workdir", workdir, f"{folder}/**/*.png", "-", "--json")
    given = f"{folder / 'more/f_large.webp'}\n\n"
    result = subprocess.run(
        command, input=given, cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert [path.rpartition("/")[2][0] for path in answers(result)] == list("abcdef")


def test_a_bad_file_is_reported_and_the_rest_goes_on(workdir, pictures, run_command, tmp_path):
    folder, _ = pictures
    torn = tmp_path / "torn.png"
    torn.write_bytes((folder / "a_rgb.png").read_bytes()[:60])
    words = [folder / "a_rgb.png", folder / "more/notes.txt", torn, tmp_path / "nowhere.jpg", folder / "b_grey.png"]
    result = run_command("-m", "vit_jax.predict", "--workdir", workdir, *words, "--json")
    assert result.returncode == 1
    assert [path.rpartition("/")[2][0] for path in answers(result)] == list("ab")
    *each, last = result.stderr.splitlines()
    assert len(each) == 3 and all(line.startswith("error: image ") for line in each)
    assert last == "error: 3 of 5 pictures could not be read, see above; the others were answered"


@pytest.mark.parametrize("exported", [True, False])
def test_the_first_answer_comes_soon_and_needs_no_large_package(workdir, pictures, run_command, exported):
    source, large = workdir, {"matplotlib", "sklearn", "tensorflow", "tensorflow_datasets", "tensorboardX"}
    if exported:  # only a run's folder is read by Orbax
        source, large = "micro", large | {"orbax"}
    words = ["--workdir", str(source), str(pictures[0] / "a_rgb.png")]
    code = (
        f"import sys, time; from vit_jax import predict; predict.main({words}); "
        "print(time.process_time(), *sys.modules, sep='\\n')"
    )
    result = run_command("-c", code)
    assert result.returncode == 0, result.stderr
    _, seconds, *modules = result.stdout.splitlines()
    assert float(seconds) < 6  # of both cores together, so that it does not matter what else runs
    assert "jax" in modules and not large & set(modules)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a.png", "--top", "0"], 2, "--top is 0; expected at least 1"),
        ([], 2, "the following arguments are required: PICTURE"),
        (["benchmarks"], 1, "benchmarks names no picture"),
        (["nowhere/*.png"], 1, "nowhere/*.png names no picture"),
        (["a.png"], 1, "image a.png: no such file"),
        (["configs/base.py"], 1, "image configs/base.py cannot be decoded (not an image)"),
        (["a.png", "--workdir", "configs"], 1, "configs is a folder without parameters"),
        (["a.png", "--workdir", "imagenet22k"], 2, "no pretrained file 'imagenet22k'"),
    ],
)
def test_what_cannot_be_answered_is_one_line(workdir, run_command, words, code, message):
    result = run_command("-m", "vit_jax.predict", "--workdir", workdir, *words)
    assert result.returncode == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_head_that_was_never_trained_is_refused(run_command, tmp_path):
    params = pretrained.load_npz(pretrained.resolve("micro"))
    params["head"]["kernel"] *= 0
    pretrained.save_npz(tmp_path / "zero.npz", params)
    result = run_command("-m", "vit_jax.predict", "--workdir", tmp_path / "zero.npz", "a.png")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: {tmp_path / 'zero.npz'} has a head of zeros, which says nothing; fine-tune the model first"
    ]


@pytest.mark.parametrize("size", [(60, 60), (180, 180), (48, 70), (24, 24)])
def test_every_way_to_predict_sees_the_same_pixels(tmp_path, size):
    """Arrays, files, datasets in memory and streamed; larger and smaller than the model's 32 pixels."""
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
        results = evaluate.evaluate_split(classifier, split, batch_size=4)
        assert results["test/loss"] == pytest.approx(expected, abs=1e-4)
    exported = [np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR), int) for path in paths]
    decoded = [np.asarray(data.decode_image(path, size=(32, 32)), int) for path in paths]
    assert np.abs(np.stack(exported) - np.stack(decoded)).max() <= 1  # Hugging Face's preprocessor resizes in one call
