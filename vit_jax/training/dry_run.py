"""What a run would cost: its step is compiled and measured by the compiler, nothing is downloaded or computed."""

import dataclasses
import functools
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import config as settings
from vit_jax import data
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError
from vit_jax.training import build, job, steps
from vit_jax.training.program import Program, create_program
from vit_jax.training.writer import format_number


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the compiler says of one call; bytes are those of one device.

    Attributes:
        flops: of all devices together, per picture.
        bytes_moved: read and written by all devices together, per picture.
        arguments: bytes of what goes in.
        temporaries: bytes that exist only while it runs, its outputs beyond the donated inputs among them.
    """

    flops: float
    bytes_moved: float
    arguments: int
    temporaries: int


def dry_run(config: ConfigDict) -> None:
    """Prints parameters, arithmetic and memory of a run.

    No images are downloaded or decoded, and a pretrained file is read only where `config.model` leaves sizes out.

    Raises:
        UsageError: the config is wrong.
        UserError: the run needs more memory than a device has.
    """
    settings.check_config(config)
    mesh = sharding.create_mesh(**config.mesh)
    info = data.dataset_info(**job.dataset_options(config))
    how = "" if info.in_memory else ", decoded as they are needed"
    print(
        f"{config.dataset.name}: {info.num_train:,} training and {info.num_test:,} test images of "
        f"{info.image_shape[0]} × {info.image_shape[1]} pixels, {len(info.class_names)} classes{how}"
    )
    source = build.load_source(config) if build.needs_file(config) else None
    model = build.create_model(config, source, num_classes=len(info.class_names))
    program = create_program(
        config,
        model,
        mesh,
        num_images=info.num_train,
        image_shape=info.image_shape,
        in_memory=info.in_memory,
    )
    print(program.describe_trainable())
    print("compiling the training step and the evaluation …", flush=True)
    training = measure(program.lower().compile(), mesh.size, config.batch_size // config.accumulation_steps)
    batch_size = sharding.pad_to_devices(config.eval_batch_size, info.num_test, mesh)
    evaluation = measure(lower_evaluation(program, config, batch_size).compile(), mesh.size, batch_size)

    rows, labels = program.abstract_arrays
    pictures = sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in (rows, labels)
    )
    # Of streamed pictures the next batch lies ready.
    test_pictures = pictures if program.streamed else pictures * info.num_test // len(labels)
    needed = training.arguments + test_pictures + max(training.temporaries, evaluation.temporaries)
    how = ", as features" if program.cached else ", two batches at a time" if program.streamed else ""
    device = mesh.devices.flat[0]
    available, whose = sharding.device_memory(device)
    print(
        f"\n{'a training picture':<22}{_work(training)}{', its features being stored' if program.cached else ''}"
        f"\n{'a test picture':<22}{_work(evaluation)}"
        f"\n{'memory per device':<22}{_gib(needed)} of {_gib(available)} ({whose}); {mesh.size} × {device.device_kind}"
        f"\n{'  state':<22}{_gib(training.arguments - pictures)}"
        f"\n{'  pictures':<22}{_gib(pictures + test_pictures)}{how}"
        f"\n{'  temporaries':<22}{_gib(training.temporaries)} to train, {_gib(evaluation.temporaries)} to evaluate"
        f"\nas the compiler for {device.platform} says, jax {jax.__version__}; another backend's temporaries are others"
    )
    if needed > available:
        raise UserError(
            f"the run needs {_gib(needed)} per device, there are {_gib(available)}: raise accumulation_steps (now "
            f"{config.accumulation_steps}), set remat to 'full' (now {config.remat!r}), share the parameters between "
            f"devices with mesh.fsdp (now {config.mesh.fsdp}), or lower eval_batch_size (now {config.eval_batch_size})"
        )


def measure(compiled: Any, num_devices: int, num_images: int) -> Cost:
    """Reads a compiled function's costs.

    Args:
        compiled: of `jax.jit(…).lower(…).compile()`.
        num_devices: that it runs on; the compiler counts for one.
        num_images: that pass while a loop's body runs once: the compiler counts a body once.
    """
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    per_picture = num_devices / num_images
    return Cost(
        flops=cost["flops"] * per_picture,
        bytes_moved=cost["bytes accessed"] * per_picture,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )


def lower_evaluation(program: Program, config: ConfigDict, batch_size: int) -> Any:
    """Traces the way of a batch of pictures through the whole model."""
    state = program.abstract_state
    params = jax.eval_shape(functools.partial(steps.evaluated_params, lora_alpha=config.lora.alpha), state)
    images, labels = program.abstract_images
    if not program.in_memory:
        images, labels = (jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype) for a in (images, labels))
        images, labels = sharding.with_sharding((images, labels), sharding.batch_sharding(program.mesh))
    everywhere = sharding.replicated(program.mesh)
    totals = sharding.with_sharding(jax.eval_shape(steps.start_totals), everywhere)
    eval_step = steps.make_eval_step(
        program.pictures_forward, program.mesh, batch_size=batch_size, streamed=not program.in_memory
    )
    return eval_step.lower(
        sharding.with_sharding(params, sharding.param_shardings(params, program.mesh)), images, labels, totals
    )


def _work(cost: Cost) -> str:
    return f"{format_number(cost.flops / 1e9)} GFLOP, {format_number(cost.bytes_moved / 1e6)} MB moved"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
