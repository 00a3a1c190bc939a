"""Trains or fine-tunes ResNet-50 (BiT) on CIFAR-100, for comparison with the Vision Transformer.

    python train.py --config configs/cifar100_resnet50.py               from random parameters (":scratch")
    python train.py --config configs/cifar100_resnet50.py:pretrained    from BiT-M-R50x1 (ImageNet-21k)
    python train.py --config configs/cifar100_resnet50.py:head          the same, only the head, on cached features

Images are resized to 128 px, as in Kolesnikov et al. 2020: the root downsamples them by 4, so that the first block
has 32 × 32 positions, the original resolution.

scratch: 200 epochs × 128. pretrained: 10,000 steps × 512, learning rate 0.003, warm-up 500 and mixup 0.1 as in the
paper, but a cosine schedule instead of step decay, and squares of 64 to 100 % of the area instead of 64 %.
`--config.pretrained=bit_models/BiT-S-R50x1` uses the checkpoint of ImageNet-2012 instead.

Hardware: one GPU. Time and test accuracy: not yet measured. Li (see `cifar100_li.py`) lists a ResNet-50 without a
result.
"""

from ml_collections import ConfigDict

from configs import base

ARGUMENTS = ("scratch", "pretrained", "head")


def get_config(arg: str = "scratch") -> ConfigDict:
    """Returns the config; `arg`: one of `ARGUMENTS`."""
    base.check_argument(arg, ARGUMENTS, __file__)
    config = base.get_config()
    config.architecture = "resnet50"
    config.model = ConfigDict({"units": (3, 4, 6, 3), "width": 64})
    config.dataset.name = "cifar100"
    config.dtype = "auto"
    config.accumulation_steps = 0
    config.image_size = 128
    if arg == "scratch":
        steps_per_epoch = base.steps_per_epoch(50_000, 128)
        config.augment = "pad_crop"
        config.mixup_alpha = 0.1
        config.optimizer.weight_decay = 5e-4
        config.optimizer.decayed = "kernels"
        config.learning_rate = 0.1
        config.warmup_steps = 5 * steps_per_epoch
        config.batch_size = 128
        config.num_steps = 200 * steps_per_epoch
        config.eval_every_steps = config.checkpoint_every_steps = 5 * steps_per_epoch
        return config
    config.pretrained = "bit_models/BiT-M-R50x1"
    if arg == "head":
        config.trainable = "head"
        config.learning_rate = 0.01
        config.batch_size = 256
        config.num_steps = 50 * base.steps_per_epoch(50_000, 256)
    else:
        config.augment = "square_crop"
        config.mixup_alpha = 0.1
        config.learning_rate = 0.003
        config.warmup_steps = 500
        config.batch_size = 512
        config.num_steps = 10_000
    return config
