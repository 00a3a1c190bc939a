import json
import re
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from vit_jax.runtime.errors import UserError
from vit_jax.training.writer import Writer, format_steps, read_records, read_results


def test_read_records_ignores_truncated_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo')
    assert read_records(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "tr',
        b'{"train/loss": 1.0}',
        b"[2]",
        b"\0\xff",
        b"",
    ],
)
def test_read_records_names_damaged_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(
        UserError, match=r"^line 2 of .*metrics.jsonl is .*; expected a JSON object with .step.; delete that"
    ):
        read_records(path)


def test_read_results_rejects_missing_metrics(tmp_path):
    message = "finished at step 8, but metrics.jsonl is missing; python -m vit_jax.evaluate --workdir"
    with pytest.raises(UserError, match=message):
        read_results(tmp_path, 8, "12345678")


def test_read_results_rejects_changed_metrics(tmp_path):
    path, metrics = tmp_path / "metrics.jsonl", {"test/loss": 1.0, "test/accuracy": 0.5, "test/accuracy_top5": 0.9}
    with Writer(tmp_path, step=0, num_steps=8, steps_per_epoch=4) as writer:
        writer.log_evaluation(8, metrics)
    assert read_results(tmp_path, 8, writer.checksum)[1] == {"step": 8, **metrics}
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match="metrics.jsonl was changed; python -m vit_jax.evaluate"):
        read_results(tmp_path, 8, writer.checksum)


def test_read_records_stops_at_last_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "test/loss": 1.0}\n{"step": 3}\n')
    assert [record["step"] for record in read_records(path, last_step=2)] == [1, 2, 2]


def test_writer_truncates_to_restored_step_and_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 30')
    with Writer(tmp_path, step=10, num_steps=40, steps_per_epoch=4) as writer:
        writer.log_training(20, {"train/loss": 1.5, "train/accuracy": 0.5, "learning_rate": 0.1}, batch_size=4)
        writer.log_evaluation(20, {"test/loss": 1.0, "test/accuracy": 0.75, "test/accuracy_top5": 1.0})
    first, second, third = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {"step": 10}
    assert second.pop("images_per_second") > 0
    assert second == {"step": 20, "train/loss": 1.5, "train/accuracy": 0.5, "learning_rate": 0.1}
    assert third == {"step": 20, "test/loss": 1.0, "test/accuracy": 0.75, "test/accuracy_top5": 1.0}


def test_log_evaluation_prints_every_split(tmp_path, capsys):
    results = {"validation/accuracy": 0.75, "validation_raw/accuracy": 0.5, "validation/loss": 1.25}
    with Writer(tmp_path, step=0, num_steps=8, steps_per_epoch=4) as writer:
        writer.log_evaluation(6, results)
        writer.log_evaluation(8, {**results, "test/accuracy": 1.0, "test/loss": 0.0})
    first, last = re.findall(r"step \d+, epoch .*", capsys.readouterr().err)
    assert first == "step 6, epoch 1.5: validation accuracy 75.00% (without EMA 50.00%), validation loss 1.2500"
    assert last == first.replace("6, epoch 1.5", "8, epoch 2") + "; test accuracy 100.00%, test loss 0.0000"


@pytest.mark.parametrize(
    ("steps", "expected"), [(220, "220 steps = 10 epochs"), (22, "22 steps = 1 epoch"), (1, "1 step = 0.045 epochs")]
)
def test_format_steps_shows_both_units(steps, expected):
    assert format_steps(steps, 22) == expected


def read_events(workdir):
    """Returns (tag, step, value) of every scalar in the only event file, TFRecords of protocol buffers."""
    (path,) = workdir.glob("events.out.tfevents.*")
    content, scalars = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return scalars


def test_writer_writes_one_tensorboard_curve_across_restarts(tmp_path):
    for step in range(60):
        with Writer(tmp_path, step=step, num_steps=200, steps_per_epoch=4) as writer:
            for new in (step + 1, step + 2):  # the second one is written again after the restart
                scalars = {"train/loss": new / 8, "train/accuracy": 0.5, "learning_rate": 0.25}
                writer.log_training(new, scalars, batch_size=4)
            writer.log_evaluation(step + 2, {"test/loss": 1.0, "test/accuracy": step / 256, "test/accuracy_top5": 1.0})
    scalars = read_events(tmp_path)
    assert [(step, loss) for tag, step, loss in scalars if tag == "train/loss"] == [(k, k / 8) for k in range(1, 62)]
    assert [(tag, step) for tag, step, _ in scalars if tag == "test/accuracy"] == [("test/accuracy", 61)]
    assert len(scalars) == len({(tag, step) for tag, step, _ in scalars}) == 4 * 61 + 3
    records = read_records(tmp_path / "metrics.jsonl")
    written = [(tag, record["step"], value) for record in records for tag, value in record.items() if tag != "step"]
    assert scalars == [(tag, step, pytest.approx(value)) for tag, step, value in written]


def test_writer_keeps_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"old")
    with Writer(tmp_path, step=0, num_steps=1, steps_per_epoch=1):
        pass
    assert read_events(tmp_path) == []
    assert (tmp_path / "notes.txt").read_text() == "mine"
