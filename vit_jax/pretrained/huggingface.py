"""Converts a Vision Transformer from and to Hugging Face's `ViTForImageClassification`: names, axes, config."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.models.common import num_input_axes
from vit_jax.pretrained.metadata import ModelMetadata, load_metadata, save_metadata
from vit_jax.pretrained.sizes import POSITION_KEY, differences, parameter_shapes, shapes_of
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.types import CENTER_FRACTION, FlatParams, Params

_LAYERS = {  # vit_jax -> Hugging Face, in a block
    "LayerNorm_0": "layernorm_before",
    "MultiHeadDotProductAttention_1/query": "attention.attention.query",
    "MultiHeadDotProductAttention_1/key": "attention.attention.key",
    "MultiHeadDotProductAttention_1/value": "attention.attention.value",
    "MultiHeadDotProductAttention_1/out": "attention.output.dense",
    "LayerNorm_2": "layernorm_after",
    "MlpBlock_3/Dense_0": "intermediate.dense",
    "MlpBlock_3/Dense_1": "output.dense",
}
_OTHERS = {  # vit_jax -> Hugging Face, outside the blocks
    "cls": "vit.embeddings.cls_token",
    POSITION_KEY: "vit.embeddings.position_embeddings",
    "embedding": "vit.embeddings.patch_embeddings.projection",
    "Transformer/encoder_norm": "vit.layernorm",
    "head": "classifier",
}
_ARGUMENTS = {  # vit_jax -> Hugging Face
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
}
_ACTIVATIONS = {"gelu": False, "gelu_pytorch_tanh": True, "gelu_new": True}  # Hugging Face -> `gelu_approximate`


def save_huggingface(directory: Path, params: Params, metadata: ModelMetadata) -> None:
    """Saves the files that `ViTForImageClassification.from_pretrained` and `load_huggingface` read."""
    from safetensors.numpy import save

    odd = [f"parameters {name}" for name in ("pre_logits", "conv_root", "MAPHead_0", "resnet") if name in params]
    odd += [] if "cls" in params else ["no class token"]
    if odd:
        raise UserError(f"the model has {odd[0]}, unlike any ViTForImageClassification; give another --format")
    config, preprocessor = _configs(metadata)
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _to_huggingface(jax.device_get(params)).items()}
    (directory / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    save_metadata(directory, metadata, params)


def _to_huggingface(params: Params) -> FlatParams:
    """Converts parameters to the tensors of a `ViTForImageClassification`."""
    tensors = {}
    for key, leaf in flatten_dict(params, sep="/").items():
        if key == "embedding/kernel":
            leaf = leaf.transpose(3, 2, 0, 1)  # [p p c d] -> [d c p p]
        elif key.endswith("/kernel"):
            leaf = leaf.reshape(math.prod(leaf.shape[: num_input_axes(key, leaf.ndim)]), -1).T  # [outputs inputs]
        elif key.endswith("/bias"):
            leaf = leaf.reshape(-1)
        tensors[_their_name(key)] = leaf
    return tensors


def _configs(metadata: ModelMetadata) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `config.json` and `preprocessor_config.json` of a model."""
    model, size = metadata.model, metadata.image_size
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        **{theirs: model[ours] for ours, theirs in _ARGUMENTS.items()},
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
    square = {"height": size, "width": size}
    resizes: dict[str, dict[str, Any]] = {
        "squash": {"image_processor_type": "ViTImageProcessor", "size": square},
        "center_crop": {
            "image_processor_type": "BitImageProcessor",  # unlike ViTImageProcessor, it crops
            "size": {"shortest_edge": round(size / CENTER_FRACTION)},
            "do_center_crop": True,
            "crop_size": square,
            "do_convert_rgb": True,
        },
    }
    preprocessor = {
        **resizes[metadata.test_resize],
        "do_resize": True,
        "resample": 2,  # PIL's bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(metadata.image_mean),
        "image_std": list(metadata.image_std),
    }
    return config, preprocessor


def load_huggingface(directory: Path) -> tuple[Params, ModelMetadata]:
    """Loads a `ViTForImageClassification`, or a `ViTModel` with a zero head; needs neither torch nor transformers.

    The directory has config.json, model.safetensors and, unless images are in [-1, 1], preprocessor_config.json.
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
    own = load_metadata(directory, params)  # of an export: only it has the dtype of the computation
    return params, dataclasses.replace(metadata, dtype=own.dtype) if own else metadata


def _metadata(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelMetadata:
    """Converts the two JSON files of Hugging Face to metadata."""
    supported = {"model_type": ("vit",), "hidden_act": tuple(_ACTIVATIONS), "qkv_bias": (True,), "num_channels": (3,)}
    for key, values in supported.items():
        if config.get(key, values[0]) not in values:  # configs of old versions lack some
            raise ValueError(f"{key} of config.json is {config[key]!r}; expected one of {values}")
    names = config.get("id2label") or {"0": "0", "1": "1"}  # omitted for two classes without names
    model = {ours: config[theirs] for ours, theirs in _ARGUMENTS.items()}
    value = {
        "architecture": "vit",
        "model": {
            **model,
            "gelu_approximate": _ACTIVATIONS[config.get("hidden_act", "gelu")],
            "num_classes": len(names),
        },
        "image_size": config["image_size"],
        "class_names": [names[key] for key in sorted(names, key=int)],
    }
    normalization = {key: preprocessor[key] for key in ("image_mean", "image_std") if key in preprocessor}
    resize = "center_crop" if preprocessor.get("do_center_crop") else "squash"
    return ModelMetadata.from_json({**value, **normalization, "test_resize": resize})


def _from_huggingface(tensors: FlatParams, metadata: ModelMetadata) -> Params:
    """Converts the tensors of a `ViTForImageClassification` to parameters."""
    shapes = parameter_shapes(metadata.create_model(), (metadata.image_size // metadata.model["patch_size"]) ** 2)
    ours = unflatten_dict({key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}, sep="/")
    expected = shapes_of(jax.eval_shape(_to_huggingface, ours))
    tensors = {name if name.startswith(("vit.", "classifier.")) else f"vit.{name}": t for name, t in tensors.items()}
    if "classifier.weight" not in tensors:
        tensors |= {name: np.zeros(expected[name]) for name in ("classifier.weight", "classifier.bias")}
    unused = ("vit.pooler.", "vit.embeddings.mask_token")
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(unused)}
    if wrong := differences(found, expected):
        raise ValueError(f"model.safetensors is not of the model in config.json: {wrong}")
    flat = {}
    for key, shape in shapes.items():
        tensor = tensors[_their_name(key)]
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T if tensor.ndim == 2 else tensor
        flat[key] = np.ascontiguousarray(tensor, np.float32).reshape(shape)
    params: Params = unflatten_dict(flat, sep="/")
    return params


def _their_name(key: str) -> str:
    """Returns Hugging Face's name of a parameter."""
    if key in _OTHERS:
        return _OTHERS[key]
    layer, _, leaf = key.rpartition("/")
    leaf = "bias" if leaf == "bias" else "weight"
    if layer in _OTHERS:
        return f"{_OTHERS[layer]}.{leaf}"
    _, block, layer = layer.split("/", maxsplit=2)
    return f"vit.encoder.layer.{block.removeprefix('encoderblock_')}.{_LAYERS[layer]}.{leaf}"
