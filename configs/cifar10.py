"""Fine-tunes ViT-B/16, pretrained on ImageNet-21k, on CIFAR-10 at 224 px, with the settings of `cifar100.py`.

    python train.py --config configs/cifar10.py[:full|mlp|attention|lora|head]

Hardware and downloads: as in `cifar100.py`. Time and test accuracy: not yet measured; for results of other work see
`PUBLISHED`.
"""

from ml_collections import ConfigDict

from configs import base, cifar100

# Test accuracies of ViT-B/16, pretrained on ImageNet-21k; for the sources see cifar100.py.
PUBLISHED = {
    "full": (
        ("cifar10", "bwconrad: full, 5,000 steps × 128, no clipping, best checkpoint", 0.9900),
        ("cifar10", "google-research: full, 10,000 steps × 512, 384 px", 0.9902),
    )
}


def get_config(arg: str = "full") -> ConfigDict:
    """Returns the config; `arg`: the trainable parameters, one of `cifar100.ARGUMENTS`."""
    base.check_argument(arg, cifar100.ARGUMENTS, __file__)
    config = cifar100.get_config(arg)
    config.dataset.name = "cifar10"
    config.reference_results = PUBLISHED.get(arg, ())
    return config
