"""The suite as tests, one for each part: `tox -e bench`, with `--device NAME` in full (see `suite.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import suite


@pytest.fixture(scope="session")
def result(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the suite measured."""
    device = pytestconfig.getoption("--device")
    smoke = tmp_path_factory.mktemp("suite") / "smoke.json"
    output = suite.HERE / "results" / device / f"{date.today().isoformat()}.json" if device else smoke
    flags = ["--output", str(output), *([] if device else ["--smoke"])]
    for name in ("dtype", "batch", "rehearsal", "folder"):
        if (value := pytestconfig.getoption(f"--{name}")) is not None:
            flags += [f"--{name}", str(value)]
    if peers := pytestconfig.getoption("--peers"):
        flags += ["--peers", *peers.split(",")]
    subprocess.run([sys.executable, str(Path(suite.__file__)), *flags], check=False)
    return json.loads(output.read_text())


@pytest.mark.parametrize("part", suite.PARTS)
def test_part(result: dict[str, Any], part: str) -> None:
    if part not in result:
        pytest.skip("the same as another part with this --dtype")
    assert [failure for failure in suite.failures(result) if failure.startswith(f"{part}:")] == []
