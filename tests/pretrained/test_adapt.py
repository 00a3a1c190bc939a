import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax.traverse_util import flatten_dict
from reference import flat_params, nest
from reference_resnet import released_params

from vit_jax import pretrained
from vit_jax.runtime.errors import UserError

POSITIONS = "Transformer/posembed_input/pos_embedding"
QUERY = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"


def adapt(source, target, **kwargs):
    """Adapts flat dictionaries."""
    params, report = pretrained.adapt_params(nest(source), nest(target), **kwargs)
    return flatten_dict(params, sep="/"), report


def test_adapt_params_keeps_target_head_and_loads_other_leaves():
    source, target = flat_params(representation_size=4, num_classes=9), flat_params(seed=1)
    params, report = adapt(source, target)
    assert list(params) == list(target)
    for key, leaf in params.items():
        expected = target if key.startswith("head/") else source
        assert leaf.dtype == np.float32 and isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, expected[key])
    assert report.new == ("head/kernel", "head/bias")
    assert report.dropped == ("pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias")
    assert report.resampled == ()
    assert set(report.loaded) == set(target) - set(report.new)


def test_adapt_params_accepts_shapes_of_loaded_leaves():
    source, target = flat_params(), flat_params(seed=1)
    abstract = {
        key: leaf if key.startswith("head/") else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for key, leaf in target.items()
    }
    params, _ = adapt(source, abstract)
    np.testing.assert_array_equal(params["head/bias"], target["head/bias"])


def test_adapt_params_with_keep_head_loads_pretrained_head():
    source = flat_params()
    params, report = adapt(source, flat_params(seed=1), keep_head=True)
    assert report.new == report.dropped == ()
    for key, leaf in source.items():
        assert params[key].tobytes() == leaf.tobytes()


def test_adapt_params_loads_pre_logits_if_model_has_them():
    source = flat_params(representation_size=4)
    params, report = adapt(source, flat_params(representation_size=4, seed=1))
    np.testing.assert_array_equal(params["pre_logits/kernel"], source["pre_logits/kernel"])
    assert report.dropped == ("head/kernel", "head/bias")


def test_adapt_params_accepts_checkpoint_without_head():
    source = {key: leaf for key, leaf in flat_params().items() if not key.startswith("head/")}
    _, report = adapt(source, flat_params(seed=1))
    assert report.new == ("head/kernel", "head/bias") and report.dropped == ()


def test_adapt_params_returns_writable_copies():
    source, target = flat_params(), flat_params(seed=1)
    params, _ = adapt(source, target)
    for key, leaf in params.items():
        assert not np.shares_memory(leaf, source[key]) and not np.shares_memory(leaf, target[key])
        leaf += 1  # writable


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_adapt_params_casts_to_float32(dtype):
    source = {key: np.ones_like(leaf, dtype) for key, leaf in flat_params().items()}
    params, _ = adapt(source, flat_params())
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}
    assert not np.any(params["cls"] - 1)


def test_adapt_params_resamples_position_embeddings():
    source, target = flat_params(num_tokens=1 + 4), flat_params(num_tokens=1 + 9)
    params, report = adapt(source, target)
    expected = pretrained.resample_position_embeddings(source[POSITIONS], (2, 2), (3, 3))
    np.testing.assert_array_equal(params[POSITIONS], expected)
    assert report.resampled == (POSITIONS,)
    assert (report.old_grid, report.new_grid) == ((2, 2), (3, 3))
    assert POSITIONS not in report.loaded


def test_adapt_params_resamples_between_grids_with_equal_num_patches():
    source, target = flat_params(num_tokens=1 + 16), flat_params(num_tokens=1 + 16)
    params, report = adapt(source, target, grid=(2, 8))
    assert report.resampled == (POSITIONS,)
    expected = pretrained.resample_position_embeddings(source[POSITIONS], (4, 4), (2, 8))
    np.testing.assert_array_equal(params[POSITIONS], expected)


def test_adapt_params_loads_position_embeddings_of_same_non_square_grid():
    source = flat_params(num_tokens=1 + 6)
    params, report = adapt(source, flat_params(num_tokens=1 + 6), grid=(2, 3), pretrained_grid=(2, 3))
    assert report.resampled == ()
    np.testing.assert_array_equal(params[POSITIONS], source[POSITIONS])


def test_adapt_params_requires_grid_of_non_square_model():
    with pytest.raises(
        UserError, match=r"6 patches, but they are not a square; .* give pretrained.adapt_params grid=\(rows, columns\)"
    ):
        adapt(flat_params(), flat_params(num_tokens=1 + 6))


def test_adapt_params_requires_grid_of_non_square_checkpoint():
    with pytest.raises(UserError, match=r"6 patches, but they .* pretrained_grid=\(rows, columns\)"):
        adapt(flat_params(num_tokens=1 + 6), flat_params())


def test_adapt_params_rejects_grid_with_wrong_num_patches():
    with pytest.raises(UserError, match="embeddings have 4 patches, but grid is 2 × 3"):
        adapt(flat_params(), flat_params(), grid=(2, 3))


def adapt_error(source, target, **kwargs):
    """Returns the message of the error that `adapt` raises."""
    with pytest.raises(UserError) as caught:
        adapt(source, target, **kwargs)
    message = str(caught.value)
    assert message.startswith("the checkpoint does not fit the model: ") and "\n" not in message
    return message


def test_adapt_params_reports_missing_keys():
    source = {key: leaf for key, leaf in flat_params().items() if "encoder_norm" not in key}
    message = adapt_error(source, flat_params())
    assert message.endswith("missing: Transformer/encoder_norm/scale, Transformer/encoder_norm/bias")


def test_adapt_params_reports_unexpected_keys():
    message = adapt_error({**flat_params(), "extra/bias": np.zeros(1)}, flat_params())
    assert message.endswith("unexpected: extra/bias")


def test_adapt_params_reports_shape_mismatch():
    message = adapt_error({**flat_params(), QUERY: np.zeros((6, 3, 2))}, flat_params())
    assert message.endswith(f"of another shape: {QUERY} (6, 3, 2) instead of (6, 2, 3)")


def test_adapt_params_requires_pre_logits_if_model_has_them():
    assert "missing: pre_logits/kernel, pre_logits/bias" in adapt_error(
        flat_params(), flat_params(representation_size=4)
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"patch_size": 8}, "embedding/kernel (8, 8, 3, 6) instead of (4, 4, 3, 6)"),
        ({"hidden_size": 8}, "cls (1, 1, 8) instead of (1, 1, 6)"),
        ({"num_layers": 4}, "unexpected: Transformer/encoderblock_3/LayerNorm_0/scale"),
        ({"num_layers": 2}, "missing: Transformer/encoderblock_2/LayerNorm_0/scale"),
        ({"num_heads": 3}, "query/kernel (6, 3, 2) instead of (6, 2, 3)"),
        ({"mlp_dim": 9}, "Dense_0/kernel (6, 9) instead of (6, 8)"),
    ],
)
def test_adapt_params_reports_keys_that_differ_between_variants(changes, expected):
    assert expected in adapt_error(flat_params(**changes), flat_params())


def test_adapt_params_truncates_long_list_of_keys():
    message = adapt_error(flat_params(patch_size=8, num_layers=5), flat_params())
    assert "embedding/kernel (8, 8, 3, 6) instead of (4, 4, 3, 6)" in message
    assert "Transformer/encoderblock_3/LayerNorm_0/scale" in message and "and 29 more" in message


def test_adapt_params_with_keep_head_rejects_other_num_classes():
    message = adapt_error(flat_params(num_classes=9), flat_params(), keep_head=True)
    assert "head/kernel (6, 9) instead of (6, 5)" in message


def test_adapt_params_with_keep_head_requires_pretrained_head():
    source = {key: leaf for key, leaf in flat_params().items() if not key.startswith("head/")}
    assert "missing: head/kernel, head/bias" in adapt_error(source, flat_params(), keep_head=True)


def test_adapt_params_rejects_other_architecture():
    vit, resnet = nest(flat_params()), pretrained.to_original(released_params())
    with pytest.raises(UserError, match="does not fit the model: architecture vit instead of resnet50"):
        pretrained.adapt_params(vit, resnet)
    with pytest.raises(UserError, match="does not fit the model: architecture resnet50 instead of vit"):
        pretrained.adapt_params(resnet, vit)


def test_adapt_params_rejects_unknown_format():
    with pytest.raises(UserError, match="not the parameters of a known model: found layer1/weight"):
        adapt({"layer1/weight": np.zeros(1)}, flat_params())


def test_report_prints_one_line_per_group():
    source = flat_params(representation_size=4, num_classes=9)
    _, report = adapt(source, flat_params(num_tokens=1 + 9))
    assert str(report).splitlines() == [
        "loaded     cls                                          1 array              6",
        "           embedding/…                                  2 arrays           294",
        "           Transformer/encoderblock_*/…                48 arrays           906",
        "           Transformer/encoder_norm/…                   2 arrays            12",
        "resampled  Transformer/posembed_input/pos_embedding     1 array             60",
        "new        head/…                                       2 arrays            35",
        "dropped    pre_logits/…                                 2 arrays            28",
        "           head/…                                       2 arrays            45",
        "position embeddings: 2 × 2 → 3 × 3 patches",
    ]


def resample(values, grid, new_grid):
    """Resamples embeddings of width 1, class token first."""
    embeddings = np.array(values, np.float32).reshape(1, -1, 1)
    return pretrained.resample_position_embeddings(embeddings, grid, new_grid).ravel().tolist()


def test_resample_position_embeddings_interpolates_linearly():
    assert resample([9, 0, 2, 4, 6], (2, 2), (3, 3)) == [9, 0, 1, 2, 2, 3, 4, 4, 5, 6]


def test_resample_position_embeddings_keeps_corners_when_downsampling():
    assert resample([9, 0, 1, 2, 3, 4, 5, 6, 7, 8], (3, 3), (2, 2)) == [9, 0, 2, 6, 8]


def test_resample_position_embeddings_resamples_rows_and_columns_independently():
    assert resample([9, 0, 2, 10, 12], (2, 2), (2, 3)) == [9, 0, 1, 2, 10, 11, 12]
    assert resample([9, 0, 2, 10, 12], (2, 2), (3, 2)) == [9, 0, 2, 5, 7, 10, 12]


def test_resample_position_embeddings_is_identity_for_same_grid():
    assert resample([9, 1, 2, 3, 4, 5, 6], (2, 3), (2, 3)) == [9, 1, 2, 3, 4, 5, 6]


def test_resample_position_embeddings_matches_scipy_zoom():
    embeddings = np.random.default_rng(0).standard_normal((1, 1 + 196, 7)).astype(np.float32)
    new = pretrained.resample_position_embeddings(embeddings, (14, 14), (24, 24))
    assert new.shape == (1, 577, 7) and new.dtype == np.float32
    np.testing.assert_array_equal(new[:, 0], embeddings[:, 0])
    zoomed = scipy.ndimage.zoom(embeddings[0, 1:].reshape(14, 14, 7), (24 / 14, 24 / 14, 1), order=1)
    np.testing.assert_array_equal(new[0, 1:], zoomed.reshape(576, 7))


def test_resample_position_embeddings_keeps_ones_for_every_grid():
    """For some pairs, such as 28 → 14, scipy's default mode rounds past the edge and fills in zeros."""
    for old in range(1, 33):
        for new in range(1, 33):
            ones = np.ones((1, 1 + old, 1), np.float32)
            resampled = pretrained.resample_position_embeddings(ones, (old, 1), (new, 1))
            assert resampled.shape == (1, 1 + new, 1)
            np.testing.assert_allclose(resampled, 1, rtol=1e-6)


def test_resample_position_embeddings_rejects_grid_with_wrong_num_patches():
    with pytest.raises(UserError, match="embeddings have 6 patches, but grid is 2 × 2"):
        resample([9, 1, 2, 3, 4, 5, 6], (2, 2), (3, 3))
