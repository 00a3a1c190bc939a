"""Fine-tunes ViT-B/16, pretrained on ImageNet-21k, on CIFAR-100 at 224 px.

    python train.py --config configs/cifar100.py                  all parameters (":full")
    python train.py --config configs/cifar100.py:mlp              the MLP layers and the head
    python train.py --config configs/cifar100.py:attention        the attention layers and the head
    python train.py --config configs/cifar100.py:lora             LoRA weights of queries and values, and the head
    python train.py --config configs/cifar100.py:head             only the head, on cached features
    python train.py --config configs/cifar100.py:full_bwconrad    all parameters, settings of bwconrad/vit-finetune
    python train.py --config configs/cifar100.py:lora_bwconrad    the same for LoRA weights and the head

Hardware: one GPU; the batch is split into as few microbatches as fit its memory. On a CPU it takes days (the head:
minutes). The first run downloads 413 MB of weights and 169 MB of images.
Time: not yet measured. Test accuracy: not yet measured; results of other work with other settings are in `PUBLISHED`.
The head trains for 50 epochs × 256, the others for 5,000 steps × 128.

`full_bwconrad` and `lora_bwconrad` differ from `full` and `lora` as follows: no gradient clipping, a random head, and
the exact GELU and layer norm epsilon of the Hugging Face model that bwconrad fine-tunes. What remains different from
bwconrad: crops of 5 to 100 % of the area with uniform aspect ratio, there 8 to 100 % and log-uniform; a Xavier-uniform
head, there normal with std 0.02; bfloat16 or float32, there float16 mixed precision; the result is that of the last
step, there possibly of the best of ten evaluations on the test images.
"""

from ml_collections import ConfigDict

from configs import base, models

ARGUMENTS = ("full", "mlp", "attention", "lora", "head", "full_bwconrad", "lora_bwconrad")

# Test accuracies of ViT-B/16, pretrained on ImageNet-21k, and settings that differ from `full` and `lora`.
# Li: "Fine-tuning of ViT-B16 on CIFAR-10 and CIFAR-100", github.com/ZipperLii/ViT-B16-on-CIFAR100; all differences are
# in cifar100_li.py. bwconrad: github.com/bwconrad/vit-finetune; its validation images are the test images, and the best
# checkpoint is kept. google-research: github.com/google-research/vision_transformer.
LI = "CIFAR-100 mean and std, no warm-up, no clipping, L2 of 1e-4, random crops of test images"
BWCONRAD = "no clipping, crops of 8 to 100 %, random head, one seed, possibly the best of 10 evaluations on test images"
_FULL_BWCONRAD = ("cifar100", f"bwconrad: full, 5,000 steps × 128; {BWCONRAD}", 0.9289)
_LORA_BWCONRAD = ("cifar100", f"bwconrad: LoRA of rank 8, alpha 8, 5,000 steps × 128; {BWCONRAD}", 0.9240)
PUBLISHED = {
    "full": (
        ("cifar100", f"Li: full, 20 epochs × 64; {LI}", 0.6691),
        _FULL_BWCONRAD,
        ("cifar100", "google-research: full, 10,000 steps × 512; 384 px, learning rate 0.03", 0.9206),
    ),
    "mlp": (("cifar100", f"Li: MLP layers, norms before them, and head, 20 epochs × 64; {LI}", 0.9248),),
    "lora": (_LORA_BWCONRAD,),
    "head": (("cifar100", f"Li: head, 50 epochs × 256; {LI}", 0.7726),),
    "full_bwconrad": (_FULL_BWCONRAD,),
    "lora_bwconrad": (_LORA_BWCONRAD,),
}


def get_config(arg: str = "full") -> ConfigDict:
    """Returns the config; `arg`: one of `ARGUMENTS`, the trainable parameters with or without "_bwconrad"."""
    base.check_argument(arg, ARGUMENTS, __file__)
    mode, _, bwconrad = arg.partition("_")
    config = base.get_config()
    config.model = models.get_config("B_16")
    config.pretrained = "imagenet21k/ViT-B_16"
    config.dtype = "auto"
    config.accumulation_steps = 0
    config.dataset.name = "cifar100"
    config.image_size = 224
    config.trainable = mode
    config.learning_rate = 0.05 if mode == "lora" else 0.01
    config.reference_results = PUBLISHED.get(arg, ())
    if mode == "head":
        config.batch_size = 256
        config.num_steps = 50 * base.steps_per_epoch(50_000, 256)
    else:
        config.augment = "inception"
        config.optimizer.clip_norm = 1.0
        config.warmup_steps = 500
        config.batch_size = 128
        config.num_steps = 5000
    if bwconrad:
        config.optimizer.clip_norm = 0.0
        config.ablation.head_init = "xavier"
        config.model.gelu_approximate = False
        config.model.layer_norm_epsilon = 1e-12
    return config
