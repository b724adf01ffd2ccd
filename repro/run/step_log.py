"""What a run says while it is at work: every step's loss, without making the device wait, and each evaluation."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from typing import Any

import jax

from repro.progress import progress_bar
from repro.record.metrics import METRICS
from repro.record.writer import RunWriter, log
from repro.run.settings import Settings

REFRESH_SECONDS = 1.0
# Newest steps that are left on the device when the bar is refreshed, so that it has work queued meanwhile.
IN_FLIGHT = 2
RECENT = 20  # refreshes of the bar, from which its rate and the time that is left are worked out
FEWEST_LINES = 10  # of a run that has fewer steps than `--logging_steps`
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
# What an evaluation's line shows, each with its decimals.
SHORT = {"loss": 4, "rouge2": 2, "rougeL": 2, "gen_len": 1}


class NonFinite(Exception):
    """The first step whose loss or gradient is infinite or not a number: the parameters after it are worthless."""

    def __init__(self, step: int, metrics: dict[str, float]) -> None:
        super().__init__(f"step {step}: {metrics}")
        self.step, self.metrics = step, metrics


@dataclass
class StepLog:
    """Collects the metrics of steps, writes them once they are computed, and watches that they are finite.

    Its clock starts when it is made.
    """

    writer: RunWriter
    settings: Settings
    _: KW_ONLY
    progress: bool
    before: Mapping[str, Any] = field(default_factory=dict)  # what was saved with the state that is gone on from

    def __post_init__(self) -> None:
        self._written, self._training_seconds = self.before.get("step", 0), self.before.get("training_seconds", 0.0)
        self.waited = self.before.get("waiting_for_input_seconds", 0.0)  # which older versions did not save
        self._paused = False
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._resumed = self._refreshed = time.perf_counter()
        self._recent = deque([(self._written, self._training_seconds)], maxlen=RECENT)
        num_steps, logged = self.settings.num_steps, self.settings.logging_steps
        self._lines_every = max(num_steps // FEWEST_LINES, 1) if num_steps < logged else logged
        self.bar = progress_bar(
            progress=self.progress, total=num_steps, initial=self._written, desc="train", bar_format=BAR
        )

    def add(self, step: int, metrics: dict[str, jax.Array], *, waited: float = 0.0) -> None:
        """Take over a step's metrics, read to log them or refresh the bar, and the seconds until its batch came."""
        self._pending.append((step, metrics))
        self.waited += waited
        if self.logs(step):
            self.flush()
        elif time.perf_counter() - self._refreshed > REFRESH_SECONDS:
            self._write(self._pending[:-IN_FLIGHT])
            self._pending = self._pending[-IN_FLIGHT:]

    def logs(self, step: int) -> bool:
        """Tell whether a step is one of those that are logged, and written at once."""
        return self.settings.logging_steps > 0 and step % self.settings.logging_steps == 0

    def flush(self) -> None:
        """Wait for all steps so far and write them, up to one that cannot be gone on from, which raises NonFinite."""
        self._write(self._pending)
        self._pending = []

    def pause(self) -> None:
        """Flush, and stop the training clock (for an evaluation or a save)."""
        self.flush()
        self._training_seconds, self._paused = self.training_seconds, True

    def resume(self) -> None:
        """Go on counting training time."""
        self._resumed, self._paused = time.perf_counter(), False

    @property
    def training_seconds(self) -> float:
        """Time spent on the steps so far, those before the run was resumed included, without evaluations."""
        return self._training_seconds + (0.0 if self._paused else time.perf_counter() - self._resumed)

    def close(self) -> dict[str, float]:
        """Stop the clock, and end the bar.

        Returns:
            `train_seconds`, without evaluations, `train_rows_per_second`, and `waiting_for_input_seconds`: those of all
            steps, each as it was taken last.
        """
        self.pause()
        self.bar.close()
        rows = self._written * self.settings.train_batch
        return {
            "train_seconds": round(self._training_seconds, 3),
            "train_rows_per_second": round(rows / max(self._training_seconds, 1e-9), 2),
            "waiting_for_input_seconds": round(self.waited, 3),
        }

    def _pace(self, step: int) -> str:
        """Rows a second and time left, by the last steps."""
        began_at, began = self._recent[0]
        steps_per_second = (self._written - began_at) / max(self.training_seconds - began, 1e-3)
        left = timedelta(seconds=round((self.settings.num_steps - step) / max(steps_per_second, 1e-9)))
        return f"{steps_per_second * self.settings.train_batch:.0f} rows/s, {left} left"

    def _write(self, steps: list[tuple[int, dict[str, jax.Array]]]) -> None:
        rows: list[dict[str, Any]] = []
        broken = None
        for step, metrics in steps:
            values = {name: float(value) for name, value in metrics.items()}
            if not all(map(math.isfinite, values.values())):
                broken = NonFinite(step, values)
                break
            if not self.settings.log_grad_norm:
                values.pop("grad_norm", None)
            rows.append({"step": step, **values} | ({"seconds": self.training_seconds} if self.logs(step) else {}))
        self.writer.append(rows)
        self._written += len(rows)
        for row in rows:
            if self.logs(row["step"]):
                self.writer.train_scalars(row["step"], row, self.training_seconds)
            if self.settings.logging_steps and row["step"] % self._lines_every == 0:
                told = "step %d of %d: loss %.4f, learning rate %.2e, %s"
                pace, total = self._pace(row["step"]), self.settings.num_steps
                log.info(told, row["step"], total, row["loss"], row["learning_rate"], pace)
        self._refreshed = time.perf_counter()
        if rows:
            self.bar.update(len(rows))
            self.bar.set_postfix_str(f"loss {rows[-1]['loss']:.4f}, {self._pace(self._written)}")
            self._recent.append((self._written, self.training_seconds))
        if broken:
            raise broken


def in_short(metrics: Mapping[str, float]) -> str:
    """Put an evaluation's main metrics on one line."""
    shown = [f"{METRICS[name].label} {metrics[name]:.{places}f}" for name, places in SHORT.items() if name in metrics]
    return ", ".join(shown).replace(METRICS["gen_len"].label, "length")
