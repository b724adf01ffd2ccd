"""What can be reproduced: flags, targets, and the source of every target, one JSON file each."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from repro.errors import InputError


def recipe_names() -> list[str]:
    """Names that `read_recipe` takes."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        InputError: there is none of that name.
    """
    if name not in recipe_names():
        raise InputError(f"recipe {name!r}: choose one of {', '.join(recipe_names())}.")
    return json.loads((resources.files(__name__) / f"{name}.json").read_text(encoding="utf-8"))
