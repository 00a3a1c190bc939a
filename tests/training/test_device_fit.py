import types

import jax
import pytest

from vit_jax.training import device_fit


@pytest.mark.parametrize(
    ("platform", "compute_capability", "expected"),
    [
        ("tpu", None, "bfloat16"),
        ("gpu", "7.5", "float32"),  # T4
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "8.9", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx942", "float32"),
        ("cpu", None, "float32"),
    ],
)
def test_auto_dtype_depends_on_compute_capability(platform, compute_capability, expected):
    device = types.SimpleNamespace(platform=platform)
    if compute_capability:
        device.compute_capability = compute_capability
    assert device_fit.auto_dtype(device) == expected


def test_auto_dtype_returns_float32_for_cpu():
    assert device_fit.auto_dtype(jax.devices()[0]) == "float32"
