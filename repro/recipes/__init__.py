"""What can be reproduced: flags, targets, and the source of every target, one JSON file each."""

from __future__ import annotations

from importlib import resources
from typing import Any

from repro.errors import InputError
from repro.json_files import keys, optional, read_json

OPTIONAL = optional(data=dict[str, int], model=dict, may_vary=list[str])
# `repro.recipes.targets` reads the targets more closely.
RECIPE = keys(name=str, flags=dict[str, Any], targets=list[dict[str, Any]], **OPTIONAL)


def recipe_names() -> list[str]:
    """Names that `read_recipe` takes."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read_recipe(name: str) -> Any:
    """Read a recipe.

    Raises:
        InputError: there is none of that name.
    """
    if name not in recipe_names():
        raise InputError(f"recipe {name!r}: choose one of {', '.join(recipe_names())}.")
    with resources.as_file(resources.files(__name__) / f"{name}.json") as file:
        return read_json(file, RECIPE)
