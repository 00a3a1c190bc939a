"""Fine-tunes on your own images, in a directory per class or a CSV file; see docs/data.md.

    python train.py --config configs/own_images.py --config.dataset.name=folder:DIR          ViT-B/16
    python train.py --config configs/own_images.py:head --config.dataset.name=folder:DIR     its head, not augmented
    python train.py --config configs/own_images.py:micro --config.dataset.name=folder:DIR    the head of the micro ViT

ViT-B/16 is pretrained on ImageNet-21k; training it at 224 × 224 pixels needs a GPU. The micro ViT comes with the
package and sees 32 × 32 pixels: in less than a minute on a CPU, it shows that your images are read as they should be.
20 epochs. Time and test accuracy depend on the images; ViT-B/16: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base

ARGUMENTS = ("full", "head", "micro")


def get_config(arg: str = "full") -> ConfigDict:
    """Returns the config; `arg`: one of `ARGUMENTS`."""
    base.check_argument(arg, ARGUMENTS, __file__)
    config = base.get_config()
    config.pretrained = "micro" if arg == "micro" else "imagenet21k/ViT-B_16"
    config.dtype = "auto"
    config.accumulation_steps = 0
    config.dataset.name = "folder:photos"
    config.image_size = 32 if arg == "micro" else 224
    config.batch_size = 16
    config.num_epochs = 20
    config.log_every_steps = 1
    if arg == "full":
        config.augment = ("inception", "trivial")
        config.optimizer.clip_norm = 1.0
        config.learning_rate = 0.003
    else:
        config.trainable = "head"
        config.learning_rate = 0.1 if arg == "micro" else 0.01
    return config
