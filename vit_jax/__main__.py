"""Lists the commands: `python -m vit_jax`."""

COMMANDS = {
    "evaluate": "evaluate a run on its test images, or any model on a dataset",
    "predict": "classify image files",
    "visualize": "plot attention, position embeddings, patch filters, confusion matrix and errors of a run",
    "export": "save the model of a run as .npz, Orbax, safetensors or StableHLO",
    "compare": "print a table of runs",
    "report": "write the HTML report of a run",
    "config": "print every config key with its default, unit and range",
}


def main() -> None:
    """Prints a line for each command."""
    print("usage: python -m vit_jax.COMMAND [--help]\n")
    print("\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items()))
    print("\nTrain with: python train.py --config configs/NAME.py")


if __name__ == "__main__":
    main()
