import jax
import numpy as np

from vit_jax.runtime import rng

KEY = jax.random.PRNGKey(7)


def fold(*numbers):
    key = KEY
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def test_epoch_order_returns_permutation_per_epoch():
    order = rng.epoch_order(KEY, 3, 100)
    np.testing.assert_array_equal(order, jax.random.permutation(fold(0, 3), 100))
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert (order != rng.epoch_order(KEY, 4, 100)).any()


def test_step_keys_differ_between_images_and_between_augmentation_and_dropout():
    augment, dropout = rng.step_keys(KEY, 5, 4)
    keys = jax.random.split(fold(1, 5))
    np.testing.assert_array_equal(augment, jax.random.split(keys[0], 4))
    np.testing.assert_array_equal(dropout, jax.random.split(keys[1], 4))
    assert len({tuple(key) for key in np.concatenate([augment, dropout]).tolist()}) == 8


def test_mix_keys_use_separate_stream():
    np.testing.assert_array_equal(rng.mix_keys(KEY, 5, 4), jax.random.split(fold(2, 5), 4))


def test_row_keys_depend_only_on_seed_and_row():
    np.testing.assert_array_equal(rng.row_keys(np.array([2, 9]), seed=7), [fold(2), fold(9)])
