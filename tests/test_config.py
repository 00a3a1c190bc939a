import importlib
import json
import re

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from configs import base, digits
from vit_jax import config as settings
from vit_jax.runtime.errors import UsageError, UserError


def config_with(**changes) -> ConfigDict:
    """The digits recipe with keys such as `optimizer.name` set to anything at all."""
    config = digits.get_config().to_dict()
    for key, value in changes.items():
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    return ConfigDict(config)


RECIPES = [path.stem for path in sorted((ROOT / "configs").glob("*.py")) if path.stem not in ("__init__", "models")]


@pytest.mark.parametrize("name", RECIPES)
def test_check_config_accepts_every_recipe_with_every_argument(name):
    """A recipe's arguments are those that it names when it refuses another; base takes none and is incomplete."""
    recipe = importlib.import_module(f"configs.{name}")
    with pytest.raises(ValueError, match=rf"configs/{name}.py takes .*, got 'tail'") as error:
        recipe.get_config("tail")
    if name == "base":
        return
    arguments = re.search("takes (.*), got", str(error.value))[1]
    for argument in re.split(", | or ", arguments):
        settings.check_config(recipe.get_config(argument))
    settings.check_config(recipe.get_config())


def test_every_key_of_base_is_checked():
    assert set(settings._flatten(base.get_config().to_dict())) == set(settings._RULES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 0, "config.batch_size is 0; expected a whole number of at least 1"),
        ("batch_size", 2.5, "config.batch_size is 2.5; expected a whole number"),
        ("batch_size", True, "config.batch_size is True; expected a whole number"),
        ("num_steps", -1, "config.num_steps is -1; expected a whole number of at least 0"),
        ("learning_rate", float("nan"), "config.learning_rate is nan"),
        ("learning_rate", "fast", "config.learning_rate is 'fast'; expected a number"),
        ("schedule", "cosinus", "config.schedule is 'cosinus'; expected one of cosine, linear, constant"),
        ("optimizer.name", "lion", "config.optimizer.name is 'lion'; expected one of sgd, adam, adamw"),
        ("dataset.name", "", "config.dataset.name is ''; expected a text that is not empty"),
        ("trainable", "haed", "no mode 'haed'"),
        ("trainable", ("head/(",), "is not a regular expression"),
        ("trainable", ("a{99999999999999999999}",), "is not a regular expression"),
        ("trainable", ("(" * 5000 + ")" * 5000,), "is not a regular expression"),
        ("trainable", ("[[:alpha:]]",), "is not a regular expression"),
        ("seed", 2**31, "expected a whole number of at least 0, at most 2,147,483,647"),
        ("image_size", 16_385, "expected a whole number of at least 1, at most 16,384"),
        ("learning_rate", 1e39, "expected a number of at least 0"),
        ("learning_rate", float("nan"), "expected a number of at least 0"),
        ("image_mean", (10**400, 0, 0), "expected three numbers from 0 to 1"),
        ("image_std", (127.5, 127.5, 127.5), "expected three numbers above 0, at most 1"),
        ("accumulation_steps", 3, "config.batch_size 64 does not divide into 3 accumulation_steps"),
        ("warmup_steps", 10_000, "config.warmup_steps 10000 is above num_steps 220"),
        ("batch_sise", 8, "config.batch_sise: no such key; did you mean config.batch_size?"),
    ],
)
def test_check_config_refuses(key, value, message):
    with pytest.raises(UsageError) as error:
        settings.check_config(config_with(**{key: value}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 1, "warmup_steps": 1}, "num_steps and warmup_steps are both 1"),
        ({"warmup_steps": 50, "schedule_steps": 49}, "schedule_steps 49 is not above warmup_steps 50"),
        ({"warmup_steps": 50, "schedule_steps": 50}, "schedule_steps 50 is not above warmup_steps 50"),
    ],
)
def test_check_config_rejects_a_schedule_that_trains_nothing(changes, message):
    with pytest.raises(UsageError, match=message):
        settings.check_config(config_with(**changes))


def test_check_config_names_a_missing_key():
    config = config_with()
    with config.unlocked():
        del config["schedule"]
    with pytest.raises(UsageError, match="config.schedule is missing: start from configs/base.py"):
        settings.check_config(config)


def test_a_config_is_read_back_as_it_was_saved(tmp_path):
    config = config_with(trainable=("head/.*", "cls"))
    settings.save_config(config, tmp_path)
    settings.check_same(config, tmp_path)
    assert list(settings.load_config(tmp_path).trainable) == ["head/.*", "cls"]


def test_check_same_shows_what_differs(tmp_path):
    settings.save_config(config_with(), tmp_path)
    with pytest.raises(UsageError, match=r"learning_rate: 0.001 → 0.5; seed: 0 → 7\)"):
        settings.check_same(config_with(learning_rate=0.5, seed=7), tmp_path)


def test_check_same_lets_through_what_does_not_matter(tmp_path):
    settings.save_config(config_with(), tmp_path)
    settings.check_same(config_with(log_every_steps=1, eval_batch_size=7), tmp_path)


def test_load_config_reads_a_checkpoint_where_config_json_is_missing(tmp_path):
    saved = json.loads(config_with(seed=7).to_json())
    del saved["dataset"]["storage"]
    assert settings.load_config(tmp_path, saved=saved).seed == 7
    assert settings.load_config(tmp_path, saved=saved).dataset.storage == "auto"
    with pytest.raises(UserError, match="config.json is missing, and the checkpoint.*; put the file back"):
        settings.load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")  # damaged
    assert settings.load_config(tmp_path, saved=saved).seed == 7


def test_load_config_takes_the_config_of_the_checkpoint_and_names_a_config_json_that_differs(tmp_path, capsys):
    settings.save_config(config_with(seed=1), tmp_path)
    assert settings.load_config(tmp_path, saved=config_with(seed=1).to_dict()).seed == 1
    assert capsys.readouterr().err == ""
    assert settings.load_config(tmp_path, saved=config_with(seed=2).to_dict()).seed == 2
    assert "config.json is not the config of the run (seed: 2 → 1); the checkpoint's is used" in capsys.readouterr().err


def test_check_same_compares_with_the_checkpoint_rather_than_config_json(tmp_path):
    settings.save_config(config_with(seed=7), tmp_path)
    saved = json.loads(config_with().to_json())
    settings.check_same(config_with(log_every_steps=1), tmp_path, saved=saved)
    with pytest.raises(UsageError, match="seed: 0 → 7"):
        settings.check_same(config_with(seed=7), tmp_path, saved=saved)


def test_a_run_that_is_older_than_a_key_goes_on(tmp_path):
    config = digits.get_config()
    tree = json.loads(json.dumps(config.to_dict()))
    del tree["dataset"]["storage"], tree["dataset"]["num_workers"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert settings.load_config(tmp_path).dataset.storage == "auto"
    settings.check_same(config, tmp_path)


@pytest.mark.parametrize("text", ["[]", '"a text"', '{"seed": 0}', '{"dataset": 3}'])
def test_load_config_says_that_keys_are_missing(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json lacks .*: it is damaged, or no run's; give the --workdir"):
        settings.load_config(tmp_path)


def test_load_config_says_that_a_file_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="could not be read"):
        settings.load_config(tmp_path)
