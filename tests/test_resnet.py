"""ResNet (BiT): names, numbers against a float64 reference, and the same way through files, trainer and commands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import cifar100_resnet50, digits
from vit_jax import build, pretrained, trainer
from vit_jax.errors import UsageError, UserError
from vit_jax.models import ResNet

UNITS, WIDTH = (1, 2), 32


def released_shapes(units, width, num_classes):
    """Every key of a BiT file with its shape, as the release has them."""
    shapes = {"resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, width)}
    channels = width
    for i, num_units in enumerate(units):
        middle = width * 2**i
        for j in range(num_units):
            unit = f"resnet/block{i + 1}/unit{j + 1:02}"
            for name, size, inputs, outputs in (
                ("a", 1, channels, middle),
                ("b", 3, middle, middle),
                ("c", 1, middle, 4 * middle),
            ):
                shapes[f"{unit}/{name}/standardized_conv2d/kernel"] = (size, size, inputs, outputs)
                shapes[f"{unit}/{name}/group_norm/gamma"] = shapes[f"{unit}/{name}/group_norm/beta"] = (inputs,)
            if j == 0:
                shapes[f"{unit}/a/proj/standardized_conv2d/kernel"] = (1, 1, channels, 4 * middle)
            channels = 4 * middle
    shapes["resnet/group_norm/gamma"] = shapes["resnet/group_norm/beta"] = (channels,)
    shapes["resnet/head/conv2d/kernel"], shapes["resnet/head/conv2d/bias"] = (
        (1, 1, channels, num_classes),
        (num_classes,),
    )
    return shapes


def released_params(units=UNITS, width=WIDTH, num_classes=7):
    rng = np.random.default_rng(0)
    shapes = released_shapes(units, width, num_classes)
    flat = {key: rng.normal(0.3, 0.5, shape).astype(np.float32) for key, shape in shapes.items()}
    return unflatten_dict(flat, sep="/")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "BiT-micro.npz"
    pretrained.save_npz(path, released_params())
    return path


def forward(params, x):
    """Logits in float64, by loops over kernel positions; `params` as in the file."""

    def conv(x, tree, stride=1):
        kernel = np.asarray(tree["standardized_conv2d"]["kernel"], np.float64)
        kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-10)
        pad = kernel.shape[0] // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        size = (x.shape[1] - kernel.shape[0]) // stride + 1
        return sum(
            x[:, i : i + stride * size : stride, j : j + stride * size : stride][:, :size, :size] @ kernel[i, j]
            for i in range(kernel.shape[0])
            for j in range(kernel.shape[1])
        )

    def norm_relu(x, tree):
        groups = x.reshape(*x.shape[:3], 32, -1)
        mean, var = (f(groups, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
        normal = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
        return np.maximum(normal * tree["gamma"] + tree["beta"], 0)

    tree = params["resnet"]
    x = np.pad(conv(x, tree["root_block"], stride=2), ((0, 0), (1, 1), (1, 1), (0, 0)))
    size = (x.shape[1] - 3) // 2 + 1
    rows = [x[:, 2 * i : 2 * i + 3].max(axis=1) for i in range(size)]
    x = np.stack(rows, axis=1)
    x = np.stack([x[:, :, 2 * j : 2 * j + 3].max(axis=2) for j in range(size)], axis=2)
    for name in sorted(key for key in tree if key.startswith("block")):
        for unit_name, unit in sorted(tree[name].items()):
            stride = 2 if unit_name == "unit01" and name != "block1" else 1
            active = norm_relu(x, unit["a"]["group_norm"])
            shortcut = conv(active, unit["a"]["proj"], stride) if "proj" in unit["a"] else x
            y = conv(active, unit["a"])
            y = conv(norm_relu(y, unit["b"]["group_norm"]), unit["b"], stride)
            x = conv(norm_relu(y, unit["c"]["group_norm"]), unit["c"]) + shortcut
    features = norm_relu(x, tree["group_norm"]).mean(axis=(1, 2))
    head = tree["head"]["conv2d"]
    return features @ head["kernel"][0, 0].astype(np.float64) + head["bias"]


@pytest.mark.parametrize("size", [32, 40])
def test_logits_are_those_of_a_float64_reference(size):
    params = released_params()
    images = np.random.default_rng(1).uniform(-1, 1, (3, size, size, 3))
    expected = forward(params, images)
    logits = ResNet(7, UNITS, WIDTH).apply({"params": pretrained.squeeze_head(params)}, images.astype(np.float32))
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
    rounded = ResNet(7, UNITS, WIDTH, dtype=jnp.bfloat16).apply({"params": pretrained.squeeze_head(params)}, images)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, expected, atol=0.05 * np.abs(expected).max())


def test_names_are_those_of_the_file_but_for_the_head():
    model = ResNet(21843)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    ours = {key: leaf.shape for key, leaf in flatten_dict(tree, sep="/").items()}
    expected = released_shapes((3, 4, 6, 3), 64, 21843)
    assert ours.pop("head/kernel") == expected.pop("resnet/head/conv2d/kernel")[2:]
    assert ours.pop("head/bias") == expected.pop("resnet/head/conv2d/bias")
    assert ours == expected
    assert sum(map(np.prod, ours.values())) == 23_500_352


def config_with(**changes):
    config = digits.get_config("scratch")
    config.architecture = "resnet50"
    config.model = {"units": UNITS, "width": WIDTH}
    config.dataset.train_split, config.dataset.test_split = "train[:320]", "test[:80]"
    config.update(num_steps=10, warmup_steps=0, log_every_steps=5, eval_every_steps=10, checkpoint_every_steps=5)
    config.update(changes)
    return config


def test_sizes_are_read_off_a_file_and_all_but_the_head_is_loaded(file):
    config = config_with(pretrained=str(file), model={})
    source = build.load_source(config)
    model = build.create_model(config, source, num_classes=10)
    assert (model.units, model.width) == (UNITS, WIDTH)
    flat = flatten_dict(build.create_params(config, model, source), sep="/")
    with np.load(file) as released:
        for key in flat:
            expected = np.zeros(flat[key].shape) if key.startswith("head/") else released[key]
            np.testing.assert_array_equal(flat[key], expected, err_msg=key)


@pytest.mark.parametrize("trainable", ["full", "head"])
def test_a_run_from_a_file_trains_and_evaluates(file, tmp_path, trainable):
    config = config_with(pretrained=str(file), trainable=trainable)
    results = trainer.train_and_evaluate(config, tmp_path / "run")
    run = trainer.load_run(tmp_path / "run")
    assert isinstance(run.model, ResNet) and run.model.units == UNITS
    assert trainer.evaluate_run(run) == pytest.approx(results, abs=1e-5)
    root = run.params["resnet"]["root_block"]["standardized_conv2d"]["kernel"]
    with np.load(file) as released:
        moved = not np.array_equal(root, released["resnet/root_block/standardized_conv2d/kernel"])
    assert moved == (trainable == "full")
    assert np.any(np.asarray(run.params["head"]["kernel"]))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    params = pretrained.squeeze_head(released_params())

    def gradient(model):
        return jax.grad(lambda params: jnp.sum(model.apply({"params": params}, images) ** 2))(params)

    ours, expected = gradient(ResNet(7, UNITS, WIDTH, remat=remat)), gradient(ResNet(7, UNITS, WIDTH))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {"units": UNITS, "width": 48}}, UsageError, "config.model.width 48 is not a multiple of 32"),
        (
            {"model": {"units": (3, 0), "width": 32}},
            UsageError,
            "config.model.units is (3, 0); expected a tuple of whole",
        ),
        ({"model": {"patch_size": 4}}, UsageError, "config.model.patch_size: ResNet has no such argument"),
        ({"pretrained": "micro"}, UserError, "these are not the parameters of a ResNet (BiT)"),
        ({"trainable": "mlp"}, UsageError, "matches no parameter"),
    ],
)
def test_what_does_not_fit_a_resnet_is_refused(tmp_path, changes, error, message):
    with pytest.raises(error) as caught:
        trainer.train_and_evaluate(config_with(**changes), tmp_path)
    assert message in str(caught.value)


def test_layer_decay_is_refused(tmp_path):
    config = config_with()
    config.optimizer.layer_decay = 0.9
    with pytest.raises(UsageError, match="config.optimizer.layer_decay is for the layers of a ViT"):
        trainer.train_and_evaluate(config, tmp_path)


def test_a_vit_refuses_the_file_of_a_resnet(file):
    config = digits.get_config("scratch")
    config.pretrained = str(file)
    with pytest.raises(UserError, match=r"it looks like a ResNet \(BiT\) file"):
        build.create_model(config, build.load_source(config), num_classes=10)


def test_the_recipe_is_a_resnet_50():
    config = cifar100_resnet50.get_config()
    model = build.create_model(config, None, num_classes=100)
    assert model == ResNet(100, dtype=jnp.bfloat16)
