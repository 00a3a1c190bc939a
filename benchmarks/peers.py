"""Worker process of throughput.py: compiles one program of one software, and measures it on request.

Reads JSON objects, one per line, from stdin and answers each with a line on stdout:

    {"peer", "case", "directory"}    the program to build; the answer has the loss of the first step
    {"steps": N}                     runs N steps; the answer has seconds per step
    {"matmul": SIZE}                 multiplies matrices of SIZE²; the answer has FLOP/s
    {"memory": true}                 the answer has the peak in bytes: of the GPU, or of the process

The directory has the inputs of all software: weights.npz, huggingface/, images.npy (uint8) and labels.npy.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import resource
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE, MOMENTUM, CLIP_NORM = 0.01, 0.9, 1.0
LORA_RANK, LORA_ALPHA = 8, 16
NUM_CLASSES = 100
MODES = ("full", "mlp", "lora", "head", "forward")
TORCH_TRAINABLE = {"full": "", "mlp": r"\.mlp\.|^head\.|^classifier\.", "head": r"^head\.|^classifier\."}
TORCH_TRAINABLE["lora"] = rf"\.lora_|{TORCH_TRAINABLE['head']}"
_SECONDS_OF_MATMUL = 0.2


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a measurement; `mode` is what is trained, or "forward"."""

    variant: str  # a key of vit_jax.config.VARIANTS
    image_size: int  # pixels
    batch_size: int
    dtype: str  # "float32" or "bfloat16"
    mode: str

    def __str__(self) -> str:
        """Returns the name of the case in tables."""
        return f"{self.variant} @{self.image_size}, b{self.batch_size}, {self.dtype}, {self.mode}"


class Program(NamedTuple):
    """A compiled step of one software."""

    step: Callable[[], Any]  # starts a training step and returns its loss; or returns logits
    read: Callable[[Any], np.ndarray]  # waits for a result and copies it to the host
    make_matmul: Callable[[int], Callable[[], Any]]  # size -> a function that starts a product and returns a corner
    memory: Callable[[], int]  # peak, bytes
    device: str  # "cpu", or the name of the GPU
    versions: dict[str, str]
    flops: float | None = None  # per step, as XLA counts them before optimization
    compares_loss: bool = True


def load_batch(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 images [b h w 3] and int32 labels [b]."""
    return np.load(directory / "images.npy"), np.load(directory / "labels.npy")


def process_memory() -> int:
    """Returns the largest resident memory of this process, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the parent's peak in ru_maxrss, too
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def jax_program(step: Callable[[], Any], dtype: str, **fields: Any) -> Program:
    """Returns a program with the functions and names that programs in JAX share."""
    import flax
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]

    def make_matmul(size: int) -> Callable[[], Any]:
        a = c = jax.random.normal(jax.random.key(0), (size, size), dtype) / jnp.asarray(size**0.5, dtype)
        multiply = jax.jit(lambda a, c: a @ c)

        def run() -> Any:
            nonlocal c
            c = multiply(a, c)
            return c[:1, :1]

        return run

    def memory() -> int:
        stats = device.memory_stats() or {}
        return int(stats["peak_bytes_in_use"]) if "peak_bytes_in_use" in stats else process_memory()

    return Program(
        step=step,
        read=lambda result: np.asarray(result, np.float32),
        make_matmul=make_matmul,
        memory=memory,
        device="cpu" if device.platform == "cpu" else device.device_kind,
        versions={"jax": jax.__version__, "flax": flax.__version__},
        **fields,
    )


def create_vit_jax(case: Case, directory: Path, augment: str) -> Program:
    """Builds the training step or the inference of this project; `augment` names augmentations inside the step."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import jax

    from configs import base, models
    from vit_jax import pretrained
    from vit_jax.data import DatasetInfo
    from vit_jax.data.batches import Batch
    from vit_jax.runtime import sharding
    from vit_jax.training import experiment
    from vit_jax.training.inference import Inference

    images, labels = load_batch(directory)
    config = base.get_config()
    config.model = models.get_config(case.variant)
    config.model.gelu_approximate = False
    config.update(image_size=case.image_size, batch_size=case.batch_size, dtype=case.dtype)
    config.augment = tuple(augment.split(",")) if augment else "none"
    config.update(features="fresh", schedule="constant", learning_rate=LEARNING_RATE)
    config.trainable = "full" if case.mode == "forward" else case.mode
    config.optimizer.update(name="sgd", momentum=MOMENTUM, clip_norm=CLIP_NORM)
    config.lora.update(rank=LORA_RANK, alpha=float(LORA_ALPHA))
    mesh = sharding.create_mesh(jax.devices()[: int(os.environ.get("JAX_NUM_CPU_DEVICES", "1"))])
    info = DatasetInfo(len(images), 1, images.shape[1:], tuple(map(str, range(NUM_CLASSES))), in_memory=True)
    model = experiment.create_model(config, None, num_classes=NUM_CLASSES)
    plan = experiment.plan_experiment(config, model, mesh, info)
    params = sharding.device_put(pretrained.load_npz(directory / "weights.npz"), sharding.replicated(mesh))
    put = functools.partial(sharding.device_put, shardings=sharding.batch_sharding(mesh))
    batch = Batch(put(images), put(labels), put(np.arange(len(labels), dtype=np.int32)))
    if case.mode == "forward":
        inference = Inference(plan.image_forward, mesh, batch_size=case.batch_size)
        lowered = jax.jit(inference.apply).lower(params, batch)
        apply = lowered.compile()

        def step() -> Any:
            return jax.block_until_ready(apply(params, batch))

    else:
        state = plan.init_state(params)
        lowered = plan.lower()
        train_step = lowered.compile()

        def step() -> Any:
            nonlocal state
            state, metrics = train_step(state, batch)
            return metrics["train/loss"]

    flops = (lowered.cost_analysis() or {}).get("flops")
    return jax_program(step, case.dtype, flops=flops, compares_loss=case.mode == "forward" or not augment)


def create_vision_transformer(case: Case, directory: Path, clone: str) -> Program:
    """Builds a step around the model of a clone of google-research/vision_transformer."""
    sys.path.insert(0, clone)
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
    from flax.traverse_util import unflatten_dict

    if case.dtype != "float32" or case.mode not in ("full", "forward"):
        raise SystemExit("vision_transformer has no dtype but float32, and no mode but full and forward")
    nn.gelu = functools.partial(nn.gelu, approximate=False)
    # The clone's package is called vit_jax, too.
    models: Any = importlib.import_module("vit_jax.models_vit")
    sizes = json.loads((directory / "sizes.json").read_text())
    model = models.VisionTransformer(
        num_classes=NUM_CLASSES,
        patches=types.SimpleNamespace(size=(sizes["patch_size"],) * 2),
        hidden_size=sizes["hidden_size"],
        transformer={key: sizes[key] for key in ("num_layers", "num_heads", "mlp_dim")}
        | {"dropout_rate": 0.0, "attention_dropout_rate": 0.0},
    )
    # Linen counts the submodules of each class.
    renamed = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1"}
    renamed["MlpBlock_3"] = "MlpBlock_0"
    with np.load(directory / "weights.npz") as arrays:
        flat = {re.sub("|".join(renamed), lambda match: renamed[match[0]], key): arrays[key] for key in arrays}
    params = jax.device_put(unflatten_dict(flat, sep="/"))
    images, labels = load_batch(directory)
    inputs, labels = jax.device_put(((images / np.float32(255) - 0.5) / 0.5, labels))
    tx = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))
    state = (params, tx.init(params))

    def loss(params: Any) -> Any:
        logits = model.apply({"params": params}, inputs, train=True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state[0])
        updates, opt_state = tx.update(grads, state[1])
        return (optax.apply_updates(state[0], updates), opt_state), value

    apply = jax.jit(lambda params, inputs: model.apply({"params": params}, inputs, train=False))

    def step() -> Any:
        nonlocal state
        if case.mode == "forward":
            return jax.block_until_ready(apply(params, inputs))
        state, value = train_step(state)
        return value

    return jax_program(step, case.dtype)


def create_torch(case: Case, directory: Path, option: str, *, create_model: Callable[[Path, int], Any]) -> Program:
    """Builds a step in PyTorch, eager or with the option "compile"; `create_model` takes the directory and pixels."""
    import torch

    if option not in ("", "compile"):
        raise SystemExit(f"option {option!r}; expected compile")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case.dtype)
    torch.set_float32_matmul_precision("high")
    images, labels = load_batch(directory)
    inputs = torch.tensor((images.transpose(0, 3, 1, 2) / np.float32(255) - 0.5) / 0.5).to(device)
    targets = torch.tensor(labels, dtype=torch.int64, device=device)
    model = create_model(directory, case.image_size)
    if case.mode == "lora":
        add_lora(model)
    if case.mode != "forward":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(re.search(TORCH_TRAINABLE[case.mode], name)))
    model = model.to(device).train(case.mode != "forward")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)
    apply = torch.compile(model) if option else model
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def logits() -> Any:
        with torch.autocast(device, dtype) if case.dtype == "bfloat16" else contextlib.nullcontext():
            output = apply(inputs)
        return getattr(output, "logits", output).float()

    def step() -> Any:
        if case.mode == "forward":
            with torch.inference_mode():
                output = logits()
            wait()
            return output
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(logits(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        return loss.detach()

    def make_matmul(size: int) -> Callable[[], Any]:
        a = (torch.randn(size, size) / size**0.5).to(device, dtype)
        c = a.clone()

        def run() -> Any:
            nonlocal c
            c = a @ c
            return c[:1, :1]

        return run

    return Program(
        step=step,
        read=lambda result: result.float().cpu().numpy(),
        make_matmul=make_matmul,
        memory=torch.cuda.max_memory_allocated if device == "cuda" else process_memory,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        versions={"torch": torch.__version__},
    )


def create_timm_model(directory: Path, image_size: int) -> Any:
    """Creates timm's VisionTransformer, with the weights."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = json.loads((directory / "sizes.json").read_text())
    model = VisionTransformer(
        img_size=image_size,
        patch_size=sizes["patch_size"],
        embed_dim=sizes["hidden_size"],
        depth=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        mlp_ratio=sizes["mlp_dim"] / sizes["hidden_size"],
        num_classes=NUM_CLASSES,
    )
    model.load_pretrained(str(directory / "weights.npz"))
    return model


def create_transformers_model(directory: Path, image_size: int) -> Any:
    """Creates the ViTForImageClassification of transformers, with the weights."""
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(directory / "huggingface", attn_implementation="sdpa")


def add_lora(model: Any) -> None:
    """Adds LoRA to queries and values, as a path beside the frozen layer, which is the cheapest in PyTorch."""
    from torch import nn

    def add(layer: Any, inputs: Any, y: Any, *, parts: tuple[int, ...]) -> Any:
        width = layer.in_features
        deltas = [LORA_ALPHA / LORA_RANK * b(a(inputs[0])) for a, b in zip(layer.lora_a, layer.lora_b, strict=True)]
        if y.shape[-1] == width:
            return y + deltas[0]
        for part, delta in zip(parts, deltas, strict=True):
            y[..., part * width : (part + 1) * width] += delta  # does not copy the keys
        return y

    for module in list(model.modules()):
        for name, parts in {"qkv": (0, 2), "q_proj": (0,), "v_proj": (0,)}.items():
            if layer := getattr(module, name, None):
                width = layer.in_features
                layer.lora_a = nn.ModuleList(nn.Linear(width, LORA_RANK, bias=False) for _ in parts)
                layer.lora_b = nn.ModuleList(nn.Linear(LORA_RANK, width, bias=False) for _ in parts)
                for b in layer.lora_b:
                    nn.init.zeros_(b.weight)
                layer.register_forward_hook(functools.partial(add, parts=parts))


CREATORS: dict[str, Callable[[Case, Path, str], Program]] = {
    "vit_jax": create_vit_jax,
    "vision_transformer": create_vision_transformer,
    "timm": functools.partial(create_torch, create_model=create_timm_model),
    "transformers": functools.partial(create_torch, create_model=create_transformers_model),
}
"""Name of a software -> builds its program; the third argument is what follows a colon in `--peers`."""


def first_loss(program: Program, labels: np.ndarray) -> float:
    """Runs a step and returns its loss, computed from the logits in a forward pass."""
    result = program.read(program.step())
    if result.ndim == 0:
        return float(result)
    logits = result.astype(np.float64)
    log_sums = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return float(np.mean(log_sums - logits[np.arange(len(labels)), labels]))


def measure_steps(program: Program, num_steps: int) -> float:
    """Returns seconds per step."""
    start = time.perf_counter()
    for _ in range(num_steps):
        result = program.step()
    program.read(result)
    return (time.perf_counter() - start) / num_steps


def measure_matmul(program: Program, run: Callable[[], Any], size: int) -> float:
    """Returns FLOP/s of a matrix product, over a fifth of a second."""
    number, seconds = 1, 0.0
    while seconds < _SECONDS_OF_MATMUL:
        number *= 2
        start = time.perf_counter()
        for _ in range(number):
            corner = run()
        program.read(corner)
        seconds = time.perf_counter() - start
    return 2 * size**3 * number / seconds


def main() -> None:
    """Builds the program, then answers requests until stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    request = json.loads(sys.stdin.readline())
    name, _, option = request["peer"].partition(":")
    directory = Path(request["directory"])
    program = CREATORS[name](Case(**request["case"]), directory, option)
    loss = first_loss(program, load_batch(directory)[1])
    answer: dict[str, object] = {key: getattr(program, key) for key in ("device", "versions", "flops")}
    if name in ("timm", "transformers"):
        program.versions[name] = sys.modules[name].__version__
    answer["loss"] = loss if program.compares_loss else None
    matmuls = functools.cache(program.make_matmul)
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "steps" in request:
            answer = {"seconds": measure_steps(program, request["steps"])}
        elif "matmul" in request:
            answer = {"flops": measure_matmul(program, matmuls(request["matmul"]), request["matmul"])}
        else:
            answer = {"memory": program.memory()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
