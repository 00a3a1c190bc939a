"""Evaluation of runs and checkpoints, also on datasets with a subset of the model's classes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import reference
from flax.traverse_util import unflatten_dict
from PIL import Image

import vit_jax
from configs import digits
from vit_jax import data, evaluate, pretrained, trainer
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training import calibration

SIZES = {"patch_size": 8, "hidden_size": 12, "num_layers": 1, "num_heads": 2, "mlp_dim": 8}
LABELS = {"n02099601": 207, "n01440764": 0, "n11939491": 985}  # golden retriever, tench, daisy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Path of a tiny ViT with 1,000 classes, like checkpoints fine-tuned on ImageNet."""
    shapes = reference.released_shapes(**SIZES, representation_size=None, num_classes=1000, num_tokens=5)
    rng = np.random.default_rng(0)
    flat = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    path = tmp_path_factory.mktemp("files") / "ViT-micro_8.npz"
    pretrained.save_npz(path, unflatten_dict(flat, sep="/"))
    return path


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory):
    """Images of three ImageNet classes, in directories named by WordNet ID: six, eight and ten images."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(2)
    for count, wordnet_id in zip((6, 8, 10), LABELS, strict=True):
        (root / "val" / wordnet_id).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(root / f"val/{wordnet_id}/{i}.png")
    return root


def expected(checkpoint, image_dir):
    """Returns accuracy and loss over all 1,000 classes, in float64."""
    params = pretrained.load_npz(checkpoint)
    hits, losses = [], []
    for wordnet_id, label in LABELS.items():
        images = np.stack([np.asarray(Image.open(path)) for path in sorted((image_dir / "val" / wordnet_id).iterdir())])
        logits = reference.forward(params, images / 127.5 - 1)
        hits += list(logits.argmax(axis=-1) == label)
        losses += list(np.log(np.exp(logits).sum(axis=-1)) - logits[:, label])
    return np.mean(hits), np.mean(losses)


def test_main_evaluates_checkpoint_on_subset_of_classes(checkpoint, image_dir, run_command):
    argv = ["--model", checkpoint, "--dataset", f"folder:{image_dir}", "--test_split", "val", "--json"]
    result = run_command("-m", "vit_jax.evaluate", *argv)
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout.splitlines()[-1])
    accuracy, loss = expected(checkpoint, image_dir)
    assert (results["images"], results["classes"]) == (24, 3)
    assert results["test/accuracy"] == pytest.approx(accuracy)
    assert results["test/loss"] == pytest.approx(loss, rel=1e-4)


def test_main_maps_labels_to_classes_of_model(checkpoint, image_dir, capsys):
    """A head that always predicts "golden retriever" is right for six of 24 images."""
    params = pretrained.load_npz(checkpoint)
    params["head"]["bias"][207] = 1e4
    pretrained.save_npz(checkpoint.with_name("retriever.npz"), params)
    flags = ["--dataset", f"folder:{image_dir}", "--test_split", "val"]
    assert evaluate.main(["--workdir", str(checkpoint.with_name("retriever.npz")), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "test/accuracy             0.2500" in lines
    header, *rows = (line.split() for line in lines[-4:])
    assert header == ["class", "precision", "recall", "F1", "images", "most", "frequent", "error"]
    assert ["golden", "retriever", "0.250", "1.000", "0.400", "6", "–"] in rows
    assert ["tench", "–", "0.000", "0.000", "8", "golden", "retriever", "(8)"] in rows


def test_match_classes_finds_imagenet_classes_by_name_or_wordnet_id():
    names = [name for _, name in pretrained.imagenet_classes()]
    wordnet_ids = ["n03888257", "n01440764", "n02102040", "n02979186", "n03000684", "n03028079"]
    assert list(evaluate.match_classes(wordnet_ids, names)) == [701, 0, 217, 482, 491, 497]
    assert list(evaluate.match_classes(["French_horn", "garbage truck", "golf ball"], names)) == [566, 569, 574]
    wordnet_ids = [wordnet_id for wordnet_id, _ in pretrained.imagenet_classes()]
    assert list(evaluate.match_classes(["daisy", "n01443537"], wordnet_ids)) == [985, 1]


def test_match_classes_matches_names_and_rejects_missing_classes():
    assert list(evaluate.match_classes(["b", "a"], ["a", "B", "b"])) == [2, 0]
    with pytest.raises(UserError, match="lacks 2 of the dataset's 3 classes: cat, dog; it has 2, such as a, b"):
        evaluate.match_classes(["cat", "a", "dog"], ["a", "b"])


def test_predict_prints_imagenet_class_names(checkpoint, image_dir, run_command):
    image = image_dir / "val/n01440764/0.png"
    result = run_command("-m", "vit_jax.predict", "--workdir", checkpoint, "--top", "1", image)
    assert result.returncode == 0, result.stderr
    logits = reference.forward(pretrained.load_npz(checkpoint), np.asarray(Image.open(image))[None] / 127.5 - 1)
    assert pretrained.imagenet_classes()[logits.argmax()][1] in result.stdout
    assert vit_jax.load(checkpoint).image_size == 16


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps on 64 handwritten digits, with 40 validation images and 50 test images."""
    config = digits.get_config()
    config.update(num_steps=2, warmup_steps=0, learning_rate=0.1, trainable="head")
    config.dataset.update(train_split="train[:64]", validation_split="train[64:104]", test_split="test[:50]")
    trainer.train_and_evaluate(config, path := tmp_path_factory.mktemp("runs") / "run")
    return path


def test_main_with_dataset_equals_main_without_dataset(workdir, capsys):
    argv = ["--workdir", str(workdir), "--json"]
    capsys.readouterr()
    assert evaluate.main(argv) == 0
    default = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluate.main([*argv, "--dataset", "digits", "--test_split", "test[:50]", "--step", "2"]) == 0
    explicit = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {key: last[key] for key in last if key.startswith("test/")}.items() <= default.items()
    assert default.pop("step") == 2
    assert (explicit["images"], explicit["classes"], default.pop("validation_images")) == (50, 10, 40)
    assert explicit.items() <= default.items()
    assert default.keys() - explicit.keys() == {"test/temperature", "test/ece_calibrated", "test/loss_calibrated"}


def test_main_fits_temperature_on_validation_images(workdir, capsys):
    assert evaluate.main(["--workdir", str(workdir), "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = vit_jax.load(workdir)
    validation = data.load_split("digits", split="train[64:104]", image_size=run.image_size)[0]
    logits = run.logits(validation.images)
    losses = {
        scale: calibration.cross_entropy(logits, validation.labels, temperature=results["test/temperature"] * scale)
        for scale in (0.99, 1, 1.01)
    }
    assert min(losses, key=losses.get) == 1


def test_main_writes_predictions(workdir, run_cli, tmp_path):
    result = run_cli("vit_jax.evaluate", ["--workdir", workdir, "--csv", tmp_path / "predictions.csv"])
    assert result.code == 0, result.stderr
    header, *rows = csv.reader((tmp_path / "predictions.csv").read_text().splitlines())
    assert header == ["image", "true", "predicted", *(f"p({i})" for i in range(10))]
    test = data.load_split("digits", split="test[:50]", image_size=16)[0]
    assert [row[:2] for row in rows] == [[str(i), str(label)] for i, label in enumerate(test.labels)]
    probabilities = np.array([row[3:] for row in rows], np.float32)
    np.testing.assert_array_equal(probabilities, vit_jax.load(workdir).predict(test.images, batch_size=256))
    assert [int(row[2]) for row in rows] == probabilities.argmax(axis=1).tolist()
    accuracy = np.mean([row[1] == row[2] for row in rows])
    assert f"test/accuracy             {accuracy:.4f}" in result.stdout.splitlines()


def test_main_evaluates_micro_on_cifar10(cifar10_archive, capsys):
    argv = ["--model", "micro", "--dataset", "cifar10", "--data_dir", str(cifar10_archive), "--json"]
    assert evaluate.main([*argv, "--test_split", "test[:200]"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["test/accuracy"] > 0.5


def test_main_writes_paths_of_image_files(checkpoint, image_dir, run_cli, tmp_path):
    flags = ["--dataset", f"folder:{image_dir}", "--test_split", "val", "--csv", tmp_path / "predictions.csv"]
    assert run_cli("vit_jax.evaluate", ["--model", checkpoint, *flags]).code == 0
    paths = [row[0] for row in csv.reader((tmp_path / "predictions.csv").read_text().splitlines())][1:]
    assert len(paths) == 24 and all(Path(path).is_file() for path in paths)


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        ([], UsageError, "one of the arguments --workdir --model is required"),
        (["--model", "micro"], UsageError, "micro is a checkpoint, not a run; give --dataset as well"),
        (["--workdir", "FILE"], UsageError, "is a checkpoint, not a run; give --dataset as well"),
        (["--workdir", "a", "--test_split", "val"], UsageError, "--test_split requires --dataset"),
        (
            ["--workdir", "FILE", "--dataset", "digits", "--step", "3"],
            UsageError,
            "is not a run directory; step and EMA apply only",
        ),
        (["--workdir", "FILE", "--dataset", "digits", "--batch_size", "0"], UsageError, "--batch_size is 0"),
        (["--workdir", "FILE", "--dataset", "digits"], UserError, "lacks 10 of the dataset's 10 classes: 0, 1"),
        (["--workdir", "nowhere"], UserError, "nowhere has no checkpoints"),
        (["--workdir", "nowhere", "--csv", "/missing/a.csv"], UsageError, "--csv: /missing is not a directory"),
    ],
)
def test_main_rejects_invalid_arguments(checkpoint, argv, error, message):
    with pytest.raises(error, match=message):
        evaluate.main([str(checkpoint) if argument == "FILE" else argument for argument in argv])
