import contextlib
import urllib.parse

import numpy as np
import pytest
from reference import flat_params, nest
from test_download import serve

from vit_jax import pretrained
from vit_jax.runtime import download
from vit_jax.runtime.errors import UsageError, UserError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.npz"


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Records downloads without making them; `downloads["params"]` is checked as the downloaded file, if given."""
    calls = {}

    def fetch(url, path, *, check):
        calls.update(url=url, path=path)
        if "params" in calls:
            part = tmp_path / "download.part"
            pretrained.save_npz(part, nest(calls["params"]))
            check(part)
        return path

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    return calls


def test_resolve_downloads_pretrained_checkpoint_to_cache(downloads, tmp_path):
    assert pretrained.resolve("imagenet21k/ViT-B_16") == tmp_path / "cache" / "imagenet21k" / "ViT-B_16.npz"
    assert downloads["url"] == "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"


@pytest.mark.parametrize("name", pretrained.RELEASED)
def test_resolve_quotes_url(downloads, name):
    pretrained.resolve(name)
    assert "+" not in downloads["url"]
    url_path = urllib.parse.unquote(downloads["url"]).removeprefix("https://storage.googleapis.com/")
    assert url_path == f"{'' if name.startswith(('bit_models/', 'big_vision/')) else 'vit_models/'}{name}.npz"


INDEX = """name,ds,lr,aug,wd,do,sd,best_val,final_val,final_test,adapt_ds,adapt_final_val,params,filename,adapt_filename
B/16,i21k,0.001,none,0.1,0.0,0.0,0.49,0.44,0.43,cifar100,0.9,86,B_16-i21k-a,B_16-i21k-a--cifar100
B/16,i21k,0.001,light1,0.1,0.0,0.0,0.48,0.4650,0.45,cifar100,0.9,86,B_16-i21k-b,B_16-i21k-b--cifar100
B/16,i21k,0.001,light1,0.1,0.0,0.0,0.48,0.4650,0.45,pets,0.99,86,B_16-i21k-b,B_16-i21k-b--pets
B/16,i1k,0.001,none,0.1,0.0,0.0,0.8,0.79,0.78,pets,0.9,86,B_16-i1k-c,B_16-i1k-c--pets
R26+S/32,i21k,0.001,none,0.1,0.0,0.0,0.6,0.55,0.5,pets,0.9,36,R26_S_32-i21k-d,R26_S_32-i21k-d--pets
"""


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """Returns a context manager, `mirror(content, …)`: a server that returns the given contents in order."""

    @contextlib.contextmanager
    def start_server(*contents):
        monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
        with serve(*({"content": content} for content in contents)) as server:
            monkeypatch.setenv("VIT_JAX_MIRROR", server.url.removesuffix("/file.bin"))
            yield server

    return start_server


def test_resolve_selects_best_augreg_checkpoint_of_variant(mirror, tmp_path, capsys):
    """Best by final validation accuracy among those pretrained on ImageNet-21k; the index is downloaded once."""
    pretrained.save_npz(tmp_path / "small.npz", nest(flat_params()))
    content = (tmp_path / "small.npz").read_bytes()
    with mirror(INDEX.encode(), content) as server:
        assert pretrained.resolve("augreg/B_16") == tmp_path / "cache/augreg/B_16-i21k-b.npz"
        assert pretrained.resolve("augreg/B_16-i21k-b").read_bytes() == content
        assert pretrained.resolve("augreg/B_16").exists()
    bucket = "/storage.googleapis.com/vit_models/augreg"
    assert server.requested_paths == [f"{bucket}/index.csv", f"{bucket}/B_16-i21k-b.npz"]
    assert capsys.readouterr().err.endswith("augreg/B_16 is augreg/B_16-i21k-b\n")


def test_resolve_lists_augreg_variants(mirror):
    with (
        mirror(INDEX.encode()),
        pytest.raises(UsageError, match="unknown variant augreg/B_7; .* one of B_16, R26_S_32"),
    ):
        pretrained.resolve("augreg/B_7")


def test_resolve_rejects_index_with_other_columns(mirror, tmp_path):
    with mirror(b"name,file\nB/16,a\n"), pytest.raises(UserError, match="expected the columns filename, ds, final_val"):
        pretrained.resolve("augreg/B_16")
    assert not (tmp_path / "cache/augreg/index.csv").exists()


def test_resolve_rejects_download_of_unknown_format(downloads):
    downloads["params"] = {"layer1/weight": np.zeros(1)}
    with pytest.raises(UserError, match="not the parameters of a known model: found layer1/weight"):
        pretrained.resolve("imagenet21k/ViT-L_32")


def test_resolve_accepts_path(path, monkeypatch):
    path.touch()
    assert pretrained.resolve(str(path)) == path
    monkeypatch.setenv("HOME", str(path.parent))
    assert pretrained.resolve("~/params.npz") == path


def test_resolve_rejects_missing_path(path):
    with pytest.raises(UserError, match="there is no file .*params.npz.*; check the path") as caught:
        pretrained.resolve(str(path))
    assert caught.value.exit_code == 1


def test_resolve_suggests_nearest_names():
    with pytest.raises(
        UsageError, match="no file ViT-L_32, and no pretrained checkpoint of that name.* such as imagenet21k/ViT-L_32"
    ):
        pretrained.resolve("ViT-L_32")


def test_resolve_finds_bundled_checkpoint():
    assert pretrained.resolve("micro").name == "ViT-micro_4.npz" and pretrained.resolve("micro").exists()


def test_is_local_is_true_for_existing_files_and_cached_names(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    assert pretrained.is_local("micro") and pretrained.is_local(str(tmp_path))
    assert not any(map(pretrained.is_local, ("", "imagenet21k/ViT-B_16", f"{tmp_path}/no.npz")))
    (tmp_path / "imagenet21k").mkdir()
    (tmp_path / "imagenet21k/ViT-B_16.npz").touch()
    assert pretrained.is_local("imagenet21k/ViT-B_16")
