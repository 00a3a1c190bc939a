import jax
import pytest

from configs import digits
from vit_jax import data, distributed, job
from vit_jax.errors import UserError

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


def test_adamw_and_bfloat16_make_a_job():
    config = digits.get_config("scratch")
    config.update(model=SIZES, dtype="bfloat16")
    config.optimizer.name = "adamw"
    made, create_state = job.create_job(config)
    assert made.program.steps_per_epoch == 1437 // 64
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(create_state().trainable)} == {"float32"}
    assert made.about["class_names"] == [str(digit) for digit in range(10)]


def test_check_same_dataset_names_the_process_that_differs(monkeypatch):
    dataset = data.load_dataset("digits", image_size=8)
    job.check_same_dataset("digits", dataset)
    monkeypatch.setattr(distributed, "gather", lambda text: [text, text, "3 training images"])
    with pytest.raises(UserError) as error:
        job.check_same_dataset("digits", dataset)
    expected = (
        "process 2 read 3 training images from digits, the first process read 1,437 training and 360 test images of"
    )
    assert str(error.value).startswith(expected)
