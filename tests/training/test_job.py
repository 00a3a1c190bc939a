import json
import shutil

import jax
import pytest
from PIL import Image

from configs import digits
from vit_jax import data
from vit_jax.runtime import distributed
from vit_jax.runtime.errors import UserError
from vit_jax.training import job

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


def test_adamw_and_bfloat16_make_a_job():
    config = digits.get_config("scratch")
    config.update(model=SIZES, dtype="bfloat16")
    config.optimizer.name = "adamw"
    made, create_state = job.create_job(config)
    assert made.program.steps_per_epoch == 1437 // 64
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(create_state().trainable)} == {"float32"}
    assert made.about["class_names"] == [str(digit) for digit in range(10)]


def test_check_same_dataset_names_the_process_that_differs(monkeypatch):
    found = data.fingerprint(data.load_dataset("digits", image_size=8))
    job.check_same_dataset(found)
    monkeypatch.setattr(distributed, "gather", lambda text: [text, text, "3 training images"])
    with pytest.raises(UserError) as error:
        job.check_same_dataset(found)
    expected = "process 2 read 3 training images, the first process read 1,437 training and 360 test images of"
    assert str(error.value).startswith(expected)


@pytest.fixture
def folder(tmp_path):
    """Three images each of two classes to train on, two to test on."""
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def rename_class(folder):
    for split in ("train", "test"):
        (folder / split / "cat").rename(folder / split / "wolf")


CHANGES = {
    "class": (rename_class, r"it has other classes \(new: wolf; missing: cat\)"),
    "count": (
        lambda folder: shutil.copy(folder / "train/cat/0.png", folder / "train/cat/3.png"),
        "it has 7 training and 4 test images instead of 6 training and 4 test images",
    ),
    "file": (
        lambda folder: (folder / "test/dog/0.png").rename(folder / "test/dog/9.png"),
        "it has as many images, but other files or labels",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_create_job_rejects_a_dataset_that_changed_since_the_run_was_started(folder, tmp_path_factory, change):
    config = digits.get_config("scratch")
    config.update(model=SIZES, image_size=8, batch_size=2)
    config.mesh.data = 1
    config.dataset.name = f"folder:{folder}"
    about = json.loads(json.dumps(job.create_job(config)[0].about))
    moved = tmp_path_factory.mktemp("moved") / "images"
    shutil.move(folder, moved)
    config.dataset.name = f"folder:{moved}"
    job.create_job(config, saved=about)  # the same files in another place
    edit, message = CHANGES[change]
    edit(moved)
    with pytest.raises(UserError, match=f"has changed since the run was started: {message}; put it back"):
        job.create_job(config, saved=about)
