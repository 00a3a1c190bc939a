import os
import types

import psutil
import pytest

from vit_jax.runtime import resources

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Simulates a machine with 32 GiB of memory, half of it in use."""
    memory = types.SimpleNamespace(total=32 * GIB, available=16 * GIB)
    monkeypatch.setattr(resources, "_ROOT", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def write_files(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


VERSION_2 = {
    "proc/self/cgroup": "0::/job/step",
    "sys/fs/cgroup/job/memory.max": 4 * GIB,
    "sys/fs/cgroup/job/memory.current": 3 * GIB,
    "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}",
    "sys/fs/cgroup/job/cpu.max": "150000 100000",
    "sys/fs/cgroup/job/step/memory.max": "max",
    "sys/fs/cgroup/job/step/cpu.max": "max 100000",
}
VERSION_1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/0123\n3:pids:/b",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": 4 * GIB,  # the path is of the host, the mount of the container
    "sys/fs/cgroup/memory/memory.usage_in_bytes": 3 * GIB,
    "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}",
    "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": 150000,
    "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": 100000,
}


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1], ids=["version_2", "version_1"])
def test_available_memory_and_cpus_respect_cgroup_limits(tmp_path, monkeypatch, files):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    write_files(tmp_path, files)
    assert resources.total_memory() == 4 * GIB
    assert resources.available_memory() == 2 * GIB  # 4 GiB limit - (3 GiB used - 1 GiB of file cache)
    assert resources.available_cpus() == 2  # 1.5 rounded up


UNLIMITED = {
    **VERSION_1,
    "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
    "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": -1,
}


def test_available_memory_and_cpus_equal_machine_totals_without_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    write_files(tmp_path, UNLIMITED)
    assert resources.total_memory() == 32 * GIB
    assert resources.available_memory() == 16 * GIB
    assert resources.available_cpus() == 2


def test_available_memory_and_cpus_work_without_proc(tmp_path):
    assert resources.total_memory() == 32 * GIB
    assert resources.available_memory() == 16 * GIB
    assert resources.available_cpus() >= 1


@pytest.fixture
def four_cores(monkeypatch):
    """Removes the variables that `split_cpu` reads and sets; the machine has four cores."""
    for name in ("JAX_NUM_CPU_DEVICES", "PJRT_NPROC", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(resources, "available_cpus", lambda: 4)
    return monkeypatch


@pytest.mark.parametrize(
    ("maximum", "batch_size", "expected"),
    [(0, 64, "4"), (0, 6, "3"), (0, 7, None), (1, 64, None), (2, 64, "2"), (6, 60, "6")],
)
def test_split_cpu_uses_largest_number_of_devices_that_divides_batch(four_cores, maximum, batch_size, expected):
    resources.split_cpu(maximum, batch_size=batch_size)
    assert os.environ.get("JAX_NUM_CPU_DEVICES") == expected
    assert os.environ.get("PJRT_NPROC") == (str(4 + int(expected)) if expected else None)


@pytest.mark.parametrize(
    ("name", "value"), [("JAX_NUM_CPU_DEVICES", "3"), ("XLA_FLAGS", "--xla_force_host_platform_device_count=8")]
)
def test_split_cpu_keeps_settings_of_user(four_cores, name, value):
    four_cores.setenv(name, value)
    resources.split_cpu(2, batch_size=64)
    assert (os.environ.get("JAX_NUM_CPU_DEVICES"), os.environ.get("PJRT_NPROC")) == (
        "3" if name == "JAX_NUM_CPU_DEVICES" else None,
        None,
    )
