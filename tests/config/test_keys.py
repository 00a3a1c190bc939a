import subprocess
import sys

import pytest
from conftest import ROOT, config_with

from vit_jax import models
from vit_jax.config import keys
from vit_jax.data import preprocess
from vit_jax.runtime.errors import UsageError
from vit_jax.training import optim

KEYS = {key.name: key for key in keys.KEYS}


@pytest.mark.parametrize("key", keys.KEYS, ids=lambda key: key.name)
def test_keys_have_short_documentation_and_valid_defaults(key):
    assert 10 <= len(key.doc) + len(key.check.expected) <= 300
    assert key.check.accepts(key.default)


def test_get_config_returns_default_of_every_key():
    config = keys.get_config()
    assert set(keys.flatten(config.to_dict(), leaf="model")) == set(KEYS)
    assert (config.seed, config.optimizer.momentum, config.trainable, config.model.to_dict()) == (0, 0.9, "full", {})


def test_get_config_locks_all_but_model_arguments():
    config = keys.get_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        config.learning_rat = 0.1
    config.model.patch_size = 16


def test_get_config_accepts_name_or_patterns_as_trainable():
    config = keys.get_config()
    config.trainable = ("head/.*",)
    config.trainable = "head"
    assert keys.get_config().trainable == "full"


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("architecture", models.ARCHITECTURES),
        ("ablation.test_augment", preprocess.AUGMENTATIONS),
        ("ablation.head_init", models.HEAD_INITS),
        ("optimizer.name", optim.OPTIMIZERS),
        ("optimizer.decayed", optim.DECAYED),
        ("schedule", optim.SCHEDULES),
        ("remat", ["none", *models.REMAT_POLICIES]),
    ],
)
def test_keys_accept_implemented_choices(key, choices):
    assert KEYS[key].check.expected == f"one of {', '.join(choices)}"


def test_augment_accepts_implemented_names_and_tuples():
    names = [*preprocess.AUGMENTATIONS, *preprocess.OPS]
    assert KEYS["augment"].check.expected.startswith(f"one of {', '.join(names)}, or a tuple of different ones")
    for value in [*names, ("flip",), ("erase", "trivial"), ["inception", "trivial", "color_jitter", "erase"]]:
        keys.check_config(config_with(augment=value))


def test_modes_equal_modes_of_optim():
    assert keys.MODES == tuple(optim.MODES)


def test_check_config_requires_neither_jax_nor_configs_directory():
    code = """
import sys
sys.modules["configs"] = None
from vit_jax import config
run = config.get_config()
run.dataset.name, run.pretrained, run.image_size = "digits", "micro", 16
config.check_config(run)
assert not {"jax", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 0, "config.batch_size is 0; expected a positive integer"),
        ("batch_size", 2.5, "config.batch_size is 2.5; expected a positive integer"),
        ("batch_size", True, "config.batch_size is True; expected a positive integer"),
        ("num_steps", -1, "config.num_steps is -1; expected a non-negative integer"),
        ("learning_rate", float("nan"), "config.learning_rate is nan; expected a non-negative number"),
        ("learning_rate", "fast", "config.learning_rate is 'fast'; expected a non-negative number"),
        ("learning_rate", 1e39, "expected a non-negative number"),
        ("optimizer.momentum", 1.0, "config.optimizer.momentum is 1.0; expected a number in [0, 1)"),
        ("optimizer.layer_decay", 0.0, "config.optimizer.layer_decay is 0.0; expected a number in (0, 1]"),
        ("schedule", "cosinus", "config.schedule is 'cosinus'; expected one of cosine, linear, constant"),
        ("optimizer.name", "lion", "config.optimizer.name is 'lion'; expected one of sgd, adam, adamw"),
        ("dataset.classes", "cat", "config.dataset.classes is 'cat'; expected a tuple of strings"),
        (
            "augment",
            "trivail",
            "config.augment is 'trivail'; expected one of none, flip, pad_crop, square_crop, inception",
        ),
        ("augment", ("inception", "trivail"), "config.augment is ('inception', 'trivail'); expected one of none, flip"),
        ("augment", ("pad_crop", "inception"), "only the first may flip or crop"),
        ("augment", ("trivial", "inception"), "only the first may flip or crop"),
        ("augment", ("erase", "erase"), "or a tuple of different ones"),
        ("augment", ("none", "erase"), "or a tuple"),
        ("augment", (), "or a tuple"),
        ("augment", (("erase",),), "or a tuple"),
        ("augment", 3, "config.augment is 3; expected one of"),
        ("dataset.sampling", "balance", "config.dataset.sampling is 'balance'; expected one of uniform, balanced"),
        ("trainable", "haed", "config.trainable is 'haed'; expected one of full, head, mlp, attention, bias, lora, or"),
        ("trainable", (), "or a tuple of regular expressions"),
        ("trainable", ("head/(",), "or a tuple of regular expressions"),
        ("trainable", ("a{99999999999999999999}",), "or a tuple of regular expressions"),
        ("trainable", ("(" * 5000 + ")" * 5000,), "or a tuple of regular expressions"),
        ("lora.targets", ("(",), "config.lora.targets is ('(',); expected a tuple of regular expressions"),
        ("seed", 2**31, "expected a non-negative integer below 2^31"),
        ("image_size", 16_385, "expected an integer from 1 to 16,384"),
        ("image_mean", (10**400, 0, 0), "expected three numbers in [0, 1]"),
        ("image_mean", (0.5, 0.5), "expected three numbers in [0, 1]"),
        ("image_std", (127.5, 127.5, 127.5), "expected three numbers in (0, 1]"),
        ("image_std", (0.0, 0.5, 0.5), "expected three numbers in (0, 1]"),
        ("reference_results", (("Li", 0.6),), "expected a tuple of (dataset, label, accuracy)"),
        ("ablation.frozen_dropout", 1, "config.ablation.frozen_dropout is 1; expected True or False"),
        ("accumulation_steps", 3, "config.accumulation_steps is 3; it must divide batch_size 64"),
        ("warmup_steps", 10_000, "config.warmup_steps is 10000; expected at most num_steps, 220"),
        ("batch_sise", 8, "config.batch_sise: no such key; did you mean batch_size?"),
        ("model", 3, "config.model is 3; expected a ConfigDict"),
        ("model.head_init", "xavier", "config.model.head_init: set config.ablation.head_init instead"),
        ("dataset", 3, "config.dataset.name is missing; start from vit_jax.config.get_config()"),
    ],
)
def test_check_config_rejects_invalid_values(key, value, message):
    with pytest.raises(UsageError) as error:
        keys.check_config(config_with(**{key: value}))
    assert message in str(error.value)


@pytest.mark.parametrize("steps", [49, 50])
def test_check_config_rejects_schedule_not_longer_than_warmup(steps):
    with pytest.raises(UsageError, match=f"schedule_steps is {steps}; expected more than warmup_steps, 50"):
        keys.check_config(config_with(**{"warmup_steps": 50, "ablation.schedule_steps": steps}))


def test_check_config_reports_missing_key():
    config = config_with()
    with config.unlocked():
        del config["schedule"]
    with pytest.raises(UsageError, match=r"config.schedule is missing; start from vit_jax.config.get_config\(\)"):
        keys.check_config(config)


def test_check_config_rejects_dict():
    with pytest.raises(UsageError, match="config is a dict; expected a ConfigDict"):
        keys.check_config(config_with().to_dict())


@pytest.mark.parametrize(
    ("changes", "num_steps", "eval_every_steps"),
    [
        ({"num_steps": 60}, 60, 500),
        ({"num_steps": 60, "eval_every_steps": 7}, 60, 7),
        ({"num_steps": 1000, "num_epochs": 3}, 66, 22),  # 1000 is the default
        ({"num_steps": 0, "num_epochs": 3, "eval_every_steps": 7}, 66, 7),
        ({"num_steps": 66, "num_epochs": 3}, 66, 22),  # the saved config of a run
    ],
)
def test_resolve_steps_derives_steps_from_epochs(changes, num_steps, eval_every_steps):
    config = config_with(**{"eval_every_steps": 0, **changes})
    keys.check_config(config)
    resolved = keys.resolve_steps(config, steps_per_epoch=22)
    assert (resolved.num_steps, resolved.eval_every_steps) == (num_steps, eval_every_steps)
    assert config.num_steps == changes["num_steps"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 60}, "num_epochs is 3, which is 66 steps, and config.num_steps is 60; set one of them to 0"),
        (
            {"num_steps": 0, "warmup_steps": 67},
            "num_epochs is 3, which is 66 steps; expected from warmup_steps, 67",
        ),
        (
            {"num_steps": 0, "num_epochs": 10**8},
            "2200000000 steps; expected from warmup_steps, 22, to 2^31 - 1",
        ),
    ],
)
def test_resolve_steps_rejects_contradictions(changes, message):
    config = config_with(**{"num_epochs": 3, "warmup_steps": 22, **changes})
    keys.check_config(config)
    with pytest.raises(UsageError) as error:
        keys.resolve_steps(config, steps_per_epoch=22)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["seed", "optimizer", "optimizer.name", "model", "model.patch_size"])
def test_check_key_accepts_keys_groups_and_model_arguments(name):
    keys.check_key(name)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("learning_rat", "did you mean learning_rate?"),
        ("lr", "did you mean learning_rate?"),
        ("LR", "did you mean learning_rate?"),
        ("optimizer.lr", "did you mean learning_rate?"),
        ("lr_schedule", "did you mean schedule?"),
        ("weight_decay", "did you mean optimizer.weight_decay?"),
        ("wd", "did you mean optimizer.weight_decay?"),
        ("bs", "did you mean batch_size?"),
        ("model_name", "did you mean pretrained?"),
        ("epochs", "did you mean num_epochs?"),
        ("num_train_epochs", "did you mean num_epochs?"),
        ("max_steps", "did you mean num_steps?"),
        ("random_erasing", "did you mean augment?"),
        ("sampler", "did you mean dataset.sampling?"),
        ("warmup_epochs", "did you mean warmup_steps = epochs × (training images // batch_size)?"),
        ("momentum", "did you mean optimizer.momentum?"),
        ("test_augment", "did you mean ablation.test_augment?"),
        ("optimizer.momentun", "did you mean optimizer.momentum?"),
        ("optimizer.name.x", "did you mean optimizer.name?"),
        ("xyz", "`python -m vit_jax.config` prints all"),
    ],
)
def test_check_key_suggests_similar_key(name, advice):
    with pytest.raises(UsageError) as error:
        keys.check_key(name)
    assert str(error.value) == f"config.{name}: no such key; {advice}"


def test_suggest_key_returns_keys_or_arguments_of_models():
    assert set(keys._OTHER_NAMES) <= set(KEYS) | {"model.dropout_rate", "model.stochastic_depth_rate"}
    words = " ".join(keys._OTHER_NAMES.values()).split()
    assert len(words) == len(set(words)) and not set(words) & {key.rpartition(".")[2] for key in KEYS}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("dataset.classes", "cat,dog", "('cat', 'dog')"),
        ("dataset.classes", "0, 1", "('0', '1')"),
        ("dataset.classes", "cat", "('cat',)"),
        ("dataset.classes", "", "()"),
        ("dataset.classes", "('cat', 'dog')", "('cat', 'dog')"),
        ("dataset.classes", "['cat']", "['cat']"),
        ("dataset.classes", "'cat','dog'", "'cat','dog'"),
        ("trainable", "head", "head"),
        ("trainable", "cls,", "('cls',)"),
        ("augment", "inception", "inception"),
        ("augment", "inception,trivial, erase", "('inception', 'trivial', 'erase')"),
        ("augment", "('flip', 'erase')", "('flip', 'erase')"),
        ("trainable", "(lora|head)/.*", "('(lora|head)/.*',)"),
        ("trainable", r"head/.*,.*_\d{1,2}/.*", repr(("head/.*", r".*_\d{1,2}/.*"))),
        ("lora.targets", ".*/(query,value)/[a,b]", "('.*/(query,value)/[a,b]',)"),
        ("image_mean", "0.5,0.5,0.5", "0.5,0.5,0.5"),
        ("pretrained", "a,b.npz", "a,b.npz"),
    ],
)
def test_to_tuple_converts_lists_of_strings(name, text, expected):
    assert keys.to_tuple(name, text) == expected


def test_keys_are_resumable_unless_results_depend_on_them():
    assert [key.name for key in keys.KEYS if key.resumable] == [
        "dataset.data_dir", "dataset.num_workers", "eval_batch_size", "accumulation_steps", "remat", "mesh.fsdp",
        "mesh.data", "mesh.cpu_devices", "log_every_steps", "eval_every_steps", "checkpoint_every_steps",
        "reference_results",
    ]  # fmt: skip
