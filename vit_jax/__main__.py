"""Lists the commands: `python -m vit_jax`."""

COMMANDS = {
    "inspect": "write a page about the images of a dataset, before training",
    "evaluate": "evaluate a run on its test images, or a run or checkpoint on a dataset",
    "probe": "test the features of a run or checkpoint on a dataset, by logistic regression and nearest neighbors",
    "predict": "classify image files with a run or checkpoint",
    "visualize": "plot attention, position embeddings and patch filters; of a run also confusion matrix and errors",
    "export": "save a run or checkpoint as .npz, Orbax, safetensors or StableHLO",
    "compare": "print a table of runs",
    "report": "write the HTML report of a run",
    "pretrained": "list the pretrained checkpoints, with parameters, resolution and pretraining data",
    "config": "print every config key with its default, unit and range",
}


def main() -> None:
    """Prints a line for each command."""
    print("usage: python -m vit_jax.COMMAND [--help]\n")
    print("\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items()))
    print("\nTrain with: python train.py --config configs/NAME.py")


if __name__ == "__main__":
    main()
