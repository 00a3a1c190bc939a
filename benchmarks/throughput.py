"""Measures training steps and forward passes of this project and of other software, alternately, in one run.

    python benchmarks/throughput.py                              on a CPU: timm and transformers
    python benchmarks/throughput.py --preset gpu                 on a GPU, within ten minutes
    python benchmarks/throughput.py --cases B_16:224:8,16:float32:full,forward --peers vit_jax timm --json out.json

A case is VARIANT:PIXELS:BATCHES:DTYPES:MODES; commas separate alternatives. A mode is "full", "mlp", "lora" or "head":
forward, backward, clip and update of the parameters that it trains; or "forward". The first of `--peers` is compared
with the others, those that are installed of

    vit_jax, vit_jax:AUGMENT         without augmentation, or with some inside the step, such as vit_jax:inception,erase
    timm, timm:compile               eager, or with torch.compile; likewise transformers
    vision_transformer:DIR           the model of a clone of google-research/vision_transformer in DIR

All have the same random weights, images on the device, labels, loss, clipping, SGD with momentum and exact GELU, and no
dropout; the losses of their first steps must agree to 1e-3. Every program has a process of its own (peers.py), which
sleeps while another is measured. PyTorch uses SDPA, the fused optimizer, TF32, and autocast for bfloat16.

Prints rows for RESULTS.md. "relative time" is seconds of the software divided by seconds of the first peer in the same
round: median (smallest to largest). "matmul" is the rate of the case's FLOPs, as XLA counts them for vit_jax, divided
by the rate of the fastest software's product of two matrices of 1024² (GPU: 8192²). "memory" is the peak of the
process, or of its allocations on the GPU. On a CPU, "setting" is the fastest one in a trial: the default allocator,
that of `vit_jax.runtime.startup` ("tuned"), or, for this project, this one with `mesh.cpu_devices` ("2 devices").
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import CREATORS, MODES, NUM_CLASSES, Case
from vit_jax.config import STEM_UNITS, VARIANTS, model_sizes
from vit_jax.runtime.arguments import parse_arguments
from vit_jax.runtime.errors import UsageError, UserError, one_line, run_command
from vit_jax.runtime.resources import cpu_devices_environment
from vit_jax.runtime.startup import TUNABLES

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-3  # of the first losses
TRIALS = 3  # measurements per setting
GIB = 2**30
# Several processes share a GPU; the last line of a traceback is the error.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}
PRESETS: dict[str, tuple[str, ...]] = {
    "cpu": (
        "micro_4:32:128:float32:full,forward",
        "Ti_16:224:16:float32:full,forward",
        "B_16:224:8:float32:full,forward",
    ),
    "gpu": (
        "B_16:224:128:bfloat16:full,forward",
        "B_16:224:512:bfloat16:full",
        "B_16:384:64:bfloat16:full",
        "B_16:224:128:bfloat16:mlp,lora,head",
        "B_16:224:64:bfloat16:full",
        "B_16:384:512:bfloat16:full",
    ),
}
PEERS = {"cpu": ("vit_jax", "timm", "transformers"), "gpu": ("vit_jax", "timm:compile", "timm", "transformers:compile")}
HEADS = (
    "case",
    "software",
    "ms/step",
    "images/s",
    "relative time",
    "matmul",
    "memory, GiB",
    "first step, s",
    "setting",
)


@dataclasses.dataclass
class Row:
    """Measurements of one software in one case."""

    case: Case
    peer: str
    device: str
    versions: dict[str, str]
    environment: dict[str, str]  # in addition to the user's
    loss: float | None  # of the first step; None with augmentation
    flops: float | None  # per step, of vit_jax
    seconds: list[float] = dataclasses.field(default_factory=list)  # per step, of each round
    ratios: list[float] = dataclasses.field(default_factory=list)  # to the first peer's
    matmul: list[float] = dataclasses.field(default_factory=list)  # FLOP/s of each round
    memory: int = 0  # bytes
    startup: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, see `measure_startup`
    matmul_fraction: float | None = None

    def cells(self) -> list[str]:
        """Formats the row of the table."""
        seconds = statistics.median(self.seconds)
        images = self.case.batch_size / seconds
        ratios = f"{statistics.median(self.ratios):.2f} ({min(self.ratios):.2f}–{max(self.ratios):.2f})"
        return [
            str(self.case),
            self.peer.partition(":/")[0],
            f"{1e3 * seconds:.4g}",
            f"{images:,.0f}" if images > 100 else f"{images:.3g}",
            ratios,
            f"{self.matmul_fraction:.0%}" if self.matmul_fraction else "",
            f"{self.memory / GIB:.2f}",
            ", ".join(f"{value:.1f} {name}" for name, value in self.startup.items()),
            name_setting(self.environment),
        ]


class Worker:
    """A process of peers.py."""

    def __init__(self, peer: str, case: Case, directory: Path, environment: dict[str, str]):
        """Starts the process and waits for its first step; raises UserError if it fails."""
        self.peer, self.environment = peer, environment
        self._step_seconds = math.inf
        self._log = tempfile.TemporaryFile("w+")
        start = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "peers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**ENVIRONMENT, **os.environ, **environment},
        )
        self.info = self.ask(peer=peer, case=dataclasses.asdict(case), directory=str(directory))
        self.startup = time.monotonic() - start

    def ask(self, **request: object) -> dict[str, Any]:
        """Sends a request and returns the answer."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            lines = self._log.read().split("\n")
            last = next((line for line in reversed(lines) if line.strip()), f"exit code {self._process.returncode}")
            self.close()
            raise UserError(f"{self.peer}: {one_line(last)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self, seconds: float) -> float:
        """Returns seconds per step, of as many steps as fit into `seconds` at the speed of the last measurement."""
        num_steps = max(1, round(seconds / self._step_seconds))
        self._step_seconds = float(self.ask(steps=num_steps)["seconds"])
        return self._step_seconds

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def parse_case(text: str) -> list[Case]:
    """Expands VARIANT:PIXELS:BATCHES:DTYPES:MODES."""
    parts = text.split(":")
    if len(parts) != 5:
        raise UsageError(f"--cases {text}: expected VARIANT:PIXELS:BATCHES:DTYPES:MODES, such as {PRESETS['cpu'][0]}")
    variants = [name for name in VARIANTS if name not in STEM_UNITS]
    choices = {0: variants, 3: ("float32", "bfloat16"), 4: MODES}
    cases = []
    for variant, size, batch, dtype, mode in itertools.product(*(part.split(",") for part in parts)):
        for i, value in ((0, variant), (3, dtype), (4, mode)):
            if value not in choices[i]:
                raise UsageError(f"--cases {text}: {value!r}; expected one of {', '.join(choices[i])}")
        if not re.fullmatch(r"[1-9]\d{0,4}", size) or not re.fullmatch(r"[1-9]\d{0,4}", batch):
            raise UsageError(f"--cases {text}: expected pixels and batches as positive integers")
        patch_size = VARIANTS[variant][0]
        if int(size) % patch_size:
            raise UsageError(f"--cases {text}: expected pixels as a multiple of {patch_size}")
        cases.append(Case(variant, int(size), int(batch), dtype, mode))
    return cases


def write_inputs(case: Case, directory: Path) -> None:
    """Writes random weights and images in the formats that the software reads; uses no device."""
    from flax.traverse_util import unflatten_dict

    from vit_jax import models, pretrained
    from vit_jax.models.common import num_input_axes
    from vit_jax.pretrained.huggingface import save_huggingface
    from vit_jax.pretrained.sizes import parameter_shapes

    sizes = model_sizes(case.variant)
    model = models.create_model("vit", {**sizes, "gelu_approximate": False}, num_classes=NUM_CLASSES)
    rng = np.random.default_rng(0)
    flat = {}
    for key, shape in parameter_shapes(model, (case.image_size // sizes["patch_size"]) ** 2).items():
        scale = 0.02
        if key.endswith("/kernel"):
            # A small head: rounding to bfloat16 changes the loss by less than the tolerance.
            scale = (0.2 if key == "head/kernel" else 1.0) / np.prod(shape[: num_input_axes(key, len(shape))]) ** 0.5
        flat[key] = scale * rng.standard_normal(shape, np.float32) + np.float32(key.endswith("/scale"))
    params = unflatten_dict(flat, sep="/")
    names = tuple(map(str, range(NUM_CLASSES)))
    metadata = pretrained.ModelMetadata.from_model(model, image_size=case.image_size, class_names=names)
    pretrained.save_npz(directory / "weights.npz", params)
    (directory / "huggingface").mkdir()
    save_huggingface(directory / "huggingface", params, metadata)
    (directory / "sizes.json").write_text(json.dumps(sizes))
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    np.save(directory / "images.npy", rng.integers(0, 256, shape, np.uint8))
    np.save(directory / "labels.npy", rng.integers(0, NUM_CLASSES, case.batch_size, np.int32))


def name_setting(environment: dict[str, str]) -> str:
    """Returns the text of a worker's environment for the table."""
    names = ["tuned"] if "GLIBC_TUNABLES" in environment else []
    if "JAX_NUM_CPU_DEVICES" in environment:
        names.append(f"{environment['JAX_NUM_CPU_DEVICES']} devices")
    return ", ".join(names) or "default"


def cpu_environments(peer: str, case: Case) -> list[dict[str, str]]:
    """Returns the environments to try on a CPU, besides the user's."""
    is_set = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    allocator = {} if is_set or platform.libc_ver()[0] != "glibc" else {"GLIBC_TUNABLES": TUNABLES}
    devices = cpu_devices_environment(0, batch_size=case.batch_size) if peer.startswith("vit_jax") else {}
    return ([allocator] if allocator else []) + ([allocator | devices] if devices else [])


def start_fastest(peer: str, case: Case, directory: Path, environment: dict[str, str] | None, seconds: float) -> Worker:
    """Starts and warms up a worker with the given environment, or with the one that is fastest in a trial."""
    candidates = [Worker(peer, case, directory, environment or {})]
    if environment is None and candidates[0].info["device"] == "cpu":
        candidates += [Worker(peer, case, directory, setting) for setting in cpu_environments(peer, case)]
    for worker in candidates:
        worker.measure(seconds)
        worker.measure(seconds)
    if len(candidates) == 1:
        return candidates[0]
    trials = [[worker.measure(seconds) for worker in candidates] for _ in range(TRIALS)]
    medians = [statistics.median(column) for column in zip(*trials, strict=True)]
    fastest = candidates.pop(medians.index(min(medians)))
    for worker in candidates:
        worker.close()
    return fastest


def measure_startup(worker: Worker, case: Case, directory: Path) -> dict[str, float]:
    """Returns seconds from the start of a process to the end of its first step, without and with compiled programs."""
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        caches = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": cache,
        }
        for name in ("cold", "warm"):
            other = Worker(worker.peer, case, directory, {**worker.environment, **caches})
            other.close()
            seconds[name] = other.startup
    return seconds


@contextlib.contextmanager
def started(
    case: Case, peers: Sequence[str], directory: Path, environments: dict[str, dict[str, str]], seconds: float
) -> Iterator[list[Worker]]:
    """Yields the workers, after comparing their losses; all but the first are left out if they fail."""
    workers: list[Worker] = []
    try:
        for peer in peers:
            try:
                workers.append(start_fastest(peer, case, directory, environments.get(peer), seconds))
            except UserError as error:
                if not workers:
                    raise
                print(f"{case}: not measured: {error}", file=sys.stderr)
        for worker in workers[1:]:
            found, expected = worker.info["loss"], workers[0].info["loss"]
            if found is not None and expected is not None and not abs(found - expected) <= TOLERANCE:
                raise UserError(
                    f"the first loss of {worker.peer} is {found:.5f}, of {workers[0].peer} {expected:.5f}; expected "
                    f"losses that agree to {TOLERANCE}: the two do not compute the same, compare their versions"
                )
        yield workers
    finally:
        for worker in workers:
            worker.close()


def measure_case(case: Case, directory: Path, arguments: argparse.Namespace) -> list[Row]:
    """Measures a case in alternating rounds."""
    environments: dict[str, dict[str, str]] = {}
    for peer, setting in arguments.env:
        name, _, value = setting.partition("=")
        environments.setdefault(peer, {}).update({name: value} if name else {})
    write_inputs(case, directory)
    rows = []
    with started(case, arguments.peers, directory, environments, arguments.seconds) as workers:
        for worker in workers:
            info = {name: worker.info[name] for name in ("device", "versions", "loss", "flops")}
            rows.append(Row(case, worker.peer, environment=worker.environment, **info))
        size = 1024 if rows[0].device == "cpu" else 8192
        for number in range(arguments.rounds):
            order = list(zip(workers, rows, strict=True))
            for worker, row in order if number % 2 == 0 else reversed(order):
                row.seconds.append(worker.measure(arguments.seconds))
                row.matmul.append(worker.ask(matmul=size)["flops"])
        for worker, row in zip(workers, rows, strict=True):
            row.memory = worker.ask(memory=True)["memory"]
            row.ratios = [own / first for own, first in zip(row.seconds, rows[0].seconds, strict=True)]
        if arguments.startup:
            for worker, row in zip(workers, rows, strict=True):
                row.startup = measure_startup(worker, case, directory)
    rate = max(statistics.median(row.matmul) for row in rows)
    for row in rows:
        if rows[0].flops:
            row.matmul_fraction = rows[0].flops / statistics.median(row.seconds) / rate
    return rows


def describe_machine(rows: Sequence[Row]) -> str:
    """Returns a line with hardware, versions and commit."""
    from vit_jax.runtime.resources import available_cpus

    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    device = rows[0].device
    hardware = [] if device == "cpu" else [device]
    hardware.append(f"{available_cpus()} cores of {found[1] if found else platform.processor() or platform.machine()}")
    versions = {name: version for row in rows for name, version in row.versions.items()}
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = f"commit {git.stdout.strip()}" if git.returncode == 0 else "no commit"
    return ", ".join([*hardware, *(f"{name} {version}" for name, version in versions.items()), commit])


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Prints rows in Markdown."""
    for cells in lines:
        print(f"| {' | '.join(cells)} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Throughput of this project and of other software.")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="cases and peers (default: cpu)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="VARIANT:PIXELS:BATCHES:DTYPES:MODES")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="the first one is compared with the others")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a measurement; at least one step")
    parser.add_argument("--startup", action="store_true", help="also measure the time to the first step")
    parser.add_argument(
        "--env",
        nargs=2,
        action="append",
        default=[],
        metavar=("PEER", "NAME=VALUE"),
        help="environment variable of a peer, in place of the trial of settings; = for none",
    )
    parser.add_argument("--time_limit", type=float, default=540.0, metavar="SECONDS", help="starts no case after it")
    parser.add_argument("--json", metavar="PATH", help="write all measurements")
    arguments = parse_arguments(parser, argv)
    arguments.peers = arguments.peers or PEERS[arguments.preset]
    if arguments.rounds < 1 or not arguments.seconds > 0:
        raise UsageError("expected at least one round, and --seconds above 0")
    if unknown := [peer for peer in arguments.peers if peer.partition(":")[0] not in CREATORS]:
        raise UsageError(f"--peers {unknown[0]}: expected one of {', '.join(CREATORS)}")
    if any("=" not in setting for _, setting in arguments.env):
        raise UsageError("--env: expected PEER NAME=VALUE")
    cases = [case for text in arguments.cases or PRESETS[arguments.preset] for case in parse_case(text)]

    import jax

    jax.config.update("jax_platforms", "cpu")  # for the weights; the workers use the accelerator
    rows: list[Row] = []
    start, longest, failed = time.monotonic(), 0.0, []
    print_table([HEADS, ["---"] * len(HEADS)])
    for case in cases:
        case_start = time.monotonic()
        if case_start - start + longest > arguments.time_limit:
            failed.append(f"{case}: no time left; raise --time_limit")
            continue
        with tempfile.TemporaryDirectory() as directory:
            try:
                measured = measure_case(case, Path(directory), arguments)
            except UserError as error:
                failed.append(f"{case}: {error}")
                continue
        longest = max(longest, time.monotonic() - case_start)
        rows += measured
        print_table([row.cells() for row in measured])
        if arguments.json:
            Path(arguments.json).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    if rows:
        print(f"\n{describe_machine(rows)}")
    if failed:
        raise UserError("not measured: " + "; ".join(failed))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
