"""Trains ViTs on CIFAR-100 from random parameters: `cifar10_scratch.py` on the other pictures.

    python train.py --config configs/cifar100_scratch.py[:sgd|adam|small]

The row of the study that this project carries on was left empty. Hardware: one GPU. Not yet measured here.
"""

from ml_collections import ConfigDict

from configs import cifar10_scratch


def get_config(arg: str = "sgd") -> ConfigDict:
    """The recipe; `arg`: "sgd", "adam" or "small"."""
    if arg not in ("sgd", "adam", "small"):
        raise ValueError(f"configs/cifar100_scratch.py takes sgd, adam or small, got {arg!r}")
    config = cifar10_scratch.get_config(arg)
    config.dataset.name = "cifar100"
    return config
