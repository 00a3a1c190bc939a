import pytest

import vit_jax
from vit_jax.classifier import Classifier
from vit_jax.run import Run
from vit_jax.runtime.errors import UserError


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_load_returns_run_for_run_directory(finished_run, kind):
    run = vit_jax.load(kind(finished_run))
    assert type(run) is Run and run.step == 20


def test_load_returns_classifier_for_checkpoint():
    assert type(vit_jax.load("micro")) is Classifier


def test_load_rejects_directory_without_model(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        vit_jax.load(tmp_path)
