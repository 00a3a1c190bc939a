import pytest

import train
from vit_jax.config import KEYS, command_line
from vit_jax.runtime.errors import UsageError

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


def test_main_prints_every_key(capsys):
    assert command_line.main([]) == 0
    printed = capsys.readouterr().out
    assert [line.split(" = ")[0] for line in printed.splitlines() if line[0] != " "] == [key.name for key in KEYS]
    assert "optimizer.momentum = 0.9\n    momentum of sgd (a number in [0, 1))" in printed


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
