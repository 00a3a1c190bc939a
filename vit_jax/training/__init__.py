"""Training: the optimizer, the jitted steps, checkpoints and metrics."""
