"""The pocket recipe's targets as a test, from nothing to the verdict: `tox -e targets`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_pocket_recipe_meets_its_targets(tmp_path: Path) -> None:
    folder = tmp_path / "pocket"
    command = [sys.executable, "-m", "repro", "reproduce", "pocket", "--output_dir", str(folder)]
    status = subprocess.run(command, check=False).returncode
    result = folder / "result.json"
    assert result.exists(), f"status {status}; what went wrong is above"
    found = json.loads(result.read_text())
    missed = [target for target in found["targets"] if target["verdict"] != "PASS"]
    assert (found["verdict"], missed, found["problems"]) == ("PASS", [], [])
    assert status == 0
