"""Estimates the cost of a run by compiling its steps; nothing is downloaded or decoded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax import pretrained
from vit_jax.data.batches import Batch
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training import steps
from vit_jax.training.experiment import create_model, describe_dataset, plan_experiment, resolve_config
from vit_jax.training.inference import Inference
from vit_jax.training.initialize import load_pretrained, needs_pretrained
from vit_jax.training.plan import Plan, bytes_per_device, memory_of
from vit_jax.training.writer import format_number


@dataclasses.dataclass(frozen=True)
class Cost:
    """The compiler's estimate for one call: compute per image, over all devices, and bytes on one device."""

    flops: float  # per image
    bytes_moved: float  # per image, read and written
    arguments: int  # bytes
    temporaries: int  # bytes, including outputs that do not reuse donated arguments

    def __str__(self) -> str:
        """Returns the cost per image as text."""
        return f"{format_number(self.flops / 1e9)} GFLOP, {format_number(self.bytes_moved / 1e6)} MB moved"


def dry_run(config: ConfigDict) -> None:
    """Prints trainable parameters, FLOPs and memory of a run; raises UserError if a device has too little memory.

    The pretrained checkpoint is loaded only if it is on disk; `config.model` must have sizes if it is not.
    """
    mesh = sharding.create_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    config = resolve_config(config, mesh)
    info = describe_dataset(config)
    needs_file = needs_pretrained(config.model, config.architecture)
    if needs_file and pretrained.needs_download(config.pretrained):
        raise UsageError(
            f"config.model has no sizes, {config.pretrained} is not in the cache, and a dry run downloads nothing; set "
            "config.model, for example to configs.models.get_config('B_16')"
        )
    source = load_pretrained(config.pretrained) if needs_file or pretrained.is_local(config.pretrained) else None
    model = create_model(config, source, num_classes=len(info.class_names))
    plan = plan_experiment(config, model, mesh, info)
    config = plan.config
    training = measure(plan.compile_train_step(), mesh.size, config.batch_size // config.accumulation_steps)
    print("compiling the evaluation …", flush=True)
    eval_batch_size = sharding.pad_to_devices(config.eval_batch_size, info.num_test, mesh)
    evaluation = measure(lower_evaluation(plan, eval_batch_size).compile(), mesh.size, eval_batch_size)

    examples = plan.example_bytes
    needed = training.arguments + examples + max(training.temporaries, evaluation.temporaries)
    storage = {"features": ", as cached features", "stream": ", two batches", "memory": ""}
    device = mesh.devices.flat[0]
    available, origin = sharding.device_memory(device)
    print(f"""
training, per image    {training}
evaluation, per image  {evaluation}
memory per device      {_gib(needed)} of {_gib(available)} ({origin}); {mesh.size} × {device.device_kind}
  training state       {_gib(training.arguments - bytes_per_device(plan.abstract_batch))}
  images               {_gib(examples)}{storage[plan.storage]}
  temporaries          {_gib(training.temporaries)} to train, {_gib(evaluation.temporaries)} to evaluate
estimated by the compiler for {device.platform}, jax {jax.__version__}; other backends need other temporaries""")
    if needed > available:
        raise UserError(
            f"the run needs {_gib(needed)} per device, of {_gib(available)}; raise accumulation_steps (now "
            f"{config.accumulation_steps}), set remat to 'full' (now {config.remat!r}), shard the parameters over "
            f"devices with mesh.fsdp (now {config.mesh.fsdp}), or lower eval_batch_size (now {config.eval_batch_size})"
        )


def measure(compiled: jax.stages.Compiled, num_devices: int, num_images: int) -> Cost:
    """Returns the cost of a compiled function.

    The compiler counts one device and each loop body once; `num_images` are processed by one loop body.
    """
    cost: Any = compiled.cost_analysis()
    arguments, temporaries = memory_of(compiled)
    per_image = num_devices / num_images
    return Cost(
        flops=cost["flops"] * per_image,
        bytes_moved=cost["bytes accessed"] * per_image,
        arguments=arguments,
        temporaries=temporaries,
    )


def lower_evaluation(plan: Plan, batch_size: int) -> jax.stages.Lowered:
    """Lowers the evaluation of a batch of images by the full model."""
    mesh = plan.mesh
    evaluated_params = functools.partial(steps.evaluated_params, lora_alpha=plan.config.lora.alpha)
    params = jax.eval_shape(evaluated_params, plan.abstract_state)
    batch = Batch.abstract(jax.ShapeDtypeStruct((batch_size, *plan.dataset_info.image_shape), jnp.uint8))
    eval_step = jax.jit(Inference(plan.image_forward, mesh, batch_size=batch_size).eval_step)
    return eval_step.lower(
        sharding.with_sharding(params, sharding.param_shardings(params, mesh)),
        sharding.with_sharding(batch, sharding.batch_sharding(mesh)),
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
