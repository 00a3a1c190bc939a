"""A file with a head answers without training; a dataset's classes are found among the model's."""

import json

import numpy as np
import pytest
import reference
from flax.traverse_util import unflatten_dict
from PIL import Image

import vit_jax
from configs import digits
from vit_jax import evaluate, pretrained, trainer
from vit_jax.runtime.errors import UsageError, UserError

SIZES = {"patch_size": 8, "hidden_size": 12, "num_layers": 1, "num_heads": 2, "mlp_dim": 8}
NUMBERS_AND_LABELS = {"n02099601": 207, "n01440764": 0, "n11939491": 985}  # golden retriever, tench, daisy


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A micro ViT with a head of 1,000, as the files that were fine-tuned on ImageNet have it."""
    shapes = reference.released_shapes(**SIZES, representation_size=None, num_classes=1000, num_tokens=5)
    rng = np.random.default_rng(0)
    flat = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    path = tmp_path_factory.mktemp("files") / "ViT-micro_8.npz"
    pretrained.save_npz(path, unflatten_dict(flat, sep="/"))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of three of ImageNet's classes, in folders of WordNet's numbers: six, eight and ten of them."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(2)
    for count, number in zip((6, 8, 10), NUMBERS_AND_LABELS, strict=True):
        (root / "val" / number).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(root / f"val/{number}/{i}.png")
    return root


def expected(file, folder):
    """Accuracy and loss among all 1,000 classes, in float64."""
    params = pretrained.load_npz(file)
    hits, losses = [], []
    for number, label in NUMBERS_AND_LABELS.items():
        images = np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "val" / number).iterdir())])
        logits = reference.forward(params, images / 127.5 - 1)
        hits += list(logits.argmax(axis=-1) == label)
        losses += list(np.log(np.exp(logits).sum(axis=-1)) - logits[:, label])
    return np.mean(hits), np.mean(losses)


def test_a_file_is_evaluated_on_some_of_its_classes(file, folder, run_command):
    result = run_command(
        *("-m", "vit_jax.evaluate", "--workdir", file, "--dataset", f"folder:{folder}", "--test_split", "val", "--json")
    )
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout.splitlines()[-1])
    accuracy, loss = expected(file, folder)
    assert (results["images"], results["classes"]) == (24, 3)
    assert results["test/accuracy"] == pytest.approx(accuracy)
    assert results["test/loss"] == pytest.approx(loss, rel=1e-4)


def test_labels_are_those_of_the_models_columns(file, folder, capsys):
    """A head that says "golden retriever" whatever it sees is right six times of 24."""
    params = pretrained.load_npz(file)
    params["head"]["bias"][207] = 1e4
    pretrained.save_npz(file.with_name("retriever.npz"), params)
    flags = ["--dataset", f"folder:{folder}", "--test_split", "val"]
    assert evaluate.main(["--workdir", str(file.with_name("retriever.npz")), *flags]) == 0
    assert "test/accuracy         0.2500" in capsys.readouterr().out.splitlines()


def test_imagenettes_classes_are_where_they_are_in_imagenet():
    """By its own names and by WordNet's numbers, in an order of their own."""
    known = [name for _, name in pretrained.imagenet_classes()]
    numbers = ["n03888257", "n01440764", "n02102040", "n02979186", "n03000684", "n03028079"]
    assert list(evaluate.match_classes(numbers, known)) == [701, 0, 217, 482, 491, 497]
    assert list(evaluate.match_classes(["French_horn", "garbage truck", "golf ball"], known)) == [566, 569, 574]
    numbers = [number for number, _ in pretrained.imagenet_classes()]
    assert list(evaluate.match_classes(["daisy", "n01443537"], numbers)) == [985, 1]


def test_other_classes_are_matched_by_name():
    assert list(evaluate.match_classes(["b", "a"], ["a", "B", "b"])) == [2, 0]
    with pytest.raises(UserError, match="lacks 2 of the dataset's 3 classes: cat, dog; it has 2, such as a, b"):
        evaluate.match_classes(["cat", "a", "dog"], ["a", "b"])


def test_a_file_of_imagenets_names_what_it_sees(file, folder, run_command):
    picture = folder / "val/n01440764/0.png"
    result = run_command("-m", "vit_jax.predict", "--workdir", file, "--top", "1", picture)
    assert result.returncode == 0, result.stderr
    logits = reference.forward(pretrained.load_npz(file), np.asarray(Image.open(picture))[None] / 127.5 - 1)
    assert pretrained.imagenet_classes()[logits.argmax()][1] in result.stdout
    assert vit_jax.load(file).image_size == 16


def test_a_run_on_a_dataset_that_is_named_is_what_it_is_on_its_own(tmp_path, capsys):
    config = digits.get_config()
    config.update(num_steps=2, warmup_steps=0, learning_rate=0.1, trainable="head")
    config.dataset.update(train_split="train[:64]", test_split="test[:50]")
    trainer.train_and_evaluate(config, tmp_path / "run")
    words = ["--workdir", str(tmp_path / "run"), "--json"]
    capsys.readouterr()
    assert evaluate.main(words) == 0
    own = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluate.main([*words, "--dataset", "digits", "--test_split", "test[:50]", "--step", "2"]) == 0
    named = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert own.pop("step") == 2
    assert (named.pop("images"), named.pop("classes")) == (50, 10)
    assert named == pytest.approx(own)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--workdir", "micro"], UserError, "micro has no checkpoints; give the --workdir of a run"),
        (["--workdir", "FILE"], UserError, "has no checkpoints; give the --workdir of a run"),
        (["--workdir", "a", "--test_split", "val"], UsageError, "--test_split requires --dataset"),
        (["--workdir", "FILE", "--dataset", "digits", "--step", "3"], UserError, "has no checkpoints"),
        (["--workdir", "FILE", "--dataset", "digits", "--batch_size", "0"], UsageError, "--batch_size is 0"),
        (["--workdir", "FILE", "--dataset", "digits"], UserError, "lacks 10 of the dataset's 10 classes: 0, 1"),
        (["--workdir", "nowhere"], UserError, "nowhere has no checkpoints"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(file, words, error, message):
    with pytest.raises(error, match=message):
        evaluate.main([str(file) if word == "FILE" else word for word in words])
