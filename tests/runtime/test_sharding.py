from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vit_jax.runtime import resources, sharding
from vit_jax.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("data", "fsdp", "message"),
    [
        (4, 4, "mesh.data × mesh.fsdp is 4 × 4 = 16; expected at most 8 devices"),
        (0, 3, "mesh.fsdp is 3; expected a divisor of the number of devices, 8"),
        (0, 16, "mesh.fsdp is 16; expected a divisor of the number of devices, 8"),
    ],
)
def test_create_mesh_rejects_shape_that_does_not_fit_devices(data, fsdp, message):
    with pytest.raises(UsageError) as error:
        sharding.create_mesh(data=data, fsdp=fsdp)
    assert str(error.value) == message


def test_create_mesh_rejects_unused_devices_with_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match="is 2 × 2 = 4; expected all 8 devices"):
        sharding.create_mesh(data=2, fsdp=2)


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(0, 1, (8, 1)), (0, 4, (2, 4)), (2, 1, (2, 1)), (1, 3, (1, 3)), (4, 2, (4, 2))]
)
def test_create_mesh_uses_required_devices(data, fsdp, shape):
    assert tuple(sharding.create_mesh(data=data, fsdp=fsdp).shape.values()) == shape


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 128), PartitionSpec(None, "fsdp")),  # the longest axis
        ((128, 66), PartitionSpec("fsdp")),
        ((130, 64), PartitionSpec(None, "fsdp")),  # the longest axis divisible by 4
        ((63, 127), PartitionSpec()),  # no axis divisible by 4
        ((4092,), PartitionSpec()),  # fewer than 4,096 elements
        ((), PartitionSpec()),
    ],
)
def test_param_shardings_split_longest_divisible_axis(shape, spec):
    mesh = sharding.create_mesh(fsdp=4)
    shardings = sharding.param_shardings({"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}, mesh)
    assert shardings["kernel"].spec == spec


@pytest.mark.parametrize("single_sharding", [True, False])
def test_device_put_shards_host_arrays(single_sharding):
    mesh = sharding.create_mesh(fsdp=8)
    tree = {"a": np.arange(16.0), "b": {"c": np.float32(3)}}
    replicated = sharding.replicated(mesh)
    shardings = replicated if single_sharding else {"a": sharding.batch_sharding(mesh), "b": {"c": replicated}}
    sharded = sharding.device_put(tree, shardings)
    np.testing.assert_array_equal(sharded["a"], tree["a"])
    assert sharded["b"]["c"] == 3 and sharded["b"]["c"].sharding == replicated
    assert sharded["a"].addressable_shards[0].data.shape == ((16,) if single_sharding else (2,))
    shapes = sharding.with_sharding(tree, shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, shapes) == jax.tree.map(lambda leaf: leaf.sharding, sharded)


def test_shard_rows_selects_and_shards_images():
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    rows = np.array([3, 19, 0, 7, 7, 1, 2, 4])
    batch = sharding.shard_rows(images, rows, sharding.create_mesh())
    np.testing.assert_array_equal(batch, images[rows])
    assert batch.addressable_shards[1].data.shape == (1, 2, 2, 3)


@pytest.mark.parametrize(("batch_size", "num_images", "padded"), [(16, 100, 16), (10, 100, 16), (512, 44, 48)])
def test_pad_to_devices_rounds_up_to_device_multiple(batch_size, num_images, padded):
    assert sharding.pad_to_devices(batch_size, num_images, sharding.create_mesh()) == padded


@pytest.mark.parametrize(
    ("stats", "expected"),
    [({"bytes_limit": 100}, (100, "reported by the device")), (None, (2**30, "the machine's memory"))],
)
def test_device_memory_returns_device_limit_or_fraction_of_machine_memory(monkeypatch, stats, expected):
    monkeypatch.setattr(resources, "total_memory", lambda: 8 * 2**30)
    device = mock.Mock(spec=jax.Device, memory_stats=lambda: stats)
    assert sharding.device_memory(device) == expected
