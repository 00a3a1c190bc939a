import os
import shutil
import subprocess
import sys
import textwrap

import pytest


def run_python(code, *arguments):
    """Runs code in a new process, because TFDS registers builders and configures logging per process."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONWARNINGS")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


PREPARE = """
    import io
    import sys

    import numpy as np
    import tensorflow_datasets as tfds
    from PIL import Image

    label = tfds.features.ClassLabel(names=["cat", "dog"]) if "labels" in sys.argv else tfds.features.Scalar(np.int64)
    image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    features = tfds.features.FeaturesDict({"image": image, "label": label})

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

        def _generate_examples(self, num_images):
            for i in range(num_images):
                file = io.BytesIO()
                Image.new("RGB", (6 + ("wide" in sys.argv) * i, 5), (10 * i, 0, 0)).save(file, "png")
                file.seek(0)
                yield i, {"image": file, "label": i % 2}

    Pets(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


STREAM = """
    import sys

    from vit_jax.data import load_dataset
    from vit_jax.data.streaming import BatchReader, training_batches

    if __name__ == "__main__":
        train = load_dataset(sys.argv[1], data_dir=sys.argv[2], image_size=4, storage="stream").train
        reader = BatchReader(train, augment="none", margin_color=(0, 0, 0), batch_size=2, seed=0)
        batches = training_batches(reader, first_step=0, num_steps=2, num_workers=1)
        pairs = [(int(image[0, 0, 0]) // 10, int(label)) for batch in batches for image, label in zip(*batch)]
        print(sorted(pairs))
"""


SHOW = """
    import sys

    from vit_jax.data import load_dataset
    from vit_jax.runtime.errors import UserError

    name, data_dir, train_split = sys.argv[1:]
    try:
        dataset = load_dataset(name, data_dir=data_dir, train_split=train_split, image_size=4)
        print(dataset.class_names)
        print(dataset.train.images.shape, dataset.test.images.shape)
        print(sorted(zip((dataset.train.images[:, 0, 0, 0] // 10).tolist(), dataset.train.labels.tolist())))
        print("tensorflow" in sys.modules)
    except UserError as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    run_python(PREPARE, path, "labels")
    return path


def test_open_tfds_reads_array_records_without_tensorflow(tfds_dir):
    class_names, shapes, pairs, has_tensorflow = run_python(SHOW, "tfds:pets", tfds_dir, "train")[-4:]
    assert class_names == "('cat', 'dog')"
    assert shapes == "(4, 5, 6, 3) (2, 5, 6, 3)"
    assert pairs == "[(0, 0), (1, 1), (2, 0), (3, 1)]"
    assert has_tensorflow == "False"


def test_open_tfds_streams_records(tfds_dir, tmp_path):
    """The record source is pickled into the worker processes."""
    (tmp_path / "main.py").write_text(textwrap.dedent(STREAM))
    code = f"import runpy; runpy.run_path({str(tmp_path / 'main.py')!r}, run_name='__main__')"
    (pairs,) = run_python(code, "tfds:pets", tfds_dir)[-1:]
    assert pairs == "[(0, 0), (1, 1), (2, 0), (3, 1)]"


def test_open_tfds_selects_slice(tfds_dir):
    assert run_python(SHOW, "tfds:pets", tfds_dir, "train[:75%]")[-3] == "(3, 5, 6, 3) (2, 5, 6, 3)"


def test_open_tfds_resizes_images_of_different_sizes(tmp_path):
    run_python(PREPARE, tmp_path, "labels", "wide")
    assert run_python(SHOW, "tfds:pets", tmp_path, "train")[-3] == "(4, 4, 4, 3) (2, 4, 4, 3)"


def test_open_tfds_requires_class_names(tmp_path):
    run_python(PREPARE, tmp_path)
    message = run_python(SHOW, "tfds:pets", tmp_path, "train")[-1]
    assert "tfds:pets has the features image, label; expected" in message
    assert "a `label` with class names" in message


def test_open_tfds_lists_known_splits(tfds_dir):
    message = run_python(SHOW, "tfds:pets", tfds_dir, "trian")[-1]
    assert message == "UsageError unknown split 'trian'; expected train, test, or a slice such as 'train[:90%]'"


def test_open_tfds_prints_command_to_prepare_dataset(tmp_path):
    message = run_python(SHOW, "tfds:mnist", tmp_path, "train")[-1]
    assert message.startswith(f"UserError tfds:mnist is not prepared in {tmp_path}/mnist/")
    assert message.endswith(
        "prepare it: pip install 'vit_jax[tfds]' && python -c 'import tensorflow_datasets as tfds;"
        f' tfds.builder("mnist", data_dir="{tmp_path}", file_format="array_record").download_and_prepare()\''
    )


def test_open_tfds_suggests_nearest_dataset(tmp_path):
    message = run_python(SHOW, "tfds:mnits", tmp_path, "train")[-1]
    assert message.startswith(f"UsageError no dataset 'mnits' in TFDS or in {tmp_path}; nearest are mnist")


def test_open_tfds_rejects_other_file_format(tfds_dir, tmp_path):
    info = (tfds_dir / "pets" / "1.0.0" / "dataset_info.json").read_text()
    copy = tmp_path / "pets" / "1.0.0"
    copy.mkdir(parents=True)
    (copy / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    shutil.copy(tfds_dir / "pets" / "1.0.0" / "features.json", copy)
    message = run_python(SHOW, "tfds:pets", tmp_path, "train")[-1]
    assert message.startswith("UserError tfds:pets cannot be read as array_record (")
    assert "prepare it: pip install" in message


def test_load_dataset_imports_tfds_only_for_tfds_datasets():
    code = """
        import sys
        from vit_jax.data import load_dataset
        load_dataset("digits", image_size=8)
        print("tensorflow_datasets" in sys.modules)
    """
    assert run_python(code) == ["False"]
