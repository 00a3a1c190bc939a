import re

import jax
import numpy as np
import pytest
from conftest import set_keys

from configs import digits
from configs import models as variants
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UsageError
from vit_jax.training import build, optim, program

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


def config_with(**changes):
    config = digits.get_config("scratch")
    config.model = SIZES
    return set_keys(config, changes)


def create(config, *, num_devices=8, num_images=1437):
    mesh = sharding.create_mesh(jax.devices()[:num_devices], **config.mesh)
    model = build.create_model(config, None, num_classes=10)
    return program.create_program(config, model, mesh, num_images=num_images, image_shape=(8, 8, 3))


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
        ({"trainable": "head", "augment": "flip", "features": "cached", "feature_views": 4}, True),
        ({"trainable": "head", "mixup_alpha": 0.1}, False),
        ({"trainable": "head", "model": {**SIZES, "dropout_rate": 0.1}}, True),
        ({"trainable": "head", "model": {**SIZES, "dropout_rate": 0.1}, "ablation.frozen_dropout": True}, False),
        ({"trainable": "head", "ablation.frozen_dropout": True}, True),
    ],
)
def test_features_are_stored_where_the_backbone_is_a_fixed_function(changes, cached):
    made = create(config_with(**changes))
    assert made.cached == cached
    rows = 1437 * (4 if "feature_views" in changes else 1)
    assert made.abstract_arrays[0].shape == ((rows, 24) if cached else (1437, 8, 8, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "cached"}, "config.features is 'cached', but trainable 'full' trains more than the head"),
        ({"features": "cached", "trainable": "head", "cutmix_alpha": 1.0}, "mixup and cutmix need the pictures"),
        (
            {
                "features": "cached",
                "trainable": "head",
                "ablation.frozen_dropout": True,
                "model": {**SIZES, "dropout_rate": 0.1},
            },
            "ablation.frozen_dropout changes them at every step",
        ),
        ({"trainable": "head", "feature_views": 4}, "config.feature_views is 4, which needs features 'cached'"),
        ({"trainable": (".*/adapter/.*",)}, "'.*/adapter/.*' matches no parameter"),
        ({"trainable": "lora", "lora.targets": (".*/querry/kernel",)}, "config.lora.targets: '.*/querry/kernel'"),
        ({"batch_size": 60}, "60 does not divide by 8 devices × 1 accumulation_steps; 64 does"),
        ({"accumulation_steps": 16}, "64 does not divide by 8 devices × 16 accumulation_steps; 128 does"),
        ({"batch_size": 2048}, "config.batch_size 2048 is above the 1437 training pictures"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UsageError) as error:
        create(config_with(**changes))
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
def test_create_program_adds_lora_weights_where_a_pattern_names_them(changes, has_lora):
    state = create(config_with(**changes)).abstract_state
    assert ("lora" in state.trainable) == has_lora
    assert ("lora" in state.frozen) == (has_lora and changes["trainable"][0].endswith("/b"))


ZERO_HEAD = "does not match head/kernel, which starts at zero, so that no parameter below the head"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ("lora/.*",)}, ZERO_HEAD),
        ({"trainable": (".*/MlpBlock_3/.*",)}, ZERO_HEAD),
        ({"trainable": (".*/bias",)}, ZERO_HEAD),
        ({"trainable": ("lora/.*/a", "head/.*")}, "config.trainable matches no LoRA weight 'lora/…/b'"),
        ({"trainable": ("(head|lora/.*/MlpBlock_3)/.*",)}, "config.trainable matches no LoRA weight 'lora/…/b'"),
    ],
)
def test_create_program_refuses_parameters_without_gradients(changes, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        create(config_with(**changes))


def test_create_program_accepts_a_frozen_head_that_is_not_zero():
    made = create(config_with(trainable=("lora/.*",), **{"ablation.head_init": "xavier"}))
    assert set(made.abstract_state.trainable) == {"lora"}


def flops(config):
    return create(config, num_devices=1).lower().compile().cost_analysis()["flops"]


def test_training_the_head_alone_computes_no_gradient_below_it():
    config = config_with(model=variants.get_config("micro_4"), features="fresh", image_size=32)
    full = flops(config)
    assert flops(config_with(**config_options(config), trainable="head")) <= 0.36 * full


def config_options(config):
    return {"model": config.model, "features": config.features, "image_size": config.image_size}


def test_low_rank_adaptation_computes_no_gradient_of_the_kernels():
    """Backward through activations, but of kernels only through their factors' product: 0.71 of all for B/16."""
    config = config_with(model=variants.get_config("micro_4"), image_size=32)
    assert flops(config_with(**config_options(config), trainable="lora")) <= 0.8 * flops(config)


@pytest.mark.parametrize(
    ("changes", "on"),
    [
        ({"trainable": "head"}, False),
        ({"trainable": "head", "ablation.frozen_dropout": True}, True),
        ({"trainable": "mlp"}, True),
    ],
)
def test_dropout_is_on_where_something_below_the_head_trains(changes, on):
    made = create(config_with(model={**SIZES, "dropout_rate": 0.1}, features="fresh", **changes))
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(0).normal(0, 0.2, leaf.shape),
        optim.merge_params(made.abstract_state.trainable, made.abstract_state.frozen),
    )
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3))
    keys = [None, *(jax.random.split(jax.random.key(seed), 2) for seed in (0, 1))]
    without, one, two = (made.forward.logits(params, images, image_keys) for image_keys in keys)
    assert np.allclose(one, two, atol=1e-5) != on
    assert np.allclose(one, without, atol=1e-5) != on
