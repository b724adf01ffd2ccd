"""The architecture, held: imports go one way, modules are small and say their one idea."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import repro

PACKAGE = Path(repro.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMAND_LINE = "command line"
LAYERS = {
    "foundation": {"foundation"},
    "data": {"foundation", "data"},
    "models": {"foundation", "data", "models"},
    "training": {"foundation", "data", "models", "training"},
    "evaluation": {"foundation", "data", "models", "training", "evaluation"},
    "reporting": {"foundation", "data", "models", "training", "evaluation", "reporting"},
    "recipes": {"foundation", "recipes"},
}
FOUNDATION = {"errors", "protocol", "__init__"}
MAX_LINES, MAX_TOTAL_LINES = 350, 4500


def layer(parts: tuple[str, ...]) -> str:
    """Which layer a module of `repro`, named by its path below the package, belongs to."""
    if parts[0] in LAYERS:
        return parts[0]
    return "foundation" if parts[0] in FOUNDATION else COMMAND_LINE


def imported_modules(path: Path) -> set[tuple[str, ...]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {tuple(name.split(".")[1:]) or ("__init__",) for name in names if name.split(".")[0] == "repro"}
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    own = layer(path.relative_to(PACKAGE).with_suffix("").parts)
    if own != COMMAND_LINE:  # which may import everything, and alone sees the configuration
        assert {layer(module) for module in imported_modules(path)} <= LAYERS[own]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_and_says_its_idea(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    first_line = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert first_line.endswith((".", ":")), "the docstring's first line is one sentence"


def test_the_package_is_compact() -> None:
    assert sum(len(path.read_text().splitlines()) for path in MODULES) <= MAX_TOTAL_LINES


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_comes_without_jax(argument: str) -> None:
    code = (
        "import sys; from repro.__main__ import main; "
        f"main([{argument!r}]); sys.exit(bool({{'jax', 'transformers', 'datasets'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
