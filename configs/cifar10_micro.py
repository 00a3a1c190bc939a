"""Trains the micro ViT from scratch on CIFAR-10 at 32 px; the checkpoint "micro" of the package was trained with it.

    python train.py --config configs/cifar10_micro.py          all classes, 72 epochs
    python train.py --config configs/cifar10_micro.py:eight    without cats and dogs, 36 epochs

AdamW, pad-and-crop and flip. Test accuracy on a JPEG copy of CIFAR-10, one seed: 0.767 in 80 minutes on two CPU cores
(benchmarks/RESULTS.md). On the original images: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base, models

EIGHT = ("airplane", "automobile", "bird", "deer", "frog", "horse", "ship", "truck")


def get_config(arg: str = "all") -> ConfigDict:
    """Returns the config; `arg`: "all" classes, or "eight"."""
    base.check_argument(arg, ("all", "eight"), __file__)
    steps_per_epoch = base.steps_per_epoch(50_000 if arg == "all" else 40_000, 64)
    config = base.get_config()
    config.model = models.get_config("micro_4")
    config.dtype = "auto"
    config.mesh.cpu_devices = 0
    config.dataset.name = "cifar10"
    config.dataset.classes = EIGHT if arg == "eight" else ()
    config.image_size = 32
    config.augment = "pad_crop"
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.learning_rate = 1e-3
    config.warmup_steps = 1000
    config.batch_size = 64
    config.eval_batch_size = 500
    config.num_steps = (72 if arg == "all" else 36) * steps_per_epoch
    config.log_every_steps = 50
    config.eval_every_steps = 2 * steps_per_epoch
    config.checkpoint_every_steps = 500
    return config
