"""Contract tests of training runs, for every set of trainable parameters and every training option."""

import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import set_keys
from flax.traverse_util import flatten_dict

from configs import digits
from vit_jax import trainer
from vit_jax.models import VisionTransformer
from vit_jax.run import load_run
from vit_jax.training import optim
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.experiment import Experiment, create_experiment
from vit_jax.visualization import plotting

MODEL = {"patch_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 256}
DEEP = {**MODEL, "num_layers": 2, "dropout_rate": 0.1, "stochastic_depth_rate": 0.3}
VIEWS = {"features": "cached", "feature_views": 2, "augment": "flip"}
ATTENTION_AND_CLS = (r".*/encoderblock_0/MultiHeadDotProductAttention_1/.*", r"cls", r"head/.*")

# Every value of `trainable`, and every training option with one of them; keys as in `set_keys`.
RUNS = {
    "full": {
        "optimizer.name": "sgd",
        "optimizer.momentum_dtype": "bfloat16",
        "mixup_alpha": 0.3,
        "cutmix_alpha": 1.0,
        "label_smoothing": 0.1,
        "ema_decay": 0.9,
    },
    "full_accumulated": {"accumulation_steps": 2, "augment": "flip", "model": DEEP},
    "head": {"trainable": "head", "ema_decay": 0.9},
    "head_uncached": {"trainable": "head", "features": "fresh", "optimizer.name": "adam", "augment": "pad_crop"},
    "head_views": {"trainable": "head", "optimizer.name": "sgd", "optimizer.momentum_dtype": "bfloat16", **VIEWS},
    "mlp": {
        "trainable": "mlp",
        "optimizer.layer_decay": 0.5,
        "optimizer.decayed": "kernels",
        "ema_decay": 0.9,
        "mesh.fsdp": 4,
    },
    "attention": {"trainable": "attention", "optimizer.name": "adam", "dtype": "bfloat16"},
    "bias": {"trainable": "bias", "optimizer.name": "sgd"},
    "lora": {"trainable": "lora", "lora.rank": 2, "ema_decay": 0.9},
    "patterns": {"trainable": ATTENTION_AND_CLS, "label_smoothing": 0.1, "remat": "full"},
}
QUICK = ("head_views", "lora")
every_run = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS]
)
# In the middle of an epoch, between log steps; for some runs also at the end of an epoch and after an evaluation.
STOPS = {name: (7, 10, 12) if name in ("full", "head_views") else (7,) for name in RUNS}


def config_of(name, **changes):
    """Returns a config: 13 steps of 32 images, five steps per epoch, two devices; the last step is not a log step."""
    config = digits.get_config("scratch")
    config.model = MODEL
    config.image_size = 8
    config.dataset.train_split, config.dataset.test_split = "train[:160]", "test[:40]"
    config.update(batch_size=32, num_steps=13, warmup_steps=2, log_every_steps=3, eval_every_steps=6)
    config.learning_rate = 0.01
    config.mesh.data = 2
    return set_keys(config, {**RUNS[name], **changes})


@pytest.fixture(scope="module", autouse=True)
def patches():
    """Disables plotting, and shares compiled train steps between runs with the same config."""
    steps, compile_train_step = {}, Experiment.compile_train_step

    def compile_once(experiment):
        key = json.dumps({**experiment.config.to_dict(), "checkpoint_every_steps": None})
        if key not in steps:
            steps[key] = compile_train_step(experiment)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "compile_train_step", compile_once)
        curves = types.SimpleNamespace(savefig=lambda path, dpi: None)
        patch.setattr(plotting, "plot_curves", lambda records, title: curves)
        yield steps


def train(config, workdir, *, stop_at=None):
    """Trains; with `stop_at`, the run is interrupted after saving the checkpoint of that step.

    Returns:
        Host copies of the saved states, by step.
    """
    saved, save = {}, Checkpoints.save

    def save_and_stop(checkpoints, step, state, *args, **kwargs):
        saved[step] = jax.device_get(state)
        save(checkpoints, step, state, *args, **kwargs)
        if step == stop_at:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        if stop_at is None:
            trainer.train_and_evaluate(config, workdir)
        else:
            config.checkpoint_every_steps = stop_at
            with pytest.raises(InterruptedError):
                trainer.train_and_evaluate(config, workdir)
    return saved


def records(workdir):
    """Returns the records of metrics.jsonl without the throughput."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(patches, tmp_path_factory):
    """Returns `name -> (workdir, first state, last state)` of an uninterrupted run."""

    @functools.cache
    def run(name):
        workdir = tmp_path_factory.mktemp("uninterrupted") / name
        last = train(config_of(name), workdir)[13]
        first = jax.device_get(create_experiment(config_of(name))[1])
        return workdir, first, last

    return run


def assert_same_bits(actual, expected):
    actual, expected = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        assert leaf.dtype == expected[path].dtype
        assert leaf.tobytes() == expected[path].tobytes(), jax.tree_util.keystr(path)


# ---- interrupted, repeated, on other devices


@every_run
def test_train_and_evaluate_resumes_bit_exactly(uninterrupted, tmp_path, name):
    workdir, _, last = uninterrupted(name)
    for stop_at in STOPS[name]:
        saved = train(config_of(name), tmp_path, stop_at=stop_at)
        assert list(saved)[-1] == stop_at
        assert records(tmp_path) == [record for record in records(workdir) if record["step"] <= stop_at]
    saved = train(config_of(name), tmp_path)
    assert list(saved) == ([13] if 12 in STOPS[name] else [12, 13])  # every evaluation is followed by a save
    assert_same_bits(saved[13], last)
    assert records(tmp_path) == records(workdir)
    assert [record["step"] for record in records(workdir)] == [3, 6, 6, 9, 12, 12, 13, 13]


@pytest.mark.parametrize("name", [pytest.param("bias", marks=pytest.mark.slow), "head_views"])
def test_train_and_evaluate_is_deterministic_for_each_seed(uninterrupted, patches, tmp_path, name):
    patches.clear()  # traced and compiled again
    again = train(config_of(name), tmp_path / "again")
    assert_same_bits(again[13], uninterrupted(name)[2])
    assert records(tmp_path / "again") == records(uninterrupted(name)[0])
    train(config_of(name, seed=1), tmp_path / "other")
    for other, record in zip(records(tmp_path / "other"), records(uninterrupted(name)[0]), strict=True):
        assert other.get("train/loss", other.get("test/loss")) != record.get("train/loss", record.get("test/loss"))


@pytest.fixture(scope="module")
def interrupted(patches, tmp_path_factory):
    """Directory of a run that stopped at step 7, with its state sharded over four devices."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    train(config_of("mlp"), workdir, stop_at=7)
    return workdir


@pytest.mark.parametrize(
    ("data", "fsdp"), [(2, 4), (1, 1), *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in [(4, 2), (8, 1)])]
)
def test_train_and_evaluate_resumes_on_different_mesh(uninterrupted, interrupted, tmp_path, monkeypatch, data, fsdp):
    workdir, restored, restore = tmp_path / "run", [], Checkpoints.restore

    def restore_and_record(*args):
        state = restore(*args)
        restored.append(shard_shapes(state))
        return state

    def shard_shapes(state):
        kernels = [optim.merge_params(state.trainable, state.frozen), optax.tree.get(state.opt_state, "mu"), state.ema]
        kernels = [tree["Transformer"]["encoderblock_0"]["MlpBlock_3"]["Dense_0"]["kernel"] for tree in kernels]
        return [[shard.data.shape for shard in kernel.addressable_shards] for kernel in kernels]

    monkeypatch.setattr(Checkpoints, "restore", restore_and_record)
    shutil.copytree(interrupted, workdir)
    train(config_of("mlp", **{"mesh.data": data, "mesh.fsdp": fsdp}), workdir)
    assert restored == [[[(16, 256 // fsdp)] * (data * fsdp)] * 3]  # kernel, moment and EMA on every device
    actual, expected = records(workdir), records(uninterrupted("mlp")[0])
    assert actual[-1]["test/loss"] == pytest.approx(expected[-1]["test/loss"], abs=1e-5)
    assert actual[-1]["test/loss"] != pytest.approx(expected[2]["test/loss"], abs=1e-3)  # the loss at step 6


# ---- trainable and frozen parameters


@every_run
def test_train_and_evaluate_updates_only_trainable_parameters(uninterrupted, name):
    _, first, last = uninterrupted(name)
    assert_same_bits(last.frozen, first.frozen)
    before, after = (flatten_dict(state.trainable, sep="/") for state in (first, last))
    unchanged = {path for path in before if np.array_equal(before[path], after[path])}
    # The bias of the keys shifts all scores of a query equally; softmax ignores it, and its gradient is rounding error.
    assert {path for path in unchanged if not path.endswith("key/bias")} == set()
    assert bool(flatten_dict(first.frozen)) == (not name.startswith("full"))


# ---- loading a run


def checkpoint_keys():
    model = VisionTransformer(10, **MODEL)
    return set(flatten_dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"], sep="/"))


def flat_run(workdir):
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(load_run(workdir).params, sep="/").items()}


def test_load_run_returns_ema_of_all_steps(uninterrupted, tmp_path):
    _, first, last = uninterrupted("head")
    states = train(config_of("head", checkpoint_every_steps=1), tmp_path)
    assert sorted(states) == list(range(1, 14))
    ema = flatten_dict(first.trainable, sep="/")
    for step in range(1, 14):
        values = flatten_dict(states[step].trainable, sep="/")
        decay = min(0.9, step / (9 + step))  # (1 + t) / (10 + t) after t = step - 1 earlier updates
        ema = {path: decay * leaf + (1 - decay) * values[path] for path, leaf in ema.items()}
    actual = flat_run(tmp_path)
    assert set(actual) == checkpoint_keys()
    for path, leaf in ema.items():
        np.testing.assert_allclose(actual[path], leaf, atol=1e-6, rtol=0, err_msg=path)
    for path, leaf in flatten_dict(first.frozen, sep="/").items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)
    assert np.abs(actual["head/kernel"] - last.trainable["head"]["kernel"]).max() > 1e-3  # the EMA lags behind


def test_load_run_merges_lora_weights_and_keeps_checkpoint_keys(uninterrupted):
    workdir, first, last = uninterrupted("lora")
    actual, frozen = flat_run(workdir), flatten_dict(first.frozen, sep="/")
    assert set(actual) == {path for path in frozen if not path.startswith("lora/")} | {"head/kernel", "head/bias"}
    np.testing.assert_array_equal(actual["head/kernel"], last.ema["head"]["kernel"])
    lora = flatten_dict(last.ema["lora"], sep="/")
    adapted = {path.removesuffix("/a") for path in lora if path.endswith("/a")}
    assert adapted == {path for path in frozen if path.endswith(("query/kernel", "value/kernel"))} and len(adapted) == 2
    for path, leaf in frozen.items():
        # [d r] · [r k h], scaled by alpha / rank = 8 / 2
        product = 4 * np.einsum("dr,rkh->dkh", lora[f"{path}/a"], lora[f"{path}/b"]) if path in adapted else 0.0
        np.testing.assert_allclose(actual[path], leaf + product, atol=1e-6, rtol=0, err_msg=path)
        assert np.array_equal(actual[path], leaf) == (path not in adapted), path


@pytest.mark.parametrize("name", ["mlp", "head_views", "lora"])
def test_evaluate_matches_logged_results(uninterrupted, name):
    workdir = uninterrupted(name)[0]
    expected = {"step": 13, **load_run(workdir).evaluate()}
    if "ema_decay" in RUNS[name]:
        expected |= load_run(workdir, use_ema=False).evaluate(prefix="test_raw")
        assert expected["test/loss"] != pytest.approx(expected["test_raw/loss"], abs=1e-4)
    assert records(workdir)[-1] == pytest.approx(expected, rel=1e-5)
