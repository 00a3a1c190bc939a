"""Reference implementation: shapes of the pretrained checkpoints, and a ViT in float64 NumPy, written from the paper.

It imports neither JAX nor the package.
"""

import numpy as np
from flax.traverse_util import unflatten_dict

MICRO = {"patch_size": 4, "hidden_size": 6, "num_layers": 3, "num_heads": 2, "mlp_dim": 8}
B_16 = {"patch_size": 16, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}


def released_shapes(
    *,
    patch_size,
    hidden_size,
    num_layers,
    num_heads,
    mlp_dim,
    representation_size,
    num_classes,
    num_tokens,
    pool="cls",
    stem_units=None,
    stem_width=64,
):
    """Returns key -> shape of a pretrained checkpoint, in the order of the file."""
    d, m, heads = hidden_size, mlp_dim, (num_heads, hidden_size // num_heads)
    shapes = {"cls": (1, 1, d)} if pool == "cls" else {}
    channels = 3
    if stem_units is not None:
        shapes |= stem_shapes(stem_units, stem_width)
        channels = stem_width * 2 ** (len(stem_units) + 1) if stem_units else stem_width
    shapes |= {
        "embedding/kernel": (patch_size, patch_size, channels, d),
        "embedding/bias": (d,),
        "Transformer/posembed_input/pos_embedding": (1, num_tokens, d),
    }

    def attention_and_mlp(attention, mlp):
        pairs = [(f"{attention}/{name}", (d,), heads) for name in ("query", "key", "value")]
        pairs += [(f"{attention}/out", heads, (d,)), (f"{mlp}/Dense_0", (d,), (m,)), (f"{mlp}/Dense_1", (m,), (d,))]
        return {
            f"{name}/{leaf}": shape
            for name, inputs, outputs in pairs
            for leaf, shape in (("kernel", inputs + outputs), ("bias", outputs))
        }

    for i in range(num_layers):
        block = f"Transformer/encoderblock_{i}"
        for norm in (f"{block}/LayerNorm_0", f"{block}/LayerNorm_2"):
            shapes |= {f"{norm}/scale": (d,), f"{norm}/bias": (d,)}
        shapes |= attention_and_mlp(f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3")
    shapes |= {"Transformer/encoder_norm/scale": (d,), "Transformer/encoder_norm/bias": (d,)}
    if pool == "map":
        shapes |= {
            "MAPHead_0/probe": (1, 1, d),
            "MAPHead_0/LayerNorm_0/scale": (d,),
            "MAPHead_0/LayerNorm_0/bias": (d,),
        }
        shapes |= attention_and_mlp("MAPHead_0/MultiHeadDotProductAttention_0", "MAPHead_0/MlpBlock_0")
    if representation_size:
        shapes |= {"pre_logits/kernel": (d, representation_size), "pre_logits/bias": (representation_size,)}
    return shapes | {"head/kernel": (representation_size or d, num_classes), "head/bias": (num_classes,)}


def flat_params(*, representation_size=None, num_classes=5, num_tokens=5, seed=0, **sizes):
    """Returns joined key -> random array, of a micro ViT."""
    shapes = released_shapes(
        **MICRO | sizes, representation_size=representation_size, num_classes=num_classes, num_tokens=num_tokens
    )
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def nest(flat):
    """Returns nested parameters from joined keys."""
    return unflatten_dict(flat, sep="/")


def stem_shapes(units, width):
    """Returns key -> shape of the ResNet of a hybrid."""
    shapes = {"conv_root/kernel": (7, 7, 3, width), "gn_root/scale": (width,), "gn_root/bias": (width,)}
    channels = width
    for block, (num_units, middle) in enumerate(zip(units, [width, 2 * width, 4 * width, 8 * width], strict=False), 1):
        for number in range(1, num_units + 1):
            unit = f"block{block}/unit{number}"
            kernels = {"1": (1, 1, channels, middle), "2": (3, 3, middle, middle), "3": (1, 1, middle, 4 * middle)}
            if number == 1:
                kernels["_proj"] = (1, 1, channels, 4 * middle)
            for name, kernel in kernels.items():
                shapes[f"{unit}/conv{name}/kernel"] = kernel
                shapes[f"{unit}/gn{name}/scale"] = shapes[f"{unit}/gn{name}/bias"] = kernel[-1:]
            channels = 4 * middle
    return shapes


def forward(params, images):
    """Returns logits [b classes] of images [b h w 3], both float64; Dosovitskiy et al. 2021, Eq. 1 to 4.

    The parameters determine whether the model has a ResNet stem, a class token and an attention pooling head.
    """
    params = to_float64(params)
    encoder = params["Transformer"]

    x = np.asarray(images, np.float64)
    if "conv_root" in params:
        x = stem(params, x)
    x = embed_patches(params["embedding"], x)  # [b n d]
    if "cls" in params:
        cls = np.repeat(params["cls"], len(x), axis=0)  # [b 1 d]
        x = np.concatenate([cls, x], axis=1)  # [b 1+n d]
    x = x + encoder["posembed_input"]["pos_embedding"]

    num_layers = sum(name.startswith("encoderblock_") for name in encoder)
    for i in range(num_layers):
        block = encoder[f"encoderblock_{i}"]
        y = layer_norm(block["LayerNorm_0"], x)
        x = x + attend(block["MultiHeadDotProductAttention_1"], y, y)
        x = x + mlp(block["MlpBlock_3"], layer_norm(block["LayerNorm_2"], x))

    y = pool(params, layer_norm(encoder["encoder_norm"], x))  # [b d]
    if "pre_logits" in params:
        y = np.tanh(dense(params["pre_logits"], y))
    return dense(params["head"], y)


def pool(params, x):
    """Pools tokens [b n d] to features [b d]: class token, attention pooling (Zhai et al. 2022), or mean."""
    if "cls" in params:
        return x[:, 0]
    if "MAPHead_0" not in params:
        return x.mean(axis=1)
    head = params["MAPHead_0"]
    y = attend(head["MultiHeadDotProductAttention_0"], np.repeat(head["probe"], len(x), axis=0), x)
    return (y + mlp(head["MlpBlock_0"], layer_norm(head["LayerNorm_0"], y)))[:, 0]


def stem(params, x):
    """Applies the ResNet of a hybrid: bottleneck units, with the last ReLU after the residual connection."""
    x = max_pool(relu(group_norm(params["gn_root"], std_conv(params["conv_root"], x, stride=2))))
    blocks = sorted(name for name in params if name.startswith("block"))
    for name in blocks:
        for number in range(1, len(params[name]) + 1):
            unit = params[name][f"unit{number}"]
            stride = 2 if number == 1 and name != "block1" else 1
            shortcut = x
            if "conv_proj" in unit:
                shortcut = group_norm(unit["gn_proj"], std_conv(unit["conv_proj"], x, stride))
            y = relu(group_norm(unit["gn1"], std_conv(unit["conv1"], x)))
            y = relu(group_norm(unit["gn2"], std_conv(unit["conv2"], y, stride)))
            x = relu(shortcut + group_norm(unit["gn3"], std_conv(unit["conv3"], y)))
    return x


def relu(x):
    return np.maximum(x, 0)


def std_conv(layer, x, stride=1):
    """Convolution with SAME padding; each output channel of the kernel has mean 0 and is divided by its std + 1e-5."""
    kernel = layer["kernel"] - layer["kernel"].mean(axis=(0, 1, 2))
    kernel = kernel / (np.sqrt((kernel**2).mean(axis=(0, 1, 2))) + 1e-5)
    side = len(kernel)
    windows = [window(x, side, stride, row, column, 0.0) for row in range(side) for column in range(side)]
    return sum(values @ kernel[i // side, i % side] for i, values in enumerate(windows))


def max_pool(x):
    """Max pooling, 3 × 3, stride 2, SAME padding."""
    return np.max([window(x, 3, 2, row, column, -np.inf) for row in range(3) for column in range(3)], axis=0)


def window(x, side, stride, row, column, padding):
    """Returns the inputs [b h' w' c] at one position of the kernel, for all output positions, with SAME padding."""
    starts = []
    for length, offset in zip(x.shape[1:3], (row, column), strict=True):
        steps = -(-length // stride)
        margin = max(0, (steps - 1) * stride + side - length) // 2
        starts.append(np.arange(steps) * stride + offset - margin)
    inside = [(start >= 0) & (start < length) for start, length in zip(starts, x.shape[1:3], strict=True)]
    rows, columns = (np.where(valid, start, 0) for valid, start in zip(inside, starts, strict=True))
    values = x[:, rows[:, None], columns[None]]
    return np.where((inside[0][:, None] & inside[1][None])[..., None], values, padding)


def group_norm(norm, x):
    """Group normalization with 32 groups."""
    groups = x.reshape(*x.shape[:3], 32, -1)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    variance = ((groups - mean) ** 2).mean(axis=(1, 2, 4), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * norm["scale"] + norm["bias"]


def to_float64(tree):
    if isinstance(tree, dict):
        return {name: to_float64(subtree) for name, subtree in tree.items()}
    return np.asarray(tree, np.float64)


def embed_patches(embedding, images):
    """Splits images into patches, row by row, and projects each to a vector."""
    kernel = embedding["kernel"]
    patch = kernel.shape[0]
    height, width = images.shape[1:3]
    tokens = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            pixels = images[:, top : top + patch, left : left + patch]  # [b p p c]
            tokens.append(np.tensordot(pixels, kernel, axes=3))  # [b d]
    return np.stack(tokens, axis=1) + embedding["bias"]


def layer_norm(norm, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-6) * norm["scale"] + norm["bias"]


def attend(attention, queries, keys):
    """Multi-head scaled dot-product attention (appendix A of the paper)."""
    query, key, value = (
        np.einsum("bnd,dke->bkne", x, attention[name]["kernel"]) + attention[name]["bias"][:, None]
        for name, x in (("query", queries), ("key", keys), ("value", keys))
    )  # [b k n d/k]
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])  # [b k n n]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return np.einsum("bkne,ked->bnd", weights @ value, attention["out"]["kernel"]) + attention["out"]["bias"]


def mlp(block, x):
    return dense(block["Dense_1"], gelu(dense(block["Dense_0"], x)))


def gelu(x):
    """Tanh approximation (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]
