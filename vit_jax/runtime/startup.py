"""Environment variables that speed up JAX, set before it is imported."""

import contextlib
import os
import platform
import re
import sys
import zlib
from pathlib import Path

from vit_jax.runtime.files import cache_dir

TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
"""Value of GLIBC_TUNABLES: huge pages, and freed memory is kept up to 16 GiB."""


def prepare_process() -> None:
    """Sets up JAX's compilation cache and glibc's allocator; variables that are already set keep their values.

    Compiled programs are kept in the cache directory, at most 1 GB for each kind of CPU. On CPUs with glibc, the
    process restarts once with `TUNABLES`, which glibc reads only at its start: XLA allocates temporaries at every step,
    which glibc by default returns to the kernel, and the kernel maps and clears their 4 KiB pages again at the next.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ |= _compilation_cache()
    is_set = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not is_set and not _has_accelerator():
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _compilation_cache() -> dict[str, str]:
    """Returns the variables of JAX's compilation cache; empty if the cache directory is not writable."""
    directory = cache_dir() / "compiled" / _cpu()
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(directory),
        "JAX_COMPILATION_CACHE_MAX_SIZE": "1000000000",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return variables if os.access(directory, os.W_OK) else {}


def _cpu() -> str:
    """Returns a name of the CPU's kind; programs compiled for one can crash on another."""
    cpuinfo = Path("/proc/cpuinfo")
    features = re.search(r"^(flags|Features)\b.*", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return f"{platform.machine()}-{zlib.crc32((features[0] if features else platform.processor()).encode()):08x}"


def _has_accelerator() -> bool:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/dev").glob("accel*")) or Path("/dev/kfd").exists()
