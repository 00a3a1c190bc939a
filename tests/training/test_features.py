import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from sklearn.linear_model import LogisticRegression

from configs import digits
from vit_jax import data, pretrained, trainer
from vit_jax.data import preprocess
from vit_jax.run import load_run
from vit_jax.runtime import sharding
from vit_jax.training import build, features, steps


def head_config(**changes):
    """The head of the shipped micro ViT, on real pictures; three epochs of 22 steps."""
    config = digits.get_config()
    config.trainable = "head"
    config.learning_rate = 0.01
    config.update(num_steps=66, warmup_steps=5, log_every_steps=6, eval_every_steps=33, checkpoint_every_steps=10)
    config.update(changes)
    return config


def run(config, workdir):
    """The records of a run without what depends on the clock, and its parameters."""
    trainer.train_and_evaluate(config, workdir)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second", None)
    return records, flatten_dict(load_run(workdir).params, sep="/")


def test_stored_features_give_the_run_without_them(tmp_path):
    cached, cached_params = run(head_config(), tmp_path / "cached")
    fresh, fresh_params = run(head_config(features="fresh"), tmp_path / "fresh")
    assert len(cached) == len(fresh) == 13
    for ours, theirs in zip(cached, fresh, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for path, leaf in cached_params.items():
        np.testing.assert_allclose(leaf, fresh_params[path], atol=1e-5, rtol=0, err_msg=path)
    assert cached[-1]["test/accuracy"] > 0.5  # it learned


def test_train_and_evaluate_caches_the_same_features_for_any_eval_batch_size(tmp_path):
    """A resumed run may change `eval_batch_size`."""
    config = head_config(dtype="bfloat16", num_steps=22, eval_every_steps=22, eval_batch_size=360)
    _, params = run(config, tmp_path / "360")
    _, others = run(head_config(**{**config, "eval_batch_size": 17}), tmp_path / "17")
    np.testing.assert_array_equal(params["head/kernel"], others["head/kernel"])


@pytest.mark.parametrize("features", ["cached", "fresh"])
def test_evaluate_run_crops_test_images_as_training_did(tmp_path, features):
    """Test-time crops have keys of their own, whatever the seed."""
    config = head_config(features=features, seed=3, num_steps=22, eval_every_steps=22, warmup_steps=0)
    config.ablation.test_augment = "square_crop"
    results = trainer.train_and_evaluate(config, tmp_path)
    assert load_run(tmp_path).evaluate() == pytest.approx(results, abs=1e-5)


def micro():
    config = digits.get_config()
    source = build.load_source(config)
    model = build.create_model(config, source, num_classes=10)
    return model, build.create_params(config, model, source), data.load_dataset("digits", image_size=16)


def test_features_are_what_the_head_would_see():
    model, params, dataset = micro()
    images = dataset.test.images[:20]
    ours = features.extract_features(model, params, images, image_size=16, batch_size=7)
    assert ours.shape == (20, 96) and ours.dtype == np.float32
    inputs = preprocess.prepare(None, images, image_size=16)
    _, state = model.apply({"params": params}, inputs, capture_intermediates=True)
    tokens = state["intermediates"]["Transformer"]["encoder_norm"]["__call__"][0]
    np.testing.assert_allclose(ours, tokens[:, 0], atol=1e-5)


def test_features_serve_scikit_learn():
    model, params, dataset = micro()
    train, test = (
        features.extract_features(model, params, split.images, image_size=16) for split in (dataset.train, dataset.test)
    )
    probe = LogisticRegression(max_iter=1000).fit(train, dataset.train.labels)
    assert probe.score(test, dataset.test.labels) > 0.85


def test_views_are_drawn_picture_by_picture_and_view_by_view():
    mesh = sharding.create_mesh()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    model, params, _ = micro()
    params = sharding.device_put(params, sharding.replicated(mesh))

    def compute(**options):
        backbone = features.backbone(model)
        return np.asarray(features.apply_to_all(backbone, params, images, mesh, batch_size=8, **options))

    def flip(keys, images):
        return preprocess.prepare(keys, images, image_size=16, augment="flip")

    plain = compute(prepare=lambda keys, images: preprocess.prepare(None, images, image_size=16))
    mirrored = compute(prepare=lambda keys, images: preprocess.prepare(None, images[:, :, ::-1], image_size=16))
    views = compute(prepare=flip, num_views=4, seed=1)
    assert views.shape == (40, 96)
    same = np.isclose(views, np.tile(plain, (4, 1)), atol=1e-4).all(axis=1)
    other = np.isclose(views, np.tile(mirrored, (4, 1)), atol=1e-4).all(axis=1)
    assert (same ^ other).all() and 8 < same.sum() < 32
    by_view = same.reshape(4, 10)
    assert any((by_view[0] != by_view[view]).any() for view in (1, 2, 3))


def test_epochs_take_the_views_in_turn():
    permute = steps.make_permutation(10, 4, num_views=3)  # two steps an epoch
    for step, view in [(0, 0), (1, 0), (2, 1), (4, 2), (6, 0)]:
        rows = permute(types.SimpleNamespace(key=jax.random.PRNGKey(0), step=jnp.array(step)))
        assert sorted(np.asarray(rows)) == list(range(10 * view, 10 * view + 10))


def test_a_run_learns_from_augmented_views(tmp_path):
    records, _ = run(head_config(features="cached", feature_views=3, augment="pad_crop"), tmp_path)
    assert records[-1]["test/accuracy"] > 0.3  # one in ten is right by chance


def test_more_steps_at_once_are_the_steps_one_by_one():
    def train_step(state, images, labels, permutation):
        return state + 1, {"loss": images[permutation[state]] * 1.0}

    many = jax.jit(features.make_train_steps(train_step))
    images, permutation = jnp.arange(10.0), jnp.arange(10)[::-1]
    state, scalars = many(jnp.array(0), images, None, permutation, jnp.array(3))
    assert int(state) == 3 and float(scalars["loss"]) == 7.0  # the third step's


def test_pretrained_files_give_features_without_a_run():
    """The four lines of a notebook."""
    params = pretrained.load_npz(pretrained.resolve("micro"))
    model, _, dataset = micro()
    ours = features.extract_features(model, params, dataset.test.images[:4], image_size=32)
    assert ours.shape == (4, 96)
