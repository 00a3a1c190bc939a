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


def test_balanced_order_repeats_rare_classes_and_uses_a_part_of_frequent_ones():
    labels = np.array([0] * 10 + [2] * 3 + [3] * 2, np.int32)  # no image of class 1
    counts = np.bincount(rng.balanced_order(KEY, 0, labels), minlength=15)
    assert [counts[labels == label].sum() for label in (0, 2, 3)] == [5, 5, 5]
    assert sorted(counts[:10]) == [0] * 5 + [1] * 5
    assert sorted(counts[10:13]) == [1, 2, 2] and sorted(counts[13:]) == [2, 3]


def test_balanced_order_differs_between_epochs_and_favors_no_class():
    labels = np.array([0] * 20 + [1] * 2, np.int32)[::-1].copy()
    order = jax.jit(jax.vmap(lambda epoch: rng.balanced_order(KEY, epoch, labels)))
    orders = np.asarray(order(np.arange(100)))
    assert len({tuple(rows) for rows in orders.tolist()}) == 100
    assert set(orders.ravel()) == set(range(22))  # frequent classes change their part
    assert np.abs(np.mean(labels[orders]) - 0.5) < 1e-6 and 0.4 < np.mean(labels[orders[:, 0]]) < 0.6
    uneven = np.arange(10, dtype=np.int32) % 3
    order = jax.jit(jax.vmap(lambda epoch: rng.balanced_order(KEY, epoch, uneven)))
    counts = np.bincount(uneven[np.asarray(order(np.arange(300)))].ravel())
    assert counts.sum() == 3000 and (np.abs(counts - 1000) < 50).all()  # the tenth image is of any class


def test_balanced_order_of_equal_classes_has_each_image_once():
    labels = np.arange(12, dtype=np.int32) % 3
    np.testing.assert_array_equal(np.sort(rng.balanced_order(KEY, 1, labels)), np.arange(12))


def test_step_keys_differ_between_images_and_between_augmentation_and_dropout():
    augment, dropout = rng.step_keys(KEY, 5, 4)
    keys = jax.random.split(fold(1, 5))
    np.testing.assert_array_equal(augment, jax.random.split(keys[0], 4))
    np.testing.assert_array_equal(dropout, jax.random.split(keys[1], 4))
    assert len({tuple(key) for key in np.concatenate([augment, dropout]).tolist()}) == 8


def test_image_keys_differ_between_augmentations_and_from_crops_and_flips():
    keys = rng.step_keys(KEY, 5, 4)[0]
    streams = [rng.image_keys(keys, name) for name in ("trivial", "color_jitter", "erase")]
    np.testing.assert_array_equal(streams[1][2], jax.random.fold_in(keys[2], 3))
    streams += [jax.vmap(lambda key, i=i: jax.random.split(key)[i])(keys) for i in (0, 1)]  # of crops and flips
    assert len({tuple(key) for key in np.concatenate(streams).tolist()}) == 5 * 4


def test_mix_keys_use_separate_stream():
    np.testing.assert_array_equal(rng.mix_keys(KEY, 5, 4), jax.random.split(fold(2, 5), 4))


def test_row_keys_depend_only_on_seed_and_row():
    np.testing.assert_array_equal(rng.row_keys(np.array([2, 9]), seed=7), [fold(2), fold(9)])
