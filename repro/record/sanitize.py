"""Text that others wrote, made fit for a page: nothing in it is invisible, endless, or read as anything but text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

CLIPPED = 400  # characters of a caption that are shown
JOINERS = "\u200c\u200d"  # without which Persian, Indic scripts and composed pictographs are misspelt
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of control characters, directions, surrogates and line separators
COMBINING = ("Mn", "Me")  # categories of marks over, under and around another character
MARKS = 4  # combining marks in a row from which on they would pile up over the lines around them


def visible(text: str) -> str:
    """Show control and direction characters, lone surrogates and the like as their code points.

    The result can be encoded, has no line breaks, and reads the same in every order of writing around it.
    """
    if text.isascii() and text.isprintable():
        return text
    shown: list[str] = []
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in COMBINING else 0
        if marks <= MARKS:
            shown.append(f"⟨U+{ord(character):04X}⟩" if _is_hidden(character) else character)
    return "".join(shown)


def clip(text: str, limit: int = CLIPPED) -> str:
    """Cut a text that is too long to be shown, and say how long it is; then `visible`."""
    if len(text) <= limit:
        return visible(text)
    return f"{visible(text[:limit])} … ({len(text):,} characters in all)"


def template(package: str, name: str, *, autoescape: bool, **filters: Callable[..., str]) -> Template:
    """Load a template of a package, with filters for what is put into it."""
    environment = Environment(loader=PackageLoader(package), autoescape=autoescape, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= filters
    return environment.get_template(name)


def _is_hidden(character: str) -> bool:
    code = ord(character)
    return (unicodedata.category(character) in HIDDEN and character not in JOINERS) or code & 0xFFFE == 0xFFFE
