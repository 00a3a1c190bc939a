"""Every key of a run, once, with its unit and reason. A recipe copies this and sets only what its name says."""

from ml_collections import ConfigDict, FieldReference


def get_config(arg: str = "") -> ConfigDict:
    """The neutral values: a key that a recipe does not set changes nothing.

    Args:
        arg: what stands behind the colon in `--config configs/NAME.py:ARG`; this file knows none.
    """
    if arg:
        raise ValueError(f"configs/base.py takes none, got {arg!r}")
    config = ConfigDict()

    config.seed = 0  # of initialisation, order of pictures, augmentation, dropout
    config.architecture = "vit"  # "vit" | "resnet50" (BiT)
    # The module's constructor arguments; may stay empty where `pretrained` gives a file: sizes are read off it.
    config.model = ConfigDict()
    config.dtype = "float32"  # of activations and matmuls ("float32" | "bfloat16"); parameters are always float32
    # "" (from scratch) | a released name such as "imagenet21k/ViT-B_16" or "augreg/B_16" | "micro" | a file's path
    config.pretrained = ""

    config.dataset = ConfigDict()
    config.dataset.name = ""  # cifar10 | cifar100 | digits | folder:DIR | tfds:NAME
    config.dataset.data_dir = ""  # an archive or folder already on disk; "" downloads into the cache
    config.dataset.train_split = "train"  # may be sliced, as in "train[:90%]"
    config.dataset.test_split = "test"  # give "train[90%:]" to tune without looking at the test pictures
    config.dataset.classes = ()  # names of the classes to keep; () keeps all
    # Where the images of a folder or of TFDS are: "memory" (decoded once, kept on the device) | "stream" (decoded and
    # cropped for every step) | "auto": in memory if they take at most half of it; streamed also if they are cropped and
    # large or of different sizes. The results do not depend on it.
    config.dataset.storage = "auto"
    config.dataset.num_workers = 0  # processes that decode what is streamed; 0: one per available processor
    config.image_size = 224  # pixels, square: what the model sees
    # Pixels are (pixel / 255 - mean) / std, in red, green, blue; these take them to [-1, 1].
    config.image_mean = (0.5, 0.5, 0.5)
    config.image_std = (0.5, 0.5, 0.5)
    config.augment = "none"  # of training pictures: "none" | "flip" | "pad_crop" | "square_crop" | "inception"
    config.test_augment = "none"  # of test pictures; anything else is a mistake, to be able to show what it does

    # What trains: a mode's name, or a tuple of regular expressions over whole parameter paths.
    # Modes: full · head · mlp, attention (these and the head) · bias (biases, norms, head) · lora (LoRA weights, head).
    # A pattern that names them, such as "(lora|head)/.*", adds LoRA weights. The head must train if it starts at zero.
    config.trainable = FieldReference("full", field_type=object)
    config.frozen_dropout = False  # dropout where only the head trains, too; off, the backbone is a fixed function
    # Where the backbone is a fixed function and pictures are not augmented, its features are computed once ("auto").
    # "fresh": never; "cached": augmented pictures, too, each in `feature_views` views that the epochs take in turn.
    config.features = "auto"
    config.feature_views = 1

    config.lora = ConfigDict()
    config.lora.rank = 8
    config.lora.alpha = 16.0  # the products are scaled by alpha / rank
    config.lora.targets = (".*/query/kernel", ".*/value/kernel")  # regular expressions over paths; kernels only

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"  # "sgd" | "adam" | "adamw"
    config.optimizer.momentum = 0.9  # sgd only
    config.optimizer.momentum_dtype = "float32"  # sgd only; "bfloat16" halves the optimizer's memory
    config.optimizer.weight_decay = 0.0  # sgd, adam: L2 added to the gradient; adamw: decoupled
    config.optimizer.decayed = "all"  # "kernels" spares norms, biases, position embeddings and cls
    config.optimizer.clip_norm = 0.0  # global norm of the gradient, before anything else; 0 leaves it unclipped

    config.optimizer.layer_decay = 1.0  # factor on the rate from each block to the one below; 1 leaves rates equal

    config.learning_rate = 0.01  # the peak
    config.schedule = "cosine"  # to zero at num_steps: "cosine" | "linear" | "constant"
    config.schedule_steps = 0  # updates until the schedule's end; 0 takes num_steps
    config.schedule_every_steps = 1  # updates between two changes of the decay; the warm-up is not held
    config.warmup_steps = 0  # linear from rate 0 at the first update

    config.label_smoothing = 0.0  # share of the target spread over all classes
    config.mixup_alpha = 0.0  # Beta(alpha, alpha) shares of blended pictures; 0 for none
    config.cutmix_alpha = 0.0  # the same for pasted boxes; with both, each picture is mixed in one of the two ways
    # Of EMA parameters, which are then evaluated, besides the others; warmed up as min(decay, (1 + t) / (10 + t)).
    config.ema_decay = 0.0  # 0 keeps none

    config.batch_size = 128  # pictures per update, over all devices and processes
    config.eval_batch_size = 256  # upper bound, rounded up to a multiple of the devices; the last batch is padded
    config.accumulation_steps = 1  # splits batch_size to save memory; same update, dropout included
    # What blocks compute again for their backward pass to save memory: "none" | "dots" (all but products) | "full"
    config.remat = "none"
    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices that share one copy of the parameters and the optimizer's state
    config.mesh.data = 0  # copies; 0 takes as many as there are devices for

    config.num_steps = 1000  # updates
    config.log_every_steps = 10  # a line in metrics.jsonl; the only moments at which the host waits for the device
    config.eval_every_steps = 500  # over every test picture; always once more at the end
    config.checkpoint_every_steps = 500  # besides the one after every evaluation
    return config.lock()
