import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, set_keys
from ml_collections import ConfigDict

import train
from configs import base, cifar100, digits
from vit_jax import config as settings
from vit_jax import models
from vit_jax.data import preprocess
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training import optim

NAMES = [
    path.stem for path in sorted((ROOT / "configs").glob("*.py")) if path.stem not in ("__init__", "base", "models")
]
KEYS = {key.name: key for key in settings.KEYS}


def config_with(**changes) -> ConfigDict:
    """Returns the digits config with keys such as `optimizer.name` set to any value, without type checks."""
    config = digits.get_config().to_dict()
    for key, value in changes.items():
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    return ConfigDict(config)


def write_config(workdir, **changes) -> None:
    settings.save_config(config_with(**changes), workdir)


def write_text(workdir, text: str) -> None:
    (workdir / "config.json").write_text(text)


# Keys


@pytest.mark.parametrize("key", settings.KEYS, ids=lambda key: key.name)
def test_keys_have_short_documentation_and_valid_defaults(key):
    assert 10 <= len(key.doc) + len(key.check.expected) <= 300
    assert key.check.accepts(key.default)


def test_get_config_returns_default_of_every_key():
    config = settings.get_config()
    assert set(settings._flatten(config.to_dict(), leaf="model")) == set(KEYS)
    assert (config.seed, config.optimizer.momentum, config.trainable, config.model.to_dict()) == (0, 0.9, "full", {})


def test_get_config_locks_all_but_model_arguments():
    config = settings.get_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        config.learning_rat = 0.1
    config.model.patch_size = 16


def test_get_config_accepts_name_or_patterns_as_trainable():
    config = settings.get_config()
    config.trainable = ("head/.*",)
    config.trainable = "head"
    assert settings.get_config().trainable == "full"


def test_main_prints_every_key(capsys):
    assert settings.main([]) == 0
    printed = capsys.readouterr().out
    assert [line.split(" = ")[0] for line in printed.splitlines() if line[0] != " "] == list(KEYS)
    assert "optimizer.momentum = 0.9\n    momentum of sgd (a number in [0, 1))" in printed


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
        settings.check_config(config_with(augment=value))


def test_modes_equal_modes_of_optim():
    assert settings.MODES == tuple(optim.MODES)


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


# Config files


@pytest.mark.parametrize("name", NAMES)
def test_check_config_accepts_every_config_and_argument(name):
    """Reads the accepted arguments from the error message for an unknown argument."""
    module = importlib.import_module(f"configs.{name}")
    with pytest.raises(ValueError, match=rf"configs/{name}.py takes .*, got 'tail'") as error:
        module.get_config("tail")
    for argument in re.search("takes (.*), got", str(error.value))[1].split(", "):
        settings.check_config(module.get_config(argument))
    settings.check_config(module.get_config())


def test_base_config_equals_get_config():
    assert base.get_config().to_dict() == settings.get_config().to_dict()
    with pytest.raises(ValueError, match="configs/base.py takes no argument, got 'tail'"):
        base.get_config("tail")


@pytest.mark.parametrize(
    ("num_images", "batch_size", "steps"),
    [(50_000, 256, 195), (50_000, 128, 390), (40_000, 128, 312), (50_000, 64, 781), (1437, 64, 22)],
)
def test_steps_per_epoch_counts_full_batches(num_images, batch_size, steps):
    assert base.steps_per_epoch(num_images, batch_size) == steps


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_cifar100_config_of_bwconrad_differs_in_head_clipping_and_model(mode):
    ours, theirs = (cifar100.get_config(arg).to_dict() for arg in (mode, f"{mode}_bwconrad"))
    ours["optimizer"]["clip_norm"] = 0.0
    ours["ablation"]["head_init"] = "xavier"
    ours["model"] |= {"gelu_approximate": False, "layer_norm_epsilon": 1e-12}
    assert set(theirs["reference_results"]) <= set(ours.pop("reference_results"))
    theirs.pop("reference_results")
    assert theirs == ours


def test_reference_results_match_dataset_of_config():
    for name in NAMES:
        config = importlib.import_module(f"configs.{name}").get_config()
        assert {dataset for dataset, _, _ in config.reference_results} <= {config.dataset.name}, name


# Checks


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
        settings.check_config(config_with(**{key: value}))
    assert message in str(error.value)


@pytest.mark.parametrize("steps", [49, 50])
def test_check_config_rejects_schedule_not_longer_than_warmup(steps):
    with pytest.raises(UsageError, match=f"schedule_steps is {steps}; expected more than warmup_steps, 50"):
        settings.check_config(config_with(**{"warmup_steps": 50, "ablation.schedule_steps": steps}))


def test_check_config_reports_missing_key():
    config = config_with()
    with config.unlocked():
        del config["schedule"]
    with pytest.raises(UsageError, match=r"config.schedule is missing; start from vit_jax.config.get_config\(\)"):
        settings.check_config(config)


def test_check_config_rejects_dict():
    with pytest.raises(UsageError, match="config is a dict; expected a ConfigDict"):
        settings.check_config(config_with().to_dict())


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
    settings.check_config(config)
    resolved = settings.resolve_steps(config, steps_per_epoch=22)
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
    settings.check_config(config)
    with pytest.raises(UsageError) as error:
        settings.resolve_steps(config, steps_per_epoch=22)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["seed", "optimizer", "optimizer.name", "model", "model.patch_size"])
def test_check_key_accepts_keys_groups_and_model_arguments(name):
    settings.check_key(name)


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
        settings.check_key(name)
    assert str(error.value) == f"config.{name}: no such key; {advice}"


def test_suggest_key_returns_keys_or_arguments_of_models():
    assert set(settings._OTHER_NAMES) <= set(KEYS) | {"model.dropout_rate", "model.stochastic_depth_rate"}
    words = " ".join(settings._OTHER_NAMES.values()).split()
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
    assert settings.to_tuple(name, text) == expected


@pytest.mark.parametrize("variant", ["B_16", "R50_B_16"])
def test_model_sizes_returns_constructor_arguments(variant):
    sizes = settings.model_sizes(variant)
    models.create_model("vit", sizes, num_classes=None)
    assert (sizes["hidden_size"], sizes.get("stem_units")) == (768, (3, 4, 9) if "R" in variant else None)


# Saved configs


def test_load_config_restores_saved_config(tmp_path):
    config = set_keys(digits.get_config(), {"trainable": ("head/.*", "cls"), "model.pool": "token"})
    settings.save_config(config, tmp_path)
    settings.check_same(config, tmp_path)
    loaded = settings.load_config(tmp_path)
    assert json.loads(json.dumps(loaded.to_dict())) == json.loads(json.dumps(config.to_dict()))


def test_check_same_reports_differences(tmp_path):
    write_config(tmp_path)
    with pytest.raises(UsageError, match=r"learning_rate: 0.001 → 0.5; model.num_heads: 4 → 2; seed: 0 → 7\)"):
        settings.check_same(config_with(**{"learning_rate": 0.5, "seed": 7, "model.num_heads": 2}), tmp_path)


def test_check_same_adopts_steps_of_epochs(tmp_path):
    write_config(tmp_path, num_epochs=3, num_steps=66)
    config = config_with(num_epochs=3, num_steps=0)
    settings.check_same(config, tmp_path)
    assert config.num_steps == 66
    with pytest.raises(UsageError, match=r"another config \(num_epochs: 3 → 4\); delete"):
        settings.check_same(config_with(num_epochs=4, num_steps=0), tmp_path)


def test_check_same_ignores_resumable_keys(tmp_path):
    write_config(tmp_path)
    results = (("digits", "other work", 0.9),)
    settings.check_same(config_with(log_every_steps=1, eval_batch_size=7, reference_results=results), tmp_path)


def test_keys_are_resumable_unless_results_depend_on_them():
    assert [key.name for key in settings.KEYS if key.resumable] == [
        "dataset.data_dir", "dataset.num_workers", "eval_batch_size", "remat", "mesh.fsdp", "mesh.data",
        "mesh.cpu_devices", "log_every_steps", "eval_every_steps", "checkpoint_every_steps", "reference_results",
    ]  # fmt: skip


def test_check_same_prefers_config_of_checkpoint(tmp_path):
    write_config(tmp_path, seed=7)
    saved = json.loads(config_with().to_json())
    settings.check_same(config_with(log_every_steps=1), tmp_path, saved=saved)
    with pytest.raises(UsageError, match="seed: 0 → 7"):
        settings.check_same(config_with(seed=7), tmp_path, saved=saved)


@pytest.mark.parametrize("text", [None, "{", '{"seed": 3}'])
def test_load_config_prefers_config_of_checkpoint(tmp_path, text):
    if text is not None:
        write_text(tmp_path, text)
    assert settings.load_config(tmp_path, saved=json.loads(config_with(seed=7).to_json())).seed == 7


def test_load_config_fills_missing_keys_with_defaults(tmp_path):
    tree = json.loads(json.dumps(digits.get_config().to_dict()))
    del tree["dataset"]["storage"], tree["dataset"]["test_resize"], tree["ablation"]
    write_text(tmp_path, json.dumps(tree))
    assert settings.load_config(tmp_path).dataset.storage == "auto"
    assert settings.load_config(tmp_path).dataset.test_resize == "squash"  # as before the key
    assert settings.load_config(tmp_path).ablation.head_init == "zeros"
    settings.check_same(digits.get_config(), tmp_path)
    with pytest.raises(UsageError, match="ablation.head_init: 'zeros' → 'xavier'"):
        settings.check_same(config_with(**{"ablation.head_init": "xavier"}), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '"config"',
        '{"dataset": 3}',
        '{"seed": {}}',
        '{"seed": "x"}',
        '{"a.b": 3}',
    ],
)
def test_load_config_rejects_damaged_json(tmp_path, text):
    write_text(tmp_path, text)
    with pytest.raises(UserError, match="config.json is damaged, or of another version of vit_jax: ") as error:
        settings.load_config(tmp_path)
    assert error.value.exit_code == 1


# Flags of train.py

old_import = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # raised by ml_collections


@pytest.fixture
def config_file(tmp_path):
    """Returns a function that writes a config file with the given statements in get_config."""

    def write(body: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(
            f"from configs import base\ndef get_config(arg='x'):\n    config = base.get_config()\n    {body}\n"
        )
        return str(path)

    return write


@old_import
def test_parse_flags_sets_keys_and_new_model_arguments():
    argv = ["--config=configs/digits.py:scratch", "--config.trainable=('head/.*',)", "--config.model.pool=token"]
    config = train.parse_flags([*argv, "--config.ablation.test_augment=flip"]).config
    assert (config.trainable, config.model.pool, config.ablation.test_augment) == (("head/.*",), "token", "flip")


@old_import
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.learning_rat=0.1"], "config.learning_rat: no such key; did you mean learning_rate?"),
        (["--config.epochs=20"], "config.epochs: no such key; did you mean num_epochs?"),
        (["--epochs=20"], "unknown flag --epochs; did you mean --config.num_epochs?"),
        (["--config.num_epochs=2", "--config.num_steps=9"], "--config.num_epochs and --config.num_steps are both set"),
        (["--lr", "0.1"], "unknown flag --lr; did you mean --config.learning_rate?"),
        (["--batch_size=3"], "unknown flag --batch_size; did you mean --config.batch_size?"),
        (["--noconfig.frozen_dropout"], "config.frozen_dropout: no such key; did you mean ablation.frozen_dropout?"),
        (["--config.batch_size=many"], "config.batch_size is many; expected a positive integer"),
        (["--config.batch_size"], "Missing value for flag --config.batch_size"),
        (["--config=configs/nothing.py"], "No such file or directory: 'configs/nothing.py'"),
        (["--config=configs/digits.py:tune"], "configs/digits.py takes finetune, scratch, got 'tune' (see"),
        (["--workdri=x"], "unknown flag --workdri; did you mean --workdir? (see"),
        (["--wait_seconds=0"], "--wait_seconds is 0; expected a positive integer"),
        (["again"], "unexpected again; keys are set as --config.key=value"),
    ],
)
def test_parse_flags_rejects_invalid_flags(argv, message):
    with pytest.raises(UsageError) as error:
        train.parse_flags(["--config=configs/digits.py", *argv])
    assert message in str(error.value) and "\n" not in str(error.value)


@old_import
@pytest.mark.parametrize(
    ("flags", "set_in_file", "expected"),
    [
        (["--config.num_epochs=3"], "num_steps = 220", (3, 0)),
        (["--config.num_steps", "9"], "num_epochs = 3", (0, 9)),
        (["--config.num_epochs=0", "--config.num_steps=9"], "num_epochs = 3", (0, 9)),
        (["--config.seed=1"], "num_epochs = 3", (3, 1000)),
    ],
)
def test_parse_flags_replaces_duration_of_config_file(config_file, flags, set_in_file, expected):
    config = train.parse_flags([f"--config={config_file(f'config.{set_in_file}; return config')}", *flags]).config
    assert (config.num_epochs, config.num_steps) == expected


@old_import
@pytest.mark.parametrize("words", [["=cat,dog"], ["=('cat', 'dog')"], ["", "cat,dog"], ["", "('cat', 'dog')"]])
def test_parse_flags_accepts_lists(words):
    argv = [f"--config.dataset.classes{words[0]}", *words[1:]]
    config = train.parse_flags(["--config=configs/digits.py", *argv, "--config.image_mean=0,0.5,1"]).config
    assert (config.dataset.classes, config.image_mean) == (("cat", "dog"), (0, 0.5, 1))


@old_import
@pytest.mark.parametrize("flag", ["--no_report", "--noreport"])
def test_parse_flags_accepts_both_spellings_of_no_report(flag):
    assert train.parse_flags(["--config=configs/digits.py", flag]).no_report
    assert not train.parse_flags(["--config=configs/digits.py"]).no_report


@old_import
@pytest.mark.parametrize(
    ("argv", "workdir"),
    [([], "runs/digits-scratch"), (["--workdir", "a"], "a")],
)
def test_parse_flags_derives_workdir_from_config(argv, workdir):
    assert str(train.parse_flags(["--config", "configs/digits.py:scratch", *argv]).workdir) == workdir


@old_import
def test_parse_flags_requires_config():
    with pytest.raises(UsageError, match="--config is missing; give a config file, such as --config configs/digits.py"):
        train.parse_flags([])


@old_import
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "config.learning_rat = 0.1",
            'Key "learning_rat" does not exist and cannot be added since the config is locked. ',
        ),
        ("config.batch_size = 'x'", "TypeError: Could not override field 'batch_size' "),
        ("1 / 0", "division by zero "),
        ("def (", "invalid syntax "),
        ("raise ValueError", "ValueError "),
        ("return None", "{file} returns no config; expected get_config() to return a ConfigDict"),
    ],
)
def test_parse_flags_reports_error_in_config_file_in_one_line(config_file, body, message):
    file = config_file(body)
    with pytest.raises(UsageError) as error:
        train.parse_flags([f"--config={file}"])
    assert str(error.value).startswith(message.format(file=file)) and "\n" not in str(error.value)
