"""Trains the micro ViT from scratch on CIFAR-10 at 32 px: this made the file that ships with the package.

    python train.py --config configs/cifar10_micro.py          all classes
    python train.py --config configs/cifar10_micro.py:eight    without cats and dogs, 8 epochs

AdamW, pad-and-crop and flip, 16 epochs: 0.667 test accuracy, one seed, on a copy of CIFAR-10 saved once as JPEG; 73
minutes on two CPU cores (benchmarks/RESULTS.md). Eight classes: 0.677 of their images, one seed, 15 minutes. On the
original pictures: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base, models

EIGHT = ("airplane", "automobile", "bird", "deer", "frog", "horse", "ship", "truck")


def get_config(arg: str = "all") -> ConfigDict:
    """The recipe; `arg`: "all" classes, or "eight"."""
    if arg not in ("all", "eight"):
        raise ValueError(f"configs/cifar10_micro.py takes all or eight, got {arg!r}")
    config = base.get_config()
    config.model = models.get_config("micro_4")
    config.dataset.name = "cifar10"
    config.image_size = 32
    config.augment = "pad_crop"
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.learning_rate = 2e-3
    config.warmup_steps = 500
    config.batch_size = 128
    config.eval_batch_size = 500
    config.num_steps = 16 * 390
    config.log_every_steps = 20
    config.eval_every_steps = 780  # two epochs
    config.checkpoint_every_steps = 130
    if arg == "eight":
        config.dataset.classes = EIGHT
        config.num_steps = 8 * 312
        config.eval_every_steps = 624
    return config
