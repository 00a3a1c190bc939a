"""Fine-tunes a micro ViT, pretrained without cats and dogs, on cat vs. dog: Li's comparison, with ablations.

    python train.py --config configs/two_classes.py:full          all parameters (the default)
    python train.py --config configs/two_classes.py:mlp           the MLP layers and the head
    python train.py --config configs/two_classes.py:attention     the attention layers and the head
    python train.py --config configs/two_classes.py:lora          LoRA weights of queries and values, and the head
    python train.py --config configs/two_classes.py:head          only the head, on cached features
    python train.py --config configs/two_classes.py:scratch       all parameters, randomly initialized, SGD
    python train.py --config configs/two_classes.py:scratch_adam  the same with Adam
    python train.py --config configs/two_classes.py:resnet        a small ResNet, randomly initialized
    python train.py --config configs/two_classes.py:full-NAME     with one of `ABLATIONS`, settings of cifar100_li.py
    python train.py --config configs/two_classes.py:full-all      with all of them

`make study` trains all of them with three seeds. Before, it trains the checkpoint that all but `scratch`,
`scratch_adam` and `resnet` start from:

    python train.py --config configs/cifar10_micro.py:eight
    python -m vit_jax.export --workdir runs/cifar10_micro-eight --format npz --out runs/ViT-micro_4-eight.npz

10,000 training and 2,000 test images, 5 epochs, a minute or two on two CPU cores. Test accuracy on a JPEG copy of the
images, three seeds: full 0.723, mlp 0.716, attention 0.714, lora 0.705, head 0.686, scratch 0.618, scratch_adam 0.638,
resnet 0.762; benchmarks/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import base, models

_STEPS_PER_EPOCH = base.steps_per_epoch(10_000, 64)
ABLATIONS = {
    "test_augment": {"ablation.test_augment": "square_crop"},
    "cifar_mean_std": {"image_mean": (0.4914, 0.4822, 0.4465), "image_std": (0.247, 0.2435, 0.2616)},
    "schedule_100_epochs": {
        "ablation.schedule_steps": 100 * _STEPS_PER_EPOCH,
        "ablation.schedule_every_steps": _STEPS_PER_EPOCH,
    },
    "no_warmup": {"warmup_steps": 0},
    "no_clip": {"optimizer.clip_norm": 0.0},
    "weight_decay": {"optimizer.weight_decay": 1e-4},
    "xavier_head": {"ablation.head_init": "xavier"},
    "exact_gelu": {"model.gelu_approximate": False},
    "dropout": {"model.dropout_rate": 0.1},
}
PRETRAINED = ("full", "mlp", "attention", "lora", "head")
FROM_SCRATCH = ("scratch", "scratch_adam", "resnet")
ARGUMENTS = (*PRETRAINED, *FROM_SCRATCH, *(f"full-{name}" for name in (*ABLATIONS, "all")))


def get_config(arg: str = "full") -> ConfigDict:
    """Returns the config; `arg`: one of `ARGUMENTS`."""
    base.check_argument(arg, ARGUMENTS, __file__)
    mode, _, ablation = arg.partition("-")
    config = base.get_config()
    config.dtype = "auto"
    config.mesh.cpu_devices = 0
    config.dataset.name = "cifar10"
    config.dataset.classes = ("cat", "dog")
    config.augment = "none" if mode == "head" else "square_crop"
    config.optimizer.clip_norm = 1.0
    config.learning_rate = 0.01
    config.warmup_steps = 78  # 10 %
    config.batch_size = 64
    config.eval_batch_size = 100
    config.num_steps = 5 * _STEPS_PER_EPOCH
    config.eval_every_steps = config.checkpoint_every_steps = _STEPS_PER_EPOCH
    if mode == "resnet":  # images are enlarged, as in cifar100_resnet50.py, since the root downsamples them by 4
        config.architecture = "resnet50"
        config.model = ConfigDict({"units": (1, 1, 1), "width": 32})
        config.image_size = 64
    else:
        config.model = models.get_config("micro_4")
        config.image_size = 32
    if mode in PRETRAINED:
        config.pretrained = "runs/ViT-micro_4-eight.npz"
        config.trainable = mode
    if mode == "lora":
        config.learning_rate = 0.05
    if mode == "scratch_adam":
        config.optimizer.name = "adam"
        config.learning_rate = 1e-3
    if mode == "resnet":
        config.learning_rate = 0.1
    for name in ABLATIONS if ablation == "all" else filter(None, [ablation]):
        config.update_from_flattened_dict(ABLATIONS[name])
    return config
