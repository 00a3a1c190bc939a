"""`fetch` against a real server on this machine."""

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
    """Answers every GET with the next of `answers`, the last one over and over; keeps the asked ranges."""

    daemon_threads = True

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = [PLAIN | answer for answer in answers] or [PLAIN]
        self.asked_ranges = []
        self.asked_paths = []
        self.stopping = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/file.bin"

    def handle_error(self, request, client_address):
        """Drops errors of connections that the client has closed."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        asked = self.headers.get("Range")
        self.server.asked_ranges.append(asked)
        self.server.asked_paths.append(self.path)
        self.server.stopping.wait(answer.get("delay", 0))
        content = answer.get("content", CONTENT)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and answer.get("ranges", True) else 0
        if answer["status"] != 200:
            self.send_response(answer["status"])
            for name, value in answer.get("headers", {}).items():
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
        self.send_header("Content-Type", answer["type"])
        self.send_header("Content-Length", str(answer.get("length", len(content)) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start : answer.get("break_at", len(content))])
        self.wfile.flush()
        self.server.stopping.wait(answer.get("stall", 0))

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(*answers):
    with Server(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_CHUNK_BYTES", 100)  # a part of a chunk is lost where a connection breaks off
    monkeypatch.setattr(download, "_NUM_RETRIES", 2)
    monkeypatch.setattr(download, "_NUM_REQUESTS", 4)
    monkeypatch.setattr(download, "_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 2.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "file.bin"


@pytest.fixture
def part(path):
    path.parent.mkdir()
    return path.with_name("file.bin.part")


def test_fetch_writes_the_whole_file(path, part):
    with serve() as server:
        assert fetch(server.url, path) == path
    assert path.read_bytes() == CONTENT
    assert not part.exists()


def test_fetch_shows_progress_on_stderr(path, capfd):
    with serve() as server:
        fetch(server.url, path)
    out, err = capfd.readouterr()
    assert "file.bin" in err and "1.00k/1.00k" in err
    assert out == ""


def test_fetch_returns_an_existing_file_without_asking(path, part):
    path.write_bytes(b"mine")
    assert fetch("http://127.0.0.1:1/file.bin", path) == path
    assert path.read_bytes() == b"mine"


def test_fetch_resumes_a_part_of_an_earlier_call(path, part):
    part.write_bytes(CONTENT[:100])
    with serve() as server:
        fetch(server.url, path)
    assert server.asked_ranges == ["bytes=100-"]
    assert path.read_bytes() == CONTENT


def test_fetch_resumes_where_a_connection_broke_off(path, part):
    with serve({"break_at": 300}, {"break_at": 700}, {}) as server:
        fetch(server.url, path)
    assert server.asked_ranges == [None, "bytes=300-", "bytes=700-"]
    assert path.read_bytes() == CONTENT


def test_fetch_keeps_the_part_when_the_connection_stays_broken(path, part):
    with (
        serve({"break_at": 300}) as server,
        pytest.raises(UserError, match="dropped after 300 bytes .rerun to resume.; download"),
    ):
        fetch(server.url, path)
    assert len(server.asked_ranges) == 4
    assert part.read_bytes() == CONTENT[:300]
    assert not path.exists()


def test_fetch_starts_again_where_the_server_ignores_ranges(path, part):
    part.write_bytes(b"x" * 100)
    with serve({"ranges": False}) as server:
        fetch(server.url, path)
    assert path.read_bytes() == CONTENT


def test_fetch_takes_a_complete_part(path, part):
    part.write_bytes(CONTENT)
    with serve() as server:
        fetch(server.url, path)
    assert server.asked_ranges == ["bytes=1024-"]
    assert path.read_bytes() == CONTENT


def test_fetch_checks_the_sha256(path, part):
    with serve() as server:
        fetch(server.url, path, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT


def test_fetch_refuses_a_wrong_sha256(path, part):
    with serve() as server, pytest.raises(UserError, match=f"expected {'0' * 64}"):
        fetch(server.url, path, sha256="0" * 64)
    assert not part.exists() and not path.exists()


def test_fetch_hands_the_part_to_check(path, part):
    seen = []
    with serve() as server:
        fetch(server.url, path, check=lambda file: seen.append((file, file.read_bytes())))
    assert seen == [(part, CONTENT)]


def test_fetch_refuses_what_check_refuses(path, part):
    def refuse(file):
        raise UserError("no array in it")

    with serve() as server, pytest.raises(UserError, match="no array in it; download it manually"):
        fetch(server.url, path, check=refuse)
    assert not part.exists() and not path.exists()


def test_fetch_refuses_an_html_page(path, part):
    with (
        serve({"type": "text/html; charset=utf-8"}) as server,
        pytest.raises(UserError, match="got HTTP 200 OK text/html; charset=utf-8; download"),
    ):
        fetch(server.url, path)
    assert not part.exists() and not path.exists()


def test_fetch_reports_url_reason_and_advice_in_one_line(path, part):
    with serve({"status": 404}) as server, pytest.raises(UserError) as caught:
        fetch(server.url, path)
    assert str(caught.value) == (
        f"cannot download {server.url}: got HTTP 404 Not Found; download it manually to {path}"
    )
    assert len(server.asked_ranges) == 1
    assert not part.exists() and not path.exists()


def test_fetch_waits_as_long_as_a_busy_server_asks(path, part):
    with serve({"status": 429, "headers": {"Retry-After": "1"}}, {}) as server:
        start = time.monotonic()
        fetch(server.url, path)
    assert time.monotonic() - start >= 1
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("mirror", ["mirror.example", "ftp://mirror.example"])
def test_fetch_reports_a_mirror_that_is_not_an_address(path, monkeypatch, mirror):
    monkeypatch.setenv("VIT_JAX_MIRROR", mirror)
    with pytest.raises(UserError, match=f"^cannot download {mirror}/storage.googleapis.com/x.npz: "):
        fetch("https://storage.googleapis.com/x.npz", path)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_fetch_tries_again_when_the_server_is_busy(path, part, status):
    with serve({"status": status}, {"status": status}, {}) as server:
        fetch(server.url, path)
    assert path.read_bytes() == CONTENT


def test_fetch_resumes_where_a_connection_stalls(path, part, monkeypatch):
    with serve({"break_at": 300, "stall": 30}, {}) as server:
        monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.3)
        fetch(server.url, path)
    assert server.asked_ranges == [None, "bytes=300-"]
    assert path.read_bytes() == CONTENT


def test_fetch_gives_up_where_the_server_sends_too_large_a_length(path, part):
    with (
        serve({"length": 5000, "ranges": False}) as server,
        pytest.raises(UserError, match="dropped after 1,000 bytes"),
    ):
        fetch(server.url, path)
    assert not path.exists()


def test_fetch_reports_a_full_disk(path, part):
    part.symlink_to("/dev/full")
    with serve() as server, pytest.raises(UserError) as caught:
        fetch(server.url, path)
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device; free disk space, or set $VIT_JAX_CACHE"
    )
    assert not path.exists()


@pytest.mark.parametrize("cache", ["/proc/nowhere", "/dev/null"])
def test_fetch_reports_a_directory_that_cannot_be_written(cache):
    with pytest.raises(UserError, match=rf"^cannot write {cache}/sub/file.bin: .*; free disk space, or set"):
        fetch("http://127.0.0.1:1/file.bin", f"{cache}/sub/file.bin")


def test_fetch_reports_a_lock_that_cannot_be_made(path, part):
    path.with_name("file.bin.lock").mkdir()
    with pytest.raises(UserError, match="cannot write .*file.bin: "):
        fetch("http://127.0.0.1:1/file.bin", path)


def test_fetch_gives_up_on_a_busy_server(path, part):
    with serve({"status": 503}) as server, pytest.raises(UserError, match="got HTTP 503"):
        fetch(server.url, path)
    assert len(server.asked_ranges) == 3


def test_fetch_reports_a_refused_connection(path, part):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: nobody else can take the port
        with pytest.raises(UserError, match="Connection refused; download it manually"):
            fetch(f"http://127.0.0.1:{free.getsockname()[1]}/file.bin", path)
    assert not part.exists() and not path.exists()


def test_fetch_reports_a_silent_server(path, part, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="timed out"):
        monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.1)
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/file.bin", path)
    assert not path.exists()


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    assert download.cache_dir() == tmp_path


def test_cache_dir_defaults_to_the_home(monkeypatch, tmp_path):
    monkeypatch.delenv("VIT_JAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download.cache_dir() == tmp_path / ".cache" / "vit_jax"


def test_a_mirror_is_asked_for_host_and_path(path, monkeypatch):
    with serve() as server:
        monkeypatch.setenv("VIT_JAX_MIRROR", server.url.removesuffix("file.bin"))
        fetch("https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz", path)
    assert path.read_bytes() == CONTENT
    assert server.asked_paths == ["/storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"]


def test_two_processes_fetch_a_file_once(path):
    script = "import sys; from vit_jax.runtime import download; download.fetch(sys.argv[1], sys.argv[2])"
    with serve({"delay": 1.5}) as server:
        command = [sys.executable, "-c", script, server.url, str(path)]
        both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
        assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert path.read_bytes() == CONTENT
    assert len(server.asked_ranges) == 1


def test_a_process_that_is_killed_leaves_no_lock(path):
    script = "import sys; from vit_jax.runtime import download; download.fetch(sys.argv[1], sys.argv[2])"
    with serve({"delay": 60}, {}) as server:
        first = subprocess.Popen([sys.executable, "-c", script, server.url, str(path)], cwd=ROOT)
        while not server.asked_ranges:
            time.sleep(0.05)
        first.kill()
        first.wait()
        fetch(server.url, path)
    assert path.read_bytes() == CONTENT
