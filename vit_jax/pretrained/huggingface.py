"""A Vision Transformer in the layout of Hugging Face's `ViTForImageClassification`, and back: names, axes, config."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.pretrained.infer import POSITION_KEY, differences, expected_shapes
from vit_jax.pretrained.metadata import ModelMetadata
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.types import Params

_LAYERS = {  # in a block, ours -> theirs
    "LayerNorm_0": "layernorm_before",
    "MultiHeadDotProductAttention_1/query": "attention.attention.query",
    "MultiHeadDotProductAttention_1/key": "attention.attention.key",
    "MultiHeadDotProductAttention_1/value": "attention.attention.value",
    "MultiHeadDotProductAttention_1/out": "attention.output.dense",
    "LayerNorm_2": "layernorm_after",
    "MlpBlock_3/Dense_0": "intermediate.dense",
    "MlpBlock_3/Dense_1": "output.dense",
}
_OTHERS = {
    "cls": "vit.embeddings.cls_token",
    POSITION_KEY: "vit.embeddings.position_embeddings",
    "embedding": "vit.embeddings.patch_embeddings.projection",
    "Transformer/encoder_norm": "vit.layernorm",
    "head": "classifier",
}


def to_huggingface(params: Params) -> dict[str, np.ndarray]:
    """Parameters of a `VisionTransformer` without `pre_logits` as the tensors of a `ViTForImageClassification`.

    Raises:
        UserError: there is a layer `pre_logits`, a ResNet before the patches, or no class token: that model has no
            place for them.
    """
    if "pre_logits" in params:
        raise UserError("a ViTForImageClassification has no place for the layer pre_logits; fine-tune without it first")
    odd = "a ResNet before the patches" if "conv_root" in params else "" if "cls" in params else "no class token"
    if odd:
        raise UserError(f"this model has {odd}, which a ViTForImageClassification cannot have; take another --format")
    tensors = {}
    for key, leaf in flatten_dict(params, sep="/").items():
        array = np.asarray(leaf)
        if key == "embedding/kernel":  # [p p c d] -> [d c p p]
            array = array.transpose(3, 2, 0, 1)
        elif key.endswith("/kernel"):  # [inputs… outputs…] -> [outputs inputs]
            inputs = math.prod(array.shape[: _num_input_axes(key)])
            array = array.reshape(inputs, -1).T
        elif key.endswith("/bias"):
            array = array.reshape(-1)
        tensors[_their_name(key)] = np.ascontiguousarray(array)
    return tensors


def huggingface_config(metadata: ModelMetadata) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` and `preprocessor_config.json` of a model, from its metadata."""
    model, names = metadata.model, metadata.class_names
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model["hidden_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "intermediate_size": model["mlp_dim"],
        "hidden_act": "gelu_pytorch_tanh" if model["gelu_approximate"] else "gelu",
        "hidden_dropout_prob": model["dropout_rate"],
        "attention_probs_dropout_prob": model["attention_dropout_rate"],
        "layer_norm_eps": model["layer_norm_epsilon"],
        "image_size": metadata.image_size,
        "patch_size": model["patch_size"],
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "torch_dtype": "float32",
    }
    size = {"height": metadata.image_size, "width": metadata.image_size}
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": 2,  # PIL's bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(metadata.image_mean),
        "image_std": list(metadata.image_std),
    }
    return config, preprocessor


def load_huggingface(folder: Path) -> tuple[Params, ModelMetadata]:
    """Reads the folder of a `ViTForImageClassification` or `ViTModel`; neither torch nor transformers is needed.

    Args:
        folder: holds config.json and model.safetensors; preprocessor_config.json where pictures are not from -1 to 1.

    Returns:
        (params, metadata): of a `VisionTransformer`, with a head of zeros where the folder has none.

    Raises:
        UserError: files are missing or damaged, or this is another model.
    """
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "vit":
        raise UserError(f"{folder} holds a model of type {config.get('model_type')!r}; expected 'vit'")
    tensors = _read_tensors(folder / "model.safetensors")
    try:
        value = _describe(config, _read_json(folder / "preprocessor_config.json", default={}))
        # Parameters are float32 always; `export` writes the dtype of the computation beside their two files.
        value["dtype"] = _read_json(folder / "about.json", default={}).get("dtype", "float32")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}/config.json does not describe a ViT ({one_line(error)}); download it again"
        ) from error
    metadata = ModelMetadata.from_json(value)
    model = metadata.model
    shapes = expected_shapes(
        **{name: model[name] for name in ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")},
        representation_size=None,
        num_classes=model["num_classes"],
        num_tokens=1 + (metadata.image_size // model["patch_size"]) ** 2,
    )
    tensors = {name if name.startswith(("vit.", "classifier.")) else f"vit.{name}": t for name, t in tensors.items()}
    if "classifier.weight" not in tensors:
        tensors["classifier.weight"] = np.zeros((model["num_classes"], model["hidden_size"]), np.float32)
        tensors["classifier.bias"] = np.zeros(model["num_classes"], np.float32)
    unused = ("vit.pooler.", "vit.embeddings.mask_token")
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(unused)}
    expected = {_their_name(key): _their_shape(key, shape) for key, shape in shapes.items()}
    if found != expected:
        raise UserError(
            f"{folder}/model.safetensors is not of the model in config.json: {differences(found, expected)}"
        )
    flat = {key: _from_theirs(key, tensors[_their_name(key)], shape) for key, shape in shapes.items()}
    return unflatten_dict(flat, sep="/"), metadata


def _describe(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Returns their two files as the JSON of `ModelMetadata`."""
    acts = {"gelu": False, "gelu_pytorch_tanh": True, "gelu_new": True}
    if config.get("hidden_act", "gelu") not in acts:
        raise ValueError(f"hidden_act {config['hidden_act']!r} is none of {', '.join(acts)}")
    if not config.get("qkv_bias", True) or config.get("num_channels", 3) != 3:
        raise ValueError("expected qkv_bias and 3 channels")
    names = config.get("id2label") or {"0": "0", "1": "1"}
    return {
        "architecture": "vit",
        "model": {
            "patch_size": config.get("patch_size", 16),
            "hidden_size": config.get("hidden_size", 768),
            "num_layers": config.get("num_hidden_layers", 12),
            "num_heads": config.get("num_attention_heads", 12),
            "mlp_dim": config.get("intermediate_size", 3072),
            "gelu_approximate": acts[config.get("hidden_act", "gelu")],
            "layer_norm_epsilon": config.get("layer_norm_eps", 1e-12),
            "num_classes": len(names),
        },
        "image_size": config.get("image_size", 224),
        "image_mean": preprocessor.get("image_mean", [0.5] * 3),
        "image_std": preprocessor.get("image_std", [0.5] * 3),
        "class_names": [names[key] for key in sorted(names, key=int)],
    }


def _read_json(path: Path, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object; download it again")
    return value


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); download it again") from error


def _their_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of our leaf -> that of their tensor."""
    if key == "embedding/kernel":
        return shape[3], shape[2], shape[0], shape[1]
    if key.endswith("/kernel"):
        inputs = _num_input_axes(key)
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return (math.prod(shape),) if key.endswith("/bias") else shape


def _from_theirs(key: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Their tensor as our leaf."""
    if key == "embedding/kernel":
        tensor = tensor.transpose(2, 3, 1, 0)
    elif key.endswith("/kernel"):
        tensor = tensor.T
    return np.ascontiguousarray(tensor, np.float32).reshape(shape)


def _num_input_axes(key: str) -> int:
    """How many leading axes of a kernel are inputs: the attention's last layer takes heads and their width."""
    return 2 if key.endswith("/out/kernel") else 1


def _their_name(key: str) -> str:
    """Our key -> the name of their tensor."""
    if key in _OTHERS:
        return _OTHERS[key]
    layer, _, leaf = key.rpartition("/")
    leaf = "bias" if leaf == "bias" else "weight"
    if layer in _OTHERS:
        return f"{_OTHERS[layer]}.{leaf}"
    _, block, layer = layer.split("/", maxsplit=2)
    return f"vit.encoder.layer.{block.removeprefix('encoderblock_')}.{_LAYERS[layer]}.{leaf}"
