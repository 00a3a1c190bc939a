"""Memory and processors that this process may use: those of the machine, or fewer in a container or a batch job."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60
"""Bytes; version 1 of control groups writes a number near 2 ** 63 where there is no limit."""


def total_memory(root: Path = Path("/")) -> int:
    """Returns the bytes of memory: the machine's, or the smallest limit of a control group.

    Args:
        root: of the file system; other than "/" in tests.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(limit for limit, _ in _memory_limits(root))])


def available_memory(root: Path = Path("/")) -> int:
    """Returns the bytes that can be allocated without swapping, within the limits of control groups.

    Args:
        root: of the file system; other than "/" in tests.
    """
    # Linux only; MemAvailable counts the file cache as free, SC_AVPHYS_PAGES does not.
    match = re.search(r"MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"))
    free = int(match[1]) * 1024 if match else total_memory(root)
    return max(0, min([free, *(limit - used for limit, used in _memory_limits(root))]))


def available_cpus(root: Path = Path("/")) -> int:
    """Returns the number of processors that this process may keep busy, at least 1.

    Counts the processors it is bound to (`taskset`, SLURM), and the quotas of control groups (`docker --cpus`).

    Args:
        root: of the file system; other than "/" in tests.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for directory in _control_groups(root, "cpu"):
        quota, _, period = _read(directory / "cpu.max").partition(" ")  # version 2: "200000 100000", or "max 100000"
        quota = quota or _read(directory / "cpu.cfs_quota_us")  # version 1: -1 without a quota
        period = period or _read(directory / "cpu.cfs_period_us")
        if quota.isdecimal() and period.strip().isdecimal():
            quotas.append(math.ceil(int(quota) / int(period)))
    return max(1, min([bound, *quotas]))


def _memory_limits(root: Path) -> list[tuple[int, int]]:
    """Returns (limit, used) in bytes of every control group with a limit; file caches count as free."""
    limits = []
    for directory in _control_groups(root, "memory"):
        limit = _read(directory / "memory.max") or _read(directory / "memory.limit_in_bytes")
        used = _read(directory / "memory.current") or _read(directory / "memory.usage_in_bytes")
        cache = re.search(r"^(?:total_)?inactive_file (\d+)", _read(directory / "memory.stat"), re.MULTILINE)
        if limit.isdecimal() and int(limit) < _UNLIMITED:
            limits.append((int(limit), int(used or 0) - int(cache[1] if cache else 0)))
    return limits


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the directories of the control group and its parents: of version 2, or of a controller of version 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        directory = mount / path.lstrip("/")
        # In a container the path may be that of the host: then the mount itself is the container's group.
        yield from (d for d in (directory, *directory.parents) if d.is_relative_to(mount) and d.is_dir())


def _read(path: Path) -> str:
    """Reads a file; "" if there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
