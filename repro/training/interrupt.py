"""Signals that end a run where nothing is lost: the first is obeyed between two steps, the second at once."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from repro.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_set_handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(("signal", ctypes.CDLL(None)))


class StopSignals:
    """Listens to SIGTERM and SIGINT while it is entered.

    Before training there is no state to save: the first signal raises `Interrupted` where the program is. From
    `defer` on it only asks `requested` to say so.

    Several processes have to stop after the same step. JAX finds it once its own handler of SIGTERM is called, which
    this one takes the place of, and calls for the first signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._was_sent_one = False  # this process; `received` may be what another was sent
        self._previous: dict[int, object] = {}
        self._asks_all: int | None = None  # where JAX's handler is

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            if jax.process_count() > 1:  # Python does not know JAX's handler, but the system does
                self._asks_all = _set_handler(signal.SIGTERM, signal.SIG_DFL)
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        if self._asks_all:
            _set_handler(signal.SIGTERM, self._asks_all)

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
        if self._was_sent_one:
            os._exit(128 + signum)
        self.received, self._was_sent_one = signum, True
        if self._asks_all:
            HANDLER(self._asks_all)(signal.SIGTERM)
        elif not self._deferred:
            raise Interrupted(signum, "training had not begun.")
