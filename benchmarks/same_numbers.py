"""Checks that short runs of two checkouts of this project write bit-equal metrics.

    python benchmarks/same_numbers.py record BEFORE.json --checkout DIR [--cifar10 ARCHIVE]
    python benchmarks/same_numbers.py record AFTER.json [--cifar10 ARCHIVE]
    python benchmarks/same_numbers.py compare BEFORE.json AFTER.json

`record` trains each case of `CASES` in its own process, on the CPU, and stores every line of its metrics.jsonl
except `images_per_second`. `compare` prints the cases that differ, and exits with 1 if there are any. `lora` differs
from 0.1 on purpose: alpha was 16 and is 8, and LoRA weights were normally distributed and are uniform.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

_SHORT = {"num_steps": 24, "warmup_steps": 4, "batch_size": 32}
_SHORT |= {"log_every_steps": 1, "eval_every_steps": 12, "checkpoint_every_steps": 6}
_VIEWS = {"augment": "inception", "features": "cached", "feature_views": 2}
_DECAY = {"optimizer.layer_decay": 0.7, "optimizer.decayed": "kernels", "optimizer.weight_decay": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "head_cached": {"trainable": "head", "augment": "none", "num_steps": 60},
    "head_two_views": {"trainable": "head", **_VIEWS, "num_steps": 120},
    "head_uncached": {"trainable": "head", "augment": "pad_crop"},
    "lora": {"trainable": "lora", "optimizer.name": "adamw", "optimizer.weight_decay": 0.1},
    "mixup_cutmix_ema": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "ema_decay": 0.99, "label_smoothing": 0.1},
    "accumulation": {"accumulation_steps": 4, "augment": "square_crop", "model.dropout_rate": 0.1},
    "layer_decay_adam": {"optimizer.name": "adam", **_DECAY},
    "schedule": {"schedule": "linear", "remat": "full", "model.stochastic_depth_rate": 0.2},
    "ablation": {
        "ablation.test_augment": "square_crop",
        "ablation.schedule_steps": 100,
        "ablation.schedule_every_steps": 5,
        "ablation.frozen_dropout": True,
        "trainable": "head",
        "model.dropout_rate": 0.1,
    },
    "bfloat16": {"dtype": "bfloat16", "optimizer.momentum_dtype": "bfloat16", "trainable": "attention"},
    "resnet": {
        "architecture": "resnet50",
        "pretrained": "",
        "model": {"units": (1, 1, 1, 1), "width": 32},
        "augment": "pad_crop",
        "num_steps": 8,
    },
    "streamed_folder": {"dataset": "folder", "dataset.storage": "stream", "augment": "inception", "image_size": 32},
    "memory_folder": {"dataset": "folder", "dataset.storage": "memory", "augment": "inception", "image_size": 32},
    "streamed_head": {"dataset": "folder", "dataset.storage": "stream", "trainable": "head", "image_size": 32},
    "resumed": {"augment": "inception", "model.dropout_rate": 0.1, "num_steps": 60},
    "eight_devices_fsdp": {"mesh.fsdp": 4, "model.dropout_rate": 0.1},
}
"""Changes to configs/digits.py. "resumed" is stopped by SIGTERM and resumed."""


def main() -> int:
    """Records or compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("out", type=pathlib.Path)
    record.add_argument("--checkout", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    record.add_argument("--cifar10", help="official binary archive; without it, cases on image folders are skipped")
    record.add_argument("--cases", nargs="*", default=list(CASES))
    compare = commands.add_parser("compare")
    compare.add_argument("before", type=pathlib.Path)
    compare.add_argument("after", type=pathlib.Path)
    train = commands.add_parser("train")
    train.add_argument("case")
    train.add_argument("workdir")
    train.add_argument("folder")
    arguments = parser.parse_args()
    if arguments.command == "train":
        return train_case(arguments.case, arguments.workdir, arguments.folder)
    if arguments.command == "compare":
        return compare_files(arguments.before, arguments.after)
    records = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        folder = make_folder(arguments.cifar10, pathlib.Path(directory) / "images") if arguments.cifar10 else ""
        for case in arguments.cases:
            if folder or "dataset" not in CASES[case]:
                workdir = pathlib.Path(directory) / case
                records[case] = record_case(case, workdir, folder, checkout=arguments.checkout)
                arguments.out.write_text(json.dumps(records))
                print(f"{case}: {len(records[case])} lines", flush=True)
    return 0


def record_case(case: str, workdir: pathlib.Path, folder: str, *, checkout: pathlib.Path) -> list[dict[str, Any]]:
    """Trains a case in the given checkout; returns the lines of its metrics.jsonl."""
    devices = "--xla_force_host_platform_device_count=8" if case == "eight_devices_fsdp" else ""
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "train", case, str(workdir), folder]
    metrics = workdir / "metrics.jsonl"
    options: dict[str, Any] = {"cwd": checkout, "env": environment, "stdout": subprocess.DEVNULL}
    if case == "resumed":
        process = subprocess.Popen(command, **options)
        while process.poll() is None and not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 10):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait()
    subprocess.run(command, check=True, **options)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def train_case(case: str, workdir: str, folder: str) -> int:
    """Trains a case with the `vit_jax` on the path."""
    from configs import digits
    from vit_jax import trainer

    config = digits.get_config()
    for key, value in (_SHORT | CASES[case]).items():
        if key == "dataset":
            config.dataset.name = f"folder:{folder}"
            if "validation_fraction" in config.dataset:
                config.dataset.validation_fraction = 0.0
        elif key == "model":
            with config.unlocked():
                config.model = type(config)(value)
        else:
            *parents, name = key.split(".")
            owner = config
            for parent in parents:
                owner = owner if parent == "ablation" and "ablation" not in config else owner[parent]
            with config.unlocked():
                owner[name] = value
    trainer.train_and_evaluate(config, workdir)
    return 0


def make_folder(archive: str, directory: pathlib.Path) -> str:
    """Writes 240 training and 60 test images of CIFAR-10 as PNG files, DIR/{train,test}/CLASS/*.png."""
    import tarfile

    import numpy as np
    from PIL import Image

    with tarfile.open(archive) as tar:
        member = next(name for name in tar.getnames() if name.endswith("data_batch_1.bin"))
        rows = np.frombuffer(tar.extractfile(member).read(), np.uint8).reshape(-1, 3073)[:300]  # type: ignore[union-attr]
    for number, row in enumerate(rows):
        path = directory / ("train" if number < 240 else "test") / f"class{row[0]}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(path)
    return str(directory)


def compare_files(before: pathlib.Path, after: pathlib.Path) -> int:
    """Prints which cases differ; returns 1 if any does."""
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    different = 0
    for case in old:
        lines, others = old[case], new.get(case, [])
        first = next((i for i, (a, b) in enumerate(zip(lines, others, strict=False)) if a != b), None)
        if lines == others:
            print(f"{case}: {len(lines)} lines, bit-equal")
        else:
            different += 1
            change = f"{len(lines)} → {len(others)} lines" if first is None else f"{lines[first]} → {others[first]}"
            print(f"{case}: differs: {change}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
