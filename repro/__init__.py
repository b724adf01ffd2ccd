"""Fine-tune an image captioner in JAX/Flax, and show that it reproduces what was published."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repro.interface import Result, report, reproduce, train, verify
    from repro.models.captioning import Caption, Captioner
    from repro.recipes.verify import Verification

# transformers 5 says at every start that PyTorch is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["Caption", "Captioner", "Result", "Verification", "report", "reproduce", "train", "verify"]


def __getattr__(name: str) -> object:
    """Import what is asked for then: it needs JAX and transformers, and `repro --help` does not."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    places = {"Caption": "models.captioning", "Captioner": "models.captioning", "Verification": "recipes.verify"}
    return getattr(import_module(f"repro.{places.get(name, 'interface')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
