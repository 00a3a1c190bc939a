"""ResNet-50 (BiT) on CIFAR-100: what the Vision Transformer is compared with.

    python train.py --config configs/cifar100_resnet50.py               from random parameters (":scratch")
    python train.py --config configs/cifar100_resnet50.py:pretrained    from BiT-M-R50x1 (ImageNet-21k)
    python train.py --config configs/cifar100_resnet50.py:head          the head alone, on the file's stored features

The released file is downloaded on the first run; `--config.pretrained=bit_models/BiT-S-R50x1` is that of ImageNet-2012.

Pictures are shown at 128 px, as Kolesnikov et al. 2020 do: the root makes a quarter of it, so that the first block sees
the 32 px that there are; shown at 32 px, the last block would see a single place.

pretrained: 10,000 steps × 512, rate 0.003, warm-up 500 and mixup 0.1 as there; with a cosine instead of three steps
down, and squares of 64 to 100 % of the area instead of 64 %. scratch: 200 epochs × 128. Hardware: one GPU. The row of
the study that this project carries on was left empty. Not yet measured here.
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
    config.image_size = 128
    if arg == "scratch":
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
    config.pretrained = "bit_models/BiT-M-R50x1"
    if arg == "head":
        config.trainable = "head"
        config.learning_rate = 0.01
        config.batch_size = 256
        config.num_steps = 50 * 195
    else:
        config.augment = "square_crop"
        config.mixup_alpha = 0.1
        config.learning_rate = 0.003
        config.warmup_steps = 500
        config.batch_size = 512
        config.num_steps = 10_000
    return config
