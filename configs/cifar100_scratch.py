"""Trains ViTs on CIFAR-100 from random parameters, with the settings of `cifar10_scratch.py`.

    python train.py --config configs/cifar100_scratch.py[:sgd|adam|small]

Hardware: one GPU. Time and test accuracy: not yet measured. Li (see `cifar100_li.py`) lists this run without a result.
"""

from ml_collections import ConfigDict

from configs import base, cifar10_scratch


def get_config(arg: str = "sgd") -> ConfigDict:
    """Returns the config; `arg`: one of `cifar10_scratch.ARGUMENTS`."""
    base.check_argument(arg, cifar10_scratch.ARGUMENTS, __file__)
    config = cifar10_scratch.get_config(arg)
    config.dataset.name = "cifar100"
    config.reference_results = ()
    return config
