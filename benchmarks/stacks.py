"""The golden cases on every stack: a table of versions and of the largest differences from the record.

    for stack in oldest tests newest flax-class accelerator; do
        .tox/$stack/bin/repro selftest --json > benchmarks/results/stacks/$stack.json
    done
    python benchmarks/stacks.py

The environments are tox's. What `repro selftest --json` wrote lies beside the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STACKS = Path(__file__).parent / "results" / "stacks"
PACKAGES = ("python", "jax", "flax", "optax", "transformers", "huggingface_hub", "numpy", "pillow")


def page(results: dict[str, dict[str, Any]]) -> str:
    """Put what each stack's selftest said into a table."""
    lines = [
        "# Stacks",
        "",
        "`repro selftest --json` of each tox environment, put together by `benchmarks/stacks.py`: the largest",
        "difference of a training step's loss and learning rate over the four short golden cases (bounds 2e-5 and",
        "1e-7), of a parameter's norm (relative), and captions that are equal.",
        "",
        f"| stack | {' | '.join(PACKAGES)} | loss | rate | norm | captions | verdict |",
        "|---" * (len(PACKAGES) + 6) + "|",
    ]
    for stack, result in results.items():
        cases = result["results"]["float32, highest"]
        worst = [f"{max(case[name] for case in cases):.0e}" for name in ("loss", "learning_rate", "norm")]
        captions = f"{sum(case['captions_equal'] for case in cases)} of {sum(case['captions'] for case in cases)}"
        versions = [result["versions"][package] for package in PACKAGES]
        verdict = "PASS" if result["passed"] else "FAIL"
        lines.append(f"| {' | '.join([stack, *versions, *worst, captions, verdict])} |")
    return "\n".join(lines) + "\n"


def read_results() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(STACKS.glob("*.json"))}


if __name__ == "__main__":
    (STACKS / "README.md").write_text(page(read_results()))
