import dataclasses

import jax.numpy as jnp
import pytest

from configs import digits
from vit_jax import trainer
from vit_jax.run import load_run
from vit_jax.runtime.errors import UserError


@pytest.mark.parametrize(("optimizer", "trainable"), [("adamw", "full"), ("sgd", "head")])
def test_load_run_returns_model_and_parameters(tmp_path, optimizer, trainable):
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16)
    config.update(num_steps=4, warmup_steps=0, trainable=trainable, dtype="bfloat16")
    config.optimizer.name = optimizer
    results = trainer.train_and_evaluate(config, tmp_path)
    run = load_run(tmp_path)
    assert (run.step, run.workdir) == (4, tmp_path)
    config.dataset.test_resize = "squash"  # the choice for digits
    assert run.config.to_dict() == config.to_dict()
    assert run.class_names == tuple("0123456789")
    assert run.model.dtype == jnp.bfloat16
    assert run.evaluate() == pytest.approx(results, rel=1e-5)


def test_load_run_lists_existing_checkpoints(finished_run):
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 20"):
        load_run(finished_run, step=7)


def test_load_run_returns_ema_parameters_by_default(lora_run):
    ema, raw = (load_run(lora_run, use_ema=use_ema) for use_ema in (True, False))
    assert abs(ema.params["head"]["kernel"] - raw.params["head"]["kernel"]).max() > 0
    assert "lora" not in ema.params


def test_evaluate_accepts_split_and_prefix(finished_run):
    run = load_run(finished_run)
    split = run.load_test_split()
    few = dataclasses.replace(split, images=split.images[:50], labels=split.labels[:50])
    accuracy = (run.predict(few.images).argmax(axis=-1) == few.labels).mean()
    assert run.evaluate(few, batch_size=16, prefix="few")["few/accuracy"] == pytest.approx(accuracy)


def test_load_test_split_rejects_dataset_with_other_classes(finished_run):
    run = load_run(finished_run)
    other = dataclasses.replace(run, metadata=dataclasses.replace(run.metadata, class_names=("cat", "dog")))
    with pytest.raises(
        UserError, match=r"the run has 2 classes \(cat, dog\), the dataset 10 classes \(0, 1, 2, 3, 4, …\)"
    ):
        other.load_test_split()


def test_load_test_split_accepts_another_data_dir(finished_run):
    with pytest.raises(UserError, match="dataset.data_dir is '/elsewhere'"):
        load_run(finished_run).load_test_split("/elsewhere")
