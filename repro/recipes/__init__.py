"""What can be reproduced: flags, targets, and the source of every target, one JSON file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repro.errors import InputError
from repro.json_files import keys, optional, read_json

FOLDER = Path(__file__).parent
OPTIONAL = optional(data=dict[str, int], model=dict, may_vary=list[str])
# `repro.recipes.targets` reads the targets more closely.
RECIPE = keys(name=str, flags=dict[str, Any], targets=list[dict[str, Any]], **OPTIONAL)


def recipe_names() -> list[str]:
    """Names that `read_recipe` takes."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def read_recipe(name: str) -> Any:
    """Read a recipe; an InputError if there is none of that name."""
    if name not in recipe_names():
        raise InputError(f"recipe {name!r}: choose one of {', '.join(recipe_names())}.")
    return read_json(FOLDER / f"{name}.json", RECIPE)
