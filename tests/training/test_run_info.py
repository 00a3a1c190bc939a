import dataclasses
import json

import pytest

from vit_jax.data import DatasetFingerprint
from vit_jax.pretrained import ModelMetadata
from vit_jax.runtime.errors import UserError
from vit_jax.training.run_info import RunInfo

INFO = RunInfo(
    model=ModelMetadata("resnet50", {"units": (1, 2), "width": 32}, image_size=8, class_names=("cat", "dog")),
    config={"seed": 1, "trainable": ["head/.*"]},
    dataset=DatasetFingerprint(("cat", "dog"), train_counts=(4, 2), test_counts=(3, 1), digest="00ff"),
    storage="memory",
    num_trainable=10,
    command="python train.py",
    custom=("augment", "optimizer"),
    metrics_checksum="12",
)


def test_from_json_inverts_to_json():
    assert RunInfo.from_json(json.loads(json.dumps(INFO.to_json()))) == INFO


def test_from_json_reads_checkpoints_without_evaluations():
    """Those of version 0.2."""
    values = {key: item for key, item in INFO.to_json().items() if key != "stale_evaluations"}
    assert RunInfo.from_json(values) == INFO


def test_count_evaluation_finishes_run_after_patience():
    info, stale, finished = dataclasses.replace(INFO, config={"num_steps": 9, "early_stopping_patience": 2}), [], []
    best = None
    for accuracy in (0.5, 0.5, 0.6, 0.6, 0.4):
        info = info.count_evaluation(accuracy, best=best)
        best = max(accuracy, best or 0)
        stale.append(info.stale_evaluations)
        finished.append(info.is_finished(8))
    assert stale == [0, 1, 0, 1, 2]
    assert finished == [False, False, False, False, True]


def test_is_finished_without_early_stopping():
    info = dataclasses.replace(INFO, config={"num_steps": 9}, stale_evaluations=100)
    assert info.is_finished(9) and not info.is_finished(8)


@pytest.mark.parametrize(("name", "value"), [("custom", None), ("dataset", {}), ("storage", None), ("new", 1)])
def test_from_json_rejects_other_versions(name, value):
    """None removes the key."""
    values = {key: item for key, item in {**INFO.to_json(), name: value}.items() if item is not None}
    with pytest.raises(UserError, match="the checkpoint is of another version of vit_jax .*; train again in another"):
        RunInfo.from_json(values)
