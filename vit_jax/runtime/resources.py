"""Memory and CPUs that this process may use: those of the machine, or fewer in a container or a batch job."""

import math
import os
import re
from pathlib import Path

import psutil

_ROOT = Path("/")


def total_memory() -> int:
    """Returns the bytes of memory: the machine's, or the smallest limit of a control group."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits())])


def available_memory() -> int:
    """Returns the bytes that can be allocated without swapping, within the limits of control groups."""
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *(limit - used for limit, used in _memory_limits())]))


def available_cpus() -> int:
    """Returns the number of CPUs that this process is bound to, within the quotas of control groups; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups("cpu"):
        quota = _read_number(group / "cpu.max", r"^(\d+) ") or _read_number(group / "cpu.cfs_quota_us")
        period = _read_number(group / "cpu.max", r" (\d+)") or _read_number(group / "cpu.cfs_period_us")
        if quota and period:
            cpus = min(cpus, math.ceil(quota / period))
    return cpus


def _memory_limits() -> list[tuple[int, int]]:
    """Returns (limit, used) in bytes of the control groups with a limit; the file cache counts as free."""
    limits = []
    for group in _control_groups("memory"):
        limit = _read_number(group / "memory.max") or _read_number(group / "memory.limit_in_bytes")
        used = _read_number(group / "memory.current") or _read_number(group / "memory.usage_in_bytes")
        if limit:
            limits.append((limit, used - _read_number(group / "memory.stat", r"^(?:total_)?inactive_file (\d+)")))
    return limits


def _control_groups(controller: str) -> list[Path]:
    """Returns the directories of this process's control group and of its parents, version 2 and version 1.

    Some may not exist: in a container the path can be the host's, and the mount itself is the container's group.
    """
    # Lines such as "0::/a" or "5:cpu,io:/a".
    paths = _find(_ROOT / "proc/self/cgroup", rf"^\d+:(?:|(?:.*,)?{controller}(?:,.*)?):(.*)$")
    mounts = (_ROOT / "sys/fs/cgroup", _ROOT / "sys/fs/cgroup" / controller)
    groups = [mount / path.lstrip("/") for path in paths for mount in mounts]
    return [d for group in groups for d in (group, *group.parents) if d.is_relative_to(mounts[0])]


def _read_number(path: Path, pattern: str = r"^(\d+)$") -> int:
    """Returns the number that a pattern finds in a file; 0 if there is none, as where the limit is "max" or -1."""
    return int((*_find(path, pattern), "0")[0])


def _find(path: Path, pattern: str) -> list[str]:
    try:
        return re.findall(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return []
