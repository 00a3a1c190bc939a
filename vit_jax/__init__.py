"""Fine-tune Google's Vision Transformers from the files Google released."""

__version__ = "0.1.0"
