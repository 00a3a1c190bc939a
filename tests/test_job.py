import jax

from configs import digits
from vit_jax import job

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


def test_adamw_and_bfloat16_make_a_job():
    config = digits.get_config("scratch")
    config.update(model=SIZES, dtype="bfloat16")
    config.optimizer.name = "adamw"
    made, create_state = job.create_job(config)
    assert made.program.steps_per_epoch == 1437 // 64
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(create_state().trainable)} == {"float32"}
    assert made.about["class_names"] == [str(digit) for digit in range(10)]
