import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import optim
from vit_jax.errors import UsageError

PARAMS = {"head": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "cls": np.ones((1, 1, 2))}


def test_split_params_parts_by_whole_paths():
    trainable, frozen = optim.split_params(PARAMS, (r"head/.*",))
    assert set(trainable) == {"head"} and set(frozen) == {"cls"}
    assert optim.merge_params(trainable, frozen).keys() == PARAMS.keys()


def test_split_params_refuses_a_pattern_that_matches_nothing():
    with pytest.raises(UsageError, match="'head' matches no parameter"):
        optim.split_params(PARAMS, ("head",))


def test_trainable_patterns_names_the_modes():
    with pytest.raises(UsageError, match="no mode 'haed'; modes are full, head"):
        optim.trainable_patterns("haed")


def test_trainable_patterns_refuses_a_broken_expression():
    with pytest.raises(UsageError, match="is not a regular expression"):
        optim.trainable_patterns(("head/(.*",))


def test_describe_trainable_counts():
    table = optim.describe_trainable(PARAMS, (r"head/.*",))
    assert table.splitlines()[-1].split() == ["together", "2", "9", "of", "11"]


@pytest.mark.parametrize(("count", "expected"), [(0, 0.0), (5, 0.1), (10, 0.2), (60, 0.1), (110, 0.0), (200, 0.0)])
def test_cosine_schedule_warms_up_from_zero_and_ends_at_zero(count, expected):
    schedule = optim.make_schedule("cosine", learning_rate=0.2, warmup_steps=10, num_steps=110)
    assert float(schedule(count)) == pytest.approx(expected, abs=1e-7)


def test_schedules_without_warmup_start_at_the_peak():
    for name, middle in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        schedule = optim.make_schedule(name, learning_rate=1.0, warmup_steps=0, num_steps=10)
        assert float(schedule(0)) == 1.0
        assert float(schedule(5)) == pytest.approx(middle)


def test_sgd_clips_then_adds_l2_then_momentum():
    tx = optim.create_optimizer("sgd", schedule=lambda count: 0.1, momentum=0.5, weight_decay=0.01, clip_norm=1.0)
    params = {"w": jnp.array([10.0, 0.0])}
    state = tx.init(params)
    grads = {"w": jnp.array([3.0, 4.0])}  # norm 5: clipped to (0.6, 0.8)
    updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["w"], [-0.1 * (0.6 + 0.1), -0.1 * 0.8], rtol=1e-6)
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["w"], [-0.1 * 1.5 * 0.7, -0.1 * 1.5 * 0.8], rtol=1e-6)


def test_sgd_momentum_may_be_bfloat16():
    tx = optim.create_optimizer("sgd", schedule=lambda count: 0.1, momentum_dtype="bfloat16")
    state = tx.init({"w": jnp.zeros(2)})
    trace = optax.tree_utils.tree_get(state, "trace")
    assert trace["w"].dtype == jnp.bfloat16


def test_adamw_decays_apart_from_the_gradient():
    tx = optim.create_optimizer("adamw", schedule=lambda count: 0.1, weight_decay=0.5)
    params = {"w": jnp.array([2.0])}
    updates, _ = tx.update({"w": jnp.array([0.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 * 0.5 * 2.0], rtol=1e-6)
