import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_training
from conftest import ROOT
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import data
from vit_jax.data import preprocess
from vit_jax.data.batches import resident_batches
from vit_jax.models import VisionTransformer
from vit_jax.runtime import rng, sharding
from vit_jax.training import metrics, optim, steps
from vit_jax.training.inference import ImageForward

MODEL = VisionTransformer(10, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32)


@pytest.fixture(scope="module")
def digits():
    """Real images, 8 × 8."""
    return data.load_dataset("digits", image_size=8).train


@pytest.fixture(scope="module")
def params():
    """Drawn at random, the head too, so that every gradient is alive from the first step."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def wide_params():
    """A model wide enough for its kernels to be split over eight devices, and its parameters."""
    model = VisionTransformer(10, patch_size=4, hidden_size=32, num_layers=2, num_heads=2, mlp_dim=256)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)


class Setup:
    """A state and jitted functions on a mesh, as the trainer makes them."""

    def __init__(
        self,
        params,
        split,
        *,
        num_devices=8,
        fsdp=1,
        mode="full",
        batch_size=16,
        augment="none",
        model=MODEL,
        ema_decay=0.0,
        **options,
    ):
        mesh = sharding.create_mesh(jax.devices()[:num_devices], fsdp=fsdp)
        everywhere = sharding.replicated(mesh)
        schedule = optim.make_schedule(
            "cosine",
            learning_rate=reference_training.LEARNING_RATE,
            warmup_steps=reference_training.WARMUP_STEPS,
            num_steps=reference_training.NUM_STEPS,
        )
        tx = optim.create_optimizer(
            "sgd",
            schedule=schedule,
            momentum=reference_training.MOMENTUM,
            weight_decay=reference_training.WEIGHT_DECAY,
            clip_norm=reference_training.CLIP_NORM,
        )

        def create(params):
            return steps.create_train_state(params, patterns=optim.MODES[mode], tx=tx, seed=0, use_ema=ema_decay > 0)

        shardings = sharding.param_shardings(jax.eval_shape(create, params), mesh)
        self.state = jax.jit(create, out_shardings=shardings)(sharding.device_put(params, everywhere))
        arrays = sharding.device_put((split.images, split.labels), everywhere)
        self.batches = resident_batches(*arrays, mesh, batch_size=batch_size, seed=0, first_step=0, num_steps=1000)
        train_step = steps.TrainStep(
            ImageForward(model, image_size=8, augment=augment, dropout=True),
            tx,
            schedule,
            mesh,
            batch_size=batch_size,
            ema_decay=ema_decay,
            **options,
        )
        self.step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere))

    def run(self, num_steps):
        """Trains; returns the metrics of the last step."""
        for _, batch in itertools.islice(self.batches, num_steps):
            self.state, scalars = self.step(self.state, batch)
        return scalars

    def params(self):
        return flatten_dict(optim.merge_params(self.state.trainable, self.state.frozen), sep="/")


def first(split, number):
    return type(split)(split.images[:number], split.labels[:number])


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], atol=tolerance, rtol=0, err_msg=key)


@pytest.mark.parametrize("mode", ["full", "head"])
def test_full_batch_training_follows_a_float64_reference(digits, params, tmp_path, run_command, mode):
    split = first(digits, 16)
    flat = {f"params/{key}": leaf for key, leaf in flatten_dict(params, sep="/").items()}
    images = np.asarray(preprocess.normalize(split.images))
    prefix = "head/" if mode == "head" else ""
    np.savez(tmp_path / "in.npz", images=images, labels=split.labels, trainable=prefix, **flat)
    script = ROOT / "tests" / "reference_training.py"
    result = run_command(script, tmp_path / "in.npz", tmp_path / "out.npz", env={"JAX_ENABLE_X64": "1"})
    assert result.returncode == 0, result.stderr

    setup = Setup(params, split, mode=mode)
    with jax.default_matmul_precision("highest"):
        setup.run(reference_training.NUM_STEPS)
    trace = flatten_dict(optax.tree.get(setup.state.opt_state, "trace"), sep="/")
    ours = setup.params() | {f"trace/{key}": leaf for key, leaf in trace.items()}
    with np.load(tmp_path / "out.npz") as file:
        theirs = {key: file[key] for key in file}
    assert_close(ours, theirs, 1e-5)
    moved = np.abs(theirs["head/kernel"] - flat["params/head/kernel"]).max()
    assert moved > 1e-2  # the updates are far larger than what the comparison lets through


def test_train_step_overfits_16_images(digits, params):
    setup = Setup(params, first(digits, 16))
    before = setup.run(1)["train/loss"]
    assert setup.run(4)["train/loss"] < before - 0.1


def test_frozen_parameters_stay_bit_identical_and_have_no_optimizer_state(digits, params):
    setup = Setup(params, first(digits, 16), mode="head")
    before = {key: np.asarray(leaf) for key, leaf in setup.params().items()}
    setup.run(5)
    after = setup.params()
    changed = {key for key in after if not np.array_equal(before[key], after[key])}
    assert changed == {"head/kernel", "head/bias"}
    sizes = sum(leaf.size for leaf in jax.tree.leaves(setup.state.opt_state))
    assert sizes <= 16 * 10 + 10 + 2  # the momentum of the head, and counters


def test_accumulation_gives_the_update_of_the_large_batch(digits, params):
    whole, parts = (
        Setup(params, digits, num_devices=2, batch_size=32, accumulation_steps=n, augment="inception") for n in (1, 4)
    )
    ours, theirs = parts.run(3), whole.run(3)
    assert_close(parts.params(), whole.params(), 1e-6)
    assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), abs=1e-6)
    assert float(ours["train/accuracy"]) == pytest.approx(float(theirs["train/accuracy"]), abs=1e-6)


NOISY = MODEL.clone(dropout_rate=0.3, attention_dropout_rate=0.2, stochastic_depth_rate=0.5)


@pytest.mark.parametrize("options", [{"accumulation_steps": 4}, {"num_devices": 8}, {"num_devices": 8, "fsdp": 4}])
def test_train_step_samples_dropout_per_image(digits, params, options):
    """Accumulation and devices split the batch; neither changes the masks."""
    options = {"num_devices": 2, **options}
    params = unflatten_dict({p: leaf + (p[-1] == "scale") for p, leaf in flatten_dict(params).items()})
    whole = Setup(params, digits, num_devices=1, batch_size=32, model=NOISY)
    parts = Setup(params, digits, batch_size=32, model=NOISY, **options)
    ours, theirs = parts.run(3), whole.run(3)
    assert_close(parts.params(), whole.params(), 1e-6)
    assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), abs=1e-6)
    plain = Setup(params, digits, num_devices=1, batch_size=32)
    assert abs(float(plain.run(3)["train/loss"]) - float(theirs["train/loss"])) > 1e-2


def test_eight_devices_give_the_update_of_one(digits, params):
    one, eight = (Setup(params, digits, num_devices=n, batch_size=32, augment="inception") for n in (1, 8))
    ours, theirs = eight.run(4), one.run(4)
    assert_close(eight.params(), one.params(), 1e-5)
    assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), abs=1e-5)


def test_train_step_reports_the_loss_of_its_batch_before_the_update(digits, params):
    setup = Setup(params, first(digits, 40), batch_size=16)
    order = np.asarray(rng.epoch_order(setup.state.key, 0, 40))
    for step in range(2):
        rows = order[step * 16 : (step + 1) * 16]
        before = optim.merge_params(setup.state.trainable, setup.state.frozen)
        logits = MODEL.apply({"params": before}, preprocess.normalize(digits.images[rows]))
        expected = metrics.cross_entropy(logits, digits.labels[rows]).mean()
        scalars = setup.run(1)
        assert float(scalars["train/loss"]) == pytest.approx(float(expected), abs=1e-5)
        assert float(scalars["train/accuracy"]) == pytest.approx(
            float((logits.argmax(-1) == digits.labels[rows]).mean())
        )


def test_the_reported_learning_rate_is_that_of_the_update(digits, params):
    setup = Setup(params, first(digits, 16))
    rates = [float(setup.run(1)["learning_rate"]) for _ in range(4)]
    # warm-up of two updates to 0.1, then the cosine over three
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.1, 0.075], atol=1e-7)


def test_the_first_step_that_is_not_finite_is_kept(digits, params):
    split = first(digits, 16)
    setup = Setup(params, split)
    setup.run(1)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, setup.state.trainable)
    setup.state = dataclasses.replace(setup.state, trainable=broken)
    setup.run(3)
    assert int(setup.state.first_nonfinite_step) == 2


def test_steady_steps_transfer_nothing_from_the_host(digits, params):
    setup = Setup(params, first(digits, 40), batch_size=16)
    setup.run(3)  # into the second epoch
    with jax.transfer_guard("disallow"):
        setup.run(4)
    assert int(setup.state.step) == 7


def test_the_state_is_donated(digits, params):
    setup = Setup(params, first(digits, 16))
    before = setup.state
    setup.run(1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


MIXING = {"mixup_alpha": 0.3, "cutmix_alpha": 1.0, "label_smoothing": 0.1}


def test_accumulation_gives_the_update_of_the_large_batch_when_images_are_mixed(digits, params):
    whole, parts = (
        Setup(params, digits, num_devices=2, batch_size=32, accumulation_steps=n, augment="inception", **MIXING)
        for n in (1, 4)
    )
    ours, theirs = parts.run(3), whole.run(3)
    assert_close(parts.params(), whole.params(), 1e-6)
    assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), abs=1e-6)


def test_train_step_weights_both_labels_of_mixed_images(digits, params):
    """The loss of a step is that of the mixed images under both labels, worked out apart."""
    setup = Setup(params, first(digits, 16), mixup_alpha=0.3, label_smoothing=0.1)
    rows = np.asarray(rng.epoch_order(setup.state.key, 0, 16))
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(setup.state.key, 2), 0), 16)
    images = preprocess.normalize(digits.images[rows])
    partners = np.roll(rows, 1)
    mixed, weight = preprocess.mix(
        keys, images, preprocess.normalize(digits.images[partners]), mixup_alpha=0.3, cutmix_alpha=0.0
    )
    log_probabilities = np.asarray(jax.nn.log_softmax(MODEL.apply({"params": params}, mixed)))
    weight = np.asarray(weight)
    one_hot = np.eye(10)[digits.labels]
    targets = weight[:, None] * one_hot[rows] + (1 - weight)[:, None] * one_hot[partners]
    expected = -((0.9 * targets + 0.01) * log_probabilities).sum(axis=1).mean()
    assert float(setup.run(1)["train/loss"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("num_devices", "fsdp", "mode"), [(8, 8, "full"), (8, 4, "full"), (4, 2, "full"), (8, 4, "mlp")]
)
def test_sharded_parameters_give_the_update_of_one_device(digits, wide_params, num_devices, fsdp, mode):
    model, params = wide_params
    options = {"model": model, "mode": mode, "batch_size": 32, "augment": "inception", "ema_decay": 0.5}
    one, many = (Setup(params, digits, num_devices=n, fsdp=f, **options) for n, f in ((1, 1), (num_devices, fsdp)))
    for _ in range(4):
        ours, theirs = many.run(1), one.run(1)
        assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), abs=1e-5)
    assert_close(many.params(), one.params(), 1e-5)
    assert_close(flatten_dict(many.state.ema), flatten_dict(one.state.ema), 1e-5)


def test_sharded_state_is_split_over_the_devices(digits, wide_params):
    model, params = wide_params
    setup = Setup(params, digits, fsdp=8, model=model, batch_size=32)
    setup.run(1)
    kernel = setup.state.trainable["Transformer"]["encoderblock_0"]["MlpBlock_3"]["Dense_0"]["kernel"]
    assert kernel.shape == (32, 256)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 32)}
    momentum = optax.tree.get(setup.state.opt_state, "trace")["Transformer"]["encoderblock_0"]["MlpBlock_3"]
    assert {shard.data.shape for shard in momentum["Dense_0"]["kernel"].addressable_shards} == {(32, 32)}
    bias = setup.state.trainable["Transformer"]["encoderblock_0"]["MlpBlock_3"]["Dense_0"]["bias"]
    assert bias.is_fully_replicated


def test_train_step_updates_ema_of_trainable_parameters(digits, params):
    setup = Setup(params, first(digits, 16), mode="head", ema_decay=0.2)
    average = np.asarray(setup.state.trainable["head"]["kernel"])
    assert set(setup.state.ema) == {"head"}
    for decay in (1 / 10, 2 / 11, 0.2):  # (1 + t) / (10 + t), then the bound
        setup.run(1)
        average = decay * average + (1 - decay) * np.asarray(setup.state.trainable["head"]["kernel"])
    np.testing.assert_allclose(setup.state.ema["head"]["kernel"], average, atol=1e-6)
    np.testing.assert_array_equal(
        steps.evaluated_params(setup.state)["head"]["kernel"], setup.state.ema["head"]["kernel"]
    )


@pytest.mark.parametrize("mode", ["mlp", "attention", "bias"])
def test_partial_modes_move_their_parameters_and_no_other(digits, params, mode):
    setup = Setup(params, first(digits, 16), mode=mode)
    before = {key: np.asarray(leaf) for key, leaf in setup.params().items()}
    setup.run(5)
    changed = {key for key, leaf in setup.params().items() if not np.array_equal(before[key], leaf)}
    wanted = {key for key in before if any(re.fullmatch(pattern, key) for pattern in optim.MODES[mode])}
    # A key's bias shifts all scores of a query alike, which the softmax does not see: its gradient is zero but for
    # rounding, and it may stay.
    assert changed <= wanted and {key for key in wanted - changed if not key.endswith("key/bias")} == set()
