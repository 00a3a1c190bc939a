"""What a user can do wrong, in real processes: one line on stderr, an exit code, nothing half-written."""

import io
import tarfile

import numpy as np
import pytest
import reference
from flax.traverse_util import unflatten_dict
from PIL import Image

from vit_jax import pretrained

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 1, "num_heads": 3, "mlp_dim": 40}


@pytest.fixture
def train(tmp_path, run_command):
    """Runs the digits recipe from scratch with overrides; checks what every failure has in common."""

    def run(*overrides: str, code: int, recipe: str = "configs/digits.py:scratch", env: dict | None = None) -> str:
        workdir = tmp_path / "run"
        result = run_command("train.py", "--config", recipe, "--workdir", workdir, *overrides, env=env)
        assert result.returncode == code, result.stderr
        (line,) = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
        assert line.startswith("error: ")
        assert not workdir.exists()
        return line

    return run


@pytest.fixture
def npz(tmp_path):
    """A file of the released layout of another size than the recipe's."""
    shapes = reference.released_shapes(**SIZES, representation_size=None, num_classes=3, num_tokens=17)
    flat = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    path = tmp_path / "file.npz"
    pretrained.save_npz(path, unflatten_dict(flat, sep="/"))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes, four pictures each, in both splits."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            target = tmp_path / "pictures" / split / name
            target.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(target / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.batch_sise=3"], 'Did you mean "batch_size"'),
        (["--config.optimizer.momentun=3"], 'Did you mean "momentum"'),
        (["--config.batch_size=many"], "many"),
        (["--config.learning_rate=quick"], "quick"),
        (["--config.batch_size=0"], "config.batch_size is 0; expected a whole number of at least 1"),
        (["--config.num_steps=-5"], "config.num_steps is -5; expected a whole number of at least 0"),
        (["--config.image_size=18"], "config.image_size 18 is not a multiple of the patch, 4 pixels"),
        (["--config.trainable=everything"], "no mode 'everything'; modes are full, head"),
        (["--config.trainable=('haed/.*',)"], "'haed/.*' matches no parameter"),
        (["--config.trainable=lora", "--config.lora.targets=('.*/querry/.*',)"], "config.lora.targets: '.*/querry/.*'"),
        (["--config.features=cached"], "config.features is 'cached', but trainable 'full' trains more than the head"),
        (["--config.accumulation_steps=3"], "config.batch_size 64 does not divide into 3 accumulation_steps"),
        (["--config.mesh.fsdp=4"], "mesh: data 0 × fsdp 4 does not fit 1 devices"),
        (
            ["--config.model.num_layers=100000"],
            "100000; expected a whole number of at least 1, at most",
        ),
        (["--config.remat=all"], "config.remat is 'all'; expected one of none, dots, full"),
        (["--config.ema_decay=1"], "config.ema_decay is 1"),
        (["--process_id=1"], "--coordinator, --num_processes and --process_id belong together"),
        (["--config.dataset.name=cifar11"], "unknown dataset 'cifar11'; known are cifar10"),
        (["--config.dataset.train_split=train[:x]"], "cannot read split 'train[:x]'"),
        (["--config.architecture=vgg"], "config.architecture is 'vgg'; expected one of vit"),
        (["--config.pretrained=imagenet21k/ViT-B_17"], "imagenet21k/ViT-B_16"),
        (["--workdri=x"], "workdri"),
        (["again"], "unexpected again"),
        (["--flagfile=nowhere"], "Unable to open flagfile"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistyped_words_exit_2(train, overrides, message):
    assert message in train(*overrides, code=2)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("configs/digits.py:tune", "configs/digits.py takes finetune or scratch, got 'tune'"),
        ("configs/nothing.py", "configs/nothing.py"),
    ],
)
def test_a_mistyped_recipe_exits_2(train, recipe, message):
    assert message in train(code=2, recipe=recipe)


def test_train_without_a_recipe_exits_2(run_command):
    result = run_command("train.py")
    assert result.returncode == 2
    assert result.stderr == "error: --config is missing: give a recipe, such as --config configs/digits.py\n"


def test_a_missing_npz(train, tmp_path):
    assert "does not exist" in train(f"--config.pretrained={tmp_path}/no.npz", code=1)


def test_an_npz_of_another_variant(train, npz):
    line = train(f"--config.pretrained={npz}", code=2)
    assert f"config.model does not fit {npz}" in line
    assert "hidden_size 96 (file: 24), num_layers 4 (file: 1)" in line


def test_an_npz_for_pictures_that_are_no_squares(train, npz):
    params = pretrained.load_npz(npz)
    params["Transformer"]["posembed_input"]["pos_embedding"] = np.ones((1, 19, 24), np.float32)
    pretrained.save_npz(npz, params)
    assert "of 18 patches, which is not a square" in train(
        f"--config.pretrained={npz}", "--config.model.hidden_size=24", "--config.model.num_layers=1",
        "--config.model.num_heads=3", "--config.model.mlp_dim=40", code=1,
    )  # fmt: skip


def test_a_truncated_npz(train, npz):
    npz.write_bytes(npz.read_bytes()[:-1000])
    assert "is truncated" in train(f"--config.pretrained={npz}", code=1)


def test_a_damaged_npz(train, npz):
    content = bytearray(npz.read_bytes())
    content[len(content) // 2] ^= 0xFF
    npz.write_bytes(content)
    assert "is damaged at " in train(f"--config.pretrained={npz}", code=1)


def test_an_html_page_saved_as_npz(train, npz):
    npz.write_text("<!DOCTYPE html><html><body>404</body></html>")
    assert "is not an .npz file but an HTML page" in train(f"--config.pretrained={npz}", code=1)


def test_pickled_objects_are_never_unpickled(train, npz, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    np.savez(npz, cls=np.array([Evil()], dtype=object))
    assert "holds Python objects" in train(f"--config.pretrained={npz}", code=1)
    assert not (tmp_path / "executed").exists()


def test_a_file_of_something_else(train, npz):
    np.savez(npz, weights=np.ones(3))
    line = train(f"--config.pretrained={npz}", code=1)
    assert str(npz) in line and "it is not a ViT file, for it holds weights" in line


def test_no_network(train, tmp_path):
    env = {"VIT_JAX_CACHE": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"}
    line = train("--config.pretrained=imagenet21k/ViT-B_16", code=1, env=env)
    assert "cannot fetch https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz" in line
    assert f"download it by hand and put it at {tmp_path}/cache/imagenet21k/ViT-B_16.npz" in line


def test_a_missing_dataset_directory(train, tmp_path):
    assert "no such directory" in train(f"--config.dataset.name=folder:{tmp_path}/nothing", code=1)
    line = train("--config.dataset.name=cifar10", f"--config.dataset.data_dir={tmp_path}/nothing", code=1)
    assert "no such file or folder" in line


def test_an_empty_class_folder(train, folder):
    (folder / "train" / "fox").mkdir()
    assert f"class folder {folder}/train/fox has no pictures" in train(f"--config.dataset.name=folder:{folder}", code=1)


def test_a_corrupt_picture_is_named_before_training(train, folder):
    picture = folder / "test" / "dog" / "2.png"
    picture.write_bytes(picture.read_bytes()[:60])
    assert f"picture {picture} cannot be decoded" in train(f"--config.dataset.name=folder:{folder}", code=1)


def test_test_classes_unlike_train_classes(train, folder):
    (folder / "test" / "dog").rename(folder / "test" / "dogs")
    line = train(f"--config.dataset.name=folder:{folder}", code=1)
    assert "dog (only in train), dogs (only in test)" in line


def test_a_truncated_cifar_archive(train, tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        content = np.random.default_rng(0).bytes(30730)
        info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    archive.write_bytes(archive.read_bytes()[:-5000])
    line = train("--config.dataset.name=cifar10", f"--config.dataset.data_dir={archive}", code=1)
    assert "is truncated or damaged" in line


def test_an_unwritable_workdir(run_command, tmp_path):
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / "run"
    result = run_command("train.py", "--config", "configs/digits.py:scratch", "--workdir", workdir)
    assert result.returncode == 1
    assert result.stderr == f"error: cannot write to --workdir {workdir}: Not a directory; give another\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: --workdir"),
        (["--workdir", "x", "--stp", "3"], 2, "unrecognized arguments: --stp 3"),
        (["--workdir", "x", "--step", "last"], 2, "invalid int value: 'last'"),
        (["--workdir", "{tmp}"], 1, "holds no run"),
    ],
)
def test_evaluate_says_what_is_wrong(run_command, tmp_path, arguments, code, message):
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    result = run_command("-m", "vit_jax.evaluate", *arguments)
    assert result.returncode == code
    assert message in result.stderr and result.stderr.count("\n") == 1
