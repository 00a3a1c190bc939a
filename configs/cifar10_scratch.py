"""Trains ViTs on CIFAR-10 from random parameters.

    python train.py --config configs/cifar10_scratch.py:sgd      ViT-B/16 at 224 px, 50 epochs (the default)
    python train.py --config configs/cifar10_scratch.py:adam     the same with Adam and L2, 60 epochs
    python train.py --config configs/cifar10_scratch.py:small    a small ViT at 32 px, patches of 4, 200 epochs

sgd, adam: after Li, "Fine-tuning of ViT-B16 on CIFAR-10 and CIFAR-100", github.com/ZipperLii/ViT-B16-on-CIFAR100, which
reached 0.6327 with SGD and overfitted after 20 epochs with Adam. Its batch size and learning rates are not given; these
are those of its fine-tuning. small: a common setup for small datasets.

Hardware: one GPU. Time and test accuracy: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base, models

ARGUMENTS = ("sgd", "adam", "small")
PUBLISHED = {"sgd": (("cifar10", "Li: ViT-B/16 from scratch, SGD, 50 epochs; batch size unknown", 0.6327),)}


def get_config(arg: str = "sgd") -> ConfigDict:
    """Returns the config; `arg`: one of `ARGUMENTS`."""
    base.check_argument(arg, ARGUMENTS, __file__)
    config = base.get_config()
    config.dataset.name = "cifar10"
    config.dtype = "auto"
    config.reference_results = PUBLISHED.get(arg, ())
    config.batch_size = 128 if arg == "small" else 64
    steps_per_epoch = base.steps_per_epoch(50_000, config.batch_size)
    if arg == "small":
        config.model = models.get_config("S_16")
        config.model.patch_size = 4
        config.image_size = 32
        config.augment = "pad_crop"
        config.mixup_alpha, config.cutmix_alpha, config.label_smoothing = 0.2, 1.0, 0.1
        config.optimizer.name, config.optimizer.weight_decay, config.optimizer.decayed = "adamw", 0.05, "kernels"
        config.optimizer.clip_norm = 1.0
        config.learning_rate, config.warmup_steps = 1e-3, 10 * steps_per_epoch
        config.num_steps = 200 * steps_per_epoch
        config.eval_every_steps = config.checkpoint_every_steps = 5 * steps_per_epoch
        return config
    config.model = models.get_config("B_16", dropout_rate=0.1)
    config.accumulation_steps = 0
    config.image_size = 224
    config.augment = "square_crop"
    config.optimizer.name = arg
    config.optimizer.weight_decay = 1e-4
    config.learning_rate = 0.01 if arg == "sgd" else 1e-4
    config.num_steps = (50 if arg == "sgd" else 60) * steps_per_epoch
    config.eval_every_steps = config.checkpoint_every_steps = steps_per_epoch
    return config
