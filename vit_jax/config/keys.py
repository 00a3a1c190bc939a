"""Config keys: default, type, range and meaning of each."""

import ast
import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from vit_jax.runtime.errors import UsageError

MODES = ("full", "head", "mlp", "attention", "bias", "lora")  # of `trainable`; patterns are in `training.optim`
_ABOVE_0, _BELOW_1 = math.nextafter(0, 1), math.nextafter(1, 0)
_INT32_MAX, _FLOAT32_MAX = 2**31 - 1, 1e38  # steps and seeds are int32 on the device
DEFAULT_NUM_STEPS, _EVAL_EVERY_STEPS = 1000, 500  # without num_epochs


class Check(NamedTuple):
    """Type and range of a value."""

    expected: str
    accepts: Callable[[Any], bool]


def _is_number(value: object, low: float = 0.0, high: float = _FLOAT32_MAX, types: Any = int | float) -> bool:
    return isinstance(value, types) and not isinstance(value, bool) and low <= value <= high


_is_integer = partial(_is_number, high=_INT32_MAX, types=int)


def _is_pattern(value: object) -> bool:
    try:
        with warnings.catch_warnings(action="error", category=FutureWarning):  # "[[:alpha:]]" is not supported
            return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError, FutureWarning):
        return False


def _are(value: object, check: Callable[[Any], bool], lengths: range = range(_INT32_MAX)) -> bool:
    return isinstance(value, tuple | list) and len(value) in lengths and all(map(check, value))


def _are_3_numbers(value: object, low: float = 0.0) -> bool:
    return _are(value, partial(_is_number, low=low, high=1), range(3, 4))


def _one_of(*choices: str) -> Check:
    return Check(f"one of {', '.join(choices)}", choices.__contains__)


def _are_augmentations(names: tuple[object, ...] | list[object]) -> bool:
    others = names[1:] if names and names[0] in _CROPS else names
    return len(names) > 0 and all(name in _OPS and others.count(name) == 1 for name in others)


_POSITIVE = Check("a positive integer below 2^31", partial(_is_integer, low=1))
_COUNT = Check("a non-negative integer below 2^31", partial(_is_integer, low=0))
_NUMBER = Check("a non-negative number", _is_number)
_FRACTION = Check("a number in [0, 1)", partial(_is_number, high=_BELOW_1))
_STRING = Check("a string", lambda value: isinstance(value, str))
_NAME = Check("a non-empty string", lambda value: isinstance(value, str) and value != "")
_STRINGS = Check("a tuple of strings", partial(_are, check=_STRING.accepts))
_DTYPE = _one_of("float32", "bfloat16")
_CROPS, _OPS = ("flip", "pad_crop", "square_crop", "inception"), ("trivial", "color_jitter", "erase")
_AUGMENT = _one_of("none", *_CROPS)
_AUGMENTS = Check(
    f"one of {', '.join(('none', *_CROPS, *_OPS))}, or a tuple of different ones except none, of which "
    "only the first may flip or crop",
    lambda value: _are_augmentations(value) if isinstance(value, tuple | list) else value in ("none", *_CROPS, *_OPS),
)
_PATTERNS = Check("a tuple of regular expressions", partial(_are, check=_is_pattern, lengths=range(1, _INT32_MAX)))
_RESULTS = Check(
    "a tuple of (dataset, label, accuracy)", partial(_are, check=lambda row: [*map(type, row)] == [str, str, float])
)
_TRAINABLE = Check(f"one of {', '.join(MODES)}, or {_PATTERNS.expected}", lambda x: x in MODES or _PATTERNS.accepts(x))


class Key(NamedTuple):
    """A config key, `--config.NAME=VALUE` on the command line."""

    name: str
    default: Any
    check: Check
    doc: str  # meaning and unit
    resumable: bool = False  # may change on resume, as results do not depend on it


# fmt: off
KEYS = (
    Key("seed", 0, _COUNT, "seed of initialization, image order, augmentation and dropout"),
    Key("architecture", "vit", _one_of("vit", "resnet50"), "Vision Transformer, or ResNet-50 (BiT)"),
    Key("model", {}, Check("a ConfigDict", lambda value: isinstance(value, dict)),
        "constructor arguments of the model; missing sizes are read from the pretrained checkpoint; attention is auto, "
        "xla or cudnn: auto, the default, takes the faster one on a GPU in bfloat16"),
    Key("dtype", "float32", _one_of("auto", "float32", "bfloat16"),
        "dtype of activations and matrix products; parameters are always float32; auto: bfloat16 on TPUs and on GPUs "
        "of compute capability 8.0 or higher, float32 elsewhere"),
    Key("pretrained", "", _STRING,
        'checkpoint such as "imagenet21k/ViT-B_16", "augreg/B_16" or "micro", or a path; "" trains from scratch'),

    Key("dataset.name", "", _STRING,
        'cifar10 | cifar100 | digits | folder:DIR | csv:FILE | tfds:NAME; "" for a dataset given from Python'),
    Key("dataset.data_dir", "", _STRING, 'archive or directory on disk; "" downloads into the cache', resumable=True),
    Key("dataset.train_split", "train", _NAME, 'may be a slice, such as "train[:90%]"'),
    Key("dataset.test_split", "test", _NAME, "must not overlap with the other splits"),
    Key("dataset.validation_split", "", _STRING,
        'for choices in training, such as "train[90%:]"; "": that of a folder or CSV, or the one made by '
        "validation_fraction; none for other datasets"),
    Key("dataset.test_fraction", 0.2, _FRACTION,
        "of the images of each class, for the test split of a folder or CSV that has none"),
    Key("dataset.validation_fraction", 0.1, _FRACTION,
        "of the other training images of each class, for the validation split of a folder or CSV that has none"),
    Key("dataset.split_seed", 0, _COUNT,
        "seed of the splits that are made, and of slices of a folder or CSV; `seed` has no effect on them"),
    Key("dataset.damaged", "error", _one_of("error", "skip"),
        "images that cannot be decoded; error: the run stops and lists them; skip: it lists them and leaves them out"),
    Key("dataset.classes", (), _STRINGS, "names of the classes to keep; () keeps all"),
    Key("dataset.sampling", "uniform", _one_of("uniform", "balanced"),
        "uniform: an epoch has every training image once; balanced: equally many images of each class, those of rare "
        "classes repeated"),
    Key("dataset.storage", "auto", _one_of("auto", "memory", "stream"),
        "memory: images are decoded once and kept on the device; stream: they are decoded at every step; auto: memory "
        "if half of it is enough, but stream for crops of large or differently sized images; same results"),
    Key("dataset.test_resize", "auto", _one_of("auto", "squash", "center_crop"),
        "resize of test images, and of training images that augment does not crop; squash: the whole image; "
        "center_crop: short side to image_size / 0.875, then the center; auto: center_crop for folder:DIR and "
        "csv:FILE, otherwise squash"),
    Key("dataset.num_workers", 0, Check("an integer from 0 to 1,024", partial(_is_integer, low=0, high=1024)),
        "processes that decode streamed images; 0: one per available CPU", resumable=True),
    Key("image_size", 224, Check("an integer from 1 to 16,384", partial(_is_integer, low=1, high=16_384)),
        "height and width of the model's input, pixels"),
    Key("image_mean", (0.5, 0.5, 0.5), Check("three numbers in [0, 1]", _are_3_numbers),
        "mean of red, green and blue; the model's input is (image - mean) / std, in [-1, 1] by default"),
    Key("image_std", (0.5, 0.5, 0.5), Check("three numbers in (0, 1]", partial(_are_3_numbers, low=_ABOVE_0)),
        "std of red, green and blue"),
    Key("augment", "none", _AUGMENTS,
        "augmentations of training images, applied in order; pad_crop, square_crop and inception also flip; trivial: "
        "TrivialAugment"),

    Key("trainable", "full", _TRAINABLE,
        "parameters to train: a mode, or regular expressions that match whole paths; mlp, attention, bias and lora "
        "include the head, bias also norms; a pattern that names lora, as in '(lora|head)/.*', adds LoRA weights"),
    Key("features", "auto", _one_of("auto", "cached", "fresh"),
        "auto: caches the features of a frozen backbone unless images are augmented; cached: even if they are"),
    Key("feature_views", 1, _POSITIVE, "cached augmented views of each image; an epoch uses one of them"),
    Key("lora.rank", 8, _POSITIVE, "rank of the LoRA weights"),
    Key("lora.alpha", 8.0, Check("a positive number", partial(_is_number, low=_ABOVE_0)), "LoRA scale, alpha / rank"),
    Key("lora.targets", (".*/query/kernel", ".*/value/kernel"), _PATTERNS, "paths of kernels that get LoRA weights"),

    Key("optimizer.name", "sgd", _one_of("sgd", "adam", "adamw"), "optimizer; only sgd has momentum"),
    Key("optimizer.momentum", 0.9, _FRACTION, "momentum of sgd"),
    Key("optimizer.momentum_dtype", "float32", _DTYPE, "dtype of the momentum; bfloat16 halves the optimizer's memory"),
    Key("optimizer.weight_decay", 0.0, _NUMBER, "sgd, adam: L2, added to the gradient; adamw: decoupled"),
    Key("optimizer.decayed", "all", _one_of("all", "kernels"),
        "parameters with weight decay; kernels excludes norms, biases, position embeddings and cls"),
    Key("optimizer.layer_decay", 1.0, Check("a number in (0, 1]", partial(_is_number, low=_ABOVE_0, high=1)),
        "layer-wise learning rate decay: factor from each block to the one below"),
    Key("optimizer.clip_norm", 0.0, _NUMBER, "maximum global gradient norm, before weight decay; 0: no clipping"),
    Key("learning_rate", 0.01, _NUMBER, "peak of the schedule"),
    Key("schedule", "cosine", _one_of("cosine", "linear", "constant"), "cosine and linear decay to zero at num_steps"),
    Key("warmup_steps", 0, _COUNT, "updates of linear warm-up; the first update has rate 0"),
    Key("label_smoothing", 0.0, _FRACTION, "fraction of the target probability spread over all classes"),
    Key("mixup_alpha", 0.0, _NUMBER, "mixing weights are sampled from Beta(alpha, alpha); 0: no mixup"),
    Key("cutmix_alpha", 0.0, _NUMBER, "the same for CutMix; with both, each image gets one of the two at random"),
    Key("ema_decay", 0.0, _FRACTION, "decay of the EMA parameters, at most (1 + step) / (10 + step); 0: no EMA"),

    Key("batch_size", 128, _POSITIVE, "images per update, over all devices and processes"),
    Key("eval_batch_size", 256, _POSITIVE, "images; rounded up to a multiple of the device count", resumable=True),
    Key("accumulation_steps", 1, _COUNT,
        "microbatches per update, to save memory; same update; 0: the smallest number that fits the device's memory, "
        "or, on resume, the run's number", resumable=True),
    Key("remat", "none", _one_of("none", "dots", "full"),
        "activations recomputed in the backward pass; dots: all but matrix products; full: all", resumable=True),
    Key("mesh.fsdp", 1, _POSITIVE, "devices that shard parameters and optimizer state", resumable=True),
    Key("mesh.data", 0, _COUNT, "data-parallel replicas; 0: devices / fsdp", resumable=True),
    Key("mesh.cpu_devices", 1, _COUNT,
        "devices that train.py splits a CPU into, which is faster for small models; 0: one per core, at most 8; the "
        "largest number that divides the batch is used", resumable=True),

    Key("num_epochs", 0, _COUNT,
        "passes over the training images; sets num_steps to num_epochs × (training images // batch_size); 0: use "
        "counts"),
    Key("num_steps", DEFAULT_NUM_STEPS, _COUNT, "updates; leave the default if num_epochs is set"),
    Key("log_every_steps", 10, _POSITIVE, "updates between training lines of metrics.jsonl", resumable=True),
    Key("eval_every_steps", 0, _COUNT,
        "updates between evaluations; one more at the end; 0: once per epoch with num_epochs, else every 500",
        resumable=True),
    Key("checkpoint_every_steps", 500, _POSITIVE, "updates; one more after each evaluation", resumable=True),
    Key("early_stopping_patience", 0, _COUNT,
        "the run ends after this many evaluations without a higher accuracy on validation, or on test without "
        "validation images; 0: off"),
    Key("reference_results", (), _RESULTS, "test accuracies of other work, for the report", resumable=True),

    # Only ablation runs set these.
    Key("ablation.test_augment", "none", _AUGMENT, "augmentation of test images, the same at every evaluation"),
    Key("ablation.schedule_steps", 0, _COUNT, "updates until the schedule ends; 0: num_steps"),
    Key("ablation.schedule_every_steps", 1, _POSITIVE, "updates between changes of the learning rate after warm-up"),
    Key("ablation.frozen_dropout", False, Check("True or False", lambda value: isinstance(value, bool)),
        "dropout also in a fully frozen backbone"),
    Key("ablation.head_init", "zeros", _one_of("zeros", "xavier"), "initializer of the new head's kernel"),
)
# fmt: on


_NAME_OR_TUPLE = ("trainable", "augment")  # keys whose value is a string or a tuple of strings

_OTHER_NAMES = {  # key -> names in other projects
    "pretrained": "model_name model_name_or_path checkpoint ckpt weights init_from",
    "dataset.num_workers": "workers",
    "dataset.sampling": "sampler balanced balance_classes class_weights weighted_sampler oversample upsample",
    "image_size": "img_size input_size resolution",
    "augment": "aug augmentation auto_augment aa trivial_augment randaugment rand_augment randaug color_jitter jitter "
    "erase random_erasing random_erase reprob",
    "trainable": "freeze mode",
    "optimizer.name": "opt optim",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.clip_norm": "clip clip_grad grad_clip grad_clip_norm max_grad_norm gradient_clip_val",
    "learning_rate": "lr base_lr peak_lr max_lr",
    "schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler sched decay_type",
    "warmup_steps": "warmup warmup_epochs num_warmup_steps",
    "label_smoothing": "smoothing",
    "mixup_alpha": "mixup",
    "cutmix_alpha": "cutmix",
    "ema_decay": "ema model_ema",
    "batch_size": "bs batch train_batch_size per_device_train_batch_size",
    "accumulation_steps": "accum grad_accum accum_steps gradient_accumulation_steps",
    "early_stopping_patience": "patience early_stopping",
    "num_epochs": "epochs max_epochs total_epochs num_train_epochs",
    "num_steps": "steps total_steps max_steps",
    "dtype": "fp16 bf16 amp precision half_precision",
    "model.dropout_rate": "dropout drop drop_rate",
    "model.stochastic_depth_rate": "drop_path drop_path_rate stochastic_depth",
}


def get_config() -> ConfigDict:
    """Returns the default config, locked against unknown keys; `model` is empty and unlocked.

    Examples:
        >>> from vit_jax import config
        >>> settings = config.get_config()
        >>> settings.optimizer.name = "adamw"
        >>> settings.update(learning_rate=1e-3, model={"dropout_rate": 0.1})
        >>> settings.batch_size
        128
    """
    tree: dict[str, Any] = {}
    for key in KEYS:
        group, _, name = key.name.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[name] = key.default
    references = {name: FieldReference(tree[name], field_type=object) for name in _NAME_OR_TUPLE}
    config = ConfigDict(tree | references).lock()
    config.model.unlock()
    return config


def check_key(name: str) -> None:
    """Raises UsageError unless `name` is a key, a group of keys or an argument of the model."""
    if name.startswith("model.") or any(name == key.name or key.name.startswith(f"{name}.") for key in KEYS):
        return
    near = suggest_key(name)
    advice = f"did you mean {near}?" if near else "`python -m vit_jax.config` prints all"
    raise UsageError(f"config.{name}: no such key; {advice}")


def suggest_key(name: str) -> str:
    """Returns the key that is most likely meant; "" if none is similar.

    If `name` is in epochs and the key in steps, the formula follows.
    """
    keys, last = [key.name for key in KEYS], name.rpartition(".")[2].replace("-", "_")
    near = [key for key, words in _OTHER_NAMES.items() if last.lower() in words.split()]
    near += [key for key in keys if key.rpartition(".")[2] == last]
    near += difflib.get_close_matches(name, keys, n=1)
    if not near:
        return ""
    epochs = "epoch" in name and near[0].endswith("steps")
    return f"{near[0]} = epochs × (training images // batch_size)" if epochs else near[0]


def to_tuple(name: str, text: str) -> str:
    """Converts a comma-separated list to Python syntax if key `name` is a tuple of strings; other text is unchanged.

    Commas inside brackets do not separate: "(a,b)/.*,head/.*" has two items.
    """
    if not any(key.name == name and key.check in (_STRINGS, _PATTERNS, _TRAINABLE, _AUGMENTS) for key in KEYS):
        return text
    if name in _NAME_OR_TUPLE and re.fullmatch(r"\w+", text):
        return text
    try:
        value = ast.literal_eval(text)
        if text.startswith(("(", "[")) or _STRINGS.accepts(value):
            return text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    items = re.split(r",(?![^()[\]{}]*[)\]}])", text)
    return repr(tuple(item.strip() for item in items if item.strip()))


def check_config(config: ConfigDict) -> None:
    """Raises UsageError for the first missing or invalid key; checks only what needs neither data nor model."""
    for complaint in _complaints(config):
        raise UsageError(complaint)


def _complaints(config: ConfigDict) -> Iterator[str]:
    if not isinstance(config, ConfigDict):
        yield f"config is a {type(config).__name__}; expected a ConfigDict, as from vit_jax.config.get_config()"
    values = flatten(config.to_dict(), leaf="model")
    for name in values:
        check_key(name)
    for key in KEYS:
        if key.name not in values:
            yield f"config.{key.name} is missing; start from vit_jax.config.get_config()"
        elif not key.check.accepts(values[key.name]):
            yield f"config.{key.name} is {values[key.name]!r}; expected {key.check.expected}"
    if "head_init" in config.model:
        yield "config.model.head_init: set config.ablation.head_init instead"
    if config.batch_size % (config.accumulation_steps or 1):
        yield f"config.accumulation_steps is {config.accumulation_steps}; it must divide batch_size {config.batch_size}"
    if config.warmup_steps > config.num_steps and not config.num_epochs:  # with num_epochs: in `resolve_steps`
        yield f"config.warmup_steps is {config.warmup_steps}; expected at most num_steps, {config.num_steps}"
    if 0 < config.ablation.schedule_steps <= config.warmup_steps:
        steps = config.ablation.schedule_steps
        yield f"config.ablation.schedule_steps is {steps}; expected more than warmup_steps, {config.warmup_steps}"


def resolve_steps(config: ConfigDict, *, steps_per_epoch: int) -> ConfigDict:
    """Returns a copy of the config whose num_steps follows from num_epochs, and eval_every_steps 0 from both.

    Raises UsageError if num_epochs and another num_steps are set, or the run is too long or shorter than its warm-up.
    """
    config, epochs = config.copy_and_resolve_references(), config.num_epochs
    if epochs:
        num_steps, found = epochs * steps_per_epoch, f"config.num_epochs is {epochs}"
        if config.num_steps not in (0, DEFAULT_NUM_STEPS, num_steps):
            raise UsageError(
                f"{found}, which is {num_steps} steps, and config.num_steps is {config.num_steps}; set one of them to 0"
            )
        if not config.warmup_steps <= num_steps <= _INT32_MAX:
            limits = f"warmup_steps, {config.warmup_steps}, to 2^31 - 1"
            raise UsageError(f"{found}, which is {num_steps} steps; expected from {limits}")
        config.num_steps = num_steps
    config.eval_every_steps = config.eval_every_steps or (steps_per_epoch if epochs else _EVAL_EVERY_STEPS)
    return config


def flatten(tree: dict[str, Any], prefix: str = "", *, leaf: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries, keys joined by dots; the dictionary of key `leaf` is kept."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        group = isinstance(value, dict) and name != leaf
        flat |= flatten(value, f"{prefix}{name}.") if group else {prefix + name: value}
    return flat
