import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError
from vit_jax.training import checkpoint, optim, steps
from vit_jax.training.checkpoint import Checkpoints

PARAMS = {"head": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, "cls": np.ones((1, 1, 2), np.float32)}
TX = optim.create_optimizer("sgd", schedule=lambda count: 0.1)


def create_state(params=PARAMS, *, num_devices=8, seed=0) -> steps.TrainState:
    mesh = sharding.create_mesh(jax.devices()[:num_devices])
    create = lambda params: steps.create_train_state(params, patterns=("head/.*",), tx=TX, seed=seed)  # noqa: E731
    out_shardings = sharding.replicated(mesh)
    return jax.jit(create, out_shardings=out_shardings)(sharding.device_put(params, out_shardings))


def abstract_state(*args, **kwargs) -> steps.TrainState:
    state = create_state(*args, **kwargs)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def replicated(num_devices: int = 1) -> jax.sharding.NamedSharding:
    return sharding.replicated(sharding.create_mesh(jax.devices()[:num_devices]))


def assert_equal(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), actual, expected)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 1), (1, 8), (8, 4)])
def test_restore_supports_any_number_of_devices(tmp_path, saved_on, restored_on):
    state = create_state(num_devices=saved_on, seed=3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"class_names": ["a"]}, accuracy=0.5)
        checkpoints.finish()
        restored = checkpoints.restore(7, abstract_state(num_devices=restored_on))
    assert_equal(restored, state)
    assert all(len(leaf.devices()) == restored_on for leaf in jax.tree.leaves(restored))


def test_restore_gathers_sharded_arrays_on_one_device(tmp_path):
    params = {"head": {"kernel": np.arange(8192, dtype=np.float32).reshape(2, 4096)}}
    mesh = sharding.create_mesh(fsdp=8)
    state = create_state(params)
    state = sharding.device_put(jax.device_get(state), sharding.param_shardings(state, mesh))
    assert not state.trainable["head"]["kernel"].is_fully_replicated
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, accuracy=None)
        checkpoints.finish()
        assert_equal(checkpoints.restore(1, abstract_state(params, num_devices=1)), state)


def test_restore_rejects_checkpoint_of_other_model(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, create_state(), {}, accuracy=None)
        checkpoints.finish()
        other = {**PARAMS, "cls": np.ones((1, 1, 4), np.float32)}
        with pytest.raises(UserError, match=r"params/cls is float32 \[1, 1, 2\], expected float32 \[1, 1, 4\]"):
            checkpoints.restore(1, abstract_state(other))
        with pytest.raises(UserError, match="params/pre_logits/kernel is missing"):
            checkpoints.restore(1, abstract_state({**PARAMS, "pre_logits": {"kernel": jnp.ones(2)}}))


@pytest.mark.parametrize("use_ema", [True, False])
def test_restore_params_returns_params_and_metadata(tmp_path, use_ema):
    state = create_state()
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.trainable))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"class_names": ["cat", "dog"]}, accuracy=None)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        params, metadata = checkpoints.restore_params(1, replicated(), use_ema=use_ema)
    assert_equal(params, {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"] + use_ema}})
    assert metadata == {"class_names": ["cat", "dog"]}


def test_save_keeps_latest_and_best_checkpoint(tmp_path):
    state = create_state()
    with Checkpoints(tmp_path) as checkpoints:
        for step, accuracy in [(1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, None)]:
            checkpoints.save(step, state, {}, accuracy=accuracy)
        checkpoints.finish()
        assert checkpoints.steps() == [2, 5]
    with Checkpoints(tmp_path) as checkpoints:  # a resumed run
        checkpoints.save(6, state, {}, accuracy=0.6)
        checkpoints.finish()
        assert checkpoints.steps() == [2, 6]
        assert (checkpoints.best_accuracy(), Checkpoints(tmp_path, read_only=True).require_step("best")) == (0.9, 2)
        checkpoints.save(7, state, {}, accuracy=0.9)  # on a tie, the later one is the best
        checkpoints.finish()
        assert checkpoints.steps() == [7]


def test_save_reports_full_disk_and_keeps_last_checkpoint(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, create_state(), {}, accuracy=None)
        checkpoints.finish()
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
        with pytest.raises(UserError, match="the disk has 10 left.*; the last good one is step 1; free some space"):
            checkpoints.save(2, create_state(), {}, accuracy=None)
        assert checkpoints.steps() == [1]


def test_latest_step_includes_checkpoint_being_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, create_state(), {}, accuracy=None)
        assert checkpoints.latest_step() == 1
        checkpoints.finish()
        assert checkpoints.steps() == [1]


def test_require_step_rejects_missing_step(tmp_path):
    (tmp_path / "run").mkdir()
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.latest_step() is None
        for step in (None, 3):
            with pytest.raises(UserError, match="run has no checkpoints; give the --workdir of a run"):
                checkpoints.require_step(step)
    assert list((tmp_path / "run").iterdir()) == []
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, create_state(), {}, accuracy=1.0)
        checkpoints.save(2, create_state(), {}, accuracy=0.0)
        checkpoints.finish()
        assert (checkpoints.require_step(), checkpoints.require_step(1)) == (2, 1)
        with pytest.raises(UserError, match="run has no checkpoint of step 3; it has 1, 2"):
            checkpoints.require_step(3)


@pytest.fixture
def two_steps(tmp_path):
    """Run directory with two checkpoints: step 1 is the best, step 2 the latest."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, create_state(seed=step), {}, accuracy=1 / step)
    return tmp_path


def truncate_files(directory):
    for path in directory.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def test_restore_names_damaged_item_and_intact_steps(two_steps, capfd):
    latest = two_steps / "checkpoints/2"
    truncate_files(latest / "params/d")
    with Checkpoints(two_steps) as checkpoints:
        for read in (
            lambda: checkpoints.restore(2, abstract_state(num_devices=1)),
            lambda: checkpoints.restore_params(2, replicated()),
        ):
            with pytest.raises(UserError, match="2/params is damaged .*; intact steps: 1; delete ") as error:
                read()
            assert str(error.value).endswith(f"; delete {latest} and rerun to resume from step 1")
            assert "\n" not in str(error.value)
        truncate_files(two_steps / "checkpoints/1/training")
        with pytest.raises(UserError, match="no other checkpoint is intact; start again in another --workdir"):
            checkpoints.restore_params(2, replicated())
    assert "Traceback" not in capfd.readouterr().err


def test_restore_params_rejects_wrong_checksum(tmp_path, monkeypatch):
    checksums = checkpoint.checksums
    monkeypatch.setattr(checkpoint, "checksums", lambda items: {**checksums(items), "params/cls": "00000000"})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, create_state(), {}, accuracy=None)
        checkpoints.finish()
        with pytest.raises(UserError, match=r"checkpoints/1/params is damaged .*\(wrong checksum of params/cls\)"):
            checkpoints.restore_params(1, replicated())


def test_restore_params_reports_out_of_memory(two_steps, monkeypatch):
    def fail(*_):
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(checkpoint, "mismatches", fail)
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        with pytest.raises(UserError, match="out of memory while reading .*/2/params: cannot allocate$"):
            checkpoints.restore_params(2, replicated())


def test_restore_params_does_not_call_unreadable_files_damaged(two_steps, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "params")

    monkeypatch.setattr(checkpoint, "mismatches", fail)
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        with pytest.raises(UserError, match="^cannot read .*/2/params: .*Permission denied.*; check the file system"):
            checkpoints.restore_params(2, replicated())


def test_save_does_not_blame_space_for_other_errors(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied", "checkpoints")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr("shutil.disk_usage", fail)
        with pytest.raises(UserError, match="Permission denied.*; none was saved before; rerun the same command$"):
            checkpoints.save(1, create_state(), {}, accuracy=None)


def test_read_metadata_rejects_changed_file(two_steps):
    path = two_steps / "checkpoints/1/metadata/metadata"
    path.write_text(path.read_text().replace('"accuracy": 1.0', '"accuracy": 0.0'))
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        assert checkpoints.read_metadata(2) == {}
        with pytest.raises(UserError, match="checkpoints/1/metadata is damaged .*intact steps: 2; delete .*/1 and"):
            checkpoints.read_metadata(1)
    with pytest.raises(UserError, match="checkpoints/1/metadata is damaged"):  # metadata determines the best checkpoint
        Checkpoints(two_steps)


def test_checkpoints_removes_leftover_files_of_killed_save(tmp_path):
    leftover = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == []
    assert leftover.exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
    assert not leftover.exists()
