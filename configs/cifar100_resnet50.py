"""ResNet-50 (BiT) on CIFAR-100: what the Vision Transformer is compared with.

    python train.py --config configs/cifar100_resnet50.py               from random parameters (":scratch")
    python train.py --config configs/cifar100_resnet50.py:pretrained    from BiT-M-R50x1.npz (ImageNet-21k)
    python train.py --config configs/cifar100_resnet50.py:head          the head alone, on the file's stored features

The file, not fetched by itself: https://storage.googleapis.com/bit_models/BiT-M-R50x1.npz, put beside train.py or named
with --config.pretrained. pretrained: 10,000 steps × 512 at 128 px, rate 0.003 and mixup 0.1 as Kolesnikov et al. 2020
fine-tune on CIFAR, here with a cosine instead of three steps down. scratch: 200 epochs × 128 at 32 px. Hardware: one
GPU. The row of the study that this project carries on was left empty. Not yet measured here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "scratch") -> ConfigDict:
    """The recipe; `arg`: "scratch", "pretrained" or "head"."""
    if arg not in ("scratch", "pretrained", "head"):
        raise ValueError(f"configs/cifar100_resnet50.py takes scratch, pretrained or head, got {arg!r}")
    config = base.get_config()
    config.architecture = "resnet50"
    config.model = ConfigDict({"units": (3, 4, 6, 3), "width": 64})
    config.dataset.name = "cifar100"
    config.dtype = "bfloat16"
    if arg == "scratch":
        config.image_size = 32
        config.augment = "pad_crop"
        config.mixup_alpha = 0.1
        config.optimizer.weight_decay = 5e-4
        config.optimizer.decayed = "kernels"
        config.learning_rate = 0.1
        config.warmup_steps = 5 * 390
        config.batch_size = 128
        config.num_steps = 200 * 390
        config.eval_every_steps = config.checkpoint_every_steps = 5 * 390
        return config
    config.pretrained = "BiT-M-R50x1.npz"
    config.image_size = 128
    if arg == "head":
        config.trainable = "head"
        config.learning_rate = 0.01
        config.batch_size = 256
        config.num_steps = 50 * 195
    else:
        config.augment = "inception"
        config.mixup_alpha = 0.1
        config.learning_rate = 0.003
        config.warmup_steps = 500
        config.batch_size = 512
        config.num_steps = 10_000
    return config
