"""Tests of the config files in configs/."""

import importlib
import re

import pytest
from conftest import ROOT

from configs import base, cifar100
from vit_jax import config as settings

NAMES = [
    path.stem for path in sorted((ROOT / "configs").glob("*.py")) if path.stem not in ("__init__", "base", "models")
]


@pytest.mark.parametrize("name", NAMES)
def test_check_config_accepts_every_config_and_argument(name):
    """Reads the accepted arguments from the error message for an unknown argument."""
    module = importlib.import_module(f"configs.{name}")
    with pytest.raises(ValueError, match=rf"configs/{name}.py takes .*, got 'tail'") as error:
        module.get_config("tail")
    for argument in re.search("takes (.*), got", str(error.value))[1].split(", "):
        settings.check_config(module.get_config(argument))
    settings.check_config(module.get_config())


def test_base_config_equals_get_config():
    assert base.get_config().to_dict() == settings.get_config().to_dict()
    with pytest.raises(ValueError, match="configs/base.py takes no argument, got 'tail'"):
        base.get_config("tail")


@pytest.mark.parametrize(
    ("num_images", "batch_size", "steps"),
    [(50_000, 256, 195), (50_000, 128, 390), (40_000, 128, 312), (50_000, 64, 781), (1437, 64, 22)],
)
def test_steps_per_epoch_counts_full_batches(num_images, batch_size, steps):
    assert base.steps_per_epoch(num_images, batch_size) == steps


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_cifar100_config_of_bwconrad_differs_in_head_clipping_and_model(mode):
    ours, theirs = (cifar100.get_config(arg).to_dict() for arg in (mode, f"{mode}_bwconrad"))
    ours["optimizer"]["clip_norm"] = 0.0
    ours["ablation"]["head_init"] = "xavier"
    ours["model"] |= {"gelu_approximate": False, "layer_norm_epsilon": 1e-12}
    assert set(theirs["reference_results"]) <= set(ours.pop("reference_results"))
    theirs.pop("reference_results")
    assert theirs == ours


def test_reference_results_match_dataset_of_config():
    for name in NAMES:
        config = importlib.import_module(f"configs.{name}").get_config()
        assert {dataset for dataset, _, _ in config.reference_results} <= {config.dataset.name}, name
