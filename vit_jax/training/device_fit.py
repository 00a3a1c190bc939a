"""Choices that depend on the device: dtype, implementation of attention, and microbatches that fit its memory."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vit_jax.models import VisionTransformer, attention
from vit_jax.runtime import distributed, sharding
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.training.plan import Plan, bytes_per_device, memory_of

_TOLERANCE = 0.02  # relative error of cuDNN's attention and its gradients, in the Euclidean norm
_MAX_TRIAL = 64  # images; XLA's attention stores all weights of the trial
_USABLE = 0.85  # fraction of a device's memory; the rest is for fragmentation, and on a CPU for the host's copies


def auto_dtype(device: jax.Device) -> str:
    """Returns "bfloat16" for a TPU or a GPU of compute capability 8.0 or higher, "float32" for others.

    Older GPUs, such as the T4 (7.5), have no bfloat16 units, and CPUs compute faster in float32.
    """
    return "bfloat16" if device.platform == "tpu" or _is_ampere_or_later(device) else "float32"


def can_use_cudnn(device: jax.Device, dtype: DTypeLike) -> bool:
    """Returns True if cuDNN's attention may work: it is for GPUs of compute capability 8.0 and 16-bit dtypes."""
    return _is_ampere_or_later(device) and jnp.dtype(dtype).itemsize == 2


def _is_ampere_or_later(device: jax.Device) -> bool:
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform == "gpu" and major.isdecimal() and int(major) >= 8


def find_attention(
    requested: str, model: VisionTransformer, device: jax.Device, *, image_size: int, batch_size: int
) -> str:
    """Returns the attention for a device and images per device, "xla" or "cudnn"; runs the trial for "auto"."""
    if not can_use_cudnn(device, model.dtype):
        if requested == "cudnn":
            print("attention: xla (cudnn needs a GPU of compute capability 8.0 or higher, and bfloat16)")
        return "xla"
    if requested != "auto":
        return requested
    if model.attention_dropout_rate:
        return "xla"  # cuDNN's has no dropout of the attention weights here
    num_tokens = (image_size // model.pixels_per_patch) ** 2 + (model.pool == "cls")
    batch_size = max(1, min(batch_size, _MAX_TRIAL))
    return choose_attention((batch_size, num_tokens, model.num_heads, model.hidden_size // model.num_heads))


@functools.cache
def choose_attention(shape: tuple[int, int, int, int]) -> str:
    """Returns the faster attention in bfloat16, "xla" or "cudnn", and prints it; runs both once per shape [b n k c].

    It is "xla" if cuDNN's fails or deviates by more than `_TOLERANCE`, also if it does so only in another process; a
    collective call.
    """
    try:
        seconds, expected = time_attention(attention.xla_attention, shape)
        cudnn_seconds, found = time_attention(
            functools.partial(attention.padded_attention, implementation="cudnn"), shape
        )
        deviation = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True))
        measured = f"xla {1e3 * seconds:.2f} ms, cudnn {1e3 * cudnn_seconds:.2f} ms, deviation {deviation:.4f}"
        choice = "cudnn" if deviation <= _TOLERANCE and cudnn_seconds < seconds else "xla"
    except Exception as error:  # whatever a version of cuDNN may raise: the trial must not end the run
        choice, measured = "xla", f"the trial of cudnn failed: {one_line(error)[:200]}"
    if set(distributed.gather_strings(choice)) != {choice}:
        choice, measured = "xla", "cudnn is slower, fails or deviates in another process"
    print(f"attention: {choice} ({measured})")
    return choice


def time_attention(
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], shape: tuple[int, ...]
) -> tuple[float, list[np.ndarray]]:
    """Returns the seconds of attention and its gradients in bfloat16, the best of 10, and these in float32.

    The scores of the random inputs are negative, so that a padded token, whose score is 0, would change the output.
    """

    @jax.jit
    def run(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> list[jax.Array]:
        output, vjp = jax.vjp(attend, query, key, value)
        return [output, *vjp(cotangent)]

    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    query, key, value, cotangent = (jax.random.normal(each, shape, jnp.bfloat16) for each in keys)
    inputs = abs(query), -abs(key), value, cotangent
    outputs = jax.block_until_ready(run(*inputs))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        times.append(time.perf_counter() - started)
    return min(times), [np.asarray(output, np.float32) for output in outputs]


def fit_accumulation(plan: Plan) -> Plan:
    """Returns the plan with the smallest accumulation_steps whose compiled training step fits the devices' memory.

    Raises:
        UserError: even microbatches of one image per device do not fit.
    """
    batch_size, config = plan.train_step.batch_size, plan.config.copy_and_resolve_references()
    available, origin = sharding.device_memory(jax.local_devices()[0])
    usable = -distributed.process_max(-int(_USABLE * available / 2**20)) * 2**20  # the same in all processes
    plans: dict[int, Plan] = {}

    def measure(number: int) -> float:
        step = dataclasses.replace(plan, train_step=dataclasses.replace(plan.train_step, accumulation_steps=number))
        try:
            compiled = step.compile_train_step()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"microbatches of {batch_size // number}: out of memory")  # XLA for TPUs finds out while it compiles
            return math.inf
        plans[number] = dataclasses.replace(step, compiled=compiled)
        needed = sum(memory_of(compiled)) + plan.example_bytes
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

    `measure` compiles the step, or returns infinity if it cannot, so it is called as rarely as possible: `fixed` bytes
    are expected not to depend on the number, the rest to be inversely proportional to it, and two or more microbatches
    to need `added` bytes more.
    """
    measured: dict[int, float] = {}

    def predict(number: int) -> float:
        points = {1 / n: needed - added * (n > 1) for n, needed in measured.items() if needed < math.inf}
        if not points:
            return fixed
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
