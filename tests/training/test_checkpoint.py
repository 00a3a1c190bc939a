import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError
from vit_jax.training import optim, steps
from vit_jax.training.checkpoint import Checkpoints

PARAMS = {"head": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, "cls": np.ones((1, 1, 2), np.float32)}
TX = optim.create_optimizer("sgd", schedule=lambda count: 0.1)


def create_state(params=PARAMS, *, num_devices=8, patterns=("head/.*",), seed=0) -> steps.TrainState:
    mesh = sharding.create_mesh(jax.devices()[:num_devices])
    create = lambda params: steps.create_train_state(params, patterns=patterns, tx=TX, seed=seed)  # noqa: E731
    everywhere = sharding.replicated(mesh)
    return jax.jit(create, out_shardings=everywhere)(sharding.device_put(params, everywhere))


def abstract_state(*args, **kwargs) -> steps.TrainState:
    state = create_state(*args, **kwargs)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_equal(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


@pytest.mark.parametrize(("written_on", "read_on"), [(8, 1), (1, 8), (8, 4)])
def test_a_checkpoint_goes_from_any_number_of_devices_to_any_other(tmp_path, written_on, read_on):
    state = create_state(num_devices=written_on, seed=3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"class_names": ["a"]}, accuracy=0.5)
        checkpoints.finish()
        restored = checkpoints.restore(7, abstract_state(num_devices=read_on))
    assert_equal(restored, state)
    assert all(len(leaf.devices()) == read_on for leaf in jax.tree.leaves(restored))


def test_parameters_are_read_alone_with_what_they_are(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, create_state(), {"class_names": ["cat", "dog"]}, accuracy=None)
    mesh = sharding.create_mesh(jax.devices()[:1])
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        params, metadata = checkpoints.restore_params(1, sharding.replicated(mesh))
    assert_equal(params, PARAMS)
    assert metadata == {"class_names": ["cat", "dog"]}


def test_the_latest_and_the_best_are_kept(tmp_path):
    state = create_state()
    with Checkpoints(tmp_path) as checkpoints:
        for step, accuracy in [(1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, None)]:
            checkpoints.save(step, state, {}, accuracy=accuracy)
        checkpoints.finish()
        assert checkpoints.steps() == [2, 5]
    with Checkpoints(tmp_path) as checkpoints:  # a restarted run knows it, too
        checkpoints.save(6, state, {}, accuracy=0.6)
        checkpoints.finish()
        assert checkpoints.steps() == [2, 6]


def test_another_models_checkpoint_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, create_state(), {}, accuracy=None)
        checkpoints.finish()
        other = {**PARAMS, "cls": np.ones((1, 1, 4), np.float32)}
        with pytest.raises(UserError, match=r"params/cls is float32 \[1, 1, 2\], expected float32 \[1, 1, 4\]"):
            checkpoints.restore(1, abstract_state(other))
        with pytest.raises(UserError, match="params/pre_logits/kernel is missing"):
            checkpoints.restore(1, abstract_state({**PARAMS, "pre_logits": {"kernel": jnp.ones(2)}}))


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, create_state(), {}, accuracy=None)
    for path in (tmp_path / "checkpoints" / "1" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    mesh = sharding.create_mesh(jax.devices()[:1])
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(UserError, match="checkpoints/1/params is damaged") as error:
            checkpoints.restore_params(1, sharding.replicated(mesh))
    assert "\n" not in str(error.value)


def test_remains_of_a_killed_save_are_removed(tmp_path):
    remains = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
    remains.mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
    assert not remains.exists()
