"""Fine-tune an image captioner in JAX/Flax, and show that it reproduces what was published."""

__version__ = "0.1.0"
