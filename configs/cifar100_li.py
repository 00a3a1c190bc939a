"""Reproduces the fine-tuning runs of Li on CIFAR-100, with the settings of its code.

Li, "Fine-tuning of ViT-B16 on CIFAR-10 and CIFAR-100", github.com/ZipperLii/ViT-B16-on-CIFAR100.

    python train.py --config configs/cifar100_li.py:head           Li: 0.7726 (elsewhere in its text: 0.7266)
    python train.py --config configs/cifar100_li.py:mlp            Li: 0.9248
    python train.py --config configs/cifar100_li.py:full           Li: 0.6691 (the default)
    python train.py --config configs/cifar100_li.py:readme_head    the head, first configuration of its README
    python train.py --config configs/cifar100_li.py:readme_full    listed in its README without a result

Settings that differ from `cifar100.py:full`, besides epochs, batch size and the interval of evaluations, and the option
that resets each of them:

    test images are cropped and flipped at random            --config.ablation.test_augment=none
    images are normalized by CIFAR-100's statistics, while pre-training used [-1, 1]
                               --config.image_mean='(0.5,0.5,0.5)' --config.image_std='(0.5,0.5,0.5)'
    the cosine schedule always lasts 100 epochs              --config.ablation.schedule_steps=0
    the learning rate changes once an epoch                  --config.ablation.schedule_every_steps=1
    no warm-up                                               --config.warmup_steps=500
    no gradient clipping                                     --config.optimizer.clip_norm=1
    L2 of 1e-4 on every parameter                            --config.optimizer.weight_decay=0
    crops of 64 to 100 % of the area                         --config.augment=inception
    Xavier-uniform initialization of the head                --config.ablation.head_init=zeros
    exact GELU, while pre-training used the tanh form        --config.model.gelu_approximate=True
    dropout of 0.1, also in frozen layers                    --config.model.dropout_rate=0
    mlp also trains the norm before each MLP                 --config.trainable=mlp
    float32 activations                                      --config.dtype=auto

Its code and text disagree on epochs × batch size of full fine-tuning (20 × 64, 50 × 32 or 30 × 32; here 20 × 64), and
do not give the README's learning rates (here 0.01 for SGD, 0.001 for Adam) and the optimizer of its full run (here
SGD). Remaining differences: one resize from 32 px to the crop's 224 px instead of two, the last partial batch of an
epoch is dropped, and each test image is cropped in the same way at every evaluation.

Hardware and downloads: as in `cifar100.py`. Time and test accuracy: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base, cifar100, models

_MLP = (r".*/MlpBlock_3/.*", r".*/LayerNorm_2/.*", r"head/.*")  # with the norm before each MLP
_RUNS = {
    # arg: (trainable, optimizer, learning rate, batch size, epochs)
    "head": ("head", "sgd", 0.01, 256, 50),
    "mlp": (_MLP, "sgd", 0.01, 64, 20),
    "full": ("full", "sgd", 0.01, 64, 20),
    "readme_head": ("head", "adam", 0.001, 512, 100),
    "readme_full": ("full", "sgd", 0.01, 32, 60),
}


def get_config(arg: str = "full") -> ConfigDict:
    """Returns the config; `arg`: a key of `_RUNS`."""
    base.check_argument(arg, _RUNS, __file__)
    trainable, optimizer, learning_rate, batch_size, epochs = _RUNS[arg]
    steps_per_epoch = base.steps_per_epoch(50_000, batch_size)
    config = base.get_config()
    config.model = models.get_config("B_16", dropout_rate=0.1)
    config.model.gelu_approximate = False
    config.pretrained = "imagenet21k/ViT-B_16"
    config.dataset.name = "cifar100"
    config.image_size = 224
    config.image_mean = (0.5071, 0.4867, 0.4408)
    config.image_std = (0.2675, 0.2565, 0.2761)
    config.augment = "square_crop"
    config.trainable = trainable
    config.accumulation_steps = 0
    config.optimizer.name = optimizer
    config.optimizer.weight_decay = 1e-4
    config.learning_rate = learning_rate
    config.batch_size = batch_size
    config.num_steps = epochs * steps_per_epoch
    config.eval_every_steps = config.checkpoint_every_steps = steps_per_epoch
    config.reference_results = cifar100.PUBLISHED.get(arg, ())
    config.ablation.test_augment = "square_crop"
    config.ablation.schedule_steps = 100 * steps_per_epoch
    config.ablation.schedule_every_steps = steps_per_epoch
    config.ablation.frozen_dropout = True
    config.ablation.head_init = "xavier"
    return config
