import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_training
from conftest import ROOT
from flax.traverse_util import flatten_dict

from vit_jax import data, metrics, optim, preprocess, sharding, steps
from vit_jax.models import VisionTransformer

MODEL = VisionTransformer(10, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32)


@pytest.fixture(scope="module")
def digits():
    """Real pictures, 8 × 8."""
    return data.load_dataset("digits", image_size=8).train


@pytest.fixture(scope="module")
def params():
    """Drawn at random, the head too, so that every gradient is alive from the first step."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


class Setup:
    """A state and jitted functions on a mesh, as the trainer makes them."""

    def __init__(
        self, params, split, *, num_devices=8, mode="full", batch_size=16, accumulation_steps=1, augment="none"
    ):
        mesh = sharding.create_mesh(jax.devices()[:num_devices])
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
        create = jax.jit(
            lambda params: steps.create_train_state(params, patterns=optim.MODES[mode], tx=tx, seed=0),
            out_shardings=everywhere,
        )
        self.state = create(sharding.place(params, everywhere))
        self.arrays = sharding.place((split.images, split.labels), everywhere)
        self.permute = steps.make_permutation(len(split), batch_size, mesh)
        self.step = steps.make_train_step(
            MODEL,
            tx,
            schedule,
            mesh,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            image_size=8,
            augment=augment,
        )
        self.mesh = mesh

    def run(self, num_steps):
        """Steps within the first epoch, or full-batch steps; returns the last scalars."""
        for _ in range(num_steps):
            self.state, scalars = self.step(self.state, *self.arrays, self.permute(self.state))
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


def test_training_overfits_16_pictures(digits, params):
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


def test_eight_devices_give_the_update_of_one(digits, params):
    one, eight = (Setup(params, digits, num_devices=n, batch_size=32, augment="inception") for n in (1, 8))
    ours, theirs = eight.run(4), one.run(4)
    assert_close(eight.params(), one.params(), 1e-5)
    assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), abs=1e-5)


def test_a_step_takes_its_own_rows_of_the_permutation_and_reports_the_loss_before_its_update(digits, params):
    setup = Setup(params, first(digits, 40), batch_size=16)
    order = np.asarray(setup.permute(setup.state))
    assert sorted(order) == list(range(40))
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


def test_the_order_of_pictures_changes_with_the_epoch_only(digits, params):
    setup = Setup(params, first(digits, 40), batch_size=16)  # two steps an epoch
    orders = []
    for _ in range(4):
        orders.append(np.asarray(setup.permute(setup.state)))
        setup.run(1)
    np.testing.assert_array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[2], orders[3])
    assert (orders[0] != orders[2]).any()


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
    setup.state = setup.state.replace(trainable=broken)
    setup.run(3)
    assert int(setup.state.first_nonfinite_step) == 2


def test_steady_steps_transfer_nothing_from_the_host(digits, params):
    setup = Setup(params, first(digits, 40), batch_size=16)
    step = setup.step.lower(setup.state, *setup.arrays, setup.permute(setup.state)).compile()
    state = setup.state
    with jax.transfer_guard("disallow"):
        for i in range(6):
            if i % 2 == 0:
                permutation = setup.permute(state)
            state, _ = step(state, *setup.arrays, permutation)
    assert int(state.step) == 6


def test_the_state_is_donated(digits, params):
    setup = Setup(params, first(digits, 16))
    before = setup.state
    setup.run(1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 1), (1, 7), (1, 20), (1, 64), (8, 8), (8, 24), (8, 64)])
def test_evaluation_counts_every_picture_once_whatever_the_batch_size(digits, params, num_devices, batch_size):
    split = first(digits, 20)
    mesh = sharding.create_mesh(jax.devices()[:num_devices])
    place = lambda tree: sharding.place(tree, sharding.replicated(mesh))  # noqa: E731
    eval_step = steps.make_eval_step(MODEL, mesh, batch_size=batch_size, image_size=8)
    totals, on_device, arrays = steps.start_totals(mesh), place(params), place((split.images, split.labels))
    for _ in range(-(-20 // batch_size)):
        totals = eval_step(on_device, *arrays, totals)
    logits = MODEL.apply({"params": params}, preprocess.normalize(split.images))
    expected = metrics.masked_sums(logits, split.labels, np.ones(20, bool))
    assert int(totals["count"]) == 20
    assert int(totals["correct"]) == int(expected["correct"])
    assert int(totals["correct_top5"]) == int(expected["correct_top5"])
    assert float(totals["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
