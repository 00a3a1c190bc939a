import json

import pytest

from vit_jax.runtime.errors import UserError
from vit_jax.training.writer import Writer, read_records, read_results


def test_read_records_ignores_a_truncated_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo')
    assert read_records(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", [b'{"step": 2, "tr', b'{"train/loss": 1.0}', b"[2]", b"\0\xff", b""])
def test_read_records_names_a_damaged_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"^line 2 of .*metrics.jsonl is .*; expected a JSON object .*; delete that"):
        read_records(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "metrics.jsonl is missing"),
        ('{"step": 4, "test/accuracy": 0.5}\n{"step": 8, "train/loss": 1}\n', "has no evaluation of that step"),
    ],
)
def test_read_results_says_how_to_measure_a_finished_run_again(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"finished at step 8, but .*{reason}; python -m vit_jax.evaluate --workdir"):
        read_results(tmp_path, 8)


def test_read_records_stops_at_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "test/loss": 1.0}\n{"step": 3}\n')
    assert [record["step"] for record in read_records(path, last_step=2)] == [1, 2, 2]


def test_writer_cuts_back_to_the_restored_step_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 30')
    with Writer(tmp_path, step=10, num_steps=40) as writer:
        writer.log_training(20, {"train/loss": 1.5, "train/accuracy": 0.5, "learning_rate": 0.1}, batch_size=4)
        writer.log_evaluation(20, {"test/loss": 1.0, "test/accuracy": 0.75, "test/accuracy_top5": 1.0})
    first, second, third = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {"step": 10}
    assert second.pop("images_per_second") > 0
    assert second == {"step": 20, "train/loss": 1.5, "train/accuracy": 0.5, "learning_rate": 0.1}
    assert third == {"step": 20, "test/loss": 1.0, "test/accuracy": 0.75, "test/accuracy_top5": 1.0}


def test_writer_writes_tensorboard_events(tmp_path):
    with Writer(tmp_path, step=0, num_steps=1) as writer:
        writer.log_evaluation(1, {"test/loss": 1.0, "test/accuracy": 0.75, "test/accuracy_top5": 1.0})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"test/accuracy_top5" in events.read_bytes()
