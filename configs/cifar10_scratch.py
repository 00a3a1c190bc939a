"""Trains ViTs on CIFAR-10 from random parameters.

    python train.py --config configs/cifar10_scratch.py:sgd      ViT-B/16 at 224 px, 50 epochs (the default)
    python train.py --config configs/cifar10_scratch.py:adam     the same with Adam and L2, 60 epochs
    python train.py --config configs/cifar10_scratch.py:small    a small ViT at 32 px, patches of 4, 200 epochs

sgd, adam: the two runs from scratch of the study that this project carries on, which reached 0.6327 with SGD and
overfitted after 20 epochs with Adam; its batch and rates for them are not known, those of its fine-tuning are taken.
small: the usual way to do it well on so few pictures; 0.90 is the aim. Hardware: one GPU. Not yet measured here.
"""

from ml_collections import ConfigDict

from configs import base, models

_EPOCH = {64: 781, 128: 390}  # whole batches of 50,000 pictures


def get_config(arg: str = "sgd") -> ConfigDict:
    """The recipe; `arg`: "sgd", "adam" or "small"."""
    if arg not in ("sgd", "adam", "small"):
        raise ValueError(f"configs/cifar10_scratch.py takes sgd, adam or small, got {arg!r}")
    config = base.get_config()
    config.dataset.name = "cifar10"
    config.dtype = "bfloat16"
    if arg == "small":
        config.model = models.get_config("S_16")
        config.model.patch_size = 4
        config.image_size = 32
        config.augment = "pad_crop"
        config.mixup_alpha, config.cutmix_alpha, config.label_smoothing = 0.2, 1.0, 0.1
        config.optimizer.name, config.optimizer.weight_decay, config.optimizer.decayed = "adamw", 0.05, "kernels"
        config.optimizer.clip_norm = 1.0
        config.learning_rate, config.warmup_steps = 1e-3, 10 * _EPOCH[128]
        config.batch_size, config.num_steps = 128, 200 * _EPOCH[128]
        config.eval_every_steps = config.checkpoint_every_steps = 5 * _EPOCH[128]
        return config
    config.model = models.get_config("B_16", dropout_rate=0.1)
    config.image_size = 224
    config.augment = "square_crop"
    config.optimizer.name = arg
    config.optimizer.weight_decay = 1e-4
    config.learning_rate = 0.01 if arg == "sgd" else 1e-4
    config.batch_size = 64
    config.num_steps = (50 if arg == "sgd" else 60) * _EPOCH[64]
    config.eval_every_steps = config.checkpoint_every_steps = _EPOCH[64]
    return config
