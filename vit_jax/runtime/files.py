"""Atomic writes, which leave a path with its old content or the complete new one, and the cache directory."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vit_jax.runtime.errors import UserError, one_line


def cache_dir() -> Path:
    """Returns the directory of downloads and compiled programs, which may not exist yet.

    It is `$VIT_JAX_CACHE`, or `~/.cache/vit_jax`.
    """
    return Path(os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax").expanduser()


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically; encodes strings as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path next to `path` for a new file or directory.

    It is renamed to `path` if the body succeeds, and removed if it fails. An `OSError`, such as a full disk, becomes a
    `UserError`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        rename_synced(temporary, path)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"cannot write {path}: {reason}; check the disk, or write to another directory") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # if it is a directory
        with contextlib.suppress(OSError):
            temporary.unlink()


def rename_synced(temporary: Path, path: Path) -> None:
    """Syncs a file or a directory to disk and renames it; replaces an existing file."""
    for file in (temporary, *temporary.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    os.replace(temporary, path)
