"""Fine-tunes a micro ViT, pretrained without cats and dogs, on cat vs. dog; with ablations.

    python train.py --config configs/two_classes.py:full         all parameters (the default)
    python train.py --config configs/two_classes.py:mlp          the MLP layers and the head
    python train.py --config configs/two_classes.py:head         only the head, on cached features
    python train.py --config configs/two_classes.py:scratch      all parameters, randomly initialized
    python train.py --config configs/two_classes.py:full-NAME    with one of `ABLATIONS`, settings of cifar100_li.py
    python train.py --config configs/two_classes.py:full-all     with all of them

Needs `runs/ViT-micro_4-eight.npz`, made from `configs/cifar10_micro.py:eight` (README, "The micro ViT"). 10,000
training and 2,000 test images, 3 epochs: at most three minutes on two CPU cores. Test accuracy, three seeds, on a JPEG
copy of the images: full 0.685 ± 0.009, mlp 0.659 ± 0.003, head 0.660 ± 0.001, scratch 0.612 ± 0.001. The rest is in
benchmarks/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import base, models

_STEPS_PER_EPOCH = base.steps_per_epoch(10_000, 64)
ABLATIONS = {
    "test_augment": {"ablation.test_augment": "square_crop"},
    "pixels": {"image_mean": (0.4914, 0.4822, 0.4465), "image_std": (0.247, 0.2435, 0.2616)},
    "schedule": {
        "ablation.schedule_steps": 100 * _STEPS_PER_EPOCH,
        "ablation.schedule_every_steps": _STEPS_PER_EPOCH,
    },
    "warmup": {"warmup_steps": 0},
    "clip": {"optimizer.clip_norm": 0.0},
    "decay": {"optimizer.weight_decay": 1e-4},
    "head": {"ablation.head_init": "xavier"},
    "gelu": {"model.gelu_approximate": False},
    "dropout": {"model.dropout_rate": 0.1},
}
ARGUMENTS = ("full", "mlp", "head", "scratch", *(f"full-{name}" for name in (*ABLATIONS, "all")))


def get_config(arg: str = "full") -> ConfigDict:
    """Returns the config; `arg`: one of `ARGUMENTS`."""
    base.check_argument(arg, ARGUMENTS, __file__)
    mode, _, ablation = arg.partition("-")
    config = base.get_config()
    config.model = models.get_config("micro_4")
    config.pretrained = "" if mode == "scratch" else "runs/ViT-micro_4-eight.npz"
    config.dtype = "auto"
    config.dataset.name = "cifar10"
    config.dataset.classes = ("cat", "dog")
    config.image_size = 32
    config.augment = "none" if mode == "head" else "square_crop"
    config.trainable = "full" if mode == "scratch" else mode
    config.optimizer.clip_norm = 1.0
    config.learning_rate = 0.01
    config.warmup_steps = 47  # 10 %
    config.batch_size = 64
    config.eval_batch_size = 100
    config.num_steps = 3 * _STEPS_PER_EPOCH
    config.eval_every_steps = config.checkpoint_every_steps = _STEPS_PER_EPOCH
    for name in ABLATIONS if ablation == "all" else filter(None, [ablation]):
        config.update_from_flattened_dict(ABLATIONS[name])
    return config
