"""Choices that depend on the device: the dtype of the computation."""

import jax


def auto_dtype(device: jax.Device) -> str:
    """Returns "bfloat16" for a TPU or a GPU of compute capability 8.0 or higher, "float32" for others.

    Older GPUs, such as the T4 (7.5), have no bfloat16 units, and CPUs compute faster in float32.
    """
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    has_bfloat16 = device.platform == "tpu" or (major.isdecimal() and int(major) >= 8)
    return "bfloat16" if has_bfloat16 else "float32"
