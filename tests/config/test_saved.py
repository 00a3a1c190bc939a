import json

import pytest
from conftest import config_with, set_keys

from configs import digits
from vit_jax.config import load_config, resume_config, save_config
from vit_jax.runtime.errors import UsageError, UserError


def write_config(workdir, **changes) -> None:
    save_config(config_with(**changes), workdir)


def write_text(workdir, text: str) -> None:
    (workdir / "config.json").write_text(text)


def test_load_config_restores_saved_config(tmp_path):
    config = set_keys(digits.get_config(), {"trainable": ("head/.*", "cls"), "model.pool": "token"})
    save_config(config, tmp_path)
    resume_config(config, tmp_path)
    loaded = load_config(tmp_path)
    assert json.loads(json.dumps(loaded.to_dict())) == json.loads(json.dumps(config.to_dict()))


def test_resume_config_reports_differences(tmp_path):
    write_config(tmp_path)
    with pytest.raises(UsageError, match=r"learning_rate: 0.001 → 0.5; model.num_heads: 4 → 2; seed: 0 → 7\)"):
        resume_config(config_with(**{"learning_rate": 0.5, "seed": 7, "model.num_heads": 2}), tmp_path)


def test_resume_config_adopts_steps_of_epochs(tmp_path):
    write_config(tmp_path, num_epochs=3, num_steps=66)
    config = config_with(num_epochs=3, num_steps=0)
    assert resume_config(config, tmp_path).num_steps == 66
    assert config.num_steps == 0
    with pytest.raises(UsageError, match=r"another config \(num_epochs: 3 → 4\); delete"):
        resume_config(config_with(num_epochs=4, num_steps=0), tmp_path)


def test_resume_config_ignores_resumable_keys(tmp_path):
    write_config(tmp_path)
    results = (("digits", "other work", 0.9),)
    resume_config(config_with(log_every_steps=1, eval_batch_size=7, reference_results=results), tmp_path)


def test_resume_config_prefers_config_of_checkpoint(tmp_path):
    write_config(tmp_path, seed=7)
    saved = json.loads(config_with().to_json())
    resume_config(config_with(log_every_steps=1), tmp_path, saved=saved)
    with pytest.raises(UsageError, match="seed: 0 → 7"):
        resume_config(config_with(seed=7), tmp_path, saved=saved)


@pytest.mark.parametrize("text", [None, "{", '{"seed": 3}'])
def test_load_config_prefers_config_of_checkpoint(tmp_path, text):
    if text is not None:
        write_text(tmp_path, text)
    assert load_config(tmp_path, saved=json.loads(config_with(seed=7).to_json())).seed == 7


def test_load_config_fills_missing_keys_with_defaults(tmp_path):
    tree = json.loads(json.dumps(digits.get_config().to_dict()))
    del tree["dataset"]["storage"], tree["dataset"]["test_resize"], tree["ablation"]
    write_text(tmp_path, json.dumps(tree))
    assert load_config(tmp_path).dataset.storage == "auto"
    assert load_config(tmp_path).dataset.test_resize == "squash"  # as before the key
    assert load_config(tmp_path).ablation.head_init == "zeros"
    resume_config(digits.get_config(), tmp_path)
    with pytest.raises(UsageError, match="ablation.head_init: 'zeros' → 'xavier'"):
        resume_config(config_with(**{"ablation.head_init": "xavier"}), tmp_path)


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
        load_config(tmp_path)
    assert error.value.exit_code == 1
