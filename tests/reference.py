"""What the tests compare with: the released files' key list, and a ViT in float64 NumPy written from the paper alone.

No JAX here, and nothing of the package.
"""

import numpy as np

B_16 = {"patch_size": 16, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}


def released_shapes(
    *, patch_size, hidden_size, num_layers, num_heads, mlp_dim, representation_size, num_classes, num_tokens
):
    """Key -> shape of a released file; the order is that of the files."""
    d, m, heads = hidden_size, mlp_dim, (num_heads, hidden_size // num_heads)
    shapes = {
        "cls": (1, 1, d),
        "embedding/kernel": (patch_size, patch_size, 3, d),
        "embedding/bias": (d,),
        "Transformer/posembed_input/pos_embedding": (1, num_tokens, d),
    }
    for i in range(num_layers):
        block = f"Transformer/encoderblock_{i}"
        attention, mlp = f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3"
        for norm in (f"{block}/LayerNorm_0", f"{block}/LayerNorm_2"):
            shapes |= {f"{norm}/scale": (d,), f"{norm}/bias": (d,)}
        for name in ("query", "key", "value"):
            shapes |= {f"{attention}/{name}/kernel": (d, *heads), f"{attention}/{name}/bias": heads}
        shapes |= {f"{attention}/out/kernel": (*heads, d), f"{attention}/out/bias": (d,)}
        shapes |= {f"{mlp}/Dense_0/kernel": (d, m), f"{mlp}/Dense_0/bias": (m,)}
        shapes |= {f"{mlp}/Dense_1/kernel": (m, d), f"{mlp}/Dense_1/bias": (d,)}
    shapes |= {"Transformer/encoder_norm/scale": (d,), "Transformer/encoder_norm/bias": (d,)}
    if representation_size:
        shapes |= {"pre_logits/kernel": (d, representation_size), "pre_logits/bias": (representation_size,)}
    return shapes | {"head/kernel": (representation_size or d, num_classes), "head/bias": (num_classes,)}


def forward(params, images):
    """Logits [b classes] of images [b h w 3], both float64; Dosovitskiy et al. 2021, Eq. 1 to 4."""
    params = to_float64(params)
    encoder = params["Transformer"]

    x = embed_patches(params["embedding"], np.asarray(images, np.float64))  # [b n d]
    cls = np.repeat(params["cls"], len(x), axis=0)  # [b 1 d]
    x = np.concatenate([cls, x], axis=1)  # [b 1+n d]
    x = x + encoder["posembed_input"]["pos_embedding"]

    num_layers = sum(name.startswith("encoderblock_") for name in encoder)
    for i in range(num_layers):
        block = encoder[f"encoderblock_{i}"]
        x = x + attend(block["MultiHeadDotProductAttention_1"], layer_norm(block["LayerNorm_0"], x))
        x = x + mlp(block["MlpBlock_3"], layer_norm(block["LayerNorm_2"], x))

    y = layer_norm(encoder["encoder_norm"], x)[:, 0]  # [b d]
    if "pre_logits" in params:
        y = np.tanh(dense(params["pre_logits"], y))
    return dense(params["head"], y)


def to_float64(tree):
    if isinstance(tree, dict):
        return {name: to_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, np.float64)


def embed_patches(embedding, images):
    """Cuts pictures into patches, row by row, and maps each to a vector."""
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


def attend(attention, x):
    """Scaled dot-product attention of every head (appendix A of the paper)."""
    query, key, value = (
        np.einsum("bnd,dke->bkne", x, attention[name]["kernel"]) + attention[name]["bias"][:, None]
        for name in ("query", "key", "value")
    )  # [b k n d/k]
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])  # [b k n n]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return np.einsum("bkne,ked->bnd", weights @ value, attention["out"]["kernel"]) + attention["out"]["bias"]


def mlp(block, x):
    return dense(block["Dense_1"], gelu(dense(block["Dense_0"], x)))


def gelu(x):
    """The tanh form (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]
