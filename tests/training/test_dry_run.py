import re

import jax
import pytest
from conftest import set_keys

from configs import digits
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training import device_fit, dry_run


def config_with(**changes):
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=64, num_layers=1, num_heads=4, mlp_dim=256)
    config.eval_batch_size = 8
    return set_keys(config, changes)


@pytest.fixture
def cost(monkeypatch):
    """Returns a function that measures the cost of a training step for a number of devices and config changes."""
    measured = []
    measure = dry_run.measure
    monkeypatch.setattr(dry_run, "measure", lambda *args: measured.append(measure(*args)) or measured[-1])
    create_mesh = sharding.create_mesh

    def run(num_devices=1, **changes):
        monkeypatch.setattr(sharding, "create_mesh", lambda **mesh: create_mesh(jax.devices()[:num_devices], **mesh))
        measured.clear()
        dry_run.dry_run(config_with(**changes))
        return measured[0]

    return run


def test_dry_run_matches_flops_of_layers(cost):
    """Two FLOPs per multiply-add; three passes, two in the first layer, as images need no gradient."""
    tokens, width, hidden = 17, 64, 256
    block = 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * tokens * width * hidden
    embedding, head = 16 * 4 * 4 * 3 * width, width * 10
    products = 3 * (block + head) + 2 * embedding
    assert cost().flops == pytest.approx(2 * products, rel=0.2)  # norms, softmax, GELU, optimizer: not in products


@pytest.mark.slow
def test_dry_run_measures_savings_of_accumulation_remat_and_sharding(cost):
    plain = cost(batch_size=64)
    accumulated = cost(batch_size=64, accumulation_steps=4)
    assert accumulated.temporaries < 0.6 * plain.temporaries
    assert accumulated.flops == pytest.approx(plain.flops, rel=0.1)
    rematerialized = cost(batch_size=64, remat="full")  # no savings on CPU; see test_aot.py
    assert 1.2 * plain.flops < rematerialized.flops < 1.5 * plain.flops
    replicated = cost(num_devices=8, batch_size=64)
    assert replicated.temporaries < 0.6 * plain.temporaries
    assert replicated.flops == pytest.approx(plain.flops, rel=0.1)
    sharded = cost(num_devices=8, batch_size=64, **{"mesh.fsdp": 8})
    kernels = 4 * 64 * 64 + 2 * 64 * 256  # of attention and MLP: large enough to be sharded
    assert replicated.arguments - sharded.arguments == 3 * 4 * kernels * 7 // 8  # parameters and two moments in float32


def test_dry_run_names_options_that_save_memory(monkeypatch, capsys):
    monkeypatch.setattr(sharding, "device_memory", lambda device: (2**20, "limit of the device"))
    with pytest.raises(UserError) as error:
        dry_run.dry_run(config_with(remat="dots"))
    assert re.fullmatch(
        r"the run needs 0\.\d\d GiB per device, of 0.00 GiB; raise accumulation_steps \(now 1\), set remat to "
        r"'full' \(now 'dots'\), shard the parameters over devices with mesh.fsdp \(now 1\), or lower "
        r"eval_batch_size \(now 8\)",
        str(error.value),
    )
    assert "estimated by the compiler for cpu, jax" in capsys.readouterr().out


def test_dry_run_shows_accumulation_steps_that_fit(monkeypatch, capsys):
    monkeypatch.setattr(device_fit, "smallest_fitting", lambda divisors, measure, **bytes: measure(4) and 4)
    dry_run.dry_run(config_with(accumulation_steps=0))
    assert re.search(r"microbatches of 16: 0\.\d\d GiB .* usable\naccumulation_steps: 4\n", capsys.readouterr().out)


def test_dry_run_reports_cached_features(capsys):
    dry_run.dry_run(config_with(trainable="head"))
    text = capsys.readouterr().out
    assert "as cached features" in text
    assert "head/.*         2           650" in text


def test_dry_run_writes_no_files(tmp_path, run_command):
    command = ["train.py", "--config", "configs/cifar100.py", "--dry_run", "--workdir", tmp_path / "run"]
    offline = {"VIT_JAX_CACHE": str(tmp_path / "cache"), "https_proxy": "http://localhost:9"}
    result = run_command(*command, "--config.model.num_layers=1", "--config.batch_size=8", env=offline)
    assert result.returncode == 0, result.stderr
    assert "cifar100: 50,000 training and 10,000 test images of 32 × 32 pixels, 100 classes" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert result.stderr == ""


def test_dry_run_rejects_download(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="config.model has no sizes, imagenet21k/ViT-B_16 is not in the cache"):
        dry_run.dry_run(config_with(model={}, pretrained="imagenet21k/ViT-B_16"))


def test_dry_run_rejects_checkpoint_of_other_size():
    with pytest.raises(UsageError, match=r"config.model does not match micro: hidden_size 64 \(checkpoint: 96\)"):
        dry_run.dry_run(config_with(pretrained="micro"))
