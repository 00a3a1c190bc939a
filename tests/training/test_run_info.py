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


@pytest.mark.parametrize(("name", "value"), [("custom", None), ("dataset", {}), ("storage", None), ("new", 1)])
def test_from_json_rejects_other_versions(name, value):
    """None removes the key."""
    values = {key: item for key, item in {**INFO.to_json(), name: value}.items() if item is not None}
    with pytest.raises(UserError, match="the checkpoint is of another version of vit_jax .*; train again in another"):
        RunInfo.from_json(values)
