"""Fine-tunes ViT-B/16 from the ImageNet-21k file on CIFAR-10, at 224 px: `cifar100.py` on the other pictures.

    python train.py --config configs/cifar10.py[:full|mlp|attention|lora|head]

Hardware and downloads as in cifar100.py. Published for the same model at 384 px, 10,000 steps × 512: 0.9902
(Dosovitskiy et al. 2021's released code). Not yet measured here.
"""

from ml_collections import ConfigDict

from configs import cifar100


def get_config(arg: str = "full") -> ConfigDict:
    """The recipe; `arg`: what trains, one of `cifar100.ARGUMENTS`."""
    if arg not in cifar100.ARGUMENTS:
        raise ValueError(f"configs/cifar10.py takes {', '.join(cifar100.ARGUMENTS)}, got {arg!r}")
    config = cifar100.get_config(arg)
    config.dataset.name = "cifar10"
    return config
