"""`python -m vit_jax.visualize --workdir DIR --out DIR`: pictures of what a run learned and where it errs."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.runtime.errors import UsageError, parse_arguments, run_command
from vit_jax.runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vit_jax.trainer import Run


def main(argv: list[str] | None = None) -> int:
    """Draws everything and prints the files."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.visualize", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, help="folder for the pictures; made if need be")
    parser.add_argument("--images", nargs="+", metavar="PICTURE", help="to show attention on, not test pictures")
    parser.add_argument("--num_images", type=int, default=8, help="how many test pictures attention is shown on")
    parser.add_argument("--layer", type=int, help="attention of this layer alone, on every picture")
    parser.add_argument("--head", type=int, help="and of this head alone")
    parser.add_argument("--step", type=int, help="which checkpoint; the latest unless given")
    parser.add_argument("--data_dir", help="where the dataset lies, if no longer where the config says")
    arguments = parse_arguments(parser, argv)
    if arguments.num_images < 1:
        raise UsageError(f"--num_images is {arguments.num_images}; expected at least 1")

    from vit_jax import trainer

    run = trainer.load_run(arguments.workdir, step=arguments.step)
    check_layer_and_head(run.model, arguments.layer, arguments.head)
    if arguments.data_dir is not None:
        run.config.dataset.data_dir = arguments.data_dir
    given = [read_picture(path, run.config.image_size) for path in arguments.images or ()]
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in draw_all(
        run,
        Path(arguments.workdir),
        pictures=list(zip(map(str, arguments.images or ()), given, strict=True)),
        num_images=arguments.num_images,
        layer=arguments.layer,
        head=arguments.head,
    ):
        print(save(figure, out / f"{name}.png"), flush=True)
    return 0


def check_layer_and_head(model: Any, layer: int | None, head: int | None) -> None:
    """Refuses what the model does not have."""
    if (layer is not None or head is not None) and not has_attention(model):
        raise UsageError(f"--layer and --head are for attention, which a {type(model).__name__} does not have")
    if head is not None and layer is None:
        raise UsageError("--head needs --layer: give both, or neither for all")
    for flag, value, name in (("--layer", layer, "num_layers"), ("--head", head, "num_heads")):
        if value is not None and not 0 <= value < getattr(model, name):
            raise UsageError(f"{flag} is {value}; the model has 0 to {getattr(model, name) - 1}")


def has_attention(model: Any) -> bool:
    """Whether the model has patches, positions and attention to draw; a ResNet has none."""
    return hasattr(model, "num_heads")


def read_picture(path: str, image_size: int) -> np.ndarray:
    """A picture file as uint8 [image_size image_size 3]."""
    from vit_jax import data

    return np.asarray(data.decode_image(Path(path), size=(image_size, image_size)))


def draw_all(
    run: "Run",
    workdir: Path,
    *,
    pictures: list[tuple[str, np.ndarray]],
    num_images: int,
    layer: int | None,
    head: int | None,
) -> Iterator[tuple[str, "Figure"]]:
    """The figures of a run, one after the other, each with its name; without metrics, no curves.

    Args:
        run: of `trainer.load_run`.
        workdir: of the run, for its curves.
        pictures: (name, uint8 [h w 3]) to show attention on; test pictures where there are none.
        num_images: how many of those.
        layer: attention of one layer instead of all; None draws all.
        head: and of one head.
    """
    import jax.numpy as jnp

    from vit_jax import trainer
    from vit_jax.training import steps, writer
    from vit_jax.training.program import test_options
    from vit_jax.visualization import analysis, plotting

    records = writer.read_records(workdir / "metrics.jsonl", last_step=run.step)
    if records:
        yield "curves", plotting.plot_curves(records, title=workdir.name)
    else:
        print(f"{workdir} has no metrics up to step {run.step}: no curves are plotted", file=sys.stderr)

    if has_attention(run.model):
        embeddings = np.asarray(run.params["Transformer"]["posembed_input"]["pos_embedding"])
        similarity = analysis.position_similarity(embeddings, class_token=run.model.pool == "cls")
        yield "position_similarity", plotting.plot_position_similarity(similarity)
        yield "position_matrix", plotting.plot_position_matrix(similarity)
        filters = run.params["embedding" if run.model.stem_units is None else "conv_root"]["kernel"]
        yield "patch_filters", plotting.plot_filters(*analysis.filter_components(filters))

    test, names = trainer.load_test_dataset(run).test, run.class_names
    probabilities = trainer.predict(run, test.images)
    predictions = probabilities.argmax(axis=-1)
    counts = analysis.confusion(test.labels, predictions, num_classes=len(names))
    accuracy = np.trace(counts) / counts.sum()
    title = f"{workdir.name}: {accuracy:.2%} of {len(test):,} test pictures are right"
    yield "confusion", plotting.plot_confusion(counts, analysis.most_confused(counts), names, title=title)
    wrong = analysis.most_confident_errors(probabilities, test.labels)
    yield (
        "mistakes",
        plotting.plot_errors(
            test.images[wrong],
            [names[label] for label in test.labels[wrong]],
            [names[prediction] for prediction in predictions[wrong]],
            [float(value) for value in probabilities[wrong].max(axis=-1)],
        ),
    )

    if not has_attention(run.model):
        print(f"a {type(run.model).__name__} has no attention, positions or patches to draw")
        return
    if pictures:
        images = np.stack([image for _, image in pictures])
        said = trainer.predict(run, images).argmax(axis=-1)
    else:
        chosen = np.random.default_rng(run.config.seed).permutation(len(test))[:num_images]
        pictures = [(names[test.labels[i]], test.images[i]) for i in chosen]
        images, said = np.stack([image for _, image in pictures]), predictions[chosen]
    titles = [f"{Path(name).name}\nsays {names[i]}" for (name, _), i in zip(pictures, said, strict=True)]
    forward = steps.image_forward(run.model, **{**test_options(run.config), "test_augment": "none"})
    inputs = forward.prepare(jnp.zeros((len(images), 2), jnp.uint32), jnp.asarray(images))  # keys that draw nothing
    weights = analysis.attention_weights(run.model, run.params, inputs)  # [l b k n n]
    class_token = run.model.pool == "cls"
    head_maps = analysis.attention_maps(weights, class_token=class_token)  # [l b k g g]
    who = "the class token" if class_token else "the patches, on average"
    if layer is None:
        rollout = analysis.attention_rollout(weights, analysis.pooling_weights(run.model, run.params, inputs))
        title = "Attention through all layers (rollout)"
        yield "attention_rollout", plotting.plot_attention(images, rollout, titles, title=title)
        heads = plotting.plot_heads(images[0], head_maps[:, 0], title=f"Attention of {who}")
        yield "attention_heads", heads
    else:
        maps = head_maps[layer].mean(axis=1) if head is None else head_maps[layer][:, head]
        which = f"layer {layer}, " + ("mean of its heads" if head is None else f"head {head}")
        name = f"attention_layer_{layer}" + ("" if head is None else f"_head_{head}")
        yield name, plotting.plot_attention(images, maps, titles, title=f"Attention of {who}: {which}")


def save(figure: "Figure", path: Path) -> Path:
    """Writes a PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path


if __name__ == "__main__":
    sys.exit(run_command(main))
