"""Memory, CPUs and batch job of this process; JAX is not imported."""

import math
import os
import re
from pathlib import Path

import psutil

_ROOT = Path("/")
_MAX_CPU_DEVICES = 8


def total_memory() -> int:
    """Returns the total memory in bytes: the machine's, or the smallest limit of a cgroup."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits())])


def available_memory() -> int:
    """Returns the bytes that can be allocated without swapping, within cgroup limits."""
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *(limit - used for limit, used in _memory_limits())]))


def available_cpus() -> int:
    """Returns the number of CPUs that this process may run on, within cgroup quotas; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups("cpu"):
        match _read_numbers(group / "cpu.max", group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"):
            case quota, period:
                cpus = min(cpus, math.ceil(quota / period))
    return cpus


def is_cluster_job() -> bool:
    """Returns True in a SLURM step of several tasks and in an indexed Kubernetes job."""
    is_slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return is_slurm or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()


def split_cpu(num_devices: int, *, batch_size: int) -> None:
    """Lets JAX split the CPU into devices; must be called before JAX is imported.

    One core multiplies a small matrix faster than two do: split into two devices, a CPU of two cores trains the micro
    ViT 1.3 times as fast (benchmarks/RESULTS.md). Every device has its own copy of the parameters. The variables and
    flags of users take precedence.

    Args:
        num_devices: maximum; 0: number of cores, at most 8.
        batch_size: images; the largest number of devices that divides it is used.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        for name, value in cpu_devices_environment(num_devices, batch_size=batch_size).items():
            os.environ.setdefault(name, value)


def cpu_devices_environment(num_devices: int, *, batch_size: int) -> dict[str, str]:
    """Returns the environment variables of `split_cpu`; none if the CPU remains one device."""
    cores = available_cpus()
    maximum = num_devices or min(cores, _MAX_CPU_DEVICES)
    num_devices = max(number for number in range(1, maximum + 1) if batch_size % number == 0)
    # A device that waits for the others blocks a thread of XLA's pool; without spare threads they can deadlock.
    variables = {"JAX_NUM_CPU_DEVICES": str(num_devices), "PJRT_NPROC": str(cores + num_devices)}
    return variables if num_devices > 1 else {}


def _memory_limits() -> list[tuple[int, int]]:
    """Returns (limit, used) in bytes of the cgroups with a limit; the file cache counts as free."""
    limits = []
    for group in _control_groups("memory"):
        limit = _read_numbers(group / "memory.max", group / "memory.limit_in_bytes")
        used = _read_numbers(group / "memory.current", group / "memory.usage_in_bytes")
        cached = re.findall(r"inactive_file (\d+)", _read(group / "memory.stat"))
        if limit and used:
            limits.append((limit[0], used[0] - sum(map(int, cached[:1]))))
    return limits


def _control_groups(controller: str) -> list[Path]:
    """Returns the directories of this process's cgroup and its parents, version 2 and version 1.

    Some may not exist: in a container, the path can be the host's, and the mount itself is the container's cgroup.
    """
    # Matches lines such as "0::/a" or "5:cpu,io:/a".
    pattern = rf"^\d+:(?:|(?:.*,)?{controller}(?:,.*)?):(.*)$"
    paths = re.findall(pattern, _read(_ROOT / "proc/self/cgroup"), re.MULTILINE)
    mounts = (_ROOT / "sys/fs/cgroup", _ROOT / "sys/fs/cgroup" / controller)
    groups = [mount / path.lstrip("/") for path in paths for mount in mounts]
    return [d for group in groups for d in (group, *group.parents) if d.is_relative_to(mounts[0])]


def _read_numbers(*paths: Path) -> list[int]:
    """Reads the numbers in the files that exist; skips "max" and -1, which mean no limit."""
    return [int(word) for path in paths for word in _read(path).split() if word.isdigit()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
