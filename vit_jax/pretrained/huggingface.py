"""Converts a Vision Transformer from and to Hugging Face's `ViTForImageClassification`: names, axes, config."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.models.common import num_input_axes
from vit_jax.pretrained.infer import POSITION_KEY, Shape, differences, parameter_shapes
from vit_jax.pretrained.metadata import ModelMetadata, load_metadata, save_metadata
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.types import FlatParams, Params

_LAYERS = {  # ours -> theirs, in a block
    "LayerNorm_0": "layernorm_before",
    "MultiHeadDotProductAttention_1/query": "attention.attention.query",
    "MultiHeadDotProductAttention_1/key": "attention.attention.key",
    "MultiHeadDotProductAttention_1/value": "attention.attention.value",
    "MultiHeadDotProductAttention_1/out": "attention.output.dense",
    "LayerNorm_2": "layernorm_after",
    "MlpBlock_3/Dense_0": "intermediate.dense",
    "MlpBlock_3/Dense_1": "output.dense",
}
_OTHERS = {  # ours -> theirs, outside the blocks
    "cls": "vit.embeddings.cls_token",
    POSITION_KEY: "vit.embeddings.position_embeddings",
    "embedding": "vit.embeddings.patch_embeddings.projection",
    "Transformer/encoder_norm": "vit.layernorm",
    "head": "classifier",
}
_ARGUMENTS: dict[str, tuple[str, int | float]] = {  # ours -> (theirs, their default)
    "patch_size": ("patch_size", 16),
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "layer_norm_epsilon": ("layer_norm_eps", 1e-12),
}
_ACTIVATIONS = {"gelu": False, "gelu_pytorch_tanh": True, "gelu_new": True}
"""Theirs -> `gelu_approximate`."""


def save_huggingface(directory: Path, params: Params, metadata: ModelMetadata) -> None:
    """Writes the files that `ViTForImageClassification.from_pretrained` and `load_huggingface` read.

    Raises:
        UserError: the model has parts that a `ViTForImageClassification` does not have.
    """
    from safetensors.numpy import save

    config, preprocessor = huggingface_config(metadata)
    tensors = save(to_huggingface(params), metadata={"format": "pt"})
    (directory / "model.safetensors").write_bytes(tensors)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    save_metadata(directory, metadata, params)


def to_huggingface(params: Params) -> FlatParams:
    """Returns the tensors of a `ViTForImageClassification`.

    Raises:
        UserError: the model has parts that it does not have: `pre_logits`, a ResNet, or pooling without a class token.
    """
    odd = [name for name in ("pre_logits", "conv_root", "MAPHead_0", "resnet") if name in params]
    if odd or "cls" not in params:
        part = f"parameters {odd[0]}" if odd else "no class token"
        raise UserError(f"the model has {part}, which a ViTForImageClassification cannot have; take another --format")
    tensors = {}
    for key, leaf in flatten_dict(params, sep="/").items():
        array = np.asarray(leaf)
        array = array.transpose(3, 2, 0, 1) if key == "embedding/kernel" else array  # [p p c d] -> [d c p p]
        if key.endswith("/kernel") and key != "embedding/kernel":  # [inputs… outputs…] -> [outputs inputs]
            array = array.reshape(math.prod(array.shape[: num_input_axes(key, array.ndim)]), -1).T
        tensors[_their_name(key)] = np.ascontiguousarray(array.reshape(_their_shape(key, np.shape(leaf))))
    return tensors


def huggingface_config(metadata: ModelMetadata) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `config.json` and `preprocessor_config.json` of a model."""
    model, size = metadata.model, metadata.image_size
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        **{theirs: model[ours] for ours, (theirs, _) in _ARGUMENTS.items()},
        "hidden_act": "gelu_pytorch_tanh" if model["gelu_approximate"] else "gelu",
        "hidden_dropout_prob": model["dropout_rate"],
        "attention_probs_dropout_prob": model["attention_dropout_rate"],
        "image_size": size,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(i): name for i, name in enumerate(metadata.class_names)},
        "label2id": {name: i for i, name in enumerate(metadata.class_names)},
        "torch_dtype": "float32",
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,  # PIL's bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(metadata.image_mean),
        "image_std": list(metadata.image_std),
    }
    return config, preprocessor


def load_huggingface(directory: Path) -> tuple[Params, ModelMetadata]:
    """Loads a `ViTForImageClassification` or `ViTModel`; needs neither torch nor transformers.

    Args:
        directory: has config.json, model.safetensors and, unless images are in [-1, 1], preprocessor_config.json.

    Returns:
        (params, metadata): of a `VisionTransformer`; the head is zero if the directory has none.

    Raises:
        UserError: files are missing or damaged, or are those of another model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        preprocessor = directory / "preprocessor_config.json"
        metadata = _metadata(
            json.loads((directory / "config.json").read_text()),
            json.loads(preprocessor.read_text()) if preprocessor.exists() else {},
        )
        params = _from_huggingface(load_file(directory / "model.safetensors"), metadata)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory} is not a complete ViTForImageClassification: {one_line(error)}") from error
    own = load_metadata(directory, params)  # of an export: the other files do not tell the dtype of the computation
    return params, dataclasses.replace(metadata, dtype=own.dtype) if own else metadata


def _metadata(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelMetadata:
    """Returns the metadata in the two JSON files of Hugging Face."""
    activation = config.get("hidden_act", "gelu")
    supported = {
        "model_type": config.get("model_type") == "vit",
        "hidden_act": activation in _ACTIVATIONS,
        "qkv_bias": config.get("qkv_bias", True),
        "num_channels": config.get("num_channels", 3) == 3,
    }
    for key, holds in supported.items():
        if not holds:
            raise ValueError(f"{key} of config.json is {config.get(key)!r}")
    names = config.get("id2label") or {"0": "0", "1": "1"}
    model = {ours: config.get(theirs, default) for ours, (theirs, default) in _ARGUMENTS.items()}
    value = {
        "architecture": "vit",
        "model": {**model, "gelu_approximate": _ACTIVATIONS[activation], "num_classes": len(names)},
        "image_size": config.get("image_size", 224),
        "class_names": [names[key] for key in sorted(names, key=int)],
    }
    normalization = {key: preprocessor[key] for key in ("image_mean", "image_std") if key in preprocessor}
    return ModelMetadata.from_json({**value, **normalization})


def _from_huggingface(tensors: FlatParams, metadata: ModelMetadata) -> Params:
    """Returns our parameters for their tensors."""
    shapes = parameter_shapes(metadata.create_model(), (metadata.image_size // metadata.model["patch_size"]) ** 2)
    tensors = {name if name.startswith(("vit.", "classifier.")) else f"vit.{name}": t for name, t in tensors.items()}
    if "classifier.weight" not in tensors:
        tensors |= {_their_name(key): np.zeros(_their_shape(key, shapes[key])) for key in ("head/kernel", "head/bias")}
    unused = ("vit.pooler.", "vit.embeddings.mask_token")
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(unused)}
    if wrong := differences(found, {_their_name(key): _their_shape(key, shape) for key, shape in shapes.items()}):
        raise ValueError(f"model.safetensors is not of the model in config.json: {wrong}")
    flat = {}
    for key, shape in shapes.items():
        tensor = tensors[_their_name(key)]
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T if tensor.ndim == 2 else tensor
        flat[key] = np.ascontiguousarray(tensor, np.float32).reshape(shape)
    params: Params = unflatten_dict(flat, sep="/")
    return params


def _their_shape(key: str, shape: Shape) -> Shape:
    """Returns the shape of their tensor for one of our leaves."""
    if key == "embedding/kernel":
        return shape[3], shape[2], shape[0], shape[1]
    if key.endswith("/kernel"):
        inputs = num_input_axes(key, len(shape))
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return (math.prod(shape),) if key.endswith("/bias") else shape


def _their_name(key: str) -> str:
    """Returns the name of their tensor for one of our keys."""
    if key in _OTHERS:
        return _OTHERS[key]
    layer, _, leaf = key.rpartition("/")
    leaf = "bias" if leaf == "bias" else "weight"
    if layer in _OTHERS:
        return f"{_OTHERS[layer]}.{leaf}"
    _, block, layer = layer.split("/", maxsplit=2)
    return f"vit.encoder.layer.{block.removeprefix('encoderblock_')}.{_LAYERS[layer]}.{leaf}"
