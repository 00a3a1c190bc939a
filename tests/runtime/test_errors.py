import io
import logging

import jax.numpy as jnp
import pytest

from vit_jax.runtime.errors import UsageError, UserError, one_line, run_command


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--x is 3;\n  expected 4"), 2, "error: --x is 3; expected 4\n"),
        (UserError("the file is damaged"), 1, "error: the file is damaged\n"),
        (MemoryError("Unable to allocate 4 PiB"), 1, "error: Unable to allocate 4 PiB\n"),
        (PermissionError(13, "Permission denied", "a"), 1, "error: [Errno 13] Permission denied: 'a'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("stopped by SIGINT; saved checkpoint 3"), 130, "stopped by SIGINT; saved checkpoint 3\n"),
    ],
)
def test_run_command_prints_one_line_and_returns_exit_code(capsys, error, code, line):
    assert run_command(raising(error)) == code
    assert capsys.readouterr().err == line


def test_run_command_escapes_undecodable_file_names(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", stdout)
    assert run_command(lambda: print("\udcff.png") or 0) == 0
    stdout.flush()
    assert stdout.buffer.getvalue() == b"\\udcff.png\n"


def test_run_command_returns_exit_code_of_main():
    assert run_command(lambda: 0) == 0


def test_run_command_reraises_unexpected_errors():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="bug"):
        run_command(raising(RuntimeError("bug")))


def test_run_command_suggests_accumulation_steps_when_out_of_memory(capsys):
    def main():
        jnp.ones(10**14).block_until_ready()  # 400 TB
        return 0

    assert run_command(main) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: RESOURCE_EXHAUSTED") and "accumulation_steps" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "level", "has_traceback", "shown"),
    [
        ("/site-packages/orbax/checkpoint/a.py", logging.WARNING, False, False),
        ("/site-packages/orbax/checkpoint/a.py", logging.ERROR, True, False),
        ("/site-packages/orbax/checkpoint/a.py", logging.ERROR, False, True),
        ("/site-packages/grain/a.py", logging.WARNING, False, True),
    ],
)
def test_run_command_hides_warnings_and_tracebacks_only_of_orbax(path, level, has_traceback, shown):
    exception = (KeyError, KeyError(), None) if has_traceback else None
    record = logging.LogRecord("absl", level, path, 1, "message", None, exception)
    assert run_command(lambda: int(bool(logging.getLogger("absl").filter(record)))) == shown


def test_one_line_joins_lines_and_is_never_empty():
    assert one_line("a\n  b") == "a b"
    assert one_line(KeyError()) == "KeyError"
