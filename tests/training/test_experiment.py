import json
import shutil

import jax
import numpy as np
import pytest
from conftest import set_keys
from PIL import Image

from configs import digits
from configs import models as variants
from vit_jax import data, models
from vit_jax.runtime import distributed, sharding
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training import experiment, optim
from vit_jax.training.run_info import RunInfo

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


def config_with(**changes):
    config = digits.get_config("scratch")
    config.dtype = "float32"
    config.model = SIZES
    return set_keys(config, changes)


def plan(config, *, num_devices=8, num_images=1437):
    mesh = sharding.create_mesh(jax.devices()[:num_devices], data=config.mesh.data, fsdp=config.mesh.fsdp)
    model = experiment.create_model(config, None, num_classes=10)
    info = data.DatasetInfo(num_images, 360, (8, 8, 3), tuple("0123456789"), in_memory=True)
    return experiment.plan_experiment(config, model, mesh, info)


@pytest.mark.parametrize(
    ("changes", "cached"),
    [
        ({}, False),
        ({"trainable": "head"}, True),
        ({"trainable": ("head/kernel",)}, True),
        ({"trainable": ("head/.*", "cls")}, False),
        ({"trainable": "lora"}, False),
        ({"trainable": "head", "features": "fresh"}, False),
        ({"trainable": "head", "augment": "flip"}, False),
        ({"trainable": "head", "augment": ("flip", "erase")}, False),
        ({"trainable": "head", "augment": "flip", "features": "cached", "feature_views": 4}, True),
        ({"trainable": "head", "augment": ("trivial",), "features": "cached", "feature_views": 4}, True),
        ({"trainable": "head", "mixup_alpha": 0.1}, False),
        ({"trainable": "head", "model": {**SIZES, "dropout_rate": 0.1}}, True),
        ({"trainable": "head", "model": {**SIZES, "dropout_rate": 0.1}, "ablation.frozen_dropout": True}, False),
        ({"trainable": "head", "ablation.frozen_dropout": True}, True),
    ],
)
def test_plan_experiment_caches_features_of_deterministic_backbone(changes, cached):
    planned = plan(config_with(**changes))
    assert planned.storage == ("features" if cached else "memory")
    assert planned.abstract_batch.inputs.shape == ((10 * 64, 24) if cached else (64, 8, 8, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "cached"}, "features is 'cached', but trainable 'full' trains more than the head"),
        ({"features": "cached", "trainable": "head", "cutmix_alpha": 1.0}, "mixup and cutmix need the images"),
        (
            {
                "features": "cached",
                "trainable": "head",
                "ablation.frozen_dropout": True,
                "model": {**SIZES, "dropout_rate": 0.1},
            },
            "frozen_dropout changes them",
        ),
        ({"trainable": "head", "feature_views": 4}, "feature_views is 4, which needs features='cached'"),
        ({"trainable": (".*/adapter/.*",)}, "'.*/adapter/.*' matches no parameter"),
        ({"trainable": "lora", "lora.targets": (".*/querry/kernel",)}, "lora.targets: '.*/querry/kernel'"),
        ({"batch_size": 60}, "60, which is not divisible by 8 devices × 1 accumulation steps; use 64"),
        ({"accumulation_steps": 16}, "64, which is not divisible by 8 devices × 16 accumulation steps; use 128"),
        ({"batch_size": 2048}, "config.batch_size is 2048; expected at most 1437"),
        (
            {"optimizer.layer_decay": 0.5, "architecture": "resnet50", "model": {"units": (1,), "width": 32}},
            "for a VisionTransformer",
        ),
    ],
)
def test_plan_experiment_rejects_incompatible_settings(changes, message):
    with pytest.raises(UsageError) as error:
        plan(config_with(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "has_lora"),
    [
        ({"trainable": "lora"}, True),
        ({"trainable": ("(lora|head)/.*",)}, True),
        ({"trainable": (".*lora.*", "head/.*")}, True),
        ({"trainable": (".*", "lora/.*/value/.*")}, True),
        ({"trainable": ("lora/.*/b", "head/.*")}, True),
        ({"trainable": ("lora/.*",), "lora.targets": ("head/kernel",)}, True),
        ({"trainable": "full"}, False),
        ({"trainable": "mlp"}, False),
        ({"trainable": ("[a-z]+/.*",)}, False),
        ({"trainable": (".*/kernel.*",)}, False),
    ],
)
def test_plan_experiment_adds_lora_weights_if_pattern_names_them(changes, has_lora):
    state = plan(config_with(**changes)).abstract_state
    assert ("lora" in state.trainable) == has_lora
    assert ("lora" in state.frozen) == (has_lora and changes["trainable"][0].endswith("/b"))


@pytest.mark.parametrize("pattern", ["lora/.*", ".*/MlpBlock_3/.*", ".*/bias"])
def test_plan_experiment_rejects_parameters_without_gradients(pattern):
    message = "does not match head/kernel, which is initialized to zero, so no parameter below the head"
    with pytest.raises(UsageError, match=message):
        plan(config_with(trainable=(pattern,)))


def test_plan_experiment_accepts_nonzero_frozen_head():
    planned = plan(config_with(**{"trainable": ("lora/.*",), "ablation.head_init": "xavier"}))
    assert set(planned.abstract_state.trainable) == {"lora"}


def flops(config):
    return plan(config, num_devices=1).lower().compile().cost_analysis()["flops"]


def wide_config(**changes):
    return config_with(model=variants.get_config("micro_4"), features="fresh", image_size=32, **changes)


def test_train_step_skips_backbone_gradients_if_only_head_is_trained():
    assert flops(wide_config(trainable="head")) <= 0.36 * flops(wide_config())


def test_train_step_skips_kernel_gradients_for_lora():
    """Gradients of activations and LoRA weights, but not of kernels: 0.71 of the FLOPs of full fine-tuning for B/16."""
    assert flops(wide_config(trainable="lora")) <= 0.8 * flops(wide_config())


@pytest.mark.parametrize(
    ("changes", "is_applied"),
    [
        ({"trainable": "head"}, False),
        ({"trainable": "head", "ablation.frozen_dropout": True}, True),
        ({"trainable": "mlp"}, True),
    ],
)
def test_plan_experiment_applies_dropout_if_backbone_is_trained(changes, is_applied):
    planned = plan(config_with(model={**SIZES, "dropout_rate": 0.1}, features="fresh", **changes))
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(0).normal(0, 0.2, leaf.shape),
        optim.merge_params(planned.abstract_state.trainable, planned.abstract_state.frozen),
    )
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3))
    keys = [None, *(jax.random.split(jax.random.key(seed), 2) for seed in (0, 1))]
    plain, first, second = (planned.image_forward.logits(params, images, image_keys) for image_keys in keys)
    assert np.allclose(first, second, atol=1e-5) != is_applied
    assert np.allclose(first, plain, atol=1e-5) != is_applied


# ---- with data


def test_create_experiment_keeps_parameters_in_float32():
    config = config_with(**{"dtype": "bfloat16", "optimizer.name": "adamw"})
    created, state = experiment.create_experiment(config)
    assert created.dataset_info.num_train == 1437
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.trainable)} == {"float32"}
    assert created.info.model.class_names == tuple(str(digit) for digit in range(10))
    saved = RunInfo.from_json(json.loads(json.dumps(created.info.to_json())))
    assert saved.model == created.info.model and saved.dataset == created.info.dataset


def test_check_same_dataset_names_differing_process(monkeypatch):
    found = data.fingerprint(data.load_dataset("digits", image_size=8))
    experiment.check_same_dataset(found)
    monkeypatch.setattr(distributed, "gather_strings", lambda text: [text, text, "3 training images"])
    with pytest.raises(UserError) as error:
        experiment.check_same_dataset(found)
    expected = "process 2 read 3 training images, the first process read 1,437 training and 360 test images of"
    assert str(error.value).startswith(expected)


@pytest.fixture
def image_dir(tmp_path):
    """Image directory of two classes, each with three training and two test images."""
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def rename_class(image_dir):
    for split in ("train", "test"):
        (image_dir / split / "cat").rename(image_dir / split / "wolf")


CHANGES = {
    "class": (rename_class, r"it has other classes \(new: wolf; missing: cat\)"),
    "count": (
        lambda image_dir: shutil.copy(image_dir / "train/cat/0.png", image_dir / "train/cat/3.png"),
        "it has 7 training and 4 test images instead of 6 training and 4 test images",
    ),
    "file": (
        lambda image_dir: (image_dir / "test/dog/0.png").rename(image_dir / "test/dog/9.png"),
        "it has the same number of images, but other files or labels",
    ),
}


@pytest.mark.parametrize(
    "change", ["class", *(pytest.param(name, marks=pytest.mark.slow) for name in ("count", "file"))]
)
def test_create_experiment_rejects_dataset_changed_since_start_of_run(image_dir, tmp_path_factory, change):
    config = config_with(**{"image_size": 8, "batch_size": 2, "mesh.data": 1, "dataset.name": f"folder:{image_dir}"})
    saved = experiment.create_experiment(config)[0].info
    moved = tmp_path_factory.mktemp("moved") / "images"
    shutil.move(image_dir, moved)
    config.dataset.name = f"folder:{moved}"
    experiment.create_experiment(config, saved=saved)  # same files, other path
    edit, message = CHANGES[change]
    edit(moved)
    with pytest.raises(UserError, match=f"has changed since the run was started: {message}; restore it"):
        experiment.create_experiment(config, saved=saved)


@pytest.mark.parametrize(
    ("given", "expected"), [({}, {}), ({"attention": "auto"}, {"attention": "xla"}), ({"attention": "cudnn"},) * 2]
)
def test_fit_attention_uses_xla_on_cpu(given, expected):
    config = config_with(model={**SIZES, **given}, dtype="bfloat16")
    model = experiment.create_model(config, None, num_classes=10)
    fitted, model = experiment.fit_attention(config, model, sharding.create_mesh())
    assert (fitted.model.to_dict(), model.attention) == ({**SIZES, **expected}, "xla")
    assert config.model.to_dict() == {**SIZES, **given}


def test_create_experiment_resumes_without_pretrained_checkpoint(tmp_path):
    config = set_keys(digits.get_config(), {"mesh.data": 1})
    created, state = experiment.create_experiment(config)
    config.pretrained = str(tmp_path / "moved.npz")
    resumed, abstract_state = experiment.create_experiment(config, saved=created.info)
    assert resumed.image_forward.model == created.image_forward.model
    assert jax.tree.map(lambda leaf: leaf.shape, abstract_state) == jax.tree.map(lambda leaf: leaf.shape, state)


def test_plan_experiment_supports_every_architecture():
    sizes = {"vit": SIZES, "resnet50": {"units": (1, 1), "width": 32}}
    assert sizes.keys() == models.ARCHITECTURES.keys()
    for architecture, model in sizes.items():
        planned = plan(config_with(architecture=architecture, model=model))
        assert "head" in planned.abstract_state.trainable
