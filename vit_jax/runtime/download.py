"""Downloads pretrained checkpoints and dataset archives to a cache; resumes and verifies downloads."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from vit_jax.runtime.errors import UserError, one_line
from vit_jax.runtime.files import rename_synced
from vit_jax.runtime.progress import progress_bar

if TYPE_CHECKING:
    import requests

_CHUNK_BYTES = 1 << 16
_TIMEOUT_SECONDS = 30.0  # of a connection without data
_NUM_RETRIES = 4  # of a failed request
_BACKOFF_SECONDS = 1.0
_NUM_REQUESTS = 20  # per file, if connections drop


def fetch(
    url: str, path: str | os.PathLike[str], *, sha256: str = "", check: Callable[[Path], object] | None = None
) -> Path:
    """Downloads a file unless it exists; a file at `path` is always complete and verified.

    Downloads to `path` + ".part", from which a later call resumes. Only one of several processes downloads.

    Args:
        url: http(s) address. `$VIT_JAX_MIRROR`, if set, replaces the server: `$VIT_JAX_MIRROR/HOST/PATH`.
        path: path of the file; also returned.
        sha256: expected hexadecimal digest.
        check: called with the path of the complete .part; raises `UserError` if the content is wrong.
    """
    path = Path(path)
    if path.exists():
        return path
    import requests  # takes 60 ms

    part = path.with_name(path.name + ".part")
    if mirror := os.environ.get("VIT_JAX_MIRROR", "").rstrip("/"):
        url = f"{mirror}/{url.partition('://')[2]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(path.name + ".lock")):
            if not path.exists():
                _download(url, part)
                _verify(part, sha256, check)
                rename_synced(part, path)
    except (requests.RequestException, UserError) as error:
        cause = getattr(error.args[0], "reason", error)  # of urllib3's MaxRetryError
        raise UserError(f"cannot download {url}: {one_line(cause)}; download it manually to {path}") from error
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"cannot write {path}: {reason}; free disk space, or set $VIT_JAX_CACHE") from error
    return path


def _download(url: str, part: Path) -> None:
    """Completes the .part; `Retry` repeats failed requests, the loop resumes dropped connections."""
    import requests.adapters
    from urllib3.util import Retry

    codes = (429, 500, 502, 503, 504)
    retry = Retry(_NUM_RETRIES, backoff_factor=_BACKOFF_SECONDS, status_forcelist=codes, raise_on_status=False)
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        for _ in range(_NUM_REQUESTS):
            if _request_rest(session, url, part):
                return
    raise UserError(f"the connection dropped after {_size(part):,} bytes (rerun to resume)")


def _request_rest(session: "requests.Session", url: str, part: Path) -> bool:
    """Appends the missing bytes to the .part; returns True if it is complete."""
    import requests

    start = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as response:
        if response.status_code == 416 and start:  # the file has no more bytes
            return True
        content_type = response.headers.get("Content-Type", "")
        if not response.ok or content_type.startswith("text/html"):
            raise UserError(f"got HTTP {response.status_code} {response.reason} {content_type}".rstrip())
        start = start if response.status_code == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        units = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
        bar = progress_bar(None, desc=part.stem, initial=start, total=total, delay=0, leave=True, **units)
        with bar, part.open("ab" if start else "wb") as file:
            try:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
            except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError):
                return False
    return total is None or _size(part) >= total


def _verify(part: Path, sha256: str, check: Callable[[Path], object] | None) -> None:
    """Verifies the .part; removes it if it is not as expected."""
    try:
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 not in ("", digest):
            raise UserError(f"its sha256 is {digest}, expected {sha256}")
        if check:
            check(part)
    except UserError:
        part.unlink()
        raise


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
