"""ResNet (BiT): parameter names, logits against a float64 reference, training and checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_resnet as reference
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from reference_resnet import UNITS, WIDTH, flat_params, released_params, released_shapes

from configs import cifar100_resnet50, digits
from vit_jax import models, pretrained, trainer
from vit_jax.models import ResNet
from vit_jax.run import load_run
from vit_jax.runtime.errors import UsageError
from vit_jax.training import dry_run, initialize
from vit_jax.training.experiment import create_model

PARAMS = pretrained.to_original(released_params())


def random_images(*shape):
    return np.random.default_rng(1).uniform(-1, 1, (*shape, 3)).astype(np.float32)


# ---- parameters and logits


@pytest.mark.parametrize(("num_classes", "num_params"), [(21843, 68_256_659), (1000, 25_549_352)])
def test_resnet_parameters_match_checkpoint_except_head(num_classes, num_params):
    """Parameter counts are those of timm for BiT-M and BiT-S R50x1, 68.3 and 25.5 million."""
    tree = jax.eval_shape(ResNet(num_classes).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    actual = {key: leaf.shape for key, leaf in flatten_dict(tree, sep="/").items()}
    assert sum(map(np.prod, actual.values())) == num_params
    expected = released_shapes((3, 4, 6, 3), 64, num_classes)
    assert actual.pop("head/kernel") == expected.pop("resnet/head/conv2d/kernel")[2:]
    assert actual.pop("head/bias") == expected.pop("resnet/head/conv2d/bias")
    assert actual == expected


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 40, 24), (1, 7, 7)])
def test_resnet_matches_reference_in_float64(shape):
    """Float64 agreement to ten digits also detects a different epsilon, which float32 hides."""
    images, params = random_images(*shape), released_params()
    for kernel in (leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4):
        kernel[..., ::4] *= 1e-5  # nearly constant channels, for which the epsilon of weight standardization matters
    with jax.enable_x64(True):
        params64 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), pretrained.to_original(params))
        logits = jax.jit(ResNet(7, UNITS, WIDTH, dtype=jnp.float64).apply)({"params": params64}, jnp.float64(images))
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, reference.forward(params, images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-4), (jnp.bfloat16, 0.05)])
def test_resnet_approximates_reference_in_lower_precision(dtype, tolerance):
    images = random_images(3, 32, 32)
    expected = reference.forward(released_params(), images)
    logits = jax.jit(ResNet(7, UNITS, WIDTH, dtype=dtype).apply)({"params": PARAMS}, images)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=tolerance * np.abs(expected).max())


def test_resnet_computes_all_submodules_in_bfloat16():
    model = ResNet(7, UNITS, WIDTH, dtype=jnp.bfloat16)

    def apply(images):
        variables = model.init(jax.random.key(0), images)
        return variables, model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])

    variables, (_, state) = jax.eval_shape(apply, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    outputs = flatten_dict(state["intermediates"], sep="/")
    inner = [key for key in outputs if key not in ("__call__", "head/__call__") and "GroupNorm_0" not in key]
    assert len(inner) > 25
    for key in inner:
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs[key])} == {jnp.dtype("bfloat16")}, key


def test_resnet_starts_with_zero_logits_and_has_gradients_for_all_parameters():
    images, model = random_images(2, 32, 32), ResNet(7, UNITS, WIDTH)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]

    def loss(params):
        logits = model.apply({"params": params}, images)
        return jnp.sum(jnp.sin(3 + logits)), logits

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    assert not np.any(gradient(params)[1])
    params["head"]["kernel"] = np.random.default_rng(2).normal(size=params["head"]["kernel"].shape)
    for key, leaf in flatten_dict(gradient(params)[0], sep="/").items():
        assert np.all(np.isfinite(leaf)) and np.mean(np.asarray(leaf) != 0) > 0.4, key


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_resnet_gradients_match_with_remat(remat):
    images = random_images(2, 16, 16)

    def gradient(model):
        return jax.jit(jax.grad(lambda params: jnp.sum(model.apply({"params": params}, images) ** 2)))(PARAMS)

    actual, expected = gradient(ResNet(7, UNITS, WIDTH, remat=remat)), gradient(ResNet(7, UNITS, WIDTH))
    for actual_leaf, expected_leaf in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual_leaf, expected_leaf, rtol=1e-3, atol=1e-4 * np.abs(expected_leaf).max())


# ---- training


def create_config(*, model=None, **changes):
    config = digits.get_config("scratch")
    config.architecture = "resnet50"
    config.model = ConfigDict(model or {"units": (1, 1), "width": WIDTH})
    config.dataset.train_split, config.dataset.test_split = "train[:320]", "test[:80]"
    config.update(num_steps=5, warmup_steps=0, log_every_steps=5, eval_every_steps=5, checkpoint_every_steps=5)
    for key, value in changes.items():
        config[key] = ConfigDict(config[key].to_dict() | value) if isinstance(value, dict) else value
    return config


@pytest.mark.parametrize(
    ("trainable", "updated", "mesh"),
    [
        pytest.param("full", ("",), {}, marks=pytest.mark.slow),
        ("head", ("head/",), {}),
        pytest.param(("resnet/block2/.*", "head/.*"), ("resnet/block2/", "head/"), {"fsdp": 8}, marks=pytest.mark.slow),
    ],
)
def test_train_and_evaluate_updates_only_trainable_resnet_parameters(tmp_path, trainable, updated, mesh):
    pretrained.save_npz(tmp_path / "BiT.npz", released_params(units=(1, 1)))
    config = create_config(pretrained=str(tmp_path / "BiT.npz"), trainable=trainable, mesh=mesh)
    results = trainer.train_and_evaluate(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.model == ResNet(10, (1, 1), WIDTH)
    assert run.evaluate() == pytest.approx(results, abs=1e-5)
    before = flatten_dict(released_params(units=(1, 1)), sep="/")
    for key, leaf in flatten_dict(run.params, sep="/").items():
        changed = np.any(leaf) if key.startswith("head/") else not np.array_equal(leaf, before[key])
        assert changed == key.startswith(updated), key


def test_train_and_evaluate_learns_with_resnet_from_scratch(tmp_path):
    model = {"units": (1,), "width": WIDTH}
    config = create_config(model=model, num_steps=40, eval_every_steps=40, log_every_steps=10, learning_rate=0.003)
    config.dataset.train_split = "train"
    results = trainer.train_and_evaluate(config, tmp_path)
    losses = [json.loads(line).get("train/loss") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > losses[3] and results["test/accuracy"] > 0.5  # chance: 0.1


@pytest.mark.parametrize("trainable", ["full", "head"])
def test_dry_run_prints_parameter_count_and_memory_of_resnet(capsys, trainable):
    dry_run.dry_run(create_config(trainable=trainable))
    out = capsys.readouterr().out
    num_params = sum(map(np.prod, released_shapes((1, 1), WIDTH, 10).values()))
    assert f"of {num_params:,}\n" in out and "memory per device" in out
    assert ("as cached features" in out) == (trainable == "head")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"units": UNITS, "width": 48}}, "model.width is 48; expected a multiple of 32"),
        ({"model": {"units": (3, 0)}}, "model.units is (3, 0); expected a tuple of positive"),
        ({"model": {"units": 50}}, "model.units is 50; expected a tuple of positive"),
        ({"model": {"patch_size": 4}}, "model.patch_size: ResNet has no such argument"),
        ({"architecture": "resnet"}, "config.architecture is 'resnet'; expected one of vit, resnet50"),
        ({"trainable": "mlp"}, "'.*/MlpBlock_3/.*' matches no parameter"),
        ({"trainable": ("resnet/head/.*",)}, "'resnet/head/.*' matches no parameter"),
        ({"trainable": "lora"}, "lora.targets: '.*/query/kernel' matches no parameter"),
        ({"optimizer": {"layer_decay": 0.9}}, "layer_decay is only defined for a VisionTransformer"),
    ],
)
def test_train_and_evaluate_rejects_options_unsupported_by_resnet(tmp_path, changes, message):
    with pytest.raises(UsageError) as caught:
        trainer.train_and_evaluate(create_config(**changes), tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("arg", ["scratch", "pretrained", "head"])
def test_create_model_returns_resnet50_for_config(arg):
    config = cifar100_resnet50.get_config(arg)
    config.dtype = "bfloat16"
    assert create_model(config, None, num_classes=100) == ResNet(100, dtype=jnp.bfloat16)
    assert not initialize.needs_pretrained(config.model, config.architecture)
    assert config.pretrained in ("", *pretrained.RELEASED)


# ---- checkpoints


@pytest.fixture
def write(tmp_path):
    """Function that saves flat parameters and returns the path of the file."""

    def save(flat):
        pretrained.save_npz(tmp_path / "BiT-micro.npz", unflatten_dict(flat, sep="/"))
        return str(tmp_path / "BiT-micro.npz")

    return save


def create_model_from(file, architecture="resnet50", **sizes):
    source = initialize.load_pretrained(file)
    arguments = initialize.model_arguments(sizes, architecture, source)
    return models.create_model(architecture, arguments, num_classes=10)


def test_to_original_converts_only_head():
    before, after = released_params(), pretrained.to_original(released_params())
    np.testing.assert_array_equal(after["head"]["kernel"], before["resnet"]["head"]["conv2d"]["kernel"][0, 0])
    np.testing.assert_array_equal(after["head"]["bias"], before["resnet"]["head"]["conv2d"]["bias"])
    del before["resnet"]["head"]
    jax.tree.map(np.testing.assert_array_equal, after["resnet"], before["resnet"])
    jax.tree.map(np.testing.assert_array_equal, pretrained.to_original(after), after)


def test_create_params_loads_resnet_checkpoint_except_head(write, capsys):
    flat = flat_params()
    file = write(flat)
    model = create_model_from(file)
    assert (model.units, model.width) == (UNITS, WIDTH)
    params = initialize.create_params(model, initialize.load_pretrained(file), image_size=32, seed=0)
    params = flatten_dict(params, sep="/")
    assert set(params) == {key.replace("resnet/head/conv2d", "head") for key in flat}
    for key, leaf in params.items():
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape) if key.startswith("head/") else flat[key], err_msg=key)
    report = capsys.readouterr().out
    assert "resnet/block*/…" in report and "position embeddings" not in report


def test_model_arguments_reads_fine_tuned_resnet_checkpoint(write):
    converted = flatten_dict(pretrained.to_original(released_params()), sep="/")
    assert create_model_from(write(converted)).units == UNITS


@pytest.mark.parametrize("units", [list(UNITS), UNITS])
def test_model_arguments_accepts_units_as_list(write, units):
    file = write(flat_params())
    assert create_model_from(file, units=units, width=WIDTH).units == UNITS
    with pytest.raises(UsageError, match=r"does not match .*: width 64 \(checkpoint: 32\)"):
        create_model_from(file, units=units, width=64)


def test_model_arguments_rejects_checkpoint_of_other_architecture(write):
    with pytest.raises(UsageError, match=r"does not match micro: resnet50 \(checkpoint: vit\)"):
        create_model_from("micro")
    with pytest.raises(UsageError, match=r"does not match .*BiT-micro.npz: vit \(checkpoint: resnet50\)"):
        create_model_from(write(flat_params()), architecture="vit")
