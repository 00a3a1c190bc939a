"""Fine-tunes ViT-B/16, pretrained on ImageNet-21k, on CIFAR-10 at 224 px, with the settings of `cifar100.py`.

    python train.py --config configs/cifar10.py[:full|mlp|attention|lora|head|full_bwconrad|lora_bwconrad]

Hardware and downloads: as in `cifar100.py`. Time and test accuracy: not yet measured; results of other work with other
settings are in `PUBLISHED`.
"""

from ml_collections import ConfigDict

from configs import base, cifar100

# Test accuracies of ViT-B/16, pretrained on ImageNet-21k; for the sources see cifar100.py.
_FULL_BWCONRAD = ("cifar10", f"bwconrad: full, 5,000 steps × 128; {cifar100.BWCONRAD}", 0.9900)
PUBLISHED = {
    "full": (
        _FULL_BWCONRAD,
        ("cifar10", "google-research: full, 10,000 steps × 512; 384 px, learning rate 0.01", 0.9902),
    ),
    "full_bwconrad": (_FULL_BWCONRAD,),
}


def get_config(arg: str = "full") -> ConfigDict:
    """Returns the config; `arg`: one of `cifar100.ARGUMENTS`."""
    base.check_argument(arg, cifar100.ARGUMENTS, __file__)
    config = cifar100.get_config(arg)
    config.dataset.name = "cifar10"
    config.reference_results = PUBLISHED.get(arg, ())
    return config
