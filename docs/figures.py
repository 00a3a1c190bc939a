"""Plots the figures of the README and the docs into docs/images: `python docs/figures.py`."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_images

import vit_jax
from vit_jax.models import VisionTransformer
from vit_jax.visualization import analysis, plotting

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Plots attention rollout of the micro ViT on scikit-learn's photographs."""
    china, flower = load_sample_images().images  # uint8 [427 640 3]
    images = np.stack([china[:426, :426], china[:426, 160:586], flower[:426, :426], flower[:426, 214:]])
    classifier = vit_jax.load("micro")
    assert isinstance(classifier.model, VisionTransformer)
    weights = analysis.attention_weights(classifier.model, classifier.params, classifier.preprocess(images))
    names = ["pagoda", "pagoda", "dahlia", "dahlia"]
    figure = plotting.plot_attention(images, analysis.attention_rollout(weights), names, title="Attention rollout")
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "rollout.png").write_bytes(plotting.to_png(figure, dpi=100))


if __name__ == "__main__":
    main()
