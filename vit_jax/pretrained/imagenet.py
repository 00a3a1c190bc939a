"""The classes of ImageNet-2012, in the order of the pretrained heads."""

import functools
import importlib.resources


@functools.cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """Returns (WordNet ID, name) of the 1,000 classes, such as ("n01440764", "tench").

    Names are unique: if two synsets share their first lemma, another lemma or that of the parent is added.

    Source:
        Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition Challenge"; names from WordNet 3.0, Copyright
        2006 by Princeton University, under its own licence (assets/WORDNET_LICENSE.txt).
    """
    text = (importlib.resources.files("vit_jax") / "assets" / "imagenet2012_classes.txt").read_text()
    number_and_names = [line.split(" ", maxsplit=1) for line in text.splitlines()]
    return tuple((number, name) for number, name in number_and_names)


def canonical_name(name: str) -> str:
    """Returns the WordNet ID of an ImageNet class, given by name or ID; returns other names unchanged."""
    return _numbers().get(name.replace("_", " "), name)


@functools.cache
def _numbers() -> dict[str, str]:
    return {name: number for number, name in imagenet_classes()}
