"""Fine-tunes ViT-B/16 from the ImageNet-21k file on CIFAR-100, at 224 px.

    python train.py --config configs/cifar100.py             all parameters (":full")
    python train.py --config configs/cifar100.py:head        the head alone, on a frozen backbone

Hardware: one GPU; on less than 24 GB add `--config.accumulation_steps=4`; on a CPU add `--config.dtype=float32`, and
expect days. Both files are downloaded on the first run: 413 MB of weights, 169 MB of pictures.

full: 5,000 steps × 128; published for these settings: 0.9289. Not yet measured here.
head: 50 epochs × 256; the study that this project carries on reached 0.7726. Not yet measured here.
"""

from ml_collections import ConfigDict

from configs import base, models


def get_config(arg: str = "full") -> ConfigDict:
    """The recipe; `arg`: "full" or "head"."""
    if arg not in ("full", "head"):
        raise ValueError(f"configs/cifar100.py takes full or head, got {arg!r}")
    config = base.get_config()
    config.model = models.get_config("B_16")
    config.pretrained = "imagenet21k/ViT-B_16"
    config.dtype = "bfloat16"
    config.dataset.name = "cifar100"
    config.image_size = 224
    config.trainable = arg
    config.learning_rate = 0.01
    if arg == "full":
        config.augment = "inception"
        config.optimizer.clip_norm = 1.0
        config.warmup_steps = 500
        config.batch_size = 128
        config.num_steps = 5000
    else:
        config.batch_size = 256
        config.num_steps = 50 * 195
    return config
