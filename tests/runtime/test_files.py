import pytest

from vit_jax.runtime.errors import UserError
from vit_jax.runtime.files import atomic_path, cache_dir, write_atomically


@pytest.mark.parametrize("content", ["grün\n", "grün\n".encode()])
def test_write_atomically_replaces_content_and_leaves_no_temporary_file(tmp_path, content):
    (tmp_path / "a.json").write_text("before")
    write_atomically(tmp_path / "a.json", content)
    assert (tmp_path / "a.json").read_bytes() == "grün\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_write_atomically_reports_missing_directory(tmp_path):
    with pytest.raises(
        UserError, match=r"cannot write .*/missing_dir/a.json: No such file or directory; check the disk"
    ):
        write_atomically(tmp_path / "missing_dir" / "a.json", "{}")


def test_atomic_path_renames_directory(tmp_path):
    with atomic_path(tmp_path / "out") as directory:
        directory.mkdir()
        (directory / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("is_directory", [False, True])
def test_atomic_path_keeps_previous_file_on_failure(tmp_path, is_directory):
    (tmp_path / "out").write_text("before")
    with pytest.raises(KeyError), atomic_path(tmp_path / "out") as temporary:
        if is_directory:
            temporary.mkdir()
            temporary /= "a"
        temporary.write_text("partial")
        raise KeyError
    assert (tmp_path / "out").read_text() == "before"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_atomic_path_reports_full_disk(tmp_path):
    with pytest.raises(UserError, match="cannot write .*/out: No space left on device; check the disk"):
        with atomic_path(tmp_path / "out") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_cache_dir_uses_environment_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


def test_cache_dir_defaults_to_home_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("VIT_JAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "vit_jax"
