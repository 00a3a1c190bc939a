import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest
from conftest import set_keys

from configs import digits
from vit_jax.data import DatasetInfo
from vit_jax.models import attention
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError
from vit_jax.training import device_fit, experiment
from vit_jax.training.plan import Plan, memory_of


@pytest.mark.parametrize(
    ("platform", "compute_capability", "expected"),
    [
        ("tpu", None, "bfloat16"),
        ("gpu", "7.5", "float32"),  # T4
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "8.9", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx942", "float32"),
        ("cpu", None, "float32"),
    ],
)
def test_auto_dtype_depends_on_compute_capability(platform, compute_capability, expected):
    device = types.SimpleNamespace(platform=platform)
    if compute_capability:
        device.compute_capability = compute_capability
    assert device_fit.auto_dtype(device) == expected


def test_auto_dtype_returns_float32_for_cpu():
    assert device_fit.auto_dtype(jax.devices()[0]) == "float32"


def needed(number):
    """2 GiB of state, 16 GiB of activations of the full batch, and 1 GiB more for two or more microbatches."""
    return 2 + 16 / number + (number > 1)


@pytest.mark.parametrize(
    ("limit", "expected", "measured"),
    [
        (18, 1, [1]),
        (17, 2, [1, 2]),
        (11, 2, [1, 2]),
        (10.9, 4, [1, 4]),
        (4, 16, [1, 16]),
        (3.2, None, [1, 64]),
    ],
)
def test_smallest_fitting_measures_two_numbers(limit, expected, measured):
    calls = []
    number = device_fit.smallest_fitting(
        (1, 2, 4, 8, 16, 32, 64), lambda n: calls.append(n) or needed(n), limit=limit, fixed=2, added=1
    )
    assert (number, calls) == (expected, measured)


@pytest.mark.parametrize(("fixed", "measured"), [(4, [1, 4]), (5, [1, 8, 4]), (-20, [1, 2, 4])])
def test_smallest_fitting_corrects_wrong_prediction(fixed, measured):
    calls = []
    number = device_fit.smallest_fitting(
        (1, 2, 4, 8, 16), lambda n: calls.append(n) or 4 + 12 / n, limit=7.5, fixed=fixed, added=0
    )
    assert (number, calls) == (4, measured)


def test_smallest_fitting_continues_after_out_of_memory():
    """Full and half batches cannot be compiled; from 4 microbatches on, 8 is predicted."""
    calls = []
    number = device_fit.smallest_fitting(
        (1, 2, 4, 8, 16), lambda n: calls.append(n) or (math.inf if n < 4 else needed(n)), limit=6, fixed=2, added=1
    )
    assert (number, calls) == (8, [1, 2, 4, 8])


def plan(**changes):
    """Plans a tiny model on one device with batches of 64 images."""
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=64, num_layers=2, num_heads=4, mlp_dim=256)
    config = set_keys(config, {"accumulation_steps": 0, "dtype": "float32", **changes})
    info = DatasetInfo(1437, 360, (8, 8, 3), tuple("0123456789"), in_memory=True)
    model = experiment.create_model(config, None, num_classes=10)
    return experiment.plan_experiment(config, model, sharding.create_mesh(jax.devices()[:1]), info)


@pytest.fixture
def set_memory(monkeypatch):
    """Returns a function that sets the usable memory of a device in bytes."""

    def limit(usable):
        available = round(usable / device_fit._USABLE) + 2**20
        monkeypatch.setattr(sharding, "device_memory", lambda device: (available, "reported by the device"))

    return limit


def test_fit_accumulation_compiles_once_if_the_batch_fits(capsys):
    planned = plan()
    assert planned.config.accumulation_steps == planned.train_step.accumulation_steps == 1
    assert planned.compile_train_step() is planned.compiled
    assert capsys.readouterr().out.count("compiling") == 1


def test_fit_accumulation_chooses_smallest_number_that_fits(set_memory, capsys):
    needed = {
        n: sum(memory_of(planned.compile_train_step())) + planned.example_bytes
        for n in (1, 2, 4)
        for planned in [plan(accumulation_steps=n)]
    }
    assert needed[1] > needed[2] + 2**20 > needed[4] + 2**21
    capsys.readouterr()
    for number in (2, 4):
        set_memory((needed[number] + needed[number // 2]) / 2)
        planned = plan()
        assert planned.config.accumulation_steps == planned.train_step.accumulation_steps == number
        assert sum(memory_of(planned.compiled)) + planned.example_bytes == needed[number]
        assert capsys.readouterr().out.endswith(f"accumulation_steps: {number}\n")


def test_fit_accumulation_continues_if_compiler_is_out_of_memory(monkeypatch, capsys):
    compile_train_step = Plan.compile_train_step

    def compile_on_tpu(plan):
        if plan.train_step.accumulation_steps == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
        return compile_train_step(plan)

    monkeypatch.setattr(Plan, "compile_train_step", compile_on_tpu)
    assert plan().config.accumulation_steps == 2
    assert "microbatches of 64: out of memory\n" in capsys.readouterr().out


@pytest.mark.slow
def test_fit_accumulation_suggests_remat_if_nothing_fits(set_memory):
    set_memory(2**20)
    with pytest.raises(UserError) as error:
        plan(batch_size=4)
    assert str(error.value) == (
        "the training step needs more than 85% of 0.00 GiB (reported by the device) with any accumulation_steps; set "
        "remat to 'full' (now 'none'), shard the parameters over devices with mesh.fsdp (now 1), or set "
        "accumulation_steps (now 0) to 4 to try all the same"
    )


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ({"platform": "gpu", "compute_capability": "8.0"}, "bfloat16", True),
        ({"platform": "gpu", "compute_capability": "8.0"}, "float32", False),
        ({"platform": "gpu", "compute_capability": "7.5"}, "bfloat16", False),  # T4
        ({"platform": "cpu"}, "bfloat16", False),
    ],
)
def test_can_use_cudnn_requires_ampere_and_16_bits(device, dtype, expected):
    assert device_fit.can_use_cudnn(types.SimpleNamespace(**device), dtype) == expected


def test_find_attention_says_that_cudnn_is_not_used(capsys):
    model = plan(accumulation_steps=1).image_forward.model
    find = functools.partial(
        device_fit.find_attention, model=model, device=jax.devices()[0], image_size=8, batch_size=1
    )
    capsys.readouterr()
    assert find("auto") == "xla" and capsys.readouterr().out == ""
    assert find("cudnn") == "xla"
    assert capsys.readouterr().out.startswith("attention: xla (cudnn needs a GPU of compute capability 8.0")


def test_find_attention_uses_xla_for_dropout_of_weights(monkeypatch):
    model = plan(accumulation_steps=1).image_forward.model
    monkeypatch.setattr(device_fit, "can_use_cudnn", lambda device, dtype: True)
    monkeypatch.setattr(device_fit, "choose_attention", lambda shape: "cudnn")
    choose = functools.partial(device_fit.find_attention, "auto", device=jax.devices()[0], image_size=8, batch_size=1)
    assert (choose(model), choose(model.clone(attention_dropout_rate=0.1))) == ("cudnn", "xla")


@pytest.fixture
def trial(monkeypatch):
    """Returns a function that runs the trial with another function in place of cuDNN, whose time is given."""
    measure = device_fit.time_attention

    def run(attend, *, seconds):
        def time_attention(function, shape):
            is_xla = function is attention.xla_attention
            outputs = measure(function if is_xla else attend, shape)[1]
            return (1.0 if is_xla else seconds), outputs

        monkeypatch.setattr(device_fit, "time_attention", time_attention)
        device_fit.choose_attention.cache_clear()
        return device_fit.choose_attention((2, 17, 2, 8))

    yield run
    device_fit.choose_attention.cache_clear()


padded = functools.partial(attention.padded_attention, implementation="xla")


def ignore_lengths(query, key, value):
    """Attends to the padding."""
    query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
    return jax.nn.dot_product_attention(query, key, value)[:, :-1]


@pytest.mark.parametrize(
    ("attend", "seconds", "expected", "printed"),
    [
        (padded, 0.5, "cudnn", r"attention: cudnn \(xla 1000.00 ms, cudnn 500.00 ms, deviation 0.0\d+\)"),
        (padded, 1.5, "xla", r"attention: xla \(xla 1000.00 ms, cudnn 1500.00 ms, deviation 0.0\d+\)"),
        (ignore_lengths, 0.5, "xla", r"attention: xla \(.*, deviation 0.[1-9]\d+\)"),
        (lambda q, k, v: v * jnp.nan, 0.5, "xla", r"attention: xla \(.*, deviation nan\)"),
        (lambda q, k, v: 1 // 0, 0.5, "xla", r"attention: xla \(the trial of cudnn failed: integer division .*\)"),
    ],
)
def test_choose_attention_takes_faster_that_agrees(trial, capsys, attend, seconds, expected, printed):
    assert trial(attend, seconds=seconds) == expected
    assert re.fullmatch(printed, capsys.readouterr().out.strip())


def test_choose_attention_stays_with_xla_without_cudnn(capsys):
    device_fit.choose_attention.cache_clear()
    assert device_fit.choose_attention((2, 17, 2, 8)) == "xla"
    assert "attention: xla (the trial of cudnn failed: " in capsys.readouterr().out
    device_fit.choose_attention((2, 17, 2, 8))  # once per process
    assert capsys.readouterr().out == ""
