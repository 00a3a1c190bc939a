"""Downloads from a local HTTP server."""

import contextlib
import hashlib
import http.server
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from vit_jax.runtime import download
from vit_jax.runtime.download import fetch
from vit_jax.runtime.errors import UserError

CONTENT = bytes(range(256)) * 4  # 1,024 bytes
PLAIN = {"status": 200, "type": "application/octet-stream"}


class Server(http.server.ThreadingHTTPServer):
    """Answers each GET request with the next response, repeats the last one, and records requested ranges and paths."""

    daemon_threads = True

    def __init__(self, *responses):
        super().__init__(("127.0.0.1", 0), Handler)
        self.responses = [PLAIN | response for response in responses] or [PLAIN]
        self.requested_ranges = []
        self.requested_paths = []
        self.stopping = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/file.bin"

    def handle_error(self, request, client_address):
        """Ignores errors of connections that the client has closed."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        responses = self.server.responses
        response = responses.pop(0) if len(responses) > 1 else responses[0]
        requested_range = self.headers.get("Range")
        self.server.requested_ranges.append(requested_range)
        self.server.requested_paths.append(self.path)
        self.server.stopping.wait(response.get("delay", 0))
        content = response.get("content", CONTENT)
        start = 0
        if requested_range and response.get("ranges", True):
            start = int(requested_range.removeprefix("bytes=").removesuffix("-"))
        if response["status"] != 200:
            self.send_response(response["status"])
            for name, value in response.get("headers", {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", response["type"])
        self.send_header("Content-Length", str(response.get("length", len(content)) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start : response.get("break_at", len(content))])
        self.wfile.flush()
        self.server.stopping.wait(response.get("stall", 0))

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(*responses):
    with Server(*responses) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_CHUNK_BYTES", 100)  # a partial chunk is lost when a connection drops
    monkeypatch.setattr(download, "_NUM_RETRIES", 2)
    monkeypatch.setattr(download, "_NUM_REQUESTS", 4)
    monkeypatch.setattr(download, "_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 2.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "file.bin"


@pytest.fixture
def partial_path(path):
    path.parent.mkdir()
    return path.with_name("file.bin.part")


def test_fetch_downloads_file(path, partial_path):
    with serve() as server:
        assert fetch(server.url, path) == path
    assert path.read_bytes() == CONTENT
    assert not partial_path.exists()


def test_fetch_shows_progress_on_stderr(path, capfd):
    with serve() as server:
        fetch(server.url, path)
    out, err = capfd.readouterr()
    assert "file.bin" in err and "1.00k/1.00k" in err
    assert out == ""


def test_fetch_returns_existing_file_without_request(path, partial_path):
    path.write_bytes(b"existing")
    assert fetch("http://127.0.0.1:1/file.bin", path) == path
    assert path.read_bytes() == b"existing"


def test_fetch_resumes_partial_file_of_earlier_call(path, partial_path):
    partial_path.write_bytes(CONTENT[:100])
    with serve() as server:
        fetch(server.url, path)
    assert server.requested_ranges == ["bytes=100-"]
    assert path.read_bytes() == CONTENT


def test_fetch_resumes_after_dropped_connection(path, partial_path):
    with serve({"break_at": 300}, {"break_at": 700}, {}) as server:
        fetch(server.url, path)
    assert server.requested_ranges == [None, "bytes=300-", "bytes=700-"]
    assert path.read_bytes() == CONTENT


def test_fetch_keeps_partial_file_after_repeated_disconnects(path, partial_path):
    with (
        serve({"break_at": 300}) as server,
        pytest.raises(UserError, match="dropped after 300 bytes .rerun to resume.; download"),
    ):
        fetch(server.url, path)
    assert len(server.requested_ranges) == 4
    assert partial_path.read_bytes() == CONTENT[:300]
    assert not path.exists()


def test_fetch_restarts_if_server_ignores_ranges(path, partial_path):
    partial_path.write_bytes(b"x" * 100)
    with serve({"ranges": False}) as server:
        fetch(server.url, path)
    assert path.read_bytes() == CONTENT


def test_fetch_accepts_complete_partial_file(path, partial_path):
    partial_path.write_bytes(CONTENT)
    with serve() as server:
        fetch(server.url, path)
    assert server.requested_ranges == ["bytes=1024-"]
    assert path.read_bytes() == CONTENT


def test_fetch_verifies_sha256(path, partial_path):
    with serve() as server:
        fetch(server.url, path, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT


def test_fetch_rejects_sha256_mismatch(path, partial_path):
    with serve() as server, pytest.raises(UserError, match=f"expected {'0' * 64}"):
        fetch(server.url, path, sha256="0" * 64)
    assert not partial_path.exists() and not path.exists()


def test_fetch_passes_partial_file_to_check(path, partial_path):
    calls = []
    with serve() as server:
        fetch(server.url, path, check=lambda file: calls.append((file, file.read_bytes())))
    assert calls == [(partial_path, CONTENT)]


def test_fetch_rejects_file_that_fails_check(path, partial_path):
    def check(file):
        raise UserError("it contains no array")

    with serve() as server, pytest.raises(UserError, match="it contains no array; download it manually"):
        fetch(server.url, path, check=check)
    assert not partial_path.exists() and not path.exists()


def test_fetch_rejects_html_page(path, partial_path):
    with (
        serve({"type": "text/html; charset=utf-8"}) as server,
        pytest.raises(UserError, match="got HTTP 200 OK text/html; charset=utf-8; download"),
    ):
        fetch(server.url, path)
    assert not partial_path.exists() and not path.exists()


def test_fetch_reports_http_error_in_one_line(path, partial_path):
    with serve({"status": 404}) as server, pytest.raises(UserError) as caught:
        fetch(server.url, path)
    assert str(caught.value) == (
        f"cannot download {server.url}: got HTTP 404 Not Found; download it manually to {path}"
    )
    assert len(server.requested_ranges) == 1
    assert not partial_path.exists() and not path.exists()


def test_fetch_respects_retry_after(path, partial_path):
    with serve({"status": 429, "headers": {"Retry-After": "1"}}, {}) as server:
        start = time.monotonic()
        fetch(server.url, path)
    assert time.monotonic() - start >= 1
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("mirror", ["mirror.example", "ftp://mirror.example"])
def test_fetch_rejects_invalid_mirror_url(path, monkeypatch, mirror):
    monkeypatch.setenv("VIT_JAX_MIRROR", mirror)
    with pytest.raises(UserError, match=f"^cannot download {mirror}/storage.googleapis.com/x.npz: "):
        fetch("https://storage.googleapis.com/x.npz", path)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_fetch_retries_when_server_is_busy(path, partial_path, status):
    with serve({"status": status}, {"status": status}, {}) as server:
        fetch(server.url, path)
    assert path.read_bytes() == CONTENT


def test_fetch_resumes_after_stalled_connection(path, partial_path, monkeypatch):
    with serve({"break_at": 300, "stall": 30}, {}) as server:
        monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.3)
        fetch(server.url, path)
    assert server.requested_ranges == [None, "bytes=300-"]
    assert path.read_bytes() == CONTENT


def test_fetch_fails_if_content_length_is_too_large(path, partial_path):
    with (
        serve({"length": 5000, "ranges": False}) as server,
        pytest.raises(UserError, match="dropped after 1,000 bytes"),
    ):
        fetch(server.url, path)
    assert not path.exists()


def test_fetch_reports_full_disk(path, partial_path):
    partial_path.symlink_to("/dev/full")
    with serve() as server, pytest.raises(UserError) as caught:
        fetch(server.url, path)
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device; free disk space, or set $VIT_JAX_CACHE"
    )
    assert not path.exists()


@pytest.mark.parametrize("cache", ["/proc/missing_dir", "/dev/null"])
def test_fetch_reports_unwritable_directory(cache):
    with pytest.raises(UserError, match=rf"^cannot write {cache}/sub/file.bin: .*; free disk space, or set"):
        fetch("http://127.0.0.1:1/file.bin", f"{cache}/sub/file.bin")


def test_fetch_reports_unwritable_lock_file(path, partial_path):
    path.with_name("file.bin.lock").mkdir()
    with pytest.raises(UserError, match="cannot write .*file.bin: "):
        fetch("http://127.0.0.1:1/file.bin", path)


def test_fetch_fails_after_retries_on_busy_server(path, partial_path):
    with serve({"status": 503}) as server, pytest.raises(UserError, match="got HTTP 503"):
        fetch(server.url, path)
    assert len(server.requested_ranges) == 3


def test_fetch_reports_refused_connection(path, partial_path):
    with socket.socket() as bound_socket:
        bound_socket.bind(("127.0.0.1", 0))  # bound but not listening, so that no other process can use the port
        with pytest.raises(UserError, match="Connection refused; download it manually"):
            fetch(f"http://127.0.0.1:{bound_socket.getsockname()[1]}/file.bin", path)
    assert not partial_path.exists() and not path.exists()


def test_fetch_reports_timeout(path, partial_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="timed out"):
        monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.1)
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/file.bin", path)
    assert not path.exists()


def test_fetch_requests_host_and_path_from_mirror(path, monkeypatch):
    with serve() as server:
        monkeypatch.setenv("VIT_JAX_MIRROR", server.url.removesuffix("file.bin"))
        fetch("https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz", path)
    assert path.read_bytes() == CONTENT
    assert server.requested_paths == ["/storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"]


def test_fetch_downloads_once_for_two_processes(path):
    script = "import sys; from vit_jax.runtime import download; download.fetch(sys.argv[1], sys.argv[2])"
    with serve({"delay": 1.5}) as server:
        command = [sys.executable, "-c", script, server.url, str(path)]
        processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert path.read_bytes() == CONTENT
    assert len(server.requested_ranges) == 1


def test_fetch_succeeds_after_lock_holder_is_killed(path):
    script = "import sys; from vit_jax.runtime import download; download.fetch(sys.argv[1], sys.argv[2])"
    with serve({"delay": 60}, {}) as server:
        first = subprocess.Popen([sys.executable, "-c", script, server.url, str(path)], cwd=ROOT)
        while not server.requested_ranges:
            time.sleep(0.05)
        first.kill()
        first.wait()
        fetch(server.url, path)
    assert path.read_bytes() == CONTENT
