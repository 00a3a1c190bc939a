"""Reference implementation: shapes of the BiT checkpoints, and the forward pass of ResNet v2 in float64 NumPy.

It imports neither JAX nor the package.
"""

import numpy as np
from flax.traverse_util import unflatten_dict

UNITS, WIDTH = (1, 2), 32


def released_shapes(units=UNITS, width=WIDTH, num_classes=7):
    """Returns key -> shape of a pretrained checkpoint."""
    shapes = {"resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, width)}
    channels = width
    for i, num_units in enumerate(units):
        middle = width * 2**i
        for j in range(num_units):
            unit = f"resnet/block{i + 1}/unit{j + 1:02}"
            for name, size, inputs, outputs in (
                ("a", 1, channels, middle),
                ("b", 3, middle, middle),
                ("c", 1, middle, 4 * middle),
            ):
                shapes[f"{unit}/{name}/standardized_conv2d/kernel"] = (size, size, inputs, outputs)
                shapes[f"{unit}/{name}/group_norm/gamma"] = shapes[f"{unit}/{name}/group_norm/beta"] = (inputs,)
            if j == 0:
                shapes[f"{unit}/a/proj/standardized_conv2d/kernel"] = (1, 1, channels, 4 * middle)
            channels = 4 * middle
    shapes["resnet/group_norm/gamma"] = shapes["resnet/group_norm/beta"] = (channels,)
    shapes["resnet/head/conv2d/kernel"] = (1, 1, channels, num_classes)
    shapes["resnet/head/conv2d/bias"] = (num_classes,)
    return shapes


def flat_params(**sizes):
    """Returns key -> random array, with the keys of a pretrained checkpoint."""
    rng = np.random.default_rng(0)
    return {key: rng.normal(0.3, 0.5, shape).astype(np.float32) for key, shape in released_shapes(**sizes).items()}


def released_params(**sizes):
    return unflatten_dict(flat_params(**sizes), sep="/")


def forward(params, images):
    """Returns logits [b classes] of images [b h w 3], in float64; `params` has the keys of the checkpoint."""
    tree = params["resnet"]
    x = max_pool(conv(np.asarray(images, np.float64), tree["root_block"], stride=2))
    for name in sorted(key for key in tree if key.startswith("block")):
        for unit_name, unit in sorted(tree[name].items()):
            stride = 2 if unit_name == "unit01" and name != "block1" else 1
            active = norm_relu(x, unit["a"]["group_norm"])
            shortcut = conv(active, unit["a"]["proj"], stride) if "proj" in unit["a"] else x
            y = conv(active, unit["a"])
            y = conv(norm_relu(y, unit["b"]["group_norm"]), unit["b"], stride)
            x = conv(norm_relu(y, unit["c"]["group_norm"]), unit["c"]) + shortcut
    features = norm_relu(x, tree["group_norm"]).mean(axis=(1, 2))
    head = tree["head"]["conv2d"]
    return features @ head["kernel"][0, 0].astype(np.float64) + head["bias"]


def conv(x, tree, stride=1):
    """Convolution with a kernel that is standardized per output channel."""
    kernel = np.asarray(tree["standardized_conv2d"]["kernel"], np.float64)
    kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-10)
    pad = kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((length - kernel.shape[0]) // stride + 1 for length in x.shape[1:3])
    return sum(
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns] @ kernel[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )


def norm_relu(x, tree):
    groups = x.reshape(*x.shape[:3], 32, -1)
    mean, var = (f(groups, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    normal = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    return np.maximum(normal * tree["gamma"].astype(np.float64) + tree["beta"].astype(np.float64), 0)


def max_pool(x):
    """Max pooling, 3 × 3, stride 2, after zero padding."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = ((length - 3) // 2 + 1 for length in x.shape[1:3])
    x = np.stack([x[:, 2 * i : 2 * i + 3].max(axis=1) for i in range(rows)], axis=1)
    return np.stack([x[:, :, 2 * j : 2 * j + 3].max(axis=2) for j in range(columns)], axis=2)
