import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import digits
from vit_jax import trainer
from vit_jax.data.batches import Batch
from vit_jax.run import load_run
from vit_jax.training.steps import run_train_steps


def head_config(**changes):
    """Returns a config that trains the head of the bundled micro ViT on digits: three epochs of 22 steps."""
    config = digits.get_config()
    config.trainable = "head"
    config.learning_rate = 0.01
    config.update(num_steps=66, warmup_steps=5, log_every_steps=6, eval_every_steps=33, checkpoint_every_steps=10)
    config.update(changes)
    return config


def run(config, workdir):
    """Trains a model; returns the metrics without throughput, and the parameters."""
    trainer.train_and_evaluate(config, workdir)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second", None)
    return records, flatten_dict(load_run(workdir).params, sep="/")


def test_train_and_evaluate_with_cached_features_matches_uncached_run(tmp_path):
    cached, cached_params = run(head_config(num_steps=44), tmp_path / "cached")
    uncached, uncached_params = run(head_config(num_steps=44, features="fresh"), tmp_path / "uncached")
    assert len(cached) == len(uncached) == 10
    for record, expected in zip(cached, uncached, strict=True):
        assert record == pytest.approx(expected, abs=1e-5)
    for path, leaf in cached_params.items():
        np.testing.assert_allclose(leaf, uncached_params[path], atol=1e-5, rtol=0, err_msg=path)
    assert cached[-1]["test/accuracy"] > 0.5  # above the chance level of 0.1


@pytest.mark.slow
def test_train_and_evaluate_caches_same_features_for_any_eval_batch_size(tmp_path):
    """A resumed run may change `eval_batch_size`."""
    config = head_config(dtype="bfloat16", num_steps=5, eval_every_steps=5, eval_batch_size=360)
    config.dataset.train_split = "train[:320]"
    _, params = run(config, tmp_path / "360")
    _, others = run(head_config(**{**config, "eval_batch_size": 17}), tmp_path / "17")
    np.testing.assert_array_equal(params["head/kernel"], others["head/kernel"])


@pytest.mark.parametrize("features", ["cached", pytest.param("fresh", marks=pytest.mark.slow)])
def test_evaluate_applies_test_augment_as_in_training(tmp_path, features):
    """Keys of test-time crops do not depend on the seed."""
    config = head_config(features=features, seed=3, num_steps=5, eval_every_steps=5, warmup_steps=0)
    config.dataset.train_split = "train[:320]"
    config.ablation.test_augment = "square_crop"
    results = trainer.train_and_evaluate(config, tmp_path)
    assert load_run(tmp_path).evaluate() == pytest.approx(results, abs=1e-5)


@pytest.mark.slow
def test_train_and_evaluate_learns_from_augmented_views(tmp_path):
    config = head_config(features="cached", feature_views=3, augment="pad_crop")
    config.dataset.train_split = "train[:640]"
    records, _ = run(config, tmp_path)
    assert records[-1]["test/accuracy"] > 0.3  # above the chance level of 0.1


def test_run_train_steps_applies_updates_sequentially():
    def train_step(state, batch):
        return state + batch.inputs.sum(), {"loss": batch.inputs[0] * 1.0}

    train_step.batch_size = 2
    labels = jnp.array([0, 0, 0, 0, 0, 0, -1, -1])
    batch = Batch(jnp.arange(8.0), labels, labels)
    state, scalars = jax.jit(functools.partial(run_train_steps, train_step))(jnp.array(0.0), batch)
    assert float(state) == 15.0 and float(scalars["loss"]) == 4.0  # three updates; the loss is that of the third
