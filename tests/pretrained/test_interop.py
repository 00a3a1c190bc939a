"""Tests of export to and import from Hugging Face transformers; they need the extra `interop`."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import vit_jax
from configs import digits
from vit_jax import export, trainer

pytestmark = [
    pytest.mark.slow,
    # Raised by transformers and torch on import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
torch = pytest.importorskip("torch", reason="needs the extra interop")
transformers = pytest.importorskip("transformers", reason="needs the extra interop")

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
}


def transformers_logits(model, processor, images):
    """Returns the logits of a transformers model for uint8 images, preprocessed by its processor."""
    with torch.no_grad():
        return model(**processor(images=list(images), return_tensors="pt")).logits.numpy()


@pytest.fixture(scope="module")
def images():
    """Crops of the sample images of scikit-learn."""
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    return np.stack([image[row : row + 16, 300:316] for image in (china, flower) for row in range(0, 400, 20)])


def test_export_safetensors_matches_logits_of_transformers(tmp_path, images):
    config = digits.get_config()
    config.update(num_steps=20, warmup_steps=5, eval_every_steps=20, checkpoint_every_steps=20)
    trainer.train_and_evaluate(config, tmp_path / "run")
    assert (
        export.main(["--workdir", str(tmp_path / "run"), "--format", "safetensors", "--out", str(tmp_path / "out")])
        == 0
    )
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "out")
    logits = vit_jax.load(tmp_path / "run").logits(images)
    assert np.abs(logits).max() > 0.2
    np.testing.assert_allclose(transformers_logits(model, processor, images), logits, atol=1e-5)
    assert list(model.config.id2label.values()) == [str(i) for i in range(10)]


@pytest.mark.parametrize("test_resize", ["squash", "center_crop"])
def test_export_safetensors_keeps_preprocessing_of_photographs(tmp_path, test_resize):
    """Pixels of transformers' processor differ by at most one level, as its two libraries for resizing round."""
    from sklearn.datasets import load_sample_images

    micro = vit_jax.load("micro")
    classifier = dataclasses.replace(micro, metadata=dataclasses.replace(micro.metadata, test_resize=test_resize))
    export.export_safetensors(classifier, tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    loaded = vit_jax.load(tmp_path / "out")
    assert loaded.metadata.test_resize == test_resize
    for i, photograph in enumerate(load_sample_images().images):
        image = Image.fromarray(photograph[:, : 300 + 200 * i])  # portrait, landscape
        image.save(tmp_path / f"{i}.png")
        decoded = loaded.decode(tmp_path / f"{i}.png")
        theirs = processor(images=[image], return_tensors="pt")["pixel_values"].numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(theirs, loaded.preprocess(decoded[None]), atol=2.01 / 255, rtol=0)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
def test_load_matches_logits_of_transformers(tmp_path, images, hidden_act):
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "cow"}
    config = transformers.ViTConfig(**SIZES, hidden_act=hidden_act, id2label=names, initializer_range=0.2)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.2] * 3
    )
    processor.save_pretrained(tmp_path)
    loaded = vit_jax.load(tmp_path)
    assert loaded.class_names == ("cat", "dog", "cow")
    expected = transformers_logits(model, processor, images)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(loaded.logits(images), expected, atol=2e-5)


def test_train_and_evaluate_fine_tunes_vit_model_without_head(tmp_path, images):
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**SIZES), add_pooling_layer=True).save_pretrained(tmp_path / "model")
    loaded = vit_jax.load(tmp_path / "model")
    assert not np.any(loaded.logits(images))
    config = digits.get_config()
    config.model = {}
    config.update(pretrained=str(tmp_path / "model"), num_steps=4, warmup_steps=0)
    config.update(eval_every_steps=4, checkpoint_every_steps=4)
    results = trainer.train_and_evaluate(config, tmp_path / "run")
    assert results["test/loss"] > 0
