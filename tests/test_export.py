import dataclasses
import json
import stat
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import vit_jax
from configs import digits
from vit_jax import export, pretrained, trainer
from vit_jax.run import load_run
from vit_jax.runtime.errors import UserError
from vit_jax.training.experiment import create_model
from vit_jax.training.initialize import load_pretrained

FORMATS = ("npz", "orbax", "safetensors", "stablehlo")


@pytest.fixture(scope="module")
def workdir(lora_run):
    """A run with LoRA weights, whose EMA parameters differ from its parameters."""
    return lora_run


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    for name in FORMATS:
        assert export.main(["--workdir", str(workdir), "--format", name, "--out", str(directory / name)]) == 0
    return directory


@pytest.fixture(scope="module")
def images(workdir):
    return load_run(workdir).load_test_split().images


def logits_of(source, images):
    return vit_jax.load(source).logits(images)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_size", 20, r"image_size 20 instead of 16"),
        ("image_size", "16", "image_size is '16'; expected a positive integer"),
        ("image_mean", [127, 127, 127], r"image_mean is \(127, 127, 127\); expected three numbers from 0 to 1"),
        ("class_names", ["0"] * 9, r"number of class_names 9 instead of 10"),
        ("class_names", None, "class_names is None; expected strings"),
        ("architecture", "vgg", "architecture is 'vgg'; expected one of vit"),
        ("model", None, "model is None; expected constructor arguments"),
        ("dtype", "float16", "dtype is 'float16'; expected one of float32, bfloat16"),
        ("num_heads", 3, r"num_heads 3 instead of 4"),
    ],
)
def test_load_rejects_inconsistent_metadata(exported, tmp_path, key, value, message):
    metadata = pretrained.read_metadata(exported / "npz").to_json()
    (metadata["model"] if key in metadata["model"] else metadata)[key] = value
    path = tmp_path / "x.npz"
    write_with_comment(path, exported / "npz", metadata)
    with pytest.raises(UserError, match=f"x.npz.* metadata.*{message}"):
        vit_jax.load(path)
    with pytest.raises(UserError, match=f"x.npz.* metadata.*{message}"):
        load_pretrained(str(path))


def write_with_comment(path, exported, metadata):
    """Saves parameters with any metadata in the ZIP comment, as version 0.1 did."""
    pretrained.save_npz(path, pretrained.load_npz(exported))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = json.dumps(metadata).encode()


@pytest.mark.parametrize("name", ["npz", "orbax", "safetensors"])
def test_load_restores_exported_run_bit_exactly(workdir, exported, images, name):
    run, loaded = vit_jax.load(workdir), vit_jax.load(exported / name)
    expected, actual = flatten_dict(run.params), flatten_dict(loaded.params)
    assert expected.keys() == actual.keys()
    for key, leaf in expected.items():
        np.testing.assert_array_equal(leaf, actual[key])
    np.testing.assert_array_equal(run.logits(images), loaded.logits(images))
    assert loaded.class_names == run.class_names and loaded.image_size == 16
    assert (loaded.metadata.image_mean, loaded.metadata.image_std) == (run.metadata.image_mean, run.metadata.image_std)


@pytest.fixture(scope="module")
def bfloat16_workdir(tmp_path_factory):
    """A run that computes in bfloat16, with a nonzero head."""
    config = digits.get_config()
    config.ablation.head_init = "xavier"
    config.update(dtype="bfloat16", num_steps=0, warmup_steps=0)
    directory = tmp_path_factory.mktemp("bfloat16") / "digits"
    trainer.train_and_evaluate(config, directory)
    return directory


@pytest.mark.parametrize(
    "name", ["npz", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stablehlo", "orbax", "safetensors"))]
)
def test_main_keeps_compute_dtype(bfloat16_workdir, images, tmp_path, name):
    run, images = vit_jax.load(bfloat16_workdir), images[:8].repeat(2, axis=1).repeat(2, axis=2)
    params = jax.device_get(run.params)

    def forward(classifier):  # on one device: bfloat16 rounding depends on the compiled batch size
        return np.asarray(jax.jit(classifier.forward)(params, images))

    assert export.main(["--workdir", str(bfloat16_workdir), "--format", name, "--out", str(tmp_path / "out")]) == 0
    if name == "stablehlo":
        model = jax.export.deserialize(bytearray((tmp_path / "out/model.stablehlo").read_bytes()))
        logits = np.asarray(model.call(images))
    else:
        logits = forward(vit_jax.load(tmp_path / "out"))
        np.testing.assert_array_equal(logits_of(tmp_path / "out", images), run.logits(images))
    np.testing.assert_allclose(logits, forward(run), atol=1e-5)
    float32 = dataclasses.replace(run, model=run.model.clone(dtype="float32"))
    assert np.abs(logits - forward(float32)).max() > 1e-3


def test_load_defaults_to_float32_for_exports_without_dtype(exported, tmp_path):
    metadata = pretrained.read_metadata(exported / "npz").to_json()
    assert metadata.pop("dtype") == "float32"
    write_with_comment(tmp_path / "old.npz", exported / "npz", metadata)
    assert vit_jax.load(tmp_path / "old.npz").model.dtype == "float32"


def test_create_model_uses_dtype_of_config(bfloat16_workdir, tmp_path):
    export.export_npz(load_run(bfloat16_workdir), tmp_path / "bfloat16.npz")
    config = digits.get_config()
    config.update(pretrained=str(tmp_path / "bfloat16.npz"), dtype="float32")
    source = load_pretrained(config.pretrained)
    assert source.metadata.dtype == "bfloat16"
    assert create_model(config, source, num_classes=10).dtype == "float32"


def test_export_npz_keeps_original_keys_and_initializes_another_run(workdir, exported, tmp_path):
    flat = dict(np.load(exported / "npz"))
    assert flat.keys() == flatten_dict(pretrained.load_npz(pretrained.resolve("micro")), sep="/").keys()
    config = digits.get_config()
    config.update(pretrained=str(exported / "npz"), num_steps=0, warmup_steps=0)
    trainer.train_and_evaluate(config, tmp_path / "again")
    again = flatten_dict(jax.device_get(load_run(tmp_path / "again").params), sep="/")
    for key in flat.keys() - {"head/kernel", "head/bias"}:
        np.testing.assert_array_equal(again[key], flat[key])


def test_main_exports_ema_parameters_unless_no_ema(workdir, exported, images, tmp_path):
    argv = ["--workdir", str(workdir), "--format", "npz", "--no_ema", "--out", str(tmp_path / "raw.npz")]
    assert export.main(argv) == 0
    raw = load_run(workdir, use_ema=False)
    np.testing.assert_array_equal(logits_of(tmp_path / "raw.npz", images), raw.logits(images))
    assert np.abs(raw.logits(images) - logits_of(exported / "npz", images)).max() > 1e-3


@pytest.mark.parametrize("name", ["npz", "orbax", "safetensors"])
def test_main_converts_checkpoint(images, run_cli, tmp_path, name):
    result = run_cli("vit_jax.export", ["--model", "micro", "--format", name, "--out", tmp_path / "out"])
    assert result.code == 0, result.stderr
    np.testing.assert_array_equal(logits_of(tmp_path / "out", images[:4]), logits_of("micro", images[:4]))


def test_export_stablehlo_requires_only_jax_and_accepts_any_batch_size(workdir, exported, images, tmp_path):
    """Runs the documented lines in a process that cannot import this package, flax, optax or orbax."""
    np.save(tmp_path / "images.npy", np.asarray(jax.image.resize(images[:7], (7, 16, 16, 3), "nearest")))
    script = f"""
import sys
for name in ("vit_jax", "flax", "optax", "orbax"):
    sys.modules[name] = None
import jax.export, numpy as np
from pathlib import Path
model = jax.export.deserialize(bytearray(Path({str(exported / "stablehlo/model.stablehlo")!r}).read_bytes()))
images = np.load({str(tmp_path / "images.npy")!r})
logits = [np.asarray(model.call(images[:n])) for n in (1, 7)]
np.testing.assert_allclose(logits[0], logits[1][:1], atol=1e-5)
np.save({str(tmp_path / "logits.npy")!r}, logits[1])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    expected = vit_jax.load(workdir).logits(np.load(tmp_path / "images.npy"))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)


def test_load_rejects_stablehlo_export(exported):
    with pytest.raises(UserError, match="stablehlo is a StableHLO export, which only jax.export runs; give another"):
        vit_jax.load(exported / "stablehlo")


def test_main_exports_only_metadata_of_model(workdir, exported):
    metadata = load_run(workdir).metadata.to_json()
    assert metadata["vit_jax"] == vit_jax.__version__ and metadata["class_names"] == [str(i) for i in range(10)]
    assert pretrained.read_metadata(exported / "npz").to_json() == metadata
    for name in ("orbax", "stablehlo", "safetensors"):
        assert json.loads((exported / name / "metadata.json").read_text())["metadata"] == metadata
    assert not metadata.keys() & {"command", "config", "dataset"}
    modes = {path.name: path.stat().st_mode & stat.S_IROTH for path in (exported / "safetensors").iterdir()}
    assert all(modes.values()), modes
    config = json.loads((exported / "safetensors/config.json").read_text())
    assert (config["hidden_act"], config["layer_norm_eps"]) == ("gelu_pytorch_tanh", 1e-6)
    preprocessor = json.loads((exported / "safetensors/preprocessor_config.json").read_text())
    assert preprocessor["image_mean"] == preprocessor["image_std"] == [0.5, 0.5, 0.5]


def test_load_numbers_classes_without_names(images, tmp_path):
    pretrained.save_npz(tmp_path / "micro.npz", pretrained.load_npz(pretrained.resolve("micro")))
    micro = vit_jax.load(str(tmp_path / "micro.npz"))
    assert micro.image_size == 32 and micro.class_names == tuple(str(i) for i in range(10))
    assert micro.predict(images[:2]).shape == (2, 10)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--format", "onnx"], 2, "invalid choice: 'onnx'"),
        (["--format", "npz", "--step", "7"], 1, "has no checkpoint of step 7; it has 20"),
        (["--format", "npz", "--out", "setup.cfg"], 1, "--out setup.cfg already exists"),
        (["--format", "orbax", "--out", "nowhere/out"], 1, "cannot write nowhere/out: No such file or directory"),
        (["--format", "npz", "--workdir", "configs"], 1, "configs is neither a run directory nor an orbax"),
        (["--format", "npz", "--model", "micro", "--no_ema"], 2, "micro is not a run directory"),
    ],
)
def test_main_reports_errors_in_one_line(workdir, run_cli, tmp_path, argv, code, message):
    source = [] if "--model" in argv else ["--workdir", workdir]
    argv = [*source, "--out", tmp_path / "out", *argv]
    result = run_cli("vit_jax.export", argv)
    assert result.code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == []


def test_main_leaves_no_files_on_failure(workdir, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left on device"):
        export.main(["--workdir", str(workdir), "--format", "safetensors", "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
