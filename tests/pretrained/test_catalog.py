import numpy as np
import pytest
from conftest import ROOT

from vit_jax import pretrained
from vit_jax.pretrained import catalog


@pytest.mark.parametrize(
    ("name", "num_parameters", "resolution", "patch_size", "data"),
    [
        ("imagenet21k/ViT-B_16", 85_798_656, 224, 16, "ImageNet-21k"),
        ("imagenet21k+imagenet2012/ViT-B_32", 87_528_192, 384, 32, "ImageNet-21k, then ImageNet-2012"),
        ("imagenet21k+imagenet2012/ViT-B_16-224", 85_798_656, 224, 16, "ImageNet-21k, then ImageNet-2012"),
        ("augreg/R26_S_32", 36_046_912, 224, 32, "ImageNet-21k"),
        ("bit_models/BiT-M-R50x1", 23_500_352, 224, 0, "ImageNet-21k"),
        ("gsam/ViT-S_16", 21_665_664, 224, 16, "ImageNet-2012, GSAM"),
        ("micro", 458_592, 32, 4, "CIFAR-10"),
    ],
)
def test_describe_counts_parameters_without_head(name, num_parameters, resolution, patch_size, data):
    """A 1000-way head has 769,000 parameters: 86,567,656 in all for ViT-B/16, as published."""
    assert catalog.describe(name) == (name, num_parameters, resolution, patch_size, data)


def test_describe_agrees_with_shipped_checkpoint():
    params = pretrained.load_npz(pretrained.resolve("micro"))
    shapes = pretrained.sizes.shapes_of({key: value for key, value in params.items() if key != "head"})
    assert catalog.describe("micro").num_parameters == sum(np.prod(shape) for shape in shapes.values())


def test_main_lists_names_that_contain_text(run_cli):
    result = run_cli("vit_jax.pretrained.__main__", ["--list", "ViT-B_32"])
    header, *rows, note = result.stdout.splitlines()
    assert header.split() == ["name", "parameters", "resolution", "patch", "pretraining", "data"]
    assert [row.split()[0] for row in rows] == [name for name in catalog.NAMES if "ViT-B_32" in name]
    assert rows[0].split() == ["imagenet21k/ViT-B_32", "87.5", "M", "224", "32", "ImageNet-21k"]
    assert "without pre_logits and head" in note


def test_main_rejects_unknown_text(run_cli):
    result = run_cli("vit_jax.pretrained.__main__", ["--list", "xyz"])
    assert (result.code, result.stderr.count("\n")) == (2, 1) and "no name contains 'xyz'" in result.stderr


@pytest.mark.slow
def test_main_describes_every_name(run_cli):
    rows = run_cli("vit_jax.pretrained.__main__", []).stdout.splitlines()[1:-1]
    assert [row.split()[0] for row in rows] == list(catalog.NAMES)


def test_names_are_documented():
    page = (ROOT / "docs/pretrained.md").read_text()
    assert "-m vit_jax.pretrained --list\n" in page
    assert f"`augreg/{{{catalog._AUGREG_VARIANTS.replace(' ', ',')}}}`" in page
