"""Commands and examples of the README and the docs."""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import ROOT
from flax.traverse_util import unflatten_dict
from PIL import Image

import train
import vit_jax
from vit_jax import data, pretrained
from vit_jax.config import check_config

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())


def commands(text: str = TEXT) -> list[list[str]]:
    """Returns the Python commands of a text, each as the arguments after `.venv/bin/python`."""
    blocks = "\n".join(block for kind, block in re.findall(r"```(\w*)\n(.*?)```", text, re.S) if not kind)
    blocks = blocks.replace("\\\n", " ")
    prefix = ".venv/bin/python "
    return [shlex.split(line.removeprefix(prefix)) for line in blocks.splitlines() if line.startswith(prefix)]


def command_with(*words: str) -> list[str]:
    """Returns the first command that contains every word."""
    return next(command for command in commands() if all(any(word in arg for arg in command) for word in words))


def scripts(text: str = TEXT) -> list[str]:
    """Returns the Python examples of a text."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_pages_link_to_existing_files(page):
    for name in re.findall(r"(?<![\w/])(?:configs|benchmarks|notebooks|tests|vit_jax)/[\w/]+\.\w+", PAGES[page]):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page]):
        assert (page.parent / link).exists(), link


def test_configs_page_lists_every_config():
    for path in (ROOT / "configs").glob("*.py"):
        if path.stem not in ("__init__", "base", "models"):
            assert f"`configs/{path.name}" in PAGES[ROOT / "docs/configs.md"], path.name


def test_configs_page_lists_every_key(run_cli):
    assert f"```text\n{run_cli('vit_jax.config', []).stdout}```" in PAGES[ROOT / "docs/configs.md"]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # raised by ml_collections
@pytest.mark.parametrize(
    "argv",
    [command[1:] for command in commands() if command[0] == "train.py" and "$" not in " ".join(command)],
    ids=str,
)
def test_documented_train_commands_are_valid(argv):
    check_config(train.parse_flags(argv).config)


def test_readme_and_index_link_to_every_page():
    for name in {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}:
        assert f"(docs/{name})" in PAGES[ROOT / "README.md"], name
        assert f"({name})" in PAGES[ROOT / "docs/README.md"], name


def test_site_has_every_page():
    site = (ROOT / "docs/mkdocs.yml").read_text()
    for path in PAGES:
        assert f"{path.relative_to(ROOT)}\n" in site, path.name


def test_api_page_lists_public_api():
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (.+)", PAGES[ROOT / "docs/api.md"], re.M)}
    public = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", vit_jax.__doc__)}
    assert public - {"npz"} <= listed


def test_readme_is_short():
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= 200


@pytest.fixture(scope="module")
def vit_b16_npz(tmp_path_factory) -> Path:
    """Path of a ViT-B/16 checkpoint in the original format, with random values."""
    shapes = reference.released_shapes(
        **reference.B_16, representation_size=768, num_classes=21843, num_tokens=1 + 14 * 14
    )
    rng = np.random.default_rng(0)
    flat = {key: 0.02 * rng.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}
    path = tmp_path_factory.mktemp("checkpoints") / "ViT-B_16.npz"
    pretrained.save_npz(path, unflatten_dict(flat, sep="/"))
    return path


@pytest.fixture
def cifar100_archive(tmp_path) -> Path:
    """Path of a CIFAR-100 archive whose images are noise."""
    rng = np.random.default_rng(0)
    names = "".join(f"class{i:02}\n" for i in range(100)).encode()
    files = {"fine_label_names.txt": names, "coarse_label_names.txt": names}
    for name, number in (("train.bin", 40), ("test.bin", 8)):
        records = rng.integers(0, 256, (number, 3074)).astype(np.uint8)
        records[:, :2] = rng.integers(0, 20, (number, 2))
        files[name] = records.tobytes()
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


FEW_STEPS = ["--config.num_steps=1", "--config.batch_size=2", "--config.warmup_steps=0", "--config.dtype=float32"]


@pytest.mark.slow
def test_train_fine_tunes_vit_b16(run_command, vit_b16_npz, cifar100_archive, tmp_path):
    command = [
        word.replace("/data/ViT-B_16.npz", str(vit_b16_npz)).replace(
            "/data/cifar-100-binary.tar.gz", str(cifar100_archive)
        )
        for word in command_with("cifar100.py", "data_dir")
    ]
    result = run_command(*command, *FEW_STEPS, "--workdir", tmp_path / "run", timeout=600)
    assert result.returncode == 0, result.stderr
    assert "dropped    pre_logits/…" in result.stdout
    assert "85,875,556" in result.stdout
    assert "test accuracy" in result.stdout


def test_dry_run_downloads_nothing(run_command, tmp_path):
    result = run_command(*command_with("--dry_run"), env={"VIT_JAX_CACHE": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert "76,900  of 85,875,556" in result.stdout
    assert "memory per device" in result.stdout


@pytest.mark.slow
def test_train_accepts_image_directory(run_command, vit_b16_npz, tmp_path):
    rng = np.random.default_rng(0)
    for split, name, size in [("train", "cat", 40), ("train", "dog", 50), ("test", "cat", 60), ("test", "dog", 70)]:
        directory = tmp_path / "images" / split / name
        directory.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (size, size + i, 3)).astype(np.uint8)).save(directory / f"{i}.jpg")
    (command,) = [command for command in commands() if "configs/own_images.py" in command]
    command = [word.replace("folder:photos", f"folder:{tmp_path}/images") for word in command]
    command += ["--workdir", str(tmp_path / "run")]
    result = run_command(*command, f"--config.pretrained={vit_b16_npz}", *FEW_STEPS, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "4 training and 4 test images of 224 × 224 pixels, 2 classes" in result.stdout


@pytest.mark.slow
def test_your_own_images_in_five_minutes(run_command, tmp_path):
    """Photographs of different sizes: random parts of the two sample photographs of scikit-learn."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(40):
            height, width = rng.integers(60, 200, 2)
            top, left = (int(rng.integers(0, limit)) for limit in np.subtract(photograph.shape[:2], (height, width)))
            part = Image.fromarray(photograph[top : top + height, left : left + width])
            part.save(tmp_path / "photos" / name / f"{i:02}.jpg", quality=95)
    page = PAGES[ROOT / "docs/data.md"]
    (section,) = re.findall(r"## Your own images in five minutes\n(.*?)\n## ", page, re.S)
    assert commands(section)[0] == command_with("folder:photos")  # the first one, in the README
    table = tmp_path / "photos.csv"
    table.write_text("path,label\n" + "\n".join(f"{p},{p.parent.name}" for p in tmp_path.glob("photos/*/*.jpg")))
    outputs = []
    for command in commands(section):
        words = [re.sub(r"(?<![\w.])(runs|photos)(?=/|$)", rf"{tmp_path}/\1", word) for word in command]
        if words[0] == "train.py":
            words += ["--workdir", f"{tmp_path}/runs/own_images-micro"]  # its default, below another directory
        result = run_command(*words)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout.replace(f"{tmp_path}/", ""))
    (printed,) = re.findall(r"```text\n(folder:photos: .*?)```", section, re.S)
    assert printed in outputs[0]
    accuracy = re.search(r"test/accuracy +([\d.]+)", outputs[1])
    assert accuracy and float(accuracy[1]) >= 14 / 16  # guessing reaches it in 0.2% of cases
    assert re.search(r"flower +[\d.]+%", outputs[2])
    folder, listed = (
        data.load_dataset(name, image_size=32, split_seed=3) for name in (f"folder:{tmp_path}/photos", f"csv:{table}")
    )
    assert len(folder.test) == len(listed.test) == 16 and folder.class_names == listed.class_names


@pytest.mark.slow
def test_train_reaches_documented_accuracy_on_digits(run_command, tmp_path):
    accuracies = {}
    for config in ("configs/digits.py", "configs/digits.py:scratch"):
        workdir = tmp_path / config.rpartition("/")[2]
        result = run_command("train.py", "--config", config, "--workdir", workdir, timeout=600)
        assert result.returncode == 0, result.stderr
        if config == "configs/digits.py":
            (printed,) = re.findall(r"```text\n(digits: .*?)```", PAGES[ROOT / "docs/quickstart.md"], re.S)
            assert printed in result.stdout
        evaluation = [
            word.replace("runs/digits", str(workdir)) for word in command_with("vit_jax.evaluate", "runs/digits")
        ]
        result = run_command(*evaluation, "--json")
        assert result.returncode == 0, result.stderr
        accuracies[config] = json.loads(result.stdout.splitlines()[-1])["test/accuracy"]
    (script,) = [script for script in scripts() if "LogisticRegression" in script]
    result = run_command("-c", script.replace("runs/digits", str(tmp_path / "digits.py")))
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[-1]) >= 0.95
    run_inference_examples(run_command, tmp_path / "digits.py", tmp_path)
    assert (tmp_path / "digits.py/report.html").exists()
    assert accuracies["configs/digits.py"] >= 0.95
    assert accuracies["configs/digits.py"] >= accuracies["configs/digits.py:scratch"] + 0.02


def run_inference_examples(run_command, workdir, directory):
    """Runs every documented command and example of prediction and export on a run."""
    (directory / "DIR").mkdir()
    for name in ("IMAGE.png", "DIR/a.jpg", "b.jpg"):
        Image.fromarray(np.full((9, 7, 3), 200, np.uint8)).save(directory / name)
    paths = {
        "runs/digits": workdir,
        "IMAGE": directory / "IMAGE.png",
        "DIR": directory / "DIR",
        "*.jpg": directory / "*.jpg",
    }
    used = [
        command
        for command in commands(PAGES[ROOT / "docs/inference.md"])
        if "runs/digits" in command and {"vit_jax.predict", "vit_jax.export"} & set(command)
    ]
    assert len(used) == 6
    for command in used:
        argv = [str(paths.get(word, directory / word if word.startswith("digits") else word)) for word in command]
        result = run_command(*argv)
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) == (3 if "--top" in argv else 1)
    examples = [script for script in scripts() if "probabilities" in script or "deserialize" in script]
    assert len(examples) == 2
    for script in examples:
        script = script.replace("runs/digits", str(workdir)).replace(
            "digits_stablehlo", f"{directory}/digits_stablehlo"
        )
        result = run_command("-c", script)
        assert result.returncode == 0, result.stderr


def test_train_and_evaluate_accepts_arrays(run_command, tmp_path):
    (script,) = [script for script in scripts() if "Dataset(" in script]
    result = run_command("-c", script.replace("runs/arrays", str(tmp_path / "run")))
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"[\d.]+%", result.stdout.splitlines()[-1])


def test_predict_and_evaluate_accept_checkpoint_name(run_command, tmp_path):
    """A small checkpoint with random values is in the cache, under the name of a released one."""
    shapes = reference.released_shapes(
        patch_size=8,
        hidden_size=24,
        num_layers=1,
        num_heads=3,
        mlp_dim=40,
        representation_size=None,
        num_classes=1000,
        num_tokens=1 + 4,
    )
    rng = np.random.default_rng(0)
    flat = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    (tmp_path / "imagenet21k+imagenet2012").mkdir()
    pretrained.save_npz(tmp_path / "imagenet21k+imagenet2012/ViT-B_16.npz", unflatten_dict(flat, sep="/"))
    for split in ("train", "test"):
        for name in ("tench", "n01443537"):
            (tmp_path / "DIR" / split / name).mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(
                tmp_path / "DIR" / split / name / "0.png"
            )
    paths = {"IMAGE": str(tmp_path / "DIR/test/tench/0.png"), "folder:DIR": f"folder:{tmp_path}/DIR"}
    outputs = []
    for verb in ("vit_jax.predict", "vit_jax.evaluate"):
        command = [paths.get(word, word) for word in command_with(verb, "imagenet21k+imagenet2012")]
        result = run_command(*command, env={"VIT_JAX_CACHE": str(tmp_path)})
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0].count("%") == 5
    assert "images                    2" in outputs[1] and "test/accuracy" in outputs[1]


def test_micro_checkpoint_matches_its_config():
    from configs import cifar10_micro

    params = pretrained.load_npz(pretrained.resolve("micro"))
    _, sizes = pretrained.infer_sizes(params)
    config = cifar10_micro.get_config()
    assert {key: sizes[key] for key in config.model if key in sizes} == {
        key: value for key, value in config.model.items() if key in sizes
    }
    assert params["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 1 + (config.image_size // 4) ** 2, 96)
    assert pretrained.resolve("micro").stat().st_size <= 3 * 2**20


@pytest.mark.slow
def test_train_learns_on_cifar10_with_config_of_micro_checkpoint(run_command, cifar10_archive, tmp_path):
    overrides = ["--config.num_steps=60", "--config.warmup_steps=10", "--config.dataset.test_split=test[:1000]"]
    workdir = tmp_path / "run"
    (config,) = [command for command in commands() if command[-1] == "configs/cifar10_micro.py"]
    command = [*config, *overrides, f"--config.dataset.data_dir={cifar10_archive}"]
    result = run_command(*command, "--workdir", workdir, timeout=600)
    assert result.returncode == 0, result.stderr
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test/accuracy"] > 0.2  # twice chance after 60 steps
