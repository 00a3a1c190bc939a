"""Compiles the training step for H200 GPUs, which need not exist, and checks its memory and collectives.

    pip install 'jax[cuda12-local]'          (or '.[aot]': only the plugin, without NVIDIA's libraries)
    python benchmarks/aot.py                 (H/14 compiles for minutes; --variants B_16 --devices 1 8 is faster)

Use a separate environment: with the plugin, JAX warns at every start on a machine without a GPU.

`configs/cifar100.py`: momentum SGD, all parameters, bfloat16, 224 px. Per mesh of devices the table has

    arguments, state, temporaries   GiB per device; the state is the part of the arguments that is updated in place
    matmuls, fused                  calls of cuBLAS, and of cuDNN's attention, forward + backward
    all-gather … all-to-all         instructions of the compiled program, after XLA has combined small ones
    per block                       gathers + reduce-scatters + all-reduces that a block adds, not combined

and the program exits with 1 and names the failed checks unless
    there is no all-to-all: activations stay on the devices of their images;
    the state per device is the device's fraction of the large arrays plus the small arrays, within 2 %;
    a block adds the same collectives at every depth, not more than its parameters need;
    ViT-B/16 with 64 images on one device takes at most 7 GiB of temporaries, 4.8 GiB with cuDNN's attention;
    cuDNN's attention is called once per block forward and backward, and ViT-B/16 has at most 225 matmuls with it.

`--attention cudnn` compiles cuDNN's attention: JAX's checks of the cuDNN version and of the device, which are absent,
are replaced by assumptions.
"""

import argparse
import collections
import dataclasses
import importlib.metadata
import itertools
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import cifar100, models
from vit_jax.config import VARIANTS
from vit_jax.data import DatasetInfo
from vit_jax.runtime import sharding
from vit_jax.runtime.arguments import parse_arguments
from vit_jax.runtime.errors import UsageError, UserError, run_command
from vit_jax.training import experiment
from vit_jax.training.plan import Plan

GIB = 2**30
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
DEPTHS = (1, 2, 4)
"""Numbers of blocks of the small models that are compared."""

# Public specifications of the H200 (SXM) and of compute capability 9.0; not read from a device.
H200 = f"""
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {139 * GIB}
  memory_bandwidth: {4_800 * 10**9}
  l2_cache_size: {50 * 2**20}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: {2**16}
  registers_per_core_limit: {2**16}
  shared_memory_per_core: {228 * 2**10}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {227 * 2**10}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
}}
"""
# Autotuning XLA's Triton GEMMs needs a GPU.
UNTIMED: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
UNJOINED: dict[str, str | bool] = {
    f"xla_gpu_{kind.replace('-', '_')}_combine_threshold_bytes": "0" for kind in KINDS[:3]
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        variant: of `configs/models.py`.
        data: copies of the parameters.
        fsdp: devices that share a copy.
        batch: images per device.
        arguments: bytes per device, as are the next three.
        state: part of the arguments that is updated in place.
        expected_state: expected value of `state`.
        temporaries: of the compiled program.
        matmuls: calls of cuBLAS.
        fused: calls of cuDNN's attention, forward and backward.
        counts: instructions of each kind.
        per_block: instructions of each kind that a block adds, from each depth of `DEPTHS` to the next.
        most_per_block: maximum that its parameters need.
        seconds: to compile the full model.
    """

    variant: str
    data: int
    fsdp: int
    batch: int
    arguments: int
    state: int
    expected_state: int
    temporaries: int
    matmuls: int
    fused: tuple[int, int]
    counts: dict[str, int]
    per_block: list[dict[str, float]]
    most_per_block: dict[str, int]
    seconds: float


def meshes_of(num_devices: int) -> list[tuple[int, int]]:
    """Returns (data, fsdp) of three meshes: data-parallel, fully sharded, and sharded within hosts of eight."""
    inside = min(8, num_devices // 2)
    both = [(num_devices // inside, inside)] if inside and num_devices % inside == 0 else []
    return list(dict.fromkeys([(num_devices, 1), (1, num_devices), *both]))


def assume_cudnn() -> None:
    """Replaces JAX's checks of the cuDNN version and of the device by those of an H200 with cuDNN 9.10."""
    from jax._src.cudnn import fused_attention_stablehlo as checks

    checks.check_cudnn_version = lambda: 91000
    checks.check_compute_capability = lambda capability: float(capability) <= 9.0
    checks.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"


def create_step(
    variant: str,
    *,
    data: int,
    fsdp: int,
    batch: int,
    attention: str = "xla",
    image_size: int = 224,
    num_layers: int | None = None,
) -> Plan:
    """Plans the training step of a variant, optionally with fewer layers, for one GPU to many hosts of eight."""
    num_devices = data * fsdp
    # Partitions joined by NVLink × hosts in each × GPUs in each.
    topology = f"1x1x{num_devices}" if num_devices <= 8 else f"{num_devices // 8}x1x8"
    devices = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=topology).devices
    config = cifar100.get_config("full")
    config.pretrained = ""
    config.update(dtype="bfloat16", accumulation_steps=1, image_size=image_size)
    config.model = models.get_config(variant)
    config.model.attention = attention
    if num_layers:
        config.model.num_layers = num_layers
    config.batch_size = batch * num_devices
    model = experiment.create_model(config, None, num_classes=100)
    mesh = sharding.create_mesh(devices, data=data, fsdp=fsdp)
    info = DatasetInfo(50_000, 10_000, (32, 32, 3), tuple(map(str, range(100))), in_memory=True)
    return experiment.plan_experiment(config, model, mesh, info)


def count_collectives(text: str | None) -> dict[str, int]:
    """Counts the instructions of each kind in a compiled program; a start and its done count as one."""
    found = collections.Counter(re.findall(rf" (?:ragged-)?({'|'.join(KINDS)})(?:-start)?\(", text or ""))
    return {kind: found[kind] for kind in KINDS}


def count_per_block(variant: str, **sizes: Any) -> list[dict[str, float]]:
    """Counts the instructions of each kind that a block adds, from each depth to the next, not combined."""
    counts = []
    for depth in DEPTHS:
        compiled = create_step(variant, num_layers=depth, **sizes).lower().compile(UNTIMED | UNJOINED)
        counts.append((depth, count_collectives(compiled.as_text())))
    return [
        {kind: (more[kind] - fewer[kind]) / (deeper - depth) for kind in KINDS}
        for (depth, fewer), (deeper, more) in itertools.pairwise(counts)
    ]


def measure(variant: str, *, data: int, fsdp: int, batch: int, attention: str, image_size: int) -> Measured:
    """Compiles one configuration, and shallower versions of it."""
    options: dict[str, Any] = {"data": data, "fsdp": fsdp, "batch": batch}
    options |= {"attention": attention, "image_size": image_size}
    step = create_step(variant, **options)
    started = time.monotonic()
    compiled = step.lower().compile(UNTIMED)
    seconds = time.monotonic() - started
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""

    def is_split(leaf: jax.ShapeDtypeStruct) -> bool:
        return fsdp > 1 and leaf.size >= 4096

    leaves = jax.tree.leaves(step.abstract_state)
    block = jax.tree.leaves(step.abstract_state.trainable["Transformer"]["encoderblock_0"])
    num_split = sum(map(is_split, block))
    return Measured(
        variant=variant,
        data=data,
        fsdp=fsdp,
        batch=batch,
        arguments=memory.argument_size_in_bytes,
        state=memory.alias_size_in_bytes,
        expected_state=sum(leaf.size * leaf.dtype.itemsize // (fsdp if is_split(leaf) else 1) for leaf in leaves),
        temporaries=memory.temp_size_in_bytes,
        matmuls=text.count('custom_call_target="__cublas'),
        fused=(text.count('"__cudnn$fmhaSoftmax"'), text.count('"__cudnn$fmhaSoftmaxBackward"')),
        counts=count_collectives(text),
        per_block=count_per_block(variant, **options) if data * fsdp > 1 else [],
        # Each gradient is reduced once; sharded arrays also enter two norms, for clipping and for the finite check.
        most_per_block={
            "all-gather": num_split,
            "reduce-scatter": num_split,
            "all-reduce": len(block) + 2 * num_split,
            "all-to-all": 0,
        },
        seconds=seconds,
    )


def failures_of(row: Measured) -> list[str]:
    """Describes the failed checks of a configuration."""
    failed = []
    if row.counts["all-to-all"]:
        failed.append(f"{row.counts['all-to-all']} all-to-all, expected none")
    if abs(row.state / row.expected_state - 1) > 0.02:
        failed.append(f"state {row.state / GIB:.3f} GiB per device, expected {row.expected_state / GIB:.3f}")
    for kind in KINDS:
        added = [counts[kind] for counts in row.per_block]
        if len(set(added)) > 1:
            failed.append(f"a block adds {' then '.join(f'{n:g}' for n in added)} {kind}, expected one number")
        elif added and added[0] > row.most_per_block[kind]:
            failed.append(f"a block adds {added[0]:g} {kind}, its parameters need {row.most_per_block[kind]}")
    most = 4.8 if any(row.fused) else 7
    if row.variant == "B_16" and row.data * row.fsdp == 1 and row.batch <= 64 and row.temporaries > most * GIB:
        failed.append(f"temporaries {row.temporaries / GIB:.2f} GiB, expected at most {most}")
    num_layers = VARIANTS[row.variant][2]
    if any(row.fused) and row.fused != (num_layers, num_layers):
        failed.append(f"{row.fused[0]} + {row.fused[1]} calls of fused attention, expected {num_layers} each")
    if any(row.fused) and row.variant == "B_16" and row.matmuls > 225:
        failed.append(f"{row.matmuls} matmuls, expected at most 225")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints the table and checks it."""
    parser = argparse.ArgumentParser(description="Compile the training step for H200 GPUs, which need not exist.")
    parser.add_argument("--variants", nargs="+", default=["B_16", "H_14"], choices=VARIANTS, metavar="NAME")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8, 64], metavar="N", help="up to 8, or 8 × hosts")
    parser.add_argument("--batch", type=int, default=64, help="images per device")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="implementation of attention")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    args = parse_arguments(parser, argv)
    for num_devices in args.devices:
        if num_devices < 1 or (num_devices > 8 and num_devices % 8):
            raise UsageError(f"--devices {num_devices}: expected 1 to 8, or a multiple of 8")
    if args.batch < 1 or args.batch * max(args.devices) > 50_000:
        raise UsageError(f"--batch {args.batch}: expected at least 1, and 50,000 over all devices at most")
    versions = {package.name: package.version for package in importlib.metadata.distributions()}
    jaxlib, plugin = versions["jaxlib"], versions.get("jax-cuda12-plugin", "missing")
    if plugin != jaxlib:
        raise UserError(f"jaxlib is {jaxlib}, its CUDA plugin {plugin}: pip install jax-cuda12-plugin=={jaxlib}")

    jax.config.update("jax_platforms", "cpu")  # the plugin is only used as a compiler
    jax.config.update("jax_enable_compilation_cache", False)
    if args.attention == "cudnn":
        assume_cudnn()
    print(f"jax {jax.__version__}, jax-cuda12-plugin {plugin}, {args.batch} images per device\n")
    heads = (
        "variant",
        "data × fsdp",
        "arguments",
        "state",
        "temporaries",
        "matmuls",
        "fused",
        *KINDS,
        "per block".rjust(11),
        "seconds",
    )
    print("| " + " | ".join(heads) + " |\n|" + "|".join("-" * (len(head) + 2) for head in heads) + "|")
    failed = []
    for variant in args.variants:
        for data, fsdp in (mesh for num_devices in args.devices for mesh in meshes_of(num_devices)):
            options = {"attention": args.attention, "image_size": args.image_size}
            row = measure(variant, data=data, fsdp=fsdp, batch=args.batch, **options)
            added = " + ".join(f"{row.per_block[-1][kind]:g}" for kind in KINDS[:3]) if row.per_block else "-"
            sizes = [f"{size / GIB:.3f}" for size in (row.arguments, row.state, row.temporaries)]
            fused = f"{row.fused[0]} + {row.fused[1]}"
            cells = [variant, f"{data} × {fsdp}", *sizes, str(row.matmuls), fused]
            cells += [*map(str, row.counts.values()), added, f"{row.seconds:.0f}"]
            print("| " + " | ".join(c.rjust(len(h)) for c, h in zip(cells, heads, strict=True)) + " |", flush=True)
            failed += [f"{variant}, data {data} × fsdp {fsdp}: {what}" for what in failures_of(row)]
    if failed:
        raise UserError("; ".join(failed))
    print("\nall checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
