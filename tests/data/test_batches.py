import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.data import batches
from vit_jax.runtime import rng, sharding

IMAGES = np.arange(40 * 3, dtype=np.uint8).reshape(40, 1, 1, 3)
LABELS = np.arange(40, dtype=np.int32)


@pytest.fixture(scope="module")
def mesh():
    return sharding.create_mesh(jax.devices()[:2])


@pytest.fixture(scope="module")
def resident(mesh):
    return sharding.device_put((IMAGES, LABELS), sharding.replicated(mesh))


def train_batches(resident, mesh, **options):
    options = {"batch_size": 16, "seed": 3, "first_step": 0, "num_steps": 6, **options}
    return list(batches.resident_batches(*resident, mesh, **options))


def test_resident_batches_follow_epoch_order(resident, mesh):
    key = jax.random.PRNGKey(3)
    orders = [np.asarray(rng.epoch_order(key, epoch, 40)) for epoch in range(3)]
    assert (orders[0] != orders[1]).any()
    for step, batch in train_batches(resident, mesh):
        epoch, position = divmod(step - 1, 2)  # two full batches per epoch
        rows = orders[epoch][position * 16 :][:16]
        np.testing.assert_array_equal(batch.rows, rows)
        np.testing.assert_array_equal(batch.labels, rows)
        np.testing.assert_array_equal(batch.inputs, IMAGES[rows])
        assert {shard.data.shape[0] for shard in batch.inputs.addressable_shards} == {8}


def test_resident_batches_resume_after_completed_steps(resident, mesh):
    uninterrupted, resumed = train_batches(resident, mesh), train_batches(resident, mesh, first_step=3)
    assert [step for step, _ in resumed] == [4, 5, 6]
    for (_, actual), (_, expected) in zip(resumed, uninterrupted[3:], strict=True):
        np.testing.assert_array_equal(actual.rows, expected.rows)


def test_resident_batches_with_max_updates_end_at_stops_and_epochs(resident, mesh):
    single = train_batches(resident, mesh, batch_size=8, num_steps=17)  # five updates per epoch
    several = train_batches(resident, mesh, batch_size=8, num_steps=17, max_updates=4, stops=(7,))
    assert [step for step, _ in several] == [4, 5, 7, 10, 14, 15, 17]
    used = [batch.labels[np.asarray(batch.labels) >= 0] for _, batch in several]
    np.testing.assert_array_equal(np.concatenate(used), np.concatenate([batch.labels for _, batch in single]))
    assert {batch.labels.shape for _, batch in several} == {(32,)}


def test_resident_batches_balance_classes_and_resume(mesh):
    labels = np.repeat(np.arange(2, dtype=np.int32), (36, 4))
    arrays = sharding.device_put((IMAGES, labels), sharding.replicated(mesh))
    balanced = train_batches(arrays, mesh, balanced=True, batch_size=20)  # an epoch has two full batches
    epochs = [np.concatenate([batch.labels for _, batch in balanced[i : i + 2]]) for i in (0, 2, 4)]
    assert [epoch.mean() for epoch in epochs] == [0.5, 0.5, 0.5]
    rows = np.asarray(balanced[2][1].rows)
    np.testing.assert_array_equal(rows, rng.balanced_order(jax.random.PRNGKey(3), 1, labels)[:20])
    np.testing.assert_array_equal(balanced[2][1].inputs, IMAGES[rows])
    resumed = train_batches(arrays, mesh, balanced=True, batch_size=20, first_step=3)
    for (_, actual), (_, expected) in zip(resumed, balanced[3:], strict=True):
        np.testing.assert_array_equal(actual.rows, expected.rows)


def test_resident_batches_cycle_through_views(mesh):
    inputs = jnp.arange(3 * 10.0)[:, None]  # three views of ten examples
    arrays = sharding.device_put((inputs, LABELS[:10]), sharding.replicated(mesh))
    for step, batch in train_batches(arrays, mesh, batch_size=4, num_views=3, num_steps=8):
        view = (step - 1) // 2 % 3
        rows = np.asarray(batch.inputs)[:, 0]
        assert (rows // 10 == view).all()
        np.testing.assert_array_equal(batch.labels, rows % 10)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("batch_size", [2, 16, 64])
def test_evaluation_batches_contain_each_example_once_in_order(resident, mesh, on_device, batch_size):
    images, labels = resident if on_device else (IMAGES, LABELS)
    read = list(batches.evaluation_batches(images, labels, mesh, batch_size=batch_size))
    assert {len(batch.labels) for batch in read} == {batch_size}
    labels, rows, inputs = (np.concatenate([getattr(b, name) for b in read]) for name in ("labels", "rows", "inputs"))
    assert (labels[:40] == LABELS).all() and (labels[40:] == -1).all()
    np.testing.assert_array_equal(rows, np.arange(len(rows)))
    np.testing.assert_array_equal(inputs[:40], IMAGES)
