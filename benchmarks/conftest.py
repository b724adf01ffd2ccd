"""Flags of the benchmarks' pytest entry points, which are those of `suite.py`; without `--device` all is very small."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--device", help="measure in full, into results/DEVICE")
    group.addoption("--dtype", choices=("float32", "bfloat16"))
    group.addoption("--batch", type=int)
    group.addoption("--peers", help="names, with commas between")
    group.addoption("--rehearsal", help="flags of the end to end part, as one word")
    group.addoption("--folder", help="for the stand-in of the end to end part")
