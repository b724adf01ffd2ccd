"""Measured values against a recipe's targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured.

    Attributes:
        low, high: the bounds within which the value passes, either may be None.
        measured: None where the run has no such metric, which does not pass.
    """

    metric: str
    low: float | None
    high: float | None
    measured: float | None
    source: str

    @property
    def passed(self) -> bool:
        if self.measured is None:
            return False
        above = self.low is None or self.measured >= self.low
        below = self.high is None or self.measured <= self.high
        return above and below

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        if self.high is None:
            return f"at least {self.low:g}"
        if self.low is None:
            return f"at most {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


def check_targets(targets: Sequence[Mapping[str, Any]], measured: Mapping[str, float]) -> list[Verdict]:
    """Hold each target {"metric", "low", "high", "source"} against the metric of its name; a NaN never passes."""
    return [
        Verdict(
            metric=target["metric"],
            low=target.get("low"),
            high=target.get("high"),
            measured=measured.get(target["metric"]),
            source=target["source"],
        )
        for target in targets
    ]
