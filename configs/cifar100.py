"""Fine-tunes ViT-B/16, pretrained on ImageNet-21k, on CIFAR-100 at 224 px.

    python train.py --config configs/cifar100.py              all parameters (":full")
    python train.py --config configs/cifar100.py:mlp          the MLP layers and the head
    python train.py --config configs/cifar100.py:attention    the attention layers and the head
    python train.py --config configs/cifar100.py:lora         LoRA weights of queries and values, and the head
    python train.py --config configs/cifar100.py:head         only the head, on cached features

Hardware: one GPU; the batch is split into as many parts as fit its memory; on a CPU expect days (minutes for the head).
The first run downloads 413 MB of weights and 169 MB of images.
Time: not yet measured. Test accuracy: not yet measured; results of other work with similar settings are in `PUBLISHED`.
The head trains for 50 epochs × 256, the others for 5,000 steps × 128.
"""

from ml_collections import ConfigDict

from configs import base, models

ARGUMENTS = ("full", "mlp", "attention", "lora", "head")

# Test accuracies of ViT-B/16, pretrained on ImageNet-21k.
# Li: "Fine-tuning of ViT-B16 on CIFAR-10 and CIFAR-100", github.com/ZipperLii/ViT-B16-on-CIFAR100; see cifar100_li.py.
# bwconrad: github.com/bwconrad/vit-finetune; no gradient clipping; evaluated on the test images during training, and
# the best checkpoint is reported. google-research: github.com/google-research/vision_transformer.
PUBLISHED = {
    "full": (
        ("cifar100", "Li: full, 20 epochs × 64, CIFAR-100 mean and std, random crops of test images", 0.6691),
        ("cifar100", "bwconrad: full, 5,000 steps × 128, no clipping, best checkpoint", 0.9289),
        ("cifar100", "google-research: full, 10,000 steps × 512, 384 px", 0.9206),
    ),
    "mlp": (("cifar100", "Li: MLP layers and head, 20 epochs × 64, random crops of test images", 0.9248),),
    "lora": (("cifar100", "bwconrad: LoRA of rank 8, alpha 8, 5,000 steps × 128, best checkpoint", 0.9240),),
    "head": (("cifar100", "Li: head, 50 epochs × 256, random crops of test images", 0.7726),),
}


def get_config(arg: str = "full") -> ConfigDict:
    """Returns the config; `arg`: the trainable parameters, one of `ARGUMENTS`."""
    base.check_argument(arg, ARGUMENTS, __file__)
    config = base.get_config()
    config.model = models.get_config("B_16")
    config.pretrained = "imagenet21k/ViT-B_16"
    config.dtype = "auto"
    config.accumulation_steps = 0
    config.dataset.name = "cifar100"
    config.image_size = 224
    config.trainable = arg
    config.learning_rate = 0.05 if arg == "lora" else 0.01
    config.reference_results = PUBLISHED.get(arg, ())
    if arg == "head":
        config.batch_size = 256
        config.num_steps = 50 * base.steps_per_epoch(50_000, 256)
    else:
        config.augment = "inception"
        config.optimizer.clip_norm = 1.0
        config.warmup_steps = 500
        config.batch_size = 128
        config.num_steps = 5000
    return config
