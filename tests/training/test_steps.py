import dataclasses
import functools
import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_training
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import data
from vit_jax.data import preprocess
from vit_jax.data.batches import resident_batches
from vit_jax.models import VisionTransformer
from vit_jax.runtime import rng, sharding
from vit_jax.training import metrics, optim, steps
from vit_jax.training.inference import ImageForward

MODEL = VisionTransformer(10, patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32)
DEEP = MODEL.clone(num_layers=2)
NOISY = DEEP.clone(dropout_rate=0.3, attention_dropout_rate=0.2, stochastic_depth_rate=0.5)
# Wide enough for its kernels to be sharded over eight devices.
WIDE = MODEL.clone(hidden_size=32, mlp_dim=256)


@pytest.fixture(scope="module")
def digits():
    """Real images of 8 × 8 pixels."""
    return data.load_dataset("digits", image_size=8).train


@functools.cache
def abstract_params(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]


def random_params(model):
    """Returns random parameters, including the head, so that no gradient is zero; scales are around 1."""
    random = np.random.default_rng(0)
    flat = flatten_dict(abstract_params(model))
    return unflatten_dict(
        {
            path: (path[-1] == "scale") + random.normal(0, 0.2, leaf.shape).astype(np.float32)
            for path, leaf in flat.items()
        }
    )


@functools.cache
def jit_functions(
    model, num_devices, fsdp, mode, batch_size, augment, ema_decay, **options
) -> tuple[Callable, Callable, jax.sharding.Mesh]:
    """Returns `create_train_state` and the train step, jitted as in the trainer, and the mesh."""
    mesh = sharding.create_mesh(jax.devices()[:num_devices], fsdp=fsdp)
    replicated = sharding.replicated(mesh)
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

    shardings = sharding.param_shardings(jax.eval_shape(create, abstract_params(model)), mesh)
    forward = ImageForward(model, image_size=8, augment=augment, dropout=True)
    train_step = steps.TrainStep(forward, tx, schedule, mesh, batch_size=batch_size, ema_decay=ema_decay, **options)
    return (
        jax.jit(create, out_shardings=shardings),
        jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated)),
        mesh,
    )


class Setup:
    """A train state on a mesh, its train step and batches."""

    def __init__(
        self,
        split,
        *,
        model=MODEL,
        params=None,
        num_devices=2,
        fsdp=1,
        mode="full",
        batch_size=16,
        augment="none",
        ema_decay=0.0,
        **options,
    ):
        create, self.step, mesh = jit_functions(
            model, num_devices, fsdp, mode, batch_size, augment, ema_decay, **options
        )
        params, arrays = sharding.device_put(
            (params or random_params(model), (split.images, split.labels)), sharding.replicated(mesh)
        )
        self.state = create(params)
        self.batches = resident_batches(*arrays, mesh, batch_size=batch_size, seed=0, first_step=0, num_steps=1000)

    def run(self, num_steps):
        """Trains; returns the metrics of the last step."""
        for _, batch in itertools.islice(self.batches, num_steps):
            self.state, scalars = self.step(self.state, batch)
        return scalars

    def params(self):
        return flatten_dict(optim.merge_params(self.state.trainable, self.state.frozen), sep="/")


def take(split, count):
    return type(split)(split.images[:count], split.labels[:count])


@jax.jit
def logits_of(params, images):
    return MODEL.apply({"params": params}, preprocess.normalize(images))


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for key in actual:
        np.testing.assert_allclose(actual[key], expected[key], atol=tolerance, rtol=0, err_msg=key)


@pytest.mark.parametrize("mode", ["full", "head"])
def test_train_step_matches_float64_reference(digits, mode):
    split = take(digits, 16)
    before = flatten_dict(random_params(DEEP), sep="/")
    images = np.asarray(preprocess.normalize(split.images))
    expected = reference_training.train(before, images, split.labels, trainable="head/" if mode == "head" else "")

    setup = Setup(split, model=DEEP, mode=mode, num_devices=1)
    with jax.default_matmul_precision("highest"):
        setup.run(reference_training.NUM_STEPS)
    trace = flatten_dict(optax.tree.get(setup.state.opt_state, "trace"), sep="/")
    actual = setup.params() | {f"trace/{key}": leaf for key, leaf in trace.items()}
    assert_close(actual, expected, 1e-5)
    moved = np.abs(expected["head/kernel"] - before["head/kernel"]).max()
    assert moved > 1e-2  # the updates are far larger than the tolerance


def test_train_step_overfits_16_images(digits):
    setup = Setup(take(digits, 16))
    before = setup.run(1)["train/loss"]
    assert setup.run(4)["train/loss"] < before - 0.1


def test_train_step_keeps_frozen_parameters_bit_identical_without_optimizer_state(digits):
    setup = Setup(take(digits, 16), mode="head")
    before = {key: np.asarray(leaf) for key, leaf in setup.params().items()}
    setup.run(5)
    after = setup.params()
    changed = {key for key in after if not np.array_equal(before[key], after[key])}
    assert changed == {"head/kernel", "head/bias"}
    sizes = sum(leaf.size for leaf in jax.tree.leaves(setup.state.opt_state))
    assert sizes <= 16 * 10 + 10 + 2  # the momentum of the head, and counters


def test_train_step_with_accumulation_equals_large_batch(digits):
    augment = ("inception", "color_jitter", "erase")
    plain, accumulated = (Setup(digits, batch_size=32, accumulation_steps=n, augment=augment) for n in (1, 4))
    actual, expected = accumulated.run(3), plain.run(3)
    assert_close(accumulated.params(), plain.params(), 1e-6)
    assert float(actual["train/loss"]) == pytest.approx(float(expected["train/loss"]), abs=1e-6)
    assert float(actual["train/accuracy"]) == pytest.approx(float(expected["train/accuracy"]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"accumulation_steps": 4, "num_devices": 8}, {"num_devices": 8, "fsdp": 4}],
)
def test_train_step_samples_dropout_per_image(digits, options):
    """Accumulation and devices split the batch; neither changes the masks."""
    single = Setup(digits, num_devices=1, batch_size=32, model=NOISY)
    split = Setup(digits, batch_size=32, model=NOISY, **options)
    actual, expected = split.run(3), single.run(3)
    assert_close(split.params(), single.params(), 1e-6)
    assert float(actual["train/loss"]) == pytest.approx(float(expected["train/loss"]), abs=1e-6)
    without_dropout = Setup(digits, num_devices=1, batch_size=32, model=DEEP)
    assert abs(float(without_dropout.run(3)["train/loss"]) - float(expected["train/loss"])) > 1e-2


def test_train_step_on_eight_devices_equals_one_device(digits):
    one, eight = (Setup(digits, num_devices=n, batch_size=32, augment=("inception", "trivial")) for n in (1, 8))
    actual, expected = eight.run(4), one.run(4)
    assert_close(eight.params(), one.params(), 1e-5)
    assert float(actual["train/loss"]) == pytest.approx(float(expected["train/loss"]), abs=1e-5)


def test_train_step_returns_loss_before_update(digits):
    setup = Setup(take(digits, 40), batch_size=16)
    order = np.asarray(rng.epoch_order(setup.state.key, 0, 40))
    for step in range(2):
        rows = order[step * 16 : (step + 1) * 16]
        before = optim.merge_params(setup.state.trainable, setup.state.frozen)
        logits = logits_of(before, digits.images[rows])
        expected = metrics.cross_entropy(logits, jnp.asarray(digits.labels[rows])).mean()
        scalars = setup.run(1)
        assert float(scalars["train/loss"]) == pytest.approx(float(expected), abs=1e-5)
        assert float(scalars["train/accuracy"]) == pytest.approx(
            float((logits.argmax(-1) == digits.labels[rows]).mean())
        )


def test_train_step_returns_learning_rate_of_update(digits):
    setup = Setup(take(digits, 16))
    rates = [float(setup.run(1)["learning_rate"]) for _ in range(4)]
    # warm-up of two updates to 0.1, then the cosine over three
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.1, 0.075], atol=1e-7)


def test_train_step_keeps_first_nonfinite_step(digits):
    setup = Setup(take(digits, 16))
    setup.run(1)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, setup.state.trainable)
    setup.state = dataclasses.replace(setup.state, trainable=broken)
    setup.run(3)
    assert int(setup.state.first_nonfinite_step) == 2


def test_train_step_transfers_nothing_from_host(digits):
    setup = Setup(take(digits, 40), batch_size=16)
    setup.run(3)  # into the second epoch
    with jax.transfer_guard("disallow"):
        setup.run(4)
    assert int(setup.state.step) == 7


def test_train_step_donates_state(digits):
    setup = Setup(take(digits, 16))
    before = setup.state
    setup.run(1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


MIXING = {"mixup_alpha": 0.3, "cutmix_alpha": 1.0, "label_smoothing": 0.1}


@pytest.mark.slow
def test_train_step_with_accumulation_and_mixing_equals_large_batch(digits):
    plain, accumulated = (
        Setup(digits, batch_size=32, accumulation_steps=n, augment="inception", **MIXING) for n in (1, 4)
    )
    actual, expected = accumulated.run(3), plain.run(3)
    assert_close(accumulated.params(), plain.params(), 1e-6)
    assert float(actual["train/loss"]) == pytest.approx(float(expected["train/loss"]), abs=1e-6)


def test_train_step_mixes_labels_like_images(digits):
    """The loss is the cross-entropy of mixed images with mixed, smoothed labels."""
    setup = Setup(take(digits, 16), mixup_alpha=0.3, label_smoothing=0.1)
    rows = np.asarray(rng.epoch_order(setup.state.key, 0, 16))
    partners = np.roll(rows, 1)
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(setup.state.key, 2), 0), 16)

    @jax.jit
    def mix(images, others):
        images, others = preprocess.normalize(images), preprocess.normalize(others)
        mixed, weight = preprocess.mix(keys, images, others, mixup_alpha=0.3, cutmix_alpha=0.0)
        return jax.nn.log_softmax(MODEL.apply({"params": random_params(MODEL)}, mixed)), weight[:, None]

    log_probabilities, weight = map(np.asarray, mix(digits.images[rows], digits.images[partners]))
    one_hot = np.eye(10)[digits.labels]
    targets = weight * one_hot[rows] + (1 - weight) * one_hot[partners]
    expected = -((0.9 * targets + 0.01) * log_probabilities).sum(axis=1).mean()
    assert float(setup.run(1)["train/loss"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("num_devices", "fsdp", "mode"),
    [
        (8, 4, "full"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(8, 8, "full"), (4, 2, "full"), (8, 4, "mlp")]),
    ],
)
def test_train_step_with_sharded_parameters_equals_one_device(digits, num_devices, fsdp, mode):
    options = {"model": WIDE, "mode": mode, "batch_size": 32, "augment": "flip", "ema_decay": 0.5}
    single, sharded = (Setup(digits, num_devices=n, fsdp=f, **options) for n, f in ((1, 1), (num_devices, fsdp)))
    for _ in range(4):
        actual, expected = sharded.run(1), single.run(1)
        assert float(actual["train/loss"]) == pytest.approx(float(expected["train/loss"]), abs=1e-5)
    assert_close(sharded.params(), single.params(), 1e-5)
    assert_close(flatten_dict(sharded.state.ema), flatten_dict(single.state.ema), 1e-5)


def test_train_step_keeps_state_sharded(digits):
    setup = Setup(digits, num_devices=8, fsdp=8, model=WIDE, batch_size=32, augment="flip", ema_decay=0.5)
    setup.run(1)
    kernel = setup.state.trainable["Transformer"]["encoderblock_0"]["MlpBlock_3"]["Dense_0"]["kernel"]
    assert kernel.shape == (32, 256)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 32)}
    momentum = optax.tree.get(setup.state.opt_state, "trace")["Transformer"]["encoderblock_0"]["MlpBlock_3"]
    assert {shard.data.shape for shard in momentum["Dense_0"]["kernel"].addressable_shards} == {(32, 32)}
    bias = setup.state.trainable["Transformer"]["encoderblock_0"]["MlpBlock_3"]["Dense_0"]["bias"]
    assert bias.is_fully_replicated


def test_train_step_updates_ema_of_trainable_parameters(digits):
    setup = Setup(take(digits, 16), mode="head", ema_decay=0.2)
    ema = np.asarray(setup.state.trainable["head"]["kernel"])
    assert set(setup.state.ema) == {"head"}
    for decay in (1 / 10, 2 / 11, 0.2):  # (1 + t) / (10 + t), then the bound
        setup.run(1)
        ema = decay * ema + (1 - decay) * np.asarray(setup.state.trainable["head"]["kernel"])
    np.testing.assert_allclose(setup.state.ema["head"]["kernel"], ema, atol=1e-6)
    np.testing.assert_array_equal(
        steps.evaluated_params(setup.state)["head"]["kernel"], setup.state.ema["head"]["kernel"]
    )


@pytest.mark.parametrize("mode", ["mlp", "attention", "bias"])
def test_train_step_updates_only_parameters_of_mode(digits, mode):
    setup = Setup(take(digits, 16), mode=mode)
    before = {key: np.asarray(leaf) for key, leaf in setup.params().items()}
    setup.run(5)
    changed = {key for key, leaf in setup.params().items() if not np.array_equal(before[key], leaf)}
    expected = {key for key in before if any(re.fullmatch(pattern, key) for pattern in optim.MODES[mode])}
    # The key bias adds the same number to all scores of a query. Softmax is invariant to it: its gradient is zero up to
    # rounding.
    assert changed <= expected and {key for key in expected - changed if not key.endswith("key/bias")} == set()
