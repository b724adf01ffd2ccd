"""Signals that end a run where nothing is lost: the first is obeyed between two steps, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from repro.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Listens to SIGTERM and SIGINT while it is entered.

    Before training there is no state to save: the first signal raises `Interrupted` where the program is. From
    `defer` on it only asks `requested` to say so.

    Several processes have to stop after the same step. JAX finds it, but takes SIGTERM's handler for that, so a second
    SIGTERM does nothing there; SIGINT is passed on as SIGTERM, and a second one ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS[1:] if jax.process_count() > 1 else SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def defer(self) -> None:
        """From now on stop between two steps."""
        self._deferred = True

    def requested(self, step: int) -> bool:
        """Tell whether to stop after this step; with several processes, all must ask after every step."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                self.received = self.received or signal.SIGTERM
                return True
            return False
        return self.received is not None

    def raise_if_received(self) -> None:
        """Leave an evaluation, which several processes can only do together and so do not."""
        if self.received is not None and jax.process_count() == 1:
            raise Interrupted(self.received, "during an evaluation, which will be done again.")

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + signum)
        self.received = signum
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self._deferred:
            raise Interrupted(signum, "training had not begun.")
