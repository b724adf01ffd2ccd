"""Fine-tune an image captioner in JAX/Flax, and show that it reproduces what was published."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `Captioner` when it is asked for: it needs JAX and transformers, and `repro --help` does not."""
    if name == "Captioner":
        from importlib import import_module

        return import_module("repro.models.captioning").Captioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
