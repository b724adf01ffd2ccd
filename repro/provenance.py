"""What computes: this project's version and commit, the packages, Python, the devices and their settings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from repro import __version__
from repro.allocator import allocator

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "huggingface_hub"),
    *("datasets", "evaluate", "rouge_score", "nltk", "numpy", "pillow"),
)
SETTINGS = ("default_matmul_precision", "threefry_partitionable")
ROOT = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """Name this project, Python and the packages that move numbers, with their versions."""
    commit = _commit()
    found = {"repro": f"{__version__}+{commit}" if commit else __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # an installation without it runs until it is needed
            found[package] = "not installed"
    return found


def _commit() -> str:
    """The commit of the checkout that this package lies in, with `-dirty` if files differ from it; else nothing."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that it does not trust
        return ""


def where() -> str:
    """Name JAX's backend, the operating system and the allocator; starts JAX."""
    import jax

    return f"{jax.default_backend()}, {platform.platform()}, {allocator()}"


def environment() -> dict[str, Any]:
    """Collect versions, devices and the settings of JAX and XLA that move numbers; starts JAX."""
    import jax

    return {
        "versions": versions(),
        "platform": where(),
        "devices": [f"{device.device_kind} {device.id}" for device in jax.devices()],
        "settings": {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            **{name: getattr(jax.config, f"jax_{name}") for name in SETTINGS},
        },
    }


def as_lines(found: dict[str, Any]) -> str:
    """Put an environment into lines for a bug report."""
    lines = [f"{name:24} {version}" for name, version in found["versions"].items()]
    lines += [f"{'platform':24} {found['platform']}", f"{'devices':24} {', '.join(found['devices'])}"]
    return "\n".join(lines + [f"{name:24} {value}" for name, value in found["settings"].items() if value])
