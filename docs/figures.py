"""Plots the figures of the README and the docs into docs/images: `python docs/figures.py`."""

from pathlib import Path

import jax
import numpy as np
from sklearn.datasets import load_sample_images

import vit_jax
from vit_jax.data import preprocess
from vit_jax.models import VisionTransformer
from vit_jax.runtime import rng
from vit_jax.visualization import analysis, plotting

IMAGES = Path(__file__).parent / "images"


AUGMENTATIONS = ("inception", "trivial", "color_jitter", "erase", ("inception", "trivial", "erase"))


def main() -> None:
    """Plots figures of scikit-learn's photographs, uint8 [427 640 3]."""
    china, flower = load_sample_images().images
    IMAGES.mkdir(exist_ok=True)
    plot_rollout(china, flower)
    plot_augmentations(china)


def plot_augmentations(photograph: np.ndarray) -> None:
    """Plots a photograph as the training step sees it, eight times with each augmentation."""
    keys = rng.step_keys(jax.random.PRNGKey(1), 0, 8)[0]
    images = np.repeat(photograph[None, :, 213:], len(keys), axis=0)
    prepare = jax.jit(preprocess.prepare, static_argnames=("image_size", "augment"))
    rows = {}
    for augment in AUGMENTATIONS:
        pixels = np.asarray(prepare(keys, images, image_size=224, augment=augment))
        name = augment if isinstance(augment, str) else ", ".join(augment)
        rows[f"augment = {name}"] = np.round(127.5 * pixels + 127.5).astype(np.uint8)
    figure = plotting.plot_rows(rows, title="Random augmentations of one photograph")
    (IMAGES / "augmentations.png").write_bytes(plotting.to_png(figure, dpi=100))


def plot_rollout(china: np.ndarray, flower: np.ndarray) -> None:
    """Plots attention rollout of the micro ViT."""
    images = np.stack([china[:426, :426], china[:426, 160:586], flower[:426, :426], flower[:426, 214:]])
    classifier = vit_jax.load("micro")
    assert isinstance(classifier.model, VisionTransformer)
    weights = analysis.attention_weights(classifier.model, classifier.params, classifier.preprocess(images))
    names = ["pagoda", "pagoda", "dahlia", "dahlia"]
    figure = plotting.plot_attention(images, analysis.attention_rollout(weights), names, title="Attention rollout")
    (IMAGES / "rollout.png").write_bytes(plotting.to_png(figure, dpi=100))


if __name__ == "__main__":
    main()
