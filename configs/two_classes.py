"""Cats against dogs with the micro ViT that never saw either: does pre-training help, and which mistakes hurt?

    python train.py --config configs/two_classes.py:full        all parameters (the default)
    python train.py --config configs/two_classes.py:mlp         the MLP layers and the head
    python train.py --config configs/two_classes.py:head        the head alone, on stored features
    python train.py --config configs/two_classes.py:scratch     all parameters, from random ones

Needs `runs/ViT-micro_4-eight.npz`, made from `configs/cifar10_micro.py:eight` (README, "The micro ViT"); two CPU cores.
10,000 images train, 2,000 test, 3 epochs; at most three minutes. Three seeds on a JPEG copy of the images: full
0.685 ± 0.009, mlp 0.659 ± 0.003, head 0.660 ± 0.001, scratch 0.612 ± 0.001. `:full-MISTAKE` takes one setting of
`cifar100_seed.py`: MISTAKE is a key of `MISTAKES` below, or "all". More results: benchmarks/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import base, models

_EPOCH = 156  # whole batches of 64 pictures
MISTAKES = {
    "test_augment": {"test_augment": "square_crop"},
    "pixels": {"image_mean": (0.4914, 0.4822, 0.4465), "image_std": (0.247, 0.2435, 0.2616)},
    "schedule": {"schedule_steps": 100 * _EPOCH, "schedule_every_steps": _EPOCH},
    "warmup": {"warmup_steps": 0},
    "clip": {"optimizer.clip_norm": 0.0},
    "decay": {"optimizer.weight_decay": 1e-4},
    "head": {"model.head_init": "xavier"},
    "gelu": {"model.gelu_approximate": False},
    "dropout": {"model.dropout_rate": 0.1},
}
ARGUMENTS = ("full", "mlp", "head", "scratch", *(f"full-{mistake}" for mistake in (*MISTAKES, "all")))


def get_config(arg: str = "full") -> ConfigDict:
    """The recipe; `arg`: what trains, or "full-" and a mistake."""
    if arg not in ARGUMENTS:
        raise ValueError(f"configs/two_classes.py takes {', '.join(ARGUMENTS)}, got {arg!r}")
    mode, _, mistake = arg.partition("-")
    config = base.get_config()
    config.model = models.get_config("micro_4")
    config.pretrained = "" if mode == "scratch" else "runs/ViT-micro_4-eight.npz"
    config.dataset.name = "cifar10"
    config.dataset.classes = ("cat", "dog")
    config.image_size = 32
    config.augment = "none" if mode == "head" else "square_crop"
    config.trainable = "full" if mode == "scratch" else mode
    config.optimizer.clip_norm = 1.0
    config.learning_rate = 0.01
    config.warmup_steps = 47  # a tenth
    config.batch_size = 64
    config.eval_batch_size = 100
    config.num_steps = 3 * _EPOCH
    config.eval_every_steps = config.checkpoint_every_steps = _EPOCH
    for name in MISTAKES if mistake == "all" else filter(None, [mistake]):
        for key, value in MISTAKES[name].items():
            parent, _, key = key.rpartition(".")
            (config[parent] if parent else config)[key] = value
    return config
