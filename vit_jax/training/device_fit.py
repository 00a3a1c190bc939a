"""Choices that depend on the device: the dtype of the computation, and microbatches that fit its memory."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vit_jax.runtime import distributed, sharding
from vit_jax.runtime.errors import UserError
from vit_jax.training.plan import Plan, bytes_per_device, memory_of

_USABLE = 0.85  # fraction of a device's memory; the rest is for fragmentation, and on a CPU for the host's copies


def auto_dtype(device: jax.Device) -> str:
    """Returns "bfloat16" for a TPU or a GPU of compute capability 8.0 or higher, "float32" for others.

    Older GPUs, such as the T4 (7.5), have no bfloat16 units, and CPUs compute faster in float32.
    """
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    has_bfloat16 = device.platform == "tpu" or (major.isdecimal() and int(major) >= 8)
    return "bfloat16" if has_bfloat16 else "float32"


def fit_accumulation(plan: Plan) -> Plan:
    """Returns the plan with the smallest accumulation_steps whose compiled training step fits the devices' memory.

    Raises:
        UserError: even microbatches of one image per device do not fit.
    """
    batch_size, config = plan.train_step.batch_size, plan.config.copy_and_resolve_references()
    available, origin = sharding.device_memory(jax.local_devices()[0])
    usable = -distributed.process_max(-int(_USABLE * available / 2**20)) * 2**20  # the same in all processes
    plans: dict[int, Plan] = {}

    def measure(number: int) -> int:
        step = dataclasses.replace(plan, train_step=dataclasses.replace(plan.train_step, accumulation_steps=number))
        plans[number] = dataclasses.replace(step, compiled=step.compile_train_step())
        needed = sum(memory_of(plans[number].compile_train_step())) + plan.example_bytes
        gib, usable_gib = needed / 2**30, usable / 2**30
        print(f"microbatches of {batch_size // number}: {gib:,.2f} GiB per device, {usable_gib:,.2f} GiB usable")
        return needed

    per_device = batch_size // plan.mesh.size
    divisors = [number for number in range(1, per_device + 1) if per_device % number == 0]
    fixed = bytes_per_device(plan.abstract_state) + plan.example_bytes
    gradients = bytes_per_device(plan.abstract_state.trainable)
    number = smallest_fitting(divisors, measure, limit=usable, fixed=fixed, added=gradients)
    if number is None:
        raise UserError(
            f"the training step needs more than {_USABLE:.0%} of {available / 2**30:,.2f} GiB ({origin}) with any "
            f"accumulation_steps; set remat to 'full' (now {config.remat!r}), shard the parameters over devices with "
            f"mesh.fsdp (now {config.mesh.fsdp}), or set accumulation_steps (now 0) to {per_device} to try all the same"
        )
    config.accumulation_steps = number
    print(f"accumulation_steps: {number}")
    return dataclasses.replace(plans[number], config=config)


def smallest_fitting(
    divisors: Sequence[int], measure: Callable[[int], float], *, limit: float, fixed: float, added: float
) -> int | None:
    """Returns the smallest number of microbatches that needs at most `limit` bytes; None if the largest needs more.

    `measure` compiles the step, so it is called as rarely as possible: `fixed` bytes are expected not to depend on the
    number, the rest to be inversely proportional to it, and two or more microbatches to need `added` bytes more.
    """
    measured: dict[int, float] = {}

    def predict(number: int) -> float:
        points = {1 / n: needed - added * (n > 1) for n, needed in measured.items()}
        if len(points) == 1:
            points[0] = fixed
        slope, offset = np.polyfit(list(points), list(points.values()), 1)
        return float(offset + slope / number + added * (number > 1))

    candidates = [1]
    while candidates:
        measured[candidates[0]] = measure(candidates[0])
        too_small = max((n for n, needed in measured.items() if needed > limit), default=0)
        smallest = min((n for n, needed in measured.items() if needed <= limit), default=None)
        between = [n for n in divisors if too_small < n < (smallest or divisors[-1] + 1)]
        candidates = [n for n in between if predict(n) <= limit]
        if not candidates and smallest is None:
            candidates = between[-1:]
    return smallest
