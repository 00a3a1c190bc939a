"""Lists the pretrained checkpoints that are loaded by name, with their sizes."""

import math
from typing import NamedTuple

from vit_jax.config import model_sizes
from vit_jax.models import create_model
from vit_jax.pretrained.released import RELEASED
from vit_jax.pretrained.sizes import POSITION_KEY, parameter_shapes
from vit_jax.runtime.arguments import create_parser, parse_arguments

_AUGREG_VARIANTS = "Ti_16 S_16 S_32 B_8 B_16 B_32 L_16 R_Ti_16 R26_S_32 R50_L_32"
_DATA = {  # start of a name -> (resolution, pretraining data); the first that fits
    "micro": (32, "CIFAR-10"),
    "imagenet21k/": (224, "ImageNet-21k"),
    "imagenet21k+imagenet2012/": (384, "ImageNet-21k, then ImageNet-2012"),
    "augreg/": (224, "ImageNet-21k"),
    "sam/": (224, "ImageNet-2012, SAM"),
    "gsam/": (224, "ImageNet-2012, GSAM"),
    "big_vision/": (224, "ImageNet-2012"),
    "bit_models/BiT-M": (224, "ImageNet-21k"),
    "bit_models/BiT-S": (224, "ImageNet-2012"),
}
NAMES = ("micro", *RELEASED, *(f"augreg/{variant}" for variant in _AUGREG_VARIANTS.split()))
"""Names that `pretrained.resolve` accepts; besides these, "augreg/" and any file name of AugReg."""


class Entry(NamedTuple):
    """A pretrained checkpoint."""

    name: str
    num_parameters: int  # without pre_logits and head, which fine-tuning replaces
    resolution: int  # height and width of images in pretraining, pixels
    patch_size: int  # pixels; 0 for a ResNet, which has no patches
    data: str  # of pretraining


def main(argv: list[str] | None = None) -> int:
    """Prints the table, row by row, as parameters take a while to count."""
    parser = create_parser(
        "python -m vit_jax.pretrained",
        "List the pretrained checkpoints that --model and config.pretrained take by name.",
        "--list",
        "--list augreg",
    )
    parser.add_argument(
        "--list", nargs="?", default="", const="", metavar="TEXT", help="names with TEXT (default: all)"
    )
    text = parse_arguments(parser, argv).list
    names = [name for name in NAMES if text in name]
    if not names:
        parser.error(f"no name contains {text!r}; --list without a text prints all")
    print(f"{'name':<38}{'parameters':>10}{'resolution':>12}{'patch':>7}  pretraining data")
    for entry in map(describe, names):
        millions, patch = f"{entry.num_parameters / 1e6:.1f} M", f"{entry.patch_size or '–'}"
        print(f"{entry.name:<38}{millions:>10}{entry.resolution:>12}{patch:>7}  {entry.data}", flush=True)
    print("Parameters are without pre_logits and head; resolution and patch are in pixels.")
    return 0


def describe(name: str) -> Entry:
    """Returns the entry of a name in `NAMES`."""
    resolution, data = next(value for start, value in _DATA.items() if name.startswith(start))
    variant = name.rpartition("/")[2].replace("ViT-", "").replace("+", "_")
    if variant.endswith("-224"):
        variant, resolution = variant.removesuffix("-224"), 224
    if variant.startswith("BiT-"):
        model = create_model("resnet50", {}, num_classes=None)
    elif variant.startswith("vit_s16_"):
        model = create_model("vit", {**model_sizes("S_16"), "pool": "mean"}, num_classes=None)
    else:
        model = create_model("vit", model_sizes("micro_4" if variant == "micro" else variant), num_classes=None)
    shapes = parameter_shapes(model, 1)  # of one patch, so that all resolutions share it
    num_parameters, patch_size = sum(map(math.prod, shapes.values())), 0
    if POSITION_KEY in shapes:
        patch_size = model.pixels_per_patch
        num_parameters += ((resolution // patch_size) ** 2 - 1) * shapes[POSITION_KEY][-1]
    return Entry(name, num_parameters, resolution, patch_size, data)
