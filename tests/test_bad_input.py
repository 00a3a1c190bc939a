"""User errors: one line on stderr, an exit code, and no partially written run directory."""

import io
import shutil
import tarfile
import time

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from vit_jax import pretrained


@pytest.fixture
def train(tmp_path, run_cli):
    """Returns a function that trains with invalid overrides, checks the outcome and returns the line of error."""

    def run(*overrides: str, code: int, config: str = "configs/digits.py:scratch", env: dict | None = None) -> str:
        workdir = tmp_path / "run"
        result = run_cli("train", ["--config", config, "--workdir", workdir, *overrides], env=env)
        assert result.code == code, result.stderr
        (line,) = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
        assert line.startswith("error: ")
        assert not workdir.exists()
        return line

    return run


@pytest.fixture
def npz(tmp_path, tiny_npz):
    """Path of a checkpoint in the original ViT format, whose sizes differ from the config's."""
    return shutil.copy(tiny_npz, tmp_path / "file.npz")


@pytest.fixture
def image_dir(tmp_path):
    """Directory with two classes of four images in both splits."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            target = tmp_path / "images" / split / name
            target.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(target / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("override", "code"),
    [("--config.batch_size=0", 2), ("--config.pretrained=nowhere/no.npz", 1)],
)
def test_train_exits_with_one_line_of_error(run_command, tmp_path, override, code):
    """Runs a subprocess; the other tests call `main`."""
    command = ["train.py", "--config", "configs/digits.py:scratch", "--workdir", tmp_path / "run", override]
    result = run_command(*command)
    assert result.returncode == code
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.batch_sise=3"], "did you mean batch_size?"),
        (["--config.optimizer.momentun=3"], "did you mean optimizer.momentum?"),
        (["--config.batch_size=many"], "config.batch_size is many; expected a positive integer"),
        (["--config.learning_rate=quick"], "config.learning_rate is quick; expected a non-negative number"),
        (["--config.batch_size=0"], "config.batch_size is 0; expected a positive integer"),
        (["--config.num_steps=-5"], "config.num_steps is -5; expected a non-negative integer"),
        (["--config.image_size=18"], "image_size is 18; expected a multiple of the patch, 4"),
        (["--config.trainable=everything"], "config.trainable is 'everything'; expected one of full, head"),
        (["--config.trainable=('haed/.*',)"], "'haed/.*' matches no parameter"),
        (
            ["--config.trainable=lora", "--config.lora.targets=('.*/querry/.*',)"],
            "lora.targets: '.*/querry/.*'",
        ),
        (["--config.features=cached"], "config.features is 'cached', but trainable 'full' trains more than the head"),
        (["--config.accumulation_steps=3"], "config.accumulation_steps is 3; it must divide batch_size 64"),
        (["--config.mesh.fsdp=3"], "mesh.fsdp is 3; expected a divisor of the number of devices, 8"),
        (
            ["--config.model.num_layers=100000"],
            "100000; expected a positive integer up to 65,536",
        ),
        (["--config.remat=all"], "config.remat is 'all'; expected one of none, dots, full"),
        (["--config.ema_decay=1"], "config.ema_decay is 1"),
        (["--process_id=1"], "--process_id 1; expected HOST:PORT of process 0"),
        (["--config.dataset.name=cifar11"], "unknown dataset 'cifar11'; expected one of cifar10"),
        (["--config.dataset.train_split=train[:x]"], "unknown split 'train[:x]'"),
        (["--config.architecture=vgg"], "config.architecture is 'vgg'; expected one of vit"),
        (["--config.pretrained=imagenet21k/ViT-B_17"], "imagenet21k/ViT-B_16"),
        (["--workdri=x"], "did you mean --workdir?"),
        (["again"], "unexpected again"),
        (["--flagfile=nowhere"], "Unable to open flagfile"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_train_rejects_invalid_arguments(train, overrides, message):
    assert message in train(*overrides, code=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("configs/digits.py:tune", "configs/digits.py takes finetune, scratch, got 'tune'"),
        ("configs/nothing.py", "configs/nothing.py"),
    ],
)
def test_train_rejects_unknown_config(train, config, message):
    assert message in train(code=2, config=config)


def test_train_requires_config(run_cli):
    result = run_cli("train", [])
    assert result.code == 2
    assert result.stderr == "error: --config is missing; give a config file, such as --config configs/digits.py\n"


def test_train_rejects_missing_npz(train, tmp_path):
    assert f"there is no file {tmp_path}/no.npz" in train(f"--config.pretrained={tmp_path}/no.npz", code=1)


def test_train_rejects_npz_of_other_size(train, npz):
    line = train(f"--config.pretrained={npz}", code=2)
    assert f"config.model does not match {npz}" in line
    assert "hidden_size 96 (checkpoint: 24), num_layers 4 (checkpoint: 1)" in line


def test_train_rejects_npz_with_non_square_grid(train, npz):
    params = pretrained.load_npz(npz)
    params["Transformer"]["posembed_input"]["pos_embedding"] = np.ones((1, 19, 24), np.float32)
    pretrained.save_npz(npz, params)
    sizes = [f"--config.model.{name}={value}" for name, value in TINY.items()]
    line = train(f"--config.pretrained={npz}", *sizes, code=1)
    assert "have 18 patches, but they are not a square; commands and configs need a square" in line


def test_train_rejects_run_directory_as_pretrained(train, tmp_path):
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    line = train(f"--config.pretrained={tmp_path / 'other'}", code=1)
    assert f"{tmp_path / 'other'} is a run directory; give an export of it (python -m vit_jax.export)" in line


def test_train_rejects_truncated_npz(train, npz):
    npz.write_bytes(npz.read_bytes()[:-1000])
    assert "is truncated" in train(f"--config.pretrained={npz}", code=1)


def test_train_rejects_damaged_npz(train, npz):
    content = bytearray(npz.read_bytes())
    content[len(content) // 2] ^= 0xFF
    npz.write_bytes(content)
    assert "is truncated, damaged or not an .npz file" in train(f"--config.pretrained={npz}", code=1)


def test_train_rejects_html_page_saved_as_npz(train, npz):
    npz.write_text("<!DOCTYPE html><html><body>404</body></html>")
    assert "not an .npz file: File is not a zip file" in train(f"--config.pretrained={npz}", code=1)


def test_train_does_not_unpickle_objects(train, npz, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    np.savez(npz, cls=np.array([Evil()], dtype=object))
    assert "Object arrays cannot be loaded" in train(f"--config.pretrained={npz}", code=1)
    assert not (tmp_path / "executed").exists()


def test_train_rejects_npz_of_unknown_model(train, npz):
    np.savez(npz, weights=np.ones(3))
    line = train(f"--config.pretrained={npz}", code=1)
    assert str(npz) in line and "these are not the parameters of a known model: found weights" in line


def test_train_reports_failed_download(train, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    env = {"VIT_JAX_CACHE": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"}
    line = train("--config.pretrained=imagenet21k/ViT-B_16", code=1, env=env)
    assert "cannot download https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz" in line
    assert f"download it manually to {tmp_path}/cache/imagenet21k/ViT-B_16.npz" in line


def test_train_rejects_missing_dataset_directory(train, tmp_path):
    assert "no such directory" in train(f"--config.dataset.name=folder:{tmp_path}/nothing", code=1)
    line = train("--config.dataset.name=cifar10", f"--config.dataset.data_dir={tmp_path}/nothing", code=1)
    assert "nothing is missing; set data_dir to cifar-10-binary.tar.gz" in line


def test_train_rejects_empty_class_directory(train, image_dir):
    (image_dir / "train" / "fox").mkdir()
    assert f"{image_dir}/train/fox: no images (.png, " in train(f"--config.dataset.name=folder:{image_dir}", code=1)


def test_train_rejects_corrupt_image_before_training(train, image_dir):
    image = image_dir / "test" / "dog" / "2.png"
    image.write_bytes(image.read_bytes()[:60])
    assert f"image {image} cannot be decoded" in train(f"--config.dataset.name=folder:{image_dir}", code=1)


def test_train_lists_all_damaged_images_in_workdir(run_cli, image_dir, tmp_path):
    for i in range(12):
        for name in ("cat", "dog"):
            (image_dir / "train" / name / f"bad{i}.png").write_bytes(b"x")
    argv = ["--config", "configs/digits.py:scratch", "--workdir", tmp_path / "run"]
    result = run_cli("train", [*argv, f"--config.dataset.name=folder:{image_dir}"])
    assert result.code == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: 24 images cannot be decoded: ") and "and 4 more" in result.stderr
    assert result.stderr.endswith(f"{tmp_path}/run/damaged.txt lists all\n")
    lines = (tmp_path / "run" / "damaged.txt").read_text().splitlines()
    assert len(lines) == 24 and lines[0] == f"{image_dir}/train/cat/bad0.png (not an image that Pillow can read)"


def test_train_rejects_overlapping_test_slice(train, image_dir):
    overrides = [f"--config.dataset.name=folder:{image_dir}", "--config.dataset.test_split=train[50%:]"]
    assert "train_split 'train' and test_split 'train[50%:]' overlap in 4 of 8 images" in train(*overrides, code=2)


def test_train_rejects_different_train_and_test_classes(train, image_dir):
    (image_dir / "test" / "dog").rename(image_dir / "test" / "dogs")
    line = train(f"--config.dataset.name=folder:{image_dir}", code=1)
    assert "dog (not in test), dogs (not in train)" in line


def test_train_rejects_truncated_cifar_archive(train, tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        content = np.random.default_rng(0).bytes(30730)
        info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    archive.write_bytes(archive.read_bytes()[:-5000])
    line = train("--config.dataset.name=cifar10", f"--config.dataset.data_dir={archive}", code=1)
    assert "is truncated or damaged" in line


def test_train_rejects_unwritable_workdir(run_cli, tmp_path):
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / "run"
    result = run_cli("train", ["--config", "configs/digits.py:scratch", "--workdir", workdir])
    assert result.code == 1
    assert result.stderr == f"error: cannot write to --workdir {workdir}: Not a directory; give another --workdir\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "one of the arguments --workdir --model is required"),
        (["--workdir", "x", "--stp", "3"], 2, "unrecognized arguments: --stp 3; did you mean --step?"),
        (["--workdir", "x", "--step", "last"], 2, "argument --step: got 'last'; expected a step of the run, or best"),
        (["--workdir", "{tmp}"], 1, "has no checkpoints"),
    ],
)
def test_evaluate_rejects_invalid_arguments(run_cli, tmp_path, arguments, code, message):
    result = run_cli("vit_jax.evaluate", [argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    assert result.code == code
    assert message in result.stderr and result.stderr.count("\n") == 1
