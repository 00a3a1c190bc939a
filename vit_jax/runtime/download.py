"""Fetches released files and archives by their address: resumed, checked, and kept in a cache."""

import contextlib
import hashlib
import http.client
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from vit_jax.runtime.errors import UsageError, UserError, one_line
from vit_jax.runtime.progress import progress_bar

_CHUNK_BYTES = 1 << 18
_LONGEST_PAUSE_SECONDS = 120
_BROKEN = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, ssl.SSLError)


class _Refused(Exception):
    """The server's answer will be the same next time."""


def cache_dir() -> Path:
    """Where fetched files are kept: `$VIT_JAX_CACHE`, or `~/.cache/vit_jax`. It may not exist yet."""
    return Path(os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax").expanduser()


def fetch(
    url: str,
    path: str | os.PathLike,
    *,
    num_bytes: int | None = None,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
    timeout_seconds: float = 30.0,
    num_attempts: int = 4,
    pause_seconds: float = 1.0,
) -> Path:
    """Downloads a file once; what stands at `path` is always whole and checked.

    The bytes gather in `path` + ".part", from where a later call goes on.

    Args:
        url: http(s) address; `$VIT_JAX_MIRROR` may name another server, see `mirrored`.
        path: where the file shall stand. If it exists already it is returned as it is.
        num_bytes: expected length.
        sha256: expected hexadecimal digest.
        check: called with the path of the complete .part; raises `UserError` if the content is wrong.
        timeout_seconds: silence after which a connection counts as broken.
        num_attempts: attempts in a row that bring nothing new before giving up.
        pause_seconds: before the second attempt; doubled before each further one.

    Returns:
        `path`.

    Raises:
        UserError: the file cannot be had or written, or is not what was expected. A .part whose content is wrong is
            removed.
        UsageError: `$VIT_JAX_MIRROR` holds no address.
    """
    path = Path(path)
    try:
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.exists():
                _fetch(
                    mirrored(url),
                    path,
                    num_bytes=num_bytes,
                    sha256=sha256,
                    check=check,
                    timeout_seconds=timeout_seconds,
                    num_attempts=num_attempts,
                    pause_seconds=pause_seconds,
                )
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or one_line(error)}; make room there, or name another folder in "
            "$VIT_JAX_CACHE"
        ) from error
    return path


def mirrored(url: str) -> str:
    """The address to ask: `$VIT_JAX_MIRROR/HOST/PATH` for `https://HOST/PATH` where that variable is set.

    Raises:
        UsageError: the variable holds no address.
    """
    mirror = os.environ.get("VIT_JAX_MIRROR", "").rstrip("/")
    if mirror and not mirror.startswith(("http://", "https://")):
        raise UsageError(f"$VIT_JAX_MIRROR is {mirror!r}; expected an address such as https://mirror.example")
    return f"{mirror}/{url.split('://', maxsplit=1)[1]}" if mirror else url


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While inside, no other process fetches the same file; says so where it has to wait."""
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"another process fetches {path}; waiting for it …", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(
    url: str,
    path: Path,
    *,
    num_bytes: int | None,
    sha256: str | None,
    check: Callable[[Path], None] | None,
    timeout_seconds: float,
    num_attempts: int,
    pause_seconds: float,
) -> None:
    """The file that is not there yet; arguments as in `fetch`."""
    part = path.with_name(path.name + ".part")
    try:
        _download(
            url,
            part,
            num_bytes=num_bytes,
            timeout_seconds=timeout_seconds,
            num_attempts=num_attempts,
            pause_seconds=pause_seconds,
        )
        _verify(part, num_bytes=num_bytes, sha256=sha256, check=check)
    except (*_BROKEN, _Refused) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        code = f"HTTP {error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        raise UserError(f"cannot fetch {url}: {code}{reason}; download it by hand and put it at {path}") from error
    os.replace(part, path)


def _download(
    url: str, part: Path, *, num_bytes: int | None, timeout_seconds: float, num_attempts: int, pause_seconds: float
) -> None:
    """Completes the .part; an attempt that got further than any before starts the count afresh."""
    most_bytes = num_failures = 0
    while True:
        try:
            return _download_once(url, part, num_bytes=num_bytes, timeout_seconds=timeout_seconds)
        except _BROKEN as error:
            asked_seconds = _retry_after(error)
            code = getattr(error, "code", 500)
            if code == 416:  # the .part is longer than the file, or belongs to an older one
                part.unlink(missing_ok=True)
            elif code != 429 and code < 500:
                raise
            have = _size(part)
            num_failures = 1 if have > most_bytes else num_failures + 1
            most_bytes = max(most_bytes, have)
            if num_failures >= num_attempts:
                raise
        time.sleep(max(pause_seconds * 2 ** (num_failures - 1), asked_seconds))


def _retry_after(error: Exception) -> float:
    """The seconds for which a busy server asks to be left alone, within reason; a date there is passed over."""
    value = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    seconds = min(int(value), _LONGEST_PAUSE_SECONDS) if value.isdecimal() else 0
    if seconds > 5:
        print(f"the server asks to wait {seconds} seconds …", file=sys.stderr)
    return seconds


def _download_once(url: str, part: Path, *, num_bytes: int | None, timeout_seconds: float) -> None:
    have = _size(part)
    if have and have == num_bytes:
        return
    headers = {"User-Agent": "vit_jax", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        response = urllib.request.urlopen(request, timeout=timeout_seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise _Refused("got an HTML page instead of the file")
        start, total = _read_range(response)
        if start != have and start != 0:
            part.unlink()
            raise http.client.HTTPException(f"asked for byte {have}, got byte {start}")
        if num_bytes is not None and total is not None and total != num_bytes:
            raise _Refused(f"the server has {total:,} bytes, expected {num_bytes:,}")
        total = num_bytes if total is None else total
        sizes = {"initial": start, "total": total, "unit": "B", "unit_scale": True, "unit_divisor": 1024}
        bar = progress_bar(desc=part.stem, delay=0, leave=True, **sizes)
        with part.open("ab" if start else "wb") as file, bar:
            while chunk := response.read1(_CHUNK_BYTES):  # what has come; `read` would lose it where the rest stalls
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) < total:
        raise http.client.HTTPException(f"the connection broke off after {_size(part):,} of {total:,} bytes")


def _read_range(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The first byte that the answer carries, and the length of the whole file where the server says it."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not match:
            raise _Refused("the server sent a part without saying which")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def _verify(part: Path, *, num_bytes: int | None, sha256: str | None, check: Callable[[Path], None] | None) -> None:
    try:
        if num_bytes is not None and _size(part) != num_bytes:
            raise _Refused(f"got {_size(part):,} bytes, expected {num_bytes:,}")
        if sha256 is not None:
            with part.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != sha256.lower():
                raise _Refused(f"got sha256 {digest}, expected {sha256}")
        if check is not None:
            check(part)
    except UserError as error:
        part.unlink()
        raise _Refused(str(error)) from error
    except _Refused:
        part.unlink()
        raise


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
